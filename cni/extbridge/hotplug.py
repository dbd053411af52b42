"""Hot-plug: one more NIC in a pod that runs, and in its QEMU; and away with it again.

The NIC is an attachment like those of ADD. In the ledger it bears the container ID, the network's
name and the CNI_IFNAME of one that ADD has made in the pod, so the runtime's DEL and GC of that one
free it too. Its tap's holder is the QEMU that it is plugged into, the process that listens at the
QMP socket: its lease ends with that process, as one of a launcher does.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import struct
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import (
    AsyncExitStack,
    ExitStack,
    asynccontextmanager,
    contextmanager,
    suppress,
)
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from qemu.qmp import ExecuteError, QMPClient, QMPError

from extbridge.attachment import (
    attach,
    detach,
    detach_wherever,
    free_ifname,
    opened_namespace,
    opened_pod,
    sweep,
    undo_attachment,
)
from extbridge.handoff import Tap, take_taps
from extbridge.kernel.netlink import NETLINK_ROUTE, Netlink
from extbridge.kernel.netns import netns_inode, opened_netns
from extbridge.ledger import Entry, Holder, Ledger
from extbridge.network.addresses import parse_ips
from extbridge.network.definition import Handoff
from extbridge.network.mac import parse_mac
from extbridge.network.wanted import WantedNic, wanted_nics
from extbridge.nics import usable_nics
from extbridge.node.launcher import qemu_nic
from extbridge.node.peers import netns_of
from extbridge.plugin import Node, draft_entry
from extbridge.spec import versions
from extbridge.spec.errors import (
    InvalidEnvironment,
    IoFailure,
    NameTaken,
    NotPermitted,
    QemuRefused,
    TapHeld,
    UnknownContainer,
    UnsupportedField,
)
from extbridge.spec.fields import get_object, get_objects, get_str, printable
from extbridge.spec.request import Request, Verb, find_ifname_fault, parse_request

log = logging.getLogger(__name__)

ANSWER_SECONDS: Final = 10.0
"""How long QEMU may take for one command, or to greet who connects."""

_MAX_LISTED = 20
"""Pods or NICs that an error names."""

_UCRED = struct.Struct("=iII")

_WITH_ID: Final = "/machine/peripheral"
_WITHOUT_ID: Final = "/machine/peripheral-anon"
"""Where QEMU's objects have the devices that somebody asked for."""

_DELETED: Final = "DEVICE_DELETED"
_UNPLUG_REFUSED: Final = "DEVICE_UNPLUG_GUEST_ERROR"

_PORT_HINT: Final = (
    "QEMU needs a slot for it: a free root port that has an ID, such as -device"
    " pcie-root-port,id=spare1,chassis=101, or a machine whose PCI bus can hot-plug (pc)"
)


@dataclass(frozen=True, slots=True)
class AskedNic:
    """What is asked for; None and empty: as an ADD that says nothing of it gets it."""

    network: str
    interface: str | None = None
    mac: str | None = None
    ips: tuple[str, ...] = ()


def plug_nic(
    node: Node,
    pod: str,
    asked: AskedNic,
    *,
    model: str,
    cni_path: str,
    qmp: str | None = None,
    netns: str | None = None,
) -> Entry:
    """Make one more NIC in the pod, and plug it into the QEMU at the socket `qmp`, if given.

    `pod` is its namespace/name, container ID, or the MAC or name of a NIC of its own; `model` is
    QEMU's name of the device; `cni_path` has the folders of IPAM plugins, separated by colons;
    `netns` is where the pod's namespace is seen from here, if not where ADD saw it.
    On any failure nothing is left. Raises CniError and OSError.
    """
    beside = _added_nic(_container(node.ledger, pod), pod)
    request, nic = _wanted(asked, beside, cni_path, node.networks_dir)

    async def plug() -> Entry:
        async with AsyncExitStack() as closing:
            there = closing.enter_context(_opened_netns(netns, beside))
            qemu, bus = None, None
            if qmp is not None:
                qemu = await closing.enter_async_context(_connected(qmp))
                _refuse_stranger(qemu, beside, node.ledger)
                bus = await qemu.free_port()
            holder = None if qemu is None else qemu.holder
            undo = closing.enter_context(ExitStack())
            entry = _made(node, request, nic, beside=beside, holder=holder, netns=there)
            undo.callback(_unmake_failed, entry, node, there)
            if qemu is not None:
                ifnames = (entry.ifname,)
                with take_taps(there, qemu.holder, ledger=node.ledger, ifnames=ifnames) as [tap]:
                    await qemu.plug(tap, _device_name(entry), model, bus)
            undo.pop_all()
        return entry

    return asyncio.run(plug())


