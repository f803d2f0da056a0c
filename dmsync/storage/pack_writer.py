"""Writing one pack: new objects, each stored in the smallest form that stays cheap to read.

Choosing a form is the costly part. Chunks go through it many at once and on any thread
(`prepare`); one thread then puts the results in order, so that the same objects give the same pack
whatever the threads did. Pages for the similarity search are limited by core.similarity.
"""

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final, Self

from dmsync.core.delta import compress, compress_with_prefix
from dmsync.core.ids import KEY_BYTES, Kind, ObjectId, object_id, short_key
from dmsync.core.records import (
    RAW_BYTES_MAX,
    STEPS_MAX,
    Encoding,
    Record,
    encode_record,
)
from dmsync.core.similarity import PageIndex
from dmsync.errors import BadObject, Corruption
from dmsync.storage.chunk_forms import (
    SIMILAR_BYTES_MIN,
    ChunkForms,
    NewChunk,
    PreparedChunk,
    Replaced,
    delta_form,
    plain_record,
    prepared,
)
from dmsync.storage.durable import lock_exclusively, remove_if_there, storage_errors
from dmsync.storage.object_reading import Decoded, ObjectReader
from dmsync.storage.pack_consolidation import TEMPORARY_PREFIX
from dmsync.storage.packs import PACK_BYTES_MAX, PackBuilder, PackInfo, Place
from dmsync.storage.stages import stage

if TYPE_CHECKING:
    from dmsync.storage.object_store import ObjectStore

_DELTA_KINDS: Final = (Kind.CHUNK, Kind.PAGE)
_IDS_REMEMBERED: Final = 65_536
_OFFSET_BITS: Final = 40
_START_BYTES: Final = 2
_REST_BYTES: Final = KEY_BYTES - _START_BYTES
_NOTE_BYTES: Final = _REST_BYTES + 8


class BuiltPacks:
    """Packs under construction as a RecordSource; records go to the last one."""

    def __init__(self) -> None:
        self.builders: list[PackBuilder] = []
        self._noted: dict[bytes, bytes] = {}
        """Start of a key to the notes of its records: the rest of the key, builder and offset. A
        third of the memory of an entry for each key, of which there may be millions."""

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
        """Remember a record of builder `number`."""
        start = key[:_START_BYTES]
        note = key[_START_BYTES:] + (number << _OFFSET_BITS | offset).to_bytes(8, "big")
        self._noted[start] = self._noted.get(start, b"") + note

    def places(self, key: bytes) -> list[Place]:
        notes, rest = self._noted.get(key[:_START_BYTES], b""), key[_START_BYTES:]
        places = []
        at = _note_at(notes, rest, 0)
        while at >= 0:  # several for a collision, or one object stored twice
            places.append(self._place(notes, at))
            at = _note_at(notes, rest, at + _NOTE_BYTES)
        return places

    def _place(self, notes: bytes, at: int) -> Place:
        packed = int.from_bytes(notes[at + _REST_BYTES : at + _NOTE_BYTES], "big")
        builder = self.builders[packed >> _OFFSET_BITS]
        return Place(builder.name, packed & (1 << _OFFSET_BITS) - 1)

    def load(self, place: Place) -> Record:
        builder = next(b for b in self.builders if b.name == place.pack)
        return builder.read(place.offset)

    def first_places(self, keys: Sequence[bytes]) -> dict[bytes, Place]:
        found = {}
        for key in keys:
            notes = self._noted.get(key[:_START_BYTES], b"")
            at = _note_at(notes, key[_START_BYTES:], 0)
            if at >= 0:
                found[key] = self._place(notes, at)
        return found

    def load_many(self, places: Iterable[Place]) -> dict[Place, Record]:
        names = {builder.name for builder in self.builders}
        return {place: self.load(place) for place in places if place.pack in names}

    def has_key(self, key: bytes) -> bool:
        notes = self._noted.get(key[:_START_BYTES], b"")
        return _note_at(notes, key[_START_BYTES:], 0) >= 0

    def forget(self) -> None:
        """Drop everything; the files are somebody else's now."""
        self.builders.clear()
        self._noted.clear()


def _note_at(notes: bytes, rest: bytes, start: int) -> int:
    """Where the next note of the key that ends with `rest` is; -1: there is none."""
    at = notes.find(rest, start)
    while at % _NOTE_BYTES and at >= 0:  # found across two notes
        at = notes.find(rest, at + 1)
    return at


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
        self._forms = ChunkForms(self._sealed, is_empty=self._is_first)
        self._pages = PageIndex()
        self._known: dict[ObjectId, None] = {}
        self.bytes_written = 0
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
        form, frame = None, None
        old = self._find_base(kind, base) if base is not None and kind in _DELTA_KINDS else None
        if old is not None:
            form, frame = delta_form(kind, NewChunk(oid, data, base), old)
        if form is None:
            record = plain_record(kind, data, frame if frame is not None else compress(data))
            may_look = similar and kind is Kind.CHUNK and len(data) >= SIMILAR_BYTES_MIN
            form = prepared(oid, record, data if may_look else b"")
        self._put_new(form)
        return oid

    def write_page(self, data: bytes, base: ObjectId | None) -> ObjectId:
        return self.put(Kind.PAGE, data, base=base)

    def prepare(self, runs: Sequence[Sequence[NewChunk]], *, similar: bool) -> list[PreparedChunk]:
        """The forms of those chunks that are not in sealed packs, in order; stores nothing.

        May be called on any thread, also while others prepare or one puts. As ChunkForms.prepare.
        """
        return self._forms.prepare(runs, similar=similar)

    @property
    def dot_dir(self) -> str:
        """The store's, for processes that prepare chunks themselves."""
        return self._store.dot_dir

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
        if self._is_first and not self._built.has_key(short_key(oid)):
            return False  # most pages of a first commit
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

    def _put_new(self, chunk: PreparedChunk) -> None:
        self._remember(chunk.id)
        if chunk.replaced is not None:
            self._note_replaced(chunk.replaced)
        elif chunk.data and self._put_similar(chunk):
            return
        self._append(chunk.encoded, chunk.id)

    def _note_replaced(self, replaced: Replaced) -> None:
        """Make pages that a patch replaces known to the similarity search."""
        for page, content in replaced.pages:
            self._pages.add(replaced.key, replaced.steps, page, content)

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
        if len(frame) + 10 * len(bases) >= chunk.payload_bytes:
            return False
        similar = Record(Kind.CHUNK, Encoding.SIMILAR, len(chunk.data), frame, bases)
        self._append(encode_record(similar), chunk.id)
        return True

    def _append(self, encoded: bytes, oid: ObjectId) -> None:
        builders = self._built.builders
        if not builders or builders[-1].size >= PACK_BYTES_MAX:
            directory = self._store.sealed.directory
            dot_id = self._store.dot_id
            builders.append(PackBuilder.create(directory, TEMPORARY_PREFIX, "", dot_id))
        self._built.append(encoded, short_key(oid))
        self.bytes_written += len(encoded)


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
