"""The node's agent and its launcher for tests: real processes, in the test's own run folder."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TypeVar

from prometheus_client.parser import text_string_to_metric_families

from extbridge.node import wire
from tests.support import Answer, executable

SECONDS: Final = 30.0
"""For what has to happen; a loaded machine takes its time."""

LIVE: Final = ("sh", "-c", "echo $$; read -r _")
"""A command that says its pid when it has begun, and lives until its standard input ends."""

T = TypeVar("T")


class Agent:
    """`extbridge agent`, which may be started again and again; its log is that of all its lives.

    When the `with` block ends it is stopped, and must have logged no traceback. `wrapper` is the
    command that runs it, when it does not run as it is.
    """

    def __init__(
        self, run_dir: Path, log: Path, *options: str, wrapper: tuple[str, ...] = ()
    ) -> None:
        self.run_dir = run_dir
        self.options = options
        self.wrapper = wrapper
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.kill()
            print(self.log)  # noqa: T201 - for whoever looks into why the test failed
            return
        self.stop()
        assert "Traceback" not in self.log, self.log

    @property
    def log(self) -> str:
        """All that it has logged."""
        return self._log.read_text(encoding="utf-8") if self._log.exists() else ""

    @property
    def pid(self) -> int:
        """The agent's own process, which may be a child of its wrapper's."""
        assert self._process is not None
        children = children_of(self._process.pid)
        return children[0] if children else self._process.pid

    @property
    def has_died(self) -> bool:
        """Whether it has ended by itself."""
        return self._process is not None and self._process.poll() is not None

    @property
    def threads(self) -> list[int]:
        """Its threads, the event loop's first."""
        return sorted(map(int, os.listdir(f"/proc/{self.pid}/task")))

    @property
    def fds(self) -> int:
        """How many fds it has open."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def settled_fds(self) -> int:
        """The same when nothing is under way any more: it answers before it closes."""
        return _settled(lambda: self.fds)

    def settled_threads(self) -> list[int]:
        """Its threads without those that only wait for the kernel to close something."""
        return _settled(lambda: self.threads)

    @property
    def resident_kib(self) -> int:
        """How much memory it has."""
        status = Path(f"/proc/{self.pid}/status").read_text(encoding="ascii")
        return int(status.partition("VmRSS:")[2].split()[0])

    def start(self, fds: tuple[int, ...] = ()) -> Self:
        """Start it, and return when it serves; `fds` are handed down."""
        address = self._log.with_suffix(".notify")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
            notified.bind(str(address))
            notified.settimeout(0.1)
            try:
                self.begin(fds, NOTIFY_SOCKET=str(address))
                until(lambda: self._is_ready(notified))
            finally:
                address.unlink()
        return self

    def begin(self, fds: tuple[int, ...] = (), **environ: str) -> None:
        """Start it, and do not wait."""
        command = (executable("extbridge"), "agent", "--run-dir", str(self.run_dir), *self.options)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                (*self.wrapper, *command),
                stdin=subprocess.DEVNULL,
                stderr=log,
                env={**os.environ, **environ},
                pass_fds=fds,
            )

    def stop(self) -> None:
        """Ask it to end, and see that it does."""
        if self._process is not None:
            os.kill(self.pid, signal.SIGTERM)
            self.end()

    def end(self, status: int = 0) -> None:
        """Wait until it has ended, as it should."""
        assert self._process is not None
        ended = self._process.wait(SECONDS)
        self._process = None
        assert ended == status, self.log

    def kill(self) -> None:
        """Kill it, as the kernel would for want of memory; nothing, if it does not run."""
        if self._process is not None:
            os.kill(self.pid, signal.SIGKILL)
            self._process.wait(SECONDS)
            self._process = None

    def metrics(self) -> Counter[str]:
        """Its metrics' values, by name and by name{label=value,...}."""
        with socket.socket(socket.AF_UNIX) as scraped:
            scraped.settimeout(SECONDS)
            scraped.connect(str(self.run_dir / "metrics.sock"))
            scraped.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            head, _, body = b"".join(iter(lambda: scraped.recv(1 << 16), b"")).partition(
                b"\r\n\r\n"
            )
        assert head.startswith(b"HTTP/1.0 200 OK\r\n")
        assert f"Content-Length: {len(body)}" in head.decode()
        values: Counter[str] = Counter()
        for family in text_string_to_metric_families(body.decode()):
            for sample in family.samples:
                labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
                values[f"{sample.name}{{{labels}}}" if labels else sample.name] = int(sample.value)
        return values

    def counts(self, expected: Mapping[str, int]) -> None:
        """See that its metrics come to have these values: it counts when it has answered."""
        deadline = time.monotonic() + SECONDS
        while True:
            metrics = self.metrics()
            found = {name: metrics[f"extbridge_{name}"] for name in expected}
            if found == expected or time.monotonic() > deadline:
                break
            time.sleep(0.02)
        assert found == expected

    def _is_ready(self, notified: socket.socket) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.log
        try:
            return notified.recv(100) == b"READY=1"
        except TimeoutError:
            return False


