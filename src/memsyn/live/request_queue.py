"""What a served model is asked: which samples are taken, where they wait, and how much time they may cost.

Owns sampling, the bounded queue, the cheap check whether weights have changed, and the share of a core. Must not know
what is done with samples. Nothing here waits for anything but a lock that is held for some instructions.
"""

import math
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor, nn

from memsyn.batches import kind
from memsyn.parameters import weights


@final
@dataclass(frozen=True, eq=False)
class Taken:
    """Some samples of one request."""

    inputs: Any
    num_samples: int
    segment: str | None
    tag: Hashable
    """Of the weights by which it was answered."""
    when: float
    """In seconds since 1970."""
    arrived: Any = None
    """A CUDA event after which the inputs are there, if they are on such a device."""


@final
class Traffic:
    """Takes each sample with probability `rate`, and keeps up to `room` of those taken until they are measured."""

    def __init__(self, rate: float, room: int, seed: int | None) -> None:
        self.rate, self.room = rate, room
        self.seen = self.taken = self.dropped = 0
        self._random = random.Random(seed)  # not a torch.Generator: the caller's default device or mode would reach it
        self._lock = threading.Lock()
        self._queue: deque[tuple[Hashable, Taken, float]] = deque()
        """With what can be measured together, and since when it waits, by `time.monotonic`."""
        self._sizes: Counter[Hashable] = Counter()
        """How many samples wait that can be measured together."""
        self._held = 0
        """Samples that are in the queue, on their way into it, or being measured."""
        self._next = self._gap()
        """How many samples pass until one is taken."""

    def choose(self, num_samples: int) -> list[int]:
        """Which of the next samples are taken, and have room: bring them by `put`, or say `done`."""
        with self._lock:
            self.seen += num_samples
            rows = []
            while self._next < num_samples:
                rows.append(self._next)
                self._next += 1 + self._gap()
            self._next -= num_samples
            fitting = rows[: max(0, self.room - self._held)]
            self.taken += len(rows)
            self.dropped += len(rows) - len(fitting)
            self._held += len(fitting)
            return fitting

    def put(self, taken: Taken) -> None:
        """Queue what was chosen."""
        key = kind(taken.inputs), taken.segment, taken.tag
        with self._lock:
            self._sizes[key] += taken.num_samples
            self._queue.append((key, taken, time.monotonic()))

    def is_full(self, most: int) -> bool:
        """Whether so many wait that can be measured with the one that waits longest, or there is no room for more."""
        with self._lock:
            return self._held >= self.room or (bool(self._queue) and self._sizes[self._queue[0][0]] >= most)

    def take(self, most: int) -> list[Taken]:
        """The request that waits longest, and others that can be measured with it, up to so many samples."""
        with self._lock:
            queue = self._queue
            if not queue:
                return []
            key, first, _ = queue.popleft()
            found, others, size = [first], [], first.num_samples
            for _ in range(len(queue)):
                entry = queue.popleft()
                if entry[0] == key and size + entry[1].num_samples <= most:
                    found.append(entry[1])
                    size += entry[1].num_samples
                else:
                    others.append(entry)
            queue.extendleft(reversed(others))
            self._sizes[key] -= size
            self._sizes += Counter()  # without those of which none is left
            return found

    def done(self, num_samples: int, *, dropped: int = 0) -> None:
        """There is room for as many again, and so many of them were dropped after all."""
        with self._lock:
            self._held -= num_samples
            self.dropped += dropped

    @property
    def held(self) -> int:
        """Samples that wait or are being measured."""
        return self._held

    @property
    def lag(self) -> float:
        """How long the oldest in the queue has been waiting, in seconds."""
        try:
            return time.monotonic() - self._queue[0][2]
        except IndexError:
            return 0.0

    def _gap(self) -> int:
        """Samples that are passed over before one is taken: geometric, so that each is taken on its own."""
        return 0 if self.rate == 1 else int(math.log(1 - self._random.random()) / math.log1p(-self.rate))


@final
class Watch:
    """Whether a model's weights are still those they were, without reading them.

    Sees what torch counts (optimizers, `load_state_dict`, anything in place), and tensors and modules that others took
    the place of; not moving statistics, nor what is written through `.data`. The fingerprint shows those, and then
    `renew` gives another tag.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._epoch = 0
        self.refresh()

    def refresh(self) -> Hashable:
        """Look which tensors the model has now; returns their tag."""
        self._places = [
            (owner, name, value)
            for module in self._model.modules()
            for owner in (module._modules, module._parameters, module._buffers)
            for name, value in owner.items()
        ]
        self._tensors: list[tuple[Tensor, bool]] = [(t, t.is_inference()) for t in weights(self._model).values()]
        return self.tag()

    def renew(self) -> None:
        """Give another tag from now on."""
        self._epoch += 1

    def tag(self) -> Hashable:
        """What stays the same while they do; cheap: nothing is looked for that was not there at the last `refresh`."""
        if any(owner.get(name) is not value for owner, name, value in self._places):
            return self.refresh()  # a module or a tensor took the place of another
        return self._epoch, tuple((t.data_ptr(), 0 if uncounted else t._version) for t, uncounted in self._tensors)


@final
class Budget:
    """A share of the time, kept by resting after work: of one core at most, and less of it where cores are scarce."""

    def __init__(self, share: float) -> None:
        self.share = share
        self.seconds = 0.0
        """Worked so far, or waited for a core while at work."""
        self.ready = 0.0
        """When to work again, by `time.monotonic`."""

    def spend(self, began: float) -> None:
        """Work was done from `began` to now."""
        seconds = time.monotonic() - began
        self.seconds += seconds
        self.ready = began + seconds / self.share
