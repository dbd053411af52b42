"""Whatever pods do to the agent, and wherever it dies: nothing is lost, and nothing is left."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median

import pytest

from extbridge.demo.lab import Lab, Nic, run
from extbridge.handoff import MAX_LINKS
from extbridge.kernel.links import GROUP
from extbridge.ledger import Holder, Ledger
from extbridge.network.definition import FIRST_IFINDEX
from extbridge.node.launchers import THREADS as HAND_OFF_THREADS
from tests.kernel.agents import LIVE, Agent, Launcher, connected, until
from tests.kernel.observe import leftovers, macvtaps, network_config, show_link
from tests.kernel.strace import CHANGING, Call, attached, changes_in
from tests.support import Cni, require

MAC = "52:54:00:00:00:01"

# What a pod may do to tap.sock, over and over until its standard input ends; it says when it has
# done so often enough, and waits then, if it is to be still.
HOSTILE = """
import collections, ctypes, os, random, select, socket, sys, time
from extbridge.node import wire
kind, path, times, still = sys.argv[1:]
null = os.open("/dev/null", os.O_RDONLY)
held = collections.deque(maxlen=700)
def framed(payload):
    return wire.frame_head(payload) + payload
def request(*command):
    return framed(wire.encode_request(wire.TAPS, {}, wire.encode_strings(command)))
short, long = request("true"), request("true", "x" * 250_000)
def connect():
    peer = socket.socket(socket.AF_UNIX)
    peer.settimeout(1)
    peer.connect(path)
    return peer
def silent():
    held.append(connect())
def slow():
    if len(held) < 20:
        held.append((connect(), iter(long)))
    held.rotate()
    try:
        held[0][0].send(bytes([next(held[0][1])]))
    except OSError:
        held.popleft()
def garbage():
    connect().sendall(random.choice([
        os.urandom(1 << 16),
        b"\\xff" * 100,
        framed(b""),
        framed(os.urandom(60)),
        framed(b"xb\\1T" + b"=\\0" * (100 << 10)),
        framed(b"xb\\1T" + b"a=\\0" * 900 + b"\\0" + b"\\0" * (200 << 10)),
    ]))
def fds():
    held.append(connect())
    socket.send_fds(held[-1], [short], [null] * 250)
def deaf():
    held.append(connect())
    held[-1].sendall(long)
def hasty():
    connect().sendall(short)
def fleeting():
    connect()
def namespaces():
    assert ctypes.CDLL(None).unshare(0x40000000) == 0
    for _ in range(16):
        held.append(connect())
    # To be counted as of this namespace, and not of the next.
    time.sleep(0.02)
for number in range(1 << 20):
    try:
        globals()[kind]()
    except OSError:
        pass
    if number == int(times):
        print("hostile", flush=True)
    if number >= int(times) and select.select([sys.stdin], [], [], None if still else 0.001)[0]:
        break
"""

# A launcher whose request does not come at once.
SLOW = """
import socket, sys, time
from extbridge.node import wire
payload = wire.encode_request(wire.TAPS, {}, wire.encode_strings(["true"]))
with socket.socket(socket.AF_UNIX) as agent:
    agent.connect(sys.argv[1])
    agent.sendall(wire.frame_head(payload))
    time.sleep(0.05)
    agent.sendall(payload)
    print(len(socket.recv_fds(agent, 1000, 9)[1]))
