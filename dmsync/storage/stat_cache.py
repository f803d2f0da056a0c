"""The stat cache of one working tree: what each name's stat was when its content was last known.

It only ever saves work: a missing, foreign or damaged cache means that everything is hashed again,
never an error. Names are keyed by their path from the dot's root, never by device or mount path.
Source: protocol/STORE.md, "Stat cache".

A cache is a spool of blocks, one per directory and several for a large one (parts, each with a run
of its names), written children before parents (a directory's block is known when all below it
are), and read back the other way: parents first, names in byte order, so that a walk of the live
tree meets its blocks one after the other. Where a block lies is its `place`, which grows in the
order of the walk, so that a scan can say "as it was" by a number instead of a copy.
"""

import os
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import xxhash
import zstandard

from dmsync.core.encoding import decode, encode
from dmsync.core.objects import Entry, entry_from_value
from dmsync.errors import BadObject
from dmsync.storage.durable import whole_file

MAGIC: Final = b"dmstat02"
_MAGIC_1: Final = b"dmstat01"
_DIGEST_BYTES: Final = 8
_HEADER_LENGTH_BYTES: Final = 4
_SEGMENT_BYTES: Final = 256 * 1024
"""Encoded blocks per compressed segment: large enough to compress, small enough to hold."""
_SEGMENT_BLOCKS_MAX: Final = 4096
PART_NAMES: Final = 8192
"""Names in one part of a large directory: about 600 KiB when encoded."""
_PART_BYTES_MAX: Final = 2 * 1024 * 1024
"""A block longer than this is divided when it is written."""

Stat = tuple[int, int, int, int, int, int, int, int]
"""mode (with type), inode, size, mtime_ns, ctime_ns, uid, gid, nlink."""


class Remarks(NamedTuple):
    """What a directory's stats alone don't tell, by name; nearly always empty."""

    untrusted: frozenset[bytes] = frozenset()
    """Changed too recently, or while being read, for an equal stat to mean equal content."""
    links: tuple[tuple[bytes, bytes], ...] = ()
    """(name, hardlink group) as recorded."""
    applied_xattrs: tuple[tuple[bytes, tuple[tuple[bytes, bytes], ...]], ...] = ()
    """(name, attributes in the live tree) where they are not those recorded."""
    withheld: tuple[bytes, ...] = ()
    """Names recorded but never made in the live tree (devices, for want of trust or rights)."""

    def between(self, low: bytes, high: bytes | None) -> "Remarks":
        """What is said of the names from `low` to before `high` (None: to the end)."""
        if not any(self):
            return self

        def lies_between(name: bytes) -> bool:
            if name == b".":  # stands first, whatever the order of bytes
                return not low
            return low <= name and (high is None or name < high)

        return Remarks(
            frozenset(filter(lies_between, self.untrusted)),
            tuple(pair for pair in self.links if lies_between(pair[0])),
            tuple(pair for pair in self.applied_xattrs if lies_between(pair[0])),
            tuple(filter(lies_between, self.withheld)),
        )

    def joined(self, other: "Remarks") -> "Remarks":
        return Remarks(
            self.untrusted | other.untrusted,
            self.links + other.links,
            self.applied_xattrs + other.applied_xattrs,
            self.withheld + other.withheld,
        )


NO_REMARKS: Final = b""


def encode_remarks(remarks: Remarks) -> bytes:
    """Bytes of `remarks`, empty when there are none."""
    if not any(remarks):
        return NO_REMARKS
    return encode(
        (tuple(sorted(remarks.untrusted)), remarks.links, remarks.applied_xattrs, remarks.withheld)
    )


def decode_remarks(data: bytes) -> Remarks:
    if data == NO_REMARKS:
        return Remarks()
    untrusted, links, applied_xattrs, withheld = decode(data, trusted=True)
    return Remarks(frozenset(untrusted), links, applied_xattrs, withheld)


class Block(NamedTuple):
    """One directory, or a part of a large one: its path, the encoding of (names, stats) in byte
    order, its remarks; and where in the cache it lies."""

    path: bytes
    live: bytes
    remarks: bytes = NO_REMARKS
    place: int = -1


