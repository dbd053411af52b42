"""MAC addresses: the ones people give, and the ones derived so that a VM keeps its own."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Final

from extbridge.spec.errors import InvalidNetworkConfig
from extbridge.spec.fields import describe

DEFAULT_MAC_PREFIX: Final = "52:54:00"
"""The locally administered prefix that QEMU and libvirt give their guests."""

_MAC_OCTETS = 6

_ENCODER: Final = json.JSONEncoder(separators=(",", ":"))

_OCTETS = re.compile(r"[0-9a-f]{2}(?:([:-])[0-9a-f]{2}(?:\1[0-9a-f]{2})*)?")


def parse_mac(text: str, *, field: str) -> str:
    """The address in lower case with colons; dashes are read too.

    Refuses what the kernel would (is_valid_ether_addr): zero, multicast and with it broadcast.
    Raises InvalidNetworkConfig, which calls the address by the name of its field.
    """
    octets = _split_octets(text)
    if len(octets) != _MAC_OCTETS:
        raise InvalidNetworkConfig(
            f"{field} is {describe(text)}, which is not a MAC address",
            "it has to be six octets in hexadecimal, such as 52:54:00:12:34:56",
        )
    _refuse_no_station(octets, text, field)
    return ":".join(octets)


def parse_mac_prefix(text: str, *, field: str) -> str:
    """One to five leading octets, in lower case with colons. Raises InvalidNetworkConfig.

    The prefix decides whether an address is multicast; one of nothing but zeros is refused because
    the octets derived behind it could be zero too.
    """
    octets = _split_octets(text)
    if not 0 < len(octets) < _MAC_OCTETS:
        raise InvalidNetworkConfig(
            f"{field} is {describe(text)}, which is not the beginning of a MAC address",
            f"it has to be one to five octets in hexadecimal, such as {DEFAULT_MAC_PREFIX}",
        )
    _refuse_no_station(octets, text, field)
    return ":".join(octets)


def derive_mac(prefix: str, *, network: str, namespace: str, vm: str, ifname: str) -> str:
    """The address of a VM's NIC for which none is given: always the same one for the same NIC.

    Guests, DHCP servers and switches remember addresses, so this never changes.
    """
    # As JSON the four cannot run into each other, whatever they hold, and every string has bytes.
    identity = _ENCODER.encode([network, namespace, vm, ifname])
    digest = hashlib.sha256(identity.encode()).digest()
    octets = prefix.split(":")
    return ":".join([*octets, *(f"{octet:02x}" for octet in digest[: _MAC_OCTETS - len(octets)])])


def _split_octets(text: str) -> list[str]:
    lowered = text.lower()
    return re.split("[:-]", lowered) if _OCTETS.fullmatch(lowered) else []


def _refuse_no_station(octets: list[str], text: str, field: str) -> None:
    if int(octets[0], 16) & 1:
        raise InvalidNetworkConfig(
            f"{field} is {describe(text)}, a group address (multicast or broadcast)",
            "a NIC's address has an even first octet, such as 52",
        )
    if not any(int(octet, 16) for octet in octets):
        raise InvalidNetworkConfig(
            f"{field} is {describe(text)}, which is all zeros", "it has to be some NIC's address"
        )
