"""`dm branch`, `dm checkout`, `dm reset`: lines of history and which one the tree holds."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import click

from dmsync.surfaces.cli import output
from dmsync.surfaces.cli.changes import change_fields, change_line
from dmsync.surfaces.cli.invocation import DmCommand, Invocation, changing_options

if TYPE_CHECKING:
    from dmsync.engine.branches import SwitchSummary
    from dmsync.engine.store import Store
    from dmsync.storage.catalog import DotRow


@click.command("branch", cls=DmCommand, epilog="Example: dm branch before-upgrade HEAD~2")
@click.argument("arguments", metavar="[NAME [REV]]", nargs=-1)
@click.option("-d", "--delete", "delete", metavar="NAME", help="Delete a branch.")
@click.option("-m", "--move", "move", nargs=2, metavar="OLD NEW", help="Rename a branch.")
@changing_options
@click.pass_obj
def branch_command(
    invocation: Invocation,
    arguments: tuple[str, ...],
    delete: str | None,
    move: tuple[str, str] | None,
) -> None:
    """List the branches (* marks the current one), or make one at REV (default HEAD).

    The commits of a deleted branch stay until the grace is over.
    """
    asked = [bool(arguments), delete is not None, move is not None]
    if sum(asked) > 1 or len(arguments) > 2:
        raise click.UsageError(
            "one of: nothing, NAME [REV], -d NAME, -m OLD NEW", ctx=click.get_current_context()
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
            _list(invocation, store, dot)


def _list(invocation: Invocation, store: "Store", dot: "DotRow") -> None:
    from dmsync.engine.branches import list_branches

    branches = list_branches(store, dot)
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
            line += f" {tip}"
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
            _tell_stash(invocation, stash)
    if invocation.as_json:
        invocation.summary({"branch": name, "tip": tip.hex(), "stash": stash})


def _tell_stash(invocation: Invocation, stash: str | None) -> None:
    if stash is not None:
        invocation.talk(f"the uncommitted changes are kept as {stash} (dm reset --hard {stash})")


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
@click.argument("branch")
@click.argument("revision", metavar="[REV]", required=False)
@click.option("-b", "--create", is_flag=True, help="Make the branch, at REV (default HEAD).")
@click.option("--discard", is_flag=True, help="Do not keep the uncommitted state left behind.")
@click.option("--accept-moved-tree", is_flag=True, help="DIR may be another directory, or gone.")
@click.option("--trusted", is_flag=True, help="Apply devices, setuid bits and capabilities too.")
@click.option("--in-use", is_flag=True, help="Also while processes write in the tree.")
@changing_options
@click.pass_obj
def checkout_command(
    invocation: Invocation,
    branch: str,
    revision: str | None,
    create: bool,
    discard: bool,
    accept_moved_tree: bool,
    trusted: bool,
    in_use: bool,
) -> int:
    """Switch the dot to another branch.

    Uncommitted changes stay with the branch that is left and come back with it.
    """
    from dmsync.engine.branches import checkout

    with invocation.open_store() as store:
        dot = invocation.resolve_dot(store)
        with invocation.progress(f"checking out {branch}") as progress:
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
@click.argument("revision", metavar="REV")
@click.option("--hard", is_flag=True, help="Also when uncommitted changes go (they are stored).")
@click.option("--discard", is_flag=True, help="Do not store the uncommitted changes that go.")
@click.option("--accept-moved-tree", is_flag=True, help="DIR may be another directory, or gone.")
@click.option("--trusted", is_flag=True, help="Apply devices, setuid bits and capabilities too.")
@click.option("--in-use", is_flag=True, help="Also while processes write in the tree.")
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


_WITH_WARNINGS: Final = 3


def _print_switch(invocation: Invocation, summary: "SwitchSummary", done: str) -> int:
    """Tell what a switch did; returns the exit code."""
    code = _WITH_WARNINGS if summary.withheld or summary.unapplied else 0
    if invocation.as_json:
        fields = _json_fields(summary, dry_run=invocation.dry_run)
        invocation.summary({**fields, "exit_code": code})
        return code
    if invocation.dry_run:
        for change in summary.changes:
            invocation.result(change_line(change))
        return 0
    invocation.talk(done)
    _warn_not_applied(invocation, "devices were not made", summary.withheld)
    _warn_not_applied(
        invocation, "paths have not all of their owner, mode and attributes", summary.unapplied
    )
    _tell_stash(invocation, summary.stash)
    if invocation.verbose:
        invocation.talk(
            f"{summary.files_written} files written, {summary.files_removed} removed, "
            f"{output.human_size(summary.bytes_written)}"
        )
    return code


def _warn_not_applied(invocation: Invocation, what: str, paths: Sequence[bytes]) -> None:
    if paths:
        first = output.escape_name(paths[0])
        invocation.warn(
            f"{len(paths)} {what} ({first}{', ...' if len(paths) > 1 else ''}); "
            "they stay recorded, and --trusted applies what this user may"
        )


def _json_fields(summary: "SwitchSummary", *, dry_run: bool) -> dict[str, object]:
    fields: dict[str, object] = {
        "branch": summary.branch,
        "commit": summary.commit.hex() if summary.commit else None,
        "dry_run": dry_run,
        "commits_dropped": summary.commits_dropped,
        "stash": summary.stash,
        "files_written": summary.files_written,
        "files_removed": summary.files_removed,
        "bytes_written": summary.bytes_written,
        "withheld": [output.path_fields(path) for path in summary.withheld],
        "unapplied": [output.path_fields(path) for path in summary.unapplied],
    }
    if dry_run:
        fields["changes"] = [change_fields(change) for change in summary.changes]
    return fields
