"""Writes large aligned files block by block, in forked processes: undoing chains of deltas holds
Python's lock most of the time, so that threads would only take turns.

What a process leaves undone (engine.worker_processes) is read and written here.
"""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from itertools import chain
from typing import Final, NamedTuple, Protocol

from dmsync.core.chunking import FIXED_CHUNK_BYTES
from dmsync.core.ids import Kind, ObjectId
from dmsync.core.objects import Entry
from dmsync.core.pages import ZERO_RUN, Span
from dmsync.engine.restoring.file_writing import (
    BatchReader,
    FileJob,
    check_length,
    write_at,
    write_where_different,
)
from dmsync.engine.worker_processes import WorkerProcesses
from dmsync.storage.detached_reading import DetachedReader
from dmsync.storage.direct_files import (
    ALIGNMENT,
    REFUSALS,
    aligned_buffer,
    opened_directly,
)
from dmsync.storage.stages import stage

FILE_BYTES_MIN: Final = 16 * 1024 * 1024
"""A file of this length pays for forking: some 5 ms."""
BLOCK_CHUNKS: Final = 128
"""Chunks of a block, 16 MiB, of a file that is longer than a batch."""
BATCH_BYTES: Final = 4 * BLOCK_CHUNKS * FIXED_CHUNK_BYTES
"""Shorter files are written so many together: files of a log, that are, hold pages of the same
tables, whose chains are then undone once."""
BATCH_CHUNKS: Final = 4 * (BLOCK_CHUNKS + 1)
"""And blocks, which take their place in a message: so many surely fit."""
_BATCHES_AHEAD: Final = 16
"""What keeps processes busy while one of them has a long batch; their files are open meanwhile."""


class Block(NamedTuple):
    """Neighbouring chunks of a batch's file number `file`, the first one at `offset`. `is_new`: the
    file holds nothing there yet; else only the pages that differ are written."""

    file: int
    offset: int
    spans: Sequence[Span]
    is_new: bool


class BlockJob(FileJob, Protocol):
    """A file whose parts may be written in any order. `spans` and `write` as ever."""

    is_new: bool
    entry: Entry

    def begin(self) -> int:
        """The descriptor to write on, open until `finish` or `abandon`."""
        ...

    def wrote(self, count: int) -> None:
        """So many bytes of it were written."""
        ...


Batch = Sequence[Block]
BlockProcesses = WorkerProcesses[Batch, list[int]]


class BlockWriter:
    """Writes blocks of several files, one at a time."""

    def __init__(self) -> None:
        self._buffer: memoryview | None = None

    def write(self, fds: Sequence[int], batch: Batch, contents: Iterator[bytes]) -> list[int]:
        """Write what the chunks of the blocks hold; bytes written of each. Raises OSError,
        BadObject, and what `contents` raises."""
        return [self._write_block(fds[block.file], block, contents) for block in batch]

    def _write_block(self, fd: int, block: Block, contents: Iterator[bytes]) -> int:
        checked = _checked(block, contents)
        if block.is_new:
            return self._write_new(fd, block.offset, checked)
        written = 0
        offset = block.offset
        for content in checked:
            written += write_where_different(fd, content, offset)
            offset += len(content)
        return written

    def _write_new(self, fd: int, offset: int, contents: Iterator[bytes]) -> int:
        """Past the page cache as far as the bytes are aligned and the filesystem can."""
        if self._buffer is None:
            self._buffer = aligned_buffer()
        view = self._buffer
        # Opened anew: a flag set on `fd` itself would be everybody's who shares it.
        direct_fd = opened_directly(fd, os.O_WRONLY)
        start, held = offset, 0
        try:
            for content in contents:
                if held + len(content) > len(view):
                    _write_aligned(fd, direct_fd, view[:held], offset)
                    offset, held = offset + held, 0
                view[held : held + len(content)] = content
                held += len(content)
            _write_aligned(fd, direct_fd, view[:held], offset)
        finally:
            if direct_fd >= 0:
                os.close(direct_fd)
        return offset + held - start


class ForkedBlockWriting:
    """What a forked process does with a block: reads its chunks and writes them."""

    def __init__(self, dot_dir: str) -> None:
        self._dot_dir = dot_dir
        self._reader: DetachedReader | None = None
        self._writer = BlockWriter()

    def __call__(self, fds: Sequence[int], batch: Batch) -> list[int]:
        """Bytes written of each block. Raises Undecided, OSError."""
        if self._reader is None:
            self._reader = DetachedReader(self._dot_dir)
        found = self._reader.find_many(Kind.CHUNK, _chunks(batch))
        with stage("decode"):
            return self._writer.write(fds, batch, (one.data for one in found))


