"""A guest speaks with its own MAC and its own addresses only, and hears what is for it.

Real frames through a real tap; the ear is the switch's port, which hears all that leaves the node.
Checksums are left out: nobody on the way looks at them.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import select
import struct
from collections.abc import Iterable, Mapping
from typing import Any

import pytest

from extbridge.demo.lab import Lab, Nic, run, within
from extbridge.kernel.antispoof import Guard, spoof_drops, unguarded_by
from extbridge.kernel.links import delete_link
from extbridge.kernel.netlink import NETLINK_ROUTE, Netlink
from extbridge.kernel.silence import silence, unsilence_absent
from extbridge.network.definition import Mode
from tests.kernel.frames import (
    ALL_NODES6,
    BROADCAST,
    BY_IP,
    BY_MAC,
    DESTINATION,
    ESP,
    EVERYBODY4,
    FRAGMENT,
    HOP_BY_HOP,
    ICMP,
    ICMPV6,
    IPV4,
    IPV6,
    LINK_LOCAL,
    LLDP,
    MAC,
    MLD_REPORT,
    NONCE,
    NOWHERE4,
    NOWHERE6,
    OTHER_MAC,
    OWN,
    OWN4,
    OWN6,
    RARP,
    REDIRECT,
    SCTP,
    SLLA,
    TCP,
    TLLA,
    UDP,
    Kinds,
    arp,
    behind,
    ethernet,
    icmpv6,
    ipv4,
    ipv6,
    mld,
    na,
    ns,
    option,
    other,
    other4,
    other6,
    ra,
    rs,
    solicitation,
    some_echo,
    some_extensions,
    some_headers,
    some_tcp,
    some_udp,
    udp,
)
from tests.kernel.guests import VNET_HEADER, Guest, attached, frames_of, passed
from tests.kernel.observe import EXPERIMENTAL, packed, tables
from tests.support import require

pytestmark = pytest.mark.usefixtures("one_cpu")

TCPV4_OFFLOAD, TCPV6_OFFLOAD = 1, 4

SIOCSIFHWADDR = 0x8924

HONEST: Kinds = {
    "ARP request": lambda r: arp(r, 1, r.choice(OWN4)),
    "ARP reply": lambda r: arp(r, 2, r.choice(OWN4)),
    "ARP probe": lambda r: arp(r, 1, NOWHERE4),
    "RARP": lambda r: arp(r, 3, NOWHERE4, ethertype=RARP),
    "IPv4 UDP": lambda r: ipv4(r, UDP, some_udp(r)),
    "IPv4 TCP": lambda r: ipv4(r, TCP, some_tcp(r)),
    "IPv4 others": lambda r: ipv4(r, r.choice([SCTP, ESP]), r.randbytes(r.randrange(300))),
    # Echo and its reply, destination unreachable, time exceeded, parameter problem.
    "ICMP": lambda r: ipv4(
        r, ICMP, bytes([r.choice([0, 3, 8, 11, 12])]) + r.randbytes(7 + r.randrange(300))
    ),
    "port of a DHCP server that is none": lambda r: r.choice(
        [ipv4(r, TCP, udp(r, 67, 68)), ipv6(r, TCP, udp(r, 547, 546))]
    ),
    "IPv4 options": lambda r: ipv4(r, UDP, some_udp(r), options=bytes(4 * r.randrange(1, 11))),
    "IPv4 first fragment": lambda r: ipv4(r, UDP, some_udp(r), fragment=0x2000),
    # It begins as a DHCP offer would.
    "IPv4 later fragment": lambda r: ipv4(
        r, UDP, udp(r, 67, 68), fragment=r.randrange(1, 0x2000) | r.choice([0, 0x2000])
    ),
    "DHCP from nowhere": lambda r: ipv4(r, UDP, udp(r, 68, 67), source=NOWHERE4, target=EVERYBODY4),
    "DHCP renewal": lambda r: ipv4(r, UDP, udp(r, 68, 67)),
    "IPv6 UDP": lambda r: ipv6(r, UDP, some_udp(r)),
    "IPv6 TCP": lambda r: ipv6(r, TCP, some_tcp(r)),
    "IPv6 echo": lambda r: ipv6(r, ICMPV6, some_echo(r)),
    "IPv6 others": lambda r: ipv6(r, r.choice([SCTP, ESP, 51, 59]), r.randbytes(r.randrange(300))),
    "IPv6 UDP, extension headers": lambda r: ipv6(
        r, *behind(r, UDP, some_udp(r), *some_headers(r))
    ),
    "IPv6 TCP, extension headers": lambda r: ipv6(
        r, *behind(r, TCP, some_tcp(r), *some_headers(r))
    ),
    "IPv6 echo, extension headers": lambda r: ipv6(
        r, *behind(r, ICMPV6, some_echo(r), *some_headers(r))
    ),
    "IPv6 first fragment": lambda r: ipv6(r, *behind(r, UDP, some_udp(r), FRAGMENT, fragment=1)),
    # They begin as what a first one may not, and so do their Ethernet headers, in which nftables
    # would look for it (ipv6_find_hdr tells no offset).
    "IPv6 later fragment": lambda r: (
        r.choice([BROADCAST, b"\x02\x23", b"\x86\0"]).ljust(6, b"\0")
        + ipv6(
            r,
            *behind(
                r,
                *r.choice([(UDP, udp(r, 547, 546)), (ICMPV6, ra(r))]),
                *r.choice([[], some_extensions(r)]),
                FRAGMENT,
                fragment=r.randrange(1, 0x2000) << 3 | r.randrange(2),
            ),
        )[6:]
    ),
    "RS": lambda r: ipv6(r, ICMPV6, rs(), source=r.choice([LINK_LOCAL, NOWHERE6])),
    "RS with its address": lambda r: ipv6(r, ICMPV6, rs(option(SLLA, OWN)), source=LINK_LOCAL),
    "NS": lambda r: ipv6(r, ICMPV6, ns(r.randbytes(16))),
    "NS with its address": lambda r: ipv6(r, ICMPV6, ns(r.randbytes(16), option(SLLA, OWN))),
    "NA": lambda r: ipv6(r, ICMPV6, na(r.choice([LINK_LOCAL, *OWN6]))),
    "NA with its address": lambda r: ipv6(
        r, ICMPV6, na(r.choice([LINK_LOCAL, *OWN6]), option(TLLA, OWN))
    ),
    "duplicate address detection": lambda r: ipv6(
        r,
        ICMPV6,
        ns(r.choice([LINK_LOCAL, *OWN6]), r.choice([b"", option(NONCE, r.randbytes(6))])),
        source=NOWHERE6,
    ),
    "MLD": lambda r: mld(r, r.choice([LINK_LOCAL, NOWHERE6])),
    "DHCPv6 client": lambda r: ipv6(r, UDP, udp(r, 546, 547), source=LINK_LOCAL),
}

HONEST_BY_MAC: Kinds = {
    "ARP of another address": lambda r: arp(r, r.choice([1, 2]), other4(r)),
    "IPv4 of another address": lambda r: ipv4(r, UDP, some_udp(r), source=other4(r)),
    "IPv6 of another address": lambda r: ipv6(r, UDP, some_udp(r), source=other6(r)),
    "NA of another address": lambda r: ipv6(r, ICMPV6, na(other6(r), option(TLLA, OWN))),
    "LLDP": lambda r: ethernet(LLDP, r.randbytes(60)),
    "another ethertype": lambda r: ethernet(EXPERIMENTAL, r.randbytes(r.randrange(2, 300))),
    "IEEE 802.3": lambda r: ethernet(0x0026, b"\x42\x42\x03" + r.randbytes(0x23)),
}


def impostor(rng: random.Random) -> bytes:
    """What would be honest, from another MAC."""
    made = rng.choice(list(HONEST.values()))(rng)
    return made[:6] + other(rng, OWN) + made[12:]


def tagged(rng: random.Random, tags: Iterable[int], inside: bytes) -> bytes:
    for tag in tags:
        inside = inside[:12] + struct.pack("!HH", tag, rng.randrange(4095)) + inside[12:]
    return inside


def snap(rng: random.Random, inside: bytes) -> bytes:
    """The frame with its type behind a length and SNAP's header (IEEE 802, RFC 1042)."""
    payload = bytes([rng.choice([0xAA, 0xAB]), rng.choice([0xAA, 0xAB]), 3, 0, 0, 0]) + inside[12:]
    length = rng.choice([len(payload) % 0x600, rng.randrange(0x600)])
    return BROADCAST + OWN + struct.pack("!H", length) + payload


