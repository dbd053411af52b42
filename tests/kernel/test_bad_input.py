"""Whatever is wrong: one CNI error with the right code, what to do about it, and nothing left."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType

import pytest

from extbridge.demo.lab import Lab, Nic, run
from tests.kernel.observe import link_names, network_config, picture
from tests.support import Cni

MAC = "52:54:00:12:34:56"
NOBODY = "65534"


@dataclass(frozen=True, slots=True)
class Node:
    """A node with one NIC and one pod, to which wrong requests come."""

    cni: Cni
    nic: Nic
    pod: str

    def refuses(
        self,
        code: int,
        told: str,
        hint: str,
        config: Mapping[str, object] | bytes,
        *,
        verb: str = "ADD",
        cni: Cni | None = None,
        variables: Mapping[str, str | None] = MappingProxyType({}),
    ) -> None:
        """Assert that the request gets this error, and that nothing is as a trace of it."""
        before = picture(self.cni.run_dir, self.pod)
        answer = (cni or self.cni)(verb, config, **{"NETNS": self.pod, **variables})
        error = answer.error
        assert (answer.status, error["code"], answer.stderr) == (1, code, ""), error
        assert set(error) == {"cniVersion", "code", "msg", "details"}
        assert told in str(error["msg"])
        assert hint in str(error["details"])
        assert error["details"]
        assert picture(self.cni.run_dir, self.pod) == before


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """One node for many tests, because none leaves a trace on it."""
    with Lab() as lab:
        yield Node(Cni(tmp_path_factory.mktemp("node") / "run"), lab.nic(), lab.pod("vm"))


# A thousand million times what stands in them, for a reader that does as it is told.
ENTITIES = "".join(f"<!ENTITY {b} '{f'&{a};' * 10}'>" for a, b in pairwise("abcdefghij"))
XML_BOMB = f"<!DOCTYPE network [<!ENTITY a 'ha'>{ENTITIES}]><network><name>&j;</name></network>"
ALIASES = "".join(f"{b}: &{b} [{f'*{a}, ' * 10}]\n" for a, b in pairwise("abcdefghij"))
YAML_BOMB = f"a: &a [ha]\n{ALIASES}"


@pytest.mark.parametrize(
    ("stdin", "code", "told", "hint"),
    [
        (b"", 6, "standard input is empty", ""),
        (b"{", 6, "standard input is not JSON: Expecting", "one object"),
        (b'{"name": "vepanet"} {}', 6, "standard input is not JSON: Extra data", ""),
        (b"[]", 6, "standard input is a list", "one object"),
        (b'{"name": "\xff"}', 6, "not UTF-8 at byte 10", ""),
        (b'{"name": "a", "name": "b"}', 6, 'twice in one object: the string "name"', "keep one"),
        (b'{"mtu": NaN}', 6, "it holds NaN", ""),
        (b'{"mtu": 1e999}', 6, "number too large", "64 bits"),
        (b'{"mtu": ' + b"9" * 5000 + b"}", 6, "standard input is not JSON", ""),
        (b'{"a":' * 101 + b"1" + b"}" * 101, 6, "nests objects and lists too deeply", "100 levels"),
        (b"[" * 500_000, 6, "nests objects and lists too deeply", "100 levels"),
        (b" " * (1 << 20) + b"{}", 6, "bytes long", "1048576"),
        (b'{"cniVersion": 1.1}', 6, "cniVersion is the number 1.1", "a string"),
        (b'{"cniVersion": "2.0.0"}', 1, 'cniVersion is the string "2.0.0"', "1.1.0"),
    ],
    ids=lambda value: ascii(value[:20]) if isinstance(value, bytes) else None,
)
@pytest.mark.parametrize("verb", ["ADD", "DEL"])
def test_standard_input_that_is_no_configuration(
    shared: Node, *, verb: str, stdin: bytes, code: int, told: str, hint: str
) -> None:
    """What is not JSON, or not only JSON, is refused, in whatever way a reader could trip over."""
    shared.refuses(code, told, hint, stdin, verb=verb)


@pytest.mark.parametrize(
    ("keys", "told", "hint"),
    [
        ({"name": None}, "name is missing", "needs a name"),
        ({"name": 5}, "name is the number 5", "a string"),
        ({"name": "a/b"}, 'name is the string "a/b"', "letters, digits"),
        ({"name": "../vepanet"}, 'name is the string "../vepanet"', "letter or digit"),
        ({"name": "vepanet\n"}, "name is the string", "letters, digits"),
        ({"mtuu": 1500}, "mtuu is not a known key", "did you mean mtu?"),
        ({"Queues": 2}, "Queues is not a known key", "did you mean queues?"),
        ({"extbridge": None}, "neither extbridge nor network", '"extbridge": {"dev": "eth0"}'),
        ({"extbridge": "eth0"}, 'extbridge is the string "eth0"', "an object"),
        ({"extbridge": {}}, "neither extbridge nor network", '"network": "NAME"'),
        ({"extbridge": {"mode": "vepa"}}, "extbridge.dev is missing", "name the NIC"),
        ({"extbridge": {"mod": "vepa"}}, "extbridge.mod is not a known key", "did you mean mode?"),
        (
            {"extbridge": {"mode": "vepaa", "dev": "eth0"}},
            'extbridge.mode is the string "vepaa"',
            "did you mean vepa? allowed: vepa, bridge, private, passthru",
        ),
        ({"extbridge": {"mode": 2, "dev": "eth0"}}, "extbridge.mode is the number 2", "a string"),
        ({"extbridge": {"dev": 7}}, "extbridge.dev is the number 7", "a name, a list of names"),
        ({"extbridge": {"dev": "a/b"}}, 'extbridge.dev is the string "a/b"', "without /"),
        ({"extbridge": {"dev": "sixteen-bytes-xx"}}, "extbridge.dev is the string", "is 16"),
        ({"mtu": "1500"}, 'mtu is the string "1500"', "a whole number"),
        ({"mtu": 1500.0}, "mtu is the number 1500.0", "a whole number"),
        ({"mtu": 67}, "mtu is the number 67", "allowed: 68 to 65535"),
        ({"mtu": 65536}, "mtu is the number 65536", "allowed: 68 to 65535"),
        ({"mtu": 1501}, "mtu: 1501 is more than the 1500 of ", "at most 1500"),
        ({"queues": 0}, "queues is the number 0", "allowed: 1 to 256"),
        ({"queues": 257}, "queues is the number 257", "allowed: 1 to 256"),
        ({"queues": True}, "queues is true", "a whole number"),
        ({"uuid": "4ebd5168"}, 'uuid is the string "4ebd5168"', "RFC 4122"),
        ({"macPrefix": "53:54:00"}, "macPrefix is the string", "even first octet"),
        ({"trust": "yes"}, 'trust is the string "yes"', "true or false"),
        ({"antispoof": "arp"}, 'antispoof is the string "arp"', "allowed: mac, ip, off"),
        ({"handoff": "fds"}, 'handoff is the string "fds"', "did you mean fd?"),
        ({"bandwidth": {"ingressRate": 1}}, "without bandwidth.ingressBurst", "give both"),
        ({"ipam": {"type": "../x"}}, "ipam.type is the string", "without a folder"),
        ({"capabilities": []}, "capabilities is a list", "an object"),
        ({"runtimeConfig": "x"}, 'runtimeConfig is the string "x"', "an object"),
        ({"args": {"cni": []}}, "args.cni is a list", "an object"),
        ({"prevResult": []}, "prevResult is a list", "an object"),
        ({"prevResult": {"interfaces": {}}}, "prevResult.interfaces is an object", "a list"),
        (
            {"prevResult": {"interfaces": [{"name": 1}]}},
            "prevResult.interfaces[0].name is the number 1",
            "a string",
        ),
        (
            {"network": "blue"},
            "names the network 'blue' and gives keys of one besides: extbridge",
            "either",
        ),
        ({"trust": True, "antispoof": "mac"}, "trust: true lets the guest have any", "one of them"),
        ({"antispoof": "ip"}, "nothing says which IP addresses", "an ipam, or the pod its ips"),
        ({"extbridge": {"dev": ["a", "b"]}}, "no NIC with the names a, b", "it has "),
        ({"extbridge": {"dev": {"match": "no*"}}}, "no NIC with match no*", "it has "),
        (
            {"extbridge": {"dev": {"mac": "02:00:00:00:00:01", "driver": "veth"}}},
            "no NIC with driver veth and mac 02:00:00:00:00:01",
            "it has ",
        ),
        ({"ipam": {"type": "extbridge"}}, "ipam.type is extbridge, which gives no", "host-local"),
        ({"ipam": {"type": "nowhere"}}, "there is no IPAM plugin nowhere in /opt", "install it"),
        ({"runtimeConfig": {"ips": ["192.0.2.1/33"]}}, "runtimeConfig.ips[0] is the str", "192.0"),
        ({"runtimeConfig": {"deviceID": "7"}}, 'deviceID is the string "7"', "from 1610612736"),
        (
            {"runtimeConfig": {"bandwidth": {"IngressRate": -1}}},
            "runtimeConfig.bandwidth.ingressRate is the number -1",
            "allowed: 0 to",
        ),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else None,
)
def test_configuration_that_is_wrong(
    shared: Node, keys: dict[str, object], told: str, hint: str
) -> None:
    """The wrong key is named with what was given, what is allowed, and the nearest spelling."""
    shared.refuses(7, told, hint, network_config(shared.nic, **keys))


@pytest.mark.parametrize(
    ("mac", "told", "hint"),
    [
        ("01:00:5e:00:00:01", "a group address", "even first octet"),
        ("ff:ff:ff:ff:ff:ff", "a group address", "even first octet"),
        ("00:00:00:00:00:00", "which is all zeros", "some NIC's"),
        ("52:54:00:12:34", "which is not a MAC address", "six octets"),
        ("52:54:00:12:34:56:78:9a", "which is not a MAC address", "six octets"),
        ("52:54:00:12-34-56", "which is not a MAC address", "six octets"),
        ("525400123456", "which is not a MAC address", "six octets"),
        ("52:54:00:12:34:5g", "which is not a MAC address", "six octets"),
    ],
)
def test_mac_that_no_nic_can_have(shared: Node, mac: str, told: str, hint: str) -> None:
    """Wherever a MAC comes from, one that is none is refused with the name of its source."""
    capability = "io.kubernetes.cri.pod-annotations"
    asked = json.dumps({"name": "vepanet", "mac": mac})
    sources: dict[str, dict[str, object]] = {
        "mac": {"mac": mac},
        "runtimeConfig.mac": {"runtimeConfig": {"mac": mac}},
        "args.cni.mac": {"args": {"cni": {"mac": mac}}},
        "extbridge.io/networks[0].mac": {
            "capabilities": {capability: True},
            "runtimeConfig": {capability: {"extbridge.io/networks": asked}},
        },
    }
    for source, keys in sources.items():
        message = f'{source} is the string "{mac}", {told}'
        shared.refuses(7, message, hint, network_config(shared.nic, **keys))
    config = network_config(shared.nic)
    shared.refuses(
        4, "MAC of CNI_ARGS is the string", hint, config, variables={"ARGS": f"MAC={mac}"}
    )


@pytest.mark.parametrize(
    ("variables", "told", "hint"),
    [
        ({"COMMAND": None}, "CNI_COMMAND is missing", "not by hand"),
        ({"COMMAND": "add"}, 'CNI_COMMAND is the string "add"', "did you mean ADD?"),
        ({"CONTAINERID": None}, "CNI_CONTAINERID missing", "ADD needs CNI_CONTAINERID"),
        ({"CONTAINERID": ""}, "CNI_CONTAINERID missing", "ADD needs CNI_CONTAINERID"),
        ({"CONTAINERID": "../../etc"}, 'CNI_CONTAINERID is the string "../../etc"', "letter or"),
        ({"CONTAINERID": "a/b"}, 'CNI_CONTAINERID is the string "a/b"', "letters, digits"),
        ({"CONTAINERID": "a\n"}, "CNI_CONTAINERID is the string", "letters, digits"),
        ({"CONTAINERID": "é"}, "CNI_CONTAINERID is the string", "letter or digit"),
        ({"CONTAINERID": "a" * 201}, "CNI_CONTAINERID is the string", "at most 200 bytes"),
        ({"IFNAME": None}, "CNI_IFNAME missing", "ADD needs"),
        ({"IFNAME": "sixteen-bytes-xx"}, "CNI_IFNAME is the string", "at most 15 bytes"),
        ({"IFNAME": "eight-ÜÜÜÜÜ"}, "CNI_IFNAME is the string", "15 bytes long and is 16"),
        ({"IFNAME": "a/b"}, 'CNI_IFNAME is the string "a/b"', "without /"),
        ({"IFNAME": ".."}, 'CNI_IFNAME is the string ".."', "another name"),
        ({"IFNAME": "a b"}, 'CNI_IFNAME is the string "a b"', "white space"),
        ({"IFNAME": "a:b"}, 'CNI_IFNAME is the string "a:b"', "without / :"),
        ({"IFNAME": "net%d"}, 'CNI_IFNAME is the string "net%d"', "%"),
        ({"IFNAME": "all"}, 'CNI_IFNAME is the string "all"', "another name"),
        ({"NETNS": None}, "CNI_NETNS missing", "ADD needs"),
        ({"NETNS": "/run/netns/\n"}, "CNI_NETNS is the string", "path of a network namespace"),
        ({"ARGS": "MAC"}, 'CNI_ARGS holds the string "MAC"', "KEY=VALUE;KEY=VALUE"),
        ({"ARGS": "A=1;;B=2"}, 'CNI_ARGS holds the string ""', "KEY=VALUE"),
    ],
    ids=str,
)
def test_environment_that_is_wrong(
    shared: Node, variables: dict[str, str | None], told: str, hint: str
) -> None:
    """The variable is named, with what it holds and what it has to hold."""
    shared.refuses(4, told, hint, network_config(shared.nic), variables=variables)


@pytest.mark.parametrize("verb", ["DEL", "CHECK"])
@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"CONTAINERID": None, "IFNAME": None}, "CNI_CONTAINERID, CNI_IFNAME missing"),
        ({"CONTAINERID": "../../etc"}, "CNI_CONTAINERID is the string"),
        ({"IFNAME": "a/b"}, "CNI_IFNAME is the string"),
    ],
    ids=str,
)
def test_environment_that_is_wrong_for_other_verbs(
    shared: Node, verb: str, variables: dict[str, str | None], told: str
) -> None:
    """No verb makes a path or a name of what is none."""
    config = network_config(shared.nic, prevResult={"cniVersion": "1.1.0"})
    shared.refuses(4, told, "", config, verb=verb, variables=variables)


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("/run/netns/no-such", "there is no network namespace at PATH"),
        ("FOLDER", "there is no network namespace at PATH"),
        ("FOLDER/file", "there is no network namespace at PATH"),
        ("FOLDER/file/below", "there is no network namespace at PATH"),
        ("FOLDER/fifo", "there is no network namespace at PATH"),
        ("FOLDER/loop", "there is no network namespace at PATH"),
        ("/dev/null", "there is no network namespace at PATH"),
        ("/proc/self/ns/mnt", "there is no network namespace at PATH"),
        ("x" * 5000, "there is no network namespace at PATH"),
        ("/proc/self/ns/net", "PATH is the namespace extbridge itself runs in"),
    ],
    ids=lambda value: value[:20],
)
def test_namespace_that_is_none(shared: Node, tmp_path: Path, path: str, told: str) -> None:
    """What is not another network namespace is refused: nothing waits for it, nothing enters it."""
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "fifo")
    path = path.replace("FOLDER", str(tmp_path))
    config = network_config(shared.nic)
    shared.refuses(4, told.replace("PATH", path), "", config, variables={"NETNS": path})


@pytest.mark.parametrize(
    ("spoil", "dev", "code", "told", "hint"),
    [
        ("", "nope", 7, "the node has no NIC 'nope'", "{nic}"),
        ("", "lo", 7, "lo is the loopback", "an Ethernet NIC"),
        ("link set {nic} down", "{nic}", 11, "{nic} is down", "ip link set {nic} up"),
        ("link set {nic} master xbbr0", "{nic}", 7, "{nic} is a port of bridge xbbr0", "Ethernet"),
        (
            "link add link {nic} name xbtap0 type macvtap",
            "xbtap0",
            7,
            "xbtap0 is itself a macvtap; name the NIC below it",
            "Ethernet",
        ),
        (
            "link add link {nic} name xbvlan0 type macvlan",
            "xbvlan0",
            7,
            "xbvlan0 is itself a macvlan; name the NIC below it",
            "Ethernet",
        ),
        ("tuntap add xbtun0 mode tun", "xbtun0", 7, "xbtun0 is not an Ethernet NIC", "Ethernet"),
    ],
)
def test_nic_that_cannot_carry_a_network(
    cni: Cni, lab: Lab, *, spoil: str, dev: str, code: int, told: str, hint: str
) -> None:
    """What the kernel would refuse without a reason is refused with one."""
    nic, pod = lab.nic(), lab.pod("vm")
    run("ip", "link", "add", "xbbr0", "type", "bridge")
    try:
        if spoil:
            run("ip", *spoil.format(nic=nic.name).split())
        node = Node(cni, nic, pod)
        config = network_config(nic, extbridge={"dev": dev.format(nic=nic.name)})
        node.refuses(code, told.format(nic=nic.name), hint.format(nic=nic.name), config)
    finally:
        for name in link_names() & {"xbbr0", "xbtap0", "xbvlan0", "xbtun0"}:
            run("ip", "link", "delete", name)


@pytest.mark.parametrize(
    ("file", "content", "code", "told", "hint"),
    [
        ("red.json", "{}", 7, "network blue is not defined in ", "allowed: red"),
        ("blue.json", "{", 7, "/blue.json: line 1, column 2: ", "it has to be JSON"),
        ("blue.json", '{"mtu": 1, "mtu": 2}', 7, "/blue.json: a key is twice", "keep one"),
        ("blue.json", "[]", 7, "the definition is a list", "an object"),
        (
            "blue.json",
            '{"name": "red", "extbridge": {"dev": "a"}}',
            7,
            'name is the string "red"',
            "blue",
        ),
        ("blue.json", "\xff", 7, "/blue.json: byte 0 is not UTF-8", "UTF-8"),
        ("blue.json", " " * (256 * 1024) + "{}", 7, "too many", "256 KiB"),
        ("blue.json", '{"extbridge": {"dev": "a"}, "mtu": 9', 7, "line 1, column 37", "JSON"),
        ("blue.yaml", "extbridge: {dev: [}", 7, "/blue.yaml: line 1, column 19: ", "YAML"),
        ("blue.yaml", "- a", 7, "the definition is a list", "an object"),
        ("blue.yaml", YAML_BOMB, 7, "line 1, column 4: an anchor", "leave it out"),
        ("blue.yaml", "a: *b", 7, "an alias", "write the value out"),
        ("blue.yaml", "!!python/object/apply:os.system [id]", 7, "line 1, column 1: a tag", ""),
        ("blue.yaml", "a: 1\na: 2", 7, "line 2, column 1: a key is twice", "keep one"),
        ("blue.yaml", "a: 1\n---\na: 2", 7, "a second document", "one network"),
        ("blue.yaml", "[" * 500, 7, "nest too deeply", "20 levels"),
        ("blue.yaml", "extbridge: {dev: a, mode: veepa}", 7, "extbridge.mode", "vepa?"),
        ("blue.yaml", "{extbridge: {dev: a}, mtuu: 1}", 7, "/blue.yaml: mtuu is not", "mtu?"),
        ("blue.xml", "<network>", 7, "/blue.xml: line 1, column 10: ", "XML"),
        ("blue.xml", XML_BOMB, 7, "line 1: a DOCTYPE", "leave it out"),
        (
            "blue.xml",
            "<!DOCTYPE x SYSTEM 'file:///etc/passwd'><network/>",
            7,
            "line 1: a DOCTYPE",
            "leave it out",
        ),
        ("blue.xml", "<domain/>", 7, 'element is the string "domain"', "<network>"),
        ("blue.xml", "<network/>", 7, "neither <extbridge> nor <forward>", "<extbridge mode="),
        ("blue.xml", "<network><forward mode='nat'/></network>", 7, "no macvtap", "allowed: vepa"),
        ("blue.xml", "<network><extbridge device='a'/></network>", 7, "extbridge.device", "dev"),
        ("blue.xml", "<a>" * 500, 7, "nest too deeply", "20 levels"),
        (
            "blue.xml",
            "<network><forward mode='vepa' dev='a'/><vlan/></network>",
            7,
            "<vlan> would change the macvtap",
            "leave it out",
        ),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else None,
)
def test_definition_file_that_is_wrong(
    shared: Node, tmp_path: Path, *, file: str, content: str, code: int, told: str, hint: str
) -> None:
    """The file is named, the place in it, and what is wrong there; none costs time or memory."""
    (tmp_path / file).write_text(content, encoding="latin-1")
    shared.refuses(code, told, hint, _blue(tmp_path))


def test_definition_that_is_no_file_or_two(shared: Node, tmp_path: Path) -> None:
    """A definition is one regular file, in a folder that there is, under the network's own name."""
    config = _blue(tmp_path)
    hint = f"write {tmp_path}/blue.yaml"
    shared.refuses(7, "network blue is not defined in ", hint, config)
    shared.refuses(
        7, "there is no folder /no/such", "write /no/such", {**config, "networksDir": "/no/such"}
    )
    shared.refuses(7, "networksDir is the string", "a path from /", {**config, "networksDir": "x"})
    shared.refuses(7, "network is the string", "letter or digit", {**config, "network": "../blue"})
    for path, make in ((tmp_path / "blue.yaml", os.mkfifo), (tmp_path / "blue.xml", os.mkdir)):
        make(path)
        shared.refuses(5, f"{path} ", "", config)
        path.rmdir() if path.is_dir() else path.unlink()
    (tmp_path / "blue.yaml").write_text("{}")
    (tmp_path / "blue.json").write_text("{}")
    shared.refuses(7, "network blue is defined more than once: ", "keep one", config)


