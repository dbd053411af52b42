"""What a result says, and that it keeps what others said."""

from __future__ import annotations

import copy
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extbridge.spec import result, versions
from extbridge.spec.errors import InvalidNetworkConfig

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=20,
)
VM_NIC = {"name": "net1", "mac": "52:54:00:00:00:01", "sandbox": "/run/netns/blue", "mtu": 1500}


@given(prev_result=st.dictionaries(st.text(), JSON), cni_version=st.sampled_from(versions.KNOWN))
def test_prev_result_passes_through(prev_result: dict[str, object], cni_version: str) -> None:
    """Whatever an earlier plugin said is said again, in the asked version."""
    before = copy.deepcopy(prev_result)
    ours = result.start_from(prev_result, cni_version)
    assert ours == {**before, "cniVersion": cni_version}
    assert json.loads(json.dumps(ours)) == ours
    assert prev_result == before


def test_what_we_add_leaves_prev_result_alone() -> None:
    """Our interface is in our result only; the prevResult object is not changed under its owner."""
    prev_result = {"interfaces": [{"name": "eth0", "x": {"y": 1}}], "dns": {"search": ["a"]}}
    before = copy.deepcopy(prev_result)
    ours = result.start_from(prev_result, "1.1.0")
    index = result.add_interface(ours, name="net1", mac="m", sandbox="s", mtu=1500)
    result.add_ip(ours, address="192.0.2.2/24", gateway=None, interface=index)
    assert prev_result == before
    assert index == 1
    assert ours == {
        **before,
        "cniVersion": "1.1.0",
        "interfaces": [
            {"name": "eth0", "x": {"y": 1}},
            {"name": "net1", "mac": "m", "mtu": 1500, "sandbox": "s"},
        ],
        "ips": [{"address": "192.0.2.2/24", "interface": 1}],
    }


@pytest.mark.parametrize("cni_version", versions.SUPPORTED)
def test_result_has_the_shape_of_its_version(cni_version: str) -> None:
    """An MTU is told from 1.1.0 on, the family of an address until 0.4.0."""
    ours = result.start_from(None, cni_version)
    assert ours == result.new_result(cni_version) == {"cniVersion": cni_version}
    index = result.add_interface(ours, name="net1", mac="m", sandbox="s", mtu=9000)
    result.add_ip(ours, address="192.0.2.2/24", gateway="192.0.2.1", interface=index)
    result.add_ip(ours, address="2001:db8::2/64", gateway=None, interface=index)
    mtu = {"mtu": 9000} if cni_version == "1.1.0" else {}
    families = cni_version.startswith("0.")
    assert ours == {
        "cniVersion": cni_version,
        "interfaces": [{"name": "net1", "mac": "m", "sandbox": "s", **mtu}],
        "ips": [
            {
                "address": "192.0.2.2/24",
                "gateway": "192.0.2.1",
                "interface": 0,
                **({"version": "4"} if families else {}),
            },
            {
                "address": "2001:db8::2/64",
                "interface": 0,
                **({"version": "6"} if families else {}),
            },
        ],
    }


def test_list_that_another_plugin_wrote_as_null_is_begun() -> None:
    """Go's null for a list without items is no obstacle."""
    ours = result.start_from({"interfaces": None}, "1.1.0")
    assert result.add_interface(ours, name="net1", mac="m", sandbox="s", mtu=1500) == 0


@pytest.mark.parametrize(
    ("interfaces", "found"),
    [
        (None, None),
        ([], None),
        ([{}, {"name": "eth0", "sandbox": "s"}], None),
        ([{"name": "net1"}, VM_NIC], 1),
        ([{"name": "net1", "sandbox": ""}, {"name": "net1"}], 0),
        ([VM_NIC, {"name": "net1", "sandbox": "other"}], 0),
    ],
)
def test_interface_in_the_pod_is_preferred(
    interfaces: list[dict[str, object]] | None, found: int | None
) -> None:
    """Of interfaces with one name, the first in a sandbox is meant, then the first of all."""
    expected = interfaces[found] if interfaces and found is not None else None
    assert result.prev_interface({"interfaces": interfaces}, "net1") is expected
    assert result.prev_interface(None, "net1") is None


@pytest.mark.parametrize(
    ("interfaces", "named"),
    [
        ("x", "prevResult.interfaces is"),
        ([{}, 5], "prevResult.interfaces[1] is"),
        ([{"name": 5}], "prevResult.interfaces[0].name is"),
        ([{"name": "net1", "sandbox": {}}], "prevResult.interfaces[0].sandbox is"),
        ([{}, {"mac": 5}], "prevResult.interfaces[1].mac is"),
        ([{"mtu": 1.5}], "prevResult.interfaces[0].mtu is"),
    ],
)
def test_malformed_interfaces_are_named(interfaces: object, named: str) -> None:
    """A prevResult with malformed interfaces is code 7 and says where."""
    with pytest.raises(InvalidNetworkConfig) as caught:
        result.prev_interface({"interfaces": interfaces}, "net1")
    assert caught.value.message.startswith(named)