def write_in_blocks(
    reader: BatchReader, jobs: Sequence[BlockJob], processes: BlockProcesses
) -> None:
    """Do all jobs. Those not finished when one fails are abandoned.

    Raises:
        BadObject, ObjectMissing, HashMismatch: a file is not sound. OSError.
    """
    # Batches of several files first: they take longest, and blocks of large files fill the rest.
    short = [job for job in jobs if job.entry.size < BATCH_BYTES]
    ordered = short + [job for job in jobs if job.entry.size >= BATCH_BYTES]
    waiting = deque(ordered)
    planned: deque[Sequence[BlockJob]] = deque()
    writer = BlockWriter()

    def batches() -> Iterator[tuple[Sequence[int], Batch]]:
        for together in _together(ordered):
            fds = [job.begin() for job in together]
            blocks = [_blocks(job, number) for number, job in enumerate(together)]
            chunks_max = BLOCK_CHUNKS if len(together) == 1 else BATCH_CHUNKS
            for batch in _batches(chain.from_iterable(blocks), chunks_max):
                planned.append([together[block.file] for block in batch])
                yield fds, batch

    def write_here(fds: Sequence[int], batch: Batch) -> list[int]:
        return writer.write(fds, batch, reader.read_many(Kind.CHUNK, _chunks(batch)))

    def finish_before(job: BlockJob | None) -> None:
        while waiting and waiting[0] is not job:
            waiting[0].finish()
            waiting.popleft()

    try:
        with closing(processes.map(batches(), write_here, ahead=_BATCHES_AHEAD)) as results:
            for counts in results:
                for job, count in zip(planned.popleft(), counts, strict=True):
                    finish_before(job)
                    job.wrote(count)
        finish_before(None)
    except BaseException:
        for job in waiting:
            job.abandon()
        raise


def _together(jobs: Sequence[BlockJob]) -> Iterator[list[BlockJob]]:
    """Short files that make up a batch, and long ones each alone."""
    group: list[BlockJob] = []
    group_bytes = 0
    for job in jobs:
        if group and group_bytes + job.entry.size > BATCH_BYTES:
            yield group
            group, group_bytes = [], 0
        group.append(job)
        group_bytes += job.entry.size
    if group:
        yield group


def _blocks(job: BlockJob, number: int) -> Iterator[Block]:
    """What is to be written, cut into blocks; runs of zeros are written at once."""
    start = end = 0
    spans: list[Span] = []
    for offset, span in job.spans():
        if spans and (offset != end or span.chunk == ZERO_RUN or len(spans) == BLOCK_CHUNKS):
            yield Block(number, start, spans, job.is_new)
            spans = []
        if span.chunk == ZERO_RUN:
            job.write(offset, span, None)
            continue
        if not spans:
            start = offset
        spans.append(span)
        end = offset + span.length
    if spans:
        yield Block(number, start, spans, job.is_new)


def _batches(blocks: Iterable[Block], chunks_max: int) -> Iterator[list[Block]]:
    batch: list[Block] = []
    chunks = 0
    for block in blocks:
        count = len(block.spans) + 1  # short blocks take their place in a message too
        if batch and chunks + count > chunks_max:
            yield batch
            batch, chunks = [], 0
        batch.append(block)
        chunks += count
    if batch:
        yield batch


def _chunks(batch: Batch) -> list[ObjectId]:
    return [span.chunk for block in batch for span in block.spans]


def _checked(block: Block, contents: Iterator[bytes]) -> Iterator[bytes]:
    """As many of `contents` as the block has chunks. Raises BadObject."""
    for span in block.spans:
        content = next(contents)
        check_length(span, content)
        yield content


def _write_aligned(fd: int, direct_fd: int, part: memoryview, offset: int) -> None:
    """Write a part of a file, its whole pages on `direct_fd` unless that is -1. Raises OSError."""
    whole = 0
    if direct_fd >= 0 and offset % ALIGNMENT == 0:
        whole = len(part) - len(part) % ALIGNMENT
        try:
            write_at(direct_fd, part[:whole], offset)
        except OSError as exc:
            if exc.errno not in REFUSALS:
                raise
            whole = 0
    if whole < len(part):
        write_at(fd, part[whole:], offset + whole)
