"""The NICs of the node that can carry a network: the one it names, or those of a pool, best first.

The order is the same each time for the same node: NICs with carrier first, then the least used,
then as the definition lists them or by name. A passthru macvtap needs a NIC for itself, so there
only free ones are left; and no other macvtap can join one.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from fnmatch import fnmatchcase

from extbridge.kernel.links import (
    Link,
    default_route_links,
    driver_of,
    find_link,
    list_links,
)
from extbridge.kernel.netlink import Netlink
from extbridge.kernel.taps import has_node
from extbridge.ledger import Entry, Ledger
from extbridge.network.definition import Mode, Network, NicSelector
from extbridge.spec.errors import CniError, InvalidNetworkConfig, NicBusy, TryAgainLater

# Links that carry others' frames to their own master; macvtap cannot take its place beside it
# (netdev_rx_handler_register answers EBUSY).
_MASTERS_THAT_TAKE_ALL = ("bridge", "bond", "team", "openvswitch")


def usable_nics(host: Netlink, network: Network, ledger: Ledger) -> list[Link]:
    """The NICs that can carry one more macvtap of the network, the one to take first.

    `host` is a socket of the node's namespace, where the thread stands too. What the kernel would
    refuse is refused here, in words: raises InvalidNetworkConfig, NicBusy and TryAgainLater.
    """
    match network.dev.names:
        case (name,):
            lower = find_link(host, name=name)
            if lower is None:
                raise InvalidNetworkConfig(
                    f"extbridge.dev: the node has no NIC {name!r}", f"it has {_present(host)}"
                )
            _refuse_unfit(host, lower, network)
            return [lower]
    judged = judged_nics(host, network, ledger)
    if not judged:
        raise InvalidNetworkConfig(
            f"extbridge.dev: the node has no NIC with {_described(network.dev)}",
            f"it has {_present(host)}",
        )
    usable = [link for link, fault in judged if fault is None]
    if not usable:
        raise _none_usable(network, [fault for _, fault in judged if fault is not None])
    attachments = _attachments_by_nic(ledger)
    # Stable: what is alike otherwise stays in the order of the candidates.
    return sorted(usable, key=lambda link: (not link.carrier, len(attachments[link.ifindex])))


def able_nics(host: Netlink, network: Network, ledger: Ledger) -> tuple[int, set[int]]:
    """How many NICs the network is defined on, and the ifindexes of those that can carry it.

    Without carrier a NIC cannot, as STATUS has it. One that attachments of the network itself have
    taken can. `host` is as for usable_nics.
    """
    named = [find_link(host, name=name) for name in network.dev.names]
    links = [link for link in named if link is not None] if named else _selected(host, network.dev)
    others: defaultdict[int, list[Entry]] = defaultdict(list)
    for ifindex, entries in _attachments_by_nic(ledger).items():
        others[ifindex] = [entry for entry in entries if entry.definition != network.name]
    able = set()
    for link in links:
        with suppress(CniError):
            _refuse_unfit(host, link, network)
            _refuse_taken(link, network, others[link.ifindex])
            if link.carrier:
                able.add(link.ifindex)
    return len(network.dev.names) or len(links), able


def holders_of(lower_ifindex: int, entries: Iterable[Entry]) -> str:
    """Who is on the NIC, in words."""
    return (
        ", ".join(
            f"{entry.ifname} ({entry.mode}) of {entry.pod or entry.container_id}"
            for entry in entries
            if entry.lower_ifindex == lower_ifindex
        )
        or "a link that extbridge did not make"
    )


def judged_nics(
    host: Netlink, network: Network, ledger: Ledger
) -> list[tuple[Link, CniError | None]]:
    """Every NIC that the network names or selects, and why it can carry no macvtap more.

    `host` is as for usable_nics.
    """
    attachments = _attachments_by_nic(ledger)
    judged: list[tuple[Link, CniError | None]] = []
    for link in _selected(host, network.dev):
        try:
            _refuse_unfit(host, link, network)
            _refuse_taken(link, network, attachments[link.ifindex])
        except CniError as fault:
            judged.append((link, fault))
        else:
            judged.append((link, None))
    return judged


def _selected(host: Netlink, dev: NicSelector) -> list[Link]:
    links = list_links(host)
    if dev.names:
        by_name = {link.name: link for link in links}
        return [by_name[name] for name in dev.names if name in by_name]
    routed = default_route_links(host) if dev.route is not None else set()
    # By name, numbers as such: eth2 before eth10.
    return sorted(
        (link for link in links if _matches(link, dev, routed)),
        key=lambda link: [int(it) if it.isdigit() else it for it in re.split(r"(\d+)", link.name)],
    )


def _matches(link: Link, dev: NicSelector, routed: Collection[int]) -> bool:
    """Whether the link is all that the selector says; macvtaps on a NIC are never meant."""
    tests: list[tuple[str | None, Callable[[str], bool]]] = [
        (dev.match, lambda pattern: fnmatchcase(link.name, pattern)),
        (dev.pci, lambda address: link.pci == address),
        (dev.mac, lambda mac: mac == (link.permanent_mac or link.mac)),
        (dev.driver, lambda driver: driver_of(link.name) == driver),
        (dev.route, lambda _: link.ifindex in routed),
    ]
    return (
        link.ethernet
        and not link.loopback
        and link.kind not in ("macvtap", "macvlan")
        and all(test(wanted) for wanted, test in tests if wanted is not None)
    )


def _refuse_unfit(host: Netlink, lower: Link, network: Network) -> None:
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
            f"extbridge.dev: {lower.name} {unfit}",
            "extbridge needs an Ethernet NIC of its own or a bridge",
        )
    if network.mtu is not None and network.mtu > lower.mtu:
        raise InvalidNetworkConfig(
            f"mtu: {network.mtu} is more than the {lower.mtu} of {lower.name}",
            f"give at most {lower.mtu}, or raise the NIC's",
        )
    if not lower.up:
        raise TryAgainLater(f"extbridge.dev: {lower.name} is down", f"ip link set {lower.name} up")


def _refuse_taken(lower: Link, network: Network, attached: list[Entry]) -> None:
    alone = network.mode is Mode.PASSTHRU
    if attached and (alone or any(entry.mode == Mode.PASSTHRU for entry in attached)):
        raise NicBusy(f"{lower.name} is taken by {holders_of(lower.ifindex, attached)}")


def _none_usable(network: Network, faults: list[CniError]) -> CniError:
    """One error for all of a pool; its kind is that of the NIC that is nearest to being usable."""
    told = "; ".join(fault.message for fault in faults)
    order = (TryAgainLater, NicBusy, InvalidNetworkConfig)
    kind = next(kind for kind in order if any(isinstance(fault, kind) for fault in faults))
    return kind(
        f"network {network.name}: none of its {len(faults)} NICs can be used: {told}",
        "free one of them, or give the network another",
    )


def _attachments_by_nic(ledger: Ledger) -> Mapping[int, list[Entry]]:
    found: defaultdict[int, list[Entry]] = defaultdict(list)
    for entry in ledger.entries():
        # One that is still to be released may have no link any more.
        if has_node(entry.ifindex):
            found[entry.lower_ifindex].append(entry)
    return found


def _described(dev: NicSelector) -> str:
    if dev.names:
        return f"the names {', '.join(dev.names)}"
    said = (("match", dev.match), ("pci", dev.pci), ("driver", dev.driver), ("mac", dev.mac))
    told = [f"{key} {value}" for key, value in (*said, ("route", dev.route)) if value is not None]
    return " and ".join(told)


def _present(host: Netlink) -> str:
    return ", ".join(
        link.name
        for link in list_links(host)
        if link.ethernet and not link.loopback and not link.master
    )