@dataclass(frozen=True, slots=True)
class Launcher:
    """`extbridge-exec`, as a VM's container runs it; `wrapper` is what it is run by, if anything.

    A pod is the path of its namespace; empty, the launcher runs on the node itself.
    """

    run_dir: Path
    wrapper: tuple[str, ...] = ()

    def start(self, pod: str, *command: str, **environ: str) -> subprocess.Popen[str]:
        """Start it with pipes, and do not wait."""
        inside = ("nsenter", f"--net={pod}", "--") if pod else ()
        return subprocess.Popen(
            (*inside, *self.wrapper, str(self.run_dir / "pod/extbridge-exec"), *command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "EXTBRIDGE_RUN": str(self.run_dir), **environ},
        )

    def __call__(self, pod: str, *command: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """Run it to its end."""
        with self.start(pod, *command, **environ) as process:
            stdout, stderr = process.communicate(timeout=SECONDS)
        return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)

    def printed(self, pod: str, *arguments: str, **environ: str) -> list[str]:
        """The arguments, filled in, of a command that it ran."""
        done = self(pod, "printf", "%s\\n", *arguments, **environ)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    def refusal(self, pod: str, *command: str, **environ: str) -> str:
        """The sentence with which it ended, having run nothing."""
        done = self(pod, *(command or ("echo", "ran")), **environ)
        assert (done.returncode, done.stdout) == (125, "")
        return done.stderr

    @contextmanager
    def holding(self, pod: str, **environ: str) -> Iterator[int]:
        """A process that has the pod's taps for the length of the block; its pid."""
        with self.start(pod, *LIVE, **environ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            said = process.stdout.readline()
            assert said == f"{process.pid}\n", process.stderr.read()
            yield process.pid


def connected(path: Path) -> socket.socket:
    """A connection to the socket at the path."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.settimeout(SECONDS)
        connection.connect(str(path))
    except BaseException:
        connection.close()
        raise
    return connection


def ask(
    connection: socket.socket,
    environ: Mapping[str, str],
    config: Mapping[str, object],
    *,
    netns: str = "",
) -> None:
    """Send a CNI request as the shim does, with the namespace if its path is given."""
    ours = {name: value for name, value in environ.items() if name.startswith("CNI_")}
    payload = wire.encode_request(wire.CNI, ours, json.dumps(config).encode())
    fds = [os.open(netns, os.O_RDONLY | os.O_CLOEXEC)] if netns else []
    try:
        socket.send_fds(connection, [wire.frame_head(payload) + payload], fds)
    finally:
        for fd in fds:
            os.close(fd)


def answer_on(connection: socket.socket) -> Answer:
    """The answer to a CNI request."""
    connection.settimeout(0)
    frame = wire.wait_for_frame(connection, limit=wire.MAX_CNI_BYTES, max_fds=0, seconds=SECONDS)
    with closing(frame):
        status, stdout = int.from_bytes(frame.payload[:4], "little"), frame.payload[4:]
        return Answer(status, json.loads(stdout) if stdout else None, "")


def until(found: Callable[[], T | None]) -> T:
    """What is found as soon as it is true; fails when that takes too long."""
    deadline = time.monotonic() + SECONDS
    while not (what := found()):
        assert time.monotonic() < deadline, f"it does not become true: {what!r}"
        time.sleep(0.02)
    return what


def _settled(reading: Callable[[], T]) -> T:
    """What is read when it has been the same for a while."""
    before: list[T] = []
    while before[-10:] != [latest := reading()] * 10:
        assert len(before) < 1000, before
        before.append(latest)
        time.sleep(0.01)
    return latest


def children_of(pid: int) -> list[int]:
    """What the process's first thread has started."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
    return [int(child) for child in children.split()]
