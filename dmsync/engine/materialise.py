"""Writes the content of single files out of objects, or out of a live tree, for tools that want a
path: database drivers, diff and merge commands. Nothing of a tree is ever opened in place.
"""

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from dmsync.core.ids import Kind
from dmsync.core.objects import Entry, Layout
from dmsync.core.pages import ZERO_RUN, file_spans
from dmsync.engine.file_blocks import READ_BYTES, FileMoved, buffers, data_extents
from dmsync.engine.file_content import ChunkReader
from dmsync.errors import BadObject, StorageFull
from dmsync.storage.durable import storage_errors, write_all
from dmsync.storage.layout import Layout as StoreLayout
from dmsync.storage.locks import ProofOfLife, is_alive, remove_if_dead

_CREATE_FLAGS: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_PROOF_SUFFIX: Final = ".lock"


def write_content(store: ChunkReader, entry: Entry, path: str) -> None:
    """Write the bytes of a recorded file to the new file `path`, mode 0600; zeros become holes.

    Raises:
        StorageFull, StorageFailed: also when `path` exists; nothing is left there.
        ObjectMissing, HashMismatch, BadObject: the recorded file is not sound.
    """
    with _new_file(path, entry.size, sparse=entry.sparse or entry.layout is Layout.ZERO) as fd:
        for span in file_spans(store, entry):
            if span.chunk == ZERO_RUN:
                os.lseek(fd, span.length, os.SEEK_CUR)
                continue
            data = store.read(Kind.CHUNK, span.chunk)
            if len(data) != span.length:
                raise BadObject("a chunk is not as long as its span")
            write_all(fd, data)


def copy_open_file(source_fd: int, path: str) -> bool:
    """Copy the regular file open as `source_fd` to the new file `path`, mode 0600, with its holes.

    Returns False when it changed while it was read: the copy is then no state it ever had.

    Raises:
        StorageFull, StorageFailed: nothing is left at `path`.
    """
    before = os.fstat(source_fd)
    size = before.st_size
    with _new_file(path, size, sparse=before.st_blocks * 512 < size) as fd:
        try:
            for start, end in data_extents(source_fd, size):
                os.lseek(fd, start, os.SEEK_SET)
                for block in buffers(source_fd, start, end - start, READ_BYTES):
                    write_all(fd, block)
        except FileMoved:
            return False
    return not has_moved(before, os.fstat(source_fd))


def has_moved(before: os.stat_result, after: os.stat_result) -> bool:
    """Did an open file change between two fstats?"""
    return (before.st_size, before.st_mtime_ns, before.st_ctime_ns) != (
        after.st_size,
        after.st_mtime_ns,
        after.st_ctime_ns,
    )


@contextmanager
def _new_file(path: str, size: int, *, sparse: bool) -> Iterator[int]:
    """The new file, of `size` once the body is done; gone again when that fails."""
    with storage_errors(f"writing {path}"):
        fd = os.open(path, _CREATE_FLAGS, 0o600)
        try:
            if not sparse:
                _refuse_without_room(fd, size, path)
            yield fd
            os.ftruncate(fd, size)
        except BaseException:
            os.unlink(path)
            raise
        finally:
            os.close(fd)


def _refuse_without_room(fd: int, size: int, path: str) -> None:
    """A disk that the store lives on is not filled up for a copy that cannot fit anyway."""
    space = os.statvfs(fd)
    if size > space.f_bavail * space.f_frsize:
        raise StorageFull(
            f"no room for {size / 2**20:.1f} MiB at {os.path.dirname(path)}",
            hint="free some space; nothing was changed",
        )


@contextmanager
def private_directory(layout: StoreLayout) -> Iterator[str]:
    """A new directory of the store that only its owner may enter; gone with the body.

    What killed processes left is removed first: a directory stays only as long as the proof
    beside it is held.

    Raises:
        StorageFull, StorageFailed: it cannot be made.
    """
    with storage_errors(f"making {layout.temporary_dir}"):
        os.makedirs(layout.temporary_dir, 0o700, exist_ok=True)
    _sweep(layout.temporary_dir)
    path = os.path.join(layout.temporary_dir, os.urandom(16).hex())
    with ProofOfLife(path + _PROOF_SUFFIX):
        with storage_errors(f"making {path}"):
            os.mkdir(path, 0o700)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)


def _sweep(directory: str) -> None:
    for name in os.listdir(directory):
        path = os.path.join(directory, name)
        if name.endswith(_PROOF_SUFFIX):
            if not os.path.lexists(path.removesuffix(_PROOF_SUFFIX)):
                remove_if_dead(path)
        elif not is_alive(path + _PROOF_SUFFIX) and _is_directory(path):
            shutil.rmtree(path, ignore_errors=True)
            remove_if_dead(path + _PROOF_SUFFIX)


def _is_directory(path: str) -> bool:
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except FileNotFoundError:
        return False
