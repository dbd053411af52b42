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
import signal
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from enum import Enum, auto
from functools import partial
from pathlib import Path
from typing import Final, Protocol

from extbridge.node import wire
from extbridge.node.answering import AnsweringThreads
from extbridge.node.broker import HandOff, Lease
from extbridge.node.launchers import THREADS as HAND_OFF_THREADS
from extbridge.node.launchers import Launchers
from extbridge.node.leases import Leases
from extbridge.node.metrics import CONTENT_TYPE, Metrics
from extbridge.node.peers import Peer, is_node_root
from extbridge.node.reconcile import spooled
from extbridge.node.refusals import Refusals
from extbridge.node.scrape import Page, accept_scrapers, serve_scraper
from extbridge.node.sockets import Sockets
from extbridge.spec import skel
from extbridge.spec.errors import CniError, PluginNotAvailable, TryAgainLater
from extbridge.spec.request import Verb

log = logging.getLogger(__name__)

CNI_THREADS: Final = 32
CHORE_THREADS: Final = 4

_SPOOL_SECONDS = 1.0
_SPOOL_RETRY_SECONDS = 60.0
_TURN_SECONDS = 0.5


class Phase(Enum):
    """What the agent is doing."""

    STARTING = auto()
    SERVING = auto()
    DRAINING = auto()


@dataclass(frozen=True, slots=True)
class Services:
    """What the agent serves with; all but `reload` and `observe` block and are called in threads.

    `observe` is told, by the request's thread, what a runtime was answered. `page` is what the
    metrics' socket has at a path, None where there is nothing but metrics. `replay_spool` and
    `repair` are given what says whether to leave the rest to the next agent.
    """

    answer: Callable[[wire.Request, int | None], skel.Answer]
    hand_off: Callable[[Peer, wire.Request], HandOff]
    release: Callable[[Lease], None]
    leases: Callable[[], list[Lease]]
    replay_spool: Callable[[Callable[[], bool]], int]
    repair: Callable[[Callable[[], bool]], Mapping[str, int]]
    reload: Callable[[], None]
    page: Callable[[str], Page | None]
    spool: Path
    observe: Callable[[wire.Request, skel.Answer], None] | None = None


class Companion(Protocol):
    """What lives beside the agent as long as it serves, in threads of its own."""

    def start(self) -> None:
        """Begin. The agent serves only afterwards, so nothing outside of the node is waited for."""

    def stop(self) -> None:
        """End, and return when that is done."""


