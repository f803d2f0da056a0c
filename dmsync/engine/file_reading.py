"""One file of a live tree, read until it holds still."""

import os
import stat
from typing import Final, NamedTuple

from dmsync.core.objects import Entry
from dmsync.engine.file_blocks import FileMoved
from dmsync.engine.file_content import ContentReader, FileContent
from dmsync.engine.safe_files import Xattrs, open_file, read_xattrs
from dmsync.engine.tree_scan import stat_of
from dmsync.storage.stat_cache import Stat

READS_MAX: Final = 3
"""Times a file that moves while it is read is read before the last reading is taken."""


class Reading(NamedTuple):
    """One file as read: `found` is its stat before its last reading."""

    content: FileContent
    xattrs: Xattrs
    found: Stat
    device: int
    is_stable: bool


class NotRegularError(Exception):
    """What was listed as a file is none any more."""


def read_file(
    content_reader: ContentReader, name: bytes, directory_fd: int, old: Entry | None
) -> Reading:
    """Read the file `name` of an open directory, `old` being what it replaces.

    Raises:
        NotRegularError, FileMoved (each time it was read), TooLarge, OSError.
    """
    fd = open_file(name, directory_fd)
    try:
        reading = None
        for attempt in range(READS_MAX):
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                raise NotRegularError
            try:
                content = content_reader.read(fd, found, old)
            except FileMoved:
                if attempt == READS_MAX - 1 and reading is None:
                    raise
                continue
            xattrs = read_xattrs(fd)
            before = stat_of(found)
            is_stable = before == stat_of(os.fstat(fd))
            reading = Reading(content, xattrs, before, found.st_dev, is_stable)
            if is_stable:
                break
    finally:
        os.close(fd)
    assert reading is not None
    return reading
