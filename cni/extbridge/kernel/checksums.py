"""Hold the guest to what it leaves to the host: checksums, and the cutting up of long frames.

A guest may leave a checksum to the host (virtio_net_hdr, VIRTIO_NET_HDR_F_NEEDS_CSUM): it says
where what is summed begins and where the sum goes, and kernel or NIC write it there after nftables
has looked (validate_xmit_skb). A guest that names another place so changes two octets of what was
judged, of an ARP sender or an IP source, to what it likes; and a NIC that segments takes the same
place for the TCP header, and changes more. Of a frame to be cut into IP fragments the kernel then
writes their offsets (inet_gso_segment): what was judged as a later fragment becomes a first one.

No expression of nftables can see that. A program at clsact's egress hook can, which comes after
nftables' and before a checksum is written or a frame cut (__dev_queue_xmit). Of frames that leave
anything it drops those whose sum would begin before the IP payload, or be written into the
payload's first four octets, which have ports and ICMP's type; IP fragments; and all that is not IP,
is ICMPv6, or has an IPv6 extension header: hosts do not send such.

The program names nothing of the guest's, so one serves all links. It alone may be used under the
BSD license or the GPL too (Apache-2.0 OR BSD-2-Clause OR GPL-2.0-only): the kernel lends
`probe_read_kernel` to no others.
"""

from __future__ import annotations

import errno
import functools
import threading
from typing import Final

from extbridge.kernel.bpf import (
    BYTE_OFFSET,
    LSHIFT_U64,
    RSHIFT_U64,
    Code,
    Member,
    load_classifier,
    tag_of,
)
from extbridge.kernel.netlink import Netlink, as_u32, text, u32
from extbridge.kernel.tc import SENT, add_filter, have_clsact, list_filters

_NAME: Final = "extbridge_sums"

_loading = threading.Lock()

_ENOTSUPP = 524
_NOT_TAKEN: Final = (errno.EINVAL, errno.ENOSYS, errno.E2BIG, errno.ENOENT, _ENOTSUPP)
"""What the kernel says of a program that it does not understand, or knows no types for."""

# linux/pkt_cls.h.
_TCA_BPF_FD = 6
_TCA_BPF_NAME = 7
_TCA_BPF_FLAGS = 8
_TCA_BPF_TAG = 10
_TCA_BPF_FLAG_ACT_DIRECT = 1
_TC_ACT_OK, _TC_ACT_SHOT = 0, 2

_CHECKSUM_PARTIAL = 3

_SK_BUFF: Final = (
    Member("ip_summed", 2, 0),
    Member("csum_start", 16, 16),
    Member("csum_offset", 16, 32),
    Member("network_header", 16, 48),
)
_IP_SUMMED, _CSUM_START, _CSUM_OFFSET, _NETWORK_HEADER = range(4)

# Of struct __sk_buff, which the kernel translates by itself.
_GSO_SIZE = 176

_IPV4, _IPV6 = 0x0800, 0x86DD
_ETHERTYPE_AT, _IPV4_LENGTH_AT, _IPV4_FRAGMENT_AT, _IPV6_NEXT_AT = 12, 14, 20, 20
# More fragments, and the offset.
_IPV4_FRAGMENTED = 0x3FFF
_IPV6_HEADER = 40
# Hop-by-hop, routing, fragment, ICMPv6, destination options.
_NOTHING_LEFT_BEHIND_IPV6 = (0, 43, 44, 58, 60)
_FIRST_OCTETS = 4

# Registers: the answer; arguments; what a call leaves alone; the top of the stack.
_R0, _R1, _R2, _R3, _R6, _R7, _R8, _R9, _TOP = 0, 1, 2, 3, 6, 7, 8, 9, 10
_SLOT = -8

# Instructions on 64 bits (RFC 9669, section 4). Of a packet are loaded host-order values; what is
# not there ends the program with 0, _TC_ACT_OK: of so short a frame nftables lets nothing pass.
_MOV, _MOV_VALUE, _ADD, _ADD_VALUE, _SUB = 0xBF, 0xB7, 0x0F, 0x07, 0x1F
_AND_VALUE, _LEFT_VALUE, _RIGHT_VALUE = 0x57, 0x67, 0x77
_LOAD_U8, _LOAD_U16, _LOAD_U32, _STORE_VALUE = 0x71, 0x69, 0x61, 0x7A
_PACKET_U8, _PACKET_U16 = 0x30, 0x28
_JUMP, _IF_EQUAL, _IF_UNEQUAL, _IF_LESS_SIGNED, _CALL, _EXIT = 0x05, 0x15, 0x55, 0xCD, 0x85, 0x95
_PROBE_READ_KERNEL = 113


def hold_checksums(route: Netlink, ifindex: int) -> None:
    """Drop what the guest sends with a checksum elsewhere; `route` is of the link's namespace.

    Raises OSError, with EOPNOTSUPP where the kernel does not take the program. Undone by whoever
    deletes the link.
    """
    program = loaded_program()
    have_clsact(route, ifindex)
    options = u32(_TCA_BPF_FD, program) + text(_TCA_BPF_NAME, _NAME)
    options += u32(_TCA_BPF_FLAGS, _TCA_BPF_FLAG_ACT_DIRECT)
    add_filter(route, ifindex, SENT, "bpf", options)


