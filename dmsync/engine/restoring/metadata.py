"""Recorded metadata on its way to an inode: owner, mode, attributes, time, and what needs trust."""

import os
import stat
from collections.abc import Callable
from functools import partial
from typing import Final

from dmsync.core.objects import Entry, EntryKind
from dmsync.engine.differences import joined
from dmsync.engine.restoring.live_directory import LiveDirectory
from dmsync.engine.restoring.result import RestoreResult
from dmsync.engine.safe_files import Xattrs, handle_path, inode_handle, read_xattrs
from dmsync.engine.tree_scan import GID, MODE, MTIME, UID, stat_of
from dmsync.errors import BadObject
from dmsync.storage.stat_cache import Stat

SET_ID_BITS: Final = 0o6000
_PLAIN_ATTRIBUTES: Final = frozenset({b"system.posix_acl_access", b"system.posix_acl_default"})


def _is_plain(attribute: bytes) -> bool:
    """Does an attribute say no more than its owner may? `security.*` and `trusted.*` speak to the
    kernel: capabilities, labels, what lies behind an overlay."""
    return attribute.startswith(b"user.") or attribute in _PLAIN_ATTRIBUTES


def needs_trust(entry: Entry) -> bool:
    """Whether a restore that is not trusted makes less than is recorded: no device, a file without
    its set-id bits or the attributes that speak to the kernel."""
    if entry.kind in (EntryKind.CHARACTER_DEVICE, EntryKind.BLOCK_DEVICE):
        return True
    if entry.kind is not EntryKind.SYMLINK and entry.mode & SET_ID_BITS:
        return True
    return not all(_is_plain(name) for name, _ in entry.xattrs)


class MetadataWriter:
    """Applies recorded metadata for one restore and notes what could not be applied.

    `trusted` also applies set-id bits and capabilities. Times of access are recorded nowhere: new
    inodes get the time of the restore.
    """

    def __init__(self, result: RestoreResult, *, trusted: bool, now_ns: int) -> None:
        self.trusted = trusted
        self.is_root = os.geteuid() == 0
        self._result = result
        self._now_ns = now_ns
        self._own_ids = (os.geteuid(), os.getegid())

    def of(
        self, directory_path: bytes, entry: Entry, fd: int, *, link: "Link | None" = None
    ) -> "InodeMetadata":
        """The metadata of `entry` for the inode open as `fd`. O_PATH descriptors come as links."""
        return InodeMetadata(
            entry,
            fd,
            link,
            path=joined(directory_path, entry.name) if entry.name else directory_path,
            trusted=self.trusted,
            is_root=self.is_root,
        )

    def apply(self, directory: LiveDirectory, entry: Entry, metadata: "InodeMetadata") -> None:
        """Set what differs and remember in `directory` what the inode has instead."""
        xattrs = metadata.apply()
        if xattrs != entry.xattrs:
            directory.applied_xattrs[entry.name] = xattrs
        if metadata.is_incomplete:
            self._result.unapplied.append(metadata.path)

    # --- inodes just made, which are nearly always right with fewer calls -------------------------

    def creation_mode(self, entry: Entry) -> int:
        """Permission bits to make a file with: its own, unless they would for a moment be those of
        another owner."""
        if (entry.uid, entry.gid) == self._own_ids:
            return entry.mode & 0o777
        return 0o600

    def apply_to_new_file(self, directory: LiveDirectory, entry: Entry, fd: int) -> Stat:
        """Metadata of a regular file that this restore made and wrote; its stat after that."""
        if not (entry.xattrs or directory.has_default_acl or entry.mode & SET_ID_BITS):
            if self.is_root and (entry.uid, entry.gid) != self._own_ids:
                os.fchown(fd, entry.uid, entry.gid)
                os.fchmod(fd, entry.mode)
            self._set_time(fd, entry)
            found = stat_of(os.fstat(fd))
            if _is_applied(entry, found):
                return found
        self.apply(directory, entry, self.of(directory.path, entry, fd))
        return stat_of(os.fstat(fd))

    def apply_to_new_name(self, directory: LiveDirectory, entry: Entry, name: bytes) -> Stat:
        """Metadata of a link, fifo or device just made as `name`; its stat after that."""
        if entry.kind is EntryKind.SYMLINK and not entry.xattrs:
            if self.is_root and (entry.uid, entry.gid) != self._own_ids:
                os.chown(name, entry.uid, entry.gid, dir_fd=directory.fd, follow_symlinks=False)
            self._set_time(name, entry, directory.fd)
            found = stat_of(os.stat(name, dir_fd=directory.fd, follow_symlinks=False))
            if (found[UID], found[GID], found[MTIME]) == (entry.uid, entry.gid, entry.mtime_ns):
                return found
        with inode_handle(name, directory.fd) as handle:
            link = Link(directory.fd, name if entry.kind is EntryKind.SYMLINK else None)
            self.apply(directory, entry, self.of(directory.path, entry, handle, link=link))
            return stat_of(os.fstat(handle))

    def _set_time(self, target: int | bytes, entry: Entry, directory_fd: int | None = None) -> None:
        times = (self._now_ns, entry.mtime_ns)
        try:
            if directory_fd is None:
                os.utime(target, ns=times)
            else:
                os.utime(target, ns=times, dir_fd=directory_fd, follow_symlinks=False)
        except OverflowError as exc:
            raise BadObject("a file's time is out of range") from exc


