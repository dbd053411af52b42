"""The examples in deploy/ do what they say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from extbridge.demo.lab import Nic
from tests.kernel.agents import Agent
from tests.kernel.observe import network_config, show_link
from tests.support import Cni

CLOUD_INIT = Path(__file__).parents[2] / "deploy/examples/cloud_init.py"


def test_cloud_init_tells_the_guest_its_addresses(
    agent: Agent, shim: Cni, nic: Nic, pod: str, tmp_path: Path
) -> None:
    """The seed of a cloud image has each NIC's addresses, routes and name servers, or DHCP."""
    resolv = tmp_path / "resolv.conf"
    resolv.write_text("nameserver 192.0.2.53\nsearch vms.example\n")
    ranges = [
        [{"subnet": "192.0.2.0/24", "gateway": "192.0.2.1"}],
        [{"subnet": "2001:db8::/64", "gateway": "2001:db8::1"}],
    ]
    ipam = {
        "type": "host-local",
        "dataDir": str(tmp_path / "leases"),
        "resolvConf": str(resolv),
        "ranges": ranges,
        "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0", "gw": "2001:db8::fe"}],
    }
    asked = {"NETNS": pod, "PATH": "/usr/lib/cni"}
    assert shim("ADD", network_config(nic, ipam=ipam), **asked).status == 0
    assert shim("ADD", network_config(nic, queues=2), **asked, IFNAME="net2").status == 0
    # In place of QEMU a shell, which shows its options, its files, and that it has its taps.
    script = 'printf "%s\\n" "$@"; echo; readlink /proc/self/fd/*; true'
    done = subprocess.run(
        ("nsenter", f"--net={pod}", "--", sys.executable, CLOUD_INIT, "sh", "-c", script, "qemu"),
        env={"EXTBRIDGE_RUN": str(agent.run_dir), "TMPDIR": str(tmp_path), "PATH": "/usr/bin:/bin"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    shown, _, files = done.stdout.partition("\n\n")
    macs = {name: show_link(name, pod)["address"] for name in ("net1", "net2")}
    assert f"virtio-net-pci,netdev=net1,mac={macs['net1']}\n" in shown
    assert f"virtio-net-pci,netdev=net2,mac={macs['net2']},mq=on,vectors=6" in shown
    taps = [show_link(name, pod)["ifindex"] for name in ("net1", "net2", "net2")]
    assert [line for line in files.splitlines() if "/tap" in line] == [f"/tap{it}" for it in taps]
    [seed] = tmp_path.glob("cidata-*")
    assert f"driver=vvfat,dir={seed},label=cidata" in shown
    assert json.loads((seed / "network-config").read_text()) == {
        "version": 2,
        "ethernets": {
            "net1": {
                "match": {"macaddress": macs["net1"]},
                "mtu": 1500,
                "addresses": ["192.0.2.2/24", "2001:db8::2/64"],
                "routes": [
                    {"to": "0.0.0.0/0", "via": "192.0.2.1"},
                    {"to": "::/0", "via": "2001:db8::fe"},
                ],
                "nameservers": {"addresses": ["192.0.2.53"], "search": ["vms.example"]},
            },
            "net2": {"match": {"macaddress": macs["net2"]}, "mtu": 1500, "dhcp4": True},
        },
    }
