"""The twelve seeded faults (tools/faults/seeded.py): each must be found by a row that claims to.

A row that finds nothing in a product that is broken on purpose would show nothing of a sound one.
The product as it is, looked at in the same way, shows nothing: that is what the rows themselves are
for.
"""

import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Final

from tools.faults import errors, forked, kills, load_kills, seeded
from tools.faults.catalogue import CATALOGUE
from tools.faults.row import Budget, Row
from tools.faults.scenes import SCENES, forked_once
from tools.faults.trying import remove, workplace

Check = Callable[[Budget, str, str], list[str]]
"""(budget, name of a fault or "" for none, scratch space) to what was found."""


def run(budget: Budget) -> list[Row]:
    """One row for each fault. `count` limits to so many faults, in their order."""
    forked_once()
    names = list(seeded.FAULTS)[: budget.count]
    return [_control(budget, name) for name in names]


def _control(budget: Budget, name: str) -> Row:
    repeat = f"python -m tools.faults controls --seed {budget.seed}"
    row = Row(f"control: {name}", "seeded faults", budget.seed, repeat, is_control=True)
    row.counts["by"] = CHECKS[name][0]
    place = workplace(replace(budget, directory=tempfile.mkdtemp(dir=budget.directory)))
    try:
        row.tried = 1
        for found in CHECKS[name][1](budget, name, place):
            row.lost(found)
    finally:
        remove(place)
    return row


def _by_order(budget: Budget, fault: str, place: str) -> list[str]:
    return kills.order_problems(SCENES["commit"], fault, place)


def _by_kills(budget: Budget, fault: str, place: str) -> list[str]:
    few = replace(budget, count=4)
    return kills.kills_at_removals(few, SCENES["commit-joining"], fault, place)


def _by_errors(error: str) -> Check:
    def check(budget: Budget, fault: str, place: str) -> list[str]:
        few = replace(budget, count=8)
        return errors.problems_at_lasting(few, SCENES["commit"], fault, error, place)

    return check


def _by_load(budget: Budget, fault: str, place: str) -> list[str]:
    """Until it is caught: whether two meet is chance."""
    for seed in range(budget.seed, budget.seed + 5):
        one = replace(budget, seed=seed, count=2, directory=tempfile.mkdtemp(dir=place))
        row = load_kills.run_with(one, fault)
        if row.losses:
            return row.failures
    return []


def _by_row(name: str, *counts: int) -> Check:
    """Another row, in a process that has the fault from its beginning; with more to try until it
    is caught, where chance has a part."""

    def check(budget: Budget, fault: str, place: str) -> list[str]:
        for count in counts:
            found = tried(budget, fault, tempfile.mkdtemp(dir=place), count)
            # a row that fell over (the fault removed what it stands on) has found nothing itself
            if found := [line for line in found if not line.startswith(_FELL_OVER)]:
                return found
        return []

    def tried(budget: Budget, fault: str, directory: str, count: int) -> list[str]:
        def work() -> list[str]:
            if fault:
                seeded.apply(fault)
            rows = CATALOGUE[name].run(replace(budget, directory=directory, count=count))
            return [failure for row in rows if not row.is_control for failure in row.failures]

        return forked.in_fork(work, 300.0)

    return check


def _by_withholding(budget: Budget, fault: str, place: str) -> list[str]:
    """A client that leaves a chunk out pushes to a server that has the fault."""
    scene = SCENES["push"]
    directory = os.path.join(place, "push")
    scene.prepare(directory)
    environment = scene.environment(directory)
    hook = partial(seeded.apply, fault) if fault else None
    with tempfile.TemporaryFile() as output, forked.Nursery(environment, hook) as nursery:
        outputs = (output.fileno(), output.fileno())
        pid = forked.start_dm(
            scene.arguments(), environment, outputs, nursery=nursery, hook=_withhold_chunks
        )
        code = forked.wait_for(pid, forked.PATIENCE_S)
    return scene.verify(directory, code == 0)


def _withhold_chunks() -> None:
    """From now on this process forgets a chunk of each commit that it sends."""
    from dmsync.engine.sync_objects import RootComparison

    comparison: Any = RootComparison
    real = comparison.steps

    def steps(self: Any) -> Any:
        yield from real(self)
        if self.added.chunks:
            self.added.chunks.popitem()

    comparison.steps = steps


def _by_a_bomb(budget: Budget, fault: str, place: str) -> list[str]:
    """A small frame of a large run of zeros, said to be small."""

    def work() -> list[str]:
        import zstandard

        if fault:
            seeded.apply(fault)
        from dmsync.core import delta
        from dmsync.errors import BadObject

        frame = zstandard.ZstdCompressor().compress(bytes(_BOMB_BYTES))
        try:
            data = delta.decompress(frame, 1000)
        except BadObject:
            return []
        return [f"a frame of {len(frame)} bytes, said to be 1000, became {len(data)}"]

    return forked.in_fork(work)


_FELL_OVER: Final = ("failed: ", "ended with ")
_BOMB_BYTES: Final = 64 * 1024 * 1024

CHECKS: Final[dict[str, tuple[str, Check]]] = {
    "no-directory-fsync": ("kills", _by_order),
    "no-file-fsync": ("kills", _by_order),
    "acknowledge-early": ("kills", _by_order),
    "retry-fsync": ("errors", _by_errors("EIO")),
    "delete-first": ("kills", _by_kills),
    "look-then-open": ("races", _by_row("races", 200, 800, 3_000)),
    "no-compare-and-swap": ("load-kills", _by_load),
    "trust-the-wire": ("a hostile client", _by_withholding),
    "unlimited-zstd": ("a bomb", _by_a_bomb),
    "stale-locks": ("load-kills", _by_load),
    "ignore-short-write": ("errors", _by_errors(errors.SHORT)),
    "swallow-eio": ("errors", _by_errors("EIO")),
}
"""The fault to the row that is to find it, and how it is asked."""
