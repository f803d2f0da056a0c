"""What becomes of a run of a file: read, cut into aligned chunks, hashed, compared with the chunks
it replaces, and what is new put into its stored form.

The part of reading a file that needs nothing but the run: for any thread, or another process.
"""

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from blake3 import blake3

from dmsync.core.chunking import FIXED_CHUNK_BYTES
from dmsync.core.ids import ObjectId
from dmsync.core.pages import ZERO_RUN, Span
from dmsync.engine.file_blocks import READ_BYTES, read_into
from dmsync.storage.chunk_forms import ChunkForms, NewChunk, PreparedChunk
from dmsync.storage.detached_reading import DetachedReader
from dmsync.storage.stages import stage

_ZEROS: Final = bytes(FIXED_CHUNK_BYTES)


class Block(NamedTuple):
    """A run of aligned chunks; `before` are the old file's chunks at their places."""

    offset: int
    length: int
    before: Sequence[ObjectId | None]


class BlockContent(NamedTuple):
    """What became of a run: its spans, the new chunks in it, bytes unlike the old file's."""

    spans: list[Span]
    prepared: list[PreparedChunk]
    bytes_differing: int


Prepare = Callable[[list[list[NewChunk]]], list[PreparedChunk]]
"""Puts chunks, of each READ_BYTES those that are new, into the form that they are stored in."""


def read_block(fd: int, block: Block, buffer: bytearray, prepare: Prepare) -> BlockContent:
    """Read a block into `buffer`. Raises FileMoved, OSError, and what `prepare` does."""
    view = memoryview(buffer)
    with stage("read"):
        read_into(fd, block.offset, view[: block.length])
    with stage("hash"):
        spans = aligned_spans(buffer, block.length)
    runs: list[list[NewChunk]] = []
    differing = start = 0
    for span, before in zip(spans, block.before, strict=True):
        if start % READ_BYTES == 0:
            runs.append([])
        if span.chunk != before:
            differing += span.length
            if span.chunk != ZERO_RUN:
                base = None if before == ZERO_RUN else before
                runs[-1].append(NewChunk(span.chunk, view[start : start + span.length], base))
        start += span.length
    return BlockContent(spans, prepare([run for run in runs if run]), differing)


def aligned_spans(data: bytes | bytearray, length: int) -> list[Span]:
    """Spans of the aligned chunks in the first `length` bytes."""
    view = memoryview(data)
    spans = []
    for start in range(0, length, FIXED_CHUNK_BYTES):
        size = min(FIXED_CHUNK_BYTES, length - start)
        # Compares in place: a comparison of views goes byte by byte.
        if data.startswith(_ZEROS if size == FIXED_CHUNK_BYTES else _ZEROS[:size], start):
            spans.append(Span(size, ZERO_RUN))
        else:
            spans.append(Span(size, ObjectId(blake3(view[start : start + size]).digest())))
    return spans


class ForkedBlockReading:
    """`read_block` for blocks of changed files, in a process forked from one that has the store."""

    def __init__(self, dot_dir: str) -> None:
        self._dot_dir = dot_dir
        self._forms: ChunkForms | None = None
        self._buffer = bytearray()

    def __call__(self, fds: Sequence[int], block: Block) -> BlockContent:
        """Of the one file. Raises whatever reading does, and Undecided."""
        if self._forms is None:
            self._forms = ChunkForms(DetachedReader(self._dot_dir), is_empty=False)
        if len(self._buffer) < block.length:
            self._buffer = bytearray(block.length)
        forms = self._forms
        (fd,) = fds
        return read_block(fd, block, self._buffer, lambda runs: forms.prepare(runs, similar=True))
