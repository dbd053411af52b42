"""The ledger against the kernel: what is in one and not in the other, or not as it was made."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from extbridge.attachment import differences, opened_namespace, opened_pod
from extbridge.doctor.finding import Finding, failure, ok, warning
from extbridge.kernel.links import Link, list_our_links, nsid_of
from extbridge.kernel.netlink import NETLINK_ROUTE, Netlink
from extbridge.kernel.netns import inside, is_own, netns_inode, opened_netns
from extbridge.kernel.taps import has_node, ifindexes_with_node
from extbridge.ledger import Entry, Ledger

_NETNS_FOLDER = "/run/netns"
_OWN = "/proc/thread-self/ns/net"
_RESTART = "restart the agent, which sets the ledger right when it starts; or delete the pod"


def check_attachments(run: Path) -> Iterator[Finding]:
    """Whether each attachment is there as it was made, and nothing else is."""
    ledger = Ledger(run)
    # In this order: an ADD that begins meanwhile has its entry before its link.
    nodes = ifindexes_with_node()
    entries = list(ledger.entries())
    sound = 0
    with Netlink(NETLINK_ROUTE) as host:
        for entry in entries:
            findings = list(_check_entry(entry, host))
            # It may be ADD's, DEL's or the agent's this very moment.
            if findings and entry in ledger.of(entry.container_id):
                yield from findings
            else:
                sound += 1
    yield from _check_files(run, entries)
    orphans = nodes - {entry.ifindex for entry in entries}
    yield from _check_orphans({ifindex for ifindex in orphans if has_node(ifindex)})
    if sound == len(entries):
        yield ok("ledger", f"all {sound} attachments are as they were made")


def _check_entry(entry: Entry, host: Netlink) -> Iterator[Finding]:
    subject = f"{entry.ifname} of {entry.pod or entry.container_id}"
    if not has_node(entry.ifindex):
        if entry.done:
            what = "is in the ledger, and its link is gone: its NIC or its namespace went first"
            yield failure(subject, what, _RESTART)
        else:
            yield warning(subject, "is the trace of an ADD that was killed, or is slow", _RESTART)
        return
    if entry.holder is not None and not entry.holder.alive():
        what = f"process {entry.holder.pid}, which had its tap, has ended and holds it still"
        yield warning(subject, what, _RESTART)
    with opened_namespace(entry) as netns:
        if netns is None:
            yield failure(
                subject,
                f"its link is there, but its namespace is not at {entry.netns}",
                "if the pod is gone, a process that stands in the namespace keeps it: end that;"
                " in a container, run this where the host's processes are seen (hostPID)",
            )
            return
        if not entry.done:
            yield warning(subject, "is half made: an ADD was killed, or is slow", _RESTART)
            return
        with opened_pod(netns) as pod:
            for difference in differences(entry, host=host, pod=pod):
                yield failure(
                    subject,
                    difference.removeprefix(f"{entry.ifname}: "),
                    "somebody else has changed it: delete the pod and create it again",
                )


def _check_files(run: Path, entries: list[Entry]) -> Iterator[Finding]:
    known = {(entry.container_id, entry.ifname) for entry in entries}
    for path in sorted(run.glob("ledger/*/*.*")):
        understood = (path.parent.name, path.stem) in known
        if path.suffix in (".json", ".intent") and not understood and path.exists():
            yield failure(
                "ledger",
                f"{path} cannot be understood",
                "an agent of its version can; or delete the pod, and then the file",
            )


def _check_orphans(ifindexes: set[int]) -> Iterator[Finding]:
    """What is said of macvtaps of ours that the ledger does not know."""
    if not ifindexes:
        return
    unseen = set(ifindexes)
    for where, links, anybodys in _links_by_namespace():
        for link in links:
            if link.ifindex in unseen:
                yield failure(
                    f"{link.name} in {where}",
                    f"a macvtap of extbridge's ({link.mac}, {link.alias or 'without alias'}) that"
                    " the ledger does not know",
                    f"if no VM has it: nsenter --net={where} ip link delete {link.name}",
                )
        unseen -= {link.ifindex for link in anybodys}
    for ifindex in sorted(filter(has_node, unseen)):
        # Device nodes are the kernel's: of all nodes, where several are containers of one machine.
        yield warning(
            f"/dev/tap{ifindex}",
            "a macvtap in a namespace that is not seen from here, which the ledger does not know",
            "if this machine is no other node besides, find what keeps the namespace: a process, or"
            " a mount that is not seen from here",
        )


def _links_by_namespace() -> Iterator[tuple[str, list[Link], list[Link]]]:
    """Links of extbridge's, namespace by namespace: on this node's NICs, and all.

    Seen are namespaces that have a path, or a process in them. A node is a network namespace: where
    there are several on one machine, the others' NICs and pods are no concern of this one.
    """
    paths = [str(path) for path in sorted(Path(_NETNS_FOLDER).glob("*"))]
    paths += [f"/proc/{pid}/ns/net" for pid in filter(str.isdecimal, os.listdir("/proc"))]
    seen = set()
    with opened_netns(_OWN) as own:
        for path in paths:
            # A process may end, or a namespace, since its name was read.
            with suppress(OSError), opened_netns(path) as netns:
                if netns is None or own is None or netns_inode(netns) in seen:
                    continue
                seen.add(netns_inode(netns))
                with inside(netns):
                    route = Netlink(NETLINK_ROUTE)
                with route:
                    # In this order: a dump gives numbers to namespaces that have none yet.
                    links = list_our_links(route)
                    nsid = -1 if is_own(netns) else nsid_of(route, own)
                is_this_nodes = nsid != -1 or is_own(netns)
                yield path, [it for it in links if is_this_nodes and it.lower_nsid == nsid], links
