"""What a starting agent finds, set right before it serves anything.

DELs that came while no agent was there wait in the spool. An intent in the ledger is the trace of
an ADD that was killed. A finished entry whose device node is gone has no link any more: nodes are
the kernel's, and seen from every namespace.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from extbridge.attachment import detach_wherever
from extbridge.kernel.taps import has_node
from extbridge.ledger import Entry, Ledger
from extbridge.node import wire
from extbridge.spec import skel
from extbridge.spec.errors import CniError

log = logging.getLogger(__name__)


def spooled(spool: Path) -> list[Path]:
    """The requests that wait, oldest first; drafts, which start with a dot, are not there yet."""
    with suppress(FileNotFoundError):
        waiting = (path for path in spool.iterdir() if not path.name.startswith("."))
        return sorted(waiting, key=lambda path: path.stat().st_mtime_ns)
    return []


def replay_spool(spool: Path, verbs: skel.Verbs) -> int:
    """Serve the DELs in the spool; how many. One that fails stays for the next time."""
    served = 0
    for path in spooled(spool):
        try:
            request = wire.decode_request(path.read_bytes(), wire.CNI)
        except wire.WireError as error:
            log.warning("spool: %s is no request and is dropped: %s", path.name, error)
            path.unlink()
            continue
        if request.environ.get("CNI_COMMAND") != "DEL":
            log.warning("spool: %s is no DEL and is dropped", path.name)
            path.unlink()
            continue
        answer = skel.run(request.environ, request.body, verbs)
        if answer.exit_code != 0:
            log.error("spool: DEL of %s failed: %s", path.name, answer.stdout.decode())
            continue
        path.unlink()
        served += 1
    return served


def repair(ledger: Ledger) -> Mapping[str, int]:
    """Set the ledger right by what the kernel has; how much of each kind was amiss."""
    repairs: Counter[str] = Counter()
    for entry in list(ledger.entries()):
        kind = _ailment(entry)
        if not kind:
            continue
        try:
            with ledger.hold(entry.container_id) as held:
                if entry not in held.entries():
                    continue
                if kind == "holder":
                    held.write(replace(entry, holder=None))
                else:
                    detach_wherever(entry, held=held)
        except (OSError, CniError) as error:
            log.error("%s of %s: %s", entry.ifname, entry.container_id, error)  # noqa: TRY400 - one line, the others go on
            continue
        repairs[kind] += 1
    return repairs


def _ailment(entry: Entry) -> str:
    if not entry.done:
        return "intent"
    if not has_node(entry.ifindex):
        return "link"
    if entry.holder is not None and not entry.holder.alive():
        return "holder"
    return ""
