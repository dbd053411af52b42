"""What a person sees of a node: lists, a tree, one attachment in full, and what happens."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml

from extbridge.demo.lab import Lab, Nic, run, within
from extbridge.kernel.links import find_link
from extbridge.kernel.netlink import NETLINK_ROUTE, Netlink
from extbridge.kernel.taps import open_tap
from extbridge.ledger import Ledger
from tests.kernel.agents import SECONDS, Agent, Launcher, until
from tests.kernel.observe import frame, network_config
from tests.support import Cni, executable

ETHERTYPE_OF_NOBODY = 0x88CC
MAC, OTHER_MAC = "52:54:00:00:00:05", "52:54:00:00:00:06"
LIMITS = {
    "ingressRate": 10**7,
    "ingressBurst": 10**6,
    "egressRate": 2 * 10**6,
    "egressBurst": 10**6,
}


def said(run_dir: Path, *arguments: str, columns: int = 0) -> subprocess.CompletedProcess[str]:
    """What `extbridge` says, on a terminal so wide, or into a pipe."""
    environ = {**os.environ, "EXTBRIDGE_RUN": str(run_dir)}
    environ.pop("COLUMNS", None)
    if columns:
        environ["COLUMNS"] = str(columns)
    return subprocess.run(
        (executable("extbridge"), *arguments),
        env=environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
    )


def printed(run_dir: Path, *arguments: str, columns: int = 0) -> str:
    """The same of what succeeds and complains of nothing."""
    done = said(run_dir, *arguments, columns=columns)
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


@dataclass(frozen=True, slots=True)
class Shop:
    """A node with NICs of two pods, of which the first one's is held."""

    agent: Agent
    nic: Nic
    pods: tuple[str, str]
    holder: int


@pytest.fixture
def shop(agent: Agent, shim: Cni, lab: Lab, nic: Nic, launcher: Launcher) -> Iterator[Shop]:
    """A node with an agent to ask."""
    first, second = lab.pod("first"), lab.pod("second")
    config = network_config(
        nic, mac=MAC, bandwidth=LIMITS, runtimeConfig={"ips": ["192.0.2.5/24"]}, antispoof="ip"
    )
    named = {"ARGS": "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=till"}
    assert shim("ADD", config, NETNS=first, **named).status == 0
    other = network_config(nic, "bridge", mac=OTHER_MAC, antispoof="off", queues=2)
    assert shim("ADD", other, NETNS=second, CONTAINERID="container-2").status == 0
    with launcher.holding(first) as holder:
        yield Shop(agent, nic, (first, second), holder)


def with_and_without(shop: Shop, *arguments: str) -> str:
    """What is printed, which is the same whether the agent is asked or gone."""
    asked = printed(shop.agent.run_dir, *arguments)
    shop.agent.kill()
    assert printed(shop.agent.run_dir, *arguments) == asked
    return asked


def test_list_says_who_has_what(shop: Shop) -> None:
    """One line each: the pod, its NIC, whether it works, and the process that holds its tap."""
    header, second, first = with_and_without(shop, "list").splitlines()
    assert header.split() == ["POD", "INTERFACE", "STATE", "NETWORK", "NIC", "MAC", "HELD", "BY"]
    assert first.split() == [
        "shop/till", "net1", "in", "use", "vepanet", shop.nic.name, MAC, str(shop.holder), "sh",
    ]  # fmt: skip
    assert second.split() == [
        "container-2", "net1", "ready", "vepanet", shop.nic.name, OTHER_MAC,
    ]  # fmt: skip


def test_list_for_programs_has_everything(shop: Shop) -> None:
    """JSON and YAML say the same, and all that there is to say."""
    told = with_and_without(shop, "list", "-o", "json")
    _, first = json.loads(told)
    assert yaml.safe_load(printed(shop.agent.run_dir, "list", "-o", "yaml")) == json.loads(told)
    assert first["holder"]["pid"] == shop.holder
    began = datetime.fromisoformat(first["holder"]["since"])
    assert abs((datetime.now(UTC) - began).total_seconds()) < SECONDS
    some = {key: first[key] for key in ("mode", "mtu", "queues", "antispoof", "ips", "handoff")}
    assert some == {
        "mode": "vepa", "mtu": 1500, "queues": 1, "antispoof": "ip", "ips": ["192.0.2.5/24"],
        "handoff": "fd",
    }  # fmt: skip
    assert first["bandwidth"]["ingress_rate"] == LIMITS["ingressRate"]


def test_counters_are_the_guests(shop: Shop, lab: Lab) -> None:
    """Frames that the guest sends and hears count for it, and those that were dropped apart."""
    [entry] = [it for it in Ledger(shop.agent.run_dir).entries() if it.mac == MAC]
    other = lab.packets(lab.switch, shop.nic.port)
    with within(shop.pods[0]), Netlink(NETLINK_ROUTE) as route:
        link = find_link(route, ifindex=entry.ifindex)
    assert link is not None
    [tap] = open_tap(link, MAC)
    header = bytes(10)
    os.write(tap, header + frame("ff:ff:ff:ff:ff:ff", MAC, bytes(46), ETHERTYPE_OF_NOBODY))
    os.write(tap, header + frame("ff:ff:ff:ff:ff:ff", OTHER_MAC, bytes(46)))
    other.send(frame("ff:ff:ff:ff:ff:ff", "52:54:00:00:00:77", bytes(46)))
    os.close(tap)

    def told() -> tuple[int, dict[str, int]]:
        [it] = json.loads(printed(shop.agent.run_dir, "show", MAC, "-o", "json"))
        return it["counters"]["rx_frames"], {k: v for k, v in it["drops"].items() if v}

    until(lambda: told()[0] == 1)
    assert told()[1] == {"ethertype": 1, "source": 1}


def test_tree_leads_from_nic_to_process(shop: Shop) -> None:
    """Who is on a NIC is seen at a glance."""
    tree = with_and_without(shop, "list", "--tree").splitlines()
    assert tree[:4] == [
        shop.nic.name,
        "├── vepanet (bridge)",
        "│   └── container-2",
        f"│       └── net1 {OTHER_MAC} ready",
    ]
    assert tree[4:7] == [
        "└── vepanet (vepa)",
        "    └── shop/till",
        f"        └── net1 {MAC} 192.0.2.5/24 in use",
    ]
    assert tree[7].startswith(f"            └── {shop.holder} sh since ")


@pytest.mark.parametrize("key", ["shop/till", "till", MAC, MAC.upper(), "container-1"])
def test_show_says_what_check_says(shop: Shop, key: str) -> None:
    """One attachment in full, by whatever a person knows of it; and what is not as ADD made it."""
    assert "CHECK           all is as ADD made it" in with_and_without(shop, "show", key)
    run("nft", "flush", "ruleset", netns=shop.pods[0])
    said_of_it = printed(shop.agent.run_dir, "show", key)
    assert "antispoof is 'nftables table" in said_of_it
    assert OTHER_MAC not in said_of_it


def test_what_is_no_record_is_passed_over(shop: Shop) -> None:
    """A folder where a record should be, and a run folder that is none, do not fail a list."""
    folder = shop.agent.run_dir / "ledger" / "container-2" / "net2.json"
    folder.mkdir()
    assert len(with_and_without(shop, "list").splitlines()) == 3
    folder.rmdir()
    done = said(shop.agent.run_dir / "nothing", "list")
    assert (done.returncode, done.stdout) == (0, "")
    assert "no agent answers, and there is no ledger" in done.stderr


def test_no_process_writes_on_roots_terminal(shop: Shop, launcher: Launcher) -> None:
    """What a holder calls itself is shown without what would forge a line or colour it."""
    forged = "\x1b[2Jall is well\n52:54:00:00:00:07"
    with launcher.start(shop.pods[1], "bash", "-c", f"exec -a '{forged}' sleep 60") as process:
        try:
            until(lambda: "all is well" in printed(shop.agent.run_dir, "list"))
            for how in ("-otable", "-owide", "--tree"):
                told = printed(shop.agent.run_dir, "list", how)
                assert "?[2Jall is well?52:54" in told
                assert "\x1b" not in told
        finally:
            process.kill()


