"""Results of ADD, kept as the JSON they came as.

A result is mostly other plugins': what we do not know has to come out as it went in, so there is no
class for it, only functions over the object.
"""

from __future__ import annotations

import copy

from extbridge.spec import versions
from extbridge.spec.fields import JsonObject, get_int, get_list, get_objects, get_str

_PREV_RESULT = "prevResult"


def new_result(cni_version: str) -> dict[str, object]:
    """An empty result in cni_version's shape (SPEC 1.1.0 section 5, "ADD Success")."""
    return {"cniVersion": cni_version}


def start_from(prev_result: JsonObject | None, cni_version: str) -> dict[str, object]:
    """A result of our own that says all that prev_result says, in cni_version.

    A chained plugin has to put out the prevResult it was given (SPEC 1.1.0 section 2, "ADD").
    """
    return {**copy.deepcopy(dict(prev_result or {})), **new_result(cni_version)}


def add_interface(result: dict[str, object], *, name: str, mac: str, sandbox: str, mtu: int) -> int:
    """Append an interface and return its index, by which an IP address refers to it.

    mtu is told from 1.1.0 on, which introduced it.
    """
    interface: dict[str, object] = {"name": name, "mac": mac}
    if versions.is_at_least(str(result["cniVersion"]), "1.1.0"):
        interface["mtu"] = mtu
    interface["sandbox"] = sandbox
    return _append(result, "interfaces", interface)


def add_ip(result: dict[str, object], *, address: str, gateway: str | None, interface: int) -> None:
    """Append an address with its prefix length; interface is add_interface's index.

    Before 1.0.0 each address also told its family (`version`, SPEC 0.4.0 "Result").
    """
    ip: dict[str, object] = {"address": address, "interface": interface}
    if gateway:
        ip["gateway"] = gateway
    if not versions.is_at_least(str(result["cniVersion"]), "1.0.0"):
        ip["version"] = "6" if ":" in address else "4"
    _append(result, "ips", ip)


def get_interfaces(prev_result: JsonObject | None) -> list[JsonObject]:
    """The interfaces of prev_result, the types of what the specification names checked.

    Raises InvalidNetworkConfig.
    """
    interfaces = get_objects(prev_result or {}, "interfaces", where=_PREV_RESULT) or []
    for index, interface in enumerate(interfaces):
        where = f"{_PREV_RESULT}.interfaces[{index}]"
        for key in ("name", "mac", "sandbox"):
            get_str(interface, key, where=where)
        get_int(interface, "mtu", where=where)
    return interfaces


def prev_interface(prev_result: JsonObject | None, name: str) -> JsonObject | None:
    """The first interface called name in a sandbox, else the first without; None without either.

    A host's interface may bear the name of one in the pod. Raises InvalidNetworkConfig.
    """
    named = [it for it in get_interfaces(prev_result) if get_str(it, "name") == name]
    return next((it for it in named if get_str(it, "sandbox")), named[0] if named else None)


def _append(result: dict[str, object], key: str, item: dict[str, object]) -> int:
    items = get_list(result, key, where=_PREV_RESULT) or []
    result[key] = [*items, item]
    return len(items)
