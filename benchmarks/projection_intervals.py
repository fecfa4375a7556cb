"""Is projecting weights after every fifth or tenth step as good as after every step? On validation data alone.

The projected form learns a whole sequence once for each interval and seed, with all its other defaults: gradients are
damped in every step. A seed changes the network, the batches, and the training images that are held out to validate on.
No test data are looked at.

    .venv/bin/python benchmarks/projection_intervals.py permuted-fashion --seeds 3

A line of the file is one sequence, interval and seed; lines that are there are not made again. Prints the mean over the
seeds and their standard deviation, in percent: the accuracy over all tasks after the last one, what was forgotten since
each task was learned, and the accuracy when learned. Then the differences from every step, seed by seed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean, stdev

from memsyn_bench import default_settings
from memsyn_bench.methods.projections import Projection
from memsyn_bench.running.scoring import score
from memsyn_bench.running.training import generator, task_training, train
from memsyn_bench.sequences.sequences import find_sequence
from memsyn_bench.task import for_validation

Key = tuple[str, int, int]
"""Sequence, steps between two projections, seed."""
Numbers = tuple[float, float, float]
"""Percent: at the end, forgotten, when learned."""


def learned(name: str, every: int, seed: int, num_tasks: int | None) -> Numbers:
    """One whole sequence, or its first tasks."""
    sequence, settings = find_sequence(name), default_settings(name)
    tasks = [for_validation(task, seed) for task in sequence.tasks(settings.size)[:num_tasks]]
    model, method = sequence.network(tasks, generator(seed, 0)), Projection(every=every)
    when_learned: list[float] = []
    scores: tuple[float, ...] = ()
    for index, task in enumerate(tasks):
        training = task_training(
            model, task, index, settings=settings, augment=sequence.augment, seed=seed, loss=sequence.loss
        )
        train(training, method, lambda: None)
        method.end(training)
        scores = score(model, tasks[: index + 1], sequence.scorings[0])
        when_learned.append(scores[-1])
    lost = [before - after for before, after in zip(when_learned[:-1], scores[:-1], strict=True)]
    return fmean(scores), fmean(lost), fmean(when_learned)


def read(file: Path) -> dict[Key, Numbers]:
    """The lines of the file."""
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return {(line["sequence"], line["every"], line["seed"]): tuple(line["percent"]) for line in lines}


def table(found: Mapping[Key, Numbers]) -> Iterator[str]:
    """For every sequence and interval: means and standard deviations over the seeds."""
    yield "| sequence | every | seeds | at the end | forgotten | when learned | at the end, less every step |"
    yield "|---|---:|---:|---|---|---|---|"
    for name, every in sorted({key[:2] for key in found}):
        own = {key[2]: numbers for key, numbers in found.items() if key[:2] == (name, every)}
        cells = [spread(column) for column in zip(*own.values(), strict=True)]
        apart = [numbers[0] - found[name, 1, seed][0] for seed, numbers in own.items() if (name, 1, seed) in found]
        yield f"| {name} | {every} | {len(own)} | {' | '.join(cells)} | {spread(apart) if every > 1 else ''} |"


def spread(values: tuple[float, ...] | list[float]) -> str:
    """Mean and standard deviation."""
    if len(values) < 2:
        return "".join(f"{value:.2f}" for value in values)
    return f"{fmean(values):.2f} ± {stdev(values):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sequences", nargs="+", metavar="SEQUENCE")
    parser.add_argument("--every", nargs="+", type=int, default=[1, 5, 10], metavar="STEPS")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks", type=int, help="the first tasks alone (default all)")
    parser.add_argument("--out", type=Path, default=Path("runs/projection_intervals.jsonl"))
    given = parser.parse_args()
    found = read(given.out)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    for name in given.sequences:
        for seed in range(given.seeds):
            for every in given.every:
                if (name, every, seed) in found:
                    continue
                start = time.perf_counter()
                percent = found[name, every, seed] = learned(name, every, seed, given.tasks)
                line = {"sequence": name, "every": every, "seed": seed, "percent": percent}
                with given.out.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                told = " / ".join(f"{value:.2f}" for value in percent)
                print(f"{name}, every {every}, seed {seed}: {told}, {time.perf_counter() - start:.0f} s", flush=True)
    print("\n".join(table(found)))


if __name__ == "__main__":
    main()
