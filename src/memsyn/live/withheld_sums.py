"""Sums over samples that are too few to be written: they wait in memory until no file tells a single one of them.

Owns how many samples, and which numbers of their sums, may go into a file together. Must not know models, files or
threads.
"""

from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple, final

import torch
from torch import Tensor

from memsyn.live.window import ZERO_AFTER

PARTS: Final = 16
"""The least number of samples is measured in this many batches, each of which counts as if it were one sample."""

DOMINANCE: Final = 4
"""A number is written once it is this many times as large as what a single batch has added to it."""


class Released(NamedTuple):
    """What may be written."""

    sums: dict[str, Tensor]
    num_samples: int
    weight: float
    """Sum of the samples' weights at `at`."""
    at: float
    """When the last sample was served."""


@final
class WithheldSums:
    """The sums of one segment that no file holds yet.

    Two rules of statistical disclosure control for tables of sums (Hundepool et al. 2012, section 4.2) are applied to
    what two successive files differ by:

    - threshold: all samples wait until there are `min_samples` of them;
    - dominance: a number W of their sums waits on while w_1 > W / 4, where w_1 >= w_2 >= ... is what each batch has
      added to it. So no sample makes up more than a quarter of it, and at least four samples add to it.

    Rows of tables that few samples read wait, and so do weights of units that few samples activate. If a single batch
    stands out, it counts as much as the second largest: that a number waits would tell that somebody stands out.

        batches of 4 samples         sum    released
        10 10 10 10 10 10 ...        160    160
        90 10 10 10 10 10 ...        240    160: the first counts 10
        90  0  0  0  0  0 ...         90    0: it waits for three more

    Second moments A of a matrix must stay sums of x x^T. So all sums of a matrix wait until its number of positions
    satisfies the second rule. Then each x is released without those inputs i whose A_ii does not satisfy it: what their
    rows and columns hold is lost. Of sketches, the trace must satisfy the rule.

    Args:
        min_samples: the least number of samples.
        half_life: in seconds; None if samples do not decay.
        longest: samples older than this do not count, in seconds; None: all count.

    Attributes:
        sums: as they count at `at`.
        num_samples: those that wait; numbers that wait on when their samples were released have none.
        num_lost: samples that became too old while they waited.
        weight: sum of the weights of those that wait.
        at: when the last sample was served.
    """

    def __init__(self, min_samples: int, half_life: float | None = None, longest: float | None = None) -> None:
        self.sums: dict[str, Tensor] = {}
        self.num_samples = self.num_lost = 0
        self.weight = self.at = 0.0
        self._min_samples, self._half_life, self._longest = min_samples, half_life, longest
        self._largest: dict[str, Tensor] = {}
        """The most that one batch has added to each of the numbers that must satisfy the second rule."""
        self._second: dict[str, Tensor] = {}
        """The second most."""
        self._first = self._since = 0.0
        """When the first of the samples that wait was served; since when numbers are collected that wait on."""

    def add(self, sums: Mapping[str, Tensor], num_samples: int, served_at: float) -> None:
        """Add the sums of a batch whose samples were served at a time."""
        self.expire(served_at)
        if not self.sums:
            self._since = self.at = served_at
        if self.num_samples == 0:
            self._first = served_at
        older = self.factor(served_at)
        if older != 1.0:
            self.weight *= older
            for total in (*self.sums.values(), *self._largest.values(), *self._second.values()):
                total *= older
        newer = 1.0 if self._half_life is None else 2.0 ** min(0.0, (served_at - self.at) / self._half_life)
        self.at = max(self.at, served_at)
        for name, own in sums.items():
            total = self.sums.setdefault(name, torch.zeros_like(own))
            total.add_(own, alpha=newer)
        for name, own in _watched(sums):
            largest = self._largest.setdefault(name, torch.zeros_like(own))
            second = self._second.setdefault(name, torch.zeros_like(own))
            own = own if newer == 1.0 else own * newer
            torch.maximum(second, torch.minimum(largest, own), out=second)
            torch.maximum(largest, own, out=largest)
        self.num_samples += num_samples
        self.weight += newer * num_samples

    def factor(self, now: float) -> float:
        """By what the sums are multiplied to count as they do now; a clock that was set back lets no time pass."""
        age = max(0.0, now - self.at)
        return 1.0 if self._half_life is None else 2.0 ** -(age / self._half_life)

    def expire(self, now: float) -> None:
        """Drop all sums if samples that wait no longer count; numbers whose samples were released, too."""
        first = self._first if self.num_samples else self._since
        is_too_old = self._longest is not None and first <= now - self._longest
        has_faded = self._half_life is not None and now - self.at > ZERO_AFTER * self._half_life
        if is_too_old or has_faded:
            self.num_lost += self.num_samples
            self._clear()

    def _clear(self) -> None:
        self.sums, self._largest, self._second = {}, {}, {}
        self.num_samples, self.weight = 0, 0.0

    def release(self, *, joins_unwritten: bool = False) -> Released | None:
        """Take out what may be written; None if there are too few samples.

        If an earlier release is not written yet, few samples may join it: no file will tell them from those.
        """
        if self.num_samples < (1 if joins_unwritten else self._min_samples):
            return None
        sums = dict[str, Tensor]()
        for name in [name for name in self.sums if not _matrix(name)]:
            sums[name] = self._take(name)
        for key in [_matrix(name) for name in self.sums if name.startswith("positions/")]:
            if self._may_go(f"positions/{key}") and self._may_go(f"inputs_trace/{key}"):
                for name in [name for name in self.sums if _matrix(name) == key]:
                    sums[name] = self._take(name)
        found = Released(sums, self.num_samples, self.weight, self.at)
        self.num_samples, self.weight = 0, 0.0
        if self._longest is not None and self._since <= self.at - self._longest:
            self._clear()
        return found

    def _may_go(self, name: str) -> bool:
        return name not in self.sums or bool((self.sums[name] >= DOMINANCE * self._largest[name]).all())

    def _take(self, name: str) -> Tensor:
        """Take out the numbers of one tensor that satisfy the rule, as far as it is asked for."""
        total, largest, second = self.sums[name], self._largest.get(name), self._second.get(name)
        if largest is None or second is None:
            return self.sums.pop(name)
        goes = _diagonal(total, largest) >= DOMINANCE * largest
        if largest.shape != total.shape:
            del self.sums[name], self._largest[name], self._second[name]
            return total * (goes.unsqueeze(1) & goes.unsqueeze(2))
        clipped = total - largest + second
        clips = ~goes & (second > 0) & (clipped >= DOMINANCE * second)
        taken = torch.where(clips, clipped, total * goes)
        for own in (total, largest, second):
            own *= ~(goes | clips)
        return taken


def _diagonal(total: Tensor, like: Tensor) -> Tensor:
    """The diagonals of matrices (G, n, n) if `like` has their shape."""
    return total if total.shape == like.shape else total.diagonal(dim1=1, dim2=2)


def _matrix(name: str) -> str:
    """The key of a matrix to whose second moments a sum belongs; "" for others."""
    kind, slash, key = name.partition("/")
    return key if slash and kind in _KINDS else ""


_KINDS: Final = (
    "positions",
    *(f"{side}{kind}" for side in ("inputs", "outputs") for kind in ("", "_sketch", "_trace")),
)


def _watched(sums: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The numbers that must satisfy the second rule; none of them is negative."""
    for name, own in sums.items():
        kind = name.partition("/")[0] if _matrix(name) else ""
        if kind == "inputs" and own.ndim == 3:
            yield name, own.diagonal(dim1=1, dim2=2)
        elif kind in ("", "inputs", "inputs_trace", "positions"):
            yield name, own
