"""With Kubernetes: the API server says whose VM it is and which NICs it asks for, and is told.

The API server is one of the test's own (api_server.py), the client is Kubernetes'.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import pytest

from extbridge.demo.lab import Lab, Nic, run
from extbridge.kube import orphans, pods, reports
from extbridge.kube.api import MERGE_PATCH, Api, ApiFailure, Circuit, Failure
from extbridge.kube.orphans import Orphans
from extbridge.kube.pods import PodCache
from extbridge.kube.reports import Reports
from extbridge.ledger import Entry, Ledger
from extbridge.network.mac import derive_mac
from extbridge.node import wire
from extbridge.node.agent import CNI_THREADS
from extbridge.node.metrics import Metrics
from extbridge.spec.errors import InvalidNetworkConfig
from extbridge.spec.skel import answer_failure
from tests.kernel.agents import Agent, Launcher, until
from tests.kernel.api_server import NODE, RIGHTS, ApiServer, granted
from tests.kernel.observe import leftovers, macvtaps, network_config, show_link
from tests.support import Answer, Cni, executable, require

ANNOTATIONS: Final = "io.kubernetes.cri.pod-annotations"
NETWORKS: Final = "extbridge.io/networks"
STATUS: Final = "extbridge.io/status"
MAC: Final = "52:54:00:00:00:01"
POD: Final = "vm-pod"

RETRY_LATER: Final = 300

GARBLED_WATCH: Final = "extbridge_api_failures_total{call=watch of pods,kind=garbled}"

# Where a pod finds its service account; /run is the test's own there, as in a container.
IN_A_POD = (
    "unshare", "--mount", "sh", "-c",
    'mount -t tmpfs none /run && mkdir -p "$0" && mount --bind "$ACCOUNT" "$0" && exec "$@"',
    "/run/secrets/kubernetes.io/serviceaccount",
)  # fmt: skip


def args_of(name: str = POD, uid: str = "") -> str:
    """CNI_ARGS as a kubelet's runtime gives them."""
    return ";".join(
        ("IgnoreUnknown=1", "K8S_POD_NAMESPACE=default", f"K8S_POD_NAME={name}",
         f"K8S_POD_UID={uid or f'uid-of-{name}'}")
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Node:
    """A node of a cluster: its agent, its runtime's shim, its NIC and one pod."""

    agent: Agent
    shim: Cni
    nic: Nic
    pod: str
    networks_dir: Path

    def add(self, config: Mapping[str, object], **variables: str) -> Answer:
        """ADD for a pod of Kubernetes."""
        return self.shim("ADD", config, **{"NETNS": self.pod, "ARGS": args_of(), **variables})

    def delete(self, config: Mapping[str, object], **variables: str) -> None:
        """DEL, after which nothing is left."""
        assert self.shim("DEL", config, **{"NETNS": self.pod, **variables}).status == 0
        assert leftovers(self.pod, self.agent.run_dir) == []

    def mac(self, **variables: str) -> str:
        """The MAC that a NIC of no given one gets; it is deleted again."""
        config = network_config(self.nic)
        result: Any = self.add(config, **variables).result
        self.delete(config)
        return str(result["interfaces"][0]["mac"])

    def chained(self, **keys: object) -> dict[str, Any]:
        """The node's main network list, of a runtime that hands over no annotations: CRI-O."""
        return {
            "cniVersion": "1.0.0",
            "name": "cluster",
            "type": "extbridge",
            "networksDir": str(self.networks_dir),
            "prevResult": {
                "cniVersion": "1.0.0",
                "interfaces": [{"name": "eth0", "mac": "0a:00:00:00:00:01", "sandbox": self.pod}],
            },
            **keys,
        }

    def add_chained(self, config: Mapping[str, object] | None = None, **variables: str) -> Answer:
        """ADD of the pod's eth0 by that list, extbridge standing last."""
        return self.add(config or self.chained(), **{"IFNAME": "eth0", **variables})


@pytest.fixture
def api(tmp_path: Path) -> Iterator[ApiServer]:
    """The cluster's API server."""
    require("openssl")
    folder = tmp_path / "api"
    folder.mkdir()
    with ApiServer(folder) as api:
        yield api


@pytest.fixture
def member(api: ApiServer, run_dir: Path, tmp_path: Path) -> Iterator[Agent]:
    """An agent that belongs to the cluster, not started yet."""
    options = ("--kubeconfig", str(api.kubeconfig), "--node-name", NODE)
    with Agent(run_dir, tmp_path / "agent.log", *options) as agent:
        yield agent


@pytest.fixture
def worker(member: Agent, shim: Cni, nic: Nic, pod: str, tmp_path: Path) -> Node:
    """The node, with the networks vepanet and blue; its agent is not started yet."""
    run("ip", "link", "add", "eth0", "type", "bridge", netns=pod)
    for name in ("vepanet", "blue"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"extbridge": {"dev": nic.name}}))
    return Node(member, shim, nic, pod, tmp_path)


def started(worker: Node, pods: int) -> None:
    """Start the agent, and wait until it knows so many pods."""
    worker.agent.start()
    worker.agent.counts({"pods_known": pods})


