"""`extbridge run`: a command gets the taps of a pod, as root, without an agent."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from extbridge.demo.lab import Lab, Nic, receive, run
from tests.kernel.observe import frame, network_config, packed, show_link
from tests.support import Cni, executable

MAC, SECOND_MAC, OUTSIDE_MAC = "52:54:00:00:00:01", "52:54:00:00:00:02", "52:54:00:00:00:99"

# What `extbridge run` is made to exec: it prints its arguments, one a line.
PRINT = ("printf", "%s\\n")

# A device number that no driver has: the misc devices' own are below MISC_DYNAMIC_MINOR, 255.
MISC_MAJOR, NO_MINOR = 10, 255

# What a process holds, by fd, before it opens anything itself.
FDS = """
import json, os
fds = {}
for fd in os.listdir("/proc/self/fd"):
    try:
        fds[int(fd)] = os.readlink(f"/proc/self/fd/{fd}")
    except FileNotFoundError:
        pass  # the one that listed the folder
print(json.dumps(fds), flush=True)
"""

# Says its pid when it has begun, and lives until its standard input ends.
LIVE = "import os, sys; print(os.getpid(), flush=True); sys.stdin.read()"


@pytest.fixture
def pod(lab: Lab, nic: Nic, cni: Cni) -> str:
    """A pod with one VM NIC, net1."""
    pod = lab.pod("vm")
    assert cni("ADD", network_config(nic, mac=MAC), NETNS=pod).result
    return pod


@pytest.fixture
def vhost() -> bool:
    """Whether this kernel has vhost-net, which decides what there is to hand over."""
    try:
        os.close(os.open("/dev/vhost-net", os.O_RDWR))
    except OSError:
        return False
    return True


def test_placeholders_are_filled_in_anywhere(pod: str) -> None:
    """What the VM's command line says of its NIC is filled in, within arguments and repeatedly."""
    printed = output(pod, *PRINT, "fd={net1.fd}", "{net1.fds},{net1.fd}", "mac={net1.mac}",
                     "{net1.mtu}{net1.queues}")  # fmt: skip
    fd = printed[0].removeprefix("fd=")
    assert int(fd) > 2
    assert printed[1:] == [f"{fd},{fd}", f"mac={MAC}", "15001"]


def test_options_are_appended_without_placeholders(pod: str, vhost: bool) -> None:  # noqa: FBT001
    """A plain QEMU command line gets its NIC by itself, with vhost just where the node has it."""
    netdev, device = appended(output(pod, *PRINT))
    fd = netdev.partition("fd=")[2].partition(",")[0]
    assert netdev.startswith(f"tap,id=extbridge0,fd={fd}")
    assert ("vhost=on,vhostfd=" in netdev) == vhost
    assert device == f"virtio-net-pci,netdev=extbridge0,mac={MAC},host_mtu=1500"


def test_model_of_appended_devices_can_be_chosen(pod: str) -> None:
    """EXTBRIDGE_MODEL names another device, which is not given what only virtio understands."""
    _, device = appended(output(pod, *PRINT, model="e1000"))
    assert device == f"e1000,netdev=extbridge0,mac={MAC}"


def test_every_queue_has_its_fd(lab: Lab, nic: Nic, cni: Cni) -> None:
    """A NIC of four queues comes as four fds, and its device says so."""
    pod = lab.pod("wide")
    assert cni("ADD", network_config(nic, mac=MAC, queues=4), NETNS=pod).result
    netdev, device = appended(output(pod, *PRINT))
    fds = netdev.partition("fds=")[2].partition(",")[0]
    assert len(set(fds.split(":"))) == 4
    assert ",mq=on,vectors=10" in device
    assert output(pod, *PRINT, "{net1.queues} {net1.fds}")[0].count(":") == 3
    refused = extbridge_run(pod, *PRINT, "{net1.fd}")
    assert refused.returncode == 1
    assert "4 queues" in refused.stderr
    assert "{net1.fds}" in refused.stderr


def test_vhost_fds_that_are_not_there_are_refused(pod: str, vhost: bool) -> None:  # noqa: FBT001
    """QEMU never starts with vhost=on and no vhost fd, on which it would abort."""
    done = extbridge_run(pod, *PRINT, "vhost=on,vhostfds={net1.vhostfds}")
    assert done.returncode == (0 if vhost else 1)
    assert ("no vhost-net" in done.stderr) != vhost


