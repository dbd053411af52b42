"""The folder of network definitions: one file a network, named as the network is."""

from __future__ import annotations

import functools
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from extbridge.network.definition import Network, parse_network, parse_network_name
from extbridge.network.spelling_json import object_from_json
from extbridge.spec.errors import InvalidNetworkConfig, IoFailure
from extbridge.spec.fields import JsonObject, allowed_hint
from extbridge.spec.request import find_name_fault

DEFAULT_DIRECTORY: Final = "/etc/cni/extbridge.d"

MAX_FILE_BYTES: Final = 256 * 1024

_MAX_LISTED = 20
"""Networks that an error names."""


def load_network(name: str, directory: str) -> Network:
    """The network called name, from the one file of directory that is called so.

    Raises InvalidNetworkConfig, and IoFailure for a file that is there but cannot be read.
    """
    parse_network_name(name, field="network")
    contents = {}
    for suffix in READERS:
        path = Path(directory, name + suffix)
        data = _read_file(path)
        if data is not None:
            contents[path] = data
    if not contents:
        raise _not_found(name, directory)
    if len(contents) > 1:
        raise InvalidNetworkConfig(
            f"network {name} is defined more than once: {', '.join(map(str, contents))}",
            "keep one of these files",
        )
    [(path, data)] = contents.items()
    try:
        return _parse(data, path.suffix, name)
    except InvalidNetworkConfig as failure:
        raise InvalidNetworkConfig(f"{path}: {failure.message}", failure.hint) from failure


def list_networks(directory: str) -> list[str]:
    """The names of the networks that directory has files for, good or bad; none without it."""
    try:
        files = sorted(Path(directory).iterdir())
    except FileNotFoundError:
        return []
    named = (file.stem for file in files if file.suffix in READERS)
    return [name for name in dict.fromkeys(named) if not find_name_fault(name)]


@functools.lru_cache(maxsize=256)
def _parse(data: bytes, suffix: str, name: str) -> Network:
    # An agent is asked for the same few networks over and over; reading them is cheap, parsing not.
    return parse_network(read_definition(data, suffix), name=name)


def read_definition(data: bytes, suffix: str) -> JsonObject:
    """The object that a file's data says, in the spelling of its suffix, one of READERS.

    Raises InvalidNetworkConfig and nothing else, whatever data is.
    """
    if len(data) > MAX_FILE_BYTES:
        raise InvalidNetworkConfig(
            f"over {MAX_FILE_BYTES} bytes are too many for a network", "allowed: 256 KiB"
        )
    return READERS[suffix](decode(data))


def decode(data: bytes) -> str:
    """The text that a file's data is; raises InvalidNetworkConfig for other than UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as failure:
        raise InvalidNetworkConfig(
            f"byte {failure.start} is not UTF-8", "save the file as UTF-8"
        ) from failure


def _object_from_yaml(text: str) -> JsonObject:
    # PyYAML takes 30 ms to import, which only those should pay who have a YAML file.
    from extbridge.network.spelling_yaml import object_from_yaml

    return object_from_yaml(text)


def _object_from_xml(text: str) -> JsonObject:
    from extbridge.network.spelling_xml import object_from_xml

    return object_from_xml(text)


READERS: Final[Mapping[str, Callable[[str], JsonObject]]] = {
    ".yaml": _object_from_yaml,
    ".yml": _object_from_yaml,
    ".json": object_from_json,
    ".xml": _object_from_xml,
}
"""What reads a file, by its suffix."""


def _read_file(path: Path) -> bytes | None:
    """The file's content, None if there is no such file; at most a byte more than is allowed."""
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise IoFailure(f"{path} is not a regular file", "a network is defined in a file")
            return file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as failure:
        raise IoFailure(
            f"{path} cannot be read: {failure.strerror}", "root has to be able to read it"
        ) from failure


def _open_at_once(path: str, flags: int) -> int:
    """An opener for open(); without O_NONBLOCK a FIFO would hold the request up for good."""
    return os.open(path, flags | os.O_NONBLOCK)


def _not_found(name: str, directory: str) -> InvalidNetworkConfig:
    if not Path(directory).exists():
        return InvalidNetworkConfig(
            f"network {name} is not defined: there is no folder {directory}",
            f"write {directory}/{name}.yaml",
        )
    defined = list_networks(directory)[:_MAX_LISTED]
    return InvalidNetworkConfig(
        f"network {name} is not defined in {directory}",
        allowed_hint(name, defined) if defined else f"write {directory}/{name}.yaml",
    )
