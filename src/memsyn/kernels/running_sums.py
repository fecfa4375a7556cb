"""Running sums over any number of samples, in which small contributions are not lost.

Owns how sums over batches are accumulated, and their precision. Must not know what is summed.
"""

from collections.abc import Mapping
from typing import Final, final

import torch
from torch import Tensor

from memsyn.kernels.outer_products import scratch

BATCHES: Final = 8
"""Batches summed before they are folded: folding each one would cost a small network a twentieth of its time."""

CHUNK: Final = 2**20
"""Numbers folded at once, so that what is in between stays in cache."""


@final
class RunningSums:
    """Sums of numbers that are not negative: those of a few batches are added up, then folded into those of all.

    Folding is Kahan's: what rounding takes from `folded` goes back to `recent`, to be added with the next batches. So
    a sum is off by at most (2 + M) u of itself, u the unit roundoff (2^-24 in float32) and M the number of additions in
    `BATCHES` batches, however many batches there are. Plain addition loses all that is less than u of the sum so far.

    Attributes:
        recent: by name, what is being added to.
        folded: the same names, once anything is folded.
        num_folded: samples in `folded`.
        num_batches: that were added.
    """

    def __init__(self, zeros: dict[str, Tensor]) -> None:
        self.recent = zeros
        self.folded: dict[str, Tensor] = {}
        self.num_folded = 0
        self.num_batches = 0

    def end_batch(self, num_samples: int) -> None:
        """Fold, if it is time; `num_samples` have been added in all."""
        self.num_batches += 1
        if self.num_batches % BATCHES == 0:
            self._fold()
            self.num_folded = num_samples

    def _fold(self) -> None:
        if not self.folded:
            self.folded = self.recent
            self.recent = {name: torch.zeros_like(total) for name, total in self.folded.items()}
            return
        for name, recent in self.recent.items():
            for recent_chunk, folded_chunk in zip(
                _flat(recent).split(CHUNK), _flat(self.folded[name]).split(CHUNK), strict=True
            ):
                after = torch.add(folded_chunk, recent_chunk, out=scratch("folded", folded_chunk.shape, folded_chunk))
                recent_chunk -= torch.sub(after, folded_chunk, out=scratch("fold", folded_chunk.shape, folded_chunk))
                folded_chunk.copy_(after)

    def totals(self) -> dict[str, Tensor]:
        """The sums, rounded once; nothing can be added any more."""
        for name, total in self.folded.items():
            total += self.recent[name]
        return self.folded or self.recent

    def parts(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Sums over the first samples (`num_folded` of them, if not 0), and what is to be added, if anything."""
        return (self.folded, self.recent) if self.folded else (self.recent, {})

    def restore(
        self, parts: tuple[Mapping[str, Tensor], Mapping[str, Tensor]], num_batches: int, num_folded: int
    ) -> None:
        """Go on from what `parts` gave, bit for bit the same."""
        self.num_batches, self.num_folded = num_batches, num_folded
        if parts[1]:
            self.folded = {name: torch.empty_like(total) for name, total in self.recent.items()}
        for own, saved in zip(self.parts(), parts, strict=True):
            for name, total in own.items():
                total.copy_(saved[name])


def _flat(total: Tensor) -> Tensor:
    """All numbers of a tensor without gaps, in the order of its memory."""
    return total.as_strided((total.numel(),), (1,))
