"""What there is on this node, for a person to read: attachments, networks and their NICs.

It is the ledger's word, seen against the kernel, as JSON objects: the agent sends them to whoever
asks it, and they are the same where there is no agent. Nothing here changes anything, and what is
amiss does not fail it: it is what somebody wants to see.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeAlias

from extbridge.attachment import Pod, differences, opened_namespace, opened_pod
from extbridge.kernel.antispoof import spoof_drops
from extbridge.kernel.links import Counters, Link, count_our_links
from extbridge.kernel.netlink import NETLINK_ROUTE, Netlink
from extbridge.kernel.netns import inside
from extbridge.kernel.taps import has_node
from extbridge.ledger import Entry, Holder, Ledger
from extbridge.network.addresses import addressing_to_object
from extbridge.network.definition import Antispoof, Mode, Network
from extbridge.network.store import list_networks, load_network
from extbridge.nics import judged_nics, usable_nics
from extbridge.spec.errors import CniError
from extbridge.spec.fields import printable

Told: TypeAlias = Mapping[str, Any]
"""A JSON object: an attachment, or a network."""


def list_attachments(ledger: Ledger) -> list[Told]:
    """Every attachment of the node, by pod and interface.

    Raises OSError where the ledger cannot be read; of a namespace that cannot be seen from here
    (its path is another mount namespace's), `state` says so.
    """
    return [_told(entry, seen) for entry, seen in _seen(ledger.entries())]


def show_attachments(ledger: Ledger, key: str) -> list[Told]:
    """Those that `key` means, with what CHECK would say of each in `differences`.

    It is a pod (namespace/name, or its name alone), an interface, a MAC, a device's number, or the
    beginning of a container ID. Raises OSError likewise.
    """
    meant = [entry for entry in ledger.entries() if _is_meant(entry, key)]
    with Netlink(NETLINK_ROUTE) as host:
        return [
            {**_told(entry, seen), "differences": _differences(entry, host)}
            for entry, seen in _seen(meant)
        ]


def list_defined(ledger: Ledger, directory: str) -> list[Told]:
    """Every network that the folder defines, with its NICs, or with what is wrong with it.

    `free` is how many VMs it can take still, where that is limited. Raises OSError.
    """
    with Netlink(NETLINK_ROUTE) as host:
        return [_defined(name, directory, host, ledger) for name in list_networks(directory)]


class _Seen:
    """An attachment as the kernel has it, for as long as its namespace is open."""

    def __init__(self, pod: Pod | None, link: Link | None, counters: Counters | None) -> None:
        self.pod = pod
        self.link = link
        self.counters = counters


def _seen(entries: Iterable[Entry]) -> Iterator[tuple[Entry, _Seen]]:
    """Each with what is seen of it, ordered; a namespace is entered once for all that are in it."""
    by_namespace: defaultdict[tuple[str, int], list[Entry]] = defaultdict(list)
    for entry in sorted(entries, key=lambda it: (it.pod, it.container_id, it.ifname)):
        by_namespace[entry.netns, entry.netns_inode].append(entry)
    for those in by_namespace.values():
        with ExitStack() as closing:
            # Whoever holds one of its taps may lead there.
            held = next((it for it in those if it.holder is not None), those[0])
            netns = closing.enter_context(opened_namespace(held))
            if netns is None:
                yield from ((entry, _Seen(None, None, None)) for entry in those)
                continue
            pod = closing.enter_context(opened_pod(netns))
            found = {link.ifindex: (link, it) for link, it in count_our_links(pod.route)}
            for entry in those:
                link, counters = found.get(entry.ifindex, (None, None))
                yield entry, _Seen(pod, link, counters)


def _told(entry: Entry, seen: _Seen) -> Told:
    addressing = entry.addressing
    told = {} if addressing is None else addressing_to_object(addressing)
    drops: Mapping[str, int] = {}
    if seen.pod is not None and seen.link is not None and entry.antispoof != Antispoof.OFF:
        # Of a pod that is just ending there is nothing to read.
        with suppress(OSError), inside(seen.pod.netns):
            drops = spoof_drops(entry.ifindex)
    return {
        "pod": entry.pod,
        "container": entry.container_id,
        "interface": entry.ifname,
        "state": _state(entry, seen),
        "network": entry.definition,
        "configuration": entry.network,
        "requestedAs": entry.cni_ifname,
        "mode": str(entry.mode),
        "nic": entry.lower,
        "mac": entry.mac,
        "ips": [] if addressing is None else [it.address for it in addressing.addresses],
        "routes": told.get("routes") or [],
        "dns": told.get("dns") or {},
        "mtu": entry.mtu,
        "queues": entry.queues,
        "antispoof": str(entry.antispoof),
        "bandwidth": None if entry.bandwidth is None else asdict(entry.bandwidth),
        "handoff": str(entry.handoff),
        "ifindex": entry.ifindex,
        "device": f"/dev/tap{entry.ifindex}",
        "netns": entry.netns,
        "holder": None if entry.holder is None else _holder(entry.holder),
        "counters": None if seen.counters is None else asdict(seen.counters),
        "drops": dict(drops),
    }


def _state(entry: Entry, seen: _Seen) -> str:
    """One word or two: what a VM that looks at its NIC would see."""
    if not entry.done:
        return "half made"
    if not has_node(entry.ifindex) or (seen.pod is not None and seen.link is None):
        return "gone"
    if seen.link is None:
        return "out of sight"
    if not seen.link.up:
        return "down"
    if not seen.link.carrier:
        return "no carrier"
    if entry.holder is not None and entry.holder.alive():
        return "in use"
    return "ready"


def _holder(holder: Holder) -> Told:
    """The process; without a command where it has ended."""
    started = _booted() + holder.started / os.sysconf("SC_CLK_TCK")
    since = datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds")
    return {"pid": holder.pid, "command": command_of(holder), "since": since}


def command_of(holder: Holder) -> str:
    """The command that the process runs, as it says itself; empty where it has ended."""
    try:
        if not holder.alive():
            return ""
        argv = Path(f"/proc/{holder.pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return ""
    return printable(os.path.basename(argv[0].decode(errors="replace")))


def _booted() -> int:
    """When the machine started, in seconds of the epoch (man 5 proc, /proc/stat)."""
    lines = Path("/proc/stat").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("btime"))


def _differences(entry: Entry, host: Netlink) -> list[str]:
    with opened_namespace(entry) as netns:
        if netns is None:
            return [f"{entry.ifname}: its namespace is not at {entry.netns}, seen from here"]
        with opened_pod(netns) as pod:
            return differences(entry, host=host, pod=pod)


def _is_meant(entry: Entry, key: str) -> bool:
    exact = {entry.pod, entry.pod.partition("/")[2], entry.ifname, entry.mac, str(entry.ifindex)}
    # What has no pod is not meant by nothing.
    return bool(key) and (
        key.lower() in exact or key in exact or entry.container_id.startswith(key)
    )


def _defined(name: str, directory: str, host: Netlink, ledger: Ledger) -> Told:
    try:
        network = load_network(name, directory)
    except CniError as error:
        return {"name": name, "fault": error.message, "hint": error.hint, "nics": []}
    judged = judged_nics(host, network, ledger)
    entries = list(ledger.entries())
    on_nic = Counter(entry.lower_ifindex for entry in entries if has_node(entry.ifindex))
    fault = hint = ""
    try:
        usable_nics(host, network, ledger)
    except CniError as error:
        fault, hint = error.message, error.hint
    nics = [
        {
            "name": link.name,
            "up": link.up,
            "carrier": link.carrier,
            "mtu": link.mtu,
            "attachments": on_nic[link.ifindex],
            "fault": "" if reason is None else reason.message,
        }
        for link, reason in judged
    ]
    return {
        "name": name,
        "fault": fault,
        "hint": hint,
        "mode": str(network.mode),
        "antispoof": str(network.held_to),
        "mtu": network.mtu,
        "queues": network.queues,
        "attachments": sum(entry.definition == name for entry in entries),
        "free": _free(network, sum(reason is None for _, reason in judged)),
        "nics": nics,
    }


def _free(network: Network, usable: int) -> int | None:
    """Of passthru, each NIC takes one; the others' number nothing here limits."""
    if network.mode is Mode.PASSTHRU or not usable:
        return usable
    return None
