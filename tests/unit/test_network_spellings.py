"""JSON, YAML and XML say the same networks, and no text of any of them does harm."""

from __future__ import annotations

import json
import time
import tracemalloc
from collections.abc import Callable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from extbridge.network.definition import (
    Antispoof,
    Bandwidth,
    Handoff,
    Mode,
    Network,
    NicSelector,
    network_to_object,
    parse_network,
)
from extbridge.network.mac import parse_mac, parse_mac_prefix
from extbridge.network.spelling_json import network_to_json, object_from_json
from extbridge.network.spelling_xml import network_to_xml, object_from_xml
from extbridge.network.spelling_yaml import network_to_yaml, object_from_yaml
from extbridge.network.store import MAX_FILE_BYTES, READERS, read_definition
from extbridge.network.wanted import inline_definition
from extbridge.spec.errors import CniError, InvalidNetworkConfig, UnsupportedField
from extbridge.spec.fields import JsonObject
from extbridge.spec.request import find_ifname_fault

VEPANET = Network("vepanet", NicSelector(names=("eth0",)))
"""The seed's network."""

LONGEST_MESSAGE = 2000
"""Characters; a runtime puts the message into an event and a log."""

TRAPS = ["off", "no", "null", "1e5", "0o17", "0x1f", "010", "1_000", "=", "<<", "2001-01-01"]
"""Valid NIC names and strings that some version of YAML takes for something else."""


def nic_names() -> st.SearchStrategy[str]:
    """Names that the kernel lets a NIC have, with a preference for odd ones."""
    anything = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=15)
    return (st.sampled_from(TRAPS) | anything).filter(lambda name: not find_ifname_fault(name))


def macs() -> st.SearchStrategy[str]:
    """Addresses that a NIC can have."""
    octets = st.lists(st.integers(0, 255), min_size=6, max_size=6)
    return _valid(octets.map(_join), lambda text: parse_mac(text, field="mac"))


def prefixes() -> st.SearchStrategy[str]:
    """Beginnings of such addresses."""
    octets = st.lists(st.integers(0, 255), min_size=1, max_size=5)
    return _valid(octets.map(_join), lambda text: parse_mac_prefix(text, field="macPrefix"))


def selectors() -> st.SearchStrategy[NicSelector]:
    """One NIC, candidates, or what to look for."""
    patterns = st.text("ens*?[]!0-9'\"<&>", min_size=1, max_size=64)
    by_trait = st.builds(
        NicSelector,
        match=st.none() | patterns,
        pci=st.none() | st.sampled_from(["0000:3b:00.0", "10000:01:1f.7"]),
        driver=st.none() | st.from_regex(r"[A-Za-z0-9_.\-]{1,64}", fullmatch=True),
        mac=st.none() | macs(),
        route=st.none() | st.just("default"),
    ).filter(lambda selector: selector != NicSelector())
    names = st.lists(nic_names(), min_size=1, max_size=4, unique=True).map(tuple)
    return by_trait | names.map(lambda given: NicSelector(names=given))


def bandwidths() -> st.SearchStrategy[Bandwidth]:
    """Limits in one direction or both."""
    limits = st.tuples(st.integers(1, (1 << 63) - 1), st.integers(1, (1 << 35) - 1))
    return (
        st.tuples(st.just((None, None)) | limits, st.just((None, None)) | limits)
        .map(lambda both: Bandwidth(*both[0], *both[1]))
        .filter(lambda bandwidth: bandwidth != Bandwidth())
    )


def ipams() -> st.SearchStrategy[dict[str, object]]:
    """What an IPAM plugin might be given, strings of any kind included."""
    words = st.text(st.characters(), max_size=8) | st.sampled_from(TRAPS)
    plain = (
        st.none()
        | st.booleans()
        | st.integers(-(1 << 63), (1 << 64) - 1)
        | st.floats(allow_nan=False, allow_infinity=False)
        | words
    )
    values = st.recursive(
        plain,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
        max_leaves=8,
    )
    return st.dictionaries(words, values, max_size=4).map(lambda ipam: {**ipam, "type": "static"})


