"""Reads a live tree into objects (commit) or only compares it with what is recorded (status).

Three phases: scan (stats only), content of files that have a large old counterpart (so that the
similar-page search knows their changed pages before new files such as WAL are written), then
directories, children before parents, with all other files read on the way. Memory follows one
directory and the number of directories, not the number of files.
"""

import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

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
    DirectoryWriter,
    PageBases,
    PageReader,
    write_directory,
)
from dmsync.core.values import plain_value_type
from dmsync.engine.change_tally import ChangeTally
from dmsync.engine.differences import (
    Change,
    compared,
    in_order,
    joined,
    whole_tree,
    with_renames,
)
from dmsync.engine.directory_building import (
    CacheParts,
    Run,
    recorded_in,
    runs,
    with_following,
)
from dmsync.engine.file_blocks import FileMoved
from dmsync.engine.file_content import (
    ChunkWriter,
    ContentReader,
    TooLarge,
)
from dmsync.engine.file_reading import NotRegularError, Reading, read_file
from dmsync.engine.live_metadata import KINDS, LiveName, Metadata, metadata_of
from dmsync.engine.progress import SILENT, Progress
from dmsync.engine.recorded_tree import RecordedTree
from dmsync.engine.safe_files import (
    DENIED,
    DIRECTORY_FLAGS,
    GONE,
    TreeDirectories,
    Xattrs,
    handle_path,
    open_tree,
    read_xattrs,
)
from dmsync.engine.scan_result import Draft, Scan, joined_draft
from dmsync.engine.stat_baseline import Baseline, Sync
from dmsync.engine.tree_scan import (
    INODE,
    MODE,
    NLINK,
    UNREADABLE,
    Scanner,
    is_socket,
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


@plain_value_type
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


@plain_value_type
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
    base: Entry
    changes: ChangeTally | None
    """Against `base`. None when they were not followed: a directory went away while what is in it
    was read."""


@plain_value_type
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
    progress: Progress | None = None,
) -> StatusResult:
    """Changes of a live tree against `base`, sorted by path; nothing is written.

    Hashes only files whose stat does not vouch for them. With `stop_at_change` the list may end
    after the first change. Arguments and errors as for `capture_tree`.
    """
    reading = _TreeStatus(
        tree_path,
        as_subdot,
        store,
        None,
        base,
        root_metadata=root_metadata,
        scope=scope,
        progress=progress,
    )
    try:
        return reading.run(stat_cache, now_ns, stop_at_change=stop_at_change, renames=renames)
    finally:
        reading.close()


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

    _sync: Sync

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
        self._progress = SILENT if progress is None else progress
        self._content = ContentReader(
            store, writer, incremental=base.tree is not None, progress=self._progress
        )
        self._root_fd = open_tree(tree_path)
        self._directories = TreeDirectories(self._root_fd)
        self._opened: tuple[bytes, int] | None = None
        """The directory opened last: nearly always the one that is asked for next."""
        self._baseline = Baseline(0)
        self._scan = Scan()
        self._readings: dict[bytes, Reading] = {}
        self._group_readings: dict[tuple[int, int], Reading] = {}
        self._trees: dict[bytes, ObjectId | None] = {}
        self._recorded = RecordedTree(store, base)
        self._root_entry = ROOT_ENTRY
        self.statistics = CaptureStatistics()
        self.unstable: set[bytes] = set()
        self.unreadable: set[bytes] = set()
        self.notices: list[Notice] = []

    def close(self) -> None:
        self._content.close()
        self._baseline.close()
        self._directories.close()
        os.close(self._root_fd)

    def _scan_tree(self, cache: StatCache | None, now_ns: int, *, stop_at_change: bool) -> None:
        self._refuse_strays()
        self._progress.phase("scanning")
        known = cache if cache is not None and cache.root == self._base else None
        self._baseline = Baseline(now_ns, self._sync)
        try:
            self._scan = self._scanner(known).run(self._baseline, stop_at_change=stop_at_change)
        except BadObject:  # a cache that lies: everything is hashed again
            self._baseline.close()
            self._baseline = Baseline(now_ns, self._sync)
            self._scan = self._scanner(None).run(self._baseline, stop_at_change=stop_at_change)
        self._progress.phase(
            "reading",
            bytes_total=self._scan.bytes_to_read,
            items_total=self._scan.files_to_read,
        )

    def _scanner(self, cache: StatCache | None) -> Scanner:
        return Scanner(
            root_fd=self._root_fd,
            as_subdot=self._prefix or None,
            cache=cache,
            root_metadata=self._root_metadata,
            large_bytes=FIXED_CHUNK_BYTES + 1,
            progress=self._progress,
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
                self._readings[path] = read_file(self._content, name, self._open(above), old)
            except (OSError, FileMoved, TooLarge, NotRegularError):
                continue  # met again, and judged, when its directory is built
        self._content.finish()

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

    def _open(self, path: bytes) -> int:
        """Descriptor of the live directory at `path` of the dot."""
        if self._opened is None or self._opened[0] != path:
            self._opened = None
            inside = path[len(self._prefix) :].lstrip(b"/") if self._prefix else path
            self._opened = path, self._directories.open(inside)
        return self._opened[1]

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
        if draft.parts is not None and (draft.path or self._scope is None):
            self._build_large(draft)
            return
        draft = joined_draft(draft)
        names, stats = decode_live(draft.live)
        remarks = decode_remarks(draft.remarks)
        recorded = self._recorded.entries(draft.path)
        before = (
            dict(zip(draft.changed, draft.before, strict=True))
            if draft.known
            else dict.fromkeys(names)
        )
        built = self._built(draft, names, stats, before, remarks, recorded)
        self._directory_built(draft, built, recorded, remarks)

    def _built(
        self,
        draft: Draft,
        names: Sequence[bytes],
        stats: Sequence[Stat],
        before: dict[bytes, Stat | None],
        remarks: Remarks,
        recorded: dict[bytes, Entry],
    ) -> _Built:
        """The entries of a directory, or of a run of its names."""
        applied = dict(remarks.applied_xattrs)
        built = _Built()
        for name, live in zip(names, stats, strict=True):
            item = LiveName(
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
        others = {*remarks.withheld, *self._kept_elsewhere(draft.path, recorded)}
        if others:
            others.difference_update(names)
            built.entries += [recorded[name] for name in others if name in recorded]
            built.entries.sort(key=lambda entry: entry.name)
        return built

    def _build_large(self, draft: Draft) -> None:
        """A directory too large to be held: run by run, unchanged leaf pages taken over."""
        bases = PageBases(self._store, self._recorded.directory(draft.path), DIRECTORY)
        self._begin_large(bases)
        is_doubtful = partial(self._is_doubtful, draft.path)
        for run, following in with_following(runs(draft, bases.leaves, is_doubtful)):
            if run.is_unchanged and self._run_kept(run, following):
                continue
            recorded = recorded_in(self._store, run)
            built = self._built(draft, run.names, run.stats, run.before, run.remarks, recorded)
            self._run_built(draft, run, built, recorded)
        self._large_built(draft)

    def _is_doubtful(self, directory: bytes, name: bytes, live: Stat) -> bool:
        """May an unchanged name's entry differ from the recorded one, or be none?"""
        if stat.S_ISDIR(live[MODE]):
            path = joined(directory, name)
            return name == b"." or path in self._trees or path in self._scan.unopened
        return live[NLINK] > 1 or is_socket(live)

    def _begin_large(self, bases: PageBases) -> None:
        """A large directory is about to be built."""

    def _run_kept(self, run: Run, following: Run | None) -> bool:
        """Whether an unchanged run need not be built."""
        return True

    def _run_built(
        self, draft: Draft, run: Run, built: _Built, recorded: dict[bytes, Entry]
    ) -> None:
        self._compare(draft.path, built.entries, recorded)

    def _large_built(self, draft: Draft) -> None:
        raise NotImplementedError

    def _compare(self, path: bytes, entries: list[Entry], recorded: dict[bytes, Entry]) -> bool:
        """Whether a directory's entries are not those recorded. Notes what changed in it, and all
        below directories that are gone from it."""
        prefix = path + b"/" if path else b""
        gone = dict(recorded)
        differs = False
        for entry in entries:
            old = gone.pop(entry.name, None)
            if old == entry:
                continue
            differs = True
            self._note(prefix + entry.name, old, entry)
        for name, old in gone.items():
            self._note(prefix + name, old, None)
        return differs or bool(gone)

    def _note(self, path: bytes, old: Entry | None, new: Entry | None) -> None:
        change = compared(path, old, new)
        if change is not None:
            self._changed(change)
        was_directory = old is not None and old.kind is EntryKind.DIRECTORY
        if was_directory and (new is None or new.kind is not EntryKind.DIRECTORY):
            assert old is not None
            for below in whole_tree(self._store, path, old, "-"):
                self._changed(below)

    def _changed(self, change: Change) -> None:
        raise NotImplementedError

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

    def _add_unchanged(self, built: _Built, item: LiveName) -> None:
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

    def _group(self, item: LiveName) -> bytes:
        return self._scan.hardlinks.get(item.path, b"") if item.live[NLINK] > 1 else b""

    def _add_unopened(self, built: _Built, item: LiveName, reason: str) -> None:
        built.untrusted.add(item.name)
        (self.unreadable if reason == UNREADABLE else self.unstable).add(item.path)
        if reason == UNREADABLE and item.recorded is not None:
            built.entries.append(item.recorded)

    def _add_fresh(self, built: _Built, item: LiveName) -> None:
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
        except (FileMoved, NotRegularError):
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

    def _fresh_entry(self, built: _Built, item: LiveName) -> Entry | None:
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

    def _file_entry(self, built: _Built, item: LiveName) -> Entry:
        reading = self._reading(item)
        if reading.found != item.live and reading.found[INODE] != item.live[INODE]:
            item.before = None  # another file by now: nothing recorded stands behind it
        item.live = reading.found
        if not reading.is_stable:
            self.unstable.add(item.path)
            item.is_trusted = False
        content = reading.content
        metadata = self._metadata(built, item, EntryKind.FILE, reading.xattrs)
        # In one go, by position: there is one for each file of the tree.
        return Entry(
            item.name,
            EntryKind.FILE,
            metadata.mode,
            metadata.uid,
            metadata.gid,
            metadata.mtime_ns,
            content.size,
            content.content,
            content.layout,
            content.tree,
            content.sparse,
            b"",
            (0, 0),
            metadata.hardlink,
            metadata.xattrs,
            metadata.extensions,
        )

    def _reading(self, item: LiveName) -> Reading:
        """The file's content, read now unless phase two or another of its names has it."""
        reading = self._readings.pop(item.path, None)
        key = (item.device, item.live[INODE])
        if reading is None and item.live[NLINK] > 1:
            reading = self._group_readings.get(key)
        if reading is None:
            old = self._file_before(item.recorded, item.live[INODE])
            directory_fd = self._open(item.path.rpartition(b"/")[0])
            reading = read_file(self._content, item.name, directory_fd, old)
        if item.live[NLINK] > 1 and reading.found[INODE] == item.live[INODE]:
            self._group_readings[key] = reading
        return reading

    def _directory_entry(self, built: _Built, item: LiveName) -> Entry | None:
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

    def _open_entry_directory(self, item: LiveName) -> int:
        if item.name == b"." or item.path == self._prefix:
            return os.dup(self._root_fd)
        directory_fd = self._open(item.path.rpartition(b"/")[0])
        return os.open(item.name, DIRECTORY_FLAGS, dir_fd=directory_fd)

    def _with_metadata(
        self, built: _Built, item: LiveName, kind: EntryKind, xattrs: Xattrs
    ) -> Entry:
        """Entry with nothing but its metadata."""
        return Entry(
            name=item.name, kind=kind, **self._metadata(built, item, kind, xattrs)._asdict()
        )

    def _metadata(self, built: _Built, item: LiveName, kind: EntryKind, xattrs: Xattrs) -> Metadata:
        xattrs = self._bounded(item.path, xattrs) if xattrs else xattrs
        hardlink = b"" if kind is EntryKind.DIRECTORY else self._group(item)
        metadata = metadata_of(item, xattrs, hardlink)
        if metadata.xattrs != xattrs:
            built.applied_xattrs.append((item.name, xattrs))
        return metadata

    def _bounded(self, path: bytes, xattrs: Xattrs) -> Xattrs:
        """The attributes that an entry may hold; a notice for those that it may not."""
        kept = tuple(pair for pair in xattrs if len(pair[1]) <= XATTR_BYTES_MAX)[:XATTRS_MAX]
        if len(kept) != len(xattrs):
            self.notices.append(Notice(path, "extended attributes beyond the limits not recorded"))
        return kept


class _TreeCapture(_TreeReading):
    """Writes what it reads, and the next stat cache."""

    _sync = Sync.BEFORE_READING

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
        self._tally = ChangeTally()

    def run(self, cache: StatCache | None, now_ns: int) -> CaptureResult:
        self._scan_tree(cache, now_ns, stop_at_change=False)
        scan, statistics = self._scan, self.statistics
        if self._prefix and self._recorded.entries(b"").keys() - {self._prefix}:
            scan.mark_dirty(0)  # subdots that an attached tree does not have are left out
        if any(scan.dirty) or cache is None:
            self._baseline.settle()
            self._read_large_counterparts()
            self._build_directories()
            self._content.finish()
            root = replace(self._root_entry, tree=self._trees.get(b""))
            self._note(b"", self._base, root)
            cache = self._cache.finish(root, self._baseline.threshold_ns)
        else:
            root = self._base
            cache = cache.listed_since(self._baseline.threshold_ns)
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
            self._base,
            None if self._trees.keys() - {b""} else self._tally,
        )

    def _changed(self, change: Change) -> None:
        self._tally.add(change)

    def _keep(self, draft: Draft) -> None:
        self._cache.append(draft.path, draft.live, draft.remarks)

    def _directory_built(
        self, draft: Draft, built: _Built, recorded: dict[bytes, Entry], remarks: Remarks
    ) -> None:
        tree = self._recorded.directory(draft.path)
        if self._compare(draft.path, built.entries, recorded):
            bases = PageBases(self._store, tree, DIRECTORY)
            tree = write_directory(self._writer, built.entries, bases)
        self._trees[draft.path] = tree
        live = encode_live(built.names, built.stats)
        self._cache.append(draft.path, live, encode_remarks(_next_remarks(built, remarks)))

    def _begin_large(self, bases: PageBases) -> None:
        self._pages = DirectoryWriter(self._writer, bases)
        self._cache_parts = CacheParts()

    def _run_kept(self, run: Run, following: Run | None) -> bool:
        is_followed_as_before = following is None or following.is_unchanged
        if not self._pages.is_between_leaves or not (run.ends_by_name or is_followed_as_before):
            return False
        assert run.leaf is not None
        self._pages.add_leaf(run.leaf)
        self._cache_parts.add(run.names, run.stats, run.remarks)
        return True

    def _run_built(
        self, draft: Draft, run: Run, built: _Built, recorded: dict[bytes, Entry]
    ) -> None:
        super()._run_built(draft, run, built, recorded)
        for entry in built.entries:
            self._pages.add(entry)
        self._cache_parts.add(built.names, built.stats, _next_remarks(built, run.remarks))

    def _large_built(self, draft: Draft) -> None:
        self._trees[draft.path] = self._pages.finish()
        self._cache_parts.write(self._cache, draft.path)


def _next_remarks(built: _Built, remarks: Remarks) -> Remarks:
    """What the next cache says of names that were built, `remarks` being what this one said."""
    names = {entry.name for entry in built.entries}
    return Remarks(
        frozenset(built.untrusted),
        tuple((entry.name, entry.hardlink) for entry in built.entries if entry.hardlink),
        tuple(built.applied_xattrs),
        tuple(name for name in remarks.withheld if name in names - set(built.names)),
    )


class _TreeStatus(_TreeReading):
    """Compares what it reads; directory pages are never built."""

    _sync = Sync.NEVER

    def run(
        self, cache: StatCache | None, now_ns: int, *, stop_at_change: bool, renames: bool
    ) -> StatusResult:
        self._changes: list[Change] = []
        self._scan_tree(cache, now_ns, stop_at_change=False)
        for is_dirty, draft in self._scan.drafts_backward(dirty_only=True):
            if is_dirty and draft.path not in self._scan.unopened:
                self._build(draft)
                if stop_at_change and self._changes:
                    break
        return StatusResult(
            with_renames(self._changes) if renames else in_order(self._changes),
            self._content.bytes_differing,
            sorted(self.unstable),
            sorted(self.unreadable),
        )

    def _changed(self, change: Change) -> None:
        self._changes.append(change)

    def _directory_built(
        self, draft: Draft, built: _Built, recorded: dict[bytes, Entry], remarks: Remarks
    ) -> None:
        if draft.path == b"" and self._root_metadata:
            self._note(b"", self._base, self._root_entry)
        if draft.path == b"" and self._prefix:
            # other subdots are not in an attached tree
            recorded = {name: old for name, old in recorded.items() if name == self._prefix}
        self._compare(draft.path, built.entries, recorded)

    def _large_built(self, draft: Draft) -> None:
        if draft.path == b"" and self._root_metadata:
            self._note(b"", self._base, self._root_entry)
