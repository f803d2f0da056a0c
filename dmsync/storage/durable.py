"""Making files durable, and the one place where the operating system's refusals get our types.

A failed fsync is never retried on the same file: the kernel may have dropped the pages.
"""

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from dmsync.errors import StorageFailed, StorageFull
from dmsync.storage.stages import stage

Path = str | bytes


@contextmanager
def storage_errors(doing: str) -> Iterator[None]:
    """Translate OSError from the body. `doing` is the message's beginning: "writing pack X".

    Raises:
        StorageFull: no space, quota or file size left.
        StorageFailed: anything else the operating system refuses.
    """
    try:
        yield
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise StorageFull(f"{doing}: {exc.strerror}", errno=exc.errno) from exc
        raise StorageFailed(f"{doing}: {exc.strerror or exc}", errno=exc.errno or 0) from exc


def fsync_directory(path: Path) -> None:
    """Make the names in a directory durable. Raises StorageFull, StorageFailed."""
    with storage_errors(f"syncing directory {os.fsdecode(path)}"):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with stage("sync"):
                os.fsync(fd)
        finally:
            os.close(fd)


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write everything at the file's position. Raises OSError."""
    view = memoryview(data)
    while len(view):
        view = view[os.write(fd, view) :]


def write_file_atomic(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replace a file: after a crash it has its old or its new content. Durable on return.

    Raises:
        StorageFull, StorageFailed: the old file is as it was.
    """
    with whole_file(path, mode=mode, sweep=True) as file:
        file.write(data)


@contextmanager
def whole_file(path: Path, *, mode: int, sweep: bool = False) -> Iterator[IO[bytes]]:
    """A file to write that gets its name, in place of what had it, when the body is done. Durable
    on leaving; nothing of it stays when the body raises. What a kill left of an earlier one goes
    with `sweep`, which is for the store's own directories.

    Raises:
        StorageFull, StorageFailed: what had the name is as it was.
    """
    target = os.path.abspath(os.fsencode(path))
    directory, name = os.path.split(target)
    # Cut: a name of 255 bytes leaves no room for more.
    prefix = name[:200] + b".tmp-"
    with storage_errors(f"writing {os.fsdecode(target)}"):
        if sweep:
            _remove_dead(directory, prefix)
        fd, temporary = _new_file(os.path.join(directory, prefix), mode, locked=sweep)
        try:
            with open(fd, "wb") as file:
                yield file
                file.flush()
                # The rename must not reach the disk before the bytes do.
                with stage("sync"):
                    os.fsync(fd)
            os.rename(temporary, target)
        except BaseException:
            remove_if_there(temporary)
            raise
    fsync_directory(directory)


def _new_file(prefix: bytes, mode: int, *, locked: bool) -> tuple[int, bytes]:
    """A new file whose name begins so, and its path; `locked` as long as it is open, so that who
    sweeps sees that it is being written. Raises OSError."""
    while True:
        path = prefix + os.urandom(8).hex().encode()
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        # somebody who sweeps may have found it in the moment before it was locked
        if not locked or (lock_exclusively(fd, wait=False) and is_at(fd, path)):
            return fd, path
        os.close(fd)


def _remove_dead(directory: bytes, prefix: bytes) -> None:
    """Remove the files that such writers left when they were killed. Raises OSError."""
    for name in os.listdir(directory):
        if not name.startswith(prefix):
            continue
        path = os.path.join(directory, name)
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            continue  # it has just got its name, or is not ours
        try:
            if lock_exclusively(fd, wait=False) and is_at(fd, path):
                remove_if_there(path)
        finally:
            os.close(fd)


def is_at(fd: int, path: Path) -> bool:
    """Is the open file the one that `path` names?"""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def make_directory_durable(path: Path, mode: int = 0o700) -> None:
    """Make a directory and its missing parents; each name is durable on return.

    Raises:
        StorageFull, StorageFailed: also when something else has that name.
    """
    target = os.path.abspath(os.fsencode(path))
    missing = []
    while not os.path.isdir(target):
        missing.append(target)
        target = os.path.dirname(target)
    for directory in reversed(missing):
        with storage_errors(f"making directory {os.fsdecode(directory)}"):
            try:
                os.mkdir(directory, mode)
            except FileExistsError:
                if not os.path.isdir(directory):
                    raise
        fsync_directory(os.path.dirname(directory))


def remove_if_there(path: Path) -> None:
    """Unlink a file that may be gone already. Raises OSError for any other reason."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def lock_exclusively(fd: int, *, wait: bool) -> bool:
    """Take the kernel's open-file-description lock on a whole file; False when another has it.

    It goes with the descriptor, also when the process is killed. Raises OSError.
    """
    whole_file = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK, whole_file)
    except OSError as exc:
        if exc.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True
