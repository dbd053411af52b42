"""What a runtime asks: one verb with its environment and its network configuration.

Everything that can be known to be wrong without looking at the machine is refused here.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from extbridge.spec import versions
from extbridge.spec.errors import (
    DecodeFailure,
    InvalidEnvironment,
    InvalidNetworkConfig,
)
from extbridge.spec.fields import JsonObject, allowed_hint, describe, get_object, get_str
from extbridge.spec.result import get_interfaces

MAX_STDIN_BYTES: Final = 1 << 20

VALID_ATTACHMENTS: Final = "cni.dev/valid-attachments"
"""The key under which GC is told what is not to be removed (SPEC 1.1.0 section 2, "GC")."""

_ONE_OBJECT = "it has to be one object, the network configuration"

_MAX_DEPTH = 100
"""Objects and lists within each other. Far below Python's recursion limit, so that what was read
can also be copied and written again."""

_MAX_CONTAINER_ID_BYTES = 200
"""A container ID is part of a file's name, which the kernel limits to 255 bytes (NAME_MAX)."""

MAX_IFNAME_BYTES: Final = 15
"""IFNAMSIZ less its NUL."""

NO_IFNAMES: Final = ("", ".", "..", "all", "default")

NAME_PATTERN: Final = r"[A-Za-z0-9][A-Za-z0-9_.\-]*"
"""What a network's name matches whole, and a container ID."""


class Verb(StrEnum):
    """CNI_COMMAND, SPEC 1.1.0 section 2, "CNI operations"."""

    ADD = "ADD"
    DEL = "DEL"
    CHECK = "CHECK"
    GC = "GC"
    STATUS = "STATUS"
    VERSION = "VERSION"


class Steps:
    """How long each step of a verb took, in ms and in order; from one mark to the next."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self.ms: dict[str, float] = {}

    def mark(self, step: str) -> None:
        """The step has ended; one that comes again, for another NIC, takes so much longer."""
        now = time.perf_counter()
        self.ms[step] = self.ms.get(step, 0.0) + (now - self._last) * 1000
        self._last = now


@dataclass(frozen=True, slots=True)
class Request:
    """A validated request; what the verb does not need, or the runtime did not give, is empty.

    `netns_fd` is `netns`, opened by who could see it: an agent's container may not. None: open the
    path. The fd stays the caller's. `notes` and `steps` are for the verb to fill: what a log should
    know of it besides.
    """

    verb: Verb
    container_id: str
    netns: str
    ifname: str
    args: Mapping[str, str]
    path: tuple[str, ...]
    config: Mapping[str, object]
    cni_version: str
    name: str
    prev_result: Mapping[str, object] | None
    netns_fd: int | None = None
    notes: dict[str, object] = field(default_factory=dict, hash=False, compare=False)
    steps: Steps = field(default_factory=Steps, hash=False, compare=False)


_REQUIRED: Final[Mapping[Verb, tuple[str, ...]]] = {
    Verb.ADD: ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"),
    Verb.CHECK: ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"),
    Verb.DEL: ("CNI_CONTAINERID", "CNI_IFNAME"),
}
"""Of the verbs that are about one attachment. GC and STATUS are about none and get none of these;
the CNI_PATH that section 2 has GC given is only of use to delegate."""


def parse_request(environ: Mapping[str, str], stdin: bytes) -> Request:
    """Validate a request against SPEC 1.1.0 sections 2 and 3.

    Raises InvalidEnvironment, DecodeFailure, IncompatibleVersion or InvalidNetworkConfig. VERSION
    raises for nothing but an unknown CNI_COMMAND: how to talk is what its caller wants to know.
    DEL overlooks a malformed prevResult and malformed CNI_ARGS: what is there has to go.
    """
    verb = _read_verb(environ)
    if verb is Verb.VERSION:
        asked = read_version(stdin) or versions.NEWEST
        return Request(verb, "", "", "", {}, (), {}, asked, "", None)
    container_id = netns = ifname = ""
    args: Mapping[str, str] = {}
    if verb in _REQUIRED:
        _require_variables(verb, environ)
        container_id = _read_container_id(environ)
        netns = _read_netns(environ)
        ifname = _read_ifname(environ)
        args = _read_args(verb, environ)
    config = _decode(stdin)
    cni_version = _get_version(config)
    versions.check_version(verb, cni_version)
    return Request(
        verb=verb,
        container_id=container_id,
        netns=netns,
        ifname=ifname,
        args=args,
        path=tuple(folder for folder in environ.get("CNI_PATH", "").split(":") if folder),
        config=config,
        cni_version=cni_version,
        name=_get_network_name(config),
        prev_result=_get_prev_result(verb, config),
    )


def read_version(stdin: bytes) -> str | None:
    """The cniVersion of a request that is otherwise wrong; None where it cannot be told."""
    try:
        return _get_version(_decode(stdin))
    except DecodeFailure:
        return None


def find_name_fault(name: str) -> str | None:
    """Why name can be neither a network's name nor a container ID (SPEC 1.1.0 sections 1 and 2)."""
    if re.fullmatch(NAME_PATTERN, name):
        return None
    return "it has to start with a letter or digit, then only letters, digits, _ . and -"


