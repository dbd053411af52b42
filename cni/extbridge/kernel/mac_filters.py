"""The MACs for which a NIC has its filters set. Formats: linux/rtnetlink.h, linux/neighbour.h."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from extbridge.kernel import netlink
from extbridge.kernel.netlink import Netlink, u32

_RTM_GETNEIGH = 30
_AF_BRIDGE = 7
_NTF_SELF = 0x02
_NDA_LLADDR = 2
_NDA_IFINDEX = 8
_NDMSG = struct.Struct("=BxxxiHBB")


@dataclass(frozen=True, slots=True)
class MacFilters:
    """How many MACs the NIC is to hear besides its own; how many it could, no kernel tells."""

    unicast: int
    multicast: int


def mac_filters(route: Netlink, ifindex: int) -> MacFilters:
    """The MACs that the link is to hear (ndo_dflt_fdb_dump); raises OSError."""
    unicast = multicast = 0
    for answer in route.request(
        _RTM_GETNEIGH,
        _NDMSG.pack(_AF_BRIDGE, 0, 0, 0, 0) + u32(_NDA_IFINDEX, ifindex),
        flags=netlink.NLM_F_DUMP,
        what=f"RTM_GETNEIGH dump of ifindex {ifindex}",
    ):
        _, of, _, flags, _ = _NDMSG.unpack_from(answer)
        mac = netlink.attributes(answer[_NDMSG.size :]).get(_NDA_LLADDR, b"")
        if of != ifindex or not flags & _NTF_SELF or not mac:
            continue
        if mac[0] & 1:
            multicast += 1
        else:
            unicast += 1
    return MacFilters(unicast, multicast)
