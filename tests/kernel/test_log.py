"""The agent's log says what was done, for whom, how long it took, and nothing that is a secret."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from extbridge.demo.lab import Nic
from tests.kernel.agents import Agent, Launcher, until
from tests.kernel.observe import network_config
from tests.support import Cni

BUCKETS = {"ingressRate": 10**7, "ingressBurst": 10**6, "egressRate": 10**7, "egressBurst": 10**6}
NOWHERE = {"extbridge": {"dev": "nope"}}
REQUEST = re.compile(r" \(errors\.md#([a-z-]+), request ([0-9a-f]{8})\)$")


@pytest.fixture
def told(agent: Agent) -> Agent:
    """The agent, with a log of JSON."""
    agent.stop()
    agent.options = ("--log-format", "json")
    return agent.start()


def test_an_add_is_one_line_with_its_steps(told: Agent, shim: Cni, nic: Nic, pod: str) -> None:
    """One line an attachment says how long each step took, of a part of all of it."""
    config = network_config(nic, bandwidth=BUCKETS)
    assert shim("ADD", config, NETNS=pod).status == 0
    (added,) = lines_of(told, verb="ADD")
    steps = {key: ms for key, ms in added.items() if key.endswith("_ms")}
    assert list(steps) == [
        f"{step}_ms" for step in ("turn", "validate", "namespace", "link", "rules", "shaping", "up")
    ]
    assert 0 < sum(steps.values()) < added["ms"] + 0.01 * len(steps)
    assert (added["networks"], added["nics"], added["ifname"]) == ("vepanet", nic.name, "net1")
    assert shim("DEL", config, NETNS=pod).status == 0
    assert len(lines_of(told, verb="DEL")) == 1


def test_what_the_runtime_is_told_leads_to_the_log(
    told: Agent, shim: Cni, nic: Nic, pod: str
) -> None:
    """An error's ID, which kubelet shows, stands in one line of the log, with all that it knows."""
    assert shim("ADD", network_config(nic), NETNS=pod).status == 0
    seen = set()
    for kind, code, container, config in (
        ("invalid-network-config", 7, "c2", network_config(nic, **NOWHERE)),
        ("name-taken", 103, "container-1", network_config(nic)),
        ("name-taken", 103, "container-1", network_config(nic)),
    ):
        answer = shim("ADD", config, NETNS=pod, CONTAINERID=container)
        found = REQUEST.search(str(answer.error["details"]))
        assert found is not None
        assert found[1] == kind
        (line,) = lines_of(told, request=found[2])
        assert (line["code"], line["container"], line["level"]) == (code, container, "warning")
        assert line["failed_ms"] >= 0
        seen.add(found[2])
    assert len(seen) == 3


def test_a_launcher_is_told_where_to_read_more(agent: Agent, pod: str) -> None:
    """A VM's container that gets no tap says where the reason is explained."""
    assert "(errors.md#unknown-container)" in Launcher(agent.run_dir).refusal(pod)


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_log_has_no_secret(shim: Cni, nic: Nic, pod: str, tmp_path: Path, log_format: str) -> None:
    """What came with CNI_ARGS, annotations and prevResult is not in the log, however ADD goes."""
    (tmp_path / "blue.json").write_text(json.dumps({"extbridge": {"dev": nic.name}}))
    secret = "hush-hush"  # noqa: S105 - that is what must not come out
    annotations = {"example.com/token": secret, "extbridge.io/networks": "blue"}
    config: dict[str, object] = {
        "cniVersion": "1.1.0",
        "name": "cluster",
        "type": "extbridge",
        "networksDir": str(tmp_path),
        "capabilities": {"io.kubernetes.cri.pod-annotations": True},
        "runtimeConfig": {"io.kubernetes.cri.pod-annotations": annotations},
        "args": {"cni": {"token": secret}},
        "prevResult": {
            "cniVersion": "1.1.0",
            "interfaces": [{"name": "net1", "sandbox": pod, "token": secret}],
            "dns": {"domain": secret},
        },
    }
    args = f"IgnoreUnknown=1;K8S_POD_NAMESPACE=prod;K8S_POD_NAME=vm-a;TOKEN={secret}"
    with Agent(shim.run_dir, tmp_path / "log", "--log-format", log_format).start() as agent:
        assert shim("ADD", config, NETNS=pod, ARGS=args).result["dns"] == {"domain": secret}
        assert shim("ADD", config, NETNS=pod, ARGS=args).error["code"] == 103
        (tmp_path / "blue.json").unlink()
        assert shim("ADD", config, NETNS=pod, ARGS=args, CONTAINERID="c2").error["code"] == 7
        assert shim("CHECK", config, NETNS=pod, ARGS=args).error["code"] == 106
        assert shim("DEL", config, NETNS=pod, ARGS=args).status == 0
        until(lambda: "DEL" in agent.log)
        assert "networks" in agent.log
        assert secret not in agent.log


def test_bad_input_is_one_line(agent: Agent, shim: Cni, nic: Nic, pod: str) -> None:
    """Whatever comes, the log has a line for it: none is forged, and none is a traceback."""
    before = len(agent.log.splitlines())
    forged = "c\ninfo: ADD container=other"
    bad: list[tuple[str, dict[str, object] | bytes, dict[str, str]]] = [
        ("ADD", network_config(nic), {"CONTAINERID": forged}),
        ("ADD", network_config(nic), {"IFNAME": "a b=c\x1b[2J"}),
        ("ADD", b'{"name": ', {}),
        ("ADD", network_config(nic, mtuu=1), {}),
        ("ADD", network_config(nic, mtu="\n\n"), {}),
        ("NONSENSE", network_config(nic), {}),
    ]
    for verb, config, variables in bad:
        assert shim(verb, config, NETNS=pod, **variables).status == 1
    until(lambda: len(agent.log.splitlines()) >= before + len(bad))
    lines = agent.log.splitlines()[before:]
    assert len(lines) == len(bad)
    assert all(line.startswith("warning: ") and line.isprintable() for line in lines)
    assert r'container="c\ninfo: ADD container=other"' in lines[0]


def lines_of(agent: Agent, *, verb: str = "", request: str = "") -> list[dict[str, Any]]:
    """The lines about this verb's success, or this request, once there is one."""

    def found() -> list[dict[str, Any]]:
        parsed = [json.loads(line) for line in agent.log.splitlines() if line.startswith("{")]
        if verb:
            return [line for line in parsed if line["message"] == verb]
        return [line for line in parsed if line.get("request") == request]

    return until(found)
