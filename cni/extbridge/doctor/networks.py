"""The networks that are defined on the node, and the NICs that are to carry them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from extbridge.doctor.finding import Finding, Level, failure, ok, warning
from extbridge.kernel.links import Link
from extbridge.kernel.mac_filters import mac_filters
from extbridge.kernel.netlink import NETLINK_ROUTE, Netlink
from extbridge.ledger import Ledger
from extbridge.network.definition import Mode, Network
from extbridge.network.store import list_networks, load_network
from extbridge.nics import judged_nics, usable_nics
from extbridge.spec.errors import CniError, NicBusy

_CABLE = "check the cable and the switch port"


def read_networks(directory: str) -> tuple[Mapping[str, Network], list[Finding]]:
    """The networks that the folder defines, and what is to be said of the definitions."""
    networks, findings = {}, []
    try:
        names = list_networks(directory)
    except OSError as error:
        return {}, [
            failure("networks", f"{directory}: {error.strerror}", "it has to be a readable folder")
        ]
    for name in names:
        try:
            networks[name] = load_network(name, directory)
        except CniError as error:
            findings.append(
                failure(f"network {name}", error.message, error.hint or "mend the definition")
            )
    if not names:
        findings.append(
            warning(
                "networks",
                f"none is defined in {directory}",
                f"write {directory}/NAME.yaml, unless each network stands in a CNI configuration",
            )
        )
    return networks, findings


def check_nics(networks: Mapping[str, Network], ledger: Ledger) -> Iterator[Finding]:
    """Whether each network has a NIC that can carry one more VM, and what each NIC is like."""
    seen: dict[int, Link] = {}
    with Netlink(NETLINK_ROUTE) as host:
        for network in networks.values():
            judged = judged_nics(host, network, ledger)
            seen |= {link.ifindex: link for link, _ in judged}
            yield from _check_network(host, network, judged, ledger)
        for link in seen.values():
            yield from _check_filters(host, link, ledger)


def _check_network(
    host: Netlink, network: Network, judged: list[tuple[Link, CniError | None]], ledger: Ledger
) -> Iterator[Finding]:
    subject = f"network {network.name}"
    if not judged:
        try:
            usable_nics(host, network, ledger)
        except CniError as error:
            yield failure(subject, error.message, error.hint or "name a NIC that is there")
        return
    # Of a pool, one that works is enough.
    works = any(fault is None and link.carrier for link, fault in judged)
    level = Level.WARNING if works else Level.FAILURE
    for name in network.dev.names:
        if all(link.name != name for link, _ in judged):
            what = f"extbridge.dev: the node has no NIC {name!r}"
            yield Finding(subject, level, what, "name a NIC that is there, or leave it out")
    for link, fault in judged:
        of = f"{subject}, NIC {link.name}"
        if isinstance(fault, NicBusy):
            # That passthru has no NIC left is how it is meant to be.
            yield warning(of, fault.message, "another VM needs another NIC")
        elif fault is not None:
            yield Finding(of, level, fault.message, fault.hint or "free the NIC, or name another")
        elif not link.carrier:
            yield Finding(of, level, f"{link.name} has no carrier", _CABLE)
        else:
            yield ok(of, f"up, with carrier, MTU {link.mtu}")


def _check_filters(host: Netlink, link: Link, ledger: Ledger) -> Iterator[Finding]:
    subject = f"NIC {link.name}"
    filters = mac_filters(host, link.ifindex)
    attached = [entry for entry in ledger.entries() if entry.lower_ifindex == link.ifindex]
    what = (
        f"{len(attached)} attachments; its filters hold {filters.unicast} MACs besides its own and"
        f" {filters.multicast} groups"
    )
    meant = link.master or any(entry.mode == Mode.PASSTHRU for entry in attached)
    if link.promiscuity and not meant:
        yield warning(
            subject,
            f"promiscuous: every frame on the wire costs this node time; {what}",
            "if nobody listens (tcpdump), its filters are full, or it has none for MACs: put fewer"
            " VMs on it, or use another kind of NIC",
        )
    else:
        yield ok(subject, what)
