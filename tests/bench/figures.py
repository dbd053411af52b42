"""The figures: each function takes its turns on the stage and adds to the samples.

What is compared is taken in turns, in an order left to chance: whatever else the machine does meets
all alike.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Final, TypeVar
from unittest.mock import patch

from extbridge import attachment, plugin
from extbridge.attachment import alias_of, opened_pod, sweep
from extbridge.kernel.antispoof import Guard
from extbridge.kernel.links import Macvtap, create_macvtap, delete_link, find_link, set_up
from extbridge.kernel.netlink import NETLINK_ROUTE, Netlink
from extbridge.kernel.netns import inside
from extbridge.kernel.silence import silence
from extbridge.kernel.taps import unused_ifindex
from extbridge.ledger import Held, Ledger
from extbridge.network.definition import Mode
from extbridge.reservations import DEVICES
from extbridge.spec import skel
from tests.bench.stage import PODS_OF_A_NODE, BenchFailure, Plugin, Pod, Stage, milliseconds

FEW: Final = 10
MANY: Final = 1000
LISTED: Final = 200
"""Attachments that are listed, one in each pod."""

STEPS: Final = {
    "parse request": (skel, "parse_request"),
    "parse network": (plugin, "wanted_nics"),
    "look at the NIC": (plugin, "usable_nics"),
    "ledger, intent and done": (Held, "write"),
    "RTM_NEWLINK macvtap": (attachment, "create_macvtap"),
    "silence and antispoof": (attachment, "silence"),
    "RTM_NEWLINK up": (attachment, "set_up"),
}
"""The functions that do the most of an ADD; none of them calls another."""

_POOL = 128
_ASKED_AT_ONCE = 16
_READINGS = 10
_NICS = 4

Samples = defaultdict[str, list[float]]
"""What each figure came to, time after time; milliseconds, unless its name says otherwise."""

Undo = Callable[[], None]

T = TypeVar("T")


def time_requests(stage: Stage, samples: Samples, runs: int) -> None:
    """ADD and DEL as processes, and beside them the floors below which they cannot come."""
    take = stage.pods(_POOL)

    def floor(name: str, plugin: Plugin, verb: str) -> Undo:
        samples[name].append(stage.time(plugin, verb, take()))
        return lambda: None

    true = replace(stage.shim, executable="/bin/true")
    jobs: list[Callable[[], Undo]] = [
        lambda: floor("/bin/true", true, ""),
        lambda: floor("shim alone (VERSION)", stage.shim, "VERSION"),
        lambda: _attach(stage, samples, "macvlan", stage.macvlan, take()),
        lambda: _attach(stage, samples, "extbridge", stage.shim, take()),
        lambda: _attach(stage, samples, "extbridge, all off", stage.unguarded, take()),
        lambda: _attach_bare(samples, "kernel", stage.shim.nic, take()),
        lambda: _attach_bare(samples, "kernel, antispoof", stage.shim.nic, take(), guarded=True),
        lambda: _attach_by_steps(stage, samples, take()),
    ]
    for _ in range(runs):
        for undo in _shuffled([job() for job in _shuffled(jobs)]):
            undo()


def time_in_process(stage: Stage, samples: Samples, runs: int) -> None:
    """ADD without an agent: an interpreter for each."""
    take = stage.pods(runs // 10)
    for _ in range(runs // 10):
        _attach(stage, samples, "extbridge-cni", stage.in_process, take())()


def time_start(stage: Stage, samples: Samples, runs: int) -> None:
    """An agent's start, until it says that it serves."""
    for _ in range(max(5, runs // 10)):
        samples["agent's start"].append(stage.time_start())


def time_at_once(stage: Stage, samples: Samples, runs: int) -> None:
    """As many pods as a node has, all at once and one after the other."""
    take = stage.pods(4 * PODS_OF_A_NODE)
    jobs = [
        partial(_at_once, stage, samples, "macvlan", stage.macvlan),
        partial(_at_once, stage, samples, "extbridge", stage.shim),
        partial(_at_once, stage, samples, "extbridge, all off", stage.unguarded),
        partial(_one_by_one, stage, samples, "extbridge", stage.shim),
    ]
    for _ in range(max(1, runs // 40)):
        for job in _shuffled(jobs):
            job([take() for _ in range(PODS_OF_A_NODE)])


def time_hand_off(stage: Stage, samples: Samples, runs: int) -> None:
    """From connecting to the agent to having the taps, in a process that stands in a pod."""
    pod = stage.pods(1)()
    stage.ask(stage.shim, "ADD", pod)
    timed = subprocess.run(
        ("nsenter", f"--net={pod.path}", sys.executable, "-m", "tests.bench.launcher",
         str(stage.run_dir), str(runs)),
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    for name, taken in json.loads(timed.stdout).items():
        samples[name] += taken
    stage.ask(stage.shim, "DEL", pod)


def time_on_full_node(stage: Stage, samples: Samples, runs: int) -> None:
    """ADD among 1,000 attachments, and, before and after, among the 10 that are there anyway."""
    plugins = [stage.another_nic() for _ in range(_NICS)]
    take, take_standing = stage.pods(_POOL), stage.pods(MANY - FEW)
    standing = [
        (plugin, take_standing())
        for plugin, _ in zip(cycle(plugins), range(MANY - FEW), strict=False)
    ]

    def some(among: int, runs: int) -> None:
        for _ in range(runs):
            for undo in (
                _attach(stage, samples, f"extbridge among {among}", plugins[0], take()),
                _attach_bare(samples, f"kernel among {among}", plugins[0].nic, take()),
            ):
                undo()

    some(FEW, runs // 2)
    _ask_at_once(stage, "ADD", standing[: LISTED - FEW])
    for _ in range(max(5, runs // 10)):
        samples["extbridge list"].append(stage.time_command("list"))
        samples["extbridge --help"].append(stage.time_command("--help"))
    _ask_at_once(stage, "ADD", standing[LISTED - FEW :])
    some(MANY, runs)
    _ask_at_once(stage, "DEL", standing)
    some(FEW, runs // 2)


def time_with_everything(stage: Stage, samples: Samples, runs: int) -> None:
    """An agent with Kubernetes and device plugins, as a node has it: start, Allocate, ADD, size.

    ADD is in turns with that of an agent that has neither.
    """
    kubelet = stage.make_cluster()
    for _ in range(max(5, runs // 10)):
        samples["agent's start, everything on"].append(stage.time_start(*stage.in_cluster))
    member = stage.join_cluster()
    [device, *_] = kubelet.sees(stage.network, healthy=DEVICES)
    resource = f"extbridge.io/{stage.network}"
    for name in ("", "Allocate"):
        # The first ones meet cold caches.
        taken = kubelet.ask("time_allocate", resource=resource, device=device, times=runs)
        if name:
            samples[name] += taken
    take, take_known = stage.pods(_POOL), stage.pods(_POOL, known=True)
    jobs: list[Callable[[], Undo]] = [
        lambda: _attach(stage, samples, "extbridge, everything on", member, take_known()),
        lambda: _attach(stage, samples, "extbridge beside it", stage.shim, take()),
    ]
    for _ in range(runs):
        for undo in _shuffled([job() for job in _shuffled(jobs)]):
            undo()
    standing = [(member, take_known()) for _ in range(PODS_OF_A_NODE)]
    _ask_at_once(stage, "ADD", standing)
    samples["agent RSS, everything on, KiB"].append(_resident_kib(stage.member))
    _ask_at_once(stage, "DEL", standing)


def watch_size(stage: Stage, samples: Samples, pairs: int) -> None:
    """The agent's memory and open files over so many ADDs, each with its DEL."""
    take = stage.pods(_POOL)
    for _ in range(_READINGS):
        _read_size(stage, samples)
        asked = [(stage.shim, take()) for _ in range(pairs // _READINGS)]
        for at in range(0, len(asked), _POOL):
            for verb in ("ADD", "DEL"):
                _ask_at_once(stage, verb, asked[at : at + _POOL])
    _read_size(stage, samples)


def stand(stage: Stage) -> None:
    """Make the few attachments that any node has."""
    take = stage.pods(FEW)
    for _ in range(FEW):
        stage.ask(stage.shim, "ADD", take())


def _attach(stage: Stage, samples: Samples, name: str, plugin: Plugin, pod: Pod) -> Undo:
    samples[f"ADD {name}"].append(stage.time(plugin, "ADD", pod))
    return lambda: samples[f"DEL {name}"].append(stage.time(plugin, "DEL", pod))


def _attach_bare(samples: Samples, name: str, nic: str, pod: Pod, *, guarded: bool = False) -> Undo:
    """The kernel's part alone: a macvtap like ours by the messages that it takes."""
    with Netlink(NETLINK_ROUTE) as host:
        lower = find_link(host, name=nic)
        assert lower is not None
        mac = bytes([0x52, 0x54, 0x01, *secrets.token_bytes(3)]).hex(":")
        wanted = Macvtap(unused_ifindex(), "net1", mac, Mode.BRIDGE, lower.ifindex, lower.mtu, 1)
        samples[f"ADD {name}"].append(milliseconds(lambda: create_macvtap(host, wanted, pod.netns)))
    guard = Guard(mac, None) if guarded else None
    with opened_pod(pod.netns) as entered:
        with inside(pod.netns):
            samples[f"silence {name}"].append(
                milliseconds(lambda: silence(wanted.ifindex, "net1", guard))
            )
        alias = alias_of(pod.container_id, "net1")
        samples[f"up {name}"].append(
            milliseconds(lambda: set_up(entered.route, wanted.ifindex, alias=alias))
        )

    def undo() -> None:
        with opened_pod(pod.netns) as entered:
            samples[f"DEL {name}"].append(
                milliseconds(lambda: delete_link(entered.route, wanted.ifindex))
            )
            sweep(entered)
        _settle()

    return undo


def _attach_by_steps(stage: Stage, samples: Samples, pod: Pod) -> Undo:
    """The verb as the agent runs it, in this process, which can look at its watch in between."""
    ledger = Ledger(stage.run_dir.with_name("steps"))
    served = plugin.verbs(plugin.Node(ledger))
    config = stage.shim.config.read_bytes()

    def serve(verb: str) -> None:
        answer = skel.run(stage.environment(verb, pod), config, served, netns_fd=pod.netns)
        if answer.exit_code != 0:
            raise BenchFailure(answer.stdout.decode())

    with _watched_steps() as steps:
        whole = milliseconds(lambda: serve("ADD"))
    for name, took in steps.items():
        samples[f"step: {name}"].append(took)
    samples["step: the rest of the verb"].append(whole - sum(steps.values()))
    samples["verb ADD"].append(whole)

    def undo() -> None:
        serve("DEL")
        _settle()

    return undo


def _settle() -> None:
    """Wait for the sockets that unsilence_absent closes behind the scenes.

    A process that was started meanwhile would inherit one, and its exec wait for the kernel.
    """
    for thread in threading.enumerate():
        if thread is not threading.current_thread():
            thread.join()


@contextmanager
def _watched_steps() -> Iterator[dict[str, float]]:
    """Milliseconds spent in each of STEPS during the block."""
    steps = dict.fromkeys(STEPS, 0.0)

    def watched(name: str, step: Callable[..., object]) -> Callable[..., object]:
        def run(*args: object, **named: object) -> object:
            began = time.perf_counter()
            try:
                return step(*args, **named)
            finally:
                steps[name] += (time.perf_counter() - began) * 1000

        return run

    with ExitStack() as patches:
        for name, (owner, attribute) in STEPS.items():
            step = getattr(owner, attribute)
            patches.enter_context(patch.object(owner, attribute, watched(name, step)))
        yield steps


def _at_once(
    stage: Stage, samples: Samples, name: str, plugin: Plugin, pods: Sequence[Pod]
) -> None:
    for verb in ("ADD", "DEL"):
        samples[f"{len(pods)} {verb}s at once {name}"].append(
            stage.time_at_once(plugin, verb, pods)
        )


def _one_by_one(
    stage: Stage, samples: Samples, name: str, plugin: Plugin, pods: Sequence[Pod]
) -> None:
    for verb in ("ADD", "DEL"):
        samples[f"{len(pods)} {verb}s one by one {name}"].append(
            sum(stage.time(plugin, verb, pod) for pod in pods)
        )


def _ask_at_once(stage: Stage, verb: str, asked: Iterable[tuple[Plugin, Pod]]) -> None:
    with ThreadPoolExecutor(_ASKED_AT_ONCE) as threads:
        list(threads.map(lambda it: stage.ask(it[0], verb, it[1]), asked))


def _read_size(stage: Stage, samples: Samples) -> None:
    # What the last DELs closed behind the scenes is closed by then.
    time.sleep(0.2)
    samples["agent RSS, KiB"].append(_resident_kib(stage.agent))
    samples["agent fds"].append(float(len(os.listdir(f"/proc/{stage.agent}/fd"))))


def _resident_kib(pid: int) -> float:
    """The memory of the process."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return float(status.partition("VmRSS:")[2].split()[0])


def _shuffled(items: Iterable[T]) -> list[T]:
    shuffled = list(items)
    secrets.SystemRandom().shuffle(shuffled)
    return shuffled
