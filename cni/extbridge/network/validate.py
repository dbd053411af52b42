"""Files that are to be of extbridge's, with the place of whatever the plugin would refuse.

The rules are those of definition.py and wanted.py. They raise for the first fault, naming its key;
here the key's place is looked up, what is wrong is taken out of the way, and the rules asked again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Final, TypeAlias

from extbridge.network.conversion import (
    ATTACHMENT_KIND,
    CONFIG_MAP,
    RESOURCE_ANNOTATION,
    RESOURCE_PREFIX,
)
from extbridge.network.definition import parse_network, parse_network_name
from extbridge.network.spelling_json import load_json
from extbridge.network.spelling_xml import object_from_xml
from extbridge.network.spelling_yaml import (
    Place,
    nodes_in_yaml,
    values_from_yaml,
)
from extbridge.network.store import READERS, decode, read_definition
from extbridge.network.wanted import (
    POD_ANNOTATIONS,
    configured_network,
    inline_definition,
    refuse_unknown_keys,
)
from extbridge.spec.errors import CniError, InvalidNetworkConfig
from extbridge.spec.fields import (
    JsonObject,
    as_object,
    describe,
    field_path,
    get_object,
    get_objects,
    get_str,
)
from extbridge.spec.request import find_name_fault
from extbridge.spec.versions import IMPLIED, check_version

_TYPES = ("extbridge", "extbridge-cni")
"""The plugin's executables: the shim, and the one that does without an agent."""

_JSON_SUFFIXES = (".json", ".conf", ".conflist")

_UNDERSTOOD: Final = (
    "understood: a network's definition (XML, YAML, JSON); a CNI configuration or list,"
    f" or a {ATTACHMENT_KIND}, with the plugin extbridge; the ConfigMap {CONFIG_MAP}"
)

_STAND_INS: Final[JsonObject] = {
    "name": "n",
    "cniVersion": "1.0.0",
    "network": "n",
    "extbridge": MappingProxyType({"dev": "eth0"}),
}
"""Good values of what has to be there, so that the faults behind a bad one are found as well."""

_Path: TypeAlias = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong, and its line and column from 1; None where they cannot be told."""

    file: str
    place: tuple[int, int] | None
    message: str
    hint: str

    def __str__(self) -> str:
        place = "".join(f":{number}" for number in self.place or ())
        return f"{self.file}{place}: {self.message}; {self.hint}"


@dataclass(frozen=True, slots=True)
class _Text:
    """The text of a file, or of a value in it: then `outer` has it, at `node`, called `where`."""

    file: str
    text: str
    outer: _Text | None = None
    node: Place | None = None
    where: str = ""

    def fault(self, failure: CniError, place: tuple[int, int] | None = None) -> Fault:
        """Failure, with its place in this text, or with the one that its message begins with."""
        message = failure.message
        told = re.match(r"line (\d+)(?:, column (\d+))?: ", message)
        if told and self.is_copied:
            place = int(told[1]), int(told[2] or 1)
            message = message[told.end() :]
        prefix = f"{self.where}: " if self.where else ""
        return Fault(self.file, self.in_file(place), f"{prefix}{message}", failure.hint)

    @property
    def is_copied(self) -> bool:
        """Whether the file has this text as it is, line by line."""
        if self.outer is None:
            return True
        return self.node is not None and bool(self.node.text_line) and self.outer.is_copied

    def in_file(self, place: tuple[int, int] | None) -> tuple[int, int] | None:
        """The line and column in the file of those in this text."""
        if self.outer is None:
            return place
        if self.node is None:
            return None
        if place is None or not self.node.text_line:
            return self.outer.in_file((self.node.line, self.node.column))
        line, column = place
        ours, theirs = self.text.split("\n"), self.outer.text.split("\n")
        outer_line = self.node.text_line + line - 1
        # Past the end is where JSON is missing something.
        has_both = line <= len(ours) and outer_line <= len(theirs)
        indented = len(theirs[outer_line - 1].rstrip("\r")) - len(ours[line - 1]) if has_both else 0
        return self.outer.in_file((outer_line, column + max(indented, 0)))


@dataclass(frozen=True, slots=True)
class _Value:
    """An object of a text, where it stands there, and the places of all that is in the document."""

    text: _Text
    value: JsonObject
    path: _Path = ()
    nodes: Mapping[_Path, Place] = field(default_factory=dict)

    def fault(self, failure: CniError, path: _Path = ()) -> Fault:
        """Failure at path, or at what of it there is."""
        full = (*self.path, *path)
        while full and full not in self.nodes:
            full = full[:-1]
        node = self.nodes.get(full)
        return self.text.fault(failure, (node.line, node.column) if node else None)

    def inner(self, path: _Path, text: str) -> _Text:
        """The text that stands at path."""
        node = self.nodes.get((*self.path, *path))
        return _Text(self.text.file, text, self.text, node, ".".join(map(str, path)))


def find_faults(file: str, data: bytes) -> list[Fault]:
    """All that is wrong with the file's content, in the order of its lines; raises nothing."""
    try:
        text = _Text(file, decode(data))
    except InvalidNetworkConfig as failure:
        return [Fault(file, None, failure.message, failure.hint)]
    path = Path(file)
    faults: list[Fault] = []
    known = 0
    try:
        for found in _read(text, path.suffix):
            told = _check_object(found, path, data)
            if told is not None:
                known += 1
                faults += told
    except InvalidNetworkConfig as failure:
        return [*faults, text.fault(failure)]
    if not known:
        nothing = InvalidNetworkConfig("there is nothing of extbridge in it", _UNDERSTOOD)
        return [text.fault(nothing)]
    return sorted(dict.fromkeys(faults), key=lambda it: it.place or (0, 0))


