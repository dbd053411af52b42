"""The agent's listening sockets: its own, or those that systemd holds for it, and its word to it.

sd_listen_fds(3), sd_notify(3). A socket that systemd holds outlives the agent: who connects while
it restarts waits in the queue.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from extbridge.spec.errors import TryAgainLater

CNI_SOCKET: Final = "cni.sock"
METRICS_SOCKET: Final = "metrics.sock"
POD_FOLDER: Final = "pod"
TAP_SOCKET: Final = f"{POD_FOLDER}/tap.sock"
SPOOL_FOLDER: Final = "spool"

_LABEL: Final = "security.selinux"
_CONTAINERS: Final = b"system_u:object_r:container_file_t:s0\0"
"""What every container may use, whatever its categories (s0 has none)."""

Address = tuple[str, int]
"""An IP address and a port."""

_FIRST_LISTEN_FD = 3
_BACKLOG = 1024


@dataclass(frozen=True, slots=True)
class Sockets:
    """Listening and non-blocking; `scraped` is TCP's, for metrics and nothing else."""

    cni: socket.socket
    taps: socket.socket
    metrics: socket.socket
    scraped: socket.socket | None = None


@contextmanager
def listening(run: Path, metrics: Address | None = None) -> Iterator[Sockets]:
    """The sockets in the run folder, which is made where it is missing; closed after the block.

    `metrics` are served there too. Raises TryAgainLater if another agent serves the folder.
    """
    run.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Who mounts a folder that is not there yet, as kubelet does, makes it for all to see.
    run.chmod(0o700)
    (run / SPOOL_FOLDER).mkdir(mode=0o700, exist_ok=True)
    pod = run / POD_FOLDER
    pod.mkdir(exist_ok=True)
    # What a pod needs to see, whatever the umask.
    pod.chmod(0o755)
    with ExitStack() as closing:
        _lock(run, closing)
        inherited = {}
        for fd in _listen_fds():
            held = closing.enter_context(socket.socket(fileno=fd))
            inherited[held.getsockname()] = held
        yield Sockets(
            _listen(run / CNI_SOCKET, 0o600, inherited, closing),
            _listen(run / TAP_SOCKET, 0o666, inherited, closing),
            _listen(run / METRICS_SOCKET, 0o600, inherited, closing),
            None if metrics is None else _listen_on(metrics, closing),
        )


def label_for_containers(*paths: Path) -> None:
    """Let containers under SELinux use what they mount; nothing where there is no SELinux.

    Volumes of the host's folders are not relabelled by any runtime (container-selinux), and under
    /run they would have a type that no container may connect to or execute.
    """
    for path in paths:
        try:
            os.setxattr(path, _LABEL, _CONTAINERS)
        except OSError as error:
            # A policy that has no such type has no containers.
            if error.errno not in (errno.ENOTSUP, errno.EINVAL, errno.EPERM):
                raise


def parse_address(text: str) -> Address:
    """The address of `192.0.2.1:9477` or `[2001:db8::1]:9477`; raises ValueError."""
    host, _, port = text.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    address = ip_address(bare)
    if (
        not port.isdecimal()
        or not 0 < int(port) < 1 << 16
        or (address.version == 6) == (bare == host)
    ):
        raise ValueError(text)
    return str(address), int(port)


def notify(state: str) -> None:
    """Tell systemd, if it has asked to be told (NOTIFY_SOCKET) and still listens."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    # A leading @ is for a name that is no file (man 7 unix, abstract).
    name = "\0" + address[1:] if address.startswith("@") else address
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told, suppress(OSError):
        told.sendto(state.encode(), name)


def _listen_on(address: Address, closing: ExitStack) -> socket.socket:
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    try:
        served = socket.create_server(address, family=family, backlog=_BACKLOG)
    except OSError as error:
        # Else nobody knew what is in use, or no address of the node.
        raise OSError(error.errno, error.strerror, f"{address[0]} port {address[1]}") from error
    served.setblocking(False)  # noqa: FBT003 - socket takes no keyword
    return closing.enter_context(served)


def _lock(run: Path, closing: ExitStack) -> None:
    """Be the only agent in the folder: the kernel lets go of the lock when this process ends."""
    folder = os.open(run, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    closing.callback(os.close, folder)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise TryAgainLater(f"another agent serves {run}", "stop that one first") from error


def _listen(
    path: Path, mode: int, inherited: dict[str, socket.socket], closing: ExitStack
) -> socket.socket:
    held = inherited.get(str(path))
    if held is None:
        held = closing.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        # Renamed over the last agent's: there is no moment without a socket at this path.
        draft = path.with_suffix(".new")
        draft.unlink(missing_ok=True)
        held.bind(str(draft))
        draft.chmod(mode)
        held.listen(_BACKLOG)
        draft.rename(path)
    held.settimeout(0)
    return held


def _listen_fds() -> range:
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return range(0)
    number = int(os.environ.get("LISTEN_FDS", "0"))
    return range(_FIRST_LISTEN_FD, _FIRST_LISTEN_FD + number)
