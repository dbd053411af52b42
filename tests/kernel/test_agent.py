"""The agent answers the runtime as `extbridge-cni` does, and its restarts are not seen."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from extbridge.demo.lab import Lab, Nic, run
from extbridge.ledger import Ledger
from extbridge.node import wire
from tests.kernel.agents import Agent, Launcher, answer_on, ask, connected, until
from tests.kernel.observe import ledger_of, leftovers, macvtaps, network_config, show_link
from tests.support import Answer, Cni, executable

PROTOCOL = Path(__file__).parents[2] / "docs/protocol.md"

MAC = "52:54:00:00:00:01"
NO_ATTACHMENT: Mapping[str, None] = {"CONTAINERID": None, "IFNAME": None}
NOWHERE: Mapping[str, object] = {"extbridge": {"dev": "nope"}}

# Its own mounts, and in them no folder of namespaces: what an agent's container sees of the host.
WITHOUT_NETNS_FOLDER = (
    "unshare", "--mount", "sh", "-c",
    'mount -t tmpfs extbridge-test /run/netns && exec "$@"', "sh",
)  # fmt: skip

# Puts the fds of its first argument where systemd puts them, and becomes the command behind it
# (sd_listen_fds(3)).
AS_SYSTEMD = """
import os, sys
held = sys.argv[1].split(",")
for number, fd in enumerate(held, 3):
    os.dup2(int(fd), number)
os.environ |= {"LISTEN_FDS": str(len(held)), "LISTEN_PID": str(os.getpid())}
os.execvp(sys.argv[2], sys.argv[2:])
"""


# The six verbs.


def test_answers_are_those_of_the_executable(
    cni: Cni, shim: Cni, agent: Agent, nic: Nic, pod: str
) -> None:
    """Whether a runtime runs shim or `extbridge-cni`, it gets the same answers."""

    def answers(plugin: Cni) -> Iterator[tuple[str, Answer]]:
        config = network_config(nic, mac=MAC)
        added = plugin("ADD", config, NETNS=pod)
        checked = {**config, "prevResult": added.stdout}
        yield "ADD", added
        yield "ADD again", plugin("ADD", config, NETNS=pod)
        yield "CHECK", plugin("CHECK", checked, NETNS=pod)
        yield "CHECK elsewhere", plugin("CHECK", checked, NETNS="/proc/self/ns/net")
        yield "CHECK of nothing", plugin("CHECK", config, NETNS=pod)
        yield "GC of nothing", plugin("GC", config, **NO_ATTACHMENT)
        yield "STATUS", plugin("STATUS", config, **NO_ATTACHMENT)
        yield "STATUS, no NIC", plugin("STATUS", {**config, **NOWHERE}, **NO_ATTACHMENT)
        yield "VERSION", plugin("VERSION", {"cniVersion": "1.1.0"}, **NO_ATTACHMENT)
        yield "typo", plugin("ADD", {**config, "mtuu": 1}, NETNS=pod)
        yield "no JSON", plugin("ADD", b'{"name": ', NETNS=pod)
        yield "no verb", plugin("ADDD", config, NETNS=pod)
        yield "no namespace", plugin("ADD", config, CONTAINERID="c2", NETNS="/nope")
        yield "no namespace there", plugin("ADD", config, CONTAINERID="c2", NETNS="/dev/null")
        yield "DEL", plugin("DEL", checked, NETNS=pod)
        yield "DEL again", plugin("DEL", config, NETNS="")
        yield "CHECK after DEL", plugin("CHECK", checked, NETNS=pod)
        yield "ADD anew", plugin("ADD", config, NETNS=pod)
        yield "GC", plugin("GC", {**config, "cni.dev/valid-attachments": []}, **NO_ATTACHMENT)
        assert leftovers(pod, plugin.run_dir) == []

    for (what, expected), (_, answer) in zip(list(answers(cni)), answers(shim), strict=True):
        assert without_request(answer) == expected, what
    agent.counts({"requests_total{code=0,verb=ADD}": 2})


def test_namespace_is_reached_without_its_path(agent: Agent, shim: Cni, nic: Nic, pod: str) -> None:
    """An agent in a container needs no view of the host's namespaces: the shim brings them."""
    agent.stop()
    agent.wrapper = WITHOUT_NETNS_FOLDER
    agent.start()
    assert not os.path.exists(f"/proc/{agent.pid}/root{pod}")
    config = network_config(nic)
    added = shim("ADD", config, NETNS=pod).result
    assert [it["sandbox"] for it in added["interfaces"]] == [pod]  # type: ignore[attr-defined]
    assert shim("CHECK", {**config, "prevResult": added}, NETNS=pod).status == 0
    assert shim("DEL", config, NETNS=pod).status == 0
    assert leftovers(pod, agent.run_dir) == []


def test_repeated_requests_cost_nothing(agent: Agent, shim: Cni, nic: Nic, pod: str) -> None:
    """Hundreds of attachments come and go, and the agent's fds, threads and memory stay."""
    config = network_config(nic)

    def add_and_delete(times: int) -> None:
        for verb in ("ADD", "DEL") * times:
            with connected(agent.run_dir / "cni.sock") as connection:
                ask(connection, shim.environment(verb, NETNS=pod), config, netns=pod)
                answer = answer_on(connection)
            assert answer.status == 0, answer

    add_and_delete(20)
    fds, threads, resident = agent.settled_fds(), len(agent.threads), agent.resident_kib
    add_and_delete(200)
    # DEL leaves the closing of a socket to a thread of its own.
    until(lambda: agent.fds <= fds and len(agent.threads) <= threads)
    assert agent.resident_kib < resident + 2048
    assert leftovers(pod, agent.run_dir) == []


# Its life.


def test_files_have_the_protocols_modes(agent: Agent, shim: Cni, nic: Nic, pod: str) -> None:
    """Whatever the umask, files and folders are those of docs/protocol.md, with these modes."""
    documented = {
        path: int(mode, 8)
        for path, mode in re.findall(r"\| `([^`]+)` \| (0\d{3}) \|", PROTOCOL.read_text())
    }
    for mask in (0, 0o077):
        agent.stop()
        run("rm", "-r", str(agent.run_dir))
        if mask == 0:
            # As kubelet makes what a pod mounts.
            agent.run_dir.mkdir()
            agent.run_dir.chmod(0o755)
        former = os.umask(mask)
        try:
            agent.start()
            assert shim("ADD", network_config(nic), NETNS=pod).status == 0
        finally:
            os.umask(former)
        modes = {path: (agent.run_dir / path).stat().st_mode & 0o7777 for path in documented}
        assert modes == documented
        there = [*agent.run_dir.glob("*"), *agent.run_dir.glob("pod/*")]
        assert {agent.run_dir / path for path in documented} == {agent.run_dir, *there}
        assert shim("DEL", network_config(nic), NETNS=pod).status == 0


def test_containers_under_selinux_may_use_what_they_mount(agent: Agent) -> None:
    """What pods mount has the type of containers' files, and what they must not see has not."""
    pod = agent.run_dir / "pod"
    for path in (pod, pod / "tap.sock", pod / "extbridge-exec"):
        assert b":container_file_t:" in os.getxattr(path, "security.selinux")
    for path in (agent.run_dir, agent.run_dir / "cni.sock"):
        if "security.selinux" in os.listxattr(path):
            assert b":container_file_t:" not in os.getxattr(path, "security.selinux")


def test_what_a_killed_agent_left_is_replaced(agent: Agent, shim: Cni, nic: Nic) -> None:
    """Sockets of an agent that was killed, bound or half made, do not keep the next from serving.

    Nor does it leave any moment without a socket at the path.
    """
    agent.kill()
    with socket.socket(socket.AF_UNIX) as half_made:
        half_made.bind(str(agent.run_dir / "cni.new"))
    former = (agent.run_dir / "cni.sock").stat().st_ino
    agent.start()
    assert (agent.run_dir / "cni.sock").stat().st_ino != former
    assert not (agent.run_dir / "cni.new").exists()
    assert shim("STATUS", network_config(nic), **NO_ATTACHMENT).status == 0


