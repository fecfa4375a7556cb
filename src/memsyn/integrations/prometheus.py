"""Prometheus: what an observer has done, as metrics. Needs the extra `observe`."""

import math
from collections.abc import Iterable
from dataclasses import asdict
from typing import Final, final

from prometheus_client import REGISTRY, CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from memsyn import Observer

GAUGES: Final = {
    "waiting": "Samples that are in the queue or being measured",
    "lag": "Seconds that the oldest sample in the queue has been waiting",
    "stored": "When the sums were last written, in seconds since 1970",
}
COUNTERS: Final = {
    "seen": "Samples of the requests that were shown",
    "sampled": "Samples that were chosen",
    "measured": "Samples whose importance is in the sums",
    "dropped": "Samples not measured, for want of room or because something failed",
    "stale": "Samples not measured because the weights that answered them were gone",
    "invalid": "Samples left out: NaN or infinite, or the model failed on them",
    "capped": "Samples scaled down to the cap",
    "errors": "How often something failed",
    "seconds": "Time spent measuring and storing",
    "versions": "Sets of weights that were measured",
}


@final
class ObserverCollector:
    """An observer's `stats()` as `memsyn_observer_*`, read when they are asked for.

    Example:
        >>> export(observer)                                                  # doctest: +SKIP
    """

    def __init__(self, observer: Observer) -> None:
        self._observer = observer

    def collect(self) -> Iterable[Metric]:
        """The metrics at this moment."""
        stats = asdict(self._observer.stats())
        for name, what in COUNTERS.items():
            yield CounterMetricFamily(f"memsyn_observer_{name}", what, value=stats[name])
        for name, what in GAUGES.items():
            value = stats[name]
            yield GaugeMetricFamily(f"memsyn_observer_{name}", what, value=math.nan if value is None else value)


def export(observer: Observer, registry: CollectorRegistry = REGISTRY) -> None:
    """Add an observer's metrics to a registry; one observer for each."""
    registry.register(ObserverCollector(observer))
