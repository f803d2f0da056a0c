"""Three-way merge of two trees against a base, path by path, reading only pages that differ.

A path that one side alone changed takes that side's value; what both changed is merged field by
field, its content by a driver, or conflicts. Units (merging/units.py) are taken whole. A conflict
keeps ours at the path and lays the versions beside it as `NAME~ours`, `NAME~theirs`, `NAME~base`.
"""

from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, Literal

from dmsync.core.ids import ObjectId
from dmsync.core.objects import NAME_BYTES_MAX, ROOT_ENTRY, Entry, EntryKind
from dmsync.core.pages import DIRECTORY, differing_items, directory_entries, find_path
from dmsync.engine.differences import joined, tree_differences, with_renames
from dmsync.engine.merging.drivers import (
    Bench,
    DriverResult,
    FileMerge,
    FileVersion,
    MergeDriver,
    merge_file,
)
from dmsync.engine.merging.edits import (
    edited,
    moved_directory,
    regrouped,
    write_entries,
)
from dmsync.engine.merging.entries import (
    Side,
    any_links,
    is_unchanged,
    merge_metadata,
    same_metadata,
)
from dmsync.engine.merging.units import (
    COMPANIONS,
    MEMBERS,
    covering_unit,
    is_file_unit,
    is_unit_directory,
    stem_of,
)
from dmsync.errors import ContentAbsent
from dmsync.storage.pack_writer import PackWriter

if TYPE_CHECKING:
    from dmsync.engine.databases.sqlite_merge import RowConflict

Policy = Literal["beside", "ours", "theirs", "absent"]
"""What a conflict becomes: versions beside the path, one side's, or (in a virtual base) nothing."""
Scope = Literal["whole", "metadata", "rows"]

SIDES: Final = ("ours", "theirs", "base")
ROOT_PATH: Final = b"."
"""Stands for the dot's root where that conflicts."""
MERGED_COPY: Final = "merged"
"""A version that a driver made of all sides, with what is open marked in it."""


@dataclass(frozen=True)
class Copy:
    """A version laid beside a conflicting path. `member` is the ending of a companion, or b""."""

    side: str
    member: bytes
    path: bytes


@dataclass(frozen=True)
class FoundConflict:
    """A path that the merge could not decide.

    `scope`: what is open is the path as a whole, its metadata alone, or `rows` of its database.
    `sides` are those in which it exists, `members` the endings of the files that belong together,
    `also` further names of the same hard-linked file. Without `copies` the versions are to be had
    from their commits.
    """

    path: bytes
    reason: str
    scope: Scope = "whole"
    sides: tuple[str, ...] = ()
    copies: tuple[Copy, ...] = ()
    members: tuple[bytes, ...] = (b"",)
    also: tuple[bytes, ...] = ()
    rows: "tuple[RowConflict, ...]" = ()


@dataclass(frozen=True)
class MergedTree:
    """The merged root, and conflicts sorted by path (none but with policy `beside`); `undecided`
    are the paths that policy `absent` left out."""

    root: Entry
    conflicts: tuple[FoundConflict, ...]
    undecided: frozenset[bytes] = frozenset()


@dataclass(frozen=True)
class MergeRules:
    """How one merge is done, but for its three trees."""

    drivers: tuple[MergeDriver, ...] = ()
    unit_patterns: tuple[str, ...] = ()
    policy: Policy = "beside"
    renames: bool = True
    undecided: frozenset[bytes] = frozenset()
    """Paths that a virtual base lacks because the bases disagree there: what only one side has at
    such a path was deleted by the other, and is not new."""

    @property
    def favour(self) -> Side | None:
        return self.policy if self.policy == "ours" or self.policy == "theirs" else None


def merge_trees(
    writer: PackWriter,
    bench: Bench,
    rules: MergeRules,
    base: Entry | None,
    ours: Entry,
    theirs: Entry,
) -> MergedTree:
    """Merge the trees of three root entries (no base: both sides added everything).

    Raises:
        DriverFailed; ObjectMissing, BadObject: a tree is not sound or not here.
    """
    if ours == theirs or (theirs == base and not rules.undecided):
        return MergedTree(ours, ())
    if ours == base and not rules.undecided:
        return MergedTree(theirs, ())
    merge = _TreeMerge(writer, bench, rules)
    merged = merge.run(base, ours, theirs)
    if rules.renames and base is not None and merge.lost:
        moved = _following_renames(writer, rules, merge.lost, base, ours, theirs)
        if moved is not None:
            merge = _TreeMerge(writer, bench, rules)
            merged = merge.run(*moved)
    return merged


