"""What killed processes left, and the trash: files that belong to nobody.

Each is proven to be nobody's by a lock that is free, never by its age alone. Removing them takes
no room, so it comes first.
"""

import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

from dmsync.core.events import DotDeleted, DotPurged, DotRestored
from dmsync.core.ids import DOT_ID_BYTES, DotId
from dmsync.engine.collecting.marking import Marking
from dmsync.engine.collecting.roots import Grace, require_nothing_lost
from dmsync.engine.store import Store
from dmsync.errors import Busy, DotNotFound, StorageFailed, StorageFull
from dmsync.storage.durable import fsync_directory, storage_errors
from dmsync.storage.event_log import EventLog
from dmsync.storage.holds import Sweeping
from dmsync.storage.locks import is_alive, remove_if_dead
from dmsync.storage.pack_consolidation import TEMPORARY_PREFIX
from dmsync.storage.quarantine import PART_SUFFIX
from dmsync.storage.reserve import give_up_reserve
from dmsync.storage.stat_cache import StatCache

_PROOF = ".lock"


@dataclass
class Removed:
    """Bytes and files that went, or (dry run) would. `purged` are deleted dots."""

    bytes: int = 0
    files: int = 0
    purged: list[str] = field(default_factory=list)

    def add(self, other: "Removed") -> None:
        self.bytes += other.bytes
        self.files += other.files
        self.purged += other.purged


def sweep_store(store: Store, *, dry_run: bool) -> Removed:
    """Scratch of commands that were killed, and proofs of transfers that were."""
    removed = Removed()
    layout = store.layout
    for path in _listed(layout.transfers_dir):
        if not is_alive(path):
            _note_file(removed, path)
            if not dry_run:
                remove_if_dead(path)
    for path in _listed(layout.temporary_dir):
        if path.endswith(_PROOF):
            if not os.path.lexists(path.removesuffix(_PROOF)) and not is_alive(path):
                _note_file(removed, path)
                if not dry_run:
                    remove_if_dead(path)
        elif not is_alive(path + _PROOF):
            _remove_tree(path, removed, dry_run=dry_run)
            if not dry_run:
                remove_if_dead(path + _PROOF)
    return removed


def sweep_trash(store: Store, grace: Callable[[], Grace], *, dry_run: bool) -> Removed:
    """Dots that were deleted longer ago than the grace, and what is left of those purged before.

    `grace` is read after the trash has been listed: a deletion is in the log before its directory
    is in the trash. Of what lies there only that goes of which the log says that its dot was
    purged, or came back without it: a log that lost its end does not know every directory.

    Raises:
        Corruption: something was lost, which may have named what lies there. StorageFailed.
    """
    removed = Removed()
    listed = [os.path.basename(path) for path in _listed(store.layout.trash_dir)]
    store.catalog.refresh()
    require_nothing_lost(store)
    young = grace().trash
    deleted = [row for row in store.catalog.dots(include_deleted=True) if row.trash]
    old = {row.trash: row for row in deleted if row.trash and row.trash not in young}
    going = {trash: row for trash, row in old.items() if dry_run or _purge(store, row.dot)}
    removed.purged += [row.name for row in going.values()]
    unknown = {name for name in listed if _is_trash_name(name)} - young
    unknown -= {row.trash for row in deleted}
    unneeded = set(going) | _given_up_among(store, unknown, {row.dot for row in going.values()})
    for name in listed:
        if name in unneeded:
            _remove_tree(store.layout.trashed_dot_dir(name), removed, dry_run=dry_run)
    if dry_run:
        return removed
    if listed:
        fsync_directory(store.layout.trash_dir)
    for row in going.values():
        if store.catalog.dot(row.dot) is not None:
            _purge(store, row.dot)  # there was no room before
    for trash, row in old.items():
        if store.catalog.dot(row.dot) is None:
            _clear_place(store, row.dot, trash, removed)
    return removed


def _given_up_among(store: Store, names: Collection[str], purged: Collection[DotId]) -> set[str]:
    """Which of these directories in the trash hold dots that were purged after their deletion
    (`purged` are about to be), or what dots that came back left there: trees, never a pack. Reads
    the log, if there is anything to look for."""
    if not names:
        return set()
    found: set[str] = set()
    deleted: dict[DotId, set[str]] = {}
    for operation, _ in EventLog(store.layout.events_dir).read():
        for event in operation.events:
            if isinstance(event, DotDeleted) and event.trash in names:
                deleted.setdefault(event.dot, set()).add(event.trash)
            elif isinstance(event, DotPurged):
                found |= deleted.pop(event.dot, set())
            elif isinstance(event, DotRestored):
                found |= {name for name in deleted.get(event.dot, ()) if not _has_pack(store, name)}
    for dot in purged:
        found |= deleted.get(dot, set())
    return found


def _has_pack(store: Store, trash: str) -> bool:
    return any(_listed(os.path.join(store.layout.trashed_dot_dir(trash), "packs")))


