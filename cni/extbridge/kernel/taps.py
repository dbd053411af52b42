"""Taps: the character device behind a macvtap, opened and proven to be the right one.

The node is /dev/tap<ifindex> in the one devtmpfs of the kernel, but an ifindex is unique in its
namespace only: two macvtaps that both have 2 share one node, and it leads to either. So ours have
an ifindex that no node bears yet, and every fd is asked whose it is before it is handed on.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import os
import secrets
import struct
from contextlib import ExitStack
from typing import Final

from extbridge.kernel.links import Link
from extbridge.kernel.mounts import detached_mount
from extbridge.network.definition import FIRST_DEVICE, FIRST_IFINDEX, LAST_IFINDEX
from extbridge.spec.errors import WrongTap

_TUNSETIFF = 0x400454CA
_TUNGETIFF = 0x800454D2
_SIOCGIFHWADDR = 0x8927
_IFF_TAP = 0x0002
_IFF_NO_PI = 0x1000
_IFF_VNET_HDR = 0x4000
_IFF_MULTI_QUEUE = 0x0100
_IFREQ = struct.Struct("=16sH22x")
_HARDWARE_ADDRESS = struct.Struct("=18x6s16x")

_VHOST_NET: Final = "vhost-net"


def unused_ifindex() -> int:
    """An ifindex of our range that no macvtap of this node bears, in whichever namespace.

    Never one that is kept for devices. 28 random bits: that two requests pick the same number
    before either has its node happens once in 270 million, and then the second is refused at
    hand-off, not given the first's tap.
    """
    while True:
        ifindex = FIRST_IFINDEX + secrets.randbelow(FIRST_DEVICE - FIRST_IFINDEX)
        if not has_node(ifindex):
            return ifindex


def has_node(ifindex: int) -> bool:
    """Whether a macvtap with this ifindex is there, in whichever namespace of the node."""
    return _exists(f"tap{ifindex}")


def ifindexes_with_node() -> set[int]:
    """The ifindexes of our range that a macvtap bears, in whichever namespace of the node."""
    folder = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=_device_nodes())
    try:
        numbers = (name.removeprefix("tap") for name in os.listdir(folder) if name[:3] == "tap")
        found = {int(number) for number in numbers if number.isdecimal()}
    finally:
        os.close(folder)
    return {ifindex for ifindex in found if FIRST_IFINDEX <= ifindex <= LAST_IFINDEX}


def give_node(ifindex: int, *, uid: int, gid: int) -> None:
    """Make the tap's device node the user's and group's, so that their QEMU can open it."""
    os.chown(f"tap{ifindex}", uid, gid, dir_fd=_device_nodes())


def open_tap(link: Link, mac: str) -> list[int]:
    """Open every queue of `link`'s tap, verified; the caller owns the fds.

    Stand in the host's namespace: a tap fd pins the one it was opened in (tap_open, sk_alloc), and
    the pod's would outlive the pod for as long as QEMU lives.

    Raises WrongTap if the node answers for another NIC than `link` with the MAC `mac`. The kernel
    would open one queue for several holders; that there is only one is the ledger's to know.
    """
    flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
    if link.tx_queues > 1:
        flags |= _IFF_MULTI_QUEUE
    node = f"tap{link.ifindex}"
    with ExitStack() as stack:
        fds = []
        for _ in range(link.tx_queues):
            fd = os.open(node, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=_device_nodes())
            stack.callback(os.close, fd)
            _verify(fd, link, mac)
            fcntl.ioctl(fd, _TUNSETIFF, _IFREQ.pack(b"", flags))
            fds.append(fd)
        stack.pop_all()
        return fds


def open_vhost(queues: int) -> list[int]:
    """One vhost-net fd a queue, or none where the node has no vhost-net; the caller owns them."""
    with ExitStack() as stack:
        fds = []
        for _ in range(queues):
            try:
                fd = os.open(_VHOST_NET, os.O_RDWR | os.O_CLOEXEC, dir_fd=_device_nodes())
            except OSError as error:
                # ENODEV: a node without a driver, which udev makes so that opening loads it.
                if error.errno in (errno.ENOENT, errno.ENODEV):
                    return []
                raise
            stack.callback(os.close, fd)
            fds.append(fd)
        stack.pop_all()
        return fds


def _verify(fd: int, link: Link, mac: str) -> None:
    answer = fcntl.ioctl(fd, _TUNGETIFF, bytes(_IFREQ.size))
    name = answer[:16].rstrip(b"\0").decode(errors="replace")
    answer = fcntl.ioctl(fd, _SIOCGIFHWADDR, bytes(_HARDWARE_ADDRESS.size))
    found = _HARDWARE_ADDRESS.unpack(answer)[0].hex(":")
    if (name, found) != (link.name, mac):
        raise WrongTap(
            f"the device node of {link.name} ({mac}) answers as {name} ({found})",
            "the guest has changed its MAC, or another macvtap has the same ifindex;"
            " delete the pod and create it again",
        )


def _exists(name: str) -> bool:
    try:
        os.stat(name, dir_fd=_device_nodes())
    except FileNotFoundError:
        return False
    return True


@functools.cache
def _device_nodes() -> int:
    """A directory fd of the kernel's devtmpfs, whatever is mounted on this process's /dev.

    It stays mounted for the life of the process, because to give it back takes as long as to make
    a macvtap.
    """
    return detached_mount("devtmpfs")
