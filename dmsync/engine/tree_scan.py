"""Walks a live tree beside its stat cache and finds which directories hold a change.

Parents first, names in byte order, without recursion. When files may be trusted, and when the
filesystem must be synced, is in stat_baseline; on several processes the walk is in scan_workers.

A directory whose own stat is the recorded one, with times before the moment since which the cache
lists directories after taking their stats (`listed_ns`), holds the names it held: it is not listed
again, its names are asked for their stats at once. Creating, removing and renaming move a
directory's times; a name that is gone all the same has the directory listed.

A large directory is gone through in parts, along those of its cache block, so that memory does not
follow the number of its names beyond their own bytes.
"""

import os
import stat
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from operator import attrgetter, itemgetter
from typing import Final, NamedTuple

from dmsync.core.objects import NAME_BYTES_MAX, PATH_BYTES_MAX, TREE_DEPTH_MAX
from dmsync.engine.progress import SILENT, Progress
from dmsync.engine.safe_files import (
    DENIED,
    GONE,
    TreeDirectories,
    is_temporary,
    shown,
)
from dmsync.engine.scan_result import Draft, Scan
from dmsync.engine.scan_workers import Range, Seed, Worker, planned_ranges
from dmsync.engine.stat_baseline import Baseline
from dmsync.errors import CaptureFailed
from dmsync.storage.stages import stage
from dmsync.storage.stat_cache import (
    NO_REMARKS,
    PART_NAMES,
    Block,
    BlockStream,
    Spool,
    Stat,
    StatCache,
    decode_live,
    decode_remarks,
    encode_live,
    encode_remarks,
)

stat_of: Final[Callable[[os.stat_result], Stat]] = attrgetter(
    "st_mode",
    "st_ino",
    "st_size",
    "st_mtime_ns",
    "st_ctime_ns",
    "st_uid",
    "st_gid",
    "st_nlink",
)
MODE, INODE, SIZE, MTIME, CTIME, UID, GID, NLINK = range(8)
_DIRECTORY_TYPE: Final = stat.S_IFDIR
_TYPE_MASK: Final = 0o170000
_SOCKET_TYPE: Final = stat.S_IFSOCK
LARGE_DIRECTORY_BYTES: Final = 1024 * 1024
"""A directory of this st_size has tens of thousands of names, whatever the filesystem counts."""
PATIENCE_S: Final = 30.0
PATIENCE_FACTOR: Final = 10
"""How long a worker may take, beyond this process's own range of about the same length."""
_TEMPORARY_START: Final = b".dm-tmp-"
_links_of: Final = itemgetter(NLINK)
_size_of: Final = itemgetter(SIZE)

UNREADABLE: Final = "unreadable"
VANISHED: Final = "vanished"

Below = tuple[bytes, Stat | None]
"""A directory to be walked: its name in the one above, and its stat as the cache has it."""
Pending = list[tuple[bytes, list[Below]]]
"""What is left of the walk's current branch: a path above, ending in a slash, and directories in
it, the last first."""


class _Directory(NamedTuple):
    number: int
    path: bytes
    device: int


class _ElsewhereError(Exception):
    """A worker came to a filesystem that the calling process has yet to enter."""


