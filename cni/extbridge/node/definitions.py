"""The folder of definitions as a whole: which networks the node has, and which are broken."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from extbridge.network.definition import Network
from extbridge.network.store import list_networks, load_network
from extbridge.spec.errors import CniError

log = logging.getLogger(__name__)


def read_networks(directory: str) -> tuple[Mapping[str, Network], Mapping[str, CniError]]:
    """The networks that the folder defines, and what is wrong with those that cannot be read.

    One that is broken does not keep the others. Raises OSError if the folder itself is.
    """
    networks, broken = {}, {}
    for name in list_networks(directory):
        try:
            networks[name] = load_network(name, directory)
        except CniError as error:
            broken[name] = error
    return networks, broken


def report_networks(directory: str) -> None:
    """Say which definitions are good; each request reads them anew, so nothing else is due."""
    try:
        networks, broken = read_networks(directory)
    except OSError as error:
        log.error("networks: %s", error)  # noqa: TRY400 - the user's, no defect
        return
    for name, fault in broken.items():
        log.error("network %s: %s", name, fault)
    for name in networks:
        log.info("network %s is defined", name)
