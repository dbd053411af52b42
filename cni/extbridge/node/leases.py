"""The leases: processes that took taps, watched until they end, for then their taps are free."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import replace

from extbridge.ledger import Holder
from extbridge.node.broker import Lease
from extbridge.node.metrics import Metrics
from extbridge.spec.errors import CniError

log = logging.getLogger(__name__)


class Leases:
    """Those that live, watched on the event loop; `release` frees the taps of one that has ended.

    It blocks, and is called in a thread of `threads`.
    """

    def __init__(
        self, release: Callable[[Lease], None], threads: Executor, metrics: Metrics
    ) -> None:
        self._free = release
        self._threads = threads
        self._metrics = metrics
        self._leases: dict[Holder, Lease] = {}

    def __len__(self) -> int:
        return len(self._leases)

    def close(self) -> None:
        """Watch none any more; the ledger remembers them for the next agent."""
        for lease in self._leases.values():
            self._unwatch(lease)
        self._leases.clear()

    def watch(self, lease: Lease) -> None:
        """Watch the lease, whose pidfd is ours from now on; raises OSError, having closed it."""
        with ExitStack() as closing:
            closing.callback(os.close, lease.pidfd)
            former = self._leases.get(lease.holder)
            if former is None:
                # Readable from the end of its process on (man 2 pidfd_open).
                asyncio.get_running_loop().add_reader(lease.pidfd, self._end, lease.holder)
                closing.pop_all()
            else:
                ids = former.container_ids | lease.container_ids
                lease = replace(former, container_ids=ids)
            self._leases[lease.holder] = lease
        self._metrics.leases.set(len(self._leases))

    def _end(self, holder: Holder) -> None:
        lease = self._leases.pop(holder)
        self._unwatch(lease)
        self._metrics.leases.set(len(self._leases))
        log.info("lease ended", extra={"pid": holder.pid})
        # Nobody waits for it: who asks for the tap meanwhile sees that its holder is dead.
        self._threads.submit(self._release, lease)

    def _unwatch(self, lease: Lease) -> None:
        asyncio.get_running_loop().remove_reader(lease.pidfd)
        os.close(lease.pidfd)

    def _release(self, lease: Lease) -> None:
        try:
            self._free(lease)
        except (CniError, OSError) as error:
            log.warning("lease of process %d: %s", lease.holder.pid, error)
