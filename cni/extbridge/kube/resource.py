"""A resource: what kubelet knows of one network, and the server that it asks about it."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Final

import grpc
import grpc.aio
from google.protobuf.message import Message

from extbridge.kube.proto import device_plugin_pb2 as api
from extbridge.network.definition import Handoff, Network
from extbridge.node.metrics import Metrics

log = logging.getLogger(__name__)

DOMAIN: Final = "extbridge.io"
KUBELET_SOCKET: Final = "kubelet.sock"

HEALTH: Final = {True: "Healthy", False: "Unhealthy"}
"""kubelet's words for whether a device can be used."""

_VERSION: Final = "v1beta1"

_REGISTER_SECONDS: Final = 20.0
"""kubelet connects to the plugin meanwhile, and gives itself 10 s for that (client.go, dial)."""

_END_SECONDS: Final = 1.0
_BACKOFF_SECONDS: Final = 1.0
_MAX_BACKOFF_SECONDS: Final = 30.0

_numbers = count()

Context = grpc.aio.ServicerContext[Message, Message]
File = tuple[int, int, int]
"""What tells a file from its successor at the same path."""


@dataclass(frozen=True, slots=True)
class Offer:
    """What a network has for kubelet: its devices, and whether a NIC can carry each."""

    network: Network
    devices: Mapping[int, bool]


