"""All of a repair, in order; see the package's text."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from dmsync.core.ids import Kind
from dmsync.engine.fsck import (
    FsckReport,
    Harm,
    compare_projection,
    find_harm,
    fsck,
    opened_trash,
    trashed_dots,
)
from dmsync.engine.progress import SILENT, Progress
from dmsync.engine.repairing.from_remote import Asked, questions
from dmsync.engine.repairing.packs import HarmedFile, harmed_files, set_aside_and_rescue
from dmsync.engine.repairing.rehoming import bring_home
from dmsync.engine.repairing.sources import LocalSources
from dmsync.engine.store import Store
from dmsync.errors import Corruption, DmError, NetworkError
from dmsync.storage.catalog import DotRow
from dmsync.storage.event_log import EventLog
from dmsync.storage.object_store import ObjectStore

ROUNDS_MAX = 64
"""What is healed may show harm below it: a tree of pages is at most this deep in practice, and a
round that heals nothing is the last one anyway."""

FetchObjects = Callable[[DotRow, Asked], int]
"""Brings what was asked for from the remote; returns how many records came. Raises DmError."""


@dataclass(frozen=True)
class Action:
    """One thing that was done, or with a dry run would be. `dot` is a name or empty."""

    dot: str
    where: str
    message: str


@dataclass
class RepairReport:
    """What was done, and what fsck says afterwards."""

    actions: list[Action] = field(default_factory=list)
    after: FsckReport | None = None
    objects_healed: int = 0
    """Objects that were missing or harmed and are here now, from wherever."""
    records_fetched: int = 0

    def did(self, dot: str, where: str, message: str) -> None:
        self.actions.append(Action(dot, where, message))


def repair(
    store: Store,
    report: RepairReport,
    dots: Iterable[DotRow] | None = None,
    *,
    fetch: FetchObjects | None = None,
    dry_run: bool = False,
    progress: Progress = SILENT,
) -> RepairReport:
    """Heal what can be healed here and with `fetch`, then check everything in full.

    Takes each dot's lock. Nothing harmed is deleted: it goes to `damaged`.

    Raises:
        Busy: somebody has a dot's lock. StorageFull, StorageFailed. NetworkError: the remote
        cannot be reached; what could be healed here is.
    """
    chosen = list(store.catalog.dots() if dots is None else dots)
    for dot in chosen:
        with store.dot_locked(dot.dot):
            objects = store.objects(dot.dot)
            _Healing(store, objects, dot, report, fetch, progress, dry_run=dry_run).run()
    for dot, path in trashed_dots(store) if dots is None else ():
        with opened_trash(path, dot) as objects:
            _Healing(store, objects, dot, report, None, progress, dry_run=dry_run).run()
    if dots is None:
        _acknowledge(store, report, dry_run=dry_run)
        _rebuild_catalog(store, report, progress, dry_run=dry_run)
    report.after = fsck(store, None if dots is None else chosen, full=True, progress=progress)
    return report


def _acknowledge(store: Store, report: RepairReport, *, dry_run: bool) -> None:
    """The log's lost end cannot come back: whoever repairs has been told, which ends the note."""
    log = EventLog(store.layout.events_dir)
    for line in log.lost_end():
        report.did("", "events", f"acknowledged: {line}")
    if not dry_run:
        log.forget_lost_end()


def _rebuild_catalog(
    store: Store, report: RepairReport, progress: Progress, *, dry_run: bool
) -> None:
    """Where the catalog is not what the log says; a fold costs less than a wrong answer."""
    found = FsckReport(full=False)
    progress.phase("folding the event log")
    try:
        compare_projection(store, found)
        is_sound = not found.problems
    except Corruption:
        is_sound = False
    if is_sound:
        return
    report.did("", "catalog.sqlite", "built again from the event log")
    if not dry_run:
        store.catalog.rebuild()


