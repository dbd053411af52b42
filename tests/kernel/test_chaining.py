"""Behind another plugin: the VM's NIC is one more, and the pod may say which and whether."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from extbridge.demo.lab import Lab, Nic, run
from tests.kernel.observe import (
    ledger_of,
    leftovers,
    link_names,
    macvtaps,
    network_config,
    picture,
    show_link,
)
from tests.support import Answer, Cni

ANNOTATIONS = "io.kubernetes.cri.pod-annotations"
NETWORKS = "extbridge.io/networks"
MACS = ["52:54:00:00:00:01", "52:54:00:00:00:02"]
SILENT = Answer(0, None, "")


@dataclass(frozen=True, slots=True)
class Chain:
    """A pod whose eth0 another plugin has made, and the executable behind that plugin."""

    cni: Cni
    nic: Nic
    pod: str
    networks_dir: Path

    @property
    def before(self) -> dict[str, Any]:
        """What the other plugin said."""
        return {
            "cniVersion": "1.1.0",
            "interfaces": [{"name": "eth0", "mac": "0a:00:00:00:00:01", "sandbox": self.pod}],
            "ips": [{"address": "10.1.2.3/24", "interface": 0}],
            "dns": {"nameservers": ["10.1.0.1"]},
        }

    def define(self, name: str, nic: Nic, **keys: object) -> None:
        """Define a network that pods can ask for."""
        definition = {"extbridge": {"dev": nic.name}, **keys}
        (self.networks_dir / f"{name}.json").write_text(json.dumps(definition))

    def config(self, asked: object = None, **keys: object) -> dict[str, Any]:
        """The node's main network list: pods decide. `asked` is JSON unless it is text."""
        config: dict[str, Any] = {
            "cniVersion": "1.1.0",
            "name": "cluster",
            "type": "extbridge",
            "networksDir": str(self.networks_dir),
            "capabilities": {ANNOTATIONS: True},
            "prevResult": self.before,
            **keys,
        }
        text = asked if isinstance(asked, str) else json.dumps(asked)
        annotations = {"example.com/other": "x", **({} if asked is None else {NETWORKS: text})}
        config["runtimeConfig"] = {ANNOTATIONS: annotations}
        return config

    def __call__(self, verb: str, config: Mapping[str, object], **variables: str) -> Answer:
        """Run the verb for the pod's eth0, which is what the runtime asks of the whole chain."""
        return self.cni(verb, config, **{"IFNAME": "eth0", "NETNS": self.pod, **variables})

    def added(self, config: Mapping[str, object], **variables: str) -> list[dict[str, Any]]:
        """The interfaces that an ADD makes; all else in its result is as it was."""
        result: dict[str, Any] = dict(self("ADD", config, **variables).result)
        before = self.before
        assert result["interfaces"][:1] == before["interfaces"]
        assert {**result, "interfaces": before["interfaces"]} == before
        added: list[dict[str, Any]] = result["interfaces"][1:]
        assert all(interface["sandbox"] == self.pod for interface in added)
        return added

    def names(self, config: Mapping[str, object], **variables: str) -> list[str]:
        """The names of the interfaces that an ADD makes."""
        return [interface["name"] for interface in self.added(config, **variables)]


@pytest.fixture
def chain(cni: Cni, nic: Nic, pod: str, tmp_path: Path) -> Chain:
    """A pod with an eth0, and the networks vepanet and blue, which are on one NIC."""
    run("ip", "link", "add", "eth0", "type", "bridge", netns=pod)
    chain = Chain(cni, nic, pod, tmp_path)
    chain.define("vepanet", nic)
    chain.define("blue", nic, mtu=1400)
    return chain


def test_nic_behind_another_plugin_is_an_additional_one(chain: Chain) -> None:
    """Chained with a network of its own, each ADD makes the first unused macvtap%d."""
    config = network_config(chain.nic, prevResult=chain.before)
    assert chain.names(config) == ["macvtap0"]
    run("ip", "link", "add", "macvtap1", "type", "bridge", netns=chain.pod)
    config["prevResult"] = {**chain.before, "interfaces": [{"name": "eth1", "sandbox": chain.pod}]}
    second = chain("ADD", config, IFNAME="eth1").result
    assert second["interfaces"][-1]["name"] == "macvtap2"  # type: ignore[index]
    assert chain("DEL", config, IFNAME="eth1") == SILENT
    assert link_names(chain.pod) == {"lo", "eth0", "macvtap0", "macvtap1"}


def test_host_s_interface_of_that_name_is_no_earlier_plugin_s(chain: Chain) -> None:
    """Only an interface in the pod is in the way: a host's veth may bear the name CNI_IFNAME."""
    before = {"cniVersion": "1.1.0", "interfaces": [{"name": "net1"}]}
    config = network_config(chain.nic, prevResult=before)
    assert chain("ADD", config, IFNAME="net1").status == 0
    assert macvtaps(chain.pod) == ["net1"]


