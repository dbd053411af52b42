"""Networks of libvirt, macvlan and macvtap-cni, carried over; with what cannot be."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from extbridge.network.conversion import Form
from extbridge.network.convert import convert
from extbridge.network.definition import Handoff, Mode, Network, NicSelector, parse_network
from extbridge.network.spelling_xml import object_from_xml
from extbridge.network.spelling_yaml import object_from_yaml
from extbridge.network.store import load_network
from extbridge.network.wanted import wanted_nics
from extbridge.reservations import DEVICES
from extbridge.spec.errors import InvalidNetworkConfig
from extbridge.spec.request import parse_request
from tests.support import executable

RESOURCE = "k8s.v1.cni.cncf.io/resourceName"

CONFIG_MAP = """\
kind: ConfigMap
apiVersion: v1
metadata:
  name: macvtap-deviceplugin-config
data:
  DP_MACVTAP_CONF: |
    [ {"name": "dataplane", "lowerDevice": "eth1", "mode": "vepa"},
      {"name": "other", "lowerDevice": "eth2"} ]
"""

ATTACHMENT = """\
kind: NetworkAttachmentDefinition
apiVersion: k8s.cni.cncf.io/v1
metadata:
  name: dataplane
  namespace: tenant
  labels: {tier: front}
  uid: 4ebd5168-6321-4757-8397-f6e83484f402
  annotations:
    k8s.v1.cni.cncf.io/resourceName: macvtap.network.kubevirt.io/dataplane
    example.com/owner: somebody
    kubectl.kubernetes.io/last-applied-configuration: "{}"
spec:
  config: '{
      "cniVersion": "0.3.1",
      "name": "dataplane",
      "type": "macvtap",
      "mtu": 1400
    }'
"""


def attachment(resource: str, name: str = "net", **config: object) -> str:
    """A definition that asks for the resource."""
    return json.dumps({
        "kind": "NetworkAttachmentDefinition",
        "apiVersion": "k8s.cni.cncf.io/v1",
        "metadata": {
            "name": name, "annotations": {RESOURCE: f"macvtap.network.kubevirt.io/{resource}"},
        },
        "spec": {"config": json.dumps({"type": "macvtap", **config})},
    })  # fmt: skip


def resources(*given: dict[str, object]) -> str:
    """Their device plugin's list of resources."""
    return json.dumps({"kind": "ConfigMap", "data": {"DP_MACVTAP_CONF": json.dumps(given)}})


def converted(*documents: str) -> tuple[list[dict[str, Any]], list[str]]:
    """What the documents become, read by another than our own YAML reader; and what is left out."""
    found = convert({f"file{n}": it.encode() for n, it in enumerate(documents)})
    return list(yaml.safe_load_all(found.write(Form.YAML))), found.left_out


def test_networks_and_attachments() -> None:
    """NIC, mode and MTU come together in a network, and the attachment asks for that."""
    (networks, definition), left_out = converted(f"{CONFIG_MAP}---\n{ATTACHMENT}")
    assert left_out == []
    assert networks["kind"] == "ConfigMap"
    assert networks["metadata"] == {"name": "extbridge-networks", "namespace": "extbridge"}
    assert {name: yaml.safe_load(text) for name, text in networks["data"].items()} == {
        "dataplane.yaml": {
            "name": "dataplane",
            "extbridge": {"mode": "vepa", "dev": "eth1"},
            "mtu": 1400,
            "handoff": "device",
        },
        # Their default, and not ours.
        "other.yaml": {
            "name": "other",
            "extbridge": {"mode": "bridge", "dev": "eth2"},
            "handoff": "device",
        },
    }
    assert definition["metadata"] == {
        "name": "dataplane",
        "namespace": "tenant",
        "labels": {"tier": "front"},
        "annotations": {"example.com/owner": "somebody", RESOURCE: "extbridge.io/dataplane"},
    }
    assert json.loads(definition["spec"]["config"]) == {
        "cniVersion": "0.3.1",
        "name": "dataplane",
        "type": "extbridge",
        "network": "dataplane",
        "capabilities": {"mac": True, "ips": True, "bandwidth": True, "deviceID": True},
    }


