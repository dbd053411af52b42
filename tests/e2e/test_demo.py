"""The demo is what people see first: it tells the truth, and leaves no trace."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support import executable

pytestmark = pytest.mark.guest

_CLAIMS = 10


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the demo puts its temporary files."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


@pytest.mark.usefixtures("guest")
def test_all_claims_hold_and_are_shown(folder: Path) -> None:
    """`extbridge demo` shows what was expected and what was measured, and ends with 0."""
    done = _tell()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 packets transmitted, 3 packets received, 0% packet loss" in done.stdout
    assert f"all {_CLAIMS} claims hold" in done.stdout
    table = _table(done.stdout)
    assert len(table) == _CLAIMS
    assert re.fullmatch(r"0% lost +0% lost, [\d.]+ ms +ok", table["vepa: a pings b"])
    assert re.fullmatch(r"100% lost +100% lost +ok", table["vepa, relay off: a pings b"])
    assert max(len(line) for line in done.stdout.splitlines()) <= 80
    assert not list(folder.iterdir())


@pytest.mark.usefixtures("guest")
def test_false_claim_is_called_so(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """On a switch that has no reflective relay vepa fails, bridge works, and the status is 1."""
    programs = tmp_path_factory.mktemp("programs")
    (programs / "bridge").write_text("#!/bin/sh\n")
    (programs / "bridge").chmod(0o755)
    done = _tell({"PATH": f"{programs}:{os.environ['PATH']}"})
    assert done.returncode == 1, done.stdout + done.stderr
    table = _table(done.stdout)
    assert re.fullmatch(r"0% lost +100% lost +FAILED", table["vepa: a pings b"])
    assert table["bridge, relay off: a pings b"].endswith("ok")
    assert f"2 of {_CLAIMS} claims FAILED" in done.stdout
    assert not list(folder.iterdir())


@pytest.mark.usefixtures("guest")
@pytest.mark.parametrize("interrupt", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_demo_leaves_nothing(folder: Path, interrupt: signal.Signals) -> None:
    """Ctrl-C, pressed again and again while guests boot, ends the demo and all it has made."""
    with subprocess.Popen(
        (executable("extbridge"), "demo"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as demo:
        _wait_for_guests(demo.pid)
        namespace = os.readlink(f"/proc/{demo.pid}/ns/net")
        # As a terminal sends it: to all processes of the group.
        deadline = time.monotonic() + 30
        while demo.poll() is None and time.monotonic() < deadline:
            os.killpg(demo.pid, interrupt)
            time.sleep(0.005)
        _, complaint = demo.communicate(timeout=1)
    assert (demo.returncode, complaint) == (
        130,
        "extbridge demo: interrupted; nothing is left of it\n",
    )
    assert namespace != os.readlink("/proc/self/ns/net")
    assert namespace not in _namespaces()
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("variable", "complaint"),
    [("PATH", "the program ip is missing"), ("EXTBRIDGE_GUEST", "a kernel in /nowhere")],
)
def test_missing_tool_is_named_with_its_remedy(variable: str, complaint: str) -> None:
    """Where a program or the guests' kernel is missing, one line says which, and what to do."""
    done = _tell({variable: "/nowhere"})
    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    assert complaint in line
    assert "run `make setup`" in line


@pytest.mark.parametrize(
    "change",
    [
        # The one capability is to read the program, wherever it is.
        pytest.param(
            (
                "--reuid",
                "65534",
                "--clear-groups",
                "--inh-caps",
                "+dac_read_search",
                "--ambient-caps",
                "+dac_read_search",
            ),
            id="not root",
        ),
        pytest.param(("--bounding-set", "-all", "--inh-caps", "-all"), id="no capability"),
    ],
)
def test_demo_without_privilege_asks_for_root(change: tuple[str, ...]) -> None:
    """Who is not root, or a root that may not make namespaces, is told so in one line."""
    done = _tell(wrapper=("setpriv", *change, "--"))
    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    assert "run it as root" in line


def _tell(
    environment: Mapping[str, str] | None = None, *, wrapper: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        (*wrapper, executable("extbridge"), "demo"),
        env={**os.environ, **(environment or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def _table(output: str) -> dict[str, str]:
    """The table's rows, by claim: expected, measured and verdict."""
    return dict(re.findall(r"^ (\S.*?)  +(.*(?:ok|FAILED)) *$", output, re.MULTILINE))


def _wait_for_guests(session: int) -> None:
    """Wait until two QEMUs run in the session."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        running = 0
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(FileNotFoundError, ProcessLookupError):
                command = (folder / "comm").read_text()
                running += command.startswith("qemu") and os.getsid(int(folder.name)) == session
        if running == 2:
            return
        time.sleep(0.05)
    pytest.fail("the demo does not boot two guests")


def _namespaces() -> set[str]:
    """The network namespaces that any process is in."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/ns/net"):
        with suppress(FileNotFoundError, ProcessLookupError):
            found.add(os.readlink(link))
    return found