def encode_live(names: Sequence[bytes], stats: Sequence[Stat]) -> bytes:
    """Names and stats of one directory; equal bytes mean that nothing moved."""
    try:
        return encode((names, stats))
    except OverflowError:  # times beyond 64 bit are possible on some filesystems
        return encode((names, [_clamped(stat) for stat in stats]))


def decode_live(data: bytes) -> tuple[tuple[bytes, ...], tuple[Stat, ...]]:
    names, stats = decode(data, trusted=True)
    return names, stats


def _clamped(stat: Stat) -> tuple[int, ...]:
    return tuple(min(max(value, -(2**63)), 2**64 - 1) for value in stat)


class Spool:
    """Encodable tuples in compressed segments; can be read from either end."""

    def __init__(self, segments: list[bytes | memoryview] | None = None) -> None:
        self._segments: list[bytes | memoryview] = segments or []
        self._open: list[bytes] = []
        self._open_bytes = 0
        self._compressor: zstandard.ZstdCompressor | None = None

    def append(self, value: tuple[Any, ...]) -> None:
        data = encode(value)
        self._open.append(data)
        self._open_bytes += len(data)
        if self._open_bytes >= _SEGMENT_BYTES or len(self._open) >= _SEGMENT_BLOCKS_MAX:
            self._close_segment()

    def extend(self, segments: Iterable[bytes]) -> None:
        """Append the segments of another spool."""
        self._close_segment()
        self._segments.extend(segments)

    def _close_segment(self) -> None:
        if self._open:
            if self._compressor is None:
                self._compressor = zstandard.ZstdCompressor(level=1, write_content_size=True)
            compressed = self._compressor.compress(encode(tuple(self._open)))
            # A copy of its own length: shrunk in place it would leave holes between segments.
            self._segments.append(bytes(memoryview(compressed)))
            self._open, self._open_bytes = [], 0

    @property
    def segments(self) -> list[bytes | memoryview]:
        self._close_segment()
        return self._segments

    def forward(self) -> Iterator[tuple[Any, ...]]:
        for segment in self.segments:
            for data in segment_items(segment):
                yield decode(data, trusted=True)

    def backward(self) -> Iterator[tuple[Any, ...]]:
        for segment in reversed(self.segments):
            for data in reversed(segment_items(segment)):
                yield decode(data, trusted=True)

    def drained_backward(self) -> Iterator[tuple[Any, ...]]:
        """As `backward`, each segment forgotten when it is begun."""
        segments = self.segments
        while segments:
            for data in reversed(segment_items(segments.pop())):
                yield decode(data, trusted=True)


def segment_items(segment: bytes | memoryview) -> tuple[bytes, ...]:
    """The encoded values of one segment. Raises BadObject."""
    try:
        items: tuple[bytes, ...] = decode(
            zstandard.ZstdDecompressor().decompress(segment), trusted=True
        )
    except zstandard.ZstdError as exc:
        raise BadObject("a stat cache segment cannot be read") from exc
    return items


