"""The pod's own IP stack neither hears nor speaks on the VM's NIC (promise 3).

The probe is shown to work first: on a plain macvtap it finds all that must not be there.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

import pytest

from extbridge.demo.lab import Lab, Nic, receive, run, within
from tests.kernel.observe import frame, make_macvtap, network_config, packed, show_link
from tests.support import Cni, require

POD_IPV4, OUTSIDE_IPV4 = "10.77.0.5", "10.99.0.1"
POD_IPV6, OUTSIDE_IPV6 = "fd77::5", "fd99::1"
GUEST_MAC, OUTSIDE_MAC = "52:54:00:00:00:05", "52:54:00:00:00:99"
# What a DHCP client sends from while it has no address.
UNSPECIFIED = "0.0.0.0"  # noqa: S104 - nothing is bound to it
PORT = 4011

NOBODY = 65534

# struct virtio_net_hdr, before each frame of a tap with the flags it is born with (tap_open).
VNET_HEADER = 10

# To be heard or missed, frames have to be waited for; the bridge and the stack need far less.
WAIT = 0.3

# Neighbour discovery of a link that has come up begins within a second (RFC 4862, section 5.4.2).
SETTLE = 2.0

HEARD = {
    "an ARP request for the pod's address",
    "IPv4 unicast",
    "IPv4 multicast",
    "IPv4 broadcast from 0.0.0.0",
    "IPv6 unicast",
    "IPv6 multicast",
}
SPOKEN = {
    "ARP",
    "IGMP",
    "IPv4 datagram to 255.255.255.255",
    "IPv4 datagram to 224.0.0.251",
    "IPv6 datagram to ff02::fb",
    "neighbour discovery",
    "MLD",
}

# Settings of a pod, or of its runtime, by which an IP stack answers more readily than by default.
OPEN_MINDED = {
    "net/ipv4/conf/all/rp_filter": "0",
    "net/ipv4/conf/all/arp_ignore": "0",
    "net/ipv4/conf/all/arp_accept": "1",
    "net/ipv4/conf/all/proxy_arp": "1",
    "net/ipv4/conf/all/accept_local": "1",
    "net/ipv4/conf/all/forwarding": "1",
    "net/ipv4/icmp_echo_ignore_broadcasts": "0",
    "net/ipv6/conf/all/forwarding": "1",
    "net/ipv6/conf/all/accept_ra": "2",
    # Given to a container by some runtimes; written to `all` it reaches every link of the pod.
    "net/ipv6/conf/all/disable_ipv6": "0",
}


@dataclass(frozen=True, slots=True)
class Place:
    """A pod with an address of its own on eth0, a NIC of the node, and its port on the switch."""

    nic: Nic
    pod: str
    port: socket.socket


@pytest.fixture
def place(lab: Lab) -> Place:
    """A place whose pod hears and answers as readily as a pod can be made to."""
    pod, nic = lab.pod("pod"), lab.nic()
    cluster = lab.pod("cluster")
    run("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", cluster,
        netns=pod)  # fmt: skip
    for netns in (pod, cluster):
        run("ip", "link", "set", "eth0", "up", netns=netns)
    run("ip", "address", "add", f"{POD_IPV4}/24", "dev", "eth0", netns=pod)
    run("ip", "address", "add", f"{POD_IPV6}/64", "dev", "eth0", "nodad", netns=pod)
    run("ip", "route", "add", "default", "via", "10.77.0.1", netns=pod)
    set_open_minded(pod)
    return Place(nic, pod, lab.packets(lab.switch, nic.port))


def test_plain_macvtap_fails_every_probe(place: Place) -> None:
    """What extbridge silences is there: a plain macvtap hears, answers and speaks for the pod."""
    make_macvtap(place.nic, "net1", place.pod, GUEST_MAC)
    wait_until_address_is_usable(place.pod)
    assert heard(place, GUEST_MAC) == HEARD
    assert spoken(place, GUEST_MAC) == SPOKEN
    assert ipv6_addresses(place.pod) != ""


@pytest.mark.parametrize("mode", ["vepa", "passthru"])
def test_pod_is_not_on_the_vms_nic(place: Place, cni: Cni, mode: str) -> None:
    """No frame, no ARP answer, no datagram either way - before a tap is opened and after."""
    require("nft")
    mac = attached(place, cni, mode)
    assert frames_from_node(place, SETTLE) == []
    assert heard(place, mac) == set()
    assert frames_spoken(place) == []
    with opened_tap(place.pod):
        assert heard(place, mac) == set()
        assert frames_spoken(place) == []
    assert heard(place, mac) == set()
    assert frames_spoken(place) == []
    assert ipv6_addresses(place.pod) == ""


def test_frames_go_to_an_open_tap(place: Place, cni: Cni) -> None:
    """What the pod is not to hear reaches the VM: all of it, while a tap is open."""
    mac = attached(place, cni)
    with opened_tap(place.pod) as tap:
        sent = set(probes(mac).values())
        for probe in sent:
            place.port.send(probe)
        assert sent <= read_frames(tap)


def test_settings_of_the_pod_do_not_matter(place: Place, cni: Cni) -> None:
    """The silence does not depend on what the pod's sysctls say, before or after ADD."""
    mac = attached(place, cni)
    set_open_minded(place.pod)
    assert frames_from_node(place, SETTLE) == []
    assert heard(place, mac) == set()
    assert frames_spoken(place) == []
    assert ipv6_addresses(place.pod) == ""


