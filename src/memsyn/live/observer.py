"""Observer: importance or factors from the requests that a deployed model serves.

Owns the arguments, and that the caller neither waits nor sees an error. Sampling and the queue are in `request_queue`,
the background thread in `worker`, the weights in `weights_versions`, the sums in `segment_sums`.
"""

from __future__ import annotations

import atexit
import inspect
import math
import os
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import TracebackType
from typing import Any, Final, final

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from memsyn.batches import model_input, num_samples, picked, tensors
from memsyn.error_log import ErrorLog
from memsyn.errors import BatchError, MemoryFileError, ModelError, OptionError, ProcessError
from memsyn.live.request_queue import QueuedSamples, RateSampler, RequestQueue
from memsyn.live.segment_sums import SegmentSums
from memsyn.live.weights_versions import VersionedSums, WeightsVersion
from memsyn.live.window import Window, steady_time
from memsyn.live.worker import TimeBudget, Worker
from memsyn.measuring.model_copy import Onlooker, check_measurable, refuse_foreign_hooks
from memsyn.measuring.objectives import Estimator, Forward, find_estimator
from memsyn.measuring.sharded_model import is_sharded_model
from memsyn.parameters import refuse_other_sharding, trainable_parameters, unwrap
from memsyn.storage.writer_locks import WriterLocks
from memsyn.values.comparison import rank_correlation
from memsyn.values.display import LayerRow, counted, html_table, printable
from memsyn.values.factors import KroneckerFactors
from memsyn.values.importance import Importance

EXIT_WAIT: Final = 10.0
"""Seconds for which the end of the process waits for what is being measured."""

LONGEST_ERROR: Final = 120
"""The most characters of an error in the display of `Stats`."""


@dataclass(frozen=True)
class Stats:
    """What an observer has done so far. Counts are of samples, unless another unit is given.

    `sampled` = measured + stale + invalid + dropped + waiting.
    """

    seen: int
    """Samples of all requests."""
    sampled: int
    """Samples that were chosen by `rate`."""
    measured: int
    """Samples whose importance is in the sums."""
    waiting: int
    """Samples in the queue or being measured."""
    dropped: int
    """Chosen samples that were not measured: no room in the queue, an error, or the observer was closed."""
    queue_full: int
    """Those of `dropped` for which the queue had no room."""
    closed: int
    """Those of `dropped` that waited when the observer was closed."""
    stale: int
    """Not measured, since the model no longer had the weights that answered them."""
    invalid: int
    """Left out: their output or gradient was NaN or infinite, or the model failed on them."""
    capped: int
    """Measured samples that were scaled down to `cap`."""
    withheld: int
    """Measured samples that are in no file, since there are fewer than `min_samples` of them."""
    errors: int
    """Number of errors."""
    last_error: str | None
    """Class and message of the last error."""
    seconds: float
    """Seconds spent on measuring and storing, waits for a core included."""
    lag: float
    """Seconds that the oldest sample in the queue has waited."""
    versions: int
    """Number of sets of weights that were measured."""
    stored: float | None
    """When the sums were last written, in seconds since 1970."""

    def __repr__(self) -> str:
        always, others = (
            ("seen", "sampled", "measured"),
            ("waiting", "dropped", "stale", "invalid", "capped", "withheld"),
        )
        counts = {name: value for name, value in vars(self).items() if name in always or (name in others and value)}
        words = [f"{value:,} {name}" for name, value in counts.items()]
        words += [f"{counted(self.versions, 'version')} of the weights", f"{self.seconds:.3g} s"]
        if self.errors:
            words.append(
                f"{counted(self.errors, 'error')}, the last: {printable(str(self.last_error))[:LONGEST_ERROR]}"
            )
        return f"Stats({', '.join(words)})"

    def _repr_html_(self) -> str:
        rows = [LayerRow(name, [self._cell(name)], 0.0) for name in vars(self)]
        return html_table(repr(self), ["count", "value"], rows)

    def _cell(self, name: str) -> str:
        value = vars(self)[name]
        if isinstance(value, float):
            is_time = name == "stored"
            return datetime.fromtimestamp(value, timezone.utc).isoformat(" ", "seconds") if is_time else f"{value:.3g}"
        return f"{value:,}" if isinstance(value, int) else printable(value or "none")[:LONGEST_ERROR]


