"""What the agent counts of its own work (Prometheus; the only importer of its client library)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

CONTENT_TYPE = CONTENT_TYPE_LATEST

# An ADD takes one or two milliseconds, a DEL some twenty; a second is a fault.
_BUCKETS = (0.0005, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.5, 1.0, 5.0)


class _Attachments(Collector):
    """How many attachments there are, and on which NIC: asked when somebody reads it."""

    def __init__(self, count: Callable[[], Mapping[str, int]]) -> None:
        self._count = count

    def collect(self) -> Iterator[Metric]:
        counted = self._count()
        yield GaugeMetricFamily(
            "extbridge_attachments", "Attachments in the ledger.", value=sum(counted.values())
        )
        by_nic = GaugeMetricFamily(
            "extbridge_nic_attachments", "Attachments on each NIC that has any.", labels=("nic",)
        )
        for nic, number in sorted(counted.items()):
            by_nic.add_metric((nic,), number)
        yield by_nic


class Metrics:
    """The agent's counters; `attachments` and `spooled` are asked when somebody reads them."""

    def __init__(
        self, *, attachments: Callable[[], Mapping[str, int]], spooled: Callable[[], int]
    ) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Attachments(attachments))
        self.requests = Counter(
            "extbridge_requests",
            "CNI requests answered, by verb and by the code of the answer (0 is success).",
            ("verb", "code"),
            registry=self._registry,
        )
        self.duration = Histogram(
            "extbridge_request_duration_seconds",
            "From a CNI request having arrived whole to its answer being ready.",
            ("verb",),
            buckets=_BUCKETS,
            registry=self._registry,
        )
        self.last_add = Gauge(
            "extbridge_last_add_timestamp_seconds",
            "When an ADD was last answered, by its outcome: done or failed.",
            ("outcome",),
            registry=self._registry,
        )
        self.hand_offs = Counter(
            "extbridge_handoffs", "Taps handed to launchers.", registry=self._registry
        )
        self.hand_off_duration = Histogram(
            "extbridge_handoff_duration_seconds",
            "From a launcher's request having arrived whole to its taps being open.",
            buckets=_BUCKETS,
            registry=self._registry,
        )
        self.refusals = Counter(
            "extbridge_refusals",
            "Connections and launchers that got nothing, by reason.",
            ("reason",),
            registry=self._registry,
        )
        self.repairs = Counter(
            "extbridge_reconcile_repairs",
            "What was found amiss, at a start or in the spool, and put right, by kind.",
            ("kind",),
            registry=self._registry,
        )
        self.leases = Gauge(
            "extbridge_leases", "Processes that hold taps.", registry=self._registry
        )
        Gauge(
            "extbridge_spool_length", "DELs that wait in the spool.", registry=self._registry
        ).set_function(spooled)

    def render(self) -> bytes:
        """All of it in the text format that Prometheus reads."""
        return generate_latest(self._registry)
