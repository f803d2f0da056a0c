"""`dm remote`: the clusters known here by name."""

import os

import click

from dmsync.surfaces.cli import output
from dmsync.surfaces.cli.completions import REMOTE
from dmsync.surfaces.cli.invocation import (
    DmCommand,
    Invocation,
    changing_options,
    query_options,
    reaching_options,
    write_options,
)


class _RemoteGroup(click.Group):
    """`dm remote` alone lists; its own -v shows where each remote is."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        write_options(self, ctx, formatter)
        self.format_commands(ctx, formatter)


@click.group(
    "remote",
    cls=_RemoteGroup,
    invoke_without_command=True,
    epilog="Example: dm remote add backup dm@vault.example.org:2222",
)
@query_options
@click.pass_context
def remote_command(context: click.Context) -> None:
    """List the remotes; with -v where they are."""
    if context.invoked_subcommand is None:
        _list(context.obj)


def _list(invocation: Invocation) -> None:
    from dmsync.engine.remotes import list_remotes
    from dmsync.errors import StoreNotFound

    try:
        with invocation.open_store() as store:
            remotes = list_remotes(store)
    except StoreNotFound:
        remotes = []
    found = {remote.name: (remote.url, remote.dm_command) for remote in remotes}
    for name, config in invocation.settings.remotes.items():
        url, dm_command = found.get(name, ("", None))
        found[name] = (config.url or url, config.dm_command or dm_command)
    named = sorted((name, url, command) for name, (url, command) in found.items() if url)
    if invocation.as_json:
        invocation.document(
            [{"name": name, "url": url, "dm_command": command} for name, url, command in named]
        )
        return
    for name, url, _ in named:
        line = f"{name}\t{output.escape_name(url)}" if invocation.verbose else name
        output.write_line(line)


@remote_command.command("add", cls=DmCommand, epilog="Example: dm remote add backup /mnt/disk/dm")
@click.argument("name")
@click.argument("url")
@click.option("--dm-command", metavar="COMMAND", help="Where dm is, if not in the PATH over there.")
@reaching_options
@changing_options
@click.pass_obj
def add_command(
    invocation: Invocation,
    name: str,
    url: str,
    dm_command: str | None,
) -> None:
    """Remember a cluster as NAME.

    URL is ssh://[user@]host[:port][/store/path], [user@]host, [user@]host:PORT, [user@]host:/path
    or a local path. An unknown host's key is shown and asked about, or must match
    --accept-host-key.
    """
    from dmsync.core.names import check_remote_name
    from dmsync.engine.remotes import add_remote
    from dmsync.surfaces.cli.connection import trust_host

    check_remote_name(name)
    url = absolute_url(url)
    if invocation.dry_run:
        invocation.talk(f"would add remote {name}: {url}")
        if invocation.as_json:
            invocation.summary({"name": name, "url": url, "dm_command": dm_command})
        return
    with invocation.open_store(create=True) as store:
        if store.catalog.remote(name) is None:
            trust_host(invocation, url)
        remote = add_remote(store, name, url, dm_command)
    if invocation.as_json:
        invocation.summary(
            {"name": remote.name, "url": remote.url, "dm_command": remote.dm_command}
        )
    else:
        invocation.talk("Remote added.")


def absolute_url(text: str) -> str:
    """The URL to keep: a local path must mean the same from any directory. Raises InvalidName."""
    from dmsync.core.names import parse_remote_url

    url = parse_remote_url(text)
    if url.kind == "local":
        assert url.path is not None
        return os.path.abspath(os.path.expanduser(url.path))
    return str(url)


@remote_command.command("rm", cls=DmCommand, epilog="Example: dm remote rm backup")
@click.argument("name", type=REMOTE)
@changing_options
@click.pass_obj
def rm_command(invocation: Invocation, name: str) -> None:
    """Forget a remote. Nothing over there changes."""
    from dmsync.engine.remotes import find_remote, remove_remote

    with invocation.open_store() as store:
        find_remote(store, name)
        if invocation.dry_run:
            invocation.talk(f"would forget remote {name}")
        else:
            remove_remote(store, name)
    if invocation.as_json:
        invocation.summary({"name": name})


@remote_command.command("rename", cls=DmCommand, epilog="Example: dm remote rename origin old")
@click.argument("old", type=REMOTE)
@click.argument("new")
@changing_options
@click.pass_obj
def rename_command(invocation: Invocation, old: str, new: str) -> None:
    """Rename a remote, its upstreams and remote branches."""
    from dmsync.core.names import check_remote_name
    from dmsync.engine.remotes import find_remote, rename_remote

    check_remote_name(new)
    with invocation.open_store() as store:
        find_remote(store, old)
        if invocation.dry_run:
            invocation.talk(f"would rename remote {old} to {new}")
        else:
            rename_remote(store, old, new)
    if invocation.as_json:
        invocation.summary({"old": old, "new": new})
