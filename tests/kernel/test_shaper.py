"""A VM's NIC sends and receives no faster than asked, and everything else about it stays.

Rates are counted over real taps, in the bytes that a bucket counts: Ethernet header included, FCS
not, and every segment of a frame that is segmented later with headers of its own.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

import pytest

from extbridge.demo.lab import Lab, Nic, run, within
from extbridge.kernel.links import (
    GROUP,
    Macvtap,
    create_macvtap,
    delete_link,
    find_link,
    set_up,
)
from extbridge.kernel.netlink import NETLINK_ROUTE, Netlink
from extbridge.kernel.shaper import shape, unshape_absent, unshaped_by
from extbridge.kernel.silence import silence, unsilence_absent
from extbridge.kernel.taps import open_tap
from extbridge.network.definition import FIRST_IFINDEX, Bandwidth, Mode
from tests.kernel.observe import frame, link_names, packed
from tests.support import require

GUEST_MAC, OTHER_MAC, OUTSIDE_MAC = "52:54:00:00:00:05", "52:54:00:00:00:06", "52:54:00:00:00:99"
IFINDEX = FIRST_IFINDEX + 5
IFB_IFINDEX, IFB = 0x20000005, "xb20000005"

MBIT = 1_000_000

# linux/if_tun.h: the guest's driver computes checksums and segments TCP itself, as in QEMU.
TUNSETOFFLOAD = 0x400454D0
TUN_F_CSUM_TSO4 = 0x1 | 0x2

# linux/if_packet.h; what is sent and received begins with the header that a tap's frames have.
SOL_PACKET = 263
PACKET_VNET_HDR = 15
SO_SNDBUFFORCE, SO_RCVBUFFORCE = 32, 33

# struct virtio_net_hdr: flags, kind of segmentation, header length, segment, checksum from and at.
VNET = struct.Struct("=BBHHHH")
NEEDS_CHECKSUM = 1
SEGMENTED_TCP4 = 1
TCP4_HEADERS = 14 + 20 + 20
SEGMENT, SEGMENTS = 1460, 44

# To be missed, a frame has to be waited for.
WAIT = 0.3


@dataclass(frozen=True, slots=True)
class Vm:
    """The queues of a guest's tap, and the switch's port that its frames go through."""

    taps: list[int]
    port: socket.socket

    def send(self, data: bytes) -> None:
        """Send from the guest, through any queue."""
        os.write(random.choice(self.taps), data)  # noqa: S311 - not a secret

    def read(self, into: bytearray) -> int:
        """The length of the next frame to the guest; BlockingIOError when there is none."""
        for tap in self.taps:
            with suppress(BlockingIOError):
                return os.readv(tap, [into])
        raise BlockingIOError

    def read_outside(self, into: bytearray) -> int:
        """The length of the next frame from the guest; BlockingIOError when there is none."""
        return self.port.recv_into(into)


@dataclass(frozen=True, slots=True)
class Place:
    """A pod, and a NIC of the node on a switch that does not send a guest's frames back."""

    lab: Lab
    nic: Nic
    pod: str


@pytest.fixture
def place(lab: Lab, pod: str) -> Place:
    """Where most NICs of these tests are."""
    require("tc")
    return Place(lab, lab.nic(reflective=False), pod)


@pytest.mark.parametrize("direction", ["egress", "ingress"])
@pytest.mark.parametrize(
    ("rate", "burst"),
    [(10 * MBIT, None), (100 * MBIT, None), (1000 * MBIT, None), (1000 * MBIT, 8)],
)
def test_rate_is_what_was_asked(place: Place, direction: str, rate: int, burst: int | None) -> None:
    """A guest sends, or receives, at the rate asked for, also with too small a burst for it."""
    limits = {f"{direction}_rate": rate, f"{direction}_burst": burst}
    with vm(place, Bandwidth(**limits)) as guest:
        found = measured(guest, direction, rate)
    assert 0.9 * rate < found < 1.1 * rate


