"""Makes a live tree equal to a recorded one, writing only what differs.

Nothing is assumed that is not seen: what the stat cache does not vouch for is compared with what
is recorded, so that running it again after a kill at any point completes the work. Two passes:
parents first, names in byte order, everything but the metadata of directories; then, children
before parents, the metadata of the directories that were touched and the new stat cache.
"""

import os
import stat
from collections.abc import Iterable
from functools import partial
from typing import Final

from dmsync.core.objects import ROOT_ENTRY, TREE_DEPTH_MAX, Entry, EntryKind, check_name
from dmsync.core.pages import walk_tree
from dmsync.engine.differences import joined
from dmsync.engine.progress import SILENT, Progress
from dmsync.engine.recorded_tree import RecordedTree
from dmsync.engine.restoring.file_writing import BatchReader
from dmsync.engine.restoring.finishing import METADATA, DirectoryDrafts, root_remarks
from dmsync.engine.restoring.folding import alike, not_told_apart
from dmsync.engine.restoring.live_directory import (
    DirectoryWork,
    LiveDirectory,
    has_default_acl,
    list_names,
)
from dmsync.engine.restoring.metadata import MetadataWriter, needs_trust
from dmsync.engine.restoring.names import NameRestorer
from dmsync.engine.restoring.result import RestoreResult
from dmsync.engine.restoring.write_queue import WriteQueue
from dmsync.engine.restoring.writeback import Writeback
from dmsync.engine.safe_files import (
    TreeDirectories,
    handle_path,
    inode_handle,
    is_temporary,
    open_tree,
    shown,
    translated,
)
from dmsync.engine.stat_baseline import Baseline, Sync
from dmsync.engine.tree_bounds import check_bounds
from dmsync.engine.tree_scan import MODE, is_socket, stat_of
from dmsync.errors import BadObject, StorageFailed
from dmsync.storage.stages import stage
from dmsync.storage.stat_cache import (
    NO_REMARKS,
    Block,
    BlockStream,
    Spool,
    Stat,
    StatCache,
    StatCacheWriter,
    decode_live,
    decode_remarks,
    encode_live,
)

__all__ = ["RestoreResult", "needs_trust", "restore_tree"]

_JUST_MADE: Final[Stat] = (stat.S_IFDIR | 0o700, 0, 0, 0, 0, 0, 0, 0)
"""Stands for a new directory's stat until the second pass."""


