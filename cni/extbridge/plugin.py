"""The verbs of the CNI specification.

The same functions serve the executable `extbridge-cni`, which runs them in its own process, and
the node agent; what differs is only who reads the request and who prints the answer.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial

from extbridge.attachment import (
    Pod,
    attach,
    detach,
    detach_unrecorded,
    detach_wherever,
    differences,
    free_ifname,
    opened_pod,
    sweep,
    undo_attachment,
)
from extbridge.ipam import (
    Delegation,
    delegated_config,
    delegation_to_object,
    ipam_check,
    ipam_del,
    ipam_gc,
    ipam_status,
    parse_delegation,
)
from extbridge.kernel.netlink import NETLINK_ROUTE, Netlink
from extbridge.kernel.netns import is_netns, is_own, netns_inode, opened_netns
from extbridge.kernel.taps import has_node
from extbridge.ledger import Entry, Held, Ledger
from extbridge.network.addresses import addressing_from_ips, addressing_to_object
from extbridge.network.definition import Network
from extbridge.network.store import DEFAULT_DIRECTORY
from extbridge.network.wanted import (
    FindPod,
    WantedNic,
    configured_network,
    count_nics,
    derived_or_given_mac,
    inline_definition,
    refuse_unknown_keys,
    wanted_nics,
)
from extbridge.nics import usable_nics
from extbridge.reservations import Reservations
from extbridge.spec import fields, skel
from extbridge.spec.errors import (
    AttachmentDiffers,
    CniError,
    InvalidEnvironment,
    InvalidNetworkConfig,
    IoFailure,
    IpamFailure,
    KernelRefused,
    LimitedConnectivity,
    NameTaken,
    NicBusy,
    OutOfReach,
    PluginNotAvailable,
    TryAgainLater,
    UnknownContainer,
)
from extbridge.spec.request import VALID_ATTACHMENTS, Request, Verb
from extbridge.spec.result import add_interface, add_ip, prev_interface, start_from


@dataclass(frozen=True, slots=True)
class Node:
    """What the verbs work with on this node.

    `networks_dir` has the definitions that configurations only name. `host_process` is a process of
    the host's, in whose mount namespace IPAM plugins are run; None: in this one's own.
    `reservations` are the device plugin's; None where there is none, and any deviceID is taken.
    `find_pod` asks Kubernetes; None: there is none to ask.
    """

    ledger: Ledger
    networks_dir: str = DEFAULT_DIRECTORY
    host_process: int | None = None
    reservations: Reservations | None = None
    find_pod: FindPod | None = None


def cmd_add(request: Request, node: Node) -> Mapping[str, object]:
    """Make every NIC that the request asks for, or none (SPEC section 2, "ADD")."""
    nics = wanted_nics(request, node.networks_dir, node.find_pod)
    result = start_from(request.prev_result, request.cni_version)
    if not nics:
        return result
    request.steps.mark("validate")
    with ExitStack() as closing, ExitStack() as undo:
        for nic in nics:
            if nic.ifindex is not None and node.reservations is not None:
                closing.enter_context(node.reservations.claimed(nic.network.name, nic.ifindex))
        host = closing.enter_context(Netlink(NETLINK_ROUTE))
        netns = _pods_netns(request, closing)
        held = closing.enter_context(node.ledger.hold(request.container_id))
        pod = closing.enter_context(opened_pod(netns))
        former = _former_names(request, len(nics), held, pod, node)
        pools = [usable_nics(host, nic.network, node.ledger) for nic in nics]
        request.steps.mark("namespace")
        made: list[Entry] = []
        for n, nic in enumerate(nics):
            if n > 0:
                # Of a pool the first may have got fuller, or be taken whole.
                pools[n] = usable_nics(host, nic.network, node.ledger)
            names = former.get(nic.network.name)
            ifname = free_ifname(nic.ifname, names.pop(0) if names else "", pod.route)
            entry = attach(
                draft_entry(request, nic, ifname, netns),
                pools[n],
                ledger=node.ledger,
                held=held,
                host=host,
                pod=pod,
                host_process=node.host_process,
                steps=request.steps,
            )
            undo.callback(
                undo_attachment, entry, held=held, pod=pod, host_process=node.host_process
            )
            _add_to(result, entry, request)
            made.append(entry)
        undo.pop_all()
    request.notes.update(
        networks=",".join(entry.definition for entry in made),
        nics=",".join(entry.lower for entry in made),
        macs=",".join(entry.mac for entry in made),
    )
    return result


def cmd_del(request: Request, node: Node) -> None:
    """Unmake the attachment, by ledger and by kernel, whichever still knows of it.

    Succeeds when nothing is left to do (SPEC section 2, "DEL").
    """
    with ExitStack() as closing:
        netns = _given_netns(request, closing)
        # Our own is no pod's, not any more: a path by process number may have come to lead here.
        is_pods = netns is not None and not is_own(netns)
        pod = closing.enter_context(opened_pod(netns)) if netns is not None and is_pods else None
        held = closing.enter_context(_held_if_possible(node.ledger, request.container_id))
        released = False
        failures: list[Exception] = []
        if held is not None:
            for entry in held.entries():
                if entry.cni_ifname != request.ifname:
                    continue
                released = released or entry.delegation is not None
                try:
                    _detach(entry, held, pod, node)
                except OutOfReach:
                    # For now: the entry stays, for GC or the agent's next start.
                    continue
                except (CniError, OSError) as failure:
                    # One that cannot be unmade does not keep the others.
                    failures.append(failure)
            held.sweep(request.ifname)
        if pod is not None:
            before = prev_interface(request.prev_result, request.ifname) or {}
            mac = fields.get_str(before, "mac") or ""
            detach_unrecorded(request.container_id, request.ifname, mac.lower(), pod=pod)
            sweep(pod)
        if not released:
            _release_unrecorded(request, node, is_there=pod is not None)
        if failures:
            raise failures[0]


def cmd_check(request: Request, node: Node) -> None:
    """Compare the attachment with what ADD made and said (SPEC section 2, "CHECK")."""
    if request.prev_result is None:
        raise InvalidNetworkConfig(
            "CHECK came without prevResult", "the runtime has to give the result of ADD"
        )
    entries = [
        entry
        for entry in node.ledger.of(request.container_id)
        if entry.cni_ifname == request.ifname
    ]
    added = [entry for entry in entries if not entry.hotplugged]
    # Behind a plugin that made CNI_IFNAME, ours has another name.
    is_chained = all(entry.ifname != request.ifname for entry in added)
    asked = count_nics(request, is_chained=is_chained)
    if len(added) < asked:
        raise UnknownContainer(
            f"the ledger has {len(added)} of the {asked} NICs of container"
            f" {request.container_id} that were asked for by {request.ifname}",
            "delete the pod and create it again",
        )
    with ExitStack() as closing:
        netns = _pods_netns(request, closing)
        host = closing.enter_context(Netlink(NETLINK_ROUTE))
        pod = closing.enter_context(opened_pod(netns))
        found = []
        for entry in entries:
            found += differences(entry, host=host, pod=pod)
        for entry in added:
            found += _result_differences(entry, request)
    if found:
        raise AttachmentDiffers("; ".join(found), "delete the pod and create it again")
    for entry in added:
        if entry.delegation is not None:
            delegation = parse_delegation(entry.delegation)
            ipam_check(delegation, request.prev_result, host_process=node.host_process)


def cmd_gc(request: Request, node: Node) -> None:
    """Unmake this network's attachments that are not in the list; no list, nothing to do.

    One that cannot be unmade does not keep the others (SPEC section 2, "GC").
    """
    listed = fields.get_list(request.config, VALID_ATTACHMENTS)
    if listed is None:
        return
    valid = {_valid_attachment(item) for item in listed}
    failures = []
    for entry in list(node.ledger.entries()):
        if entry.network != request.name or (entry.container_id, entry.cni_ifname) in valid:
            continue
        try:
            with node.ledger.hold(entry.container_id) as held:
                if entry in held.entries():
                    detach_wherever(entry, held=held, host_process=node.host_process)
        except (OSError, CniError) as error:
            failures.append(f"{entry.ifname} of {entry.container_id}: {error}")
    try:
        _collect_addresses(request, node, valid)
    except (OSError, CniError) as error:
        failures.append(str(error))
    if failures:
        raise KernelRefused(f"not everything could be removed: {'; '.join(failures)}")


def cmd_status(request: Request, node: Node) -> None:
    """Whether an ADD can succeed: a NIC is there, and has carrier (SPEC section 2, "STATUS")."""
    refuse_unknown_keys(request.config)
    try:
        network = configured_network(request.config, node.networks_dir)
    except (InvalidNetworkConfig, IoFailure) as error:
        named = fields.get_str(request.config, "network")
        if not named or inline_definition(request.config) is not None:
            raise
        # The configuration is right: what is wrong is the node's, for as long as that takes.
        raise PluginNotAvailable(f"network {named}: {error.message}", error.hint) from error
    if network is None:
        return
    with Netlink(NETLINK_ROUTE) as host:
        try:
            lower = usable_nics(host, network, node.ledger)[0]
        except (InvalidNetworkConfig, NicBusy, TryAgainLater) as error:
            raise PluginNotAvailable(
                f"network {network.name}: {error.message}", error.hint
            ) from error
    if network.ipam is not None:
        try:
            ipam_status(_delegation(request, network), host_process=node.host_process)
        except (InvalidNetworkConfig, IpamFailure) as error:
            raise PluginNotAvailable(
                f"network {network.name}: {error.message}", error.hint
            ) from error
    if not lower.carrier:
        raise LimitedConnectivity(
            f"network {network.name}: {lower.name} has no carrier",
            "check the cable and the switch port",
        )


def verbs(node: Node) -> skel.Verbs:
    """What each verb does, on this node."""
    return {
        Verb.ADD: partial(cmd_add, node=node),
        Verb.DEL: partial(cmd_del, node=node),
        Verb.CHECK: partial(cmd_check, node=node),
        Verb.GC: partial(cmd_gc, node=node),
        Verb.STATUS: partial(cmd_status, node=node),
    }


def main() -> int:
    """The executable `extbridge-cni`."""
    return skel.main(
        os.environ,
        sys.stdin.buffer,
        sys.stdout.buffer,
        sys.stderr,
        verbs(Node(Ledger.from_environment(os.environ))),
    )


def draft_entry(request: Request, nic: WantedNic, ifname: str, netns: int) -> Entry:
    """What `attach` needs to know of the NIC, which is to be called `ifname`."""
    network = nic.network
    namespace = request.args.get("K8S_POD_NAMESPACE")
    pod = f"{namespace}/{request.args.get('K8S_POD_NAME', '')}" if namespace else ""
    delegation, addressing = None, None
    if network.ipam is not None:
        delegation = delegation_to_object(_delegation(request, network, ifname, nic.ips))
    elif nic.ips:
        addressing = addressing_from_ips(nic.ips)
    return Entry(
        container_id=request.container_id,
        cni_ifname=request.ifname,
        ifname=ifname,
        network=request.name,
        definition=network.name,
        pod=pod,
        netns=request.netns,
        netns_inode=netns_inode(netns),
        ifindex=nic.ifindex or 0,
        mac=derived_or_given_mac(nic, ifname),
        mode=network.mode,
        lower="",
        lower_ifindex=0,
        mtu=network.mtu or 0,
        queues=network.queues,
        antispoof=network.held_to,
        handoff=network.handoff,
        bandwidth=nic.bandwidth,
        addressing=addressing,
        delegation=delegation,
        pod_uid=request.args.get("K8S_POD_UID", ""),
    )


def _delegation(
    request: Request, network: Network, ifname: str = "", ips: Sequence[str] = ()
) -> Delegation:
    """The call of the network's IPAM plugin; of the whole network, not of a NIC, without a name.

    Leases go by the network's own name, not by that of the conflist that asks for it: the pod's
    other plugins may have the same IPAM plugin give addresses of another network.
    """
    config = delegated_config(request.config, name=network.name, ipam=network.ipam or {}, ips=ips)
    return Delegation(
        config=config,
        path=request.path,
        container_id=request.container_id,
        ifname=ifname,
        netns=request.netns,
        args=";".join(f"{key}={value}" for key, value in request.args.items()),
    )


def _add_to(result: dict[str, object], entry: Entry, request: Request) -> None:
    """Tell of the NIC, and of the guest's addresses: they are on no interface of the pod."""
    index = add_interface(
        result, name=entry.ifname, mac=entry.mac, sandbox=request.netns, mtu=entry.mtu
    )
    given = entry.addressing
    if given is None:
        return
    for address in given.addresses:
        add_ip(result, address=address.address, gateway=address.gateway, interface=index)
    # Routes and name servers are a result's, not an interface's: behind another plugin they would
    # be taken for the pod's own.
    if request.prev_result is None:
        told = addressing_to_object(given)
        result |= {key: told[key] for key in ("routes", "dns") if told[key]}


