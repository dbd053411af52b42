"""A network's definition: what it says, what it may say, and how it is said as an object.

JSON, YAML and XML all come here as one JSON-like object, so that there is one set of rules.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, TypeVar

from extbridge.network.mac import DEFAULT_MAC_PREFIX, parse_mac, parse_mac_prefix
from extbridge.spec.errors import InvalidNetworkConfig
from extbridge.spec.fields import (
    JsonObject,
    allowed_hint,
    as_object,
    as_str,
    describe,
    field_path,
    get_bool,
    get_int,
    get_object,
    get_str,
    refuse_unknown,
)
from extbridge.spec.request import find_ifname_fault, find_name_fault

MAX_DEPTH: Final = 20
"""How deep objects and lists may nest in a definition file."""

MIN_MTU: Final = 68
"""ETH_MIN_MTU, which is IPv4's smallest (RFC 791)."""

MAX_MTU: Final = 65535
"""ETH_MAX_MTU."""

MAX_QUEUES: Final = 256
"""MAX_TAP_QUEUES of drivers/net/tap.c."""

MAX_NAME_BYTES: Final = 250
"""What NAME_MAX leaves for the name in `NAME.yaml`."""

MAX_NICS: Final = 256

MAX_PATTERN_CHARACTERS: Final = 64

SELECTOR_PATTERNS: Final[Mapping[str, str]] = {
    "match": r"[^/\s]+",
    "pci": r"([0-9a-fA-F]{4,8}:)?[0-9a-fA-F]{2}:[01][0-9a-fA-F]\.[0-7]",
    "driver": r"[A-Za-z0-9_.\-]+",
    "route": "default",
}
"""What a selector's values match whole, MACs apart."""

UUID_PATTERN: Final = r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"

MAX_RATE: Final = (1 << 63) - 1
"""bits/s; what the signed integers of other CNI programs hold."""

MAX_BURST: Final = (1 << 35) - 1
"""Bits; the traffic control API holds a burst as 32 bits of bytes."""

FIRST_IFINDEX: Final = 0x60000000
LAST_IFINDEX: Final = 0x7FFFFFFF
"""The ifindexes of macvtaps of ours. The kernel counts its own from 1, in each namespace anew; it
does not come here by itself."""

FIRST_DEVICE: Final = 0x70000000
"""From here on an ifindex is given to an attachment only if a device plugin has reserved it."""

IPAM_UNFIT: Final = ("dhcp", "extbridge", "extbridge-cni")
"""Plugins that can be no IPAM plugin of a network."""

_IPAM_DEPTH = MAX_DEPTH - 4
"""Less than a file may nest, so that whatever was read can be written as a file."""


class Mode(StrEnum):
    """How macvtaps on one NIC see each other: drivers/net/macvlan.c, enum macvlan_mode."""

    VEPA = "vepa"
    BRIDGE = "bridge"
    PRIVATE = "private"
    PASSTHRU = "passthru"


class Antispoof(StrEnum):
    """Which source addresses a guest is held to."""

    MAC = "mac"
    IP = "ip"
    OFF = "off"


class Handoff(StrEnum):
    """How the tap reaches QEMU: as fds, or as the device node."""

    FD = "fd"
    DEVICE = "device"


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """Limits as seen from the pod, rates in bits/s and bursts in bits; None is no limit.

    A definition's rate has its burst (CNI's `bandwidth` convention); a pod's may have none that
    means anything, and then None is one that suits the rate.
    """

    ingress_rate: int | None = None
    ingress_burst: int | None = None
    egress_rate: int | None = None
    egress_burst: int | None = None


@dataclass(frozen=True, slots=True)
class NicSelector:
    """Which NICs of the node carry the network: by name, or by what all else here says of them."""

    names: tuple[str, ...] = ()
    match: str | None = None
    pci: str | None = None
    driver: str | None = None
    mac: str | None = None
    route: str | None = None


@dataclass(frozen=True, slots=True)
class Network:
    """A valid definition. mtu None is the NIC's own; of antispoof and trust see `held_to`."""

    name: str
    dev: NicSelector
    mode: Mode = Mode.VEPA
    uuid: str | None = None
    mtu: int | None = None
    queues: int = 1
    mac: str | None = None
    mac_prefix: str = DEFAULT_MAC_PREFIX
    antispoof: Antispoof | None = None
    trust: bool = False
    bandwidth: Bandwidth | None = None
    handoff: Handoff = Handoff.FD
    ipam: Mapping[str, object] | None = field(default=None, hash=False)

    @property
    def held_to(self) -> Antispoof:
        """Which source addresses its guests are held to: their MAC, unless it says otherwise."""
        return self.antispoof or (Antispoof.OFF if self.trust else Antispoof.MAC)


