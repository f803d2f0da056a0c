"""Writes a large new file past the page cache.

What is durable on return goes to the disk in any case. Copying it into the page cache first costs
the kernel a page to find and fill for every 4 KiB, and drives out what others have cached there.
"""

import errno
import fcntl
import mmap
import os
from typing import Final

DIRECT_BYTES_MIN: Final = 1024 * 1024
"""Smaller files are left to the page cache, which writes several of them at once."""
_BUFFER_BYTES: Final = 1024 * 1024
ALIGNMENT: Final = 4096
"""Of addresses, offsets and lengths: no disk asks for more."""
REFUSALS: Final = (errno.EINVAL, errno.ENOTSUP)
"""What filesystems say that only write through the page cache."""


def aligned_buffer() -> mmap.mmap:
    """Memory for one DirectWriter at a time."""
    return mmap.mmap(-1, _BUFFER_BYTES)


class DirectWriter:
    """Content of one file, from its beginning and without gaps. Through the page cache where the
    filesystem knows no other way, and for the end, which is no whole page."""

    def __init__(self, fd: int, buffer: mmap.mmap) -> None:
        self._fd = fd
        self._buffer = memoryview(buffer)
        self._offset = 0  # of the buffer's first byte, aligned
        self._held = 0
        self._is_direct = True
        self._set_direct(True)

    def write(self, content: bytes | memoryview) -> None:
        """Append. Raises OSError."""
        done = 0
        while done < len(content):
            count = min(len(content) - done, len(self._buffer) - self._held)
            self._buffer[self._held : self._held + count] = content[done : done + count]
            self._held += count
            done += count
            if self._held == len(self._buffer):
                self._flush()

    def write_zeros(self, length: int) -> None:
        """Append zeros: allocated, but not written where that can be done. Raises OSError."""
        head = min(length, -self._held % ALIGNMENT)
        self.write(bytes(head))
        allocated = (length - head) // ALIGNMENT * ALIGNMENT
        if allocated:
            self._flush()
            self._allocate(allocated)
        self.write(bytes(length - head - allocated))

    def _allocate(self, length: int) -> None:
        try:
            os.posix_fallocate(self._fd, self._offset, length)
        except OSError as exc:
            if exc.errno not in REFUSALS:
                raise
            # Where a filesystem cannot, the C library writes a byte into each block: none of that
            # goes past the page cache, and the first is refused.
            for start in range(0, length, _BUFFER_BYTES):
                self.write(bytes(min(_BUFFER_BYTES, length - start)))
        else:
            self._offset += length

    def finish(self) -> None:
        """Write what is left. Raises OSError."""
        whole = self._held - self._held % ALIGNMENT
        left = bytes(self._buffer[whole : self._held])
        self._held = whole
        self._flush()
        if left:
            self._set_direct(False)
            self._buffer[: len(left)] = left
            self._held = len(left)
            self._flush()

    def _flush(self) -> None:
        done = 0
        while done < self._held:
            try:
                done += os.pwrite(self._fd, self._buffer[done : self._held], self._offset + done)
            except OSError as exc:
                if exc.errno not in REFUSALS or not self._is_direct:
                    raise
                self._set_direct(False)
        self._offset += self._held
        self._held = 0

    def _set_direct(self, is_direct: bool) -> None:
        flags = fcntl.fcntl(self._fd, fcntl.F_GETFL) & ~os.O_DIRECT
        try:
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags | (os.O_DIRECT if is_direct else 0))
        except OSError as exc:
            if not is_direct or exc.errno not in REFUSALS:
                raise
            is_direct = False
        self._is_direct = is_direct
