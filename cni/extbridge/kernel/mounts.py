"""File systems of the kernel's own, mounted where nobody else sees them (fsmount(2), Linux 5.2)."""

from __future__ import annotations

import ctypes
import os

# Numbers of the generic table, the same on every 64-bit architecture (asm-generic/unistd.h).
_SYS_FSOPEN = 430
_SYS_FSCONFIG = 431
_SYS_FSMOUNT = 432
_FSOPEN_CLOEXEC = 1
_FSCONFIG_CMD_CREATE = 6
_FSMOUNT_CLOEXEC = 1

_libc = ctypes.CDLL(None, use_errno=True)


def detached_mount(kind: str) -> int:
    """A directory fd of a new mount of the file system, to which no path leads; the caller's.

    The mount lasts as long as the fd.
    """
    context = _syscall(f"fsopen {kind}", _SYS_FSOPEN, kind.encode(), _FSOPEN_CLOEXEC)
    try:
        _syscall(f"fsconfig {kind}", _SYS_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0)
        return _syscall(f"fsmount {kind}", _SYS_FSMOUNT, context, _FSMOUNT_CLOEXEC, 0)
    finally:
        os.close(context)


def _syscall(what: str, number: int, *arguments: object) -> int:
    result: int = _libc.syscall(number, *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result
