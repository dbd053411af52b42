"""ADD makes all or nothing, whichever system call fails or is its last; so does DEL (promise 7).

strace makes the calls of the real executable fail, or kills it as it enters them: all that it makes
from the moment when it first speaks to the kernel, one in each run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import pytest

from extbridge.demo.lab import Lab, Nic
from tests.kernel.observe import leftovers, macvtaps, network_config, show_link
from tests.kernel.strace import CHANGING, Call, disturbed, recorded
from tests.support import Answer, Cni, require

MACS = ("52:54:00:00:00:01", "52:54:00:00:00:02")

# The machine has few cores, and most of each run is spent starting Python.
WORKERS = 3


@dataclass(frozen=True, slots=True)
class Place:
    """A pod, a NIC and a ledger in which one attempt after another is made."""

    nic: Nic
    pod: str
    cni: Cni
    config: Mapping[str, object]
    macs: set[str]

    def attempt(self, verb: str) -> Answer:
        """Run the verb undisturbed."""
        return self.cni(verb, self.config, NETNS=self.pod)

    def attempt_with(self, verb: str, call: Call, fault: str) -> tuple[Answer, str]:
        """Run the verb with a fault at the call; what strace saw says whether it took place."""
        log = self.cni.run_dir / "strace"
        answer = disturbed(self.cni, call, fault, log)(verb, self.config, NETNS=self.pod)
        return answer, log.read_text(encoding="utf-8")

    def assert_clean(self) -> None:
        """All is as it was before the first attempt: pod, ledger, and the NIC's own MAC."""
        assert leftovers(self.pod, self.cni.run_dir) == []
        assert show_link(self.nic.name)["address"] == self.nic.mac

    def assert_whole(self) -> None:
        """Every NIC is there and has its MAC."""
        made = {show_link(name, self.pod)["address"] for name in macvtaps(self.pod)}
        assert made == self.macs