class Scanner:
    """Builds a Scan of one tree, on as many processes as there are CPUs when that pays; fewer
    with `processes_max`."""

    def __init__(
        self,
        *,
        root_fd: int,
        as_subdot: bytes | None,
        cache: StatCache | None,
        root_metadata: bool,
        large_bytes: int,
        processes_max: int | None = None,
        progress: Progress = SILENT,
    ) -> None:
        self._progress = progress
        self._root_fd = root_fd
        self._prefix = as_subdot or b""
        self._cache = cache
        self._listed_ns = cache.listed_ns if cache is not None else 0
        self._old = BlockStream(None)
        self._root_metadata = root_metadata
        self._large_bytes = large_bytes
        self._processes_max = processes_max
        self._scan = Scan(cache)
        self._baseline = Baseline(0)
        self._directories = TreeDirectories(root_fd)
        self._trail: list[tuple[bytes, int]] = []
        self._old_links: dict[bytes, bytes] = {}
        self._range = Range()
        self._ahead: dict[bytes, tuple[list[bytes], list[Stat], os.stat_result]] = {}
        """Directories listed before the walk comes to them, for several ranges."""
        self._is_apart = False
        """Whether this is a worker's."""

    def run(self, baseline: Baseline, *, stop_at_change: bool = False) -> Scan:
        """Walk the tree. With `stop_at_change` the scan ends at the first dirty directory.

        Raises:
            CaptureFailed: the tree cannot be walked.
            BadObject: the cache is damaged in spite of its checksum.
            StorageFailed: from the baseline.
        """
        self._baseline = baseline
        workers: list[tuple[Worker, Range]] = []
        try:
            with stage("scan"):
                first, *further = [Range()] if stop_at_change else self._ranges()
                for limits in further:
                    workers.append((Worker(partial(self._scan_apart, limits)), limits))
                started_s = time.monotonic()
                self._walk_first(first, stop_at_change=stop_at_change)
                patience_s = PATIENCE_S + PATIENCE_FACTOR * (time.monotonic() - started_s)
                for worker, limits in workers:
                    self._take_over(worker, limits, patience_s)
        finally:
            for worker, _ in workers:
                worker.close()
            self._directories.close()
        if not (stop_at_change and any(self._scan.dirty)):
            self._name_groups()
        return self._scan

    # --- ranges ----------------------------------------------------------------------------------

    def _ranges(self) -> list[Range]:
        """The walk cut for several processes, this one's range first; or all of it."""
        if self._cache is None:
            return [Range()]
        self._enter(self._root_fd, os.fstat(self._root_fd).st_dev)
        ranges = planned_ranges(
            self._cache,
            self._prefix,
            processes_max=self._processes_max,
            list_ahead=self._list_ahead,
        )
        return ranges or [Range()]

    def _list_ahead(self, below: bytes) -> list[bytes] | None:
        """List a directory that several ranges share; the names of the directories in it, or None
        when it cannot be shared."""
        if below not in self._ahead:
            try:
                fd = self._directories.open(below)
                found = os.fstat(fd)
                if found.st_size >= LARGE_DIRECTORY_BYTES:
                    return None
                self._enter(fd, found.st_dev)
                self._ahead[below] = *_present(list_names(fd), fd), found
            except OSError:
                return None
        names, stats, _ = self._ahead[below]
        return [name for name, entry in zip(names, stats, strict=True) if is_directory(entry)]

    def _begin(self, limits: Range) -> None:
        self._range = limits
        self._old = BlockStream(self._cache, limits.start, limits.end)

    def _walk_first(self, first: Range, *, stop_at_change: bool) -> None:
        self._begin(first)
        recorded = self._add_top() if self._prefix else None
        self._walk([(b"", [(b"", recorded)])], stop_at_change=stop_at_change)

    def _walk_further(self, limits: Range) -> None:
        """Walk a range that begins in the midst of the tree."""
        self._begin(limits)
        pending: Pending = [(b"", [])]
        pending += [(_slashed(seed.below), self._seeded(seed)) for seed in limits.seeds]
        self._walk(pending)

    def _seeded(self, seed: Seed) -> list[Below]:
        """The directories of a seed, the last first, with their recorded stats."""
        assert self._cache is not None
        block = self._cache.find(self._dot_path(seed.below))
        recorded = dict(zip(*decode_live(block.live), strict=True)) if block is not None else {}
        return [(name, recorded.get(name)) for name in reversed(seed.names)]

    def _scan_apart(self, limits: Range) -> bytes:
        """The findings of one range, in a process of its own."""
        self._is_apart = True
        self._scan, self._trail = Scan(self._cache), []
        for path in self._shared_paths(limits):
            self._number(path)
        self._walk_further(limits)
        return self._scan.encoded(self._trail, self._old_links)

    def _shared_paths(self, limits: Range) -> list[bytes]:
        top = [b""] if self._prefix else []
        return top + [self._dot_path(seed.below) for seed in limits.seeds]

    def _take_over(self, worker: Worker, limits: Range, patience_s: float) -> None:
        """Add what a worker found, or walk its range here if it found nothing."""
        findings = worker.result(patience_s)
        if findings is None:
            self._walk_further(limits)
            return
        numbers = dict(self._trail)
        shared = [numbers[path] for path in self._shared_paths(limits)]
        before = self._scan.directories
        self._trail, links = self._scan.add_encoded(findings, shared)
        self._old_links.update(links)
        if any(self._scan.dirty[before:]):
            self._baseline.change_met()

    # --- walking ---------------------------------------------------------------------------------

    def _walk(self, pending: Pending, *, stop_at_change: bool = False) -> None:
        """Walk the directories in `pending` (paths above them, and they, the last first)."""
        while pending:
            above, names = pending[-1]
            if not names:
                pending.pop()
                continue
            name, recorded = names.pop()
            below = above + name
            found = self._visit(below, recorded)
            if stop_at_change and self._scan.dirty[-1]:
                return
            stop = self._range.stops.get(below)
            if stop is not None:
                found = [item for item in found if item[0] < stop]
            if found:
                if len(pending) > TREE_DEPTH_MAX:
                    path = shown(self._dot_path(below)[:64])
                    raise CaptureFailed(f"the tree is deeper than {TREE_DEPTH_MAX}: {path}")
                found.reverse()
                pending.append((_slashed(below), found))
        for block in self._old.rest():
            self._remember_gone(block)

    def _dot_path(self, below: bytes) -> bytes:
        """Path in the dot of a path in the tree."""
        return self._prefix + b"/" + below if self._prefix and below else self._prefix + below

    def _number(self, path: bytes) -> int:
        """Number the next directory; the walk's current branch is remembered."""
        trail = self._trail
        while trail and not _is_below(path, trail[-1][0]):
            trail.pop()
        number = self._scan.add_directory(trail[-1][1] if trail else -1)
        trail.append((path, number))
        return number

    def _add_top(self) -> Stat | None:
        """The dot's root, in which the tree is a subdot; the recorded stat of the tree."""
        found = os.fstat(self._root_fd)
        number = self._number(b"")
        self._scan.devices[number] = found.st_dev
        block = self._old.take_first(b"", self._remember_gone)
        directory = _Directory(number, b"", found.st_dev)
        return self._add(directory, [self._prefix], [stat_of(found)], block)[0][1]

    def _visit(self, below: bytes, recorded: Stat | None) -> list[Below]:
        """Look at one directory; the directories in it, in order."""
        path = self._dot_path(below)
        number = self._number(path)
        block = self._old.take_first(path, self._remember_gone)
        try:
            if below in self._ahead:
                names, stats, found = self._ahead.pop(below)
                fd = -1
            else:
                fd = self._directories.open(below)
                found = os.fstat(fd)
                self._enter(fd, found.st_dev)
            directory = _Directory(number, path, found.st_dev)
            self._scan.devices[number] = found.st_dev
            if fd < 0:
                return self._add(directory, *self._with_root(path, names, stats, found), block)
            is_known = recorded is not None and self._has_same_names(recorded, found)
            return self._look(directory, fd, found, block, is_known=is_known)
        except OSError as exc:
            self._add_unopened(number, path, exc, is_root=not below)
            return []

    def _look(
        self,
        directory: _Directory,
        fd: int,
        found: os.stat_result,
        block: Block | None,
        *,
        is_known: bool,
    ) -> list[Below]:
        is_large = found.st_size >= LARGE_DIRECTORY_BYTES or self._old.has_parts_left(
            directory.path
        )
        if block is not None and is_known:
            if is_large:
                return self._add_large(directory, fd, block, None)
            known, recorded = decode_live(block.live)
            try:
                stats = [stat_of(os.lstat(name, dir_fd=fd)) for name in known]
            except FileNotFoundError:
                pass  # times that do not move, or a change right now: it has to be listed
            else:
                if tuple(stats) == recorded and block.remarks == NO_REMARKS:
                    return self._add_unchanged(directory, known, stats, block)
                return self._add(directory, known, stats, block)
        listed = list_names(fd, is_large=is_large)
        if is_large or len(listed) > 2 * PART_NAMES:
            if self._root_metadata and directory.path == b"":
                listed.insert(0, b".")
            return self._add_large(directory, fd, block, NameRuns(listed))
        names, stats = self._with_root(directory.path, *_present(listed, fd), found)
        return self._add(directory, names, stats, block)

    def _has_same_names(self, recorded: Stat, found: os.stat_result) -> bool:
        return (
            recorded[MTIME] < self._listed_ns
            and recorded[CTIME] < self._listed_ns
            and recorded == stat_of(found)
        )

    def _with_root(
        self, path: bytes, names: list[bytes], stats: list[Stat], found: os.stat_result
    ) -> tuple[list[bytes], list[Stat]]:
        """The root is in no other directory: its own stat stands first in its own block."""
        if self._root_metadata and path == b"":
            return [b".", *names], [stat_of(found), *stats]
        return names, stats

    def _enter(self, fd: int, device: int) -> None:
        if device not in self._baseline.devices:
            if self._is_apart:
                raise _ElsewhereError
            self._baseline.enter_device(fd, device)

    def _mark_dirty(self, number: int) -> None:
        self._scan.mark_dirty(number)
        if not self._is_apart:
            self._baseline.change_met()

    # --- adding ----------------------------------------------------------------------------------

    def _add_unopened(self, number: int, path: bytes, exc: OSError, *, is_root: bool) -> None:
        if is_root:
            raise CaptureFailed(f"cannot read the tree: {exc.strerror}") from exc
        if exc.errno not in DENIED | GONE:
            raise CaptureFailed(f"cannot read {shown(path)}: {exc.strerror}") from exc
        for _ in self._old.parts_left(path):
            pass
        self._scan.unopened[path] = UNREADABLE if exc.errno in DENIED else VANISHED
        self._mark_dirty(number)
        self._scan.spool.append(Draft(path, 0, b"", NO_REMARKS, 0, (), ())[:-1])

    def _add(
        self,
        directory: _Directory,
        names: Sequence[bytes],
        stats: list[Stat],
        block: Block | None,
    ) -> list[Below]:
        """Add a directory with these names; the directories in it."""
        live = encode_live(names, stats)
        if block is not None and block.live == live and block.remarks == NO_REMARKS:
            return self._add_unchanged(directory, names, stats, block)
        self._count(directory, names, stats)
        draft, is_dirty, before = self._compare(directory, names, stats, live, block)
        if is_dirty:
            self._mark_dirty(directory.number)
        self._scan.spool.append(draft[:-1])
        return _below(names, stats, before)

    def _add_unchanged(
        self, directory: _Directory, names: Sequence[bytes], stats: list[Stat], block: Block
    ) -> list[Below]:
        self._scan.places[directory.number] = block.place
        below: list[Below] = [
            (name, entry)
            for name, entry in zip(names, stats, strict=True)
            if entry[0] & _TYPE_MASK == _DIRECTORY_TYPE and name != b"."
        ]
        self._count(directory, names, stats, has_directories=bool(below))
        return below

    def _add_large(
        self, directory: _Directory, fd: int, block: Block | None, runs: "NameRuns | None"
    ) -> list[Below]:
        """Add a directory part by part; with `runs` its names, else it has those of its block."""
        scan = self._scan
        parts = _Parts(scan, directory)
        below: list[Below] = []
        for listed, part in self._chunks(directory.path, block, runs, parts.places):
            names, stats = _present(listed, fd)
            self._count(directory, names, stats)
            live = encode_live(names, stats)
            if part is not None and part.live == live and part.remarks == NO_REMARKS:
                parts.add_unchanged(part, live)
                before = dict(zip(names, stats, strict=True))
            else:
                draft, is_dirty, before = self._compare(directory, names, stats, live, part)
                parts.add(draft, is_dirty=is_dirty)
            below += _below(names, stats, before)
        if parts.spool is not None and (parts.is_dirty or block is None):
            self._mark_dirty(directory.number)
            scan.parts[directory.number] = parts.spool
            known = int(block is not None)
            draft = Draft(directory.path, directory.device, b"", NO_REMARKS, known, (), ())
            scan.spool.append(draft[:-1])
        else:
            scan.places[directory.number] = parts.places[0]
            scan.places_of_parts[directory.number] = parts.places
        return below

    def _chunks(
        self, path: bytes, block: Block | None, runs: "NameRuns | None", places: list[int]
    ) -> Iterator[tuple[Sequence[bytes], Block | None]]:
        """Names of a large directory, a part's worth at a time, each with the part of its block
        that covers them; `places` gets those of the parts."""
        if block is None:
            assert runs is not None
            for names in runs.before(None):
                yield names, None
            return
        part: Block | None = block
        further = self._old.parts_left(path)
        while part is not None:
            places.append(part.place)
            following = next(further, None)
            if runs is None:
                yield decode_live(part.live)[0], part
            else:
                high = decode_live(following.live)[0][0] if following is not None else None
                yield from _divided(runs.before(high), part)
            part = following

    def _count(
        self,
        directory: _Directory,
        names: Sequence[bytes],
        stats: list[Stat],
        *,
        has_directories: bool = True,
    ) -> None:
        _check_lengths(directory.path, names)
        scan = self._scan
        files = stats
        if has_directories or directory.path == b"":  # where the root itself may stand
            files = [entry for entry in stats if entry[0] & _TYPE_MASK != _DIRECTORY_TYPE]
        scan.files += len(files)
        scan.bytes += sum(map(_size_of, files))
        self._progress.reached(0, scan.files)
        if max(map(_links_of, files), default=1) > 1:
            prefix = directory.path + b"/" if directory.path else b""
            for name, entry in zip(names, stats, strict=True):
                if entry[NLINK] > 1 and not is_directory(entry):
                    members = scan.groups.setdefault((directory.device, entry[INODE]), [])
                    members.append((prefix + name, directory.number))

    def _compare(
        self,
        directory: _Directory,
        names: Sequence[bytes],
        stats: list[Stat],
        live: bytes,
        block: Block | None,
    ) -> tuple[Draft, bool, dict[bytes, Stat]]:
        """The draft, whether it holds a change, and the stats as they were."""
        path, device = directory.path, directory.device
        prefix = path + b"/" if path else b""
        if block is None:
            self._note_files(prefix, names, stats)
            return Draft(path, device, live, NO_REMARKS, 0, (), ()), True, {}
        remarks = decode_remarks(block.remarks)
        for name, group in remarks.links:
            self._old_links[prefix + name] = group
        before = dict(zip(*decode_live(block.live), strict=True))
        changed = [
            (name, entry)
            for name, entry in zip(names, stats, strict=True)
            if before.get(name) != entry or name in remarks.untrusted
        ]
        is_dirty = bool(changed) or len(names) != len(before)
        if is_dirty:
            self._note_gone(prefix, before, dict(zip(names, stats, strict=True)))
            self._note_files(prefix, [n for n, _ in changed], [s for _, s in changed])
        changed_names = tuple(name for name, _ in changed)
        draft = Draft(
            path,
            device,
            live,
            block.remarks,
            1,
            changed_names,
            tuple(map(before.get, changed_names)),
        )
        return draft, is_dirty, before

    def _note_files(self, prefix: bytes, names: Sequence[bytes], stats: list[Stat]) -> None:
        scan = self._scan
        for name, entry in zip(names, stats, strict=True):
            if stat.S_ISREG(entry[MODE]):
                scan.files_to_read += 1
                scan.bytes_to_read += entry[SIZE]
                if entry[SIZE] >= self._large_bytes:
                    scan.large.append((prefix + name, entry[INODE]))

    def _note_gone(self, prefix: bytes, before: dict[bytes, Stat], now: dict[bytes, Stat]) -> None:
        for name, old in before.items():
            new = now.get(name)
            if (new is None or new[INODE] != old[INODE]) and stat.S_ISREG(old[MODE]):
                self._scan.remember_gone(old[INODE], prefix + name)

    def _remember_gone(self, block: Block) -> None:
        names, stats = decode_live(block.live)
        prefix = block.path + b"/" if block.path else b""
        for name, old in zip(names, stats, strict=True):
            if stat.S_ISREG(old[MODE]):
                self._scan.remember_gone(old[INODE], prefix + name)

    def _name_groups(self) -> None:
        """Name each hardlink group; directories whose recorded groups differ are dirty."""
        scan = self._scan
        for members in scan.groups.values():
            group = min(path for path, _ in members) if len(members) > 1 else b""
            for path, number in members:
                if group:
                    scan.hardlinks[path] = group
                if self._old_links.get(path, b"") != group:
                    scan.mark_dirty(number)