def _release_unrecorded(request: Request, node: Node, *, is_there: bool) -> None:
    """Have the IPAM plugin release what the ledger does not know of (SPEC section 4).

    `is_there` says whether the pod's namespace is; for another path plugins have only an error.
    """
    # A definition that is wrong by now, or a plugin that is not there, has given nothing.
    with suppress(InvalidNetworkConfig, IoFailure):
        network = configured_network(request.config, node.networks_dir)
        if network is not None and network.ipam is not None:
            delegation = _delegation(request, network, request.ifname)
            if not is_there:
                delegation = replace(delegation, netns="")
            ipam_del(delegation, host_process=node.host_process)


def _collect_addresses(request: Request, node: Node, valid: set[tuple[str, str]]) -> None:
    network = configured_network(request.config, node.networks_dir)
    if network is None or network.ipam is None:
        return
    # What is left in the ledger is valid too: other configurations may ask for the same network.
    kept = {
        (it.container_id, it.ifname)
        for it in node.ledger.entries()
        if it.definition == network.name
    }
    ipam_gc(_delegation(request, network), valid | kept, host_process=node.host_process)


def _former_names(
    request: Request, wanted: int, held: Held, pod: Pod, node: Node
) -> dict[str, list[str]]:
    """Clear what an earlier ADD of this attachment left; give the names it had, by network.

    An intent, or fewer NICs than are `wanted`, is the trace of an ADD that was killed. A finished
    entry whose link is gone lost it with its NIC. What is whole, in whichever namespace, was asked
    for twice.
    """
    entries = [entry for entry in held.entries() if entry.cni_ifname == request.ifname]
    added = [entry for entry in entries if not entry.hotplugged]
    whole = [entry for entry in added if entry.done and has_node(entry.ifindex)]
    if len(whole) >= wanted:
        raise NameTaken(
            f"container {request.container_id} has this attachment already:"
            f" {', '.join(f'{entry.ifname} in {entry.netns}' for entry in whole)}",
            "delete it first (DEL)",
        )
    for entry in entries:
        _detach(entry, held, pod, node)
    if entries:
        sweep(pod)
    former: dict[str, list[str]] = {}
    # As they were made: macvtap2 before macvtap10.
    for entry in sorted(added, key=lambda entry: (len(entry.ifname), entry.ifname)):
        former.setdefault(entry.definition, []).append(entry.ifname)
    return former


def _detach(entry: Entry, held: Held, pod: Pod | None, node: Node) -> None:
    """Unmake the attachment: in `pod`, where the thread stands, if it was made there.

    Raises OutOfReach if its namespace lives but cannot be reached.
    """
    if pod is not None and netns_inode(pod.netns) == entry.netns_inode:
        detach(entry, held=held, pod=pod, host_process=node.host_process)
    else:
        detach_wherever(entry, held=held, host_process=node.host_process)


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
    given = entry.addressing.addresses if entry.addressing is not None else ()
    ips = fields.get_objects(request.prev_result or {}, "ips", where="prevResult") or []
    addresses = {fields.get_str(ip, "address") for ip in ips}
    missing = [address.address for address in given if address.address not in addresses]
    compared += [("address", address, "missing") for address in missing]
    return [
        f"{entry.ifname}: {what} is {found!r} in prevResult, ADD made it {made!r}"
        for what, made, found in compared
        if found != made
    ]
