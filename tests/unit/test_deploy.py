"""The manifests in deploy/: what a cluster would refuse, and what would not fit together there."""

from __future__ import annotations

import itertools
import json
import re
import tomllib
from pathlib import Path
from typing import Final

import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml

from extbridge.network.store import list_networks, load_network
from extbridge.network.wanted import configured_network, refuse_unknown_keys
from tests.manifests import DEPLOY, Manifest, rendered, the, write_config_map

KUSTOMIZATIONS: Final = sorted(
    str(path.parent.relative_to(DEPLOY)) for path in DEPLOY.rglob("kustomization.yaml")
)
EXAMPLES: Final = sorted(DEPLOY.glob("examples/*.yaml"))
FILES: Final = [*EXAMPLES, DEPLOY / "overlays/kubevirt/vm.yaml"]

# Kinds that others define; Kubernetes has no schema for them.
FOREIGN: Final = {"NetworkAttachmentDefinition", "SecurityContextConstraints", "VirtualMachine"}

# The oldest that has a schema here, and the newest.
VERSIONS: Final = ("1.25", kubernetes_validate.latest_version())


@pytest.mark.parametrize("folder", KUSTOMIZATIONS)
@pytest.mark.parametrize("version", VERSIONS)
def test_cluster_accepts_what_is_rendered(folder: str, version: str) -> None:
    """`kubectl apply -k` of each kustomization passes the API server's schemas, old and new."""
    for manifest in rendered(DEPLOY / folder):
        _validate(manifest, version)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("version", VERSIONS)
def test_cluster_accepts_the_examples(path: Path, version: str) -> None:
    """`kubectl apply -f` of each example passes as well."""
    for manifest in _read(path):
        _validate(manifest, version)


@pytest.mark.parametrize("folder", KUSTOMIZATIONS)
def test_networks_are_understood_and_fit_together(folder: str, tmp_path: Path) -> None:
    """The definitions are good, as kubelet mounts them, and what Multus is told of them is so."""
    manifests = rendered(DEPLOY / folder)
    if "uninstall" in folder:
        return
    write_config_map(tmp_path, the("ConfigMap", manifests)["data"])
    defined = list_networks(str(tmp_path))
    for name in defined:
        load_network(name, str(tmp_path))
    for attachment in _of_kind("NetworkAttachmentDefinition", manifests):
        config = json.loads(attachment["spec"]["config"])
        _accept(config, str(tmp_path))
        resource = attachment["metadata"]["annotations"]["k8s.v1.cni.cncf.io/resourceName"]
        assert resource == f"extbridge.io/{config['network']}"
        assert config["network"] in defined


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_examples_networks_are_understood(path: Path, tmp_path: Path) -> None:
    """The networks that examples define for themselves are good."""
    for attachment in _of_kind("NetworkAttachmentDefinition", _read(path)):
        _accept(json.loads(attachment["spec"]["config"]), str(tmp_path))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_vm_pods_of_examples_have_no_privilege(path: Path) -> None:
    """An example asks for nothing that the restricted profile forbids, but the launcher's mount.

    With a device it has that from kubelet.
    """
    spec = the("Pod", _read(path))["spec"]
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["securityContext"]["runAsUser"] > 0
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    hosts = {it["name"]: it["hostPath"]["path"] for it in spec["volumes"] if "hostPath" in it}
    assert list(hosts.values()) == ([] if _resources(spec) else ["/run/extbridge/pod"])
    # Pod Security Standards, Restricted, Volume Types, as far as there are such in examples.
    kinds = {kind for volume in spec["volumes"] for kind in volume} - {"name", "hostPath"}
    assert kinds <= {"configMap", "emptyDir"}
    for container in spec["containers"]:
        assert container["securityContext"] == {
            "readOnlyRootFilesystem": True,
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }
        for mount in container["volumeMounts"]:
            if mount["name"] in hosts:
                assert mount["readOnly"]
                assert mount["mountPath"] == hosts[mount["name"]]
    assert not spec.keys() & {"hostNetwork", "hostPID", "hostIPC"}


@pytest.mark.parametrize("overlay", ["multus", "openshift"])
def test_device_of_the_example_is_its_networks(overlay: str) -> None:
    """The pod's limits have the resource that Multus looks for when it makes the pod's NIC."""
    pod = the("Pod", _read(DEPLOY / "examples/multus.yaml"))
    name = pod["metadata"]["annotations"]["k8s.v1.cni.cncf.io/networks"]
    manifests = rendered(DEPLOY / "overlays" / overlay)
    attachment = the("NetworkAttachmentDefinition", manifests)["metadata"]
    told = (attachment["namespace"], attachment["name"])
    assert told == (pod["metadata"]["namespace"], name)
    resource = attachment["annotations"]["k8s.v1.cni.cncf.io/resourceName"]
    assert _resources(pod["spec"]) == {resource: 1}


def test_kubevirts_parts_name_each_other(tmp_path: Path) -> None:
    """The example VM has the binding that is registered, on a network whose node is QEMU's."""
    folder = DEPLOY / "overlays/kubevirt"
    manifests = rendered(folder)
    (patch,) = _read(folder / "binding.yaml")
    bindings = patch["spec"]["configuration"]["network"]["binding"]
    assert bindings == {"extbridge": {"domainAttachmentType": "tap"}}
    spec = the("VirtualMachine", _read(folder / "vm.yaml"))["spec"]["template"]["spec"]
    (interface,) = spec["domain"]["devices"]["interfaces"]
    assert interface["binding"]["name"] in bindings
    attached = {it["name"]: it["multus"]["networkName"] for it in spec["networks"]}
    named = {
        it["metadata"]["name"]: json.loads(it["spec"]["config"])
        for it in _of_kind("NetworkAttachmentDefinition", manifests)
    }
    write_config_map(tmp_path, the("ConfigMap", manifests)["data"])
    network = load_network(named[attached[interface["name"]]]["network"], str(tmp_path))
    assert network.handoff == "device"


