"""A node's NIC, the switch outside and the pods, made of namespaces, veth pairs and a bridge.

Everything here is made and asked with iproute2, not with our own netlink code: what judges
extbridge must not share its mistakes.
"""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import select
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from extbridge.kernel.netns import inside

_CLONE_NEWNS = 0x00020000
_CLONE_NEWNET = 0x40000000
_ETH_P_ALL = 0x0003

_NETNS_FOLDER: Final = "/run/netns"

# os.unshare came with Python 3.12.
_libc = ctypes.CDLL(None, use_errno=True)


class LabFailure(Exception):
    """A program that the lab is built with failed; the message is its own."""


@dataclass(frozen=True, slots=True)
class Nic:
    """A NIC of the node: a veth whose other end, `port`, is a port of the switch."""

    name: str
    port: str
    mac: str


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame as a packet socket saw it; `sent` is seen from the interface the socket is bound to.

    On a switch port, `sent` frames go to the node, the others came from there.
    """

    data: bytes
    sent: bool


def become_node() -> None:
    """Make the calling process a node of its own: empty network namespace, own /run/netns and /sys.

    No NIC of the machine is in reach afterwards, and whatever the process leaves behind, even when
    it is killed, is gone with the last process in there. Raises RuntimeError where other threads
    run, for they would stay behind (man 2 unshare), and OSError EPERM without root.
    """
    if len(os.listdir("/proc/self/task")) != 1:
        raise RuntimeError("become_node: other threads are running and would stay outside")
    if _libc.unshare(_CLONE_NEWNS | _CLONE_NEWNET) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"unshare: {os.strerror(code)}")
    run("mount", "--make-rprivate", "/")
    os.makedirs(_NETNS_FOLDER, exist_ok=True)
    run("mount", "-t", "tmpfs", "-o", "mode=0755", "extbridge-netns", _NETNS_FOLDER)
    # A sysfs shows the links of the namespace it was mounted in; control groups are mounted below.
    cgroups = os.open("/sys/fs/cgroup", os.O_PATH | os.O_CLOEXEC)
    try:
        run("mount", "-t", "sysfs", "extbridge-sys", "/sys")
        # Canonicalized, the path would name the empty folder of the new sysfs.
        run("mount", "--no-canonicalize", "--rbind",
            f"/proc/{os.getpid()}/fd/{cgroups}", "/sys/fs/cgroup")  # fmt: skip
    finally:
        os.close(cgroups)
    run("ip", "link", "set", "lo", "up")


def run(*argv: str, netns: str = "") -> str:
    """What the program printed, run inside the namespace at the path `netns` where one is given.

    Raises LabFailure when it exits with anything but 0.
    """
    inside_of = ("nsenter", f"--net={netns}", "--") if netns else ()
    done = subprocess.run(
        (*inside_of, *argv), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise LabFailure(f"{' '.join(argv)}: {done.stderr.strip() or f'exit {done.returncode}'}")
    return done.stdout


@contextmanager
def within(netns: str) -> Iterator[None]:
    """The calling thread stands in the namespace at the path; sockets that it opens stay there."""
    there = os.open(netns, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with inside(there):
            yield
    finally:
        os.close(there)


def receive(packets: socket.socket, *, seconds: float) -> list[Frame]:
    """The frames that are waiting at the socket, and those that come within so many seconds."""
    deadline = time.monotonic() + seconds
    poll = select.poll()
    poll.register(packets, select.POLLIN)
    frames: list[Frame] = []
    while poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        data, address = packets.recvfrom(1 << 16)
        frames.append(Frame(data, sent=address[2] == socket.PACKET_OUTGOING))
    return frames


class Lab:
    """A node's surroundings, in the namespace of the process that makes it; gone when it closes.

    Names start with `xb` and four random digits, so two labs do not meet. Namespaces are given as
    paths.
    """

    def __init__(self) -> None:
        self._prefix = f"xb{secrets.token_hex(2)}"
        self._nics = 0
        self._stack = ExitStack()
        try:
            self.switch = self._namespace("sw")
            # The switch itself has nothing to say on its ports.
            _write_sysctl("net/ipv6/conf/default/disable_ipv6", "1", netns=self.switch)
            run("ip", "link", "add", "br0", "type", "bridge", "stp_state", "0",
                "mcast_snooping", "0", netns=self.switch)  # fmt: skip
            run("ip", "link", "set", "br0", "up", netns=self.switch)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove everything, what was made last first; a second time does nothing."""
        self._stack.close()

    def nic(self, *, mtu: int = 1500, reflective: bool = True) -> Nic:
        """Plug the node into the switch once more; the NIC is up and never speaks by itself.

        `reflective`: the switch sends a frame back out of the port it came from where its target
        is there (IEEE 802.1Qbg reflective relay; for a Linux bridge, hairpin).
        """
        name, port = f"{self._prefix}n{self._nics}", f"{self._prefix}p{self._nics}"
        self._nics += 1
        run("ip", "link", "add", name, "mtu", str(mtu), "type", "veth",
            "peer", "name", port, "mtu", str(mtu), "netns", self.switch)  # fmt: skip
        self._stack.callback(_forget_link, name)
        # The node itself would speak here too: neighbour discovery, multicast listener reports.
        _write_sysctl(f"net/ipv6/conf/{name}/disable_ipv6", "1")
        self._plug(port)
        (link,) = json.loads(run("ip", "-json", "link", "show", name))
        nic = Nic(name, port, link["address"])
        self.set_reflective(nic, on=reflective)
        run("ip", "link", "set", name, "up")
        return nic

    def set_reflective(self, nic: Nic, *, on: bool) -> None:
        """Switch reflective relay of the NIC's port on or off."""
        run("bridge", "link", "set", "dev", nic.port, "hairpin", "on" if on else "off",
            netns=self.switch)  # fmt: skip

    def pod(self, name: str) -> str:
        """Make a pod's network namespace, with nothing but its loopback; the answer is its path."""
        return self._namespace(name)

    def neighbour(self, name: str, *addresses: str, mtu: int = 1500) -> str:
        """Make a host on the switch, outside of the node, with these addresses on its eth0."""
        netns = self._namespace(name)
        port = f"{self._prefix}{name}"
        run("ip", "link", "add", port, "mtu", str(mtu), "type", "veth",
            "peer", "name", "eth0", "mtu", str(mtu), "netns", netns,
            netns=self.switch)  # fmt: skip
        self._plug(port)
        # Addresses are usable at once, and none is there but those.
        run("ip", "link", "set", "eth0", "addrgenmode", "none", netns=netns)
        run("ip", "link", "set", "eth0", "up", netns=netns)
        for address in addresses:
            run("ip", "address", "add", address, "dev", "eth0", "nodad", netns=netns)
        return netns

    def packets(self, netns: str, interface: str) -> socket.socket:
        """A packet socket that sends whole frames out of the interface and hears all that pass."""
        with within(netns):
            # Protocol 0 hears nothing until it is bound, so nothing of other interfaces.
            packets = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        self._stack.enter_context(packets)
        packets.bind((interface, _ETH_P_ALL))
        return packets

    def _namespace(self, name: str) -> str:
        full = f"{self._prefix}-{name}"
        run("ip", "netns", "add", full)
        path = f"{_NETNS_FOLDER}/{full}"
        self._stack.callback(_forget_namespace, path)
        run("ip", "link", "set", "lo", "up", netns=path)
        return path

    def _plug(self, port: str) -> None:
        run("ip", "link", "set", port, "master", "br0", "up", netns=self.switch)


def _forget_link(name: str) -> None:
    if any(name == there for _, there in socket.if_nameindex()):
        run("ip", "link", "delete", name)


def _forget_namespace(path: str) -> None:
    if os.path.exists(path):
        run("ip", "netns", "delete", os.path.basename(path))


def _write_sysctl(key: str, value: str, *, netns: str = "") -> None:
    run("sh", "-c", 'echo "$1" > "/proc/sys/$2"', "sh", value, key, netns=netns)
