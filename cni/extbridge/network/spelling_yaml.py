"""Networks written as YAML, read the way JSON is: nothing but objects, lists and plain values.

PyYAML follows YAML 1.1, in which `off` is false and `52:54:00:12:34:56` a number to the base 60.
So only its events are used, and what a scalar means is YAML 1.2's core schema (section 10.3.2).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

import yaml

from extbridge.network.definition import MAX_DEPTH, Network, network_to_object
from extbridge.spec.errors import InvalidNetworkConfig
from extbridge.spec.fields import JsonObject, as_object, describe

_CONSTANTS: Final[Mapping[str, bool | None]] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}

_NUMBERS: Final[Mapping[str, Callable[[str], object]]] = {
    r"[-+]?[0-9]+": int,
    r"0o[0-7]+": lambda text: int(text, 8),
    r"0x[0-9a-fA-F]+": lambda text: int(text, 16),
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?": float,
}
"""The core schema's, without infinity and NaN: no key takes them, and JSON has none."""

_LONGEST_PROBLEM = 200
"""Characters; PyYAML repeats some of what it was given whole."""


class _Mark(Protocol):
    """A place in the text, counted from 0, of PyYAML's Python or C."""

    @property
    def line(self) -> int: ...

    @property
    def column(self) -> int: ...


class _Dumper(yaml.SafeDumper):
    """Quotes each string that either version of YAML would read as something else."""

    def ignore_aliases(self, data: object) -> bool:  # noqa: ARG002 - PyYAML's signature
        return True


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style="|" if "\n" in text else None
    ),
)
_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(f"(?:{'|'.join(_NUMBERS)})$"), None
)


def object_from_yaml(text: str) -> JsonObject:
    """The one object that text is. Raises InvalidNetworkConfig with line and column.

    Aliases, anchors, tags, duplicate keys and further documents are refused: no network needs
    them, and they are how a small text becomes a large one, or a key means two things.
    """
    documents = _read_documents(text)
    value = next(documents, (None, None))[1]
    for mark, _ in documents:
        raise _fault("a second document", mark, "a file holds one network")
    return as_object(value, where="the definition")


def values_from_yaml(text: str) -> list[object]:
    """The values of all documents in text, which are read as strictly; raises the same."""
    return [value for _, value in _read_documents(text)]


@dataclass(frozen=True, slots=True)
class Place:
    """A place in YAML's text: of a key, where its value has one, else of the value itself.

    Lines and columns from 1. `text_line` is the line on which the text of a value begins that is
    written as a block (`|`), None for all others.
    """

    line: int
    column: int
    text_line: int | None = None


def nodes_in_yaml(text: str) -> list[dict[tuple[str | int, ...], Place]]:
    """Of each document of text the places of all values, by their keys and indexes.

    Also of JSON, but for what of it is no YAML; of what is neither, nothing.
    """
    found: list[dict[tuple[str | int, ...], Place]] = []
    try:
        # JSON may be indented with tabs, and has them nowhere else.
        documents = list(yaml.compose_all(text.replace("\t", " "), Loader=yaml.SafeLoader))
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError):
        return []
    for document in documents:
        places: dict[tuple[str | int, ...], Place] = {}
        open_nodes: list[tuple[tuple[str | int, ...], yaml.Node, yaml.Node]] = [
            ((), document, document)
        ]
        while open_nodes:
            path, key, node = open_nodes.pop()
            is_block = isinstance(node, yaml.ScalarNode) and node.style == "|"
            places[path] = Place(
                key.start_mark.line + 1,
                key.start_mark.column + 1,
                node.start_mark.line + 2 if is_block else None,
            )
            if isinstance(node, yaml.MappingNode):
                open_nodes += [((*path, it.value), it, value) for it, value in node.value]
            elif isinstance(node, yaml.SequenceNode):
                open_nodes += [((*path, n), it, it) for n, it in enumerate(node.value)]
        found.append(places)
    return found


def network_to_yaml(network: Network) -> str:
    """Network as YAML, in ASCII."""
    return values_to_yaml([network_to_object(network)])


