"""A pod's manifest made into calls of the CRI, as a kubelet makes them.

What runs is what was rendered: a field that is not understood here fails the test, which would else
run another container than nodes do.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from extbridge.reservations import DEVICES
from tests.e2e.cri import Containerd, Executed, Pod, until
from tests.kernel.api_server import NODE, ApiServer
from tests.kernel.kubelet import Kubelet as DeviceManager
from tests.manifests import Manifest, write_config_map

# Said to the scheduler and the API server, not to the node.
_NOT_THE_NODES: Final = ("nodeSelector", "tolerations", "priorityClassName")

# NamespaceMode and SecurityProfile.ProfileType of the CRI.
_OF_POD, _OF_CONTAINER, _OF_NODE = 0, 1, 2
_RUNTIME_DEFAULT, _UNCONFINED = 0, 1

_DOMAIN: Final = "extbridge.io/"
_MULTUS: Final = "k8s.v1.cni.cncf.io"

_UNITS: Final = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}

_TOKEN: Final = "/var/run/secrets/kubernetes.io/serviceaccount"  # noqa: S105 - a folder


class PodFailure(Exception):
    """The pod does not come up; the message is what its container said."""


@dataclass(slots=True)
class Container:
    """A container of a running pod; `config` is what it was asked for with."""

    id: str
    config: Mapping[str, object]
    probes: Mapping[str, Manifest]


@dataclass(frozen=True, slots=True)
class RunningPod:
    """A pod with its containers, by their names, and the seconds they are given to end.

    `attached` are the configurations of what Multus has attached, by the interfaces' names.
    """

    pod: Pod
    containers: dict[str, Container]
    grace: int
    attached: dict[str, Manifest] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Kubelet:
    """What runs pods on containerd's node; volumes are made in `folder`, of these ConfigMaps.

    The API server has each pod before it runs; nobody deletes it there. With `devices` it gives out
    resources, and attaches NetworkAttachmentDefinitions as Multus does.
    """

    cri: Containerd
    folder: Path
    api: ApiServer
    config_maps: dict[str, Mapping[str, str]] = field(default_factory=dict)
    devices: DeviceManager | None = None
    attachments: tuple[Manifest, ...] = ()

    def run(self, manifest: Manifest) -> RunningPod:
        """Run the pod until it is ready; raises PodFailure, CriFailure."""
        name = manifest["metadata"]["name"]
        with _all_of(manifest["spec"], f"spec of {name}") as left:
            for other in _NOT_THE_NODES:
                left.pop(other, None)
            mounts = {it["name"]: self._volume(it) for it in left.pop("volumes", [])}
            has_account = left.pop("serviceAccountName", "")
            if left.pop("automountServiceAccountToken", bool(has_account)):
                mounts[_TOKEN] = self._token(manifest)
            namespaces = {
                "network": _OF_NODE if left.pop("hostNetwork", False) else _OF_POD,
                "pid": _OF_NODE if left.pop("hostPID", False) else _OF_CONTAINER,
            }
            security = left.pop("securityContext", {})
            grace = left.pop("terminationGracePeriodSeconds", 30)
            allocated: dict[str, list[str]] = {}
            inits, others = (
                [
                    self._container(
                        it,
                        security,
                        namespaces,
                        mounts,
                        name,
                        allocated=self._allocate(it, allocated),
                    )
                    for it in left.pop(kind, [])
                ]
                for kind in ("initContainers", "containers")
            )
        uid = secrets.token_hex(8)
        self.api.put_pod(uid=uid, **manifest["metadata"])
        pod = self.cri.run_pod(name, self._sandbox(manifest, uid, namespaces, [*inits, *others]))
        running = RunningPod(pod, {}, grace)
        try:
            self._attach(manifest, running, allocated)
            for container in inits:
                self._start(running, container)
                self._expect_success(running, container)
            for container in others:
                running.containers[_name(container)] = container
                self._start(running, container)
        except BaseException:
            self.detach(running)
            self.cri.remove_pod(pod)
            raise
        return running

    def detach(self, running: RunningPod) -> None:
        """Take off what Multus has attached, as it does when the pod is stopped."""
        for ifname in [*running.attached]:
            self._call_cni("DEL", running, ifname)
            del running.attached[ifname]

    def restart(self, running: RunningPod, name: str) -> None:
        """Start the container anew as soon as it has ended."""
        container = running.containers[name]
        self._wait_end(container)
        self.cri.call("RemoveContainer", container_id=container.id)
        self._start(running, container)

    def remove(self, running: RunningPod) -> None:
        """End its containers, with the time that they are given for it, and the pod."""
        for container in running.containers.values():
            self.cri.call("StopContainer", container_id=container.id, timeout=running.grace)
        self.detach(running)
        self.cri.remove_pod(running.pod)

    def probe(self, container: Container, kind: str) -> Executed:
        """What the probe of this kind comes to."""
        with _all_of(container.probes[kind], kind) as left:
            with _all_of(left.pop("exec"), kind) as how:
                command = how.pop("command")
            seconds = left.pop("timeoutSeconds", 1)
            for timing in ("periodSeconds", "failureThreshold"):
                left.pop(timing, None)
        return self.cri.execute(container.id, *command, seconds=seconds)

    def log(self, pod: str, container: str) -> str:
        """All that the container has said."""
        return (self.cri.logs / f"{pod}-{container}.log").read_text()

    def _allocate(self, container: Manifest, allocated: dict[str, list[str]]) -> list[Manifest]:
        """What the device plugins answer for the container's limits."""
        answers = []
        for resource, number in container.get("resources", {}).get("limits", {}).items():
            if resource.startswith(_DOMAIN):
                assert self.devices is not None
                network = resource.removeprefix(_DOMAIN)
                given = self.devices.sees(network, healthy=DEVICES)[:number]
                allocated[resource] = [*allocated.get(resource, []), *given]
                answers += self.devices.allocate(network, given)["containers"]
        return answers

    def _attach(
        self, manifest: Manifest, running: RunningPod, allocated: Mapping[str, list[str]]
    ) -> None:
        """What Multus does for the pod's annotation (pkg/types/conf.go, LoadDelegateNetConf)."""
        metadata = manifest["metadata"]
        named = metadata.get("annotations", {}).get(f"{_MULTUS}/networks")
        for number, name in enumerate(named.split(",") if named else [], 1):
            key = (metadata["namespace"], name)
            (attachment,) = (
                it
                for it in self.attachments
                if (it["metadata"]["namespace"], it["metadata"]["name"]) == key
            )
            resource = attachment["metadata"]["annotations"][f"{_MULTUS}/resourceName"]
            (device,) = allocated[resource]
            config = json.loads(attachment["spec"]["config"])
            config |= {"deviceID": device, "pciBusID": device}
            if config["capabilities"]["deviceID"]:
                config["runtimeConfig"] = {"deviceID": device}
            running.attached[f"net{number}"] = config
            self._call_cni("ADD", running, f"net{number}")

    def _call_cni(self, verb: str, running: RunningPod, ifname: str) -> None:
        self.cri.cni(
            running.attached[ifname],
            CNI_COMMAND=verb,
            CNI_CONTAINERID=running.pod.id,
            CNI_NETNS=self.cri.netns_of(running.pod),
            CNI_IFNAME=ifname,
            CNI_ARGS=f"IgnoreUnknown=true;K8S_POD_NAME={running.pod.name}",
        )

    def _start(self, running: RunningPod, container: Container) -> None:
        container.id = self.cri.run_container(running.pod, container.config)
        for kind in container.probes:
            until(lambda kind=kind: self.probe(container, kind).status == 0)  # type: ignore[misc]

    def _wait_end(self, container: Container) -> int:
        """With what it has ended, as soon as it has."""
        (ended,) = until(lambda: _some(self.cri.exit_code(container.id)))
        return ended

    def _expect_success(self, running: RunningPod, container: Container) -> None:
        if (ended := self._wait_end(container)) != 0:
            raise PodFailure(f"exit {ended}: {self.log(running.pod.name, _name(container))}")

    def _sandbox(
        self,
        manifest: Manifest,
        uid: str,
        namespaces: Mapping[str, int],
        containers: list[Container],
    ) -> Mapping[str, object]:
        metadata = manifest["metadata"]
        return {
            "metadata": {
                "name": metadata["name"],
                "namespace": metadata["namespace"],
                "uid": uid,
            },
            # With the node's network it has the node's name (generatePodSandboxConfig).
            "hostname": "" if namespaces["network"] == _OF_NODE else metadata["name"],
            "log_directory": str(self.cri.logs),
            # Else it would be the machine's resolv.conf, which may be a link into its /run.
            "dns_config": {"servers": ["192.0.2.53"]},
            "annotations": _pairs(metadata.get("annotations", {})),
            "linux": {
                "cgroup_parent": self.cri.cgroup,
                "security_context": {
                    "namespace_options": namespaces,
                    "privileged": any(_is_privileged(it) for it in containers),
                },
            },
        }

    def _volume(self, volume: Manifest) -> Path:
        """Where the node has what is to be mounted."""
        with _all_of(volume, "volume") as left:
            name = left.pop("name")
            if "hostPath" in left:
                with _all_of(left.pop("hostPath"), name) as host:
                    return self._host_path(host.pop("path"), host.pop("type"))
            made = self.folder / secrets.token_hex(4)
            made.mkdir(parents=True)
            if "configMap" in left:
                with _all_of(left.pop("configMap"), name) as chosen:
                    write_config_map(made, self.config_maps[chosen.pop("name")])
            else:
                assert left.pop("emptyDir") == {}
                made.chmod(0o777)
            return made

    def _host_path(self, path: str, kind: str) -> Path:
        seen = self.cri.root / path.lstrip("/")
        if kind == "DirectoryOrCreate":
            seen.mkdir(parents=True, exist_ok=True)
        else:
            assert kind == "Directory"
        if not seen.is_dir():
            raise PodFailure(f"hostPath {path} is no folder")
        return Path(path)

    def _token(self, manifest: Manifest) -> Path:
        made = self.folder / secrets.token_hex(4)
        account = self.api.kubeconfig.parent
        files = {name: (account / name).read_text() for name in ("token", "ca.crt")}
        write_config_map(made, {**files, "namespace": manifest["metadata"]["namespace"]})
        return made

    def _container(
        self,
        spec: Manifest,
        pods_security: Manifest,
        namespaces: Mapping[str, int],
        volumes: Mapping[str, Path],
        pod: str,
        *,
        allocated: list[Manifest],
    ) -> Container:
        """What the CRI is asked for, but not yet made."""
        with _all_of(spec, f"container {spec['name']}") as left:
            probes: dict[str, Manifest] = {
                kind: left.pop(kind)
                for kind in ("startupProbe", "readinessProbe", "livenessProbe")
                if kind in left
            }
            mounts = [_mount(it, volumes) for it in left.pop("volumeMounts", [])]
            if _TOKEN in volumes:
                mounts.append(_from(_TOKEN, volumes[_TOKEN], is_readonly=True))
            devices = []
            for answer in allocated:
                with _all_of(answer, "Allocate") as given:
                    for mount in given.pop("mounts", []):
                        is_readonly = mount.pop("read_only")
                        mounts.append({**mount, "readonly": is_readonly})
                    # Spelled as in the CRI.
                    devices += given.pop("devices", [])
            environment = dict(_variable(it) for it in left.pop("env", []))
            environment |= {
                "KUBERNETES_SERVICE_HOST": "127.0.0.1",
                "KUBERNETES_SERVICE_PORT": str(self.api.port),
            }
            name = left.pop("name")
            config = {
                "metadata": {"name": name},
                "image": {"image": left.pop("image")},
                "command": left.pop("command", []),
                "args": left.pop("args", []),
                "envs": _pairs(environment),
                "mounts": mounts,
                "devices": devices,
                "log_path": f"{pod}-{name}.log",
                "linux": {
                    "resources": _resources(left.pop("resources", {})),
                    "security_context": {
                        "namespace_options": namespaces,
                        **_security({**pods_security, **left.pop("securityContext", {})}),
                    },
                },
            }
        return Container("", config, probes)


