"""The verbs of the CNI specification.

The same functions serve the executable `extbridge-cni`, which runs them in its own process, and
the node agent; what differs is only who reads the request and who prints the answer.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial

from extbridge.attachment import (
    Pod,
    attach,
    detach,
    detach_unrecorded,
    detach_wherever,
    differences,
    enter_pod,
)
from extbridge.kernel.links import Link, find_link, list_links
from extbridge.kernel.netlink import NETLINK_ROUTE, Netlink
from extbridge.kernel.netns import is_netns, is_own, netns_inode, opened_netns
from extbridge.kernel.silence import unsilence_absent
from extbridge.kernel.taps import has_node
from extbridge.ledger import Entry, Held, Ledger
from extbridge.network.definition import Network
from extbridge.network.store import DEFAULT_DIRECTORY
from extbridge.network.wanted import (
    WantedNic,
    configured_network,
    count_nics,
    refuse_unknown_keys,
    wanted_nics,
)
from extbridge.spec import fields, skel
from extbridge.spec.errors import (
    AttachmentDiffers,
    CniError,
    InvalidEnvironment,
    InvalidNetworkConfig,
    IoFailure,
    KernelRefused,
    LimitedConnectivity,
    NameTaken,
    PluginNotAvailable,
    TryAgainLater,
    UnknownContainer,
)
from extbridge.spec.request import Request, Verb
from extbridge.spec.result import add_interface, prev_interface, start_from

VALID_ATTACHMENTS = "cni.dev/valid-attachments"

# Links that carry others' frames to their own master; macvtap cannot take its place beside it
# (netdev_rx_handler_register answers EBUSY).
_MASTERS_THAT_TAKE_ALL = ("bridge", "bond", "team", "openvswitch")


def cmd_add(request: Request, ledger: Ledger, networks_dir: str) -> Mapping[str, object]:
    """Make every NIC that the request asks for, or none (SPEC section 2, "ADD")."""
    nics = wanted_nics(request, networks_dir)
    result = start_from(request.prev_result, request.cni_version)
    if not nics:
        return result
    with ExitStack() as closing, ExitStack() as undo:
        host = closing.enter_context(Netlink(NETLINK_ROUTE))
        netns = _pods_netns(request, closing)
        lowers = [_usable_nic(host, nic.network) for nic in nics]
        held = closing.enter_context(ledger.hold(request.container_id))
        pod = closing.enter_context(enter_pod(netns))
        former = _former_names(request, len(nics), held, pod)
        for nic, lower in zip(nics, lowers, strict=True):
            entry = attach(
                nic,
                _draft(request, nic, lower, netns),
                ledger=ledger,
                held=held,
                host=host,
                lower=lower,
                pod=pod,
                former_ifname=former[nic.network.name].pop(0)
                if former.get(nic.network.name)
                else "",
            )
            undo.callback(unsilence_absent, pod.route)
            undo.callback(detach, entry, held=held, pod=pod)
            add_interface(
                result, name=entry.ifname, mac=entry.mac, sandbox=request.netns, mtu=entry.mtu
            )
        undo.pop_all()
    return result


def cmd_del(request: Request, ledger: Ledger) -> None:
    """Unmake the attachment, by ledger and by kernel, whichever still knows of it.

    Succeeds when nothing is left to do (SPEC section 2, "DEL").
    """
    with ExitStack() as closing:
        netns = _given_netns(request, closing)
        # Our own is no pod's, not any more: a path by process number may have come to lead here.
        is_pods = netns is not None and not is_own(netns)
        pod = closing.enter_context(enter_pod(netns)) if netns is not None and is_pods else None
        held = closing.enter_context(_held_if_possible(ledger, request.container_id))
        if held is not None:
            for entry in held.entries():
                if entry.cni_ifname == request.ifname:
                    # Out of reach for now: the entry stays, for GC or the agent's next start.
                    with suppress(TryAgainLater):
                        _detach(entry, held, pod)
            held.sweep(request.ifname)
        if pod is not None:
            before = prev_interface(request.prev_result, request.ifname) or {}
            mac = fields.get_str(before, "mac") or ""
            detach_unrecorded(request.container_id, request.ifname, mac.lower(), pod=pod)
            unsilence_absent(pod.route)


def cmd_check(request: Request, ledger: Ledger) -> None:
    """Compare the attachment with what ADD made and said (SPEC section 2, "CHECK")."""
    if request.prev_result is None:
        raise InvalidNetworkConfig(
            "CHECK came without prevResult", "the runtime has to give the result of ADD"
        )
    entries = [
        entry for entry in ledger.of(request.container_id) if entry.cni_ifname == request.ifname
    ]
    # Behind a plugin that made CNI_IFNAME, ours has another name.
    is_chained = all(entry.ifname != request.ifname for entry in entries)
    asked = count_nics(request, is_chained=is_chained)
    if len(entries) < asked:
        raise UnknownContainer(
            f"the ledger has {len(entries)} of the {asked} NICs of container"
            f" {request.container_id} that were asked for by {request.ifname}",
            "delete the pod and create it again",
        )
    with ExitStack() as closing:
        netns = _pods_netns(request, closing)
        host = closing.enter_context(Netlink(NETLINK_ROUTE))
        pod = closing.enter_context(enter_pod(netns))
        found = []
        for entry in entries:
            found += differences(entry, host=host, pod=pod)
            found += _result_differences(entry, request)
    if found:
        raise AttachmentDiffers("; ".join(found), "delete the pod and create it again")


def cmd_gc(request: Request, ledger: Ledger) -> None:
    """Unmake this network's attachments that are not in the list; no list, nothing to do.

    One that cannot be unmade does not keep the others (SPEC section 2, "GC").
    """
    listed = fields.get_list(request.config, VALID_ATTACHMENTS)
    if listed is None:
        return
    valid = {_valid_attachment(item) for item in listed}
    failures = []
    for entry in list(ledger.entries()):
        if entry.network != request.name or (entry.container_id, entry.cni_ifname) in valid:
            continue
        try:
            with ledger.hold(entry.container_id) as held:
                if entry in held.entries():
                    detach_wherever(entry, held=held)
        except (OSError, CniError) as error:
            failures.append(f"{entry.ifname} of {entry.container_id}: {error}")
    if failures:
        raise KernelRefused(f"not everything could be removed: {'; '.join(failures)}")


def cmd_status(request: Request, networks_dir: str) -> None:
    """Whether an ADD can succeed: the NIC is there, and has carrier (SPEC section 2, "STATUS")."""
    refuse_unknown_keys(request.config)
    network = configured_network(request.config, networks_dir)
    if network is None:
        return
    with Netlink(NETLINK_ROUTE) as host:
        try:
            lower = _usable_nic(host, network)
        except (InvalidNetworkConfig, TryAgainLater) as error:
            raise PluginNotAvailable(
                f"network {network.name}: {error.message}", error.hint
            ) from error
    if not lower.carrier:
        raise LimitedConnectivity(
            f"network {network.name}: {lower.name} has no carrier",
            "check the cable and the switch port",
        )


def verbs(ledger: Ledger, networks_dir: str = DEFAULT_DIRECTORY) -> skel.Verbs:
    """What each verb does, with its ledger and the folder for definitions that are only named."""
    return {
        Verb.ADD: partial(cmd_add, ledger=ledger, networks_dir=networks_dir),
        Verb.DEL: partial(cmd_del, ledger=ledger),
        Verb.CHECK: partial(cmd_check, ledger=ledger),
        Verb.GC: partial(cmd_gc, ledger=ledger),
        Verb.STATUS: partial(cmd_status, networks_dir=networks_dir),
    }


def main() -> int:
    """The executable `extbridge-cni`."""
    return skel.main(
        os.environ,
        sys.stdin.buffer,
        sys.stdout.buffer,
        sys.stderr,
        verbs(Ledger.from_environment(os.environ)),
    )


def _draft(request: Request, nic: WantedNic, lower: Link, netns: int) -> Entry:
    pod = f"{nic.vm.namespace}/{nic.vm.name}" if nic.vm.namespace else ""
    return Entry(
        container_id=request.container_id,
        cni_ifname=request.ifname,
        ifname="",
        network=request.name,
        definition=nic.network.name,
        pod=pod,
        netns=request.netns,
        netns_inode=netns_inode(netns),
        ifindex=0,
        mac="",
        mode=nic.network.mode,
        lower=lower.name,
        lower_ifindex=lower.ifindex,
        mtu=lower.mtu if nic.network.mtu is None else nic.network.mtu,
        queues=nic.network.queues,
    )


def _former_names(request: Request, wanted: int, held: Held, pod: Pod) -> dict[str, list[str]]:
    """Clear what an earlier ADD of this attachment left; give the names it had, by network.

    An intent, or fewer NICs than are `wanted`, is the trace of an ADD that was killed. A finished
    entry whose link is gone lost it with its NIC. What is whole, in whichever namespace, was asked
    for twice.
    """
    entries = [entry for entry in held.entries() if entry.cni_ifname == request.ifname]
    whole = [entry for entry in entries if entry.done and has_node(entry.ifindex)]
    if len(whole) >= wanted:
        raise NameTaken(
            f"container {request.container_id} has this attachment already:"
            f" {', '.join(f'{entry.ifname} in {entry.netns}' for entry in whole)}",
            "delete it first (DEL)",
        )
    for entry in entries:
        _detach(entry, held, pod)
    if entries:
        unsilence_absent(pod.route)
    former: dict[str, list[str]] = {}
    # As they were made: macvtap2 before macvtap10.
    for entry in sorted(entries, key=lambda entry: (len(entry.ifname), entry.ifname)):
        former.setdefault(entry.definition, []).append(entry.ifname)
    return former


def _detach(entry: Entry, held: Held, pod: Pod | None) -> None:
    """Unmake the attachment: in `pod`, where the thread stands, if it was made there.

    Raises TryAgainLater if its namespace lives but cannot be reached.
    """
    if pod is not None and netns_inode(pod.netns) == entry.netns_inode:
        detach(entry, held=held, pod=pod)
    else:
        detach_wherever(entry, held=held)


@contextmanager
def _held_if_possible(ledger: Ledger, container_id: str) -> Iterator[Held | None]:
    """The container's part of the ledger, locked also where it is empty: an ADD may be under way.

    None where the ledger cannot be written and does not know the container: then none can.
    """
    with ExitStack() as closing:
        try:
            held = closing.enter_context(ledger.hold(container_id))
        except IoFailure:
            if ledger.knows(container_id):
                raise
            held = None
        yield held


def _given_netns(request: Request, closing: ExitStack) -> int | None:
    """An fd of the namespace that the request names, closed with `closing`; None if it is gone."""
    if request.netns_fd is None:
        return closing.enter_context(opened_netns(request.netns))
    return request.netns_fd if is_netns(request.netns_fd) else None


def _pods_netns(request: Request, closing: ExitStack) -> int:
    """The same where there has to be one, and a pod's; raises InvalidEnvironment."""
    netns = _given_netns(request, closing)
    if netns is None:
        raise InvalidEnvironment(
            f"CNI_NETNS: there is no network namespace at {request.netns}",
            "give the path of the pod's, such as /var/run/netns/NAME; it may have ended meanwhile",
        )
    if is_own(netns):
        raise InvalidEnvironment(
            f"CNI_NETNS: {request.netns} is the namespace extbridge itself runs in",
            "give the pod's; a hostNetwork pod has no NIC of its own to get",
        )
    return netns


