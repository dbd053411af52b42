"""The agent put together: what serves it, and what it serves with."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final, Protocol

from extbridge.handoff import free_taps
from extbridge.inventory import list_attachments, list_defined, show_attachments
from extbridge.kernel.checksums import loaded_program
from extbridge.ledger import Ledger
from extbridge.network.wanted import FindPod
from extbridge.node import broker, reconcile, sockets, wire
from extbridge.node.agent import Agent, Companion, Services
from extbridge.node.definitions import read_networks, report_networks
from extbridge.node.install import LAUNCHER, install_launcher
from extbridge.node.metrics import Metrics
from extbridge.node.observed import Observer
from extbridge.node.scrape import Page
from extbridge.plugin import Node, verbs
from extbridge.reservations import Reservations
from extbridge.spec import skel
from extbridge.spec.errors import NotPermitted

log = logging.getLogger(__name__)

_STANDARD: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


class Cluster(Companion, Protocol):
    """What of Kubernetes the agent works with: network.wanted.FindPod, and who observes."""

    @property
    def find_pod(self) -> FindPod: ...
    def observe(self, request: wire.Request, answer: skel.Answer, /) -> None: ...


def run_agent(
    run: Path,
    networks_dir: str,
    *,
    as_json: bool,
    host_process: int | None = None,
    reservations: Reservations | None = None,
    companions: Sequence[Callable[[Metrics], Companion]] = (),
    cluster: Callable[[Ledger, Metrics], Cluster] | None = None,
    metrics_address: sockets.Address | None = None,
) -> None:
    """Be the node's agent until SIGTERM; of `host_process` and `reservations` see plugin.Node.

    Each of `companions` makes one that lives as long as the agent serves; `cluster` makes what
    there is of one, and may raise CniError.
    """
    if os.geteuid() != 0:
        raise NotPermitted("the agent is not root", "run it as root with all capabilities")
    _log_to_stderr(as_json=as_json)
    # A NIC of 256 queues alone is twice as many fds.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    ledger = Ledger(run)
    spool = run / sockets.SPOOL_FOLDER
    metrics = Metrics(
        observe=Observer(ledger),
        spooled=lambda: len(reconcile.spooled(spool)),
        broken=lambda: read_networks(networks_dir)[1],
    )

    joined = cluster(ledger, metrics) if cluster is not None else None
    find_pod = joined.find_pod if joined is not None else None
    served = verbs(Node(ledger, networks_dir, host_process, reservations, find_pod))

    def answer(request: wire.Request, netns: int | None) -> skel.Answer:
        return skel.run(
            request.environ, request.body, served, netns_fd=netns, request_id=request.id
        )

    def release(lease: broker.Lease) -> None:
        free_taps(lease.holder, lease.container_ids, ledger=ledger)

    services = Services(
        answer=answer,
        hand_off=partial(broker.hand_off, ledger=ledger),
        release=release,
        leases=partial(broker.leases_of, ledger),
        replay_spool=partial(reconcile.replay_spool, spool, served, ledger),
        repair=partial(reconcile.repair, ledger, host_process),
        reload=partial(report_networks, networks_dir),
        page=partial(_page, ledger, networks_dir),
        spool=spool,
        observe=joined.observe if joined is not None else None,
    )
    report_networks(networks_dir)
    try:
        loaded_program()
    except OSError as error:
        log.warning("this node cannot do antispoof, only antispoof: off: %s", error)
    with sockets.listening(run, metrics_address) as listening:
        pod = run / sockets.POD_FOLDER
        install_launcher(pod)
        sockets.label_for_containers(pod, run / sockets.TAP_SOCKET, pod / LAUNCHER)
        made = [make(metrics) for make in companions]
        if joined is not None:
            made.append(joined)
        agent = Agent(services, listening, metrics, made)
        asyncio.run(agent.run(sockets.notify))


def _page(ledger: Ledger, networks_dir: str, path: str) -> Page | None:
    """What the command line asks for (inventory), as JSON."""
    match path.split("/", 2)[1:]:
        case ["attachments"]:
            told = list_attachments(ledger)
        case ["attachments", key]:
            told = show_attachments(ledger, key)
        case ["networks"]:
            told = list_defined(ledger, networks_dir)
        case _:
            return None
    return Page("application/json", json.dumps(told).encode())


def _log_to_stderr(*, as_json: bool) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if as_json else _TextFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def _extras(record: logging.LogRecord) -> dict[str, object]:
    return {key: value for key, value in vars(record).items() if key not in _STANDARD}


class _TextFormatter(logging.Formatter):
    """Message first, then what belongs to it as key=value; the time is the journal's to add."""

    def format(self, record: logging.LogRecord) -> str:
        extras = (f"{key}={_shown(value)}" for key, value in _extras(record).items())
        return f"{record.levelname.lower()}: {' '.join((super().format(record), *extras))}"


def _shown(value: object) -> str:
    """The value in one word of what prints: JSON, where it is none as it is."""
    text = str(value)
    return text if text.isprintable() and not set(text) & set(' "=') else json.dumps(text)


class _JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        told = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": record.levelname.lower(),
            "message": super().format(record),
            **_extras(record),
        }
        return json.dumps(told, default=str)
