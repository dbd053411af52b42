"""Launchers on tap.sock, from their connection to the taps in their hands.

Who says at once what it wants, as launchers do, is served by the thread that has accepted it. Who
does not is waited for on the event loop, where it keeps nobody; so is who is slow to take its taps,
and who asks from a namespace that has a request under way already: no pod has all the threads.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import (
    AsyncExitStack,
    ExitStack,
    asynccontextmanager,
    closing,
    contextmanager,
    suppress,
)
from dataclasses import dataclass
from typing import Final
from weakref import WeakValueDictionary

from extbridge.node import wire
from extbridge.node.broker import HandOff
from extbridge.node.leases import Leases
from extbridge.node.metrics import Metrics
from extbridge.node.peers import Peer, netns_of, pinned_peer
from extbridge.node.refusals import Crowded, Refusals
from extbridge.spec import skel
from extbridge.spec.errors import CniError

log = logging.getLogger(__name__)

THREADS: Final = 4
"""For those who are served at once, and as many again for those who are waited for."""

OPEN_OF_A_POD: Final = 16
"""Connections of one namespace that are waited for at once; more are closed."""

OPEN: Final = 256
"""Those of all namespaces, of which a pod may be able to make many; then the oldest is closed."""

_AT_ONCE_SECONDS = 0.001
"""A launcher's request follows its connection; the way to the event loop takes a third of this."""

_REFUSED_STATUS = 125

GoOn = Callable[[Coroutine[None, None, None]], object]
"""Runs it on the event loop; called in any thread."""


@dataclass(frozen=True, slots=True)
class _Asking:
    """Who has connected, with as much of its request as has come; `namespace` is an inode."""

    connection: socket.socket
    process: Peer
    namespace: int
    receiving: wire.Receiving


