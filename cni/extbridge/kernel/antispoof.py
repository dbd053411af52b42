"""Hold the guest to its MAC, and to its addresses where it has been given some.

Guest transmit is the macvtap's egress hook, guest receive its ingress hook. The rules name the MAC
itself, so whoever holds a tap fd and changes the link's by SIOCSIFHWADDR gains nothing.

A load of what is not there ends its rule without a match (nft_payload_eval, NFT_BREAK). So rules
say what passes, and what none lets pass is dropped: a truncated frame is never taken for a good
one. A VLAN tag does not pass, for the guest is on an access port, nor what else stands before a
type: what is inside would need all of this once more, further behind.

What `ipv6_find_hdr` says (meta l4proto, exthdr) is believed only of frames that lie in one piece:
it reads the first next header without asking whether that is in the skb's linear part, and of a
frame of a page and more the sender chooses how much is (tap_get_user, hdr_len). Of others the
headers are read where they stand, the fixed one and a fragment's behind it; long frames with
further extension headers do not pass.

What the guest has written after these rules have looked is `checksums`' to judge.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from ipaddress import ip_address

from extbridge.kernel import nftables
from extbridge.kernel.netlink import NETLINK_NETFILTER, NETLINK_ROUTE, Netlink
from extbridge.kernel.nftables import (
    NETDEV,
    NETDEV_EGRESS,
    NETDEV_INGRESS,
    Chain,
    Hook,
    Table,
    accept,
    count,
    drop,
    equal,
    goto,
    jump,
    load_ipv6_extension,
    load_meta,
    load_payload,
    mask,
    outside,
    rule,
    table_name,
    unequal,
    within,
)
from extbridge.kernel.tc import filter_drops

# linux/netfilter/nf_tables.h, enum nft_payload_bases and nft_meta_keys.
_LINK, _NETWORK, _TRANSPORT = 0, 1, 2
_META_LEN = 0
_META_L4PROTO = 16

# Before every other rule on the link.
_PRIORITY = -500

_ARP, _RARP, _IPV4, _IPV6 = (bytes.fromhex(it) for it in ("0806", "8035", "0800", "86dd"))
# 802.1Q, 802.1ad, and the numbers used for the latter before it had its own; 802.1BR's and Cisco's
# tags of a port, 802.1ah's backbone tag.
_TAGS = (
    equal(b"\x81\0"),
    equal(b"\x88\xa8"),
    within(b"\x91\0", b"\x93\0"),
    equal(b"\x89\x3f"),
    equal(b"\x89\x26"),
    equal(b"\x88\xe7"),
)
# A length and no type: behind it may be SNAP, and in that any type, which some receivers read
# (CVE-2021-27853, CVE-2021-27861).
_IS_LENGTH = within(b"\0\0", b"\x05\xff")
_IS_NO_SNAP = load_payload(_LINK, 14, 2) + mask(b"\xfe\xfe") + unequal(b"\xaa\xaa")

# Of an option of 8 octets; types 0 to 3 become 0.
_TYPE_TO_3 = mask(b"\xfc" + b"\xff" * 7)

_ICMP, _UDP, _ICMPV6 = b"\x01", b"\x11", b"\x3a"
# ICMP's redirect and router advertisement (RFC 792, RFC 1256).
_REDIRECT4, _RA4 = b"\x05", b"\x09"
_HOP_BY_HOP, _ROUTING, _FRAGMENT, _DESTINATION_OPTIONS = b"\x00", b"\x2b", b"\x2c", b"\x3c"

# A client listens whatever port a server speaks from: both ends are looked at.
_DHCP_SERVER, _DHCP_CLIENT = struct.pack("!H", 67), struct.pack("!H", 68)
_DHCPV6_SERVER, _DHCPV6_CLIENT = struct.pack("!H", 547), struct.pack("!H", 546)
_DHCP_CLIENT_TO_SERVER = struct.pack("!HH", 68, 67)

# Router and neighbour solicitation and advertisement, redirect (RFC 4861).
_RS, _NS, _NA = b"\x85", b"\x87", b"\x88"
_ND = (_RS, b"\x89")
# Multicast listener report and done, and the report of MLDv2 (RFC 2710, RFC 3810).
_MLD_REPORT, _MLD_DONE, _MLDV2_REPORT = b"\x83", b"\x84", b"\x8f"

_UNSPECIFIED4, _UNSPECIFIED6 = bytes(4), bytes(16)
_FROM_NOWHERE_TO_ALL = _UNSPECIFIED4 + b"\xff" * 4

_UNICAST_DESTINATION = (
    load_payload(_LINK, 0, 1) + mask(b"\1") + equal(b"\0") + load_payload(_LINK, 0, 6)
)
_SOURCE = load_payload(_LINK, 6, 6)
_ETHERTYPE = load_payload(_LINK, 12, 2)
# Of Ethernet and IPv4: hardware and protocol type, and the lengths of their addresses.
_ARP_OF_IPV4 = load_payload(_NETWORK, 0, 6) + equal(bytes.fromhex("000108000604"))
_ARP_SENDER_MAC = _ARP_OF_IPV4 + load_payload(_NETWORK, 8, 6)
_ARP_SENDER = _ARP_OF_IPV4 + load_payload(_NETWORK, 8, 10)
_LATER_FRAGMENT4 = load_payload(_NETWORK, 6, 2) + mask(b"\x1f\xff") + unequal(b"\0\0")
_IPV4_SOURCE = load_payload(_NETWORK, 12, 4)
_IPV4_ADDRESSES = load_payload(_NETWORK, 12, 8)
_IPV6_LENGTH_AND_NEXT = load_payload(_NETWORK, 4, 3)
_IPV6_NEXT = load_payload(_NETWORK, 6, 1)
_IPV6_SOURCE = load_payload(_NETWORK, 8, 16)
_LATER_FRAGMENT6 = mask(b"\xff\xf8") + unequal(b"\0\0")
_L4PROTO = load_meta(_META_L4PROTO)
_PORTS = load_payload(_TRANSPORT, 0, 4)
_ICMP_TYPE = load_payload(_TRANSPORT, 0, 1)

# Of a message right behind the fixed header.
_ND_TYPE = load_payload(_NETWORK, 40, 1)
_ND_TARGET = load_payload(_NETWORK, 48, 16)

# So short a frame lies in one piece (tap_alloc_skb), unless vhost-net was told to try zero copy
# (experimental_zcopytx). The length is in host byte order.
_IN_ONE_PIECE = load_meta(_META_LEN) + mask(struct.pack("=I", (1 << 32) - 2048)) + equal(bytes(4))

_ACCEPT = accept()
_COUNTED_DROP = count() + drop()
_DROP = rule(_COUNTED_DROP)
_TO_ETHERTYPE = goto("ethertype")

_DISPATCH = (
    rule(_ETHERTYPE, equal(_IPV4), goto("ipv4")),
    rule(_ETHERTYPE, equal(_IPV6), goto("ipv6")),
    rule(_ETHERTYPE, equal(_ARP), goto("arp_sender")),
    rule(_ETHERTYPE, equal(_RARP), goto("arp_sender")),
)


def _no_dhcp(base: int, at: int) -> bytes:
    """UDP's ports, which stand there, are neither a DHCP server's nor one of its clients'."""
    source = load_payload(base, at, 2) + unequal(_DHCP_SERVER)
    return source + load_payload(base, at + 2, 2) + unequal(_DHCP_CLIENT)


