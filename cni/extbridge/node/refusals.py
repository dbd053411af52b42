"""Who gets nothing, counted and told, and the agent goes on whatever one connection comes to.

Pods choose how often they are refused and, of some sentences, the words: the log has a line a
second for each reason, and in it nothing that does not print.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from extbridge.node.metrics import Metrics
from extbridge.node.wire import WireError
from extbridge.spec.fields import printable

log = logging.getLogger(__name__)

_LONGEST: Final = 300
"""Characters of a sentence that go to the log."""

_TOLD_EVERY_SECONDS: Final = 1.0


class Crowded(Exception):
    """A pod, or all of them, have more connections open than is good; the message is a sentence."""


class Refusals:
    """The refusals of all threads."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._lock = threading.Lock()
        self._due: dict[str, float] = {}
        self._untold: Counter[str] = Counter()

    def add(self, reason: str, sentence: str) -> None:
        """Count a refusal; tell of it, and how many were not told since the last of its reason."""
        self._metrics.refusals.labels(reason).inc()
        now = time.monotonic()
        with self._lock:
            if now < self._due.get(reason, 0.0):
                self._untold[reason] += 1
                return
            self._due[reason] = now + _TOLD_EVERY_SECONDS
            untold = self._untold.pop(reason, 0)
        shown = printable(sentence[:_LONGEST])
        log.warning("refused: %s", shown, extra={"reason": reason, "untold": untold})

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """What fails in the block is refused, or told as the defect that it is."""
        try:
            yield
        except Crowded as error:
            self.add("flood", str(error))
        except (WireError, TimeoutError, OSError) as error:
            self.add("protocol", f"{type(error).__name__}: {error}")
        except Exception:
            log.exception("a defect in serving a connection")
