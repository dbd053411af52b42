"""A network on more than one NIC: which of them carries the next attachment."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from extbridge.demo.lab import Lab, Nic, run
from extbridge.ledger import Ledger
from tests.kernel.agents import Agent
from tests.kernel.observe import leftovers, make_macvtap, network_config, show_link
from tests.support import Cni


@pytest.fixture
def nics(lab: Lab) -> list[Nic]:
    """Three NICs of the node, all alike."""
    return [lab.nic() for _ in range(3)]


def pool(dev: object, mode: str = "bridge", **keys: object) -> dict[str, object]:
    """The configuration of a network with `dev`, a list or a selector."""
    return {
        "cniVersion": "1.1.0",
        "name": "poolnet",
        "type": "extbridge",
        "extbridge": {"mode": mode, "dev": dev},
        **keys,
    }


def lowers(run_dir: Path) -> Counter[str]:
    """How many attachments each NIC carries, by the ledger."""
    return Counter(entry.lower for entry in Ledger(run_dir).entries())


def carrier(cni: Cni, container_id: str) -> str:
    """The NIC that carries the container's one attachment, in the ledger as in the kernel."""
    [entry] = Ledger(cni.run_dir).of(container_id)
    link = show_link(entry.ifname, entry.netns)
    # `link_index` is the NIC's ifindex on the node.
    assert show_link(entry.lower)["ifindex"] == link["link_index"] == entry.lower_ifindex
    return entry.lower


def names(nics: list[Nic]) -> list[str]:
    """Their names."""
    return [nic.name for nic in nics]


def test_least_used_nic_is_taken(cni: Cni, lab: Lab, nics: list[Nic]) -> None:
    """Attachments spread evenly, ties go to the first of the list, and what is freed is used."""
    # Not the order of their names: a list's own order counts.
    listed = names(nics)[::-1]
    pods = {f"c{number}": lab.pod(f"p{number}") for number in range(7)}
    taken = []
    for container_id, pod in pods.items():
        assert cni("ADD", pool(listed), NETNS=pod, CONTAINERID=container_id).status == 0
        taken.append(carrier(cni, container_id))
    assert taken == [*listed, *listed, listed[0]]
    assert cni("DEL", pool(listed), NETNS=pods["c4"], CONTAINERID="c4").status == 0
    assert cni("ADD", pool(listed), NETNS=pods["c4"], CONTAINERID="c4").status == 0
    assert carrier(cni, "c4") == listed[1]


def test_one_pods_nics_are_spread_too(cni: Cni, nics: list[Nic], pod: str, tmp_path: Path) -> None:
    """Two NICs that one pod asks for on one network are on two of the node's."""
    definition = {"extbridge": {"mode": "bridge", "dev": names(nics)}}
    (tmp_path / "blue.json").write_text(json.dumps(definition))
    capability = "io.kubernetes.cri.pod-annotations"
    config = {
        "cniVersion": "1.1.0",
        "name": "cluster",
        "type": "extbridge",
        "networksDir": str(tmp_path),
        "capabilities": {capability: True},
        "runtimeConfig": {capability: {"extbridge.io/networks": "blue,blue"}},
        "prevResult": {"cniVersion": "1.1.0", "interfaces": [{"name": "net1", "sandbox": pod}]},
    }
    run("ip", "link", "add", "net1", "type", "veth", "peer", "name", "net1p", netns=pod)
    assert cni("ADD", config, NETNS=pod).status == 0
    assert lowers(cni.run_dir) == {nics[0].name: 1, nics[1].name: 1}


def test_nic_without_carrier_comes_last(cni: Cni, lab: Lab, nics: list[Nic]) -> None:
    """A NIC whose cable is out is used only when there is no other, and one that is down never."""
    run("ip", "link", "set", nics[0].port, "down", netns=lab.switch)
    run("ip", "link", "set", nics[1].name, "down")
    config = pool(names(nics))
    for number in range(3):
        container = {"NETNS": lab.pod(f"p{number}"), "CONTAINERID": f"c{number}"}
        assert cni("ADD", config, **container).status == 0
    assert lowers(cni.run_dir) == {nics[2].name: 3}
    run("ip", "link", "set", nics[2].name, "down")
    assert cni("STATUS", config).error["code"] == 51
    assert cni("ADD", config, NETNS=lab.pod("last"), CONTAINERID="c3").status == 0
    assert carrier(cni, "c3") == nics[0].name
    run("ip", "link", "set", nics[0].name, "down")
    error = cni("ADD", config, NETNS=lab.pod("no"), CONTAINERID="c4").error
    assert error["code"] == 11
    assert all(f"{nic.name} is down" in str(error["msg"]) for nic in nics)
    assert cni("STATUS", config).error["code"] == 50