def test_default_folder_is_named(shared: Node) -> None:
    """Without networksDir, definitions are looked for where README says."""
    config = {"cniVersion": "1.1.0", "name": "cluster", "type": "extbridge", "network": "no-such"}
    shared.refuses(7, "/etc/cni/extbridge.d", "/etc/cni/extbridge.d/no-such.yaml", config)


def test_interface_name_that_the_pod_has_already(shared: Node) -> None:
    """An interface of the pod is never replaced."""
    config = network_config(shared.nic)
    shared.refuses(
        103, "an interface named lo already", "another name", config, variables={"IFNAME": "lo"}
    )


def test_caller_without_root(shared: Node, tmp_path: Path) -> None:
    """An unprivileged caller is told that root is needed, not what failed for want of it."""
    # It may read everything, so that where interpreter and package are does not matter.
    wrapper = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups",
               "--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search",
               "--bounding-set=-all,+dac_read_search")  # fmt: skip
    config = network_config(shared.nic)
    nobody = replace(shared.cni, wrapper=wrapper)
    shared.refuses(101, "denied", "as root", config, cni=nobody)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    os.chown(run_dir, int(NOBODY), int(NOBODY))
    tmp_path.chmod(0o755)
    shared.refuses(101, "ermitted", "as root", config, cni=replace(nobody, run_dir=run_dir))
    assert list(run_dir.glob("ledger/*")) == []


