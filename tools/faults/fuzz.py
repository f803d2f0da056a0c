"""Every decoder fuzzed, coverage-guided, with a stated seed (tools/fuzzing)."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tools.faults.row import Budget, Row

_ROOT = Path(__file__).parents[2]


def run(budget: Budget) -> list[Row]:
    """A row for each decoder; the count is of inputs for each."""
    runs = budget.count or 100_000
    names = _names()
    halves = [names[number :: budget.jobs] for number in range(budget.jobs)]
    seed = budget.seed % (1 << 31) or 1
    running = [_start(half, runs, seed, budget.directory) for half in halves if half]
    found: dict[str, dict[str, Any]] = {}
    said = ""
    for process in running:
        output, errors = process.communicate()
        said = said or ("" if process.returncode == 0 else errors[-500:])
        found.update((line["name"], line) for line in map(json.loads, output.splitlines()))
    return [_row(name, found.get(name), seed, runs, said) for name in names]


def _names() -> list[str]:
    listing = [sys.executable, "-c", "from tools.fuzzing.decoders import *; print(*DECODERS)"]
    return subprocess.run(
        listing, cwd=_ROOT, check=True, capture_output=True, text=True
    ).stdout.split()


def _start(names: list[str], runs: int, seed: int, scratch: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "tools.fuzzing", *names, f"--runs={runs}", f"--seed={seed}"]
    return subprocess.Popen(
        command,
        cwd=_ROOT,
        env={**os.environ, "TMPDIR": scratch},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _row(name: str, found: dict[str, Any] | None, seed: int, runs: int, said: str) -> Row:
    repeat = f"python -m tools.fuzzing {name} --runs {runs} --seed {seed}"
    row = Row(f"fuzz {name}", "inputs", seed, repeat)
    if found is None:
        row.lost(f"did not run: {said}")
        return row
    row.tried = found["runs"] or len(found["inputs"])
    row.counts["edges"] = found["covered"]
    if found["failed"]:
        inputs = " ".join(f"--reproduce {data}" for data in found["inputs"]) or "no input kept"
        row.lost(f"python -m tools.fuzzing {name} {inputs}: {found['said'][-800:]}")
    return row