def networks(ipam: st.SearchStrategy[dict[str, object] | None]) -> st.SearchStrategy[Network]:
    """Any network that a definition can say."""
    return st.builds(
        Network,
        name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,40}", fullmatch=True)
        | st.sampled_from(["1e5", "0o17", "123", "null", "off", "on"]),
        dev=selectors(),
        mode=st.sampled_from(Mode),
        uuid=st.none() | st.uuids().map(str),
        mtu=st.none() | st.integers(68, 65535),
        queues=st.integers(1, 256),
        mac=st.none() | macs(),
        mac_prefix=prefixes(),
        antispoof=st.none() | st.sampled_from(Antispoof),
        trust=st.booleans(),
        bandwidth=st.none() | bandwidths(),
        handoff=st.sampled_from(Handoff),
        ipam=ipam,
    ).filter(lambda it: not it.trust or it.antispoof in (None, Antispoof.OFF))


def refusal(read: Callable[[], JsonObject]) -> str:
    """What is said of the definition that is read; nothing if it is a network's."""
    try:
        parse_network(read())
    except CniError as error:
        return str(error)
    return ""


def _join(octets: list[int]) -> str:
    return ":".join(f"{octet:02x}" for octet in octets)


def _valid(texts: st.SearchStrategy[str], parse: Callable[[str], str]) -> st.SearchStrategy[str]:
    def is_valid(text: str) -> bool:
        try:
            return parse(text) == text
        except InvalidNetworkConfig:
            return False

    return texts.filter(is_valid)


@settings(deadline=None)
@given(networks(st.none() | ipams()))
def test_printed_network_parses_back_to_itself(network: Network) -> None:
    """What is printed as JSON, YAML or a CNI configuration is the network that was printed."""
    assert parse_network(object_from_json(network_to_json(network))) == network
    assert parse_network(object_from_yaml(network_to_yaml(network))) == network
    config = {"cniVersion": "1.1.0", "type": "extbridge", **network_to_object(network)}
    inline = inline_definition(json.loads(json.dumps(config)))
    assert inline is not None
    assert parse_network(inline) == network


@settings(deadline=None)
@given(networks(st.none()))
def test_printed_xml_parses_back_to_itself(network: Network) -> None:
    """Every network without an ipam can be printed as XML, and read again from it."""
    assert parse_network(object_from_xml(network_to_xml(network))) == network


def test_ipam_cannot_be_printed_as_xml() -> None:
    """A network whose ipam would be lost in XML is refused with a word on what to do instead."""
    network = Network("vepanet", NicSelector(names=("eth0",)), ipam={"type": "static"})
    with pytest.raises(UnsupportedField, match="write it as YAML or JSON"):
        network_to_xml(network)


def test_seed_is_printed_as_people_write_it() -> None:
    """Printing leaves out what is at its default and keeps the documentation's form."""
    assert network_to_object(VEPANET) == {
        "name": "vepanet",
        "extbridge": {"mode": "vepa", "dev": "eth0"},
    }
    assert network_to_xml(VEPANET) == (
        "<network>\n  <name>vepanet</name>\n  <extbridge mode='vepa' dev='eth0'/>\n</network>\n"
    )
    assert network_to_yaml(VEPANET) == "name: vepanet\nextbridge:\n  mode: vepa\n  dev: eth0\n"


@settings(deadline=None)
@given(st.sampled_from(sorted(READERS)), st.binary() | st.text().map(str.encode))
@example(".yaml", b'"\\Uffffffff"')
@example(".yaml", b"%YAML " + b"9" * 5000 + b".1\n---\n")
@example(".yaml", b"mtu: 0x" + b"f" * 5000)
@example(".yaml", b"mtu: " + b"9" * 5000)
@example(".yaml", b"!" + b"x" * 9000 + b"!y z")
@example(".json", b'{"mtu": ' + b"9" * 5000 + b"}")
@example(".json", b'{"name": "\\ud800"}')
@example(".json", b"[" * 100_000)
@example(".json", b"null")
@example(".xml", b"<?xml version='1.0' encoding='utf-16'?><network/>")
@example(".xml", b"<" + b"n" * 100_000 + b"/>")
@example(".xml", b"<network><name>\xff</name></network>")
def test_no_bytes_break_a_reader(suffix: str, data: bytes) -> None:
    """Any file is a network or a short CNI error, whatever is in it."""
    assert len(refusal(lambda: read_definition(data, suffix))) < LONGEST_MESSAGE


