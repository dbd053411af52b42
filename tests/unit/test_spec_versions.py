"""Which verb is served in which version of the CNI specification."""

from __future__ import annotations

import pytest

from extbridge.spec import versions
from extbridge.spec.errors import IncompatibleVersion

SERVED = {
    "0.1.0": {"DEL"},
    "0.2.0": {"DEL"},
    "0.3.0": {"ADD", "DEL"},
    "0.3.1": {"ADD", "DEL"},
    "0.4.0": {"ADD", "DEL", "CHECK"},
    "1.0.0": {"ADD", "DEL", "CHECK"},
    "1.1.0": {"ADD", "DEL", "CHECK", "GC", "STATUS"},
}


@pytest.mark.parametrize("cni_version", SERVED)
@pytest.mark.parametrize("verb", ["ADD", "DEL", "CHECK", "GC", "STATUS"])
def test_verb_is_served_in_the_versions_that_have_it(verb: str, cni_version: str) -> None:
    """Each verb works from the version that introduced it, and is refused with code 1 before."""
    if verb in SERVED[cni_version]:
        versions.check_version(verb, cni_version)
        return
    with pytest.raises(IncompatibleVersion, match=f"^cniVersion {cni_version}") as caught:
        versions.check_version(verb, cni_version)
    assert caught.value.code == 1
    assert caught.value.hint


@pytest.mark.parametrize("verb", ["ADD", "DEL", "CHECK", "GC", "STATUS"])
@pytest.mark.parametrize("cni_version", ["1.2.0", "1.1", "v1.1.0", "1.1.0 ", "x" * 10_000])
def test_unknown_version_is_answered_with_the_supported(verb: str, cni_version: str) -> None:
    """A version that we do not speak is refused with the list of those that we do."""
    with pytest.raises(IncompatibleVersion) as caught:
        versions.check_version(verb, cni_version)
    assert caught.value.hint == "supported: 0.3.0, 0.3.1, 0.4.0, 1.0.0, 1.1.0"
    assert len(caught.value.message) < 100


def test_refusal_for_want_of_a_version_says_so() -> None:
    """Who left cniVersion out learns that this means 0.1.0."""
    with pytest.raises(IncompatibleVersion, match=r"without cniVersion means 0\.1\.0"):
        versions.check_version("ADD", versions.IMPLIED)


@pytest.mark.parametrize("older", range(len(versions.KNOWN)))
@pytest.mark.parametrize("newer", range(len(versions.KNOWN)))
def test_versions_are_compared_by_age(newer: int, older: int) -> None:
    """A version is at least another exactly if it is the same or came later."""
    known = versions.KNOWN
    assert versions.is_at_least(known[newer], known[older]) == (newer >= older)
