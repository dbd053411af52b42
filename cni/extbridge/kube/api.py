"""Calls of the API server, by the Kubernetes client, and what becomes of those that fail.

Only the client's core is used. The generated classes of the API's objects would cost 22 MB, and
what they would be made of is more: of a pod its metadata are asked for, which the API server sends
alone (PartialObjectMetadata), and of those a few lines are kept.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from enum import StrEnum
from http import HTTPStatus
from pathlib import Path
from random import SystemRandom
from typing import Final, TypeAlias

from kubernetes.client import ApiClient, Configuration
from kubernetes.client.exceptions import ApiException
from kubernetes.config import ConfigException, load_incluster_config, load_kube_config
from urllib3 import BaseHTTPResponse
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    NewConnectionError,
    ReadTimeoutError,
)

from extbridge.spec.errors import InvalidEnvironment
from extbridge.spec.fields import JsonObject

log = logging.getLogger(__name__)

CONNECT_SECONDS: Final = 3.0

MERGE_PATCH: Final = "application/merge-patch+json"
STRATEGIC_PATCH: Final = "application/strategic-merge-patch+json"

_PARTIAL: Final = "application/json;as={kind};g=meta.k8s.io;v=v1"
METADATA: Final = _PARTIAL.format(kind="PartialObjectMetadata")
METADATA_LIST: Final = _PARTIAL.format(kind="PartialObjectMetadataList")

_FIRST_PAUSE: Final = 0.5
_LONGEST_PAUSE: Final = 30.0
_LONGEST_ASKED_PAUSE: Final = 300.0

_MOST_LINE: Final = 4 << 20
"""Bytes of one event of a watch; etcd does not keep objects of half that size."""

_random = SystemRandom()

Query: TypeAlias = Sequence[tuple[str, str]]


class Failure(StrEnum):
    """Why a call of the API server failed, as metrics have it."""

    UNREACHABLE = "unreachable"
    SLOW = "slow"
    UNAUTHORIZED = "unauthorized"
    FORBIDDEN = "forbidden"
    ABSENT = "absent"
    CONFLICT = "conflict"
    GONE = "gone"
    THROTTLED = "throttled"
    SERVER = "server"
    REFUSED = "refused"
    GARBLED = "garbled"
    INTERNAL = "internal"


_BY_STATUS: Final[Mapping[int, Failure]] = {
    HTTPStatus.UNAUTHORIZED: Failure.UNAUTHORIZED,
    HTTPStatus.FORBIDDEN: Failure.FORBIDDEN,
    HTTPStatus.NOT_FOUND: Failure.ABSENT,
    HTTPStatus.CONFLICT: Failure.CONFLICT,
    HTTPStatus.GONE: Failure.GONE,
    HTTPStatus.TOO_MANY_REQUESTS: Failure.THROTTLED,
}

LASTING: Final = frozenset(
    {
        Failure.FORBIDDEN,
        Failure.ABSENT,
        Failure.CONFLICT,
        Failure.REFUSED,
        Failure.GARBLED,
        Failure.INTERNAL,
    }
)
"""What the same call would meet again."""


class ApiFailure(Exception):
    """A call of the API server that failed; `pause` is how many seconds it wants to be left alone.

    No CniError: no runtime is ever told of it.
    """

    def __init__(self, kind: Failure, message: str, pause: float = 0.0) -> None:
        super().__init__(message)
        self.kind = kind
        self.pause = pause

    @classmethod
    def by_status(cls, status: int, message: str, pause: float = 0.0) -> ApiFailure:
        """The failure that an HTTP status tells; so does the status in an ERROR event."""
        other = Failure.SERVER if status >= HTTPStatus.INTERNAL_SERVER_ERROR else Failure.REFUSED
        return cls(_BY_STATUS.get(status, other), f"HTTP {status}: {message}", pause)


class Api:
    """The API server, as the pod's service account sees it, or as a kubeconfig file says.

    Its methods block, may be called by any thread, and raise ApiFailure. `seconds` limits each wait
    for the server's next octets, not the whole.
    """

    def __init__(self, kubeconfig: Path | None) -> None:
        """Raise InvalidEnvironment where it cannot be known where the API server is."""
        self._kubeconfig = kubeconfig
        self._loading = threading.Lock()
        self._configuration = Configuration()
        self._load()
        # How often to try again, and when, is the circuits' to say.
        self._configuration.retries = False
        # A watch is silent for minutes; the kernel finds out when nobody is there any more.
        self._configuration.keep_alive = True
        self._client = ApiClient(self._configuration)
        self._client.user_agent = "extbridge"

    def close(self) -> None:
        """Close the connections that no call has."""
        self._client.close()  # type: ignore[no-untyped-call]

    def get(self, path: str, *, accept: str, seconds: float, query: Query = ()) -> JsonObject:
        """The object, or list, at the path."""
        with self._called("GET", path, seconds, query=query, accept=accept) as response:
            return _read_object(response)

    def post(self, path: str, body: JsonObject, *, seconds: float) -> None:
        """Make an object."""
        with self._called("POST", path, seconds, body=body) as response:
            _read_object(response)

    def patch(self, path: str, body: JsonObject, *, kind: str, seconds: float) -> None:
        """Change an object by a patch of this kind (MERGE_PATCH or STRATEGIC_PATCH)."""
        # Its answer would be the whole object otherwise, of which nobody wants to know.
        with self._called(
            "PATCH", path, seconds, body=body, content_type=kind, accept=METADATA
        ) as response:
            _read_object(response)

    @contextmanager
    def watch(
        self, path: str, query: Query, *, seconds: float, silence: float
    ) -> Iterator[tuple[Iterator[JsonObject], Callable[[], None]]]:
        """The events of a watch for the length of the block, and what ends them from elsewhere.

        `silence` is how many seconds there may be without an event.
        """
        with self._called("GET", path, seconds, query=query, accept=METADATA) as response:
            socket = getattr(response.connection, "sock", None)
            if socket is not None:
                socket.settimeout(silence)

            def end() -> None:
                with suppress(ValueError, RuntimeError, OSError):
                    response.shutdown()

            yield _events(response), end

    @contextmanager
    def _called(
        self,
        verb: str,
        path: str,
        seconds: float,
        *,
        query: Query = (),
        body: JsonObject | None = None,
        accept: str = "application/json",
        content_type: str = "application/json",
    ) -> Iterator[BaseHTTPResponse]:
        @_told_failures()
        def call() -> BaseHTTPResponse:
            headers = {"Accept": accept}
            if body is not None:
                headers["Content-Type"] = content_type
            request = self._client.param_serialize(
                method=verb,
                resource_path=path,
                query_params=list(query),
                header_params=headers,
                body=body,
                auth_settings=["BearerToken"],
            )
            timeouts = (min(CONNECT_SECONDS, seconds), seconds)
            response: BaseHTTPResponse = self._client.call_api(
                *request, _request_timeout=timeouts
            ).response
            return response

        response = call()
        if response.status == HTTPStatus.UNAUTHORIZED and self._has_new_credentials():
            response.close()
            response = call()
        try:
            if not HTTPStatus.OK <= response.status < HTTPStatus.MULTIPLE_CHOICES:
                raise _refusal(response)
            yield response
        finally:
            # One that was read to its end has given back its connection, for the next call.
            response.close()

    def _has_new_credentials(self) -> bool:
        """Whether there are others by now: service accounts' tokens are replaced by the hour."""
        with self._loading:
            before = dict(self._configuration.api_key)
            with suppress(InvalidEnvironment):
                self._load()
            return bool(self._configuration.api_key != before)

    def _load(self) -> None:
        try:
            if self._kubeconfig is None:
                load_incluster_config(self._configuration)  # type: ignore[no-untyped-call]
            else:
                load_kube_config(  # type: ignore[no-untyped-call]
                    str(self._kubeconfig),
                    client_configuration=self._configuration,
                    persist_config=False,
                )
        except (ConfigException, OSError, ValueError, TypeError, KeyError) as error:
            where = "this pod's service account" if self._kubeconfig is None else self._kubeconfig
            raise InvalidEnvironment(
                f"{where} does not say where the API server is: {error}",
                "run the agent in a pod with a service account whose token is mounted, or give"
                " --kubeconfig FILE",
            ) from error


