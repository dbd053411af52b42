"""The node's kubelet for tests: a process of its own, which may be started again and again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.kernel.agents import SECONDS, until


class Kubelet:
    """`kubelet_process`, in its folder of device plugins; stopped when the `with` block ends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> Self:
        """Start it: it empties its folder."""
        self._process = subprocess.Popen(
            (sys.executable, "-m", "tests.kernel.kubelet_process", str(self.folder)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # gRPC says on standard error whom it has lost.
            env={**os.environ, "GRPC_VERBOSITY": "NONE"},
        )
        return self

    def stop(self) -> None:
        """End it in order; nothing, if it does not run."""
        if self._process is not None:
            self._end(self._process)

    def kill(self) -> None:
        """Kill it: its socket stays behind."""
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._end(self._process)

    def ask(self, do: str, **arguments: object) -> Any:  # noqa: ANN401 - JSON
        """Have it do something, and give its answer."""
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def devices(self, network: str) -> Mapping[str, bool]:
        """The devices of the network's resource, and which are healthy; none without it."""
        devices: Mapping[str, str] = self.ask("state")["devices"].get(f"extbridge.io/{network}", {})
        return {device: health == "Healthy" for device, health in devices.items()}

    def sees(self, network: str, *, healthy: int, unhealthy: int = 0) -> list[str]:
        """Wait until the network has so many devices; the answer is the healthy ones."""

        def seen() -> Mapping[str, bool] | None:
            devices = self.devices(network)
            counted = list(devices.values())
            wanted = (counted.count(True), counted.count(False)) == (healthy, unhealthy)
            return {"": True, **devices} if wanted else None

        return [device for device, able in until(seen).items() if able and device]

    def allocate(self, network: str, *containers: list[str]) -> Any:  # noqa: ANN401 - JSON
        """Ask the network's plugin for devices for each container of a pod."""
        return self.ask("allocate", resource=f"extbridge.io/{network}", containers=containers)

    def _end(self, process: subprocess.Popen[str]) -> None:
        process.communicate(timeout=SECONDS)
        self._process = None
