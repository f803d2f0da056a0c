"""Makes a live tree equal to a recorded one, writing only what differs.

Nothing is assumed that is not seen: what the stat cache does not vouch for is compared with what
is recorded, so that running it again after a kill at any point completes the work. Two passes:
parents first, names in byte order, everything but the metadata of directories; then, children
before parents, the metadata of the directories that were touched and the new stat cache.

A change never goes to an inode that may have other names: such a name gets a new inode (whoever
hard-linked files out of the tree, as `cp -al` backups do, keeps what he has).
"""

import errno
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from dmsync.core.chunking import is_zero
from dmsync.core.ids import Kind, object_id
from dmsync.core.objects import ROOT_ENTRY, TREE_DEPTH_MAX, Entry, EntryKind, Layout, check_name
from dmsync.core.pages import ZERO_RUN, Span, file_spans
from dmsync.engine.capture import KINDS
from dmsync.engine.differences import joined
from dmsync.engine.file_content import READ_BYTES, ChunkReader, FileMoved, buffers
from dmsync.engine.recorded_tree import RecordedTree
from dmsync.engine.safe_files import (
    TreeDirectories,
    Xattrs,
    handle_path,
    inode_handle,
    is_temporary,
    make_writable,
    open_file,
    open_tree,
    punch_hole,
    read_xattrs,
    remove_name,
    shown,
    sync_filesystem,
    temporary_name,
    translated,
)
from dmsync.engine.tree_scan import (
    GID,
    INODE,
    MODE,
    MTIME,
    NLINK,
    SIZE,
    UID,
    Baseline,
    is_socket,
    stat_of,
)
from dmsync.errors import BadObject, StorageFailed
from dmsync.storage.stat_cache import (
    NO_REMARKS,
    Block,
    BlockStream,
    Remarks,
    Spool,
    Stat,
    StatCache,
    StatCacheWriter,
    decode_live,
    decode_remarks,
    encode_live,
    encode_remarks,
)

_WRITE_FLAGS: Final = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_CREATE_FLAGS: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_PREALLOCATE_BYTES_MIN: Final = 1024 * 1024
"""Files from this size on get their space at once: a full disk is found before writing."""
_SET_ID_BITS: Final = 0o6000
_CAPABILITY: Final = b"security.capability"
_ZEROS: Final = bytes(READ_BYTES)

Progress = Callable[[int, int], None]
"""Called now and then with (bytes written, files looked at) so far."""


@dataclass
class RestoreResult:
    """`stat_cache` vouches for the tree as restored; save it once the switch is recorded."""

    stat_cache: StatCache
    files_written: int = 0
    bytes_written: int = 0
    names_removed: int = 0
    withheld: list[bytes] = field(default_factory=list)
    """Recorded names not made here: devices, for want of trust or rights."""
    unapplied: list[bytes] = field(default_factory=list)
    """Paths some of whose recorded metadata could not or must not be applied."""


def restore_tree(
    *,
    tree_path: str | bytes,
    as_subdot: bytes | None,
    store: ChunkReader,
    target: Entry,
    current: Entry | None,
    stat_cache: StatCache | None,
    now_ns: int,
    trusted: bool = False,
    root_metadata: bool = False,
    scope: frozenset[bytes] | None = None,
    progress: Progress | None = None,
) -> RestoreResult:
    """Make the live tree equal to the root entry `target`; durable on return.

    `current` and `stat_cache` say what the tree is known to hold, where both are for one root;
    everything else is compared. `trusted` applies devices, setuid, setgid and capabilities.
    Sockets are left alone in directories that stay. With `scope` only these subdots are written.

    Raises:
        BadObject, ObjectMissing, HashMismatch: the recorded tree is not sound.
        StorageFull, StorageFailed: the system refused; run it again to complete.
    """
    restore = _Restore(
        tree_path,
        as_subdot,
        store,
        target,
        current,
        stat_cache,
        trusted=trusted,
        root_metadata=root_metadata,
        scope=scope,
        progress=progress,
    )
    try:
        return restore.run(now_ns)
    except OSError as exc:
        raise translated(exc, "cannot restore the tree") from exc
    finally:
        restore.close()


