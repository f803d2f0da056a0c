"""Runs `dm` with one file's content made while it is read: synthetic.py FILE PAGE ARGUMENT...

FILE is empty space of the wanted size on the disk. What reads it sees pages of 8 KiB; every eighth
begins with its number, so that no two chunks are equal, and none is of zeros. Page number PAGE
(-1: none) looks different. Stands in for data larger than any disk at hand: everything but the
read calls is the real program.
"""

import mmap
import os
import struct
import sys
from collections.abc import Sequence
from typing import Any, Final

PAGE_BYTES: Final = 8192
STAMP: Final = struct.Struct("<QQ")
FILLER: Final = b"synthetic page. " * (PAGE_BYTES // 16)
BLOCK_PAGES: Final = 16
BLOCK: Final = FILLER * BLOCK_PAGES


class SyntheticFile:
    """Takes the place of the read calls of `os`, for one inode only."""

    def __init__(self, path: str, changed_page: int) -> None:
        found = os.stat(path)
        self._inode = (found.st_dev, found.st_ino)
        self._size = found.st_size
        self._changed_page = changed_page
        self._preadv = os.preadv
        self._pread = os.pread
        self._lseek = os.lseek
        # A count for each process, where all see it: dm reads on several.
        self._counts = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")
        self._process = self._forks = 0

    @property
    def bytes_served(self) -> int:
        """How much was read, in this process and those forked from it."""
        return sum(self._counts)

    def install(self) -> None:
        """From now on reading the file gives its content, also in processes that are forked."""
        os.register_at_fork(before=self._begin_fork, after_in_child=self._begin_child)
        functions: Any = os
        functions.preadv, functions.pread, functions.lseek = self.preadv, self.pread, self.lseek

    def preadv(self, fd: int, buffers: Sequence[Any], offset: int, flags: int = 0) -> int:
        if not self._is_ours(fd):
            return self._preadv(fd, buffers, offset, flags)
        filled = 0
        for buffer in buffers:
            filled += self._fill(memoryview(buffer).cast("B"), offset + filled)
        return filled

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        if not self._is_ours(fd):
            return self._pread(fd, length, offset)
        buffer = bytearray(max(0, min(length, self._size - offset)))
        self._fill(memoryview(buffer), offset)
        return bytes(buffer)

    def lseek(self, fd: int, position: int, how: int) -> int:
        """The file is data from end to end, whatever the disk says."""
        if how == os.SEEK_DATA and self._is_ours(fd):
            return position
        if how == os.SEEK_HOLE and self._is_ours(fd):
            return self._size
        return self._lseek(fd, position, how)

    def _begin_fork(self) -> None:
        self._forks += 1

    def _begin_child(self) -> None:
        self._process = self._forks

    def _is_ours(self, fd: int) -> bool:
        found = os.fstat(fd)
        return (found.st_dev, found.st_ino) == self._inode

    def _fill(self, buffer: memoryview, offset: int) -> int:
        length = max(0, min(len(buffer), self._size - offset))
        assert offset % PAGE_BYTES == 0, "reads begin at pages"
        for start in range(0, length, len(BLOCK)):
            part = buffer[start : min(start + len(BLOCK), length)]
            part[:] = BLOCK[: len(part)]
            first = (offset + start) // PAGE_BYTES
            # A number in every eighth page is enough to make every chunk unique.
            for page in range(-first % 8, -(-len(part) // PAGE_BYTES), 8):
                STAMP.pack_into(part, page * PAGE_BYTES, first + page, 1)
        self._change(buffer[:length], offset)
        self._counts[self._process] += length
        return length

    def _change(self, buffer: memoryview, offset: int) -> None:
        start = self._changed_page * PAGE_BYTES - offset
        if start >= 0 and start + STAMP.size <= len(buffer):
            STAMP.pack_into(buffer, start, self._changed_page, 2)


def main(arguments: list[str]) -> None:
    """Run the command; fails unless all of the file was read through us."""
    file = SyntheticFile(arguments[0], int(arguments[1]))
    file.install()
    from dmsync.surfaces.cli.main import main as run_dm

    sys.argv = ["dm", *arguments[2:]]
    code: object = 0
    try:
        code = run_dm()
    except SystemExit as end:
        code = end.code
    if "commit" in arguments and file.bytes_served < os.stat(arguments[0]).st_size:
        sys.exit(f"only {file.bytes_served} bytes were read as expected: how does dm read now?")
    sys.exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    main(sys.argv[1:])