def unheld_checksums(route: Netlink, ifindex: int) -> str:
    """What of `hold_checksums` is not as it was made, in words; empty when it is whole."""
    match list_filters(route, ifindex, SENT):
        case []:
            return "no program looks at the checksums that it leaves to the NIC"
        case [it] if it.kind == "bpf" and it.sees_all:
            flags = as_u32(it.options.get(_TCA_BPF_FLAGS, bytes(4)))
            is_ours = it.options.get(_TCA_BPF_TAG) == tag_of(loaded_program())
            if flags == _TCA_BPF_FLAG_ACT_DIRECT and is_ours:
                return ""
    return "the program that looks at its checksums is another, or not alone"


def loaded_program() -> int:
    """The fd of the program, which a process has for as long as it lives; raises OSError.

    The first of a boot takes 40 ms, in which the kernel looks through its types, others 0.3.
    """
    with _loading:
        return _program()


@functools.cache
def _program() -> int:
    try:
        return load_classifier(_NAME, _code(), "sk_buff", _SK_BUFF)
    except OSError as error:
        if error.errno in _NOT_TAKEN:
            raise OSError(errno.EOPNOTSUPP, str(error)) from error
        raise


def _code() -> Code:
    code = Code()
    code.add(_MOV, _R6, _R1)
    code.add(_STORE_VALUE, _TOP, to=_SLOT)
    _read(code, _IP_SUMMED, 1)
    code.add(_LOAD_U8, _R7, _TOP, to=_SLOT)
    code.add_relocated(_LEFT_VALUE, _R7, member=_IP_SUMMED, kind=LSHIFT_U64, value=62)
    code.add_relocated(_RIGHT_VALUE, _R7, member=_IP_SUMMED, kind=RSHIFT_U64, value=62)
    code.add(_IF_EQUAL, _R7, to="left", value=_CHECKSUM_PARTIAL)
    code.add(_LOAD_U32, _R0, _R6, to=_GSO_SIZE)
    code.add(_IF_EQUAL, _R0, to="pass")
    code.label("left")
    code.add(_PACKET_U16, value=_ETHERTYPE_AT)
    code.add(_IF_EQUAL, _R0, to="ipv4", value=_IPV4)
    code.add(_IF_UNEQUAL, _R0, to="drop", value=_IPV6)
    code.add(_PACKET_U8, value=_IPV6_NEXT_AT)
    for next_header in _NOTHING_LEFT_BEHIND_IPV6:
        code.add(_IF_EQUAL, _R0, to="drop", value=next_header)
    code.add(_MOV_VALUE, _R8, value=_IPV6_HEADER)
    code.add(_JUMP, to="sums")
    code.label("ipv4")
    code.add(_PACKET_U16, value=_IPV4_FRAGMENT_AT)
    code.add(_AND_VALUE, _R0, value=_IPV4_FRAGMENTED)
    code.add(_IF_UNEQUAL, _R0, to="drop")
    code.add(_PACKET_U8, value=_IPV4_LENGTH_AT)
    code.add(_AND_VALUE, _R0, value=0x0F)
    code.add(_LEFT_VALUE, _R0, value=2)
    code.add(_MOV, _R8, _R0)
    code.label("sums")
    code.add(_IF_UNEQUAL, _R7, to="pass", value=_CHECKSUM_PARTIAL)
    # What is summed may begin r8 octets behind the start of the IP header, which r7 is; r9 is where
    # it begins, and then where the sum goes.
    _read(code, _NETWORK_HEADER, 2)
    code.add(_LOAD_U16, _R7, _TOP, to=_SLOT)
    _read(code, _CSUM_START, 2)
    code.add(_LOAD_U16, _R9, _TOP, to=_SLOT)
    code.add(_SUB, _R9, _R7)
    code.add(_IF_LESS_SIGNED, _R9, _R8, to="drop")
    _read(code, _CSUM_OFFSET, 2)
    code.add(_LOAD_U16, _R7, _TOP, to=_SLOT)
    code.add(_ADD, _R9, _R7)
    code.add(_ADD_VALUE, _R8, value=_FIRST_OCTETS)
    code.add(_IF_LESS_SIGNED, _R9, _R8, to="drop")
    code.label("pass")
    code.add(_MOV_VALUE, _R0, value=_TC_ACT_OK)
    code.add(_EXIT)
    code.label("drop")
    code.add(_MOV_VALUE, _R0, value=_TC_ACT_SHOT)
    code.add(_EXIT)
    return code


def _read(code: Code, member: int, octets: int) -> None:
    """Put so many octets of a member into the slot of the stack."""
    code.add(_MOV, _R1, _TOP)
    code.add(_ADD_VALUE, _R1, value=_SLOT)
    code.add(_MOV_VALUE, _R2, value=octets)
    code.add(_MOV, _R3, _R6)
    place = _SK_BUFF[member].at // 8
    code.add_relocated(_ADD_VALUE, _R3, member=member, kind=BYTE_OFFSET, value=place)
    code.add(_CALL, value=_PROBE_READ_KERNEL)
