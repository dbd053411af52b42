"""Files in which other programs keep networks, read for what they are.

libvirt's network XML, CNI configurations of the plugin macvlan, macvtap-cni's objects, and our own
definitions; which of these a file is, its content says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from extbridge.network import macvlan, macvtap_cni
from extbridge.network.conversion import ATTACHMENT_KIND, Conversion, naming
from extbridge.network.definition import parse_network
from extbridge.network.spelling_json import load_json
from extbridge.network.spelling_xml import find_ignored, object_from_xml
from extbridge.network.spelling_yaml import values_from_yaml
from extbridge.network.store import READERS, decode
from extbridge.spec.errors import InvalidNetworkConfig
from extbridge.spec.fields import JsonObject, as_object, get_object, get_objects, get_str

_UNDERSTOOD: Final = (
    "understood: libvirt's network XML; CNI configurations, or NetworkAttachmentDefinitions, of the"
    f" plugin {macvlan.TYPE}; macvtap-cni's ConfigMap, with {macvtap_cni.VARIABLE}, and its"
    " NetworkAttachmentDefinitions; definitions of extbridge"
)

_CONFIGURATION = "CNI configuration"
_DEFINITION = "network"
"""The kinds of what is no object of Kubernetes."""


@dataclass(frozen=True, slots=True)
class _Object:
    """What one document of a file is, and how it is called in messages."""

    kind: str
    where: str
    value: JsonObject


def convert(files: Mapping[str, bytes]) -> Conversion:
    """The networks in files, their contents by their names.

    Raises InvalidNetworkConfig, with file, object and field, for what neither we nor the program
    could make a network of, and for what is nothing of these programs.
    """
    converted = Conversion()
    objects = [it for name, data in files.items() for it in _read_objects(name, data, converted)]
    resources: macvtap_cni.Resources | None = None
    for found in objects:
        if found.kind == "ConfigMap":
            with naming(found.where):
                resources = macvtap_cni.read_resources(
                    found.value, found.where, resources, converted
                )
    for found in objects:
        if found.kind == ATTACHMENT_KIND:
            with naming(found.where):
                _convert_attachment(found, resources, converted)
    for name, definition in (resources or {}).items():
        if name not in converted.networks:
            converted.networks[name] = parse_network(definition)
    for found in objects:
        with naming(found.where):
            _convert_other(found, converted)
    if not converted.networks:
        raise InvalidNetworkConfig(f"there is no network in {', '.join(files)}", _UNDERSTOOD)
    return converted


def _convert_attachment(
    found: _Object, resources: macvtap_cni.Resources | None, converted: Conversion
) -> None:
    config = get_str(get_object(found.value, "spec") or {}, "config", where="spec")
    with naming("spec.config"):
        theirs = as_object(load_json(config or "{}"), where="it")
        types = _types(theirs)
    if macvtap_cni.TYPE in types:
        macvtap_cni.convert_attachment(found.value, theirs, found.where, resources, converted)
    elif macvlan.TYPE in types:
        metadata = get_object(found.value, "metadata") or {}
        with naming("spec.config"):
            macvlan.convert_macvlan(theirs, found.where, metadata, converted)
    else:
        converted.left_out.append(
            f"{found.where}: it is not of the type {macvtap_cni.TYPE}, nor {macvlan.TYPE}"
        )


def _convert_other(found: _Object, converted: Conversion) -> None:
    if found.kind in {"ConfigMap", ATTACHMENT_KIND}:
        return
    if found.kind == _DEFINITION:
        converted.add(parse_network(found.value))
    elif found.kind != _CONFIGURATION:
        converted.left_out.append(f"{found.where}: it defines no network")
    elif macvlan.TYPE in _types(found.value):
        macvlan.convert_macvlan(found.value, found.where, None, converted)
    else:
        converted.left_out.append(f"{found.where}: it is not of the type {macvlan.TYPE}")


def _types(configuration: JsonObject) -> list[object]:
    plugins = get_objects(configuration, "plugins")
    return [it.get("type") for it in ([configuration] if plugins is None else plugins)]


def _read_objects(file: str, data: bytes, converted: Conversion) -> Iterator[_Object]:
    """All that is in the file, also what kubectl writes as items of a List."""
    with naming(file):
        text = decode(data)
        start = text.lstrip()[:1]
        if start == "<":
            value = object_from_xml(text)
            converted.left_out += [f"{file}: {sentence}" for sentence in find_ignored(text)]
            yield _Object(_DEFINITION, file, value)
            return
        values = [load_json(text)] if start == "{" else values_from_yaml(text)
        while values:
            value = as_object(values.pop(0) or {}, where="a document")
            if not value:
                continue
            items = get_objects(value, "items")
            if items is not None:
                values[:0] = items
                continue
            yield _identify(file, value)


def _identify(file: str, value: JsonObject) -> _Object:
    kind = get_str(value, "kind")
    if kind is not None:
        metadata = get_object(value, "metadata") or {}
        names = (get_str(metadata, key, where="metadata") for key in ("namespace", "name"))
        full_name = "/".join(filter(None, names))
        return _Object(kind, f"{file}: {kind} {full_name}".rstrip(), value)
    if "extbridge" in value and "type" not in value:
        # As in the folder of networks, where the file's name may say it.
        path = Path(file)
        named = {"name": path.stem} if path.suffix in READERS else {}
        return _Object(_DEFINITION, file, {**named, **value})
    if "type" in value or "plugins" in value:
        return _Object(_CONFIGURATION, file, value)
    raise InvalidNetworkConfig("this is no network of any program that is known", _UNDERSTOOD)
