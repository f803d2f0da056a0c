"""Reads one open file into chunks and manifest pages, and gives its content identity.

Holes are never read, zero runs are never stored, and a chunk that equals the old file's chunk at
the same place is not offered to the writer at all.
"""

import errno
import os
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Final, Protocol

from dmsync.core.chunking import (
    FIXED_CHUNK_BYTES,
    SEGMENT_BYTES,
    FileHasher,
    cdc_cuts,
    choose_layout,
    is_zero,
)
from dmsync.core.ids import Kind, ObjectId, object_id
from dmsync.core.objects import Entry, Layout
from dmsync.core.pages import (
    MANIFEST,
    ZERO_RUN,
    PageBases,
    PageReader,
    PageWriter,
    Span,
    file_spans,
    write_manifest,
)
from dmsync.errors import BadObject

assert FIXED_CHUNK_BYTES == SEGMENT_BYTES, "a chunk's id is its segment's hash"
READ_BYTES: Final = 16 * FIXED_CHUNK_BYTES
SPANS_PER_STEP: Final = 256
"""Spans that checking a file takes in one step: at most so many chunks are read in it."""
_CDC_HOLE_BYTES_MIN: Final = 1024 * 1024
"""Holes of content-defined files shorter than this are read as zeros."""
SPARSE_BYTES_MAX: Final = 1 << 46
"""Apparent size up to which a file with holes is hashed: 64 TiB take a minute, 8 EiB never end."""


class ChunkReader(PageReader, Protocol):
    def read(self, kind: Kind, oid: ObjectId) -> bytes:
        """Verified bytes of an object. Raises ObjectMissing, HashMismatch."""
        ...


class ChunkWriter(PageWriter, Protocol):
    def put(
        self, kind: Kind, data: bytes, *, base: ObjectId | None = None, similar: bool = False
    ) -> ObjectId:
        """Store an object (a no-op when it is there) and return its id."""
        ...


class FileMoved(Exception):
    """The file became shorter while it was read."""


class TooLarge(Exception):
    """A file with holes whose apparent size cannot be hashed in finite time."""


@dataclass(frozen=True, slots=True)
class FileContent:
    """What Entry says of a file's bytes. `tree` is None without a writer."""

    size: int
    content: bytes
    layout: Layout
    tree: ObjectId | None
    sparse: bool


@dataclass(frozen=True, slots=True)
class Region:
    """A run of a file: aligned data to read, or a hole to pass over."""

    offset: int
    length: int
    is_hole: bool


def data_extents(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, end) of the file's data, by SEEK_DATA and SEEK_HOLE; nothing for a single hole."""
    position = 0
    while position < size:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as exc:
            if exc.errno == errno.ENXIO:  # only a hole is left
                return
            yield position, size  # the filesystem does not tell
            return
        if start >= size:
            return
        end = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        yield start, max(end, start + 1)
        position = max(end, start + 1)


