"""An API server for tests: as much of Kubernetes' as the agent calls, and as faulty as is wanted.

A process of its own, which the real client talks to over TLS. It keeps pods and Events, versions of
the pods and their history, answers list, watch, get, post and patch as API concepts and API
conventions say, allows what deploy/ grants and nothing else, and records each call. What it is told
to do comes as lines of JSON on its standard input, and its answers go to standard output; it ends
with its input.
"""

from __future__ import annotations

import json
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import parse_qs, urlsplit

import yaml

Object = dict[str, Any]

ROOT: Final = Path(__file__).parents[2]
NODE: Final = "node-1"

_POD = re.compile(r"/api/v1/namespaces/([^/]+)/pods/([^/]+)(/status)?")
_EVENTS = re.compile(r"/api/v1/namespaces/([^/]+)/events(?:/([^/]+))?")
_PARTIAL: Final = "application/json;as=PartialObjectMetadata"
_BOOKMARK_SECONDS: Final = 0.5
_SECONDS: Final = 30.0

RIGHTS: Final = {
    "list": ("list", "pods"),
    "watch": ("watch", "pods"),
    "get": ("get", "pods"),
    "patch": ("patch", "pods/status"),
    "patch pod": ("patch", "pods"),
    "post event": ("create", "events"),
    "patch event": ("patch", "events"),
}
"""What each call needs, as RBAC names it."""


def granted() -> set[tuple[str, str]]:
    """What the agent's role allows in the core group: verbs and resources."""
    manifests = yaml.safe_load_all((ROOT / "deploy/base/rbac.yaml").read_text())
    (role,) = (it for it in manifests if it["kind"] == "ClusterRole")
    return {
        (verb, resource)
        for rule in role["rules"]
        if rule["apiGroups"] == [""] and "resourceNames" not in rule
        for verb in rule["verbs"]
        for resource in rule["resources"]
    }