@final
class Observer:
    """Measures importance or factors on a sample of the requests that a model serves, in a background thread.

    The sums are those that `memsyn.measure` gives for the samples that were measured: Omega = 1/N sum_k |d s(F(x_k);
    theta) / d theta|. No input is written to a file; a copy waits in memory until it is measured. But sums of few
    samples tell what their inputs were, so a file never changes by fewer than `min_samples` samples. docs/live.md says
    what a store tells all the same. Samples are measured on a copy of the weights, so that all sums in a file belong to
    one set of weights; other weights begin another file.

    Args:
        model: any module that `measure` takes; it stays bit for bit as it was. Its forward hooks are part of what is
            measured if they are methods of modules or come from torch.nn.utils (weight norm, pruning); see `onlookers`.
        store: path or URL of the file for the sums: an importance file, for `Importance.load` and `memsyn merge`. If it
            exists and is of the same weights and settings, the sums go on from it. If it is of others, it is kept, and
            the sums go to `name.1a2b3c4d.end` beside it, with eight digits of a digest. Each segment has a file of its
            own: `name+segment.end`. Each replica needs a store of its own: a second observer is refused.
        rate: the probability with which each sample is chosen, 0 to 1.
        forward: (model, inputs) -> output, as `measure` takes it; inputs is what `observe` was given. The store is of
            the same settings only if the function has the same name.
        estimator: one of `ESTIMATORS` by name, or an `Estimator`; "mas-local" needs forward passes only. "kronecker"
            and "inputs" give factors: read them by `factors()`, and load the store by `KroneckerFactors.load`.
        last: a timedelta: older samples do not count; they expire a seventh of it at a time.
        half_life: a timedelta: samples count 2^(-age / half_life). With neither, all samples count 1.
        cap: the share of its segment's total that one sample may have, 0 to 1; larger samples are scaled down to it.
            Until 10 / cap samples are measured, the limit is ten times their mean. Of factors, a sample's share is the
            mean of its shares of the traces of all second moments, so that each of these counts the same, whatever its
            units; sums of squared gradients count as traces. What is scaled down are all of the sample's sums.
        budget: the percentage of time in which the thread may work, and so of one core.
        room: the number of samples that may wait; further ones are dropped.
        max_batch: samples are measured in a batch when this many wait, or when the first has waited for half a minute.
            A sample costs less in a large batch; a large batch disturbs requests for longer.
        interval: seconds between writes of the store. A crash loses what was measured since, and the samples that wait.
        min_samples: the least number of new samples of a segment and of one set of weights that are written together. A
            number of their sums is written once no sample makes up more than a quarter of it; it waits until then. What
            waits is lost when the observer is closed or the weights change. 1: all samples are written at once, and
            whoever reads the store can read their inputs.
        busy: called before each batch; while it returns True, nothing is measured.
        onlookers: whether other forward hooks only look on, as a recorder of requests does. Then they are left out of
            the measurement, so that they do not see samples twice. Otherwise they are an error, since they may be part
            of what the model computes.
        seed: of the choice of samples, and the place at which random signs begin: with 0, they are those of `measure`.
            By default, both are random. Give each replica and each restart another seed, or none: signs that repeat
            average out more slowly.

    Raises:
        OptionError: an argument is out of its range.
        ModelError: the model cannot be measured, or has hooks that may compute.
        MemoryFileError: the store is a folder or in none, or another observer writes to it.

    Example:
        >>> import tempfile, torch, memsyn
        >>> model, folder = torch.nn.Linear(2, 1, bias=False), tempfile.mkdtemp()
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> with memsyn.Observer(model, f"{folder}/traffic.safetensors", rate=1.0, min_samples=1) as observer:
        ...     observer.observe(torch.tensor([[1.0, 2.0], [3.0, -3.0]]))  # outputs 3 and 0: d y^2 / d w = 2 y x
        ...     _ = observer.flush()
        >>> memsyn.Importance.load(f"{folder}/traffic.safetensors").mean()["weight"].tolist()
        [[3.0, 6.0]]
    """

    def __init__(
        self,
        model: nn.Module,
        store: str | os.PathLike[str],
        *,
        rate: float = 0.01,
        forward: Forward | None = None,
        estimator: str | Estimator = "mas",
        last: timedelta | None = None,
        half_life: timedelta | None = None,
        cap: float | None = None,
        budget: float = 10.0,
        room: int = 256,
        max_batch: int = 32,
        interval: float = 60.0,
        min_samples: int = 64,
        busy: Callable[[], bool] | None = None,
        onlookers: bool = False,
        seed: int | None = None,
    ) -> None:
        within = {"rate": (rate, 1), "cap": (1 if cap is None else cap, 1), "budget": (budget, 100)}
        _check_numbers({**within, "interval": (interval, math.inf)})
        _check_counts({"room": room, "max_batch": max_batch, "min_samples": min_samples})
        chosen = _without_labels(find_estimator(estimator))
        device = _check_model(model, onlookers)
        Window(last, half_life)  # raises if they are wrong
        _check_store(store)
        first_sample = random.Random().getrandbits(31) if seed is None else seed
        locks = WriterLocks()

        def begin(fingerprint: str) -> SegmentSums:
            # If the model returns to earlier weights, their sums go on. So no version begins at the place of another.
            place = (first_sample + self._sums.counts.measured) % 2**32
            return SegmentSums(
                model,
                lambda: Window(last, half_life),
                forward=forward,
                estimator=chosen,
                cap=cap,
                store=store,
                locks=locks,
                fingerprint=fingerprint,
                min_samples=min_samples,
                first_sample=place,
            )

        self._model, self._forward, self._estimator, self._min_samples = model, forward, chosen, min_samples
        self._queue, self._version = RequestQueue(RateSampler(rate, seed), room), WeightsVersion(model)
        self._budget, self._log = TimeBudget(budget / 100), ErrorLog(store)
        self._sums = VersionedSums(model, self._version, begin, self._log, onlookers=onlookers)
        locks.hold(store)
        at, release = (self._queue, self._sums, self._budget, self._log), locks.release
        try:
            self._worker = Worker(
                *at, device=device, max_batch=max_batch, interval=interval, busy=busy, release=release
            )
        except BaseException:  # no thread can be started
            release()
            raise
        self._hook: RemovableHandle | None = None
        atexit.register(self.close_at_exit)

    def observe(self, inputs: Any, *, segment: str | None = None) -> None:
        """Show the observer the inputs of a request: chosen samples are copied at once. Never blocks, never raises.

        Args:
            inputs: what `measure` takes as a batch, samples in the first dimension; a single sample is a batch of one.
            segment: the name of the sums to which these samples are added. There may be 64 segments.
        """
        try:
            if self._worker.is_open:
                self._offer(inputs, segment)
        except Exception as error:
            self._log.note(error)

    def attach(self) -> None:
        """Observe every forward pass of the model from now on, with the inputs as they are before any other hook.

        A single tensor is taken as it is; other arguments are taken as keyword arguments, by the names in the model's
        `forward`. A call that cannot be written so is counted as an error. If the observer is attached, this does
        nothing.
        """
        if self._hook is None:
            # `prepend`, since another hook may change the inputs. An Onlooker is left out of the copy that is measured:
            # otherwise each measurement would be observed as a request.
            hook = _RequestHook(self._offer_call)
            self._hook = self._model.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)

    def detach(self) -> None:
        """Stop observing forward passes."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def flush(self, timeout: float = 60.0) -> bool:
        """Wait until all queued samples are measured and stored, regardless of the budget.

        Samples of which there are fewer than `min_samples` are not written: `stats().withheld` is their number.

        Args:
            timeout: seconds to wait at most.

        Returns:
            Whether all samples that were queued since the last flush are measured and stored. Samples that are left out
            by rule (`invalid`, `stale` and `withheld` in `stats()`) do not count against that. Nor do samples that were
            dropped before they were queued, since there was no room. False if an error dropped samples, if sums are not
            on the disk, if the observer is closed, or at the timeout. `stats().last_error` and the log say why. Sums
            that could not be stored are kept and tried again: a later flush may return True.
        """
        return self._worker.flush(timeout)

    def close(self, timeout: float = 10.0) -> None:
        """Measure one more batch, store the sums and end the thread; other waiting samples are dropped.

        This is also done at exit; what is being measured after 10 seconds is then lost. A warning is logged if measured
        samples are in no file, see `min_samples`.

        Args:
            timeout: seconds to wait at most.
        """
        self.detach()
        was_open = self._worker.is_open
        self._worker.close(timeout)
        if not self._worker.is_running:
            atexit.unregister(self.close_at_exit)
        if was_open and (count := self._sums.num_withheld):
            were = f"{count:,} samples were" if count > 1 else "1 sample was"
            self._log.event(
                "withheld",
                f"{were} measured, and in no file: there were fewer than min_samples={self._min_samples} of their "
                "segment and weights.",
                count=count,
            )

    def close_at_exit(self) -> None:
        """Close as the process ends, which calls this: end the thread if it takes longer than 10 seconds."""
        self.close(EXIT_WAIT)
        if self._worker.is_running:
            self._log.event("lost", "the process ended while samples were measured or stored: they are lost.")
            self._worker.interrupt()

    def __enter__(self) -> Observer:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def importance(self, segments: str | Mapping[str, float] | None = None) -> Importance:
        """The importance that was measured at the present weights: of all samples, of one segment, or of several.

        Samples that are withheld from the store are counted. So a single one may be told from the result, or from its
        difference from the store.

        Args:
            segments: the name of a segment; or names and weights w: Omega = sum_s w_s Omega_s / sum_s w_s, whatever
                the number of samples of each segment. None: all samples.

        Raises:
            BatchError: nothing was measured yet.
            OptionError: the weights are negative, not finite, or all zero; or the observer measures factors.
            ProcessError: this process is a fork of the one that measures.
        """
        if self._estimator.factors is not None:
            raise OptionError("this observer measures factors, not an importance per weight: call factors().")
        value = self._value(segments)
        assert isinstance(value, Importance)
        return value

    def factors(self, segments: str | Mapping[str, float] | None = None) -> KroneckerFactors:
        """The factors that were measured at the present weights: of all samples, of one segment, or of several.

        Samples that are withheld from the store are counted, as in `importance`.

        Args:
            segments: as for `importance`: S is the weighted mean of the segments' S. In A, each position of a segment
                of N_s samples counts w_s / N_s: A = sum_s w_s/N_s sum x x^T / sum_s w_s/N_s num_positions_s.

        Raises:
            BatchError: nothing was measured yet.
            OptionError: the weights are negative, not finite, or all zero; or the observer measures an importance.
            ProcessError: this process is a fork of the one that measures.
        """
        if self._estimator.factors is None:
            raise OptionError("this observer measures an importance per weight, not factors: call importance().")
        value = self._value(segments)
        assert isinstance(value, KroneckerFactors)
        return value

    def _value(self, segments: str | Mapping[str, float] | None) -> Importance | KroneckerFactors:
        sums = self._own_sums()
        if sums is None:
            raise BatchError("nothing has been measured yet.")
        return sums.value(segments, steady_time())

    def _own_sums(self) -> SegmentSums | None:
        """The sums of the present weights; in a fork, the thread may have left them half changed, and locked."""
        if self._worker.is_fork:
            raise ProcessError(
                "this process is a fork of the one that measures, and has no sums. Load the store, or start another "
                "observer here, with a store of its own."
            )
        return self._sums.current

    def converged(self) -> float:
        """How settled the ranking of the weights is: Spearman's rank correlation between two halves of the samples.

        It is between -1 and 1; more samples bring it near to 1. A half is every other batch since the observer met the
        present weights, of all segments and of any age. At most some 10^6 weights are ranked, evenly spread. NaN while
        a half is empty. The halves cost two numbers per weight. Of factors, the diagonals of the second moments are
        ranked, and the traces of sketches.

        Raises:
            ProcessError: this process is a fork of the one that measures.
        """
        sums = self._own_sums()
        return math.nan if sums is None else sums.converged()

    def correlation(self, importance: Mapping[str, Tensor]) -> float:
        """Spearman's rank correlation of the importance measured so far with an earlier one; 1: the same ranking.

        NaN if nothing was measured yet, or no weight is in both. At most some 10^6 weights are ranked.

        Args:
            importance: parameter name -> importance, as `Memory.importance` holds it and `Importance.mean()` gives it.

        Raises:
            OptionError: the observer measures factors.
        """
        try:
            now = self.importance().sums
        except BatchError:
            return math.nan
        found, _ = rank_correlation([(now[name], importance[name]) for name in now if name in importance])
        return math.nan if found is None else found

    def stats(self) -> Stats:
        """Counts of what the observer has done so far."""
        queue, sums, counts = self._queue, self._sums, self._sums.counts
        return Stats(
            seen=queue.num_seen,
            sampled=queue.num_sampled,
            measured=counts.measured,
            waiting=queue.num_waiting,
            dropped=queue.num_dropped,
            queue_full=queue.num_refused,
            closed=queue.num_closed,
            stale=counts.stale,
            invalid=counts.invalid,
            capped=counts.capped,
            withheld=sums.num_withheld,
            errors=self._log.num_errors,
            last_error=self._log.last,
            seconds=self._budget.seconds,
            lag=queue.lag,
            versions=sums.num_versions,
            stored=sums.stored_at,
        )

    def _offer(self, inputs: Any, segment: str | None) -> None:
        """Choose samples of a request, and queue a copy of these."""
        given = model_input(inputs) if self._forward is None else inputs
        size = num_samples(given)
        if size is None:
            raise BatchError("expected tensors whose first dimension is the samples, got none.")
        if not isinstance(segment, str | None):
            raise OptionError(f"segment must be text, got {segment!r}.")
        rows = self._queue.choose(size)
        if not rows:
            return
        try:
            own = picked(given, rows)
            is_on_gpu = any(tensor.is_cuda for tensor in tensors(own))
            # The copy above runs on the stream of this request. The worker waits for this event on its own stream.
            copied = torch.cuda.current_stream().record_event() if is_on_gpu else None
            version, now = self._version.current(), steady_time()
            self._queue.put(QueuedSamples(own, len(rows), segment, version, now, copied))
        except BaseException:
            self._queue.done(len(rows), dropped=len(rows))
            raise
        self._worker.wake_if_full()

    def _offer_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Observe a forward pass that is about to begin, by its arguments."""
        if not self._worker.is_open:
            return
        try:
            inputs: Any = kwargs
            if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
                inputs = args[0]
            elif args:
                inputs = _keyword_arguments(unwrap(self._model).forward, args, kwargs)
            self.observe(inputs)
        except Exception as error:
            self._log.note(error)


