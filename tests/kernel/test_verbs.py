"""Every verb in every version of the specification, through the executable."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from extbridge.demo.lab import Lab, Nic, run
from tests.kernel.observe import ledger_of, leftovers, link_names, make_macvtap, network_config
from tests.support import Answer, Cni

VERSIONS = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"]
INTRODUCED = {"CHECK": "0.4.0", "GC": "1.1.0", "STATUS": "1.1.0", "DEL": "0.1.0"}
MAC = "52:54:00:12:34:56"

# Of no attachment, and given none of its variables (SPEC 1.1.0 section 2).
NO_ATTACHMENT: Mapping[str, None] = {"CONTAINERID": None, "IFNAME": None}

SILENT = Answer(0, None, "")

# Why the executable is there at all is that it is small: what only other roles need stays out.
HEAVY = {"asyncio", "click", "google", "grpc", "kubernetes", "prometheus_client", "rich", "ssl"}


@pytest.mark.parametrize("version", VERSIONS)
def test_add_answers_in_the_shape_of_the_version(
    cni: Cni, nic: Nic, pod: str, version: str
) -> None:
    """The result of ADD has what the asked version knows of an interface, and no more."""
    config = network_config(nic, cniVersion=version, mac=MAC)
    interface: dict[str, object] = {"name": "net1", "mac": MAC, "sandbox": pod}
    if version == "1.1.0":
        interface["mtu"] = 1500
    answer = cni("ADD", config, NETNS=pod)
    assert answer.result == {"cniVersion": version, "interfaces": [interface]}
    assert answer.stderr == ""


@pytest.mark.parametrize("version", VERSIONS)
def test_prev_result_passes_through(cni: Cni, nic: Nic, pod: str, version: str) -> None:
    """What earlier plugins said comes out as it went in, with our interface behind theirs."""
    family = {"version": "4"} if version < "1.0.0" else {}
    before = {
        "cniVersion": version,
        "interfaces": [
            {"name": "veth7", "mac": "0a:00:00:00:00:07"},
            {"name": "eth0", "mac": "0a:00:00:00:00:08", "sandbox": pod, "pciID": "0000:00:03.0"},
        ],
        "ips": [{"address": "10.1.2.3/24", "gateway": "10.1.2.1", "interface": 1, **family}],
        "routes": [{"dst": "0.0.0.0/0", "gw": "10.1.2.1", "mtu": 1400, "x": None}],
        "dns": {"nameservers": ["10.1.0.1"], "search": [], "options": ["ndots:5"]},
        "example.com/ünknown": {"list": [1, 2.5, True, None, "✓", {}], "big": 1 << 60},
    }
    config = network_config(nic, cniVersion=version, mac=MAC, prevResult=before)
    result = cni("ADD", config, NETNS=pod).result
    ours = result["interfaces"].pop()  # type: ignore[attr-defined]
    assert (ours["name"], ours["mac"], ours["sandbox"]) == ("net1", MAC, pod)
    assert result == before


@pytest.mark.parametrize("version", VERSIONS)
def test_version_has_the_verbs_it_introduced(cni: Cni, nic: Nic, pod: str, version: str) -> None:
    """Each verb succeeds silently where its version has it, and is refused with code 1 before."""
    config = network_config(nic, cniVersion=version)
    config["prevResult"] = cni("ADD", config, NETNS=pod).result
    for verb, introduced in INTRODUCED.items():
        variables = {"NETNS": pod} if verb in {"CHECK", "DEL"} else NO_ATTACHMENT
        answer = cni(verb, config, **variables)
        if version >= introduced:
            assert answer == SILENT
            continue
        error = answer.error
        assert (error["code"], error["cniVersion"]) == (1, version)
        assert f"{version} has no {verb}" in str(error["msg"])
        assert introduced in str(error["details"])
    assert leftovers(pod, cni.run_dir) == []


@pytest.mark.parametrize("version", ["0.1.0", "0.2.0", None])
def test_version_that_needs_an_address_can_only_delete(
    cni: Cni, nic: Nic, pod: str, version: str | None
) -> None:
    """ADD is refused where its result could not be said, and DEL works there all the same."""
    config = network_config(nic)
    assert cni("ADD", config, NETNS=pod).status == 0
    config["cniVersion"] = version
    error = cni("ADD", config, NETNS=pod, CONTAINERID="container-2", IFNAME="net2").error
    assert (error["code"], error["cniVersion"]) == (1, version or "0.1.0")
    assert "1.1.0" in str(error["details"])
    assert link_names(pod) == {"lo", "net1"}
    assert cni("DEL", config, NETNS=pod).status == 0
    assert leftovers(pod, cni.run_dir) == []


@pytest.mark.parametrize("version", ["0.1.0", "0.2.0", *VERSIONS, "9.9.9"])
def test_version_is_answered_in_any_version(cni: Cni, version: str) -> None:
    """VERSION needs nothing but itself and repeats the version in which it was asked."""
    answer = cni("VERSION", {"cniVersion": version}, **NO_ATTACHMENT)
    assert answer.result == {"cniVersion": version, "supportedVersions": VERSIONS}


def test_attachment_is_added_once(cni: Cni, nic: Nic, pod: str) -> None:
    """A second ADD of the same attachment is refused and leaves the first as it is."""
    config = network_config(nic)
    config["prevResult"] = cni("ADD", config, NETNS=pod).result
    error = cni("ADD", network_config(nic), NETNS=pod).error
    assert error["code"] == 103
    assert "container-1" in str(error["msg"])
    assert cni("CHECK", config, NETNS=pod).status == 0


def test_attachment_is_added_once_on_the_node(cni: Cni, lab: Lab, nic: Nic, pod: str) -> None:
    """A second ADD of the same attachment is refused in another namespace too."""
    config = network_config(nic)
    config["prevResult"] = cni("ADD", config, NETNS=pod).result
    other = lab.pod("other")
    error = cni("ADD", network_config(nic, mac=MAC), NETNS=other).error
    assert error["code"] == 103
    assert pod in str(error["msg"])
    assert link_names(other) == {"lo"}
    assert cni("CHECK", config, NETNS=pod).status == 0


def test_gc_keeps_what_is_valid_and_what_is_not_its_own(cni: Cni, lab: Lab, nic: Nic) -> None:
    """GC removes what is not in the list, of its network only, and no link of somebody else."""
    pods = [lab.pod("one"), lab.pod("two")]
    config = network_config(nic)
    for number, pod in enumerate(pods):
        for ifname in ("net1", "net2"):
            variables = {"CONTAINERID": f"c{number}", "NETNS": pod, "IFNAME": ifname}
            assert cni("ADD", config, **variables).status == 0
    other = {**config, "name": "other"}
    assert cni("ADD", other, NETNS=pods[1], IFNAME="net3", CONTAINERID="c1").status == 0
    make_macvtap(nic, "foreign", pods[1], MAC)
    valid = [
        {"containerID": "c0", "ifname": "net1"},
        {"containerID": "c1", "ifname": "net2"},
        {"containerID": "never-heard-of", "ifname": "net1"},
    ]
    answer = cni("GC", {**config, "cni.dev/valid-attachments": valid}, **NO_ATTACHMENT)
    assert answer == SILENT
    assert [link_names(pod) - {"lo"} for pod in pods] == [{"net1"}, {"net2", "net3", "foreign"}]
    assert [run("nft", "list", "tables", netns=pod).count("extbridge_") for pod in pods] == [2, 4]
    assert ledger_of(cni.run_dir) == ["c0", "c0/net1.json", "c1", "c1/net2.json", "c1/net3.json"]


@pytest.mark.parametrize(
    ("listed", "left"),
    [
        ({}, {"lo", "net1"}),
        ({"cni.dev/valid-attachments": None}, {"lo", "net1"}),
        ({"cni.dev/valid-attachments": []}, {"lo"}),
    ],
    ids=["absent", "null", "empty"],
)
def test_gc_tells_no_list_from_an_empty_one(
    cni: Cni, nic: Nic, pod: str, listed: dict[str, object], left: set[str]
) -> None:
    """Without a list nothing is known to be stale; an empty one says that everything is."""
    config = network_config(nic)
    assert cni("ADD", config, NETNS=pod).status == 0
    assert cni("GC", {**config, **listed}, **NO_ATTACHMENT).status == 0
    assert link_names(pod) == left


@pytest.mark.parametrize(
    "listed",
    [
        {},
        "c0",
        ["c0"],
        [{"containerID": "c0"}],
        [{"containerID": "c0", "ifname": ""}],
        [{"containerID": 0, "ifname": "net1"}],
        [{"containerID": "c0", "ifname": "net1"}, None],
    ],
    ids=json.dumps,
)
def test_gc_acts_on_no_list_that_it_does_not_understand(
    cni: Cni, nic: Nic, pod: str, listed: object
) -> None:
    """A malformed list is refused with code 7, and nothing is removed on its word."""
    config = network_config(nic)
    assert cni("ADD", config, NETNS=pod).status == 0
    error = cni("GC", {**config, "cni.dev/valid-attachments": listed}, **NO_ATTACHMENT).error
    assert error["code"] == 7
    assert "cni.dev/valid-attachments" in str(error["msg"])
    assert link_names(pod) == {"lo", "net1"}


def test_gc_forgets_an_attachment_whose_namespace_is_gone(cni: Cni, lab: Lab, nic: Nic) -> None:
    """An attachment that went with its namespace loses its ledger entry too."""
    pod = lab.pod("vm")
    config = network_config(nic)
    assert cni("ADD", config, NETNS=pod).status == 0
    run("ip", "netns", "delete", Path(pod).name)
    assert ledger_of(cni.run_dir) == ["container-1", "container-1/net1.json"]
    answer = cni("GC", {**config, "cni.dev/valid-attachments": []}, **NO_ATTACHMENT)
    assert answer.status == 0
    assert ledger_of(cni.run_dir) == []


def test_status_is_good_while_adds_succeed(cni: Cni, nic: Nic) -> None:
    """STATUS is silent while the network's NIC is there, up, and has carrier."""
    answer = cni("STATUS", network_config(nic), **NO_ATTACHMENT)
    assert answer == SILENT


