"""What a guest leaves to the host is done as it is by others, or the guest is not heard.

Checksums are written where checksums are, and what was judged whole is not cut into something else.
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
    ethernet,
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
GSO_TCPV4, GSO_UDP, GSO_TCPV6 = 1, 3, 4
GRE = 47

LEAST_START = 20
"""Where what is summed may begin at the earliest; not before Linux 6.12 (virtio_net_hdr_to_skb)."""


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


def segmented(gso: int, size: int) -> bytes:
    """The header of a frame to be cut up that leaves no checksum (struct virtio_net_hdr)."""
    return struct.pack("=BBHHHH", 0, gso, 0, size, 0, 0)


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
        heard = heard_of(guest, [(offloaded(start, at), it) for it, start, at in made])
        assert not heard[:3]
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


@pytest.mark.parametrize("guard", [None, BY_MAC, BY_IP], ids=["none", "mac", "ip"])
def test_segments_begin_where_tcp_does(lab: Lab, nic: Nic, pod: str, guard: Guard | None) -> None:
    """A super-frame does not get far whose sum begins elsewhere: there a NIC looks for TCP."""
    rng = random.Random(1)  # noqa: S311 - likewise
    segment = rng.randbytes(12) + b"\x50\x10" + bytes(6) + rng.randbytes(5000)
    with attached(lab, nic, pod, guard) as guest:
        for start in range(LEAST_START, 34):
            guest.send(ipv4(rng, TCP, segment), offloaded(start, start + 16, GSO_TCPV4))
        heard = heard_of(guest, [(offloaded(34, 50, GSO_TCPV4), ipv4(rng, TCP, segment))])
        assert sum(map(len, heard)) > len(segment)
        with within(pod):
            dropped = spoof_drops(guest.ifindex).get("checksum")
        # Those that are not dropped end in the kernel, or in a NIC.
        assert dropped == (None if guard is None else 34 - LEAST_START)


def offer(rng: random.Random) -> bytes:
    """UDP from a DHCP server's port, in the second half of what a later fragment would be."""
    return udp(rng, 67, 68)[:8] + rng.randbytes(592)


CUT: Mapping[str, Callable[[random.Random], bytes]] = {
    "IPv4 fragment": lambda r: ipv4(
        r, UDP, offer(r), fragment=r.choice([1, 7, 0x1FFF, 0x2001, 0x2000 | r.randrange(1, 0x2000)])
    ),
    "IPv6 fragment": lambda r: ipv6(
        r,
        *behind(
            r, UDP, udp(r, 547, 546)[:8] + r.randbytes(592), 44, fragment=r.randrange(1, 99) << 3
        ),
    ),
}


@both_guards
@pytest.mark.parametrize("leaves_sum", [False, True])
@pytest.mark.parametrize("kind", CUT)
def test_later_fragment_does_not_become_a_first_one(
    lab: Lab, nic: Nic, pod: str, guard: Guard, kind: str, *, leaves_sum: bool
) -> None:
    """What passed unread, for its ports are elsewhere, is not cut into fragments from 0 on."""
    rng = random.Random(kind)  # noqa: S311 - likewise
    frames = [CUT[kind](rng) for _ in range(100)]
    start = 62 if kind.startswith("IPv6") else 34
    header = offloaded(start, start + 6, GSO_UDP) if leaves_sum else segmented(GSO_UDP, 296)
    with attached(lab, nic, pod, guard) as guest:
        assert not heard_of(guest, [(header, it) for it in frames])[:3]
        # Sent whole they are what they are: parts of something.
        assert heard_of(guest, [(PLAIN, it) for it in frames]) == frames


def test_later_fragment_is_cut_anew_without_a_guard(lab: Lab, nic: Nic, pod: str) -> None:
    """So a guest would be a DHCP server: the kernel makes a first fragment of a later one."""
    rng = random.Random(1)  # noqa: S311 - likewise
    later = ipv4(rng, UDP, offer(rng), fragment=1)
    with attached(lab, nic, pod, None) as guest:
        first, *_ = heard_of(guest, [(segmented(GSO_UDP, 296), later)])
        assert struct.unpack_from("!H", first, 20)[0] & 0x1FFF == 0
        assert struct.unpack_from("!HH", first, 34) == (67, 68)


@both_guards
def test_long_datagrams_are_cut(lab: Lab, nic: Nic, pod: str, guard: Guard) -> None:
    """A guest that leaves it to the host to cut its datagrams loses none."""
    rng = random.Random(1)  # noqa: S311 - likewise
    made = [
        (offloaded(34, 40, GSO_UDP), ipv4(rng, UDP, udp(rng, 5000, 5001)[:8] + bytes(5000))),
        (offloaded(54, 60, GSO_UDP), ipv6(rng, UDP, udp(rng, 5000, 5001)[:8] + bytes(5000))),
    ]
    with attached(lab, nic, pod, guard) as guest:
        for it in made:
            assert sum(map(len, heard_of(guest, [it]))) > 5000
        with within(pod):
            assert spoof_drops(guest.ifindex)["checksum"] == 0


@pytest.mark.parametrize("ethertype", [0x88CC, 0x88B5, 0x8847, 0x0026])
def test_what_is_not_ip_leaves_nothing(lab: Lab, nic: Nic, pod: str, ethertype: int) -> None:
    """Of a type that nobody judges, the sum would make one that is judged."""
    rng = random.Random(ethertype)  # noqa: S311 - likewise
    made = [ethernet(ethertype, b"\x42\x42\x03" + rng.randbytes(100)) for _ in range(50)]
    with attached(lab, nic, pod, BY_MAC) as guest:
        assert heard_of(guest, [(PLAIN, it) for it in made]) == made
        assert not heard_of(guest, [(offloaded(40, 60), it) for it in made])[:3]


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
