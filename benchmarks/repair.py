"""Repair of a network that forgot: how much comes back, and what does the new task lose?

A network learns three tasks under the projection, which leaves a memory of them. Then it learns a fourth without any
protection. Four ways back are compared: `memsyn.repair` with the factors of the new task (`learned=`) and without; one
number for each layer, w / (w + lambda q) with w = ||D||^2 and q the predicted change of the layer; and one number for
all weights, the interpolation of WiSE-FT (Wortsman et al. 2022). The last two are given the least way back at which
they remember as much as the repair with `learned=` on the same row. A head that only the new task has stays.

For each bound, prints the share of the forgotten accuracy that comes back, and how many points the new task loses: the
mean over seeds and the 95% interval. `--validation` trains on one part of the training images and scores on the other.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import memsyn
from memsyn.parameters import layer_of
from memsyn_bench.methods.method import FineTuning
from memsyn_bench.methods.penalties import MEASURE_BATCH, through_head
from memsyn_bench.methods.projections import Projection
from memsyn_bench.results.metrics import interval
from memsyn_bench.running.scoring import score
from memsyn_bench.running.training import generator, task_training, train
from memsyn_bench.sequences.networks import Network
from memsyn_bench.sequences.sequences import TaskSequence, find_sequence
from memsyn_bench.settings import Settings
from memsyn_bench.task import Task, for_validation

OLD = 3
"""Tasks that are remembered; the next one is learned without protection."""
BOUNDS = (0.02, 0.05, 0.1, 0.2)
SHOWN = 200
"""Training images of each old task, without labels, by which the change is measured."""
STEPS = 20
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Forgot:
    """A network that learned carelessly, with what is known of it."""

    model: Network
    tasks: Sequence[Task]
    old: Weights
    new: Weights
    memory: memsyn.Memory
    learned: memsyn.KroneckerFactors
    scoring: str

    def scores(self, weights: Weights) -> tuple[float, float]:
        """The mean accuracy on the old tasks, and that on the new one, with some weights replaced."""
        self.model.load_state_dict({**self.new, **weights})
        *old, new = score(self.model, self.tasks, self.scoring)
        return fmean(old), new


def trained(sequence: TaskSequence, settings: Settings, tasks: Sequence[Task], seed: int, kept: Path | None) -> Forgot:
    """Learn the old tasks and remember them, then the new one; or read both from a file of an earlier run."""
    model = sequence.network(sequence.tasks(settings.size), generator(seed, 0))
    lessons = [
        task_training(model, task, index, settings=settings, augment=sequence.augment, seed=seed, loss=sequence.loss)
        for index, task in enumerate(tasks)
    ]
    if kept is None or not kept.exists():
        protected = Projection()
        for lesson in lessons[:OLD]:
            train(lesson, protected, lambda: None)
            protected.end(lesson)
        old = {name: values.clone() for name, values in model.state_dict().items()}
        train(lessons[OLD], FineTuning(), lambda: None)
        new, memory = {name: values.clone() for name, values in model.state_dict().items()}, protected.memory
        if kept is not None:
            memory.save(f"{kept}.mem")
            torch.save({"anchor": old, "state": new}, kept)
    else:
        states, memory = torch.load(kept, weights_only=True), memsyn.Memory.load(f"{kept}.mem")
        old, new = states["anchor"], states["state"]
        model.load_state_dict(new)
    batches, forward = tasks[OLD].train_images.split(MEASURE_BATCH), through_head(lessons[OLD])
    learned = memsyn.measure(model, batches, forward=forward, estimator="kronecker", progress=False)
    return Forgot(model.eval(), tasks, old, new, memory, learned, sequence.scorings[0])


def known(forgot: Forgot) -> list[str]:
    """The parameters that the memory's outputs rely on."""
    assert forgot.memory.directions is not None
    return sorted(forgot.memory.directions.names())


def interpolated(forgot: Forgot, shares: Callable[[str], float]) -> Weights:
    """Old weights and a share of their change, for what the memory knows."""
    old, new = forgot.old, forgot.new
    return {name: old[name] + shares(name) * (new[name] - old[name]) for name in known(forgot)}


def of_all(forgot: Forgot, way: float) -> Weights:
    """WiSE-FT: one number for all weights."""
    return interpolated(forgot, lambda name: 1 - way)