"""


# What is sent to a launcher.
ANSWER = Call("sendmsg", 1, "the answer")


# Hostile pods.


@pytest.mark.parametrize(
    "kind", ["silent", "slow", "garbage", "fds", "deaf", "hasty", "many links", "fleeting"]
)
def test_hostile_pod_is_nobody_elses_trouble(
    agent: Agent, lab: Lab, nic: Nic, shim: Cni, launcher: Launcher, *, kind: str
) -> None:
    """While a pod misbehaves on tap.sock ADDs succeed and others get their taps, hardly later.

    Nothing leaks.
    """
    config = network_config(nic)
    evil, good, new = (lab.pod(name) for name in ("evil", "good", "new"))
    for pod in (evil, good):
        assert shim("ADD", config, NETNS=pod, CONTAINERID=Path(pod).name).status == 0

    def seconds() -> list[float]:
        """Medians of an ADD and of a hand-off."""
        taken = []
        for _ in range(5):
            times = [time.monotonic()]
            assert shim("ADD", config, NETNS=new).status == 0
            times.append(time.monotonic())
            assert len(launcher.printed(good, "{net1.mac}")) == 1
            times.append(time.monotonic())
            assert shim("DEL", config, NETNS=new).status == 0
            taken.append([end - begin for begin, end in pairwise(times)])
        return [median(each) for each in zip(*taken, strict=True)]

    with imitations(lab, evil, 1000 if kind == "many links" else 0):
        undisturbed = seconds()
        idle, resident = agent.settled_fds(), agent.resident_kib
        with hostile(agent, evil, "hasty" if kind == "many links" else kind):
            disturbed = seconds()
            assert agent.resident_kib < resident + (32 << 10)
        until(lambda: agent.fds <= idle)
    # On two processors, of which the pod takes one.
    for before, now in zip(undisturbed, disturbed, strict=True):
        assert now < 5 * before + 0.05
    assert launcher.printed(evil, "{net1.queues}") == ["1"]


def test_pod_has_one_thread(
    agent: Agent, lab: Lab, nic: Nic, shim: Cni, launcher: Launcher
) -> None:
    """However many launchers of a pod wait for something, another pod gets its tap meanwhile."""
    config = network_config(nic)
    evil, good = lab.pod("evil"), lab.pod("good")
    for pod in (evil, good):
        assert shim("ADD", config, NETNS=pod, CONTAINERID=Path(pod).name).status == 0
    with ExitStack() as closing, Ledger(agent.run_dir).hold(Path(evil).name):
        for _ in range(2 * HAND_OFF_THREADS):
            closing.enter_context(launcher.start(evil, *LIVE))
        # One in a thread that accepts, one of those that are waited for.
        until(lambda: locks_awaited(agent) == 2)
        assert len(launcher.printed(good, "{net1.mac}")) == 1
        assert locks_awaited(agent) == 2


def test_pod_with_too_many_links_is_refused(
    agent: Agent, lab: Lab, nic: Nic, shim: Cni, pod: str, *, launcher: Launcher
) -> None:
    """A pod that makes itself macvtaps by the hundred is told so, and served when they are gone."""
    assert shim("ADD", network_config(nic), NETNS=pod).status == 0
    with imitations(lab, pod, MAX_LINKS):
        assert f"more than {MAX_LINKS} macvtaps" in launcher.refusal(pod)
    assert launcher.printed(pod, "{net1.queues}") == ["1"]
    assert "Traceback" not in agent.log


def test_hostile_pod_with_many_namespaces(
    agent: Agent, lab: Lab, nic: Nic, shim: Cni, launcher: Launcher
) -> None:
    """A pod that makes itself namespaces takes neither the fds of an ADD nor a launcher's place."""
    agent.stop()
    agent.wrapper = ("prlimit", "--nofile=600", "--")
    agent.start()
    config = network_config(nic)
    pod = lab.pod("new")
    assert shim("ADD", config, NETNS=pod).status == 0
    idle = agent.settled_fds()
    with hostile(agent, lab.pod("evil"), "namespaces"):
        assert shim("DEL", config, NETNS=pod).status == 0
        assert shim("ADD", config, NETNS=pod).status == 0
        # As long as a VM's may be, and twice as long as an answer that a socket takes at once.
        long = ["x" * 1000] * 200
        assert launcher.printed(pod, "{net1.queues}", *long) == ["1", *long]
        assert agent.metrics()["extbridge_refusals_total{reason=flood}"] > 0
    until(lambda: agent.fds <= idle)
    assert "Too many open files" not in agent.log
    assert launcher.printed(pod, "{net1.queues}") == ["1"]


def test_newcomer_finds_a_place(agent: Agent, lab: Lab, nic: Nic, shim: Cni, *, pod: str) -> None:
    """Where a pod has taken all places of those who are waited for, who comes later is served."""
    assert shim("ADD", network_config(nic), NETNS=pod).status == 0
    tap_socket = str(agent.run_dir / "pod/tap.sock")
    with hostile(agent, lab.pod("evil"), "namespaces", times=20, still=True):
        asked = run("nsenter", f"--net={pod}", sys.executable, "-c", SLOW, tap_socket)
        assert asked == "1\n"
        assert agent.metrics()["extbridge_refusals_total{reason=flood}"] > 0


def test_refusals_do_not_fill_the_log(agent: Agent, pod: str) -> None:
    """Of what pods are refused a line a second is told for each reason, and how many are not."""
    began = time.monotonic()
    with hostile(agent, pod, "fleeting"):
        pass
    # The next is told again.
    time.sleep(1.1)
    with connected(agent.run_dir / "pod/tap.sock") as connection:
        connection.sendall(b"\xff" * 4)
        assert connection.recv(1) == b""
    refused = agent.metrics()["extbridge_refusals_total{reason=protocol}"]
    assert refused > 100
    told = [int(it) for it in re.findall(r"reason=protocol untold=(\d+)", agent.log)]
    assert len(told) + sum(told) == refused
    assert len(told) <= time.monotonic() - began + 1


