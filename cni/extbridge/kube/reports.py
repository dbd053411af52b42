"""What pods are told of their attachments, for people and programs to read in the cluster.

One whose ADD failed gets an Event, one whose NICs were made behind another plugin a status. Told by
a thread of its own, after the runtime has had its answer. What cannot be told for now waits in a
queue of so many; the rest is lost, and counted: none of it is needed for anything to work.
"""

from __future__ import annotations

import json
import logging
import queue
import secrets
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Self, TypeVar

from extbridge.kube.api import (
    LASTING,
    MERGE_PATCH,
    STRATEGIC_PATCH,
    Api,
    ApiFailure,
    Circuit,
    Failure,
    told_internal,
)
from extbridge.kube.pods import PodCache
from extbridge.ledger import Entry, Ledger
from extbridge.node import wire
from extbridge.node.metrics import Metrics
from extbridge.spec import skel
from extbridge.spec.request import Verb

log = logging.getLogger(__name__)

STATUS_ANNOTATION: Final = "extbridge.io/status"
REASON: Final = "AttachmentFailed"

_COMPONENT: Final = "extbridge"
_MOST_WAITING: Final = 256
_MOST_REMEMBERED: Final = 512
_CALL_SECONDS: Final = 5.0
_TOLD_LATEST_SECONDS: Final = 600.0

_SAME_SECONDS: Final = 60.0
"""What fails with the same words within this time is only counted."""

_A_MINUTE: Final = 5
"""Events that one pod may cause in a minute, whatever its failures' words."""

_MOST_CHARACTERS: Final = 1024
"""Of an Event's message; the API server refuses more (validation of core/v1 Event)."""

_END_CHARACTERS: Final = 60
"""Of a longer message's end, kept for the sake of CniError.details."""

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class _Pod:
    namespace: str
    name: str
    uid: str

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> Self | None:
        """The pod that CNI_ARGS name, as kubelets' runtimes have them; None where they do not."""
        pairs = (pair.partition("=") for pair in environ.get("CNI_ARGS", "").split(";"))
        args = {key: value for key, _, value in pairs}
        namespace, name = args.get("K8S_POD_NAMESPACE"), args.get("K8S_POD_NAME")
        return cls(namespace, name, args.get("K8S_POD_UID", "")) if namespace and name else None


@dataclass(frozen=True, slots=True)
class _Report:
    """`said` is what an ADD failed with, empty for one that made NICs of this container.

    `gist` is the same whenever that happens again: without the request's ID.
    """

    pod: _Pod
    container_id: str
    said: str
    gist: str
    when: datetime
    began: float


@dataclass(slots=True)
class _Told:
    """An Event that the API server has: its name, how often it happened, and when it was told."""

    name: str
    count: int
    told: float


