"""libvirt in a pod, as KubeVirt's virt-launcher has it: no root, no capability, one device node.

libvirtd, QEMU and the guest are the real ones; the test does what kubelet, the runtime and
virt-launcher do around them.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from extbridge.demo.guest import Console, boot_files, guest_folder
from extbridge.demo.lab import Lab, run
from extbridge.network.definition import FIRST_DEVICE
from extbridge.node.install import install_shim
from tests.e2e.cri import children_of, until
from tests.kernel.agents import Agent
from tests.kernel.observe import leftovers, network_config, show_link
from tests.support import Cni, require

pytestmark = pytest.mark.guest

RESERVED: Final = FIRST_DEVICE + 815

# QEMU's user in KubeVirt's images.
_QEMU: Final = 107

_HOME: Final = "/run/launcher"

_CONTAINER: Final = """
set -e
mount -t sysfs sysfs /sys
mount -t tmpfs -o mode=0755 run /run
mount -t tmpfs -o mode=0755,dev dev /dev
mknod -m 666 /dev/null c 1 3
mknod -m 666 /dev/urandom c 1 9
mknod -m "$mode" "/dev/$tap" c "$major" "$minor"
chown "$owner" "/dev/$tap"
mkdir -p "$HOME/libvirt/qemu"
cp "$kernel" "$HOME/kernel"
cp "$initramfs" "$HOME/initramfs"
# virtlogd would be one more process to run.
echo 'stdio_handler = "file"' >"$HOME/libvirt/qemu.conf"
# As in an image; libvirt asks for the names.
echo "qemu:x:$user:$user::$HOME:/bin/sh" >"$HOME/passwd"
echo "qemu:x:$user:" >"$HOME/group"
mount --bind "$HOME/passwd" /etc/passwd
mount --bind "$HOME/group" /etc/group
chown -R "$user:$user" "$HOME"
# The first process has to take leave of the QEMUs that libvirtd lets go of.
exec setpriv "--reuid=$user" "--regid=$user" --clear-groups --bounding-set=-all --no-new-privs \
    sh -c 'libvirtd & wait'
"""
"""What the runtime does for a container with a device, and then virt-launcher for libvirt."""

# Of the interface all is as KubeVirt's binding with `domainAttachmentType: tap` writes it.
_DOMAIN: Final = """\
<domain type='qemu'>
  <name>vm</name>
  <memory unit='MiB'>128</memory>
  <os>
    <type arch='x86_64'>hvm</type>
    <kernel>{home}/kernel</kernel>
    <initrd>{home}/initramfs</initrd>
    <cmdline>console=ttyS0 loglevel=4 panic=-1</cmdline>
  </os>
  <devices>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
    <serial type='unix'>
      <source mode='connect' path='{home}/console'/>
    </serial>
    <interface type='ethernet'>
      <target dev='net1' managed='no'/>
      <model type='virtio-non-transitional'/>
      <mac address='{mac}'/>
      <mtu size='{mtu}'/>
      <rom enabled='no'/>
    </interface>
  </devices>
