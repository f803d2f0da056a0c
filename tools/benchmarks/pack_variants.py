"""Measure ways of storing the difference between versions of a database directory.

Give two or more copies of the same directory, oldest first:

    python -m tools.benchmarks.pack_variants v0 v1 v2 [--sections abcdefgh] [--more]

Each consecutive pair is stored by each method; the first directory is also measured as a first
commit. Prints one Markdown table. Frames of sections d, g and h are decoded and compared, outside
the timings.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Final

import xxhash
from backports import zstd
from blake3 import blake3
from pyfastcdc import FastCDC

from tools.benchmarks.references import (
    PAGE_BYTES,
    floor_bytes,
    regular_files,
    tar_zstd_bytes,
    xor_reference,
)

KIB: Final = 1024
MANIFEST_IDS: Final = 1024
RARE: Final = 8
"""A piece found in more pages than this says nothing about likeness."""
GOOD_DELTA: Final = 0.5
"""A delta above this share of the plain frame is no good."""
SIZES: Final = (64 * KIB, 128 * KIB, 256 * KIB)


# --- frames ------------------------------------------------------------------------------------


def plain_frame(data: bytes, level: int = 3) -> bytes:
    """Compress data alone."""
    return zstd.compress(data, level)


def prefix_frame(data: bytes, prefix: bytes, level: int = 3) -> bytes:
    """Compress data against a prefix (zstd's refPrefix: one use, nothing is kept of it)."""
    return zstd.compress(data, level, zstd_dict=zstd.ZstdDict(prefix, is_raw=True).as_prefix)


def bounded_decode(frame: bytes, prefix: bytes | None, limit: int) -> bytes:
    """Decode one frame to at most limit bytes; longer, cut short or trailing is refused."""
    base = None if prefix is None else zstd.ZstdDict(prefix, is_raw=True).as_prefix
    decoder = zstd.ZstdDecompressor(zstd_dict=base)
    data = decoder.decompress(frame, max_length=limit)
    if not decoder.eof and decoder.decompress(b"", max_length=1):
        raise ValueError(f"frame is longer than {limit} bytes")
    if not decoder.eof or decoder.unused_data:
        raise ValueError("frame is cut short or has trailing bytes")
    return data


# --- versions ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ChangedFile:
    """A file whose bytes differ between two versions; old is empty for a new file."""

    path: str
    old: bytes
    new: bytes


@dataclass(frozen=True, slots=True)
class Chunk:
    """A changed run of a file, with what stood there before (None where nothing did)."""

    path: str
    offset: int
    new: bytes
    old: bytes | None


def changed_files(old_root: Path, new_root: Path) -> list[ChangedFile]:
    """Files of new_root that are not byte for byte in old_root."""
    old_files = set(regular_files(old_root))
    changed: list[ChangedFile] = []
    for path in regular_files(new_root):
        new = (new_root / path).read_bytes()
        old = (old_root / path).read_bytes() if path in old_files else b""
        if new != old:
            changed.append(ChangedFile(path, old, new))
    return changed


def removed_files(old_root: Path, new_root: Path) -> list[bytes]:
    """Contents of the files of old_root that new_root no longer has."""
    kept = set(regular_files(new_root))
    return [(old_root / path).read_bytes() for path in regular_files(old_root) if path not in kept]


def changed_runs(files: Sequence[ChangedFile], size: int) -> list[Chunk]:
    """The changed aligned runs of the given size, zero runs left out (they cost nothing)."""
    runs: list[Chunk] = []
    for file in files:
        for offset in range(0, len(file.new), size):
            new = file.new[offset : offset + size]
            old = file.old[offset : offset + size]
            if new != old and any(new):
                runs.append(Chunk(file.path, offset, new, old or None))
    return runs


# --- the table ---------------------------------------------------------------------------------


@dataclass(slots=True)
class Table:
    """Rows of the report, printed as they come so that a cut run still says something."""

    started: bool = False

    def row(self, pair: str, method: str, size: int, seconds: float, note: str = "") -> None:
        """Print one row."""
        if not self.started:
            print("| pair | method | bytes | seconds | notes |\n| --- | --- | ---: | ---: | --- |")
            self.started = True
        print(f"| {pair} | {method} | {size} | {seconds:.2f} | {note} |", flush=True)


# --- b: the floor ------------------------------------------------------------------------------


def floor(pages: Sequence[Chunk]) -> tuple[int, float]:
    """The floor of changed pages, and the seconds it took."""
    pairs = [(page.old or b"", page.new) for page in pages]
    start = time.perf_counter()
    return floor_bytes(pairs), time.perf_counter() - start


# --- c: the old place as prefix ----------------------------------------------------------------


@dataclass(slots=True)
class Placed:
    """Changed chunks after the first step: good deltas, and those that still need a better base."""

    good: list[Chunk] = field(default_factory=list)
    hard: list[tuple[Chunk, int]] = field(default_factory=list)  # with the best frame size so far
    bytes_all: int = 0
    bytes_good: int = 0
    deltas: int = 0
    new: int = 0
    seconds: float = 0.0
    seconds_judge: float = 0.0


def old_places(chunks: Sequence[Chunk], level: int = 3) -> Placed:
    """Delta each chunk against its old place; new chunks alone. Judge which deltas are good."""
    out = Placed()
    sizes: list[int] = []
    start = time.perf_counter()
    for chunk in chunks:
        frame = (
            plain_frame(chunk.new, level)
            if chunk.old is None
            else prefix_frame(chunk.new, chunk.old, level)
        )
        sizes.append(len(frame))
    out.seconds = time.perf_counter() - start
    out.bytes_all = sum(sizes)
    start = time.perf_counter()
    for chunk, size in zip(chunks, sizes, strict=True):
        if chunk.old is None:
            out.new += 1
            out.hard.append((chunk, size))
            continue
        out.deltas += 1
        plain = len(plain_frame(chunk.new, level)) if size > len(chunk.new) // 64 else sys.maxsize
        if size > GOOD_DELTA * plain:
            out.hard.append((chunk, min(size, plain)))
        else:
            out.good.append(chunk)
            out.bytes_good += size
    out.seconds_judge = time.perf_counter() - start
    return out


# --- d: similar pages as prefix ----------------------------------------------------------------


# Minimum, average and maximum as asked; the mean found is minimum + average.
COARSE: Final = (256, 1024, 4096)
FINE: Final = (64, 256, 1024)


@dataclass(slots=True)
class Likeness:
    """An index from piece to pages; a piece in too many pages is remembered as useless."""

    cutter: FastCDC
    rare: int
    table: dict[int, list[int]] = field(default_factory=dict)
    pages: list[bytes] = field(default_factory=list)
    owner: list[int] = field(default_factory=list)  # the chunk each page lies in

    def pieces(self, data: bytes) -> set[int]:
        """Hashes of the content-defined pieces of data."""
        digest = xxhash.xxh3_64_intdigest
        return {digest(piece.data) for piece in self.cutter.cut_buf(data)}

    def add(self, page: bytes, owner: int) -> None:
        """Index one page."""
        number = len(self.pages)
        self.pages.append(page)
        self.owner.append(owner)
        table = self.table
        for piece in self.pieces(page):
            places = table.setdefault(piece, [])
            if len(places) <= self.rare:
                places.append(number)

    def votes(self, data: bytes) -> dict[int, int]:
        """Pages by number of pieces shared with data."""
        count: dict[int, int] = {}
        for piece in self.pieces(data):
            places = self.table.get(piece)
            if places is not None and len(places) <= self.rare:
                for number in places:
                    count[number] = count.get(number, 0) + 1
        return count

    def best(self, data: bytes, limit: int) -> list[int]:
        """The limit pages with most votes, best first; of equals the newest."""
        count = self.votes(data)
        return sorted(count, key=lambda n: (-count[n], -n))[:limit]

    def cover(self, data: bytes, limit: int) -> list[int]:
        """Greedy choice: each next page is the one that adds most pieces not yet covered."""
        holds: dict[int, set[int]] = {}
        for piece in self.pieces(data):
            places = self.table.get(piece)
            if places is not None and len(places) <= self.rare:
                for number in places:
                    holds.setdefault(number, set()).add(piece)
        chosen: list[int] = []
        while holds and len(chosen) < limit:
            number = max(holds, key=lambda n: (len(holds[n]), n))
            gained = holds.pop(number)
            if not gained:
                break
            chosen.append(number)
            for other in list(holds):
                holds[other] -= gained
        return chosen


@dataclass(frozen=True, slots=True)
class Variant:
    """How similar pages are chosen and used."""

    limit: int
    level: int = 3
    best_last: bool = True
    whole_chunks: bool = False  # refer to whole chunks; limit then counts chunks
    earlier: bool = True  # pages of earlier hard chunks may be bases too
    greedy: bool = False
    depth: int = 1 << 30  # longest dependency of hard chunk on hard chunk
    keep_old: bool = False  # a weak old place goes to the front of the prefix
    pieces: tuple[int, int, int] = FINE
    rare: int = RARE
    before: bool = False  # of delta'd chunks, index the replaced page and not the new one
    gone: bool = False  # pages of files that this version no longer has may be bases too

    def name(self) -> str:
        """A short name for the table."""
        words = [f"top {self.limit} " + ("chunks" if self.whole_chunks else "pages")]
        if self.level != 3:
            words.append(f"level {self.level}")
        if not self.best_last:
            words.append("best first")
        if not self.earlier:
            words.append("bases: delta'd chunks only")
        if self.greedy:
            words.append("greedy cover")
        if self.depth < 1 << 30:
            words.append(f"depth <= {self.depth}")
        if self.keep_old:
            words.append("+ old place")
        if self.pieces != FINE:
            words.append(f"pieces {self.pieces[0]}/{self.pieces[1]}/{self.pieces[2]}")
        if self.before:
            words.append("replaced pages, not new ones")
        if self.rare != RARE:
            words.append(f"pieces in at most {self.rare} pages")
        if self.gone:
            words.append("+ removed files")
        return ", ".join(words)


@dataclass(slots=True)
class Similar:
    """Result of storing the hard chunks with similar pages as prefix."""

    bytes_hard: int = 0
    index_seconds: float = 0.0
    search_seconds: float = 0.0
    compress_seconds: float = 0.0
    decode_seconds: float = 0.0
    references: int = 0
    distinct: set[int] = field(default_factory=set)
    with_prefix: int = 0
    base_chunks: int = 0  # distinct base chunks, summed over the hard chunks
    depths: list[int] = field(default_factory=list)
    closures: list[int] = field(default_factory=list)


class SimilarPages:
    """Stores hard chunks in order, each with similar pages of this version as prefix."""

    def __init__(self, variant: Variant) -> None:
        low, mean, high = variant.pieces
        cutter = FastCDC(avg_size=mean, min_size=low, max_size=high)
        self.result = Similar()
        self._variant = variant
        self._index = Likeness(cutter, variant.rare)
        self._contents: list[bytes] = []
        self._depths: list[int] = []
        self._closures: list[frozenset[int]] = []

    def add_bases(self, placed: Placed, gone: Sequence[bytes]) -> None:
        """Index what may be a base from the start: changed pages of good deltas, removed files."""
        start = time.perf_counter()
        for chunk in placed.good:
            owner = self._own(chunk.new, 0, frozenset())
            old = chunk.old or b""
            for at in range(0, len(chunk.new), PAGE_BYTES):
                before, page = old[at : at + PAGE_BYTES], chunk.new[at : at + PAGE_BYTES]
                if page != before:
                    self._index.add(before if self._variant.before else page, owner)
        for data in gone if self._variant.gone else ():
            for at in range(0, len(data), 64 * KIB):
                self._add_chunk(data[at : at + 64 * KIB], 0, frozenset())
        self.result.index_seconds += time.perf_counter() - start

    def store(self, chunk: Chunk, fallback: int) -> None:
        """Store one hard chunk; `fallback` is its size without similar pages."""
        start = time.perf_counter()
        chosen, owners, parts = self._choose(chunk)
        self.result.search_seconds += time.perf_counter() - start
        depth, closure = 0, frozenset[int]()
        size = self._size_with(chunk, parts) if parts else fallback
        if size < fallback:
            self._count(chosen, owners)
            depth = 1 + max(self._depths[owner] for owner in owners)
            closure = frozenset().union(owners, *(self._closures[owner] for owner in owners))
        self.result.bytes_hard += min(size, fallback)
        self.result.depths.append(depth)
        self.result.closures.append(len(closure))
        if self._variant.earlier and depth < self._variant.depth:
            start = time.perf_counter()
            self._add_chunk(chunk.new, depth, closure)
            self.result.index_seconds += time.perf_counter() - start

    def _own(self, content: bytes, depth: int, closure: frozenset[int]) -> int:
        self._contents.append(content)
        self._depths.append(depth)
        self._closures.append(closure)
        return len(self._contents) - 1

    def _add_chunk(self, content: bytes, depth: int, closure: frozenset[int]) -> None:
        owner = self._own(content, depth, closure)
        for at in range(0, len(content), PAGE_BYTES):
            self._index.add(content[at : at + PAGE_BYTES], owner)

    def _choose(self, chunk: Chunk) -> tuple[list[int], set[int], list[bytes]]:
        """Numbers of the chosen pages or chunks, the chunks they lie in, and their bytes."""
        index, limit = self._index, self._variant.limit
        if self._variant.whole_chunks:
            tally: dict[int, int] = {}
            for number, count in index.votes(chunk.new).items():
                tally[index.owner[number]] = tally.get(index.owner[number], 0) + count
            chosen = sorted(tally, key=lambda n: (-tally[n], -n))[:limit]
            return chosen, set(chosen), [self._contents[number] for number in chosen]
        search = index.cover if self._variant.greedy else index.best
        chosen = search(chunk.new, limit)
        owners = {index.owner[number] for number in chosen}
        return chosen, owners, [index.pages[number] for number in chosen]

    def _size_with(self, chunk: Chunk, parts: list[bytes]) -> int:
        """Size of the frame with `parts` as prefix; it is decoded and compared."""
        if self._variant.best_last:
            parts = parts[::-1]
        if self._variant.keep_old and chunk.old is not None:
            parts = [chunk.old, *parts]
        prefix = b"".join(parts)
        start = time.perf_counter()
        frame = prefix_frame(chunk.new, prefix, self._variant.level)
        self.result.compress_seconds += time.perf_counter() - start
        start = time.perf_counter()
        if bounded_decode(frame, prefix, len(chunk.new)) != chunk.new:
            raise ValueError("a frame did not decode to what went in")
        self.result.decode_seconds += time.perf_counter() - start
        return len(frame)

    def _count(self, chosen: Sequence[int], owners: set[int]) -> None:
        self.result.with_prefix += 1
        self.result.references += len(chosen)
        self.result.distinct.update(chosen)
        self.result.base_chunks += len(owners)


def similar_pages(placed: Placed, variant: Variant, gone: Sequence[bytes] = ()) -> Similar:
    """Store the hard chunks in order, each with similar pages newly written in this version."""
    store = SimilarPages(variant)
    store.add_bases(placed, gone)
    for chunk, fallback in placed.hard:
        store.store(chunk, fallback)
    return store.result


def variants_for(size: int, more: bool) -> Iterator[Variant]:
    """The variants to try at one chunk size."""
    scale = size // (64 * KIB)
    usual = 16 * scale
    for pages in (8, 16, 32):
        yield Variant(pages * scale, pieces=COARSE)
    for pages in (8, 16, 32):
        yield Variant(pages * scale)
    yield Variant(usual, depth=1)
    yield Variant(usual, depth=2)
    yield Variant(usual, depth=1, gone=True)
    yield Variant(usual, earlier=False, gone=True, before=True)
    yield Variant(usual, earlier=False, gone=True, before=True, greedy=True)
    yield Variant(usual, earlier=False, gone=True, before=True, greedy=True, level=6)
    if more:
        yield Variant(usual, depth=1, pieces=(128, 512, 2048))
        yield Variant(usual, depth=3)
        yield Variant(usual, depth=2, gone=True)
        yield Variant(usual, depth=4, gone=True)
        yield Variant(8 * scale, depth=1, gone=True)
        yield Variant(32 * scale, depth=1, gone=True)
        for common in (4, 16, 32):
            yield Variant(usual, depth=1, gone=True, rare=common)
        yield Variant(usual, depth=1, gone=True, best_last=False)
        yield Variant(usual, depth=1, gone=True, level=1)
        yield Variant(usual, depth=1, gone=True, level=6)
        yield Variant(usual, depth=1, gone=True, greedy=True)
        yield Variant(8 * scale, depth=1, gone=True, greedy=True)
        yield Variant(usual, depth=1, gone=True, keep_old=True)
        yield Variant(usual, depth=1, gone=True, before=True)
        yield Variant(usual, depth=2, gone=True, before=True)
        yield Variant(usual, earlier=False, gone=True, before=True, level=4)
        yield Variant(usual, earlier=False, gone=True, before=True, level=5)
        yield Variant(8 * scale, earlier=False, gone=True, before=True, greedy=True)
        if size == 64 * KIB:
            for chunks in (2, 4, 8):
                yield Variant(chunks, depth=1, gone=True, whole_chunks=True)


# --- e: the first commit -----------------------------------------------------------------------


def first_commit(root: Path, size: int, level: int) -> tuple[int, int, float]:
    """Every non-zero chunk alone: bytes, chunks, seconds."""
    start = time.perf_counter()
    total = count = 0
    zeros = bytes(size)
    for path in regular_files(root):
        with (root / path).open("rb") as stream:
            while data := stream.read(size):
                if data != zeros[: len(data)]:
                    total += len(plain_frame(data, level))
                    count += 1
    return total, count, time.perf_counter() - start


# --- f: ids and manifests ----------------------------------------------------------------------


def manifest_cost(files: Sequence[ChangedFile], size: int) -> tuple[int, int, int, float]:
    """Changed ids, changed manifest pages, bytes of their deltas, seconds."""
    changed = pages = total = 0
    seconds = 0.0
    for file in files:
        ids = [
            [blake3(d[a : a + size]).digest() for a in range(0, len(d), size)]
            for d in (file.old, file.new)
        ]
        changed += sum(1 for i, one in enumerate(ids[1]) if ids[0][i : i + 1] != [one])
        start = time.perf_counter()
        for at in range(0, len(ids[1]), MANIFEST_IDS):
            old, new = (b"".join(side[at : at + MANIFEST_IDS]) for side in ids)
            if old != new:
                pages += 1
                total += len(prefix_frame(new, old) if old else plain_frame(new))
        seconds += time.perf_counter() - start
    return changed, pages, total, seconds


# --- g: chains ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Chain:
    """One chunk's states as stored: a full frame, the deltas after it, and what must come out."""

    full: bytes
    deltas: list[bytes]
    last: bytes


def changing_chunks(roots: Sequence[Path], size: int, most: int) -> Iterator[list[bytes]]:
    """States, oldest first, of chunks that changed in nearly every version; at most `most`."""
    listings = [set(regular_files(root)) for root in roots]
    shared = sorted(set.intersection(*listings), key=lambda path: -(roots[0] / path).stat().st_size)
    found = 0
    for path in shared:
        with ExitStack() as files:
            streams = [files.enter_context((root / path).open("rb")) for root in roots]
            while (states := [stream.read(size) for stream in streams])[0]:
                changed = [b for a, b in pairwise(states) if a != b and len(b) == size]
                if len(changed) + 1 >= max(2, len(roots) - 1) and len(states[0]) == size:
                    yield [states[0], *changed]
                    found += 1
                if found >= most:
                    return


def chain_cost(roots: Sequence[Path], size: int, most: int = 400) -> dict[str, float]:
    """Microseconds per chunk of each part of reading through a chain, and mean frame sizes."""
    chains = [
        Chain(plain_frame(states[0]), [prefix_frame(b, a) for a, b in pairwise(states)], states[-1])
        for states in changing_chunks(roots, size, most)
    ]
    deltas = [delta for chain in chains for delta in chain.deltas]
    clock = time.perf_counter
    start = clock()
    heads = [bounded_decode(chain.full, None, size) for chain in chains]
    full_s = clock() - start
    start = clock()
    ends = [
        decode_deltas(head, chain.deltas, size) for head, chain in zip(heads, chains, strict=True)
    ]
    steps_s = clock() - start
    if any(end != chain.last for end, chain in zip(ends, chains, strict=True)):
        raise ValueError("a chain did not decode to what went in")
    start = clock()
    for end in ends:
        blake3(end).digest()
    hash_s = clock() - start
    return {
        "full frame decode us": full_s / len(chains) * 1e6,
        "delta step decode us": steps_s / len(deltas) * 1e6,
        "blake3 us": hash_s / len(chains) * 1e6,
        "mean full frame bytes": sum(len(chain.full) for chain in chains) / len(chains),
        "mean delta bytes": sum(map(len, deltas)) / len(deltas),
        "chains": len(chains),
        "steps": len(deltas),
    }


def decode_deltas(head: bytes, deltas: Sequence[bytes], size: int) -> bytes:
    """Apply deltas one after the other."""
    for delta in deltas:
        head = bounded_decode(delta, head, size)
    return head


# --- h: changed pages only, frames in blocks ---------------------------------------------------


@dataclass(slots=True)
class Narrow:
    """Delta frames over the changed pages of a chunk only."""

    frames: list[bytes] = field(default_factory=list)
    bases: list[bytes] = field(default_factory=list)
    news: list[bytes] = field(default_factory=list)
    seconds: float = 0.0
    decode_us: float = 0.0


def changed_pages_only(chunks: Sequence[Chunk], level: int = 3) -> Narrow:
    """Delta only the changed 8 KiB pages of each chunk (a bitmap would say which)."""
    out = Narrow()
    start = time.perf_counter()
    for chunk in chunks:
        old = chunk.old or b""
        places = [
            at
            for at in range(0, len(chunk.new), PAGE_BYTES)
            if chunk.new[at : at + PAGE_BYTES] != old[at : at + PAGE_BYTES]
        ]
        new = b"".join([chunk.new[at : at + PAGE_BYTES] for at in places])
        base = b"".join([old[at : at + PAGE_BYTES] for at in places])
        out.frames.append(
            prefix_frame(new, base, level) if len(base) >= 8 else plain_frame(new, level)
        )
        out.bases.append(base)
        out.news.append(new)
    out.seconds = time.perf_counter() - start
    start = time.perf_counter()
    for frame, base, new in zip(out.frames, out.bases, out.news, strict=True):
        if bounded_decode(frame, base if len(base) >= 8 else None, len(new)) != new:
            raise ValueError("a frame did not decode to what went in")
    out.decode_us = (time.perf_counter() - start) / max(1, len(chunks)) * 1e6
    return out


def in_blocks(frames: Sequence[bytes], block: int) -> int:
    """Bytes when frames are gathered into blocks of this size and each is compressed again."""
    total = 0
    held: list[bytes] = []
    size = 0
    for frame in (*frames, b""):
        if not frame or size + len(frame) > block:
            joined = b"".join(held)
            total += min(len(joined), len(plain_frame(joined)))
            held, size = [], 0
        held.append(frame)
        size += len(frame)
    return total


# --- main --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pair:
    """Two consecutive versions, and what was asked to be measured of them."""

    old: Path
    new: Path
    sections: frozenset[str]
    more: bool

    @property
    def name(self) -> str:
        return f"{self.old.name}-{self.new.name}"


def measure_pair(table: Table, pair: Pair) -> None:
    """All methods for one pair of versions."""
    files = changed_files(pair.old, pair.new)
    if "a" in pair.sections:
        start = time.perf_counter()
        reference = xor_reference(pair.old, pair.new)
        note = (
            f"{reference.placed_pages} placed, {reference.new_pages} new pages; time with reading"
        )
        seconds = time.perf_counter() - start
        table.row(pair.name, "a xor reference", reference.compressed_bytes, seconds, note)
    if "b" in pair.sections:
        table.row(pair.name, "b floor", *floor(changed_runs(files, PAGE_BYTES)))
    for size in SIZES:
        measure_chunk_size(table, pair, files, size)


def measure_chunk_size(table: Table, pair: Pair, files: Sequence[ChangedFile], size: int) -> None:
    """Sections c, d, f and h at one chunk size."""
    kib = size // KIB
    placed = old_places(changed_runs(files, size)) if pair.sections & set("cdh") else Placed()
    if "c" in pair.sections:
        good = f"{placed.bytes_good}/{len(placed.good)}"
        note = f"{placed.deltas} deltas, {placed.new} new; good ones {good}"
        table.row(pair.name, f"c {kib} KiB old place", placed.bytes_all, placed.seconds, note)
    if "c" in pair.sections and pair.more:
        measure_levels(table, pair, changed_runs(files, size), kib)
    if "d" in pair.sections:
        gone = removed_files(pair.old, pair.new)
        for variant in variants_for(size, pair.more):
            measure_variant(table, f"{kib} KiB", pair, placed, variant, gone)
    if "h" in pair.sections:
        measure_narrow(table, pair, placed, kib)
    if "f" in pair.sections:
        changed, count, total, seconds = manifest_cost(files, size)
        note = f"{changed} ids = {changed * 32} B; {count} manifest pages"
        table.row(pair.name, f"f {kib} KiB manifest page deltas", total, seconds, note)


def measure_levels(table: Table, pair: Pair, chunks: Sequence[Chunk], kib: int) -> None:
    """Section c at other compression levels."""
    for level in (1, 4, 5, 6):
        placed = old_places(chunks, level)
        note = f"good ones {placed.bytes_good}/{len(placed.good)}"
        name = f"c {kib} KiB old place, level {level}"
        table.row(pair.name, name, placed.bytes_all, placed.seconds, note)


def measure_variant(
    table: Table, chunk: str, pair: Pair, placed: Placed, variant: Variant, gone: Sequence[bytes]
) -> None:
    """Section d: one way of choosing similar pages."""
    got = similar_pages(placed, variant, gone)
    hard = max(1, len(placed.hard))
    notes = [
        f"good {placed.bytes_good}/{len(placed.good)}",
        f"hard {got.bytes_hard}/{len(placed.hard)} ({got.with_prefix} prefixed)",
        f"judge {placed.seconds_judge:.2f} index {got.index_seconds:.2f}",
        f"search {got.search_seconds:.2f} compress {got.compress_seconds:.2f}",
        f"decode {got.decode_seconds:.2f} s",
        f"refs {got.references}, {len(got.distinct)} distinct",
        f"base chunks per hard chunk {got.base_chunks / hard:.1f}",
        f"depth max {max(got.depths, default=0)}",
        f"closure mean {sum(got.closures) / hard:.0f} max {max(got.closures, default=0)}",
    ]
    seconds = got.index_seconds + got.search_seconds + got.compress_seconds
    seconds += placed.seconds + placed.seconds_judge
    total = placed.bytes_good + got.bytes_hard
    table.row(pair.name, f"d {chunk} {variant.name()}", total, seconds, "; ".join(notes))


def measure_narrow(table: Table, pair: Pair, placed: Placed, kib: int) -> None:
    """Section h: deltas over the changed pages alone, and frames gathered into blocks."""
    whole = [prefix_frame(c.new, c.old) for c in placed.good if c.old is not None]
    name = f"h {kib} KiB good deltas, whole chunk"
    table.row(pair.name, name, sum(map(len, whole)), placed.seconds, blocks_note(whole))
    for level in (3, 6):
        narrow = changed_pages_only(placed.good, level)
        note = f"decode {narrow.decode_us:.0f} us; {blocks_note(narrow.frames)}"
        name = f"h {kib} KiB good deltas, changed pages only, level {level}"
        table.row(pair.name, name, sum(map(len, narrow.frames)), narrow.seconds, note)


def blocks_note(frames: Sequence[bytes]) -> str:
    """What compressing frames once more in blocks would give."""
    sizes = ", ".join(f"{b // KIB} KiB {in_blocks(frames, b)}" for b in (4096, 16384, 65536))
    return f"{len(frames)} frames; again in blocks of {sizes}"


def measure_first_commit(table: Table, root: Path) -> None:
    """Section e: every chunk of one version alone."""
    start = time.perf_counter()
    size = tar_zstd_bytes(root)
    table.row(root.name, "e tar, zstd -3", size, time.perf_counter() - start)
    for chunk_size, levels in zip(SIZES, ((3,), (3, 4, 5), (3,)), strict=True):
        for level in levels:
            size, count, seconds = first_commit(root, chunk_size, level)
            name = f"e {chunk_size // KIB} KiB alone, level {level}"
            table.row(root.name, name, size, seconds, f"{count} chunks")


def measure_chains(table: Table, roots: Sequence[Path]) -> None:
    """Section g: what reading through chains of deltas costs."""
    for size in SIZES:
        figures = chain_cost(roots, size)
        note = ", ".join(f"{name} {value:.0f}" for name, value in figures.items())
        table.row(f"{roots[0].name}..{roots[-1].name}", f"g {size // KIB} KiB chains", 0, 0.0, note)


def main() -> None:
    """Parse arguments and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("versions", nargs="+", type=Path, help="directories, oldest first")
    parser.add_argument("--sections", default="abcdefgh", help="which methods, by letter")
    parser.add_argument("--more", action="store_true", help="also other levels, orders, depths")
    arguments = parser.parse_args()
    roots: list[Path] = arguments.versions
    sections = frozenset(arguments.sections)
    table = Table()
    if sections & set("abcdfh"):
        for old, new in pairwise(roots):
            measure_pair(table, Pair(old, new, sections, arguments.more))
    if "e" in sections:
        measure_first_commit(table, roots[0])
    if "g" in sections and len(roots) > 1:
        measure_chains(table, roots)


if __name__ == "__main__":
    main()
