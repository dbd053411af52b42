"""Ethernet frames as a guest may send them, made by hand.

Checksums are left out: nobody on the way looks at them.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Mapping
from ipaddress import IPv4Address, IPv6Address

from extbridge.kernel.antispoof import Guard
from tests.kernel.observe import packed

MAC, OTHER_MAC = "52:54:00:00:00:05", "52:54:00:00:00:99"
OWN = packed(MAC)
BROADCAST = b"\xff" * 6
ALL_NODES = packed("33:33:00:00:00:01")

OWN4 = [IPv4Address("192.0.2.5").packed, IPv4Address("198.51.100.7").packed]
OWN6 = [IPv6Address("2001:db8::5").packed, IPv6Address("2001:db8:1::5").packed]
LINK_LOCAL = IPv6Address("fe80::5054:ff:fe00:5").packed
NOWHERE4, NOWHERE6 = bytes(4), bytes(16)
EVERYBODY4 = b"\xff" * 4
ALL_NODES6 = IPv6Address("ff02::1").packed

BY_MAC = Guard(MAC, None)
BY_IP = Guard(MAC, (*(str(IPv4Address(it)) for it in OWN4), *(str(IPv6Address(it)) for it in OWN6)))

ARP, RARP, IPV4, IPV6, LLDP = 0x0806, 0x8035, 0x0800, 0x86DD, 0x88CC
TCP, UDP, ICMP, ICMPV6, SCTP, ESP = 6, 17, 1, 58, 132, 50
HOP_BY_HOP, ROUTING, FRAGMENT, DESTINATION = 0, 43, 44, 60
RS, RA, NS, NA, REDIRECT, ECHO, MLD_REPORT, MLD_DONE, MLDV2_REPORT = (
    133, 134, 135, 136, 137, 128, 131, 132, 143,
)  # fmt: skip
SLLA, TLLA, NONCE = 1, 2, 14

ARP_OF_IPV4 = struct.pack("!HHBBH", 1, IPV4, 6, 4, 1)

Kinds = Mapping[str, Callable[[random.Random], bytes]]


def ethernet(
    ethertype: int, payload: bytes, *, to: bytes = BROADCAST, sender: bytes = OWN
) -> bytes:
    return to + sender + struct.pack("!H", ethertype) + payload


def arp(
    rng: random.Random,
    operation: int,
    sender: bytes,
    *,
    mac: bytes = OWN,
    ethertype: int = ARP,
    kind: tuple[int, int, int, int] = (1, IPV4, 6, 4),
) -> bytes:
    header = struct.pack("!HHBBH", *kind, operation)
    padding = bytes(rng.choice([0, 18]))
    return ethernet(ethertype, header + mac + sender + rng.randbytes(10) + padding)


def ipv4(
    rng: random.Random,
    protocol: int,
    payload: bytes,
    *,
    source: bytes = b"",
    target: bytes = b"",
    options: bytes = b"",
    fragment: int = 0,
    version: int = 4,
    words: int | None = None,
    length: int | None = None,
) -> bytes:
    size = 20 + len(options)
    header = struct.pack(
        "!BBHHHBBH4s4s",
        version << 4 | (size // 4 if words is None else words),
        0,
        size + len(payload) if length is None else length,
        rng.randrange(1 << 16),
        fragment,
        64,
        protocol,
        0,
        source or rng.choice(OWN4),
        target or rng.randbytes(4),
    )
    return ethernet(IPV4, header + options + payload)


def ipv6(
    rng: random.Random,
    next_header: int,
    payload: bytes,
    *,
    source: bytes = b"",
    target: bytes = b"",
    length: int | None = None,
    version: int = 6,
) -> bytes:
    header = struct.pack(
        "!IHBB16s16s",
        version << 28,
        len(payload) if length is None else length,
        next_header,
        255,
        source or rng.choice([LINK_LOCAL, *OWN6]),
        target or rng.choice([ALL_NODES6, rng.randbytes(16)]),
    )
    return ethernet(IPV6, header + payload)


def udp(rng: random.Random, source: int, target: int) -> bytes:
    data = rng.randbytes(rng.randrange(300))
    return struct.pack("!HHHH", source, target, 8 + len(data), 0) + data


def some_udp(rng: random.Random) -> bytes:
    # The ports of clients are among them, and the bytes of ND's types in the first place.
    source = rng.choice([68, 546, 0x8600, 0x8900, rng.randrange(1024, 1 << 16)])
    return udp(rng, source, rng.choice([67, 547, rng.randrange(1024, 1 << 16)]))


def some_tcp(rng: random.Random) -> bytes:
    return rng.randbytes(12) + b"\x50" + rng.randbytes(7 + rng.randrange(300))


def icmpv6(kind: int, body: bytes) -> bytes:
    return struct.pack("!BBH", kind, 0, 0) + body


def some_echo(rng: random.Random) -> bytes:
    return icmpv6(ECHO, rng.randbytes(4 + rng.randrange(100)))


def option(kind: int, value: bytes, octets: int = 1) -> bytes:
    return bytes([kind, octets]) + value


def rs(options: bytes = b"") -> bytes:
    return icmpv6(RS, bytes(4) + options)


def ns(target: bytes, options: bytes = b"") -> bytes:
    return icmpv6(NS, bytes(4) + target + options)


def na(target: bytes, options: bytes = b"") -> bytes:
    return icmpv6(NA, b"\x60" + bytes(3) + target + options)


def solicitation(rng: random.Random, options: bytes) -> bytes:
    """Any of the three messages that may bear options of the guest, addresses being its own."""
    target = rng.choice([LINK_LOCAL, *OWN6])
    return rng.choice([rs(options), ns(target, options), na(target, options)])


def ra(rng: random.Random) -> bytes:
    return icmpv6(RA, rng.randbytes(12) + option(SLLA, OWN) * rng.randrange(2))


def behind(
    rng: random.Random, protocol: int, payload: bytes, *kinds: int, fragment: int = 0
) -> tuple[int, bytes]:
    """The payload behind extension headers of these kinds; its first header's number, and all."""
    for kind in reversed(kinds):
        if kind == FRAGMENT:
            header = struct.pack("!BBHI", protocol, 0, fragment, rng.randrange(1 << 32))
        else:
            more = rng.randrange(3)
            header = bytes([protocol, more]) + bytes(6 + 8 * more)
        protocol, payload = kind, header + payload
    return protocol, payload


