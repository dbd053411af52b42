"""The pods of this node, as the API server has them: listed once, then followed by a watch.

So that ADD need not ask: by the time that kubelet makes a pod's namespace, the watch has told of
the pod. What it has not told of is asked for, once and shortly, by ADD itself.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from random import SystemRandom
from typing import Final

from extbridge.kube.api import (
    METADATA,
    METADATA_LIST,
    Api,
    ApiFailure,
    Circuit,
    Failure,
    told_internal,
)
from extbridge.network.annotation import NETWORKS_ANNOTATION
from extbridge.network.bandwidth import EGRESS_ANNOTATION, INGRESS_ANNOTATION
from extbridge.network.wanted import VM_MARKS, PodFacts
from extbridge.spec.errors import InvalidNetworkConfig
from extbridge.spec.fields import (
    JsonObject,
    as_object,
    describe,
    get_int,
    get_list,
    get_object,
    get_str,
)

log = logging.getLogger(__name__)

LOOK_UP_SECONDS: Final = 0.5
"""How long an ADD waits for the API server, when the watch has not told of its pod."""

CALL_SECONDS: Final = 10.0

_WATCH_SECONDS: Final = (240, 360)
"""How long the API server is asked to keep a watch, by chance in between: not all at once end."""

_SHORT_WATCH_SECONDS: Final = 1.0

_ANEW: Final = frozenset({Failure.GONE, Failure.GARBLED, Failure.INTERNAL})
"""After what the pods are listed anew: from the same version the same would come again."""

_PODS: Final = "/api/v1/pods"
_ANNOTATIONS: Final = (NETWORKS_ANNOTATION, INGRESS_ANNOTATION, EGRESS_ANNOTATION)
_MIRRORED: Final = ("kubernetes.io/config.hash", "kubernetes.io/config.mirror")

_random = SystemRandom()


@dataclass(frozen=True, slots=True)
class KnownPod:
    """What is kept of a pod. `uids` are its own, and those that kubelet has for a static pod.

    The API server has a static pod as a mirror with a UID of its own; kubelet, and so the runtime,
    calls it by the hash of its manifest, which is in the mirror's annotations (kubelet's
    pkg/kubelet/types, ConfigHashAnnotationKey, ConfigMirrorAnnotationKey).
    """

    uids: tuple[str, ...]
    facts: PodFacts

    def is_called(self, uid: str) -> bool:
        """Whether it is the pod with this UID, and no former or later one of its name."""
        return not uid or uid in self.uids


class PodCache:
    """The node's pods, followed by a thread of its own. `find` is for ADD.

    `count` is told of each failure, by purpose and kind.
    """

    def __init__(self, api: Api, node: str, count: Callable[[str, str], None]) -> None:
        self._api = api
        self._node = node
        self._count = count
        self._pods: dict[tuple[str, str], KnownPod] = {}
        self._version: str | None = None
        # From the API server's memory, which is cheap for it; anew from its disk, where that
        # memory is older than what we had.
        self._list_from = "0"
        self._listing = Circuit("list of pods", count)
        self._watching = Circuit("watch of pods", count)
        self._looking_up = Circuit("look-up of a pod", count)
        self._synced = threading.Event()
        self._stopping = threading.Event()
        self._end_watch: Callable[[], None] = lambda: None
        # A daemon: where the API server keeps it waiting, the agent's end does not.
        self._thread = threading.Thread(target=self._run, name="pods", daemon=True)

    @property
    def synced(self) -> bool:
        """Whether all pods of the node have been seen, once at least."""
        return self._synced.is_set()

    @property
    def number(self) -> int:
        """How many there are; -1 as long as that is not known."""
        return len(self._pods) if self.synced else -1

    def start(self) -> None:
        """Begin to follow; waits for nothing."""
        self._thread.start()

    def stop(self) -> None:
        """Follow no more."""
        self._stopping.set()
        self._end_watch()

    def find(self, namespace: str, name: str, uid: str) -> PodFacts | None:
        """What network.wanted.FindPod says; at the pod's first ADD it is in memory already."""
        known = self.known(namespace, name, uid)
        if known is not None:
            return known.facts
        if self._looking_up.pause:
            return None
        try:
            with told_internal():
                found = self._in_time(namespace, name)
        except ApiFailure as failure:
            self._looking_up.fail(failure)
            return None
        self._looking_up.work()
        return found.facts if found is not None and found.is_called(uid) else PodFacts()

    def known(self, namespace: str, name: str, uid: str) -> KnownPod | None:
        """The pod, if the watch has told of it."""
        known = self._pods.get((namespace, name))
        return known if known is not None and known.is_called(uid) else None

    def ask(self, namespace: str, name: str, seconds: float = CALL_SECONDS) -> KnownPod | None:
        """The pod as the API server has it now; None if it has none. Raises ApiFailure."""
        path = f"/api/v1/namespaces/{namespace}/pods/{name}"
        try:
            return _parse_pod(self._api.get(path, accept=METADATA, seconds=seconds))[1]
        except ApiFailure as failure:
            if failure.kind is Failure.ABSENT:
                return None
            raise

    def _in_time(self, namespace: str, name: str) -> KnownPod | None:
        """The same in LOOK_UP_SECONDS, however slowly an answer trickles in."""
        asked: Future[KnownPod | None] = Future()

        def ask() -> None:
            try:
                with told_internal():
                    asked.set_result(self.ask(namespace, name, LOOK_UP_SECONDS))
            except ApiFailure as failure:
                asked.set_exception(failure)

        threading.Thread(target=ask, name="look-up", daemon=True).start()
        try:
            return asked.result(LOOK_UP_SECONDS)
        except TimeoutError as error:
            raise ApiFailure(Failure.SLOW, f"no answer within {LOOK_UP_SECONDS} s") from error

    def _run(self) -> None:
        while not self._stopping.is_set():
            circuit = self._watching if self._version else self._listing
            try:
                with told_internal():
                    if self._version:
                        self._watch(self._version)
                    else:
                        self._list()
            except ApiFailure as failure:
                if self._stopping.is_set():
                    return
                circuit.fail(failure)
                if failure.kind is Failure.GONE and circuit is self._listing:
                    self._list_from = ""
                if failure.kind in _ANEW:
                    self._version = None
            self._stopping.wait(circuit.pause)

    def _list(self) -> None:
        listed = self._api.get(
            _PODS,
            query=[*self._ours(), ("resourceVersion", self._list_from)],
            accept=METADATA_LIST,
            seconds=CALL_SECONDS,
        )
        version = _get_version(listed)
        with _told_fields():
            items = get_list(listed, "items") or []
        self._pods = dict(self._parse_pods(items))
        self._version = version
        self._list_from = "0"
        self._listing.work()
        if not self._synced.is_set():
            self._synced.set()
            log.info("pods of node %s are known", self._node, extra={"pods": len(self._pods)})

    def _parse_pods(self, items: list[object]) -> Iterator[tuple[tuple[str, str], KnownPod]]:
        """All that can be read; an ADD of another asks for it, and the others have their NICs."""
        for item in items:
            try:
                yield _parse_pod(item)
            except ApiFailure as failure:
                self._count("list of pods", failure.kind)
                log.warning("a pod of the node is left out: %s", failure)

    def _watch(self, version: str) -> None:
        seconds = _random.randint(*_WATCH_SECONDS)
        query = [
            *self._ours(),
            ("watch", "true"),
            ("resourceVersion", version),
            ("allowWatchBookmarks", "true"),
            ("timeoutSeconds", str(seconds)),
        ]
        began, events = time.monotonic(), 0
        with (
            self._api.watch(_PODS, query, seconds=CALL_SECONDS, silence=seconds + CALL_SECONDS) as (
                told,
                end,
            ),
            self._ended_by(end),
        ):
            if self._stopping.is_set():
                return
            for event in told:
                events += 1
                self._follow(event)
                self._watching.work()
        if not events and time.monotonic() - began < _SHORT_WATCH_SECONDS:
            raise ApiFailure(Failure.SERVER, "the watch ended as soon as it had begun")

    @contextmanager
    def _ended_by(self, end: Callable[[], None]) -> Iterator[None]:
        """What ends a watch holds its connection, and all others of the client."""
        self._end_watch = end
        try:
            yield
        finally:
            self._end_watch = lambda: None

    def _follow(self, event: JsonObject) -> None:
        with _told_fields():
            kind, obj = get_str(event, "type"), get_object(event, "object")
            if kind is None or obj is None:
                raise ApiFailure(Failure.GARBLED, "an event of the watch has no type or object")
            if kind == "ERROR":
                raise ApiFailure.by_status(
                    get_int(obj, "code") or 500, get_str(obj, "message") or "no reason given"
                )
        version = _get_version(obj)
        if kind in ("ADDED", "MODIFIED"):
            key, pod = _parse_pod(obj)
            self._pods[key] = pod
        elif kind == "DELETED":
            key, _ = _parse_pod(obj)
            self._pods.pop(key, None)
        self._version = version

    def _ours(self) -> list[tuple[str, str]]:
        return [("fieldSelector", f"spec.nodeName={self._node}")]


