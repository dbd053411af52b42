"""The JSON Schema (2020-12) of a network's definition, made of what definition.py allows.

For editors. What the parser takes, the schema takes; of what the parser refuses, it lets pass what
has no words there: lengths in bytes, what does not print, an ipam that nests too deeply. null
stands for an absent key, as in the parser.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Final, TypeAlias

from extbridge.network.definition import (
    BANDWIDTH_KEYS,
    IPAM_UNFIT,
    MAX_BURST,
    MAX_MTU,
    MAX_NAME_BYTES,
    MAX_NICS,
    MAX_PATTERN_CHARACTERS,
    MAX_QUEUES,
    MAX_RATE,
    MIN_MTU,
    MODES,
    SELECTOR_KEYS,
    SELECTOR_PATTERNS,
    UUID_PATTERN,
    Antispoof,
    Handoff,
    Mode,
)
from extbridge.network.mac import DEFAULT_MAC_PREFIX
from extbridge.spec.request import MAX_IFNAME_BYTES, NAME_PATTERN, NO_IFNAMES

Schema: TypeAlias = dict[str, Any]

# Of a station, not of a group, and not nothing but zeros (network/mac.py).
_STATION = "(?!(00[:-]?)+$)[0-9a-fA-F][02468aceACE]"

_MAC: Final = f"{_STATION}([:-])[0-9a-fA-F]{{2}}(\\2[0-9a-fA-F]{{2}}){{4}}"

_MAC_PREFIX: Final = f"{_STATION}(([:-])[0-9a-fA-F]{{2}}(\\3[0-9a-fA-F]{{2}}){{0,3}})?"

_NIC_NAME: Final = r"[^/:%\s\u0000-\u001f\u007f]+"

_MODES: Final[Mapping[Mode, str]] = {
    Mode.VEPA: "every frame goes to the switch, which reflects it",
    Mode.BRIDGE: "VMs on the NIC reach each other directly",
    Mode.PRIVATE: "VMs on the NIC do not reach each other",
    Mode.PASSTHRU: "one VM has the NIC alone",
}


def network_schema() -> Schema:
    """The schema, as the object that JSON has for it."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A network of extbridge",
        "description": "What a macvtap of this network is like, and on which NIC it is made.",
        "type": "object",
        "properties": {
            "name": _text(
                "The network's name; may be left out where the file is called so.",
                NAME_PATTERN,
                maxLength=MAX_NAME_BYTES,
            ),
            "uuid": _text("For people and programs; extbridge makes no use of it.", UUID_PATTERN),
            "extbridge": {
                "description": "The NIC, and how macvtaps on it see each other.",
                "type": "object",
                "properties": {
                    "mode": _choice(
                        "; ".join(f"{mode}: {what}" for mode, what in _MODES.items()),
                        MODES,
                        default=Mode.VEPA.value,
                    ),
                    "dev": _dev(),
                },
                "required": ["dev"],
                "additionalProperties": False,
            },
            "mtu": _number(
                "Octets; without, the NIC's, which it may not exceed.", MIN_MTU, MAX_MTU
            ),
            "queues": _number("Queues of the tap.", 1, MAX_QUEUES, default=1),
            "mac": _text("The MAC of the one VM there is; without, each has a derived one.", _MAC),
            "macPrefix": _text(
                "The first one to five octets of derived MACs.",
                _MAC_PREFIX,
                default=DEFAULT_MAC_PREFIX,
            ),
            "antispoof": _choice(
                "mac: what a guest sends has its own MAC for a source; ip: and its own IP"
                " addresses; off: nothing is filtered. The default with trust is off.",
                Antispoof,
                default=Antispoof.MAC.value,
            ),
            "trust": {
                "description": "Whether the guest may change its MAC and, on a passthru NIC, hear"
                " all; nothing is filtered then.",
                "type": ["boolean", "null"],
                "default": False,
            },
            "bandwidth": _bandwidth(),
            "handoff": _choice(
                "fd: the launcher gets open files; device: QEMU's user owns the node /dev/tap…,"
                " which the device plugin hands over.",
                Handoff,
                default=Handoff.FD.value,
            ),
            "ipam": _ipam(),
        },
        "required": ["extbridge"],
        "additionalProperties": False,
        "if": {"properties": {"trust": {"const": True}}, "required": ["trust"]},
        "then": {"properties": {"antispoof": {"enum": [Antispoof.OFF.value, None]}}},
    }


