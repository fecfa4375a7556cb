"""The requests that wait to be measured: which samples are chosen, and in which order they are measured.

Owns sampling by rate, the bounded queue, and the counts of both. Must not know what happens to the samples. No call
here blocks, except on a lock that is held for a few instructions.
"""

import math
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, final

from memsyn.batches import kind


@final
@dataclass(frozen=True, eq=False)
class QueuedSamples:
    """The chosen samples of one request."""

    inputs: Any
    num_samples: int
    segment: str | None
    version: Hashable
    """Version of the weights that answered the request."""
    served_at: float
    """Seconds since 1970."""
    copied: Any = None
    """A CUDA event, after which the copy of the inputs is complete; None for inputs on other devices."""


@final
class RateSampler:
    """Chooses each sample of a stream with probability `rate`, independently of all others.

    The number of samples between two chosen samples is geometric, P(gap = k) = rate (1 - rate)^k. So a random number is
    drawn for each chosen sample, not for each sample.

    For example, the gaps 2, 0 and 5 choose the samples 2, 3 and 9 of the stream:

        stream:   0 1 2 | 3 4 5 6 | 7 8 9 10     three requests, of 3, 4 and 4 samples
        chosen:       2   3             9
        rows:        [2] [0]           [2]       what `choose` returns for each request
    """

    def __init__(self, rate: float, seed: int | None) -> None:
        self._rate = rate
        # Not a torch.Generator, since the caller's default device or mode would reach it.
        self._random = random.Random(seed)
        self._next = self._gap()
        """Samples to pass over until the next chosen one."""

    def choose(self, num_samples: int) -> list[int]:
        """Which of the next `num_samples` samples are chosen, by their row."""
        rows = []
        while self._next < num_samples:
            rows.append(self._next)
            self._next += 1 + self._gap()
        self._next -= num_samples
        return rows

    def _gap(self) -> int:
        """A geometric random number: floor(log(1 - u) / log(1 - rate)) for u uniform in [0, 1)."""
        # 1 - u is never 0, so its logarithm exists. For a rate of 1, log1p(-1) would raise an error.
        return 0 if self._rate == 1 else int(math.log(1 - self._random.random()) / math.log1p(-self._rate))


@final
class RequestQueue:
    """Holds up to `room` chosen samples until they are measured; those that find no room are dropped and counted.

    Samples that are in the queue, on their way into it, or being measured take up room.

    Attributes:
        num_seen: samples of all requests.
        num_sampled: samples that were chosen.
        num_dropped: chosen samples that were not measured.
        num_refused: those of them for which there was no room.
        num_closed: those of them that waited when the queue was closed, or came later.
        num_waiting: samples that take up room.
    """

    def __init__(self, sampler: RateSampler, room: int) -> None:
        self.num_seen = self.num_sampled = self.num_dropped = self.num_waiting = 0
        self.num_refused = self.num_closed = 0
        self._sampler, self._room, self._is_closed = sampler, room, False
        self._lock = threading.Lock()
        self._queue: deque[tuple[Hashable, QueuedSamples, float]] = deque()
        """Each entry with its batch key and the time since when it waits, by `time.monotonic`. Entries of the same key
        can be measured in one batch."""
        self._sizes: Counter[Hashable] = Counter()
        """Batch key -> number of queued samples."""

    def choose(self, num_samples: int) -> list[int]:
        """The rows of a request that are chosen and have room: give these to `put`, or give the room back by `done`."""
        with self._lock:
            self.num_seen += num_samples
            rows = self._sampler.choose(num_samples)
            admitted = rows[: max(0, self._room - self.num_waiting)]
            self.num_sampled += len(rows)
            self.num_refused += len(rows) - len(admitted)
            self.num_dropped += len(rows) - len(admitted)
            self.num_waiting += len(admitted)
            return admitted

    def put(self, samples: QueuedSamples) -> None:
        """Queue samples that `choose` admitted; those that come after `close` are dropped."""
        key = kind(samples.inputs), samples.segment, samples.version
        with self._lock:
            if self._is_closed:
                self._drop_closed(samples.num_samples)
                return
            self._sizes[key] += samples.num_samples
            self._queue.append((key, samples, time.monotonic()))

    def is_full(self, max_batch: int) -> bool:
        """Whether the oldest request can be measured in a batch of `max_batch` samples, or there is no more room."""
        with self._lock:
            is_batch_full = bool(self._queue) and self._sizes[self._queue[0][0]] >= max_batch
            return is_batch_full or self.num_waiting >= self._room

    def take(self, max_batch: int) -> list[QueuedSamples]:
        """Remove the oldest request and others of its batch key, up to `max_batch` samples; the rest keeps its order.

        A request with more samples than `max_batch` is returned alone.
        """
        with self._lock:
            queue = self._queue
            if not queue:
                return []
            key, oldest, _ = queue.popleft()
            batch, others, size = [oldest], [], oldest.num_samples
            # Only up to a full batch: many requests may wait, and the threads that serve wait for the lock.
            while queue and size < max_batch:
                entry = queue.popleft()
                if entry[0] == key and size + entry[1].num_samples <= max_batch:
                    batch.append(entry[1])
                    size += entry[1].num_samples
                else:
                    others.append(entry)
            queue.extendleft(reversed(others))
            self._sizes[key] -= size
            self._sizes += Counter()  # removes keys of which no sample is left
            return batch

    def done(self, num_samples: int, *, dropped: int = 0) -> None:
        """Give back the room of `num_samples` samples, of which `dropped` were not measured."""
        with self._lock:
            self.num_waiting -= num_samples
            self.num_dropped += dropped

    def close(self) -> None:
        """Drop all samples in the queue, and those that come later: nobody will take them."""
        with self._lock:
            self._is_closed = True
            # They are freed without the lock, for which the threads that serve would wait.
            left, self._queue = self._queue, deque()
            self._drop_closed(sum(self._sizes.values()))
            self._sizes.clear()
        left.clear()

    def _drop_closed(self, num_samples: int) -> None:
        self.num_waiting -= num_samples
        self.num_dropped += num_samples
        self.num_closed += num_samples

    @property
    def lag(self) -> float:
        """Seconds since the oldest request in the queue was put there; 0 if the queue is empty."""
        # Without the lock, another thread may empty the queue after a test for emptiness, so there is no test.
        try:
            return time.monotonic() - self._queue[0][2]
        except IndexError:
            return 0.0
