"""With containerd, as on a Kubernetes node: VMs in pods that have no privilege whatever.

containerd, runc, the plugins of the pod network, the shim, the agent, QEMU and the guests are the
real ones; the test does what a kubelet would do, through the CRI. Two VMs serve all tests.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from extbridge.demo.guest import Console, Guest, qemu_command
from extbridge.demo.lab import Lab, run
from extbridge.ledger import Entry, Ledger
from tests.e2e.cri import Containerd, CriFailure, Executed, Pod, children_of, containerd, until
from tests.e2e.image import INITRAMFS, KERNEL
from tests.kernel.observe import ledger_of, link_names, tables
from tests.support import executable, require

pytestmark = pytest.mark.guest

# Whom Debian's libvirt runs QEMU as; any will do.
_UID: Final = 64055

_NETWORKS: Final = "extbridge.io/networks"
_PLUGINS: Final = Path("/usr/lib/cni")

# What runc and containerd mount into every container, restricted or not.
_RUNTIMES_OWN: Final = re.compile(r"/|/(proc|sys|dev)(/.*)?|/etc/(hosts|hostname|resolv\.conf)")


class Agent:
    """The node's agent, and a parent for it that starts it anew when told: a service manager."""

    def __init__(self, run_dir: Path) -> None:
        self._socket = str(run_dir / "cni.sock")
        self._parent = subprocess.Popen(
            ("setpriv", "--pdeathsig", "KILL", "--",
             "sh", "-c", 'while read -r _; do "$@"; done', "sh",
             "setpriv", "--pdeathsig", "KILL", "--",
             executable("extbridge"), "agent", "--run-dir", str(run_dir)),
            stdin=subprocess.PIPE,
        )  # fmt: skip

    def start(self) -> None:
        """Start it, and wait until it takes requests."""
        assert self._parent.stdin is not None
        self._parent.stdin.write(b"\n")
        self._parent.stdin.flush()
        until(lambda: _connect(self._socket)).close()

    def kill(self) -> None:
        """Kill it as the kernel would, with no chance to finish anything."""
        for pid in children_of(self._parent.pid):
            os.kill(pid, signal.SIGKILL)
        until(lambda: not children_of(self._parent.pid))

    @contextmanager
    def down(self) -> Iterator[None]:
        """It is killed, and started anew after the block."""
        self.kill()
        try:
            yield
        finally:
            self.start()

    def close(self) -> None:
        """Kill it for good."""
        self.kill()
        self._parent.communicate()


@dataclass(frozen=True, slots=True)
class Node:
    """A node with a NIC on the switch, containerd, the agent and a network for VMs."""

    cri: Containerd
    agent: Agent
    run_dir: Path
    leases: Path

    @property
    def launcher(self) -> str:
        """Where a VM's container has it."""
        return str(self.run_dir / "pod/extbridge-exec")

    def entries(self, pod: Pod) -> list[Entry]:
        """What the ledger says of the pod."""
        return Ledger(self.run_dir).of(pod.id)

    def run_vm_container(self, pod: Pod, *command: str) -> str:
        """Start a container that has what a VM's has, and give it the pod's taps."""
        return self.cri.run_container(
            pod,
            [self.launcher, *command],
            uid=_UID,
            mounts=[self.run_dir / "pod"],
            environment={"EXTBRIDGE_RUN": str(self.run_dir)},
        )

    def holder(self, pod: Pod) -> int:
        """The process that took the pod's tap, as soon as one has."""

        def taken() -> int:
            return next((it.holder.pid for it in self.entries(pod) if it.holder), 0)

        try:
            return until(taken)
        except TimeoutError:
            pytest.fail(f"nobody takes the tap: {(self.cri.logs / f'{pod.name}.log').read_text()}")

    def traces(self) -> set[str]:
        """All that pods leave on the node, if they leave anything."""
        return {
            *(f"link {name}" for name in link_names()),
            *(f"rules {table}" for table in tables("/proc/self/ns/net")),
            *(f"namespace {path.name}" for path in self.cri.root.glob("run/netns/*")),
            *(f"ledger {path}" for path in ledger_of(self.run_dir)),
            *(f"spool {path}" for path in (self.run_dir / "spool").iterdir()),
            *(f"address {path.name}" for path in self.leases.glob("*/*.*.*.*")),
        }


@dataclass(frozen=True, slots=True)
class Vm:
    """A pod with a VM; `pid` is its QEMU."""

    pod: Pod
    container: str
    pid: int
    console: Console
    address: str


@dataclass(frozen=True, slots=True)
class Site:
    node: Node
    a: Vm
    b: Vm


