"""The agent: one process on a node that answers the runtime and hands taps to VMs.

One event loop and one task group; whatever enters the kernel runs in threads, because a netlink
delete blocks for 20 ms. CNI requests and hand-offs have threads of their own, so that pods, which
may all ask at once, cannot make the runtime wait; nor does a runtime wait for the event loop. What
the agent serves with is given to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from enum import Enum, auto
from functools import partial
from pathlib import Path
from typing import Final

from extbridge.ledger import Holder
from extbridge.node import broker, wire
from extbridge.node.answering import AnsweringThreads
from extbridge.node.broker import HandOff, Lease, Peer
from extbridge.node.metrics import CONTENT_TYPE, Metrics
from extbridge.node.reconcile import spooled
from extbridge.node.sockets import Sockets
from extbridge.spec import skel
from extbridge.spec.errors import CniError, TryAgainLater
from extbridge.spec.request import Verb

log = logging.getLogger(__name__)

CNI_THREADS: Final = 32
TAP_THREADS: Final = 4

PENDING_TAPS_OF_A_POD: Final = 16
"""Connections on tap.sock that one namespace may have open at once; more are closed."""

PENDING_TAPS: Final = 256
"""Those of all namespaces, of which a pod may be able to make many."""

_AT_ONCE_SECONDS = 0.001
"""A launcher's request follows its connection; the way to the event loop takes a third of this."""

_REFUSED_STATUS = 125
_SPOOL_SECONDS = 1.0
_SPOOL_RETRY_SECONDS = 60.0
_TURN_SECONDS = 0.5
_SCRAPE_BYTES = 8 << 10

_LONGEST_REFUSAL = 300
"""Characters of a sentence that go to the log: of some, a pod chooses the length."""


Serve = Callable[[socket.socket], Coroutine[None, None, None]]
"""Serves a connection on the event loop, to its end."""

GoOn = Callable[[Serve, socket.socket], object]
"""Gives a connection to the event loop, which owns it from then on."""


class Phase(Enum):
    """What the agent is doing."""

    STARTING = auto()
    SERVING = auto()
    DRAINING = auto()


@dataclass(frozen=True, slots=True)
class Services:
    """What the agent serves with; all but `reload` block and are called in threads."""

    answer: Callable[[wire.Request, int | None], skel.Answer]
    hand_off: Callable[[Peer, wire.Request], HandOff]
    release: Callable[[Lease], None]
    leases: Callable[[], list[Lease]]
    replay_spool: Callable[[], int]
    repair: Callable[[], Mapping[str, int]]
    reload: Callable[[], None]
    spool: Path


