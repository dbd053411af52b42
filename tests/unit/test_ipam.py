"""What an IPAM plugin is given, what it may answer, and what the ledger keeps of both."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extbridge import ipam
from extbridge.ipam import (
    Delegation,
    delegated_config,
    delegation_to_object,
    parse_delegation,
)
from extbridge.network.addresses import (
    Address,
    Addressing,
    Route,
    addressing_from_ips,
    addressing_to_object,
    parse_addressing,
    parse_ips,
)
from extbridge.spec.errors import InvalidNetworkConfig, IpamFailure

RESULT: dict[str, Any] = {
    "cniVersion": "1.1.0",
    "ips": [
        {"address": "10.1.2.3/24", "gateway": "10.1.2.1"},
        {"address": "FD00:0::3/64", "gateway": ""},
    ],
    "routes": [
        {"dst": "0.0.0.0/0"},
        {"dst": "10.9.8.7/16", "gw": "10.1.2.254", "mtu": 1400, "table": 0, "scope": 253},
    ],
    "dns": {"nameservers": ["10.1.2.53"], "domain": "", "search": ["example.org"]},
}
ADDRESSING = Addressing(
    addresses=(Address("10.1.2.3/24", "10.1.2.1"), Address("fd00::3/64")),
    routes=(
        Route("0.0.0.0/0"),
        Route("10.9.0.0/16", "10.1.2.254", mtu=1400, table=0, scope=253),
    ),
    dns={"nameservers": ["10.1.2.53"], "search": ["example.org"]},
)
CONFIG: dict[str, Any] = {
    "cniVersion": "1.1.0",
    "name": "cluster",
    "type": "extbridge",
    "network": "vepanet",
    "args": {"cni": {"labels": []}},
    "capabilities": {"ips": True},
}
DELEGATION = Delegation(
    config={**CONFIG, "ipam": {"type": "host-local"}},
    path=("/opt/cni/bin", "/usr/lib/cni"),
    container_id="c0ffee",
    ifname="net1",
    netns="/run/netns/vm",
    args="IgnoreUnknown=1;K8S_POD_NAME=vm",
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def results() -> st.SearchStrategy[object]:
    """What is nearly a result: the keys are right, and the values mostly are."""
    text = JSON | st.sampled_from(["10.0.0.1/8", "fd00::1/64", "10.0.0.1", "::1/128", "1.2.3.4/33"])
    ip = st.fixed_dictionaries({}, optional={"address": text, "gateway": text, "version": JSON})
    route = st.fixed_dictionaries({}, optional={"dst": text, "gw": text, "mtu": JSON})
    dns = st.fixed_dictionaries({}, optional={"nameservers": st.lists(text), "domain": JSON})
    return st.fixed_dictionaries(
        {"ips": JSON | st.lists(JSON | ip, max_size=3)},
        optional={"routes": JSON | st.lists(JSON | route, max_size=3), "dns": JSON | dns},
    )


def test_result_says_addresses_routes_and_dns() -> None:
    """Addresses come in one spelling, a route's destination without host bits, nothing is lost."""
    assert parse_addressing(RESULT) == ADDRESSING


@pytest.mark.parametrize(
    ("cni_version", "ip"),
    [
        ("0.3.0", {"version": "4", "address": "10.1.2.3/24", "gateway": "10.1.2.1"}),
        ("1.0.0", {"address": "10.1.2.3/24", "gateway": "10.1.2.1"}),
        ("1.1.0", {"address": "10.1.2.3/24", "gateway": "10.1.2.1", "interface": None}),
    ],
)
def test_result_of_every_shape(cni_version: str, ip: dict[str, object]) -> None:
    """An address is the same in the shape of every version of the specification."""
    told = {"cniVersion": cni_version, "ips": [ip], "routes": None}
    assert parse_addressing(told) == Addressing((Address("10.1.2.3/24", "10.1.2.1"),))


def test_addressing_comes_back_from_the_ledger() -> None:
    """What is stored as JSON is read as what it was."""
    stored = json.loads(json.dumps(addressing_to_object(ADDRESSING)))
    assert parse_addressing(stored) == ADDRESSING
    assert parse_addressing(addressing_to_object(Addressing())) == Addressing()


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"ips": {}}, "ips is an object"),
        ({"ips": [{}]}, "ips[0].address is missing"),
        ({"ips": [{"address": 1}]}, "ips[0].address is the number 1"),
        ({"ips": [{"address": "10.1.2.3"}]}, "ips[0].address is"),
        ({"ips": [{"address": "10.1.2.3/255.0.0.0"}]}, "ips[0].address is"),
        ({"ips": [{"address": "fe80::1%eth0/64"}]}, "ips[0].address is"),
        ({"ips": [{"address": "::ffff:10.1.2.3/120"}]}, "ips[0].address is"),
        ({"ips": [{"address": "0.0.0.0/0"}]}, "ips[0].address is"),
        ({"ips": [{"address": "10.1.2.3/24", "gateway": "10.1.2.1/24"}]}, "ips[0].gateway is"),
        ({"routes": [{"gw": "10.1.2.1"}]}, "routes[0].dst is missing"),
        ({"routes": [{"dst": "default"}]}, "routes[0].dst is"),
        ({"routes": [{"dst": "::/0", "mtu": -1}]}, "routes[0].mtu is the number -1"),
        ({"routes": [{"dst": "::/0", "table": 1 << 32}]}, "routes[0].table is"),
        ({"dns": {"search": "example.org"}}, "dns.search is"),
        ({"dns": {"nameservers": [1]}}, "dns.nameservers[0] is the number 1"),
    ],
)
def test_bad_result_is_refused_by_field(told: dict[str, object], message: str) -> None:
    """The error names the field that an IPAM plugin got wrong."""
    with pytest.raises(InvalidNetworkConfig) as refusal:
        parse_addressing(told)
    assert refusal.value.message.startswith(message)


