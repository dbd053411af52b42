"""Addresses come from IPAM plugins: real ones, and some that misbehave, each a process of its own.

The real ones are Debian's host-local and static, which know CNI up to 1.0.0.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import pytest

from extbridge.ipam import (
    MAX_STDOUT_BYTES,
    Delegation,
    delegated_config,
    ipam_add,
    ipam_check,
    ipam_del,
    ipam_gc,
    ipam_status,
)
from extbridge.network.addresses import Address, Addressing, Route
from extbridge.spec import versions
from extbridge.spec.errors import (
    CniError,
    InvalidNetworkConfig,
    IpamFailure,
    LimitedConnectivity,
    PluginNotAvailable,
    TryAgainLater,
)
from tests.support import missing, require

DEBIAN: Final = Path("/usr/lib/cni")

ADDRESSING: Final = Addressing((Address("10.1.2.3/24"),))
RESULT: Final = '{"ips": [{"address": "10.1.2.3/24"}]}'

SHORT: Final = 0.3
"""Seconds that a plugin gets which is to be found wanting."""

BEFORE_IT_HANGS: Final = 3.0
"""Seconds in which a plugin has to get as far as it will, on a loaded machine too."""

# The plugin's standard input and environment are kept by verb, and each verb in one line of `log`.
RECORDING: Final = """\
#!/bin/sh
echo "$CNI_COMMAND" >>{folder}/log
cat >{folder}/stdin.$CNI_COMMAND
tr '\\0' '\\n' </proc/$$/environ >{folder}/environ.$CNI_COMMAND
case $CNI_COMMAND in
"""


@dataclass(frozen=True, slots=True)
class Plugin:
    """An IPAM plugin of the test's own: a folder for CNI_PATH with the script `ours` in it."""

    folder: Path

    def write(self, script: str) -> None:
        """Replace the script, as an upgrade would."""
        self.folder.mkdir(exist_ok=True)
        draft = self.folder / "draft"
        draft.write_text(script)
        draft.chmod(0o755)
        draft.rename(self.folder / "ours")

    def answer(self, supported: tuple[str, ...] = ("1.1.0",), **scripts: str) -> None:
        """Be a plugin that records its calls, and runs the verb's script."""
        told = json.dumps({"cniVersion": "1.1.0", "supportedVersions": supported})
        scripts = {"VERSION": f"echo {shlex.quote(told)}", **scripts}
        cases = "".join(f"{verb}) {script} ;;\n" for verb, script in scripts.items())
        self.write(RECORDING.format(folder=shlex.quote(str(self.folder))) + cases + "esac\n")

    @property
    def calls(self) -> list[str]:
        """The verbs that it was called with."""
        log = self.folder / "log"
        return log.read_text().split() if log.exists() else []

    def stdin(self, verb: str) -> dict[str, Any]:
        """The configuration that it was given."""
        config = json.loads((self.folder / f"stdin.{verb}").read_bytes())
        assert isinstance(config, dict)
        return config

    def environ(self, verb: str) -> dict[str, str]:
        """The environment that it was started with."""
        lines = (self.folder / f"environ.{verb}").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines)

    def delegation(self, cni_version: str = "1.1.0", **config: object) -> Delegation:
        """A call of this plugin."""
        return delegation(
            {"type": "ours"}, str(self.folder), config={"cniVersion": cni_version, **config}
        )


@pytest.fixture
def plugin(tmp_path: Path) -> Plugin:
    """A plugin whose script is still to be written."""
    return Plugin(tmp_path / "bin")


@pytest.fixture
def host_local(tmp_path: Path) -> Delegation:
    """A call of Debian's host-local: two addresses, of which the network has three each."""
    resolv_conf = tmp_path / "resolv.conf"
    resolv_conf.write_text("nameserver 10.1.2.53\nsearch example.org\n")
    return real(
        {
            "type": "host-local",
            "dataDir": str(tmp_path / "leases"),
            "resolvConf": str(resolv_conf),
            "ranges": [
                [{"subnet": "10.1.2.0/24", "rangeStart": "10.1.2.10", "rangeEnd": "10.1.2.12"}],
                [{"subnet": "fd00::/64", "rangeStart": "fd00::a", "rangeEnd": "fd00::c"}],
            ],
            "routes": [{"dst": "0.0.0.0/0"}, {"dst": "fd01::/16", "gw": "fd00::fe"}],
        }
    )


