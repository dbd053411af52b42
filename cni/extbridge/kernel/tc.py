"""Traffic control: queueing disciplines and filters of a link, as far as the attachments need them.

Filters hang on `clsact`, whose two hooks see what the link receives and what it sends; like every
qdisc it goes with its link. Formats: linux/rtnetlink.h, linux/pkt_sched.h, linux/pkt_cls.h.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from typing import Final

from extbridge.kernel import netlink
from extbridge.kernel.netlink import Netlink, as_text, attributes, nested, text

_RTM_NEWQDISC = 36
_RTM_GETQDISC = 38
_RTM_NEWTFILTER = 44
_RTM_GETTFILTER = 46

_TCA_KIND = 1
_TCA_OPTIONS = 2
_TCA_STATS2 = 7
_TCA_STATS_QUEUE = 3

TC_H_ROOT: Final = 0xFFFFFFFF
_TC_H_CLSACT: Final = 0xFFFFFFF1
_CLSACT_HANDLE: Final = 0xFFFF0000

RECEIVED: Final = 0xFFFFFFF2
SENT: Final = 0xFFFFFFF3
"""The hooks of clsact (TC_H_MIN_INGRESS, TC_H_MIN_EGRESS)."""

_ETH_P_ALL = 0x0003
_INFO: Final = 1 << 16 | socket.htons(_ETH_P_ALL)
"""A filter's priority, and its protocol in network byte order (TC_H_MAKE)."""

_TCMSG = struct.Struct("=BxxxiIII")
# struct gnet_stats_queue: length, backlog, drops, requeues, overlimits.
_STATS_QUEUE = struct.Struct("=IIIII")


@dataclass(frozen=True, slots=True)
class Filter:
    """A filter as the kernel tells of it: its kind, and the attributes of its options."""

    kind: str
    options: dict[int, bytes]
    info: int

    @property
    def sees_all(self) -> bool:
        """Whether it is asked first, and about every protocol, as `add_filter` makes them."""
        return self.info == _INFO


@dataclass(frozen=True, slots=True)
class Qdisc:
    """A queueing discipline, its options, and how many frames it, or a filter on it, dropped."""

    kind: str
    options: bytes
    drops: int


def add_qdisc(
    route: Netlink, ifindex: int, kind: str, *, handle: int, options: bytes = b""
) -> None:
    """Make the link's root qdisc; raises OSError."""
    _new_qdisc(
        route,
        _TCMSG.pack(0, ifindex, handle, TC_H_ROOT, 0)
        + text(_TCA_KIND, kind)
        + nested(_TCA_OPTIONS, options),
        flags=netlink.NLM_F_CREATE | netlink.NLM_F_EXCL,
        what=f"{kind} of ifindex {ifindex}",
    )


def have_clsact(route: Netlink, ifindex: int) -> None:
    """Make the hooks that filters hang on, unless the link has them; raises OSError."""
    _new_qdisc(
        route,
        _TCMSG.pack(0, ifindex, _CLSACT_HANDLE, _TC_H_CLSACT, 0) + text(_TCA_KIND, "clsact"),
        flags=netlink.NLM_F_CREATE,
        what=f"clsact of ifindex {ifindex}",
    )


def add_filter(route: Netlink, ifindex: int, hook: int, kind: str, options: bytes) -> None:
    """Hang a filter behind those that are on the hook; raises OSError."""
    payload = _TCMSG.pack(0, ifindex, 0, hook, _INFO)
    payload += text(_TCA_KIND, kind) + nested(_TCA_OPTIONS, options)
    route.request(
        _RTM_NEWTFILTER,
        payload,
        flags=netlink.NLM_F_CREATE | netlink.NLM_F_EXCL,
        what=f"RTM_NEWTFILTER {kind} of ifindex {ifindex}",
    )


def list_qdiscs(route: Netlink) -> dict[tuple[int, int], Qdisc]:
    """Every qdisc in the namespace, by ifindex and parent."""
    found = {}
    for answer in route.request(
        _RTM_GETQDISC, bytes(_TCMSG.size), flags=netlink.NLM_F_DUMP, what="RTM_GETQDISC dump"
    ):
        _, ifindex, _, parent, _ = _TCMSG.unpack_from(answer)
        said = attributes(answer[_TCMSG.size :])
        queue = attributes(said.get(_TCA_STATS2, b"")).get(_TCA_STATS_QUEUE)
        drops = 0 if queue is None else _STATS_QUEUE.unpack_from(queue)[2]
        options = said.get(_TCA_OPTIONS, b"")
        found[ifindex, parent] = Qdisc(as_text(said[_TCA_KIND]), options, drops)
    return found


def filter_drops(route: Netlink, ifindex: int) -> int:
    """How many frames the filters on clsact's hooks have dropped."""
    qdisc = list_qdiscs(route).get((ifindex, _TC_H_CLSACT))
    return 0 if qdisc is None else qdisc.drops


def list_filters(route: Netlink, ifindex: int, hook: int) -> list[Filter]:
    """The filters on the link's hook, in order."""
    found = []
    for answer in route.request(
        _RTM_GETTFILTER,
        _TCMSG.pack(0, ifindex, 0, hook, 0),
        flags=netlink.NLM_F_DUMP,
        what=f"RTM_GETTFILTER dump of ifindex {ifindex}",
    ):
        *_, info = _TCMSG.unpack_from(answer)
        said = attributes(answer[_TCMSG.size :])
        options = attributes(said.get(_TCA_OPTIONS, b""))
        # A classifier's common head has no options, and u32's table that holds filters has no
        # selector (u32_walk); neither is a filter.
        if options:
            found.append(Filter(as_text(said[_TCA_KIND]), options, info))
    return found


def _new_qdisc(route: Netlink, payload: bytes, *, flags: int, what: str) -> None:
    route.request(_RTM_NEWQDISC, payload, flags=flags, what=f"RTM_NEWQDISC {what}")
