"""That a runtime always gets an answer it understands."""

from __future__ import annotations

import errno
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extbridge.spec import versions
from extbridge.spec.errors import InternalError, NicBusy, TryAgainLater
from extbridge.spec.request import Request, Verb
from extbridge.spec.skel import Answer, main, run

ENVIRON = {"CNI_CONTAINERID": "c0ffee", "CNI_NETNS": "/run/netns/blue", "CNI_IFNAME": "net1"}
CONFIG = {"cniVersion": "1.1.0", "name": "vepanet", "prevResult": {"cniVersion": "1.1.0"}}
STDIN = json.dumps(CONFIG).encode()
SERVED = [Verb.ADD, Verb.DEL, Verb.CHECK, Verb.GC, Verb.STATUS]

VARIABLES = ["CNI_COMMAND", *ENVIRON, "CNI_ARGS", "CNI_PATH"]
# os.environ holds bytes that are no UTF-8 as lone surrogates.
TEXT = st.text(st.characters(exclude_categories=()))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda children: st.lists(children) | st.dictionaries(TEXT, children),
    max_leaves=10,
)
INTERFACES = st.lists(
    st.fixed_dictionaries(
        {}, optional=dict.fromkeys(["name", "mac", "sandbox", "mtu"], st.text() | JSON)
    )
)
# Right but for a detail or two, to get past the first checks.
ALMOST_RIGHT_ENVIRONS = st.builds(
    lambda verb, other: {**ENVIRON, "CNI_COMMAND": verb, **other},
    st.sampled_from(Verb),
    st.just({}) | st.dictionaries(st.sampled_from(VARIABLES), TEXT, max_size=1),
)
ALMOST_RIGHT_CONFIGS = st.fixed_dictionaries(
    {
        "cniVersion": st.sampled_from([*versions.KNOWN, "2.0.0"]) | st.just("1.1.0") | JSON,
        "name": st.sampled_from(["vepanet", "a.b-c_d", "a/b", None]),
    },
    optional={
        "prevResult": st.fixed_dictionaries({"interfaces": INTERFACES}) | JSON,
        "extbridge": JSON,
    },
).map(lambda config: json.dumps(config).encode())


def echo(request: Request) -> Mapping[str, object]:
    """Answer with something that can be told from anything else."""
    return {"cniVersion": request.cni_version, "verb": request.verb}


def fail_with(failure: BaseException) -> Callable[[Request], NoReturn]:
    """Make a verb that raises failure."""

    def fail(_: Request) -> NoReturn:
        raise failure

    return fail


def serve(verb: str, *, call: Callable[[Request], Mapping[str, object] | None] = echo) -> Answer:
    """Serve a valid request for verb with call."""
    return run({**ENVIRON, "CNI_COMMAND": verb}, STDIN, dict.fromkeys(SERVED, call))


def error_of(answer: Answer) -> dict[str, object]:
    """The error of an answer that has to be one, strictly read."""
    assert answer.exit_code == 1
    # The strictest readers refuse lone surrogates, also escaped ones.
    error: dict[str, object] = json.loads(answer.stdout)
    json.dumps(error, ensure_ascii=False).encode()
    assert set(error) <= {"cniVersion", "code", "msg", "details"}
    assert type(error["code"]) is int
    assert isinstance(error["msg"], str)
    assert error["msg"]
    assert error["cniVersion"] in versions.KNOWN
    return error


def test_add_prints_its_result() -> None:
    """A successful ADD exits 0 and prints the result, and nothing else."""
    answer = serve("ADD")
    assert (answer.exit_code, answer.stderr) == (0, "")
    assert json.loads(answer.stdout) == {"cniVersion": "1.1.0", "verb": "ADD"}


@pytest.mark.parametrize("verb", ["DEL", "CHECK", "GC", "STATUS"])
def test_other_verbs_print_nothing(verb: str) -> None:
    """Success of DEL, CHECK, GC and STATUS is exit status 0 and silence."""
    assert serve(verb) == Answer(0, b"")