def test_agent_without_root_says_so(tmp_path: Path) -> None:
    """An agent that could do nothing does not pretend to serve."""
    command = (executable("extbridge"), "agent", "--run-dir", str(tmp_path / "mine"))
    # It may read everything, so that where interpreter and package are does not matter.
    reading = "-all,+dac_read_search"
    nobody = ("setpriv", "--reuid=65534", "--clear-groups", f"--inh-caps={reading}",
              f"--ambient-caps={reading}")  # fmt: skip
    done = subprocess.run((*nobody, *command), capture_output=True, text=True, check=False)
    assert (done.returncode, "the agent is not root" in done.stderr) == (1, True)
    assert not (tmp_path / "mine").exists()


def test_folder_has_one_agent(agent: Agent, tmp_path: Path) -> None:
    """A second agent for the same folder says so and ends; the first serves on."""
    second = Agent(agent.run_dir, tmp_path / "second.log")
    second.begin()
    second.end(1)
    assert "another agent" in second.log
    agent.counts({"attachments": 0})


def test_stop_finishes_what_was_begun(
    agent: Agent, shim: Cni, launcher: Launcher, nic: Nic, lab: Lab
) -> None:
    """SIGTERM lets requests in flight end well; who comes later is told to try again.

    But DELs, which runtimes do not repeat, are served, and launchers wait for the next agent.
    """
    config = network_config(nic)
    pod, other, last = (lab.pod(name) for name in ("one", "other", "last"))
    assert shim("ADD", network_config(nic, mac=MAC), NETNS=other, CONTAINERID="c2").status == 0
    assert shim("ADD", config, NETNS=last, CONTAINERID="c3").status == 0
    with connected(agent.run_dir / "cni.sock") as begun:
        with Ledger(agent.run_dir).hold("container-1"):
            ask(begun, shim.environment("ADD", NETNS=pod), config, netns=pod)
            until(lambda: is_waiting_for_lock(agent))
            os.kill(agent.pid, signal.SIGTERM)
            until(lambda: "draining" in agent.log)
            assert shim("ADD", config, NETNS=other, IFNAME="net2").error["code"] == 11
            assert shim("STATUS", config, **NO_ATTACHMENT).error["code"] == 50
            assert shim("DEL", config, NETNS=last, CONTAINERID="c3").status == 0
            assert macvtaps(last) == []
            launching = launcher.start(other, "echo", "{net1.mac}")
            until(lambda: has_socket(launching.pid))
        assert answer_on(begun).status == 0
    agent.end()
    assert (macvtaps(pod), macvtaps(other)) == (["net1"], ["net1"])
    agent.start()
    with launching:
        assert launching.communicate(timeout=30) == (f"{MAC}\n", "")


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_launchers_do_not_see_a_restart(
    agent: Agent, shim: Cni, launcher: Launcher, nic: Nic, lab: Lab, *, how: str
) -> None:
    """Who asks for its taps while the agent ends gets them from that one or from the next."""
    pods = [lab.pod(f"pod{number}") for number in range(8)]
    for pod in pods:
        added = shim("ADD", network_config(nic), NETNS=pod, CONTAINERID=Path(pod).name)
        assert added.status == 0
    with ExitStack() as closing:
        # So that some have connected, and said what they want, when it ends.
        os.kill(agent.pid, signal.SIGSTOP)
        launching = [
            closing.enter_context(launcher.start(pod, "echo", "{net1.queues}")) for pod in pods
        ]
        until(lambda: all(has_socket(process.pid) for process in launching))
        if how == "killed":
            agent.kill()
        else:
            os.kill(agent.pid, signal.SIGTERM)
            os.kill(agent.pid, signal.SIGCONT)
            agent.end()
        agent.start()
        for process in launching:
            assert process.communicate(timeout=30) == ("1\n", "")


def test_stop_does_not_wait_for_a_start(agent: Agent, shim: Cni, nic: Nic, lab: Lab) -> None:
    """An agent that is told to end while it sets things right leaves the rest to the next."""
    config = network_config(nic)
    pods = {f"c{number}": lab.pod(f"pod{number}") for number in range(2)}
    for container_id, pod in pods.items():
        assert shim("ADD", config, NETNS=pod, CONTAINERID=container_id).status == 0
    agent.kill()
    first, second = (
        spool(agent, name, shim.environment("DEL", NETNS=pod, CONTAINERID=name), config)
        for name, pod in pods.items()
    )
    with Ledger(agent.run_dir).hold("c0"):
        agent.begin()
        until(lambda: is_waiting_for_lock(agent))
        os.kill(agent.pid, signal.SIGTERM)
        # It has been told when it has begun to wait for nothing but the lock.
        until(lambda: "SigPnd:\t0000000000000000" in status_of(agent.pid))
    agent.end()
    assert (first.exists(), second.exists()) == (False, True)
    agent.start()
    assert [leftovers(pod, agent.run_dir) for pod in pods.values()] == [[], []]


