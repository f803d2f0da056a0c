"""Commands from the user's own settings that quiet an application while its tree is read.

Two forms. A pair: `quiesce` before, `unquiesce` after, whatever happened between. Or `hold`: one
command that prints a line `ready` once the application is quiet and lets go when its standard
input closes; it can keep a lock or a connection open (`sqlite3` inside BEGIN IMMEDIATE), and the
kernel ends it for us when dm is killed. Commands run by /bin/sh in their own process group with
DM_DOT, DM_BRANCH, DM_TREE and DM_HOOK in the environment. Nothing here ever comes from a peer.
"""

import os
import selectors
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import IO, Final

from dmsync.errors import CaptureFailed, Interrupted

HOOK_TIMEOUT_S: Final = 60.0
_GRACE_S: Final = 5.0
"""How long a hook may take to end after it was told to."""
_MESSAGE_BYTES: Final = 2000
_MESSAGE_LINES: Final = 5
_READY: Final = b"ready"
_READY_BYTES_MAX: Final = 64 * 1024


@dataclass(frozen=True, slots=True)
class HookCommands:
    """Shell commands; empty ones are not run. `hold` runs inside the pair."""

    quiesce: str = ""
    unquiesce: str = ""
    hold: str = ""
    timeout_s: float = HOOK_TIMEOUT_S

    def __bool__(self) -> bool:
        return bool(self.quiesce or self.unquiesce or self.hold)


def hook_environment(*, dot: str, branch: str, tree: str) -> dict[str, str]:
    """The contract with hook commands, DM_HOOK apart."""
    return {"DM_DOT": dot, "DM_BRANCH": branch, "DM_TREE": tree}


@contextmanager
def quiesced(hooks: HookCommands, environment: Mapping[str, str]) -> Iterator[float]:
    """Hold the application quiet for the body. Yields the time.monotonic() the pause began at.

    The pause is undone on every way out: errors, SIGINT and SIGTERM (which become Interrupted
    while the body runs in the main thread), a failed quiesce itself included.

    Raises:
        CaptureFailed: a hook failed, timed out, or let go before the body was done.
        Interrupted: a signal came.
    """
    with _signals_raise():
        began = time.monotonic()
        try:
            if hooks.quiesce:
                _run(hooks.quiesce, "quiesce", hooks.timeout_s, environment)
            if hooks.hold:
                with _held(hooks.hold, hooks.timeout_s, environment):
                    yield began
            else:
                yield began
        except BaseException:
            _undo_after_failure(hooks, environment)
            raise
        if hooks.unquiesce:
            with _signals_wait():
                _run(hooks.unquiesce, "unquiesce", hooks.timeout_s, environment)


def _undo_after_failure(hooks: HookCommands, environment: Mapping[str, str]) -> None:
    """Unquiesce while an error is on its way out; that error is the one to tell."""
    if hooks.unquiesce:
        with _signals_wait():
            try:
                _run(hooks.unquiesce, "unquiesce", hooks.timeout_s, environment)
            except CaptureFailed:
                return


# --- signals -----------------------------------------------------------------------------------

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise Interrupted(f"interrupted by {signal.Signals(number).name}", signal=number)


