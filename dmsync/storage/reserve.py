"""A little room kept in the store for the day the disk is full: gc gives it up to be able to write
down what it removes (protocol/STORE.md 7)."""

import os
from typing import Final

from dmsync.storage.durable import fsync_directory, remove_if_there, storage_errors

RESERVE_BYTES: Final = 256 * 1024
"""An operation that forgets thousands of commits, and the catalog's shared memory beside it."""
_FREE_SHARE: Final = 8
"""It is made only where so many times its size is free."""


def make_reserve(path: str) -> None:
    """Make the file unless it is there or room is scarce. Never fails: it only helps."""
    try:
        if os.stat(path).st_size >= RESERVE_BYTES:
            return
    except OSError:
        pass
    try:
        found = os.statvfs(os.path.dirname(path))
        if found.f_bavail * found.f_frsize < _FREE_SHARE * RESERVE_BYTES:
            return
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError:
        return
    try:
        os.posix_fallocate(fd, 0, RESERVE_BYTES)
        os.fsync(fd)
    except OSError:
        _remove_quietly(path)
    finally:
        os.close(fd)


def give_up_reserve(path: str) -> bool:
    """Remove the file; False when there is none. Raises StorageFailed."""
    if not os.path.lexists(path):
        return False
    with storage_errors(f"removing {path}"):
        remove_if_there(path)
    fsync_directory(os.path.dirname(path))
    return True


def _remove_quietly(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass
