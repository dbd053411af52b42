"""Fixtures for all tests, and the watch over what a test leaves behind.

The tests run as root on a node of their own: the process moves into an empty network namespace
before the first of them, so none can touch a NIC of the machine.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from extbridge.demo.guest import Guest, guest_folder
from extbridge.demo.lab import Lab, become_node
from extbridge.kernel.taps import has_node
from tests.support import Cni, missing, require

_PR_SET_CHILD_SUBREAPER = 36

_LOCK = "/run/lock/extbridge-tests"

# A namespace is taken down after its last user is gone (net/core/net_namespace.c, cleanup_net), and
# its taps with it.
_SETTLE_SECONDS = 5.0


@pytest.fixture(scope="session", autouse=True)
def node() -> Iterator[None]:
    """Be a node with nothing on it, and the parent of every process that loses its own.

    One on a machine: /dev is all nodes', so two runs would find each other's taps left behind.
    """
    if os.geteuid() != 0:
        pytest.exit("the tests make network namespaces: run them as root", returncode=2)
    with open(_LOCK, "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        become_node()
        # The process keeps the nodes' folder open from its first use on.
        has_node(0)
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0, os.strerror(ctypes.get_errno())
        yield


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fail a test that leaves a process, thread, fd, namespace, link or tap.

    An asyncio task is not looked for: it keeps its loop, and a loop keeps three fds.
    """
    before = _held()
    yield
    deadline = time.monotonic() + _SETTLE_SECONDS
    while (left := _held() - before) and time.monotonic() < deadline:
        _reap(left)
        time.sleep(0.02)
    if left:
        # They would keep the node's namespace alive after its tests.
        for pid in _children(left):
            left.remove(f"process {pid}")
            left.add(f"process {pid}: {_command_line(pid)}")
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        pytest.fail(f"left behind: {', '.join(sorted(left))}", pytrace=False)


@pytest.fixture
def lab() -> Iterator[Lab]:
    """A switch outside, to which NICs of the node, pods and neighbours are added."""
    require("ip")
    require("bridge")
    with Lab() as lab:
        yield lab


@pytest.fixture(scope="session")
def guest() -> type[Guest]:
    """The class of guests, where all is there that they need."""
    require("qemu-system-x86_64")
    require("busybox")
    if not list(guest_folder().glob("kernel/boot/vmlinuz-*")):
        missing(f"the guests' kernel in {guest_folder()}")
    return Guest


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for ledger and locks, this test's own (EXTBRIDGE_RUN)."""
    folder = tmp_path / "run"
    monkeypatch.setenv("EXTBRIDGE_RUN", str(folder))
    return folder


@pytest.fixture
def cni(run_dir: Path) -> Cni:
    """The real CNI executable."""
    return Cni(run_dir)


def _held() -> set[str]:
    """All that a test can leave behind in this process, on its node, and in the machine's /dev."""
    held = {f"link {name}" for _, name in socket.if_nameindex()}
    held |= {f"namespace {name}" for name in os.listdir("/run/netns")}
    held |= {f"tap {node}" for node in Path("/dev").glob("tap*")}
    held |= {f"thread {thread.name}" for thread in threading.enumerate()}
    held.add(f"main thread in {os.readlink('/proc/thread-self/ns/net')}")
    for task in os.listdir("/proc/self/task"):
        # A library's thread may be just ending; its children are another's then.
        with suppress(FileNotFoundError, ProcessLookupError):
            children = Path(f"/proc/self/task/{task}/children").read_text(encoding="ascii")
            held |= {f"process {pid}" for pid in children.split()}
    for fd in os.listdir("/proc/self/fd"):
        # The one that listed the folder is closed by now.
        with suppress(FileNotFoundError):
            held.add(f"fd {fd} {os.readlink(f'/proc/self/fd/{fd}')}")
    return held


def _children(held: set[str]) -> list[int]:
    return [int(what.removeprefix("process ")) for what in held if what.startswith("process ")]


def _command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ").strip()


def _reap(held: set[str]) -> None:
    """Take leave of those that have ended: of orphans, which the test cannot wait for."""
    for pid in _children(held):
        with suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
