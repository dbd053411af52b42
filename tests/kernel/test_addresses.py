"""A guest's IP addresses: given by real IPAM plugins or asked for, and told to all who need them.

The plugins are Debian's host-local and static, and one that fails where the test wants it to.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from extbridge.demo.lab import Lab, Nic, run
from extbridge.ledger import Ledger
from tests.kernel.agents import Agent, Launcher, until
from tests.kernel.observe import leftovers, macvtaps, network_config, show_link
from tests.support import Cni

PLUGINS: Final = "/usr/lib/cni"

FAILING: Final = """\
#!/bin/sh
echo "$CNI_COMMAND $CNI_CONTAINERID $CNI_IFNAME" >>{folder}/asked
if grep -qx "kill-at-$CNI_COMMAND" {folder}/failing-at; then
    kill -9 $PPID
fi
if grep -qx "$CNI_COMMAND" {folder}/failing-at; then
    code=$(cat {folder}/code 2>/dev/null || echo 150)
    echo '{{"code": '$code', "msg": "the pool is on fire", "details": "put it out"}}'
    exit 1
fi
[ "$CNI_COMMAND" != ADD ] || echo '{{"ips": [{{"address": "192.0.2.9/24"}}]}}'
"""


@dataclass(frozen=True, slots=True)
class Pool:
    """host-local's leases, which are files."""

    folder: Path

    def ipam(self, **keys: object) -> dict[str, object]:
        """Five addresses, with what a guest wants besides."""
        return {
            "type": "host-local",
            "dataDir": str(self.folder),
            "ranges": [[{"subnet": "192.0.2.0/29", "gateway": "192.0.2.1"}]],
            "routes": [{"dst": "0.0.0.0/0"}],
            **keys,
        }

    def leases(self, network: str = "vepanet") -> dict[str, list[str]]:
        """Container and interface by leased address."""
        return {
            lease.name: lease.read_text().split()
            for lease in (self.folder / network).glob("[0-9]*")
        }


@dataclass(frozen=True, slots=True)
class Failing:
    """A plugin of the test's own, `failing` in `folder`, which records what it is asked."""

    folder: Path

    def fail_at(self, *verbs: str, code: int = 150) -> None:
        """Fail at these verbs from now on; at `kill-at-VERB` whoever has asked is killed."""
        (self.folder / "code").write_text(str(code))
        (self.folder / "failing-at").write_text("".join(f"{verb}\n" for verb in verbs))

    def asked(self) -> list[str]:
        """Verb, container and interface of every call so far; the next answer begins anew."""
        log = self.folder / "asked"
        asked = log.read_text().splitlines()
        log.write_text("")
        return asked


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    """A pool of addresses."""
    return Pool(tmp_path / "leases")


@pytest.fixture
def failing(tmp_path: Path) -> Failing:
    """A plugin that does not fail yet."""
    folder = tmp_path / "plugins"
    folder.mkdir()
    (folder / "failing").write_text(FAILING.format(folder=folder))
    (folder / "failing").chmod(0o755)
    (folder / "asked").touch()
    found = Failing(folder)
    found.fail_at()
    return found


def with_ipam(nic: Nic, ipam: dict[str, object], **keys: object) -> dict[str, Any]:
    """The configuration of `vepanet` with an IPAM plugin."""
    return network_config(nic, ipam=ipam, **keys)


def test_guest_gets_its_address_and_the_pod_none(cni: Cni, nic: Nic, pod: str, pool: Pool) -> None:
    """The addresses stand in the result, on no interface, and are released by DEL."""
    config = with_ipam(nic, pool.ipam(resolvConf="/dev/null"))
    result = cni("ADD", config, NETNS=pod, PATH=PLUGINS).result
    assert result["ips"] == [{"address": "192.0.2.2/29", "gateway": "192.0.2.1", "interface": 0}]
    assert result["routes"] == [{"dst": "0.0.0.0/0"}]
    assert pool.leases() == {"192.0.2.2": ["container-1", "net1"]}
    assert "inet" not in run("ip", "address", "show", "dev", "net1", netns=pod)
    check = {**config, "prevResult": result}
    assert cni("CHECK", check, NETNS=pod, PATH=PLUGINS).status == 0
    (pool.folder / "vepanet/192.0.2.2").unlink()
    assert cni("CHECK", check, NETNS=pod, PATH=PLUGINS).error["code"] == 109
    assert cni("DEL", config, NETNS=pod, PATH=PLUGINS).status == 0
    assert cni("DEL", config, NETNS="", PATH=PLUGINS).status == 0
    assert (pool.leases(), leftovers(pod, cni.run_dir)) == ({}, [])