def _no_dhcpv6(base: int, at: int) -> bytes:
    source = load_payload(base, at, 2) + unequal(_DHCPV6_SERVER)
    return source + load_payload(base, at + 2, 2) + unequal(_DHCPV6_CLIENT)


_TAGGED = (
    *(rule(_ETHERTYPE, it, goto("tag")) for it in _TAGS),
    rule(_ETHERTYPE, _IS_LENGTH, _IS_NO_SNAP, _ACCEPT),
    rule(_ETHERTYPE, _IS_LENGTH, goto("tag")),
)

# A later fragment is nothing without the first, which has the ports. l4proto is loaded there for
# the sake of headers that make no sense, which have none (nft_set_pktinfo_ipv4_validate).
_FROM_IPV4 = (
    rule(_L4PROTO, _LATER_FRAGMENT4, _ACCEPT),
    rule(_L4PROTO, unequal(_UDP), unequal(_ICMP), _ACCEPT),
    rule(_L4PROTO, equal(_UDP), _no_dhcp(_TRANSPORT, 0), _ACCEPT),
    rule(_L4PROTO, equal(_ICMP), _ICMP_TYPE, unequal(_REDIRECT4), unequal(_RA4), _ACCEPT),
)

# That there is no fragment must be asked: a short load finds ports in any (nft_payload_fast_eval).
_DHCP_CLIENT = rule(
    _IPV4_ADDRESSES,
    equal(_FROM_NOWHERE_TO_ALL),
    load_payload(_NETWORK, 6, 4) + mask(b"\x1f\xff\0\xff"),
    equal(b"\0\0\0" + _UDP),
    _PORTS,
    equal(_DHCP_CLIENT_TO_SERVER),
    _ACCEPT,
)