def delegation(
    ipam: Mapping[str, object],
    *path: str,
    ips: tuple[str, ...] = (),
    config: Mapping[str, object] | None = None,
) -> Delegation:
    """One attachment's call of the plugin in `ipam`."""
    asked = {"cniVersion": "1.1.0", "name": "vepanet", "type": "extbridge", **(config or {})}
    return Delegation(
        config=delegated_config(asked, name="vepanet", ipam=ipam, ips=ips),
        path=path,
        container_id="container-1",
        ifname="net1",
        netns="/run/netns/vm",
    )


def real(
    ipam: Mapping[str, object],
    ips: tuple[str, ...] = (),
    config: Mapping[str, object] | None = None,
) -> Delegation:
    """A call of one of Debian's plugins."""
    if not (DEBIAN / str(ipam["type"])).exists():
        missing(f"{DEBIAN}/{ipam['type']}")
    return delegation(ipam, str(DEBIAN), ips=ips, config=config)


def with_ipam(delegation: Delegation, **changed: object) -> Delegation:
    """The same with other keys in `ipam`."""
    ipam = delegation.config["ipam"]
    assert isinstance(ipam, dict)
    return replace(delegation, config={**delegation.config, "ipam": {**ipam, **changed}})


def leases(tmp_path: Path) -> set[str]:
    """The addresses that host-local has given away."""
    names = {path.name for path in tmp_path.glob("leases/vepanet/*")}
    return {name for name in names if name != "lock" and not name.startswith("last_reserved_ip")}


def in_version(delegation: Delegation, cni_version: str) -> Delegation:
    return replace(delegation, config={**delegation.config, "cniVersion": cni_version})


@pytest.mark.parametrize("cni_version", versions.SUPPORTED)
def test_host_local_gives_what_a_guest_needs(
    host_local: Delegation, tmp_path: Path, cni_version: str
) -> None:
    """Addresses, gateways, routes and DNS come from host-local, in every version of CNI."""
    given = ipam_add(in_version(host_local, cni_version))
    assert given == Addressing(
        addresses=(
            Address("10.1.2.10/24", "10.1.2.1"),
            Address("fd00::a/64", "fd00::1"),
        ),
        routes=(Route("0.0.0.0/0"), Route("fd01::/16", "fd00::fe")),
        dns={"nameservers": ["10.1.2.53"], "search": ["example.org"]},
    )
    assert leases(tmp_path) == {"10.1.2.10", "fd00::a"}


def test_del_releases_and_may_be_repeated(host_local: Delegation, tmp_path: Path) -> None:
    """After DEL the addresses are free, and deleting again is no error; nor is it without ADD."""
    ipam_del(host_local)
    ipam_add(host_local)
    assert leases(tmp_path)
    for _ in range(2):
        ipam_del(replace(host_local, netns=""))
        assert not leases(tmp_path)


def test_exhausted_range_fails_in_the_plugins_words(host_local: Delegation, tmp_path: Path) -> None:
    """Who comes too late is told so by the plugin, keeps nothing, and takes nothing away."""
    for number in range(3):
        ipam_add(replace(host_local, container_id=f"early-{number}"))
    before = leases(tmp_path)
    assert len(before) == 6
    with pytest.raises(IpamFailure, match="no IP addresses available in range set"):
        ipam_add(host_local)
    assert leases(tmp_path) == before
    ipam_del(replace(host_local, container_id="early-1"))
    assert ipam_add(host_local).addresses[0] == Address("10.1.2.11/24", "10.1.2.1")


