"""Deciding conflicts of the merge under way: a path as a whole, or single rows of a database.

What the tree held before is kept as a stash, for a resolution writes over what the user may have
edited; the tree is switched like in any other command.
"""

import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from dmsync.core.events import CommitsAdded, ConflictResolved, Event
from dmsync.core.ids import DotId, ObjectId
from dmsync.core.objects import Entry, EntryKind
from dmsync.core.pages import find_path
from dmsync.engine import switching, trees
from dmsync.engine.databases.sqlite_merge import RowConflict, resolve_rows
from dmsync.engine.merging.drivers import FileVersion, open_bench
from dmsync.engine.merging.edits import edited, moved_directory, regrouped
from dmsync.engine.merging.entries import is_unchanged
from dmsync.engine.merging.state import (
    ConflictInfo,
    encode_detail,
    list_conflicts,
    pending_commit,
    require_merge,
)
from dmsync.engine.merging.trees import ROOT_PATH
from dmsync.engine.merging.units import COMPANIONS, MEMBERS
from dmsync.engine.progress import Progress
from dmsync.engine.store import Store
from dmsync.errors import MergeConflict, NotFound, PathNotFound, UsageError
from dmsync.storage.catalog import DotRow
from dmsync.storage.catalog_rows import MergeRow
from dmsync.storage.pack_writer import PackWriter

How = Literal["ours", "theirs", "base", "as-is"]
RowSide = Literal["ours", "theirs", "base"]
_METADATA: Final = ("mode", "uid", "gid", "xattrs")


@dataclass(frozen=True)
class ResolveSummary:
    """What was decided, and how many conflicts are open still. `kept` are copies that stay
    because somebody changed them; `stash` keeps what the tree held before."""

    paths: tuple[bytes, ...]
    how: str
    left: int
    rows_left: int = 0
    kept: tuple[bytes, ...] = ()
    stash: str | None = None


def resolve_conflicts(
    store: Store,
    dot: DotRow,
    paths: Sequence[bytes] | None,
    how: How,
    progress: Progress | None = None,
    *,
    in_use: bool = False,
    dry_run: bool = False,
) -> ResolveSummary:
    """Decide the conflicts at `paths` (None: all that are open): one side's state comes to the
    path, or (as-is) what stands there stays; the copies beside it go.

    Raises:
        NotFound: no merge is under way. PathNotFound: no conflict at a path.
        WouldLose: the tree is in use, or cannot be read.
    """
    with switching.ready(store, dot.dot, progress):
        branch = store.catalog.head(dot.dot)
        row = require_merge(store, dot.dot, branch)
        conflicts = list_conflicts(store, dot.dot, branch)
        chosen = _chosen(conflicts, paths)
        left = _open_count(conflicts) - sum(c.resolved is None for c in chosen)
        names = tuple(conflict.path for conflict in chosen)
        if dry_run or not chosen:
            return ResolveSummary(names, how, left)
        with _live(store, dot, row, progress) as live:
            root = live.root
            kept: list[bytes] = []
            for conflict in chosen:
                if how != "as-is":
                    root = live.with_side(root, conflict, how)
                root = live.without_copies(root, conflict, kept)
            events: list[Event] = [
                ConflictResolved(dot.dot, branch, conflict.path, how) for conflict in chosen
            ]
            stash = live.switch_to(root, events, in_use=in_use)
    return ResolveSummary(names, how, left, kept=tuple(kept), stash=stash)


def resolve_row(
    store: Store,
    dot: DotRow,
    path: bytes,
    table: str,
    key: Sequence[object],
    side: RowSide,
    progress: Progress | None = None,
    *,
    in_use: bool = False,
    dry_run: bool = False,
) -> ResolveSummary:
    """Decide one row of the database at `path`; with the last one the conflict is resolved.

    Raises:
        NotFound: no merge, no such conflict or row. MergeConflict: the database does not allow
            that row. WouldLose: the tree is in use, or cannot be read.
    """
    with switching.ready(store, dot.dot, progress):
        branch = store.catalog.head(dot.dot)
        row = require_merge(store, dot.dot, branch)
        conflicts = list_conflicts(store, dot.dot, branch)
        (conflict,) = _chosen(conflicts, [path])
        wanted = _row(conflict, table, key)
        rest = tuple(found for found in conflict.rows if found != wanted)
        others = [other for other in conflicts if other is not conflict]
        left = _open_count(others) + (1 if rest else 0)
        if dry_run:
            return ResolveSummary((path,), side, left, len(rest))
        with _live(store, dot, row, progress) as live:
            root = live.with_row(live.root, conflict, wanted, side)
            kept: list[bytes] = []
            if rest:
                detail = encode_detail(replace(conflict, rows=rest))
                event = ConflictResolved(dot.dot, branch, path, "open", detail)
            else:
                root = live.without_copies(root, conflict, kept)
                event = ConflictResolved(dot.dot, branch, path, "as-is")
            stash = live.switch_to(root, [event], in_use=in_use)
    return ResolveSummary((path,), side, left, len(rest), tuple(kept), stash)