# --- one merge -------------------------------------------------------------------------------


@dataclass
class _Conflict:
    """A conflict on its way to the directory that will hold its copies. `versions`: by side, then
    by member; `kept` is what stays at the path, by member."""

    reason: str
    scope: Scope
    versions: dict[str, dict[bytes, Entry]]
    kept: dict[bytes, Entry]
    rows: "tuple[RowConflict, ...]" = ()
    marked: Entry | None = None
    also: list[bytes] = field(default_factory=list)
    """Further names of the same hard-linked file, met later."""


@dataclass
class _Outcome:
    """What one name (or file unit) becomes: entries by member, and the conflict if there is one."""

    entries: dict[bytes, Entry] = field(default_factory=dict)
    conflict: _Conflict | None = None


_Sides = dict[str, dict[bytes, Entry]]
"""Entries of a name and its companions, by side and ending."""
_Step = Generator[Any, Any, Any]
"""A generator that yields generators whose results it is sent: recursion without the stack."""


def _run(first: _Step) -> Any:
    stack, value = [first], None
    while stack:
        try:
            stack.append(stack[-1].send(value))
            value = None
        except StopIteration as end:
            stack.pop()
            value = end.value
    return value


def _single(entry: Entry | None) -> _Outcome:
    return _Outcome({} if entry is None else {b"": entry})


def _is_directory(entry: Entry | None) -> bool:
    return entry is not None and entry.kind is EntryKind.DIRECTORY


