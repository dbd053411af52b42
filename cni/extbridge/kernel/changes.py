"""Changes: that a link, a route or a folder is another than before; not what has changed.

Whoever waits for them reads anew what it wants to know, so none can be missed: not one that the
kernel had no room for, nor one that came while something else was read.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from extbridge.kernel.netlink import NETLINK_ROUTE

# linux/rtnetlink.h, RTMGRP_*.
_LINKS = 0x1
_IPV4_ROUTES = 0x40
_IPV6_ROUTES = 0x400

# linux/inotify.h. The last two are the folder's own.
_IN_CLOSE_WRITE = 0x8
_IN_MOVED_FROM = 0x40
_IN_MOVED_TO = 0x80
_IN_CREATE = 0x100
_IN_DELETE = 0x200
_IN_DELETE_SELF = 0x400
_IN_MOVE_SELF = 0x800
_IN_ONLYDIR = 0x01000000
_WATCHED = (
    _IN_CLOSE_WRITE
    | _IN_MOVED_FROM
    | _IN_MOVED_TO
    | _IN_CREATE
    | _IN_DELETE
    | _IN_DELETE_SELF
    | _IN_MOVE_SELF
    | _IN_ONLYDIR
)

_RECEIVE = 1 << 16

_libc = ctypes.CDLL(None, use_errno=True)


class LinkChanges:
    """Readable when a link or a route of the namespace has changed in which it was made.

    Routes because a pool may be the NICs that the default route leads over.
    """

    def __init__(self) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, NETLINK_ROUTE
        )
        try:
            self._socket.bind((0, _LINKS | _IPV4_ROUTES | _IPV6_ROUTES))
        except BaseException:
            self._socket.close()
            raise

    def fileno(self) -> int:
        """What to wait on; still this object's own."""
        return self._socket.fileno()

    def drain(self) -> None:
        """Read what has come. ENOBUFS says that there was more: it has come all the same."""
        with suppress(BlockingIOError):
            while True:
                try:
                    self._socket.recv(_RECEIVE)
                except OSError as error:
                    if error.errno != errno.ENOBUFS:
                        raise

    def close(self) -> None:
        """Hear no more."""
        self._socket.close()


class FolderChanges:
    """Readable when a file in one of its folders has come, gone or been written (man 7 inotify)."""

    def __init__(self) -> None:
        self._fd: int = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            error = ctypes.get_errno()
            raise OSError(error, f"inotify_init1: {os.strerror(error)}")
        self._watches: set[int] = set()

    def fileno(self) -> int:
        """What to wait on; still this object's own."""
        return self._fd

    def watch(self, folders: Iterable[Path]) -> None:
        """Have these folders and no others; of one that is not there, the nearest above it.

        To be called again after a change, before what is in the folders is read: a folder may be
        another by then. Raises OSError, ENOSPC where the user has no watches left.
        """
        watches = {self._watch(folder) for folder in folders}
        for gone in self._watches - watches:
            # The kernel may have removed it with its folder.
            _libc.inotify_rm_watch(self._fd, gone)
        self._watches = watches

    def _watch(self, folder: Path) -> int:
        path = folder
        while True:
            watch: int = _libc.inotify_add_watch(self._fd, os.fsencode(path), _WATCHED)
            if watch < 0:
                error = ctypes.get_errno()
                if error not in (errno.ENOENT, errno.ENOTDIR):
                    raise OSError(error, f"inotify_add_watch {path}: {os.strerror(error)}")
                path = path.parent
            elif path == folder or not folder.is_dir():
                return watch
            else:
                # It has come after it was missed, and before what is above it was watched.
                path = folder

    def drain(self) -> None:
        """Read what has come."""
        with suppress(BlockingIOError):
            while True:
                os.read(self._fd, _RECEIVE)

    def close(self) -> None:
        """Watch no more."""
        os.close(self._fd)
