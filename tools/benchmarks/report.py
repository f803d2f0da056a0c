"""The page docs/performance.md, its figures, and the README's section, all from one result."""

import textwrap
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tools.benchmarks.result import (
    RESULTS,
    Check,
    Result,
    RowResult,
    load_result,
    quantity_of,
    unit_of,
    with_unit,
)

ROOT: Final = Path(__file__).parents[2]
LIMITS: Final = Path(__file__).with_name("limits.toml")
"""By row: what was tried and what limits it, written by whoever looked at its profile."""
PAGE: Final = ROOT / "docs" / "performance.md"
FIGURES: Final = ROOT / "docs" / "performance"
README: Final = ROOT / "README.md"
BEGIN: Final = "<!-- figures: written by tools/bench, from docs/performance.md's result -->"
END: Final = "<!-- end of figures -->"
LINE_CHARACTERS: Final = 145
ROWS_COUNT_MIN: Final = 20
"""A result with fewer rows was made for one question and is no part of the history."""
ON_README: Final = (
    ("first-commit", "wall_s", "first commit, 1 GB of PostgreSQL"),
    ("first-commit", "stored_bytes", "the same, stored"),
    ("rounds", "wall_s", "commit after 4,000 transactions"),
    ("rounds", "stored_bytes", "the same, stored"),
    ("small-files", "wall_s", "first commit, 50,000 files of `/usr/share`"),
    ("no-change", "wall_s", "the same, nothing changed (git: `status`)"),
    ("restore", "wall_s", "restore of 1 GB of PostgreSQL"),
    ("restore-small-files", "wall_s", "restore of `/usr/share`"),
    ("transfer-database", "wall_s", "push of 1 GB of PostgreSQL (rsync: `-a`)"),
    ("push-rounds", "wall_s", "push after 4,000 transactions (rsync: `-z`)"),
    ("push-rounds", "wire_bytes", "the same, sent"),
)
PROGRAMS: Final = {
    "dm": ("dm", "own server"),
    "restic": ("restic",),
    "borg": ("borg",),
    "git": ("git", "git status"),
    "bup": ("bup",),
    "rsync": ("rsync -a", "rsync -z"),
}
CAPTIONS: Final = {
    "targets.png": "Each figure as a multiple of its target: up to 1 it holds",
    "growth.png": "Growth of the store at each of the commits of a database under pgbench",
    "seconds.png": "Seconds that each of these commits took",
    "stages.png": "Where the time of `dm` goes, by stage",
}


def write_report(result: Result) -> list[Path]:
    """Write everything; the paths written."""
    from tools.benchmarks.plots import draw_all  # matplotlib is installed for this alone

    made = draw_all(result, FIGURES)
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(page(result, [path.name for path in made], complete_results(RESULTS)))
    README.write_text(with_section(README.read_text(), readme_section(result)))
    return [PAGE, *made, README]


# --- the page -----------------------------------------------------------------------------------


def page(result: Result, figures: list[str], history: Sequence[Result] = ()) -> str:
    """The whole page as Markdown; `history` are the results there are, oldest first."""
    pictures = [
        f"![{CAPTIONS[name]}](performance/{name})\n\n{CAPTIONS[name]}.\n" for name in figures
    ]
    parts = [
        "# Performance\n",
        "Written by `tools/bench --compare`; do not edit. In each row the programs take turns on "
        "the same data, the first another one each time: medians, caches warm, `sync` before each "
        f"command. {_told_runs(result)}\n",
        f"{_summary(result)}\n",
        _target_table(result),
        "## Rows that miss, and what limits them\n",
        _limits(result),
        *pictures,
        "## Medians\n",
        *(_medians(row) for row in result.rows.values()),
        "## Where the time goes\n",
        "Wall seconds by stage of the slowest run (`dm --json`, `--profile`). Stages in threads "
        "overlap: sums may exceed the time taken.\n",
        _stage_table(result),
        "## Machine and versions\n",
        _list({**result.machine, "measured": result.started, "result": result.path.name}),
        _list(result.programs),
        "## History\n",
        _history(history),
    ]
    return "\n".join(parts)