@pytest.mark.parametrize(
    ("stdin", "cni_version"),
    [
        (b'{"cniVersion": "0.4.0"}', "0.4.0"),
        (b'{"cniVersion": "9.9.9"}', "9.9.9"),
        (b"", "1.1.0"),
        (b"\xff", "1.1.0"),
    ],
)
def test_version_always_answers(stdin: bytes, cni_version: str) -> None:
    """VERSION repeats the caller's version and lists ours, whatever stands on standard input."""
    answer = run({"CNI_COMMAND": "VERSION"}, stdin, {})
    assert answer.exit_code == 0
    assert json.loads(answer.stdout) == {
        "cniVersion": cni_version,
        "supportedVersions": ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"],
    }


@pytest.mark.parametrize(
    ("failure", "code", "told"),
    [
        (NicBusy("eth0 is taken", "wait"), 105, "eth0 is taken"),
        (TryAgainLater("not yet"), 11, "not yet"),
        (OSError(errno.ENOSPC, "No space left on device", "/run/x"), 5, "/run/x: No space left"),
        (OSError(errno.EROFS, "Read-only file system", b"/r\xff"), 5, "/r\\udcff: Read-only"),
        (OSError(errno.EIO, "I/O error", "/a", None, "/b"), 5, "/a: /b: I/O error"),
        (OSError(errno.EBADF, "Bad file descriptor", 7), 5, "fd 7: Bad file descriptor"),
        (OSError(errno.EINVAL, "RTM_NEWLINK net1: Invalid"), 102, "RTM_NEWLINK net1: Invalid"),
        (OSError("setns failed"), 102, "setns failed"),
        (TimeoutError(), 102, "TimeoutError"),
        (PermissionError(errno.EPERM, "setns: not permitted"), 101, "setns: not permitted"),
        (PermissionError(errno.EACCES, "denied", "/run/x"), 101, "/run/x: denied"),
        (ValueError("\ud800"), 100, "ValueError: \\ud800"),
        (KeyError("x" * 1000), 100, "KeyError: 'xxx"),
        (MemoryError(), 100, "MemoryError"),
        (RecursionError(), 100, "RecursionError"),
        (InternalError("a defect"), 100, "a defect"),
    ],
    ids=ascii,
)
@pytest.mark.parametrize("verb", SERVED)
def test_failure_becomes_an_error_of_its_kind(
    verb: Verb, failure: Exception, code: int, told: str
) -> None:
    """Whatever fails, the runtime is told in CNI JSON, with a code for what kind it is."""
    answer = serve(verb, call=fail_with(failure))
    error = error_of(answer)
    assert error["code"] == code
    assert str(error["msg"]).startswith(told)
    assert len(str(error["msg"])) < 300
    assert ("Traceback" in answer.stderr) == (code == 100)


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), SystemExit(3)], ids=repr)
def test_interrupt_interrupts(failure: BaseException) -> None:
    """Ctrl-C and an exit are not answered but obeyed."""
    with pytest.raises(type(failure)):
        serve("ADD", call=fail_with(failure))


def test_result_that_is_no_json_is_our_defect() -> None:
    """What cannot be said in JSON is never printed."""
    for value in (b"bytes", float("nan")):
        assert error_of(serve("ADD", call=lambda _, v=value: {"x": v}))["code"] == 100  # type: ignore[misc]


@pytest.mark.parametrize(
    ("stdin", "cni_version"),
    [
        (b'{"cniVersion": "0.4.0", "name": 1}', "0.4.0"),
        (b'{"name": "vepanet"}', "0.1.0"),
        (b'{"cniVersion": "9.9.9", "name": "vepanet"}', "1.1.0"),
        (b"{", "1.1.0"),
    ],
)
@pytest.mark.parametrize("command", ["ADD", "nonsense"])
def test_error_speaks_the_version_of_the_request(
    command: str, stdin: bytes, cni_version: str
) -> None:
    """An error has the request's version where we know it, else our newest."""
    answer = run({**ENVIRON, "CNI_COMMAND": command}, stdin, {})
    assert error_of(answer)["cniVersion"] == cni_version


