"""What the command line shows of a node, as tables, a tree, or as it is; and whom it asks."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import click

from extbridge.inventory import Told, command_of, list_attachments, list_defined, show_attachments
from extbridge.ledger import Ledger
from extbridge.network.spelling_yaml import values_to_yaml
from extbridge.network.store import DEFAULT_DIRECTORY
from extbridge.node.sockets import METRICS_SOCKET

_ASK_SECONDS: Final = 10.0
_LOOK_SECONDS: Final = 0.25

_COLOURS: Final[Mapping[str, str]] = {
    "in use": "green",
    "ready": "cyan",
    "out of sight": "yellow",
    **dict.fromkeys(("half made", "gone", "down", "no carrier"), "red"),
}
"""Of what inventory calls an attachment's state."""

_NOTHING: Final = "no attachments"
_GAP: Final = "  "
_NARROWEST: Final = 4


@dataclass(frozen=True, slots=True)
class _Column:
    """A column, and what an object has in it; of a `whole` one nothing is cut off.

    Of what is too long its end stays if `ends` says so: that is where names of pods differ.
    """

    title: str
    value: Callable[[Told], str]
    whole: bool = False
    ends: bool = False
    is_number: bool = False


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
    # An agent that is older has its metrics there, and one that ends may not get to the end.
    if b"application/json" not in head:
        return None
    try:
        told: list[Told] = json.loads(body)
    except ValueError:
        return None
    return told


def attachments(run: Path) -> list[Told]:
    """Every attachment (inventory.list_attachments), by the agent or without it."""
    told = ask(run, "/attachments")
    if told is not None:
        return told
    if not (run / "ledger").exists():
        click.echo(f"in {run} no agent answers, and there is no ledger", err=True)
    return list_attachments(Ledger(run))


def shown(run: Path, key: str) -> list[Told]:
    """Those that are meant, with what CHECK says (inventory.show_attachments), likewise."""
    told = ask(run, f"/attachments/{key}")
    return show_attachments(Ledger(run), key) if told is None else told


def defined(run: Path, networks_dir: str | None) -> list[Told]:
    """Every network (inventory.list_defined); the agent's, unless a folder is named."""
    told = ask(run, "/networks") if networks_dir is None else None
    return list_defined(Ledger(run), networks_dir or DEFAULT_DIRECTORY) if told is None else told


def print_attachments(told: Sequence[Told], output: str) -> None:
    """As a table, a wide one, JSON or YAML."""
    _print(told, _ATTACHMENT_WIDE if output == "wide" else _ATTACHMENT, output, _NOTHING)


def print_networks(told: Sequence[Told], output: str) -> None:
    """Likewise."""
    _print(told, _NETWORK, output, "no networks are defined")


def print_tree(told: Sequence[Told]) -> None:
    """From each NIC over its networks and pods to the VM's NICs and who holds them."""
    tree: dict[str, Any] = {}
    if not told:
        click.echo(_NOTHING, err=True)
    for it in told:
        nic = f"{it['interface']} {it['mac']} {' '.join(it['ips'])}".rstrip()
        place = tree
        for step in (it["nic"] or "no NIC", f"{it['network']} ({it['mode']})", _pod(it)):
            place = place.setdefault(step, {})
        holder = it["holder"]
        held: dict[str, Any] = {f"{_holder(holder)} since {holder['since']}": {}} if holder else {}
        place[f"{nic} {_coloured(it['state'])}"] = held
    for nic, below in sorted(tree.items()):
        click.echo(nic)
        for line in _branches(below):
            click.echo(line)


def _branches(tree: Mapping[str, Any], before: str = "") -> Iterator[str]:
    names = sorted(tree)
    for name in names:
        is_last = name == names[-1]
        yield f"{before}{'└── ' if is_last else '├── '}{name}"
        yield from _branches(tree[name], f"{before}{'    ' if is_last else '│   '}")


def print_shown(told: Sequence[Told], output: str) -> None:
    """Everything about each, one below the other."""
    if output in ("json", "yaml"):
        _print_as(told, output)
        return
    for number, it in enumerate(told):
        if number:
            click.echo()
        lines = list(_lines(it))
        width = max(len(name) for name, _ in lines)
        for name, value in lines:
            click.echo(f"{click.style(name.ljust(width), bold=True)}  {value}")


def watched(run: Path) -> Iterator[Mapping[str, str]]:
    """What happens to attachments from now on, as it happens; never ends."""
    ledger = Ledger(run)
    before = _pictures(ledger)
    yield {"time": _now(), "event": "watching"}
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


def _print(told: Sequence[Told], columns: Sequence[_Column], output: str, nothing: str) -> None:
    if output in ("json", "yaml"):
        _print_as(told, output)
        return
    if not told:
        click.echo(nothing, err=True)
        return
    rows = [[column.value(it) for column in columns] for it in told]
    widths = _fitted(columns, rows)
    titles = [column.title for column in columns]
    for row in (titles, *rows):
        cells = []
        for column, cell, width in zip(columns, row, widths, strict=True):
            cut = cell
            if len(cell) > width:
                cut = f"…{cell[1 - width :]}" if column.ends else f"{cell[: width - 1]}…"
            padded = cut.rjust(width) if column.is_number else cut.ljust(width)
            cells.append(_styled(padded, is_title=row is titles))
        click.echo(_GAP.join(cells).rstrip())


