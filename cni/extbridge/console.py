"""What the command line shows of a node, as tables, a tree, or as it is; and whom it asks."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.tree import Tree

from extbridge.inventory import Told, list_attachments, list_defined, show_attachments
from extbridge.ledger import Holder, Ledger
from extbridge.network.spelling_yaml import values_to_yaml
from extbridge.network.store import DEFAULT_DIRECTORY
from extbridge.node.sockets import METRICS_SOCKET

_ASK_SECONDS: Final = 10.0
_LOOK_SECONDS: Final = 0.25

_PIPED_WIDTH: Final = 10_000
"""Nothing is cut off for whoever reads a pipe."""

_STATES: Final[Mapping[str, str]] = {"in use": "green", "ready": "cyan"}
_AMISS: Final = "red"

_Column = tuple[str, Callable[[Told], str], dict[str, Any]]


def ask(run: Path, path: str) -> list[Told] | None:
    """What the agent that serves the folder has at the path; None where none answers."""
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_ASK_SECONDS)
            connection.connect(str(run / METRICS_SOCKET))
            connection.sendall(f"GET {quote(path)} HTTP/1.0\r\n\r\n".encode())
            answer = b""
            while octets := connection.recv(1 << 16):
                answer += octets
    except OSError:
        return None
    head, _, body = answer.partition(b"\r\n\r\n")
    # An agent that is older has its metrics there.
    if b"application/json" not in head:
        return None
    told: list[Told] = json.loads(body)
    return told


def attachments(run: Path) -> list[Told]:
    """Every attachment (inventory.list_attachments), by the agent or without it."""
    told = ask(run, "/attachments")
    return list_attachments(Ledger(run)) if told is None else told


def shown(run: Path, key: str) -> list[Told]:
    """Those that are meant, with what CHECK says (inventory.show_attachments), likewise."""
    told = ask(run, f"/attachments/{key}")
    return show_attachments(Ledger(run), key) if told is None else told


def defined(run: Path, networks_dir: str | None) -> list[Told]:
    """Every network (inventory.list_defined); the agent's, unless a folder is named."""
    told = ask(run, "/networks") if networks_dir is None else None
    return list_defined(Ledger(run), networks_dir or DEFAULT_DIRECTORY) if told is None else told


def print_attachments(told: Sequence[Told], output: str, *, colour: bool) -> None:
    """As a table, a wide one, JSON or YAML."""
    columns = _ATTACHMENT_WIDE if output == "wide" else _ATTACHMENT
    _print(told, columns, output, colour=colour, nothing="no attachments")


def print_networks(told: Sequence[Told], output: str, *, colour: bool) -> None:
    """Likewise."""
    _print(told, _NETWORK, output, colour=colour, nothing="no networks are defined")


