"""A kubelet as far as device plugins see it: `python -m tests.kernel.kubelet_process FOLDER`.

It empties the folder, serves kubelet.sock there, and does as kubelet does (k8s.io/kubernetes,
pkg/kubelet/cm/devicemanager): a plugin that registers is connected to before it is answered, and
listed and watched from then on. The messages are its own, so that it shares no mistake with the
plugin.

What it is to do is told by lines of JSON, each answered by one: see `_Kubelet`.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import grpc
from google.protobuf import json_format
from google.protobuf.message import Message

from tests.messages import Schema, message_classes

_PACKAGE: Final = "v1beta1"
_SCHEMA: Final[Schema] = {
    "Empty": {},
    "Options": {
        "pre_start_required": (1, "bool"),
        "get_preferred_allocation_available": (2, "bool"),
    },
    "RegisterRequest": {
        "version": (1, "string"),
        "endpoint": (2, "string"),
        "resource_name": (3, "string"),
        "options": (4, "Options"),
    },
    "Number": {"value": (1, "int32")},
    "Topology": {"nodes": (1, "Number[]")},
    "Device": {"ID": (1, "string"), "health": (2, "string"), "topology": (3, "Topology")},
    "Devices": {"devices": (1, "Device[]")},
    "ContainerRequest": {"devices_ids": (1, "string[]")},
    "AllocateRequest": {"container_requests": (1, "ContainerRequest[]")},
    "KeyValue": {"key": (1, "string"), "value": (2, "string")},
    "Mount": {
        "container_path": (1, "string"),
        "host_path": (2, "string"),
        "read_only": (3, "bool"),
    },
    "DeviceSpec": {
        "container_path": (1, "string"),
        "host_path": (2, "string"),
        "permissions": (3, "string"),
    },
    "Named": {"name": (1, "string")},
    "ContainerAnswer": {
        "envs": (1, "KeyValue[]"),
        "mounts": (2, "Mount[]"),
        "devices": (3, "DeviceSpec[]"),
        "annotations": (4, "KeyValue[]"),
        "cdi_devices": (5, "Named[]"),
    },
    "AllocateAnswer": {"container_responses": (1, "ContainerAnswer[]")},
}
_MESSAGES: Final = message_classes(_PACKAGE, _SCHEMA)
_SECONDS: Final = 10.0


class _Kubelet:
    """Every public method is something to do, named by `do`, with the other keys its arguments."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._refusals = 0
        self._registrations: list[dict[str, Any]] = []
        self._devices: dict[str, dict[str, str]] = {}
        self._plugins: dict[str, grpc.Channel] = {}
        self._calls: dict[str, Any] = {}

    def state(self) -> dict[str, Any]:
        """What plugins have told so far."""
        return {
            "registrations": self._registrations,
            "devices": self._devices,
        }

    def refuse(self, times: int) -> None:
        """Refuse so many registrations from now on."""
        self._refusals = times

    def forget(self, resource: str) -> None:
        """Hang up on a plugin, as kubelet does with one whose words it cannot understand."""
        self._calls[resource].cancel()

    def allocate(self, resource: str, containers: list[list[str]]) -> dict[str, Any]:
        """Ask for these devices for each of a pod's containers."""
        request = {"container_requests": [{"devices_ids": ids} for ids in containers]}
        try:
            answer = _method(self._plugins[resource], "Allocate", "AllocateRequest",
                             "AllocateAnswer")(request)  # fmt: skip
        except grpc.RpcError as error:
            return {"code": error.code().name, "details": error.details()}
        return {"containers": answer.get("container_responses", [])}

    def allocate_at_once(self, resource: str, devices: list[str]) -> list[dict[str, Any]]:
        """Ask for each of the devices for a pod of its own, all at once."""
        with ThreadPoolExecutor(len(devices)) as threads:
            return list(threads.map(lambda it: self.allocate(resource, [[it]]), devices))

    def time_allocate(self, resource: str, device: str, times: int) -> list[float]:
        """How many milliseconds it takes to allocate a device, time after time."""
        allocate = _method(self._plugins[resource], "Allocate", "AllocateRequest", "AllocateAnswer")
        taken = []
        for _ in range(times):
            began = time.perf_counter()
            allocate({"container_requests": [{"devices_ids": [device]}]})
            taken.append((time.perf_counter() - began) * 1000)
        return taken

    def register(self, request: Message, context: grpc.ServicerContext) -> Message:
        """Be what a plugin calls."""
        asked = json_format.MessageToDict(request, preserving_proto_field_name=True)
        if self._refusals:
            self._refusals -= 1
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "not now")
        plugin = grpc.insecure_channel(f"unix:{self._folder / asked['endpoint']}")
        options = _method(plugin, "GetDevicePluginOptions", "Empty", "Options")({})
        resource = asked["resource_name"]
        former = self._plugins.get(resource)
        self._plugins[resource] = plugin
        self._registrations.append({**asked, "told": options})
        threading.Thread(target=self._watch, args=(resource, plugin), daemon=True).start()
        if former is not None:
            former.close()
        return _MESSAGES[f"{_PACKAGE}.Empty"]()

    def _watch(self, resource: str, plugin: grpc.Channel) -> None:
        call = plugin.unary_stream(
            f"/{_PACKAGE}.DevicePlugin/ListAndWatch",
            request_serializer=_serialize,
            response_deserializer=_MESSAGES[f"{_PACKAGE}.Devices"].FromString,
        )(_MESSAGES[f"{_PACKAGE}.Empty"]())
        self._calls[resource] = call
        with suppress(grpc.RpcError):
            for listed in call:
                devices = json_format.MessageToDict(listed, preserving_proto_field_name=True)
                self._devices[resource] = {
                    it["ID"]: it["health"] for it in devices.get("devices", [])
                }
        if self._calls.get(resource) is call:
            # As markResourceUnhealthy does.
            gone = self._devices.get(resource, {})
            self._devices[resource] = dict.fromkeys(gone, "Unhealthy")
            del self._calls[resource]