def of_layers(forgot: Forgot, way: float) -> Weights:
    """One number for each layer, w / (w + lambda q): little of the layers that change the old outputs much."""
    need = forgot.memory.predicted_change(forgot.new, forgot.old)
    sizes = dict.fromkeys(need, 0.0)
    for name in known(forgot):
        sizes[layer_of(name)] += float((forgot.new[name] - forgot.old[name]).square().sum())
    balance = way / max(1e-12, 1 - way) * sum(sizes.values()) / sum(need.values())
    kept = {layer: size / (size + balance * need[layer]) if size else 1.0 for layer, size in sizes.items()}
    return interpolated(forgot, lambda name: kept[layer_of(name)])


def path(forgot: Forgot, weights: Callable[[Forgot, float], Weights]) -> list[tuple[float, float]]:
    """The scores from the new weights to the old ones, in steps of a twentieth."""
    return [forgot.scores(weights(forgot, step / STEPS)) for step in range(STEPS + 1)]


def at(steps: Sequence[tuple[float, float]], old: float) -> tuple[float, float]:
    """The scores where the old tasks first reach an accuracy, between two steps in proportion."""
    for (low, first), (high, last) in pairwise(steps):
        if low < old <= high:
            return old, first + (old - low) / (high - low) * (last - first)
    return steps[0] if old <= steps[0][0] else steps[-1]


def rows(forgot: Forgot) -> dict[tuple[str, float], tuple[float, float]]:
    """(way back, bound) -> the share of what was forgotten that comes back, and the points that the new task loses."""
    before, (after, new) = forgot.scores(forgot.old)[0], forgot.scores({})
    paths = {"one number a layer": path(forgot, of_layers), "one number (WiSE-FT)": path(forgot, of_all)}
    shown = [{"inputs": task.train_images[:SHOWN], "task": index} for index, task in enumerate(forgot.tasks[:OLD])]
    found: dict[tuple[str, float], tuple[float, float]] = {}

    def note(way: str, bound: float, scores: tuple[float, float]) -> None:
        found[way, bound] = 100 * (scores[0] - after) / (before - after), new - scores[1]

    for bound in BOUNDS:
        for name, learned, batches in (
            ("repair, learned=", forgot.learned, None),
            ("repair, learned=, batches=", forgot.learned, shown),
            ("repair", None, None),
        ):
            forgot.model.load_state_dict(forgot.new)
            repaired = memsyn.repair(
                forgot.model,
                forgot.memory,
                reference=forgot.old,
                max_change=bound,
                learned=learned,
                batches=batches,
            )
            scores = forgot.scores(repaired.weights)
            note(name, bound, scores)
            if name == "repair, learned=":
                for other, steps in paths.items():
                    note(other, bound, at(steps, scores[0]))
    return found


def cell(values: Sequence[float]) -> str:
    """The mean, and its 95% interval."""
    own = interval(values)
    return f"{own.mean:.1f} ± {own.half:.1f}"


def main() -> None:
    """Print a table for each sequence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sequences", nargs="*", default=["permuted-fashion", "scripts8", "emoji8", "split-fashion"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--validation", action="store_true", help="score on held-out training images; seeds from 100")
    parser.add_argument("--keep", type=Path, help="a folder for the trained networks, which are then read from it")
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error("an interval needs two seeds at least")
    for name in options.sequences:
        sequence = find_sequence(name)
        training: dict[str, Any] = dict(sequence.training)
        settings = Settings(name, sequence.sizes[0], **training)
        found, said = [], []
        for number in tqdm(range(options.seeds), name):
            seed = number + 100 * options.validation
            tasks = sequence.tasks(settings.size)[: OLD + 1]
            tasks = [for_validation(task, seed) for task in tasks] if options.validation else tasks
            part = "val" if options.validation else "test"
            kept = options.keep and options.keep / f"{name}-{seed}-{part}-{OLD}.pt"
            forgot = trained(sequence, settings, tasks, seed, kept)
            (before, _), (after, new) = forgot.scores(forgot.old), forgot.scores({})
            said.append((before, after, new))
            found.append(rows(forgot))
            tqdm.write(f"{name}, seed {seed}: {said[-1]}, {found[-1]}")
        before, after, new = (fmean(own) for own in zip(*said, strict=True))
        print(f"\n{name}: old tasks {before:.1f}%, {after:.1f}% after the new one, which reaches {new:.1f}%\n")
        print("| way back | max_change | comes back | new task loses |\n|---|---:|---:|---:|")
        for way, bound in sorted(found[0], key=lambda key: key[0]):
            back, lost = ([own[way, bound][side] for own in found] for side in (0, 1))
            print(f"| {way} | {bound} | {cell(back)}% | {cell(lost)} |", flush=True)


if __name__ == "__main__":
    main()
