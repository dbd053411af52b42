"""A virtual machine small enough to boot in seconds without hardware help.

Debian's cloud kernel, its virtio drivers and a static busybox; on its serial console runs a loop
that takes commands and frames their output, so that a test can ask the guest itself what it sees.
"""

from __future__ import annotations

import lzma
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from types import TracebackType
from typing import Final, Self

_DRIVERS: Final = ("virtio_pci", "virtio_net")

# Serial consoles wrap no lines, but kernels may speak in between: markers stand on their own line.
_READY = b"extbridge-guest ready\n"
_INIT: Final = rb"""#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /tmp
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for driver in /drivers/*.ko; do insmod "$driver"; done
# From here on the console is the command loop's alone.
dmesg -n 1
exec </dev/ttyS0 >/dev/ttyS0 2>&1
stty raw -echo
for nic in /sys/class/net/eth*; do
    nic=${nic##*/}
    echo 0 >"/proc/sys/net/ipv6/conf/$nic/accept_dad"
    ip link set "$nic" up
done
echo "extbridge-guest ready"
while read -r number command; do
    echo "extbridge-guest begin $number"
    (eval "$command") </dev/null
    printf '\nextbridge-guest end %s %s\n' "$number" "$?"
done
poweroff -f
"""


class GuestFailure(Exception):
    """A guest that cannot be had, or does not do its part; the end of its console is shown."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command in the guest printed, both streams in one, and its exit status."""

    status: int
    output: str


class _State(Enum):
    BOOTING = auto()
    READY = auto()
    STOPPED = auto()


class Console:
    """The console of a guest that somebody booted; closed when the `with` block ends."""

    def __init__(self, name: str, serial: socket.socket, *, addresses: Sequence[str] = ()) -> None:
        """Own `serial`, the other end of the guest's serial line, from before the guest's start.

        `addresses` are what the guest gives its eth0, each with its prefix length.
        """
        self.name = name
        self._serial = serial
        self._addresses = tuple(addresses)
        self._heard = bytearray()
        self._taken = 0
        self._commands = 0
        self._state = _State.BOOTING

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def console(self) -> str:
        """What QEMU, its launcher and the guest said, as far as it was listened to."""
        return self._heard.decode(errors="replace")

    def wait_ready(self, timeout: float = 60) -> None:
        """Wait until the guest takes commands and its NICs are up, at most so many seconds."""
        self._expect(_State.BOOTING)
        self._listen(_READY, timeout)
        self._state = _State.READY
        for address in self._addresses:
            added = self.run(f"ip address add {address} dev eth0")
            if added.status != 0:
                raise GuestFailure(f"guest {self.name}: {address}: {added.output.strip()}")

    def run(self, command: str, timeout: float = 20) -> Answer:
        """Run one line of shell in the guest; a guest that does not answer in time is lost."""
        self._expect(_State.READY)
        if "\n" in command:
            raise ValueError(f"a guest's command is one line: {command!r}")
        self._commands += 1
        try:
            self._serial.sendall(f"{self._commands} {command}\n".encode())
        except BrokenPipeError:
            raise self._failure("has ended") from None
        self._listen(b"extbridge-guest begin %d\n" % self._commands, timeout)
        output = self._listen(b"\nextbridge-guest end %d " % self._commands, timeout)
        status = int(self._listen(b"\n", timeout))
        return Answer(status, output.decode(errors="replace"))

    def stop(self) -> None:
        """Take leave of the guest; a second time does nothing."""
        self._state = _State.STOPPED
        self._serial.close()

    def _expect(self, state: _State) -> None:
        if self._state is not state:
            raise RuntimeError(f"guest {self.name} is {self._state.name.lower()}")

    def _listen(self, marker: bytes, timeout: float) -> bytes:
        """What was said before the marker, since the last one."""
        deadline = time.monotonic() + timeout
        while (found := self._heard.find(marker, self._taken)) < 0:
            self._serial.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                said = self._serial.recv(1 << 16)
            except TimeoutError:
                raise self._failure(f"did not say {marker!r} in {timeout:g} s") from None
            except ConnectionResetError:
                said = b""
            if not said:
                raise self._failure("has ended")
            # The kernel's console ends lines with both characters, the raw terminal with one.
            self._heard += said.replace(b"\r", b"")
        before = bytes(self._heard[self._taken : found])
        self._taken = found + len(marker)
        return before

    def _failure(self, what: str) -> GuestFailure:
        return GuestFailure(f"guest {self.name} {what}; its console ends:\n{self.console[-2000:]}")


