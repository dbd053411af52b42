"""An attachment: made, unmade and looked at, in kernel and ledger together.

Making is one transaction: whatever was done is undone by the same function that serves DEL and GC,
so that there is one way in which an attachment ends.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import count
from typing import Final

from extbridge.kernel.links import (
    Link,
    Macvtap,
    create_macvtap,
    delete_link,
    find_link,
    has_address,
    list_links,
    list_our_links,
    set_mac,
    set_up,
)
from extbridge.kernel.netlink import NETLINK_ROUTE, Netlink
from extbridge.kernel.netns import inside, netns_inode, opened_netns
from extbridge.kernel.silence import silence, unsilence_absent, unsilenced_by
from extbridge.kernel.taps import has_node, unused_ifindex
from extbridge.ledger import Entry, Held, Ledger
from extbridge.network.definition import Mode
from extbridge.network.wanted import WantedNic, derived_or_given_mac
from extbridge.spec.errors import MacInUse, NameTaken, NicBusy, TryAgainLater
from extbridge.spec.request import find_name_fault

_INDEX_TRIES: Final = 3
"""How often another ifindex is tried; more in a row that are taken are not chance any more."""

_CLEANUP_SECONDS: Final = 2.0
"""How long a namespace may take to end after its last user has gone (cleanup_net)."""


_ALIAS: Final = "extbridge"


@dataclass(frozen=True, slots=True)
class Pod:
    """The calling thread stands in the pod's namespace, with a socket of that namespace."""

    netns: int
    route: Netlink


@contextmanager
def enter_pod(netns: int) -> Iterator[Pod]:
    """Stand in the namespace for the length of the block. Taps must not be opened here (taps)."""
    with inside(netns), Netlink(NETLINK_ROUTE) as route:
        yield Pod(netns, route)


def alias_of(container_id: str, cni_ifname: str) -> str:
    """What the link itself says of whose it is, so that DEL finds it without the ledger."""
    return f"{_ALIAS}:{container_id}:{cni_ifname}"


def container_of(link: Link) -> str:
    """The container ID in a link's alias, empty where there is none.

    The alias is the pod's to change, if it has CAP_NET_ADMIN, and the ID becomes a path: what could
    be no ID is none. Neither an ID nor an interface name can hold a colon.
    """
    mark, _, rest = link.alias.partition(":")
    container_id = rest.partition(":")[0]
    return "" if mark != _ALIAS or find_name_fault(container_id) else container_id


def attach(
    wanted: WantedNic,
    draft: Entry,
    *,
    ledger: Ledger,
    held: Held,
    host: Netlink,
    lower: Link,
    pod: Pod,
    former_ifname: str = "",
) -> Entry:
    """Make the attachment that `draft` begins to describe; return its finished ledger entry.

    On any failure nothing is left of it. Raises NameTaken, MacInUse, NicBusy, IoFailure, OSError.
    """
    tries = _INDEX_TRIES
    with ExitStack() as undo:
        while True:
            entry = _numbered(draft, wanted, former_ifname, pod)
            undo.callback(unsilence_absent, pod.route)
            undo.callback(detach, entry, held=held, pod=pod)
            held.write(entry)
            try:
                _create(entry, wanted, host, pod.netns)
                break
            except OSError as error:
                if error.errno == errno.EINVAL or (error.errno == errno.EBUSY and tries == 0):
                    raise _nic_busy(entry, ledger, error) from error
                # EEXIST, or EBUSY where somebody else is in the midst of it: of the name, which
                # the next round tells, or of the ifindex.
                if error.errno not in (errno.EEXIST, errno.EBUSY) or tries == 0:
                    raise
                tries -= 1
                undo.close()
        if entry.mode == Mode.PASSTHRU:
            # A passthru macvtap is born with the NIC's MAC whatever was asked (macvlan_newlink).
            # Which MAC that is, is not known by now: a former attempt may just have been undone.
            set_mac(pod.route, entry.ifindex, entry.mac)
        silence(entry.ifindex, entry.ifname)
        try:
            set_up(pod.route, entry.ifindex, alias=alias_of(entry.container_id, entry.cni_ifname))
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EBUSY):
                raise _mac_in_use(entry, lower, ledger) from error
            raise
        entry = held.finish(entry)
        undo.pop_all()
        return entry


def detach(entry: Entry, *, held: Held, pod: Pod | None) -> None:
    """Unmake the attachment; `pod` None says that its namespace is gone, and the link with it.

    Deleted is the link with the entry's ifindex, which is unique on the node, if it is ours. The
    entry goes last: what fails before can be tried again. The link's rules, which say nothing any
    more without it, are `unsilence_absent`'s.
    """
    if pod is not None:
        link = find_link(pod.route, ifindex=entry.ifindex)
        if link is not None and link.ours:
            delete_link(pod.route, link.ifindex)
    held.remove(entry.ifname)


def detach_wherever(entry: Entry, *, held: Held) -> None:
    """Unmake the attachment in the namespace in which its entry says that it was made.

    Raises TryAgainLater if that cannot be reached at its path, and has not ended either.
    """
    with opened_netns(entry.netns) as netns:
        if netns is None or netns_inode(netns) != entry.netns_inode:
            if not _ends(entry):
                raise TryAgainLater(
                    f"{entry.ifname} of {entry.container_id} is there, but its namespace is not at"
                    f" {entry.netns}",
                    "a process still stands in the namespace, or its path cannot be seen from here",
                )
            detach(entry, held=held, pod=None)
            return
        with enter_pod(netns) as pod:
            detach(entry, held=held, pod=pod)
            unsilence_absent(pod.route)


