"""CHECK: whatever differs from what ADD made and said is found, and named."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from extbridge.demo.lab import Lab, Nic, run
from tests.kernel.observe import ifbs, network_config, show_link
from tests.support import Answer, Cni

MAC = "52:54:00:ab:cd:ef"
SILENT = Answer(0, None, "")


@dataclass(frozen=True, slots=True)
class Attached:
    """An attachment, and the configuration by which it is checked."""

    config: Mapping[str, Any]
    nic: Nic
    pod: str
    ifindex: int


@pytest.fixture
def attached(cni: Cni, nic: Nic, pod: str) -> Attached:
    """An attachment as ADD makes it."""
    limits = {
        "ingressRate": 10**7,
        "ingressBurst": 10**6,
        "egressRate": 10**7,
        "egressBurst": 10**6,
    }
    config = network_config(nic, mac=MAC, queues=2, bandwidth=limits)
    config["prevResult"] = cni("ADD", config, NETNS=pod).result
    return Attached(config, nic, pod, show_link("net1", pod)["ifindex"])


@pytest.mark.parametrize("mode", ["vepa", "bridge", "private", "passthru"])
@pytest.mark.parametrize("mtu", [None, 1000])
def test_check_passes_what_add_made(
    cni: Cni, nic: Nic, pod: str, *, mode: str, mtu: int | None
) -> None:
    """An attachment that nobody has touched is as it was made."""
    config = network_config(nic, mode, mtu=mtu)
    config["prevResult"] = cni("ADD", config, NETNS=pod).result
    assert cni("CHECK", config, NETNS=pod) == SILENT


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("ip link delete net1", "the link with ifindex {ifindex} is gone"),
        ("ip link set net1 type macvtap mode bridge", "mode is 'bridge', ADD made it 'vepa'"),
        ("ip link set net1 name other", "name is 'other', ADD made it 'net1'"),
        ("ip link set net1 address 52:54:00:00:00:99", "MAC is '52:54:00:00:00:99'"),
        ("ip link set net1 mtu 1400", "MTU is 1400, ADD made it 1500"),
        ("ip link set net1 down", "state is 'down', ADD made it 'up'"),
        ("ip link set net1 arp on", "silence is 'ARP is answered'"),
        ("ip address add 192.0.2.1/24 dev net1", "silence is 'an address'"),
        ("sysctl -q net.ipv6.conf.net1.disable_ipv6=0", "IPv6 is enabled on net1"),
        ("nft delete table inet extbridge_{ifindex}", "chain hears, does not drop"),
        ("nft flush chain inet extbridge_{ifindex} hears", "chain hears, does not drop"),
        ("nft flush chain inet extbridge_{ifindex} speaks", "chain speaks, does not drop"),
        (
            "nft insert rule inet extbridge_{ifindex} hears accept",
            "chain hears, does not drop",
        ),
        (
            "nft delete table netdev extbridge_{ifindex}",
            "antispoof is 'nftables table netdev extbridge_{ifindex} differs in chain",
        ),
        ("nft flush chain netdev extbridge_{ifindex} ipv4", "differs in chain ipv4'"),
        ("nft insert rule netdev extbridge_{ifindex} source accept", "differs in chain source'"),
        ("tc filter delete dev net1 egress", "antispoof is 'no program looks at the checksums"),
        ("tc qdisc delete dev net1 root", "what it sends is not limited as asked: "),
        (
            "tc qdisc replace dev net1 root tbf rate 1gbit burst 1mb latency 25ms",
            "what it sends is not limited as asked: tbf has rate 125000000",
        ),
        ("tc qdisc delete dev net1 clsact", "what it receives is not limited as asked: "),
        ("ip link delete {ifb}", "what it receives is not limited as asked: there is no ifb"),
    ],
    ids=lambda value: value if " " in value else None,
)
def test_check_names_what_differs_in_the_pod(
    cni: Cni, attached: Attached, change: str, told: str
) -> None:
    """CHECK fails for any one thing that is not as ADD made it, and says which."""
    [ifb] = ifbs(attached.pod)
    run(*change.format(ifindex=attached.ifindex, ifb=ifb).split(), netns=attached.pod)
    assert told.format(ifindex=attached.ifindex) in _difference(cni, attached)


def test_check_names_a_link_of_another_kind(cni: Cni, attached: Attached) -> None:
    """Another link in the attachment's place is not taken for it."""
    run("ip", "link", "delete", "net1", netns=attached.pod)
    run("ip", "link", "add", "net1", "index", str(attached.ifindex), "type", "bridge",
        netns=attached.pod)  # fmt: skip
    told = _difference(cni, attached)
    assert "kind is 'bridge', ADD made it 'macvtap'" in told


