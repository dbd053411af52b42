"""nf_tables messages: tables, chains, and rules made of expressions.

Of the kernel's language only what our rules say. A rule is kept as the bytes that the kernel both
takes and dumps, so that CHECK can compare: attributes stand in the order of its dump functions.

Formats: linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from extbridge.kernel import netlink
from extbridge.kernel.netlink import (
    NETLINK_NETFILTER,
    Netlink,
    as_text,
    attribute,
    attributes,
    text,
    walk,
)

_NFNL_BATCH_BEGIN = 0x10
_NFNL_BATCH_END = 0x11
_NFNL_SUBSYS_NFTABLES = 10
_NFT_NEWTABLE = _NFNL_SUBSYS_NFTABLES << 8 | 0
_NFT_GETTABLE = _NFNL_SUBSYS_NFTABLES << 8 | 1
_NFT_DELTABLE = _NFNL_SUBSYS_NFTABLES << 8 | 2
_NFT_NEWCHAIN = _NFNL_SUBSYS_NFTABLES << 8 | 3
_NFT_GETCHAIN = _NFNL_SUBSYS_NFTABLES << 8 | 4
_NFT_NEWRULE = _NFNL_SUBSYS_NFTABLES << 8 | 6
_NFT_GETRULE = _NFNL_SUBSYS_NFTABLES << 8 | 7

_NFPROTO_UNSPEC = 0
INET: Final = 1
NETDEV: Final = 5
"""Families of tables (NFPROTO_INET, NFPROTO_NETDEV)."""

FAMILY_NAMES: Final = {INET: "inet", NETDEV: "netdev"}

_OWN_TABLE = "extbridge_"

INET_PREROUTING: Final = 0
INET_POSTROUTING: Final = 4
NETDEV_INGRESS: Final = 0
NETDEV_EGRESS: Final = 1

_NFTA_TABLE_NAME = 1
_NFTA_CHAIN_TABLE = 1
_NFTA_CHAIN_NAME = 3
_NFTA_CHAIN_HOOK = 4
_NFTA_CHAIN_TYPE = 7
_NFTA_HOOK_HOOKNUM = 1
_NFTA_HOOK_PRIORITY = 2
_NFTA_HOOK_DEV = 3
_NFTA_RULE_TABLE = 1
_NFTA_RULE_CHAIN = 2
_NFTA_RULE_EXPRESSIONS = 4
_NFTA_LIST_ELEM = 1
_NFTA_EXPR_NAME = 1
_NFTA_EXPR_DATA = 2
_NFTA_META_DREG = 1
_NFTA_META_KEY = 2
_NFTA_PAYLOAD_DREG = 1
_NFTA_PAYLOAD_BASE = 2
_NFTA_PAYLOAD_OFFSET = 3
_NFTA_PAYLOAD_LEN = 4
_NFTA_EXTHDR_DREG = 1
_NFTA_EXTHDR_TYPE = 2
_NFTA_EXTHDR_OFFSET = 3
_NFTA_EXTHDR_LEN = 4
_NFTA_EXTHDR_FLAGS = 5
_NFTA_EXTHDR_OP = 6
_NFT_EXTHDR_OP_IPV6 = 0
_NFTA_BITWISE_SREG = 1
_NFTA_BITWISE_DREG = 2
_NFTA_BITWISE_LEN = 3
_NFTA_BITWISE_MASK = 4
_NFTA_BITWISE_XOR = 5
_NFTA_BITWISE_OP = 6
_NFT_BITWISE_MASK_XOR = 0
_NFTA_CMP_SREG = 1
_NFTA_CMP_OP = 2
_NFTA_CMP_DATA = 3
_NFT_CMP_EQ = 0
_NFT_CMP_NEQ = 1
_NFT_CMP_GT = 4
_NFTA_RANGE_SREG = 1
_NFTA_RANGE_OP = 2
_NFTA_RANGE_FROM_DATA = 3
_NFTA_RANGE_TO_DATA = 4
_NFT_RANGE_EQ = 0
_NFT_RANGE_NEQ = 1
_NFTA_IMMEDIATE_DREG = 1
_NFTA_IMMEDIATE_DATA = 2
_NFTA_COUNTER_BYTES = 1
_NFTA_COUNTER_PACKETS = 2
_NFTA_DATA_VALUE = 1
_NFTA_DATA_VERDICT = 2
_NFTA_VERDICT_CODE = 1
_NFTA_VERDICT_CHAIN = 2
_NFT_REG_VERDICT = 0
_NFT_REG_1 = 1
_NF_DROP = 0
_NF_ACCEPT = 1
_NFT_JUMP = -3
_NFT_GOTO = -4

# struct nfgenmsg; its last field is in network byte order.
_NFGENMSG = struct.Struct(">BBH")
_BEGIN = (_NFNL_BATCH_BEGIN, _NFGENMSG.pack(0, 0, _NFNL_SUBSYS_NFTABLES))
_END = (_NFNL_BATCH_END, _BEGIN[1])

_BE64 = struct.Struct(">Q")


@dataclass(frozen=True, slots=True)
class Hook:
    """Where the kernel calls a chain; `device` is for the netdev family."""

    number: int
    priority: int
    device: str = ""


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain with its rules in order; without a hook it is only jumped to."""

    name: str
    rules: tuple[bytes, ...]
    hook: Hook | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """A table with all of its chains."""

    family: int
    name: str
    chains: tuple[Chain, ...]


