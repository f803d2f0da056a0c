"""`dm status` and `dm diff`: what is different."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from dmsync.surfaces.cli import output
from dmsync.surfaces.cli.changes import change_fields, change_line, stat_line
from dmsync.surfaces.cli.invocation import DmCommand, Invocation, query_options

if TYPE_CHECKING:
    from dmsync.engine.differences import Change
    from dmsync.engine.store import Store
    from dmsync.storage.catalog import DotRow


@click.command("status", cls=DmCommand, epilog="Example: dm status --json")
@click.option("--stat", is_flag=True, help="Show sizes too.")
@query_options
@click.pass_obj
def status_command(invocation: Invocation, stat: bool) -> None:
    """Show the current branch and its uncommitted changes: + new, - gone, * changed, R renamed."""
    from dmsync.engine.trees import status

    with invocation.open_store() as store:
        dot = invocation.resolve_dot(store)
        report = status(store, dot.dot)
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
                "changes": [change_fields(change) for change in report.changes],
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
    for change in report.changes:
        output.write_line(change_line(change, stat=stat))
    if stat:
        output.write_line(stat_line(report.changes))
    if not report.materialised:
        invocation.talk("no working tree here yet; dm dot path makes it")
    elif not report.changes:
        invocation.talk("nothing to commit, working tree clean")


@click.command("diff", cls=DmCommand, epilog="Example: dm diff HEAD~1 HEAD --stat")
@click.argument("revisions", metavar="[REV [REV]]", nargs=-1)
@click.option("--stat", is_flag=True, help="Show sizes and a closing line of totals.")
@query_options
@click.pass_obj
def diff_command(invocation: Invocation, revisions: tuple[str, ...], stat: bool) -> None:
    """Show what differs: the working tree from HEAD, or from REV, or one REV from another.

    A range A..B is the same as A B.
    """
    old, new = _two_revisions(revisions)
    with invocation.open_store() as store:
        dot = invocation.resolve_dot(store)
        changes = _differences(store, dot, old, new)
    if invocation.as_json:
        invocation.document([change_fields(change) for change in changes])
        return
    for change in changes:
        output.write_line(change_line(change, stat=stat))
    if stat:
        output.write_line(stat_line(changes))


def _differences(
    store: "Store", dot: "DotRow", old: str | None, new: str | None
) -> "Sequence[Change]":
    from dmsync.engine.history import changes_between, resolve_revision
    from dmsync.engine.trees import require_place, status, tree_changes

    if old is None:
        return status(store, dot.dot).changes
    base = resolve_revision(store, dot, old)
    if new is not None:
        return changes_between(store, dot.dot, base, resolve_revision(store, dot, new))
    place = require_place(store, dot.dot, store.catalog.head(dot.dot))
    return tree_changes(store, dot.dot, place, store.root(dot.dot, base))


def _two_revisions(revisions: tuple[str, ...]) -> tuple[str | None, str | None]:
    if len(revisions) > 2:
        raise click.UsageError("at most two revisions", ctx=click.get_current_context())
    if len(revisions) == 1 and ".." in revisions[0] and "..." not in revisions[0]:
        old, new = revisions[0].split("..")
        return old or "HEAD", new or "HEAD"
    return (*revisions, None, None)[0], (*revisions, None, None)[1]
