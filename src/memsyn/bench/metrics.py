"""What an accuracy matrix says: accuracy, forgetting, and their spread over seeds.

A matrix holds a_{t,j}, the accuracy on task j after learning task t, in percent, for j <= t: row t has t + 1 entries.
Owns formulas only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

Matrix = Sequence[Sequence[float]]


def average_accuracy(matrix: Matrix) -> float:
    """The mean accuracy over all tasks after the last one, in percent: A_T = 1/T sum_j a_{T,j}."""
    return fmean(matrix[-1])


def learning_accuracy(matrix: Matrix) -> float:
    """The mean accuracy on each task right after learning it, in percent: 1/T sum_j a_{j,j}.

    A method that forgets nothing because it learns nothing shows here.
    """
    return fmean(row[-1] for row in matrix)


def forgetting(matrix: Matrix) -> float:
    """The mean drop from right after learning a task to the end, in points: 1/(T-1) sum_{j<T} (a_{j,j} - a_{T,j}).

    Positive is forgotten, negative is gained later; 0 for a single task. This is the drop that Aljundi et al. (2018)
    report, and minus the backward transfer of Lopez-Paz and Ranzato (2017); Chaudhry et al. (2018) drop from the
    maximum over time instead, which is never smaller.
    """
    drops = [row[-1] - last for row, last in zip(matrix[:-1], matrix[-1], strict=False)]
    return fmean(drops) if drops else 0.0


@dataclass(frozen=True)
class Spread:
    """One number over the seeds."""

    mean: float
    low: float
    high: float
    deviation: float | None
    """The sample standard deviation (n - 1); None for fewer than three seeds."""
    num_seeds: int

    def __str__(self) -> str:
        """`mean ± standard deviation` from three seeds on, `mean (min to max)` for two, `mean` for one."""
        if self.deviation is not None:
            return f"{self.mean:.1f} ± {self.deviation:.1f}"
        return f"{self.mean:.1f}" + (f" ({self.low:.1f} to {self.high:.1f})" if self.num_seeds > 1 else "")


def spread(values: Sequence[float]) -> Spread:
    """The mean of the seeds' numbers and how far they lie apart."""
    deviation = stdev(values) if len(values) >= 3 else None
    return Spread(fmean(values), min(values), max(values), deviation, len(values))
