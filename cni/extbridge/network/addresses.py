"""The addresses of an attachment: those that are asked for, and what an IPAM plugin gives.

They are the guest's, and are put on no interface of the pod. Their form as an object is that of
SPEC 1.1.0 section 5, "Delegated plugins (IPAM)", in the ledger too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv6Address,
    IPv6Interface,
    ip_address,
    ip_interface,
)
from typing import Final, TypeAlias

from extbridge.spec.errors import InvalidNetworkConfig
from extbridge.spec.fields import (
    JsonObject,
    as_str,
    describe,
    field_path,
    get_int,
    get_list,
    get_object,
    get_objects,
    get_str,
)

_WITH_PREFIX = "it has to be an address with its prefix length, such as 192.0.2.7/24 or fd00::7/64"
_PREFIX_OPTIONAL = (
    "it has to be an address such as 192.0.2.7/24, 192.0.2.7 or fd00::7/64; without a prefix length"
    " it depends on the IPAM plugin what becomes of it"
)
_NO_PREFIX = "it has to be an address without a prefix length, such as 192.0.2.1 or fd00::1"
_DESTINATION = "it has to be a network in CIDR notation, such as 192.0.2.0/24 or ::/0"

_BROADCAST = IPv4Address("255.255.255.255")

_ROUTE_NUMBERS: Final = ("mtu", "advmss", "priority", "table", "scope")
"""What a route may say besides, each 32 bits without sign (SPEC 1.1.0 section 5)."""

_DNS_LISTS: Final = ("nameservers", "search", "options")

_Ip: TypeAlias = IPv4Address | IPv6Address


@dataclass(frozen=True, slots=True)
class Address:
    """An address with its prefix length, `10.1.2.3/24`, and the gateway of its subnet."""

    address: str
    gateway: str | None = None


@dataclass(frozen=True, slots=True)
class Route:
    """A route of the guest's; `dst` is a network, and `gw` None the gateway of an address."""

    dst: str
    gw: str | None = None
    mtu: int | None = None
    advmss: int | None = None
    priority: int | None = None
    table: int | None = None
    scope: int | None = None


@dataclass(frozen=True, slots=True)
class Addressing:
    """All that a guest has to know to speak IP; `dns` is the specification's object."""

    addresses: tuple[Address, ...] = ()
    routes: tuple[Route, ...] = ()
    dns: Mapping[str, object] = field(default_factory=dict)


def parse_ips(given: Iterable[object], *, where: str) -> tuple[str, ...]:
    """The addresses that are asked for, as `runtimeConfig.ips` and a pod's annotation hold them.

    One without a prefix length stays so: whether that will do is the IPAM plugin's to say (CNI's
    CONVENTIONS.md, "ips"; host-local takes the range's, static refuses). Raises
    InvalidNetworkConfig for what no guest can have, and for one that is there twice.
    """
    asked: dict[_Ip, str] = {}
    for index, item in enumerate(given):
        path = f"{where}[{index}]"
        text = as_str(item, where=path)
        if "/" in text:
            interface = _parse_interface(text, path, _PREFIX_OPTIONAL)
            ip, shown = interface.ip, str(interface)
        else:
            ip = _parse_ip(text, path, _PREFIX_OPTIONAL)
            shown = str(ip)
        _refuse_unusable(ip, text, path)
        if ip in asked:
            raise InvalidNetworkConfig(f"{path} is {describe(text)} once more", "name it once")
        asked[ip] = shown
    return tuple(asked.values())


def addressing_from_ips(ips: Iterable[str]) -> Addressing:
    """What a guest has that is given `ips` (of parse_ips) where there is no IPAM plugin.

    An address without a prefix length is alone in its subnet: /32 or /128.
    """
    return Addressing(addresses=tuple(Address(str(ip_interface(ip))) for ip in ips))


def parse_addressing(obj: JsonObject) -> Addressing:
    """The addressing that an IPAM plugin's result, or addressing_to_object's, says.

    Every version's from 0.3.0 on: they differ in `ips[].version`, which the address tells, and in
    what a route may say. What the specification does not name is left out. Raises
    InvalidNetworkConfig, naming the field.
    """
    ips = get_objects(obj, "ips") or []
    routes = get_objects(obj, "routes") or []
    return Addressing(
        addresses=tuple(_parse_address(ip, f"ips[{index}]") for index, ip in enumerate(ips)),
        routes=tuple(_parse_route(route, f"routes[{index}]") for index, route in enumerate(routes)),
        dns=_parse_dns(get_object(obj, "dns") or {}),
    )


