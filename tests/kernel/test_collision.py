"""Each VM gets its own NIC, although the kernel names taps by a number that repeats (promise 2)."""

from __future__ import annotations

import fcntl
import os
import select
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from extbridge.demo.lab import Lab, Nic, receive, run
from extbridge.handoff import Tap, take_taps
from extbridge.kernel.links import GROUP
from extbridge.kernel.netns import opened_netns
from extbridge.ledger import Entry, Holder, Ledger
from extbridge.network.definition import FIRST_IFINDEX
from extbridge.spec.errors import WrongTap
from tests.kernel.observe import frame, make_macvtap, network_config, packed, show_link
from tests.support import Cni

SIOCSIFHWADDR = 0x8924
SIOCGIFHWADDR = 0x8927
ARPHRD_ETHER = 1

FIRST_MAC, SECOND_MAC = "52:54:00:00:00:01", "52:54:00:00:00:02"
OTHER_MAC, OUTSIDE_MAC = "52:54:00:00:00:03", "52:54:00:00:00:99"

# struct virtio_net_hdr, before each frame of a tap with the flags it is born with (tap_open).
VNET_HEADER = bytes(10)

# To be seen where they must not be, frames have to be waited for.
WAIT = 0.3


def test_plain_macvtaps_share_a_device_node(lab: Lab, nic: Nic) -> None:
    """The hazard is there: the kernel gives two pods' macvtaps one number, so one device node."""
    pods = {FIRST_MAC: lab.pod("first"), SECOND_MAC: lab.pod("second")}
    for mac, pod in pods.items():
        make_macvtap(nic, "net1", pod, mac)
    assert [show_link("net1", pod)["ifindex"] for pod in pods.values()] == [2, 2]
    port = lab.packets(lab.switch, nic.port)
    with open("/dev/tap2", "r+b", buffering=0) as tap:
        theirs = mac_behind(tap.fileno())
        (neighbours,) = pods.keys() - {theirs}
        # Whoever opens it for the one VM is heard by the other.
        port.send(frame(theirs, OUTSIDE_MAC, b"for one"))
        port.send(frame(neighbours, OUTSIDE_MAC, b"for the other"))
        assert payloads(frames_at(tap.fileno())) == [b"for one"]


@pytest.mark.parametrize("shared", [True, False], ids=["one NIC", "a NIC each"])
def test_each_vm_has_its_own_nic(lab: Lab, cni: Cni, run_dir: Path, *, shared: bool) -> None:
    """Frames of each VM leave by its own NIC, and those for it come to it: to it and no other."""
    first_nic = lab.nic()
    nics = [first_nic, first_nic if shared else lab.nic()]
    ports = {nic.port: lab.packets(lab.switch, nic.port) for nic in nics}
    with ExitStack() as stack:
        taps = []
        for nic, mac in zip(nics, (FIRST_MAC, SECOND_MAC), strict=True):
            pod = lab.pod(f"pod{mac[-1]}")
            config = network_config(nic, mac=mac)
            assert cni("ADD", config, CONTAINERID=f"vm-{mac[-1]}", NETNS=pod).result
            (tap,) = stack.enter_context(taken_taps(pod, run_dir))
            assert tap.mac == mac
            taps.append((nic, tap.mac, tap.fds[0]))
        for (nic, mac, fd), (_, _, other_fd) in (taps, taps[::-1]):
            os.write(fd, VNET_HEADER + frame(OUTSIDE_MAC, mac, b"from me"))
            assert senders(ports) == [(nic.port, packed(mac))]
            ports[nic.port].send(frame(mac, OUTSIDE_MAC, b"for me"))
            assert payloads(frames_at(fd)) == [b"for me"]
            assert payloads(frames_at(other_fd)) == []