def test_what_is_written_is_read(tmp_path: Path) -> None:
    """The plugin takes the networks and the configuration, as Kubernetes would hand them to it."""
    (networks, definition), _ = converted(CONFIG_MAP, ATTACHMENT)
    for name, text in networks["data"].items():
        (tmp_path / name).write_text(text)
    for name, nic in (("dataplane", "eth1"), ("other", "eth2")):
        network = load_network(name, str(tmp_path))
        assert (network.dev, network.handoff) == (NicSelector(names=(nic,)), Handoff.DEVICE)
    config = json.loads(definition["spec"]["config"])
    config["runtimeConfig"] = {"deviceID": str(0x60000001), "mac": "52:54:00:00:00:01"}
    environ = {
        "CNI_COMMAND": "ADD",
        "CNI_CONTAINERID": "c",
        "CNI_NETNS": "/n",
        "CNI_IFNAME": "net1",
    }
    request = parse_request(environ, json.dumps(config).encode())
    (wanted,) = wanted_nics(request, str(tmp_path))
    assert wanted.network == Network(
        "dataplane", NicSelector(names=("eth1",)), Mode.VEPA, mtu=1400, handoff=Handoff.DEVICE
    )
    assert (wanted.ifindex, wanted.mac) == (0x60000001, "52:54:00:00:00:01")


def test_as_kubectl_prints_them() -> None:
    """A list that was exported is read as its items are, be it YAML or JSON."""
    items = [yaml.safe_load(CONFIG_MAP), yaml.safe_load(ATTACHMENT)]
    exported = {"apiVersion": "v1", "kind": "List", "items": items}
    expected = converted(CONFIG_MAP, ATTACHMENT)
    assert converted(yaml.safe_dump(exported)) == expected
    assert converted(json.dumps(exported, indent="\t")) == expected


def test_without_a_list_of_resources() -> None:
    """Where their device plugin offers every NIC by its name, those that are asked for follow."""
    (networks, *definitions), _ = converted(
        resources(), attachment("eth0", "a"), attachment("eth1", "b")
    )
    assert yaml.safe_load(networks["data"]["eth1.yaml"]) == {
        "name": "eth1",
        "extbridge": {"mode": "bridge", "dev": "eth1"},
        "handoff": "device",
    }
    names = [it["metadata"]["annotations"][RESOURCE] for it in definitions]
    assert names == ["extbridge.io/eth0", "extbridge.io/eth1"]


def test_more_than_one_mtu() -> None:
    """Attachments of one NIC that differ in their MTU become networks that do."""
    given = [attachment("a", f"n{n}", **mtu) for n, mtu in enumerate(
        ({"mtu": 1500}, {"mtu": 1500}, {"mtu": 1400}, {}, {"mtu": 1400}, {"mtu": 0})
    )]  # fmt: skip
    (networks, *definitions), left_out = converted(
        resources({"name": "a", "lowerDevice": "eth0"}), *given
    )
    mtus = {name: yaml.safe_load(text).get("mtu") for name, text in networks["data"].items()}
    assert mtus == {"a.yaml": 1500, "a-mtu1400.yaml": 1400, "a-mtu.yaml": None}
    asked = [json.loads(it["spec"]["config"])["network"] for it in definitions]
    assert asked == ["a", "a", "a-mtu1400", "a-mtu", "a-mtu1400", "a-mtu"]
    assert [it["metadata"]["annotations"][RESOURCE] for it in definitions] == [
        f"extbridge.io/{name}" for name in asked
    ]
    assert len(left_out) == 4
    assert "have to ask for extbridge.io/a-mtu1400" in left_out[0]


