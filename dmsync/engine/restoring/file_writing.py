"""Writes the content of regular files: new ones whole, changed ones where they differ.

Files are collected and written in batches, so that the objects of many small files, or of one
large one, are read ahead of the writes (`read_many`). What is written was verified against its id.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Final, Protocol

from dmsync.core.chunking import is_zero
from dmsync.core.ids import Kind, ObjectId, object_id
from dmsync.core.objects import Entry, Layout
from dmsync.core.pages import ZERO_RUN, Span, file_spans
from dmsync.engine.differing_bytes import differing_spans
from dmsync.engine.file_blocks import READ_BYTES, FileMoved, buffers
from dmsync.engine.file_content import ChunkReader
from dmsync.engine.progress import Progress
from dmsync.engine.restoring.live_directory import LiveDirectory
from dmsync.engine.restoring.metadata import MetadataWriter
from dmsync.engine.restoring.result import RestoreResult
from dmsync.engine.restoring.writeback import Writeback
from dmsync.engine.safe_files import punch_hole, temporary_name
from dmsync.engine.tree_scan import stat_of
from dmsync.errors import BadObject
from dmsync.storage.direct_files import Appender
from dmsync.storage.stat_cache import Stat

_CREATE_FLAGS: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
DIRECT_BYTES_MIN: Final = 1024 * 1024
"""Smaller new files are left to the page cache, which writes several of them at once. What is
durable on return goes to the disk in any case."""
_ALLOCATED_BYTES_MIN: Final = 1024 * 1024
"""Runs of zeros from this length on are allocated without being written."""
_COMPARED_BYTES: Final = 4096
"""What is written of a changed chunk: a page of memory, which the kernel writes to disk whole."""
_ZEROS: Final = bytes(READ_BYTES)


class BatchReader(ChunkReader, Protocol):
    def read_many(self, kind: Kind, ids: Iterable[ObjectId]) -> Iterator[bytes]:
        """Verified bytes in the order of `ids`, read ahead. Raises as `read`, in its turn."""
        ...


class FileJob(Protocol):
    """A file to be written. `spans` may be asked ahead; `write` gets each of them, in order, with
    its chunk's bytes or None for zeros; then `finish`. `abandon` undoes what can be undone."""

    def spans(self) -> Iterator[tuple[int, Span]]: ...

    def write(self, offset: int, span: Span, content: bytes | None) -> None: ...

    def finish(self) -> None: ...

    def abandon(self) -> None: ...


def write_files(
    reader: BatchReader, jobs: Iterable[FileJob], finished: Callable[[], None] | None = None
) -> None:
    """Do all jobs, in order, their chunks read ahead. The job at fault is abandoned, and those
    behind it.

    Raises:
        BadObject, ObjectMissing, HashMismatch: a file is not sound. OSError.
    """
    waiting = deque(jobs)
    planned: deque[tuple[FileJob, int, Span]] = deque()

    def chunks() -> Iterator[ObjectId]:
        for job in tuple(waiting):
            for offset, span in job.spans():
                planned.append((job, offset, span))
                if span.chunk != ZERO_RUN:
                    yield span.chunk

    def write_until_chunk(content: bytes | None) -> None:
        while planned:
            job, offset, span = planned[0]
            finish_before(job)
            if span.chunk == ZERO_RUN:
                job.write(offset, span, None)
            elif content is None:
                raise AssertionError("every chunk that was planned is read")
            else:
                check_length(span, content)
                job.write(offset, span, content)
            planned.popleft()
            if span.chunk != ZERO_RUN:
                return

    def finish_before(job: FileJob | None) -> None:
        while waiting and waiting[0] is not job:
            waiting[0].finish()
            waiting.popleft()
            if finished is not None:
                finished()

    try:
        for content in reader.read_many(Kind.CHUNK, chunks()):
            write_until_chunk(content)
        write_until_chunk(None)
        finish_before(None)
    except BaseException:
        for job in waiting:
            job.abandon()
        raise


