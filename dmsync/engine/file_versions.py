"""The two states that a diff compares, and the bytes of their files: recorded, or in a live tree.

A live file is opened without following links and read from that one descriptor. What changed while
it was read is told (ChangedMeanwhile) rather than shown: such bytes are no state the file ever had.
"""

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

from dmsync.core.chunking import FileHasher
from dmsync.core.ids import Kind, ObjectId
from dmsync.core.objects import Entry, EntryKind, Layout
from dmsync.core.pages import ZERO_RUN, file_spans, find_path
from dmsync.engine.file_blocks import FileMoved, buffers
from dmsync.engine.file_content import ChunkReader
from dmsync.engine.materialise import copy_open_file, has_moved, write_content
from dmsync.engine.safe_files import (
    GONE,
    TreeDirectories,
    open_file,
    open_tree,
    shown,
    translated,
)
from dmsync.engine.trees import TreePlace

COPIES_MAX: Final = 3
"""Times files that belong together are copied anew when one of them moved meanwhile."""

_Read = TypeVar("_Read")


class ChangedMeanwhile(Exception):
    """The live file is not, or no longer, what the comparison found."""


class State(Protocol):
    """One side of a comparison."""

    def read(self, path: bytes, entry: Entry, most: int) -> bytes:
        """The first `most` bytes of the file `entry` at `path`; whole files are checked.

        Raises:
            ChangedMeanwhile, StorageFailed, Corruption.
        """
        ...

    def write(self, path: bytes, entry: Entry, target: str, companions: tuple[bytes, ...]) -> None:
        """Write the file to the new file `target`, and beside it as `target` + suffix those of
        `companions` (suffixes) that lie beside it here. Raises as `read`, and StorageFull."""
        ...


class RecordedState:
    """The tree of a commit."""

    def __init__(self, store: ChunkReader, root: Entry) -> None:
        self._store = store
        self._root = root

    def read(self, path: bytes, entry: Entry, most: int) -> bytes:
        pieces: list[bytes] = []
        left = min(most, entry.size)
        for span in file_spans(self._store, entry):
            if left <= 0:
                break
            data = _bytes_of(self._store, span.chunk, min(span.length, left))
            pieces.append(data)
            left -= len(data)
        return b"".join(pieces)

    def write(self, path: bytes, entry: Entry, target: str, companions: tuple[bytes, ...]) -> None:
        write_content(self._store, entry, target)
        for suffix in companions:
            beside = find_path(self._store, self._root, path + suffix)
            if beside is not None and beside.kind is EntryKind.FILE:
                write_content(self._store, beside, target + os.fsdecode(suffix))


def _bytes_of(store: ChunkReader, chunk: ObjectId, length: int) -> bytes:
    if chunk == ZERO_RUN:
        return bytes(length)
    return store.read(Kind.CHUNK, chunk)[:length]


class LiveState:
    """The working tree at `place`, of which the comparison has found the entries."""

    def __init__(self, place: TreePlace) -> None:
        self._place = place

    def read(self, path: bytes, entry: Entry, most: int) -> bytes:
        def read_open(fd: int) -> bytes:
            before = os.fstat(fd)
            if before.st_size != entry.size:
                raise ChangedMeanwhile
            try:
                blocks = buffers(fd, 0, min(most, before.st_size), max(1, most))
                data = b"".join(bytes(block) for block in blocks)
            except FileMoved:
                raise ChangedMeanwhile from None
            if has_moved(before, os.fstat(fd)):
                raise ChangedMeanwhile
            return data

        data = self._with_open(path, read_open)
        if len(data) == entry.size and not _holds(entry, data):
            raise ChangedMeanwhile
        return data

    def write(self, path: bytes, entry: Entry, target: str, companions: tuple[bytes, ...]) -> None:
        suffixes = (b"", *companions)
        for _ in range(COPIES_MAX):
            before = [self._stat(path + suffix) for suffix in suffixes]
            copied = [
                self._copy(path + suffix, target + os.fsdecode(suffix))
                for suffix, found in zip(suffixes, before, strict=True)
                if found is not None
            ]
            after = [self._stat(path + suffix) for suffix in suffixes]
            if all(copied) and before == after and before[0] is not None:
                return
            for suffix in suffixes:
                with_suffix = target + os.fsdecode(suffix)
                if os.path.lexists(with_suffix):
                    os.unlink(with_suffix)
        raise ChangedMeanwhile

    def _copy(self, path: bytes, target: str) -> bool:
        try:
            return self._with_open(path, lambda fd: copy_open_file(fd, target))
        except ChangedMeanwhile:
            return False

    def _stat(self, path: bytes) -> tuple[int, ...] | None:
        """What shows a change of the regular file at `path`; None where there is none."""
        try:
            with self._directory(path) as (name, directory_fd):
                found = os.stat(name, dir_fd=directory_fd, follow_symlinks=False)
        except OSError as exc:
            if exc.errno in GONE:
                return None
            raise translated(exc, f"cannot read {shown(path)}") from exc
        if not stat.S_ISREG(found.st_mode):
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns

    def _with_open(self, path: bytes, work: Callable[[int], _Read]) -> _Read:
        try:
            with self._directory(path) as (name, directory_fd):
                fd = open_file(name, directory_fd)
                try:
                    if not stat.S_ISREG(os.fstat(fd).st_mode):
                        raise ChangedMeanwhile
                    return work(fd)
                finally:
                    os.close(fd)
        except OSError as exc:
            if exc.errno in GONE:
                raise ChangedMeanwhile from exc
            raise translated(exc, f"cannot read {shown(path)}") from exc

    @contextmanager
    def _directory(self, path: bytes) -> Iterator[tuple[bytes, int]]:
        """Name and open directory of `path`. Raises OSError, StorageFailed."""
        prefix = b"" if self._place.subdot is None else self._place.subdot + b"/"
        assert path.startswith(prefix), "the tree is that subdot"
        above, _, name = path[len(prefix) :].rpartition(b"/")
        root_fd = open_tree(self._place.path)
        directories = TreeDirectories(root_fd)
        try:
            yield name, directories.open(above)
        finally:
            directories.close()
            os.close(root_fd)


def _holds(entry: Entry, data: bytes) -> bool:
    """Are these the bytes whose content id `entry` has?"""
    if entry.layout in (Layout.EMPTY, Layout.ZERO):
        return not any(data)
    hasher = FileHasher()
    hasher.update(data)
    return hasher.content() == entry.content


@dataclass(frozen=True, slots=True)
class FileVersion:
    """A regular file of one state."""

    state: State
    path: bytes
    entry: Entry

    @property
    def size(self) -> int:
        return self.entry.size

    def read(self, most: int) -> bytes:
        """The first `most` bytes. Raises as State.read."""
        return self.state.read(self.path, self.entry, most)

    def write(self, target: str, companions: tuple[bytes, ...] = ()) -> None:
        """Write it to the new file `target`. Raises as State.write."""
        self.state.write(self.path, self.entry, target, companions)