@given(JSON | results())
def test_any_answer_is_an_addressing_or_a_refusal(answer: object) -> None:
    """Whatever JSON a plugin prints, the runtime gets addresses or a CNI error."""
    executable = ipam._Executable("/opt/cni/bin/static", (), (0, 0, 0))
    with suppress(IpamFailure):
        addressing = ipam._read_addressing(executable, json.dumps(answer).encode())
        assert addressing.addresses
        assert parse_addressing(addressing_to_object(addressing)) == addressing


@given(st.binary())
def test_any_bytes_are_an_addressing_or_a_refusal(answer: bytes) -> None:
    """What is no JSON at all is a CNI error too."""
    executable = ipam._Executable("/opt/cni/bin/static", (), (0, 0, 0))
    with pytest.raises(IpamFailure, match="/opt/cni/bin/static"):
        ipam._read_addressing(executable, answer)


def test_asked_addresses() -> None:
    """Addresses are asked for with a prefix length or without, each in one spelling."""
    asked = parse_ips(["10.1.2.3/24", "10.1.2.4", "FD00:0::1/64", "fe80::1"], where="ips")
    assert asked == ("10.1.2.3/24", "10.1.2.4", "fd00::1/64", "fe80::1")
    assert parse_ips([], where="ips") == ()


def test_asked_addresses_without_ipam_plugin() -> None:
    """Where nobody else is asked, an address without a prefix length is alone in its subnet."""
    assert addressing_from_ips(("10.1.2.3/24", "10.1.2.4", "fe80::1")) == Addressing(
        (Address("10.1.2.3/24"), Address("10.1.2.4/32"), Address("fe80::1/128"))
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "vm",
        "10.1.2",
        "10.1.2.03",
        "10.1.2.3/",
        "10.1.2.3/33",
        "10.1.2.3/24/24",
        "10.1.2.3/255.255.255.0",
        "10.1.2.3 ",
        "\u0661\u0660.1.2.3",
        "fd00::1/129",
        "fe80::1%eth0",
        "fe80::1%eth0/64",
        "::ffff:10.1.2.3",
        "0.0.0.0/0",
        "::",
        "127.0.0.1/8",
        "::1",
        "224.0.0.251",
        "ff02::1/64",
        "255.255.255.255",
        f"10.1.2.3/{'9' * 5000}",
    ],
)
def test_address_that_no_guest_can_have(text: str) -> None:
    """The error names the field, what was given and what is allowed."""
    with pytest.raises(InvalidNetworkConfig) as refusal:
        parse_ips(["10.9.9.9", text], where="runtimeConfig.ips")
    assert refusal.value.message.startswith("runtimeConfig.ips[1] is the string")
    assert refusal.value.hint


@pytest.mark.parametrize("text", ["10.1.2.3", "10.1.2.3/24", "10.1.2.3/16"])
def test_address_is_asked_for_once(text: str) -> None:
    """The same address twice is a mistake, whatever prefix length it has."""
    with pytest.raises(InvalidNetworkConfig, match="once more"):
        parse_ips(["10.1.2.3/24", text], where="ips")


def test_address_has_to_be_text() -> None:
    """A number is no address, though Python would take it for one."""
    with pytest.raises(InvalidNetworkConfig, match=r"ips\[0\] is the number 1"):
        parse_ips([1], where="ips")


def test_plugin_gets_the_whole_configuration() -> None:
    """All that the runtime gave is passed on, under the network's name and with its ipam."""
    asked = {
        **CONFIG,
        "prevResult": {"cniVersion": "1.1.0"},
        "cni.dev/valid-attachments": [],
        "runtimeConfig": {
            "ipRanges": [],
            "ips": ["10.1.2.9"],
            "io.kubernetes.cri.pod-annotations": {"secret": "x"},
        },
    }
    config = delegated_config(asked, name="vepanet", ipam={"type": "static"}, ips=("10.1.2.3/24",))
    assert config == {
        **CONFIG,
        "name": "vepanet",
        "ipam": {"type": "static"},
        "runtimeConfig": {"ipRanges": [], "ips": ["10.1.2.3/24"]},
    }


def test_plugin_gets_no_addresses_that_are_not_asked_for() -> None:
    """Whose NIC the runtime's addresses are for is for the caller to say."""
    asked = {**CONFIG, "runtimeConfig": {"ips": ["10.1.2.9"]}}
    config = delegated_config(asked, name="vepanet", ipam={"type": "static"})
    assert config["runtimeConfig"] == {}


def test_delegation_comes_back_from_the_ledger() -> None:
    """What was given can be released by what was stored, however long ago."""
    stored = json.loads(json.dumps(delegation_to_object(DELEGATION)))
    assert parse_delegation(stored) == DELEGATION


@pytest.mark.parametrize("key", list(delegation_to_object(DELEGATION)))
@pytest.mark.parametrize("value", [None, 1])
def test_damaged_delegation_is_refused(key: str, value: object) -> None:
    """An entry that lacks something, or has it wrong, is none."""
    stored = {**delegation_to_object(DELEGATION), key: value}
    with pytest.raises(InvalidNetworkConfig, match=f"ipam.{key} is"):
        parse_delegation(stored, where="ipam")
