"""Whether a strength travels: the paper's lambda and `memsyn.Relative`, on three sequences of tasks and under changes.

Prints three tables. One: per sequence, average accuracy over all tasks in the end by strength, mean of the seeds. Two:
the same on permuted Fashion-MNIST when the outputs are scaled, the learning rate is another, fewer samples measured, or
the importance is held in bfloat16: what a strength chosen beforehand gives, and what the best one would give.
Three: how well `report()` at the end of a task foretells how much accuracy the tasks before it lost: Spearman's rank
correlation over strengths and seeds.

Each result is a line of JSON in `--out`, and what is there is not run again.
"""

import argparse
import itertools
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

import memsyn
from problems import PROBLEMS, learn, lines_of

OPTIMIZERS = {"permuted-fashion": "sgd", "emoji8": "adam", "split-fashion": "sgd"}
VALUES = {
    "paper": (0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 10.0),
    "relative": (0.002, 0.006, 0.01, 0.02, 0.06, 0.2, 0.6),
}
VARIED = "permuted-fashion"
VARIED_VALUES = {"paper": (0.001, 0.003, 0.01, 0.03, 0.1), "relative": (0.006, 0.01, 0.02)}
HALF = "importance in bfloat16"
CHANGES: dict[str, dict[str, float]] = {
    "outputs x 3": {"logit_factor": 3.0},
    "outputs / 3": {"logit_factor": 1 / 3},
    "learning rate x 3": {"lr_factor": 3.0},
    "learning rate / 3": {"lr_factor": 1 / 3},
    "measured on 50 samples": {"max_samples": 50},
    HALF: {},
}
NONE = "nothing"
QUANTITIES = ("bound", "distance")
"""Of a report: its bound, and its penalty without lambda."""


def guard(
    kind: str, value: float, dtype: torch.dtype | None, optimizer: Optimizer, model: nn.Module, memory: memsyn.Memory
) -> memsyn.Protection:
    strength = memsyn.Relative(value) if kind == "relative" else value
    return memsyn.protect(optimizer, model, memory, strength=strength, importance_dtype=dtype)


def end(lines: Sequence[dict[str, Any]]) -> float:
    """Average accuracy over all tasks in the end, in percent, mean over seeds."""
    return 100 * statistics.fmean(statistics.fmean(line["accuracy"][-1]) for line in lines)


def chosen(lines: Sequence[dict[str, Any]], **key: Any) -> list[dict[str, Any]]:
    return [line for line in lines if key.items() <= line.items()]


def best(lines: Sequence[dict[str, Any]]) -> tuple[float, str, float]:
    """Accuracy, kind and value of the strength with the highest accuracy."""
    keys = sorted({(line["kind"], line["value"]) for line in lines})
    return max((end(chosen(lines, kind=kind, value=value)), kind, value) for kind, value in keys)


def curves(lines: Sequence[dict[str, Any]]) -> str:
    text = []
    for kind, values in VALUES.items():
        text += [f"\n| {kind} strength | " + " | ".join(f"{v:g}" for v in values) + " | best of both kinds |"]
        text += ["|---|" + "---|" * (len(values) + 1)]
        for data in OPTIMIZERS:
            own = chosen(lines, data=data, change=NONE)
            cells = [f"{end(found):.1f}" if (found := chosen(own, kind=kind, value=v)) else "-" for v in values]
            top, best_kind, best_value = best(own)
            text.append(f"| {data} | " + " | ".join(cells) + f" | {top:.1f} ({best_kind}, {best_value:g}) |")
    return "\n".join(text)


def changes(lines: Sequence[dict[str, Any]]) -> str:
    """What lambda as it is best without a change, and the default, give under each."""
    paper = best(chosen(lines, data=VARIED, change=NONE, kind="paper", seed=0))[2]
    fixed = {"paper": paper, "relative": memsyn.Relative().value}
    heads = f"lambda {paper:g}, tuned | relative {fixed['relative']:g}, the default"
    text = [f"\n| {VARIED}, one seed | {heads} | best there |", "|---|---|---|---|"]
    for change in (NONE, *CHANGES):
        own = chosen(lines, data=VARIED, change=change, seed=0)
        cells = [f"{end(chosen(own, kind=kind, value=value)):.1f}" for kind, value in fixed.items()]
        top, kind, value = best(own)
        text.append(f"| {change} | " + " | ".join(cells) + f" | {top:.1f} ({kind}, {value:g}) |")
    return "\n".join(text)


def foretold(lines: Sequence[dict[str, Any]]) -> str:
    """Spearman's correlation of the bound and of penalty / lambda with the accuracy lost: task by task, and in all."""
    heads = " | ".join(
        f"{quantity}, {span}" for span in ("in a task", "in all") for quantity in ("bound", "penalty / lambda")
    )
    text = [f"\n| report() against accuracy lost | runs | {heads} |", "|---|---|---|---|---|---|"]
    for data in OPTIMIZERS:
        own = [line for line in chosen(lines, data=data, change=NONE) if line["value"]]
        found = []
        for task in range(1, len(own[0]["accuracy"])):
            lost = [
                statistics.fmean(np.subtract(line["accuracy"][task - 1], line["accuracy"][task][:-1])) for line in own
            ]
            found.append([spearman([line[quantity][task] for line in own], lost) for quantity in QUANTITIES])
        forgotten = [
            statistics.fmean(
                row[-1] - last for row, last in zip(line["accuracy"][:-1], line["accuracy"][-1], strict=False)
            )
            for line in own
        ]
        means = [
            *np.mean(found, axis=0),
            *(spearman([sum(line[q][1:]) for line in own], forgotten) for q in QUANTITIES),
        ]
        text.append(f"| {data} | {len(own)} | " + " | ".join(f"{value:.2f}" for value in means) + " |")
    return "\n".join(text)


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    def ranks(values: Sequence[float]) -> np.ndarray[Any, Any]:
        """Places in order, equal values at their mean place."""
        _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts + 1) / 2)[where]

    return float(np.corrcoef(ranks(first), ranks(second))[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/strength.jsonl"))
    options = parser.parse_args()
    problems = {name: PROBLEMS[name]() for name in OPTIMIZERS}

    def run(data: str, change: str, kind: str, value: float, seed: int) -> dict[str, Any]:
        protect = partial(guard, kind, value, torch.bfloat16 if change == HALF else None) if value else None
        course = learn(problems[data], OPTIMIZERS[data], protect, seed, **CHANGES.get(change, {}))  # type: ignore[arg-type]
        reports = course.reports
        return {
            "accuracy": course.accuracy,
            "bound": [report and report.bound for report in reports],
            "distance": [r and r.penalty / strength for r, strength in zip(reports, course.strengths, strict=True)],
            "lambda": course.strengths,
        }

    keys = [
        {"data": data, "change": NONE, "kind": kind, "value": value, "seed": seed}
        for data, seed in itertools.product(OPTIMIZERS, range(options.seeds))
        for kind, values in VALUES.items()
        for value in values
    ]
    keys += [
        {"data": VARIED, "change": change, "kind": kind, "value": value, "seed": 0}
        for change, kind in itertools.product(CHANGES, VARIED_VALUES)
        for value in VARIED_VALUES[kind]
    ]
    lines = lines_of(options.out, keys, run)
    print(curves(lines), changes(lines), foretold(lines), sep="\n")
    print(f"\ntorch {torch.__version__}, {options.seeds} seeds.")


if __name__ == "__main__":
    main()
