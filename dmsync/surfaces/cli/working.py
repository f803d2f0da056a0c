"""`dm status` and `dm diff`: what is different."""

from typing import TYPE_CHECKING

import click

from dmsync.surfaces.cli import output
from dmsync.surfaces.cli.changes import change_fields, change_line, stat_line
from dmsync.surfaces.cli.completions import RANGE
from dmsync.surfaces.cli.invocation import DmCommand, Invocation, query_options
from dmsync.surfaces.cli.log import PathsCommand

if TYPE_CHECKING:
    from dmsync.engine.trees import StatusReport


@click.command("status", cls=DmCommand, epilog="Example: dm status --json")
@click.option("--stat", is_flag=True, help="Show sizes too.")
@query_options
@click.pass_obj
def status_command(invocation: Invocation, stat: bool) -> None:
    """Show the current branch and its uncommitted changes: + new, - gone, * changed, R renamed."""
    from dmsync.engine.trees import status

    with invocation.open_store() as store:
        dot = invocation.resolve_dot(store)
        with invocation.progress(f"comparing {dot.name}", is_query=True) as progress:
            report = status(store, dot.dot, progress)
    if report.problem is not None:
        raise report.problem
    if invocation.as_json:
        invocation.document(
            {
                "dot": dot.name,
                "namespace": dot.namespace,
                "branch": report.branch,
                "head": report.head.hex() if report.head else None,
                "clean": not report.changes,
                "dirty_bytes": report.dirty_bytes,
                "materialised": report.materialised,
                "switching": report.switching,
                "merge": _merge_fields(report),
                "changes": [change_fields(change) for change in report.changes],
                **invocation.stages(),
            }
        )
        return
    head = report.head.hex()[: output.SHORT_ID_DIGITS] if report.head else "no commits yet"
    invocation.talk(f"On branch {report.branch} ({head}) of {dot.name}")
    if report.switching:
        invocation.warn(
            "a switch of this tree was interrupted; the next command that changes something "
            "completes it and keeps what the tree holds now as a stash"
        )
    if report.merge is not None:
        _tell_merge(invocation, report)
    for change in report.changes:
        output.write_line(change_line(change, stat=stat))
    if stat:
        output.write_line(stat_line(report.changes))
    if not report.materialised:
        invocation.talk("no working tree here yet; dm dot path makes it")
    elif not report.changes:
        invocation.talk("nothing to commit, working tree clean")


def _tell_merge(invocation: Invocation, report: "StatusReport") -> None:
    assert report.merge is not None
    left = [row for row in report.conflicts if row.resolved is None]
    invocation.talk(
        f"a {report.merge.kind} of {report.merge.theirs.hex()[: output.SHORT_ID_DIGITS]} is under "
        + (
            f"way, {output.counted(len(left), 'conflict')} to resolve (dm conflicts, dm resolve; "
            "dm merge --abort gives it up)"
            if left
            else "way, all conflicts resolved: dm merge --continue"
        )
    )
    for row in left:
        output.write_line(f"C {output.escape_name(row.path)}")


def _merge_fields(report: "StatusReport") -> dict[str, object] | None:
    """JSON of the merge under way; None when there is none."""
    if report.merge is None:
        return None
    return {
        "kind": report.merge.kind,
        "theirs": report.merge.theirs.hex(),
        "conflicts": [
            {**output.path_fields(row.path), "reason": row.reason, "resolved": row.resolved}
            for row in report.conflicts
        ],
    }


@click.command(
    "diff", cls=PathsCommand, epilog="Example: dm diff HEAD~1 HEAD --stat -- __default__/logs"
)
@click.argument("revisions", metavar="[REV [REV]]", nargs=-1, type=RANGE)
@click.option("--stat", is_flag=True, help="Show sizes and a closing line of totals.")
@click.option("-p", "--patch", is_flag=True, help="Show what differs inside files.")
@click.option(
    "-U",
    "--unified",
    "context",
    type=click.IntRange(0, 1_000_000),
    metavar="N",
    help="With N lines of context (3); implies -p.",
)
@click.option("--rows", is_flag=True, help="Show rows that differ in SQLite databases.")
@click.option(
    "--rows-max",
    type=click.IntRange(0, 1_000_000),
    default=100,
    metavar="N",
    help="At most N rows of each table (100).",
)
@click.option("--summary", is_flag=True, help="Say what metadata differ, as -v does.")
@click.option("-C", "--find-copies", is_flag=True, help="Find copies of unchanged files too.")
@click.option("--name-only", is_flag=True, help="Show paths only.")
@click.option("--name-status", is_flag=True, help="Show kind and path between tabs.")
@query_options
@click.pass_obj
def diff_command(
    invocation: Invocation,
    revisions: tuple[str, ...],
    paths: tuple[bytes, ...],
    *,
    stat: bool,
    patch: bool,
    context: int | None,
    rows: bool,
    rows_max: int,
    summary: bool,
    find_copies: bool,
    name_only: bool,
    name_status: bool,
) -> None:
    """Show what differs: the working tree from HEAD, or from REV, or one REV from another.

    A range A..B is the same as A B; A...B is what B has that their common ancestor had not. A
    stash is a revision too. + is new, - gone, * changed, R renamed, C copied; at most so many
    bytes differ as --stat says, for whole chunks are compared. -p shows files by the [diff.NAME]
    commands of your configuration, SQLite databases as rows, texts as hunks.
    """
    from dmsync.engine.comparison import compare
    from dmsync.engine.path_history import tree_path
    from dmsync.surfaces.cli.diff_output import DiffOutput, DiffWishes

    if len(revisions) > 2:
        raise click.UsageError("at most two revisions", ctx=click.get_current_context())
    is_patch = patch or context is not None
    if name_only + name_status > 1 or (
        (name_only or name_status) and (stat or is_patch or rows or summary)
    ):
        raise click.UsageError(
            "--name-only and --name-status stand alone", ctx=click.get_current_context()
        )
    wishes = DiffWishes(
        stat=stat,
        patch=is_patch,
        context=context,
        rows=rows,
        rows_max=rows_max,
        summary=summary or invocation.verbose > 0,
        name_only=name_only,
        name_status=name_status,
    )
    with invocation.open_store() as store:
        dot = invocation.resolve_dot(store)
        with invocation.progress(f"comparing {dot.name}", is_query=True) as progress:
            comparison = compare(
                store,
                dot,
                revisions,
                paths=tuple(map(tree_path, paths)),
                measured=stat,
                find_copies=find_copies,
                progress=progress,
            )
        DiffOutput(comparison, wishes).write(invocation)
