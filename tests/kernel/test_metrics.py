"""The agent's metrics show what goes wrong on the node, by NIC, network and VM."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from extbridge.demo.lab import Lab, Nic, run
from extbridge.handoff import take_taps
from extbridge.ledger import Holder, Ledger
from tests.kernel.agents import Agent, until
from tests.kernel.frames import ARP, ethernet
from tests.kernel.guests import PLAIN
from tests.kernel.observe import network_config
from tests.support import Cni, executable, missing

WITHOUT_NETNS_FOLDER = (
    "unshare", "--mount", "sh", "-c",
    'mount -t tmpfs extbridge-test /run/netns && exec "$@"', "sh",
)  # fmt: skip

ARGS = "K8S_POD_NAMESPACE=prod;K8S_POD_NAME=vm-a"
OF_VM = "{interface=net1,network=vepanet,vm=prod/vm-a}"


def test_nic_without_carrier_shows(agent: Agent, shim: Cni, lab: Lab, nic: Nic, pod: str) -> None:
    """A NIC that has lost its carrier, or is down, is seen as long as it has attachments."""
    config = network_config(nic)
    carrier = f"nic_carrier{{nic={nic.name}}}"
    assert shim("ADD", config, NETNS=pod).status == 0
    agent.counts({carrier: 1, "network_attachments{network=vepanet}": 1})
    run("ip", "link", "set", nic.port, "down", netns=lab.switch)
    agent.counts({carrier: 0})
    run("ip", "link", "set", nic.port, "up", netns=lab.switch)
    agent.counts({carrier: 1})
    run("ip", "link", "set", nic.name, "down")
    agent.counts({carrier: 0})
    assert shim("DEL", config, NETNS=pod).status == 0
    assert f"extbridge_{carrier}" not in agent.metrics()


@pytest.mark.parametrize("wrapper", [(), WITHOUT_NETNS_FOLDER], ids=["host", "container"])
def test_guest_that_spoofs_shows(
    agent: Agent, shim: Cni, nic: Nic, lab: Lab, wrapper: tuple[str, ...]
) -> None:
    """Frames that a guest may not send are counted by VM, also where the agent sees no folder."""
    agent.stop()
    agent.wrapper = wrapper
    agent.start()
    pods = {"vm-a": lab.pod("vm-a"), "vm-b": lab.pod("vm-b")}
    for name, pod in pods.items():
        args = f"K8S_POD_NAMESPACE=prod;K8S_POD_NAME={name}"
        assert shim("ADD", network_config(nic), CONTAINERID=name, NETNS=pod, ARGS=args).status == 0
    with taken(pods["vm-a"], agent.run_dir) as tap, taken(pods["vm-b"], agent.run_dir):
        agent.counts({f"spoof_drops_total{OF_VM}": 0, "spoof_drops_unread": 0})
        for _ in range(7):
            os.write(tap, PLAIN + ethernet(ARP, bytes(28), sender=bytes.fromhex("525400666666")))
        agent.counts(
            {
                f"spoof_drops_total{OF_VM}": 7,
                f"spoof_drops_total{OF_VM.replace('vm-a', 'vm-b')}": 0,
                "spoof_drops_unread": 0,
            }
        )
    for name, pod in pods.items():
        assert shim("DEL", network_config(nic), CONTAINERID=name, NETNS=pod).status == 0
    assert not [name for name in agent.metrics() if name.startswith("extbridge_spoof_drops_total")]


def test_what_is_not_known_is_said(agent: Agent, shim: Cni, nic: Nic, lab: Lab) -> None:
    """Drops that cannot be read are no zero; a guest that may send all has none to read."""
    agent.stop()
    agent.wrapper = WITHOUT_NETNS_FOLDER
    agent.start()
    assert shim("ADD", network_config(nic), NETNS=lab.pod("a"), ARGS=ARGS).status == 0
    free = network_config(nic, antispoof="off")
    assert shim("ADD", free, CONTAINERID="c2", NETNS=lab.pod("b")).status == 0
    agent.counts({"spoof_drops_unread": 1, "attachments": 2})
    assert f"extbridge_spoof_drops_total{OF_VM}" not in agent.metrics()


def test_one_vm_may_have_two_sandboxes(agent: Agent, shim: Cni, nic: Nic, lab: Lab) -> None:
    """A pod that is made anew before its old sandbox has gone is counted as the one that it is."""
    for number in range(2):
        # Each with another MAC, or the second would be refused.
        config = network_config(nic, mac=f"52:54:00:00:00:0{number}")
        container = {"CONTAINERID": f"c{number}", "NETNS": lab.pod(f"p{number}")}
        assert shim("ADD", config, ARGS=ARGS, **container).status == 0
    agent.counts({f"spoof_drops_total{OF_VM}": 0, "attachments": 2})
    assert exposition(agent).count("extbridge_spoof_drops_total{") == 1


def test_metrics_hold_before_promtool(agent: Agent, shim: Cni, nic: Nic, pod: str) -> None:
    """Prometheus reads what the agent says, and finds nothing to object to."""
    program = Path(executable("promtool"))
    if not program.exists():
        missing("the program promtool")
    assert shim("ADD", network_config(nic), NETNS=pod).status == 0
    assert shim("ADD", network_config(nic), NETNS=pod).status == 1
    done = subprocess.run(
        (program, "check", "metrics"),
        input=exposition(agent),
        text=True,
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_metrics_are_served_over_tcp_if_asked_for(agent: Agent, address: str) -> None:
    """A Prometheus elsewhere gets the metrics where the agent was told to serve them."""
    agent.stop()
    shown = f"[{address}]" if ":" in address else address
    agent.options = ("--metrics-listen", f"{shown}:9477")
    agent.start()
    for _ in range(20):
        with socket.create_connection((address, 9477)) as scraper:
            # What the command line asks for is not for the network.
            scraper.sendall(b"GET /attachments HTTP/1.1\r\n\r\n")
            said = b"".join(iter(lambda: scraper.recv(1 << 16), b""))
        assert said.startswith(b"HTTP/1.0 200 OK\r\n")
        assert b"\nextbridge_attachments 0.0\n" in said


def test_scrapers_that_say_nothing_do_not_keep_others(agent: Agent) -> None:
    """Many that connect and say nothing are hung up on, and the next is served."""
    silent = [socket.socket(socket.AF_UNIX) for _ in range(30)]
    try:
        for connection in silent:
            connection.connect(str(agent.run_dir / "metrics.sock"))
        assert agent.metrics()["extbridge_attachments"] == 0
    finally:
        for connection in silent:
            connection.close()
    until(lambda: "refused" in agent.log)


@pytest.mark.parametrize("address", ["9477", "localhost:9477", "::1:9477", "127.0.0.1:0", "[::1]"])
def test_address_that_is_none_is_refused(tmp_path: Path, address: str) -> None:
    """Where metrics cannot be served, the agent says how an address is written."""
    command = (executable("extbridge"), "agent", "--run-dir", str(tmp_path / "run"))
    done = subprocess.run(
        (*command, "--metrics-listen", address), capture_output=True, text=True, check=False
    )
    assert (done.returncode, "[::]:9477" in done.stderr) == (2, True)
    assert not (tmp_path / "run").exists()


def test_address_in_use_is_named(tmp_path: Path) -> None:
    """An agent that cannot serve its metrics says which address is not to be had."""
    command = (executable("extbridge"), "agent", "--run-dir", str(tmp_path / "other"))
    with socket.create_server(("127.0.0.1", 0)) as taken_already:
        address = f"127.0.0.1:{taken_already.getsockname()[1]}"
        done = subprocess.run(
            (*command, "--metrics-listen", address), capture_output=True, text=True, check=False
        )
    assert done.returncode == 1
    assert f"{address.replace(':', ' port ')}: Address already in use" in done.stderr


@contextmanager
def taken(pod: str, run_dir: Path) -> Iterator[int]:
    """The pod's tap, taken by a process that stands in the pod; its first fd."""
    with subprocess.Popen(("nsenter", f"--net={pod}", "sleep", "100")) as vm:
        try:
            netns = os.open(pod, os.O_RDONLY | os.O_CLOEXEC)
            # It has to stand there before it is said to hold a tap.
            inode = os.fstat(netns).st_ino
            until(lambda: os.stat(f"/proc/{vm.pid}/ns/net").st_ino == inode)
            try:
                holder = Holder.of(vm.pid)
                with take_taps(netns, holder, ledger=Ledger(run_dir)) as [tap]:
                    yield tap.fds[0]
            finally:
                os.close(netns)
        finally:
            vm.kill()


def exposition(agent: Agent) -> str:
    """The metrics as the agent says them."""
    with socket.socket(socket.AF_UNIX) as scraped:
        scraped.connect(str(agent.run_dir / "metrics.sock"))
        scraped.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        said = b"".join(iter(lambda: scraped.recv(1 << 16), b""))
    return said.partition(b"\r\n\r\n")[2].decode()
