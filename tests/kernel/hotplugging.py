"""What tests of hot-plug share."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from extbridge import hotplug
from extbridge.demo.lab import Nic
from extbridge.ledger import Entry, Ledger
from extbridge.plugin import Node
from tests.kernel.agents import until

MAC, PLUGGED = "52:54:00:00:00:01", "52:54:00:00:00:02"

_RELAY: Final = str(Path(__file__).with_name("qmp_relay.py"))


def define_networks(folder: Path, nic: Nic) -> Path:
    """Define vepanet, one of two queues, and one that holds guests to addresses."""
    folder.mkdir()
    for name, keys in (("vepanet", {}), ("queues", {"queues": 2}), ("held", {"antispoof": "ip"})):
        definition: dict[str, object] = {
            "name": name,
            "extbridge": {"mode": "vepa", "dev": nic.name},
            **keys,
        }
        (folder / f"{name}.json").write_text(json.dumps(definition), encoding="ascii")
    return folder


def attach(
    run_dir: Path, networks: Path, qmp: Path | None = None, network: str = "vepanet"
) -> Entry:
    """Attach a NIC, in this process."""
    return hotplug.plug_nic(
        Node(Ledger(run_dir), str(networks)),
        MAC,
        hotplug.AskedNic(network, mac=PLUGGED),
        model="virtio-net-pci",
        cni_path="",
        qmp=None if qmp is None else str(qmp),
    )


@contextmanager
def relayed(netns: str, qmp: Path, command: str) -> Iterator[Path]:
    """A socket in the pod that leads to QEMU's, and does not tell the command's answer."""
    path = qmp.with_name("relay")
    relay = (
        "nsenter",
        f"--net={netns}",
        "--",
        sys.executable,
        _RELAY,
        str(path),
        str(qmp),
        command,
    )
    with subprocess.Popen(relay) as process:
        try:
            until(path.exists)
            yield path
        finally:
            process.kill()