def senseless_ipv4(rng: random.Random) -> bytes:
    """A DHCP offer with a header that no host reads."""
    offer = udp(rng, 67, 68)
    return rng.choice(
        [
            ipv4(rng, UDP, offer, version=rng.choice([0, 5, 6, 15])),
            ipv4(rng, UDP, offer, words=rng.randrange(5)),
            ipv4(rng, UDP, offer, length=rng.randrange(20)),
            ipv4(rng, UDP, offer, length=rng.randrange(28 + len(offer), 1 << 16)),
            ipv4(rng, UDP, offer, options=bytes(4), words=15)[: 14 + 24 + rng.randrange(34)],
        ]
    )


def senseless_nd(rng: random.Random) -> bytes:
    """Messages whose options are not where they could be judged."""
    spoof = option(SLLA, other(rng, OWN))
    own = option(SLLA, OWN)
    return rng.choice(
        [
            ipv6(rng, ICMPV6, solicitation(rng, own), length=rng.choice([0, 7, 15, 31, 33, 1000])),
            ipv6(rng, ICMPV6, solicitation(rng, option(SLLA, OWN, rng.choice([0, 2, 255])))),
            ipv6(rng, ICMPV6, solicitation(rng, option(SLLA, OWN, 2) + spoof)),
            ipv6(rng, ICMPV6, solicitation(rng, option(rng.randrange(3, 256), spoof[2:], 0))),
            ipv6(rng, ICMPV6, solicitation(rng, spoof[:-1])),
            ipv6(rng, ICMPV6, ra(rng), version=rng.choice([0, 4, 7, 15])),
            ipv6(rng, ICMPV6, ra(rng), length=rng.randrange(1 << 16)),
            ipv6(rng, rng.choice([HOP_BY_HOP, DESTINATION]), bytes([ICMPV6, 255]) + ra(rng)),
        ]
    )


