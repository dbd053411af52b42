"""What most tests of the kernel layer begin with."""

from __future__ import annotations

import pytest

from extbridge.demo.lab import Lab, Nic


@pytest.fixture
def nic(lab: Lab) -> Nic:
    """The node's NIC, plugged into the switch."""
    return lab.nic()


@pytest.fixture
def pod(lab: Lab) -> str:
    """A pod's namespace, by its path."""
    return lab.pod("vm")
