"""`dm undo` and `dm redo`: take back what the last commands did."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from dmsync.errors import DmError, UsageError
from dmsync.surfaces.cli import output
from dmsync.surfaces.cli.invocation import DmCommand, Invocation, changing_options

if TYPE_CHECKING:
    from dmsync.engine.store import Store
    from dmsync.engine.undoing.lifecycle import TakenBack, UndoRequest

_IN_USE = click.option("--in-use", is_flag=True, help="Also while processes write in a tree.")
_TRUSTED = click.option(
    "--trusted", is_flag=True, help="Apply devices, setuid bits and capabilities too."
)


@click.command("undo", cls=DmCommand, epilog="Example: dm undo 2")
@click.argument("count", metavar="[N]", type=click.IntRange(1), default=1)
@click.option("--op", "operation", type=click.IntRange(1), metavar="SEQ", help="That operation.")
@_TRUSTED
@_IN_USE
@changing_options
@click.pass_obj
def undo_command(
    invocation: Invocation, count: int, operation: int | None, trusted: bool, in_use: bool
) -> None:
    """Take back the last command that changed something, or the last N, newest first.

    Branches, tags, dots, remotes, merges and working trees become what they were before it;
    uncommitted changes come back uncommitted. What a tree held beyond that is stored first, and
    dm redo brings it back. --dot takes back operations of that dot only, --op the operation SEQ of
    dm op log if nothing it changed moved since. Refused (exit code 18, nothing changed) when
    somebody moved a branch since, a name is taken, or content is gone.

    What cannot be brought back: what prune and gc gave up, what was purged or deleted when the
    trash was emptied, uncommitted changes that went with --discard, commits that a remote has
    after a push. Pushes received and what was seen at remotes are not taken back by themselves.
    """
    from dmsync.engine.undoing import lifecycle

    if operation is not None and count != 1:
        raise UsageError("--op takes back one operation: N does not go with it")
    with invocation.open_store() as store, invocation.progress("undoing") as progress:
        request = _request(invocation, store, trusted, in_use)
        if invocation.dry_run and operation is not None:
            found: Iterable[TakenBack] = lifecycle.would_undo_operation(store, operation)
        elif invocation.dry_run:
            found = lifecycle.would_undo(store, count, request)
        elif operation is not None:
            found = [lifecycle.undo_operation(store, operation, request, progress)]
        else:
            found = lifecycle.undo(store, count, request, progress)
        _tell_all(invocation, "undo", found)


@click.command("redo", cls=DmCommand, epilog="Example: dm redo")
@click.argument("count", metavar="[N]", type=click.IntRange(1), default=1)
@_TRUSTED
@_IN_USE
@changing_options
@click.pass_obj
def redo_command(invocation: Invocation, count: int, trusted: bool, in_use: bool) -> None:
    """Take back the last undo, or the last N: what it took back is done again.

    Trees become what they were before the undo, uncommitted changes included.
    """
    from dmsync.engine.undoing import lifecycle

    with invocation.open_store() as store, invocation.progress("redoing") as progress:
        request = _request(invocation, store, trusted, in_use)
        if invocation.dry_run:
            found: Iterable[TakenBack] = lifecycle.would_redo(store, count)
        else:
            found = lifecycle.redo(store, count, request, progress)
        _tell_all(invocation, "redo", found)


def _request(invocation: Invocation, store: "Store", trusted: bool, in_use: bool) -> "UndoRequest":
    from dmsync.engine.undoing.lifecycle import UndoRequest

    is_restricted = invocation.default_dot is not None
    dot = invocation.resolve_dot(store).dot if is_restricted else None
    return UndoRequest(dot=dot, in_use=in_use, trusted=trusted)


def _tell_all(invocation: Invocation, what: str, found: Iterable["TakenBack"]) -> None:
    told: list[TakenBack] = []
    with _telling_how_far(invocation, what, told):
        for taken in found:
            told.append(taken)
            _tell(invocation, what, taken)
    if invocation.as_json:
        invocation.summary(_summary(invocation, told))


@contextmanager
def _telling_how_far(invocation: Invocation, what: str, told: list["TakenBack"]) -> Iterator[None]:
    """What was done before a refusal is done: the summary and the error both say so."""
    try:
        yield
    except DmError as error:
        if told:
            done = f"{len(told)} taken back" if what == "undo" else f"{len(told)} done again"
            error.message = f"{done}, then: {error.message}"
            if invocation.as_json:
                invocation.summary(_summary(invocation, told))
        raise


def _tell(invocation: Invocation, what: str, taken: "TakenBack") -> None:
    if invocation.as_json:
        return
    would = "would " if invocation.dry_run else ""
    invocation.result(f"{would}{what} {output.escape_name(taken.command)} ({taken.operation})")
    for fact in taken.facts if invocation.verbose else taken.in_short:
        invocation.result(f"  {output.escape_name(fact)}")
    for stash in taken.stashes:
        invocation.talk(f"what the tree held is kept as {stash}; dm redo brings it back")
    for remark in taken.remarks:
        invocation.warn(remark)
    left = len(taken.withheld) + len(taken.unapplied)
    if left:
        invocation.warn(
            f"{output.counted(left, 'path')} could not be given all of what is recorded; "
            "--trusted applies what this user may"
        )


def _summary(invocation: Invocation, told: list["TakenBack"]) -> dict[str, object]:
    return {
        "dry_run": invocation.dry_run,
        "operations": [
            {
                "seq": taken.operation,
                "command": taken.command,
                "facts": list(taken.facts),
                "stashes": list(taken.stashes),
                "remarks": list(taken.remarks),
                "discarded": taken.discarded,
                "withheld": [output.path_fields(path) for path in taken.withheld],
                "unapplied": [output.path_fields(path) for path in taken.unapplied],
            }
            for taken in told
        ],
    }
