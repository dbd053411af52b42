"""What an ADD asks for: which networks, under which names, with which addresses.

All of it is decided from the request and definition files, before anything in the kernel is looked
at.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from extbridge.network.addresses import parse_ips
from extbridge.network.annotation import (
    NETWORKS_ANNOTATION,
    AskedNic,
    parse_networks_annotation,
)
from extbridge.network.bandwidth import pods_bandwidth
from extbridge.network.definition import (
    DEFINITION_KEYS,
    FIRST_IFINDEX,
    LAST_IFINDEX,
    Antispoof,
    Bandwidth,
    Network,
    parse_network,
)
from extbridge.network.mac import derive_mac, parse_mac
from extbridge.network.store import DEFAULT_DIRECTORY, load_network
from extbridge.spec.errors import (
    InvalidEnvironment,
    InvalidNetworkConfig,
    NameTaken,
    TryAgainLater,
    UnsupportedField,
)
from extbridge.spec.fields import (
    JsonObject,
    describe,
    get_list,
    get_object,
    get_str,
    refuse_unknown,
)
from extbridge.spec.request import Request
from extbridge.spec.result import prev_interface

POD_ANNOTATIONS: Final = "io.kubernetes.cri.pod-annotations"
"""The capability by which containerd hands a pod's annotations to a plugin."""

VM_ANNOTATION: Final = "extbridge.io/vm"

VM_MARKS: Final = (VM_ANNOTATION, "kubevirt.io/domain", "vm.kubevirt.io/name")
"""What names a pod's VM, the first that is there. KubeVirt's are annotation and label, and label
(kubevirt.io/api/core/v1, DomainAnnotation, VirtualMachineNameLabel)."""

_CNI_KEYS = (
    "cniVersion",
    "cniVersions",
    "name",
    "type",
    "disableCheck",
    "disableGC",
    "loadOnlyInlinedPlugins",
    "capabilities",
    "runtimeConfig",
    "args",
    "prevResult",
    "dns",
)

_DEVICE_KEYS = ("deviceID", "pciBusID")
"""Where Multus writes the device that kubelet gave the pod, whatever it is, into the configuration
of each plugin (pkg/types/conf.go, delegateAddDeviceID, addDeviceIDInConfList); into runtimeConfig
it comes besides, for those that declare the capability."""

_CONFIG_KEYS = tuple(
    dict.fromkeys((*_CNI_KEYS, *_DEVICE_KEYS, "network", "networksDir", *DEFINITION_KEYS))
)

_MAX_VM_NAME_CHARACTERS = 253
"""What Kubernetes allows the name of an object."""

_DEVICES = range(FIRST_IFINDEX, LAST_IFINDEX + 1)
_DEVICE_DIGITS = len(str(LAST_IFINDEX))


@dataclass(frozen=True, slots=True)
class VmIdentity:
    """Whose NIC it is, the same on every node and after every restart."""

    namespace: str
    name: str


@dataclass(frozen=True, slots=True)
class PodFacts:
    """What Kubernetes has of a pod, in so far as it decides about NICs; empty: it has no such pod.

    `vm` is the VM's name by the pod's annotations or labels, empty if they name none.
    """

    annotations: Mapping[str, str] = field(default_factory=dict)
    vm: str = ""


FindPod: TypeAlias = Callable[[str, str, str], PodFacts | None]
"""The pod by its namespace, name and UID; None where nobody can say now. It takes half a second at
most and raises nothing."""


@dataclass(frozen=True, slots=True)
class WantedNic:
    """One NIC to make. ifname None is the first unused `macvtap%d`, mac None the derived one.

    `ips` are the addresses that are asked for, `bandwidth` the limits in force, and `ifindex` the
    one that a device plugin has reserved for it, if it has.
    """

    network: Network
    ifname: str | None
    mac: str | None
    vm: VmIdentity
    ips: tuple[str, ...] = ()
    bandwidth: Bandwidth | None = None
    ifindex: int | None = None