@pytest.mark.parametrize("direction", ["egress", "ingress"])
def test_queues_share_one_rate(place: Place, direction: str) -> None:
    """A NIC of several queues has the rate once, not once for each queue."""
    rate = 100 * MBIT
    with vm(place, Bandwidth(rate, None, rate, None), queues=4) as guest:
        found = measured(guest, direction, rate)
    assert 0.9 * rate < found < 1.1 * rate


def test_others_on_the_nic_are_not_limited(place: Place) -> None:
    """What one NIC may send and receive says nothing about another one on the same lower device."""
    limits = Bandwidth(10 * MBIT, None, 10 * MBIT, None)
    other = Place(place.lab, place.nic, place.lab.pod("other"))
    count = 300
    with (
        vm(place, limits) as limited,
        vm(other, None, mac=OTHER_MAC, ifindex=IFINDEX + 1) as free,
    ):
        # More at once than burst and queue of the limited one hold.
        for guest, mac in ((limited, GUEST_MAC), (free, OTHER_MAC)):
            for _ in range(count):
                guest.send(plain(OUTSIDE_MAC, mac))
        sent = [data[6:12] for data in frames(limited.read_outside)]
        for mac in (GUEST_MAC, OTHER_MAC):
            for _ in range(count):
                limited.port.send(plain(mac, OUTSIDE_MAC))
        received = [len(frames(guest.read)) for guest in (limited, free)]
    assert sent.count(packed(GUEST_MAC)) < count
    assert sent.count(packed(OTHER_MAC)) == count
    assert received[0] < count
    assert received[1] == count


def test_only_what_is_limited_has_an_ifb(place: Place) -> None:
    """A NIC without a limit, or with one for what it sends, has no link beside it."""
    with vm(place, None):
        assert link_names(place.pod) == {"lo", "net1"}
        assert limiting(place.pod, "net1") == set()
    with vm(place, Bandwidth(egress_rate=MBIT)):
        assert link_names(place.pod) == {"lo", "net1"}
        assert limiting(place.pod, "net1") == {"tbf"}
    with vm(place, Bandwidth(ingress_rate=MBIT)):
        assert link_names(place.pod) == {"lo", "net1", IFB}
        assert limiting(place.pod, "net1") == {"clsact"}
        assert limiting(place.pod, IFB) == {"tbf"}


@pytest.mark.parametrize("is_trusted", [False, True])
def test_all_that_is_for_the_guest_arrives(place: Place, *, is_trusted: bool) -> None:
    """Broadcast, multicast, own unicast, tagged or not: each arrives whole, through the limit."""
    sent = [
        frame(to, OUTSIDE_MAC, payload)
        for to in ("ff:ff:ff:ff:ff:ff", "01:00:5e:00:00:fb", "33:33:00:00:00:01", GUEST_MAC)
        for payload in (b"short", bytes(1000), b"last")
    ]
    sent += [
        frame(to, OUTSIDE_MAC, tags + b"tagged", ethertype)
        for to in ("ff:ff:ff:ff:ff:ff", GUEST_MAC)
        for ethertype, tags in (
            (0x8100, b"\0\5\x88\xb5"),
            (0x88A8, b"\0\5\x81\0\0\6\x88\xb5"),
        )
    ]
    with vm(place, Bandwidth(ingress_rate=MBIT), is_trusted=is_trusted) as guest:
        for data in sent:
            guest.port.send(bytes(VNET.size) + data)
        # Broadcasts are queued on their own way (macvlan_broadcast_enqueue).
        assert sorted(frames(guest.read)) == sorted(sent)
        assert passed(place.pod, IFB) == len(sent)


def test_what_is_not_for_the_guest_meets_the_rules(place: Place) -> None:
    """The limit does not carry frames for other MACs around the rules of anti-spoofing."""
    require("nft")
    # All that comes to the NIC comes to a passthru macvtap.
    mac = place.nic.mac
    with vm(place, Bandwidth(ingress_rate=MBIT), mode=Mode.PASSTHRU, mac=mac) as guest:
        own, foreign = plain(mac, OUTSIDE_MAC), plain(OTHER_MAC, OUTSIDE_MAC)
        for data in (own, foreign):
            guest.port.send(data)
        assert frames(guest.read) == [own[VNET.size :], foreign[VNET.size :]]
        assert passed(place.pod, IFB) == 1
        run("nft", "add table netdev t;"
            "add chain netdev t c {type filter hook ingress device net1 priority 0;};"
            f"add rule netdev t c ether daddr {OTHER_MAC} drop", netns=place.pod)  # fmt: skip
        for data in (own, foreign):
            guest.port.send(data)
        assert frames(guest.read) == [own[VNET.size :]]


