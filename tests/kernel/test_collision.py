"""Each VM gets its own NIC, although the kernel names taps by a number that repeats (promise 2)."""

from __future__ import annotations

import fcntl
import os
import select
import socket
import struct
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from extbridge.demo.lab import Lab, Nic, receive, run
from extbridge.handoff import Tap, take_taps
from extbridge.kernel.links import FIRST_IFINDEX, GROUP
from extbridge.kernel.netns import opened_netns
from extbridge.ledger import Entry, Holder, Ledger
from extbridge.spec.errors import WrongTap
from tests.kernel.observe import frame, make_macvtap, packed
from tests.support import Cni, network_config, show_link

SIOCGIFHWADDR = 0x8927
SIOCSIFHWADDR = 0x8924
OUTSIDE_MAC = "52:54:00:00:00:99"

# struct virtio_net_hdr, before each frame of a tap with IFF_VNET_HDR.
VNET_HEADER = bytes(10)


@dataclass(frozen=True, slots=True)
class Vm:
    """A pod with its attachment, and the switch port of the NIC that it is on."""

    nic: Nic
    pod: str
    mac: str
    port: socket.socket


def test_plain_macvtaps_share_a_device_node(lab: Lab) -> None:
    """The hazard is there: the kernel gives two pods' macvtaps one number and so one /dev/tap2."""
    nic = lab.nic()
    macs = ["52:54:00:00:00:01", "52:54:00:00:00:02"]
    pods = [lab.pod("a"), lab.pod("b")]
    for pod, mac in zip(pods, macs, strict=True):
        make_macvtap(nic, "net1", pod, mac)
    assert [show_link("net1", pod)["ifindex"] for pod in pods] == [2, 2]
    with open("/dev/tap2", "r+b", buffering=0) as tap:
        assert mac_behind(tap.fileno()) in macs
        tap.write(VNET_HEADER + frame(OUTSIDE_MAC, macs[1], b"second's"))
        # Whichever VM it is: the other, which was told the same number, speaks with its NIC.
        assert [show_link("net1", pod)["stats64"]["tx"]["packets"] for pod in pods].count(0) == 1