def unplug_nic(
    node: Node,
    pod: str,
    nic: str,
    *,
    qmp: str | None = None,
    netns: str | None = None,
    seconds: float,
) -> Entry:
    """Take a NIC that plug_nic made out of the QEMU at the socket `qmp`, if given, and unmake it.

    `nic` is its name or MAC; the guest has so many seconds to let go of it, and by PCIe's rules
    waits for five (pciehp). `pod` and `netns` are
    plug_nic's. What fails leaves the NIC in the ledger, to be tried again. Raises CniError and
    OSError.
    """
    entry = _hotplugged(_container(node.ledger, pod), nic)
    holder = entry.holder if entry.holder is not None and entry.holder.alive() else None
    if qmp is None and holder is not None:
        raise _held(entry, holder, "give the socket of its QMP with --qmp, or end it first")

    async def unplug(socket_path: str) -> None:
        async with _connected(socket_path) as qemu:
            if holder is None:
                _refuse_stranger(qemu, entry, node.ledger)
            elif holder != qemu.holder:
                raise _held(entry, holder, f"{qmp} is of process {qemu.holder.pid}")
            await qemu.unplug(entry.mac, _device_name(entry), seconds)

    with ExitStack() as closing:
        there = None
        if netns is not None:
            there = closing.enter_context(_opened_netns(netns, entry))
        if qmp is not None:
            asyncio.run(unplug(qmp))
        _unmake(entry, node, there)
    return entry


def _container(ledger: Ledger, name: str) -> list[Entry]:
    """The attachments of the one container that is called so in any of the ways."""
    entries = list(ledger.entries())
    found = {
        entry.container_id: entry.pod
        for entry in entries
        if name in (entry.container_id, entry.pod, entry.mac, entry.ifname)
    }
    if not found:
        pods = _listed(entry.pod or entry.container_id for entry in entries)
        raise UnknownContainer(
            f"the ledger knows no pod, container, MAC or NIC {name}",
            f"there is {pods}" if pods else "no pod of this node has a NIC of extbridge",
        )
    if len(found) > 1:
        which = _listed(" of ".join(filter(None, whose)) for whose in sorted(found.items()))
        raise UnsupportedField(f"{name} is of {len(found)} containers", f"say which: {which}")
    [container_id] = found
    return [entry for entry in entries if entry.container_id == container_id]


def _added_nic(entries: Sequence[Entry], pod: str) -> Entry:
    """The NIC that the new one is to go with."""
    added = [entry for entry in entries if entry.done and not entry.hotplugged]
    if not added:
        raise UnknownContainer(
            f"{pod} has no NIC that ADD made", "the runtime's DEL would leave the new one"
        )
    return min(added, key=lambda entry: (len(entry.ifname), entry.ifname))


def _hotplugged(entries: Sequence[Entry], nic: str) -> Entry:
    asked = [entry for entry in entries if nic.lower() in (entry.mac, entry.ifname.lower())]
    ours = [entry for entry in asked if entry.hotplugged]
    if ours:
        return ours[0]
    plugged = _listed(f"{it.ifname} ({it.mac})" for it in entries if it.hotplugged) or "none"
    hint = f"those that were hot-plugged: {plugged}"
    if asked:
        raise UnsupportedField(f"{nic} was made by the runtime's ADD, and goes with its DEL", hint)
    raise UnknownContainer(f"the pod has no NIC {nic}", hint)


