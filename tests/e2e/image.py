"""A container image for VM pods: QEMU with all it needs, a guest, and busybox.

Written as an archive that `ctr images import` takes, from the programs of the machine: no registry
and no other image is needed.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from extbridge.demo.guest import boot_files, guest_folder
from extbridge.demo.lab import run
from tests.support import require

ARCHIVE: Final = Path(__file__).parents[2] / ".image/extbridge.tar"
"""The agent's image, as `make image` has built it."""

IMAGE: Final = "localhost/extbridge-guest:1"

KERNEL: Final = Path("/boot/vmlinuz")
INITRAMFS: Final = Path("/boot/initramfs")


def write_image(path: Path) -> None:
    """Write the archive; a container of the image that is given no command sleeps."""
    layer = _tar({str(name): source.read_bytes() for name, source in _files().items()}, "tmp")
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {
            "Entrypoint": ["/bin/busybox", "sleep", "2147483647"],
            "Env": ["PATH=/usr/bin:/bin"],
        },
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
    }
    manifest = [{"Config": "config.json", "RepoTags": [IMAGE], "Layers": ["layer.tar"]}]
    path.write_bytes(
        _tar(
            {
                "manifest.json": json.dumps(manifest).encode(),
                "config.json": json.dumps(config).encode(),
                "layer.tar": layer,
            }
        )
    )


def _files() -> dict[Path, Path]:
    """What the image has, each file with where it comes from."""
    qemu = Path(require("qemu-system-x86_64"))
    kernel, initramfs = boot_files(guest_folder())
    files = {
        KERNEL: kernel,
        INITRAMFS: initramfs,
        Path("/bin/busybox"): Path(require("busybox")),
        Path("/usr/bin", qemu.name): qemu,
    }
    # Libraries as the loader names them; without "=>" that is the loader itself.
    libraries = re.findall(r"(/\S+) \(0x", run("ldd", str(qemu)))
    # The firmware of the machine, and what QEMU loads when it starts, where Debian has them.
    parts = (
        *Path("/usr/lib").glob("*/qemu/accel-tcg-*.so"),
        *Path("/usr/share/seabios").iterdir(),
        *Path("/usr/share/qemu").iterdir(),
    )
    return files | {path: path for path in (*map(Path, libraries), *parts) if path.is_file()}


def _tar(files: Mapping[str, bytes], *folders: str) -> bytes:
    """An archive of these files, for everybody to read and execute, and folders for all to use."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name in folders:
            folder = tarfile.TarInfo(name)
            folder.type, folder.mode = tarfile.DIRTYPE, 0o1777
            archive.addfile(folder)
        for name, data in files.items():
            file = tarfile.TarInfo(name.lstrip("/"))
            file.size, file.mode = len(data), 0o755
            archive.addfile(file, io.BytesIO(data))
    return content.getvalue()
