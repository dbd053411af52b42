"""An attachment: made, unmade and looked at, in kernel, IPAM and ledger together.

Making is one transaction: whatever was done is undone in the reverse order when a later step fails.
The thread stays in the node's own namespace: a socket of the pod's is enough for most of it, and
what an IPAM plugin is run in must not be the pod's.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import count
from typing import Final

from extbridge.ipam import ipam_add, ipam_del, parse_delegation
from extbridge.kernel.antispoof import Guard, unguarded_by
from extbridge.kernel.checksums import hold_checksums, unheld_checksums
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
from extbridge.kernel.shaper import shape, unshape_absent, unshaped_by
from extbridge.kernel.silence import silence, unsilence_absent, unsilenced_by
from extbridge.kernel.taps import give_node, has_node, unused_ifindex
from extbridge.ledger import Entry, Held, Ledger
from extbridge.network.definition import Antispoof, Handoff, Mode
from extbridge.nics import holders_of
from extbridge.spec.errors import (
    CniError,
    InvalidNetworkConfig,
    KernelRefused,
    MacInUse,
    NameTaken,
    NicBusy,
    OutOfReach,
)
from extbridge.spec.request import Steps, find_name_fault

log = logging.getLogger(__name__)

_INDEX_TRIES: Final = 3
"""How often another ifindex is tried; more in a row that are taken are not chance any more."""

_CLEANUP_SECONDS: Final = 2.0
"""How long a namespace may take to end after its last user has gone (cleanup_net)."""

_ALIAS: Final = "extbridge"

_HOOKS: Final = (
    "antispoof needs Linux 5.17 or later with nf_tables, CONFIG_NETFILTER_EGRESS, sch_ingress,"
    " cls_bpf and BTF (/sys/kernel/btf/vmlinux), without lockdown=confidentiality; antispoof: off"
    " does without"
)
_BUCKETS: Final = (
    "bandwidth needs the kernel's sch_tbf, and for what a guest receives ifb, sch_ingress, cls_u32"
    " and act_mirred: load them, or leave bandwidth out"
)

_QEMU: Final = 107
"""The user and group that KubeVirt's QEMU runs as."""


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod's namespace, and a socket that was made in there; the thread stands elsewhere."""

    netns: int
    route: Netlink


@contextmanager
def opened_pod(netns: int) -> Iterator[Pod]:
    """The pod whose namespace the fd is of; its socket is closed after the block."""
    with inside(netns):
        route = Netlink(NETLINK_ROUTE)
    with route:
        yield Pod(netns, route)


@contextmanager
def opened_namespace(entry: Entry) -> Iterator[int | None]:
    """An fd of the namespace in which the link was made; None where it cannot be reached.

    An agent's container does not have the host's folder of namespaces, but it may see the host's
    first process, and the one that holds the tap.
    """
    paths = [entry.netns, f"/proc/1/root{entry.netns}"]
    if entry.holder is not None:
        paths.append(f"/proc/{entry.holder.pid}/ns/net")
    for path in paths:
        with ExitStack() as closing:
            try:
                netns = closing.enter_context(opened_netns(path))
            except OSError as error:
                # Of a process that has just ended, or that is none of ours to look at.
                if error.errno not in (errno.ESRCH, errno.EACCES, errno.EPERM):
                    raise
                continue
            if netns is not None and netns_inode(netns) == entry.netns_inode:
                yield netns
                return
    yield None


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
    draft: Entry,
    lowers: Sequence[Link],
    *,
    ledger: Ledger,
    held: Held,
    host: Netlink,
    pod: Pod,
    steps: Steps,
    host_process: int | None = None,
) -> Entry:
    """Make the attachment that `draft` describes, on the first of `lowers` that takes it.

    Open in a draft are ifindex (if 0), NIC and addressing; the answer is the finished entry.
    `host_process` is ipam's. On any failure nothing is left. Raises CniError and OSError.
    """
    if draft.ifindex and has_node(draft.ifindex):
        raise _device_taken(draft, ledger)
    entry = draft

    def intend(intended: Entry) -> None:
        nonlocal entry
        entry = intended
        held.write(entry)

    def unmake() -> None:
        undo_attachment(entry, held=held, pod=pod, host_process=host_process)

    with ExitStack() as undo:
        undo.callback(unmake)
        if draft.delegation is not None:
            intend(draft)
            try:
                addressing = ipam_add(parse_delegation(draft.delegation), host_process=host_process)
            except InvalidNetworkConfig:
                # A plugin that is not there has nothing to release either.
                entry = replace(draft, delegation=None)
                raise
            draft = replace(draft, addressing=addressing)
            intend(draft)
            steps.mark("ipam")
        lower = _made(draft, lowers, ledger=ledger, intend=intend, host=host, netns=pod.netns)
        if entry.mode == Mode.PASSTHRU:
            # A passthru macvtap is born with the NIC's MAC whatever was asked (macvlan_newlink).
            # Which MAC that is, is not known by now: a former attempt may just have been undone.
            set_mac(pod.route, entry.ifindex, entry.mac)
        steps.mark("link")
        guard = _guard(entry)
        with _needing(_HOOKS if guard is not None else ""):
            with inside(pod.netns):
                silence(entry.ifindex, entry.ifname, guard)
            if guard is not None:
                hold_checksums(pod.route, entry.ifindex)
        steps.mark("rules")
        if entry.bandwidth is not None:
            mac = None if guard is None else guard.mac
            with _needing(_BUCKETS):
                shape(pod.route, entry.ifindex, entry.mtu, entry.bandwidth, mac)
            steps.mark("shaping")
        if entry.handoff == Handoff.DEVICE:
            give_node(entry.ifindex, uid=_QEMU, gid=_QEMU)
        try:
            set_up(pod.route, entry.ifindex, alias=alias_of(entry.container_id, entry.cni_ifname))
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EBUSY):
                raise _mac_in_use(entry, lower, ledger) from error
            raise
        entry = held.finish(entry)
        undo.pop_all()
        steps.mark("up")
        return entry


