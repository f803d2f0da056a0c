"""Where and in how many bytes two files differ, by their manifests: whole chunks, nothing read.

A file cut at fixed places is compared place by place, passing over equal pages; one whose cuts
follow its content by the chunks that only one side has.
"""

from collections import Counter
from collections.abc import Iterable, Iterator

from dmsync.core.objects import Entry, EntryKind, Layout
from dmsync.core.pages import (
    MANIFEST,
    ZERO_RUN,
    Child,
    PageReader,
    Span,
    differing_items,
    file_spans,
    read_page,
)
from dmsync.errors import BadObject

_Item = Child | Span


def differing_bytes(reader: PageReader, old: Entry | None, new: Entry | None) -> int:
    """An upper bound of the bytes of content in which two versions of a file differ.

    Anything but a regular file has no bytes. Of bytes put in or taken out the larger count.

    Raises:
        ObjectMissing, BadObject: a manifest cannot be read.
    """
    before, after = _as_file(old), _as_file(new)
    if before is None or after is None:
        return sum(entry.size for entry in (before, after) if entry is not None)
    if before.same_data(after):
        return 0
    if Layout.CDC in (before.layout, after.layout):
        return _by_content(reader, before, after)
    return _by_place(reader, before, after)


def _as_file(entry: Entry | None) -> Entry | None:
    return entry if entry is not None and entry.kind is EntryKind.FILE else None


def _by_content(reader: PageReader, old: Entry, new: Entry) -> int:
    if old.layout is new.layout:
        was, now, _ = differing_items(reader, old.tree, new.tree, MANIFEST)
    else:
        was, now = list(file_spans(reader, old)), list(file_spans(reader, new))
    return max(_only_in(now, was), _only_in(was, now))


def _only_in(spans: Iterable[Span], others: Iterable[Span]) -> int:
    left = Counter(spans)
    left.subtract(Counter(others))
    return sum(span.length * count for span, count in left.items() if count > 0)


def _by_place(reader: PageReader, old: Entry, new: Entry) -> int:
    was, now = _Cursor(reader, old), _Cursor(reader, new)
    differing = 0
    while was.item is not None and now.item is not None:
        if isinstance(was.item, Child) and was.item == now.item and was.is_whole and now.is_whole:
            was.skip(was.item.weight)
            now.skip(now.item.weight)
        elif isinstance(was.item, Child) and was.left >= now.left:
            was.descend()
        elif isinstance(now.item, Child):
            now.descend()
        elif isinstance(was.item, Child):
            was.descend()
        else:
            length = min(was.left, now.left)
            if was.chunk_here != now.chunk_here:
                differing += length
            was.skip(length)
            now.skip(length)
    return differing + was.rest() + now.rest()


def differing_spans(reader: PageReader, old: Entry, new: Entry) -> Iterator[tuple[int, Span]]:
    """(offset, span) of the spans of `new` whose bytes `old` does not have at the same place, as
    far as chunks tell, in order. Pages that both have are passed over.

    Raises:
        ObjectMissing, BadObject: a manifest cannot be read.
    """
    was, now = _Cursor(reader, old), _Cursor(reader, new)
    differs = False
    while now.item is not None:
        if isinstance(was.item, Child) and was.item == now.item and was.is_whole and now.is_whole:
            was.skip(was.item.weight)
            now.skip(now.item.weight)
        elif isinstance(was.item, Child) and was.left >= now.left:
            was.descend()
        elif isinstance(now.item, Child):
            now.descend()
        elif isinstance(was.item, Child):
            was.descend()
        else:
            length = now.left if was.item is None else min(was.left, now.left)
            differs = differs or was.item is None or was.chunk_here != now.chunk_here
            if length == now.left:
                if differs:
                    yield new.size - now.rest() - (now.item.length - length), now.item
                differs = False
            if was.item is not None:
                was.skip(length)
            now.skip(length)


class _Cursor:
    """A place in a file, and the page or span that covers it. `left` bytes of it are to come."""

    def __init__(self, reader: PageReader, entry: Entry) -> None:
        self._reader = reader
        self._levels: list[Iterator[_Item]] = []
        self._depths: list[int] = []
        self._size_left = entry.size
        self.item: _Item | None = None
        self.left = 0
        if entry.tree is not None:
            self._push(Child(b"", entry.tree, entry.size), above=None)
        else:
            self._levels.append(iter(file_spans(reader, entry)))
            self._depths.append(0)
        self._next()

    @property
    def is_whole(self) -> bool:
        return self.item is not None and self.left == _length(self.item)

    @property
    def chunk_here(self) -> tuple[bytes, int]:
        """What the bytes here are: a chunk and the place in it; zeros are the same anywhere."""
        assert isinstance(self.item, Span)
        if self.item.chunk == ZERO_RUN:
            return ZERO_RUN, 0
        return self.item.chunk, self.item.length - self.left

    def skip(self, length: int) -> None:
        self.left -= length
        self._size_left -= length
        if self.left == 0:
            self._next()

    def descend(self) -> None:
        """Replace the page that begins here by what it holds."""
        assert isinstance(self.item, Child) and self.is_whole, "pages are entered at their start"
        self._push(self.item, above=self._depths[-1])
        self._next()

    def rest(self) -> int:
        """Bytes from here to the end."""
        return self._size_left

    def _push(self, child: Child, above: int | None) -> None:
        page = read_page(self._reader, child.page, MANIFEST)
        if above is not None and page.level != above - 1:
            raise BadObject("page levels do not descend by one")
        if sum(_length(item) for item in page.items) != child.weight:
            raise BadObject("a manifest's spans do not add up to its file's size")
        self._levels.append(iter(page.items))
        self._depths.append(page.level)

    def _next(self) -> None:
        self.item = None
        while self._levels and self.item is None:
            self.item = next(self._levels[-1], None)
            if self.item is None:
                self._levels.pop()
                self._depths.pop()
        self.left = 0 if self.item is None else _length(self.item)


def _length(item: _Item) -> int:
    return item.weight if isinstance(item, Child) else item.length
