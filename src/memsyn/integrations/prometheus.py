"""An observer's counters as Prometheus metrics. Needs the extra `observe`.

Owns their names and units; `docs/live.md` has the table of them. Must not make a scrape wait.
"""

import logging
import math
import os
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final, final

from prometheus_client import REGISTRY, CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from torch import Tensor

from memsyn import Importance, Memory, MemoryFileError, Observer

PREFIX: Final = "memsyn_observer_"

REFRESH: Final = 60.0
"""Seconds between two computations of ranks; more if they take long: they may have 1% of the time."""

COUNTERS: Final = {
    "seen": ("seen", "Samples of all requests"),
    "sampled": ("sampled", "Samples chosen to be measured"),
    "measured": ("measured", "Samples measured"),
    "capped": ("capped", "Samples scaled down to the cap"),
    "errors": ("errors", "Errors while measuring or storing"),
    "busy_seconds": ("seconds", "Seconds spent measuring and storing"),
    "versions": ("versions", "Versions of the weights that were measured"),
}
"""Metric -> the field of `Stats`, and the help."""


@final
class RankCorrelations:
    """How settled the observed importance is, and how like that of a memory: computed in a thread, at intervals.

    Attributes:
        converged: `Observer.converged()`; NaN until it is first computed.
        with_memory: `Observer.correlation` with the memory's importance; NaN without one.
    """

    def __init__(self, observer: Observer, memory: Mapping[str, Tensor] | Path | None) -> None:
        self.converged = self.with_memory = math.nan
        self._observer = observer
        self._path = memory if isinstance(memory, Path) else None
        self._importance = None if isinstance(memory, Path) else memory
        self._read: tuple[int, ...] | None = None
        """Which file was read last: inode, size and time of change."""
        self._due = 0.0
        self._lock = threading.Lock()
        """Held while the thread runs."""

    def refresh(self) -> None:
        """Start the thread if it is time; returns at once."""
        if time.monotonic() >= self._due and self._lock.acquire(blocking=False):
            threading.Thread(target=self._compute, name="memsyn-ranks").start()

    def _compute(self) -> None:
        began = time.monotonic()
        try:
            self.converged = self._observer.converged()
            self._read_memory()
            if self._importance is not None:
                self.with_memory = self._observer.correlation(self._importance)
        except Exception as error:
            logging.getLogger("memsyn").warning("the drift against the memory cannot be computed: %s", error)
        finally:
            now = time.monotonic()
            self._due = now + max(REFRESH, 100 * (now - began))
            self._lock.release()

    def _read_memory(self) -> None:
        """Read the memory's file if it is another than the last time; a file may come later."""
        if self._path is None or not self._path.exists():
            return
        facts = os.stat(self._path)
        found = facts.st_ino, facts.st_size, facts.st_mtime_ns
        if found != self._read:
            self._read, self._importance, self.with_memory = found, None, math.nan
            self._importance = _importance_in(self._path)


@final
class ObserverCollector:
    """An observer's `stats()` as metrics `memsyn_observer_*`, read at each scrape.

    Example:
        >>> export(observer, memory="memory.safetensors")                     # doctest: +SKIP
    """

    def __init__(self, observer: Observer, memory: Mapping[str, Tensor] | Path | None) -> None:
        self._observer, self._has_memory = observer, memory is not None
        self._ranks, self._began = RankCorrelations(observer, memory), time.time()

    def collect(self) -> Iterable[Metric]:
        """The metrics at this moment."""
        self._ranks.refresh()
        stats = self._observer.stats()
        for name, (field, what) in COUNTERS.items():
            yield CounterMetricFamily(PREFIX + name, what, value=getattr(stats, field))
        dropped = CounterMetricFamily(PREFIX + "dropped", "Chosen samples that were not measured", labels=["reason"])
        failed = stats.dropped - stats.queue_full - stats.closed
        for reason in ("queue_full", "closed", "stale", "invalid"):
            dropped.add_metric([reason], getattr(stats, reason))
        dropped.add_metric(["error"], failed)
        yield dropped
        gauges = {
            "waiting": (stats.waiting, "Samples in the queue or being measured"),
            "withheld": (stats.withheld, "Samples measured that are in no file, since there are too few"),
            "lag_seconds": (stats.lag, "How long the oldest sample in the queue has waited"),
            "store_age_seconds": (
                max(0.0, time.time() - (stats.stored or self._began)),
                "Since the sums were last written, or since the observer began",
            ),
            "converged": (
                self._ranks.converged,
                "Rank correlation between two halves of the batches",
            ),
        }
        if self._has_memory:
            what = "Rank correlation of the importance with that of the memory; 1: no drift"
            gauges["memory_correlation"] = (self._ranks.with_memory, what)
        for name, (value, what) in gauges.items():
            yield GaugeMetricFamily(PREFIX + name, what, value=value)


def export(
    observer: Observer,
    registry: CollectorRegistry = REGISTRY,
    *,
    memory: str | os.PathLike[str] | Memory | Importance | None = None,
) -> None:
    """Add an observer's metrics to a registry. A registry holds one observer.

    Ranks are computed in a thread after a scrape, at most once a minute and in 1% of the time: a scrape never waits,
    and the first ones read NaN.

    Args:
        observer: whose metrics.
        registry: to which they are added.
        memory: what the present importance is compared with, as `memsyn_observer_memory_correlation`. A file of a
            memory or of an importance is read again when it changes; until it exists, the metric is NaN.

    Raises:
        OptionError: a memory is given, and the observer measures factors.
    """
    if memory is not None:
        observer.correlation({})  # raises if it measures factors
    if isinstance(memory, (Memory, Importance)):
        registry.register(ObserverCollector(observer, _per_weight(memory)))
    else:
        registry.register(ObserverCollector(observer, None if memory is None else Path(memory)))


def _per_weight(memory: Memory | Importance) -> Mapping[str, Tensor]:
    return memory.sums if isinstance(memory, Importance) else memory.importance


def _importance_in(path: Path) -> Mapping[str, Tensor]:
    """What a memory's file or an importance's file holds for each weight.

    Raises:
        MemoryFileError: it is neither.
    """
    try:
        return _per_weight(Memory.load(path))
    except MemoryFileError:
        return _per_weight(Importance.load(path))
