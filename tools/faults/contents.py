"""What trees hold, live ones and committed ones, in a form that a model of a try records.

Nothing of the product reads the live side, so that what a command stored is compared with what was
really there. Of a file the SHA-256 of its bytes is kept, computed here on both sides.
"""

import hashlib
import os
import stat
from typing import Any

from dmsync.core.ids import DotId, Kind, ObjectId
from dmsync.core.objects import Entry, EntryKind
from dmsync.core.pages import ZERO_RUN, file_spans
from dmsync.engine.recorded_tree import RecordedTree
from dmsync.engine.store import Store
from dmsync.storage.object_store import ObjectStore

Tree = dict[str, list[Any]]
"""Path (surrogateescape) to [kind, mode, SHA-256 or link target, mtime_ns or None, hard link]."""
BLOCK_BYTES = 1024 * 1024


def live_tree(path: str, prefix: str = "") -> Tree:
    """The tree in the directory `path`, whose own name in a commit is `prefix`."""
    tree: Tree = {}
    groups: dict[tuple[int, int], str] = {}
    if prefix:
        tree[prefix] = ["directory", stat.S_IMODE(os.lstat(path).st_mode), "", None, ""]
    _add_live(tree, groups, path, prefix)
    return tree


def _add_live(tree: Tree, groups: dict[tuple[int, int], str], path: str, prefix: str) -> None:
    for name in sorted(os.listdir(path), key=os.fsencode):
        below = os.path.join(path, name)
        key = f"{prefix}/{name}" if prefix else name
        found = os.lstat(below)
        mode = stat.S_IMODE(found.st_mode)
        if stat.S_ISDIR(found.st_mode):
            tree[key] = ["directory", mode, "", None, ""]
            _add_live(tree, groups, below, key)
        elif stat.S_ISLNK(found.st_mode):
            tree[key] = ["link", None, os.readlink(below), None, ""]
        else:
            group = ""
            if found.st_nlink > 1:
                group = groups.setdefault((found.st_dev, found.st_ino), key)
            tree[key] = ["file", mode, _sha256(below), found.st_mtime_ns, group]


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


class CommittedTrees:
    """Trees of commits as a store has them. A file that was read once is not read again."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._read: dict[tuple[DotId, bytes, int], str] = {}

    def tree(self, dot: DotId, commit: ObjectId) -> Tree:
        """Raises DmError: it is not all there, or not what it was."""
        objects = self._store.objects(dot)
        recorded = RecordedTree(objects, self._store.root(dot, commit))
        tree: Tree = {}
        self._add(tree, dot, objects, recorded, b"")
        return tree

    def _add(
        self, tree: Tree, dot: DotId, objects: ObjectStore, recorded: RecordedTree, above: bytes
    ) -> None:
        for name, entry in recorded.entries(above).items():
            path = above + b"/" + name if above else name
            key = os.fsdecode(path)
            if entry.kind is EntryKind.DIRECTORY:
                tree[key] = ["directory", entry.mode, "", None, ""]
                self._add(tree, dot, objects, recorded, path)
            elif entry.kind is EntryKind.SYMLINK:
                tree[key] = ["link", None, os.fsdecode(entry.link_target), None, ""]
            else:
                content = self._content(dot, objects, entry)
                group = os.fsdecode(entry.hardlink)
                tree[key] = ["file", entry.mode, content, entry.mtime_ns, group]

    def _content(self, dot: DotId, objects: ObjectStore, entry: Entry) -> str:
        known = (dot, entry.content, entry.size)
        if known not in self._read:
            digest = hashlib.sha256()
            for span in file_spans(objects, entry):
                is_zero = span.chunk == ZERO_RUN
                digest.update(
                    bytes(span.length) if is_zero else objects.read(Kind.CHUNK, span.chunk)
                )
            self._read[known] = digest.hexdigest()
        return self._read[known]


def difference(expected: Tree, found: Tree) -> str:
    """The first paths in which two trees differ, for a message; empty when they do not."""
    told = []
    for path in sorted({*expected, *found}):
        if expected.get(path) != found.get(path):
            told.append(f"{path!r}: {expected.get(path)} became {found.get(path)}")
    more = len(told) - 3
    return "; ".join(told[:3]) + (f" and {more} more" if more > 0 else "")
