"""Names that are no directories: kept, brought to their target on their inode, or made anew.

A change never goes to an inode that may have other names: such a name gets a new inode (whoever
hard-linked files out of the tree, as `cp -al` backups do, keeps what he has).
"""

import errno
import os
import stat
from functools import partial
from typing import Final

from dmsync.core.objects import Entry, EntryKind, Layout
from dmsync.engine.differences import joined
from dmsync.engine.differing_bytes import differing_spans
from dmsync.engine.live_metadata import KINDS
from dmsync.engine.progress import Progress
from dmsync.engine.restoring.file_writing import (
    BatchReader,
    ChangedFile,
    FileJob,
    FileMaker,
    NewFile,
    holds,
    put_in_place,
    unlink_if_there,
    write_files,
)
from dmsync.engine.restoring.finishing import METADATA, RESTAT, DirectoryDrafts
from dmsync.engine.restoring.live_directory import LiveDirectory
from dmsync.engine.restoring.metadata import SET_ID_BITS, Link, MetadataWriter
from dmsync.engine.restoring.result import RestoreResult
from dmsync.engine.restoring.write_queue import WriteQueue
from dmsync.engine.restoring.writeback import Writeback
from dmsync.engine.safe_files import (
    TreeDirectories,
    inode_handle,
    is_temporary,
    make_writable,
    open_file,
    remove_name,
    shown,
    temporary_name,
)
from dmsync.engine.stat_baseline import Baseline
from dmsync.engine.tree_scan import INODE, MODE, NLINK, stat_of
from dmsync.errors import StorageFailed
from dmsync.storage.stat_cache import Stat

_WRITE_FLAGS: Final = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_REFUSALS: Final = (errno.EACCES, errno.EPERM, errno.ETXTBSY)
"""Reasons not to write a file where it is; a new inode can still take its place."""


