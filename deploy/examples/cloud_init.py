#!/usr/bin/env python3
"""Start a cloud image whose guest finds its addresses by itself (cloud-init, NoCloud).

In a VM's container, in place of extbridge-exec:

    cloud_init.py qemu-system-x86_64 -m 1024 -drive file=debian-12-genericcloud-amd64.qcow2

The taps of the pod are asked for, the addresses that ADD gave them are written as a network-config
of version 2, and QEMU is started with both.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from extbridge.client import NoTaps, Tap, take_taps


def network_config(taps: Sequence[Tap]) -> dict[str, object]:
    """What cloud-init is to make of the NICs, each known by its MAC; without addresses, DHCP."""
    return {"version": 2, "ethernets": {tap.name: _ethernet(tap) for tap in taps}}


def _ethernet(tap: Tap) -> dict[str, object]:
    said: dict[str, object] = {"match": {"macaddress": tap.mac}, "mtu": tap.mtu}
    given = tap.addressing
    if not given.addresses:
        return {**said, "dhcp4": True}
    said["addresses"] = [it.address for it in given.addresses]
    gateways = {":" in it.address: it.gateway for it in given.addresses if it.gateway}
    routes = [
        {"to": route.dst, "via": via}
        for route in given.routes
        if (via := route.gw or gateways.get(":" in route.dst))
    ]
    # Without any route a guest's way out is what gateway its address has.
    said["routes"] = routes or [{"to": "default", "via": via} for via in gateways.values()]
    if given.dns:
        names = {"addresses": given.dns.get("nameservers"), "search": given.dns.get("search")}
        said["nameservers"] = {key: value for key, value in names.items() if value}
    return said


def write_seed(folder: Path, taps: Sequence[Tap]) -> None:
    """Write the files of a NoCloud seed; JSON is YAML too."""
    (folder / "network-config").write_text(json.dumps(network_config(taps), indent=1))
    (folder / "meta-data").write_text(json.dumps({"instance-id": taps[0].mac}))
    (folder / "user-data").write_text("#cloud-config\n{}\n")


def qemu_options(folder: Path, taps: Sequence[Tap]) -> list[str]:
    """The NICs, and the seed as a disk that QEMU makes of the folder."""
    options = ["-drive", f"driver=vvfat,dir={folder},label=cidata,if=virtio,read-only=on"]
    for tap in taps:
        fds = ":".join(map(str, tap.fds))
        several = "s" if len(tap.fds) > 1 else ""
        queues = f",mq=on,vectors={2 * len(tap.fds) + 2}" if several else ""
        options += ["-netdev", f"tap,id={tap.name},fd{several}={fds}"]
        options += ["-device", f"virtio-net-pci,netdev={tap.name},mac={tap.mac}{queues}"]
    return options


def main() -> None:
    """Become the command of the arguments, with taps and seed."""
    if len(sys.argv) == 1:
        sys.exit(f"usage: {sys.argv[0]} COMMAND…, a QEMU without NICs")
    try:
        taps = take_taps()
    except NoTaps as failure:
        sys.exit(f"{sys.argv[0]}: {failure}")
    folder = Path(tempfile.mkdtemp(prefix="cidata-"))
    write_seed(folder, taps)
    for tap in taps:
        for fd in tap.fds:
            os.set_inheritable(fd, True)  # noqa: FBT003 - os takes no keyword
    os.execvp(sys.argv[1], [*sys.argv[1:], *qemu_options(folder, taps)])


if __name__ == "__main__":
    main()