def test_systemd_is_told(agent: Agent, tmp_path: Path) -> None:
    """Where systemd asks for it, it learns when the agent serves, and when it begins to stop."""
    agent.stop()
    name = f"extbridge-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(f"\0{name}")
        told.settimeout(30)
        agent.begin(NOTIFY_SOCKET=f"@{name}")
        assert told.recv(100) == b"READY=1"
        agent.counts({"leases": 0})
        agent.stop()
        assert told.recv(100) == b"STOPPING=1"
    # Where it has asked, and is gone.
    agent.begin(NOTIFY_SOCKET=str(tmp_path / "gone"))
    until(lambda: agent.log.count("serving") == 3)


def test_sockets_of_systemd_outlive_the_agent(
    agent: Agent, shim: Cni, launcher: Launcher, nic: Nic, pod: str
) -> None:
    """Where systemd holds the sockets, who asks while no agent runs is served by the next."""
    agent.stop()
    config = network_config(nic, mac=MAC)
    paths = [agent.run_dir / "cni.sock", agent.run_dir / "pod/tap.sock"]
    with ExitStack() as closing:
        held = []
        for path in paths:
            path.unlink()
            listening = closing.enter_context(socket.socket(socket.AF_UNIX))
            listening.bind(str(path))
            listening.listen()
            held.append(listening.fileno())
        inodes = [path.stat().st_ino for path in paths]
        agent.wrapper = (sys.executable, "-c", AS_SYSTEMD, ",".join(map(str, held)))
        asking = closing.enter_context(connected(paths[0]))
        ask(asking, shim.environment("ADD", NETNS=pod), config, netns=pod)
        agent.start(tuple(held))
        assert answer_on(asking).status == 0
        agent.kill()
        launching = closing.enter_context(launcher.start(pod, "echo", "{net1.mac}"))
        # It is not waited for: it need not have asked yet.
        agent.start(tuple(held))
        assert launching.communicate(timeout=30) == (f"{MAC}\n", "")
        assert [path.stat().st_ino for path in paths] == inodes
        assert shim("DEL", config, NETNS=pod).status == 0


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_restart_is_not_seen(agent: Agent, shim: Cni, nic: Nic, lab: Lab, how: str) -> None:
    """Of 50 ADDs while the agent restarts each succeeds, or is told to try again and then does."""
    config = network_config(nic)
    attachments = [
        {"NETNS": pod, "CONTAINERID": f"c{number}", "IFNAME": f"net{ifname}"}
        for number, pod in enumerate(lab.pod(f"pod{number}") for number in range(5))
        for ifname in range(10)
    ]
    with ExitStack() as closing:
        adding = [closing.enter_context(started(shim, "ADD", config, it)) for it in attachments]
        until(lambda: sum(process.poll() is not None for process in adding) > 5)
        if how == "stopped":
            agent.stop()
        else:
            agent.kill()
        agent.start()
        answers = [ended(process) for process in adding]
    again = [it for it, answer in zip(attachments, answers, strict=True) if answer.status]
    assert [it.stdout for it in answers if it.status and it.error["code"] != 11] == []
    for attachment in again:
        answer = shim("ADD", config, **attachment)
        # One that was made, and not told of: then the runtime asks for DEL first.
        if how == "killed" and answer.status and answer.error["code"] == 103:
            assert shim("DEL", config, **attachment).status == 0
            answer = shim("ADD", config, **attachment)
        assert answer.status == 0, answer
    for attachment in attachments:
        assert show_link(attachment["IFNAME"], attachment["NETNS"])["ifalias"].endswith(
            f"{attachment['CONTAINERID']}:{attachment['IFNAME']}"
        )
    with ExitStack() as closing:
        deleting = [closing.enter_context(started(shim, "DEL", config, it)) for it in attachments]
        assert [ended(process).status for process in deleting] == [0] * 50
    assert [leftovers(it["NETNS"], agent.run_dir) for it in attachments[::10]] == [[]] * 5