def test_two_nics_of_one_container(host_local: Delegation, tmp_path: Path) -> None:
    """Each NIC has addresses of its own, which its DEL releases and the other's does not."""
    ipam_add(host_local)
    ipam_add(replace(host_local, ifname="macvtap0"))
    ipam_del(host_local)
    assert leases(tmp_path) == {"10.1.2.11", "fd00::b"}


def test_attachments_made_at_once_get_different_addresses(host_local: Delegation) -> None:
    """The agent's threads call the same plugin side by side."""
    wide = with_ipam(host_local, ranges=[[{"subnet": "10.1.2.0/24"}]])
    several = [replace(wide, container_id=f"container-{number}") for number in range(24)]
    with ThreadPoolExecutor(8) as pool:
        given = list(pool.map(ipam_add, several))
    assert len({addressing.addresses[0].address for addressing in given}) == len(several)


@pytest.mark.parametrize(
    ("ips", "config"),
    [
        (("10.1.2.12/24", "fd00::c/64"), {}),
        (("10.1.2.12", "fd00::c"), {}),
        ((), {"args": {"cni": {"ips": ["10.1.2.12", "fd00::c"]}}}),
    ],
    ids=["runtimeConfig", "without prefix length", "args"],
)
def test_host_local_gives_the_asked_addresses(
    host_local: Delegation, ips: tuple[str, ...], config: dict[str, object]
) -> None:
    """Addresses that are asked for are taken out of the ranges, with the ranges' prefix lengths."""
    asked = real({"type": "host-local"}, ips, config)
    ipam = host_local.config["ipam"]
    given = ipam_add(replace(asked, config={**asked.config, "ipam": ipam}))
    assert [it.address for it in given.addresses] == ["10.1.2.12/24", "fd00::c/64"]


@pytest.mark.parametrize(
    ("ips", "config", "args"),
    [
        (("10.1.2.12/24", "fd00::c/64"), {}, ""),
        ((), {"args": {"cni": {"ips": ["10.1.2.12/24", "fd00::c/64"]}}}, ""),
        ((), {}, "IgnoreUnknown=1;IP=10.1.2.12/24,fd00::c/64;K8S_POD_NAME=vm"),
    ],
    ids=["runtimeConfig", "args", "CNI_ARGS"],
)
def test_static_gives_the_asked_addresses(
    ips: tuple[str, ...], config: dict[str, object], args: str
) -> None:
    """The plugin static gives what it is asked for, in each of the ways that CNI has to ask."""
    given = ipam_add(replace(real({"type": "static"}, ips, config), args=args))
    assert [it.address for it in given.addresses] == ["10.1.2.12/24", "fd00::c/64"]


def test_static_wants_a_prefix_length() -> None:
    """Without one, static refuses: nothing is made up in its place."""
    with pytest.raises(IpamFailure, match="NOT in CIDR notation"):
        ipam_add(real({"type": "static"}, ips=("10.1.2.12",)))


def test_plugin_that_gives_no_address_fails() -> None:
    """An attachment whose network has an IPAM plugin has an address, or is not made."""
    with pytest.raises(IpamFailure, match="static gave no address"):
        ipam_add(real({"type": "static"}))


@pytest.mark.parametrize("cni_version", ["0.4.0", "1.0.0", "1.1.0"])
def test_check_finds_a_lease_that_is_gone(
    host_local: Delegation, tmp_path: Path, cni_version: str
) -> None:
    """CHECK succeeds while host-local has the lease, and tells in its words when it has not."""
    asked = in_version(host_local, cni_version)
    prev_result = {
        "cniVersion": cni_version,
        "interfaces": [{"name": "net1", "sandbox": "/run/netns/vm"}],
        "ips": [{"address": it.address, "version": "4"} for it in ipam_add(asked).addresses],
    }
    ipam_check(asked, prev_result)
    for name in leases(tmp_path):
        (tmp_path / "leases/vepanet" / name).unlink()
    with pytest.raises(IpamFailure, match="Failed to find address added by container container-1"):
        ipam_check(asked, prev_result)