def table_name(ifindex: int) -> str:
    """The name of a link's tables, in whichever family."""
    return f"{_OWN_TABLE}{ifindex}"


def ifindex_of(table: str) -> int | None:
    """Whose link's the table of this name is, None where it is not ours."""
    number = table.removeprefix(_OWN_TABLE)
    return int(number) if number != table and number.isdecimal() else None


def add_tables(*tables: Table) -> None:
    """Make the tables in the thread's namespace, in one transaction; raises OSError."""
    messages = [message for table in tables for message in _new_table(table)]
    names = " and ".join(f"{FAMILY_NAMES[table.family]} {table.name}" for table in tables)
    with Netlink(NETLINK_NETFILTER) as netfilter:
        netfilter.transaction(_BEGIN, messages, _END, what=f"nftables table {names}")


def delete_tables(netfilter: Netlink, tables: Iterable[tuple[int, str]]) -> None:
    """Delete the tables, each a family and a name, in one transaction."""
    messages = [
        (_NFT_DELTABLE, 0, _header(family) + text(_NFTA_TABLE_NAME, name))
        for family, name in tables
    ]
    if messages:
        netfilter.transaction(_BEGIN, messages, _END, what="removal of nftables tables")


def list_tables(netfilter: Netlink) -> set[tuple[int, str]]:
    """Family and name of every table; none on a kernel without nf_tables."""
    try:
        answers = netfilter.request(
            _NFT_GETTABLE,
            _header(_NFPROTO_UNSPEC),
            flags=netlink.NLM_F_DUMP,
            what="nftables tables",
        )
    except OSError as error:
        # nfnetlink_rcv_msg, where nf_tables is not there.
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        return set()
    return {(answer[0], as_text(_parsed(answer)[_NFTA_TABLE_NAME])) for answer in answers}


def changed_chains(table: Table) -> list[str]:
    """The names of those chains of the thread's namespace that are not what `table` says.

    Also of such as should not be there. What counters have counted is no change.
    """
    with Netlink(NETLINK_NETFILTER) as netfilter:
        hooks = _read_hooks(netfilter, table.family, table.name)
        rules = read_rules(netfilter, table.family, table.name)
    made = {it.name: (it.hook, [_uncounted(rule) for rule in it.rules]) for it in table.chains}
    found = {
        name: (hook, [_uncounted(rule) for rule in rules.get(name, [])])
        for name, hook in hooks.items()
    }
    return sorted(name for name in made.keys() | found.keys() if made.get(name) != found.get(name))


def read_rules(netfilter: Netlink, family: int, table: str) -> dict[str, list[bytes]]:
    """The rules of the table by their chain's name, in order; none where there is no such table."""
    answers = netfilter.request(
        _NFT_GETRULE,
        _header(family) + text(_NFTA_RULE_TABLE, table),
        flags=netlink.NLM_F_DUMP,
        what=f"nftables rules of table {FAMILY_NAMES[family]} {table}",
    )
    rules: dict[str, list[bytes]] = {}
    for answer in answers:
        found = _parsed(answer)
        if as_text(found[_NFTA_RULE_TABLE]) == table:
            rules.setdefault(as_text(found[_NFTA_RULE_CHAIN]), []).append(
                attribute(_NFTA_RULE_EXPRESSIONS, found.get(_NFTA_RULE_EXPRESSIONS, b""))
            )
    return rules


def packets_counted(made: bytes) -> int | None:
    """What the rule's counter has counted, None where it has no counter."""
    # Few have one, and to take a rule apart is most of what reading it costs.
    if b"counter\0" not in made:
        return None
    for name, data in _expressions(made):
        if name == "counter":
            packets: int = _BE64.unpack(attributes(data)[_NFTA_COUNTER_PACKETS])[0]
            return packets
    return None


