"""The broker: gives the process that asks the taps of the namespace it stands in, and no others.

Nothing is believed but the kernel: who asks, where it stands, which links are there, what is behind
a device node. What a request says only shapes the command that goes back.
"""

from __future__ import annotations

import errno
import json
import os
import select
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Final

from extbridge.handoff import Tap, take_taps
from extbridge.kernel.netns import is_own
from extbridge.ledger import Holder, Ledger
from extbridge.network.addresses import addressing_to_object
from extbridge.node import wire
from extbridge.node.launcher import DEFAULT_MODEL, MODEL_VARIABLE, render_command
from extbridge.spec.errors import InvalidEnvironment, NotPermitted

IFNAMES_VARIABLE: Final = "EXTBRIDGE_IFNAMES"

_SO_PEERPIDFD = 77
_UCRED = struct.Struct("=iII")


@dataclass(frozen=True, slots=True)
class Peer:
    """The process at the other end, pinned: `pidfd` is its owner's to close."""

    pid: int
    uid: int
    pidfd: int

    def lives(self) -> bool:
        """Whether the process has not ended; while it has not, its number is nobody else's."""
        # A pidfd is readable from the end of its process on (man 2 pidfd_open).
        ended = select.poll()
        ended.register(self.pidfd, select.POLLIN)
        return not ended.poll(0)


@dataclass(frozen=True, slots=True)
class Lease:
    """The life of a process that took taps; `pidfd` is its owner's to close."""

    holder: Holder
    container_ids: frozenset[str]
    pidfd: int


@dataclass(frozen=True, slots=True)
class HandOff:
    """What goes to a launcher: frames with fds, which `owned` closes, and the lease on them."""

    frames: list[wire.Sending]
    lease: Lease
    taps: int
    owned: ExitStack


def peer_credentials(connection: socket.socket) -> tuple[int, int]:
    """The (pid, uid) with which the other side connected (man 7 unix, SO_PEERCRED)."""
    answer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, _ = _UCRED.unpack(answer)
    return pid, uid


@contextmanager
def pinned_peer(connection: socket.socket) -> Iterator[Peer]:
    """The process at the other end of the connection, for the length of the block.

    Raises NotPermitted where it cannot be seen or is gone.
    """
    pid, uid = peer_credentials(connection)
    if pid == 0:
        raise NotPermitted(
            "the process that asks stands outside of the agent's process namespace",
            "run the agent with hostPID",
        )
    pidfd = _peer_pidfd(connection, pid)
    if pidfd is None:
        raise _gone(pid)
    try:
        yield Peer(pid, uid, pidfd)
    finally:
        os.close(pidfd)


