"""The container runtime's folder of network configurations: extbridge put in, and taken out again.

A runtime reads the folder whenever something in it changes, and without a valid first configuration
the node is not ready. So each file appears by rename, and of what was there before an intact one is
to be found at every moment: beside `NAME` stands `NAME.extbridge-backup`, the original itself, or
an empty file where there was no original. Runtimes read no file whose name ends so (libcni,
ConfFiles).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from extbridge.network.spelling_json import load_json
from extbridge.network.store import decode
from extbridge.network.wanted import POD_ANNOTATIONS, configured_network, refuse_unknown_keys
from extbridge.node.install import SHIM, draft_of, locked, replace_file
from extbridge.spec.errors import CniError, InvalidNetworkConfig, IoFailure, TryAgainLater
from extbridge.spec.fields import JsonObject, as_object, describe, get_objects, get_str
from extbridge.spec.request import find_name_fault
from extbridge.spec.versions import IMPLIED, check_version

PLUGIN: Final[JsonObject] = {"type": SHIM, "capabilities": {POD_ANNOTATIONS: True}}
"""What stands in the list: the pod decides. No other capability: a `mac` or `ips` that a runtime
hands to this list is meant for the pod's own interface, and the annotations say a `bandwidth`
better than containerd does, whose numbers are of 32 bits."""

_BACKUP = ".extbridge-backup"

_LIST = ".conflist"

_SUFFIXES = (".conf", _LIST, ".json")
"""What containerd and CRI-O read, in the order of the names' bytes; in all but the second a single
plugin's configuration."""

_DERIVED = f"-extbridge{_LIST}"
"""How the name of a list ends that was made of a single plugin's configuration. `-` comes before
`.`, so the list comes before its original, and before what comes after that."""

_CONF_DIR_HINT = (
    "name the folder where the container runtime looks for network configurations (containerd:"
    " conf_dir, CRI-O: network_dir; mostly /etc/cni/net.d), or make it"
)


@contextmanager
def chained(folder: Path) -> Iterator[bool]:
    """When the block ends, extbridge stands last in the folder's first network configuration.

    All is read and checked before the block, in which the executable is to be put in its place; it
    is given whether anything of that is still to be done.
    Raises TryAgainLater where there is no configuration yet, InvalidNetworkConfig where extbridge
    cannot stand in it, IoFailure and OSError.
    """
    with locked(folder, _CONF_DIR_HINT):
        original = _find_first(folder)
        target = original
        with _naming(original):
            network = _read(original)
            if not original.name.endswith(_LIST):
                target = folder / f"{original.name.rpartition('.')[0]}{_DERIVED}"
                network = _as_list(network)
            _refuse_where_it_would_fail(network)
            wanted = _with_plugin(network)
            content = _encode(wanted)
        is_derived = target != original
        is_other = not _has_content(target, content) if is_derived else network != wanted
        yield is_other or bool(_all_of_ours_but(target, folder))
        _forget_all_but(target, folder)
        if is_derived:
            _put_new(target, content, like=original)
        elif is_other:
            if not _has_plugin(network):
                _back_up(target)
            _replace(target, content, like=target)


def keep_chained(folder: Path) -> bool:
    """Do what `chained` does; whether anything was amiss.

    Where there is nothing left but ours, what that was made of is gone, and it goes too: the node
    has no network any more, as its owner wants it. Raises as `chained`, but for that.
    """
    try:
        with chained(folder) as is_due:
            return is_due
    except TryAgainLater:
        with locked(folder, _CONF_DIR_HINT):
            ours = _all_of_ours_but(None, folder)
            _forget_all_but(None, folder)
            return bool(ours)


