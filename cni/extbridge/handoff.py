"""The hand-off: the taps of one namespace, opened for one process.

Who may have them is the caller's to establish; that they are the right ones, and that nobody else
has them, is established here.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Final

from extbridge.attachment import container_of
from extbridge.kernel.links import Link, list_our_links
from extbridge.kernel.netlink import NETLINK_ROUTE, Netlink
from extbridge.kernel.netns import inside, netns_inode
from extbridge.kernel.taps import open_tap, open_vhost
from extbridge.ledger import Entry, Held, Holder, Ledger
from extbridge.network.addresses import Addressing
from extbridge.network.definition import Handoff
from extbridge.spec.errors import NotPermitted, TapHeld, UnknownContainer

MAX_LINKS: Final = 256
"""Macvtaps that a namespace may have, of whatever origin; with more it gets no taps."""


@dataclass(frozen=True, slots=True)
class Tap:
    """One NIC of a VM, ready for QEMU; whoever has the object owns its fds.

    `container_id` is that of the pod's sandbox.
    `fds` has one fd a queue, `vhost_fds` as many or none. `addressing` is the guest's, where the
    network or the pod says it.
    """

    container_id: str
    name: str
    mac: str
    mtu: int
    fds: tuple[int, ...]
    vhost_fds: tuple[int, ...]
    addressing: Addressing = field(default_factory=Addressing)


@contextmanager
def take_taps(
    netns: int, holder: Holder, *, ledger: Ledger, ifnames: tuple[str, ...] = ()
) -> Iterator[list[Tap]]:
    """Open the taps of the namespace for `holder`, all or those named; closed after the block.

    All are those that are not handed over as devices. To pass them on, exec or send the fds inside
    the block; if that fails, they are free again.
    Raises UnknownContainer if the namespace has no such NIC, TapHeld if a living process has it,
    WrongTap if the node is another's, NotPermitted if it has more links than MAX_LINKS.
    """
    links = _links_in(netns)
    missing = sorted(set(ifnames) - {link.name for link in links})
    if missing or not links:
        asking = "the pod gets one by the annotation extbridge.io/networks, or by Multus"
        present = ", ".join(link.name for link in links)
        raise UnknownContainer(
            f"the namespace has no NIC {', '.join(missing)} of extbridge"
            if missing
            else "the namespace has no NIC of extbridge",
            f"it has {present}" if present else asking,
        )
    with ExitStack() as undo, ExitStack() as closing:
        taps: list[Tap] = []
        devices: list[Link] = []
        for link in links:
            if ifnames and link.name not in ifnames:
                continue
            container_id = _container_here(link, netns, ledger)
            with ledger.hold(container_id) as held:
                entry = _entry_of(link, netns, held)
                if entry.handoff == Handoff.DEVICE:
                    devices.append(link)
                    continue
                _refuse_held(entry, holder)
                fds = open_tap(link, entry.mac)
                closing.callback(_close, fds)
                vhost_fds = open_vhost(entry.queues)
                closing.callback(_close, vhost_fds)
                held.write(replace(entry, holder=holder))
            # What it had before, it keeps.
            if entry.holder != holder:
                undo.callback(free_taps, holder, {container_id}, ledger=ledger, ifname=entry.ifname)
            taps.append(
                Tap(
                    entry.container_id,
                    link.name,
                    entry.mac,
                    entry.mtu,
                    tuple(fds),
                    tuple(vhost_fds),
                    entry.addressing or Addressing(),
                )
            )
        if devices and (ifnames or not taps):
            raise TapHeld(
                f"the tap of {devices[0].name} is handed over as the device"
                f" /dev/tap{devices[0].ifindex}",
                "its network says handoff: device; with handoff: fd, launchers get it",
            )
        yield taps
        undo.pop_all()


def free_taps(
    holder: Holder, container_ids: Collection[str], *, ledger: Ledger, ifname: str = ""
) -> None:
    """Let others have the taps of these containers that are `holder`'s: all, or the one named."""
    for container_id in container_ids:
        with ledger.hold(container_id) as held:
            for entry in held.entries():
                if entry.holder == holder and ifname in ("", entry.ifname):
                    held.write(replace(entry, holder=None))


def _links_in(netns: int) -> list[Link]:
    """What there is of ours, by name."""
    try:
        with inside(netns), Netlink(NETLINK_ROUTE) as route:
            found = list_our_links(route, at_most=MAX_LINKS)
    except OSError as error:
        if error.errno != errno.E2BIG:
            raise
        raise NotPermitted(
            f"the namespace has more than {MAX_LINKS} macvtaps",
            "delete those that ADD did not make",
        ) from error
    return sorted(found, key=lambda link: link.name)


def _container_here(link: Link, netns: int, ledger: Ledger) -> str:
    """The container whose the link is by the ledger too, looked up without its lock.

    An alias that claims another's would have whoever works for that one wait for us.
    """
    container_id = container_of(link)
    if not container_id or not any(_is_of(it, link, netns) for it in ledger.of(container_id)):
        raise _unknown(link)
    return container_id


def _is_of(entry: Entry, link: Link, netns: int) -> bool:
    # An ifindex is unique among our links only: a pod that may make links can make one that claims
    # to be another pod's, and the device node of both would be the other's.
    return (entry.ifindex, entry.netns_inode) == (link.ifindex, netns_inode(netns))


def _entry_of(link: Link, netns: int, held: Held) -> Entry:
    entry = next((it for it in held.entries() if it.done and _is_of(it, link, netns)), None)
    if entry is None:
        raise _unknown(link)
    return entry


def _refuse_held(entry: Entry, holder: Holder) -> None:
    if entry.holder is not None and entry.holder != holder and entry.holder.alive():
        raise TapHeld(
            f"the tap of {entry.ifname} is held by process {entry.holder.pid}",
            "a tap has one holder; end that process first",
        )


def _unknown(link: Link) -> UnknownContainer:
    return UnknownContainer(
        f"the ledger does not know {link.name} (ifindex {link.ifindex})",
        "without it nobody can tell who holds the tap; delete the pod and create it again",
    )


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
