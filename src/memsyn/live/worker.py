"""The background thread of an observer: it measures queued samples, stores the sums, and rests.

Owns when work is done, and how much time it may take. An error is counted, and never ends the thread: not even
SystemExit or KeyboardInterrupt, which a model's code may raise. Whatever ends it, nobody waits for it after that.
"""

import ctypes
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError  # not Python's own before 3.11
from contextlib import ExitStack, contextmanager
from typing import Final, final

import torch

from memsyn.error_log import ErrorLog
from memsyn.live.request_queue import QueuedSamples, RequestQueue
from memsyn.live.weights_versions import VersionedSums

BATCH_WAIT: Final = 30.0
"""Seconds that samples wait for a full batch, in which each costs a fraction of what it costs alone."""

BUSY_WAIT: Final = 0.02
"""Seconds until a busy service is asked again whether it is busy."""

LONGEST_WAIT: Final = 3600.0
"""The longest wait in seconds: Python refuses waits of many years."""

INTERRUPTS: Final = 10
"""How often a thread is interrupted that does not end."""

INTERRUPT_WAIT: Final = 0.5
"""Seconds between two of them."""


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
class Signals:
    """What other threads ask of the worker's thread: to take a full batch, to flush, or to end.

    Attributes:
        queue_full: set when a full batch waits.
        urgent: set when a flush or the end is asked for: it ends any rest.
        closed: whether the end was asked for.
        ended: whether the thread takes no more work.
        exiting: whether the process ends, so that no further batch is measured.
    """

    def __init__(self) -> None:
        self.queue_full, self.urgent = threading.Event(), threading.Event()
        self.closed = self.ended = self.exiting = False
        self._lock = threading.Lock()
        self._flushes: list[Future[bool]] = []
        """Those that are not answered yet."""

    def flush(self, timeout: float) -> bool:
        """Ask for a flush, and wait for it; returns its answer, or False if that did not come in time."""
        answer: Future[bool] = Future()
        with self._lock:
            if self.ended:
                return False
            self._flushes.append(answer)
        self._interrupt()
        try:
            return answer.result(timeout)
        except FutureTimeoutError:
            return False

    def close(self) -> None:
        """Ask for the end."""
        self.closed = True
        self._interrupt()

    def _interrupt(self) -> None:
        self.urgent.set()
        self.queue_full.set()

    def clear(self) -> list[Future[bool]]:
        """Begin another round of work; returns the flushes that were asked for before it."""
        self.urgent.clear()
        self.queue_full.clear()
        with self._lock:
            return list(self._flushes)

    def answer(self, asked: Sequence[Future[bool]], is_complete: bool) -> None:
        """Answer flushes."""
        with self._lock:
            self._flushes = [flush for flush in self._flushes if flush not in asked]
        for flush in asked:
            flush.set_result(is_complete)

    def end(self) -> None:
        """Release all threads that wait: no flush will be answered any more."""
        with self._lock:
            self.ended = True
        self.answer(self._flushes, False)