def _wanted(
    asked: AskedNic, beside: Entry, cni_path: str, networks_dir: str
) -> tuple[Request, WantedNic]:
    """The request by which an ADD would make the NIC, and what that asks for."""
    if asked.interface is not None:
        fault = find_ifname_fault(asked.interface)
        if fault:
            raise InvalidEnvironment(f"--interface is {asked.interface!r}", fault)
    runtime: dict[str, object] = {}
    if asked.mac is not None:
        runtime["mac"] = parse_mac(asked.mac, field="--mac")
    if asked.ips:
        runtime["ips"] = list(parse_ips(list(asked.ips), where="--ip"))
    namespace, _, name = beside.pod.partition("/")
    args = {"NAMESPACE": namespace, "NAME": name, "UID": beside.pod_uid}
    told = [f"K8S_POD_{key}={value}" for key, value in args.items() if value]
    request = parse_request(
        {
            "CNI_COMMAND": Verb.ADD,
            "CNI_CONTAINERID": beside.container_id,
            "CNI_NETNS": beside.netns,
            "CNI_IFNAME": beside.cni_ifname,
            # As every runtime says it: IPAM plugins refuse those that they do not know.
            "CNI_ARGS": ";".join(("IgnoreUnknown=1", *told)),
            "CNI_PATH": cni_path,
        },
        json.dumps(
            {
                "cniVersion": versions.NEWEST,
                "name": beside.network,
                "type": "extbridge",
                "network": asked.network,
                "runtimeConfig": runtime,
            }
        ).encode(),
    )
    [nic] = wanted_nics(request, networks_dir)
    return request, replace(nic, ifname=asked.interface)


@contextmanager
def _opened_netns(path: str | None, entry: Entry) -> Iterator[int]:
    """The namespace in which the entry's pod is, at the path where one is given."""
    with opened_netns(path) if path is not None else opened_namespace(entry) as netns:
        if netns is None or netns_inode(netns) != entry.netns_inode:
            raise InvalidEnvironment(
                f"the network namespace of {entry.pod or entry.container_id} is not at"
                f" {path or entry.netns}",
                "give a path with --netns, such as /proc/PID/ns/net of a process of the pod",
            )
        yield netns


def _made(
    node: Node,
    request: Request,
    nic: WantedNic,
    *,
    beside: Entry,
    holder: Holder | None,
    netns: int,
) -> Entry:
    """Make the NIC, which is `holder`'s from the first: a launcher would take it otherwise."""
    with ExitStack() as closing:
        host = closing.enter_context(Netlink(NETLINK_ROUTE))
        held = closing.enter_context(node.ledger.hold(beside.container_id))
        pod = closing.enter_context(opened_pod(netns))
        entries = held.entries()
        if all(entry.ifindex != beside.ifindex for entry in entries):
            raise UnknownContainer(
                f"{beside.ifname} of {beside.container_id} has gone meanwhile", "the pod has ended"
            )
        ifname = free_ifname(nic.ifname, "", pod.route)
        if any(entry.ifname == ifname for entry in entries):
            raise NameTaken(
                f"the ledger has an attachment named {ifname} in this pod, whose link is gone",
                "ask for another name, or delete that attachment first",
            )
        draft = replace(draft_entry(request, nic, ifname, netns), hotplugged=True, holder=holder)
        if holder is not None:
            # A device node would have to be mounted into a container that runs.
            draft = replace(draft, handoff=Handoff.FD)
        return attach(
            draft,
            usable_nics(host, nic.network, node.ledger),
            ledger=node.ledger,
            held=held,
            host=host,
            pod=pod,
            steps=request.steps,
            host_process=node.host_process,
        )


def _unmake(entry: Entry, node: Node, netns: int | None) -> None:
    with node.ledger.hold(entry.container_id) as held:
        if all(it.ifindex != entry.ifindex for it in held.entries()):
            return
        if netns is None:
            detach_wherever(entry, held=held, host_process=node.host_process)
            return
        with opened_pod(netns) as pod:
            detach(entry, held=held, pod=pod, host_process=node.host_process)
            sweep(pod)


def _unmake_failed(entry: Entry, node: Node, netns: int) -> None:
    with node.ledger.hold(entry.container_id) as held, opened_pod(netns) as pod:
        if any(it.ifindex == entry.ifindex for it in held.entries()):
            undo_attachment(entry, held=held, pod=pod, host_process=node.host_process)


def _refuse_stranger(qemu: _Qemu, entry: Entry, ledger: Ledger) -> None:
    """Promise 4: a tap is for who stands in the pod, or has taps of it already, as of root's."""
    if netns_of(qemu.holder.pid) == entry.netns_inode:
        return
    if any(it.holder == qemu.holder for it in ledger.of(entry.container_id)):
        return
    raise NotPermitted(
        f"process {qemu.holder.pid}, which listens at {qemu.path}, neither stands in the pod nor"
        " has a tap of it",
        "give the QMP socket of the pod's own QEMU",
    )


def _held(entry: Entry, holder: Holder, hint: str) -> TapHeld:
    return TapHeld(f"the tap of {entry.ifname} is held by process {holder.pid}", hint)