def _told_runs(result: Result) -> str:
    """How many runs the rows come from, as far as the result says, and under what conditions."""
    known = [row.run for row in result.rows.values() if row.run]
    versions = sorted({row.dm for row in result.rows.values() if row.dm})
    told = []
    if len(set(known)) > 1:
        told.append(f"The rows come from {len(set(known))} runs of dm {', '.join(versions)}.")
    elif known and len(known) == len(result.rows):
        told.append("All rows come from one run.")
    if "conditions" in result.machine:
        told.append(f"Conditions: {result.machine['conditions']}.")
    return " ".join(told) or "Whether all rows come from one run the result does not say."


def complete_results(directory: Path) -> list[Result]:
    """Results of full runs with every row, oldest first."""
    found = []
    for path in sorted(directory.glob("*.json")):
        try:
            result = load_result(path)
        except ValueError:
            continue  # of an older format
        if not result.options["quick"] and len(result.rows) >= ROWS_COUNT_MIN:
            found.append(result)
    return found


def _history(results: Sequence[Result]) -> str:
    lines = ["| result | dm | figures that hold |", "| --- | --- | --- |"]
    lines += [
        f"| {one.path.name} | {one.programs['dm']} | {_summary(one).split(';')[0]} |"
        for one in results
    ]
    return "\n".join([*lines, ""])


def _summary(result: Result) -> str:
    checks = [
        check for row in result.rows.values() for check in row.checks if check.target is not None
    ]
    missed = [check for check in checks if not check.holds]
    seconds = sum(row.seconds for row in result.rows.values())
    return (
        f"{len(checks) - len(missed)} of {len(checks)} figures hold their targets; "
        f"{len(result.rows)} rows took {seconds / 60:.0f} minutes."
    )


