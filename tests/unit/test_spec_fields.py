"""What the typed getters promise about JSON that others wrote."""

from __future__ import annotations

import contextlib
import datetime as dt
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extbridge.spec import fields
from extbridge.spec.errors import InvalidNetworkConfig

GETTERS: list[tuple[Callable[..., object], list[object], list[object]]] = [
    (fields.get_str, ["", "vepa"], [1, 1.0, True, [], {}]),
    (fields.get_int, [0, -1, 1 << 80], ["1", 1.0, True, [], {}]),
    (fields.get_bool, [True, False], ["true", 0, 1, [], {}]),
    (fields.get_object, [{}, {"a": None}], ["", 1, True, []]),
    (fields.get_list, [[], [1, "a"]], ["", 1, True, {}]),
    (fields.get_objects, [[], [{}, {"a": 1}]], ["", 1, True, {}, ["a"], [None]]),
]


@pytest.mark.parametrize(
    ("getter", "value"), [(getter, value) for getter, good, _ in GETTERS for value in good]
)
def test_value_of_the_right_type_is_returned_as_it_is(
    getter: Callable[..., object], value: object
) -> None:
    """A field of the right type reaches the program unchanged."""
    assert getter({"key": value}, "key", where="extbridge") == value


@pytest.mark.parametrize("getter", [getter for getter, _, _ in GETTERS])
@pytest.mark.parametrize("config", [{}, {"key": None}], ids=["absent", "null"])
def test_null_is_absent(getter: Callable[..., object], config: dict[str, object]) -> None:
    """A field that is null counts as not given, as it does for runtimes written in Go."""
    assert getter(config, "key") is None


@pytest.mark.parametrize(
    ("getter", "value"), [(getter, value) for getter, _, bad in GETTERS for value in bad]
)
def test_wrong_type_names_the_field_and_what_is_allowed(
    getter: Callable[..., object], value: object
) -> None:
    """A field of a wrong type is an error of code 7 that names it with its path."""
    with pytest.raises(InvalidNetworkConfig, match=r"^extbridge\.key") as caught:
        getter({"key": value}, "key", where="extbridge")
    assert caught.value.code == 7
    assert caught.value.hint.startswith("it has to be ")


def test_item_of_a_wrong_type_is_named_by_its_index() -> None:
    """In a list of objects the error says which item is none."""
    with pytest.raises(InvalidNetworkConfig, match=r"^a\.b\[1\] is the number 3"):
        fields.get_objects({"b": [{}, 3]}, "b", where="a")


@pytest.mark.parametrize("value", ["eth\0", "eth\udcff"], ids=ascii)
def test_text_that_no_system_call_takes_is_refused(value: str) -> None:
    """NUL and lone surrogates are a configuration error, not a traceback from a system call."""
    with pytest.raises(InvalidNetworkConfig, match=r"^dev is the string"):
        fields.get_str({"dev": value}, "dev")


def test_key_that_is_no_string_is_refused() -> None:
    """YAML's unquoted numbers as keys are refused with a hint to quote them."""
    with pytest.raises(InvalidNetworkConfig, match=r"number 5 as a key.*quote"):
        fields.get_object({"selector": {5: "x"}}, "selector")


@pytest.mark.parametrize(
    ("key", "question"),
    [
        ("mdoe", "did you mean mode? "),
        ("MTU", "did you mean mtu? "),
        ("zzz", ""),
        ("m" * 10_000, ""),
    ],
)
def test_unknown_key_is_answered_with_the_nearest_and_the_allowed(key: str, question: str) -> None:
    """A misspelt key is named, with the nearest right spelling and everything that is allowed."""
    with pytest.raises(InvalidNetworkConfig, match="is not a known key") as caught:
        fields.refuse_unknown({"dev": 1, key: 2}, ["mode", "dev", "mtu"], where="extbridge")
    assert caught.value.message.startswith(f"extbridge.{key[:60]}")
    assert caught.value.hint == f"{question}allowed: mode, dev, mtu"


def test_known_keys_are_not_refused() -> None:
    """A configuration of known keys passes."""
    fields.refuse_unknown({"mode": 1}, {"mode", "dev"})


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "null"),
        (True, "true"),
        (12, "the number 12"),
        (1.5, "the number 1.5"),
        (float("nan"), "a number too large"),
        (1 << 100_000, "a number too large"),
        ("é\n", 'the string "é\\n"'),
        ("x" * 100, f'the string "{"x" * 60}…"'),
        ({}, "an object"),
        ([], "a list"),
        (dt.date(2024, 1, 1), "a value of type date"),
    ],
    # pytest's own would be str(), which refuses the largest.
    ids=fields.describe,
)
def test_messages_repeat_what_was_given(value: object, shown: str) -> None:
    """An error repeats the given value on one short line."""
    assert fields.describe(value) == shown


@given(st.dictionaries(st.text(), st.recursive(st.none() | st.text() | st.integers(), st.lists)))
def test_getters_raise_nothing_but_configuration_errors(config: dict[str, object]) -> None:
    """Whatever a configuration holds, a getter returns a value or raises code 7."""
    for key in [*config, "absent"]:
        for getter, _, _ in GETTERS:
            with contextlib.suppress(InvalidNetworkConfig):
                getter(config, key)