def test_definitions_are_read_anew(
    agent: Agent, shim: Cni, nic: Nic, pod: str, tmp_path: Path
) -> None:
    """A definition that changes is used at once; SIGHUP says which of them are good."""
    agent.stop()
    folder = tmp_path / "networks"
    folder.mkdir()
    agent.options = ("--networks-dir", str(folder))
    definition = f"extbridge: {{dev: {nic.name}}}\n"
    (folder / "blue.yaml").write_text(definition)
    agent.start()
    assert "network blue is defined" in agent.log
    config = {"cniVersion": "1.1.0", "name": "n", "type": "extbridge", "network": "blue"}
    assert shim("ADD", config, NETNS=pod).status == 0
    (folder / "blue.yaml").write_text(f"{definition}mtu: 1400\n")
    (folder / "red.json").write_text("{}")
    assert shim("ADD", config, NETNS=pod, IFNAME="net2").status == 0
    assert (show_link("net1", pod)["mtu"], show_link("net2", pod)["mtu"]) == (1500, 1400)
    os.kill(agent.pid, signal.SIGHUP)
    until(lambda: "error: network red: " in agent.log)
    assert agent.log.count("network blue is defined") == 2
    folder.rename(tmp_path / "away")
    folder.touch()
    os.kill(agent.pid, signal.SIGHUP)
    until(lambda: "error: networks: " in agent.log)
    for ifname in ("net1", "net2"):
        assert shim("DEL", config, NETNS=pod, IFNAME=ifname).status == 0
    assert leftovers(pod, agent.run_dir) == []


def test_log_is_one_json_object_a_line(
    agent: Agent, shim: Cni, launcher: Launcher, nic: Nic, pod: str
) -> None:
    """With --log-format json each line is an object, whatever names and requests come."""
    agent.stop()
    agent.options = ("--log-format", "json")
    former = len(agent.log)
    agent.start()
    config = network_config(nic, mac=MAC)
    assert shim("ADD", config, NETNS=pod).status == 0
    assert shim("ADD", config, NETNS=pod).error["code"] == 103
    assert shim("ADD", config, NETNS=pod, CONTAINERID='{"\n\udcff"}').error["code"] == 4
    assert launcher.printed(pod, "{net1.mac}") == [MAC]
    launcher.refusal(pod, EXTBRIDGE_IFNAMES='"}\n{"\udcff\x1b[2J')
    with connected(agent.run_dir / "cni.sock") as connection:
        connection.sendall(wire.frame_head(b""))
        assert connection.recv(1) == b""
    os.kill(agent.pid, signal.SIGHUP)
    assert shim("DEL", config, NETNS=pod).status == 0
    agent.stop()
    lines = [json.loads(line) for line in agent.log[former:].splitlines()]
    assert all({"time", "level", "message"} <= line.keys() for line in lines)
    assert {line["level"] for line in lines} == {"info", "warning"}
    (added,) = [line for line in lines if line["message"] == "ADD"]
    assert (added["container"], added["ifname"], added["code"]) == ("container-1", "net1", 0)


# The spool.


def test_dels_of_an_absent_agent_are_served_first(
    agent: Agent, shim: Cni, nic: Nic, pod: str
) -> None:
    """A pod that was deleted while no agent ran is cleaned up before the agent serves anything."""
    config = network_config(nic)
    added = shim("ADD", config, NETNS=pod).result
    agent.kill()
    assert shim("DEL", {**config, "prevResult": added}, NETNS=pod).status == 0
    (spooled,) = (agent.run_dir / "spool").iterdir()
    assert spooled.stat().st_mode & 0o777 == 0o600
    assert macvtaps(pod) == ["net1"]
    with Ledger(agent.run_dir).hold("container-1"):
        agent.begin()
        # The socket is there before the agent begins to replay; it waits for the lock.
        asking = until(lambda: accepted(agent.run_dir / "cni.sock"))
        with asking:
            ask(asking, shim.environment("VERSION"), config)
            asking.settimeout(0.3)
            with pytest.raises(TimeoutError):
                asking.recv(1)
            assert macvtaps(pod) == ["net1"]
            os.kill(agent.pid, 0)
    until(lambda: agent.log.count("serving") == 2)
    assert leftovers(pod, agent.run_dir) == []
    assert list(spooled.parent.iterdir()) == []
    agent.counts({"reconcile_repairs_total{kind=spool}": 1})
    assert shim("ADD", config, NETNS=pod).status == 0
    assert shim("DEL", config, NETNS=pod).status == 0


