"""What the kernel has to offer, tried for real: on a NIC of a namespace of its own.

No list of modules or options is read: what can be loaded is loaded by being asked for, and what
matters is whether it then works.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from extbridge.attachment import Pod, opened_pod
from extbridge.doctor.finding import Finding, Level, failure, ok, warning
from extbridge.kernel.antispoof import Guard, guard_table
from extbridge.kernel.checksums import hold_checksums
from extbridge.kernel.links import (
    Link,
    Macvtap,
    create_macvtap,
    create_veth,
    delete_link,
    find_link,
    set_up,
)
from extbridge.kernel.netns import inside, new_netns
from extbridge.kernel.nftables import add_tables
from extbridge.kernel.shaper import shape
from extbridge.kernel.silence import disable_ipv6, silence
from extbridge.kernel.taps import open_tap, open_vhost, unused_ifindex
from extbridge.network.definition import Bandwidth, Mode
from extbridge.spec.errors import CniError
from extbridge.spec.skel import translate

_NIC, _PORT, _NAME, _MAC = "xbnic", "xbport", "xbtrial", "02:00:00:00:00:01"
_MTU = 1500
_RATE = 1_000_000

# linux/capability.h.
_CAP_NET_ADMIN, _CAP_SYS_ADMIN, _CAP_BPF = 12, 21, 39
_CAPABILITIES: Final = (
    ("CAP_NET_ADMIN", 1 << _CAP_NET_ADMIN),
    ("CAP_SYS_ADMIN", 1 << _CAP_SYS_ADMIN),
    # Either will do (bpf_capable).
    ("CAP_BPF", 1 << _CAP_BPF | 1 << _CAP_SYS_ADMIN),
)


@dataclass(frozen=True, slots=True)
class _Trial:
    """The namespaces of a try: a node's, with a NIC, and a pod's, with a macvtap `ifindex`."""

    node: Pod
    pod: Pod
    nic: Link
    ifindex: int


@dataclass(frozen=True, slots=True)
class _Feature:
    name: str
    attempt: Callable[[_Trial], None]
    works: str
    todo: str
    level: Level = Level.FAILURE


def check_permissions() -> Iterator[Finding]:
    """Whether this process may do what the agent and the CNI executable do."""
    subject = "permissions"
    if os.geteuid() != 0:
        yield failure(subject, f"this is user {os.geteuid()}, not root", "run this as root")
    status = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
    effective = int(status.partition("CapEff:")[2].split()[0], 16)
    missing = [name for name, bits in _CAPABILITIES if not effective & bits]
    if missing:
        yield failure(
            subject,
            f"without {', '.join(missing)}",
            "run this, and the agent, with all capabilities (a privileged container)",
        )
    elif os.geteuid() == 0:
        yield ok(subject, f"root with {', '.join(name for name, _ in _CAPABILITIES)}")


def check_vhost() -> Iterator[Finding]:
    """Whether QEMU can leave frames to the kernel."""
    subject = "kernel: vhost-net"
    fds = open_vhost(1)
    for fd in fds:
        os.close(fd)
    if fds:
        yield ok(subject, "QEMU can leave frames to the kernel")
    else:
        yield warning(
            subject,
            "there is none: VMs work, with more CPU a frame",
            "modprobe vhost_net, where the kernel has it",
        )


def check_features(*, limits: bool) -> Iterator[Finding]:
    """Whether an ADD finds in the kernel what it asks for; `limits`: networks have a bandwidth."""
    with ExitStack() as closing:
        try:
            trial = closing.enter_context(_trial())
        except OSError as error:
            yield failure(
                "kernel: namespaces, veth, devtmpfs",
                f"nothing could be tried: {translate(error).message}",
                "as root with all capabilities, on Linux 5.17 or later, it can",
            )
            return
        yield ok("kernel: namespaces, veth, devtmpfs", "a node, a NIC and a pod to try it on")
        made = False
        for feature in _features(limits=limits):
            subject = f"kernel: {feature.name}"
            try:
                feature.attempt(trial)
            except (CniError, OSError) as error:
                yield Finding(subject, feature.level, translate(error).message, feature.todo)
            else:
                made = True
                yield ok(subject, feature.works)
            if not made:
                # The others are tried on the macvtap.
                return


def _features(*, limits: bool) -> Iterator[_Feature]:
    yield _Feature(
        "macvtap",
        _make,
        "made in a pod's namespace by one message",
        "modprobe macvtap; nothing works without (CONFIG_MACVTAP)",
    )
    yield _Feature(
        "tap",
        _open,
        "the kernel's device node appears, opens, and is the right one",
        "modprobe macvtap; the agent's container has to be privileged (device cgroup)",
    )
    yield _Feature(
        "nf_tables",
        _silence,
        "the pod's own IP stack can be kept off a NIC",
        "modprobe nf_tables; nothing works without (CONFIG_NF_TABLES_INET)",
    )
    antispoof = "antispoof needs it; antispoof: off, or trust: true, does without"
    yield _Feature(
        "nf_tables egress",
        _guard,
        "guests can be held to their MAC and addresses",
        f"Linux 5.16 or later with CONFIG_NETFILTER_EGRESS: {antispoof}",
    )
    yield _Feature(
        "cls_bpf, BTF",
        _hold,
        "guests can be held to where checksums are",
        f"Linux 5.17 or later with sch_ingress, cls_bpf and /sys/kernel/btf/vmlinux: {antispoof}",
    )
    level = Level.FAILURE if limits else Level.WARNING
    bandwidth = "bandwidth needs it; networks without do not"
    yield _Feature(
        "tbf",
        lambda trial: _shape(trial, Bandwidth(egress_rate=_RATE)),
        "what guests send can be limited",
        f"modprobe sch_tbf: {bandwidth}",
        level,
    )
    yield _Feature(
        "ifb, u32, mirred",
        lambda trial: _shape(trial, Bandwidth(ingress_rate=_RATE)),
        "what guests receive can be limited",
        f"modprobe ifb sch_ingress cls_u32 act_mirred sch_tbf: {bandwidth}",
        level,
    )


@contextmanager
def _trial() -> Iterator[_Trial]:
    with (
        new_netns() as node_netns,
        new_netns() as pod_netns,
        opened_pod(node_netns) as node,
        opened_pod(pod_netns) as pod,
        ExitStack() as undo,
    ):
        for netns in (node_netns, pod_netns):
            with inside(netns):
                disable_ipv6()
        create_veth(node.route, _NIC, _PORT)
        ends = [_found(node, name) for name in (_NIC, _PORT)]
        for end in ends:
            set_up(node.route, end.ifindex, alias="extbridge doctor")
        ifindex = unused_ifindex()
        # It would go with its namespace, but later: its device node would still be seen.
        undo.callback(delete_link, pod.route, ifindex)
        yield _Trial(node, pod, ends[0], ifindex)


def _found(pod: Pod, name: str) -> Link:
    link = find_link(pod.route, name=name)
    if link is None:
        raise OSError(errno.ENODEV, f"{name} is gone")
    return link


def _make(trial: _Trial) -> None:
    create_macvtap(
        trial.node.route,
        Macvtap(
            ifindex=trial.ifindex,
            name=_NAME,
            mac=_MAC,
            mode=Mode.VEPA,
            lower=trial.nic.ifindex,
            mtu=_MTU,
            queues=1,
        ),
        trial.pod.netns,
    )


def _open(trial: _Trial) -> None:
    for fd in open_tap(_found(trial.pod, _NAME), _MAC):
        os.close(fd)


def _silence(trial: _Trial) -> None:
    with inside(trial.pod.netns):
        silence(trial.ifindex, _NAME)


def _guard(trial: _Trial) -> None:
    with inside(trial.pod.netns):
        add_tables(guard_table(trial.ifindex, _NAME, Guard(_MAC, None)))


def _hold(trial: _Trial) -> None:
    hold_checksums(trial.pod.route, trial.ifindex)


def _shape(trial: _Trial, bandwidth: Bandwidth) -> None:
    shape(trial.pod.route, trial.ifindex, _MTU, bandwidth, _MAC)
