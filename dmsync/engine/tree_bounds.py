"""Whether a recorded tree can be made at all, found before anything is: how many names it adds and
how deep they lie.

A directory page may stand at any number of places, so that a few kilobytes of objects can say
10^30 names. Each page is measured once, whatever the number of its places.
"""

import os
from typing import Final, NamedTuple

from dmsync.core.ids import ObjectId
from dmsync.core.objects import TREE_DEPTH_MAX, Entry, EntryKind
from dmsync.core.pages import DIRECTORY, PageReader, differing_items, directory_entries
from dmsync.errors import BadObject, ContentAbsent, StorageFull

TREE_NAMES_MAX: Final = 1 << 28
"""Names that a tree may gain at once: what lists them holds them in memory."""


class _Extent(NamedTuple):
    """What is below a directory: names, and levels of directories."""

    names: int
    levels: int


_EMPTY: Final = _Extent(0, 0)


def check_bounds(
    reader: PageReader, old: ObjectId | None, new: ObjectId | None, directory: str | bytes | int
) -> None:
    """Refuse what making the directory page `new` of `old` cannot end with; `directory` (a path or
    descriptor) is where. Reads only what differs. What a partial store lacks is not made, and so
    not counted.

    Raises:
        BadObject: it is deeper than any tree may be. StorageFull: more names than the filesystem,
            or any tree, has room for.
    """
    room = TREE_NAMES_MAX
    if old is not None or not os.listdir(directory):  # else nobody knows what is there already
        space = os.statvfs(directory)
        room = min(space.f_favail, TREE_NAMES_MAX) if space.f_files else TREE_NAMES_MAX
    gained = _Bounds(reader).gained(old, new)
    if gained > room:
        raise StorageFull(
            f"the tree would gain {_shown(gained)} names, and there is room for {room}",
            hint="nothing was changed",
        )


def check_extent(reader: PageReader, tree: ObjectId | None) -> None:
    """The same for a tree that goes into no directory. Raises BadObject, StorageFull."""
    if _Bounds(reader).gained(None, tree) > TREE_NAMES_MAX:
        raise StorageFull(f"the tree has more than {TREE_NAMES_MAX} names")


def _shown(count: int) -> str:
    return str(count) if count <= TREE_NAMES_MAX else f"more than {TREE_NAMES_MAX}"


class _Bounds:
    def __init__(self, reader: PageReader) -> None:
        self._reader = reader
        self._extents: dict[ObjectId, _Extent] = {}

    def gained(self, old: ObjectId | None, new: ObjectId | None) -> int:
        """How many names more `new` has. What is compared pair by pair is no more than `old`, which
        somebody made, has directories."""
        count = 0
        pairs = [(old, new, 0)]
        while pairs:
            old_tree, new_tree, depth = pairs.pop()
            try:
                old_items, new_items, _ = differing_items(
                    self._reader, old_tree, new_tree, DIRECTORY
                )
            except ContentAbsent:
                continue
            before: dict[bytes, Entry] = {entry.name: entry for entry in old_items}
            for entry in new_items:
                was = before.pop(entry.name, None)
                below, was_below = _tree_of(entry), None if was is None else _tree_of(was)
                count += was is None
                if below is not None and was_below is not None:
                    if was_below != below:
                        pairs.append((was_below, below, depth + 1))
                    continue
                if below is not None:
                    extent = self._extent(below)
                    _check_depth(depth + 1 + extent.levels)
                    count += extent.names
                if was_below is not None:
                    count -= self._extent(was_below).names
            for entry in before.values():
                gone = _tree_of(entry)
                count -= 1 if gone is None else 1 + self._extent(gone).names
        return count

    def _extent(self, tree: ObjectId) -> _Extent:
        """Depth first without recursion, each page once; what is below is known before it."""
        waiting = [tree]
        trail: set[ObjectId] = set()
        while waiting:
            page = waiting[-1]
            if page in self._extents:
                waiting.pop()
                continue
            if page not in trail:
                trail.add(page)
                trees = map(_tree_of, self._entries(page))
                below = [tree for tree in trees if tree and tree not in self._extents]
                if below:
                    _check_depth(len(trail))
                    waiting += below
                    continue
            trail.discard(waiting.pop())
            self._extents[page] = self._sum(page)
        return self._extents[tree]

    def _sum(self, page: ObjectId) -> _Extent:
        names = levels = 0
        for entry in self._entries(page):
            names += 1
            if entry.kind is EntryKind.DIRECTORY:
                below = _EMPTY if entry.tree is None else self._extents[entry.tree]
                names += below.names
                levels = max(levels, 1 + below.levels)
        return _Extent(names, levels)

    def _entries(self, page: ObjectId) -> list[Entry]:
        try:
            return list(directory_entries(self._reader, page))
        except ContentAbsent:
            return []


def _tree_of(entry: Entry) -> ObjectId | None:
    return entry.tree if entry.kind is EntryKind.DIRECTORY else None


def _check_depth(depth: int) -> None:
    if depth > TREE_DEPTH_MAX + 1:
        raise BadObject(f"the recorded tree is deeper than {TREE_DEPTH_MAX}")
