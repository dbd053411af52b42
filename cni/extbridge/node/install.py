"""The compiled shim, put where it is run from: the CNI folder, and `pod/` for VM containers.

A file is replaced by rename: whoever execs it meanwhile runs the old one or the new one, whole.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Final

from extbridge.spec.errors import IoFailure

SHIM: Final = "extbridge"
LAUNCHER: Final = "extbridge-exec"


def install_shim(folder: Path) -> None:
    """Put shim and launcher into a container runtime's bin_dir; raises IoFailure, OSError."""
    if not folder.is_dir():
        raise IoFailure(
            f"there is no folder {folder}",
            "name the folder where the container runtime looks for CNI plugins (containerd:"
            " bin_dir, CRI-O: plugin_dirs; mostly /opt/cni/bin), or make it",
        )
    for name in (SHIM, LAUNCHER):
        _install(folder / name)


def install_launcher(folder: Path) -> None:
    """Put the launcher alone into the folder; raises OSError."""
    _install(folder / LAUNCHER)


def _install(path: Path) -> None:
    """The one executable goes by both names, and by its name it knows what to do."""
    executable = files("extbridge") / "shim" / "extbridge"
    fd, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with executable.open("rb") as source, open(fd, "wb") as target:
            shutil.copyfileobj(source, target)
            os.fchmod(fd, 0o755)
            os.fsync(fd)
        os.rename(draft, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(draft)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
