"""Networks written as JSON."""

from __future__ import annotations

import json

from extbridge.network.definition import Network, network_to_object
from extbridge.spec.errors import InvalidNetworkConfig
from extbridge.spec.fields import JsonObject, as_object, describe


def object_from_json(text: str) -> JsonObject:
    """The one object that text is. Raises InvalidNetworkConfig, with line and column if it can."""
    return as_object(load_json(text), where="the definition")


def network_to_json(network: Network) -> str:
    """Network as indented JSON, in ASCII."""
    return json.dumps(network_to_object(network), indent=2) + "\n"


def load_json(text: str) -> object:
    """The value that text is, with NaN, Infinity and duplicate keys refused (RFC 8259).

    Raises InvalidNetworkConfig.
    """
    try:
        return json.loads(
            text, object_pairs_hook=_refuse_duplicates, parse_constant=_refuse_constant
        )
    except json.JSONDecodeError as failure:
        raise InvalidNetworkConfig(
            f"line {failure.lineno}, column {failure.colno}: {failure.msg}", "it has to be JSON"
        ) from failure
    except RecursionError as failure:
        raise InvalidNetworkConfig(
            "objects and lists nest too deeply", "no definition needs more than a few levels"
        ) from failure
    except ValueError as failure:
        raise InvalidNetworkConfig("a number is too long", "allowed: 64 bits") from failure


def _refuse_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    value: dict[str, object] = {}
    for key, item in pairs:
        if key in value:
            raise InvalidNetworkConfig(
                f"a key is twice in one object: {describe(key)}", "keep one of them"
            )
        value[key] = item
    return value


def _refuse_constant(constant: str) -> object:
    raise InvalidNetworkConfig(f"{constant} is not JSON", "a number has to be finite")