# Behind a fragment header, 8 octets long.
_FRAGMENTED = _IPV6_NEXT + equal(_FRAGMENT)
_FRAGMENTED_NEXT = load_payload(_NETWORK, 40, 1)

# What is no extension header, UDP or ICMPv6. 59, no next header, is left to a later rule with its
# neighbours; behind an authentication header nobody looks who does not share the key.
_NO_HEADER_TO_READ = (
    unequal(_HOP_BY_HOP),
    unequal(_UDP),
    outside(_ROUTING, _FRAGMENT),
    outside(_ICMPV6, _DESTINATION_OPTIONS),
)

_FROM_IPV6 = (
    rule(_IPV6_NEXT, *_NO_HEADER_TO_READ, _ACCEPT),
    rule(_IPV6_NEXT, equal(_UDP), _no_dhcpv6(_NETWORK, 40), _ACCEPT),
    rule(_IPV6_NEXT, equal(_ICMPV6), _ND_TYPE, outside(*_ND), _ACCEPT),
    rule(_IPV6_NEXT, equal(_ICMPV6), _ND_TYPE, within(*_ND), goto("nd")),
    rule(_FRAGMENTED, load_payload(_NETWORK, 42, 2), _LATER_FRAGMENT6, _ACCEPT),
    rule(_FRAGMENTED, _FRAGMENTED_NEXT, *_NO_HEADER_TO_READ, _ACCEPT),
    rule(_FRAGMENTED, _FRAGMENTED_NEXT, equal(_UDP), _no_dhcpv6(_NETWORK, 48), _ACCEPT),
    rule(
        _FRAGMENTED,
        _FRAGMENTED_NEXT,
        equal(_ICMPV6),
        load_payload(_NETWORK, 48, 1),
        outside(*_ND),
        _ACCEPT,
    ),
    rule(_IN_ONE_PIECE, jump("ipv6_extended")),
)

_IPV6_EXTENDED = (
    rule(load_ipv6_extension(_FRAGMENT[0], 2, 2), _LATER_FRAGMENT6, _ACCEPT),
    rule(_L4PROTO, unequal(_UDP), unequal(_ICMPV6), _ACCEPT),
    rule(_L4PROTO, equal(_UDP), _no_dhcpv6(_TRANSPORT, 0), _ACCEPT),
    rule(_L4PROTO, equal(_ICMPV6), _ICMP_TYPE, outside(*_ND), _ACCEPT),
)