def rule(*expressions: bytes) -> bytes:
    """A rule: the expressions are tried in turn until one does not match."""
    return _nest(_NFTA_RULE_EXPRESSIONS, *expressions)


def load_meta(key: int) -> bytes:
    """Load what the kernel knows of the packet besides its bytes (enum nft_meta_keys).

    As every load, into the one register that our rules use; where there is nothing to load, the
    rule does not match (NFT_BREAK).
    """
    return _expression("meta", _be32(_NFTA_META_KEY, key), _be32(_NFTA_META_DREG, _NFT_REG_1))


def load_payload(base: int, offset: int, length: int) -> bytes:
    """Load octets of the packet, counted from a header (enum nft_payload_bases)."""
    return _expression(
        "payload",
        _be32(_NFTA_PAYLOAD_DREG, _NFT_REG_1),
        _be32(_NFTA_PAYLOAD_BASE, base),
        _be32(_NFTA_PAYLOAD_OFFSET, offset),
        _be32(_NFTA_PAYLOAD_LEN, length),
    )


def load_ipv6_extension(kind: int, offset: int, length: int) -> bytes:
    """Load octets of the first IPv6 extension header of the kind (ipv6_find_hdr)."""
    return _expression(
        "exthdr",
        _be32(_NFTA_EXTHDR_DREG, _NFT_REG_1),
        attribute(_NFTA_EXTHDR_TYPE, bytes([kind])),
        _be32(_NFTA_EXTHDR_OFFSET, offset),
        _be32(_NFTA_EXTHDR_LEN, length),
        _be32(_NFTA_EXTHDR_FLAGS, 0),
        _be32(_NFTA_EXTHDR_OP, _NFT_EXTHDR_OP_IPV6),
    )


def mask(bits: bytes) -> bytes:
    """Keep only these bits of what was loaded."""
    return _expression(
        "bitwise",
        _be32(_NFTA_BITWISE_SREG, _NFT_REG_1),
        _be32(_NFTA_BITWISE_DREG, _NFT_REG_1),
        _be32(_NFTA_BITWISE_LEN, len(bits)),
        _be32(_NFTA_BITWISE_OP, _NFT_BITWISE_MASK_XOR),
        _value(_NFTA_BITWISE_MASK, bits),
        _value(_NFTA_BITWISE_XOR, bytes(len(bits))),
    )


def equal(data: bytes) -> bytes:
    """Whether this was loaded, at most 16 octets (struct nft_data)."""
    return _compare(_NFT_CMP_EQ, data)


def unequal(data: bytes) -> bytes:
    """Whether anything else was loaded."""
    return _compare(_NFT_CMP_NEQ, data)


def within(first: bytes, last: bytes) -> bytes:
    """Whether one of these was loaded, in network byte order, both ends included."""
    return _range(_NFT_RANGE_EQ, first, last)


def outside(first: bytes, last: bytes) -> bytes:
    """Whether none of these was loaded."""
    return _range(_NFT_RANGE_NEQ, first, last)


def count() -> bytes:
    """Count the packet."""
    return _expression(
        "counter",
        attribute(_NFTA_COUNTER_BYTES, bytes(_BE64.size)),
        attribute(_NFTA_COUNTER_PACKETS, bytes(_BE64.size)),
    )


def accept() -> bytes:
    """The packet passes this table."""
    return _verdict(_be32(_NFTA_VERDICT_CODE, _NF_ACCEPT))


def drop() -> bytes:
    """The packet ends here."""
    return _verdict(_be32(_NFTA_VERDICT_CODE, _NF_DROP))


def jump(chain: str) -> bytes:
    """Go on in the chain; at its end, behind this rule."""
    return _verdict(_be32(_NFTA_VERDICT_CODE, _NFT_JUMP), text(_NFTA_VERDICT_CHAIN, chain))


def goto(chain: str) -> bytes:
    """Go on in the chain; at its end, where the chain of this rule would go on."""
    return _verdict(_be32(_NFTA_VERDICT_CODE, _NFT_GOTO), text(_NFTA_VERDICT_CHAIN, chain))