STRUCTURE = ["{", "}", "[", "]", ":", ",", "\n", " ", '"', "'", "&a", "*a", "!!str", "- ", "|", "#"]
MARKUP = ["<network>", "</network>", "<extbridge", "/>", ">", "<", "&lt;", "&x;", "<!--", "-->"]
WORDS = ["name", "vepanet", "extbridge", "mode", "dev", "eth0", "mtu", "9000", "=", "<![CDATA["]


@settings(deadline=None)
@given(
    st.sampled_from([object_from_json, object_from_yaml, object_from_xml]),
    st.lists(st.sampled_from(STRUCTURE + MARKUP + WORDS) | st.characters()).map("".join),
)
def test_no_text_breaks_a_reader(read: Callable[[str], JsonObject], text: str) -> None:
    """Text that is nearly right is a network or a short CNI error, too."""
    assert len(refusal(lambda: read(text))) < LONGEST_MESSAGE


LAUGHS = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 12))
ALIASES = "".join(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]\n" for n in range(1, 12))


@pytest.mark.parametrize(
    ("read", "text", "reason"),
    [
        (
            object_from_xml,
            f"<!DOCTYPE n [<!ENTITY l0 'lol'>{LAUGHS}]><network><name>&l11;</name></network>",
            "a DOCTYPE",
        ),
        (
            object_from_xml,
            '<!DOCTYPE n [<!ENTITY f SYSTEM "file:///etc/passwd">]><network>&f;</network>',
            "a DOCTYPE",
        ),
        (object_from_xml, '<!DOCTYPE n SYSTEM "http://192.0.2.1/n.dtd"><network/>', "a DOCTYPE"),
        (object_from_xml, "<a>" * 80_000, "nest too deeply"),
        (object_from_yaml, f"l0: &l0 lol\n{ALIASES}", "an anchor"),
        (object_from_yaml, "a: &a [*a]", "an anchor"),
        (object_from_yaml, "name: *vepanet", "an alias"),
        (object_from_yaml, "name: !!python/object/apply:os.system [id]", "a tag"),
        (object_from_yaml, "!!python/name:os.system : x", "a tag"),
        (object_from_yaml, "name: !!str vepanet", "a tag"),
        (object_from_yaml, "name: ! vepanet", "a tag"),
        (object_from_yaml, "[" * 200_000, "nest too deeply"),
        (object_from_yaml, "- " * 100_000, "nest too deeply"),
        (object_from_yaml, "{a: " * 60_000, "nest too deeply"),
        (object_from_yaml, "? " * 100_000, "a key that is a list or an object"),
        (object_from_json, "[" * 200_000, "nest too deeply"),
        (object_from_json, '{"a":' * 50_000, "nest too deeply"),
    ],
)
def test_bomb_is_refused_at_once(read: Callable[[str], object], text: str, reason: str) -> None:
    """A small file cannot make extbridge slow or large, open other files or run code."""
    tracemalloc.start()
    started = time.thread_time()
    try:
        with pytest.raises(InvalidNetworkConfig, match=reason):
            read(text)
        assert time.thread_time() - started < 2
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()


def test_file_is_bounded() -> None:
    """A file that is larger than any network is refused before it is parsed."""
    data = b"#" * (MAX_FILE_BYTES + 1)
    with pytest.raises(InvalidNetworkConfig, match="allowed: 256 KiB"):
        read_definition(data, ".yaml")


