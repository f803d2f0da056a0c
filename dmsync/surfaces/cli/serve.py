"""`dm serve`: this store, for other clusters to push to and pull from."""

import click

from dmsync.errors import UsageError
from dmsync.surfaces.cli import output
from dmsync.surfaces.cli.invocation import FILE_NAME, DmCommand, Invocation, query_options


@click.command(
    "serve",
    cls=DmCommand,
    epilog="Example: dm serve --listen 0.0.0.0:2222 --host-key host_key "
    "--authorized-keys authorized_keys",
)
@click.option("--listen", metavar="HOST:PORT", help="Be an SSH server there (port 0: any).")
@click.option("--host-key", type=FILE_NAME, metavar="FILE", help="Private key of the server.")
@click.option(
    "--authorized-keys", type=FILE_NAME, metavar="FILE", help="Who may connect, and as what."
)
@click.option("--stdio", is_flag=True, help="One session on stdin and stdout (run by sshd).")
@click.option("--user", metavar="NAME", help="With --stdio: who the key belongs to.")
@click.option(
    "--role",
    type=click.Choice(["read", "append", "write", "admin"]),
    help="With --stdio: what the key may do.",
)
@click.option("--dots", metavar="PATTERN,...", help="With --stdio: which dots the key is for.")
@query_options
@click.pass_obj
def serve_command(
    invocation: Invocation,
    listen: str | None,
    host_key: str | None,
    authorized_keys: str | None,
    stdio: bool,
    user: str | None,
    role: str | None,
    dots: str | None,
) -> None:
    """Serve this store until stopped; the line `listening on HOST:PORT` says it is ready.

    Keys may carry dm-role="read|append|write|admin", dm-dots="pattern,..." and dm-user="name"
    options. --stdio is what a stock sshd runs, as a command, or as a forced command with --user,
    --role and --dots for its key: then clients can ask for nothing else. Refusals are told on
    stderr; what was done is in dm op log.
    """
    from dmsync.surfaces.cli.connection import StdioRights, serve_listening, serve_stdio

    if invocation.dry_run:
        raise UsageError("dm serve has no dry run")
    if stdio == (listen is not None):
        raise UsageError("one of --listen HOST:PORT and --stdio")
    if stdio:
        _check_rights(user, dots)
        serve_stdio(invocation, StdioRights(user, role, dots))
        return
    if (user, role, dots) != (None, None, None):
        raise UsageError("--user, --role and --dots go with --stdio; keys of --listen have dm-user")
    if host_key is None or authorized_keys is None:
        raise UsageError("--listen needs --host-key FILE and --authorized-keys FILE")
    assert listen is not None
    host, port = split_address(listen)
    serve_listening(invocation, host, port, host_key, authorized_keys, _say_ready)


def _check_rights(user: str | None, dots: str | None) -> None:
    """A rule that cannot be read lets nobody in. Raises UsageError."""
    from dmsync.core.names import check_namespace
    from dmsync.engine.access import parse_dot_pattern

    if user is not None:
        check_namespace(user)
    for text in [] if dots is None else dots.split(","):
        try:
            parse_dot_pattern(text.strip(), user or "")
        except ValueError as exc:
            raise UsageError(str(exc)) from exc


def _say_ready(host: str, port: int) -> None:
    import sys

    output.write_line(f"listening on {f'[{host}]' if ':' in host else host}:{port}")
    sys.stdout.flush()


def split_address(text: str) -> tuple[str, int]:
    """`HOST:PORT`, `[IPV6]:PORT`, `:PORT` (all addresses). Raises UsageError."""
    host, colon, port = text.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise UsageError(f"not HOST:PORT: {text}")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise UsageError(f"write an IPv6 address in brackets: [{host}]:{port}")
    return host, int(port)
