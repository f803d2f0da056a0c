"""A program in a terminal of its own: what it draws, what is left on the screen, keys, resizing."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from types import TracebackType

from tests.support.processes import wait_until

ERASE_LINE = "\x1b[K"
_SLOW_RUN_S = 0.02
_SLOW_STOP_S = 0.06


class Terminal:
    """Runs one program as the foreground job of a new terminal; the terminal outlives it."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        columns: int = 100,
    ) -> None:
        self.output = ""
        self._keyboard, self._screen = pty.openpty()
        self.resize(columns)
        self.modes = termios.tcgetattr(self._screen)
        self.process = subprocess.Popen(
            command,
            stdin=self._screen,
            stdout=self._screen,
            stderr=self._screen,
            env=dict(environment),
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._keyboard)
        os.close(self._screen)

    def resize(self, columns: int) -> None:
        """Change the width; the kernel tells the foreground job by SIGWINCH."""
        fcntl.ioctl(self._keyboard, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def press(self, keys: bytes) -> None:
        """Keys as typed: b"\\x03" is Ctrl-C."""
        os.write(self._keyboard, keys)

    def take(self, wait_s: float = 0.0) -> str:
        """Add what was written to `output`, waiting at most so long for the first of it."""
        while select.select([self._keyboard], [], [], wait_s)[0]:
            self.output += os.read(self._keyboard, 65536).decode(errors="replace")
            wait_s = 0.0
        return self.output

    def wait_for(self, pattern: str, *, slowly: bool = False, deadline_s: float = 60.0) -> str:
        """The first match of `pattern` in the output. `slowly` gives the program a quarter of the
        time, so that quick work can be watched on any machine."""

        def seen() -> str | None:
            if slowly:
                self._run_a_little()
            found = re.search(pattern, self.take())
            ended = self.process.poll() is not None
            assert found or not ended, f"ended {self.process.returncode}: {self.output!r}"
            return found.group() if found else None

        return wait_until(seen, what=f"output matching {pattern!r}", deadline_s=deadline_s)

    def _run_a_little(self) -> None:
        if self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGCONT)
            time.sleep(_SLOW_RUN_S)
            os.kill(self.process.pid, signal.SIGSTOP)
            time.sleep(_SLOW_STOP_S)
            os.kill(self.process.pid, signal.SIGCONT)

    def end(self, deadline_s: float = 120.0) -> int:
        """Wait for the program's end, reading all along; its exit code."""

        def ended() -> bool:
            self.take(0.01)
            return self.process.poll() is not None

        wait_until(ended, what="the end of the program", deadline_s=deadline_s)
        self.take()
        return self.process.returncode

    def lines_drawn(self) -> list[str]:
        """Each state of a line that is written over."""
        return [
            text.split("\r")[0].split("\n")[0]
            for text in self.output.split(f"\r{ERASE_LINE}")[1:]
            if text and not text.startswith(("\r", "\n"))
        ]

    def screen(self) -> list[str]:
        """The lines a reader sees at last, of an endlessly long and wide screen. Knows what a line
        that is written over needs; refuses every other control sequence."""
        lines, column = [""], 0
        for piece in re.findall(r"\x1b\[K|\r|\n|\x08|[^\x1b\r\n\x08]+|.", self.output, re.DOTALL):
            if piece == ERASE_LINE:
                lines[-1] = lines[-1][:column]
            elif piece == "\r":
                column = 0
            elif piece == "\n":
                lines.append("")
            else:
                assert "\x1b" not in piece and "\x08" not in piece, f"{piece!r} in {self.output!r}"
                lines[-1] = (
                    lines[-1][:column].ljust(column) + piece + lines[-1][column + len(piece) :]
                )
                column += len(piece)
        return lines

    def has_sane_modes(self) -> bool:
        """Whether echo, line editing and the rest are as they were before the program ran."""
        return termios.tcgetattr(self._screen) == self.modes