def test_check_compares_with_prev_result() -> None:
    """A gateway in prevResult that is not the configured one is found by static."""
    asked = real(
        {"type": "static", "addresses": [{"address": "10.1.2.3/24", "gateway": "10.1.2.1"}]}
    )
    ipam_add(asked)
    ip = {"address": "10.1.2.3/24", "gateway": "10.1.2.1"}
    ipam_check(asked, {"cniVersion": "1.1.0", "ips": [ip]})
    with pytest.raises(IpamFailure, match="Failed to match addr"):
        ipam_check(asked, {"cniVersion": "1.1.0", "ips": [{**ip, "gateway": "10.1.2.2"}]})


def test_older_plugin_is_asked_once_what_it_knows(host_local: Delegation, plugin: Plugin) -> None:
    """A plugin that refuses the version is called in its own, from then on at once.

    One that takes its place is asked anew.
    """
    wrapper = f'#!/bin/sh\necho "$CNI_COMMAND" >>{plugin.folder}/log\nexec {DEBIAN}/host-local\n'
    asked = replace(with_ipam(host_local, type="ours"), path=(str(plugin.folder),))
    plugin.write(wrapper)
    ipam_add(asked)
    assert plugin.calls == ["ADD", "VERSION", "ADD"]
    ipam_del(asked)
    assert plugin.calls[3:] == ["DEL"]
    plugin.write(wrapper)
    ipam_add(asked)
    assert plugin.calls[4:] == ["ADD", "VERSION", "ADD"]
    ipam_add(replace(in_version(asked, "0.4.0"), container_id="container-2"))
    assert plugin.calls[7:] == ["ADD"]


@pytest.mark.parametrize(
    ("supported", "cni_version"), [(("0.3.1", "0.4.0", "2.0.0"), "0.4.0"), (("1.1.0",), "1.1.0")]
)
def test_newest_common_version_is_taken(
    plugin: Plugin, supported: tuple[str, ...], cni_version: str
) -> None:
    """Older or newer than asked for: what both can speak is spoken, prevResult in that version."""
    refuse = """echo '{"code": 1, "msg": "incompatible"}'; exit 1"""
    only = f"""grep -q '"cniVersion": "{cni_version}"' {plugin.folder}/stdin.$CNI_COMMAND"""
    plugin.answer(supported, ADD=f"{only} && echo '{RESULT}' || {{ {refuse}; }}")
    asked = plugin.delegation("1.0.0")
    assert ipam_add(asked) == ADDRESSING
    ip = {"address": "fd00::3/64", "interface": 0}
    ipam_check(asked, {"cniVersion": "1.0.0", "ips": [ip], "dns": {"domain": "example.org"}})
    told = {"version": "6"} if cni_version == "0.4.0" else {}
    assert plugin.stdin("CHECK")["prevResult"] == {
        "cniVersion": cni_version,
        "ips": [{**ip, **told}],
        "dns": {"domain": "example.org"},
    }


def test_plugin_from_before_check_is_not_checked(plugin: Plugin) -> None:
    """CHECK came with 0.4.0: a plugin that knows less is not asked, and that is no error."""
    refuse = """echo '{"code": 1, "msg": "incompatible"}'; exit 1"""
    plugin.answer(("0.3.0", "0.3.1"), CHECK=refuse)
    ipam_check(plugin.delegation(), {"cniVersion": "1.1.0"})
    assert plugin.calls == ["CHECK", "VERSION"]


@pytest.mark.parametrize("supported", [(), ("0.1.0", "0.2.0"), ("2.0.0",)])
def test_no_common_version(plugin: Plugin, supported: tuple[str, ...]) -> None:
    """Where there is no version to speak in, the error says what each side knows."""
    plugin.answer(supported, ADD="""echo '{"code": 1}'; exit 1""")
    with pytest.raises(IpamFailure) as failure:
        ipam_add(plugin.delegation())
    assert f"it supports {', '.join(supported) or 'none'};" in failure.value.hint
    assert ", ".join(versions.SUPPORTED) in failure.value.hint