@pytest.fixture(params=["passthru", "chained"])
def places(
    request: pytest.FixtureRequest,
    lab: Lab,
    run_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> list[Place]:
    """Places for runs side by side; one NIC changes its MAC, in one the pod gets two.

    The one has addresses, a limit and whatever else is laid on a link.
    """
    require("strace")
    require("nft")
    # So that each run makes the same calls.
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    found = []
    for number in range(WORKERS):
        nic = lab.nic()
        ledger = run_dir / str(number) / "ledger"
        ledger.mkdir(parents=True)
        macs, config = {MACS[0]}, with_every_policy(nic)
        if request.param == "chained":
            folder = tmp_path / str(number)
            folder.mkdir()
            macs, config = set(MACS), two_nics(nic, folder)
        found.append(Place(nic, lab.pod(f"vm{number}"), Cni(ledger.parent), config, macs))
    return found


def test_add_that_fails_leaves_nothing(places: list[Place], tmp_path: Path) -> None:
    """Each call that ADD makes fails once; then links, rules, ledger and the NIC are as before."""

    def fail(place: Place, call: Call) -> None:
        answer, seen = place.attempt_with("ADD", call, f"error=EIO:when={call.number}")
        assert "(INJECTED)" in seen
        if answer.status > 0:
            assert answer.error["code"] in {5, 102}
        if answer.status == 0:
            # Something that it can do without.
            place.assert_whole()
        # The way back from the pod is the one failure after which the process cannot go on.
        if answer.status <= 0 or call in locking:
            assert answer.status >= 0 or call.name == "setns"
            assert place.attempt("DEL").status == 0
        place.assert_clean()

    # An answer that nobody can be given is the runtime's to follow with DEL.
    calls = [it for it in calls_of(places[0], "ADD", tmp_path) if "write(1," not in it.shown]
    # The folder that is the lock cannot be removed by one who does not have the lock.
    locked = next(n for n, call in enumerate(calls) if call.name == "flock")
    locking = calls[locked - 1 : locked + 3]
    assert len(calls) > 60
    side_by_side(fail, places, calls)


def test_add_whose_rollback_fails_too(places: list[Place], tmp_path: Path) -> None:
    """Where the kernel refuses from one message on, also what would undo it, DEL cleans up."""

    def fail(place: Place, call: Call) -> None:
        _, seen = place.attempt_with("ADD", call, f"error=EIO:when={call.number}+")
        assert "(INJECTED)" in seen
        assert place.attempt("DEL").status == 0
        place.assert_clean()

    calls = [it for it in calls_of(places[0], "ADD", tmp_path) if it.name == "sendto"]
    assert len(calls) > 3
    side_by_side(fail, places, calls)


def test_add_that_is_killed(places: list[Place], tmp_path: Path) -> None:
    """After kill -9 at any point, DEL leaves nothing, and a retried ADD makes all of it."""

    def kill(place: Place, call: Call) -> None:
        for retry in (False, True):
            answer, _ = place.attempt_with("ADD", call, f"signal=KILL:when={call.number}")
            assert answer.status == -9
            if retry:
                again = place.attempt("ADD")
                # One that was made, and only not told of, is the runtime's to delete.
                assert again.status == 0 or (call in told and again.error["code"] == 103)
                place.assert_whole()
            assert place.attempt("DEL").status == 0
            place.assert_clean()

    calls = calls_of(places[0], "ADD", tmp_path)
    told = calls[max(n for n, call in enumerate(calls) if "rename" in call.name) + 1 :]
    calls = [call for call in calls if call.name in CHANGING]
    assert len(calls) > 20
    side_by_side(kill, places, calls)


def test_del_that_is_killed(places: list[Place], tmp_path: Path) -> None:
    """After kill -9 at any point of DEL, the next DEL finishes the work."""

    def kill(place: Place, call: Call) -> None:
        assert place.attempt("ADD").status == 0
        answer, _ = place.attempt_with("DEL", call, f"signal=KILL:when={call.number}")
        assert answer.status == -9
        assert place.attempt("DEL").status == 0
        place.assert_clean()

    assert places[0].attempt("ADD").status == 0
    calls = [it for it in calls_of(places[0], "DEL", tmp_path) if it.name in CHANGING]
    assert len(calls) > 8
    side_by_side(kill, places, calls)


def with_every_policy(nic: Nic) -> dict[str, object]:
    """A NIC of which a guest has the whole, and is held to addresses and rates."""
    limits = {
        "ingressRate": 10**7,
        "ingressBurst": 10**6,
        "egressRate": 10**7,
        "egressBurst": 10**6,
    }
    return network_config(
        nic,
        "passthru",
        mac=MACS[0],
        antispoof="ip",
        bandwidth=limits,
        runtimeConfig={"ips": ["192.0.2.7/24", "2001:db8::7/64"]},
    )


def two_nics(nic: Nic, folder: Path) -> dict[str, object]:
    """A pod's main configuration, behind another plugin, whose annotation asks for two NICs."""
    for name, mac in zip(("first", "second"), MACS, strict=True):
        definition = {"name": name, "mac": mac, "extbridge": {"dev": nic.name}}
        (folder / f"{name}.json").write_text(json.dumps(definition))
    annotations = {"extbridge.io/networks": "first, second"}
    return {
        "cniVersion": "1.1.0",
        "name": "main",
        "type": "extbridge",
        "networksDir": str(folder),
        "capabilities": {"io.kubernetes.cri.pod-annotations": True},
        "runtimeConfig": {"io.kubernetes.cri.pod-annotations": annotations},
        "prevResult": {"cniVersion": "1.1.0", "interfaces": []},
    }


def calls_of(place: Place, verb: str, folder: Path) -> list[Call]:
    """The calls that the verb makes undisturbed, with nothing there afterwards."""
    calls = recorded(place.cni, verb, place.config, place.pod, folder / "recorded")
    if verb == "ADD":
        assert place.attempt("DEL").status == 0
    place.assert_clean()
    return calls


def side_by_side(
    work: Callable[[Place, Call], None], places: Iterable[Place], calls: Iterable[Call]
) -> None:
    """Do the work for every call, each in a place of its own; the failures name their calls."""
    free: SimpleQueue[Place] = SimpleQueue()
    for place in places:
        free.put(place)

    def do(call: Call) -> str:
        place = free.get()
        try:
            work(place, call)
        except AssertionError as failure:
            place.attempt("DEL")
            return f"{call.shown[:120]}: {failure}"
        finally:
            free.put(place)
        return ""

    with ThreadPoolExecutor(WORKERS) as pool:
        failures = list(filter(None, pool.map(do, calls)))
    assert not failures, "\n".join(failures)
