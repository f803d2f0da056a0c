"""Hostile content: names, links, kinds, modes, attributes, pages and sizes as no honest dm records
them, sent in every way; then what may be recorded, applied by every command that writes.

A case is one entry, tree or file sent or applied once. Refused means: a typed error, nothing of it
at the receiver. Harmless means: the canaries outside are as they were.
"""

import os
import time
from collections.abc import Iterator

from tools.faults.content_applied import apply_everything
from tools.faults.content_corpus import KINDS, REFUSED, REFUSED_NAMES, Build, named
from tools.faults.forked import Ran, import_everything
from tools.faults.hostile_trees import RawEntry, TreeMaker
from tools.faults.receiving import WAYS, Scene, is_refused
from tools.faults.row import Budget, Row
from tools.faults.sentinels import Outside


def run(budget: Budget) -> list[Row]:
    """`count` bounds the sendings of what is refused; None: each once (short), every way (long)."""
    repeat = f"python -m tools.faults content --seed {budget.seed}"
    if budget.is_long:
        repeat += " --long"
    import_everything()
    scene = Scene(os.path.join(budget.directory, "scene"))
    outside = Outside(os.path.join(budget.directory, "outside"))
    refused = Row("content, refused", "cases", budget.seed, repeat)
    began = time.monotonic()
    _send_refused(budget, scene, outside, refused)
    refused.elapsed_s = time.monotonic() - began
    applied = Row("content, applied", "cases", budget.seed, repeat)
    began = time.monotonic()
    apply_everything(budget, scene, outside, applied)
    applied.elapsed_s = time.monotonic() - began
    return [refused, applied]


def _cases(outside: bytes, budget: Budget) -> Iterator[tuple[str, Build, str]]:
    """(what, build, way)."""
    ways = list(WAYS)
    budget.random("ways").shuffle(ways)
    number = 0
    for what, build in REFUSED.items():
        for way in ways if budget.is_long else (ways[number % len(ways)],):
            yield what, build, way
        number += 1
    kinds = [kind for kind in KINDS if kind != "hardlink"]
    for name in REFUSED_NAMES:
        for kind in kinds if budget.is_long else (kinds[number % len(kinds)],):
            for way in ways if budget.is_long else (ways[(number // 2) % len(ways)],):
                yield f"{kind} {name[:40]!r}", _one_name(name, kind, outside), way
        number += 1


def _one_name(name: bytes, kind: str, outside: bytes) -> Build:
    def build(maker: TreeMaker) -> RawEntry:
        return maker.root(named(maker, name, kind, outside))

    return build


def _send_refused(budget: Budget, scene: Scene, outside: Outside, row: Row) -> None:
    for what, build, way in _cases(outside.path.encode(), budget):
        if budget.count is not None and row.tried >= budget.count:
            break
        if budget.deadline_s is not None and time.monotonic() > budget.deadline_s:
            break
        row.tried += 1
        row.counts[way] = int(row.counts.get(way, 0)) + 1
        before = None if way in ("pull", "fetch") else ""
        ran, name = WAYS[way](scene, build)
        problem = _accepted(scene, ran, name, is_new=before is not None)
        if problem:
            row.lost(f"{what} by {way}: {problem}")
        for line in outside.harm():
            row.lost(f"{what} by {way}: outside: {line}")


def _accepted(scene: Scene, ran: Ran, name: str, *, is_new: bool) -> str:
    """What is wrong with how it was refused; empty when it was refused as it has to be."""
    if not is_refused(ran):
        return f"not refused: {ran.told()}"
    if is_new:
        return f"{name} is here now" if scene.has(name) else ""
    log = scene.run("log", "--json", "--dot", name)
    return "" if log.stdout.count(b'"generation"') == 1 else "the commit is here now"