def test_plugin_gets_configuration_and_environment(plugin: Plugin) -> None:
    """The whole configuration comes on standard input, the CNI variables and PATH besides."""
    plugin.answer(ADD=f"echo '{RESULT}'")
    asked = replace(plugin.delegation(network="vepanet"), args="IgnoreUnknown=1")
    assert ipam_add(asked) == ADDRESSING
    assert plugin.stdin("ADD") == {
        "cniVersion": "1.1.0",
        "name": "vepanet",
        "type": "extbridge",
        "network": "vepanet",
        "ipam": {"type": "ours"},
        "runtimeConfig": {},
    }
    assert plugin.environ("ADD") == {
        "CNI_COMMAND": "ADD",
        "CNI_CONTAINERID": "container-1",
        "CNI_NETNS": "/run/netns/vm",
        "CNI_IFNAME": "net1",
        "CNI_ARGS": "IgnoreUnknown=1",
        "CNI_PATH": str(plugin.folder),
        "PATH": os.environ["PATH"],
    }


def test_plugin_gets_no_fd_of_ours(plugin: Plugin, tmp_path: Path) -> None:
    """A plugin has its three pipes, and nothing that the agent has open."""
    plugin.answer(ADD=f"ls -l /proc/$$/fd >{tmp_path}/fds; echo '{RESULT}'")
    with (tmp_path / "ours").open("wb") as file:
        os.set_inheritable(file.fileno(), True)  # noqa: FBT003
        ipam_add(plugin.delegation())
    listed = (tmp_path / "fds").read_text()
    assert " 0 -> " in listed
    assert str(tmp_path / "ours") not in listed


def test_gc_names_the_attachments_that_stay(plugin: Plugin) -> None:
    """A plugin that knows 1.1.0 is told which attachments are valid; none is a list too."""
    plugin.answer(GC="true")
    network = replace(plugin.delegation(), container_id="", ifname="", netns="")
    ipam_gc(network, [("container-1", "net1")])
    attachments = [{"containerID": "container-1", "ifname": "net1"}]
    assert plugin.stdin("GC")["cni.dev/valid-attachments"] == attachments
    assert plugin.environ("GC").keys() == {"CNI_COMMAND", "CNI_PATH", "PATH"}
    ipam_gc(network, [])
    assert plugin.stdin("GC")["cni.dev/valid-attachments"] == []
    assert plugin.calls == ["VERSION", "GC", "GC"]


@pytest.mark.parametrize(
    ("code", "kind"), [(50, PluginNotAvailable), (51, LimitedConnectivity), (7, IpamFailure)]
)
def test_status_says_what_the_plugin_says(plugin: Plugin, code: int, kind: type[CniError]) -> None:
    """A plugin that is ready is silent; the specification's codes of STATUS are passed on."""
    plugin.answer(STATUS="true")
    ipam_status(plugin.delegation())
    told = json.dumps({"code": code, "msg": "no daemon", "details": "start it"})
    plugin.answer(STATUS=f"echo '{told}'; exit 1")
    with pytest.raises(kind, match="STATUS: no daemon") as failure:
        ipam_status(plugin.delegation())
    assert failure.value.hint == "start it"


def test_plugin_from_before_gc_and_status(host_local: Delegation, tmp_path: Path) -> None:
    """Debian's plugins know neither verb: nothing is done, nothing is lost, nothing is said."""
    ipam_add(host_local)
    ipam_gc(host_local, [])
    ipam_status(host_local)
    assert leases(tmp_path) == {"10.1.2.10", "fd00::a"}


def test_status_wants_the_plugin_to_be_there(plugin: Plugin) -> None:
    """STATUS fails where ADD would, for want of the plugin."""
    with pytest.raises(InvalidNetworkConfig, match="there is no IPAM plugin ours"):
        ipam_status(plugin.delegation())


def test_plugin_that_wants_to_be_asked_later(plugin: Plugin) -> None:
    """The code for a passing condition reaches the runtime as it is."""
    plugin.answer(ADD="""echo '{"code": 11, "msg": "no lease yet"}'; exit 1""")
    with pytest.raises(TryAgainLater, match="no lease yet"):
        ipam_add(plugin.delegation())