@pytest.mark.parametrize("folder", ["overlays/openshift", "uninstall-openshift"])
def test_openshift_grants_what_is_asked_for(folder: str) -> None:
    """The constraints name the pods' account, and allow what they ask for and no more."""
    manifests = rendered(DEPLOY / folder)
    granted = the("SecurityContextConstraints", manifests)
    daemon_set = the("DaemonSet", manifests)
    spec = daemon_set["spec"]["template"]["spec"]
    namespace = daemon_set["metadata"]["namespace"]
    account = spec.get("serviceAccountName", "default")
    assert granted["users"] == [f"system:serviceaccount:{namespace}:{account}"]
    volumes = {kind for volume in spec["volumes"] for kind in volume if kind != "name"}
    if spec.get("automountServiceAccountToken", True):
        # Its account's token comes as a projected one.
        volumes.add("projected")
    assert volumes == set(granted["volumes"])
    assert granted["allowHostDirVolumePlugin"] == ("hostPath" in volumes)
    assert granted["allowHostNetwork"] == spec.get("hostNetwork", False)
    assert granted["allowHostPID"] == spec.get("hostPID", False)
    asked = [it["securityContext"] for it in (*spec["initContainers"], *spec["containers"])]
    assert granted["readOnlyRootFilesystem"] == all(it["readOnlyRootFilesystem"] for it in asked)
    assert granted["allowPrivilegedContainer"] == any(it.get("privileged") for it in asked)
    assert granted["allowPrivilegeEscalation"] == any(
        it.get("allowPrivilegeEscalation", True) for it in asked
    )
    added = {cap for it in asked for cap in it.get("capabilities", {}).get("add", [])}
    assert added == set(granted["allowedCapabilities"])
    # Users and SELinux types of their own choice.
    for which in ("runAsUser", "seLinuxContext"):
        assert granted[which] == {"type": "RunAsAny"}


@pytest.mark.parametrize("overlay", ["multus", "kubevirt"])
def test_other_overlays_undo_the_chained_one(overlay: str) -> None:
    """Where `chained` has been, the next leaves nothing of it in the node's configurations."""
    for folder, last in (("overlays/chained", "--chained"), (f"overlays/{overlay}", "--shim-only")):
        spec = the("DaemonSet", rendered(DEPLOY / folder))["spec"]["template"]["spec"]
        (install,) = spec["initContainers"]
        assert install["args"][-3:] == ["--conf-dir", "/etc/cni/net.d", last]


@pytest.mark.parametrize(
    ("installed", "uninstalled"),
    [
        ("overlays/chained", "uninstall"),
        ("overlays/multus", "uninstall"),
        ("overlays/openshift", "uninstall-openshift"),
    ],
)
def test_uninstall_looks_where_install_has_put_it(installed: str, uninstalled: str) -> None:
    """The way back is by the folders of the way there, and refuses before it removes anything."""
    there = the("DaemonSet", rendered(DEPLOY / installed))["spec"]["template"]["spec"]
    back = the("DaemonSet", rendered(DEPLOY / uninstalled))["spec"]["template"]["spec"]
    (install,) = there["initContainers"]
    check, executables, state = back["initContainers"]
    assert [it["name"] for it in (check, executables, state)] == ["check", "executables", "state"]
    assert executables["args"][0] == "uninstall"
    folders = _folders(back, executables)
    assert _folders(there, install).items() <= folders.items()
    given = dict(itertools.pairwise(executables["args"]))
    assert {given[it] for it in ("--bin-dir", "--conf-dir") if it in given} == folders.keys()


def test_manifests_and_image_are_of_the_projects_version() -> None:
    """What deploy/ runs, and what the image says that it is, is this version."""
    top = DEPLOY.parent
    version = tomllib.loads((top / "pyproject.toml").read_text())["project"]["version"]
    for folder in ("base", "uninstall", "uninstall-openshift"):
        spec = the("DaemonSet", rendered(DEPLOY / folder))["spec"]["template"]["spec"]
        containers = [*spec["initContainers"], *spec["containers"]]
        assert {it["image"] for it in containers} == {f"extbridge:{version}"}
    [said] = re.findall(r"^ARG VERSION=(.*)$", (top / "Dockerfile").read_text(), re.MULTILINE)
    assert said == version


def _resources(spec: Manifest) -> dict[str, int]:
    limits = [it["resources"]["limits"].items() for it in spec["containers"]]
    return {key: number for of in limits for key, number in of if key.startswith("extbridge.io/")}


def _folders(spec: Manifest, container: Manifest) -> dict[str, str]:
    """The node's folders that the container has, by where it has them."""
    hosts = {it["name"]: it["hostPath"]["path"] for it in spec["volumes"] if "hostPath" in it}
    return {it["mountPath"]: hosts[it["name"]] for it in container["volumeMounts"]}


def _accept(config: Manifest, networks: str) -> None:
    refuse_unknown_keys(config)
    assert configured_network(config, networks) is not None


def _validate(manifest: Manifest, version: str) -> None:
    try:
        kubernetes_validate.validate(manifest, version, strict=True)
    except kubernetes_validate.SchemaNotFoundError:
        assert manifest["kind"] in FOREIGN


def _of_kind(kind: str, manifests: list[Manifest]) -> list[Manifest]:
    return [manifest for manifest in manifests if manifest["kind"] == kind]


def _read(path: Path) -> list[Manifest]:
    return list(yaml.safe_load_all(path.read_text()))