class _TreeMerge:
    def __init__(self, writer: PackWriter, bench: Bench, rules: MergeRules) -> None:
        self._writer = writer
        self._bench = bench
        self._rules = rules
        self._found: list[tuple[FoundConflict, _Conflict]] = []
        self._linked: dict[object, _Outcome] = {}
        self._has_links = False
        self._open = {above for path in rules.undecided for above in _with_all_above(path)}
        self._left_out: set[bytes] = set()
        self.lost: list[tuple[bytes, Side]] = []
        """Files that one side (named) deleted or moved and the other changed."""

    def run(self, base: Entry | None, ours: Entry, theirs: Entry) -> MergedTree:
        outcome: _Outcome = _run(self._both_directories(b"", base, ours, theirs))
        if outcome.conflict is not None:
            self._record(ROOT_PATH, outcome.conflict, ())
        root = outcome.entries[b""]
        if self._has_links:
            root = regrouped(self._writer, root)
        conflicts = [replace(found, also=tuple(c.also)) for found, c in self._found]
        conflicts.sort(key=lambda found: found.path)
        return MergedTree(root, tuple(conflicts), frozenset(self._left_out))

    # --- directories ---------------------------------------------------------------------------

    def _both_directories(
        self, path: bytes, base: Entry | None, ours: Entry, theirs: Entry
    ) -> _Step:
        """Both sides have a directory at `path`; `base` is one, too, or None."""
        merged, clashes = merge_metadata(base, ours, theirs, ours, self._rules.favour)
        before = base.tree if base is not None else None
        tree: ObjectId | None
        is_open = path in self._open
        if ours.tree == theirs.tree or (theirs.tree == before and not is_open):
            self._note_links(base, ours)
            tree = ours.tree
        elif ours.tree == before and not is_open:
            self._note_links(base, theirs)
            tree = theirs.tree
        elif self._is_unit(path, base, ours, theirs):
            self._note_links(base, ours)
            self._note_links(base, theirs)
            chosen = self._unchanged_side(base, ours, theirs)
            if chosen is None:
                return self._undecided(
                    path, "database changed on both sides", base, ours, theirs, merged
                )
            tree = chosen.tree
        else:
            tree = yield self._names(path, base, ours, theirs)
        merged = replace(merged, tree=tree)
        if clashes:
            reason = f"{', '.join(clashes)} changed on both sides"
            return self._undecided(path, reason, base, ours, theirs, merged, scope="metadata")
        return _single(merged)

    def _unchanged_side(self, base: Entry | None, ours: Entry, theirs: Entry) -> Entry | None:
        """The version to take where at most one side changed more than times."""
        if is_unchanged(self._writer, base, theirs) or is_unchanged(self._writer, ours, theirs):
            return ours
        return theirs if is_unchanged(self._writer, base, ours) else None

    def _half_deleted(self, path: bytes, base: Entry, left: Entry, deleted_by: Side) -> _Step:
        """One side deleted the directory, in which the other changed something."""
        reason = _deletion(deleted_by)
        ours, theirs = (None, left) if deleted_by == "ours" else (left, None)
        if self._is_unit(path, base, left):
            return self._undecided(path, reason, base, ours, theirs, ours)
        tree = None
        if base.tree != left.tree:
            tree = yield self._names(path, base, ours, theirs)
        if tree is not None:
            return _single(replace(left, tree=tree))
        if same_metadata(base, left):
            return _single(None)
        return self._undecided(path, reason, base, ours, theirs, ours)

    def _is_unit(self, path: bytes, *versions: Entry | None) -> bool:
        return is_unit_directory(self._writer, path, versions, self._rules.unit_patterns)

    def _names(
        self, path: bytes, base: Entry | None, ours: Entry | None, theirs: Entry | None
    ) -> _Step:
        """The merged page tree of a directory that both sides changed."""
        names = _Names(self._writer, base, ours, theirs)
        merged = dict(names.all_ours)
        placed: list[tuple[bytes, _Outcome]] = []
        for stem, is_unit in names.touched():
            if is_unit:
                outcome = self._file_unit(path, stem, names)
            else:
                outcome = yield self._name(joined(path, stem), *names.versions(stem))
            for member in MEMBERS if is_unit else (b"",):
                merged.pop(stem + member, None)
            for member, entry in outcome.entries.items():
                merged[stem + member] = entry.renamed(stem + member)
            if outcome.conflict is not None:
                placed.append((stem, outcome))
        for stem, outcome in placed:
            assert outcome.conflict is not None
            self._place(path, stem, outcome.conflict, merged, names)
        if merged == names.all_ours:
            return ours.tree if ours is not None else None
        return write_entries(self._writer, ours, merged)

    # --- one name ------------------------------------------------------------------------------

    def _name(
        self, path: bytes, base: Entry | None, ours: Entry | None, theirs: Entry | None
    ) -> _Step:
        self._note_link(base, ours, theirs)
        is_open = path in self._open and ours != theirs
        if is_open and base is None and (ours is None or theirs is None):
            reason = _deletion("ours" if ours is None else "theirs")
            return self._undecided(path, reason, base, ours, theirs, ours)
        if is_open and all(map(_is_directory, (base, ours, theirs))):
            assert ours is not None and theirs is not None
            return (yield self._both_directories(path, base, ours, theirs))
        if ours == theirs or theirs == base:
            self._note_links(base, ours)
            return _single(ours)
        if ours == base:
            self._note_links(base, theirs)
            return _single(theirs)
        if ours is None or theirs is None:
            return (yield self._added_or_deleted(path, base, ours, theirs))
        if _is_directory(ours) and _is_directory(theirs):
            before = base if _is_directory(base) else None
            return (yield self._both_directories(path, before, ours, theirs))
        if ours.kind is theirs.kind:
            return self._same_kind(path, base, ours, theirs)
        if is_unchanged(self._writer, base, theirs):
            return _single(ours)
        if is_unchanged(self._writer, base, ours):
            return _single(theirs)
        reason = f"{_kind(ours)} in ours, {_kind(theirs)} in theirs"
        return self._undecided(path, reason, base, ours, theirs, ours)

    def _added_or_deleted(
        self, path: bytes, base: Entry | None, ours: Entry | None, theirs: Entry | None
    ) -> _Step:
        left = ours if ours is not None else theirs
        deleted_by: Side = "theirs" if ours is not None else "ours"
        assert left is not None
        if base is None:
            self._note_links(None, left)
            return _single(left)
        if is_unchanged(self._writer, base, left):
            return _single(None)
        if _is_directory(base) and _is_directory(left):
            return (yield self._half_deleted(path, base, left, deleted_by))
        if left.kind is EntryKind.FILE and base.kind is EntryKind.FILE:
            self.lost.append((path, deleted_by))
        return self._undecided(path, _deletion(deleted_by), base, ours, theirs, ours)

    def _same_kind(self, path: bytes, base: Entry | None, ours: Entry, theirs: Entry) -> _Outcome:
        """Two files, links, devices or pipes."""
        before = base if base is not None and base.kind is ours.kind else None
        if ours.same_data(theirs) or (before is not None and before.same_data(theirs)):
            data = ours
        elif before is not None and before.same_data(ours):
            data = theirs
        else:
            return self._clashing_content(path, base, before, ours, theirs)
        merged, clashes = merge_metadata(before, ours, theirs, data, self._rules.favour)
        if not clashes:
            return _single(merged)
        reason = f"{', '.join(clashes)} changed on both sides"
        return self._undecided(path, reason, base, ours, theirs, merged, scope="metadata")

    def _clashing_content(
        self, path: bytes, base: Entry | None, before: Entry | None, ours: Entry, theirs: Entry
    ) -> _Outcome:
        """Both sides changed the content. Names of one hard-linked file are decided once."""
        if not ours.hardlink and not theirs.hardlink:
            return self._content(path, base, before, ours, theirs)
        key = tuple(
            (e.kind, e.content, e.size, e.mode, e.uid, e.gid, e.xattrs, e.mtime_ns, e.hardlink)
            if e is not None
            else None
            for e in (base, ours, theirs)
        )
        known = self._linked.get(key)
        if known is None:
            self._linked[key] = known = self._content(path, base, before, ours, theirs)
            return known
        if known.conflict is not None:
            known.conflict.also.append(path)
        return _Outcome(known.entries)

    def _content(
        self, path: bytes, base: Entry | None, before: Entry | None, ours: Entry, theirs: Entry
    ) -> _Outcome:
        result = None
        if before is not None and ours.kind is EntryKind.FILE:
            files = FileMerge(
                path,
                FileVersion(before),
                FileVersion(ours),
                FileVersion(theirs),
                self._rules.favour,
            )
            result = merge_file(self._rules.drivers, files, self._bench)
        return self._driven(path, result, base, before, ours, theirs)

    def _driven(
        self,
        path: bytes,
        result: DriverResult | None,
        base: Entry | None,
        before: Entry | None,
        ours: Entry,
        theirs: Entry,
    ) -> _Outcome:
        if result is None:
            was_there = base is not None or path in self._open
            reason = "changed on both sides" if was_there else "added on both sides"
            result = DriverResult(None, reason)
        data = result.merged
        if data is None:
            data = theirs if self._rules.favour == "theirs" else ours
        merged, clashes = merge_metadata(before, ours, theirs, data, self._rules.favour)
        if result.reason and self._rules.favour is not None:
            return _single(merged)
        if result.reason:
            outcome = self._undecided(path, result.reason, base, ours, theirs, merged)
            if outcome.conflict is not None:
                outcome.conflict.marked = result.marked
                if result.rows:
                    outcome.conflict.scope, outcome.conflict.rows = "rows", result.rows
            return outcome
        if clashes:
            reason = f"{', '.join(clashes)} changed on both sides"
            return self._undecided(path, reason, base, ours, theirs, merged, scope="metadata")
        return _single(merged)

    # --- file units ----------------------------------------------------------------------------

    def _file_unit(self, path: bytes, stem: bytes, names: "_Names") -> _Outcome:
        """A database file with its companions: one side's files all, or a driver's one file."""
        sides = {side: names.members(side, stem) for side in SIDES}
        base, ours, theirs = sides["base"], sides["ours"], sides["theirs"]
        for member in MEMBERS:
            self._note_link(*(sides[side].get(member) for side in SIDES))
        at = joined(path, stem)
        is_deleted = at in self._open and not base and (not ours or not theirs)
        if _same_files(ours, theirs) or (_same_files(base, theirs) and not is_deleted):
            return self._unit_of(at, ours, sides)
        if _same_files(base, ours) and not is_deleted:
            return self._unit_of(at, theirs, sides)
        result = None
        if all(b"" in v and v[b""].kind is EntryKind.FILE for v in (base, ours, theirs)):
            files = FileMerge(
                at,
                _file_version(base),
                _file_version(ours),
                _file_version(theirs),
                self._rules.favour,
            )
            result = merge_file(self._rules.drivers, files, self._bench)
        if result is not None and result.merged is not None:
            merged, clashes = merge_metadata(
                base[b""], ours[b""], theirs[b""], result.merged, self._rules.favour
            )
            if result.reason:
                return self._undecided_unit(at, result.reason, sides, {b"": merged}, result)
            if clashes:
                reason = f"{', '.join(clashes)} changed on both sides"
                return self._undecided_unit(
                    at, reason, sides, {b"": merged}, None, scope="metadata"
                )
            return _single(merged)
        if not ours or not theirs:
            reason = _deletion("theirs" if ours else "ours")
        else:
            reason = (result.reason if result else "") or "database changed on both sides"
        return self._undecided_unit(at, reason, sides, ours, result)

    def _unit_of(self, at: bytes, chosen: dict[bytes, Entry], sides: _Sides) -> _Outcome:
        """All files of one side, with metadata merged file by file."""
        entries = {}
        clashing: list[str] = []
        for member, data in chosen.items():
            base, ours, theirs = (sides[side].get(member) for side in ("base", "ours", "theirs"))
            if ours is None or theirs is None or ours.kind is not theirs.kind:
                entries[member] = data
                continue
            before = base if base is not None and base.kind is ours.kind else None
            entries[member], clashes = merge_metadata(
                before, ours, theirs, data, self._rules.favour
            )
            clashing += clashes
        if clashing:
            reason = f"{', '.join(dict.fromkeys(clashing))} changed on both sides"
            return self._undecided_unit(at, reason, sides, entries, None, scope="metadata")
        return _Outcome(entries)

    def _undecided_unit(
        self,
        path: bytes,
        reason: str,
        sides: _Sides,
        kept: dict[bytes, Entry],
        result: DriverResult | None,
        *,
        scope: Scope = "whole",
    ) -> _Outcome:
        policy = self._rules.policy
        if policy == "absent":
            self._leave_out(path, scope)
            return _Outcome(kept if scope == "metadata" else {})
        if policy != "beside":
            return _Outcome(dict(sides[policy]))
        rows = result.rows if result is not None else ()
        marked = result.marked if result is not None else None
        return _Outcome(
            kept, _Conflict(reason, "rows" if rows else scope, sides, kept, rows, marked)
        )

    # --- conflicts -----------------------------------------------------------------------------

    def _leave_out(self, path: bytes, scope: Scope) -> None:
        if scope != "metadata":
            self._left_out.add(path)

    def _undecided(
        self,
        path: bytes,
        reason: str,
        base: Entry | None,
        ours: Entry | None,
        theirs: Entry | None,
        kept: Entry | None,
        *,
        scope: Scope = "whole",
    ) -> _Outcome:
        """A conflict, as the policy has it; `kept` stays at the path."""
        policy = self._rules.policy
        if policy == "absent":
            self._leave_out(path, scope)
            if not path:
                return _single(kept if scope == "metadata" else replace(ROOT_ENTRY, tree=None))
            return _single(kept if scope == "metadata" else None)
        if policy != "beside":
            return _single(ours if policy == "ours" else theirs)
        versions = {
            side: {b"": entry}
            for side, entry in zip(SIDES, (ours, theirs, base), strict=True)
            if entry is not None
        }
        if scope == "metadata":
            versions = {
                side: {b"": replace(v[b""], tree=None) if _is_directory(v[b""]) else v[b""]}
                for side, v in versions.items()
            }
        outcome = _single(kept)
        outcome.conflict = _Conflict(reason, scope, versions, outcome.entries)
        return outcome

    def _place(
        self,
        path: bytes,
        stem: bytes,
        conflict: _Conflict,
        merged: dict[bytes, Entry],
        names: "_Names",
    ) -> None:
        """Lay the versions beside the conflicting name and record the conflict."""
        at = joined(path, stem)
        labels = dict(conflict.versions)
        if conflict.marked is not None:
            labels[MERGED_COPY] = {b"": conflict.marked}
        chosen = {
            side: _free_name(stem, side, members, merged, names) for side, members in labels.items()
        }
        is_subdot = not path and any(
            _is_directory(entry) for members in labels.values() for entry in members.values()
        )
        copies: list[Copy] = []
        # None where a name would be too long, or beside a subdot: its sibling would be another
        # subdot, which a tree that is one subdot has no place for.
        for side, name in chosen.items() if None not in chosen.values() and not is_subdot else ():
            assert name is not None
            for member, entry in labels[side].items():
                copy = Copy(side, member, joined(path, name + member))
                merged[name + member] = self._copied(entry, at + member, copy.path)
                copies.append(copy)
        self._record(at, conflict, tuple(copies))

    def _copied(self, entry: Entry, old: bytes, new: bytes) -> Entry:
        if entry.kind is EntryKind.DIRECTORY:
            return moved_directory(self._writer, entry, old, new)
        return replace(entry, name=new.rpartition(b"/")[2], hardlink=b"")

    def _record(self, at: bytes, conflict: _Conflict, copies: tuple[Copy, ...]) -> None:
        members = {member for version in conflict.versions.values() for member in version}
        found = FoundConflict(
            path=at,
            reason=conflict.reason,
            scope=conflict.scope,
            sides=tuple(side for side in SIDES if conflict.versions.get(side)),
            copies=copies,
            members=tuple(member for member in MEMBERS if member in members),
            rows=conflict.rows,
        )
        self._found.append((found, conflict))

    # --- links ---------------------------------------------------------------------------------

    def _note_link(self, *entries: Entry | None) -> None:
        if any(entry is not None and entry.hardlink for entry in entries):
            self._has_links = True

    def _note_links(self, before: Entry | None, after: Entry | None) -> None:
        """Look for hard links in what is taken from one side whole."""
        if not self._has_links:
            with suppress(ContentAbsent):  # a subdot that is not kept here stays as it is
                self._has_links = any_links(self._writer, before, after)