def test_show_of_nothing_is_said(shop: Shop) -> None:
    """What there is not is no traceback, and no success."""
    assert said(shop.agent.run_dir, "show", "").returncode == 1
    done = said(shop.agent.run_dir, "show", "nobody")
    assert (done.returncode, done.stdout) == (1, "")
    assert "there is no attachment nobody" in done.stderr


def test_states_are_told_apart(shop: Shop, lab: Lab) -> None:
    """A cable that is out, a link that is gone, a namespace out of sight: each has its word."""

    def states() -> list[str]:
        told = json.loads(printed(shop.agent.run_dir, "list", "-o", "json"))
        return [it["state"] for it in told]

    run("ip", "link", "set", shop.nic.port, "down", netns=lab.switch)
    until(lambda: states() == ["no carrier", "no carrier"])
    run("ip", "link", "set", shop.nic.port, "up", netns=lab.switch)
    until(lambda: states() == ["ready", "in use"])
    run("ip", "link", "set", "net1", "down", netns=shop.pods[1])
    assert states() == ["down", "in use"]
    run("ip", "link", "delete", "net1", netns=shop.pods[1])
    assert states() == ["gone", "in use"]
    # Seen through its holder, where its path leads nowhere.
    run("umount", shop.pods[0])
    assert states() == ["gone", "in use"]
    os.kill(shop.holder, signal.SIGKILL)
    until(lambda: states() == ["gone", "gone"])


def test_networks_say_what_is_amiss(shop: Shop, lab: Lab, tmp_path: Path) -> None:
    """Each definition has a line, a broken one what is wrong with it; passthru what is free."""
    used, free = shop.nic.name, lab.nic().name
    folder = tmp_path / "networks"
    folder.mkdir()
    (folder / "vepanet.yaml").write_text(f"extbridge: {{dev: {used}}}\n")
    (folder / "whole.yaml").write_text(f"extbridge: {{dev: [{used}, {free}], mode: passthru}}\n")
    (folder / "broken.yaml").write_text("extbridge: {dve: eth0}\n")
    told = printed(shop.agent.run_dir, "networks", "--networks-dir", str(folder))
    in_yaml = printed(shop.agent.run_dir, "networks", "--networks-dir", str(folder), "-o", "yaml")
    assert [it["name"] for it in yaml.safe_load(in_yaml)] == ["broken", "vepanet", "whole"]
    broken, vepanet, whole = told.splitlines()[1:]
    assert "dve" in broken
    assert vepanet.split() == ["vepanet", "vepa", "mac", "2", "any", used, "(2)"]
    assert whole.split()[:7] == ["whole", "passthru", "mac", "0", "1", used, "(2),"]
    assert f"{used} is taken by net1 (bridge) of container-2, net1 (vepa) of shop/till" in whole


def test_watch_tells_as_it_happens(
    agent: Agent, shim: Cni, nic: Nic, pod: str, launcher: Launcher
) -> None:
    """A line for each NIC that comes, is taken, is given back, and goes."""
    with subprocess.Popen(
        (executable("extbridge"), "watch", "-o", "json"),
        env={**os.environ, "EXTBRIDGE_RUN": str(agent.run_dir)},
        stdout=subprocess.PIPE,
        text=True,
    ) as watching:
        assert watching.stdout is not None
        try:

            def next_event() -> str:
                assert watching.stdout is not None
                event = json.loads(watching.stdout.readline())
                assert event["mac"] == MAC
                return str(event["event"])

            assert json.loads(watching.stdout.readline())["event"] == "watching"
            config = network_config(nic, mac=MAC)
            assert shim("ADD", config, NETNS=pod).status == 0
            assert next_event() == "attached"
            with launcher.holding(pod) as holder:
                assert next_event() == f"taken by process {holder} (sh)"
            assert next_event() == f"given back by process {holder}"
            assert shim("DEL", config, NETNS=pod).status == 0
            assert next_event() == "detached"
        finally:
            watching.terminate()
