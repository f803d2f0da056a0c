"""One command measured, and what to do with several such measurements."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, TypeVar

LAUNCHER: Final = Path(__file__).with_name("launch.py")
TIMEOUT_S: Final = 1800.0
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Cost:
    """What one command took, its children's too. `written_bytes` are what the kernel counts: the
    pages of files that were made dirty, and all of a large folio when one page of it was.
    `handed_bytes` are what went through write calls, whatever it was written to.

    `more` holds figures that only some commands have, by names with units (`stored_bytes`).
    `stages` are the wall seconds of a `dm` command's stages.
    """

    wall_s: float
    cpu_s: float = 0.0
    peak_rss_bytes: int = 0
    written_bytes: int = 0
    handed_bytes: int = 0
    more: Mapping[str, float] = field(default_factory=dict)
    stages: Mapping[str, float] = field(default_factory=dict)

    def with_more(self, **more: float) -> "Cost":
        """The same with further figures."""
        return replace(self, more={**self.more, **more})

    def figures(self) -> dict[str, float]:
        """All figures that were measured, by name."""
        measured = {
            "wall_s": self.wall_s,
            "cpu_s": self.cpu_s,
            "peak_rss_bytes": self.peak_rss_bytes,
            "written_bytes": self.written_bytes,
            "handed_bytes": self.handed_bytes,
        }
        return {name: value for name, value in measured.items() if value} | dict(self.more)


class _Settling:
    """Whether commands are to find a quiet disk; figures of small data need not."""

    wanted = True


def settle() -> None:
    """Write back what waits, so that the next command does not pay for the last one."""
    if _Settling.wanted:
        os.sync()


def measure_unsettled() -> None:
    """From now on `settle` does nothing: for runs that only show that everything works."""
    _Settling.wanted = False


def measured(
    command: Sequence[str | os.PathLike[str]], environment: Mapping[str, str] | None = None
) -> tuple[Cost, str]:
    """Cost and standard output of a command that must succeed; `environment` adds to ours."""
    return measured_exactly(command, {**os.environ, **(environment or {})})


def measured_exactly(
    command: Sequence[str | os.PathLike[str]], environment: Mapping[str, str]
) -> tuple[Cost, str]:
    """The same with `environment` as the whole environment."""
    settle()
    words = [os.fspath(word) for word in command]
    with tempfile.NamedTemporaryFile("r") as report:
        launcher = [sys.executable, "-S", "-E", str(LAUNCHER), report.name]
        output = run([*launcher, *words], environment)
        told = json.load(report)
    cost = Cost(
        told["wall_s"],
        told["user_s"] + told["system_s"],
        told["peak_rss_bytes"],
        told["written_bytes"],
        told["handed_bytes"],
    )
    return cost, output


def run(
    command: Sequence[str | os.PathLike[str]], environment: Mapping[str, str] | None = None
) -> str:
    """Standard output of a command that must succeed; `environment` None is ours."""
    done = subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=TIMEOUT_S,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{command}: {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def rotated(items: Sequence[Item], start: int) -> list[Item]:
    """The items beginning with another one for each `start`: nobody always comes first."""
    if not items:
        return []
    start %= len(items)
    return [*items[start:], *items[:start]]


def apparent_bytes(directory: Path) -> int:
    """What `du --apparent-size` says; 0 when there is nothing."""
    if not directory.exists():
        return 0
    counted = run(["du", "--apparent-size", "--block-size=1", "--summarize", str(directory)])
    return int(counted.split()[0])


def median(values: Iterable[float]) -> float:
    """The median, 0 of nothing."""
    found = list(values)
    return statistics.median(found) if found else 0.0
