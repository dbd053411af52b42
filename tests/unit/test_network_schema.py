"""The JSON Schema of a definition says what the parser does."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from extbridge.network.definition import DEFINITION_KEYS, parse_network
from extbridge.network.schema import network_schema
from extbridge.network.spelling_xml import object_from_xml
from extbridge.network.store import READERS
from extbridge.network.wanted import inline_definition
from extbridge.spec.errors import InvalidNetworkConfig
from tests.manifests import rendered
from tests.support import executable

TOP: Final = Path(__file__).parents[2]

SCHEMA: Final = network_schema()

VALIDATOR: Final = Draft202012Validator(SCHEMA)

SEED: Final[dict[str, Any]] = {"name": "vepanet", "extbridge": {"mode": "vepa", "dev": "eth0"}}


def is_valid(definition: object) -> bool:
    """Whether the schema takes it."""
    return VALIDATOR.is_valid(definition)


def is_parsed(definition: dict[str, Any], name: str = "vepanet") -> bool:
    """Whether the parser takes it, in a file that is called name if it says nothing else."""
    try:
        parse_network(definition, name=definition.get("name") or name)
    except InvalidNetworkConfig:
        return False
    return True


def test_command_prints_it() -> None:
    """`extbridge schema` prints what docs/network.schema.json holds, a schema of 2020-12."""
    printed = subprocess.run(
        (executable("extbridge"), "schema"), capture_output=True, text=True, check=True
    ).stdout
    assert (TOP / "docs/network.schema.json").read_text() == printed, "run `make docs`"
    Draft202012Validator.check_schema(json.loads(printed))


def test_every_key_is_described() -> None:
    """An editor shows of each key what it is for."""
    assert tuple(SCHEMA["properties"]) == DEFINITION_KEYS
    for key, schema in _properties(SCHEMA):
        assert "description" in schema, key


def _properties(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for key, inner in schema.get("properties", {}).items():
        yield key, inner
        yield from _properties(inner)
    for inner in schema.get("anyOf", []):
        if "description" in inner:
            yield from _properties(inner)


def _examples() -> Iterator[tuple[str, dict[str, Any]]]:
    """Each definition in README, the pages of docs/ and the manifests."""
    for page in (TOP / "README.md", *TOP.glob("docs/*.md")):
        for language, text in re.findall(r"(?s)```(json|xml)\n(.*?)```", page.read_text()):
            if language == "xml" and "<network>" in text:
                yield page.name, dict(object_from_xml(text))
            elif language == "json":
                yield from ((page.name, it) for it in _definitions(json.loads(text)))
    for folder in TOP.glob("deploy/**/kustomization.yaml"):
        for manifest in rendered(folder.parent):
            yield from ((str(folder), it) for it in _of_manifest(manifest))
    for path in TOP.glob("deploy/examples/*.yaml"):
        for manifest in yaml.safe_load_all(path.read_text()):
            yield from ((path.name, it) for it in _of_manifest(manifest))


def _of_manifest(manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if manifest["kind"] == "ConfigMap":
        for name, text in manifest["data"].items():
            if Path(name).suffix in READERS:
                yield yaml.safe_load(text)
    if manifest["kind"] == "NetworkAttachmentDefinition":
        yield from _definitions(json.loads(manifest["spec"]["config"]))


def _definitions(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for plugin in config.get("plugins", [config]):
        definition = inline_definition(plugin)
        if plugin.get("type") == "extbridge" and definition:
            yield dict(definition)


def test_examples_are_accepted() -> None:
    """Whatever is shown to users is without a red line in their editor."""
    examples = list(_examples())
    assert len(examples) > 5
    for where, definition in examples:
        assert list(VALIDATOR.iter_errors(definition)) == [], where
        assert is_parsed(definition), where


@pytest.mark.parametrize(
    "changes",
    [
        {"name": ""},
        {"name": "../etc"},
        {"name": "n" * 251},
        {"name": 7},
        {"uuid": "4ebd5168"},
        {"uuid": "{4ebd5168-6321-4757-8397-f6e83484f402}"},
        {"extbridge": None},
        {"extbridge": "eth0"},
        {"extbridge": {}},
        {"extbridge": {"dev": None}},
        {"extbridge": {"dev": "eth0", "mode": "vepaa"}},
        {"extbridge": {"dev": "eth0", "mode": 1}},
        {"extbridge": {"dev": "eth0", "vlan": 7}},
        {"mtu": 67},
        {"mtu": 65536},
        {"mtu": "1500"},
        {"mtu": 10**30},
        {"queues": 0},
        {"queues": 257},
        {"queues": True},
        {"queue": 2},
        {"mac": "01:00:00:00:00:01"},
        {"mac": "00:00:00:00:00:00"},
        {"mac": ""},
        {"macPrefix": "ff"},
        {"macPrefix": "00:00"},
        {"macPrefix": "52:54:00:00:00:00"},
        {"antispoof": "ARP"},
        {"antispoof": False},
        {"trust": "yes"},
        {"trust": True, "antispoof": "mac"},
        {"trust": True, "antispoof": "ip"},
        {"bandwidth": {"ingressrate": 1}},
        {"bandwidth": {"ingressRate": -1}},
        {"bandwidth": {"ingressRate": 1 << 63, "ingressBurst": 1}},
        {"bandwidth": {"ingressRate": 1}},
        {"bandwidth": {"ingressRate": 1, "ingressBurst": 0}},
        {"bandwidth": {"ingressRate": 1, "ingressBurst": None}},
        {"bandwidth": {"egressBurst": 1}},
        {"handoff": "node"},
        {"ipam": {"subnet": "192.0.2.0/24"}},
        {"ipam": {"type": "../../bin/sh"}},
        {"ipam": {"type": ""}},
        {"ipam": {"type": "dhcp"}},
        {"ipam": {"type": "extbridge"}},
        {"ipam": {"type": None}},
        {"type": "extbridge"},
        *({"extbridge": {"dev": dev}} for dev in (
            "", ".", "default", "a" * 16, "eth0:1", "eth 0", "eth/0", "eth%d", "eth\x00", 7, True,
            [], ["eth0", 7], ["eth0", "eth0"], [f"eth{number}" for number in range(257)], {},
            {"name": "eth0"}, {"match": ""}, {"match": "eth 0"}, {"match": "e" * 65},
            {"match": None}, {"pci": "3b:20.0"}, {"pci": "eth0"}, {"driver": "../virtio"},
            {"mac": "ff:ff:ff:ff:ff:ff"}, {"route": "192.0.2.0/24"},
        )),
    ],
)  # fmt: skip
def test_what_the_parser_refuses(changes: dict[str, Any]) -> None:
    """What ADD would fail at is seen while it is written."""
    assert not is_parsed({**SEED, **changes})
    assert not is_valid({**SEED, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"mtu": 1500.0},
        {"name": "vepanet\n"},
        {"extbridge": {"dev": "é" * 8}},
        {"ipam": {"type": "t", "a": 10**30}},
    ],
)
def test_what_the_schema_cannot_say(changes: dict[str, Any]) -> None:
    """These are all; one that JSON Schema could say would be missing above."""
    assert not is_parsed({**SEED, **changes})
    assert is_valid({**SEED, **changes})


def _values() -> st.SearchStrategy[object]:
    """What stands behind a key: good, nearly good, and of another key."""
    octets = st.lists(
        st.sampled_from(["00", "52", "01", "0A", "fe", "f"]), min_size=1, max_size=7
    ).flatmap(lambda them: st.sampled_from([":", "-", ""]).map(lambda by: by.join(them)))
    words = st.sampled_from(
        ["vepa", "passthrough", "mac", "ip", "off", "fd", "device", "eth0", "ens*", "ixgbe",
         "0000:3b:00.0", "3b:00.1", "default", "static", "dhcp", "a" * 15, "a" * 16, "",
         "4EBD5168-6321-4757-8397-f6e83484f402"]
    )  # fmt: skip
    numbers = st.sampled_from([0, 1, 67, 68, 256, 257, 65535, 65536, (1 << 35), (1 << 63)])
    plain = st.none() | st.booleans() | numbers | words | octets
    keys = st.sampled_from([
        "type", "match", "pci", "driver", "mac", "route", "ingressRate", "ingressBurst",
        "egressRate", "egressBurst",
    ])  # fmt: skip
    return plain | st.lists(words, max_size=3) | st.dictionaries(keys, plain, max_size=3)


@given(
    st.dictionaries(st.sampled_from(DEFINITION_KEYS), _values(), max_size=4),
    st.fixed_dictionaries({"dev": _values()}, optional={"mode": _values()}),
)
def test_schema_and_parser_agree(keys: dict[str, Any], nics: dict[str, Any]) -> None:
    """The schema takes just what the parser takes, but for what the test above it names."""
    for definition in ({**SEED, **keys}, {"name": "n", "extbridge": nics}):
        assert is_valid(definition) == is_parsed(definition, "n"), definition
