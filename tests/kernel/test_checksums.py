"""A guest that leaves a checksum to the NIC has it written where checksums are, or is not heard.

The NIC below cannot sum, so the kernel writes the checksum, behind all hooks; the ear hears it.
"""

from __future__ import annotations

import ctypes
import fcntl
import random
import shlex
import socket
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import pytest

from extbridge.demo.lab import Lab, Nic, run, within
from extbridge.kernel.antispoof import Guard, spoof_drops
from extbridge.kernel.checksums import unheld_checksums
from extbridge.kernel.netlink import NETLINK_ROUTE, Netlink
from tests.kernel.frames import (
    BY_IP,
    BY_MAC,
    ICMP,
    ICMPV6,
    OWN,
    OWN4,
    RARP,
    TCP,
    UDP,
    arp,
    behind,
    ipv4,
    ipv6,
    ns,
    option,
    some_headers,
    some_tcp,
    some_udp,
    udp,
)
from tests.kernel.guests import FRAMES, PLAIN, Guest, attached, heard_until_sentinel

pytestmark = pytest.mark.usefixtures("one_cpu")

both_guards = pytest.mark.parametrize("guard", [BY_MAC, BY_IP], ids=["mac", "ip"])

SIOCETHTOOL, ETHTOOL_STXCSUM = 0x8946, 0x17
NEEDS_CSUM = 1
GSO_TCPV4 = 1
GRE = 47

LEAST_START = 20
"""Where what is summed may begin at the earliest (virtio_net_hdr_to_skb)."""


@pytest.fixture
def nic(nic: Nic) -> Nic:
    """The node's NIC, which cannot sum."""
    offload(nic, on=False)
    return nic


def offload(nic: Nic, *, on: bool) -> None:
    """Have the NIC say that it sums what it sends, or that it does not (man 8 ethtool)."""
    value = ctypes.create_string_buffer(struct.pack("=II", ETHTOOL_STXCSUM, on))
    asked = struct.pack("=16sQ16x", nic.name.encode(), ctypes.addressof(value))
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, SIOCETHTOOL, asked)


def offloaded(start: int, place: int, gso: int = 0) -> bytes:
    """Struct virtio_net_hdr of a frame whose sum from `start` on goes to `place`."""
    return struct.pack("=BBHHHH", NEEDS_CSUM, gso, 0, 1000 if gso else 0, start, place - start)


