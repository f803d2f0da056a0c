"""The result of a run: samples, checks against targets, stages and series, kept as JSON."""

import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from tools.benchmarks.measuring import Cost, median

FORMAT: Final = 2
"""1 was a table of medians of the commands of tools/bench/run, before there were targets."""
RESULTS: Final = Path(__file__).with_name("results")


@dataclass
class Samples:
    """All measurements of one program at one step of a row, as figures by name with unit."""

    step: str
    program: str
    figures: list[dict[str, float]] = field(default_factory=list)

    def median(self, name: str) -> float:
        """Median of one figure over the measurements that have it."""
        return median(figures[name] for figures in self.figures if name in figures)


@dataclass(frozen=True)
class Check:
    """One figure against its target. `unit` "x" is a ratio of `ours` to `theirs`.

    With `at_least` the figure must reach the target, otherwise it must not exceed it. A `target`
    of None only tells.
    """

    what: str
    value: float
    unit: str
    target: float | None
    ours: str = ""
    theirs: str = ""
    at_least: bool = False

    @property
    def holds(self) -> bool:
        """Whether the target is reached."""
        if self.target is None:
            return True
        return self.value >= self.target if self.at_least else self.value <= self.target

    @property
    def verdict(self) -> str:
        """For people: "holds" or by how much it misses."""
        if self.target is None:
            return "beside"
        if self.holds:
            return "holds"
        if self.target == 0:
            return "misses"
        if self.at_least:
            return f"misses by {(1 - self.value / self.target) * 100:.0f} %"
        return f"misses by {(self.value / self.target - 1) * 100:.0f} %"


@dataclass
class RowResult:
    """What one row gave. `series`: points (x, y) by name, for plots; `stages` by step.

    `run`: when the run began that measured it, `dm`: the version that was measured; older results
    do not say.
    """

    name: str
    title: str
    seconds: float = 0.0
    runs: int = 0
    samples: list[Samples] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    stages: dict[str, dict[str, float]] = field(default_factory=dict)
    series: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    error: str = ""
    run: str = ""
    dm: str = ""

    def of(self, step: str, program: str) -> Samples:
        """The samples of a program at a step; new ones when there are none."""
        for samples in self.samples:
            if (samples.step, samples.program) == (step, program):
                return samples
        self.samples.append(Samples(step, program))
        return self.samples[-1]

    def add(self, step: str, program: str, cost: Cost) -> None:
        """Keep one measurement and say it; the stages kept are those of the slowest."""
        samples = self.of(step, program)
        slowest_s = max((figures.get("wall_s", 0.0) for figures in samples.figures), default=-1.0)
        if cost.stages and cost.wall_s > slowest_s:
            self.stages[step if program == "dm" else f"{step}, {program}"] = dict(cost.stages)
        samples.figures.append(cost.figures())
        told = ", ".join(
            f"{quantity_of(name)} {with_unit(value, unit_of(name))}"
            for name, value in cost.figures().items()
        )
        print(f"  {step}, {program}: {told}", flush=True)

    def median(self, step: str, program: str, figure: str) -> float:
        """Median of one figure."""
        return self.of(step, program).median(figure)

    def check(
        self,
        what: str,
        value: float,
        unit: str,
        target: float | None,
        *,
        ours: str = "",
        theirs: str = "",
        at_least: bool = False,
    ) -> None:
        """Compare a figure with its target and say how it stands."""
        found = Check(what, value, unit, target, ours, theirs, at_least)
        self.checks.append(found)
        sign = ">=" if at_least else "<="
        aim = "" if target is None else f" ({sign} {with_unit(target, unit)})"
        print(f"  -> {what}: {with_unit(value, unit)}{aim}: {found.verdict}", flush=True)

    def check_ratio(
        self,
        what: str,
        ours: float,
        theirs: float,
        unit: str,
        target: float | None,
        *,
        at_least: bool = False,
    ) -> None:
        """Compare a ratio with its target; `unit` is that of both figures. A figure of 0 to compare
        with counts as 1: JSON knows no infinity."""
        self.check(
            what,
            ours / (theirs or 1.0),
            "x",
            target,
            ours=with_unit(ours, unit),
            theirs=with_unit(theirs, unit),
            at_least=at_least,
        )

    def compare(
        self, step: str, figure: str, other: str, target: float | None, *, ours: str = "dm"
    ) -> None:
        """Check the ratio of two programs' medians of one figure at one step."""
        self.check_ratio(
            f"{step if ours == 'dm' else f'{step}, {ours}'}: {quantity_of(figure)} against {other}",
            self.median(step, ours, figure),
            self.median(step, other, figure),
            unit_of(figure),
            target,
        )


