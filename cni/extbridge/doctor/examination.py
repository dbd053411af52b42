"""All checks, in the order in which a person would make them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from extbridge.doctor.agent import check_agent, check_run_folder, check_spool
from extbridge.doctor.attachments import check_attachments
from extbridge.doctor.features import check_features, check_permissions, check_vhost
from extbridge.doctor.finding import Finding, guarded, warning
from extbridge.doctor.installed import (
    BIN_DIR,
    CONF_DIR,
    DEVICE_PLUGINS,
    check_configurations,
    check_device_plugins,
    check_shim,
)
from extbridge.doctor.networks import check_nics, read_networks
from extbridge.ledger import Ledger
from extbridge.node.install import LAUNCHER
from extbridge.node.sockets import POD_FOLDER


@dataclass(frozen=True, slots=True)
class Places:
    """Where things are; None: where they mostly are, if they are there."""

    run: Path
    networks: str
    bin_dir: Path | None = None
    conf_dir: Path | None = None
    device_plugins: Path | None = None


def examine(places: Places) -> Iterator[Finding]:
    """What there is to say of the node; raises nothing for what is broken on it."""
    networks, findings = read_networks(places.networks)
    limits = any(network.bandwidth is not None for network in networks.values())
    yield from guarded("permissions", check_permissions())
    # Before something is tried, which for a moment would be one macvtap more.
    attachments = list(guarded("ledger", check_attachments(places.run)))
    yield from guarded("kernel", check_features(limits=limits))
    yield from guarded("kernel: vhost-net", check_vhost())
    yield from findings
    yield from guarded("networks", check_nics(networks, Ledger(places.run)))
    yield from guarded("run folder", check_run_folder(places.run))
    yield from guarded("agent", check_agent(places.run))
    yield from guarded("spool", check_spool(places.run))
    yield from attachments
    launcher = places.run / POD_FOLDER / LAUNCHER
    for option, given, default, check in (
        ("--bin-dir", places.bin_dir, BIN_DIR, lambda folder: check_shim(folder, launcher)),
        ("--conf-dir", places.conf_dir, CONF_DIR, check_configurations),
    ):
        yield from guarded(str(given or default), _in_folder(option, given, default, check))
    # The agent offers no devices unless it is told to.
    if places.device_plugins or any(DEVICE_PLUGINS.glob("extbridge-*.sock")):
        folder = places.device_plugins or DEVICE_PLUGINS
        yield from guarded("device plugins", check_device_plugins(folder, networks))


def _in_folder(
    option: str, given: Path | None, default: Path, check: Callable[[Path], Iterator[Finding]]
) -> Iterator[Finding]:
    folder = given or default
    if given is None and not folder.is_dir():
        what = f"there is no {folder}, so nothing was looked at"
        yield warning(option, what, f"name the container runtime's folder with {option}")
        return
    yield from check(folder)
