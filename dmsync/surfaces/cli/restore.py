"""`dm restore` and `dm export`: what a commit holds, back in the working tree or somewhere else."""

import sys
from typing import TYPE_CHECKING, Final

import click

from dmsync.errors import UsageError
from dmsync.surfaces.cli import output
from dmsync.surfaces.cli.changes import change_fields, change_line
from dmsync.surfaces.cli.completions import FIRST_REVISION, PLACE, paths_follow
from dmsync.surfaces.cli.invocation import FILE_NAME, DmCommand, Invocation, changing_options
from dmsync.surfaces.cli.switching import (
    WITH_WARNINGS,
    switching_options,
    tell_tree,
    tree_exit_code,
    tree_fields,
    warn_not_applied,
)

if TYPE_CHECKING:
    from dmsync.engine.export import ExportRequest, ExportSummary
    from dmsync.engine.path_restore import PathRestoreSummary

_PATHS_GIVEN: Final = "dmsync.paths"


class _PathsAfterDivider(DmCommand):
    """Remembers how many arguments stand after `--`: those are paths, what is before is none."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if "--" in args:
            paths_follow(ctx)
            ctx.meta[_PATHS_GIVEN] = len(args) - args.index("--") - 1
        return super().parse_args(ctx, args)


@click.command(
    "restore",
    cls=_PathsAfterDivider,
    epilog="Example: dm restore HEAD~1 -- __default__/stock.txt __default__/reports",
)
@click.argument(
    "arguments", metavar="[REV --] PATH...", nargs=-1, type=FIRST_REVISION, required=True
)
@click.option("--delete", is_flag=True, help="Also remove what REV lacks there.")
@switching_options
@changing_options
@click.pass_obj
def restore_command(
    invocation: Invocation,
    arguments: tuple[str, ...],
    delete: bool,
    discard: bool,
    accept_moved_tree: bool,
    trusted: bool,
    in_use: bool,
) -> int:
    """Bring files, directories or whole subdots of REV (default HEAD) back into the working tree.

    Paths are those that `dm ls REV:` shows; `.` is everything. The branch does not move, and what
    the tree held is stored first. Nothing is removed without --delete (exit code 18). A path that
    was hard-linked with others comes back alone: the others keep what they hold.
    """
    from dmsync.engine.path_restore import PathRestoreRequest, restore_paths

    revision, paths = _revision_and_paths(arguments)
    request = PathRestoreRequest(
        revision=revision,
        paths=tuple(path.encode("utf-8", "surrogateescape") for path in paths),
        delete=delete,
        discard=discard,
        accept_moved_tree=accept_moved_tree,
        trusted=trusted,
        in_use=in_use,
        dry_run=invocation.dry_run,
    )
    with invocation.open_store() as store:
        dot = invocation.resolve_dot(store)
        with invocation.progress(f"restoring paths of {dot.name}") as progress:
            summary = restore_paths(store, dot, request, progress)
    return _print_restored(invocation, summary)


def _revision_and_paths(arguments: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """Without `--` all arguments are paths of HEAD. Raises UsageError."""
    count: int | None = click.get_current_context().meta.get(_PATHS_GIVEN)
    if count is None:
        return "HEAD", arguments
    before, paths = arguments[: len(arguments) - count], arguments[len(arguments) - count :]
    if len(before) > 1 or not paths:
        raise UsageError(
            "one revision at most before `--`, and paths after it", hint="dm restore REV -- PATH..."
        )
    return (before[0] if before else "HEAD"), paths


def _print_restored(invocation: Invocation, summary: "PathRestoreSummary") -> int:
    code = tree_exit_code(summary)
    if invocation.as_json:
        invocation.summary(
            {
                "branch": summary.branch,
                "commit": summary.commit.hex(),
                "dry_run": invocation.dry_run,
                "changes": [change_fields(change) for change in summary.changes],
                "trusted": [output.path_fields(path) for path in summary.trusted],
                **tree_fields(summary),
                "exit_code": code,
            }
        )
        return code
    if invocation.dry_run or invocation.verbose:
        for change in summary.changes:
            invocation.result(change_line(change))
    if summary.trusted:
        verb = "would apply" if invocation.dry_run else "applied"
        paths = output.counted(len(summary.trusted), "path")
        invocation.talk(f"{verb} devices, setuid bits and capabilities of {paths}")
        tell_tree(invocation, summary)
    elif not summary.changes:
        invocation.talk("nothing to restore: the tree holds that already")
    elif not invocation.dry_run:
        invocation.talk(f"restored {output.counted(len(summary.changes), 'path')}")
        tell_tree(invocation, summary)
    return code


@click.command(
    "export", cls=DmCommand, epilog="Example: dm export v1.2:__default__ /tmp/v1.2.tar.zst"
)
@click.argument("place", metavar="REV[:PATH]", type=PLACE)
@click.argument("destination", metavar="DEST", type=FILE_NAME)
@click.option("--force", is_flag=True, help="Replace what DEST holds; asks for a directory.")
@click.option("--trusted", is_flag=True, help="Apply devices, setuid bits and capabilities too.")
@changing_options
@click.pass_obj
def export_command(
    invocation: Invocation, place: str, destination: str, force: bool, trusted: bool
) -> int:
    """Write what REV holds (or one PATH of it) out of the store, with all its metadata.

    DEST is a new or empty directory, a tar archive (.tar, .tar.zst, .tar.gz), or - for a tar
    archive on standard output. `tar --xattrs --xattrs-include='*' -xf` brings all of it back.
    """
    from dmsync.engine.export import ExportRequest, export, holds_something, is_archive

    where = destination.encode("utf-8", "surrogateescape")
    request = ExportRequest(place, where, None, force, trusted, invocation.dry_run)
    if destination == "-":
        request = _to_stdout(request)
    elif force and not is_archive(where) and not invocation.dry_run and holds_something(where):
        name = output.escape_name(where)
        if not invocation.confirm(f"All that {name} holds and {place} lacks goes. Sure? (Y) "):
            invocation.talk("nothing was written")
            return 1
    with invocation.open_store() as store:
        dot = invocation.resolve_dot(store)
        with invocation.progress(f"exporting {dot.name}") as progress:
            summary = export(store, dot, request, progress)
    return _print_exported(invocation, summary, destination)


def _to_stdout(request: "ExportRequest") -> "ExportRequest":
    """The same with standard output as its stream. Raises UsageError for a terminal."""
    from dataclasses import replace

    if sys.stdout.isatty():
        raise UsageError("an archive is nothing for a terminal", hint="dm export REV - | tar -t")
    sys.stdout.flush()
    return replace(request, stream=sys.stdout.buffer)


def _print_exported(invocation: Invocation, summary: "ExportSummary", destination: str) -> int:
    code = WITH_WARNINGS if summary.withheld or summary.unapplied else 0
    told = (
        f"{output.counted(summary.files, 'file')}, {output.human_size(summary.bytes_written)}"
        f" of {summary.commit.hex()[: output.SHORT_ID_DIGITS]}"
    )
    if invocation.as_json and destination != "-":
        invocation.summary(
            {
                "commit": summary.commit.hex(),
                **output.path_fields(summary.path),
                "destination": output.escape_name(destination),
                "dry_run": invocation.dry_run,
                "files": summary.files,
                "bytes_written": summary.bytes_written,
                "withheld": [output.path_fields(path) for path in summary.withheld],
                "unapplied": [output.path_fields(path) for path in summary.unapplied],
                "exit_code": code,
            }
        )
        return code
    invocation.talk(f"would write {told}" if invocation.dry_run else f"wrote {told}")
    warn_not_applied(invocation, summary.withheld, summary.unapplied)
    return code