def test_status_without_a_network_of_its_own_is_good(cni: Cni, nic: Nic) -> None:
    """In a node's main network list, where pods name the networks, STATUS holds up nobody."""
    config = network_config(nic)
    del config["extbridge"]
    assert cni("STATUS", config, **NO_ATTACHMENT).status == 0


@pytest.mark.parametrize(
    ("spoil", "code", "told"),
    [
        ("", 50, "no NIC 'nope'"),
        ("ip link set {nic} down", 50, "{nic} is down"),
        ("ip link set {nic} mtu 1200", 50, "1300 is more than the 1200 of {nic}"),
        ("ip -netns {switch} link set {port} down", 51, "{nic} has no carrier"),
    ],
)
def test_status_says_why_no_add_would_succeed(
    cni: Cni, lab: Lab, nic: Nic, *, spoil: str, code: int, told: str
) -> None:
    """STATUS fails with 50 while the NIC cannot be used, and with 51 while it has no carrier."""
    names = {"nic": nic.name, "port": nic.port, "switch": Path(lab.switch).name}
    if spoil:
        run(*spoil.format(**names).split())
    config = network_config(nic, mtu=1300, extbridge={"dev": nic.name if spoil else "nope"})
    error = cni("STATUS", config, **NO_ATTACHMENT).error
    assert error["code"] == code
    assert str(error["msg"]).startswith("network vepanet: ")
    assert told.format(**names) in str(error["msg"])
    assert error["details"]