def _is_applied(entry: Entry, found: Stat) -> bool:
    return (stat.S_IMODE(found[MODE]), found[UID], found[GID], found[MTIME]) == (
        entry.mode,
        entry.uid,
        entry.gid,
        entry.mtime_ns,
    )


class Link:
    """How to reach an inode that is open as an O_PATH descriptor only: through `/proc/self/fd`, a
    symlink by its `name` in the directory, because its attributes are set without following."""

    def __init__(self, directory_fd: int, name: bytes | None) -> None:
        self.directory_fd = directory_fd
        self.name = name


class InodeMetadata:
    """Recorded metadata on its way to one inode."""

    def __init__(
        self,
        entry: Entry,
        fd: int,
        link: Link | None,
        *,
        path: bytes,
        trusted: bool,
        is_root: bool,
    ) -> None:
        self.path = path
        self.is_incomplete = False
        self._entry = entry
        self._inode: int | bytes = fd if link is None else handle_path(fd)
        self._link_name = link.name if link is not None else None
        self._directory_fd = link.directory_fd if link is not None else -1
        self._is_root = is_root
        self._found = os.fstat(fd)
        self._mode = entry.mode if trusted else entry.mode & ~SET_ID_BITS
        self._xattrs = tuple(
            pair for pair in entry.xattrs if _is_plain(pair[0]) or (trusted and is_root)
        )
        if self._mode != entry.mode or self._xattrs != entry.xattrs:
            self.is_incomplete = True

    def _live_xattrs(self) -> Xattrs:
        if self._link_name is None:
            return read_xattrs(self._inode)
        path = handle_path(self._directory_fd, self._link_name)
        return read_xattrs(path, follow_symlinks=False)

    def differs(self) -> bool:
        """Whether applying would change the inode."""
        live = stat_of(self._found)
        entry = self._entry
        owner = self._is_root and (live[UID], live[GID]) != (entry.uid, entry.gid)
        mode = self._link_name is None and stat.S_IMODE(live[MODE]) != self._mode
        times = live[MTIME] != entry.mtime_ns
        return owner or mode or times or self._live_xattrs() != self._xattrs

    def apply(self) -> Xattrs:
        """Set what differs, time last. Returns the attributes that the inode has now."""
        self._apply_owner()
        if self._link_name is None:
            self._apply_mode()
        xattrs = self._apply_xattrs()
        self._apply_time()
        return xattrs

    def _apply_owner(self) -> None:
        entry, found = self._entry, self._found
        uid = entry.uid if entry.uid != found.st_uid else -1
        gid = entry.gid if entry.gid != found.st_gid else -1
        if not self._is_root and uid != -1:
            self.is_incomplete = True
            uid = -1
        if (uid, gid) == (-1, -1):
            return
        try:
            if self._link_name is not None:
                os.chown(
                    self._link_name, uid, gid, dir_fd=self._directory_fd, follow_symlinks=False
                )
            else:
                os.chown(self._inode, uid, gid)
        except PermissionError:
            self.is_incomplete = True

    def _apply_mode(self) -> None:
        live = os.stat(self._inode).st_mode  # chown may have taken bits
        if stat.S_IMODE(live) != self._mode:
            try:
                os.chmod(self._inode, self._mode)
            except PermissionError:
                self.is_incomplete = True

    def _apply_xattrs(self) -> Xattrs:
        live = dict(self._live_xattrs())
        wanted = dict(self._xattrs)
        if live == wanted:
            return self._xattrs
        follow = self._link_name is None
        path = (
            self._inode
            if self._link_name is None
            else handle_path(self._directory_fd, self._link_name)
        )
        for name in live.keys() - wanted.keys():
            self._try(partial(os.removexattr, path, name, follow_symlinks=follow))
        for name, value in wanted.items():
            if live.get(name) != value:
                self._try(partial(os.setxattr, path, name, value, follow_symlinks=follow))
        return self._live_xattrs()

    def _try(self, change: Callable[[], None]) -> None:
        try:
            change()
        except OSError:  # no such attributes on this filesystem, or not for this user
            self.is_incomplete = True

    def _apply_time(self) -> None:
        if self._found.st_mtime_ns == self._entry.mtime_ns:
            return
        times = (self._found.st_atime_ns, self._entry.mtime_ns)
        try:
            if self._link_name is not None:
                os.utime(
                    self._link_name, ns=times, dir_fd=self._directory_fd, follow_symlinks=False
                )
            else:
                os.utime(self._inode, ns=times)
        except PermissionError:
            self.is_incomplete = True
        except OverflowError as exc:
            raise BadObject("a file's time is out of range") from exc
