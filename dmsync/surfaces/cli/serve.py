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
@query_options
@click.pass_obj
def serve_command(
    invocation: Invocation,
    listen: str | None,
    host_key: str | None,
    authorized_keys: str | None,
    stdio: bool,
) -> None:
    """Serve this store until stopped; the line `listening on HOST:PORT` says it is ready.

    Keys may carry dm-role="read|append|write|admin" and dm-dots="pattern,..." options. --stdio is
    what a stock sshd runs, as a command or forced command.
    """
    from dmsync.surfaces.cli.connection import serve_listening, serve_stdio

    if invocation.dry_run:
        raise UsageError("dm serve has no dry run")
    if stdio == (listen is not None):
        raise UsageError("one of --listen HOST:PORT and --stdio")
    if stdio:
        serve_stdio(invocation)
        return
    if host_key is None or authorized_keys is None:
        raise UsageError("--listen needs --host-key FILE and --authorized-keys FILE")
    assert listen is not None
    host, port = split_address(listen)
    serve_listening(invocation, host, port, host_key, authorized_keys, _say_ready)


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
