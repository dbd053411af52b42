"""Which file is read for a network, and what is said where there is not exactly one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from extbridge.network.definition import Network, NicSelector
from extbridge.network.store import load_network
from extbridge.spec.errors import InvalidNetworkConfig, IoFailure

VEPANET = Network("vepanet", NicSelector(names=("eth0",)))

FILES = {
    "vepanet.yaml": "name: vepanet\nextbridge: {mode: vepa, dev: eth0}\n",
    "vepanet.yml": "extbridge: {dev: eth0}\n",
    "vepanet.json": '{"name": "vepanet", "extbridge": {"dev": "eth0"}}',
    "vepanet.xml": "<network><name>vepanet</name><extbridge dev='eth0'/></network>",
}


@pytest.mark.parametrize("file", FILES)
def test_network_is_found_in_every_spelling(tmp_path: Path, file: str) -> None:
    """A network is defined by one file of its name, in YAML, JSON or libvirt's XML."""
    (tmp_path / file).write_text(FILES[file])
    assert load_network("vepanet", str(tmp_path)) == VEPANET


def test_file_may_be_a_link_and_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    """A mounted ConfigMap, which is made of links, and a file from Windows are read."""
    (tmp_path / "..data").mkdir()
    (tmp_path / "..data" / "vepanet.json").write_text(FILES["vepanet.json"], encoding="utf-8-sig")
    (tmp_path / "vepanet.json").symlink_to("..data/vepanet.json")
    assert load_network("vepanet", str(tmp_path)) == VEPANET


def test_two_files_for_one_network_are_refused(tmp_path: Path) -> None:
    """Which of two definitions would win is never a question: both are named."""
    for file in ("vepanet.yaml", "vepanet.xml"):
        (tmp_path / file).write_text(FILES[file])
    with pytest.raises(InvalidNetworkConfig, match=r"vepanet\.yaml, .*vepanet\.xml"):
        load_network("vepanet", str(tmp_path))


def test_file_that_defines_another_network_is_refused(tmp_path: Path) -> None:
    """A copied file whose name was not changed inside is an error that names file and key."""
    (tmp_path / "red.json").write_text(FILES["vepanet.json"])
    with pytest.raises(InvalidNetworkConfig, match=r'red\.json: name is the string "vepanet"'):
        load_network("red", str(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"name: vepanet\nextbridge: [\n", r"vepanet\.yaml: line 3, column 1: "),
        (b"name: vepanet\nextbridge: {dev: eth0, mdoe: vepa}", r"extbridge\.mdoe is not a known"),
        (b"name: \xff\n", r"vepanet\.yaml: byte 6 is not UTF-8"),
        (b"#" * (256 * 1024 + 1), r"vepanet\.yaml: over 262144 bytes"),
        (b"", r"vepanet\.yaml: the definition is null"),
    ],
)
def test_bad_file_is_named_with_its_fault(tmp_path: Path, content: bytes, message: str) -> None:
    """Who has to mend a definition is told the file, the place in it and what is wrong."""
    (tmp_path / "vepanet.yaml").write_bytes(content)
    with pytest.raises(InvalidNetworkConfig, match=message) as caught:
        load_network("vepanet", str(tmp_path))
    assert caught.value.hint


def test_unknown_network_is_answered_with_those_that_are_there(tmp_path: Path) -> None:
    """Who mistypes a network's name is told the nearest one and all others."""
    for name in ("vepanet", "blue"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"extbridge": {"dev": "eth0"}}))
    for file in ("notes.txt", ".hidden.yaml", os.fsdecode(b"\xff.yaml")):
        (tmp_path / file).write_text("")
    with pytest.raises(InvalidNetworkConfig, match="network vepa-net is not defined in") as caught:
        load_network("vepa-net", str(tmp_path))
    assert caught.value.hint == "did you mean vepanet? allowed: blue, vepanet"


@pytest.mark.parametrize("folder", [".", "missing"])
def test_empty_or_missing_folder_is_answered_with_what_to_write(
    tmp_path: Path, folder: str
) -> None:
    """Who has defined no network yet is told which file to write."""
    with pytest.raises(InvalidNetworkConfig, match="is not defined") as caught:
        load_network("vepanet", f"{tmp_path}/{folder}")
    assert caught.value.hint == f"write {tmp_path}/{folder}/vepanet.yaml"


@pytest.mark.parametrize("name", ["", ".", "../vepanet", "/etc/passwd", "a/b", "a\x00", "é"])
def test_name_cannot_lead_out_of_the_folder(tmp_path: Path, name: str) -> None:
    """A name with path characters is refused before any file is opened."""
    (tmp_path / "vepanet.json").write_text(FILES["vepanet.json"])
    (tmp_path / "sub").mkdir()
    with pytest.raises(InvalidNetworkConfig, match=r"^network is the string"):
        load_network(name, str(tmp_path / "sub"))


def test_what_is_no_file_is_code_5(tmp_path: Path) -> None:
    """A folder, FIFO, loop of links or device in a definition's place is said to be none."""
    (tmp_path / "folder.yaml").mkdir()
    os.mkfifo(tmp_path / "fifo.yaml")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    (tmp_path / "device.yaml").symlink_to("/dev/zero")
    for name in ("folder", "fifo", "loop", "device"):
        with pytest.raises(IoFailure, match=rf"{name}\.yaml"):
            load_network(name, str(tmp_path))


def test_folder_that_is_a_file_is_code_5(tmp_path: Path) -> None:
    """A networksDir that cannot be looked into is an error of the folder, not of the network."""
    (tmp_path / "file").write_text("")
    with pytest.raises(IoFailure, match="Not a directory"):
        load_network("vepanet", str(tmp_path / "file"))
