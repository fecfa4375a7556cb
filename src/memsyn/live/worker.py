"""The thread of an observer: it measures what was taken, stores the sums, and rests.

Owns when work is done, what it may cost, and that weights which changed get sums of their own. What fails is noted, and
never ends the thread.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Final, final

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from memsyn.batches import joined, tensors
from memsyn.errors import ModelError
from memsyn.kernels.outer_products import workspace
from memsyn.live.request_queue import Budget, Taken, Traffic, Watch
from memsyn.live.segment_sums import Ledger
from memsyn.measuring.model_copy import refuse_foreign_hooks
from memsyn.parameters import fingerprint, trainable_parameters, weights

FAILURES: Final = 8
"""Batches that fail one after the other until nothing more is tried with these weights."""

PATIENCE: Final = 30.0
"""Seconds that samples wait for a full batch, in which each costs a fraction of what it costs alone."""

BUSY: Final = 0.02
"""Seconds between two looks whether a service is busy."""

LONGEST: Final = 3600.0
"""Seconds to wait at most: Python refuses more than some years."""

LOGGER: Final = logging.getLogger("memsyn")


@final
class _OwnDraws(TorchDispatchMode):
    """While open, this thread draws from torch's generators as if they were its own, and leaves them to others."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_draws = 0
        cuda = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
        self._generators: list[torch.Generator] = [torch.default_generator, *cuda]
        self._states = [generator.get_state() for generator in self._generators]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **(kwargs or {}))
        self.num_draws += 1
        before = [generator.get_state() for generator in self._generators]
        for generator, state in zip(self._generators, self._states, strict=True):
            generator.set_state(state)
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self._states = [generator.get_state() for generator in self._generators]
            for generator, state in zip(self._generators, before, strict=True):
                generator.set_state(state)


