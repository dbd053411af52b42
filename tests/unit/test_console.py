"""Tables fit the width there is, and lose nothing that a person would look for next."""

from __future__ import annotations

from typing import Any

import pytest

from extbridge import console

HELD: dict[str, Any] = {
    "pod": "shop/till",
    "container": "c0ffee0123456789",
    "interface": "net1",
    "state": "in use",
    "network": "vepanet",
    "mode": "vepa",
    "nic": "eth1",
    "mac": "52:54:00:00:00:05",
    "ips": ["192.0.2.5/24", "2001:db8::5/64"],
    "mtu": 1500,
    "queues": 4,
    "antispoof": "ip",
    "bandwidth": {
        "ingress_rate": 10**7, "ingress_burst": 10**6, "egress_rate": None, "egress_burst": None,
    },
    "holder": {"pid": 4711, "command": "qemu-system-x86_64", "since": "2026-01-02T03:04:05+00:00"},
    "counters": {"rx_frames": 12, "rx_octets": 1234567, "tx_frames": 7, "tx_octets": 890},
    "drops": {"source": 2, "checksum": 1},
}  # fmt: skip
FREE = {
    **HELD, "pod": "", "interface": "macvtap0", "state": "no carrier", "network": "storage",
    "mode": "passthru", "nic": "ens1f0", "mac": "52:54:00:00:00:06", "ips": [], "antispoof": "off",
    "bandwidth": None, "holder": None, "drops": {},
}  # fmt: skip
LONG = {
    **FREE, "pod": "a-namespace-with-a-long-name/virt-launcher-a-virtual-machine-x7k2p",
    "state": "gone", "counters": None,
}  # fmt: skip


AT_80 = """\
POD        INTERFACE  STATE       NETWORK  NIC     MAC                HELD BY
shop/till  net1       in use      vepanet  eth1    52:54:00:00:00:05  4711 qemu…
…ee012345  macvtap0   no carrier  storage  ens1f0  52:54:00:00:00:06
…ne-x7k2p  macvtap0   gone        storage  ens1f0  52:54:00:00:00:06
"""
AT_160 = """\
POD                                                                 INTERFACE  STATE       \
NETWORK  NIC     MAC                HELD BY
shop/till                                                           net1       in use      \
vepanet  eth1    52:54:00:00:00:05  4711 qemu-system-x86_64
c0ffee012345                                                        macvtap0   no carrier  \
storage  ens1f0  52:54:00:00:00:06
a-namespace-with-a-long-name/virt-launcher-a-virtual-machine-x7k2p  macvtap0   gone        \
storage  ens1f0  52:54:00:00:00:06
"""
WIDE_AT_160 = """\
POD        INTERFACE  STATE       NETWORK  NIC     MAC                HELD BY    ADDRESSES  \
SINCE      MODE       MTU  QUEUES  FILTER  IN/OUT     RX   TX  DROPS
shop/till  net1       in use      vepanet  eth1    52:54:00:00:00:05  4711 qem…  192.0.2.…  \
2026-01-…  vepa      1500       4  ip      10M/-   1.23M  890      3
…ee012345  macvtap0   no carrier  storage  ens1f0  52:54:00:00:00:06                        \
           passthru  1500       4  off             1.23M  890      0
…ne-x7k2p  macvtap0   gone        storage  ens1f0  52:54:00:00:00:06                        \
           passthru  1500       4  off                             0
"""


@pytest.mark.parametrize(
    ("output", "columns", "shown"),
    [("table", 80, AT_80), ("table", 160, AT_160), ("wide", 160, WIDE_AT_160)],
)
def test_tables_fit_the_terminal(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    output: str,
    columns: int,
    shown: str,
) -> None:
    """What has no room gives way, but not what a NIC is found by, and pods keep their ends."""
    monkeypatch.setenv("COLUMNS", str(columns))
    console.print_attachments([HELD, FREE, LONG], output)
    assert capsys.readouterr().out == shown


def test_pipes_get_it_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is cut off for a program, and nothing is coloured."""
    monkeypatch.delenv("COLUMNS", raising=False)
    console.print_attachments([HELD, FREE, LONG], "wide")
    _, held, *_ = capsys.readouterr().out.splitlines()
    assert "192.0.2.5/24,2001:db8::5/64" in held
    assert HELD["holder"]["since"] in held
    assert "\x1b" not in held
