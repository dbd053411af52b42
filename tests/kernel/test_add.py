"""What ADD makes: in the pod the macvtap that the network defines, and nothing on the host."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from extbridge.demo.lab import Lab, Nic, run
from tests.kernel.observe import link_names, make_macvtap, network_config, picture, show_link
from tests.support import Cni

MAC = "52:54:00:ab:cd:ef"
ANNOTATIONS = "io.kubernetes.cri.pod-annotations"
RTMGRP_LINK = 1

SPELLINGS = {
    "blue.json": '{"extbridge": {"mode": "bridge", "dev": "NIC"}, "mtu": 1400}',
    "blue.yaml": "name: blue\nextbridge: {mode: bridge, dev: NIC}\nmtu: 1400\n",
    "blue.yml": "{extbridge: {mode: bridge, dev: NIC}, mtu: 0x578}",
    "blue.xml": "<network><name>blue</name><extbridge mode='bridge' dev='NIC' mtu='1400'/>"
    "<bridge name='virbr0'/><ip address='192.168.122.1'><dhcp/></ip></network>",
}
FORWARDS = [
    "<forward mode='bridge' dev='NIC'/>",
    "<forward mode='bridge'><interface dev='NIC' connections='1'/></forward>",
    "<forward dev='NIC' mode='bridge'><interface dev='NIC'/></forward>",
]


@pytest.mark.parametrize("mode", ["vepa", "bridge", "private", "passthru"])
def test_add_makes_the_macvtap_that_was_asked_for(cni: Cni, nic: Nic, pod: str, mode: str) -> None:
    """In the pod there is one macvtap of that mode on that NIC, up, silent, and marked as ours."""
    result = cni("ADD", network_config(nic, mode, mac=MAC), NETNS=pod).result
    assert result["interfaces"] == [{"name": "net1", "mac": MAC, "mtu": 1500, "sandbox": pod}]
    assert link_names(pod) == {"lo", "net1"}
    link = show_link("net1", pod)
    assert link["linkinfo"]["info_kind"] == "macvtap"
    assert link["linkinfo"]["info_data"]["mode"] == mode
    assert link["link_index"] == show_link(nic.name)["ifindex"]
    assert (link["address"], link["mtu"]) == (MAC, 1500)
    assert (link["num_tx_queues"], link["num_rx_queues"]) == (1, 1)
    assert {"UP", "LOWER_UP", "NOARP"} <= set(link["flags"])
    assert 0x40000000 <= link["ifindex"] <= 0x7FFFFFFF
    assert (link["group"], link["ifalias"]) == ("1702392930", "extbridge:container-1:net1")
    [shown] = json.loads(run("ip", "-json", "address", "show", "dev", "net1", netns=pod))
    assert shown["addr_info"] == []


def test_add_makes_nothing_on_the_host(cni: Cni, nic: Nic, pod: str) -> None:
    """No link appears on the host, not even for a moment, where somebody could set it up."""
    with _new_links() as made_plainly:
        run("ip", "link", "add", "link", nic.name, "name", "net1", "type", "macvtap")
        run("ip", "link", "set", "net1", "netns", pod)
    run("ip", "link", "delete", "net1", netns=pod)
    assert made_plainly == [b"net1"]
    with _new_links() as made_by_us:
        assert cni("ADD", network_config(nic), NETNS=pod).status == 0
        assert cni("DEL", network_config(nic), NETNS=pod).status == 0
    assert made_by_us == []


@pytest.mark.parametrize(("given", "mtu"), [(None, 9000), (1400, 1400), (9000, 9000), (68, 68)])
def test_mtu_is_the_network_s_or_else_the_nic_s(
    cni: Cni, lab: Lab, pod: str, given: int | None, mtu: int
) -> None:
    """The macvtap has the network's MTU, and without one the NIC's; the result says so."""
    result = cni("ADD", network_config(lab.nic(mtu=9000), mtu=given), NETNS=pod).result
    assert result["interfaces"][0]["mtu"] == mtu  # type: ignore[index]
    assert show_link("net1", pod)["mtu"] == mtu


@pytest.mark.parametrize("queues", [4, 256])
def test_macvtap_has_the_queues(cni: Cni, nic: Nic, pod: str, queues: int) -> None:
    """Each queue is one for sending and one for receiving."""
    assert cni("ADD", network_config(nic, queues=queues), NETNS=pod).status == 0
    link = show_link("net1", pod)
    assert (link["num_tx_queues"], link["num_rx_queues"]) == (queues, queues)


def test_bridge_carries_a_network(cni: Cni, nic: Nic, pod: str) -> None:
    """A bridge of the host serves as the NIC, though its ports cannot."""
    run("ip", "link", "add", "xbbr0", "type", "bridge")
    try:
        run("ip", "link", "set", "xbbr0", "up")
        assert cni("ADD", network_config(nic, extbridge={"dev": "xbbr0"}), NETNS=pod).status == 0
        assert show_link("net1", pod)["link_index"] == show_link("xbbr0")["ifindex"]
    finally:
        run("ip", "link", "delete", "xbbr0")


@pytest.mark.parametrize("file", SPELLINGS)
def test_network_is_found_by_name_in_every_spelling(
    cni: Cni, nic: Nic, pod: str, tmp_path: Path, file: str
) -> None:
    """YAML, JSON and XML say the same network, each in a file that is called as the network is."""
    (tmp_path / file).write_text(SPELLINGS[file].replace("NIC", nic.name))
    link = _add_blue(cni, pod, tmp_path)
    assert link["linkinfo"]["info_data"]["mode"] == "bridge"
    assert link["link_index"] == show_link(nic.name)["ifindex"]
    assert link["mtu"] == 1400


@pytest.mark.parametrize("forward", FORWARDS)
def test_network_is_found_in_libvirt_s_own_spelling(
    cni: Cni, nic: Nic, pod: str, tmp_path: Path, forward: str
) -> None:
    """What `virsh net-dumpxml` prints of a macvtap network is taken as it is."""
    text = f"<network connections='1'><name>blue</name>{forward.replace('NIC', nic.name)}</network>"
    (tmp_path / "blue.xml").write_text(text)
    link = _add_blue(cni, pod, tmp_path)
    assert link["linkinfo"]["info_data"]["mode"] == "bridge"
    assert link["link_index"] == show_link(nic.name)["ifindex"]


@pytest.mark.parametrize("first", range(5))
def test_mac_is_the_first_that_is_given(cni: Cni, nic: Nic, pod: str, first: int) -> None:
    """The runtime's MAC goes before args', CNI_ARGS', the pod annotation's and the network's."""
    macs = [f"52:54:00:00:00:{number:02x}" if number >= first else None for number in range(5)]
    config = network_config(nic, mac=macs[4])
    config["capabilities"] = {"mac": True, ANNOTATIONS: True}
    asked = json.dumps({"name": "vepanet", "mac": macs[3]})
    config["runtimeConfig"] = {"mac": macs[0], ANNOTATIONS: {"extbridge.io/networks": asked}}
    config["args"] = {"cni": {"mac": macs[1]}}
    args = f"IgnoreUnknown=1;MAC={macs[2]}" if macs[2] else None
    assert cni("ADD", config, NETNS=pod, ARGS=args).status == 0
    assert show_link("net1", pod)["address"] == macs[first]


