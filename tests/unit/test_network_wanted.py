"""What an ADD asks for: which networks, which interface names, which addresses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extbridge.network.definition import DEFINITION_KEYS, Mode
from extbridge.network.mac import derive_mac
from extbridge.network.wanted import (
    VmIdentity,
    WantedNic,
    configured_network,
    count_nics,
    derived_or_given_mac,
    wanted_nics,
)
from extbridge.spec.errors import (
    CniError,
    InvalidEnvironment,
    InvalidNetworkConfig,
    IoFailure,
    NameTaken,
    UnsupportedField,
)
from extbridge.spec.request import Request, Verb, parse_request

POD_ANNOTATIONS = "io.kubernetes.cri.pod-annotations"
INLINE: dict[str, Any] = {"extbridge": {"mode": "vepa", "dev": "eth0"}}
CHAINED: dict[str, Any] = {
    "cniVersion": "1.1.0",
    "interfaces": [{"name": "eth0", "sandbox": "/run/netns/blue"}],
}
DEVICE = str(0x60000007)
MACS = [f"52:54:00:00:00:0{number}" for number in range(5)]


def ask(
    config: dict[str, Any],
    *,
    ifname: str = "eth0",
    args: dict[str, str] | None = None,
    annotations: dict[str, str] | None = None,
) -> Request:
    """An ADD with config; annotations come as containerd hands them over."""
    config = {"cniVersion": "1.1.0", "name": "vepanet", "type": "extbridge", **config}
    if annotations is not None:
        config["capabilities"] = {**config.get("capabilities", {}), POD_ANNOTATIONS: True}
        runtime = config.get("runtimeConfig", {})
        config["runtimeConfig"] = {**runtime, POD_ANNOTATIONS: annotations}
    environ = {
        "CNI_COMMAND": Verb.ADD,
        "CNI_CONTAINERID": "c0ffee",
        "CNI_NETNS": "/run/netns/blue",
        "CNI_IFNAME": ifname,
        "CNI_ARGS": ";".join(f"{key}={value}" for key, value in (args or {}).items()),
    }
    return parse_request(environ, json.dumps(config).encode())


def chain(*nics: dict[str, Any], **config: Any) -> Request:  # noqa: ANN401 - any key of a config
    """An ADD behind a plugin that made eth0, by a pod whose annotation asks for nics."""
    annotations = {"extbridge.io/networks": json.dumps(nics)}
    return ask({**INLINE, "prevResult": CHAINED, **config}, annotations=annotations)


def only(request: Request) -> WantedNic:
    """The one NIC that the request asks for."""
    [wanted] = wanted_nics(request)
    return wanted


@pytest.fixture
def networks_dir(tmp_path: Path) -> str:
    """A folder that defines the networks blue and red."""
    for name in ("blue", "red"):
        text = f"name: {name}\nextbridge: {{mode: bridge, dev: {name}0}}\n"
        (tmp_path / f"{name}.yaml").write_text(text)
    return str(tmp_path)


def test_inline_network_is_named_as_the_configuration() -> None:
    """The smallest configuration makes one NIC called CNI_IFNAME on the NIC it names."""
    wanted = only(ask(INLINE, ifname="net1"))
    assert (wanted.network.name, wanted.network.dev.names) == ("vepanet", ("eth0",))
    assert (wanted.ifname, wanted.mac) == ("net1", None)


def test_named_network_is_looked_up(networks_dir: str) -> None:
    """With `network` the definition comes from the folder, whatever the configuration is called."""
    network = only(ask({"network": "blue", "networksDir": networks_dir})).network
    assert (network.name, network.mode) == ("blue", Mode.BRIDGE)


def test_networks_are_looked_up_in_etc_by_default() -> None:
    """Without networksDir the folder is the documented one."""
    with pytest.raises(InvalidNetworkConfig, match=r"no-such-network.*/etc/cni/extbridge\.d"):
        wanted_nics(ask({"network": "no-such-network"}))


def test_all_of_cnis_own_keys_are_taken() -> None:
    """What runtimes add to a configuration is no unknown key, even what a later CNI may add."""
    config = {
        **INLINE,
        "cniVersions": ["1.0.0", "1.1.0"],
        "disableCheck": True,
        "disableGC": True,
        "loadOnlyInlinedPlugins": True,
        "capabilities": {"mac": True},
        "runtimeConfig": {"portMappings": []},
        "args": {"cni": {"labels": []}},
        "dns": {},
        "ipam": {},
        "prevResult": None,
        "deviceID": "",
        "pciBusID": "",
        "cni.dev/valid-attachments": [],
        "cni.dev/later": 1,
    }
    assert only(ask(config)).ifname == "eth0"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "the configuration says neither extbridge nor network"),
        ({"extbridge": {"dev": "eth0"}, "network": "blue"}, "the configuration names the network"),
        ({"mtu": 1500, "network": "blue"}, "the configuration names the network"),
        ({"mtu": 1500}, "extbridge is missing"),
        ({"network": "../blue"}, "network is the string"),
        ({"network": 7}, "network is the number 7"),
        ({"network": "blue", "networksDir": "extbridge.d"}, "networksDir is the string"),
        ({"network": "blue", "networksDir": "/a\x00b"}, "networksDir is the string"),
        ({**INLINE, "networkDir": "/"}, "networkDir is not a known key"),
        ({**INLINE, "master": "eth0"}, "master is not a known key"),
        ({**INLINE, "capabilities": []}, "capabilities is a list"),
        ({**INLINE, "runtimeConfig": "mac"}, "runtimeConfig is the string"),
        ({**INLINE, "runtimeConfig": {"ips": ["192.0.2.1/33"]}}, "runtimeConfig.ips[0] is the str"),
        ({**INLINE, "runtimeConfig": {"ips": "192.0.2.1"}}, "runtimeConfig.ips is the string"),
        ({**INLINE, "runtimeConfig": {"deviceID": "7"}}, "runtimeConfig.deviceID is the string"),
        ({**INLINE, "deviceID": "0000:3b:00.1"}, "deviceID is the string"),
        ({**INLINE, "pciBusID": 7}, "pciBusID is the number 7"),
        ({**INLINE, "runtimeConfig": {"deviceID": "0x60000000"}}, "runtimeConfig.deviceID is the"),
        (
            {**INLINE, "runtimeConfig": {"deviceID": "0" * 11 + "1610617447"}},
            "runtimeConfig.deviceID",
        ),
        ({**INLINE, "runtimeConfig": {"deviceID": "9" * 5000}}, "runtimeConfig.deviceID is the"),
        ({**INLINE, "antispoof": "ip"}, "network vepanet has antispoof: ip, and nothing says"),
    ],
)
def test_wrong_configuration_is_code_7(config: dict[str, Any], message: str) -> None:
    """A configuration that says nothing, two things or an unknown thing is refused by its key."""
    with pytest.raises(InvalidNetworkConfig) as caught:
        wanted_nics(ask(config))
    assert caught.value.message.startswith(message)
    assert caught.value.hint


def test_configured_network_is_none_where_only_pods_name_networks() -> None:
    """A node's main conflist may leave it all to the pods; that is no fault of the node."""
    assert configured_network({"name": "cluster", "type": "extbridge", "ipam": {}}) is None


