"""Reads one open file into chunks and manifest pages, and gives its content identity.

Holes are never read, zero runs are never stored, and a chunk that equals the old file's chunk at
the same place is not offered to the writer at all. Files longer than one block are read, hashed and
put into their stored form by several threads, or processes where they replace something, block by
block; small ones are read at once, and the chunks of many of them are put into their stored form
together. Results are taken in order, so what is stored does not depend on who did it.
"""

import os
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from types import TracebackType
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol, Self

from blake3 import blake3

from dmsync.core.chunking import (
    FIXED_CHUNK_BYTES,
    SEGMENT_BYTES,
    FileHasher,
    cdc_cuts,
    choose_layout,
    is_zero,
)
from dmsync.core.ids import Kind, ObjectId, object_id
from dmsync.core.objects import HOLES_BYTES_MAX, Entry, Layout
from dmsync.core.pages import (
    MANIFEST,
    ZERO_RUN,
    PageBases,
    PageReader,
    PageWriter,
    Span,
    write_manifest,
)
from dmsync.engine.block_content import (
    Block,
    BlockContent,
    ForkedBlockReading,
    aligned_spans,
    read_block,
)
from dmsync.engine.file_blocks import (
    READ_BYTES,
    OldSpans,
    Region,
    buffers,
    data_extents,
    read_exactly,
    regions,
    without_short_holes,
)
from dmsync.engine.forking import may_fork
from dmsync.engine.ordered_jobs import OrderedJobs
from dmsync.engine.progress import SILENT, Progress
from dmsync.storage.chunk_forms import NewChunk, PreparedChunk
from dmsync.storage.pack_writer import PackWriter
from dmsync.storage.stages import stage

if TYPE_CHECKING:
    from concurrent.futures import Future

    from dmsync.engine.worker_processes import WorkerProcesses

    _BlockProcesses = WorkerProcesses[Block, BlockContent]

assert FIXED_CHUNK_BYTES == SEGMENT_BYTES, "a chunk's id is its segment's hash"
CHANGED_THREADS: Final = 1
"""Storing what replaces something follows chains of small deltas, mostly under Python's lock: a
second thread doubles the CPU time, and the time passed, by handing that lock to and fro."""
BLOCKS_AHEAD: Final = 6
"""Blocks read beyond the one whose turn it is: work for three threads while one block is late."""
BATCH_BYTES: Final = 2 * 1024 * 1024
"""Chunks of small files that are put into their stored form together."""
_BATCH_CHUNKS_MAX: Final = 4096
BATCHES_AHEAD: Final = 4
_IDS_REMEMBERED: Final = 65_536
_FORKED_BYTES_MIN: Final = 8 * READ_BYTES
"""A changed region of this length pays for forking: some 5 ms."""
_FORKED_BLOCK_BYTES: Final = 4 * READ_BYTES
"""Chains of neighbouring chunks are walked together, which halves what each takes."""
_BLOCKS_MIN: Final = 8
"""A shorter region is cut into so many blocks, so that all processes have some."""


class ChunkReader(PageReader, Protocol):
    def read(self, kind: Kind, oid: ObjectId) -> bytes:
        """Verified bytes of an object. Raises ObjectMissing, HashMismatch."""
        ...


class ChunkWriter(PageWriter, Protocol):
    def prepare(self, runs: Sequence[Sequence[NewChunk]], *, similar: bool) -> list[PreparedChunk]:
        """The form each chunk will be stored in, without those that are stored; any thread. A run
        is what lies together in a file."""
        ...

    def put_prepared(self, chunks: Sequence[PreparedChunk]) -> None:
        """Store prepared chunks; one thread. Raises StorageFull, StorageFailed."""
        ...


class TooLarge(Exception):
    """A file with holes whose apparent size cannot be hashed in finite time."""


class FileContent(NamedTuple):
    """What Entry says of a file's bytes. `tree` is None without a writer."""

    size: int
    content: bytes
    layout: Layout
    tree: ObjectId | None
    sparse: bool


class _Cut(NamedTuple):
    """Bytes and the lengths of the chunks they are cut into."""

    data: bytes
    lengths: Sequence[int]
    offered: set[ObjectId]


