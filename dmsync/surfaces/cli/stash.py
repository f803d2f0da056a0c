"""`dm stash`: uncommitted changes put away and brought back."""

from typing import TYPE_CHECKING

import click

from dmsync.errors import NothingToDo, UsageError
from dmsync.surfaces.cli import output
from dmsync.surfaces.cli.changes import change_fields, change_line, stat_line
from dmsync.surfaces.cli.completions import STASH
from dmsync.surfaces.cli.conflicting import CONFLICTS, tell_conflicts
from dmsync.surfaces.cli.invocation import (
    DmCommand,
    Invocation,
    changing_options,
    query_options,
    write_options,
)
from dmsync.surfaces.cli.merge import conflict_fields
from dmsync.surfaces.cli.switching import tell_tree, tree_exit_code, tree_fields, tree_options

if TYPE_CHECKING:
    from dmsync.engine.stashes import Stash, StashSummary


class _StashGroup(click.Group):
    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        write_options(self, ctx, formatter)
        self.format_commands(ctx, formatter)


@click.group(
    "stash",
    cls=_StashGroup,
    invoke_without_command=True,
    epilog='Example: dm stash -m "half a migration" && dm pull vault && dm stash pop',
)
@click.option("-m", "--message", help="What is put away.")
@click.option("--fail-if-nothing", is_flag=True, help="Exit 4 when there are no changes.")
@tree_options
@changing_options
@click.pass_context
def stash_command(
    context: click.Context,
    message: str | None,
    fail_if_nothing: bool,
    accept_moved_tree: bool,
    trusted: bool,
    in_use: bool,
) -> int:
    """Put the uncommitted changes away, and bring them back; alone the same as dm stash push.

    A STASH is named by its number in the list, by its ref or the last part of that. Those that
    other commands made of what they took away are in the list too.
    """
    given = (message is not None, fail_if_nothing, accept_moved_tree, trusted, in_use)
    if context.invoked_subcommand is not None:
        if any(given):
            raise UsageError(
                "options of a stash command stand behind its name",
                hint=f"dm stash {context.invoked_subcommand} --help",
            )
        return 0
    return _push(context.obj, message, fail_if_nothing, accept_moved_tree, trusted, in_use)


@stash_command.command("push", cls=DmCommand, epilog="Example: dm stash push -m unfinished")
@click.option("-m", "--message", help="What is put away.")
@click.option("--fail-if-nothing", is_flag=True, help="Exit 4 when there are no changes.")
@tree_options
@changing_options
@click.pass_obj
def push_command(
    invocation: Invocation,
    message: str | None,
    fail_if_nothing: bool,
    accept_moved_tree: bool,
    trusted: bool,
    in_use: bool,
) -> int:
    """Store the uncommitted changes as a stash and make the working tree HEAD's again."""
    return _push(invocation, message, fail_if_nothing, accept_moved_tree, trusted, in_use)


def _push(
    invocation: Invocation,
    message: str | None,
    fail_if_nothing: bool,
    accept_moved_tree: bool,
    trusted: bool,
    in_use: bool,
) -> int:
    from dmsync.engine.stashes import TreeWishes, push_stash

    if message is not None and not message.strip():
        raise UsageError("the stash's message is empty", hint="leave -m out for one of its own")
    wishes = TreeWishes(accept_moved_tree, trusted, in_use)
    with invocation.open_store() as store:
        dot = invocation.resolve_dot(store)
        try:
            with invocation.progress(f"stashing {dot.name}") as progress:
                summary = push_stash(
                    store, dot, message or "", wishes, progress, dry_run=invocation.dry_run
                )
        except NothingToDo as nothing:
            if fail_if_nothing:
                raise
            invocation.talk(nothing.message)
            if invocation.as_json:
                invocation.summary({"stash": None, "changes": [], "exit_code": 0})
            return 0
    code = tree_exit_code(summary)
    if invocation.as_json:
        invocation.summary(
            {
                **_fields(summary, dry_run=invocation.dry_run),
                "stash": summary.name or None,
                "exit_code": code,
            }
        )
    elif invocation.dry_run:
        _print_changes(invocation, summary)
    else:
        invocation.result(summary.name)
        tell_tree(invocation, summary)
    return code


def _print_changes(invocation: Invocation, summary: "StashSummary") -> None:
    for change in summary.changes:
        invocation.result(change_line(change))


def _fields(summary: "StashSummary", *, dry_run: bool) -> dict[str, object]:
    return {
        **tree_fields(summary),
        "name": summary.name,
        "commit": summary.commit.hex(),
        "branch": summary.branch,
        "dry_run": dry_run,
        "changes": [change_fields(change) for change in summary.changes],
        "conflicts": [conflict_fields(conflict) for conflict in summary.conflicts],
        "dropped": summary.is_dropped,
    }


@stash_command.command("list", cls=DmCommand, epilog="Example: dm stash list --json")
@query_options
@click.pass_obj
def list_command(invocation: Invocation) -> None:
    """List the stashes, newest first: number, ref, branch, date, message."""
    from dmsync.engine.stashes import list_stashes

    with invocation.open_store() as store:
        dot = invocation.resolve_dot(store)
        stashes = list_stashes(store, dot.dot)
    if invocation.as_json:
        invocation.document([_stash_fields(stash) for stash in stashes])
        return
    for stash in stashes:
        subject = output.escape_name(stash.message.partition("\n")[0])
        date = output.human_date(stash.time_ns, stash.offset_minutes)
        branch = output.escape_name(stash.branch or "-")
        output.write_line(f"stash@{{{stash.number}}} {stash.name} {branch} {date} {subject}")