def test_agent_without_a_free_fd_recovers(agent: Agent, shim: Cni, nic: Nic, pod: str) -> None:
    """An agent that has run out of fds serves again as soon as it gets some back."""
    agent.stop()
    agent.wrapper = ("prlimit", "--nofile=36", "--")
    agent.start()
    idle = agent.settled_fds()
    config = network_config(nic)
    with ExitStack() as closing:
        for _ in range(80):
            closing.enter_context(connected(agent.run_dir / "cni.sock"))
        until(lambda: "Too many open files" in agent.log)
        # The spool is looked at once a second.
        time.sleep(1.2)
    until(lambda: agent.fds <= idle)
    assert shim("ADD", config, NETNS=pod).status == 0
    assert shim("DEL", config, NETNS=pod).status == 0
    assert leftovers(pod, agent.run_dir) == []


def test_nobody_is_waited_for(agent: Agent, shim: Cni, nic: Nic, pod: str) -> None:
    """Whoever stops in the midst of a request, or does not take the answer, is hung up on."""
    assert shim("ADD", network_config(nic), NETNS=pod).status == 0
    idle = agent.settled_fds()
    with hostile(agent, pod, "deaf", times=0, still=True), ExitStack() as closing:
        for path in ("cni.sock", "pod/tap.sock", "metrics.sock"):
            for said in (b"", b"x"):
                silent = closing.enter_context(connected(agent.run_dir / path))
                silent.sendall(said)
        until(lambda: agent.fds >= idle + 6)
        # What stays is the lease.
        until(lambda: agent.fds == idle + 1)
    agent.counts({"handoffs_total": 0})


# kill -9, at each of the calls by which a request changes anything.


def test_add_that_the_agent_dies_in(
    agent: Agent, shim: Cni, nic: Nic, pod: str, tmp_path: Path
) -> None:
    """The runtime is told to try again, the next agent leaves nothing, and then ADD succeeds."""
    require("nft")
    config = network_config(nic, "passthru", mac=MAC)
    # The first makes the ledger's folder too, and is not as the others.
    assert shim("ADD", config, NETNS=pod).status == 0
    assert shim("DEL", config, NETNS=pod).status == 0
    with recording(agent, tmp_path) as calls:
        assert shim("ADD", config, NETNS=pod).status == 0
    assert shim("DEL", config, NETNS=pod).status == 0
    last = max(n for n, call in enumerate(calls) if "rename" in call.name)
    assert last > 15
    for number, call in enumerate(calls):
        with killing(agent, call):
            assert shim("ADD", config, NETNS=pod).error["code"] == 11, call
        if number > last:
            # It was made, and only not told of: whole, and the runtime's to delete.
            assert macvtaps(pod) == ["net1"], call
            assert shim("ADD", config, NETNS=pod).error["code"] == 103
            assert shim("DEL", config, NETNS=pod).status == 0
        assert leftovers(pod, agent.run_dir) == [], call
        assert show_link(nic.name)["address"] == nic.mac, call
    assert shim("ADD", config, NETNS=pod).status == 0
    assert show_link("net1", pod)["address"] == MAC


def test_del_that_the_agent_dies_in(
    agent: Agent, shim: Cni, nic: Nic, pod: str, tmp_path: Path
) -> None:
    """The runtime's DEL succeeds all the same, with the next agent, and leaves nothing."""
    require("nft")
    config = network_config(nic, "passthru", mac=MAC)
    assert shim("ADD", config, NETNS=pod).status == 0
    with recording(agent, tmp_path) as calls:
        assert shim("DEL", config, NETNS=pod).status == 0
    assert len(calls) > 5
    for call in calls:
        assert shim("ADD", config, NETNS=pod).status == 0
        deleting = shim.start("DEL", NETNS=pod)
        with deleting, killing(agent, call):
            assert deleting.stdin is not None
            deleting.stdin.write(json.dumps(config).encode())
            deleting.stdin.close()
            until(lambda: agent.has_died)
        assert deleting.returncode == 0, call
        assert leftovers(pod, agent.run_dir) == [], call
        assert show_link(nic.name)["address"] == nic.mac, call