@pytest.mark.parametrize("queues", [1, 4])
@pytest.mark.parametrize("by", ["guest", "pod"])
def test_tap_that_answers_with_another_mac_is_refused(
    pod: str, nic: Nic, cni: Cni, by: str, queues: int
) -> None:
    """A tap whose NIC does not have the MAC that ADD gave it is closed and not handed on."""
    assert cni("ADD", network_config(nic, mac=FIRST_MAC, queues=queues), NETNS=pod).result
    if by == "guest":
        with taken_taps(pod, cni.run_dir) as (tap,):
            change_mac(tap.fds[0], OTHER_MAC)
    else:
        run("ip", "link", "set", "net1", "address", OTHER_MAC, netns=pod)
    assert show_link("net1", pod)["address"] == OTHER_MAC
    with pytest.raises(WrongTap, match=OTHER_MAC), taken_taps(pod, cni.run_dir):
        pytest.fail("handed on")
    assert open_taps() == []


def test_node_of_another_pods_macvtap_is_refused(
    lab: Lab, pod: str, nic: Nic, run_dir: Path
) -> None:
    """Should two macvtaps share a number all the same, the second VM is not given the first's."""
    number = FIRST_IFINDEX + 1
    numbered = ("index", str(number), "group", str(GROUP))
    make_macvtap(nic, "net7", lab.pod("other"), OTHER_MAC, *numbered)
    make_macvtap(nic, "net1", pod, FIRST_MAC, *numbered)
    run("ip", "link", "set", "net1", "alias", "extbridge:container-1:net1", netns=pod)
    entry = Entry(
        container_id="container-1", cni_ifname="net1", ifname="net1", network="vepanet",
        definition="vepanet", pod="", netns=pod, netns_inode=os.stat(pod).st_ino, ifindex=number,
        mac=FIRST_MAC, mode="vepa", lower=nic.name, lower_ifindex=show_link(nic.name)["ifindex"],
        mtu=1500, queues=1, antispoof="mac", handoff="fd", done=True,
    )  # fmt: skip
    with Ledger(run_dir).hold("container-1") as held:
        held.write(entry)
    with pytest.raises(WrongTap, match=OTHER_MAC), taken_taps(pod, run_dir):
        pytest.fail("handed on")
    assert open_taps() == []


@contextmanager
def taken_taps(pod: str, run_dir: Path) -> Iterator[list[Tap]]:
    """The pod's taps in the hands of this process."""
    with opened_netns(pod) as netns:
        assert netns is not None
        holder = Holder.of(os.getpid())
        with take_taps(netns, holder, ledger=Ledger(run_dir)) as taps:
            yield taps


def senders(ports: Mapping[str, socket.socket]) -> list[tuple[str, bytes]]:
    """The frames that come out of the node: at which port, and from which MAC."""
    return [
        (name, it.data[6:12])
        for name, port in ports.items()
        for it in receive(port, seconds=WAIT)
        if not it.sent
    ]


def open_taps() -> list[str]:
    """The device nodes of taps that this process has open."""
    opened = [os.readlink(fd.path) for fd in os.scandir("/proc/self/fd") if fd.is_symlink()]
    return [path for path in opened if "/tap" in path]


def frames_at(tap: int) -> list[bytes]:
    """The frames that come to a tap."""
    poll = select.poll()
    poll.register(tap, select.POLLIN)
    found = []
    while poll.poll(WAIT * 1000):
        found.append(os.read(tap, 1 << 16)[len(VNET_HEADER) :])
    return found


def payloads(frames: list[bytes]) -> list[bytes]:
    """What they carry of ours; the padding that a wire adds is taken off."""
    return [it[14:].rstrip(b"\0") for it in frames if it[12:14] == b"\x88\xb5"]


def mac_behind(tap: int) -> str:
    """The MAC of the NIC that an open device node leads to."""
    answer = fcntl.ioctl(tap, SIOCGIFHWADDR, bytes(40))
    return answer[18:24].hex(":")


def change_mac(tap: int, mac: str) -> None:
    """What a guest, or whoever holds the tap, can do without any privilege."""
    family = ARPHRD_ETHER.to_bytes(2, "little")
    fcntl.ioctl(tap, SIOCSIFHWADDR, (bytes(16) + family + packed(mac)).ljust(40, b"\0"))
