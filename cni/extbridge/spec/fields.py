"""Typed getters over JSON that others wrote: a wrong type is an error that names the field.

Configuration, runtimeConfig and prevResult all come from outside. Every getter answers None for a
key that is absent or null: Go, in which the runtimes are written, takes the two for the same, and
writes null for a list that it does not have.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import TypeAlias

from extbridge.spec.errors import InvalidNetworkConfig

JsonObject: TypeAlias = Mapping[str, object]

_SHOWN_CHARACTERS = 60
"""How much of a foreign value a message repeats."""

_BEYOND_64_BITS = 1 << 64


def printable(text: str) -> str:
    """Others' words for a terminal or a log: what is not printable could forge a line."""
    return "".join(it if it.isprintable() else "?" for it in text)


def get_str(obj: JsonObject, key: str, *, where: str = "") -> str | None:
    """The string under key; raises InvalidNetworkConfig for what as_str refuses."""
    value = obj.get(key)
    return None if value is None else as_str(value, where=field_path(where, key))


def get_int(obj: JsonObject, key: str, *, where: str = "") -> int | None:
    """The whole number under key; true and 1.0 are none. Raises InvalidNetworkConfig."""
    value = obj.get(key)
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise _wrong_type(value, field_path(where, key), "a whole number")


def get_bool(obj: JsonObject, key: str, *, where: str = "") -> bool | None:
    """The truth value under key; raises InvalidNetworkConfig for any other type."""
    value = obj.get(key)
    if value is None or isinstance(value, bool):
        return value
    raise _wrong_type(value, field_path(where, key), "true or false")


def get_object(obj: JsonObject, key: str, *, where: str = "") -> JsonObject | None:
    """The object under key, all its keys strings; raises InvalidNetworkConfig otherwise."""
    value = obj.get(key)
    return None if value is None else as_object(value, where=field_path(where, key))


def get_list(obj: JsonObject, key: str, *, where: str = "") -> list[object] | None:
    """The list under key, its items unchecked; raises InvalidNetworkConfig for any other type."""
    value = obj.get(key)
    if value is None or isinstance(value, list):
        return value
    raise _wrong_type(value, field_path(where, key), "a list")


def get_objects(obj: JsonObject, key: str, *, where: str = "") -> list[JsonObject] | None:
    """The list of objects under key; an item of another type is named by its index."""
    items = get_list(obj, key, where=where)
    if items is None:
        return None
    path = field_path(where, key)
    return [as_object(item, where=f"{path}[{index}]") for index, item in enumerate(items)]


def as_str(value: object, *, where: str) -> str:
    """Value as a string that may become a path or a name in the kernel.

    JSON can spell NUL and half of a surrogate pair; no system call can take either, and Python
    would answer with a ValueError far from the field.
    """
    if not isinstance(value, str):
        raise _wrong_type(value, where, "a string")
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        raise _wrong_type(value, where, "text without NUL and without lone surrogates")
    return value


def as_object(value: object, *, where: str) -> JsonObject:
    """Value as an object; YAML's keys of other types than string are refused like other values."""
    if not isinstance(value, Mapping):
        raise _wrong_type(value, where, "an object")
    for key in value:
        if not isinstance(key, str):
            raise InvalidNetworkConfig(
                f"{where} has {describe(key)} as a key", "a key has to be a string; quote it"
            )
    return value


def refuse_unknown(obj: JsonObject, allowed: Collection[str], *, where: str = "") -> None:
    """Raise InvalidNetworkConfig for the first key that is not allowed, with the nearest one."""
    for key in obj:
        if key not in allowed:
            raise InvalidNetworkConfig(
                f"{field_path(where, key)} is not a known key", allowed_hint(key, allowed)
            )


def allowed_hint(given: str, allowed: Collection[str]) -> str:
    """What may stand in given's place, the nearest spelling first if there is one."""
    spelling = {word.casefold(): word for word in allowed}
    nearest = get_close_matches(given[:_SHOWN_CHARACTERS].casefold(), spelling, n=1)
    question = f"did you mean {spelling[nearest[0]]}? " if nearest else ""
    return f"{question}allowed: {', '.join(allowed)}"


def field_path(where: str, key: str) -> str:
    """The field's name as errors give it: `extbridge.mode`."""
    name = _shortened(key)
    return f"{where}.{name}" if where else name


def describe(value: object) -> str:
    """Value as a message repeats it: its type and, where that is short, itself."""
    match value:
        case None | bool():
            return json.dumps(value)
        case str():
            return f"the string {json.dumps(_shortened(value), ensure_ascii=False)}"
        case int() | float():
            # int.__str__ raises ValueError from 4301 digits on, and YAML's 0xfff… can get there.
            return f"the number {value}" if abs(value) < _BEYOND_64_BITS else "a number too large"
        case Mapping():
            return "an object"
        case list():
            return "a list"
        case _:
            return f"a value of type {type(value).__name__}"


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"


def _wrong_type(value: object, path: str, wanted: str) -> InvalidNetworkConfig:
    return InvalidNetworkConfig(f"{path} is {describe(value)}", f"it has to be {wanted}")
