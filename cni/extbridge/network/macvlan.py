"""Networks of containernetworking's plugin macvlan (plugins/main/macvlan), in our words."""

from __future__ import annotations

from typing import Final

from extbridge.network.conversion import (
    CAPABILITIES,
    RESOURCE_ANNOTATION,
    Configuration,
    Conversion,
    split_plugins,
)
from extbridge.network.definition import Mode, parse_network
from extbridge.spec.errors import InvalidNetworkConfig
from extbridge.spec.fields import (
    JsonObject,
    allowed_hint,
    describe,
    get_bool,
    get_int,
    get_object,
    get_str,
)
from extbridge.spec.versions import KNOWN, SUPPORTED

TYPE: Final = "macvlan"

_OLDEST = "0.3.1"
"""What takes the place of versions in which a NIC without an IP address cannot be told of."""

_CARRIED = ("type", "master", "mode", "mtu", "mac", "linkInContainer", "ipam", "capabilities")

_OF_THE_PLUGIN = ("dns", "args")
"""What libcni hands to any plugin, and is no part of a network's definition."""

_OF_THE_LIST = (
    "cniVersion",
    "cniVersions",
    "name",
    "disableCheck",
    "disableGC",
    "loadOnlyInlinedPlugins",
)

_REASONS: Final = {
    "bcqueuelen": "extbridge leaves it at the kernel's",
    "runtimeConfig": "the runtime gives it anew",
    "prevResult": "the runtime gives it anew",
}


def convert_macvlan(
    theirs: JsonObject, where: str, metadata: JsonObject | None, converted: Conversion
) -> None:
    """Add the network of a CNI configuration; metadata is its attachment definition's, if it has.

    Raises InvalidNetworkConfig.
    """
    plugin, others = split_plugins(theirs, TYPE)
    head = {key: theirs[key] for key in theirs if key in _OF_THE_LIST}
    version = get_str(theirs, "cniVersion") or KNOWN[0]
    if version not in SUPPORTED:
        if version not in KNOWN:
            raise InvalidNetworkConfig(
                f"cniVersion is {describe(version)}", allowed_hint(version, KNOWN)
            )
        converted.left_out.append(
            f"{where}: cniVersion {version} cannot tell of a NIC without an IP address;"
            f" {_OLDEST} it is"
        )
        version = _OLDEST
    definition = _read_definition(plugin, where, converted)
    # Multus gives a configuration without a name that of the attachment definition.
    name = get_str(theirs, "name") or get_str(metadata or {}, "name", where="metadata")
    network = parse_network({**definition, "name": name})
    namespace = get_str(metadata or {}, "namespace", where="metadata")
    if converted.networks.get(network.name, network) != network and namespace:
        # Attachment definitions of two namespaces may share a name; networks are the node's.
        network = parse_network({**definition, "name": f"{network.name}-{namespace}"})
    annotations = get_object(metadata or {}, "annotations", where="metadata") or {}
    if annotations.get(RESOURCE_ANNOTATION):
        converted.left_out.append(
            f"{where}: {RESOURCE_ANNOTATION}: macvlan takes no device of a plugin's"
        )
    converted.add(network)
    converted.configurations.append(
        Configuration(
            where,
            network.name,
            {**head, "cniVersion": version, "name": name},
            others,
            {key: plugin[key] for key in _OF_THE_PLUGIN if plugin.get(key)},
            metadata,
        )
    )


def _read_definition(plugin: JsonObject, where: str, converted: Conversion) -> dict[str, object]:
    if get_bool(plugin, "linkInContainer"):
        raise InvalidNetworkConfig(
            "linkInContainer is true, so that the master is a NIC of the pod",
            "extbridge takes NICs of the node",
        )
    mode = get_str(plugin, "mode") or Mode.BRIDGE.value
    if mode not in list(Mode):
        raise InvalidNetworkConfig(f"mode is {describe(mode)}", allowed_hint(mode, list(Mode)))
    ipam = get_object(plugin, "ipam") or {}
    if ipam.get("type") == "dhcp":
        converted.left_out.append(f"{where}: ipam: dhcp is the guest's own to do")
        ipam = {}
    elif ipam and not ipam.get("type"):
        converted.left_out.append(f"{where}: ipam: without a type macvlan takes no notice of it")
        ipam = {}
    for key in get_object(plugin, "capabilities") or {}:
        if key not in CAPABILITIES:
            converted.left_out.append(f"{where}: capabilities.{key}: macvlan has no use for it")
    for key in plugin:
        if key not in (*_CARRIED, *_OF_THE_PLUGIN, *_OF_THE_LIST, "plugins"):
            reason = _REASONS.get(key, "macvlan takes no notice of it either")
            converted.left_out.append(f"{where}: {key}: {reason}")
    return {
        "extbridge": {
            "mode": mode,
            # Without a master it takes the NIC of the default route.
            "dev": get_str(plugin, "master") or {"route": "default"},
        },
        "mtu": get_int(plugin, "mtu") or None,
        "mac": get_str(plugin, "mac") or None,
        "ipam": ipam or None,
    }