class StatCache:
    """Stats of a tree whose content was `root`; immutable once built by a StatCacheWriter.

    `listed_ns`: each directory was listed after its own stat was taken, and that not before this
    time: one whose own times are older, and still the same, has the names it had. 0 says nothing.
    """

    def __init__(self, root: Entry, spool: Spool, listed_ns: int = 0) -> None:
        self.root = root
        self.listed_ns = listed_ns
        self._spool = spool
        self._loaded_from: tuple[str, _FileIdentity] | None = None
        self._items: tuple[int, tuple[bytes, ...]] = (-1, ())

    @classmethod
    def load(cls, path: str) -> "StatCache | None":
        """The cache saved at `path`, or None when there is none that can be trusted."""
        try:
            with open(path, "rb") as file:
                found = os.fstat(file.fileno())
                data = file.read()
        except OSError:
            return None
        body = memoryview(data)[len(MAGIC) + _DIGEST_BYTES :]
        digest = data[len(MAGIC) : len(MAGIC) + _DIGEST_BYTES]
        if data[: len(MAGIC)] not in (MAGIC, _MAGIC_1) or xxhash.xxh3_64_digest(body) != digest:
            return None
        try:
            cache = cls._from_body(body) if data.startswith(MAGIC) else cls._from_body_1(body)
        except (BadObject, ValueError, TypeError):
            return None
        cache._loaded_from = (path, _identity(found))
        return cache

    @classmethod
    def _from_body(cls, body: memoryview) -> "StatCache":
        start = _HEADER_LENGTH_BYTES + int.from_bytes(body[:_HEADER_LENGTH_BYTES], "big")
        header = bytes(body[_HEADER_LENGTH_BYTES:start])
        root_value, listed_ns, lengths = decode(header, trusted=True)
        segments: list[bytes | memoryview] = []
        for length in lengths:
            segments.append(body[start : start + length])
            start += length
        return cls(entry_from_value(root_value), Spool(segments), int(listed_ns))

    @classmethod
    def _from_body_1(cls, body: memoryview) -> "StatCache":
        root_value, segments = decode(bytes(body), trusted=True)
        return cls(entry_from_value(root_value), Spool(list(segments)))

    def save(self, path: str) -> None:
        """Replace the cache at `path`, unless it is there. Raises StorageFull, StorageFailed."""
        if self._loaded_from is not None and self._loaded_from == (path, _identity_at(path)):
            return
        segments = self._spool.segments
        header = encode((self.root.to_value(), self.listed_ns, [len(part) for part in segments]))
        pieces = [len(header).to_bytes(_HEADER_LENGTH_BYTES, "big"), header, *segments]
        digest = xxhash.xxh3_64()
        for piece in pieces:
            digest.update(piece)
        with whole_file(path, mode=0o600, sweep=True) as file:
            file.write(MAGIC + digest.digest())
            for piece in pieces:
                file.write(piece)

    def listed_since(self, listed_ns: int) -> "StatCache":
        """This cache, whose tree was found unchanged by a scan that began then; itself when it
        says such a thing already."""
        return self if self.listed_ns else StatCache(self.root, self._spool, listed_ns)

    def doubting(self, paths: Iterable[bytes]) -> "StatCache":
        """This cache, in which no stat vouches for the content of the files at `paths` any more;
        itself when there are none of them."""
        doubted: dict[bytes, set[bytes]] = {}
        for path in paths:
            directory, _, name = path.rpartition(b"/")
            doubted.setdefault(directory, set()).add(name)
        if not doubted:
            return self
        writer = StatCacheWriter()
        for path, live, remarks in self._spool.forward():
            names = doubted[path].intersection(decode_live(live)[0]) if path in doubted else set()
            if names:
                noted = decode_remarks(remarks)
                remarks = encode_remarks(noted._replace(untrusted=noted.untrusted | names))
            writer.append(path, live, remarks)
        return writer.finish(self.root, self.listed_ns)

    def blocks(self, start: int = 0) -> Iterator[Block]:
        """Blocks from the place `start` on: parents first, names in byte order."""
        first, skipped = divmod(start, _SEGMENT_BLOCKS_MAX)
        for position in range(first, self.segments_count):
            items = self._items_at(position)
            base = position * _SEGMENT_BLOCKS_MAX
            for index in range(skipped, len(items)):
                yield _block(items[index], base + index)
            skipped = 0

    def block_at(self, place: int) -> Block:
        """The block at a place that was seen in this cache."""
        position, index = divmod(place, _SEGMENT_BLOCKS_MAX)
        return _block(self._items_at(position)[index], place)

    def find(self, path: bytes) -> Block | None:
        """The first block of the directory at `path`."""
        wanted = walk_order(path)
        after = bisect_left(
            range(self.segments_count), wanted, key=lambda n: walk_order(self._first_path(n))
        )
        for position in range(max(0, after - 1), min(after + 1, self.segments_count)):
            for index, item in enumerate(self._items_at(position)):
                if decode(item, trusted=True)[0] == path:
                    return self.block_at(position * _SEGMENT_BLOCKS_MAX + index)
        return None

    @property
    def segments_count(self) -> int:
        return len(self._spool.segments)

    def segment_bytes(self, position: int) -> int:
        """Length of the blocks of one segment, counted in the order of the walk."""
        segment = self._spool.segments[self.segments_count - 1 - position]
        return max(0, zstandard.frame_content_size(segment))

    def first_of_directory(self, position: int) -> Block | None:
        """The first block in a segment that begins a directory; None when all blocks there are
        parts of one that began before."""
        before = decode(self._items_at(position - 1)[-1], trusted=True)[0] if position else None
        for index, item in enumerate(self._items_at(position)):
            if decode(item, trusted=True)[0] != before:
                return self.block_at(position * _SEGMENT_BLOCKS_MAX + index)
        return None

    def _first_path(self, position: int) -> bytes:
        path: bytes = decode(self._items_at(position)[0], trusted=True)[0]
        return path

    def _items_at(self, position: int) -> tuple[bytes, ...]:
        """Encoded blocks of a segment, both counted in the order of the walk."""
        known, items = self._items
        if known != position:
            items = segment_items(self._spool.segments[self.segments_count - 1 - position])[::-1]
            self._items = (position, items)
        return items


