"""Netlink messages, as few as an attachment needs.

Our own because this message is what the project exists for: a general library costs 1.1 ms more a
call and 22 MB more memory (docs/decisions.md). Formats: linux/netlink.h; man 7 netlink, rtnetlink.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from types import TracebackType
from typing import Final, Self

NETLINK_ROUTE: Final = 0
NETLINK_NETFILTER: Final = 12

NLM_F_REQUEST: Final = 0x1
NLM_F_ACK: Final = 0x4
NLM_F_EXCL: Final = 0x200
NLM_F_DUMP: Final = 0x300
NLM_F_CREATE: Final = 0x400
NLM_F_APPEND: Final = 0x800

_NLMSG_ERROR = 2
_NLMSG_DONE = 3
_NLM_F_DUMP_INTR = 0x10
_NLM_F_CAPPED = 0x100
_NLM_F_ACK_TLVS = 0x200
_NLMSGERR_ATTR_MSG = 1
_NLA_F_NESTED = 0x8000
_NLA_TYPE_MASK = 0x3FFF

_SOL_NETLINK = 270
_NETLINK_CAP_ACK = 10
_NETLINK_EXT_ACK = 11
_NETLINK_GET_STRICT_CHK = 12

_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_ERROR = struct.Struct("=i")
# nlmsgerr: the errno, then the header of the message it answers.
_ERROR_WITH_HEADER = _ERROR.size + _HEADER.size

# A dump comes in parts of at most 32 KiB (netlink_dump).
_RECEIVE = 1 << 16

_DUMP_TRIES = 10


def attribute(kind: int, payload: bytes) -> bytes:
    """One netlink attribute, padded to four bytes (struct nlattr)."""
    length = _ATTRIBUTE.size + len(payload)
    return _ATTRIBUTE.pack(length, kind) + payload + bytes(-length % 4)


def nested(kind: int, *attributes: bytes) -> bytes:
    """An attribute whose payload is attributes (NLA_F_NESTED)."""
    return attribute(kind | _NLA_F_NESTED, b"".join(attributes))


def text(kind: int, value: str) -> bytes:
    """A NUL-terminated string attribute."""
    return attribute(kind, value.encode() + b"\0")


def u32(kind: int, value: int) -> bytes:
    """A 32-bit attribute in host byte order."""
    return attribute(kind, struct.pack("=I", value))


def walk(payload: bytes) -> Iterator[tuple[int, bytes]]:
    """The attributes in `payload`, in order, flags stripped from their types."""
    at, end = 0, len(payload) - _ATTRIBUTE.size
    while at <= end:
        length, kind = _ATTRIBUTE.unpack_from(payload, at)
        if length < _ATTRIBUTE.size:
            return
        yield kind & _NLA_TYPE_MASK, payload[at + _ATTRIBUTE.size : at + length]
        at += (length + 3) & ~3


def attributes(payload: bytes) -> dict[int, bytes]:
    """The attributes in `payload` by type; where a type repeats, the last."""
    return dict(walk(payload))


def as_text(payload: bytes) -> str:
    """A string attribute's value."""
    return payload.rstrip(b"\0").decode(errors="replace")


def as_u32(payload: bytes) -> int:
    """A 32-bit attribute's value, host byte order."""
    value: int = struct.unpack_from("=I", payload)[0]
    return value