class Reports:
    """Takes reports from any thread, and tells them from one of its own."""

    def __init__(
        self, api: Api, pods: PodCache, node: str, ledger: Ledger, metrics: Metrics
    ) -> None:
        self._api = api
        self._pods = pods
        self._node = node
        self._ledger = ledger
        self._count: Callable[[str], None] = lambda outcome: metrics.reports.labels(outcome).inc()
        self._events = Circuit("events", metrics.count_api_failure)
        self._statuses = Circuit("status of pods", metrics.count_api_failure)
        self._waiting: queue.Queue[_Report | None] = queue.Queue(_MOST_WAITING)
        self._told: OrderedDict[tuple[_Pod, str], _Told] = OrderedDict()
        self._recent: OrderedDict[_Pod, deque[float]] = OrderedDict()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reports", daemon=True)

    def start(self) -> None:
        """Begin to tell."""
        self._thread.start()

    def stop(self) -> None:
        """Tell what waits, if it can be told at once; `join` waits for that."""
        self._stopping.set()
        # A full queue is read to its end in any case.
        self._put(None)

    def join(self, seconds: float) -> None:
        """Wait, so many seconds at most, until nothing is told any more."""
        self._thread.join(seconds)

    def observe(self, request: wire.Request, answer: skel.Answer) -> None:
        """Take what an ADD came to; blocks not, raises nothing (node.agent.Services)."""
        environ = request.environ
        pod = _Pod.of(environ)
        # Without notes it was passed through: the pod has asked for no NIC.
        if (
            environ.get("CNI_COMMAND") != Verb.ADD
            or pod is None
            or not (answer.code or answer.notes)
        ):
            return
        said = _sentence(answer) if answer.code else ""
        container_id = environ.get("CNI_CONTAINERID", "")
        gist = said.replace(f"request {request.id}", "")
        self._put(_Report(pod, container_id, said, gist, datetime.now(UTC), time.monotonic()))

    def _put(self, report: _Report | None) -> None:
        try:
            self._waiting.put_nowait(report)
        except queue.Full:
            self._count("lost")

    def _run(self) -> None:
        while not (self._stopping.is_set() and self._waiting.empty()):
            report = self._waiting.get()
            if report is None:
                continue
            self._count(self._tell(report))

    def _tell(self, report: _Report) -> str:
        """Tell it, again and again while that may help; what became of it."""
        circuit, tell = (
            (self._events, self._tell_event) if report.said else (self._statuses, self._tell_status)
        )
        while True:
            self._stopping.wait(circuit.pause)
            try:
                with told_internal():
                    outcome = tell(report)
                if outcome == "told":
                    circuit.work()
                return outcome
            except ApiFailure as failure:
                # Of a pod that is gone, or has been followed by another of its name, it is no news.
                if failure.kind in (Failure.ABSENT, Failure.CONFLICT):
                    return "late"
                circuit.fail(failure)
                is_late = time.monotonic() - report.began > _TOLD_LATEST_SECONDS
                if failure.kind in LASTING or is_late or self._stopping.is_set():
                    return "lost"

    def _tell_event(self, report: _Report) -> str:
        key = (report.pod, report.gist)
        told = self._told.get(key)
        now = time.monotonic()
        if told is not None:
            told.count += 1
            if now - told.told < _SAME_SECONDS:
                return "counted"
        recent = self._recent.setdefault(report.pod, deque(maxlen=_A_MINUTE))
        _forget(self._recent, report.pod)
        if len(recent) == _A_MINUTE and now - recent[0] < _SAME_SECONDS:
            return "counted"
        path = f"/api/v1/namespaces/{report.pod.namespace}/events"
        try:
            if told is not None and self._retold(f"{path}/{told.name}", told, report):
                told.told = now
            else:
                # A pod's name may be as long as an Event's (253).
                name = f"{report.pod.name[:230]}.{secrets.token_hex(8)}"
                self._api.post(path, self._event(report, name), seconds=_CALL_SECONDS)
                self._told[key] = _Told(name, 1, now)
        except ApiFailure:
            if told is not None:
                # It is told anew.
                told.count -= 1
            raise
        _forget(self._told, key)
        recent.append(now)
        return "told"

    def _retold(self, path: str, told: _Told, report: _Report) -> bool:
        """Whether the Event is still there to be given its new count (--event-ttl: an hour)."""
        patch = {
            "count": told.count,
            "lastTimestamp": _timestamp(report.when),
            # The ID of the latest, which is easiest to find in a log.
            "message": report.said,
        }
        try:
            self._api.patch(path, patch, kind=STRATEGIC_PATCH, seconds=_CALL_SECONDS)
        except ApiFailure as failure:
            if failure.kind is Failure.ABSENT:
                return False
            raise
        return True

    def _event(self, report: _Report, name: str) -> dict[str, object]:
        """A core/v1 Event, as `kubectl describe pod` shows it."""
        pod, when = report.pod, _timestamp(report.when)
        return {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": name, "namespace": pod.namespace},
            "involvedObject": {
                "apiVersion": "v1",
                "kind": "Pod",
                "namespace": pod.namespace,
                "name": pod.name,
                "uid": pod.uid,
            },
            "type": "Warning",
            "reason": REASON,
            "message": report.said,
            "count": 1,
            "firstTimestamp": when,
            "lastTimestamp": when,
            "source": {"component": _COMPONENT, "host": self._node},
            "reportingComponent": _COMPONENT,
            "reportingInstance": self._node,
        }

    def _tell_status(self, report: _Report) -> str:
        pod = report.pod
        # Alone or by Multus, the NIC has the name that was asked for, and who asked tells the pod.
        made = [
            entry
            for entry in self._ledger.of(report.container_id)
            if entry.done and entry.ifname != entry.cni_ifname
        ]
        if not made:
            return "none"
        status = json.dumps([_status(entry) for entry in made])
        metadata: dict[str, object] = {"annotations": {STATUS_ANNOTATION: status}}
        known = self._pods.known(pod.namespace, pod.name, pod.uid)
        # The API server refuses the patch of another pod's by then (409); a static pod's mirror has
        # another UID than the runtime knows.
        uid = known.uids[0] if known is not None else pod.uid
        if uid:
            metadata["uid"] = uid
        # By its status, of which the API server takes the annotations and no spec
        # (podStatusStrategy.PrepareForUpdate): a node's token must not change what pods run.
        self._api.patch(
            f"/api/v1/namespaces/{pod.namespace}/pods/{pod.name}/status",
            {"metadata": metadata},
            kind=MERGE_PATCH,
            seconds=_CALL_SECONDS,
        )
        return "told"


def _sentence(answer: skel.Answer) -> str:
    """The error's message and hint, as the runtime was told them."""
    told = json.loads(answer.stdout)
    said = "; ".join(filter(None, (told.get("msg"), told.get("details"))))
    # The end says where to read more, and which request it was.
    kept = _MOST_CHARACTERS - 1 - _END_CHARACTERS
    return said if len(said) <= _MOST_CHARACTERS else f"{said[:kept]}…{said[-_END_CHARACTERS:]}"


def _status(entry: Entry) -> dict[str, object]:
    """One NIC, by the keys of Multus's network-status as far as it has them."""
    given = entry.addressing
    return {
        "name": entry.definition,
        "interface": entry.ifname,
        "mac": entry.mac,
        "ips": [] if given is None else [it.address.partition("/")[0] for it in given.addresses],
        "mtu": entry.mtu,
    }


def _timestamp(when: datetime) -> str:
    return when.strftime("%Y-%m-%dT%H:%M:%SZ")


def _forget(remembered: OrderedDict[_Key, _Value], latest: _Key) -> None:
    """Make room by what was used longest ago."""
    remembered.move_to_end(latest)
    if len(remembered) > _MOST_REMEMBERED:
        remembered.popitem(last=False)