class _Names:
    """The names of one directory that differ between its versions, and all names of ours."""

    def __init__(
        self, writer: PackWriter, base: Entry | None, ours: Entry | None, theirs: Entry | None
    ) -> None:
        trees = [None if entry is None else entry.tree for entry in (base, ours, theirs)]
        self._touched: dict[bytes, tuple[Entry | None, Entry | None, Entry | None]] = {}
        was_ours, now_ours = _differing(writer, trees[0], trees[1])
        was_theirs, now_theirs = _differing(writer, trees[0], trees[2])
        by_ours = {n for n in was_ours.keys() | now_ours if was_ours.get(n) != now_ours.get(n)}
        by_theirs = {
            n for n in was_theirs.keys() | now_theirs if was_theirs.get(n) != now_theirs.get(n)
        }
        for name in by_ours | by_theirs:
            before = (was_ours if name in by_ours else was_theirs).get(name)
            self._touched[name] = (
                before,
                now_ours.get(name) if name in by_ours else before,
                now_theirs.get(name) if name in by_theirs else before,
            )
        self.all_ours = {entry.name: entry for entry in directory_entries(writer, trees[1])}

    def versions(self, name: bytes) -> tuple[Entry | None, Entry | None, Entry | None]:
        """Base, ours and theirs of a name."""
        found = self._touched.get(name)
        if found is not None:
            return found
        same = self.all_ours.get(name)
        return same, same, same

    def touched(self) -> list[tuple[bytes, bool]]:
        """What is to be decided, by name: (name, False), or (stem, True) of a file unit."""
        found = set()
        for name in self._touched:
            stem = stem_of(name)
            if stem != name and self._is_unit(stem):
                found.add((stem, True))
            else:
                found.add((name, self._is_unit(name)))
        return sorted(found)

    def _is_unit(self, stem: bytes) -> bool:
        return is_file_unit([self._file_names(side, stem) for side in SIDES])

    def _file_names(self, side: str, stem: bytes) -> set[bytes]:
        files = self.members(side, stem).items()
        return {member for member, entry in files if entry.kind is EntryKind.FILE}

    def members(self, side: str, stem: bytes) -> dict[bytes, Entry]:
        """The files of a unit on one side, by their endings."""
        number = ("base", "ours", "theirs").index(side)
        found = {member: self.versions(stem + member)[number] for member in MEMBERS}
        return {member: entry for member, entry in found.items() if entry is not None}

    def is_taken(self, name: bytes) -> bool:
        return any(entry is not None for entry in self.versions(name))


