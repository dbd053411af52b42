"""A runtime that hangs, or a request that has to wait, is no other runtime's affair."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from extbridge.demo.lab import Lab, Nic
from extbridge.ledger import Ledger
from extbridge.node.agent import CNI_THREADS
from tests.kernel.agents import Agent, answer_on, ask, connected, until
from tests.kernel.observe import network_config
from tests.support import Cni


def test_add_that_waits_keeps_nobody(agent: Agent, shim: Cni, nic: Nic, lab: Lab) -> None:
    """While the ADD of one pod waits for its container's ledger, another pod gets its NIC."""
    config = network_config(nic)
    pod, other = lab.pod("one"), lab.pod("other")
    with connected(agent.run_dir / "cni.sock") as waiting:
        with Ledger(agent.run_dir).hold("container-1"):
            ask(waiting, shim.environment("ADD", NETNS=pod), config, netns=pod)
            # Blocked on a flock (man 5 proc, locks).
            until(
                lambda: f"-> FLOCK  ADVISORY  WRITE {agent.pid} " in Path("/proc/locks").read_text()
            )
            assert shim("ADD", config, NETNS=other, CONTAINERID="container-2").status == 0
        assert answer_on(waiting).status == 0


def test_silent_callers_keep_nobody(agent: Agent, shim: Cni, nic: Nic, pod: str) -> None:
    """More callers than the agent has threads connect and say nothing; a runtime is answered."""
    with ExitStack() as silent:
        for _ in range(CNI_THREADS + 1):
            silent.enter_context(connected(agent.run_dir / "cni.sock"))
        assert shim("ADD", network_config(nic), NETNS=pod).status == 0
