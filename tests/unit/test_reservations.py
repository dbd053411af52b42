"""Reserved ifindexes: the same each time, and nobody else's."""

from __future__ import annotations

import pytest

from extbridge.kernel.taps import unused_ifindex
from extbridge.network.definition import FIRST_DEVICE, FIRST_IFINDEX, LAST_IFINDEX
from extbridge.reservations import DEVICES, Reservations
from extbridge.spec.errors import InvalidNetworkConfig, TryAgainLater

# Two names that lead to the same numbers on the node `node`.
MEETING = ("net1144", "net2046")


def test_numbers_are_the_same_each_time() -> None:
    """What kubelet remembers of a network's devices is right whatever has been restarted."""
    before = Reservations("node").define(["blue", "red"])
    assert Reservations("node").define(["red"])["red"] == before["red"]
    assert Reservations("node").define(["green", "blue"])["blue"] == before["blue"]


def test_nodes_of_one_kernel_do_not_meet() -> None:
    """Two nodes that are containers on one machine have one /dev, so their numbers differ."""
    here, there = (Reservations(node).define(["blue"])["blue"] for node in ("here", "there"))
    assert not set(here) & set(there)


def test_networks_do_not_share_a_number() -> None:
    """However many networks there are, each has its own numbers, in the range that is kept."""
    blocks = Reservations("node").define([f"net{number}" for number in range(3000)])
    numbers = [ifindex for block in blocks.values() for ifindex in block]
    assert len(numbers) == len(set(numbers)) == 3000 * DEVICES
    assert FIRST_DEVICE <= min(numbers) <= max(numbers) <= LAST_IFINDEX


def test_networks_that_meet_come_apart_the_same_way() -> None:
    """Where two networks' numbers would be the same, who gets which does not depend on who came."""
    first, second = MEETING
    alone = [Reservations("node").define([name])[name] for name in MEETING]
    assert alone[0] == alone[1]
    together = Reservations("node").define([first, second])
    assert together == Reservations("node").define([second, first])
    assert not set(together[first]) & set(together[second])


def test_others_never_get_a_reserved_number() -> None:
    """An attachment that is no device's is made outside of the range that is kept for those."""
    assert all(FIRST_IFINDEX <= unused_ifindex() < FIRST_DEVICE for _ in range(1000))


def test_number_is_one_attachments() -> None:
    """Two pods that come with one number at the same moment do not both get a NIC."""
    reservations = Reservations("node")
    device = reservations.define(["blue"])["blue"][7]
    with (
        reservations.claimed("blue", device),
        pytest.raises(TryAgainLater, match="another NIC is just made"),
        reservations.claimed("blue", device),
    ):
        pytest.fail("both got it")
    with reservations.claimed("blue", device):
        pass


def test_number_of_no_network_is_refused() -> None:
    """The refusal says whose the number is, and what is to be asked for instead."""
    reservations = Reservations("node")
    blocks = reservations.define(["blue", "red"])
    for network, ifindex, told in (
        ("blue", blocks["red"][0], "one of network red's and none of blue's"),
        ("blue", FIRST_IFINDEX, "no network's and none of blue's"),
        ("green", blocks["red"][0], "no devices of network green"),
    ):
        with (
            pytest.raises(InvalidNetworkConfig, match=told) as refused,
            reservations.claimed(network, ifindex),
        ):
            pytest.fail("it was claimed")
        assert refused.value.hint
    reservations.define(["red"])
    with (
        pytest.raises(InvalidNetworkConfig, match="broken, or gone"),
        reservations.claimed("blue", blocks["blue"][0]),
    ):
        pytest.fail("it was claimed")