def _differing(
    writer: PackWriter, old: ObjectId | None, new: ObjectId | None
) -> tuple[dict[bytes, Entry], dict[bytes, Entry]]:
    was, now, _ = differing_items(writer, old, new, DIRECTORY)
    return {entry.name: entry for entry in was}, {entry.name: entry for entry in now}


def _free_name(
    stem: bytes,
    side: str,
    members: Mapping[bytes, Entry],
    merged: Mapping[bytes, Entry],
    names: _Names,
) -> bytes | None:
    """`STEM~side`, or with a number when that is taken; None when it would be too long."""
    name, number = stem + b"~" + side.encode(), 1
    while any(name + m in merged or names.is_taken(name + m) for m in members):
        number += 1
        name = stem + b"~%s~%d" % (side.encode(), number)
    return name if all(len(name + m) <= NAME_BYTES_MAX for m in members) else None


def _with_all_above(path: bytes) -> Iterator[bytes]:
    """The path, and every directory that it lies in, b"" last."""
    while path:
        yield path
        path = path.rpartition(b"/")[0]
    yield b""


def _deletion(deleted_by: Side) -> str:
    changed_by = "theirs" if deleted_by == "ours" else "ours"
    return f"deleted by {deleted_by}, changed by {changed_by}"


def _kind(entry: Entry) -> str:
    return entry.kind.name.lower().replace("_", " ")


