"""Links: the NIC below, the macvtap above, an ifb beside it (see shaper).

Messages: linux/rtnetlink.h, linux/if_link.h. What marks a macvtap as ours is what can be given in
the one message that creates it: its group and the range of its ifindex.
"""

from __future__ import annotations

import array
import errno
import fcntl
import socket
import struct
from dataclasses import dataclass
from typing import Final

from extbridge.kernel import netlink
from extbridge.kernel.netlink import Netlink, attribute, nested, text, u32
from extbridge.network.definition import FIRST_IFINDEX, LAST_IFINDEX, Mode

GROUP: Final = 0x65787462
"""The link group of every link of ours: "extb"."""

_RTM_NEWLINK = 16
_RTM_DELLINK = 17
_RTM_GETLINK = 18
_RTM_GETADDR = 22
_RTM_GETROUTE = 26
_RTM_GETNSID = 90
_NETNSA_NSID = 1
_NETNSA_FD = 3

_IFLA_ADDRESS = 1
_IFLA_IFNAME = 3
_IFLA_MTU = 4
_IFLA_LINK = 5
_IFLA_MASTER = 10
_IFLA_LINKINFO = 18
_IFLA_IFALIAS = 20
_IFLA_STATS64 = 23
_IFLA_GROUP = 27
_IFLA_NET_NS_FD = 28
_IFLA_EXT_MASK = 29
_IFLA_PROMISCUITY = 30
_IFLA_NUM_TX_QUEUES = 31
_IFLA_NUM_RX_QUEUES = 32
_IFLA_CARRIER = 33
_IFLA_LINK_NETNSID = 37
_IFLA_PERM_ADDRESS = 54
_IFLA_PARENT_DEV_NAME = 56
_IFLA_PARENT_DEV_BUS_NAME = 57
_IFLA_INFO_KIND = 1
_IFLA_INFO_DATA = 2
_IFLA_MACVLAN_MODE = 1
_VETH_INFO_PEER = 1

# NETNSA_NSID_NOT_ASSIGNED.
_NO_NSID = b"\xff" * 4

_IFF_UP = 0x1
_IFF_LOOPBACK = 0x8
_IFF_NOARP = 0x80
_IFF_ALLMULTI = 0x200

# No counters in the answer: they are half of it, and take the kernel time.
_RTEXT_FILTER_SKIP_STATS = 0x8

_ARPHRD_ETHER = 1

_IFINFO = struct.Struct("=BxHiII")
_IFADDR = struct.Struct("=BBBBi")
_RTMSG = struct.Struct("=BBBBBBBBI")
_NEXTHOP = struct.Struct("=HBBi")

_RTA_OIF = 4
_RTA_MULTIPATH = 9
_RTA_TABLE = 15
_RT_TABLE_MAIN = 254
_RTN_UNICAST = 1

_SIOCETHTOOL = 0x8946
_ETHTOOL_GDRVINFO = 3
_DRVINFO_BYTES = 196
_IFREQ_DATA = struct.Struct("@16sP")

# linux/if_link.h, enum macvlan_mode.
_MODE_NUMBERS: Final = {Mode.PRIVATE: 1, Mode.VEPA: 2, Mode.BRIDGE: 4, Mode.PASSTHRU: 8}


@dataclass(frozen=True, slots=True)
class Link:
    """A link as the kernel describes it; `lower` and `master` are ifindexes, 0 for none.

    `permanent_mac` is the one that the hardware came with, and `pci` its address on that bus; empty
    where there is none, or the kernel does not tell (before Linux 5.6 and 5.14). `promiscuity`
    counts who wants the link to hear every frame. `lower_nsid` is the number that the link's own
    namespace has for that of `lower` (see nsid_of), -1 if it is the same.
    """

    ifindex: int
    name: str
    kind: str
    mac: str
    mtu: int
    up: bool
    noarp: bool
    carrier: bool
    ethernet: bool
    loopback: bool
    group: int
    alias: str
    lower: int
    master: int
    mode: Mode | None
    tx_queues: int
    permanent_mac: str
    pci: str
    promiscuity: int
    lower_nsid: int

    @property
    def ours(self) -> bool:
        """Whether extbridge made it."""
        return (
            self.kind == "macvtap"
            and self.group == GROUP
            and FIRST_IFINDEX <= self.ifindex <= LAST_IFINDEX
        )


@dataclass(frozen=True, slots=True)
class Counters:
    """Frames and octets through a macvtap, as the guest sees them: rx is what it received."""

    rx_frames: int
    rx_octets: int
    tx_frames: int
    tx_octets: int


