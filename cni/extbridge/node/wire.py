"""The wire between shim, launcher and agent: docs/protocol.md says all of it.

What is received is another's, an fd as much as a length: nothing is believed before it is checked,
and every fd that arrives is closed on exec and owned by the frame it came with.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import select
import socket
import struct
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

VERSION: Final = 1
CNI: Final = b"C"
TAPS: Final = b"T"

MAX_CNI_BYTES: Final = 2 << 20
MAX_TAP_REQUEST_BYTES: Final = 256 << 10
MAX_TAP_ANSWER_BYTES: Final = 512 << 10
MAX_FDS: Final = 250
FIRST_TAP_FD: Final = 100
MAX_VARIABLES: Final = 1000
MAX_ARGUMENTS: Final = 4096

REQUEST_SECONDS: Final = 2.0
ANSWER_SECONDS: Final = 5.0

_U32 = struct.Struct("<I")
MARK: Final = b"xb"
"""What a request starts with in every version of the protocol."""

_MAGIC = MARK + bytes([VERSION])
_FD = struct.Struct("=i")
_CHUNK = 1 << 18


class WireError(Exception):
    """The other side did not keep to the protocol; the connection is of no more use."""


@dataclass(slots=True)
class Frame:
    """A payload with the fds that rode on it; whoever has the frame owns them."""

    payload: bytes
    fds: list[int] = field(default_factory=list)

    def close(self) -> None:
        """Close the fds that nobody has taken out of the frame."""
        while self.fds:
            os.close(self.fds.pop())


@dataclass(frozen=True, slots=True)
class Request:
    """A request's parts; the environment's values as os.environ would hold them.

    `id` is this side's own, made up when the request came.
    """

    environ: dict[str, str]
    body: bytes
    id: str = field(default_factory=lambda: os.urandom(4).hex())


async def receive_frame(connection: socket.socket, *, limit: int, max_fds: int) -> Frame:
    """The next frame on a non-blocking socket; raises WireError. The caller sets the deadline."""
    with contextlib.closing(Receiving(connection, limit=limit, max_fds=max_fds)) as receiving:
        return await receiving.finish()


def wait_for_frame(connection: socket.socket, *, limit: int, max_fds: int, seconds: float) -> Frame:
    """The same for those without an event loop; raises TimeoutError after so many seconds."""
    with contextlib.closing(Receiving(connection, limit=limit, max_fds=max_fds)) as receiving:
        frame = receiving.wait(seconds=seconds)
        if frame is None:
            raise TimeoutError(f"no frame in {seconds:g} s")
        return frame


class Receiving:
    """A frame as far as it has come on a non-blocking socket, begun by a thread or an event loop.

    The other may finish it. Until the frame is whole, its fds are this object's: `close` it.
    """

    def __init__(self, connection: socket.socket, *, limit: int, max_fds: int) -> None:
        self._connection = connection
        self._steps = _receive(connection, limit, max_fds)
        self._frame: Frame | None = None

    def close(self) -> None:
        """Give up what has come of a frame that is not whole."""
        self._steps.close()

    def wait(self, *, seconds: float) -> Frame | None:
        """The frame, None if it is not whole within so many seconds; raises WireError."""
        deadline = time.monotonic() + seconds
        readable = select.poll()
        readable.register(self._connection, select.POLLIN)
        while (frame := self._pull()) is None:
            if not readable.poll(max(0.0, deadline - time.monotonic()) * 1000):
                break
        return frame

    async def finish(self) -> Frame:
        """The frame; raises WireError. The caller sets the deadline."""
        while (frame := self._pull()) is None:
            await _ready(self._connection, write=False)
        return frame

    def _pull(self) -> Frame | None:
        if self._frame is None:
            try:
                next(self._steps)
            except StopIteration as done:
                self._frame = done.value
        return self._frame


class Sending:
    """A frame on its way, as far as the socket has taken it; the fds stay the caller's."""

    def __init__(self, payload: bytes, fds: Sequence[int] = ()) -> None:
        self._left = memoryview(frame_head(payload) + payload)
        self._rides = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []

    @property
    def done(self) -> bool:
        """Whether the socket has taken all of it."""
        return not self._left

    def push(self, connection: socket.socket) -> bool:
        """Send what a non-blocking socket takes now; whether that was the last of it."""
        while self._left:
            try:
                sent = connection.sendmsg([self._left], self._rides, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return False
            self._left = self._left[sent:]
            self._rides = []
        return True

    async def finish(self, connection: socket.socket) -> None:
        """Send what is left, as soon as the socket takes it; the caller sets the deadline."""
        while not self.push(connection):
            await _ready(connection, write=True)


def frame_head(payload: bytes) -> bytes:
    """What goes before a payload: its length."""
    return _U32.pack(len(payload))


def encode_request(kind: bytes, environ: Mapping[str, str], body: bytes) -> bytes:
    """The payload of a request; of `environ` all is sent."""
    variables = b"".join(os.fsencode(f"{name}={value}") + b"\0" for name, value in environ.items())
    return _MAGIC + kind + variables + b"\0" + body


def decode_request(payload: bytes, kind: bytes) -> Request:
    """The parts of a request of this kind; raises WireError."""
    if not payload.startswith(_MAGIC + kind):
        raise WireError(f"a request that starts with {payload[:4]!r}, not {_MAGIC + kind!r}")
    rest = payload[len(_MAGIC + kind) :]
    if rest.startswith(b"\0"):
        return Request({}, rest[1:])
    environ, ended, body = rest.partition(b"\0\0")
    # Each takes time that others have to wait; the node's own root is trusted with it.
    most = MAX_VARIABLES if kind == TAPS else -1
    variables = [it.partition(b"=") for it in environ.split(b"\0", most)]
    if not ended or not all(given for _, given, _ in variables):
        raise WireError("a request whose environment has no end")
    if kind == TAPS and len(variables) > MAX_VARIABLES:
        raise WireError(f"a request of more than {MAX_VARIABLES} variables")
    return Request({os.fsdecode(n): os.fsdecode(value) for n, _, value in variables}, body)


def encode_strings(strings: Iterable[str]) -> bytes:
    """A command: each argument ended by a NUL."""
    return b"".join(os.fsencode(string) + b"\0" for string in strings)


def decode_strings(body: bytes) -> list[str]:
    """A command's arguments; raises WireError where the last has no end."""
    if body and not body.endswith(b"\0"):
        raise WireError("a command without an end")
    return [os.fsdecode(string) for string in body.split(b"\0")[:-1]]


def encode_cni_answer(status: int, stdout: bytes) -> bytes:
    """The payload of the answer to a CNI request."""
    return _U32.pack(status) + stdout


def encode_tap_refusal(status: int, sentence: str) -> bytes:
    """The payload of the answer to a launcher that gets nothing."""
    return _U32.pack(status) + _U32.pack(0) + sentence.encode(errors="replace")


def encode_tap_answer(
    fds: Sequence[int], command: Sequence[str]
) -> Iterator[tuple[bytes, Sequence[int]]]:
    """The frames that hand `fds` over, to be numbered from FIRST_TAP_FD on, and the command."""
    for at in range(0, len(fds), MAX_FDS):
        chunk = fds[at : at + MAX_FDS]
        numbers = range(FIRST_TAP_FD + at, FIRST_TAP_FD + at + len(chunk))
        head = _U32.pack(0) + _U32.pack(len(chunk)) + b"".join(map(_U32.pack, numbers))
        last = at + len(chunk) == len(fds)
        yield head + (encode_strings(command) if last else b""), chunk


def decode_tap_answer(frame: Frame) -> tuple[int, list[int], bytes]:
    """Status, the numbers for the frame's fds, and what follows them; raises WireError."""
    payload = frame.payload
    if len(payload) < 2 * _U32.size:
        raise WireError(f"an answer of {len(payload)} bytes")
    status, count = (_U32.unpack_from(payload, at)[0] for at in (0, _U32.size))
    end = (2 + count) * _U32.size
    if count != len(frame.fds) or len(payload) < end:
        raise WireError(f"an answer that numbers {count} fds and has {len(frame.fds)}")
    numbers = [_U32.unpack_from(payload, at)[0] for at in range(2 * _U32.size, end, _U32.size)]
    return status, numbers, payload[end:]


def _receive(connection: socket.socket, limit: int, max_fds: int) -> Generator[None, None, Frame]:
    """Receive a frame, yielding whenever the socket has nothing more yet."""
    frame = Frame(b"")
    try:
        head = yield from _take(connection, _U32.size, max_fds, frame)
        length = _checked_length(head, limit)
        frame.payload = yield from _take(connection, length, len(frame.fds), frame)
    except BaseException:
        frame.close()
        raise
    return frame


def _checked_length(head: bytes, limit: int) -> int:
    length: int = _U32.unpack(head)[0]
    if length > limit:
        raise WireError(f"a frame of {length} bytes, {limit} are allowed")
    return length


def _take(
    connection: socket.socket, size: int, max_fds: int, frame: Frame
) -> Generator[None, None, bytes]:
    """Receive so many bytes; `max_fds` counts those that the frame has already."""
    taken = bytearray()
    while len(taken) < size:
        room = max_fds - len(frame.fds)
        try:
            data, ancillary, flags, _ = connection.recvmsg(
                min(size - len(taken), _CHUNK),
                socket.CMSG_SPACE(room * _FD.size) if room else 0,
                socket.MSG_CMSG_CLOEXEC,
            )
        except BlockingIOError:
            yield
            continue
        for level, kind, value in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                whole = value[: len(value) - len(value) % _FD.size]
                frame.fds += [number for (number,) in _FD.iter_unpack(whole)]
        if flags & socket.MSG_CTRUNC or len(frame.fds) > max_fds:
            raise WireError(f"more than the {max_fds} fds that are allowed")
        if not data:
            raise WireError("the connection ended within a frame")
        taken += data
    return bytes(taken)


async def _ready(connection: socket.socket, *, write: bool) -> None:
    loop = asyncio.get_running_loop()
    future = loop.create_future()
    add, remove = (
        (loop.add_writer, loop.remove_writer) if write else (loop.add_reader, loop.remove_reader)
    )
    add(connection, _settle, future)
    try:
        await future
    finally:
        remove(connection)


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