class _Parts:
    """The parts of a large directory so far; nothing is copied until one has changed."""

    def __init__(self, scan: Scan, directory: _Directory) -> None:
        self._scan = scan
        self._directory = directory
        self.spool: Spool | None = None
        self.places: list[int] = []
        """Of the parts of its block that were come to."""
        self._unchanged: list[int] = []
        self.is_dirty = False

    def add_unchanged(self, part: Block, live: bytes) -> None:
        if self.spool is None and part.place >= 0:
            self._unchanged.append(part.place)
            return
        path, device = self._directory.path, self._directory.device
        self.add(Draft(path, device, live, NO_REMARKS, 1, (), ()), is_dirty=False)

    def add(self, draft: Draft, *, is_dirty: bool) -> None:
        if self.spool is None:
            self.spool = Spool()
            for place in self._unchanged:
                self.spool.append(self._scan.draft_at(place, self._directory.device)[:-1])
        self.spool.append(draft[:-1])
        self.is_dirty = self.is_dirty or is_dirty


class NameRuns:
    """Very many names in byte order, to be taken once; little more than their own bytes."""

    def __init__(self, names: list[bytes]) -> None:
        """`names` sorted, but for a leading `.`, and emptied."""
        self._runs: list[bytes] = []
        while names:
            self._runs.append(b"/".join(names[-PART_NAMES:]))  # which no name can hold
            del names[-PART_NAMES:]
        self._current: list[bytes] = []

    def before(self, high: bytes | None) -> Iterator[list[bytes]]:
        """Lists of the next names, up to `high` (None: to the end); never no list at all."""
        is_first = True
        while True:
            if not self._current and self._runs:
                self._current = self._runs.pop().split(b"/")
            names = self._current
            first = 1 if names[:1] == [b"."] else 0
            end = len(names) if high is None else bisect_left(names, high, first)
            if names[:end] or is_first:
                is_first = False
                yield names[:end]
            self._current = names[end:]
            if self._current or not self._runs:
                return