@pytest.mark.parametrize("annotations", [{}, {"extbridge.io/networks": ""}, {"other": "[x"}])
def test_chained_pod_that_asks_for_nothing_gets_nothing(annotations: dict[str, str]) -> None:
    """In the main conflist every other pod passes, also one with limits that are not for us."""
    config = {
        **INLINE,
        "prevResult": CHAINED,
        "runtimeConfig": {"bandwidth": {"ingressRate": 1000, "ingressBurst": 1000}},
    }
    assert wanted_nics(ask(config, annotations=annotations)) == ()


def test_pod_without_any_annotation_gets_nothing() -> None:
    """A runtime that has no annotations to hand over leaves the key out; the pod passes."""
    config = {**INLINE, "prevResult": CHAINED, "capabilities": {POD_ANNOTATIONS: True}}
    assert wanted_nics(ask(config)) == ()


def test_chained_pod_gets_what_it_asks_for(networks_dir: str) -> None:
    """Each NIC is on the network it names, inline or in the folder, and is called as asked."""
    request = chain(
        {"name": "vepanet", "interface": "net1"},
        {"name": "blue", "mac": MACS[1]},
        {"name": "blue", "interface": "net2"},
        networksDir=networks_dir,
    )
    wanted = wanted_nics(request)
    assert [nic.network.name for nic in wanted] == ["vepanet", "blue", "blue"]
    assert [nic.ifname for nic in wanted] == ["net1", None, "net2"]
    assert [nic.mac for nic in wanted] == [None, MACS[1], None]


def test_chained_pod_that_asks_for_an_unknown_network_is_told_the_known_ones(
    networks_dir: str,
) -> None:
    """A pod's author who mistypes a network learns how it is spelled."""
    with pytest.raises(InvalidNetworkConfig, match=r"did you mean blue\?"):
        wanted_nics(chain({"name": "bleu"}, networksDir=networks_dir))


