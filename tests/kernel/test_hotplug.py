"""`extbridge attach` and `detach`: what they promise where no guest has to answer."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from extbridge import hotplug
from extbridge.demo.lab import Lab, Nic, run
from extbridge.ledger import Holder, Ledger
from extbridge.spec.errors import CniError, QemuRefused
from tests.kernel.agents import Agent, Launcher, until
from tests.kernel.hotplugging import MAC, PLUGGED, attach, define_networks, relayed
from tests.kernel.observe import leftovers, macvtaps, network_config, picture
from tests.support import Cni, executable, require

# Listens, says something to who connects, and hangs up.
SAY = """
import os, socket, sys
listening = socket.socket(socket.AF_UNIX)
listening.bind(sys.argv[1] + ".new")
listening.listen()
os.rename(sys.argv[1] + ".new", sys.argv[1])
peer, _ = listening.accept()
peer.sendall(sys.argv[2].encode())
peer.close()
import time; time.sleep(60)
"""

PORT = ("-M", "q35", "-device", "pcie-root-port,id=spare1,chassis=1,slot=1")


@pytest.fixture
def networks(tmp_path: Path, nic: Nic) -> Path:
    """The folder of definitions."""
    return define_networks(tmp_path / "networks", nic)


@pytest.fixture
def pod(lab: Lab, nic: Nic, cni: Cni) -> str:
    """A pod with one VM NIC, net1."""
    pod = lab.pod("vm")
    args = "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=vm;K8S_POD_UID=uid-1"
    assert cni("ADD", network_config(nic, mac=MAC), NETNS=pod, ARGS=args).result
    return pod


@contextmanager
def qemu(netns: str, qmp: Path, *options: str) -> Iterator[int]:
    """A QEMU whose guest does not run, which listens at `qmp`; its pid."""
    require("qemu-system-x86_64")
    command = ("nsenter", f"--net={netns}", "--", "qemu-system-x86_64", "-S", "-nodefaults",
               "-display", "none", "-m", "16", "-qmp", f"unix:{qmp},server=on,wait=off",
               "-sandbox", "on", *options)  # fmt: skip
    with subprocess.Popen(command) as process:
        try:
            until(qmp.exists)
            yield process.pid
        finally:
            process.kill()


@pytest.fixture
def vm(pod: str, tmp_path: Path) -> Iterator[int]:
    """The pod's QEMU, with one port to plug into."""
    with qemu(pod, tmp_path / "qmp", *PORT) as pid:
        yield pid


def extbridge(*command: str, run_dir: Path) -> subprocess.CompletedProcess[str]:
    """The command as a person gives it."""
    return subprocess.run(
        (executable("extbridge"), *command),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "EXTBRIDGE_RUN": str(run_dir)},
    )


def state(qmp: Path, pid: int) -> tuple[str, str, list[str]]:
    """What QEMU has of NICs: backends, devices, taps; asked for without our own client."""
    with socket.socket(socket.AF_UNIX) as asked, asked.makefile("rw") as lines:
        asked.settimeout(10)
        asked.connect(str(qmp))
        lines.readline()
        answers = []
        for command in ("info network", "info qtree"):
            for name, arguments in (
                ("qmp_capabilities", {}),
                ("human-monitor-command", {"command-line": command}),
            ):
                lines.write(json.dumps({"execute": name, "arguments": arguments}))
                lines.flush()
                answers.append(json.loads(lines.readline()))
    taps = sorted(fd for fd in fds_of(pid).values() if "/tap" in fd)
    return str(answers[1]), str(answers[3]), taps


def fds_of(pid: int) -> dict[int, str]:
    """What the process has open."""
    found = {}
    for fd in os.listdir(f"/proc/{pid}/fd"):
        # QEMU closes a connection some time after its client.
        with suppress(FileNotFoundError):
            found[int(fd)] = os.readlink(f"/proc/{pid}/fd/{fd}")
    return found


def settled_fds(pid: int) -> dict[int, str]:
    """The same when a QEMU that has just begun, or has just lost a client, is done with that."""
    before: dict[int, str] = {}
    while (now := fds_of(pid)) != before:
        before = now
        time.sleep(0.2)
    return now


def test_nic_is_plugged_with_every_queue(
    pod: str, vm: int, run_dir: Path, networks: Path, tmp_path: Path
) -> None:
    """A NIC of several queues is plugged with all of them, and QEMU is their holder."""
    entry = attach(run_dir, networks, tmp_path / "qmp", "queues")
    backends, devices, taps = state(tmp_path / "qmp", vm)
    assert backends.count("index=") >= 2
    assert f"extbridge-{entry.ifindex}" in devices
    assert len(taps) == 2
    assert [it.holder for it in Ledger(run_dir).entries()] == [Holder.of(vm), None]
    assert macvtaps(pod) == ["macvtap0", "net1"]


