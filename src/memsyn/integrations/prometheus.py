"""An observer's counters as Prometheus metrics. Needs the extra `observe`."""

import math
from collections.abc import Iterable
from dataclasses import asdict
from typing import Final, final

from prometheus_client import REGISTRY, CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from memsyn import Observer

GAUGES: Final = {
    "withheld": "Samples measured that are in no file, since there are too few",
    "waiting": "Samples in the queue or being measured",
    "lag": "Seconds that the oldest sample in the queue has waited",
    "stored": "Time of the last write of the sums, in seconds since 1970",
}
COUNTERS: Final = {
    "seen": "Samples of all requests",
    "sampled": "Samples chosen to be measured",
    "measured": "Samples measured",
    "dropped": "Samples not measured because the queue was full or measuring failed",
    "stale": "Samples not measured because the model was reloaded before",
    "invalid": "Samples left out because they gave NaN or infinite values, or an error",
    "capped": "Samples scaled down to the cap",
    "errors": "Errors while measuring or storing",
    "seconds": "Seconds spent measuring and storing",
    "versions": "Versions of the weights that were measured",
}


@final
class ObserverCollector:
    """An observer's `stats()` as metrics `memsyn_observer_*`, read at each scrape.

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
    """Add an observer's metrics to a registry. A registry holds one observer."""
    registry.register(ObserverCollector(observer))