def test_chained_without_annotations_makes_an_additional_nic() -> None:
    """Behind a plugin that has made CNI_IFNAME, the NIC is the first unused macvtap%d."""
    assert only(ask({**INLINE, "prevResult": CHAINED})).ifname is None


@pytest.mark.parametrize(
    "interfaces", [[], [{"name": "eth0"}], [{"name": "eth0", "sandbox": ""}, {"name": "br0"}]]
)
def test_chained_behind_a_plugin_that_made_no_nic_in_the_pod(
    interfaces: list[dict[str, str]],
) -> None:
    """Where earlier plugins made only ends on the host, the pod's CNI_IFNAME is ours to make."""
    prev_result = {"cniVersion": "1.1.0", "interfaces": interfaces}
    assert only(ask({**INLINE, "prevResult": prev_result})).ifname == "eth0"
    wanted = wanted_nics(chain({"name": "vepanet"}, {"name": "vepanet"}, prevResult=prev_result))
    assert [nic.ifname for nic in wanted] == ["eth0", None]


def test_first_nic_cannot_be_another_than_cni_ifname() -> None:
    """Nobody else would make CNI_IFNAME, which an ADD has to leave behind."""
    request = chain({"name": "vepanet", "interface": "net1"}, prevResult={"interfaces": []})
    with pytest.raises(UnsupportedField, match="the first NIC has to be eth0"):
        wanted_nics(request)


def test_name_of_an_earlier_plugins_interface_is_taken() -> None:
    """A pod cannot have its VM's NIC under the name of the NIC it already has."""
    with pytest.raises(NameTaken, match="eth0"):
        wanted_nics(chain({"name": "vepanet", "interface": "eth0"}))
    second = {"name": "vepanet", "interface": "eth0"}
    with pytest.raises(NameTaken, match="eth0"):
        wanted_nics(chain({"name": "vepanet"}, second, prevResult={"interfaces": []}))


def test_nics_of_an_attachment_are_counted_whatever_prev_result_holds() -> None:
    """CHECK's prevResult holds our NICs too; how many there must be is the annotation's to say."""
    made = {"interfaces": [*CHAINED["interfaces"], {"name": "net1", "sandbox": "/run/netns/blue"}]}
    request = chain({"name": "blue", "interface": "net1"}, {"name": "vepanet"}, prevResult=made)
    assert count_nics(request, is_chained=True) == 2
    assert count_nics(request, is_chained=False) == 1
    assert count_nics(chain(prevResult=made), is_chained=True) == 0
    assert count_nics(ask({**INLINE, "prevResult": made}), is_chained=True) == 1


def test_annotation_may_give_the_configured_network_its_mac() -> None:
    """Not chained, the annotation decides neither whether nor under which name, but on the MAC."""
    networks = json.dumps([{"name": "vepanet", "mac": MACS[1], "interface": "net7"}])
    wanted = only(ask(INLINE, annotations={"extbridge.io/networks": networks}))
    assert (wanted.ifname, wanted.mac) == ("eth0", MACS[1])
    other = only(ask(INLINE, annotations={"extbridge.io/networks": "blue"}))
    assert (other.network.name, other.mac) == ("vepanet", None)


def test_first_given_mac_is_taken() -> None:
    """runtimeConfig, args, CNI_ARGS, annotation, definition: each beats those behind it."""
    networks = json.dumps([{"name": "vepanet", "mac": MACS[3]}])
    sources: list[dict[str, Any]] = [
        {"runtimeConfig": {"mac": MACS[0]}},
        {"args": {"cni": {"mac": MACS[1]}}},
        {},
        {},
        {"mac": MACS[4]},
    ]
    for index, mac in enumerate(MACS):
        config: dict[str, Any] = {**INLINE}
        for source in sources[index:]:
            config |= source
        args = {"MAC": MACS[2]} if index <= 2 else {}
        annotations = {"extbridge.io/networks": networks} if index <= 3 else None
        assert only(ask(config, args=args, annotations=annotations)).mac == mac


def test_empty_mac_is_none() -> None:
    """A runtime that writes an empty string has no MAC to give."""
    config = {**INLINE, "runtimeConfig": {"mac": ""}, "args": {"cni": {"mac": None}}}
    assert only(ask(config, args={"MAC": ""})).mac is None