def needs_trust(entry: Entry) -> bool:
    """Whether a restore that is not trusted makes less than is recorded: no device, a file without
    its set-id bits or capability."""
    if entry.kind in (EntryKind.CHARACTER_DEVICE, EntryKind.BLOCK_DEVICE):
        return True
    if entry.kind is not EntryKind.SYMLINK and entry.mode & _SET_ID_BITS:
        return True
    return any(name == _CAPABILITY for name, _ in entry.xattrs)


@dataclass(slots=True)
class _Directory:
    """One live directory while it is made equal to its target."""

    path: bytes
    number: int
    fd: int
    device: int
    before: dict[bytes, Stat]
    """Stats of the names listed."""
    vouched: dict[bytes, Stat]
    """Stats under which the cache knows the content of names."""
    recorded: dict[bytes, Entry]
    """What the cache knows names to hold."""
    remarks: Remarks
    is_new: bool
    after: dict[bytes, Stat] = field(default_factory=dict)
    untrusted: set[bytes] = field(default_factory=set)
    links: list[tuple[bytes, bytes]] = field(default_factory=list)
    applied_xattrs: dict[bytes, Xattrs] = field(default_factory=dict)
    withheld: list[bytes] = field(default_factory=list)
    is_unlocked: bool = False


@dataclass(slots=True)
class _Work:
    """A directory to be restored. `is_same`: the cache's tree has the same pages there."""

    name: bytes
    is_same: bool
    is_new: bool
    needs_metadata: bool


RESTAT: Final = 1
METADATA: Final = 2


