"""With containerd, as on a Kubernetes node: VMs in pods that have no privilege whatever.

The agent is the image's, run as the rendered DaemonSet says, and the VMs' pods are those of
deploy/examples. containerd, runc, the plugins of the pod network, QEMU and the guests are the real
ones; the test does what a kubelet would do, through the CRI, and has an API server that grants what
the manifests' role does. Two VMs serve most tests.
"""

from __future__ import annotations

import json
import os
import re
import socket
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Final

import pytest
import yaml

from extbridge.demo.guest import Console, Guest, qemu_command
from extbridge.demo.lab import Lab
from extbridge.kube.reports import STATUS_ANNOTATION
from extbridge.ledger import Entry, Ledger
from extbridge.network.definition import FIRST_DEVICE
from tests.e2e.cri import Containerd, CriFailure, Executed, Pod, containerd, until
from tests.e2e.image import ARCHIVE, IMAGE, INITRAMFS, KERNEL
from tests.e2e.kubelet import (
    Kubelet,
    PodFailure,
    RunningPod,
    pod_of,
)
from tests.kernel.api_server import ApiServer
from tests.kernel.kubelet import Kubelet as DeviceManager
from tests.kernel.observe import ledger_of, link_names, tables
from tests.manifests import DEPLOY, Manifest, rendered, the
from tests.support import missing, require

pytestmark = pytest.mark.guest

_LAUNCHER: Final = "/run/extbridge/pod/extbridge-exec"
_NETWORKS: Final = "extbridge.io/networks"

# What runc and containerd mount into every container, restricted or not.
_RUNTIMES_OWN: Final = re.compile(r"/|/(proc|sys|dev)(/.*)?|/etc/(hosts|hostname|resolv\.conf)")

# What all of extbridge's own is in, on a node.
_FOLDERS: Final = ("opt/cni", "etc/cni", "run/extbridge", "var/lib/kubelet")


class Agent:
    """The DaemonSet's pod on the node."""

    def __init__(self, kubelet: Kubelet, daemon_set: Manifest) -> None:
        self._kubelet = kubelet
        self._daemon_set = daemon_set
        self.start()

    def start(self) -> None:
        """Start it, and wait until it is ready."""
        self._running = self._kubelet.run(pod_of(self._daemon_set))

    @contextmanager
    def down(self) -> Iterator[None]:
        """It is killed, with no chance to finish anything; after the block kubelet restarts it."""
        # With it goes who would answer.
        with suppress(CriFailure):
            self._signal("KILL")
        try:
            yield
        finally:
            self._kubelet.restart(self._running, "agent")

    @contextmanager
    def hanging(self) -> Iterator[Callable[[str], Executed]]:
        """It does nothing until the block ends; given is what asks its probe of a kind."""
        container = self._running.containers["agent"]
        self._signal("STOP")
        try:
            yield partial(self._kubelet.probe, container)
        finally:
            self._signal("CONT")

    def execute(self, *command: str) -> Executed:
        """Run a command in its container."""
        return self._kubelet.cri.execute(self._running.containers["agent"].id, *command)

    def replace(self) -> None:
        """What a rolling update does with a node: the pod is ended, and another one started."""
        self.remove()
        self.start()

    def remove(self) -> None:
        """End it, with the time that it needs for it."""
        self._kubelet.remove(self._running)

    def _signal(self, name: str) -> None:
        # Its container sees the node's processes.
        pid = self._kubelet.cri.pid_of(self._running.containers["agent"].id)
        self.execute("sh", "-c", f"kill -{name} {pid}")


