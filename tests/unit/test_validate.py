"""Whether files are what the plugin takes, and where they are not."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from extbridge.network.definition import DEFINITION_KEYS, parse_network
from extbridge.network.store import READERS, read_definition
from extbridge.network.validate import find_faults
from extbridge.network.wanted import wanted_nics
from extbridge.spec.errors import CniError
from extbridge.spec.request import parse_request
from tests.support import executable

DEPLOY = Path(__file__).parents[2] / "deploy"


def faults(file: str, text: str) -> list[str]:
    """What is said of a file, without what may be done about it."""
    return [str(it).partition(";")[0] for it in find_faults(file, text.encode())]


def test_each_fault_of_a_definition() -> None:
    """A definition's faults are all told, each with the line and column of its key."""
    text = """\
# The VMs' network
name: vepanet
extbridge:
  mode: vepaa
  dev: {match: "a b"}
mtu: 10
queue: 3
bandwidth:
  egressBurst: 7
  ingressRate: 8
"""
    assert faults("vepanet.yaml", text) == [
        'vepanet.yaml:4:3: extbridge.mode is the string "vepaa"',
        'vepanet.yaml:5:9: extbridge.dev.match is the string "a b"',
        "vepanet.yaml:6:1: mtu is the number 10",
        "vepanet.yaml:7:1: queue is not a known key",
        "vepanet.yaml:10:3: bandwidth.ingressRate is given without bandwidth.ingressBurst",
    ]
    (fault, *_) = find_faults("vepanet.yaml", text.encode())
    assert fault.hint.startswith("did you mean vepa?")


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("a.yaml", "extbridge: {dev: eth0}", []),
        ("a.json", '{"name": "a", "extbridge": {"dev": "eth0"}}', []),
        ("a.xml", "<network><name>a</name><extbridge dev='eth0'/></network>", []),
        ("a.xml", "<network>\n<a></network>", ["a.xml:2:6: mismatched tag"]),
        ("a.xml", "<network><extbridge mode='x' dev='e e' mtu='1'/></network>", [
            'a.xml: extbridge.dev is the string "e e"', 'a.xml: extbridge.mode is the string "x"',
            "a.xml: mtu is the number 1",
        ]),
        ("a.yaml", "extbridge: {dev: [eth0, 7, eth0]}",
         ["a.yaml:1:25: extbridge.dev[1] is the number 7"]),
        ("a.yaml", "extbridge: [",
         ["a.yaml:1:13: expected the node content, but found '<stream end>'"]),
        ("a.yaml", "mtu: 1500", ["a.yaml:1:1: extbridge is missing"]),
        ("a.yaml", "extbridge:\n  mode: vepa", ["a.yaml:1:1: extbridge.dev is missing"]),
        ("a.yaml", "", ["a.yaml: there is nothing of extbridge in it"]),
        ("a.yaml", "- 1", ["a.yaml: the document is a list"]),
        ("a.yaml", "extbridge: {dev: eth0}\n---\na: 1", ["a.yaml:2:1: a second document"]),
        ("a.yaml", "extbridge: {dev: eth0}\nname: b",
         ['a.yaml:2:1: name is the string "b", and the file is called a']),
        ("a.yaml", "extbridge: {dev: eth0}\nname: b c", ['a.yaml:2:1: name is the string "b c"']),
        ("net", "extbridge: {dev: eth0}", ["net:1:1: name is missing"]),
        ("a.json", '{\n\t"extbridge": {"dev": "eth0"},\n\t"mtu": 1,\n\t"x": 2\n}',
         ["a.json:3:2: mtu is the number 1", "a.json:4:2: x is not a known key"]),
        ("a.json", '{"extbridge": }', ["a.json:1:15: Expecting value"]),
        ("a.json", '{\n\t"mtu": 1,\n\t"mtu": 1}',
         ['a.json:3:2: a key is twice in one object: the string "mtu"']),
        ("a.json", "extbridge: {dev: eth0}", ["a.json:1:1: Expecting value"]),
        ("a.conf", '{"name": "a"}', ["a.conf:1:1: extbridge is missing"]),
    ],
)  # fmt: skip
def test_definitions(file: str, text: str, said: list[str]) -> None:
    """Each spelling is read as the folder of networks is, by the file's suffix."""
    assert faults(file, text) == said


def test_what_is_no_text() -> None:
    """A file of bytes is told to be one."""
    (fault,) = find_faults("a.yaml", b"\xff")
    assert str(fault) == "a.yaml: byte 0 is not UTF-8; save the file as UTF-8"