def test_vhost_node_without_a_driver_counts_as_none(pod: str, vhost: bool) -> None:  # noqa: FBT001
    """A node that udev made for a driver that is not there does not keep a VM from starting."""
    node = Path("/dev/vhost-net")
    if not vhost:
        os.mknod(node, stat.S_IFCHR | 0o600, os.makedev(MISC_MAJOR, NO_MINOR))
    try:
        netdev, _ = appended(output(pod, *PRINT))
    finally:
        if not vhost:
            node.unlink()
    assert ("vhost" in netdev) == vhost


def test_other_braces_are_left_alone(pod: str) -> None:
    """QEMU's JSON arguments, and options that look like our own, reach it as they were given."""
    arguments = (
        '{"driver":"virtio-net-pci","netdev":"n"}',
        '{"a":{"b":"{drive.other}"}}',
        "{}",
        "{.fd}",
        "--netns",
        "--ifname=net9",
        "--",
    )
    printed = output(pod, *PRINT, *arguments, "{net1.mac}")
    assert printed == [*arguments, MAC]
    filled = output(pod, *PRINT, '{"type":"tap","id":"n","fd":"{net1.fd}"}')
    assert int(json.loads(filled[0])["fd"]) > 2


def test_nics_are_chosen_by_name(pod: str, nic: Nic, cni: Cni) -> None:
    """--ifname leaves the pod's other NICs alone; without it the command gets all of them."""
    second = network_config(nic, name="second", mac=SECOND_MAC)
    assert cni("ADD", second, NETNS=pod, IFNAME="net2").result
    chosen = "\n".join(output(pod, "--ifname", "net2", "--", *PRINT))
    assert SECOND_MAC in chosen
    assert MAC not in chosen
    both = "\n".join(output(pod, "--ifname", "net2", "--ifname=net1", "--", *PRINT))
    assert both.index(MAC) < both.index(SECOND_MAC)
    assert "\n".join(output(pod, *PRINT)).count("-netdev") == 2
    unknown = extbridge_run(pod, "--ifname", "net3", "--", *PRINT)
    assert unknown.returncode == 1
    assert "no NIC net3" in unknown.stderr
    assert "net1, net2" in unknown.stderr
    not_taken = extbridge_run(pod, "--ifname", "net2", "--", *PRINT, "{net1.fd}")
    assert not_taken.returncode == 1
    assert "there is no NIC net1" in not_taken.stderr


def test_command_owns_its_taps_and_nothing_else(lab: Lab, nic: Nic, pod: str) -> None:
    """What the command gets beside its own fds are its taps, ready to use, and no more."""
    plain = subprocess.run([sys.executable, "-c", FDS], capture_output=True, check=True)
    given = output(pod, sys.executable, "-c", FDS, "{net1.fd}")
    extra = {fd: what for fd, what in json.loads(given[0]).items() if int(fd) > 2}
    assert set(json.loads(plain.stdout)) == {"0", "1", "2"}
    (opened,) = extra.values()
    assert opened.endswith(f"/tap{show_link('net1', pod)['ifindex']}")
    port = lab.packets(lab.switch, nic.port)
    data = bytes(10) + frame(OUTSIDE_MAC, MAC, b"from the VM")
    write = f"import os, sys; os.write(int(sys.argv[1]), bytes.fromhex({data.hex()!r}))"
    assert extbridge_run(pod, sys.executable, "-c", write, "{net1.fd}").returncode == 0
    came = [it.data[6:12] for it in receive(port, seconds=0.3) if not it.sent]
    assert came == [packed(MAC)]


def test_pods_namespace_dies_before_the_vm(lab: Lab, pod: str) -> None:
    """A VM that is still running does not keep the namespace of a pod that has been deleted."""
    run("ip", "link", "add", "eth0", "netns", pod, "type", "veth", "peer", "name", "eth0",
        "netns", lab.pod("cluster"))  # fmt: skip
    cluster = pod.replace("-vm", "-cluster")
    with living_command(pod):
        run("ip", "netns", "delete", Path(pod).name)
        # The other end of a pod's veth goes when its namespace does, and not before.
        wait_until_without_veth(cluster)


