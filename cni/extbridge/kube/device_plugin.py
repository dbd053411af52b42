"""The device plugin: each network of the node is a resource that kubelet gives to pods.

A device is a reserved ifindex, by its decimal number. To allocate it makes nothing: the pod's ADD
does, with that ifindex, so that a pod which never starts leaves nothing behind.

Everything runs in one event loop, in a thread of its own. It looks at definitions, NICs and
kubelet's folder as a whole, whenever one of them has changed, and does what is due.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import threading
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final

from extbridge.kernel.changes import FolderChanges, LinkChanges
from extbridge.kernel.netlink import NETLINK_ROUTE, Netlink
from extbridge.kube.resource import (
    DOMAIN,
    HEALTH,
    KUBELET_SOCKET,
    Offer,
    Resource,
    file_at,
    socket_path,
)
from extbridge.ledger import Ledger
from extbridge.network.definition import Mode, Network
from extbridge.nics import able_nics
from extbridge.node.definitions import read_networks
from extbridge.node.metrics import Metrics
from extbridge.node.sockets import POD_FOLDER
from extbridge.reservations import Reservations

log = logging.getLogger(__name__)

_RESOURCE_NAME: Final = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
"""The part behind the slash (k8s.io/apimachinery, IsQualifiedName)."""

_MAX_SOCKET_PATH: Final = 107
"""man 7 unix, sun_path, without its NUL."""

_SETTLE_SECONDS: Final = 0.2
"""What changes comes in crowds: an ADD alone changes a NIC's flags twice."""

_RETRY_SECONDS: Final = 2.0


