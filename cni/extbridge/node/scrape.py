"""The metrics' sockets: HTTP as far as a scraper and the command line need it."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote

from extbridge.node import wire

log = logging.getLogger(__name__)

_REQUEST_BYTES: Final = 8 << 10
_OUT_OF_FDS_SECONDS: Final = 0.05

_AT_ONCE: Final = 8
"""Connections of one socket that are served at once; others wait in its queue."""


@dataclass(frozen=True, slots=True)
class Page:
    """What is sent to who asks for a path."""

    content_type: str
    body: bytes


async def accept_scrapers(
    listening: socket.socket,
    serve: Callable[[socket.socket], Coroutine[None, None, None]],
    begin: Callable[[Coroutine[None, None, None]], None],
) -> None:
    """Have each connection served, which is `serve`'s from then on; never ends."""
    loop = asyncio.get_running_loop()
    places = asyncio.Semaphore(_AT_ONCE)

    async def serve_and_leave(connection: socket.socket) -> None:
        try:
            await serve(connection)
        finally:
            places.release()

    while True:
        await places.acquire()
        try:
            connection, _ = await loop.sock_accept(listening)
        except OSError as error:
            # Out of fds: those in flight will give some back.
            places.release()
            log.warning("accept: %s", error)
            await asyncio.sleep(_OUT_OF_FDS_SECONDS)
            continue
        begin(serve_and_leave(connection))
        # As long as connections wait, sock_accept does not: everything else would.
        await asyncio.sleep(0)


async def serve_scraper(
    connection: socket.socket, page: Callable[[str], Page], threads: Executor
) -> None:
    """Answer one request; `page` is called in a thread. Raises TimeoutError, OSError."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(wire.REQUEST_SECONDS):
        asked = b""
        while b"\r\n\r\n" not in asked and len(asked) < _REQUEST_BYTES:
            more = await loop.sock_recv(connection, _REQUEST_BYTES)
            if not more:
                return
            asked += more
    # GET, the path, HTTP/1.1
    path = asked.partition(b" ")[2].partition(b" ")[0].decode(errors="replace")
    told = await loop.run_in_executor(threads, page, unquote(path))
    head = f"HTTP/1.0 200 OK\r\nContent-Type: {told.content_type}\r\n"
    head += f"Content-Length: {len(told.body)}\r\n\r\n"
    async with asyncio.timeout(wire.ANSWER_SECONDS):
        await loop.sock_sendall(connection, head.encode() + told.body)
