"""The sums of one segment over time: over all samples, over the last days, or with a half-life.

Owns when a sample no longer counts, and what a file says of the window. Must not know models, requests or threads: it
is given sums, and the time.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta, timezone
from typing import Any, Final, final

import torch
from torch import Tensor

from memsyn.errors import OptionError
from memsyn.kernels.running_sums import RunningSums
from memsyn.storage.reading_and_writing import Groups, checked, checked_count, record

BUCKETS: Final = 7
"""Parts of a sliding window; the samples of the oldest part expire together."""

RESCALE_AFTER: Final = 16
"""Half-lives after which decaying sums are rescaled, so that the weights of new samples do not overflow."""

END: Final = 253_402_300_800.0
"""The year 10,000, in seconds since 1970: dates end before."""

ZERO_AFTER: Final = 64
"""Half-lives after which a sample counts 0: float32 could hold little less."""

LONGEST_LATE: Final = 3600.0
"""Seconds by which a sample may be late, whatever the window: the queue may have been full."""


def _elapsed() -> float:
    """Seconds since some moment, which nobody can set; on Linux, the time that the machine sleeps is counted."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


_BEGAN: Final = time.time() - _elapsed()


def steady_time() -> float:
    """Seconds since 1970 by a clock that never jumps: what the system's clock said when this process imported memsyn,
    and the time that has passed since. If the system's clock is set, this one is right again after the next start.
    """
    return _BEGAN + _elapsed()


@dataclass(frozen=True)
class BucketHeader:
    """What a file says of a bucket; the names of the fields are part of the file format."""

    place: int
    """Number of the bucket since 1970, in units of the bucket's width; 0 if the window does not slide."""
    first: float
    """When the first of its samples was served, in seconds since 1970."""
    last: float
    """When the last one was served."""
    num_samples: int
    weight: float
    """Sum of the samples' weights: their number, unless they decay."""
    total: float
    """Sum of all of its sums; of factors, the sum of all traces."""

    def scaled(self, factor: float) -> "BucketHeader":
        """The same samples with their weights times `factor`."""
        return replace(self, weight=self.weight * factor, total=self.total * factor)


@dataclass
class _Bucket:
    header: BucketHeader
    sums: RunningSums


