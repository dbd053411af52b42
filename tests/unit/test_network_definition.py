"""What a network's definition may say, and what is said of one that is wrong."""

from __future__ import annotations

from typing import Any

import pytest

from extbridge.network.definition import (
    Antispoof,
    Bandwidth,
    Handoff,
    Mode,
    Network,
    NicSelector,
    network_to_object,
    parse_network,
)
from extbridge.spec.errors import InvalidNetworkConfig

SEED: dict[str, Any] = {"name": "vepanet", "extbridge": {"mode": "vepa", "dev": "eth0"}}
ETH0 = NicSelector(names=("eth0",))


def with_dev(dev: object) -> dict[str, Any]:
    """The seed's definition with another dev."""
    return {"name": "vepanet", "extbridge": {"dev": dev}}


def test_smallest_definition_has_the_documented_defaults() -> None:
    """A name and a NIC are enough: vepa, one queue, the NIC's MTU, a derived MAC, fds."""
    network = parse_network({"name": "vepanet", "extbridge": {"dev": "eth0"}})
    assert network == Network(
        name="vepanet",
        dev=ETH0,
        mode=Mode.VEPA,
        uuid=None,
        mtu=None,
        queues=1,
        mac=None,
        mac_prefix="52:54:00",
        antispoof=None,
        trust=False,
        bandwidth=None,
        handoff=Handoff.FD,
        ipam=None,
    )


def test_every_key_is_read() -> None:
    """All keys of the documentation's table arrive in the network, in their canonical form."""
    limits = {"ingressRate": 8000, "ingressBurst": 800, "egressRate": 0, "egressBurst": 0}
    network = parse_network(
        {
            "name": "blue",
            "uuid": "4EBD5168-6321-4757-8397-f6e83484f402",
            "extbridge": {"mode": "passthrough", "dev": ["eth1", "eth0"]},
            "mtu": 9000,
            "queues": 4,
            "mac": "02-00-00-00-00-0A",
            "macPrefix": "02-0A",
            "antispoof": "off",
            "trust": True,
            "bandwidth": limits,
            "handoff": "device",
            "ipam": {"type": "host-local", "ranges": [[{"subnet": "192.0.2.0/24"}]]},
        }
    )
    assert network == Network(
        name="blue",
        dev=NicSelector(names=("eth1", "eth0")),
        mode=Mode.PASSTHRU,
        uuid="4ebd5168-6321-4757-8397-f6e83484f402",
        mtu=9000,
        queues=4,
        mac="02:00:00:00:00:0a",
        mac_prefix="02:0a",
        antispoof=Antispoof.OFF,
        trust=True,
        bandwidth=Bandwidth(ingress_rate=8000, ingress_burst=800),
        handoff=Handoff.DEVICE,
        ipam={"type": "host-local", "ranges": [[{"subnet": "192.0.2.0/24"}]]},
    )
    assert hash(network) == hash(parse_network(network_to_object(network)))


@pytest.mark.parametrize(
    ("given", "selector"),
    [
        ("eth0", ETH0),
        (["eth0"], ETH0),
        (["eth0", "eth1"], NicSelector(names=("eth0", "eth1"))),
        ({"match": "ens*f0"}, NicSelector(match="ens*f0")),
        ({"pci": "3B:00.1"}, NicSelector(pci="0000:3b:00.1")),
        ({"pci": "10000:01:1f.7"}, NicSelector(pci="10000:01:1f.7")),
        ({"driver": "ixgbe", "match": "ens*"}, NicSelector(match="ens*", driver="ixgbe")),
        ({"mac": "02-00-00-00-00-01"}, NicSelector(mac="02:00:00:00:00:01")),
        ({"route": "default"}, NicSelector(route="default")),
    ],
)
def test_nics_are_named_listed_or_selected(given: object, selector: NicSelector) -> None:
    """A dev is a name, a list of candidates, or an object that says what to look for."""
    assert parse_network(with_dev(given)).dev == selector


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": None}, "name is missing"),
        ({"name": ""}, "name is"),
        ({"name": "../etc"}, "name is"),
        ({"name": "vepanet\n"}, "name is"),
        ({"name": "n" * 251}, "name is"),
        ({"name": 7}, "name is the number 7"),
        ({"uuid": "4ebd5168"}, "uuid is"),
        ({"uuid": "{4ebd5168-6321-4757-8397-f6e83484f402}"}, "uuid is"),
        ({"extbridge": None}, "extbridge is missing"),
        ({"extbridge": "eth0"}, "extbridge is the string"),
        ({"extbridge": {}}, "extbridge.dev is missing"),
        ({"extbridge": {"dev": "eth0", "mode": "vepaa"}}, "extbridge.mode is"),
        ({"extbridge": {"dev": "eth0", "mode": "nat"}}, "extbridge.mode is"),
        ({"extbridge": {"dev": "eth0", "mode": 1}}, "extbridge.mode is the number 1"),
        ({"extbridge": {"dev": "eth0", "vlan": 7}}, "extbridge.vlan is not a known key"),
        ({"mtu": 67}, "mtu is the number 67"),
        ({"mtu": 65536}, "mtu is the number 65536"),
        ({"mtu": "1500"}, "mtu is the string"),
        ({"mtu": 1500.0}, "mtu is the number 1500.0"),
        ({"mtu": 10**5000}, "mtu is a number"),
        ({"queues": 0}, "queues is the number 0"),
        ({"queues": 257}, "queues is the number 257"),
        ({"queues": True}, "queues is true"),
        ({"mac": "01:00:00:00:00:01"}, "mac is"),
        ({"mac": ""}, "mac is"),
        ({"macPrefix": "ff"}, "macPrefix is"),
        ({"antispoof": "ARP"}, "antispoof is"),
        ({"antispoof": False}, "antispoof is false"),
        ({"trust": "yes"}, "trust is the string"),
        ({"bandwidth": {"ingressrate": 1}}, "bandwidth.ingressrate is not a known key"),
        ({"bandwidth": {"ingressRate": -1}}, "bandwidth.ingressRate is the number -1"),
        ({"bandwidth": {"ingressRate": 1 << 63, "ingressBurst": 1}}, "bandwidth.ingressRate is"),
        ({"bandwidth": {"ingressRate": 1}}, "bandwidth.ingressRate is given without"),
        ({"bandwidth": {"egressBurst": 1}}, "bandwidth.egressBurst is given without"),
        ({"handoff": "node"}, "handoff is"),
        ({"ipam": {"subnet": "192.0.2.0/24"}}, "ipam.type is missing"),
        ({"ipam": {"type": "../../bin/sh"}}, "ipam.type is"),
        ({"ipam": {"type": ""}}, "ipam.type is"),
        ({"ipam": {"type": "t", "a": float("inf")}}, "ipam.a is a number"),
        ({"ipam": {"type": "t", "a": [10**30]}}, "ipam.a[0] is a number"),
        ({"type": "extbridge"}, "type is not a known key"),
    ],
)
def test_wrong_value_is_refused_by_its_key(changes: dict[str, Any], message: str) -> None:
    """An unknown key or bad value is code 7, and the message begins with the key."""
    with pytest.raises(InvalidNetworkConfig) as caught:
        parse_network({**SEED, **changes})
    assert caught.value.message.startswith(message)
    assert caught.value.hint