class Launchers:
    """All that are being served; `hand_off` blocks, and is called in threads.

    `chores` are threads for what nobody waits for.
    """

    def __init__(
        self,
        hand_off: Callable[[Peer, wire.Request], HandOff],
        leases: Leases,
        chores: Executor,
        metrics: Metrics,
        refusals: Refusals,
    ) -> None:
        self._hand_off = hand_off
        self._leases = leases
        self._chores = chores
        self._metrics = metrics
        self._refusals = refusals
        self._threads = ThreadPoolExecutor(THREADS, "patient hand-off")
        self._free_threads = asyncio.Semaphore(THREADS)
        self._at_once: set[int] = set()
        self._lock = threading.Lock()
        self._turns: WeakValueDictionary[int, asyncio.Lock] = WeakValueDictionary()
        self._open: dict[asyncio.Timeout, int] = {}

    def close(self) -> None:
        """End the threads, of which none has anything to do any more."""
        self._threads.shutdown()

    def meet(self, go_on: GoOn, connection: socket.socket) -> None:
        """Serve who has connected, in this thread and on the event loop; the connection is ours."""
        with self._refusals.guarded(), ExitStack() as owned:
            owned.enter_context(connection)
            with self._refusing(connection):
                process = owned.enter_context(pinned_peer(connection))
                receiving = owned.enter_context(
                    closing(wire.Receiving(connection, limit=wire.MAX_TAP_REQUEST_BYTES, max_fds=0))
                )
                asking = _Asking(connection, process, netns_of(process.pid), receiving)
                given = self._serve_at_once(asking)
                go_on(self._go_on(asking, given, owned.pop_all()))

    def _serve_at_once(self, asking: _Asking) -> HandOff | None:
        """What is handed over, None if it takes longer to know what, or others are to come first.

        Raises WireError, also for who has hung up by now.
        """
        with self._only_one_of(asking.namespace) as is_only:
            frame = asking.receiving.wait(seconds=_AT_ONCE_SECONDS if is_only else 0)
            if frame is None or not is_only:
                return None
            given = self._take(asking, frame)
        # Not before: as soon as the launcher has its taps, another of the pod may ask.
        _push(given, asking.connection)
        return given

    async def _go_on(self, asking: _Asking, given: HandOff | None, owned: ExitStack) -> None:
        with self._refusals.guarded(), owned, self._refusing(asking.connection):
            await self._finish(asking, given or await self._serve_patiently(asking))

    async def _serve_patiently(self, asking: _Asking) -> HandOff:
        async with AsyncExitStack() as turn:
            async with self._waiting_for(asking, wire.REQUEST_SECONDS) as patience:
                frame = await asking.receiving.finish()
                patience.reschedule(asyncio.get_running_loop().time() + wire.ANSWER_SECONDS)
                turn_of_pod = self._turns.setdefault(asking.namespace, asyncio.Lock())
                await turn.enter_async_context(turn_of_pod)
                await turn.enter_async_context(self._free_threads)
            return await asyncio.get_running_loop().run_in_executor(
                self._threads, self._take_and_push, asking, frame
            )

    def _take_and_push(self, asking: _Asking, frame: wire.Frame) -> HandOff:
        given = self._take(asking, frame)
        _push(given, asking.connection)
        return given

    def _take(self, asking: _Asking, frame: wire.Frame) -> HandOff:
        """Open the taps, in a thread; raises CniError and WireError, and then nothing is open."""
        request = wire.decode_request(frame.payload, wire.TAPS)
        began = time.perf_counter()
        try:
            given = self._hand_off(asking.process, request)
        except OSError as failure:
            raise skel.translate(failure) from failure
        self._metrics.hand_off_duration.observe(time.perf_counter() - began)
        return given

    async def _finish(self, asking: _Asking, given: HandOff) -> None:
        try:
            self._leases.watch(given.lease)
            if not all(frame.done for frame in given.frames):
                async with self._waiting_for(asking, wire.ANSWER_SECONDS):
                    for frame in given.frames:
                        await frame.finish(asking.connection)
            self._metrics.hand_offs.inc(given.taps)
            log.info("taps handed", extra={"pid": given.lease.holder.pid, "taps": given.taps})
        finally:
            # Closed, not left with an error, which would free them: the launcher may have some. If
            # it does not take the others it ends, and its lease with it; or it may ask anew. The
            # last to close a tap waits for a grace period (tap_put_queue): not the event loop.
            await asyncio.get_running_loop().run_in_executor(self._chores, given.owned.close)

    @contextmanager
    def _only_one_of(self, namespace: int) -> Iterator[bool]:
        """Whether no other thread serves one of this namespace, and none does during the block."""
        with self._lock:
            is_only = namespace not in self._at_once
            self._at_once.add(namespace)
        try:
            yield is_only
        finally:
            if is_only:
                with self._lock:
                    self._at_once.remove(namespace)

    @asynccontextmanager
    async def _waiting_for(self, asking: _Asking, seconds: float) -> AsyncIterator[asyncio.Timeout]:
        """Wait in the block, so long at most; raises TimeoutError, and Crowded if others need room.

        The oldest makes room, for a launcher that means well is not long here.
        """
        if sum(it == asking.namespace for it in self._open.values()) >= OPEN_OF_A_POD:
            raise Crowded(f"{OPEN_OF_A_POD} requests of one namespace are open")
        if len(self._open) >= OPEN:
            oldest = next(iter(self._open))
            del self._open[oldest]
            if not oldest.expired():
                oldest.reschedule(0)
        patience = asyncio.timeout(seconds)
        try:
            async with patience:
                self._open[patience] = asking.namespace
                yield patience
        except TimeoutError as late:
            if patience not in self._open:
                raise Crowded(f"{OPEN} requests of pods are open, this one the longest") from late
            raise
        finally:
            self._open.pop(patience, None)

    @contextmanager
    def _refusing(self, connection: socket.socket) -> Iterator[None]:
        """Tell the launcher why it gets nothing, where it is that."""
        try:
            yield
        except CniError as error:
            self._refusals.add(type(error).__name__, str(error))
            # Nothing has been sent before, so there is room for it.
            wire.Sending(wire.encode_tap_refusal(_REFUSED_STATUS, str(error))).push(connection)


def _push(given: HandOff, connection: socket.socket) -> None:
    """Send what the launcher takes at once."""
    # Who has hung up is found out when the rest is sent.
    with suppress(OSError):
        all(frame.push(connection) for frame in given.frames)