@dataclass(frozen=True, slots=True)
class Macvtap:
    """A macvtap to be made; `mtu` None is the NIC's, `queues` counts pairs."""

    ifindex: int
    name: str
    mac: str
    mode: Mode
    lower: int
    mtu: int | None
    queues: int


def create_macvtap(route: Netlink, wanted: Macvtap, netns: int) -> None:
    """Make `wanted` in the namespace of the fd `netns`: one message, DOWN and without ARP.

    `route` is a socket of the namespace the NIC is in. No IFLA_LINK_NETNSID: with it, older
    kernels make the link first and move it after (rtnl_newlink_create).

    ALLMULTI because only the guest knows the groups it has joined, and one that hears none has no
    IPv6 (macvlan_broadcast asks the link's own filter). It is given while the link is DOWN: given
    later, the NIC under a passthru link would stay ALLMULTI for good (macvlan_stop). Such a NIC is
    promiscuous instead (no MACVLAN_FLAG_NOPROMISC), for the same reason.
    """
    link_flags = _IFF_NOARP | _IFF_ALLMULTI
    payload = (
        _IFINFO.pack(0, 0, wanted.ifindex, link_flags, link_flags)
        + text(_IFLA_IFNAME, wanted.name)
        + u32(_IFLA_LINK, wanted.lower)
        + u32(_IFLA_NET_NS_FD, netns)
        + attribute(_IFLA_ADDRESS, bytes.fromhex(wanted.mac.replace(":", "")))
        + u32(_IFLA_GROUP, GROUP)
        + u32(_IFLA_NUM_TX_QUEUES, wanted.queues)
        + u32(_IFLA_NUM_RX_QUEUES, wanted.queues)
        + (u32(_IFLA_MTU, wanted.mtu) if wanted.mtu is not None else b"")
        + nested(
            _IFLA_LINKINFO,
            text(_IFLA_INFO_KIND, "macvtap"),
            nested(
                _IFLA_INFO_DATA,
                u32(_IFLA_MACVLAN_MODE, _MODE_NUMBERS[wanted.mode]),
            ),
        )
    )
    route.request(
        _RTM_NEWLINK,
        payload,
        flags=netlink.NLM_F_CREATE | netlink.NLM_F_EXCL,
        what=f"RTM_NEWLINK {wanted.name} ({wanted.mode} on ifindex {wanted.lower})",
    )


def create_ifb(route: Netlink, ifindex: int, name: str, *, mtu: int) -> None:
    """Make an ifb of ours in the namespace of `route`: one message, DOWN, one queue."""
    payload = (
        _IFINFO.pack(0, 0, ifindex, 0, 0)
        + text(_IFLA_IFNAME, name)
        + u32(_IFLA_MTU, mtu)
        + u32(_IFLA_GROUP, GROUP)
        + nested(_IFLA_LINKINFO, text(_IFLA_INFO_KIND, "ifb"))
    )
    route.request(
        _RTM_NEWLINK,
        payload,
        flags=netlink.NLM_F_CREATE | netlink.NLM_F_EXCL,
        what=f"RTM_NEWLINK {name} (ifb)",
    )


def create_veth(route: Netlink, name: str, peer: str) -> None:
    """Make a veth pair in the namespace of `route`, both ends DOWN."""
    payload = (
        _IFINFO.pack(0, 0, 0, 0, 0)
        + text(_IFLA_IFNAME, name)
        + nested(
            _IFLA_LINKINFO,
            text(_IFLA_INFO_KIND, "veth"),
            nested(
                _IFLA_INFO_DATA,
                attribute(_VETH_INFO_PEER, _IFINFO.pack(0, 0, 0, 0, 0) + text(_IFLA_IFNAME, peer)),
            ),
        )
    )
    route.request(
        _RTM_NEWLINK,
        payload,
        flags=netlink.NLM_F_CREATE | netlink.NLM_F_EXCL,
        what=f"RTM_NEWLINK {name} (veth)",
    )


def set_up(route: Netlink, ifindex: int, *, alias: str) -> None:
    """Set the link UP and its alias. EADDRINUSE, or EBUSY on older kernels: its MAC is taken."""
    payload = _IFINFO.pack(0, 0, ifindex, _IFF_UP, _IFF_UP) + text(_IFLA_IFALIAS, alias)
    route.request(_RTM_NEWLINK, payload, what=f"RTM_NEWLINK up of ifindex {ifindex}")


