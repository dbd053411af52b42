"""The cluster, as the agent has it: whom ADD asks about a pod, and who tells the pod what it got.

Nothing waits for the API server but an ADD whose pod is not known yet, and that shortly.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from extbridge.kube.api import Api
from extbridge.kube.orphans import Orphans
from extbridge.kube.pods import PodCache
from extbridge.kube.reports import Reports
from extbridge.ledger import Ledger
from extbridge.node.metrics import Metrics

_STOP_SECONDS: Final = 3.0


class Cluster:
    """A node's part of a cluster (node.compose.Cluster).

    `orphan_seconds` is after how long NICs of pods that are gone are freed. Raises
    InvalidEnvironment where it cannot be known where the API server is.
    """

    def __init__(
        self,
        ledger: Ledger,
        metrics: Metrics,
        *,
        node: str,
        kubeconfig: Path | None,
        host_process: int | None,
        orphan_seconds: float,
    ) -> None:
        api = Api(kubeconfig)
        pods = PodCache(api, node, metrics.count_api_failure)
        metrics.pods_known.set_function(lambda: pods.number)
        self._api = api
        self._pods = pods
        self._reports = Reports(api, pods, node, ledger, metrics)
        self._orphans = Orphans(
            pods, ledger, metrics, host_process=host_process, seconds=orphan_seconds
        )
        self.find_pod = pods.find
        self.observe = self._reports.observe

    def start(self) -> None:
        """Begin; waits for nothing."""
        self._pods.start()
        self._reports.start()
        self._orphans.start()

    def stop(self) -> None:
        """End: tell what waits to be told, if the API server lets us do so at once."""
        self._pods.stop()
        self._orphans.stop()
        self._reports.stop()
        self._reports.join(_STOP_SECONDS)
        self._orphans.join(_STOP_SECONDS)
        self._api.close()
