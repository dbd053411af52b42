"""A node's folders, with extbridge put into them and taken out again."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from extbridge.node.conflist import PLUGIN
from tests.support import executable

CLUSTER = """{
 "name": "cluster", "cniVersion": "0.3.1", "vendor/key": [1, 2.50, {"z": null, "a": true}],
 "plugins": [{"type": "calico", "mtu": 0, "policy": {"type": "k8s"}, "\\u00fc": "\\ud800"},
             {"type": "portmap", "capabilities": {"portMappings": true}}],
 "args": {}
}"""
"""As a cluster's network has it, spaced in a way that nobody would make up again."""

SINGLE = '{"cniVersion": "0.3.1", "name": "single", "type": "multus", "delegates": [{"a": 1}]}'

VEPANET = {
    "cniVersion": "1.1.0",
    "name": "vepanet",
    "plugins": [{"type": "extbridge", "extbridge": {"mode": "vepa", "dev": "eth0"}}],
}


@dataclass(frozen=True, slots=True)
class Node:
    """The two folders of a node, and `extbridge` run upon them."""

    bin_dir: Path
    conf_dir: Path

    def __call__(self, verb: str, *options: str) -> subprocess.CompletedProcess[str]:
        """Run install or uninstall with its folders."""
        command = (executable("extbridge"), verb, "--bin-dir", str(self.bin_dir),
                   "--conf-dir", str(self.conf_dir), *options)  # fmt: skip
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def install(self, *options: str) -> None:
        """Install, which has to be silent and to succeed."""
        self._do("install", *options)

    def uninstall(self) -> None:
        """Uninstall, which has to be silent and to succeed."""
        self._do("uninstall")

    def refusal(self, verb: str, *options: str) -> str:
        """What it says as it fails, having changed nothing in either folder."""
        before = self.picture()
        done = self(verb, *options)
        assert (done.returncode, done.stdout) == (1, "")
        assert self.picture() == before
        return done.stderr

    def write(self, name: str, text: str | Mapping[str, object]) -> Path:
        """Write a configuration, as its owner would."""
        path = self.conf_dir / name
        path.write_text(text if isinstance(text, str) else json.dumps(text))
        return path

    def read(self, name: str) -> dict[str, Any]:
        """The configuration of that name."""
        value: dict[str, Any] = json.loads((self.conf_dir / name).read_text())
        return value

    def first(self) -> str:
        """The file that runtimes read: the first of these names by their bytes."""
        names = [
            it for it in os.listdir(self.conf_dir) if it.endswith((".conf", ".conflist", ".json"))
        ]
        return min(names, key=os.fsencode)

    def picture(self) -> dict[str, tuple[object, ...]]:
        """All files, with what is in them, and their modes and owners."""
        files = (*self.bin_dir.iterdir(), *self.conf_dir.iterdir())
        return {str(path): _shown(path) for path in files}

    def _do(self, verb: str, *options: str) -> None:
        done = self(verb, *options)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def _shown(path: Path) -> tuple[object, ...]:
    status = path.lstat()
    content = os.readlink(path) if path.is_symlink() else path.read_bytes()
    return content, oct(status.st_mode), status.st_uid, status.st_gid


@pytest.fixture
def node(tmp_path: Path) -> Node:
    """A node without any network yet."""
    node = Node(tmp_path / "bin", tmp_path / "net.d")
    node.bin_dir.mkdir()
    node.conf_dir.mkdir()
    return node


# Behind the cluster's network.


def test_chained(node: Node) -> None:
    """The plugin comes last in the first network, of which nothing else changes; and goes again."""
    original = node.write("10-calico.conflist", CLUSTER)
    original.chmod(0o600)
    os.chown(original, 12, 34)
    node.write("87-podman.conflist", CLUSTER)
    before = node.picture()
    node.install("--chained")
    cluster = json.loads(CLUSTER)
    chained = node.read("10-calico.conflist")
    assert chained == {**cluster, "plugins": [*cluster["plugins"], PLUGIN]}
    assert list(chained) == list(cluster)
    assert _shown(original)[1:] == before[str(original)][1:]
    assert node.first() == "10-calico.conflist"
    assert sorted(os.listdir(node.bin_dir)) == ["extbridge", "extbridge-exec"]
    assert node.read("87-podman.conflist") == cluster
    node.uninstall()
    assert node.picture() == before


