"""A node that loses its power, or its installer, in the middle of an installation."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from extbridge.node.conflist import PLUGIN, chained, remove
from extbridge.node.install import install_shim, uninstall_shim
from tests.kernel.strace import Call
from tests.support import executable, require

NETWORK = {"cniVersion": "1.0.0", "name": "cluster", "plugins": [{"type": "ptp"}]}
SINGLE = {"cniVersion": "1.0.0", "name": "cluster", "type": "ptp"}

CHANGING = ("openat", "write", "fchown", "fchmod", "fsync", "link", "linkat", "rename", "unlink",
            "utimensat")  # fmt: skip

WORKERS = 3

Picture = dict[str, tuple[bytes, str]]


@pytest.mark.parametrize("name", ["10-net.conflist", "10-net.conf"])
@pytest.mark.parametrize("verb", ["install", "uninstall"])
def test_killed_at_any_call(tmp_path: Path, verb: str, name: str) -> None:
    """At every moment the runtime reads a whole configuration, and what it names is there.

    And the next install, or the next uninstall, finishes the work.
    """
    bare = tmp_path / "bare"
    (bare / "bin").mkdir(parents=True)
    (bare / "net.d").mkdir()
    (bare / "net.d" / name).write_text(json.dumps(SINGLE if name.endswith("f") else NETWORK))
    installed = copy_of(bare, tmp_path / "installed")
    install(installed)
    before, after = picture(bare), picture(installed)
    origin = bare if verb == "install" else installed

    def kill(number: int, call: Call) -> None:
        node = copy_of(origin, tmp_path / f"node{number}")
        fault = f"inject={call.name}:signal=KILL:when={call.number}"
        options = ("-e", f"trace={call.name}", "-e", fault)
        assert run(verb, node, tmp_path / f"log{number}", *options) == -9, call
        assert_usable(node)
        other = copy_of(node, tmp_path / f"other{number}")
        install(node)
        assert picture(node) == after, call
        uninstall(other)
        assert picture(other) == before, call

    calls = recorded(verb, copy_of(origin, tmp_path / "recorded"), tmp_path / "log")
    assert len(calls) >= 5
    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(kill, range(len(calls)), calls))


def install(node: Path) -> None:
    """Install undisturbed, chained."""
    with chained(node / "net.d"):
        install_shim(node / "bin")


def uninstall(node: Path) -> None:
    """Uninstall undisturbed."""
    remove(node / "net.d")
    assert uninstall_shim(node / "bin") == []


def run(verb: str, node: Path, log: Path, *options: str) -> int:
    """Run the real command under strace; its exit status."""
    command = (require("strace"), "-f", "-o", str(log), *options, executable("extbridge"), verb,
               "--bin-dir", str(node / "bin"), "--conf-dir", str(node / "net.d"))  # fmt: skip
    # So that each run makes the same calls.
    environ = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}
    chain = ("--chained",) if verb == "install" else ()
    return subprocess.run((*command, *chain), env=environ, check=False).returncode


def recorded(verb: str, node: Path, log: Path) -> list[Call]:
    """The calls by which the command changes anything, once it has the folder for itself."""
    traced = ",".join(f"?{name}" for name in (*CHANGING, "flock"))
    assert run(verb, node, log, "-e", f"trace={traced}") == 0
    counted: Counter[str] = Counter()
    calls, begun = [], False
    for line in log.read_text(encoding="utf-8").splitlines():
        if found := re.match(r"\d+ +(\w+)\(", line):
            counted[found[1]] += 1
            begun |= found[1] == "flock"
            if begun and (found[1] != "openat" or "O_CREAT" in line):
                calls.append(Call(found[1], counted[found[1]], line))
    return [call for call in calls if call.name != "flock"]


def assert_usable(node: Path) -> None:
    """The runtime's first network is whole, with extbridge or without; with it, it can be run."""
    folder = node / "net.d"
    names = [it for it in os.listdir(folder) if it.endswith((".conf", ".conflist", ".json"))]
    first = json.loads((folder / min(names)).read_text())
    plugins = first.get("plugins", [SINGLE])
    assert plugins[0]["type"] == "ptp"
    assert plugins[1:] in ([], [PLUGIN])
    if plugins[1:]:
        assert subprocess.run(
            (node / "bin/extbridge",), env={"CNI_COMMAND": "VERSION"}, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, check=False,
        ).returncode == 0  # fmt: skip


def picture(node: Path) -> Picture:
    """All files, with content and mode."""
    files = (path for path in node.rglob("*") if path.is_file())
    return {
        str(path.relative_to(node)): (path.read_bytes(), oct(path.stat().st_mode)) for path in files
    }


def copy_of(node: Path, copy: Path) -> Path:
    """A node like that, of which each file has the links that it has there."""
    subprocess.run(("cp", "-a", str(node), str(copy)), check=True)
    return copy