def _method(plugin: grpc.Channel, name: str, asks: str, answers: str) -> Any:  # noqa: ANN401 - JSON
    call = plugin.unary_unary(
        f"/{_PACKAGE}.DevicePlugin/{name}",
        request_serializer=_serialize,
        response_deserializer=_MESSAGES[f"{_PACKAGE}.{answers}"].FromString,
    )

    def ask(request: dict[str, Any]) -> dict[str, Any]:
        message = json_format.ParseDict(request, _MESSAGES[f"{_PACKAGE}.{asks}"]())
        answer: Message = call(message, timeout=_SECONDS)
        told: dict[str, Any] = json_format.MessageToDict(answer, preserving_proto_field_name=True)
        return told

    return ask


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()


def main(folder: Path) -> None:
    """Serve until standard input ends; then, as kubelet does, remove the socket."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.name != "kubelet_internal_checkpoint" and not path.is_dir():
            path.unlink()
    kubelet = _Kubelet(folder)
    server = grpc.server(ThreadPoolExecutor(8))
    handlers = {
        "Register": grpc.unary_unary_rpc_method_handler(
            kubelet.register,
            request_deserializer=_MESSAGES[f"{_PACKAGE}.RegisterRequest"].FromString,
            response_serializer=_serialize,
        )
    }
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(f"{_PACKAGE}.Registration", handlers),)
    )
    server.add_insecure_port(f"unix:{folder / 'kubelet.sock'}")
    server.start()
    for line in sys.stdin:
        asked = json.loads(line)
        answer = getattr(kubelet, asked.pop("do"))(**asked)
        print(json.dumps(answer), flush=True)  # noqa: T201 - for whoever asks
    server.stop(None).wait()
    # Its own threads wait for plugins that do not end.
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