def test_plugins_behind_theirs() -> None:
    """In a list of plugins theirs is replaced, and the others stay."""
    chain = {"cniVersion": "0.4.0", "name": "chain", "plugins": [
        {"type": "macvtap", "mtu": 1400}, {"type": "tuning", "mtu": 7},
    ]}  # fmt: skip
    given = json.loads(attachment("a"))
    given["spec"]["config"] = json.dumps(chain)
    (_, definition), _ = converted(resources({"name": "a", "master": "eth0"}), json.dumps(given))
    config = json.loads(definition["spec"]["config"])
    assert [it["type"] for it in config["plugins"]] == ["extbridge", "tuning"]
    assert (config["cniVersion"], config["name"]) == ("0.4.0", "chain")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            resources({"name": "a", "lowerDevice": "e", "capacity": 5}),
            f"a.capacity 5: a network has {DEVICES} devices",
        ),
        (resources({"name": "a", "lowerDevice": "e", "x": 5}), "a.x: "),
        (attachment("a", promiscMode=True), "promiscMode: a guest that"),
        (attachment("a", owner=1000), "owner: the device node is given to 107"),
        (attachment("a", ipam={"type": "host-local"}), "ipam: macvtap-cni takes no notice"),
        (attachment("a", mac="52:54:00:00:00:01"), "mac: "),
        ('{"kind": "ConfigMap", "metadata": {"name": "x"}}', "ConfigMap x: it has no DP_MACVTAP"),
        ("kind: Pod\nmetadata: {name: x, namespace: y}", "Pod y/x: it defines no network"),
        (attachment("a").replace("macvtap\\", "bridge\\"), "net: it is not of the type macvtap"),
    ],
)
def test_what_is_left_out(given: str, said: str) -> None:
    """Whatever has no place in a network is named, with the file and the object that it is in."""
    _, left_out = converted(resources({"name": "a", "lowerDevice": "e"}), given)
    assert len(left_out) == 1
    assert left_out[0].startswith("file1: ")
    assert said in left_out[0]


def test_what_says_nothing_is_not_told() -> None:
    """Settings at their defaults are carried over by being left out."""
    usual: dict[str, Any] = {"promiscMode": False, "owner": 107, "group": 107, "mtu": 1500}
    _, left_out = converted(
        resources({"name": "a", "lowerDevice": "e", "capacity": 100}), attachment("a", **usual)
    )
    assert left_out == []


@pytest.mark.parametrize(
    ("documents", "said"),
    [
        ((attachment("a"),), "no file says which NIC the resource a is"),
        (
            (resources({"name": "data", "lowerDevice": "e"}), attachment("date")),
            "did you mean data?",
        ),
        ((resources({"lowerDevice": "e"}),), "name is missing"),
        ((resources({"name": "a"}),), "a.lowerDevice is missing"),
        ((resources({"name": "a b", "lowerDevice": "e"}),), 'name is the string "a b"'),
        ((resources({"name": "a", "lowerDevice": "e/0"}),), 'extbridge.dev is the string "e/0"'),
        ((resources({"name": "a", "lowerDevice": "e", "mode": "brigde"}),), "did you mean bridge?"),
        (
            (
                resources({"name": "a", "lowerDevice": "e"}),
                resources({"name": "a", "lowerDevice": "f"}),
            ),
            "file1: ConfigMap: data.DP_MACVTAP_CONF: the resource a is there twice",
        ),
        ((CONFIG_MAP.replace("} ]", "},"),), "DP_MACVTAP_CONF: line 3, column 1"),
        ((CONFIG_MAP, ATTACHMENT.replace("1400", "14oo")), "tenant/dataplane: spec.config: line 1"),
        ((CONFIG_MAP, ATTACHMENT.replace("1400", "40")), "mtu is the number 40"),
        ((CONFIG_MAP, ATTACHMENT.replace("macvtap.net", "x.net")), "has to be macvtap.network"),
        (("kind: [",), "file0: line 1, column 8"),
        (("- 1",), "file0: a document is a list"),
        (("---\n---\n",), "there is no network in file0"),
        ((resources(),), "there is no network in file0"),
        (("kind: Pod",), "there is no network in"),
    ],
)
def test_what_no_network_can_be_made_of(documents: tuple[str, ...], said: str) -> None:
    """What is wrong is refused with its place, and nothing is written."""
    with pytest.raises(InvalidNetworkConfig) as refused:
        converted(*documents)
    assert said in str(refused.value)


FULL: Final = """
<network>
  <name>blue</name>
  <uuid>4ebd5168-6321-4757-8397-f6e83484f402</uuid>
  <extbridge mode='passthrough' mtu='9000' queues='4' mac='52:54:00:00:00:01' macPrefix='52:55'
             antispoof='off' trust='yes' handoff='device'>
    <select driver='ixgbe' route='default'/>
    <bandwidth egressRate='8000' egressBurst='800'/>
  </extbridge>
</network>
"""