SPOOFED: Kinds = {
    "Ethernet source": impostor,
    "ARP sender MAC": lambda r: arp(r, r.choice([1, 2]), r.choice(OWN4), mac=other(r, OWN)),
    "RARP sender MAC": lambda r: arp(r, 3, NOWHERE4, mac=other(r, OWN), ethertype=RARP),
    "ARP of another kind": lambda r: arp(
        r,
        1,
        r.choice(OWN4),
        kind=r.choice([(6, IPV4, 6, 4), (1, IPV6, 6, 4), (1, IPV4, 8, 4), (1, IPV4, 6, 16)]),
    ),
    "link-layer option": lambda r: ipv6(
        r, ICMPV6, solicitation(r, option(r.choice([SLLA, TLLA]), other(r, OWN)))
    ),
    "second link-layer option": lambda r: ipv6(
        r,
        ICMPV6,
        solicitation(
            r,
            r.choice([option(SLLA, OWN), option(NONCE, r.randbytes(6))])
            + option(r.choice([SLLA, TLLA]), other(r, OWN)),
        ),
    ),
    "ND behind extension headers": lambda r: ipv6(
        r, *behind(r, ICMPV6, solicitation(r, option(SLLA, other(r, OWN))), *some_headers(r))
    ),
    "ND in a first fragment": lambda r: ipv6(
        r,
        *behind(r, ICMPV6, solicitation(r, option(SLLA, other(r, OWN))), FRAGMENT, fragment=1),
    ),
    "RA": lambda r: ipv6(r, ICMPV6, ra(r)),
    "RA behind extension headers": lambda r: ipv6(r, *behind(r, ICMPV6, ra(r), *some_headers(r))),
    # RFC 7113: the first fragment ends before the message begins.
    "RA in a later fragment": lambda r: ipv6(
        r, *behind(r, ICMPV6, b"", FRAGMENT, DESTINATION, fragment=1)
    ),
    "redirect": lambda r: ipv6(r, ICMPV6, icmpv6(REDIRECT, r.randbytes(36))),
    "DHCP offer": lambda r: ipv4(r, UDP, udp(r, 67, 68), target=EVERYBODY4),
    "DHCP offer behind options": lambda r: ipv4(
        r, UDP, udp(r, 67, 68), options=bytes(4 * r.randrange(1, 11))
    ),
    "DHCP offer in fragments": lambda r: ipv4(r, UDP, udp(r, 67, 68), fragment=0x2000),
    "DHCP offer from another port": lambda r: ipv4(r, UDP, udp(r, r.randrange(1024, 1 << 16), 68)),
    "DHCPv6 server": lambda r: ipv6(r, UDP, udp(r, 547, 546)),
    "DHCPv6 server at another port": lambda r: ipv6(
        r, *behind(r, UDP, udp(r, r.randrange(1024, 1 << 16), 546), *r.choice([[], [FRAGMENT]]))
    ),
    "ICMP redirect or router": lambda r: ipv4(r, ICMP, bytes([r.choice([5, 9])]) + r.randbytes(35)),
    "DHCPv6 server behind extension headers": lambda r: ipv6(
        r, *behind(r, UDP, udp(r, 547, 546), *some_headers(r))
    ),
    "senseless IPv4": senseless_ipv4,
    "senseless ND": senseless_nd,
}