def test_tap_has_one_holder(pod: str) -> None:
    """While a command lives, another is refused and told who has the tap; then it is free."""
    with living_command(pod) as pid:
        refused = extbridge_run(pod, *PRINT)
        assert refused.returncode == 1
        assert f"held by process {pid}" in refused.stderr
    assert extbridge_run(pod, *PRINT).returncode == 0


@pytest.mark.parametrize("alias", ["", "extbridge", "extbridge:../../precious:net1"])
def test_pod_cannot_lead_it_astray(pod: str, cni: Cni, alias: str) -> None:
    """A link's alias is the pod's to change: it is not believed, and no path is made of it."""
    precious = cni.run_dir.parent / "precious"
    precious.mkdir()
    (precious / "draft.new").touch()
    run("ip", "link", "set", "net1", "alias", alias, netns=pod)
    done = extbridge_run(pod, *PRINT)
    assert done.returncode == 1
    assert "does not know net1" in done.stderr
    assert (precious / "draft.new").exists()
    assert (cni.run_dir / "ledger/container-1/net1.json").exists()


def test_command_that_cannot_be_executed_is_named(pod: str) -> None:
    """A command that is not there is an error of one line, and the tap is free again."""
    done = extbridge_run(pod, "no-such-qemu", "{net1.fd}")
    assert (done.returncode, done.stderr) == (1, "Error: no-such-qemu: No such file or directory\n")
    assert extbridge_run(pod, *PRINT).returncode == 0


def test_namespace_has_to_be_one(pod: str, tmp_path: Path) -> None:
    """A path at which there is no pod is refused in words: none, no namespace, the node's own."""
    plain = tmp_path / "plain"
    plain.touch()
    for path in (plain, tmp_path / "none", Path(pod, "below")):
        done = extbridge_run(str(path), *PRINT)
        assert done.returncode == 2
        assert f"there is no network namespace at {path}" in done.stderr
    own = extbridge_run("/proc/self/ns/net", *PRINT)
    assert own.returncode == 1
    assert own.stderr.startswith("extbridge: the namespace has no NIC of extbridge")


def test_without_privilege_it_says_so(pod: str) -> None:
    """Without root's capabilities the answer is a hint, not a traceback."""
    powerless = ("setpriv", "--bounding-set=-all", "--inh-caps=-all", "--")
    done = extbridge_run(pod, *PRINT, wrapper=powerless)
    assert done.returncode == 1
    assert done.stderr.startswith("extbridge: ")
    assert "hint: run this as root" in done.stderr


def test_failure_of_the_kernel_is_said_in_words(pod: str) -> None:
    """What the kernel refuses is said in words, with the object's name."""
    node = f"tap{show_link('net1', pod)['ifindex']}"
    Path("/dev", node).unlink()
    done = extbridge_run(pod, *PRINT)
    assert done.returncode == 1
    assert done.stderr == (
        f"extbridge: {node}: No such file or directory\n  (errors.md#io-failure)\n"
    )


def extbridge_run(
    pod: str, *command: str, wrapper: tuple[str, ...] = (), model: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run it to its end; `command` may begin with options, then with `--` behind them."""
    return subprocess.run(
        [*wrapper, *run_line(pod, *command)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={**os.environ, "EXTBRIDGE_MODEL": model},
        timeout=60,
        check=False,
    )


def run_line(pod: str, *command: str) -> list[str]:
    separator = () if command[0].startswith("--") else ("--",)
    return [executable("extbridge"), "run", "--netns", pod, *separator, *command]


def output(pod: str, *command: str, model: str = "") -> list[str]:
    """The lines that the command printed."""
    done = extbridge_run(pod, *command, model=model)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def appended(printed: list[str]) -> list[str]:
    """The values of the -netdev and the -device that were appended."""
    assert [printed[0], printed[2]] == ["-netdev", "-device"]
    return [printed[1], printed[3]]


@contextmanager
def living_command(pod: str) -> Iterator[int]:
    """A command that holds the tap for the length of the block; its pid."""
    line = run_line(pod, sys.executable, "-c", LIVE, "{net1.fd}")
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield int(process.stdout.readline())
    assert process.returncode == 0


def wait_until_without_veth(netns: str) -> None:
    """The kernel takes the namespace at the other end down in its own time."""
    deadline = time.monotonic() + 5
    while links := json.loads(run("ip", "-json", "link", "show", "type", "veth", netns=netns)):
        assert time.monotonic() < deadline, links
        time.sleep(0.02)
