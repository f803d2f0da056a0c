"""Looks up directories and entries of a recorded tree by path, remembering the way there."""

from dmsync.core.ids import ObjectId
from dmsync.core.objects import Entry, EntryKind
from dmsync.core.pages import PageReader, directory_entries, find_entry


class RecordedTree:
    """The tree of one root entry. Directories looked up once are not looked up again."""

    def __init__(self, reader: PageReader, root: Entry) -> None:
        self._reader = reader
        self.root = root
        self._trees: dict[bytes, ObjectId | None] = {b"": root.tree}

    def directory(self, path: bytes) -> ObjectId | None:
        """Root page of the directory at `path`; None when empty, or no directory."""
        if path in self._trees:
            return self._trees[path]
        if self.root.tree is None:
            return None
        known = path
        while known not in self._trees:
            known = known.rpartition(b"/")[0]
        tree = self._trees[known]
        for name in path[len(known) :].lstrip(b"/").split(b"/"):
            entry = find_entry(self._reader, tree, name) if tree is not None else None
            is_directory = entry is not None and entry.kind is EntryKind.DIRECTORY
            tree = entry.tree if entry is not None and is_directory else None
            known = known + b"/" + name if known else name
            self._trees[known] = tree
        return tree

    def entries(self, path: bytes) -> dict[bytes, Entry]:
        """Entries of the directory at `path`, sorted by name; its directories are remembered."""
        entries = {entry.name: entry for entry in self._entries(path)}
        prefix = path + b"/" if path else b""
        for name, entry in entries.items():
            if entry.kind is EntryKind.DIRECTORY:
                self._trees[prefix + name] = entry.tree
        return entries

    def _entries(self, path: bytes) -> list[Entry]:
        return list(directory_entries(self._reader, self.directory(path)))

    def entry(self, path: bytes) -> Entry | None:
        """The entry at `path`, the root for b""."""
        if not path:
            return self.root
        above, _, name = path.rpartition(b"/")
        tree = self.directory(above)
        return find_entry(self._reader, tree, name) if tree is not None else None
