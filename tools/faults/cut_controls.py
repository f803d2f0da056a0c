"""The same cuts with a fault seeded: each has to be caught, or the cuts show nothing.

The window is made certain: the commands stand still after an acknowledgement, and then comes the
cut.
"""

import os
from collections.abc import Sequence
from functools import partial
from typing import Final

from tools.faults import seeded
from tools.faults.apart import Crew, Json
from tools.faults.forked import Hook
from tools.faults.row import Budget, Row

LYING: Final = "libeatmydata, every fsync does nothing"
NO_LOG: Final = "the log is never synced"
_LIBRARY: Final = "libeatmydata.so.1"
_TRIES: Final = 2

CONTROLS: Final = (
    (LYING, "commit, tag, branch, reset", 5),
    (NO_LOG, "commit, tag, branch, reset", 5),
    ("no-file-fsync", "commit, tag, branch, reset", 5),
    ("no-directory-fsync", "export", 2),
)
"""Fault (of tools/faults/seeded.py), subject, and the acknowledgement after which the cut comes."""
BLOCK_CONTROLS: Final = (
    (LYING, "commit, tag, branch, reset", "ext4"),
    (NO_LOG, "commit, tag, branch, reset", "ext4"),
    ("no-file-fsync", "commit, tag, branch, reset", "btrfs"),
    ("no-directory-fsync", "export", "ext4"),
)
"""A name that nobody asked for is durable with the next fsync of anything: what counts is the last
name before an acknowledgement."""
BLOCK_TRIES: Final = 5


def run(budget: Budget, title: str, unit: str, work: str, tasks: Sequence[Json]) -> list[Row]:
    """A row for each fault that the tasks name; `work` does them."""
    rows: dict[str, Row] = {}
    for task in tasks:
        name = task["control"]
        rows[name] = Row(f"{title}, control: {name}", unit, budget.seed, "", is_control=True)
        command = f"python -m tools.faults {title.replace(' ', '-')}"
        rows[name].repeat = f"{command} --seed {budget.seed} --count 1"
    for is_preloaded in (True, False):
        environment = preload(LYING) if is_preloaded else None
        crew = Crew(work, budget.directory, jobs=budget.jobs, environment=environment)
        for answer in crew.do([task for task in tasks if is_preloaded == (task["fault"] == "")]):
            assert "error" not in answer, answer["error"]
            row = rows[answer["task"]["control"]]
            row.tried += answer["tried"]
            for problem in answer["problems"]:
                row.lost(problem)
    return list(rows.values())


def cut_tasks(budget: Budget, kinds: Sequence[str]) -> list[Json]:
    """Tasks for power_cuts.cut_some."""
    return [
        {
            "control": fault,
            "kind": kind,
            "subject": subject,
            "seeds": [f"{budget.seed}:{kind}:{fault}:{number}" for number in range(_TRIES)],
            "at_ack": at_ack,
            "fault": seeded_name(fault),
        }
        for fault, subject, at_ack in CONTROLS
        for kind in kinds
    ]


def state_tasks(budget: Budget) -> list[Json]:
    """Tasks for block_states.try_some."""
    return [
        {
            "control": fault,
            "kind": kind,
            "row": "",
            "subject": subject,
            "seed": f"{budget.seed}:{fault}",
            "states": BLOCK_TRIES,
            "ack_share": 1.0,
            "fault": seeded_name(fault),
        }
        for fault, subject, kind in BLOCK_CONTROLS
    ]


def preload(fault: str) -> dict[str, str] | None:
    """The environment of workers that have the fault from outside."""
    return {"LD_PRELOAD": _LIBRARY} if fault == LYING else None


def seeded_name(fault: str) -> str:
    """The fault that is put in from inside; empty for one that is not."""
    return "" if fault == LYING else fault


def hook_of(fault: str) -> Hook:
    """What puts a fault into a fork of `dm`."""
    return _never_sync_the_log if fault == NO_LOG else partial(seeded.apply, fault)


def _never_sync_the_log() -> None:
    really = os.fsync

    def fsync(fd: int) -> None:
        if not os.readlink(f"/proc/self/fd/{fd}").endswith(".log"):
            really(fd)

    os.fsync = fsync  # type: ignore[assignment]
