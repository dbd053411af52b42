"""`extbridge doctor`: what is wrong on a node is named, with what to do about it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from extbridge.demo.lab import Lab, Nic, run
from extbridge.node.install import LAUNCHER, SHIM
from tests.kernel.agents import Agent, Launcher
from tests.kernel.observe import ledger_of, link_names, make_macvtap, network_config
from tests.support import Cni, executable

CHAIN = {
    "cniVersion": "1.0.0",
    "name": "cluster",
    "plugins": [{"type": "bridge"}, {"type": "extbridge"}],
}


@dataclass(frozen=True, slots=True)
class Told:
    """What doctor said: its exit status, and of each subject the findings."""

    status: int
    findings: list[dict[str, str]]

    def of(self, subject: str) -> list[tuple[str, str]]:
        """Level and words of what was found of subjects that begin with these words."""
        longer = (f"{subject} ", f"{subject},")
        return [
            (it["level"], it["what"])
            for it in self.findings
            if it["subject"] == subject or it["subject"].startswith(longer)
        ]

    @property
    def failures(self) -> list[str]:
        """All that failed."""
        return [f"{it['subject']}: {it['what']}" for it in self.findings if it["level"] == FAILURE]


LIMIT = {"egressRate": 10**7, "egressBurst": 10**6}

OK, WARNING, FAILURE = "ok", "warning", "failure"

NO_JSON = "line 1, column 2: Expecting property name enclosed in double quotes"


@dataclass(frozen=True, slots=True)
class Node:
    """The folders of a node, each the test's own."""

    run: Path
    networks: Path
    bin_dir: Path
    conf_dir: Path

    def define(self, nic: Nic | str, name: str = "vepanet", /, **keys: object) -> None:
        """Define a network on the NIC."""
        device = nic.name if isinstance(nic, Nic) else nic
        self.define_on(device, name, **keys)

    def define_on(self, dev: object, name: str = "vepanet", /, **keys: object) -> None:
        """Define a network on what `dev` says."""
        definition = {"name": name, "extbridge": {"mode": "vepa", "dev": dev}, **keys}
        (self.networks / f"{name}.json").write_text(json.dumps(definition), encoding="utf-8")

    def command(self, *options: str) -> tuple[str, ...]:
        """The command that looks at all of it."""
        return (
            executable("extbridge"), "doctor", "--run-dir", str(self.run),
            "--networks-dir", str(self.networks), "--bin-dir", str(self.bin_dir),
            "--conf-dir", str(self.conf_dir), *options,
        )  # fmt: skip

    def doctor(self, *options: str, wrapper: tuple[str, ...] = ()) -> Told:
        """What it says; never a traceback, and of what is not well always what to do."""
        done = subprocess.run(
            (*wrapper, *self.command("-o", "json", *options)), capture_output=True, check=False
        )
        assert done.stderr == b""
        told = json.loads(done.stdout)
        assert all(it["level"] == OK or it["todo"] for it in told["findings"])
        assert done.returncode == (told["count"][FAILURE] > 0)
        return Told(done.returncode, told["findings"])


@pytest.fixture
def node(run_dir: Path, tmp_path: Path, bin_dir: Path) -> Node:
    """A node with shim, configuration and no networks."""
    folders = [tmp_path / name for name in ("networks", "bin", "conf")]
    for folder in folders:
        folder.mkdir()
    for name in (SHIM, LAUNCHER):
        shutil.copy2(bin_dir / name, folders[1])
    (folders[2] / "10-cluster.conflist").write_text(json.dumps(CHAIN), encoding="utf-8")
    return Node(run_dir, *folders)


def test_healthy_node_has_no_failure(
    node: Node, agent: Agent, shim: Cni, nic: Nic, pod: str
) -> None:
    """On a node where all is well there is no failure, and all that was tried is gone again."""
    node.define(nic, mtu=1500, bandwidth=LIMIT)
    shim("ADD", network_config(nic), NETNS=pod)
    before = link_names()
    told = node.doctor()
    assert told.failures == []
    assert told.status == 0
    assert [level for level, _ in told.of("kernel:")[:7]] == [OK] * 7
    assert told.of("network vepanet")[0] == (OK, "up, with carrier, MTU 1500")
    assert told.of("agent") == [(OK, "answers STATUS")]
    assert told.of("last ADD")[0][0] == OK
    assert told.of("ledger") == [(OK, "all 1 attachments are as they were made")]
    assert link_names() == before
    assert agent.metrics()["extbridge_refusals_total"] == 0