def set_mac(route: Netlink, ifindex: int, mac: str) -> None:
    """Set the link's MAC; on a passthru macvtap this sets the NIC's (macvlan_set_mac_address)."""
    payload = _IFINFO.pack(0, 0, ifindex, 0, 0)
    payload += attribute(_IFLA_ADDRESS, bytes.fromhex(mac.replace(":", "")))
    route.request(_RTM_NEWLINK, payload, what=f"RTM_NEWLINK address {mac} of ifindex {ifindex}")


def delete_link(route: Netlink, ifindex: int) -> None:
    """Delete the link, if it is there. Blocks for two RCU grace periods, 15 to 25 ms."""
    try:
        route.request(
            _RTM_DELLINK,
            _IFINFO.pack(0, 0, ifindex, 0, 0),
            what=f"RTM_DELLINK of ifindex {ifindex}",
        )
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise


def find_link(route: Netlink, *, name: str = "", ifindex: int = 0) -> Link | None:
    """The link with this name, or else this ifindex, in the socket's namespace."""
    payload = _lookup(ifindex) + (text(_IFLA_IFNAME, name) if name else b"")
    try:
        answers = route.request(_RTM_GETLINK, payload, what=f"RTM_GETLINK {name or ifindex}")
    except OSError as error:
        if error.errno == errno.ENODEV:
            return None
        raise
    return _parse(answers[0])


def list_links(route: Netlink) -> list[Link]:
    """Every link of the socket's namespace."""
    answers = route.request(
        _RTM_GETLINK, _lookup(0), flags=netlink.NLM_F_DUMP, what="RTM_GETLINK dump"
    )
    return [_parse(answer) for answer in answers]


def list_our_links(route: Netlink, *, at_most: int | None = None) -> list[Link]:
    """The macvtaps of the socket's namespace that extbridge made.

    OSError E2BIG where the namespace has more macvtaps than `at_most`, whoever made them: a pod may
    be able to make thousands, and to list them takes tens of milliseconds.
    """
    # The kernel leaves out what is of another kind (link_kind_filtered), if it knows the kind.
    kind = nested(_IFLA_LINKINFO, text(_IFLA_INFO_KIND, "macvtap"))
    answers = route.request(
        _RTM_GETLINK,
        _lookup(0) + kind,
        flags=netlink.NLM_F_DUMP,
        at_most=at_most,
        what="RTM_GETLINK macvtaps",
    )
    return [link for link in map(_parse, answers) if link.ours]


def count_our_links(route: Netlink) -> list[tuple[Link, Counters]]:
    """The macvtaps of the socket's namespace that extbridge made, and what went through them."""
    kind = nested(_IFLA_LINKINFO, text(_IFLA_INFO_KIND, "macvtap"))
    found = []
    for answer in route.request(
        _RTM_GETLINK,
        _IFINFO.pack(0, 0, 0, 0, 0) + kind,
        flags=netlink.NLM_F_DUMP,
        what="RTM_GETLINK macvtaps, with counters",
    ):
        link = _parse(answer)
        if link.ours:
            stats = netlink.attributes(answer[_IFINFO.size :])[_IFLA_STATS64]
            # struct rtnl_link_stats64: frames received and sent, octets likewise.
            rx_frames, tx_frames, rx_octets, tx_octets = struct.unpack_from("=4Q", stats)
            found.append((link, Counters(rx_frames, rx_octets, tx_frames, tx_octets)))
    return found


def nsid_of(route: Netlink, netns: int) -> int:
    """The number that the socket's namespace has for that of the fd, -1 if it has none."""
    # struct rtgenmsg, padded.
    payload = bytes(4) + u32(_NETNSA_FD, netns)
    (answer,) = route.request(_RTM_GETNSID, payload, what=f"RTM_GETNSID of fd {netns}")
    told = netlink.attributes(answer[4:]).get(_NETNSA_NSID, _NO_NSID)
    nsid: int = struct.unpack("=i", told)[0]
    return nsid


def has_address(route: Netlink, ifindex: int) -> bool:
    """Whether the pod's own IP stack has an address on the link."""
    answers = route.request(
        _RTM_GETADDR,
        _IFADDR.pack(0, 0, 0, 0, ifindex),
        flags=netlink.NLM_F_DUMP,
        what=f"RTM_GETADDR dump of ifindex {ifindex}",
    )
    return any(_IFADDR.unpack_from(answer)[4] == ifindex for answer in answers)