@pytest.mark.parametrize("direction", ["egress", "ingress"])
def test_segmented_frame_larger_than_the_burst_arrives(place: Place, direction: str) -> None:
    """64 KiB that a driver leaves to be segmented pass a burst of less, segment for segment."""
    rate = 200 * MBIT
    with vm(place, Bandwidth(rate, 8, rate, 8)) as guest:
        way = way_of(guest, direction)
        way.send(segmented(way))
        arrived = frames(way.read)
    assert [len(data) for data in arrived] == [TCP4_HEADERS + SEGMENT] * SEGMENTS


@pytest.mark.parametrize("direction", ["egress", "ingress"])
def test_jumbo_frame_larger_than_the_burst_arrives(lab: Lab, pod: str, direction: str) -> None:
    """The largest frame that the MTU allows passes, however small a burst is asked for."""
    place = Place(lab, lab.nic(mtu=9000, reflective=False), pod)
    with vm(place, Bandwidth(MBIT, 8, MBIT, 8)) as guest:
        way = way_of(guest, direction)
        jumbo = frame(way.to, way.sender, bytes(9000))
        way.send(bytes(VNET.size) + jumbo)
        assert frames(way.read) == [jumbo]


# What `shape` makes of LIMITS, as tc says it, with one part changed.
LIMITS = Bandwidth(10 * MBIT, 800_000, 10 * MBIT, 800_000)
CHANGE_SENT = "tc qdisc change dev net1 root tbf"
CHANGE_RECEIVED = f"tc qdisc change dev {IFB} root tbf"
FILTER = "dev net1 ingress protocol all pref 1"
# A filter that is there keeps its selector, whatever is said here (u32_init_knode).
REPLACE = f"tc filter replace {FILTER} handle 800::800 u32 match u8 1 1 at -14"

CHANGES = {
    "what it sends": {
        "no qdisc": "tc qdisc del dev net1 root",
        "another qdisc": "tc qdisc replace dev net1 root handle 2: pfifo",
        "rate": f"{CHANGE_SENT} rate 20mbit burst 100000 limit 131250",
        "burst": f"{CHANGE_SENT} rate 10mbit burst 100100 limit 131250",
        "limit": f"{CHANGE_SENT} rate 10mbit burst 100000 limit 131251",
        "peak": f"{CHANGE_SENT} rate 10mbit burst 100000 limit 131250 peakrate 11mbit mtu 2000",
    },
    "what it receives": {
        "no qdisc": f"tc qdisc del dev {IFB} root",
        "rate": f"{CHANGE_RECEIVED} rate 20mbit burst 100000 limit 131250",
        "no hooks": "tc qdisc del dev net1 clsact",
        "no filter": "tc filter del dev net1 ingress",
        "one filter less": "tc filter del dev net1 ingress pref 1 handle 800::801 u32",
        "one filter more": "tc filter add dev net1 ingress pref 2 u32 match u32 0 0"
        f" action mirred egress redirect dev {IFB}",
        "another selector": "tc filter del dev net1 ingress pref 1 handle 800::801 u32;"
        f" tc filter add {FILTER} u32 match u16 0x5254 0xffff at -14"
        f" match u32 6 0xffffffff at -12 action mirred egress redirect dev {IFB}",
        "another action": f"{REPLACE} action mirred egress mirror dev {IFB}",
        "another target": f"{REPLACE} action mirred egress redirect dev lo",
        "down": f"ip link set {IFB} down",
        "MTU": f"ip link set {IFB} mtu 1500",
        "group": f"ip link set {IFB} group 0",
        "no ifb": f"ip link delete {IFB}",
    },
}


