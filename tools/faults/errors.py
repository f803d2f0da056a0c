"""System calls that fail: EIO, ENOSPC, EMFILE, EINTR, EACCES, ENOMEM, or are cut short.

    python -m tools.faults.errors SCENE NUMBER ERROR [--lasting] [--fault NAME]     one try

Each call of a scene's command, those that only read too, is failed by itself, or with all later
calls of its kind (a disk that stays full). Then the command has to end, with a typed error or
done; what it said to be done is done; an fsync that failed is never tried again on its file, nor
is what it was to make durable acknowledged; and the scene's verdict holds.
"""

import argparse
import errno
import json
import os
import random
import re
import sys
from collections.abc import Sequence
from functools import partial
from typing import Final, NamedTuple

from tools.faults import forked
from tools.faults.row import Budget, Row
from tools.faults.scenes import ALL, SCENES, WARNED_EXIT, Scene, forked_once
from tools.faults.system_calls import (
    LOOKING,
    MUTATING,
    NAMING,
    OPENING,
    READING,
    SYNCING,
    WRITING,
    Call,
    is_supported,
)
from tools.faults.trying import Result, in_jobs, remove, workplace
from tools.faults.victims import Outcome, Supervision, Victim, let_all_through

SHORT: Final = "SHORT"
_WHOLE_EVERY: Final = 5
_LASTING: Final = re.compile(r"/events/[0-9]+\.log$|/packs/[^/]+$|/quarantine/[^/]+$|/trees?/")
"""Files and directories that nothing may be acknowledged without."""
_REMOVING: Final = ("unlink", "unlinkat", "rmdir")
_MAKING_DESCRIPTORS: Final = ("pipe2", "socketpair", "dup", "epoll_create1", "eventfd2")


def possible_errors(name: str) -> tuple[str, ...]:
    """What a call of this name may come to, of the errors that are tried."""
    if name in OPENING:
        return ("EIO", "ENOSPC", "EMFILE", "EINTR", "EACCES", "ENOMEM")
    if name in WRITING:
        return ("EIO", "ENOSPC", "EINTR", "ENOMEM", SHORT)
    if name in READING:
        return ("EIO", "EINTR", "ENOMEM", SHORT)
    if name in SYNCING or name in ("syncfs", "fallocate", "ftruncate", "copy_file_range"):
        return ("EIO", "ENOSPC", "EINTR")
    if name in _REMOVING:
        return ("EIO", "EACCES", "ENOMEM")
    if name in NAMING:
        return ("EIO", "ENOSPC", "EACCES", "ENOMEM")
    if name in _MAKING_DESCRIPTORS:
        return ("EMFILE", "ENOMEM")
    if name in ("fcntl", "flock"):
        return ("EIO", "EINTR", "ENOMEM")
    if name.startswith(("send", "recv")):
        return ("EIO", "EINTR", "ENOMEM")
    if name in MUTATING:  # of attributes
        return ("EIO", "ENOSPC", "EACCES", "ENOMEM")
    return ("EIO", "EACCES", "ENOMEM")


class Try(NamedTuple):
    scene: str
    number: int
    """The call that fails, from 0."""
    error: str
    lasts: bool = False
    """All later calls of its name fail too."""
    is_brief: bool = False

    @property
    def repeat(self) -> str:
        lasting = " --lasting" if self.lasts else ""
        return f"python -m tools.faults.errors {self.scene} {self.number} {self.error}{lasting}"


def run(budget: Budget) -> list[Row]:
    """`count` failures, half of them of calls that change something."""
    return [run_scenes(budget, [scene for scene in ALL if scene.is_available])]


def run_scenes(budget: Budget, scenes: Sequence[Scene], fault: str = "") -> Row:
    """The same for some scenes, with a seeded fault in the victims."""
    repeat = f"python -m tools.faults errors --seed {budget.seed}"
    if budget.count is not None:
        repeat += f" --count {budget.count}"
    row = Row("errors", "failed calls", budget.seed, repeat)
    if not is_supported():
        row.failures.append("system calls can be failed on Linux only")
        return row
    forked_once()
    place = workplace(budget)
    try:
        _run(budget, scenes, fault, place, row)
    finally:
        if place != budget.directory:
            remove(place)
    return row


