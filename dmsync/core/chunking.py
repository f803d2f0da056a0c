"""Where files are cut into chunks, and what identifies them however they are cut.

Source: protocol/OBJECTS.md 3 and protocol/PACKS.md 6.
"""

from functools import cache
from typing import TYPE_CHECKING, Final

from blake3 import blake3

from dmsync.core.ids import CONTENT_CONTEXT, ObjectId
from dmsync.core.objects import Layout

if TYPE_CHECKING:
    from pyfastcdc import FastCDC

SEGMENT_BYTES: Final = 128 * 1024
"""Unit of a file's content id; part of the format."""
FIXED_CHUNK_BYTES: Final = 128 * 1024
"""Of 64, 128 and 256 KiB the one with the least bytes stored and read
(protocol/decisions/0001-pack-format.md)."""
CDC_BYTES_MIN: Final = 32 * 1024
CDC_BYTES_AVERAGE: Final = 96 * 1024
CDC_BYTES_MAX: Final = 512 * 1024
_DATABASE_PAGE_BYTES: Final = 4096
_ZEROS: Final = bytes(SEGMENT_BYTES)
_ZERO_SEGMENT: Final = blake3(_ZEROS).digest()
_SEGMENTS_JOINED: Final = 4096
"""Equal segments whose hashes are hashed at once: half a GiB of zeros."""


@cache
def cutter(*, low: int, average: int, high: int) -> "FastCDC":
    """Cuts content into pieces of these numbers of bytes."""
    from pyfastcdc import FastCDC  # slow to import, and most commands cut nothing

    # Without its compiled class pyfastcdc silently runs at half a percent of the speed.
    assert FastCDC.__module__ == "pyfastcdc.cy.fastcdc", "pyfastcdc has no compiled class here"
    return FastCDC(avg_size=average, min_size=low, max_size=high)


def choose_layout(size: int, *, previous: Layout | None) -> Layout:
    """How a file of `size` bytes is cut.

    A long file keeps the cuts it had, so that its chunks stay the same. New ones that are whole
    database pages get aligned chunks (half the new bytes when pages change in place), others
    content-defined ones (60 times fewer when bytes shift).
    """
    if size == 0:
        return Layout.EMPTY
    if size <= FIXED_CHUNK_BYTES:
        return Layout.SINGLE
    if previous in (Layout.FIXED, Layout.CDC):
        return previous
    return Layout.FIXED if size % _DATABASE_PAGE_BYTES == 0 else Layout.CDC


def cdc_cuts(buffer: bytes | memoryview, *, final: bool) -> list[int]:
    """Lengths of the content-defined chunks at the start of `buffer`, in order.

    Unless `final`, what follows the last certain cut is left out: give it again at the start of
    the next buffer. The cuts of a file do not depend on how it was split into buffers.
    """
    cuts = cutter(low=CDC_BYTES_MIN, average=CDC_BYTES_AVERAGE, high=CDC_BYTES_MAX)
    lengths = [chunk.length for chunk in cuts.cut_buf(buffer)]
    if not final and lengths:
        lengths.pop()
    return lengths


def is_zero(data: bytes | memoryview) -> bool:
    """True when every byte is zero (also for no bytes)."""
    if len(data) <= len(_ZEROS):
        return data == _ZEROS[: len(data)]
    return not any(memoryview(data)[:64]) and data == bytes(len(data))


class FileHasher:
    """The content id of one file, from its bytes in order, split in any way."""

    def __init__(self) -> None:
        self._size = 0
        self._segment = blake3()
        self._segment_filled = 0
        self._segments = 0
        self._first = b""
        """Hash of the first segment: alone, it is the content id."""
        self._joined = blake3(derive_key_context=CONTENT_CONTEXT)

    @property
    def size(self) -> int:
        return self._size

    @property
    def is_aligned(self) -> bool:
        """True at the start of a segment, where add_segment_hash may be used."""
        return self._segment_filled in (0, SEGMENT_BYTES)

    def update(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        self._size += len(view)
        while len(view):
            if self._segment_filled == SEGMENT_BYTES:
                self._end_segment()
            part = view[: SEGMENT_BYTES - self._segment_filled]
            self._segment.update(part)
            self._segment_filled += len(part)
            view = view[len(part) :]

    def add_segment_hash(self, digest: bytes, length: int) -> None:
        """Add a whole aligned segment (the last may be short) whose BLAKE3 is already known."""
        assert self.is_aligned, "segments are aligned"
        if self._segment_filled:
            self._end_segment()
        self._add_segments(digest, 1)
        self._size += length

    def add_zeros(self, length: int) -> None:
        """Add a run of zeros of any length without hashing whole segments of it."""
        if not self.is_aligned:
            part = min(length, SEGMENT_BYTES - self._segment_filled)
            self.update(memoryview(_ZEROS)[:part])
            length -= part
        whole, rest = divmod(length, SEGMENT_BYTES)
        if whole:
            if self._segment_filled:
                self._end_segment()
            self._add_segments(_ZERO_SEGMENT, whole)
            self._size += whole * SEGMENT_BYTES
        if rest:
            self.update(memoryview(_ZEROS)[:rest])

    def content(self) -> ObjectId:
        """The content id of everything given so far; more may follow."""
        if self._segments == 0:
            return ObjectId(self._segment.digest())
        if self._segment_filled == 0:
            return ObjectId(self._first if self._segments == 1 else self._joined.digest())
        joined = self._joined.copy()
        joined.update(self._segment.digest())
        return ObjectId(joined.digest())

    def _add_segments(self, digest: bytes, count: int) -> None:
        """`count` segments in a row that all have this hash."""
        if self._segments == 0:
            self._first = digest
        self._segments += count
        while count > 0:
            self._joined.update(digest * min(count, _SEGMENTS_JOINED))
            count -= _SEGMENTS_JOINED

    def _end_segment(self) -> None:
        self._add_segments(self._segment.digest(), 1)
        self._segment = blake3()
        self._segment_filled = 0
