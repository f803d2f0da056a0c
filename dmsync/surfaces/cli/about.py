"""`dm version`, `dm completion`, `dm help`: dm about itself. Must stay quick to import."""

import platform
import sys

import click

from dmsync import __version__
from dmsync.errors import UsageError
from dmsync.surfaces.cli import output
from dmsync.surfaces.cli.completions import REMOTE
from dmsync.surfaces.cli.invocation import DmCommand, Invocation, query_options


@click.command("version", cls=DmCommand, epilog="Example: dm version backup")
@click.argument("remote", required=False, type=REMOTE)
@query_options
@click.pass_obj
def version_command(invocation: Invocation, remote: str | None) -> None:
    """Show the version of this dm, and with REMOTE the version of the dm it answers with."""
    server = _server_version(invocation, remote) if remote else None
    if invocation.as_json:
        document: dict[str, object] = {
            "client": {
                "version": __version__,
                "python": platform.python_version(),
            }
        }
        if server is not None:
            document["server"] = {"remote": remote, "version": server}
        invocation.document(document)
        return
    output.write_line(f"Client:\n\tVersion: {__version__}")
    if server is not None:
        output.write_line(f"Server:\n\tVersion: {output.escape_line(server)}")


def _server_version(invocation: Invocation, remote: str) -> str:
    from dmsync.surfaces.cli.connection import server_version

    return server_version(invocation, remote)


@click.command("completion", cls=DmCommand, epilog='Example: eval "$(dm completion bash)"')
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@query_options
@click.pass_obj
def completion_command(invocation: Invocation, shell: str) -> None:
    """Print the completion script of SHELL, to be read by it at its start."""
    from click.shell_completion import get_completion_class

    from dmsync.surfaces.cli.main import dm

    completion = get_completion_class(shell)
    assert completion is not None, "click knows these shells"
    template = completion(dm, {}, "dm", "_DM_COMPLETE")
    # Not source(): for bash it runs the local bash to look at its version.
    script = template.source_template % template.source_vars()
    if invocation.as_json:
        invocation.document({"shell": shell, "script": script})
    else:
        output.write_line(script)


def _complete_command(context: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """Names of the commands, or of those below the ones named already."""
    command: click.Command | None = context.find_root().command
    for name in context.params.get("command") or ():
        command = command.get_command(context, name) if isinstance(command, click.Group) else None
    names = command.list_commands(context) if isinstance(command, click.Group) else []
    return [name for name in names if name.startswith(incomplete)]


@click.command("help", cls=DmCommand, epilog="Example: dm help commit")
@click.argument("command", nargs=-1, shell_complete=_complete_command)
@query_options
@click.pass_context
def help_command(context: click.Context, command: tuple[str, ...]) -> None:
    """Show the help of COMMAND, as dm COMMAND --help does. (--json: the commands below it, too.)"""
    shown = context.find_root()
    for name in command:
        group = shown.command
        below = group.get_command(shown, name) if isinstance(group, click.Group) else None
        if below is None:
            raise UsageError(f"no such command: {' '.join(command)}")
        shown = click.Context(below, info_name=name, parent=shown)
    if context.obj.as_json:
        context.obj.document(_help_fields(shown))
    else:
        sys.stdout.write(shown.get_help() + "\n")


def _help_fields(context: click.Context) -> dict[str, object]:
    """`command`, its one-line `about`, its full `help`, and the `commands` below it."""
    from dmsync.surfaces.cli.main import COMMANDS, dm

    shown = context.command
    below: dict[str, str] = {}
    if shown is dm:
        below = {name: about for part in COMMANDS.values() for name, (_, about) in part.items()}
    elif isinstance(shown, click.Group):
        below = {
            name: command.get_short_help_str(limit=200) for name, command in shown.commands.items()
        }
    return {
        "command": context.command_path,
        "about": shown.get_short_help_str(limit=200),
        "help": context.get_help(),
        "commands": [{"name": name, "about": about} for name, about in below.items()],
    }
