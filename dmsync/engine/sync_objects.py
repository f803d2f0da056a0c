"""Which objects a commit adds to its first parent: what a sender plans and a receiver proves.

Both sides run the same walk: it reads only pages that differ, top down and without recursion, as
a generator of small steps (one page each) so that a session stays alive meanwhile.
"""

from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

from dmsync.core.ids import ObjectId
from dmsync.core.objects import TREE_DEPTH_MAX, Entry, EntryKind, Layout
from dmsync.core.pages import (
    DIRECTORY,
    MANIFEST,
    PAGE_DEPTH_MAX,
    ZERO_RUN,
    Page,
    PageReader,
    decode_page,
)
from dmsync.engine.differences import joined
from dmsync.engine.received_trees import Place, ReceivedNames, check_order, children_places
from dmsync.errors import BadObject

Steps = Generator[None, None, None]
FileKey = tuple[int, bytes, ObjectId]
"""Size, content id and manifest of a file: equal ones need one check."""


@dataclass(slots=True)
class ObjectSet:
    """Ids by what they are: a peer that names a page where a chunk belongs must not pass.

    `chunks`: id -> length in bytes. `scoped_roots`: pages of roots of which only some entries
    count, which proves nothing about a directory that is the same page.
    """

    chunks: dict[ObjectId, int] = field(default_factory=dict)
    directories: set[ObjectId] = field(default_factory=set)
    manifests: set[ObjectId] = field(default_factory=set)
    scoped_roots: set[ObjectId] = field(default_factory=set)

    def pages(self, page_type: int, *, is_scoped: bool = False) -> set[ObjectId]:
        if is_scoped:
            return self.scoped_roots
        return self.directories if page_type == DIRECTORY else self.manifests


@dataclass(slots=True)
class AddedObjects:
    """What one root has that the other lacks.

    `chunks`: id -> (length, the chunk at the same place in the old root or None), in manifest
    order. `pages`: id -> (type, the page in the same place or None), children before parents.
    `replaced`: what the comparison showed to be in the old root. `files`: entries with a manifest
    whose content the old root does not vouch for, once for each (size, content, tree); only
    collected where pages are not trusted.
    """

    chunks: dict[ObjectId, tuple[int, ObjectId | None]] = field(default_factory=dict)
    pages: dict[ObjectId, tuple[int, ObjectId | None]] = field(default_factory=dict)
    scoped_roots: set[ObjectId] = field(default_factory=set)
    """Those of `pages` that are no more than pages of a root of which only some entries count."""
    replaced: ObjectSet = field(default_factory=ObjectSet)
    files: dict["FileKey", Entry] = field(default_factory=dict)

    def add_to(self, known: ObjectSet) -> None:
        """Record everything listed as known."""
        known.chunks.update((chunk, length) for chunk, (length, _) in self.chunks.items())
        for page, (page_type, _) in self.pages.items():
            known.pages(page_type, is_scoped=page in self.scoped_roots).add(page)


