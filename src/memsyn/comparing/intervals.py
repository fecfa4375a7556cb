"""95% intervals: of a share, of a mean, and of the difference of two shares of the same samples.

Owns the formulas. Must not know models or outputs.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

from torch import Tensor

Z: Final = 1.959963984540054
"""The 97.5% quantile of the standard normal distribution."""


class Interval(NamedTuple):
    """Both ends of a 95% interval."""

    lower: float
    upper: float


def wilson_interval(share: float, num_samples: int) -> Interval:
    """The interval of a share p of n samples (Wilson 1927): all q with |p - q| <= z sqrt(q (1 - q) / n).

    Also for a mean of numbers from 0 to 1, whose variance is at most p (1 - p): there it is too wide, never too narrow.
    """
    square = Z**2 / num_samples
    middle = (share + square / 2) / (1 + square)
    half = Z / (1 + square) * math.sqrt(max(0.0, share * (1 - share)) / num_samples + square / (4 * num_samples))
    # At a share of 0 or 1, one end is the share itself.
    return Interval(max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half)))


def samples_needed(share: float) -> int:
    """The fewest samples of which the interval begins at `share` or above, if all give the same answer.

    Its lower end is n / (n + z^2).
    """
    return math.ceil(share * Z**2 / (1 - share))


def t_interval(values: Tensor) -> Interval:
    """The interval of a mean by Student's distribution: mean +- t sd / sqrt(n). One sample alone tells nothing.

    If a value is infinite, the mean is infinite for certain.
    """
    wide, count = values.double(), len(values)
    if not bool(wide.isfinite().all()):
        return Interval(math.inf, math.inf)
    if count < 2:
        return Interval(-math.inf, math.inf)
    mean, half = float(wide.mean()), t_quantile(count - 1) * float(wide.std()) / math.sqrt(count)
    return Interval(mean - half, mean + half)


def paired_share_interval(differences: Tensor) -> tuple[float, Interval]:
    """The mean of the differences of two answers, each 1, 0 or -1 (or between), and its interval.

    Bonett and Price (2012): with a = (n10 + 1) / (n + 2) and b = (n01 + 1) / (n + 2), of the samples that only the one
    or only the other answers, a - b +- z sqrt((a + b - (a - b)^2) / (n + 2)). It has a width if nothing differs, too.
    """
    count = len(differences)
    a = (float(differences.clamp_min(0).sum()) + 1) / (count + 2)
    b = (float((-differences).clamp_min(0).sum()) + 1) / (count + 2)
    half = Z * math.sqrt((a + b - (a - b) ** 2) / (count + 2))
    return float(differences.mean()), Interval(max(-1.0, a - b - half), min(1.0, a - b + half))


_SUMMED: Final = 200
"""Up to so many degrees of freedom Student's distribution is summed; above, the expansion errs by less than 1e-8."""


def t_quantile(freedom: int) -> float:
    """The 97.5% quantile of Student's distribution (Abramowitz and Stegun, 26.7.3, 26.7.4 and 26.7.5)."""
    if freedom > _SUMMED:
        z, n = Z, freedom
        first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
        third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
        return z + first / n + second / n**2 + third / n**3
    low, high = 0.0, math.pi / 2  # of theta = atan(t / sqrt(n))
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _two_sided(middle, freedom) < 0.95 else (low, middle)
    return math.sqrt(freedom) * math.tan((low + high) / 2)


def _two_sided(theta: float, freedom: int) -> float:
    """P(|T| <= t) for t = sqrt(n) tan(theta) and n degrees of freedom."""
    square, is_odd = math.cos(theta) ** 2, freedom % 2
    term = math.cos(theta) if is_odd else 1.0
    total = 0.0
    # Odd n: cos + 2/3 cos^3 + ... + cos^(n - 2); even n: 1 + 1/2 cos^2 + 3/8 cos^4 + ... + cos^(n - 2).
    for k in range(freedom // 2):
        total += term
        term *= square * ((2 * k + 2) / (2 * k + 3) if is_odd else (2 * k + 1) / (2 * k + 2))
    found = math.sin(theta) * total
    return 2 / math.pi * (theta + found) if is_odd else found