def _usable_nic(host: Netlink, network: Network) -> Link:
    """The network's NIC, fit to carry it; refuses what the kernel would, in words."""
    name = network.dev.names[0]
    lower = find_link(host, name=name)
    if lower is None:
        present = ", ".join(
            link.name
            for link in list_links(host)
            if link.ethernet and not link.loopback and not link.master
        )
        raise InvalidNetworkConfig(
            f"extbridge.dev: the node has no NIC {name!r}", f"it has {present}"
        )
    unfit = ""
    if lower.loopback:
        unfit = "is the loopback"
    elif not lower.ethernet:
        unfit = "is not an Ethernet NIC"
    elif lower.kind in ("macvtap", "macvlan"):
        unfit = f"is itself a {lower.kind}; name the NIC below it"
    elif lower.master:
        master = find_link(host, ifindex=lower.master)
        if master is not None and master.kind in _MASTERS_THAT_TAKE_ALL:
            unfit = f"is a port of {master.kind} {master.name}; name that one, or free the NIC"
    if unfit:
        raise InvalidNetworkConfig(
            f"extbridge.dev: {name} {unfit}",
            "extbridge needs an Ethernet NIC of its own or a bridge",
        )
    if network.mtu is not None and network.mtu > lower.mtu:
        raise InvalidNetworkConfig(
            f"mtu: {network.mtu} is more than the {lower.mtu} of {name}",
            f"give at most {lower.mtu}, or raise the NIC's",
        )
    if not lower.up:
        raise TryAgainLater(f"extbridge.dev: {name} is down", f"ip link set {name} up")
    return lower