def test_renamed_link_stays_silent(place: Place, cni: Cni) -> None:
    """A pod that may rename its links does not break the silence by it, nor by DOWN and UP."""
    mac = attached(place, cni)
    run("ip", "link", "set", "net1", "down", netns=place.pod)
    run("ip", "link", "set", "net1", "name", "other", netns=place.pod)
    run("ip", "link", "set", "other", "up", netns=place.pod)
    assert frames_from_node(place, SETTLE) == []
    assert heard(place, mac) == set()
    assert frames_spoken(place, "other") == []
    assert ipv6_addresses(place.pod, "other") == ""


def test_pod_that_flushes_its_rules_gains_little(place: Place, cni: Cni) -> None:
    """Without the rules, which a pod may be able to flush, it still neither speaks nor answers."""
    mac = attached(place, cni)
    run("nft", "flush", "ruleset", netns=place.pod)
    run("ip", "link", "set", "net1", "down", netns=place.pod)
    run("ip", "link", "set", "net1", "up", netns=place.pod)
    assert frames_from_node(place, SETTLE) == []
    assert heard(place, mac) <= {kind for kind in HEARD if kind.startswith("IPv4")}
    assert ipv6_addresses(place.pod) == ""


def set_open_minded(pod: str) -> None:
    script = "".join(f"echo {value} > /proc/sys/{key}\n" for key, value in OPEN_MINDED.items())
    run("sh", "-ec", script, netns=pod)


def attached(place: Place, cni: Cni, mode: str = "vepa") -> str:
    """ADD net1 with the switch listening from before on; its MAC."""
    config = network_config(place.nic, mode, mac=GUEST_MAC)
    assert cni("ADD", config, NETNS=place.pod).result
    net1 = show_link("net1", place.pod)
    assert "UP" in net1["flags"]
    return str(net1["address"])


def probes(mac: str) -> dict[str, bytes]:
    """Frames from outside to the VM's NIC, by what they are."""
    multicast4, multicast6 = "01:00:5e:00:00:01", "33:33:00:00:00:01"
    arp = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1)
    arp += packed(OUTSIDE_MAC) + socket.inet_aton(OUTSIDE_IPV4)
    arp += bytes(6) + socket.inet_aton(POD_IPV4)
    return {
        "an ARP request for the pod's address": frame(
            "ff:ff:ff:ff:ff:ff", OUTSIDE_MAC, arp, 0x0806
        ),
        "IPv4 unicast": udp4(mac, OUTSIDE_IPV4, POD_IPV4, b"IPv4 unicast"),
        "IPv4 multicast": udp4(multicast4, OUTSIDE_IPV4, "224.0.0.1", b"IPv4 multicast"),
        "IPv4 broadcast from 0.0.0.0": udp4(
            "ff:ff:ff:ff:ff:ff", UNSPECIFIED, "255.255.255.255", b"IPv4 broadcast from 0.0.0.0"
        ),
        "IPv6 unicast": udp6(mac, OUTSIDE_IPV6, POD_IPV6, b"IPv6 unicast"),
        "IPv6 multicast": udp6(multicast6, "fe80::99", "ff02::1", b"IPv6 multicast"),
    }


def heard(place: Place, mac: str) -> set[str]:
    """Which of the probes the pod answered, or delivered to a socket of its own."""
    receive(place.port, seconds=0)
    found = set()
    with within(place.pod), ExitStack() as stack:
        ears = [
            stack.enter_context(socket.socket(family, socket.SOCK_DGRAM))
            for family in (socket.AF_INET, socket.AF_INET6)
        ]
        ears[1].setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        for ear in ears:
            ear.bind(("", PORT))
        for probe in probes(mac).values():
            place.port.send(probe)
        answers = frames_from_node(place, WAIT)
        for ear in ears:
            with suppress(BlockingIOError):
                while True:
                    found.add(ear.recv(1 << 16, socket.MSG_DONTWAIT).decode())
    if any(answer[12:14] == b"\x08\x06" and answer[21] == 2 for answer in answers):
        found.add("an ARP request for the pod's address")
    return found


def spoken(place: Place, mac: str) -> set[str]:
    """What came out of the node with the VM's MAC, by kind, when a process of the pod spoke."""
    return {kind(data) for data in frames_spoken(place) if data[6:12] == packed(mac)} - {"?"}


