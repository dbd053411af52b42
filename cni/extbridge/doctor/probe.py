"""Ask the switch: frames between two macvtaps on one NIC say what becomes of VMs' frames.

In vepa mode each frame leaves the NIC, and comes back only from a switch with reflective relay
(IEEE 802.1Qbg; on a Linux bridge, hairpin). In bridge mode the NIC's own node carries it over.

The frames have the EtherType that IEEE 802 leaves to local experiments, 0x88B5, so no IP stack
looks at them. The macvtaps stand in a namespace that nothing but this process keeps, and go with
it, however it ends.
"""

from __future__ import annotations

import errno
import secrets
import select
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Final

from extbridge.attachment import opened_pod
from extbridge.doctor.finding import Finding, failure, network_on, ok, warning
from extbridge.kernel.links import Link, Macvtap, create_macvtap, delete_link, set_up
from extbridge.kernel.netlink import NETLINK_ROUTE, Netlink
from extbridge.kernel.netns import inside, new_netns
from extbridge.kernel.silence import disable_ipv6
from extbridge.kernel.taps import unused_ifindex
from extbridge.ledger import Ledger
from extbridge.network.definition import Mode
from extbridge.nics import holders_of, usable_nics
from extbridge.spec.errors import CniError, InvalidNetworkConfig
from extbridge.spec.request import find_ifname_fault

ETHERTYPE: Final = 0x88B5
"""Local experimental EtherType 1 (IEEE Std 802)."""

MOST_FRAMES: Final = 20
"""How many are sent at most, all told."""

_NAME: Final = "xbprobe"
_LEAST: Final = 46
"""Octets of payload in the shortest frame."""

_TRIES: Final = 3
_WAIT_SECONDS: Final = 0.3
_NUMBER: Final = struct.Struct("!16sI")


@dataclass(frozen=True, slots=True)
class _End:
    """One of the two macvtaps: its MAC, and a packet socket that is bound to it."""

    mac: bytes
    packets: socket.socket


class _Frames:
    """Sends them, so many at most, and sees what arrives."""

    def __init__(self) -> None:
        self.sent = 0
        self._nonce = secrets.token_bytes(16)

    @property
    def left(self) -> int:
        """How many may still be sent."""
        return MOST_FRAMES - self.sent

    def arrives(self, sender: _End, receiver: _End, octets: int) -> bool:
        """Whether a frame with so much payload arrives; none is sent when none is left."""
        if not self.left:
            return False
        self.sent += 1
        payload = _NUMBER.pack(self._nonce, self.sent).ljust(octets, b"\0")
        header = receiver.mac + sender.mac + struct.pack("!H", ETHERTYPE)
        sender.packets.send(header + payload)
        deadline = time.monotonic() + _WAIT_SECONDS
        readable = select.poll()
        readable.register(receiver.packets, select.POLLIN)
        while readable.poll(max(0.0, deadline - time.monotonic()) * 1000):
            data, (_, _, kind, *_) = receiver.packets.recvfrom(1 << 16)
            if kind != socket.PACKET_OUTGOING and data[len(header) :] == payload:
                return True
        return False


def probe(nic: str, ledger: Ledger) -> Iterator[Finding]:
    """What becomes of frames between two macvtaps on the NIC; raises CniError, OSError."""
    fault = find_ifname_fault(nic)
    if fault:
        raise InvalidNetworkConfig(f"{nic!r} is no NIC's name", fault)
    with Netlink(NETLINK_ROUTE) as host:
        subject = f"probe of {nic}"
        try:
            (lower,) = usable_nics(host, network_on(nic), ledger)
        except CniError as error:
            yield failure(subject, error.message.removeprefix("extbridge.dev: "), error.hint)
            return
        if not lower.carrier:
            yield failure(subject, "no carrier", "check the cable and the switch port")
            return
        frames = _Frames()
        try:
            # First, for it takes two frames of those that may be sent, and none of them leaves.
            yield from _probe_bridge(subject, frames, lower, host)
            yield from _probe_vepa(subject, frames, lower, host)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EBUSY):
                raise
            yield failure(
                subject,
                f"{error.strerror}; on it: {holders_of(lower.ifindex, ledger.entries())}",
                "a NIC that a passthru VM or something else has whole can carry no other",
            )
            return
        yield ok(subject, f"{frames.sent} frames were sent, EtherType 0x{ETHERTYPE:04X}")