DEFINITION_KEYS: Final = (
    "name",
    "uuid",
    "extbridge",
    "mtu",
    "queues",
    "mac",
    "macPrefix",
    "antispoof",
    "trust",
    "bandwidth",
    "handoff",
    "ipam",
)

MODES: Final[Mapping[str, Mode]] = {
    **{mode.value: mode for mode in Mode},
    "passthrough": Mode.PASSTHRU,
}
"""Every spelling of a mode; the last is libvirt's."""

SELECTOR_KEYS: Final = ("match", "pci", "driver", "mac", "route")

BANDWIDTH_KEYS: Final = ("ingressRate", "ingressBurst", "egressRate", "egressBurst")

_Choice = TypeVar("_Choice", bound=StrEnum)


def parse_network(obj: JsonObject, *, name: str | None = None) -> Network:
    """The network that obj defines; name is what it has to be called, where that is known.

    Raises InvalidNetworkConfig for the first unknown key or bad value.
    """
    refuse_unknown(obj, DEFINITION_KEYS)
    extbridge = get_object(obj, "extbridge")
    if extbridge is None:
        raise InvalidNetworkConfig(
            "extbridge is missing", 'name the mode and the NIC: {"mode": "vepa", "dev": "eth0"}'
        )
    refuse_unknown(extbridge, ("mode", "dev"), where="extbridge")
    antispoof = _get_choice(obj, "antispoof", {it.value: it for it in Antispoof})
    trust = get_bool(obj, "trust") or False
    if trust and antispoof in (Antispoof.MAC, Antispoof.IP):
        raise InvalidNetworkConfig(
            f"trust: true lets the guest have any address, and antispoof: {antispoof} does not",
            "leave one of them out",
        )
    return Network(
        name=_get_name(obj, name),
        dev=_get_dev(extbridge),
        mode=_get_choice(extbridge, "mode", MODES, where="extbridge") or Mode.VEPA,
        uuid=_get_uuid(obj),
        mtu=_get_ranged(obj, "mtu", MIN_MTU, MAX_MTU),
        queues=_get_ranged(obj, "queues", 1, MAX_QUEUES) or 1,
        mac=_get_mac(obj, "mac"),
        mac_prefix=_get_mac_prefix(obj),
        antispoof=antispoof,
        trust=trust,
        bandwidth=_get_bandwidth(obj),
        handoff=_get_choice(obj, "handoff", {it.value: it for it in Handoff}) or Handoff.FD,
        ipam=_get_ipam(obj),
    )


def network_to_object(network: Network) -> dict[str, object]:
    """The one way to write network: parse_network of it is network again.

    What is at its default is left out, but for the mode: it is what people look for first.
    """
    said: dict[str, object] = {
        "name": network.name,
        "uuid": network.uuid,
        "extbridge": {"mode": network.mode.value, "dev": _dev_to_value(network.dev)},
        "mtu": network.mtu,
        "queues": None if network.queues == 1 else network.queues,
        "mac": network.mac,
        "macPrefix": None if network.mac_prefix == DEFAULT_MAC_PREFIX else network.mac_prefix,
        "antispoof": None if network.antispoof is None else network.antispoof.value,
        "trust": network.trust or None,
        "bandwidth": None if network.bandwidth is None else _bandwidth_to_object(network.bandwidth),
        "handoff": None if network.handoff is Handoff.FD else network.handoff.value,
        "ipam": network.ipam,
    }
    return _without_none(said)


def parse_network_name(text: str, *, field: str) -> str:
    """Text as a network's name (SPEC 1.1.0 section 1), short enough to name a file.

    Raises InvalidNetworkConfig.
    """
    fault = find_name_fault(text)
    if not fault and len(text) > MAX_NAME_BYTES:
        fault = f"it has to be at most {MAX_NAME_BYTES} characters long and has {len(text)}"
    if fault:
        raise InvalidNetworkConfig(f"{field} is {describe(text)}", fault)
    return text


def parse_nic_name(text: str, *, field: str) -> str:
    """Text as an interface's name; raises InvalidNetworkConfig."""
    fault = find_ifname_fault(text)
    if fault:
        raise InvalidNetworkConfig(f"{field} is {describe(text)}", fault)
    return text