def _target_table(result: Result) -> str:
    lines = [
        "| row | figure | ours | beside | value | target | verdict |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in result.rows.values():
        title = f"**{row.title}**"
        for check in row.checks:
            lines.append(f"| {title} | {_cells(check)} |")
            title = ""
        if row.error:
            lines.append(f"| {title} | not measured | | | | | {row.error} |")
    notes = [
        f"- {row.title}: {'; '.join(_notes(row))}" for row in result.rows.values() if _notes(row)
    ]
    return "\n".join([*lines, "", *notes, ""])


def _cells(check: Check) -> str:
    value = with_unit(check.value, check.unit)
    ours = check.ours or value
    aim = ""
    if check.target is not None:
        aim = f"{'≥' if check.at_least else '≤'} {with_unit(check.target, check.unit)}"
    verdict = check.verdict if check.holds else f"**{check.verdict}**"
    return f"{_escaped(check.what)} | {ours} | {check.theirs} | {value} | {aim} | {verdict}"


def _escaped(text: str) -> str:
    """Text for a cell: a bar would end it."""
    return text.replace("|", "\\|")


def _notes(row: RowResult) -> list[str]:
    return [*row.notes, f"{row.runs} run{'s' if row.runs != 1 else ''}, {row.seconds:.0f} s"]


def _medians(row: RowResult) -> str:
    names = list(
        dict.fromkeys(name for one in row.samples for figures in one.figures for name in figures)
    )
    if not names:
        return ""
    heads = [quantity_of(name) for name in names]
    lines = [
        f"### {row.title}\n",
        f"| step | program | n | {' | '.join(heads)} |",
        f"| --- | --- | ---: |{' ---: |' * len(names)}",
    ]
    for one in row.samples:
        cells = [
            with_unit(one.median(name), unit_of(name))
            if any(name in f for f in one.figures)
            else ""
            for name in names
        ]
        head = f"| {one.step} | {_escaped(one.program)} | {len(one.figures)}"
        lines.append(f"{head} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _stage_table(result: Result) -> str:
    steps = [
        (row.title, step, found)
        for row in result.rows.values()
        for step, found in row.stages.items()
    ]
    names = list(dict.fromkeys(name for _, _, found in steps for name in found))
    if not names:
        return "This result has none.\n"
    lines = [
        f"| row | step | {' | '.join(names)} |",
        f"| --- | --- |{' ---: |' * len(names)}",
    ]
    for title, step, found in steps:
        cells = [f"{found[name]:.2f}" if name in found else "" for name in names]
        lines.append(f"| {title} | {step} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _limits(result: Result) -> str:
    """What is known of each row in which something misses its target."""
    known = tomllib.loads(LIMITS.read_text())
    found = []
    for row in result.rows.values():
        missed = [f"{check.what}: {check.verdict}" for check in row.checks if not check.holds]
        if missed:
            text = known.get(row.name, {}).get("text", "Not looked into yet.")
            found.append(f"- **{row.title}** ({'; '.join(missed)}). {' '.join(text.split())}")
    return "\n".join(found or ["None."]) + "\n"


def _list(values: dict[str, object] | dict[str, str]) -> str:
    return "\n".join(
        [*(f"- {name.replace('_', ' ')}: {value}" for name, value in values.items()), ""]
    )


# --- the README ---------------------------------------------------------------------------------


def _told_medians(result: Result) -> str:
    """Of how many runs of each program the figures are medians, and where of fewer."""
    runs = result.options["runs"]
    assert isinstance(runs, int)
    fewer = sum(row.runs < runs for row in result.rows.values())
    return f"medians of {runs}" + (f" (of fewer in {fewer} long rows)" if fewer else "")


def readme_section(result: Result) -> str:
    """The README's table: medians of dm and its peers at the main steps."""
    machine, programs = result.machine, result.programs
    versions = ", ".join(
        f"{name} {programs[name]}" for name in ("restic", "borg", "git", "bup", "rsync")
    )
    text = (
        f"`tools/bench --compare`, {_told_medians(result)} on {machine['cores']} cores "
        f"({machine['cpu']}, {machine['memory_mib'] // 1024} GiB, {machine['filesystem']}; "
        f"{machine['system']}; {versions}). {_summary(result)} All of them, with what was measured "
        "and where the time goes: [docs/performance.md](docs/performance.md)."
    )
    lines = [
        *_wrapped(text),
        "",
        f"| | {' | '.join(PROGRAMS)} |",
        f"| --- |{' --: |' * len(PROGRAMS)}",
    ]
    for name, figure, title in ON_README:
        row = result.rows.get(name)
        if row is not None and row.samples:
            lines.append(f"| {title} | {' | '.join(_readme_cells(row, figure))} |")
    missed = [row.title for row in result.rows.values() if not all(c.holds for c in row.checks)]
    if missed:
        lines += ["", *_wrapped(f"Where it misses a target: {'; '.join(missed)}.")]
    return "\n".join(lines)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, LINE_CHARACTERS, break_long_words=False, break_on_hyphens=False)


def _readme_cells(row: RowResult, figure: str) -> list[str]:
    """Medians at the step that dm has first, by program; the best is bold."""
    own = next(one for one in row.samples if one.program in PROGRAMS["dm"])
    found: dict[str, float] = {}
    for program, names in PROGRAMS.items():
        for one in row.samples:
            if one.step == own.step and one.program in names and program not in found:
                found[program] = one.median(figure)
    measured = {program: value for program, value in found.items() if value}
    best = min(measured.values(), default=0.0)
    return [
        ""
        if program not in measured
        else f"**{with_unit(best, unit_of(figure))}**"
        if measured[program] == best
        else with_unit(measured[program], unit_of(figure))
        for program in PROGRAMS
    ]


def with_section(readme: str, section: str) -> str:
    """The README with the section between its marks replaced.

    Raises:
        ValueError: the marks are not there.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError("the README has no place for figures")
    return f"{before}{BEGIN}\n{section}\n{END}{after}"
