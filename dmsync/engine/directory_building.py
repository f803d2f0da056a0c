"""A large directory goes by in runs: what was scanned beside the leaf pages of what is recorded.

Where leaf pages end depends on names alone (protocol/OBJECTS.md 4), so the names between two
leaves' first keys are one leaf's again unless something changed there: such a leaf is taken over
by its id, unread. Everything else is built entry by entry. Memory follows one part of the
directory, and the number of its pages.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from dmsync.core.objects import Entry
from dmsync.core.pages import DIRECTORY, Child, PageReader, name_ends_leaf, read_page
from dmsync.engine.scan_result import Draft
from dmsync.storage.stat_cache import (
    PART_NAMES,
    Remarks,
    Spool,
    Stat,
    StatCacheWriter,
    decode_live,
    decode_remarks,
    encode_live,
    encode_remarks,
)


class Run(NamedTuple):
    """Names of a large directory, in order. `before` are the old stats (or None) of those that
    have no trusted equal one; the others are as recorded."""

    leaf: Child | None
    """The leaf page with what is recorded from the name `low` to before `high` (None: to the
    end); other runs may have other parts of it."""
    low: bytes
    high: bytes | None
    names: Sequence[bytes]
    stats: Sequence[Stat]
    before: dict[bytes, Stat | None]
    remarks: Remarks
    is_unchanged: bool
    """Whether these are exactly the names of `leaf`, all as recorded."""

    @property
    def ends_by_name(self) -> bool:
        """Whether its last name ends a leaf, whatever comes after."""
        return bool(self.names) and name_ends_leaf(self.names[-1])


def runs(
    draft: Draft, leaves: Sequence[Child], is_doubtful: Callable[[bytes, Stat], bool]
) -> Iterator[Run]:
    """The names of a large directory, and all that is recorded there, in runs.

    `leaves`: the leaf pages of what is recorded, in order. `is_doubtful` says of a name whose stat
    is as recorded whether its entry may be another all the same.
    """
    number = 0
    low = b""
    pieces: list[_Piece] = []
    assert draft.parts is not None
    for value in draft.parts.forward():
        part = _Part(Draft(*value), is_doubtful)
        start = 0
        while (high := _first_key(leaves, number + 1)) is not None and part.reaches(high):
            end = part.index(high)
            pieces.append(part.piece(start, end))
            yield _run(leaves[number], low, high, pieces)
            number, low, start, pieces = number + 1, high, end, []
        pieces.append(part.piece(start, len(part.names)))
        if sum(len(piece.names) for piece in pieces) >= PART_NAMES:
            high = part.names[-1] + b"\0"
            yield _run(leaves[number] if leaves else None, low, high, pieces)
            low, pieces = high, []
    while (high := _first_key(leaves, number + 1)) is not None:
        yield _run(leaves[number], low, high, pieces)
        number, low, pieces = number + 1, high, []
    yield _run(leaves[number] if leaves else None, low, None, pieces)


def with_following(found: Iterator[Run]) -> Iterator[tuple[Run, Run | None]]:
    """Each run with the one after it."""
    run = next(found, None)
    while run is not None:
        following = next(found, None)
        yield run, following
        run = following


def recorded_in(reader: PageReader, run: Run) -> dict[bytes, Entry]:
    """The recorded entries of a run, sorted by name."""
    if run.leaf is None:
        return {}
    return {
        entry.name: entry
        for entry in read_page(reader, run.leaf.page, DIRECTORY).items
        if run.low <= entry.name and (run.high is None or entry.name < run.high)
    }


def _first_key(leaves: Sequence[Child], number: int) -> bytes | None:
    return leaves[number].key if number < len(leaves) else None


class _Piece(NamedTuple):
    names: Sequence[bytes]
    stats: Sequence[Stat]
    before: dict[bytes, Stat | None]
    remarks: Remarks
    is_unchanged: bool


class _Part:
    """One part of the draft, to be cut."""

    def __init__(self, draft: Draft, is_doubtful: Callable[[bytes, Stat], bool]) -> None:
        self.names, self.stats = decode_live(draft.live)
        self._first = 1 if self.names[:1] == (b".",) else 0  # which is not in its place
        self._remarks = decode_remarks(draft.remarks)
        self._before: dict[bytes, Stat | None] = (
            dict(zip(draft.changed, draft.before, strict=True))
            if draft.known
            else dict.fromkeys(self.names)
        )
        before = self._before
        self._marked = [
            index
            for index, (name, entry) in enumerate(zip(self.names, self.stats, strict=True))
            if name in before or is_doubtful(name, entry)
        ]

    def reaches(self, name: bytes) -> bool:
        return len(self.names) > self._first and self.names[-1] >= name

    def index(self, name: bytes) -> int:
        return bisect_left(self.names, name, self._first)

    def piece(self, start: int, end: int) -> _Piece:
        marked = bisect_left(self._marked, start)
        is_unchanged = marked == len(self._marked) or self._marked[marked] >= end
        names, stats = self.names[start:end], self.stats[start:end]
        return _Piece(names, stats, self._before, self._remarks, is_unchanged)


def _run(leaf: Child | None, low: bytes, high: bytes | None, pieces: list[_Piece]) -> Run:
    names: tuple[bytes, ...] = ()
    stats: tuple[Stat, ...] = ()
    before: dict[bytes, Stat | None] = {}
    remarks = Remarks()
    for piece in pieces:
        names += tuple(piece.names)
        stats += tuple(piece.stats)
        before = {**before, **piece.before} if before and piece.before else before or piece.before
        if any(piece.remarks):
            remarks = remarks.joined(piece.remarks)
    remarks = remarks.between(low, high)
    is_unchanged = (
        leaf is not None
        and names[:1] == (leaf.key,)
        and len(names) == leaf.weight
        and all(piece.is_unchanged for piece in pieces)
        and not remarks.links
        and not remarks.withheld
    )
    return Run(leaf, low, high, names, stats, before, remarks, is_unchanged)


class CacheParts:
    """The next cache's blocks of a large directory, which are known first to last and written the
    other way round."""

    def __init__(self) -> None:
        self._spool = Spool()
        self._names: list[bytes] = []
        self._stats: list[Stat] = []
        self._remarks = Remarks()

    def add(self, names: Sequence[bytes], stats: Sequence[Stat], remarks: Remarks) -> None:
        if names and len(self._names) >= PART_NAMES:  # no part is without names but an only one
            self._end_part()
        self._names.extend(names)
        self._stats.extend(stats)
        if any(remarks):
            self._remarks = self._remarks.joined(remarks)

    def _end_part(self) -> None:
        live = encode_live(self._names, self._stats)
        self._spool.append((live, encode_remarks(self._remarks)))
        self._names, self._stats, self._remarks = [], [], Remarks()

    def write(self, cache: StatCacheWriter, path: bytes) -> None:
        self._end_part()
        for live, remarks in self._spool.drained_backward():
            cache.append(path, live, remarks)
