"""`dm bundle`: commits in a file, for where no connection goes."""

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

from dmsync.errors import UsageError
from dmsync.surfaces.cli import output
from dmsync.surfaces.cli.completions import RANGE
from dmsync.surfaces.cli.invocation import (
    FILE_NAME,
    DmCommand,
    Invocation,
    changing_options,
    query_options,
)

if TYPE_CHECKING:
    from dmsync.engine.bundles import Bundle
    from dmsync.engine.store import Store
    from dmsync.engine.sync_pull import FetchSummary, PullMode
    from dmsync.wire.bundle_header import BundleHeader


@click.group("bundle", epilog="Example: dm bundle create app.dmb --all && dm bundle verify app.dmb")
def bundle_command() -> None:
    """Carry commits in a file: to a machine without a network, or as a first copy.

    A bundle is checked as a push is, and gives the same ids.
    """


@bundle_command.command(
    "create", cls=DmCommand, epilog="Example: dm bundle create week.dmb v1.0..master"
)
@click.argument("file", type=FILE_NAME)
@click.argument("revisions", metavar="[BRANCH|TAG|A..BRANCH]...", nargs=-1, type=RANGE)
@click.option("--all", "every_branch", is_flag=True, help="All branches.")
@click.option("--tags", "every_tag", is_flag=True, help="All tags.")
@click.option("--force", is_flag=True, help="Write over an existing file.")
@changing_options
@click.pass_obj
def create_command(
    invocation: Invocation,
    file: str,
    revisions: tuple[str, ...],
    every_branch: bool,
    every_tag: bool,
    force: bool,
) -> None:
    """Write the commits of branches and tags (default: the current branch) to FILE.

    A..BRANCH leaves out what A has: who applies that bundle must have A.
    """
    from dmsync.engine.bundles import BundleRequest, create_bundle

    request = BundleRequest(file, revisions, every_branch, every_tag, force, invocation.dry_run)
    with invocation.open_store() as store:
        dot = invocation.resolve_dot(store)
        with invocation.progress(f"bundling {dot.name}") as progress:
            summary = create_bundle(store, dot, request, progress)
    if invocation.as_json:
        fields = _header_fields(summary.header)
        invocation.summary({**fields, "file": file, "bytes_written": summary.bytes_written})
        return
    verb = "would bundle" if invocation.dry_run else "Bundled"
    size = f", {output.human_size(summary.bytes_written)}" if summary.bytes_written else ""
    invocation.talk(f"{verb} {_commits(summary.header)}{size}")


@bundle_command.command("verify", cls=DmCommand, epilog="Example: dm bundle verify week.dmb")
@click.argument("file", type=FILE_NAME)
@query_options
@click.pass_obj
def verify_command(invocation: Invocation, file: str) -> None:
    """Check that FILE is whole and unchanged, and show what it holds and what it needs.

    Exit code 10: it is whole, but builds on commits that this store lacks.
    """
    from dmsync.engine.bundles import open_bundle, refuse_missing, verify_bundle
    from dmsync.errors import StoreNotFound

    with open_bundle(file) as bundle:
        size = verify_bundle(bundle)
        _print_header(invocation, bundle, size)
        if not bundle.header.prerequisites:
            return
        try:
            with invocation.open_store() as store:
                refuse_missing(store, bundle.header)
        except StoreNotFound:
            invocation.talk("there is no store here to compare it with")


def _print_header(invocation: Invocation, bundle: "Bundle", size: int) -> None:
    header = bundle.header
    if invocation.as_json:
        invocation.document({**_header_fields(header), "bytes": size})
        return
    output.write_line(
        f"{output.escape_name(bundle.path)}: {_written(header)}, "
        f"{_commits(header)}, {output.human_size(size)}"
    )
    for ref in header.refs:
        output.write_line(f"{ref.id.hex()} {ref.name}")
    for commit in header.prerequisites:
        output.write_line(f"needs {commit.hex()}")


def _commits(header: "BundleHeader") -> str:
    counted = output.counted(header.commits_count, "commit")
    if header.hollow_count:
        return f"{counted}, {header.hollow_count} of them by their record alone"
    return counted


def _written(header: "BundleHeader") -> str:
    from dmsync.core.names import full_name

    return full_name(header.namespace, header.name)


