"""Writing one pack: new objects, each stored in the smallest form that stays cheap to read.

Choosing a form is the costly part. Chunks go through it many at once and on any thread
(`prepare`); one thread then puts the results in order, so that the same objects give the same pack
whatever the threads did. Pages for the similarity search are limited by core.similarity.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple, Self

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
    RAW_BYTES_MAX,
    SIMILAR_PAGE_BYTES,
    STEPS_MAX,
    BaseSlice,
    Encoding,
    Record,
    encode_record,
    pages_bitmap,
)
from dmsync.core.similarity import PageIndex
from dmsync.errors import BadObject, Corruption
from dmsync.storage.durable import lock_exclusively, remove_if_there, storage_errors
from dmsync.storage.object_reading import Decoded, ObjectReader
from dmsync.storage.packs import PACK_BYTES_MAX, PackBuilder, PackInfo, Place
from dmsync.storage.stages import stage

if TYPE_CHECKING:
    from dmsync.storage.object_store import ObjectStore

TEMPORARY_PREFIX: Final = "tmp-"
_SIMILAR_BYTES_MIN: Final = 4096
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
"""So many chunks of one block changed together are likely a file written anew, as logs are that
take the place of old ones: reading what they replace, the costliest chains there are, helps
nobody. Two of them tell."""
_PREFIX_SHARE: Final = 0.75
"""With more pages changed than this the whole base is a better prefix than the pages."""
_IDS_REMEMBERED: Final = 65_536
_OFFSET_BITS: Final = 40


class NewChunk(NamedTuple):
    """A chunk to store under its id. `base` is the chunk it replaces, if any: a hint."""

    id: ObjectId
    data: bytes | memoryview
    base: ObjectId | None


class PreparedChunk(NamedTuple):
    """A chunk in the form it will be stored in, unless similar pages make a smaller one.

    `data` are its bytes when it may look for such pages, else empty; `replaced` is what it is a
    delta of.
    """

    id: ObjectId
    record: Record
    data: bytes = b""
    replaced: "Replaced | None" = None


class Replaced(NamedTuple):
    """The object that a new one takes the place of, and in which 4 KiB pages they differ (none
    when that was not asked)."""

    id: ObjectId
    decoded: Decoded
    pages: Sequence[int] = ()


class BuiltPacks:
    """Packs under construction as a RecordSource; records go to the last one."""

    def __init__(self) -> None:
        self.builders: list[PackBuilder] = []
        self._first: dict[bytes, int] = {}
        self._others: dict[bytes, list[int]] = {}
        """Further places of a key: a collision, or one object stored twice."""

    def append(self, record: bytes, key: bytes) -> Place:
        builder = self.builders[-1]
        offset = builder.append(record, key)
        self.note(len(self.builders) - 1, offset, key)
        return Place(builder.name, offset)

    def append_joined(
        self, records: bytes | memoryview, lengths: Sequence[int], keys: Sequence[bytes]
    ) -> list[Place]:
        """Append records that lie one behind the other, of these lengths and short keys."""
        builder, number = self.builders[-1], len(self.builders) - 1
        offset = builder.append_joined(records, lengths, keys)
        places = []
        for length, key in zip(lengths, keys, strict=True):
            self.note(number, offset, key)
            places.append(Place(builder.name, offset))
            offset += length
        return places

    def note(self, number: int, offset: int, key: bytes) -> None:
        """Remember a record of builder `number`; one integer each, for millions of them."""
        packed = number << _OFFSET_BITS | offset
        if self._first.setdefault(key, packed) != packed:
            self._others.setdefault(key, []).append(packed)

    def places(self, key: bytes) -> list[Place]:
        first = self._first.get(key)
        if first is None:
            return []
        return [self._place(packed) for packed in (first, *self._others.get(key, ()))]

    def _place(self, packed: int) -> Place:
        builder = self.builders[packed >> _OFFSET_BITS]
        return Place(builder.name, packed & (1 << _OFFSET_BITS) - 1)

    def load(self, place: Place) -> Record:
        builder = next(b for b in self.builders if b.name == place.pack)
        return builder.read(place.offset)

    def first_places(self, keys: Sequence[bytes]) -> dict[bytes, Place]:
        first = self._first
        return {key: self._place(first[key]) for key in keys if key in first}

    def load_many(self, places: Iterable[Place]) -> dict[Place, Record]:
        names = {builder.name for builder in self.builders}
        return {place: self.load(place) for place in places if place.pack in names}

    def has_key(self, key: bytes) -> bool:
        return key in self._first

    def keys(self) -> set[bytes]:
        return set(self._first)

    def forget(self) -> None:
        """Drop everything; the files are somebody else's now."""
        self.builders.clear()
        self._first.clear()
        self._others.clear()


