"""A finding: what was looked at, how it is, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from extbridge.network.definition import Network, NicSelector
from extbridge.spec.errors import CniError
from extbridge.spec.skel import translate


class Level(StrEnum):
    """How a thing is; a failure is what keeps VMs from their network, now or at the next ADD."""

    OK = "ok"
    WARNING = "warning"
    FAILURE = "failure"


@dataclass(frozen=True, slots=True)
class Finding:
    """`todo` is empty where all is well."""

    subject: str
    level: Level
    what: str
    todo: str = ""


def ok(subject: str, what: str) -> Finding:
    """All is well with the subject."""
    return Finding(subject, Level.OK, what)


def warning(subject: str, what: str, todo: str) -> Finding:
    """It works, or is not needed everywhere."""
    return Finding(subject, Level.WARNING, what, todo)


def failure(subject: str, what: str, todo: str) -> Finding:
    """It does not work."""
    return Finding(subject, Level.FAILURE, what, todo)


def guarded(subject: str, findings: Iterator[Finding]) -> Iterator[Finding]:
    """The findings; where they cannot be had to the end, that is the last of them."""
    try:
        yield from findings
    except (CniError, OSError) as error:
        told = translate(error)
        yield failure(subject, told.message, told.hint or "this could not be looked at further")


def network_on(nic: str) -> Network:
    """A network on this NIC alone, as the simplest definition says it."""
    return Network(name="doctor", dev=NicSelector(names=(nic,)))
