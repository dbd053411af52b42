"""The manual page, made of the commands' own help; man 7 man."""

from __future__ import annotations

from collections.abc import Iterator

import click

_SECTION = "1"


def manual_page(root: click.Group, *, name: str, version: str) -> str:
    """The page of a command and all below it, in roff."""
    context = click.Context(root, info_name=name)
    lines = [
        f'.TH {name.upper()} {_SECTION} "" "{name} {_escaped(version)}"',
        ".SH NAME",
        f"{name} \\- {_escaped(root.get_short_help_str(limit=1000))}",
        ".SH SYNOPSIS",
        f".B {name}",
        "COMMAND [OPTIONS] [ARGUMENTS]",
        ".SH COMMANDS",
    ]
    for command in map(root.commands.__getitem__, sorted(root.commands)):
        lines += _command(command, click.Context(command, info_name=command.name, parent=context))
    lines += [
        ".SH EXIT STATUS",
        "0 when all is done, 1 when something is refused or amiss, 2 for options that are wrong;",
        "what is said otherwise stands with the command.",
    ]
    return "\n".join(lines) + "\n"


def _command(command: click.Command, context: click.Context) -> Iterator[str]:
    usage = " ".join(command.collect_usage_pieces(context))
    yield f".SS {command.name} {_escaped(usage)}"
    yield from _paragraphs(command.help or "")
    for parameter in command.get_params(context):
        told = parameter.get_help_record(context)
        if told is not None and parameter.name != "help":
            yield ".TP"
            yield f".B {_escaped(told[0])}"
            yield _escaped(told[1])


def _paragraphs(text: str) -> Iterator[str]:
    """What is marked to be left as it is (click's backspace) is not filled."""
    for paragraph in text.strip().split("\n\n"):
        is_literal = paragraph.startswith("\b")
        yield ".PP"
        if is_literal:
            yield ".nf"
        yield from (_escaped(line) for line in paragraph.removeprefix("\b\n").splitlines())
        if is_literal:
            yield ".fi"


def _escaped(text: str) -> str:
    r"""Text as roff takes it: no hyphenation marks, no requests at a line's start."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{text}" if text.startswith((".", "'")) else text