def _divided(
    runs: Iterator[list[bytes]], part: Block
) -> Iterator[tuple[list[bytes], Block | None]]:
    """The names that a part covers, together or, when they have become many, in several runs with
    what the part says of each."""
    waiting: list[bytes] = []
    low = b""
    is_divided = False
    for names in runs:
        waiting += names
        while len(waiting) > 2 * PART_NAMES:
            high = waiting[PART_NAMES]
            yield waiting[:PART_NAMES], _cut_out(part, low, high)
            del waiting[:PART_NAMES]
            low, is_divided = high, True
    yield waiting, _cut_out(part, low, None) if is_divided else part


def _cut_out(part: Block, low: bytes, high: bytes | None) -> Block:
    """What a part says of the names from `low` to before `high`."""
    names, stats = decode_live(part.live)
    first = 1 if names[:1] == (b".",) else 0
    start = bisect_left(names, low, first) if low else 0
    end = len(names) if high is None else bisect_left(names, high, first)
    live = encode_live(names[start:end], stats[start:end])
    remarks = decode_remarks(part.remarks).between(low, high)
    return Block(part.path, live, encode_remarks(remarks))


def list_names(fd: int, *, is_large: bool = False) -> list[bytes]:
    """Names in the directory `fd`, without our temporary ones, in byte order."""
    if is_large:  # os.listdir would hold every name as text besides
        with os.scandir(fd) as found:
            names = [os.fsencode(entry.name) for entry in found]
    else:
        names = [os.fsencode(text) for text in os.listdir(fd)]
    names.sort()
    start = bisect_left(names, _TEMPORARY_START)
    if start < len(names) and names[start].startswith(_TEMPORARY_START):
        names = [name for name in names if not is_temporary(name)]
    return names