class Netlink:
    """A netlink socket of the namespace in which the calling thread stands when it is made."""

    def __init__(self, protocol: int) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol)
        try:
            self._socket.bind((0, 0))
            for option in (_NETLINK_EXT_ACK, _NETLINK_CAP_ACK, _NETLINK_GET_STRICT_CHK):
                self._socket.setsockopt(_SOL_NETLINK, option, 1)
        except BaseException:
            self._socket.close()
            raise
        self._sequence = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def request(
        self, kind: int, payload: bytes, *, flags: int = 0, at_most: int | None = None, what: str
    ) -> list[bytes]:
        """Send one message, return the payloads of its answers (none but for GET and dumps).

        More answers than `at_most` are refused with E2BIG while they come; the rest is left unread,
        so the socket is of no more use.
        `what` names the call and the object in the OSError that the kernel's refusal becomes; its
        text is the kernel's extended acknowledgement where there is one.
        """
        for _ in range(_DUMP_TRIES):
            last = self._send([(kind, flags | NLM_F_REQUEST | NLM_F_ACK, payload)])
            answers = self._receive(last, last, what, at_most)
            if answers is not None:
                return answers
        raise OSError(errno.EINTR, f"{what}: what is listed changes all the time")

    def transaction(
        self,
        begin: tuple[int, bytes],
        messages: list[tuple[int, int, bytes]],
        end: tuple[int, bytes],
        *,
        what: str,
    ) -> None:
        """Send a batch that the kernel applies whole or not at all (nfnetlink_rcv_batch).

        `messages` are (type, flags, payload). Only the last is acknowledged, after the commit; a
        refusal of any is reported in its own name, before.
        """
        batch = [(begin[0], NLM_F_REQUEST, begin[1])]
        batch += [(kind, flags | NLM_F_REQUEST, payload) for kind, flags, payload in messages]
        kind, flags, payload = batch[-1]
        batch[-1] = (kind, flags | NLM_F_ACK, payload)
        first = self._sequence + 1
        self._send([*batch, (end[0], NLM_F_REQUEST, end[1])])
        self._receive(first, first + len(batch) - 1, what)

    def _send(self, messages: list[tuple[int, int, bytes]]) -> int:
        data = bytearray()
        for kind, flags, payload in messages:
            self._sequence += 1
            data += _HEADER.pack(_HEADER.size + len(payload), kind, flags, self._sequence, 0)
            data += payload + bytes(-len(payload) % 4)
        self._socket.send(data)
        return self._sequence

    def _receive(
        self, first: int, last: int, what: str, at_most: int | None = None
    ) -> list[bytes] | None:
        """Collect answers until message `last` is done with, or any from `first` on is refused.

        None for a dump during which what it lists has changed (nl_dump_check_consistent).
        """
        answers: list[bytes] = []
        consistent = True
        while True:
            data, (sender, _) = self._socket.recvfrom(_RECEIVE)
            if sender != 0:
                # Not the kernel: any process of the namespace may send to the socket's port.
                continue
            at = 0
            while at + _HEADER.size <= len(data):
                length, kind, flags, sequence, _ = _HEADER.unpack_from(data, at)
                payload = data[at + _HEADER.size : at + length]
                at += length + -length % 4
                if sequence < first:
                    # Of a batch before, of which more than one message was refused.
                    continue
                consistent &= not flags & _NLM_F_DUMP_INTR
                if kind in (_NLMSG_ERROR, _NLMSG_DONE):
                    # A dump's end carries an errno too (netlink_dump_done), a bare one without.
                    code = _ERROR.unpack_from(payload)[0] if payload else 0
                    if code < 0:
                        raise _refusal(-code, kind, flags, payload, what)
                    if sequence == last:
                        return answers if consistent else None
                elif sequence == last:
                    if len(answers) == at_most:
                        raise OSError(errno.E2BIG, f"{what}: there are more than {at_most}")
                    answers.append(payload)


def _refusal(code: int, kind: int, flags: int, payload: bytes, what: str) -> OSError:
    reason = os.strerror(code)
    if flags & _NLM_F_ACK_TLVS:
        skip = _ERROR.size
        if kind == _NLMSG_ERROR:
            skip = _ERROR_WITH_HEADER
            if not flags & _NLM_F_CAPPED:
                # The refused message stands between, whole (netlink_ack).
                skip = _ERROR.size + struct.unpack_from("=I", payload, _ERROR.size)[0]
        told = attributes(payload[skip:]).get(_NLMSGERR_ATTR_MSG)
        if told is not None:
            reason = f"{reason}: {as_text(told)}"
    return OSError(code, f"{what}: {reason}")
