"""The second pass of a restore: directories' own metadata, and the stats of a tree that is done.

Directories get their metadata when all below them is made, children before parents; the names in
one that this restore or its parts moved are looked at again. Other names keep the stat that the
restore saw or wrote: whoever changed one since has thereby moved its stat.
"""

import os
import stat
from array import array
from typing import Final

from dmsync.core.objects import Entry, entry_from_value
from dmsync.engine.differences import joined
from dmsync.engine.restoring.live_directory import LiveDirectory
from dmsync.engine.restoring.metadata import MetadataWriter
from dmsync.engine.restoring.result import RestoreResult
from dmsync.engine.safe_files import TreeDirectories, Xattrs
from dmsync.engine.tree_scan import INODE, MODE, MTIME, SIZE, stat_of
from dmsync.storage.stat_cache import (
    Remarks,
    Spool,
    Stat,
    StatCacheWriter,
    decode_live,
    decode_remarks,
    encode_live,
    encode_remarks,
)

RESTAT: Final = 1
METADATA: Final = 2


class DirectoryDrafts:
    """Blocks of the new stat cache as the first pass leaves them, numbered in the order of the
    walk, and what is still to be done to each directory."""

    def __init__(self, metadata: MetadataWriter, result: RestoreResult) -> None:
        self._metadata = metadata
        self._result = result
        self._spool = Spool()
        self._flags = bytearray()
        self._parents = array("l")
        self._xattrs: dict[bytes, Xattrs] = {}

    def number(self, parent: int) -> int:
        """The number of a directory that the walk comes to; -1 is above the root."""
        self._flags.append(0)
        self._parents.append(parent)
        return len(self._flags) - 1

    def touch(self, number: int, flag: int) -> None:
        """The directory needs the second pass, and the stats of all above it with it."""
        self._flags[number] |= flag | RESTAT
        number = self._parents[number]
        while number >= 0 and not self._flags[number]:
            self._flags[number] |= RESTAT
            number = self._parents[number]

    def needs_metadata(self, number: int) -> bool:
        return bool(self._flags[number] & METADATA)

    def add(self, path: bytes, live: bytes, remarks: bytes, target: Entry | None) -> None:
        """Drafts come in the order of their numbers. `target` holds what METADATA applies."""
        value = target.to_value() if target is not None else None
        self._spool.append((path, live, remarks, value))

    def add_leaf(self, directory: LiveDirectory) -> bool:
        """Finish a directory while it is open, if nothing in it can change any more: not one with
        links, whose names may yet be linked to."""
        if not directory.is_leaf or directory.links or b"." in directory.after:
            return False
        if directory.target is not None and self.needs_metadata(directory.number):
            self._apply(directory.path, directory.target, directory.fd)
        self._flags[directory.number] = 0
        self.add(directory.path, *directory.encoded(), None)
        return True

    def _apply(self, path: bytes, target: Entry, fd: int) -> None:
        metadata = self._metadata.of(path.rpartition(b"/")[0], target, fd)
        xattrs = metadata.apply()
        if xattrs != target.xattrs:
            self._xattrs[path] = xattrs
        if metadata.is_incomplete:
            self._result.unapplied.append(path)

    def applied_xattrs(self, path: bytes) -> Xattrs | None:
        """What the directory has instead of the attributes recorded; once."""
        return self._xattrs.pop(path, None)

    def finish(self, directories: TreeDirectories, prefix: bytes) -> StatCacheWriter:
        """Do what is left, `prefix` being the path of the tree in the dot."""
        cache = StatCacheWriter()
        number = len(self._flags)
        for path, live, remarks, target in self._spool.backward():
            number -= 1
            if self._flags[number]:
                inside = path[len(prefix) :].lstrip(b"/") if prefix else path
                fd = directories.open(inside)
                if target is not None and self._flags[number] & METADATA:
                    self._apply(path, entry_from_value(target), fd)
                live, remarks = self._seen_again(path, live, remarks, fd)
            cache.append(path, live, remarks)
        return cache

    def _seen_again(
        self, path: bytes, live: bytes, remarks_bytes: bytes, fd: int
    ) -> tuple[bytes, bytes]:
        names, stats = decode_live(live)
        remarks = decode_remarks(remarks_bytes)
        links = {name for name, _ in remarks.links}
        untrusted = set(remarks.untrusted)
        applied = dict(remarks.applied_xattrs)
        found: list[Stat] = []
        for name, written in zip(names, stats, strict=True):
            is_directory = stat.S_ISDIR(written[MODE])
            now = written
            if name == b".":
                now = stat_of(os.fstat(fd))
            elif is_directory or name in links:
                now = stat_of(os.stat(name, dir_fd=fd, follow_symlinks=False))
            found.append(now)
            if not is_directory and not _is_settled(now, written):
                untrusted.add(name)
            if is_directory:
                xattrs = self.applied_xattrs(path if name == b"." else joined(path, name))
                if xattrs is not None:
                    applied[name] = xattrs
        changed = remarks._replace(
            untrusted=frozenset(untrusted), applied_xattrs=tuple(sorted(applied.items()))
        )
        return encode_live(list(names), found), encode_remarks(changed)


def _is_settled(now: Stat, written: Stat) -> bool:
    """Whether a name still is what this restore saw or wrote; linking moves count and ctime."""
    return all(now[field] == written[field] for field in (MODE, INODE, SIZE, MTIME))


def root_remarks(name: bytes, xattrs: Xattrs | None) -> bytes:
    """Remarks of the dot's root, which holds the tree as its name `name`."""
    return encode_remarks(Remarks(applied_xattrs=((name, xattrs),) if xattrs is not None else ()))
