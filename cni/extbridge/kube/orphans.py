"""Attachments whose pod is gone, and for which no DEL has come.

A runtime has forgotten it, or lost its own record, or a sandbox was removed by hand. A VM that
lives is worth more than a NIC that is left over, so an attachment is freed only where everybody
says so: the watch has not had its pod for some minutes, the API server itself says then that it has
none of this UID, no living process has taken its tap, and no process at all stands in its
namespace. A pod that was deleted by force may run on for long; its kubelet will end it, and send
the DEL. A static pod that has no mirror is known by its processes alone.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final

from extbridge.attachment import detach_wherever
from extbridge.kernel.netns import processes_in
from extbridge.kube.api import ApiFailure, Circuit, Failure, told_internal
from extbridge.kube.pods import PodCache
from extbridge.ledger import Entry, Ledger
from extbridge.node.metrics import Metrics
from extbridge.spec.errors import CniError

log = logging.getLogger(__name__)

_MOST_LOOKS_APART: Final = 60.0
_PURPOSE: Final = "look-up of pods that are gone"


class Orphans:
    """Looks for them every minute, or a quarter of `seconds`, in a thread of its own.

    `seconds` is how long a pod has to be gone.
    """

    def __init__(
        self,
        pods: PodCache,
        ledger: Ledger,
        metrics: Metrics,
        *,
        host_process: int | None,
        seconds: float,
    ) -> None:
        self._pods = pods
        self._ledger = ledger
        self._host_process = host_process
        self._seconds = seconds
        self._freed: Callable[[], None] = metrics.repairs.labels("orphan").inc
        self._count = metrics.count_api_failure
        self._asking = Circuit(_PURPOSE, metrics.count_api_failure)
        self._gone_since: dict[tuple[str, str], float] = {}
        self._warned: dict[tuple[str, str], str] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="orphans", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more; `join` waits for what has begun."""
        self._stopping.set()

    def join(self, seconds: float) -> None:
        """Wait, so many seconds at most, until nothing is freed any more."""
        self._thread.join(seconds)

    def _run(self) -> None:
        while not self._stopping.wait(min(self._seconds / 4, _MOST_LOOKS_APART)):
            if self._pods.synced and not self._asking.pause:
                try:
                    with told_internal():
                        self._look()
                except ApiFailure as failure:
                    self._asking.fail(failure)

    def _look(self) -> None:
        now = time.monotonic()
        missing = {
            (entry.container_id, entry.ifname): entry
            for entry in self._ledger.entries()
            if entry.done and entry.pod_uid and self._pods.known(*_pod(entry)) is None
        }
        self._gone_since = {key: self._gone_since.get(key, now) for key in missing}
        self._warned = {key: said for key, said in self._warned.items() if key in missing}
        for key, entry in missing.items():
            if self._stopping.is_set():
                return
            if now - self._gone_since[key] < self._seconds:
                continue
            try:
                if self._is_gone(entry):
                    self._free(entry)
            except ApiFailure:
                raise
            except (CniError, OSError) as error:
                self._warn(entry, str(error))
            except Exception as error:  # noqa: BLE001 - those after it have their turn
                self._count(_PURPOSE, Failure.INTERNAL)
                self._warn(entry, f"{type(error).__name__}: {error}", error)

    def _is_gone(self, entry: Entry) -> bool:
        """Whether the API server says now that it has no such pod."""
        namespace, name, uid = _pod(entry)
        known = self._pods.ask(namespace, name)
        self._asking.work()
        return known is None or not known.is_called(uid)

    def _free(self, seen: Entry) -> None:
        with self._ledger.hold(seen.container_id) as held:
            # As it is now: somebody may have taken the tap, or DEL have come.
            entry = next((it for it in held.entries() if it.ifname == seen.ifname), None)
            if entry is None or entry.ifindex != seen.ifindex:
                return
            user = _user(entry)
            if user:
                self._warn(entry, f"process {user} works with it")
                return
            detach_wherever(entry, held=held, host_process=self._host_process)
        self._freed()
        log.warning(
            "freed the NIC of a pod that is gone",
            extra={
                "pod": entry.pod,
                "container": entry.container_id,
                "ifname": entry.ifname,
                "mac": entry.mac,
            },
        )

    def _warn(self, entry: Entry, why: str, defect: Exception | None = None) -> None:
        key = (entry.container_id, entry.ifname)
        if self._warned.get(key) != why:
            self._warned[key] = why
            log.warning(
                "%s of pod %s, which is gone, is kept: %s", entry.ifname, entry.pod, why,
                extra={"container": entry.container_id}, exc_info=defect,
            )  # fmt: skip


def _pod(entry: Entry) -> tuple[str, str, str]:
    namespace, _, name = entry.pod.partition("/")
    return namespace, name, entry.pod_uid


def _user(entry: Entry) -> int | None:
    """A process that has the tap, or stands where it could open the device node."""
    if entry.holder is not None and entry.holder.alive():
        return entry.holder.pid
    return next(iter(processes_in(entry.netns_inode)), None)
