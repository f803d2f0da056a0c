"""Pages: the content-split trees behind directories and file manifests (protocol/OBJECTS.md 4).

A tree of any depth; a leaf holds entries (directory) or spans (manifest), an inner page points at
pages. Where a page ends depends only on names, ids and positions, so that one changed item
rewrites one page a level and every cluster cuts the same way. Reading never relies on the rule.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final, Protocol
from zlib import crc32

from dmsync.core.encoding import ITEMS_MAX, decode, encode
from dmsync.core.ids import ID_BYTES, ObjectId
from dmsync.core.objects import FILE_BYTES_MAX, Entry, EntryKind, Layout, entry_from_value
from dmsync.core.values import value_type
from dmsync.errors import BadObject

PAGE_BYTES_MAX: Final = 64 * 1024
PAGE_ITEMS_MAX: Final = 1024
PAGE_DEPTH_MAX: Final = 8
DIRECTORY: Final = 1
MANIFEST: Final = 2
ZERO_RUN: Final = ObjectId(bytes(ID_BYTES))
"""Stands in a manifest for a run of zeros of any length."""
FIXED_LEAF_BYTES: Final = 64 * 1024 * 1024
"""File bytes that one leaf of a FIXED manifest covers."""

_ENTRY_BYTES_SPLIT: Final = 32 * 1024
"""A leaf of this size ends even without a boundary: the largest entry still fits one page."""


class PageReader(Protocol):
    def read_page(self, page: ObjectId) -> bytes:
        """Verified bytes of a page. Raises ObjectMissing, HashMismatch."""
        ...


class PageWriter(Protocol):
    def write_page(self, data: bytes, base: ObjectId | None) -> ObjectId:
        """Store a page, `base` being the page it replaces (a delta hint), and return its id."""
        ...


@value_type
class Span:
    """A run of file bytes: `length` bytes that are chunk `chunk`, or zeros when it is ZERO_RUN."""

    length: int
    chunk: ObjectId


@value_type
class Child:
    """A page below an inner page. `key` is the first name (directory) or b"" (manifest);
    `weight` counts the entries (directory) or file bytes (manifest) below."""

    key: bytes
    page: ObjectId
    weight: int


@value_type
class Page:
    """A decoded page: `items` are Entry or Span at level 0, Child above."""

    type: int
    level: int
    items: tuple[Any, ...]


# --- encoding -----------------------------------------------------------------------------


def encode_page(page: Page) -> bytes:
    """Canonical bytes of a page."""
    if page.level > 0:
        return encode((page.type, page.level, tuple((c.key, c.page, c.weight) for c in page.items)))
    if page.type == DIRECTORY:
        return encode((DIRECTORY, 0, tuple(entry.to_value() for entry in page.items)))
    lengths = tuple(span.length for span in page.items)
    return encode((MANIFEST, 0, (lengths, b"".join(span.chunk for span in page.items))))


def decode_page(data: bytes, expected_type: int, *, trusted: bool = False) -> Page:
    """Decode and check one page.

    Raises:
        BadObject: not canonical, too large, unsorted, unsafe names, lengths out of bounds.
    """
    if len(data) > PAGE_BYTES_MAX + XATTR_SLACK_BYTES:
        raise BadObject("page too large")
    value = decode(data, trusted=trusted, items_max=ITEMS_MAX)
    if type(value) is not tuple or len(value) != 3 or value[0] != expected_type:
        raise BadObject("not a page of the expected type")
    _, level, items = value
    if type(level) is not int or not 0 <= level <= PAGE_DEPTH_MAX or type(items) is not tuple:
        raise BadObject("page level or items out of bounds")
    if level > 0:
        return Page(expected_type, level, _children(items, expected_type))
    if expected_type == DIRECTORY:
        return Page(DIRECTORY, 0, _entries(items))
    return Page(MANIFEST, 0, _spans(items))


XATTR_SLACK_BYTES: Final = 8 * 1024 * 1024
"""One entry may carry 64 attributes of 64 KiB; only such a page may exceed PAGE_BYTES_MAX."""


def _entries(items: tuple[Any, ...]) -> tuple[Entry, ...]:
    if not 0 < len(items) <= PAGE_ITEMS_MAX:
        raise BadObject("a directory page holds 1 to 1024 entries")
    entries = tuple(entry_from_value(item) for item in items)
    previous = b""
    for entry in entries:
        if entry.name <= previous:
            raise BadObject("directory entries are not sorted and distinct")
        previous = entry.name
    return entries


def _spans(items: tuple[Any, ...]) -> tuple[Span, ...]:
    if len(items) != 2 or type(items[0]) is not tuple or type(items[1]) is not bytes:
        raise BadObject("a manifest page is lengths and ids")
    lengths, ids = items
    if not 0 < len(lengths) <= PAGE_ITEMS_MAX or len(ids) != ID_BYTES * len(lengths):
        raise BadObject("a manifest page holds 1 to 1024 spans")
    spans = []
    for position, length in enumerate(lengths):
        chunk = ObjectId(ids[ID_BYTES * position : ID_BYTES * (position + 1)])
        most = FILE_BYTES_MAX if chunk == ZERO_RUN else CHUNK_BYTES_MAX
        if type(length) is not int or not 0 < length <= most:
            raise BadObject("span length out of bounds")
        spans.append(Span(length, chunk))
    return tuple(spans)


CHUNK_BYTES_MAX: Final = 1024 * 1024


def _children(items: tuple[Any, ...], page_type: int) -> tuple[Child, ...]:
    if not 0 < len(items) <= PAGE_ITEMS_MAX:
        raise BadObject("an inner page holds 1 to 1024 children")
    children = []
    previous = b""
    for item in items:
        if type(item) is not tuple or len(item) != 3:
            raise BadObject("a child is key, page, weight")
        key, page, weight = item
        if type(key) is not bytes or type(page) is not bytes or len(page) != ID_BYTES:
            raise BadObject("a child's key or page is not valid")
        if type(weight) is not int or not 0 < weight <= FILE_BYTES_MAX:
            raise BadObject("a child's weight is out of bounds")
        if page_type == DIRECTORY:
            if key <= previous:
                raise BadObject("children are not sorted")
            previous = key
        elif key:
            raise BadObject("a manifest's children have no keys")
        children.append(Child(key, ObjectId(page), weight))
    return tuple(children)


# --- reading ----------------------------------------------------------------------------------


def read_page(reader: PageReader, page: ObjectId, page_type: int) -> Page:
    return decode_page(reader.read_page(page), page_type, trusted=True)


def iterate_items(reader: PageReader, root: ObjectId | None, page_type: int) -> Iterator[Any]:
    """Leaf items in order, reading one page a level at a time. Raises BadObject on bad depth."""
    if root is None:
        return
    page = read_page(reader, root, page_type)
    if page.level == 0:
        yield from page.items
        return
    for child in page.items:
        yield from _iterate_below(reader, child.page, page_type, page.level)


def _iterate_below(
    reader: PageReader, page_id: ObjectId, page_type: int, level_above: int
) -> Iterator[Any]:
    page = read_page(reader, page_id, page_type)
    if page.level != level_above - 1:
        raise BadObject("page levels do not descend by one")
    if page.level == 0:
        yield from page.items
        return
    for child in page.items:
        yield from _iterate_below(reader, child.page, page_type, page.level)


def directory_entries(reader: PageReader, root: ObjectId | None) -> Iterator[Entry]:
    """Entries of one directory, sorted by name."""
    return iterate_items(reader, root, DIRECTORY)


def find_entry(reader: PageReader, root: ObjectId | None, name: bytes) -> Entry | None:
    """One name in a directory, reading one page a level."""
    while root is not None:
        page = read_page(reader, root, DIRECTORY)
        if page.level == 0:
            return next((e for e in page.items if e.name == name), None)
        below = None
        for child in page.items:
            if child.key > name:
                break
            below = child.page
        root = below
    return None


def file_spans(reader: PageReader, entry: Entry) -> Iterator[Span]:
    """The spans of a file in order; their lengths add up to its size.

    Raises:
        BadObject: they do not.
    """
    if entry.layout is Layout.SINGLE:
        yield Span(entry.size, ObjectId(entry.content))
    elif entry.layout is Layout.ZERO:
        yield Span(entry.size, ZERO_RUN)
    elif entry.layout is not Layout.EMPTY:
        total = 0
        for span in iterate_items(reader, entry.tree, MANIFEST):
            total += span.length
            if total > entry.size:
                break
            yield span
        if total != entry.size:
            raise BadObject("a manifest's spans do not add up to its file's size")


# --- comparing ----------------------------------------------------------------------------


def differing_items(
    reader: PageReader, old: ObjectId | None, new: ObjectId | None, page_type: int
) -> tuple[list[Any], list[Any], list[ObjectId]]:
    """Leaf items of the pages that only one side has, and the pages only `new` has.

    Reads only pages that differ: cost follows the difference. Items common to both may appear in
    both lists; compare them. The new pages come children before parents.
    """
    if old == new:
        return [], [], []
    old_pages = _Frontier(reader, old, page_type)
    new_pages = _Frontier(reader, new, page_type)
    while old_pages.level > 0 or new_pages.level > 0:
        if old_pages.level == new_pages.level:
            shared = old_pages.ids & new_pages.ids
            old_pages.drop(shared)
            new_pages.drop(shared)
            old_pages.descend()
            new_pages.descend()
        else:
            (old_pages if old_pages.level > new_pages.level else new_pages).descend()
    shared = old_pages.ids & new_pages.ids
    old_pages.drop(shared)
    new_pages.drop(shared)
    return old_pages.leaf_items(), new_pages.leaf_items(), new_pages.visited[::-1]


class _Frontier:
    """Pages of one level of one tree that may differ from the other side's.

    `level` counts up from 1 above the leaves' own level, so that level 0 means the ids are leaves.
    """

    def __init__(self, reader: PageReader, root: ObjectId | None, page_type: int) -> None:
        self._reader = reader
        self._type = page_type
        self._ids: list[ObjectId] = [] if root is None else [root]
        self.visited: list[ObjectId] = []
        self.level = 0 if root is None else read_page(reader, root, page_type).level

    @property
    def ids(self) -> set[ObjectId]:
        return set(self._ids)

    def drop(self, shared: set[ObjectId]) -> None:
        if shared:
            self._ids = [page for page in self._ids if page not in shared]

    def descend(self) -> None:
        below: list[ObjectId] = []
        for page_id in self._ids:
            page = read_page(self._reader, page_id, self._type)
            if page.level != self.level:
                raise BadObject("page levels do not descend by one")
            self.visited.append(page_id)
            below.extend(child.page for child in page.items)
        self._ids = below
        self.level -= 1

    def leaf_items(self) -> list[Any]:
        items: list[Any] = []
        for page_id in self._ids:
            page = read_page(self._reader, page_id, self._type)
            if page.level != 0:
                raise BadObject("page levels do not descend by one")
            self.visited.append(page_id)
            items.extend(page.items)
        return items


# --- writing --------------------------------------------------------------------------------


def name_ends_leaf(name: bytes) -> bool:
    """Whether a leaf of a directory ends with this name, whatever comes after."""
    return crc32(name) & 63 == 63


def _id_ends_page(page: ObjectId) -> bool:
    return page[0] == 255


def write_directory(
    writer: PageWriter, entries: Iterable[Entry], bases: "PageBases | None" = None
) -> ObjectId | None:
    """Write the page tree of one directory; `entries` sorted by name, names distinct.

    Returns the root page, or None for an empty directory.
    """
    directory = DirectoryWriter(writer, bases)
    for entry in entries:
        directory.add(entry)
    return directory.finish()


class DirectoryWriter:
    """Writes the page tree of one directory, its entries given one by one, sorted by name."""

    def __init__(self, writer: PageWriter, bases: "PageBases | None" = None) -> None:
        self._writer = writer
        self._bases = bases
        self._leaf: list[Entry] = []
        self._leaf_bytes = 0
        self._children: list[Child] = []

    def add(self, entry: Entry) -> None:
        entry_bytes = len(entry.name) + 160 + len(entry.link_target) + len(entry.hardlink)
        if entry.xattrs:
            entry_bytes += sum(len(k) + len(v) + 8 for k, v in entry.xattrs)
        if self._leaf and self._leaf_bytes + entry_bytes > _ENTRY_BYTES_SPLIT:
            self._end_leaf()
        self._leaf.append(entry)
        self._leaf_bytes += entry_bytes
        if name_ends_leaf(entry.name):
            self._end_leaf()

    @property
    def is_between_leaves(self) -> bool:
        """Whether the next entry begins a leaf, whatever it is."""
        return not self._leaf

    def add_leaf(self, leaf: Child) -> None:
        """Take over a leaf that is stored, between leaves. The caller knows that the same entries
        would make the same leaf: it ended with a name that ends one, or what comes after it now
        is what came after it then."""
        assert not self._leaf
        self._children.append(leaf)

    def _end_leaf(self) -> None:
        key = self._leaf[0].name
        base = self._bases.nearest(0, key) if self._bases else None
        data = encode_page(Page(DIRECTORY, 0, tuple(self._leaf)))
        self._children.append(Child(key, self._writer.write_page(data, base), len(self._leaf)))
        self._leaf, self._leaf_bytes = [], 0

    def finish(self) -> ObjectId | None:
        """The root page, or None for an empty directory."""
        if self._leaf:
            self._end_leaf()
        return _write_inner(self._writer, self._children, DIRECTORY, self._bases)


def write_manifest(
    writer: PageWriter,
    spans: Iterable[Span],
    layout: Layout,
    bases: "PageBases | None" = None,
) -> ObjectId:
    """Write the manifest of one file longer than one chunk; zero runs must be maximal.

    FIXED manifests end pages at multiples of FIXED_LEAF_BYTES of the file (a zero run that crosses
    one ends it), CDC ones where an id says so, so that insertions move no later boundary.
    """
    children: list[Child] = []
    leaf: list[Span] = []
    offset = 0

    def end_leaf() -> None:
        base = bases.at(0, len(children)) if bases else None
        page = writer.write_page(encode_page(Page(MANIFEST, 0, tuple(leaf))), base)
        children.append(Child(b"", page, sum(span.length for span in leaf)))
        leaf.clear()

    for span in spans:
        leaf.append(span)
        if layout is Layout.FIXED:
            ends = offset // FIXED_LEAF_BYTES != (offset + span.length) // FIXED_LEAF_BYTES
        else:
            ends = _id_ends_page(span.chunk)
        offset += span.length
        if ends or len(leaf) == PAGE_ITEMS_MAX:
            end_leaf()
    if leaf:
        end_leaf()
    root = _write_inner(writer, children, MANIFEST, bases, by_position=layout is Layout.FIXED)
    assert root is not None, "a manifest has at least one span"
    return root


def _write_inner(
    writer: PageWriter,
    children: list[Child],
    page_type: int,
    bases: "PageBases | None",
    *,
    by_position: bool = False,
) -> ObjectId | None:
    level = 0
    while len(children) > 1:
        level += 1
        above: list[Child] = []
        group: list[Child] = []
        for position, child in enumerate(children):
            group.append(child)
            full = len(group) == PAGE_ITEMS_MAX
            ends = len(group) > 1 and not by_position and _id_ends_page(child.page)
            if full or ends or position == len(children) - 1:
                base = None
                if bases:
                    base = (
                        bases.nearest(level, group[0].key)
                        if page_type == DIRECTORY
                        else bases.at(level, len(above))
                    )
                data = encode_page(Page(page_type, level, tuple(group)))
                weight = sum(c.weight for c in group)
                above.append(Child(group[0].key, writer.write_page(data, base), weight))
                group = []
        children = above
    return children[0].page if children else None


class PageBases:
    """The pages of an older tree, as delta bases for the pages that take their place."""

    def __init__(self, reader: PageReader, root: ObjectId | None, page_type: int) -> None:
        self._levels: dict[int, list[Child]] = {}
        if root is not None:
            self._collect(reader, [Child(b"", root, 1)], page_type)

    def _collect(self, reader: PageReader, children: list[Child], page_type: int) -> None:
        level = read_page(reader, children[0].page, page_type).level
        self._levels[level] = children
        if level > 0:
            below = [
                grandchild
                for child in children
                for grandchild in read_page(reader, child.page, page_type).items
            ]
            self._collect(reader, below, page_type)

    @property
    def leaves(self) -> Sequence[Child]:
        """In order. A root that is a leaf itself has neither its key nor its weight here."""
        return self._levels.get(0, [])

    def nearest(self, level: int, key: bytes) -> ObjectId | None:
        """The page of `level` whose first key is the last one not after `key`, else the first."""
        pages = self._levels.get(level, [])
        index = bisect_right(pages, key, key=lambda child: child.key)
        return pages[max(index - 1, 0)].page if pages else None

    def at(self, level: int, position: int) -> ObjectId | None:
        """The page at `position` of `level`."""
        pages = self._levels.get(level, [])
        return pages[position].page if position < len(pages) else None


# --- paths ------------------------------------------------------------------------------------


def walk_tree(
    reader: PageReader, root: Entry, visit: Callable[[bytes, Entry], bool] | None = None
) -> Iterator[tuple[bytes, Entry]]:
    """Yield (path, entry) below `root`, parents first, names in byte order, iteratively.

    A directory for which `visit` returns False is yielded but not entered.
    """
    stack: list[tuple[bytes, Iterator[Entry]]] = [(b"", directory_entries(reader, root.tree))]
    while stack:
        prefix, entries = stack[-1]
        entry = next(entries, None)
        if entry is None:
            stack.pop()
            continue
        path = prefix + entry.name
        yield path, entry
        if entry.kind is EntryKind.DIRECTORY and (visit is None or visit(path, entry)):
            stack.append((path + b"/", directory_entries(reader, entry.tree)))


def find_path(reader: PageReader, root: Entry, path: bytes) -> Entry | None:
    """The entry at `path` below `root` (no following of symlinks), or None."""
    found: Entry | None = root
    for part in [p for p in path.split(b"/") if p]:
        if found is None or found.kind is not EntryKind.DIRECTORY:
            return None
        found = find_entry(reader, found.tree, part)
    return found