@pytest.mark.parametrize(
    "xml",
    [
        "<network><name>vepanet</name><extbridge mode='vepa' dev='eth0'/></network>",
        FULL,
        "<network><name>a</name><forward mode='private' dev='eth0'/></network>",
        """<network connections='2'><name>off</name><forward dev='no' mode='passthrough'>
        <interface dev='no' connections='1'/><interface dev='1e5'/></forward></network>""",
    ],
)
@pytest.mark.parametrize("form", Form)
def test_libvirts_networks(xml: str, form: Form) -> None:
    """Either spelling of XML becomes what the plugin takes for the same network, in each form."""
    found = convert({"net.xml": xml.encode()})
    expected = parse_network(object_from_xml(xml))
    (written,) = read_back(found.write(form), form)
    assert written == expected
    is_told = form is not Form.YAML and expected.handoff is Handoff.DEVICE
    assert len(found.left_out) == is_told


def read_back(text: str, form: Form) -> list[Network]:
    """The networks of what convert has written, read as the plugin reads them."""
    if form is Form.JSON:
        return [defined_by(json.loads(text))]
    documents = list(yaml.safe_load_all(text))
    if form is Form.NAD:
        return [defined_by(json.loads(it["spec"]["config"])) for it in documents]
    return [parse_network(object_from_yaml(it)) for it in documents[0]["data"].values()]


def defined_by(config: dict[str, Any]) -> Network:
    """The network of an ADD with this configuration."""
    (plugin,) = (it for it in config.get("plugins", [config]) if it["type"] == "extbridge")
    environ = {
        "CNI_COMMAND": "ADD", "CNI_CONTAINERID": "c", "CNI_NETNS": "/n", "CNI_IFNAME": "net1",
    }  # fmt: skip
    plugin = {**plugin, "name": config["name"], "cniVersion": config["cniVersion"]}
    (wanted,) = wanted_nics(parse_request(environ, json.dumps(plugin).encode()))
    return wanted.network


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "master": st.sampled_from(["eth0", "1e5", ""]),
            "mode": st.sampled_from([*map(str, Mode), ""]),
            "mtu": st.sampled_from([0, 68, 1500, 65535]),
            "mac": st.sampled_from(["", "52:54:00:00:00:01"]),
            "ipam": st.sampled_from([{}, {"type": "host-local", "subnet": "192.0.2.0/24"}]),
            "linkInContainer": st.just(value=False),
            "dns": st.just({"nameservers": ["192.0.2.53"]}),
        },
    ),
    st.sampled_from(Form),
    st.sampled_from(["conf", "list", "definition"]),
)
def test_macvlan(keys: dict[str, Any], form: Form, kind: str) -> None:
    """A configuration of macvlan becomes a network that says the same, wherever it stands."""
    plugin: dict[str, Any] = {"type": "macvlan", **keys}
    config = {"cniVersion": "1.0.0", "name": "lan", **plugin}
    if kind == "list":
        config = {"cniVersion": "1.0.0", "name": "lan", "plugins": [plugin, {"type": "tuning"}]}
    given_ = json.dumps(config)
    if kind == "definition":
        metadata = {"name": "lan", "namespace": "tenant"}
        given_ = json.dumps({
            "kind": "NetworkAttachmentDefinition", "metadata": metadata, "spec": {"config": given_},
        })  # fmt: skip
    found = convert({"it": given_.encode()})
    (network,) = read_back(found.write(form), form)
    master = keys.get("master")
    assert network == Network(
        "lan",
        NicSelector(names=(master,)) if master else NicSelector(route="default"),
        Mode(keys.get("mode") or "bridge"),
        mtu=keys.get("mtu") or None,
        mac=keys.get("mac") or None,
        ipam=keys.get("ipam") or None,
    )
    # What only a configuration can say is lost to a definition, unless there is one besides.
    is_told = form is Form.YAML and kind != "definition" and (kind == "list" or "dns" in keys)
    assert bool(found.left_out) == is_told


def macvlan(**keys: object) -> str:
    """A configuration of macvlan."""
    return json.dumps({
        "cniVersion": "1.0.0", "name": "lan", "type": "macvlan", "master": "eth0", **keys,
    })  # fmt: skip


