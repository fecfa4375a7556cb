"""The sums of what was observed: over all time, over the last days, or with a half-life.

Owns when a sample stops to count, and what of it goes into a file. Must not know models, requests or threads: it is
given sums, and the time.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta, timezone
from typing import Any, Final, final

import torch
from torch import Tensor

from memsyn.errors import OptionError
from memsyn.kernels.running_sums import RunningSums
from memsyn.storage.reading_and_writing import Groups, record

BUCKETS: Final = 7
"""Parts of a sliding window: the oldest is dropped at once."""

FAR: Final = 16
"""Half-lives after which decaying sums are scaled down, so that new weights do not overflow."""

GONE: Final = 64
"""Half-lives after which nothing is left: float32 could not hold much less."""

Sums = dict[str, Tensor]


@dataclass(frozen=True)
class Entry:
    """What a file says of a bucket."""

    place: int
    """Since 1970, in parts of the window; 0 if it does not slide."""
    first: float
    """When its first sample was served, in seconds since 1970."""
    last: float
    num_samples: int
    weight: float
    """Of all of its samples: their number, unless they decay."""
    total: float
    """Of all of its sums."""

    def scaled(self, factor: float) -> "Entry":
        """With its samples counting otherwise."""
        return replace(self, weight=self.weight * factor, total=self.total * factor)


@dataclass
class _Bucket:
    entry: Entry
    sums: RunningSums


@final
class Window:
    """Sums over samples, of which the old may count less.

    Args:
        last: of samples older than this nothing counts. They are dropped a seventh of it at a time.
        half_life: a sample counts 2^(-age / half_life). Both None: all count.

    Raises:
        OptionError: a duration is not positive, or both are given.
    """

    def __init__(self, last: timedelta | None = None, half_life: timedelta | None = None) -> None:
        for name, given in (("last", last), ("half_life", half_life)):
            if given is not None and not (isinstance(given, timedelta) and given > timedelta(0)):
                raise OptionError(f"{name} must be a positive datetime.timedelta, got {given!r}.")
        if last is not None and half_life is not None:
            raise OptionError("a window slides or decays: give last= or half_life=, not both.")
        self.width = None if last is None else last.total_seconds() / BUCKETS
        self.half_life = None if half_life is None else half_life.total_seconds()
        self.buckets: list[_Bucket] = []
        self.origin = 0.0
        """When a new sample's weight is 1, if samples decay."""

    @property
    def rule(self) -> str:
        """What counts, in words."""
        if self.half_life is not None:
            return f"half-life of {self.half_life:g} s"
        return "all" if self.width is None else f"last {self.width * BUCKETS:g} s"

    @property
    def num_samples(self) -> int:
        """The samples in it, however little they count."""
        return sum(bucket.entry.num_samples for bucket in self.buckets)

    def total(self, now: float) -> tuple[float, float]:
        """Of all sums, and of the samples' weights, as they count now."""
        self._expire(now)
        entries = [bucket.entry.scaled(self._factor(now)) for bucket in self.buckets]
        return sum(entry.total for entry in entries), sum(entry.weight for entry in entries)

    def add(self, sums: Mapping[str, Tensor], num_samples: int, total: float, when: float) -> None:
        """Add the sums of samples that were served then; `total` is that of all of them."""
        self._expire(when)
        self._scale(when)
        bucket = self._bucket(sums, when)
        weight = 1 / self._factor(when)
        for name, own in sums.items():
            bucket.sums.recent[name].add_(own, alpha=weight)
        old = bucket.entry
        count = old.num_samples + num_samples
        bucket.sums.end_batch(count)
        bucket.entry = replace(
            old,
            first=min(old.first, when),
            last=max(old.last, when),
            num_samples=count,
            weight=old.weight + weight * num_samples,
            total=old.total + weight * total,
        )

    def _bucket(self, sums: Mapping[str, Tensor], when: float) -> _Bucket:
        """That of a moment; late samples may be of one that is not the last."""
        place = 0 if self.width is None else math.floor(when / self.width)
        for bucket in self.buckets:
            if bucket.entry.place == place:
                return bucket
        if self.buckets:
            self.buckets[-1].sums = RunningSums(self.buckets[-1].sums.totals())
        else:
            self.origin = when
        zeros = {name: torch.zeros_like(own) for name, own in sums.items()}
        begun = _Bucket(Entry(place, when, when, 0, 0.0, 0.0), RunningSums(zeros))
        self.buckets = sorted([*self.buckets, begun], key=lambda bucket: bucket.entry.place)
        return begun

    def value(self, now: float) -> tuple[Sums, int]:
        """What counts now, as sums and a number of samples: that of decayed samples is rounded, and the sums with it.

        Their ratio, the mean Omega = sum_k w_k |g_k| / sum_k w_k, is exact. Needs at least one sample.
        """
        self._drop_later(now)
        if self.half_life is None:
            return self._sums(), self.num_samples
        weight = self.buckets[0].entry.weight
        count = max(1, round(weight * self._factor(now)))
        return {name: total * (count / weight) for name, total in self._sums().items()}, count

    def is_empty(self, now: float) -> bool:
        """Whether nothing counts."""
        self._drop_later(now)
        return self.total(now)[1] == 0

    def saved(self, now: float) -> tuple[dict[str, Any], Groups, int]:
        """What a file says of it, its tensors, and the number of samples for which they stand."""
        sums, count = self.value(now)
        factor = self._factor(now)
        groups = {"importance": sums}
        if self.width is not None:
            groups |= {str(bucket.entry.place): _whole(bucket.sums) for bucket in self.buckets}
        header = {
            "window": self.rule,
            "first": _date(self.buckets[0].entry.first),
            "last": _date(self.buckets[-1].entry.last),
            "at": now,
            "buckets": [asdict(bucket.entry.scaled(factor)) for bucket in self.buckets],
        }
        return header, groups, count

    def restore(self, header: Mapping[str, Any], groups: Groups, zeros: Sums) -> None:
        """Go on from what was saved.

        Raises:
            ValueError, KeyError: it is not as it was saved.
        """
        self.origin = float(header["at"])
        for values in header["buckets"]:
            entry = record(Entry, values)
            held = groups["importance" if self.width is None else str(entry.place)]
            ratio = 1.0 if self.half_life is None else entry.weight / max(1, round(entry.weight))
            own = {name: held[name].to(zero) * ratio for name, zero in zeros.items()}
            self.buckets.append(_Bucket(entry, RunningSums(own)))

    def _sums(self) -> Sums:
        first, *others = (_whole(bucket.sums) for bucket in self.buckets)
        for other in others:
            for name, own in first.items():
                own += other[name]
        return first

    def _factor(self, now: float) -> float:
        if self.half_life is None:
            return 1.0
        halvings = (now - self.origin) / self.half_life
        return 0.0 if halvings > GONE else 2.0 ** min(-halvings, FAR)

    def _expire(self, now: float) -> None:
        if self.width is not None:
            oldest = math.floor(now / self.width) - BUCKETS
            self.buckets = [bucket for bucket in self.buckets if bucket.entry.place > oldest]

    def _drop_later(self, now: float) -> None:
        """Samples that are served after now were dated by a clock that has been set back: they would never expire."""
        self._expire(now)
        if self.width is not None:
            place = math.floor(now / self.width)
            self.buckets = [bucket for bucket in self.buckets if bucket.entry.place <= place]

    def _scale(self, now: float) -> None:
        """Count from now on, by a power of two: it rounds nothing. A clock that is set back lets no time pass."""
        if self.half_life is None:
            return
        halvings = math.floor((now - self.origin) / self.half_life)
        if halvings > GONE:
            self.buckets = []
        elif halvings < -FAR:
            self.origin = now
        elif halvings >= FAR:
            self.origin += halvings * self.half_life
            for bucket in self.buckets:
                for part in bucket.sums.parts():
                    for total in part.values():
                        total *= 2.0**-halvings
                bucket.entry = bucket.entry.scaled(2.0**-halvings)


def _whole(sums: RunningSums) -> Sums:
    """Copies of the sums."""
    folded, recent = sums.parts()
    return {name: total + recent[name] if recent else total.clone() for name, total in folded.items()}


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="seconds")