@pytest.mark.parametrize(
    ("options", "named", "said"),
    [
        pytest.param((*PORT, "-netdev", "hubport,hubid=0,id=taken"), "taken",
                     "QEMU refuses netdev_add: Duplicate ID 'taken'", id="netdev"),
        pytest.param((*PORT, "-device", "pcie-root-port,id=taken,chassis=2,slot=2"), "taken",
                     "QEMU refuses device_add: Duplicate device ID 'taken'", id="device"),
        pytest.param(("-M", "q35"), "", "Bus 'pcie.0' does not support hotplugging", id="port"),
        pytest.param((*PORT, "-device", "virtio-rng-pci,bus=spare1"), "", "pcie-root-port,id=",
                     id="free port"),
    ],
)  # fmt: skip
def test_what_qemu_refuses_leaves_nothing(
    *, options: tuple[str, ...], named: str, said: str, pod: str, run_dir: Path, networks: Path,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Whatever step QEMU refuses, neither it nor the pod nor the ledger has anything of the NIC."""
    if named:
        monkeypatch.setattr(hotplug, "_device_name", lambda _: named)
    qmp = tmp_path / "qmp"
    with qemu(pod, qmp, *options) as pid:
        before = [picture(run_dir, pod), state(qmp, pid)]
        with pytest.raises(QemuRefused) as refused:
            attach(run_dir, networks, qmp, "queues")
        assert said in str(refused.value)
        assert [picture(run_dir, pod), state(qmp, pid)] == before


def test_qemu_that_can_take_no_fd_leaves_nothing(
    pod: str, vm: int, run_dir: Path, networks: Path, tmp_path: Path
) -> None:
    """A QEMU that has room for one queue but not for two takes none, and nothing is left."""
    qmp = tmp_path / "qmp"
    before = [picture(run_dir, pod), state(qmp, vm)]
    opened = settled_fds(vm)
    # The connection has the first number that is free, the first queue the second.
    third = [fd for fd in range(1024) if fd not in opened][2]
    run("prlimit", "--pid", str(vm), f"--nofile={third}:1024")
    with pytest.raises(QemuRefused, match="QEMU refuses getfd: No file descriptor supplied"):
        attach(run_dir, networks, qmp, "queues")
    run("prlimit", "--pid", str(vm), "--nofile=1024:1024")
    assert [picture(run_dir, pod), state(qmp, vm)] == before


def test_qemu_that_does_not_answer_leaves_nothing(
    *, pod: str, vm: int, run_dir: Path, networks: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A QEMU that is stopped is not waited for without end, and nothing is left."""
    monkeypatch.setattr(hotplug, "ANSWER_SECONDS", 0.3)
    qmp = tmp_path / "qmp"
    before = [picture(run_dir, pod), state(qmp, vm)]
    os.kill(vm, signal.SIGSTOP)
    with pytest.raises(QemuRefused, match="nobody answers"):
        attach(run_dir, networks, qmp)
    os.kill(vm, signal.SIGCONT)
    assert [picture(run_dir, pod), state(qmp, vm)] == before


@pytest.mark.parametrize("command", ["qom-list", "getfd", "netdev_add"])
def test_command_whose_answer_is_lost_is_undone(
    *,
    command: str,
    pod: str,
    vm: int,
    run_dir: Path,
    networks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A command of which nobody knows whether QEMU has done it is undone like one that it has."""
    monkeypatch.setattr(hotplug, "ANSWER_SECONDS", 0.5)
    qmp = tmp_path / "qmp"
    before = [picture(run_dir, pod), state(qmp, vm)]
    refusal = f"QEMU does not answer {command} in 0.5 s"
    with relayed(pod, qmp, command) as path, pytest.raises(QemuRefused, match=refusal):
        attach(run_dir, networks, path, "queues")
    assert [picture(run_dir, pod), state(qmp, vm)] == before


def test_socket_that_another_client_has_is_told(
    *, pod: str, vm: int, run_dir: Path, networks: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """QMP that serves somebody else already is named as such, before anything is made."""
    monkeypatch.setattr(hotplug, "ANSWER_SECONDS", 0.3)
    before = picture(run_dir, pod)
    with socket.socket(socket.AF_UNIX) as other:
        other.connect(str(tmp_path / "qmp"))
        other.recv(1000)
        with pytest.raises(QemuRefused, match="one at a time"):
            attach(run_dir, networks, tmp_path / "qmp")
    assert (picture(run_dir, pod), Path(f"/proc/{vm}").exists()) == (before, True)


def test_qemu_of_another_pod_gets_nothing(
    lab: Lab, pod: str, run_dir: Path, networks: Path, tmp_path: Path
) -> None:
    """A NIC of one pod is never plugged into a QEMU that stands in another."""
    before = picture(run_dir, pod)
    with (
        qemu(lab.pod("other"), tmp_path / "qmp", *PORT) as pid,
        pytest.raises(CniError, match=f"process {pid}, which listens .* neither stands in the pod"),
    ):
        attach(run_dir, networks, tmp_path / "qmp")
    assert picture(run_dir, pod) == before


def test_sockets_that_are_no_qmp_are_told(
    pod: str, run_dir: Path, networks: Path, tmp_path: Path
) -> None:
    """What is no socket, listens to nobody, or speaks something else is told in one line."""
    before = picture(run_dir, pod)
    with pytest.raises(CniError, match="No such file or directory; give the socket that QEMU"):
        attach(run_dir, networks, tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(CniError, match="Connection refused"):
        attach(run_dir, networks, tmp_path / "file")
    for said, message in (("", "Failed to establish session"), ("hello\n", "Failed to")):
        path = tmp_path / f"says{len(said)}"
        with subprocess.Popen((sys.executable, "-c", SAY, str(path), said)) as process:
            until(path.exists)
            with pytest.raises(CniError, match=message):
                attach(run_dir, networks, path)
            process.kill()
    assert picture(run_dir, pod) == before


BAD = {
    "pod": (("other", "--network", "vepanet"), "knows no pod, container, MAC or NIC other"),
    "network": (("default/vm", "--network", "vepant"), "did you mean vepanet?"),
    "MAC": (("default/vm", "--network", "vepanet", "--mac", "1:2"), "--mac is"),
    "MAC in use": (("default/vm", "--network", "vepanet", "--mac", MAC), "is in use on"),
    "interface": (("default/vm", "--network", "vepanet", "--interface", "a b"), "--interface is"),
    "interface taken": (
        ("default/vm", "--network", "vepanet", "--interface", "net1"),
        "an interface named net1 already",
    ),
    "address": (("default/vm", "--network", "vepanet", "--ip", "10.9.0"), "--ip"),
    "no address": (("default/vm", "--network", "held"), "which IP addresses"),
    "namespace": (
        ("default/vm", "--network", "vepanet", "--netns", "/proc/self/ns/net"),
        "is not at /proc/self/ns/net",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_touch_nothing(case: str, pod: str, run_dir: Path, networks: Path) -> None:
    """A request that cannot be met is told in one line with a hint, and nothing is touched."""
    command, said = BAD[case]
    before = picture(run_dir, pod)
    done = extbridge("attach", *command, "--networks-dir", str(networks), run_dir=run_dir)
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert picture(run_dir, pod) == before


def test_name_of_two_pods_has_to_be_said_better(
    *, lab: Lab, nic: Nic, cni: Cni, pod: str, run_dir: Path, networks: Path
) -> None:
    """A NIC's name that several pods have names none; the containers' IDs are told."""
    second = lab.pod("second")
    assert cni("ADD", network_config(nic), NETNS=second, CONTAINERID="container-2").result
    before = picture(run_dir, pod, second)
    done = extbridge("attach", "net1", "--network", "vepanet", "--networks-dir", str(networks),
                     run_dir=run_dir)  # fmt: skip
    assert done.returncode == 1
    assert "container-1 of default/vm, container-2" in done.stderr
    assert picture(run_dir, pod, second) == before


def test_nic_goes_with_the_runtimes_del(
    nic: Nic, cni: Cni, pod: str, run_dir: Path, networks: Path
) -> None:
    """A NIC that was attached is freed by the DEL of the one that ADD made, with nothing left."""
    entry = attach(run_dir, networks)
    assert (entry.pod, entry.pod_uid) == ("default/vm", "uid-1")
    assert macvtaps(pod) == ["macvtap0", "net1"]
    assert cni("DEL", network_config(nic), NETNS=pod).status == 0
    assert leftovers(pod, run_dir) == []


def test_nic_goes_with_the_runtimes_gc(
    nic: Nic, cni: Cni, pod: str, run_dir: Path, networks: Path
) -> None:
    """GC keeps a NIC that was attached for as long as the pod's attachment is valid, no longer."""
    attach(run_dir, networks)
    valid = {"containerID": "container-1", "ifname": "net1"}
    listed = network_config(nic, **{"cni.dev/valid-attachments": [valid]})
    assert cni("GC", listed).status == 0
    assert macvtaps(pod) == ["macvtap0", "net1"]
    listed = network_config(nic, **{"cni.dev/valid-attachments": []})
    assert cni("GC", listed).status == 0
    assert leftovers(pod, run_dir) == []


def test_detach_frees_only_what_attach_made(pod: str, run_dir: Path, networks: Path) -> None:
    """Without QMP a NIC that nobody holds is unmade by name or MAC; those of ADD are refused."""
    before = picture(run_dir, pod)
    for name in ("macvtap0", PLUGGED.upper()):
        attach(run_dir, networks)
        assert extbridge("detach", "default/vm", name, run_dir=run_dir).returncode == 0
        assert picture(run_dir, pod) == before
    done = extbridge("detach", "default/vm", "net1", run_dir=run_dir)
    assert done.returncode == 1
    assert "made by the runtime's ADD" in done.stderr
    assert picture(run_dir, pod) == before


def test_nic_that_was_not_plugged_in_is_detached_all_the_same(
    pod: str, vm: int, run_dir: Path, networks: Path, tmp_path: Path
) -> None:
    """What an `attach` that was killed has made, before QEMU had it, `detach` takes away."""
    qmp = tmp_path / "qmp"
    before = [picture(run_dir, pod), state(qmp, vm)]
    attach(run_dir, networks)
    done = extbridge("detach", "default/vm", "macvtap0", "--qmp", str(qmp), run_dir=run_dir)
    assert done.returncode == 0, done.stderr
    assert [picture(run_dir, pod), state(qmp, vm)] == before


def test_guest_that_does_not_answer_keeps_its_nic(
    pod: str, vm: int, run_dir: Path, networks: Path, tmp_path: Path
) -> None:
    """A guest that does not let go of a NIC keeps it, and the operator is told why."""
    attach(run_dir, networks, tmp_path / "qmp")
    before = [picture(run_dir, pod), state(tmp_path / "qmp", vm)[0]]
    # Twice: QEMU refuses to ask a guest that was asked before.
    for _ in range(2):
        done = extbridge("detach", "default/vm", PLUGGED, "--qmp", str(tmp_path / "qmp"),
                         "--timeout", "0.5", run_dir=run_dir)  # fmt: skip
        assert done.returncode == 1
        assert "the guest has not let go of it in 0.5 s" in done.stderr
    assert [picture(run_dir, pod), state(tmp_path / "qmp", vm)[0]] == before


def test_held_nic_is_not_pulled_from_under_its_holder(
    *, lab: Lab, pod: str, vm: int, run_dir: Path, networks: Path, tmp_path: Path
) -> None:
    """A NIC that is plugged in is not detached without QMP, nor over another QEMU's."""
    attach(run_dir, networks, tmp_path / "qmp")
    before = picture(run_dir, pod)
    done = extbridge("detach", "default/vm", PLUGGED, run_dir=run_dir)
    assert done.returncode == 1
    assert f"the tap of macvtap0 is held by process {vm}; give" in done.stderr.replace(
        "\n  hint: ", "; "
    )
    with qemu(lab.pod("other"), tmp_path / "other", *PORT) as other:
        done = extbridge("detach", "default/vm", PLUGGED, "--qmp", str(tmp_path / "other"),
                         run_dir=run_dir)  # fmt: skip
        assert done.returncode == 1
        assert f"is of process {other}" in done.stderr
    assert picture(run_dir, pod) == before


def test_lease_of_a_hot_plugged_nic_ends_with_its_qemu(
    *,
    lab: Lab,
    nic: Nic,
    agent: Agent,
    shim: Cni,
    launcher: Launcher,
    networks: Path,
    tmp_path: Path,
) -> None:
    """The agent that gave a QEMU its taps frees what was plugged in later, too, when it ends."""
    pod = lab.pod("vm")
    args = "K8S_POD_NAMESPACE=default;K8S_POD_NAME=vm"
    assert shim("ADD", network_config(nic, mac=MAC), NETNS=pod, ARGS=args).result
    qmp = tmp_path / "qmp"
    command = ("qemu-system-x86_64", "-S", "-nodefaults", "-display", "none", "-m", "16", *PORT,
               "-qmp", f"unix:{qmp},server=on,wait=off")  # fmt: skip
    with launcher.start(pod, *command) as process:
        until(qmp.exists)
        attach(agent.run_dir, networks, qmp)
        assert "held by process" in launcher.refusal(pod, EXTBRIDGE_IFNAMES="macvtap0")
        process.kill()
    until(lambda: all(it.holder is None for it in Ledger(agent.run_dir).entries()))
    # And the next QEMU has both from the start.
    assert launcher.printed(pod, "{macvtap0.mac}") == [PLUGGED]
    assert shim("DEL", network_config(nic), NETNS=pod).status == 0
    assert leftovers(pod, agent.run_dir) == []