@pytest.mark.parametrize(
    ("told", "part"), [(told, part) for told, parts in CHANGES.items() for part in parts]
)
def test_change_by_hand_is_told(place: Place, told: str, part: str) -> None:
    """CHECK finds each part of the limits that is not as it was made, and in which direction."""
    with vm(place, LIMITS):
        with standing_in(place.pod) as route:
            assert unshaped_by(route, IFINDEX, 1500, LIMITS, GUEST_MAC) == ""
        run("sh", "-ec", CHANGES[told][part], netns=place.pod)
        with standing_in(place.pod) as route:
            assert told in unshaped_by(route, IFINDEX, 1500, LIMITS, GUEST_MAC)


@pytest.mark.parametrize("rate", [1, 12_345_678, 10**9, 10**11, (1 << 63) - 1])
@pytest.mark.parametrize("burst", [1, 10**7, (1 << 35) - 1, None])
def test_every_limit_is_found_as_it_was_made(place: Place, rate: int, burst: int | None) -> None:
    """Whatever rate and burst a network may give, CHECK takes them for unchanged, and no others."""
    limits = Bandwidth(rate, burst, rate, burst)
    with vm(place, limits), standing_in(place.pod) as route:
        assert unshaped_by(route, IFINDEX, 1500, limits, GUEST_MAC) == ""
        other = Bandwidth(rate * 16, burst, rate * 16, burst)
        assert unshaped_by(route, IFINDEX, 1500, other, GUEST_MAC) != ""
        assert unshaped_by(route, IFINDEX, 1500, limits, OTHER_MAC) != ""


def test_rates_are_what_tc_shows(place: Place) -> None:
    """Ingress is what the guest receives, egress what it sends; both as tc reads them back."""
    limits = Bandwidth(20 * MBIT, 800_000, 80_000 * MBIT, 1_600_000_000)
    with vm(place, limits):
        shown = [
            json.loads(run("tc", "-json", "qdisc", "show", "dev", device, netns=place.pod))[0]
            for device in ("net1", IFB)
        ]
    made = ((10**10, 200_000_000), (2_500_000, 100_000))
    for (rate, burst), qdisc in zip(made, shown, strict=True):
        options = qdisc["options"]
        assert options["rate"] == rate
        assert abs(options["burst"] - burst) <= burst // 1000
        # Microseconds, in which tc computes from ticks.
        assert abs(options["lat"] - 25_000) <= 25


def test_pods_own_stack_does_not_use_the_ifb(place: Place) -> None:
    """No process of the pod sends through the ifb, and the pod's settings do not make it speak."""
    with vm(place, Bandwidth(ingress_rate=MBIT)):
        run("sh", "-ec", "echo 0 | tee /proc/sys/net/ipv6/conf/*/disable_ipv6", netns=place.pod)
        for step in ("down", "up"):
            run("ip", "link", "set", IFB, step, netns=place.pod)
        with within(place.pod), ExitStack() as stack:
            for family, targets in (
                (socket.AF_INET, ("255.255.255.255", "224.0.0.251", "10.88.0.1")),
                (socket.AF_INET6, ("ff02::fb", "fe80::1")),
            ):
                mouth = stack.enter_context(socket.socket(family, socket.SOCK_DGRAM))
                mouth.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
                mouth.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, IFB.encode())
                for target in targets:
                    with pytest.raises(OSError, match=r"unreachable|assign|No such device"):
                        mouth.sendto(b"said", (target, 4011))
        # Neighbour discovery of a link that has come up begins within a second (RFC 4862).
        time.sleep(2)
        assert run("ip", "-6", "-oneline", "address", "show", "dev", IFB, netns=place.pod) == ""
        assert passed(place.pod, IFB) == 0


