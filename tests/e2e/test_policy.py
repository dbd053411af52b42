"""A virtual machine that is held to its addresses and rates, or trusted: what it can and cannot do.

One guest serves all tests, with a NIC for each policy.
"""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from extbridge.demo.guest import Guest
from extbridge.demo.lab import Lab, Nic, receive, run, within
from extbridge.ledger import Ledger
from tests.kernel.observe import leftovers, network_config
from tests.support import Cni, executable, require

pytestmark = pytest.mark.guest

PLUGINS = "/usr/lib/cni"
NETWORKS = ("held", "limited", "trusted", "pooled")

RATE = 10_000_000
BURST = 400_000

# TCP over IPv4 with time stamps: what a full frame has, and what of it is data.
FRAME, DATA = 1514, 1448

SECONDS = 3.0
"""Long against the burst, which is used up before."""


@dataclass(frozen=True, slots=True)
class Site:
    """A node with a VM that has a NIC on each of the networks, and a neighbour on the switch."""

    lab: Lab
    nics: list[Nic]
    run_dir: Path
    vm: Guest
    neighbour: str
    own: str
    """What the IPAM plugin gave the NIC that is held to it."""


@pytest.fixture(scope="module")
def site(guest: type[Guest], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The site; when its VM has ended, DEL leaves nothing of its NICs, nor of its address."""
    require("bridge")
    require("nft")
    folder = tmp_path_factory.mktemp("policy")
    cni = Cni(folder / "run")
    with Lab() as lab:
        nics = [lab.nic() for _ in range(4)]
        whole, out, pooled = nics[1:]
        # Of a pool, the NIC whose cable is out is not taken.
        run("ip", "link", "set", out.port, "down", netns=lab.switch)
        ranges = [[{"subnet": "10.0.0.0/24", "rangeStart": "10.0.0.77"}]]
        ipam = {"type": "host-local", "dataDir": str(folder / "leases"), "ranges": ranges}
        limits = {"ingressRate": RATE, "egressRate": RATE}
        bursts = {"ingressBurst": BURST, "egressBurst": BURST}
        configs = {
            "held": network_config(nics[0], antispoof="ip", ipam=ipam),
            "limited": network_config(nics[0], bandwidth={**limits, **bursts}),
            "trusted": network_config(whole, "passthru", trust=True),
            "pooled": network_config(
                out, extbridge={"mode": "bridge", "dev": [out.name, pooled.name]}
            ),
        }
        pod = lab.pod("vm")
        neighbour = lab.neighbour("host", *(f"10.0.{it}.254/24" for it in range(len(NETWORKS))))
        attachments = [
            ({**configs[name], "name": name}, {"NETNS": pod, "IFNAME": f"net{n}", "PATH": PLUGINS})
            for n, name in enumerate(NETWORKS)
        ]
        told = [cni("ADD", config, **variables).result for config, variables in attachments]
        own = re.findall(r"10\.0\.0\.\d+", str(told[0]["ips"]))[0]
        with ExitStack() as running:
            launcher = (executable("extbridge"), "run", "--netns", pod, "--")
            vm = running.enter_context(guest("vm", launcher, env=cni.environment("none")))
            vm.wait_ready()
            for number in range(len(NETWORKS)):
                address = own if number == 0 else f"10.0.{number}.1"
                ask(vm, f"ip address add {address}/24 dev eth{number}")
            yield Site(lab, nics, cni.run_dir, vm, neighbour, own)
        for config, variables in attachments:
            assert cni("DEL", config, **variables).status == 0
        assert leftovers(pod, cni.run_dir) == []
        assert list((folder / "leases/held").glob("10.*")) == []


def test_guest_is_held_to_the_address_it_was_given(site: Site) -> None:
    """With the address from the pool a guest is heard; with any other it is not."""
    assert site.own == "10.0.0.77"
    assert pinged(site, "10.0.0.254")
    ask(site.vm, "ip address add 10.0.0.99/24 dev eth0")
    assert not pinged(site, "10.0.0.254", "-I 10.0.0.99")
    ask(site.vm, "ip address del 10.0.0.99/24 dev eth0")
    assert pinged(site, "10.0.0.254")


def test_guest_is_held_to_its_mac(site: Site) -> None:
    """A guest that changes its MAC is not heard any more, until it changes it back."""
    mac = ask(site.vm, "cat /sys/class/net/eth0/address")
    other = "52:54:00:99:99:99"
    with site.lab.packets(site.lab.switch, site.nics[0].port) as port:
        with changed_mac(site, "eth0", other):
            assert not pinged(site, "10.0.0.254")
        assert pinged(site, "10.0.0.254")
        senders = {frame.data[6:12].hex(":") for frame in receive(port, seconds=0.1)}
    assert mac in senders
    assert other not in senders
    assert ask(site.vm, "cat /sys/class/net/eth0/address") == mac


def test_guest_that_is_trusted_may_change_its_mac(site: Site) -> None:
    """A trusted guest with the NIC to itself is heard, and hears, under any MAC."""
    assert pinged(site, "10.0.2.254")
    with changed_mac(site, "eth2", "52:54:00:99:99:98"):
        assert pinged(site, "10.0.2.254")


def test_guest_sends_at_its_rate(site: Site) -> None:
    """What a guest sends comes at the rate that was asked, within a tenth."""
    seconds: list[float] = []
    data: list[int] = []

    def listen(listening: socket.socket) -> None:
        peer, _ = listening.accept()
        with peer:
            peer.settimeout(20)
            used_up = time.monotonic() + 1
            while time.monotonic() < used_up:
                peer.recv(1 << 16)
            began = time.monotonic()
            while (now := time.monotonic()) < began + SECONDS:
                data.append(len(peer.recv(1 << 16)))
            seconds.append(now - began)

    with served(site, "10.0.1.254", listen) as port:
        site.vm.run(f"nc 10.0.1.254 {port} </dev/zero", timeout=30)
    assert sum(data) * 8 * FRAME / DATA / seconds[0] == pytest.approx(RATE, rel=0.1)


def test_guest_receives_at_its_rate(site: Site) -> None:
    """What a guest receives comes at the rate that was asked, within a tenth."""

    def speak(listening: socket.socket) -> None:
        peer, _ = listening.accept()
        with peer:
            peer.settimeout(20)
            try:
                while True:
                    peer.sendall(bytes(1 << 16))
            except ConnectionError:
                return

    counter = "/sys/class/net/eth1/statistics/rx_bytes"
    look = f"cat {counter} /proc/uptime"
    with served(site, "10.0.1.254", speak) as port:
        receive_all = f"nc 10.0.1.254 {port} >/dev/null & sleep 1"
        said = ask(site.vm, f"{receive_all}; {look}; sleep {SECONDS:g}; {look}; kill $!")
    before, began, after, ended = (float(line.split()[0]) for line in said.splitlines())
    assert (after - before) * 8 / (ended - began) == pytest.approx(RATE, rel=0.1)


def test_guest_on_a_pool_has_a_nic_that_works(site: Site) -> None:
    """A guest on two NICs' network is on the one that has carrier."""
    [entry] = [it for it in Ledger(site.run_dir).entries() if it.network == "pooled"]
    assert entry.lower == site.nics[3].name
    assert pinged(site, "10.0.3.254")


@contextmanager
def changed_mac(site: Site, nic: str, mac: str) -> Iterator[None]:
    """The guest's NIC has another MAC for the length of the block."""
    before = ask(site.vm, f"cat /sys/class/net/{nic}/address")
    ask(site.vm, f"ip link set {nic} address {mac}")
    forget_neighbours(site)
    try:
        yield
    finally:
        ask(site.vm, f"ip link set {nic} address {before}")
        forget_neighbours(site)


def forget_neighbours(site: Site) -> None:
    """Have the neighbour ask anew who has which address."""
    run("ip", "neighbour", "flush", "all", netns=site.neighbour)
    ask(site.vm, "ip neighbour flush all; true")


@contextmanager
def served(site: Site, address: str, serve: Callable[[socket.socket], None]) -> Iterator[int]:
    """A port of the neighbour's at which one connection is served, by a thread."""
    with within(site.neighbour):
        listening = socket.create_server((address, 0))
    with listening:
        thread = threading.Thread(target=serve, args=(listening,))
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            thread.join(30)


def pinged(site: Site, address: str, options: str = "") -> bool:
    """Whether the guest's pings were answered: all, not some."""
    said = site.vm.run(f"ping -c 3 -i 0.2 -W 1 {options} {address}").output
    found = re.search(r"(\d+) packets received", said)
    assert found, said
    assert found[1] in "03", said
    return found[1] == "3"


def ask(vm: Guest, command: str) -> str:
    """What the guest's command printed."""
    answer = vm.run(command)
    assert answer.status == 0, answer.output
    return answer.output.strip()