class _Restore:
    def __init__(
        self,
        tree_path: str | bytes,
        as_subdot: bytes | None,
        store: ChunkReader,
        target: Entry,
        current: Entry | None,
        cache: StatCache | None,
        *,
        trusted: bool,
        root_metadata: bool,
        scope: frozenset[bytes] | None,
        progress: Progress | None,
    ) -> None:
        self._store = store
        self._scope = scope
        self._prefix = as_subdot or b""
        self._target = RecordedTree(store, target)
        known = cache is not None and current is not None and cache.root == current
        self._known = RecordedTree(store, current if known and current is not None else ROOT_ENTRY)
        self._old = BlockStream(cache if known else None)
        self._has_cache = known
        self._trusted = trusted
        self._root_metadata = root_metadata and as_subdot is None
        self._progress = progress
        self._is_root = os.geteuid() == 0
        self._root_fd = open_tree(tree_path)
        self._directories = TreeDirectories(self._root_fd)
        self._leader_directories = TreeDirectories(self._root_fd)
        self._drafts = Spool()
        self._flags = bytearray()
        self._parents: list[int] = []
        self._leaders: dict[bytes, tuple[int, int, bytes]] = {}
        self._owners: dict[tuple[int, int], bytes] = {}
        self._directory_xattrs: dict[bytes, Xattrs] = {}
        self._filesystems: dict[int, bytes] = {}
        self._files_seen = 0
        self._baseline = Baseline(0)
        self._result = RestoreResult(StatCache(target, Spool()))

    def close(self) -> None:
        self._directories.close()
        self._leader_directories.close()
        os.close(self._root_fd)

    def run(self, now_ns: int) -> RestoreResult:
        self._baseline = Baseline(now_ns)
        self._restore_directories()
        cache = self._finish_directories()
        for path in self._filesystems.values():
            sync_filesystem(self._directories.open(path))
        self._result.stat_cache = cache.finish(self._target.root)
        return self._result

    # --- first pass: everything but the metadata of directories ---------------------------------

    def _restore_directories(self) -> None:
        root = self._prefix
        is_same = self._has_cache and self._known.entry(root) == self._target.entry(root)
        if self._prefix:
            self._old.take(b"")
        pending: list[tuple[bytes, int, list[_Work]]] = [
            (b"", -1, [_Work(b"", is_same, False, True)])
        ]
        while pending:
            above, parent, works = pending[-1]
            if not works:
                pending.pop()
                continue
            work = works.pop()
            below = above + work.name
            path = joined(self._prefix, below) if below else self._prefix
            number = len(self._flags)
            self._flags.append(0)
            self._parents.append(parent)
            subdirectories = self._restore_directory(work, path, below, number)
            if work.needs_metadata:
                self._touch(number, METADATA)
            if len(pending) > TREE_DEPTH_MAX:
                raise BadObject(f"the recorded tree is deeper than {TREE_DEPTH_MAX}")
            if subdirectories:
                subdirectories.reverse()
                pending.append((below + b"/" if below else b"", number, subdirectories))

    def _restore_directory(
        self, work: _Work, path: bytes, below: bytes, number: int
    ) -> list[_Work]:
        fd = self._open_live(below, work)
        found = os.fstat(fd)
        if found.st_dev not in self._filesystems:
            self._filesystems[found.st_dev] = below
            self._baseline.enter_device(fd, found.st_dev)
        names, stats = _list_all(fd)
        if path == b"" and self._root_metadata:
            names.insert(0, b".")
            stats.insert(0, stat_of(found))
        block, _ = self._old.take(path)
        live = encode_live(names, stats)
        untouched = block is not None and block.live == live and block.remarks == NO_REMARKS
        # What a restore without trust withheld has no mark of its own in the cache.
        if work.is_same and untouched and not self._trusted:
            self._drafts.append((path, live, NO_REMARKS))
            return [
                _Work(name, is_same=True, is_new=False, needs_metadata=False)
                for name, entry in zip(names, stats, strict=True)
                if stat.S_ISDIR(entry[MODE]) and name != b"."
            ]
        directory = self._opened(path, number, fd, found.st_dev, names, stats, block, work)
        return self._restore_names(directory)

    def _open_live(self, below: bytes, work: _Work) -> int:
        try:
            return self._directories.open(below)
        except PermissionError:  # our own directory without read or search permission
            if not below or self._is_root:
                raise
        above, _, name = below.rpartition(b"/")
        with inode_handle(name, self._directories.open(above)) as handle:
            mode = os.fstat(handle).st_mode
            if not stat.S_ISDIR(mode):
                raise StorageFailed(f"{shown(below)} changed while it was restored")
            os.chmod(handle_path(handle), stat.S_IMODE(mode) | 0o700)
        work.needs_metadata = True
        return self._directories.open(below)

    def _opened(
        self,
        path: bytes,
        number: int,
        fd: int,
        device: int,
        names: list[bytes],
        stats: list[Stat],
        block: Block | None,
        work: _Work,
    ) -> _Directory:
        vouched: dict[bytes, Stat] = {}
        recorded: dict[bytes, Entry] = {}
        remarks = Remarks()
        if block is not None:
            remarks = decode_remarks(block.remarks)
            vouched = dict(zip(*decode_live(block.live), strict=True))
            for name in remarks.untrusted:
                vouched.pop(name, None)
            recorded = self._known.entries(path)
        before = dict(zip(names, stats, strict=True))
        return _Directory(path, number, fd, device, before, vouched, recorded, remarks, work.is_new)

    def _restore_names(self, directory: _Directory) -> list[_Work]:
        wanted = self._target.entries(directory.path)
        if not directory.path and self._scope is not None:
            wanted = {name: entry for name, entry in wanted.items() if name in self._scope}
        if b"." in directory.before:
            directory.after[b"."] = directory.before.pop(b".")
        for name, live in directory.before.items():
            if name not in wanted and (not is_socket(live) or is_temporary(name)):
                self._remove(directory, name)
        for name, live in directory.before.items():
            if name not in wanted and is_socket(live) and not is_temporary(name):
                directory.after[name] = live
        subdirectories = []
        for name, entry in wanted.items():
            check_name(name)
            if entry.kind is EntryKind.DIRECTORY:
                subdirectories.append(self._restore_subdirectory(directory, entry))
            else:
                self._restore_name(directory, entry)
            self._files_seen += 1
        if self._progress is not None:
            self._progress(self._result.bytes_written, self._files_seen)
        names = sorted(directory.after)
        remarks = Remarks(
            frozenset(directory.untrusted),
            tuple(directory.links),
            tuple(sorted(directory.applied_xattrs.items())),
            tuple(directory.withheld),
        )
        live_bytes = encode_live(names, [directory.after[name] for name in names])
        self._drafts.append((directory.path, live_bytes, encode_remarks(remarks)))
        return subdirectories

    def _remove(self, directory: _Directory, name: bytes) -> None:
        self._unlock(directory)
        remove_name(name, directory.fd, joined(directory.path, name))
        self._result.names_removed += not is_temporary(name)

    def _unlock(self, directory: _Directory) -> None:
        """About to change names in `directory`: its time and rights are set again at the end."""
        if not directory.is_unlocked:
            directory.is_unlocked = True
            make_writable(directory.fd)
            self._touch(directory.number, METADATA)

    def _touch(self, number: int, flag: int) -> None:
        """The directory needs the second pass, and the stats of all above it with it."""
        self._flags[number] |= flag | RESTAT
        number = self._parents[number]
        while number >= 0 and not self._flags[number]:
            self._flags[number] |= RESTAT
            number = self._parents[number]

    def _restore_subdirectory(self, directory: _Directory, entry: Entry) -> _Work:
        name = entry.name
        live = directory.before.get(name)
        is_new = live is None or not stat.S_ISDIR(live[MODE])
        if is_new:
            if live is not None:
                self._remove(directory, name)
            self._unlock(directory)
            os.mkdir(name, 0o700, dir_fd=directory.fd)
            live = stat_of(os.stat(name, dir_fd=directory.fd, follow_symlinks=False))
        assert live is not None
        directory.after[name] = live
        known = directory.recorded.get(name)
        is_vouched = not is_new and directory.vouched.get(name) == live and known is not None
        needs_metadata = (
            not (is_vouched and known is not None and known.same_metadata(entry))
        ) or self._lacks_trusted(directory, entry, live)
        if not needs_metadata:
            self._keep_applied_xattrs(directory, name)
        is_same = (
            not is_new
            and known is not None
            and known.kind is EntryKind.DIRECTORY
            and known.tree == entry.tree
        )
        return _Work(name, is_same, is_new, needs_metadata)

    def _keep_applied_xattrs(self, directory: _Directory, name: bytes) -> None:
        for known_name, xattrs in directory.remarks.applied_xattrs:
            if known_name == name:
                directory.applied_xattrs[name] = xattrs

    # --- names that are no directories ------------------------------------------------------------

    def _restore_name(self, directory: _Directory, entry: Entry) -> None:
        name = entry.name
        if entry.hardlink:
            directory.links.append((name, entry.hardlink))
        live = directory.before.get(name)
        if live is not None and stat.S_ISDIR(live[MODE]):
            self._remove(directory, name)
            live = None
        if self._follows_leader(directory, entry, live):
            return
        if live is not None and self._is_as_recorded(directory, entry, live):
            directory.after[name] = live
            self._keep_applied_xattrs(directory, name)
        elif not self._adjust(directory, entry, live):
            self._make(directory, entry)
        if name in directory.after:
            found = directory.after[name]
            self._own(entry, joined(directory.path, name), directory.device, found)

    def _own(self, entry: Entry, path: bytes, device: int, found: Stat) -> None:
        """Remember whose inode this is, so that no name outside its group shares it."""
        if entry.hardlink:
            self._leaders[entry.hardlink] = (device, found[INODE], path)
        if found[NLINK] > 1 or entry.hardlink:
            self._owners[device, found[INODE]] = entry.hardlink or path

    def _may_keep_inode(self, directory: _Directory, live: Stat) -> bool:
        """False when a name restored before has this inode."""
        return live[NLINK] == 1 or (directory.device, live[INODE]) not in self._owners

    def _follows_leader(self, directory: _Directory, entry: Entry, live: Stat | None) -> bool:
        """A later name of a hardlink group: linked to the first one, unless it is already."""
        leader = self._leaders.get(entry.hardlink) if entry.hardlink else None
        if leader is None:
            return False
        device, inode, path = leader
        if live is not None and (directory.device, live[INODE]) == (device, inode):
            directory.after[entry.name] = live
            self._touch(directory.number, RESTAT)
            return True
        if device != directory.device:  # groups cannot span filesystems: a copy will have to do
            return False
        self._unlock(directory)
        above, _, name = path.rpartition(b"/")
        temporary = temporary_name()
        os.link(
            name,
            temporary,
            src_dir_fd=self._leader_directories.open(self._inside(above)),
            dst_dir_fd=directory.fd,
            follow_symlinks=False,
        )
        made = stat_of(os.stat(temporary, dir_fd=directory.fd, follow_symlinks=False))
        if made[INODE] != inode:
            os.unlink(temporary, dir_fd=directory.fd)
            raise StorageFailed(f"{shown(path)} changed while it was restored")
        self._rename(directory, temporary, entry.name)
        self._touch(directory.number, RESTAT)
        directory.after[entry.name] = made
        return True

    def _inside(self, path: bytes) -> bytes:
        return path[len(self._prefix) :].lstrip(b"/") if self._prefix else path

    def _is_vouched(self, directory: _Directory, entry: Entry, live: Stat) -> Entry | None:
        """What the cache knows the name to hold, if its stat vouches for it."""
        if directory.vouched.get(entry.name) != live:
            return None
        return directory.recorded.get(entry.name)

    def _is_as_recorded(self, directory: _Directory, entry: Entry, live: Stat) -> bool:
        known = self._is_vouched(directory, entry, live)
        return (
            known is not None
            and known.same_data(entry)
            and known.same_metadata(entry)
            and self._may_keep_inode(directory, live)
            and not self._lacks_trusted(directory, entry, live)
        )

    def _lacks_trusted(self, directory: _Directory, entry: Entry, live: Stat) -> bool:
        """Whether an earlier restore withheld what this one is trusted to apply."""
        if not self._trusted:
            return False
        is_link = entry.kind is EntryKind.SYMLINK
        if not is_link and entry.mode & _SET_ID_BITS & ~live[MODE]:
            return True
        return dict(directory.remarks.applied_xattrs).get(entry.name, entry.xattrs) != entry.xattrs

    def _adjust(self, directory: _Directory, entry: Entry, live: Stat | None) -> bool:
        """Bring what is there to its target without a new inode; False when that cannot be."""
        if (
            live is None
            or KINDS.get(stat.S_IFMT(live[MODE])) is not entry.kind
            or not self._may_keep_inode(directory, live)
        ):
            return False
        if entry.kind is EntryKind.FILE:
            return self._adjust_file(directory, entry, live)
        if not self._is_same_special(directory, entry):
            return False
        return self._adjust_metadata(directory, entry, live)

    def _is_same_special(self, directory: _Directory, entry: Entry) -> bool:
        if entry.kind is EntryKind.SYMLINK:
            return os.readlink(entry.name, dir_fd=directory.fd) == entry.link_target
        if entry.kind is EntryKind.FIFO:
            return True
        device = os.stat(entry.name, dir_fd=directory.fd, follow_symlinks=False).st_rdev
        return (os.major(device), os.minor(device)) == entry.device

    def _adjust_metadata(self, directory: _Directory, entry: Entry, live: Stat) -> bool:
        """Set metadata on the inode that is there; only looks when it has other names."""
        with inode_handle(entry.name, directory.fd) as handle:
            found = stat_of(os.fstat(handle))
            if found[INODE] != live[INODE]:
                raise StorageFailed(f"{shown(entry.name)} changed while it was restored")
            metadata = self._metadata(directory.path, entry, directory.fd, handle)
            if live[NLINK] > 1 and metadata.differs():
                return False
            self._applied(directory, entry, metadata)
            after = stat_of(os.fstat(handle))
        self._settled(directory, entry.name, live, after)
        return True

    def _settled(self, directory: _Directory, name: bytes, before: Stat, after: Stat) -> None:
        directory.after[name] = after
        if after != before:
            self._touch(directory.number, RESTAT)
        elif not self._baseline.trusts(after, directory.device):
            directory.untrusted.add(name)

    def _adjust_file(self, directory: _Directory, entry: Entry, live: Stat) -> bool:
        known = self._is_vouched(directory, entry, live)
        if known is not None and known.same_data(entry):
            return self._adjust_metadata(directory, entry, live)
        in_place = entry.layout is Layout.FIXED and live[NLINK] == 1
        try:
            fd = (
                os.open(entry.name, _WRITE_FLAGS, dir_fd=directory.fd)
                if in_place
                else open_file(entry.name, directory.fd)
            )
        except OSError as exc:
            if exc.errno in (errno.EACCES, errno.EPERM, errno.ETXTBSY):
                return False  # a new inode can still take its place
            raise
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode) or found.st_ino != live[INODE]:
                raise StorageFailed(f"{shown(entry.name)} changed while it was restored")
            if in_place and found.st_nlink == 1:
                written = self._write_differing(fd, entry, found.st_size, known)
                self._result.bytes_written += written
                self._result.files_written += written > 0
                if written or found.st_size != entry.size:
                    self._touch(directory.number, RESTAT)
            elif not self._holds(fd, entry, found.st_size):
                return False
        finally:
            os.close(fd)
        return self._adjust_metadata(directory, entry, live)

    def _holds(self, fd: int, entry: Entry, size: int) -> bool:
        """Whether the open file's bytes are those recorded."""
        if size != entry.size:
            return False
        offset = 0
        try:
            for span in file_spans(self._store, entry):
                if not _range_holds(fd, offset, span):
                    return False
                offset += span.length
        except FileMoved:
            return False
        return True

    def _write_differing(self, fd: int, entry: Entry, size: int, known: Entry | None) -> int:
        """Write the chunks that differ into the open file; returns bytes written."""
        if size != entry.size:
            os.ftruncate(fd, entry.size)
        known_spans: dict[int, Span] = {}
        if known is not None and known.layout is Layout.FIXED and known.size == size:
            offset = 0
            for span in file_spans(self._store, known):
                known_spans[offset] = span
                offset += span.length
        offset = written = 0
        for span in file_spans(self._store, entry):
            if known_spans.get(offset) != span and not _range_holds(fd, offset, span):
                written += self._write_span(fd, offset, span, sparse=entry.sparse)
            offset += span.length
        return written

    def _write_span(self, fd: int, offset: int, span: Span, *, sparse: bool) -> int:
        if span.chunk != ZERO_RUN:
            data = self._store.read(Kind.CHUNK, span.chunk)
            if len(data) != span.length:
                raise BadObject("a chunk is not as long as its span")
            _write_at(fd, data, offset)
        elif not (sparse and punch_hole(fd, offset, span.length)):
            for start in range(0, span.length, len(_ZEROS)):
                part = memoryview(_ZEROS)[: min(len(_ZEROS), span.length - start)]
                _write_at(fd, part, offset + start)
        return span.length

    # --- new inodes ----------------------------------------------------------------------------

    def _rename(self, directory: _Directory, temporary: bytes, name: bytes) -> None:
        os.rename(temporary, name, src_dir_fd=directory.fd, dst_dir_fd=directory.fd)

    def _make(self, directory: _Directory, entry: Entry) -> None:
        """Make the name anew under a temporary name and rename it into place."""
        self._unlock(directory)
        temporary = temporary_name()
        if not self._make_inode(directory, entry, temporary):
            if entry.name in directory.before:
                remove_name(entry.name, directory.fd, joined(directory.path, entry.name))
            directory.withheld.append(entry.name)
            self._result.withheld.append(joined(directory.path, entry.name))
            return
        self._rename(directory, temporary, entry.name)
        made = os.stat(entry.name, dir_fd=directory.fd, follow_symlinks=False)
        directory.after[entry.name] = stat_of(made)
        self._result.files_written += 1

    def _make_inode(self, directory: _Directory, entry: Entry, temporary: bytes) -> bool:
        """False when the kind may not be made here."""
        try:
            match entry.kind:
                case EntryKind.FILE:
                    self._make_file(directory, entry, temporary)
                    return True
                case EntryKind.SYMLINK:
                    os.symlink(entry.link_target, temporary, dir_fd=directory.fd)
                case EntryKind.FIFO:
                    os.mkfifo(temporary, 0o600, dir_fd=directory.fd)
                case _:
                    if not self._trusted or not self._make_device(directory, entry, temporary):
                        return False
            with inode_handle(temporary, directory.fd) as handle:
                metadata = self._metadata(
                    directory.path, entry, directory.fd, handle, name=temporary
                )
                self._applied(directory, entry, metadata)
        except BaseException:
            _unlink_if_there(temporary, directory.fd)
            raise
        return True

    def _make_device(self, directory: _Directory, entry: Entry, temporary: bytes) -> bool:
        kind = stat.S_IFCHR if entry.kind is EntryKind.CHARACTER_DEVICE else stat.S_IFBLK
        try:
            os.mknod(temporary, kind | 0o600, os.makedev(*entry.device), dir_fd=directory.fd)
        except PermissionError:
            return False
        return True

    def _make_file(self, directory: _Directory, entry: Entry, temporary: bytes) -> None:
        fd = os.open(temporary, _CREATE_FLAGS, 0o600, dir_fd=directory.fd)
        try:
            self._fill(fd, entry)
            metadata = self._metadata(directory.path, entry, directory.fd, fd)
            self._applied(directory, entry, metadata)
        finally:
            os.close(fd)

    def _fill(self, fd: int, entry: Entry) -> None:
        """Write a new file. Runs of zeros are holes when recorded so, else allocated space."""
        allocated = not entry.sparse and entry.size >= _PREALLOCATE_BYTES_MIN
        if allocated:
            os.posix_fallocate(fd, 0, entry.size)
        elif entry.size:
            os.ftruncate(fd, entry.size)
        offset = 0
        for span in file_spans(self._store, entry):
            if span.chunk != ZERO_RUN or not (allocated or entry.sparse):
                self._result.bytes_written += self._write_span(fd, offset, span, sparse=False)
            offset += span.length

    # --- metadata ------------------------------------------------------------------------------

    def _metadata(
        self, path: bytes, entry: Entry, directory_fd: int, fd: int, name: bytes | None = None
    ) -> "_Metadata":
        link = name or entry.name if entry.kind is EntryKind.SYMLINK else None
        return _Metadata(
            entry,
            fd,
            directory_fd,
            link,
            path=joined(path, entry.name) if entry.name else path,
            trusted=self._trusted,
            is_root=self._is_root,
        )

    def _applied(self, directory: _Directory, entry: Entry, metadata: "_Metadata") -> None:
        xattrs = metadata.apply()
        if xattrs != entry.xattrs:
            directory.applied_xattrs[entry.name] = xattrs
        if metadata.is_incomplete:
            self._result.unapplied.append(metadata.path)

    # --- second pass ------------------------------------------------------------------------------

    def _finish_directories(self) -> StatCacheWriter:
        cache = StatCacheWriter()
        number = len(self._flags)
        for path, live, remarks in self._drafts.backward():
            number -= 1
            if self._flags[number]:
                live, remarks = self._finish_directory(path, live, remarks, number)
            cache.append(path, live, remarks)
        if self._prefix:
            root_stat = stat_of(os.fstat(self._root_fd))
            xattrs = self._directory_xattrs.get(self._prefix)
            remark = Remarks(applied_xattrs=((self._prefix, xattrs),) if xattrs is not None else ())
            if self._target.entry(self._prefix) is not None:
                cache.append(b"", encode_live([self._prefix], [root_stat]), encode_remarks(remark))
        return cache

    def _finish_directory(
        self, path: bytes, live: bytes, remarks_bytes: bytes, number: int
    ) -> tuple[bytes, bytes]:
        fd = self._directories.open(self._inside(path))
        names, stats = decode_live(live)
        remarks = decode_remarks(remarks_bytes)
        links = {name for name, _ in remarks.links}
        untrusted = set(remarks.untrusted)
        applied = dict(remarks.applied_xattrs)
        if self._flags[number] & METADATA:
            self._finish_metadata(path, fd)
        found: list[Stat] = []
        for name, written in zip(names, stats, strict=True):
            if name == b".":
                now = stat_of(os.fstat(fd))
            else:
                now = stat_of(os.stat(name, dir_fd=fd, follow_symlinks=False))
            found.append(now)
            if not stat.S_ISDIR(now[MODE]) and not _is_settled(now, written, name in links):
                untrusted.add(name)
            below = path if name == b"." else joined(path, name)
            if below in self._directory_xattrs:
                applied[name] = self._directory_xattrs.pop(below)
        device = os.fstat(fd).st_dev
        if device in self._baseline.untrusted_devices:
            untrusted |= {
                name for name, now in zip(names, found, strict=True) if stat.S_ISREG(now[MODE])
            }
        remarks = remarks._replace(
            untrusted=frozenset(untrusted), applied_xattrs=tuple(sorted(applied.items()))
        )
        return encode_live(list(names), found), encode_remarks(remarks)

    def _finish_metadata(self, path: bytes, fd: int) -> None:
        if path == b"" and not self._root_metadata:
            return
        entry = self._target.entry(path)
        if entry is None:
            return
        metadata = self._metadata(path.rpartition(b"/")[0], entry, fd, fd)
        xattrs = metadata.apply()
        if xattrs != entry.xattrs:
            self._directory_xattrs[path] = xattrs
        if metadata.is_incomplete:
            self._result.unapplied.append(path)


