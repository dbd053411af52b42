"""What a pod's bandwidth comes to: the runtime's, its annotations' and the network's word."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extbridge.network.bandwidth import pods_bandwidth
from extbridge.network.definition import Bandwidth
from extbridge.spec.errors import InvalidNetworkConfig

INGRESS = "kubernetes.io/ingress-bandwidth"
EGRESS = "kubernetes.io/egress-bandwidth"
NETWORK = Bandwidth(1000, 2000, 3000, 4000)


@pytest.mark.parametrize(
    ("runtime", "annotations", "expected"),
    [
        ({}, {}, NETWORK),
        ({"ingressRate": 8, "ingressBurst": 9}, {}, Bandwidth(8, 9, 3000, 4000)),
        # As containerd writes a pod's ingress annotation.
        (
            {"IngressRate": 8, "IngressBurst": 4294967295, "EgressRate": 0, "EgressBurst": 0},
            {},
            Bandwidth(8, None, 3000, 4000),
        ),
        ({"EgressRate": 4294967295}, {}, NETWORK),
        ({"egressRate": 8, "egressBurst": 0}, {EGRESS: "1M"}, Bandwidth(1000, 2000, 8, None)),
        ({}, {EGRESS: "1M"}, Bandwidth(1000, 2000, 1_000_000, None)),
        ({}, {INGRESS: "1M", EGRESS: ""}, Bandwidth(1_000_000, None, 3000, 4000)),
        ({"other": "x"}, {"other": "x"}, NETWORK),
    ],
)
def test_each_direction_has_the_first_limit_that_is_given(
    runtime: dict[str, Any], annotations: dict[str, Any], expected: Bandwidth
) -> None:
    """The runtime's limit comes before the annotation's, and that before the network's."""
    assert pods_bandwidth(runtime, annotations, NETWORK) == expected


def test_no_limit_is_none() -> None:
    """A NIC that nobody limits has no limit at all, not one of nothing."""
    assert pods_bandwidth({"ingressRate": 0}, {}, None) is None
    assert pods_bandwidth({}, {}, Bandwidth()) is None


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("1000", 1000),
        ("1k", 1000),
        ("10M", 10_000_000),
        (" 1.5G ", 1_500_000_000),
        (".5M", 500_000),
        ("1Gi", 1 << 30),
        ("+2e6", 2_000_000),
        ("2E3", 2000),
        ("2000000m", 2000),
        ("1P", 10**15),
        ("0.001E", 10**15),
    ],
)
def test_annotation_is_a_kubernetes_quantity(text: str, rate: int) -> None:
    """Each form that Kubernetes takes means what it means there."""
    assert pods_bandwidth({}, {INGRESS: text}, None) == Bandwidth(rate, None, None, None)


@pytest.mark.parametrize(
    "text", ["0", "999", "1.1P", "-1M", "10Mb", "10 M", "M", ".", "1e99", "1K", "fast", "٣M", "1ki"]
)
def test_annotation_that_is_no_rate_is_named(text: str) -> None:
    """What is no rate from 1k to 1P is refused with the annotation's name and an example."""
    with pytest.raises(InvalidNetworkConfig, match=rf"^{EGRESS} is the string") as caught:
        pods_bandwidth({}, {EGRESS: text}, None)
    assert "such as 10M" in caught.value.hint


@pytest.mark.parametrize(
    "runtime",
    [{"ingressRate": -1}, {"IngressRate": 1, "INGRESSBURST": 1 << 40}, {"egressRate": "1"}],
)
def test_runtime_that_says_no_rate_is_named(runtime: dict[str, Any]) -> None:
    """A number out of range, or none, is refused by its field."""
    with pytest.raises(InvalidNetworkConfig, match=r"^runtimeConfig\.bandwidth\."):
        pods_bandwidth(runtime, {}, None)


@given(text=st.text(max_size=50))
def test_any_annotation_is_a_rate_or_an_error(text: str) -> None:
    """Whatever a pod writes, the answer is a limit or a sentence."""
    try:
        limits = pods_bandwidth({}, {INGRESS: text}, None)
    except InvalidNetworkConfig:
        return
    assert limits is None or limits.ingress_rate is not None