def sum_of(data: bytes) -> int:
    """The Internet checksum (RFC 1071)."""
    padded = data + bytes(len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(padded) // 2}H", padded))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return 0xFFFF - total


@dataclass(frozen=True, slots=True)
class Kind:
    """Frames, and where the header behind their IP header begins: there sums may begin too."""

    make: Callable[[random.Random], bytes]
    header: int
    is_offloaded: bool = True

    def misplaced(self, rng: random.Random) -> tuple[bytes, int, int]:
        """A frame, where what is summed begins, and where the sum goes: not where it may."""
        frame = self.make(rng)
        while True:
            start = rng.randrange(LEAST_START, len(frame) - 2)
            place = rng.randrange(start, len(frame) - 1)
            if start < self.header or place < self.header + 4 or not self.is_offloaded:
                return frame, start, place


KINDS: Mapping[str, Kind] = {
    "ARP": Kind(lambda r: arp(r, r.choice([1, 2]), r.choice(OWN4)), 42, is_offloaded=False),
    "RARP": Kind(lambda r: arp(r, 3, bytes(4), ethertype=RARP), 42, is_offloaded=False),
    "IPv4 TCP": Kind(lambda r: ipv4(r, TCP, some_tcp(r)), 34),
    "IPv4 UDP": Kind(lambda r: ipv4(r, UDP, some_udp(r)), 34),
    "IPv4 UDP, options": Kind(lambda r: ipv4(r, UDP, some_udp(r), options=bytes(40)), 74),
    "IPv4 ICMP": Kind(lambda r: ipv4(r, ICMP, b"\x08" + r.randbytes(60)), 34),
    "IPv6 TCP": Kind(lambda r: ipv6(r, TCP, some_tcp(r)), 54),
    "IPv6 UDP": Kind(lambda r: ipv6(r, UDP, some_udp(r)), 54),
    "ND": Kind(
        lambda r: ipv6(r, ICMPV6, ns(r.randbytes(16), option(1, OWN))), 54, is_offloaded=False
    ),
    "IPv6 TCP, extension headers": Kind(
        lambda r: ipv6(r, *behind(r, TCP, some_tcp(r), *some_headers(r))), 54, is_offloaded=False
    ),
}


def heard_of(guest: Guest, frames: Iterable[tuple[bytes, bytes]]) -> list[bytes]:
    """What left the node of these, each with its virtio header before it."""
    heard = []
    for some in batched(frames):
        for header, frame in some:
            guest.send(frame, header)
        heard += heard_until_sentinel(guest)
    return heard


def batched(frames: Iterable[tuple[bytes, bytes]]) -> Iterator[list[tuple[bytes, bytes]]]:
    waiting = list(frames)
    for at in range(0, len(waiting), 50):
        yield waiting[at : at + 50]


def summed(frame: bytes, start: int, place: int) -> bytes:
    """The frame as it leaves, its sum written (skb_checksum_help)."""
    total = sum_of(frame[start:]) or 0xFFFF
    return frame[:place] + struct.pack("!H", total) + frame[place + 2 :]


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_guard_a_sum_goes_anywhere(lab: Lab, nic: Nic, pod: str, kind: str) -> None:
    """What the other tests say does not arrive is what arrives where nothing is asked of a guest.

    So a guest says of itself what it likes: the sum is that of what follows.
    """
    rng = random.Random(kind)  # noqa: S311 - what is wanted is the same each time
    made = [KINDS[kind].misplaced(rng) for _ in range(100)]
    with attached(lab, nic, pod, None) as guest:
        heard = heard_of(guest, [(offloaded(start, at), it) for it, start, at in made])
        assert heard == [summed(*it) for it in made]


@both_guards
@pytest.mark.parametrize("kind", KINDS)
def test_no_sum_goes_elsewhere(lab: Lab, nic: Nic, pod: str, guard: Guard, kind: str) -> None:
    """Of frames with a sum over or into what a guest is held to none arrives, and each counts."""
    rng = random.Random(kind)  # noqa: S311 - likewise
    made = [KINDS[kind].misplaced(rng) for _ in range(FRAMES)]
    with attached(lab, nic, pod, guard) as guest:
        assert heard_of(guest, [(offloaded(start, at), it) for it, start, at in made]) == []
        # Without a checksum left to do they are honest, every one.
        honest = [frame for frame, *_ in made]
        assert heard_of(guest, [(PLAIN, it) for it in honest]) == honest
        with within(pod):
            assert spoof_drops(guest.ifindex)["checksum"] == FRAMES


@both_guards
def test_sums_in_their_place_are_written(lab: Lab, nic: Nic, pod: str, guard: Guard) -> None:
    """A guest that leaves TCP's and UDP's checksums to the NIC, a tunnel's too, loses nothing."""
    rng = random.Random(1)  # noqa: S311 - likewise
    made = []
    for _ in range(FRAMES):
        inner = ipv4(rng, TCP, some_tcp(rng))
        made += [
            (ipv4(rng, TCP, some_tcp(rng)), 34, 50),
            (ipv4(rng, UDP, some_udp(rng)), 34, 40),
            (ipv4(rng, TCP, some_tcp(rng), options=bytes(12)), 46, 62),
            (ipv6(rng, TCP, some_tcp(rng)), 54, 70),
            (ipv6(rng, UDP, some_udp(rng)), 54, 60),
            # VXLAN and GRE, which leave the checksum of what is within (lco_csum).
            (ipv4(rng, UDP, udp(rng, 50_000, 4789)[:8] + bytes(8) + inner), 84, 100),
            (ipv6(rng, GRE, bytes(4) + inner[14:]), 78, 94),
        ]
    with attached(lab, nic, pod, guard) as guest:
        heard = heard_of(guest, [(offloaded(start, at), it) for it, start, at in made])
        assert heard == [summed(*it) for it in made]
        with within(pod):
            assert spoof_drops(guest.ifindex)["checksum"] == 0


@both_guards
def test_segments_begin_where_tcp_does(lab: Lab, nic: Nic, pod: str, guard: Guard) -> None:
    """A super-frame does not arrive whose sum begins elsewhere: there a NIC looks for TCP."""
    rng = random.Random(1)  # noqa: S311 - likewise
    segment = rng.randbytes(12) + b"\x50\x10" + bytes(6) + rng.randbytes(5000)
    with attached(lab, nic, pod, guard) as guest:
        for start in range(LEAST_START, 34):
            header = offloaded(start, start + 16, GSO_TCPV4)
            assert heard_of(guest, [(header, ipv4(rng, TCP, segment))]) == []
        with within(pod):
            assert sum(spoof_drops(guest.ifindex).values()) > 0


def test_a_nic_that_sums_makes_no_difference(lab: Lab, pod: str) -> None:
    """Where the NIC is to write the sum nothing of a misplaced one gets that far."""
    nic = lab.nic()
    rng = random.Random(1)  # noqa: S311 - likewise
    made = [KINDS["ARP"].misplaced(rng) for _ in range(100)]
    with attached(lab, nic, pod, BY_IP) as guest:
        assert heard_of(guest, [(offloaded(start, at), it) for it, start, at in made]) == []


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ((), ""),
        (("filter del dev net1 egress",), "no program"),
        (("qdisc del dev net1 clsact",), "no program"),
        (("filter add dev net1 egress prio 2 u32 match u32 0 0 flowid 1:1",), "not alone"),
        (
            (
                "filter del dev net1 egress",
                "filter add dev net1 egress prio 1 protocol all bpf da bytecode '1,6 0 0 0'",
            ),
            "another",
        ),
    ],
)
def test_change_by_hand_is_noticed(
    lab: Lab, nic: Nic, pod: str, change: tuple[str, ...], found: str
) -> None:
    """CHECK finds the program as ADD laid it, or says what is in its place."""
    with attached(lab, nic, pod, BY_MAC) as guest:
        for it in change:
            run("tc", *shlex.split(it), netns=pod)
        with within(pod), Netlink(NETLINK_ROUTE) as route:
            said = unheld_checksums(route, guest.ifindex)
        assert found in said
        assert bool(said) == bool(found)