class NameRestorer:
    """Makes single names equal to their target. Regular files may be left to `queue`."""

    def __init__(
        self,
        *,
        reader: BatchReader,
        metadata: MetadataWriter,
        drafts: DirectoryDrafts,
        queue: WriteQueue,
        writeback: Writeback,
        baseline: Baseline,
        result: RestoreResult,
        progress: Progress | None,
        root_fd: int,
        prefix: bytes,
    ) -> None:
        self._reader = reader
        self._metadata = metadata
        self._drafts = drafts
        self._queue = queue
        self._baseline = baseline
        self._result = result
        self._maker = FileMaker(reader, metadata, writeback, result, progress)
        self._directories = TreeDirectories(root_fd)
        self._prefix = prefix
        self._leaders: dict[bytes, tuple[int, int, bytes, Entry]] = {}
        self._owners: dict[tuple[int, int], bytes] = {}

    def close(self) -> None:
        self._directories.close()

    def looked_at(self, files: int) -> None:
        """So many names are done."""
        self._maker.looked_at(files)

    def unlock(self, directory: LiveDirectory) -> None:
        """About to change names in `directory`: its time and rights are set again at the end."""
        if not directory.is_unlocked:
            directory.is_unlocked = True
            make_writable(directory.fd)
            self._drafts.touch(directory.number, METADATA)

    def remove(self, directory: LiveDirectory, name: bytes) -> None:
        """Remove a name and all below it."""
        self.unlock(directory)
        remove_name(name, directory.fd, joined(directory.path, name))
        self._result.names_removed += not is_temporary(name)

    def restore(self, directory: LiveDirectory, entry: Entry) -> None:
        """Make one name equal to `entry`; it may wait in the queue on return."""
        name = entry.name
        live = directory.before.get(name)
        if live is None and not entry.hardlink:
            self._make(directory, entry)
            return
        if entry.hardlink:
            directory.links.append((name, entry.hardlink))
        if live is not None and stat.S_ISDIR(live[MODE]):
            self.remove(directory, name)
            live = None
        if self._follows_leader(directory, entry, live):
            return
        if live is not None and self._is_as_recorded(directory, entry, live):
            directory.after[name] = live
            directory.keep_applied_xattrs(name)
        elif not self._adjust(directory, entry, live):
            self._make(directory, entry)
        if name in directory.after:
            found = directory.after[name]
            self._own(entry, joined(directory.path, name), directory.device, found)

    # --- inodes with several names ------------------------------------------------------------

    def _own(self, entry: Entry, path: bytes, device: int, found: Stat) -> None:
        """Remember whose inode this is, so that no name outside its group shares it."""
        if entry.hardlink:
            self._leaders[entry.hardlink] = (device, found[INODE], path, entry)
        if found[NLINK] > 1 or entry.hardlink:
            self._owners[device, found[INODE]] = entry.hardlink or path

    def _may_keep_inode(self, directory: LiveDirectory, live: Stat) -> bool:
        """False when a name restored before has this inode."""
        return live[NLINK] == 1 or (directory.device, live[INODE]) not in self._owners

    def _follows_leader(self, directory: LiveDirectory, entry: Entry, live: Stat | None) -> bool:
        """A later name of a hardlink group: linked to the first one, unless it is already."""
        leader = self._leaders.get(entry.hardlink) if entry.hardlink else None
        if leader is None:
            return False
        device, inode, path, first = leader
        if not (first.same_data(entry) and first.same_metadata(entry)):
            return False  # what is recorded of one inode differs: it was none
        if live is not None and (directory.device, live[INODE]) == (device, inode):
            directory.after[entry.name] = live
            self._drafts.touch(directory.number, RESTAT)
            return True
        if device != directory.device:  # groups cannot span filesystems: a copy will have to do
            return False
        self.unlock(directory)
        above, _, name = path.rpartition(b"/")
        inside = above[len(self._prefix) :].lstrip(b"/") if self._prefix else above
        temporary = temporary_name()
        os.link(
            name,
            temporary,
            src_dir_fd=self._directories.open(inside),
            dst_dir_fd=directory.fd,
            follow_symlinks=False,
        )
        made = stat_of(os.stat(temporary, dir_fd=directory.fd, follow_symlinks=False))
        if made[INODE] != inode:
            os.unlink(temporary, dir_fd=directory.fd)
            raise StorageFailed(f"{shown(path)} changed while it was restored")
        put_in_place(directory, temporary, entry.name)
        self._drafts.touch(directory.number, RESTAT)
        directory.after[entry.name] = made
        return True

    # --- inodes that stay ---------------------------------------------------------------------

    def _is_vouched(self, directory: LiveDirectory, entry: Entry, live: Stat) -> Entry | None:
        """What the cache knows the name to hold, if its stat vouches for it."""
        if directory.vouched.get(entry.name) != live:
            return None
        return directory.recorded.get(entry.name)

    def _is_as_recorded(self, directory: LiveDirectory, entry: Entry, live: Stat) -> bool:
        known = self._is_vouched(directory, entry, live)
        return (
            known is not None
            and known.same_data(entry)
            and known.same_metadata(entry)
            and self._may_keep_inode(directory, live)
            and not self.lacks_trusted(directory, entry, live)
        )

    def lacks_trusted(self, directory: LiveDirectory, entry: Entry, live: Stat) -> bool:
        """Whether an earlier restore withheld what this one is trusted to apply."""
        if not self._metadata.trusted:
            return False
        is_link = entry.kind is EntryKind.SYMLINK
        if not is_link and entry.mode & SET_ID_BITS & ~live[MODE]:
            return True
        return dict(directory.remarks.applied_xattrs).get(entry.name, entry.xattrs) != entry.xattrs

    def _adjust(self, directory: LiveDirectory, entry: Entry, live: Stat | None) -> bool:
        """Bring what is there to its target without a new inode; False when that cannot be."""
        if (
            live is None
            or KINDS.get(stat.S_IFMT(live[MODE])) is not entry.kind
            or not self._may_keep_inode(directory, live)
        ):
            return False
        if entry.kind is EntryKind.FILE:
            return self._adjust_file(directory, entry, live)
        if not _is_same_special(directory, entry):
            return False
        return self._adjust_metadata(directory, entry, live)

    def _adjust_metadata(self, directory: LiveDirectory, entry: Entry, live: Stat) -> bool:
        """Set metadata on the inode that is there; only looks when it has other names."""
        with inode_handle(entry.name, directory.fd) as handle:
            found = stat_of(os.fstat(handle))
            if found[INODE] != live[INODE]:
                raise StorageFailed(f"{shown(entry.name)} changed while it was restored")
            link = Link(directory.fd, entry.name if entry.kind is EntryKind.SYMLINK else None)
            metadata = self._metadata.of(directory.path, entry, handle, link=link)
            if max(live[NLINK], found[NLINK]) > 1 and metadata.differs():
                return False
            self._metadata.apply(directory, entry, metadata)
            after = stat_of(os.fstat(handle))
        directory.after[entry.name] = after
        if after == live and not self._baseline.trusts(after, directory.device):
            directory.untrusted.add(entry.name)
        return True

    def _adjust_file(self, directory: LiveDirectory, entry: Entry, live: Stat) -> bool:
        known = self._is_vouched(directory, entry, live)
        if known is not None and known.same_data(entry):
            return self._adjust_metadata(directory, entry, live)
        in_place = live[NLINK] == 1 and self._is_changed_in_place(entry, known)
        try:
            fd = (
                os.open(entry.name, _WRITE_FLAGS, dir_fd=directory.fd)
                if in_place
                else open_file(entry.name, directory.fd)
            )
        except OSError as exc:
            if exc.errno in _REFUSALS:
                return False
            raise
        is_queued = False
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode) or found.st_ino != live[INODE]:
                raise StorageFailed(f"{shown(entry.name)} changed while it was restored")
            if in_place and found.st_nlink == 1:
                is_queued = True
                then = partial(self._adjusted, directory, entry, live)
                job = ChangedFile(self._maker, entry, fd, found.st_size, known, then)
                self._write(job, entry, is_open=True)
                return True
            if not holds(self._reader, fd, entry, found.st_size):
                return False
        finally:
            if not is_queued:
                os.close(fd)
        return self._adjust_metadata(directory, entry, live)

    def _is_changed_in_place(self, entry: Entry, known: Entry | None) -> bool:
        """Aligned files are; others, which a new inode replaces at once, only where little of what
        is known to be there changes (a log that grew)."""
        if entry.layout is Layout.FIXED:
            return True
        if entry.layout is not Layout.CDC or known is None or known.layout is not Layout.CDC:
            return False
        return (
            sum(span.length for _, span in differing_spans(self._reader, known, entry)) * 2
            < entry.size
        )

    def _write(self, job: FileJob, entry: Entry, *, is_open: bool = False) -> None:
        if entry.hardlink:  # other names will be linked to it
            write_files(self._reader, [job])
        else:
            self._queue.add(job, is_open=is_open)

    def _adjusted(self, directory: LiveDirectory, entry: Entry, live: Stat) -> None:
        if not self._adjust_metadata(directory, entry, live):
            raise StorageFailed(f"{shown(entry.name)} changed while it was restored")

    # --- inodes made anew --------------------------------------------------------------------

    def _make(self, directory: LiveDirectory, entry: Entry) -> None:
        """Make the name anew, in place of what has it."""
        self.unlock(directory)
        if entry.kind is EntryKind.FILE:
            self._write(NewFile(self._maker, directory, entry), entry)
            return
        made_as = entry.name if directory.is_own else temporary_name()
        try:
            made = self._make_special(directory, entry, made_as)
        except FileExistsError:  # somebody made it meanwhile
            made_as = temporary_name()
            made = self._make_special(directory, entry, made_as)
        if made is None:
            if entry.name in directory.before:
                remove_name(entry.name, directory.fd, joined(directory.path, entry.name))
            directory.withheld.append(entry.name)
            self._result.withheld.append(joined(directory.path, entry.name))
            return
        if made_as != entry.name:
            made = put_in_place(directory, made_as, entry.name)
        directory.after[entry.name] = made
        self._result.files_written += 1

    def _make_special(self, directory: LiveDirectory, entry: Entry, name: bytes) -> Stat | None:
        """Make what is no file or directory as `name`; None when its kind may not be made here."""
        match entry.kind:
            case EntryKind.SYMLINK:
                os.symlink(entry.link_target, name, dir_fd=directory.fd)
            case EntryKind.FIFO:
                os.mkfifo(name, 0o600, dir_fd=directory.fd)
            case _:
                if not self._metadata.trusted or not _make_device(directory, entry, name):
                    return None
        try:
            return self._metadata.apply_to_new_name(directory, entry, name)
        except BaseException:
            unlink_if_there(name, directory.fd)
            raise


def _make_device(directory: LiveDirectory, entry: Entry, name: bytes) -> bool:
    kind = stat.S_IFCHR if entry.kind is EntryKind.CHARACTER_DEVICE else stat.S_IFBLK
    try:
        os.mknod(name, kind | 0o600, os.makedev(*entry.device), dir_fd=directory.fd)
    except PermissionError:
        return False
    return True


def _is_same_special(directory: LiveDirectory, entry: Entry) -> bool:
    if entry.kind is EntryKind.SYMLINK:
        return os.readlink(entry.name, dir_fd=directory.fd) == entry.link_target
    if entry.kind is EntryKind.FIFO:
        return True
    device = os.stat(entry.name, dir_fd=directory.fd, follow_symlinks=False).st_rdev
    return (os.major(device), os.minor(device)) == entry.device