@pytest.mark.parametrize(
    ("read", "text", "place"),
    [
        (object_from_json, '{"name": "a",\n "name": "b"}', "a key is twice"),
        (object_from_json, '{"name": "a",\n "mtu": 09}', "line 2, column 10: "),
        (object_from_json, '{"mtu": NaN}', "NaN is not JSON"),
        (object_from_json, "", "line 1, column 1: "),
        (object_from_json, '["vepanet"]', "the definition is a list"),
        (object_from_yaml, "name: a\nname: b\n", "line 2, column 1: a key is twice"),
        (object_from_yaml, "name: a\nextbridge: {dev: &x eth0}\n", "line 2, column 18: an anchor"),
        (object_from_yaml, "name: [a\n", "line 2, column 1: "),
        (object_from_yaml, "name: a\nmtu: \x07\n", "line 2, column 6: "),
        (object_from_yaml, "name: a\n---\nname: b\n", "line 2, column 1: a second document"),
        (object_from_yaml, "[a]: b", "line 1, column 1: a key that is a list"),
        (object_from_yaml, "name: a\nmtu: " + "9" * 5000, "line 2, column 6: a number too long"),
        (object_from_yaml, "", "the definition is null"),
        (object_from_yaml, "vepanet", "the definition is the string"),
        (object_from_xml, "<network>\n  <name></network>", "line 2, column 11: "),
        (object_from_xml, "<network>&eth0;</network>", "line 1, column 10: "),
        (object_from_xml, "", "line 1, column 1: "),
        (object_from_xml, "\ud800", "text that is not Unicode"),
        (object_from_xml, "<domain/>", 'the document\'s element is the string "domain"'),
    ],
)
def test_malformed_text_is_refused_with_its_place(
    read: Callable[[str], object], text: str, place: str
) -> None:
    """Who mistyped is told line and column, or which key, and what was expected."""
    with pytest.raises(InvalidNetworkConfig) as caught:
        read(text)
    assert caught.value.message.startswith(place)


def test_yaml_means_what_it_says() -> None:
    """YAML 1.1's traps do not work here: off is a word, and a MAC is not a number to base 60."""
    text = """\
# A comment.
name: vepanet
uuid: 4ebd5168-6321-4757-8397-f6e83484f402
extbridge: {mode: vepa, dev: no}
antispoof: off
mac: 52:54:00:12:34:56
mtu: 09000
trust: true
queues: 0o17
macPrefix: ~
"""
    assert object_from_yaml(text) == {
        "name": "vepanet",
        "uuid": "4ebd5168-6321-4757-8397-f6e83484f402",
        "extbridge": {"mode": "vepa", "dev": "no"},
        "antispoof": "off",
        "mac": "52:54:00:12:34:56",
        "mtu": 9000,
        "trust": True,
        "queues": 15,
        "macPrefix": None,
    }


def test_quoted_yaml_is_always_a_string() -> None:
    """Quotes make a string of what would be a number, a truth value or nothing."""
    assert object_from_yaml("a: '1'\nb: \"true\"\nc: ''\nd: |\n  2\n") == {
        "a": "1",
        "b": "true",
        "c": "",
        "d": "2\n",
    }


@pytest.mark.parametrize(
    "body",
    [
        "<name>vepanet</name><extbridge mode='vepa' dev='eth0'/>",
        "<name> vepanet </name><extbridge dev='eth0'/>",
        "<!-- a --><extbridge dev='eth0'/><name>vepanet</name><bridge name='br0'/><forward/>",
        "<name>vepanet</name><extbridge dev='eth0'/><mtu size='1'/><mac address='2'/><b:c/>",
        "<name>vepanet</name><extbridge dev='eth0'/><ip address='192.0.2.1'><dhcp/></ip>",
        "<name>vepanet</name><forward mode='vepa' dev='eth0'/>",
        "<name>vepanet</name><forward mode='vepa'><interface dev='eth0'/></forward><dns/>",
        "<name>vepanet</name><forward dev='eth0' mode='vepa'><interface dev='eth0'/></forward>",
    ],
)
def test_both_xml_spellings_are_read(body: str) -> None:
    """The first patch's `<extbridge>` and libvirt's `<forward>` both say the seed's network."""
    text = f"<?xml version='1.0'?><network connections='1'>{body}</network>"
    assert parse_network(object_from_xml(text)) == VEPANET


