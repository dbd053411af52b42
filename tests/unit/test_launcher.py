"""A VM's command line with its NICs written into it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extbridge.handoff import Tap
from extbridge.network.addresses import Address, Addressing
from extbridge.node.launcher import render_command
from extbridge.spec.errors import InvalidEnvironment

NET1 = Tap("vm", name="net1", mac="52:54:00:00:00:01", mtu=1500, fds=(5,), vhost_fds=())
NET3 = replace(
    NET1,
    name="net3",
    addressing=Addressing(
        (Address("192.0.2.7/24", "192.0.2.1"), Address("2001:db8::7/64")),
        dns={"nameservers": ["192.0.2.53", "2001:db8::53"]},
    ),
)
NET2 = Tap("vm", name="net2", mac="52:54:00:00:00:02", mtu=9000, fds=(6, 7), vhost_fds=(8, 9))


def test_one_queue_without_vhost() -> None:
    """The simplest NIC is one fd and one device, with the MAC and the MTU that ADD gave it."""
    assert render_command(["qemu"], [NET1]) == [
        "qemu",
        "-netdev",
        "tap,id=extbridge0,fd=5",
        "-device",
        "virtio-net-pci,netdev=extbridge0,mac=52:54:00:00:00:01,host_mtu=1500",
    ]


def test_queues_and_vhost() -> None:
    """Several queues come with their vectors, and vhost with an fd for each of them."""
    assert render_command(["qemu", "-m", "1G"], [NET1, NET2])[-4:] == [
        "-netdev",
        "tap,id=extbridge1,fds=6:7,vhost=on,vhostfds=8:9",
        "-device",
        "virtio-net-pci,netdev=extbridge1,mac=52:54:00:00:00:02,host_mtu=9000,mq=on,vectors=6",
    ]


def test_model_that_is_not_virtio_gets_what_it_understands() -> None:
    """A device without MTU and queues of its own is not given them."""
    assert render_command(["qemu"], [NET2], model="e1000")[-1] == (
        "e1000,netdev=extbridge0,mac=52:54:00:00:00:02"
    )


def test_one_placeholder_is_enough_to_have_none_appended() -> None:
    """Who writes a NIC's options writes them all: none come twice."""
    given = ["qemu", "-netdev", "tap,fds={net2.fds},vhostfds={net2.vhostfds}", "{net2.queues}"]
    assert render_command(given, [NET1, NET2]) == ["qemu", "-netdev", "tap,fds=6:7,vhostfds=8:9",
                                                   "2"]  # fmt: skip


def test_guests_addresses_can_be_written_into_its_command() -> None:
    """A guest that takes its address from its kernel's command line gets it there."""
    asked = [
        "{net3.ip}::{net3.gateway}:{net3.netmask}",
        "{net3.prefix}",
        "{net3.ips}",
        "{net3.dns}",
    ]
    assert render_command(asked, [NET1, NET3]) == [
        "192.0.2.7::192.0.2.1:255.255.255.0",
        "24",
        "192.0.2.7/24,2001:db8::7/64",
        "192.0.2.53,2001:db8::53",
    ]


@pytest.mark.parametrize(
    ("argument", "told", "hint"),
    [
        ("{net9.fd}", "there is no NIC net9", "net1, net2"),
        ("{net2.fd}", "net2 has 2 queues", "{net2.fds}"),
        ("{net1.vhostfds}", "no vhost-net", "vhost=on"),
        ("{net1.adress}", "a NIC has no adress", "mac"),
        ("{net1.ip}", "net1 has none", "ipam"),
        ("{net1.dns}", "net1 has none", "ipam"),
    ],
)
def test_placeholder_that_cannot_be_filled_is_explained(
    argument: str, told: str, hint: str
) -> None:
    """What cannot be filled is refused before QEMU starts, with what to write instead."""
    with pytest.raises(InvalidEnvironment, match=told) as caught:
        render_command(["qemu", f"a={argument}"], [NET1, NET2])
    assert argument in caught.value.message
    assert hint in caught.value.hint


OTHERS_WORDS = st.text().filter(lambda text: "{net1." not in text)


@given(st.lists(OTHERS_WORDS | st.from_regex(r"[{]drive\.[a-e]+[}]", fullmatch=True), min_size=1))
def test_everything_else_reaches_the_command_unchanged(argv: list[str]) -> None:
    """Arguments that are none of ours - JSON, braces, anything - stay what they are."""
    assert render_command(argv, [NET1])[: len(argv)] == argv
