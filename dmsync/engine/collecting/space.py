"""`dm df`: what takes space, what gc would free of it, and why not the rest. Changes nothing."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from dmsync.core.ids import DotId
from dmsync.engine.collecting.leftovers import stat_caches
from dmsync.engine.collecting.marking import Marking
from dmsync.engine.collecting.roots import read_grace
from dmsync.engine.progress import SILENT, Progress
from dmsync.engine.store import Store
from dmsync.engine.transfers import RUNNING, transfer_status
from dmsync.errors import Corruption, DmError
from dmsync.storage.catalog import DotRow
from dmsync.storage.holds import holders_of
from dmsync.storage.pack_sweeping import OpenPack

_NAMES_TOLD_MAX = 100


@dataclass(frozen=True)
class Keeper:
    """Why something stays: `why` (branch, tag, grace ...), what it is called, and the bytes of
    records that are needed for none of the reasons before it."""

    why: str
    names: tuple[str, ...]
    bytes: int


@dataclass
class DotSpace:
    """A dot's files in bytes. Of the packs `live_bytes` is named by what is there,
    `grace_bytes` only by operations that undo may take back, `dead_bytes` by nothing: what gc
    frees now, about; with --grace 0 that and the one before. What is left of `pack_bytes` is
    tables and headers."""

    dot: DotId
    name: str
    pack_bytes: int = 0
    live_bytes: int = 0
    grace_bytes: int = 0
    dead_bytes: int = 0
    keepers: list[Keeper] = field(default_factory=list)
    grace_left_ns: tuple[int, int] | None = None
    """When something, and when all, of what the grace keeps is given up, if time runs."""
    held_by: list[str] = field(default_factory=list)
    """Processes that keep gc from this dot now."""
    index_bytes: int = 0
    stat_cache_bytes: int = 0
    tree_bytes: int = 0
    quarantine_bytes: int = 0
    unknown: DmError | None = None
    """Why it cannot be told what is live: the dot is damaged."""

    @property
    def bytes(self) -> int:
        return (
            self.pack_bytes
            + self.index_bytes
            + self.stat_cache_bytes
            + self.tree_bytes
            + self.quarantine_bytes
        )


@dataclass
class SpaceReport:
    """All of a store, or some dots of it (then the rest is 0)."""

    dots: list[DotSpace] = field(default_factory=list)
    log_bytes: int = 0
    catalog_bytes: int = 0
    trash_bytes: int = 0
    temporary_bytes: int = 0
    reserve_bytes: int = 0

    @property
    def bytes(self) -> int:
        rest = self.log_bytes + self.catalog_bytes + self.trash_bytes
        return rest + self.temporary_bytes + self.reserve_bytes + sum(d.bytes for d in self.dots)


def space(
    store: Store, dots: Sequence[DotRow] | None, grace_ns: int, progress: Progress = SILENT
) -> SpaceReport:
    """Measure some dots, or all and what belongs to the store itself."""
    report = SpaceReport()
    for row in store.catalog.dots() if dots is None else dots:
        report.dots.append(_space_of(store, row, grace_ns, progress))
    if dots is None:
        layout = store.layout
        report.log_bytes = _bytes_below(layout.events_dir)
        report.catalog_bytes = sum(
            _bytes_of(layout.catalog_file + suffix) for suffix in ("", "-wal", "-shm")
        )
        report.trash_bytes = _bytes_below(layout.trash_dir)
        report.temporary_bytes = _bytes_below(layout.temporary_dir)
        report.reserve_bytes = _bytes_of(layout.reserve_file)
    return report


def _space_of(store: Store, row: DotRow, grace_ns: int, progress: Progress) -> DotSpace:
    found = DotSpace(row.dot, row.name)
    directory = store.layout.dot_dir(row.dot)
    found.index_bytes = sum(
        _bytes_of(os.path.join(directory, "index.sqlite" + suffix))
        for suffix in ("", "-wal", "-shm")
    )
    found.stat_cache_bytes = sum(map(_bytes_of, stat_caches(store, row.dot)))
    found.tree_bytes = _bytes_below(store.layout.trees_dir(row.dot))
    found.quarantine_bytes = _bytes_below(store.layout.quarantine_dir(row.dot))
    found.pack_bytes = store.objects(row.dot).stored_bytes()
    found.held_by = holders_of(store.layout.hold_file(row.dot))
    progress.phase(f"marking {row.name}")
    try:
        _tell_what_is_live(store, row, grace_ns, found, progress)
    except Corruption as exc:
        found.unknown = exc
    return found


def _tell_what_is_live(
    store: Store, row: DotRow, grace_ns: int, found: DotSpace, progress: Progress
) -> None:
    grace = read_grace(store, grace_ns)
    marking = Marking(store, row.dot, grace, progress)
    marking.mark()
    objects = store.objects(row.dot)
    held = dict.fromkeys(marking.held, 0)
    for number, pack in enumerate(objects.packs()):
        with OpenPack(objects, pack.name) as opened:
            for key, entry in opened.entries(number):
                why = next((why for why, keys in marking.held.items() if key in keys), None)
                if why is not None:
                    held[why] += entry.length
                elif key in marking.by_grace:
                    found.grace_bytes += entry.length
                else:
                    found.dead_bytes += entry.length
    found.live_bytes = sum(held.values())
    for why, size in held.items():
        names = dict.fromkeys(root.name for root in marking.roots if root.why == why)
        found.keepers.append(Keeper(why, tuple(names)[:_NAMES_TOLD_MAX], size))
    for transfer in store.catalog.transfers():
        is_ours = transfer.dot == row.dot and transfer.status is None
        if is_ours and transfer_status(store.layout, transfer) == RUNNING:
            name = f"{transfer.direction} {transfer.remote}"
            found.keepers.append(Keeper("running transfer", (name,), 0))
    if found.grace_bytes:
        found.grace_left_ns = grace.left_ns(row.dot)
        found.keepers.append(Keeper("grace", (), found.grace_bytes))


def _bytes_of(path: str) -> int:
    try:
        return os.lstat(path).st_size
    except OSError:
        return 0


def _bytes_below(path: str) -> int:
    """What the files below a directory take on the disk."""
    total = 0
    for directory, _, names in os.walk(path):
        for name in names:
            try:
                total += os.lstat(os.path.join(directory, name)).st_blocks * 512
            except OSError:
                continue
    return total
