"""What becomes of networks that other programs had: ours, and the CNI configurations with them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from extbridge.network.definition import Handoff, Network, network_to_object, parse_network
from extbridge.network.spelling_yaml import network_to_yaml, values_to_yaml
from extbridge.spec.errors import InvalidNetworkConfig
from extbridge.spec.fields import JsonObject, get_objects, get_str

RESOURCE_PREFIX: Final = "extbridge.io/"

RESOURCE_ANNOTATION: Final = "k8s.v1.cni.cncf.io/resourceName"

ATTACHMENT_KIND: Final = "NetworkAttachmentDefinition"

CONFIG_MAP: Final = "extbridge-networks"
"""The ConfigMap that deploy/ mounts as the folder of networks."""

CAPABILITIES: Final[JsonObject] = dict.fromkeys(("mac", "ips", "bandwidth", "deviceID"), True)

_APPLIED_ANNOTATION = "kubectl.kubernetes.io/last-applied-configuration"

_VERSION = "1.0.0"
"""Of a configuration that nobody has had yet: the newest that all living runtimes speak."""


class Form(StrEnum):
    """What a conversion is written as."""

    YAML = "yaml"
    NAD = "nad"
    JSON = "json"


@dataclass(frozen=True, slots=True)
class Configuration:
    """A CNI configuration that uses network; `head` is what a list has around its plugins.

    `plugins` are those of a list, with None in our place; without them, there is no list. `own` are
    keys of our plugin that define no network, `metadata` that of its attachment definition.
    """

    where: str
    network: str
    head: JsonObject
    plugins: tuple[JsonObject | None, ...] = ()
    own: JsonObject = field(default_factory=dict)
    metadata: JsonObject | None = None


@dataclass(slots=True)
class Conversion:
    """Networks by name, the configurations that use them; `left_out` in sentences."""

    networks: dict[str, Network] = field(default_factory=dict)
    configurations: list[Configuration] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def add(self, network: Network) -> None:
        """Raises InvalidNetworkConfig where its name stands for another already."""
        if self.networks.setdefault(network.name, network) != network:
            raise InvalidNetworkConfig(
                f"the network {network.name} is there already, and is another",
                "convert the two apart, and give one of them another name",
            )

    def write(self, form: Form) -> str:
        """All of it in one text. What form cannot hold is added to `left_out`.

        YAML: the ConfigMap of the networks, and the attachment definitions that there were. NAD: an
        attachment definition for each, with its network in it. JSON: the configuration of the one
        network; raises InvalidNetworkConfig for more.
        """
        if form is Form.YAML:
            return self._write_yaml()
        for network in self.networks.values():
            if network.handoff is Handoff.DEVICE:
                self.left_out.append(
                    f"network {network.name}: kubelet hands a device over for networks in the"
                    f" nodes' folder alone, which --to {Form.YAML} writes"
                )
        configured = {it.network for it in self.configurations}
        configurations = self.configurations + [
            Configuration("", name, {"cniVersion": _VERSION, "name": name})
            for name in self.networks
            if name not in configured
        ]
        if form is Form.NAD:
            return values_to_yaml([self._attachment(it, is_inline=True) for it in configurations])
        if len(configurations) > 1:
            raise InvalidNetworkConfig(
                f"a CNI configuration is for one network, and there are {len(configurations)}:"
                f" {', '.join(it.network for it in configurations)}",
                f"give one file at a time, or --to {Form.NAD} or {Form.YAML}",
            )
        body = self._body(configurations[0], is_inline=True)
        return json.dumps(body, indent=2) + "\n"

    def _write_yaml(self) -> str:
        files = {f"{name}.yaml": network_to_yaml(it) for name, it in self.networks.items()}
        config_map = {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": CONFIG_MAP, "namespace": "extbridge"},
            "data": files,
        }
        attached = [it for it in self.configurations if it.metadata is not None]
        for configuration in self.configurations:
            besides = [*configuration.own]
            besides += [get_str(it, "type") or "" for it in configuration.plugins if it is not None]
            if configuration.metadata is None and besides:
                self.left_out.append(
                    f"{configuration.where}: {', '.join(besides)}: a network's definition has no"
                    f" place for it, and what --to {Form.JSON} writes has"
                )
        return values_to_yaml(
            ([config_map] if files else [])
            + [self._attachment(it, is_inline=False) for it in attached]
        )

    def _attachment(self, configuration: Configuration, *, is_inline: bool) -> dict[str, object]:
        metadata: dict[str, object] = {}
        annotations: dict[str, object] = {}
        if configuration.metadata is None:
            metadata["name"] = self._object_name(configuration.network)
        else:
            given = configuration.metadata
            metadata |= {key: given[key] for key in ("name", "namespace", "labels") if key in given}
            annotations |= _annotations(given)
        if is_inline:
            annotations.pop(RESOURCE_ANNOTATION, None)
        else:
            annotations[RESOURCE_ANNOTATION] = f"{RESOURCE_PREFIX}{configuration.network}"
        if annotations:
            metadata["annotations"] = annotations
        body = self._body(configuration, is_inline=is_inline)
        return {
            "apiVersion": "k8s.cni.cncf.io/v1",
            "kind": ATTACHMENT_KIND,
            "metadata": {key: value for key, value in metadata.items() if value},
            "spec": {"config": json.dumps(body, indent=2) + "\n"},
        }

    def _object_name(self, network: str) -> str:
        """The network's name as Kubernetes allows names (RFC 1123, in lower case)."""
        label = "[a-z0-9]([a-z0-9-]*[a-z0-9])?"
        if re.fullmatch(rf"{label}(\.{label})*", network):
            return network
        name = re.sub("[^a-z0-9]+", "-", network.lower()).strip("-")
        self.left_out.append(f"network {network}: Kubernetes allows no such name; {name} it is")
        return name

    def _body(self, configuration: Configuration, *, is_inline: bool) -> JsonObject:
        ours: dict[str, object] = {"type": "extbridge"}
        if is_inline:
            definition = network_to_object(self.networks[configuration.network])
            # The configuration's own name is the one that IPAM plugins keep leases under.
            parse_network({**definition, "name": get_str(configuration.head, "name")})
            ours |= {key: value for key, value in definition.items() if key != "name"}
        else:
            ours["network"] = configuration.network
        ours |= {"capabilities": CAPABILITIES, **configuration.own}
        if not configuration.plugins:
            return {**configuration.head, **ours}
        return {
            **configuration.head,
            "plugins": [ours if it is None else it for it in configuration.plugins],
        }


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Errors of the block say where."""
    try:
        yield
    except InvalidNetworkConfig as failure:
        raise InvalidNetworkConfig(f"{where}: {failure.message}", failure.hint) from failure


def split_plugins(
    theirs: JsonObject, kind: str
) -> tuple[JsonObject, tuple[JsonObject | None, ...]]:
    """The plugin of this kind, and all of its list with None in its place; no list, none.

    Raises InvalidNetworkConfig unless there is exactly one.
    """
    plugins = get_objects(theirs, "plugins")
    if plugins is None:
        return theirs, ()
    found = [it for it in plugins if it.get("type") == kind]
    if len(found) != 1:
        raise InvalidNetworkConfig(
            f"plugins has {len(found)} of the type {kind}", "one list makes one NIC: keep one"
        )
    return found[0], tuple(None if it is found[0] else it for it in plugins)


def _annotations(metadata: JsonObject) -> dict[str, object]:
    given = metadata.get("annotations")
    kept = given if isinstance(given, Mapping) else {}
    return {key: value for key, value in kept.items() if key != _APPLIED_ANNOTATION}