def test_each_line_says_how_it_is_and_what_to_do(node: Node) -> None:
    """A person reads one line a finding, and under what is not well what to do about it."""
    done = subprocess.run(node.command(), capture_output=True, check=False, text=True)
    assert done.returncode == 1
    *lines, summary = done.stdout.splitlines()
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        assert line.startswith(("ok       ", "warning  ", "failure  ", "         to do: "))
        assert line.startswith((WARNING, FAILURE)) == following.startswith("         to do: ")
    assert summary.split(", ")[2].endswith(" failure")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("ip link set {nic} down", "extbridge.dev: {nic} is down"),
        ("ip link set {nic} mtu 1400", "mtu: 1500 is more than the 1400 of {nic}"),
        (
            "ip link add xbbr type bridge; ip link set {nic} master xbbr",
            "extbridge.dev: {nic} is a port of bridge xbbr; name that one, or free the NIC",
        ),
        ("ip -n {switch} link set {port} down", "{nic} has no carrier"),
        ("ip link delete {nic}", "extbridge.dev: the node has no NIC '{nic}'"),
    ],
)
def test_unfit_nic_is_a_failure(node: Node, lab: Lab, nic: Nic, change: str, told: str) -> None:
    """A NIC that cannot carry its network is named, with the reason."""
    node.define(nic, mtu=1500)
    names = {"nic": nic.name, "port": nic.port, "switch": os.path.basename(lab.switch)}
    try:
        run("sh", "-ec", change.format(**names))
        found = node.doctor().of("network vepanet")
    finally:
        run("sh", "-c", "ip link delete xbbr 2>/dev/null || true")
    assert found == [(FAILURE, told.format(**names))]


def test_pool_with_one_good_nic_only_warns(node: Node, lab: Lab) -> None:
    """Of a pool, one NIC that works is enough; what the others lack is told."""
    good, down = lab.nic(), lab.nic()
    run("ip", "link", "set", down.name, "down")
    node.define_on([good.name, down.name, "eth77"])
    found = node.doctor().of("network vepanet")
    assert found == [
        (WARNING, "extbridge.dev: the node has no NIC 'eth77'"),
        (OK, "up, with carrier, MTU 1500"),
        (WARNING, f"extbridge.dev: {down.name} is down"),
    ]


def test_taken_passthru_nic_is_no_failure(node: Node, cni: Cni, nic: Nic, pod: str) -> None:
    """That a passthru NIC has its VM is how it is meant to be, and so is its promiscuity."""
    node.define_on(nic.name, extbridge={"mode": "passthru", "dev": [nic.name]})
    cni("ADD", network_config(nic, "passthru"), NETNS=pod)
    told = node.doctor()
    [(level, what)] = told.of("network vepanet")
    assert (level, what.startswith(f"{nic.name} is taken by net1 (passthru)")) == (WARNING, True)
    assert told.of(f"NIC {nic.name}")[-1][0] == OK


def test_promiscuous_nic_is_a_warning(node: Node, nic: Nic) -> None:
    """A NIC that hears every frame is told, with how many filters it has set."""
    node.define(nic)
    assert node.doctor().of(f"NIC {nic.name}")[0][0] == OK
    run("ip", "link", "set", nic.name, "promisc", "on")
    run("ip", "maddress", "add", "33:33:00:00:12:34", "dev", nic.name)
    run("bridge", "fdb", "add", "02:00:00:00:12:34", "dev", nic.name, "self")
    level, what = node.doctor().of(f"NIC {nic.name}")[0]
    assert level == WARNING
    groups = len(run("ip", "maddress", "show", "dev", nic.name).split("link ")) - 1
    assert f"its filters hold 1 MACs besides its own and {groups} groups" in what


def test_broken_definition_is_a_failure(node: Node) -> None:
    """A definition that no ADD could use is told as ADD would tell it."""
    node.define("eth0", extbridge={"mode": "vepaa", "dev": "eth0"})
    [(level, what)] = node.doctor().of("network vepanet")
    assert level == FAILURE
    assert "extbridge.mode" in what


def test_entry_without_link_is_a_failure(node: Node, cni: Cni, nic: Nic, pod: str) -> None:
    """An attachment in the ledger whose link is gone is told."""
    cni("ADD", network_config(nic), NETNS=pod)
    run("ip", "link", "delete", "net1", netns=pod)
    told = node.doctor()
    assert told.of("net1 of container-1") == [
        (FAILURE, "is in the ledger, and its link is gone: its NIC or its namespace went first")
    ]
    assert told.of("ledger") == []


