"""`make docs`: writes the pages that are made of the code. A test says when they are old."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

from extbridge.network.schema import schema_text
from extbridge.node.metrics import Metrics
from extbridge.spec.errors import CniError

ROOT: Final = Path(__file__).parents[1]

_ERRORS: Final = """\
# Errors

Made from `cni/extbridge/spec/errors.py` by `make docs`.

What goes wrong is told as CNI has it, `{"code": …, "msg": …, "details": …}`: `msg` says what is
wrong, `details` what to do, and ends with the place on this page and the request's ID. kubelet
shows both in the pod's events:

```
… plugin type="extbridge" failed (add): extbridge.dev: the node has no NIC 'eht0'; it has eth0
(errors.md#invalid-network-config, request 3f9c01d2)
```

The agent makes up the ID, because it is the one that answers. Its log has one line with it, which
says more: `kubectl logs -n extbridge ds/extbridge`, or the unit's journal, and look for
`request=3f9c01d2` (`"request": "3f9c01d2"` in JSON). `extbridge-cni`, without an agent, has neither
ID nor log. Codes below 100 are the CNI specification's (section 2, "Error").

| code | | meaning |
|---|---|---|
"""

_NO_ANSWER: Final = """
## No answer

Code 11, for STATUS 50, for a DEL that could not be kept for later 5: these words are not the
agent's but those of shim and launcher, which have waited for it in vain.

**What to do:** See that the agent runs (`kubectl get pods -n extbridge -o wide`, or `systemctl
status`), that its log ends with `serving`, and that shim, launcher and agent have the same run
folder (EXTBRIDGE_RUN). kubelet asks again by itself; DELs wait in the spool. There is no request
ID, and no line in the agent's log.
"""

_METRICS: Final = """\
# Metrics

Made from `cni/extbridge/node/metrics.py` by `make docs`.

The agent serves them on `metrics.sock` in its run folder (`curl --unix-socket
/run/extbridge/metrics.sock http://node/metrics`) and, if it is started with `--metrics-listen
ADDRESS:PORT`, over TCP, to whoever asks there. In the DaemonSet that is another argument,
`--metrics-listen=$(HOST_IP):9477`, with HOST_IP from the field `status.hostIP`. They are of one
node; `instance` or `node` is the scraper's to add. A counter with labels is there from its first
event on.

`deploy/monitoring/` has alerts for these, as a plain rules file and as a PrometheusRule, and a
Grafana dashboard. In the cluster, Prometheus finds the agents with

```yaml
scrape_configs:
  - job_name: extbridge
    kubernetes_sd_configs:
      - {role: pod, namespaces: {names: [extbridge]}}
    relabel_configs:
      - source_labels: [__meta_kubernetes_pod_label_app_kubernetes_io_name]
        regex: extbridge
        action: keep
      - source_labels: [__meta_kubernetes_pod_ip]
        target_label: __address__
        replacement: $1:9477
      - source_labels: [__meta_kubernetes_pod_node_name]
        target_label: instance
```

| name | type | labels | meaning |
|---|---|---|---|
"""

_METRICS_END: Final = """
A histogram has `_bucket`, `_sum` and `_count`. `code` is that of [the errors](errors.md), 0 for
success. `vm` is namespace and name as the attachment's pod or VM has them, or the container's ID.

`extbridge_spoof_drops_total` is read from the rules in each pod's namespace, at most every 5 s and
for at most 0.5 s at a time, so that scraping costs ADD little however many pods there are. It
counts what a guest sent and may not (another MAC, another's address, VLAN tags, a DHCP server's or
a router's frames), not what was for others. An agent in a container needs hostPID for it.
"""

ALERTS: Final = "deploy/monitoring/alerts.yaml"

_RESOURCE: Final = """\
# Made from alerts.yaml by `make docs`.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: extbridge
  labels:
    app.kubernetes.io/name: extbridge
spec:
"""

_PRONOUNCED: Final = {"Mac": "MAC", "Nic": "NIC", "Ipam": "IPAM", "Io": "I/O"}


def errors_page() -> str:
    """docs/errors.md, from the tree of errors."""
    kinds = list(_kinds(CniError))
    rows = [f"| {it.code} | [{_title(it)}](#{it.anchor()}) | {_said(it)} |" for it in kinds]
    sections = [
        f"\n## {_title(it)}\n\nCode {it.code}. {_said(it)}\n\n**What to do:** {it.remedy}\n"
        for it in kinds
    ]
    return _ERRORS + "\n".join(rows) + "\n" + "".join(sections) + _NO_ANSWER


def metrics_page() -> str:
    """docs/metrics.md, from the registry."""
    rows = [
        f"| `{name}` | {kind} | {', '.join(f'`{it}`' for it in labels)} | {meaning} |"
        for name, kind, labels, meaning in sorted(metrics())
    ]
    return _METRICS + "\n".join(rows) + "\n" + _METRICS_END


def metrics() -> Iterator[tuple[str, str, tuple[str, ...], str]]:
    """Name, type, labels and meaning of each metric that the agent has."""
    registry = Metrics(observe=list, spooled=int, broken=list)._registry
    for collector in registry._collector_to_names:
        for family in collector.collect():
            found = collector if hasattr(collector, "_labelnames") else family
            name = f"{family.name}_total" if family.type == "counter" else family.name
            yield name, family.type, tuple(vars(found)["_labelnames"]), family.documentation


def rule_resource() -> str:
    """The alerts as the Prometheus operator takes them."""
    rules = (ROOT / ALERTS).read_text(encoding="utf-8")
    return _RESOURCE + "".join(
        f"  {line}" for line in rules[rules.index("groups:") :].splitlines(keepends=True)
    )


def main() -> None:
    """Write the pages."""
    for path, render in PAGES.items():
        (ROOT / path).write_text(render(), encoding="utf-8")


def _kinds(kind: type[CniError]) -> Iterator[type[CniError]]:
    """In the order of the file, which is that of the codes."""
    for sub in kind.__subclasses__():
        yield sub
        yield from _kinds(sub)


def _title(kind: type[CniError]) -> str:
    first, *words = re.findall("[A-Z][a-z]*", kind.__name__)
    return " ".join(
        (_PRONOUNCED.get(first, first), *(_PRONOUNCED.get(it, it.lower()) for it in words))
    )


def _said(kind: type[CniError]) -> str:
    return " ".join((inspect.getdoc(kind) or "").split())


PAGES: Final[Mapping[str, Callable[[], str]]] = {
    "docs/errors.md": errors_page,
    "docs/metrics.md": metrics_page,
    "docs/network.schema.json": schema_text,
    "deploy/monitoring/prometheusrule.yaml": rule_resource,
}

if __name__ == "__main__":
    main()
