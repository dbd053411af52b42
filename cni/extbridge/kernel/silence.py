"""Keep the pod's own IP stack off the VM's NIC (promise 3).

While no tap is open, a macvtap hands its frames to the IP stack of its namespace (tap_handle_frame
finds no queue and lets them pass), and that stack may send through it at any time. Three things
stop it, none of which touches the frames of an open tap:

- NOARP, given when the link is made, for ARP in both directions;
- `disable_ipv6`, before the link is UP, so that no address, neighbour discovery or MLD begins, and
  `addr_gen_mode` none, so that there is still no address where the runtime writes 0 to that setting
  of all links, as some do after ADD;
- an nftables table that drops what the stack would hear (prerouting) or speak (postrouting). It
  also covers IPv4 broadcasts from 0.0.0.0 and SO_BINDTODEVICE, which needs no privilege.

The rules name the ifindex, which is unique on the node and never used again, so that neither a
rename nor a later link of the same name changes what they mean.

Formats: linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

import errno
import os
import struct
import threading
from contextlib import suppress
from pathlib import Path
from typing import Final

from extbridge.kernel import netlink
from extbridge.kernel.links import list_links
from extbridge.kernel.netlink import (
    NETLINK_NETFILTER,
    Netlink,
    as_text,
    attribute,
    attributes,
    text,
)

_NFNL_BATCH_BEGIN = 0x10
_NFNL_BATCH_END = 0x11
_NFNL_SUBSYS_NFTABLES = 10
_NFT_NEWTABLE = _NFNL_SUBSYS_NFTABLES << 8 | 0
_NFT_GETTABLE = _NFNL_SUBSYS_NFTABLES << 8 | 1
_NFT_DELTABLE = _NFNL_SUBSYS_NFTABLES << 8 | 2
_NFT_NEWCHAIN = _NFNL_SUBSYS_NFTABLES << 8 | 3
_NFT_NEWRULE = _NFNL_SUBSYS_NFTABLES << 8 | 6
_NFT_GETRULE = _NFNL_SUBSYS_NFTABLES << 8 | 7

# linux/if_link.h, enum in6_addr_gen_mode.
_IN6_ADDR_GEN_MODE_NONE = 1

_NFPROTO_INET = 1
_NF_INET_PRE_ROUTING = 0
_NF_INET_POST_ROUTING = 4
_NF_DROP = 0

_NFTA_TABLE_NAME = 1
_NFTA_CHAIN_TABLE = 1
_NFTA_CHAIN_NAME = 3
_NFTA_CHAIN_HOOK = 4
_NFTA_CHAIN_TYPE = 7
_NFTA_HOOK_HOOKNUM = 1
_NFTA_HOOK_PRIORITY = 2
_NFTA_RULE_TABLE = 1
_NFTA_RULE_CHAIN = 2
_NFTA_RULE_EXPRESSIONS = 4
_NFTA_LIST_ELEM = 1
_NFTA_EXPR_NAME = 1
_NFTA_EXPR_DATA = 2
_NFTA_META_DREG = 1
_NFTA_META_KEY = 2
_NFT_META_IIF = 4
_NFT_META_OIF = 5
_NFTA_CMP_SREG = 1
_NFTA_CMP_OP = 2
_NFTA_CMP_DATA = 3
_NFT_CMP_EQ = 0
_NFTA_IMMEDIATE_DREG = 1
_NFTA_IMMEDIATE_DATA = 2
_NFTA_DATA_VALUE = 1
_NFTA_DATA_VERDICT = 2
_NFTA_VERDICT_CODE = 1
_NFT_REG_VERDICT = 0
_NFT_REG_1 = 1

# Before connection tracking, defragmentation and every other rule (NF_IP_PRI_FIRST is the least).
_PRIORITY = -500

# struct nfgenmsg; its last field is in network byte order.
_NFGENMSG = struct.Struct(">BBH")
_BEGIN = (_NFNL_BATCH_BEGIN, _NFGENMSG.pack(0, 0, _NFNL_SUBSYS_NFTABLES))
_END = (_NFNL_BATCH_END, _BEGIN[1])

_CHAINS: Final = (
    ("hears", _NF_INET_PRE_ROUTING, _NFT_META_IIF),
    ("speaks", _NF_INET_POST_ROUTING, _NFT_META_OIF),
)

_TABLE_PREFIX = "extbridge_"


def silence(ifindex: int, name: str) -> None:
    """Silence the link, which is still DOWN and NOARP; the thread stands in its namespace."""
    # A link with less than IPv6's smallest MTU has none of these (addrconf_notify).
    with suppress(FileNotFoundError):
        _set_ipv6(name, "disable_ipv6", 1)
        _set_ipv6(name, "addr_gen_mode", _IN6_ADDR_GEN_MODE_NONE)
    table = text(_NFTA_TABLE_NAME, _table(ifindex))
    messages = [_inet(_NFT_NEWTABLE, table)]
    for chain, hook, key in _CHAINS:
        messages.append(
            _inet(
                _NFT_NEWCHAIN,
                table
                + text(_NFTA_CHAIN_NAME, chain)
                + _nest(
                    _NFTA_CHAIN_HOOK,
                    _be32(_NFTA_HOOK_HOOKNUM, hook),
                    _be32(_NFTA_HOOK_PRIORITY, _PRIORITY),
                )
                + text(_NFTA_CHAIN_TYPE, "filter"),
            )
        )
        messages.append(
            _inet(
                _NFT_NEWRULE,
                table
                + text(_NFTA_RULE_CHAIN, chain)
                + _nest(_NFTA_RULE_EXPRESSIONS, _drop_if(key, ifindex)),
                netlink.NLM_F_CREATE | netlink.NLM_F_APPEND,
            )
        )
    with Netlink(NETLINK_NETFILTER) as netfilter:
        netfilter.transaction(_BEGIN, messages, _END, what=f"nftables table {_table(ifindex)}")


def unsilence_absent(route: Netlink) -> None:
    """Remove the rules whose link is gone; the thread stands in the namespace of `route`.

    After the link, not before: a link that is UP and not silenced would be heard until it has gone.
    On a kernel without nf_tables there are none, and DEL works.
    """
    try:
        netfilter = Netlink(NETLINK_NETFILTER)
    except OSError as error:
        if error.errno != errno.EPROTONOSUPPORT:
            raise
        return
    try:
        # In this order: a link that an ADD has just made is there before its rules are.
        silenced = _silenced_ifindexes(netfilter)
        present = {link.ifindex for link in list_links(route)} if silenced else set()
        deletions = [
            _inet(_NFT_DELTABLE, text(_NFTA_TABLE_NAME, _table(ifindex)), 0)
            for ifindex in silenced
            if ifindex not in present
        ]
        if deletions:
            netfilter.transaction(_BEGIN, deletions, _END, what="removal of nftables tables")
    finally:
        # To close it is to wait for the RCU grace period after which the kernel frees the table
        # (nft_rcv_nl_event), 10 ms for which nobody else has to wait.
        threading.Thread(target=netfilter.close, name="netfilter close").start()


def _silenced_ifindexes(netfilter: Netlink) -> list[int]:
    try:
        answers = netfilter.request(
            _NFT_GETTABLE,
            _NFGENMSG.pack(_NFPROTO_INET, 0, 0),
            flags=netlink.NLM_F_DUMP,
            what="nftables tables",
        )
    except OSError as error:
        # nfnetlink_rcv_msg, where nf_tables is not there.
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        return []
    names = (as_text(attributes(answer[_NFGENMSG.size :])[_NFTA_TABLE_NAME]) for answer in answers)
    return [
        int(name.removeprefix(_TABLE_PREFIX))
        for name in names
        if name.startswith(_TABLE_PREFIX) and name.removeprefix(_TABLE_PREFIX).isdecimal()
    ]


def unsilenced_by(ifindex: int, name: str) -> str:
    """What of the silence is missing, in words; empty when it is whole.

    NOARP and addresses are the link's, see links; the thread stands in the namespace.
    """
    with suppress(FileNotFoundError):
        if Path(_ipv6_setting(name, "disable_ipv6")).read_bytes().strip() != b"1":
            return f"IPv6 is enabled on {name}"
    table = _table(ifindex)
    with Netlink(NETLINK_NETFILTER) as netfilter:
        answers = netfilter.request(
            _NFT_GETRULE,
            _NFGENMSG.pack(_NFPROTO_INET, 0, 0) + text(_NFTA_RULE_TABLE, table),
            flags=netlink.NLM_F_DUMP,
            what=f"nftables rules of table {table}",
        )
    rules: dict[str, list[bytes]] = {}
    for answer in answers:
        rule = attributes(answer[_NFGENMSG.size :])
        if as_text(rule[_NFTA_RULE_TABLE]) == table:
            rules.setdefault(as_text(rule[_NFTA_RULE_CHAIN]), []).append(
                rule.get(_NFTA_RULE_EXPRESSIONS, b"")
            )
    for chain, _, key in _CHAINS:
        # A rule of somebody else before it could accept.
        if rules.get(chain) != [_drop_if(key, ifindex)]:
            return f"nftables table inet {table}, chain {chain}, does not drop"
    return ""


def _table(ifindex: int) -> str:
    return f"{_TABLE_PREFIX}{ifindex}"


def _ipv6_setting(name: str, key: str) -> str:
    # proc_sys_lookup answers for the namespace of the thread that opens.
    return f"/proc/sys/net/ipv6/conf/{name}/{key}"


def _set_ipv6(name: str, key: str, value: int) -> None:
    setting = os.open(_ipv6_setting(name, key), os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(setting, b"%d" % value)
    finally:
        os.close(setting)


def _inet(kind: int, payload: bytes, flags: int = netlink.NLM_F_CREATE) -> tuple[int, int, bytes]:
    return kind, flags, _NFGENMSG.pack(_NFPROTO_INET, 0, 0) + payload


def _be32(kind: int, value: int) -> bytes:
    # nf_tables speaks network byte order (nla_get_be32), unlike rtnetlink.
    return attribute(kind, struct.pack(">i", value))


def _nest(kind: int, *attributes_: bytes) -> bytes:
    # nf_tables neither needs nor sends NLA_F_NESTED (nla_nest_start_noflag).
    return attribute(kind, b"".join(attributes_))


def _expression(name: str, *data: bytes) -> bytes:
    return _nest(_NFTA_LIST_ELEM, text(_NFTA_EXPR_NAME, name), _nest(_NFTA_EXPR_DATA, *data))


def _drop_if(key: int, ifindex: int) -> bytes:
    """A rule's expressions, byte for byte as the kernel dumps them (nft_meta_get_dump)."""
    return (
        _expression("meta", _be32(_NFTA_META_KEY, key), _be32(_NFTA_META_DREG, _NFT_REG_1))
        + _expression(
            "cmp",
            _be32(_NFTA_CMP_SREG, _NFT_REG_1),
            _be32(_NFTA_CMP_OP, _NFT_CMP_EQ),
            _nest(_NFTA_CMP_DATA, attribute(_NFTA_DATA_VALUE, struct.pack("=I", ifindex))),
        )
        + _expression(
            "immediate",
            _be32(_NFTA_IMMEDIATE_DREG, _NFT_REG_VERDICT),
            _nest(
                _NFTA_IMMEDIATE_DATA,
                _nest(_NFTA_DATA_VERDICT, _be32(_NFTA_VERDICT_CODE, _NF_DROP)),
            ),
        )
    )