def _device_name(entry: Entry) -> str:
    """The ID of netdev and device: no other attachment of the node has it."""
    return f"extbridge-{entry.ifindex}"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(list(dict.fromkeys(names))[:_MAX_LISTED])


@asynccontextmanager
async def _connected(path: str) -> AsyncIterator[_Qemu]:
    """QEMU at the other end of the socket, for the length of the block.

    Raises QemuRefused, also for what QEMU refuses in the block; IoFailure where there is none.
    """
    # What it would log, the errors say.
    logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL + 1)
    client = QMPClient()
    connection, holder = _connect(path)
    with connection:
        try:
            try:
                async with asyncio.timeout(ANSWER_SECONDS):
                    await client.connect(connection)
            except TimeoutError as error:
                raise QemuRefused(
                    f"nobody answers at {path} in {ANSWER_SECONDS:g} s",
                    "QMP serves one at a time: give QEMU a socket of its own for this (-qmp)",
                ) from error
            # Asked after its greeting: had it ended before, the number could be another's.
            if not holder.alive():
                raise QemuRefused(f"process {holder.pid}, which listened at {path}, has ended")
            yield _Qemu(client, holder, path)
        except ExecuteError as error:
            command = error.sent.get("execute")
            raise QemuRefused(f"QEMU refuses {command}: {printable(str(error))}") from error
        except QMPError as error:
            raise QemuRefused(
                f"{path}: {printable(str(error))}",
                "it has to be a QMP socket, and QEMU has to live",
            ) from error
        finally:
            await _disconnect(client)


def _connect(path: str) -> tuple[socket.socket, Holder]:
    """A connection to the socket, and the process that listens there (man 7 unix)."""
    with ExitStack() as undo:
        connection = undo.enter_context(socket.socket(socket.AF_UNIX))
        connection.settimeout(ANSWER_SECONDS)
        try:
            # The paths of containers' files are often longer than an address may be.
            looked_at = os.open(path, os.O_PATH | os.O_CLOEXEC)
            try:
                connection.connect(f"/proc/self/fd/{looked_at}")
            finally:
                os.close(looked_at)
        except OSError as error:
            raise IoFailure(
                f"{path}: {error.strerror or error}",
                "give the socket that QEMU was started with (-qmp unix:…,server=on,wait=off); in a"
                " container's files it is below /proc/PID/root",
            ) from error
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        pid, _, _ = _UCRED.unpack(credentials)
        if pid == 0:
            raise NotPermitted(
                f"the process that listens at {path} cannot be seen from here",
                "run this in the node's own process namespace",
            )
        try:
            holder = Holder.of(pid)
        except ProcessLookupError as error:
            raise QemuRefused(
                f"process {pid}, which made the socket {path}, has ended",
                "the tap's holder has to be the process that made it: QEMU itself",
            ) from error
        undo.pop_all()
        return connection, holder