def _probe_bridge(subject: str, frames: _Frames, lower: Link, host: Netlink) -> Iterator[Finding]:
    with _pair(lower, Mode.BRIDGE, host) as (one, other):
        both = [frames.arrives(*ends, _LEAST) for ends in ((one, other), (other, one))]
    if all(both):
        yield ok(subject, "mode bridge: two VMs on this NIC can talk")
    else:
        yield failure(
            subject,
            "mode bridge: frames between two VMs on this NIC do not arrive",
            "somebody drops them on this node: look at nftables and tc of the NIC",
        )


def _probe_vepa(subject: str, frames: _Frames, lower: Link, host: Netlink) -> Iterator[Finding]:
    with _pair(lower, Mode.VEPA, host) as (one, other):
        if not any(frames.arrives(one, other, _LEAST) for _ in range(_TRIES)):
            yield failure(
                subject,
                "mode vepa: the switch does not reflect: two VMs on this NIC cannot talk, though"
                " each can with others",
                "switch reflective relay (802.1Qbg, VEPA) on for the port; on a Linux bridge:"
                " bridge link set dev PORT hairpin on; or use mode bridge",
            )
            yield warning(
                subject, "path MTU: unknown, as nothing comes back", "probe again when it does"
            )
            return
        yield ok(subject, "mode vepa: the switch reflects: two VMs on this NIC can talk")
        largest, lost = _largest(frames, one, other, lower.mtu)
    if lost is None:
        yield ok(subject, f"path MTU: {largest}, all of the NIC's")
    else:
        bound = f"{largest}" if lost == largest + 1 else f"between {largest} and {lost - 1}"
        yield failure(
            subject,
            f"path MTU: {bound} octets, and the NIC's is {lower.mtu}: longer frames are lost",
            f"raise the switch's, or give networks on this NIC mtu: {largest}",
        )


def _largest(frames: _Frames, one: _End, other: _End, mtu: int) -> tuple[int, int | None]:
    """The largest payload seen to arrive, and the smallest seen to be lost, if any was."""
    if any(frames.arrives(one, other, mtu) for _ in range(2)):
        return mtu, None
    arrived, lost = _LEAST, mtu
    while lost - arrived > 1 and frames.left:
        octets = (arrived + lost) // 2
        if frames.arrives(one, other, octets):
            arrived = octets
        else:
            lost = octets
    return arrived, lost


@contextmanager
def _pair(lower: Link, mode: Mode, host: Netlink) -> Iterator[tuple[_End, _End]]:
    with new_netns() as netns, opened_pod(netns) as pod, ExitStack() as closing:
        with inside(netns):
            disable_ipv6()

        def make(number: int) -> _End:
            mac = b"\x02" + secrets.token_bytes(5)
            wanted = Macvtap(
                ifindex=unused_ifindex(),
                name=f"{_NAME}{number}",
                mac=mac.hex(":"),
                mode=mode,
                lower=lower.ifindex,
                mtu=lower.mtu,
                queues=1,
            )
            create_macvtap(host, wanted, netns)
            # With its namespace it would go too, but later.
            closing.callback(delete_link, pod.route, wanted.ifindex)
            set_up(pod.route, wanted.ifindex, alias="extbridge probe")
            with inside(netns):
                packets = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
            closing.enter_context(packets)
            with inside(netns):
                packets.bind((wanted.name, ETHERTYPE))
            return _End(mac, packets)

        yield make(0), make(1)
