"""Networks of other programs, said in our words, and what of them cannot be said so.

macvtap-cni keeps a network in two places: its device plugin's list of resources (the variable
DP_MACVTAP_CONF, mostly in a ConfigMap) has the NIC and the mode, the NetworkAttachmentDefinitions
that ask for such a resource have the MTU. What it reads there is in its pkg/deviceplugin/lister.go
and pkg/cni/plugin.go.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from extbridge.network.definition import Network, parse_network
from extbridge.network.spelling_json import load_json
from extbridge.network.spelling_yaml import network_to_yaml, values_from_yaml, values_to_yaml
from extbridge.network.store import decode
from extbridge.spec.errors import InvalidNetworkConfig
from extbridge.spec.fields import (
    JsonObject,
    allowed_hint,
    as_object,
    describe,
    get_bool,
    get_int,
    get_object,
    get_objects,
    get_str,
)

RESOURCE_PREFIX: Final = "extbridge.io/"

_RESOURCE_ANNOTATION = "k8s.v1.cni.cncf.io/resourceName"

_APPLIED_ANNOTATION = "kubectl.kubernetes.io/last-applied-configuration"

_THEIR_PREFIX = "macvtap.network.kubevirt.io/"

_THEIR_VARIABLE = "DP_MACVTAP_CONF"

_THEIR_MODE = "bridge"

_THEIR_CAPACITY = 100

_THEIR_VERSION = "0.3.1"
"""Of all their examples; Multus takes a definition without one for the oldest."""

_QEMU = 107
"""The user and group that they and we give a device node to, unless told otherwise."""

_CAPABILITIES: Final[JsonObject] = dict.fromkeys(("mac", "ips", "bandwidth", "deviceID"), True)


@dataclass(slots=True)
class Conversion:
    """Networks by name, attachment definitions as Kubernetes has them; `left_out` in sentences."""

    networks: dict[str, Network] = field(default_factory=dict)
    attachments: list[JsonObject] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def to_yaml(self) -> str:
        """The ConfigMap that holds the networks, and the attachment definitions, to be applied."""
        files = {f"{name}.yaml": network_to_yaml(it) for name, it in self.networks.items()}
        config_map = {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": "extbridge-networks", "namespace": "extbridge"},
            "data": files,
        }
        return values_to_yaml(([config_map] if files else []) + [*self.attachments])


@dataclass(frozen=True, slots=True)
class _Object:
    """An object of a Kubernetes API, and how it is called in messages."""

    kind: str
    where: str
    value: JsonObject


def convert(files: Mapping[str, bytes]) -> Conversion:
    """The networks in files, their contents by their names.

    Raises InvalidNetworkConfig, with file, object and field, for what neither we nor the program
    could make a network of.
    """
    converted = Conversion()
    objects = [found for name, data in files.items() for found in _read_objects(name, data)]
    resources = _read_resources(objects, converted)
    for found in objects:
        if found.kind == "NetworkAttachmentDefinition":
            with _naming(found.where):
                _convert_attachment(found, resources, converted)
        elif found.kind != "ConfigMap":
            converted.left_out.append(f"{found.where}: it defines no network")
    for name, definition in (resources or {}).items():
        if name not in converted.networks:
            converted.networks[name] = parse_network(definition)
    if not converted.networks:
        raise InvalidNetworkConfig(
            f"there is no network in {', '.join(files)}",
            f"give macvtap-cni's ConfigMap, with {_THEIR_VARIABLE}, and its"
            " NetworkAttachmentDefinitions, as YAML or JSON",
        )
    return converted


def _read_objects(file: str, data: bytes) -> Iterator[_Object]:
    """All objects in the file, also those that kubectl writes as items of a List."""
    with _naming(file):
        text = decode(data)
        is_json = text.lstrip().startswith("{")
        values = [load_json(text)] if is_json else values_from_yaml(text)
        while values:
            value = as_object(values.pop(0) or {}, where="a document")
            if not value:
                continue
            items = get_objects(value, "items")
            if items is not None:
                values[:0] = items
                continue
            kind = get_str(value, "kind") or "object without a kind"
            metadata = get_object(value, "metadata") or {}
            names = (get_str(metadata, key, where="metadata") for key in ("namespace", "name"))
            full_name = "/".join(filter(None, names))
            yield _Object(kind, f"{file}: {kind} {full_name}".rstrip(), value)


def _read_resources(
    objects: list[_Object], converted: Conversion
) -> dict[str, dict[str, object]] | None:
    """The definition of each resource by its name; None where no file says which there are."""
    resources: dict[str, dict[str, object]] | None = None
    for found in objects:
        if found.kind != "ConfigMap":
            continue
        with _naming(found.where):
            text = get_str(get_object(found.value, "data") or {}, _THEIR_VARIABLE, where="data")
            if text is None:
                converted.left_out.append(f"{found.where}: it has no {_THEIR_VARIABLE}")
                continue
            with _naming(f"data.{_THEIR_VARIABLE}"):
                given = get_objects({"it": load_json(text)}, "it") or []
                resources = resources or {}
                for resource in given:
                    name, definition = _convert_resource(resource, found.where, converted)
                    if resources.setdefault(name, definition) != definition:
                        raise InvalidNetworkConfig(
                            f"the resource {name} is there twice", "keep one of them"
                        )
    return resources


def _convert_resource(
    resource: JsonObject, where: str, converted: Conversion
) -> tuple[str, dict[str, object]]:
    name = get_str(resource, "name")
    if name is None:
        raise InvalidNetworkConfig("name is missing", "a resource needs a name")
    mode = get_str(resource, "mode", where=name) or _THEIR_MODE
    modes = ("vepa", "bridge", "private")
    if mode not in modes:
        raise InvalidNetworkConfig(f"{name}.mode is {describe(mode)}", allowed_hint(mode, modes))
    capacity = get_int(resource, "capacity", where=name) or _THEIR_CAPACITY
    if capacity != _THEIR_CAPACITY:
        converted.left_out.append(
            f"{where}: {name}.capacity {capacity}: a network has 256 devices on each node"
        )
    for key in resource.keys() - {"name", "lowerDevice", "master", "mode", "capacity"}:
        converted.left_out.append(f"{where}: {name}.{key}: macvtap-cni does not know it either")
    # The latter is its name in their older versions.
    dev = get_str(resource, "lowerDevice", where=name) or get_str(resource, "master", where=name)
    if dev is None:
        raise InvalidNetworkConfig(f"{name}.lowerDevice is missing", "name the NIC")
    definition = _definition(name, dev, mode)
    parse_network(definition)
    return name, definition


def _definition(name: str, dev: str, mode: str = _THEIR_MODE) -> dict[str, object]:
    return {"name": name, "extbridge": {"mode": mode, "dev": dev}, "handoff": "device"}


def _convert_attachment(
    found: _Object, resources: dict[str, dict[str, object]] | None, converted: Conversion
) -> None:
    metadata = get_object(found.value, "metadata") or {}
    name = get_str(metadata, "name", where="metadata") or ""
    annotations = get_object(metadata, "annotations", where="metadata") or {}
    resource = get_str(annotations, _RESOURCE_ANNOTATION, where="metadata.annotations") or ""
    config = get_str(get_object(found.value, "spec") or {}, "config", where="spec")
    with _naming("spec.config"):
        theirs = as_object(load_json(config or "{}"), where="it")
        plugins = get_objects(theirs, "plugins")
    if not any(it.get("type") == "macvtap" for it in plugins or [theirs]):
        converted.left_out.append(f"{found.where}: it is not of the type macvtap")
        return
    if not resource.startswith(_THEIR_PREFIX):
        raise InvalidNetworkConfig(
            f"the annotation {_RESOURCE_ANNOTATION} is {describe(resource)}",
            f"it has to be {_THEIR_PREFIX} and the name of a resource",
        )
    base = _find_resource(resource.removeprefix(_THEIR_PREFIX), resources)
    chosen = ""
    ours: list[JsonObject] = []
    for plugin in plugins or [theirs]:
        if plugin.get("type") != "macvtap":
            ours.append(plugin)
            continue
        with _naming("spec.config"):
            mtu = get_int(plugin, "mtu") or None
            chosen = _choose_network(base, mtu, found.where, converted)
            _tell_what_is_left_out(plugin, found.where, converted)
        ours.append({"type": "extbridge", "network": chosen, "capabilities": _CAPABILITIES})
    head = {
        "cniVersion": get_str(theirs, "cniVersion") or _THEIR_VERSION,
        "name": get_str(theirs, "name") or name,
    }
    body = {**head, **ours[0]} if plugins is None else {**head, "plugins": ours}
    kept = {key: value for key, value in annotations.items() if key != _APPLIED_ANNOTATION}
    attachment = {
        "apiVersion": "k8s.cni.cncf.io/v1",
        "kind": found.kind,
        "metadata": {
            **{key: metadata[key] for key in ("name", "namespace", "labels") if metadata.get(key)},
            "annotations": {**kept, _RESOURCE_ANNOTATION: f"{RESOURCE_PREFIX}{chosen}"},
        },
        "spec": {"config": json.dumps(body, indent=2) + "\n"},
    }
    converted.attachments.append(attachment)


def _find_resource(name: str, resources: dict[str, dict[str, object]] | None) -> dict[str, object]:
    if resources is None:
        raise InvalidNetworkConfig(
            f"no file says which NIC the resource {name} is",
            f"give the ConfigMap with {_THEIR_VARIABLE} as well",
        )
    if not resources:
        # Without a list, their device plugin offers each NIC by its name.
        return _definition(name, name)
    if name not in resources:
        raise InvalidNetworkConfig(
            f"the resource {name} is not in {_THEIR_VARIABLE}", allowed_hint(name, resources)
        )
    return resources[name]


def _choose_network(
    base: dict[str, object], mtu: int | None, where: str, converted: Conversion
) -> str:
    """The name of the network that has the resource's NIC and this MTU: ours keep both together."""
    name = str(base["name"])
    definition = base if mtu is None else {**base, "mtu": mtu}
    network = parse_network(definition)
    if converted.networks.setdefault(name, network) == network:
        return name
    other = f"{name}-mtu{mtu or ''}"
    converted.networks[other] = parse_network({**definition, "name": other})
    converted.left_out.append(
        f"{where}: the resource {name} has attachments with more than one MTU; pods of this one"
        f" have to ask for {RESOURCE_PREFIX}{other}"
    )
    return other


def _tell_what_is_left_out(plugin: JsonObject, where: str, converted: Conversion) -> None:
    told = dict.fromkeys(("type", "name", "cniVersion", "mtu", "plugins"), "")
    if get_bool(plugin, "promiscMode") is not None:
        told["promiscMode"] = (
            "a guest that is to hear and to speak for other MACs needs trust: true in its network"
            if plugin["promiscMode"]
            else ""
        )
    for key in ("owner", "group"):
        if get_int(plugin, key) not in (None, _QEMU):
            told[key] = f"the device node is given to {_QEMU}, QEMU's in KubeVirt's images"
        else:
            told[key] = ""
    for key in plugin:
        reason = told.get(key, "macvtap-cni takes no notice of it either")
        if reason:
            converted.left_out.append(f"{where}: {key}: {reason}")


@contextmanager
def _naming(where: str) -> Iterator[None]:
    """Errors of the block say where."""
    try:
        yield
    except InvalidNetworkConfig as failure:
        raise InvalidNetworkConfig(f"{where}: {failure.message}", failure.hint) from failure
