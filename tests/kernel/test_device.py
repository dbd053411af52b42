"""Taps that are handed over as device nodes, under numbers that were reserved for them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from extbridge.demo.lab import Lab, Nic
from extbridge.ledger import Ledger
from extbridge.network.definition import FIRST_IFINDEX, LAST_IFINDEX
from tests.kernel.agents import Agent, Launcher
from tests.kernel.observe import leftovers, network_config, show_link
from tests.support import Cni

RESERVED = FIRST_IFINDEX + 4711


def with_device(nic: Nic, ifindex: int = RESERVED, **keys: object) -> dict[str, object]:
    """The configuration of a pod that a device plugin has reserved an ifindex for."""
    return network_config(nic, runtimeConfig={"deviceID": str(ifindex)}, **keys)


def test_link_has_the_number_that_was_reserved(cni: Cni, nic: Nic, pod: str) -> None:
    """The device node appears where the runtime will look for it, and belongs to QEMU's user."""
    node = Path(f"/dev/tap{RESERVED}")
    assert cni("ADD", with_device(nic, handoff="device"), NETNS=pod).status == 0
    assert show_link("net1", pod)["ifindex"] == RESERVED
    assert (node.stat().st_uid, node.stat().st_gid, oct(node.stat().st_mode)) == (
        107, 107, "0o20600",
    )  # fmt: skip
    assert cni("DEL", with_device(nic, handoff="device"), NETNS=pod).status == 0
    assert not node.exists()


def test_fds_are_nobodys_but_the_agents(cni: Cni, nic: Nic, pod: str) -> None:
    """A node whose fds the agent hands over stays root's, whatever its number."""
    assert cni("ADD", with_device(nic), NETNS=pod).status == 0
    assert os.stat(f"/dev/tap{RESERVED}").st_uid == 0


@pytest.mark.parametrize("elsewhere", [True, False])
def test_number_that_is_taken_is_refused(cni: Cni, lab: Lab, nic: Nic, *, elsewhere: bool) -> None:
    """Two pods with one number would have one device node; the second is told who has it."""
    first = lab.pod("first")
    second = lab.pod("second") if elsewhere else first
    assert cni("ADD", with_device(nic), NETNS=first).status == 0
    other = {"NETNS": second, "CONTAINERID": "container-2", "IFNAME": "net2"}
    error = cni("ADD", with_device(nic), **other).error
    assert error["code"] == 7
    assert error["msg"] == (f"deviceID is {RESERVED}, which net1 of container-1 has")
    assert [it.container_id for it in Ledger(cni.run_dir).entries()] == ["container-1"]
    assert show_link("net1", first)["ifindex"] == RESERVED
    assert cni("DEL", with_device(nic), NETNS=first).status == 0
    assert cni("ADD", with_device(nic), **other).status == 0
    assert cni("DEL", with_device(nic), **other).status == 0
    assert leftovers(first, cni.run_dir) == leftovers(second, cni.run_dir) == []


@pytest.mark.parametrize("ifindex", [2, FIRST_IFINDEX - 1, LAST_IFINDEX + 1])
def test_number_that_nobody_reserves_is_refused(cni: Cni, nic: Nic, pod: str, ifindex: int) -> None:
    """Numbers that the kernel gives by itself would collide, so they are not taken."""
    error = cni("ADD", with_device(nic, ifindex), NETNS=pod).error
    assert (error["code"], leftovers(pod, cni.run_dir)) == (7, [])
    assert f"from {FIRST_IFINDEX} to {LAST_IFINDEX}" in str(error["details"])


def test_device_is_not_handed_over_twice(
    agent: Agent, shim: Cni, nic: Nic, pod: str, launcher: Launcher
) -> None:
    """A tap that a container has as a device is not given to a launcher besides."""
    assert shim("ADD", with_device(nic, handoff="device"), NETNS=pod).status == 0
    assert f"handed over as the device /dev/tap{RESERVED}" in launcher.refusal(pod)
    assert agent.metrics()["extbridge_refusals_total{reason=TapHeld}"] == 1


@pytest.mark.usefixtures("agent")
def test_devices_do_not_keep_other_taps(shim: Cni, nic: Nic, pod: str, launcher: Launcher) -> None:
    """A pod with a NIC of each kind gets its fds; the device only if it asks for it, and not so."""
    assert shim("ADD", with_device(nic, handoff="device"), NETNS=pod).status == 0
    assert shim("ADD", network_config(nic), NETNS=pod, IFNAME="net2").status == 0
    mac = str(show_link("net2", pod)["address"])
    assert launcher.printed(pod, "{net2.mac}") == [mac]
    assert "no NIC net1" in launcher.refusal(pod, "echo", "{net1.mac}")
    assert "handed over as" in launcher.refusal(pod, EXTBRIDGE_IFNAMES="net1,net2")
    # What was refused holds nothing.
    assert launcher.printed(pod, "{net2.mac}", EXTBRIDGE_IFNAMES="net2") == [mac]