class ApiServer:
    """The server's process, for the length of the `with` block.

    `folder` gets the files by which a client finds it: ca.crt, token and kubeconfig.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.kubeconfig = folder / "kubeconfig"
        self.port = 0

    def __enter__(self) -> Self:
        certificate(self._folder)
        self._process = subprocess.Popen(
            (sys.executable, "-m", "tests.kernel.api_server", str(self._folder)),
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.set_token("first")
        self.port = int(self._ask(do="listen"))
        self.kubeconfig.write_text(
            json.dumps(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "current-context": "test",
                    "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
                    "clusters": [
                        {
                            "name": "test",
                            "cluster": {
                                "server": f"https://127.0.0.1:{self.port}",
                                "certificate-authority": "ca.crt",
                            },
                        }
                    ],
                    "users": [{"name": "test", "user": {"tokenFile": "token"}}],
                }
            )
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        # It keeps nothing; some of its threads may be in the midst of being slow.
        self._process.kill()
        self._process.wait(_SECONDS)
        self._process.stdin.close()
        self._process.stdout.close()

    def _ask(self, **command: object) -> Any:  # noqa: ANN401 - whatever the command gives
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def put_pod(self, name: str, **metadata: object) -> Object:
        """Make or change a pod of this node; the answer is what has become of it."""
        node = metadata.pop("node", NODE)
        pod: Object = self._ask(do="put", node=node, metadata={"name": name, **metadata})
        return pod

    def delete_pod(self, name: str, namespace: str = "default") -> None:
        """Delete it."""
        self._ask(do="delete", key=[namespace, name])

    def pod(self, name: str, namespace: str = "default") -> Object:
        """The pod as it is."""
        pods: list[Object] = self._ask(do="pods")
        return next(
            pod
            for pod in pods
            if (pod["metadata"]["namespace"], pod["metadata"]["name"]) == (namespace, name)
        )

    def events(self) -> list[Object]:
        """The Events that it has been given."""
        events: list[Object] = self._ask(do="events")
        return events

    def calls(self) -> Counter[str]:
        """How often each call was made, by its name in RIGHTS."""
        return Counter(call["call"] for call in self._ask(do="calls"))

    def recorded(self) -> list[Object]:
        """Each call, with its verb, path, query, headers and the status of its answer."""
        calls: list[Object] = self._ask(do="calls")
        return calls

    def fail(self, call: str, **how: object) -> None:
        """Answer this call (or "any") otherwise from now on, until `behave`.

        `status` with `retry_after`, `slow` (seconds before the answer), `trickle` (seconds between
        its octets), `drop` (no answer), `garbled` (no JSON), `told` (a watch's first event).
        """
        self._ask(do="fail", fault={"call": call, **how})

    def behave(self) -> None:
        """Answer as it should again."""
        self._ask(do="behave")

    def forget_history(self) -> None:
        """Forget what has changed until now, and end all watches."""
        self._ask(do="compact")

    def end_watches(self) -> None:
        """End all watches, as a server does now and then."""
        self._ask(do="end watches")

    def close(self) -> None:
        """Listen no more, and close all connections."""
        self._ask(do="close")

    def listen(self) -> None:
        """Listen again, where it did."""
        self._ask(do="listen")

    def set_token(self, token: str, *, told: bool = True) -> None:
        """Take this token only; the client's file has it too, if `told`."""
        self._ask(do="token", token=token)
        if told:
            (self._folder / "token").write_text(token)


def certificate(folder: Path) -> None:
    """A certificate for 127.0.0.1 that is its own authority: ca.crt, with its key in tls.key."""
    subprocess.run(
        ("openssl", "req", "-x509", "-nodes", "-newkey", "ec", "-pkeyopt",
         "ec_paramgen_curve:prime256v1", "-days", "2", "-subj", "/CN=api-server-of-a-test",
         "-addext", "subjectAltName=IP:127.0.0.1",
         "-keyout", str(folder / "tls.key"), "-out", str(folder / "ca.crt")),
        check=True, capture_output=True,
    )  # fmt: skip


class Refused(Exception):
    """A request that is answered with a Status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class Store:
    """What the server knows, and how it misbehaves; `changed` guards all of it."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.version = 100
        self.forgotten = 0
        self.pods: dict[tuple[str, str], Object] = {}
        self.history: list[tuple[int, str, Object]] = []
        self.events: dict[tuple[str, str], Object] = {}
        self.calls: list[Object] = []
        self.faults: list[Object] = []
        self.watches = 0
        self.token = ""
        self.granted = granted()

    def put(self, node: str, metadata: Object) -> Object:
        """Make or change a pod."""
        key = (metadata.setdefault("namespace", "default"), metadata["name"])
        metadata.setdefault("uid", f"uid-of-{metadata['name']}")
        former = self.pods.get(key)
        if former is not None and former["metadata"]["uid"] != metadata["uid"]:
            self.delete(key)
            former = None
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": metadata,
            # As long as they are.
            "spec": {"nodeName": node, "containers": [{"name": "c", "env": ["x" * 100] * 50}]},
            "status": {"phase": "Running"},
        }
        self.pods[key] = pod
        self._record("ADDED" if former is None else "MODIFIED", pod)
        return pod

    def delete(self, key: tuple[str, str]) -> None:
        """Delete a pod."""
        self._record("DELETED", self.pods.pop(key))

    def _record(self, kind: str, pod: Object) -> None:
        self.version += 1
        pod["metadata"]["resourceVersion"] = str(self.version)
        self.history.append((self.version, kind, json.loads(json.dumps(pod))))
        self.changed.notify_all()

    def fault(self, call: str) -> Object:
        """How this call is to be answered otherwise."""
        return next((it for it in self.faults if it["call"] in (call, "any")), {})


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: object) -> None:
        """Nothing: the calls are recorded."""

    def do_GET(self) -> None:
        """List, watch or get."""
        self._serve()

    def do_POST(self) -> None:
        """Make an Event."""
        self._serve()

    def do_PATCH(self) -> None:
        """Change a pod or an Event."""
        self._serve()

    def _serve(self) -> None:
        url = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        length = int(self.headers.get("Content-Length", "0"))
        self.body: Object = json.loads(self.rfile.read(length)) if length else {}
        store = self.server.store
        call = self._name(url.path)
        with store.changed:
            fault = store.fault(call)
            self.record: Object = {
                "call": call,
                "path": url.path,
                "query": self.query,
                "accept": self.headers.get("Accept", ""),
                "status": 0,
            }
            store.calls.append(self.record)
        self.trickle = fault.get("trickle", 0)
        if "slow" in fault:
            time.sleep(fault["slow"])
        if "drop" in fault:
            self.close_connection = True
            return
        try:
            self._authenticate(fault)
            self._authorize(call)
            if "garbled" in fault:
                self._send(200, b'{"metadata": ')
            elif call == "watch":
                self._watch([fault["told"]] if "told" in fault else [])
            else:
                self._send(200, json.dumps(self._answered(call, url.path)).encode())
        except Refused as refused:
            status = {
                "kind": "Status",
                "apiVersion": "v1",
                "status": "Failure",
                "message": refused.message,
                "code": refused.status,
            }
            self._send(refused.status, json.dumps(status).encode(), fault.get("retry_after"))

    def _authenticate(self, fault: Object) -> None:
        if "status" in fault:
            raise Refused(fault["status"], "as the test wants it")
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer" or token != self.server.store.token:
            raise Refused(401, "Unauthorized")

    def _authorize(self, call: str) -> None:
        if RIGHTS.get(call) not in self.server.store.granted:
            raise Refused(403, f"the agent's role does not allow it: {call}")

    def _name(self, path: str) -> str:
        if path == "/api/v1/pods":
            return "watch" if self.query.get("watch") == "true" else "list"
        if found := _POD.fullmatch(path):
            status = found[3] or ""
            return {"GET": "get", "PATCH/status": "patch", "PATCH": "patch pod"}.get(
                self.command + status, "?"
            )
        if _EVENTS.fullmatch(path):
            return f"{self.command.lower()} event"
        return "?"

    def _send(self, status: int, body: bytes, retry_after: int | None = None) -> None:
        self.record["status"] = status
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if retry_after is not None:
            self.send_header("Retry-After", str(retry_after))
        self.end_headers()
        if not self.trickle:
            self.wfile.write(body)
            return
        for octet in body:
            self.wfile.write(bytes([octet]))
            self.wfile.flush()
            time.sleep(self.trickle)

    def _answered(self, call: str, path: str) -> Object:
        store = self.server.store
        with store.changed:
            if call == "list":
                return {
                    "kind": "PartialObjectMetadataList" if self._is_partial() else "PodList",
                    "apiVersion": "meta.k8s.io/v1" if self._is_partial() else "v1",
                    "metadata": {"resourceVersion": str(store.version)},
                    "items": [
                        self._shown(pod) for pod in store.pods.values() if self._is_ours(pod)
                    ],
                }
            if call in {"get", "patch"}:
                found = _POD.fullmatch(path)
                assert found is not None
                key = (found[1], found[2])
                pod = store.pods.get(key)
                if pod is None:
                    raise Refused(404, f'pods "{key[1]}" not found')
                if call == "patch":
                    pod = self._patched(pod)
                return self._shown(pod)
            if call in {"post event", "patch event"}:
                found = _EVENTS.fullmatch(path)
                assert found is not None
                return self._event(found[1], found[2])
        raise Refused(404, "the server could not find the requested resource")

    def _patched(self, pod: Object) -> Object:
        """A merge patch of its annotations (RFC 7386); another UID is a conflict.

        Through the status, so whatever it has for a spec goes (podStatusStrategy.PrepareForUpdate).
        """
        if self.headers["Content-Type"] != "application/merge-patch+json":
            raise Refused(415, "the body of the request was in an unknown format")
        metadata = dict(self.body["metadata"])
        if metadata.pop("uid", pod["metadata"]["uid"]) != pod["metadata"]["uid"]:
            raise Refused(409, "Precondition failed: UID in precondition")
        assert metadata.keys() == {"annotations"}, metadata
        annotations = {**pod["metadata"].get("annotations", {}), **metadata["annotations"]}
        return self.server.store.put(
            pod["spec"]["nodeName"], {**pod["metadata"], "annotations": annotations}
        )

    def _event(self, namespace: str, name: str | None) -> Object:
        events = self.server.store.events
        if name is not None:
            if self.headers["Content-Type"] != "application/strategic-merge-patch+json":
                raise Refused(415, "the body of the request was in an unknown format")
            if (namespace, name) not in events:
                raise Refused(404, f'events "{name}" not found')
            events[namespace, name] |= self.body
            return events[namespace, name]
        event: Object = self.body
        name = event["metadata"]["name"]
        # legacyValidateEvent, ValidateObjectMeta.
        if event["involvedObject"]["namespace"] != namespace or not re.fullmatch(
            r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?", name
        ):
            raise Refused(422, f'Event "{name}" is invalid')
        if len(event["message"]) > 1024 or not event["reason"] or not event["firstTimestamp"]:
            raise Refused(422, f'Event "{name}" is invalid')
        if (namespace, name) in events:
            raise Refused(409, f'events "{name}" already exists')
        events[namespace, name] = event
        return event

    def _is_partial(self) -> bool:
        return str(self.record["accept"]).startswith(_PARTIAL)

    def _is_ours(self, pod: Object) -> bool:
        selector = self.query.get("fieldSelector", "")
        return selector in ("", f"spec.nodeName={pod['spec']['nodeName']}")

    def _shown(self, pod: Object) -> Object:
        if not self._is_partial():
            return pod
        return {
            "kind": "PartialObjectMetadata",
            "apiVersion": "meta.k8s.io/v1",
            "metadata": pod["metadata"],
        }

    def _watch(self, told: list[object]) -> None:
        self.record["status"] = 200
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        with suppress(OSError):
            for event in chain(told, self._changes(int(self.query["resourceVersion"]))):
                line = json.dumps(event).encode() + b"\n"
                # Some events come in pieces.
                for piece in (line[:20], line[20:]):
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            self.wfile.write(b"0\r\n\r\n")
            return
        self.close_connection = True

    def _changes(self, version: int) -> Iterator[Object]:
        store = self.server.store
        begun = store.watches
        deadline = time.monotonic() + float(self.query["timeoutSeconds"])
        if version < store.forgotten:
            yield {
                "type": "ERROR",
                "object": {
                    "kind": "Status",
                    "status": "Failure",
                    "code": 410,
                    "message": f"too old resource version: {version} ({store.forgotten})",
                },
            }
            return
        while True:
            with store.changed:
                if store.version == version and store.watches == begun:
                    store.changed.wait(_BOOKMARK_SECONDS)
                if store.watches != begun or time.monotonic() > deadline:
                    return
                news = [it for it in store.history if it[0] > version]
                version = store.version
            for _, kind, pod in news:
                if self._is_ours(pod):
                    yield {"type": kind, "object": self._shown(pod)}
            if self.query.get("allowWatchBookmarks") == "true":
                yield {
                    "type": "BOOKMARK",
                    "object": self._shown({"metadata": {"resourceVersion": str(version)}}),
                }