class RootComparison:
    """Finds the objects that `new` adds to `old`. Run `steps()` to its end, then read `added`.

    `known` holds what needs no listing, such as the objects of an earlier commit of the same
    transfer; what is below a known page is known too. With `trusted` False
    every page that only `new` has is checked to be canonical, and a chunk to have one length.
    With `scope` only these entries of the roots count; the pages of the roots count whole.
    """

    def __init__(
        self,
        reader: PageReader,
        old: Entry | None,
        new: Entry,
        known: ObjectSet,
        *,
        trusted: bool,
        scope: frozenset[bytes] | None = None,
    ) -> None:
        self.added = AddedObjects()
        self._scope = scope
        self._reader = reader
        self._known = known
        self._has_old = old is not None and old.tree is not None
        self.is_trusted = trusted
        self._names = None if trusted else ReceivedNames()
        self._met_directories: set[ObjectId] = set()
        self._met_manifests: set[ObjectId] = set()
        """First pages of what is or will be compared, once each: a few pages may say that they
        stand in 10^30 places."""
        self._directories: list[tuple[ObjectId | None, ObjectId, bytes, int]] = []
        self._added_directories: list[tuple[ObjectId, bytes, int]] = []
        self._files: list[tuple[Entry | None, Entry, ObjectId]] = []
        self._pages_down: list[tuple[ObjectId, tuple[int, ObjectId | None]]] = []
        self._pair_directories(old.tree if old else None, new.tree, b"", 0)

    def steps(self) -> Steps:
        """Directories first, so that what moved within the tree is recognised afterwards."""
        while self._directories or self._added_directories:
            if not self._directories:
                self._enter_added()
                continue
            yield from self._compare_directory(*self._directories.pop())
        for old_file, new_file, tree in self._files:
            yield from self._compare_manifest(old_file, new_file, tree)
        self._files.clear()
        for chunk in self.added.chunks.keys() & self.added.replaced.chunks.keys():
            length, _ = self.added.chunks.pop(chunk)  # it only moved
            self._check_length(length, self.added.replaced.chunks[chunk])
        # pages were met parents first, level by level
        self.added.pages = dict(reversed(self._pages_down))

    # --- directories ------------------------------------------------------------------------

    def _pair_directories(
        self, old: ObjectId | None, new: ObjectId | None, path: bytes, depth: int
    ) -> None:
        if depth > TREE_DEPTH_MAX:
            raise BadObject(f"directories nested deeper than {TREE_DEPTH_MAX}")
        is_scoped = self._is_scoped(depth)
        if old is not None:
            self.added.replaced.pages(DIRECTORY, is_scoped=is_scoped).add(old)
        if new is None or old == new or self.is_known_page(new, DIRECTORY, is_scoped=is_scoped):
            return
        if not is_scoped:
            if new in self._met_directories:
                return
            self._met_directories.add(new)
        if old is None:
            self._added_directories.append((new, path, depth))
        else:
            self._directories.append((old, new, path, depth))

    def _is_scoped(self, depth: int) -> bool:
        """Do only some entries of a directory at this depth count?"""
        return depth == 0 and self._scope is not None

    def _enter_added(self) -> None:
        """Directories without a counterpart, unless the old tree has them at another place."""
        for new, path, depth in self._added_directories:
            if new not in self.added.replaced.directories:
                self._directories.append((None, new, path, depth))
        self._added_directories.clear()

    def _compare_directory(
        self, old: ObjectId | None, new: ObjectId, path: bytes, depth: int
    ) -> Steps:
        frontier = _PagePair(self, DIRECTORY, old, new, is_scoped=self._is_scoped(depth))
        yield from frontier.steps()
        if not self.is_trusted:
            frontier.check_order()
        scope = self._scope if depth == 0 else None
        before = {
            entry.name: entry
            for entry in frontier.old_items
            if scope is None or entry.name in scope
        }
        for entry in before.values():
            self._saw_replaced(entry)
        for entry in frontier.new_items:
            if scope is not None and entry.name not in scope:
                continue
            counterpart = before.get(entry.name)
            below = b""
            if self._names is not None:
                below = joined(path, entry.name)
                self._names.check(below, entry)
            if entry.kind is EntryKind.DIRECTORY:
                was_directory = counterpart and counterpart.kind is EntryKind.DIRECTORY
                old_tree = counterpart.tree if counterpart and was_directory else None
                self._pair_directories(old_tree, entry.tree, below, depth + 1)
            elif entry.kind is EntryKind.FILE:
                yield from self._compare_file(counterpart, entry)

    def _saw_replaced(self, entry: Entry) -> None:
        if entry.layout is Layout.SINGLE:
            self.added.replaced.chunks[ObjectId(entry.content)] = entry.size
        elif entry.tree is not None:
            page_type = DIRECTORY if entry.kind is EntryKind.DIRECTORY else MANIFEST
            self.added.replaced.pages(page_type).add(entry.tree)

    # --- files --------------------------------------------------------------------------------

    def _compare_file(self, old: Entry | None, new: Entry) -> Steps:
        base = old if old is not None and old.kind is EntryKind.FILE else None
        if not self.is_trusted:
            self._note_unproven(base, new)
        if new.layout is Layout.SINGLE:
            self._add_chunk(ObjectId(new.content), new.size, _single_chunk(base))
        elif new.tree is not None and not self._has_met(new.tree):
            self._met_manifests.add(new.tree)
            # with an old root, wait until all its directories were seen: the file may have moved
            if self._has_old:
                self._files.append((base, new, new.tree))
            else:
                yield from self._compare_manifest(base, new, new.tree)

    def _note_unproven(self, old: Entry | None, new: Entry) -> None:
        """Remember a file that is not just the old one with other metadata."""
        if new.tree is None:
            return
        key = (new.size, new.content, new.tree)
        if old is None or (old.size, old.content, old.tree) != key:
            self.added.files.setdefault(key, new)

    def _has_met(self, manifest: ObjectId) -> bool:
        return manifest in self._known.manifests or manifest in self._met_manifests

    def _compare_manifest(self, base: Entry | None, new: Entry, tree: ObjectId) -> Steps:
        if tree in self.added.replaced.manifests:  # unchanged, or moved
            return
        frontier = _PagePair(self, MANIFEST, base.tree if base else None, tree)
        yield from frontier.steps()
        aligned = base is not None and base.layout is new.layout is Layout.FIXED
        replaced: dict[int, ObjectId] = {}
        for offset, length, chunk in frontier.old_spans():
            if chunk != ZERO_RUN:
                self.added.replaced.chunks[chunk] = length
                if aligned:
                    replaced[offset] = chunk
        single = _single_chunk(base)
        for offset, length, chunk in frontier.new_spans():
            if chunk != ZERO_RUN:
                base_chunk = replaced.get(offset, single if offset == 0 else None)
                self._add_chunk(chunk, length, base_chunk)
        yield

    def _add_chunk(self, chunk: ObjectId, length: int, base: ObjectId | None) -> None:
        known = self._known.chunks.get(chunk)
        if known is None:
            known, _ = self.added.chunks.setdefault(chunk, (length, base))
        self._check_length(length, known)

    def _check_length(self, length: int, known: int) -> None:
        if length != known and not self.is_trusted:
            raise BadObject("a chunk is not as long as its span")

    # --- pages ----------------------------------------------------------------------------------

    def read_page(self, page: ObjectId, page_type: int, *, is_new: bool) -> Page:
        data = self._reader.read_page(page)
        return decode_page(data, page_type, trusted=self.is_trusted or not is_new)

    def met_new_page(
        self, page: ObjectId, page_type: int, base: ObjectId | None, *, is_scoped: bool
    ) -> None:
        self._pages_down.append((page, (page_type, base)))
        if is_scoped:
            self.added.scoped_roots.add(page)
        else:  # roots come first
            self.added.scoped_roots.discard(page)

    def is_known_page(self, page: ObjectId, page_type: int, *, is_scoped: bool) -> bool:
        return page in self._known.pages(page_type, is_scoped=is_scoped)