def wanted_nics(
    request: Request, networks_dir: str = DEFAULT_DIRECTORY, find_pod: FindPod | None = None
) -> tuple[WantedNic, ...]:
    """The NICs that an ADD asks for; none where a chained pod's annotation asks for none.

    Kubernetes is asked (`find_pod`) for what the request does not say. Of ADD only: the prevResult
    of other verbs already holds what ADD made. Raises InvalidNetworkConfig, UnsupportedField,
    InvalidEnvironment, NameTaken, TryAgainLater and IoFailure.
    """
    config = request.config
    refuse_unknown_keys(config)
    runtime = get_object(config, "runtimeConfig") or {}
    annotations = _get_annotations(config)
    does_pod_decide = (
        _declares_annotations(config) or (find_pod is not None and not _names_network(config))
    ) and request.prev_result is not None
    if does_pod_decide and find_pod is not None and POD_ANNOTATIONS not in runtime:
        annotations = _find_annotations(request, find_pod)
    asked = _parse_asked(annotations)
    if does_pod_decide:
        networks = [_find_network(config, nic.name, networks_dir) for nic in asked]
    else:
        network = configured_network(config, networks_dir)
        if network is None:
            raise InvalidNetworkConfig(
                "the configuration says neither extbridge nor network",
                'name the NIC: "extbridge": {"dev": "eth0"}, or a definition: "network": "NAME"',
            )
        networks = [network]
        asked = (_find_own(asked, network.name),)
    if not networks:
        return ()
    ifnames = _choose_ifnames(request, asked)
    macs = _choose_macs(request, runtime, asked, networks)
    ips = _choose_ips(runtime, asked, networks)
    ifindex = _get_device(config, runtime, asked)
    limits = get_object(runtime, "bandwidth", where="runtimeConfig") or {}
    vm = _identify_vm(request, annotations, None if all(macs) else find_pod)
    return tuple(
        WantedNic(
            network,
            ifname,
            mac,
            vm,
            ips,
            pods_bandwidth(limits, annotations, network.bandwidth),
            ifindex,
        )
        for network, ifname, mac, ips in zip(networks, ifnames, macs, ips, strict=True)
    )


def count_nics(request: Request, *, is_chained: bool) -> int:
    """How many NICs ADD made for this attachment, behind another plugin or not.

    For CHECK, whose prevResult does not tell: it holds ours as it holds the others'. Raises
    InvalidNetworkConfig.
    """
    config = request.config
    if not is_chained or (not _declares_annotations(config) and _names_network(config)):
        return 1
    return len(_parse_asked(_get_annotations(request.config)))


def refuse_unknown_keys(config: JsonObject) -> None:
    """Raise InvalidNetworkConfig for a key that neither CNI nor a network's definition has."""
    # SPEC 1.1.0 section 1 keeps every key that begins so for itself.
    ours = {key: value for key, value in config.items() if not key.startswith("cni.dev/")}
    refuse_unknown(ours, _CONFIG_KEYS)


def configured_network(config: JsonObject, networks_dir: str = DEFAULT_DIRECTORY) -> Network | None:
    """The one network that the configuration itself names or defines; None if neither.

    Raises InvalidNetworkConfig and IoFailure.
    """
    definition = inline_definition(config)
    name = get_str(config, "network")
    if name is None:
        return None if definition is None else _parsed(definition)
    if definition is not None:
        inline = ", ".join(key for key in definition if key != "name")
        raise InvalidNetworkConfig(
            f"the configuration names the network {name!r} and gives keys of one besides: {inline}",
            "either name a network or define it here",
        )
    return load_network(name, _networks_dir(config, networks_dir))


def inline_definition(config: JsonObject) -> JsonObject | None:
    """The keys of config that define a network, its name with them; None if there are none.

    A key without a value counts as absent: Go writes an ipam that was never filled as {}.
    """
    given = {key: config[key] for key in DEFINITION_KEYS if config.get(key) not in (None, {})}
    return given if given.keys() - {"name"} else None


def derived_or_given_mac(wanted: WantedNic, ifname: str) -> str:
    """The MAC that wanted is to have under the name that it got."""
    return wanted.mac or derive_mac(
        wanted.network.mac_prefix,
        network=wanted.network.name,
        namespace=wanted.vm.namespace,
        vm=wanted.vm.name,
        ifname=ifname,
    )


def _names_network(config: JsonObject) -> bool:
    return inline_definition(config) is not None or get_str(config, "network") is not None


