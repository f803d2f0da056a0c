"""`dm fsck`: is everything stored complete and unharmed?"""

from typing import TYPE_CHECKING

import click

from dmsync.errors import Corruption
from dmsync.surfaces.cli import output
from dmsync.surfaces.cli.completions import DOT
from dmsync.surfaces.cli.invocation import DmCommand, Invocation, query_options

if TYPE_CHECKING:
    from dmsync.engine.fsck import FsckReport, Problem

_COMMITS_SHOWN_MAX = 5


@click.command("fsck", cls=DmCommand, epilog="Example: dm fsck --full")
@click.argument("dots", metavar="[DOT]...", nargs=-1, type=DOT)
@click.option(
    "--quick/--full",
    "quick",
    default=True,
    help="Sizes, indexes and reachability (default), or every stored byte.",
)
@query_options
@click.pass_obj
def fsck_command(invocation: Invocation, dots: tuple[str, ...], quick: bool) -> int:
    """Check the store: event log, catalog, packs, and all that branches and tags reach.

    Changes nothing. Exit code 16 when something is wrong; each line then says what and which
    commits cannot be trusted. With DOTs only those are checked, and not the event log.
    """
    from dmsync.engine.fsck import fsck

    with invocation.open_store() as store:
        rows = [invocation.resolve_dot(store, name) for name in dots] or None
        with invocation.progress("checking") as progress:
            report = fsck(store, rows, full=not quick, progress=progress)
    if invocation.as_json:
        for problem in report.problems:
            output.write_json_line({"type": "problem", **_problem_fields(problem)})
        invocation.summary(_summary_fields(report))
    else:
        _print(invocation, report)
    return Corruption.exit_code if report.problems else 0


def _print(invocation: Invocation, report: "FsckReport") -> None:
    for problem in report.problems:
        place = " ".join(filter(None, (problem.dot, problem.where)))
        line = f"{place}: {problem.message}"
        if problem.commits:
            shown = [c[: output.SHORT_ID_DIGITS] for c in problem.commits[:_COMMITS_SHOWN_MAX]]
            more = len(problem.commits) - len(shown)
            line += f" (commits {', '.join(shown)}{f' and {more} more' if more else ''})"
        output.write_line(output.escape_text(line))
    for note in report.notes:
        invocation.talk(f"note: {note}")
    found = output.counted(len(report.problems), "problem") if report.problems else "no problems"
    invocation.talk(
        f"{found}: {report.packs} packs, {report.records} records, {report.commits} commits, "
        f"{report.pages} pages, {report.chunks} chunks, {output.human_size(report.bytes_checked)}"
    )


def _problem_fields(problem: "Problem") -> dict[str, object]:
    return {
        "dot": problem.dot,
        "where": problem.where,
        "message": problem.message,
        "commits": list(problem.commits),
    }


def _summary_fields(report: "FsckReport") -> dict[str, object]:
    return {
        "full": report.full,
        "ok": not report.problems,
        "problems": [_problem_fields(problem) for problem in report.problems],
        "notes": report.notes,
        "packs": report.packs,
        "records": report.records,
        "commits": report.commits,
        "hollow_commits": report.hollow_commits,
        "pages": report.pages,
        "chunks": report.chunks,
        "bytes_checked": report.bytes_checked,
    }
