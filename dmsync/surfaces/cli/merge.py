"""`dm merge`, `dm conflicts`, `dm resolve`: joining branches, and deciding what could not be."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, cast

import click

from dmsync.errors import UsageError
from dmsync.surfaces.cli import output
from dmsync.surfaces.cli.changes import change_fields, change_line
from dmsync.surfaces.cli.completions import REVISION
from dmsync.surfaces.cli.conflicting import CONFLICTS, conflict_text, tell_conflicts
from dmsync.surfaces.cli.invocation import (
    FILE_NAME,
    DmCommand,
    Invocation,
    changing_options,
    query_options,
)
from dmsync.surfaces.cli.switching import in_use_option, tell_tree, tree_exit_code, tree_fields

if TYPE_CHECKING:
    from dmsync.engine.databases.sqlite_merge import RowConflict
    from dmsync.engine.merging.entries import Side
    from dmsync.engine.merging.lifecycle import FastForward, MergeSummary
    from dmsync.engine.merging.resolution import How, ResolveSummary, RowSide
    from dmsync.engine.merging.state import ConflictInfo

_OUTCOMES: Final = {
    "up-to-date": "Already up to date.",
    "applied": "The result is in the working tree, not committed.",
    "nothing": "Nothing to commit: the result equals the branch.",
}


# --- merge -------------------------------------------------------------------------------------


@click.command(
    "merge", cls=DmCommand, epilog='Example: dm merge experiment -m "the new schema, and our data"'
)
@click.argument("revision", metavar="REV", required=False, type=REVISION)
@click.option("--ff-only", is_flag=True, help="Only when no merge commit is needed.")
@click.option("--no-ff", is_flag=True, help="Make a merge commit even when none is needed.")
@click.option("--squash", is_flag=True, help="One commit of what REV brings, without its history.")
@click.option("--ours", "ours", is_flag=True, help="Decide conflicts for our side.")
@click.option("--theirs", "theirs", is_flag=True, help="Decide conflicts for REV's side.")
@click.option("--allow-unrelated", is_flag=True, help="Also without a commit in common.")
@click.option("-m", "--message", metavar="MSG", help="Of the merge commit.")
@click.option("--continue", "go_on", is_flag=True, help="Commit a merge whose conflicts are over.")
@click.option("--abort", is_flag=True, help="Give the merge up; the tree is kept as a stash.")
@in_use_option
@changing_options
@click.pass_obj
def merge_command(
    invocation: Invocation,
    revision: str | None,
    *,
    ff_only: bool,
    no_ff: bool,
    squash: bool,
    ours: bool,
    theirs: bool,
    allow_unrelated: bool,
    message: str | None,
    go_on: bool,
    abort: bool,
    in_use: bool,
) -> int:
    """Join what REV changed into the current branch, and its working tree.

    What both sides changed is merged: text by hunks, SQLite databases by rows, other formats by
    the [merge.NAME] commands of your configuration. A database directory is taken from one side
    whole, never mixed. What cannot be decided is a conflict (exit code 15): the tree then holds
    ours, and NAME~ours, NAME~theirs, NAME~base beside it. `dm resolve` decides, --continue commits.
    """
    from dmsync.engine.merging.lifecycle import (
        MergeOptions,
        abort_merge,
        continue_merge,
        merge_revision,
    )

    if sum((revision is not None, go_on, abort)) != 1:
        raise UsageError("one of: REV, --continue, --abort", hint="dm merge BRANCH")
    if ff_only + no_ff + squash > 1 or ours + theirs > 1:
        raise UsageError("one of --ff-only, --no-ff, --squash; one of --ours, --theirs")
    if revision is None and any((ff_only, no_ff, squash, ours, theirs, allow_unrelated)):
        raise UsageError("--continue and --abort end a merge: how was said when it began")
    if abort and message is not None:
        raise UsageError("--abort makes no commit: give no message")
    forward: FastForward = "only" if ff_only else "never" if no_ff else "auto"
    favour: Side | None = "ours" if ours else "theirs" if theirs else None
    with invocation.open_store() as store:
        dot = invocation.resolve_dot(store)
        with invocation.progress(f"merging into {dot.name}") as progress:
            if go_on:
                done = continue_merge(store, dot, message, progress, dry_run=invocation.dry_run)
            elif abort:
                done = abort_merge(store, dot, progress, in_use=in_use, dry_run=invocation.dry_run)
            else:
                assert revision is not None
                options = MergeOptions(
                    revision=revision,
                    fast_forward=forward,
                    squash=squash,
                    favour=favour,
                    message=message,
                    allow_unrelated=allow_unrelated,
                    in_use=in_use,
                    dry_run=invocation.dry_run,
                )
                done = merge_revision(store, dot, options, progress)
    if abort:
        return _print_abort(invocation, done)
    return print_merge(invocation, done)


def print_merge(invocation: Invocation, summary: "MergeSummary") -> int:
    """Tell what a merge, cherry-pick, revert or stash pop did; returns the exit code."""
    code = merge_exit_code(summary)
    if invocation.as_json:
        fields = merge_fields(summary, dry_run=invocation.dry_run)
        invocation.summary({**fields, "exit_code": code})
        return code
    tell_merge(invocation, summary)
    return code


def merge_exit_code(summary: "MergeSummary") -> int:
    return CONFLICTS if summary.conflicts else tree_exit_code(summary)


def tell_merge(invocation: Invocation, summary: "MergeSummary") -> None:
    """What a merge did, for a human: results on stdout, remarks on stderr."""
    if invocation.dry_run:
        for change in summary.changes:
            invocation.result(change_line(change))
    if summary.conflicts:
        tell_conflicts(invocation, summary.conflicts, summary.theirs)
    elif invocation.dry_run:
        invocation.talk("no conflicts; nothing was changed (dry run)")
    else:
        invocation.result(_outcome_text(summary))
    tell_tree(invocation, summary)


def _outcome_text(summary: "MergeSummary") -> str:
    if summary.outcome == "fast-forward":
        before = _short(summary.ours) if summary.ours else "no commits"
        return f"Fast-forward: {before} -> {_short(summary.commit)}"
    if summary.outcome == "merged":
        assert summary.commit is not None
        return summary.commit.hex()
    return _OUTCOMES[summary.outcome]


def _short(commit: bytes | None) -> str:
    return commit.hex()[: output.SHORT_ID_DIGITS] if commit else "(none)"


def merge_fields(summary: "MergeSummary", *, dry_run: bool) -> dict[str, object]:
    """JSON of a merge."""
    fields: dict[str, object] = {
        "outcome": summary.outcome,
        "branch": summary.branch,
        "ours": summary.ours.hex() if summary.ours else None,
        "theirs": summary.theirs.hex(),
        "commit": summary.commit.hex() if summary.commit else None,
        "dry_run": dry_run,
        "conflicts": [conflict_fields(conflict) for conflict in summary.conflicts],
        "files_changed": len(summary.changes),
        **tree_fields(summary),
    }
    if dry_run:
        fields["changes"] = [change_fields(change) for change in summary.changes]
    return fields


def _print_abort(invocation: Invocation, summary: "MergeSummary") -> int:
    code = tree_exit_code(summary)
    if invocation.as_json:
        fields = merge_fields(summary, dry_run=invocation.dry_run)
        invocation.summary({**fields, "outcome": "aborted", "exit_code": code})
    elif invocation.dry_run:
        for change in summary.changes:
            invocation.result(change_line(change))
    else:
        invocation.talk(f"the merge is over; {summary.branch} is as it was before")
        tell_tree(invocation, summary)
    return code


# --- conflicts ---------------------------------------------------------------------------------


@click.command(
    "conflicts", cls=DmCommand, epilog="Example: dm conflicts --rows __default__/shop.db"
)
@click.argument("path", required=False, type=FILE_NAME)
@click.option(
    "--rows", is_flag=True, help="Show conflicting rows of databases: base, ours, theirs."
)
@query_options
@click.pass_obj
def conflicts_command(invocation: Invocation, path: str | None, rows: bool) -> None:
    """List the conflicts of the merge under way, and how those that are over were resolved."""
    from dmsync.engine.merging.state import list_conflicts
    from dmsync.errors import PathNotFound

    with invocation.open_store() as store:
        dot = invocation.resolve_dot(store)
        found = list_conflicts(store, dot.dot)
        merge = store.catalog.merge(dot.dot, store.catalog.head(dot.dot))
    if path is not None:
        wanted = _path_bytes(path)
        found = [c for c in found if wanted in (c.path, *c.also)]
        if not found:
            raise PathNotFound(f"no conflict at {output.escape_name(wanted)}")
    if invocation.as_json:
        invocation.document([conflict_fields(conflict, rows=rows) for conflict in found])
        return
    for conflict in found:
        state = f" (resolved: {conflict.resolved})" if conflict.resolved else ""
        text = conflict_text(conflict, merge.theirs if merge else None)
        output.write_line(f"{text}{state}")
        if rows and conflict.resolved is None:
            for row in conflict.rows:
                for line in _row_lines(row):
                    output.write_line(f"  {line}")
    if not found:
        invocation.talk("no conflicts")


def _row_lines(row: "RowConflict") -> Sequence[str]:
    """The three states of a row; the key as `dm resolve --row` takes it."""
    from dmsync.engine.databases.sqlite_values import row_to_json

    def text(value: object) -> str:
        return "(no row)" if value is None else output.json_text(value)

    return (
        f"{output.escape_name(row.table)} {output.json_text(row_to_json(row.key))}: "
        f"{output.escape_name(row.reason)}",
        f"  columns {output.json_text(list(row.columns))}",
        f"  base    {text(row_to_json(row.base))}",
        f"  ours    {text(row_to_json(row.ours))}",
        f"  theirs  {text(row_to_json(row.theirs))}",
    )


def conflict_fields(conflict: "ConflictInfo", *, rows: bool = False) -> dict[str, object]:
    """JSON of one conflict."""
    fields: dict[str, object] = {
        **output.path_fields(conflict.path),
        "reason": conflict.reason,
        "scope": conflict.scope,
        "sides": list(conflict.sides),
        "copies": [{"side": c.side, **output.path_fields(c.path)} for c in conflict.copies],
        "also": [output.path_fields(path) for path in conflict.also],
        "rows_open": 0 if conflict.resolved else len(conflict.rows),
        "resolved": conflict.resolved,
    }
    if rows:
        fields["rows"] = [row.to_json() for row in conflict.rows]
    return fields


# --- resolve -----------------------------------------------------------------------------------


@click.command(
    "resolve",
    cls=DmCommand,
    epilog="Example: dm resolve __default__/shop.db --row orders 7 --theirs",
)
@click.argument("paths", metavar="PATH...", nargs=-1, type=FILE_NAME)
@click.option("--all", "every", is_flag=True, help="All conflicts that are open.")
@click.option("--ours", "ours", is_flag=True, help="As our side has it.")
@click.option("--theirs", "theirs", is_flag=True, help="As the other side has it.")
@click.option("--base", "base", is_flag=True, help="As it was before both changed it.")
@click.option("--as-is", "as_is", is_flag=True, help="As it stands in the tree now.")
@click.option(
    "--row", nargs=2, metavar="TABLE KEY", help="One row of the database at PATH (KEY: JSON)."
)
@in_use_option
@changing_options
@click.pass_obj
def resolve_command(
    invocation: Invocation,
    paths: tuple[str, ...],
    *,
    every: bool,
    ours: bool,
    theirs: bool,
    base: bool,
    as_is: bool,
    row: tuple[str, str] | None,
    in_use: bool,
) -> int:
    """Decide conflicts, each as a whole, or row by row; the versions beside the path go then.

    What the tree held before is stored first (`dm stash list`). A version that you changed stays.
    """
    from dmsync.engine.merging.resolution import resolve_conflicts, resolve_row

    given = {"ours": ours, "theirs": theirs, "base": base, "as-is": as_is}
    wishes = [name for name, is_given in given.items() if is_given]
    if len(wishes) != 1:
        raise UsageError("one of --ours, --theirs, --base, --as-is")
    how = wishes[0]
    if every == bool(paths):
        raise UsageError("PATH..., or --all for every open conflict", hint="dm conflicts")
    if row is not None and (len(paths) != 1 or how == "as-is"):
        raise UsageError("--row goes with one PATH and --ours, --theirs or --base")
    wanted = None if every else [_path_bytes(path) for path in paths]
    with invocation.open_store() as store:
        dot = invocation.resolve_dot(store)
        with invocation.progress(f"resolving in {dot.name}") as progress:
            if row is not None:
                assert wanted is not None
                done = resolve_row(
                    store,
                    dot,
                    wanted[0],
                    row[0],
                    _key(row[1]),
                    cast("RowSide", how),
                    progress,
                    in_use=in_use,
                    dry_run=invocation.dry_run,
                )
            else:
                done = resolve_conflicts(
                    store,
                    dot,
                    wanted,
                    cast("How", how),
                    progress,
                    in_use=in_use,
                    dry_run=invocation.dry_run,
                )
    _print_resolved(invocation, done)
    return 0


def _path_bytes(path: str) -> bytes:
    return path.encode("utf-8", "surrogateescape")


def _key(text: str) -> Sequence[Any]:
    """A row's key as `dm conflicts --rows` prints it: a JSON array, or its single value as it is.

    Raises:
        UsageError: an array that holds no values of rows.
    """
    from dmsync.engine.databases.sqlite_values import row_from_json

    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return (text,)
    if not isinstance(value, list):
        return (text,)
    try:
        return row_from_json(value) or ()
    except ValueError as exc:
        raise UsageError(f"not a row's key: {output.escape_name(text)}") from exc


def _print_resolved(invocation: Invocation, summary: "ResolveSummary") -> None:
    if invocation.as_json:
        invocation.summary(
            {
                "resolved": [output.path_fields(path) for path in summary.paths],
                "how": summary.how,
                "conflicts_left": summary.left,
                "rows_left": summary.rows_left,
                "kept": [output.path_fields(path) for path in summary.kept],
                "stash": summary.stash,
                "dry_run": invocation.dry_run,
            }
        )
        return
    if invocation.dry_run:
        for path in summary.paths:
            invocation.result(f"would resolve {output.escape_name(path)}: {summary.how}")
        return
    for path in summary.kept:
        invocation.warn(f"{output.escape_name(path)} was changed since the merge: it stays")
    if summary.rows_left:
        invocation.talk(f"{output.counted(summary.rows_left, 'row')} to decide there")
    if summary.stash is not None and invocation.verbose:
        invocation.talk(f"what the tree held before is kept as {summary.stash}")
    if summary.left:
        invocation.talk(f"{output.counted(summary.left, 'conflict')} left (dm conflicts)")
    else:
        invocation.talk("all conflicts are resolved: dm merge --continue")
