"""Pages that are made of the code say what it does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from extbridge.spec.errors import CniError, TryAgainLater
from tools.docs import PAGES, ROOT

KINDS: list[type[CniError]] = [*CniError.__subclasses__(), *TryAgainLater.__subclasses__()]


@pytest.mark.parametrize("page", PAGES)
def test_page_is_up_to_date(page: str) -> None:
    """What the pages say is what this version does."""
    assert Path(ROOT, page).read_text(encoding="utf-8") == PAGES[page](), "run `make docs`"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_error_leads_to_its_section(kind: type[CniError]) -> None:
    """Whatever error a person meets, its details lead to a section that says what to do."""
    told = str(kind("it broke", "mend it").to_json("1.1.0")["details"])
    assert told.startswith("mend it (errors.md#")
    page = Path(ROOT, "docs/errors.md").read_text(encoding="utf-8")
    sections = {slug(title): text for title, text in re.findall(r"## (.*)\n\n([^#]*)", page)}
    section = sections[told.partition("#")[2].removesuffix(")")]
    assert section.startswith(f"Code {kind.code}. ")
    assert "**What to do:** " in section


def slug(title: str) -> str:
    """The anchor that forges make of a heading."""
    return re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-")