class Agent:
    """The agent's life, from sockets that listen to the last request answered."""

    def __init__(
        self,
        services: Services,
        sockets: Sockets,
        metrics: Metrics,
        companions: Sequence[Companion] = (),
    ) -> None:
        self._services = services
        self._sockets = sockets
        self._metrics = metrics
        self._companions = companions
        self._refusals = Refusals(metrics)
        self._phase = Phase.STARTING
        self._chores = ThreadPoolExecutor(CHORE_THREADS, "chore")
        self._adding = threading.Lock()
        self._in_flight: set[asyncio.Task[None]] = set()

    async def run(self, notify: Callable[[str], None]) -> None:
        """Set right what is amiss, serve until SIGTERM, finish what was begun.

        `notify` is told the states of sd_notify(3).
        """
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        loop.add_signal_handler(signal.SIGHUP, self._services.reload)
        with contextlib.ExitStack() as closing:
            closing.enter_context(self._chores)
            leases = Leases(self._services.release, self._chores, self._metrics)
            closing.callback(leases.close)
            launchers = Launchers(
                self._services.hand_off, leases, self._chores, self._metrics, self._refusals
            )
            closing.callback(launchers.close)
            await self._reconcile(leases, stop)
            for companion in self._companions:
                companion.start()
                closing.callback(companion.stop)
            if not stop.is_set():
                await self._serve(launchers, stop, notify)

    async def _serve(
        self, launchers: Launchers, stop: asyncio.Event, notify: Callable[[str], None]
    ) -> None:
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as tasks:
            begin = partial(self._begin, tasks)
            go_on = partial(loop.call_soon_threadsafe, begin)
            served: list[tuple[socket.socket, Callable[[str], Page]]] = [
                (self._sockets.metrics, self._page)
            ]
            if self._sockets.scraped is not None:
                served.append((self._sockets.scraped, self._metrics_page))
            background = [
                tasks.create_task(accept_scrapers(listening, partial(self._scraped, page), begin))
                for listening, page in served
            ]
            background.append(tasks.create_task(self._watch_spool(stop)))
            self._phase = Phase.SERVING
            with AnsweringThreads(
                self._sockets.cni, self._serve_cni, name="cni", number=CNI_THREADS
            ) as runtimes:
                with AnsweringThreads(
                    self._sockets.taps,
                    partial(launchers.meet, go_on),
                    name="hand-off",
                    number=HAND_OFF_THREADS,
                ) as launched:
                    notify("READY=1")
                    log.info("serving")
                    await stop.wait()
                    self._phase = Phase.DRAINING
                    notify("STOPPING=1")
                    in_flight = len(self._in_flight) + runtimes.in_flight + launched.in_flight
                    log.info("draining", extra={"in_flight": in_flight})
                    # These may give the event loop something more to do, so they come first. Who
                    # connects from now on waits in the queue, for the next agent or to try anew.
                    await asyncio.to_thread(launched.close)
                if self._in_flight:
                    await asyncio.wait(set(self._in_flight))
                await asyncio.to_thread(runtimes.settle)
            for task in background:
                task.cancel()

    async def _reconcile(self, leases: Leases, stop: asyncio.Event) -> None:
        replayed = await asyncio.to_thread(self._services.replay_spool, stop.is_set)
        repairs = dict(await asyncio.to_thread(self._services.repair, stop.is_set))
        repairs["spool"] = replayed
        for kind, number in repairs.items():
            self._metrics.repairs.labels(kind).inc(number)
        for lease in await asyncio.to_thread(self._services.leases):
            leases.watch(lease)
        log.info("reconciled", extra={"repairs": repairs, "leases": len(leases)})

    async def _watch_spool(self, stop: asyncio.Event) -> None:
        """Serve what a shim spooled while the agent was just starting; what fails, now and then."""
        loop = asyncio.get_running_loop()
        seen: list[Path] = []
        due = 0.0
        while True:
            # Without a free fd the folder cannot be read: it passes.
            with contextlib.suppress(OSError):
                waiting = spooled(self._services.spool)
                if waiting and (waiting != seen or loop.time() >= due):
                    served = await asyncio.to_thread(self._services.replay_spool, stop.is_set)
                    self._metrics.repairs.labels("spool").inc(served)
                    due = loop.time() + _SPOOL_RETRY_SECONDS
                seen = waiting
            await asyncio.sleep(_SPOOL_SECONDS)

    def _begin(self, tasks: asyncio.TaskGroup, serving: Coroutine[None, None, None]) -> None:
        task = tasks.create_task(serving)
        self._in_flight.add(task)
        task.add_done_callback(self._in_flight.discard)

    async def _scraped(self, page: Callable[[str], Page], peer: socket.socket) -> None:
        with peer, self._refusals.guarded():
            await serve_scraper(peer, page, self._chores)

    def _page(self, path: str) -> Page:
        return self._services.page(path) or self._metrics_page(path)

    def _metrics_page(self, _: str) -> Page:
        return Page(CONTENT_TYPE, self._metrics.render())

    def _serve_cni(self, peer: socket.socket) -> None:
        with peer, self._refusals.guarded():
            if not is_node_root(peer):
                self._refusals.add(
                    "caller", "cni.sock is for root in the node's own network namespace"
                )
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
                if self._services.observe is not None:
                    self._services.observe(request, answer)

    def _answer(self, request: wire.Request, netns: int | None) -> skel.Answer:
        verb = request.environ.get("CNI_COMMAND")
        # A DEL is never told to come again: runtimes give up on it.
        if self._phase is Phase.DRAINING and verb != Verb.DEL:
            return skel.answer_failure(_draining(verb), request.body, request.id)
        if verb != Verb.ADD:
            return self._services.answer(request, netns)
        began = time.perf_counter()
        # One after the other: at once, their threads do little but take the interpreter from each
        # other, and all of them take twice as long. But one that hangs does not keep the others.
        in_turn = self._adding.acquire(timeout=_TURN_SECONDS)
        turn = (time.perf_counter() - began) * 1000
        try:
            answer = self._services.answer(request, netns)
        finally:
            if in_turn:
                self._adding.release()
        return replace(answer, steps={"turn": turn, **answer.steps})

    def _account(self, request: wire.Request, answer: skel.Answer, seconds: float) -> None:
        asked = request.environ.get("CNI_COMMAND", "")
        verb = asked if asked in list(Verb) else "other"
        self._metrics.requests.labels(verb, str(answer.code)).inc()
        self._metrics.duration.labels(verb).observe(seconds)
        if verb == Verb.ADD:
            outcome = "failed" if answer.code else "done"
            self._metrics.last_add.labels(outcome).set_to_current_time()
        about = {
            "container": request.environ.get("CNI_CONTAINERID", ""),
            "ifname": request.environ.get("CNI_IFNAME", ""),
            "request": request.id,
            "code": answer.code,
            "ms": round(seconds * 1000, 2),
            **{f"{step}_ms": round(ms, 2) for step, ms in answer.steps.items()},
            **answer.notes,
        }
        if answer.code:
            log.warning("%s failed: %s", verb, answer.stdout.decode().strip(), extra=about)
        else:
            log.info(verb, extra=about)
        if answer.stderr:
            log.error("request %s: %s", request.id, answer.stderr)


def _draining(verb: str | None) -> CniError:
    kind = PluginNotAvailable if verb == Verb.STATUS else TryAgainLater
    return kind("the agent is about to stop", "its successor will answer")