def derived(vm: str) -> str:
    """The MAC of a VM of this name."""
    return derive_mac("52:54:00", network="vepanet", namespace="default", vm=vm, ifname="net1")


# Whose VM it is.


@pytest.mark.parametrize(
    ("metadata", "vm"),
    [
        ({}, POD),
        ({"annotations": {"extbridge.io/vm": "vm-1"}}, "vm-1"),
        ({"annotations": {"kubevirt.io/domain": "vm-2"}}, "vm-2"),
        ({"labels": {"kubevirt.io/domain": "vm-3"}}, "vm-3"),
        ({"labels": {"vm.kubevirt.io/name": "vm-4"}}, "vm-4"),
        (
            {
                "annotations": {"extbridge.io/vm": "vm-5", "kubevirt.io/domain": "no"},
                "labels": {"vm.kubevirt.io/name": "no"},
            },
            "vm-5",
        ),
    ],
    ids=["none", "ours", "domain", "domain label", "name label", "all"],
)
def test_vm_keeps_its_mac_by_the_pods_marks(
    api: ApiServer, worker: Node, metadata: dict[str, object], vm: str
) -> None:
    """A VM's MAC follows its own name, which the pod's annotations or labels say; nobody asks."""
    api.put_pod(POD, **metadata)
    started(worker, 1)
    assert worker.mac() == derived(vm)
    assert api.calls().keys() == {"list", "watch"}


def test_what_the_request_says_comes_first(api: ApiServer, worker: Node) -> None:
    """A VM that the runtime's annotations name, and a MAC that is given, are what counts."""
    api.put_pod(POD, annotations={"extbridge.io/vm": "changed-since"})
    started(worker, 1)
    handed = {ANNOTATIONS: {"kubevirt.io/domain": "vm-1"}}
    capability = {"capabilities": {ANNOTATIONS: True}}
    config = network_config(worker.nic, runtimeConfig=handed, **capability)
    result: Any = worker.add(config).result
    assert result["interfaces"][0]["mac"] == derived("vm-1")
    worker.delete(config)
    # Of a pod that the API server has not: it is not asked either.
    config = network_config(worker.nic, mac=MAC)
    assert worker.add(config, ARGS=args_of("unknown")).status == 0
    worker.delete(config)
    assert api.calls()["get"] == 0


def test_pods_that_come_are_followed(api: ApiServer, worker: Node) -> None:
    """Pods are known as soon as the API server has them, and by their UID, not by their name."""
    started(worker, 0)
    api.put_pod("elsewhere", node="node-2")
    api.put_pod(POD, uid="1", annotations={"extbridge.io/vm": "vm-1"})
    worker.agent.counts({"pods_known": 1})
    assert worker.mac(ARGS=args_of(uid="1")) == derived("vm-1")
    api.put_pod(POD, uid="2", annotations={"extbridge.io/vm": "vm-2"})
    until(lambda: worker.mac(ARGS=args_of(uid="2")) == derived("vm-2"))
    # A former pod of its name is none: it is asked for, and not there.
    assert worker.mac(ARGS=args_of(uid="1")) == derived(POD)
    api.delete_pod(POD)
    worker.agent.counts({"pods_known": 0})


def test_pod_that_is_not_known_yet_is_asked_for(api: ApiServer, worker: Node) -> None:
    """An ADD that is sooner than the watch asks the API server itself, once."""
    api.fail("list", status=500, retry_after=RETRY_LATER)
    worker.agent.start()
    api.put_pod(POD, annotations={"extbridge.io/vm": "vm-1"})
    assert worker.mac() == derived("vm-1")
    assert api.calls()["get"] == 1


@pytest.mark.parametrize(
    ("how", "kind"),
    [
        ({"slow": 1.0}, "slow"),
        ({"trickle": 0.1}, "slow"),
        ({"drop": True}, "unreachable"),
        ({"garbled": True}, "garbled"),
        ({"status": 401}, "unauthorized"),
        ({"status": 403}, "forbidden"),
        ({"status": 429}, "throttled"),
        ({"status": 500}, "server"),
    ],
    ids=str,
)
def test_add_goes_on_without_the_api_server(
    api: ApiServer, worker: Node, how: dict[str, object], kind: str
) -> None:
    """Where the API server fails an ADD, the pod's name has to do for the VM's; the log says so."""
    api.fail("any", retry_after=RETRY_LATER, **how)
    worker.agent.start()
    assert worker.mac() == derived(POD)
    worker.agent.counts({f"api_failures_total{{call=look-up of a pod,kind={kind}}}": 1})
    assert 'vm="unknown, the MAC follows the pod\'s name"' in worker.agent.log


def test_api_server_that_failed_is_left_alone(api: ApiServer, worker: Node) -> None:
    """After a failure ADDs do not ask until the time has come, which the API server may say."""
    api.fail("any", status=429, retry_after=RETRY_LATER)
    worker.agent.start()
    for _ in range(5):
        assert worker.mac() == derived(POD)
    assert api.calls()["get"] == 1
    assert worker.agent.log.count("API server, look-up of a pod") == 1