@dataclass(frozen=True, slots=True)
class _Qemu:
    """A QEMU that answers; `holder` is its process. Its methods raise QMPError and QemuRefused."""

    client: QMPClient
    holder: Holder
    path: str

    async def run(self, command: str, arguments: Mapping[str, object]) -> object:
        """Run the command; ExecuteError says that it did nothing."""
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                return await self.client.execute(command, arguments)
        except TimeoutError as error:
            raise QemuRefused(f"QEMU does not answer {command} in {ANSWER_SECONDS:g} s") from error

    async def free_port(self) -> str | None:
        """The bus of a PCIe port that is free and can hot-plug; None where there is none.

        Only of those with an ID: the bus of another has a name that the root bus may have too.
        """
        for path in await self._devices(_WITH_ID):
            has = await self._properties(path)
            bus = next((it for it, kind in has.items() if kind == "child<PCIE>"), None)
            if bus is None or "hotplug" not in has or await self._get(path, "hotplug") is not True:
                continue
            if not any(it.startswith("child[") for it in await self._properties(f"{path}/{bus}")):
                return bus
        return None

    async def plug(self, tap: Tap, name: str, model: str, bus: str | None) -> None:
        """Give the tap to QEMU as a device called `name`; on any failure QEMU has none of it."""
        fds = {f"{name}.{n}": fd for n, fd in enumerate(tap.fds)}
        vhost_fds = {f"{name}.vhost{n}": fd for n, fd in enumerate(tap.vhost_fds)}
        netdev, device = qemu_nic(tap, name, model, [*fds], [*vhost_fds])
        # It is no NIC to boot from, and QEMU may not see the ROM's file any more (-chroot).
        device |= {"id": name, "romfile": ""} | ({} if bus is None else {"bus": bus})
        async with AsyncExitStack() as undo:
            for fdname, fd in (fds | vhost_fds).items():
                self.client.send_fd_scm(fd)
                named = {"fdname": fdname}
                await self._step(undo, "getfd", named, partial(self._try, "closefd", named))
            named = {"id": name}
            await self._step(undo, "netdev_add", netdev, partial(self._try, "netdev_del", named))
            try:
                await self._step(undo, "device_add", device, partial(self._try_unplug, name))
            except ExecuteError as error:
                raise QemuRefused(
                    f"QEMU refuses device_add: {printable(str(error))}",
                    _PORT_HINT if bus is None else "",
                ) from error
            undo.pop_all()

    async def unplug(self, mac: str, name: str, seconds: float) -> None:
        """Take out the device with this MAC, if there is one, and its netdev, `name` if unknown.

        By MAC, because after a restart in the same pod QEMU has the NIC from its launcher.
        """
        for path in [*await self._devices(_WITH_ID), *await self._devices(_WITHOUT_ID)]:
            has = await self._properties(path)
            if {"mac", "netdev"} <= has.keys() and await self._get(path, "mac") == mac:
                netdev = await self._get(path, "netdev")
                await self._delete(path, seconds)
                name = str(netdev or name)
                break
        # Where the guest has let go of it after a former attempt, it may be gone too.
        with suppress(ExecuteError):
            await self.run("netdev_del", {"id": name})

    async def _delete(self, path: str, seconds: float) -> None:
        """Delete the device at the path of QEMU's objects, once the guest has let go of it."""
        with self.client.listener((_DELETED, _UNPLUG_REFUSED)) as events:
            try:
                await self.run("device_del", {"id": path})
            except ExecuteError as error:
                # A former attempt may have asked the guest (qmp_device_del).
                if "in the process of unplug" not in str(error):
                    raise
            try:
                async with asyncio.timeout(seconds):
                    async for event in events:
                        if get_str(get_object(event, "data") or {}, "path") == path:
                            break
            except TimeoutError as error:
                raise QemuRefused(
                    f"the guest has not let go of it in {seconds:g} s",
                    "PCI hot-plug needs a guest that runs and listens (acpiphp, pciehp): detach it"
                    " again when it does, or end the VM",
                ) from error
            if event["event"] == _UNPLUG_REFUSED:
                raise QemuRefused("the guest refuses to let go of it", "see what the guest says")

    async def _step(
        self,
        undo: AsyncExitStack,
        command: str,
        arguments: Mapping[str, object],
        undone: Callable[[], Awaitable[None]],
    ) -> None:
        try:
            await self.run(command, arguments)
        except ExecuteError:
            raise
        except BaseException:
            # Nobody knows whether it was done.
            await undone()
            raise
        undo.push_async_callback(undone)

    async def _try(self, command: str, arguments: Mapping[str, object]) -> None:
        """Undo what can be undone: the failure that led here is the one to tell."""
        try:
            await self.run(command, arguments)
        except QemuRefused as error:
            log.warning("rollback in QEMU: %s", error)
            # What is asked next would have to wait as long.
            await _disconnect(self.client)
        except QMPError:
            pass

    async def _try_unplug(self, name: str) -> None:
        try:
            await self._delete(f"{_WITH_ID}/{name}", ANSWER_SECONDS)
        except (QMPError, QemuRefused) as error:
            log.warning("rollback of the device %s in QEMU: %s", name, printable(str(error)))

    async def _devices(self, where: str) -> list[str]:
        has = await self._properties(where)
        return [f"{where}/{name}" for name, kind in has.items() if kind.startswith("child<")]

    async def _properties(self, path: str) -> dict[str, str]:
        """The object's properties, each with its type; what it consists of is among them."""
        listed = await self.run("qom-list", {"path": path})
        return {
            get_str(it, "name") or "": get_str(it, "type") or ""
            for it in get_objects({"qom-list": listed}, "qom-list") or ()
        }

    async def _get(self, path: str, name: str) -> object:
        return await self.run("qom-get", {"path": path, "property": name})


async def _disconnect(client: QMPClient) -> None:
    # It says of a connection that was lost, why.
    with suppress(QMPError, OSError, EOFError):
        async with asyncio.timeout(ANSWER_SECONDS):
            await client.disconnect()
