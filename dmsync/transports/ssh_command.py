"""Connecting with the user's own ssh command (DM_SSH_COMMAND).

Host keys and logins are that command's affair.
"""

import shlex
from functools import partial

from dmsync.core.names import RemoteUrl
from dmsync.errors import ConfigError, UsageError
from dmsync.transports.child_process import ProcessStream
from dmsync.transports.remote_command import failure_of_silent_end, serve_command


def ssh_arguments(url: RemoteUrl, ssh_command: str, dm_command: str | None) -> list[str]:
    """The argument vector; the host cannot be read as an option, and no shell of ours sees it.

    Raises:
        ConfigError: `ssh_command` is no command.
        UsageError: the URL holds what ssh or the remote's shell might read as syntax.
    """
    try:
        arguments = shlex.split(ssh_command)
    except ValueError as exc:
        raise ConfigError(f"DM_SSH_COMMAND cannot be read: {exc}") from exc
    if not arguments:
        raise ConfigError("DM_SSH_COMMAND is empty")
    for word in (url.host, url.user or ""):
        if word.startswith("-") or any(ord(c) <= 32 or ord(c) == 127 for c in word):
            raise UsageError("the remote's host or user is not valid")
    arguments.append("-T")
    if url.port is not None:
        arguments += ["-p", str(url.port)]
    if url.user is not None:
        arguments += ["-l", url.user]
    return [*arguments, "--", url.host, serve_command(url.path, dm_command)]


async def connect_by_command(
    url: RemoteUrl, ssh_command: str, dm_command: str | None
) -> ProcessStream:
    """A stream to `dm serve --stdio` on the host.

    Raises:
        ConfigError, UsageError: see `ssh_arguments`.
        NetworkError: the command cannot be run. What it reports is raised by the first read.
    """
    meaning = partial(failure_of_silent_end, where=url.host, through_ssh=True)
    return await ProcessStream.start(ssh_arguments(url, ssh_command, dm_command), meaning)