def frames_spoken(place: Place, name: str = "net1") -> list[bytes]:
    """All that came out of the node when a process of the pod, of no privilege, spoke on a link."""
    receive(place.port, seconds=0)
    ifindex = show_link(name, place.pod)["ifindex"]
    with within(place.pod), ExitStack() as stack:
        stack.enter_context(unprivileged())
        mouth4, mouth6 = (
            stack.enter_context(socket.socket(family, socket.SOCK_DGRAM))
            for family in (socket.AF_INET, socket.AF_INET6)
        )
        # Refusals are silence, too: what counts is what comes out.
        with suppress(OSError):
            mouth6.setsockopt(
                socket.IPPROTO_IPV6,
                socket.IPV6_JOIN_GROUP,
                socket.inet_pton(socket.AF_INET6, "ff02::fb") + struct.pack("=I", ifindex),
            )
        with suppress(OSError):
            mouth4.setsockopt(
                socket.IPPROTO_IP,
                socket.IP_ADD_MEMBERSHIP,
                socket.inet_aton("224.0.1.251") + bytes(4) + struct.pack("=i", ifindex),
            )
        mouth4.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        for mouth in (mouth4, mouth6):
            mouth.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, name.encode())
        for address in ("255.255.255.255", "224.0.0.251", "10.88.0.1"):
            with suppress(OSError):
                mouth4.sendto(b"said", (address, PORT))
        for address in ("ff02::fb", "fe80::1"):
            with suppress(OSError):
                mouth6.sendto(b"said", (address, PORT, 0, ifindex))
        return frames_from_node(place, WAIT)


def kind(data: bytes) -> str:
    ethertype = struct.unpack_from("!H", data, 12)[0]
    if ethertype == 0x0806:
        return "ARP"
    if ethertype == 0x0800:
        if data[23] == socket.IPPROTO_IGMP:
            return "IGMP"
        return f"IPv4 datagram to {socket.inet_ntoa(data[30:34])}"
    if ethertype == 0x86DD:
        # MLD has a hop-by-hop option before it (RFC 3810, section 5).
        if data[20] == 0:
            return "MLD"
        if data[20] == socket.IPPROTO_ICMPV6:
            return "neighbour discovery"
        return f"IPv6 datagram to {socket.inet_ntop(socket.AF_INET6, data[38:54])}"
    return "?"


def frames_from_node(place: Place, seconds: float) -> list[bytes]:
    return [it.data for it in receive(place.port, seconds=seconds) if not it.sent]


@contextmanager
def unprivileged() -> Iterator[None]:
    """The process as nobody: setting the effective user also takes all capabilities' effect."""
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@contextmanager
def opened_tap(pod: str) -> Iterator[int]:
    """The device node of the pod's net1, opened as any launcher would."""
    tap = os.open(f"/dev/tap{show_link('net1', pod)['ifindex']}", os.O_RDWR | os.O_NONBLOCK)
    try:
        yield tap
    finally:
        os.close(tap)


def read_frames(tap: int) -> set[bytes]:
    """The frames that come to the tap, without the virtio header that each begins with."""
    poll = select.poll()
    poll.register(tap, select.POLLIN)
    found = set()
    while poll.poll(WAIT * 1000):
        found.add(os.read(tap, 1 << 16)[VNET_HEADER:])
    return found


def ipv6_addresses(pod: str, name: str = "net1") -> str:
    return run("ip", "-6", "-oneline", "address", "show", "dev", name, netns=pod)


def wait_until_address_is_usable(pod: str) -> None:
    """Wait for the end of duplicate address detection, before which IPv6 does not speak."""
    deadline = time.monotonic() + 10
    while "scope link" not in (shown := ipv6_addresses(pod)) or "tentative" in shown:
        assert time.monotonic() < deadline, shown
        time.sleep(0.05)


def udp4(to: str, sender: str, target: str, payload: bytes) -> bytes:
    addresses = socket.inet_aton(sender) + socket.inet_aton(target)
    header = struct.pack("!BBHHHBBH", 0x45, 0, 28 + len(payload), 0, 0, 64, socket.IPPROTO_UDP, 0)
    header = header[:10] + struct.pack("!H", checksum(header + addresses)) + addresses
    # A zero is no checksum (RFC 768).
    udp = struct.pack("!HHHH", PORT, PORT, 8 + len(payload), 0)
    return frame(to, OUTSIDE_MAC, header + udp + payload, 0x0800)


def udp6(to: str, sender: str, target: str, payload: bytes) -> bytes:
    addresses = b"".join(socket.inet_pton(socket.AF_INET6, it) for it in (sender, target))
    length = 8 + len(payload)
    pseudo = addresses + struct.pack("!II", length, socket.IPPROTO_UDP)
    ports = struct.pack("!HHH", PORT, PORT, length)
    udp = ports + struct.pack("!H", checksum(pseudo + ports + b"\0\0" + payload)) + payload
    header = struct.pack("!IHBB", 6 << 28, length, socket.IPPROTO_UDP, 64)
    return frame(to, OUTSIDE_MAC, header + addresses + udp, 0x86DD)


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071)."""
    total: int = sum(struct.unpack(f"!{(len(data) + 1) // 2}H", data + bytes(len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
