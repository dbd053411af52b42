"""The compiled shim, put where it is run from: the CNI folder, and `pod/` for VM containers.

A file is replaced by rename: whoever opens it meanwhile has the old one or the new one, whole.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.resources import files
from pathlib import Path
from typing import Final

from extbridge.spec.errors import IoFailure

SHIM: Final = "extbridge"
LAUNCHER: Final = "extbridge-exec"

_BIN_DIR_HINT = (
    "name the folder where the container runtime looks for CNI plugins (containerd: bin_dir,"
    " CRI-O: plugin_dirs; mostly /opt/cni/bin), or make it"
)

_MARK = b"EXTBRIDGE_RUN"
"""In every shim of every version, which asks for this variable."""


def install_shim(folder: Path) -> None:
    """Put shim and launcher into a container runtime's bin_dir; raises IoFailure, OSError.

    What somebody else has put there under one of their names is refused, with nothing done.
    """
    with locked(folder, _BIN_DIR_HINT):
        for name in (SHIM, LAUNCHER):
            path = folder / name
            if os.path.lexists(path) and not _is_ours(path):
                raise IoFailure(
                    f"{path} is there already and is not extbridge's", "move it out of the way"
                )
        for name in (SHIM, LAUNCHER):
            _install(folder / name)


def uninstall_shim(folder: Path) -> list[Path]:
    """Remove shim and launcher; answers what bears their names, is not ours and so was left.

    Raises IoFailure, OSError.
    """
    left = []
    with locked(folder, _BIN_DIR_HINT):
        for name in (SHIM, LAUNCHER):
            path = folder / name
            with suppress(FileNotFoundError):
                os.unlink(draft_of(path))
            if not os.path.lexists(path):
                continue
            if _is_ours(path):
                os.unlink(path)
            else:
                left.append(path)
    return left


def install_launcher(folder: Path) -> None:
    """Put the launcher alone into the folder; raises OSError."""
    _install(folder / LAUNCHER)


@contextmanager
def locked(folder: Path, hint: str) -> Iterator[None]:
    """Have the folder alone, among installers; raises IoFailure with the hint if there is none."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise IoFailure(f"there is no folder {folder}", hint) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def replace_file(path: Path, content: bytes, mode: int, owner: tuple[int, int]) -> None:
    """Put the file there, on disk when this returns; raises OSError.

    Only one may do so at a time. One that is killed leaves a draft, which the next takes over.
    """
    draft = draft_of(path)
    try:
        with open(draft, "wb") as file:
            os.fchown(file.fileno(), *owner)
            os.fchmod(file.fileno(), mode)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
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


def draft_of(path: Path) -> Path:
    """Where a file is written before it is renamed; its name ends in nothing that is looked for."""
    return path.with_name(f".{path.name}.extbridge-draft")


def _install(path: Path) -> None:
    """The one executable goes by both names, and by its name it knows what to do."""
    executable = (files("extbridge") / "shim" / "extbridge").read_bytes()
    replace_file(path, executable, 0o755, (os.geteuid(), os.getegid()))


def _is_ours(path: Path) -> bool:
    return not path.is_symlink() and path.is_file() and _MARK in path.read_bytes()