def _find_annotations(request: Request, find_pod: FindPod) -> JsonObject:
    """The pod's annotations, which its runtime did not hand over.

    Raises TryAgainLater where nobody knows them: a VM without its NIC would stay without.
    """
    facts = _ask_kubernetes(request, find_pod)
    if facts is None:
        raise TryAgainLater(
            "nobody can say whether the pod asks for NICs: its runtime hands over no annotations,"
            " and the API server does not answer",
            "the agent's log says what is wrong with the API server",
        )
    return facts.annotations


def _ask_kubernetes(request: Request, find_pod: FindPod) -> PodFacts | None:
    """Facts about the request's pod; none, and no question, about what is no pod of Kubernetes."""
    pod = [request.args.get(f"K8S_POD_{key}", "") for key in ("NAMESPACE", "NAME", "UID")]
    return find_pod(*pod) if pod[0] and pod[1] else PodFacts()


def _get_annotations(config: JsonObject) -> JsonObject:
    runtime = get_object(config, "runtimeConfig") or {}
    return get_object(runtime, POD_ANNOTATIONS, where="runtimeConfig") or {}


def _parse_asked(annotations: JsonObject) -> tuple[AskedNic, ...]:
    return parse_networks_annotation(get_str(annotations, NETWORKS_ANNOTATION) or "")


def _declares_annotations(config: JsonObject) -> bool:
    capabilities = get_object(config, "capabilities") or {}
    return capabilities.get(POD_ANNOTATIONS) is True


def _networks_dir(config: JsonObject, default: str) -> str:
    given = get_str(config, "networksDir")
    if given is None:
        return default
    if not given.startswith("/") or not given.isprintable():
        raise InvalidNetworkConfig(
            f"networksDir is {describe(given)}", f"it has to be a path from /: {DEFAULT_DIRECTORY}"
        )
    return given


def _find_network(config: JsonObject, name: str, networks_dir: str) -> Network:
    definition = inline_definition(config)
    if definition is not None and definition.get("name") == name:
        return _parsed(definition)
    return load_network(name, _networks_dir(config, networks_dir))


def _parsed(definition: JsonObject) -> Network:
    return _parse_text(json.dumps(definition))


@functools.lru_cache(maxsize=256)
def _parse_text(text: str) -> Network:
    # As in store: an agent is asked for the same few networks over and over.
    return parse_network(json.loads(text))


def _find_own(asked: Sequence[AskedNic], name: str) -> AskedNic:
    """What the annotation says about the one network that the configuration is for.

    Not its interface: that is CNI_IFNAME, and whoever set that has read an annotation already.
    """
    own = next((nic for nic in asked if nic.name == name), AskedNic(name))
    return AskedNic(name, mac=own.mac, ips=own.ips)


def _choose_ips(
    runtime: JsonObject, asked: Sequence[AskedNic], networks: Sequence[Network]
) -> list[tuple[str, ...]]:
    """The runtime's, or else the annotation's."""
    where = "runtimeConfig.ips"
    from_runtime = parse_ips(get_list(runtime, "ips", where="runtimeConfig") or (), where=where)
    if from_runtime and len(asked) > 1:
        raise UnsupportedField(
            f"{where} is given for a pod with {len(asked)} NICs",
            f"give each NIC its own in {NETWORKS_ANNOTATION}",
        )
    chosen = [from_runtime or nic.ips for nic in asked]
    for network, ips in zip(networks, chosen, strict=True):
        if network.held_to is Antispoof.IP and network.ipam is None and not ips:
            raise InvalidNetworkConfig(
                f"network {network.name} has antispoof: ip, and nothing says which IP addresses",
                "give the network an ipam, or the pod its ips",
            )
    return chosen