def _get_name(obj: JsonObject, expected: str | None) -> str:
    given = get_str(obj, "name")
    if given is None and expected is None:
        raise InvalidNetworkConfig("name is missing", "a network needs a name")
    if expected is not None and given not in {None, expected}:
        raise InvalidNetworkConfig(f"name is {describe(given)}", f"it has to be {expected} here")
    return parse_network_name(given or expected or "", field="name")


def _get_dev(extbridge: JsonObject) -> NicSelector:
    path = "extbridge.dev"
    given = extbridge.get("dev")
    match given:
        case str():
            return NicSelector(names=(parse_nic_name(given, field=path),))
        case list():
            return NicSelector(names=_parse_names(given, path))
        case Mapping():
            return _parse_selector(as_object(given, where=path), path)
        case None:
            raise InvalidNetworkConfig(f"{path} is missing", "name the NIC, such as eth0")
        case _:
            raise InvalidNetworkConfig(
                f"{path} is {describe(given)}", "it has to be a name, a list of names or a selector"
            )


def _parse_names(given: list[object], path: str) -> tuple[str, ...]:
    if not 0 < len(given) <= MAX_NICS:
        raise InvalidNetworkConfig(
            f"{path} is a list of {len(given)} NICs", f"allowed: 1 to {MAX_NICS}"
        )
    names: list[str] = []
    for index, item in enumerate(given):
        where = f"{path}[{index}]"
        name = parse_nic_name(as_str(item, where=where), field=where)
        if name in names:
            raise InvalidNetworkConfig(f"{where} is {describe(name)} once more", "name it once")
        names.append(name)
    return tuple(names)


def _parse_selector(given: JsonObject, path: str) -> NicSelector:
    refuse_unknown(given, SELECTOR_KEYS, where=path)
    selector = NicSelector(
        match=_get_pattern(given, "match", "a shell pattern such as ens*f0", path),
        pci=_get_pci(given, path),
        driver=_get_pattern(given, "driver", "a driver such as ixgbe", path),
        mac=_get_mac(given, "mac", where=path),
        route=_get_pattern(given, "route", "default", path),
    )
    if selector == NicSelector():
        raise InvalidNetworkConfig(
            f"{path} selects by nothing", f"allowed: {', '.join(SELECTOR_KEYS)}"
        )
    return selector


def _get_pattern(obj: JsonObject, key: str, wanted: str, where: str) -> str | None:
    given = get_str(obj, key, where=where)
    if given is None:
        return None
    too_long = len(given) > MAX_PATTERN_CHARACTERS
    if too_long or not given.isprintable() or not re.fullmatch(SELECTOR_PATTERNS[key], given):
        raise InvalidNetworkConfig(
            f"{field_path(where, key)} is {describe(given)}", f"it has to be {wanted}"
        )
    return given


def _get_pci(obj: JsonObject, where: str) -> str | None:
    """An address as sysfs writes it; the domain, mostly 0000, may be left out as lspci does."""
    given = _get_pattern(obj, "pci", "an address such as 0000:3b:00.0", where)
    if given is None:
        return None
    return given.lower() if given.count(":") > 1 else f"0000:{given.lower()}"


def _get_uuid(obj: JsonObject) -> str | None:
    given = get_str(obj, "uuid")
    if given is None:
        return None
    if not re.fullmatch(UUID_PATTERN, given):
        raise InvalidNetworkConfig(
            f"uuid is {describe(given)}",
            "it has to be of the form 4ebd5168-6321-4757-8397-f6e83484f402 (RFC 4122)",
        )
    return given.lower()


def _get_mac(obj: JsonObject, key: str, *, where: str = "") -> str | None:
    given = get_str(obj, key, where=where)
    return None if given is None else parse_mac(given, field=field_path(where, key))


def _get_mac_prefix(obj: JsonObject) -> str:
    given = get_str(obj, "macPrefix")
    return DEFAULT_MAC_PREFIX if given is None else parse_mac_prefix(given, field="macPrefix")


def _get_ranged(
    obj: JsonObject, key: str, lowest: int, highest: int, *, where: str = ""
) -> int | None:
    given = get_int(obj, key, where=where)
    if given is not None and not lowest <= given <= highest:
        raise InvalidNetworkConfig(
            f"{field_path(where, key)} is {describe(given)}", f"allowed: {lowest} to {highest}"
        )
    return given