class FileMaker:
    """What the jobs of one restore share."""

    def __init__(
        self,
        reader: BatchReader,
        metadata: MetadataWriter,
        writeback: Writeback,
        result: RestoreResult,
        progress: Progress | None,
    ) -> None:
        self.reader = reader
        self.metadata = metadata
        self.result = result
        self._writeback = writeback
        self._progress = progress
        self._files_seen = 0

    def wrote(self, count: int, *, is_direct: bool = False) -> None:
        """So many bytes of a file were written; `is_direct`: past the page cache."""
        self.result.bytes_written += count
        if not is_direct:
            self._writeback.wrote(count)
        if self._progress is not None:
            self._progress.reached(self.result.bytes_written, self._files_seen)

    def looked_at(self, files: int) -> None:
        """So many names are done."""
        self._files_seen = files
        if self._progress is not None:
            self._progress.reached(self.result.bytes_written, files)


class NewFile:
    """A file that gets a new inode: under its own name in a directory that is ours, elsewhere under
    a temporary one that then takes the place of what is there."""

    is_new = True
    __slots__ = ("_appender", "_directory", "_fd", "_made_as", "_maker", "entry")

    def __init__(self, maker: FileMaker, directory: LiveDirectory, entry: Entry) -> None:
        self._maker = maker
        self._directory = directory
        self.entry = entry
        self._fd = -1
        self._made_as = b""
        self._appender: Appender | None = None

    def begin(self) -> int:
        """Make the file, for parts of it to be written in any order on the descriptor returned,
        which is open until `finish` or `abandon`."""
        self._make()
        return self._fd

    def wrote(self, count: int) -> None:
        """So many bytes were written on that descriptor."""
        self._maker.wrote(count, is_direct=True)

    def spans(self) -> Iterator[tuple[int, Span]]:
        """Runs of zeros are holes when recorded so, else allocated space."""
        entry = self.entry
        if entry.layout is Layout.SINGLE:
            yield 0, Span(entry.size, ObjectId(entry.content))
            return
        offset = 0
        for span in file_spans(self._maker.reader, entry):
            if span.chunk != ZERO_RUN or not entry.sparse:
                yield offset, span
            offset += span.length

    def write(self, offset: int, span: Span, content: bytes | None) -> None:
        if self._fd < 0:
            self._open()
        if content is None and span.length >= _ALLOCATED_BYTES_MIN:
            os.posix_fallocate(self._fd, offset, span.length)
        elif self._appender is not None:
            data = bytes(span.length) if content is None else content
            self._appender.append(data, offset, past_cache=True)
        elif content is not None:
            write_at(self._fd, content, offset)
        else:
            write_zeros(self._fd, offset, span.length)
        self._maker.wrote(span.length, is_direct=self._appender is not None)

    def _open(self) -> None:
        self._make()
        if not self.entry.sparse and self.entry.size >= DIRECT_BYTES_MIN:
            self._appender = Appender(self._fd, direct_from_bytes=0)

    def _make(self) -> None:
        entry, directory = self.entry, self._directory
        mode = self._maker.metadata.creation_mode(entry)
        if directory.is_own:
            try:
                self._fd = os.open(entry.name, _CREATE_FLAGS, mode, dir_fd=directory.fd)
                self._made_as = entry.name
            except FileExistsError:  # somebody made it meanwhile
                pass
        if self._fd < 0:
            temporary = temporary_name()
            self._fd = os.open(temporary, _CREATE_FLAGS, mode, dir_fd=directory.fd)
            self._made_as = temporary
        if entry.sparse:
            os.ftruncate(self._fd, entry.size)

    def finish(self) -> None:
        if self._fd < 0:
            self._open()
        if self._appender is not None:
            self._appender.flush()
            self._appender.close()
        entry, directory, maker = self.entry, self._directory, self._maker
        made = maker.metadata.apply_to_new_file(directory, entry, self._fd)
        fd, self._fd = self._fd, -1
        os.close(fd)
        if self._made_as != entry.name:
            made = put_in_place(directory, self._made_as, entry.name)
        directory.after[entry.name] = made
        maker.result.files_written += 1
        self._made_as = b""
        if not entry.size:
            maker.wrote(0)

    def abandon(self) -> None:
        if self._appender is not None:
            self._appender.close()
        if self._fd >= 0:
            os.close(self._fd)
        if self._made_as:
            unlink_if_there(self._made_as, self._directory.fd)


