"""The bytes of one open file: where its data and holes are, and reading it block by block."""

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from dmsync.core.chunking import FIXED_CHUNK_BYTES
from dmsync.core.ids import ObjectId
from dmsync.core.objects import Entry, Layout
from dmsync.core.pages import ZERO_RUN, PageReader, Span, file_spans

READ_BYTES: Final = 16 * FIXED_CHUNK_BYTES
_CDC_HOLE_BYTES_MIN: Final = 1024 * 1024
"""Holes of content-defined files shorter than this are read as zeros."""


class FileMoved(Exception):
    """The file became shorter while it was read."""


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


def without_short_holes(extents: list[tuple[int, int]], size: int) -> list[tuple[int, int]]:
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


def read_exactly(fd: int, offset: int, length: int) -> bytes:
    """`length` bytes at `offset`. Raises FileMoved when the file ends before, OSError."""
    data = os.pread(fd, length, offset)
    while len(data) < length:
        more = os.pread(fd, length - len(data), offset + len(data))
        if not more:
            raise FileMoved
        data += more
    return data


def read_into(fd: int, offset: int, block: memoryview) -> None:
    """Fill `block` with the file's bytes at `offset`. Raises FileMoved, OSError."""
    filled = 0
    while filled < len(block):
        got = os.preadv(fd, [block[filled:]], offset + filled)
        if got == 0:
            raise FileMoved
        filled += got


def buffers(fd: int, offset: int, length: int, block_bytes: int) -> Iterator[memoryview]:
    """The file's bytes in views of up to `block_bytes`, valid until the next one.

    Raises:
        FileMoved: the file ends before `offset + length`.
    """
    block = memoryview(bytearray(min(block_bytes, length)))
    while length > 0:
        wanted = min(len(block), length)
        read_into(fd, offset, block[:wanted])
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