def _header_fields(header: "BundleHeader") -> dict[str, object]:
    return {
        "dot": _written(header),
        "dot_id": header.dot.hex(),
        "head": header.head,
        "refs": [{"ref": ref.name, "id": ref.id.hex()} for ref in header.refs],
        "prerequisites": [commit.hex() for commit in header.prerequisites],
        "commits": header.commits_count,
        "commits_hollow": header.hollow_count,
        "objects": header.records_count,
    }


@bundle_command.command("apply", cls=DmCommand, epilog="Example: dm bundle apply week.dmb")
@click.argument("file", type=FILE_NAME)
@click.option("--local-name", metavar="[NS/]NAME", help="What to call a dot that is new here.")
@click.option("--stash-on-divergence", "stash", is_flag=True, help="As for dm pull.")
@click.option("--force", is_flag=True, help="Replace diverged branches.")
@changing_options
@click.pass_obj
def apply_command(
    invocation: Invocation, file: str, local_name: str | None, stash: bool, force: bool
) -> None:
    """Take the commits of FILE in: fast-forward its branches, or make the dot if it is new here.

    Applying a bundle again changes nothing. One that is truncated, changed, or builds on commits
    that are not here is refused before anything changes.
    """
    from dmsync.engine.bundles import open_bundle, refuse_missing
    from dmsync.surfaces.cli.exchange import become_current

    if stash and force:
        raise UsageError("--stash-on-divergence and --force exclude one another")
    move: PullMode = "stash" if stash else "force" if force else "ff"
    with (
        open_bundle(file) as bundle,
        invocation.open_store(create=not invocation.dry_run) as store,
    ):
        refuse_missing(store, bundle.header)
        summary = _apply(invocation, store, bundle, local_name, move)
        if not invocation.dry_run:
            become_current(store, summary.dot)
    _print_applied(invocation, summary)


def _apply(
    invocation: Invocation,
    store: "Store",
    bundle: "Bundle",
    local_name: str | None,
    move: "PullMode",
) -> "FetchSummary":
    from dmsync.core.names import parse_dot_name
    from dmsync.engine.bundles import builds_on
    from dmsync.engine.sync_opening import hello
    from dmsync.engine.sync_pull import FetchRequest, fetch
    from dmsync.engine.target_tree import TARGET_TREE
    from dmsync.surfaces.cli.interrupts import run_async
    from dmsync.transports.bundle import BundleStream

    header = bundle.header
    here = store.catalog.dot(header.dot)
    is_here = here is not None and here.trash is None
    if is_here and local_name is not None:
        raise UsageError("this dot is here already: --local-name names a new one")
    name = parse_dot_name(local_name) if local_name is not None else None
    request = FetchRequest(
        # No remote has this name (a dot is not allowed in one), so nothing is remembered of it.
        remote=f"bundle.{os.path.basename(_label(bundle.path))}",
        dot=header.dot if is_here else None,
        remote_namespace=header.namespace,
        remote_name=header.name,
        move=move,
        local_namespace=(name.namespace if name else None) or invocation.settings.namespace,
        local_name=None if is_here else (name.dot if name else header.name),
        dry_run=invocation.dry_run,
        command="bundle",
        actor=invocation.settings.actor,
    )

    async def converse() -> "FetchSummary":
        stream = BundleStream(bundle, hello(store), builds_on(store, header))
        return await fetch(store, stream, request, TARGET_TREE, progress)

    with invocation.progress(f"applying {_written(header)}") as progress:
        return run_async(converse())


def _label(path: str) -> str:
    """The path as text that an event can hold."""
    return path.encode("utf-8", "backslashreplace").decode()


def _print_applied(invocation: Invocation, summary: "FetchSummary") -> None:
    from dmsync.surfaces.cli.exchange import fetch_fields

    if invocation.as_json:
        invocation.summary(fetch_fields(summary))
        return
    for line in _applied_lines(summary, dry_run=invocation.dry_run):
        invocation.result(line)


def _applied_lines(summary: "FetchSummary", *, dry_run: bool) -> Iterable[str]:
    if summary.nothing_to_do and not summary.created:
        yield "Already up to date."
        return
    for ref in summary.refs:
        yield f"{ref.ref}: {ref.status.name.lower().replace('_', ' ')}"
    yield "Nothing was applied (dry run)." if dry_run else "Done!"
