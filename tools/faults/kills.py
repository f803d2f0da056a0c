"""SIGKILL before each system call that changes anything, for each scene, both sides.

    python -m tools.faults.kills SCENE NUMBER [--fault NAME] [--real]     one try, verbosely

A first run without a fault counts the calls of a scene and reads their order: what is said to be
done must be durable by then. Then each try kills the victim's whole process group before one call.
"""

import argparse
import os
import random
import sys
from collections.abc import Sequence
from functools import partial
from typing import Final, NamedTuple

from tools.faults.row import Budget, Row
from tools.faults.scenes import ALL, SCENES, Scene, forked_once
from tools.faults.sync_order import SyncOrder
from tools.faults.system_calls import Call, is_supported
from tools.faults.trying import Result, in_jobs, remove, workplace
from tools.faults.victims import Supervision, Victim

_REAL_EVERY: Final = 40
"""One try in so many runs a fresh interpreter instead of a fork."""
_WHOLE_EVERY: Final = 3
"""One in so many is verified with a push to the other store where the scene has none."""


class Try(NamedTuple):
    scene: str
    number: int
    """The call before which the kill comes, from 0."""
    is_real: bool = False
    is_brief: bool = False

    @property
    def repeat(self) -> str:
        return f"python -m tools.faults.kills {self.scene} {self.number}"


def run(budget: Budget) -> list[Row]:
    """`count` kills, spread evenly over the boundaries of all scenes; None: each boundary once."""
    return [run_scenes(budget, [scene for scene in ALL if scene.is_available])]


def run_scenes(budget: Budget, scenes: Sequence[Scene], fault: str = "") -> Row:
    """The same for some scenes, with a seeded fault in the victims."""
    repeat = f"python -m tools.faults kills --seed {budget.seed}"
    if budget.count is not None:
        repeat += f" --count {budget.count}"
    row = Row("kills", "kills", budget.seed, repeat)
    if not is_supported():
        row.failures.append("the kernel tells of system calls on Linux only")
        return row
    forked_once()
    place = workplace(budget)
    try:
        _run(budget, scenes, fault, place, row)
    finally:
        if place != budget.directory:
            remove(place)
    return row


def _run(budget: Budget, scenes: Sequence[Scene], fault: str, place: str, row: Row) -> None:
    calls: dict[str, int] = {}
    prepare = partial(_prepared, place, fault)
    names = [scene.name for scene in scenes]
    for name, counted in in_jobs(names, prepare, budget):
        calls[name] = counted.get("calls", 0)
        for problem in counted.get("problems") or (
            [counted["raised"]] if "raised" in counted else []
        ):
            row.lost(f"{name}, without a kill: {problem}")
    boundaries = [Try(name, index) for name in names for index in range(calls[name])]
    tries = _chosen(boundaries, budget)
    row.counts |= {"scenes": len(names), "boundaries": len(boundaries)}
    row.counts |= {"killed": 0, "acknowledged": 0}
    for one, result in in_jobs(tries, partial(_killed, place, fault), budget):
        row.tried += 1
        row.counts["killed"] = int(row.counts["killed"]) + result.get("killed", 0)
        row.counts["acknowledged"] = int(row.counts["acknowledged"]) + result.get("acknowledged", 0)
        problems = result.get("problems") or ([result["raised"]] if "raised" in result else [])
        if problems:
            row.lost(f"{one.repeat}: before {result.get('before')}: {'; '.join(problems)[:600]}")


def kills_at_removals(budget: Budget, scene: Scene, fault: str, place: str) -> list[str]:
    """What comes of kills right after the first removals of packs; for a control."""
    counted = _prepared(place, fault, scene.name)
    tries = [Try(scene.name, number + 1) for number in counted["removals"][: budget.count]]
    return [
        problem
        for _, result in in_jobs(tries, partial(_killed, place, fault), budget)
        for problem in result.get("problems", [])
    ]


