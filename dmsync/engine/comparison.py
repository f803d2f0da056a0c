"""Compares two states of a dot: commits, stashes (which are revisions) and the working tree."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dmsync.core.ids import ObjectId
from dmsync.core.objects import Entry, EntryKind
from dmsync.core.pages import PageReader, find_path, walk_tree
from dmsync.core.revisions import Range, parse_revision_or_range
from dmsync.engine import trees
from dmsync.engine.diff_drivers import (
    JOURNAL_SUFFIXES,
    DiffDriver,
    FileDifference,
    is_database,
)
from dmsync.engine.differences import Change, tree_differences, with_copies
from dmsync.engine.differing_bytes import differing_bytes
from dmsync.engine.file_versions import (
    ChangedMeanwhile,
    FileVersion,
    LiveState,
    RecordedState,
    State,
)
from dmsync.engine.progress import Progress
from dmsync.engine.revision_lookup import head_commit, resolve_range, resolve_revision
from dmsync.engine.store import Store
from dmsync.engine.trees import TreePlace
from dmsync.errors import CaptureFailed, UnrelatedHistories
from dmsync.storage.catalog import DotRow

CHANGED_MEANWHILE = FileDifference(
    "none", ["changed while it was read; try again"], {"note": "changed while it was read"}
)


@dataclass(frozen=True)
class Comparison:
    """Changes that lead from one state to another, sorted by path.

    `reader` reads the pages of both; of a live file only when the comparison was `measured`.
    """

    store: Store
    old: State
    new: State
    old_root: Entry
    reader: PageReader
    changes: tuple[Change, ...]

    def differing_bytes(self, change: Change) -> int:
        """At most so many bytes of content differ (engine/differing_bytes)."""
        return differing_bytes(self.reader, change.old, change.new)

    def told(self, change: Change, drivers: Sequence[DiffDriver]) -> FileDifference | None:
        """What the first driver that claims the file says of its content; None where there is
        nothing to say: no content differs, or it is no regular file.

        A journal of a database whose own file did not change is told as that database.

        Raises:
            DriverFailed, StorageFull, StorageFailed, Corruption.
        """
        try:
            path, old, new = self._subject(change)
            if old is None and new is None:
                return None
            driver = next((d for d in drivers if d.claims(path, old, new)), None)
            return None if driver is None else driver.compare(path, old, new)
        except ChangedMeanwhile:
            return CHANGED_MEANWHILE

    def _subject(self, change: Change) -> tuple[bytes, FileVersion | None, FileVersion | None]:
        if change.metadata_only:
            return change.path, None, None
        for suffix in JOURNAL_SUFFIXES:
            if change.path.endswith(suffix):
                database = self._database_of_journal(change.path.removesuffix(suffix))
                if database is not None:
                    return database
        return (
            change.path,
            self._version(self.old, change.path, change.old),
            self._version(self.new, change.path, change.new),
        )

    def _database_of_journal(
        self, path: bytes
    ) -> tuple[bytes, FileVersion | None, FileVersion | None] | None:
        """The database at `path`, whose file is the same in both states."""
        change = next((c for c in self.changes if c.path == path), None)
        if change is not None and not change.metadata_only:
            return None
        entry = change.new if change is not None else find_path(self.reader, self.old_root, path)
        version = self._version(self.old, path, entry)
        if version is None or not is_database(version):
            return None
        return path, version, self._version(self.new, path, entry)

    @staticmethod
    def _version(state: State, path: bytes, entry: Entry | None) -> FileVersion | None:
        if entry is None or entry.kind is not EntryKind.FILE:
            return None
        return FileVersion(state, path, entry)


def compare(
    store: Store,
    dot: DotRow,
    revisions: Sequence[str],
    *,
    paths: Sequence[bytes] = (),
    measured: bool = False,
    find_copies: bool = False,
    progress: Progress | None = None,
) -> Comparison:
    """Compare two revisions, or one (HEAD when none is given) with the working tree.

    `A..B` is A against B, `A...B` their merge base against B. `paths` keeps what lies at or
    below one of them. `measured` also cuts live files into chunks, so that differing bytes can
    be counted. `find_copies` looks for copies of unchanged files too: reads the whole old tree.

    Raises:
        UsageError, RevisionNotFound, AmbiguousRevision: as resolve_revision.
        UnrelatedHistories: `A...B` without a common commit.
        CaptureFailed: the attached directory is gone or another one.
    """
    old, new, is_live = _ends(store, dot, revisions)
    old_root = store.root(dot.dot, old)
    place = trees.place_of(store, dot.dot, store.catalog.head(dot.dot)) if is_live else None
    if place is not None:
        found = _with_live_tree(store, dot, place, old_root, progress, measured=measured)
    elif is_live and revisions:
        raise CaptureFailed(f"branch {store.catalog.head(dot.dot)} has no working tree")
    else:
        found = _with_recorded_tree(store, dot, old_root, store.root(dot.dot, new))
    reader_of_both, new_state, all_changes = found
    kept = [change for change in all_changes if _is_within(change, paths)]
    others = _unchanged(reader_of_both, old_root, all_changes) if find_copies else iter(())
    return Comparison(
        store,
        RecordedState(store.objects(dot.dot), old_root),
        new_state,
        old_root,
        reader_of_both,
        tuple(with_copies(kept, others)),
    )


def _ends(
    store: Store, dot: DotRow, revisions: Sequence[str]
) -> tuple[ObjectId | None, ObjectId | None, bool]:
    """(old commit, new commit, whether the working tree stands in for the new one)."""
    if not revisions:
        head = head_commit(store, dot.dot)
        return head, head, True
    if len(revisions) == 2:
        old, new = (resolve_revision(store, dot, text) for text in revisions)
        return old, new, False
    parsed = parse_revision_or_range(revisions[0])
    if not isinstance(parsed, Range):
        return resolve_revision(store, dot, revisions[0]), None, True
    wanted, excluded = resolve_range(store, dot, revisions[0])
    if not excluded:
        raise UnrelatedHistories(f"{revisions[0]}: the two have no commit in common")
    return excluded[0], wanted[-1], False


def _with_live_tree(
    store: Store,
    dot: DotRow,
    place: TreePlace,
    old_root: Entry,
    progress: Progress | None,
    *,
    measured: bool,
) -> tuple[PageReader, State, list[Change]]:
    trees.check_place(store, dot.dot, place, accept_moved=False)
    if not measured:
        changes = trees.tree_changes(store, dot.dot, place, old_root, progress)
        return store.objects(dot.dot), LiveState(place), changes
    reader, root = trees.live_root(store, dot.dot, place, progress)
    return reader, LiveState(place), tree_differences(reader, old_root, root)


def _with_recorded_tree(
    store: Store, dot: DotRow, old_root: Entry, new_root: Entry
) -> tuple[PageReader, State, list[Change]]:
    objects = store.objects(dot.dot)
    changes = tree_differences(objects, old_root, new_root)
    return objects, RecordedState(objects, new_root), changes


def _is_within(change: Change, paths: Sequence[bytes]) -> bool:
    if not paths:
        return True
    ends = [change.path] if change.old_path is None else [change.path, change.old_path]
    return any(
        not path or end == path or end.startswith(path + b"/") for path in paths for end in ends
    )


def _unchanged(
    reader: PageReader, old_root: Entry, changes: Sequence[Change]
) -> Iterator[tuple[bytes, Entry]]:
    changed = {change.path for change in changes if change.old_path is None}
    changed |= {change.old_path for change in changes if change.old_path is not None}
    for path, entry in walk_tree(reader, old_root):
        if entry.kind is EntryKind.FILE and path not in changed:
            yield path, entry
