"""A guest that runs gets one more NIC, and gives it back."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from extbridge import hotplug
from extbridge.demo.guest import Guest
from extbridge.demo.lab import Lab
from extbridge.kernel.checksums import loaded_program
from extbridge.ledger import Holder, Ledger
from extbridge.spec.errors import QemuRefused
from tests.kernel.hotplugging import MAC, PLUGGED, attach, define_networks, relayed
from tests.kernel.observe import leftovers, macvtaps, network_config
from tests.support import Cni, executable

pytestmark = pytest.mark.guest

SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"

MACHINES = {
    "q35": ("-M", "q35", "-device", "pcie-root-port,id=spare1,chassis=1,slot=1"),
    "pc": ("-M", "pc"),
}


@pytest.fixture(scope="module", autouse=True)
def _program() -> None:
    """What a process keeps open once it has guarded a NIC is no leak of a test's."""
    loaded_program()


@pytest.mark.parametrize("machine", MACHINES)
def test_running_guest_gets_a_nic_and_gives_it_back(
    *,
    machine: str,
    lab: Lab,
    cni: Cni,
    guest: type[Guest],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`attach` gives a running guest a NIC that reaches the network; `detach` takes it away."""
    nic = lab.nic()
    networks = define_networks(tmp_path / "networks", nic)
    pod = lab.pod("vm")
    lab.neighbour("host", "10.9.0.254/24")
    result = cni("ADD", network_config(nic, mac=MAC), NETNS=pod).result
    qmp = tmp_path / "qmp"
    options = (*MACHINES[machine], "-sandbox", SANDBOX, "-qmp", f"unix:{qmp},server=on,wait=off")
    launcher = (executable("extbridge"), "run", "--netns", pod, "--")
    with guest("a", launcher, options=options, env=cni.environment("none")) as booted:
        booted.wait_ready()
        for _ in range(2):
            said = hot("attach", MAC, "--network", "vepanet", "--mac", PLUGGED, "--qmp", str(qmp),
                       "--networks-dir", str(networks))  # fmt: skip
            assert said == f"macvtap0 {PLUGGED} on {nic.name}"
            seen(booted, "eth1", there=True)
            assert ask(booted, "cat /sys/class/net/eth1/address") == PLUGGED
            ask(booted, "ip link set eth1 up; ip address add 10.9.0.1/24 dev eth1")
            assert "3 packets received" in ask(booted, "ping -c 3 -i 0.2 -W 3 10.9.0.254")
            holder = Holder.of(booted.pid)
            assert [it.holder for it in Ledger(cni.run_dir).entries()] == [holder, holder]
            given = network_config(nic, mac=MAC, prevResult=result)
            assert cni("CHECK", given, NETNS=pod).status == 0
            assert hot("detach", MAC, PLUGGED, "--qmp", str(qmp)) == f"macvtap0 {PLUGGED} is gone"
            seen(booted, "eth1", there=False)
            assert macvtaps(pod) == ["net1"]
        # QEMU has it, and so does the guest, when nobody tells that it was plugged.
        monkeypatch.setattr(hotplug, "ANSWER_SECONDS", 5)
        with (
            relayed(pod, qmp, "device_add") as relay,
            pytest.raises(QemuRefused, match="device_add"),
        ):
            attach(cni.run_dir, networks, relay)
        seen(booted, "eth1", there=False)
        assert macvtaps(pod) == ["net1"]
        # The guest has not lost its first one meanwhile.
        ask(booted, "ip address add 10.9.0.2/24 dev eth0")
        assert "3 packets received" in ask(booted, "ping -c 3 -i 0.2 -W 3 10.9.0.254")
    assert cni("DEL", network_config(nic, mac=MAC), NETNS=pod).status == 0
    assert leftovers(pod, cni.run_dir) == []


def hot(*command: str) -> str:
    """What `extbridge` printed; it succeeded."""
    done = subprocess.run(
        (executable("extbridge"), *command), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def seen(booted: Guest, name: str, *, there: bool) -> None:
    """See that the guest comes to have the NIC, or to have it no more."""
    deadline = time.monotonic() + 20
    while (booted.run(f"test -e /sys/class/net/{name}").status == 0) != there:
        assert time.monotonic() < deadline, booted.run("dmesg | tail -20; ls /sys/class/net").output
        time.sleep(0.1)


def ask(booted: Guest, command: str) -> str:
    answer = booted.run(command)
    assert answer.status == 0, answer.output
    return answer.output.strip()