def _open_count(conflicts: Sequence[ConflictInfo]) -> int:
    return sum(conflict.resolved is None for conflict in conflicts)


def _chosen(conflicts: Sequence[ConflictInfo], paths: Sequence[bytes] | None) -> list[ConflictInfo]:
    if paths is None:
        return [conflict for conflict in conflicts if conflict.resolved is None]
    by_path = {path: c for c in conflicts for path in (c.path, *c.also)}
    found: dict[bytes, ConflictInfo] = {}
    for path in paths:
        plain = path.rstrip(b"/") or ROOT_PATH
        if plain not in by_path:
            shown = path.decode("utf-8", "backslashreplace")
            raise PathNotFound(f"no conflict at {shown}", hint="dm conflicts lists them")
        found[by_path[plain].path] = by_path[plain]
    return list(found.values())


def _row(conflict: ConflictInfo, table: str, key: Sequence[object]) -> RowConflict:
    tables = [row for row in conflict.rows if row.table == table]
    for row in tables:
        if _same_key(row.key, key):
            return row
    shown = conflict.path.decode("utf-8", "backslashreplace")
    if not tables:
        raise NotFound(
            f"no open row of a table {table} in {shown}", hint=f"dm conflicts --rows {shown}"
        )
    raise NotFound(f"no open row with that key in {table}", hint=f"dm conflicts --rows {shown}")


def _same_key(key: Sequence[object], given: Sequence[object]) -> bool:
    """Equal, or written as text the same: what a command line gives is text."""
    return len(key) == len(given) and all(
        mine == other or (isinstance(other, str) and mine is not None and str(mine) == other)
        for mine, other in zip(key, given, strict=True)
    )


@contextmanager
def _live(
    store: Store, dot: DotRow, row: MergeRow, progress: Progress | None
) -> Iterator["_LiveTree"]:
    """The tree as it is now, captured, and a writer for what it shall be."""
    place = trees.require_place(store, dot.dot, row.branch)
    trees.check_place(store, dot.dot, place, accept_moved=False)
    with store.objects(dot.dot).writer() as writer:
        result = trees.capture(store, dot.dot, place, writer, progress)
        switching.refuse_unreadable(result, "resolution")
        yield _LiveTree(store, dot.dot, row, writer, result.root, progress)


