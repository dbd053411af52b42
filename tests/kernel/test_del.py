"""DEL always works, and takes away what extbridge made for the attachment and no more (promise 8).

Each test spoils something between ADD and DEL; afterwards nothing of the attachment is left in
kernel or ledger.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from extbridge.demo.lab import Lab, Nic, run
from extbridge.kernel.links import GROUP
from extbridge.network.definition import FIRST_IFINDEX
from tests.kernel.observe import (
    ledger_of,
    leftovers,
    macvtaps,
    make_macvtap,
    network_config,
    packed,
    show_link,
    tables,
)
from tests.kernel.strace import disturbed, recorded
from tests.support import Cni, require

SIOCSIFHWADDR = 0x8924
ARPHRD_ETHER = 1

MAC, OTHER_MAC = "52:54:00:00:00:01", "52:54:00:00:00:02"

IN_OUR_RANGE = ("index", str(FIRST_IFINDEX + 1))
IN_OUR_GROUP = ("group", str(GROUP))


@pytest.fixture
def config(nic: Nic, pod: str, cni: Cni) -> dict[str, object]:
    """The configuration of an attachment that has been made, as DEL is given it."""
    require("nft")
    config = network_config(nic, mac=MAC)
    config["prevResult"] = cni("ADD", config, NETNS=pod).result
    table = f"extbridge_{show_link('net1', pod)['ifindex']}"
    assert leftovers(pod, cni.run_dir) == [
        "net1",
        f"inet {table}",
        f"netdev {table}",
        "container-1",
        "container-1/net1.json",
    ]
    return config


@pytest.mark.parametrize("mode", ["vepa", "bridge", "private", "passthru"])
def test_del_leaves_nothing(nic: Nic, pod: str, cni: Cni, mode: str) -> None:
    """After DEL the pod, the ledger and the NIC are what they were, in every mode."""
    before = show_link(nic.name)["address"]
    config = network_config(nic, mode, mac=MAC)
    config["prevResult"] = cni("ADD", config, NETNS=pod).result
    assert (show_link(nic.name)["address"] == MAC) == (mode == "passthru")
    delete(cni, config, pod)
    assert leftovers(pod, cni.run_dir) == []
    assert show_link(nic.name)["address"] == before
    assert show_link(nic.name)["promiscuity"] == 0
    assert show_link(nic.name)["allmulti"] == 0


def test_del_twice(config: dict[str, object], pod: str, cni: Cni) -> None:
    """A second DEL succeeds as the first did; so does one as runtimes send it to be sure."""
    delete(cni, config, pod)
    delete(cni, config, pod)
    del config["prevResult"]
    delete(cni, config, "")
    assert leftovers(pod, cni.run_dir) == []


def test_del_of_a_container_never_seen(lab: Lab, nic: Nic, pod: str, cni: Cni) -> None:
    """DEL for what was never made succeeds, leaves no folder, and touches nobody else's."""
    config = network_config(nic, mac=MAC)
    assert cni("ADD", config, NETNS=pod).result
    before = leftovers(pod, cni.run_dir)
    for netns in (lab.pod("empty"), pod, ""):
        delete(cni, config, netns, CONTAINERID="never-seen")
    assert leftovers(pod, cni.run_dir) == before


@pytest.mark.parametrize("where", ["no path", "path is gone", "plain file"])
def test_del_when_the_namespace_cannot_be_reached(
    config: dict[str, object], pod: str, cni: Cni, tmp_path: Path, where: str
) -> None:
    """Whatever the runtime says of the namespace: as long as it is where ADD found it, all goes."""
    plain = tmp_path / "plain"
    plain.touch()
    path = {"no path": "", "path is gone": str(tmp_path / "none"), "plain file": str(plain)}[where]
    delete(cni, config, path)
    assert leftovers(pod, cni.run_dir) == []


@pytest.mark.parametrize("leaves_file", [False, True])
def test_del_after_the_namespace(
    config: dict[str, object], pod: str, cni: Cni, *, leaves_file: bool
) -> None:
    """A pod whose namespace has gone, even where its mount point is still there, is deleted."""
    run("ip", "netns", "delete", Path(pod).name)
    if leaves_file:
        Path(pod).touch()
    try:
        delete(cni, config, pod)
    finally:
        Path(pod).unlink(missing_ok=True)
    assert ledger_of(cni.run_dir) == []


def test_del_when_another_namespace_took_the_path(
    config: dict[str, object], nic: Nic, pod: str, cni: Cni
) -> None:
    """What is at the path now, but was not when ADD came, is another pod's and stays."""
    run("ip", "netns", "delete", Path(pod).name)
    run("ip", "netns", "add", Path(pod).name)
    assert cni("ADD", network_config(nic, mac=MAC), NETNS=pod, CONTAINERID="container-2").result
    delete(cni, config, pod)
    assert macvtaps(pod) == ["net1"]
    assert ledger_of(cni.run_dir) == ["container-2", "container-2/net1.json"]


