"""Which MAC addresses are taken, and which one a VM's NIC gets when none is given."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extbridge.network.mac import derive_mac, parse_mac, parse_mac_prefix
from extbridge.spec.errors import InvalidNetworkConfig

IDENTITY = {"network": "vepanet", "namespace": "default", "vm": "vm-0", "ifname": "net1"}


@pytest.mark.parametrize("text", ["52:54:00:ab:cd:ef", "52-54-00-AB-CD-EF", "52:54:00:AB:cd:EF"])
def test_mac_is_read_in_any_usual_form(text: str) -> None:
    """A MAC may be written in either case and with dashes; it is always told one way."""
    assert parse_mac(text, field="mac") == "52:54:00:ab:cd:ef"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "52:54:00:ab:cd",
        "52:54:00:ab:cd:ef:01",
        "52:54:00-ab:cd:ef",
        "525400abcdef",
        "52:54:00:ab:cd:eg",
        "52:54:00:ab:cd:ef\n",
        "5:54:0:ab:cd:ef",
        "00:00:00:00:00:00",
        "01:00:5e:00:00:01",
        "33:33:00:00:00:01",
        "ff:ff:ff:ff:ff:ff",
    ],
)
def test_mac_that_no_nic_can_have_is_refused(text: str) -> None:
    """Malformed, zero, multicast and broadcast addresses are errors that name the field."""
    with pytest.raises(InvalidNetworkConfig, match=r"^runtimeConfig\.mac is the string"):
        parse_mac(text, field="runtimeConfig.mac")


@pytest.mark.parametrize("text", ["", "52:", "53:54:00", "00:00:00", "52:54:00:ab:cd:ef", "5"])
def test_prefix_that_begins_no_mac_is_refused(text: str) -> None:
    """A prefix is one to five octets of an address that a NIC can have."""
    with pytest.raises(InvalidNetworkConfig, match=r"^macPrefix is the string"):
        parse_mac_prefix(text, field="macPrefix")


def test_derived_mac_never_changes() -> None:
    """A VM keeps its address across restarts, nodes and versions of extbridge."""
    assert derive_mac("52:54:00", **IDENTITY) == "52:54:00:67:f1:78"
    assert derive_mac("02", **IDENTITY) == "02:67:f1:78:2d:d2"


@pytest.mark.parametrize("key", IDENTITY)
def test_each_part_of_the_identity_tells_nics_apart(key: str) -> None:
    """Another network, namespace, VM or interface gets another address."""
    other = {**IDENTITY, key: IDENTITY[key] + "x"}
    assert derive_mac("52:54:00", **other) != derive_mac("52:54:00", **IDENTITY)


def test_parts_of_the_identity_do_not_run_into_each_other() -> None:
    """The VM `b` of the namespace `a-` is not the VM `-b` of the namespace `a`."""
    one = derive_mac("52", network="n", namespace='a","', vm="b", ifname="net1")
    two = derive_mac("52", network="n", namespace="a", vm='","b', ifname="net1")
    assert one != two


@given(
    st.integers(1, 5).flatmap(
        lambda count: st.lists(st.integers(0, 255), min_size=count, max_size=count)
    ),
    st.text(),
)
def test_derived_mac_is_always_one_that_a_nic_can_have(octets: list[int], vm: str) -> None:
    """Whatever the VM is called, a prefix that was taken yields an address that is taken."""
    prefix = ":".join(f"{octet:02x}" for octet in octets)
    try:
        prefix = parse_mac_prefix(prefix, field="macPrefix")
    except InvalidNetworkConfig:
        return
    mac = derive_mac(prefix, network="n", namespace="d", vm=vm, ifname="net1")
    assert mac.startswith(f"{prefix}:")
    assert parse_mac(mac, field="mac") == mac