def test_what_nests_deeply() -> None:
    """Hundreds of lists within each other are a fault like others."""
    lists = "[" * 400 + "]" * 400
    nested = f'{{"extbridge": {{"dev": "eth0"}}, "ipam": {{"type": "a", "x": {lists}}}}}'
    assert faults("a.json", nested) == ["a.json:1:32: ipam nests objects and lists too deeply"]


CONF: dict[str, Any] = {"cniVersion": "1.0.0", "name": "a", "type": "extbridge"}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({**CONF, "network": "vepanet"}, []),
        ({**CONF, "extbridge": {"dev": "eth0"}, "cni.dev/x": 1, "dns": {}}, []),
        ({**CONF, "type": "extbridge-cni", "network": "vepanet"}, []),
        ({**CONF, "capabilities": {"io.kubernetes.cri.pod-annotations": True}}, []),
        (CONF, ["a.conf:1:1: the configuration says neither extbridge nor network"]),
        ({**CONF, "network": "../x"}, ['a.conf:5:2: network is the string "../x"']),
        ({**CONF, "network": "x", "mtu": 9}, [
            "a.conf:1:1: the configuration names the network 'x' and gives keys of one besides: mtu"
        ]),
        ({**CONF, "networks": "x", "extbridge": {"dev": "eth0", "mode": "x"}}, [
            "a.conf:5:2: networks is not a known key",
            'a.conf:8:3: extbridge.mode is the string "x"',
        ]),
        ({**CONF, "cniVersion": "0.2.0", "name": "", "network": "x"}, [
            "a.conf:2:2: cniVersion 0.2.0 cannot express a result without an IP address",
            "a.conf:3:2: name is missing",
        ]),
        ({"cniVersion": "1.0.0", "name": "a", "plugins": [
            {"type": "ptp"}, {"type": "extbridge", "mtu": 1, "extbridge": {"dev": "eth0"}},
        ]}, ["a.conf:10:4: mtu is the number 1"]),
        ({"cniVersion": "1.0.0", "name": "a", "plugins": [{"type": "ptp"}, {"type": "extbridge"}]},
         []),
        ({"cniVersion": "1.0.0", "plugins": [{"type": "extbridge", "network": "x"}]},
         ["a.conf:4:3: name is missing"]),
        ({"name": "a", "plugins": [7]}, ["a.conf:3:2: plugins[0] is the number 7"]),
        ({**CONF, "type": "macvlan"}, ["a.conf: there is nothing of extbridge in it"]),
    ],
)  # fmt: skip
def test_configurations(config: dict[str, Any], said: list[str]) -> None:
    """A plugin's configuration, or a list's part of it, is held to what ADD takes."""
    assert faults("a.conf", json.dumps(config, indent="\t")) == said


KUBERNETES = """\
apiVersion: k8s.cni.cncf.io/v1
kind: NetworkAttachmentDefinition
metadata:
  name: lan
  annotations: {k8s.v1.cni.cncf.io/resourceName: extbridge.io/b}
spec:
  config: |
    {
      "type": "extbridge",
      "cniVersion": "1.0.0",
      "network": "lan",
      "mtuu": 3
    }
---
kind: Pod
---
kind: List
items:
  - kind: ConfigMap
    metadata: {name: extbridge-networks}
    data:
      lan.yaml: |
        extbridge:
          mode: vepaa
          dev: eth0
        mtu: 10
      b.json: |
        {"extbridge": {"dev": "eth0"},
         "mtu": 5, }
      c.json: "{\\"extbridge\\": 7}"
      d.yaml: "a: [1,\\n 2"
      d.xml: <a/>
      e.txt: hello
  - kind: ConfigMap
    metadata: {name: other}
    data: {a.yaml: x}
"""


def test_kubernetes_objects() -> None:
    """What is written within a manifest has its place in the manifest's file."""
    assert faults("all.yaml", KUBERNETES) == [
        (
            'all.yaml:5:17: k8s.v1.cni.cncf.io/resourceName is the string "extbridge.io/b", and the'
            " network is lan"
        ),
        "all.yaml:12:7: spec.config: mtuu is not a known key",
        'all.yaml:24:11: data.lan.yaml: extbridge.mode is the string "vepaa"',
        "all.yaml:26:9: data.lan.yaml: mtu is the number 10",
        "all.yaml:29:20: data.b.json: Expecting property name enclosed in double quotes",
        "all.yaml:30:7: data.c.json: extbridge is the number 7",
        "all.yaml:31:7: data.d.yaml: line 2, column 3: expected ',' or ']', but got '<stream end>'",
        "all.yaml:32:7: network d is defined more than once",
        'all.yaml:32:7: data.d.xml: the document\'s element is the string "a"',
        "all.yaml:33:7: data.e.txt is no file of a network",
    ]


