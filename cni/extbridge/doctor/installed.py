"""What was put into others' folders: the shim, the network configurations, kubelet's sockets."""

from __future__ import annotations

import os
import socket
from collections.abc import Collection, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Final

from extbridge.doctor.finding import Finding, Level, failure, ok, warning
from extbridge.network.spelling_json import load_json
from extbridge.node.install import LAUNCHER, SHIM
from extbridge.spec.errors import InvalidNetworkConfig
from extbridge.spec.fields import JsonObject, as_object, get_object, get_objects, get_str
from extbridge.spec.skel import translate

BIN_DIR: Final = Path("/opt/cni/bin")
CONF_DIR: Final = Path("/etc/cni/net.d")
DEVICE_PLUGINS: Final = Path("/var/lib/kubelet/device-plugins")
"""Where they mostly are."""

_MARK: Final = b"EXTBRIDGE_RUN"
"""In every shim of every version, which asks for this variable."""

_LIST: Final = ".conflist"
_SUFFIXES: Final = (".conf", _LIST, ".json")
"""What containerd and CRI-O read, in the order of the names' bytes."""

_MULTUS: Final = ("multus", "multus-shim")
_MAX_BYTES: Final = 16 << 20


def check_shim(folder: Path, launcher: Path) -> Iterator[Finding]:
    """Whether the executables in the runtime's folder are this version's; so the agent's own.

    `launcher` is what the agent has put for VM containers.
    """
    install = f"extbridge install --bin-dir {folder}"
    for path, todo in (
        (folder / SHIM, install),
        (folder / LAUNCHER, install),
        (launcher, "start the agent of this version, which puts it there"),
    ):
        yield _check_executable(path, todo)


def check_configurations(folder: Path) -> Iterator[Finding]:
    """Whether the runtime's configurations lead to extbridge, and in which place."""
    subject = f"configurations in {folder}"
    todo = f"extbridge install --chained --conf-dir {folder} --bin-dir ..., or --conflist FILE"
    # By their bytes: so runtimes order them.
    names = sorted((it for it in os.listdir(folder) if it.endswith(_SUFFIXES)), key=os.fsencode)
    plugins: dict[str, list[str]] = {}
    for name in names:
        if (folder / name).is_dir():
            continue
        try:
            plugins[name] = _plugin_types(folder / name)
        except (InvalidNetworkConfig, OSError) as error:
            # A runtime that cannot read the first has none.
            level = Level.WARNING if plugins else Level.FAILURE
            plugins[name] = []
            yield Finding(subject, level, f"{name}: {translate(error).message}", "mend it")
    if not plugins:
        yield failure(subject, "there is none", "install the cluster's network first")
        return
    first, types = next(iter(plugins.items()))
    ours = [name for name, its_types in plugins.items() if SHIM in its_types]
    if SHIM in types:
        place = "first" if types[0] == SHIM else "last" if types[-1] == SHIM else "in the midst"
        if place == "in the midst":
            behind = ", ".join(types[types.index(SHIM) + 1 :])
            what = f"in {first} extbridge stands before {behind}"
            yield warning(subject, what, f"{todo} puts it last, if the others are moved before it")
        else:
            yield ok(subject, f"the runtime takes {first}, where extbridge stands {place}")
    elif set(types) & set(_MULTUS):
        yield ok(subject, f"the runtime takes {first}, and Multus calls extbridge")
    elif ours:
        yield failure(
            subject, f"the runtime takes {first}, which comes before {', '.join(ours)}", todo
        )
    else:
        yield failure(subject, f"the runtime takes {first}, and none names extbridge", todo)


def check_device_plugins(folder: Path, networks: Collection[str]) -> Iterator[Finding]:
    """Whether kubelet has each network as a resource (its checkpoint says which it knows)."""
    subject = f"device plugins in {folder}"
    start = f"start the agent with --device-plugins {folder}"
    kubelet = folder / "kubelet.sock"
    fault = _fault_of(kubelet)
    if fault:
        yield failure(subject, f"kubelet.sock: {fault}", "start kubelet, or name its folder")
    registered = _registered(folder / "kubelet_internal_checkpoint")
    for network in networks:
        of = f"resource extbridge.io/{network}"
        fault = _fault_of(folder / f"extbridge-{network}.sock")
        if fault:
            yield failure(of, f"nobody offers it: {fault}", start)
        elif registered is not None and f"extbridge.io/{network}" not in registered:
            yield failure(of, "kubelet does not know it", "restart the agent; its log says more")
        else:
            yield ok(of, "offered" if registered is None else "offered, and known to kubelet")


def _check_executable(path: Path, todo: str) -> Finding:
    subject = str(path)
    try:
        content = path.read_bytes()
        is_executable = os.access(path, os.X_OK)
    except OSError as error:
        return failure(subject, error.strerror or str(error), todo)
    if content != (files("extbridge") / "shim" / "extbridge").read_bytes():
        if _MARK in content:
            return failure(subject, "is of another version than this program", todo)
        return failure(subject, "is not extbridge's", f"move it out of the way; {todo}")
    if not is_executable:
        return failure(subject, "cannot be executed", f"chmod 0755 {path}")
    return ok(subject, "is of this version")


def _plugin_types(path: Path) -> list[str]:
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        data = file.read(_MAX_BYTES)
    config = as_object(_load(data), where="the configuration")
    plugins: list[JsonObject] = [config]
    if path.suffix == _LIST:
        plugins = get_objects(config, "plugins") or []
        if not plugins:
            raise InvalidNetworkConfig("there are no plugins in this list", "it has to have them")
    return [get_str(plugin, "type") or "" for plugin in plugins]


def _load(data: bytes) -> object:
    try:
        return load_json(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InvalidNetworkConfig(f"byte {error.start} is not UTF-8", "it has to be") from error


def _registered(checkpoint: Path) -> Collection[str] | None:
    """The resources that kubelet knows; None where it does not tell."""
    try:
        told = as_object(_load(checkpoint.read_bytes()), where="the checkpoint")
        data = get_object(told, "Data")
        found = None if data is None else get_object(data, "RegisteredDevices")
    except (OSError, InvalidNetworkConfig):
        return None
    return None if found is None else set(found)


def _fault_of(path: Path) -> str:
    """Why nobody can connect there; empty where one can."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        asking.settimeout(1.0)
        try:
            asking.connect(str(path))
        except OSError as error:
            return error.strerror or str(error)
    return ""