class ChangedFile:
    """A file that keeps its inode. Chunks that the cache vouches for are not even looked at; of the
    others only the pages that differ are written. Owns `fd`."""

    is_new = False

    def __init__(
        self,
        maker: FileMaker,
        entry: Entry,
        fd: int,
        size: int,
        known: Entry | None,
        finish: Callable[[], None],
    ) -> None:
        self._maker = maker
        self.entry = entry
        self._fd = fd
        self._size = size
        self._known = known if known is not None and known.size == size else None
        self._finish = finish
        self._written = 0

    def begin(self) -> int:
        """The descriptor to write parts of it on, in any order."""
        return self._fd

    def wrote(self, count: int) -> None:
        """So many bytes were written on that descriptor."""
        self._written += count
        self._maker.wrote(count)

    def spans(self) -> Iterator[tuple[int, Span]]:
        if self._size != self.entry.size:
            os.ftruncate(self._fd, self.entry.size)
        if self._known is not None:
            for offset, span in differing_spans(self._maker.reader, self._known, self.entry):
                if span.chunk != ZERO_RUN or not range_holds(self._fd, offset, span):
                    yield offset, span
            return
        offset = 0
        for span in file_spans(self._maker.reader, self.entry):
            if not range_holds(self._fd, offset, span):
                yield offset, span
            offset += span.length

    def write(self, offset: int, span: Span, content: bytes | None) -> None:
        if content is not None:
            count = write_where_different(self._fd, content, offset)
        else:
            count = span.length
            if not (self.entry.sparse and punch_hole(self._fd, offset, span.length)):
                write_zeros(self._fd, offset, span.length)
        self.wrote(count)

    def finish(self) -> None:
        fd, self._fd = self._fd, -1
        os.close(fd)
        self._maker.result.files_written += self._written > 0
        self._finish()

    def abandon(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)


def check_length(span: Span, content: bytes) -> None:
    """Raises BadObject."""
    if len(content) != span.length:
        raise BadObject("a chunk is not as long as its span")


# --- calls ---------------------------------------------------------------------------------------


def holds(reader: ChunkReader, fd: int, entry: Entry, size: int) -> bool:
    """Whether the open file's bytes are those recorded."""
    if size != entry.size:
        return False
    offset = 0
    try:
        for span in file_spans(reader, entry):
            if not range_holds(fd, offset, span):
                return False
            offset += span.length
    except FileMoved:
        return False
    return True


def range_holds(fd: int, offset: int, span: Span) -> bool:
    """Whether the open file has the bytes of `span` at `offset`. Raises FileMoved."""
    if span.chunk == ZERO_RUN:
        return all(is_zero(block) for block in buffers(fd, offset, span.length, READ_BYTES))
    block = next(buffers(fd, offset, span.length, span.length))
    return object_id(Kind.CHUNK, block) == span.chunk


def write_at(fd: int, content: bytes | memoryview, offset: int) -> None:
    done = os.pwrite(fd, content, offset)
    while done < len(content):
        done += os.pwrite(fd, memoryview(content)[done:], offset + done)


def write_zeros(fd: int, offset: int, length: int) -> None:
    for start in range(0, length, len(_ZEROS)):
        write_at(fd, memoryview(_ZEROS)[: min(len(_ZEROS), length - start)], offset + start)


def write_where_different(fd: int, content: bytes, offset: int) -> int:
    """Write the pages in which the open file differs from `content`; the number of bytes written.

    Neighbouring pages are written at once.
    """
    live = os.pread(fd, len(content), offset)
    if live == content:
        return 0
    written = 0
    start = -1  # of the run of differing pages
    for place in range(0, len(content), _COMPARED_BYTES):
        end = place + _COMPARED_BYTES
        if live[place:end] == content[place:end]:
            if start >= 0:
                write_at(fd, content[start:place], offset + start)
                written += place - start
                start = -1
        elif start < 0:
            start = place
    if start >= 0:
        write_at(fd, content[start:], offset + start)
        written += len(content) - start
    return written


def put_in_place(directory: LiveDirectory, temporary: bytes, name: bytes) -> Stat:
    """Rename a finished name over what is there; its stat after that."""
    os.rename(temporary, name, src_dir_fd=directory.fd, dst_dir_fd=directory.fd)
    return stat_of(os.stat(name, dir_fd=directory.fd, follow_symlinks=False))


def unlink_if_there(name: bytes, directory_fd: int) -> None:
    try:
        os.unlink(name, dir_fd=directory_fd)
    except FileNotFoundError:
        pass