def _get_choice(
    obj: JsonObject, key: str, spellings: Mapping[str, _Choice], *, where: str = ""
) -> _Choice | None:
    given = get_str(obj, key, where=where)
    if given is None:
        return None
    if given not in spellings:
        raise InvalidNetworkConfig(
            f"{field_path(where, key)} is {describe(given)}", allowed_hint(given, spellings)
        )
    return spellings[given]


def _get_bandwidth(obj: JsonObject) -> Bandwidth | None:
    given = get_object(obj, "bandwidth")
    if given is None:
        return None
    refuse_unknown(given, BANDWIDTH_KEYS, where="bandwidth")
    ingress_rate, ingress_burst = _get_limit(given, "ingress")
    egress_rate, egress_burst = _get_limit(given, "egress")
    bandwidth = Bandwidth(ingress_rate, ingress_burst, egress_rate, egress_burst)
    return None if bandwidth == Bandwidth() else bandwidth


def _get_limit(bandwidth: JsonObject, direction: str) -> tuple[int | None, int | None]:
    """Rate and burst; zero is none, and both or neither: as containernetworking's plugin has it."""
    where = "bandwidth"
    rate = _get_ranged(bandwidth, f"{direction}Rate", 0, MAX_RATE, where=where) or None
    burst = _get_ranged(bandwidth, f"{direction}Burst", 0, MAX_BURST, where=where) or None
    if (rate is None) != (burst is None):
        given, missing = ("Burst", "Rate") if rate is None else ("Rate", "Burst")
        raise InvalidNetworkConfig(
            f"{where}.{direction}{given} is given without {where}.{direction}{missing}",
            "give both, rate in bits per second and burst in bits, or neither",
        )
    return rate, burst


def _get_ipam(obj: JsonObject) -> Mapping[str, object] | None:
    given = get_object(obj, "ipam")
    # Go writes an object that was never filled as {}.
    if not given:
        return None
    plugin = get_str(given, "type", where="ipam")
    if plugin is None:
        raise InvalidNetworkConfig(
            "ipam.type is missing", "name the IPAM plugin, such as host-local"
        )
    if not plugin.isprintable() or "/" in plugin or plugin in {"", ".", ".."}:
        raise InvalidNetworkConfig(
            f"ipam.type is {describe(plugin)}", "it has to be a program's name, without a folder"
        )
    if plugin == "dhcp":
        raise InvalidNetworkConfig(
            "ipam.type is dhcp, which would ask by the pod's own IP stack",
            "leave ipam out: a guest asks by itself, and its antispoof lets it",
        )
    if plugin in IPAM_UNFIT:
        raise InvalidNetworkConfig(
            f"ipam.type is {plugin}, which gives no addresses", "name an IPAM plugin: host-local"
        )
    _refuse_unwritable(given, "ipam", _IPAM_DEPTH)
    return given


def _refuse_unwritable(value: object, path: str, depth: int) -> None:
    """Refuse what not every spelling can say; the IPAM plugin gets its object as JSON."""
    if depth == 0:
        raise InvalidNetworkConfig(
            "ipam nests objects and lists too deeply", f"allowed: {_IPAM_DEPTH} levels"
        )
    match value:
        case Mapping():
            for key, item in as_object(value, where=path).items():
                _refuse_unwritable(item, field_path(path, key), depth - 1)
        case list():
            for index, item in enumerate(value):
                _refuse_unwritable(item, f"{path}[{index}]", depth - 1)
        case float() if not math.isfinite(value):
            raise InvalidNetworkConfig(f"{path} is {describe(value)}", "it has to be finite")
        case int() if value.bit_length() > 64:
            raise InvalidNetworkConfig(f"{path} is {describe(value)}", "allowed: 64 bits")


def _dev_to_value(dev: NicSelector) -> object:
    match dev.names:
        case (name,):
            return name
        case ():
            return _without_none({key: getattr(dev, key) for key in SELECTOR_KEYS})
        case names:
            return list(names)


def _bandwidth_to_object(bandwidth: Bandwidth) -> dict[str, object]:
    limits: Collection[int | None] = (
        bandwidth.ingress_rate,
        bandwidth.ingress_burst,
        bandwidth.egress_rate,
        bandwidth.egress_burst,
    )
    return _without_none(dict(zip(BANDWIDTH_KEYS, limits, strict=True)))


def _without_none(obj: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in obj.items() if value is not None}