def test_xml_says_all_that_an_object_can() -> None:
    """The attributes and children of `<extbridge>` are the keys of the other spellings."""
    text = """\
<network>
  <name>blue</name>
  <uuid>4EBD5168-6321-4757-8397-f6e83484f402</uuid>
  <extbridge mode='passthrough' mtu='9000' queues='4' macPrefix='02:0a' antispoof='off' trust='yes'>
    <interface dev='eth0'/>
    <interface dev='eth1'/>
    <bandwidth egressRate='8000' egressBurst='800'/>
  </extbridge>
</network>
"""
    assert parse_network(object_from_xml(text)) == Network(
        "blue",
        NicSelector(names=("eth0", "eth1")),
        mode=Mode.PASSTHRU,
        uuid="4ebd5168-6321-4757-8397-f6e83484f402",
        mtu=9000,
        queues=4,
        mac_prefix="02:0a",
        antispoof=Antispoof.OFF,
        trust=True,
        bandwidth=Bandwidth(egress_rate=8000, egress_burst=800),
    )


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("", "<network> has neither <extbridge> nor <forward>"),
        ("<extbridge/>", "extbridge.dev is missing"),
        ("<extbridge device='eth0'/>", "extbridge.device is not a known key"),
        ("<extbridge dev='eth0' mtu='big'/>", "mtu is the string"),
        ("<extbridge dev='eth0' mtu='-1'/>", "mtu is the string"),
        ("<extbridge dev='eth0' trust='1'/>", "trust is the string"),
        ("<extbridge dev='eth0' mode='nat'/>", "extbridge.mode is the string"),
        ("<extbridge dev='eth0'><vlan/></extbridge>", "extbridge.vlan is not a known key"),
        ("<extbridge dev='eth0'/><extbridge dev='eth1'/>", "<network> has 2 <extbridge>"),
        ("<name>b</name><extbridge dev='eth0'/>", "<network> has 2 <name>"),
        ("<extbridge dev='eth0'><select match='e*'/></extbridge>", "<extbridge> both names"),
        ("<extbridge><select name='e*'/></extbridge>", "extbridge.dev.name is not a known key"),
        ("<extbridge dev='a'><interface dev='b'/></extbridge>", "<extbridge> has the dev"),
        ("<extbridge><interface/></extbridge>", "an <interface> is without dev"),
        ("<forward/>", "<forward mode='nat'> is no macvtap"),
        ("<forward mode='nat'/>", "<forward mode='nat'> is no macvtap"),
        ("<forward mode='route' dev='eth0'/>", "<forward mode='route'> is no macvtap"),
        ("<forward mode='open'/>", "<forward mode='open'> is no macvtap"),
        ("<forward mode='hostdev'><pf dev='eth0'/></forward>", "<forward mode='hostdev'> is no"),
        ("<forward mode='vpea' dev='eth0'/>", "the mode of <forward> is"),
        ("<forward mode='vepa'/>", "extbridge.dev is missing"),
        ("<forward mode='vepa'><interface/></forward>", "an <interface> is without dev"),
        ("<forward mode='passthrough'><pf dev='eth0'/></forward>", "forward.pf is not a known"),
        ("<forward mode='vepa' dev='a'><interface dev='b'/></forward>", "<forward> has the dev"),
        ("<forward mode='bridge'/><bridge name='br0'/>", "<forward mode='bridge'> with <bridge"),
        (
            "<forward mode='bridge' dev='eth0'/><bridge name='br0'/>",
            "<forward mode='bridge'> with <bridge",
        ),
        ("<forward mode='vepa' dev='eth0'/><virtualport/>", "<virtualport> would change"),
        ("<forward mode='vepa' dev='eth0'/><vlan/>", "<vlan> would change"),
        ("<forward mode='vepa' dev='eth0'/><portgroup/><portgroup/>", "<portgroup> would change"),
    ],
)
def test_xml_that_is_no_macvtap_network_is_refused(body: str, message: str) -> None:
    """Libvirt's other networks, and what would be lost of a macvtap's, are refused by name."""
    with pytest.raises(InvalidNetworkConfig) as caught:
        parse_network(object_from_xml(f"<network><name>vepanet</name>{body}</network>"))
    assert caught.value.message.startswith(message)
    assert caught.value.hint
