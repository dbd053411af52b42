"""Guests on a network: what reaches whom, in each mode, and what a guest sees of its NIC.

Three guests are booted once, for all tests, each with three NICs: `a` and `b` have one in each mode
that lets VMs share a NIC, `c` has those that are one of a kind.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from extbridge.demo.guest import Guest
from extbridge.demo.lab import Lab, Nic, receive, run
from tests.support import Cni, executable, ledger_of, link_names, network_config, require, show_link

pytestmark = pytest.mark.guest

_PINGS = 3
_QUEUES = 4
_JUMBO = 9000

# The third octet of a network's addresses. A guest's own is the last, the neighbour's there is 254.
_VEPA, _BRIDGE, _PRIVATE, _QUEUED, _PASSTHRU, _LARGE = range(6)
_A, _B, _C, _NEIGHBOUR = 1, 2, 3, 254


@dataclass(frozen=True, slots=True)
class Plant:
    """A node with three VMs, and the switch and the neighbour outside."""

    lab: Lab
    shared: Nic
    large: Nic
    a: Guest
    b: Guest
    c: Guest
    macs: dict[str, str]


@pytest.fixture(scope="module")
def plant(guest: type[Guest], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plant]:
    """The node; afterwards all VMs end and all their attachments are deleted without a trace."""
    require("ip")
    require("bridge")
    run_dir = tmp_path_factory.mktemp("run")
    cni = Cni(run_dir)
    with Lab() as lab:
        shared, whole, large = lab.nic(), lab.nic(), lab.nic(mtu=_JUMBO)
        lab.neighbour("host", *(address for n in range(6) for address in _addresses(n, _NEIGHBOUR)),
                      mtu=_JUMBO)  # fmt: skip
        asked = {
            "a": [network_config(shared.name, mode=mode) for mode in ("vepa", "bridge", "private")],
            "b": [network_config(shared.name, mode=mode) for mode in ("vepa", "bridge", "private")],
            "c": [
                network_config(shared.name, queues=_QUEUES),
                network_config(whole.name, mode="passthru"),
                network_config(large.name, mtu=_JUMBO),
            ],
        }
        pods = {name: lab.pod(name) for name in asked}
        attachments = [
            (config, {"NETNS": pods[name], "CONTAINERID": name, "IFNAME": f"net{number}"})
            for name, configs in asked.items()
            for number, config in enumerate(configs, start=1)
        ]
        for config, variables in attachments:
            assert cni("ADD", config, **variables).result
        with ExitStack() as guests:
            a, b, c = (
                guests.enter_context(
                    guest(
                        name,
                        (executable("extbridge"), "run", "--netns", netns, "--"),
                        cpus=_QUEUES if name == "c" else 1,
                        env=cni.environment(""),
                    )
                )
                for name, netns in pods.items()
            )
            for booted, host, networks in (
                (a, _A, (_VEPA, _BRIDGE, _PRIVATE)),
                (b, _B, (_VEPA, _BRIDGE, _PRIVATE)),
                (c, _C, (_QUEUED, _PASSTHRU, _LARGE)),
            ):
                booted.wait_ready()
                for number, network in enumerate(networks):
                    for address in _addresses(network, host):
                        _ask(booted, f"ip address add {address} dev eth{number}")
            macs = ...
            yield Plant(lab, shared, large, a, b, c)
        for config, variables in attachments:
            assert cni("DEL", config, **variables).status == 0
        assert [link_names(netns) for netns in pods.values()] == [{"lo"}] * len(pods)
        assert ledger_of(run_dir) == []
        assert show_link(whole.name)["address"] == whole.mac