def pod_of(daemon_set: Manifest) -> Manifest:
    """The pod that a DaemonSet has on this node."""
    template, owner = daemon_set["spec"]["template"], daemon_set["metadata"]
    metadata = {
        **template["metadata"],
        "name": f"{owner['name']}-{secrets.token_hex(3)}",
        "namespace": owner["namespace"],
    }
    return {"metadata": metadata, "spec": template["spec"]}


def _security(context: Manifest) -> dict[str, object]:
    with _all_of(context, "securityContext") as left:
        said: dict[str, object] = {
            "privileged": left.pop("privileged", False),
            "readonly_rootfs": left.pop("readOnlyRootFilesystem", False),
            "no_new_privs": not left.pop("allowPrivilegeEscalation", True),
            "seccomp": {"profile_type": _UNCONFINED},
        }
        with _all_of(left.pop("capabilities", {}), "capabilities") as capabilities:
            said["capabilities"] = {
                "add_capabilities": capabilities.pop("add", []),
                "drop_capabilities": capabilities.pop("drop", []),
            }
        with _all_of(left.pop("seLinuxOptions", {}), "seLinuxOptions") as options:
            if options:
                said["selinux_options"] = {"type": options.pop("type")}
        if "seccompProfile" in left:
            assert left.pop("seccompProfile") == {"type": "RuntimeDefault"}
            said["seccomp"] = {"profile_type": _RUNTIME_DEFAULT}
        if "runAsUser" in left:
            said["run_as_user"] = {"value": left.pop("runAsUser")}
        if "runAsGroup" in left:
            said["run_as_group"] = {"value": left.pop("runAsGroup")}
        if left.pop("runAsNonRoot", False):
            assert said["run_as_user"] != {"value": 0}
    return said


