"""A guest's side of a macvtap, sent through by hand, and an ear on the switch outside."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from extbridge.demo.lab import Lab, Nic, within
from extbridge.kernel.antispoof import Guard
from extbridge.kernel.checksums import hold_checksums
from extbridge.kernel.links import Macvtap, create_macvtap, find_link, set_mac, set_up
from extbridge.kernel.netlink import NETLINK_ROUTE, Netlink
from extbridge.kernel.silence import silence
from extbridge.kernel.taps import open_tap, unused_ifindex
from extbridge.network.definition import Mode
from tests.kernel.frames import ARP, ARP_OF_IPV4, MAC, OWN, OWN4, Kinds, ethernet

# struct virtio_net_hdr, before each frame; with nothing to offload it is zeros.
VNET_HEADER = 10
PLAIN = bytes(VNET_HEADER)

FRAMES = 1000

_SO_RCVBUFFORCE = 33


@dataclass(frozen=True, slots=True)
class Guest:
    """A guest's side of its NIC, and an ear on the switch's port that the node is plugged into."""

    pod: str
    ifindex: int
    tap: int
    ear: socket.socket

    def send(self, frame: bytes, header: bytes = PLAIN) -> None:
        os.write(self.tap, header + frame)


@contextmanager
def attached(
    lab: Lab, nic: Nic, pod: str, guard: Guard | None, mode: Mode = Mode.VEPA
) -> Iterator[Guest]:
    """A macvtap of ours in the pod, held to `guard`, and its tap opened."""
    ifindex = unused_ifindex()
    ear = lab.packets(lab.switch, nic.port)
    ear.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 1 << 24)
    with ExitStack() as stack:
        netns = os.open(pod, os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, netns)
        host = stack.enter_context(Netlink(NETLINK_ROUTE))
        lower = find_link(host, name=nic.name)
        assert lower is not None
        create_macvtap(
            host, Macvtap(ifindex, "net1", MAC, mode, lower.ifindex, mtu=None, queues=1), netns
        )
        with within(pod), Netlink(NETLINK_ROUTE) as route:
            if mode == Mode.PASSTHRU:
                set_mac(route, ifindex, MAC)
            silence(ifindex, "net1", guard)
            if guard is not None:
                hold_checksums(route, ifindex)
            set_up(route, ifindex, alias="")
            link = find_link(route, ifindex=ifindex)
            assert link is not None
        [tap] = open_tap(link, MAC)
        stack.callback(os.close, tap)
        yield Guest(pod, ifindex, tap, ear)


def passed(guest: Guest, frames: Iterable[bytes], header: bytes = PLAIN) -> list[bytes]:
    """Those frames of the guest that left the node, in order."""
    heard: list[bytes] = []
    # So few that neither the tap's nor the ear's buffer runs over.
    waiting = list(frames)
    while waiting:
        for frame in waiting[:50]:
            guest.send(frame, header)
        del waiting[:50]
        heard += heard_until_sentinel(guest)
    return heard


def heard_until_sentinel(guest: Guest) -> list[bytes]:
    """What left the node before an honest frame that is sent now."""
    sentinel = ethernet(ARP, ARP_OF_IPV4 + OWN + OWN4[0] + bytes(10) + os.urandom(16))
    guest.send(sentinel)
    heard: list[bytes] = []
    guest.ear.settimeout(10)
    while True:
        data, address = guest.ear.recvfrom(1 << 17)
        if data == sentinel:
            return heard
        if address[2] != socket.PACKET_OUTGOING:
            heard.append(data)


def frames_of(kinds: Kinds, number: int = FRAMES) -> Iterator[tuple[str, list[bytes]]]:
    """So many frames of each kind, the same ones each time."""
    for kind, make in kinds.items():
        rng = random.Random(kind)  # noqa: S311 - what is wanted is the same each time
        yield kind, [make(rng) for _ in range(number)]