def _single_chunk(entry: Entry | None) -> ObjectId | None:
    return ObjectId(entry.content) if entry and entry.layout is Layout.SINGLE else None


_Located = tuple[int, ObjectId]
"""Byte offset in the file (0 in directories) and the page there."""


class _PagePair:
    """Descends two page trees level by level, dropping the pages that both have."""

    def __init__(
        self,
        owner: RootComparison,
        page_type: int,
        old: ObjectId | None,
        new: ObjectId,
        *,
        is_scoped: bool = False,
    ) -> None:
        self._owner = owner
        self._is_scoped = is_scoped
        self._replaced = owner.added.replaced.pages(page_type, is_scoped=is_scoped)
        self._type = page_type
        self._old: list[_Located] = [] if old is None else [(0, old)]
        self._new: list[_Located] = [(0, new)]
        self._root = new
        self._is_checked = page_type == DIRECTORY and not owner.is_trusted
        self._new_pages: dict[ObjectId, Page] = {}
        self._vouched: dict[ObjectId, Place] = {}
        self._ends: dict[ObjectId, bytes | None] = {}
        """Of old pages: the name that all below come before, where there is one."""
        self._old_leaves: list[tuple[int, Page]] = []
        self._new_leaves: list[tuple[int, Page]] = []

    def steps(self) -> Steps:
        """Read what differs, one page a step."""
        old_level = yield from self._level_of(self._old, is_new=False)
        new_level = yield from self._level_of(self._new, is_new=True)
        while old_level >= 0 or new_level >= 0:
            if old_level == new_level:
                shared = {page for _, page in self._old} & {page for _, page in self._new}
                self._old = [at for at in self._old if at[1] not in shared]
                self._new = [at for at in self._new if at[1] not in shared]
                self._replaced.update(shared)
            if new_level >= old_level:
                yield from self._descend_new(new_level, self._bases(old_level == new_level))
                new_level -= 1
                if old_level > new_level:
                    yield from self._descend_old(old_level)
                    old_level -= 1
            else:
                yield from self._descend_old(old_level)
                old_level -= 1

    def _bases(self, same_level: bool) -> dict[int, ObjectId]:
        """The old page at each offset; in directories only where there is no choice."""
        if not same_level or (self._type == DIRECTORY and len(self._old) != 1):
            return {}
        return dict(self._old)

    def _level_of(self, pages: list[_Located], *, is_new: bool) -> Generator[None, None, int]:
        if not pages:
            return -1
        page = self._owner.read_page(pages[0][1], self._type, is_new=is_new)
        yield
        return page.level

    def _descend_new(self, level: int, bases: dict[int, ObjectId]) -> Steps:
        below: list[_Located] = []
        met: set[ObjectId] = set()
        for offset, page_id in self._new:
            # once is enough for a page that repeats (zeros, or a hostile peer's tower of them)
            if page_id in met or self._is_known(page_id):
                continue
            met.add(page_id)
            page = self._read(page_id, level, is_new=True)
            self._owner.met_new_page(
                page_id, self._type, bases.get(offset), is_scoped=self._is_scoped
            )
            if level == 0:
                self._new_leaves.append((offset, page))
            if self._is_checked:
                self._new_pages[page_id] = page
            below += _children(offset, page)
            yield
        self._new = below

    def _descend_old(self, level: int) -> Steps:
        below: list[_Located] = []
        met: set[ObjectId] = set()
        for offset, page_id in self._old:
            if page_id in met:
                continue
            met.add(page_id)
            page = self._read(page_id, level, is_new=False)
            self._replaced.add(page_id)
            if level == 0:
                self._old_leaves.append((offset, page))
            elif self._is_checked:
                self._vouch(page_id, page)
            below += _children(offset, page)
            yield
        self._old = below

    def _vouch(self, page_id: ObjectId, page: Page) -> None:
        """An old directory was checked when it came: so stood the pages in it."""
        for child, place in children_places(page, self._ends.get(page_id)):
            self._vouched[child] = place
            self._ends[child] = place.before

    def check_order(self) -> None:
        """Check the names of the new directory over all its pages. Raises BadObject."""
        check_order(
            self._root,
            self._new_pages,
            self._vouched,
            lambda page: self._owner.read_page(page, self._type, is_new=False),
        )

    def _is_known(self, page_id: ObjectId) -> bool:
        return self._owner.is_known_page(page_id, self._type, is_scoped=self._is_scoped)

    def _read(self, page_id: ObjectId, level: int, *, is_new: bool) -> Page:
        page = self._owner.read_page(page_id, self._type, is_new=is_new)
        if page.level != level or level > PAGE_DEPTH_MAX:
            raise BadObject("page levels do not descend by one")
        return page

    @property
    def old_items(self) -> Iterator[Any]:
        return (item for _, page in self._old_leaves for item in page.items)

    @property
    def new_items(self) -> Iterator[Any]:
        return (item for _, page in self._new_leaves for item in page.items)

    def old_spans(self) -> Iterator[tuple[int, int, ObjectId]]:
        """(file offset, length, chunk) of the leaves only the old file has."""
        return _spans(self._old_leaves)

    def new_spans(self) -> Iterator[tuple[int, int, ObjectId]]:
        return _spans(self._new_leaves)


def _children(offset: int, page: Page) -> list[_Located]:
    if page.level == 0:
        return []
    below = []
    for child in page.items:
        below.append((offset, child.page))
        if page.type == MANIFEST:
            offset += child.weight
    return below


def _spans(leaves: list[tuple[int, Page]]) -> Iterator[tuple[int, int, ObjectId]]:
    for offset, page in leaves:
        for span in page.items:
            yield offset, span.length, span.chunk
            offset += span.length