def _ends(entry: Entry) -> bool:
    """Whether the link is gone, or goes soon: a namespace is taken down behind the scenes."""
    deadline = time.monotonic() + _CLEANUP_SECONDS
    while has_node(entry.ifindex):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def detach_unrecorded(container_id: str, cni_ifname: str, mac: str, *, pod: Pod) -> None:
    """Unmake what the kernel has of an attachment that the ledger does not know.

    The link says by its alias whose it is; one that was never UP has none yet, and is known by the
    MAC that prevResult gave (`mac`, may be empty) or by its name.
    """
    whose = alias_of(container_id, cni_ifname)
    for link in list_our_links(pod.route):
        nameless = not link.alias and (link.mac == mac or link.name == cni_ifname)
        if link.alias == whose or nameless:
            delete_link(pod.route, link.ifindex)


def differences(entry: Entry, *, host: Netlink, pod: Pod) -> list[str]:
    """In what the attachment is not what `entry` says: a sentence each, none when all is well."""
    link = find_link(pod.route, ifindex=entry.ifindex)
    if link is None:
        return [f"{entry.ifname}: the link with ifindex {entry.ifindex} is gone"]
    lower = find_link(host, ifindex=entry.lower_ifindex)
    lower_name = lower.name if lower is not None else "gone"
    compared = [
        ("kind", "macvtap", link.kind),
        ("name", entry.ifname, link.name),
        ("mode", entry.mode, str(link.mode)),
        ("NIC", (entry.lower_ifindex, entry.lower), (link.lower, lower_name)),
        ("MAC", entry.mac, link.mac),
        ("MTU", entry.mtu, link.mtu),
        ("queues", entry.queues, link.tx_queues),
        ("state", "up", "up" if link.up else "down"),
        ("silence", "NOARP", "NOARP" if link.noarp else "ARP is answered"),
        (
            "silence",
            "no address",
            "an address" if has_address(pod.route, link.ifindex) else "no address",
        ),
        ("silence", "whole", unsilenced_by(link.ifindex, link.name) or "whole"),
    ]
    return [
        f"{entry.ifname}: {what} is {found!r}, ADD made it {made!r}"
        for what, made, found in compared
        if found != made
    ]


def _numbered(draft: Entry, wanted: WantedNic, former_ifname: str, pod: Pod) -> Entry:
    """The entry with all that depends on what the namespace and the node have already."""
    ifname = _free_name(wanted.ifname, former_ifname, pod.route)
    ifindex = unused_ifindex()
    mac = derived_or_given_mac(wanted, ifname)
    return replace(draft, ifname=ifname, ifindex=ifindex, mac=mac)


def _create(entry: Entry, wanted: WantedNic, host: Netlink, netns: int) -> None:
    create_macvtap(
        host,
        Macvtap(
            ifindex=entry.ifindex,
            name=entry.ifname,
            mac=entry.mac,
            mode=wanted.network.mode,
            lower=entry.lower_ifindex,
            mtu=entry.mtu,
            queues=entry.queues,
        ),
        netns,
    )


def _free_name(asked: str | None, former: str, route: Netlink) -> str:
    if asked is not None:
        if find_link(route, name=asked) is not None:
            raise NameTaken(
                f"the pod has an interface named {asked} already",
                "ask for another name, or delete the attachment that has it first",
            )
        return asked
    taken = {link.name for link in list_links(route)}
    if former and former not in taken:
        return former
    return next(name for n in count() if (name := f"macvtap{n}") not in taken)


def _nic_busy(entry: Entry, ledger: Ledger, refusal: OSError) -> NicBusy:
    holders = _described(
        other
        for other in ledger.entries()
        if other.lower_ifindex == entry.lower_ifindex and _is_another(other, entry)
    )
    if entry.mode == Mode.PASSTHRU:
        message = f"passthru needs {entry.lower} whole, and others are on it: {holders}"
    else:
        message = f"{entry.lower} cannot carry a {entry.mode} macvtap; on it: {holders}"
    message = f"{message} ({os.strerror(refusal.errno or 0)})"
    return NicBusy(message, "use another NIC for passthru, or delete what is on this one first")


def _mac_in_use(entry: Entry, lower: Link, ledger: Ledger) -> MacInUse:
    if entry.mac == lower.mac:
        holder = f"the NIC {lower.name} itself"
    else:
        holder = _described(
            other
            for other in ledger.entries()
            if other.lower_ifindex == entry.lower_ifindex
            and other.mac == entry.mac
            and _is_another(other, entry)
        )
    return MacInUse(
        f"the MAC {entry.mac} is in use on {lower.name} by {holder}",
        "give this VM another MAC, or take that one from who has it",
    )


def _is_another(other: Entry, entry: Entry) -> bool:
    """Whether the entry is of another attachment whose link is there still."""
    return other.ifindex != entry.ifindex and has_node(other.ifindex)


def _described(entries: Iterable[Entry]) -> str:
    return (
        ", ".join(
            f"{entry.ifname} ({entry.mode}) of {entry.pod or entry.container_id}"
            for entry in entries
        )
        or "a link that extbridge did not make"
    )