def test_passthru_takes_a_free_nic(cni: Cni, lab: Lab, nics: list[Nic]) -> None:
    """Each VM has a NIC for itself; when all are taken, the refusal names their holders."""
    config = pool(names(nics), "passthru")
    pods = {f"c{number}": lab.pod(f"p{number}") for number in range(4)}
    # One that the ledger does not know of is found by the kernel.
    make_macvtap(nics[0], "foreign", pods["c3"], "52:54:00:00:00:99")
    for container_id in ("c0", "c1"):
        assert cni("ADD", config, NETNS=pods[container_id], CONTAINERID=container_id).status == 0
    assert lowers(cni.run_dir) == {nics[1].name: 1, nics[2].name: 1}
    refused = cni("ADD", config, NETNS=pods["c2"], CONTAINERID="c2").error
    assert refused["code"] == 105
    run("ip", "link", "delete", "foreign", netns=pods["c3"])
    assert cni("ADD", config, NETNS=pods["c3"], CONTAINERID="c3").status == 0
    refused = cni("ADD", config, NETNS=pods["c2"], CONTAINERID="c2").error
    assert refused["code"] == 105
    for nic, holder in zip(nics, ("c3", "c0", "c1"), strict=True):
        assert f"{nic.name} is taken by net1 (passthru) of {holder}" in str(refused["msg"])
    assert cni("STATUS", config).error["code"] == 50
    # Nobody else can join them.
    shared = cni("ADD", pool(names(nics)), NETNS=pods["c2"], CONTAINERID="c2").error
    assert shared["code"] == 105
    assert leftovers(pods["c2"], cni.run_dir / "none") == []
    assert cni("DEL", config, NETNS=pods["c1"], CONTAINERID="c1").status == 0
    assert cni("ADD", config, NETNS=pods["c2"], CONTAINERID="c2").status == 0
    for container_id, pod in pods.items():
        assert cni("DEL", config, NETNS=pod, CONTAINERID=container_id).status == 0
    assert [show_link(nic.name)["address"] for nic in nics] == [nic.mac for nic in nics]


def test_what_is_gone_or_undone_takes_no_nic(cni: Cni, lab: Lab, nics: list[Nic]) -> None:
    """Neither a lost link nor the trace of an ADD that was killed keeps a NIC from others."""
    config = pool(names(nics[:2]), "passthru")
    pods = {f"c{number}": lab.pod(f"p{number}") for number in range(3)}
    for container_id in ("c0", "c1"):
        assert cni("ADD", config, NETNS=pods[container_id], CONTAINERID=container_id).status == 0
    run("ip", "link", "delete", "net1", netns=pods["c1"])
    assert cni("ADD", config, NETNS=pods["c2"], CONTAINERID="c2").status == 0
    assert carrier(cni, "c2") == nics[1].name
    with Ledger(cni.run_dir).hold("c2") as held:
        [entry] = held.entries()
        held.remove(entry.ifname)
        held.write(replace(entry, done=False))
    assert cni("ADD", config, NETNS=pods["c2"], CONTAINERID="c2").status == 0
    assert carrier(cni, "c2") == nics[1].name
    for container_id, pod in pods.items():
        assert cni("DEL", config, NETNS=pod, CONTAINERID=container_id).status == 0


def test_pool_passes_over_what_cannot_carry(cni: Cni, lab: Lab, nics: list[Nic], pod: str) -> None:
    """Bridge ports, small MTUs and NICs that are not there do not keep the others."""
    with bridge("xbpool", nics[0]):
        run("ip", "link", "set", nics[1].name, "mtu", "1300")
        dev = ["nowhere", *names(nics)]
        assert cni("ADD", pool(dev, mtu=1400), NETNS=pod).status == 0
        assert carrier(cni, "container-1") == nics[2].name
        error = cni("ADD", pool(dev[:-1], mtu=1400), NETNS=lab.pod("no"), CONTAINERID="c2").error
    assert error["code"] == 7
    assert f"{nics[0].name} is a port of bridge xbpool" in str(error["msg"])
    assert f"1400 is more than the 1300 of {nics[1].name}" in str(error["msg"])


