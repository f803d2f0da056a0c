"""Power cuts at the level of the journal: ext4 and XFS are shut down without a flush of their log.

Each cut: a fresh image, commands at work on it, the cut at a moment that nobody chose, every
process killed, the image mounted again, which recovers its log, and everything acknowledged looked
for. What a filesystem had written to its device stays; tools/faults/block_states.py loses that too.
"""

import atexit
import os
import random
import select
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from tools.faults import cut_controls, scenes
from tools.faults.apart import Crew, Json, kill_others, mount, unmount
from tools.faults.cut_loops import LOOPS
from tools.faults.cut_subjects import Running, Subject, scene_names, subject_named
from tools.faults.images import Disk, Extents, Mounted, make_filesystem
from tools.faults.row import Budget, Row

KINDS: Final = ("ext4", "xfs")
ROOT: Final = "mnt"
OUTSIDE: Final = "outside"
_LOOPS_SHARE: Final = 0.6
"""Of all cuts; the rest is for the scenes of one command."""
_BATCH_CUTS: Final = 25
_PLACE_CUTS_MIN: Final = 5
"""To prepare a subject costs about as much as so many cuts: few cuts choose among the subjects."""
_MOMENT_S: Final = 0.05
"""About as long as a command takes: the cut comes that much after an acknowledgement, or less."""
_PATIENCE_S: Final = 30.0
_MS_BIND: Final = 0x1000


def run(budget: Budget) -> list[Row]:
    rows = {
        (kind, what): Row(
            f"power cuts, {kind}: {what}",
            "cuts",
            budget.seed,
            f"python -m tools.faults power-cuts --seed {budget.seed} --count {budget.count}",
        )
        for kind in KINDS
        for what in ("loops of commands", "one command")
    }
    work = f"{__name__}:cut_some"
    tasks = cut_controls.cut_tasks(budget, KINDS)
    controls = cut_controls.run(budget, "power cuts", "cuts", work, tasks)
    crew = Crew(work, budget.directory, jobs=budget.jobs)
    for answer in crew.do(_tasks(budget), budget.deadline_s):
        row = rows[answer["task"]["kind"], answer["task"]["row"]]
        _add(row, answer)
    found = [row for row in rows.values() if row.tried or row.losses]
    return [*found, *controls]


def _add(row: Row, answer: Json) -> None:
    if "error" in answer:
        row.lost(f"{answer['task']}: {answer['error']}")
        return
    row.tried += answer["tried"]
    for name, number in answer["counts"].items():
        row.counts[name] = int(row.counts.get(name, 0)) + number
    for problem in answer["problems"]:
        row.lost(problem)


