"""What is lost if a strength is chosen on the first three tasks of a sequence? On validation data alone.

Every method goes through a whole sequence once with each strength, as `memsyn-bench run --strength chosen` does. The
matrix of validation accuracies then tells what three protocols would have chosen after three tasks, and how many points
below the best strength that choice ends after the last task. No test data are looked at. The protocols:

- mean: the mean accuracy on the three tasks after the third;
- extrapolated: that mean after all tasks, if each further task costs as much as the first three did;
- De Lange: the largest strength with which the second and the third task are learned to 95% of the best accuracy, as
  De Lange et al. (2021) choose without old data.

    .venv/bin/python benchmarks/strength_protocols.py scripts8 --methods mas,l2,si

A line of the file is one method and strength; lines that are there are not made again. Without sequences, the table of
the file's lines is printed.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean

from memsyn_bench import default_settings
from memsyn_bench.methods.registry import new_method
from memsyn_bench.running.scoring import score
from memsyn_bench.running.strengths import SEED, candidates
from memsyn_bench.running.training import generator, task_training, train
from memsyn_bench.sequences.sequences import find_sequence
from memsyn_bench.task import for_validation

SEEN = 3
"""The tasks that a protocol sees."""
ENOUGH = 0.95
"""The share of the best accuracy when learned that De Lange's protocol asks for here."""
Matrix = list[tuple[float, ...]]
Key = tuple[str, str, float]
Matrices = dict[float, Matrix]
"""Strength -> the validation accuracies after each task; no rows if the training diverged."""


def whole_sequence(name: str, method: str, strength: float) -> Matrix:
    """The validation accuracies after each task; no rows if the training diverged."""
    sequence, settings = find_sequence(name), default_settings(name)
    tasks = [for_validation(task, SEED) for task in sequence.tasks(settings.size)]
    model, learner = sequence.network(tasks, generator(SEED, 0)), new_method(method, strength)
    rows: Matrix = []
    for index, task in enumerate(tasks):
        training = task_training(
            model, task, index, settings=settings, augment=sequence.augment, seed=SEED, loss=sequence.loss
        )
        losses = train(training, learner, lambda: None).losses
        if not math.isfinite(losses[-1]):
            return []
        if index + 1 < len(tasks) or learner.merges:
            learner.end(training)
        rows.append(score(model, tasks[: index + 1], sequence.scorings[0]))
    return rows


def read(file: Path) -> dict[Key, Matrix]:
    """The lines of the file."""
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return {(line["sequence"], line["method"], line["strength"]): [*map(tuple, line["matrix"])] for line in lines}


def extrapolated(rows: Matrix, num_tasks: int) -> float:
    """mean_i a[i][i] - f (T - 1) / 2, with f the points that a task lost with each later one of those seen."""
    learned = fmean(row[-1] for row in rows)
    lost = sum(row[-1] - after for row, after in zip(rows, rows[-1], strict=True))
    return learned - lost / (len(rows) * (len(rows) - 1) / 2) * (num_tasks - 1) / 2


def best(scores: dict[float, float]) -> float:
    """The strength with the highest score; among equals the largest."""
    return max(scores, key=lambda strength: (scores[strength], strength))


def still_learns(matrices: Matrices) -> float:
    """The largest strength that learns the second and the third task nearly as well as the best."""
    learned = {strength: fmean((rows[1][1], rows[2][2])) if rows else 0.0 for strength, rows in matrices.items()}
    return max(strength for strength, accuracy in learned.items() if accuracy >= ENOUGH * max(learned.values()))


def table(found: dict[Key, Matrix]) -> Iterable[str]:
    """For every sequence and method: what each protocol chooses, and what is lost by it at the end."""
    yield "| sequence | method | best at the end | mean | lost | extrapolated | lost | De Lange | lost |"
    yield "|---|---|---:|---:|---:|---:|---:|---:|---:|"
    for sequence, method in sorted({key[:2] for key in found}):
        matrices = {key[2]: matrix for key, matrix in found.items() if key[:2] == (sequence, method)}
        num_tasks = max(map(len, matrices.values()))
        at_end = {strength: fmean(rows[-1]) if rows else 0.0 for strength, rows in matrices.items()}
        in_future = {
            strength: extrapolated(rows[:SEEN], num_tasks) if rows else 0.0 for strength, rows in matrices.items()
        }
        after_three = {strength: fmean(rows[SEEN - 1]) if rows else 0.0 for strength, rows in matrices.items()}
        top = best(at_end)
        cells = [sequence, method, f"{top:g}: {at_end[top]:.1f}"]
        for chosen in (best(after_three), best(in_future), still_learns(matrices)):
            cells += [f"{chosen:g}", f"{at_end[top] - at_end[chosen]:.1f}"]
        yield f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sequences", nargs="*")
    parser.add_argument("--methods", default="mas,l2,si,ewc,lwf")
    parser.add_argument("--out", type=Path, default=Path("docs/strengths.jsonl"))
    options = parser.parse_args()
    found = read(options.out)
    for sequence in options.sequences:
        for method in options.methods.split(","):
            for strength in candidates(method):
                key = (sequence, method, strength)
                if key not in found:
                    found[key] = whole_sequence(*key)
                    line = {**dict(zip(("sequence", "method", "strength"), key, strict=True)), "seed": SEED}
                    with options.out.open("a") as file:
                        file.write(json.dumps({**line, "matrix": found[key]}) + "\n")
                    print(*key, " ".join(f"{fmean(row):.1f}" for row in found[key]), flush=True)
    print("\n".join(table(found)))


if __name__ == "__main__":
    main()