def _check_numbers(numbers: dict[str, tuple[float, float]]) -> None:
    """Refuse numbers that are not above 0 and at most their limit; `numbers` holds name -> (value, limit)."""
    for name, (value, high) in numbers.items():
        if not isinstance(value, (int, float)) or not 0 < value <= high:
            raise OptionError(f"{name} must be a number above 0, up to {high}; got {value!r}.")


def _check_counts(counts: dict[str, int]) -> None:
    """Refuse counts that are not whole numbers of at least 1."""
    for name, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise OptionError(f"{name} must be a whole number, at least 1; got {value!r}.")


def _without_labels(estimator: Estimator) -> Estimator:
    if estimator.needs_labels:
        raise OptionError(f"the estimator of {estimator.name} needs labels, which requests do not have.")
    return estimator


def _check_store(store: str | os.PathLike[str]) -> None:
    if "://" in str(store):
        return
    if not Path(store).absolute().parent.is_dir():
        raise MemoryFileError(f"the store {store} cannot be written: its folder does not exist.")
    if Path(store).is_dir():
        raise MemoryFileError(f"the store {store} is a folder: give the name of a file in it.")


def _check_model(model: nn.Module, onlookers: bool) -> torch.device:
    """Refuse a model that cannot be measured; returns the device of its parameters."""
    check_measurable(model)
    refuse_other_sharding(model)
    if is_sharded_model(model):
        raise ModelError(
            "the model is cut between processes by fully_shard, and cannot be observed while it serves. Measure the "
            "requests with measure, in all processes together."
        )
    if not onlookers:
        refuse_foreign_hooks(model)
    for parameter in trainable_parameters(model).values():
        return parameter.device
    raise ModelError("the model has no parameter that requires a gradient: there is nothing to measure.")


def _keyword_arguments(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call as keyword arguments."""
    bound = inspect.signature(forward).bind(*args, **kwargs)
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        parameter = bound.signature.parameters[name]
        if parameter.kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL):
            raise BatchError(
                f"forward takes {name!r} only as a positional argument, so its calls cannot be observed by attach(). "
                "Call observe(inputs) where the requests come in, and give Observer(forward=lambda model, inputs: ...)."
            )
        named |= value if parameter.kind is inspect.Parameter.VAR_KEYWORD else {name: value}
    return named


@final
class _RequestHook(Onlooker):
    """A forward pre-hook that passes the arguments of each call on."""

    def __init__(self, offer: Callable[[tuple[Any, ...], dict[str, Any]], None]) -> None:
        self._offer = offer

    def __call__(self, *given: Any) -> None:
        self._offer(given[1], given[2])
