"""Walks a live tree beside its stat cache and finds which directories hold a change.

Parents first, names in byte order, without recursion. What it finds is spooled (compressed), so
that memory follows the number of directories and not the number of files; one flag per directory
says whether it or anything below it has to be looked at.

Mounts inside the tree are walked like any directory: bind mounts are how containers put volumes
together, and what the application sees is what a dot is to hold. Each filesystem is synced when
the walk enters it, so that the mmap rule below holds on it too.

The mmap rule (notes/peers.md 5.3): a store to a page that is already dirty does not move mtime.
The filesystem is therefore synced before the first stat, which write-protects every page, and a
file whose times are not older than that moment is never trusted later.
"""

import os
import stat
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Final, NamedTuple

from dmsync.core.objects import TREE_DEPTH_MAX
from dmsync.engine.safe_files import (
    DENIED,
    GONE,
    TreeDirectories,
    filesystem_now_ns,
    is_temporary,
    keeps_no_pages,
    shown,
    sync_filesystem,
)
from dmsync.errors import CaptureFailed
from dmsync.storage.stat_cache import (
    NO_REMARKS,
    Block,
    BlockStream,
    Spool,
    Stat,
    StatCache,
    decode_live,
    decode_remarks,
    encode_live,
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
RACY_NS: Final = 20_000_000
"""Timestamps move in ticks of up to 10 ms: what changed within two ticks of the baseline may
change again without its times showing it."""
_DIRECTORY_TYPE: Final = stat.S_IFDIR
_TYPE_MASK: Final = 0o170000
_SOCKET_TYPE: Final = stat.S_IFSOCK
GONE_INODES_MAX: Final = 100_000
"""Old names remembered as delta bases of renamed files."""


class Listing(NamedTuple):
    """One live directory. `names` is None when it could not be opened; `reason` says why."""

    path: bytes
    device: int
    names: list[bytes] | None
    stats: list[Stat]
    reason: str = ""


UNREADABLE: Final = "unreadable"
VANISHED: Final = "vanished"


def list_directory(fd: int) -> tuple[list[bytes], list[Stat]]:
    """Names (byte order, without our temporary ones) and stats of what is in `fd`."""
    fsencode, fstatat = os.fsencode, os.stat
    found = []
    for text in os.listdir(fd):
        try:
            found.append((fsencode(text), stat_of(fstatat(text, dir_fd=fd, follow_symlinks=False))))
        except FileNotFoundError:
            continue
    found.sort()
    if any(is_temporary(name) for name, _ in found):
        found = [pair for pair in found if not is_temporary(pair[0])]
    return [name for name, _ in found], [stats for _, stats in found]


def walk_directories(
    directories: TreeDirectories,
    prefix: bytes,
    enter_device: Callable[[int, int], None],
) -> Iterator[Listing]:
    """Every directory of the tree, parents first, names in byte order.

    Paths are those in the dot: `prefix` (the subdot that the tree is, or b"") before the tree's.

    Raises:
        CaptureFailed: deeper than TREE_DEPTH_MAX, or the tree's root cannot be read.
    """
    pending: list[tuple[bytes, list[bytes]]] = [(b"", [b""])]
    device = -1
    while pending:
        above, names = pending[-1]
        if not names:
            pending.pop()
            continue
        below = above + names.pop()
        path = prefix + b"/" + below if prefix and below else prefix + below
        try:
            fd = directories.open(below)
            found = os.fstat(fd).st_dev
            if found != device:
                device = found
                enter_device(fd, device)
            listed, stats = list_directory(fd)
        except OSError as exc:
            yield _unopened(path, exc, is_root=not below)
            continue
        subdirectories = [
            name
            for name, entry in zip(listed, stats, strict=True)
            if entry[MODE] & _TYPE_MASK == _DIRECTORY_TYPE
        ]
        yield Listing(path, device, listed, stats)
        if subdirectories:
            if len(pending) > TREE_DEPTH_MAX:
                raise CaptureFailed(f"the tree is deeper than {TREE_DEPTH_MAX}: {shown(path[:64])}")
            subdirectories.reverse()
            pending.append((below + b"/" if below else b"", subdirectories))


def _unopened(path: bytes, exc: OSError, *, is_root: bool) -> Listing:
    if is_root:
        raise CaptureFailed(f"cannot read the tree: {exc.strerror}") from exc
    if exc.errno in DENIED:
        return Listing(path, 0, None, [], UNREADABLE)
    if exc.errno in GONE:
        return Listing(path, 0, None, [], VANISHED)
    raise CaptureFailed(f"cannot read {shown(path)}: {exc.strerror}") from exc


@dataclass
class Baseline:
    """The moment from which on stats are compared, and the filesystems that can't be trusted."""

    now_ns: int
    threshold_ns: int = 0
    devices: set[int] = field(default_factory=set)
    untrusted_devices: set[int] = field(default_factory=set)

    def enter_device(self, fd: int, device: int) -> None:
        """Sync a filesystem that the walk enters and take its time, once each."""
        if device in self.devices:
            return
        entered_ns = min(self.now_ns, filesystem_now_ns(fd, self.now_ns))
        first = not self.devices
        self.devices.add(device)
        sync_filesystem(fd)
        if keeps_no_pages(device):
            self.untrusted_devices.add(device)
        self.threshold_ns = (
            entered_ns - RACY_NS if first else min(self.threshold_ns, entered_ns - RACY_NS)
        )

    def trusts(self, entry: Stat, device: int) -> bool:
        """Whether an equal stat will mean equal content from now on."""
        if entry[MTIME] >= self.threshold_ns or entry[CTIME] >= self.threshold_ns:
            return False
        return device not in self.untrusted_devices or not stat.S_ISREG(entry[MODE])


class Draft(NamedTuple):
    """A directory as scanned. `changed` names have no trusted equal stat; `before` are their old
    stats (or None), in the same order. Directories that are all unchanged have neither."""

    path: bytes
    device: int
    live: bytes
    remarks: bytes
    known: int
    """1 when the cache had this directory: unchanged names are as recorded."""
    changed: tuple[bytes, ...]
    before: tuple[Stat | None, ...]


class Scan:
    """The result of scanning a tree: spooled drafts and which directories are dirty."""

    def __init__(self) -> None:
        self.spool = Spool()
        self.dirty = bytearray()
        self.parents = array("l")
        self.unopened: dict[bytes, str] = {}
        self.groups: dict[tuple[int, int], list[tuple[bytes, int]]] = {}
        """(device, inode) of what has several names: its paths and their directories' numbers."""
        self.gone: dict[int, bytes] = {}
        """Inode to old path of names that went away or became another inode."""
        self.large: list[tuple[bytes, int]] = []
        """(path, inode) of changed and new files that may have large old counterparts."""
        self.hardlinks: dict[bytes, bytes] = {}
        """Path to group, for each path of a group of two or more."""
        self.files = 0
        self.bytes = 0

    @property
    def directories(self) -> int:
        return len(self.dirty)

    def drafts_backward(self) -> Iterator[tuple[bool, Draft]]:
        """(is dirty, draft), children before parents."""
        number = len(self.dirty)
        for value in self.spool.backward():
            number -= 1
            yield bool(self.dirty[number]), Draft(*value)

    def mark_dirty(self, number: int) -> None:
        """The directory and all above it hold a change."""
        while number >= 0 and not self.dirty[number]:
            self.dirty[number] = 1
            number = self.parents[number]


class Scanner:
    """Builds a Scan of one tree."""

    def __init__(
        self,
        *,
        root_fd: int,
        as_subdot: bytes | None,
        cache: StatCache | None,
        root_metadata: bool,
        large_bytes: int,
    ) -> None:
        self._root_fd = root_fd
        self._prefix = as_subdot or b""
        self._old = BlockStream(cache)
        self._root_metadata = root_metadata
        self._large_bytes = large_bytes
        self._scan = Scan()
        self._trail: list[tuple[bytes, int]] = []
        self._old_links: dict[bytes, bytes] = {}

    def run(self, baseline: Baseline, *, stop_at_change: bool = False) -> Scan:
        """Walk the tree. With `stop_at_change` the scan ends at the first dirty directory.

        Raises:
            CaptureFailed: the tree cannot be walked.
            BadObject: the cache is damaged in spite of its checksum.
        """
        directories = TreeDirectories(self._root_fd)
        try:
            if self._prefix:
                root_stat = stat_of(os.fstat(self._root_fd))
                self._add(Listing(b"", os.fstat(self._root_fd).st_dev, [self._prefix], [root_stat]))
            for listing in walk_directories(directories, self._prefix, baseline.enter_device):
                self._add(listing)
                if stop_at_change and self._scan.dirty[-1]:
                    return self._scan
        finally:
            directories.close()
        for block in self._old.rest():
            self._remember_gone(block)
        self._name_groups()
        return self._scan

    def _add(self, listing: Listing) -> None:
        scan = self._scan
        number = len(scan.dirty)
        scan.dirty.append(0)
        scan.parents.append(self._parent_number(listing.path, number))
        block, skipped = self._old.take(listing.path)
        for gone in skipped:
            self._remember_gone(gone)
        if listing.names is None:
            scan.unopened[listing.path] = listing.reason
            scan.mark_dirty(number)
            scan.spool.append(Draft(listing.path, 0, b"", NO_REMARKS, 0, (), ()))
            return
        if self._root_metadata and listing.path == b"":
            # The root is in no other directory: its own stat stands first in its own block.
            listing.names.insert(0, b".")
            listing.stats.insert(0, stat_of(os.fstat(self._root_fd)))
        live = encode_live(listing.names, listing.stats)
        self._count(listing, number)
        if block is not None and block.live == live and block.remarks == NO_REMARKS:
            scan.spool.append(Draft(listing.path, listing.device, live, NO_REMARKS, 1, (), ()))
            return
        draft, is_dirty = self._compare(listing, live, block)
        if is_dirty:
            scan.mark_dirty(number)
        scan.spool.append(draft)

    def _parent_number(self, path: bytes, number: int) -> int:
        """Number of the directory above; the walk's current branch is remembered."""
        trail = self._trail
        while trail and not _is_below(path, trail[-1][0]):
            trail.pop()
        parent = trail[-1][1] if trail else -1
        trail.append((path, number))
        return parent

    def _count(self, listing: Listing, number: int) -> None:
        scan = self._scan
        prefix = listing.path + b"/" if listing.path else b""
        assert listing.names is not None
        for name, entry in zip(listing.names, listing.stats, strict=True):
            if entry[MODE] & _TYPE_MASK != _DIRECTORY_TYPE:
                scan.files += 1
                scan.bytes += entry[SIZE]
                if entry[NLINK] > 1:
                    key = (listing.device, entry[INODE])
                    scan.groups.setdefault(key, []).append((prefix + name, number))

    def _compare(self, listing: Listing, live: bytes, block: Block | None) -> tuple[Draft, bool]:
        names, stats = listing.names, listing.stats
        assert names is not None
        prefix = listing.path + b"/" if listing.path else b""
        if block is None:
            self._note_large(prefix, names, stats)
            draft = Draft(listing.path, listing.device, live, NO_REMARKS, 0, (), ())
            return draft, True
        old_names, old_stats = decode_live(block.live)
        remarks = decode_remarks(block.remarks)
        for name, group in remarks.links:
            self._old_links[prefix + name] = group
        before = dict(zip(old_names, old_stats, strict=True))
        changed = [
            (name, entry)
            for name, entry in zip(names, stats, strict=True)
            if before.get(name) != entry or name in remarks.untrusted
        ]
        is_dirty = bool(changed) or len(names) != len(old_names)
        if is_dirty:
            self._note_gone(prefix, before, dict(zip(names, stats, strict=True)))
            self._note_large(prefix, [n for n, _ in changed], [s for _, s in changed])
        draft = Draft(
            listing.path,
            listing.device,
            live,
            block.remarks,
            1,
            tuple(name for name, _ in changed),
            tuple(before.get(name) for name, _ in changed),
        )
        return draft, is_dirty

    def _note_large(self, prefix: bytes, names: list[bytes], stats: list[Stat]) -> None:
        for name, entry in zip(names, stats, strict=True):
            if stat.S_ISREG(entry[MODE]) and entry[SIZE] >= self._large_bytes:
                self._scan.large.append((prefix + name, entry[INODE]))

    def _note_gone(self, prefix: bytes, before: dict[bytes, Stat], now: dict[bytes, Stat]) -> None:
        for name, old in before.items():
            new = now.get(name)
            if (new is None or new[INODE] != old[INODE]) and stat.S_ISREG(old[MODE]):
                self._remember_inode(old[INODE], prefix + name)

    def _remember_gone(self, block: Block) -> None:
        names, stats = decode_live(block.live)
        prefix = block.path + b"/" if block.path else b""
        for name, old in zip(names, stats, strict=True):
            if stat.S_ISREG(old[MODE]):
                self._remember_inode(old[INODE], prefix + name)

    def _remember_inode(self, inode: int, path: bytes) -> None:
        if len(self._scan.gone) < GONE_INODES_MAX:
            self._scan.gone[inode] = path

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


def _is_below(path: bytes, above: bytes) -> bool:
    return not above or path.startswith(above + b"/")


def is_socket(entry: Stat) -> bool:
    return entry[MODE] & _TYPE_MASK == _SOCKET_TYPE
