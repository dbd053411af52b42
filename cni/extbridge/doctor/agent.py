"""The agent, as those meet it who ask it: its folder, its sockets, its answer, its spool."""

from __future__ import annotations

import json
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Final

from extbridge.doctor.finding import Finding, failure, ok, warning
from extbridge.node import wire
from extbridge.node.reconcile import spooled
from extbridge.node.sockets import (
    CNI_SOCKET,
    METRICS_SOCKET,
    POD_FOLDER,
    SPOOL_FOLDER,
    TAP_SOCKET,
)

_START = "start the agent; if it is started, its log says why it does not serve"
_SECONDS: Final = 5.0

_STALE_SECONDS: Final = 120.0
"""The agent tries anew each minute what it could not do."""

_MODES: Final = (
    ("", stat.S_ISDIR, 0o700),
    (POD_FOLDER, stat.S_ISDIR, 0o755),
    (CNI_SOCKET, stat.S_ISSOCK, 0o600),
    (TAP_SOCKET, stat.S_ISSOCK, 0o666),
    (METRICS_SOCKET, stat.S_ISSOCK, 0o600),
)
"""As node.sockets makes them."""

_STATUS: Final = {"cniVersion": "1.1.0", "name": "doctor", "type": "extbridge"}
_LAST_ADD: Final = "extbridge_last_add_timestamp_seconds"


def check_run_folder(run: Path) -> Iterator[Finding]:
    """Whether sockets and folders are there, and for whom they are to be."""
    subject = f"run folder {run}"
    amiss = False
    for name, is_kind, mode in _MODES:
        path = run / name
        try:
            found = path.lstat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            yield failure(subject, f"there is no {path}", _START)
            return
        if not is_kind(found):
            yield failure(subject, f"{path} is something else", "remove it, and restart the agent")
            amiss = True
        elif stat.S_IMODE(found) != mode:
            what = f"{path} has mode {stat.S_IMODE(found):04o}, the agent makes it {mode:04o}"
            yield failure(subject, what, f"chmod {mode:04o} {path}, and find out who changed it")
            amiss = True
    if not amiss:
        yield ok(subject, "sockets and folders are as the agent makes them")


def check_agent(run: Path) -> Iterator[Finding]:
    """Whether the agent answers, and how its last ADD ended."""
    environ = {"CNI_COMMAND": "STATUS", "CNI_PATH": "/opt/cni/bin"}
    request = wire.encode_request(wire.CNI, environ, json.dumps(_STATUS).encode())
    try:
        with _connected(run / CNI_SOCKET) as agent:
            agent.sendall(wire.frame_head(request) + request)
            agent.settimeout(0)
            with closing(
                wire.wait_for_frame(agent, limit=wire.MAX_CNI_BYTES, max_fds=0, seconds=_SECONDS)
            ) as frame:
                answer = frame.payload
    except (wire.WireError, ConnectionResetError, BrokenPipeError):
        yield failure(
            "agent",
            "it hangs up on who asks from here",
            "it answers root in the node's own network namespace: run this there",
        )
        return
    except (OSError, ValueError) as error:
        yield failure("agent", f"{run / CNI_SOCKET}: {error}", _START)
        return
    if answer[:4] != bytes(4):
        yield failure("agent", f"STATUS: {_told(answer[4:])}", "the agent's log says more")
        return
    yield ok("agent", "answers STATUS")
    yield from _check_last_add(_metrics(run))


def check_spool(run: Path) -> Iterator[Finding]:
    """Whether DELs wait that nobody serves: each of them is a NIC, or an address, not freed."""
    waiting = spooled(run / SPOOL_FOLDER)
    if not waiting:
        yield ok("spool", "no DEL waits")
        return
    # Served just now, it is no concern.
    ages = [time.time() - path.stat().st_mtime for path in waiting if path.exists()]
    age = max(ages, default=0.0)
    what = f"{len(waiting)} DELs wait, the oldest for {_duration(age)}"
    if age < _STALE_SECONDS:
        yield warning("spool", what, "the agent serves them within a minute")
    else:
        yield failure(
            "spool",
            what,
            f"{_START}; a running one says in its log what keeps each of them ({waiting[0].name}"
            " is the oldest)",
        )


def _connected(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(_SECONDS)
        connection.connect(str(path))
    except BaseException:
        connection.close()
        raise
    return connection


def _told(answer: bytes) -> str:
    try:
        error = json.loads(answer)
        return f"{error['msg']} (code {error['code']})"
    except (ValueError, TypeError, KeyError):
        return "an answer that cannot be understood"


def _metrics(run: Path) -> dict[str, float]:
    """The agent's metrics by name and labels, as they are written."""
    with _connected(run / METRICS_SOCKET) as scraped:
        scraped.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        page = b"".join(iter(lambda: scraped.recv(1 << 16), b"")).partition(b"\r\n\r\n")[2]
    values = {}
    for line in page.decode(errors="replace").splitlines():
        name, _, value = line.rpartition(" ")
        try:
            values[name] = float(value)
        except ValueError:
            continue
    return values


def _check_last_add(metrics: dict[str, float]) -> Iterator[Finding]:
    subject = "last ADD"
    done = metrics.get(f'{_LAST_ADD}{{outcome="done"}}', 0.0)
    failed = metrics.get(f'{_LAST_ADD}{{outcome="failed"}}', 0.0)
    if not (done or failed):
        yield ok(subject, "none since the agent started")
    elif failed > done:
        yield warning(
            subject,
            f"failed {_duration(time.time() - failed)} ago",
            "the agent's log says why, and so does an Event of the pod",
        )
    else:
        yield ok(subject, f"{_duration(time.time() - done)} ago")


def _duration(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