class ContentReader:
    """Reads files into `writer`, or only hashes them when that is None.

    `incremental` says that an older state exists, so that new chunks look for similar pages. What
    was read is with the writer once `finish` has returned. Context manager: it finishes unless
    there was an error; either way nothing is left running.
    """

    def __init__(
        self,
        store: PageReader,
        writer: ChunkWriter | None,
        *,
        incremental: bool,
        threads: int | None = None,
        progress: Progress = SILENT,
    ) -> None:
        self._store = store
        self._writer = writer
        self._incremental = incremental
        self._may_fork = incremental and isinstance(writer, PackWriter) and threads is None
        self._processes: _BlockProcesses | None = None
        if threads is None and incremental and writer is not None:
            threads = CHANGED_THREADS
        self._jobs = OrderedJobs(threads)
        self._batch: list[NewChunk] = []
        self._batch_bytes = 0
        self._batches: deque[Future[list[PreparedChunk]]] = deque()
        self._offered: set[ObjectId] = set()
        """Chunks that the writer has or will get: they are not prepared again."""
        self._idle_buffers: list[bytearray] = []
        self._progress = progress
        self._files_passed = 0
        self._bytes_passed = 0
        """Of the files read so far and the one being read, holes included."""
        self.bytes_hashed = 0
        self.bytes_differing = 0
        """Bytes of chunks that the old file does not have at the same place."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self.close()

    def finish(self) -> None:
        """Give the writer what still waits. Raises StorageFull, StorageFailed."""
        if self._writer is None:
            return
        while self._batches:
            self._writer.put_prepared(self._batches.popleft().result())
        if self._batch:
            batch, self._batch, self._batch_bytes = self._batch, [], 0
            self._writer.put_prepared(
                self._writer.prepare(_each_alone(batch), similar=self._incremental)
            )

    def close(self) -> None:
        """Stop threads and processes; what still waits is dropped."""
        self._batches.clear()
        self._batch.clear()
        self._jobs.close()
        if self._processes is not None:
            self._processes.close()
            self._processes = None

    def read(self, fd: int, found: os.stat_result, old: Entry | None) -> FileContent:
        """Read the regular file `fd` of `found.st_size` bytes, `old` being what it replaces.

        Raises:
            FileMoved: it became shorter. TooLarge: its holes cannot be hashed. OSError: a read
            failed.
        """
        end = self._bytes_passed + found.st_size
        content = self._read(fd, found, old)
        self._bytes_passed = end
        self._files_passed += 1
        self._progress.reached(end, self._files_passed)
        return content

    def _read(self, fd: int, found: os.stat_result, old: Entry | None) -> FileContent:
        size = found.st_size
        if size == 0:
            return FileContent(0, b"", Layout.EMPTY, None, sparse=False)
        extents = [(0, size)]
        if found.st_blocks * 512 < size:
            extents = list(data_extents(fd, size))
        elif size <= FIXED_CHUNK_BYTES:
            return self._read_single(fd, size, old)
        sparse = extents != [(0, size)]
        if not extents:
            self._count_zeros(size, old)
            return FileContent(size, b"", Layout.ZERO, None, sparse=True)
        if size > HOLES_BYTES_MAX and sparse:
            raise TooLarge
        if size > READ_BYTES:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        layout = choose_layout(size, previous=old.layout if old is not None else None)
        hasher = FileHasher()
        if layout is Layout.CDC:
            spans = self._shifting_spans(fd, size, extents, hasher)
        else:
            spans = self._aligned_spans(fd, size, extents, hasher, old)
        with closing(spans):  # nobody reads the file any more when its descriptor is closed
            return self._finish(_maximal(spans), size, layout, sparse, hasher, old)

    def _read_single(self, fd: int, size: int, old: Entry | None) -> FileContent:
        """A file of one chunk without holes: nearly every file of most trees."""
        data = read_exactly(fd, 0, size)
        self.bytes_hashed += size
        before: bytes | None = None
        if old is not None:
            is_single = old.layout is Layout.SINGLE
            before = old.content if is_single else OldSpans(self._store, old).at(0)
        if not data[0] and is_zero(data):
            if before != ZERO_RUN:
                self.bytes_differing += size
            return FileContent(size, b"", Layout.ZERO, None, sparse=False)
        chunk = ObjectId(blake3(data).digest())
        if chunk != before:
            self.bytes_differing += size
            base = None if before is None or before == ZERO_RUN else ObjectId(before)
            self._offer(NewChunk(chunk, data, base))
        return FileContent(size, chunk, Layout.SINGLE, None, sparse=False)

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

    # --- new chunks ------------------------------------------------------------------------------

    def _offer(self, chunk: NewChunk) -> None:
        """Let the writer have a chunk, by and by, together with others."""
        if self._writer is None or chunk.id in self._offered:
            return
        self._note_offered(chunk.id)
        self._batch.append(chunk)
        self._batch_bytes += len(chunk.data)
        if self._batch_bytes < BATCH_BYTES and len(self._batch) < _BATCH_CHUNKS_MAX:
            return
        batch, self._batch, self._batch_bytes = self._batch, [], 0
        prepare = self._writer.prepare
        self._batches.append(
            self._jobs.start(prepare, _each_alone(batch), similar=self._incremental)
        )
        # By their number, not by which are done: the order in the pack is always the same.
        if len(self._batches) > BATCHES_AHEAD:
            self._writer.put_prepared(self._batches.popleft().result())

    def _note_offered(self, chunk: ObjectId) -> None:
        if len(self._offered) >= _IDS_REMEMBERED:
            self._offered = set()  # jobs go on with the one they were given
        self._offered.add(chunk)

    def _take(self, done: BlockContent) -> list[Span]:
        self.bytes_differing += done.bytes_differing
        self._bytes_passed += sum(span.length for span in done.spans)
        self._progress.reached(self._bytes_passed, self._files_passed)
        if self._writer is not None and done.prepared:
            # What was offered meanwhile is stored as it was there, whoever prepared it here too.
            new = [chunk for chunk in done.prepared if chunk.id not in self._offered]
            self._writer.put_prepared(new)
            for chunk in new:
                self._note_offered(chunk.id)
        return done.spans

    def _prepare(self, runs: list[list[NewChunk]], offered: set[ObjectId]) -> list[PreparedChunk]:
        """On any thread. Skips what is in `offered`: the writer surely gets it."""
        new = [[chunk for chunk in run if chunk.id not in offered] for run in runs]
        if self._writer is None or not any(new):
            return []
        return self._writer.prepare(new, similar=self._incremental)

    # --- aligned chunks --------------------------------------------------------------------------

    def _aligned_spans(
        self,
        fd: int,
        size: int,
        extents: list[tuple[int, int]],
        hasher: FileHasher,
        old: Entry | None,
    ) -> Generator[Span, None, None]:
        before = OldSpans(self._store, old)
        for region in regions(iter(extents), size, FIXED_CHUNK_BYTES):
            if region.is_hole:
                hasher.add_zeros(region.length)
                yield Span(region.length, ZERO_RUN)
                continue
            self.bytes_hashed += region.length
            if region.length <= READ_BYTES:
                (block,) = self._blocks(region, before, READ_BYTES)
                spans = self._read_here(fd, block)
                _hash_spans(hasher, spans)
                yield from spans
                continue
            with closing(self._read_blocks(fd, region, before)) as results:
                for done in results:
                    spans = self._take(done)
                    _hash_spans(hasher, spans)
                    yield from spans

    def _read_blocks(
        self, fd: int, region: Region, before: OldSpans
    ) -> Generator[BlockContent, None, None]:
        """What becomes of a region's blocks, in order: in several processes or on threads."""
        processes = self._worker_processes(region)
        offered = self._offered
        if processes is not None:
            length = min(max(region.length // _BLOCKS_MIN, READ_BYTES), _FORKED_BLOCK_BYTES)
            blocks = self._blocks(region, before, length // READ_BYTES * READ_BYTES)
            return processes.map(
                (((fd,), block) for block in blocks),
                lambda _, block: self._read_block(fd, block, offered),
            )
        blocks = self._blocks(region, before, READ_BYTES)
        return self._jobs.map(
            lambda block: self._read_block(fd, block, offered), blocks, ahead=BLOCKS_AHEAD
        )

    def _worker_processes(self, region: Region) -> "_BlockProcesses | None":
        """Processes for what replaces something, once a region pays for them; else None."""
        if self._processes is None and self._may_fork and region.length >= _FORKED_BYTES_MIN:
            self._may_fork = False
            self._processes = self._forked()
        return self._processes

    def _forked(self) -> "_BlockProcesses | None":
        assert isinstance(self._writer, PackWriter)
        if not may_fork():
            return None
        for batch in self._batches:
            batch.exception()  # waits: our own thread is not in a database either
        from dmsync.engine.worker_processes import WorkerProcesses  # slow to import

        return WorkerProcesses(ForkedBlockReading(self._writer.dot_dir))

    def _blocks(self, region: Region, before: OldSpans, block_bytes: int) -> Iterator[Block]:
        end = region.offset + region.length
        for start in range(region.offset, end, block_bytes):
            length = min(block_bytes, end - start)
            old = [before.at(start + done) for done in range(0, length, FIXED_CHUNK_BYTES)]
            yield Block(start, length, old)

    def _read_here(self, fd: int, block: Block) -> list[Span]:
        with stage("hash"):
            data = read_exactly(fd, block.offset, block.length)
            spans = aligned_spans(data, block.length)
        start = 0
        for span, before in zip(spans, block.before, strict=True):
            if span.chunk != before:
                self.bytes_differing += span.length
                if span.chunk != ZERO_RUN:
                    base = None if before == ZERO_RUN else before
                    self._offer(NewChunk(span.chunk, data[start : start + span.length], base))
            start += span.length
        return spans

    def _read_block(self, fd: int, block: Block, offered: set[ObjectId]) -> BlockContent:
        """On any thread. Chunks in `offered` are skipped: the writer surely gets them."""
        try:
            buffer = self._idle_buffers.pop()
        except IndexError:
            buffer = bytearray(READ_BYTES)
        if len(buffer) < block.length:
            buffer = bytearray(block.length)
        done = read_block(fd, block, buffer, lambda runs: self._prepare(runs, offered))
        self._idle_buffers.append(buffer)
        return done

    # --- content-defined chunks ------------------------------------------------------------------

    def _shifting_spans(
        self, fd: int, size: int, extents: list[tuple[int, int]], hasher: FileHasher
    ) -> Generator[Span, None, None]:
        large_holes = without_short_holes(extents, size)
        for region in regions(iter(large_holes), size, FIXED_CHUNK_BYTES):
            if region.is_hole:
                hasher.add_zeros(region.length)
                yield Span(region.length, ZERO_RUN)
                continue
            self.bytes_hashed += region.length
            if region.length <= READ_BYTES:
                yield from self._cut_here(read_exactly(fd, region.offset, region.length), hasher)
                continue
            cuts = self._cuts(fd, region, hasher)
            with closing(self._jobs.map(self._read_cut, cuts, ahead=BLOCKS_AHEAD)) as results:
                for done in results:
                    yield from self._take(done)

    def _cuts(self, fd: int, region: Region, hasher: FileHasher) -> Iterator[_Cut]:
        """The region's bytes, hashed as part of the file, in runs of whole chunks."""
        rest = b""
        left = region.length
        for block in buffers(fd, region.offset, region.length, READ_BYTES):
            hasher.update(block)
            left -= len(block)
            waiting = b"".join((rest, block))
            lengths = cdc_cuts(waiting, final=left == 0)
            if lengths:
                yield _Cut(waiting, lengths, self._offered)
            rest = waiting[sum(lengths) :]

    def _cut_here(self, data: bytes, hasher: FileHasher) -> Iterator[Span]:
        with stage("hash"):
            hasher.update(data)
            lengths = cdc_cuts(data, final=True)
        start = 0
        for length in lengths:
            part = data[start : start + length]
            start += length
            self.bytes_differing += length
            if is_zero(part):
                yield Span(length, ZERO_RUN)
            else:
                chunk = object_id(Kind.CHUNK, part)
                self._offer(NewChunk(chunk, part, None))
                yield Span(length, chunk)

    def _read_cut(self, cut: _Cut) -> BlockContent:
        """On any thread."""
        view = memoryview(cut.data)
        spans = []
        new = []
        start = 0
        with stage("hash"):
            for length in cut.lengths:
                part = view[start : start + length]
                start += length
                if is_zero(part):
                    spans.append(Span(length, ZERO_RUN))
                else:
                    chunk = object_id(Kind.CHUNK, part)
                    new.append(NewChunk(chunk, part, None))
                    spans.append(Span(length, chunk))
        return BlockContent(spans, self._prepare([new], cut.offered), start)


def _each_alone(chunks: Sequence[NewChunk]) -> list[list[NewChunk]]:
    """Runs of small files: what became of one says nothing about the next."""
    return [[chunk] for chunk in chunks]


def _hash_spans(hasher: FileHasher, spans: Sequence[Span]) -> None:
    for span in spans:
        if span.chunk == ZERO_RUN:
            hasher.add_zeros(span.length)
        else:
            hasher.add_segment_hash(span.chunk, span.length)


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