def test_many_adds_at_once_do_not_pile_up(api: ApiServer, worker: Node) -> None:
    """However many pods come while the API server is slow, few ask, and no thread is left of it."""
    api.fail("list", status=500, retry_after=RETRY_LATER)
    api.fail("get", slow=60)
    worker.agent.start()
    before = len(worker.agent.threads)
    config = network_config(worker.nic)

    def add(number: int) -> int:
        name = f"pod-{number}"
        return worker.add(
            config, CONTAINERID=name, IFNAME=f"net{number}", ARGS=args_of(name)
        ).status

    with ThreadPoolExecutor(2 * CNI_THREADS) as runtime:
        assert set(runtime.map(add, range(2 * CNI_THREADS))) == {0}
    assert 1 <= api.calls()["get"] <= CNI_THREADS
    # The API server holds its answers for longer than this.
    until(lambda: len(worker.agent.threads) <= before)
    for number in range(2 * CNI_THREADS):
        assert worker.shim("DEL", config, CONTAINERID=f"pod-{number}").status == 0


# The cache.


@pytest.mark.parametrize(
    ("call", "how", "kind"),
    [
        ("list", {"status": 401}, "unauthorized"),
        ("list", {"status": 403}, "forbidden"),
        ("list", {"status": 410}, "gone"),
        ("list", {"status": 429}, "throttled"),
        ("list", {"status": 500}, "server"),
        ("list", {"drop": True}, "unreachable"),
        ("list", {"garbled": True}, "garbled"),
        ("watch", {"status": 401}, "unauthorized"),
        ("watch", {"status": 410}, "gone"),
        ("watch", {"status": 429}, "throttled"),
        ("watch", {"status": 500}, "server"),
        ("watch", {"told": {"type": "ERROR", "object": {"code": 410}}}, "gone"),
        ("watch", {"drop": True}, "unreachable"),
    ],
    ids=str,
)
def test_failing_api_server_is_borne(
    api: ApiServer, worker: Node, call: str, how: dict[str, object], kind: str
) -> None:
    """The agent serves all the same, tries again and again, and logs only what has changed."""
    api.fail(call, **how)
    worker.agent.start()
    counted = f"extbridge_api_failures_total{{call={call} of pods,kind={kind}}}"
    until(lambda: worker.agent.metrics()[counted] >= 2)
    assert worker.add(network_config(worker.nic, mac=MAC)).status == 0
    assert worker.agent.log.count(f"API server, {call} of pods: ") == 1
    assert f"warning: API server, {call} of pods: {kind}: " in worker.agent.log
    api.behave()
    api.put_pod(POD)
    worker.agent.counts({"pods_known": 1})
    until(lambda: f"info: API server, {call} of pods: it works again" in worker.agent.log)
    assert worker.agent.log.count(f"API server, {call} of pods: ") == 2


# Within an event or an object, nothing is of the type that it has to be.
UNREADABLE: Final[list[object]] = [
    "text",
    {"type": "MODIFIED"},
    {"type": "MODIFIED", "object": []},
    {"type": ["MODIFIED"], "object": {"metadata": {"resourceVersion": "1"}}},
    {"type": "ERROR", "object": {"code": "410"}},
    {"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": 1}}},
    {"type": "MODIFIED", "object": {"metadata": {"resourceVersion": "1", "name": ["pod"]}}},
]


@pytest.mark.parametrize("event", UNREADABLE, ids=lambda event: json.dumps(event)[:40])
def test_event_that_cannot_be_read_ends_nothing(
    api: ApiServer, worker: Node, event: object
) -> None:
    """After an event that makes no sense the pods are listed anew, and followed from there."""
    started(worker, 0)
    api.fail("watch", told=event)
    api.end_watches()
    until(lambda: worker.agent.metrics()[GARBLED_WATCH] >= 1)
    # Else the same would come again.
    until(lambda: api.calls()["list"] >= 2)
    api.behave()
    api.put_pod(POD)
    worker.agent.counts({"pods_known": 1})
    assert "Traceback" not in worker.agent.log


@pytest.mark.parametrize(
    "metadata",
    [
        {"annotations": {"extbridge.io/vm": ["vm-1"]}},
        {"annotations": {"kubernetes.io/config.hash": {}}},
        {"annotations": ["extbridge.io/vm"]},
        {"labels": {"kubevirt.io/domain": 1}},
        {"uid": 1},
    ],
    ids=str,
)
def test_pod_that_cannot_be_read_is_left_out(
    api: ApiServer, worker: Node, metadata: dict[str, object]
) -> None:
    """What is wrong in one pod is said and counted, costs no other its NIC, and can be mended."""
    started(worker, 0)
    api.put_pod("wrong", **metadata)
    api.put_pod(POD, annotations={"extbridge.io/vm": "vm-1"})
    worker.agent.counts({"pods_known": 1})
    assert worker.mac() == derived("vm-1")
    assert worker.agent.metrics()[GARBLED_WATCH] >= 1
    assert "a pod of the node is left out: metadata." in worker.agent.log
    assert "Traceback" not in worker.agent.log
    api.put_pod("wrong")
    worker.agent.counts({"pods_known": 2})