@contextmanager
def _signals_raise() -> Iterator[None]:
    """Signals that would end the process become an exception, so that the pause is undone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, _interrupt)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Signals are kept until the body is done: the undoing is not undone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pending: list[int] = []
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, lambda number, frame: pending.append(number))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if pending:
        _interrupt(pending[0], None)


# --- commands ----------------------------------------------------------------------------------


@contextmanager
def _started(
    command: str, hook: str, environment: Mapping[str, str], messages: IO[bytes], *, is_held: bool
) -> Iterator[subprocess.Popen[bytes]]:
    """The running hook; its whole process group is gone when the body is left early."""
    # env(1) adds our variables to the inherited environment, which only surfaces read.
    values = [f"{name}={value}" for name, value in environment.items()]
    argv = ["/usr/bin/env", *values, f"DM_HOOK={hook}", "/bin/sh", "-c", command]
    try:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE if is_held else subprocess.DEVNULL,
            stdout=subprocess.PIPE if is_held else messages,
            stderr=messages,
            start_new_session=True,
            bufsize=0,
        )
    except OSError as exc:
        raise CaptureFailed(f"the {hook} hook cannot be run: {exc.strerror}", hook=hook) from exc
    try:
        yield process
    finally:
        if process.stdin is not None:
            process.stdin.close()
            _wait(process, _GRACE_S)
        if process.poll() is None:
            _kill_group(process)
        if process.stdout is not None:
            process.stdout.close()


def _wait(process: subprocess.Popen[bytes], timeout_s: float) -> None:
    """Give the hook time to end by itself."""
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, then SIGKILL, to the hook and what it started (it leads its own session)."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            pass
        _wait(process, _GRACE_S)
        if process.poll() is not None:
            return


def _run(command: str, hook: str, timeout_s: float, environment: Mapping[str, str]) -> None:
    """Run one hook to its end. Raises CaptureFailed."""
    with tempfile.TemporaryFile() as messages:
        with _started(command, hook, environment, messages, is_held=False) as process:
            try:
                code = process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                raise _failure(hook, f"took more than {timeout_s:g} s", messages) from None
        if code != 0:
            raise _failure(hook, ending(code), messages, exit_status=code)


def ending(code: int) -> str:
    """How a command ended, in words, by the exit code that subprocess gives."""
    return f"exited {code}" if code >= 0 else f"was killed by signal {-code}"


def _failure(
    hook: str, what: str, messages: IO[bytes], *, exit_status: int | None = None
) -> CaptureFailed:
    """The error of a failed hook, with the last lines it printed, made safe for a terminal."""
    said = last_lines(messages)
    message = f"the {hook} hook {what}" + (f": {said}" if said else "")
    return CaptureFailed(message, hook=hook, exit_status=exit_status)


def last_lines(messages: IO[bytes]) -> str:
    """The last lines of what a command printed, on one line and made safe for a terminal."""
    size = messages.seek(0, os.SEEK_END)
    messages.seek(max(0, size - _MESSAGE_BYTES))
    lines = messages.read().decode("utf-8", "replace").splitlines()[-_MESSAGE_LINES:]
    return " | ".join(
        "".join(c if c.isprintable() or c == "\t" else "?" for c in line)
        for line in lines
        if line.strip()
    )


@contextmanager
def _held(command: str, timeout_s: float, environment: Mapping[str, str]) -> Iterator[None]:
    """Run a hook that holds for the body. Raises CaptureFailed."""
    with tempfile.TemporaryFile() as messages:
        with _started(command, "hold", environment, messages, is_held=True) as process:
            assert process.stdin is not None and process.stdout is not None
            if not _says_ready(process.stdout, timeout_s):
                raise _not_ready(process, messages, timeout_s)
            drain = threading.Thread(target=_drain, args=(process.stdout,), daemon=True)
            drain.start()
            yield
            code = process.poll()
            if code is not None:
                what = f"let go before the tree was read: it {ending(code)}"
                raise _failure("hold", what, messages, exit_status=code)
            process.stdin.close()
            try:
                process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                what = f"did not let go within {timeout_s:g} s of its input closing"
                raise _failure("hold", what, messages) from None
            finally:
                if process.poll() is None:
                    _kill_group(process)
                drain.join(_GRACE_S)


def _not_ready(
    process: subprocess.Popen[bytes], messages: IO[bytes], timeout_s: float
) -> CaptureFailed:
    try:
        code = process.wait(0.2)  # its output has ended: so will it, or it never will
    except subprocess.TimeoutExpired:
        return _failure("hold", f"was not ready within {timeout_s:g} s", messages)
    return _failure("hold", f"{ending(code)} before it was ready", messages, exit_status=code)


def _says_ready(output: IO[bytes], timeout_s: float) -> bool:
    """Whether a line `ready` comes in time, before the output ends."""
    deadline = time.monotonic() + timeout_s
    seen = b""
    with selectors.DefaultSelector() as selector:
        selector.register(output, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0 and len(seen) <= _READY_BYTES_MAX:
            if not selector.select(left):
                return False
            data = os.read(output.fileno(), 4096)
            seen += data
            if _READY in (line.strip() for line in seen.split(b"\n")[:-1]):
                return True
            if not data:
                return False
    return False


def _drain(output: IO[bytes]) -> None:
    """Read on, so that a talkative hook never blocks on its output."""
    try:
        while os.read(output.fileno(), 65536):
            pass
    except (OSError, ValueError):  # closed under us
        return