TAGGED: Kinds = {
    "VLAN": lambda r: tagged(
        r, [r.choice([0x8100, 0x88A8, 0x9100, 0x9200, 0x9300])], spoofed_inside(r)
    ),
    "other tags": lambda r: tagged(r, [r.choice([0x893F, 0x8926, 0x88E7])], spoofed_inside(r)),
    "SNAP": lambda r: snap(
        r, r.choice([spoofed_inside(r), tagged(r, [0x8100], spoofed_inside(r))])
    ),
    "QinQ": lambda r: tagged(r, [0x8100, r.choice([0x8100, 0x88A8, 0x9100])], spoofed_inside(r)),
}

SPOOFED_BY_IP: Kinds = {
    "ARP sender address": lambda r: arp(r, r.choice([1, 2]), other4(r)),
    "IPv4 source": lambda r: ipv4(
        r, *r.choice([(UDP, some_udp(r)), (TCP, some_tcp(r))]), source=other4(r)
    ),
    "IPv4 source of a fragment": lambda r: ipv4(
        r, UDP, some_udp(r), source=other4(r), fragment=r.randrange(0x2000) | 0x2000
    ),
    "IPv4 from nowhere": lambda r: r.choice(
        [
            ipv4(r, UDP, udp(r, 68, 67), source=NOWHERE4),
            ipv4(r, TCP, udp(r, 68, 67), source=NOWHERE4, target=EVERYBODY4),
            ipv4(r, UDP, udp(r, 67, 67), source=NOWHERE4, target=EVERYBODY4),
            ipv4(r, UDP, udp(r, 68, 68), source=NOWHERE4, target=EVERYBODY4),
            ipv4(r, UDP, udp(r, 68, 67), source=NOWHERE4, target=EVERYBODY4, fragment=1),
        ]
    ),
    "IPv6 source": lambda r: ipv6(
        r, *r.choice([(UDP, some_udp(r)), (TCP, some_tcp(r))]), source=other6(r)
    ),
    "IPv6 source of a fragment": lambda r: ipv6(
        r,
        *behind(r, UDP, some_udp(r), FRAGMENT, fragment=r.randrange(0x2000) << 3),
        source=other6(r),
    ),
    "IPv6 from nowhere": lambda r: ipv6(
        r, *r.choice([(UDP, some_udp(r)), (ICMPV6, some_echo(r))]), source=NOWHERE6
    ),
    # It begins as a report would.
    "IPv6 fragment from nowhere": lambda r: ipv6(
        r,
        *behind(
            r,
            ICMPV6,
            icmpv6(MLD_REPORT, r.randbytes(20)),
            FRAGMENT,
            fragment=r.randrange(0x2000) << 3,
        ),
        source=NOWHERE6,
    ),
    "ND source": lambda r: ipv6(r, ICMPV6, solicitation(r, option(SLLA, OWN)), source=other6(r)),
    "NA target": lambda r: ipv6(r, ICMPV6, na(other6(r), option(TLLA, OWN))),
    "target of duplicate address detection": lambda r: ipv6(
        r, ICMPV6, ns(other6(r)), source=NOWHERE6
    ),
    "MLD source": lambda r: mld(r, other6(r)),
    **{kind: HONEST_BY_MAC[kind] for kind in ("LLDP", "another ethertype", "IEEE 802.3")},
}