@contextmanager
def put(folder: Path, source: Path) -> Iterator[None]:
    """When the block ends, the network list in the file source stands in the folder, by its name.

    Raises InvalidNetworkConfig for a file that extbridge or a runtime would refuse, before the
    block, as well as IoFailure where somebody else's file has its name; and OSError.
    """
    target = folder / source.name
    with _naming(source):
        if not source.name.endswith(_LIST):
            raise InvalidNetworkConfig("this is no list's name", f"it has to end in {_LIST}")
        _check_list(_read(source))
        content = source.read_bytes()
    with locked(folder, _CONF_DIR_HINT):
        is_others = target.exists() and not _is_made_here(target)
        if is_others and target.read_bytes() != content:
            raise IoFailure(
                f"{target} is there already and was not put there by extbridge install",
                f"give {source.name} another name, or move the other out of the way",
            )
        yield
        _forget_all_but(target, folder)
        if not is_others:
            _put_new(target, content)


def remove(folder: Path) -> None:
    """Leave the folder as it was before `chained` and `put`; all of it is read before any change.

    A list that its owner has written anew meanwhile loses extbridge and stays as it is otherwise.
    Raises InvalidNetworkConfig for a broken file that may be one of these, IoFailure, OSError.
    """
    with locked(folder, _CONF_DIR_HINT):
        lists = {}
        for path in sorted(folder.glob(f"*{_LIST}")):
            if _mentions_shim(path) and not _is_made_here(path):
                with _naming(path):
                    lists[path] = _read(path)
        _forget_all_but(None, folder)
        for path, network in lists.items():
            if _has_plugin(network):
                _take_out(path, network)
        for remains in (*folder.glob(f"*{_BACKUP}"), *folder.glob(draft_of(Path("*")).name)):
            remains.unlink()


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors of the block name the file."""
    try:
        yield
    except CniError as failure:
        raise InvalidNetworkConfig(f"{path}: {failure.message}", failure.hint) from failure


def _find_first(folder: Path) -> Path:
    """The configuration that runtimes take, or would take if it were not for ours."""
    names = (name for name in os.listdir(folder) if name.endswith(_SUFFIXES))
    for name in sorted(names, key=os.fsencode):
        path = folder / name
        if not path.is_dir() and not _is_made_here(path):
            return path
    raise TryAgainLater(
        f"there is no network configuration in {folder}",
        "install the cluster's network first; an init container is tried again by itself",
    )


def _read(path: Path) -> JsonObject:
    return as_object(load_json(decode(path.read_bytes())), where="the configuration")


def _as_list(plugin: JsonObject) -> JsonObject:
    """The list that libcni makes of a single plugin's configuration (ConfListFromConf)."""
    if not get_str(plugin, "type"):
        raise InvalidNetworkConfig(
            "type is missing",
            f"it has to be the configuration of a plugin; a list's name ends in {_LIST}",
        )
    of_list = {key: plugin[key] for key in ("cniVersion", "name") if key in plugin}
    return {**of_list, "plugins": [plugin]}


def _refuse_where_it_would_fail(network: JsonObject) -> None:
    """Refuse a list in which extbridge would make every pod's ADD fail."""
    if not get_objects(network, "plugins"):
        raise InvalidNetworkConfig(
            "there are no plugins in this list", f"it has to have them in the file, before {SHIM}"
        )
    check_version("ADD", get_str(network, "cniVersion") or IMPLIED)


def _check_list(network: JsonObject) -> None:
    """Refuse what a runtime or extbridge itself would refuse of the whole list."""
    _refuse_where_it_would_fail(network)
    name = get_str(network, "name") or ""
    fault = find_name_fault(name)
    if fault:
        raise InvalidNetworkConfig(f"name is {describe(name)}", fault)
    for index, plugin in enumerate(get_objects(network, "plugins") or ()):
        where = f"plugins[{index}]"
        kind = get_str(plugin, "type", where=where)
        if kind is None:
            raise InvalidNetworkConfig(f"{where}.type is missing", "name the plugin")
        if kind != SHIM:
            continue
        try:
            refuse_unknown_keys(plugin)
            named = get_str(plugin, "network") or configured_network({**plugin, "name": name})
        except CniError as failure:
            raise InvalidNetworkConfig(f"{where}: {failure.message}", failure.hint) from failure
        if named is None and not (index and _is_plugin(plugin)):
            raise InvalidNetworkConfig(
                f"{where} says neither extbridge nor network",
                "only behind another plugin, and with the capability"
                f" {POD_ANNOTATIONS}, can it be left to the pods",
            )


