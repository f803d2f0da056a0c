"""The stat cache of one working tree: what each name's stat was when its content was last known.

It only ever saves work: a missing, foreign or damaged cache means that everything is hashed again,
never an error. Names are keyed by their path from the dot's root, never by device or mount path.
Source: protocol/STORE.md, "Stat cache".

A cache is a spool of one block per directory, written children before parents (a directory's
block is known when all below it are), and read back the other way: parents first, names in byte
order, so that a walk of the live tree meets its blocks one after the other.
"""

from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import xxhash
import zstandard

from dmsync.core.encoding import decode, encode
from dmsync.core.objects import Entry, entry_from_value
from dmsync.errors import BadObject
from dmsync.storage.durable import write_file_atomic

MAGIC: Final = b"dmstat01"
_DIGEST_BYTES: Final = 8
_SEGMENT_BYTES: Final = 256 * 1024
"""Encoded blocks per compressed segment: large enough to compress, small enough to hold."""
_SEGMENT_BLOCKS_MAX: Final = 4096

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
    """One directory: its path, the encoding of (names, stats) in byte order, its remarks."""

    path: bytes
    live: bytes
    remarks: bytes = NO_REMARKS


def encode_live(names: list[bytes], stats: list[Stat]) -> bytes:
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

    def __init__(self, segments: list[bytes] | None = None) -> None:
        self._segments: list[bytes] = segments or []
        self._open: list[bytes] = []
        self._open_bytes = 0
        self._compressor = zstandard.ZstdCompressor(level=1, write_content_size=True)

    def append(self, value: tuple[Any, ...]) -> None:
        data = encode(value)
        self._open.append(data)
        self._open_bytes += len(data)
        if self._open_bytes >= _SEGMENT_BYTES or len(self._open) >= _SEGMENT_BLOCKS_MAX:
            self._close_segment()

    def _close_segment(self) -> None:
        if self._open:
            self._segments.append(self._compressor.compress(encode(tuple(self._open))))
            self._open, self._open_bytes = [], 0

    @property
    def segments(self) -> list[bytes]:
        self._close_segment()
        return self._segments

    def forward(self) -> Iterator[tuple[Any, ...]]:
        for segment in self.segments:
            for data in _segment_items(segment):
                yield decode(data, trusted=True)

    def backward(self) -> Iterator[tuple[Any, ...]]:
        for segment in reversed(self.segments):
            for data in reversed(_segment_items(segment)):
                yield decode(data, trusted=True)


def _segment_items(segment: bytes) -> tuple[bytes, ...]:
    try:
        items: tuple[bytes, ...] = decode(
            zstandard.ZstdDecompressor().decompress(segment), trusted=True
        )
    except zstandard.ZstdError as exc:
        raise BadObject("a stat cache segment cannot be read") from exc
    return items


class StatCache:
    """Stats of a tree whose content was `root`; immutable once built by a StatCacheWriter."""

    def __init__(self, root: Entry, spool: Spool) -> None:
        self.root = root
        self._spool = spool

    @classmethod
    def load(cls, path: str) -> "StatCache | None":
        """The cache saved at `path`, or None when there is none that can be trusted."""
        try:
            with open(path, "rb") as file:
                data = file.read()
        except OSError:
            return None
        body = data[len(MAGIC) + _DIGEST_BYTES :]
        digest = data[len(MAGIC) : len(MAGIC) + _DIGEST_BYTES]
        if data[: len(MAGIC)] != MAGIC or xxhash.xxh3_64_digest(body) != digest:
            return None
        try:
            root_value, segments = decode(body, trusted=True)
            return cls(entry_from_value(root_value), Spool(list(segments)))
        except (BadObject, ValueError, TypeError):
            return None

    def save(self, path: str) -> None:
        """Replace the cache at `path`. Raises StorageFull, StorageFailed."""
        body = encode((self.root.to_value(), tuple(self._spool.segments)))
        write_file_atomic(path, MAGIC + xxhash.xxh3_64_digest(body) + body)

    def blocks(self) -> Iterator[Block]:
        """Blocks, parents first, names in byte order."""
        return (Block(*value) for value in self._spool.backward())


class StatCacheWriter:
    """Collects blocks, last directory of the walk first."""

    def __init__(self) -> None:
        self._spool = Spool()

    def append(self, path: bytes, live: bytes, remarks: bytes) -> None:
        self._spool.append((path, live, remarks))

    def finish(self, root: Entry) -> StatCache:
        return StatCache(root, self._spool)


def walk_order(path: bytes) -> bytes:
    """Sort key of a directory's path in the order of the walk (`/` below every other byte)."""
    return path.replace(b"/", b"\0")


class BlockStream:
    """Blocks of an old cache, taken in the order of the walk."""

    def __init__(self, cache: StatCache | None) -> None:
        self._blocks: Iterator[Block] = cache.blocks() if cache else iter(())
        self._next = next(self._blocks, None)

    def take(self, path: bytes) -> tuple[Block | None, list[Block]]:
        """The block of `path`, if any, and the blocks passed over (directories that are gone)."""
        skipped: list[Block] = []
        upcoming = self._next
        if upcoming is not None and upcoming.path != path:
            order = walk_order(path)
            while upcoming is not None and walk_order(upcoming.path) < order:
                skipped.append(upcoming)
                upcoming = next(self._blocks, None)
            self._next = upcoming
        if upcoming is None or upcoming.path != path:
            return None, skipped
        self._next = next(self._blocks, None)
        return upcoming, skipped

    def rest(self) -> Iterator[Block]:
        """Every block not yet taken."""
        while self._next is not None:
            yield self._next
            self._next = next(self._blocks, None)
