"""What the samples say: medians, what the project set itself for them, a table, and JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import median, quantiles

from rich.console import Console
from rich.table import Table

from tests.bench.figures import FEW, LISTED, MANY, STEPS, Samples
from tests.bench.stage import PODS_OF_A_NODE


@dataclass(frozen=True, slots=True)
class Target:
    """What a figure is to be: at most, or at least, `bound`."""

    what: str
    figure: float
    relation: str
    bound: float
    unit: str = ""

    @property
    def met(self) -> bool:
        """Whether it is."""
        return self.figure <= self.bound if self.relation == "≤" else self.figure >= self.bound


def targets(samples: Samples) -> list[Target]:
    """What was set for speed and size, and what came out."""
    figures = {name: median(taken) for name, taken in samples.items()}
    floors = figures["/bin/true"] + figures["ADD kernel"] + figures["silence kernel"]
    all_off = samples["ADD extbridge, all off"]
    pods = PODS_OF_A_NODE
    memory, fds = samples["agent RSS, KiB"], samples["agent fds"]
    return [
        Target(
            "ADD, of macvlan's (pairs)",
            _paired(samples["ADD extbridge"], samples["ADD macvlan"]), "≤", 0.8,
        ),
        Target(
            "ADD, antispoof off, of macvlan's (pairs)",
            _paired(all_off, samples["ADD macvlan"]), "≤", 0.7,
        ),
        Target("… and above its floors", median(all_off) - floors, "≤", 1.0, "ms"),
        Target(
            "DEL, above the kernel's own",
            figures["DEL extbridge"] - figures["DEL kernel"], "≤", 2.0, "ms",
        ),
        Target(
            f"{pods} ADDs at once, antispoof off, times as fast as macvlan's",
            figures[f"{pods} ADDs at once macvlan"]
            / figures[f"{pods} ADDs at once extbridge, all off"],
            "≥", 2.0,
        ),
        Target(
            f"{pods} DELs at once, times as fast as one by one",
            figures[f"{pods} DELs one by one extbridge"]
            / figures[f"{pods} DELs at once extbridge"],
            "≥", 4.0,
        ),
        Target("hand-off", figures["hand-off, client.take_taps"], "≤", 1.0, "ms"),
        Target(
            f"ADD among {MANY} attachments, of that among {FEW}",
            figures[f"ADD extbridge among {MANY}"] / figures[f"ADD extbridge among {FEW}"],
            "≤", 1.3,
        ),
        Target(
            f"extbridge list, {LISTED} attachments", figures["extbridge list"], "≤", 500.0, "ms"
        ),
        Target("extbridge --help", figures["extbridge --help"], "≤", 200.0, "ms"),
        Target("agent's start", figures["agent's start"], "≤", 1000.0, "ms"),
        Target("Allocate, of the device plugin", figures["Allocate"], "≤", 2.0, "ms"),
        Target("agent's memory (RSS)", max(memory) / 1024, "≤", 48.0, "MiB"),
        Target("… and its growth", (max(memory) - min(memory)) / 1024, "≤", 2.0, "MiB"),
        Target("… and that of its open files", fds[-1] - fds[0], "≤", 0.0),
        Target(
            "ADD with Kubernetes and device plugins, of that without (pairs)",
            _paired(samples["ADD extbridge, everything on"], samples["ADD extbridge beside it"]),
            "≤", 1.2,
        ),
        Target(
            "agent's start, with both", figures["agent's start, everything on"],
            "≤", 3000.0, "ms",
        ),
        Target(
            f"agent's memory (RSS), with both and {pods} pods",
            max(samples["agent RSS, everything on, KiB"]) / 1024, "≤", 110.0, "MiB",
        ),
    ]  # fmt: skip


def as_json(samples: Samples, conditions: Mapping[str, object]) -> dict[str, object]:
    """All of it for a machine: the samples too, so that anything else can be made of them."""
    return {
        "conditions": conditions,
        "targets": [
            {
                "what": it.what,
                "figure": round(it.figure, 3),
                "relation": it.relation,
                "bound": it.bound,
                "unit": it.unit,
                "met": it.met,
            }
            for it in targets(samples)
        ],
        "figures": {
            name: {
                "median": round(median(taken), 3),
                "runs": len(taken),
                "samples": [round(it, 3) for it in taken],
            }
            for name, taken in samples.items()
        },
    }


def show(console: Console, samples: Samples) -> None:
    """The same for people."""
    figures = Table("figure", "runs", "median", "10th", "90th", title="Figures (ms)")
    for name, taken in samples.items():
        tenths = quantiles(taken, n=10, method="inclusive") if len(taken) > 1 else taken
        figures.add_row(
            name, str(len(taken)), *(f"{it:.2f}" for it in (median(taken), tenths[0], tenths[-1]))
        )
    shares = Table("part", "ms", "%", title="Where an ADD's time goes (medians)")
    whole = median(samples["ADD extbridge"])
    for name, took in _parts(samples):
        shares.add_row(name, f"{took:.2f}", f"{took / whole:.0%}")
    goals = Table("target", "is", "is to be", "", title="Targets")
    for it in targets(samples):
        goals.add_row(
            it.what,
            f"{it.figure:.2f} {it.unit}",
            f"{it.relation} {it.bound:g} {it.unit}",
            "met" if it.met else "[bold]missed[/bold]",
        )
    for table in (figures, shares, goals):
        for column in table.columns[1:]:
            column.justify = "right"
        console.print(table)


def _parts(samples: Samples) -> Iterator[tuple[str, float]]:
    shim, verb = median(samples["shim alone (VERSION)"]), median(samples["verb ADD"])
    whole = median(samples["ADD extbridge"])
    yield "shim: started, read, written, ended", shim
    yield "to the agent, into its thread, and back", whole - shim - verb
    for name in (*STEPS, "the rest of the verb"):
        yield name, median(samples[f"step: {name}"])
    yield "the whole", whole


def _paired(ours: list[float], theirs: list[float]) -> float:
    """The median of the ratios of those taken in the same turn."""
    return median(our / their for our, their in zip(ours, theirs, strict=True))
