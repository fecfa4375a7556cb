"""Running sums over any number of samples, without losing small contributions to rounding.

Owns how sums over batches are accumulated, and their precision. Must not know the meaning of the numbers.
"""

from collections.abc import Iterable, Mapping
from typing import Final, final

import torch
from torch import Tensor

from memsyn.kernels.outer_products import scratch

BATCHES: Final = 8
"""Batches between two folds. Folding after every batch would cost a small network 5% of its time."""

CHUNK: Final = 2**20
"""Numbers folded at once, so that intermediate results stay in the cache."""


@final
class RunningSums:
    """Sums over batches. The sums of a few batches are collected, then folded into the sums of all batches.

    Folding is Kahan summation: the part of `recent` that `folded` lost to rounding stays in `recent`, and is added with
    the next batches. Relative to the sum of the terms' magnitudes, the error is at most (2 + M) u for any number of
    batches. Here u is the unit roundoff (2^-24 in float32) and M the number of additions in `BATCHES`
    batches. Plain addition loses every contribution that is smaller than u times the current sum.

    Attributes:
        recent: name -> sum of the batches since the last fold. Callers add to these tensors.
        folded: name -> sum of all earlier batches; empty before the first fold.
        num_folded: the number of samples in `folded`.
        num_batches: the number of batches that were added.
    """

    def __init__(self, zeros: dict[str, Tensor]) -> None:
        self.recent = zeros
        self.folded: dict[str, Tensor] = {}
        self.num_folded = 0
        self.num_batches = 0

    def replace(self, names: Iterable[str], zeros: Mapping[str, Tensor]) -> None:
        """Leave out the sums of some names, which are zero, and begin sums of other names."""
        for name in names:
            self.recent.pop(name, None)
            self.folded.pop(name, None)
        if self.folded:
            self.folded.update((name, torch.zeros_like(total)) for name, total in zeros.items())
        self.recent.update(zeros)

    def end_batch(self, num_samples: int) -> None:
        """Count a batch, and fold after every `BATCHES`. `num_samples` is the number of samples added so far."""
        self.num_batches += 1
        if self.num_batches % BATCHES == 0:
            self._fold()
            self.num_folded = num_samples

    def _fold(self) -> None:
        # The first sums are taken over without a copy. So a short measurement needs no second set of sums.
        if not self.folded:
            self.folded = self.recent
            self.recent = {name: torch.zeros_like(total) for name, total in self.folded.items()}
            return
        for name, recent in self.recent.items():
            for recent_chunk, folded_chunk in zip(
                _flat(recent).split(CHUNK), _flat(self.folded[name]).split(CHUNK), strict=True
            ):
                # Near 2^25, neighbours in float32 are 4 apart. If folded is 2^25, and recent gets 1 before each fold:
                #   fold    recent before    folded after    recent after
                #   1       1                2^25            1
                #   2       2                2^25            2
                #   3       3                2^25 + 4        -1
                #   4       0                2^25 + 4        0
                # Plain addition would stay at 2^25.
                after = torch.add(folded_chunk, recent_chunk, out=scratch("folded", folded_chunk.shape, folded_chunk))
                recent_chunk -= torch.sub(after, folded_chunk, out=scratch("fold", folded_chunk.shape, folded_chunk))
                folded_chunk.copy_(after)

    def totals(self) -> dict[str, Tensor]:
        """The final sums, rounded once. Nothing can be added afterwards."""
        for name, total in self.folded.items():
            total += self.recent[name]
        return self.folded or self.recent

    def parts(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(folded, recent): the total is their sum. Before the first fold, (recent, {})."""
        return (self.folded, self.recent) if self.folded else (self.recent, {})

    def restore(
        self, parts: tuple[Mapping[str, Tensor], Mapping[str, Tensor]], num_batches: int, num_folded: int
    ) -> None:
        """Continue from the result of `parts`, bit for bit the same."""
        self.num_batches, self.num_folded = num_batches, num_folded
        if parts[1]:
            self.folded = {name: torch.empty_like(total) for name, total in self.recent.items()}
        for own, saved in zip(self.parts(), parts, strict=True):
            for name, total in own.items():
                total.copy_(saved[name])


def _flat(total: Tensor) -> Tensor:
    """The numbers of a tensor without gaps, as one dimension, in memory order."""
    return total.as_strided((total.numel(),), (1,))