@final
class Worker:
    """Measures queued samples in a thread of its own, which starts at once.

    Args:
        queue: the samples.
        sums: where they are added.
        budget: how much time that may take.
        log: of what fails.
        device: of the model.
        max_batch, interval, busy: as `Observer` takes them.
        release: called when the thread has ended.
    """

    def __init__(
        self,
        queue: RequestQueue,
        sums: VersionedSums,
        budget: TimeBudget,
        log: ErrorLog,
        *,
        device: torch.device,
        max_batch: int,
        interval: float,
        busy: Callable[[], bool] | None,
        release: Callable[[], None],
    ) -> None:
        self._queue, self._sums, self._budget, self._log = queue, sums, budget, log
        self._max_batch, self._interval, self._busy = max_batch, interval, busy
        self._due = time.monotonic() + interval
        """When to store the sums again."""
        self._signals = Signals()
        self._process_id = os.getpid()
        self._thread = threading.Thread(target=self._work, args=(device, release), name="memsyn-observer", daemon=True)
        self._thread.start()

    @property
    def is_fork(self) -> bool:
        """Whether this process is a fork of the one that started the thread: locks may be held for ever here."""
        return self._process_id != os.getpid()

    @property
    def is_open(self) -> bool:
        """Whether the thread takes work."""
        return not (self._signals.closed or self._signals.ended or self.is_fork)

    def wake_if_full(self) -> None:
        """Wake the thread if there is now a full batch."""
        if self._queue.is_full(self._max_batch) and not self._signals.queue_full.is_set():
            self._signals.queue_full.set()

    def flush(self, timeout: float) -> bool:
        """Wait until no samples are queued and the sums are stored, regardless of the budget.

        Returns:
            Whether that was done in time, and nothing that had waited since the last flush was lost.
        """
        return self.is_open and self._signals.flush(timeout)

    def close(self, timeout: float) -> None:
        """Measure one more batch, store the sums and end the thread; waits at most `timeout` seconds for that."""
        if self.is_open:
            self._signals.close()
        if not self.is_fork:
            self._thread.join(timeout)

    @property
    def is_running(self) -> bool:
        """Whether the thread of this process has not ended."""
        return self._thread.is_alive() and not self.is_fork

    def interrupt(self) -> None:
        """End the thread, whatever it does; the batch that it measures is lost. For the end of the process.

        If the interpreter ended a thread that runs operations of torch, C++ would abort the whole process.
        """
        self._signals.exiting = True
        for _ in range(INTERRUPTS):
            if not self.is_running:
                return
            # The thread raises it before its next line of Python. One that comes in a destructor is ignored.
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(self._thread.ident or 0), ctypes.py_object(SystemExit)
            )
            self._thread.join(INTERRUPT_WAIT)

    def _work(self, device: torch.device, release: Callable[[], None]) -> None:
        with ExitStack() as at_end:
            # The last one is called first. Each is called, whatever happens in the others.
            for action in (self._log.end, release, self._signals.end, self._queue.close):
                at_end.callback(action)
            try:
                with _one_core(), _own_stream(device) as stream:
                    self._work_until_closed(stream)
            except BaseException as error:
                self._log.note(error)

    def _work_until_closed(self, stream: torch.cuda.Stream | None) -> None:
        while not self._signals.closed:
            try:
                self._round(stream)
            except BaseException as error:
                self._log.note(error)
                self._signals.urgent.wait(BUSY_WAIT)
        self._spend(self._store)  # before the last batch, for which there may be no time
        if not self._signals.exiting:
            self._spend(lambda: self._measure(self._queue.take(self._max_batch), stream))
        if not self._spend(self._store):
            self._log.event("lost", "the observer was closed, and new sums were not stored: lost.")

    def _round(self, stream: torch.cuda.Stream | None) -> None:
        """Rest; or measure one batch, or store, or wait for either. A flush repeats this until the queue is empty."""
        # Cleared before any work: a signal that comes during the work is then seen in the next round.
        asked = self._signals.clear()
        rest = self._budget.ready - time.monotonic()
        if rest > 0 and not asked and not self._signals.closed:
            self._signals.urgent.wait(min(rest, LONGEST_WAIT))
            return
        if not asked and self._is_busy():
            self._signals.urgent.wait(BUSY_WAIT)
            return
        patience = BATCH_WAIT - self._queue.lag
        ready = asked or patience <= 0 or self._queue.is_full(self._max_batch)
        queued = self._queue.take(self._max_batch) if ready else []
        if queued:
            self._spend(lambda: self._measure(queued, stream))
        is_stored = True
        if time.monotonic() >= self._due or (asked and not queued):
            is_stored = self._spend(self._store)
        if asked and not queued:
            num_lost, self._log.num_lost = self._log.num_lost, 0
            self._signals.answer(asked, is_stored and not num_lost)
        elif not queued and not self._signals.closed:
            until_due = max(0.0, self._due - time.monotonic())
            self._signals.queue_full.wait(min(until_due, max(0.0, patience), LONGEST_WAIT))

    def _is_busy(self) -> bool:
        try:
            return self._busy is not None and self._busy()
        except BaseException as error:
            self._log.note(error)
            return True

    def _spend(self, action: Callable[[], bool]) -> bool:
        """Run an action at the budget's expense; an error is noted, and its result is False."""
        began = time.monotonic()
        try:
            return action()
        except BaseException as error:
            if not self._signals.exiting:  # then it is the interrupt
                self._log.note(error)
            return False
        finally:
            self._budget.spend(began)

    def _measure(self, queued: Sequence[QueuedSamples], stream: torch.cuda.Stream | None) -> bool:
        """Measure a batch; samples that were neither measured, nor stale, nor invalid count as dropped."""
        size, before = sum(samples.num_samples for samples in queued), self._sums.counts.settled
        try:
            if queued:
                self._sums.add(queued, stream)
        finally:
            dropped = size - (self._sums.counts.settled - before)
            self._log.num_lost += dropped
            self._queue.done(size, dropped=dropped)
        return dropped == 0

    def _store(self) -> bool:
        self._due = time.monotonic() + self._interval
        self._log.grown(
            "dropped", self._queue.num_dropped, "{} not measured: there was no room in the queue, or an error."
        )
        return self._sums.store()


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
