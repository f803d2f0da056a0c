"""Reads a live tree into objects (commit) or only compares it with what is recorded (status).

Three phases: scan (stats only), content of files that have a large old counterpart (so that the
similar-page search knows their changed pages before new files such as WAL are written), then
directories, children before parents, with all other files read on the way. Memory follows one
directory and the number of directories, not the number of files.

What is recorded and what is applied in the live tree may differ (an ordinary user cannot chown;
devices, setuid and capabilities wait for trust): wherever the applied value is untouched since,
the recorded one is taken back.
"""

import os
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Final

from dmsync.core.chunking import FIXED_CHUNK_BYTES
from dmsync.core.ids import ObjectId
from dmsync.core.objects import (
    LINK_TARGET_BYTES_MAX,
    ROOT_ENTRY,
    XATTR_BYTES_MAX,
    XATTRS_MAX,
    Entry,
    EntryKind,
    Layout,
)
from dmsync.core.pages import (
    DIRECTORY,
    PageBases,
    PageReader,
    write_directory,
)
from dmsync.engine.differences import Change, compared, joined, whole_tree, with_renames
from dmsync.engine.file_content import (
    ChunkWriter,
    ContentReader,
    FileContent,
    FileMoved,
    TooLarge,
)
from dmsync.engine.recorded_tree import RecordedTree
from dmsync.engine.safe_files import (
    DENIED,
    DIRECTORY_FLAGS,
    GONE,
    TreeDirectories,
    Xattrs,
    handle_path,
    open_file,
    open_tree,
    read_xattrs,
)
from dmsync.engine.tree_scan import (
    GID,
    INODE,
    MODE,
    MTIME,
    NLINK,
    UID,
    UNREADABLE,
    Baseline,
    Draft,
    Scan,
    Scanner,
    is_socket,
    stat_of,
)
from dmsync.errors import BadObject, CaptureFailed
from dmsync.storage.stat_cache import (
    Remarks,
    Stat,
    StatCache,
    StatCacheWriter,
    decode_live,
    decode_remarks,
    encode_live,
    encode_remarks,
)

READS_MAX: Final = 3
"""Times a file that moves while it is read is read before the last reading is taken."""
_INT64: Final = 2**63

Progress = Callable[[int, int], None]
"""Called now and then with (bytes read, files read) so far."""

KINDS: Final = {
    stat.S_IFREG: EntryKind.FILE,
    stat.S_IFDIR: EntryKind.DIRECTORY,
    stat.S_IFLNK: EntryKind.SYMLINK,
    stat.S_IFIFO: EntryKind.FIFO,
    stat.S_IFCHR: EntryKind.CHARACTER_DEVICE,
    stat.S_IFBLK: EntryKind.BLOCK_DEVICE,
}


@dataclass(frozen=True, slots=True)
class Notice:
    """Something about one path that the user should hear."""

    path: bytes
    message: str


@dataclass
class CaptureStatistics:
    files: int = 0
    directories: int = 0
    bytes_scanned: int = 0
    bytes_hashed: int = 0
    bytes_differing: int = 0
    """Bytes of chunks that the base does not have at the same place."""
    files_changed: int = 0
    """Entries added, removed or changed against the base, directories not counted."""


@dataclass
class CaptureResult:
    """`root` is the root entry to commit. `stat_cache` is to be saved once that commit is."""

    root: Entry
    stat_cache: StatCache
    statistics: CaptureStatistics
    unstable_paths: list[bytes]
    """Changed while they were read; recorded as read last."""
    unreadable_paths: list[bytes]
    """Not read; recorded as the base has them, or left out."""
    notices: list[Notice]


@dataclass
class StatusResult:
    changes: list[Change]
    dirty_bytes: int
    unstable_paths: list[bytes]
    unreadable_paths: list[bytes]

    @property
    def is_dirty(self) -> bool:
        return bool(self.changes)