def default_route_links(route: Netlink) -> set[int]:
    """The ifindexes of the links over which a default route of the socket's namespace leads."""
    found = set()
    for family in (socket.AF_INET, socket.AF_INET6):
        for answer in route.request(
            _RTM_GETROUTE,
            # Of this table alone, where the kernel knows how (ip_valid_fib_dump_req).
            _RTMSG.pack(family, 0, 0, 0, 0, 0, 0, 0, 0) + u32(_RTA_TABLE, _RT_TABLE_MAIN),
            flags=netlink.NLM_F_DUMP,
            what="RTM_GETROUTE dump",
        ):
            _, bits, _, _, table, _, _, kind, _ = _RTMSG.unpack_from(answer)
            if (bits, table, kind) != (0, _RT_TABLE_MAIN, _RTN_UNICAST):
                continue
            said = netlink.attributes(answer[_RTMSG.size :])
            if _RTA_OIF in said:
                found.add(netlink.as_u32(said[_RTA_OIF]))
            hops, at = said.get(_RTA_MULTIPATH, b""), 0
            while at + _NEXTHOP.size <= len(hops):
                length, _, _, ifindex = _NEXTHOP.unpack_from(hops, at)
                found.add(ifindex)
                at += max(length, _NEXTHOP.size)
    return found


def driver_of(name: str) -> str:
    """The driver of a link of the thread's namespace, empty where it tells none.

    ETHTOOL_GDRVINFO (linux/ethtool.h): sysfs would show the namespace that it was mounted in.
    """
    info = array.array("B", struct.pack("=I", _ETHTOOL_GDRVINFO) + bytes(_DRVINFO_BYTES - 4))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as asked:
        try:
            fcntl.ioctl(asked, _SIOCETHTOOL, _IFREQ_DATA.pack(name.encode(), info.buffer_info()[0]))
        except OSError as error:
            # ENODEV: it has gone meanwhile.
            if error.errno in (errno.EOPNOTSUPP, errno.ENODEV):
                return ""
            raise
    return netlink.as_text(info.tobytes()[4:36])


def _lookup(ifindex: int) -> bytes:
    return _IFINFO.pack(0, 0, ifindex, 0, 0) + u32(_IFLA_EXT_MASK, _RTEXT_FILTER_SKIP_STATS)


def _parse(payload: bytes) -> Link:
    _, arphrd, ifindex, flags, _ = _IFINFO.unpack_from(payload)
    found = netlink.attributes(payload[_IFINFO.size :])
    info = netlink.attributes(found.get(_IFLA_LINKINFO, b""))
    data = netlink.attributes(info.get(_IFLA_INFO_DATA, b""))
    kind = netlink.as_text(info.get(_IFLA_INFO_KIND, b""))
    mode = None
    if kind in ("macvtap", "macvlan") and _IFLA_MACVLAN_MODE in data:
        number = netlink.as_u32(data[_IFLA_MACVLAN_MODE])
        mode = next((mode for mode, n in _MODE_NUMBERS.items() if n == number), None)
    return Link(
        ifindex=ifindex,
        name=netlink.as_text(found[_IFLA_IFNAME]),
        kind=kind,
        mac=found.get(_IFLA_ADDRESS, b"").hex(":"),
        mtu=netlink.as_u32(found[_IFLA_MTU]),
        up=bool(flags & _IFF_UP),
        noarp=bool(flags & _IFF_NOARP),
        carrier=found.get(_IFLA_CARRIER) == b"\1",
        ethernet=arphrd == _ARPHRD_ETHER,
        loopback=bool(flags & _IFF_LOOPBACK),
        group=netlink.as_u32(found.get(_IFLA_GROUP, bytes(4))),
        alias=netlink.as_text(found.get(_IFLA_IFALIAS, b"")),
        lower=netlink.as_u32(found.get(_IFLA_LINK, bytes(4))),
        master=netlink.as_u32(found.get(_IFLA_MASTER, bytes(4))),
        mode=mode,
        tx_queues=netlink.as_u32(found.get(_IFLA_NUM_TX_QUEUES, bytes(4))),
        permanent_mac=found.get(_IFLA_PERM_ADDRESS, b"").hex(":"),
        pci=netlink.as_text(found.get(_IFLA_PARENT_DEV_NAME, b""))
        if found.get(_IFLA_PARENT_DEV_BUS_NAME) == b"pci\0"
        else "",
        promiscuity=netlink.as_u32(found.get(_IFLA_PROMISCUITY, bytes(4))),
        lower_nsid=struct.unpack("=i", found.get(_IFLA_LINK_NETNSID, _NO_NSID))[0],
    )
