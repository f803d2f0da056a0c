"""What a command costs before it does anything."""

import sys

from tools.benchmarks.measuring import measured, measured_exactly, rotated
from tools.benchmarks.peers import Dm
from tools.benchmarks.result import RowResult
from tools.benchmarks.workspace import Workspace

STEP = "start"
BARE = "python3 -c pass"
TARGETS = {"dm version": 5.0, "dm list": 10.0, "dm status": 10.0}
REPETITIONS = 4
"""Of each run: these commands are short, and medians of few are noise."""


def small_dot(work: Workspace, row: RowResult) -> None:
    """`dm` beside a bare interpreter, on a clean dot of a few files."""
    with work.directory("start") as directory:
        dm = Dm(directory)
        source = directory / "data"
        source.mkdir()
        for number in range(10):
            (source / f"file{number}").write_text("content\n")
        dm.commit(source)
        for number in range(work.runs * REPETITIONS):
            for name in rotated([BARE, *TARGETS], number):
                if name == BARE:
                    cost, _ = measured([sys.executable, "-c", "pass"])
                else:
                    command = [*dm.cluster.program, name.split()[1]]
                    cost, _ = measured_exactly(command, dm.cluster.environment)
                row.add(STEP, name, cost)
    row.runs = work.runs * REPETITIONS
    bare_s = row.median(STEP, BARE, "wall_s")
    for name, most in TARGETS.items():
        row.check_ratio(name, row.median(STEP, name, "wall_s"), bare_s, "s", most)