@pytest.mark.parametrize(
    "lost",
    [{"ledger"}, {"prevResult"}, {"ledger", "prevResult"}],
    ids=["ledger", "prevResult", "both"],
)
def test_del_without_memory(config: dict[str, object], pod: str, cni: Cni, lost: set[str]) -> None:
    """The link itself knows whose it is: neither ledger nor prevResult is needed to find it."""
    if "ledger" in lost:
        shutil.rmtree(cni.run_dir)
    if "prevResult" in lost:
        del config["prevResult"]
    delete(cni, config, pod)
    assert leftovers(pod, cni.run_dir) == []


@pytest.mark.parametrize("known_by", ["name", "MAC"])
def test_del_of_an_unfinished_link_without_ledger(
    config: dict[str, object], pod: str, cni: Cni, known_by: str
) -> None:
    """A link of an ADD that was killed does not say whose it is; its name or its MAC does."""
    run("ip", "link", "set", "net1", "down", "alias", "", netns=pod)
    if known_by == "MAC":
        run("ip", "link", "set", "net1", "name", "other", netns=pod)
    else:
        del config["prevResult"]
    shutil.rmtree(cni.run_dir)
    delete(cni, config, pod)
    assert leftovers(pod, cni.run_dir) == []


@pytest.mark.parametrize("garbage", [b"", b'{"container_id": "container-1"', b"\xff\xfe\x00"])
def test_del_with_a_damaged_ledger(
    config: dict[str, object], pod: str, cni: Cni, garbage: bytes
) -> None:
    """An entry that cannot be read costs nothing: the link goes, and the garbage with it."""
    (cni.run_dir / "ledger/container-1/net1.json").write_bytes(garbage)
    delete(cni, config, pod)
    assert leftovers(pod, cni.run_dir) == []


def test_del_without_the_definition(nic: Nic, pod: str, cni: Cni, tmp_path: Path) -> None:
    """A network whose definition was removed, or is broken now, still lets go of its VMs."""
    file = tmp_path / "vepanet.yaml"
    file.write_text(f"name: vepanet\nextbridge: {{mode: vepa, dev: {nic.name}}}\n")
    config: dict[str, object] = {"cniVersion": "1.1.0", "name": "main", "type": "extbridge",
                                 "network": "vepanet", "networksDir": str(tmp_path)}  # fmt: skip
    for content in (None, "extbridge: ["):
        assert cni("ADD", config, NETNS=pod).result
        written = file.read_text()
        file.unlink()
        if content is not None:
            file.write_text(content)
        delete(cni, config, pod)
        assert leftovers(pod, cni.run_dir) == []
        file.write_text(written)


def test_del_with_a_configuration_that_is_wrong_by_now(
    config: dict[str, object], pod: str, cni: Cni
) -> None:
    """What would be refused at ADD does not keep what is there."""
    config |= {"extbridge": {"mode": "vapa"}, "queues": 0, "typo": True}
    delete(cni, config, pod)
    assert leftovers(pod, cni.run_dir) == []


@pytest.mark.parametrize("ledger", [True, False])
def test_del_after_the_nic(
    config: dict[str, object], nic: Nic, pod: str, cni: Cni, *, ledger: bool
) -> None:
    """A NIC that has gone took its links with it; what silenced them goes, too."""
    run("ip", "link", "delete", nic.name)
    assert macvtaps(pod) == []
    if not ledger:
        shutil.rmtree(cni.run_dir)
    delete(cni, config, pod)
    assert leftovers(pod, cni.run_dir) == []


@pytest.mark.parametrize("ledger", [True, False])
def test_del_after_the_guest_changed_its_mac(
    config: dict[str, object], pod: str, cni: Cni, *, ledger: bool
) -> None:
    """A guest that gave itself another MAC, which it may by its tap, is deleted as any other."""
    tap = os.open(f"/dev/tap{show_link('net1', pod)['ifindex']}", os.O_RDWR)
    try:
        family = ARPHRD_ETHER.to_bytes(2, "little")
        request = (bytes(16) + family + packed(OTHER_MAC)).ljust(40, b"\0")
        fcntl.ioctl(tap, SIOCSIFHWADDR, request)
    finally:
        os.close(tap)
    assert show_link("net1", pod)["address"] == OTHER_MAC
    if not ledger:
        shutil.rmtree(cni.run_dir)
    delete(cni, config, pod)
    assert leftovers(pod, cni.run_dir) == []


def test_del_after_a_rename(config: dict[str, object], pod: str, cni: Cni) -> None:
    """A pod that renamed its link does not keep it by that."""
    run("ip", "link", "set", "net1", "down", "name", "mine", netns=pod)
    delete(cni, config, pod)
    assert leftovers(pod, cni.run_dir) == []