# Octets of a frame that does not lie in one piece (tap_alloc_skb), on a NIC of 9,000.
LONG = 5000

LONG_SPOOFED: Kinds = {
    "RA": lambda r: ipv6(r, ICMPV6, ra(r) + bytes(LONG)),
    "RA behind extension headers": lambda r: ipv6(
        r, *behind(r, ICMPV6, ra(r) + bytes(LONG), *some_headers(r))
    ),
    "RA in a first fragment": lambda r: ipv6(
        r, *behind(r, ICMPV6, ra(r) + bytes(LONG), FRAGMENT, fragment=1)
    ),
    "NS": lambda r: ipv6(
        r, ICMPV6, ns(r.randbytes(16), option(SLLA, other(r, OWN))) + bytes(LONG), length=32
    ),
    "DHCPv6 server": lambda r: ipv6(r, UDP, udp(r, 547, 546) + bytes(LONG)),
    "DHCPv6 server behind extension headers": lambda r: ipv6(
        r, *behind(r, UDP, udp(r, 547, 546) + bytes(LONG), *some_headers(r))
    ),
    "DHCP offer": lambda r: ipv4(r, UDP, udp(r, 67, 68) + bytes(LONG)),
    "ARP sender MAC": lambda r: arp(r, 1, OWN4[0], mac=other(r, OWN)) + bytes(LONG),
}

LONG_HONEST: Kinds = {
    "IPv4 UDP": lambda r: ipv4(r, UDP, some_udp(r) + r.randbytes(LONG)),
    "IPv6 UDP": lambda r: ipv6(r, UDP, some_udp(r) + r.randbytes(LONG)),
    "IPv6 TCP": lambda r: ipv6(r, TCP, some_tcp(r) + r.randbytes(LONG)),
    "IPv6 echo": lambda r: ipv6(r, ICMPV6, some_echo(r) + r.randbytes(LONG)),
    "IPv6 others": lambda r: ipv6(r, r.choice([SCTP, ESP]), r.randbytes(LONG)),
    "IPv6 first fragment": lambda r: (
        ipv6(
            r,
            *behind(
                r,
                *r.choice([(UDP, some_udp(r)), (ICMPV6, some_echo(r)), (TCP, some_tcp(r))]),
                FRAGMENT,
                fragment=1,
            ),
        )
        + r.randbytes(LONG)
    ),
    "IPv6 later fragment": lambda r: ipv6(
        r,
        *behind(
            r,
            UDP,
            udp(r, 547, 546) + r.randbytes(LONG),
            FRAGMENT,
            fragment=r.randrange(1, 0x2000) << 3,
        ),
    ),
}

# It leaves its next header, TCP, where the kernel will look for that of a longer frame.
INNOCENT = ethernet(
    IPV6, struct.pack("!IHBB", 6 << 28, 20, TCP, 64) + LINK_LOCAL + ALL_NODES6 + bytes(20)
)


def after_innocent(frames: Iterable[bytes]) -> list[bytes]:
    return [it for frame in frames for it in (INNOCENT, frame)]


def spoofed_inside(rng: random.Random) -> bytes:
    return rng.choice(list({**SPOOFED, **SPOOFED_BY_IP}.values()))(rng)


HONEST_OF: Mapping[Guard, Kinds] = {BY_MAC: {**HONEST, **HONEST_BY_MAC}, BY_IP: HONEST}
SPOOFED_OF: Mapping[Guard, Kinds] = {
    BY_MAC: {**SPOOFED, **TAGGED},
    BY_IP: {**SPOOFED, **TAGGED, **SPOOFED_BY_IP},
}

both_guards = pytest.mark.parametrize("guard", [BY_MAC, BY_IP], ids=["mac", "ip"])


