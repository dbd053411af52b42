"""The ledger: what extbridge has made, so that it can be unmade whatever happens in between.

One folder a container, one file an attachment: `ledger/<container ID>/<interface>.intent`, written
before the kernel is touched, and renamed to `.json` when all is done; an intent that is found later
is the trace of an ADD that was killed. All that changes a file is a rename, so a reader sees what
it was or what it has become. They are not synced to disk: what they speak of does not outlive the
kernel either, and /run is memory.

The folder is the lock: whoever changes a container's attachments holds a flock on it. It is the
container's and not the attachment's because two ADDs in one namespace must not choose the same
interface name.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final, Self, TypeVar

from extbridge.network.addresses import Addressing, addressing_to_object, parse_addressing
from extbridge.network.definition import Bandwidth
from extbridge.spec.errors import InvalidNetworkConfig, IoFailure, NotPermitted
from extbridge.spec.fields import JsonObject, get_int, get_object, get_str

RUN_VARIABLE: Final = "EXTBRIDGE_RUN"
DEFAULT_RUN: Final = "/run/extbridge"

_INTENT = ".intent"
_DONE = ".json"
_DRAFT = ".new"
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC

_TICK_NS: Final = 50_000_000
"""More than the kernel's tick, by which it dates changes."""

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
            with open(f"/proc/{pid}/stat", "rb") as file:
                status = file.read()
        except FileNotFoundError as error:
            raise ProcessLookupError(errno.ESRCH, f"process {pid} is gone") from error
        # From field 3 on; field 2, the command, may itself hold spaces and brackets (man 5 proc).
        fields = status.rpartition(b")")[2].split()
        state, threads, started = fields[0], int(fields[17]), int(fields[19])
        if state in b"ZX" and threads <= 1:
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
    """One attachment. `done` is False for an intent; `lower` names the NIC at `lower_ifindex`.

    `pod` is the pod's namespace/name in Kubernetes, `pod_uid` its UID there; empty elsewhere.
    `antispoof` is what the guest is held to, the network's default resolved. `delegation` is what
    the IPAM plugin has to be called with to release what it gave (ipam.Delegation, as an object).
    `hotplugged`: no ADD made it, but it goes with the attachment whose `cni_ifname` it bears.
    """

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
    antispoof: str
    handoff: str
    bandwidth: Bandwidth | None = None
    addressing: Addressing | None = None
    delegation: JsonObject | None = None
    done: bool = False
    holder: Holder | None = None
    pod_uid: str = ""
    hotplugged: bool = False


_STORED = tuple(field for field in Entry.__slots__ if field != "done")
"""An intent's file has another name."""


class Held:
    """A container's part of the ledger while its lock, the fd of its folder, is held."""

    def __init__(self, container_id: str, folder: int) -> None:
        self._container_id = container_id
        self._folder = folder

    def entries(self) -> list[Entry]:
        """The container's attachments; a file that cannot be understood is none."""
        return _entries(self._folder)

    def sweep(self, ifname: str) -> None:
        """Remove what cannot be understood of this interface, and what is no object at all.

        Nothing else ever would. An object that lacks something may be another version's.
        """
        for name in os.listdir(self._folder):
            of, suffix = os.path.splitext(name)
            if suffix not in (_INTENT, _DONE) or _read(name, self._folder) is not None:
                continue
            if of == ifname or not isinstance(_load(name, self._folder), dict):
                with self._forgetting(of):
                    os.unlink(name, dir_fd=self._folder)

    def write(self, entry: Entry) -> None:
        """Add or replace the entry, at once or not at all."""
        stored = {field: getattr(entry, field) for field in _STORED}
        for field in ("bandwidth", "holder"):
            if stored[field] is not None:
                stored[field] = asdict(stored[field])
        if entry.addressing is not None:
            stored["addressing"] = addressing_to_object(entry.addressing)
        draft = f"{entry.ifname}{_DRAFT}"
        with _our_failure(f"the ledger could not record {entry.ifname} of {self._container_id}"):
            try:
                file = os.open(draft, _CREATE, 0o600, dir_fd=self._folder)
                try:
                    # What Python's files ask the kernel besides is half of their cost.
                    record = json.dumps(stored).encode()
                    if os.write(file, record) < len(record):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                finally:
                    os.close(file)
                self._rename(draft, f"{entry.ifname}{_DONE if entry.done else _INTENT}")
            except BaseException:
                with suppress(OSError):
                    os.unlink(draft, dir_fd=self._folder)
                raise

    def finish(self, intent: Entry) -> Entry:
        """Say of the intent that it is done, and return the entry that it has become."""
        with _our_failure(f"the ledger could not record {intent.ifname} of {self._container_id}"):
            self._rename(f"{intent.ifname}{_INTENT}", f"{intent.ifname}{_DONE}")
        return replace(intent, done=True)

    def remove(self, ifname: str) -> None:
        """Remove the entry, if there is one."""
        for suffix in (_INTENT, _DONE):
            with self._forgetting(ifname):
                os.unlink(f"{ifname}{suffix}", dir_fd=self._folder)

    @contextmanager
    def _forgetting(self, ifname: str) -> Iterator[None]:
        with (
            _our_failure(f"the ledger could not forget {ifname} of {self._container_id}"),
            suppress(FileNotFoundError),
        ):
            yield

    def _rename(self, old: str, new: str) -> None:
        os.rename(old, new, src_dir_fd=self._folder, dst_dir_fd=self._folder)