def _plugins(network: JsonObject) -> list[object]:
    plugins = network.get("plugins")
    return plugins if isinstance(plugins, list) else []


def _has_plugin(network: JsonObject) -> bool:
    return any(map(_is_plugin, _plugins(network)))


def _is_plugin(plugin: object) -> bool:
    """Whether it is what `chained` puts into a list, of this version or another.

    An extbridge with a network of its own was put there by somebody else.
    """
    if not isinstance(plugin, dict) or plugin.get("type") != SHIM:
        return False
    capabilities = plugin.get("capabilities")
    return isinstance(capabilities, dict) and capabilities.get(POD_ANNOTATIONS) is True


def _with_plugin(network: JsonObject) -> JsonObject:
    """The list with extbridge last, or where it stands already if others were put behind it."""
    plugins = _plugins(network)
    if _has_plugin(network):
        plugins = [PLUGIN if _is_plugin(plugin) else plugin for plugin in plugins]
    else:
        plugins = [*plugins, PLUGIN]
    return {**network, "plugins": plugins}


def _take_out(path: Path, network: JsonObject) -> None:
    """Give back the original if nothing else has changed since, to the byte; or else the rest."""
    plugins = [plugin for plugin in _plugins(network) if not _is_plugin(plugin)]
    rest = {**network, "plugins": plugins}
    with suppress(FileNotFoundError, CniError):
        if _read(_backup_of(path)) == rest:
            os.rename(_backup_of(path), path)
            return
    _replace(path, _encode(rest), like=path)


def _put_new(path: Path, content: bytes, *, like: Path | None = None) -> None:
    """Put a file of our own, which its empty backup says."""
    if _has_content(path, content):
        return
    _backup_of(path).touch()
    _replace(path, content, like=like)


def _forget_all_but(kept: Path | None, folder: Path) -> None:
    """Remove files of our own that an earlier install put: they would be read in `kept`'s place."""
    for path in _all_of_ours_but(kept, folder):
        _forget(path)


def _all_of_ours_but(kept: Path | None, folder: Path) -> list[Path]:
    return [path for path in folder.glob(f"*{_LIST}") if path != kept and _is_made_here(path)]


def _has_content(path: Path, content: bytes) -> bool:
    return path.exists() and path.read_bytes() == content


def _forget(path: Path) -> None:
    """Remove a file of our own; the other, which says whose it is, last."""
    path.unlink()
    _backup_of(path).unlink()


def _is_made_here(path: Path) -> bool:
    """Whether the file is ours, and not one that somebody else has put in its place since."""
    backup = _backup_of(path)
    return backup.exists() and backup.stat().st_size == 0 and _mentions_shim(path)


def _mentions_shim(path: Path) -> bool:
    return path.is_file() and f'"{SHIM}"'.encode() in path.read_bytes()


def _back_up(path: Path) -> None:
    """Keep the file under a second name: with its owner, its mode, and all else that it has."""
    backup = _backup_of(path)
    backup.unlink(missing_ok=True)
    os.link(path, backup, follow_symlinks=False)


def _backup_of(path: Path) -> Path:
    return path.with_name(path.name + _BACKUP)


def _replace(path: Path, content: bytes, *, like: Path | None) -> None:
    """Put the file, with the owner and mode of another; of none, root's and for all to read."""
    status = like.stat() if like else None
    mode, owner = (
        (0o644, (0, 0))
        if status is None
        else (status.st_mode & 0o7777, (status.st_uid, status.st_gid))
    )
    replace_file(path, content, mode, owner)


def _encode(network: JsonObject) -> bytes:
    try:
        return json.dumps(network, indent=2, allow_nan=False).encode() + b"\n"
    except ValueError as failure:
        # 1e999 is JSON, and infinite in Python.
        raise InvalidNetworkConfig("a number is too large", "allowed: 64 bits") from failure
