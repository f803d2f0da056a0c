"""`dm fsck`: is everything stored complete and unharmed? And healing what is not."""

from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

import click

from dmsync.errors import Corruption, UsageError
from dmsync.surfaces.cli import output
from dmsync.surfaces.cli.completions import DOT, REMOTE
from dmsync.surfaces.cli.invocation import (
    DmCommand,
    Invocation,
    changing_options,
    transfer_options,
)

if TYPE_CHECKING:
    from dmsync.engine.fsck import FsckReport, Problem
    from dmsync.engine.repairing.repair import RepairReport

_COMMITS_SHOWN_MAX = 5
_PATHS_SHOWN_MAX = 5


@click.command("fsck", cls=DmCommand, epilog="Example: dm fsck --full; dm fsck --repair --from nas")
@click.argument("dots", metavar="[DOT]...", nargs=-1, type=DOT)
@click.option(
    "--quick/--full",
    "quick",
    default=True,
    help="Sizes, indexes and reachability (default), or every stored byte.",
)
@click.option("--repair", is_flag=True, help="Heal what can be healed, then check in full.")
@click.option(
    "--from",
    "source",
    metavar="REMOTE",
    type=REMOTE,
    help="With --repair: fetch what is lost from a remote or URL that has it.",
)
@click.option(
    "--accept-loss",
    is_flag=True,
    help="With --repair: what could not be put back is known; say no more of it.",
)
@transfer_options
@changing_options
@click.pass_obj
def fsck_command(
    invocation: Invocation,
    dots: tuple[str, ...],
    quick: bool,
    repair: bool,
    source: str | None,
    accept_loss: bool,
) -> int:
    """Check the store: event log, catalog, packs, and all that branches and tags reach.

    Changes nothing without --repair. Exit code 16 when something is wrong; each line then says
    what, and which commits and paths cannot be trusted. With DOTs only those are checked, and not
    the event log.

    --repair rebuilds what follows from the rest, takes lost objects from wherever this machine
    has them, with --from also from a remote, and moves harmed files to `damaged`: it deletes
    nothing. What is lost for good is named at the end (exit code 16). What the event log lost and
    nothing could put back is named by every later check, until it could be (fetch its commits from
    a remote that has them, then repair again) or you repair with --accept-loss.
    """
    if source is not None and not repair:
        raise UsageError("--from goes with --repair")
    if accept_loss and not repair:
        raise UsageError("--accept-loss goes with --repair")
    if repair:
        return _repair(invocation, dots, source, accept_loss=accept_loss)
    from dmsync.engine.fsck import fsck

    with invocation.open_store() as store:
        rows = [invocation.resolve_dot(store, name) for name in dots] or None
        with invocation.progress("checking") as progress:
            report = fsck(store, rows, full=not quick, progress=progress)
    if invocation.as_json:
        _write_problems(report)
        invocation.summary(_summary_fields(report))
    else:
        _print(invocation, report)
    return Corruption.exit_code if report.problems else 0


def _repair(
    invocation: Invocation, dots: tuple[str, ...], source: str | None, *, accept_loss: bool
) -> int:
    from dmsync.engine.repairing.event_log import repair_log
    from dmsync.engine.repairing.losses import accept_losses
    from dmsync.engine.repairing.recovered_state import put_back
    from dmsync.engine.repairing.repair import RepairReport, repair
    from dmsync.surfaces.cli.connection import bring_objects, find_remote

    report = RepairReport()
    with ExitStack() as open_for_repair:
        progress = open_for_repair.enter_context(invocation.progress("repairing"))
        repair_log(
            invocation.settings.home,
            report,
            lock_wait_s=invocation.settings.engine.lock_wait_s,
            dry_run=invocation.dry_run,
        )
        store = open_for_repair.enter_context(invocation.open_store())
        put_back(store, report, dry_run=invocation.dry_run)
        if accept_loss:
            accept_losses(store.layout, report, dry_run=invocation.dry_run)
        rows = [invocation.resolve_dot(store, name) for name in dots] or None
        there = None if source is None else find_remote(invocation, store, source)
        fetch = None
        if there is not None:
            fetch = partial(bring_objects, invocation, store, there, progress=progress)
        repair(store, report, rows, fetch=fetch, dry_run=invocation.dry_run, progress=progress)
    assert report.after is not None
    _tell(invocation, report, report.after)
    return Corruption.exit_code if report.after.problems else 0


def _tell(invocation: Invocation, report: "RepairReport", after: "FsckReport") -> None:
    if invocation.as_json:
        for action in report.actions:
            output.write_json_line(
                {
                    "type": "repair",
                    "dot": action.dot,
                    "where": action.where,
                    "message": action.message,
                }
            )
        _write_problems(after)
        invocation.summary(
            {
                **_summary_fields(after),
                "repairs": len(report.actions),
                "objects_healed": report.objects_healed,
                "records_fetched": report.records_fetched,
            }
        )
        return
    for action in report.actions:
        place = " ".join(filter(None, (action.dot, action.where)))
        invocation.result(
            output.escape_text(f"{place}: {action.message}" if place else action.message)
        )
    _print(invocation, after)


def _write_problems(report: "FsckReport") -> None:
    for problem in report.problems:
        output.write_json_line({"type": "problem", **_problem_fields(problem)})


def _print(invocation: Invocation, report: "FsckReport") -> None:
    for problem in report.problems:
        place = " ".join(filter(None, (problem.dot, problem.where)))
        line = f"{place}: {problem.message}"
        if problem.commits:
            shown = [c[: output.SHORT_ID_DIGITS] for c in problem.commits]
            line += f" (commits {_some(shown, _COMMITS_SHOWN_MAX)})"
        if problem.paths:
            line += f" (in {_some(list(problem.paths), _PATHS_SHOWN_MAX)})"
        output.write_line(output.escape_text(line))
    for note in report.notes:
        invocation.talk(f"note: {note}")
    found = output.counted(len(report.problems), "problem") if report.problems else "no problems"
    invocation.talk(
        f"{found}: {report.packs} packs, {report.records} records, {report.commits} commits, "
        f"{report.pages} pages, {report.chunks} chunks, {output.human_size(report.bytes_checked)}"
    )


def _some(names: list[str], count_max: int) -> str:
    more = len(names) - count_max
    return ", ".join(names[:count_max]) + (f" and {more} more" if more > 0 else "")


def _problem_fields(problem: "Problem") -> dict[str, object]:
    return {
        "dot": problem.dot,
        "where": problem.where,
        "message": problem.message,
        "commits": list(problem.commits),
        "paths": list(problem.paths),
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