def detach(entry: Entry, *, held: Held, pod: Pod | None, host_process: int | None = None) -> None:
    """Unmake the attachment; `pod` None says that its namespace is gone, and the link with it.

    Deleted is the link with the entry's ifindex, which is unique on the node, if it is ours. The
    entry goes last: what fails before can be tried again. What was laid on the link, and says
    nothing any more without it, is `sweep`'s.
    """
    if pod is not None:
        # An intent from before there was a link has none.
        link = find_link(pod.route, ifindex=entry.ifindex) if entry.ifindex else None
        if link is not None and link.ours:
            delete_link(pod.route, link.ifindex)
    elif entry.delegation is not None:
        # IPAM plugins refuse a path that leads nowhere, or to the node's own namespace by now.
        entry = replace(entry, delegation={**entry.delegation, "netns": ""})
    if entry.delegation is not None:
        ipam_del(parse_delegation(entry.delegation), host_process=host_process)
    held.remove(entry.ifname)


def undo_attachment(entry: Entry, *, held: Held, pod: Pod, host_process: int | None = None) -> None:
    """Unmake what a failed ADD has made, whose error is the one to tell: others go to the log.

    What cannot be undone now keeps its entry, for the runtime's DEL.
    """
    try:
        detach(entry, held=held, pod=pod, host_process=host_process)
        sweep(pod)
    except (CniError, OSError) as error:
        log.warning("rollback of %s of %s: %s", entry.ifname, entry.container_id, error)


def sweep(pod: Pod) -> None:
    """Remove from the pod what was laid on links of ours that are gone."""
    unshape_absent(pod.route)
    with inside(pod.netns):
        unsilence_absent(pod.route)


def detach_wherever(entry: Entry, *, held: Held, host_process: int | None = None) -> None:
    """Unmake the attachment in the namespace in which its entry says that it was made.

    Raises OutOfReach if that cannot be reached at its path, and has not ended either.
    """
    with opened_namespace(entry) as netns:
        if netns is None:
            if not _ends(entry):
                raise OutOfReach(
                    f"{entry.ifname} of {entry.container_id} is there, but its namespace is not at"
                    f" {entry.netns}",
                    "a process still stands in the namespace, or its path cannot be seen from here",
                )
            detach(entry, held=held, pod=None, host_process=host_process)
            return
        with opened_pod(netns) as pod:
            detach(entry, held=held, pod=pod, host_process=host_process)
            sweep(pod)


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
    address = has_address(pod.route, link.ifindex)
    guard = _guard(entry)
    with inside(pod.netns):
        unsilenced = unsilenced_by(link.ifindex, link.name)
        unguarded = unguarded_by(link.ifindex, link.name, guard)
    if guard is not None and not unguarded:
        unguarded = unheld_checksums(pod.route, link.ifindex)
    mac = None if guard is None else guard.mac
    unshaped = unshaped_by(pod.route, link.ifindex, link.mtu, entry.bandwidth, mac)
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
        ("silence", "no address", "an address" if address else "no address"),
        ("silence", "whole", unsilenced or "whole"),
        ("antispoof", entry.antispoof, unguarded or entry.antispoof),
        ("bandwidth", "whole", unshaped or "whole"),
    ]
    return [
        f"{entry.ifname}: {what} is {found!r}, ADD made it {made!r}"
        for what, made, found in compared
        if found != made
    ]


