"""Path races: while the product opens, makes, moves, removes and describes names, somebody swaps a
directory on the way, or the name itself, with a symlink to the outside.

For each kind of system call the functions that restoring and scanning use are called on such a
path; then whole restores, scans and commands run on such trees. The controls do the same with a
check before the use, as programs do, and have to be caught.
"""

import os
import time
from contextlib import suppress
from typing import Final

from tools.faults.flipper import Flipper
from tools.faults.race_calls import CALLS, Call, Ground
from tools.faults.race_trees import race_commands, race_restores, race_scans
from tools.faults.row import Budget, Row
from tools.faults.sentinels import CANARY, Outside

PATIENCE_S: Final = 5.0
"""Per kind and way of swapping, of the short form; the long one has its count."""
CALLS_PER_SECOND_MIN: Final = 1_000
CONTROL_SHARE: Final = 4
"""A control gets a quarter of the tries: it loses one in a few."""


def run(budget: Budget) -> list[Row]:
    count = budget.count or 2_000
    repeat = f"python -m tools.faults races --count {count} --seed {budget.seed}"
    rows = []
    for race in (race_commands, race_restores, race_scans):  # those that fork before all threads
        name = race.__name__.removeprefix("race_")
        row = Row(f"races, {name}", name, budget.seed, repeat)
        began = time.monotonic()
        race(budget, count, row)
        row.elapsed_s = time.monotonic() - began
        rows.append(row)
    calls = Row("races, system calls", "calls", budget.seed, repeat)
    naive = Row("races, check and use", "calls", budget.seed, repeat, is_control=True)
    for kind, call in CALLS.items():
        _race_kind(budget, count, kind, call, calls)
        before = naive.losses
        _race_kind(budget, count // CONTROL_SHARE, kind, call, naive, is_naive=True)
        if naive.losses == before:
            calls.lost(f"{kind}: not even a check before the use was caught: this test is blind")
    return [calls, naive, *rows]


def _race_kind(
    budget: Budget, count: int, kind: str, call: Call, row: Row, *, is_naive: bool = False
) -> None:
    """Half the tries with a directory on the way swapped, half with the name itself. On a busy
    machine the swaps come in bursts, so that the tries go on until there were as many of those; a
    control goes on until it is caught, or nobody would ever be."""
    action = call.naive if is_naive else call.real
    began = time.monotonic()
    caught = 0
    for swaps_leaf in (False, True):
        ground, outside, flipper = _ground(budget, kind, swaps_leaf=swaps_leaf)
        with flipper:
            late = min(
                time.monotonic() + max(PATIENCE_S, count / CALLS_PER_SECOND_MIN),
                budget.deadline_s or float("inf"),
            )
            number = 0
            while time.monotonic() < late:
                is_enough = number >= count // 2 and flipper.swaps >= count
                if is_enough and (caught or not is_naive):
                    break
                number += 1
                seen = None
                with suppress(OSError):
                    seen = action(ground, number)
                if (seen is not None and CANARY in seen) or ground.is_outside_touched():
                    caught += 1
                    ground.look()
                    row.lost(f"{kind}, {'name' if swaps_leaf else 'directory'} swapped")
        ground.close()
        row.tried += number
        row.counts["swaps"] = int(row.counts.get("swaps", 0)) + flipper.swaps
        if not is_naive:
            row.counts[kind] = int(row.counts.get(kind, 0)) + number
            for line in outside.harm():
                row.lost(f"{kind}: outside: {line}")
    if is_naive:
        row.counts[kind] = caught
    row.elapsed_s += time.monotonic() - began


def _ground(budget: Budget, kind: str, *, swaps_leaf: bool) -> tuple[Ground, Outside, Flipper]:
    place = os.path.join(budget.directory, f"{kind}-{swaps_leaf}-{time.monotonic_ns()}")
    os.makedirs(os.path.join(place, "tree", "flip", "below"))
    outside = Outside(os.path.join(place, "outside"))
    tree = os.path.join(place, "tree")
    inside = os.path.join(tree, "flip")
    for name in ("leaf", "data", "victim"):
        with open(os.path.join(inside, name), "wb") as file:
            file.write(b"inside")
    os.symlink("leaf", os.path.join(inside, "link"))
    if swaps_leaf:
        os.symlink(outside.file, os.path.join(inside, "trap"))
        return Ground(tree, outside), outside, Flipper(inside, [("leaf", "trap")])
    os.symlink(outside.path, os.path.join(tree, "trap"))
    return Ground(tree, outside), outside, Flipper(tree, [("flip", "trap")])