def _read(text: _Text, suffix: str) -> Iterator[_Value]:
    """The objects of a text, those of Lists each by itself. Raises InvalidNetworkConfig."""
    start = text.text.lstrip()[:1]
    if suffix == ".xml" or (start == "<" and suffix not in READERS):
        yield _Value(text, object_from_xml(text.text))
        return
    if suffix in _JSON_SUFFIXES or (start == "{" and suffix not in READERS):
        values = [_load_json(text.text)]
    else:
        values = values_from_yaml(text.text)
    documents = nodes_in_yaml(text.text)
    for number, value in enumerate(values):
        if value is None and len(values) > 1:
            continue
        nodes = documents[number] if number < len(documents) else {}
        todo: list[tuple[_Path, object]] = [((), value)]
        while todo:
            path, item = todo.pop(0)
            found = as_object(item, where=_field(path) or "the document")
            items = get_objects(found, "items") if "kind" in found else None
            if items is None:
                yield _Value(text, found, path, nodes)
            else:
                todo[:0] = [((*path, "items", n), it) for n, it in enumerate(items)]


def _load_json(text: str) -> object:
    try:
        return load_json(text)
    except InvalidNetworkConfig as failure:
        if not failure.message.startswith("line "):
            # Our reader of YAML tells the same of JSON, with its place.
            try:
                values_from_yaml(text.replace("\t", " "))
            except InvalidNetworkConfig as placed:
                if placed.message.endswith(f": {failure.message}"):
                    raise placed from failure
        raise


def _check_object(found: _Value, file: Path, data: bytes) -> list[Fault] | None:
    """The faults of one object; None for what is nothing of ours."""
    value = found.value
    try:
        kind = get_str(value, "kind")
        if kind == ATTACHMENT_KIND:
            return _check_attachment(found)
        if kind == "ConfigMap":
            metadata = get_object(value, "metadata") or {}
            is_ours = get_str(metadata, "name", where="metadata") == CONFIG_MAP
            return list(_check_config_map(found)) if is_ours else None
    except InvalidNetworkConfig as failure:
        return [found.fault(failure)]
    if kind is not None:
        return None
    if "type" in value or "plugins" in value:
        return _check_configuration(found, None)
    if file.suffix in READERS:
        try:
            read_definition(data, file.suffix)
        except InvalidNetworkConfig as failure:
            # Of the file as a whole: more than one document, or too large.
            return [found.text.fault(failure)]
    return _check_definition(found, file.stem if file.suffix in READERS else "")


def _check_definition(found: _Value, stem: str) -> list[Fault]:
    """The faults of a definition in a file whose name is stem and suffix; empty: it has no name."""
    named = {"name": stem} if stem else {}
    unnamed = found.value.get("name") is None
    value = {**found.value, **named} if unnamed else found.value
    faults = list(_ask(replace(found, value=value), parse_network))
    name = found.value.get("name")
    if stem and isinstance(name, str) and not find_name_fault(name) and name != stem:
        other = InvalidNetworkConfig(
            f"name is {describe(name)}, and the file is called {stem}",
            "in the folder of networks a file has its network's name",
        )
        faults.append(found.fault(other, ("name",)))
    return faults


def _check_config_map(found: _Value) -> Iterator[Fault]:
    """The files in it, each a definition as in the folder that it is mounted as."""
    seen: set[str] = set()
    for name, content in (get_object(found.value, "data") or {}).items():
        path = Path(name)
        where = ("data", name)
        if path.suffix not in READERS or not isinstance(content, str):
            wrong = InvalidNetworkConfig(
                f"data.{name} is no file of a network", f"allowed: NAME{', NAME'.join(READERS)}"
            )
            yield found.fault(wrong, where)
            continue
        if path.stem in seen:
            twice = InvalidNetworkConfig(
                f"network {path.stem} is defined more than once", "keep one of these files"
            )
            yield found.fault(twice, where)
        seen.add(path.stem)
        text = found.inner(where, content)
        try:
            read_definition(content.encode(), path.suffix)
            for inner in _read(text, path.suffix):
                yield from _check_definition(inner, path.stem)
        except InvalidNetworkConfig as failure:
            yield text.fault(failure)


