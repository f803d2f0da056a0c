"""What is done with a damaged store, twice over: in one fork, for speed, and by commands."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from dmsync.engine.access import full_access
from dmsync.engine.fsck import FsckReport, fsck
from dmsync.engine.ports import ByteStream
from dmsync.engine.progress import SILENT
from dmsync.engine.repairing.event_log import repair_log
from dmsync.engine.repairing.from_remote import Asked, bring
from dmsync.engine.repairing.recovered_state import put_back
from dmsync.engine.repairing.repair import RepairReport, repair
from dmsync.engine.settings import EngineSettings
from dmsync.engine.store import Store
from dmsync.engine.sync_server import serve
from dmsync.errors import DmError
from dmsync.storage.catalog import DotRow
from tools.faults.damaged_scene import Scene, Survey, answers_of, survey
from tools.faults.forked import Ran, in_fork, run_dm

SETTINGS = EngineSettings(author="a", actor="a", lock_wait_s=2)
DAMAGED = 16


@dataclass
class Steps:
    """What a damaged store answered, what fsck said, how repair ended, what it answers then.
    `problems` None: fsck ended with an error of a type. A crash begins with `!!`."""

    before: Survey
    told: str
    problems: list[dict[str, Any]] | None
    left: list[dict[str, Any]]
    crash: str
    after: Survey

    @property
    def was_found(self) -> bool:
        return self.problems is None or bool(self.problems)


def in_one_fork(scene: Scene, home: str) -> Steps:
    """Everything by calls, in a process of its own."""
    lines = in_fork(lambda: [json.dumps(asdict(_steps(home, scene.far)))], patience_s=90)
    try:
        return Steps(**json.loads(lines[-1]))
    except (ValueError, IndexError, TypeError):
        return Steps({}, "", [], [], f"!!{' '.join(lines)[-500:]}", {})


def _steps(home: str, far: str) -> Steps:
    before = answers_of(home)
    told, problems = _checked(home)
    report = RepairReport()
    crash = ""
    try:
        _repair(home, far, report)
    except DmError as exc:
        crash = f"!{type(exc).__name__} {exc.message}"
    left = _problems(report.after) if report.after is not None else []
    return Steps(before, told, problems, left, crash, answers_of(home))


def _checked(home: str) -> tuple[str, list[dict[str, Any]] | None]:
    try:
        with Store.open(home, SETTINGS) as store:
            problems = _problems(fsck(store, full=True))
            return json.dumps(problems), problems
    except DmError as exc:
        return exc.message, None


def _problems(report: FsckReport) -> list[dict[str, Any]]:
    return [asdict(problem) for problem in report.problems]


def _repair(home: str, far: str, report: RepairReport) -> None:
    repair_log(home, report, lock_wait_s=2, dry_run=False)
    with Store.open(home, SETTINGS) as store, Store.open(far, SETTINGS) as other:
        put_back(store, report, dry_run=False)
        repair(store, report, fetch=partial(_fetch, store, other))


def _fetch(store: Store, far: Store, dot: DotRow, asked: Asked) -> int:
    return asyncio.run(
        _converse(lambda stream: bring(store, stream, dot, (None, None), asked, SILENT), far)
    )


async def _converse(client: Callable[[ByteStream], Any], far: Store) -> int:
    ours, theirs = _End(), _End()
    ours.other, theirs.other = theirs, ours
    serving = asyncio.create_task(serve(far, theirs, full_access("far")))
    try:
        came: int = await client(ours)
    finally:
        await asyncio.wait([serving])
    return came


class _End:
    """One end of a stream in memory."""

    other: "_End"

    def __init__(self) -> None:
        self._arrived = bytearray()
        self._is_closed = False
        self._news = asyncio.Event()

    async def read(self, n: int) -> bytes:
        while not self._arrived and not self._is_closed:
            self._news.clear()
            await self._news.wait()
        part = bytes(self._arrived[:n])
        del self._arrived[:n]
        return part

    async def write(self, data: bytes) -> None:
        self.other._arrived += data
        self.other._news.set()
        await asyncio.sleep(0)

    async def aclose(self) -> None:
        self._is_closed = self.other._is_closed = True
        self._news.set()
        self.other._news.set()


# --- by commands -------------------------------------------------------------------------------


def by_commands(scene: Scene, home: str, between: Callable[[], list[str]]) -> Steps:
    """The same by `dm`; `between` runs before the repair and tells of crashes."""
    before = survey(home)
    environment = scene.environment(home)
    checked = run_dm(["fsck", "--full", "--json"], environment)
    crash = _crash_of(checked, (0, DAMAGED))
    if checked.code in (0, DAMAGED) and checked.stdout:
        problems = summary(checked)["problems"]
    else:
        problems = None
    crash += "".join(f"!!{line}" for line in between())
    repaired = run_dm(["fsck", "--repair", "--from", "far", "--json"], environment)
    crash += _crash_of(repaired, (0, DAMAGED))
    is_whole = repaired.code in (0, DAMAGED) and repaired.stdout
    left = summary(repaired)["problems"] if is_whole else []
    told = (checked.stdout + checked.stderr).decode("utf-8", "replace")
    return Steps(before, told, problems, left, crash, survey(home))


def _crash_of(ran: Ran, codes: tuple[int, ...]) -> str:
    is_typed = b'"type": "error"' in ran.stderr and not ran.is_crash
    is_allowed = ran.code in codes or (is_typed and ran.code is not None)
    return "" if is_allowed and not ran.is_crash else f"!!{ran.told()}"


def summary(ran: Ran) -> dict[str, Any]:
    """The JSON summary of a run."""
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found
