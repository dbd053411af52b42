"""What a starting agent finds, set right before it serves anything.

DELs that came while no agent was there wait in the spool. An intent in the ledger is the trace of
an ADD that was killed. A finished entry whose device node is gone has no link any more: nodes are
the kernel's, and seen from every namespace.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from extbridge.attachment import detach_wherever, opened_namespace
from extbridge.kernel.netns import netns_inode, opened_netns
from extbridge.kernel.taps import has_node
from extbridge.ledger import Entry, Ledger
from extbridge.node import wire
from extbridge.spec import skel
from extbridge.spec.errors import CniError
from extbridge.spec.request import find_name_fault

log = logging.getLogger(__name__)


def spooled(spool: Path) -> list[Path]:
    """The requests that wait, oldest first; drafts, which start with a dot, are not there yet."""
    with suppress(FileNotFoundError):
        waiting = (path for path in spool.iterdir() if not path.name.startswith("."))
        return sorted(waiting, key=lambda path: path.stat().st_mtime_ns)
    return []


def replay_spool(
    spool: Path, verbs: skel.Verbs, ledger: Ledger, is_stopping: Callable[[], bool]
) -> int:
    """Serve the DELs in the spool; how many. What cannot be done now stays for the next time."""
    served = 0
    for path in spooled(spool):
        if is_stopping():
            break
        try:
            served += _replay(path, verbs, ledger)
        except OSError as error:
            log.error("spool: %s", error)  # noqa: TRY400 - one line, the others go on
    return served


def repair(
    ledger: Ledger, host_process: int | None, is_stopping: Callable[[], bool]
) -> Mapping[str, int]:
    """Set the ledger right by what the kernel has; how much of each kind was amiss.

    What an IPAM plugin, run as `host_process` says (ipam), gave to what is gone is released.
    """
    repairs: Counter[str] = Counter()
    for container_id in ledger.containers():
        if is_stopping():
            break
        try:
            # An ADD that was killed early has left a folder, which goes with its lock.
            with ledger.hold(container_id) as held:
                for entry in held.entries():
                    kind = _ailment(entry)
                    if kind == "holder":
                        held.write(replace(entry, holder=None))
                    elif kind:
                        detach_wherever(entry, held=held, host_process=host_process)
                    repairs[kind] += bool(kind)
        except (OSError, CniError) as error:
            log.error("container %s: %s", container_id, error)  # noqa: TRY400 - likewise
    return +repairs


def _replay(path: Path, verbs: skel.Verbs, ledger: Ledger) -> bool:
    """Whether the file was a DEL that is done."""
    payload = path.read_bytes()
    try:
        request = wire.decode_request(payload, wire.CNI)
    except wire.WireError as error:
        if payload.startswith(wire.MARK):
            # After an upgrade that was taken back, it is the later agent's.
            log.warning("spool: %s is kept for another version: %s", path.name, error)
            return False
        log.warning("spool: %s is no request and is dropped: %s", path.name, error)
        path.unlink()
        return False
    if request.environ.get("CNI_COMMAND") != "DEL":
        log.warning("spool: %s is no DEL and is dropped", path.name)
        path.unlink()
        return False
    if _is_out_of_reach(request.environ, ledger):
        log.warning("spool: DEL of %s waits for its namespace to be seen, or to end", path.name)
        return False
    answer = skel.run(request.environ, request.body, verbs)
    if answer.exit_code != 0:
        log.error("spool: DEL of %s failed: %s", path.name, answer.stdout.decode().strip())
        return False
    path.unlink()
    return True


def _is_out_of_reach(environ: Mapping[str, str], ledger: Ledger) -> bool:
    """Whether a link is there that DEL could not get at now: it succeeds all the same."""
    container_id = environ.get("CNI_CONTAINERID", "")
    if find_name_fault(container_id):
        return False
    return any(
        entry.cni_ifname == environ.get("CNI_IFNAME")
        and has_node(entry.ifindex)
        and not _can_reach(entry)
        and not _is_at(entry, environ.get("CNI_NETNS", ""))
        for entry in ledger.of(container_id)
    )


def _ailment(entry: Entry) -> str:
    if not has_node(entry.ifindex):
        return "link" if entry.done else "intent"
    if not entry.done:
        # Left to DEL, which brings the namespace, where an agent's container cannot see it.
        return "intent" if _can_reach(entry) else ""
    if entry.holder is not None and not entry.holder.alive():
        return "holder"
    return ""


def _can_reach(entry: Entry) -> bool:
    with opened_namespace(entry) as netns:
        return netns is not None


def _is_at(entry: Entry, path: str) -> bool:
    with opened_netns(path) as netns:
        return netns is not None and netns_inode(netns) == entry.netns_inode
