"""Dashboard and alerts work with the metrics that there are."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.support import missing
from tools.docs import ALERTS, ROOT, metrics

FOLDER = ROOT / "deploy/monitoring"
DASHBOARD = json.loads((FOLDER / "dashboard.json").read_text(encoding="utf-8"))
RULES = [
    rule
    for group in yaml.safe_load((ROOT / ALERTS).read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]
]
SERIES = {
    name + suffix: set(labels)
    for name, kind, labels, _ in metrics()
    for suffix in (("_bucket", "_sum", "_count") if kind == "histogram" else ("",))
}


def test_alerts_hold_before_promtool() -> None:
    """Prometheus takes the rules as they are."""
    promtool("check", "rules", "--lint-fatal", "alerts.yaml")


def test_alerts_fire_when_they_should() -> None:
    """Each alert fires for its reason, and none for what passes by itself."""
    promtool("test", "rules", "alerts-test.yaml")
    tried = yaml.safe_load((FOLDER / "alerts-test.yaml").read_text(encoding="utf-8"))["tests"]
    cases = [case for test in tried for case in test["alert_rule_test"]]
    for fires in (True, False):
        named = {case["alertname"] for case in cases if ("exp_alerts" in case) == fires}
        assert named == {rule["alert"] for rule in RULES}


def test_dashboard_holds_before_promtool(tmp_path: Path) -> None:
    """Every query of the dashboard is one that Prometheus understands."""
    rules = [
        {"record": f"panel{n}", "expr": expression}
        for n, (_, expression) in enumerate(dashboard_queries())
    ]
    assert len(rules) >= len(DASHBOARD["panels"])
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    promtool("check", "rules", str(file))


def test_dashboard_has_a_place_for_each_panel() -> None:
    """No panel of the dashboard covers another."""
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert all(x < 24 for x, _ in cells), panel["title"]
        assert not taken & cells, panel["title"]
        taken |= cells


def test_all_that_is_asked_for_is_there() -> None:
    """Dashboard and alerts ask for metrics, and labels, that the agent has."""
    asked = [*dashboard_queries(), *((rule["alert"], rule["expr"]) for rule in RULES)]
    asked.append(("node", DASHBOARD["templating"]["list"][1]["query"]["query"]))
    for where, expression in asked:
        found = re.findall(r"(extbridge_\w+)(?:\{([^}]*)\})?", expression)
        assert found or expression.startswith("up{"), where
        labels = {"instance", "le"}
        for name, selected in found:
            assert name in SERIES, f"{where}: {name}"
            labels |= SERIES[name]
            assert set(re.findall(r"(\w+)[=!]", selected)) <= SERIES[name] | {"instance"}, where
        for grouped in re.findall(r"by \(([^)]*)\)", expression):
            assert set(grouped.split(", ")) <= labels, where


def dashboard_queries() -> Iterator[tuple[str, str]]:
    """Title and query, with what Grafana puts in."""
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            expression = target["expr"].replace("$__rate_interval", "1m").replace("$node", ".*")
            assert "$" not in expression
            yield panel["title"], expression


def promtool(*arguments: str) -> None:
    """Run it in the folder of the alerts; it has to be content."""
    # `make setup` puts it beside the interpreter.
    path = f"{ROOT / '.venv/bin'}:{os.environ['PATH']}"
    program = shutil.which("promtool", path=path)
    if program is None:
        missing("the program promtool")
    done = subprocess.run(
        (program, *arguments), cwd=FOLDER, check=False, capture_output=True, text=True
    )
    if done.returncode != 0:
        pytest.fail(f"{done.stdout}\n{done.stderr}", pytrace=False)