class Resource:
    """One resource: its server on a socket of its own, and what kubelet knows of it.

    `wake` has DevicePlugins look again.
    """

    def __init__(
        self,
        offer: Offer,
        folder: Path,
        pod_folder: Path,
        metrics: Metrics,
        wake: Callable[[], None],
    ) -> None:
        self._offer = offer
        self._name = f"{DOMAIN}/{offer.network.name}"
        self._network = offer.network.name
        self._folder = folder
        self._pod_folder = pod_folder
        self._metrics = metrics
        self._wake = wake
        self._loop = asyncio.get_running_loop()
        self._path = socket_path(folder, self._network)
        self._news = asyncio.Condition()
        self._server: grpc.aio.Server | None = None
        self._socket: File | None = None
        self._streams = 0
        self._kubelet: File | None = None
        self._registering: asyncio.Task[None] | None = None
        self._refused_by: File | None = None
        self._refusal = ""
        self._backoff = _BACKOFF_SECONDS
        self._try_at = 0.0

    async def offer(self, offer: Offer) -> None:
        """Have kubelet know this from now on."""
        async with self._news:
            self._offer = offer
            self._news.notify_all()

    async def listen(self) -> None:
        """See that the socket is there: kubelet removes it when it starts."""
        if self._socket is not None and self._socket == file_at(self._path):
            return
        await self._stop_serving()
        self._server = grpc.aio.server()
        self._server.add_generic_rpc_handlers((self._handlers(),))
        # gRPC removes what is at the path that it was given, now and some time after its end. So
        # that is another one, and the name by which kubelet knows the socket is ours alone.
        draft = self._folder / f".{os.getpid()}.{next(_numbers)}"
        self._server.add_insecure_port(f"unix:{draft}")
        draft.chmod(0o600)
        draft.rename(self._path)
        self._socket = file_at(self._path)
        await self._server.start()
        self._kubelet = None

    def introduce(self, kubelet: File | None) -> None:
        """Register with the kubelet whose socket this is, if it does not know the resource yet."""
        if kubelet in (None, self._kubelet) or self._registering is not None:
            return
        if kubelet == self._refused_by and self._loop.time() < self._try_at:
            return
        self._registering = asyncio.create_task(self._register(kubelet))

    async def close(self) -> None:
        """Withdraw the resource: to kubelet its devices are unhealthy, and gone after a while."""
        registering = self._registering
        if registering is not None:
            registering.cancel()
            await asyncio.wait((registering,))
        await self._stop_serving()

    async def _stop_serving(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            # Streams end by themselves: gRPC calls it a defect when it has to cancel one.
            async with self._news:
                self._news.notify_all()
            await server.stop(_END_SECONDS)
        if self._socket is not None and self._socket == file_at(self._path):
            self._path.unlink()
        self._socket = None

    async def _register(self, kubelet: File | None) -> None:
        code = grpc.StatusCode.OK
        try:
            async with grpc.aio.insecure_channel(
                f"unix:{self._folder / KUBELET_SOCKET}"
            ) as kubelets:
                register = kubelets.unary_unary(
                    f"/{_VERSION}.Registration/Register",
                    request_serializer=api.RegisterRequest.SerializeToString,
                    response_deserializer=api.Empty.FromString,
                )
                await register(
                    api.RegisterRequest(
                        version=_VERSION,
                        endpoint=self._path.name,
                        resource_name=self._name,
                        options=api.DevicePluginOptions(),
                    ),
                    timeout=_REGISTER_SECONDS,
                )
        except grpc.aio.AioRpcError as error:
            code = error.code()
            first_line = (error.details() or "").partition("\n")[0]
            self._be_refused(kubelet, f"{code.name}: {first_line}")
        else:
            self._kubelet, self._refused_by, self._refusal = kubelet, None, ""
            log.info("resource %s is registered", self._name)
        finally:
            self._registering = None
        self._metrics.registrations.labels(self._network, code.name).inc()
        # It may be another kubelet's socket by now.
        self._wake()

    def _be_refused(self, kubelet: File | None, refusal: str) -> None:
        again = kubelet == self._refused_by
        self._backoff = min(self._backoff * 2, _MAX_BACKOFF_SECONDS) if again else _BACKOFF_SECONDS
        self._refused_by = kubelet
        self._try_at = self._loop.time() + self._backoff
        self._loop.call_later(self._backoff, self._wake)
        # A kubelet that was killed leaves its socket behind, and is tried until the next one comes.
        if refusal != self._refusal:
            log.warning("kubelet does not register %s: %s", self._name, refusal)
            self._refusal = refusal

    def _handlers(self) -> grpc.GenericRpcHandler:
        return grpc.method_handlers_generic_handler(
            f"{_VERSION}.DevicePlugin",
            {
                "GetDevicePluginOptions": grpc.unary_unary_rpc_method_handler(
                    self._tell_options,
                    api.Empty.FromString,
                    api.DevicePluginOptions.SerializeToString,
                ),
                "ListAndWatch": grpc.unary_stream_rpc_method_handler(
                    self._list_and_watch,
                    api.Empty.FromString,
                    api.ListAndWatchResponse.SerializeToString,
                ),
                "Allocate": grpc.unary_unary_rpc_method_handler(
                    self._allocate,
                    api.AllocateRequest.FromString,
                    api.AllocateResponse.SerializeToString,
                ),
            },
        )

    async def _tell_options(self, _: api.Empty, __: Context) -> api.DevicePluginOptions:
        return api.DevicePluginOptions()

    async def _list_and_watch(
        self, _: api.Empty, __: Context
    ) -> AsyncIterator[api.ListAndWatchResponse]:
        self._streams += 1
        server = self._server
        told: Mapping[int, bool] | None = None
        try:
            while True:
                async with self._news:
                    while self._server is server and self._offer.devices == told:
                        await self._news.wait()
                    told = self._offer.devices
                if self._server is not server:
                    return
                yield api.ListAndWatchResponse(
                    devices=[
                        api.Device(ID=str(ifindex), health=HEALTH[able])
                        for ifindex, able in told.items()
                    ]
                )
        finally:
            self._streams -= 1
            if not self._streams:
                # kubelet has ended, or has no use for us that we know of: it hears of us anew.
                self._kubelet = None
                self._loop.call_later(_BACKOFF_SECONDS, self._wake)

    async def _allocate(
        self, request: api.AllocateRequest, context: Context
    ) -> api.AllocateResponse:
        """Say how containers get their devices; whether they can have them, ADD finds out."""
        network, devices = self._offer.network, self._offer.devices
        known = set(map(str, devices))
        answer = api.AllocateResponse()
        allocated = []
        for container in request.container_requests:
            given = answer.container_responses.add()
            for device in container.devices_ids:
                if device not in known:
                    await context.abort(
                        grpc.StatusCode.NOT_FOUND,
                        f"{self._name} has no device {device!r}; ListAndWatch says which it has",
                    )
                allocated.append(device)
                if network.handoff is Handoff.DEVICE:
                    node = f"/dev/tap{device}"
                    given.devices.add(container_path=node, host_path=node, permissions="rw")
            if network.handoff is Handoff.FD and container.devices_ids:
                folder = str(self._pod_folder)
                given.mounts.add(container_path=folder, host_path=folder, read_only=True)
        self._metrics.allocations.labels(self._network).inc(len(allocated))
        log.info("allocated", extra={"resource": self._name, "devices": ",".join(allocated)})
        return answer


def socket_path(folder: Path, network: str) -> Path:
    """Where in kubelet's folder the network's resource is served."""
    return folder / f"extbridge-{network}.sock"


def file_at(path: Path) -> File | None:
    """The file that is at the path now, if there is one."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino, status.st_ctime_ns