@pytest.mark.parametrize("ledger", [True, False])
@pytest.mark.parametrize(
    "options", [(), IN_OUR_GROUP, IN_OUR_RANGE], ids=["plain", "our group", "our range"]
)
def test_foreign_macvtap_in_the_pod_survives(
    lab: Lab, config: dict[str, object], pod: str, cni: Cni, *, ledger: bool, options: tuple[str]
) -> None:
    """A macvtap that extbridge did not make stays, though it has the MAC and a mark of ours."""
    make_macvtap(lab.nic(), "foreign", pod, MAC, *options)
    if not ledger:
        shutil.rmtree(cni.run_dir)
    delete(cni, config, pod)
    delete(cni, config, pod, IFNAME="foreign")
    assert leftovers(pod, cni.run_dir) == ["foreign"]


@pytest.mark.parametrize("ledger", [True, False])
def test_same_mac_elsewhere_survives(
    lab: Lab, config: dict[str, object], pod: str, cni: Cni, *, ledger: bool
) -> None:
    """Another pod's VM that has the same MAC, on another NIC, is not touched."""
    other = lab.pod("other")
    add = network_config(lab.nic(), mac=MAC)
    assert cni("ADD", add, NETNS=other, CONTAINERID="container-2").result
    if not ledger:
        shutil.rmtree(cni.run_dir)
    delete(cni, config, pod)
    assert [*macvtaps(pod), *tables(pod)] == []
    assert macvtaps(other) == ["net1"]
    assert len(tables(other)) == 2
    assert ledger_of(cni.run_dir) == (["container-2", "container-2/net1.json"] if ledger else [])


@pytest.mark.parametrize("ledger", [True, False])
def test_second_attachment_of_the_container_survives(
    lab: Lab, config: dict[str, object], pod: str, cni: Cni, *, ledger: bool
) -> None:
    """DEL of one NIC leaves the VM's other one, even one with the same MAC."""
    second = network_config(lab.nic(), mac=MAC)
    second["prevResult"] = cni("ADD", second, NETNS=pod, IFNAME="net2").result
    ifindex = show_link("net2", pod)["ifindex"]
    if not ledger:
        shutil.rmtree(cni.run_dir)
    delete(cni, config, pod)
    left = ["net2", f"inet extbridge_{ifindex}", f"netdev extbridge_{ifindex}"]
    assert leftovers(pod, cni.run_dir) == (
        [*left, "container-1", "container-1/net2.json"] if ledger else left
    )
    delete(cni, second, pod, IFNAME="net2")
    assert leftovers(pod, cni.run_dir) == []


def test_del_by_a_path_that_leads_to_the_node_by_now(
    config: dict[str, object], pod: str, cni: Cni
) -> None:
    """A path by process number may come to lead elsewhere; the ledger knows where the pod is."""
    delete(cni, config, "/proc/self/ns/net")
    assert leftovers(pod, cni.run_dir) == []


def test_attachment_out_of_reach_is_not_forgotten(
    config: dict[str, object], pod: str, cni: Cni
) -> None:
    """While its namespace lives without a path, DEL succeeds and GC says so; later it goes."""
    with subprocess.Popen(["nsenter", f"--net={pod}", "--", "sleep", "60"]) as sleeper:
        try:
            # Until the process stands in there, nothing but the path keeps the namespace.
            inode = os.stat(pod).st_ino
            while os.stat(f"/proc/{sleeper.pid}/ns/net").st_ino != inode:
                time.sleep(0.01)
            run("ip", "netns", "delete", Path(pod).name)
            delete(cni, config, pod)
            assert ledger_of(cni.run_dir) == ["container-1", "container-1/net1.json"]
            collected = cni("GC", {**config, "cni.dev/valid-attachments": []}, CONTAINERID=None)
            assert "net1 of container-1" in str(collected.error["msg"])
        finally:
            sleeper.kill()
    delete(cni, config, pod)
    assert ledger_of(cni.run_dir) == []


def test_del_on_a_kernel_without_nftables(
    config: dict[str, object], pod: str, cni: Cni, tmp_path: Path
) -> None:
    """Where there can be no rules, none are missed, and no pod is stuck for it."""
    assert cni("DEL", config, NETNS=pod).status == 0
    asked = recorded(cni, "DEL", config, pod, tmp_path / "recorded")
    [call] = [call for call in asked if "NETLINK_NETFILTER" in call.shown]
    fault = f"error=EPROTONOSUPPORT:when={call.number}"
    assert disturbed(cni, call, fault, tmp_path / "log")("DEL", config, NETNS=pod).status == 0
    assert "INJECTED" in (tmp_path / "log").read_text(encoding="utf-8")


def delete(cni: Cni, config: dict[str, object], netns: str, **variables: str) -> None:
    """DEL, which prints nothing and succeeds (SPEC section 2, "DEL")."""
    answer = cni("DEL", config, NETNS=netns, **variables)
    assert (answer.status, answer.stdout, answer.stderr) == (0, None, "")
