"""Processes that tests start, and waiting for what they do: by polling to a deadline, never by sleeping."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TypeVar

Found = TypeVar("Found")

POLL_INTERVAL_S = 0.01


def wait_until(
    condition: Callable[[], Found | None], *, what: str, deadline_s: float = 20.0
) -> Found:
    """The first truthy answer of `condition`; AssertionError naming `what` after `deadline_s`."""
    end = time.monotonic() + deadline_s
    while not (found := condition()):
        assert time.monotonic() < end, f"{what}: not within {deadline_s} s"
        time.sleep(POLL_INTERVAL_S)
    return found


class Daemon:
    """A process of its own group, its output in a file; `close` ends the whole group."""

    def __init__(
        self,
        command: Sequence[str | os.PathLike[str]],
        *,
        log: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.log = log
        self._log_start = log.stat().st_size if log.exists() else 0
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def __enter__(self) -> "Daemon":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()

    def output(self) -> str:
        """What the process has written so far (earlier runs into the same log left out)."""
        return self.log.read_bytes()[self._log_start :].decode(errors="replace")

    def wait_for(self, pattern: str, *, deadline_s: float = 20.0) -> re.Match[str]:
        """The first match of `pattern` in the output; fails at once when the process has ended."""

        def seen() -> re.Match[str] | None:
            ended = self.process.poll() is not None
            found = re.search(pattern, self.output())
            assert found or not ended, f"ended {self.process.returncode}: {self.output()}"
            return found

        return wait_until(seen, what=f"output matching {pattern!r}", deadline_s=deadline_s)

    def peak_rss_bytes(self) -> int:
        """The largest resident size the process has had; it must be running."""
        return peak_rss_bytes(self.process.pid)

    def terminate(self, *, deadline_s: float = 20.0) -> int:
        """Ask the process to end (SIGTERM) and return its exit code."""
        self.process.terminate()
        return self.process.wait(deadline_s)

    def kill(self) -> None:
        """SIGKILL the whole group; harmless when it has ended."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # the leader was reaped and no other member is left
        self.process.wait(20)


def peak_rss_bytes(pid: int) -> int:
    """VmHWM of a running process, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    assert found is not None, f"process {pid} has no memory of its own: it has ended"
    return int(found[1]) * 1024
