"""What tests of attachments share: a configuration, foreign macvtaps, frames, what iproute2 says.

None of it is our own netlink code: what judges extbridge must not share its mistakes.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any, Final

from extbridge.demo.lab import Nic, run

EXPERIMENTAL: Final = 0x88B5
"""The ethertype that IEEE 802 leaves to experiments: no IP stack looks at it."""

_SETTLING: Final = frozenset({"flags", "operstate", "qdisc"})
"""What the kernel still changes after a link is UP (linkwatch_do_dev)."""


def network_config(nic: Nic, mode: str = "vepa", /, **keys: object) -> dict[str, object]:
    """The configuration of `vepanet` on the NIC; `keys` are further ones, or take others' place."""
    return {
        "cniVersion": "1.1.0",
        "name": "vepanet",
        "type": "extbridge",
        "extbridge": {"mode": mode, "dev": nic.name},
        **keys,
    }


def show_link(name: str, netns: str = "") -> dict[str, Any]:
    """The link as iproute2 sees it, on the node or in the namespace at the path."""
    link: dict[str, Any]
    [link] = json.loads(run("ip", "-json", "-details", "link", "show", "dev", name, netns=netns))
    return link


def link_names(netns: str = "") -> set[str]:
    """The names of all links, on the node or in the namespace at the path."""
    return {link["ifname"] for link in json.loads(run("ip", "-json", "link", netns=netns))}


def macvtaps(netns: str) -> list[str]:
    """The names of the namespace's macvtaps."""
    return _links_of_type("macvtap", netns)


def ifbs(netns: str) -> list[str]:
    """The names of the namespace's ifbs, over which limited guests receive."""
    return _links_of_type("ifb", netns)


def tables(netns: str) -> list[str]:
    """The namespace's nftables tables, each with its family."""
    listed = run("nft", "list", "tables", netns=netns)
    return [line.removeprefix("table ") for line in listed.splitlines()]


def ledger_of(run_dir: Path) -> list[str]:
    """All files and folders of the ledger, by their paths in it."""
    folder = run_dir / "ledger"
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def leftovers(pod: str, run_dir: Path) -> list[str]:
    """What there is of attachments in the pod and in the ledger."""
    return [*macvtaps(pod), *ifbs(pod), *tables(pod), *ledger_of(run_dir)]


def picture(run_dir: Path, *pods: str) -> list[object]:
    """All that a request could change, on the node, in the pods and in the ledger."""
    links = [
        {key: value for key, value in link.items() if key not in _SETTLING}
        for netns in ("", *pods)
        for link in json.loads(run("ip", "-json", "-details", "link", netns=netns))
    ]
    rules = [run("nft", "list", "ruleset", netns=pod) for pod in pods]
    return [ledger_of(run_dir), *links, *rules]


def make_macvtap(nic: Nic, name: str, netns: str, mac: str, *options: str) -> None:
    """Make a plain macvtap with iproute2, UP; `options` are those of any link."""
    run("ip", "link", "add", "link", nic.name, "name", name, "netns", netns, "address", mac,
        *options, "type", "macvtap", "mode", "vepa")  # fmt: skip
    run("ip", "link", "set", name, "up", netns=netns)


def frame(to: str, sender: str, payload: bytes, ethertype: int = EXPERIMENTAL) -> bytes:
    """An Ethernet frame, padded to the shortest that a wire carries."""
    header = packed(to) + packed(sender) + struct.pack("!H", ethertype)
    return (header + payload).ljust(60, b"\0")


def packed(mac: str) -> bytes:
    """The six octets of an address."""
    return bytes.fromhex(mac.replace(":", ""))


def _links_of_type(kind: str, netns: str) -> list[str]:
    listed = json.loads(run("ip", "-json", "link", "show", "type", kind, netns=netns))
    # iproute2 shows those of other types as empty objects.
    return sorted(link["ifname"] for link in listed if link)