@pytest.mark.parametrize(
    "script",
    ["exit 1", "kill -9 $$", "echo '{}'", "echo nonsense", "echo null", r"printf '\377\376'"],
)
def test_add_that_gave_nothing_is_told_as_such(plugin: Plugin, script: str) -> None:
    """However ADD failed, the error names the plugin; to have it release is the caller's."""
    plugin.answer(ADD=script)
    with pytest.raises(IpamFailure, match=f"{plugin.folder}/ours"):
        ipam_add(plugin.delegation())
    assert plugin.calls == ["ADD"]


@pytest.mark.parametrize(
    ("script", "message", "hint"),
    [
        ("exit 3", "ended with status 3 at DEL", "it said nothing at all"),
        ("kill -9 $$", "was ended by signal 9 at DEL", "it said nothing at all"),
        ("echo oops >&2; exit 2", "ended with status 2 at DEL", "it said: oops"),
        ("echo no JSON; exit 2", "ended with status 2 at DEL", "it said: no JSON"),
        ('echo "{}"; exit 2', "ended with status 2 at DEL", "it said: {}"),
        ("""echo '{"code": 7}'; exit 1""", "DEL: error 7", ""),
    ],
)
def test_plugin_that_ends_without_an_error_object(
    plugin: Plugin, script: str, message: str, hint: str
) -> None:
    """What there is to tell of a plugin's end is told: its status, and its last words."""
    plugin.answer(DEL=script)
    with pytest.raises(IpamFailure, match=message) as failure:
        ipam_del(plugin.delegation())
    assert failure.value.hint == hint


def test_plugin_that_hangs_is_killed_with_its_children(plugin: Plugin, tmp_path: Path) -> None:
    """At the deadline the plugin is killed, and whatever it has started in its process group."""
    pids = tmp_path / "pids"
    plugin.answer(DEL=f"sleep 1000 & echo $$ $! >{pids}; echo stuck >&2; wait")
    with pytest.raises(IpamFailure, match="did not end in time at DEL") as failure:
        ipam_del(plugin.delegation(), seconds=BEFORE_IT_HANGS)
    assert failure.value.hint == "it said: stuck"
    plugins_own, child = map(int, pids.read_text().split())
    with pytest.raises(ProcessLookupError):
        os.kill(plugins_own, 0)
    # An orphan's parent is this process. It waits for the child's end, by whose hand the status is.
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


@pytest.mark.parametrize("fd", [1, 2])
def test_plugin_that_writes_for_ever(plugin: Plugin, fd: int) -> None:
    """Endless output costs neither memory nor the deadline."""
    plugin.answer(DEL=f"yes >&{fd}")
    with pytest.raises(IpamFailure, match=("wrote more than", "did not end in time")[fd - 1]):
        ipam_del(plugin.delegation(), seconds=BEFORE_IT_HANGS)


def test_plugin_may_write_as_much_as_is_allowed(plugin: Plugin) -> None:
    """An answer up to the limit is read in full."""
    padded = RESULT[:-1] + ', "more": "' + "x" * (MAX_STDOUT_BYTES - len(RESULT) - 12) + '"}'
    (plugin.folder / "answer").parent.mkdir()
    (plugin.folder / "answer").write_text(padded)
    assert len(padded) == MAX_STDOUT_BYTES
    plugin.answer(ADD=f"cat {plugin.folder}/answer")
    assert ipam_add(plugin.delegation()) == ADDRESSING
    (plugin.folder / "answer").write_text(padded + " ")
    with pytest.raises(IpamFailure, match="wrote more than 1048576 bytes at ADD"):
        ipam_add(plugin.delegation())


def test_plugin_that_speaks_before_it_listens(plugin: Plugin) -> None:
    """More than a pipe holds, in each direction and on standard error, blocks nobody."""
    much = "head -c 300000 /dev/zero | tr '\\0' ' '"
    plugin.write(f"#!/bin/sh\n{much} >&2; {much}; cat >{plugin.folder}/got; echo '{RESULT}'\n")
    asked = plugin.delegation(more="x" * 300_000)
    assert ipam_add(asked) == ADDRESSING
    assert json.loads((plugin.folder / "got").read_bytes()) == asked.config


