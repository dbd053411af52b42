"""Who asks: the process at the other end of a connection, by the kernel's word alone.

A process may end, and its number become another's, at any moment. So it is pinned by a pidfd, and
whatever has been read by its number counts only if the pinned process still lives afterwards.
"""

from __future__ import annotations

import errno
import functools
import os
import select
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from typing import Final

from extbridge.kernel import netlink
from extbridge.kernel.netlink import Netlink
from extbridge.kernel.netns import inside
from extbridge.spec.errors import NotPermitted

_SO_PEERPIDFD = 77
_UCRED = struct.Struct("=iII")

# linux/sock_diag.h, linux/unix_diag.h.
_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_UDIAG_SHOW_PEER = 0x4
_UNIX_DIAG_PEER = 2
_ANY_COOKIE = 0xFFFFFFFF
_UNIX_DIAG_REQ = struct.Struct("=BBHIIIII")
_UNIX_DIAG_MSG = struct.Struct("=BBBBIII")

_MOST_FDS: Final = 4096
"""How many fds of a process are looked at; a launcher's connection is among its first."""


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


@contextmanager
def pinned_peer(connection: socket.socket) -> Iterator[Peer]:
    """The process at the other end of the connection, for the length of the block.

    Raises NotPermitted where it cannot be seen or is gone.
    """
    # With which it connected (man 7 unix).
    answer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, _ = _UCRED.unpack(answer)
    if pid == 0:
        raise NotPermitted(
            "the process that asks stands outside of the agent's process namespace",
            "run the agent with hostPID",
        )
    pidfd = _peer_pidfd(connection, pid)
    if pidfd is None:
        raise gone(pid)
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
        raise gone(peer.pid) from error
    try:
        # Asked after the opening: had it ended before, the number could have been another's.
        if not peer.lives():
            raise gone(peer.pid)
        yield netns
    finally:
        os.close(netns)


def is_node_root(connection: socket.socket) -> bool:
    """Whether root asks, from the agent's own network namespace: the only one for `cni.sock`.

    Root in a pod has uid 0 too; it stands in the pod's namespace.
    """
    try:
        with pinned_peer(connection) as peer:
            # Asked for before: had it ended by then, the number could have been another's.
            return peer.uid == 0 and netns_of(peer.pid) == _own_netns() and peer.lives()
    except NotPermitted:
        return False


def netns_of(pid: int) -> int:
    """The inode of the namespace in which a process stands, 0 if it cannot be told."""
    try:
        return os.stat(f"/proc/{pid}/ns/net").st_ino
    except OSError:
        return 0


@functools.cache
def _own_netns() -> int:
    return os.stat("/proc/self/ns/net").st_ino


def pidfd_of(pid: int) -> int | None:
    """The process's pidfd, which the caller owns; None where no process has this number."""
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        # ENOENT, or EINVAL on older kernels: it is a mere thread's (pidfd_prepare).
        if error.errno in (errno.ESRCH, errno.ENOENT, errno.EINVAL):
            return None
        raise


def gone(pid: int) -> NotPermitted:
    """What a peer is told, if anybody reads it, that does not live."""
    return NotPermitted(f"process {pid}, which asked, has ended", "ask again")


def _peer_pidfd(connection: socket.socket, pid: int) -> int | None:
    try:
        return connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            return None
    # Before Linux 6.5: whoever has the number now, if it has the other end too.
    pidfd = pidfd_of(pid)
    if pidfd is None:
        return None
    try:
        peer = Peer(pid, 0, pidfd)
        if _holds(pid, _other_end(connection, peer)) and peer.lives():
            return os.dup(pidfd)
    except (NotPermitted, OSError):
        # In doubt it is a successor; also where the kernel has no unix_diag.
        pass
    finally:
        os.close(pidfd)
    return None


def _other_end(connection: socket.socket, peer: Peer) -> int:
    """The inode of the socket with which the peer connected, 0 if that is closed.

    Raises FileNotFoundError where it was not made in the namespace in which the peer stands: both
    ends are of that one (unix_stream_connect), and looked up there (unix_lookup_by_ino).
    """
    ours = os.fstat(connection.fileno()).st_ino
    asked = _UNIX_DIAG_REQ.pack(
        socket.AF_UNIX, 0, 0, 0, ours, _UDIAG_SHOW_PEER, _ANY_COOKIE, _ANY_COOKIE
    )
    with peers_netns(peer) as netns, inside(netns), Netlink(_NETLINK_SOCK_DIAG) as diag:
        (answer,) = diag.request(_SOCK_DIAG_BY_FAMILY, asked, what=f"UNIX_DIAG of inode {ours}")
    found = netlink.attributes(answer[_UNIX_DIAG_MSG.size :])
    return netlink.as_u32(found.get(_UNIX_DIAG_PEER, bytes(4)))


def _holds(pid: int, inode: int) -> bool:
    """Whether a socket is among the first fds of whoever has this number now."""
    sought = f"socket:[{inode}]"
    with os.scandir(f"/proc/{pid}/fd") as fds:
        for fd in islice(fds, _MOST_FDS):
            # It may be closed by now.
            with suppress(FileNotFoundError):
                if os.readlink(fd.path) == sought:
                    return True
    return False