def find_ifname_fault(name: str) -> str | None:
    """Why name can be no interface's, after the kernel's dev_valid_name and SPEC 1.1.0 section 2.

    Refused beyond that: `%`, of which the kernel would make a number (dev_alloc_name); what does
    not print; and `all` and `default`, which are folders of their own under /proc/sys/net
    (sysctl_dev_name_is_allowed).
    """
    if name in NO_IFNAMES:
        return "it has to be another name than '', '.', '..', 'all' and 'default'"
    if any(character in "/:% " or not character.isprintable() for character in name):
        return "it has to be without / : % and without what does not print, white space included"
    encoded = name.encode()
    if len(encoded) > MAX_IFNAME_BYTES:
        return f"it has to be at most {MAX_IFNAME_BYTES} bytes long and is {len(encoded)}"
    # The kernel looks at bytes, and its isspace() at Latin-1: "à" ends in its no-break space.
    if b"\xa0" in encoded:
        return "it has to be without the byte 0xA0, which the kernel takes for white space"
    return None


def _read_verb(environ: Mapping[str, str]) -> Verb:
    given = environ.get("CNI_COMMAND", "")
    if not given:
        raise InvalidEnvironment(
            "CNI_COMMAND is missing", "this program is run by a container runtime, not by hand"
        )
    try:
        return Verb(given)
    except ValueError as failure:
        raise InvalidEnvironment(
            f"CNI_COMMAND is {describe(given)}", allowed_hint(given, [str(verb) for verb in Verb])
        ) from failure


def _require_variables(verb: Verb, environ: Mapping[str, str]) -> None:
    missing = [name for name in _REQUIRED[verb] if not environ.get(name)]
    if missing:
        raise InvalidEnvironment(
            f"{', '.join(missing)} missing", f"{verb} needs {', '.join(_REQUIRED[verb])}"
        )


def _read_container_id(environ: Mapping[str, str]) -> str:
    given = environ["CNI_CONTAINERID"]
    fault = find_name_fault(given)
    if not fault and len(given) > _MAX_CONTAINER_ID_BYTES:
        fault = f"it has to be at most {_MAX_CONTAINER_ID_BYTES} bytes long and is {len(given)}"
    if fault:
        raise InvalidEnvironment(f"CNI_CONTAINERID is {describe(given)}", fault)
    return given


def _read_netns(environ: Mapping[str, str]) -> str:
    given = environ.get("CNI_NETNS", "")
    # A result repeats the path as `sandbox`, and JSON cannot hold bytes that are no text.
    if not given.isprintable():
        raise InvalidEnvironment(
            f"CNI_NETNS is {describe(given)}", "it has to be the path of a network namespace"
        )
    return given


def _read_ifname(environ: Mapping[str, str]) -> str:
    given = environ["CNI_IFNAME"]
    fault = find_ifname_fault(given)
    if fault:
        raise InvalidEnvironment(f"CNI_IFNAME is {describe(given)}", fault)
    return given