def _nd(types: bytes, length: int) -> bytes:
    """A message of so many octets right behind the fixed header (RFC 6980)."""
    return _ND_TYPE + types + _IPV6_LENGTH_AND_NEXT + equal(struct.pack("!H", length) + _ICMPV6)


# Solicitations and advertisements with one option or none, as hosts send them. The option is a
# link-layer address, 1 or 2, or the nonce of duplicate address detection, 14 (RFC 4861, section
# 4.6; RFC 7527). 0 and 3, which the mask lets pass too, mean nothing here.
_ND_BARE = (rule(_nd(equal(_RS), 8), _ACCEPT), rule(_nd(within(_NS, _NA), 24), _ACCEPT))
_ND_NONCE = rule(
    _nd(within(_NS, _NA), 32), load_payload(_NETWORK, 64, 2), equal(b"\x0e\1"), _ACCEPT
)
_RS_OPTION = _nd(equal(_RS), 16) + load_payload(_NETWORK, 48, 8) + _TYPE_TO_3
_NS_NA_OPTION = _nd(within(_NS, _NA), 32) + load_payload(_NETWORK, 64, 8) + _TYPE_TO_3

# Multicast listener discovery always stands behind the 8 octets of a router alert (RFC 2711).
_MLD_TYPE = (
    _IPV6_NEXT
    + equal(_HOP_BY_HOP)
    + load_payload(_NETWORK, 40, 2)
    + equal(_ICMPV6 + b"\0")
    + load_payload(_NETWORK, 48, 1)
)

_FROM_UNSPECIFIED = _IPV6_SOURCE + equal(_UNSPECIFIED6)
_DETECTION = _FROM_UNSPECIFIED + _ND_TYPE + equal(_NS) + _ND_TARGET
_SOLICITATION_AND_MLD = (
    rule(_FROM_UNSPECIFIED, _ND_TYPE, equal(_RS), jump("nd_own")),
    rule(_FROM_UNSPECIFIED, _MLD_TYPE, within(_MLD_REPORT, _MLD_DONE), _ACCEPT),
    rule(_FROM_UNSPECIFIED, _MLD_TYPE, equal(_MLDV2_REPORT), _ACCEPT),
)


@dataclass(frozen=True, slots=True)
class Guard:
    """What a guest's frames are held to: its MAC, and its IPv4 and IPv6 addresses.

    `addresses` are without prefix length; None: any may be used (antispoof: mac).
    """

    mac: str
    addresses: tuple[str, ...] | None


def guard_table(ifindex: int, name: str, guard: Guard) -> Table:
    """The rules that hold the guest behind the link to `guard`.

    A chain that drops does so in one place, and its name is the reason in `spoof_drops`. Raises
    ValueError for what is no address.
    """
    mac = bytes.fromhex(guard.mac.replace(":", ""))
    sent = (rule(_SOURCE, equal(mac), _TO_ETHERTYPE), _DROP)
    received = (rule(_UNICAST_DESTINATION, unequal(mac), _COUNTED_DROP),)
    if guard.addresses is None:
        judged = _any_address(mac)
    else:
        judged = _own_addresses(mac, [ip_address(it).packed for it in guard.addresses])
    chains = (
        Chain("source", sent, Hook(NETDEV_EGRESS, _PRIORITY, name)),
        Chain("destination", received, Hook(NETDEV_INGRESS, _PRIORITY, name)),
        *judged,
        Chain("ipv6_extended", _IPV6_EXTENDED),
    )
    return Table(NETDEV, table_name(ifindex), chains)


def unguarded_by(ifindex: int, name: str, guard: Guard | None) -> str:
    """What of the guard is not as it was made, in words; empty when it is whole.

    Where `guard` is None there is no table. `name` is what the link is called now, for a rename
    takes it off its hooks (nft_netdev_event). The thread stands in the namespace.
    """
    table = table_name(ifindex)
    if guard is None:
        with Netlink(NETLINK_NETFILTER) as netfilter:
            there = (NETDEV, table) in nftables.list_tables(netfilter)
        return f"nftables table netdev {table} is there" if there else ""
    changed = nftables.changed_chains(guard_table(ifindex, name, guard))
    return f"nftables table netdev {table} differs in chain {', '.join(changed)}" if changed else ""


