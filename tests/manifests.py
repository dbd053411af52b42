"""The manifests in deploy/, as users render them."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import yaml

from extbridge.demo.lab import run

DEPLOY: Final = Path(__file__).parents[1] / "deploy"

Manifest = dict[str, Any]


def rendered(folder: Path) -> list[Manifest]:
    """The manifests that kubectl makes of the folder's kustomization."""
    kubectl = Path(sys.executable).with_name("kubectl")
    return list(yaml.safe_load_all(run(str(kubectl), "kustomize", str(folder))))


def the(kind: str, manifests: list[Manifest]) -> Manifest:
    """The one manifest of this kind."""
    (found,) = (it for it in manifests if it["kind"] == kind)
    return found


def write_config_map(folder: Path, data: Mapping[str, str]) -> None:
    """Write the files as kubelet does: links to a link that is renamed when all are there."""
    version = folder / f"..{secrets.token_hex(4)}"
    version.mkdir(parents=True)
    for name, content in data.items():
        (version / name).write_text(content)
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(f"..data/{name}")
    draft = folder / "..data_tmp"
    draft.symlink_to(version.name)
    draft.rename(folder / "..data")