def test_nics_are_selected_by_what_they_are(cni: Cni, lab: Lab, nics: list[Nic]) -> None:
    """A selector finds NICs by pattern, MAC, driver and default route, alone and together."""
    one, two, three = names(nics)
    prefix = one[:-1]
    run("ip", "address", "add", "192.0.2.1/24", "dev", two)
    run("ip", "route", "add", "default", "via", "192.0.2.254", "dev", two)
    selectors: list[tuple[dict[str, str], list[str]]] = [
        ({"match": f"{prefix}*"}, [one, two, three]),
        ({"match": f"{prefix}[!0]"}, [two, three]),
        ({"mac": nics[2].mac}, [three]),
        ({"driver": "veth"}, [one, two, three]),
        ({"driver": "veth", "match": f"*{three[-3:]}"}, [three]),
        ({"route": "default"}, [two]),
    ]
    for at, (selector, expected) in enumerate(selectors):
        containers = {f"s{at}-{n}": lab.pod(f"s{at}n{n}") for n in range(len(expected))}
        for container_id, pod in containers.items():
            assert cni("ADD", pool(selector), NETNS=pod, CONTAINERID=container_id).status == 0
        assert [carrier(cni, container_id) for container_id in containers] == expected, selector
        for container_id, pod in containers.items():
            assert cni("DEL", pool(selector), NETNS=pod, CONTAINERID=container_id).status == 0
    for selector in ({"driver": "ixgbe"}, {"pci": "3b:00.0"}, {"match": "lo"}):
        error = cni("ADD", pool(selector), NETNS=lab.pod(f"no{len(str(selector))}")).error
        assert error["code"] == 7
        assert "the node has no NIC with" in str(error["msg"])


def test_ipv6_and_multipath_routes_lead_to_nics_too(cni: Cni, lab: Lab, nics: list[Nic]) -> None:
    """The default route may be IPv6's alone, or lead over more than one NIC."""
    one, two, three = names(nics)
    for number, name in enumerate((two, three)):
        run("ip", "address", "add", f"192.0.{number}.1/24", "dev", name)
    run("ip", "route", "add", "default", "nexthop", "via", "192.0.0.2", "dev", two,
        "nexthop", "via", "192.0.1.2", "dev", three)  # fmt: skip
    run("sysctl", "-qw", f"net.ipv6.conf.{one}.disable_ipv6=0")
    run("ip", "address", "add", "2001:db8::1/64", "dev", one, "nodad")
    run("ip", "route", "add", "default", "via", "2001:db8::2", "dev", one)
    for number in range(3):
        container = {"NETNS": lab.pod(f"p{number}"), "CONTAINERID": f"c{number}"}
        assert cni("ADD", pool({"route": "default"}), **container).status == 0
    assert lowers(cni.run_dir) == dict.fromkeys((one, two, three), 1)


def test_pool_is_counted_by_nic(agent: Agent, shim: Cni, lab: Lab, nics: list[Nic]) -> None:
    """The agent's metrics and its log say which NIC was chosen."""
    for number in range(4):
        container = {"NETNS": lab.pod(f"p{number}"), "CONTAINERID": f"c{number}"}
        assert shim("ADD", pool(names(nics)), **container).status == 0
    metrics = agent.metrics()
    assert metrics["extbridge_attachments"] == 4
    assert [metrics[f"extbridge_nic_attachments{{nic={nic.name}}}"] for nic in nics] == [2, 1, 1]
    assert f"networks=poolnet nics={nics[1].name} " in agent.log


def test_single_nic_in_a_list_is_that_nic(cni: Cni, nics: list[Nic], pod: str) -> None:
    """A list of one, or a name, is no pool: its faults are told as its own."""
    assert cni("ADD", pool([nics[1].name]), NETNS=pod).status == 0
    assert carrier(cni, "container-1") == nics[1].name
    run("ip", "link", "set", nics[1].name, "down")
    error = cni("ADD", network_config(nics[1]), NETNS=pod, CONTAINERID="c2").error
    assert (error["code"], error["msg"]) == (11, f"extbridge.dev: {nics[1].name} is down")


@contextmanager
def bridge(name: str, port: Nic) -> Iterator[None]:
    """A bridge on the node with the NIC as its port."""
    run("ip", "link", "add", name, "type", "bridge")
    try:
        run("ip", "link", "set", port.name, "master", name)
        yield
    finally:
        run("ip", "link", "delete", name)
