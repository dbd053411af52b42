"""Networks of macvtap-cni, and what of them cannot be said in our words.

It keeps a network in two places: its device plugin's list of resources (the variable
DP_MACVTAP_CONF, mostly in a ConfigMap) has the NIC and the mode, the NetworkAttachmentDefinitions
that ask for such a resource have the MTU. What it reads there is in its pkg/deviceplugin/lister.go
and pkg/cni/plugin.go.
"""

from __future__ import annotations

from typing import Final

from extbridge.network.conversion import (
    RESOURCE_ANNOTATION,
    RESOURCE_PREFIX,
    Configuration,
    Conversion,
    naming,
    split_plugins,
)
from extbridge.network.definition import parse_network
from extbridge.network.spelling_json import load_json
from extbridge.spec.errors import InvalidNetworkConfig
from extbridge.spec.fields import (
    JsonObject,
    allowed_hint,
    describe,
    get_bool,
    get_int,
    get_object,
    get_objects,
    get_str,
)

TYPE: Final = "macvtap"

VARIABLE: Final = "DP_MACVTAP_CONF"

Resources = dict[str, dict[str, object]]
"""The definition of each resource by its name."""

_THEIR_PREFIX = "macvtap.network.kubevirt.io/"

_THEIR_MODE = "bridge"

_THEIR_CAPACITY = 100

_THEIR_VERSION = "0.3.1"
"""Of all their examples; Multus takes a definition without one for the oldest."""

_QEMU = 107
"""The user and group that they and we give a device node to, unless told otherwise."""


def read_resources(
    config_map: JsonObject, where: str, resources: Resources | None, converted: Conversion
) -> Resources | None:
    """The resources so far and those of config_map; None where nothing says which there are.

    Raises InvalidNetworkConfig.
    """
    text = get_str(get_object(config_map, "data") or {}, VARIABLE, where="data")
    if text is None:
        converted.left_out.append(f"{where}: it has no {VARIABLE}")
        return resources
    known = dict(resources or {})
    with naming(f"data.{VARIABLE}"):
        for resource in get_objects({"it": load_json(text)}, "it") or []:
            name, definition = _convert_resource(resource, where, converted)
            if known.setdefault(name, definition) != definition:
                raise InvalidNetworkConfig(
                    f"the resource {name} is there twice", "keep one of them"
                )
    return known


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


def convert_attachment(
    attachment: JsonObject,
    theirs: JsonObject,
    where: str,
    resources: Resources | None,
    converted: Conversion,
) -> None:
    """Add the network of an attachment definition whose configuration is theirs.

    Raises InvalidNetworkConfig.
    """
    metadata = get_object(attachment, "metadata") or {}
    name = get_str(metadata, "name", where="metadata") or ""
    annotations = get_object(metadata, "annotations", where="metadata") or {}
    resource = get_str(annotations, RESOURCE_ANNOTATION, where="metadata.annotations") or ""
    if not resource.startswith(_THEIR_PREFIX):
        raise InvalidNetworkConfig(
            f"the annotation {RESOURCE_ANNOTATION} is {describe(resource)}",
            f"it has to be {_THEIR_PREFIX} and the name of a resource",
        )
    base = _find_resource(resource.removeprefix(_THEIR_PREFIX), resources)
    with naming("spec.config"):
        plugin, others = split_plugins(theirs, TYPE)
        mtu = get_int(plugin, "mtu") or None
        chosen = _choose_network(base, mtu, where, converted)
        _tell_what_is_left_out(plugin, where, converted)
        head = {
            "cniVersion": get_str(theirs, "cniVersion") or _THEIR_VERSION,
            "name": get_str(theirs, "name") or name,
        }
    converted.configurations.append(Configuration(where, chosen, head, others, metadata=metadata))


def _find_resource(name: str, resources: Resources | None) -> dict[str, object]:
    if resources is None:
        raise InvalidNetworkConfig(
            f"no file says which NIC the resource {name} is",
            f"give the ConfigMap with {VARIABLE} as well",
        )
    if not resources:
        # Without a list, their device plugin offers each NIC by its name.
        return _definition(name, name)
    if name not in resources:
        raise InvalidNetworkConfig(
            f"the resource {name} is not in {VARIABLE}", allowed_hint(name, resources)
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