class Agent:
    """The agent's life, from sockets that listen to the last request answered."""

    def __init__(self, services: Services, sockets: Sockets, metrics: Metrics) -> None:
        self._services = services
        self._sockets = sockets
        self._metrics = metrics
        self._phase = Phase.STARTING
        self._tap_threads = ThreadPoolExecutor(TAP_THREADS, "tap")
        self._adding = threading.Lock()
        self._in_flight: set[asyncio.Task[None]] = set()
        self._pending: Counter[int] = Counter()
        self._leases: dict[Holder, Lease] = {}

    async def run(self, notify: Callable[[str], None]) -> None:
        """Set right what is amiss, serve until SIGTERM, finish what was begun.

        `notify` is told the states of sd_notify(3).
        """
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        loop.add_signal_handler(signal.SIGHUP, self._services.reload)
        with self._tap_threads:
            try:
                await self._reconcile()
                async with asyncio.TaskGroup() as tasks:
                    begin = partial(self._begin, tasks)
                    launchers = partial(
                        self._meet_launcher, partial(loop.call_soon_threadsafe, begin)
                    )
                    servers = [
                        tasks.create_task(self._accept(self._sockets.metrics, begin)),
                        tasks.create_task(self._watch_spool()),
                    ]
                    self._phase = Phase.SERVING
                    with (
                        AnsweringThreads(
                            self._sockets.cni, self._serve_cni, name="cni", number=CNI_THREADS
                        ) as runtimes,
                        AnsweringThreads(
                            self._sockets.taps, launchers, name="taps", number=TAP_THREADS
                        ) as launched,
                    ):
                        notify("READY=1")
                        log.info("serving")
                        await stop.wait()
                        self._phase = Phase.DRAINING
                        notify("STOPPING=1")
                        in_flight = len(self._in_flight) + runtimes.in_flight + launched.in_flight
                        log.info("draining", extra={"in_flight": in_flight})
                        # These may give the event loop something more to do, so they come first.
                        await asyncio.to_thread(launched.settle)
                        if self._in_flight:
                            await asyncio.wait(set(self._in_flight))
                        await asyncio.to_thread(runtimes.settle)
                    for server in servers:
                        server.cancel()
            finally:
                for lease in self._leases.values():
                    loop.remove_reader(lease.pidfd)
                    os.close(lease.pidfd)

    async def _reconcile(self) -> None:
        replayed = await asyncio.to_thread(self._services.replay_spool)
        repairs = dict(await asyncio.to_thread(self._services.repair))
        repairs["spool"] = replayed
        for kind, number in repairs.items():
            self._metrics.repairs.labels(kind).inc(number)
        for lease in await asyncio.to_thread(self._services.leases):
            self._watch_lease(lease)
        log.info("reconciled", extra={"repairs": repairs, "leases": len(self._leases)})

    async def _watch_spool(self) -> None:
        """Serve what a shim spooled while the agent was just starting; what fails, now and then."""
        loop = asyncio.get_running_loop()
        seen: list[Path] = []
        due = 0.0
        while True:
            # Without a free fd the folder cannot be read: as passing as in _accept.
            with contextlib.suppress(OSError):
                waiting = spooled(self._services.spool)
                if waiting and (waiting != seen or loop.time() >= due):
                    served = await asyncio.to_thread(self._services.replay_spool)
                    self._metrics.repairs.labels("spool").inc(served)
                    due = loop.time() + _SPOOL_RETRY_SECONDS
                seen = waiting
            await asyncio.sleep(_SPOOL_SECONDS)

    async def _accept(self, listening: socket.socket, begin: GoOn) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(listening)
            except OSError as error:
                # Out of fds: those in flight will give some back.
                log.warning("accept: %s", error)
                await asyncio.sleep(0.05)
                continue
            begin(self._serve_metrics, connection)
            # As long as connections wait, sock_accept does not: everything else would.
            await asyncio.sleep(0)

    def _begin(self, tasks: asyncio.TaskGroup, serve: Serve, peer: socket.socket) -> None:
        task = tasks.create_task(self._guard(serve, peer))
        self._in_flight.add(task)
        task.add_done_callback(self._in_flight.discard)

    async def _guard(self, serve: Serve, peer: socket.socket) -> None:
        with peer, self._guarded():
            await serve(peer)

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Whatever one connection comes to, the agent goes on."""
        try:
            yield
        except (wire.WireError, TimeoutError, OSError) as error:
            self._refuse("protocol", f"{type(error).__name__}: {error}")
        except Exception:
            log.exception("a defect in serving a connection")

    def _serve_cni(self, peer: socket.socket) -> None:
        with peer, self._guarded():
            if not broker.is_node_root(peer):
                self._refuse("caller", "cni.sock is for root in the node's own network namespace")
                return
            with contextlib.closing(
                wire.wait_for_frame(
                    peer, limit=wire.MAX_CNI_BYTES, max_fds=1, seconds=wire.REQUEST_SECONDS
                )
            ) as frame:
                began = time.perf_counter()
                request = wire.decode_request(frame.payload, wire.CNI)
                answer = self._answer(request, frame.fds[0] if frame.fds else None)
                seconds = time.perf_counter() - began
            payload = wire.encode_cni_answer(answer.exit_code, answer.stdout)
            try:
                peer.settimeout(wire.ANSWER_SECONDS)
                peer.sendall(wire.frame_head(payload) + payload)
            finally:
                # The runtime does not wait for what only we want to know.
                self._account(request, answer, seconds)

    def _answer(self, request: wire.Request, netns: int | None) -> skel.Answer:
        if self._phase is Phase.DRAINING:
            return skel.answer_failure(_draining(), request.body)
        if request.environ.get("CNI_COMMAND") != Verb.ADD:
            return self._services.answer(request, netns)
        # One after the other: at once, their threads do little but take the interpreter from each
        # other, and all of them take twice as long. But one that hangs does not keep the others.
        in_turn = self._adding.acquire(timeout=_TURN_SECONDS)
        try:
            return self._services.answer(request, netns)
        finally:
            if in_turn:
                self._adding.release()

    def _meet_launcher(self, go_on: GoOn, peer: socket.socket) -> None:
        """Serve in this thread who says at once what it wants, as launchers do.

        Who does not is waited for on the event loop, where it keeps nobody; so is who is slow to
        take its taps.
        """
        with contextlib.ExitStack() as closing, self._guarded():
            closing.enter_context(peer)
            serve: Serve = self._wait_for_launcher
            if wire.frame_waits(peer, seconds=_AT_ONCE_SECONDS):
                given = self._serve_at_once(peer)
                if given is None:
                    return
                serve = partial(self._finish_hand_off, given)
            go_on(serve, peer)
            closing.pop_all()

    def _serve_at_once(self, peer: socket.socket) -> HandOff | None:
        try:
            with broker.pinned_peer(peer) as process:
                frame = wire.wait_for_frame(
                    peer, limit=wire.MAX_TAP_REQUEST_BYTES, max_fds=0, seconds=0
                )
                return self._begin_hand_off(peer, process, frame.payload)
        except CniError as error:
            self._refuse_launcher(peer, error)
            return None

    async def _wait_for_launcher(self, peer: socket.socket) -> None:
        try:
            with broker.pinned_peer(peer) as process:
                await self._serve_patiently(peer, process)
        except CniError as error:
            self._refuse_launcher(peer, error)

    async def _serve_patiently(self, peer: socket.socket, process: Peer) -> None:
        namespace = broker.netns_of(process.pid)
        if self._pending[namespace] >= PENDING_TAPS_OF_A_POD:
            self._refuse("flood", f"{PENDING_TAPS_OF_A_POD} requests of one namespace are open")
            return
        if self._pending.total() >= PENDING_TAPS:
            self._refuse("flood", f"{PENDING_TAPS} requests of pods are open")
            return
        self._pending[namespace] += 1
        try:
            async with asyncio.timeout(wire.REQUEST_SECONDS):
                frame = await wire.receive_frame(peer, limit=wire.MAX_TAP_REQUEST_BYTES, max_fds=0)
            given = await asyncio.get_running_loop().run_in_executor(
                self._tap_threads, self._begin_hand_off, peer, process, frame.payload
            )
            await self._finish_hand_off(given, peer)
        finally:
            self._pending[namespace] -= 1
            if not self._pending[namespace]:
                del self._pending[namespace]

    def _refuse_launcher(self, peer: socket.socket, error: CniError) -> None:
        self._refuse(type(error).__name__, str(error))
        # Nothing has been sent before, so there is room for it.
        wire.Sending(wire.encode_tap_refusal(_REFUSED_STATUS, str(error))).push(peer)

    def _begin_hand_off(self, peer: socket.socket, process: Peer, payload: bytes) -> HandOff:
        """Open the taps and send what the launcher takes at once, in a thread.

        Raises CniError and WireError; then nothing has been handed over.
        """
        request = wire.decode_request(payload, wire.TAPS)
        if self._phase is Phase.DRAINING:
            raise _draining()
        began = time.perf_counter()
        try:
            given = self._services.hand_off(process, request)
        except OSError as failure:
            raise skel.translate(failure) from failure
        self._metrics.hand_off_duration.observe(time.perf_counter() - began)
        # Who has hung up is found out when the rest is sent.
        with contextlib.suppress(OSError):
            all(frame.push(peer) for frame in given.frames)
        return given

    async def _finish_hand_off(self, given: HandOff, peer: socket.socket) -> None:
        self._watch_lease(given.lease)
        try:
            async with asyncio.timeout(wire.ANSWER_SECONDS):
                for frame in given.frames:
                    await frame.finish(peer)
        finally:
            # Closed, not left with an error, which would free them: the launcher may have some. If
            # it does not take the others it ends, and its lease with it; or it may ask anew. The
            # last to close a tap waits for a grace period (tap_put_queue): not the event loop.
            await asyncio.get_running_loop().run_in_executor(self._tap_threads, given.owned.close)
            self._metrics.hand_offs.inc(given.taps)
            log.info("taps handed", extra={"pid": given.lease.holder.pid, "taps": given.taps})

    async def _serve_metrics(self, peer: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(wire.REQUEST_SECONDS):
            asked = b""
            while b"\r\n\r\n" not in asked and len(asked) < _SCRAPE_BYTES:
                more = await loop.sock_recv(peer, _SCRAPE_BYTES)
                if not more:
                    return
                asked += more
        body = await loop.run_in_executor(self._tap_threads, self._metrics.render)
        head = f"HTTP/1.0 200 OK\r\nContent-Type: {CONTENT_TYPE}\r\nContent-Length: {len(body)}"
        async with asyncio.timeout(wire.ANSWER_SECONDS):
            await loop.sock_sendall(peer, head.encode() + b"\r\n\r\n" + body)

    def _watch_lease(self, lease: Lease) -> None:
        former = self._leases.get(lease.holder)
        if former is not None:
            os.close(lease.pidfd)
            lease = replace(former, container_ids=former.container_ids | lease.container_ids)
        else:
            # Readable from the end of its process on (man 2 pidfd_open).
            asyncio.get_running_loop().add_reader(lease.pidfd, self._end_lease, lease.holder)
        self._leases[lease.holder] = lease
        self._metrics.leases.set(len(self._leases))

    def _end_lease(self, holder: Holder) -> None:
        lease = self._leases.pop(holder)
        loop = asyncio.get_running_loop()
        loop.remove_reader(lease.pidfd)
        os.close(lease.pidfd)
        self._metrics.leases.set(len(self._leases))
        log.info("lease ended", extra={"pid": holder.pid})
        # Nobody waits for it: who asks for the tap meanwhile sees that its holder is dead.
        self._tap_threads.submit(self._release, lease)

    def _release(self, lease: Lease) -> None:
        try:
            self._services.release(lease)
        except (CniError, OSError) as error:
            log.warning("lease of process %d: %s", lease.holder.pid, error)

    def _account(self, request: wire.Request, answer: skel.Answer, seconds: float) -> None:
        asked = request.environ.get("CNI_COMMAND", "")
        verb = asked if asked in list(Verb) else "other"
        self._metrics.requests.labels(verb, str(answer.code)).inc()
        self._metrics.duration.labels(verb).observe(seconds)
        about = {
            "container": request.environ.get("CNI_CONTAINERID", ""),
            "ifname": request.environ.get("CNI_IFNAME", ""),
            "code": answer.code,
            "ms": round(seconds * 1000, 2),
        }
        if answer.code:
            log.warning("%s failed: %s", verb, answer.stdout.decode().strip(), extra=about)
        else:
            log.info(verb, extra=about)
        if answer.stderr:
            log.error("%s", answer.stderr)

    def _refuse(self, reason: str, sentence: str) -> None:
        self._metrics.refusals.labels(reason).inc()
        # What does not print would let a pod write lines of its own.
        shown = "".join(it if it.isprintable() else "?" for it in sentence[:_LONGEST_REFUSAL])
        log.warning("refused: %s", shown, extra={"reason": reason})


def _draining() -> TryAgainLater:
    return TryAgainLater("the agent is about to stop", "its successor will answer")
