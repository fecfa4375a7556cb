"""The sums of one set of weights, by segment.

Owns that no sample spoils or dominates the sums (NaN, errors, samples above the cap), how segments are combined, and
when sums are written; `withheld_sums` says what must wait. Must not know requests, threads or the clock: it is given
batches, and the times when they were served.
"""

import logging
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from statistics import median
from typing import Any, Final, final

import numpy as np
import torch
from torch import Tensor, nn

from memsyn.batches import Batch
from memsyn.errors import BatchError, MemsynError, MismatchError, ModelError, OptionError
from memsyn.live.segment_files import SegmentFiles
from memsyn.live.window import BUCKETS, Window
from memsyn.live.withheld_sums import PARTS, WithheldSums
from memsyn.matrices import Matrix
from memsyn.measuring.factor_scorer import FactorScorer, diagonals, traces
from memsyn.measuring.measurement import Measurement, describe_slow
from memsyn.measuring.objectives import Estimator, Forward
from memsyn.parameters import trainable_parameters
from memsyn.storage.reading_and_writing import FACTORS, IMPORTANCE
from memsyn.storage.writer_locks import WriterLocks
from memsyn.values.factors import KroneckerFactors
from memsyn.values.importance import Importance
from memsyn.values.ranks import MAX_RANKED, spearman

MAX_SEGMENTS: Final = 64
"""The most segments. Each has sums of its own, so a segment for each user would take all memory."""

FIRST_MULTIPLE: Final = 10
"""Until there are FIRST_MULTIPLE / cap samples, one sample may have at most FIRST_MULTIPLE times their mean."""

_ALL: Final = "all"
"""The name of the only total of an importance."""


@final
@dataclass(frozen=True)
class SampleCounts:
    """Numbers of samples by what became of them."""

    measured: int = 0
    stale: int = 0
    """Not measured, since the weights that answered them are gone."""
    invalid: int = 0
    """Left out: their output or gradient is not finite, or the model failed on them."""
    capped: int = 0
    """Those of the measured samples that were scaled down."""
    lost: int = 0
    """Those of the measured samples that were withheld from a file for good."""

    @property
    def settled(self) -> int:
        """Samples that are measured, stale or invalid."""
        return self.measured + self.stale + self.invalid

    def __add__(self, other: "SampleCounts") -> "SampleCounts":
        return SampleCounts(*(one + two for one, two in zip(astuple(self), astuple(other), strict=True)))


@final
@dataclass
class _Segment:
    """The sums of one segment: those for its file, and those that wait for further samples."""

    window: Window
    withheld: WithheldSums
    """Empty if all samples are written at once."""
    has_new: bool = False
    """Whether there are samples since the last `save`."""
    may_be_written: bool = False
    """Whether the file does not hold the window yet."""

    def is_empty(self, now: float) -> bool:
        """Whether no sample counts now."""
        self.withheld.expire(now)
        return self.window.is_empty(now) and not self.withheld.num_samples

    def value(self, now: float) -> tuple[dict[str, Tensor], int]:
        """The sums as they count now, those that are withheld from its file among them; and their count.

        As in `Window.value`, a sum of weights is rounded to a count, and the sums are scaled with it.
        """
        window, withheld = self.window, self.withheld
        if not withheld.sums:
            return window.value(now)
        older, found, weight = withheld.factor(now), dict[str, Tensor](), 0.0
        if not window.is_empty(now):
            sums, count = window.value(now)
            weight = window.total(now)[1]
            found = {name: own * (weight / count) for name, own in sums.items()}
        for name, own in withheld.sums.items():
            found[name] = found[name] + own * older if name in found else own * older
        weight += withheld.weight * older
        count = max(1, round(weight))
        # Only a weight that decays is no whole number.
        return {name: own * (count / weight) for name, own in found.items()}, count


