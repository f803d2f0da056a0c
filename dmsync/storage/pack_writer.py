"""Writing one pack: new objects, each stored in the smallest form that stays cheap to read.

Memory is bounded: objects without a good base wait in a batch of a few MiB, so that two threads
compress them at once; pages for the similarity search are limited by core.similarity.
"""

import os
from typing import TYPE_CHECKING, Final, Self

from dmsync.core.delta import (
    PATCH_LEVEL,
    PATCH_PAGE_BYTES,
    changed_pages,
    compress,
    compress_all,
    compress_with_prefix,
    looks_incompressible,
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

if TYPE_CHECKING:
    from dmsync.storage.object_store import ObjectStore

TEMPORARY_PREFIX: Final = "tmp-"
BATCH_BYTES: Final = 8 * 1024 * 1024
"""Enough for two threads to be worth starting, small against the memory of a commit."""
_BATCHED_BYTES_MIN: Final = 4096
PATCHES_PER_FULL: Final = 4
"""A chain is renewed when its patches are stored in more than this many times its full frame."""
RENEWAL_STEPS: Final = (24, 40)
"""A chain is also renewed at a number of steps in this range, spread by the chunk's id so that
chunks that change together are not all renewed in one commit (protocol/decisions/0004)."""
_SURELY_GOOD: Final = 64
"""A delta below 1/64 of the object is taken without comparing it with a plain frame."""
_GOOD_DELTA: Final = 0.5
"""Of the plain frame; a worse one goes on to the similarity search."""
_PREFIX_SHARE: Final = 0.75
"""With more pages changed than this the whole base is a better prefix than the pages."""
_IDS_REMEMBERED: Final = 65_536
_OFFSET_BITS: Final = 40


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

    For one thread. Objects can be read back through the writer before they are sealed.
    """

    def __init__(self, store: "ObjectStore") -> None:
        self._store = store
        self._built = BuiltPacks()
        self._reader = ObjectReader([self._built, store.sealed], store.cache, store.lock)
        self._pages = PageIndex()
        self._batch: list[tuple[bytes, ObjectId]] = []
        self._batch_bytes = 0
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
        self._remember(oid)
        if kind not in (Kind.CHUNK, Kind.PAGE):
            base = None
        replaced = self._find_base(kind, base) if base is not None else None
        if replaced is not None and base is not None:
            record = self._delta(kind, data, base, replaced)
            if record is not None:
                self._append(record, oid)
                return oid
        if kind is not Kind.CHUNK or len(data) < _BATCHED_BYTES_MIN:
            self._append(plain_record(kind, data, compress(data)), oid)
        elif not (similar and self._put_similar(data, oid)):
            self._enqueue(data, oid)
        return oid

    def write_page(self, data: bytes, base: ObjectId | None) -> ObjectId:
        return self.put(Kind.PAGE, data, base=base)

    # --- reading back -------------------------------------------------------------------------

    def read(self, kind: Kind, oid: ObjectId) -> bytes:
        """As ObjectStore.read, of what was put here too."""
        if oid in self._known:
            self._flush_batch()
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
        self._flush_batch()
        sealed = self._store.publish(self._built.builders)
        self._built.forget()
        return sealed

    def abort(self) -> None:
        """Throw away what is not sealed."""
        self._batch.clear()
        self._batch_bytes = 0
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

    def _delta(self, kind: Kind, data: bytes, base: ObjectId, replaced: Decoded) -> Record | None:
        """A record on the replaced object, None when a full frame or another base is better."""
        if (
            replaced.steps >= _renewal_steps(base)
            or replaced.patch_bytes > PATCHES_PER_FULL * replaced.full_bytes
        ):
            return None
        record = _patch_or_prefix(kind, data, short_key(base), replaced.data)
        if len(record.payload) > len(data) // _SURELY_GOOD:
            share = _GOOD_DELTA if kind is Kind.CHUNK else 0.9
            if len(record.payload) > share * min(len(compress(data)), len(data)):
                return None
        if record.encoding is Encoding.PATCH and not self._pages.is_full:
            for page in changed_pages(replaced.data, data, SIMILAR_PAGE_BYTES):
                self._pages.add(short_key(base), replaced.steps, replaced.data, page)
        return record

    def _put_similar(self, data: bytes, oid: ObjectId) -> bool:
        """Store a chunk with similar pages as prefix if that is smaller than alone."""
        if not len(self._pages):
            return False
        pages = self._pages.similar(data, steps_max=STEPS_MAX - 1)
        if not pages:
            return False
        prefix = b"".join([page.content for page in pages])
        bases = tuple(page.base for page in pages)
        frame = compress_with_prefix(data, prefix, PATCH_LEVEL)
        plain = plain_record(Kind.CHUNK, data, compress(data))
        if len(frame) + 10 * len(bases) >= len(plain.payload):
            self._append(plain, oid)
        else:
            self._append(Record(Kind.CHUNK, Encoding.SIMILAR, len(data), frame, bases), oid)
        return True

    def _enqueue(self, data: bytes, oid: ObjectId) -> None:
        if looks_incompressible(data):
            self._append(Record(Kind.CHUNK, Encoding.RAW, len(data), data), oid)
            return
        self._batch.append((data, oid))
        self._batch_bytes += len(data)
        if self._batch_bytes >= BATCH_BYTES:
            self._flush_batch()

    def _flush_batch(self) -> None:
        if not self._batch:
            return
        batch, self._batch, self._batch_bytes = self._batch, [], 0
        frames = compress_all([data for data, _ in batch])
        for (data, oid), frame in zip(batch, frames, strict=True):
            self._append(plain_record(Kind.CHUNK, data, frame), oid)

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


def plain_record(kind: Kind, data: bytes, frame: bytes) -> Record:
    if len(frame) >= len(data):
        return Record(kind, Encoding.RAW, len(data), data)
    return Record(kind, Encoding.ZSTD, len(data), frame)


def _renewal_steps(base: ObjectId) -> int:
    fewest, most = RENEWAL_STEPS
    return fewest + base[-1] % (most - fewest)


def _patch_or_prefix(kind: Kind, data: bytes, key: bytes, old: bytes) -> Record:
    if kind is Kind.CHUNK and len(old) == len(data):
        pages = changed_pages(old, data)
        if len(pages) * PATCH_PAGE_BYTES <= _PREFIX_SHARE * len(data):
            replaced = select_pages(old, pages)
            frame = compress_with_prefix(select_pages(data, pages), replaced, PATCH_LEVEL)
            changed = pages_bitmap(pages)
            base = (BaseSlice(key),)
            return Record(kind, Encoding.PATCH, len(data), frame, base, changed)
    frame = compress_with_prefix(data, old)
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
