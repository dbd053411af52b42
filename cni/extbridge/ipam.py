"""Delegation to IPAM plugins: SPEC 1.1.0 section 4.

The plugin is run by who serves the request, the agent as well as `extbridge-cni`, and not by the
shim, which has no logic: deadline, rollback and version negotiation stand here, once. An agent in a
container sees neither the host's plugins nor the folders in which they keep their leases; there the
plugin is run in the mount namespace of a process of the host's, the `host_process` of the functions
below. The network namespace stays that of the calling thread, so that must not stand in a pod's.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import selectors
import signal
import stat
import subprocess
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import IO, Final

from extbridge.network.addresses import Addressing, parse_addressing
from extbridge.network.spelling_json import load_json
from extbridge.network.wanted import POD_ANNOTATIONS
from extbridge.spec import versions
from extbridge.spec.errors import (
    CniError,
    IncompatibleVersion,
    InvalidNetworkConfig,
    IpamFailure,
    LimitedConnectivity,
    PluginNotAvailable,
    TryAgainLater,
)
from extbridge.spec.fields import (
    JsonObject,
    as_object,
    as_str,
    field_path,
    get_int,
    get_list,
    get_object,
    get_objects,
    get_str,
)
from extbridge.spec.request import VALID_ATTACHMENTS

log = logging.getLogger(__name__)

DEADLINE: Final = 30.0
"""Seconds that a plugin has for one verb, negotiation included."""

MAX_STDOUT_BYTES: Final = 1 << 20

_MAX_STDERR_BYTES = 4096
"""What is kept of a plugin's own log, and repeated in ours; the rest is read and dropped."""

_SHOWN_CHARACTERS = 500
"""How much of a plugin's words a message repeats."""

_MAX_SYMLINKS = 40
"""MAXSYMLINKS of the kernel."""

_NEED_1_1_0 = ("GC", "STATUS")
"""The verbs that came with 1.1.0: an older plugin takes them for an unknown CNI_COMMAND."""

_KINDS_OF_STATUS: Final[Mapping[int, type[CniError]]] = {
    kind.code: kind for kind in (PluginNotAvailable, LimitedConnectivity)
}


@dataclass(frozen=True, slots=True)
class Delegation:
    """What an IPAM plugin is called with for one attachment; for GC and STATUS, for one network.

    The ledger keeps it, so that what was given can be released whatever has become of the network's
    configuration. `config` is delegated_config's, `path` is CNI_PATH's folders, and the others are
    CNI_CONTAINERID, CNI_IFNAME, CNI_NETNS and CNI_ARGS, empty where there is none. Two NICs of one
    container need names of their own: IPAM plugins tell attachments by container ID and interface.
    """

    config: Mapping[str, object]
    path: tuple[str, ...]
    container_id: str = ""
    ifname: str = ""
    netns: str = ""
    args: str = ""

    @property
    def cni_version(self) -> str:
        """The cniVersion of the request that the plugin is called for."""
        return get_str(self.config, "cniVersion") or versions.IMPLIED

    @property
    def plugin(self) -> str:
        """The plugin's name, `ipam.type`; raises InvalidNetworkConfig if there is none."""
        name = get_str(get_object(self.config, "ipam") or {}, "type", where="ipam")
        if not name:
            raise InvalidNetworkConfig(
                "ipam.type is missing", "name the IPAM plugin, such as host-local"
            )
        return name


@dataclass(frozen=True, slots=True)
class _Executable:
    """A plugin that was found; `identity` (device, inode, time) changes when it is replaced."""

    path: str
    command: tuple[str, ...]
    identity: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class _Outcome:
    """How a plugin ended: `status` as in subprocess, negative for a signal."""

    status: int
    stdout: bytes
    stderr: bytes


_known_versions: Final[dict[tuple[str, ...], tuple[tuple[int, int, int], Collection[str]]]] = {}
"""By command, which executable it was and what that has said to VERSION. Not asked twice."""


