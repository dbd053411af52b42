"""The ledger: what extbridge has made, so that it can be unmade whatever happens in between.

One folder a container, one file an attachment: `ledger/<container ID>/<interface>.json`. An entry
is written as an intent before the kernel is touched, and again when all is done; an intent that is
found later is the trace of an ADD that was killed. Files are replaced by rename, so a reader sees
the old or the new one. They are not synced to disk: what they speak of does not outlive the kernel
either, and /run is memory.

The folder is the lock: whoever changes a container's attachments holds a flock on it. It is the
container's and not the attachment's because two ADDs in one namespace must not choose the same
interface name.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Self, TypeVar

from extbridge.spec.errors import InvalidNetworkConfig, IoFailure
from extbridge.spec.fields import get_bool, get_int, get_object, get_str

RUN_VARIABLE: Final = "EXTBRIDGE_RUN"
DEFAULT_RUN: Final = "/run/extbridge"

_SUFFIX = ".json"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Holder:
    """The process that took a tap; `started` (clock ticks since boot) tells it from a successor."""

    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> Self:
        """The living process `pid`; raises ProcessLookupError where there is none."""
        try:
            status = Path("/proc", str(pid), "stat").read_text(errors="replace")
        except FileNotFoundError as error:
            raise ProcessLookupError(errno.ESRCH, f"process {pid} is gone") from error
        # From field 3 on; field 2, the command, may itself hold spaces and brackets (man 5 proc).
        fields = status.rpartition(")")[2].split()
        state, threads, started = fields[0], int(fields[17]), int(fields[19])
        if state in "ZX" and threads <= 1:
            raise ProcessLookupError(errno.ESRCH, f"process {pid} has ended")
        return cls(pid, started)

    def alive(self) -> bool:
        """Whether the process still lives, and is not another with its number."""
        try:
            return Holder.of(self.pid) == self
        except ProcessLookupError:
            return False


@dataclass(frozen=True, slots=True)
class Entry:
    """One attachment. `done` is False for an intent; `lower` names the NIC at `lower_ifindex`."""

    container_id: str
    cni_ifname: str
    ifname: str
    network: str
    definition: str
    pod: str
    netns: str
    netns_inode: int
    ifindex: int
    mac: str
    mode: str
    lower: str
    lower_ifindex: int
    mtu: int
    queues: int
    done: bool = False
    holder: Holder | None = None


class Held:
    """A container's part of the ledger while its lock is held."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def entries(self) -> list[Entry]:
        """The container's attachments; a file that cannot be understood is none."""
        return _entries(self._folder)

    def sweep(self) -> None:
        """Remove the files that cannot be understood: nothing else would ever."""
        for path in self._folder.glob(f"*{_SUFFIX}"):
            if _read(path) is None:
                with _our_failure(f"the ledger entry {path} could not be removed"):
                    path.unlink(missing_ok=True)

    def write(self, entry: Entry) -> None:
        """Add or replace the entry, at once or not at all."""
        path = self._folder / f"{entry.ifname}{_SUFFIX}"
        draft = path.with_suffix(".new")
        with _our_failure(f"the ledger entry {path} could not be written"):
            try:
                draft.write_text(json.dumps(asdict(entry)))
                draft.rename(path)
            except BaseException:
                with suppress(OSError):
                    draft.unlink()
                raise

    def remove(self, ifname: str) -> None:
        """Remove the entry, if there is one."""
        path = self._folder / f"{ifname}{_SUFFIX}"
        with _our_failure(f"the ledger entry {path} could not be removed"):
            path.unlink(missing_ok=True)


class Ledger:
    """The ledger under a run folder; the folder is made when the first entry is."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._folder = run / "ledger"

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Self:
        """The ledger in the folder that EXTBRIDGE_RUN names, or else in /run/extbridge."""
        return cls(Path(environ.get(RUN_VARIABLE) or DEFAULT_RUN))

    @contextmanager
    def hold(self, container_id: str) -> Iterator[Held]:
        """Hold the container's lock, waiting for whoever has it."""
        folder = self._folder / container_id
        with _our_failure(f"the ledger folder {folder} could not be made"):
            self._run.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._folder.mkdir(mode=0o700, exist_ok=True)
            lock = _lock(folder)
        try:
            yield Held(folder)
        finally:
            # While the lock is held: whoever waits for it finds its folder gone and starts anew.
            with suppress(OSError):
                _sweep_drafts(folder)
                folder.rmdir()
            os.close(lock)

    def knows(self, container_id: str) -> bool:
        """Whether the container has a folder, so whether there is anything to lock."""
        return (self._folder / container_id).is_dir()

    def of(self, container_id: str) -> list[Entry]:
        """The container's attachments, without the lock."""
        return _entries(self._folder / container_id)

    def entries(self) -> Iterator[Entry]:
        """Every attachment of the node, without any lock: each as it is when it is read."""
        with suppress(FileNotFoundError):
            for folder in self._folder.iterdir():
                yield from _entries(folder)


def _lock(folder: Path) -> int:
    while True:
        folder.mkdir(mode=0o700, exist_ok=True)
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock), folder.stat()):
                    return lock
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


def _sweep_drafts(folder: Path) -> None:
    for draft in folder.glob("*.new"):
        draft.unlink()


def _entries(folder: Path) -> list[Entry]:
    with suppress(FileNotFoundError, NotADirectoryError):
        read = [_read(path) for path in sorted(folder.glob(f"*{_SUFFIX}"))]
        return [entry for entry in read if entry is not None]
    return []


def _read(path: Path) -> Entry | None:
    with suppress(FileNotFoundError, ValueError, TypeError, RecursionError, InvalidNetworkConfig):
        return _parse(json.loads(path.read_text()))
    return None


def _parse(stored: object) -> Entry:
    if not isinstance(stored, dict):
        raise TypeError("a ledger entry is not an object")
    held = get_object(stored, "holder")
    holder = None
    if held is not None:
        holder = Holder(_needed(get_int(held, "pid")), _needed(get_int(held, "started")))
    return Entry(
        container_id=_needed(get_str(stored, "container_id")),
        cni_ifname=_needed(get_str(stored, "cni_ifname")),
        ifname=_needed(get_str(stored, "ifname")),
        network=_needed(get_str(stored, "network")),
        definition=_needed(get_str(stored, "definition")),
        pod=_needed(get_str(stored, "pod")),
        netns=_needed(get_str(stored, "netns")),
        netns_inode=_needed(get_int(stored, "netns_inode")),
        ifindex=_needed(get_int(stored, "ifindex")),
        mac=_needed(get_str(stored, "mac")),
        mode=_needed(get_str(stored, "mode")),
        lower=_needed(get_str(stored, "lower")),
        lower_ifindex=_needed(get_int(stored, "lower_ifindex")),
        mtu=_needed(get_int(stored, "mtu")),
        queues=_needed(get_int(stored, "queues")),
        done=_needed(get_bool(stored, "done")),
        holder=holder,
    )


def _needed(value: T | None) -> T:
    if value is None:
        raise ValueError("a ledger entry lacks a field")
    return value


@contextmanager
def _our_failure(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise IoFailure(
            f"{what}: {error.strerror or error}",
            f"extbridge keeps its state in the folder that {RUN_VARIABLE} names, else in"
            f" {DEFAULT_RUN}; it has to be writable and to have room",
        ) from error
