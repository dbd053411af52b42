"""What a pod may ask for in the annotation `extbridge.io/networks`."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from extbridge.network.annotation import AskedNic, parse_networks_annotation
from extbridge.spec.errors import InvalidNetworkConfig

LONGEST_MESSAGE = 2000


@pytest.mark.parametrize("text", ["", " ", "\n"])
def test_blank_annotation_asks_for_nothing(text: str) -> None:
    """An annotation that was emptied is as good as none."""
    assert parse_networks_annotation(text) == ()


def test_names_are_enough() -> None:
    """One name, or several with commas, ask for a NIC each, in that order."""
    assert parse_networks_annotation("vepanet") == (AskedNic("vepanet"),)
    assert parse_networks_annotation(" vepanet, blue,vepanet\n") == (
        AskedNic("vepanet"),
        AskedNic("blue"),
        AskedNic("vepanet"),
    )


def test_json_says_more() -> None:
    """The JSON form, a list or one object, gives a NIC its MAC, interface and addresses."""
    nic = {
        "name": "vepanet",
        "mac": "52-54-00-00-00-0A",
        "interface": "net1",
        "ips": ["192.0.2.7/24"],
    }
    asked = AskedNic("vepanet", "52:54:00:00:00:0a", "net1", ("192.0.2.7/24",))
    assert parse_networks_annotation(json.dumps(nic)) == (asked,)
    assert parse_networks_annotation(json.dumps([nic, {"name": "blue", "mac": None}])) == (
        asked,
        AskedNic("blue"),
    )
    assert parse_networks_annotation("[]") == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("vepanet,", r"networks\[1\] is the string \"\""),
        ("default/vepanet", r"networks\[0\] is the string"),
        ("vepanet@net1", r"networks\[0\] is the string"),
        ("[", r"networks: line 1, column 2: "),
        ('[{"name": "a", "name": "b"}]', r"networks: a key is twice"),
        ('["vepanet"]', r"networks\[0\] is the string \"vepanet\""),
        ("[{}]", r"networks\[0\]\.name is missing"),
        ('[{"name": 7}]', r"networks\[0\]\.name is the number 7"),
        ('[{"name": "a", "interfaces": "net1"}]', r"networks\[0\]\.interfaces is not a known key"),
        ('[{"name": "a", "interface": "sixteen-bytes-16"}]', r"networks\[0\]\.interface is"),
        ('[{"name": "a", "interface": "a/b"}]', r"networks\[0\]\.interface is"),
        ('[{"name": "a", "mac": "ff:ff:ff:ff:ff:ff"}]', r"networks\[0\]\.mac is"),
        ('[{"name": "a", "ips": "192.0.2.7"}]', r"networks\[0\]\.ips is the string"),
        ('[{"name": "a", "ips": [7]}]', r"networks\[0\]\.ips\[0\] is the number 7"),
        (
            '[{"name": "a", "interface": "net1"}, {"name": "b", "interface": "net1"}]',
            r"asks for the interface net1 more than once",
        ),
        (",".join(["a"] * 33), r"asks for 33 NICs"),
        ("a" * 100_000, r"is 100000 characters long"),
    ],
)
def test_wrong_annotation_is_refused_by_its_part(text: str, message: str) -> None:
    """Each fault is code 7 and names the annotation, the NIC's place in it and the key."""
    with pytest.raises(InvalidNetworkConfig, match=rf"^extbridge\.io/.*{message}") as caught:
        parse_networks_annotation(text)
    assert caught.value.hint


@given(st.text() | st.text("[]{}:,\"nameipscv \\u0d81'").map(lambda text: f"[{text}"))
@example("[" * 60_000)
@example('{"name": "\\ud800"}')
@example("\x85")
def test_no_annotation_breaks_the_parser(text: str) -> None:
    """Whatever a pod's author writes is NICs or a short code 7."""
    told = ""
    try:
        parse_networks_annotation(text)
    except InvalidNetworkConfig as error:
        told = str(error)
    assert len(told) < LONGEST_MESSAGE