def _check_attachment(found: _Value) -> list[Fault] | None:
    metadata = get_object(found.value, "metadata") or {}
    config = get_str(get_object(found.value, "spec") or {}, "config", where="spec")
    if not config:
        return None
    text = found.inner(("spec", "config"), config)
    try:
        value = as_object(_load_json(config), where="it")
        nodes = nodes_in_yaml(config)
        inner = _Value(text, value, (), nodes[0] if nodes else {})
        # Multus gives a configuration without a name that of the attachment definition.
        faults = _check_configuration(inner, get_str(metadata, "name", where="metadata"))
        network = get_str(value, "network")
    except InvalidNetworkConfig as failure:
        return [text.fault(failure)]
    if faults is None:
        return None
    annotations = get_object(metadata, "annotations", where="metadata") or {}
    resource = get_str(annotations, RESOURCE_ANNOTATION, where="metadata.annotations")
    if network and resource and resource != f"{RESOURCE_PREFIX}{network}":
        other = InvalidNetworkConfig(
            f"{RESOURCE_ANNOTATION} is {describe(resource)}, and the network is {network}",
            f"a device is of one network: {RESOURCE_PREFIX}{network}",
        )
        faults.append(found.fault(other, ("metadata", "annotations", RESOURCE_ANNOTATION)))
    return faults


def _check_configuration(found: _Value, name: str | None) -> list[Fault] | None:
    """The faults of our plugins in a configuration that is called name if it says nothing else."""
    try:
        plugins = get_objects(found.value, "plugins")
    except InvalidNetworkConfig as failure:
        return [found.fault(failure, ("plugins",))]
    alone = plugins is None
    faults: list[Fault] = []
    known = False
    for number, plugin in enumerate([found.value] if plugins is None else plugins):
        if plugin.get("type") not in _TYPES:
            continue
        known = True
        # libcni writes these of the list into each plugin's (SPEC 1.1.0 section 3).
        of_the_list = {
            "name": found.value.get("name") or name,
            "cniVersion": found.value.get("cniVersion"),
        }
        inner = _Value(
            found.text, {**plugin, **of_the_list}, () if alone else ("plugins", number), found.nodes
        )
        faults += _ask(inner, partial(_check_plugin, is_chained=number > 0))
    return faults if known else None


def _check_plugin(config: JsonObject, *, is_chained: bool) -> None:
    """Raise for what ADD would refuse of config, whatever pod and node there are."""
    refuse_unknown_keys(config)
    check_version("ADD", get_str(config, "cniVersion") or IMPLIED)
    name = get_str(config, "name")
    if not name:
        raise InvalidNetworkConfig("name is missing", "a network configuration needs a name")
    parse_network_name(name, field="name")
    definition = inline_definition(config)
    network = get_str(config, "network")
    capabilities = get_object(config, "capabilities") or {}
    if network is not None:
        parse_network_name(network, field="network")
        if definition is not None:
            configured_network(config)
    elif definition is not None:
        parse_network(definition)
    elif not is_chained and capabilities.get(POD_ANNOTATIONS) is not True:
        raise InvalidNetworkConfig(
            "the configuration says neither extbridge nor network",
            'name the NIC: "extbridge": {"dev": "eth0"}, or a definition: "network": "NAME"',
        )


def _ask(found: _Value, rules: Callable[[JsonObject], object]) -> Iterator[Fault]:
    """What the rules say of found, of each of its keys once."""
    value = dict(found.value)
    if isinstance(nics := value.get("extbridge"), dict):
        value["extbridge"] = dict(nics)
    told: set[str] = set()
    while True:
        try:
            rules(value)
        except CniError as failure:
            if failure.message in told:
                return
            told.add(failure.message)
            path = _find_path(value, failure.message)
            yield found.fault(failure, path)
            if not _mend(value, path, failure.message):
                return
        else:
            return


def _find_path(value: JsonObject, message: str) -> _Path:
    """What of value the message is about: its field is the first of its words."""
    best: _Path = ()
    longest = 0
    todo: list[tuple[_Path, object]] = [((), value)]
    while todo:
        path, item = todo.pop()
        name = _field(path)
        if path and not message.startswith(name):
            continue
        if len(name) > longest and message[len(name) : len(name) + 1] in {" ", ":", ".", "["}:
            best, longest = path, len(name)
        if isinstance(item, Mapping):
            todo += [((*path, key), inner) for key, inner in item.items()]
        elif isinstance(item, list):
            todo += [((*path, number), inner) for number, inner in enumerate(item)]
    return best


def _field(path: _Path) -> str:
    """The path as errors write it."""
    name = ""
    for key in path:
        name = f"{name}[{key}]" if isinstance(key, int) else field_path(name, key)
    return name


def _mend(value: dict[str, object], path: _Path, message: str) -> bool:
    """Take the fault out of value; False if nothing is known to."""
    nics = value.get("extbridge")
    if path[:1] == ("extbridge",) and isinstance(nics, dict) and "extbridge is" not in message:
        if len(path) > 1 and path[1] != "dev":
            del nics[path[1]]
        else:
            nics["dev"] = "eth0"
        return True
    missing = (key for key in _STAND_INS if message.startswith(f"{key} is"))
    key = path[0] if path else next(missing, None)
    if key in _STAND_INS:
        value[str(key)] = _STAND_INS[str(key)]
    elif key in value:
        del value[str(key)]
    return key is not None