def delegated_config(
    config: JsonObject, *, name: str, ipam: JsonObject, ips: Sequence[str] = ()
) -> dict[str, object]:
    """The configuration of a request for its IPAM plugin: all of it, as section 4 demands.

    `name` is the network's, by which plugins keep their leases apart; `ips` are the addresses that
    are asked for. prevResult is left out (CHECK gets it anew), and so are the pod's annotations:
    containerd gave them to us, and they do not belong into the ledger.
    """
    kept = {
        key: value
        for key, value in config.items()
        if key not in {"prevResult", "runtimeConfig"} and not key.startswith("cni.dev/")
    }
    runtime = {
        key: value
        for key, value in (get_object(config, "runtimeConfig") or {}).items()
        if key not in {"ips", POD_ANNOTATIONS}
    }
    if ips:
        runtime["ips"] = list(ips)
    return {**kept, "name": name, "ipam": dict(ipam), "runtimeConfig": runtime}


def delegation_to_object(delegation: Delegation) -> dict[str, object]:
    """The delegation as an object; parse_delegation of it is delegation again."""
    return {
        "config": dict(delegation.config),
        "path": list(delegation.path),
        "container_id": delegation.container_id,
        "ifname": delegation.ifname,
        "netns": delegation.netns,
        "args": delegation.args,
    }


def parse_delegation(obj: JsonObject, *, where: str = "") -> Delegation:
    """The delegation that delegation_to_object wrote; raises InvalidNetworkConfig."""

    def text(key: str) -> str:
        return as_str(obj.get(key), where=field_path(where, key))

    path = get_list(obj, "path", where=where)
    if path is None:
        raise InvalidNetworkConfig(f"{field_path(where, 'path')} is missing", "it has to be a list")
    return Delegation(
        config=as_object(obj.get("config"), where=field_path(where, "config")),
        path=tuple(as_str(folder, where=field_path(where, "path")) for folder in path),
        container_id=text("container_id"),
        ifname=text("ifname"),
        netns=text("netns"),
        args=text("args"),
    )


def ipam_add(
    delegation: Delegation, *, host_process: int | None = None, seconds: float = DEADLINE
) -> Addressing:
    """Have addresses assigned. When it fails, ipam_del is due: some may have been (section 4).

    Raises IpamFailure, TryAgainLater, and InvalidNetworkConfig for a plugin that is not there.
    """
    executable = _find(delegation, host_process)
    stdout = _call(executable, "ADD", delegation, seconds=seconds)
    return _read_addressing(executable, stdout)


def ipam_del(
    delegation: Delegation, *, host_process: int | None = None, seconds: float = DEADLINE
) -> None:
    """Have the attachment's addresses released, any number of times.

    A `netns` that is known to be gone is better left out: by now its path may lead to another's,
    and plugins refuse one that is the node's own (skel's pluginMain). Raises as ipam_add does.
    """
    _call(_find(delegation, host_process), "DEL", delegation, seconds=seconds)


def ipam_check(
    delegation: Delegation,
    prev_result: JsonObject,
    *,
    host_process: int | None = None,
    seconds: float = DEADLINE,
) -> None:
    """Have it checked that the addresses in prev_result are still the attachment's.

    Nothing is checked by a plugin that knows nothing newer than 0.3.1: CHECK came with 0.4.0.
    Raises as ipam_add does.
    """
    config = {**delegation.config, "prevResult": prev_result}
    executable = _find(delegation, host_process)
    _call(executable, "CHECK", replace(delegation, config=config), seconds=seconds)


def ipam_gc(
    delegation: Delegation,
    valid: Collection[tuple[str, str]],
    *,
    host_process: int | None = None,
    seconds: float = DEADLINE,
) -> None:
    """Have released what is none of the network's `valid` attachments' (container ID, ifname).

    Nothing is done by a plugin that does not know 1.1.0, with which GC came. Raises as ipam_add.
    """
    attachments = [
        {"containerID": container_id, "ifname": ifname} for container_id, ifname in valid
    ]
    config = {**delegation.config, VALID_ATTACHMENTS: attachments}
    executable = _find(delegation, host_process)
    _call(executable, "GC", replace(delegation, config=config), seconds=seconds)


def ipam_status(
    delegation: Delegation, *, host_process: int | None = None, seconds: float = DEADLINE
) -> None:
    """Ask whether an ADD would be served.

    A plugin that does not know 1.1.0, with which STATUS came, only has to be there. Raises
    PluginNotAvailable or LimitedConnectivity as the plugin does, else as ipam_add.
    """
    _call(_find(delegation, host_process), "STATUS", delegation, seconds=seconds)