@pytest.mark.parametrize("name", ["10-net.conflist", "10-net.conf"])
def test_done_twice_is_done_once(node: Node, name: str) -> None:
    """A node that starts anew is installed anew, and neither its runtime nor anybody notices."""
    node.write(name, CLUSTER if name.endswith("list") else SINGLE)
    before = node.picture()
    node.install("--chained")
    installed = node.picture()
    inode = (node.conf_dir / node.first()).stat().st_ino
    node.install("--chained")
    assert node.picture() == installed
    assert (node.conf_dir / node.first()).stat().st_ino == inode
    for _ in range(2):
        node.uninstall()
        assert node.picture() == before


@pytest.mark.parametrize("name", ["10-net.conf", "10-net.json", ".conf"])
def test_single_plugin(node: Node, name: str) -> None:
    """A plugin's own configuration stays as it is; a list that comes before it has both."""
    node.write(name, SINGLE)
    node.write("10-net.late.conf", SINGLE)
    before = node.picture()
    node.install("--chained")
    single = json.loads(SINGLE)
    assert node.first() == f"{name.rpartition('.')[0]}-extbridge.conflist"
    assert node.read(node.first()) == {
        "cniVersion": "0.3.1", "name": "single", "plugins": [single, PLUGIN],
    }  # fmt: skip
    changed = {**single, "mtu": 1400}
    node.write(name, changed)
    node.install("--chained")
    assert node.read(node.first())["plugins"] == [changed, PLUGIN]
    node.uninstall()
    (node.conf_dir / name).write_text(SINGLE)
    assert node.picture() == before


def test_network_that_comes_as_a_list_later(node: Node) -> None:
    """A list made of a single plugin's configuration does not outlive that."""
    node.write("10-net.conf", SINGLE)
    node.install("--chained")
    (node.conf_dir / "10-net.conf").unlink()
    assert "no network configuration" in node.refusal("install", "--chained")
    node.write("10-net.conflist", CLUSTER)
    node.install("--chained")
    assert node.first() == "10-net.conflist"
    assert node.read("10-net.conflist")["plugins"][-1] == PLUGIN


def test_upgrade(node: Node) -> None:
    """What another version put into the list is brought up to date where it stands."""
    original = node.write("10-net.conflist", CLUSTER)
    before = node.picture()
    node.install("--chained")
    chained = node.read("10-net.conflist")
    chained["plugins"][-1] = {**PLUGIN, "networksDir": "/etc/networks"}
    chained["plugins"].append({"type": "tuning"})
    original.write_text(json.dumps(chained))
    node.install("--chained")
    assert node.read("10-net.conflist")["plugins"][-2:] == [PLUGIN, {"type": "tuning"}]
    # The other, which came after us, is nobody's to remove but its owner's.
    node.uninstall()
    assert node.read("10-net.conflist")["plugins"] == [*chained["plugins"][:-2], {"type": "tuning"}]
    original.write_text(CLUSTER)
    assert node.picture() == before


def test_network_that_was_written_anew(node: Node) -> None:
    """Where the cluster's network has overwritten its list, that is the original from then on."""
    anew = {**json.loads(CLUSTER), "name": "renamed"}
    node.write("10-net.conflist", CLUSTER)
    node.install("--chained")
    original = node.write("10-net.conflist", json.dumps(anew, indent=1))
    expected = _shown(original)
    node.uninstall()
    assert [_shown(path) for path in node.conf_dir.iterdir()] == [expected]
    node.install("--chained")
    node.write("10-net.conflist", json.dumps(anew, indent=1))
    node.install("--chained")
    assert node.read("10-net.conflist")["name"] == "renamed"
    node.uninstall()
    assert [_shown(path) for path in node.conf_dir.iterdir()] == [expected]


def test_extbridge_that_somebody_put_there(node: Node) -> None:
    """An extbridge with a network of its own is its writer's, before and after."""
    mine = {"type": "extbridge", "network": "vepanet"}
    cluster = json.loads(CLUSTER)
    node.write("10-net.conflist", {**cluster, "plugins": [*cluster["plugins"], mine]})
    before = node.picture()
    node.install("--chained")
    assert node.read("10-net.conflist")["plugins"][-2:] == [mine, PLUGIN]
    node.uninstall()
    assert node.picture() == before


def test_link_to_a_configuration(node: Node, tmp_path: Path) -> None:
    """A symbolic link is a link again afterwards, and what it names was never written."""
    elsewhere = tmp_path / "elsewhere.conflist"
    elsewhere.write_text(CLUSTER)
    (node.conf_dir / "10-net.conflist").symlink_to(elsewhere)
    before = node.picture()
    node.install("--chained")
    assert node.read("10-net.conflist")["plugins"][-1] == PLUGIN
    assert elsewhere.read_text() == CLUSTER
    node.uninstall()
    assert node.picture() == before


