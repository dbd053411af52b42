"""That whatever comes over the wire is understood or refused, and that no fd is lost on the way.

Every test here leaves as many fds as it found, whatever it received: `nothing_left_behind` counts.
"""

from __future__ import annotations

import array
import asyncio
import os
import re
import resource
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extbridge.node import wire
from extbridge.node.wire import Frame, WireError

PAYLOAD = b"payload"
LIMIT = 100

without_nul = st.binary().map(lambda data: data.replace(b"\0", b""))
strings = without_nul.map(os.fsdecode)
names = without_nul.map(lambda data: os.fsdecode(data.replace(b"=", b"")))
environments = st.dictionaries(names, strings)
kinds = st.sampled_from([wire.CNI, wire.TAPS])


@given(st.binary() | st.binary().map(lambda rest: b"xb\x01C" + rest))
def test_any_request_is_understood_or_refused(payload: bytes) -> None:
    """No request, however odd, makes the agent stumble."""
    try:
        request = wire.decode_request(payload, wire.CNI)
    except WireError:
        return
    assert payload.startswith(b"xb\x01C")
    assert payload.endswith(b"\0" + request.body)


@given(kinds, environments, st.binary())
def test_request_arrives_as_it_was_sent(kind: bytes, environ: dict[str, str], body: bytes) -> None:
    """Whatever a variable or standard input holds, bytes that are no text included, arrives."""
    payload = wire.encode_request(kind, environ, body)
    request = wire.decode_request(payload, kind)
    assert (request.environ, request.body) == (environ, body)
    other = wire.TAPS if kind == wire.CNI else wire.CNI
    with pytest.raises(WireError, match="starts with"):
        wire.decode_request(payload, other)


@pytest.mark.parametrize("cut", range(1, len(b"xb\x01CA=1\0B=2\0\0")))
def test_environment_without_an_end_is_refused(cut: int) -> None:
    """A request that was cut off is not taken for one with fewer variables."""
    with pytest.raises(WireError):
        wire.decode_request(b"xb\x01CA=1\0B=2\0\0"[:-cut], wire.CNI)


def test_number_of_variables_is_bounded() -> None:
    """A pod's request can hold no more variables than are quickly read; the node's root may."""
    environ = {f"CNI_{number}": "x" for number in range(wire.MAX_VARIABLES)}
    payload = wire.encode_request(wire.TAPS, environ, b"body\0\0")
    assert wire.decode_request(payload, wire.TAPS).environ == environ
    environ["CNI"] = ""
    with pytest.raises(WireError, match="1000 variables"):
        wire.decode_request(wire.encode_request(wire.TAPS, environ, b""), wire.TAPS)
    payload = wire.encode_request(wire.CNI, environ, b"")
    assert wire.decode_request(payload, wire.CNI).environ == environ


@given(st.lists(strings))
def test_command_arrives_as_it_was_sent(command: list[str]) -> None:
    """Arguments keep their number and their bytes, empty ones too."""
    assert wire.decode_strings(wire.encode_strings(command)) == command


@given(st.binary())
def test_any_command_is_understood_or_refused(body: bytes) -> None:
    """A command whose last argument has no end is refused, every other is one."""
    if body and not body.endswith(b"\0"):
        with pytest.raises(WireError):
            wire.decode_strings(body)
    else:
        assert wire.encode_strings(wire.decode_strings(body)) == body


@given(st.binary() | st.binary().map(lambda rest: bytes(7) + rest), st.integers(0, 4))
def test_any_answer_is_understood_or_refused(payload: bytes, fds: int) -> None:
    """What an agent answers, however odd, numbers exactly the fds that came, or is refused."""
    try:
        _, numbers, rest = wire.decode_tap_answer(Frame(payload, list(range(fds))))
    except WireError:
        return
    assert len(numbers) == fds
    assert payload.endswith(rest)