def test_dels_are_spooled_any_time(agent: Agent, shim: Cni, nic: Nic, pod: str) -> None:
    """A DEL that comes into the spool while the agent runs is served soon."""
    config = network_config(nic)
    assert shim("ADD", config, NETNS=pod).status == 0
    path = spool(agent, "1-1", shim.environment("DEL", NETNS=pod), config)
    until(lambda: not path.exists())
    assert leftovers(pod, agent.run_dir) == []
    agent.counts({"reconcile_repairs_total{kind=spool}": 1})


def test_spool_holds_whatever_it_holds(agent: Agent, shim: Cni, nic: Nic, pod: str) -> None:
    """What is no DEL is dropped with a word, what fails stays, drafts are left, the rest is served.

    Also at a start, which nothing in there prevents.
    """
    config = network_config(nic)
    assert shim("ADD", config, NETNS=pod).status == 0
    for served in (1, 2):
        folder = agent.run_dir / "spool"
        (folder / "garbage").write_bytes(os.urandom(100))
        (folder / ".draft").write_bytes(b"xb")
        (folder / "folder").mkdir(exist_ok=True)
        spool(agent, "addition", shim.environment("ADD", NETNS=pod), config)
        spool(agent, "0-failing", shim.environment("DEL"), {**config, "cniVersion": "9.9"})
        last = spool(agent, "last", shim.environment("DEL", NETNS=pod), config)
        until(lambda: not last.exists())  # noqa: B023 - called at once
        assert {path.name for path in folder.iterdir()} == {".draft", "folder", "0-failing"}
        assert agent.log.count("garbage is no request and is dropped") == served
        assert agent.log.count("addition is no DEL and is dropped") == served
        assert "error: spool: DEL of 0-failing failed: " in agent.log
        assert "folder" in agent.log
        agent.counts({"spool_length": 2})
        agent.counts({"reconcile_repairs_total{kind=spool}": 1})
        assert leftovers(pod, agent.run_dir) == []
        agent.kill()
        agent.start()


def test_dels_that_cannot_be_done_yet_stay(agent: Agent, shim: Cni, nic: Nic, pod: str) -> None:
    """A spooled DEL is not given up before its link is gone, though its namespace is not seen."""
    config = network_config(nic)
    assert shim("ADD", config, NETNS=pod).status == 0
    agent.kill()
    assert shim("DEL", config, NETNS=pod).status == 0
    (spooled,) = (agent.run_dir / "spool").iterdir()
    agent.wrapper = WITHOUT_NETNS_FOLDER
    agent.start()
    assert "waits for its namespace" in agent.log
    assert spooled.exists()
    assert macvtaps(pod) == ["net1"]
    agent.stop()
    agent.wrapper = ()
    agent.start()
    assert not spooled.exists()
    assert leftovers(pod, agent.run_dir) == []


def test_dels_of_other_versions_stay(agent: Agent, shim: Cni, nic: Nic, pod: str) -> None:
    """What a later version has spooled waits for it; what has odd many variables is served."""
    config = network_config(nic)
    assert shim("ADD", config, NETNS=pod).status == 0
    later = agent.run_dir / "spool/later"
    later.write_bytes(b"xb\xffC whatever that may mean")
    until(lambda: "later is kept" in agent.log)
    odd = {f"CNI_{number}": "x" for number in range(2 * wire.MAX_VARIABLES)}
    served = spool(agent, "odd", {**shim.environment("DEL", NETNS=pod), **odd}, config)
    until(lambda: not served.exists())
    assert leftovers(pod, agent.run_dir) == []
    assert later.exists()


def test_del_that_fails_is_not_tried_all_the_time(agent: Agent, shim: Cni, nic: Nic) -> None:
    """A DEL that cannot succeed now fills no log: it is tried when another comes, or in a while."""
    config = network_config(nic, cniVersion="9.9")
    spool(agent, "failing", shim.environment("DEL"), config)
    until(lambda: "failing failed" in agent.log)
    # The spool is looked at once a second.
    time.sleep(2.5)
    assert agent.log.count("failing failed") == 1
    other = spool(agent, "garbage", {}, config)
    until(lambda: not other.exists())
    until(lambda: agent.log.count("failing failed") == 2)


