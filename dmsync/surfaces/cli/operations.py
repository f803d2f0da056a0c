"""`dm reflog` and `dm op log|show|restore`: the history of the store itself."""

from typing import TYPE_CHECKING

import click

from dmsync.surfaces.cli import output
from dmsync.surfaces.cli.completions import BRANCH
from dmsync.surfaces.cli.invocation import (
    DmCommand,
    Invocation,
    changing_options,
    query_options,
)

if TYPE_CHECKING:
    from dmsync.engine.operations import OperationInfo
    from dmsync.engine.undoing.going_back import WentBack
    from dmsync.storage.catalog import ReflogRow

_WITH_WARNINGS = 3


@click.command("reflog", cls=DmCommand, epilog="Example: dm reflog -n 5 master")
@click.argument("name", metavar="[BRANCH]", required=False, type=BRANCH)
@click.option("-n", "--max-count", "newest", type=click.IntRange(0), metavar="N", help="Newest N.")
@query_options
@click.pass_obj
def reflog_command(invocation: Invocation, name: str | None, newest: int | None) -> None:
    """Show where a branch has been, newest first (default: the current branch).

    Also of tag/NAME, stash/NAME and remote/R/NAME, and of deleted ones. BRANCH@{n} is a revision.
    """
    from dmsync.engine.operations import ref_history

    with invocation.open_store() as store:
        dot = invocation.resolve_dot(store)
        full, changes = ref_history(store, dot, name, newest)
    if invocation.as_json:
        invocation.document([_change_fields(full, n, row) for n, row in enumerate(changes)])
        return
    short = full.removeprefix("branch/")
    for number, row in enumerate(changes):
        new = row.new.hex()[: output.SHORT_ID_DIGITS] if row.new else "-"
        reason = f" {output.escape_name(row.reason)}" if row.reason else ""
        output.write_line(
            f"{output.escape_name(short)}@{{{number}}} {new} {row.kind} "
            f"{output.iso_date(row.time_ns, _offset(row.time_ns))}{reason}"
        )


