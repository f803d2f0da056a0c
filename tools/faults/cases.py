"""Known holes of programs like this one, each replayed on dm: refused, or harmless.

A case says which hole it is, what happened there and what dm does; what it runs is a function that
returns what went wrong, or nothing. The canaries outside are looked at after each.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from tools.faults.forked import import_everything
from tools.faults.receiving import Scene
from tools.faults.row import Budget, Row
from tools.faults.sentinels import Outside


class Stage:
    """What a case plays on: two stores, the outside, and a file that no command may make."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.directory = budget.directory
        self.scene = Scene(os.path.join(budget.directory, "scene"))
        self.outside = Outside(os.path.join(budget.directory, "outside"))
        self.target = self.outside.path.encode()
        self.mark = os.path.join(budget.directory, "executed")
        self._count = 0

    def new(self, name: str) -> str:
        """A path that is not there yet."""
        self._count += 1
        return os.path.join(self.directory, f"{name}-{self._count}")

    def tree(self, dot: str) -> str:
        """The directory of a dot of the honest store."""
        ran = self.scene.must(self.scene.run("dot", "path", dot))
        return os.fsdecode(ran.stdout.rstrip(b"\n"))


@dataclass(frozen=True)
class Case:
    """`run` returns what went wrong; empty: refused, or harmless."""

    id: str
    was: str
    here: str
    run: Callable[[Stage], str]


def run(budget: Budget) -> list[Row]:
    from tools.faults.case_content import CONTENT_CASES
    from tools.faults.case_words import WORD_CASES

    import_everything()
    repeat = f"python -m tools.faults cases --seed {budget.seed}"
    row = Row("cases", "known holes replayed", budget.seed, repeat)
    began = time.monotonic()
    stage = Stage(budget)
    seen: set[str] = set()
    for case in (*WORD_CASES, *CONTENT_CASES):
        assert case.id not in seen, f"{case.id} is there twice"
        seen.add(case.id)
        if budget.count is not None and row.tried >= budget.count:
            break
        row.tried += 1
        try:
            problem = case.run(stage)
        except (AssertionError, OSError) as exc:
            problem = f"could not be played: {exc}"
        if problem:
            row.lost(f"{case.id} ({case.was}): {problem}")
        if os.path.lexists(stage.mark):
            os.unlink(stage.mark)
            row.lost(f"{case.id} ({case.was}): something was executed")
        for line in stage.outside.harm():
            row.lost(f"{case.id} ({case.was}): outside: {line}")
    row.elapsed_s = time.monotonic() - began
    return [row]