def some_extensions(rng: random.Random) -> list[int]:
    return [rng.choice([HOP_BY_HOP, ROUTING, DESTINATION]) for _ in range(rng.randrange(1, 4))]


def some_headers(rng: random.Random) -> list[int]:
    """Extension headers, with that of a fragment which is the only one among them."""
    return rng.choice([some_extensions(rng), [FRAGMENT], [*some_extensions(rng), FRAGMENT]])


def mld(rng: random.Random, source: bytes) -> bytes:
    kind = rng.choice([MLD_REPORT, MLD_DONE, MLDV2_REPORT])
    # With the router alert (RFC 2711).
    alert = bytes([ICMPV6, 0]) + b"\x05\x02\0\0\x01\0"
    payload = alert + icmpv6(kind, rng.randbytes(20))
    return ipv6(rng, HOP_BY_HOP, payload, source=source)


def other(rng: random.Random, *own: bytes) -> bytes:
    """None of these, and often by one bit only."""
    near = int.from_bytes(rng.choice(own), "big") ^ 1 << rng.randrange(8 * len(own[0]))
    made = rng.choice([near.to_bytes(len(own[0]), "big"), rng.randbytes(len(own[0]))])
    return other(rng, *own) if made in own else made


def other4(rng: random.Random) -> bytes:
    return other(rng, *OWN4, NOWHERE4)


def other6(rng: random.Random) -> bytes:
    return other(rng, *OWN6, LINK_LOCAL, NOWHERE6)
