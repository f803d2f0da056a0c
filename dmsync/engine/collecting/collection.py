"""`dm gc`: remove what nothing live needs.

Marking and writing happen beside everybody else. Then the dot is held alone for a moment: what
became live meanwhile is marked, commits that nothing names are recorded as forgotten, new packs
take the place of old ones. A stop at any point loses nothing, and the next gc goes on.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from dmsync.core.events import CommitsForgotten, GarbageCollected
from dmsync.core.ids import DotId, Kind, ObjectId, object_id
from dmsync.engine.collecting import leftovers
from dmsync.engine.collecting.leftovers import Removed
from dmsync.engine.collecting.marking import Marking
from dmsync.engine.collecting.roots import (
    GRACE_NS_DEFAULT,
    Grace,
    read_grace,
    require_nothing_lost,
)
from dmsync.engine.progress import SILENT, Progress
from dmsync.engine.store import Store
from dmsync.errors import Busy, Corruption, DmError, StorageFull
from dmsync.storage.catalog import DotRow
from dmsync.storage.holds import Sweeping
from dmsync.storage.locks import FileLock
from dmsync.storage.object_store import ObjectStore
from dmsync.storage.pack_sweeping import PreparedSweep, Survey, place_of, prepare_sweep, survey
from dmsync.storage.reserve import RESERVE_BYTES, give_up_reserve, make_reserve

COPIED_BYTES_MAX: Final = 4 * 1024**3
"""What is written anew at a time, so much room permitting."""
_FREE_SHARE: Final = 0.8
_ATTEMPTS: Final = 3
"""Times a sweep is prepared without stopping anybody, when others keep sealing on what goes."""
_TICK_NS: Final = 12 * 3600 * 1_000_000_000
"""A gc that frees nothing is recorded when the log has had no operation for so long: the grace is
counted from one operation to the next."""


@dataclass(frozen=True)
class CollectionRequest:
    """`grace_ns`: how long undo can bring things back."""

    grace_ns: int = GRACE_NS_DEFAULT
    dry_run: bool = False


@dataclass
class DotCollection:
    """What went of one dot, or (dry run) would. `skipped`: why nothing did."""

    dot: DotId
    name: str
    commits: int = 0
    objects: int = 0
    reencoded: int = 0
    pack_bytes: int = 0
    other: Removed = field(default_factory=Removed)
    skipped: DmError | None = None

    @property
    def bytes(self) -> int:
        return self.pack_bytes + self.other.bytes

    def freed(self) -> tuple[tuple[str, int], ...]:
        return (("commits", self.commits), ("objects", self.objects), ("bytes", max(0, self.bytes)))


@dataclass
class CollectionReport:
    """What went. `store` is what belongs to no dot that is here."""

    dots: list[DotCollection] = field(default_factory=list)
    store: Removed = field(default_factory=Removed)
    is_recorded: bool = True
    """False when there was no room to write down what went."""

    @property
    def bytes(self) -> int:
        return self.store.bytes + sum(dot.bytes for dot in self.dots)

    @property
    def skipped(self) -> list[DotCollection]:
        return [dot for dot in self.dots if dot.skipped is not None]


def collect(
    store: Store,
    dots: Sequence[DotRow] | None,
    request: CollectionRequest,
    progress: Progress = SILENT,
) -> CollectionReport:
    """Collect the garbage of some dots, or of all and of the store itself.

    A dot that others use for longer than the lock wait is skipped. `store` is opened with holding
    "never".

    Raises:
        Busy: another gc is under way. Corruption: something that is needed is missing; of that dot
            nothing was removed. Or something was lost and waits for a repair; nothing at all was
            removed. StorageFull, StorageFailed.
    """
    if request.dry_run:
        return _Collection(store, request, progress).run(dots)
    lock = FileLock(
        store.layout.collecting_lock_file,
        what="garbage collection",
        wait_s=store.settings.lock_wait_s,
    )
    with lock:
        return _Collection(store, request, progress).run(dots)


class _Collection:
    def __init__(self, store: Store, request: CollectionRequest, progress: Progress) -> None:
        self._store = store
        self._request = request
        self._progress = progress
        self._report = CollectionReport()
        self._is_dry = request.dry_run

    def run(self, dots: Sequence[DotRow] | None) -> CollectionReport:
        store, report = self._store, self._report
        require_nothing_lost(store)
        if dots is None:
            self._progress.phase("clearing leftovers")
            report.store.add(leftovers.sweep_store(store, dry_run=self._is_dry))
            trash = leftovers.sweep_trash(store, self._grace, dry_run=self._is_dry)
            report.store.add(trash)
        damaged: DmError | None = None
        for row in store.catalog.dots() if dots is None else dots:
            found = DotCollection(row.dot, row.name)
            report.dots.append(found)
            try:
                _DotCollection(self, row, found).run()
            except Busy as exc:
                found.skipped = exc
            except Corruption as exc:
                found.skipped = damaged = exc
        if not self._is_dry:
            self._record(is_whole=dots is None)
            make_reserve(store.layout.reserve_file)
        if damaged is not None and len(report.dots) == 1:
            raise damaged
        return report

    def _grace(self) -> Grace:
        return read_grace(self._store, self._request.grace_ns)

    def _record(self, *, is_whole: bool) -> None:
        """Tell the log; a run that freed nothing only when it has been quiet for long. Deleted dots
        grow older too: where no other dot was looked at, one of them is named."""
        done = [dot for dot in self._report.dots if dot.skipped is None]
        told = [dot for dot in done if any(number for _, number in dot.freed())]
        if not told and self._is_quiet():
            told = (done or (self._deleted() if is_whole else []))[:1]
        if not told:
            return
        try:
            with self._store.transaction("gc") as tx:
                for dot in told:
                    tx.append(GarbageCollected(dot.dot, dot.freed()))
        except StorageFull:
            self._report.is_recorded = False

    def _deleted(self) -> list[DotCollection]:
        rows = self._store.catalog.dots(include_deleted=True)
        return [DotCollection(row.dot, row.name) for row in rows if row.trash is not None]

    def _is_quiet(self) -> bool:
        newest = self._store.catalog.operations(1)
        now_ns, _ = self._store.clock()
        return bool(newest) and abs(now_ns - newest[0].time_ns) >= _TICK_NS

    @property
    def store(self) -> Store:
        return self._store

    @property
    def request(self) -> CollectionRequest:
        return self._request

    @property
    def progress(self) -> Progress:
        return self._progress


class _Moved(Exception):
    """The log went on while the commits to forget were listed."""


class _Overtaken(Exception):
    """What was prepared does not fit any more, and there is time to prepare it again."""


class _DotCollection:
    """One dot, from marking to sweeping."""

    def __init__(self, collection: _Collection, row: DotRow, found: DotCollection) -> None:
        self._store = collection.store
        self._request = collection.request
        self._progress = collection.progress
        self._row = row
        self._dot = row.dot
        self._found = found
        self._objects: ObjectStore = self._store.objects(row.dot)
        self._grace = read_grace(self._store, self._request.grace_ns)
        self._marking = Marking(self._store, row.dot, self._grace, self._progress)
        self._copied_bytes_max = COPIED_BYTES_MAX
        self._is_limited = False
        self._surveyed: Survey | None = None
        """What the last preparation was based on; None: it could not be made."""

    def run(self) -> None:
        self._progress.phase(f"marking {self._row.name}")
        self._marking.mark()
        if self._request.dry_run:
            self._run_dry()
            return
        while True:
            freed = self._round()
            if not (freed and self._is_limited):
                return

    def _run_dry(self) -> None:
        found = survey(self._objects, self._marking.is_live)
        prepared = self._prepare_once(found, is_dry=True)
        self._found.commits = len(self._dead_commits(found))
        if prepared is not None:
            self._count(prepared)
        self._sweep_files(dry_run=True)

    def _round(self) -> bool:
        """Prepare beside everybody else, then finish alone. False when there was nothing left.

        Where others were faster it is prepared anew, beside them again: writing may take long. Only
        the last time they have to wait for it.
        """
        for attempt in range(_ATTEMPTS):
            prepared = self._prepare_beside_others()
            try:
                with Sweeping(self._objects.dot_dir, wait_s=self._store.settings.lock_wait_s):
                    return self._finish(prepared, is_last=attempt == _ATTEMPTS - 1)
            except _Overtaken:
                self._objects.hold.renew()
            finally:
                if prepared is not None:
                    prepared.close()
        raise AssertionError("the last attempt is never overtaken")

    def _prepare_beside_others(self) -> PreparedSweep | None:
        for _ in range(_ATTEMPTS):
            try:
                return self._prepare()
            except Corruption:
                # maybe only a pack that was joined with others while it was looked at
                self._objects.hold.renew()
        return None

    def _prepare(self) -> PreparedSweep | None:
        self._surveyed = None
        self._progress.phase(f"looking through {self._row.name}")
        found = survey(self._objects, self._marking.is_live)
        self._progress.phase(f"writing what stays of {self._row.name}")
        return self._prepare_once(found)

    def _prepare_once(self, found: Survey, *, is_dry: bool = False) -> PreparedSweep | None:
        """Raises Corruption, StorageFailed."""
        room = self._room()
        if not is_dry and room < RESERVE_BYTES and self._copied_bytes_max:
            # what stays of most packs is little, and writing it anew frees the rest
            give_up_reserve(self._store.layout.reserve_file)
            room = self._room()
        most_copied = COPIED_BYTES_MAX if is_dry else min(self._copied_bytes_max, room)
        for most in (most_copied, 0):
            try:
                prepared = prepare_sweep(
                    self._objects,
                    found,
                    self._marking.is_live,
                    copied_bytes_max=most,
                    is_dry=is_dry,
                )
            except StorageFull:
                continue  # what needs no room goes in any case
            self._is_limited = prepared is not None and prepared.plan.is_limited
            self._surveyed = found
            return prepared
        return None

    def _room(self) -> int:
        free = os.statvfs(self._objects.dot_dir)
        return int(_FREE_SHARE * free.f_bavail * free.f_frsize)

    # --- alone --------------------------------------------------------------------------------

    def _finish(self, prepared: PreparedSweep | None, *, is_last: bool) -> bool:
        """Returns whether packs were swept. Closes what it prepares itself. Raises _Overtaken,
        unless it is the last attempt."""
        self._objects.hold.renew()
        self._sweep_files(dry_run=False)
        current, own = prepared, None
        try:
            while True:
                since = self._marking.mark()
                require_nothing_lost(self._store)
                is_whole = self._surveyed is not None
                if not is_whole or (current is not None and not current.fits(since)):
                    if is_whole and not is_last:
                        raise _Overtaken
                    if own is not None:
                        own.close()
                    current = own = self._prepare()
                try:
                    self._forget(self._surveyed or survey(self._objects, self._marking.is_live))
                    break
                except _Moved:
                    continue
            if current is None:
                return False
            self._progress.phase(f"sweeping {self._row.name}")
            try:
                current.finish()
            except StorageFull:
                current.close()
                current = own = self._without_room()
            if current is not None:
                self._count(current)
            return current is not None
        finally:
            if own is not None:
                own.close()

    def _without_room(self) -> PreparedSweep | None:
        """Sweep only what takes no writing, after there was no room for more."""
        self._objects.hold.renew()
        self._copied_bytes_max = 0
        prepared = self._prepare()
        if prepared is not None:
            prepared.finish()
        return prepared

    def _sweep_files(self, *, dry_run: bool) -> None:
        store, dot, other = self._store, self._dot, self._found.other
        other.add(leftovers.sweep_stat_caches(store, dot, self._marking, dry_run=dry_run))
        other.add(leftovers.sweep_quarantine(store, dot, self._grace, dry_run=dry_run))

    def _count(self, prepared: PreparedSweep) -> None:
        self._found.objects += prepared.objects
        self._found.pack_bytes += prepared.freed_bytes
        self._found.reencoded += prepared.reencoded

    def _dead_commits(self, found: Survey) -> list[ObjectId]:
        """Commits that nothing live names, those in the catalog first; each once."""
        catalog, live = self._store.catalog, self._marking.commits
        dead = dict.fromkeys(c for c in catalog.commit_ids(self._dot) if c not in live)
        for entry in found.dead_commits:
            place = place_of(found, entry)
            try:
                record = self._objects.sealed.load(place)
                commit = object_id(Kind.COMMIT, self._objects.decode_at(place, record).data)
            except Corruption:
                continue
            if commit not in live and not catalog.is_forgotten(self._dot, commit):
                dead[commit] = None
        return list(dead)

    def _forget(self, found: Survey) -> None:
        """Record which commits go, before anything of them does. Raises _Moved, Busy."""
        dead = self._dead_commits(found)
        for may_give_up in (True, False):
            try:
                self._append_forgotten(dead)
                return
            except StorageFull as exc:
                if exc.facts.get("recorded"):
                    self._found.commits += len(dead)
                    return
                if may_give_up and give_up_reserve(self._store.layout.reserve_file):
                    continue
                if not dead:
                    return
                # what cannot be recorded as gone stays; the rest goes all the same
                self._marking.keep(dead)
                raise _Moved from exc

    def _append_forgotten(self, dead: Iterable[ObjectId]) -> None:
        dead = tuple(dead)
        with self._store.transaction("gc") as tx:
            if self._store.catalog.last_seq() != self._marking.seq:
                raise _Moved
            if dead:
                tx.append(CommitsForgotten(self._dot, dead))
        self._found.commits += len(dead)