@pytest.mark.parametrize("before", ["", "exec <&-", "exec <&- 2>&-"])
def test_plugin_that_does_not_listen(plugin: Plugin, before: str) -> None:
    """A plugin may leave its input unread, and close what it does not need."""
    plugin.write(f"#!/bin/sh\n{before}\necho '{RESULT}'\n")
    assert ipam_add(plugin.delegation(more="x" * 300_000)) == ADDRESSING


def test_plugin_that_closes_its_output_before_its_end(plugin: Plugin) -> None:
    """What counts is the end of the plugin and its status, not the end of its output."""
    plugin.write("#!/bin/sh\nexec <&- >&- 2>&-\nsleep 0.2\nexit 4\n")
    with pytest.raises(IpamFailure, match="ended with status 4"):
        ipam_del(plugin.delegation())


def test_plugin_that_leaves_a_process_behind(plugin: Plugin, tmp_path: Path) -> None:
    """The answer counts when the plugin has ended, though another still holds its output open."""
    pid = tmp_path / "pid"
    plugin.answer(ADD=f"sleep 1000 & echo $! >{pid}; echo '{RESULT}'")
    assert ipam_add(plugin.delegation()) == ADDRESSING
    # Not the plugin's to be killed for: it may be a daemon that it started on purpose.
    orphan = int(pid.read_text())
    os.kill(orphan, signal.SIGTERM)
    assert os.WTERMSIG(os.waitpid(orphan, 0)[1]) == signal.SIGTERM


def test_log_of_a_plugin_is_in_ours(plugin: Plugin, caplog: pytest.LogCaptureFixture) -> None:
    """What a plugin writes on standard error can be read in the agent's log, at bounded length."""
    plugin.answer(ADD=f"echo careful >&2; head -c 100000 /dev/zero >&2; echo '{RESULT}'")
    with caplog.at_level(logging.WARNING):
        ipam_add(plugin.delegation())
    (record,) = caplog.records
    assert f"IPAM plugin {plugin.folder}/ours, ADD: careful" in record.getMessage()
    assert len(record.getMessage()) < 5000


def test_missing_plugin(plugin: Plugin, tmp_path: Path) -> None:
    """The error names the plugin and where it was looked for; a folder of its name is none."""
    (tmp_path / "other/ours").mkdir(parents=True)
    asked = replace(plugin.delegation(), path=(str(plugin.folder), str(tmp_path / "other")))
    for verb in (ipam_add, ipam_del, ipam_status):
        with pytest.raises(InvalidNetworkConfig) as failure:
            verb(asked)
        assert f"no IPAM plugin ours in {plugin.folder}, {tmp_path}/other" in failure.value.message
    with pytest.raises(InvalidNetworkConfig, match="empty CNI_PATH"):
        ipam_add(replace(asked, path=()))


def test_first_folder_with_the_plugin_is_taken(plugin: Plugin, tmp_path: Path) -> None:
    """CNI_PATH is searched in order."""
    plugin.answer(ADD=f"echo '{RESULT}'")
    second = Plugin(tmp_path / "second")
    second.answer(ADD="exit 1")
    path = (str(tmp_path / "absent"), str(plugin.folder), str(second.folder))
    assert ipam_add(replace(plugin.delegation(), path=path)) == ADDRESSING


def test_plugin_that_cannot_be_started(plugin: Plugin, tmp_path: Path) -> None:
    """A file that is not executable, or no program, is named with what is wrong with it."""
    plugin.write("no program\n")
    with pytest.raises(IpamFailure, match=r"could not be started: Exec format error"):
        ipam_add(plugin.delegation())
    with (plugin.folder / "ours").open("ab"), pytest.raises(TryAgainLater, match="Text file busy"):
        ipam_add(plugin.delegation())
    (plugin.folder / "ours").chmod(0o644)
    with pytest.raises(InvalidNetworkConfig, match="ours is not executable"):
        ipam_add(plugin.delegation())
    assert not list(tmp_path.glob("bin/log"))


