"""`dm collaborator add|rm|list`: who besides its owner may read and write a dot on a server."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from dmsync.errors import UsageError
from dmsync.surfaces.cli import output
from dmsync.surfaces.cli.completions import DOT
from dmsync.surfaces.cli.invocation import (
    DmCommand,
    Invocation,
    changing_options,
    query_options,
    reaching_options,
)

if TYPE_CHECKING:
    from dmsync.engine.store import Store
    from dmsync.storage.catalog import DotRow
    from dmsync.wire.messages import ShareAction

_DOT = "[REMOTE:]DOT"


@click.group("collaborator", epilog="Example: dm collaborator add vault:alice/shop bob")
def collaborator_command() -> None:
    """Say who besides its owner may read and write a dot; never delete or share it.

    On this store, or as the dot's owner on a remote: REMOTE:DOT, with a remote's name or URL.
    """


@collaborator_command.command(
    "add", cls=DmCommand, epilog="Example: dm collaborator add alice/shop bob"
)
@click.argument("dot", metavar=_DOT, type=DOT)
@click.argument("user")
@reaching_options
@changing_options
@click.pass_obj
def add_command(invocation: Invocation, dot: str, user: str) -> None:
    """Let USER read and write DOT. They find it under its full name, NAMESPACE/DOT."""
    from dmsync.core.names import check_namespace
    from dmsync.engine.sharing import add_collaborator
    from dmsync.wire.messages import ShareAction

    check_namespace(user)

    def add_here(store: "Store", row: "DotRow") -> None:
        add_collaborator(store, row, user, invocation.settings.actor)

    _change(invocation, dot, user, ShareAction.ADD, add_here)


@collaborator_command.command(
    "rm", cls=DmCommand, epilog="Example: dm collaborator rm alice/shop bob"
)
@click.argument("dot", metavar=_DOT, type=DOT)
@click.argument("user")
@reaching_options
@changing_options
@click.pass_obj
def rm_command(invocation: Invocation, dot: str, user: str) -> None:
    """Let USER read and write DOT no longer. What they have fetched they keep."""
    from dmsync.engine.sharing import remove_collaborator
    from dmsync.wire.messages import ShareAction

    def remove_here(store: "Store", row: "DotRow") -> None:
        remove_collaborator(store, row, user, invocation.settings.actor)

    _change(invocation, dot, user, ShareAction.REMOVE, remove_here)


@collaborator_command.command(
    "list", cls=DmCommand, epilog="Example: dm collaborator list vault:alice/shop"
)
@click.argument("dot", metavar=f"[{_DOT}]", required=False, type=DOT)
@reaching_options
@query_options
@click.pass_obj
def list_command(invocation: Invocation, dot: str | None) -> None:
    """List who DOT (default: the current one) is shared with."""
    from dmsync.wire.messages import ShareAction

    remote, name = _parts(dot)
    with invocation.open_store() as store:
        if remote is not None:
            shown, users = _ask(invocation, store, remote, name, ShareAction.LIST, None)
        else:
            row = invocation.resolve_dot(store, name)
            shown, users = _written(row), store.catalog.collaborators(row.dot)
    if invocation.as_json:
        invocation.document({"dot": shown, "collaborators": users})
        return
    for user in users:
        output.write_line(user)


def _change(
    invocation: Invocation,
    dot: str,
    user: str,
    action: "ShareAction",
    change_here: Callable[["Store", "DotRow"], None],
) -> None:
    remote, name = _parts(dot)
    with invocation.open_store() as store:
        if remote is not None:
            shown, users = _ask(invocation, store, remote, name, action, user)
        else:
            row = invocation.resolve_dot(store, name)
            shown = _written(row)
            if not invocation.dry_run:
                change_here(store, row)
            users = store.catalog.collaborators(row.dot)
    if invocation.dry_run:
        invocation.talk(f"would change who {shown} is shared with: {action.name.lower()} {user}")
    if invocation.as_json:
        invocation.summary({"dot": shown, "user": user, "collaborators": users})


def _parts(text: str | None) -> tuple[str | None, str | None]:
    """(remote or None, dot): a dot's name has no colon."""
    if text is None or ":" not in text:
        return None, text
    remote, _, dot = text.rpartition(":")
    return remote, dot


def _ask(
    invocation: Invocation,
    store: "Store",
    remote: str,
    dot: str | None,
    action: "ShareAction",
    user: str | None,
) -> tuple[str, list[str]]:
    """Ask there; a dry run only looks."""
    from dmsync.core.names import parse_dot_name
    from dmsync.surfaces.cli.connection import share
    from dmsync.wire.messages import ShareAction

    parsed = parse_dot_name(dot or "")
    if parsed.branch is not None or parsed.subdot is not None:
        raise UsageError(f"not a dot's name alone: {dot}")
    if invocation.dry_run:
        action, user = ShareAction.LIST, None
    return share(invocation, store, remote, (parsed.namespace, parsed.dot), action, user)


def _written(row: "DotRow") -> str:
    from dmsync.core.names import full_name

    return full_name(row.namespace, row.name)