def _block(item: bytes, place: int) -> Block:
    path, live, remarks = decode(item, trusted=True)
    return Block(path, live, remarks, place)


_FileIdentity = tuple[int, int, int, int] | None


def _identity(found: os.stat_result) -> _FileIdentity:
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def _identity_at(path: str) -> _FileIdentity:
    try:
        return _identity(os.stat(path))
    except OSError:
        return None


class StatCacheWriter:
    """Collects blocks, last directory of the walk first."""

    def __init__(self) -> None:
        self._spool = Spool()

    def append(self, path: bytes, live: bytes, remarks: bytes) -> None:
        """Add a directory; a long block is divided. (Who adds the parts of a large directory one
        by one adds the last first.)"""
        if len(live) <= _PART_BYTES_MAX:
            self._spool.append((path, live, remarks))
            return
        names, stats = decode_live(live)
        noted = decode_remarks(remarks)
        starts = range(0, len(names), PART_NAMES)
        for start in reversed(starts):
            end = start + PART_NAMES
            low = names[start] if start else b""
            part = noted.between(low, names[end] if end < len(names) else None)
            part_live = encode_live(list(names[start:end]), list(stats[start:end]))
            self._spool.append((path, part_live, encode_remarks(part)))

    def finish(self, root: Entry, listed_ns: int = 0) -> StatCache:
        return StatCache(root, self._spool, listed_ns)


def walk_order(path: bytes) -> bytes:
    """Sort key of a directory's path in the order of the walk (`/` below every other byte)."""
    return path.replace(b"/", b"\0")


class BlockStream:
    """Blocks of an old cache, taken in the order of the walk: all, or those of the places from
    `start` to before `end`."""

    def __init__(self, cache: StatCache | None, start: int = 0, end: int | None = None) -> None:
        self._blocks: Iterator[Block] = cache.blocks(start) if cache else iter(())
        self._end = end
        self._next: Block | None = None
        self._advance()

    def _advance(self) -> None:
        block = next(self._blocks, None)
        is_over = block is None or (self._end is not None and block.place >= self._end)
        self._next = None if is_over else block

    def take(self, path: bytes) -> tuple[Block | None, list[Block]]:
        """The block of `path`, if any, its parts joined, and the blocks passed over (directories
        that are gone)."""
        skipped: list[Block] = []
        block = self.take_first(path, skipped.append)
        parts = list(self.parts_left(path))
        return _joined([block, *parts]) if block is not None and parts else block, skipped

    def take_first(self, path: bytes, passed: Callable[[Block], None]) -> Block | None:
        """The block of `path` or its first part; `passed` is told of blocks passed over."""
        if self._next is not None and self._next.path != path:
            order = walk_order(path)
            while self._next is not None and walk_order(self._next.path) < order:
                passed(self._next)
                self._advance()
        block = self._next
        if block is None or block.path != path:
            return None
        self._advance()
        return block

    def has_parts_left(self, path: bytes) -> bool:
        return self._next is not None and self._next.path == path

    def parts_left(self, path: bytes) -> Iterator[Block]:
        """The further parts of the directory whose first was taken."""
        while self._next is not None and self._next.path == path:
            part = self._next
            self._advance()
            yield part

    def rest(self) -> Iterator[Block]:
        """Every block not yet taken."""
        while self._next is not None:
            yield self._next
            self._advance()


def _joined(parts: list[Block]) -> Block:
    names: list[bytes] = []
    stats: list[Stat] = []
    remarks = Remarks()
    for part in parts:
        some_names, some_stats = decode_live(part.live)
        names.extend(some_names)
        stats.extend(some_stats)
        remarks = remarks.joined(decode_remarks(part.remarks))
    return Block(parts[0].path, encode_live(names, stats), encode_remarks(remarks), parts[0].place)