def _clear_place(store: Store, dot: DotId, trash: str, removed: Removed) -> None:
    """Remove what an undo brought out of the trash just before the dot was purged, unless somebody
    holds it: the same dot may be coming again."""
    place, aside = store.layout.dot_dir(dot), store.layout.trashed_dot_dir(trash)
    if not os.path.isdir(place):
        return
    try:
        with Sweeping(place, wait_s=0):
            store.catalog.refresh()
            if store.catalog.dot(dot) is not None or os.path.lexists(aside):
                return
            with storage_errors(f"moving {place} to the trash"):
                os.rename(place, aside)
    except Busy:
        return
    _remove_tree(aside, removed, dry_run=False)
    fsync_directory(store.layout.trash_dir)


def _purge(store: Store, dot: DotId) -> bool:
    """Record that a deleted dot is gone; False when it came back meanwhile, or when there is no
    room to write that down: its directory may go all the same, for nothing brings it back then."""
    store.forget_objects(dot)
    for _ in range(2):
        try:
            with store.transaction("gc") as tx:
                tx.append(DotPurged(dot))
            return True
        except DotNotFound:
            return False
        except StorageFull:
            if not give_up_reserve(store.layout.reserve_file):
                break
    row = store.catalog.dot(dot)
    return row is not None and row.trash is not None


def _is_trash_name(name: str) -> bool:
    """`<dot id>-<n>`: nothing else in the trash is ours."""
    digits, dash, _ = name.partition("-")
    return bool(dash) and len(digits) == 2 * DOT_ID_BYTES


def sweep_quarantine(store: Store, dot: DotId, grace: Grace, *, dry_run: bool) -> Removed:
    """Parts of transfers that were cut longer ago than the grace, packs that were never sealed, and
    those that an earlier sweep has let go.

    The caller holds the dot alone, so that none of them is anybody's. A part costs its sender
    another sending at most, so that its own date will do.
    """
    removed = Removed()
    swept = store.objects(dot).sealed.index.replaced()
    for path in _listed(store.layout.packs_dir(dot)):
        if os.path.basename(path) in swept:  # an earlier sweep was stopped
            _remove_file(path, removed, dry_run=dry_run)
    for path in _listed(store.layout.quarantine_dir(dot)):
        if path.endswith(PART_SUFFIX) and _is_older(path, grace):
            _remove_file(path, removed, dry_run=dry_run)
    for path in _listed(store.layout.packs_dir(dot)):
        if os.path.basename(path).startswith(TEMPORARY_PREFIX) and not is_alive(path):
            _remove_file(path, removed, dry_run=dry_run)
    return removed


def sweep_stat_caches(store: Store, dot: DotId, marking: Marking, *, dry_run: bool) -> Removed:
    """Stat caches of trees that are not live: a commit that trusted them would trust what goes.
    The caller holds the dot alone."""
    removed = Removed()
    for path in stat_caches(store, dot):
        cache = StatCache.load(path)
        root = None if cache is None else cache.root.tree
        if cache is None or (root is not None and not marking.is_complete(root)):
            _remove_file(path, removed, dry_run=dry_run)
    return removed


def stat_caches(store: Store, dot: DotId) -> Iterator[str]:
    """Paths of a dot's stat caches; a branch's name may have slashes."""
    for directory, _, names in os.walk(os.path.join(store.layout.dot_dir(dot), "stat")):
        for name in names:
            if name.endswith(".stat"):
                yield os.path.join(directory, name)


def _is_older(path: str, grace: Grace) -> bool:
    if grace.oldest_ns is None:
        return True
    try:
        return os.stat(path, follow_symlinks=False).st_mtime_ns < grace.oldest_ns
    except FileNotFoundError:
        return False


def _listed(directory: str) -> Iterator[str]:
    with storage_errors(f"listing {directory}"):
        try:
            names = sorted(os.listdir(directory))
        except FileNotFoundError:
            return
    for name in names:
        yield os.path.join(directory, name)


def _note_file(removed: Removed, path: str) -> None:
    try:
        removed.bytes += os.lstat(path).st_blocks * 512
        removed.files += 1
    except OSError:
        pass


def _remove_file(path: str, removed: Removed, *, dry_run: bool) -> None:
    _note_file(removed, path)
    if not dry_run:
        with storage_errors(f"removing {path}"):
            try:
                os.unlink(path)
            except FileNotFoundError:
                pass


def _remove_tree(path: str, removed: Removed, *, dry_run: bool) -> None:
    """Remove a directory and all below it; symbolic links are not followed."""
    for directory, _, names in os.walk(path):
        for name in names:
            _note_file(removed, os.path.join(directory, name))
    if not dry_run:
        from shutil import rmtree  # slow to import, and rarely needed

        try:
            rmtree(path)
        except FileNotFoundError:
            pass
        except OSError as exc:
            raise StorageFailed(f"removing {path}: {exc.strerror}") from exc