def test_node_without_a_network(node: Node) -> None:
    """Before the cluster's network is there, install says what it waits for."""
    (node.conf_dir / "10-folder.conflist").mkdir()
    done = node("install", "--chained")
    assert (done.returncode, os.listdir(node.bin_dir)) == (1, [])
    assert f"there is no network configuration in {node.conf_dir}" in done.stderr
    assert "install the cluster's network first" in done.stderr


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("10-net.conflist", '{"name": "x",\n "plugins": [}', "line 2, column 14"),
        ("10-net.conflist", '{"name": "x", "name": "y"}', 'twice in one object: the string "name"'),
        ("10-net.conflist", "[]", "the configuration is a list"),
        ("10-net.conflist", "", "line 1, column 1"),
        ("10-net.conflist", '{"name": "x", "cniVersion": "1.0.0"}', "no plugins in this list"),
        ("10-net.conflist", '{"cniVersion": "1.0.0", "plugins": {}}', "plugins is an object"),
        ("10-net.conflist", '{"cniVersion": "1.0.0", "plugins": [7]}', "plugins[0] is the number"),
        ("10-net.conflist", '{"plugins": [{"type": "a"}]}', "cniVersion 0.1.0 cannot express"),
        ("10-net.conflist", '{"cniVersion": "9", "plugins": [{}]}', 'cniVersion is the string "9"'),
        ("10-net.conflist", '{"cniVersion": "1.0.0", "plugins": [{"a": 1e999}]}', "too large"),
        ("10-net.conf", CLUSTER, "a list's name ends in .conflist"),
        ("10-net.json", '{"type": 7}', "type is the number 7"),
    ],
)
def test_configuration_that_extbridge_cannot_stand_in(
    node: Node, name: str, text: str, said: str
) -> None:
    """What would fail, now or at each pod's ADD, is refused with its place; nothing is touched."""
    node.write(name, text)
    refusal = node.refusal("install", "--chained")
    assert f"{node.conf_dir}/{name}: " in refusal
    assert said in refusal
    assert "hint: " in refusal


def test_uninstall_of_what_cannot_be_read(node: Node) -> None:
    """While a broken list may still call for extbridge, the executable stays; others do not."""
    node.write("10-net.conflist", CLUSTER)
    node.install("--chained")
    node.write("10-net.conflist", '{"plugins": [{"type": "extbridge"}')
    node.write("99-other.conflist", "{")
    assert "10-net.conflist: line 1, column 35" in node.refusal("uninstall")
    node.write("10-net.conflist", CLUSTER)
    node.uninstall()
    assert sorted(os.listdir(node.conf_dir)) == ["10-net.conflist", "99-other.conflist"]


# A network of its own.


def test_conflist(node: Node, tmp_path: Path) -> None:
    """A list is put there as it is, follows its source, and goes."""
    source = tmp_path / "05-vepanet.conflist"
    source.write_text(json.dumps(VEPANET))
    source.chmod(0o666)
    os.chown(source, 12, 34)
    node.write("10-net.conflist", CLUSTER)
    before = node.picture()
    for name in ("vepanet", "other"):
        source.write_text(json.dumps({**VEPANET, "name": name}))
        node.install("--conflist", str(source))
        shown = (source.read_bytes(), "0o100644", 0, 0)
        assert _shown(node.conf_dir / source.name) == shown
    renamed = source.rename(tmp_path / "06-vepanet.conflist")
    node.install("--conflist", str(renamed))
    assert node.first() == "06-vepanet.conflist"
    node.install("--chained")
    assert node.first() == "10-net.conflist"
    node.install("--conflist", str(renamed))
    node.uninstall()
    assert node.picture() == before


def test_conflist_that_is_somebody_elses(node: Node, tmp_path: Path) -> None:
    """A file of the same name that install did not put there is neither replaced nor removed."""
    source = tmp_path / "10-net.conflist"
    source.write_text(json.dumps(VEPANET))
    node.write("10-net.conflist", CLUSTER)
    assert "was not put there by" in node.refusal("install", "--conflist", str(source))
    (node.conf_dir / "10-net.conflist").unlink()
    node.install("--conflist", str(source))
    theirs = node.write("10-net.conflist", CLUSTER)
    assert "was not put there by" in node.refusal("install", "--conflist", str(source))
    node.uninstall()
    assert [_shown(path) for path in node.conf_dir.iterdir()] == [_shown(theirs)]