def _same_files(one: Mapping[bytes, Entry], other: Mapping[bytes, Entry]) -> bool:
    return one.keys() == other.keys() and all(
        one[member].same_data(other[member])
        and (one[member].kind is not EntryKind.DIRECTORY or one[member].tree == other[member].tree)
        for member in one
    )


def _file_version(members: Mapping[bytes, Entry]) -> FileVersion:
    return FileVersion(members[b""], {m: members[m] for m in COMPANIONS if m in members})


# --- renames -----------------------------------------------------------------------------------


def _following_renames(
    writer: PackWriter,
    rules: MergeRules,
    lost: Sequence[tuple[bytes, Side]],
    base: Entry,
    ours: Entry,
    theirs: Entry,
) -> tuple[Entry, Entry, Entry] | None:
    """The three trees with files that one side moved moved in the other and in the base, too.

    Only files that would conflict otherwise, that went to a free place with their content
    unchanged, and that have nothing to do with a unit; and only where no other file of that content
    came or went, for a guess might write a change into the wrong one. None when there is nothing
    to follow.
    """
    edits: dict[str, dict[bytes, Entry | None]] = {side: {} for side in ("ours", "theirs")}
    before: dict[bytes, Entry | None] = {}
    roots = {"ours": ours, "theirs": theirs, "base": base}
    for mover, other in (("ours", "theirs"), ("theirs", "ours")):
        paths = {path for path, deleted_by in lost if deleted_by == mover}
        for old, new, was in _sole_moves(writer, roots["base"], roots[mover]) if paths else ():
            if old not in paths or not _may_follow(writer, rules, roots, other, old, new):
                continue
            edits[other][old] = None
            edits[other][new] = find_path(writer, roots[other], old)
            before[old] = None
            before[new] = was
        moved = {path: before[path] for path in edits[other]}
        base = edited(writer, base, moved, parents=roots[mover])
        roots[other] = edited(writer, roots[other], edits[other], parents=roots[mover])
    return (base, roots["ours"], roots["theirs"]) if before else None