def test_every_spoof_arrives_without_a_guard(lab: Lab, nic: Nic, pod: str) -> None:
    """What a guard stops is there: without one, each spoofed frame reaches the switch."""
    with attached(lab, nic, pod, None) as guest:
        for kind, frames in frames_of(SPOOFED_OF[BY_IP]):
            # By number: a packet socket has VLAN tags beside the frame.
            assert len(passed(guest, frames)) == len(frames), kind


@both_guards
def test_no_spoof_arrives(lab: Lab, nic: Nic, pod: str, guard: Guard) -> None:
    """No frame with another source than the guest's own leaves the node, whatever its kind."""
    with attached(lab, nic, pod, guard) as guest:
        for kind, frames in frames_of(SPOOFED_OF[guard]):
            assert passed(guest, frames) == [], kind


@both_guards
def test_no_truncated_spoof_arrives(lab: Lab, nic: Nic, pod: str, guard: Guard) -> None:
    """Cut off anywhere behind its Ethernet header, a spoofed frame is one still."""
    with attached(lab, nic, pod, guard) as guest:
        for kind, frames in frames_of(SPOOFED_OF[guard], 20):
            cut = [frame[:length] for frame in frames for length in range(14, len(frame))]
            assert passed(guest, cut) == [], kind


@both_guards
def test_honest_frames_arrive(lab: Lab, nic: Nic, pod: str, guard: Guard) -> None:
    """What an honest guest says is heard outside, byte for byte."""
    with attached(lab, nic, pod, guard) as guest:
        for kind, frames in frames_of(HONEST_OF[guard]):
            assert passed(guest, frames) == frames, kind
        with within(pod):
            assert not any(spoof_drops(guest.ifindex).values())


@both_guards
def test_what_lies_beyond_the_first_piece_is_judged_too(lab: Lab, guard: Guard) -> None:
    """Of long frames, of which the sender chooses what the kernel has at hand, the same holds.

    There nftables itself takes a next header of the frame before for this one's (ipv6_find_hdr).
    """
    nic, pod = lab.nic(mtu=9000), lab.pod("vm")
    with attached(lab, nic, pod, guard) as guest:
        for kind, frames in frames_of(LONG_SPOOFED, 200):
            assert passed(guest, after_innocent(frames)) == [INNOCENT] * len(frames), kind
        for kind, frames in frames_of(LONG_HONEST, 200):
            both = after_innocent(frames)
            assert passed(guest, both) == both, kind


@both_guards
@pytest.mark.parametrize("version", [4, 6])
def test_super_frames_arrive(lab: Lab, nic: Nic, pod: str, guard: Guard, version: int) -> None:
    """A guest that leaves segmentation to the NIC loses nothing to the guard, and gains nothing."""
    rng = random.Random(version)  # noqa: S311 - what is wanted is the same each time
    data = rng.randbytes(40_000)
    segment = rng.randbytes(12) + b"\x50\x10" + bytes(6) + data
    made = ipv4(rng, TCP, segment) if version == 4 else ipv6(rng, TCP, segment)
    start = 34 if version == 4 else 54
    offload = TCPV4_OFFLOAD if version == 4 else TCPV6_OFFLOAD
    header = struct.pack("=BBHHHH", 1, offload, start + 20, 1400, start, 16)
    with attached(lab, nic, pod, guard) as guest:
        heard = passed(guest, [made], header)
        # Whole, or in segments where the NIC below cannot do it either.
        assert b"".join(it[start + 20 :] for it in heard) == data
        spoofed = made[:6] + packed(OTHER_MAC) + made[12:]
        assert passed(guest, [spoofed], header) == []


@both_guards
def test_another_mac_of_the_link_gains_nothing(lab: Lab, nic: Nic, pod: str, guard: Guard) -> None:
    """A guest whose launcher changes the link's MAC through the tap is held to its first one."""
    with attached(lab, nic, pod, guard) as guest:
        change_mac(guest)
        for _, frames in frames_of(HONEST_OF[guard], 10):
            spoofed = [it[:6] + packed(OTHER_MAC) + it[12:] for it in frames]
            assert passed(guest, spoofed) == []
            assert passed(guest, frames) == frames


