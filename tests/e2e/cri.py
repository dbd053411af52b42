"""containerd for a test, and the part of the CRI that a kubelet would use with it.

containerd runs in mount and process namespaces of its own, as process 1 of a node with an empty
/run, /var/lib and /opt and an /etc that nobody else sees changed: all its pods, mounts and files
end with one process, whatever ends the test, and the machine's own containerd is another.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import grpc
from google.protobuf import json_format
from google.protobuf.message import Message

from extbridge.demo.lab import run
from tests.e2e.image import IMAGE, write_image
from tests.messages import Schema, message_classes

_CALL_SECONDS = 60.0

# Of the API (k8s.io/cri-api, runtime.v1) what is used here. On the wire a map is a repeated message
# of key and value, and a string is bytes.
_SCHEMA: Final[Schema] = {
    "VersionRequest": {},
    "VersionResponse": {"runtime_version": (3, "string")},
    "ImageSpec": {"image": (1, "string")},
    "Image": {"id": (1, "string")},
    "ImageStatusRequest": {"image": (1, "ImageSpec")},
    "ImageStatusResponse": {"image": (1, "Image")},
    "KeyValue": {"key": (1, "string"), "value": (2, "string")},
    "Number": {"value": (1, "int32")},
    "Namespaces": {"network": (1, "int32"), "pid": (2, "int32")},
    "Dns": {"servers": (1, "string[]")},
    "PodMetadata": {"name": (1, "string"), "uid": (2, "string"), "namespace": (3, "string")},
    "PodSecurity": {"namespace_options": (1, "Namespaces"), "privileged": (6, "bool")},
    "LinuxPod": {"cgroup_parent": (1, "string"), "security_context": (2, "PodSecurity")},
    "PodConfig": {
        "metadata": (1, "PodMetadata"),
        "hostname": (2, "string"),
        "log_directory": (3, "string"),
        "dns_config": (4, "Dns"),
        "annotations": (7, "KeyValue[]"),
        "linux": (8, "LinuxPod"),
    },
    "RunPodSandboxRequest": {"config": (1, "PodConfig")},
    "RunPodSandboxResponse": {"pod_sandbox_id": (1, "string")},
    "PodSandboxStatusRequest": {"pod_sandbox_id": (1, "string"), "verbose": (2, "bool")},
    "PodSandboxStatusResponse": {"status": (1, "PodStatus"), "info": (2, "KeyValue[]")},
    "PodStatus": {"network": (5, "PodNetwork")},
    "PodNetwork": {"ip": (1, "string")},
    "StopPodSandboxRequest": {"pod_sandbox_id": (1, "string")},
    "StopPodSandboxResponse": {},
    "RemovePodSandboxRequest": {"pod_sandbox_id": (1, "string")},
    "RemovePodSandboxResponse": {},
    "Capabilities": {"add_capabilities": (1, "string[]"), "drop_capabilities": (2, "string[]")},
    "SecurityProfile": {"profile_type": (1, "int32")},
    "SELinux": {"type": (3, "string")},
    "ContainerSecurity": {
        "capabilities": (1, "Capabilities"),
        "privileged": (2, "bool"),
        "namespace_options": (3, "Namespaces"),
        "selinux_options": (4, "SELinux"),
        "run_as_user": (5, "Number"),
        "readonly_rootfs": (7, "bool"),
        "no_new_privs": (11, "bool"),
        "run_as_group": (12, "Number"),
        "seccomp": (15, "SecurityProfile"),
    },
    "Resources": {"cpu_shares": (3, "int64"), "memory_limit_in_bytes": (4, "int64")},
    "LinuxContainer": {
        "resources": (1, "Resources"),
        "security_context": (2, "ContainerSecurity"),
    },
    "ContainerMetadata": {"name": (1, "string")},
    "Mount": {
        "container_path": (1, "string"),
        "host_path": (2, "string"),
        "readonly": (3, "bool"),
    },
    "Device": {
        "container_path": (1, "string"),
        "host_path": (2, "string"),
        "permissions": (3, "string"),
    },
    "ContainerConfig": {
        "metadata": (1, "ContainerMetadata"),
        "image": (2, "ImageSpec"),
        "command": (3, "string[]"),
        "args": (4, "string[]"),
        "envs": (6, "KeyValue[]"),
        "mounts": (7, "Mount[]"),
        "devices": (8, "Device[]"),
        "log_path": (11, "string"),
        "linux": (15, "LinuxContainer"),
    },
    "CreateContainerRequest": {
        "pod_sandbox_id": (1, "string"),
        "config": (2, "ContainerConfig"),
        "sandbox_config": (3, "PodConfig"),
    },
    "CreateContainerResponse": {"container_id": (1, "string")},
    "StartContainerRequest": {"container_id": (1, "string")},
    "StartContainerResponse": {},
    "ContainerStatusRequest": {"container_id": (1, "string"), "verbose": (2, "bool")},
    "ContainerStatusResponse": {"status": (1, "ContainerStatus"), "info": (2, "KeyValue[]")},
    "ContainerStatus": {"state": (3, "int32"), "exit_code": (7, "int32")},
    "StopContainerRequest": {"container_id": (1, "string"), "timeout": (2, "int64")},
    "StopContainerResponse": {},
    "RemoveContainerRequest": {"container_id": (1, "string")},
    "RemoveContainerResponse": {},
    "ExecSyncRequest": {
        "container_id": (1, "string"),
        "cmd": (2, "string[]"),
        "timeout": (3, "int32"),
    },
    "ExecSyncResponse": {
        "stdout": (1, "string"),
        "stderr": (2, "string"),
        "exit_code": (3, "int32"),
    },
}
_PACKAGE: Final = "runtime.v1"

T = TypeVar("T")


class CriFailure(Exception):
    """containerd refused a call, or does not serve; the message is its own."""


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod's sandbox; `config` is what it was asked for with."""

    name: str
    id: str
    config: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Executed:
    """What a command in a container came to."""

    status: int
    stdout: str
    stderr: str


