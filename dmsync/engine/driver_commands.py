"""Runs diff and merge commands of the user's own configuration: bounded in time and in output.

A command runs by /bin/sh in its own process group, without standard input, in a directory the
caller names. Nothing here ever comes from a remote, a dot or a tree.
"""

import fnmatch
import os
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Final

from dmsync.engine.hooks import ending, last_lines
from dmsync.engine.settings import DriverCommand
from dmsync.errors import DriverFailed

DRIVER_TIMEOUT_S: Final = 60.0
OUTPUT_BYTES_MAX: Final = 8 * 1024 * 1024
_GRACE_S: Final = 2.0
"""How long a command may take to end after it was told to."""
_READ_BYTES: Final = 64 * 1024
_POLL_S: Final = 0.05


@dataclass(frozen=True, slots=True)
class DriverRun:
    """How a command ended. `output` is what it printed, `is_truncated` when that was too much;
    `message` the last lines of its standard error, safe to print."""

    exit_status: int
    output: bytes
    is_truncated: bool
    message: str


def claims_path(driver: DriverCommand, path: bytes) -> bool:
    """Does one of its patterns fit the path in the dot, or the path's last name?"""
    text = os.fsdecode(path)
    name = text.rpartition("/")[2]
    return any(
        fnmatch.fnmatchcase(text, pattern) or fnmatch.fnmatchcase(name, pattern)
        for pattern in driver.patterns
    )


def run_driver(
    driver: DriverCommand,
    variables: Mapping[str, bytes],
    *,
    directory: str,
    timeout_s: float = DRIVER_TIMEOUT_S,
) -> DriverRun:
    """Run the command to its end with `variables` in its environment. Its exit status is for the
    caller to judge; too much output ends it.

    Raises:
        DriverFailed: it cannot be started, or takes longer than `timeout_s`.
    """
    # env(1) adds our variables to the inherited environment, which only surfaces read.
    values = [os.fsencode(name) + b"=" + value for name, value in variables.items()]
    argv = [b"/usr/bin/env", *values, b"/bin/sh", b"-c", os.fsencode(driver.command)]
    with tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
                cwd=directory,
                bufsize=0,
            )
        except OSError as exc:
            raise _failed(driver, f"cannot be run: {exc.strerror}") from exc
        assert process.stdout is not None
        try:
            output, is_truncated = _output(process, process.stdout, timeout_s)
            if output is None:
                raise _failed(driver, f"took more than {timeout_s:g} s", message=last_lines(errors))
        finally:
            _end_group(process)
            process.stdout.close()
        return DriverRun(process.returncode, output, is_truncated, last_lines(errors))


def failed(driver: DriverCommand, run: DriverRun) -> DriverFailed:
    """The error of a command that ended as it should not."""
    return _failed(
        driver, ending(run.exit_status), message=run.message, exit_status=run.exit_status
    )


def _failed(
    driver: DriverCommand, what: str, *, message: str = "", exit_status: int | None = None
) -> DriverFailed:
    said = f": {message}" if message else ""
    return DriverFailed(
        f"the command of driver {driver.name} {what}{said}",
        hint="it stands in your configuration",
        driver=driver.name,
        exit_status=exit_status,
    )


def _output(
    process: subprocess.Popen[bytes], stream: IO[bytes], timeout_s: float
) -> tuple[bytes | None, bool]:
    """What the command prints until it ends, and whether that was cut; None when it takes too long.

    What it leaves running in the background is not waited for.
    """
    deadline = time.monotonic() + timeout_s
    pieces: list[bytes] = []
    size = 0
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        is_open = True
        while is_open or process.poll() is None:
            left = deadline - time.monotonic()
            if left <= 0:
                return None, False
            has_ended = process.poll() is not None
            if not is_open:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(left)
            elif selector.select(0 if has_ended else min(_POLL_S, left)):
                data = os.read(stream.fileno(), _READ_BYTES)
                is_open = data != b""
                pieces.append(data)
                size += len(data)
                if size > OUTPUT_BYTES_MAX:
                    return b"".join(pieces)[:OUTPUT_BYTES_MAX], True
            elif has_ended:
                break
    return b"".join(pieces), False


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, then SIGKILL, to whatever is left of the command (it leads its own session)."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            continue