def capture_tree(
    *,
    tree_path: str | bytes,
    as_subdot: bytes | None,
    store: PageReader,
    writer: ChunkWriter,
    base: Entry,
    stat_cache: StatCache | None,
    now_ns: int,
    root_metadata: bool = False,
    scope: frozenset[bytes] | None = None,
    progress: Progress | None = None,
) -> CaptureResult:
    """Store the state of a live tree and return its root entry; nothing is committed.

    `base` is the root the tree was last committed or restored as (ROOT_ENTRY when there is none);
    `stat_cache` helps only when it was made for that root. `as_subdot`: the tree is that subdot
    of an otherwise empty root; None: the tree is the dot's root, whose own metadata is recorded
    with `root_metadata`. With `scope` the tree holds these subdots only, and the others stay as in
    `base`.

    Raises:
        CaptureFailed: the tree cannot be walked, or holds a subdot that is not in `scope`.
        StorageFull, StorageFailed: from the writer.
    """
    capture = _TreeCapture(
        tree_path,
        as_subdot,
        store,
        writer,
        base,
        root_metadata=root_metadata,
        scope=scope,
        progress=progress,
    )
    try:
        return capture.run(stat_cache, now_ns)
    finally:
        capture.close()


def status_of_tree(
    *,
    tree_path: str | bytes,
    as_subdot: bytes | None,
    store: PageReader,
    base: Entry,
    stat_cache: StatCache | None,
    now_ns: int,
    root_metadata: bool = False,
    scope: frozenset[bytes] | None = None,
    stop_at_change: bool = False,
    renames: bool = True,
) -> StatusResult:
    """Changes of a live tree against `base`, sorted by path; nothing is written.

    Hashes only files whose stat does not vouch for them. With `stop_at_change` the list may end
    after the first change. Arguments and errors as for `capture_tree`.
    """
    reading = _TreeStatus(
        tree_path, as_subdot, store, None, base, root_metadata=root_metadata, scope=scope
    )
    try:
        return reading.run(stat_cache, now_ns, stop_at_change=stop_at_change, renames=renames)
    finally:
        reading.close()


@dataclass(slots=True)
class _Reading:
    """One file as read: `found` is its stat after reading."""

    content: FileContent
    xattrs: Xattrs
    found: Stat
    device: int
    is_stable: bool


class _NotRegularError(Exception):
    """What was listed as a file is none any more."""


@dataclass(slots=True)
class _Name:
    """One name of a directory being built: what was scanned and what is recorded."""

    name: bytes
    path: bytes
    live: Stat
    before: Stat | None
    recorded: Entry | None
    device: int
    applied_xattrs: Xattrs | None
    is_trusted: bool = True

    def takes_back(self) -> bool:
        """Whether recorded values still stand behind the applied ones."""
        return (
            self.recorded is not None
            and self.before is not None
            and stat.S_IFMT(self.before[MODE]) == stat.S_IFMT(self.live[MODE])
            and KINDS.get(stat.S_IFMT(self.live[MODE])) is self.recorded.kind
        )


@dataclass(slots=True)
class _Built:
    """A directory being built: entries, and what its cache block will hold."""

    entries: list[Entry] = field(default_factory=list)
    names: list[bytes] = field(default_factory=list)
    stats: list[Stat] = field(default_factory=list)
    untrusted: set[bytes] = field(default_factory=set)
    applied_xattrs: list[tuple[bytes, Xattrs]] = field(default_factory=list)


