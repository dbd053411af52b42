"""The ledger: what several processes that come, go and are killed may rely on."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from extbridge.ledger import Entry, Holder, Ledger
from extbridge.network.addresses import Address, Addressing, Route
from extbridge.network.definition import Bandwidth
from tests.support import require

ENTRY = Entry(
    container_id="container-1",
    cni_ifname="net1",
    ifname="net1",
    network="vepanet",
    definition="vepanet",
    pod="default/vm",
    netns="/run/netns/vm",
    netns_inode=4026532000,
    ifindex=1 << 30,
    mac="52:54:00:00:00:01",
    mode="vepa",
    lower="eth0",
    lower_ifindex=2,
    mtu=1500,
    queues=1,
    antispoof="ip",
    handoff="fd",
    bandwidth=Bandwidth(1000, None, 2000, 3000),
    addressing=Addressing((Address("192.0.2.7/24", "192.0.2.1"),), (Route("0.0.0.0/0"),)),
    delegation={"config": {"ipam": {"type": "host-local"}}, "path": ["/opt/cni/bin"]},
)

# Each is a process of its own, given the run folder.
PREPARE = """
import sys
from dataclasses import replace
from pathlib import Path
from extbridge.ledger import Ledger
from tests.unit.test_ledger import ENTRY
ledger = Ledger(Path(sys.argv[1]))
"""

# Two states of very different length: a reader that saw half of one would find no entry.
WRITER = """
with ledger.hold(ENTRY.container_id) as held:
    for round in range(1000):
        held.write(replace(ENTRY, mtu=round, pod="long" * 1000 * (round % 2)))
"""

# Attachments come and none goes, as in ADDs.
ADDER = """
with ledger.hold(ENTRY.container_id) as held:
    for number in range(300):
        entry = replace(ENTRY, ifname=f"net{number}")
        held.write(entry)
        held.finish(entry)
"""

# The counter is read and written in two steps that only the lock makes one.
COUNTER = """
counter = Path(sys.argv[1], "counter")
for round in range(100):
    with ledger.hold(ENTRY.container_id) as held:
        assert held.entries() == []
        held.write(ENTRY)
        counted = int(counter.read_text())
        assert held.entries() == [ENTRY]
        counter.write_text(str(counted + 1))
        held.remove(ENTRY.ifname)
"""

# A process whose first thread has ended while another lives on, and holds its fds.
HEADLESS = """
import ctypes, sys, threading
def live():
    print(flush=True)
    sys.stdin.read()
threading.Thread(target=live).start()
ctypes.CDLL(None).pthread_exit(None)
"""


@pytest.fixture
def ledger(run_dir: Path) -> Ledger:
    """An empty ledger."""
    return Ledger(run_dir)


@pytest.mark.parametrize("holder", [None, Holder(1, 2)])
def test_entry_is_read_as_it_was_written(ledger: Ledger, holder: Holder | None) -> None:
    """What was recorded comes back whole, by container and among all."""
    entry = replace(ENTRY, holder=holder, done=True)
    with ledger.hold("container-1") as held:
        held.write(entry)
        assert held.entries() == [entry]
    assert ledger.knows("container-1")
    assert ledger.of("container-1") == [entry]
    assert list(ledger.entries()) == [entry]
    assert ledger.of("container-2") == []


def test_container_without_attachments_leaves_no_trace(ledger: Ledger, run_dir: Path) -> None:
    """The last entry takes the container's folder with it; a failed first one leaves none."""
    with ledger.hold("container-1"):
        pass
    with ledger.hold("container-1") as held:
        held.write(ENTRY)
    with ledger.hold("container-1") as held:
        held.remove("net1")
        held.remove("net1")
    assert not ledger.knows("container-1")
    assert list((run_dir / "ledger").iterdir()) == []


def test_reader_sees_the_old_or_the_new_entry(ledger: Ledger, run_dir: Path) -> None:
    """Whoever reads without the lock while others write never sees half an entry."""
    with ledger.hold("container-1") as held:
        held.write(ENTRY)
    with started(WRITER, run_dir) as writer:
        seen = set()
        while writer.poll() is None:
            (entry,) = ledger.of("container-1")
            seen.add(entry.mtu)
    assert writer.returncode == 0
    assert len(seen) > 1
    assert ledger.of("container-1")[0].mtu == 999


def test_reader_misses_none_that_is_just_done(ledger: Ledger, run_dir: Path) -> None:
    """What has been seen once is seen again, also while it turns from an intent to done."""
    (run_dir / "ledger/container-1").mkdir(parents=True)
    with started(ADDER, run_dir) as adder:
        seen: set[str] = set()
        while adder.poll() is None:
            now = {entry.ifname for entry in ledger.of("container-1")}
            assert seen - now == set()
            seen = now
    assert adder.returncode == 0
    assert [entry.done for entry in ledger.of("container-1")] == [True] * 300


def test_what_is_remembered_is_what_is_there(ledger: Ledger, run_dir: Path) -> None:
    """However often and by whomever it is changed, the ledger is read as it is."""
    other = Ledger(run_dir)
    for number in range(30):
        with other.hold("container-1") as held:
            held.write(replace(ENTRY, mtu=number))
        # By now and then long enough for it to be remembered.
        if number % 10 == 9:
            time.sleep(0.06)
            assert [entry.mtu for entry in ledger.entries()] == [number]
        assert [entry.mtu for entry in ledger.entries()] == [number]
    with other.hold("container-1") as held:
        held.remove(ENTRY.ifname)
    assert list(ledger.entries()) == []


