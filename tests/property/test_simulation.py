"""Deterministic simulation: no promise is broken, seeds repeat themselves, seeded faults are found."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SEEDS = 50


def simulation(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tools.simulation", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def logs_of(done: subprocess.CompletedProcess[str]) -> str:
    found = re.search(r"logs ([0-9a-f]{16})\n", done.stdout)
    assert found is not None, done.stdout + done.stderr
    return found[1]


def test_promises_hold_in_fifty_runs() -> None:
    done = simulation(1, "--count", SEEDS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{SEEDS} runs, 0 with problems" in done.stdout


def test_the_same_seeds_give_the_same_logs() -> None:
    first, again = simulation(400, "--count", 8), simulation(400, "--count", 8, "--jobs", 1)
    assert logs_of(first) == logs_of(again)


@pytest.mark.parametrize(
    ("fault", "seeds"),
    [("acknowledge-early", 10), ("no-file-fsync", 10), ("no-compare-and-swap", 60)],
)
def test_a_seeded_fault_is_found(fault: str, seeds: int) -> None:
    done = simulation(1, "--count", seeds, "--stop", "--seeded-fault", fault)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "again: python -m tools.simulation" in done.stdout