def _parse_pod(obj: object) -> tuple[tuple[str, str], KnownPod]:
    """The pod's key, namespace and name, and what is kept of it. Raises ApiFailure."""
    with _told_fields():
        metadata = _get_metadata(as_object(obj, where="a pod"))
        key = (_text(metadata, "namespace"), _text(metadata, "name"))
        annotations = _texts(metadata, "annotations")
        labels = _texts(metadata, "labels")
        uid = _text(metadata, "uid")
    marks = (annotations.get(mark) or labels.get(mark) for mark in VM_MARKS)
    uids = [uid, *(annotations.get(key) for key in _MIRRORED)]
    return key, KnownPod(
        uids=tuple(dict.fromkeys(filter(None, uids))),
        facts=PodFacts(
            annotations={key: annotations[key] for key in _ANNOTATIONS if key in annotations},
            vm=next(filter(None, marks), ""),
        ),
    )


def _get_version(obj: JsonObject) -> str:
    with _told_fields():
        return _text(_get_metadata(obj), "resourceVersion")


@contextmanager
def _told_fields() -> Iterator[None]:
    """A field of another type than it has to be, as ApiFailure."""
    try:
        yield
    except InvalidNetworkConfig as error:
        raise ApiFailure(Failure.GARBLED, str(error)) from error


def _get_metadata(obj: JsonObject) -> JsonObject:
    metadata = get_object(obj, "metadata")
    if metadata is None:
        raise ApiFailure(Failure.GARBLED, "an object has no metadata")
    return metadata


def _text(metadata: JsonObject, key: str) -> str:
    value = get_str(metadata, key, where="metadata")
    if not value:
        raise ApiFailure(Failure.GARBLED, f"an object has no {key}")
    return value


def _texts(metadata: JsonObject, key: str) -> Mapping[str, str]:
    """Annotations or labels. What is wrong within a text is ADD's to say, to the pod's user."""
    texts = {}
    for name, text in (get_object(metadata, key, where="metadata") or {}).items():
        if not isinstance(text, str):
            raise InvalidNetworkConfig(
                f"metadata.{key}.{name} is {describe(text)}", "it has to be a string"
            )
        texts[name] = text
    return texts
