"""The command line explains itself: a manual page, and a shell that completes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from extbridge.cli import cli
from tests.support import executable, require


def said(*arguments: str, **environ: str) -> str:
    """What `extbridge` prints."""
    return subprocess.run(
        (executable("extbridge"), *arguments),
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_manual_has_every_command_and_option() -> None:
    """What --help says of a command, the manual page says too, and groff has no complaint."""
    page = said("manual")
    for name, command in cli.commands.items():
        assert f"\n.SS {name} " in page
        for parameter in command.params:
            for option in parameter.opts if parameter.param_type_name == "option" else []:
                assert option.replace("-", "\\-") in page
    done = subprocess.run(
        (require("groff"), "-man", "-Tutf8", "-ww", "-z"), input=page, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert done.stderr == ""


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_are_told_how_to_complete(shell: str) -> None:
    """The script asks extbridge itself, by the variable that click knows."""
    assert "_EXTBRIDGE_COMPLETE" in said("completion", shell)


def test_bash_completes_commands(tmp_path: Path) -> None:
    """After `extbridge l` a tab leaves only what begins so."""
    words = {"_EXTBRIDGE_COMPLETE": "bash_complete", "COMP_WORDS": "extbridge l", "COMP_CWORD": "1"}
    assert said(**words).split() == ["plain,list"]
    words = {**words, "COMP_WORDS": "extbridge show 52", "COMP_CWORD": "2"}
    assert said(**words, EXTBRIDGE_RUN=str(tmp_path)) == ""
