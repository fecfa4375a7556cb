"""What was observed of a model at one set of weights: the sums by segment, and the pass that adds to them.

Owns that no sample spoils the others (NaN, errors, one that is too large), and what is read and written of a store.
Knows nothing of requests, threads or time: it is given batches, and when they were served.
"""

import hashlib
import json
import logging
import math
import os
import threading
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any, Final, final
from urllib.parse import quote

import numpy as np
import torch
from torch import Tensor, nn

from memsyn.batches import Given, take
from memsyn.errors import BatchError, MemoryFileError, MemsynError, MissingFileError, ModelError, OptionError
from memsyn.live.window import Window
from memsyn.measuring.measurement import Forward, Run
from memsyn.measuring.objectives import Estimator
from memsyn.parameters import trainable_parameters
from memsyn.storage.reading_and_writing import IMPORTANCE, Groups, read, well_formed, write
from memsyn.values.importance import Importance, check_same_shapes

LOGGER: Final = logging.getLogger("memsyn")

SEGMENTS: Final = 64
"""Each has sums of its own, so a name per user would take all memory."""

RANKED: Final = 2**20
"""Weights that are ranked, at most, to see whether their order changes."""

HEAD: Final = 10
"""Until there are HEAD / cap samples, none counts more than HEAD times their mean."""

Path = str | os.PathLike[str]