def test_hand_off_that_the_agent_dies_in(
    agent: Agent, shim: Cni, nic: Nic, pod: str, launcher: Launcher, *, tmp_path: Path
) -> None:
    """The launcher gets its tap from the next agent, and when it has ended another gets it."""
    assert shim("ADD", network_config(nic, mac=MAC), NETNS=pod).status == 0
    with ExitStack() as holding, recording(agent, tmp_path) as calls:
        holding.enter_context(launcher.holding(pod))
    assert len(calls) > 5
    for call in [*calls, ANSWER]:
        with ExitStack() as holding:
            with killing(agent, call):
                launching = holding.enter_context(launcher.start(pod, *LIVE))
                until(lambda: agent.has_died)
            assert launching.stdout is not None
            assert launching.stdout.readline() == f"{launching.pid}\n", call
            entries = Ledger(agent.run_dir).entries()
            holders = [(it.ifname, it.holder.pid if it.holder else 0) for it in entries]
            assert holders == [("net1", launching.pid)], call
        assert launcher.printed(pod, "{net1.mac}") == [MAC]


def test_end_of_a_lease_that_the_agent_dies_in(
    agent: Agent, shim: Cni, nic: Nic, pod: str, launcher: Launcher, *, tmp_path: Path
) -> None:
    """A holder that ends has let go of its tap, also if the agent dies over writing that down."""

    def holders() -> list[Holder]:
        return [entry.holder for entry in Ledger(agent.run_dir).entries() if entry.holder]

    assert shim("ADD", network_config(nic, mac=MAC), NETNS=pod).status == 0
    with ExitStack() as holding:
        holding.enter_context(launcher.holding(pod))
        with recording(agent, tmp_path) as calls:
            holding.close()
            until(lambda: not holders())
    assert len(calls) > 2
    for call in calls:
        with ExitStack() as holding:
            holding.enter_context(launcher.holding(pod))
            with killing(agent, call):
                holding.close()
                until(lambda: agent.has_died)
        assert holders() == [], call
        assert launcher.printed(pod, "{net1.mac}") == [MAC]


@contextmanager
def hostile(
    agent: Agent, pod: str, kind: str, *, times: int = 100, still: bool = False
) -> Iterator[None]:
    """A process in the pod that has been hostile so often, and is during the block if not still."""
    tap_socket = str(agent.run_dir / "pod/tap.sock")
    script = (sys.executable, "-c", HOSTILE, kind, tap_socket, str(times), "still" * still)
    with subprocess.Popen(
        ("nsenter", f"--net={pod}", "--", *script),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "hostile\n"
        yield
        assert process.poll() is None
    assert process.returncode == 0


@contextmanager
def imitations(lab: Lab, pod: str, number: int) -> Iterator[None]:
    """So many macvtaps in the pod as ours look; a process with CAP_NET_ADMIN can make them."""
    run("ip", "link", "add", "eth7", "netns", pod, "type", "veth", "peer", "name", "eth7",
        "netns", lab.switch)  # fmt: skip
    script = "".join(
        f"link add link eth7 name m{n} index {FIRST_IFINDEX + n} group {GROUP} type macvtap\n"
        for n in range(number)
    )
    with tempfile.NamedTemporaryFile("w") as batch:
        batch.write(script)
        batch.flush()
        run("ip", "-batch", batch.name, netns=pod)
    try:
        yield
    finally:
        run("ip", "link", "delete", "eth7", netns=pod)


def locks_awaited(agent: Agent) -> int:
    """How many of the agent's threads wait for a flock (man 5 proc, locks)."""
    return Path("/proc/locks").read_text().count(f"-> FLOCK  ADVISORY  WRITE {agent.pid} ")


@contextmanager
def recording(agent: Agent, folder: Path) -> Iterator[list[Call]]:
    """What the thread that serves the block's request changes; the list is full after the block."""
    calls: list[Call] = []
    log = folder / "recorded"
    traced = f"--trace={','.join(f'?{name}' for name in CHANGING)}"
    with attached(workers(agent), f"--output={log}", traced):
        yield calls
    for call in changes_in(log):
        calls.append(call)
        # What it sends that is no netlink message is its answer, to the shim or the event loop.
        if call.name == "sendto" and "nlmsg" not in call.shown:
            break


@contextmanager
def killing(agent: Agent, call: Call) -> Iterator[None]:
    """The agent dies as it enters the call, during the block; after it there is the next agent."""
    inject = f"--inject={call.name}:signal=KILL:when={call.number}"
    with attached(workers(agent), f"--trace={call.name}", inject):
        yield
    agent.end(-signal.SIGKILL)
    agent.start()


def workers(agent: Agent) -> list[int]:
    """The threads of which one will serve whatever comes."""
    # So that one for taps is there.
    agent.metrics()
    return [thread for thread in agent.settled_threads() if thread != agent.pid]
