"""The broker: gives the process that asks the taps of the namespace it stands in, and no others.

Nothing is believed but the kernel: who asks, where it stands, which links are there, what is behind
a device node. What a request says only shapes the command that goes back.
"""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Final

from extbridge.handoff import Tap, take_taps
from extbridge.kernel.netns import is_own
from extbridge.ledger import Holder, Ledger
from extbridge.network.addresses import addressing_to_object
from extbridge.node import wire
from extbridge.node.launcher import DEFAULT_MODEL, MODEL_VARIABLE, render_command
from extbridge.node.peers import Peer, gone, peers_netns, pidfd_of
from extbridge.spec.errors import InvalidEnvironment, NotPermitted

IFNAMES_VARIABLE: Final = "EXTBRIDGE_IFNAMES"


@dataclass(frozen=True, slots=True)
class Lease:
    """The life of a process that took taps; `pidfd` is its owner's to close."""

    holder: Holder
    container_ids: frozenset[str]
    pidfd: int


@dataclass(frozen=True, slots=True)
class HandOff:
    """What goes to a launcher: frames with fds, which `owned` closes, and the lease on them."""

    frames: list[wire.Sending]
    lease: Lease
    taps: int
    owned: ExitStack


def hand_off(peer: Peer, request: wire.Request, ledger: Ledger) -> HandOff:
    """Open the taps of the namespace in which the peer stands, and write its command.

    Raises NotPermitted, UnknownContainer, TapHeld, WrongTap, InvalidEnvironment and OSError; then
    nothing is open, and nothing is held that was not before.
    """
    if request.body.count(b"\0") > wire.MAX_ARGUMENTS:
        raise InvalidEnvironment(
            f"the command has more than {wire.MAX_ARGUMENTS} arguments",
            "QEMU reads options from a file too (-readconfig)",
        )
    with ExitStack() as owned:
        with peers_netns(peer) as netns:
            if is_own(netns):
                raise NotPermitted(
                    "the process that asks stands in the node's own network namespace",
                    "a hostNetwork pod has no NIC of its own; run the VM in a pod that has",
                )
            holder = _holder(peer)
            ifnames = tuple(filter(None, request.environ.get(IFNAMES_VARIABLE, "").split(",")))
            taps = owned.enter_context(take_taps(netns, holder, ledger=ledger, ifnames=ifnames))
        command = _command(request, _renumbered(taps))
        fds = [fd for tap in taps for fd in (*tap.fds, *tap.vhost_fds)]
        frames = [wire.Sending(*frame) for frame in wire.encode_tap_answer(fds, command)]
        lease = Lease(holder, frozenset(tap.container_id for tap in taps), os.dup(peer.pidfd))
        return HandOff(frames, lease, len(taps), owned.pop_all())


def leases_of(ledger: Ledger) -> list[Lease]:
    """The leases that the ledger tells of and that still live; their pidfds are the caller's."""
    containers: dict[Holder, set[str]] = {}
    for entry in ledger.entries():
        if entry.holder is not None:
            containers.setdefault(entry.holder, set()).add(entry.container_id)
    found = []
    for holder, container_ids in containers.items():
        pidfd = pidfd_of(holder.pid)
        if pidfd is None:
            continue
        # Asked after the opening, so that the pidfd is of the process that was meant.
        if holder.alive():
            found.append(Lease(holder, frozenset(container_ids), pidfd))
        else:
            os.close(pidfd)
    return found


def _holder(peer: Peer) -> Holder:
    try:
        holder = Holder.of(peer.pid)
    except ProcessLookupError as error:
        raise gone(peer.pid) from error
    # As in peers_netns: the start time could have been a successor's.
    if not peer.lives():
        raise gone(peer.pid)
    return holder


def _command(request: wire.Request, taps: list[Tap]) -> list[str]:
    argv = wire.decode_strings(request.body)
    if argv:
        model = request.environ.get(MODEL_VARIABLE) or DEFAULT_MODEL
        command = render_command(argv, taps, model=model)
    else:
        # A launcher that execs nothing wants to know what it got.
        command = [json.dumps([describe(tap) for tap in taps])]
    if sum(len(os.fsencode(argument)) + 1 for argument in command) > wire.MAX_TAP_REQUEST_BYTES:
        raise InvalidEnvironment(
            f"the command is longer than {wire.MAX_TAP_REQUEST_BYTES} bytes", "shorten it"
        )
    return command


def describe(tap: Tap) -> dict[str, object]:
    """A tap as JSON for a launcher of its own kind; the numbers are the wire's."""
    return {
        "name": tap.name,
        "mac": tap.mac,
        "mtu": tap.mtu,
        "fds": tap.fds,
        "vhostFds": tap.vhost_fds,
        "addressing": addressing_to_object(tap.addressing),
    }


def _renumbered(taps: list[Tap]) -> list[Tap]:
    """The same taps with the numbers that their fds will have at the launcher."""
    number = iter(range(wire.FIRST_TAP_FD, 1 << 20))
    return [
        replace(
            tap,
            fds=tuple(next(number) for _ in tap.fds),
            vhost_fds=tuple(next(number) for _ in tap.vhost_fds),
        )
        for tap in taps
    ]