def _stash_fields(stash: "Stash") -> dict[str, object]:
    return {
        "number": stash.number,
        "name": stash.name,
        "commit": stash.commit.hex(),
        "parent": stash.parent.hex() if stash.parent else None,
        "branch": stash.branch,
        "date": output.iso_date(stash.time_ns, stash.offset_minutes),
        "message": stash.message,
    }


@stash_command.command("show", cls=DmCommand, epilog="Example: dm stash show 1 --stat")
@click.argument("stash", required=False, type=STASH)
@click.option("--stat", is_flag=True, help="Show sizes and a closing line of totals.")
@query_options
@click.pass_obj
def show_command(invocation: Invocation, stash: str | None, stat: bool) -> None:
    """Show what a stash (default: the newest) changes against the commit it was made on."""
    from dmsync.engine.stashes import stash_changes

    with invocation.open_store() as store:
        dot = invocation.resolve_dot(store)
        found, changes = stash_changes(store, dot, stash)
    if invocation.as_json:
        fields = [change_fields(change) for change in changes]
        invocation.document({**_stash_fields(found), "changes": fields})
        return
    for change in changes:
        output.write_line(change_line(change, stat=stat))
    if stat:
        output.write_line(stat_line(changes))


@stash_command.command("pop", cls=DmCommand, epilog="Example: dm stash pop")
@click.argument("stash", required=False, type=STASH)
@tree_options
@changing_options
@click.pass_obj
def pop_command(
    invocation: Invocation,
    stash: str | None,
    accept_moved_tree: bool,
    trusted: bool,
    in_use: bool,
) -> int:
    """Bring a stash (default: the newest) back into a clean tree, uncommitted, and drop it.

    Where the branch has moved on it is merged in; after conflicts (exit code 15) it stays.
    """
    wishes = (accept_moved_tree, trusted, in_use)
    return _apply(invocation, stash, wishes, drop=True)


@stash_command.command("apply", cls=DmCommand, epilog="Example: dm stash apply 2")
@click.argument("stash", required=False, type=STASH)
@tree_options
@changing_options
@click.pass_obj
def apply_command(
    invocation: Invocation,
    stash: str | None,
    accept_moved_tree: bool,
    trusted: bool,
    in_use: bool,
) -> int:
    """Bring a stash (default: the newest) back into a clean tree, uncommitted, and keep it."""
    wishes = (accept_moved_tree, trusted, in_use)
    return _apply(invocation, stash, wishes, drop=False)


def _apply(
    invocation: Invocation, stash: str | None, wishes: tuple[bool, bool, bool], *, drop: bool
) -> int:
    from dmsync.engine.stashes import TreeWishes, apply_stash

    with invocation.open_store() as store:
        dot = invocation.resolve_dot(store)
        with invocation.progress(f"applying a stash to {dot.name}") as progress:
            summary = apply_stash(
                store,
                dot,
                stash,
                TreeWishes(*wishes),
                progress,
                drop=drop,
                dry_run=invocation.dry_run,
            )
    return _print_applied(invocation, summary)


def _print_applied(invocation: Invocation, summary: "StashSummary") -> int:
    code = CONFLICTS if summary.conflicts else tree_exit_code(summary)
    if invocation.as_json:
        fields = _fields(summary, dry_run=invocation.dry_run)
        invocation.summary({**fields, "exit_code": code})
        return code
    _print_changes(invocation, summary)
    if summary.conflicts:
        after = f"; {summary.name} is kept (dm stash drop {summary.name})"
        tell_conflicts(invocation, summary.conflicts, summary.commit, after)
    elif not invocation.dry_run:
        invocation.talk(
            f"{summary.name} {'is back and dropped' if summary.is_dropped else 'is back'}"
        )
        tell_tree(invocation, summary)
    return code


@stash_command.command("drop", cls=DmCommand, epilog="Example: dm stash drop 0")
@click.argument("stash", type=STASH)
@changing_options
@click.pass_obj
def drop_command(invocation: Invocation, stash: str) -> None:
    """Give a stash up; dm undo brings it back."""
    from dmsync.engine.stashes import drop_stash

    with invocation.open_store() as store:
        dot = invocation.resolve_dot(store)
        dropped = drop_stash(store, dot, stash, dry_run=invocation.dry_run)
    if invocation.as_json:
        invocation.summary({**_stash_fields(dropped), "dry_run": invocation.dry_run})
        return
    verb = "would drop" if invocation.dry_run else "dropped"
    invocation.talk(f"{verb} {dropped.name} ({dropped.commit.hex()})")


@stash_command.command("branch", cls=DmCommand, epilog="Example: dm stash branch experiment 0")
@click.argument("name")
@click.argument("stash", required=False, type=STASH)
@tree_options
@changing_options
@click.pass_obj
def branch_command(
    invocation: Invocation,
    name: str,
    stash: str | None,
    accept_moved_tree: bool,
    trusted: bool,
    in_use: bool,
) -> int:
    """Make a branch where a stash was made, switch to it with the stash in its tree, and drop it.

    Uncommitted changes of the branch that is left stay with it.
    """
    from dmsync.engine.stashes import TreeWishes, branch_stash

    wishes = TreeWishes(accept_moved_tree, trusted, in_use)
    with invocation.open_store() as store:
        dot = invocation.resolve_dot(store)
        with invocation.progress(f"making branch {name}") as progress:
            summary = branch_stash(
                store, dot, name, stash, wishes, progress, dry_run=invocation.dry_run
            )
    return _print_applied(invocation, summary)
