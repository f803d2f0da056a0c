"""Long runs of bytes past the page cache: appending to a file, and reading one in order.

A page of the cache has to be found, filled and written for every 4 KiB, which costs more than all
hashing, and drives out what others have cached. What is in the cache is read from there. Where a
filesystem knows no other way than through the cache, everything goes through it.
"""

import errno
import mmap
import os
import sys
from collections.abc import Callable
from functools import cache
from typing import Final

DIRECT_FROM_BYTES: Final = 4 * 1024 * 1024
"""A file that grows to nobody knows what length is left to the page cache up to here."""
BUFFER_BYTES: Final = 2 * 1024 * 1024
ALIGNMENT: Final = 4096
"""Of addresses, offsets and lengths: no disk asks for more."""
REFUSALS: Final = (errno.EINVAL, errno.ENOTSUP)
"""What filesystems say that read and write only through the page cache."""
_O_DIRECT: Final[int] = getattr(os, "O_DIRECT", 0)
_CACHESTAT: Final = 451
"""The number of the system call since Linux 6.5."""
_CACHESTAT_MACHINES: Final = ("x86_64", "aarch64")


def aligned_buffer() -> memoryview:
    """Memory of BUFFER_BYTES that can be written and read past the page cache."""
    return memoryview(mmap.mmap(-1, BUFFER_BYTES))


def opened_directly(fd: int, flags: int) -> int:
    """Another descriptor of the same file that goes past the page cache; -1 where none can."""
    if not _O_DIRECT:
        return -1
    try:
        return os.open(f"/proc/self/fd/{fd}", flags | _O_DIRECT | os.O_CLOEXEC)
    except OSError:  # no /proc, or the filesystem does not do it
        return -1


class Appender:
    """Appends to a file. The end of what was written may be held back until `flush`.

    The descriptor stays the owner's, and reads what was flushed. For one thread at a time; others
    may sync the file meanwhile.
    """

    def __init__(self, fd: int, *, direct_from_bytes: int = DIRECT_FROM_BYTES) -> None:
        self._fd = fd
        self._direct_from_bytes = direct_from_bytes
        self._direct_fd = -1
        self._may_be_direct = True
        self._is_direct = False
        self._buffer: memoryview | None = None
        self._start = 0
        """Offset in the file of the buffer's first byte, aligned while the buffer is in use."""
        self._held = 0
        self._is_flushed = True

    def append(self, data: bytes | memoryview, at: int, *, past_cache: bool = False) -> None:
        """Write `data` at offset `at`, behind everything before. Raises OSError.

        With `past_cache` it goes past the page cache, if the file is large and that can be done.
        """
        if self._is_direct and not (past_cache and at == self._start + self._held):
            self.flush()
            self._is_direct = False
        if not self._is_direct and not (past_cache and self._begins_directly(len(data), at)):
            _write_all(self._fd, memoryview(data), at)
            return
        assert self._buffer is not None
        self._is_flushed = False
        view = memoryview(data)
        while len(view):
            count = min(len(view), len(self._buffer) - self._held)
            self._buffer[self._held : self._held + count] = view[:count]
            self._held += count
            view = view[count:]
            if self._held == len(self._buffer):
                self._write_held(self._held)

    def flush(self) -> None:
        """Have everything appended in the file. Raises OSError."""
        if self._is_flushed:
            return
        assert self._buffer is not None
        self._write_held(self._held - self._held % ALIGNMENT)
        _write_all(self._fd, self._buffer[: self._held], self._start)
        self._is_flushed = True

    def close(self) -> None:
        """Let go of everything but the owner's descriptor; what was held back is dropped."""
        self._buffer = None
        self._is_direct, self._is_flushed = False, True
        self._close_direct()

    def _begins_directly(self, length: int, at: int) -> bool:
        """Go past the page cache from now on, if it is time and possible."""
        if at + length < self._direct_from_bytes or not self._may_be_direct:
            return False
        if self._buffer is None:
            self._direct_fd = opened_directly(self._fd, os.O_WRONLY)
            self._may_be_direct = self._direct_fd >= 0
            if not self._may_be_direct:
                return False
            self._buffer = aligned_buffer()
        self._is_direct = True
        self._held = at % ALIGNMENT
        self._start = at - self._held
        self._buffer[: self._held] = os.pread(self._fd, self._held, self._start)
        return True

    def _write_held(self, count: int) -> None:
        """Write the first `count` bytes held, whole pages, and keep the rest."""
        assert self._buffer is not None
        whole, rest = self._buffer[:count], bytes(self._buffer[count : self._held])
        if self._direct_fd >= 0:
            try:
                done = os.pwrite(self._direct_fd, whole, self._start) if count else 0
            except OSError as exc:
                if exc.errno not in REFUSALS:
                    raise
                done = 0
                self._may_be_direct = False
                self._close_direct()
        else:
            done = 0
        _write_all(self._fd, whole[done:], self._start + done)
        self._buffer[: len(rest)] = rest
        self._start += count
        self._held = len(rest)

    def _close_direct(self) -> None:
        if self._direct_fd >= 0:
            os.close(self._direct_fd)
            self._direct_fd = -1


