"""The results of a file, method by method: the finished seeds, and numbers over them.

Owns which seeds count and how numbers of several seeds are combined and written; the formulas are in `metrics`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import final

from memsyn import MemsynError, OptionError
from memsyn_bench.methods.registry import METHODS
from memsyn_bench.results.metrics import Interval, Matrix, average_accuracy, diagonal, interval, paired, rounded
from memsyn_bench.running.record import Results, Run, TaskRecord, read_run
from memsyn_bench.sequences.sequences import find_sequence

ALONE, JOINT, FROZEN, FINETUNE, MAS = "alone", "joint", "frozen", "finetune", "mas"
"""Methods that the other methods are compared with."""
NONE = "–"
"""A cell without a number."""

Numbers = dict[int, float]
"""Seed -> number."""


@final
@dataclass(frozen=True)
class Findings:
    """The results of one run.

    Attributes:
        name: the run's name.
        run: the content of the run's file.
        results: the results of the seeds that have learned every task; methods in the order of the registry.
        unfinished: the other seeds: method, seed, tasks learned.
        folder: the run's folder, if the file lies there; empty for a copy.
    """

    name: str
    run: Run
    results: Results
    unfinished: tuple[tuple[str, int, int], ...]
    folder: str = ""

    @property
    def methods(self) -> list[str]:
        """The methods with a finished seed."""
        return list(self.results)

    @property
    def ranked(self) -> list[str]:
        """The methods that store no data, look at no test image and learn the tasks one after the other."""
        return [method for method in self.results if not has_more_data(method) and method != ALONE]

    @property
    def tasks(self) -> list[str]:
        """The tasks' names, in order."""
        names = {record.task: record.name for record in self.run.records}
        return [names[task] for task in sorted(names)]

    def matrix(self, method: str, seed: int) -> Matrix:
        """The accuracy matrix of one seed."""
        return [record.accuracies for record in self.results[method][seed]]

    def by_seed(self, method: str, number: Callable[[Matrix], float]) -> Numbers:
        """A number of each finished seed's matrix; none for a method that has no finished seed."""
        return {seed: number(self.matrix(method, seed)) for seed in self.results.get(method, {})}

    def against(self, method: str, other: str, number: Callable[[Matrix, Sequence[float]], float]) -> Numbers:
        """A number of each seed's matrix and of the other method's accuracies when learned, of the same seed."""
        seeds = self.results.get(method, {}).keys() & self.results.get(other, {}).keys()
        return {seed: number(self.matrix(method, seed), diagonal(self.matrix(other, seed))) for seed in sorted(seeds)}

    @property
    def scorings(self) -> list[str]:
        """The other scorings by name, of any method."""
        return list(dict.fromkeys(name for record in self._last_records() for name in record.scores))

    def scores(self, method: str, scoring: str) -> Numbers:
        """Each seed's mean of another scoring after the last task; empty if the method has no such scores."""
        last = {seed: records[-1].scores for seed, records in self.results.get(method, {}).items()}
        return {seed: fmean(scores[scoring]) for seed, scores in last.items() if scores.get(scoring)}

    def _last_records(self) -> list[TaskRecord]:
        return [records[-1] for seeds in self.results.values() for records in seeds.values()]

    def averages(self, method: str) -> Numbers:
        """Each seed's average accuracy."""
        return self.by_seed(method, average_accuracy)

    def standing(self, method: str) -> float:
        """The mean average accuracy over the seeds that all ranked methods have finished; else over its own seeds."""
        averages = self.averages(method)
        shared = set(averages).intersection(*(self.results[other] for other in self.ranked))
        return mean({seed: averages[seed] for seed in shared} or averages)

    def best(self) -> str | None:
        """The ranked method with the highest standing."""
        return max(self.ranked, key=self.standing, default=None)


Group = list[Findings]
"""Runs that belong together."""


def read_findings(path: Path) -> Findings:
    """The findings of a file, `NAME.jsonl`, or `NAME/results.jsonl` as a run leaves it.

    Raises:
        MemsynError: see `memsyn_bench.running.record.read_run`; or the file is of a sequence that there is not.
    """
    run = read_run(path)
    try:
        find_sequence(run.settings.sequence)
    except OptionError as error:
        raise MemsynError(
            f"{path} is of a sequence that cannot be used here: {error} Leave the file out, or install the package "
            "that adds the sequence."
        ) from None
    found: dict[str, dict[int, dict[int, TaskRecord]]] = {}
    for record in run.records:
        found.setdefault(record.method, {}).setdefault(record.seed, {})[record.task] = record
    order = [*METHODS, *found]
    results: Results = {}
    unfinished = []
    for method in sorted(found, key=order.index):
        for seed, records in sorted(found[method].items()):
            if len(records) == run.num_tasks:
                results.setdefault(method, {})[seed] = [records[task] for task in range(run.num_tasks)]
            else:
                unfinished.append((method, seed, len(records)))
    own = path.stem == "results"
    name = path.resolve().parent.name if own else path.stem
    return Findings(name, run, results, tuple(unfinished), str(path.parent) if own else "")


def has_more_data(method: str) -> bool:
    """Whether the method keeps images of earlier tasks or looks at test images; False for an unknown method."""
    return method in METHODS and (METHODS[method].stores_data or METHODS[method].sees_test)


def mean(numbers: Numbers) -> float:
    """The mean over the seeds; NaN for none."""
    return math.fsum(numbers.values()) / len(numbers) if numbers else math.nan


def estimate(numbers: Numbers) -> str:
    """`mean ± half of the 95% interval` over the seeds, `mean` for one, a dash for none."""
    if len(numbers) < 2:
        return rounded(mean(numbers)) if numbers else NONE
    return str(interval(list(numbers.values())))


def half(numbers: Numbers) -> float:
    """Half of the 95% interval over the seeds; infinite for fewer than two."""
    return interval(list(numbers.values())).half if len(numbers) > 1 else math.inf


def difference(numbers: Numbers, others: Numbers) -> Interval | None:
    """numbers - others, seed by seed, over the seeds that both have; None if they share no seed.

    With one shared seed there is no interval: half is infinite.
    """
    seeds = sorted(numbers.keys() & others.keys())
    if len(seeds) < 2:
        return Interval(numbers[seeds[0]] - others[seeds[0]], math.inf, 1) if seeds else None
    return paired([numbers[seed] for seed in seeds], [others[seed] for seed in seeds])


def signed(found: Interval | None) -> str:
    """A difference as a cell: `+mean ± half`."""
    if found is None:
        return NONE
    return f"{round(found.mean, 1) + 0.0:+.1f}" + ("" if math.isinf(found.half) else f" ± {found.half:.1f}")


def compared(found: Interval, above: str, below: str) -> str:
    """A difference in words, and whether its interval holds 0."""
    lone = math.isinf(found.half)
    half = "" if lone else f" ± {found.half:.1f}"
    words = f"{abs(found.mean):.1f}{half} points {above if found.mean >= 0 else below}"
    if lone:
        return f"{words} (one seed: no interval is known)"
    return words if abs(found.mean) > found.half else f"{words} (the interval holds 0)"