class _LiveTree:
    def __init__(
        self,
        store: Store,
        dot: DotId,
        row: MergeRow,
        writer: PackWriter,
        root: Entry,
        progress: Progress | None,
    ) -> None:
        self._store = store
        self._dot = dot
        self._merge = row
        self._writer = writer
        self._snapshot = pending_commit(store, dot, row).root
        self._progress = progress
        self.root = root

    # --- whole paths ---------------------------------------------------------------------------

    def with_side(self, root: Entry, conflict: ConflictInfo, side: str) -> Entry:
        """`root` with the conflicting path as one side has it."""
        versions = self._versions(conflict, side)
        if conflict.path == ROOT_PATH:
            return replace(root, tree=versions[b""].tree if b"" in versions else None)
        if conflict.scope == "metadata":
            return self._with_metadata(root, conflict, versions)
        edits: dict[bytes, Entry | None] = {}
        for path in (conflict.path, *conflict.also):
            for member in MEMBERS if len(conflict.members) > 1 else (b"",):
                edits[path + member] = versions.get(member)
        # what is linked in one side need not be so in this tree: the rest is put right
        new = edited(self._writer, root, edits, parents=self._snapshot)
        links = any(entry is not None and entry.hardlink for entry in edits.values())
        before = find_path(self._writer, root, conflict.path)
        if links or (before is not None and before.hardlink):
            return regrouped(self._writer, new)
        return new

    def _with_metadata(
        self, root: Entry, conflict: ConflictInfo, versions: dict[bytes, Entry]
    ) -> Entry:
        edits: dict[bytes, Entry | None] = {}
        for path in (conflict.path, *conflict.also):
            for member, version in versions.items():
                found = find_path(self._writer, root, path + member)
                if found is not None:
                    values = {name: getattr(version, name) for name in _METADATA}
                    edits[path + member] = replace(found, **values)
        return edited(self._writer, root, edits)

    def _versions(self, conflict: ConflictInfo, side: str) -> dict[bytes, Entry]:
        """The entries of one side, by member: as its copies were recorded, else as its commit has
        them. Empty where the side has nothing there."""
        if side not in conflict.sides:
            return {}
        copies = [copy for copy in conflict.copies if copy.side == side]
        if copies:
            return {
                copy.member: self._original(conflict, copy.member, copy.path) for copy in copies
            }
        commit = self._commit_of(side)
        path = b"" if conflict.path == ROOT_PATH else conflict.path
        root = self._store.root(self._dot, commit)
        found = {m: find_path(self._writer, root, path + m) for m in conflict.members}
        return {member: entry for member, entry in found.items() if entry is not None}

    def _original(self, conflict: ConflictInfo, member: bytes, path: bytes) -> Entry:
        entry = find_path(self._writer, self._snapshot, path)
        assert entry is not None, "the snapshot holds the copies that it was recorded with"
        at = conflict.path + member
        if entry.kind is EntryKind.DIRECTORY:
            return moved_directory(self._writer, entry, path, at)
        return replace(entry, hardlink=conflict.path if conflict.also else b"")

    def _commit_of(self, side: str) -> ObjectId:
        if side == "ours":
            return self._merge.ours
        if side == "theirs":
            return self._merge.theirs
        if len(self._merge.bases) != 1:
            raise UsageError(
                "the base of this merge is made of several commits and was not kept",
                hint="resolve with --ours, --theirs, or --as-is after dm export REV:PATH",
            )
        return self._merge.bases[0]

    def without_copies(self, root: Entry, conflict: ConflictInfo, kept: list[bytes]) -> Entry:
        """`root` without the conflict's copies; those that were changed stay, added to `kept`."""
        edits: dict[bytes, Entry | None] = {}
        for copy in conflict.copies:
            found = find_path(self._writer, root, copy.path)
            if found is None:
                continue
            if is_unchanged(
                self._writer, find_path(self._writer, self._snapshot, copy.path), found
            ):
                edits[copy.path] = None
            else:
                kept.append(copy.path)
        return edited(self._writer, root, edits)

    # --- rows ----------------------------------------------------------------------------------

    def with_row(
        self, root: Entry, conflict: ConflictInfo, row: RowConflict, side: RowSide
    ) -> Entry:
        """`root` with the row written into the database at the conflict's path, as it is now."""
        found = {m: find_path(self._writer, root, conflict.path + m) for m in MEMBERS}
        database = found[b""]
        if database is None or database.kind is not EntryKind.FILE:
            raise MergeConflict(
                "the database is not at its path any more",
                hint="resolve the path as a whole: dm resolve PATH --ours|--theirs|--as-is",
            )
        companions = {
            member: entry
            for member, entry in found.items()
            if member in COMPANIONS and entry is not None and entry.kind is EntryKind.FILE
        }
        with open_bench(self._store.layout, self._writer) as bench:
            path = os.path.join(bench.new_directory(), "database")
            bench.materialise(FileVersion(database, companions), path)
            resolve_rows(path, [(row, side)])
            _check_database(path)
            stored = bench.stored(path, database)
        now_ns, _ = self._store.clock()
        edits: dict[bytes, Entry | None] = {conflict.path + member: None for member in companions}
        edits[conflict.path] = replace(stored, mtime_ns=now_ns, hardlink=b"")
        for path_also in conflict.also:
            edits[path_also] = edits[conflict.path]
        return edited(self._writer, root, edits)

    # --- ending --------------------------------------------------------------------------------

    def switch_to(self, root: Entry, events: Sequence[Event], *, in_use: bool) -> str | None:
        """Record the resolution and make the tree hold `root`; the name of the stash of what it
        held, None when nothing had to be written."""
        if root == self.root:
            with self._store.transaction("resolve") as tx:
                for event in events:
                    tx.append(event)
            return None
        branch = self._merge.branch
        tip = trees.branch_tip(self._store, self._dot, branch)

        def put(tree: Entry) -> ObjectId:
            return switching.put_snapshot(
                self._store, self._writer, branch, tree, tip, "resolving a conflict"
            )

        held, target = put(self.root), put(root)
        self._writer.seal()
        name, kept = switching.stash_events(self._store, self._dot, held, "resolve")
        switching.switch_tree(
            self._store,
            self._dot,
            branch=branch,
            target=target,
            events=[*kept, CommitsAdded(self._dot, (target,)), *events],
            command="resolve",
            in_use=in_use,
            progress=self._progress,
        )
        return name


def _check_database(path: str) -> None:
    """Fold the write-ahead log in and check the whole database.

    Raises:
        MergeConflict: it is not sound, or a foreign key points nowhere.
    """
    try:
        with closing(sqlite3.connect(path, isolation_level=None)) as db:
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            findings: list[Any] = db.execute("PRAGMA integrity_check(1)").fetchall()
            broken = db.execute("PRAGMA foreign_key_check").fetchone()
    except sqlite3.Error as exc:
        raise MergeConflict(f"the database cannot be used: {exc}") from exc
    if findings != [("ok",)]:
        raise MergeConflict(f"the database would not be sound: {findings[0][0]}")
    if broken is not None:
        raise MergeConflict(
            f"a row of {broken[0]} would refer to a row of {broken[2]} that does not exist",
            hint="resolve the rows it refers to first",
        )