def _read_args(verb: Verb, environ: Mapping[str, str]) -> Mapping[str, str]:
    args: dict[str, str] = {}
    given = environ.get("CNI_ARGS", "")
    for pair in given.split(";") if given else ():
        key, equals, value = pair.partition("=")
        if key and equals:
            args[key] = value
        elif verb is not Verb.DEL:
            raise InvalidEnvironment(
                f"CNI_ARGS holds {describe(pair)}", "it has to be KEY=VALUE;KEY=VALUE"
            )
    return args


def _get_version(config: JsonObject) -> str:
    given = config.get("cniVersion")
    if given is None or given == "":
        return versions.IMPLIED
    if not isinstance(given, str):
        raise DecodeFailure(f"cniVersion is {describe(given)}", "it has to be a string")
    return given


def _get_network_name(config: JsonObject) -> str:
    name = get_str(config, "name")
    if not name:
        raise InvalidNetworkConfig("name is missing", "a network configuration needs a name")
    fault = find_name_fault(name)
    if fault:
        raise InvalidNetworkConfig(f"name is {describe(name)}", fault)
    return name


def _get_prev_result(verb: Verb, config: JsonObject) -> JsonObject | None:
    if verb not in _REQUIRED:
        return None
    try:
        prev_result = get_object(config, "prevResult")
        get_interfaces(prev_result)
    except InvalidNetworkConfig:
        if verb is Verb.DEL:
            return None
        raise
    if prev_result is None and verb is Verb.CHECK:
        raise InvalidNetworkConfig("prevResult is missing", "CHECK needs the result of ADD")
    return prev_result


def _decode(stdin: bytes) -> JsonObject:
    """Read standard input as the one JSON object it has to be; raises DecodeFailure.

    Stricter than json.loads where it would read what another reader of the same bytes may read
    differently (RFC 8259: encodings, sections 4 and 8.1; NaN and Infinity, section 6).
    """
    if not stdin.strip():
        raise DecodeFailure(
            "standard input is empty", "the network configuration is expected there"
        )
    if len(stdin) > MAX_STDIN_BYTES:
        raise DecodeFailure(
            f"standard input is {len(stdin)} bytes long", f"allowed: {MAX_STDIN_BYTES}"
        )
    try:
        value = _DECODER.decode(stdin.decode())
    except UnicodeDecodeError as failure:
        raise DecodeFailure(
            f"standard input is not UTF-8 at byte {failure.start}", "JSON is UTF-8 (RFC 8259)"
        ) from failure
    except RecursionError as failure:
        raise _too_deep() from failure
    except ValueError as failure:
        # JSONDecodeError, or the ValueError of an int of more than 4300 digits.
        raise DecodeFailure(f"standard input is not JSON: {failure}", _ONE_OBJECT) from failure
    if not isinstance(value, dict):
        raise DecodeFailure(f"standard input is {describe(value)}", _ONE_OBJECT)
    _limit_depth(value)
    return value


def _refuse_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    value: dict[str, object] = {}
    for key, item in pairs:
        if key in value:
            raise DecodeFailure(
                f"standard input has a key twice in one object: {describe(key)}", "keep one of them"
            )
        value[key] = item
    return value


def _refuse_constant(constant: str) -> object:
    raise DecodeFailure(f"standard input is not JSON: it holds {constant}", "leave it out")


def _read_float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise DecodeFailure("standard input holds a number too large", "allowed: 64 bits")
    return number


def _limit_depth(value: object) -> None:
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [
            child
            for parent in level
            if isinstance(parent, dict | list)
            for child in (parent.values() if isinstance(parent, dict) else parent)
        ]
        if not level:
            return
    raise _too_deep()


def _too_deep() -> DecodeFailure:
    return DecodeFailure(
        "standard input nests objects and lists too deeply", f"allowed: {_MAX_DEPTH} levels"
    )


# Made once: to make one takes longer than to read what a runtime sends.
_DECODER: Final = json.JSONDecoder(
    object_pairs_hook=_refuse_duplicates, parse_constant=_refuse_constant, parse_float=_read_float
)
