"""The stage: a node with a NIC, an agent, the shim and empty pods, and the stopwatch.

A program is timed from before it is started until its end is known. It is started by posix_spawn,
which does not copy the memory of this large process.
"""

from __future__ import annotations

import array
import ctypes
import json
import os
import resource
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from itertools import count, cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Final, Self

from extbridge.demo.lab import Lab, run
from extbridge.node import wire
from extbridge.node.sockets import CNI_SOCKET, TAP_SOCKET
from tests.kernel.api_server import NODE, ApiServer
from tests.kernel.kubelet import Kubelet
from tests.support import executable

MACVLAN: Final = "/usr/lib/cni/macvlan"

PODS_OF_A_NODE: Final = 110
"""What kubelet runs unless it is told otherwise (maxPods)."""

_CLONE_NEWNET = 0x40000000
_START_SECONDS = 10.0
_ANSWER_SECONDS = 60.0

# os.unshare came with Python 3.12.
_libc = ctypes.CDLL(None, use_errno=True)


class BenchFailure(Exception):
    """What was to be timed did not succeed; the message is its own."""


@dataclass(frozen=True, slots=True)
class Pod:
    """A namespace in which nothing is, and the name under which its next attachment goes."""

    netns: int
    container_id: str
    name: str

    @property
    def path(self) -> str:
        """The namespace as others can open it."""
        return f"/proc/{os.getpid()}/fd/{self.netns}"


@dataclass(frozen=True, slots=True)
class Plugin:
    """A CNI plugin: an executable, what it reads on its standard input, and the NIC that names.

    `run_dir` is its agent's.
    """

    executable: str
    config: Path
    nic: str
    run_dir: Path