def test_defect_does_not_end_the_cache(
    api: ApiServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What nobody has thought of is logged and counted, and pods are followed all the same."""
    monkeypatch.setattr(pods, "_parse_pod", 1)
    counted: Counter[tuple[str, str]] = Counter()
    client = Api(api.kubeconfig)
    cache = PodCache(client, NODE, lambda *failed: counted.update([failed]))
    cache.start()
    until(lambda: cache.number == 0)
    api.put_pod(POD)
    until(lambda: counted["watch of pods", "internal"] and counted["list of pods", "internal"])
    assert cache.find("default", POD, "") is None
    assert counted["look-up of a pod", "internal"] == 1
    monkeypatch.undo()
    until(lambda: cache.number == 1)
    assert cache.find("default", POD, "") is not None
    cache.stop()
    cache._thread.join(30)
    client.close()
    assert caplog.text.count("API server, watch of pods: internal: TypeError") == 1
    assert "Traceback" in caplog.text


def test_pauses_get_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """An API server that fails is asked less and less, and not before the time that it asks for."""
    monkeypatch.setattr("extbridge.kube.api.time", SimpleNamespace(monotonic=lambda: 0.0))
    counted: Counter[tuple[str, str]] = Counter()
    circuit = Circuit("test", lambda *failed: counted.update([failed]))
    for longest in (0.5, 1, 2, 4, 8, 16, 30, 30):
        circuit.fail(ApiFailure(Failure.SERVER, "as the test wants it"))
        assert longest / 2 <= circuit.pause <= longest
    circuit.fail(ApiFailure.by_status(429, "too many", pause=120.0))
    assert circuit.pause == 120
    # Not for ever, whatever it asks for.
    circuit.fail(ApiFailure.by_status(429, "too many", pause=1e9))
    assert circuit.pause == 300
    circuit.work()
    assert circuit.pause == 0
    assert counted == {("test", "server"): 8, ("test", "throttled"): 2}


def test_api_server_that_comes_later_is_found(api: ApiServer, worker: Node) -> None:
    """The agent begins without the API server, and belongs to the cluster when it is there."""
    api.close()
    worker.agent.start()
    api.put_pod(POD, annotations={"extbridge.io/vm": "vm-1"})
    assert worker.mac() == derived(POD)
    api.listen()
    worker.agent.counts({"pods_known": 1})
    until(lambda: worker.mac() == derived("vm-1"))


def test_nothing_is_missed_while_the_watch_is_cut(api: ApiServer, worker: Node) -> None:
    """The API server goes, comes, and ends watches: what has changed meanwhile is known after."""
    api.put_pod(POD)
    started(worker, 1)
    api.close()
    api.put_pod("second")
    api.delete_pod(POD)
    api.put_pod("third")
    api.listen()
    worker.agent.counts({"pods_known": 2})
    for name in ("fourth", "fifth"):
        api.end_watches()
        api.put_pod(name)
    worker.agent.counts({"pods_known": 4})
    # From where it stood: it is not listed anew.
    assert api.calls()["list"] == 1
    api.put_pod("sixth")
    api.forget_history()
    api.delete_pod("second")
    until(lambda: api.calls()["list"] == 2)
    worker.agent.counts({"pods_known": 4})


def test_new_token_is_taken(
    api: ApiServer, worker: Node, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In a pod the service account's token is used, and its successor as soon as it is needed."""
    worker.agent.options = ("--kubernetes",)
    worker.agent.wrapper = IN_A_POD
    for key, value in {
        "KUBERNETES_SERVICE_HOST": "127.0.0.1",
        "KUBERNETES_SERVICE_PORT": str(api.port),
        "NODE_NAME": NODE,
        "ACCOUNT": str(tmp_path / "api"),
    }.items():
        monkeypatch.setenv(key, value)
    started(worker, 0)
    api.set_token("second", told=False)
    api.end_watches()
    until(lambda: "API server, watch of pods: unauthorized: HTTP 401" in worker.agent.log)
    api.set_token("second")
    api.put_pod(POD)
    worker.agent.counts({"pods_known": 1})
    api.set_token("third")
    api.end_watches()
    api.put_pod("second")
    worker.agent.counts({"pods_known": 2})
    assert worker.agent.log.count("unauthorized") == 1


# Which NICs it asks for.


@pytest.mark.parametrize("declared", [False, True])
def test_pod_decides_where_the_runtime_hands_over_no_annotations(
    api: ApiServer, worker: Node, *, declared: bool
) -> None:
    """Behind another plugin on CRI-O, the pod's annotation decides as it does on containerd."""
    asked = [{"name": "vepanet", "interface": "vm0", "mac": MAC}, {"name": "blue"}]
    api.put_pod(POD, annotations={NETWORKS: json.dumps(asked)})
    api.put_pod("plain")
    started(worker, 2)
    config = worker.chained(**({"capabilities": {ANNOTATIONS: True}} if declared else {}))
    result: Any = worker.add_chained(config).result
    assert [it["name"] for it in result["interfaces"]] == ["eth0", "vm0", "macvtap0"]
    assert show_link("vm0", worker.pod)["address"] == MAC
    checked = {**config, "prevResult": result}
    assert worker.shim("CHECK", checked, NETNS=worker.pod, IFNAME="eth0").status == 0
    worker.delete(config, IFNAME="eth0")
    for name in ("plain", "the-api-server-has-no-such-pod"):
        passed = worker.add_chained(config, ARGS=args_of(name), CONTAINERID="c2")
        assert passed.result == config["prevResult"]
    assert worker.add_chained(config, ARGS="", CONTAINERID="c3").result == config["prevResult"]
    assert api.calls()["get"] == 1


def test_nobody_knows_what_the_pod_asks_for(api: ApiServer, worker: Node) -> None:
    """Where nobody can say whether a pod is a VM's, it is not begun without its NIC: try again."""
    api.put_pod(POD, annotations={NETWORKS: "vepanet"})
    api.close()
    worker.agent.start()
    failed = worker.add_chained().error
    assert failed["code"] == 11
    assert "nobody can say whether the pod asks for NICs" in str(failed["msg"])
    assert leftovers(worker.pod, worker.agent.run_dir) == []
    # What the runtime hands over is enough, and what it says it has none of.
    empty: tuple[object, ...] = ({}, None)
    for handed in empty:
        config = worker.chained(
            capabilities={ANNOTATIONS: True}, runtimeConfig={ANNOTATIONS: handed}
        )
        assert worker.add_chained(config).result == config["prevResult"]
    api.listen()
    until(lambda: worker.add_chained().status == 0)
    assert macvtaps(worker.pod) == ["macvtap0"]


# What the pod is told.


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ('[{"name": "vepanet"', "extbridge.io/networks: line 1, column 20: Expecting"),
        ("vepanet,grey", "network grey"),
        (
            '[{"name": "vepanet", "interface": "vm0"}, {"name": "blue", "interface": "vm0"}]',
            "asks for the interface vm0 more than once",
        ),
        ('{"name": "vepanet", "interface": "eth0"}', "the interface name eth0 is taken"),
        (f'{{"name": "vepanet", "mac": "{MAC}"}}', f"{MAC} is in use"),
    ],
    ids=["broken JSON", "unknown network", "duplicate interface", "its eth0", "MAC in use"],
)
@pytest.mark.parametrize("runtime", ["containerd", "CRI-O"])
def test_pods_event_says_why_its_add_failed(
    api: ApiServer, worker: Node, runtime: str, asked: str, sentence: str
) -> None:
    """What is wrong with a pod's annotation stands in its Event, as the runtime was told it."""
    annotations = {NETWORKS: asked}
    api.put_pod(POD, annotations=annotations)
    started(worker, 1)
    other = network_config(worker.nic, mac=MAC)
    # In the same namespace, which is all the same to the NIC that both are on.
    assert worker.add(other, CONTAINERID="other", ARGS="", IFNAME="net9").status == 0
    config = worker.chained()
    if runtime == "containerd":
        config |= {"capabilities": {ANNOTATIONS: True}, "runtimeConfig": {ANNOTATIONS: annotations}}
    failed = worker.add_chained(config).error
    assert sentence in str(failed["msg"])
    assert macvtaps(worker.pod) == ["net9"]
    [event] = until(api.events)
    assert event["message"] == f"{failed['msg']}; {failed['details']}"
    assert (event["type"], event["reason"], event["count"]) == ("Warning", "AttachmentFailed", 1)
    assert event["source"] == {"component": "extbridge", "host": NODE}
    assert event["involvedObject"] == {
        "apiVersion": "v1",
        "kind": "Pod",
        "namespace": "default",
        "name": POD,
        "uid": f"uid-of-{POD}",
    }


