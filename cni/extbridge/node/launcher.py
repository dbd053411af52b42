"""The command that a VM container runs, with its NICs written into it.

Used by `extbridge run` directly, and by the agent for `extbridge-exec`, which only execs what it is
told. QEMU's options: qemu(1), `-netdev tap` and `-device virtio-net-pci`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from ipaddress import ip_interface
from typing import Final

from extbridge.handoff import Tap
from extbridge.network.addresses import Addressing
from extbridge.spec.errors import InvalidEnvironment
from extbridge.spec.fields import get_list

MODEL_VARIABLE: Final = "EXTBRIDGE_MODEL"
DEFAULT_MODEL: Final = "virtio-net-pci"

_KEYS = (
    "fd",
    "fds",
    "vhostfds",
    "mac",
    "mtu",
    "queues",
    "ip",
    "prefix",
    "netmask",
    "gateway",
    "ips",
    "dns",
)

# QEMU's own arguments may be JSON: a placeholder has one of these keys, or the name of a tap.
_PLACEHOLDER = re.compile(r"\{([^{}/:\s]{1,15})\.([A-Za-z]+)\}")


def render_command(
    argv: Sequence[str], taps: Sequence[Tap], *, model: str = DEFAULT_MODEL
) -> list[str]:
    """`argv` with `{net1.fd}` and its like filled in; without any, with options for every tap.

    Raises InvalidEnvironment for a placeholder that cannot be filled.
    """
    values = {tap.name: _values(tap) for tap in taps}
    filled = [_PLACEHOLDER.sub(lambda found: _fill(found, values), argument) for argument in argv]
    if filled != list(argv):
        return filled
    options = [option for n, tap in enumerate(taps) for option in _qemu_options(n, tap, model)]
    return [*argv, *options]


def _values(tap: Tap) -> dict[str, str]:
    values = {
        "fds": ":".join(map(str, tap.fds)),
        "mac": tap.mac,
        "mtu": str(tap.mtu),
        "queues": str(len(tap.fds)),
    }
    if len(tap.fds) == 1:
        values["fd"] = str(tap.fds[0])
    if tap.vhost_fds:
        values["vhostfds"] = ":".join(map(str, tap.vhost_fds))
    return values | _address_values(tap.addressing)


def _address_values(addressing: Addressing) -> dict[str, str]:
    """Of the first address, and of all; what there is not has no value."""
    if not addressing.addresses:
        return {}
    first = addressing.addresses[0]
    interface = ip_interface(first.address)
    servers = get_list(addressing.dns, "nameservers") or []
    values = {
        "ip": str(interface.ip),
        "prefix": str(interface.network.prefixlen),
        "netmask": str(interface.netmask),
        "gateway": first.gateway,
        "ips": ",".join(it.address for it in addressing.addresses),
        "dns": ",".join(map(str, servers)),
    }
    return {key: value for key, value in values.items() if value}


def _fill(found: re.Match[str], values: dict[str, dict[str, str]]) -> str:
    name, key = found.groups()
    if key not in _KEYS:
        if name not in values:
            return found.group()
        raise InvalidEnvironment(
            f"{found.group()}: a NIC has no {key}", f"it has {', '.join(_KEYS)}"
        )
    if name not in values:
        raise InvalidEnvironment(
            f"{found.group()}: there is no NIC {name}", f"there is {', '.join(values)}"
        )
    if key in values[name]:
        return values[name][key]
    if key == "fd":
        raise InvalidEnvironment(
            f"{found.group()}: {name} has {values[name]['queues']} queues, an fd each",
            f"write fds={{{name}.fds}}",
        )
    if key != "vhostfds":
        raise InvalidEnvironment(
            f"{found.group()}: {name} has none",
            "addresses are those of the network's ipam, or the ips that the pod asks for",
        )
    raise InvalidEnvironment(
        f"{found.group()}: the node has no vhost-net",
        "leave vhost=on and vhostfds away (QEMU aborts on one without the other),"
        " or load vhost_net on the node",
    )


def qemu_nic(
    tap: Tap, name: str, model: str, fds: Sequence[object], vhost_fds: Sequence[object]
) -> tuple[dict[str, object], dict[str, object]]:
    """The arguments of QEMU's `-netdev` and `-device` for the tap; `name` is the netdev's ID.

    The fds are as QEMU knows them: by number on its command line, by name over QMP.
    """
    plural = "s" if len(fds) > 1 else ""
    netdev: dict[str, object] = {"type": "tap", "id": name}
    netdev[f"fd{plural}"] = ":".join(map(str, fds))
    if vhost_fds:
        netdev |= {"vhost": True, f"vhostfd{plural}": ":".join(map(str, vhost_fds))}
    device: dict[str, object] = {"driver": model, "netdev": name, "mac": tap.mac}
    if model.startswith("virtio-net"):
        device["host_mtu"] = tap.mtu
        if plural:
            device["mq"] = True
            if "-pci" in model:
                # One vector a direction of each queue, one for configuration, one for control.
                device["vectors"] = 2 * len(fds) + 2
    return netdev, device


def _qemu_options(number: int, tap: Tap, model: str) -> list[str]:
    netdev, device = qemu_nic(tap, f"extbridge{number}", model, tap.fds, tap.vhost_fds)
    return ["-netdev", _option(netdev), "-device", _option(device)]


def _option(arguments: dict[str, object]) -> str:
    """As one argument of the command line, where the first value stands without its key."""
    first, *others = arguments.items()
    told = (f"{key}={'on' if value is True else value}" for key, value in others)
    return ",".join((str(first[1]), *told))