@pytest.mark.parametrize("asked", [None, "", " \n"])
def test_pod_that_asks_for_nothing_is_passed_through(chain: Chain, asked: str | None) -> None:
    """In the node's main list, a pod without the annotation is none of our business."""
    config = chain.config(asked)
    untouched = picture(chain.cni.run_dir, chain.pod)
    assert chain("ADD", config).result == chain.before
    assert chain("CHECK", config) == SILENT
    assert not chain.cni.run_dir.exists()
    assert chain("DEL", config) == SILENT
    assert picture(chain.cni.run_dir, chain.pod) == untouched


@pytest.mark.parametrize(
    ("asked", "names"),
    [
        ("vepanet", ["macvtap0"]),
        (" vepanet , blue ", ["macvtap0", "macvtap1"]),
        ("vepanet,vepanet", ["macvtap0", "macvtap1"]),
        ({"name": "blue"}, ["macvtap0"]),
        ([{"name": "vepanet", "interface": "net1"}, {"name": "blue"}], ["net1", "macvtap0"]),
    ],
    ids=str,
)
def test_pod_gets_the_nics_it_asks_for(chain: Chain, asked: object, names: list[str]) -> None:
    """One NIC for each network named, with the interface name that was asked for, if any."""
    config = chain.config(asked)
    made = chain.added(config)
    assert [interface["name"] for interface in made] == names
    assert sorted(macvtaps(chain.pod)) == sorted(names)
    for interface in made:
        link = show_link(interface["name"], chain.pod)
        assert (link["address"], link["mtu"]) == (interface["mac"], interface["mtu"])
    config["prevResult"]["interfaces"] += made
    assert chain("CHECK", config) == SILENT
    assert chain("DEL", config) == SILENT
    assert leftovers(chain.pod, chain.cni.run_dir) == []


def test_pod_decides_macs_and_the_network_the_rest(chain: Chain) -> None:
    """A NIC has the MAC that the annotation gives it, and all else from its network."""
    asked = [{"name": "blue", "mac": MACS[0]}, {"name": "vepanet", "mac": MACS[1]}]
    made = chain.added(chain.config(asked))
    assert [(it["mac"], it["mtu"]) for it in made] == [(MACS[0], 1400), (MACS[1], 1500)]


def test_pod_may_ask_for_the_network_that_the_list_itself_defines(chain: Chain) -> None:
    """What is defined in the list needs no file, and is made for who asks for it only."""
    own = {"extbridge": {"dev": chain.nic.name}, "mtu": 1300}
    assert chain.added(chain.config(**own)) == []
    [made] = chain.added(chain.config("cluster", **own))
    assert made["mtu"] == 1300


@pytest.mark.parametrize(
    ("asked", "code", "told", "hint"),
    [
        ("vepanett", 7, "network vepanett is not defined in ", "did you mean vepanet?"),
        ("red", 7, "network red is not defined in ", "allowed: blue, vepanet"),
        ("vepanet,", 7, "extbridge.io/networks[1] is the string", "letter or digit"),
        ("../vepanet", 7, "extbridge.io/networks[0] is the string", "letter or digit"),
        ("[", 7, "extbridge.io/networks: line 1, column 2", "JSON"),
        ([{"name": "blue", "interfaces": "x"}], 7, "[0].interfaces", "did you mean interface?"),
        ([{"interface": "net1"}], 7, "[0].name is missing", "name the network"),
        ([{"name": "blue", "mac": "01:00:5e:00:00:01"}], 7, "[0].mac is ", "even first octet"),
        ([{"name": "blue", "interface": "sixteen-bytes-xx"}], 7, "[0].interface", "15 bytes"),
        ([{"name": "blue", "ips": ["192.0.2.1/33"]}], 7, "[0].ips[0] is the string", "an address"),
        (
            [{"name": "blue", "interface": "net1"}, {"name": "vepanet", "interface": "net1"}],
            7,
            "asks for the interface net1 more than once",
            "a name of its own",
        ),
        ([{"name": "blue", "interface": "eth0"}], 103, "name eth0 is taken", "ask for another"),
        ([{"name": "blue", "interface": "lo"}], 103, "an interface named lo", "another name"),
        (
            [{"name": "blue", "mac": MACS[0]}, {"name": "vepanet", "mac": MACS[0]}],
            104,
            f"MAC {MACS[0]} is in use",
            "another MAC",
        ),
        ("vepanet,broken", 7, "the node has no NIC 'nope'", "it has "),
    ],
    ids=str,
)
def test_wish_that_cannot_be_granted_grants_none(
    chain: Chain, *, asked: object, code: int, told: str, hint: str
) -> None:
    """A pod gets all that it asks for or nothing, and is told what it got wrong."""
    (chain.networks_dir / "broken.json").write_text('{"extbridge": {"dev": "nope"}}')
    (chain.networks_dir / "broken.json.bak").write_text("no definition")
    before = picture(chain.cni.run_dir, chain.pod)
    error = chain("ADD", chain.config(asked)).error
    assert error["code"] == code
    assert told in str(error["msg"])
    assert hint in str(error["details"]).replace("blue, broken,", "blue,")
    assert picture(chain.cni.run_dir, chain.pod) == before


