"""The background thread of an observer: it measures queued samples, stores the sums, and rests.

Owns when work is done, and how much time it may take. An error is counted, and never ends the thread.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Final, final

import torch

from memsyn.live.request_queue import QueuedSamples, RequestQueue
from memsyn.live.weights_versions import VersionedSums

BATCH_WAIT: Final = 30.0
"""Seconds that samples wait for a full batch, in which each costs a fraction of what it costs alone."""

BUSY_WAIT: Final = 0.02
"""Seconds until a busy service is asked again whether it is busy."""

LONGEST_WAIT: Final = 3600.0
"""The longest wait in seconds: Python refuses waits of many years."""


@final
class TimeBudget:
    """A share of one core's time, kept by resting after each piece of work.

    Work that took `t` seconds is followed by a rest until `t / share` seconds after it began: with a share of 0.1, work
    from 0 to 2 s is followed by a rest until 20 s. Time counts, not processor time: on a machine whose cores are busy,
    the same work takes longer, and so does the rest.

    Attributes:
        seconds: spent on work so far, waits for a core included.
        ready: when to work again, by `time.monotonic`.
    """

    def __init__(self, share: float) -> None:
        self.seconds = self.ready = 0.0
        self._share = share

    def spend(self, began: float) -> None:
        """Count work that lasted from `began` until now."""
        seconds = time.monotonic() - began
        self.seconds += seconds
        self.ready = began + seconds / self._share


@final
class ErrorCount:
    """The errors of an observer: their number and the last; the first one is logged as a warning."""

    def __init__(self) -> None:
        self.num_errors = 0
        self.last: str | None = None
        self._lock = threading.Lock()

    def note(self, error: Exception) -> None:
        """Count an error; called from any thread."""
        with self._lock:
            self.num_errors += 1
            is_first, self.last = self.last is None, f"{type(error).__name__}: {error}"
        if is_first:
            logging.getLogger("memsyn").warning("an observer goes on serving, but something failed: %s", self.last)


@final
class Signals:
    """What other threads ask of the worker's thread: to take a full batch, to flush, or to end.

    Attributes:
        queue_full: set when a full batch waits.
        urgent: set when a flush or the end is asked for: it ends any rest.
        closed: whether the end was asked for.
    """

    def __init__(self) -> None:
        self.queue_full, self.urgent = threading.Event(), threading.Event()
        self.closed = self._ended = False
        self._answer = threading.Condition()
        self._num_asked = self._num_answered = 0
        """Calls of `flush`, and those of them that are answered."""

    def flush(self, timeout: float) -> bool:
        """Ask for a flush, and wait for it; returns whether it came in time."""
        with self._answer:
            self._num_asked += 1
            asked = self._num_asked
            self._interrupt()
            self._answer.wait_for(lambda: self._num_answered >= asked or self._ended, timeout)
            return self._num_answered >= asked

    def close(self) -> None:
        """Ask for the end."""
        self.closed = True
        self._interrupt()

    def _interrupt(self) -> None:
        self.urgent.set()
        self.queue_full.set()

    def clear(self) -> int:
        """Begin another round of work; returns the number of flushes that were asked for before it."""
        self.urgent.clear()
        self.queue_full.clear()
        return self._num_asked

    def is_flush_due(self, asked: int) -> bool:
        """Whether one of the first `asked` flushes is not answered yet."""
        return asked > self._num_answered

    def answer(self, asked: int) -> None:
        """Answer the first `asked` flushes."""
        with self._answer:
            self._num_answered = asked
            self._answer.notify_all()

    def end(self) -> None:
        """Release all threads that wait: no flush will be answered any more."""
        with self._answer:
            self._ended = True
            self._answer.notify_all()


@final
class Worker:
    """Measures queued samples in a thread of its own, which starts at once.

    Args:
        queue: the samples.
        sums: where they are added.
        budget: how much time that may take.
        errors: counts what fails.
        device: of the model.
        max_batch, interval, busy: as `Observer` takes them.
    """

    def __init__(
        self,
        queue: RequestQueue,
        sums: VersionedSums,
        budget: TimeBudget,
        errors: ErrorCount,
        *,
        device: torch.device,
        max_batch: int,
        interval: float,
        busy: Callable[[], bool] | None,
    ) -> None:
        self._queue, self._sums, self._budget, self._errors = queue, sums, budget, errors
        self._max_batch, self._interval, self._busy = max_batch, interval, busy
        self._due = time.monotonic() + interval
        """When to store the sums again."""
        self._signals = Signals()
        self._process_id = os.getpid()
        self._thread = threading.Thread(target=self._work, args=(device,), name="memsyn-observer", daemon=True)
        self._thread.start()

    @property
    def is_open(self) -> bool:
        """Whether the thread takes work: it is not closed, and this process is no fork of the one that started it."""
        return not self._signals.closed and self._process_id == os.getpid()

    def wake_if_full(self) -> None:
        """Wake the thread if there is now a full batch."""
        if self._queue.is_full(self._max_batch) and not self._signals.queue_full.is_set():
            self._signals.queue_full.set()

    def flush(self, timeout: float) -> bool:
        """Wait until all queued samples are measured and stored, regardless of the budget; returns whether so."""
        return self.is_open and self._signals.flush(timeout)

    def close(self, timeout: float) -> None:
        """Measure one more batch, store the sums and end the thread; waits at most `timeout` seconds for that."""
        if self.is_open:
            self._signals.close()
            self._thread.join(timeout)

    def _work(self, device: torch.device) -> None:
        with _one_core(), _own_stream(device) as stream:
            while not self._signals.closed:
                # Cleared before any work: a signal that comes during the work is then seen in the next round.
                asked = self._signals.clear()
                rest = self._budget.ready - time.monotonic()
                if rest > 0 and not self._signals.is_flush_due(asked) and not self._signals.closed:
                    self._signals.urgent.wait(min(rest, LONGEST_WAIT))
                    continue
                try:
                    self._step(asked, stream)
                except Exception as error:
                    self._errors.note(error)
                    self._signals.urgent.wait(BUSY_WAIT)
            self._spend(self._store)  # before the last batch, for which there may be no time
            if queued := self._queue.take(self._max_batch):
                self._spend(partial(self._measure, queued, stream))
            self._spend(self._store)
        self._queue.close()
        self._signals.end()

    def _step(self, asked: int, stream: torch.cuda.Stream | None) -> None:
        """Measure one batch, or store, or wait for either; a flush repeats this until the queue is empty."""
        flushing = self._signals.is_flush_due(asked)
        if not flushing and self._is_busy():
            self._signals.urgent.wait(BUSY_WAIT)
            return
        patience = BATCH_WAIT - self._queue.lag
        ready = flushing or patience <= 0 or self._queue.is_full(self._max_batch)
        queued = self._queue.take(self._max_batch) if ready else []
        if queued:
            self._spend(partial(self._measure, queued, stream))
        if time.monotonic() >= self._due or (flushing and not queued):
            self._spend(self._store)
        if flushing and not queued:
            self._signals.answer(asked)
        elif not queued and not self._signals.closed:
            until_due = max(0.0, self._due - time.monotonic())
            self._signals.queue_full.wait(min(until_due, max(0.0, patience), LONGEST_WAIT))

    def _is_busy(self) -> bool:
        try:
            return self._busy is not None and self._busy()
        except Exception as error:
            self._errors.note(error)
            return True

    def _spend(self, action: Callable[[], None]) -> None:
        """Run an action at the budget's expense; its error is noted."""
        began = time.monotonic()
        try:
            action()
        except Exception as error:
            self._errors.note(error)
        self._budget.spend(began)

    def _measure(self, queued: Sequence[QueuedSamples], stream: torch.cuda.Stream | None) -> None:
        """Measure a batch; samples that were neither measured, nor stale, nor invalid count as dropped."""
        size, before = sum(samples.num_samples for samples in queued), self._sums.counts.settled
        try:
            self._sums.add(queued, stream)
        finally:
            self._queue.done(size, dropped=size - (self._sums.counts.settled - before))

    def _store(self) -> None:
        self._due = time.monotonic() + self._interval
        self._sums.store()


@contextmanager
def _one_core() -> Iterator[None]:
    """Let torch use one core in this thread, and as many as before in others."""
    num_threads = torch.get_num_threads()
    # This sets two numbers: OpenMP's for this thread, and torch's for all threads that begin later. Another thread sets
    # the second one back.
    torch.set_num_threads(1)
    other = threading.Thread(target=torch.set_num_threads, args=(num_threads,))
    other.start()
    other.join()
    yield


@contextmanager
def _own_stream(device: torch.device) -> Iterator[torch.cuda.Stream | None]:
    """On an NVIDIA device, run in a stream of the lowest priority."""
    if device.type != "cuda":
        yield None
        return
    # In CUDA, lower numbers are more urgent, and 0 is the least urgent.
    stream = torch.cuda.Stream(device, priority=0)
    with torch.cuda.stream(stream):
        yield stream
