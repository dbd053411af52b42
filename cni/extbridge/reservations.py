"""Reserved ifindexes: which are kept for the devices of which network.

They are derived from the names of node and network, not stored: kubelet remembers what it has
allocated over its own restarts, the agent's and the node's, and the numbers have to be the same
afterwards. The node's name is in it because one kernel, and so one /dev, may be several nodes'.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from extbridge.network.definition import FIRST_DEVICE, LAST_IFINDEX
from extbridge.spec.errors import InvalidNetworkConfig, TryAgainLater

DEVICES: Final = 256
"""How many ifindexes a network has: more than kubelet's 110 pods, as many as a pool's NICs."""

_BLOCKS: Final = (LAST_IFINDEX + 1 - FIRST_DEVICE) // DEVICES


class Reservations:
    """The reservations of one node; `define` may be called while others ask."""

    def __init__(self, node: str) -> None:
        self._node = node
        self._blocks: Mapping[str, range] = {}
        self._claimed: set[int] = set()
        self._lock = threading.Lock()

    def define(self, networks: Collection[str]) -> Mapping[str, range]:
        """Reserve for these networks and no others; each has DEVICES ifindexes.

        Where two networks meet, once among a million, the first by name has its own, whichever of
        them came first.
        """
        taken: dict[int, str] = {}
        for network in sorted(networks):
            block = self._derived(network)
            while block in taken:
                block = (block + 1) % _BLOCKS
            taken[block] = network
        self._blocks = {
            network: range(first := FIRST_DEVICE + block * DEVICES, first + DEVICES)
            for block, network in taken.items()
        }
        return self._blocks

    @contextmanager
    def claimed(self, network: str, ifindex: int) -> Iterator[None]:
        """Have the ifindex for an attachment to `network` that is made in the block.

        Raises InvalidNetworkConfig if it is not reserved for that network, TryAgainLater if another
        attachment is just made with it. Whether one has been made before is the kernel's to say.
        """
        self._refuse_unreserved(network, ifindex)
        with self._lock:
            if ifindex in self._claimed:
                raise TryAgainLater(
                    f"deviceID is {ifindex}, with which another NIC is just made",
                    "a device is one pod's; the runtime has to ask the device plugin for another",
                )
            self._claimed.add(ifindex)
        try:
            yield
        finally:
            self._claimed.remove(ifindex)

    def _refuse_unreserved(self, network: str, ifindex: int) -> None:
        blocks = self._blocks
        if network not in blocks:
            raise InvalidNetworkConfig(
                f"deviceID is {ifindex}, and the node has no devices of network {network}",
                "its definition is broken, or gone, or was never in the agent's folder of networks",
            )
        if ifindex in blocks[network]:
            return
        owners = [other for other, block in blocks.items() if ifindex in block]
        whose = f"one of network {owners[0]}'s" if owners else "no network's"
        raise InvalidNetworkConfig(
            f"deviceID is {ifindex}, {whose} and none of {network}'s",
            f"the pod has to request extbridge.io/{network}, and the attachment to name that as its"
            " resource",
        )

    def _derived(self, network: str) -> int:
        name = f"{self._node}/{network}".encode()
        return int.from_bytes(hashlib.sha256(name).digest()[:8]) % _BLOCKS