def test_macvlan_in_a_list_keeps_its_neighbours() -> None:
    """Plugins around macvlan, dns and the list's own keys are where they were."""
    config = {"cniVersion": "0.4.0", "name": "lan", "disableCheck": True, "plugins": [
        {"type": "a"}, {"type": "macvlan", "dns": {"domain": "example.com"}}, {"type": "tuning"},
    ]}  # fmt: skip
    written = json.loads(convert({"it": json.dumps(config).encode()}).write(Form.JSON))
    assert [it["type"] for it in written["plugins"]] == ["a", "extbridge", "tuning"]
    assert written["plugins"][1]["dns"] == {"domain": "example.com"}
    assert (written["cniVersion"], written["disableCheck"]) == ("0.4.0", True)


def test_one_name_in_two_namespaces() -> None:
    """Attachment definitions that share a name become networks that do not."""
    given_ = [
        {
            "kind": "NetworkAttachmentDefinition",
            "metadata": {"name": "lan", "namespace": namespace},
            "spec": {"config": macvlan(master=nic)},
        }
        for namespace, nic in (("a", "eth0"), ("b", "eth0"), ("c", "eth1"))
    ]
    (networks, *definitions), left_out = converted(json.dumps({"kind": "List", "items": given_}))
    assert list(networks["data"]) == ["lan.yaml", "lan-c.yaml"]
    asked = [json.loads(it["spec"]["config"])["network"] for it in definitions]
    assert (asked, left_out) == (["lan", "lan", "lan-c"], [])


@pytest.mark.parametrize(
    ("text", "form", "said"),
    [
        ("<network><name>a</name><extbridge dev='e'/><ip/><dns/></network>", "json",
         ["file: <ip>: ", "file: <dns>: "]),
        (macvlan(ipam={"type": "dhcp"}), "json", ["ipam: dhcp is the guest's"]),
        (macvlan(ipam={"subnet": "192.0.2.0/24"}), "json", ["ipam: without a type"]),
        (macvlan(bcqueuelen=5, x=1), "json", ["bcqueuelen: ", "x: macvlan takes no notice"]),
        (macvlan(capabilities={"portMappings": True}), "json", ["capabilities.portMappings"]),
        (macvlan(cniVersion="0.2.0"), "json", ["cniVersion 0.2.0 cannot tell"]),
        (macvlan(dns={"domain": "a"}), "yaml", ["dns: a network's definition has no place"]),
        (macvlan(name="Lan_2"), "nad", ["Kubernetes allows no such name; lan-2 it is"]),
        (macvlan() + "\n---\nkind: Pod", "yaml", ["Pod: it defines no network"]),
        (macvlan() + '\n---\n{"type": "bridge"}', "yaml", ["it is not of the type macvlan"]),
    ],
)  # fmt: skip
def test_what_of_others_is_left_out(text: str, form: str, said: list[str]) -> None:
    """What libvirt or macvlan had besides is named."""
    # With a YAML comment in front, more than one document may follow.
    data = text if text.startswith("<") else f"# YAML\n{text}"
    found = convert({"file": data.encode()})
    found.write(Form(form))
    assert len(found.left_out) == len(said)
    for sentence, part in zip(found.left_out, said, strict=True):
        assert part in sentence


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<network><name>a</name><forward mode='nat'/></network>", "net: <forward mode='nat'>"),
        ("<network><name>a</name><forward mode='vepa' dev='e'/><vlan/></network>", "net: <vlan>"),
        ("<domain/>", "it has to be <network>"),
        ("<network>", "line 1, column 10"),
        (macvlan(linkInContainer=True), "net: linkInContainer is true"),
        (macvlan(mode="source"), "net: mode is the string"),
        (macvlan(mtu=9), "net: mtu is the number 9"),
        (macvlan(name="a b"), "net: name is the string"),
        (macvlan(cniVersion="7"), "net: cniVersion is the string"),
        (json.dumps({"name": "a", "plugins": [{"type": "macvlan"}] * 2}), "has 2 of the type"),
        ('{"type": "bridge"}', "there is no network in net; understood: libvirt's"),
        ("hello: world", "net: this is no network of any program that is known; understood: "),
        ("hello", "net: a document is the string"),
        ("[]", "there is no network in net"),
    ],
)
def test_what_is_not_understood(text: str, said: str) -> None:
    """Files of no such program are refused with what is understood, others with their fault."""
    with pytest.raises(InvalidNetworkConfig) as refused:
        convert({"net": text.encode()})
    assert said in str(refused.value)


