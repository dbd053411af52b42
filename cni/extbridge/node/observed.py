"""The attachments as ledger and kernel show them now, for who reads the metrics."""

from __future__ import annotations

import math
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from extbridge.attachment import opened_namespace
from extbridge.kernel.antispoof import spoof_drops
from extbridge.kernel.links import find_link
from extbridge.kernel.netlink import NETLINK_ROUTE, Netlink
from extbridge.kernel.netns import inside
from extbridge.ledger import Entry, Ledger
from extbridge.network.definition import Antispoof

DROPS_SECONDS: Final = 0.5
"""How long drops are read at a time; whose turn does not come keeps what was read before."""

_FRESH_SECONDS: Final = 5.0
"""Drops that were read so lately are not read again, however many scrapers there are."""

_PAUSE_SECONDS: Final = 0.001

_RECEIVED: Final = "destination"
"""The reason of `spoof_drops` that is not about what the guest sent."""


@dataclass(frozen=True, slots=True)
class Observed:
    """One attachment; `spoofs` are the frames it sent that were dropped, None if that is not known.

    `vm` is the pod that has it, or its container. `guarded` is False where all may pass.
    """

    network: str
    vm: str
    interface: str
    nic: str
    carrier: bool
    guarded: bool
    spoofs: int | None


@dataclass(frozen=True, slots=True)
class _Read:
    when: float
    spoofs: int | None


_NEVER: Final = _Read(-math.inf, None)


class Observer:
    """Looks at the node when asked, in any thread that stands in the node's namespace."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._lock = threading.Lock()
        self._read: dict[tuple[str, str], _Read] = {}

    def __call__(self) -> list[Observed]:
        """Every attachment that is whole; raises OSError where there is no fd to look with."""
        entries = [entry for entry in self._ledger.entries() if entry.done]
        with self._lock:
            self._read_drops([entry for entry in entries if entry.antispoof != Antispoof.OFF])
            read = self._read
        carriers = _carriers({entry.lower_ifindex for entry in entries})
        return [
            Observed(
                network=entry.definition,
                vm=entry.pod or entry.container_id,
                interface=entry.ifname,
                nic=entry.lower,
                carrier=entry.lower_ifindex in carriers,
                guarded=entry.antispoof != Antispoof.OFF,
                spoofs=read.get(_key(entry), _NEVER).spoofs,
            )
            for entry in entries
        ]

    def _read_drops(self, entries: list[Entry]) -> None:
        """Read them anew, those first that were read the longest ago."""
        began = time.monotonic()
        read = {_key(entry): self._read.get(_key(entry), _NEVER) for entry in entries}
        for entry in sorted(entries, key=lambda it: read[_key(it)].when):
            now = time.monotonic()
            if now - began > DROPS_SECONDS or now - read[_key(entry)].when < _FRESH_SECONDS:
                break
            spoofs = _spoofs(entry)
            read[_key(entry)] = _Read(now, read[_key(entry)].spoofs if spoofs is None else spoofs)
            # Nobody waits for this as a runtime does for its ADD: let that have the interpreter.
            time.sleep(_PAUSE_SECONDS)
        # Those that are gone are forgotten with this.
        self._read = read


def _key(entry: Entry) -> tuple[str, str]:
    return entry.container_id, entry.ifname


def _carriers(ifindexes: set[int]) -> set[int]:
    """Those of the NICs that have carrier; one that is down or gone has none."""
    if not ifindexes:
        return set()
    with Netlink(NETLINK_ROUTE) as host:
        links = (find_link(host, ifindex=ifindex) for ifindex in ifindexes)
        return {link.ifindex for link in links if link is not None and link.up and link.carrier}


def _spoofs(entry: Entry) -> int | None:
    # A pod that is just ending.
    with suppress(OSError), opened_namespace(entry) as netns:
        if netns is not None:
            with inside(netns):
                drops = spoof_drops(entry.ifindex)
            return sum(number for reason, number in drops.items() if reason != _RECEIVED)
    return None
