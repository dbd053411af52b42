"""Which versions of the CNI specification we speak, and what each of them can say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from extbridge.spec.errors import IncompatibleVersion
from extbridge.spec.fields import describe

SUPPORTED: Final = ("0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
NEWEST: Final = SUPPORTED[-1]

IMPLIED: Final = "0.1.0"
"""What a configuration without cniVersion means (libcni's version.ParseVersion)."""

KNOWN: Final = (IMPLIED, "0.2.0", *SUPPORTED)
"""Every version of the specification, oldest first. A result of the two that we do not support has
no list of interfaces and needs an IP address, so what we make cannot be said there."""

_INTRODUCED_IN: Final = {"CHECK": "0.4.0", "GC": "1.1.0", "STATUS": "1.1.0"}


def is_at_least(cni_version: str, other: str) -> bool:
    """Whether cni_version is other or newer; both are known versions."""
    return KNOWN.index(cni_version) >= KNOWN.index(other)


def check_version(verb: str, cni_version: str) -> None:
    """Raise IncompatibleVersion if a request with this CNI_COMMAND has no meaning in cni_version.

    DEL is served in the two oldest versions too: it has no result that they could not express, and
    what is there has to go.
    """
    if cni_version not in KNOWN:
        raise IncompatibleVersion(f"cniVersion is {describe(cni_version)}", _supported())
    if verb == "ADD" and cni_version not in SUPPORTED:
        raise IncompatibleVersion(
            f"cniVersion {cni_version} cannot express a result without an IP address",
            f"{_supported()}; a configuration without cniVersion means {IMPLIED}",
        )
    introduced = _INTRODUCED_IN.get(verb, IMPLIED)
    if not is_at_least(cni_version, introduced):
        raise IncompatibleVersion(
            f"cniVersion {cni_version} has no {verb}", f"{verb} exists since {introduced}"
        )


def report_versions(cni_version: str) -> Mapping[str, object]:
    """VERSION's answer to a caller that speaks cni_version (SPEC 1.1.0 section 5, "Version")."""
    return {"cniVersion": cni_version, "supportedVersions": list(SUPPORTED)}


def _supported() -> str:
    return f"supported: {', '.join(SUPPORTED)}"
