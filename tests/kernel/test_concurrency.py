"""Requests that come at once, each a process of its own, are as safe as one after the other."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import Popen, TimeoutExpired

import pytest

from extbridge.demo.lab import Lab, Nic
from tests.kernel.observe import (
    ledger_of,
    leftovers,
    macvtaps,
    network_config,
    show_link,
    tables,
)
from tests.kernel.strace import disturbed, recorded
from tests.support import Answer, Cni, require


@dataclass(frozen=True, slots=True)
class Asked:
    """A request to be made."""

    verb: str
    config: Mapping[str, object]
    variables: Mapping[str, str] = field(default_factory=dict)


def test_many_attachments_at_once(lab: Lab, nic: Nic, cni: Cni) -> None:
    """64 ADDs at once on one NIC make 64 attachments, and 64 DELs at once leave none."""
    require("nft")
    pods = [lab.pod(f"pod{number}") for number in range(16)]
    config = network_config(nic)
    attachments = [
        {"NETNS": pod, "CONTAINERID": f"c{number}", "IFNAME": ifname}
        for number, pod in enumerate(pods)
        for ifname in ("net1", "net2", "net3", "net4")
    ]
    added = at_once(cni, (Asked("ADD", config, it) for it in attachments))
    assert [answer.stdout for answer in added if answer.status] == []
    assert [macvtaps(pod) for pod in pods] == [["net1", "net2", "net3", "net4"]] * 16
    links = [show_link(it["IFNAME"], it["NETNS"]) for it in attachments]
    assert len({link["ifindex"] for link in links}) == 64
    assert len({link["address"] for link in links}) == 64
    assert [len(tables(pod)) for pod in pods] == [8] * 16
    assert len(ledger_of(cni.run_dir)) == 16 + 64
    deleted = at_once(cni, (Asked("DEL", config, it) for it in attachments))
    assert [answer.stdout for answer in deleted if answer.status] == []
    assert [leftovers(pod, cni.run_dir) for pod in pods] == [[]] * 16


def test_same_attachment_at_once(nic: Nic, pod: str, cni: Cni) -> None:
    """Of 8 ADDs of one attachment one makes it; the others are told that it is there."""
    config = network_config(nic)
    answers = at_once(cni, [Asked("ADD", config, {"NETNS": pod})] * 8)
    (made,) = [answer for answer in answers if answer.status == 0]
    assert [it.error["code"] for it in answers if it.status] == [103] * 7
    assert cni("CHECK", {**config, "prevResult": made.result}, NETNS=pod).status == 0
    assert cni("DEL", config, NETNS=pod).status == 0
    assert leftovers(pod, cni.run_dir) == []


def test_passthru_at_once(lab: Lab, nic: Nic, cni: Cni) -> None:
    """Of 8 pods that want a NIC for themselves one gets it; the others are told who has it."""
    pods = [lab.pod(f"pod{number}") for number in range(8)]
    config = network_config(nic, "passthru")
    answers = at_once(
        cni, [Asked("ADD", config, {"NETNS": pod, "CONTAINERID": f"c-{pod[-1]}"}) for pod in pods]
    )
    ((made, pod),) = [it for it in zip(answers, pods, strict=True) if it[0].status == 0]
    assert made.result
    assert [it.error["code"] for it in answers if it.status] == [105] * 7
    assert [it for it in pods if macvtaps(it)] == [pod]
    assert ledger_of(cni.run_dir) == [f"c-{pod[-1]}", f"c-{pod[-1]}/net1.json"]
    assert cni("DEL", config, NETNS=pod, CONTAINERID=f"c-{pod[-1]}").status == 0
    assert [leftovers(it, cni.run_dir) for it in pods] == [[]] * 8
    assert show_link(nic.name)["address"] == nic.mac


@pytest.mark.parametrize("mode", ["vepa", "passthru"])
def test_add_and_del_at_once(nic: Nic, pod: str, cni: Cni, mode: str) -> None:
    """However ADDs and DELs of one attachment meet, it is whole or gone, and can be deleted."""
    config = network_config(nic, mode)
    for _ in range(6):
        requests = [Asked(verb, config, {"NETNS": pod}) for verb in ("ADD", "DEL") * 3]
        answers = at_once(cni, requests)
        assert [answer.stdout for answer in answers[1::2]] == [None] * 3
        made = [answer for answer in answers[::2] if answer.status == 0]
        if leftovers(pod, cni.run_dir):
            prev_result = made[-1].result
            assert cni("CHECK", {**config, "prevResult": prev_result}, NETNS=pod).status == 0
        assert cni("DEL", config, NETNS=pod).status == 0
        assert leftovers(pod, cni.run_dir) == []


def test_add_while_a_del_is_under_way(nic: Nic, pod: str, cni: Cni, tmp_path: Path) -> None:
    """A DEL that was overtaken by ADD, wherever it was, leaves the attachment whole or takes it."""
    config = network_config(nic)
    assert cni("DEL", config, NETNS=pod).status == 0
    calls = [
        call
        for call in recorded(cni, "DEL", config, pod, tmp_path / "recorded")
        if call.name in {"mkdir", "flock", "sendto", "rmdir"}
    ]
    assert len(calls) >= 5
    for call in calls:
        log = tmp_path / "log"
        log.write_bytes(b"")
        stopping = disturbed(cni, call, f"signal=STOP:when={call.number}", log)
        overtaken = start(stopping, "DEL", config, pod)
        stopped = wait_until_stopped(log)
        add = start(cni, "ADD", config, pod)
        # It may have to wait for the DEL.
        with suppress(TimeoutExpired):
            add.wait(timeout=0.5)
        os.kill(stopped, signal.SIGCONT)
        deleted, added = finish(overtaken), finish(add)
        assert (deleted.status, added.status) == (0, 0), call
        if leftovers(pod, cni.run_dir):
            check = cni("CHECK", {**config, "prevResult": added.result}, NETNS=pod)
            assert check.status == 0, (call, check)
        assert cni("DEL", config, NETNS=pod).status == 0
        assert leftovers(pod, cni.run_dir) == []


def at_once(cni: Cni, asked: Iterable[Asked]) -> list[Answer]:
    """Start a process for each request, and let all go on when all are there."""
    # Each reads its standard input, to the end, before anything else.
    waiting = [(cni.start(it.verb, **it.variables), it.config) for it in asked]
    for process, config in waiting:
        feed(process, config)
    return [finish(process) for process, _ in waiting]


def start(cni: Cni, verb: str, config: Mapping[str, object], netns: str) -> Popen[bytes]:
    process = cni.start(verb, NETNS=netns)
    feed(process, config)
    return process


def feed(process: Popen[bytes], config: Mapping[str, object]) -> None:
    """Give a process its standard input, and so let it go on."""
    assert process.stdin is not None
    process.stdin.write(json.dumps(config).encode())
    process.stdin.close()
    process.stdin = None


def finish(process: Popen[bytes]) -> Answer:
    with process:
        stdout, stderr = process.communicate(timeout=120)
    parsed = json.loads(stdout) if stdout else None
    return Answer(process.returncode, parsed, stderr.decode())


def wait_until_stopped(log: Path) -> int:
    """Wait until strace has seen its process stop; the process's pid."""
    deadline = time.monotonic() + 10
    while not (seen := re.search(r"(\d+) +--- stopped by", log.read_text(encoding="utf-8"))):
        assert time.monotonic() < deadline, "it was not stopped"
        time.sleep(0.01)
    return int(seen[1])