def test_second_nic_that_fails_takes_the_first_with_it(chain: Chain) -> None:
    """When the kernel refuses the second NIC, the first one, made already, goes again."""
    before = picture(chain.cni.run_dir, chain.pod)
    asked = [{"name": "vepanet"}, {"name": "blue", "mac": chain.nic.mac}]
    error = chain("ADD", chain.config(asked)).error
    assert error["code"] == 104
    assert picture(chain.cni.run_dir, chain.pod) == before


def test_check_finds_each_nic_of_the_chain(chain: Chain) -> None:
    """CHECK looks at every NIC that the pod asked for, under whatever name it was made."""
    config = chain.config([{"name": "vepanet", "interface": "net1"}, {"name": "blue"}])
    config["prevResult"]["interfaces"] += chain.added(config)
    assert chain("CHECK", config) == SILENT
    run("ip", "link", "set", "macvtap0", "down", netns=chain.pod)
    error = chain("CHECK", config).error
    assert error["code"] == 106
    assert str(error["msg"]).startswith("macvtap0: state")
    (chain.cni.run_dir / "ledger/container-1/macvtap0.json").unlink()
    error = chain("CHECK", config).error
    assert error["code"] == 3
    assert "1 of the 2 NICs" in str(error["msg"])


def test_check_of_an_unchained_nic_asks_no_annotation(cni: Cni, nic: Nic, pod: str) -> None:
    """First in its list, the NIC is CNI_IFNAME, whatever networks the annotation names."""
    config = network_config(nic, capabilities={ANNOTATIONS: True})
    config["runtimeConfig"] = {ANNOTATIONS: {NETWORKS: "blue,red"}}
    config["prevResult"] = cni("ADD", config, NETNS=pod).result
    assert cni("CHECK", config, NETNS=pod) == SILENT


def test_gc_removes_all_nics_of_a_chained_attachment(chain: Chain, lab: Lab) -> None:
    """To the runtime, the chain's NICs are one attachment, known by CNI_IFNAME."""
    config = chain.config("vepanet,blue")
    assert len(chain.added(config)) == 2
    other = replace(chain, pod=lab.pod("other"))
    assert len(other.added(other.config("vepanet"), CONTAINERID="container-2")) == 1
    config["cni.dev/valid-attachments"] = [{"containerID": "container-2", "ifname": "eth0"}]
    assert chain("GC", config) == SILENT
    assert macvtaps(chain.pod) == []
    assert macvtaps(other.pod) == ["macvtap0"]
    assert ledger_of(chain.cni.run_dir) == ["container-2", "container-2/macvtap0.json"]


@pytest.mark.parametrize("taken", [False, True])
def test_attachment_that_comes_back_has_its_former_name(
    chain: Chain, lab: Lab, *, taken: bool
) -> None:
    """After its NIC was lost and replaced, an attachment is made again as it was."""
    run("ip", "link", "add", "macvtap0", "type", "bridge", netns=chain.pod)
    before = chain.added(chain.config("vepanet,blue"))
    assert [interface["name"] for interface in before] == ["macvtap1", "macvtap2"]
    run("ip", "link", "delete", "macvtap0", netns=chain.pod)
    run("ip", "link", "delete", chain.nic.name)
    assert macvtaps(chain.pod) == []
    if taken:
        run("ip", "link", "add", "macvtap1", "type", "bridge", netns=chain.pod)
    nic = lab.nic()
    chain.define("vepanet", nic)
    chain.define("blue", nic, mtu=1400)
    again = chain.added(chain.config("vepanet,blue"))
    if not taken:
        assert again == before
    assert [it["name"] for it in again] == ["macvtap0" if taken else "macvtap1", "macvtap2"]
    run("nft", "list", "table", "inet", f"extbridge_{show_link('macvtap2', chain.pod)['ifindex']}",
        netns=chain.pod)  # fmt: skip
    assert run("nft", "list", "tables", netns=chain.pod).count("extbridge_") == 4


def test_two_nics_of_one_network_come_back_as_they_were(chain: Chain, lab: Lab) -> None:
    """After their NIC was lost and replaced, each has its former name, with its MAC."""
    asked = json.dumps([{"name": "vepanet", "mac": f"52:54:00:00:00:0{n}"} for n in (2, 1)])
    before = chain.added(chain.config(asked))
    run("ip", "link", "delete", chain.nic.name)
    chain.define("vepanet", lab.nic())
    assert chain.added(chain.config(asked)) == before