class _TreeReading:
    """What capture and status share: scan, read what changed, build entries bottom up."""

    def __init__(
        self,
        tree_path: str | bytes,
        as_subdot: bytes | None,
        store: PageReader,
        writer: ChunkWriter | None,
        base: Entry,
        *,
        root_metadata: bool = False,
        scope: frozenset[bytes] | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._store = store
        self._scope = scope
        self._base = base
        self._prefix = as_subdot or b""
        self._root_metadata = root_metadata and as_subdot is None
        self._progress = progress
        self._content = ContentReader(store, writer, incremental=base.tree is not None)
        self._root_fd = open_tree(tree_path)
        self._directories = TreeDirectories(self._root_fd)
        self._baseline = Baseline(0)
        self._scan = Scan()
        self._readings: dict[bytes, _Reading] = {}
        self._group_readings: dict[tuple[int, int], _Reading] = {}
        self._trees: dict[bytes, ObjectId | None] = {}
        self._recorded = RecordedTree(store, base)
        self._root_entry = ROOT_ENTRY
        self._files_read = 0
        self.statistics = CaptureStatistics()
        self.unstable: set[bytes] = set()
        self.unreadable: set[bytes] = set()
        self.notices: list[Notice] = []

    def close(self) -> None:
        self._directories.close()
        os.close(self._root_fd)

    def _scan_tree(self, cache: StatCache | None, now_ns: int, *, stop_at_change: bool) -> None:
        self._refuse_strays()
        known = cache if cache is not None and cache.root == self._base else None
        self._baseline = Baseline(now_ns)
        try:
            self._scan = self._scanner(known).run(self._baseline, stop_at_change=stop_at_change)
        except BadObject:  # a cache that lies: everything is hashed again
            self._baseline = Baseline(now_ns)
            self._scan = self._scanner(None).run(self._baseline, stop_at_change=stop_at_change)

    def _scanner(self, cache: StatCache | None) -> Scanner:
        return Scanner(
            root_fd=self._root_fd,
            as_subdot=self._prefix or None,
            cache=cache,
            root_metadata=self._root_metadata,
            large_bytes=FIXED_CHUNK_BYTES + 1,
        )

    # --- files -----------------------------------------------------------------------------------

    def _read_large_counterparts(self) -> None:
        """Phase two: files whose old state is a FIXED file, at their path or by their inode."""
        if self._base.tree is None:
            return
        for path, inode in self._scan.large:
            old = self._content_base(path, inode)
            if old is None or old.layout is not Layout.FIXED:
                continue
            above, _, name = path.rpartition(b"/")
            try:
                self._readings[path] = self._read_file(name, self._open(above), path, old)
            except (OSError, FileMoved, TooLarge, _NotRegularError):
                continue  # met again, and judged, when its directory is built

    def _content_base(self, path: bytes, inode: int) -> Entry | None:
        """The recorded file that `path` replaces, or that its inode was under another name."""
        if self._base.tree is None:
            return None
        return self._file_before(self._recorded.entry(path), inode)

    def _file_before(self, at_path: Entry | None, inode: int) -> Entry | None:
        if at_path is not None and at_path.kind is EntryKind.FILE:
            return at_path
        former = self._scan.gone.get(inode)
        old = self._recorded.entry(former) if former is not None else None
        return old if old is not None and old.kind is EntryKind.FILE else None

    def _read_file(
        self, name: bytes, directory_fd: int, path: bytes, old: Entry | None
    ) -> _Reading:
        fd = open_file(name, directory_fd)
        try:
            reading = None
            for attempt in range(READS_MAX):
                found = os.fstat(fd)
                if not stat.S_ISREG(found.st_mode):
                    raise _NotRegularError
                try:
                    content = self._content.read(fd, found, old)
                except FileMoved:
                    if attempt == READS_MAX - 1 and reading is None:
                        raise
                    continue
                xattrs = read_xattrs(fd)
                after = os.fstat(fd)
                is_stable = stat_of(found) == stat_of(after)
                reading = _Reading(content, xattrs, stat_of(found), found.st_dev, is_stable)
                if is_stable:
                    break
        finally:
            os.close(fd)
        assert reading is not None
        self._files_read += 1
        if self._progress is not None:
            self._progress(self._content.bytes_hashed, self._files_read)
        return reading

    def _open(self, path: bytes) -> int:
        """Descriptor of the live directory at `path` of the dot."""
        inside = path[len(self._prefix) :].lstrip(b"/") if self._prefix else path
        return self._directories.open(inside)

    # --- entries ---------------------------------------------------------------------------------

    def _build_directories(self) -> None:
        """Phase three."""
        for is_dirty, draft in self._scan.drafts_backward():
            if draft.path in self._scan.unopened:
                continue
            if is_dirty:
                self._build(draft)
            else:
                self._keep(draft)

    def _keep(self, draft: Draft) -> None:
        """A directory in which nothing changed, nor below it."""

    def _directory_built(
        self, draft: Draft, built: _Built, recorded: dict[bytes, Entry], remarks: Remarks
    ) -> None:
        raise NotImplementedError

    def _build(self, draft: Draft) -> None:
        names, stats = decode_live(draft.live)
        remarks = decode_remarks(draft.remarks)
        applied = dict(remarks.applied_xattrs)
        recorded = self._recorded.entries(draft.path)
        before = (
            dict(zip(draft.changed, draft.before, strict=True))
            if draft.known
            else dict.fromkeys(names)
        )
        built = _Built()
        for name, live in zip(names, stats, strict=True):
            item = _Name(
                name,
                joined(draft.path, name),
                live,
                before.get(name),
                self._base if name == b"." else recorded.get(name),
                draft.device,
                applied.get(name),
            )
            if name in before or item.recorded is None:
                self._add_fresh(built, item)
            else:
                self._add_unchanged(built, item)
        for name in {*remarks.withheld, *self._kept_elsewhere(draft.path, recorded)}:
            if name not in names and name in recorded:
                built.entries.append(recorded[name])
        built.entries.sort(key=lambda entry: entry.name)
        self._directory_built(draft, built, recorded, remarks)

    def _refuse_strays(self) -> None:
        """A subdot in the tree that is not kept here would take the place of the recorded one.

        Raises:
            CaptureFailed: there is one.
        """
        if self._scope is None or self._prefix:
            return
        for name in sorted(os.listdir(self._root_fd)):
            if os.fsencode(name) not in self._scope:
                raise CaptureFailed(
                    f"subdot {os.fsdecode(name)} is not one of those kept here",
                    hint="move it away: dm dot show lists them, a full clone has all",
                )

    def _kept_elsewhere(self, path: bytes, recorded: Iterable[bytes]) -> Iterable[bytes]:
        """Recorded subdots that are not in this tree, because only some are kept here."""
        if path or self._scope is None:
            return ()
        return [name for name in recorded if name not in self._scope]

    def _add_unchanged(self, built: _Built, item: _Name) -> None:
        """A name whose stat vouches for what is recorded; below a directory things may differ."""
        entry = item.recorded
        assert entry is not None
        built.names.append(item.name)
        built.stats.append(item.live)
        if item.applied_xattrs is not None:
            built.applied_xattrs.append((item.name, item.applied_xattrs))
        if item.name == b".":
            self._root_entry = entry
            return
        reason = self._scan.unopened.get(item.path)
        if reason is not None:
            self._add_unopened(built, item, reason)
            return
        if entry.kind is EntryKind.DIRECTORY:
            if item.path in self._trees:
                entry = replace(entry, tree=self._trees.pop(item.path))
        elif self._group(item) != entry.hardlink:
            entry = replace(entry, hardlink=self._group(item))
        built.entries.append(entry)

    def _group(self, item: _Name) -> bytes:
        return self._scan.hardlinks.get(item.path, b"") if item.live[NLINK] > 1 else b""

    def _add_unopened(self, built: _Built, item: _Name, reason: str) -> None:
        built.untrusted.add(item.name)
        (self.unreadable if reason == UNREADABLE else self.unstable).add(item.path)
        if reason == UNREADABLE and item.recorded is not None:
            built.entries.append(item.recorded)

    def _add_fresh(self, built: _Built, item: _Name) -> None:
        """A name that has to be looked at."""
        entry = None
        try:
            entry = self._fresh_entry(built, item)
        except OSError as exc:
            if exc.errno in DENIED:
                self.unreadable.add(item.path)
                entry = item.recorded
            elif exc.errno in GONE:
                self.unstable.add(item.path)
                return
            else:
                self.unreadable.add(item.path)
                self.notices.append(Notice(item.path, f"cannot be read: {exc.strerror}"))
                entry = item.recorded
            item.is_trusted = False
        except (FileMoved, _NotRegularError):
            self.unstable.add(item.path)
            entry = item.recorded
            item.is_trusted = False
        except TooLarge:
            self.unreadable.add(item.path)
            self.notices.append(Notice(item.path, "too large a file with holes to be hashed"))
            entry = item.recorded
            item.is_trusted = False
        built.names.append(item.name)
        built.stats.append(item.live)
        if not item.is_trusted or not self._baseline.trusts(item.live, item.device):
            built.untrusted.add(item.name)
        if entry is None:
            return
        if item.name == b".":
            self._root_entry = entry.renamed(b"")
        else:
            built.entries.append(entry)

    def _fresh_entry(self, built: _Built, item: _Name) -> Entry | None:
        kind = KINDS.get(stat.S_IFMT(item.live[MODE]))
        if kind is None:
            if is_socket(item.live):
                self.notices.append(Notice(item.path, "socket not recorded"))
            return None
        if kind is EntryKind.FILE:
            return self._file_entry(built, item)
        if kind is EntryKind.DIRECTORY:
            return self._directory_entry(built, item)
        directory_fd = self._open(item.path.rpartition(b"/")[0])
        xattrs = read_xattrs(handle_path(directory_fd, item.name), follow_symlinks=False)
        entry = self._with_metadata(built, item, kind, xattrs)
        if kind is EntryKind.SYMLINK:
            target = os.readlink(item.name, dir_fd=directory_fd)[:LINK_TARGET_BYTES_MAX]
            return replace(entry, link_target=target)
        if kind is EntryKind.FIFO:
            return entry
        device = os.stat(item.name, dir_fd=directory_fd, follow_symlinks=False).st_rdev
        return replace(entry, device=(os.major(device), os.minor(device)))

    def _file_entry(self, built: _Built, item: _Name) -> Entry:
        reading = self._reading(item)
        if reading.found != item.live and reading.found[INODE] != item.live[INODE]:
            item.before = None  # another file by now: nothing recorded stands behind it
        item.live = reading.found
        if not reading.is_stable:
            self.unstable.add(item.path)
            item.is_trusted = False
        content = reading.content
        return replace(
            self._with_metadata(built, item, EntryKind.FILE, reading.xattrs),
            size=content.size,
            content=content.content,
            layout=content.layout,
            tree=content.tree,
            sparse=content.sparse,
        )

    def _reading(self, item: _Name) -> _Reading:
        """The file's content, read now unless phase two or another of its names has it."""
        reading = self._readings.pop(item.path, None)
        key = (item.device, item.live[INODE])
        if reading is None and item.live[NLINK] > 1:
            reading = self._group_readings.get(key)
        if reading is None:
            old = self._file_before(item.recorded, item.live[INODE])
            directory_fd = self._open(item.path.rpartition(b"/")[0])
            reading = self._read_file(item.name, directory_fd, item.path, old)
        if item.live[NLINK] > 1 and reading.found[INODE] == item.live[INODE]:
            self._group_readings[key] = reading
        return reading

    def _directory_entry(self, built: _Built, item: _Name) -> Entry | None:
        reason = self._scan.unopened.get(item.path)
        if reason is not None:
            item.is_trusted = False
            (self.unreadable if reason == UNREADABLE else self.unstable).add(item.path)
            return item.recorded if reason == UNREADABLE else None
        fd = self._open_entry_directory(item)
        try:
            xattrs = read_xattrs(fd)
        finally:
            os.close(fd)
        entry = self._with_metadata(built, item, EntryKind.DIRECTORY, xattrs)
        if item.path in self._trees:
            return replace(entry, tree=self._trees.pop(item.path))
        if item.recorded is not None and item.recorded.kind is EntryKind.DIRECTORY:
            return replace(entry, tree=item.recorded.tree)
        return entry

    def _open_entry_directory(self, item: _Name) -> int:
        if item.name == b"." or item.path == self._prefix:
            return os.dup(self._root_fd)
        directory_fd = self._open(item.path.rpartition(b"/")[0])
        return os.open(item.name, DIRECTORY_FLAGS, dir_fd=directory_fd)

    def _with_metadata(self, built: _Built, item: _Name, kind: EntryKind, xattrs: Xattrs) -> Entry:
        """Entry with the live metadata, recorded values where the applied ones are untouched."""
        live, before, recorded = item.live, item.before, item.recorded
        xattrs = self._bounded(item.path, xattrs)
        entry = Entry(
            name=item.name,
            kind=kind,
            mode=stat.S_IMODE(live[MODE]),
            uid=live[UID],
            gid=live[GID],
            mtime_ns=min(max(live[MTIME], -_INT64), _INT64 - 1),
            hardlink=b"" if kind is EntryKind.DIRECTORY else self._group(item),
            xattrs=xattrs,
        )
        if item.takes_back():
            assert before is not None and recorded is not None
            applied = recorded.xattrs if item.applied_xattrs is None else item.applied_xattrs
            entry = replace(
                entry,
                mode=_mode_taken_back(live[MODE], before[MODE], recorded.mode),
                uid=recorded.uid if live[UID] == before[UID] else entry.uid,
                gid=recorded.gid if live[GID] == before[GID] else entry.gid,
                mtime_ns=recorded.mtime_ns if live[MTIME] == before[MTIME] else entry.mtime_ns,
                xattrs=_taken_back(xattrs, applied, recorded.xattrs),
                extensions=recorded.extensions,
            )
        if entry.xattrs != xattrs:
            built.applied_xattrs.append((item.name, xattrs))
        return entry

    def _bounded(self, path: bytes, xattrs: Xattrs) -> Xattrs:
        """The attributes that an entry may hold; a notice for those that it may not."""
        kept = tuple(pair for pair in xattrs if len(pair[1]) <= XATTR_BYTES_MAX)[:XATTRS_MAX]
        if len(kept) != len(xattrs):
            self.notices.append(Notice(path, "extended attributes beyond the limits not recorded"))
        return kept


def _mode_taken_back(live: int, applied: int, recorded: int) -> int:
    """The recorded mode while the applied one is untouched, else the live one with the set-id bits
    that are recorded and were not applied: who could not see them did not take them away."""
    if live == applied:
        return recorded
    return stat.S_IMODE(live) | (recorded & ~applied & (stat.S_ISUID | stat.S_ISGID))


def _taken_back(live: Xattrs, applied: Xattrs, recorded: Xattrs) -> Xattrs:
    """`live`, but what was recorded for each attribute that is as it was applied."""
    if live == applied:
        return recorded
    now, then, kept = dict(live), dict(applied), dict(recorded)
    result = {}
    for name in now.keys() | kept.keys():
        value = kept.get(name) if now.get(name) == then.get(name) else now.get(name)
        if value is not None:
            result[name] = value
    return tuple(sorted(result.items()))[:XATTRS_MAX]


class _TreeCapture(_TreeReading):
    """Writes what it reads, and the next stat cache."""

    def __init__(
        self,
        tree_path: str | bytes,
        as_subdot: bytes | None,
        store: PageReader,
        writer: ChunkWriter,
        base: Entry,
        *,
        root_metadata: bool,
        scope: frozenset[bytes] | None,
        progress: Progress | None,
    ) -> None:
        super().__init__(
            tree_path,
            as_subdot,
            store,
            writer,
            base,
            root_metadata=root_metadata,
            scope=scope,
            progress=progress,
        )
        self._writer = writer
        self._cache = StatCacheWriter()

    def run(self, cache: StatCache | None, now_ns: int) -> CaptureResult:
        self._scan_tree(cache, now_ns, stop_at_change=False)
        scan, statistics = self._scan, self.statistics
        if self._prefix and self._recorded.entries(b"").keys() - {self._prefix}:
            scan.mark_dirty(0)  # subdots that an attached tree does not have are left out
        if any(scan.dirty) or cache is None:
            self._read_large_counterparts()
            self._build_directories()
            root = replace(self._root_entry, tree=self._trees.get(b""))
            cache = self._cache.finish(root)
        else:
            root = self._base
        statistics.files = scan.files
        statistics.directories = scan.directories
        statistics.bytes_scanned = scan.bytes
        statistics.bytes_hashed = self._content.bytes_hashed
        statistics.bytes_differing = self._content.bytes_differing
        return CaptureResult(
            root,
            cache,
            statistics,
            sorted(self.unstable),
            sorted(self.unreadable),
            self.notices,
        )

    def _keep(self, draft: Draft) -> None:
        self._cache.append(draft.path, draft.live, draft.remarks)

    def _directory_built(
        self, draft: Draft, built: _Built, recorded: dict[bytes, Entry], remarks: Remarks
    ) -> None:
        old_tree = self._recorded.directory(draft.path)
        self._trees[draft.path] = self._write(built.entries, recorded, old_tree)
        names = {entry.name for entry in built.entries}
        next_remarks = Remarks(
            frozenset(built.untrusted),
            tuple((entry.name, entry.hardlink) for entry in built.entries if entry.hardlink),
            tuple(built.applied_xattrs),
            tuple(name for name in remarks.withheld if name in names - set(built.names)),
        )
        live = encode_live(built.names, built.stats)
        self._cache.append(draft.path, live, encode_remarks(next_remarks))

    def _write(
        self, entries: list[Entry], recorded: dict[bytes, Entry], old_tree: ObjectId | None
    ) -> ObjectId | None:
        changed = len(recorded)
        different = False
        for entry in entries:
            old = recorded.get(entry.name)
            changed -= old is not None
            if old != entry:
                different = True
                if entry.kind is not EntryKind.DIRECTORY:
                    self.statistics.files_changed += 1
        self.statistics.files_changed += changed  # removed names
        if not different and not changed:
            return old_tree
        bases = PageBases(self._store, old_tree, DIRECTORY)
        return write_directory(self._writer, entries, bases)


class _TreeStatus(_TreeReading):
    """Compares what it reads; directory pages are never built."""

    _changes: list[Change]

    def run(
        self, cache: StatCache | None, now_ns: int, *, stop_at_change: bool, renames: bool
    ) -> StatusResult:
        self._changes = []
        self._scan_tree(cache, now_ns, stop_at_change=False)
        for is_dirty, draft in self._scan.drafts_backward():
            if is_dirty and draft.path not in self._scan.unopened:
                self._build(draft)
                if stop_at_change and self._changes:
                    break
        return StatusResult(
            with_renames(self._changes) if renames else sorted_by_path(self._changes),
            self._content.bytes_differing,
            sorted(self.unstable),
            sorted(self.unreadable),
        )

    def _directory_built(
        self, draft: Draft, built: _Built, recorded: dict[bytes, Entry], remarks: Remarks
    ) -> None:
        now = {entry.name: entry for entry in built.entries}
        if draft.path == b"" and self._root_metadata:
            self._note(compared(b"", self._base, self._root_entry))
        for name in now.keys() | recorded.keys():
            path = joined(draft.path, name)
            if draft.path == b"" and self._prefix and name != self._prefix:
                continue  # other subdots are not in an attached tree
            old, new = recorded.get(name), now.get(name)
            if path in self.unreadable and new is None and old is None:
                continue
            self._note(compared(path, old, new))
            was_directory = old is not None and old.kind is EntryKind.DIRECTORY
            if was_directory and (new is None or new.kind is not EntryKind.DIRECTORY):
                assert old is not None
                self._changes.extend(whole_tree(self._store, path, old, "-"))

    def _note(self, change: Change | None) -> None:
        if change is not None:
            self._changes.append(change)


def sorted_by_path(changes: list[Change]) -> list[Change]:
    return sorted(changes, key=lambda change: (change.path, change.kind != "-"))