@dataclass
class Result:
    """One run of the comparison, perhaps made in several sittings. `path` is its file."""

    path: Path
    started: str
    machine: dict[str, Any]
    programs: dict[str, str]
    options: dict[str, Any]
    rows: dict[str, RowResult] = field(default_factory=dict)

    def save(self) -> None:
        """Replace the file by what is known now."""
        document = {
            "format": FORMAT,
            "started": self.started,
            "machine": self.machine,
            "programs": self.programs,
            "options": self.options,
            "rows": {name: _plain(row) for name, row in self.rows.items()},
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=self.path.parent, suffix=".new")
        with os.fdopen(handle, "w") as file:
            json.dump(document, file, indent=1)
            file.write("\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, self.path)


def new_result(
    machine: dict[str, Any], programs: dict[str, str], options: dict[str, Any], directory: Path
) -> Result:
    """An empty result in a new file named after this moment."""
    path = directory / f"{time.strftime('%Y-%m-%d-%H%M%S')}.json"
    return Result(path, moment_now(), machine, programs, options)


def moment_now() -> str:
    """The present moment as results tell it."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def load_result(path: Path) -> Result:
    """Read a result back. Raises ValueError for a file of another format."""
    document = json.loads(path.read_text())
    if document.get("format") != FORMAT:
        raise ValueError(f"{path}: not a result of format {FORMAT}")
    rows = {name: _row(value) for name, value in document["rows"].items()}
    return Result(
        path,
        document["started"],
        document["machine"],
        document["programs"],
        document["options"],
        rows,
    )


def _plain(row: RowResult) -> dict[str, Any]:
    """JSON of a row, with verdicts for readers of the file."""
    value = asdict(row)
    for check, plain in zip(row.checks, value["checks"], strict=True):
        plain["verdict"] = check.verdict
    return value


def _row(value: Mapping[str, Any]) -> RowResult:
    found = dict(value)
    found["samples"] = [Samples(**samples) for samples in value["samples"]]
    found["checks"] = [
        Check(**{key: part for key, part in check.items() if key != "verdict"})
        for check in value["checks"]
    ]
    found["series"] = {
        name: [(point[0], point[1]) for point in points] for name, points in value["series"].items()
    }
    return RowResult(**found)


# --- figures for people ----------------------------------------------------------------------

UNITS: Final = ("s", "bytes", "rate")


def unit_of(figure: str) -> str:
    """The unit that a figure's name ends with; counts have none."""
    last = figure.rsplit("_", 1)[-1]
    return last if last in UNITS else ""


def quantity_of(figure: str) -> str:
    """What a figure is, in words and without its unit."""
    words = {
        "wall_s": "time",
        "cpu_s": "CPU time",
        "peak_rss_bytes": "memory",
        "stored_bytes": "stored size",
        "wire_bytes": "bytes on the wire",
    }
    bare = figure.rsplit("_", 1)[0] if unit_of(figure) and "_" in figure else figure
    return words.get(figure, bare.replace("_", " "))


def with_unit(value: float, unit: str) -> str:
    """A figure in a unit that people read: bytes as kB and MB, seconds as ms when short."""
    if unit == "bytes":
        return _scaled(value, (("B", 1.0), ("kB", 1e3), ("MB", 1e6), ("GB", 1e9)))
    if unit == "s":
        return f"{value * 1e3:.3g} ms" if value < 0.1 else f"{value:.2f} s"
    if unit == "rate":
        return f"{value / 1e6:.0f} MB/s"
    if unit == "x":
        return f"{value:.2f} x"
    return f"{value:,.0f} {unit}".replace(",", " ").strip()


def _scaled(value: float, units: Sequence[tuple[str, float]]) -> str:
    name, factor = [pair for pair in units if abs(value) >= pair[1]][-1:][0] if value else units[0]
    return (
        f"{value / factor:.3g} {name}" if value < 1000 * factor else f"{value / factor:.0f} {name}"
    )