def _sole_moves(
    writer: PackWriter, base: Entry, moved: Entry
) -> list[tuple[bytes, bytes, Entry | None]]:
    """Files that certainly were moved: old path, new path, entry before; the one removed and the
    one added file of their content."""
    changes = tree_differences(writer, base, moved, renames=False)
    removed = Counter(_identity(change.old) for change in changes if change.kind == "-")
    added = Counter(_identity(change.new) for change in changes if change.kind == "+")
    return [
        (change.old_path, change.path, change.old)
        for change in with_renames(changes)
        if change.old_path is not None
        and removed[_identity(change.old)] == added[_identity(change.old)] == 1
    ]


def _identity(entry: Entry | None) -> tuple[int, bytes] | None:
    """What tells whether two files hold the same; None for what is no file."""
    if entry is None or entry.kind is not EntryKind.FILE:
        return None
    return entry.size, entry.content


def _may_follow(
    writer: PackWriter,
    rules: MergeRules,
    roots: Mapping[str, Entry],
    other: str,
    old: bytes,
    new: bytes,
) -> bool:
    parts = new.split(b"/")
    above = [b"/".join(parts[:depth]) for depth in range(1, len(parts))]
    for side in (other, "base"):
        if find_path(writer, roots[side], new) is not None or old in above:
            return False
        for path in above:
            found = find_path(writer, roots[side], path)
            if found is not None and found.kind is not EntryKind.DIRECTORY:
                return False
    for path in (old, new):
        if stem_of(path) != path or any(
            find_path(writer, root, path + ending) is not None
            for root in roots.values()
            for ending in COMPANIONS
        ):
            return False
        if covering_unit(writer, list(roots.values()), path, rules.unit_patterns) is not None:
            return False
    return True
