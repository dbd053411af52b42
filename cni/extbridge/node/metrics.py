"""What the agent counts of its own work (Prometheus; the only importer of its client library)."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from extbridge.node.observed import Observed

CONTENT_TYPE = CONTENT_TYPE_LATEST

# An ADD takes one or two milliseconds, a DEL some twenty; a second is a fault.
_BUCKETS = (0.0005, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.5, 1.0, 5.0)


class _Attachments(Collector):
    """How many there are, where, and what they do: asked when somebody reads it."""

    def __init__(self, observe: Callable[[], Iterable[Observed]]) -> None:
        self._observe = observe

    def collect(self) -> Iterator[Metric]:
        seen = list(self._observe())
        yield GaugeMetricFamily("extbridge_attachments", "Attachments in the ledger.", len(seen))
        yield _gauge(
            "extbridge_network_attachments",
            "Attachments of each network that has any.",
            "network",
            Tally(it.network for it in seen),
        )
        yield _gauge(
            "extbridge_nic_attachments",
            "Attachments on each NIC that has any.",
            "nic",
            Tally(it.nic for it in seen),
        )
        yield _gauge(
            "extbridge_nic_carrier",
            "Whether a NIC with attachments is up and has carrier (1), or not (0).",
            "nic",
            {it.nic: int(it.carrier) for it in seen},
        )
        drops = CounterMetricFamily(
            "extbridge_spoof_drops",
            "Frames that a guest sent and antispoof dropped, by attachment.",
            labels=("network", "vm", "interface"),
        )
        # A pod that comes anew may have both its sandboxes in the ledger for a while.
        summed: Tally[tuple[str, str, str]] = Tally()
        for it in seen:
            if it.spoofs is not None:
                summed[it.network, it.vm, it.interface] += it.spoofs
        for labels, number in sorted(summed.items()):
            drops.add_metric(labels, number)
        yield drops
        yield GaugeMetricFamily(
            "extbridge_spoof_drops_unread",
            "Guarded attachments whose drops are not known: out of reach, or not their turn yet.",
            sum(it.guarded and it.spoofs is None for it in seen),
        )


def _gauge(name: str, meaning: str, label: str, values: Mapping[str, int]) -> Metric:
    family = GaugeMetricFamily(name, meaning, labels=(label,))
    for value, number in sorted(values.items()):
        family.add_metric((value,), number)
    return family


class _Broken(Collector):
    """Which definitions cannot be used: asked when somebody reads it, as a request would."""

    def __init__(self, find: Callable[[], Collection[str]]) -> None:
        self._find = find

    def collect(self) -> Iterator[Metric]:
        broken = GaugeMetricFamily(
            "extbridge_network_broken", "Networks whose definition is broken.", labels=("network",)
        )
        # No folder, no definition: the log says so.
        with suppress(OSError):
            for network in self._find():
                broken.add_metric((network,), 1)
        yield broken


class Metrics:
    """The agent's counters; what is given is asked when somebody reads them.

    `observe` looks at the attachments, `spooled` is a number, `broken` are names of networks.
    """

    def __init__(
        self,
        *,
        observe: Callable[[], Iterable[Observed]],
        spooled: Callable[[], int],
        broken: Callable[[], Collection[str]],
    ) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Attachments(observe))
        self._registry.register(_Broken(broken))
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
        self._api_failures = Counter(
            "extbridge_api_failures",
            "Calls of Kubernetes' API server that failed, by purpose and kind.",
            ("call", "kind"),
            registry=self._registry,
        )
        self.reports = Counter(
            "extbridge_reports",
            "Events and statuses for pods: told, counted with an earlier one, late (the pod is"
            " gone), lost (refused, or too many), none (nothing to tell).",
            ("outcome",),
            registry=self._registry,
        )
        self.pods_known = Gauge(
            "extbridge_pods_known",
            "Pods that the API server says are on this node; -1 as long as it has not said.",
            registry=self._registry,
        )
        self.leases = Gauge(
            "extbridge_leases", "Processes that hold taps.", registry=self._registry
        )
        Gauge(
            "extbridge_spool_length", "DELs that wait in the spool.", registry=self._registry
        ).set_function(spooled)

        self.devices = Gauge(
            "extbridge_devices",
            "Devices offered to kubelet, by their network and whether a NIC can carry them.",
            ("network", "health"),
            registry=self._registry,
        )
        self.allocations = Counter(
            "extbridge_device_allocations",
            "Devices that kubelet has allocated to containers.",
            ("network",),
            registry=self._registry,
        )
        self.registrations = Counter(
            "extbridge_device_registrations",
            "Registrations with kubelet, by what gRPC says of them (OK is success).",
            ("network", "code"),
            registry=self._registry,
        )

    def count_api_failure(self, call: str, kind: str) -> None:
        """Count a call of the API server that failed."""
        self._api_failures.labels(call, kind).inc()

    def render(self) -> bytes:
        """All of it in the text format that Prometheus reads."""
        return generate_latest(self._registry)