@final
class SegmentSums:
    """Sums over the samples of one set of weights, by segment.

    The first batch copies the weights, and all batches are measured on that copy: later changes of the model do not
    reach the sums. Memory, in numbers per weight: the copy, the sums of a batch, two halves (see `converged`), and five
    for each segment, or twelve if its window slides. Three of these are for what is withheld from the file. The first
    batch needs another copy in float64, and its gradients.
    Factors are sums too, under the names of `Measurement`: a matrix that first appears in a later batch has been zero
    until then. Of them, the halves hold only the diagonals.

    Args:
        model: the user's model; it is only read.
        new_window: makes an empty window.
        forward, estimator: as `measure` takes them.
        cap: the share of a segment's total that one sample may have; None: no limit.
        store: path or URL of the file for samples without a segment.
        locks: on the files.
        fingerprint: of the model's weights.
        min_samples: the least number of new samples of a segment that are written together, see `WithheldSums`; 1: all
            samples are written at once.
        first_sample: the place of the first sample, from which random signs begin. No two samples have the same place.

    Attributes:
        fingerprint: as given.
        counts: of the samples so far.

    Raises:
        ModelError: the model has no parameter that requires a gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        new_window: Callable[[], Window],
        *,
        forward: Forward | None,
        estimator: Estimator,
        cap: float | None,
        store: str | os.PathLike[str],
        locks: WriterLocks,
        fingerprint: str,
        min_samples: int = 1,
        first_sample: int = 0,
    ) -> None:
        trainable = trainable_parameters(model)
        if not trainable:
            raise ModelError("the model has no parameter that requires a gradient any more: nothing can be measured.")
        device = next(iter(trainable.values())).device
        self.fingerprint = fingerprint
        self.counts = SampleCounts()
        self._measurement = Measurement(model, trainable, device, forward, estimator, private=True)
        # From here it counts the samples that are kept: each has a place of its own in the data, and its own signs.
        self._measurement.num_samples = first_sample
        self._new_window, self._cap, self._min_samples = new_window, cap, min_samples
        called = getattr(forward, "__qualname__", type(forward).__qualname__)
        settings = [fingerprint, sorted(trainable), called, estimator.name, estimator.magnitude, new_window().rule]
        settings += [] if estimator.factors is None else [estimator.factors]
        self._files = SegmentFiles(store, settings, locks, FACTORS if self._has_factors else IMPORTANCE)
        self._matrices: dict[str, Matrix] = {}
        """Those of the batches and of the files."""
        self._segments: dict[str | None, _Segment] = {}
        self._halves = AlternateHalves()
        self._num_batches = 0
        self._lock = threading.Lock()
        """Held while sums are changed or copied."""

    @property
    def has_copy(self) -> bool:
        """Whether the weights are copied."""
        return self._measurement.sums is not None

    @property
    def is_of_fingerprint(self) -> bool:
        """Whether the copied weights have the fingerprint that was given; true before they are copied."""
        return self._measurement.fingerprint in (None, self.fingerprint)

    @property
    def _has_factors(self) -> bool:
        return isinstance(self._measurement.scorer, FactorScorer)

    @property
    def has_unsaved(self) -> bool:
        """Whether there are sums that are not stored yet."""
        return any(own.has_new for own in list(self._segments.values()))

    @property
    def num_withheld(self) -> int:
        """The measured samples that are not meant for a file yet, or were too old before they were."""
        # Without the lock: a fork may ask, in which nobody would release it.
        return sum(own.withheld.num_samples + own.withheld.num_lost for own in list(self._segments.values()))

    def add(self, batch: Batch, segment: str | None, served_at: float) -> Exception | None:
        """Measure a batch, and add it to the sums of its segment; these go on from what the segment's file holds.

        Returns:
            The error of the last sample that was left out; None if all samples were added.

        Raises:
            OptionError: there are too many segments.
            ModelError: the model cannot be measured.
            MemoryFileError: the segment's file cannot be read.
        """
        if segment not in self._segments and len(self._segments) == MAX_SEGMENTS:
            raise OptionError(f"there are {MAX_SEGMENTS} segments already, so {segment!r} cannot have sums of its own.")
        error, first_limits = None, self._limits_of_first(batch, segment, served_at)
        for part in self._parts(batch):
            error = self._add(part, segment, served_at, first_limits) or error
        self._num_batches += 1
        return error

    def _parts(self, batch: Batch) -> Sequence[Batch]:
        """A batch in parts so small that the least number of samples has `PARTS` of them."""
        size = batch.num_samples
        if self._min_samples == 1 or size is None:
            return [batch]
        step = max(1, self._min_samples // PARTS)
        return [batch.take(start, min(start + step, size)) for start in range(0, size, step)]

    def _limits_of_first(self, batch: Batch, segment: str | None, served_at: float) -> dict[str, float] | None:
        """The limits for one sample if a segment's first batch is added in parts: found from all of its samples."""
        if self._cap is None or len(self._parts(batch)) == 1 or self._measure(batch) is not None:
            return None
        if isinstance(self._measurement.scorer, FactorScorer):
            self._learn(self._measurement.scorer.matrices)
        return None if self._limits(segment, served_at) else self._first_limits(batch)

    def _add(
        self, batch: Batch, segment: str | None, served_at: float, first_limits: Mapping[str, float] | None
    ) -> Exception | None:
        """Add samples together if no single one can be at fault; else each half of them on its own.

        A sample is at fault if it cannot be measured, if its gradient is not finite, or if its total is above the limit
        for one sample. Totals are sums of magnitudes, so that if the total of a batch is within the limit, the total of
        each of its samples is. Factors have a total for each second moment, see `_totals`; then the mean of total /
        limit counts. If sample 5 of 8 holds a NaN, these parts are measured, in this order:

            0-7 fails
                0-3 is added
                4-7 fails
                    4-5 fails
                        4 is added
                        5 fails alone: it is left out
                    6-7 is added

        A sample above the limit is found in the same way; alone, it is scaled down to the limit and added. The limit is

        - infinite, if there is no cap;
        - `_limits`, a share of what the segment holds, if it holds anything;
        - unknown, if the segment holds nothing yet. Then `_first_limits` finds it from the totals of these samples, and
          it is given to their halves as `first_limits`: these samples are all that the odd one can be compared with. A
          first batch of one sample is added as it is.
        """
        error, size = self._measure(batch), batch.num_samples
        assert size is not None
        if error is None:
            if isinstance(self._measurement.scorer, FactorScorer):
                self._learn(self._measurement.scorer.matrices)
            totals, limits = self._totals(self._batch_sums), self._limits(segment, served_at)
            if self._cap is not None and not limits and first_limits is None and size > 1:
                return self._add(batch, segment, served_at, self._first_limits(batch))
            excess = max(_share(totals, limits), _share(totals, first_limits or {}))
            if not all(map(math.isfinite, totals.values())):
                error = MemsynError("a layer's input or a gradient is NaN or infinite, though the output is finite.")
            elif excess <= 1 or size == 1:
                self._keep(segment, size, sum(totals.values()), excess, served_at)
                self._segments[segment].has_new = True
                return None
        if size == 1:
            self.counts += SampleCounts(invalid=1)
            return error
        middle = size // 2
        first = self._add(batch.take(0, middle), segment, served_at, first_limits)
        second = self._add(batch.take(middle, size), segment, served_at, first_limits)
        return first if second is None else second

    @property
    def _batch_sums(self) -> dict[str, Tensor]:
        """The sums of the samples that were measured last, of these alone."""
        assert self._measurement.sums is not None
        return self._measurement.sums.recent

    def _measure(self, batch: Batch) -> Exception | None:
        """Measure samples, which may be measured again; returns the error if they cannot be measured together."""
        place = self._measurement.num_samples
        try:
            slow = self._measurement.alone(batch, self._num_batches)
        except ModelError:
            raise
        except MemsynError as error:
            return error
        finally:
            self._measurement.num_samples = place
        if slow:
            own = self._measurement
            logging.getLogger("memsyn").warning(describe_slow(own.model, slow, len(own.table.routes)))
        return None

    def _learn(self, matrices: Mapping[str, Matrix]) -> None:
        """Remember matrices; sums of a weight that is read in two ways cannot be added.

        Raises:
            MismatchError: names such weights.
        """
        clash = [key for key, matrix in matrices.items() if self._matrices.get(key, matrix) != matrix]
        if clash:
            raise MismatchError(
                f"{', '.join(clash)}: the sums in the store read this weight as a matrix in another way than these "
                "samples do. Move the store to another folder."
            )
        self._matrices |= matrices

    def _totals(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """What limits are about: the sum of an importance, under one name; or each trace of factors, by name."""
        return traces(sums) if self._has_factors else {_ALL: _total(sums)}

    def _limits(self, segment: str | None, served_at: float) -> dict[str, float]:
        """The largest totals that one sample may add to a segment; a total without a limit has nothing to compare with.

        With a cap of 0.01 and samples of total 2: after 100 samples (total 200) it is 200 max(0.01, 10 / 100) = 20, ten
        times the mean; from 1,000 samples on (total 2,000) it is 1% of the total, which is 20 there as well.
        """
        own_segment = self._segment(segment)
        window, withheld = own_segment.window, own_segment.withheld
        if self._cap is None:
            return {}
        with self._lock:
            total, weight = window.total(served_at)
            totals = window.traces(served_at, traces) if self._has_factors else {_ALL: total}
            withheld.expire(served_at)
            if withheld.sums:
                older = withheld.factor(served_at)
                weight += withheld.weight * older
                for name, own in self._totals(withheld.sums).items():
                    totals[name] = totals.get(name, 0.0) + own * older
        if not weight > 0:  # no sample counts any more, though single numbers of some may wait
            return {}
        return {name: own * max(self._cap, FIRST_MULTIPLE / weight) for name, own in totals.items() if own > 0}

    def _first_limits(self, batch: Batch) -> dict[str, float]:
        """The largest totals for one of the first samples of a segment: ten times the medians of their totals."""
        found: dict[str, list[float]] = {}
        for sample in batch.one_by_one():
            if self._measure(sample) is None:
                for name, total in self._totals(self._batch_sums).items():
                    found.setdefault(name, []).extend([total] if 0 < total < math.inf else [])
        return {name: FIRST_MULTIPLE * median(totals) for name, totals in found.items() if totals}

    def _keep(self, segment: str | None, size: int, total: float, excess: float, served_at: float) -> None:
        """Add the samples that were measured last to a segment; if they are above the limit, divided by their excess.

        All sums of factors are divided, the number of positions among them.
        """
        sums, is_capped = self._batch_sums, excess > 1
        if is_capped:
            for own in sums.values():
                own /= excess
        with self._lock:
            if self._min_samples > 1:
                self._segments[segment].withheld.add(sums, size, served_at)
            else:
                self._segments[segment].window.add(sums, size, total / max(1.0, excess), served_at)
                self._segments[segment].may_be_written = True
            self._measurement.num_samples += size
            # All parts of one batch go into the same half: `add` counts a batch once.
            self._halves.add(diagonals(sums) if self._has_factors else sums, self._num_batches % 2)
        self.counts += SampleCounts(measured=size, capped=int(is_capped))

    def _segment(self, segment: str | None) -> _Segment:
        """The sums of a segment; at first, those of its file."""
        if segment not in self._segments:
            window, zeros = self._new_window(), {name: torch.zeros_like(own) for name, own in self._batch_sums.items()}
            self._learn(self._files.open(segment, window, zeros))
            longest = None if window.width is None else window.width * BUCKETS
            with self._lock:
                withheld = WithheldSums(self._min_samples, window.half_life, longest)
                self._segments[segment] = _Segment(window, withheld)
        return self._segments[segment]

    def save(self, now: float) -> bool:
        """Write the sums that may be written and are not stored yet, the file of each segment atomically.

        Returns:
            Whether a file was written.

        Raises:
            MemoryFileError: a file cannot be written: its old content stays, and `save` tries it again the next time.
                The files of the other segments are written.
        """
        first_error: Exception | None = None
        wrote = False
        for segment in sorted((name for name, own in self._segments.items() if own.has_new), key=str):
            try:
                wrote |= self._save(segment, now)
                self._segments[segment].has_new = False
            except Exception as error:  # the files of other segments may be writable
                first_error = first_error or error
        if first_error is not None:
            raise first_error
        return wrote

    def _save(self, segment: str | None, now: float) -> bool:
        with self._lock:
            own, window = self._segments[segment], self._segments[segment].window
            released = None if self._min_samples == 1 else own.withheld.release(joins_unwritten=own.may_be_written)
            if released is not None:
                total = sum(self._totals(released.sums).values())
                window.add(released.sums, released.num_samples, total, released.at, released.weight)
                own.may_be_written = True
            saved = None if not own.may_be_written or window.is_empty(now) else window.saved(now)
        if saved is None:
            return False
        header, buckets, count = saved
        held = self._whole(buckets.pop("importance"), count)
        if self._min_samples > 1:
            # Otherwise the routes would tell that a single sample has used a parameter.
            held = replace(held, routes={name: held.routes[name] if used else "unused" for name, used in _used(held)})
        self._files.write(segment, held, {**header, "min_samples": self._min_samples}, buckets)
        own.may_be_written = False
        return True

    def _whole(self, sums: dict[str, Tensor], num_samples: int) -> Importance | KroneckerFactors:
        """The importance or the factors that sums of this measurement and of its files give."""
        if not self._has_factors:
            return self._measurement.held(sums, num_samples)
        return self._measurement.factors(sums, num_samples, matrices=self._matrices)

    def value(self, segments: str | Mapping[str, float] | None, now: float) -> Importance | KroneckerFactors:
        """The result for all segments (None), for one, or for some by weights: sum_s w_s Omega_s / sum_s w_s.

        Raises:
            BatchError: nothing was measured yet of a segment.
            OptionError: the weights are negative, not finite, or all zero.
        """
        with self._lock:
            filled = {name for name, own in self._segments.items() if not own.is_empty(now)}
            chosen = filled if segments is None else [segments] if isinstance(segments, str) else segments
            missing = [name for name in chosen if name not in filled]
            if missing or not filled:
                raise BatchError(f"nothing has been measured yet{f' of {missing[0]!r}' if missing else ''}.")
            values = {name: self._segments[name].value(now) for name in chosen}
        num_samples = sum(count for _, count in values.values())
        scales = dict.fromkeys(values, 1.0)
        if isinstance(segments, Mapping):
            if not all(math.isfinite(w) and w >= 0 for w in segments.values()) or not sum(segments.values()) > 0:
                raise OptionError(f"weights must be finite, not negative, and not all zero; got {dict(segments)!r}.")
            # With 100 samples each and weights 1 and 3, there are 200 samples, and the scales are 0.5 and 1.5. Then the
            # sums over 200 samples have the mean 0.25 Omega_1 + 0.75 Omega_2.
            each = sum(segments.values())
            scales = {name: segments[str(name)] / each * num_samples / count for name, (_, count) in values.items()}
        sums: dict[str, Tensor] = {}
        for name, (own, _) in values.items():
            for key, total in own.items():
                sums[key] = sums[key] + total * scales[name] if key in sums else total * scales[name]
        return self._whole(sums, num_samples)

    def converged(self) -> float:
        """Spearman's rank correlation of the sums of every other batch with the rest; NaN while one is empty."""
        with self._lock:
            ranked = self._halves.ranked()
        return math.nan if ranked is None else spearman(*ranked)


@final
class AlternateHalves:
    """The sums of every other batch, and those of the rest: plain additions, since only their ranks are compared."""

    def __init__(self) -> None:
        self._sums: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})

    def add(self, sums: Mapping[str, Tensor], half: int) -> None:
        """Add the sums of a batch to half 0 or 1."""
        for name, own in sums.items():
            totals = self._sums[half]
            totals[name] = totals[name].add_(own) if name in totals else own.clone()

    def ranked(self) -> "tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]] | None":
        """Both halves at the same `MAX_RANKED` weights at most, evenly spread; None while a half is empty."""
        if not all(self._sums):
            return None
        # Sums of factors may be in one half only: they are zero in the other.
        known = {**self._sums[0], **self._sums[1]}
        halves = [
            [half.get(name, torch.zeros_like(total)).reshape(-1) for name, total in known.items()]
            for half in self._sums
        ]
        step = -(-sum(map(len, halves[0])) // MAX_RANKED)
        one, two = (torch.cat([total[::step] for total in half]).double().cpu().numpy() for half in halves)
        return one, two


def _used(held: Importance | KroneckerFactors) -> Iterator[tuple[str, bool]]:
    """The parameters with a route, and whether sums of them are not zero."""
    names = {name for name, own in held.sums.items() if bool(own.any())}
    names |= {name.removeprefix("diagonal/") for name in names}
    if isinstance(held, KroneckerFactors):
        own = [matrix for key, matrix in held.matrices.items() if f"positions/{key}" in names]
        names |= {name for matrix in own for name in (matrix.weight, matrix.bias) if name is not None}
    return ((name, name in names) for name in held.routes)


def _share(totals: Mapping[str, float], limits: Mapping[str, float]) -> float:
    """The mean of total / limit over all limits; 0 if there are none."""
    return sum(totals.get(name, 0.0) / limit for name, limit in limits.items()) / max(1, len(limits))


def _total(sums: Mapping[str, Tensor]) -> float:
    """The sum of all numbers in float64: not finite if one of them is not."""
    return float(torch.stack([own.sum(dtype=torch.float64) for own in sums.values()]).sum())
