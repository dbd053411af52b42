"""The real programs, disturbed at a system call: strace makes them fail, die or stop there."""

from __future__ import annotations

import re
import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from tests.support import Cni, require

CHANGING: Final = ("mkdir", "mkdirat", "openat", "write", "rename", "renameat", "renameat2",
                   "unlink", "unlinkat", "rmdir", "sendto", "setns")  # fmt: skip
"""Calls by which anything changes outside of the process; to be killed between two others is to be
killed before the next of these."""

CALLS: Final = (*CHANGING, "socket", "bind", "setsockopt", "recvfrom", "flock", "fsopen",
                "fsconfig", "fsmount", "ioctl", "newfstatat", "getdents64")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Call:
    """A system call of a run: the `number`-th of its name; `shown` is strace's line for it."""

    name: str
    number: int
    shown: str


def recorded(
    cni: Cni, verb: str, config: Mapping[str, object], netns: str, log: Path
) -> list[Call]:
    """The calls of CALLS that the verb makes, from its first message to the kernel on."""
    # With a question mark, those that an architecture does not have are no error.
    traced = f"trace={','.join(f'?{name}' for name in CALLS)}"
    options = ("-f", "--seccomp-bpf", "-o", str(log), "-e", traced)
    traced_cni = replace(cni, wrapper=(require("strace"), *options))
    assert traced_cni(verb, config, NETNS=netns).status == 0
    counted: Counter[str] = Counter()
    calls, begun = [], False
    for line in log.read_text(encoding="utf-8").splitlines():
        if found := re.match(r"\d+ +(\w+)\(", line):
            counted[found[1]] += 1
            begun |= "AF_NETLINK" in line
            if begun:
                calls.append(Call(found[1], counted[found[1]], line))
    return calls


def disturbed(cni: Cni, call: Call, fault: str, log: Path) -> Cni:
    """The executable with `fault`, in strace's words, at that call; the log says INJECTED."""
    # Not with --seccomp-bpf, which is quicker: strace 6.1 loses injected signals with it.
    options = ("-f", "-o", str(log), "-e", f"trace={call.name}", "-e",
               f"inject={call.name}:{fault}")  # fmt: skip
    return replace(cni, wrapper=(require("strace"), *options))


@contextmanager
def attached(threads: Sequence[int], *options: str) -> Iterator[None]:
    """For the length of the block strace follows the threads, which run already, and no others.

    It counts each thread's calls by themselves, from here on.
    """
    command = (require("strace"), *options, *(f"--attach={thread}" for thread in threads))
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
        assert strace.stderr is not None
        for _ in threads:
            assert " attached" in strace.stderr.readline()
        try:
            yield
        finally:
            strace.terminate()


def changes_in(log: Path) -> list[Call]:
    """The calls by which the busiest thread of an `attached` block changed anything."""
    calls: defaultdict[str, list[Call]] = defaultdict(list)
    for line in log.read_text(encoding="utf-8").splitlines():
        if found := re.match(r"(\d+) +(\w+)\(", line):
            before = sum(call.name == found[2] for call in calls[found[1]])
            calls[found[1]].append(Call(found[2], before + 1, line))
    busiest = max(calls.values(), key=len)
    return [call for call in busiest if call.name != "openat" or "O_WRONLY" in call.shown]
