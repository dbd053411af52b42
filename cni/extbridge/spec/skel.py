"""The skeleton around the verbs: what happens between a process and a function.

The one place where an exception becomes CNI JSON, and the only one that writes standard output. It
takes environment and streams as arguments, so that the agent can answer in a runtime's stead.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import BinaryIO, Final, TextIO, TypeAlias

from extbridge.spec import versions
from extbridge.spec.errors import (
    CniError,
    InternalError,
    IoFailure,
    KernelRefused,
    NotPermitted,
)
from extbridge.spec.request import (
    MAX_STDIN_BYTES,
    Request,
    Steps,
    Verb,
    parse_request,
    read_version,
)

Verbs: TypeAlias = Mapping[Verb, Callable[[Request], Mapping[str, object] | None]]
"""What to call for each verb but VERSION; ADD's answer is the result, the others' is not read."""

_LONGEST_DEFECT = 200
"""Characters of a foreign exception's text that a runtime is told; the rest is in the traceback."""

_REMEDIES: Final[Mapping[int | None, str]] = {
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some space there",
    errno.EROFS: "make it writable, or name another folder in EXTBRIDGE_RUN",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "raise the limit of open files (fs.file-max)",
}


@dataclass(frozen=True, slots=True)
class Answer:
    """What a runtime gets, and in stderr and notes what people get besides.

    `code` is the error's, or 0; `notes` are the request's, and `steps` as far as it came.
    """

    exit_code: int
    stdout: bytes
    stderr: str = ""
    code: int = 0
    notes: Mapping[str, object] = field(default_factory=dict, hash=False)
    steps: Mapping[str, float] = field(default_factory=dict, hash=False)


def main(
    environ: Mapping[str, str],
    stdin: BinaryIO,
    stdout: BinaryIO,
    stderr: TextIO,
    verbs: Verbs,
) -> int:
    """Serve one request on the given streams and return the exit status."""
    try:
        answer = run(environ, stdin.read(MAX_STDIN_BYTES + 1), verbs)
    except OSError as failure:
        answer = answer_failure(IoFailure(f"standard input: {_reason(failure)}"), b"")
    # What is for people must not cost the runtime its answer.
    with contextlib.suppress(OSError):
        stderr.write(answer.stderr)
    try:
        stdout.write(answer.stdout)
        stdout.flush()
    except OSError as failure:
        with contextlib.suppress(OSError):
            stderr.write(f"standard output: {_reason(failure)}\n")
        return 1
    return answer.exit_code


def run(
    environ: Mapping[str, str],
    stdin: bytes,
    verbs: Verbs,
    *,
    netns_fd: int | None = None,
    request_id: str = "",
) -> Answer:
    """Serve one request; raises nothing that is an Exception, so an interrupt still interrupts.

    An error's details end with `request_id`, if there is one: a log has it too.
    """
    steps = Steps()
    try:
        request = replace(parse_request(environ, stdin), netns_fd=netns_fd, steps=steps)
        if request.verb is Verb.VERSION:
            return Answer(0, _encode(versions.report_versions(request.cni_version)))
        result = verbs[request.verb](request)
        told = _encode(result) if request.verb is Verb.ADD else b""
        return Answer(0, told, notes=request.notes, steps=steps.ms)
    except Exception as failure:  # noqa: BLE001 - a runtime understands nothing but JSON
        steps.mark("failed")
        return replace(answer_failure(failure, stdin, request_id), steps=steps.ms)


def translate(failure: Exception) -> CniError:
    """The error that a runtime is told for failure, which is itself if it is one."""
    match failure:
        case CniError():
            return failure
        case PermissionError():
            return NotPermitted(_reason(failure), "run this as root with all capabilities")
        case OSError(filename=None):
            return KernelRefused(_reason(failure), _REMEDIES.get(failure.errno, ""))
        case OSError():
            return IoFailure(_reason(failure), _REMEDIES.get(failure.errno, ""))
        case _:
            told = f"{type(failure).__name__}: {failure}"[:_LONGEST_DEFECT]
            return InternalError(told, "please report this with the traceback on standard error")


def answer_failure(failure: Exception, stdin: bytes, request_id: str = "") -> Answer:
    """The answer that tells a failure, in the cniVersion that the request asked for; see `run`."""
    error = translate(failure)
    asked = read_version(stdin)
    cni_version = asked if asked in versions.KNOWN else versions.NEWEST
    told = {
        key: _as_text(value) if isinstance(value, str) else value
        for key, value in error.to_json(cni_version, request_id).items()
    }
    trace = "".join(traceback.format_exception(failure)) if isinstance(error, InternalError) else ""
    return Answer(1, _encode(told), trace, error.code)


def _reason(failure: OSError) -> str:
    """What failed and why; netlink's errors name the call and the object in strerror."""
    why = failure.strerror or str(failure) or type(failure).__name__
    names = [name for name in (failure.filename, failure.filename2) if name is not None]
    return ": ".join([*(_show_file(name) for name in names), why])


def _show_file(name: str | bytes | int) -> str:
    return f"fd {name}" if isinstance(name, int) else os.fsdecode(name)


def _as_text(text: str) -> str:
    """Text without lone surrogates, which os.environ and file names hold for bytes that are none.

    JSON can spell them, but not every reader takes them.
    """
    return text.encode(errors="backslashreplace").decode()


def _encode(answer: Mapping[str, object] | None) -> bytes:
    return json.dumps(answer, allow_nan=False).encode() + b"\n"
