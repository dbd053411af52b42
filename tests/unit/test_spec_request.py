"""Which requests are taken, and what is said of the others."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest

from extbridge.spec.errors import (
    CniError,
    DecodeFailure,
    IncompatibleVersion,
    InvalidEnvironment,
    InvalidNetworkConfig,
)
from extbridge.spec.request import (
    MAX_STDIN_BYTES,
    Request,
    Verb,
    find_ifname_fault,
    parse_request,
    read_version,
)

ENVIRON = {
    "CNI_CONTAINERID": "c0ffee",
    "CNI_NETNS": "/run/netns/blue",
    "CNI_IFNAME": "net1",
    "CNI_PATH": "/opt/cni/bin::/usr/lib/cni",
    "CNI_ARGS": "IgnoreUnknown=1;K8S_POD_NAME=vm-0;EMPTY=;SUM=1+1=2",
}
CONFIG: dict[str, object] = {"cniVersion": "1.1.0", "name": "vepanet", "type": "extbridge"}
PREV_RESULT = {"cniVersion": "1.1.0", "interfaces": [{"name": "eth0", "sandbox": "/x"}]}
ATTACHMENT_VERBS = [Verb.ADD, Verb.CHECK, Verb.DEL]


def parse(
    verb: str,
    environ: Mapping[str, str] | None = None,
    config: Mapping[str, object] | bytes | None = None,
) -> Request:
    """Parse a request that is right but for what is given here."""
    if not isinstance(config, bytes):
        config = json.dumps({**CONFIG, "prevResult": PREV_RESULT, **(config or {})}).encode()
    return parse_request({**ENVIRON, **(environ or {}), "CNI_COMMAND": verb}, config)


@pytest.mark.parametrize("verb", ATTACHMENT_VERBS)
def test_request_for_an_attachment_carries_everything(verb: Verb) -> None:
    """ADD, CHECK and DEL see environment and configuration as the runtime gave them."""
    assert parse(verb) == Request(
        verb=verb,
        container_id="c0ffee",
        netns="/run/netns/blue",
        ifname="net1",
        args={"IgnoreUnknown": "1", "K8S_POD_NAME": "vm-0", "EMPTY": "", "SUM": "1+1=2"},
        path=("/opt/cni/bin", "/usr/lib/cni"),
        config={**CONFIG, "prevResult": PREV_RESULT},
        cni_version="1.1.0",
        name="vepanet",
        prev_result=PREV_RESULT,
    )


@pytest.mark.parametrize("verb", [Verb.GC, Verb.STATUS])
def test_request_for_a_network_needs_no_attachment(verb: Verb) -> None:
    """GC and STATUS need none of the attachment's variables and do not look at them."""
    odd = {"CNI_CONTAINERID": "../x", "CNI_NETNS": "\n", "CNI_IFNAME": "/", "CNI_ARGS": "no"}
    request = parse(verb, odd)
    assert (request.container_id, request.netns, request.ifname, request.args) == ("", "", "", {})
    assert request.prev_result is None
    assert request.name == "vepanet"


@pytest.mark.parametrize(
    ("verb", "missing"),
    [
        ("ADD", ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"]),
        ("CHECK", ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"]),
        ("DEL", ["CNI_CONTAINERID", "CNI_IFNAME"]),
    ],
)
def test_all_missing_variables_are_named_at_once(verb: str, missing: list[str]) -> None:
    """One error names every variable that the verb needs and did not get."""
    for environ in (
        {"CNI_COMMAND": verb},
        {"CNI_COMMAND": verb, **dict.fromkeys(missing, "")},
    ):
        with pytest.raises(InvalidEnvironment) as caught:
            parse_request(environ, json.dumps(CONFIG).encode())
        assert caught.value.message == f"{', '.join(missing)} missing"


def test_del_needs_no_namespace() -> None:
    """DEL works when the namespace is gone."""
    assert parse("DEL", {"CNI_NETNS": ""}).netns == ""


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("", "run by a container runtime"),
        ("ADDD", "did you mean ADD?"),
        ("add", "did you mean ADD?"),
        ("\udcff", "allowed: ADD, DEL, CHECK, GC, STATUS, VERSION"),
    ],
)
def test_unknown_command_is_refused(command: str, said: str) -> None:
    """A missing or unknown CNI_COMMAND is code 4 and says which there are."""
    with pytest.raises(InvalidEnvironment, match=r"^CNI_COMMAND") as caught:
        parse(command)
    assert said in caught.value.hint