def test_derived_mac_is_the_vm_s_own(cni: Cni, lab: Lab, nic: Nic) -> None:
    """A VM's NIC has the same MAC in every pod it is in; another VM, or NIC, has another."""

    def derived(
        pod: str = "vm-a",
        *,
        space: str = "prod",
        vm: str = "",
        ifname: str = "net1",
        **keys: object,
    ) -> str:
        config = network_config(nic, capabilities={ANNOTATIONS: True}, **keys)
        config["runtimeConfig"] = {ANNOTATIONS: {"extbridge.io/vm": vm}}
        args = f"K8S_POD_NAMESPACE={space};K8S_POD_NAME={pod}"
        variables = {"NETNS": netns, "ARGS": args, "IFNAME": ifname}
        assert cni("ADD", config, **variables).status == 0
        mac = show_link(ifname, netns)["address"]
        assert cni("DEL", config, **variables).status == 0
        assert isinstance(mac, str)
        return mac

    netns = lab.pod("vm")
    macs = [
        derived(),
        derived("vm-b"),
        derived(space="test"),
        derived(ifname="net2"),
        derived(name="othernet"),
        derived(vm="database"),
    ]
    assert len(set(macs)) == len(macs)
    assert all(mac.startswith("52:54:00:") for mac in macs)
    assert derived() == macs[0]
    assert derived("vm-c", vm="database") == macs[-1]
    assert derived(macPrefix="0A-BC").startswith("0a:bc:")


@pytest.mark.parametrize(("mode", "other"), [("vepa", "passthru"), ("passthru", "vepa")])
def test_passthru_is_alone_on_its_nic(cni: Cni, lab: Lab, nic: Nic, mode: str, other: str) -> None:
    """A second attachment is refused while one of them needs the whole NIC, and told who has it."""
    pods = [lab.pod("one"), lab.pod("two")]
    _add_for_vm_a(cni, network_config(nic, mode), pods[0], lab.nic())
    before = picture(cni.run_dir, *pods)
    for refused in {other, "passthru"}:
        config = network_config(nic, refused)
        error = cni("ADD", config, NETNS=pods[1], CONTAINERID="c2").error
        assert error["code"] == 105
        assert nic.name in str(error["msg"])
        assert f": net1 ({mode}) of prod/vm-a" in str(error["msg"])
        assert picture(cni.run_dir, *pods) == before
    assert cni("DEL", network_config(nic, mode), NETNS=pods[0]).status == 0
    assert cni("ADD", network_config(nic, other), NETNS=pods[1]).status == 0