def test_same_failure_is_one_event(api: ApiServer, worker: Node) -> None:
    """A runtime that tries again and again makes no Event each time."""
    started(worker, 0)
    for _ in range(20):
        assert worker.add({**network_config(worker.nic), "mtuu": 1}).status == 1
    worker.agent.counts({"reports_total{outcome=told}": 1, "reports_total{outcome=counted}": 19})
    assert api.calls()["post event"] == 1
    assert api.calls()["patch event"] == 0


@dataclass(frozen=True, slots=True)
class Reporter:
    """The thread that tells pods, without an agent, whose times a test can shorten."""

    reports: Reports
    outcomes: Counter[str]

    def fail(self, message: str, name: str = POD) -> None:
        """An ADD failed with this message."""
        environ = {"CNI_COMMAND": "ADD", "CNI_CONTAINERID": "c", "CNI_ARGS": args_of(name)}
        request = wire.Request(environ, b"")
        answer = answer_failure(InvalidNetworkConfig(message), b"{}", request.id)
        self.reports.observe(request, answer)


@pytest.fixture
def metrics() -> Metrics:
    """An agent's."""
    return Metrics(observe=list, spooled=lambda: 0, broken=list)


def outcome(metrics: Metrics, name: str) -> int:
    """How many reports have come to this."""
    found = metrics.reports.labels(name)._value.get()
    return int(found)


@pytest.fixture
def reporter(api: ApiServer, run_dir: Path, metrics: Metrics) -> Iterator[Reporter]:
    """Reports to this API server; not started."""
    client = Api(api.kubeconfig)
    pods = PodCache(client, NODE, metrics.count_api_failure)
    reporter = Reporter(Reports(client, pods, NODE, Ledger(run_dir), metrics), Counter())
    yield reporter
    reporter.reports.stop()
    if reporter.reports._thread.is_alive():
        reporter.reports.join(30)
    client.close()


