"""`dm init`, `dm switch`, `dm list`: which dots there are and which one is meant."""

import os
from typing import TYPE_CHECKING, Final

import click

from dmsync.errors import UsageError
from dmsync.surfaces.cli import output
from dmsync.surfaces.cli.completions import DOT
from dmsync.surfaces.cli.invocation import (
    FILE_NAME,
    DmCommand,
    Invocation,
    changing_options,
    query_options,
)

if TYPE_CHECKING:
    from dmsync.engine.dots import DotSummary

_HEADINGS: Final = ("  DOT", "BRANCH", "SERVER", "CONTAINERS", "SIZE", "COMMITS", "DIRTY")


@click.command("init", cls=DmCommand, epilog="Example: dm init app --at /srv/app")
@click.argument("dot", required=False)
@click.option(
    "--at",
    "at",
    type=FILE_NAME,
    metavar="DIR",
    help="DIR becomes the dot's subdot __default__.",
)
@click.option("--as-root", is_flag=True, help="DIR is the whole tree: its directories are subdots.")
@click.option("--bare", is_flag=True, help="Make an empty store to push to, and no dot.")
@changing_options
@click.pass_obj
def init_command(
    invocation: Invocation, dot: str | None, at: str | None, as_root: bool, bare: bool
) -> None:
    """Make a new dot with an empty branch master, and make it current.

    Without --at its files live in the store (dm dot path prints where). With --at, what is in
    DIR already is the dot's first uncommitted content.
    """
    from dmsync.core.names import parse_dot_name
    from dmsync.engine.dots import init_dot

    if bare:
        _make_store(invocation, dot)
        return
    if dot is None:
        raise UsageError("No dot name specified.", hint="dm init DOT, or dm init --bare")
    if as_root and at is None:
        raise UsageError("--as-root says what the directory of --at is", hint="give --at DIR")
    if at is not None and not os.path.isdir(at):
        raise UsageError(f"no such directory: {at}")
    name = parse_dot_name(dot)
    if invocation.dry_run:
        _check_new(invocation, dot, at)
        invocation.talk(f"would make dot {dot}")
        if invocation.as_json:
            namespace = name.namespace or invocation.settings.namespace
            invocation.summary({"dot": name.dot, "namespace": namespace, "id": None})
        return
    with invocation.open_store(create=True) as store:
        row = init_dot(store, dot, at=at, as_root=as_root)
        if invocation.as_json:
            invocation.summary({"dot": row.name, "namespace": row.namespace, "id": row.dot.hex()})


def _make_store(invocation: Invocation, dot: str | None) -> None:
    if dot is not None:
        raise UsageError("--bare makes a store without a dot: give no DOT")
    home = invocation.settings.home
    if invocation.dry_run:
        invocation.talk(f"would make a store at {home}, unless there is one")
    else:
        with invocation.open_store(create=True) as store:
            home = store.home
    if invocation.as_json:
        invocation.summary({"home": home})


def _check_new(invocation: Invocation, dot: str, at: str | None) -> None:
    """Refuse what init would, as far as looking tells."""
    from dmsync.engine.dots import refuse_attached, refuse_overlap
    from dmsync.errors import AlreadyExists, DotNotFound, StoreNotFound

    if at is not None:
        refuse_overlap(at, invocation.settings.home)
    try:
        with invocation.open_store() as store:
            if at is not None:
                refuse_attached(store, at)
            invocation.resolve_dot(store, dot)
    except (StoreNotFound, DotNotFound):
        return
    raise AlreadyExists(f"{dot} exists already")


@click.command("switch", cls=DmCommand, epilog="Example: dm switch app")
@click.argument("dot", type=DOT)
@changing_options
@click.pass_obj
def switch_command(invocation: Invocation, dot: str) -> None:
    """Make DOT the current dot: the one that commands without a dot's name work on."""
    from dmsync.engine.dots import switch_dot

    with invocation.open_store() as store:
        row = invocation.resolve_dot(store, dot)
        if invocation.dry_run:
            invocation.talk(f"would switch to dot {dot}")
        else:
            switch_dot(store, dot)
        if invocation.as_json:
            invocation.summary({"dot": row.name, "namespace": row.namespace})


@click.command("list", cls=DmCommand, epilog="Example: dm list -H | cut -f 1")
@click.option("-H", "--scripting", is_flag=True, help="TAB-separated, sizes in bytes, no headings.")
@query_options
@click.pass_obj
def list_command(invocation: Invocation, scripting: bool) -> None:
    """List the dots: current mark, branch, server, containers, size, commits, dirty.

    SIZE is what is stored, DIRTY what a commit would add of uncommitted changes.
    """
    print_dots(invocation, scripting=scripting)


def print_dots(invocation: Invocation, *, scripting: bool) -> None:
    """The list of dots, sorted by name, in the form asked for. No store: no dots."""
    from dmsync.engine.dots import list_dots
    from dmsync.errors import StoreNotFound

    dots: list[DotSummary] = []
    try:
        with invocation.open_store() as store:
            dots = list_dots(store)
    except StoreNotFound as absent:
        invocation.talk(f"dm: {absent.message}")
    if invocation.as_json:
        invocation.document([_json_fields(dot) for dot in dots])
    elif scripting:
        for dot in dots:
            output.write_line("".join(field + "\t" for field in _scripting_fields(dot)))
    else:
        for line in output.table([_HEADINGS, *map(_row, dots)]):
            output.write_line(line)


def containers_text(containers: list[str]) -> str:
    """Container names comma-joined, each with Docker's leading slash."""
    return ",".join("/" + name.removeprefix("/") for name in containers)


def _row(dot: "DotSummary") -> tuple[str, ...]:
    return (
        ("* " if dot.current else "  ") + dot.display_name,
        dot.branch,
        output.escape_name(dot.server),
        output.escape_name(containers_text(dot.containers)),
        output.human_size(dot.size_bytes),
        str(dot.commits),
        output.human_size(dot.dirty_bytes or 0),
    )


def _scripting_fields(dot: "DotSummary") -> tuple[str, ...]:
    return (
        dot.display_name,
        dot.branch,
        output.escape_name(dot.server),
        output.escape_name(containers_text(dot.containers)),
        str(dot.size_bytes),
        str(dot.commits),
        str(dot.dirty_bytes or 0),
    )


def _json_fields(dot: "DotSummary") -> dict[str, object]:
    return {
        "namespace": dot.namespace,
        "name": dot.name,
        "display_name": dot.display_name,
        "id": dot.id.hex(),
        "current": dot.current,
        "branch": dot.branch,
        "server": dot.server,
        "containers": dot.containers,
        "size_bytes": dot.size_bytes,
        "commits": dot.commits,
        "dirty_bytes": dot.dirty_bytes,
    }