@pytest.mark.parametrize("mode", [Mode.VEPA, Mode.PASSTHRU])
@pytest.mark.parametrize("changed", [False, True])
def test_guest_hears_what_is_for_it(
    lab: Lab, nic: Nic, pod: str, mode: Mode, *, changed: bool
) -> None:
    """A guest hears its own MAC, groups and broadcasts, and no other's even where it could."""
    wanted = [OWN, BROADCAST, packed("33:33:00:00:00:01"), packed("01:00:5e:00:00:fb")]
    with attached(lab, nic, pod, BY_MAC, mode) as guest:
        if changed:
            change_mac(guest)
            if mode == Mode.VEPA:
                # The NIC below passes frames on by the link's MAC.
                wanted.remove(OWN)
        foreign = [packed(OTHER_MAC), packed("52:54:00:00:00:04"), b"\0" * 6]
        for target in [*foreign, *wanted]:
            guest.ear.send(to_guest(target))
        # By the last that is wanted, those before have come or will not.
        assert read_until(guest, to_guest(wanted[-1])) == [to_guest(it) for it in wanted]
        with within(pod):
            dropped = spoof_drops(guest.ifindex)["destination"]
        # In passthru mode all foreign ones come as far as the guard.
        assert dropped == {Mode.VEPA: int(changed), Mode.PASSTHRU: len(foreign)}[mode]


@both_guards
def test_drops_are_counted_by_reason(lab: Lab, nic: Nic, pod: str, guard: Guard) -> None:
    """Each dropped frame counts once, for what was wrong with it."""
    reasons = {
        "source": ["Ethernet source"],
        "arp_sender": ["ARP sender MAC", "RARP sender MAC", "ARP of another kind"],
        "ipv4": ["DHCP offer", "senseless IPv4"],
        "ipv6": ["DHCPv6 server", "RA behind extension headers"],
        "nd": ["RA", "redirect", "link-layer option"],
    }
    if guard == BY_MAC:
        reasons |= {"tag": ["VLAN", "QinQ", "other tags", "SNAP"]}
    else:
        reasons |= {"ethertype": ["VLAN", "LLDP"]}
        reasons["arp_sender"].append("ARP sender address")
        reasons["ipv4"].append("IPv4 source")
        reasons["ipv6"].append("IPv6 source")
        reasons["nd"].append("NA target")
    with attached(lab, nic, pod, guard) as guest:
        for kinds in reasons.values():
            for _, frames in frames_of({kind: SPOOFED_OF[guard][kind] for kind in kinds}, 7):
                passed(guest, frames)
        with within(pod):
            assert spoof_drops(guest.ifindex) == {
                "destination": 0,
                "checksum": 0,
                **{reason: 7 * len(kinds) for reason, kinds in reasons.items()},
            }
            assert spoof_drops(guest.ifindex + 1) == {}


@both_guards
def test_guard_is_whole_as_it_was_made(lab: Lab, nic: Nic, pod: str, guard: Guard) -> None:
    """What ADD made is found whole, whatever it has counted, and held against another guard."""
    with attached(lab, nic, pod, guard) as guest:
        for _, frames in frames_of(SPOOFED_OF[guard], 1):
            passed(guest, frames)
        with within(pod):
            assert unguarded_by(guest.ifindex, "net1", guard) == ""
            assert "is there" in unguarded_by(guest.ifindex, "net1", None)
            another = Guard(OTHER_MAC, guard.addresses)
            assert "source" in unguarded_by(guest.ifindex, "net1", another)
            assert "differs" in unguarded_by(guest.ifindex, "net1", Guard(MAC, ("192.0.2.5",)))


def test_no_guard_is_no_table(lab: Lab, nic: Nic, pod: str) -> None:
    """Where none was asked for, none is there, and one that is asked for is missed."""
    require("nft")
    with attached(lab, nic, pod, None) as guest:
        assert tables(pod) == [f"inet extbridge_{guest.ifindex}"]
        with within(pod):
            assert unguarded_by(guest.ifindex, "net1", None) == ""
            assert "differs" in unguarded_by(guest.ifindex, "net1", BY_MAC)


# The same chain in another place; its rules are gone with it, so only what is told differs.
MOVED = (
    "flush chain netdev {{table}} {chain} ; delete chain netdev {{table}} {chain} ;"
    " add chain netdev {{table}} {chain} {{{{ type filter hook {hook} ; }}}}"
)