@dataclass(frozen=True, slots=True)
class Containerd:
    """containerd as it serves; `pid` is its number outside, `logs` where its pods' output goes."""

    pid: int
    logs: Path
    cgroup: str

    @property
    def root(self) -> Path:
        """The file system as containerd and its CNI plugins see it."""
        return Path(f"/proc/{self.pid}/root")

    @property
    def socket(self) -> Path:
        """Where it serves the CRI."""
        return self.root / "run/containerd/containerd.sock"

    def call(self, method: str, **request: object) -> dict[str, Any]:
        """Call a method of the API with the fields of its request; raises CriFailure."""
        service = "ImageService" if method.startswith("Image") else "RuntimeService"
        asked = json_format.ParseDict(request, _MESSAGES[f"{_PACKAGE}.{method}Request"]())
        # A channel has threads and fds; this way both are gone when the call is over.
        with grpc.insecure_channel(f"unix://{self.socket}") as channel:
            try:
                answer: Message = channel.unary_unary(
                    f"/{_PACKAGE}.{service}/{method}",
                    request_serializer=type(asked).SerializeToString,
                    response_deserializer=_MESSAGES[f"{_PACKAGE}.{method}Response"].FromString,
                )(asked, timeout=_CALL_SECONDS)
            except grpc.RpcError as error:
                raise CriFailure(f"{method}: {error}") from error
        return json_format.MessageToDict(answer, preserving_proto_field_name=True)

    def run_pod(self, name: str, config: Mapping[str, object]) -> Pod:
        """Make the sandbox of a pod; raises CriFailure."""
        return Pod(name, self.call("RunPodSandbox", config=config)["pod_sandbox_id"], config)

    def run_container(self, pod: Pod, config: Mapping[str, object]) -> str:
        """Start a container in the pod; answers its ID. Raises CriFailure."""
        container: str = self.call(
            "CreateContainer", pod_sandbox_id=pod.id, config=config, sandbox_config=pod.config
        )["container_id"]
        self.call("StartContainer", container_id=container)
        return container

    def exit_code(self, container: str) -> int | None:
        """With what the container ended, None while it runs."""
        status = self.call("ContainerStatus", container_id=container)["status"]
        # ContainerState.CONTAINER_EXITED.
        return status.get("exit_code", 0) if status.get("state") == 2 else None

    def pid_of(self, container: str) -> int:
        """The container's first process, as the node numbers it."""
        told = self.call("ContainerStatus", container_id=container, verbose=True)
        pid: int = _info(told)["pid"]
        return pid

    def netns_of(self, pod: Pod) -> str:
        """The pod's network namespace, as the node names it."""
        told = self.call("PodSandboxStatus", pod_sandbox_id=pod.id, verbose=True)
        namespaces = _info(told)["runtimeSpec"]["linux"]["namespaces"]
        (path,) = (it["path"] for it in namespaces if it["type"] == "network")
        return str(path)

    def cni(self, config: Mapping[str, object], **environ: str) -> None:
        """Call a plugin as a process of the node does; raises CriFailure with its answer."""
        done = subprocess.run(
            ("nsenter", f"--target={self.pid}", "--mount", "--pid", "--",
             f"/opt/cni/bin/{config['type']}"),
            input=json.dumps(config), text=True, stdout=subprocess.PIPE, check=False,
            env={"CNI_PATH": "/opt/cni/bin", **environ},
        )  # fmt: skip
        if done.returncode:
            raise CriFailure(f"{environ['CNI_COMMAND']}: {done.stdout}")

    def import_image(self, archive: Path, image: str) -> None:
        """Take the image out of an archive; raises LabFailure, TimeoutError."""
        run("ctr", "--address", str(self.socket), "--namespace", "k8s.io",
            "images", "import", str(archive))  # fmt: skip
        # The CRI gets word of the image later than containerd has it.
        until(lambda: self.call("ImageStatus", image={"image": image}))

    def execute(self, container: str, *command: str, seconds: int = 30) -> Executed:
        """Run a command in the container, as what the container runs as."""
        answer = self.call("ExecSync", container_id=container, cmd=list(command), timeout=seconds)
        return Executed(
            answer.get("exit_code", 0), answer.get("stdout", ""), answer.get("stderr", "")
        )

    def remove_pod(self, pod: Pod) -> None:
        """Stop the pod with all its containers, and remove it; raises CriFailure.

        As kubelet does, again where that fails: now and then containerd 1.6 loses its connection to
        runc's shim while a container is killed ("ttrpc: closed").
        """
        for tries_left in (2, 1, 0):
            try:
                self.call("StopPodSandbox", pod_sandbox_id=pod.id)
                self.call("RemovePodSandbox", pod_sandbox_id=pod.id)
                return
            except CriFailure:
                if not tries_left:
                    raise