class PackWriter:
    """Context manager: what is not sealed is gone when it ends. A PageReader and PageWriter.

    For one thread, but for `prepare`. Objects can be read back through the writer before they are
    sealed.
    """

    def __init__(self, store: "ObjectStore") -> None:
        self._store = store
        self._built = BuiltPacks()
        self._reader = ObjectReader([self._built, store.sealed], store.cache, store.lock)
        self._sealed = ObjectReader([store.sealed], store.cache, store.lock)
        self._is_first = not store.packs()
        self._pages = PageIndex()
        self._known: dict[ObjectId, None] = {}
        self.bytes_written = 0
        self.records_written = 0
        sweep_temporary_files(store.sealed.directory)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()

    # --- putting ------------------------------------------------------------------------------

    def put(
        self, kind: Kind, data: bytes, *, base: ObjectId | None = None, similar: bool = False
    ) -> ObjectId:
        """Store an object unless it is here already; returns its id.

        `base` is the object it replaces: a hint, which may be missing; commits take none.
        `similar` (chunks) allows pages of chunks that this writer saw replaced as prefix. Not
        durable before `seal`.

        Raises:
            BadObject: larger than its kind may be.
            StorageFull, StorageFailed: nothing is sealed; the writer is of no more use.
        """
        if len(data) > RAW_BYTES_MAX[kind]:
            raise BadObject(f"{kind.name.lower()} of {len(data)} bytes is too large")
        oid = object_id(kind, data)
        if self._has(kind, oid):
            return oid
        replaced = None
        if base is not None and kind in (Kind.CHUNK, Kind.PAGE):
            replaced = self._find_base(kind, base)
        form, frame = None, None
        if replaced is not None:
            form, frame = _delta(kind, NewChunk(oid, data, base), replaced)
        if form is not None:
            self._put_new(form)
        else:
            record = plain_record(kind, data, frame if frame is not None else compress(data))
            may_look = similar and kind is Kind.CHUNK and len(data) >= _SIMILAR_BYTES_MIN
            self._put_new(PreparedChunk(oid, record, data if may_look else b""))
        return oid

    def write_page(self, data: bytes, base: ObjectId | None) -> ObjectId:
        return self.put(Kind.PAGE, data, base=base)

    def prepare(self, chunks: Sequence[NewChunk], *, similar: bool) -> list[PreparedChunk]:
        """The forms of those chunks that are not in sealed packs, in order; stores nothing.

        May be called on any thread, also while others prepare or one puts. The chunks' bytes may
        change once it returns. `similar` as in `put`.
        """
        with stage("encode"):
            return self._prepared(self._not_sealed(chunks), similar=similar)

    def put_prepared(self, chunks: Sequence[PreparedChunk]) -> None:
        """Store prepared chunks, each unless it is here already. Raises as `put`."""
        with stage("write"):
            for chunk in chunks:
                if chunk.id in self._known:
                    continue
                if self._built.has_key(short_key(chunk.id)) and self._has(Kind.CHUNK, chunk.id):
                    continue
                self._put_new(chunk)

    # --- reading back -------------------------------------------------------------------------

    def read(self, kind: Kind, oid: ObjectId) -> bytes:
        """As ObjectStore.read, of what was put here too."""
        found = self._reader.find(kind, oid)
        return found.data if found is not None else self._store.read(kind, oid)

    def read_page(self, page: ObjectId) -> bytes:
        return self.read(Kind.PAGE, page)

    def read_chunk(self, oid: ObjectId) -> bytes:
        return self.read(Kind.CHUNK, oid)

    def has(self, kind: Kind, oid: ObjectId) -> bool:
        return oid in self._known or self._has(kind, oid)

    # --- ending -------------------------------------------------------------------------------

    def seal(self) -> tuple[PackInfo, ...]:
        """Make everything put so far durable and readable; empty when nothing was new.

        Usually one pack, more beyond PACK_BYTES_MAX. The writer is empty afterwards.
        """
        sealed = self._store.publish(self._built.builders)
        self._built.forget()
        return sealed

    def abort(self) -> None:
        """Throw away what is not sealed."""
        for builder in self._built.builders:
            builder.discard()
        self._built.forget()

    # --- choosing a form ----------------------------------------------------------------------

    def _has(self, kind: Kind, oid: ObjectId) -> bool:
        if oid in self._known:
            return True
        try:
            return self._reader.find(kind, oid) is not None
        except Corruption:
            return False  # storing it again repairs it

    def _remember(self, oid: ObjectId) -> None:
        self._known[oid] = None
        if len(self._known) > _IDS_REMEMBERED:
            del self._known[next(iter(self._known))]

    def _find_base(self, kind: Kind, base: ObjectId) -> Decoded | None:
        try:
            return self._reader.find(kind, base)
        except Corruption:
            return None  # a damaged base only costs a full frame; fsck reports it

    def _not_sealed(self, chunks: Sequence[NewChunk]) -> Sequence[NewChunk]:
        if self._is_first or not chunks:
            return chunks
        keys = self._sealed.first_places([short_key(chunk.id) for chunk in chunks])
        if not keys:
            return chunks
        return [c for c in chunks if short_key(c.id) not in keys or not self._is_sealed(c.id)]

    def _is_sealed(self, oid: ObjectId) -> bool:
        try:
            return self._sealed.find(Kind.CHUNK, oid) is not None
        except Corruption:
            return False

    def _prepared(self, chunks: Sequence[NewChunk], *, similar: bool) -> list[PreparedChunk]:
        forms: dict[ObjectId, PreparedChunk] = {}
        frames: dict[ObjectId, bytes] = {}
        based = [chunk for chunk in chunks if chunk.base is not None]
        probes, others = _probes_and_others(based)
        self._try_deltas(probes, forms, frames)
        if others and any(probe.id in forms for probe in probes):
            self._try_deltas(others, forms, frames)
        alone = [c for c in chunks if c.id not in forms and c.id not in frames and len(c.data)]
        frames.update(
            zip([c.id for c in alone], compress_all([c.data for c in alone]), strict=True)
        )
        for chunk in chunks:
            if chunk.id not in forms:
                record = plain_record(Kind.CHUNK, chunk.data, frames.get(chunk.id, b""))
                may_look = similar and len(chunk.data) >= _SIMILAR_BYTES_MIN
                forms[chunk.id] = PreparedChunk(
                    chunk.id, record, bytes(chunk.data) if may_look else b""
                )
        return [forms[chunk.id] for chunk in chunks]

    def _try_deltas(
        self,
        chunks: Sequence[NewChunk],
        forms: dict[ObjectId, PreparedChunk],
        frames: dict[ObjectId, bytes],
    ) -> None:
        """Note the forms of chunks that are best stored on what they replace, and the full frames
        that were made on the way."""
        replaced = self._replaced([chunk.base for chunk in chunks if chunk.base is not None])
        for chunk, old in zip(chunks, replaced, strict=True):
            if old is None:
                continue
            form, frame = _delta(Kind.CHUNK, chunk, old)
            if form is not None:
                forms[chunk.id] = form
            elif frame is not None:
                frames[chunk.id] = frame

    def _replaced(self, bases: Sequence[ObjectId]) -> Iterator[Decoded | None]:
        """What the bases hold; None for one that is not there or cannot be read."""
        found = self._sealed.find_many(Kind.CHUNK, bases, earlier=True)
        for _ in bases:
            try:
                yield next(found)
            except Corruption:
                yield None  # as in _find_base

    def _put_new(self, chunk: PreparedChunk) -> None:
        self._remember(chunk.id)
        if chunk.replaced is not None:
            self._note_replaced(chunk.replaced)
        elif chunk.data and self._put_similar(chunk):
            return
        self._append(chunk.record, chunk.id)

    def _note_replaced(self, replaced: Replaced) -> None:
        """Make pages that a patch replaces known to the similarity search."""
        if self._pages.is_full:
            return
        ratio = SIMILAR_PAGE_BYTES // PATCH_PAGE_BYTES
        key, old = short_key(replaced.id), replaced.decoded
        for page in sorted({number // ratio for number in replaced.pages}):
            self._pages.add(key, old.steps, old.data, page)

    def _put_similar(self, chunk: PreparedChunk) -> bool:
        """Store a chunk with similar pages as prefix if that is smaller than alone."""
        if not len(self._pages):
            return False
        pages = self._pages.similar(chunk.data, steps_max=STEPS_MAX - 1)
        if not pages:
            return False
        prefix = b"".join([page.content for page in pages])
        bases = tuple(page.base for page in pages)
        frame = compress_with_prefix(chunk.data, prefix)
        if len(frame) + 10 * len(bases) >= len(chunk.record.payload):
            return False
        similar = Record(Kind.CHUNK, Encoding.SIMILAR, len(chunk.data), frame, bases)
        self._append(similar, chunk.id)
        return True

    def _append(self, record: Record, oid: ObjectId) -> None:
        builders = self._built.builders
        if not builders or builders[-1].size >= PACK_BYTES_MAX:
            directory = self._store.sealed.directory
            dot_id = self._store.dot_id
            builders.append(PackBuilder.create(directory, TEMPORARY_PREFIX, "", dot_id))
        encoded = encode_record(record)
        self._built.append(encoded, short_key(oid))
        self.bytes_written += len(encoded)
        self.records_written += 1


def _probes_and_others(
    chunks: Sequence[NewChunk],
) -> tuple[Sequence[NewChunk], Sequence[NewChunk]]:
    """Chunks to try first, and those to try only if what one of the first replaces helps."""
    if len(chunks) < _PROBED_CHUNKS_MIN:
        return chunks, ()
    probes = chunks[len(chunks) // 4 :: len(chunks) // 2]
    return probes, [chunk for chunk in chunks if chunk not in probes]


def plain_record(kind: Kind, data: bytes | memoryview, frame: bytes) -> Record:
    if len(frame) >= len(data):
        return Record(kind, Encoding.RAW, len(data), bytes(data))
    return Record(kind, Encoding.ZSTD, len(data), frame)


def _delta(
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
    form = PreparedChunk(new.id, record, b"", Replaced(base, replaced, pages))
    if len(record.payload) <= len(data) // _SURELY_GOOD:
        return form, None
    frame = compress(data)
    share = _GOOD_DELTA if kind is Kind.CHUNK else 0.9
    if len(record.payload) > share * min(len(frame), len(data)):
        return None, frame
    return form, None


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


def sweep_temporary_files(directory: str) -> None:
    """Remove what killed writers left; files whose writer lives are locked and stay."""
    with storage_errors(f"sweeping {directory}"):
        for name in os.listdir(directory):
            if name.startswith(TEMPORARY_PREFIX):
                _remove_unlocked(os.path.join(directory, name))


def _remove_unlocked(path: str) -> None:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return  # its writer just sealed or discarded it
    try:
        if lock_exclusively(fd, wait=False):
            # Rename keeps the lock: whoever gets it while the name is still there is first.
            remove_if_there(path)
    finally:
        os.close(fd)
