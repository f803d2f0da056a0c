"""`dm commit`: the whole dot at one instant."""

from typing import TYPE_CHECKING, Final

import click

from dmsync.errors import UsageError
from dmsync.surfaces.cli import output
from dmsync.surfaces.cli.changes import change_line
from dmsync.surfaces.cli.invocation import DmCommand, Invocation, changing_options
from dmsync.surfaces.cli.signing import signing_key, signing_options

if TYPE_CHECKING:
    from dmsync.engine.commits import CommitSummary

WARNINGS_EXIT: Final = 3
"""Done, but some files were unreadable or changed while they were read."""
_PATHS_SHOWN_MAX: Final = 20


@click.command(
    "commit", cls=DmCommand, epilog='Example: dm commit -m "before the upgrade" -d ticket=42'
)
@click.option("-m", "--message", help="What this state is.")
@click.option("-d", "--metadata", multiple=True, metavar="KEY=VALUE", help="Repeatable.")
@click.option("--author", help="Instead of DM_AUTHOR or the configuration.")
@click.option("--amend", is_flag=True, help="Replace the last commit; keeps its message.")
@click.option("--amend-pushed", is_flag=True, help="Also when a remote holds it already.")
@click.option("--fail-if-nothing", is_flag=True, help="Exit 4 when nothing changed.")
@click.option(
    "--accept-moved-tree",
    is_flag=True,
    help="Commit although the directory is another one, or a subdot was emptied.",
)
@signing_options
@changing_options
@click.pass_obj
def commit_command(
    invocation: Invocation,
    message: str | None,
    metadata: tuple[str, ...],
    author: str | None,
    amend: bool,
    amend_pushed: bool,
    fail_if_nothing: bool,
    accept_moved_tree: bool,
    is_signed: bool,
    key: str | None,
) -> int:
    """Record the state of all subdots of the current branch, atomically; prints the commit's id.

    Also commits when nothing changed, unless --fail-if-nothing. Exit code 3 means: committed, but
    some files were unreadable or changed while they were read (they are listed).
    """
    from dmsync.engine.commits import CommitRequest, commit

    if not message and not (amend or amend_pushed):
        raise UsageError("Please provide a commit message", hint='dm commit -m "MESSAGE"')
    request = CommitRequest(
        message=message or "",
        metadata=metadata_pairs(metadata),
        author=author,
        fail_if_nothing=fail_if_nothing,
        accept_moved_tree=accept_moved_tree,
        dry_run=invocation.dry_run,
        signing=signing_key(invocation, key, wanted=is_signed),
        amend=amend or amend_pushed,
        amend_pushed=amend_pushed,
    )
    with invocation.open_store() as store:
        dot = invocation.resolve_dot(store)
        with invocation.progress(f"committing {dot.name}") as progress:
            summary = commit(store, dot, request, progress)
    _print(invocation, summary)
    return WARNINGS_EXIT if summary.unstable_paths or summary.unreadable_paths else 0


def metadata_pairs(values: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """`key=value` texts as pairs; only the first `=` divides.

    Raises:
        UsageError: no `=`, a key that does not start with a lowercase letter, a key given twice.
    """
    pairs: dict[str, str] = {}
    for text in values:
        key, divider, value = text.partition("=")
        if not divider:
            raise UsageError(f"Each metadata value must be a name=value pair: {text}")
        if not key[:1].islower():
            raise UsageError(f"Metadata field names must start with lowercase characters: {key}")
        if key in pairs:
            raise UsageError(f"metadata key {key} is given twice")
        pairs[key] = value
    return tuple(pairs.items())


def _print(invocation: Invocation, summary: "CommitSummary") -> None:
    if invocation.as_json:
        invocation.summary(_json_fields(summary, dry_run=invocation.dry_run))
        return
    if summary.commit is not None:
        invocation.result(summary.commit.hex())
    else:
        for change in summary.changes or ():
            invocation.result(change_line(change))
        count = output.counted(summary.changes_count, "change")
        invocation.talk(f"would commit {count}; nothing was done (dry run)")
    for what, paths in (
        ("changed while it was read", summary.unstable_paths),
        ("could not be read", summary.unreadable_paths),
    ):
        for path in paths[:_PATHS_SHOWN_MAX]:
            invocation.warn(f"{what}: {output.escape_name(path)}")
        if len(paths) > _PATHS_SHOWN_MAX:
            invocation.warn(f"{what}: {len(paths) - _PATHS_SHOWN_MAX} more")
    driver, consistency, _ = summary.capture
    if invocation.verbose:
        invocation.talk(
            f"{summary.changes_count} changes, "
            f"{output.human_size(summary.bytes_scanned)} looked at, "
            f"{output.human_size(summary.bytes_stored)} stored, {summary.elapsed_s:.2f} s, "
            f"captured by {driver} ({consistency})"
        )


def _json_fields(summary: "CommitSummary", *, dry_run: bool) -> dict[str, object]:
    driver, consistency, pause_us = summary.capture
    return {
        "commit": summary.commit.hex() if summary.commit else None,
        "parents": [parent.hex() for parent in summary.parents],
        "branch": summary.branch,
        "dry_run": dry_run,
        "files_changed": summary.changes_count,
        "files_scanned": summary.files_scanned,
        "bytes_scanned": summary.bytes_scanned,
        "bytes_stored": summary.bytes_stored,
        "capture": {"driver": driver, "consistency": consistency},
        "capture_pause_ms": pause_us / 1000,
        "elapsed_s": round(summary.elapsed_s, 6),
        "unstable_paths": [output.path_fields(path) for path in summary.unstable_paths],
        "unreadable_paths": [output.path_fields(path) for path in summary.unreadable_paths],
    }