def until(ask: Callable[[], T | None], *, seconds: float = 30) -> T:
    """What `ask` answers as soon as it is anything; raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while not (answer := ask()):
        if time.monotonic() >= deadline:
            raise TimeoutError
        time.sleep(0.02)
    return answer


@contextmanager
def containerd(folder: Path) -> Iterator[Containerd]:
    """Run containerd with an image for VMs; its own files go to `folder`.

    CNI's folders are where they mostly are, and empty but for Debian's plugins. Raises CriFailure
    with the end of its log.
    """
    (folder / "logs").mkdir()
    config = folder / "containerd.toml"
    config.write_text(_CONFIG.format(image=IMAGE))
    image = folder / "image.tar"
    write_image(image)
    cgroup = f"/extbridge-{secrets.token_hex(4)}"
    log = folder / "containerd.log"
    with ExitStack() as closing:
        closing.callback(_remove_cgroups, cgroup)
        with log.open("wb") as said:
            holder = subprocess.Popen(
                ("setpriv", "--pdeathsig", "KILL", "--",
                 "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc",
                 "sh", "-ec", _START, "sh", str(config)),
                stdin=subprocess.DEVNULL, stdout=said, stderr=said,
            )  # fmt: skip
        closing.callback(_kill, holder)

        def serves(pids: Sequence[int]) -> Containerd | None:
            with suppress(CriFailure):
                for pid in pids:
                    served = Containerd(pid, folder / "logs", cgroup)
                    served.call("Version")
                    return served
            return None

        try:
            served = until(lambda: serves(children_of(holder.pid)))
            served.import_image(image, IMAGE)
        except TimeoutError as error:
            raise CriFailure(f"containerd does not serve:\n{log.read_text()[-2000:]}") from error
        image.unlink()
        yield served


_START: Final = """
mount -t tmpfs -o mode=0755 extbridge-run /run
mount -t tmpfs -o mode=0755 extbridge-lib /var/lib
mount -t tmpfs -o mode=0755 extbridge-opt /opt
mkdir /run/etc /run/etc.new
mount -t overlay -o lowerdir=/etc,upperdir=/run/etc,workdir=/run/etc.new extbridge-etc /etc
rm -rf /etc/cni
mkdir -p /etc/cni/net.d /opt/cni/bin /var/lib/kubelet/device-plugins
ln -s /usr/lib/cni/* /opt/cni/bin
exec containerd --config "$1"
"""

_CONFIG: Final = """\
version = 2

[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{image}"
# What is to be killed last cannot be promised where the test itself is not allowed to.
restrict_oom_score_adj = true
# A profile would be loaded into the machine's kernel.
disable_apparmor = true

[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/opt/cni/bin"
conf_dir = "/etc/cni/net.d"
"""


_MESSAGES: Final = message_classes(_PACKAGE, _SCHEMA)


def children_of(pid: int) -> list[int]:
    """The processes that the (single-threaded) process is the parent of."""
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
    return [int(child) for child in listed.split()]


def _info(told: Mapping[str, Any]) -> dict[str, Any]:
    """What containerd says of its own, where it was asked for all."""
    (info,) = (item["value"] for item in told["info"] if item["key"] == "info")
    said: dict[str, Any] = json.loads(info)
    return said


def _kill(holder: subprocess.Popen[bytes]) -> None:
    """End containerd and all pods: when a namespace's first process ends, the kernel ends the rest.

    The holder ends with that child, which is none of ours to wait for.
    """
    for child in children_of(holder.pid):
        os.kill(child, signal.SIGKILL)
    holder.wait()


def _remove_cgroups(cgroup: str) -> None:
    """Remove the pods' control groups from every hierarchy, the innermost first."""
    hierarchies = Path("/sys/fs/cgroup")
    for top in (hierarchies, *hierarchies.iterdir()):
        for folder, _, _ in os.walk(f"{top}{cgroup}", topdown=False):
            os.rmdir(folder)