def _present(names: Sequence[bytes], fd: int) -> tuple[list[bytes], list[Stat]]:
    """Names, and their stats, without those that went away. Raises OSError."""
    try:
        return list(names), [stat_of(os.lstat(name, dir_fd=fd)) for name in names]
    except FileNotFoundError:
        return _still_present(names, fd)


def _still_present(names: Sequence[bytes], fd: int) -> tuple[list[bytes], list[Stat]]:
    present: list[bytes] = []
    stats: list[Stat] = []
    for name in names:
        try:
            stats.append(stat_of(os.lstat(name, dir_fd=fd)))
        except FileNotFoundError:
            continue
        present.append(name)
    return present, stats


def _below(names: Sequence[bytes], stats: list[Stat], before: dict[bytes, Stat]) -> list[Below]:
    """The directories among names, with their stats as they were."""
    return [
        (name, before.get(name))
        for name, entry in zip(names, stats, strict=True)
        if entry[MODE] & _TYPE_MASK == _DIRECTORY_TYPE and name != b"."
    ]


def _check_lengths(path: bytes, names: Sequence[bytes]) -> None:
    """Raises CaptureFailed: nobody would take a commit with such a path."""
    if len(path) + 1 + NAME_BYTES_MAX <= PATH_BYTES_MAX:
        return
    if len(path) + 1 + max(map(len, names), default=0) > PATH_BYTES_MAX:
        raise CaptureFailed(
            f"the tree has paths longer than {PATH_BYTES_MAX} bytes: {shown(path[:64])}..."
        )


def _slashed(below: bytes) -> bytes:
    return below + b"/" if below else b""


def _is_below(path: bytes, above: bytes) -> bool:
    return not above or path.startswith(above + b"/")


def is_directory(entry: Stat) -> bool:
    return entry[MODE] & _TYPE_MASK == _DIRECTORY_TYPE


def is_socket(entry: Stat) -> bool:
    return entry[MODE] & _TYPE_MASK == _SOCKET_TYPE