@final
class Ledger:
    """Sums over what was observed, by segment, of one set of weights.

    The first batch copies the weights, and all are measured on that copy: nothing that becomes of the model reaches the
    sums. Memory, in numbers per weight: the copy, a batch's sums, two halves, and two for each segment, or nine if its
    window slides. While the first batch is looked at, a copy in float64 and its gradients too.
    """

    def __init__(
        self,
        model: nn.Module,
        window: Callable[[], Window],
        *,
        forward: Forward | None,
        estimator: Estimator,
        cap: float | None,
        store: Path,
        fingerprint: str,
    ) -> None:
        trainable = trainable_parameters(model)
        if not trainable:
            raise ModelError("the model has no parameter that requires a gradient any more: nothing can be measured.")
        device = next(iter(trainable.values())).device
        self.fingerprint = fingerprint
        self.windows: dict[str | None, Window] = {}
        self.invalid = self.capped = self.measured = 0
        self.problem: Exception | None = None
        """What the last sample that was left out failed with."""
        self.lock = threading.Lock()
        """Held while sums are changed or copied."""
        self.run = Run(model, trainable, device, forward, estimator, batched=False, private=True)
        self._window, self._cap, self._store = window, cap, store
        named = getattr(forward, "__qualname__", type(forward).__qualname__)
        of = [self.fingerprint, sorted(trainable), named, estimator.name, estimator.magnitude, window().rule]
        self.key = hashlib.sha256(json.dumps(of).encode()).hexdigest()
        """Of all that must be the same for sums to be added."""
        self._places: dict[str | None, Path] = {}
        self._halves: list[dict[str, Tensor]] = [{}, {}]
        self._unsaved: set[str | None] = set()
        self._num_batches = 0

    @property
    def is_begun(self) -> bool:
        """Whether the weights are copied."""
        return self.run.sums is not None

    @property
    def is_sound(self) -> bool:
        """Whether the weights that were copied are those of the fingerprint."""
        return self.run.fingerprint in (None, self.fingerprint)

    @property
    def has_news(self) -> bool:
        """Whether there is something to save."""
        return bool(self._unsaved)

    def add(self, inputs: Any, num_samples: int, segment: str | None, when: float) -> None:
        """Measure a batch, and add what is sound to the sums of its segment, which go on from what the store holds.

        Raises:
            OptionError: there are too many segments.
            MemsynError: the model cannot be measured.
        """
        if segment not in self.windows and len(self.windows) == SEGMENTS:
            raise OptionError(f"there are {SEGMENTS} segments already, so {segment!r} cannot have sums of its own.")
        self._measure(inputs, num_samples, segment, when)
        self._num_batches += 1

    def _measure(self, inputs: Any, size: int, segment: str | None, when: float, most: float | None = None) -> None:
        """Add all samples at once if that is right, else in halves; none counts more than `most`, if that is known."""
        problem = self._stage(inputs)
        if problem is None:
            assert self.run.sums is not None
            staged = self.run.sums.recent
            total = _total(staged)
            window = self._open(segment)
            limit = self._limit(window, when)
            if self._cap is not None and size > 1 and most is None and limit == math.inf:
                self._measure(inputs, size, segment, when, self._head(inputs, size))
                return
            limit = min(limit, math.inf if most is None else most)
            if not math.isfinite(total):
                problem = MemsynError("a gradient is NaN or infinite, though the output is finite.")
            elif total <= limit or size == 1:
                if total > limit:
                    self.capped += 1
                    torch._foreach_mul_(list(staged.values()), limit / total)
                with self.lock:
                    window.add(staged, size, min(total, limit), when)
                    half = self._halves[self._num_batches % 2]
                    for name, own in staged.items():
                        half[name] = half[name].add_(own) if name in half else own.clone()
                self._unsaved.add(segment)
                self.measured += size
                return
        if size == 1:
            self.invalid, self.problem = self.invalid + 1, problem
            return
        for start, stop in ((0, size // 2), (size // 2, size)):
            self._measure(take(inputs, start, stop), stop - start, segment, when, most)

    def _head(self, inputs: Any, size: int) -> float:
        """What one of the first samples may add: there are no sums yet to compare it with."""
        totals = []
        for k in range(size):
            if self._stage(take(inputs, k, k + 1)) is None:
                assert self.run.sums is not None
                totals.append(_total(self.run.sums.recent))
        totals = [total for total in totals if 0 < total < math.inf]
        return HEAD * median(totals) if totals else math.inf

    def _stage(self, inputs: Any) -> Exception | None:
        """Measure a batch into `run.sums`, alone; returns what was wrong with it."""
        try:
            slow = self.run.alone(Given(inputs), self._num_batches)
        except ModelError:
            raise
        except MemsynError as error:
            return error
        if slow:
            LOGGER.warning(self.run.describe(slow))
        return None

    def _limit(self, window: Window, now: float) -> float:
        """What one sample may add; anything, while there is nothing to compare it with."""
        with self.lock:
            total, weight = window.total(now)
        if self._cap is None or total == 0:
            return math.inf
        return total * max(self._cap, HEAD / weight)

    def _open(self, segment: str | None) -> Window:
        """The segment's sums; those in the store, if they are of the same."""
        if segment not in self.windows:
            assert self.run.sums is not None
            place, found = self._claim(segment)
            window, zeros = self._window(), {n: torch.zeros_like(own) for n, own in self.run.sums.recent.items()}
            if found is not None:
                header, groups = found
                with well_formed(place):
                    for own in groups.values():
                        check_same_shapes(own, zeros, str(place), "the model")
                    scaled = {g: {n: t / self.run.factor for n, t in own.items()} for g, own in groups.items()}
                    window.restore(header["observed"], scaled, zeros)
            with self.lock:
                self.windows[segment], self._places[segment] = window, place
        return self.windows[segment]

    def _claim(self, segment: str | None) -> tuple[Path, tuple[dict[str, Any], Groups] | None]:
        """Where to keep a segment's sums, and what is there of the same weights: nobody else's file is written to."""
        places = [_place(self._store, segment), _place(self._store, segment, self.key[:8])]
        for place in places:
            try:
                header, groups = read(place, IMPORTANCE)
                with well_formed(place):
                    if header["observed"]["of"] == self.key:
                        return place, (header, groups)
            except MissingFileError:
                return place, None
            except MemoryFileError as error:
                if isinstance(error.__cause__, OSError):  # of the disk or the network: the sums may well be there
                    raise
        raise MemoryFileError(
            f"the sums cannot be stored: {places[0]} and {places[1]} are damaged, or of something else. Move them away."
        )

    def save(self, now: float) -> None:
        """Write what is new, each segment's file atomically.

        Raises:
            MemoryFileError: one cannot be written; what was there stays, and what is new is written the next time.
        """
        problem: Exception | None = None
        for segment in sorted(self._unsaved, key=str):
            try:
                self._save(segment, now)
                self._unsaved.discard(segment)
            except Exception as error:  # others can be written perhaps
                problem = problem or error
        if problem is not None:
            raise problem

    def _save(self, segment: str | None, now: float) -> None:
        """Write a segment's file."""
        with self.lock:
            window = self.windows[segment]
            saved = None if window.is_empty(now) else window.saved(now)
        if saved is None:
            return
        header, groups, count = saved
        whole = self.run.held(groups.pop("importance"), count)
        groups = {g: {n: t * self.run.factor for n, t in own.items()} for g, own in groups.items()}
        observed = {**header, "of": self.key, "segment": segment}
        header = {**whole.header(), "observed": observed}
        write(self._places[segment], IMPORTANCE, header, {"importance": whole.sums, **groups})

    def importance(self, segments: str | Mapping[str, float] | None, now: float) -> Importance:
        """Of all segments, of one, or of some by weights: Omega = sum_s w_s Omega_s / sum_s w_s."""
        with self.lock:
            found = {name: window for name, window in self.windows.items() if not window.is_empty(now)}
            asked = found if segments is None else [segments] if isinstance(segments, str) else segments
            missing = [name for name in asked if name not in found]
            if missing or not found:
                raise BatchError(f"nothing has been measured yet{f' of {missing[0]!r}' if missing else ''}.")
            values = {name: found[name].value(now) for name in asked}
        whole = sum(count for _, count in values.values())
        if isinstance(segments, Mapping):
            if not all(math.isfinite(w) and w >= 0 for w in segments.values()) or not sum(segments.values()) > 0:
                raise OptionError(f"weights must be finite, not negative, and not all zero; got {dict(segments)!r}.")
            each = sum(segments.values())
            scales = {name: segments[str(name)] / each * whole / count for name, (_, count) in values.items()}
        else:
            scales = dict.fromkeys(values, 1.0)
        sums: dict[str, Tensor] = {}
        for name, (own, _) in values.items():
            for key, total in own.items():
                sums[key] = sums[key] + total * scales[name] if key in sums else total * scales[name]
        return self.run.held(sums, whole)

    def converged(self) -> float:
        """Spearman's rank correlation of the importance between the halves; NaN while one is empty."""
        with self.lock:
            halves = [[total.reshape(-1) for total in half.values()] for half in self._halves]
            if not all(halves):
                return math.nan
            step = -(-sum(map(len, halves[0])) // RANKED)
            one, two = (torch.cat([total[::step] for total in half]).double().cpu().numpy() for half in halves)
        return spearman(one, two)


def spearman(one: np.ndarray[Any, Any], two: np.ndarray[Any, Any]) -> float:
    """The correlation of ranks, of which equal numbers share the mean; NaN if all numbers of one side are equal."""
    ranks = []
    for values in (one, two):
        _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
        own = (np.cumsum(counts) - (counts - 1) / 2)[where]
        ranks.append(own - own.mean())
    size = math.sqrt(float(ranks[0] @ ranks[0]) * float(ranks[1] @ ranks[1]))
    return float(ranks[0] @ ranks[1]) / size if size else math.nan


def _total(sums: Mapping[str, Tensor]) -> float:
    """Of all numbers: not finite if one of them is not."""
    return float(torch.stack([own.sum(dtype=torch.float64) for own in sums.values()]).sum())


def _place(store: Path, segment: str | None, more: str = "") -> str:
    """`folder/name.end`, `folder/name+segment.end`, `folder/name.more.end`."""
    folder, slash, name = str(store).rpartition("/")
    stem, dot, end = name.partition(".")
    own = "" if segment is None else "+" + quote(segment, safe="").replace(".", "%2E")
    return f"{folder}{slash}{stem}{own}{'.' + more if more else ''}{dot}{end}"