def _valid_attachment(item: object) -> tuple[str, str]:
    if not isinstance(item, dict):
        raise InvalidNetworkConfig(
            f"{VALID_ATTACHMENTS}: {item!r} is not an object",
            'give [{"containerID": …, "ifname": …}]',
        )
    where = VALID_ATTACHMENTS
    container_id = fields.get_str(item, "containerID", where=where)
    ifname = fields.get_str(item, "ifname", where=where)
    if not container_id or not ifname:
        raise InvalidNetworkConfig(
            f"{where}: {item!r} lacks containerID or ifname",
            "nothing is deleted on the word of a list that may be incomplete",
        )
    return container_id, ifname


def _result_differences(entry: Entry, request: Request) -> list[str]:
    told = prev_interface(request.prev_result, entry.ifname)
    if told is None:
        return [f"{entry.ifname}: prevResult does not have it"]
    compared = [
        ("MAC", entry.mac, (fields.get_str(told, "mac") or entry.mac).lower()),
        ("sandbox", request.netns, fields.get_str(told, "sandbox") or request.netns),
        ("MTU", entry.mtu, fields.get_int(told, "mtu") or entry.mtu),
    ]
    return [
        f"{entry.ifname}: {what} is {found!r} in prevResult, ADD made it {made!r}"
        for what, made, found in compared
        if found != made
    ]