@final
class Worker:
    """Measures a model's traffic in a thread of its own.

    Args:
        model: the user's; it is only read.
        traffic, watch, budget: what to measure, whose weights, and for how much time.
        begin: gives an empty ledger for weights of a fingerprint.
        max_batch, interval, busy, onlookers: as an observer has them.
    """

    def __init__(
        self,
        model: nn.Module,
        traffic: Traffic,
        watch: Watch,
        budget: Budget,
        begin: Callable[[str], Ledger],
        *,
        max_batch: int,
        interval: float,
        busy: Callable[[], bool] | None,
        onlookers: bool,
    ) -> None:
        self.ledger: Ledger | None = None
        """Of the present weights."""
        self.errors, self.last_error = 0, ""
        self.stale = self.versions = 0
        self.stored: float | None = None
        """When the sums were last written."""
        self._model, self._traffic, self._watch, self._budget, self._begin = model, traffic, watch, budget, begin
        self._max_batch, self._interval, self._busy, self._onlookers = max_batch, interval, busy, onlookers
        self._device = next(iter(trainable_parameters(model).values())).device
        self._past = [0, 0, 0]
        self._draws = False
        """Whether the forward pass draws random numbers."""
        self._failures = 0
        self._tag: Hashable = None
        """Of the weights that the ledger is of."""
        self._due = time.monotonic() + interval
        self._lock = threading.Lock()
        self._wake, self._urgent, self._answer = threading.Event(), threading.Event(), threading.Condition()
        self._asked = self._answered = 0
        """Calls of `flush`, and how many of them are done."""
        self._closed = self._ended = False
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._work, name="memsyn-observer", daemon=True)
        self._thread.start()

    @property
    def is_open(self) -> bool:
        """Whether it may be given work: it is not closed, nor in a fork of its process."""
        return not self._closed and self._process == os.getpid()

    @property
    def counts(self) -> list[int]:
        """Samples measured, invalid and capped, at all weights."""
        return [a + b for a, b in zip(self._past, _counts(self.ledger), strict=True)]

    def wake(self) -> None:
        """More waits than before."""
        if self._traffic.is_full(self._max_batch) and not self._wake.is_set():
            self._wake.set()

    def flush(self, timeout: float) -> bool:
        """Wait until what is queued is measured and stored, whatever it costs; returns whether it was."""
        if not self.is_open:
            return False
        with self._answer:
            self._asked += 1
            asked = self._asked
            self._urgent.set()
            self._wake.set()
            self._answer.wait_for(lambda: self._answered >= asked or self._ended, timeout)
            return self._answered >= asked

    def close(self, timeout: float) -> None:
        """Store the sums and end, in so many seconds at most."""
        if self.is_open:
            self._closed = True
            self._urgent.set()
            self._wake.set()
            self._thread.join(timeout)

    def note(self, error: Exception) -> None:
        """Count what failed, and warn of the first."""
        with self._lock:
            self.errors += 1
            first, self.last_error = not self.last_error, f"{type(error).__name__}: {error}"
        if first:
            LOGGER.warning("an observer goes on serving, but something failed: %s", self.last_error)

    def _work(self) -> None:
        """The thread: measure what is queued, store at intervals, rest to keep the budget."""
        with _one_core(), workspace(), _own_stream(self._device) as stream:
            while not self._closed:
                self._urgent.clear()
                self._wake.clear()
                asked = self._asked
                rest = self._budget.ready - time.monotonic()
                if rest > 0 and asked == self._answered and not self._closed:
                    self._urgent.wait(min(rest, LONGEST))
                    continue
                try:
                    self._step(asked, stream)
                except Exception as error:
                    self.note(error)
                    self._urgent.wait(BUSY)
            self._spend(self._store)  # before a last batch, for which there may be no time
            if waiting := self._traffic.take(self._max_batch):
                self._spend(partial(self._measure, waiting, stream))
            self._spend(self._store)
        with self._answer:
            self._ended = True
            self._answer.notify_all()

    def _step(self, asked: int, stream: torch.cuda.Stream | None) -> None:
        flushing = asked > self._answered
        if not flushing and self._is_busy():
            self._urgent.wait(BUSY)
            return
        patience = PATIENCE - self._traffic.lag
        ready = flushing or patience <= 0 or self._traffic.is_full(self._max_batch)
        waiting = self._traffic.take(self._max_batch) if ready else []
        if waiting:
            self._spend(partial(self._measure, waiting, stream))
        if time.monotonic() >= self._due or (flushing and not waiting):
            self._spend(self._store)
        if flushing and not waiting:
            with self._answer:
                self._answered = asked
                self._answer.notify_all()
        elif not waiting and not self._closed:
            self._wake.wait(min(max(0.0, self._due - time.monotonic()), max(0.0, patience), LONGEST))

    def _is_busy(self) -> bool:
        try:
            return self._busy is not None and self._busy()
        except Exception as error:
            self.note(error)
            return True

    def _spend(self, action: Callable[[], None]) -> None:
        """Do it, and count what it cost; what fails is noted."""
        began = time.monotonic()
        try:
            action()
        except Exception as error:
            self.note(error)
        self._budget.spend(began)

    def _measure(self, waiting: Sequence[Taken], stream: torch.cuda.Stream | None) -> None:
        count, before = sum(taken.num_samples for taken in waiting), self.ledger
        counted = 0 if before is None else before.measured + before.invalid
        stale, looked = 0, False
        try:
            if not self._onlookers:
                refuse_foreign_hooks(self._model)  # no failure of these weights: a hook may go again
            looked = True
            if stream is not None:
                for taken in waiting:
                    _arrive(taken, stream)
            stale = self._add(waiting, count)
        except ModelError:
            self._failures += looked
            raise
        finally:
            now = self.ledger
            own = 0 if now is None else now.measured + now.invalid - (counted if now is before else 0)
            self.stale += stale
            self._traffic.done(count, dropped=count - stale - own)

    def _add(self, waiting: Sequence[Taken], count: int) -> int:
        """Add what was taken to the sums of its weights; returns how many samples are of weights that are gone."""
        first, present = waiting[0], self._watch.refresh()
        if self.ledger is None or first.tag != self._tag:
            if first.tag != present:
                return count
            self._turn(present)
        ledger = self.ledger
        assert ledger is not None
        if self._failures >= FAILURES:  # it was said what is wrong
            return 0
        is_new = not ledger.is_begun
        try:
            when = min(first.when, time.time())  # the clock may have been set back
            inputs = joined([taken.inputs for taken in waiting])
            with _OwnDraws() if is_new or self._draws else nullcontext() as own:
                ledger.add(inputs, count, first.segment, when)
            self._draws = own is not None and own.num_draws > 0
        finally:
            if is_new and not (self._watch.refresh() == present and ledger.is_sound):  # changed while they were copied
                self.ledger = None
        if self.ledger is None:
            return count
        self._failures = 0
        if ledger.problem is not None:
            self.note(ledger.problem)
            ledger.problem = None
        return 0

    def _turn(self, tag: Hashable) -> None:
        """Go on with the weights that the model has now, if they are others."""
        mark, ledger = fingerprint(weights(self._model)), self.ledger
        if ledger is not None and ledger.fingerprint == mark:
            self._tag, self._failures = tag, 0
            return
        try:
            self._store()
        except Exception as error:  # what was new is lost
            self.note(error)
        begun = self._begin(mark)
        self._past, self.ledger = [a + b for a, b in zip(self._past, _counts(ledger), strict=True)], begun
        self._tag, self._failures = tag, 0
        self.versions += 1

    def _store(self) -> None:
        """Write what is new; and look whether the weights were changed in a way that nobody sees."""
        self._due = time.monotonic() + self._interval
        ledger = self.ledger
        if ledger is None or not ledger.has_news:
            return
        if self._watch.refresh() == self._tag and fingerprint(weights(self._model)) != ledger.fingerprint:
            self._watch.renew()
        ledger.save(time.time())
        self.stored = time.time()


def _counts(ledger: Ledger | None) -> list[int]:
    return [0, 0, 0] if ledger is None else [ledger.measured, ledger.invalid, ledger.capped]


def _arrive(taken: Taken, stream: torch.cuda.Stream) -> None:
    """Let the stream wait for what was copied on another one, and keep that until it is done."""
    if taken.arrived is not None:
        stream.wait_event(taken.arrived)
        for tensor in tensors(taken.inputs):
            if tensor.is_cuda:
                tensor.record_stream(stream)


@contextmanager
def _one_core() -> Iterator[None]:
    """Let torch use one core in this thread, and leave it to others what they use."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of this thread, and of all that begin later
    other = threading.Thread(target=torch.set_num_threads, args=(num_threads,))
    other.start()
    other.join()
    yield


@contextmanager
def _own_stream(device: torch.device) -> Iterator[torch.cuda.Stream | None]:
    """On an NVIDIA device, a stream of the lowest priority."""
    if device.type != "cuda":
        yield None
        return
    stream = torch.cuda.Stream(device, priority=0)
    with torch.cuda.stream(stream):
        yield stream