@pytest.mark.parametrize("verb", ATTACHMENT_VERBS)
@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("CNI_CONTAINERID", "../../etc/passwd"),
        ("CNI_CONTAINERID", "-x"),
        ("CNI_CONTAINERID", "a b"),
        ("CNI_CONTAINERID", "a\n"),
        ("CNI_CONTAINERID", "ä"),
        ("CNI_CONTAINERID", "a" * 201),
        ("CNI_NETNS", "/run/netns/a\nb"),
        ("CNI_NETNS", "/run/netns/a\0b"),
        ("CNI_NETNS", "/run/netns/\udcff"),
        ("CNI_IFNAME", "a" * 16),
        ("CNI_IFNAME", "ö" * 8),
        ("CNI_IFNAME", "."),
        ("CNI_IFNAME", ".."),
        ("CNI_IFNAME", "a/b"),
        ("CNI_IFNAME", "a:b"),
        ("CNI_IFNAME", "a b"),
        ("CNI_IFNAME", "a\u00a0b"),
        ("CNI_IFNAME", "a\tb"),
        ("CNI_IFNAME", "a\0b"),
        ("CNI_IFNAME", "net%d"),
        ("CNI_IFNAME", "voilà"),
        ("CNI_IFNAME", "all"),
        ("CNI_IFNAME", "default"),
        ("CNI_IFNAME", "\udcff"),
    ],
    ids=ascii,
)
def test_malformed_variable_is_named(verb: Verb, variable: str, value: str) -> None:
    """A malformed variable is code 4 with its name and what it has to be."""
    with pytest.raises(InvalidEnvironment, match=f"^{variable} is the string") as caught:
        parse(verb, {variable: value})
    assert caught.value.code == 4
    assert caught.value.hint.startswith("it has to ")


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("CNI_CONTAINERID", "a" * 200),
        ("CNI_CONTAINERID", "0_.-Z"),
        ("CNI_IFNAME", "a" * 15),
        ("CNI_IFNAME", "öö.100@x"),
        ("CNI_NETNS", "/proc/1/ns/net"),
        ("CNI_NETNS", "/run/netns/with space"),
    ],
)
def test_unusual_but_valid_variable_is_taken(variable: str, value: str) -> None:
    """What the specification and the kernel allow is not refused."""
    request = parse("ADD", {variable: value})
    assert value in {request.container_id, request.netns, request.ifname}


def test_kernel_name_rules_are_for_everybody() -> None:
    """A name that a pod's annotation asks for is held to the same rules."""
    assert find_ifname_fault("") is not None
    assert find_ifname_fault("macvtap0") is None


@pytest.mark.parametrize("args", ["K", "K=V;", ";", "=V", "K=V;;L=W"])
def test_malformed_args_are_refused_except_by_del(args: str) -> None:
    """Malformed CNI_ARGS are code 4, but never keep an attachment from being deleted."""
    for verb in (Verb.ADD, Verb.CHECK):
        with pytest.raises(InvalidEnvironment, match=r"^CNI_ARGS holds"):
            parse(verb, {"CNI_ARGS": args})
    assert set(parse("DEL", {"CNI_ARGS": args}).args) <= {"K", "L"}


@pytest.mark.parametrize(
    ("stdin", "said"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"{", "is not JSON"),
        (b"{} {}", "is not JSON"),
        (b"[]", "is a list"),
        (b'"x"', "is the string"),
        (b"null", "is null"),
        (b'{"a": "\xff"}', "is not UTF-8 at byte 7"),
        ("\ufeff{}".encode(), "is not JSON"),
        ('{"name": "x"}'.encode("utf-16"), "is not UTF-8"),
        (b'{"a": NaN}', "holds NaN"),
        (b'{"a": [-Infinity]}', "holds -Infinity"),
        (b'{"a": 1e999}', "too large"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b'{"a": 1, "b": {"c": 1, "c": 1}}', 'twice in one object: the string "c"'),
        (b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}", "too deeply"),
        (b'{"a":' * 40_000 + b"1" + b"}" * 40_000, "too deeply"),
        (b"[" * MAX_STDIN_BYTES, "too deeply"),
        (b'{"a": "' + b"x" * MAX_STDIN_BYTES + b'"}', f"is {MAX_STDIN_BYTES + 9} bytes long"),
        (b'{"cniVersion": 1.0, "name": "x"}', "cniVersion is the number 1.0"),
    ],
    ids=lambda value: ascii(value[:30]),
)
@pytest.mark.parametrize("verb", [Verb.ADD, Verb.DEL, Verb.CHECK, Verb.GC, Verb.STATUS])
def test_stdin_that_is_no_configuration_is_refused(verb: Verb, stdin: bytes, said: str) -> None:
    """Standard input that is not one JSON object of sane size is code 6 with the reason."""
    with pytest.raises(DecodeFailure) as caught:
        parse(verb, config=stdin)
    assert said in caught.value.message
    assert caught.value.code == 6


