"""What most tests of the kernel layer begin with."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from extbridge.demo.lab import Lab, Nic
from extbridge.kernel.checksums import loaded_program
from extbridge.node.install import SHIM, install_shim
from tests.kernel.agents import Agent, Launcher
from tests.support import Cni


@pytest.fixture(scope="session", autouse=True)
def _program() -> None:
    """What a process keeps open once it has guarded a NIC is no leak of a test's."""
    loaded_program()


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


@pytest.fixture
def one_cpu() -> Iterator[None]:
    """Frames that are sent on one CPU arrive in their order (enqueue_to_backlog)."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)