@given(st.integers(1, 3 * wire.MAX_FDS), st.lists(strings, min_size=1))
def test_any_number_of_taps_is_handed_over(number: int, command: list[str]) -> None:
    """However many frames it takes, each fd has the next number and the last has the command."""
    fds = list(range(number))
    frames = list(wire.encode_tap_answer(fds, command))
    assert len(frames) == -(-number // wire.MAX_FDS)
    told: list[int] = []
    sent: list[int] = []
    for at, (payload, chunk) in enumerate(frames):
        status, numbers, rest = wire.decode_tap_answer(Frame(payload, list(chunk)))
        last = at == len(frames) - 1
        assert (status, wire.decode_strings(rest)) == (0, command if last else [])
        assert len(payload) <= len(rest) + 8 + 4 * wire.MAX_FDS
        told += numbers
        sent += chunk
    assert told == list(range(wire.FIRST_TAP_FD, wire.FIRST_TAP_FD + number))
    assert sent == fds


def test_refusal_is_a_sentence() -> None:
    """What the agent says to one who gets nothing arrives, whatever the sentence repeats."""
    frame = Frame(wire.encode_tap_refusal(125, "no NIC \udcff"))
    assert wire.decode_tap_answer(frame) == (125, [], b"no NIC ?")


@pytest.mark.parametrize("cut", range(1, len(PAYLOAD) + 4))
def test_frame_arrives_however_it_is_cut(cut: int) -> None:
    """A frame that comes in parts is the same frame, and its fds close on exec."""
    data = framed(PAYLOAD)
    with some_files(2) as files:
        with closing(received((data[:cut], files), (data[cut:], ()), max_fds=2)) as frame:
            assert frame.payload == PAYLOAD
            assert [os.get_inheritable(fd) for fd in frame.fds] == [False, False]
            for fd, file in zip(frame.fds, files, strict=True):
                assert os.path.samestat(os.fstat(fd), os.fstat(file))
        assert frame.fds == []


@pytest.mark.parametrize("cut", range(len(PAYLOAD) + 4))
def test_frame_that_a_thread_began_is_finished(cut: int) -> None:
    """What has come when a thread stops waiting is not lost to the event loop, fds included."""
    ours, theirs = nonblocking_pair()
    with ours, theirs, some_files(1) as files:
        receiving = wire.Receiving(ours, limit=LIMIT, max_fds=1)
        send(theirs, framed(PAYLOAD)[:cut], files)
        assert receiving.wait(seconds=0.001) is None
        send(theirs, framed(PAYLOAD)[cut:], files if cut == 0 else ())
        with closing(asyncio.run(receiving.finish())) as frame:
            assert (frame.payload, len(frame.fds)) == (PAYLOAD, 1)
            assert receiving.wait(seconds=0) is frame


@pytest.mark.parametrize("size", [0, 1, (1 << 18) - 1, 1 << 18, (1 << 18) + 1, wire.MAX_CNI_BYTES])
def test_frame_of_any_size_arrives(size: int) -> None:
    """Sent to one who reads slower than the agent writes, a frame arrives whole, fds included."""

    async def pass_on() -> Frame:
        ours, theirs = nonblocking_pair()
        with ours, theirs, some_files(3) as files:
            sending = asyncio.create_task(wire.Sending(payload, files).finish(theirs))
            frame = await wire.receive_frame(ours, limit=size, max_fds=3)
            await sending
            return frame

    payload = os.urandom(size)
    with closing(asyncio.run(pass_on())) as frame:
        assert frame.payload == payload
        assert len(frame.fds) == 3


def test_longer_frame_than_allowed_is_refused() -> None:
    """A frame may be as long as its limit; of a longer one nothing is read, its fds are closed."""
    whole = framed(bytes(LIMIT))
    assert received((whole, ())).payload == bytes(LIMIT)
    for length in (LIMIT + 1, (1 << 32) - 1):
        with some_files(1) as files, pytest.raises(WireError, match=f"{length} bytes"):
            received((struct.pack("<I", length), files), max_fds=1)


@pytest.mark.parametrize("allowed", [0, 1, 2, 3])
@pytest.mark.parametrize("surplus", [1, 2, 200])
def test_more_fds_than_allowed_are_refused(allowed: int, surplus: int) -> None:
    """Whoever sends more fds than allowed has his connection ended; none of them stays open."""
    with some_files(allowed + surplus) as files, pytest.raises(WireError, match="fds"):
        received((framed(PAYLOAD), files), max_fds=allowed)


def test_fds_that_find_no_room_are_refused() -> None:
    """Where the kernel cannot install all fds of a frame, those that it could are closed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    ours, theirs = nonblocking_pair()
    with ours, theirs, some_files(3) as files:
        send(theirs, framed(PAYLOAD), files)
        highest = max(int(fd) for fd in os.listdir("/proc/self/fd"))
        fillers = [os.dup(files[0]) for _ in range(highest)]
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (fillers[-1] + 3, hard))
            with pytest.raises(WireError, match="fds"):
                wire.wait_for_frame(ours, limit=LIMIT, max_fds=3, seconds=1)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for fd in fillers:
                os.close(fd)


# Between the four bytes of the length the kernel may move them itself (unix_stream_read_generic).
@pytest.mark.parametrize("at", range(4, len(PAYLOAD) + 4))
@pytest.mark.parametrize("first", [0, 1])
def test_fds_on_a_later_byte_are_refused(at: int, first: int) -> None:
    """What rides on a later byte than a frame's first is closed, and what came before as well."""
    data = framed(PAYLOAD)
    with some_files(1) as files, pytest.raises(WireError, match="fds"):
        received((data[:at], files[:first]), (data[at:], files), max_fds=2)


@pytest.mark.parametrize("at", range(len(PAYLOAD) + 4))
def test_connection_that_ends_early_is_no_frame(at: int) -> None:
    """A frame that breaks off is none, at whichever byte, and its fds are closed."""
    with some_files(1) as files, pytest.raises(WireError, match="ended"):
        received((framed(PAYLOAD)[:at], files), max_fds=1, end=True)


@pytest.mark.parametrize("at", range(len(PAYLOAD) + 4))
def test_deadline_ends_a_frame_that_does_not_come(at: int) -> None:
    """Whoever stops sending is not waited for, and the fds he has sent are closed."""

    async def wait_for_rest(connection: socket.socket) -> None:
        async with asyncio.timeout(0.001):
            await wire.receive_frame(connection, limit=LIMIT, max_fds=1)

    ours, theirs = nonblocking_pair()
    with ours, theirs, some_files(1) as files:
        send(theirs, framed(PAYLOAD)[:at], files)
        with pytest.raises(TimeoutError):
            asyncio.run(wait_for_rest(ours))
    ours, theirs = nonblocking_pair()
    with ours, theirs, some_files(1) as files:
        send(theirs, framed(PAYLOAD)[:at], files)
        with pytest.raises(TimeoutError):
            wire.wait_for_frame(ours, limit=LIMIT, max_fds=1, seconds=0.001)


def test_peer_that_does_not_read_is_not_waited_for() -> None:
    """An answer that nobody takes ends with the sender's deadline, one to nobody at once."""

    async def answer(connection: socket.socket) -> None:
        async with asyncio.timeout(0.001):
            await wire.Sending(bytes(wire.MAX_CNI_BYTES)).finish(connection)

    ours, theirs = nonblocking_pair()
    with ours:
        with theirs, pytest.raises(TimeoutError):
            asyncio.run(answer(ours))
        with pytest.raises(BrokenPipeError):
            asyncio.run(answer(ours))


def received(*parts: tuple[bytes, Sequence[int]], max_fds: int = 0, end: bool = False) -> Frame:
    """What both receivers make of the parts, each sent when all before it has been taken."""

    async def receive() -> Frame:
        ours, theirs = nonblocking_pair()
        with ours, theirs:
            receiving = asyncio.create_task(wire.receive_frame(ours, limit=LIMIT, max_fds=max_fds))
            for data, fds in parts:
                # Once for the task to run, once for the loop to find the socket readable.
                for _ in range(3):
                    await asyncio.sleep(0)
                if not receiving.done():
                    send(theirs, data, fds)
            if end:
                theirs.shutdown(socket.SHUT_WR)
            return await receiving

    def wait() -> Frame:
        ours, theirs = nonblocking_pair()
        with ours, theirs:
            for data, fds in parts:
                send(theirs, data, fds)
            if end:
                theirs.shutdown(socket.SHUT_WR)
            return wire.wait_for_frame(ours, limit=LIMIT, max_fds=max_fds, seconds=1)

    try:
        frame = asyncio.run(receive())
    except WireError as refusal:
        with pytest.raises(WireError, match=re.escape(str(refusal))):
            wait()
        raise
    with closing(wait()) as other:
        assert (other.payload, len(other.fds)) == (frame.payload, len(frame.fds))
    return frame


def framed(payload: bytes) -> bytes:
    return wire.frame_head(payload) + payload


def send(connection: socket.socket, data: bytes, fds: Sequence[int]) -> None:
    """Send the bytes with the fds on the first of them."""
    rides = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    if data:
        assert connection.sendmsg([data], rides) == len(data)


def nonblocking_pair() -> tuple[socket.socket, socket.socket]:
    pair = socket.socketpair()
    for end in pair:
        end.settimeout(0)
    return pair


@contextmanager
def some_files(number: int) -> Iterator[list[int]]:
    """So many fds, each of another file."""
    files = [os.memfd_create("test", os.MFD_CLOEXEC) for _ in range(number)]
    try:
        yield files
    finally:
        for fd in files:
            os.close(fd)