@final
class Window:
    """Sums over samples, of which old ones may count less.

    Args:
        last: samples older than this do not count; they expire a seventh of it at a time.
        half_life: a sample counts 2^(-age / half_life). If both are None, all samples count 1.

    A window that slides has up to seven buckets. With `last` of 7 days each is a day, by the clock in UTC; the samples
    of day 0 expire together when day 7 begins, so that 6 to 7 days count.

    A window that decays has one bucket, in which a sample served at time t is added with the weight
    2^((t - origin) / half_life): old sums need not be touched when new ones are added. With a half-life of a day:

        served        at the origin    a day later    two days later
        weight        1                2              4
        read then     1/4              1/2            1                  all weights times 2^-2

    Weights grow with time, so after 16 half-lives the sums are multiplied by 2^-16, and the origin moves on as far. A
    product with a power of two changes the exponent only: nothing is rounded.

    Time never runs backwards in a window: a time before the latest one counts as that one, and a sample that was served
    before it is late. So no weight is above 1. If a sample is so late that it would hardly count (16 half-lives, or the
    whole of `last`, and an hour at least), the clock was set back: the time goes on from the latest one, as fast
    as the clock runs. The same holds for a file of the future, which was written or is read while the clock was wrong.
    For example, a file of 2036 is restored in 2026: a sample of a day later belongs to 2036 and a day.

    Attributes:
        width: of a bucket in seconds; None if the window does not slide.
        half_life: in seconds; None if samples do not decay.
        buckets: from the oldest to the newest.
        origin: when a new sample has weight 1, in seconds since 1970; used only if samples decay.

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
        self._latest = -math.inf
        """The latest time so far, in the window's time."""
        self._ahead = 0.0
        """By how much the window's time is ahead of given times."""
        self._is_restored = False
        """Whether `restore` was called, and no time was given since."""

    @property
    def rule(self) -> str:
        """Which samples count, in words; part of the file format."""
        if self.half_life is not None:
            return f"half-life of {self.half_life:g} s"
        return "all" if self.width is None else f"last {self.width * BUCKETS:g} s"

    @property
    def num_samples(self) -> int:
        """The samples in the window, whatever their weights."""
        return sum(bucket.header.num_samples for bucket in self.buckets)

    def total(self, now: float) -> tuple[float, float]:
        """The sum of all sums, and the sum of the samples' weights, as they count now."""
        now = self._pass(now)
        headers = [bucket.header.scaled(self._factor(now)) for bucket in self.buckets]
        return sum(header.total for header in headers), sum(header.weight for header in headers)

    def traces(self, now: float, of: Callable[[Mapping[str, Tensor]], dict[str, float]]) -> dict[str, float]:
        """The numbers that `of` reads from some sums, added up over all sums as they count now; by name."""
        now = self._pass(now)
        found: dict[str, float] = {}
        for bucket in self.buckets:
            for part in bucket.sums.parts():
                for name, own in of(part).items():
                    found[name] = found.get(name, 0.0) + own * self._factor(now)
        return found

    def add(
        self,
        sums: Mapping[str, Tensor],
        num_samples: int,
        total: float,
        served_at: float,
        samples_weight: float | None = None,
    ) -> None:
        """Add the sums of samples that were served at a time; `total` is the sum of these sums, or of their traces.

        A sum that is not in the window yet was zero until now. `samples_weight` is the sum of the samples' weights at
        that time; by default, each counts 1.
        """
        now = self._pass(served_at)
        longest = self.half_life * RESCALE_AFTER if self.half_life else (self.width or math.inf) * BUCKETS
        # Samples that were withheld may be late by any time, though no clock was set back.
        is_withheld = samples_weight is not None
        if not is_withheld and served_at + self._ahead < now - max(longest, LONGEST_LATE):
            self._ahead = now - served_at
        self._rescale(now)
        served_at += self._ahead
        bucket = self._bucket(sums, served_at)
        weight, known = 1 / self._factor(served_at), bucket.sums.recent
        bucket.sums.replace((), {name: torch.zeros_like(own) for name, own in sums.items() if name not in known})
        for name, own in sums.items():
            bucket.sums.recent[name].add_(own, alpha=weight)
        old = bucket.header
        count = old.num_samples + num_samples
        bucket.sums.end_batch(count)
        bucket.header = replace(
            old,
            first=min(old.first, served_at),
            last=max(old.last, served_at),
            num_samples=count,
            weight=old.weight + weight * (num_samples if samples_weight is None else samples_weight),
            total=old.total + weight * total,
        )

    def _bucket(self, sums: Mapping[str, Tensor], served_at: float) -> _Bucket:
        """The bucket of a time; samples that arrive late may belong to an earlier one than the last."""
        place = 0 if self.width is None else math.floor(served_at / self.width)
        for bucket in self.buckets:
            if bucket.header.place == place:
                return bucket
        if self.buckets:
            # The newest bucket so far will get few more samples. Adding up its two sets of sums frees one of them.
            self.buckets[-1].sums = RunningSums(self.buckets[-1].sums.totals())
        else:
            self.origin = served_at
        zeros = {name: torch.zeros_like(own) for name, own in sums.items()}
        begun = _Bucket(BucketHeader(place, served_at, served_at, 0, 0.0, 0.0), RunningSums(zeros))
        self.buckets = sorted([*self.buckets, begun], key=lambda bucket: bucket.header.place)
        return begun

    def value(self, now: float) -> tuple[dict[str, Tensor], int]:
        """The sums as they count now, and their number of samples; needs at least one sample.

        The weights of decayed samples add up to a fraction. It is rounded to a count, and the sums are scaled with it,
        so that their ratio, the mean Omega = sum_k w_k |g_k| / sum_k w_k, is exact.
        """
        now = self._pass(now)
        if self.half_life is None:
            return self._sums(), self.num_samples
        weight = self.buckets[0].header.weight
        count = max(1, round(weight * self._factor(now)))
        return {name: total * (count / weight) for name, total in self._sums().items()}, count

    def is_empty(self, now: float) -> bool:
        """Whether no sample counts now."""
        return self.total(now)[1] == 0

    def saved(self, now: float) -> tuple[dict[str, Any], Groups, int]:
        """What a file says of the window, its tensors, and the number of samples for which they stand."""
        sums, count = self.value(now)
        now = self._latest
        factor = self._factor(now)
        groups = {"importance": sums}
        if self.width is not None:
            groups |= {str(bucket.header.place): _whole(bucket.sums) for bucket in self.buckets}
        header = {
            "window": self.rule,
            "first": _date(self.buckets[0].header.first),
            "last": _date(self.buckets[-1].header.last),
            "at": now,
            "buckets": [asdict(bucket.header.scaled(factor)) for bucket in self.buckets],
        }
        return header, groups, count

    def restore(self, header: Mapping[str, Any], groups: Groups, zeros: Mapping[str, Tensor]) -> None:
        """Go on from what `saved` returned; `zeros` has the shapes, dtypes and device of the sums.

        Sums of other names keep their dtype.

        Raises:
            LookupError, TypeError, ValueError: the header or the groups are not as `saved` makes them; the window is as
                it was.
        """
        own_headers, at = self._checked(header, groups)
        self.origin, device = at, next(iter(zeros.values())).device
        self._latest, self._is_restored = at, True
        for own in own_headers:
            stored = groups["importance" if self.width is None else str(own.place)]
            # A weight of 2.6 was stored as 3 samples, with sums to match. Times 2.6 / 3 they are as before.
            ratio = 1.0 if self.half_life is None else own.weight / max(1, round(own.weight))
            sums = {name: total.to(zeros.get(name, total)).to(device) * ratio for name, total in stored.items()}
            self.buckets.append(_Bucket(own, RunningSums(sums)))

    def _checked(self, header: Mapping[str, Any], groups: Groups) -> tuple[list[BucketHeader], float]:
        """The buckets in a header, and when it was written, checked against each other and against the groups.

        Raises:
            LookupError, TypeError, ValueError: they cannot be of one window.
        """
        at, plain = header["at"], checked(list, header["buckets"], "buckets")
        if type(at) not in (int, float) or not 0 <= at < END:
            raise ValueError(f"at is {at!r:.40}; expected seconds since 1970")
        if not 1 <= len(plain) <= (1 if self.width is None else BUCKETS):
            raise ValueError(f"buckets are {len(plain)}; expected 1 to {1 if self.width is None else BUCKETS}")
        found = [record(BucketHeader, checked(dict, values, "buckets")) for values in plain]
        places = [own.place for own in found]
        names = {"importance"} | (set() if self.width is None else set(map(str, places)))
        if places != sorted(set(places)) or groups.keys() != names:
            raise ValueError(f"the places of the buckets are {places!r:.80}; expected one group for each, in order")
        for own in found:
            self._check_bucket(own, at)
        for name, total in ((name, own) for sums in groups.values() for name, own in sums.items()):
            if not total.is_floating_point() or total.dtype.itemsize < 2:
                raise ValueError(f"{name} is {total.dtype}; expected a floating point type to compute with")
        return found, float(at)

    def _check_bucket(self, own: BucketHeader, at: float) -> None:
        """Check the numbers of a bucket against each other, and against the time at which they were written.

        Raises:
            ValueError: names the field.
        """
        checked_count(own.num_samples, "num_samples", 1)
        if not 0 <= own.first <= own.last < END:
            raise ValueError(f"first is {own.first:g} and last {own.last:g}; expected seconds since 1970, in order")
        is_whole = self.half_life is None
        if not own.weight > 0 or (is_whole and own.weight != own.num_samples) or not own.total >= 0:
            raise ValueError(f"weight is {own.weight:g} and total {own.total:g}, of {own.num_samples} samples")
        if own.weight > own.num_samples * 2.0**RESCALE_AFTER:
            raise ValueError(f"weight is {own.weight:g}, of {own.num_samples} samples")
        places = {0} if self.width is None else {math.floor(time / self.width) for time in (own.first, own.last)}
        age = 0 if self.width is None else math.floor(at / self.width) - own.place
        if places != {own.place} or not 0 <= age < BUCKETS:
            raise ValueError(f"place is {own.place}; expected that of its samples, among the last {BUCKETS}")

    def _sums(self) -> dict[str, Tensor]:
        """The sums of all buckets, without rescaling."""
        first, *others = (_whole(bucket.sums) for bucket in self.buckets)
        for other in others:
            for name, own in other.items():
                first[name] = first[name].add_(own) if name in first else own
        return first

    def _factor(self, now: float) -> float:
        """What weights are multiplied by now: 2^(-(now - origin) / half_life)."""
        if self.half_life is None:
            return 1.0
        # A late sample may have been served before the origin. The limit keeps its weight above 0.
        halvings = (now - self.origin) / self.half_life
        return 0.0 if halvings > ZERO_AFTER else 2.0 ** min(-halvings, ZERO_AFTER)

    def _pass(self, given: float) -> float:
        """Let time pass until a given time, and drop samples that are too old; returns the window's time."""
        if self._is_restored:
            self._ahead, self._is_restored = max(0.0, self._latest - given), False
        self._latest = max(self._latest, given + self._ahead)
        if self.width is not None:
            place = math.floor(self._latest / self.width)
            self.buckets = [bucket for bucket in self.buckets if place - BUCKETS < bucket.header.place <= place]
        return self._latest

    def _rescale(self, now: float) -> None:
        """Move the origin of decaying weights if it is far away."""
        if self.half_life is None:
            return
        halvings = math.floor((now - self.origin) / self.half_life)
        if halvings > ZERO_AFTER:
            self.buckets = []
        elif halvings >= RESCALE_AFTER:
            self.origin += halvings * self.half_life
            for bucket in self.buckets:
                for part in bucket.sums.parts():
                    for total in part.values():
                        total *= 2.0**-halvings
                bucket.header = bucket.header.scaled(2.0**-halvings)


def _whole(sums: RunningSums) -> dict[str, Tensor]:
    """A copy of the sums."""
    folded, recent = sums.parts()
    return {name: total + recent[name] if recent else total.clone() for name, total in folded.items()}


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="seconds")
