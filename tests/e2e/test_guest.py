"""The guest that other tests boot is itself worth trusting."""

from __future__ import annotations

import pytest

from extbridge.demo.guest import Guest, GuestFailure
from extbridge.demo.lab import Lab, run

pytestmark = pytest.mark.guest


def test_guest_has_the_nic_it_was_given_and_runs_commands(lab: Lab, guest: type[Guest]) -> None:
    """A guest boots, sees its NIC with its MAC up, and answers commands with output and status."""
    nic = lab.nic()
    run("ip", "link", "add", "link", nic.name, "name", "macvtap0", "address", "52:54:00:00:00:01",
        "type", "macvtap", "mode", "vepa")  # fmt: skip
    run("ip", "link", "set", "macvtap0", "up")
    launcher = ("sh", "-c", 'exec "$@" 3<>"/dev/tap$(cat /sys/class/net/macvtap0/ifindex)"', "sh")
    options = ("-netdev", "tap,id=n,fd=3",
               "-device", "virtio-net-pci,netdev=n,mac=52:54:00:00:00:01")  # fmt: skip
    with guest("a", launcher, options=options, addresses=["10.9.0.1/24"]) as booted:
        booted.wait_ready()
        nic_in_guest = booted.run("ip address show eth0")
        failed = booted.run("echo said; false")
    assert "52:54:00:00:00:01" in nic_in_guest.output
    assert "10.9.0.1/24" in nic_in_guest.output
    assert (failed.status, failed.output) == (1, "said\n")


def test_guest_that_dies_says_why(guest: type[Guest]) -> None:
    """What QEMU complained of is in the error, not lost."""
    with (
        guest("a", (), options=("-device", "no-such-device")) as dead,
        pytest.raises(GuestFailure, match="no-such-device"),
    ):
        dead.wait_ready()