def test_trace_of_a_killed_add_is_a_warning(node: Node, cni: Cni, nic: Nic, pod: str) -> None:
    """What an ADD has left that was killed is told, whether its link had been made or not."""
    cni("ADD", network_config(nic), NETNS=pod)
    entry = node.run / "ledger" / "container-1" / "net1.json"
    entry.rename(entry.with_suffix(".intent"))
    [(level, what)] = node.doctor().of("net1 of container-1")
    assert (level, what.startswith("is half made")) == (WARNING, True)
    run("ip", "link", "delete", "net1", netns=pod)
    [(level, what)] = node.doctor().of("net1 of container-1")
    assert (level, what.startswith("is the trace")) == (WARNING, True)


def test_holder_that_has_ended_is_a_warning(
    node: Node, agent: Agent, shim: Cni, launcher: Launcher, lab: Lab
) -> None:
    """A tap that a process holds which has ended is told; only the agent being away lets it be."""
    nic, pod = lab.nic(), lab.pod("vm")
    shim("ADD", network_config(nic), NETNS=pod)
    with launcher.holding(pod) as pid:
        assert node.doctor().of("net1 of container-1") == []
        agent.kill()
    assert node.doctor().of("net1 of container-1") == [
        (WARNING, f"process {pid}, which had its tap, has ended and holds it still")
    ]


def test_link_without_entry_is_a_failure(node: Node, cni: Cni, nic: Nic, pod: str) -> None:
    """A macvtap of extbridge's that the ledger has forgotten is told, with where it is."""
    cni("ADD", network_config(nic), NETNS=pod)
    shutil.rmtree(node.run / "ledger")
    make_macvtap(nic, "foreign", pod, "02:00:00:00:00:77")
    [(level, what)] = node.doctor().of(f"net1 in {pod}")
    assert level == FAILURE
    assert "that the ledger does not know" in what
    assert node.doctor().of("foreign") == []