def regions(extents: Iterator[tuple[int, int]], size: int, alignment: int) -> Iterator[Region]:
    """Cover 0..size: holes cut down, data grown, to multiples of `alignment`."""
    done = 0
    for start, end in extents:
        start = start // alignment * alignment
        end = min(-(-end // alignment) * alignment, size)
        if end <= done:
            continue
        start = max(start, done)
        if start > done:
            yield Region(done, start - done, is_hole=True)
        yield Region(start, end - start, is_hole=False)
        done = end
    if done < size:
        yield Region(done, size - done, is_hole=True)


def buffers(fd: int, offset: int, length: int, block_bytes: int) -> Iterator[memoryview]:
    """The file's bytes in views of up to `block_bytes`, valid until the next one.

    Raises:
        FileMoved: the file ends before `offset + length`.
    """
    block = memoryview(bytearray(min(block_bytes, length)))
    while length > 0:
        wanted = min(len(block), length)
        filled = 0
        while filled < wanted:
            got = os.preadv(fd, [block[filled:wanted]], offset + filled)
            if got == 0:
                raise FileMoved
            filled += got
        yield block[:wanted]
        offset += wanted
        length -= wanted


class OldSpans:
    """The spans of an old file, asked for at growing offsets."""

    def __init__(self, reader: PageReader, entry: Entry | None) -> None:
        usable = entry is not None and entry.layout in (Layout.FIXED, Layout.SINGLE, Layout.ZERO)
        self._spans: Iterator[Span] = (
            file_spans(reader, entry) if usable and entry is not None else iter(())
        )
        self._offset = 0
        self._span: Span | None = next(self._spans, None)

    def at(self, offset: int) -> ObjectId | None:
        """The chunk that begins at `offset`, ZERO_RUN inside a zero run, or None."""
        while self._span is not None and self._offset + self._span.length <= offset:
            self._offset += self._span.length
            self._span = next(self._spans, None)
        if self._span is None:
            return None
        if self._span.chunk == ZERO_RUN or self._offset == offset:
            return self._span.chunk
        return None


class ContentReader:
    """Reads files into `writer`, or only hashes them when that is None.

    `incremental` says that an older state exists, so that new chunks look for similar pages.
    """

    def __init__(self, store: PageReader, writer: ChunkWriter | None, *, incremental: bool) -> None:
        self._store = store
        self._writer = writer
        self._incremental = incremental
        self.bytes_hashed = 0
        self.bytes_differing = 0
        """Bytes of chunks that the old file does not have at the same place."""

    def read(self, fd: int, found: os.stat_result, old: Entry | None) -> FileContent:
        """Read the regular file `fd` of `found.st_size` bytes, `old` being what it replaces.

        Raises:
            FileMoved: it became shorter. TooLarge: its holes cannot be hashed. OSError: a read
            failed.
        """
        size = found.st_size
        if size == 0:
            return FileContent(0, b"", Layout.EMPTY, None, sparse=False)
        extents = [(0, size)]
        if found.st_blocks * 512 < size:
            extents = list(data_extents(fd, size))
        sparse = extents != [(0, size)]
        if not extents:
            self._count_zeros(size, old)
            return FileContent(size, b"", Layout.ZERO, None, sparse=True)
        if size > SPARSE_BYTES_MAX and sparse:
            raise TooLarge
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        layout = choose_layout(size, previous=old.layout if old is not None else None)
        hasher = FileHasher()
        if layout is Layout.CDC:
            spans = self._shifting_spans(fd, size, extents, hasher)
        else:
            spans = self._aligned_spans(fd, size, extents, hasher, old)
        return self._finish(_maximal(spans), size, layout, sparse, hasher, old)

    def _count_zeros(self, size: int, old: Entry | None) -> None:
        if old is None or old.layout is not Layout.ZERO or old.size != size:
            self.bytes_differing += size

    def _finish(
        self,
        spans: Iterator[Span],
        size: int,
        layout: Layout,
        sparse: bool,
        hasher: FileHasher,
        old: Entry | None,
    ) -> FileContent:
        first = next(spans)
        if first == Span(size, ZERO_RUN):
            return FileContent(size, b"", Layout.ZERO, None, sparse)
        if layout is Layout.SINGLE:
            return FileContent(size, first.chunk, Layout.SINGLE, None, sparse)
        tree = None
        if self._writer is None:
            for _ in spans:
                pass
        else:
            bases = None
            if old is not None and old.layout is layout:
                bases = PageBases(self._store, old.tree, MANIFEST)
            tree = write_manifest(self._writer, _chained(first, spans), layout, bases)
        return FileContent(size, hasher.content(), layout, tree, sparse)

    def _aligned_spans(
        self,
        fd: int,
        size: int,
        extents: list[tuple[int, int]],
        hasher: FileHasher,
        old: Entry | None,
    ) -> Iterator[Span]:
        before = OldSpans(self._store, old)
        for region in regions(iter(extents), size, FIXED_CHUNK_BYTES):
            if region.is_hole:
                hasher.add_zeros(region.length)
                yield Span(region.length, ZERO_RUN)
                continue
            offset = region.offset
            for block in buffers(fd, offset, region.length, READ_BYTES):
                for start in range(0, len(block), FIXED_CHUNK_BYTES):
                    data = block[start : start + FIXED_CHUNK_BYTES]
                    chunk = self._chunk(data, before.at(offset), hasher)
                    yield Span(len(data), chunk)
                    offset += len(data)

    def _chunk(
        self, data: memoryview, before: ObjectId | None, hasher: FileHasher | None
    ) -> ObjectId:
        """Id of one chunk, stored when it is neither zeros nor what was there before."""
        self.bytes_hashed += len(data)
        if is_zero(data):
            if hasher:
                hasher.add_zeros(len(data))
            if before != ZERO_RUN:
                self.bytes_differing += len(data)
            return ZERO_RUN
        chunk = object_id(Kind.CHUNK, data)
        if hasher:
            hasher.add_segment_hash(chunk, len(data))
        if chunk == before:
            return chunk
        self.bytes_differing += len(data)
        if self._writer is not None:
            base = None if before == ZERO_RUN else before
            self._writer.put(Kind.CHUNK, bytes(data), base=base, similar=self._incremental)
        return chunk

    def _shifting_spans(
        self, fd: int, size: int, extents: list[tuple[int, int]], hasher: FileHasher
    ) -> Iterator[Span]:
        large_holes = _without_short_holes(extents, size)
        for region in regions(iter(large_holes), size, FIXED_CHUNK_BYTES):
            if region.is_hole:
                hasher.add_zeros(region.length)
                yield Span(region.length, ZERO_RUN)
                continue
            rest = b""
            left = region.length
            for block in buffers(fd, region.offset, region.length, READ_BYTES):
                hasher.update(block)
                left -= len(block)
                waiting = memoryview(rest + block if rest else bytes(block))
                start = 0
                for length in cdc_cuts(waiting, final=left == 0):
                    data = waiting[start : start + length]
                    yield Span(length, self._chunk(data, None, None))
                    start += length
                rest = bytes(waiting[start:])


def _without_short_holes(extents: list[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """Extents with the holes between them that are not worth a cut filled in."""
    joined: list[tuple[int, int]] = []
    for start, end in extents:
        above = joined[-1][1] if joined else 0
        if start - above < _CDC_HOLE_BYTES_MIN:
            start = joined.pop()[0] if joined else 0
        joined.append((start, end))
    if joined and size - joined[-1][1] < _CDC_HOLE_BYTES_MIN:
        joined[-1] = (joined[-1][0], size)
    return joined


def _maximal(spans: Iterator[Span]) -> Iterator[Span]:
    """The same spans with neighbouring zero runs joined."""
    zeros = 0
    for span in spans:
        if span.chunk == ZERO_RUN:
            zeros += span.length
            continue
        if zeros:
            yield Span(zeros, ZERO_RUN)
            zeros = 0
        yield span
    if zeros:
        yield Span(zeros, ZERO_RUN)


def _chained(first: Span, rest: Iterator[Span]) -> Iterator[Span]:
    yield first
    yield from rest


# --- checking ----------------------------------------------------------------------------------


def check_content(reader: ChunkReader, entry: Entry) -> Generator[None, None, None]:
    """Check in small steps that a file entry's size and content are what its chunks say.

    Aligned chunks of a segment count by their ids alone, so that a file in fixed layout is not
    read; others are, one chunk at a time. That a chunk is as long as its span is for the caller
    to check where the chunk is not read.

    Raises:
        BadObject: they are not. ObjectMissing, HashMismatch: a page or chunk cannot be read.
    """
    if entry.layout in (Layout.EMPTY, Layout.ZERO):
        return  # decoding an entry checks all there is
    if entry.layout is Layout.SINGLE:
        if entry.size > SEGMENT_BYTES:
            raise BadObject(f"a file of {entry.size} bytes is no single segment")
        return
    hasher = FileHasher()
    zeros = 0
    for number, span in enumerate(file_spans(reader, entry)):
        if number % SPANS_PER_STEP == 0:
            yield
        if span.chunk == ZERO_RUN:
            zeros += span.length
            _check_zeros(zeros, entry.size)
            hasher.add_zeros(span.length)
        elif hasher.is_aligned and _is_segment(span, entry.size - hasher.size):
            hasher.add_segment_hash(span.chunk, span.length)
        else:
            hasher.update(_chunk_of(reader, span))
    if hasher.content() != entry.content:
        raise BadObject("a file's content id is not what its chunks say")


def _is_segment(span: Span, left: int) -> bool:
    """Is the span, which begins a segment, the whole of it, `left` bytes before the file's end?"""
    return span.length == min(SEGMENT_BYTES, left)


def _check_zeros(zeros: int, size: int) -> None:
    if zeros == size:
        raise BadObject("a file of zeros only has a manifest")
    if zeros > SPARSE_BYTES_MAX:
        raise BadObject(f"a file with more than {SPARSE_BYTES_MAX} bytes of holes")


def _chunk_of(reader: ChunkReader, span: Span) -> bytes:
    data = reader.read(Kind.CHUNK, span.chunk)
    if len(data) != span.length:
        raise BadObject("a chunk is not as long as its span")
    return data