def test_what_kubernetes_has_of_others() -> None:
    """Manifests with nothing of extbridge are told to have none, and what would be some."""
    (fault,) = find_faults("pod.yaml", b"kind: Pod")
    assert fault.message == "there is nothing of extbridge in it"
    assert "the ConfigMap extbridge-networks" in fault.hint


@pytest.mark.parametrize(
    "path", [*DEPLOY.rglob("networks.yaml"), DEPLOY / "examples/passthru.yaml"], ids=str
)
def test_what_is_shipped(path: Path) -> None:
    """The manifests that users start from are without fault."""
    assert find_faults(str(path), path.read_bytes()) == []


def values() -> st.SearchStrategy[object]:
    """Values that some key could have."""
    words = st.sampled_from(["a", "eth0", "vepa", "mac", "52:54:00:00:00:01", "a b", "static", ""])
    plain = st.none() | st.booleans() | st.sampled_from([0, 1, 1500, 1 << 70]) | words
    keys = st.sampled_from(["dev", "mode", "type", "match", "ingressRate", "ingressBurst", "a.b"])
    return st.recursive(
        plain,
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(keys, inner, max_size=3),
        max_leaves=4,
    )


@given(
    st.dictionaries(st.sampled_from([*DEFINITION_KEYS, "x", "extbridge.dev"]), values()),
    st.sampled_from([".yaml", ".json"]),
)
def test_ok_is_what_the_plugin_takes(keys: dict[str, object], suffix: str) -> None:
    """A file is said to be good just when it would be a network in the folder."""
    definition = {"name": "a", "extbridge": {"dev": "eth0"}, **keys}
    text = json.dumps(definition) if suffix == ".json" else yaml.safe_dump(definition)
    told = find_faults(f"a{suffix}", text.encode())
    try:
        parse_network(read_definition(text.encode(), suffix), name="a")
    except CniError:
        assert told
        assert all(it.place for it in told)
    else:
        assert told == []


@given(st.dictionaries(
    st.sampled_from([*DEFINITION_KEYS, "cniVersion", "capabilities", "x"]), values(), max_size=4,
))  # fmt: skip
def test_ok_is_what_add_takes(keys: dict[str, object]) -> None:
    """A configuration is said to be good just when an ADD would get as far as the kernel."""
    config = {**CONF, "extbridge": {"dev": "eth0"}, **keys, "type": "extbridge"}
    environ = {
        "CNI_COMMAND": "ADD", "CNI_CONTAINERID": "c", "CNI_NETNS": "/n", "CNI_IFNAME": "net1",
    }  # fmt: skip
    told = find_faults("a.conf", json.dumps(config).encode())
    try:
        wanted_nics(parse_request(environ, json.dumps(config).encode()))
    except CniError:
        assert told
    else:
        assert told == []


@given(st.binary() | st.text().map(str.encode), st.sampled_from([*READERS, ".conf", ""]))
def test_anything_else(data: bytes, suffix: str) -> None:
    """No file whatever makes it fail."""
    assert find_faults(f"a{suffix}", data)


@given(values(), values(), values())
def test_anything_in_kubernetes_objects(name: object, inner: object, other: object) -> None:
    """Nor do objects of Kubernetes that are none."""
    for kind in ("ConfigMap", "NetworkAttachmentDefinition", "List", other):
        for data in (inner, {"a.yaml": json.dumps(inner)}):
            value = {
                "kind": kind, "metadata": {"name": name, "annotations": other}, "data": data,
                "spec": {"config": json.dumps(inner)}, "items": other,
            }  # fmt: skip
            find_faults("a.json", json.dumps(value).encode())
            value["metadata"] = {"name": "extbridge-networks"}
            find_faults("a.yaml", yaml.safe_dump(value).encode())


def test_command(tmp_path: Path) -> None:
    """The exit status is 1 with any fault in any file."""
    (tmp_path / "good.yaml").write_text("extbridge: {dev: eth0}")
    (tmp_path / "bad.yaml").write_text("extbridge: {dev: eth0, mode: x}")

    def run(*names: str, stdin: str = "") -> tuple[int, list[str]]:
        command = (executable("extbridge"), "validate", *names)
        done = subprocess.run(
            command, input=stdin, capture_output=True, text=True, check=False, cwd=tmp_path
        )
        assert done.stderr == ""
        return done.returncode, done.stdout.splitlines()

    assert run("good.yaml") == (0, ["good.yaml: ok"])
    status, lines = run("bad.yaml", "good.yaml")
    assert (status, len(lines), lines[1]) == (1, 2, "good.yaml: ok")
    assert lines[0].startswith("bad.yaml:1:24: extbridge.mode is ")
    assert run("-", stdin=json.dumps({**CONF, "network": "a"})) == (0, ["<stdin>: ok"])