def test_only_what_extbridge_left_is_removed(place: Place) -> None:
    """An ifb whose macvtap is gone is removed; one in use, and every link of others, stays."""
    limits = Bandwidth(ingress_rate=MBIT)
    others = {"foreign", "plain", "beyond", "bridge"}
    run("ip", "link", "add", "foreign", "type", "ifb", netns=place.pod)
    run("ip", "link", "add", "plain", "index", str(IFB_IFINDEX + 1), "type", "ifb", netns=place.pod)
    run("ip", "link", "add", "beyond", "group", str(GROUP), "type", "ifb", netns=place.pod)
    run("ip", "link", "add", "bridge", "index", str(IFB_IFINDEX + 2), "group", str(GROUP),
        "type", "bridge", netns=place.pod)  # fmt: skip
    with vm(place, limits, mac=OTHER_MAC, name="net2", ifindex=IFINDEX + 3):
        used = f"xb{IFB_IFINDEX + 3:x}"
        with vm(place, limits):
            with standing_in(place.pod) as route:
                unshape_absent(route)
            assert link_names(place.pod) == others | {"lo", "net1", IFB, "net2", used}
            run("ip", "link", "delete", "net1", netns=place.pod)
            with standing_in(place.pod) as route:
                unshape_absent(route)
            assert link_names(place.pod) == others | {"lo", "net2", used}
    assert link_names(place.pod) == others | {"lo"}


def test_failure_half_way_leaves_nothing_that_is_not_found(place: Place) -> None:
    """Limits that cannot be set are an OSError with call and object, and are undone like others."""
    with vm(place, None), standing_in(place.pod) as route:
        run("tc", "qdisc", "add", "dev", "net1", "ingress", netns=place.pod)
        with pytest.raises(OSError, match=f"RTM_NEWQDISC clsact of ifindex {IFINDEX}: "):
            shape(route, IFINDEX, 1500, Bandwidth(MBIT, None, MBIT, None), GUEST_MAC)
        assert link_names(place.pod) == {"lo", "net1", IFB}
        delete_link(route, IFINDEX)
        unshape_absent(route)
        assert link_names(place.pod) == {"lo"}


@contextmanager
def vm(
    place: Place,
    limits: Bandwidth | None,
    *,
    mac: str = GUEST_MAC,
    is_trusted: bool = False,
    mode: Mode = Mode.VEPA,
    queues: int = 1,
    name: str = "net1",
    ifindex: int = IFINDEX,
) -> Iterator[Vm]:
    """A macvtap with these limits and its open tap, made and unmade in the order of ADD and DEL."""
    mtu = int(json.loads(run("ip", "-json", "link", "show", "dev", place.nic.name))[0]["mtu"])
    port = place.lab.packets(place.lab.switch, place.nic.port)
    port.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    # What waits to be read is charged to who sends as well as to who reads.
    for option in (SO_SNDBUFFORCE, SO_RCVBUFFORCE):
        port.setsockopt(socket.SOL_SOCKET, option, 1 << 27)
    port.settimeout(0)
    with ExitStack() as stack:
        netns = os.open(place.pod, os.O_RDONLY)
        stack.callback(os.close, netns)
        host = stack.enter_context(Netlink(NETLINK_ROUTE))
        lower = find_link(host, name=place.nic.name)
        assert lower is not None
        wanted = Macvtap(ifindex, name, mac, mode, lower.ifindex, None, queues)
        create_macvtap(host, wanted, netns)
        stack.callback(unmake, place.pod, ifindex)
        with standing_in(place.pod) as route:
            if limits is not None:
                shape(route, ifindex, mtu, limits, None if is_trusted else mac)
            silence(ifindex, name)
            set_up(route, ifindex, alias="")
            link = find_link(route, ifindex=ifindex)
        assert link is not None
        taps = open_tap(link, mac)
        for tap in taps:
            stack.callback(os.close, tap)
            fcntl.ioctl(tap, TUNSETOFFLOAD, TUN_F_CSUM_TSO4)
        yield Vm(taps, port)


def unmake(pod: str, ifindex: int) -> None:
    with standing_in(pod) as route:
        delete_link(route, ifindex)
        unshape_absent(route)
        unsilence_absent(route)


@contextmanager
def standing_in(pod: str) -> Iterator[Netlink]:
    """The thread stands in the pod's namespace, with a socket of it."""
    with within(pod), Netlink(NETLINK_ROUTE) as route:
        yield route