# What it finds at a start.


def test_add_that_was_killed_is_undone(agent: Agent, shim: Cni, nic: Nic, pod: str) -> None:
    """A start undoes the ADD that an agent died in, link, rules and ledger, and the next works."""
    config = network_config(nic, "passthru", mac=MAC)
    assert shim("ADD", config, NETNS=pod).status == 0
    agent.kill()
    with Ledger(agent.run_dir).hold("container-1") as held:
        (entry,) = held.entries()
        held.remove(entry.ifname)
        held.write(replace(entry, done=False))
    # Of one that died even before that, its folder and perhaps a draft.
    early = agent.run_dir / "ledger/container-2"
    early.mkdir()
    (early / "net1.new").touch()
    agent.start()
    assert leftovers(pod, agent.run_dir) == []
    assert show_link(nic.name)["address"] == nic.mac
    agent.counts({"reconcile_repairs_total{kind=intent}": 1})
    assert shim("ADD", config, NETNS=pod).status == 0
    assert shim("DEL", config, NETNS=pod).status == 0


def test_add_that_was_killed_is_left_to_del_where_it_is_out_of_reach(
    agent: Agent, shim: Cni, nic: Nic, pod: str
) -> None:
    """Where the agent cannot see a namespace it does not forget what is in there either."""
    config = network_config(nic)
    assert shim("ADD", config, NETNS=pod).status == 0
    agent.kill()
    with Ledger(agent.run_dir).hold("container-1") as held:
        (entry,) = held.entries()
        held.remove(entry.ifname)
        held.write(replace(entry, done=False))
    agent.wrapper = WITHOUT_NETNS_FOLDER
    agent.start()
    assert ledger_of(agent.run_dir) == ["container-1", "container-1/net1.intent"]
    assert shim("ADD", config, NETNS=pod).status == 0
    assert macvtaps(pod) == ["net1"]
    assert shim("DEL", config, NETNS=pod).status == 0
    assert leftovers(pod, agent.run_dir) == []


def test_attachments_whose_link_is_gone_are_forgotten(
    agent: Agent, shim: Cni, nic: Nic, lab: Lab, pod: str
) -> None:
    """A start drops what died with its link or namespace, and keeps the attachments that live."""
    config = network_config(nic)
    doomed, bare = lab.pod("doomed"), lab.pod("bare")
    for number, netns in enumerate((pod, doomed, bare)):
        assert shim("ADD", config, NETNS=netns, CONTAINERID=f"c{number}").status == 0
    prev_result = shim("ADD", config, NETNS=pod, CONTAINERID="c0", IFNAME="net2").result
    agent.kill()
    node = Path(f"/dev/tap{show_link('net1', doomed)['ifindex']}")
    run("ip", "netns", "delete", Path(doomed).name)
    run("ip", "link", "delete", "net1", netns=bare)
    # The kernel takes a namespace down in its own time.
    until(lambda: not node.exists())
    # What cannot be understood stays, and keeps nobody.
    (agent.run_dir / "ledger/file").touch()
    (agent.run_dir / "ledger/c0/net7.json").write_text("{")
    agent.start()
    agent.counts({"reconcile_repairs_total{kind=link}": 2, "attachments": 2})
    assert {entry.container_id for entry in Ledger(agent.run_dir).entries()} == {"c0"}
    assert "error: container file: " in agent.log
    assert leftovers(bare, agent.run_dir / "none") == []
    checked = {**config, "prevResult": prev_result}
    assert shim("CHECK", checked, NETNS=pod, CONTAINERID="c0", IFNAME="net2").status == 0


# Metrics.


