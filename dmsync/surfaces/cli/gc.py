"""`dm gc`: remove what nothing needs any more."""

from typing import TYPE_CHECKING, Final

import click

from dmsync.surfaces.cli import output
from dmsync.surfaces.cli.completions import DOT
from dmsync.surfaces.cli.invocation import DmCommand, Invocation, changing_options

if TYPE_CHECKING:
    from dmsync.engine.collecting.collection import CollectionReport, DotCollection
    from dmsync.engine.collecting.leftovers import Removed

WARNED_EXIT: Final = 3
"""Done, but not with everything that was asked for."""


@click.command("gc", cls=DmCommand, epilog="Example: dm gc --dry-run && dm gc --grace 7d")
@click.argument("dot", required=False, type=DOT)
@click.option(
    "--grace",
    metavar="DURATION",
    help="How long undo can bring things back: 14d (default), 36h, 2w; 0: not at all.",
)
@changing_options
@click.pass_obj
def gc_command(invocation: Invocation, dot: str | None, grace: str | None) -> int:
    """Free the space of what nothing needs: of all dots and the store, or of DOT alone.

    Whatever branches, tags, stashes, remotes' branches, uncommitted states, merges and transfers
    under way name stays, with all history below it. What only the operations of the grace name
    stays too, so that undo works; time is counted between operations, at most a day for each, so
    that a wrong clock deletes nothing. The rest goes: commits that nothing names, the content of
    pruned ones, deleted dots, remains of killed commands. Undo cannot bring it back.

    Safe beside every other command, a second gc and a kill; works on a full disk. A dot that others
    use for longer than --lock-wait is left out, named, and makes the exit code 3. The configuration
    sets the default: [gc] grace = "14d".
    """
    from dmsync.core.durations import parse_grace
    from dmsync.engine.collecting.collection import CollectionRequest, collect

    grace_ns = parse_grace(invocation.settings.gc_grace if grace is None else grace)
    request = CollectionRequest(grace_ns, invocation.dry_run)
    with invocation.open_store(holding="never") as store:
        rows = None if dot is None else [invocation.resolve_dot(store, dot)]
        with invocation.progress("collecting garbage") as progress:
            report = collect(store, rows, request, progress)
    _print(invocation, report)
    return WARNED_EXIT if report.skipped else 0


def _print(invocation: Invocation, report: "CollectionReport") -> None:
    for left_out in report.skipped:
        error = left_out.skipped
        assert error is not None
        invocation.warn(f"{left_out.name} was left out: {error.message}")
    if not report.is_recorded:
        invocation.warn("the disk is full: what went could not be written down")
    if invocation.as_json:
        invocation.summary(
            {
                "bytes": report.bytes,
                "dots": [_fields(dot) for dot in report.dots],
                "store": _removed_fields(report.store),
                "recorded": report.is_recorded,
            }
        )
        return
    verb = "would go" if invocation.dry_run else "went"
    for dot in report.dots:
        if dot.skipped is None and any(number for _, number in dot.freed()):
            commits = output.counted(dot.commits, "commit")
            objects = output.counted(dot.objects, "object")
            invocation.result(
                output.escape_text(
                    f"{dot.name}: {commits}, {objects}, {output.human_size(dot.bytes)} {verb}"
                )
            )
    for name in report.store.purged:
        invocation.result(output.escape_text(f"{name} (deleted) {verb}"))
    if report.bytes:
        would_be = "would be freed" if invocation.dry_run else "freed"
        invocation.talk(f"{output.human_size(report.bytes)} {would_be}")
    else:
        invocation.talk("nothing to free")


def _fields(dot: "DotCollection") -> dict[str, object]:
    return {
        "dot": dot.name,
        "id": dot.dot.hex(),
        "commits": dot.commits,
        "objects": dot.objects,
        "objects_reencoded": dot.reencoded,
        "bytes": dot.bytes,
        "pack_bytes": dot.pack_bytes,
        "leftover_bytes": dot.other.bytes,
        "skipped": None if dot.skipped is None else dot.skipped.message,
        "held_by": None if dot.skipped is None else dot.skipped.facts.get("holder"),
    }


def _removed_fields(removed: "Removed") -> dict[str, object]:
    return {"bytes": removed.bytes, "files": removed.files, "dots_purged": removed.purged}
