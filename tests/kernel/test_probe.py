"""`extbridge doctor --probe`: what the switch does with VEPA's frames, asked with a few of them."""

from __future__ import annotations

import json
import signal
import struct
import subprocess
import time
from pathlib import Path

import pytest

from extbridge.demo.lab import Lab, Nic, receive, run
from tests.kernel.observe import EXPERIMENTAL, link_names, make_macvtap, network_config, show_link
from tests.support import Cni, executable

OK, WARNING, FAILURE = "ok", "warning", "failure"


def probe(nic: str, run_dir: Path) -> list[tuple[str, str]]:
    """Level and words of what was found."""
    done = subprocess.run(
        (executable("extbridge"), "doctor", "--probe", nic, "--run-dir", str(run_dir),
         "-o", "json"), capture_output=True, check=False,
    )  # fmt: skip
    assert done.stderr == b""
    told = json.loads(done.stdout)
    assert done.returncode == (told["count"][FAILURE] > 0)
    assert all(it["level"] == OK or it["todo"] for it in told["findings"])
    return [(it["level"], it["what"]) for it in told["findings"]]


def test_reflecting_switch(lab: Lab, nic: Nic, run_dir: Path) -> None:
    """With reflective relay all is well; four frames have said so, and nothing is left behind."""
    before = link_names()
    with lab.packets(lab.switch, nic.port) as port:
        told = probe(nic.name, run_dir)
        passed = receive(port, seconds=0.2)
    assert told == [
        (OK, "mode bridge: two VMs on this NIC can talk"),
        (OK, "mode vepa: the switch reflects: two VMs on this NIC can talk"),
        (OK, "path MTU: 1500, all of the NIC's"),
        (OK, "4 frames were sent, EtherType 0x88B5"),
    ]
    # Those of mode bridge never leave the node; there is nothing but the probe's.
    assert [len(frame.data) for frame in passed if not frame.sent] == [60, 1514]
    types = {struct.unpack_from("!H", frame.data, 12)[0] for frame in passed}
    assert types == {EXPERIMENTAL}
    assert link_names() == before
    link = show_link(nic.name)
    assert (link["promiscuity"], link["allmulti"]) == (0, 0)


def test_switch_that_does_not_reflect(lab: Lab, nic: Nic, run_dir: Path) -> None:
    """Without reflective relay it is told, and that mode bridge would do; five frames say so."""
    lab.set_reflective(nic, on=False)
    told = probe(nic.name, run_dir)
    assert [level for level, _ in told] == [OK, FAILURE, WARNING, OK]
    assert "the switch does not reflect" in told[1][1]
    assert told[3] == (OK, "5 frames were sent, EtherType 0x88B5")


@pytest.mark.parametrize("mtu", [1500, 9000])
def test_smaller_mtu_of_the_switch(lab: Lab, run_dir: Path, mtu: int) -> None:
    """A switch that passes no frame as long as the NIC's is found out to the octet."""
    nic = lab.nic(mtu=mtu)
    run("ip", "link", "set", nic.port, "mtu", "1400", netns=lab.switch)
    with lab.packets(lab.switch, nic.port) as port:
        told = probe(nic.name, run_dir)
        passed = receive(port, seconds=0.2)
    # A link of that MTU takes four octets more: a VLAN tag's (is_skb_forwardable).
    assert told[2] == (
        FAILURE, f"path MTU: 1404 octets, and the NIC's is {mtu}: longer frames are lost"
    )  # fmt: skip
    assert sum(not frame.sent for frame in passed) <= 20
    sent = int(told[3][1].split()[0])
    assert sent <= 20


def test_path_mtu_that_twenty_frames_do_not_find(lab: Lab, run_dir: Path) -> None:
    """When the frames are used up, the bounds that they have found are told."""
    nic = lab.nic(mtu=65535)
    run("ip", "link", "set", nic.port, "mtu", "1400", netns=lab.switch)
    told = probe(nic.name, run_dir)
    level, what = told[2]
    assert (level, what.startswith("path MTU: between ")) == (FAILURE, True)
    least, most = (int(it) for it in what.split(" octets")[0].split()[3::2])
    assert least <= 1404 <= most
    assert told[3] == (OK, "20 frames were sent, EtherType 0x88B5")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("ip link set {nic} down", "{nic} is down"),
        ("ip -n {switch} link set {port} down", "no carrier"),
        ("ip link delete {nic}", "the node has no NIC '{nic}'"),
    ],
)
def test_unfit_nic_is_not_probed(lab: Lab, nic: Nic, run_dir: Path, change: str, told: str) -> None:
    """A NIC that can carry nothing is said to be so, and no frame is sent."""
    names = {"nic": nic.name, "port": nic.port, "switch": Path(lab.switch).name}
    run("sh", "-ec", change.format(**names))
    assert probe(nic.name, run_dir) == [(FAILURE, told.format(**names))]


def test_nic_that_passthru_has_is_not_probed(cni: Cni, nic: Nic, pod: str, run_dir: Path) -> None:
    """Where the kernel refuses the probe's macvtaps, it is told who has the NIC."""
    assert cni("ADD", network_config(nic, "passthru"), NETNS=pod).result
    [(level, what)] = probe(nic.name, run_dir)
    assert level == FAILURE
    assert what.endswith("Invalid argument; on it: net1 (passthru) of container-1")


@pytest.mark.parametrize("name", ["", "a/b", "x" * 300, "\udcff"])
def test_names_that_are_none(name: str, run_dir: Path) -> None:
    """What can be no NIC's name is refused in a sentence."""
    [(level, _)] = probe(name, run_dir)
    assert level == FAILURE


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_probe_that_is_ended_leaves_nothing(
    lab: Lab, nic: Nic, run_dir: Path, number: signal.Signals
) -> None:
    """However it is ended, its macvtaps go, and so does what they changed of the NIC."""
    lab.set_reflective(nic, on=False)
    before = set(Path("/dev").glob("tap*"))
    with subprocess.Popen(
        (executable("extbridge"), "doctor", "--probe", nic.name, "--run-dir", str(run_dir)),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    ) as probing:  # fmt: skip
        deadline = time.monotonic() + 30
        while len(set(Path("/dev").glob("tap*")) - before) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        probing.send_signal(number)
        _, stderr = probing.communicate(timeout=30)
    assert b"Traceback" not in stderr
    assert probing.returncode != 0
    deadline = time.monotonic() + 30
    while set(Path("/dev").glob("tap*")) - before or show_link(nic.name)["allmulti"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert show_link(nic.name)["promiscuity"] == 0


def test_vms_that_run_do_not_notice(lab: Lab, nic: Nic, run_dir: Path) -> None:
    """The probe stands beside VMs on the NIC, and sends them nothing."""
    pod = lab.pod("vm")
    make_macvtap(nic, "net1", pod, "02:00:00:00:00:55")
    with lab.packets(pod, "net1") as heard:
        assert [level for level, _ in probe(nic.name, run_dir)] == [OK] * 4
        frames = receive(heard, seconds=0.2)
    assert [it for it in frames if struct.unpack_from("!H", it.data, 12)[0] == EXPERIMENTAL] == []
