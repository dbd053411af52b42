"""Taps for launchers written in Python: `take_taps()` asks the node's agent for this pod's.

The lease is the life of this process: whether it becomes QEMU by exec or starts it as a child, the
taps are free for another when it has ended.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from extbridge.ledger import DEFAULT_RUN, RUN_VARIABLE
from extbridge.network.addresses import Addressing, parse_addressing
from extbridge.node import wire
from extbridge.node.broker import IFNAMES_VARIABLE
from extbridge.node.sockets import TAP_SOCKET
from extbridge.spec import fields
from extbridge.spec.errors import CniError

_CONNECT_SECONDS = 5.0
_RETRY_SECONDS = 0.02
_ANSWER_SECONDS = 10.0

# No agent, or one that just ends, or whose queue is full (unix_stream_connect: EAGAIN).
_NOT_THERE = (FileNotFoundError, ConnectionRefusedError, ConnectionResetError, BlockingIOError)


class NoTaps(Exception):
    """The agent cannot be reached, or hands nothing over; the message is its sentence."""


@dataclass(slots=True)
class Tap:
    """One NIC of this pod's VM. It owns its fds, one a queue, and closes them with `close`.

    `vhost_fds` are as many, or none where the node has no vhost-net. The fds are not inheritable:
    a child gets them by `subprocess.Popen(pass_fds=tap.fds)`. `addressing` is what the guest needs
    to speak IP, as far as the network's IPAM plugin or the pod said it.
    """

    name: str
    mac: str
    mtu: int
    fds: list[int]
    vhost_fds: list[int]
    addressing: Addressing

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
        """Close the fds; a second time does nothing."""
        for fds in (self.fds, self.vhost_fds):
            while fds:
                os.close(fds.pop())


def take_taps(ifnames: Sequence[str] = (), *, run: Path | None = None) -> list[Tap]:
    """The taps of the network namespace in which this process stands: all, or those named.

    `run` is the agent's run folder, by default what EXTBRIDGE_RUN names, else /run/extbridge. An
    agent that is just restarting is waited for, 5 s at most. Raises NoTaps.
    """
    folder = run or Path(os.environ.get(RUN_VARIABLE) or DEFAULT_RUN)
    environ = {IFNAMES_VARIABLE: ",".join(ifnames)} if ifnames else {}
    request = wire.encode_request(wire.TAPS, environ, b"")
    deadline = time.monotonic() + _CONNECT_SECONDS
    try:
        while True:
            try:
                return _ask(str(folder / TAP_SOCKET), wire.frame_head(request) + request)
            except _NOT_THERE:
                if time.monotonic() >= deadline:
                    raise
            time.sleep(_RETRY_SECONDS)
    except (OSError, wire.WireError, ValueError, CniError) as error:
        raise NoTaps(f"{folder / TAP_SOCKET}: {error}") from error


def _ask(path: str, request: bytes) -> list[Tap]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as agent:
        agent.settimeout(_ANSWER_SECONDS)
        agent.connect(path)
        # It may have hung up with an answer, or be about to: that is seen by who reads.
        with suppress(BrokenPipeError, ConnectionResetError):
            agent.sendall(request)
        # An agent that ends hangs up on those who wait. To ask again is safe: a holder may.
        if not agent.recv(1, socket.MSG_PEEK):
            raise ConnectionResetError(errno.ECONNRESET, "the agent hung up")
        agent.settimeout(0)
        return _receive_taps(agent)


def _receive_taps(agent: socket.socket) -> list[Tap]:
    by_number: dict[int, int] = {}
    with ExitStack() as closing:
        told = b""
        while not told:
            frame = wire.wait_for_frame(
                agent,
                limit=wire.MAX_TAP_ANSWER_BYTES,
                max_fds=wire.MAX_FDS,
                seconds=_ANSWER_SECONDS,
            )
            closing.callback(frame.close)
            status, numbers, told = wire.decode_tap_answer(frame)
            if status != 0:
                raise NoTaps(told.decode(errors="replace"))
            by_number |= dict(zip(numbers, frame.fds, strict=True))
        (described,) = wire.decode_strings(told)
        taps = [_tap(item, by_number) for item in json.loads(described)]
        closing.pop_all()
        return taps


def _tap(item: object, by_number: dict[int, int]) -> Tap:
    tap = fields.as_object(item, where="tap")
    return Tap(
        name=fields.get_str(tap, "name") or "",
        mac=fields.get_str(tap, "mac") or "",
        mtu=fields.get_int(tap, "mtu") or 0,
        fds=[by_number[number] for number in _numbers(tap, "fds")],
        vhost_fds=[by_number[number] for number in _numbers(tap, "vhostFds")],
        addressing=parse_addressing(fields.get_object(tap, "addressing") or {}),
    )


def _numbers(tap: fields.JsonObject, key: str) -> list[int]:
    return [number for number in fields.get_list(tap, key) or [] if isinstance(number, int)]