def _run(
    budget: Budget,
    scenes: Sequence[Scene],
    fault: str,
    place: str,
    row: Row,
) -> None:
    changing: list[Try] = []
    looking: list[Try] = []
    names = [scene.name for scene in scenes]
    for name, traced in in_jobs(names, partial(_prepared, place, fault), budget):
        if "raised" in traced:
            row.lost(f"{name}: {traced['raised']}")
            continue
        for index, call in enumerate(traced["calls"]):
            kind = looking if call in LOOKING else changing
            kind += [Try(name, index, error) for error in possible_errors(call)]
    row.counts |= {"scenes": len(names), "possible": len(changing) + len(looking)}
    row.counts |= {"done all the same": 0, "fsyncs failed": 0}
    for one, result in in_jobs(
        _chosen(changing, looking, budget), partial(_failed, place, fault), budget
    ):
        row.tried += 1
        for name, value in result.get("counts", {}).items():
            row.counts[name] = int(row.counts[name]) + value
        problems = result.get("problems") or ([result["raised"]] if "raised" in result else [])
        if problems:
            row.lost(f"{one.repeat}: {result.get('call')}: {'; '.join(problems)[:600]}")


def _chosen(changing: list[Try], looking: list[Try], budget: Budget) -> list[Try]:
    chance: random.Random = budget.random("errors")
    total = len(changing) + len(looking)
    count = total if budget.count is None else min(budget.count, total)
    of_changing = min(len(changing), max(count // 2, count - len(looking)))
    chosen = chance.sample(changing, of_changing) + chance.sample(looking, count - of_changing)
    chance.shuffle(chosen)
    return [
        one._replace(
            lasts=one.error not in ("EINTR", SHORT) and chance.random() < 0.5,
            is_brief=bool(number % _WHOLE_EVERY),
        )
        for number, one in enumerate(chosen)
    ]


def _prepared(place: str, fault: str, name: str) -> Result:
    """Make a scene's template and name its calls."""
    scene = SCENES[name]
    template = os.path.join(place, name)
    scene.prepare(template)
    directory = os.path.join(place, f"{name}-whole")
    scene.copy(template, directory)
    calls: list[str] = []
    lasting: list[int] = []

    def judge(supervision: Supervision, call: Call) -> None:
        if call.name in WRITING | SYNCING and _LASTING.search(call.path_of(call.arguments[0])):
            lasting.append(len(calls))
        calls.append(call.name)
        let_all_through(supervision, call)

    Victim(scene, judge, looks=True, fault=fault).run(directory)
    remove(directory)
    return {"calls": calls, "lasting": lasting}


def problems_at_lasting(
    budget: Budget, scene: Scene, fault: str, error: str, place: str
) -> list[str]:
    """What comes of failed writes and syncs of what must last; for a control."""
    traced = _prepared(place, fault, scene.name)
    possible = [n for n in traced["lasting"] if error in possible_errors(traced["calls"][n])]
    tries = [Try(scene.name, number, error) for number in possible]
    chosen = budget.random("control").sample(tries, min(len(tries), budget.count or len(tries)))
    return [
        problem
        for _, result in in_jobs(chosen, partial(_failed, place, fault), budget)
        for problem in result.get("problems", [])
    ]


class _Failing:
    """Fails the call that is to fail, and watches what is done about it."""

    def __init__(self, one: Try) -> None:
        self._try = one
        self._name = ""
        self._failed_syncs: set[tuple[int, int, int]] = set()
        self.call = "nothing: it had ended"
        self.lasting_syncs_failed = 0
        self.problems: list[str] = []

    def judge(self, supervision: Supervision, call: Call) -> None:
        if call.name in SYNCING:
            self._refuse_another(call)
        # Another run may have another call there: then the next one that can fail so.
        is_it = not self._name and supervision.calls >= self._try.number
        is_it = is_it and self._try.error in possible_errors(call.name)
        if is_it:
            self._name = call.name
            self.call = _told(call)
        if is_it and self._try.error == SHORT:
            if not supervision.cut_short(call):
                supervision.let_through(call)
        elif is_it or (self._try.lasts and call.name == self._name):
            self._note_failed(call)
            supervision.fail(call, getattr(errno, self._try.error))
        else:
            supervision.let_through(call)

    def _note_failed(self, call: Call) -> None:
        if call.name not in SYNCING or self._try.error == "EINTR":
            return
        path = call.path_of(call.arguments[0])
        if ".sqlite" not in path:  # a projection: it is thrown away
            self._failed_syncs.add(_identity(call))
        if _LASTING.search(path):
            self.lasting_syncs_failed += 1

    def _refuse_another(self, call: Call) -> None:
        if self._failed_syncs and _identity(call) in self._failed_syncs:
            self.problems.append(f"synced again after a failure: {_told(call)}")


def _identity(call: Call) -> tuple[int, int, int]:
    found = os.stat(f"/proc/{call.thread}/fd/{call.arguments[0]}")
    return call.process(), found.st_dev, found.st_ino


def _failed(place: str, fault: str, one: Try) -> Result:
    """Run a scene's command with one failure, and judge how it took that and what is left."""
    scene = SCENES[one.scene]
    directory = os.path.join(place, f"{one.scene}-{one.number}-{os.getpid()}")
    scene.copy(os.path.join(place, one.scene), directory)
    failing = _Failing(one)
    outcome = Victim(scene, failing.judge, looks=True, fault=fault).run(directory)
    acknowledged = scene.acknowledged(outcome.code, outcome.stdout)
    problems = [*failing.problems, *_of_ending(outcome)]
    if failing.lasting_syncs_failed and acknowledged:
        problems.append("acknowledged although an fsync had failed")
    if outcome.code == WARNED_EXIT:
        problems += _of_warning(outcome, scene, directory)
    else:
        problems += scene.verify(directory, acknowledged, is_brief=one.is_brief)
    remove(directory)
    return {
        "problems": problems,
        "call": failing.call,
        "counts": {
            "done all the same": int(acknowledged),
            "fsyncs failed": failing.lasting_syncs_failed,
        },
    }


def _of_ending(outcome: Outcome) -> list[str]:
    if outcome.code is None:
        return ["it hung"]
    if outcome.ran.is_crash or outcome.code < 0:
        return [f"crashed: {outcome.ran.told()}"]
    return []


def _of_warning(outcome: Outcome, scene: Scene, directory: str) -> list[str]:
    """A commit of what could be read: what could not must be named, and the rest be whole."""
    summary = json.loads(outcome.stdout.splitlines()[-1])
    if not summary.get("unreadable_paths") and not summary.get("unstable_paths"):
        return ["done with warnings that name nothing"]
    ran = forked.run_dm(["fsck", "--full"], scene.environment(directory))
    return [] if ran.code == 0 else [f"fsck: {ran.told()}"]


def _told(call: Call) -> str:
    """A call for a message: what it is and what it is about."""
    if call.name in OPENING or call.name in NAMING:
        at = (
            0 if call.name in ("open", "creat", "mkdir", "unlink", "rename", "rmdir", "link") else 1
        )
        return f"{call.name} {'/'.join(call.text(call.arguments[at]).split('/')[-2:])}"
    path = call.path_of(call.arguments[0] & 0xFFFFFFFF)
    return f"{call.name} {'/'.join(path.split('/')[-2:])}".strip()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.faults.errors")
    parser.add_argument("scene", choices=sorted(SCENES))
    parser.add_argument("number", type=int)
    parser.add_argument("error")
    parser.add_argument("--lasting", action="store_true")
    parser.add_argument("--fault", default="")
    parser.add_argument("--directory", default="/tmp/dm-error")
    options = parser.parse_args()
    forked_once()
    os.makedirs(options.directory)
    try:
        _prepared(options.directory, options.fault, options.scene)
        one = Try(options.scene, options.number, options.error, options.lasting)
        result = _failed(options.directory, options.fault, one)
    finally:
        remove(options.directory)
    sys.stdout.write(f"{result}\n")
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
