"""What launchers do, timed where they stand: run in a pod, it prints its samples as JSON."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections import defaultdict
from pathlib import Path

from extbridge.client import take_taps
from extbridge.node import wire
from extbridge.node.sockets import POD_FOLDER, TAP_SOCKET

_IN_A_ROW = 50
_PAUSE_SECONDS = 1.0
_ROOM = socket.CMSG_SPACE(4 * wire.MAX_FDS)


def main(run_dir: Path, runs: int) -> None:
    """Take the taps of this namespace so many times in each of three ways."""
    samples: dict[str, list[float]] = defaultdict(list)
    launcher = str(run_dir / POD_FOLDER / "extbridge-exec")
    for _ in range(runs):
        samples["/bin/echo in a pod"].append(_time_process(run_dir, "/bin/echo"))
        samples["extbridge-exec /bin/echo"].append(_time_process(run_dir, launcher, "/bin/echo"))
    # Not before: from here on this process has the taps.
    for _ in range(runs):
        samples["hand-off, the wire itself"].append(_time_wire(run_dir))
        samples["hand-off, client.take_taps"].append(_time_client(run_dir))
        if len(samples["hand-off, client.take_taps"]) % _IN_A_ROW == 0:
            # The agent closes its fds behind the scenes, which takes longer; a tap has 256 at most.
            time.sleep(_PAUSE_SECONDS)
    sys.stdout.write(json.dumps(samples))


def _time_process(run_dir: Path, *argv: str) -> float:
    """Until its first word: its end is later, for to close a tap takes a grace period of RCU."""
    heard, said = os.pipe()
    began = time.perf_counter()
    process = os.posix_spawn(
        argv[0],
        argv,
        {"EXTBRIDGE_RUN": str(run_dir)},
        file_actions=[(os.POSIX_SPAWN_DUP2, said, 1)],
    )
    os.close(said)
    assert os.read(heard, 1)
    took = time.perf_counter() - began
    os.close(heard)
    os.waitpid(process, 0)
    return took * 1000


def _time_client(run_dir: Path) -> float:
    began = time.perf_counter()
    taps = take_taps(run=run_dir)
    took = time.perf_counter() - began
    assert taps
    for tap in taps:
        tap.close()
    return took * 1000


def _time_wire(run_dir: Path) -> float:
    request = wire.encode_request(wire.TAPS, {}, b"")
    with socket.socket(socket.AF_UNIX) as agent:
        began = time.perf_counter()
        agent.connect(str(run_dir / TAP_SOCKET))
        agent.sendall(wire.frame_head(request) + request)
        _, rides, _, _ = agent.recvmsg(wire.MAX_TAP_ANSWER_BYTES, _ROOM, socket.MSG_CMSG_CLOEXEC)
        took = time.perf_counter() - began
    ((_, _, fds),) = rides
    for fd in memoryview(fds).cast("i"):
        os.close(fd)
    return took * 1000


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
