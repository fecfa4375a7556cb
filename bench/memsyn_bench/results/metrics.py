"""Numbers of an accuracy matrix: accuracy, forgetting, transfer, and their spread over seeds.

A matrix holds a_{t,j}, the accuracy on task j after learning task t, in percent, for j <= t: row t has t + 1 entries.
Owns formulas only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from memsyn import OptionError

Matrix = Sequence[Sequence[float]]


def average_accuracy(matrix: Matrix) -> float:
    """The mean accuracy over all tasks after the last one, in percent: A_T = 1/T sum_j a_{T,j}."""
    return fmean(matrix[-1])


def learning_accuracy(matrix: Matrix) -> float:
    """The mean accuracy on each task right after learning it, in percent: 1/T sum_j a_{j,j}.

    A method that forgets nothing because it learns nothing shows here.
    """
    return fmean(diagonal(matrix))


def diagonal(matrix: Matrix) -> list[float]:
    """The accuracy on each task right after learning it: a reference for `forward_transfer` and `intransigence`."""
    return [row[-1] for row in matrix]


def forgetting(matrix: Matrix) -> float:
    """The mean drop from right after learning a task to the end, in points: 1/(T-1) sum_{j<T} (a_{j,j} - a_{T,j}).

    Positive is forgotten, negative is gained later; 0 for a single task. This is the drop that Aljundi et al. (2018)
    report, and minus the backward transfer of Lopez-Paz and Ranzato (2017); Chaudhry et al. (2018) drop from the
    maximum over time instead, which is never smaller.
    """
    drops = [row[-1] - last for row, last in zip(matrix[:-1], matrix[-1], strict=False)]
    return fmean(drops) if drops else 0.0


def backward_transfer(matrix: Matrix) -> float:
    """The change of earlier tasks by later ones, in points: 1/(T-1) sum_{j<T} (a_{T,j} - a_{j,j}).

    Lopez-Paz and Ranzato 2017: minus the forgetting; 0 for a single task.
    """
    return -forgetting(matrix)


def forward_transfer(matrix: Matrix, alone: Sequence[float]) -> float:
    """How much better later tasks are learned after earlier ones, in points: 1/(T-1) sum_{j>1} (a_{j,j} - alone_j).

    alone_j is the accuracy on task j of a network that has learned it alone from the first weights (the diagonal of the
    method `alone`). Lopez-Paz and Ranzato (2017) look at a task before it is learned instead, where a new head only
    guesses. 0 for a single task.

    Raises:
        ValueError: `alone` is not of as many tasks.
    """
    gains = [own - reference for own, reference in zip(diagonal(matrix), alone, strict=True)]
    return fmean(gains[1:]) if len(gains) > 1 else 0.0


def intransigence(matrix: Matrix, reference: Sequence[float]) -> float:
    """How far a task stays below a reference when it is learned, in points: 1/T sum_j (reference_j - a_{j,j}).

    Chaudhry et al. 2018: reference_j is the accuracy on task j of a network that has learned tasks 1 to j
    jointly (the diagonal of the method `joint`), or task j alone. Below 0 the method does better than the reference.

    Raises:
        ValueError: `reference` is not of as many tasks.
    """
    return fmean(best - own for own, best in zip(diagonal(matrix), reference, strict=True))


def rounded(value: float) -> str:
    """One digit after the point, and no minus before 0."""
    return f"{round(value, 1) + 0.0:.1f}"


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
            return f"{rounded(self.mean)} ± {rounded(self.deviation)}"
        words = f" ({rounded(self.low)} to {rounded(self.high)})" if self.num_seeds > 1 else ""
        return rounded(self.mean) + words


def spread(values: Sequence[float]) -> Spread:
    """The mean of the seeds' numbers and their spread."""
    deviation = stdev(values) if len(values) >= 3 else None
    return Spread(fmean(values), min(values), max(values), deviation, len(values))


@dataclass(frozen=True)
class Interval:
    """A mean over seeds, with half of its 95% interval."""

    mean: float
    half: float
    """The 95% interval is mean +- half."""
    num_seeds: int

    def __str__(self) -> str:
        """`mean ± half`."""
        return f"{rounded(self.mean)} ± {rounded(self.half)}"


def interval(values: Sequence[float]) -> Interval:
    """The 95% confidence interval of the mean: t_{0.975, n-1} s / sqrt(n), s the sample standard deviation.

    Raises:
        OptionError: there are fewer than two values, of which no spread is known.
    """
    if len(values) < 2:
        raise OptionError(f"an interval needs at least two seeds, got {len(values)}. Run more seeds.")
    half = _t_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return Interval(fmean(values), half, len(values))


def paired(values: Sequence[float], others: Sequence[float]) -> Interval:
    """The mean difference values - others over the same seeds, with its 95% interval: of the differences seed by seed.

    Raises:
        OptionError: the two are not of the same seeds, or there are fewer than two.
    """
    if len(values) != len(others):
        raise OptionError(
            f"a paired comparison needs the same seeds on both sides, got {len(values)} and {len(others)}."
        )
    return interval([value - other for value, other in zip(values, others, strict=True)])


def _t_quantile(freedom: int) -> float:
    """t with P(|T| <= t) = 0.95 for Student's T, by bisection over theta = atan(t / sqrt(freedom))."""
    low, high = 0.0, math.pi / 2
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if _t_probability(middle, freedom) < 0.95 else (low, middle)
    return math.tan(low) * math.sqrt(freedom)


def _t_probability(theta: float, freedom: int) -> float:
    """P(|T| <= sqrt(freedom) tan theta): the finite sums of Abramowitz and Stegun 1964, 26.7.3 and 26.7.4."""
    cosine, odd = math.cos(theta), freedom % 2
    term, total = (cosine if odd else 1.0), 0.0
    for power in range(1 + odd, freedom, 2):
        total += term
        term *= cosine**2 * power / (power + 1)
    inner = math.sin(theta) * total
    return 2 / math.pi * (theta + inner) if odd else inner
