"""The pod annotation that asks for NICs: `extbridge.io/networks`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from extbridge.network.addresses import parse_ips
from extbridge.network.definition import parse_network_name, parse_nic_name
from extbridge.network.mac import parse_mac
from extbridge.network.spelling_json import load_json
from extbridge.spec.errors import InvalidNetworkConfig
from extbridge.spec.fields import (
    JsonObject,
    as_object,
    field_path,
    get_list,
    get_str,
    refuse_unknown,
)

NETWORKS_ANNOTATION: Final = "extbridge.io/networks"

_MAX_CHARACTERS = 64 * 1024

_MAX_NICS = 32
"""What one PCI bus of a guest has slots for."""

_KEYS = ("name", "mac", "interface", "ips")


@dataclass(frozen=True, slots=True)
class AskedNic:
    """One NIC that a pod asks for: on which network, and what it wants to decide itself."""

    name: str
    mac: str | None = None
    interface: str | None = None
    ips: tuple[str, ...] = ()


def parse_networks_annotation(text: str) -> tuple[AskedNic, ...]:
    """The NICs that text asks for, in order; none for blank text.

    Text is names with commas between them, or JSON: an object, or a list of them, with the keys
    name, mac, interface and ips. Raises InvalidNetworkConfig.
    """
    where = NETWORKS_ANNOTATION
    if len(text) > _MAX_CHARACTERS:
        raise InvalidNetworkConfig(
            f"{where} is {len(text)} characters long", f"allowed: {_MAX_CHARACTERS}"
        )
    if not text.strip():
        return ()
    if text.lstrip()[0] in "[{":
        asked = _parse_json(text)
    else:
        names = [name.strip() for name in text.split(",")]
        asked = [
            AskedNic(parse_network_name(name, field=f"{where}[{index}]"))
            for index, name in enumerate(names)
        ]
    if len(asked) > _MAX_NICS:
        raise InvalidNetworkConfig(
            f"{where} asks for {len(asked)} NICs", f"allowed: {_MAX_NICS} a pod"
        )
    _refuse_duplicates([nic.interface for nic in asked if nic.interface])
    return tuple(asked)


def _parse_json(text: str) -> list[AskedNic]:
    where = NETWORKS_ANNOTATION
    try:
        value = load_json(text)
    except InvalidNetworkConfig as failure:
        raise InvalidNetworkConfig(f"{where}: {failure.message}", failure.hint) from failure
    items = value if isinstance(value, list) else [value]
    paths = [f"{where}[{index}]" for index in range(len(items))]
    return [
        _parse_nic(as_object(item, where=path), path)
        for item, path in zip(items, paths, strict=True)
    ]


def _parse_nic(obj: JsonObject, where: str) -> AskedNic:
    refuse_unknown(obj, _KEYS, where=where)
    name = get_str(obj, "name", where=where)
    if name is None:
        raise InvalidNetworkConfig(f"{where}.name is missing", "name the network")
    mac = get_str(obj, "mac", where=where)
    interface = get_str(obj, "interface", where=where)
    return AskedNic(
        name=parse_network_name(name, field=field_path(where, "name")),
        mac=parse_mac(mac, field=field_path(where, "mac")) if mac else None,
        interface=(
            parse_nic_name(interface, field=field_path(where, "interface")) if interface else None
        ),
        ips=parse_ips(get_list(obj, "ips", where=where) or (), where=field_path(where, "ips")),
    )


def _refuse_duplicates(interfaces: list[str]) -> None:
    for interface in interfaces:
        if interfaces.count(interface) > 1:
            raise InvalidNetworkConfig(
                f"{NETWORKS_ANNOTATION} asks for the interface {interface} more than once",
                "give each NIC a name of its own, or none",
            )
