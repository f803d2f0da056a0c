"""Seeds of the deterministic simulation: two clients, a server and gc in one process, on simulated
time, disks and connections (tools/simulation). Controls break the product first.
"""

import json
import os
import subprocess
import sys
from typing import Final

from tools.faults.row import Budget, Row

CONTROLS: Final = (
    "no-compare-and-swap",
    "acknowledge-early",
    "no-directory-fsync",
    "no-file-fsync",
)
CONTROL_SEEDS_MAX: Final = 200
CONTROL_BATCH: Final = 40
SEEDS_MAX: Final = 1_000_000


def run(budget: Budget) -> list[Row]:
    """`count` seeds from a first one that the budget's seed gives; then the controls."""
    first = budget.random("simulation").randrange(SEEDS_MAX)
    count = budget.count or CONTROL_SEEDS_MAX
    row = Row("simulation", "seeds", first, f"python -m tools.simulation {first} --count {count}")
    _take(row, first, count, budget)
    return [row, *(_control(budget, name, first) for name in CONTROLS)]


def _control(budget: Budget, fault: str, first: int) -> Row:
    """Goes on until the fault is caught, at most CONTROL_SEEDS_MAX seeds."""
    repeat = (
        f"python -m tools.simulation {first} --count {CONTROL_SEEDS_MAX} --seeded-fault {fault}"
    )
    row = Row(f"simulation, control: {fault}", "seeds", first, repeat, is_control=True)
    while not row.losses and row.tried < CONTROL_SEEDS_MAX:
        _take(row, first + row.tried, CONTROL_BATCH, budget, fault)
    return row


def _take(row: Row, first: int, count: int, budget: Budget, fault: str | None = None) -> None:
    """Run seeds in a process with hashes of its own, and count what it tells."""
    command = [sys.executable, "-m", "tools.simulation", str(first), "--json"]
    command += ["--count", str(count), "--jobs", str(budget.jobs)]
    command += ["--seeded-fault", fault, "--stop"] if fault else []
    command += ["--deadline", str(budget.deadline_s)] if budget.deadline_s is not None else []
    done = subprocess.run(
        command, check=False, capture_output=True, env={**os.environ, "PYTHONHASHSEED": "0"}
    )
    if done.returncode not in (0, 1):
        raise RuntimeError(f"the simulation failed: {done.stderr.decode(errors='replace')[-2000:]}")
    told = json.loads(done.stdout)
    row.tried += told["runs"]
    for name, number in told["counts"].items():
        row.counts[name] = int(row.counts.get(name, 0)) + number
    for failure in told["failures"]:
        row.lost(failure)
