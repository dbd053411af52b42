"""What a network, a runtime or a pod asks of a NIC's policy is what the kernel then holds it to.

Whether the rules and limits themselves do what they are for is test_antispoof's and test_shaper's.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from extbridge.demo.lab import Nic, run
from extbridge.ledger import Ledger
from tests.kernel.agents import Agent
from tests.kernel.observe import ifbs, leftovers, macvtaps, network_config, tables
from tests.kernel.strace import disturbed, recorded
from tests.support import Cni, require

MAC = "52:54:00:00:00:01"
# The last is the address that a guest makes of its MAC.
AS_NFT_SHOWS_THEM = {
    MAC: "525400000001",
    "192.0.2.7": "c0000207",
    "2001:db8::7": "20010db8000000000000000000000007",
    "fe80::5054:ff:fe00:1": "fe80000000000000505400fffe000001",
}

LIMITS = {"ingressRate": 10**7, "ingressBurst": 10**6, "egressRate": 10**8, "egressBurst": 10**7}


def guard_rules(pod: str) -> str:
    """The anti-spoofing rules in the pod as nft shows them; empty where there are none."""
    held = [table for table in tables(pod) if table.startswith("netdev ")]
    return "".join(run("nft", "list", "table", *table.split(), netns=pod) for table in held)


def rates(pod: str) -> dict[str, int]:
    """The rate in bits/s of every token bucket in the pod, by its link's type."""
    shown = json.loads(run("tc", "-json", "-details", "qdisc", "show", netns=pod))
    # iproute2 shows bytes/s.
    return {
        "sent" if qdisc["dev"].startswith("net") else "received": qdisc["options"]["rate"] * 8
        for qdisc in shown
        if qdisc["kind"] == "tbf"
    }


@pytest.mark.parametrize(
    ("keys", "held_to"),
    [
        ({}, [MAC]),
        ({"antispoof": "mac"}, [MAC]),
        (
            {
                "antispoof": "ip",
                "runtimeConfig": {"ips": ["192.0.2.7/24", "2001:db8::7/64"]},
            },
            [MAC, "192.0.2.7", "2001:db8::7", "fe80::5054:ff:fe00:1"],
        ),
        ({"antispoof": "off"}, []),
        ({"trust": True}, []),
    ],
    ids=str,
)
def test_guest_is_held_to_what_the_network_says(
    cni: Cni, nic: Nic, pod: str, keys: dict[str, Any], held_to: list[str]
) -> None:
    """By default a guest is held to its MAC; to its addresses or to nothing where that is asked."""
    require("nft")
    config = network_config(nic, mac=MAC, **keys)
    result = cni("ADD", config, NETNS=pod).result
    rules = guard_rules(pod)
    assert [name for name, octets in AS_NFT_SHOWS_THEM.items() if octets in rules] == held_to
    assert bool(rules) == bool(held_to)
    assert cni("CHECK", {**config, "prevResult": result}, NETNS=pod).status == 0
    assert cni("DEL", config, NETNS=pod).status == 0
    assert leftovers(pod, cni.run_dir) == []


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, {}),
        ({"bandwidth": LIMITS}, {"received": 10**7, "sent": 10**8}),
        # In Go's spelling, and with its word for no limit.
        (
            {
                "bandwidth": LIMITS,
                "runtimeConfig": {
                    "bandwidth": {
                        "IngressRate": 5 * 10**6,
                        "IngressBurst": 4294967295,
                        "EgressRate": 0,
                    }
                },
            },
            {"received": 5 * 10**6, "sent": 10**8},
        ),
        (
            {
                "runtimeConfig": {
                    "io.kubernetes.cri.pod-annotations": {
                        "kubernetes.io/egress-bandwidth": "20M",
                    }
                },
            },
            {"sent": 2 * 10**7},
        ),
    ],
    ids=str,
)
def test_guest_is_limited_as_it_is_asked(
    cni: Cni, nic: Nic, pod: str, keys: dict[str, Any], expected: dict[str, int]
) -> None:
    """Each direction has the rate that runtime, pod or network ask for; DEL takes all of it."""
    config = network_config(nic, **keys)
    result = cni("ADD", config, NETNS=pod).result
    assert rates(pod) == expected
    assert len(ifbs(pod)) == ("received" in expected)
    # What carries the limit is no NIC of the VM's.
    assert [it["name"] for it in result["interfaces"]] == ["net1"]  # type: ignore[attr-defined]
    assert cni("CHECK", {**config, "prevResult": result}, NETNS=pod).status == 0
    assert cni("DEL", config, NETNS=pod).status == 0
    assert leftovers(pod, cni.run_dir) == []


def test_gc_and_a_lost_link_leave_nothing_of_a_policy(cni: Cni, nic: Nic, pod: str) -> None:
    """Rules and limits go with their link, by whichever way it goes, and others' stay."""
    config = network_config(nic, bandwidth=LIMITS)
    for ifname in ("net1", "net2", "net3"):
        assert cni("ADD", config, NETNS=pod, IFNAME=ifname).status == 0
    valid = [{"containerID": "container-1", "ifname": it} for it in ("net2", "net3")]
    assert cni("GC", {**config, "cni.dev/valid-attachments": valid}).status == 0
    assert (macvtaps(pod), len(ifbs(pod)), len(tables(pod))) == (["net2", "net3"], 2, 4)
    run("ip", "link", "delete", "net2", netns=pod)
    assert cni("DEL", config, NETNS=pod, IFNAME="net2").status == 0
    assert (macvtaps(pod), len(ifbs(pod)), len(tables(pod))) == (["net3"], 1, 2)
    assert cni("DEL", config, NETNS=pod, IFNAME="net3").status == 0
    assert leftovers(pod, cni.run_dir) == []


def test_start_of_the_agent_leaves_nothing_of_a_policy(
    agent: Agent, shim: Cni, nic: Nic, pod: str
) -> None:
    """What an agent did not live to finish is gone after the next one's start."""
    assert shim("ADD", network_config(nic, bandwidth=LIMITS), NETNS=pod).status == 0
    agent.kill()
    with Ledger(agent.run_dir).hold("container-1") as held:
        [entry] = held.entries()
        held.remove(entry.ifname)
        held.write(replace(entry, done=False))
    agent.start()
    assert leftovers(pod, agent.run_dir) == []


@pytest.mark.parametrize(
    ("message", "antispoof", "remedy"),
    [
        ("nlmsg_len=20, nlmsg_type=0x10", "mac", "antispoof: off does"),
        ("nlmsg_type=0x24", "mac", "antispoof: off does"),
        ("nlmsg_type=0x24", "off", "bandwidth out"),
    ],
)
def test_kernel_that_lacks_something_is_told_of(
    cni: Cni, nic: Nic, pod: str, tmp_path: Path, *, message: str, antispoof: str, remedy: str
) -> None:
    """Where the kernel cannot do what is asked, ADD says what it lacks and what to do.

    The messages are the one that begins a transaction of nf_tables, and RTM_NEWQDISC.
    """
    config = network_config(nic, bandwidth=LIMITS, antispoof=antispoof)
    calls = recorded(cni, "ADD", config, pod, tmp_path / "recorded")
    assert cni("DEL", config, NETNS=pod).status == 0
    call = next(it for it in calls if it.name == "sendto" and message in it.shown)
    fault = f"error=EOPNOTSUPP:when={call.number}"
    lacking = disturbed(cni, call, fault, tmp_path / "strace")
    error = lacking("ADD", config, NETNS=pod).error
    assert error["code"] == 102
    assert remedy in str(error["details"])
    assert leftovers(pod, cni.run_dir) == []
