"""Virtual machines on networks of every kind: who reaches whom, and what a guest has for a NIC.

Three guests serve all tests. Two have the same three NICs, one in each mode in which VMs share a
NIC of the node; the third has those that are one of a kind.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import pytest

from extbridge.demo.guest import Guest
from extbridge.demo.lab import Lab, Nic, receive
from tests.kernel.observe import leftovers, network_config, show_link
from tests.support import Cni, executable, require

pytestmark = pytest.mark.guest

_PINGS = 3

_SHARING = ("vepa", "bridge", "private")
_OTHERS = ("queues", "passthru", "large")
_HOSTS = {"a": 1, "b": 2, "c": 3, "neighbour": 254}


@dataclass(frozen=True, slots=True)
class Site:
    """A node with three VMs, and the switch; on it is also a neighbour that is no VM."""

    lab: Lab
    shared: Nic
    whole: Nic
    large: Nic
    a: Guest
    b: Guest
    c: Guest


@pytest.fixture(scope="module")
def site(guest: type[Guest], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The site; when its VMs have ended, DEL leaves nothing of their NICs, nor a trace on ours."""
    require("ip")
    require("bridge")
    cni = Cni(tmp_path_factory.mktemp("run"))
    with Lab() as lab:
        shared, whole, large = lab.nic(), lab.nic(), lab.nic(mtu=9000)
        before = [_state(nic) for nic in (shared, whole, large)]
        everywhere = [_address(network, "neighbour") for network in (*_SHARING, *_OTHERS)]
        lab.neighbour("host", *everywhere, "fd00::254/64", mtu=9000)
        networks = {
            **{mode: network_config(shared, mode, name=mode) for mode in _SHARING},
            "queues": network_config(shared, name="queues", queues=4),
            "passthru": network_config(whole, "passthru", name="passthru"),
            "large": network_config(large, name="large"),
        }
        vms = {"a": _SHARING, "b": _SHARING, "c": _OTHERS}
        pods = {vm: lab.pod(vm) for vm in vms}
        attachments = [
            (networks[network], {"CONTAINERID": vm, "NETNS": pods[vm], "IFNAME": f"net{number}"})
            for vm in vms
            for number, network in enumerate(vms[vm])
        ]
        for config, variables in attachments:
            assert cni("ADD", config, **variables).result
        with ExitStack() as running:
            guests = {
                vm: running.enter_context(
                    guest(
                        vm,
                        (executable("extbridge"), "run", "--netns", pods[vm], "--"),
                        cpus=4 if vm == "c" else 1,
                        env=cni.environment("none"),
                    )
                )
                for vm in vms
            }
            for vm, booted in guests.items():
                booted.wait_ready()
                for number, network in enumerate(vms[vm]):
                    _ask(booted, f"ip address add {_address(network, vm)} dev eth{number}")
            for vm in ("a", "b"):
                _ask(guests[vm], f"ip address add fd00::{_HOSTS[vm]}/64 dev eth0")
            yield Site(lab, shared, whole, large, **guests)
        for config, variables in attachments:
            assert cni("DEL", config, **variables).status == 0
        assert [leftovers(netns, cni.run_dir) for netns in pods.values()] == [[], [], []]
        assert [_state(nic) for nic in (shared, whole, large)] == before


def test_vepa_guests_meet_at_the_switch(site: Site) -> None:
    """In vepa mode two VMs on one NIC reach each other through a switch that reflects frames."""
    assert _pinged(site.a, "vepa", "b") == _PINGS
    assert _answers(site.a, "fd00::2") == _PINGS


def test_vepa_guests_are_apart_without_reflective_relay(site: Site) -> None:
    """In vepa mode the switch decides: where it does not reflect, VMs on one NIC stay apart."""
    with _no_reflective_relay(site):
        assert _pinged(site.a, "vepa", "b") == 0
        assert _answers(site.a, "fd00::2") == 0
        assert _pinged(site.a, "vepa", "neighbour") == _PINGS


def test_bridge_guests_need_no_reflective_relay(site: Site) -> None:
    """In bridge mode two VMs on one NIC reach each other, and the world, with any switch."""
    with _no_reflective_relay(site):
        assert _pinged(site.a, "bridge", "b") == _PINGS
        assert _pinged(site.a, "bridge", "neighbour") == _PINGS


def test_private_guests_are_apart_even_with_reflective_relay(site: Site) -> None:
    """In private mode VMs on one NIC stay apart whatever the switch does, and reach the world."""
    assert _pinged(site.a, "private", "b") == 0
    assert _pinged(site.a, "private", "neighbour") == _PINGS
    assert _pinged(site.b, "private", "neighbour") == _PINGS


def test_guest_uses_every_queue(site: Site) -> None:
    """A VM with 4 CPUs and 4 queues sends through each, one a CPU, and gets its answers."""
    queues = _ask(site.c, "ls /sys/class/net/eth0/queues").split()
    assert queues == [f"{way}-{number}" for way in ("rx", "tx") for number in range(4)]
    for cpu in range(4):
        mask = _ask(site.c, f"cat /sys/class/net/eth0/queues/tx-{cpu}/xps_cpus")
        assert int(mask, 16) == 1 << cpu
        assert _pinged(site.c, "queues", "neighbour", f"taskset -c {cpu}") == _PINGS


def test_passthru_guest_has_the_nic_to_itself(site: Site) -> None:
    """In passthru mode the VM's MAC is the NIC's, and the VM reaches the world through it."""
    assert _ask(site.c, "cat /sys/class/net/eth1/address") == show_link(site.whole.name)["address"]
    assert _pinged(site.c, "passthru", "neighbour") == _PINGS


def test_guest_has_the_nics_mtu(site: Site) -> None:
    """A VM on a NIC with large frames knows it, and sends and gets them whole."""
    assert _ask(site.c, "cat /sys/class/net/eth2/mtu") == "9000"
    with site.lab.packets(site.lab.switch, site.large.port) as port:
        assert _pinged(site.c, "large", "neighbour", size=8900) == _PINGS
        sizes = [len(frame.data) for frame in receive(port, seconds=0.1)]
    # 8,900 bytes of data, and the headers of ICMP, IPv4 and Ethernet.
    assert sizes.count(8900 + 8 + 20 + 14) == 2 * _PINGS


def _state(nic: Nic) -> list[object]:
    """What a macvtap may change of the NIC below it."""
    link = show_link(nic.name)
    return [link[key] for key in ("address", "promiscuity", "allmulti")]


@contextmanager
def _no_reflective_relay(site: Site) -> Iterator[None]:
    site.lab.set_reflective(site.shared, on=False)
    try:
        yield
    finally:
        site.lab.set_reflective(site.shared, on=True)


def _address(network: str, host: str) -> str:
    """Every network has a subnet of its own, or the wrong NIC would do."""
    return f"10.0.{(*_SHARING, *_OTHERS).index(network)}.{_HOSTS[host]}/24"


def _pinged(guest: Guest, network: str, host: str, prefix: str = "", *, size: int = 56) -> int:
    return _answers(guest, _address(network, host).partition("/")[0], prefix, size=size)


def _answers(guest: Guest, address: str, prefix: str = "", *, size: int = 56) -> int:
    """How many of the pings were answered; one that is will be within the seconds."""
    said = guest.run(f"{prefix} ping -c {_PINGS} -i 0.2 -W 3 -s {size} {address}").output
    received = re.search(r"(\d+) packets received", said)
    assert received, said
    return int(received[1])


def _ask(guest: Guest, command: str) -> str:
    answer = guest.run(command)
    assert answer.status == 0, answer.output
    return answer.output.strip()