def _offset(time_ns: int) -> int:
    """The local offset from UTC at that time, in minutes."""
    import time

    return time.localtime(time_ns // 1_000_000_000).tm_gmtoff // 60


def _change_fields(ref: str, number: int, row: "ReflogRow") -> dict[str, object]:
    return {
        "ref": ref,
        "index": number,
        "old": row.old.hex() if row.old else None,
        "new": row.new.hex() if row.new else None,
        "kind": row.kind,
        "date": output.iso_date(row.time_ns, 0),
        "command": row.command,
        "actor": row.actor,
        "reason": row.reason,
        "seq": row.seq,
    }


@click.group("op", epilog="Example: dm op log -n 5")
def op_command() -> None:
    """Show what each command did to the store; go back to how it was after one."""


@op_command.command("log", cls=DmCommand, epilog="Example: dm op log -n 5")
@click.option("-n", "--max-count", "newest", type=click.IntRange(0), metavar="N", help="Newest N.")
@query_options
@click.pass_obj
def log_command(invocation: Invocation, newest: int | None) -> None:
    """List the operations of all dots, newest first: number, date, who, command, what it did.

    The number is what dm undo --op, dm op restore and --at-op take. -v lists bookkeeping too.
    """
    from dmsync.engine.operations import operation_log

    with invocation.open_store() as store:
        operations = operation_log(store, newest, everything=invocation.verbose > 0)
    if invocation.as_json:
        invocation.document([_operation_fields(info) for info in operations])
        return
    for info in operations:
        output.write_line(_head_line(info))
        for fact in info.facts:
            output.write_line(f"    {output.escape_name(fact)}")


def _head_line(info: "OperationInfo") -> str:
    row = info.row
    date = output.iso_date(row.time_ns, _offset(row.time_ns))
    actor = f" {output.escape_name(row.actor)}" if row.actor else ""
    mark = " (undone)" if info.taken_back is not None else ""
    return f"{row.first_seq} {date}{actor} {output.escape_name(row.command)}{mark}"


def _operation_fields(info: "OperationInfo") -> dict[str, object]:
    row = info.row
    return {
        "seq": row.first_seq,
        "last_seq": row.last_seq,
        "date": output.iso_date(row.time_ns, 0),
        "command": row.command,
        "actor": row.actor,
        "facts": list(info.facts),
        "undone": info.taken_back is not None,
        "undone_by": info.taken_back,
        "reverses": info.reverses,
        "is_redo": info.is_redo,
    }


@op_command.command("show", cls=DmCommand, epilog="Example: dm op show 42")
@click.argument("seq", type=click.IntRange(1))
@query_options
@click.pass_obj
def show_command(invocation: Invocation, seq: int) -> None:
    """Show one operation with all its events; SEQ may be the number of any of them."""
    from dmsync.engine.operations import operation_info

    with invocation.open_store() as store:
        info, operation = operation_info(store, seq)
    events = [(stored.seq, type(stored.event).__name__, stored.event) for stored in
              operation.stored_events()]  # fmt: skip
    if invocation.as_json:
        listed = [{"seq": n, "type": name, **_event_fields(event)} for n, name, event in events]
        invocation.document({**_operation_fields(info), "events": listed})
        return
    output.write_line(_head_line(info))
    for fact in info.facts:
        output.write_line(f"    {output.escape_name(fact)}")
    for number, name, event in events:
        values = ", ".join(f"{k}={v}" for k, v in _event_fields(event).items() if v is not None)
        output.write_line(f"  {number} {name} {output.escape_name(values)}".rstrip())


def _event_fields(event: object) -> dict[str, object]:
    """An event's fields as JSON has them: ids in hex, paths escaped."""
    from dataclasses import fields

    return {
        field.name: _plain(getattr(event, field.name))
        for field in fields(event)  # type: ignore[arg-type]
    }


def _plain(value: object) -> object:
    if isinstance(value, bytes):
        return output.escape_name(value) if value.startswith(b"/") else value.hex()
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


@op_command.command("restore", cls=DmCommand, epilog="Example: dm op restore -n 42")
@click.argument("seq", type=click.IntRange(1))
@click.option("--trusted", is_flag=True, help="Apply devices, setuid bits and capabilities too.")
@click.option("--in-use", is_flag=True, help="Also while processes write in a tree.")
@changing_options
@click.pass_obj
def restore_command(invocation: Invocation, seq: int, trusted: bool, in_use: bool) -> int:
    """Make branches, tags, dots, names and the current dot what they were after operation SEQ.

    Working trees follow their branches; uncommitted changes are stored as stashes first. Remotes
    stay as they are. It is one operation: dm undo takes it back.
    """
    from dmsync.engine.undoing.going_back import go_back

    with invocation.open_store() as store, invocation.progress("going back") as progress:
        done = go_back(
            store,
            seq,
            dry_run=invocation.dry_run,
            in_use=in_use,
            trusted=trusted,
            progress=progress,
        )
    return _tell(invocation, done)


def _tell(invocation: Invocation, done: "WentBack") -> int:
    code = _WITH_WARNINGS if done.withheld or done.unapplied else 0
    if invocation.as_json:
        invocation.summary(
            {
                "seq": done.seq,
                "dry_run": invocation.dry_run,
                "facts": list(done.facts),
                "remarks": list(done.remarks),
                "stashes": list(done.stashes),
                "withheld": [output.path_fields(path) for path in done.withheld],
                "unapplied": [output.path_fields(path) for path in done.unapplied],
                "exit_code": code,
            }
        )
        return code
    if invocation.dry_run:
        for remark in done.remarks:
            invocation.warn(remark)
    for fact in done.facts:
        invocation.result(output.escape_name(fact))
    for stash in done.stashes:
        invocation.talk(f"what a tree held is kept as {stash} (dm undo brings it back)")
    return code