def test_ordinary_depth_is_taken() -> None:
    """Configurations may nest to a hundred levels."""
    nested = json.loads("[" * 99 + "]" * 99)
    assert parse("ADD", config={"a": nested}).config["a"] == nested


@pytest.mark.parametrize("verb", [Verb.ADD, Verb.DEL, Verb.CHECK, Verb.GC, Verb.STATUS])
@pytest.mark.parametrize("name", [None, "", "a/b", ".x", "a b", "ä", 5, ["x"], "a\0"])
def test_network_needs_a_name(verb: Verb, name: object) -> None:
    """A missing or malformed network name is code 7, for every verb."""
    with pytest.raises(InvalidNetworkConfig, match=r"^name is ") as caught:
        parse(verb, config={"name": name})
    assert caught.value.code == 7


@pytest.mark.parametrize("version", [{}, {"cniVersion": None}, {"cniVersion": ""}])
def test_missing_version_means_the_oldest(version: dict[str, object]) -> None:
    """Without cniVersion a request is one of 0.1.0: DEL is served, ADD refused with code 1."""
    stdin = json.dumps({"name": "vepanet", **version}).encode()
    assert parse("DEL", config=stdin).cni_version == "0.1.0"
    with pytest.raises(IncompatibleVersion):
        parse("ADD", config=stdin)


MALFORMED_PREV_RESULTS: list[object] = [
    [],
    "x",
    {"interfaces": {}},
    {"interfaces": [None]},
    {"interfaces": [{"name": 1}]},
    {"interfaces": [{"mac": 1}]},
    {"interfaces": [{"sandbox": False}]},
    {"interfaces": [{"mtu": "1500"}]},
]


@pytest.mark.parametrize("prev_result", MALFORMED_PREV_RESULTS)
def test_malformed_prev_result_is_refused_except_by_del(prev_result: object) -> None:
    """A malformed prevResult is code 7, but never keeps an attachment from being deleted."""
    for verb in (Verb.ADD, Verb.CHECK):
        with pytest.raises(InvalidNetworkConfig, match=r"^prevResult"):
            parse(verb, config={"prevResult": prev_result})
    assert parse("DEL", config={"prevResult": prev_result}).prev_result is None


@pytest.mark.parametrize("prev_result", [{}, {"interfaces": None}, {"dns": {"x": [1.5]}}])
def test_sparse_prev_result_is_taken(prev_result: dict[str, object]) -> None:
    """A prevResult may leave out everything, and hold what we do not know."""
    for verb in ATTACHMENT_VERBS:
        assert parse(verb, config={"prevResult": prev_result}).prev_result == prev_result


def test_check_needs_a_prev_result() -> None:
    """CHECK without a prevResult is refused: there is nothing to compare with."""
    with pytest.raises(InvalidNetworkConfig, match="prevResult is missing"):
        parse("CHECK", config={"prevResult": None})
    assert parse("ADD", config={"prevResult": None}).prev_result is None


@pytest.mark.parametrize(
    ("stdin", "cni_version"),
    [(b"", "1.1.0"), (b"\xff", "1.1.0"), (b"{}", "0.1.0"), (b'{"cniVersion": "0.2.0"}', "0.2.0")],
)
def test_version_is_asked_with_almost_nothing(stdin: bytes, cni_version: str) -> None:
    """VERSION needs neither variables nor a configuration."""
    request = parse_request({"CNI_COMMAND": "VERSION"}, stdin)
    assert (request.verb, request.cni_version) == (Verb.VERSION, cni_version)


def test_version_of_a_wrong_request_can_be_read() -> None:
    """An error can be told in the version of a request that is otherwise wrong."""
    assert read_version(b'{"cniVersion": "0.4.0", "name": 1}') == "0.4.0"
    assert read_version(b'{"cniVersion": 4}') is None


@pytest.mark.parametrize("verb", [Verb.ADD, Verb.DEL, Verb.CHECK, Verb.GC, Verb.STATUS])
def test_version_is_judged_before_what_it_gives_meaning_to(verb: Verb) -> None:
    """A configuration of an unknown version is refused for that, not for its fields."""
    with pytest.raises(CniError) as caught:
        parse(verb, config={"cniVersion": "2.0.0", "name": None, "prevResult": 1})
    assert caught.value.code == 1