def print_tree(told: Sequence[Told], *, colour: bool) -> None:
    """From each NIC over its networks and pods to the VM's NICs and who holds them."""
    by_nic: defaultdict[str, defaultdict[str, defaultdict[str, list[Told]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    for it in told:
        network = f"{it['network']} ({it['mode']})"
        by_nic[it["nic"] or "no NIC"][network][it["pod"] or it["container"][:12]].append(it)
    console = _console(colour=colour)
    for nic, networks in sorted(by_nic.items()):
        tree = Tree(escape(nic))
        for network, pods in sorted(networks.items()):
            branch = tree.add(escape(network))
            for pod, its in sorted(pods.items()):
                twig = branch.add(escape(pod))
                for it in its:
                    said = f"{it['interface']} {it['mac']} {' '.join(it['ips'])}".rstrip()
                    leaf = twig.add(f"{escape(said)} {_coloured(it['state'])}")
                    if it["holder"]:
                        leaf.add(escape(f"{_holder(it['holder'])} since {it['holder']['since']}"))
        console.print(tree, soft_wrap=not console.is_terminal)


def print_shown(told: Sequence[Told], output: str, *, colour: bool) -> None:
    """Everything about each, one below the other."""
    if output in ("json", "yaml"):
        _print_as(told, output)
        return
    console = _console(colour=colour)
    for number, it in enumerate(told):
        if number:
            console.print()
        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_column(no_wrap=True, style="bold")
        table.add_column(overflow="fold")
        for name, value in _lines(it):
            table.add_row(name, value)
        console.print(table)


def watched(run: Path) -> Iterator[Mapping[str, str]]:
    """What happens to attachments from now on, as it happens; never ends."""
    before = _pictures(Ledger(run))
    ledger = Ledger(run)
    while True:
        time.sleep(_LOOK_SECONDS)
        after = _pictures(ledger)
        for key in {**before, **after}:
            yield from _events(before.get(key), after.get(key))
        before = after


def print_event(event: Mapping[str, str], output: str) -> None:
    """One line."""
    if output == "json":
        click.echo(json.dumps(event))
        return
    click.echo(" ".join(value for value in event.values() if value))


def _print(
    told: Sequence[Told], columns: Sequence[_Column], output: str, *, colour: bool, nothing: str
) -> None:
    if output in ("json", "yaml"):
        _print_as(told, output)
        return
    console = _console(colour=colour)
    if not told:
        click.echo(nothing, err=True)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title, _, options in columns:
        table.add_column(title, **{"no_wrap": True, "overflow": "ellipsis", **options})
    for it in told:
        table.add_row(*(value(it) for _, value, _ in columns))
    console.print(table)


def _print_as(told: Sequence[Told], output: str) -> None:
    click.echo(json.dumps(told, indent=2) if output == "json" else values_to_yaml([told]).rstrip())


def _console(*, colour: bool) -> Console:
    """A terminal's width and colours; for a pipe no colours, and room for all."""
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else _PIPED_WIDTH
    return Console(width=width, no_color=not colour, highlight=False)


def _lines(it: Told) -> Iterator[tuple[str, str]]:
    holder, counters = it["holder"], it["counters"]
    yield "pod", escape(it["pod"]) or "none"
    yield "container", it["container"]
    yield "interface", f"{it['interface']} ({it['device']})"
    yield "state", _coloured(it["state"])
    yield "network", f"{it['network']}, {it['mode']} on {it['nic']}"
    yield "MAC", it["mac"]
    if it["ips"]:
        yield "addresses", ", ".join(it["ips"])
    yield "MTU, queues", f"{it['mtu']}, {it['queues']}"
    yield "filter", it["antispoof"]
    yield "rate in/out", _rates(it["bandwidth"]) or "not limited"
    yield "handed over as", it["handoff"]
    yield "held by", escape(f"{_holder(holder)} since {holder['since']}") if holder else "nobody"
    if counters:
        for way in ("rx", "tx"):
            frames, octets = counters[f"{way}_frames"], counters[f"{way}_octets"]
            yield way, f"{frames} frames, {octets} octets"
    drops = [f"{number} by {reason}" for reason, number in it["drops"].items() if number]
    yield "dropped", ", ".join(drops) or "nothing"
    yield "namespace", it["netns"]
    wrong = it["differences"]
    yield "CHECK", f"[{_AMISS}]{escape('; '.join(wrong))}[/]" if wrong else "all is as ADD made it"


def _pictures(ledger: Ledger) -> dict[tuple[str, str], Mapping[str, Any]]:
    return {
        (it.container_id, it.ifname): {
            "pod": it.pod or it.container_id[:12],
            "interface": it.ifname,
            "network": it.definition,
            "nic": it.lower,
            "mac": it.mac,
            "done": it.done,
            "holder": it.holder,
        }
        for it in ledger.entries()
    }


def _events(before: Told | None, after: Told | None) -> Iterator[Mapping[str, str]]:
    now = after or before or {}
    was, holder = (before or {}).get("holder"), now["holder"] if after else None
    happened = []
    if after is not None and after["done"] and not (before is not None and before["done"]):
        happened.append("attached")
    if was is not None and was != holder:
        happened.append(f"given back by process {was.pid}")
    if holder is not None and was != holder:
        happened.append(f"taken by process {holder.pid}{_command(holder)}")
    if after is None and before is not None and before["done"]:
        happened.append("detached")
    for what in happened:
        yield {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "pod": now["pod"],
            "interface": now["interface"],
            "event": what,
            "network": now["network"],
            "nic": now["nic"],
            "mac": now["mac"],
        }


def _command(holder: Holder) -> str:
    with suppress(OSError):
        return f" ({Path(f'/proc/{holder.pid}/comm').read_text(encoding='utf-8').strip()})"
    return ""


def _coloured(state: str) -> str:
    return f"[{_STATES.get(state, _AMISS)}]{state}[/]"


def _holder(holder: Told | None) -> str:
    return "" if holder is None else f"{holder['pid']} {holder['command'] or '(ended)'}"


def _rates(limits: Told | None) -> str:
    if limits is None:
        return ""
    rates = (limits["ingress_rate"], limits["egress_rate"])
    return "/".join("-" if rate is None else _short(rate) for rate in rates)


def _traffic(counters: Told | None, way: str) -> str:
    return "" if counters is None else _short(counters[f"{way}_octets"])


def _short(number: float) -> str:
    """In at most five characters, by thousands."""
    for unit in ("", "k", "M", "G", "T"):
        if number < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.0f}P"


def _free(it: Told) -> str:
    if "free" not in it:
        return ""
    return "any" if it["free"] is None else str(it["free"])


def _nic(nic: Told) -> str:
    state = "down" if not nic["up"] else "" if nic["carrier"] else "no carrier"
    said = f"{escape(nic['name'])} ({nic['attachments']}{', ' + state if state else ''})"
    return f"[{_AMISS}]{said}[/]" if nic["fault"] or state else said


def _amiss(it: Told) -> str:
    faults = [it["fault"], *(nic["fault"] for nic in it["nics"])]
    return "; ".join(escape(fault) for fault in faults if fault)


_ATTACHMENT: Final[Sequence[_Column]] = (
    ("POD", lambda it: it["pod"] or it["container"][:12], {}),
    ("INTERFACE", lambda it: it["interface"], {}),
    ("STATE", lambda it: _coloured(it["state"]), {}),
    ("NETWORK", lambda it: it["network"], {}),
    ("NIC", lambda it: it["nic"], {}),
    ("MAC", lambda it: it["mac"], {"min_width": 17}),
    ("ADDRESSES", lambda it: ",".join(it["ips"]), {}),
    ("HELD BY", lambda it: _holder(it["holder"]), {}),
)
_ATTACHMENT_WIDE: Final[Sequence[_Column]] = (
    *_ATTACHMENT,
    ("SINCE", lambda it: it["holder"]["since"] if it["holder"] else "", {}),
    ("MODE", lambda it: it["mode"], {}),
    ("MTU", lambda it: str(it["mtu"]), {"justify": "right"}),
    ("QUEUES", lambda it: str(it["queues"]), {"justify": "right"}),
    ("FILTER", lambda it: it["antispoof"], {}),
    ("RATE IN/OUT", lambda it: _rates(it["bandwidth"]), {}),
    ("RX", lambda it: _traffic(it["counters"], "rx"), {"justify": "right"}),
    ("TX", lambda it: _traffic(it["counters"], "tx"), {"justify": "right"}),
    ("DROPS", lambda it: str(sum(it["drops"].values())), {"justify": "right"}),
    ("DEVICE", lambda it: it["device"], {}),
)
_NETWORK: Final[Sequence[_Column]] = (
    ("NETWORK", lambda it: it["name"], {}),
    ("MODE", lambda it: it.get("mode", ""), {}),
    ("FILTER", lambda it: it.get("antispoof", ""), {}),
    ("VMS", lambda it: str(it.get("attachments", "")), {"justify": "right"}),
    ("FREE", _free, {"justify": "right"}),
    ("NICS", lambda it: ", ".join(map(_nic, it["nics"])), {"no_wrap": False}),
    ("AMISS", _amiss, {"no_wrap": False}),
)
