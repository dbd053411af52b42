"""Network namespaces: opened by path, told apart, entered by one thread for a moment."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_CLONE_NEWNET = 0x40000000
_NS_GET_NSTYPE = 0xB703

_OWN = "/proc/thread-self/ns/net"

_NOTHING_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)

# os.setns came with Python 3.12.
_libc = ctypes.CDLL(None, use_errno=True)


def open_netns(path: str) -> int | None:
    """An fd of the network namespace at `path`, which the caller owns; None where there is none.

    None also for a plain file: a namespace's mount point stays when its mount has gone. The path is
    looked at before it is opened: to open a FIFO would hang, to open a device may act.
    """
    try:
        looked_at = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in _NOTHING_THERE:
            return None
        raise
    try:
        if not _is_namespace(looked_at):
            return None
        netns = os.open(f"/proc/self/fd/{looked_at}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(looked_at)
    if not is_netns(netns):
        os.close(netns)
        return None
    return netns


@contextmanager
def opened_netns(path: str) -> Iterator[int | None]:
    """The fd of `open_netns` for the length of the block."""
    netns = open_netns(path)
    try:
        yield netns
    finally:
        if netns is not None:
            os.close(netns)


def is_netns(fd: int) -> bool:
    """Whether the fd is of a network namespace."""
    return _is_namespace(fd) and fcntl.ioctl(fd, _NS_GET_NSTYPE) == _CLONE_NEWNET


def netns_inode(netns: int) -> int:
    """The number that tells living namespaces apart (man 7 namespaces); reused after death."""
    return os.fstat(netns).st_ino


def is_own(netns: int) -> bool:
    """Whether `netns` is the namespace that the calling thread stands in."""
    return netns_inode(netns) == os.stat(_OWN).st_ino


def processes_in(inode: int) -> list[int]:
    """The processes that stand in the namespace with this number, as far as /proc shows them."""
    found = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        # One may have ended since the names were read.
        with suppress(OSError):
            if os.stat(f"/proc/{name}/ns/net").st_ino == inode:
                found.append(int(name))
    return found


def _is_namespace(fd: int) -> bool:
    return os.fstat(fd).st_dev == _nsfs()


@functools.cache
def _nsfs() -> int:
    # Every namespace file lies on the one nsfs of the kernel (fs/nsfs.c, nsfs_mnt).
    return os.stat(_OWN).st_dev


@contextmanager
def inside(netns: int) -> Iterator[None]:
    """The calling thread stands in `netns` for the length of the block; other threads do not."""
    own = os.open(_OWN, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _setns(netns)
        try:
            yield
        finally:
            _return(own)
    finally:
        os.close(own)


@contextmanager
def new_netns() -> Iterator[int]:
    """An fd of a new namespace that nothing else keeps; raises OSError.

    So it ends, and all that is in it, with the block, and with the process however that ends.
    """
    own = os.open(_OWN, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc.unshare(_CLONE_NEWNET) != 0:
            code = ctypes.get_errno()
            raise OSError(code, f"unshare of a network namespace: {os.strerror(code)}")
        try:
            netns = os.open(_OWN, os.O_RDONLY | os.O_CLOEXEC)
        finally:
            _return(own)
    finally:
        os.close(own)
    try:
        yield netns
    finally:
        os.close(netns)


def _return(own: int) -> None:
    try:
        _setns(own)
    except OSError:
        # A thread left in a pod's namespace would serve the next request from there.
        os.abort()


def _setns(netns: int) -> None:
    if _libc.setns(netns, _CLONE_NEWNET) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"setns: {os.strerror(code)}")