def _call(
    executable: _Executable,
    verb: str,
    delegation: Delegation,
    *,
    seconds: float,
) -> bytes:
    """Standard output of the verb, run in a version that the plugin knows.

    Empty where no such version has the verb: then it is not run.
    """
    deadline = time.monotonic() + seconds
    known = _remembered(executable)
    if known is None and verb in _NEED_1_1_0:
        known = _ask_versions(executable, delegation, deadline)
    outcome = _call_knowing(known, executable, verb, delegation, deadline)
    if known is None and _refuses_version(outcome):
        known = _ask_versions(executable, delegation, deadline)
        outcome = _call_knowing(known, executable, verb, delegation, deadline)
    if outcome.status != 0:
        raise _failure(executable, verb, outcome)
    return outcome.stdout


def _call_knowing(
    known: Collection[str] | None,
    executable: _Executable,
    verb: str,
    delegation: Delegation,
    deadline: float,
) -> _Outcome:
    """Run the verb in the version that is asked for, or else in the newest that is `known`."""
    cni_version = delegation.cni_version
    if known is not None and cni_version not in known:
        common = [version for version in versions.SUPPORTED if version in known]
        if not common:
            raise IpamFailure(
                f"IPAM plugin {executable.path} supports no CNI version that extbridge does",
                f"it supports {', '.join(sorted(known)) or 'none'}; extbridge"
                f" {', '.join(versions.SUPPORTED)}",
            )
        cni_version = common[-1]
    if not _has_verb(cni_version, verb):
        return _Outcome(0, b"", b"")
    config = {**delegation.config, "cniVersion": cni_version}
    prev_result = get_object(config, "prevResult")
    if prev_result is not None:
        config["prevResult"] = _in_version(cni_version, prev_result)
    return _run(executable, verb, delegation, config, deadline)


def _has_verb(cni_version: str, verb: str) -> bool:
    try:
        versions.check_version(verb, cni_version)
    except IncompatibleVersion:
        return False
    return True


def _in_version(cni_version: str, prev_result: JsonObject) -> JsonObject:
    """The result as the version has it, which is what a plugin parses it as (libcni, NewResult)."""
    if prev_result.get("cniVersion") == cni_version:
        return prev_result
    said = {**prev_result, "cniVersion": cni_version}
    if not versions.is_at_least(cni_version, "1.0.0"):
        said["ips"] = [
            {**ip, "version": "6" if ":" in (get_str(ip, "address") or "") else "4"}
            for ip in get_objects(prev_result, "ips", where="prevResult") or []
        ]
    return said


def _remembered(executable: _Executable) -> Collection[str] | None:
    identity, known = _known_versions.get(executable.command, (None, None))
    return known if identity == executable.identity else None


def _ask_versions(
    executable: _Executable, delegation: Delegation, deadline: float
) -> Collection[str]:
    """The versions that the plugin says it supports, remembered until it is replaced."""
    config = {"cniVersion": delegation.cni_version}
    outcome = _run(executable, "VERSION", delegation, config, deadline)
    if outcome.status != 0:
        raise _failure(executable, "VERSION", outcome)
    try:
        answer = _decode(outcome.stdout)
        supported = get_list(answer, "supportedVersions") or []
        known = frozenset(as_str(item, where="supportedVersions") for item in supported)
    except InvalidNetworkConfig as failure:
        raise _not_understood(executable, "VERSION", failure) from failure
    _known_versions[executable.command] = (executable.identity, known)
    return known


def _read_addressing(executable: _Executable, stdout: bytes) -> Addressing:
    try:
        addressing = parse_addressing(_decode(stdout))
    except InvalidNetworkConfig as failure:
        raise _not_understood(executable, "ADD", failure) from failure
    if not addressing.addresses:
        raise IpamFailure(
            f"IPAM plugin {executable.path} gave no address",
            "look at the network's ipam; a plugin that is to give none need not be named",
        )
    return addressing


