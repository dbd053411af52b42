"""The agent put together: what serves it, and what it serves with."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from functools import partial
from pathlib import Path
from typing import Final, Literal

from extbridge.ledger import Ledger
from extbridge.network.store import DEFAULT_DIRECTORY
from extbridge.node import broker, reconcile, sockets, wire
from extbridge.node.agent import Agent, Services
from extbridge.node.install import install_launcher
from extbridge.node.metrics import Metrics
from extbridge.plugin import verbs
from extbridge.spec import skel

LogFormat = Literal["text", "json"]

_STANDARD: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


def run_agent(run: Path, networks: Path, log_format: LogFormat) -> None:
    """Be the node's agent until SIGTERM."""
    _log_to_stderr(log_format)
    ledger = Ledger(run)
    served = verbs(ledger)
    spool = run / sockets.SPOOL_FOLDER
    metrics = Metrics(
        attachments=lambda: sum(1 for _ in ledger.entries()),
        spooled=lambda: len(reconcile.spooled(spool)),
    )

    def answer(request: wire.Request, netns: int | None) -> skel.Answer:
        return skel.run(request.environ, request.body, served, netns_fd=netns)

    services = Services(
        answer=answer,
        hand_off=partial(broker.hand_off, ledger=ledger),
        release=partial(broker.release, ledger=ledger),
        leases=partial(broker.leases_of, ledger),
        replay_spool=partial(reconcile.replay_spool, spool, served),
        repair=partial(reconcile.repair, ledger),
        reload=lambda: None,
        spool=spool,
    )
    with sockets.listening(run) as listening:
        install_launcher(run / sockets.POD_FOLDER)
        agent = Agent(services, listening, metrics)
        asyncio.run(agent.run(lambda: sockets.notify("READY=1")))
        sockets.notify("STOPPING=1")
