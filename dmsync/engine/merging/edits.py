"""Writing merged trees: directories, copies of directories, hard link groups put right."""

from collections.abc import Mapping
from dataclasses import replace

from dmsync.core.ids import ObjectId
from dmsync.core.objects import Entry, Layout
from dmsync.core.pages import DIRECTORY, PageBases, walk_tree, write_directory
from dmsync.engine.recorded_tree import RecordedTree
from dmsync.engine.tree_edits import replace_paths
from dmsync.storage.pack_writer import PackWriter


def edited(
    writer: PackWriter,
    root: Entry,
    edits: Mapping[bytes, Entry | None],
    parents: Entry | None = None,
) -> Entry:
    """The tree of `root` with the entry at each path replaced, added, or (None) removed, under the
    path's last name. Directories missing on the way are made as `parents` has them."""
    tree = RecordedTree(writer, root)
    wanted = {
        path: None if entry is None else entry.renamed(path.rpartition(b"/")[2])
        for path, entry in edits.items()
        if entry is not None or tree.entry(path) is not None
    }
    if not wanted:
        return root
    return replace_paths(writer, tree, wanted, RecordedTree(writer, parents or root))


def write_entries(
    writer: PackWriter, before: Entry | None, entries: Mapping[bytes, Entry]
) -> ObjectId | None:
    """Write a directory's entries (by name) as pages that replace those of `before`."""
    tree = before.tree if before is not None else None
    bases = PageBases(writer, tree, DIRECTORY) if tree is not None else None
    return write_directory(writer, (entries[name] for name in sorted(entries)), bases)


def moved_directory(writer: PackWriter, directory: Entry, old: bytes, new: bytes) -> Entry:
    """A copy of the directory at path `old` as it is at `new`: names that were linked with each
    other inside are so in the copy, links to the outside are cut."""
    prefix = old + b"/"
    moved: dict[bytes, Entry] = {}
    for below, entry in walk_tree(writer, directory):
        if entry.hardlink:
            link = entry.hardlink
            inside = new + link[len(old) :] if link.startswith(prefix) else b""
            moved[below] = replace(entry, hardlink=inside)
    return edited(writer, directory, moved).renamed(new.rpartition(b"/")[2])


def regrouped(writer: PackWriter, root: Entry) -> Entry:
    """The tree with hard link groups made consistent, whatever was merged into it.

    Names stay in one group when they belonged to one and have the same content and metadata; the
    group is then named by its bytewise-first path. Others stand alone. Reads the whole tree.
    """
    groups: dict[tuple[Entry, bytes], list[tuple[bytes, Entry]]] = {}
    for path, entry in walk_tree(writer, root):
        if entry.hardlink:
            identity = replace(entry, name=b"", layout=Layout.EMPTY, tree=None, sparse=False)
            groups.setdefault((identity, entry.hardlink), []).append((path, entry))
    edits: dict[bytes, Entry | None] = {}
    for members in groups.values():
        first = min(path for path, _ in members) if len(members) > 1 else b""
        for path, entry in members:
            data = members[0][1]
            new = replace(
                entry, hardlink=first, layout=data.layout, tree=data.tree, sparse=data.sparse
            )
            if new != entry:
                edits[path] = new
    return edited(writer, root, edits)