def order_problems(scene: Scene, fault: str, place: str) -> list[str]:
    """What a scene acknowledges too early with a fault; for a control."""
    problems: list[str] = _prepared(place, fault, scene.name)["problems"]
    return problems


def _chosen(boundaries: list[Try], budget: Budget) -> list[Try]:
    """Every n-th boundary from a place that the seed decides, in mixed order."""
    count = len(boundaries) if budget.count is None else min(budget.count, len(boundaries))
    chance: random.Random = budget.random("kills")
    if not count:
        return []
    stride = len(boundaries) / count
    begin = chance.random() * stride
    chosen = [boundaries[int(begin + stride * number)] for number in range(count)]
    chance.shuffle(chosen)
    return [
        one._replace(is_real=not number % _REAL_EVERY, is_brief=bool(number % _WHOLE_EVERY))
        for number, one in enumerate(chosen)
    ]


def _prepared(place: str, fault: str, name: str) -> Result:
    """Make a scene's template, count its calls, and judge their order."""
    scene = SCENES[name]
    template = os.path.join(place, name)
    scene.prepare(template)
    directory = os.path.join(place, f"{name}-whole")
    scene.copy(template, directory)
    order = SyncOrder(is_server=scene.victim == "far")
    removals: list[int] = []

    def judge(supervision: Supervision, call: Call) -> None:
        order.note(call)
        if call.name == "unlink" and call.text(call.arguments[0]).endswith(".pack"):
            removals.append(supervision.calls)
        supervision.let_through(call)

    outcome = Victim(scene, judge, fault=fault).run(directory)
    problems = list(order.problems)
    if not scene.acknowledged(outcome.code, outcome.stdout):
        problems.append(f"not done: {outcome.ran.told()}")
    elif not order.has_acknowledged:
        problems.append("no acknowledgement was seen in the trace")
    problems += scene.verify(directory, True)
    remove(directory)
    return {"calls": outcome.calls, "problems": problems, "removals": removals}


def _killed(place: str, fault: str, one: Try) -> Result:
    """Run a scene's command with a kill before one call, and judge what is left."""
    scene = SCENES[one.scene]
    directory = os.path.join(place, f"{one.scene}-{one.number}-{os.getpid()}")
    scene.copy(os.path.join(place, one.scene), directory)
    before: list[str] = []

    def judge(supervision: Supervision, call: Call) -> None:
        if supervision.calls == one.number:
            before.append(_told(call))
            supervision.kill(call)
        else:
            supervision.let_through(call)

    outcome = Victim(scene, judge, fault=fault, is_real=one.is_real).run(directory)
    acknowledged = scene.acknowledged(outcome.code, outcome.stdout)
    problems = []
    if outcome.ran.is_crash:
        problems.append(f"crashed: {outcome.ran.told()}")
    if outcome.code is None:
        problems.append("it hung")
    problems += scene.verify(directory, acknowledged, is_brief=one.is_brief)
    remove(directory)
    return {
        "killed": int(outcome.was_hit),
        "acknowledged": int(acknowledged),
        "problems": problems,
        "before": before[0] if before else "nothing: it had ended",
    }


def _told(call: Call) -> str:
    """A call for a message: what it is and what it is about."""
    descriptor = call.path_of(call.arguments[0] & 0xFFFFFFFF)
    return f"{call.name} {'/'.join(descriptor.split('/')[-2:])}".strip()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.faults.kills")
    parser.add_argument("scene", choices=sorted(SCENES))
    parser.add_argument("number", type=int)
    parser.add_argument("--fault", default="")
    parser.add_argument("--real", action="store_true")
    parser.add_argument("--directory", default="/tmp/dm-kill")
    options = parser.parse_args()
    forked_once()
    os.makedirs(options.directory)
    try:
        sys.stdout.write(f"{_prepared(options.directory, options.fault, options.scene)}\n")
        one = Try(options.scene, options.number, options.real)
        result = _killed(options.directory, options.fault, one)
    finally:
        remove(options.directory)
    sys.stdout.write(f"{result}\n")
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