def test_passthru_is_refused_beside_a_foreign_macvtap(cni: Cni, nic: Nic, pod: str) -> None:
    """A link that extbridge did not make is in the way as well, and is not blamed on any pod."""
    make_macvtap(nic, "foreign", pod, MAC)
    error = cni("ADD", network_config(nic, "passthru"), NETNS=pod).error
    assert error["code"] == 105
    assert "did not make" in str(error["msg"])


@pytest.mark.parametrize("mac", [MAC, None])
def test_passthru_gives_the_nic_its_mac_back(cni: Cni, nic: Nic, pod: str, mac: str | None) -> None:
    """In passthru mode the NIC has the VM's MAC for as long as the attachment lives."""
    config = network_config(nic, "passthru", mac=mac)
    assert cni("ADD", config, NETNS=pod).status == 0
    address = show_link("net1", pod)["address"]
    assert address == mac or mac is None
    assert show_link(nic.name)["address"] == address != nic.mac
    # A guest joins groups that only it knows: a NIC that filters would keep them from it.
    assert show_link(nic.name)["promiscuity"] == 1
    assert cni("DEL", config, NETNS=pod).status == 0
    assert show_link(nic.name)["promiscuity"] == 0
    assert show_link(nic.name)["address"] == nic.mac


@pytest.mark.parametrize("holder", ["sibling", "NIC", "foreign"])
def test_mac_in_use_is_refused_with_the_holder_s_name(
    cni: Cni, lab: Lab, nic: Nic, *, holder: str
) -> None:
    """Two NICs with one MAC would take each other's frames; ADD says who has it."""
    pods = [lab.pod("one"), lab.pod("two")]
    mac, told = MAC, "net1 (vepa) of prod/vm-a"
    if holder == "NIC":
        mac, told = nic.mac, f"the NIC {nic.name} itself"
    elif holder == "foreign":
        make_macvtap(nic, "foreign", pods[0], MAC)
        told = "a link that extbridge did not make"
    else:
        _add_for_vm_a(cni, network_config(nic, mac=mac), pods[0], lab.nic())
    before = picture(cni.run_dir, *pods)
    config = network_config(nic, mac=mac.upper())
    error = cni("ADD", config, NETNS=pods[1], CONTAINERID="container-2").error
    assert error["code"] == 104
    assert error["msg"] == f"the MAC {mac} is in use on {nic.name} by {told}"
    assert picture(cni.run_dir, *pods) == before


def test_one_mac_may_be_on_two_nics(cni: Cni, lab: Lab, nic: Nic, pod: str) -> None:
    """What counts is the NIC: on another one, which is another network, the MAC is free."""
    for ifname, lower in (("net1", nic), ("net2", lab.nic())):
        config = network_config(lower, mac=MAC)
        assert cni("ADD", config, NETNS=pod, IFNAME=ifname).status == 0
    assert [show_link(name, pod)["address"] for name in ("net1", "net2")] == [MAC, MAC]


def _add_for_vm_a(cni: Cni, config: dict[str, object], pod: str, elsewhere: Nic) -> None:
    """Give the VM its NIC, and another VM the like on another NIC, where it is in nobody's way."""
    other = {**config, "extbridge": {"dev": elsewhere.name}}
    for vm, ifname, given in (("vm-a", "net1", config), ("vm-b", "net2", other)):
        args = f"K8S_POD_NAMESPACE=prod;K8S_POD_NAME={vm}"
        assert cni("ADD", given, NETNS=pod, ARGS=args, IFNAME=ifname).status == 0


def _add_blue(cni: Cni, pod: str, folder: Path) -> dict[str, Any]:
    config = {"cniVersion": "1.1.0", "name": "cluster", "type": "extbridge", "network": "blue"}
    assert cni("ADD", {**config, "networksDir": str(folder)}, NETNS=pod).status == 0
    return show_link("net1", pod)


@contextmanager
def _new_links() -> Iterator[list[bytes]]:
    """The names of links that appear on the host within the block, as the kernel tells them."""
    names: list[bytes] = []
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as monitor:
        monitor.bind((0, RTMGRP_LINK))
        known = {name.encode() for _, name in socket.if_nameindex()}
        yield names
        monitor.settimeout(0)
        while True:
            try:
                told = monitor.recv(1 << 16)
            except BlockingIOError:
                return
            # IFLA_IFNAME is the first attribute, after nlmsghdr and ifinfomsg (rtnl_fill_ifinfo).
            name = told[36:].partition(b"\0")[0]
            if name not in known and name not in names:
                names.append(name)
