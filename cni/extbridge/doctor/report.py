"""Findings for people and for programs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from typing import Final

import click

from extbridge.doctor.finding import Finding, Level
from extbridge.spec.fields import printable

_COLOURS: Final = {Level.OK: "green", Level.WARNING: "yellow", Level.FAILURE: "red"}
_WIDTH: Final = max(map(len, Level))


def report(findings: Iterable[Finding], *, as_json: bool) -> int:
    """Print them, each as soon as it is known unless it is JSON; 1 with a failure, else 0."""
    counted: Counter[Level] = Counter()
    told = []
    for finding in findings:
        counted[finding.level] += 1
        if as_json:
            told.append(asdict(finding))
        else:
            _print(finding)
    if as_json:
        numbers = {level.value: counted[level] for level in Level}
        click.echo(json.dumps({"findings": told, "count": numbers}, indent=2))
    else:
        click.echo(", ".join(f"{counted[level]} {level}" for level in Level))
    return int(counted[Level.FAILURE] > 0)


def _print(finding: Finding) -> None:
    level = click.style(finding.level.ljust(_WIDTH), fg=_COLOURS[finding.level])
    click.echo(f"{level}  {printable(finding.subject)}: {printable(finding.what)}")
    if finding.todo:
        click.echo(f"{'':{_WIDTH}}  to do: {printable(finding.todo)}")
