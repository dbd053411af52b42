"""The demo: from a network definition to two guests that ping each other across a VEPA switch.

Only the physical switch is simulated. What the project does is done by its own executables, called
as a runtime and a VM container call them; what comes of it is asked of the guests, the switch,
iproute2 and nft.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final, NoReturn

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from extbridge.demo.guest import Guest, GuestFailure, boot_files, guest_folder
from extbridge.demo.lab import Frame, Lab, LabFailure, Nic, become_node, receive, run
from extbridge.kernel.taps import has_node
from extbridge.ledger import RUN_VARIABLE

# The pods, and the guests in them, at addresses that are nobody's (TEST-NET-1, RFC 5737).
_ADDRESSES: Final = {"a": "192.0.2.1", "b": "192.0.2.2"}

_IFNAME: Final = "net1"

_PINGS: Final = 3

_PROGRAMS: Final = ("ip", "bridge", "nft")

_INTERRUPTS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# How wide the output is where it is not a terminal's.
_WIDTH: Final = 80


class DemoFailure(Exception):
    """The demo cannot begin, or cannot go on."""


@dataclass(frozen=True, slots=True)
class Claim:
    """What the demo says of extbridge; `remark` is shown beside what was measured."""

    what: str
    expected: str
    measured: str
    remark: str = ""

    @property
    def held(self) -> bool:
        """Whether it is so."""
        return self.measured == self.expected


@dataclass(frozen=True, slots=True)
class _Scene:
    """Where the story plays. `pods` are the paths of their namespaces by name."""

    console: Console
    lab: Lab
    nic: Nic
    pods: Mapping[str, str]
    networks: Path
    run_dir: Path


@dataclass(frozen=True, slots=True)
class _Ping:
    """What the guest said, and how many of its frames the switch got and sent back."""

    lost: str
    rtt: str
    at_switch: str


def tell() -> int:
    """Tell the story on standard output and return the exit status; nothing of it is left.

    0: every claim held. 1: one did not, or the story could not go on. 2: something that it needs
    is missing. 130: it was interrupted. The process is a node of its own afterwards.
    """
    try:
        _demand_what_it_needs()
        become_node()
    except PermissionError as failure:
        _complain(f"{failure.strerror}: run it as root with all capabilities")
        return 2
    except (DemoFailure, GuestFailure, LabFailure, OSError) as failure:
        _complain(str(failure))
        return 2
    for number in _INTERRUPTS:
        signal.signal(number, _interrupt)
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else _WIDTH)
    try:
        with tempfile.TemporaryDirectory(prefix="extbridge-demo-") as folder:
            claims = _play(console, Path(folder))
    except KeyboardInterrupt:
        _complain("interrupted; nothing is left of it")
        return 130
    except (DemoFailure, GuestFailure, LabFailure, OSError) as failure:
        _complain(str(failure))
        return 1
    return _judge(console, claims)


def _demand_what_it_needs() -> None:
    if os.geteuid() != 0:
        raise DemoFailure("it makes network namespaces: run it as root")
    for program in _PROGRAMS:
        if shutil.which(program) is None:
            raise DemoFailure(f"the program {program} is missing: run `make setup`")
    boot_files(guest_folder())


def _complain(what: str) -> None:
    print(f"extbridge demo: {what}", file=sys.stderr)  # noqa: T201 - for the person at the terminal


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:  # noqa: ARG001 - signal's
    # Cleaning up takes seconds at most and starts programs that a second Ctrl-C would reach too.
    for interrupt in _INTERRUPTS:
        signal.signal(interrupt, signal.SIG_IGN)
    raise KeyboardInterrupt


def _play(console: Console, folder: Path) -> list[Claim]:
    with ExitStack() as stack:
        with _step(console, "make a NIC, a switch with reflective relay, and the pods a and b"):
            lab = stack.enter_context(Lab())
            scene = _Scene(
                console=console,
                lab=lab,
                nic=lab.nic(),
                pods={name: lab.pod(name) for name in _ADDRESSES},
                networks=folder,
                run_dir=folder / "run",
            )
        vepa = _attach(scene, "vepa")
        there = _traces(scene, vepa)
        with _booted(scene) as guest:
            reflected = _ping(scene, guest, "reflective relay on")
            lab.set_reflective(scene.nic, on=False)
            unreflected = _ping(scene, guest, "reflective relay off")
        _detach(scene, "vepa")
        bridge = _attach(scene, "bridge")
        with _booted(scene) as guest:
            bridged = _ping(scene, guest, "reflective relay off")
        _detach(scene, "bridge")
        left = _traces(scene, vepa + bridge)
        [link] = json.loads(run("ip", "-json", "link", "show", scene.nic.name))
        frames = 2 * _PINGS
        return [
            Claim("vepa: a pings b", "0% lost", reflected.lost, reflected.rtt),
            Claim("vepa: frames at the switch", f"{frames} in, {frames} back", reflected.at_switch),
            Claim("vepa, relay off: a pings b", "100% lost", unreflected.lost),
            Claim("bridge, relay off: a pings b", "0% lost", bridged.lost, bridged.rtt),
            Claim("bridge: frames at the switch", "0 in, 0 back", bridged.at_switch),
            *(
                Claim(
                    f"after ADD, DEL: {what}",
                    f"{number * len(scene.pods)}, 0",
                    f"{there[what]}, {left[what]}",
                )
                for what, number in _EACH_HAS.items()
            ),
            Claim("after DEL: MAC of the NIC", scene.nic.mac, link["address"]),
        ]


@contextmanager
def _step(console: Console, what: str) -> Iterator[None]:
    """Show at a terminal what is going on, and everywhere, when it is done, how long it took."""
    began = time.monotonic()
    with console.status(what):
        yield
    console.print(f"{time.monotonic() - began:5.1f} s  {what}", soft_wrap=True)


def _attach(scene: _Scene, mode: str) -> list[int]:
    """Define a network of this mode and ADD both pods to it; the ifindexes that came of it."""
    nic = f"<extbridge mode='{mode}' dev='{scene.nic.name}'/>"
    definition = f"<network><name>{mode}net</name>{nic}</network>\n"
    (scene.networks / f"{mode}net.xml").write_text(definition)
    with _step(scene.console, f"ADD both pods to the network {nic}"):
        for pod in scene.pods:
            _call_plugin(scene, "ADD", pod, f"{mode}net")
    ifindexes = []
    for pod, netns in scene.pods.items():
        for link in _list_links(netns, besides=("lo",)):
            ifindexes.append(link["ifindex"])
            _show(scene, f"pod {pod}: {link['ifname']} {link['address']} /dev/tap{link['ifindex']}")
    return ifindexes


def _detach(scene: _Scene, mode: str) -> None:
    with _step(scene.console, "DEL"):
        for pod in scene.pods:
            _call_plugin(scene, "DEL", pod, f"{mode}net")


def _call_plugin(scene: _Scene, verb: str, pod: str, network: str) -> None:
    """Run a verb as a runtime does (SPEC 1.1.0 section 4)."""
    config = {
        "cniVersion": "1.1.0",
        "name": network,
        "type": "extbridge",
        "network": network,
        "networksDir": str(scene.networks),
    }
    plugin = _executable("extbridge-cni")
    environment = {
        **_environment(scene),
        "CNI_COMMAND": verb,
        "CNI_CONTAINERID": f"demo-{pod}",
        "CNI_NETNS": scene.pods[pod],
        "CNI_IFNAME": _IFNAME,
        "CNI_PATH": os.path.dirname(plugin),
    }
    done = subprocess.run(
        plugin,
        input=json.dumps(config),
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise DemoFailure(f"{verb} of pod {pod} failed: {done.stdout.strip()}")


@contextmanager
def _booted(scene: _Scene) -> Iterator[Guest]:
    """The guest in pod a, while it and the one in pod b run."""
    with ExitStack() as stack:
        with _step(scene.console, "boot both guests: extbridge run --netns POD -- qemu…"):
            guests = [
                stack.enter_context(
                    Guest(
                        pod,
                        (_executable("extbridge"), "run", "--netns", netns, "--"),
                        addresses=[f"{_ADDRESSES[pod]}/24"],
                        env=_environment(scene),
                    )
                )
                for pod, netns in scene.pods.items()
            ]
            for guest in guests:
                guest.wait_ready()
        yield guests[0]


def _ping(scene: _Scene, guest: Guest, how: str) -> _Ping:
    command = f"ping -c {_PINGS} -i 0.2 -W 3 {_ADDRESSES['b']}"
    with scene.lab.packets(scene.lab.switch, scene.nic.port) as port:
        with _step(scene.console, f"ping, {how}"):
            said = guest.run(command).output
        frames = [frame for frame in receive(port, seconds=0.1) if _is_icmp(frame)]
    _show(scene, f"{guest.name} # {command}")
    for line in said.splitlines():
        if line.startswith(("64 bytes", f"{_PINGS} packets", "round-trip")):
            _show(scene, line)
    lost = re.search(r"\d+% packet loss", said)
    rtt = re.search(r"= [\d.]+/([\d.]+)/", said)
    return _Ping(
        lost=lost[0].replace("packet loss", "lost") if lost else "ping does not say",
        rtt=f"{float(rtt[1]):.1f} ms" if rtt else "",
        at_switch=f"{sum(not frame.sent for frame in frames)} in,"
        f" {sum(frame.sent for frame in frames)} back",
    )


def _is_icmp(frame: Frame) -> bool:
    return frame.data[12:14] == b"\x08\x00" and frame.data[23] == 1


_EACH_HAS: Final = {"links": 1, "nftables tables": 2, "ledger entries": 1, "/dev/tap nodes": 1}
"""What an attachment is made of: a table keeps the pod out, and one the guest to its MAC."""


def _traces(scene: _Scene, ifindexes: list[int]) -> dict[str, int]:
    """How many there are of all that attachments are made of, on the node and in the pods."""
    namespaces = ("", *scene.pods.values())
    taps = sum(has_node(ifindex) for ifindex in ifindexes)
    return {
        "links": sum(len(_list_links(it, besides=("lo", scene.nic.name))) for it in namespaces),
        "nftables tables": sum(
            len(run("nft", "list", "tables", netns=it).splitlines()) for it in namespaces
        ),
        "ledger entries": sum(path.is_file() for path in scene.run_dir.rglob("*")),
        "/dev/tap nodes": taps,
    }


def _list_links(netns: str, *, besides: tuple[str, ...]) -> list[dict[str, Any]]:
    links: list[dict[str, Any]] = json.loads(run("ip", "-json", "link", netns=netns))
    return [link for link in links if link["ifname"] not in besides]


def _environment(scene: _Scene) -> dict[str, str]:
    return {**os.environ, RUN_VARIABLE: str(scene.run_dir)}


def _executable(name: str) -> str:
    """The program of the package that this process is a program of."""
    return str(Path(sys.argv[0]).resolve().with_name(name))


def _show(scene: _Scene, line: str) -> None:
    scene.console.print(f"         {line}", style="dim", soft_wrap=True)


def _judge(console: Console, claims: list[Claim]) -> int:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("claim", "expected", "measured", ""):
        table.add_column(heading)
    for claim in claims:
        verdict = Text("ok", "green") if claim.held else Text("FAILED", "bold red")
        measured = f"{claim.measured}, {claim.remark}" if claim.remark else claim.measured
        table.add_row(claim.what, claim.expected, measured, verdict)
    console.print(table)
    failed = sum(not claim.held for claim in claims)
    console.print(
        f"{failed} of {len(claims)} claims FAILED" if failed else f"all {len(claims)} claims hold"
    )
    return 1 if failed else 0