@pytest.mark.parametrize(
    ("network", "said"),
    [
        ({**VEPANET, "name": "a b"}, "name is the string"),
        ({**VEPANET, "plugins": [{"mtu": 1}]}, "plugins[0].type is missing"),
        ({**VEPANET, "plugins": [{"type": "extbridge"}]}, "plugins[0] says neither"),
        ({**VEPANET, "plugins": [PLUGIN]}, "only behind another plugin"),
        ({**VEPANET, "plugins": [{"type": "ptp"}, {"type": "extbridge", "mut": 1}]}, "mean mtu?"),
        (
            {**VEPANET, "plugins": [{"type": "extbridge", "extbridge": {"mode": "vape"}}]},
            "plugins[0]: extbridge.dev is missing",
        ),
    ],
)
def test_conflist_that_would_fail(
    node: Node, tmp_path: Path, network: dict[str, object], said: str
) -> None:
    """A list that would fail at each ADD is refused before it is there."""
    source = tmp_path / "05-vepanet.conflist"
    source.write_text(json.dumps(network))
    refusal = node.refusal("install", "--conflist", str(source))
    assert f"{source}: " in refusal
    assert said in refusal


def test_conflist_by_another_name(node: Node, tmp_path: Path) -> None:
    """A list that runtimes would take for a plugin's configuration is not put there."""
    source = tmp_path / "05-vepanet.conf"
    source.write_text(json.dumps(VEPANET))
    assert "has to end in .conflist" in node.refusal("install", "--conflist", str(source))


# The executables.


def test_executable_of_somebody_else(node: Node) -> None:
    """A program that has the plugin's name and is another stays, and install says so."""
    node.write("10-net.conflist", CLUSTER)
    other = node.bin_dir / "extbridge"
    other.write_text("#!/bin/sh\n")
    assert f"{other} is there already" in node.refusal("install", "--chained")
    other.unlink()
    node.install("--chained")
    other.unlink()
    other.symlink_to("/bin/true")
    done = node("uninstall")
    assert (done.returncode, os.listdir(node.bin_dir)) == (0, ["extbridge"])
    assert f"{other} is not extbridge's" in done.stderr
    assert os.listdir(node.conf_dir) == ["10-net.conflist"]


def test_executables_alone(node: Node) -> None:
    """Without a folder for configurations, executables come and go alone."""
    command = (executable("extbridge"), "install", "--bin-dir", str(node.bin_dir))
    assert subprocess.run(command, check=False).returncode == 0
    assert sorted(os.listdir(node.bin_dir)) == ["extbridge", "extbridge-exec"]
    node.write("10-net.conflist", CLUSTER)
    before = {str(path): _shown(path) for path in node.conf_dir.iterdir()}
    node.uninstall()
    assert node.picture() == before


@pytest.mark.parametrize("name", ["10-net.conflist", "10-net.conf"])
def test_executables_alone_where_more_has_been(node: Node, name: str) -> None:
    """Who goes over to Multus has nothing left in the node's own list; executables stay."""
    node.write(name, CLUSTER if name.endswith("list") else SINGLE)
    before = {str(path): _shown(path) for path in node.conf_dir.iterdir()}
    node.install("--chained")
    for _ in range(2):
        node.install("--shim-only")
        assert {str(path): _shown(path) for path in node.conf_dir.iterdir()} == before
        assert sorted(os.listdir(node.bin_dir)) == ["extbridge", "extbridge-exec"]


@pytest.mark.parametrize(
    "options",
    [
        ("--conf-dir", "{conf_dir}"),
        ("--chained",),
        ("--conflist", "{conf_dir}/10-net.conflist"),
        ("--conf-dir", "{conf_dir}", "--chained", "--conflist", "{conf_dir}/10-net.conflist"),
        ("--conf-dir", "{conf_dir}", "--chained", "--shim-only"),
    ],
)
def test_options_that_do_not_go_together(node: Node, options: tuple[str, ...]) -> None:
    """Nobody is led to believe that more was installed than was."""
    node.write("10-net.conflist", CLUSTER)
    given = [option.format(conf_dir=node.conf_dir) for option in options]
    command = (executable("extbridge"), "install", "--bin-dir", str(node.bin_dir), *given)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, os.listdir(node.bin_dir)) == (2, [])
    assert "--conf-dir" in done.stderr or "--chained" in done.stderr


@pytest.mark.parametrize("verb", ["install", "uninstall"])
def test_folder_that_is_not_there(node: Node, verb: str) -> None:
    """Who names a folder for configurations that is not there is told where it mostly is."""
    node.conf_dir.rmdir()
    done = node(verb, *(("--chained",) if verb == "install" else ()))
    assert (done.returncode, os.listdir(node.bin_dir)) == (1, [])
    assert f"there is no folder {node.conf_dir}" in done.stderr
    assert "/etc/cni/net.d" in done.stderr