def test_failure_that_goes_on_is_counted_in_its_event(
    api: ApiServer, reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a minute the same failure raises its Event's count; a new Event where that is gone."""
    monkeypatch.setattr(reports, "_SAME_SECONDS", 0.0)
    reporter.reports.start()
    reporter.fail("no NIC")
    [first] = until(api.events)
    for number in (2, 3):
        reporter.fail("no NIC")
        until(lambda number=number: [it["count"] for it in api.events()] == [number])  # type: ignore[misc]
    [event] = api.events()
    assert event["message"] != first["message"], "the ID is not that of the latest request"
    reporter.fail("no NIC, and another")
    until(lambda: sorted(it["count"] for it in api.events()) == [1, 3])
    api.fail("patch event", status=404)
    reporter.fail("no NIC")
    until(lambda: sorted(it["count"] for it in api.events()) == [1, 1, 3])


def test_pod_cannot_flood_the_api_server(
    api: ApiServer, reporter: Reporter, metrics: Metrics
) -> None:
    """One pod gets a few Events a minute, whatever else it fails with; others get theirs."""
    reporter.reports.start()
    for number in range(100):
        reporter.fail(f"failure {number}")
    reporter.fail("failure", "another")
    until(lambda: outcome(metrics, "told") + outcome(metrics, "counted") == 101)
    assert Counter(it["involvedObject"]["name"] for it in api.events()) == {POD: 5, "another": 1}


def test_what_is_too_much_is_lost_and_counted(reporter: Reporter, metrics: Metrics) -> None:
    """Reports that nobody takes wait up to a number, and block nobody."""
    for number in range(300):
        reporter.fail(f"failure {number}")
    assert outcome(metrics, "lost") == 300 - 256


def test_message_is_as_long_as_the_api_server_takes(api: ApiServer, reporter: Reporter) -> None:
    """A sentence that is too long for an Event is shortened, not its end; so is a pod's name."""
    reporter.reports.start()
    reporter.fail("x" * 2000, "p" * 253)
    [event] = until(api.events)
    assert len(event["message"]) == 1024
    assert re.fullmatch(
        r"x+…x*; \(errors\.md#invalid-network-config, request [0-9a-f]{8}\)", event["message"]
    )


def test_defect_does_not_end_reports(
    api: ApiServer, reporter: Reporter, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A report that we fail to tell is lost, and counted; those after it are told."""
    monkeypatch.setattr(reports, "_timestamp", 1)
    reporter.reports.start()
    reporter.fail("no NIC")
    until(lambda: outcome(metrics, "lost") == 1)
    monkeypatch.undo()
    reporter.fail("no NIC again")
    [event] = until(api.events)
    assert str(event["message"]).startswith("no NIC again; ")


def test_event_waits_for_the_api_server(api: ApiServer, worker: Node) -> None:
    """What fails while the API server is away is told when it is back; ADD does not wait for it."""
    started(worker, 0)
    api.close()
    failed = worker.add({**network_config(worker.nic), "mtuu": 1})
    assert failed.status == 1
    until(lambda: "API server, events: unreachable" in worker.agent.log)
    api.listen()
    [event] = until(api.events)
    assert "mtuu" in event["message"]
    until(lambda: "API server, events: it works again" in worker.agent.log)


def test_events_that_are_forbidden_are_borne(api: ApiServer, worker: Node) -> None:
    """Without the right to make Events there are none, and the log says so once."""
    api.fail("post event", status=403)
    started(worker, 0)
    for dev in ("nope", "neither", "nor-this"):
        assert worker.add(network_config(worker.nic, extbridge={"dev": dev})).status == 1
    worker.agent.counts({"reports_total{outcome=lost}": 3})
    assert worker.agent.log.count("API server, events: ") == 1


def test_agent_ends_without_the_api_server(api: ApiServer, worker: Node) -> None:
    """An agent that has much to tell, and nobody to tell it to, ends all the same."""
    started(worker, 0)
    api.fail("any", slow=30)
    for dev in ("nope", "neither", "nor-this"):
        assert worker.add(network_config(worker.nic, extbridge={"dev": dev})).status == 1
    until(lambda: api.calls()["post event"])
    worker.agent.stop()


def test_status_of_additional_nics_is_on_the_pod(api: ApiServer, worker: Node) -> None:
    """Behind another plugin the pod's annotation says which NICs were made, for all to read."""
    asked = [{"name": "vepanet", "interface": "vm0", "mac": MAC, "ips": ["10.9.0.7/24"]}]
    api.put_pod(POD, annotations={NETWORKS: json.dumps(asked), "example.com/other": "kept"})
    started(worker, 1)
    assert worker.add_chained().status == 0
    annotations = until(lambda: found if STATUS in (found := annotations_of(api)) else None)
    assert json.loads(annotations[STATUS]) == [
        {"name": "vepanet", "interface": "vm0", "mac": MAC, "ips": ["10.9.0.7"], "mtu": 1500}
    ]
    assert annotations["example.com/other"] == "kept"


def test_agents_token_changes_no_pod(api: ApiServer, worker: Node) -> None:
    """Whoever has a node's token can choose no pod's image: its role is what the agent calls."""
    assert granted() == set(RIGHTS.values()) - {RIGHTS["patch pod"]}
    pod = api.put_pod(POD, annotations={NETWORKS: "vepanet"})
    started(worker, 1)
    assert worker.add_chained().status == 0
    until(lambda: STATUS in annotations_of(api))
    client = Api(api.kubeconfig)
    image = {"metadata": {"annotations": {}}, "spec": {"containers": [{"name": "c", "image": "x"}]}}
    path = f"/api/v1/namespaces/default/pods/{POD}"
    with pytest.raises(ApiFailure, match="HTTP 403"):
        client.patch(path, image, kind=MERGE_PATCH, seconds=5)
    client.close()
    assert api.pod(POD)["spec"] == pod["spec"]


def test_status_is_only_for_additional_nics(api: ApiServer, worker: Node) -> None:
    """Who asks for one NIC by its name, as Multus does, tells the pod itself."""
    api.put_pod(POD)
    started(worker, 1)
    assert worker.add(network_config(worker.nic)).status == 0
    worker.agent.counts({"reports_total{outcome=none}": 1})
    assert api.calls()["patch"] == 0


def test_status_of_a_former_pod_is_not_its_successors(api: ApiServer, worker: Node) -> None:
    """A pod that another of its name has followed meanwhile is told nothing, nor is the other."""
    api.put_pod(POD, uid="1", annotations={NETWORKS: "vepanet"})
    started(worker, 1)
    api.fail("patch", status=500)
    assert worker.add_chained(ARGS=args_of(uid="1")).status == 0
    until(lambda: api.calls()["patch"])
    api.put_pod(POD, uid="2")
    api.behave()
    worker.agent.counts({"reports_total{outcome=late}": 1})
    assert STATUS not in annotations_of(api)


def test_static_pod_is_told_by_its_mirror(api: ApiServer, worker: Node) -> None:
    """A static pod, which kubelet calls by another UID than the API server, is like any other."""
    api.put_pod(
        POD, uid="mirror", annotations={NETWORKS: "vepanet", "kubernetes.io/config.hash": "hash"}
    )
    started(worker, 1)
    assert worker.add_chained(ARGS=args_of(uid="hash")).status == 0
    until(lambda: STATUS in annotations_of(api))
    assert api.calls()["get"] == 0


def annotations_of(api: ApiServer) -> dict[str, str]:
    """What stands on the pod."""
    found: dict[str, str] = api.pod(POD)["metadata"].get("annotations", {})
    return found


# Pods that are gone.


@pytest.fixture
def hasty(worker: Node) -> Node:
    """A node whose agent frees NICs of pods after a second."""
    worker.agent.options = (*worker.agent.options, "--orphans-after", "1")
    return worker


FREED: Final = "reconcile_repairs_total{kind=orphan}"


def test_nic_of_a_pod_that_is_gone_is_freed(api: ApiServer, hasty: Node, lab: Lab) -> None:
    """A NIC for which no DEL came is freed when its pod is gone; those of other pods are not."""
    api.put_pod(POD)
    api.put_pod("static", uid="mirror", annotations={"kubernetes.io/config.mirror": "hash"})
    started(hasty, 2)
    config = network_config(hasty.nic)
    others = {
        # What the API server has by another UID, and what is no pod of its.
        "c2": {"NETNS": lab.pod("c2"), "ARGS": args_of("static", "hash")},
        "c3": {"NETNS": lab.pod("c3"), "ARGS": ""},
    }
    for container_id, variables in others.items():
        assert hasty.add(config, CONTAINERID=container_id, **variables).status == 0
    assert hasty.add(config).status == 0
    api.delete_pod(POD)
    until(lambda: macvtaps(hasty.pod) == [])
    hasty.agent.counts({FREED: 1})
    assert "freed the NIC of a pod that is gone pod=default/vm-pod" in hasty.agent.log
    assert set(Ledger(hasty.agent.run_dir).containers()) == others.keys()
    for container_id, variables in others.items():
        assert macvtaps(variables["NETNS"]) == ["net1"]
        assert hasty.shim("DEL", config, CONTAINERID=container_id).status == 0


def test_nic_that_somebody_works_with_is_kept(
    api: ApiServer, hasty: Node, launcher: Launcher
) -> None:
    """A VM that lives keeps its NIC, whatever the API server says; the log warns of it once."""
    api.put_pod(POD)
    started(hasty, 1)
    assert hasty.add(network_config(hasty.nic)).status == 0
    with launcher.holding(hasty.pod) as vm:
        api.delete_pod(POD)
        kept = f"net1 of pod default/{POD}, which is gone, is kept: process {vm} works with it"
        until(lambda: kept in hasty.agent.log)
        until(lambda: api.calls()["get"] >= 4)
        assert hasty.agent.log.count(kept) == 1
        assert macvtaps(hasty.pod) == ["net1"]
    until(lambda: macvtaps(hasty.pod) == [])
    hasty.agent.counts({FREED: 1})


def test_nic_in_whose_namespace_somebody_stands_is_kept(api: ApiServer, hasty: Node) -> None:
    """As long as the pod's sandbox lives, its runtime has to be the one to end it."""
    api.put_pod(POD)
    started(hasty, 1)
    assert hasty.add(network_config(hasty.nic)).status == 0
    with subprocess.Popen(("nsenter", f"--net={hasty.pod}", "sleep", "1000")) as sandbox:
        until(lambda: os.readlink(f"/proc/{sandbox.pid}/exe").endswith("sleep"))
        api.delete_pod(POD)
        until(lambda: f"process {sandbox.pid} works with it" in hasty.agent.log)
        assert macvtaps(hasty.pod) == ["net1"]
        sandbox.kill()
    until(lambda: macvtaps(hasty.pod) == [])


def test_nothing_is_freed_that_the_api_server_still_has(api: ApiServer, hasty: Node) -> None:
    """An agent with another node's name sees none of its pods, and frees none of their NICs."""
    hasty.agent.options = (*hasty.agent.options, "--node-name", "node-2")
    api.put_pod(POD)
    started(hasty, 0)
    assert hasty.add(network_config(hasty.nic, mac=MAC)).status == 0
    until(lambda: api.calls()["get"] >= 4)
    assert macvtaps(hasty.pod) == ["net1"]


def test_nothing_is_freed_without_the_api_servers_word(api: ApiServer, hasty: Node) -> None:
    """A pod that the watch has lost is only gone when the API server answers that it is."""
    api.put_pod(POD)
    started(hasty, 1)
    assert hasty.add(network_config(hasty.nic)).status == 0
    api.fail("get", status=500)
    api.delete_pod(POD)
    until(lambda: api.calls()["get"] >= 3)
    assert macvtaps(hasty.pod) == ["net1"]
    assert hasty.agent.log.count("API server, look-up of pods that are gone: server") == 1
    api.behave()
    until(lambda: macvtaps(hasty.pod) == [])


def test_defect_does_not_end_the_search(
    api: ApiServer,
    worker: Node,
    metrics: Metrics,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What we fail to see or free is tried again, and what comes after it is freed meanwhile."""
    started(worker, 0)
    config = network_config(worker.nic)
    for ifname in ("net1", "net2"):
        assert worker.add(config, IFNAME=ifname).status == 0
    ledger = Ledger(worker.agent.run_dir)
    user, read = orphans._user, ledger.entries

    def fail_of_net1(entry: Entry) -> int | None:
        if entry.ifname == "net1":
            raise TypeError(entry.ifname)
        return user(entry)

    monkeypatch.setattr(orphans, "_user", fail_of_net1)
    monkeypatch.setattr(ledger, "entries", lambda: read() if sought else 1)
    sought: list[int] = []
    client = Api(api.kubeconfig)
    cache = PodCache(client, NODE, metrics.count_api_failure)
    searching = Orphans(cache, ledger, metrics, host_process=None, seconds=0.2)
    for thread in (cache, searching):
        thread.start()
    until(lambda: "look-up of pods that are gone: internal: TypeError" in caplog.text)
    sought.append(1)
    until(lambda: macvtaps(worker.pod) == ["net1"])
    until(lambda: "is gone, is kept: TypeError: net1" in caplog.text)
    monkeypatch.setattr(orphans, "_user", user)
    until(lambda: macvtaps(worker.pod) == [])
    cache.stop()
    searching.stop()
    searching.join(30)
    cache._thread.join(30)
    client.close()
    # Sockets that the kernel takes its time to close (kernel.silence).
    until(lambda: "netfilter close" not in {it.name for it in threading.enumerate()})


# Its start.


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--kubernetes",), "need --node-name, or NODE_NAME"),
        (
            ("--kubernetes", "--node-name", NODE),
            "this pod's service account does not say where the API server is",
        ),
        (("--kubeconfig", "/nope", "--node-name", NODE), "/nope does not say where"),
        (("--kubeconfig", "/dev/null", "--node-name", NODE), "/dev/null does not say where"),
    ],
    ids=["no node", "no pod", "no file", "empty"],
)
def test_agent_says_what_it_lacks(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], said: str
) -> None:
    """Without a cluster's address or the node's name, the agent says so and touches nothing."""
    for variable in ("NODE_NAME", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(variable, raising=False)
    done = subprocess.run(
        (executable("extbridge"), "agent", "--run-dir", str(run_dir), *options),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not run_dir.exists()


def test_kubernetes_is_imported_only_where_it_is_asked_for(
    worker: Node, cni: Cni, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`extbridge-cni` and an agent without a cluster take no memory or time for its libraries."""
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    libraries = ("kubernetes", "urllib3", "grpc", "yaml")

    def imported(log: str) -> set[str]:
        names = (line.rpartition("|")[2].strip() for line in log.splitlines() if "|" in line)
        return {name.partition(".")[0] for name in names} & set(libraries)

    assert imported(cni("STATUS", network_config(worker.nic)).stderr) == set()
    plain = Agent(worker.agent.run_dir, worker.networks_dir / "plain.log")
    with plain.start():
        assert worker.add(network_config(worker.nic)).status == 0
        assert imported(plain.log) == set()
    assert "extbridge.node" in plain.log
    started(worker, 0)
    assert {"kubernetes", "urllib3"} <= imported(worker.agent.log)
    assert "grpc" not in imported(worker.agent.log)