def _decode(stdout: bytes) -> JsonObject:
    """The object that a plugin printed; raises InvalidNetworkConfig."""
    try:
        text = stdout.decode()
    except UnicodeDecodeError as failure:
        raise InvalidNetworkConfig(
            f"it is not UTF-8 at byte {failure.start}", "JSON is UTF-8 (RFC 8259)"
        ) from failure
    return as_object(load_json(text), where="it")


def _not_understood(
    executable: _Executable, verb: str, failure: InvalidNetworkConfig
) -> IpamFailure:
    return IpamFailure(
        f"IPAM plugin {executable.path} answered {verb} with what is no answer: {failure.message}",
        failure.hint,
    )


def _failure(executable: _Executable, verb: str, outcome: _Outcome) -> CniError:
    """The error that a plugin ended with, in its own words."""
    told = _told_error(outcome)
    if told is None:
        ended = (
            f"ended with status {outcome.status}"
            if outcome.status > 0
            else f"was ended by signal {-outcome.status}"
        )
        words = _shortened((outcome.stderr or outcome.stdout).decode(errors="replace").strip())
        return IpamFailure(
            f"IPAM plugin {executable.path} {ended} at {verb} and gave no CNI error",
            f"it said: {words}" if words else "it said nothing at all",
        )
    code, message, details = told
    kind = _KINDS_OF_STATUS.get(code) if verb == "STATUS" else None
    if code == TryAgainLater.code:
        kind = TryAgainLater
    return (kind or IpamFailure)(
        f"IPAM plugin {executable.path}, {verb}: {_shortened(message) or f'error {code}'}",
        _shortened(details),
    )


def _told_error(outcome: _Outcome) -> tuple[int, str, str] | None:
    """Code, message and details of the error object on standard output; None if there is none."""
    try:
        error = _decode(outcome.stdout)
        code = get_int(error, "code")
        message, details = get_str(error, "msg"), get_str(error, "details")
    except InvalidNetworkConfig:
        return None
    return None if code is None else (code, message or "", details or "")


def _refuses_version(outcome: _Outcome) -> bool:
    if outcome.status == 0:
        return False
    told = _told_error(outcome)
    return told is not None and told[0] == IncompatibleVersion.code


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"


def _find(delegation: Delegation, host_process: int | None) -> _Executable:
    """The plugin in the first of CNI_PATH's folders that has it (libcni, FindInPath)."""
    name = delegation.plugin
    root = "" if host_process is None else f"/proc/{host_process}/root"
    for folder in delegation.path:
        path = os.path.join(folder, name)
        try:
            status = os.stat(_in_root(root, path) if root else path)
        except OSError:
            continue
        if not stat.S_ISREG(status.st_mode):
            continue
        if not status.st_mode & 0o111:
            raise InvalidNetworkConfig(
                f"ipam.type: {root}{path} is not executable", f"chmod +x {path}"
            )
        # With its mount namespace a process changes its root and working folder too (the kernel's
        # mntns_install); all its other namespaces stay.
        entering = ("nsenter", f"--mount=/proc/{host_process}/ns/mnt", "--") if root else ()
        identity = (status.st_dev, status.st_ino, status.st_mtime_ns)
        return _Executable(path, (*entering, path), identity)
    places = ", ".join(f"{root}{folder}" for folder in delegation.path)
    raise InvalidNetworkConfig(
        f"ipam.type: there is no IPAM plugin {name} in {places or 'an empty CNI_PATH'}",
        "install it there; host-local and static come with containernetworking's plugins",
    )


def _in_root(root: str, path: str) -> str:
    """The path with its symbolic links followed as by a process whose root is `root`.

    The kernel would follow an absolute one behind /proc/PID/root from the root of who asks. Raises
    OSError for one that leads to itself.
    """
    found, links = root, 0
    parts = path.split("/")[::-1]
    while parts:
        part = parts.pop()
        if part == "..":
            found = root if found == root else os.path.dirname(found)
        elif part not in {"", "."}:
            try:
                target = os.readlink(f"{found}/{part}")
            except OSError:
                found = f"{found}/{part}"
                continue
            links += 1
            if links > _MAX_SYMLINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
            if target.startswith("/"):
                found = root
            parts += target.split("/")[::-1]
    return found