@pytest.fixture(scope="module")
def site(guest: type[Guest], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The node with its VMs; when these are stopped and removed nothing is left of them."""
    del guest  # Its needs are ours.
    for tool in ("containerd", "ctr", "runc", "nft", "ip", "bridge"):
        require(tool)
    folder = tmp_path_factory.mktemp("node")
    with ExitStack() as closing:
        lab = closing.enter_context(Lab())
        node = closing.enter_context(_node(folder, lab.nic().name))
        before = node.traces()
        with _vm(node, "a", "10.9.0.1") as a, _vm(node, "b", "10.9.0.2") as b:
            for vm in (a, b):
                vm.console.wait_ready()
            yield Site(node, a, b)
        assert node.traces() == before


def test_vm_reaches_another_across_the_switch(site: Site) -> None:
    """A pod that is annotated with a network has a VM on the switch, beside its pod network."""
    for vm, other in ((site.a, site.b), (site.b, site.a)):
        pinged = vm.console.run(f"ping -c 3 -W 3 {other.address}")
        assert "3 packets transmitted, 3 packets received" in pinged.output
        assert _links(site.node.cri.execute(vm.container, "busybox", "ip", "link")) == [
            "eth0",
            "lo",
            "macvtap0",
        ]
        [entry] = site.node.entries(vm.pod)
        assert (entry.network, entry.definition, entry.ifname) == ("cluster", "vepanet", "macvtap0")
        assert entry.mac in vm.console.run("ip link show eth0").output
        # The one that the ledger holds to be the holder has the tap, and is QEMU.
        assert os.readlink(f"/proc/{vm.pid}/exe").endswith("/qemu-system-x86_64")
        opened = [fd.readlink().name for fd in Path(f"/proc/{vm.pid}/fd").iterdir()]
        assert [name for name in opened if "tap" in name] == [f"tap{entry.ifindex}"]


def test_vms_container_has_no_privilege(site: Site) -> None:
    """QEMU runs as an ordinary user without a capability or a device; one folder is mounted."""
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{site.a.pid}/status").read_text().splitlines()
    )
    assert status["Uid"].split() == status["Gid"].split() == [str(_UID)] * 4
    assert {status[f"Cap{which}"] for which in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
    # Filtered by the runtime's default profile (seccomp, mode 2).
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    devices = site.node.cri.execute(site.a.container, "busybox", "find", "/dev", "-type", "c")
    assert {Path(path).name for path in devices.stdout.split()} <= {
        *("full", "null", "ptmx", "random", "tty", "urandom", "zero")
    }
    mounts = {}
    for line in Path(f"/proc/{site.a.pid}/mountinfo").read_text().splitlines():
        # proc(5): the fifth field is the mount point, the sixth its options.
        point, options = line.split()[4:6]
        if not _RUNTIMES_OWN.fullmatch(point):
            mounts[point] = options.split(",")[0]
    assert mounts == {str(site.node.run_dir / "pod"): "ro"}


def test_second_launcher_in_a_pod_is_refused(site: Site) -> None:
    """While a VM runs nobody else gets its tap, and whoever asks is told which process has it."""
    _expect_refusal(site.node, site.a)


def test_pod_without_annotation_is_left_alone(site: Site) -> None:
    """A pod that asks for nothing has its pod network as it would have without extbridge."""
    node = site.node
    before = node.traces()
    with _pod(node, "plain", {}) as pod:
        container = node.cri.run_container(pod, ["busybox", "sleep", "1000"], uid=_UID)
        assert _links(node.cri.execute(container, "busybox", "ip", "link")) == ["eth0", "lo"]
        status = node.cri.call("PodSandboxStatus", pod_sandbox_id=pod.id)["status"]
        shown = node.cri.execute(container, "busybox", "ip", "address", "show", "eth0").stdout
        assert f"inet {status['network']['ip']}/" in shown
        assert node.entries(pod) == []
    assert node.traces() == before


def test_pod_that_asks_for_an_unknown_network_does_not_start(site: Site) -> None:
    """Whoever looks at a pod that does not start reads why; nothing is left of the attempt."""
    before = site.node.traces()
    with pytest.raises(CriFailure, match=r"vepante.*vepanet"):
        site.node.cri.run_pod("typo", {_NETWORKS: "vepante"})
    assert site.node.traces() == before


def test_agent_that_is_killed_and_restarted_is_not_noticed(site: Site) -> None:
    """While the agent dies and comes back VMs lose no packet, and keep their taps."""
    console = site.a.console
    console.run(f"ping -i 0.1 {site.b.address} >/tmp/pings & echo $! >/tmp/pinging")

    def answered(at_least: int) -> int:
        number = int(console.run("grep -c seq= /tmp/pings").output)
        return number if number >= at_least else 0

    until(lambda: answered(3))
    with site.node.agent.down():
        pass
    while_restarting = answered(1)
    until(lambda: answered(while_restarting + 3))
    said = console.run("kill -INT $(cat /tmp/pinging); cat /tmp/pings").output
    sequence = [int(number) for number in re.findall(r"seq=(\d+)", said)]
    assert sequence == list(range(len(sequence)))
    _expect_refusal(site.node, site.a)


def test_pod_that_ends_while_the_agent_is_down_leaves_nothing(site: Site) -> None:
    """A pod can be stopped and removed without an agent; the next one does what is left to do."""
    node = site.node
    before = node.traces()
    with ExitStack() as closing:
        pod = closing.enter_context(_pod(node, "short", {_NETWORKS: "vepanet"}))
        # A command with a placeholder gets no options of QEMU's.
        node.run_vm_container(pod, "busybox", "sh", "-c", "sleep 1000", "{macvtap0.fd}")
        node.holder(pod)
        with node.agent.down():
            closing.close()
            assert any(trace.startswith("spool") for trace in node.traces() - before)
    until(lambda: node.traces() == before)


@contextmanager
def _node(folder: Path, nic: str) -> Iterator[Node]:
    """A node whose pods have a point-to-point link for their pod network, and `vepanet`."""
    run_dir, plugins, configurations, networks, leases = (
        folder / name for name in ("run", "plugins", "net.d", "networks", "leases")
    )
    for made in (plugins, configurations, networks, leases):
        made.mkdir()
    for plugin in ("loopback", "ptp", "host-local"):
        (plugins / plugin).symlink_to(_PLUGINS / plugin)
    run(executable("extbridge"), "install", "--shim-only", "--bin-dir", str(plugins))
    (networks / "vepanet.yaml").write_text(f"extbridge: {{mode: vepa, dev: {nic}}}\n")
    ipam = {"type": "host-local", "subnet": "10.88.0.0/24", "dataDir": str(leases)}
    chained = {
        "type": "extbridge",
        "networksDir": str(networks),
        "capabilities": {"io.kubernetes.cri.pod-annotations": True},
    }
    chain = {
        "cniVersion": "1.0.0",
        "name": "cluster",
        "plugins": [{"type": "ptp", "ipam": ipam}, chained],
    }
    (configurations / "cluster.conflist").write_text(json.dumps(chain))
    with ExitStack() as closing:
        agent = Agent(run_dir)
        closing.callback(agent.close)
        agent.start()
        cri = closing.enter_context(
            containerd(
                folder,
                plugins=plugins,
                configurations=configurations,
                environment={"EXTBRIDGE_RUN": str(run_dir)},
            )
        )
        yield Node(cri, agent, run_dir, leases)


@contextmanager
def _pod(node: Node, name: str, annotations: Mapping[str, str]) -> Iterator[Pod]:
    """A pod of that name; after the block it is stopped and removed, and its taps are gone."""
    pod = node.cri.run_pod(name, annotations)
    try:
        yield pod
    finally:
        taps = [Path(f"/dev/tap{entry.ifindex}") for entry in node.entries(pod)]
        node.cri.remove_pod(pod)
        until(lambda: not any(tap.exists() for tap in taps))


@contextmanager
def _vm(node: Node, name: str, address: str) -> Iterator[Vm]:
    """A VM of that name, booting; stopped and removed with its pod."""
    with ExitStack() as closing:
        pod = closing.enter_context(_pod(node, name, {_NETWORKS: "vepanet"}))
        # QEMU waits until somebody listens.
        command = qemu_command(KERNEL, INITRAMFS, serial="unix:/tmp/console,server=on")
        container = node.run_vm_container(pod, *command)
        pid = node.holder(pod)
        serial = until(lambda: _connect(f"/proc/{pid}/root/tmp/console"))
        console = closing.enter_context(Console(name, serial, addresses=[f"{address}/24"]))
        yield Vm(pod, container, pid, console, address)


def _connect(path: str) -> socket.socket | None:
    """A connection to whoever listens at the path, if anybody does."""
    with ExitStack() as closing:
        tried = closing.enter_context(socket.socket(socket.AF_UNIX))
        with suppress(OSError):
            tried.connect(path)
            closing.pop_all()
            return tried
    return None


def _expect_refusal(node: Node, vm: Vm) -> None:
    refused = node.cri.execute(vm.container, node.launcher, "busybox", "true")
    assert refused.status == 125
    assert f"held by process {vm.pid}" in refused.stderr


def _links(shown: Executed) -> list[str]:
    assert shown.status == 0, shown.stderr
    return sorted(re.findall(r"^\d+: ([^:@]+)", shown.stdout, re.MULTILINE))
