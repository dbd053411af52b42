"""The agent gives a process the taps of the namespace it stands in, and nothing to anybody else."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from extbridge.demo.lab import Lab, Nic, receive, run
from extbridge.ledger import Holder, Ledger
from extbridge.node import wire
from extbridge.node.broker import Lease
from extbridge.node.leases import Leases
from extbridge.node.metrics import Metrics
from tests.kernel.agents import LIVE, SECONDS, Agent, Launcher, until
from tests.kernel.observe import frame, network_config, packed, show_link
from tests.support import Cni

MAC, SECOND_MAC, OUTSIDE_MAC = "52:54:00:00:00:01", "52:54:00:00:00:02", "52:54:00:00:00:99"

NO_ATTACHMENT: Mapping[str, None] = {"CONTAINERID": None, "IFNAME": None}

# Somebody without any privilege, in a container that sees of the run folder what a pod sees. The
# launcher's own path, which is the first argument, is not there.
IN_CONTAINER = (
    "unshare", "--mount", "sh", "-c", (
    'mount -t tmpfs extbridge-test /mnt && mkdir /mnt/pod && chmod 755 /mnt'
    ' && mount -o ro,bind "$EXTBRIDGE_RUN/pod" /mnt/pod && shift && export EXTBRIDGE_RUN=/mnt'
    " && exec setpriv --reuid=64055 --regid=64055 --clear-groups --bounding-set=-all"
    ' --inh-caps=-all --no-new-privs -- /mnt/pod/extbridge-exec "$@"'), "sh",
)  # fmt: skip

# Not root, and yet no file's mode stops it.
NOT_ROOT = (
    "setpriv", "--reuid=64055", "--regid=64055", "--clear-groups",
    "--inh-caps=+dac_override", "--ambient-caps=+dac_override", "--",
)  # fmt: skip

# What runs in here does without SO_PEERPIDFD, as on Linux before 6.5 (man 2 seccomp).
WITHOUT_PEERPIDFD = """
import ctypes, errno, os, struct, sys
getsockopt = {"x86_64": 55, "aarch64": 209}[os.uname().machine]
load, equal, answer, allow, fail = 0x20, 0x15, 0x06, 0x7FFF0000, 0x00050000 | errno.ENOPROTOOPT
code = b"".join(struct.pack("=HBBI", *step) for step in [
    (load, 0, 0, 0), (equal, 0, 3, getsockopt),
    (load, 0, 0, 32), (equal, 0, 1, 77),
    (answer, 0, 0, fail), (answer, 0, 0, allow),
])
buffer = ctypes.create_string_buffer(code)
program = struct.pack("@HP", len(code) // 8, ctypes.addressof(buffer))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, program, 0, 0) == 0, ctypes.get_errno()
os.execv(sys.argv[1], sys.argv[1:])
"""

# Connects to the agent, ends, and has its number given to another process, in the pod of the second
# argument (clone3 with set_tid); then who is left sends the request in the third, and tells what
# came.
REUSE = """
import contextlib, ctypes, os, signal, socket, struct, sys
path, pod, request = sys.argv[1:]
peer = socket.socket(socket.AF_UNIX)
first = os.fork()
if first == 0:
    peer.connect(path)
    print("connected", flush=True)
    sys.stdin.readline()
    os._exit(0)
os.waitpid(first, 0)
libc = ctypes.CDLL(None, use_errno=True)
assert libc.setns(os.open(pod, os.O_RDONLY), 0x40000000) == 0
number = ctypes.c_int(first)
arguments = struct.pack("=11Q", 0, 0, 0, 0, signal.SIGCHLD, 0, 0, 0, ctypes.addressof(number), 1, 0)
second = libc.syscall(435, arguments, len(arguments))
if second == 0:
    peer.close()
    signal.pause()
assert second == first, os.strerror(ctypes.get_errno())
print("reused", flush=True)
sys.stdin.readline()
told, fds = b"", []
try:
    # The agent may have refused and hung up by now.
    with contextlib.suppress(BrokenPipeError):
        peer.sendall(bytes.fromhex(request))
    with contextlib.suppress(ConnectionResetError):
        told, fds, _, _ = socket.recv_fds(peer, 1 << 16, 250)
finally:
    os.kill(second, signal.SIGKILL)
    os.waitpid(second, 0)
print(len(fds), told.hex())
"""


@pytest.fixture
def pod(lab: Lab, nic: Nic, shim: Cni, agent: Agent) -> str:  # noqa: ARG001 - it has to serve
    """A pod with one VM NIC, net1."""
    pod = lab.pod("vm")
    assert shim("ADD", network_config(nic, mac=MAC), NETNS=pod).result
    return pod


@pytest.fixture
def other(lab: Lab, nic: Nic, shim: Cni, agent: Agent) -> str:  # noqa: ARG001 - likewise
    """Another pod, with the NIC net2."""
    other = lab.pod("other")
    config = network_config(nic, mac=SECOND_MAC)
    assert shim("ADD", config, NETNS=other, CONTAINERID="container-2", IFNAME="net2").result
    return other


# Who may drive the agent.


@pytest.mark.parametrize("who", ["not root", "root in a pod"])
def test_cni_socket_is_for_the_nodes_root(agent: Agent, shim: Cni, pod: str, who: str) -> None:
    """Whoever got hold of cni.sock is refused unless he is root, in the node's own namespace."""
    wrapper = NOT_ROOT if who == "not root" else ("nsenter", f"--net={pod}", "--")
    stranger = replace(shim, wrapper=wrapper)
    assert stranger("ADD", {}, NETNS=pod, IFNAME="net7").error["code"] == 11
    agent.counts({"refusals_total{reason=caller}": 1})
    # So that it is the caller that makes the difference.
    assert shim("ADD", {}, NETNS=pod, IFNAME="net7").error["code"] == 1


# Who gets which taps.


def test_unprivileged_container_gets_its_tap(
    lab: Lab, nic: Nic, pod: str, launcher: Launcher
) -> None:
    """Without privilege, device or anything but `pod/`, a VM gets a tap that carries frames."""
    contained = replace(launcher, wrapper=IN_CONTAINER)
    port = lab.packets(lab.switch, nic.port)
    data = bytes(10) + frame(OUTSIDE_MAC, MAC, b"from the VM")
    octets = "".join(f"\\x{octet:02x}" for octet in data)
    script = f"printf '{octets}' >&{{net1.fd}}; id -u; grep CapBnd /proc/self/status"
    done = contained(pod, "bash", "-c", script)
    assert (done.returncode, done.stderr) == (0, "")
    user, _, capabilities = done.stdout.split()
    assert (user, int(capabilities, 16)) == ("64055", 0)
    came = [it.data[6:12] for it in receive(port, seconds=0.3) if not it.sent]
    assert came == [packed(MAC)]


def test_taps_are_numbered_from_a_hundred(pod: str, launcher: Launcher) -> None:
    """The command gets the fds under the protocol's numbers, and its other fds untouched."""
    fd, link = launcher.printed(pod, "{net1.fd}", "{net1.mac}/{net1.mtu}/{net1.queues}")
    assert (fd, link) == ("100", f"{MAC}/1500/1")
    done = launcher(pod, "readlink", "/proc/self/fd/{net1.fd}")
    assert done.stdout.endswith(f"/tap{show_link('net1', pod)['ifindex']}\n")


def test_more_taps_than_fit_a_frame(
    lab: Lab, nic: Nic, shim: Cni, agent: Agent, launcher: Launcher
) -> None:
    """A NIC may have so many queues that its fds take several frames, for either launcher."""
    pod = lab.pod("wide")
    assert shim("ADD", network_config(nic, queues=251), NETNS=pod).status == 0
    done = launcher(pod, "sh", "-c", "echo {net1.fds}; ls -l /proc/self/fd | grep -c /tap")
    fds, count = done.stdout.split()
    assert (fds, count) == (":".join(map(str, range(100, 351))), "251")
    assert python(pod, agent, "print(len(take_taps()[0].fds))") == "251\n"


def test_command_is_bounded(agent: Agent, pod: str, launcher: Launcher) -> None:
    """A command as long as a VM's may be passes, one that is meant to keep the agent busy does not.

    Nor does one that grows too long when it is filled in.
    """
    most = ["x"] * (wire.MAX_ARGUMENTS - 3)
    assert launcher(pod, "printf", "%s", "{net1.queues}", *most).stdout == f"1{''.join(most)}"
    assert "4096 arguments" in launcher.refusal(pod, "printf", "%s", "{net1.queues}", *most, "x")
    assert "is longer than" in launcher.refusal(pod, "echo", *["{net1.mac}" * 10_000] * 2)
    assert holders(agent) == {}


@pytest.mark.usefixtures("other")
def test_names_do_not_lead_to_another_pod(agent: Agent, pod: str, launcher: Launcher) -> None:
    """Who asks by names is given the NICs of his own pod that bear them, or nothing at all."""
    assert launcher.printed(pod, "{net1.mac}", EXTBRIDGE_IFNAMES="net1") == [MAC]
    for asked in ("net2", "net1,net2", "../container-2/net2"):
        assert "has no NIC" in launcher.refusal(pod, EXTBRIDGE_IFNAMES=asked)
    for asked in ("{net2.fd}", "{net1.fd} {net2.mac}"):
        assert "there is no NIC net2" in launcher.refusal(pod, "echo", asked)
    assert holders(agent) == {}


def test_link_that_claims_to_be_anothers_is_refused(
    agent: Agent, lab: Lab, other: str, launcher: Launcher
) -> None:
    """A pod that may make links, and makes one after another pod's in all it has, gets nothing."""
    evil = lab.pod("evil")
    model = show_link("net2", other)
    run("ip", "link", "add", "eth0", "netns", evil, "type", "veth", "peer", "name", "eth0",
        "netns", lab.switch)  # fmt: skip
    run("ip", "link", "add", "link", "eth0", "name", "net2",
        "index", str(model["ifindex"]), "group", str(model["group"]),
        "address", SECOND_MAC, "type", "macvtap", netns=evil)  # fmt: skip
    run("ip", "link", "set", "net2", "alias", model["ifalias"], netns=evil)
    alike = ("ifindex", "ifname", "address", "group", "ifalias")
    imitation = show_link("net2", evil)
    assert {key: imitation[key] for key in alike} == {key: model[key] for key in alike}
    # Nor does it keep, or wait for, who works for that pod just now.
    with Ledger(agent.run_dir).hold("container-2"):
        assert "does not know net2" in launcher.refusal(evil)
    assert holders(agent) == {}
    run("ip", "link", "delete", "net2", netns=evil)
    assert launcher.printed(other, "{net2.mac}") == [SECOND_MAC]


@pytest.mark.usefixtures("pod")
def test_node_itself_gets_nothing(launcher: Launcher) -> None:
    """A hostNetwork pod, which stands in the node's own namespace, is refused and told why."""
    assert "hostNetwork pod" in launcher.refusal("")


@pytest.mark.usefixtures("pod")
def test_pod_without_nics_gets_nothing(lab: Lab, launcher: Launcher) -> None:
    """A namespace in which extbridge has made nothing is told so."""
    empty = lab.pod("empty")
    run("ip", "link", "add", "net1", "type", "bridge", netns=empty)
    assert "has no NIC of extbridge" in launcher.refusal(empty)


@pytest.mark.parametrize("kernel", ["this", "before 6.5"])
def test_number_of_a_process_that_ended_is_worth_nothing(
    agent: Agent, lab: Lab, other: str, kernel: str
) -> None:
    """Who asked and ended gets nothing, nor does anybody get what his number's next bearer may."""
    if kernel != "this":
        agent.stop()
        agent.wrapper = (sys.executable, "-c", WITHOUT_PEERPIDFD)
        agent.start()
    idle = agent.settled_fds()
    with reusing(agent, lab.pod("evil"), other) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "connected\n"
        # The connection, and the process at its other end.
        until(lambda: agent.fds == idle + 2)
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "reused\n"
        assert_refused(*process.communicate("\n", timeout=SECONDS))
    assert holders(agent) == {}


def test_older_kernels_will_do(
    agent: Agent, shim: Cni, nic: Nic, other: str, launcher: Launcher
) -> None:
    """Before Linux 6.5 pods are attached and get their taps as well."""
    agent.stop()
    agent.wrapper = (sys.executable, "-c", WITHOUT_PEERPIDFD)
    agent.start()
    assert launcher.printed(other, "{net2.mac}") == [SECOND_MAC]
    assert python(other, agent, "print(take_taps()[0].mac)") == f"{SECOND_MAC}\n"
    config, attachment = network_config(nic), {"CONTAINERID": "container-2", "IFNAME": "net2"}
    assert shim("DEL", config, NETNS=other, **attachment).status == 0
    assert list(Ledger(agent.run_dir).entries()) == []


@pytest.mark.parametrize("kernel", ["this", "before 6.5"])
def test_process_that_ended_unseen_gets_nothing(
    agent: Agent, lab: Lab, other: str, kernel: str
) -> None:
    """Nor where the agent has not even seen the connection before its process ended."""
    if kernel != "this":
        agent.stop()
        agent.wrapper = (sys.executable, "-c", WITHOUT_PEERPIDFD)
        agent.start()
    os.kill(agent.pid, signal.SIGSTOP)
    with reusing(agent, lab.pod("evil"), other) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "connected\n"
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "reused\n"
        os.kill(agent.pid, signal.SIGCONT)
        assert_refused(*process.communicate("\n", timeout=SECONDS))
    assert holders(agent) == {}


def test_older_kernels_serve_too(agent: Agent, pod: str, launcher: Launcher) -> None:
    """Without SO_PEERPIDFD a launcher gets its tap as well, and holds it."""
    agent.stop()
    agent.wrapper = (sys.executable, "-c", WITHOUT_PEERPIDFD)
    agent.start()
    with launcher.holding(pod) as pid:
        assert f"held by process {pid}" in launcher.refusal(pod)
    until(lambda: not holders(agent))
    assert launcher.printed(pod, "{net1.mac}") == [MAC]


def test_agent_that_cannot_see_processes_says_so(
    agent: Agent, pod: str, launcher: Launcher
) -> None:
    """An agent that was deployed without hostPID says to the launcher what is wrong."""
    agent.stop()
    agent.wrapper = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--")
    agent.start()
    assert "hostPID" in launcher.refusal(pod)


def test_failure_of_the_kernel_is_told(agent: Agent, pod: str, launcher: Launcher) -> None:
    """What keeps the agent from opening a tap is said to who asked for it, in words."""
    node = f"tap{show_link('net1', pod)['ifindex']}"
    Path("/dev", node).unlink()
    assert f"{node}: No such file or directory" in launcher.refusal(pod)
    assert holders(agent) == {}


def test_pod_writes_no_lines_of_the_log(agent: Agent, pod: str, launcher: Launcher) -> None:
    """What a pod asks for is repeated in the agent's log without line ends, and not at length."""
    launcher.refusal(pod, EXTBRIDGE_IFNAMES="x\nerror: forged\x1b[2J")
    launcher.refusal(pod, EXTBRIDGE_IFNAMES="long" * 20_000)
    assert "no NIC x?error: forged?[2J" in agent.log
    assert max(map(len, agent.log.splitlines())) < 500


# One holder.


def test_tap_has_one_holder_across_restarts(agent: Agent, pod: str, launcher: Launcher) -> None:
    """While its holder lives a tap is refused to others, whatever becomes of the agent."""
    with launcher.holding(pod) as pid:
        for end in (agent.stop, agent.kill, None):
            assert holders(agent) == {"net1": pid}
            agent.counts({"leases": 1})
            assert f"held by process {pid}" in launcher.refusal(pod)
            if end is not None:
                end()
                agent.start()
    until(lambda: not holders(agent))
    agent.counts({"leases": 0})
    assert launcher.printed(pod, "{net1.mac}") == [MAC]


def test_holder_that_ends_unseen_is_forgotten(agent: Agent, pod: str, launcher: Launcher) -> None:
    """A holder that ended while no agent ran is cleared from the ledger by the next."""
    with launcher.holding(pod):
        agent.kill()
    assert list(holders(agent)) == ["net1"]
    agent.start()
    assert holders(agent) == {}
    agent.counts({"reconcile_repairs_total{kind=holder}": 1, "leases": 0})
    assert launcher.printed(pod, "{net1.mac}") == [MAC]


def test_number_of_a_holder_that_ended_holds_nothing(
    agent: Agent, pod: str, launcher: Launcher
) -> None:
    """A process that has got the number of a holder that ended does not hold his tap."""
    with launcher.holding(pod):
        agent.kill()
        with Ledger(agent.run_dir).hold("container-1") as held:
            (entry,) = held.entries()
            assert entry.holder is not None
            held.write(replace(entry, holder=replace(entry.holder, started=1)))
        agent.start()
        assert holders(agent) == {}
        assert launcher.printed(pod, "{net1.mac}") == [MAC]


def test_exec_keeps_the_lease(agent: Agent, pod: str, launcher: Launcher) -> None:
    """A holder may become another program, and another: it is one process, and one lease."""
    command = ("sh", "-c", f"echo $$; exec {' '.join(LIVE[:2])} '{LIVE[2]}'")
    with launcher.start(pod, *command) as process:
        assert process.stdout is not None
        assert [int(process.stdout.readline()) for _ in range(2)] == [process.pid] * 2
        assert f"held by process {process.pid}" in launcher.refusal(pod)
    until(lambda: not holders(agent))


def test_what_fails_holds_nothing(
    agent: Agent, nic: Nic, shim: Cni, pod: str, launcher: Launcher
) -> None:
    """Who cannot get all that he asks for holds none of it, though he lives on; but what he had."""
    for ifname in ("net0", "net2"):
        assert shim("ADD", network_config(nic), NETNS=pod, IFNAME=ifname).status == 0
    script = """
        try:
            take_taps()
        except NoTaps as refused:
            print(refused, flush=True)
        had = take_taps(["net1"])
        for asked in [], ["net3"]:
            try:
                take_taps(asked)
            except NoTaps:
                print("again", flush=True)
        sys.stdin.read()
    """
    with launcher.holding(pod, EXTBRIDGE_IFNAMES="net2") as pid:
        with started_python(pod, agent, script) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            assert f"held by process {pid}" in process.stdout.readline()
            assert [process.stdout.readline() for _ in range(2)] == ["again\n"] * 2
            assert holders(agent) == {"net1": process.pid, "net2": pid}
            process.stdin.close()
            process.stdin = None
            until(lambda: holders(agent) == {"net2": pid})
        launcher.refusal(pod, "echo", "{net1.fd} {net1.vhostfds} {net9.fd}")
        assert holders(agent) == {"net2": pid}


def test_holder_may_ask_again(agent: Agent, pod: str) -> None:
    """A process that has taken its taps may take them once more."""
    assert python(pod, agent, "print(len(take_taps()), len(take_taps()))") == "1 1\n"
    until(lambda: not holders(agent))


def test_lease_that_cannot_be_watched_leaves_nothing(tmp_path: Path) -> None:
    """What cannot be watched is no lease, and is not kept open."""
    # A file is nothing that can be waited for (man 2 epoll_ctl, EPERM).
    fd = os.open(tmp_path, os.O_RDONLY)

    async def watch() -> int:
        with ThreadPoolExecutor(1) as threads:
            metrics = Metrics(observe=list, spooled=int, broken=list)
            leases = Leases(lambda _: None, threads, metrics)
            with pytest.raises(PermissionError):
                leases.watch(Lease(Holder(os.getpid(), 1), frozenset(), fd))
            return len(leases)

    assert asyncio.run(watch()) == 0
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


# Launchers written in Python.


def test_python_launcher_owns_its_taps(nic: Nic, shim: Cni, pod: str, agent: Agent) -> None:
    """take_taps() gives every NIC with its fds, which close with it and are not inherited."""
    config = network_config(nic, mac=SECOND_MAC, queues=4, mtu=1400)
    assert shim("ADD", config, NETNS=pod, IFNAME="net2").status == 0
    script = """
        import json
        def fds():
            # The one that lists the folder has the same number again.
            return set(os.listdir("/proc/self/fd"))
        before = fds()
        with ExitStack() as closing:
            taps = [closing.enter_context(tap) for tap in take_taps()]
            told = [[tap.name, tap.mac, tap.mtu, len(tap.fds), len(tap.vhost_fds)] for tap in taps]
            told.append([os.readlink(f"/proc/self/fd/{fd}") for tap in taps for fd in tap.fds])
            assert not any(os.get_inheritable(fd) for tap in taps for fd in tap.fds)
            taps[0].close()
            taps[0].close()
        assert fds() == before
        named = [tap.name for tap in take_taps(["net2"])]
        print(json.dumps([*told, named]))
    """
    vhost = os.path.exists("/dev/vhost-net")
    first, second, nodes, named = json.loads(python(pod, agent, script))
    assert first == ["net1", MAC, 1500, 1, 1 * vhost]
    assert second == ["net2", SECOND_MAC, 1400, 4, 4 * vhost]
    indexes = [show_link(name, pod)["ifindex"] for name in ("net1", "net2")]
    assert [Path(node).name for node in nodes] == [f"tap{indexes[0]}", *[f"tap{indexes[1]}"] * 4]
    assert named == ["net2"]


def test_python_launcher_is_told_why_not(agent: Agent, lab: Lab, pod: str) -> None:
    """Where there are no taps to be had, NoTaps says what the agent said."""
    script = """
        try:
            take_taps(sys.argv[1:])
        except NoTaps as refused:
            print(refused)
    """
    assert "has no NIC net9" in python(pod, agent, script, "net9")
    assert "has no NIC of extbridge" in python(lab.pod("empty"), agent, script)
    agent.stop()
    assert "tap.sock: " in python(pod, agent, script)


def test_python_launcher_waits_for_the_agent(agent: Agent, pod: str) -> None:
    """An agent that is just restarting is waited for."""
    agent.stop()
    script = "print('asking', flush=True); print(take_taps()[0].mac)"
    with started_python(pod, agent, script) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "asking\n"
        agent.start()
        assert process.stdout.readline() == f"{MAC}\n"


def holders(agent: Agent) -> dict[str, int]:
    """Who holds what, as the ledger has it."""
    entries = Ledger(agent.run_dir).entries()
    return {entry.ifname: entry.holder.pid for entry in entries if entry.holder is not None}


@contextmanager
def reusing(agent: Agent, pod: str, victim: str) -> Iterator[subprocess.Popen[str]]:
    """REUSE, begun in the pod; the number goes to a process in the victim's."""
    payload = wire.encode_request(wire.TAPS, {}, wire.encode_strings(["echo"]))
    request = (wire.frame_head(payload) + payload).hex()
    script = (sys.executable, "-c", REUSE, str(agent.run_dir / "pod/tap.sock"), victim, request)
    with subprocess.Popen(
        ("nsenter", f"--net={pod}", "--", *script),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        yield process


def assert_refused(stdout: str, stderr: str) -> None:
    """REUSE got a sentence and no fd."""
    assert stderr == ""
    fds, told = stdout.split()
    assert fds == "0"
    status, _, sentence = wire.decode_tap_answer(wire.Frame(bytes.fromhex(told)[4:]))
    assert status == 125
    assert b"which asked, has ended" in sentence


@contextmanager
def started_python(
    pod: str, agent: Agent, script: str, *arguments: str
) -> Iterator[subprocess.Popen[str]]:
    """A launcher written in Python, in the pod."""
    imports = "import os, sys; from contextlib import ExitStack\n"
    imports += "from extbridge.client import NoTaps, take_taps\n"
    with subprocess.Popen(
        ("nsenter", f"--net={pod}", "--",
         sys.executable, "-c", imports + textwrap.dedent(script), *arguments),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "EXTBRIDGE_RUN": str(agent.run_dir)},
    ) as process:  # fmt: skip
        yield process


def python(pod: str, agent: Agent, script: str, *arguments: str) -> str:
    """What it printed, having ended well."""
    with started_python(pod, agent, script, *arguments) as process:
        stdout, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0
    return stdout
