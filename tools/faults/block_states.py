"""Crash states below the filesystem: writes lost, torn, reordered by a disk that loses power.

Sessions of commands are recorded on ext4, XFS and btrfs, block by block. From each recording
follow states that a disk may be left in (tools/faults/crash_states.py); each is mounted, which
recovers the filesystem, and everything acknowledged before the cut is looked for.
"""

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from tools.faults import cut_controls
from tools.faults.apart import Crew, Json, kill_others
from tools.faults.block_device import RecordedDisk
from tools.faults.crash_states import CrashState, Device, Session, StateMaker
from tools.faults.cut_loops import LOOPS
from tools.faults.cut_subjects import SCENE_PREFIX, Running, Subject, scene_names, subject_named
from tools.faults.forked import wait_for
from tools.faults.images import KINDS, Disk, Mounted
from tools.faults.power_cuts import ROOT, disk, prepare
from tools.faults.row import Budget, Row

_LOST: Final = "writes lost, torn, reordered"
_LIED: Final = "a disk that lies"
_LIED_SHARE: Final = 0.2
_LIES: Final = (Device.LYING, Device.LYING, Device.STALE, Device.MISDIRECTED)
_BATCH_STATES: Final = 30
_STATES_MIN: Final = 12
"""To record a session costs about as much as to try so many states of it."""
_ACKS: Final = 10
_PATIENCE_S: Final = 60.0
_NOT_LOOPS: Final = ("push, pull; server cut", "push, pull; clients cut")
"""Loops with a second disk."""
_NOT_ON_BTRFS: Final = (
    "commit, reset, attached",
    *(
        SCENE_PREFIX + name
        for name in ("commit-attached", "pull", "checkout", "reset", "merge", "undo")
    ),
)
"""A directory is known by its device, whose number each mount of btrfs makes anew."""


def run(budget: Budget) -> list[Row]:
    rows: dict[tuple[str, str], Row] = {}
    for kind in KINDS:
        for what in (_LOST, _LIED):
            rows[kind, what] = Row(
                f"block states, {kind}: {what}",
                "states",
                budget.seed,
                f"python -m tools.faults block-states --seed {budget.seed} --count {budget.count}",
            )
    work = f"{__name__}:try_some"
    tasks = cut_controls.state_tasks(budget)
    controls = cut_controls.run(budget, "block states", "states", work, tasks)
    crew = Crew(work, budget.directory, jobs=budget.jobs)
    seen: dict[tuple[str, str], set[str]] = {key: set() for key in rows}
    for answer in crew.do(_tasks(budget), budget.deadline_s):
        key = (answer["task"]["kind"], answer["task"]["row"])
        row = rows[key]
        if "error" in answer:
            row.lost(f"{answer['task']}: {answer['error']}")
            continue
        seen[key].update(answer["digests"])
        row.tried += answer["tried"]
        row.counts["distinct"] = len(seen[key])
        for name, number in answer["counts"].items():
            row.counts[name] = int(row.counts.get(name, 0)) + number
        for problem in answer["problems"]:
            row.lost(problem)
    found = [row for row in rows.values() if row.tried or row.losses]
    return [*found, *controls]


