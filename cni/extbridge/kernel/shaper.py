"""Limit what a VM's NIC sends and receives, by token buckets of the kernel (net/sched/sch_tbf.c).

A bucket can only hold back what is sent. What the guest sends leaves through the macvtap, whose
root qdisc is one. What it receives is redirected, at the macvtap's ingress, to an ifb whose root
qdisc is the other; the ifb hands each frame back to the macvtap (ifb_ri_tasklet finds it by skb_iif
in its own namespace), behind the hooks where it was taken out, so that the tap gets it.

Behind those hooks is also nftables' ingress (__netif_receive_skb_core, skip_classify), where
anti-spoofing drops what is for other MACs. So, where there is a MAC to keep to, only frames that
the guest may have are redirected; the others go that way, unlimited, and end there.

A frame counts with its Ethernet header, without preamble and FCS; one that is to be segmented
later counts as its segments do (qdisc_pkt_len_init). VLAN tags count, but for the outer one of what
is received, which the kernel has taken out by then (skb_vlan_untag).

Formats: linux/rtnetlink.h, linux/pkt_sched.h, linux/pkt_cls.h, linux/tc_act/tc_mirred.h.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from extbridge.kernel import tc
from extbridge.kernel.links import (
    GROUP,
    Link,
    create_ifb,
    delete_link,
    find_link,
    list_links,
    set_up,
)
from extbridge.kernel.netlink import (
    Netlink,
    as_text,
    attribute,
    attributes,
    nested,
    text,
    u32,
    walk,
)
from extbridge.network.definition import FIRST_IFINDEX, LAST_IFINDEX, Bandwidth

_TCA_TBF_PARMS = 1
_TCA_TBF_RATE64 = 4
_TCA_TBF_BURST = 6
_TCA_U32_SEL = 5
_TCA_U32_ACT = 7
_TCA_ACT_KIND = 1
_TCA_ACT_OPTIONS = 2
_TCA_MIRRED_PARMS = 2

_TBF_HANDLE = 0x00010000

_TC_LINKLAYER_ETHERNET = 1
_TC_U32_TERMINAL = 1
_TC_ACT_STOLEN = 4
_TCA_EGRESS_REDIR = 1
# struct tc_tbf_qopt, of its two tc_ratespec only what says something.
_TBF_PARMS = struct.Struct("=xB6xI8xIIII")
_MIRRED_PARMS = struct.Struct("=IIiiiiI")
# struct tc_u32_sel, of which only flags and number of keys say something.
_U32_SEL = struct.Struct("=BxB13x")

_U32_MAX = 0xFFFFFFFF

_IFB_BELOW: Final = 0x40000000
"""So far below its macvtap's ifindex is an ifb's: it is derived, and nobody has to record it."""

_IFB_MTU: Final = 67
"""Too small for the pod's own IP stack to use the ifb, while redirected frames do not meet it.