@pytest.mark.parametrize("seen", [True, False])
def test_attachment_without_namespace_is_a_failure(
    node: Node, cni: Cni, nic: Nic, pod: str, *, seen: bool
) -> None:
    """An attachment whose namespace has lost its path is told, and of an orphan who keeps it."""
    cni("ADD", network_config(nic), NETNS=pod)
    with subprocess.Popen(
        ("nsenter", f"--net={pod}", "sh", "-c", "echo; read -r _"),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as keeper:  # fmt: skip
        assert keeper.stdout is not None
        keeper.stdout.readline()
        run("ip", "netns", "delete", os.path.basename(pod))
        if not seen:
            shutil.rmtree(node.run / "ledger")
        told = node.doctor()
        keeper.communicate(b"\n")
    subject = "net1 of container-1" if seen else f"net1 in /proc/{keeper.pid}/ns/net"
    [(level, what)] = told.of(subject)
    assert level == FAILURE
    if seen:
        assert what == f"its link is there, but its namespace is not at {pod}"


def test_changed_attachment_is_a_failure(node: Node, cni: Cni, nic: Nic, pod: str) -> None:
    """What CHECK would refuse is told, without anybody having to ask."""
    cni("ADD", network_config(nic), NETNS=pod)
    run("ip", "link", "set", "net1", "down", netns=pod)
    assert node.doctor().of("net1 of container-1") == [
        (FAILURE, "state is 'down', ADD made it 'up'")
    ]


def test_stale_spool_is_a_failure(node: Node) -> None:
    """A DEL that waits for hours is told; one that has just come is no failure."""
    spool = node.run / "spool"
    spool.mkdir(parents=True)
    waiting = spool / "1-2"
    waiting.write_bytes(b"xb\x02")
    assert node.doctor().of("spool")[0][0] == WARNING
    before = time.time() - 3 * 3600
    os.utime(waiting, (before, before))
    assert node.doctor().of("spool") == [(FAILURE, "1 DELs wait, the oldest for 3 h")]


def test_agent_that_is_away_is_a_failure(node: Node, agent: Agent) -> None:
    """An agent that has ended is missed, though its sockets are there."""
    agent.stop()
    told = node.doctor()
    [(level, what)] = told.of("agent")
    assert level == FAILURE
    assert "Connection refused" in what
    assert told.of("run folder")[0][0] == OK


def test_agent_that_hangs_is_a_failure(node: Node) -> None:
    """An agent that takes connections and answers nobody is told, in a bounded time."""
    node.run.mkdir()
    with socket.socket(socket.AF_UNIX) as hanging:
        hanging.bind(str(node.run / "cni.sock"))
        hanging.listen()
        [(level, what)] = node.doctor().of("agent")
    assert level == FAILURE
    assert what.endswith("no frame in 5 s")


def test_doctor_in_another_namespace_is_told_so(node: Node, agent: Agent, pod: str) -> None:
    """Who asks from a namespace that the agent does not answer is told where to ask."""
    told = node.doctor(wrapper=("nsenter", f"--net={pod}"))
    assert told.of("agent") == [(FAILURE, "it hangs up on who asks from here")]
    agent.counts({"refusals_total{reason=caller}": 1})


@pytest.mark.parametrize("name", ["", "pod", "cni.sock", "pod/tap.sock", "metrics.sock"])
def test_changed_modes_are_a_failure(node: Node, agent: Agent, name: str) -> None:
    """A socket or a folder that is for others than it should be is told."""
    path = agent.run_dir / name
    before = path.stat().st_mode
    path.chmod(0o707)
    found = node.doctor().of("run folder")
    path.chmod(before)
    assert [level for level, _ in found] == [FAILURE]
    assert f"{path} has mode 0707" in found[0][1]


def test_failing_adds_are_a_warning(
    node: Node, agent: Agent, shim: Cni, nic: Nic, pod: str
) -> None:
    """That the last ADD failed is told, until one succeeds."""
    assert node.doctor().of("last ADD") == [(OK, "none since the agent started")]
    assert shim("ADD", network_config(nic, "vepaa"), NETNS=pod).status
    agent.counts({"requests_total{code=7,verb=ADD}": 1})
    [(level, what)] = node.doctor().of("last ADD")
    assert (level, what.startswith("failed ")) == (WARNING, True)
    assert shim("ADD", network_config(nic), NETNS=pod).result
    agent.counts({"requests_total{code=0,verb=ADD}": 1})
    assert node.doctor().of("last ADD")[0][0] == OK


def _append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"another version")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_append, "is of another version than this program"),
        (Path.unlink, "No such file or directory"),
        (lambda path: path.write_text("#!/bin/sh\n", encoding="utf-8"), "is not extbridge's"),
        (lambda path: path.chmod(0o644), "cannot be executed"),
    ],
)
@pytest.mark.parametrize("which", [SHIM, LAUNCHER, "the agent's"])
def test_other_executables_are_a_failure(
    node: Node, agent: Agent, change: Callable[[Path], object], told: str, which: str
) -> None:
    """A shim or launcher that is not this version's is told, and so is the agent's own."""
    path = node.bin_dir / which
    if which == "the agent's":
        path = agent.run_dir / "pod" / LAUNCHER
    change(path)
    assert node.doctor().of(str(path)) == [(FAILURE, told)]


def _list(*types: str) -> str:
    return json.dumps({**CHAIN, "plugins": [{"type": it} for it in types]})


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, [(FAILURE, "there is none")]),
        ({"10-a.conflist": _list("bridge")},
         [(FAILURE, "the runtime takes 10-a.conflist, and none names extbridge")]),
        ({"10-a.conflist": _list("bridge"), "20-b.conflist": _list("bridge", "extbridge")},
         [(FAILURE, "the runtime takes 10-a.conflist, which comes before 20-b.conflist")]),
        ({"10-a.conflist": _list("bridge", "extbridge", "portmap")},
         [(WARNING, "in 10-a.conflist extbridge stands before portmap")]),
        ({"10-a.conflist": _list("extbridge"), "10-a.conflist.extbridge-backup": ""},
         [(OK, "the runtime takes 10-a.conflist, where extbridge stands first")]),
        ({"00-multus.conf": json.dumps({"type": "multus"}), "20-b.conflist": _list("extbridge")},
         [(OK, "the runtime takes 00-multus.conf, and Multus calls extbridge")]),
        ({"10-a.conflist": "{", "20-b.conflist": _list("bridge", "extbridge")},
         [(FAILURE, f"10-a.conflist: {NO_JSON}"),
          (FAILURE, "the runtime takes 10-a.conflist, which comes before 20-b.conflist")]),
    ],
)  # fmt: skip
def test_order_of_configurations(
    node: Node, files: dict[str, str], expected: list[tuple[str, str]]
) -> None:
    """What keeps a runtime from calling extbridge is told: no configuration, or another first."""
    for path in node.conf_dir.iterdir():
        path.unlink()
    for name, content in files.items():
        (node.conf_dir / name).write_text(content, encoding="utf-8")
    assert node.doctor().of("configurations") == expected


