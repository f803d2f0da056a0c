"""Where the traceback of an unexpected failure goes: a private file, never the terminal."""

import contextlib
import os
import re
import time
import traceback
from collections.abc import Sequence

from dmsync.core.names import without_password
from dmsync.errors import DmError
from dmsync.surfaces.cli.output import escape_text
from dmsync.surfaces.settings import store_home

_WORDS = re.compile(r"[\s'\"]+|[^\s'\"]+")
LOG_BYTES_MAX = 1024 * 1024
"""Past this the old log is kept aside once and a new one begun."""


def write_crash_log(bug: BaseException, arguments: Sequence[str], home: str | None) -> str | None:
    """Append the traceback to `crash.log` of the store, else to a new temporary file.

    Returns the file's path, or None when nowhere could be written to.
    """
    text = "".join(
        [
            time.strftime("--- %Y-%m-%d %H:%M:%S UTC ", time.gmtime()),
            f"pid {os.getpid()}: dm {' '.join(map(repr, map(without_password, arguments)))}\n",
            *(_said(line) for line in traceback.format_exception(bug)),
        ]
    )
    try:
        directory = store_home(os.environ, home)
        if os.path.isfile(os.path.join(directory, "format")):
            return _append(os.path.join(directory, "crash.log"), text)
    except (OSError, DmError):
        pass  # no home or not writable: the temporary directory has to do
    try:
        return _write_temporary(text)
    except OSError:
        return None


def _said(text: str) -> str:
    """Part of a traceback, which may quote anything: printable, and URLs without passwords."""
    return "".join(map(without_password, _WORDS.findall(escape_text(text))))


def _append(path: str, text: str) -> str:
    with contextlib.suppress(FileNotFoundError):
        if os.lstat(path).st_size > LOG_BYTES_MAX:
            os.replace(path, path + ".old")
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(path, flags, 0o600), "a", encoding="utf-8", errors="backslashreplace") as log:
        log.write(text)
    return path


def _write_temporary(text: str) -> str:
    import tempfile

    descriptor, path = tempfile.mkstemp(prefix="dm-crash-", suffix=".log")
    with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as log:
        log.write(text)
    return path
