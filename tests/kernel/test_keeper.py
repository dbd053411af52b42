"""An agent that keeps extbridge in the runtime's configurations, while others write there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from extbridge.node.conflist import PLUGIN, chained
from tests.kernel.agents import Agent, until

LIST: Final = {"cniVersion": "1.0.0", "name": "cluster", "plugins": [{"type": "ptp"}]}
SINGLE: Final = {"cniVersion": "1.0.0", "name": "cluster", "type": "ptp"}

REPAIRED: Final = "reconcile_repairs_total{kind=configuration}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The runtime's folder of configurations, empty."""
    folder = tmp_path / "net.d"
    folder.mkdir()
    return folder


@pytest.fixture
def agent(folder: Path, run_dir: Path, tmp_path: Path) -> Iterator[Agent]:
    """An agent that keeps the folder, not yet started."""
    with Agent(run_dir, tmp_path / "agent.log", "--conf-dir", str(folder)) as agent:
        yield agent


def test_list_that_is_written_anew_has_extbridge_again(agent: Agent, folder: Path) -> None:
    """An upgrade of the cluster's network costs nobody's pods their NICs; its own word counts."""
    path = folder / "10-net.conflist"
    install(path, LIST)
    agent.start()
    for mtu, write in ((1400, in_place), (1300, by_rename)):
        plugin = {"type": "ptp", "mtu": mtu}
        write(path, {**LIST, "plugins": [plugin]})
        until(lambda plugin=plugin: plugins_of(path) == [plugin, PLUGIN])  # type: ignore[misc]
    agent.counts({REPAIRED: 2})
    assert agent.log.count("repaired") == 2
    # What uninstall gives back is the last of them.
    backup = folder / "10-net.conflist.extbridge-backup"
    assert plugins_of(backup) == [{"type": "ptp", "mtu": 1300}]


def test_single_configuration_that_changes_is_what_pods_get(agent: Agent, folder: Path) -> None:
    """A copy does not stay in charge when its original is another, is a list now, or is gone."""
    path, copy = folder / "10-net.conf", folder / "10-net-extbridge.conflist"
    install(path, SINGLE)
    agent.start()
    changed = {**SINGLE, "mtu": 1400}
    in_place(path, changed)
    until(lambda: plugins_of(copy) == [changed, PLUGIN])
    path.unlink()
    later = path.with_suffix(".conflist")
    in_place(later, LIST)
    until(lambda: plugins_of(later) == [*LIST["plugins"], PLUGIN])
    until(lambda: not copy.exists())
    later.unlink()
    in_place(path, SINGLE)
    until(copy.exists)
    path.unlink()
    until(lambda: not copy.exists())


def test_what_is_as_it_should_be_is_left_alone(agent: Agent, folder: Path) -> None:
    """Neither an agent's start, nor files of others, make the runtime read anything anew."""
    path = folder / "10-net.conflist"
    install(path, LIST)
    inode = path.stat().st_ino
    agent.start()
    in_place(folder / "87-podman.conflist", LIST)
    in_place(folder / "90-broken.conflist", "{")
    agent.stop()
    agent.start()
    assert path.stat().st_ino == inode
    agent.counts({REPAIRED: 0})
    assert "repaired" not in agent.log


def test_network_that_cannot_be_read_is_told_of_and_waited_for(agent: Agent, folder: Path) -> None:
    """A broken list is its owner's to mend, and is said once; then it goes on."""
    path = folder / "10-net.conflist"
    agent.start()
    in_place(path, "{")
    until(lambda: f"{path}: line 1, column 2" in agent.log)
    in_place(path, LIST)
    until(lambda: plugins_of(path) == [*LIST["plugins"], PLUGIN])
    assert agent.log.count("column 2") == 1


def test_somebody_who_insists_has_his_way(agent: Agent, folder: Path) -> None:
    """Two who write the same file do not keep the runtime busy for ever: the agent gives up."""
    path = folder / "10-net.conflist"
    install(path, LIST)
    agent.start()

    def given_up() -> bool:
        if PLUGIN in plugins_of(path):
            by_rename(path, LIST)
        return "gives up" in agent.log

    until(given_up)
    agent.counts({REPAIRED: 5})


def install(path: Path, network: dict[str, Any]) -> None:
    """What the cluster's network has written, with extbridge in it."""
    in_place(path, network)
    with chained(path.parent):
        pass


def in_place(path: Path, network: dict[str, Any] | str) -> None:
    """Write the file as shells and editors do."""
    path.write_text(network if isinstance(network, str) else json.dumps(network))


def by_rename(path: Path, network: dict[str, Any]) -> None:
    """Write the file as careful programs do."""
    draft = path.with_name(".draft")
    draft.write_text(json.dumps(network))
    os.rename(draft, path)


def plugins_of(path: Path) -> list[Any]:
    """The plugins of a list; none while it is not there, or not whole."""
    try:
        plugins: list[Any] = json.loads(path.read_text())["plugins"]
    except (FileNotFoundError, ValueError):
        return []
    return plugins
