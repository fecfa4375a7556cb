"""Ranks: Spearman's correlation, and the 95% interval of a correlation that was taken from a sample.

Owns the formulas, and how many weights are ranked. Must not know whose numbers they are.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np

MAX_RANKED: Final = 2**20
"""The most weights that are ranked: half a second on one core. Of more weights a sample is ranked."""


def spearman(one: np.ndarray[Any, Any], two: np.ndarray[Any, Any]) -> float:
    """The correlation of ranks, -1 to 1; equal numbers share the mean of their ranks. NaN if a side is constant."""
    ranks = []
    for values in (one, two):
        _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
        # For 5 5 7: counts 2 and 1, cumulative 2 and 3, so the ranks are 1.5, 1.5 and 3.
        own = (np.cumsum(counts) - (counts - 1) / 2)[where]
        ranks.append(own - own.mean())
    size = math.sqrt(float(ranks[0] @ ranks[0]) * float(ranks[1] @ ranks[1]))
    return float(ranks[0] @ ranks[1]) / size if size else math.nan


def spearman_interval(correlation: float, num_ranked: int) -> tuple[float, float]:
    """The 95% interval of Spearman's correlation r over a sample of n pairs (Bonett and Wright 2000).

    tanh(atanh(r) +- 1.96 sqrt((1 + r^2 / 2) / (n - 3))). Above 0.9 it is too narrow: it holds in 90% of cases.
    """
    if abs(correlation) >= 1:
        return correlation, correlation
    middle, half = math.atanh(correlation), 1.96 * math.sqrt((1 + correlation**2 / 2) / (num_ranked - 3))
    return math.tanh(middle - half), math.tanh(middle + half)