class InOrder:
    """Reads stretches of a file that mostly lie one behind the other; the file may grow."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._direct_fd: int | None = None
        self._buffer: memoryview | None = None
        self._start = 0
        self._filled = 0

    def held(self, offset: int) -> memoryview:
        """What is in memory from `offset` on; valid until the next `load`."""
        inside = offset - self._start
        if self._buffer is None or not 0 <= inside < self._filled:
            return memoryview(b"")
        return self._buffer[inside : self._filled]

    def load(self, offset: int) -> memoryview:
        """What is in the file from `offset` on, as much as fits: nearly BUFFER_BYTES. Raises
        OSError."""
        if self._buffer is None:
            self._buffer = aligned_buffer()
        self._start, self._filled = offset - offset % ALIGNMENT, 0
        self._filled = self._read(self._buffer)
        return self.held(offset)

    def close(self) -> None:
        """Let go of everything but the owner's descriptor."""
        self._buffer = None
        if self._direct_fd is not None and self._direct_fd >= 0:
            os.close(self._direct_fd)
        self._direct_fd = None

    def _read(self, buffer: memoryview) -> int:
        if self._direct_fd is None:
            self._direct_fd = opened_directly(self._fd, os.O_RDONLY)
        if self._direct_fd >= 0 and not _is_cached(self._fd, self._start, len(buffer)):
            try:
                return os.preadv(self._direct_fd, [buffer], self._start)
            except OSError as exc:
                if exc.errno not in REFUSALS:
                    raise
                os.close(self._direct_fd)
                self._direct_fd = -1
        return os.preadv(self._fd, [buffer], self._start)


def _is_cached(fd: int, start: int, length: int) -> bool:
    """Does the page cache hold all of a stretch? True where the kernel does not tell.

    Less is not enough: reading what is missing makes the kernel read ahead, so that more than
    half of the next stretch is cached, and so on.
    """
    count = _cached_pages_count()
    pages = None if count is None else count(fd, start, length)
    length = min(length, os.fstat(fd).st_size - start)
    return pages is None or pages * mmap.PAGESIZE >= length


@cache
def _cached_pages_count() -> Callable[[int, int, int], int | None] | None:
    """What counts the pages cached of a stretch of a file, where there is such a system call."""
    if sys.platform != "linux" or os.uname().machine not in _CACHESTAT_MACHINES:
        return None
    import ctypes

    system_call = ctypes.CDLL(None).syscall
    places = ctypes.c_uint64 * 2
    counts = ctypes.c_uint64 * 5

    def count(fd: int, start: int, length: int) -> int | None:
        found = counts()
        failed = system_call(
            ctypes.c_long(_CACHESTAT),
            ctypes.c_uint(fd),
            ctypes.byref(places(start, length)),
            ctypes.byref(found),
            ctypes.c_uint(0),
        )
        return None if failed else found[0]

    return count


def _write_all(fd: int, view: memoryview, at: int) -> None:
    while len(view):
        count = os.pwrite(fd, view, at)
        view = view[count:]
        at += count
