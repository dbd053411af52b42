"""What tests of several folders share and no fixture can be: types, and the demand for a tool."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest


@dataclass(frozen=True, slots=True)
class Answer:
    """What an executable answered: `stdout` parsed as JSON, None where there was none."""

    status: int
    stdout: object
    stderr: str

    @property
    def result(self) -> dict[str, object]:
        """The CNI result of a verb that succeeded."""
        assert self.status == 0, f"exit {self.status}: {self.stdout}\n{self.stderr}"
        assert isinstance(self.stdout, dict)
        return self.stdout

    @property
    def error(self) -> dict[str, object]:
        """The CNI error object of a verb that failed."""
        assert self.status != 0, f"succeeded: {self.stdout}"
        assert isinstance(self.stdout, dict), f"no error object: {self.stdout!r}\n{self.stderr}"
        return self.stdout


@dataclass(frozen=True, slots=True)
class Cni:
    """The CNI executable as the runtime calls it: a process, its environment, standard input.

    `wrapper` is the command that runs it, when it does not run as it is; `program` is the path of
    another executable, such as the shim, which is called in the same way.
    """

    run_dir: Path
    wrapper: tuple[str, ...] = ()
    program: str = ""

    def environment(self, verb: str, **variables: str | None) -> dict[str, str]:
        """The process's environment; each of `variables` is a CNI_* without CNI_, None to omit."""
        asked = {
            "COMMAND": verb,
            "CONTAINERID": "container-1",
            "IFNAME": "net1",
            "PATH": "/opt/cni/bin",
            **variables,
        }
        return {
            **{key: value for key, value in os.environ.items() if not key.startswith("CNI_")},
            "EXTBRIDGE_RUN": str(self.run_dir),
            **{f"CNI_{key}": value for key, value in asked.items() if value is not None},
        }

    def start(self, verb: str, **variables: str | None) -> subprocess.Popen[bytes]:
        """Start the executable; whoever calls feeds its standard input and waits for it."""
        return subprocess.Popen(
            (*self.wrapper, self.program or executable("extbridge-cni")),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self.environment(verb, **variables),
        )

    def __call__(
        self, verb: str, config: Mapping[str, object] | bytes = b"", **variables: str | None
    ) -> Answer:
        """Run the verb to its end; `config` given as bytes is passed on as it is."""
        given = config if isinstance(config, bytes) else json.dumps(config).encode()
        with self.start(verb, **variables) as process:
            stdout, stderr = process.communicate(given, timeout=60)
        answered = json.loads(stdout) if stdout else None
        assert (answered is None) == (not stdout), "null is no answer"
        return Answer(process.returncode, answered, stderr.decode())


def executable(name: str) -> str:
    """A console script of the package under test: the one beside the interpreter."""
    return str(Path(sys.executable).with_name(name))


def require(tool: str) -> str:
    """Where the program is. Without it the test is skipped, in CI it fails."""
    found = shutil.which(tool)
    if found is None:
        missing(f"the program {tool}")
    return found


def missing(what: str) -> NoReturn:
    """Skip the test for want of `what`; in CI, fail it."""
    reason = f"{what} is missing: run `make setup`"
    if os.environ.get("CI"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)