def _resources(resources: Manifest) -> dict[str, int]:
    with _all_of(resources, "resources") as left:
        with _all_of(left.pop("requests", {}), "requests") as asked:
            # What the scheduler keeps free.
            asked.pop("memory", None)
            cpu = asked.pop("cpu", "0")
        with _all_of(left.pop("limits", {}), "limits") as limits:
            memory = limits.pop("memory", "0Mi")
            for resource in [it for it in limits if it.startswith(_DOMAIN)]:
                # What device plugins have answered for.
                del limits[resource]
    thousandths = int(cpu[:-1]) if cpu.endswith("m") else int(cpu) * 1000
    return {
        "cpu_shares": max(2, thousandths * 1024 // 1000),
        "memory_limit_in_bytes": int(memory[:-2]) * _UNITS[memory[-2:]],
    }


def _mount(mount: Manifest, volumes: Mapping[str, Path]) -> dict[str, object]:
    with _all_of(mount, "volumeMount") as left:
        source = volumes[left.pop("name")]
        return _from(left.pop("mountPath"), source, is_readonly=left.pop("readOnly", False))


def _from(path: str, source: Path, *, is_readonly: bool) -> dict[str, object]:
    return {"container_path": path, "host_path": str(source), "readonly": is_readonly}


def _variable(variable: Manifest) -> tuple[str, str]:
    with _all_of(variable, "env") as left:
        name = left.pop("name")
        if "value" in left:
            return name, left.pop("value")
        assert left.pop("valueFrom") == {"fieldRef": {"fieldPath": "spec.nodeName"}}
        return name, NODE


@contextmanager
def _all_of(obj: Manifest, what: str) -> Iterator[Manifest]:
    """The object to be taken apart; when the block ends nothing must be left of it."""
    left = dict(obj)
    yield left
    assert not left, f"{what}: the test does not know what to do with {', '.join(left)}"


def _is_privileged(container: Container) -> bool:
    linux: Any = container.config["linux"]
    return bool(linux["security_context"]["privileged"])


def _name(container: Container) -> str:
    metadata: Any = container.config["metadata"]
    return str(metadata["name"])


def _some(code: int | None) -> tuple[int] | None:
    return None if code is None else (code,)


def _pairs(mapping: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"key": key, "value": value} for key, value in mapping.items()]