def addressing_to_object(addressing: Addressing) -> dict[str, object]:
    """The addressing as an object; parse_addressing of it is addressing again."""
    return {
        "ips": [_said(address, ("address", "gateway")) for address in addressing.addresses],
        "routes": [_said(route, ("dst", "gw", *_ROUTE_NUMBERS)) for route in addressing.routes],
        "dns": dict(addressing.dns),
    }


def _parse_address(obj: JsonObject, where: str) -> Address:
    path = field_path(where, "address")
    text = _required(obj, "address", where)
    interface = _parse_interface(text, path, _WITH_PREFIX)
    _refuse_unusable(interface.ip, text, path)
    return Address(str(interface), _get_ip(obj, "gateway", where))


def _parse_route(obj: JsonObject, where: str) -> Route:
    destination = _parse_interface(
        _required(obj, "dst", where), field_path(where, "dst"), _DESTINATION
    )
    return Route(
        # The kernel refuses a route to an address within a network (fib_valid_key_len).
        str(destination.network),
        _get_ip(obj, "gw", where),
        **{key: _get_u32(obj, key, where) for key in _ROUTE_NUMBERS},
    )


def _parse_dns(obj: JsonObject) -> dict[str, object]:
    where = "dns"
    dns: dict[str, object] = {}
    for key in _DNS_LISTS:
        path = field_path(where, key)
        items = get_list(obj, key, where=where) or []
        dns[key] = [as_str(item, where=f"{path}[{index}]") for index, item in enumerate(items)]
    dns["domain"] = get_str(obj, "domain", where=where)
    return {key: value for key, value in dns.items() if value}


def _parse_interface(text: str, path: str, wanted: str) -> IPv4Interface | IPv6Interface:
    """An address with its prefix length; ip_interface takes it without, or with a netmask, too."""
    try:
        interface = ip_interface(text)
    except ValueError as failure:
        raise InvalidNetworkConfig(f"{path} is {describe(text)}", wanted) from failure
    if not text.partition("/")[2].isdigit() or _is_ambiguous(text, interface.ip):
        raise InvalidNetworkConfig(f"{path} is {describe(text)}", wanted)
    return interface


def _parse_ip(text: str, path: str, wanted: str) -> _Ip:
    try:
        ip = ip_address(text)
    except ValueError as failure:
        raise InvalidNetworkConfig(f"{path} is {describe(text)}", wanted) from failure
    if _is_ambiguous(text, ip):
        raise InvalidNetworkConfig(f"{path} is {describe(text)}", wanted)
    return ip


def _is_ambiguous(text: str, ip: _Ip) -> bool:
    """Whether another reader may take it for something else.

    Go, in which the IPAM plugins are written, reads ::ffff:192.0.2.7 as IPv4, and no scope at all.
    """
    return "%" in text or (isinstance(ip, IPv6Address) and ip.ipv4_mapped is not None)


def _refuse_unusable(ip: _Ip, text: str, path: str) -> None:
    if ip.is_unspecified or ip.is_loopback or ip.is_multicast or ip == _BROADCAST:
        raise InvalidNetworkConfig(
            f"{path} is {describe(text)}",
            "no guest can have an unspecified, loopback, multicast or broadcast address",
        )


def _get_ip(obj: JsonObject, key: str, where: str) -> str | None:
    text = get_str(obj, key, where=where)
    # Go writes an address that was never filled as "".
    return str(_parse_ip(text, field_path(where, key), _NO_PREFIX)) if text else None


def _get_u32(obj: JsonObject, key: str, where: str) -> int | None:
    given = get_int(obj, key, where=where)
    if given is not None and not 0 <= given < 1 << 32:
        raise InvalidNetworkConfig(
            f"{field_path(where, key)} is {describe(given)}", f"allowed: 0 to {(1 << 32) - 1}"
        )
    return given


def _required(obj: JsonObject, key: str, where: str) -> str:
    text = get_str(obj, key, where=where)
    if text is None:
        raise InvalidNetworkConfig(f"{field_path(where, key)} is missing", "it has to be there")
    return text


def _said(item: Address | Route, keys: Iterable[str]) -> dict[str, object]:
    values = ((key, getattr(item, key)) for key in keys)
    return {key: value for key, value in values if value is not None}