def values_to_yaml(values: Iterable[object]) -> str:
    """A document for each value, in ASCII, of texts with line breaks each line on its own."""
    return yaml.dump_all(values, Dumper=_Dumper, sort_keys=False)


def _read_documents(text: str) -> Iterator[tuple[_Mark | None, object]]:
    """Where each document starts, and its value."""
    events = yaml.parse(text, Loader=yaml.SafeLoader)
    try:
        next(events)  # StreamStart
        while not isinstance(start := next(events), yaml.StreamEndEvent):
            yield start.start_mark, _read_node(next(events), events, MAX_DEPTH)
            next(events)  # DocumentEnd
    except yaml.MarkedYAMLError as failure:
        mark = failure.problem_mark or failure.context_mark
        what = f"{failure.problem or failure.context}"
        raise _fault(what[:_LONGEST_PROBLEM], mark) from failure
    except yaml.reader.ReaderError as failure:
        line = text.count("\n", 0, failure.position) + 1
        column = failure.position - text.rfind("\n", 0, failure.position)
        raise InvalidNetworkConfig(
            f"line {line}, column {column}: a character that YAML does not allow",
            "write it in double quotes, escaped",
        ) from failure
    except (ValueError, OverflowError) as failure:
        # PyYAML's scanner leaves them to chr() for \Uffffffff and to int() for 5,000 digits.
        raise InvalidNetworkConfig(f"{failure}", "it has to be YAML") from failure


def _read_node(event: yaml.Event, events: Iterator[yaml.Event], depth: int) -> object:
    _refuse_graph(event)
    if isinstance(event, yaml.ScalarEvent):
        return _read_scalar(event)
    if depth == 0:
        raise _fault(
            "objects and lists nest too deeply", event.start_mark, f"allowed: {MAX_DEPTH} levels"
        )
    if isinstance(event, yaml.SequenceStartEvent):
        return _read_list(events, depth - 1)
    return _read_object(events, depth - 1)


def _read_list(events: Iterator[yaml.Event], depth: int) -> list[object]:
    items = []
    while not isinstance(event := next(events), yaml.SequenceEndEvent):
        items.append(_read_node(event, events, depth))
    return items


def _read_object(events: Iterator[yaml.Event], depth: int) -> dict[str, object]:
    value: dict[str, object] = {}
    while not isinstance(event := next(events), yaml.MappingEndEvent):
        _refuse_graph(event)
        if not isinstance(event, yaml.ScalarEvent):
            raise _fault("a key that is a list or an object", event.start_mark, "a key is a word")
        if event.value in value:
            raise _fault(
                f"a key is twice in one object: {describe(event.value)}",
                event.start_mark,
                "keep one of them",
            )
        value[event.value] = _read_node(next(events), events, depth)
    return value


def _refuse_graph(event: yaml.Event) -> None:
    """Refuse what would make the document more than a tree of plain values."""
    if isinstance(event, yaml.AliasEvent):
        raise _fault("an alias", event.start_mark, "write the value out")
    if isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent):
        if event.anchor is not None:
            raise _fault("an anchor", event.start_mark, "leave it out")
        if event.tag is not None:
            raise _fault("a tag", event.start_mark, "leave it out; a string may be quoted")


def _read_scalar(event: yaml.ScalarEvent) -> object:
    is_plain, _ = event.implicit
    if is_plain:
        if event.value in _CONSTANTS:
            return _CONSTANTS[event.value]
        for pattern, convert in _NUMBERS.items():
            if re.fullmatch(pattern, event.value):
                try:
                    return convert(event.value)
                except ValueError as failure:
                    # int() of more than 4300 digits.
                    raise _fault(
                        "a number too long", event.start_mark, "allowed: 64 bits"
                    ) from failure
    return event.value


def _fault(what: str, mark: _Mark | None, hint: str = "it has to be YAML") -> InvalidNetworkConfig:
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return InvalidNetworkConfig(f"{place}{what}", hint)