def restore_tree(
    *,
    tree_path: str | bytes,
    as_subdot: bytes | None,
    store: BatchReader,
    target: Entry,
    current: Entry | None,
    stat_cache: StatCache | None,
    now_ns: int,
    trusted: bool = False,
    root_metadata: bool = False,
    scope: frozenset[bytes] | None = None,
    unseen: bool = False,
    progress: Progress | None = None,
) -> RestoreResult:
    """Make the live tree equal to the root entry `target`; durable on return.

    `current` and `stat_cache` say what the tree is known to hold, where both are for one root;
    everything else is compared. `trusted` applies devices, setuid, setgid and capabilities.
    Sockets are left alone in directories that stay. With `scope` only these subdots are written.
    `unseen`: nobody knows the tree until this is done, so that a name may have half its content.

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
        now_ns,
        trusted=trusted,
        root_metadata=root_metadata,
        scope=scope,
        unseen=unseen,
        progress=progress,
    )
    try:
        return restore.run()
    except OSError as exc:
        raise translated(exc, "cannot restore the tree") from exc
    finally:
        restore.close()


class _Restore:
    def __init__(
        self,
        tree_path: str | bytes,
        as_subdot: bytes | None,
        store: BatchReader,
        target: Entry,
        current: Entry | None,
        cache: StatCache | None,
        now_ns: int,
        *,
        trusted: bool,
        root_metadata: bool,
        scope: frozenset[bytes] | None,
        unseen: bool,
        progress: Progress | None,
    ) -> None:
        self._store = store
        self._progress = SILENT if progress is None else progress
        self._scope = scope
        self._prefix = as_subdot or b""
        self._target = RecordedTree(store, target)
        known = cache is not None and current is not None and cache.root == current
        self._known = RecordedTree(store, current if known and current is not None else ROOT_ENTRY)
        self._old = BlockStream(cache if known else None)
        self._has_cache = known
        self._trusted = trusted
        self._root_metadata = root_metadata and as_subdot is None
        self._unseen = unseen
        self._is_root = os.geteuid() == 0
        self._files_seen = 0
        self._baseline = Baseline(now_ns, Sync.NEVER if unseen else Sync.ON_ENTERING)
        self._result = RestoreResult(StatCache(target, Spool()))
        metadata = MetadataWriter(self._result, trusted=trusted, now_ns=now_ns)
        self._drafts = DirectoryDrafts(metadata, self._result)
        self._queue = WriteQueue(store)
        self._writeback = Writeback()
        self._root_fd = open_tree(tree_path)
        self._directories = TreeDirectories(self._root_fd)
        self._names = NameRestorer(
            reader=store,
            metadata=metadata,
            drafts=self._drafts,
            queue=self._queue,
            writeback=self._writeback,
            baseline=self._baseline,
            result=self._result,
            progress=progress,
            root_fd=self._root_fd,
            prefix=self._prefix,
        )

    def close(self) -> None:
        self._queue.close()
        self._names.close()
        self._directories.close()
        self._writeback.close()
        os.close(self._root_fd)

    def run(self) -> RestoreResult:
        here, there = self._known.entry(self._prefix), self._target.entry(self._prefix)
        if there is not None:
            old_tree = None if here is None else here.tree
            check_bounds(self._store, old_tree, there.tree, self._root_fd)
        # of a tree that is known only what differs is written, which nobody knows before
        self._progress.phase("writing", sizes=None if self._has_cache else self._sizes())
        with stage("plan"):
            self._restore_directories()
            self._queue.flush()
            cache = self._finish_directories()
        self._progress.phase("syncing")
        with stage("sync"):
            self._writeback.finish()
        self._result.stat_cache = cache.finish(self._target.root)
        return self._result

    def _sizes(self) -> Iterable[int]:
        """Of all that is to be made, as its directories say. Holes count for nothing."""
        root = self._target.entry(self._prefix)
        if root is None:
            return ()
        return (0 if e.sparse else e.size for _, e in walk_tree(self._store, root))

    # --- first pass: everything but the metadata of directories ---------------------------------

    def _restore_directories(self) -> None:
        root = self._prefix
        entry = self._target.entry(root)
        is_same = self._has_cache and self._known.entry(root) == entry
        if self._prefix:
            self._old.take(b"")
        pending: list[tuple[bytes, int, list[DirectoryWork]]] = [
            (b"", -1, [DirectoryWork(b"", is_same, False, True, entry)])
        ]
        while pending:
            above, parent, works = pending[-1]
            if not works:
                pending.pop()
                continue
            work = works.pop()
            below = above + work.name
            path = joined(self._prefix, below) if below else self._prefix
            number = self._drafts.number(parent)
            subdirectories = self._restore_directory(work, path, below, number)
            if len(pending) > TREE_DEPTH_MAX:
                raise BadObject(f"the recorded tree is deeper than {TREE_DEPTH_MAX}")
            if subdirectories:
                subdirectories.reverse()
                pending.append((below + b"/" if below else b"", number, subdirectories))

    def _restore_directory(
        self, work: DirectoryWork, path: bytes, below: bytes, number: int
    ) -> list[DirectoryWork]:
        fd = self._open_live(below, work)
        if work.needs_metadata:
            self._drafts.touch(number, METADATA)
        if work.is_new:
            directory = LiveDirectory(path, number, fd, work.device, True, work.has_default_acl, {})
            directory.is_unlocked = True
            return self._restore_names(directory, work)
        found = os.fstat(fd)
        if found.st_dev not in self._writeback:
            self._baseline.enter_device(fd, found.st_dev)
            self._writeback.enter(fd, found.st_dev)
        names, stats = list_names(fd)
        if path == b"" and self._root_metadata:
            names.insert(0, b".")
            stats.insert(0, stat_of(found))
        block, _ = self._old.take(path)
        live = encode_live(names, stats)
        untouched = block is not None and block.live == live and block.remarks == NO_REMARKS
        # What a restore without trust withheld has no mark of its own in the cache.
        if work.is_same and untouched and not self._trusted:
            target = self._metadata_target(work, path) if work.needs_metadata else None
            self._queue.when_written(partial(self._drafts.add, path, live, NO_REMARKS, target))
            return [
                DirectoryWork(name, is_same=True, is_new=False, needs_metadata=False)
                for name, entry in zip(names, stats, strict=True)
                if stat.S_ISDIR(entry[MODE]) and name != b"."
            ]
        directory = LiveDirectory(
            path,
            number,
            fd,
            found.st_dev,
            self._unseen and not names,
            has_default_acl(fd),
            dict(zip(names, stats, strict=True)),
        )
        self._recall(directory, block)
        return self._restore_names(directory, work)

    def _open_live(self, below: bytes, work: DirectoryWork) -> int:
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

    def _recall(self, directory: LiveDirectory, block: Block | None) -> None:
        """What the cache says of a directory."""
        if block is not None:
            directory.remarks = decode_remarks(block.remarks)
            directory.vouched = dict(zip(*decode_live(block.live), strict=True))
            for name in directory.remarks.untrusted:
                directory.vouched.pop(name, None)
            directory.recorded = self._known.entries(directory.path)

    def _metadata_target(self, work: DirectoryWork, path: bytes) -> Entry | None:
        if path == b"" and not self._root_metadata:
            return None
        return work.entry if work.entry is not None else self._target.entry(path)

    def _restore_names(self, directory: LiveDirectory, work: DirectoryWork) -> list[DirectoryWork]:
        wanted = self._target.entries(directory.path)
        if not directory.path and self._scope is not None:
            wanted = {name: entry for name, entry in wanted.items() if name in self._scope}
        if b"." in directory.before:
            directory.after[b"."] = directory.before.pop(b".")
        wanted = self._told_apart(directory, wanted)
        self._clear(directory, wanted)
        subdirectories = []
        for name, entry in wanted.items():
            check_name(name)
            if entry.kind is EntryKind.DIRECTORY:
                subdirectories.append(self._restore_subdirectory(directory, entry))
            else:
                self._names.restore(directory, entry)
        directory.is_leaf = not subdirectories
        if self._drafts.needs_metadata(directory.number):
            directory.target = self._metadata_target(work, directory.path)
        self._files_seen += len(wanted)
        self._queue.leave(directory, partial(self._complete, directory, self._files_seen))
        return subdirectories

    def _told_apart(
        self, directory: LiveDirectory, wanted: dict[bytes, Entry]
    ) -> dict[bytes, Entry]:
        """`wanted` without the names that this filesystem takes for another of them: they wait, as
        devices do, and one that is there already comes before one that is not."""
        withheld: set[bytes] = set()
        for group in alike(wanted):
            self._names.unlock(directory)
            group.sort(key=lambda name: name not in directory.before)
            withheld |= not_told_apart(directory.fd, group)
        if not withheld:
            return wanted
        for name in sorted(withheld):
            directory.withheld.append(name)
            self._result.withheld.append(joined(directory.path, name))
        return {name: entry for name, entry in wanted.items() if name not in withheld}

    def _clear(self, directory: LiveDirectory, wanted: dict[bytes, Entry]) -> None:
        """Remove what is not wanted. Sockets stay: nothing recorded could bring them back."""
        for name, live in directory.before.items():
            if name in wanted:
                continue
            if is_socket(live) and not is_temporary(name):
                directory.after[name] = live
            else:
                self._names.remove(directory, name)

    def _restore_subdirectory(self, directory: LiveDirectory, entry: Entry) -> DirectoryWork:
        name = entry.name
        live = directory.before.get(name)
        if live is None or not stat.S_ISDIR(live[MODE]):
            if live is not None:
                self._names.remove(directory, name)
            self._names.unlock(directory)
            os.mkdir(name, 0o700, dir_fd=directory.fd)
            directory.after[name] = _JUST_MADE
            return DirectoryWork(
                name,
                is_same=False,
                is_new=True,
                needs_metadata=True,
                entry=entry,
                device=directory.device,
                has_default_acl=directory.has_default_acl,
            )
        directory.after[name] = live
        known = directory.recorded.get(name)
        is_vouched = known is not None and directory.vouched.get(name) == live
        needs_metadata = (
            not (is_vouched and known is not None and known.same_metadata(entry))
        ) or self._names.lacks_trusted(directory, entry, live)
        if not needs_metadata:
            directory.keep_applied_xattrs(name)
        is_same = (
            known is not None and known.kind is EntryKind.DIRECTORY and known.tree == entry.tree
        )
        return DirectoryWork(name, is_same, False, needs_metadata, entry)

    def _complete(self, directory: LiveDirectory, files_seen: int) -> None:
        """All names of the directory are made, but not what is below its subdirectories."""
        if directory.device in self._baseline.untrusted_devices:
            directory.untrusted.update(
                name for name, found in directory.after.items() if stat.S_ISREG(found[MODE])
            )
        if not self._drafts.add_leaf(directory):
            self._drafts.add(directory.path, *directory.encoded(), directory.target)
        self._names.looked_at(files_seen)

    # --- second pass ----------------------------------------------------------------------------

    def _finish_directories(self) -> StatCacheWriter:
        cache = self._drafts.finish(self._directories, self._prefix)
        if self._prefix and self._target.entry(self._prefix) is not None:
            root_stat = stat_of(os.fstat(self._root_fd))
            remarks = root_remarks(self._prefix, self._drafts.applied_xattrs(self._prefix))
            cache.append(b"", encode_live([self._prefix], [root_stat]), remarks)
        return cache
