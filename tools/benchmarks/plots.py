"""Figures of docs/performance.md as PNG files."""

from pathlib import Path
from typing import Final

import matplotlib

from tools.benchmarks.result import Check, Result, RowResult

matplotlib.use("Agg")
from matplotlib import pyplot  # the backend is chosen before
from matplotlib.figure import Figure

WIDTH_IN: Final = 9.0
BAR_IN: Final = 0.24
HOLDS, MISSES, PLAIN, GREY = "#2b7a4b", "#b3402f", "#30578f", "#999999"
TIMES_MAX: Final = 10.0
"""Bars longer than ten times their target are cut; the figure beside them says how long."""


def draw_all(result: Result, directory: Path) -> list[Path]:
    """Every figure that the result has data for; their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    made = [_targets(result, directory / "targets.png")]
    rounds = result.rows.get("rounds")
    if rounds is not None and rounds.series:
        made.append(_growth(rounds, directory / "growth.png"))
        made.append(_seconds(rounds, directory / "seconds.png"))
    stages = [row for row in result.rows.values() if row.stages]
    if stages:
        made.append(_stages(stages, directory / "stages.png"))
    return made


def _targets(result: Result, path: Path) -> Path:
    """Each checked figure as a multiple of its target; shorter is better."""
    bars = [
        (f"{row.name}: {check.what}", _times_target(check), check.holds)
        for row in result.rows.values()
        for check in row.checks
        if check.target
    ]
    figure, axes = pyplot.subplots(figsize=(WIDTH_IN, 1.2 + BAR_IN * len(bars)))
    for place, (_, times, holds) in enumerate(reversed(bars)):
        axes.barh(place, min(times, TIMES_MAX), color=HOLDS if holds else MISSES)
        axes.text(min(times, TIMES_MAX), place, f" {times:.2f}", va="center", fontsize=7)
    axes.set_yticks(range(len(bars)), [name for name, _, _ in reversed(bars)], fontsize=7)
    axes.set_ylim(-1, len(bars))
    axes.axvline(1.0, color=GREY)
    axes.set_xlim(0, max([1.5, *(min(times, TIMES_MAX) for _, times, _ in bars)]) * 1.1)
    axes.set_xlabel("multiple of the target (1: just held; more: missed)")
    return _saved(figure, path)


def _times_target(check: Check) -> float:
    assert check.target, "checked by the caller"
    if check.at_least:
        return check.target / check.value if check.value else TIMES_MAX
    return check.value / check.target


def _growth(row: RowResult, path: Path) -> Path:
    """Growth of the store at each commit beside the floor."""
    figure, axes = pyplot.subplots(figsize=(WIDTH_IN, 3.6))
    for name, label, colour in (
        ("growth_bytes", "growth of the store", PLAIN),
        ("floor_bytes", "floor: changed pages, one zstd stream", GREY),
    ):
        points = row.series[name]
        axes.plot(
            [x for x, _ in points], [y / 1e6 for _, y in points], label=label, color=colour, lw=1.2
        )
    axes.set_ylim(bottom=0)
    axes.set_xlabel("commit")
    axes.set_ylabel("MB")
    axes.legend(frameon=False)
    return _saved(figure, path)


def _seconds(row: RowResult, path: Path) -> Path:
    """Seconds of each commit beside restic's median."""
    points = row.series["seconds"]
    figure, axes = pyplot.subplots(figsize=(WIDTH_IN, 3.2))
    axes.plot([x for x, _ in points], [y for _, y in points], label="dm", color=PLAIN, lw=1.2)
    restic_s = row.median("commit of a round", "restic", "wall_s")
    if restic_s:
        axes.axhline(restic_s, color=GREY, label="restic, median of the first commits")
        axes.axhline(0.4 * restic_s, color=GREY, ls=":", label="0.4 of that: the target")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("commit")
    axes.set_ylabel("seconds")
    axes.legend(frameon=False)
    return _saved(figure, path)


def _stages(rows: list[RowResult], path: Path) -> Path:
    """Wall seconds by stage; stages in threads overlap, so that sums may exceed the time taken."""
    steps = [(f"{row.name}: {step}", found) for row in rows for step, found in row.stages.items()]
    names = list(dict.fromkeys(name for _, found in steps for name in found))
    colours = matplotlib.colormaps["tab20"]
    figure, axes = pyplot.subplots(figsize=(WIDTH_IN, 1.6 + BAR_IN * len(steps)))
    for number, name in enumerate(names):
        lefts = [sum(found.get(before, 0.0) for before in names[:number]) for _, found in steps]
        widths = [found.get(name, 0.0) for _, found in steps]
        axes.barh(range(len(steps)), widths, left=lefts, label=name, color=colours(number % 20))
    axes.set_yticks(range(len(steps)), [step for step, _ in steps], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("seconds in each stage, slowest run")
    axes.legend(frameon=False, fontsize=7, ncols=2)
    return _saved(figure, path)


def _saved(figure: Figure, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
    pyplot.close(figure)
    return path