@dataclass(frozen=True, slots=True)
class Node:
    """A node with a NIC on the switch, containerd, the agent and a network for VMs.

    `found` is what its folders had before the agent came.
    """

    cri: Containerd
    kubelet: Kubelet
    agent: Agent
    found: Mapping[str, object]

    @property
    def run_dir(self) -> Path:
        """The agent's, as it is seen from here."""
        return self.cri.root / "run/extbridge"

    def entries(self, pod: Pod) -> list[Entry]:
        """What the ledger says of the pod."""
        return Ledger(self.run_dir).of(pod.id)

    def process(self, pid: int) -> Path:
        """The folder in /proc of a process, by the number that it has on the node."""
        return self.cri.root / "proc" / str(pid)

    def holder(self, pod: Pod) -> int:
        """The process that took the pod's tap, as soon as one has."""

        def taken() -> int:
            return next((it.holder.pid for it in self.entries(pod) if it.holder), 0)

        try:
            return until(taken)
        except TimeoutError:
            pytest.fail(f"nobody takes the tap: {self.kubelet.log(pod.name, 'qemu')}")

    def traces(self) -> set[str]:
        """All that pods leave on the node, if they leave anything."""
        return {
            *(f"link {name}" for name in link_names()),
            *(f"rules {table}" for table in tables("/proc/self/ns/net")),
            *(f"namespace {path.name}" for path in self.cri.root.glob("run/netns/*")),
            *(f"ledger {path}" for path in ledger_of(self.run_dir)),
            *(f"spool {path}" for path in (self.run_dir / "spool").iterdir()),
            *(
                f"address {path.name}"
                for path in self.cri.root.glob("var/lib/cni/networks/*/*.*.*.*")
            ),
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
def lab_nic(guest: type[Guest]) -> Iterator[str]:
    """A NIC on a switch, where all is there that its node needs."""
    del guest  # Its needs are ours.
    for tool in ("containerd", "ctr", "runc", "nft", "ip", "bridge"):
        require(tool)
    if not ARCHIVE.exists():
        missing(f"the image {ARCHIVE}")
    with Lab() as lab:
        yield lab.nic().name


@pytest.fixture(scope="module")
def site(lab_nic: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The node with its VMs; when these are stopped and removed nothing is left of them."""
    with _node(tmp_path_factory.mktemp("node"), lab_nic) as node:
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
        process = site.node.process(vm.pid)
        assert os.readlink(process / "exe").endswith("/qemu-system-x86_64")
        opened = _opened(process)
        assert [name for name in opened if "tap" in name] == [f"tap{entry.ifindex}"]


def test_vms_container_has_no_privilege(site: Site) -> None:
    """QEMU runs as an ordinary user without a capability or a device; one folder is mounted."""
    process = site.node.process(site.a.pid)
    status = dict(line.split(":\t", 1) for line in (process / "status").read_text().splitlines())
    assert status["Uid"].split() == status["Gid"].split() == ["107"] * 4
    assert {status[f"Cap{which}"] for which in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
    # Filtered by the runtime's default profile (seccomp, mode 2).
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    devices = site.node.cri.execute(site.a.container, "busybox", "find", "/dev", "-type", "c")
    assert {Path(path).name for path in devices.stdout.split()} <= {
        *("full", "null", "ptmx", "random", "tty", "urandom", "zero")
    }
    mounts = {}
    for line in (process / "mountinfo").read_text().splitlines():
        # proc(5): the fifth field is the mount point, the sixth its options.
        point, options = line.split()[4:6]
        if not _RUNTIMES_OWN.fullmatch(point):
            mounts[point] = options.split(",")[0]
    # The second is the pod's own, and empty.
    assert mounts == {"/run/extbridge/pod": "ro", "/tmp": "rw"}  # noqa: S108 - a volume


def test_second_launcher_in_a_pod_is_refused(site: Site) -> None:
    """While a VM runs nobody else gets its tap, and whoever asks is told which process has it."""
    _expect_refusal(site.node, site.a)


def test_pod_without_annotation_is_left_alone(site: Site) -> None:
    """A pod that asks for nothing has its pod network as it would have without extbridge."""
    node = site.node
    before = node.traces()
    with _pod(node, _plain_pod("plain", {})) as running:
        container = running.containers["main"].id
        assert _links(node.cri.execute(container, "busybox", "ip", "link")) == ["eth0", "lo"]
        status = node.cri.call("PodSandboxStatus", pod_sandbox_id=running.pod.id)["status"]
        shown = node.cri.execute(container, "busybox", "ip", "address", "show", "eth0").stdout
        assert f"inet {status['network']['ip']}/" in shown
        assert node.entries(running.pod) == []
    assert node.traces() == before


def test_pod_that_asks_for_an_unknown_network_does_not_start(site: Site) -> None:
    """Whoever looks at a pod that does not start reads why; nothing is left of the attempt."""
    before = site.node.traces()
    with pytest.raises(CriFailure, match=r"vepante.*vepanet"):
        site.node.kubelet.run(_plain_pod("typo", {_NETWORKS: "vepante"}))
    assert site.node.traces() == before
    [event] = until(site.node.kubelet.api.events)
    assert event["involvedObject"]["name"] == "typo"
    assert "vepante" in event["message"]


def test_cluster_is_told_of_the_vms_nic(site: Site) -> None:
    """With the image's client and its own token, the agent follows pods and writes their status."""
    api = site.node.kubelet.api
    [entry] = site.node.entries(site.a.pod)

    def status() -> str:
        annotations = api.pod(site.a.pod.name)["metadata"]["annotations"]
        return str(annotations.get(STATUS_ANNOTATION, ""))

    [nic] = json.loads(until(status))
    assert (nic["name"], nic["interface"], nic["mac"]) == ("vepanet", entry.ifname, entry.mac)
    calls = api.recorded()
    assert {"list", "watch", "patch"} <= {it["call"] for it in calls}
    assert [it for it in calls if it["status"] >= HTTPStatus.BAD_REQUEST] == []


def test_operator_sees_it_all_from_the_agents_container(site: Site) -> None:
    """`kubectl exec` of extbridge list shows each VM's NIC as it is, namespaces and holders too."""
    done = site.node.agent.execute("extbridge", "list", "-o", "json")
    assert (done.status, done.stderr) == (0, "")
    told = {it["container"]: it for it in json.loads(done.stdout)}
    for vm in (site.a, site.b):
        it = told[vm.pod.id]
        assert (it["state"], it["holder"]["pid"]) == ("in use", vm.pid)
        assert it["holder"]["command"] == "qemu-system-x86_64"
        assert it["counters"] is not None
    shown = site.node.agent.execute("extbridge", "show", site.a.pod.id)
    assert "all is as ADD made it" in shown.stdout


def test_agent_that_is_killed_and_restarted_is_not_noticed(site: Site) -> None:
    """While the agent dies and comes back VMs lose no packet, and keep their taps."""
    with _no_ping_is_lost(site), site.node.agent.down():
        pass
    _expect_refusal(site.node, site.a)


def test_agent_that_is_replaced_is_not_noticed(site: Site) -> None:
    """Nor do they when a rolling update of the DaemonSet comes to their node."""
    with _no_ping_is_lost(site):
        site.node.agent.replace()
    _expect_refusal(site.node, site.a)


def test_agent_that_hangs_is_found_out(site: Site) -> None:
    """Kubelet's probes of an agent fail when it does not answer, so that it is started anew."""
    with site.node.agent.hanging() as probed, pytest.raises(CriFailure, match="timeout"):
        probed("livenessProbe")
    assert probed("livenessProbe").status == 0


def test_agent_cannot_change_its_image(site: Site) -> None:
    """All that the agent writes is in the node's folder for it; what runs is what was installed."""
    touched = site.node.agent.execute("touch", "/opt/extbridge/bin/more")
    assert "Read-only file system" in touched.stderr


def test_agents_image_has_the_whole_command_line(site: Site) -> None:
    """What the image leaves out of its libraries no command needs to show what it shows."""
    for command in ("list", "networks"):
        shown = site.node.agent.execute("extbridge", command)
        assert (shown.status, shown.stderr) == (0, "")
        assert "vepanet" in shown.stdout
    tree = site.node.agent.execute("extbridge", "list", "--tree")
    assert (tree.status, tree.stderr) == (0, "")
    assert "findings" in site.node.agent.execute("extbridge", "doctor", "-o", "json").stdout


def test_pod_that_ends_while_the_agent_is_down_leaves_nothing(site: Site) -> None:
    """A pod can be stopped and removed without an agent; the next one does what is left to do."""
    node = site.node
    before = node.traces()
    with ExitStack() as closing:
        running = closing.enter_context(_pod(node, _holding_pod("short")))
        node.holder(running.pod)
        with node.agent.down():
            closing.close()
            assert any(trace.startswith("spool") for trace in node.traces() - before)
    until(lambda: node.traces() == before)


@pytest.fixture
def device_node(site: Site) -> Iterator[Node]:
    """The node with a kubelet that gives out devices, and what Multus attaches."""
    manifests = rendered(DEPLOY / "overlays/kubevirt")
    attachments = [it for it in manifests if it["kind"] == "NetworkAttachmentDefinition"]
    with DeviceManager(site.node.cri.root / "var/lib/kubelet/device-plugins") as devices:
        kubelet = replace(
            site.node.kubelet, devices=devices.start(), attachments=tuple(attachments)
        )
        yield replace(site.node, kubelet=kubelet)


def _opened(process: Path) -> list[str]:
    """The names of the files that the process has open; some may be closed while they are read."""
    names = []
    for fd in (process / "fd").iterdir():
        with suppress(FileNotFoundError):
            names.append(fd.readlink().name)
    return names


def test_pod_with_a_device_needs_no_host_path(device_node: Node) -> None:
    """With a network's resource in its limits a restricted pod gets the launcher, and its tap."""
    before = device_node.traces()
    manifest = _holding_pod("device", "multus", "net1")
    assert "hostPath" not in json.dumps(manifest)
    with _pod(device_node, manifest) as running:
        pid = device_node.holder(running.pod)
        [entry] = device_node.entries(running.pod)
        assert (entry.ifname, entry.definition) == ("net1", "vepanet")
        assert entry.ifindex >= FIRST_DEVICE
        # The ledger knows the holder a moment before it has the tap.
        until(lambda: f"tap{entry.ifindex}" in _opened(device_node.process(pid)))
        assert _taps(device_node, running) == []
        mounts = (device_node.process(pid) / "mountinfo").read_text().splitlines()
        [options] = [it.split()[5] for it in mounts if it.split()[4] == "/run/extbridge/pod"]
        assert options.startswith("ro")
    assert device_node.traces() == before


def test_pod_opens_the_node_that_kubelet_gave_it(device_node: Node) -> None:
    """On a network with `handoff: device` a pod opens its tap itself, and finds no other."""
    before = device_node.traces()
    manifest = _vm_pod("node", example="multus")
    manifest["metadata"]["annotations"] = {"k8s.v1.cni.cncf.io/networks": "vmnet"}
    [container] = manifest["spec"]["containers"]
    container["command"] = ["busybox", "sleep", "1000"]
    container["resources"]["limits"] = {"extbridge.io/vmnet": 1}
    with _pod(device_node, manifest) as running:
        [entry] = device_node.entries(running.pod)
        tap = f"/dev/tap{entry.ifindex}"
        assert _taps(device_node, running) == [tap]
        opened = device_node.cri.execute(
            running.containers["qemu"].id, "busybox", "sh", "-c", f"exec 3<>{tap} && echo opened"
        )
        assert (opened.stdout, opened.stderr) == ("opened\n", "")
    assert device_node.traces() == before


def test_uninstall_leaves_the_node_as_it_was(lab_nic: str, tmp_path: Path) -> None:
    """What deploy/ brought onto a node deploy/uninstall takes away, once nothing needs it."""
    uninstall = pod_of(the("DaemonSet", rendered(_overlay(tmp_path / "gone", "uninstall"))))
    with _node(tmp_path, lab_nic) as node:
        running = node.kubelet.run(_holding_pod("vm"))
        node.holder(running.pod)
        # The cluster's network writes its list anew, and the agent stands in it again.
        chain = node.cri.root / "etc/cni/net.d/10-cluster.conflist"
        chain.write_bytes(Path(f"{chain}.extbridge-backup").read_bytes())
        until(lambda: b'"extbridge"' in chain.read_bytes())
        with pytest.raises(PodFailure, match="agent still runs"):
            node.kubelet.run(uninstall)
        node.agent.remove()
        with pytest.raises(PodFailure, match="delete their pods"):
            node.kubelet.run(uninstall)
        node.agent.start()
        node.kubelet.remove(running)
        plain, other = (node.kubelet.run(_plain_pod(name, {})) for name in ("plain", "other"))
        node.agent.remove()
        # Neither has a NIC, and yet there is now a DEL that no agent will ever read.
        node.kubelet.remove(plain)
        with pytest.raises(CriFailure, match="gives no answer"):
            node.kubelet.run(_plain_pod("late", {}))
        assert list((node.run_dir / "spool").iterdir())
        node.kubelet.remove(node.kubelet.run(uninstall))
        assert not node.run_dir.exists()
        node.kubelet.remove(other)
        # Again, where all is done.
        node.kubelet.remove(node.kubelet.run(uninstall))
        assert _contents(node.cri) == node.found


@contextmanager
def _node(folder: Path, nic: str) -> Iterator[Node]:
    """A node whose pods have a point-to-point link for their pod network, and `vepanet`."""
    manifests = rendered(_overlay(folder / "deploy", "", nic))
    account = folder / "account"
    account.mkdir()
    with containerd(folder) as cri, ApiServer(account) as api:
        chain = {
            "cniVersion": "1.0.0",
            "name": "cluster",
            "plugins": [{"type": "ptp", "ipam": {"type": "host-local", "subnet": "10.88.0.0/24"}}],
        }
        (cri.root / "etc/cni/net.d/10-cluster.conflist").write_text(json.dumps(chain))
        found = _contents(cri)
        cri.import_image(ARCHIVE, "localhost/extbridge:latest")
        networks = the("ConfigMap", manifests)
        config_maps = {networks["metadata"]["name"]: networks["data"]}
        kubelet = Kubelet(cri, folder / "pods", api, config_maps)
        yield Node(cri, kubelet, Agent(kubelet, the("DaemonSet", manifests)), found)


def _overlay(folder: Path, deployed: str, nic: str = "") -> Path:
    """A kustomization of deploy/ or a part of it, as a user makes one for his cluster."""
    folder.mkdir()
    # Said in full, a base is taken for a file.
    base = os.path.relpath(DEPLOY / deployed, folder)
    kustomization = {
        "resources": [base],
        "images": [{"name": "extbridge", "newName": "localhost/extbridge", "newTag": "latest"}],
    }
    if nic:
        definition: Manifest = {"extbridge": {"mode": "vepa", "dev": nic}}
        networks = {"vepanet": definition, "vmnet": {**definition, "handoff": "device"}}
        change = {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": "extbridge-networks", "namespace": "extbridge"},
            "data": {f"{name}.yaml": yaml.safe_dump(it) for name, it in networks.items()},
        }
        kustomization["patches"] = [{"patch": yaml.safe_dump(change)}]
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return folder


def _contents(cri: Containerd) -> Mapping[str, object]:
    """All that is in the node's folders that are extbridge's or have something of it."""
    found: dict[str, object] = {}
    for name in _FOLDERS:
        for path in (cri.root / name, *(cri.root / name).rglob("*")):
            if path.is_symlink() or path.exists():
                status = path.lstat()
                said = path.read_bytes() if stat.S_ISREG(status.st_mode) else b""
                key = str(path.relative_to(cri.root))
                found[key] = (status.st_mode, status.st_uid, status.st_gid, said)
    return found


def _vm_pod(name: str, *command: str, example: str = "vm") -> Manifest:
    """The example's pod, with this command."""
    pod: Manifest = yaml.safe_load((DEPLOY / f"examples/{example}.yaml").read_text())
    pod["metadata"]["name"] = name
    pod["spec"]["containers"][0] |= {"image": IMAGE, "args": list(command)}
    return pod


def _holding_pod(name: str, example: str = "vm", ifname: str = "macvtap0") -> Manifest:
    """The same without QEMU: a process that has the tap, and soon ends when it is told to."""
    # A command with a placeholder gets no options of QEMU's.
    script = "trap exit TERM; sleep 1000 & wait"
    return _vm_pod(name, "busybox", "sh", "-c", script, f"{{{ifname}.fd}}", example=example)


def _plain_pod(name: str, annotations: Mapping[str, str]) -> Manifest:
    """A pod that is no VM."""
    container = {"name": "main", "image": IMAGE, "command": ["busybox", "sleep", "1000"]}
    metadata = {"name": name, "namespace": "default", "annotations": annotations}
    return {"metadata": metadata, "spec": {"containers": [container]}}


@contextmanager
def _pod(node: Node, manifest: Manifest) -> Iterator[RunningPod]:
    """The pod, running; after the block it is stopped and removed, and its taps are gone."""
    running = node.kubelet.run(manifest)
    try:
        yield running
    finally:
        taps = [Path(f"/dev/tap{entry.ifindex}") for entry in node.entries(running.pod)]
        node.kubelet.detach(running)
        node.cri.remove_pod(running.pod)
        until(lambda: not any(tap.exists() for tap in taps))


@contextmanager
def _vm(node: Node, name: str, address: str) -> Iterator[Vm]:
    """A VM of that name, booting; stopped and removed with its pod."""
    with ExitStack() as closing:
        # QEMU waits until somebody listens.
        command = qemu_command(KERNEL, INITRAMFS, serial="unix:/tmp/console,server=on")
        running = closing.enter_context(_pod(node, _vm_pod(name, *command)))
        pid = node.holder(running.pod)
        serial = until(lambda: _connect(str(node.process(pid) / "root/tmp/console")))
        console = closing.enter_context(Console(name, serial, addresses=[f"{address}/24"]))
        yield Vm(running.pod, running.containers["qemu"].id, pid, console, address)


@contextmanager
def _no_ping_is_lost(site: Site) -> Iterator[None]:
    """VM a has an answer of VM b to every ping, before, in and after the block."""
    console = site.a.console
    console.run(f"ping -i 0.1 {site.b.address} >/tmp/pings & echo $! >/tmp/pinging")

    def answered(at_least: int) -> int:
        number = int(console.run("grep -c seq= /tmp/pings").output)
        return number if number >= at_least else 0

    until(lambda: answered(3))
    yield
    until_now = answered(1)
    until(lambda: answered(until_now + 3))
    said = console.run("kill -INT $(cat /tmp/pinging); cat /tmp/pings").output
    sequence = [int(number) for number in re.findall(r"seq=(\d+)", said)]
    assert sequence == list(range(len(sequence)))


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
    refused = node.cri.execute(vm.container, _LAUNCHER, "busybox", "true")
    assert refused.status == 125
    assert f"held by process {vm.pid}" in refused.stderr


def _taps(node: Node, running: RunningPod) -> list[str]:
    """The nodes of taps in the VM's container."""
    container = running.containers["qemu"].id
    return node.cri.execute(container, "busybox", "find", "/dev", "-name", "tap*").stdout.split()


def _links(shown: Executed) -> list[str]:
    assert shown.status == 0, shown.stderr
    return sorted(re.findall(r"^\d+: ([^:@]+)", shown.stdout, re.MULTILINE))
