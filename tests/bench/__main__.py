"""`make bench`: what an attachment costs, beside what it could cost.

Nothing is asserted: a slow machine is no defect. Which figures the project wants, and whether it
has them here, stands in the last table.
"""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path

import click
from rich.console import Console

from extbridge.demo.lab import become_node
from tests.bench import figures, report
from tests.bench.stage import Stage

_WARM_UP = 5


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option(
    "--runs", default=200, type=click.IntRange(min=10), help="How often each request is timed."
)
@click.option(
    "--pairs",
    default=1000,
    type=click.IntRange(min=10),
    help="How many ADDs, each with its DEL, the agent's size is watched for.",
)
@click.option("--quick", is_flag=True, help="20 runs, 100 pairs: to see that all works.")
@click.option(
    "--json",
    "file",
    default="bench.json",
    type=click.Path(path_type=Path),
    help="Where all of it is written, with each run.",
)
def bench(runs: int, pairs: int, file: Path, *, quick: bool) -> None:
    """Time ADD, DEL and hand-off in turns with macvlan and the kernel alone; as root."""
    if quick:
        runs, pairs = 20, 100
    console = Console()
    began = time.monotonic()
    conditions: dict[str, object] = {
        "kernel": platform.release(),
        "processors": os.cpu_count(),
        "python": platform.python_version(),
        "runs": runs,
        "ADD/DEL pairs": pairs,
        # Right after a DEL in the same namespace an ADD waits for a grace period of nf_tables.
        "pods": "new to each ADD, or long unused",
        "load before": os.getloadavg(),
    }
    become_node()
    samples = figures.Samples(list)
    with Stage() as stage:
        figures.stand(stage)
        # What is the first of its kind meets cold caches, and is not counted.
        figures.time_requests(stage, figures.Samples(list), _WARM_UP)
        for what, take in (
            ("ADD and DEL, in turns with macvlan's and the kernel's", figures.time_requests),
            ("ADD without an agent", figures.time_in_process),
            ("the agent's start", figures.time_start),
            ("many at once", figures.time_at_once),
            ("hand-off", figures.time_hand_off),
            ("ADD on a full node", figures.time_on_full_node),
            ("with Kubernetes and device plugins", figures.time_with_everything),
        ):
            console.print(f"{time.monotonic() - began:4.0f} s  {what}")
            take(stage, samples, runs)
        console.print(f"{time.monotonic() - began:4.0f} s  the agent's size")
        figures.watch_size(stage, samples, pairs)
    conditions["load after"] = os.getloadavg()
    conditions["seconds"] = round(time.monotonic() - began)
    told = report.as_json(samples, conditions)
    file.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    report.show(console, samples)
    console.print(", ".join(f"{name} {value}" for name, value in conditions.items()))
    console.print(f"all of it, with each run, is in {file}")


if __name__ == "__main__":
    bench()