def test_garbage_takes_nothing_with_it(ledger: Ledger, run_dir: Path) -> None:
    """To sweep away what an interrupted write left of an interface keeps the interface's entry."""
    with ledger.hold("container-1") as held:
        held.write(replace(ENTRY, done=True))
        (run_dir / "ledger/container-1/net1.intent").touch()
        held.sweep("other")
        assert [entry.ifname for entry in held.entries()] == ["net1"]
    assert os.listdir(run_dir / "ledger/container-1") == ["net1.json"]


def test_lock_holds_between_processes(run_dir: Path) -> None:
    """Nobody is in a container's ledger with another, although its folder comes and goes."""
    run_dir.mkdir()
    counter = run_dir / "counter"
    counter.write_text("0")
    processes = [started(COUNTER, run_dir) for _ in range(4)]
    for process in processes:
        with process:
            process.wait(timeout=60)
    assert [process.returncode for process in processes] == [0, 0, 0, 0]
    assert counter.read_text() == "400"
    assert list((run_dir / "ledger").iterdir()) == []


def test_containers_do_not_wait_for_each_other(ledger: Ledger) -> None:
    """A slow request for one container holds up no other."""
    with ledger.hold("container-1") as first, ledger.hold("container-2") as second:
        first.write(ENTRY)
        second.write(replace(ENTRY, container_id="container-2"))
    assert {entry.container_id for entry in ledger.entries()} == {"container-1", "container-2"}


@pytest.mark.parametrize(
    "garbage",
    [b"", b"{", b"\xff\xfe", b"null", b"[]", b"{}", b"[" * 100_000, b'{"container_id": 1}'],
    ids=["empty", "cut", "binary", "null", "list", "nothing in it", "bottomless", "wrong type"],
)
def test_file_that_is_no_entry_is_none(ledger: Ledger, run_dir: Path, garbage: bytes) -> None:
    """A file that was damaged costs that entry and nothing else, and can be swept away."""
    with ledger.hold("container-1") as held:
        held.write(ENTRY)
    damaged = run_dir / "ledger/container-1/net0.json"
    damaged.write_bytes(garbage)
    assert list(ledger.entries()) == [ENTRY]
    with ledger.hold("container-1") as held:
        assert held.entries() == [ENTRY]
        held.sweep("net0")
    assert not damaged.exists()
    assert ledger.of("container-1") == [ENTRY]


def test_entry_of_another_version_outlives_its_neighbour(ledger: Ledger, run_dir: Path) -> None:
    """What lacks a field is left alone until its own interface is deleted."""
    with ledger.hold("container-1") as held:
        held.write(ENTRY)
    other = run_dir / "ledger/container-1/net0.json"
    other.write_text('{"ifname": "net0"}')
    for ifname, survives in (("net1", True), ("net0", False)):
        with ledger.hold("container-1") as held:
            held.sweep(ifname)
        assert other.exists() is survives


def test_half_written_draft_goes_with_the_next_request(ledger: Ledger, run_dir: Path) -> None:
    """What a writer that was killed left is no entry, and does not stay."""
    with ledger.hold("container-1") as held:
        held.write(ENTRY)
    draft = run_dir / "ledger/container-1/net2.new"
    draft.write_text("{")
    assert ledger.of("container-1") == [ENTRY]
    with ledger.hold("container-1"):
        pass
    assert not draft.exists()


def test_holder_is_one_process_and_not_its_successor() -> None:
    """A process that got a dead holder's number is not taken for it."""
    with subprocess.Popen([require("cat")], stdin=subprocess.PIPE) as process:
        holder = Holder.of(process.pid)
        assert holder.alive()
        assert holder.started > Holder.of(1).started
        assert not replace(holder, started=holder.started - 1).alive()
    assert not holder.alive()
    with pytest.raises(ProcessLookupError, match=f"{process.pid} is gone"):
        Holder.of(process.pid)


def test_dead_holder_that_nobody_buried_is_dead() -> None:
    """A process that has ended holds nothing, even where its parent does not wait for it."""
    with subprocess.Popen([require("cat")], stdin=subprocess.PIPE) as process:
        holder = Holder.of(process.pid)
        process.kill()
        # Waits for the end, and leaves the process to be waited for.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert not holder.alive()


def test_holder_lives_as_long_as_any_of_its_threads() -> None:
    """A process whose first thread has ended still has its fds, and so the tap."""
    with subprocess.Popen(
        [sys.executable, "-c", HEADLESS], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        wait_for_state("Z", process.pid)
        assert Holder.of(process.pid).alive()


def started(program: str, run_dir: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", PREPARE + program, str(run_dir)])


def wait_for_state(state: str, pid: int) -> None:
    """Wait until the process's first thread is in the state (man 5 proc)."""
    deadline = time.monotonic() + 5
    while f") {state} " not in (shown := Path(f"/proc/{pid}/stat").read_text(encoding="ascii")):
        assert time.monotonic() < deadline, shown
        time.sleep(0.01)