</domain>
"""


@dataclass(frozen=True, slots=True)
class Launcher:
    """A container with libvirtd in it; `pid` is its first process."""

    pid: int

    @property
    def root(self) -> Path:
        """The container's file system."""
        return Path(f"/proc/{self.pid}/root")

    @property
    def home(self) -> Path:
        """Where libvirtd and QEMU have their files."""
        return self.root / _HOME.lstrip("/")

    def virsh(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run virsh there, as libvirtd's own user."""
        inside = ("nsenter", "--target", str(self.pid), "--mount", "--net", "--pid", "--",
                  "setpriv", f"--reuid={_QEMU}", f"--regid={_QEMU}", "--clear-groups",
                  "--bounding-set=-all")  # fmt: skip
        command = (*inside, "virsh", "--connect", "qemu:///session", *arguments)
        return subprocess.run(
            command, capture_output=True, text=True, check=False, env=_environment()
        )

    def start(self, domain: str) -> None:
        """Boot the domain."""
        (self.home / "domain.xml").write_text(domain)
        done = self.virsh("create", f"{_HOME}/domain.xml")
        assert done.returncode == 0, done.stderr

    def processes(self) -> dict[str, int]:
        """The container's processes by name."""
        found = [self.pid, *children_of(self.pid)]
        return {Path(f"/proc/{pid}/comm").read_text().strip(): pid for pid in found}


@pytest.mark.usefixtures("guest")
def test_libvirt_opens_the_tap_without_any_privilege(
    lab: Lab, run_dir: Path, tmp_path: Path
) -> None:
    """With the device node alone libvirt gives its guest the NIC, which the neighbours hear."""
    nic = lab.nic()
    pod = lab.pod("vm")
    neighbour = lab.neighbour("host", "10.9.0.254/24")
    config = network_config(nic, handoff="device", runtimeConfig={"deviceID": str(RESERVED)})
    node = Path(f"/dev/tap{RESERVED}")
    install_shim(tmp_path)
    shim = Cni(run_dir, program=str(tmp_path / "extbridge"))
    with Agent(run_dir, tmp_path / "agent.log") as agent:
        agent.start()
        result: dict[str, Any] = dict(shim("ADD", config, NETNS=pod).result)
        [interface] = result["interfaces"]
        with (
            _launcher(pod, node, tmp_path / "libvirtd.log") as launcher,
            _console(launcher) as accept,
        ):
            domain = _DOMAIN.format(home=_HOME, mac=interface["mac"], mtu=interface["mtu"])
            launcher.start(domain)
            with Console("vm", accept(), addresses=["10.9.0.1/24"]) as vm:
                vm.wait_ready()
                pinged = vm.run("ping -c 3 -w 10 10.9.0.254")
                shown = vm.run("ip link show eth0")
                processes = launcher.processes()
                assert set(processes) >= {"libvirtd", "qemu-system-x86"}
                for pid in processes.values():
                    assert _capabilities(pid) == {"0000000000000000"}
                assert [it.name for it in (launcher.root / "dev").glob("tap*")] == [node.name]
                known = run("ip", "neigh", "show", "10.9.0.1", netns=neighbour)
                assert launcher.virsh("destroy", "vm").returncode == 0
        assert pinged.status == 0, pinged.output
        assert interface["mac"] in shown.output
        assert interface["mac"] in known
        # It is as ADD made it, for the next guest.
        assert show_link("net1", pod)["address"] == interface["mac"]
        assert shim("CHECK", {**config, "prevResult": result}, NETNS=pod).status == 0
        assert shim("DEL", config, NETNS=pod).status == 0
    assert leftovers(pod, run_dir) == []
    assert not node.exists()


@contextmanager
def _launcher(pod: str, tap: Path, log: Path) -> Iterator[Launcher]:
    """A container in the pod's namespace with the tap for its only device, and libvirtd in it."""
    require("libvirtd")
    require("virsh")
    kernel, initramfs = boot_files(guest_folder())
    status = tap.stat()
    given = {
        "tap": tap.name,
        "major": str(os.major(status.st_rdev)),
        "minor": str(os.minor(status.st_rdev)),
        "mode": f"{status.st_mode & 0o777:o}",
        "owner": f"{status.st_uid}:{status.st_gid}",
        "user": str(_QEMU),
        "kernel": str(kernel.resolve()),
        "initramfs": str(initramfs.resolve()),
    }
    # Processes end with the first of their namespace, and that with the one that made it.
    container = ("nsenter", f"--net={pod}", "--", "unshare", "--mount", "--pid", "--fork",
                 "--kill-child", "--mount-proc", "--", "sh", "-c", _CONTAINER)  # fmt: skip
    with log.open("wb") as output:
        holder = subprocess.Popen(container, env={**_environment(), **given}, stderr=output)
    try:
        until(lambda: children_of(holder.pid))
        launcher = Launcher(children_of(holder.pid)[0])
        # Before that virsh would start a libvirtd of its own.
        until((launcher.home / "libvirt/libvirt-sock").exists)
        yield launcher
    except BaseException:
        print(log.read_text(errors="replace"))  # noqa: T201 - for whoever looks into why
        raise
    finally:
        for child in children_of(holder.pid):
            os.kill(child, signal.SIGKILL)
        holder.wait()


@contextmanager
def _console(launcher: Launcher) -> Iterator[Callable[[], socket.socket]]:
    """What accepts the other end of the serial line, to which QEMU connects when it starts."""
    path = launcher.home / "console"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        shutil.chown(path, _QEMU)
        listening.settimeout(30)
        listening.listen()
        yield lambda: listening.accept()[0]


def _environment() -> dict[str, str]:
    places = ("HOME", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME")
    return {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", **dict.fromkeys(places, _HOME)}


def _capabilities(pid: int) -> set[str]:
    """What is in the process's sets of capabilities, the bounding set included."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return {line.split()[1] for line in status.splitlines() if line.startswith("Cap")}
