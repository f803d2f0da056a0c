"""The form a chunk is stored in: the smallest one that stays cheap to read (protocol/PACKS.md 6).

Choosing it is the costly part of storing. Chunks go through it many at once, on any thread or in a
process of their own; what comes out depends on nothing but the chunks and what is sealed.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple, Protocol

from dmsync.core.delta import (
    PATCH_LEVEL,
    PATCH_PAGE_BYTES,
    changed_pages,
    compress,
    compress_all,
    compress_with_prefix,
    select_pages,
)
from dmsync.core.ids import Kind, ObjectId, object_id, short_key
from dmsync.core.records import (
    SIMILAR_PAGE_BYTES,
    BaseSlice,
    Encoding,
    Record,
    encode_record,
    pages_bitmap,
)
from dmsync.errors import Corruption
from dmsync.storage.chain_reading import Decoded
from dmsync.storage.packs import Place
from dmsync.storage.stages import stage

SIMILAR_BYTES_MIN: Final = 4096
"""Smaller chunks do not look for similar pages: naming one takes a tenth of their frame."""
PATCHES_PER_FULL: Final = 4
"""A chain is renewed when its patches are stored in more than this many times its full frame."""
RENEWAL_STEPS: Final = (24, 40)
"""A chain is also renewed at a number of steps in this range, spread by the chunk's id so that
chunks that change together are not all renewed in one commit (protocol/decisions/0004)."""
_SURELY_GOOD: Final = 64
"""A delta below 1/64 of the object is taken without comparing it with a plain frame."""
_GOOD_DELTA: Final = 0.5
"""Of the plain frame; a worse one goes on to the similarity search."""
_PROBED_CHUNKS_MIN: Final = 12
"""So many chunks of one run changed together are likely a file written anew, as logs are that
take the place of old ones: reading what they replace, the costliest chains there are, helps
nobody. Two of them tell, without being read if they replace what was stored on similar pages."""
_PREFIX_SHARE: Final = 0.75
"""With more pages changed than this the whole base is a better prefix than the pages."""


class NewChunk(NamedTuple):
    """A chunk to store under its id. `base` is the chunk it replaces, if any: a hint."""

    id: ObjectId
    data: bytes | memoryview
    base: ObjectId | None


class Replaced(NamedTuple):
    """The chunk that a new one takes the place of: its short key, the steps that reading it takes,
    and its 8 KiB pages, by number, in which the new one differs (none when it was not asked)."""

    key: bytes
    steps: int
    pages: tuple[tuple[int, bytes], ...] = ()


class PreparedChunk(NamedTuple):
    """A chunk's encoded record, of which the payload takes `payload_bytes`.

    `data` are the chunk's bytes when similar pages may still make a smaller record, else empty;
    `replaced` is what it is a delta of.
    """

    id: ObjectId
    encoded: bytes
    payload_bytes: int
    data: bytes = b""
    replaced: Replaced | None = None


class SealedObjects(Protocol):
    """What is sealed: an ObjectReader, or what stands for one in another process."""

    def first_places(self, keys: Sequence[bytes]) -> dict[bytes, Place]:
        """One candidate for each short key that has any."""
        ...

    def load_many(self, places: Sequence[Place]) -> dict[Place, Record]:
        """The records at those places that can be read."""
        ...

    def find_many(
        self, kind: Kind, ids: Iterable[ObjectId], *, earlier: bool = False
    ) -> Iterator[Decoded | None]:
        """Each object in order, None when it is not there. Raises Corruption in its turn."""
        ...


class ChunkForms:
    """Finds the forms of new chunks beside what is sealed. For any thread.

    With `is_empty` nothing is sealed, and nothing is looked up.
    """

    def __init__(self, sealed: SealedObjects, *, is_empty: bool) -> None:
        self._sealed = sealed
        self._is_empty = is_empty

    def prepare(self, runs: Sequence[Sequence[NewChunk]], *, similar: bool) -> list[PreparedChunk]:
        """The forms of those chunks that are not sealed, in order; stores nothing.

        A run is what lies together in a file. The chunks' bytes may change once this returns.
        `similar` allows pages of replaced chunks as prefix.
        """
        with stage("encode"):
            return self._prepared(self._not_sealed(runs), similar=similar)

    def _not_sealed(self, runs: Sequence[Sequence[NewChunk]]) -> Sequence[Sequence[NewChunk]]:
        if self._is_empty:
            return runs
        keys = self._sealed.first_places([short_key(chunk.id) for run in runs for chunk in run])
        if not keys:
            return runs
        named = [chunk.id for run in runs for chunk in run if short_key(chunk.id) in keys]
        sealed = {
            oid for oid, found in zip(named, self._read(named), strict=True) if found is not None
        }
        return [[chunk for chunk in run if chunk.id not in sealed] for run in runs]

    def _prepared(
        self, runs: Sequence[Sequence[NewChunk]], *, similar: bool
    ) -> list[PreparedChunk]:
        forms: dict[ObjectId, PreparedChunk] = {}
        frames: dict[ObjectId, bytes] = {}
        first: list[NewChunk] = []
        promising: list[tuple[Sequence[NewChunk], Sequence[NewChunk]]] = []
        for run in runs:
            probes, others = _probes_and_others([chunk for chunk in run if chunk.base is not None])
            if others and self._were_written_anew(probes):
                continue
            first += probes
            if others:
                promising.append((probes, others))
        self._try_deltas(first, forms, frames)
        self._try_deltas(
            [
                chunk
                for probes, others in promising
                if any(probe.id in forms for probe in probes)
                for chunk in others
            ],
            forms,
            frames,
        )
        chunks = [chunk for run in runs for chunk in run]
        alone = [c for c in chunks if c.id not in forms and c.id not in frames and len(c.data)]
        frames.update(
            zip([c.id for c in alone], compress_all([c.data for c in alone]), strict=True)
        )
        for chunk in chunks:
            if chunk.id not in forms:
                record = plain_record(Kind.CHUNK, chunk.data, frames.get(chunk.id, b""))
                may_look = similar and len(chunk.data) >= SIMILAR_BYTES_MIN
                forms[chunk.id] = prepared(chunk.id, record, chunk.data if may_look else b"")
        return [forms[chunk.id] for chunk in chunks]

    def _were_written_anew(self, chunks: Sequence[NewChunk]) -> bool:
        """Did what these replace take the place of something that was no help to store it?"""
        places = self._sealed.first_places(
            [short_key(c.base) for c in chunks if c.base is not None]
        )
        records = self._sealed.load_many(list(places.values()))
        return len(records) == len(chunks) and all(
            record.encoding is Encoding.SIMILAR for record in records.values()
        )

    def _try_deltas(
        self,
        chunks: Sequence[NewChunk],
        forms: dict[ObjectId, PreparedChunk],
        frames: dict[ObjectId, bytes],
    ) -> None:
        """Note the forms of chunks that are best stored on what they replace, and the full frames
        that were made on the way."""
        if not chunks:
            return
        replaced = self._read(
            [chunk.base for chunk in chunks if chunk.base is not None], earlier=True
        )
        for chunk, old in zip(chunks, replaced, strict=True):
            if old is None:
                continue
            form, frame = delta_form(Kind.CHUNK, chunk, old)
            if form is not None:
                forms[chunk.id] = form
            elif frame is not None:
                frames[chunk.id] = frame

    def _read(self, ids: Sequence[ObjectId], *, earlier: bool = False) -> Iterator[Decoded | None]:
        """Sealed chunks; None for one that is not there or cannot be read: a damaged base only
        costs a full frame, and storing a damaged chunk again repairs it."""
        found = self._sealed.find_many(Kind.CHUNK, ids, earlier=earlier)
        for _ in ids:
            try:
                yield next(found)
            except Corruption:
                yield None


def prepared(
    oid: ObjectId,
    record: Record,
    data: bytes | memoryview = b"",
    replaced: Replaced | None = None,
) -> PreparedChunk:
    return PreparedChunk(oid, encode_record(record), len(record.payload), bytes(data), replaced)


def plain_record(kind: Kind, data: bytes | memoryview, frame: bytes) -> Record:
    """An object stored alone, as `frame` or, where that gains nothing, as it is."""
    if len(frame) >= len(data):
        return Record(kind, Encoding.RAW, len(data), bytes(data))
    return Record(kind, Encoding.ZSTD, len(data), frame)


def delta_form(
    kind: Kind, new: NewChunk, replaced: Decoded
) -> tuple[PreparedChunk | None, bytes | None]:
    """A form based on the replaced object, None when a full frame or another base is better; and
    the full frame when it took one to find out."""
    data, base = new.data, new.base
    assert base is not None
    if (
        replaced.steps >= _renewal_steps(base)
        or replaced.patch_bytes > PATCHES_PER_FULL * replaced.full_bytes
    ):
        return None, None
    pages: list[int] = []
    record = None
    if kind is Kind.CHUNK and len(replaced.data) == len(data):
        pages = changed_pages(replaced.data, data)
        record = _shortcut(data, replaced)
        if record is None and len(pages) * PATCH_PAGE_BYTES <= _PREFIX_SHARE * len(data):
            record = _patch(data, short_key(base), replaced.data, pages)
    if record is None:
        record = _prefix(kind, data, short_key(base), replaced.data)
        pages = []
    form = prepared(new.id, record, b"", _replaced(base, replaced, pages))
    if len(record.payload) <= len(data) // _SURELY_GOOD:
        return form, None
    frame = compress(data)
    share = _GOOD_DELTA if kind is Kind.CHUNK else 0.9
    if len(record.payload) > share * min(len(frame), len(data)):
        return None, frame
    return form, None


def _replaced(base: ObjectId, old: Decoded, pages: Sequence[int]) -> Replaced:
    """`pages` are numbers of 4 KiB pages."""
    ratio = SIMILAR_PAGE_BYTES // PATCH_PAGE_BYTES
    numbers = sorted({number // ratio for number in pages})
    size = SIMILAR_PAGE_BYTES
    contents = tuple([(n, old.data[n * size : (n + 1) * size]) for n in numbers])
    return Replaced(short_key(base), old.steps, contents)


def _renewal_steps(base: ObjectId) -> int:
    fewest, most = RENEWAL_STEPS
    return fewest + base[-1] % (most - fewest)


def _shortcut(data: bytes | memoryview, replaced: Decoded) -> Record | None:
    """A patch on the state before the run of patches that the replaced chunk's chain ends with."""
    earlier = replaced.earlier
    if earlier is None or len(earlier.data) != len(data):
        return None
    # It was only passed on the way to the replaced chunk, which is all that was verified.
    if short_key(object_id(Kind.CHUNK, earlier.data)) != earlier.key:
        return None
    return _patch(data, earlier.key, earlier.data, changed_pages(earlier.data, data))


def _patch(data: bytes | memoryview, key: bytes, old: bytes, pages: Sequence[int]) -> Record:
    """A chunk as the pages in which it differs from `old`, which is as long."""
    replaced = select_pages(old, pages)
    frame = compress_with_prefix(select_pages(data, pages), replaced, PATCH_LEVEL)
    base = (BaseSlice(key),)
    return Record(Kind.CHUNK, Encoding.PATCH, len(data), frame, base, pages_bitmap(pages))


def _prefix(kind: Kind, data: bytes | memoryview, key: bytes, old: bytes) -> Record:
    frame = compress_with_prefix(bytes(data), old)
    return Record(kind, Encoding.PREFIX, len(data), frame, (BaseSlice(key),))


def _probes_and_others(
    chunks: Sequence[NewChunk],
) -> tuple[Sequence[NewChunk], Sequence[NewChunk]]:
    """Chunks to try first, and those to try only if what one of the first replaces helps."""
    if len(chunks) < _PROBED_CHUNKS_MIN:
        return chunks, ()
    probes = chunks[len(chunks) // 4 :: len(chunks) // 2]
    return probes, [chunk for chunk in chunks if chunk not in probes]