@contextmanager
def another_root(folder: Path) -> Iterator[int]:
    """A process of another mount namespace, which alone sees a file system on `folder`.

    As on a host whose agent runs in a container. `folder/bin` is there a symbolic link from the
    root, into `folder/store`.
    """
    require("unshare")
    script = f"""
mount -t tmpfs none {folder}
mkdir {folder}/store
cp {folder.parent}/ours {folder}/store/
ln -s {folder}/store {folder}/bin
ln -s loop {folder}/loop
echo ready
exec cat
"""
    with subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", "sh", "-ec", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        try:
            yield process.pid
        finally:
            process.stdin.close()


def test_plugin_in_the_mount_namespace_of_the_host(tmp_path: Path) -> None:
    """An agent in a container runs the host's plugin there, among files that it does not see.

    The network namespace stays the agent's.
    """
    folder = tmp_path / "host"
    folder.mkdir()
    script = (
        f"#!/bin/sh\nreadlink /proc/$$/ns/mnt /proc/$$/ns/net /proc/$$/cwd >{folder}/seen\n"
        f"echo '{RESULT}'\n"
    )
    (tmp_path / "ours").write_text(script)
    (tmp_path / "ours").chmod(0o755)
    path = (f"{folder}/absent", f"{folder}/loop", f"{folder}/bin")
    asked = delegation({"type": "ours"}, *path)
    with another_root(folder) as pid:
        with pytest.raises(InvalidNetworkConfig, match=f"no IPAM plugin ours in {folder}"):
            ipam_add(asked)
        assert ipam_add(asked, host_process=pid) == ADDRESSING
        seen = Path(f"/proc/{pid}/root{folder}/seen").read_text().split()
        assert seen == [os.readlink(f"/proc/{pid}/ns/mnt"), os.readlink("/proc/self/ns/net"), "/"]
        assert not list(folder.iterdir())
        with pytest.raises(InvalidNetworkConfig, match=f"in /proc/{pid}/root{folder}/absent"):
            ipam_add(replace(asked, path=(f"{folder}/absent",)), host_process=pid)
    with pytest.raises(InvalidNetworkConfig, match=f"in /proc/{pid}/root"):
        ipam_add(asked, host_process=pid)


def test_real_plugin_in_the_mount_namespace_of_the_host(
    host_local: Delegation, tmp_path: Path
) -> None:
    """host-local keeps its leases on the host, and releases them there; versions are negotiated."""
    folder = tmp_path / "host"
    folder.mkdir()
    (tmp_path / "ours").write_bytes((DEBIAN / "host-local").read_bytes())
    (tmp_path / "ours").chmod(0o755)
    ours = with_ipam(host_local, type="ours", dataDir=f"{folder}/leases")
    asked = replace(ours, path=(f"{folder}/bin",))
    with another_root(folder) as pid:
        kept = Path(f"/proc/{pid}/root{folder}/leases/vepanet")
        assert ipam_add(asked, host_process=pid).addresses[0].address == "10.1.2.10/24"
        assert (kept / "10.1.2.10").exists()
        ipam_del(asked, host_process=pid)
        assert not (kept / "10.1.2.10").exists()


@pytest.mark.parametrize("verb", [ipam_add, ipam_del, ipam_status])
def test_hanging_plugin_is_killed_in_the_mount_namespace_too(
    tmp_path: Path, verb: Callable[..., object]
) -> None:
    """The deadline holds for the host's plugin as for one of ours."""
    folder = tmp_path / "host"
    folder.mkdir()
    (tmp_path / "ours").write_text("#!/bin/sh\nexec sleep 1000\n")
    (tmp_path / "ours").chmod(0o755)
    asked = delegation({"type": "ours"}, f"{folder}/bin")
    with another_root(folder) as pid, pytest.raises(IpamFailure, match="did not end in time"):
        verb(asked, host_process=pid, seconds=SHORT)