class Server(ThreadingHTTPServer):
    """The socket, its connections, and what they serve."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self, folder: Path, port: int, store: Store) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.store = store
        self._connections: set[socket.socket] = set()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "ca.crt", folder / "tls.key")
        # Their hand-shakes are their threads' own.
        self.socket = context.wrap_socket(
            self.socket, server_side=True, do_handshake_on_connect=False
        )
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def process_request(self, request: Any, client_address: Any) -> None:  # noqa: ANN401
        """Serve it, and be able to cut it off."""
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:  # noqa: ANN401 - as in the base class
        """Close it."""
        self._connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ANN401
        """Nothing: whoever called has gone."""

    def close(self) -> None:
        """Be as good as dead."""
        self.shutdown()
        self.server_close()
        for connection in list(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def main(folder: Path) -> None:
    """Do as the lines on standard input say."""
    store = Store()
    server: Server | None = None
    port = 0
    for line in sys.stdin:
        command: Mapping[str, Any] = json.loads(line)
        answer: object = None
        match command["do"]:
            case "listen":
                server = Server(folder, port, store)
                answer = port = server.server_address[1]
            case "close":
                assert server is not None
                server.close()
            case _:
                with store.changed:
                    answer = _done(store, command)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _done(store: Store, command: Mapping[str, Any]) -> object:
    match command["do"]:
        case "put":
            return store.put(command["node"], command["metadata"])
        case "delete":
            store.delete((command["key"][0], command["key"][1]))
        case "pods":
            return list(store.pods.values())
        case "events":
            return list(store.events.values())
        case "calls":
            return store.calls
        case "fail":
            store.faults.insert(0, command["fault"])
        case "behave":
            store.faults.clear()
        case "compact":
            store.version += 1
            store.forgotten = store.version
            store.history.clear()
            store.watches += 1
            store.changed.notify_all()
        case "end watches":
            store.watches += 1
            store.changed.notify_all()
        case "token":
            store.token = command["token"]
    return None


if __name__ == "__main__":
    main(Path(sys.argv[1]))