@pytest.mark.parametrize(
    "dev",
    [
        "",
        ".",
        "a" * 16,
        "é" * 8,
        "eth0:1",
        "eth 0",
        "eth/0",
        "eth%d",
        "eth\x00",
        "\ud800",
        7,
        True,
        [],
        ["eth0", 7],
        ["eth0", "eth0"],
        [f"eth{number}" for number in range(257)],
        {},
        {"name": "eth0"},
        {"match": ""},
        {"match": "eth 0"},
        {"match": "e" * 65},
        {"pci": "3b:20.0"},
        {"pci": "eth0"},
        {"driver": "../virtio"},
        {"mac": "ff:ff:ff:ff:ff:ff"},
        {"route": "192.0.2.0/24"},
    ],
)
def test_dev_that_can_be_no_nic_is_refused(dev: object) -> None:
    """A name that the kernel would never give a NIC, or a selector that selects nothing."""
    with pytest.raises(InvalidNetworkConfig, match=r"^extbridge\.dev"):
        parse_network(with_dev(dev))


@pytest.mark.parametrize(
    ("changes", "nearest"),
    [
        ({"queue": 4}, "queues"),
        ({"MTU": 1500}, "mtu"),
        ({"macprefix": "02"}, "macPrefix"),
        ({"antiSpoof": "mac"}, "antispoof"),
        ({"extbridge": {"device": "eth0"}}, "dev"),
        ({"extbridge": {"dev": "eth0", "mode": "pasthrough"}}, "passthrough"),
        ({"handoff": "fds"}, "fd"),
    ],
)
def test_misspelling_is_answered_with_the_right_spelling(
    changes: dict[str, Any], nearest: str
) -> None:
    """Who mistypes a key or a word is told the nearest one, and all that are allowed."""
    with pytest.raises(InvalidNetworkConfig) as caught:
        parse_network({**SEED, **changes})
    assert f"did you mean {nearest}?" in caught.value.hint
    assert "allowed: " in caught.value.hint


def test_name_may_be_left_out_where_it_is_known() -> None:
    """A file named after its network need not repeat the name, but may not say another."""
    unnamed = {"extbridge": {"dev": "eth0"}}
    assert parse_network(unnamed, name="vepanet") == parse_network({**unnamed, "name": "vepanet"})
    with pytest.raises(InvalidNetworkConfig, match=r'^name is the string "red"; .*vepanet'):
        parse_network({**unnamed, "name": "red"}, name="vepanet")


def test_deeply_nested_ipam_is_refused() -> None:
    """An ipam that nests deeper than any plugin needs is refused, not a crash."""
    nested: object = "end"
    for _ in range(500):
        nested = [nested]
    with pytest.raises(InvalidNetworkConfig, match="ipam nests"):
        parse_network({**SEED, "ipam": {"type": "t", "a": nested}})


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, Antispoof.MAC),
        ({"trust": False}, Antispoof.MAC),
        ({"antispoof": "ip"}, Antispoof.IP),
        ({"antispoof": "off"}, Antispoof.OFF),
        ({"trust": True}, Antispoof.OFF),
        ({"trust": True, "antispoof": "off"}, Antispoof.OFF),
    ],
)
def test_guest_is_held_to_its_mac_unless_it_is_trusted(
    keys: dict[str, Any], expected: Antispoof
) -> None:
    """What nobody says is the safe thing."""
    assert parse_network({**SEED, **keys}).held_to is expected


@pytest.mark.parametrize("antispoof", ["mac", "ip"])
def test_trust_and_antispoof_exclude_each_other(antispoof: str) -> None:
    """A definition that says two things is refused, not read as one of them."""
    with pytest.raises(InvalidNetworkConfig, match=r"^trust: true lets the guest have any address"):
        parse_network({**SEED, "trust": True, "antispoof": antispoof})
