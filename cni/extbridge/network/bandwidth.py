"""A pod's bandwidth: what the runtime or its annotations ask for, over what the network has.

CNI's CONVENTIONS.md, "bandwidth"; Kubernetes' annotations `kubernetes.io/ingress-bandwidth` and
`kubernetes.io/egress-bandwidth`.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Final

from extbridge.network.definition import MAX_BURST, MAX_RATE, Bandwidth
from extbridge.spec.errors import InvalidNetworkConfig
from extbridge.spec.fields import JsonObject, describe, field_path, get_int, get_str

INGRESS_ANNOTATION: Final = "kubernetes.io/ingress-bandwidth"
EGRESS_ANNOTATION: Final = "kubernetes.io/egress-bandwidth"

_NO_LIMIT: Final = 0xFFFFFFFF
"""How containerd, whose numbers are of 32 bits, says that there is no limit, or no burst."""

_LEAST_RATE: Final = 1000
_LARGEST_RATE: Final = 10**15
"""1k and 1P bits/s: what Kubernetes allows (validateBandwidthIsReasonable)."""

_QUANTITY = re.compile(
    r"\+?(\d{1,20}(?:\.\d{0,20})?|\.\d{1,20})([eE][+-]?\d{1,2}|[a-zA-Z]{0,2})", re.ASCII
)

_SUFFIXES: Final = {
    "": Fraction(1),
    **{name: Fraction(10) ** (3 * n) for n, name in enumerate(("n", "u", "m"), -3)},
    **{name: Fraction(10) ** (3 * n) for n, name in enumerate(("k", "M", "G", "T", "P", "E"), 1)},
    **{name: Fraction(2) ** (10 * n) for n, name in enumerate(("Ki", "Mi", "Gi", "Ti", "Pi"), 1)},
}
"""Those of a Kubernetes quantity (apimachinery, resource.Quantity)."""


def pods_bandwidth(
    runtime: JsonObject, annotations: JsonObject, network: Bandwidth | None
) -> Bandwidth | None:
    """The limits in force: for each direction the first that is given; None where there is none.

    First comes `runtimeConfig.bandwidth` (`runtime`), its keys in any case, because containerd
    writes Go's; then the annotations; then the network's own. Raises InvalidNetworkConfig.
    """
    where = "runtimeConfig.bandwidth"
    given = {
        key.lower(): get_int(runtime, key, where=where)
        for key in runtime
        if key.lower() in ("ingressrate", "ingressburst", "egressrate", "egressburst")
    }
    fallback = network or Bandwidth()
    ingress = _first(
        _from_runtime(given, "ingress", where),
        _from_annotation(annotations, INGRESS_ANNOTATION),
        (fallback.ingress_rate, fallback.ingress_burst),
    )
    egress = _first(
        _from_runtime(given, "egress", where),
        _from_annotation(annotations, EGRESS_ANNOTATION),
        (fallback.egress_rate, fallback.egress_burst),
    )
    chosen = Bandwidth(*ingress, *egress)
    return None if chosen == Bandwidth() else chosen


_Limit = tuple[int | None, int | None]


def _first(*limits: _Limit) -> _Limit:
    return next((limit for limit in limits if limit[0] is not None), (None, None))


def _from_runtime(given: dict[str, int | None], direction: str, where: str) -> _Limit:
    rate = given.get(f"{direction}rate") or None
    burst = given.get(f"{direction}burst") or None
    for value, what, most in ((rate, "Rate", MAX_RATE), (burst, "Burst", MAX_BURST)):
        if value is not None and not 0 <= value <= most:
            raise InvalidNetworkConfig(
                f"{field_path(where, direction + what)} is {describe(value)}",
                f"allowed: 0 to {most}",
            )
    if rate is None or rate == _NO_LIMIT:
        return None, None
    return rate, None if burst == _NO_LIMIT else burst


def _from_annotation(annotations: JsonObject, name: str) -> _Limit:
    text = get_str(annotations, name)
    if not text:
        return None, None
    found = _QUANTITY.fullmatch(text.strip())
    number, suffix = found.groups() if found else ("", "?")
    if suffix[:1] in ("e", "E") and suffix[1:]:
        factor: Fraction | None = Fraction(10) ** int(suffix[1:])
    else:
        factor = _SUFFIXES.get(suffix)
    rate = -1 if factor is None else int(Fraction(number) * factor)
    if not _LEAST_RATE <= rate <= _LARGEST_RATE:
        raise InvalidNetworkConfig(
            f"{name} is {describe(text)}",
            "it has to be bits per second as a quantity from 1k to 1P, such as 10M",
        )
    return rate, None