@pytest.mark.parametrize(
    "keys",
    [{"extbridge": {"dev": {}}}, {"trust": True, "antispoof": "mac"}, {"ipam": {}, "mtuu": 1500}],
)
def test_status_refuses_a_configuration_that_every_add_refuses(
    cni: Cni, nic: Nic, keys: dict[str, object]
) -> None:
    """What is wrong with the configuration itself shows before the first pod comes."""
    assert cni("STATUS", network_config(nic, **keys), **NO_ATTACHMENT).error["code"] == 7


@pytest.mark.parametrize("definition", [None, "{}", "{", "extbridge: {dev: eth7, mode: vep}"])
def test_status_names_a_definition_that_no_add_can_use(
    cni: Cni, tmp_path: Path, definition: str | None
) -> None:
    """A configuration is right, and what it names missing or broken: 50, for as long as it is."""
    if definition is not None:
        (tmp_path / "blue.yaml").write_text(definition)
    config = {
        "cniVersion": "1.1.0",
        "name": "n",
        "type": "extbridge",
        "network": "blue",
        "networksDir": str(tmp_path),
    }
    error = cni("STATUS", config, **NO_ATTACHMENT).error
    assert (error["code"], str(error["msg"]).startswith("network blue: ")) == (50, True)
    assert error["details"]
    twice = {**config, "extbridge": {"dev": "eth7"}}
    assert cni("STATUS", twice, **NO_ATTACHMENT).error["code"] == 7


@pytest.mark.parametrize("spelling", ["inline", "json", "xml", "yaml"])
def test_executable_imports_no_more_than_it_needs(
    cni: Cni, nic: Nic, pod: str, tmp_path: Path, spelling: str
) -> None:
    """ADD pays for no library of another role, and for YAML and XML only where they are used."""
    config = network_config(nic)
    if spelling != "inline":
        definition = {
            "json": json.dumps({"extbridge": config["extbridge"]}),
            "xml": f"<network><extbridge dev='{nic.name}'/></network>",
            "yaml": f"extbridge: {{dev: {nic.name}}}",
        }[spelling]
        (tmp_path / f"blue.{spelling}").write_text(definition)
        del config["extbridge"]
        config |= {"network": "blue", "networksDir": str(tmp_path)}
    traced = replace(cni, wrapper=(sys.executable, "-X", "importtime"))
    answer = traced("ADD", config, NETNS=pod)
    assert answer.status == 0, answer.stdout
    modules = {line.rpartition("|")[2].strip() for line in answer.stderr.splitlines()}
    assert {"extbridge.plugin", "extbridge.kernel.netlink"} <= modules
    assert {module.partition(".")[0] for module in modules} & HEAVY == set()
    assert ("yaml" in modules) == (spelling == "yaml")
    assert ("pyexpat" in modules) == (spelling == "xml")
