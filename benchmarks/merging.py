"""Model merging by importance against plain averaging and IMM: one network fine-tuned on each task alone, then merged.

Every task of `emoji8` starts from the same pretrained network. Then one network answers for all tasks, through each
task's own head: the plain mean of the weights (mean-IMM), mode-IMM (the Fisher information as weights), and
`memsyn.merge_models` with importances, with second moments of inputs, and with both Kronecker factors. Prints the
average accuracy over tasks on test images, before and after merging, as a table; each seed is a line of JSON in
`--out`, and what is there is not run again. `--validation` splits the training images instead, to choose by.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import memsyn
from memsyn_bench.methods.method import FineTuning, TaskTraining
from memsyn_bench.methods.penalties import MEASURE_BATCH, through_head
from memsyn_bench.running.scoring import score
from memsyn_bench.running.training import generator, task_training, train
from memsyn_bench.sequences.networks import Network
from memsyn_bench.sequences.sequences import default_settings, find_sequence
from memsyn_bench.task import Task, for_validation

States = list[dict[str, Tensor]]
Merge = Callable[[States, dict[str, list[memsyn.Memory]]], dict[str, Tensor]]
ESTIMATORS = ("mas", "fisher", "inputs", "kronecker")


def mean(states: States, memories: dict[str, list[memsyn.Memory]]) -> dict[str, Tensor]:
    return {name: torch.stack([own[name] for own in states]).mean(0) for name in states[0]}


def by(estimator: str) -> Merge:
    return lambda states, memories: memsyn.merge_models(states, memories[estimator])


MERGES: dict[str, Merge] = {
    "plain mean (mean-IMM)": mean,
    "Fisher (mode-IMM)": by("fisher"),
    "importance (MAS)": by("mas"),
    "inputs alone (RegMean)": by("inputs"),
    "both Kronecker factors": by("kronecker"),
}


def remembered(training: TaskTraining, estimator: str) -> memsyn.Memory:
    batches = training.task.train_images.split(MEASURE_BATCH)
    found = memsyn.measure(training.model, batches, forward=through_head(training), estimator=estimator, progress=False)
    return memsyn.Memory.empty().consolidate(training.model, found)


def run(name: str, seed: int, *, validation: bool, epochs: int | None) -> dict[str, Any]:
    """The accuracy of each task: by its own network, and by each merged one."""
    sequence, settings = find_sequence(name), default_settings(name)
    tasks: list[Task] = [for_validation(t) if validation else t for t in sequence.tasks(settings.size)]
    if epochs is not None:
        settings = type(settings)(**{**vars(settings), "epochs": epochs})
    states: States = []
    memories: dict[str, list[memsyn.Memory]] = {estimator: [] for estimator in ESTIMATORS}
    accuracies: dict[str, list[float]] = {"each its own": []}
    for index, task in enumerate(tasks):
        model = sequence.network(tasks, generator(seed, 0))
        training = task_training(
            model, task, index, settings=settings, augment=sequence.augment, seed=seed, loss=sequence.loss
        )
        train(training, FineTuning(), after_epoch=lambda: None)
        accuracies["each its own"].append(score(model, tasks, "multi-head")[index])
        states.append({key: own.detach().clone() for key, own in model.state_dict().items()})
        for estimator, own in memories.items():
            own.append(remembered(training, estimator))
        print(f"{name}, seed {seed}: {task.name} {accuracies['each its own'][-1]:.1f}", flush=True)
    for which, merge in MERGES.items():
        model = sequence.network(tasks, generator(seed, 0))
        merged = merge(states, memories)
        # The mean of a head with the heads that were never trained is nobody's: each task keeps its own.
        merged |= own_heads(model, states)
        model.load_state_dict(merged)
        accuracies[which] = list(score(model, tasks, "multi-head"))
    return {"sequence": name, "seed": seed, "validation": validation, "accuracies": accuracies}


def own_heads(model: Network, states: States) -> dict[str, Tensor]:
    return {
        f"heads.{index}.{name}": states[index][f"heads.{index}.{name}"]
        for index, head in enumerate(model.heads)
        for name, _ in head.named_parameters()
    }


def table(lines: list[dict[str, Any]]) -> str:
    text = ["| one network of | average accuracy | of what each network has alone |", "|---|---|---|"]
    alone = statistics.fmean(statistics.fmean(line["accuracies"]["each its own"]) for line in lines)
    for which in lines[0]["accuracies"]:
        found = [statistics.fmean(line["accuracies"][which]) for line in lines]
        spread = f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else ""
        text.append(f"| {which} | {statistics.fmean(found):.1f}{spread} | {statistics.fmean(found) / alone:.1%} |")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequence", default="emoji8")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--validation", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/merging.jsonl"))
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    for seed in range(options.seeds):
        key = {"sequence": options.sequence, "seed": seed, "validation": options.validation}
        if not any(key.items() <= line.items() for line in lines):
            lines.append(run(options.sequence, seed, validation=options.validation, epochs=options.epochs))
            with options.out.open("a") as file:
                file.write(json.dumps(lines[-1]) + "\n")
    wanted = {"sequence": options.sequence, "validation": options.validation}
    print(table([line for line in lines if wanted.items() <= line.items()]))


if __name__ == "__main__":
    main()