@pytest.fixture
def kubelet(tmp_path: Path) -> Iterator[Path]:
    """The folder for device plugins, with kubelet, one plugin, and what kubelet knows."""
    folder = tmp_path / "device-plugins"
    folder.mkdir()
    with socket.socket(socket.AF_UNIX) as kubelet, socket.socket(socket.AF_UNIX) as plugin:
        for listening, name in ((kubelet, "kubelet.sock"), (plugin, "extbridge-vepanet.sock")):
            listening.bind(str(folder / name))
            listening.listen()
        yield folder


def test_devices_that_kubelet_does_not_know_are_a_failure(node: Node, kubelet: Path) -> None:
    """Each network is looked for among the resources that are offered and that kubelet knows."""
    for name in ("vepanet", "other"):
        node.define("eth0", name)

    def doctor() -> list[tuple[str, str]]:
        return node.doctor("--device-plugins", str(kubelet)).of("resource")

    checkpoint = kubelet / "kubelet_internal_checkpoint"
    other = (FAILURE, "nobody offers it: No such file or directory")
    assert doctor() == [other, (OK, "offered")]
    known = {"Data": {"RegisteredDevices": {"extbridge.io/vepanet": ["1"]}}, "Checksum": 1}
    checkpoint.write_text(json.dumps(known), encoding="utf-8")
    assert doctor() == [other, (OK, "offered, and known to kubelet")]
    checkpoint.write_text(json.dumps({"Data": {"RegisteredDevices": {}}}), encoding="utf-8")
    assert doctor() == [other, (FAILURE, "kubelet does not know it")]


@pytest.mark.parametrize(
    ("wrapper", "missing"),
    [
        # It may read: where the package is installed is not its concern.
        (("setpriv", "--reuid=65534", "--clear-groups", "--inh-caps=+dac_read_search",
          "--ambient-caps=+dac_read_search"), "CAP_NET_ADMIN, CAP_SYS_ADMIN, CAP_BPF"),
        (("setpriv", "--bounding-set=-sys_admin"), "CAP_SYS_ADMIN"),
    ],
)  # fmt: skip
def test_without_privilege_it_says_so(node: Node, wrapper: tuple[str, ...], missing: str) -> None:
    """Who has not the privileges to look is told which, and nothing is thrown at them."""
    told = node.doctor(wrapper=wrapper)
    assert (FAILURE, f"without {missing}") in told.of("permissions")
    assert told.status == 1


def test_whatever_is_broken_there_is_no_traceback(node: Node) -> None:
    """Rubbish in every place that is looked at is told, and the rest is looked at all the same."""
    container = node.run / "ledger" / "container-1"
    container.mkdir(parents=True)
    (container / "net1.json").write_bytes(b"\xff{")
    (container / "net2.json").write_text("[" * 100_000, encoding="utf-8")
    (node.run / "cni.sock").write_bytes(b"")
    (node.run / "spool").write_bytes(b"")
    (node.networks / "vepanet.yaml").write_bytes(b"\xff\xfe\0")
    (node.networks / "loop.json").symlink_to("loop.json")
    os.mkfifo(node.networks / "fifo.json")
    os.mkfifo(node.conf_dir / "00-fifo.conflist")
    (node.conf_dir / "01.conflist").write_text("[" * 100_000, encoding="utf-8")
    (node.conf_dir / "02.conflist").write_bytes(b"\xff")
    (node.conf_dir / "03.conflist").write_text('{"plugins": [7]}', encoding="utf-8")
    (node.bin_dir / SHIM).unlink()
    (node.bin_dir / SHIM).mkdir()
    told = node.doctor("--device-plugins", str(node.networks / "vepanet.yaml"))
    assert len(told.of("ledger")) == 3
    assert told.of("network")
    assert told.of("configurations")
    assert ledger_of(node.run) == [
        "container-1", "container-1/net1.json", "container-1/net2.json"
    ]  # fmt: skip


def test_another_nodes_macvtaps_are_no_concern(node: Node, cni: Cni, lab: Lab) -> None:
    """Where a machine has several nodes, each in a namespace, doctor speaks of its own alone."""
    nic, pod, other = lab.nic(), lab.pod("vm"), lab.pod("other")
    assert cni("ADD", network_config(nic), NETNS=pod).result
    shutil.rmtree(node.run / "ledger")
    run("ip", "link", "set", "lo", "up", netns=other)
    there = node.doctor(wrapper=("nsenter", f"--net={other}"))
    assert there.of(f"net1 in {pod}") == []
    assert node.doctor().of(f"net1 in {pod}")[0][0] == FAILURE