class _Healing:
    """One dot."""

    def __init__(
        self,
        store: Store,
        objects: ObjectStore,
        dot: DotRow,
        report: RepairReport,
        fetch: FetchObjects | None,
        progress: Progress,
        *,
        dry_run: bool,
    ) -> None:
        self._store = store
        self._objects = objects
        self._dot = dot
        self._report = report
        self._fetch = fetch
        self._progress = progress
        self._dry_run = dry_run

    def run(self) -> None:
        self._progress.phase(f"checking packs of {self._dot.name}")
        objects = self._objects
        harmed = list(harmed_files(objects))
        if self._dry_run:
            self._tell(harmed)
            return
        self._repair_packs(harmed)
        self._check_index()
        harm = self._harm()
        if harm:
            harm = self._heal_here(harm)
        if harm and self._fetch is not None:
            self._heal_from_remote(harm)
        lost = objects.sealed.index.lost_packs()
        if lost and not self._harm():
            for name in lost:
                self._did(name, "is gone; nothing in it is missing any more")
            objects.sealed.index.forget_lost_packs()

    def _tell(self, harmed: list[HarmedFile]) -> None:
        for file in harmed:
            self._did(file.name, f"to be set aside: {file.why}")
        harm = self._harm()
        for oid, kind in harm.objects.items():
            self._did(oid.hex(), f"{kind.name.lower()} to be looked for: {harm.reasons[oid]}")

    def _harm(self) -> Harm:
        return find_harm(self._store, self._objects, self._dot, progress=self._progress)

    def _did(self, where: str, message: str) -> None:
        self._report.did(self._dot.name, where, message)

    # --- packs --------------------------------------------------------------------------------

    def _repair_packs(self, harmed: list[HarmedFile]) -> None:
        objects = self._objects
        own = []
        for file in harmed:
            if file.belongs_to is not None and bring_home(self._store, objects, file):
                self._did(file.name, f"moved to dot {file.belongs_to.hex()}, whose it is")
            else:
                own.append(file)
        for rescued, file in zip(set_aside_and_rescue(objects, own), own, strict=True):
            lost = f", {rescued.lost} are not" if rescued.lost else ""
            self._did(
                file.name, f"set aside: {file.why}; {rescued.records} records are sound{lost}"
            )

    def _check_index(self) -> None:
        """The index must say of each pack what its table says."""
        objects = self._objects
        is_wrong = bool(objects.sealed.index.contradictions())
        if is_wrong or any(found.key is not None for found in objects.check(full=False)):
            objects.sealed.index.rebuild()
            self._did("index.sqlite", "built again from the packs")

    # --- objects ------------------------------------------------------------------------------

    def _heal_here(self, harm: Harm) -> Harm:
        """Returns what is still harmed."""
        sources = LocalSources(self._store, self._objects, self._dot)
        try:
            for _ in range(ROUNDS_MAX):
                count = sources.heal(harm)
                if not count:
                    return harm
                self._report.objects_healed += count
                self._did("", f"{count} objects found on this machine")
                harm = self._again()
                if not harm:
                    return harm
            return harm
        finally:
            sources.close()

    def _heal_from_remote(self, harm: Harm) -> None:
        for _ in range(ROUNDS_MAX):
            came = sum(self._ask(asked) for asked in questions(harm))
            self._report.records_fetched += came
            after = self._again()
            healed = len(harm.objects.keys() - after.objects.keys())
            self._report.objects_healed += healed
            if healed:
                self._did("", f"{healed} objects came from the remote")
            if not after or not healed or after.objects == harm.objects:
                return
            harm = after

    def _ask(self, asked: Asked) -> int:
        """One question, and smaller ones where the remote cannot read all of the answer."""
        assert self._fetch is not None
        try:
            return self._fetch(self._dot, asked)
        except NetworkError:
            raise
        except DmError as exc:
            halves = asked.halves()
            if not halves:
                for commit in (*asked.commits, *asked.tags):
                    self._did(commit.hex(), f"not to be had from the remote: {exc.message}")
                return 0
        return sum(self._ask(half) for half in halves)

    def _again(self) -> Harm:
        """Look once more; commits that came back have to be folded into the catalog first."""
        catalog = self._store.catalog
        objects = self._objects
        missing = catalog.missing_commits(self._dot.dot)
        if any(objects.has(Kind.COMMIT, commit) for commit in missing):
            catalog.rebuild()
            self._report.did("", "catalog.sqlite", "built again with commits that came back")
        return self._harm()