def schema_text() -> str:
    """The schema as docs/network.schema.json has it."""
    return json.dumps(network_schema(), indent=2, ensure_ascii=False) + "\n"


def _dev() -> Schema:
    name = {
        "type": "string",
        "pattern": f"^{_NIC_NAME}$",
        "maxLength": MAX_IFNAME_BYTES,
        "not": {"enum": list(NO_IFNAMES)},
    }
    about = {
        "match": "Its name, as a shell pattern: ens*f0.",
        "pci": "Its address: 0000:3b:00.0; the domain may be left out.",
        "driver": "Its driver: ixgbe.",
        "mac": "Its MAC.",
        "route": "default: it has the node's default route.",
    }
    patterns = {**SELECTOR_PATTERNS, "mac": _MAC}
    keys = {
        key: _text(about[key], patterns[key], maxLength=MAX_PATTERN_CHARACTERS)
        for key in SELECTOR_KEYS
    }
    return {
        "description": "The NIC; or a pool, of which the NIC with the fewest VMs is taken.",
        "anyOf": [
            {"description": "Its name.", **name},
            {
                "description": "The names of the pool's NICs.",
                "type": "array",
                "items": name,
                "minItems": 1,
                "maxItems": MAX_NICS,
                "uniqueItems": True,
            },
            {
                "description": "What the NICs have in common; all of it has to hold.",
                "type": "object",
                "properties": keys,
                "additionalProperties": False,
                "anyOf": [
                    {"properties": {key: {"type": "string"}}, "required": [key]}
                    for key in SELECTOR_KEYS
                ],
            },
        ],
    }


def _bandwidth() -> Schema:
    about = {
        "Rate": ("bits per second", MAX_RATE),
        "Burst": ("bits", MAX_BURST),
    }
    sides = {"ingress": "what the guest receives", "egress": "what the guest sends"}
    keys = {
        f"{side}{what}": _number(f"Of {whose}, in {unit}; 0 is no limit.", 0, most)
        for side, whose in sides.items()
        for what, (unit, most) in about.items()
    }
    given = {"type": "integer", "minimum": 1}
    return {
        "description": "Limits as seen from the guest; a rate needs its burst. Without, none.",
        "type": ["object", "null"],
        "properties": {key: keys[key] for key in BANDWIDTH_KEYS},
        "additionalProperties": False,
        "allOf": [
            {
                "if": {"properties": {f"{side}{one}": given}, "required": [f"{side}{one}"]},
                "then": {
                    "properties": {f"{side}{other}": {"minimum": 1, "type": "integer"}},
                    "required": [f"{side}{other}"],
                },
            }
            for side in sides
            for one, other in (("Rate", "Burst"), ("Burst", "Rate"))
        ],
    }


def _ipam() -> Schema:
    return {
        "description": "The CNI IPAM plugin that gives the guest's addresses, and its own keys:"
        ' {"type": "host-local", "ranges": …}. Without, the guest asks by itself.',
        "type": ["object", "null"],
        "properties": {
            "type": {
                "description": "The plugin's program; not dhcp, for which a guest asks by itself.",
                "type": ["string", "null"],
                "pattern": r"^[^/\u0000-\u001f\u007f]+$",
                "not": {"enum": [".", "..", *IPAM_UNFIT]},
            }
        },
        # Go writes an object that was never filled as {}.
        "if": {"type": "object", "minProperties": 1},
        "then": {"properties": {"type": {"type": "string"}}, "required": ["type"]},
    }


def _text(description: str, pattern: str, **more: object) -> Schema:
    return {
        "description": description,
        "type": ["string", "null"],
        "pattern": f"^{pattern}$",
        **more,
    }


def _number(description: str, lowest: int, highest: int, **more: object) -> Schema:
    limits = {"minimum": lowest, "maximum": highest}
    return {"description": description, "type": ["integer", "null"], **limits, **more}


def _choice(description: str, words: Iterable[str], **more: object) -> Schema:
    return {"description": description, "enum": [*map(str, words), None], **more}