@pytest.mark.parametrize("version", ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"])
def test_addresses_are_told_in_every_version(
    cni: Cni, nic: Nic, pod: str, pool: Pool, version: str
) -> None:
    """Each version of the specification has its own form, also where the plugin is older."""
    config = with_ipam(nic, pool.ipam(), cniVersion=version)
    result = cni("ADD", config, NETNS=pod, PATH=PLUGINS).result
    family = {"version": "4"} if version < "1" else {}
    expected = {"address": "192.0.2.2/29", "gateway": "192.0.2.1", "interface": 0, **family}
    assert result["ips"] == [expected]
    assert cni("DEL", config, NETNS=pod, PATH=PLUGINS).status == 0
    assert pool.leases() == {}


@pytest.mark.parametrize("plugin", ["none", "static", "host-local"])
@pytest.mark.parametrize("source", ["runtimeConfig", "annotation"])
def test_addresses_that_are_asked_for(
    cni: Cni, nic: Nic, pod: str, pool: Pool, *, plugin: str, source: str
) -> None:
    """A pod gets the address that it asks for, with or without an IPAM plugin."""
    ips = ["192.0.2.5/29"]
    capability = "io.kubernetes.cri.pod-annotations"
    annotation = json.dumps({"name": "vepanet", "ips": ips})
    runtime: dict[str, dict[str, object]] = {
        "runtimeConfig": {"ips": ips},
        "annotation": {capability: {"extbridge.io/networks": annotation}},
    }
    ipams: dict[str, dict[str, object]] = {
        "none": {},
        "static": {"type": "static"},
        "host-local": pool.ipam(),
    }
    config = with_ipam(
        nic,
        ipams[plugin],
        antispoof="ip",
        capabilities={"ips": True, capability: True},
        runtimeConfig=runtime[source],
    )
    result = cni("ADD", config, NETNS=pod, PATH=PLUGINS).result
    assert "192.0.2.5/29" in json.dumps(result["ips"])
    assert cni("CHECK", {**config, "prevResult": result}, NETNS=pod, PATH=PLUGINS).status == 0
    assert cni("DEL", config, NETNS=pod, PATH=PLUGINS).status == 0
    assert (pool.leases(), leftovers(pod, cni.run_dir)) == ({}, [])


def test_pool_that_is_empty_refuses_in_its_own_words(
    cni: Cni, lab: Lab, nic: Nic, pool: Pool
) -> None:
    """The sixth VM on five addresses is told so, and nothing is made for it."""
    config = with_ipam(nic, pool.ipam())
    pods = [lab.pod(f"p{number}") for number in range(6)]
    for number, pod in enumerate(pods[:5]):
        made = cni("ADD", config, NETNS=pod, CONTAINERID=f"c{number}", PATH=PLUGINS)
        assert made.status == 0
    error = cni("ADD", config, NETNS=pods[5], CONTAINERID="c5", PATH=PLUGINS).error
    assert error["code"] == 109
    assert "no IP addresses available" in str(error["msg"])
    assert macvtaps(pods[5]) == []
    assert Ledger(cni.run_dir).of("c5") == []
    assert len(pool.leases()) == 5
    assert cni("DEL", config, NETNS=pods[0], CONTAINERID="c0", PATH=PLUGINS).status == 0
    assert cni("ADD", config, NETNS=pods[5], CONTAINERID="c5", PATH=PLUGINS).status == 0


def test_chained_nics_have_leases_of_their_own(
    cni: Cni, nic: Nic, pod: str, pool: Pool, tmp_path: Path
) -> None:
    """Two NICs of one pod have two addresses of their network, which are not the pod's own."""
    definition = {"extbridge": {"mode": "vepa", "dev": nic.name}, "ipam": pool.ipam()}
    (tmp_path / "blue.json").write_text(json.dumps(definition))
    capability = "io.kubernetes.cri.pod-annotations"
    before = {
        "cniVersion": "1.0.0",
        "interfaces": [{"name": "net1", "sandbox": pod}],
        "ips": [{"address": "10.0.0.7/24", "interface": 0}],
        "routes": [{"dst": "10.0.0.0/8"}],
    }
    config: dict[str, object] = {
        "cniVersion": "1.0.0",
        "name": "cluster",
        "type": "extbridge",
        "networksDir": str(tmp_path),
        "capabilities": {capability: True},
        "runtimeConfig": {capability: {"extbridge.io/networks": "blue,blue"}},
        "prevResult": before,
    }
    run("ip", "link", "add", "net1", "type", "veth", "peer", "name", "net1p", netns=pod)
    result = cni("ADD", config, NETNS=pod, PATH=PLUGINS).result
    assert result["ips"] == [
        {"address": "10.0.0.7/24", "interface": 0},
        {"address": "192.0.2.2/29", "gateway": "192.0.2.1", "interface": 1},
        {"address": "192.0.2.3/29", "gateway": "192.0.2.1", "interface": 2},
    ]
    # A default route of the guest's is none of the pod's.
    assert result["routes"] == before["routes"]
    assert pool.leases("blue") == {
        "192.0.2.2": ["container-1", "macvtap0"],
        "192.0.2.3": ["container-1", "macvtap1"],
    }
    check = {**config, "prevResult": result}
    assert cni("CHECK", check, NETNS=pod, PATH=PLUGINS).status == 0
    # However the definition has changed meanwhile.
    (tmp_path / "blue.json").unlink()
    assert cni("DEL", config, NETNS="", PATH="").status == 0
    assert pool.leases("blue") == {}


def test_add_that_fails_later_releases_its_address(
    cni: Cni, nic: Nic, pod: str, pool: Pool
) -> None:
    """Whatever fails after the address was given, it is given back."""
    for wrong in ({"mac": nic.mac}, {"extbridge": {"mode": "passthru", "dev": nic.name}}):
        run("ip", "link", "add", "link", nic.name, "name", "other", "type", "macvlan")
        try:
            error = cni("ADD", with_ipam(nic, pool.ipam(), **wrong), NETNS=pod, PATH=PLUGINS).error
        finally:
            run("ip", "link", "delete", "other")
        assert error["code"] in (104, 105)
        assert (pool.leases(), leftovers(pod, cni.run_dir)) == ({}, [])


def test_plugin_that_fails(cni: Cni, nic: Nic, pod: str, failing: Failing) -> None:
    """ADD is refused in the plugin's words; a DEL that it fails at is the runtime's to repeat."""
    config = with_ipam(nic, {"type": "failing"})
    asked = {"NETNS": pod, "PATH": str(failing.folder)}
    failing.fail_at("ADD")
    error = cni("ADD", config, **asked).error
    assert (error["code"], error["details"]) == (109, "put it out (errors.md#ipam-failure)")
    assert str(error["msg"]).endswith("ADD: the pool is on fire")
    assert leftovers(pod, cni.run_dir) == []
    failing.fail_at("DEL", "CHECK", "STATUS")
    result = cni("ADD", config, **asked).result
    assert result["ips"] == [{"address": "192.0.2.9/24", "interface": 0}]
    assert cni("CHECK", {**config, "prevResult": result}, **asked).error["code"] == 109
    assert cni("DEL", config, **asked).error["code"] == 109
    # The link is gone, and the address is not forgotten.
    assert macvtaps(pod) == []
    assert [it.ifname for it in Ledger(cni.run_dir).of("container-1")] == ["net1"]
    failing.fail_at()
    failing.asked()
    assert cni("DEL", config, **asked).status == 0
    assert failing.asked() == ["DEL container-1 net1"]
    assert leftovers(pod, cni.run_dir) == []


def test_rollback_that_the_plugin_refuses_is_not_forgotten(
    cni: Cni, nic: Nic, pod: str, failing: Failing
) -> None:
    """Where an address cannot be given back at once, the next DEL gives it back."""
    config = with_ipam(nic, {"type": "failing"}, mac=nic.mac)
    asked = {"NETNS": pod, "PATH": str(failing.folder)}
    failing.fail_at("DEL", code=11)
    # What the runtime is told is why ADD failed, not why its rollback did.
    assert cni("ADD", config, **asked).error["code"] == 104
    assert macvtaps(pod) == []
    # Nor does DEL say that all is well while it is not.
    assert cni("DEL", config, **asked).error["code"] == 11
    assert len(Ledger(cni.run_dir).of("container-1")) == 1
    failing.fail_at()
    failing.asked()
    assert cni("DEL", config, **asked).status == 0
    assert failing.asked() == ["DEL container-1 net1"]
    assert leftovers(pod, cni.run_dir) == []


@pytest.mark.parametrize("verb", ["ADD", "DEL"])
@pytest.mark.parametrize("retry", [False, True])
def test_killed_while_the_plugin_works(
    cni: Cni, nic: Nic, pod: str, failing: Failing, *, verb: str, retry: bool
) -> None:
    """After kill -9 in the midst of a plugin's call, DEL releases, and a retried ADD succeeds."""
    config = with_ipam(nic, {"type": "failing"})
    asked = {"NETNS": pod, "PATH": str(failing.folder)}
    if verb == "DEL":
        assert cni("ADD", config, **asked).status == 0
    failing.fail_at(f"kill-at-{verb}")
    assert cni(verb, config, **asked).status == -9
    failing.fail_at()
    failing.asked()
    if retry:
        assert cni("ADD", config, **asked).status == 0
        # What the one before may have been given is released first.
        assert failing.asked() == ["DEL container-1 net1", "ADD container-1 net1"]
    assert cni("DEL", config, **asked).status == 0
    assert failing.asked() == ["DEL container-1 net1"]
    assert leftovers(pod, cni.run_dir) == []


def test_one_plugin_that_fails_does_not_keep_the_others(
    cni: Cni, nic: Nic, pod: str, pool: Pool, failing: Failing, *, tmp_path: Path
) -> None:
    """Of a pod's NICs each is unmade as far as it can be, and what is left is not forgotten."""
    networks = tmp_path / "networks"
    networks.mkdir()
    shared = {"mode": "vepa", "dev": nic.name}
    (networks / "red.json").write_text(
        json.dumps({"extbridge": shared, "ipam": {"type": "failing"}})
    )
    (networks / "sea.json").write_text(json.dumps({"extbridge": shared, "ipam": pool.ipam()}))
    capability = "io.kubernetes.cri.pod-annotations"
    config: dict[str, object] = {
        "cniVersion": "1.0.0",
        "name": "cluster",
        "type": "extbridge",
        "networksDir": str(networks),
        "capabilities": {capability: True},
        "runtimeConfig": {capability: {"extbridge.io/networks": "red,sea"}},
        "prevResult": {"cniVersion": "1.0.0", "interfaces": [{"name": "net1", "sandbox": pod}]},
    }
    asked = {"NETNS": pod, "PATH": f"{failing.folder}:{PLUGINS}"}
    assert cni("ADD", config, **asked).status == 0
    failing.fail_at("DEL")
    assert cni("DEL", config, **asked).error["code"] == 109
    assert (macvtaps(pod), pool.leases("sea")) == ([], {})
    assert [it.definition for it in Ledger(cni.run_dir).of("container-1")] == ["red"]
    # Nor is an ADD's address forgotten that failed at both.
    failing.fail_at("ADD", "DEL")
    assert cni("ADD", config, **asked).error["code"] == 109
    failing.fail_at()
    failing.asked()
    assert cni("DEL", config, **asked).status == 0
    assert failing.asked() == ["DEL container-1 macvtap0"]
    assert leftovers(pod, cni.run_dir) == []


def test_check_holds_the_result_to_the_addresses(cni: Cni, nic: Nic, pod: str) -> None:
    """A result that has lost a guest's address, or has another, is not what ADD made."""
    ips = ["192.0.2.7/24"]
    config = network_config(nic, antispoof="ip", runtimeConfig={"ips": ips})
    result = cni("ADD", config, NETNS=pod).result
    assert cni("CHECK", {**config, "prevResult": result}, NETNS=pod).status == 0
    for wrong in ([], [{"address": "192.0.2.8/24"}]):
        changed = {**config, "prevResult": {**result, "ips": wrong}}
        error = cni("CHECK", changed, NETNS=pod).error
        assert (error["code"], "192.0.2.7/24" in str(error["msg"])) == (106, True)


def test_dhcp_is_the_guests_own(cni: Cni, nic: Nic, pod: str) -> None:
    """The dhcp plugin, which would ask on the silenced link, is refused with what to do."""
    error = cni("ADD", with_ipam(nic, {"type": "dhcp"}), NETNS=pod, PATH=PLUGINS).error
    assert (error["code"], "a guest asks by itself" in str(error["details"])) == (7, True)


def test_del_without_a_ledger_still_releases(cni: Cni, nic: Nic, pod: str, pool: Pool) -> None:
    """A lost ledger costs no address; and a DEL for what never was is none's failure."""
    config = with_ipam(nic, pool.ipam())
    assert cni("ADD", config, NETNS=pod, PATH=PLUGINS).status == 0
    (cni.run_dir / "ledger/container-1/net1.json").unlink()
    assert cni("DEL", config, NETNS=pod, PATH=PLUGINS).status == 0
    assert (pool.leases(), leftovers(pod, cni.run_dir)) == ({}, [])
    nowhere = with_ipam(nic, {"type": "nowhere"})
    assert cni("DEL", nowhere, NETNS=pod, PATH=PLUGINS).status == 0


def test_gc_collects_addresses_too(cni: Cni, lab: Lab, nic: Nic, pool: Pool) -> None:
    """What is not in the list of valid attachments loses link and address, the others nothing."""
    config = with_ipam(nic, pool.ipam())
    for name in ("one", "two"):
        made = cni("ADD", config, NETNS=lab.pod(name), CONTAINERID=name, PATH=PLUGINS)
        assert made.status == 0
    valid = [{"containerID": "two", "ifname": "net1"}]
    collect = {**config, "cni.dev/valid-attachments": valid}
    assert cni("GC", collect, PATH=PLUGINS).status == 0
    assert list(pool.leases().values()) == [["two", "net1"]]
    assert [it.container_id for it in Ledger(cni.run_dir).entries()] == ["two"]


def test_status_asks_for_the_plugin(cni: Cni, nic: Nic, pool: Pool) -> None:
    """A node whose IPAM plugin is missing is not ready, one that has it is."""
    assert cni("STATUS", with_ipam(nic, pool.ipam()), PATH=PLUGINS).status == 0
    missing = with_ipam(nic, {"type": "nowhere"})
    error = cni("STATUS", missing, PATH=PLUGINS).error
    assert error["code"] == 50
    assert "there is no IPAM plugin nowhere in /usr/lib/cni" in str(error["msg"])


def test_agent_releases_what_is_gone(
    agent: Agent, shim: Cni, lab: Lab, nic: Nic, pool: Pool
) -> None:
    """The address of a pod that vanished while no agent was there is free after its start."""
    config = with_ipam(nic, pool.ipam())
    assert shim("ADD", config, NETNS=lab.pod("gone"), PATH=PLUGINS).status == 0
    assert len(pool.leases()) == 1
    agent.kill()
    [entry] = Ledger(agent.run_dir).of("container-1")
    run("ip", "netns", "delete", Path(entry.netns).name)
    until(lambda: not Path(f"/dev/tap{entry.ifindex}").exists())
    agent.start()
    assert pool.leases() == {}
    assert list(Ledger(agent.run_dir).entries()) == []


def test_agent_in_a_container_runs_the_hosts_plugin(
    agent: Agent, shim: Cni, nic: Nic, pod: str, pool: Pool
) -> None:
    """An agent that sees neither plugins nor leases of the host has them in its mount namespace."""
    agent.stop()
    pool.folder.mkdir()
    hide = f'mount -t tmpfs hidden {PLUGINS}; mount -t tmpfs hidden {pool.folder}; exec "$@"'
    agent.wrapper = ("unshare", "--mount", "--", "sh", "-ec", hide, "sh")
    agent.start()
    config = with_ipam(nic, pool.ipam())
    error = shim("ADD", config, NETNS=pod, PATH=PLUGINS).error
    assert "there is no IPAM plugin host-local" in str(error["msg"])
    agent.stop()
    agent.options = ("--host-process", str(os.getpid()))
    agent.start()
    assert shim("ADD", config, NETNS=pod, PATH=PLUGINS).status == 0
    assert len(pool.leases()) == 1
    assert shim("DEL", config, NETNS=pod, PATH=PLUGINS).status == 0
    assert pool.leases() == {}


def test_launchers_are_told_the_guests_addresses(
    agent: Agent, shim: Cni, nic: Nic, pod: str, pool: Pool, *, launcher: Launcher
) -> None:
    """A command may have the address in it."""
    config = with_ipam(nic, pool.ipam())
    assert shim("ADD", config, NETNS=pod, PATH=PLUGINS).status == 0
    assert launcher.printed(pod, "{net1.ip}/{net1.prefix} {net1.gateway} {net1.mac}") == [
        f"192.0.2.2/29 192.0.2.1 {show_link('net1', pod)['address']}"
    ]
    assert "net1 has none" in launcher.refusal(pod, "echo", "{net1.dns}")
    assert agent.metrics()["extbridge_refusals_total{reason=InvalidEnvironment}"] == 1
