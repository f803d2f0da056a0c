"""What differs between two trees, by path: added, removed, changed, renamed, copied."""

from collections.abc import Iterable, Iterator

from dmsync.core.objects import Entry, EntryKind
from dmsync.core.pages import DIRECTORY, PageReader, differing_items, walk_tree
from dmsync.core.values import value_type
from dmsync.errors import ContentAbsent


@value_type
class Change:
    """One path that differs. `kind` is `+`, `-`, `*`, `R` (renamed from `old_path`) or `C` (copied
    from `old_path`; only `with_copies` makes those).

    `metadata_only`: kind and content are equal; mode, owner, time, attributes or links are not.
    """

    path: bytes
    kind: str
    old: Entry | None
    new: Entry | None
    old_path: bytes | None = None
    metadata_only: bool = False


def compared(path: bytes, old: Entry | None, new: Entry | None) -> Change | None:
    """The change at one path, or None. A directory's time alone is no change: it only follows
    what happened inside."""
    if old is None or new is None:
        if old is None and new is None:
            return None
        return Change(path, "-" if new is None else "+", old, new)
    if not old.same_data(new):
        return Change(path, "*", old, new)
    if old.kind is EntryKind.DIRECTORY:
        if (old.mode, old.uid, old.gid, old.xattrs) == (new.mode, new.uid, new.gid, new.xattrs):
            return None
    elif old.same_metadata(new):
        return None
    return Change(path, "*", old, new, metadata_only=True)


def whole_tree(reader: PageReader, path: bytes, entry: Entry, kind: str) -> Iterator[Change]:
    """Everything below the directory `entry` at `path` as added or removed."""
    for below, found in walk_tree(reader, entry):
        old, new = (None, found) if kind == "+" else (found, None)
        yield Change(joined(path, below), kind, old, new)


def joined(above: bytes, name: bytes) -> bytes:
    return above + b"/" + name if above else name


def tree_differences(
    reader: PageReader, old: Entry, new: Entry, *, renames: bool = True
) -> list[Change]:
    """Changes from the directory `old` to `new`, sorted by path; the roots' own metadata too.

    Reads only pages that differ. A subdot whose content is not kept here is looked at as one thing:
    what differs below it is not known. Raises ObjectMissing, BadObject.
    """
    changes: list[Change] = []
    at_root = compared(b"", old, new)
    if at_root is not None:
        changes.append(at_root)
    pending = [(b"", old, new)]
    while pending:
        path, before, after = pending.pop()
        if before.tree == after.tree:
            continue
        for below, was, now in _differing_names(reader, path, before, after):
            change = compared(below, was, now)
            if change is not None:
                changes.append(change)
            was_directory = was if was and was.kind is EntryKind.DIRECTORY else None
            now_directory = now if now and now.kind is EntryKind.DIRECTORY else None
            if not path and _is_absent(reader, was_directory, now_directory):
                continue
            if was_directory and now_directory:
                pending.append((below, was_directory, now_directory))
            elif was_directory:
                changes.extend(whole_tree(reader, below, was_directory, "-"))
            elif now_directory:
                changes.extend(whole_tree(reader, below, now_directory, "+"))
    return with_renames(changes) if renames else in_order(changes)


def _is_absent(reader: PageReader, *subdots: Entry | None) -> bool:
    """Is one of these a subdot whose content is not kept here?"""
    try:
        for entry in subdots:
            if entry is not None and entry.tree is not None:
                reader.read_page(entry.tree)
    except ContentAbsent:
        return True
    return False


def _differing_names(
    reader: PageReader, path: bytes, before: Entry, after: Entry
) -> Iterator[tuple[bytes, Entry | None, Entry | None]]:
    old_items, new_items, _ = differing_items(reader, before.tree, after.tree, DIRECTORY)
    was = {entry.name: entry for entry in old_items}
    now = {entry.name: entry for entry in new_items}
    for name in was.keys() | now.keys():
        if was.get(name) != now.get(name):
            yield joined(path, name), was.get(name), now.get(name)


