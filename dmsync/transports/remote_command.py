"""The command that serves a store over there: how it is asked for, read, and how it fails."""

import os
import shlex
from typing import Any, Final

from dmsync.core.names import parse_dot_name
from dmsync.errors import (
    AccessDenied,
    DmError,
    HostKeyRejected,
    InvalidName,
    NetworkError,
    NotADmServer,
    StoreNotFound,
    UsageError,
)
from dmsync.transports.streams import Tail

DM_COMMAND: Final = "dm"
SUBSYSTEM: Final = "dmsync"
COMMAND_CHARACTERS_MAX: Final = 8192
DOT_CHARACTERS_MAX: Final = 129
"""A namespace, a slash and a name."""
_SSH_FAILED_EXIT: Final = 255
_CANNOT_RUN_EXITS: Final = (126, 127)


def serve_command(path: str | None, dm_command: str | None) -> str:
    """The command line for the remote's login shell: `dm serve --stdio [--home PATH]`.

    `dm_command` is the user's own text and may hold arguments; the path is quoted.

    Raises:
        UsageError: control characters in either, which a shell might take for the end of it.
    """
    words = [dm_command or DM_COMMAND, "serve", "--stdio"]
    if path is not None:
        words += ["--home", shlex.quote(path)]
    command = " ".join(words)
    if any(ord(character) < 32 or ord(character) == 127 for character in command):
        raise UsageError("control characters in the remote's path or dm-command")
    if len(command) > COMMAND_CHARACTERS_MAX:
        raise UsageError("the remote's path and dm-command are too long")
    return command


def requested_home(command: str) -> str | None:
    """The store path in a command line made by `serve_command`; None when it names none.

    Raises:
        AccessDenied: any other command line.
    """
    words: list[str] = []
    if len(command) <= COMMAND_CHARACTERS_MAX:
        try:
            words = shlex.split(command)
        except ValueError:
            words = []  # an open quote
    is_dm = bool(words) and os.path.basename(words[0]) == DM_COMMAND
    if is_dm and words[1:] == ["serve", "--stdio"]:
        return None
    if is_dm and words[1:4] == ["serve", "--stdio", "--home"] and len(words) == 5:
        return words[4]
    raise AccessDenied("only 'dm serve --stdio' can be run here: this is a dm server, not a shell")


def requested_dot(command: str) -> str | None:
    """The dot that a client of a forced command names instead of a command line; None: none.

    Like git-shell: a name and nothing else is looked at, and nothing is ever given to a shell.
    """
    if len(command) > DOT_CHARACTERS_MAX or not command:
        return None
    try:
        name = parse_dot_name(command)
    except InvalidName:
        return None
    return str(name) if name.branch is None and name.subdot is None else None


def _telling_line(said: str) -> str:
    """The line that says what went wrong: dm's own error if there is one, else the last."""
    lines = said.splitlines()
    return next((line for line in lines if line.startswith("dm: error:")), lines[-1])


def failure_of_silent_end(tail: Tail, where: str, *, through_ssh: bool) -> DmError | None:
    """Why a remote command ended without a byte; None when it simply ended well.

    `through_ssh`: an OpenSSH client stands between, whose own failures have exit status 255.
    """
    said = tail.text()
    facts: dict[str, Any] = {"exit_status": tail.exit_status, "diagnostics": tail.describe()}
    last = f": {_telling_line(said)}" if said else ""
    if through_ssh and tail.exit_status == _SSH_FAILED_EXIT:
        if "Host key verification failed" in said or "host key" in last.lower():
            return HostKeyRejected(f"ssh does not trust the host key of {where}{last}", **facts)
        if "Permission denied" in said or "Too many authentication failures" in said:
            return AccessDenied(f"{where} refused the login{last}", **facts)
        return NetworkError(f"ssh cannot reach {where}{last}", **facts)
    if tail.exit_status in _CANNOT_RUN_EXITS:
        return NotADmServer(
            f"{where} cannot run dm{last}",
            hint="install dmsync there, or say where dm is: dm-command = PATH under "
            "[remote.NAME] in config.toml, or dm remote add --dm-command PATH",
            **facts,
        )
    if tail.exit_status == StoreNotFound.exit_code and "dm: error:" in said:
        return StoreNotFound(
            f"{where} has no store there{last}",
            hint="is its disk mounted? A new one is made there by: dm --home PATH init --bare",
            **facts,
        )
    if tail.exit_status or tail.exit_signal:
        return NotADmServer(f"dm on {where} ended at once{last}", **facts)
    return None