def _fitted(columns: Sequence[_Column], rows: Sequence[Sequence[str]]) -> list[int]:
    """How wide each column is: as it needs, or else the widest give way until all have room."""
    widths = [
        max(len(column.title), *(len(row[n]) for row in rows)) for n, column in enumerate(columns)
    ]
    can_give = [n for n, column in enumerate(columns) if not column.whole and not column.is_number]
    excess = sum(widths) + len(_GAP) * (len(widths) - 1) - _room()
    while excess > 0 and any(widths[n] > _NARROWEST for n in can_give):
        widest = max(can_give, key=lambda n: widths[n])
        widths[widest] -= 1
        excess -= 1
    return widths


def _room() -> int:
    """The terminal's width; for a pipe there is no end to it, unless COLUMNS says so."""
    is_bounded = sys.stdout.isatty() or os.environ.get("COLUMNS")
    return shutil.get_terminal_size().columns if is_bounded else sys.maxsize


def _styled(padded: str, *, is_title: bool) -> str:
    text = padded.strip()
    if is_title:
        return padded.replace(text, click.style(text, bold=True))
    return _coloured(text) + padded[len(text) :] if text in _COLOURS else padded


def _print_as(told: Sequence[Told], output: str) -> None:
    click.echo(json.dumps(told, indent=2) if output == "json" else values_to_yaml([told]).rstrip())


def _lines(it: Told) -> Iterator[tuple[str, str]]:
    holder, counters = it["holder"], it["counters"]
    yield "pod", it["pod"] or "none"
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
    yield "held by", f"{_holder(holder)} since {holder['since']}" if holder else "nobody"
    if counters:
        for way in ("rx", "tx"):
            frames, octets = counters[f"{way}_frames"], counters[f"{way}_octets"]
            yield way, f"{frames} frames, {octets} octets"
    drops = [f"{number} by {reason}" for reason, number in it["drops"].items() if number]
    yield "dropped", ", ".join(drops) or "nothing"
    yield "namespace", it["netns"]
    wrong = it["differences"]
    yield "CHECK", click.style("; ".join(wrong), fg="red") if wrong else "all is as ADD made it"


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
        happened.append(f"taken by process {holder.pid} ({command_of(holder) or 'ended'})")
    if after is None and before is not None and before["done"]:
        happened.append("detached")
    for what in happened:
        yield {
            "time": _now(),
            "pod": now["pod"],
            "interface": now["interface"],
            "event": what,
            "network": now["network"],
            "nic": now["nic"],
            "mac": now["mac"],
        }


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _coloured(state: str) -> str:
    return click.style(state, fg=_COLOURS[state])


def _pod(it: Told) -> str:
    return str(it["pod"] or it["container"][:12])


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


def _spoofs(drops: Mapping[str, int]) -> int:
    """What the guest sent and may not; what others sent to it is not its doing."""
    return sum(number for reason, number in drops.items() if reason != "destination")


def _free(it: Told) -> str:
    if "free" not in it:
        return ""
    return "any" if it["free"] is None else str(it["free"])


def _nic(nic: Told) -> str:
    state = "down" if not nic["up"] else "" if nic["carrier"] else "no carrier"
    return f"{nic['name']} ({nic['attachments']}{', ' + state if state else ''})"


def _amiss(it: Told) -> str:
    return str(it["fault"]) or "; ".join(nic["fault"] for nic in it["nics"] if nic["fault"])


_ATTACHMENT: Final = (
    _Column("POD", _pod, ends=True),
    _Column("INTERFACE", lambda it: it["interface"], whole=True),
    _Column("STATE", lambda it: it["state"], whole=True),
    _Column("NETWORK", lambda it: it["network"]),
    _Column("NIC", lambda it: it["nic"]),
    _Column("MAC", lambda it: it["mac"], whole=True),
    _Column("HELD BY", lambda it: _holder(it["holder"])),
)
_ATTACHMENT_WIDE: Final = (
    *_ATTACHMENT,
    _Column("ADDRESSES", lambda it: ",".join(it["ips"])),
    _Column("SINCE", lambda it: it["holder"]["since"] if it["holder"] else ""),
    _Column("MODE", lambda it: it["mode"]),
    _Column("MTU", lambda it: str(it["mtu"]), is_number=True),
    _Column("QUEUES", lambda it: str(it["queues"]), is_number=True),
    _Column("FILTER", lambda it: it["antispoof"]),
    _Column("IN/OUT", lambda it: _rates(it["bandwidth"])),
    _Column("RX", lambda it: _traffic(it["counters"], "rx"), is_number=True),
    _Column("TX", lambda it: _traffic(it["counters"], "tx"), is_number=True),
    _Column("DROPS", lambda it: str(_spoofs(it["drops"])), is_number=True),
)
_NETWORK: Final = (
    _Column("NETWORK", lambda it: it["name"]),
    _Column("MODE", lambda it: it.get("mode", "")),
    _Column("FILTER", lambda it: it.get("antispoof", "")),
    _Column("VMS", lambda it: str(it.get("attachments", "")), is_number=True),
    _Column("FREE", _free, is_number=True),
    _Column("NICS", lambda it: ", ".join(map(_nic, it["nics"]))),
    _Column("AMISS", _amiss),
)