def _is_settled(now: Stat, written: Stat, is_linked: bool) -> bool:
    """Whether a name still is what this restore saw or wrote; linking moves count and ctime."""
    if is_linked:
        return (now[MODE], now[INODE], now[SIZE], now[MTIME]) == (
            written[MODE],
            written[INODE],
            written[SIZE],
            written[MTIME],
        )
    return now == written


def _list_all(fd: int) -> tuple[list[bytes], list[Stat]]:
    """Names and stats of everything in `fd`, also what a cut restore left."""
    found = []
    for text in os.listdir(fd):
        try:
            status = os.stat(text, dir_fd=fd, follow_symlinks=False)
        except FileNotFoundError:
            continue
        found.append((os.fsencode(text), stat_of(status)))
    found.sort()
    return [name for name, _ in found], [status for _, status in found]


def _range_holds(fd: int, offset: int, span: Span) -> bool:
    """Whether the open file has the bytes of `span` at `offset`."""
    if span.chunk == ZERO_RUN:
        return all(is_zero(block) for block in buffers(fd, offset, span.length, READ_BYTES))
    block = next(buffers(fd, offset, span.length, span.length))
    return object_id(Kind.CHUNK, block) == span.chunk


def _write_at(fd: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while len(view):
        done = os.pwrite(fd, view, offset)
        view = view[done:]
        offset += done


def _unlink_if_there(name: bytes, directory_fd: int) -> None:
    try:
        os.unlink(name, dir_fd=directory_fd)
    except FileNotFoundError:
        pass


class _Metadata:
    """Recorded metadata on its way to one inode.

    The inode is given by a descriptor (O_PATH will do); a symlink also by its name in
    `directory_fd`, because its attributes are set by name without following.
    """

    def __init__(
        self,
        entry: Entry,
        fd: int,
        directory_fd: int,
        link_name: bytes | None,
        *,
        path: bytes,
        trusted: bool,
        is_root: bool,
    ) -> None:
        self.path = path
        self.is_incomplete = False
        self._entry = entry
        self._handle = handle_path(fd)
        self._directory_fd = directory_fd
        self._link_name = link_name
        self._is_root = is_root
        self._found = os.fstat(fd)
        self._mode = entry.mode if trusted else entry.mode & ~_SET_ID_BITS
        self._xattrs = tuple(
            pair for pair in entry.xattrs if pair[0] != _CAPABILITY or (trusted and is_root)
        )
        if self._mode != entry.mode or self._xattrs != entry.xattrs:
            self.is_incomplete = True

    def _live_xattrs(self) -> Xattrs:
        if self._link_name is None:
            return read_xattrs(self._handle)
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
                os.chown(self._handle, uid, gid)
        except PermissionError:
            self.is_incomplete = True

    def _apply_mode(self) -> None:
        live = os.stat(self._handle).st_mode  # chown may have taken bits
        if stat.S_IMODE(live) != self._mode:
            try:
                os.chmod(self._handle, self._mode)
            except PermissionError:
                self.is_incomplete = True

    def _apply_xattrs(self) -> Xattrs:
        live = dict(self._live_xattrs())
        wanted = dict(self._xattrs)
        if live == wanted:
            return self._xattrs
        follow = self._link_name is None
        path = (
            self._handle
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
                os.utime(self._handle, ns=times)
        except PermissionError:
            self.is_incomplete = True
        except OverflowError as exc:
            raise BadObject("a file's time is out of range") from exc