class Circuit:
    """Calls of one purpose: when the next is worth trying, and what is said of their failing.

    After a failure there is a pause, which doubles with each further one, up to half a minute, and
    is shorter by chance, so that a thousand nodes do not come back at once. The log has a line when
    calls begin to fail, to fail in another way, and to work again.
    """

    def __init__(self, purpose: str, count: Callable[[str, str], None]) -> None:
        self._purpose = purpose
        self._count = count
        self._lock = threading.Lock()
        self._failing: Failure | None = None
        self._in_a_row = 0
        self._until = 0.0

    @property
    def pause(self) -> float:
        """Seconds until the next call is worth trying; 0 is now."""
        return max(0.0, self._until - time.monotonic())

    def work(self) -> None:
        """A call worked."""
        if self._failing is None:
            return
        with self._lock:
            self._failing, self._in_a_row, self._until = None, 0, 0.0
        log.info("API server, %s: it works again", self._purpose)

    def fail(self, failure: ApiFailure) -> None:
        """A call failed."""
        self._count(self._purpose, failure.kind)
        with self._lock:
            is_news = failure.kind is not self._failing
            self._failing = failure.kind
            pause = min(_FIRST_PAUSE * 2**self._in_a_row, _LONGEST_PAUSE)
            self._in_a_row = min(self._in_a_row + 1, 10)
            pause = max(pause * _random.uniform(0.5, 1), min(failure.pause, _LONGEST_ASKED_PAUSE))
            self._until = time.monotonic() + pause
        if is_news:
            # A traceback is for defects only.
            is_defect = failure.kind is Failure.INTERNAL and not isinstance(
                failure.__cause__, OSError
            )
            log.warning(
                "API server, %s: %s: %s", self._purpose, failure.kind, failure,
                exc_info=failure if is_defect else None,
            )  # fmt: skip