def test_check_names_the_nic_that_was_renamed(cni: Cni, attached: Attached) -> None:
    """A NIC under another name is another NIC to the network's definition."""
    nic = attached.nic.name
    run("ip", "link", "set", nic, "name", "renamed")
    try:
        told = _difference(cni, attached)
    finally:
        run("ip", "link", "set", "renamed", "name", nic)
    assert "NIC is " in told
    assert "'renamed'" in told
    assert nic in told


def test_check_names_a_macvtap_whose_nic_is_gone(cni: Cni, attached: Attached) -> None:
    """The kernel deletes the macvtaps of a NIC with it."""
    run("ip", "link", "delete", attached.nic.name)
    assert "is gone" in _difference(cni, attached)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"mac": "52:54:00:00:00:99"}, "MAC is '52:54:00:00:00:99' in prevResult"),
        ({"mtu": 9000}, "MTU is 9000 in prevResult"),
        ({"sandbox": "/run/netns/elsewhere"}, "sandbox is '/run/netns/elsewhere' in prevResult"),
        ({"name": "net7"}, "net1: prevResult does not have it"),
    ],
)
def test_check_names_what_differs_in_prev_result(
    cni: Cni, attached: Attached, keys: dict[str, object], told: str
) -> None:
    """What later plugins made of the result is held against what ADD made."""
    config = copy.deepcopy(dict(attached.config))
    config["prevResult"]["interfaces"][0].update(keys)
    error = cni("CHECK", config, NETNS=attached.pod).error
    assert error["code"] == 106
    assert told in str(error["msg"])


def test_check_reads_a_prev_result_that_later_plugins_added_to(
    cni: Cni, attached: Attached
) -> None:
    """Others' interfaces, MACs in capitals, and MTUs left out are no difference."""
    config = copy.deepcopy(dict(attached.config))
    [ours] = config["prevResult"]["interfaces"]
    del ours["mtu"]
    ours["mac"] = ours["mac"].upper()
    config["prevResult"]["interfaces"] = [{"name": "net1"}, ours, {"name": "x", "sandbox": "/y"}]
    assert cni("CHECK", config, NETNS=attached.pod) == SILENT


def test_check_of_what_was_never_added(cni: Cni, attached: Attached) -> None:
    """An attachment that the ledger does not know is code 3, whatever prevResult says."""
    error = cni("CHECK", attached.config, NETNS=attached.pod, CONTAINERID="container-2").error
    assert error["code"] == 3
    assert "container-2" in str(error["msg"])
    assert error["details"]


def test_check_needs_prev_result(cni: Cni, attached: Attached) -> None:
    """CHECK is about what ADD said; without that it is refused."""
    config = {key: value for key, value in attached.config.items() if key != "prevResult"}
    error = cni("CHECK", config, NETNS=attached.pod).error
    assert (error["code"], error["msg"]) == (7, "prevResult is missing")


def test_check_in_a_namespace_that_is_gone(cni: Cni, lab: Lab, attached: Attached) -> None:
    """A pod whose namespace is gone is told from one whose NIC is."""
    run("ip", "netns", "delete", Path(attached.pod).name)
    error = cni("CHECK", attached.config, NETNS=attached.pod).error
    assert error["code"] == 4
    assert attached.pod in str(error["msg"])
    other = lab.pod("other")
    assert cni("CHECK", attached.config, NETNS=other).error["code"] == 106


def _difference(cni: Cni, attached: Attached) -> str:
    error = cni("CHECK", attached.config, NETNS=attached.pod).error
    assert error["code"] == 106
    assert error["details"]
    message = str(error["msg"])
    assert message.startswith("net1: ")
    return message
