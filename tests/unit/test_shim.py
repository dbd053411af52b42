"""That shim and launcher carry what they are given, and know what to say when nobody answers.

The agent here is the test's own: plain sockets, after docs/protocol.md, that misbehave on demand.
"""

from __future__ import annotations

import array
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from extbridge.client import take_taps
from extbridge.demo.lab import Lab, run
from extbridge.node.install import install_launcher, install_shim
from extbridge.spec import versions
from tests.support import executable, require

SOURCE = Path(__file__).parents[2] / "cni/shim/extbridge.c"

SECONDS = 30
"""For what has to happen; the wheel's shim waits for an answer twice as long."""

MIB = 1 << 20
KIB = 1 << 10
SANITIZERS = {"ASAN_OPTIONS": "exitcode=99:detect_leaks=0", "UBSAN_OPTIONS": "exitcode=99"}
CONFIG = b'{"cniVersion": "1.1.0", "name": "vepanet", "type": "extbridge"}\n\0 \xff'
AGENTLESS = {"ADD": 11, "CHECK": 11, "GC": 11, "STATUS": 50, "": 11}


@dataclass(frozen=True, slots=True)
class Ended:
    """How a process ended, and what it said."""

    status: int
    stdout: bytes
    stderr: str

    @property
    def code(self) -> object:
        """The code of the CNI error that a shim ended with."""
        assert self.status == 1, self
        error = json.loads(self.stdout)
        assert set(error) == {"cniVersion", "code", "msg"}
        assert error["cniVersion"] == versions.NEWEST
        return error["code"]

    @property
    def refusal(self) -> str:
        """The sentence that a launcher ended with, which ran nothing."""
        assert self.status == 125, self
        assert self.stdout == b""
        assert self.stderr.startswith("extbridge-exec: ")
        assert self.stderr.endswith("\n")
        return self.stderr


@dataclass(slots=True)
class Started:
    """A shim or launcher that runs."""

    process: subprocess.Popen[bytes]

    def give(self, stdin: bytes) -> None:
        """Write all of its standard input, and end it."""
        assert self.process.stdin is not None
        with self.process.stdin as pipe:
            pipe.write(stdin)
        self.process.stdin = None

    def end(self) -> Ended:
        """Wait for it, without writing."""
        stdout, stderr = self.process.communicate(timeout=SECONDS)
        assert self.process.returncode != 99, stderr.decode()
        return Ended(self.process.returncode, stdout, stderr.decode())