def in_order(changes: Iterable[Change]) -> list[Change]:
    """Sorted by path, a removal before an addition of the same path."""
    return sorted(changes, key=lambda change: (change.path, change.kind != "-"))


def with_renames(changes: list[Change]) -> list[Change]:
    """The same changes, sorted, removed and added files of equal content joined as renames.

    Among several candidates the one with the same last name wins, then the first by path. Empty
    files and those of zeros only are too common to tell anything.
    """
    removed: dict[tuple[int, bytes], list[Change]] = {}
    for change in in_order(changes):
        if change.kind == "-" and change.old is not None and is_distinctive(change.old):
            removed.setdefault((change.old.size, change.old.content), []).append(change)
    if not removed:
        return in_order(changes)
    added = [
        change
        for change in in_order(changes)
        if change.kind == "+" and change.new is not None and is_distinctive(change.new)
    ]
    joined_to: dict[int, Change] = {}
    used: set[bytes] = set()
    for same_name in (True, False):
        for change in added:
            assert change.new is not None
            candidates = removed.get((change.new.size, change.new.content), [])
            source = _source(candidates, change.path, same_name=same_name)
            if source is None or id(change) in joined_to:
                continue
            candidates.remove(source)
            used.add(source.path)
            joined_to[id(change)] = Change(
                change.path, "R", source.old, change.new, source.path, metadata_only=True
            )
    kept = [c for c in changes if not (c.kind == "-" and c.path in used)]
    return in_order(joined_to.get(id(change), change) for change in kept)


def with_copies(
    changes: list[Change], unchanged: Iterable[tuple[bytes, Entry]] = ()
) -> list[Change]:
    """The same changes, sorted, with added files that equal an old file joined to it as copies.

    Old files are those of the changes (what a changed file held before, where a renamed one was)
    and `unchanged`: paths and entries of other files of the old tree, in order of path. Among
    several the one with the same last name wins, then the first by path. A further name of a
    file, a hard link, is no copy of it.
    """
    wanted = {
        (change.new.size, change.new.content)
        for change in changes
        if change.kind == "+" and change.new is not None and is_distinctive(change.new)
    }
    if not wanted:
        return in_order(changes)
    sources: dict[tuple[int, bytes], list[Change]] = {}
    for source in _copy_sources(changes, unchanged):
        assert source.old is not None
        identity = (source.old.size, source.old.content)
        if identity in wanted:
            sources.setdefault(identity, []).append(source)
    return in_order(_copied(change, sources) for change in changes)


def _copy_sources(
    changes: list[Change], unchanged: Iterable[tuple[bytes, Entry]]
) -> Iterator[Change]:
    """Old files as changes from what they were (`old`, at `path`) to what they are now (`new`)."""
    for change in in_order(changes):
        if change.old is not None and is_distinctive(change.old):
            path = change.path if change.old_path is None else change.old_path
            yield Change(path, change.kind, change.old, change.new)
    for path, entry in unchanged:
        if is_distinctive(entry):
            yield Change(path, "*", entry, entry)


def _copied(change: Change, sources: dict[tuple[int, bytes], list[Change]]) -> Change:
    new = change.new
    if change.kind != "+" or new is None or not is_distinctive(new):
        return change
    if new.hardlink not in (b"", change.path):
        return change  # the group's first name is the copy, if any is
    candidates = [
        source
        for source in sources.get((new.size, new.content), [])
        if not new.hardlink or source.new is None or source.new.hardlink != new.hardlink
    ]
    source = _source(candidates, change.path, same_name=True) or _source(
        candidates, change.path, same_name=False
    )
    if source is None:
        return change
    return Change(change.path, "C", source.old, new, source.path, metadata_only=True)


def is_distinctive(entry: Entry) -> bool:
    """Whether a file's content says which file it is."""
    return entry.kind is EntryKind.FILE and entry.content != b""


def _source(candidates: list[Change], path: bytes, *, same_name: bool) -> Change | None:
    if not same_name:
        return candidates[0] if candidates else None
    name = path.rpartition(b"/")[2]
    named = (c for c in candidates if c.path.rpartition(b"/")[2] == name)
    return next(named, None)