def _run(
    executable: _Executable, verb: str, delegation: Delegation, config: JsonObject, deadline: float
) -> _Outcome:
    """Run the plugin to its end, or end it with all of its process group at the deadline."""
    given = {
        "CNI_COMMAND": verb,
        "CNI_CONTAINERID": delegation.container_id,
        "CNI_NETNS": delegation.netns,
        "CNI_IFNAME": delegation.ifname,
        "CNI_ARGS": delegation.args,
        "CNI_PATH": ":".join(delegation.path),
        "PATH": os.environ.get("PATH", os.defpath),
    }
    try:
        process = subprocess.Popen(
            executable.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={name: value for name, value in given.items() if value},
            process_group=0,
        )
    except OSError as failure:
        kind = TryAgainLater if failure.errno == errno.ETXTBSY else IpamFailure
        raise kind(
            f"IPAM plugin {executable.path} could not be started: {failure.strerror}",
            "is it whole, and for this machine?",
        ) from failure
    stdout, stderr = bytearray(), bytearray()
    with process:
        try:
            _exchange(process, json.dumps(config).encode(), stdout, stderr, deadline)
        except _Unusable as failure:
            words = _shortened(stderr.decode(errors="replace").strip())
            raise IpamFailure(
                f"IPAM plugin {executable.path} {failure} at {verb} and was killed",
                f"it said: {words}" if words else "",
            ) from failure
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    if stderr:
        words = stderr.decode(errors="replace").strip()
        log.warning("IPAM plugin %s, %s: %s", executable.path, verb, words)
    return _Outcome(process.returncode, bytes(stdout), bytes(stderr))


class _Unusable(Exception):
    """The plugin does not end, or writes without end."""


def _exchange(
    process: subprocess.Popen[bytes],
    stdin: bytes,
    stdout: bytearray,
    stderr: bytearray,
    deadline: float,
) -> None:
    """Feed the plugin and take what it writes, until it ends: not until its pipes are closed.

    A process that it leaves behind may hold those for ever. Raises _Unusable.
    """
    left = memoryview(stdin)
    with ExitStack() as closing:
        selector = closing.enter_context(selectors.DefaultSelector())
        ended = os.pidfd_open(process.pid)
        closing.callback(os.close, ended)
        selector.register(ended, selectors.EVENT_READ)
        feed, *pipes = _pipes(process)
        selector.register(feed, selectors.EVENT_WRITE)
        for pipe in pipes:
            selector.register(pipe, selectors.EVENT_READ)
        while True:
            timeout = max(0.0, deadline - time.monotonic())
            ready = {key.fileobj for key, _ in selector.select(timeout)}
            for pipe, into in zip(pipes, (stdout, stderr), strict=True):
                # What it wrote before it ended may have come after its pipe was looked at.
                if pipe in ready or (ended in ready and not pipe.closed):
                    _take(pipe, into, selector)
            if len(stdout) > MAX_STDOUT_BYTES:
                raise _Unusable(f"wrote more than {MAX_STDOUT_BYTES} bytes")
            del stderr[_MAX_STDERR_BYTES:]
            if ended in ready:
                return
            if feed in ready:
                left = _give(feed, left, selector)
            if time.monotonic() >= deadline:
                raise _Unusable("did not end in time")


def _pipes(process: subprocess.Popen[bytes]) -> list[IO[bytes]]:
    """Standard input, output and error of a process that has pipes for them, not blocking."""
    pipes = [pipe for pipe in (process.stdin, process.stdout, process.stderr) if pipe is not None]
    for pipe in pipes:
        os.set_blocking(pipe.fileno(), False)
    return pipes


def _take(pipe: IO[bytes], into: bytearray, selector: selectors.BaseSelector) -> None:
    """One read, which takes all that a pipe holds, or shows that it is more than is allowed."""
    with suppress(BlockingIOError):
        chunk = os.read(pipe.fileno(), MAX_STDOUT_BYTES + 1)
        into += chunk
        if not chunk:
            selector.unregister(pipe)
            pipe.close()


def _give(pipe: IO[bytes], left: memoryview, selector: selectors.BaseSelector) -> memoryview:
    """What is left to give after one write; nothing to one that does not read on."""
    try:
        left = left[os.write(pipe.fileno(), left) :]
    except BrokenPipeError:
        left = left[:0]
    if not left:
        selector.unregister(pipe)
        pipe.close()
    return left
