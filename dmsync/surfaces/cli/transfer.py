"""`dm transfer list|show`: running and past transfers."""

from typing import TYPE_CHECKING

import click

from dmsync.errors import NotFound, UsageError
from dmsync.surfaces.cli import output
from dmsync.surfaces.cli.invocation import DmCommand, Invocation, query_options

if TYPE_CHECKING:
    from dmsync.engine.store import Store
    from dmsync.storage.catalog import TransferRow

_HEADINGS = ("ID", "WHEN", "DIRECTION", "REMOTE", "DOT", "STATUS")
_SHOWN_DIGITS = output.SHORT_ID_DIGITS


@click.group("transfer", epilog="Example: dm transfer list")
def transfer_command() -> None:
    """Show running and past transfers."""


@transfer_command.command("list", cls=DmCommand, epilog="Example: dm transfer list -n 10")
@click.option("-n", "count", type=click.IntRange(1), default=50, metavar="N", help="Newest N.")
@query_options
@click.pass_obj
def list_command(invocation: Invocation, count: int) -> None:
    """List transfers, newest first."""
    with invocation.open_store() as store:
        rows = [_fields(store, row) for row in store.catalog.transfers()][:count]
    if invocation.as_json:
        invocation.document(rows)
        return
    lines = [
        (
            str(row["id"])[:_SHOWN_DIGITS],
            str(row["started"])[:19],
            str(row["direction"]),
            output.escape_name(str(row["remote"])),
            _dot_text(row),
            str(row["status"]),
        )
        for row in rows
    ]
    for line in output.table([_HEADINGS, *lines]):
        output.write_line(line)


@transfer_command.command("show", cls=DmCommand, epilog="Example: dm transfer show 3f2a")
@click.argument("transfer", metavar="ID")
@query_options
@click.pass_obj
def show_command(invocation: Invocation, transfer: str) -> None:
    """Show one transfer; ID may be shortened."""
    if not transfer or set(transfer.lower()) - set("0123456789abcdef"):
        raise UsageError(f"{transfer} is no transfer id: it has hexadecimal digits only")
    with invocation.open_store() as store:
        rows = store.catalog.transfers()
        found = [row for row in rows if row.transfer_id.hex().startswith(transfer.lower())]
        if len(found) != 1:
            kind = "several transfers begin so" if found else "no such transfer"
            raise NotFound(f"{kind}: {transfer}", hint="dm transfer list shows them")
        fields = _fields(store, found[0])
    if invocation.as_json:
        invocation.document(fields)
        return
    for name, value in fields.items():
        if name != "summary":
            output.write_line(f"{name}: {output.escape_name(str(value))}")
    summary = fields["summary"]
    assert isinstance(summary, dict)
    for name, value in summary.items():
        output.write_line(f"{output.escape_name(name)}: {output.escape_name(str(value))}")


def _dot_text(row: dict[str, object]) -> str:
    branch = f"@{row['branch']}" if row["branch"] else ""
    return output.escape_name(f"{row['dot'] or ''}{branch}")


def _fields(store: "Store", row: "TransferRow") -> dict[str, object]:
    from dmsync.engine.transfers import transfer_status

    dot = None if row.dot is None else store.catalog.dot(row.dot)
    name = None if row.dot is None else row.dot.hex()
    return {
        "id": row.transfer_id.hex(),
        "started": output.iso_date(row.started_ns),
        "finished": None if row.finished_ns is None else output.iso_date(row.finished_ns),
        "direction": row.direction,
        "remote": row.remote,
        "dot": name if dot is None else dot.name,
        "branch": row.branch,
        "status": transfer_status(store.layout, row),
        "summary": dict(row.summary),
    }