class Stage:
    """A node, in namespaces of the calling process (become_node); gone when it closes."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._numbers = count()
        # An fd a pod, and there are more than most are allowed unless they ask.
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        try:
            folder = Path(self._stack.enter_context(TemporaryDirectory(prefix="extbridge-bench")))
            # As /run is on a node. Mounted where nobody else sees it, gone with this process.
            run("mount", "-t", "tmpfs", "extbridge-bench", str(folder))
            self._stack.callback(run, "umount", "--lazy", str(folder))
            self._lab = self._stack.enter_context(Lab())
            self._folder = folder
            self.run_dir = folder / "run"
            nic = self._lab.nic().name
            run(executable("extbridge"), "install", "--shim-only", "--bin-dir", str(folder))
            self.launcher = str(folder / "extbridge-exec")
            self.shim = self._plugin(str(folder / "extbridge"), nic)
            self.unguarded = self._plugin(self.shim.executable, nic, antispoof="off")
            self.in_process = self._plugin(executable("extbridge-cni"), nic)
            self.macvlan = self._plugin(MACVLAN, nic)
            self.agent = self._start_agent(self.run_dir)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove everything, what was made last first."""
        self._stack.close()

    def another_nic(self) -> Plugin:
        """The shim, for a network on a further NIC."""
        return self._plugin(self.shim.executable, self._lab.nic().name)

    def pods(self, number: int, *, known: bool = False) -> Callable[[], Pod]:
        """Make so many namespaces; the answer gives one after the other, from the first again.

        With many, none is used again before the kernel has done with what was removed from it: in
        one and the same namespace an ADD right after a DEL waits for a grace period of nf_tables,
        which no pod does. `known` ones bear the names of the cluster's pods, again and again.
        """

        def unshare() -> int:
            if _libc.unshare(_CLONE_NEWNET) != 0:
                code = ctypes.get_errno()
                raise OSError(code, f"unshare: {os.strerror(code)}")
            netns = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            self._stack.callback(os.close, netns)
            return netns

        with ThreadPoolExecutor(1) as thread:
            made = cycle([thread.submit(unshare).result() for _ in range(number)])

        def take() -> Pod:
            number = next(self._numbers)
            name = f"pod-{number % PODS_OF_A_NODE}" if known else f"bench-{number}"
            return Pod(next(made), f"bench{number}", name)

        return take

    def environment(self, verb: str, pod: Pod) -> dict[str, str]:
        """What a runtime tells a plugin by variables."""
        return {
            "CNI_COMMAND": verb,
            "CNI_CONTAINERID": pod.container_id,
            "CNI_NETNS": pod.path,
            "CNI_IFNAME": "net1",
            "CNI_PATH": os.path.dirname(MACVLAN),
            # As kubelet's runtimes do.
            "CNI_ARGS": "IgnoreUnknown=1;K8S_POD_NAMESPACE=default"
            f";K8S_POD_NAME={pod.name};K8S_POD_UID=uid-of-{pod.name}",
        }

    def start(self, plugin: Plugin, verb: str, pod: Pod) -> int:
        """Start the plugin; the answer is its process."""
        answer = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        return os.posix_spawn(
            plugin.executable,
            [os.path.basename(plugin.executable)],
            {**self.environment(verb, pod), "EXTBRIDGE_RUN": str(plugin.run_dir)},
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, str(plugin.config), os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, self._answer(pod), answer, 0o600),
            ],
        )

    def finish(self, process: int, pod: Pod) -> None:
        """Wait for the process; raises BenchFailure if it did not succeed."""
        _, status = os.waitpid(process, 0)
        if status != 0:
            raise BenchFailure(Path(self._answer(pod)).read_text(encoding="utf-8"))

    def time(self, plugin: Plugin, verb: str, pod: Pod) -> float:
        """Milliseconds that one run of the plugin takes."""
        return milliseconds(lambda: self.finish(self.start(plugin, verb, pod), pod))

    def time_at_once(self, plugin: Plugin, verb: str, pods: Sequence[Pod]) -> float:
        """Milliseconds from the first start to the last end of a run for each pod, all at once."""

        def at_once() -> None:
            started = [(self.start(plugin, verb, pod), pod) for pod in pods]
            for process, pod in started:
                self.finish(process, pod)

        return milliseconds(at_once)

    def time_command(self, *arguments: str) -> float:
        """Milliseconds that `extbridge` takes as a whole process, the agent being there."""
        return milliseconds(
            lambda: subprocess.run(
                (executable("extbridge"), *arguments),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={**os.environ, "EXTBRIDGE_RUN": str(self.run_dir)},
                check=True,
            )
        )

    def time_start(self, *options: str) -> float:
        """Milliseconds until a further agent, in a folder of its own, says that it serves."""
        with self.further_agent(*options) as (_, took):
            return took

    @contextmanager
    def further_agent(self, *options: str) -> Iterator[tuple[int, float]]:
        """A further agent for the length of the block: its process, and how long it took (ms)."""
        address = self._folder / "notify"
        command = (executable("extbridge"), "agent", "--run-dir", str(self._folder / "further"))
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified, ExitStack() as closing:
            notified.bind(str(address))
            closing.callback(address.unlink)
            notified.settimeout(_START_SECONDS)
            began = time.perf_counter()
            agent = closing.enter_context(
                subprocess.Popen(
                    (*command, *options),
                    stdin=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env={**os.environ, "NOTIFY_SOCKET": str(address)},
                )
            )
            closing.callback(agent.kill)
            if notified.recv(100) != b"READY=1":
                raise BenchFailure("an agent ended before it served")
            yield agent.pid, (time.perf_counter() - began) * 1000

    def ask(self, plugin: Plugin, verb: str, pod: Pod) -> None:
        """Ask the agent without a process, for what need not be timed."""
        environ = self.environment(verb, pod)
        request = wire.encode_request(wire.CNI, environ, plugin.config.read_bytes())
        rides = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [pod.netns]))]
        with socket.socket(socket.AF_UNIX) as agent:
            agent.connect(str(plugin.run_dir / CNI_SOCKET))
            agent.sendmsg([wire.frame_head(request) + request], rides)
            agent.settimeout(0)
            with closing(
                wire.wait_for_frame(
                    agent, limit=wire.MAX_CNI_BYTES, max_fds=0, seconds=_ANSWER_SECONDS
                )
            ) as frame:
                if frame.payload[:4] != bytes(4):
                    raise BenchFailure(frame.payload[4:].decode())

    def _answer(self, pod: Pod) -> str:
        return str(self._folder / pod.container_id)

    def _plugin(self, path: str, nic: str, **keys: str) -> Plugin:
        config = {
            "cniVersion": "1.0.0",
            "name": "bench",
            **(
                {"type": "macvlan", "master": nic, "mode": "bridge"}
                if path == MACVLAN
                else {"type": "extbridge", "extbridge": {"mode": "bridge", "dev": nic}}
            ),
            **keys,
        }
        file = self._folder / f"{'-'.join([os.path.basename(path), nic, *keys])}.json"
        file.write_text(json.dumps(config), encoding="utf-8")
        return Plugin(path, file, nic, self.run_dir)

    def make_cluster(self) -> Kubelet:
        """Have a cluster where the node has all its pods, and a kubelet, which is the answer.

        `in_cluster` is what an agent's options are there, `network` the one that it offers.
        """
        networks = self._folder / "networks"
        networks.mkdir()
        definition = {"extbridge": {"mode": "bridge", "dev": self.shim.nic}}
        self.network = "bench"
        (networks / f"{self.network}.json").write_text(json.dumps(definition), encoding="utf-8")
        kubelet = self._stack.enter_context(Kubelet(self._folder / "kubelet"))
        kubelet.start()
        folder = self._folder / "api"
        folder.mkdir()
        api = self._stack.enter_context(ApiServer(folder))
        for number in range(PODS_OF_A_NODE):
            api.put_pod(
                f"pod-{number}",
                labels={"kubevirt.io": "virt-launcher", "vm.kubevirt.io/name": f"vm-{number}"},
                annotations={f"example.com/{key}": "x" * 200 for key in range(10)},
                managedFields=[{"manager": "kubelet", "fieldsV1": {"f:x" * 100: {}}}] * 3,
            )
        self.in_cluster = (
            *("--kubeconfig", str(api.kubeconfig), "--node-name", NODE),
            *("--networks-dir", str(networks), "--device-plugins", str(kubelet.folder)),
        )
        return kubelet

    def join_cluster(self) -> Plugin:
        """Have a second agent, which belongs to the cluster; `member` is its process.

        The answer is the shim that asks it.
        """
        self.member = self._start_agent(self._folder / "member", *self.in_cluster)
        deadline = time.monotonic() + _START_SECONDS
        while b"are known" not in (self._folder / "member.log").read_bytes():
            if time.monotonic() > deadline:
                raise BenchFailure("the agent does not get to know its pods")
            time.sleep(0.01)
        return replace(self.shim, run_dir=self._folder / "member")

    def _start_agent(self, run_dir: Path, *options: str) -> int:
        file = run_dir.with_suffix(".log")
        log = self._stack.enter_context(file.open("wb"))
        # However this process ends, its agent does not outlive it.
        agent = self._stack.enter_context(
            subprocess.Popen(
                ("setpriv", "--pdeathsig", "KILL", executable("extbridge"),
                 "agent", "--run-dir", str(run_dir), *options),
                stdin=subprocess.DEVNULL,
                stderr=log,
            )
        )  # fmt: skip
        self._stack.callback(agent.kill)
        deadline = time.monotonic() + _START_SECONDS
        while not (run_dir / TAP_SOCKET).exists():
            if agent.poll() is not None or time.monotonic() > deadline:
                raise BenchFailure(file.read_text(encoding="utf-8"))
            time.sleep(0.01)
        return agent.pid


def milliseconds(timed: Callable[[], object]) -> float:
    """How long the call takes."""
    began = time.perf_counter()
    timed()
    return (time.perf_counter() - began) * 1000