@pytest.mark.parametrize(
    ("change", "chain"),
    [
        ("delete table netdev {table}", "source"),
        ("flush chain netdev {table} source", "source"),
        ("flush chain netdev {table} nd", "nd"),
        ("insert rule netdev {table} source accept", "source"),
        ("add rule netdev {table} ethertype accept", "ethertype"),
        ("insert rule netdev {table} arp_sender ether type arp accept", "arp_sender"),
        ("add chain netdev {table} more", "more"),
        (MOVED.format(chain="destination", hook="ingress device lo priority -500"), "destination"),
        (MOVED.format(chain="source", hook="egress device net1 priority 5"), "source"),
    ],
    ids=lambda value: value if " " not in value else None,
)
def test_change_by_hand_is_noticed(lab: Lab, nic: Nic, pod: str, change: str, chain: str) -> None:
    """Whatever anybody changes in the rules, CHECK names the chain."""
    require("nft")
    with attached(lab, nic, pod, BY_MAC) as guest:
        table = f"extbridge_{guest.ifindex}"
        run("nft", change.format(table=table), netns=pod)
        with within(pod):
            told = unguarded_by(guest.ifindex, "net1", BY_MAC)
    assert f"nftables table netdev {table} differs in chain" in told
    assert chain in told.split("in chain ")[1].split(", ")


@both_guards
def test_want_of_any_rule_is_noticed(lab: Lab, nic: Nic, pod: str, guard: Guard) -> None:
    """No rule is so small that CHECK does not miss it."""
    require("nft")
    with attached(lab, nic, pod, guard) as guest:
        table = f"extbridge_{guest.ifindex}"
        number = len(listed_rules(pod, table))
        assert number > 30
        for position in range(number):
            one = listed_rules(pod, table)[position]
            run("nft", "delete", "rule", "netdev", table, one["chain"], "handle",
                str(one["handle"]), netns=pod)  # fmt: skip
            with within(pod):
                told = unguarded_by(guest.ifindex, "net1", guard)
                assert told.endswith(f"differs in chain {one['chain']}")
                run("nft", "flush", "ruleset")
                silence(guest.ifindex, "net1", guard)


def test_rules_go_with_their_link(lab: Lab, nic: Nic, pod: str) -> None:
    """Once a link is gone nothing is left of its tables, and those of others stay."""
    require("nft")
    with attached(lab, nic, pod, BY_IP) as guest:
        assert len(tables(pod)) == 2
        with within(pod), Netlink(NETLINK_ROUTE) as route:
            unsilence_absent(route)
            assert len(tables(pod)) == 2
            silence(guest.ifindex + 1, "lo", BY_MAC)
            assert len(tables(pod)) == 4
            unsilence_absent(route)
            assert unguarded_by(guest.ifindex, "net1", BY_IP) == ""
            assert len(tables(pod)) == 2
            delete_link(route, guest.ifindex)
            unsilence_absent(route)
    assert tables(pod) == []


def listed_rules(pod: str, table: str) -> list[dict[str, Any]]:
    listed = run("nft", "--json", "--handle", "list", "table", "netdev", table, netns=pod)
    return [it["rule"] for it in json.loads(listed)["nftables"] if "rule" in it]


def change_mac(guest: Guest) -> None:
    """Give the link another MAC, as whoever holds the tap may (tap_ioctl)."""
    fcntl.ioctl(guest.tap, SIOCSIFHWADDR, struct.pack("=16sH6s8x", b"", 1, packed(OTHER_MAC)))


def to_guest(target: bytes) -> bytes:
    return ethernet(EXPERIMENTAL, bytes(46), to=target, sender=packed("52:54:00:00:00:77"))


def read_until(guest: Guest, last: bytes) -> list[bytes]:
    """What the guest hears, up to this frame."""
    heard: list[bytes] = []
    poll = select.poll()
    poll.register(guest.tap, select.POLLIN)
    while last not in heard:
        assert poll.poll(10_000), f"not heard after {heard}"
        heard.append(os.read(guest.tap, 1 << 16)[VNET_HEADER:])
    return heard