@contextmanager
def peers_netns(peer: Peer) -> Iterator[int]:
    """The namespace in which the peer stands, opened; raises NotPermitted if the peer is gone."""
    try:
        netns = os.open(f"/proc/{peer.pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError) as error:
        raise _gone(peer.pid) from error
    try:
        # Asked after the opening: had it ended before, the number could have been another's.
        if not peer.lives():
            raise _gone(peer.pid)
        yield netns
    finally:
        os.close(netns)


def is_node_root(connection: socket.socket) -> bool:
    """Whether root asks, from the agent's own network namespace: the only one for `cni.sock`.

    Root in a pod has uid 0 too; it stands in the pod's namespace.
    """
    try:
        with pinned_peer(connection) as peer, peers_netns(peer) as netns:
            return peer.uid == 0 and is_own(netns)
    except NotPermitted:
        return False


def netns_of(pid: int) -> int:
    """The inode of the namespace in which a process stands, 0 if it cannot be told."""
    try:
        return os.stat(f"/proc/{pid}/ns/net").st_ino
    except OSError:
        return 0


def hand_off(peer: Peer, request: wire.Request, ledger: Ledger) -> HandOff:
    """Open the taps of the namespace in which the peer stands, and write its command.

    Raises NotPermitted, UnknownContainer, TapHeld, WrongTap, InvalidEnvironment and OSError; then
    nothing is open, and nothing is held that was not before.
    """
    if request.body.count(b"\0") > wire.MAX_ARGUMENTS:
        raise InvalidEnvironment(
            f"the command has more than {wire.MAX_ARGUMENTS} arguments",
            "QEMU reads options from a file too (-readconfig)",
        )
    with ExitStack() as owned:
        with peers_netns(peer) as netns:
            if is_own(netns):
                raise NotPermitted(
                    "the process that asks stands in the node's own network namespace",
                    "a hostNetwork pod has no NIC of its own; run the VM in a pod that has",
                )
            holder = _holder(peer)
            ifnames = tuple(filter(None, request.environ.get(IFNAMES_VARIABLE, "").split(",")))
            taps = owned.enter_context(take_taps(netns, holder, ledger=ledger, ifnames=ifnames))
        command = _command(request, _renumbered(taps))
        fds = [fd for tap in taps for fd in (*tap.fds, *tap.vhost_fds)]
        frames = [wire.Sending(*frame) for frame in wire.encode_tap_answer(fds, command)]
        lease = Lease(holder, frozenset(tap.container_id for tap in taps), os.dup(peer.pidfd))
        return HandOff(frames, lease, len(taps), owned.pop_all())


def leases_of(ledger: Ledger) -> list[Lease]:
    """The leases that the ledger tells of and that still live; their pidfds are the caller's."""
    containers: dict[Holder, set[str]] = {}
    for entry in ledger.entries():
        if entry.holder is not None:
            containers.setdefault(entry.holder, set()).add(entry.container_id)
    found = []
    for holder, container_ids in containers.items():
        pidfd = _pidfd_of(holder.pid)
        if pidfd is None:
            continue
        # Asked after the opening, so that the pidfd is of the process that was meant.
        if holder.alive():
            found.append(Lease(holder, frozenset(container_ids), pidfd))
        else:
            os.close(pidfd)
    return found


def _holder(peer: Peer) -> Holder:
    try:
        holder = Holder.of(peer.pid)
    except ProcessLookupError as error:
        raise _gone(peer.pid) from error
    # As in peers_netns: the start time could have been a successor's.
    if not peer.lives():
        raise _gone(peer.pid)
    return holder


def _peer_pidfd(connection: socket.socket, pid: int) -> int | None:
    try:
        return connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            return None
    # Before Linux 6.5: whoever has the number now, and the sooner that is asked after the
    # connection was made, the surer it is the one that made it.
    return _pidfd_of(pid)


def _pidfd_of(pid: int) -> int | None:
    """The process's pidfd, which the caller owns; None where no process has this number."""
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        # ENOENT, or EINVAL on older kernels: it is a mere thread's (pidfd_prepare).
        if error.errno in (errno.ESRCH, errno.ENOENT, errno.EINVAL):
            return None
        raise


def _command(request: wire.Request, taps: list[Tap]) -> list[str]:
    argv = wire.decode_strings(request.body)
    if argv:
        model = request.environ.get(MODEL_VARIABLE) or DEFAULT_MODEL
        command = render_command(argv, taps, model=model)
    else:
        # A launcher that execs nothing wants to know what it got.
        command = [json.dumps([describe(tap) for tap in taps])]
    if sum(len(os.fsencode(argument)) + 1 for argument in command) > wire.MAX_TAP_REQUEST_BYTES:
        raise InvalidEnvironment(
            f"the command is longer than {wire.MAX_TAP_REQUEST_BYTES} bytes", "shorten it"
        )
    return command


def describe(tap: Tap) -> dict[str, object]:
    """A tap as JSON for a launcher of its own kind; the numbers are the wire's."""
    return {
        "name": tap.name,
        "mac": tap.mac,
        "mtu": tap.mtu,
        "fds": tap.fds,
        "vhostFds": tap.vhost_fds,
        "addressing": addressing_to_object(tap.addressing),
    }


def _renumbered(taps: list[Tap]) -> list[Tap]:
    """The same taps with the numbers that their fds will have at the launcher."""
    number = iter(range(wire.FIRST_TAP_FD, 1 << 20))
    return [
        replace(
            tap,
            fds=tuple(next(number) for _ in tap.fds),
            vhost_fds=tuple(next(number) for _ in tap.vhost_fds),
        )
        for tap in taps
    ]


def _gone(pid: int) -> NotPermitted:
    return NotPermitted(f"process {pid}, which asked, has ended", "ask again")