def test_names_that_mean_two_networks() -> None:
    """Networks that are not the same do not silently become one."""
    xml = b"<network><name>lan</name><extbridge mode='vepa' dev='eth0'/></network>"
    same = b"name: lan\nextbridge: {dev: eth0}"
    assert list(convert({"a": xml, "lan.yaml": same}).networks) == ["lan"]
    with pytest.raises(InvalidNetworkConfig, match=r"^b: the network lan is there already"):
        convert({"a": xml, "b": macvlan().encode()})


def test_a_configuration_is_of_one_network() -> None:
    """JSON of several networks is refused, as no runtime could read it."""
    found = convert({"a": macvlan().encode(), "b": macvlan(name="wan").encode()})
    with pytest.raises(InvalidNetworkConfig, match="there are 2: lan, wan; give one file"):
        found.write(Form.JSON)


def test_macvtap_cnis_networks_elsewhere() -> None:
    """Where the network is not the node's, kubelet has no device for it, which is told."""
    files = {"a": CONFIG_MAP.encode(), "b": ATTACHMENT.encode()}
    found = convert(files)
    networks = read_back(found.write(Form.NAD), Form.NAD)
    assert networks == list(convert(files).networks.values())
    assert [it.split(":")[0] for it in found.left_out] == ["network dataplane", "network other"]


def anything() -> st.SearchStrategy[object]:
    """JSON with a preference for the words that matter here."""
    words = st.sampled_from(["macvtap", "a", "vepa", "107", "items", "type", "name", "mtu"])
    plain = st.none() | st.booleans() | st.integers() | st.floats() | words | st.text()
    keys = words | st.sampled_from(["plugins", "lowerDevice", "mode", "capacity", "owner"])
    return st.recursive(
        plain,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner),
        max_leaves=8,
    )


@given(anything(), anything(), anything())
def test_anything_else(listed: object, config: object, metadata: object) -> None:
    """Whatever is given becomes networks that are valid YAML, or is refused for what it is."""
    map_ = {"kind": "ConfigMap", "data": {"DP_MACVTAP_CONF": json.dumps(listed)}}
    definition = json.loads(attachment("a"))
    definition["metadata"]["labels"] = metadata
    definition["spec"]["config"] = json.dumps(config)
    try:
        found, _ = converted(json.dumps(map_), json.dumps(definition))
    except InvalidNetworkConfig:
        return
    assert found


def test_command(tmp_path: Path) -> None:
    """The exit status says whether all was carried over, some of it, or nothing."""
    for name, text in (
        ("map", CONFIG_MAP),
        ("nad", ATTACHMENT),
        ("bad", "{"),
        ("pod", "kind: Pod"),
    ):
        (tmp_path / name).write_text(text)

    def run(*names: str, stdin: str = "") -> tuple[int, int, str]:
        command = (executable("extbridge"), "convert", *names)
        done = subprocess.run(
            command, input=stdin, capture_output=True, text=True, check=False, cwd=tmp_path
        )
        return done.returncode, len(list(yaml.safe_load_all(done.stdout))), done.stderr

    assert run("map", "nad") == (0, 2, "")
    assert run("map", "-", stdin=ATTACHMENT) == (0, 2, "")
    partly = "left out: pod: Pod: it defines no network\n"
    assert run("map", "nad", "pod") == (3, 2, partly)
    status, documents, stderr = run("map", "bad")
    assert (status, documents) == (1, 0)
    assert stderr.startswith("extbridge: bad: line 1, column 2")
    (tmp_path / "bad").write_bytes(b"\xff")
    assert run("bad")[2].startswith("extbridge: bad: byte 0 is not UTF-8")
    assert run("missing")[0] == 2
    (tmp_path / "net.xml").write_text(
        "<network><name>a</name><extbridge dev='eth0'/><dns/></network>"
    )
    left_out = "left out: net.xml: <dns>: extbridge takes no notice of it\n"
    assert run("--to", "json", "net.xml") == (3, 1, left_out)