@dataclass(frozen=True, slots=True)
class Way:
    """One direction, from who sends to who reads."""

    send: Callable[[bytes], object]
    read: Callable[[bytearray], int]
    to: str
    sender: str


def way_of(guest: Vm, direction: str) -> Way:
    if direction == "egress":
        return Way(guest.send, guest.read_outside, OUTSIDE_MAC, GUEST_MAC)
    return Way(guest.port.send, guest.read, GUEST_MAC, OUTSIDE_MAC)


def measured(guest: Vm, direction: str, rate: int) -> float:
    """The bits per second that arrive, in the long run, when half as much again is offered.

    What is late is made up for: the sender offers all that it has not, and a reader finds what has
    arrived meanwhile in its queue. So only the kernel's own pace is measured.
    """
    way = way_of(guest, direction)
    # From Python, frames of the wire's size do not come to 1 Gbit/s.
    data = segmented(way) if rate >= 1000 * MBIT else plain(way.to, way.sender, SEGMENT)
    size = counted(data, len(data))
    buffer = bytearray(1 << 17)
    offered = arrived = 0
    start = time.monotonic()
    # Until the burst is used up, and with it what the first queue held.
    begin = 0.0
    while True:
        now = time.monotonic()
        # No more than the queue and a burst can make of it.
        offered = max(offered, int((now - start - 0.1) * 1.5 * rate / 8))
        while offered < (now - start) * 1.5 * rate / 8:
            # The queue is full.
            with suppress(OSError):
                way.send(data)
            offered += size
        with suppress(BlockingIOError):
            while True:
                arrived += counted(buffer, way.read(buffer))
        now = time.monotonic()
        if not begin and now - start > 0.5:
            begin, arrived = now, 0
        elif begin and now - begin > 1:
            return arrived * 8 / (now - begin)
        time.sleep(0.0005)


def counted(data: bytes | bytearray, length: int) -> int:
    """The bytes that a bucket counts for a frame with its virtio header, `length` in all."""
    _, kind, headers, segment, _, _ = VNET.unpack_from(data)
    length -= VNET.size
    if kind:
        length += (-(-(length - headers) // segment) - 1) * headers
    return length


def plain(to: str, sender: str, payload: int = 1486) -> bytes:
    """A frame with an empty virtio header."""
    return bytes(VNET.size) + frame(to, sender, bytes(payload))


def segmented(way: Way) -> bytes:
    """64 KiB of TCP with the virtio header that leaves segments and checksums to the host."""
    length = SEGMENT * SEGMENTS
    addresses = socket.inet_aton("10.0.0.1") + socket.inet_aton("10.0.0.2")
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 40 + length, 0, 0, 64, socket.IPPROTO_TCP, 0)
    tcp = struct.pack("!HHIIBBHHH", 1, 2, 0, 0, 5 << 4, 0x10, 1000, 0, 0)
    header = VNET.pack(NEEDS_CHECKSUM, SEGMENTED_TCP4, TCP4_HEADERS, SEGMENT, 14 + 20, 16)
    return header + frame(way.to, way.sender, ip + addresses + tcp + bytes(length), 0x0800)


def frames(read: Callable[[bytearray], int]) -> list[bytes]:
    """All that arrives, without virtio headers, until nothing has come for a while."""
    buffer = bytearray(1 << 17)
    found = []
    deadline = time.monotonic() + WAIT
    while time.monotonic() < deadline:
        try:
            length = read(buffer)
        except BlockingIOError:
            time.sleep(0.001)
            continue
        found.append(bytes(buffer[VNET.size : length]))
        deadline = time.monotonic() + WAIT
    return found


def limiting(pod: str, device: str) -> set[str]:
    """Which of the two qdiscs that are needed for limits the device has."""
    shown = json.loads(run("tc", "-json", "qdisc", "show", "dev", device, netns=pod))
    return {"tbf", "clsact"} & {it["kind"] for it in shown}


def passed(pod: str, device: str) -> int:
    """How many frames have gone through the device's root qdisc since it was made."""
    shown = run("tc", "-json", "-statistics", "qdisc", "show", "dev", device, netns=pod)
    return int(json.loads(shown)[0]["packets"])