IPv6 does not begin on it (addrconf_notify), IPv4 sends no datagram through it (ip_setup_cork asks
inetdev_valid_mtu), whatever the pod's settings.
"""

_TICK_NS: Final = 64
"""PSCHED_SHIFT; tbf_dump says in these how long a burst is at the rate."""

_LATENCY_MS: Final = 25
"""How long a frame may wait for tokens (as in the bandwidth plugin of containernetworking)."""

_HEADERS: Final = 14 + 2 * 4
"""What a frame has beside the MTU: Ethernet, and the VLAN tags of a guest that stacks two."""

_SUPER_FRAME: Final = 80_000
"""The most, in bytes, that 64 KiB of a guest which leaves segmentation to the host count as."""

_LEAST_BURST_MS: Final = 2
_DEFAULT_BURST_MS: Final = 10
"""How long a burst lasts at the rate. The timer that empties a queue comes late, and what the rate
would have let through meanwhile is lost when the bucket is full. At 1 Gbit/s and 64 KiB at a time,
0.4 ms reached 70 % of the rate (every frame segmented), 0.6 ms 99, 1 ms all of it; with three busy
loops on the two cores 0.6 ms reached 95 %, 2 ms 99, 4 ms all of it.
"""


@dataclass(frozen=True, slots=True)
class _Bucket:
    """What a tbf is made with: bytes/s, bytes, bytes."""

    rate: int
    burst: int
    limit: int


@dataclass(frozen=True, slots=True)
class _Redirect:
    """A filter: what it selects, and the ifindex that this is redirected to."""

    selector: bytes
    target: int
    sees_all: bool = True


def default_burst(rate: int) -> int:
    """The burst in bits for a rate in bits/s that came without one that means anything."""
    return max(rate * _DEFAULT_BURST_MS // 1000, _SUPER_FRAME * 8)


def shape(route: Netlink, ifindex: int, mtu: int, bandwidth: Bandwidth, mac: str | None) -> None:
    """Limit the macvtap, which is DOWN still; the thread stands in its namespace, as `route` does.

    With `mac`, frames for other unicast MACs go past the limit, to the rules that drop them; None
    says that there are no such rules. `mtu` in bytes is that of the macvtap. Raises OSError, which
    names what was to be made, and so what a kernel lacks.

    Undone by whoever deletes the macvtap: its qdiscs go with it, `unshape_absent` takes the ifb.
    """
    if bandwidth.egress_rate is not None:
        bucket = _bucket(bandwidth.egress_rate, bandwidth.egress_burst, mtu)
        _add_tbf(route, ifindex, bucket)
    if bandwidth.ingress_rate is not None:
        bucket = _bucket(bandwidth.ingress_rate, bandwidth.ingress_burst, mtu)
        ifb = _ifb_of(ifindex)
        create_ifb(route, ifb, f"xb{ifb:x}", mtu=_IFB_MTU)
        # While it is DOWN: the qdisc of a link that is UP is replaced after an RCU grace period
        # (dev_deactivate_many).
        _add_tbf(route, ifb, bucket)
        set_up(route, ifb, alias=f"extbridge ingress of ifindex {ifindex}")
        tc.have_clsact(route, ifindex)
        for selector in _selectors(mac):
            _add_redirect(route, ifindex, ifb, selector)


def unshape_absent(route: Netlink) -> None:
    """Remove the ifbs of ours whose macvtap is gone from the namespace of `route`.

    After the macvtap: without its ifb it would receive nothing (tcf_mirred_act).
    """
    links = list_links(route)
    present = {link.ifindex for link in links if link.ours}
    for link in links:
        if _is_our_ifb(link) and link.ifindex + _IFB_BELOW not in present:
            delete_link(route, link.ifindex)


def unshaped_by(
    route: Netlink, ifindex: int, mtu: int, bandwidth: Bandwidth | None, mac: str | None
) -> str:
    """What of the limits is not as `shape` made it, in words; empty when all is there."""
    if bandwidth is None:
        return ""
    qdiscs = tc.list_qdiscs(route)
    if bandwidth.egress_rate is not None:
        bucket = _bucket(bandwidth.egress_rate, bandwidth.egress_burst, mtu)
        fault = _tbf_fault(qdiscs.get((ifindex, tc.TC_H_ROOT)), bucket)
        if fault:
            return f"what it sends is not limited as asked: {fault}"
    if bandwidth.ingress_rate is not None:
        bucket = _bucket(bandwidth.ingress_rate, bandwidth.ingress_burst, mtu)
        ifb = _ifb_of(ifindex)
        link = find_link(route, ifindex=ifb)
        if link is None or not _is_our_ifb(link):
            fault = f"there is no ifb with ifindex {ifb}"
        elif not link.up:
            fault = f"{link.name} is down"
        elif link.mtu != _IFB_MTU:
            fault = f"{link.name} has MTU {link.mtu}, not {_IFB_MTU}"
        elif _redirects(route, ifindex) != [_Redirect(it, ifb) for it in _selectors(mac)]:
            fault = f"its filters at ingress do not redirect to {link.name}"
        else:
            fault = _tbf_fault(qdiscs.get((ifb, tc.TC_H_ROOT)), bucket)
        if fault:
            return f"what it receives is not limited as asked: {fault}"
    return ""


def _ifb_of(ifindex: int) -> int:
    return ifindex - _IFB_BELOW


def _is_our_ifb(link: Link) -> bool:
    in_range = _ifb_of(FIRST_IFINDEX) <= link.ifindex <= _ifb_of(LAST_IFINDEX)
    return link.kind == "ifb" and link.group == GROUP and in_range


def _bucket(rate: int, burst: int | None, mtu: int) -> _Bucket:
    per_second = max(rate // 8, 1)
    size = (default_burst(rate) if burst is None else burst) // 8
    # A frame larger than the burst is dropped (tbf_enqueue).
    size = max(size, mtu + _HEADERS, per_second * _LEAST_BURST_MS // 1000)
    size = min(size, _U32_MAX)
    limit = per_second * _LATENCY_MS // 1000 + size
    return _Bucket(per_second, size, min(limit, _U32_MAX))


def _add_tbf(route: Netlink, ifindex: int, bucket: _Bucket) -> None:
    rate = min(bucket.rate, _U32_MAX)
    options = attribute(
        _TCA_TBF_PARMS, _TBF_PARMS.pack(_TC_LINKLAYER_ETHERNET, rate, 0, bucket.limit, 0, 0)
    )
    if bucket.rate > _U32_MAX:
        options += attribute(_TCA_TBF_RATE64, struct.pack("=Q", bucket.rate))
    options += u32(_TCA_TBF_BURST, bucket.burst)
    tc.add_qdisc(route, ifindex, "tbf", handle=_TBF_HANDLE, options=options)


def _tbf_fault(found: tc.Qdisc | None, bucket: _Bucket) -> str:
    if found is None or found.kind != "tbf":
        return f"the qdisc is {found.kind if found else 'none'}, not tbf"
    said = attributes(found.options)
    _, rate, peak, limit, ticks, _ = _TBF_PARMS.unpack(said[_TCA_TBF_PARMS])
    if _TCA_TBF_RATE64 in said:
        (rate,) = struct.unpack("=Q", said[_TCA_TBF_RATE64])
    wanted_ticks = bucket.burst * 10**9 // bucket.rate // _TICK_NS
    # It is told in 32 bits, and computed with a rate that is rounded to as many
    # (psched_ratecfg_precompute).
    burst_differs = wanted_ticks <= _U32_MAX and abs(ticks - wanted_ticks) > 2
    if (rate, peak, limit) != (bucket.rate, 0, bucket.limit) or burst_differs:
        burst = ticks * _TICK_NS * rate // 10**9
        return (
            f"tbf has rate {rate}, burst {burst}, limit {limit}, peak rate {peak} (bytes);"
            f" made were {bucket.rate}, {bucket.burst}, {bucket.limit}, 0"
        )
    return ""


def _selectors(mac: str | None) -> list[bytes]:
    """Which frames are redirected, each a struct tc_u32_sel; the Ethernet header begins at -14."""
    if mac is None:
        return [_selector()]
    octets = bytes.fromhex(mac.replace(":", ""))
    return [
        # Broadcast and multicast: the group bit of the first octet.
        _selector((b"\1\0\0\0", b"\1\0\0\0", -14)),
        _selector((b"\xff" * 4, octets[:4], -14), (b"\xff\xff\0\0", octets[4:] + b"\0\0", -10)),
    ]


def _selector(*keys: tuple[bytes, bytes, int]) -> bytes:
    """From keys of mask, value and offset (struct tc_u32_key); all of them have to match."""
    packed = (mask + value + struct.pack("=ii", at, 0) for mask, value, at in keys)
    return _U32_SEL.pack(_TC_U32_TERMINAL, len(keys)) + b"".join(packed)


def _add_redirect(route: Netlink, ifindex: int, ifb: int, selector: bytes) -> None:
    mirred = _MIRRED_PARMS.pack(0, 0, _TC_ACT_STOLEN, 0, 0, _TCA_EGRESS_REDIR, ifb)
    action = text(_TCA_ACT_KIND, "mirred") + nested(
        _TCA_ACT_OPTIONS, attribute(_TCA_MIRRED_PARMS, mirred)
    )
    options = attribute(_TCA_U32_SEL, selector) + nested(_TCA_U32_ACT, nested(1, action))
    tc.add_filter(route, ifindex, tc.RECEIVED, "u32", options)


def _redirects(route: Netlink, ifindex: int) -> list[_Redirect]:
    """Every filter at the link's ingress, in order; what is no redirection has ifindex 0."""
    found = []
    for it in tc.list_filters(route, ifindex, tc.RECEIVED):
        is_u32 = it.kind == "u32"
        if is_u32 and _TCA_U32_SEL not in it.options:
            # The table that holds the others (u32_walk).
            continue
        target = 0
        if is_u32:
            actions = walk(it.options.get(_TCA_U32_ACT, b""))
            target = _target([attributes(payload) for _, payload in actions])
        found.append(_Redirect(it.options.get(_TCA_U32_SEL, b""), target, it.sees_all))
    return found


def _target(actions: list[dict[int, bytes]]) -> int:
    """The ifindex that frames are redirected to if that is all that is done to them, else 0."""
    if [as_text(action[_TCA_ACT_KIND]) for action in actions] != ["mirred"]:
        return 0
    parms = attributes(actions[0][_TCA_ACT_OPTIONS])[_TCA_MIRRED_PARMS]
    _, _, verdict, _, _, direction, target = _MIRRED_PARMS.unpack(parms)
    return target if (verdict, direction) == (_TC_ACT_STOLEN, _TCA_EGRESS_REDIR) else 0