def _tasks(budget: Budget) -> Iterator[Json]:
    """Batches of cuts of one subject on one filesystem; each subject has its turn early."""
    total = budget.count or 1
    chosen = {
        "loops of commands": (list(LOOPS), _LOOPS_SHARE),
        "one command": (scene_names(), 1 - _LOOPS_SHARE),
    }
    batches = []
    for row, (names, share) in chosen.items():
        wanted = round(total * share)
        chance = budget.random("power-cuts", row)
        subjects = max(1, wanted // len(KINDS) // _PLACE_CUTS_MIN)
        chosen_names = chance.sample(names, min(len(names), subjects))
        places = [(kind, name) for name in chosen_names for kind in KINDS]
        for number, (kind, name) in enumerate(places):
            cuts = _share(wanted, len(places), number)
            for first in range(0, cuts, _BATCH_CUTS):
                last = min(cuts, first + _BATCH_CUTS)
                seeds = [f"{budget.seed}:{kind}:{name}:{cut}" for cut in range(first, last)]
                task = {"kind": kind, "row": row, "subject": name, "seeds": seeds}
                batches.append((first, task))
    for _, task in sorted(batches, key=lambda batch: batch[0]):
        yield task


def _share(total: int, parts: int, number: int) -> int:
    """So many of `total` for part `number` of `parts`, all of which add up to it."""
    return total * (number + 1) // parts - total * number // parts


# --- in a worker ---------------------------------------------------------------------------------


@dataclass
class Prepared:
    """A subject and an image of a filesystem on which it is ready to begin."""

    subject: Subject
    image: Extents
    first_s: float = 0.3
    """About how long it takes to the first acknowledgement; follows what is seen."""


_disk: Disk | None = None
_prepared: dict[tuple[str, str, str], Prepared] = {}


def disk() -> Disk:
    """This worker's disk."""
    global _disk
    if _disk is None:
        _disk = Disk("disk")
        atexit.register(_disk.remove)
    return _disk


def prepared(kind: str, name: str, fault: str = "") -> Prepared:
    """Made once in this worker for each filesystem and subject. `fault` is seeded in its runs."""
    key = (kind, name, fault)
    if key not in _prepared:
        hook = cut_controls.hook_of(fault) if fault else None
        _prepared[key] = prepare(kind, subject_named(name, hook))
    return _prepared[key]


def prepare(kind: str, subject: Subject) -> Prepared:
    scenes.forked_once()
    make_filesystem(kind, "empty")
    disk().fill(Extents.of("empty"))
    mounted = Mounted(kind, disk(), ROOT)
    try:
        subject.prepare(os.path.abspath(ROOT))
        for name in subject.outside:
            os.makedirs(f"{OUTSIDE}/template", exist_ok=True)
            subprocess.run(["cp", "-a", f"{ROOT}/{name}", f"{OUTSIDE}/template/"], check=True)
    finally:
        kill_others()
        mounted.close()
    return Prepared(subject, Extents.of(disk().backing))


def cut_some(task: Json) -> Json:
    """The cuts of one batch."""
    ready = prepared(task["kind"], task["subject"], task.get("fault", ""))
    problems, acks, recoveries = [], 0, 0
    for seed in task["seeds"]:
        cut = Cut(task["kind"], ready, random.Random(seed), at_ack=task.get("at_ack"))
        found = cut.run()
        acks += found.acks
        recoveries += found.recovered
        if found.problems:
            problems.append(f"{seed}: {'; '.join(found.problems)}")
    counts = {"acknowledged": acks, "commands in flight": recoveries}
    return {"task": task, "tried": len(task["seeds"]), "counts": counts, "problems": problems}


@dataclass
class Outcome:
    """What a cut ended with. `recovered`: 1 when a command was in flight."""

    acks: int
    recovered: int
    problems: list[str]


class Cut:
    """One cut. `at_ack`: not at a random moment but right after that acknowledgement."""

    def __init__(
        self, kind: str, ready: Prepared, rng: random.Random, *, at_ack: int | None = None
    ) -> None:
        self._kind = kind
        self._ready = ready
        self._subject = ready.subject
        self._rng = rng
        self._at_ack = at_ack
        self._root = os.path.abspath(ROOT)
        self._bound: list[str] = []

    def run(self) -> Outcome:
        disk().fill(self._ready.image)
        mounted = Mounted(self._kind, disk(), ROOT)
        try:
            self._bind_outside(is_fresh=True)
            self._subject.settle(self._root)
            running = Running(
                self._subject,
                self._root,
                self._subject.fresh(),
                self._rng,
                acks_max=self._at_ack,
            )
            acks = self._wait(running)
            mounted.cut()
            running.close()
            kill_others()
            if running.failure:
                return Outcome(acks, 0, [f"failed before the cut: {running.failure}"])
            self._unbind()
            mounted.close()
            mounted = Mounted(self._kind, disk(), ROOT)
            self._bind_outside(is_fresh=False)
            problems = self._subject.check(self._root, running.told, self._rng)
            return Outcome(acks, int(not running.is_over), problems)
        finally:
            kill_others()
            self._unbind()
            mounted.close()

    def _wait(self, running: Running) -> int:
        """Until the moment of the cut: a random one, not long after the n-th acknowledgement.
        Returns how many were read before it."""
        wanted = self._rng.randrange(self._subject.acks_max)
        delay_s = self._rng.uniform(0, _MOMENT_S if wanted else 1.3 * self._ready.first_s)
        if self._at_ack is not None:
            wanted, delay_s = self._at_ack, 0.0
        acks = 0
        deadline_s = time.monotonic() + _PATIENCE_S
        while acks < wanted and not running.is_over and time.monotonic() < deadline_s:
            select.select([running.fd], [], [], 1.0)
            acks += running.hear()
        end_s = time.monotonic() + delay_s
        while not running.is_over and (left_s := end_s - time.monotonic()) > 0:
            time.sleep(min(left_s, 0.002))
            acks += running.hear()
        acks += running.hear()
        if not wanted:
            self._ready.first_s *= 0.75 if acks else 1.4
        return acks

    def _bind_outside(self, *, is_fresh: bool) -> None:
        for name in self._subject.outside:
            path = f"{OUTSIDE}/{name}"
            if is_fresh:
                subprocess.run(["rm", "-rf", path], check=True)
                subprocess.run(["cp", "-a", f"{OUTSIDE}/template/{name}", path], check=True)
            mount(path, f"{ROOT}/{name}", "none", _MS_BIND)
            self._bound.append(f"{ROOT}/{name}")

    def _unbind(self) -> None:
        while self._bound:
            unmount(self._bound.pop())
