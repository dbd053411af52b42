"""The threads that answer a socket, each a request from its first byte to its last.

The event loop would do too, but to hand a request from thread to thread and back takes as long as a
third of an ADD. So one thread waits for the next request, and the others for its place.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

log = logging.getLogger(__name__)

_OUT_OF_FDS_SECONDS: Final = 0.05
_SETTLE_SECONDS: Final = 0.01


class AnsweringThreads:
    """So many threads that answer who connects, until the block ends; what has begun is finished.

    `answer` gets a non-blocking connection, which is its own to close, and raises nothing.
    """

    def __init__(
        self,
        listening: socket.socket,
        answer: Callable[[socket.socket], None],
        *,
        name: str,
        number: int,
    ) -> None:
        self._listening = listening
        self._answer = answer
        self._place = threading.Lock()
        self._in_flight: set[socket.socket] = set()
        self._threads = [threading.Thread(target=self._run, name=name) for _ in range(number)]
        self._end = os.eventfd(0, os.EFD_CLOEXEC)
        self._waiting = select.poll()
        for fd in (listening.fileno(), self._end):
            self._waiting.register(fd, select.POLLIN)

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
        os.close(self._end)

    def close(self) -> None:
        """Answer nobody who connects from now on, and finish what has begun."""
        os.eventfd_write(self._end, 1)
        for thread in self._threads:
            thread.join()

    @property
    def in_flight(self) -> int:
        """How many connections are being answered."""
        return len(self._in_flight)

    def settle(self) -> None:
        """Wait until those connections are done that are being answered now; others may come."""
        begun = set(self._in_flight)
        while begun & self._in_flight:
            time.sleep(_SETTLE_SECONDS)

    def _run(self) -> None:
        while True:
            with self._place:
                peer = self._accept()
            if peer is None:
                return
            try:
                self._answer(peer)
            finally:
                self._in_flight.discard(peer)

    def _accept(self) -> socket.socket | None:
        """The next connection; None when the block has ended."""
        while all(fd != self._end for fd, _ in self._waiting.poll()):
            try:
                peer, _ = self._listening.accept()
            except OSError as error:
                # Out of fds: those in flight will give some back.
                log.warning("accept: %s", error)
                time.sleep(_OUT_OF_FDS_SECONDS)
                continue
            self._in_flight.add(peer)
            peer.settimeout(0)
            return peer
        return None