class Guest(Console):
    """One QEMU process and the console of the guest in it; stopped when the `with` block ends.

    QEMU dies with the thread that started it, whatever ends that (PR_SET_PDEATHSIG).
    """

    def __init__(
        self,
        name: str,
        launcher: Sequence[str],
        *,
        cpus: int = 1,
        addresses: Sequence[str] = (),
        options: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> None:
        """Start `launcher` with QEMU's command line behind it: it must exec that, NIC added.

        `options` are added to QEMU's own. Raises GuestFailure where kernel, busybox or QEMU are
        missing.
        """
        kernel, initramfs = boot_files(guest_folder())
        argv = ("setpriv", "--pdeathsig", "KILL", "--", *launcher,
                *qemu_command(kernel, initramfs, cpus=cpus), *options)  # fmt: skip
        ours, theirs = socket.socketpair()
        super().__init__(name, ours, addresses=addresses)
        with theirs:
            fd = theirs.fileno()
            try:
                self._process = subprocess.Popen(argv, stdin=fd, stdout=fd, stderr=fd, env=env)
            except BaseException:
                super().stop()
                raise

    @property
    def pid(self) -> int:
        """The process that was started, which becomes QEMU when its launcher execs."""
        return self._process.pid

    def stop(self) -> None:
        """End QEMU, within seconds; a second time does nothing."""
        self._process.terminate()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        finally:
            super().stop()


def guest_folder() -> Path:
    """Where `make setup` unpacked the guests' kernel: EXTBRIDGE_GUEST, else .guest where we are."""
    return Path(os.environ.get("EXTBRIDGE_GUEST", ".guest"))


def qemu_command(
    kernel: Path, initramfs: Path, *, cpus: int = 1, serial: str = "stdio"
) -> tuple[str, ...]:
    """The command that boots a guest, without a NIC; `serial` is where QEMU puts its console."""
    return (
        "qemu-system-x86_64",
        "-accel", "tcg",
        "-m", "128",
        "-smp", str(cpus),
        "-nodefaults", "-nographic", "-no-reboot",
        "-serial", serial,
        # A boot ROM in each NIC would cost start-up time, and a package.
        "-global", "virtio-net-pci.romfile=",
        "-kernel", str(kernel),
        "-initrd", str(initramfs),
        "-append", "console=ttyS0 loglevel=4 panic=-1",
    )  # fmt: skip


def boot_files(folder: Path) -> tuple[Path, Path]:
    """The kernel, and the initramfs that was made for it, in `folder`."""
    kernel = next(folder.glob("kernel/boot/vmlinuz-*"), None)
    busybox = shutil.which("busybox")
    if kernel is None or busybox is None or shutil.which("qemu-system-x86_64") is None:
        raise GuestFailure(
            f"guests need QEMU, a static busybox and a kernel in {folder}: run `make setup`"
        )
    content = _initramfs(Path(busybox), folder / "kernel")
    # Renamed into place: another guest may be reading, or writing, at the same time.
    with tempfile.NamedTemporaryFile(dir=folder, prefix="initramfs-", delete=False) as file:
        file.write(content)
    initramfs = folder / "initramfs"
    os.replace(file.name, initramfs)
    return kernel, initramfs


def _initramfs(busybox: Path, kernel: Path) -> bytes:
    """A cpio archive as the kernel unpacks it (Documentation/driver-api/early-userspace/)."""
    files = [
        _cpio("bin", 0o040755),
        _cpio("dev", 0o040755),
        _cpio("drivers", 0o040755),
        # The kernel opens it for /init before there is a devtmpfs.
        _cpio("dev/console", 0o020600, device=(5, 1)),
        _cpio("bin/busybox", 0o100755, busybox.read_bytes()),
        _cpio("init", 0o100755, _INIT),
    ]
    for number, (name, content) in enumerate(_drivers(kernel)):
        files.append(_cpio(f"drivers/{number:02}-{name}.ko", 0o100644, content))
    return b"".join((*files, _cpio("TRAILER!!!", 0)))


def _cpio(name: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)) -> bytes:
    """One file in the "newc" form: all fields eight hexadecimal digits, parts padded to four."""
    path = name.encode() + b"\0"
    fields = (0, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(path), 0)
    header = b"070701" + b"".join(b"%08X" % field for field in fields) + path
    return header + bytes(-len(header) % 4) + content + bytes(-len(content) % 4)


def _drivers(kernel: Path) -> Iterator[tuple[str, bytes]]:
    """The modules that the drivers consist of, each after those it depends on.

    Read from the modules themselves: the index, modules.dep, is made when a kernel is installed,
    and this one is only unpacked.
    """
    files = {_module_name(path): path for path in kernel.rglob("*.ko*")}
    seen: set[str] = set()

    def with_dependencies(name: str) -> Iterator[tuple[str, bytes]]:
        # What has no file is built in.
        if name in seen or name not in files:
            return
        seen.add(name)
        path = files[name]
        content = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
        depends = re.search(rb"\0depends=([^\0]*)\0", content)
        for needed in depends[1].decode().split(",") if depends else ():
            yield from with_dependencies(needed)
        yield name, content

    for driver in _DRIVERS:
        yield from with_dependencies(driver)


def _module_name(path: Path) -> str:
    return path.name.partition(".")[0].replace("-", "_")