def test_metrics_count_what_was_done(
    agent: Agent, shim: Cni, launcher: Launcher, nic: Nic, pod: str
) -> None:
    """Every figure of the agent's work is there from the first scrape, or from its first event."""
    before = agent.metrics()
    for name in ("attachments", "leases", "spool_length", "handoffs_total",
                 "handoff_duration_seconds_count"):  # fmt: skip
        assert before[f"extbridge_{name}"] == 0
        assert f"extbridge_{name}" in before
    config = network_config(nic)
    assert shim("ADD", config, NETNS=pod).status == 0
    assert shim("ADD", config, NETNS=pod).error["code"] == 103
    assert shim("NONSENSE", config).error["code"] == 4
    with launcher.holding(pod):
        launcher.refusal(pod)
        agent.counts({"attachments": 1, "leases": 1, "handoffs_total": 1})
    agent.counts({"leases": 0})
    assert shim("DEL", config, NETNS=pod).status == 0
    counted = {
        "attachments": 0,
        "requests_total{code=0,verb=ADD}": 1,
        "requests_total{code=103,verb=ADD}": 1,
        "requests_total{code=4,verb=other}": 1,
        "requests_total{code=0,verb=DEL}": 1,
        "request_duration_seconds_count{verb=ADD}": 2,
        "request_duration_seconds_bucket{le=+Inf,verb=ADD}": 2,
        "refusals_total{reason=TapHeld}": 1,
        "handoffs_total": 1,
        "handoff_duration_seconds_count": 1,
        "reconcile_repairs_total{kind=spool}": 0,
    }
    agent.counts(counted)
    assert "extbridge_request_duration_seconds_bucket{le=0.001,verb=ADD}" in agent.metrics()


def test_scraper_that_misbehaves_is_left_alone(agent: Agent) -> None:
    """Whoever asks for metrics in an odd way, or not at all, costs nobody else the answer."""
    path = agent.run_dir / "metrics.sock"
    with connected(path) as silent, connected(path) as endless:
        silent.sendall(b"GET")
        endless.sendall(bytes(16 << 10))
        assert endless.recv(8).startswith(b"HTTP/1.0")
        agent.counts({"attachments": 0})
    with connected(path) as hasty:
        hasty.sendall(b"GET / HTTP/1.1\r\n\r\n")
    agent.counts({"attachments": 0})


@contextmanager
def started(
    plugin: Cni, verb: str, config: Mapping[str, object], variables: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """The executable, which has all of its standard input."""
    with plugin.start(verb, **variables) as process:
        assert process.stdin is not None
        process.stdin.write(json.dumps(config).encode())
        process.stdin.close()
        process.stdin = None
        yield process


def without_request(answer: Answer) -> Answer:
    """The answer without the ID under which the agent's log has the request."""
    if not isinstance(answer.stdout, dict) or "details" not in answer.stdout:
        return answer
    details = re.sub(r", request [0-9a-f]{8}\)$", ")", answer.stdout["details"])
    return replace(answer, stdout={**answer.stdout, "details": details})


def ended(process: subprocess.Popen[bytes]) -> Answer:
    stdout, stderr = process.communicate(timeout=60)
    return Answer(process.returncode, json.loads(stdout) if stdout else None, stderr.decode())


def spool(
    agent: Agent, name: str, environ: Mapping[str, str], config: Mapping[str, object]
) -> Path:
    """Put a request into the spool as a shim does, under this name."""
    ours = {key: value for key, value in environ.items() if key.startswith("CNI_")}
    draft = agent.run_dir / "spool" / f".{name}"
    draft.write_bytes(wire.encode_request(wire.CNI, ours, json.dumps(config).encode()))
    return draft.rename(draft.with_name(name))


def is_waiting_for_lock(agent: Agent) -> bool:
    """Whether the agent waits for somebody's flock (man 5 proc, locks)."""
    locks = Path("/proc/locks").read_text(encoding="ascii").splitlines()
    return any("->" in line and str(agent.pid) in line.split() for line in locks)


def has_socket(pid: int) -> bool:
    """Whether the process has one open: a launcher that does has connected, or will at once."""
    # What the loader has open may be closed as it is looked at.
    with suppress(FileNotFoundError):
        fds = (os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd"))
        return any(fd.startswith("socket:") for fd in fds)
    return False


def status_of(pid: int) -> str:
    return Path(f"/proc/{pid}/status").read_text(encoding="ascii")


def accepted(path: Path) -> socket.socket | None:
    """A connection, if anybody listens."""
    try:
        return connected(path)
    except (FileNotFoundError, ConnectionRefusedError):
        return None