def _get_device(config: JsonObject, runtime: JsonObject, asked: Sequence[AskedNic]) -> int | None:
    """The ifindex that the device ID names, which stands in up to three places."""
    said = {"runtimeConfig.deviceID": get_str(runtime, "deviceID", where="runtimeConfig")}
    said |= {key: get_str(config, key) for key in _DEVICE_KEYS}
    devices = [(where, device) for where, device in said.items() if device]
    if not devices:
        return None
    where, given = devices[0]
    for other, device in devices[1:]:
        if device != given:
            raise InvalidNetworkConfig(
                f"{where} is {describe(given)}, and {other} is {describe(device)}",
                "they have to be the same device; leave them out of the configuration, the runtime"
                " adds them",
            )
    if len(asked) > 1:
        raise UnsupportedField(
            f"{where} is given for a pod with {len(asked)} NICs",
            "ask for one device and one network",
        )
    if (
        not given.isascii()
        or not given.isdecimal()
        or len(given) > _DEVICE_DIGITS
        or int(given) not in _DEVICES
    ):
        raise InvalidNetworkConfig(
            f"{where} is {describe(given)}",
            f"it has to be an ifindex that extbridge's device plugin has reserved, from"
            f" {FIRST_IFINDEX} to {LAST_IFINDEX}",
        )
    return int(given)


def _choose_ifnames(request: Request, asked: Sequence[AskedNic]) -> list[str | None]:
    """CNI_IFNAME for the first, unless an earlier plugin has made it; then as the pod asks."""
    ifnames = [nic.interface for nic in asked]
    if not _is_taken(request, request.ifname):
        if ifnames[0] not in {None, request.ifname}:
            raise UnsupportedField(
                f"{NETWORKS_ANNOTATION} asks for {ifnames[0]} while no earlier plugin has made "
                f"{request.ifname}",
                f"the first NIC has to be {request.ifname}; leave its interface out",
            )
        ifnames[0] = request.ifname
    for index, ifname in enumerate(ifnames):
        if ifname is not None and (_is_taken(request, ifname) or ifname in ifnames[:index]):
            raise NameTaken(
                f"the interface name {ifname} is taken",
                f"ask for another in {NETWORKS_ANNOTATION}",
            )
    return ifnames


def _is_taken(request: Request, ifname: str) -> bool:
    interface = prev_interface(request.prev_result, ifname)
    return interface is not None and bool(interface.get("sandbox"))


def _choose_macs(
    request: Request,
    runtime: JsonObject,
    asked: Sequence[AskedNic],
    networks: Sequence[Network],
) -> list[str | None]:
    """The first given of the runtime's, the annotation's and the network's; None is derived."""
    from_runtime = _get_runtime_mac(request, runtime)
    if from_runtime is not None and len(asked) > 1:
        raise UnsupportedField(
            f"the MAC {from_runtime} is given for a pod with {len(asked)} NICs",
            f"give each NIC its own in {NETWORKS_ANNOTATION}",
        )
    return [
        from_runtime or nic.mac or network.mac for nic, network in zip(asked, networks, strict=True)
    ]


def _get_runtime_mac(request: Request, runtime: JsonObject) -> str | None:
    """runtimeConfig, args, CNI_ARGS: the order that CNI's conventions give them."""
    cni_args = get_object(get_object(request.config, "args") or {}, "cni", where="args") or {}
    for obj, where in ((runtime, "runtimeConfig"), (cni_args, "args.cni")):
        given = get_str(obj, "mac", where=where)
        if given:
            return parse_mac(given, field=f"{where}.mac")
    given = request.args.get("MAC")
    if not given:
        return None
    try:
        return parse_mac(given, field="MAC of CNI_ARGS")
    except InvalidNetworkConfig as failure:
        raise InvalidEnvironment(failure.message, failure.hint) from failure


def _identify_vm(request: Request, annotations: JsonObject, find_pod: FindPod | None) -> VmIdentity:
    where, annotated = next(
        ((mark, vm) for mark in VM_MARKS if (vm := get_str(annotations, mark))), (VM_ANNOTATION, "")
    )
    if not annotated and find_pod is not None:
        facts = _ask_kubernetes(request, find_pod)
        if facts is None:
            request.notes["vm"] = "unknown, the MAC follows the pod's name"
        else:
            annotated = facts.vm
    if annotated and (len(annotated) > _MAX_VM_NAME_CHARACTERS or not annotated.isprintable()):
        raise InvalidNetworkConfig(
            f"{where} is {describe(annotated)}",
            f"it has to be the VM's name, printable, of at most {_MAX_VM_NAME_CHARACTERS} "
            "characters",
        )
    return VmIdentity(
        namespace=request.args.get("K8S_POD_NAMESPACE", ""),
        name=annotated or request.args.get("K8S_POD_NAME") or request.container_id,
    )