def test_run_folder_that_is_read_only(shared: Node, tmp_path: Path) -> None:
    """ADD is refused where its traces could not be kept; DEL of nothing has nothing to write."""
    config = network_config(shared.nic)
    with _mounted(tmp_path, "ro") as run_dir:
        cni = replace(shared.cni, run_dir=run_dir)
        shared.refuses(5, f"{run_dir}/ledger", "writable", config, cni=cni)
        assert cni("DEL", config, NETNS=shared.pod).status == 0


def test_run_folder_that_became_read_only(cni: Cni, nic: Nic, pod: str, tmp_path: Path) -> None:
    """DEL takes away what the kernel has, says that its record stays, and can be tried again."""
    config = network_config(nic)
    with _mounted(tmp_path, "rw") as run_dir:
        cni = replace(cni, run_dir=run_dir)
        assert cni("ADD", config, NETNS=pod).status == 0
        run("mount", "-o", "remount,ro", str(run_dir))
        error = cni("DEL", config, NETNS=pod).error
        assert (error["code"], link_names(pod)) == (5, {"lo"})
        assert "could not forget net1 of container-1" in str(error["msg"])
        run("mount", "-o", "remount,rw", str(run_dir))
        assert cni("DEL", config, NETNS=pod).status == 0
        assert list(run_dir.glob("ledger/*")) == []


def test_run_folder_that_is_full(shared: Node, tmp_path: Path) -> None:
    """Where an ADD cannot be recorded nothing is left of it, and the folder is named."""
    # A file takes a page.
    with _mounted(tmp_path, "size=4096") as run_dir:
        (run_dir / "filler").write_bytes(bytes(4096))
        cni = replace(shared.cni, run_dir=run_dir)
        shared.refuses(
            5,
            "could not record net1 of container-1",
            "room",
            network_config(shared.nic),
            cni=cni,
        )
        assert [str(path.relative_to(run_dir)) for path in sorted(run_dir.rglob("*"))] == [
            "filler",
            "ledger",
        ]


def _blue(folder: Path) -> dict[str, object]:
    return {
        "cniVersion": "1.1.0",
        "name": "cluster",
        "type": "extbridge",
        "network": "blue",
        "networksDir": str(folder),
    }


@contextmanager
def _mounted(folder: Path, options: str) -> Iterator[Path]:
    """A file system of memory, which can be full or read-only for root too."""
    run_dir = folder / "run"
    run_dir.mkdir()
    run("mount", "-t", "tmpfs", "-o", options, "extbridge-run", str(run_dir))
    try:
        yield run_dir
    finally:
        run("umount", str(run_dir))
