"""The scorecard's frame: what counts as holding, what the table says, kinds that break."""

import subprocess
import sys
from pathlib import Path

import pytest

from tools.faults import scorecard
from tools.faults.catalogue import CATALOGUE, Entry
from tools.faults.row import FAILURES_SHOWN, Budget, Row
from tools.faults.table import markdown, table

ROOT = Path(__file__).resolve().parents[3]


def row(tried: int = 0, losses: int = 0, *, is_control: bool = False) -> Row:
    made = Row("cuts", "cuts", 7, "python -m tools.faults cuts --seed 7", tried)
    made.is_control = is_control
    for number in range(losses):
        made.lost(f"cut {number}")
    return made


@pytest.mark.parametrize(
    ("tried", "losses", "is_control", "holds"),
    [
        (0, 0, False, False),
        (5, 0, False, True),
        (5, 1, False, False),
        (5, 0, True, False),
        (5, 1, True, True),
        (0, 0, True, False),
    ],
)
def test_a_row_holds_only_when_it_showed_something(tried, losses, is_control, holds):
    assert row(tried, losses, is_control=is_control).holds is holds


def test_losses_are_told_with_what_repeats_them():
    text = table([row(2000), row(1000, FAILURES_SHOWN + 5)])
    assert "2,000 cuts" in text
    assert f"{FAILURES_SHOWN + 5} losses; again: python -m tools.faults cuts --seed 7" in text
    assert "cut 0" in text and f"cut {FAILURES_SHOWN}" not in text


def test_a_control_that_caught_nothing_is_seen():
    text = table([row(10, 0, is_control=True), row(10, 3, is_control=True)])
    assert "NOT CAUGHT" in text and "caught 3" in text
    assert "the seeded fault was not caught" in text


def test_a_cell_cannot_break_the_page():
    broken = row(1)
    broken.counts["kind"] = "a|b"
    assert "a\\|b" in markdown([broken])


def test_the_same_seed_gives_the_same_choices():
    draws = [Budget("", 5, 1).random("cut", 3).random() for _ in range(2)]
    assert draws[0] == draws[1] != Budget("", 5, 1).random("cut", 4).random()


def test_a_kind_that_breaks_does_not_hold(monkeypatch):
    monkeypatch.setitem(CATALOGUE, "gone", Entry("no_such_module", "", 1, 1))
    (found,) = scorecard._run_kind("gone", 1, None)
    assert not found.holds and "gone" in found.failures[0]


def test_a_kind_that_hangs_is_ended(monkeypatch):
    monkeypatch.setattr(scorecard, "SHORT_TIMEOUT_S", 0.05)
    (found,) = scorecard._run_kind("fuzz", 1, None)
    assert not found.holds and "not done" in found.failures[0]


def test_what_is_not_in_the_catalogue_is_a_usage_error():
    done = subprocess.run(
        [sys.executable, "-m", "tools.faults", "nothing"], cwd=ROOT, capture_output=True
    )
    assert done.returncode == 2