@pytest.mark.parametrize(
    ("config", "args", "kind", "field"),
    [
        ({"runtimeConfig": {"mac": "x"}}, {}, InvalidNetworkConfig, "runtimeConfig.mac"),
        ({"args": {"cni": {"mac": "x"}}}, {}, InvalidNetworkConfig, "args.cni.mac"),
        ({"mac": "x"}, {}, InvalidNetworkConfig, "mac"),
        ({}, {"MAC": "01:00:5e:00:00:01"}, InvalidEnvironment, "MAC of CNI_ARGS"),
    ],
)
def test_bad_mac_is_refused_where_it_was_given(
    config: dict[str, Any], args: dict[str, str], kind: type[CniError], field: str
) -> None:
    """The error names the one of many places that the bad address came from."""
    with pytest.raises(kind) as caught:
        wanted_nics(ask({**INLINE, **config}, args=args))
    assert caught.value.message.startswith(f"{field} is the string")


@pytest.mark.parametrize(
    ("config", "args"),
    [
        ({"runtimeConfig": {"mac": MACS[0]}}, {}),
        ({"args": {"cni": {"mac": MACS[0]}}}, {}),
        ({}, {"MAC": MACS[0]}),
    ],
)
def test_one_mac_for_several_nics_is_code_2(config: dict[str, Any], args: dict[str, str]) -> None:
    """A MAC that could be any NIC's is refused; the annotation can tell them apart."""
    annotations = {"extbridge.io/networks": "vepanet,vepanet"}
    request = ask({**INLINE, "prevResult": CHAINED, **config}, args=args, annotations=annotations)
    with pytest.raises(UnsupportedField, match=r"give each NIC its own in extbridge\.io/networks"):
        wanted_nics(request)


@pytest.mark.parametrize("antispoof", [{}, {"antispoof": "ip"}])
def test_addresses_are_the_runtimes_or_the_annotations(antispoof: dict[str, Any]) -> None:
    """A NIC gets the addresses that are asked for, and they will do for antispoof: ip."""
    config = {**INLINE, **antispoof}
    asked = {"name": "vepanet", "ips": ["192.0.2.7/24"]}
    runtime = {"runtimeConfig": {"ips": ["192.0.2.8/24", "fd00::8/64"]}}
    annotations = {"extbridge.io/networks": json.dumps(asked)}
    assert only(ask(config, annotations=annotations)).ips == ("192.0.2.7/24",)
    assert only(ask({**config, **runtime})).ips == ("192.0.2.8/24", "fd00::8/64")
    both = ask({**config, **runtime}, annotations=annotations)
    assert only(both).ips == ("192.0.2.8/24", "fd00::8/64")


@pytest.mark.parametrize(
    "given",
    [
        {"runtimeConfig": {"ips": ["192.0.2.7/24"]}},
        {"runtimeConfig": {"deviceID": DEVICE}},
        {"deviceID": DEVICE, "pciBusID": DEVICE},
    ],
    ids=str,
)
def test_what_is_one_nics_is_not_given_to_two(given: dict[str, Any]) -> None:
    """One address or device cannot be two NICs'; the annotation can tell addresses apart."""
    annotations = {"extbridge.io/networks": "vepanet,vepanet"}
    config = {**INLINE, "prevResult": CHAINED, **given}
    with pytest.raises(UnsupportedField, match="for a pod with 2 NICs"):
        wanted_nics(ask(config, annotations=annotations))


def test_device_is_the_ifindex_that_was_reserved() -> None:
    """What a device plugin has reserved is an ifindex, given as text like every device ID."""
    runtime = {"runtimeConfig": {"deviceID": DEVICE}}
    assert only(ask({**INLINE, **runtime})).ifindex == 0x60000007
    assert only(ask(INLINE)).ifindex is None


@pytest.mark.parametrize("runtime", [{}, {"deviceID": ""}, {"deviceID": DEVICE}], ids=str)
def test_device_comes_as_multus_writes_it(runtime: dict[str, Any]) -> None:
    """Multus writes the device into the configuration itself, twice, with or without capability.

    A chained pod that asks for no NIC passes through, whatever device it has.
    """
    config = {**INLINE, "deviceID": DEVICE, "pciBusID": DEVICE, "runtimeConfig": runtime}
    assert only(ask(config)).ifindex == 0x60000007
    pci = {**INLINE, "deviceID": "0000:3b:00.1", "pciBusID": "0000:3b:00.1"}
    assert wanted_nics(chain(**pci)) == ()