def assert_answered(environ: Mapping[str, str], stdin: bytes) -> None:
    """Assert a success or an error that is the caller's, not ours."""
    answer = run(environ, stdin, dict.fromkeys(SERVED, echo))
    if answer.exit_code == 0:
        assert answer.stdout == b"" or json.loads(answer.stdout)["cniVersion"]
    else:
        assert error_of(answer)["code"] in {1, 4, 6, 7}
    assert answer.stderr == ""


@given(environ=st.dictionaries(st.sampled_from(VARIABLES), TEXT), stdin=st.binary())
def test_any_request_is_answered(environ: dict[str, str], stdin: bytes) -> None:
    """No environment and no standard input gets anything but a success or an error."""
    assert_answered(environ, stdin)


@given(environ=ALMOST_RIGHT_ENVIRONS, stdin=ALMOST_RIGHT_CONFIGS)
def test_any_almost_right_request_is_answered(environ: dict[str, str], stdin: bytes) -> None:
    """A request with a wrong detail anywhere gets an error, and one without a success."""
    assert_answered(environ, stdin)


def test_process_is_served_on_its_streams() -> None:
    """The answer goes to standard output, a traceback to standard error, the rest is the status."""
    environ = {**ENVIRON, "CNI_COMMAND": "ADD"}
    stdout, stderr = io.BytesIO(), io.StringIO()
    assert main(environ, io.BytesIO(STDIN), stdout, stderr, {Verb.ADD: echo}) == 0
    assert json.loads(stdout.getvalue())["verb"] == "ADD"
    assert stderr.getvalue() == ""
    stdout = io.BytesIO()
    assert main(environ, io.BytesIO(STDIN), stdout, stderr, {}) == 1
    assert json.loads(stdout.getvalue())["code"] == 100
    assert "Traceback" in stderr.getvalue()


def test_unreadable_stdin_is_an_io_failure() -> None:
    """When standard input cannot be read, the runtime is told with code 5."""
    stdout = io.BytesIO()
    with Path("/proc/self/mem").open("rb") as stdin:
        assert main(ENVIRON, stdin, stdout, io.StringIO(), {}) == 1
    error = error_of(Answer(1, stdout.getvalue()))
    assert (error["code"], error["msg"]) == (5, "standard input: Input/output error")


def test_endless_stdin_is_cut_off() -> None:
    """A standard input without end is refused, not read for ever."""
    stdout = io.BytesIO()
    environ = {**ENVIRON, "CNI_COMMAND": "DEL"}
    with Path("/dev/zero").open("rb") as stdin:
        assert main(environ, stdin, stdout, io.StringIO(), {}) == 1
    assert error_of(Answer(1, stdout.getvalue()))["code"] == 6


def test_answer_that_cannot_be_written_is_a_failure() -> None:
    """When standard output is full, the exit status and standard error say so."""
    stderr = io.StringIO()
    with Path("/dev/full").open("wb", buffering=0) as stdout:
        status = main({"CNI_COMMAND": "VERSION"}, io.BytesIO(), stdout, stderr, {})
    assert status == 1
    assert stderr.getvalue() == "standard output: No space left on device\n"


def test_full_stderr_costs_no_answer() -> None:
    """When standard error cannot be written, the runtime still gets its error."""
    stdout = io.BytesIO()
    environ = {**ENVIRON, "CNI_COMMAND": "ADD"}
    with Path("/dev/full").open("wb", buffering=0) as full:
        stderr = io.TextIOWrapper(full, write_through=True)
        assert main(environ, io.BytesIO(STDIN), stdout, stderr, {}) == 1
        stderr.detach()
    assert error_of(Answer(1, stdout.getvalue()))["code"] == 100