@contextmanager
def told_internal() -> Iterator[None]:
    """Whatever else comes of a call, as ApiFailure too: the last resort of who has to go on.

    A defect of ours, or something that the node lacks for now, as a free fd for the ledger.
    """
    try:
        yield
    except ApiFailure:
        raise
    except Exception as error:
        raise ApiFailure(Failure.INTERNAL, f"{type(error).__name__}: {error}") from error


@contextmanager
def _told_failures() -> Iterator[None]:
    """Whatever the client raises, as ApiFailure."""
    try:
        yield
    # ValueError: a socket that was closed meanwhile. ConfigException: a token that is gone.
    except (HTTPError, OSError, ApiException, ConfigException, ValueError) as error:
        # A connection that was refused is a ConnectTimeoutError too.
        is_slow = isinstance(error, ReadTimeoutError | ConnectTimeoutError) and not isinstance(
            error, NewConnectionError
        )
        said = error.args[0] if error.args and isinstance(error.args[0], str) else error
        raise ApiFailure(
            Failure.SLOW if is_slow else Failure.UNREACHABLE, f"{type(error).__name__}: {said}"
        ) from error


def _refusal(response: BaseHTTPResponse) -> ApiFailure:
    """What a Status object says (API conventions, "Response Status Kind"), or the status alone."""
    said = response.reason or ""
    with suppress(ApiFailure):
        said = str(_read_object(response).get("message") or said)
    pause = response.headers.get("Retry-After", "")
    return ApiFailure.by_status(
        response.status, said, float(pause) if pause.isascii() and pause.isdecimal() else 0.0
    )


def _read_object(response: BaseHTTPResponse) -> JsonObject:
    with _told_failures():
        text = response.read()
    return _as_object(text)


def _as_object(text: bytes) -> JsonObject:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ApiFailure(Failure.GARBLED, f"what it sent is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ApiFailure(Failure.GARBLED, "what it sent is no object")
    return value


def _events(response: BaseHTTPResponse) -> Iterator[JsonObject]:
    """One JSON object a line (API concepts, "Efficient detection of changes")."""
    begun = b""
    with _told_failures():
        for octets in response.stream(None):
            *lines, begun = (begun + octets).split(b"\n")
            yield from (_as_object(line) for line in lines if line.strip())
            if len(begun) > _MOST_LINE:
                raise ApiFailure(Failure.GARBLED, "an event of the watch does not end")
