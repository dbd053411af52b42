"""The image of the Dockerfile, as it was built: what nodes load, and nothing else."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from typing import Any, Final

import pytest

from tests.e2e.image import ARCHIVE
from tests.support import missing

_MOST_ADDED: Final = 150_000_000


@pytest.fixture
def image() -> Iterator[tarfile.TarFile]:
    """The archive."""
    if not ARCHIVE.exists():
        missing(f"the image {ARCHIVE}")
    with tarfile.open(ARCHIVE) as archive:
        yield archive


def test_image_adds_little_to_its_base(image: tarfile.TarFile) -> None:
    """A node that has the base loads 150 MB at most for the agent, before compression."""
    _, *added = _manifest(image)["Layers"]
    assert sum(image.getmember(layer).size for layer in added) <= _MOST_ADDED


def test_image_has_what_runs_and_not_what_built_it(image: tarfile.TarFile) -> None:
    """Compilers, installers, their caches and how they found their indexes are not in the image."""
    _, *added = _manifest(image)["Layers"]
    names = set()
    for layer in added:
        content = image.extractfile(layer)
        with tarfile.open(fileobj=content) as files:
            # A name with .wh. takes something away (OCI image specification, "Whiteouts").
            names |= {f"/{file.name}" for file in files if "/.wh." not in file.name}
    assert {"/opt/extbridge/bin/extbridge", "/opt/extbridge/bin/extbridge-shim"} <= names
    assert not {name for name in names if name.rpartition("/")[2] in {"gcc", "musl-gcc", "pip"}}
    assert not {name for name in names if name.startswith(("/var/lib/apt/lists/", "/source"))}
    assert not {name for name in names if "/.cache" in name or name.endswith("pip.conf")}
    # What comes only with that half of the Kubernetes client which is left out.
    assert not {
        name for name in names if "/kubernetes/aio/" in name or "/site-packages/aiohttp" in name
    }


def test_image_says_what_it_is(image: tarfile.TarFile) -> None:
    """Whoever finds the image on a node reads of which version it is, and under which licence."""
    content = image.extractfile(_manifest(image)["Config"])
    assert content is not None
    config = json.load(content)["config"]
    prefix = "org.opencontainers.image"
    assert config["Labels"][f"{prefix}.title"] == "extbridge"
    assert config["Labels"][f"{prefix}.licenses"] == "Apache-2.0"
    assert config["Labels"][f"{prefix}.version"]
    assert len(config["Labels"][f"{prefix}.revision"]) == 40
    assert config["Entrypoint"] == ["extbridge"]


def _manifest(image: tarfile.TarFile) -> dict[str, Any]:
    content = image.extractfile("manifest.json")
    assert content is not None
    (manifest,) = json.load(content)
    assert isinstance(manifest, dict)
    return manifest