@dataclass(frozen=True, slots=True)
class Programs:
    """The shim and the launcher of one build, working in one run folder."""

    folder: Path
    run_dir: Path

    def environment(self, verb: str, variables: Mapping[str, str]) -> dict[str, str]:
        """What a runtime sets, and some that the agent must not get."""
        asked = {
            "CNI_COMMAND": verb,
            "CNI_CONTAINERID": "container-1",
            "CNI_NETNS": "",
            "CNI_IFNAME": "net1",
            "CNI_ARGS": "K8S_POD_NAME=blue;ODD=\udcff=\n",
        }
        return {
            "XCNI_COMMAND": "1",
            "CNI": "2",
            "PATH": os.environ["PATH"],
            "EXTBRIDGE_RUN": str(self.run_dir),
            **SANITIZERS,
            **{name: value for name, value in asked.items() if value or name != "CNI_COMMAND"},
            **variables,
        }

    def start(self, verb: str, stdin: bytes | None = CONFIG, **variables: str) -> Started:
        """Start the shim as a runtime does; None leaves its standard input open."""
        started = Started(
            subprocess.Popen(
                [self.folder / "extbridge"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=self.environment(verb, variables),
            )
        )
        if stdin is not None:
            started.give(stdin)
        return started

    def launch(self, *argv: str, fds: Sequence[int] = (), **variables: str) -> Started:
        """Start the launcher."""
        return Started(
            subprocess.Popen(
                [self.folder / "extbridge-exec", *argv],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={
                    "EXTBRIDGE_RUN": str(self.run_dir),
                    "PATH": os.environ["PATH"],
                    "CNI_COMMAND": "ADD",
                    **SANITIZERS,
                    **variables,
                },
                pass_fds=fds,
            )
        )

    def spooled(self) -> list[bytes]:
        """What lies in the spool; fails where a draft is left, or a mode is not the protocol's."""
        contents = []
        for path in (self.run_dir / "spool").iterdir():
            assert not path.name.startswith(".")
            assert path.stat().st_mode & 0o7777 == 0o600
            contents.append(path.read_bytes())
        return contents


@dataclass(frozen=True, slots=True)
class Request:
    """A request as it arrived, without its length."""

    payload: bytes
    fds: list[int] = field(default_factory=list)


class Connection:
    """The agent's end of a connection; it owns what it gets."""

    def __init__(self, socket_: socket.socket) -> None:
        self.socket = socket_
        self.socket.settimeout(SECONDS)
        self._fds: list[int] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.socket.close()
        while self._fds:
            os.close(self._fds.pop())

    def request(self) -> Request:
        """The request that has to come."""
        head, fds, _, _ = socket.recv_fds(self.socket, 4, 8)
        self._fds += fds
        while len(head) < 4:
            head += self.socket.recv(4 - len(head))
        (length,) = struct.unpack("<I", head)
        payload = b""
        while len(payload) < length:
            more = self.socket.recv(length - len(payload))
            assert more, "the request ended early"
            payload += more
        return Request(payload, fds)

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send the bytes, the fds on the first of them."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        left = data[self.socket.sendmsg([data], rights) :]
        # Also to send nothing would fail where the other side has all and is gone.
        if left:
            self.socket.sendall(left)

    def answer(self, status: int = 0, stdout: bytes = b"") -> None:
        """Answer a CNI request as the protocol has it."""
        self.send(framed(struct.pack("<I", status) + stdout))


@contextmanager
def listening(path: Path, backlog: int = 128) -> Iterator[Callable[[], Connection]]:
    """An agent's socket; what is yielded accepts a connection."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(backlog)
        listener.settimeout(SECONDS)
        yield lambda: Connection(listener.accept()[0])
        # Whoever was expected has come; nobody else has.
        listener.settimeout(0)
        with pytest.raises(BlockingIOError):
            listener.accept()


def framed(payload: bytes) -> bytes:
    """The payload with its length."""
    return struct.pack("<I", len(payload)) + payload


def tap_answer(numbers: Sequence[int], *command: str, status: int = 0) -> bytes:
    """A frame of the answer to a launcher."""
    rest = b"".join(argument.encode() + b"\0" for argument in command)
    return framed(struct.pack(f"<II{len(numbers)}I", status, len(numbers), *numbers) + rest)


def cni_request(environ: Mapping[str, str], stdin: bytes) -> bytes:
    """The payload that the protocol wants for this environment and standard input."""
    variables = (f"{key}={value}" for key, value in environ.items() if key.startswith("CNI_"))
    return b"xb\x01C" + b"".join(os.fsencode(item) + b"\0" for item in variables) + b"\0" + stdin


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the executables that the package carries."""
    folder = tmp_path_factory.mktemp("wheel")
    install_shim(folder)
    return folder


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same compiled to find its own mistakes, and with a tenth of the patience."""
    require("gcc")
    folder = tmp_path_factory.mktemp("sanitized")
    flags = ["-std=c11", "-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    run("gcc", *flags, "-DSECOND=100", "-o", str(folder / "extbridge"), str(SOURCE))
    shutil.copy(folder / "extbridge", folder / "extbridge-exec")
    return folder


@pytest.fixture(params=["wheels", "sanitized"])
def programs(request: pytest.FixtureRequest, run_dir: Path) -> Programs:
    """Both builds in turn."""
    return Programs(request.getfixturevalue(request.param), run_dir)


@pytest.fixture
def patient(wheels: Path, run_dir: Path) -> Programs:
    """The wheel's, whose deadlines are the protocol's: for a test that makes them wait."""
    return Programs(wheels, run_dir)


@pytest.fixture
def impatient(sanitized: Path, run_dir: Path) -> Programs:
    """The sanitized ones, for a test that lets a deadline pass."""
    return Programs(sanitized, run_dir)


@pytest.fixture
def cni_socket(run_dir: Path) -> Path:
    return run_dir / "cni.sock"


@pytest.fixture
def tap_socket(run_dir: Path) -> Path:
    return run_dir / "pod/tap.sock"


@contextmanager
def small_tmpfs(folder: Path, size: str) -> Iterator[None]:
    """A file system of so many bytes, mounted at the folder."""
    folder.mkdir(exist_ok=True)
    run("mount", "-t", "tmpfs", "-o", f"mode=0700,size={size}", "extbridge-test", str(folder))
    try:
        yield
    finally:
        run("umount", str(folder))


@contextmanager
def umask(mask: int) -> Iterator[None]:
    """What is started or made meanwhile has this umask."""
    former = os.umask(mask)
    try:
        yield
    finally:
        os.umask(former)


# The shim and an agent that answers.


@pytest.mark.parametrize("verb", ["ADD", "DEL", "CHECK", "GC", "STATUS", "NONSENSE", ""])
def test_request_arrives_as_it_was_given(programs: Programs, cni_socket: Path, verb: str) -> None:
    """The agent gets every CNI_ variable and standard input byte for byte, and nothing else."""
    with listening(cni_socket) as accept:
        started = programs.start(verb)
        with accept() as connection:
            request = connection.request()
            connection.answer()
        assert started.end() == Ended(0, b"", "")
    assert request == Request(cni_request(programs.environment(verb, {}), CONFIG))


@pytest.mark.parametrize("status", [0, 1, 255])
@pytest.mark.parametrize("stdout", [b"", b'{"a": "\xff\0"}\n', bytes(range(256)) * 4096])
def test_answer_is_passed_on(
    programs: Programs, cni_socket: Path, status: int, stdout: bytes
) -> None:
    """Exit status and standard output are the agent's, also a megabyte of it."""
    with listening(cni_socket) as accept:
        started = programs.start("ADD")
        with accept() as connection:
            connection.request()
            connection.answer(status, stdout)
        assert started.end() == Ended(status, stdout, "")


def test_longest_answer_passes(programs: Programs, cni_socket: Path) -> None:
    """An answer may be as long as the protocol says."""
    with listening(cni_socket) as accept:
        started = programs.start("ADD")
        with accept() as connection:
            connection.request()
            connection.answer(0, b"x" * (2 * MIB - 4))
        assert len(started.end().stdout) == 2 * MIB - 4


def test_answer_byte_by_byte(programs: Programs, cni_socket: Path) -> None:
    """An answer that trickles in is the same answer."""
    with listening(cni_socket) as accept:
        started = programs.start("ADD")
        with accept() as connection:
            connection.request()
            for byte in framed(struct.pack("<I", 3) + b"slowly"):
                connection.send(bytes([byte]))
        assert started.end() == Ended(3, b"slowly", "")


def test_namespace_is_handed_over(programs: Programs, cni_socket: Path, lab: Lab) -> None:
    """The agent gets the pod's namespace itself, whether or not it can see the path."""
    pod = lab.pod("blue")
    with listening(cni_socket) as accept:
        started = programs.start("ADD", CNI_NETNS=pod)
        with accept() as connection:
            [netns] = connection.request().fds
            assert os.path.samestat(os.fstat(netns), os.stat(pod))
            connection.answer()
        assert started.end().status == 0


@pytest.mark.parametrize("there", [False, True])
def test_odd_namespace_does_not_hang(
    programs: Programs, cni_socket: Path, tmp_path: Path, *, there: bool
) -> None:
    """A path that is nothing, or a pipe that nobody writes to, reaches the agent, who judges it."""
    path = tmp_path / "netns"
    if there:
        os.mkfifo(path)
    with listening(cni_socket) as accept:
        started = programs.start("DEL", CNI_NETNS=str(path))
        with accept() as connection:
            request = connection.request()
            connection.answer()
        assert started.end().status == 0
    assert len(request.fds) == there
    assert f"CNI_NETNS={path}\0".encode() in request.payload


@pytest.mark.parametrize("size", [0, MIB])
def test_stdin_up_to_a_mebibyte(programs: Programs, cni_socket: Path, size: int) -> None:
    """Standard input may be as long as the protocol says."""
    stdin = os.urandom(size)
    with listening(cni_socket) as accept:
        started = programs.start("ADD", stdin)
        with accept() as connection:
            assert connection.request().payload.endswith(b"\0\0" + stdin)
            connection.answer()
        assert started.end().status == 0


@pytest.mark.parametrize("verb", ["ADD", "DEL", ""])
def test_longer_stdin_is_refused(programs: Programs, cni_socket: Path, verb: str) -> None:
    """Standard input that is too long is error 6, and no part of it reaches the agent."""
    with listening(cni_socket):
        assert programs.start(verb, b"x" * (MIB + 1)).end().code == 6


@pytest.mark.parametrize(("more", "fits"), [(0, True), (1, False)])
def test_environment_up_to_its_room(
    programs: Programs, cni_socket: Path, more: int, *, fits: bool
) -> None:
    """The CNI_ variables have the mebibyte that standard input leaves; longer is error 4."""
    room = MIB - 1 + more - len(cni_request(programs.environment("ADD", {}), b""))
    filled = {f"CNI_{n}": "x" * (100 * KIB - 7) for n in range(room // (100 * KIB))}
    filled["CNI_X"] = "x" * (room % (100 * KIB) - 7)
    with listening(cni_socket) as accept:
        started = programs.start("ADD", b"y" * MIB, **filled)
        if not fits:
            assert started.end().code == 4
            return
        with accept() as connection:
            assert len(connection.request().payload) == 2 * MIB - 1
            connection.answer()
        assert started.end().status == 0


@pytest.mark.parametrize("name", ["cni.sock", "pod/tap.sock"])
def test_run_folder_up_to_a_sockets_name(programs: Programs, tmp_path: Path, name: str) -> None:
    """A run folder whose sockets' names the kernel can take works; a longer one is named."""
    room = 107 - len(f"{tmp_path}//{name}")
    longest, too_long = tmp_path / ("x" * room), tmp_path / ("x" * (room + 1))
    with listening(longest / name) as accept:
        at_longest = Programs(programs.folder, longest)
        started = at_longest.start("ADD") if name == "cni.sock" else at_longest.launch("true")
        with accept() as connection:
            connection.request()
            connection.send(tap_answer([], "true") if "tap" in name else framed(b"\0\0\0\0"))
        assert started.end().status == 0
    at_too_long = Programs(programs.folder, too_long)
    if name == "cni.sock":
        refused = at_too_long.start("DEL").end()
        assert refused.code == 4
        assert b"EXTBRIDGE_RUN" in refused.stdout
    else:
        assert "EXTBRIDGE_RUN" in at_too_long.launch("true").end().refusal


@pytest.mark.parametrize("given", [{}, {"EXTBRIDGE_RUN": ""}])
def test_run_folder_where_none_is_named(impatient: Programs, given: dict[str, str]) -> None:
    """Without EXTBRIDGE_RUN, or with an empty one, all is in /run/extbridge."""
    environ = impatient.environment("DEL", {})
    del environ["EXTBRIDGE_RUN"]
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c",
         'mount -t tmpfs none /run && "$0" </dev/null && ls -d /run/extbridge/spool/*',
         impatient.folder / "extbridge"],
        env={**environ, **given}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("/run/extbridge/spool/")


@pytest.mark.parametrize("stdin", [b"", CONFIG, b"x" * (MIB + 1)])
def test_version_always_answers(programs: Programs, stdin: bytes) -> None:
    """VERSION lists what the package speaks, whatever comes in and whoever is away."""
    for variables in ({}, {"EXTBRIDGE_RUN": "x" * 200}):
        ended = programs.start("VERSION", stdin, **variables).end()
        assert (ended.status, ended.stderr) == (0, "")
        assert json.loads(ended.stdout) == versions.report_versions(versions.NEWEST)
    assert not programs.run_dir.exists()


def test_runs_without_any_library(wheels: Path, tmp_path: Path) -> None:
    """The wheel's executable needs nothing of the host or the container that it runs in."""
    shutil.copy(wheels / "extbridge", tmp_path / "extbridge")
    done = subprocess.run(
        ["chroot", tmp_path, "/extbridge"],
        env={"PATH": os.environ["PATH"], "CNI_COMMAND": "VERSION"},
        stdin=subprocess.DEVNULL, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["supportedVersions"] == list(versions.SUPPORTED)


# The shim and an agent that is away, or does not keep to the protocol.


def test_no_agent(programs: Programs) -> None:
    """Without an agent each verb ends as the protocol's table says, and a DEL is not lost."""
    started = {verb: programs.start(verb) for verb in AGENTLESS}
    with umask(0):
        deleting = programs.start("DEL")
    launching = programs.launch("echo", "ran")
    assert {verb: one.end().code for verb, one in started.items()} == AGENTLESS
    assert deleting.end() == Ended(0, b"", "")
    assert "agent" in launching.end().refusal
    assert programs.spooled() == [cni_request(programs.environment("DEL", {}), CONFIG)]
    for folder in (programs.run_dir, programs.run_dir / "spool"):
        assert folder.stat().st_mode & 0o7777 == 0o700


def test_agent_that_comes_late(patient: Programs, cni_socket: Path, tap_socket: Path) -> None:
    """An agent that is just starting is waited for."""
    started = [patient.start(verb) for verb in ("ADD", "DEL")]
    launched = patient.launch("echo", "ran")
    time.sleep(0.2)
    with listening(cni_socket) as accept:
        for _ in started:
            with accept() as connection:
                connection.request()
                connection.answer(0, b"done")
        assert [one.end() for one in started] == [Ended(0, b"done", "")] * 2
    with listening(tap_socket) as accept, accept() as connection:
        connection.request()
        connection.send(tap_answer([], "echo", "ran"))
        assert launched.end().stdout == b"ran\n"


def fill_queue(path: Path, filled: ExitStack) -> int:
    """Connect until the kernel takes no more; how often it did."""
    for taken in range(100):
        one = filled.enter_context(socket.socket(socket.AF_UNIX))
        one.settimeout(0)
        try:
            one.connect(str(path))
        except BlockingIOError:
            return taken
    pytest.fail("the queue has no end")


def test_full_queue_is_waited_for(patient: Programs, cni_socket: Path) -> None:
    """An agent with more callers than it can take at once still gets the request."""
    with listening(cni_socket, backlog=0) as accept, ExitStack() as filled:
        taken = fill_queue(cni_socket, filled)
        started = patient.start("ADD")
        time.sleep(0.2)
        for _ in range(taken):
            filled.enter_context(accept())
        with accept() as connection:
            connection.request()
            connection.answer()
        assert started.end().status == 0


def test_queue_that_stays_full(impatient: Programs, cni_socket: Path) -> None:
    """An agent that takes no caller is as good as none."""
    with listening(cni_socket, backlog=0) as accept, ExitStack() as filled:
        taken = fill_queue(cni_socket, filled)
        started = [impatient.start(verb) for verb in ("ADD", "STATUS")]
        deleting = impatient.start("DEL")
        assert [one.end().code for one in started] == [11, 50]
        assert deleting.end().status == 0
        for _ in range(taken):
            accept().socket.close()
    assert len(impatient.spooled()) == 1


def test_silent_agent(impatient: Programs, cni_socket: Path, tap_socket: Path) -> None:
    """An agent that takes the request and says nothing is given up."""
    with listening(cni_socket) as accept, listening(tap_socket) as accept_launcher:
        started = [impatient.start(verb) for verb in ("ADD", "STATUS", "DEL")]
        launched = impatient.launch("echo", "ran")
        with accept() as first, accept(), accept(), accept_launcher():
            first.request()
            ended = [one.end() for one in started]
            assert [one.code for one in ended[:2]] == [11, 50]
            assert ended[2] == Ended(0, b"", "")
            assert "agent" in launched.end().refusal
    assert len(impatient.spooled()) == 1


def hang_up_at_once(connection: Connection) -> None:
    connection.socket.close()


def hang_up(connection: Connection) -> None:
    connection.request()
    connection.socket.close()


def hang_up_within_the_length(connection: Connection) -> None:
    connection.request()
    connection.send(framed(b"\0\0\0\0")[:3])
    connection.socket.close()


def hang_up_within_the_answer(connection: Connection) -> None:
    connection.request()
    connection.send(framed(b"\0\0\0\0" + b"half")[:-1])
    connection.socket.close()


def send_instead(data: bytes) -> Callable[[Connection], None]:
    """Send the bytes for an answer, and keep the connection."""

    def misbehave(connection: Connection) -> None:
        connection.request()
        connection.send(data)

    return misbehave


def send_fds_at(offset: int, number: int, data: bytes) -> Callable[[Connection], None]:
    """Send the answer with so many fds on the byte at the offset."""

    def misbehave(connection: Connection) -> None:
        connection.request()
        connection.send(data[:offset])
        with open("/dev/null", "rb") as null:
            connection.send(data[offset:], [null.fileno()] * number)

    return misbehave


MISBEHAVIOURS: dict[str, Callable[[Connection], None]] = {
    "hangs up at once": hang_up_at_once,
    "hangs up": hang_up,
    "hangs up within the length": hang_up_within_the_length,
    "hangs up within the answer": hang_up_within_the_answer,
    "is too long": send_instead(struct.pack("<I", 2 * MIB + 1)),
    "is far too long": send_instead(b"\xff\xff\xff\xff"),
    "speaks HTTP": send_instead(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
    "is empty": send_instead(framed(b"")),
    "is too short": send_instead(framed(b"\0\0\0")),
    "has no exit status": send_instead(framed(b"\0\1\0\0")),
    "has a negative exit status": send_instead(framed(b"\xff\xff\xff\xff")),
    "has an fd": send_fds_at(0, 1, framed(b"\0\0\0\0")),
    "has 250 fds": send_fds_at(0, 250, framed(b"\0\0\0\0")),
    "has a late fd": send_fds_at(3, 1, framed(b"\0\0\0\0")),
}


@pytest.mark.parametrize("how", MISBEHAVIOURS)
def test_agent_that_misbehaves(programs: Programs, cni_socket: Path, how: str) -> None:
    """What is no answer is none, for the runtime too; a DEL is asked again until there is one."""
    with listening(cni_socket) as accept:
        for verb, code in AGENTLESS.items():
            started = programs.start(verb)
            with accept() as connection:
                MISBEHAVIOURS[how](connection)
                assert started.end().code == code
        namespace = "/proc/self/ns/net"
        started = programs.start("DEL", CNI_NETNS=namespace)
        with accept() as connection:
            MISBEHAVIOURS[how](connection)
            with accept() as again:
                request = again.request()
                again.answer()
                assert started.end().status == 0
    environ = programs.environment("DEL", {"CNI_NETNS": namespace})
    assert request.payload == cni_request(environ, CONFIG)
    assert len(request.fds) == 1
    assert not (programs.run_dir / "spool").exists()


def test_del_from_an_agent_that_dies_each_time(impatient: Programs, cni_socket: Path) -> None:
    """A DEL that no agent lives to answer is spooled, once."""
    with ExitStack() as closing:
        accept = closing.enter_context(listening(cni_socket))
        started = impatient.start("DEL")
        # Every connection until the shim gives up: it waits between two, and not for ever.
        for _ in range(1000):
            with accept() as connection:
                hang_up(connection)
            time.sleep(0.05)
            if started.process.poll() is not None:
                break
        assert started.end() == Ended(0, b"", "")
    assert impatient.spooled() == [cni_request(impatient.environment("DEL", {}), CONFIG)]


def test_stdin_that_does_not_end(impatient: Programs) -> None:
    """A runtime that keeps standard input open gets an error, and VERSION's answer all the same."""
    started = [impatient.start(verb, None) for verb in ("ADD", "DEL", "VERSION")]
    for one in started:
        one.process.wait(SECONDS)
        assert one.process.stdin is not None
        one.process.stdin.close()
        one.process.stdin = None
    added, deleted, version = (one.end() for one in started)
    assert (added.code, deleted.code) == (5, 5)
    assert json.loads(version.stdout)["supportedVersions"] == list(versions.SUPPORTED)


def test_stdout_that_nobody_reads(impatient: Programs, cni_socket: Path) -> None:
    """A result that cannot be delivered is a failure, and no hanging process."""
    with listening(cni_socket) as accept:
        started = impatient.start("ADD")
        with accept() as connection:
            connection.request()
            connection.answer(0, b"x" * MIB)
            assert started.process.wait(SECONDS) == 1
        assert started.end().stdout == b"x" * (64 * KIB)


@pytest.mark.parametrize("verb", ["VERSION", "NONSENSE"])
def test_stdout_that_takes_nothing(impatient: Programs, verb: str) -> None:
    """An answer that cannot be written is no success."""
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [impatient.folder / "extbridge"],
            env=impatient.environment(verb, {}), input=CONFIG, stdout=full, check=False,
        )  # fmt: skip
    assert done.returncode == 1


# The spool.


def test_spools_what_the_agent_would_have_got(impatient: Programs, lab: Lab) -> None:
    """A spooled DEL is the whole request, of the greatest length too."""
    stdin, pod = os.urandom(MIB), lab.pod("blue")
    assert impatient.start("DEL", stdin, CNI_NETNS=pod).end().status == 0
    environ = impatient.environment("DEL", {"CNI_NETNS": pod})
    assert impatient.spooled() == [cni_request(environ, stdin)]


def test_dels_at_once_are_all_spooled(impatient: Programs) -> None:
    """No DEL takes another's place in the spool."""
    names = [f"container-{n}" for n in range(24)]
    started = [impatient.start("DEL", CNI_CONTAINERID=name) for name in names]
    assert [one.end().status for one in started] == [0] * len(names)
    expected = [
        cni_request(impatient.environment("DEL", {"CNI_CONTAINERID": name}), CONFIG)
        for name in names
    ]
    assert sorted(impatient.spooled()) == sorted(expected)


def spool_traced(programs: Programs, log: Path, *options: str) -> Ended:
    """A DEL without an agent, under strace."""
    done = subprocess.run(
        [require("strace"), "-y", "-o", log, *options, programs.folder / "extbridge"],
        env=programs.environment("DEL", {}), input=CONFIG, capture_output=True, check=False,
    )  # fmt: skip
    return Ended(done.returncode, done.stdout, done.stderr.decode())


def test_spool_outlives_the_machine(impatient: Programs, tmp_path: Path) -> None:
    """What is in the spool was on the disk before it had its name, and its name is there too."""
    log = tmp_path / "log"
    traced = "trace=?open,?openat,fsync,?rename,?renameat,?renameat2"
    assert spool_traced(impatient, log, "-e", traced).status == 0
    spool = f"{impatient.run_dir}/spool"
    calls = [line for line in log.read_text().splitlines() if spool in line]
    in_order = [r"O_DIRECTORY", r"O_EXCL.* 0600", r"^fsync\(.*/\.[^/]*>\)", r"^rename", r"^fsync\("]
    assert len(calls) == len(in_order)
    for line, pattern in zip(calls, in_order, strict=True):
        assert re.search(pattern, line), line


@pytest.mark.parametrize("fault", ["fsync:error=EIO:when=1", "/^rename:error=EIO"])
def test_spool_that_fails_is_told(impatient: Programs, tmp_path: Path, fault: str) -> None:
    """A DEL that may not have reached the disk fails with error 5 and leaves no half of itself."""
    ended = spool_traced(impatient, tmp_path / "log", "-e", f"inject={fault}")
    assert ended.code == 5
    assert impatient.spooled() == []


def test_full_spool_is_told(impatient: Programs) -> None:
    """A DEL for which there is no room fails with error 5 and leaves no half of itself."""
    with small_tmpfs(impatient.run_dir, "128k"):
        assert impatient.start("DEL", b"x" * MIB).end().code == 5
        assert impatient.spooled() == []


def test_read_only_spool_is_told(impatient: Programs) -> None:
    """A DEL that may not be written fails with error 5."""
    with small_tmpfs(impatient.run_dir, "1m"):
        run("mount", "-o", "remount,ro", str(impatient.run_dir))
        assert impatient.start("DEL").end().code == 5


# The launcher.


@contextmanager
def taps(number: int) -> Iterator[list[int]]:
    """So many fds that can be told apart by their inodes."""
    with ExitStack() as closing:
        fds = []
        for n in range(number):
            fds.append(os.memfd_create(f"tap{n}"))
            closing.callback(os.close, fds[-1])
        yield fds


def open_files(started: Started) -> dict[int, int]:
    """The inodes under the numbers that the `cat` which was launched has open, but 0, 1 and 2."""
    process = started.process
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"ready\n")
    process.stdin.flush()
    # What cat repeats was read after the exec.
    assert process.stdout.readline() == b"ready\n"
    folder = f"/proc/{process.pid}/fd"
    numbers = sorted(int(number) for number in os.listdir(folder))
    assert numbers[:3] == [0, 1, 2]
    return {number: os.stat(f"{folder}/{number}").st_ino for number in numbers[3:]}


def test_launchers_request(programs: Programs, tap_socket: Path) -> None:
    """The agent gets the command and the EXTBRIDGE_ variables, and nothing else."""
    with listening(tap_socket) as accept:
        launched = programs.launch("qemu", "", "a b\n", "\udcff", EXTBRIDGE_MODEL="e1000")
        with accept() as connection:
            request = connection.request()
            connection.send(tap_answer([], "true"))
        assert launched.end() == Ended(0, b"", "")
    environ = f"EXTBRIDGE_RUN={programs.run_dir}\0EXTBRIDGE_MODEL=e1000\0\0"
    assert request == Request(b"xb\1T" + environ.encode() + b"qemu\0\0a b\n\0\xff\0")


def test_runs_what_the_agent_says(programs: Programs, tap_socket: Path) -> None:
    """The command is the agent's, empty arguments included; environment and status are as ever."""
    script = 'printf "<%s>" "$@"; printf "%s" "$EXTBRIDGE_MODEL$CNI_COMMAND"; exit 7'
    with listening(tap_socket) as accept:
        launched = programs.launch("other", EXTBRIDGE_MODEL="e1000-")
        with accept() as connection:
            connection.request()
            connection.send(tap_answer([], "sh", "-c", script, "sh", "", "a b", ""))
        assert launched.end() == Ended(7, b"<><a b><>e1000-ADD", "")


@pytest.mark.parametrize("slowly", [False, True])
def test_taps_get_their_numbers(programs: Programs, tap_socket: Path, *, slowly: bool) -> None:
    """The command has the taps under the numbers it was told, and no other fd of the launcher."""
    with listening(tap_socket) as accept, taps(3) as fds:
        launched = programs.launch("cat")
        with accept() as connection:
            connection.request()
            frame = tap_answer([100, 101, 205], "cat")
            connection.send(frame[:1] if slowly else frame, fds)
            for byte in frame[1:] if slowly else b"":
                connection.send(bytes([byte]))
            inodes = [os.fstat(fd).st_ino for fd in fds]
            assert open_files(launched) == dict(zip([100, 101, 205], inodes, strict=True))
        assert launched.end().status == 0


def test_many_taps_in_many_frames(programs: Programs, tap_socket: Path) -> None:
    """Two NICs with 256 queues each arrive, though those that come lie where others must go."""
    expected: dict[int, int] = {}
    with listening(tap_socket) as accept:
        launched = programs.launch("cat")
        with accept() as connection:
            connection.request()
            for numbers in (range(100, 350), range(350, 600), range(600, 612)):
                with taps(len(numbers)) as fds:
                    command = ["cat"] if 611 in numbers else []
                    connection.send(tap_answer(numbers, *command), fds)
                    inodes = [os.fstat(fd).st_ino for fd in fds]
                    expected |= dict(zip(numbers, inodes, strict=True))
            assert open_files(launched) == expected
        assert launched.end().status == 0


def test_command_after_the_last_tap(programs: Programs, tap_socket: Path) -> None:
    """The frame with the command may be one without taps."""
    with listening(tap_socket) as accept, taps(1) as fds:
        launched = programs.launch("cat")
        with accept() as connection:
            connection.request()
            connection.send(tap_answer([100]), fds)
            connection.send(tap_answer([], "cat"))
            assert open_files(launched) == {100: os.fstat(fds[0]).st_ino}
        assert launched.end().status == 0


def test_inherited_fds_stay(programs: Programs, tap_socket: Path) -> None:
    """What the container's runtime gave the launcher is the command's too, where it was."""
    with listening(tap_socket) as accept, taps(2) as (given, tap):
        os.dup2(given, 102)
        try:
            launched = programs.launch("cat", fds=[102])
        finally:
            os.close(102)
        with accept() as connection:
            connection.request()
            connection.send(tap_answer([101], "cat"), [tap])
            inodes = {101: os.fstat(tap).st_ino, 102: os.fstat(given).st_ino}
            assert open_files(launched) == inodes
        assert launched.end().status == 0


@pytest.mark.parametrize("numbers", [[101, 102, 103], [100, 101, 102], [102, 103, 104]])
def test_occupied_number_is_refused(
    programs: Programs, tap_socket: Path, numbers: list[int]
) -> None:
    """An fd that is open under a tap's number is not replaced: the command does not run."""
    with listening(tap_socket) as accept, taps(4) as (given, *fds):
        os.dup2(given, 102)
        try:
            launched = programs.launch("echo", "ran", fds=[102])
        finally:
            os.close(102)
        with accept() as connection:
            connection.request()
            connection.send(tap_answer(numbers, "echo", "ran"), fds)
        assert "not free" in launched.end().refusal


def test_limit_of_open_files_is_told(programs: Programs, tap_socket: Path) -> None:
    """Where fewer files may be open than the taps need, the command does not run."""
    for limit in (8, 64):
        launcher = str(programs.folder / "extbridge-exec")
        with listening(tap_socket) as accept, taps(10) as fds:
            launched = Started(
                subprocess.Popen(
                    ["prlimit", f"--nofile={limit}", launcher, "echo", "ran"],
                    env={"EXTBRIDGE_RUN": str(programs.run_dir), **SANITIZERS},
                    stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                )
            )  # fmt: skip
            with accept() as connection:
                connection.request()
                connection.send(tap_answer(range(100, 110), "echo", "ran"), fds)
            assert launched.end().refusal
        tap_socket.unlink()


@pytest.mark.parametrize("status", [1, 125, 255])
def test_refusal_is_told(programs: Programs, tap_socket: Path, status: int) -> None:
    """What the agent refuses is said in its words, and the command does not run."""
    sentence = "net1 is held by process 4711; " * 10_000
    with listening(tap_socket) as accept:
        launched = programs.launch("echo", "ran")
        with accept() as connection:
            connection.request()
            connection.send(framed(struct.pack("<II", status, 0) + sentence.encode()))
        assert launched.end() == Ended(status, b"", f"extbridge-exec: {sentence}\n")


def test_refusal_after_taps(programs: Programs, tap_socket: Path) -> None:
    """A hand-off that the agent breaks off is told in its words alone."""
    with listening(tap_socket) as accept, taps(9) as fds:
        launched = programs.launch("echo", "ran")
        with accept() as connection:
            connection.request()
            connection.send(tap_answer(range(100, 109)), fds)
            connection.send(framed(struct.pack("<II", 125, 0) + b"changed its mind"))
        assert launched.end().refusal == "extbridge-exec: changed its mind\n"


@pytest.mark.parametrize(
    ("command", "status"),
    [("xb-no-such-command", 127), ("/nowhere/qemu", 127), ("", 127), ("/", 126), ("plain", 126)],
)
def test_command_that_cannot_run(
    programs: Programs, tap_socket: Path, tmp_path: Path, command: str, status: int
) -> None:
    """A command that is not there, or is none, ends as it does under a shell."""
    plain = tmp_path / "plain"
    plain.touch(mode=0o644)
    with listening(tap_socket) as accept:
        launched = programs.launch("echo", "ran")
        with accept() as connection:
            connection.request()
            connection.send(tap_answer([], str(plain) if command == "plain" else command))
        ended = launched.end()
    assert (ended.status, ended.stdout) == (status, b"")
    assert ended.stderr.startswith("extbridge-exec: ")


def test_launcher_without_a_command(programs: Programs, tap_socket: Path) -> None:
    """Who forgets the command is told so, and the agent is not asked."""
    with listening(tap_socket):
        assert "give the command" in programs.launch().end().refusal


@pytest.mark.parametrize(("more", "fits"), [(0, True), (1, False)])
def test_command_up_to_its_length(
    programs: Programs, tap_socket: Path, more: int, *, fits: bool
) -> None:
    """A command may be as long as the protocol says."""
    head = len(f"xb1TEXTBRIDGE_RUN={programs.run_dir}\0\0")
    room = 256 * KIB - head + more
    argv = ["x" * (100 * KIB - 1)] * 2 + ["x" * (room - 200 * KIB - 1)]
    with listening(tap_socket) as accept:
        launched = programs.launch(*argv)
        if not fits:
            assert "too long" in launched.end().refusal
            return
        with accept() as connection:
            assert len(connection.request().payload) == 256 * KIB
            connection.send(tap_answer([], "true"))
        assert launched.end().status == 0


def test_longest_hand_off_passes(programs: Programs, tap_socket: Path) -> None:
    """The command to exec may be as long as the protocol says."""
    argv = ["true", *["x" * (100 * KIB - 1)] * 5, "x" * (12 * KIB - 8 - len("true") - 2)]
    with listening(tap_socket) as accept:
        launched = programs.launch("other")
        with accept() as connection:
            connection.request()
            frame = tap_answer([], *argv)
            assert len(frame) == 4 + 512 * KIB
            connection.send(frame)
        assert launched.end() == Ended(0, b"", "")


def numbered(*numbers: int, count: int | None = None) -> bytes:
    """An answer whose numbers may be wrong."""
    written = len(numbers) if count is None else count
    payload = struct.pack(f"<II{len(numbers)}I", 0, written, *numbers) + b"echo\0ran\0"
    return framed(payload)


def hang_up_before_the_last_frame(connection: Connection) -> None:
    send_fds_at(0, 1, tap_answer([100]))(connection)
    connection.socket.close()


BROKEN_HAND_OFFS: dict[str, Callable[[Connection], None]] = {
    **{
        how: misbehave
        for how, misbehave in MISBEHAVIOURS.items()
        if "too" not in how and "fd" not in how and misbehave not in (hang_up, hang_up_at_once)
    },
    "is too long": send_instead(struct.pack("<I", 512 * KIB + 1)),
    "has no count": send_instead(framed(b"\0\0\0\0")),
    "has neither taps nor command": send_instead(tap_answer([])),
    "numbers more than it has": send_fds_at(0, 1, numbered(100, 101)),
    "numbers fewer than it has": send_fds_at(0, 2, numbered(100)),
    "counts wrongly": send_fds_at(0, 1, numbered(100, count=0xFFFFFFFF)),
    "counts on, without numbers": send_fds_at(0, 1, framed(struct.pack("<II", 0, 1))),
    "wants a number for two": send_fds_at(0, 2, numbered(100, 100)),
    "wants standard output": send_fds_at(0, 1, numbered(1)),
    "wants a negative number": send_fds_at(0, 1, numbered(0xFFFFFFFF)),
    "wants an endless number": send_fds_at(0, 1, numbered(0x7FFFFFFF)),
    "has 251 fds": send_fds_at(0, 251, numbered(*range(100, 351))),
    "has an fd behind the length": send_fds_at(4, 1, numbered(100)),
    "has too many arguments": send_instead(tap_answer([], "echo", *[""] * 70_000)),
    "hangs up before the last frame": hang_up_before_the_last_frame,
}


@pytest.mark.parametrize("how", BROKEN_HAND_OFFS)
def test_hand_off_that_is_none(programs: Programs, tap_socket: Path, how: str) -> None:
    """What does not keep to the protocol is no hand-off: the command does not run."""
    with listening(tap_socket) as accept:
        launched = programs.launch("echo", "ran")
        with accept() as connection:
            BROKEN_HAND_OFFS[how](connection)
            assert launched.end().refusal


@pytest.mark.parametrize("misbehave", [hang_up_at_once, hang_up])
def test_launcher_that_is_hung_up_on_asks_again(
    programs: Programs, tap_socket: Path, misbehave: Callable[[Connection], None]
) -> None:
    """An agent that ends before it says anything is not the launcher's end: the next is asked."""
    with listening(tap_socket) as accept:
        launched = programs.launch("echo", "ran")
        for _ in range(2):
            with accept() as connection:
                misbehave(connection)
        with accept() as connection:
            connection.request()
            connection.send(tap_answer([], "echo", "ran"))
        assert launched.end() == Ended(0, b"ran\n", "")


def test_launcher_does_not_ask_for_ever(impatient: Programs, tap_socket: Path) -> None:
    """A launcher that everybody hangs up on says so in the end."""
    with ExitStack() as closing:
        accept = closing.enter_context(listening(tap_socket))
        launched = impatient.launch("echo", "ran")
        for _ in range(1000):
            with accept() as connection:
                hang_up(connection)
            time.sleep(0.05)
            if launched.process.poll() is not None:
                break
        assert "no answer" in launched.end().refusal


def test_python_launcher_asks_again(tap_socket: Path, run_dir: Path) -> None:
    """take_taps() too waits for an agent whose queue is full, or that hangs up."""
    with (
        listening(tap_socket, backlog=0) as accept,
        ExitStack() as filled,
        ThreadPoolExecutor(1) as threads,
    ):
        taken = fill_queue(tap_socket, filled)
        asking = threads.submit(take_taps, run=run_dir)
        time.sleep(0.2)
        for _ in range(taken):
            filled.enter_context(accept())
        for misbehave in (hang_up_at_once, hang_up):
            with accept() as connection:
                misbehave(connection)
        with accept() as connection:
            connection.request()
            connection.send(tap_answer([], "[]"))
        assert asking.result(SECONDS) == []


def test_hand_off_has_one_deadline(impatient: Programs, tap_socket: Path) -> None:
    """An agent that keeps a launcher waiting with a byte now and then is given up too."""
    with listening(tap_socket) as accept:
        launched = impatient.launch("echo", "ran")
        with accept() as connection:
            connection.request()
            connection.send(struct.pack("<I", 512 * KIB))
            # For ten times its patience at least.
            for _ in range(200):
                if launched.process.poll() is not None:
                    break
                with suppress(BrokenPipeError):
                    connection.send(b"x")
                time.sleep(0.05)
            assert launched.process.poll() is not None
        assert launched.end().refusal


# Installation.


def install(*arguments: str) -> Ended:
    """Run `extbridge install`."""
    done = subprocess.run(
        [executable("extbridge"), "install", *arguments], capture_output=True, check=False
    )
    return Ended(done.returncode, done.stdout, done.stderr.decode())


def test_install(tmp_path: Path) -> None:
    """`extbridge install` puts both names into the folder, executable for all, and nothing else."""
    for _ in range(2):
        assert install("--shim-only", "--bin-dir", str(tmp_path)) == Ended(0, b"", "")
        assert sorted(os.listdir(tmp_path)) == ["extbridge", "extbridge-exec"]
        assert all(path.stat().st_mode & 0o7777 == 0o755 for path in tmp_path.iterdir())
    started = Programs(tmp_path, tmp_path / "run").start("VERSION")
    assert b"supportedVersions" in started.end().stdout
    assert "give the command" in Programs(tmp_path, tmp_path / "run").launch().end().refusal


def test_install_over_one_that_runs(patient: Programs, cni_socket: Path, tmp_path: Path) -> None:
    """A node is upgraded while requests are under way."""
    install_shim(tmp_path)
    with listening(cni_socket) as accept:
        started = Programs(tmp_path, patient.run_dir).start("ADD")
        with accept() as connection:
            connection.request()
            install_shim(tmp_path)
            connection.answer(0, b"done")
        assert started.end() == Ended(0, b"done", "")


def test_install_launcher(tmp_path: Path) -> None:
    """What pods see has the launcher and nothing that speaks CNI."""
    with umask(0o077):
        install_launcher(tmp_path)
    assert os.listdir(tmp_path) == ["extbridge-exec"]
    assert (tmp_path / "extbridge-exec").stat().st_mode & 0o7777 == 0o755


def test_install_into_no_folder(tmp_path: Path) -> None:
    """Who names a folder that is not there is told what to do about it."""
    refused = install("--shim-only", "--bin-dir", str(tmp_path / "bin"))
    assert (refused.status, refused.stdout) == (1, b"")
    assert f"there is no folder {tmp_path}/bin" in refused.stderr
    assert "/opt/cni/bin" in refused.stderr
    assert not (tmp_path / "bin").exists()


def test_install_into_a_full_folder(tmp_path: Path) -> None:
    """An installation for which there is no room fails, and leaves what was there."""
    with small_tmpfs(tmp_path / "bin", "16k"):
        (tmp_path / "bin/extbridge").write_text("the old one, EXTBRIDGE_RUN")
        refused = install("--shim-only", "--bin-dir", str(tmp_path / "bin"))
        assert refused.status == 1
        assert "No space left" in refused.stderr
        assert os.listdir(tmp_path / "bin") == ["extbridge"]
        assert (tmp_path / "bin/extbridge").read_text() == "the old one, EXTBRIDGE_RUN"