def free_ifname(asked: str | None, former: str, route: Netlink) -> str:
    """The name for a new link: the one that is asked for, else the former or an unused one.

    `route` is a socket of the pod's namespace. Raises NameTaken.
    """
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


def _made(
    draft: Entry,
    lowers: Sequence[Link],
    *,
    ledger: Ledger,
    intend: Callable[[Entry], None],
    host: Netlink,
    netns: int,
) -> Link:
    """Make the link, DOWN as yet; the answer is the NIC that it is on.

    Each attempt is told to `intend` before it is made, so that it can be undone.
    """
    *others, last = lowers
    for lower in others:
        try:
            _make_on(lower, draft, ledger=ledger, intend=intend, host=host, netns=netns)
            return lower
        except NicBusy:
            # Somebody has taken it meanwhile, or is on it whom the ledger does not know.
            continue
    _make_on(last, draft, ledger=ledger, intend=intend, host=host, netns=netns)
    return last


def _make_on(
    lower: Link,
    draft: Entry,
    *,
    ledger: Ledger,
    intend: Callable[[Entry], None],
    host: Netlink,
    netns: int,
) -> None:
    tries = 1 if draft.ifindex else _INDEX_TRIES
    while True:
        entry = replace(
            draft,
            ifindex=draft.ifindex or unused_ifindex(),
            lower=lower.name,
            lower_ifindex=lower.ifindex,
            mtu=draft.mtu or lower.mtu,
        )
        intend(entry)
        try:
            create_macvtap(
                host,
                Macvtap(
                    ifindex=entry.ifindex,
                    name=entry.ifname,
                    mac=entry.mac,
                    mode=Mode(entry.mode),
                    lower=entry.lower_ifindex,
                    mtu=entry.mtu,
                    queues=entry.queues,
                ),
                netns,
            )
            return
        except OSError as error:
            tries -= 1
            if error.errno == errno.EINVAL or (error.errno == errno.EBUSY and tries == 0):
                raise _nic_busy(entry, ledger, error) from error
            # EEXIST, or EBUSY where somebody else is in the midst of it: of the ifindex, or of a
            # name that somebody has just taken.
            if error.errno not in (errno.EEXIST, errno.EBUSY) or tries == 0:
                raise


@contextmanager
def _needing(hint: str) -> Iterator[None]:
    """Say what to do where the kernel does not know what it is asked for."""
    try:
        yield
    except OSError as error:
        if hint and error.errno in (errno.EOPNOTSUPP, errno.ENOENT):
            raise KernelRefused(error.strerror or str(error), hint) from error
        raise


def _guard(entry: Entry) -> Guard | None:
    match entry.antispoof:
        case Antispoof.OFF:
            return None
        case Antispoof.IP:
            given = entry.addressing.addresses if entry.addressing is not None else ()
            return Guard(entry.mac, tuple(it.address.partition("/")[0] for it in given))
        case _:
            return Guard(entry.mac, None)


def _device_taken(draft: Entry, ledger: Ledger) -> InvalidNetworkConfig:
    holders = [it for it in ledger.entries() if it.ifindex == draft.ifindex]
    holder = f"{holders[0].ifname} of {holders[0].container_id}" if holders else "another macvtap"
    return InvalidNetworkConfig(
        f"deviceID is {draft.ifindex}, which {holder} has",
        "a device is one pod's; the runtime has to ask the device plugin for another",
    )


def _nic_busy(entry: Entry, ledger: Ledger, refusal: OSError) -> NicBusy:
    others = holders_of(
        entry.lower_ifindex, (it for it in ledger.entries() if _is_another(it, entry))
    )
    if entry.mode == Mode.PASSTHRU:
        message = f"passthru needs {entry.lower} whole, and others are on it: {others}"
    else:
        message = f"{entry.lower} cannot carry a {entry.mode} macvtap; on it: {others}"
    message = f"{message} ({os.strerror(refusal.errno or 0)})"
    return NicBusy(message, "use another NIC for passthru, or delete what is on this one first")


def _mac_in_use(entry: Entry, lower: Link, ledger: Ledger) -> MacInUse:
    if entry.mac == lower.mac:
        holder = f"the NIC {lower.name} itself"
    else:
        same = (it for it in ledger.entries() if it.mac == entry.mac and _is_another(it, entry))
        holder = holders_of(entry.lower_ifindex, same)
    return MacInUse(
        f"the MAC {entry.mac} is in use on {lower.name} by {holder}",
        "give this VM another MAC, or take that one from who has it",
    )


def _is_another(other: Entry, entry: Entry) -> bool:
    """Whether the entry is of another attachment whose link is there still."""
    return other.ifindex != entry.ifindex and has_node(other.ifindex)