class DevicePlugins:
    """All resources of the node, in kubelet's `folder`; a companion of the agent's."""

    def __init__(
        self,
        folder: Path,
        networks_dir: Path,
        run: Path,
        reservations: Reservations,
        metrics: Metrics,
    ) -> None:
        self._folder = folder.absolute()
        self._networks_dir = networks_dir.absolute()
        self._pod_folder = (run / POD_FOLDER).absolute()
        self._ledger = Ledger(run)
        self._reservations = reservations
        self._metrics = metrics
        self._resources: dict[str, Resource] = {}
        self._complaints: dict[str, str] = {}
        self._loop = asyncio.new_event_loop()
        self._changed = asyncio.Event()
        self._stopping = asyncio.Event()
        self._failure = ""
        self._thread = threading.Thread(target=self._run, name="device plugins")

    def start(self) -> None:
        """Reserve what the first ADD may ask for, and serve from a thread."""
        # What is wrong the agent has just said.
        with suppress(OSError):
            networks, broken = read_networks(str(self._networks_dir))
            self._reservations.define(networks)
            self._complaints = {name: str(fault) for name, fault in broken.items()}
        self._thread.start()

    def stop(self) -> None:
        """Withdraw from kubelet: it counts no healthy device until the next agent is there."""
        if self._thread.ident is None:
            self._loop.close()
            return
        # Closed, if the thread has failed.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._stop)
        self._thread.join()

    def _stop(self) -> None:
        self._stopping.set()
        self._changed.set()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        try:
            while not self._stopping.is_set():
                try:
                    await self._follow()
                except Exception as error:  # noqa: BLE001 - the agent's other work goes on
                    self._say_once(error)
                    with suppress(TimeoutError):
                        await asyncio.wait_for(self._stopping.wait(), _RETRY_SECONDS)
        finally:
            for resource in self._resources.values():
                await resource.close()

    def _say_once(self, error: Exception) -> None:
        failure = str(error)
        # A traceback is for defects only.
        if failure != self._failure:
            log.error("device plugins: %s", error, exc_info=not isinstance(error, OSError))
        self._failure = failure

    async def _follow(self) -> None:
        """Look whenever something has changed, until the agent stops."""
        with ExitStack() as closing:
            folders, links = FolderChanges(), LinkChanges()
            for changes in (folders, links):
                closing.callback(changes.close)
                self._loop.add_reader(changes, self._note, changes)
                closing.callback(self._loop.remove_reader, changes)
            while not self._stopping.is_set():
                self._changed.clear()
                folders.watch((self._folder, self._networks_dir))
                await self._look()
                self._failure = ""
                await self._changed.wait()
                if not self._stopping.is_set():
                    await asyncio.sleep(_SETTLE_SECONDS)

    def _note(self, changes: FolderChanges | LinkChanges) -> None:
        changes.drain()
        self._changed.set()

    def _look_again_in(self, seconds: float) -> None:
        self._loop.call_later(seconds, self._changed.set)

    async def _look(self) -> None:
        offers = await asyncio.to_thread(self._offers)
        for name in self._resources.keys() - offers.keys():
            log.info("resource %s/%s is withdrawn", DOMAIN, name)
            await self._resources.pop(name).close()
            for health in HEALTH.values():
                self._metrics.devices.remove(name, health)
        for name, offer in offers.items():
            if name in self._resources:
                await self._resources[name].offer(offer)
            else:
                self._resources[name] = Resource(
                    offer, self._folder, self._pod_folder, self._metrics, self._changed.set
                )
            healths = list(offer.devices.values())
            for able, health in HEALTH.items():
                self._metrics.devices.labels(name, health).set(healths.count(able))
        # Where kubelet's folder is still to come, the next change is that.
        if not self._folder.is_dir():
            return
        kubelet = file_at(self._folder / KUBELET_SOCKET)
        for name, resource in self._resources.items():
            try:
                await resource.listen()
            except (OSError, RuntimeError) as error:
                log.error("resource %s/%s: %s", DOMAIN, name, error)  # noqa: TRY400 - no defect
                self._look_again_in(_RETRY_SECONDS)
            else:
                resource.introduce(kubelet)

    def _offers(self) -> Mapping[str, Offer]:
        networks, broken = read_networks(str(self._networks_dir))
        complaints = {name: str(error) for name, error in broken.items()}
        named = {}
        for name, network in networks.items():
            fault = self._name_fault(name)
            if fault:
                complaints[name] = fault
            else:
                named[name] = network
        self._complain(complaints)
        blocks = self._reservations.define(networks)
        with Netlink(NETLINK_ROUTE) as host:
            return {
                name: Offer(network, self._devices(host, network, blocks[name]))
                for name, network in named.items()
            }

    def _devices(self, host: Netlink, network: Network, block: range) -> Mapping[int, bool]:
        """The network's devices: all that are reserved, or, of a passthru network, one a NIC.

        A device that an attachment has is as its own NIC is. Which NIC the others will have is open
        yet, so there are as many healthy ones as NICs that can carry them.
        """
        number, able = able_nics(host, network, self._ledger)
        if network.mode is not Mode.PASSTHRU:
            return dict.fromkeys(block, bool(able))
        lowers = {
            entry.ifindex: entry.lower_ifindex
            for entry in self._ledger.entries()
            if entry.definition == network.name
        }
        devices = block[:number]

        def rank(ifindex: int) -> int:
            if ifindex not in lowers:
                return 1
            return 0 if lowers[ifindex] in able else 2

        healthy = set(sorted(devices, key=rank)[: len(able)])
        return {ifindex: ifindex in healthy for ifindex in devices}

    def _name_fault(self, name: str) -> str:
        if not _RESOURCE_NAME.fullmatch(name):
            return (
                f"it is no resource {DOMAIN}/{name}: Kubernetes allows 63 characters, of which the"
                " last is a letter or a digit"
            )
        path = os.fsencode(socket_path(self._folder, name))
        if len(path) > _MAX_SOCKET_PATH:
            return f"it is no resource: {os.fsdecode(path)} is too long for a socket"
        return ""

    def _complain(self, complaints: dict[str, str]) -> None:
        """Say what is wrong with definitions when it is new, and when it is over."""
        for name, complaint in complaints.items():
            if self._complaints.get(name) != complaint:
                log.error("network %s: %s", name, complaint)
        for name in self._complaints.keys() - complaints.keys():
            log.info("network %s: nothing is wrong with it any more", name)
        self._complaints = complaints