def spoof_drops(ifindex: int) -> Mapping[str, int]:
    """How many frames were dropped, by reason; none where there is no guard.

    `destination` counts frames to the guest, all others are of those it sent; `checksum` those that
    `checksums` dropped. A frame may be a super-frame that was to become many (TSO). The thread
    stands in the namespace.
    """
    with Netlink(NETLINK_NETFILTER) as netfilter:
        rules = nftables.read_rules(netfilter, NETDEV, table_name(ifindex))
    drops = {
        chain: packets
        for chain, its_rules in rules.items()
        for it in its_rules
        if (packets := nftables.packets_counted(it)) is not None
    }
    if drops:
        with Netlink(NETLINK_ROUTE) as route:
            drops["checksum"] = filter_drops(route, ifindex)
    return drops


def _any_address(mac: bytes) -> Iterator[Chain]:
    yield Chain("ethertype", (*_DISPATCH, *_TAGGED))
    yield Chain("tag", (_DROP,))
    yield Chain("arp_sender", (rule(_ARP_SENDER_MAC, equal(mac), _ACCEPT), _DROP))
    yield Chain("ipv4", (*_FROM_IPV4, _DROP))
    yield Chain("ipv6", (*_FROM_IPV6, _DROP))
    yield Chain("nd", (*_nd_options(mac), _DROP))


def _own_addresses(mac: bytes, addresses: list[bytes]) -> Iterator[Chain]:
    own4 = [it for it in addresses if len(it) == len(_UNSPECIFIED4)]
    own6 = [_link_local(mac), *(it for it in addresses if len(it) == len(_UNSPECIFIED6))]
    # From nowhere: an address probe (RFC 5227), or RARP.
    arp = (rule(_ARP_SENDER, equal(mac + it), _ACCEPT) for it in (*own4, _UNSPECIFIED4))
    detection = (rule(_DETECTION, equal(it), jump("nd_own")) for it in own6)
    nd = (
        rule(_ND_TYPE, equal(_RS), jump("nd_own")),
        rule(_ND_TYPE, equal(_NS), jump("nd_own")),
        *(rule(_ND_TYPE, equal(_NA), _ND_TARGET, equal(it), jump("nd_own")) for it in own6),
    )
    yield Chain("ethertype", (*_DISPATCH, _DROP))
    yield Chain("arp_sender", (*arp, _DROP))
    own = (rule(_IPV4_SOURCE, equal(it), jump("ipv4_own")) for it in own4)
    yield Chain("ipv4", (*own, _DHCP_CLIENT, _DROP))
    yield Chain("ipv4_own", _FROM_IPV4)
    own = (rule(_IPV6_SOURCE, equal(it), jump("ipv6_own")) for it in own6)
    yield Chain("ipv6", (*own, *_SOLICITATION_AND_MLD, *detection, _DROP))
    yield Chain("ipv6_own", _FROM_IPV6)
    yield Chain("nd", (*nd, _DROP))
    yield Chain("nd_own", _nd_options(mac))


def _nd_options(mac: bytes) -> tuple[bytes, ...]:
    address = equal(b"\0\1" + mac) + _ACCEPT
    return (*_ND_BARE, _ND_NONCE, rule(_RS_OPTION, address), rule(_NS_NA_OPTION, address))


def _link_local(mac: bytes) -> bytes:
    """The address that a host makes of its MAC (RFC 4291, appendix A)."""
    return b"\xfe\x80" + bytes(6) + bytes([mac[0] ^ 2]) + mac[1:3] + b"\xff\xfe" + mac[3:]