class Ledger:
    """The ledger under a run folder; the folder is made when the first entry is.

    What `entries` has read it remembers, by when the container's folder was last changed: a pool of
    NICs is asked for with each ADD, and a node may have hundreds of attachments.
    """

    def __init__(self, run: Path) -> None:
        self._folder = run / "ledger"
        self._remembered: dict[str, tuple[int, list[Entry]]] = {}

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Self:
        """The ledger in the folder that EXTBRIDGE_RUN names, or else in /run/extbridge."""
        return cls(Path(environ.get(RUN_VARIABLE) or DEFAULT_RUN))

    @contextmanager
    def hold(self, container_id: str) -> Iterator[Held]:
        """Hold the container's lock, waiting for whoever has it."""
        folder = os.path.join(self._folder, container_id)
        with _our_failure(f"the ledger's folder {folder} could not be made"):
            lock = self._lock(folder)
        try:
            yield Held(container_id, lock)
        finally:
            # While the lock is held: whoever waits for it finds its folder gone and starts anew.
            with suppress(OSError):
                for name in os.listdir(lock):
                    if name.endswith(_DRAFT):
                        os.unlink(name, dir_fd=lock)
                os.rmdir(folder)
            os.close(lock)

    def knows(self, container_id: str) -> bool:
        """Whether the container has a folder, so whether there is anything to lock."""
        return os.path.isdir(os.path.join(self._folder, container_id))

    def of(self, container_id: str) -> list[Entry]:
        """The container's attachments, without the lock."""
        try:
            folder = os.open(os.path.join(self._folder, container_id), _FOLDER)
        except (FileNotFoundError, NotADirectoryError):
            return []
        try:
            return _entries(folder)
        finally:
            os.close(folder)

    def entries(self) -> Iterator[Entry]:
        """Every attachment of the node, without any lock: each as it is when it is read."""
        containers = self.containers()
        for container_id in containers:
            yield from self._entries_of(container_id)
        for container_id in self._remembered.keys() - containers:
            self._remembered.pop(container_id, None)

    def _entries_of(self, container_id: str) -> list[Entry]:
        now = time.time_ns()
        try:
            changed = os.stat(os.path.join(self._folder, container_id)).st_mtime_ns
        except FileNotFoundError:
            return []
        remembered = self._remembered.get(container_id)
        if remembered is not None and remembered[0] == changed:
            return remembered[1]
        entries = self.of(container_id)
        # What changes within a tick of the clock has the same time (current_time); it is read anew.
        if now - changed > _TICK_NS:
            self._remembered[container_id] = (changed, entries)
        return entries

    def containers(self) -> list[str]:
        """The containers that have a folder, be it empty."""
        with suppress(FileNotFoundError):
            return os.listdir(self._folder)
        return []

    def _lock(self, folder: str) -> int:
        while True:
            try:
                os.mkdir(folder, 0o700)
            except FileExistsError:
                pass
            except FileNotFoundError:
                self._folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._folder.mkdir(mode=0o700, exist_ok=True)
                continue
            try:
                lock = os.open(folder, _FOLDER)
            except FileNotFoundError:
                continue
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
                with suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(lock), os.stat(folder)):
                        return lock
            except BaseException:
                os.close(lock)
                raise
            os.close(lock)


def _entries(folder: int) -> list[Entry]:
    found = {}
    for name in sorted(os.listdir(folder)):
        ifname, suffix = os.path.splitext(name)
        if suffix not in (_INTENT, _DONE):
            continue
        entry = _read(name, folder)
        if entry is None and suffix == _INTENT:
            # It may have become done since the names were read.
            entry = _read(f"{ifname}{_DONE}", folder)
        if entry is not None:
            found[ifname] = entry
    return list(found.values())


def _read(name: str, folder: int) -> Entry | None:
    try:
        return _parse(_load(name, folder), done=name.endswith(_DONE))
    except (ValueError, TypeError, InvalidNetworkConfig):
        return None


def _load(name: str, folder: int) -> object:
    """The JSON in the file; None where it is none, or the file is gone, or a folder."""
    try:
        with open(os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder), "rb") as file:
            return json.loads(file.read())
    except (FileNotFoundError, IsADirectoryError, ValueError, RecursionError):
        return None


def _parse(stored: object, *, done: bool) -> Entry:
    if not isinstance(stored, dict):
        raise TypeError("a ledger entry is not an object")
    limits, given = get_object(stored, "bandwidth"), get_object(stored, "addressing")
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
        antispoof=_needed(get_str(stored, "antispoof")),
        handoff=_needed(get_str(stored, "handoff")),
        bandwidth=None
        if limits is None
        else Bandwidth(*(get_int(limits, field) for field in Bandwidth.__slots__)),
        addressing=None if given is None else parse_addressing(given),
        delegation=get_object(stored, "delegation"),
        done=done,
        holder=holder,
        # Entries of former versions have neither.
        pod_uid=get_str(stored, "pod_uid") or "",
        hotplugged=stored.get("hotplugged") is True,
    )


def _needed(value: T | None) -> T:
    if value is None:
        raise ValueError("a ledger entry lacks a field")
    return value


@contextmanager
def _our_failure(what: str) -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise NotPermitted(
            f"{what}: {error.strerror or error}", "run this as root with all capabilities"
        ) from error
    except OSError as error:
        raise IoFailure(
            f"{what}: {error.strerror or error}",
            f"extbridge keeps its state in the folder that {RUN_VARIABLE} names, else in"
            f" {DEFAULT_RUN}; it has to be writable and to have room",
        ) from error
