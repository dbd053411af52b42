"""What most tests of the kernel layer begin with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from extbridge.demo.lab import Lab, Nic
from extbridge.node.install import SHIM, install_shim
from tests.kernel.agents import Agent, Launcher
from tests.support import Cni


@pytest.fixture
def nic(lab: Lab) -> Nic:
    """The node's NIC, plugged into the switch."""
    return lab.nic()


@pytest.fixture
def pod(lab: Lab) -> str:
    """A pod's namespace, by its path."""
    return lab.pod("vm")


@pytest.fixture
def agent(run_dir: Path, tmp_path: Path) -> Iterator[Agent]:
    """The node's agent, serving."""
    with Agent(run_dir, tmp_path / "agent.log") as agent:
        yield agent.start()


@pytest.fixture(scope="session")
def bin_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A container runtime's folder for CNI plugins, with the shim in it."""
    folder = tmp_path_factory.mktemp("bin")
    install_shim(folder)
    return folder


@pytest.fixture
def shim(run_dir: Path, bin_dir: Path) -> Cni:
    """The shim, which carries requests to the agent."""
    return Cni(run_dir, program=str(bin_dir / SHIM))


@pytest.fixture
def launcher(run_dir: Path) -> Launcher:
    """The launcher that the agent puts into `pod/`."""
    return Launcher(run_dir)