def _tasks(budget: Budget) -> Iterator[Json]:
    total = budget.count or 1
    names = [name for name in LOOPS if name not in _NOT_LOOPS]
    choices = {
        _LOST: [*names, *scene_names()],
        _LIED: [name for name in names if name not in ("export", "commit, reset, attached")],
    }
    shares = {_LOST: 1 - _LIED_SHARE, _LIED: _LIED_SHARE}
    batches = []
    for row, subjects in choices.items():
        chance = budget.random("block-states", row)
        for kind in KINDS:
            wanted = round(total * shares[row] / len(KINDS))
            able = [name for name in subjects if kind != "btrfs" or name not in _NOT_ON_BTRFS]
            count = min(len(able), max(1, wanted // _STATES_MIN))
            chosen = chance.sample(able, count)
            for number, name in enumerate(chosen):
                left = wanted * (number + 1) // count - wanted * number // count
                batch = 0
                while left > 0:
                    seed = f"{budget.seed}:{kind}:{name}:{row}:{batch}"
                    states = min(left, _BATCH_STATES)
                    task: Json = {"kind": kind, "row": row, "subject": name, "seed": seed}
                    batches.append((batch, {**task, "states": states}))
                    left -= states
                    batch += 1
    for _, task in sorted(batches, key=lambda pair: pair[0]):
        yield task


# --- in a worker ---------------------------------------------------------------------------------


@dataclass
class Recording:
    """A subject and a session of it."""

    subject: Subject
    session: Session


@dataclass
class Tried:
    """What came of the states of a batch."""

    tried: int = 0
    digests: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def count(self, name: str, number: int = 1) -> None:
        self.counts[name] = self.counts.get(name, 0) + number


_recordings: dict[tuple[str, str, str], Recording] = {}


def try_some(task: Json) -> Json:
    """The states of one batch."""
    rng = random.Random(task["seed"])
    recording = _recorded(task["kind"], task["subject"], task.get("fault", ""), rng)
    tried = try_states(task, recording, rng)
    return {"task": task, **vars(tried)}


def try_states(task: Json, recording: Recording, rng: random.Random) -> Tried:
    """Make states, mount and check each."""
    tried = Tried()
    devices = _LIES if task["row"] == _LIED else (Device.HONEST,)
    states = []
    for _ in range(task["states"]):
        device = rng.choice(devices)
        wishes = {"ack_share": task["ack_share"]} if "ack_share" in task else {}
        state = recording.session.state(device, rng, **wishes)
        states.append((state, device, rng.randrange(1 << 30)))
    states.sort(key=lambda item: item[0].applied)
    maker = StateMaker(recording.session, "prefix")
    try:
        for state, device, seed in states:
            tried.tried += 1
            tried.digests.append(maker.make(state, disk().backing))
            disk().forget()
            problems = _check(task["kind"], recording, state, device, seed, tried)
            if problems:
                where = f"{task['seed']}, cut {state.cut}, {device.value}"
                tried.problems.append(f"{where}: {'; '.join(problems)}")
    finally:
        maker.close()
    return tried


def _check(
    kind: str,
    recording: Recording,
    state: CrashState,
    device: Device,
    seed: int,
    tried: Tried,
) -> list[str]:
    try:
        mounted = Mounted(kind, disk(), ROOT)
    except OSError as refused:
        tried.count(f"not mounted ({refused.strerror})")
        return []  # by the filesystem's own fault, and nobody can take it for good
    told, acks = recording.subject.fresh(), 0
    try:
        for message in recording.session.messages(state.cut):
            acks += recording.subject.hear(told, message)
        root = os.path.abspath(ROOT)
        if device is Device.HONEST:
            tried.count("acknowledged", acks)
            return recording.subject.check(root, told, random.Random(seed))
        problems, how = recording.subject.check_detected(root, told)
        tried.count(how)
        return problems
    finally:
        kill_others()
        mounted.close()


def _recorded(kind: str, name: str, fault: str, rng: random.Random) -> Recording:
    """Made once in this worker for each filesystem and subject."""
    key = (kind, name, fault)
    if key not in _recordings:
        hook = cut_controls.hook_of(fault) if fault else None
        _recordings[key] = record(kind, subject_named(name, hook), rng)
    return _recordings[key]


def record(kind: str, subject: Subject, rng: random.Random) -> Recording:
    """One session of a subject: until it has ended or acknowledged enough."""
    ready = prepare(kind, subject)
    image = f"session-{len(_recordings)}-{rng.randrange(1 << 30)}"
    ready.image.write(image)
    ready.image.write("recorded.content")
    number = disk().number
    disk().close()  # its number is what an attached directory is known by
    with RecordedDisk("recorded.content", "recorded") as recorder:
        under = Disk("recorded", number)
        mounted = Mounted(kind, under, ROOT)
        try:
            root = os.path.abspath(ROOT)
            subject.settle(root)
            acks = _ACKS if subject.acks_max > 1 else None
            into = recorder.say.fileno()
            running = Running(subject, root, None, rng, acks_max=acks, into=into)
            code = wait_for(running.pid, _PATIENCE_S)
            running.close()
        finally:
            mounted.close()
            under.close()
    disk().open()
    assert code is not None, f"{subject.name} went on and on"
    records: list[Any] = recorder.records()
    failed = [r for r in records if b'"failed"' in r.data[:12] and r.offset == 0]
    assert not failed, failed[0].data
    return Recording(subject, Session(image, records))
