"""What a scan of a live tree found: which directories hold a change, and what each looked like.

A directory that is as its cache block says is held as the place of that block; the others are
spooled (compressed). So memory follows what changed, and the number of directories, and not the
number of files.
"""

from array import array
from collections.abc import Iterator
from typing import Final, Literal, NamedTuple

from dmsync.core.encoding import decode, encode
from dmsync.storage.stat_cache import (
    Remarks,
    Spool,
    Stat,
    StatCache,
    decode_live,
    decode_remarks,
    encode_live,
    encode_remarks,
)

GONE_INODES_MAX: Final = 100_000
"""Old names remembered as delta bases of renamed files."""


class Draft(NamedTuple):
    """A directory as scanned. `changed` names have no trusted equal stat; `before` are their old
    stats (or None), in the same order. Directories that are all unchanged have neither.

    A large directory has `parts` instead of names of its own: a spool of drafts, each with a run
    of its names, in order."""

    path: bytes
    device: int
    live: bytes
    remarks: bytes
    known: int
    """1 when the cache had this directory: unchanged names are as recorded."""
    changed: tuple[bytes, ...]
    before: tuple[Stat | None, ...]
    parts: Spool | None = None


class Scan:
    """The result of scanning a tree: its directories, numbered in the order of the walk."""

    def __init__(self, cache: StatCache | None = None) -> None:
        self.cache = cache
        self.spool = Spool()
        """Drafts of the directories without a place."""
        self.dirty = bytearray()
        self.parents = array("q")
        self.places = array("q")
        """Where in the cache the block lies that a directory still equals; -1: spooled."""
        self.devices = array("Q")
        self.parts: dict[int, Spool] = {}
        """Number to parts of the large directories that are spooled."""
        self.places_of_parts: dict[int, list[int]] = {}
        """Number to places of the parts of the large directories that have a place."""
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
        self.files_to_read = 0
        self.bytes_to_read = 0
        """Of regular files that are new or changed: what reading them will come to at most."""

    @property
    def directories(self) -> int:
        return len(self.dirty)

    def add_directory(self, parent: int) -> int:
        """The number of a directory that the walk comes to."""
        self.dirty.append(0)
        self.parents.append(parent)
        self.places.append(-1)
        self.devices.append(0)
        return len(self.dirty) - 1

    def remember_gone(self, inode: int, path: bytes) -> None:
        if len(self.gone) < GONE_INODES_MAX:
            self.gone[inode] = path

    def mark_dirty(self, number: int) -> None:
        """The directory and all above it hold a change."""
        while number >= 0 and not self.dirty[number]:
            self.dirty[number] = 1
            number = self.parents[number]

    def drafts_backward(self, *, dirty_only: bool = False) -> Iterator[tuple[bool, Draft]]:
        """(is dirty, draft), children before parents. A large directory that is not dirty comes
        as its parts, the last first: as a stat cache is written."""
        spooled = self.spool.backward()
        for number in range(len(self.dirty) - 1, -1, -1):
            is_dirty = bool(self.dirty[number])
            if self.places[number] < 0:
                draft = Draft(*next(spooled))._replace(parts=self.parts.get(number))
                yield is_dirty, draft
            elif is_dirty:
                yield True, self._draft_in_place(number)
            elif not dirty_only:
                for place in reversed(self.places_of_parts.get(number, [self.places[number]])):
                    yield False, self.draft_at(place, self.devices[number])

    def _draft_in_place(self, number: int) -> Draft:
        device = self.devices[number]
        places = self.places_of_parts.get(number)
        draft = self.draft_at(self.places[number], device)
        if places is None:
            return draft
        parts = Spool()
        for place in places:
            parts.append(self.draft_at(place, device)[:-1])
        return draft._replace(live=b"", remarks=b"", parts=parts)

    def draft_at(self, place: int, device: int) -> Draft:
        """The draft of a directory, or a part, that equals the block at `place`."""
        assert self.cache is not None
        block = self.cache.block_at(place)
        return Draft(block.path, device, block.live, block.remarks, 1, (), ())

    # --- between processes -----------------------------------------------------------------------

    def encoded(self, trail: list[tuple[bytes, int]], links: dict[bytes, bytes]) -> bytes:
        """This scan for `add_encoded`, with the branch it ended in and recorded hardlinks."""
        return encode(
            (
                (bytes(self.dirty), self.parents.tobytes(), self.places.tobytes()),
                self.devices.tobytes(),
                self.spool.segments,
                [(number, spool.segments) for number, spool in self.parts.items()],
                list(self.places_of_parts.items()),
                list(self.unopened.items()),
                list(self.groups.items()),
                list(self.gone.items()),
                self.large,
                (self.files, self.bytes, self.files_to_read, self.bytes_to_read),
                trail,
                list(links.items()),
            )
        )

    def add_encoded(
        self, findings: bytes, shared: list[int]
    ) -> tuple[list[tuple[bytes, int]], dict[bytes, bytes]]:
        """Add the scan of what comes next in the walk, made by another process; its trail and
        links. Its first directories are those numbered `shared` here, which it was below of."""
        columns, devices, segments, parts, places_of_parts, *rest = decode(findings, trusted=True)
        unopened, groups, gone, large, counts, trail, links = rest
        offset = len(self.dirty) - len(shared)

        def numbered(number: int) -> int:
            return shared[number] if number < len(shared) else number + offset

        dirty, parents, places = columns
        for number, above in enumerate(shared):
            if dirty[number]:
                self.mark_dirty(above)
        self.dirty += dirty[len(shared) :]
        self.parents.extend(map(numbered, _array("q", parents)[len(shared) :]))
        self.places += _array("q", places)[len(shared) :]
        self.devices += _array("Q", devices)[len(shared) :]
        self.spool.extend(segments)
        self.parts.update((numbered(number), Spool(list(some))) for number, some in parts)
        for number, some_places in places_of_parts:
            self.places_of_parts[numbered(number)] = list(some_places)
        self.unopened.update(unopened)
        for key, members in groups:
            self.groups.setdefault(key, []).extend((path, numbered(n)) for path, n in members)
        for inode, path in gone:
            self.remember_gone(inode, path)
        self.large.extend(large)
        files, size, files_to_read, bytes_to_read = counts
        self.files += files
        self.bytes += size
        self.files_to_read += files_to_read
        self.bytes_to_read += bytes_to_read
        return [(path, numbered(number)) for path, number in trail], dict(links)


def joined_draft(draft: Draft) -> Draft:
    """A large directory's draft with its parts in it."""
    if draft.parts is None:
        return draft
    names: list[bytes] = []
    stats: list[Stat] = []
    remarks = Remarks()
    changed: list[bytes] = []
    before: list[Stat | None] = []
    for value in draft.parts.forward():
        part = Draft(*value)
        some_names, some_stats = decode_live(part.live)
        names += some_names
        stats += some_stats
        remarks = remarks.joined(decode_remarks(part.remarks))
        changed += part.changed
        before += part.before
    live = encode_live(names, stats)
    return Draft(
        draft.path,
        draft.device,
        live,
        encode_remarks(remarks),
        draft.known,
        tuple(changed),
        tuple(before),
    )


def _array(code: Literal["q", "Q"], data: bytes) -> "array[int]":
    numbers: array[int] = array(code)
    numbers.frombytes(data)
    return numbers