@pytest.mark.parametrize("other", ["runtimeConfig.deviceID", "deviceID", "pciBusID"])
def test_two_devices_are_refused(other: str) -> None:
    """Which of two devices was meant nobody can know; the error names where they stand."""
    key = other.rpartition(".")[2]
    config: dict[str, Any] = {"deviceID": DEVICE, "pciBusID": DEVICE}
    config["runtimeConfig"] = {"deviceID": DEVICE}
    (config["runtimeConfig"] if "." in other else config)[key] = str(0x60000008)
    with pytest.raises(InvalidNetworkConfig, match=other) as caught:
        wanted_nics(ask({**INLINE, **config}))
    assert {DEVICE, str(0x60000008)} <= set(re.findall(r"\d+", caught.value.message))
    assert "the same device" in caught.value.hint


@pytest.mark.parametrize(
    "bandwidth",
    [
        None,
        {},
        {"ingressRate": 0, "egressRate": None},
        {"IngressRate": 0, "IngressBurst": 4294967295, "EgressRate": 4294967295},
    ],
)
def test_bandwidth_without_a_limit_is_no_limit(bandwidth: dict[str, int] | None) -> None:
    """How containerd says that a pod has no limit, in Go's spelling of the keys, is known."""
    assert only(ask({**INLINE, "runtimeConfig": {"bandwidth": bandwidth}})).bandwidth is None


def test_vm_is_known_by_annotation_then_pod_then_container() -> None:
    """A VM keeps its identity in another pod if it is annotated; else the pod is the VM."""
    args = {"K8S_POD_NAMESPACE": "prod", "K8S_POD_NAME": "vm-0-abcde"}
    annotations = {"extbridge.io/vm": "vm-0"}
    assert only(ask(INLINE)).vm == VmIdentity("", "c0ffee")
    assert only(ask(INLINE, args=args)).vm == VmIdentity("prod", "vm-0-abcde")
    annotated = only(ask(INLINE, args=args, annotations=annotations))
    assert annotated.vm == VmIdentity("prod", "vm-0")


@pytest.mark.parametrize("name", ["vm\n0", "v" * 254])
def test_odd_vm_name_is_refused(name: str) -> None:
    """The VM's name gets into logs and files, so it has to be short and printable."""
    with pytest.raises(InvalidNetworkConfig, match=r"^extbridge\.io/vm is the string"):
        wanted_nics(ask(INLINE, annotations={"extbridge.io/vm": name}))


def test_mac_is_derived_from_the_name_that_the_nic_got() -> None:
    """Two NICs of a VM on one network differ in their MACs; one that is given is kept."""
    args = {"K8S_POD_NAMESPACE": "prod", "K8S_POD_NAME": "vm-0"}
    wanted = only(ask({**INLINE, "macPrefix": "02:0a"}, args=args))
    mac = derive_mac("02:0a", network="vepanet", namespace="prod", vm="vm-0", ifname="net1")
    assert derived_or_given_mac(wanted, "net1") == mac
    assert derived_or_given_mac(wanted, "net2") != mac
    assert derived_or_given_mac(only(ask({**INLINE, "mac": MACS[0]})), "net1") == MACS[0]


KEYS = [
    "network",
    "networksDir",
    "args",
    "capabilities",
    "runtimeConfig",
    "prevResult",
    "pciBusID",
    "cni.dev/x",
]
PARTS = ["cni", "mac", "ips", "bandwidth", "deviceID", "extbridge.io/networks", "extbridge.io/vm"]
NAMES = st.sampled_from([*DEFINITION_KEYS, *KEYS, *PARTS, "mode", "dev", POD_ANNOTATIONS])
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | NAMES
VALUES = st.recursive(
    PLAIN | st.just(CHAINED),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=10,
)


@settings(deadline=None)
@given(st.dictionaries(NAMES, VALUES, max_size=5), st.dictionaries(NAMES, st.text(), max_size=3))
def test_no_configuration_breaks_the_decision(
    config: dict[str, Any], annotations: dict[str, str]
) -> None:
    """Any JSON under the keys that are known is NICs or a CNI error."""
    with suppress(CniError):
        wanted_nics(ask({**INLINE, **config}))
    with suppress(CniError):
        wanted_nics(ask({**INLINE, "prevResult": CHAINED}, annotations=annotations))


def test_unreadable_folder_is_code_5(tmp_path: Path) -> None:
    """A node whose definitions cannot be read is not a pod's mistake."""
    (tmp_path / "file").write_text("")
    with pytest.raises(IoFailure):
        wanted_nics(ask({"network": "blue", "networksDir": str(tmp_path / "file")}))


def test_json_configuration_needs_no_other_parser() -> None:
    """An ADD with an inline network does not pay for importing YAML and XML."""
    code = (
        "import sys, extbridge.network.wanted;"
        "print({'yaml', 'xml.parsers.expat', 'pyexpat'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout == "set()\n"
