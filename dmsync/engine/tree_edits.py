"""A recorded tree with some paths replaced: a new root, at the cost of the directories touched."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from dmsync.core.objects import Entry, EntryKind
from dmsync.core.pages import DIRECTORY, PageBases, walk_tree, write_directory
from dmsync.engine.differences import Change
from dmsync.engine.recorded_tree import RecordedTree
from dmsync.storage.pack_writer import PackWriter

_UNTIED = b"\0"
"""Begins the key of a hardlink group that exists in the other tree only: no path holds NUL."""


def replace_paths(
    writer: PackWriter,
    tree: RecordedTree,
    wanted: Mapping[bytes, Entry | None],
    parents: RecordedTree,
) -> Entry:
    """The root of `tree` with the entry of each path of `wanted` in place of its own, or without
    it where that is None; no path lies below another.

    Directories that `tree` lacks on the way, or has something else for, are made with the
    metadata that `parents` has for them. Reads and writes only the directories above the paths.
    """
    edits: dict[bytes, dict[bytes, Entry | None]] = {}
    for path, entry in wanted.items():
        above, _, name = path.rpartition(b"/")
        edits.setdefault(above, {})[name] = entry
    for directory in _deepest_first(edits):
        made = _edited(writer, tree, directory, edits[directory], parents)
        if not directory:
            return made
        above, _, name = directory.rpartition(b"/")
        edits.setdefault(above, {})[name] = made
    return tree.root


def _deepest_first(directories: Iterable[bytes]) -> list[bytes]:
    """The directories and all above them, what lies below before what lies above."""
    found = set()
    for directory in directories:
        while directory not in found:
            found.add(directory)
            directory = directory.rpartition(b"/")[0]
    return sorted(found, key=lambda path: (-path.count(b"/") if path else 1, path))


def _edited(
    writer: PackWriter,
    tree: RecordedTree,
    directory: bytes,
    edits: Mapping[bytes, Entry | None],
    parents: RecordedTree,
) -> Entry:
    before = tree.entry(directory)
    if before is None or before.kind is not EntryKind.DIRECTORY:
        before, entries = parents.entry(directory), {}
        assert before is not None, "a path's parents are where the path is from"
    else:
        entries = tree.entries(directory)
    for name, entry in edits.items():
        if entry is None:
            entries.pop(name, None)
        else:
            entries[name] = entry
    bases = PageBases(writer, tree.directory(directory), DIRECTORY)
    page = write_directory(writer, [entries[name] for name in sorted(entries)], bases)
    return replace(before, tree=page)


# --- hardlinks -----------------------------------------------------------------------------------


def relink(
    writer: PackWriter,
    root: Entry,
    *,
    live: RecordedTree,
    source: RecordedTree,
    changes: Iterable[Change],
    wanted: Iterable[bytes],
) -> Entry:
    """`root`, which is `live` with the paths `wanted` from `source`, with its hardlink groups put
    right: names that were not wanted keep their content and the names they share it with.

    A replaced name leaves the group it was in. It is linked to the names that came with it from
    its group in `source`, and to one that was there already and is as `source` has it. Walks the
    whole trees, but only when `changes` (from `live` to `root`) touch a group at all.
    """
    groups = {
        entry.hardlink
        for change in changes
        for entry in (change.old, change.new)
        if entry is not None and entry.hardlink
    }
    if not groups:
        return root
    chosen = frozenset(wanted)
    ties = _ties(writer, live, source, groups, chosen)
    touched = groups | set(ties.values())
    members: dict[bytes, list[tuple[bytes, Entry]]] = {}
    for path, entry in walk_tree(writer, root):
        if entry.kind is EntryKind.DIRECTORY or (entry.hardlink or path) not in touched:
            continue
        if not _is_below(path, chosen):
            key = entry.hardlink or path
        elif entry.hardlink in groups:
            key = ties.get(entry.hardlink, _UNTIED + entry.hardlink)
        else:
            key = b""
        if key:
            members.setdefault(key, []).append((path, entry))
    edits: dict[bytes, Entry | None] = {}
    for group in members.values():
        first = min(path for path, _ in group) if len(group) > 1 else b""
        for path, entry in group:
            if entry.hardlink != first:
                edits[path] = replace(entry, hardlink=first)
    tree = RecordedTree(writer, root)
    return replace_paths(writer, tree, edits, tree)


def _ties(
    writer: PackWriter,
    live: RecordedTree,
    source: RecordedTree,
    groups: set[bytes],
    chosen: frozenset[bytes],
) -> dict[bytes, bytes]:
    """For groups of `source` the group (or single name) of `live` that holds the same inode still:
    a name of it that is here as it is there."""
    ties: dict[bytes, bytes] = {}
    for path, entry in walk_tree(writer, source.root):
        if entry.hardlink not in groups or entry.hardlink in ties:
            continue
        here = live.entry(path)
        if here is None or not here.same_data(entry):
            continue
        if _is_below(path, chosen):
            is_kept = here == entry
        else:
            is_kept = replace(here, hardlink=b"").same_metadata(replace(entry, hardlink=b""))
        if is_kept:
            ties[entry.hardlink] = here.hardlink or path
    return ties


def _is_below(path: bytes, chosen: frozenset[bytes]) -> bool:
    while path:
        if path in chosen:
            return True
        path = path.rpartition(b"/")[0]
    return False
