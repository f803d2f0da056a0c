"""`dm branch`, `dm checkout`, `dm reset`: lines of history and which one the tree holds."""

from typing import TYPE_CHECKING

import click

from dmsync.errors import UsageError
from dmsync.surfaces.cli import output
from dmsync.surfaces.cli.changes import change_fields, change_line
from dmsync.surfaces.cli.completions import BRANCH, NEW_NAME_AND_REVISION, REVISION
from dmsync.surfaces.cli.invocation import DmCommand, Invocation, changing_options
from dmsync.surfaces.cli.switching import (
    switching_options,
    tell_stash,
    tell_tree,
    tree_exit_code,
    tree_fields,
)

if TYPE_CHECKING:
    from dmsync.engine.branches import SwitchSummary
    from dmsync.engine.store import Store
    from dmsync.storage.catalog import DotRow


@click.command("branch", cls=DmCommand, epilog="Example: dm branch before-upgrade HEAD~2")
@click.argument("arguments", metavar="[NAME [REV]]", nargs=-1, type=NEW_NAME_AND_REVISION)
@click.option("-d", "--delete", "delete", type=BRANCH, metavar="NAME", help="Delete a branch.")
@click.option(
    "-m", "--move", "move", nargs=2, type=BRANCH, metavar="OLD NEW", help="Rename a branch."
)
@click.option("--contains", type=REVISION, metavar="REV", help="List only branches that hold REV.")
@click.option("--no-contains", type=REVISION, metavar="REV", help="List only those that do not.")
@click.option(
    "--merged",
    is_flag=False,
    flag_value="HEAD",
    type=REVISION,
    metavar="[REV]",
    help="List only branches that REV (HEAD) holds.",
)
@click.option(
    "--no-merged",
    is_flag=False,
    flag_value="HEAD",
    type=REVISION,
    metavar="[REV]",
    help="List only those that it does not.",
)
@changing_options
@click.pass_obj
def branch_command(
    invocation: Invocation,
    arguments: tuple[str, ...],
    delete: str | None,
    move: tuple[str, str] | None,
    contains: str | None,
    no_contains: str | None,
    merged: str | None,
    no_merged: str | None,
) -> None:
    """List the branches (* marks the current one), or make one at REV (default HEAD).

    -v shows tips and numbers of commits. The commits of a deleted branch stay until the grace is
    over.
    """
    filters = {
        "contains": contains,
        "lacks": no_contains,
        "merged_into": merged,
        "not_merged_into": no_merged,
    }
    is_filtered = any(revision is not None for revision in filters.values())
    asked = [bool(arguments), delete is not None, move is not None, is_filtered]
    if sum(asked) > 1 or len(arguments) > 2:
        raise click.UsageError(
            "one of: nothing or filters, NAME [REV], -d NAME, -m OLD NEW",
            ctx=click.get_current_context(),
        )
    with invocation.open_store() as store:
        dot = invocation.resolve_dot(store)
        if delete is not None:
            _delete(invocation, store, dot, delete)
        elif move is not None:
            _rename(invocation, store, dot, *move)
        elif arguments:
            _create(invocation, store, dot, *arguments)
        else:
            _list(invocation, store, dot, filters if is_filtered else None)


def _list(
    invocation: Invocation,
    store: "Store",
    dot: "DotRow",
    filters: dict[str, str | None] | None,
) -> None:
    from dmsync.engine.branches import BranchFilter, list_branches

    wanted = None if filters is None else BranchFilter(**filters)
    count = invocation.as_json or bool(invocation.verbose)
    branches = list_branches(store, dot, wanted, count=count)
    if invocation.as_json:
        invocation.document(
            [
                {
                    "name": branch.name,
                    "tip": branch.tip.hex() if branch.tip else None,
                    "current": branch.current,
                    "commits": branch.commits,
                    "origin": branch.origin,
                }
                for branch in branches
            ]
        )
        return
    for branch in branches:
        line = f"{'*' if branch.current else ' '} {branch.name}"
        if invocation.verbose:
            tip = branch.tip.hex()[: output.SHORT_ID_DIGITS] if branch.tip else "no commits yet"
            line += f" {tip} {output.counted(branch.commits or 0, 'commit')}"
        output.write_line(line)


def _create(
    invocation: Invocation,
    store: "Store",
    dot: "DotRow",
    name: str,
    revision: str | None = None,
) -> None:
    from dmsync.core.names import check_branch_name
    from dmsync.engine.branches import create_branch
    from dmsync.engine.history import resolve_revision
    from dmsync.errors import AlreadyExists

    if invocation.dry_run:
        check_branch_name(name)
        if store.catalog.branch(dot.dot, name) is not None:
            raise AlreadyExists(f"Branch already exists: {name}")
        tip = resolve_revision(store, dot, revision or "HEAD")
        invocation.talk(f"would make branch {name} at {tip.hex()}")
    else:
        tip = create_branch(store, dot, name, revision)
    if invocation.as_json:
        invocation.summary({"branch": name, "tip": tip.hex()})


def _delete(invocation: Invocation, store: "Store", dot: "DotRow", name: str) -> None:
    from dmsync.engine.branches import delete_branch
    from dmsync.errors import RevisionNotFound

    if invocation.dry_run:
        row = store.catalog.branch(dot.dot, name)
        if row is None:
            raise RevisionNotFound(f"Branch does not exist: {name}")
        tip, stash = row.target, None
        invocation.talk(f"would delete branch {name} ({tip.hex()})")
    else:
        tip, stash = delete_branch(store, dot, name)
        if not invocation.as_json:
            invocation.talk(f"Deleted branch {name} (was {tip.hex()})")
            tell_stash(invocation, stash)
    if invocation.as_json:
        invocation.summary({"branch": name, "tip": tip.hex(), "stash": stash})


