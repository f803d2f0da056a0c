"""`dm df`: what takes space, and why."""

from typing import TYPE_CHECKING

import click

from dmsync.surfaces.cli import output
from dmsync.surfaces.cli.completions import DOT
from dmsync.surfaces.cli.invocation import DmCommand, Invocation, query_options

if TYPE_CHECKING:
    from dmsync.engine.collecting.space import DotSpace, SpaceReport

_NAMES_SHOWN_MAX = 4
_NS_PER_HOUR = 3600 * 1_000_000_000


@click.command("df", cls=DmCommand, epilog="Example: dm df shop")
@click.argument("dot", required=False, type=DOT)
@click.option("--grace", metavar="DURATION", help="As of dm gc: 14d (default), 36h, 2w, 0.")
@query_options
@click.pass_obj
def df_command(invocation: Invocation, dot: str | None, grace: str | None) -> None:
    """Show what takes space: of all dots and the store, or of DOT.

    For each dot its stored history: what is live and by which names (each line counts what none of
    the lines above it needs), what only the grace keeps, so that undo works, and what dm gc would
    free now.
    """
    from dmsync.core.durations import parse_grace
    from dmsync.engine.collecting.space import space

    grace_ns = parse_grace(invocation.settings.gc_grace if grace is None else grace)
    with invocation.open_store(holding="never") as store:
        rows = None if dot is None else [invocation.resolve_dot(store, dot)]
        with invocation.progress("measuring", is_query=True) as progress:
            report = space(store, rows, grace_ns, progress)
    if invocation.as_json:
        invocation.document(_fields(report, is_whole=dot is None))
        return
    for found in report.dots:
        _print_dot(found)
    if dot is None:
        _print_rest(report)


def _print_dot(found: "DotSpace") -> None:
    rows = [("history", found.pack_bytes, "")]
    if found.unknown is not None:
        rows.append(("  unknown", found.pack_bytes, found.unknown.message))
    else:
        rows += [
            (f"  {keeper.why}", keeper.bytes, _names(keeper.names))
            for keeper in found.keepers
            if keeper.why != "grace"
        ]
        rows.append(("  for undo", found.grace_bytes, _until(found)))
        rows.append(("  garbage", found.dead_bytes, "dm gc frees it" if found.dead_bytes else ""))
    rows += [
        ("index", found.index_bytes, ""),
        ("stat caches", found.stat_cache_bytes, ""),
        ("trees", found.tree_bytes, ""),
        ("arriving", found.quarantine_bytes, ""),
    ]
    output.write_line(output.escape_text(f"{found.name}  {output.human_size(found.bytes)}"))
    _print_rows(rows)
    if found.held_by:
        output.write_line(output.escape_text(f"  in use by {', '.join(found.held_by)}"))


def _print_rest(report: "SpaceReport") -> None:
    output.write_line("the store")
    _print_rows(
        [
            ("event log", report.log_bytes, ""),
            ("catalog", report.catalog_bytes, ""),
            ("trash", report.trash_bytes, "deleted dots" if report.trash_bytes else ""),
            ("scratch", report.temporary_bytes, ""),
            ("reserve", report.reserve_bytes, "for gc on a full disk"),
            ("all", report.bytes, ""),
        ]
    )


def _print_rows(rows: list[tuple[str, int, str]]) -> None:
    told = [(f"  {name}", output.human_size(size), why) for name, size, why in rows]
    for line in output.table(told):
        output.write_line(line)


def _names(names: tuple[str, ...]) -> str:
    shown = [name.partition("/")[2] or name for name in names[:_NAMES_SHOWN_MAX]]
    more = len(names) - len(shown)
    return output.escape_text(", ".join(shown) + (f" and {more} more" if more else ""))


def _until(found: "DotSpace") -> str:
    if not found.grace_bytes:
        return ""
    if found.grace_left_ns is None:
        return "dm gc --grace 0 frees it"
    hours = -(-found.grace_left_ns[1] // _NS_PER_HOUR)
    left = f"{hours}h" if hours < 72 else f"{hours // 24}d"
    return f"at most about {left} longer; dm gc --grace 0 frees it"


def _fields(report: "SpaceReport", *, is_whole: bool) -> dict[str, object]:
    fields: dict[str, object] = {"dots": [_dot_fields(found) for found in report.dots]}
    if is_whole:
        fields |= {
            "bytes": report.bytes,
            "log_bytes": report.log_bytes,
            "catalog_bytes": report.catalog_bytes,
            "trash_bytes": report.trash_bytes,
            "scratch_bytes": report.temporary_bytes,
            "reserve_bytes": report.reserve_bytes,
        }
    return fields


def _dot_fields(found: "DotSpace") -> dict[str, object]:
    left = found.grace_left_ns
    return {
        "dot": found.name,
        "id": found.dot.hex(),
        "bytes": found.bytes,
        "pack_bytes": found.pack_bytes,
        "live_bytes": None if found.unknown else found.live_bytes,
        "grace_bytes": None if found.unknown else found.grace_bytes,
        "dead_bytes": None if found.unknown else found.dead_bytes,
        "kept_by": [
            {"why": keeper.why, "names": list(keeper.names), "bytes": keeper.bytes}
            for keeper in found.keepers
        ],
        "grace_left_s": None if left is None else [left[0] // 10**9, left[1] // 10**9],
        "held_by": found.held_by,
        "unknown": None if found.unknown is None else found.unknown.message,
        "index_bytes": found.index_bytes,
        "stat_cache_bytes": found.stat_cache_bytes,
        "tree_bytes": found.tree_bytes,
        "quarantine_bytes": found.quarantine_bytes,
    }