def _new_table(table: Table) -> Iterator[tuple[int, int, bytes]]:
    start = _header(table.family) + text(_NFTA_TABLE_NAME, table.name)
    yield _NFT_NEWTABLE, netlink.NLM_F_CREATE, start
    # All chains before the first rule, which may jump to any (nft_verdict_init).
    for chain in table.chains:
        hooked = b"" if chain.hook is None else _hooked(chain.hook)
        message = start + text(_NFTA_CHAIN_NAME, chain.name) + hooked
        yield _NFT_NEWCHAIN, netlink.NLM_F_CREATE, message
    for chain in table.chains:
        behind = start + text(_NFTA_RULE_CHAIN, chain.name)
        for made in chain.rules:
            yield _NFT_NEWRULE, netlink.NLM_F_CREATE | netlink.NLM_F_APPEND, behind + made


def _hooked(hook: Hook) -> bytes:
    device = (text(_NFTA_HOOK_DEV, hook.device),) if hook.device else ()
    number = _be32(_NFTA_HOOK_HOOKNUM, hook.number)
    priority = _be32(_NFTA_HOOK_PRIORITY, hook.priority)
    return _nest(_NFTA_CHAIN_HOOK, number, priority, *device) + text(_NFTA_CHAIN_TYPE, "filter")


def _read_hooks(netfilter: Netlink, family: int, table: str) -> dict[str, Hook | None]:
    """The hooks of the table's chains by their names; a dump of chains is of all tables."""
    answers = netfilter.request(
        _NFT_GETCHAIN,
        _header(family),
        flags=netlink.NLM_F_DUMP,
        what=f"nftables chains of table {FAMILY_NAMES[family]} {table}",
    )
    hooks: dict[str, Hook | None] = {}
    for answer in answers:
        found = _parsed(answer)
        if as_text(found[_NFTA_CHAIN_TABLE]) != table:
            continue
        hook = None
        if _NFTA_CHAIN_HOOK in found:
            described = attributes(found[_NFTA_CHAIN_HOOK])
            hook = Hook(
                _as_be32(described[_NFTA_HOOK_HOOKNUM]),
                _as_be32(described[_NFTA_HOOK_PRIORITY]),
                # Not there where the chain has no device any more, or several.
                as_text(described.get(_NFTA_HOOK_DEV, b"")),
            )
        hooks[as_text(found[_NFTA_CHAIN_NAME])] = hook
    return hooks


def _uncounted(made: bytes) -> list[tuple[str, bytes]]:
    return [(name, b"" if name == "counter" else data) for name, data in _expressions(made)]


def _expressions(made: bytes) -> Iterator[tuple[str, bytes]]:
    for _, element in walk(attributes(made)[_NFTA_RULE_EXPRESSIONS]):
        found = attributes(element)
        yield as_text(found[_NFTA_EXPR_NAME]), found.get(_NFTA_EXPR_DATA, b"")


def _header(family: int) -> bytes:
    return _NFGENMSG.pack(family, 0, 0)


def _parsed(answer: bytes) -> dict[int, bytes]:
    return attributes(answer[_NFGENMSG.size :])


def _be32(kind: int, value: int) -> bytes:
    # nf_tables speaks network byte order (nla_get_be32), unlike rtnetlink.
    return attribute(kind, struct.pack(">i", value))


def _as_be32(payload: bytes) -> int:
    value: int = struct.unpack(">i", payload)[0]
    return value


def _nest(kind: int, *attributes_: bytes) -> bytes:
    # nf_tables neither needs nor sends NLA_F_NESTED (nla_nest_start_noflag).
    return attribute(kind, b"".join(attributes_))


def _value(kind: int, data: bytes) -> bytes:
    return _nest(kind, attribute(_NFTA_DATA_VALUE, data))


def _expression(name: str, *data: bytes) -> bytes:
    return _nest(_NFTA_LIST_ELEM, text(_NFTA_EXPR_NAME, name), _nest(_NFTA_EXPR_DATA, *data))


def _compare(operation: int, data: bytes) -> bytes:
    return _expression(
        "cmp",
        _be32(_NFTA_CMP_SREG, _NFT_REG_1),
        _be32(_NFTA_CMP_OP, operation),
        _value(_NFTA_CMP_DATA, data),
    )


def _range(operation: int, first: bytes, last: bytes) -> bytes:
    return _expression(
        "range",
        _be32(_NFTA_RANGE_SREG, _NFT_REG_1),
        _be32(_NFTA_RANGE_OP, operation),
        _value(_NFTA_RANGE_FROM_DATA, first),
        _value(_NFTA_RANGE_TO_DATA, last),
    )


def _verdict(*described: bytes) -> bytes:
    return _expression(
        "immediate",
        _be32(_NFTA_IMMEDIATE_DREG, _NFT_REG_VERDICT),
        _nest(_NFTA_IMMEDIATE_DATA, _nest(_NFTA_DATA_VERDICT, *described)),
    )