def _rename(invocation: Invocation, store: "Store", dot: "DotRow", old: str, new: str) -> None:
    from dmsync.core.names import check_branch_name
    from dmsync.engine.branches import rename_branch
    from dmsync.errors import AlreadyExists, RevisionNotFound

    if invocation.dry_run:
        check_branch_name(new)
        if store.catalog.branch(dot.dot, old) is None:
            raise RevisionNotFound(f"Branch does not exist: {old}")
        if store.catalog.branch(dot.dot, new) is not None:
            raise AlreadyExists(f"Branch already exists: {new}")
        invocation.talk(f"would rename branch {old} to {new}")
    else:
        rename_branch(store, dot, old, new)
    if invocation.as_json:
        invocation.summary({"old": old, "new": new})


@click.command("checkout", cls=DmCommand, epilog="Example: dm checkout -b experiment HEAD~1")
@click.argument("branch", type=BRANCH)
@click.argument("revision", metavar="[REV]", required=False, type=REVISION)
@click.option("-b", "--create", is_flag=True, help="Make the branch, at REV (default HEAD).")
@click.option("--carry", is_flag=True, help="Take the uncommitted changes along.")
@switching_options
@changing_options
@click.pass_obj
def checkout_command(
    invocation: Invocation,
    branch: str,
    revision: str | None,
    create: bool,
    carry: bool,
    discard: bool,
    accept_moved_tree: bool,
    trusted: bool,
    in_use: bool,
) -> int:
    """Switch the dot to another branch.

    Uncommitted changes stay with the branch that is left and come back with it. With --carry they
    become the other branch's; where they do not fit, nothing is changed (exit code 15).
    """
    from dmsync.engine.branches import checkout

    if carry and discard:
        raise UsageError("--carry takes the changes along and --discard gives them up: choose")
    with invocation.open_store() as store:
        dot = invocation.resolve_dot(store)
        with invocation.progress(f"checking out {branch}") as progress:
            if carry:
                from dmsync.engine.carrying import CarryRequest, checkout_carrying

                request = CarryRequest(
                    branch, create, revision, accept_moved_tree, trusted, in_use, invocation.dry_run
                )
                summary = checkout_carrying(store, dot, request, progress)
                return _print_switch(invocation, summary, f"Switched to branch {summary.branch}")
            summary = checkout(
                store,
                dot,
                branch,
                create=create,
                revision=revision,
                discard=discard,
                accept_moved_tree=accept_moved_tree,
                trusted=trusted,
                in_use=in_use,
                dry_run=invocation.dry_run,
                progress=progress,
            )
    return _print_switch(invocation, summary, f"Switched to branch {summary.branch}")


@click.command("reset", cls=DmCommand, epilog="Example: dm reset --hard HEAD~1")
@click.argument("revision", metavar="REV", type=REVISION)
@click.option("--hard", is_flag=True, help="Also when uncommitted changes go (they are stored).")
@switching_options
@changing_options
@click.pass_obj
def reset_command(
    invocation: Invocation,
    revision: str,
    hard: bool,
    discard: bool,
    accept_moved_tree: bool,
    trusted: bool,
    in_use: bool,
) -> int:
    """Move the current branch, and its working tree, to REV.

    Refuses (exit code 18) when uncommitted changes would go, unless --hard. The commits left
    behind stay in the store until the grace is over.
    """
    from dmsync.engine.branches import reset

    with invocation.open_store() as store:
        dot = invocation.resolve_dot(store)
        with invocation.progress(f"resetting {dot.name}") as progress:
            summary = reset(
                store,
                dot,
                revision,
                hard=hard,
                discard=discard,
                accept_moved_tree=accept_moved_tree,
                trusted=trusted,
                in_use=in_use,
                dry_run=invocation.dry_run,
                progress=progress,
            )
    tip = summary.commit.hex() if summary.commit else "no commits"
    dropped = (
        f", {output.counted(summary.commits_dropped, 'commit')} left behind"
        if summary.commits_dropped
        else ""
    )
    return _print_switch(invocation, summary, f"{summary.branch} is now at {tip}{dropped}")


def _print_switch(invocation: Invocation, summary: "SwitchSummary", done: str) -> int:
    """Tell what a switch did; returns the exit code."""
    code = tree_exit_code(summary)
    if invocation.as_json:
        fields = _json_fields(summary, dry_run=invocation.dry_run)
        invocation.summary({**fields, "exit_code": code})
        return code
    if invocation.dry_run:
        for change in summary.changes:
            invocation.result(change_line(change))
        count = output.counted(len(summary.changes), "change")
        invocation.talk(f"{count} to the working tree; nothing was done (dry run)")
        return 0
    invocation.talk(done)
    tell_tree(invocation, summary)
    return code


def _json_fields(summary: "SwitchSummary", *, dry_run: bool) -> dict[str, object]:
    fields: dict[str, object] = {
        "branch": summary.branch,
        "commit": summary.commit.hex() if summary.commit else None,
        "dry_run": dry_run,
        "commits_dropped": summary.commits_dropped,
        **tree_fields(summary),
    }
    if dry_run:
        fields["changes"] = [change_fields(change) for change in summary.changes]
    return fields
