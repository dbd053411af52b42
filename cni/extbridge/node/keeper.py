"""extbridge kept in the runtime's folder of network configurations, whatever others write there.

The cluster's network writes its list anew when it is upgraded, and extbridge is out of it; beside a
single plugin's configuration stands our copy, which the runtime would go on to read. So what
`install --chained` does is done again whenever the folder has changed. Two who both insist would
have the runtime read its configurations for ever, so this one gives in.
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from collections import deque
from contextlib import closing
from pathlib import Path

from extbridge.kernel.changes import FolderChanges
from extbridge.node.conflist import keep_chained
from extbridge.node.metrics import Metrics
from extbridge.spec.errors import CniError

log = logging.getLogger(__name__)

# A file that is written in its place is whole a little later than it is there.
_SETTLE_SECONDS = 0.2

_RETRY_SECONDS = 10.0

_PAUSE_SECONDS = 2.0
_MOST_IN_A_MINUTE = 5
_REST_SECONDS = 600.0


class Keeper:
    """Keeps extbridge in the folder; a Companion of the agent (node.agent)."""

    def __init__(self, folder: Path, metrics: Metrics) -> None:
        self._folder = folder.absolute()
        self._metrics = metrics
        self._repaired: deque[float] = deque(maxlen=_MOST_IN_A_MINUTE)
        self._failure = ""
        self._end = -1
        self._thread = threading.Thread(target=self._run, name="configurations")

    def start(self) -> None:
        """Look for the first time, and then at each change, in a thread."""
        self._end = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread.start()

    def stop(self) -> None:
        """Leave the folder as it is."""
        os.eventfd_write(self._end, 1)
        self._thread.join()
        os.close(self._end)

    def _run(self) -> None:
        is_ending = False
        while not is_ending:
            try:
                with closing(FolderChanges()) as changes:
                    self._follow(changes)
                    return
            except Exception as error:  # noqa: BLE001 - the agent's other work goes on
                self._say_once(error)
            is_ending = self._ends_within(_RETRY_SECONDS)

    def _follow(self, changes: FolderChanges) -> None:
        """Look whenever something has changed, until the agent stops."""
        is_ending = False
        while not is_ending:
            changes.drain()
            changes.watch((self._folder,))
            pause, retry = 0.0, None
            try:
                pause = self._look()
                self._failure = ""
            except (CniError, OSError) as error:
                self._say_once(error)
                retry = _RETRY_SECONDS
            is_ending = (
                self._ends_within(pause)
                or self._ends_before(changes, retry)
                or self._ends_within(_SETTLE_SECONDS)
            )

    def _look(self) -> float:
        """Put right what is amiss; for how many seconds to look away then."""
        if not keep_chained(self._folder):
            return 0
        self._metrics.repairs.labels("configuration").inc()
        log.warning("%s: what was written there is not as it was; repaired", self._folder)
        now = time.monotonic()
        self._repaired.append(now)
        if len(self._repaired) < _MOST_IN_A_MINUTE or now - self._repaired[0] > 60:
            return _PAUSE_SECONDS
        self._repaired.clear()
        log.error(
            "%s: repaired %d times in a minute, so this gives up for %d: find out who writes the"
            " first configuration there, and have extbridge stand in what it writes",
            self._folder, _MOST_IN_A_MINUTE, _REST_SECONDS // 60,
        )  # fmt: skip
        return _REST_SECONDS

    def _say_once(self, error: Exception) -> None:
        failure = str(error)
        # A traceback is for defects only.
        is_defect = not isinstance(error, (OSError, CniError))
        if failure != self._failure:
            log.error("%s: %s", self._folder, error, exc_info=is_defect)
        self._failure = failure

    def _ends_within(self, seconds: float) -> bool:
        waiting = select.poll()
        waiting.register(self._end, select.POLLIN)
        return bool(waiting.poll(seconds * 1000))

    def _ends_before(self, changes: FolderChanges, seconds: float | None) -> bool:
        """Wait for a change, so long at most; whether the agent stops first."""
        waiting = select.poll()
        waiting.register(self._end, select.POLLIN)
        waiting.register(changes.fileno(), select.POLLIN)
        ready = waiting.poll(None if seconds is None else seconds * 1000)
        return any(fd == self._end for fd, _ in ready)
