"""One dot's objects: sealed packs, their index, and reading with verification.

Everything read is hashed and compared with the id asked for. Writing goes through `writer()`,
incoming data through storage.quarantine. Source: protocol/PACKS.md.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import tee
from threading import RLock
from typing import TYPE_CHECKING, Self

from dmsync.core.ids import DOT_ID_BYTES, Kind, ObjectId, object_id, short_key
from dmsync.core.records import Record, decode_record
from dmsync.errors import (
    BadObject,
    ContentAbsent,
    Corruption,
    FormatUnsupported,
    ObjectMissing,
    StorageFailed,
    StorageFull,
)
from dmsync.storage.durable import fsync_directory, make_directory_durable, storage_errors
from dmsync.storage.holds import Hold
from dmsync.storage.object_reading import Decoded, DecodedCache, ObjectReader
from dmsync.storage.pack_consolidation import consolidate
from dmsync.storage.pack_files import PackFiles
from dmsync.storage.pack_index import PackIndex
from dmsync.storage.packs import (
    HEADER_BYTES,
    PACK_SUFFIX,
    Footer,
    PackBuilder,
    PackInfo,
    Place,
    check_header,
    iterate_file_records,
    pack_hash_matches,
    read_footer,
    read_record,
)
from dmsync.storage.stored_records import find_records

if TYPE_CHECKING:
    from dmsync.storage.pack_writer import PackWriter


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong in a pack; offset and key are None when it is the file as a whole."""

    pack: str
    offset: int | None
    key: bytes | None
    message: str


Checked = Callable[[str, int], object]
"""Told a pack's name and how many of its bytes are checked."""


def _tell_nobody(pack: str, checked_bytes: int) -> None:
    pass


class SealedPacks:
    """The sealed packs of a dot as a RecordSource."""

    def __init__(self, dot_dir: str) -> None:
        self.directory = os.path.join(dot_dir, "packs")
        self.index = PackIndex(dot_dir)
        self._files = PackFiles(self.directory)

    def places(self, key: bytes) -> list[Place]:
        return self.index.places(key)

    def load(self, place: Place) -> Record:
        return read_record(*self._file_of(place))

    def _file_of(self, place: Place) -> tuple[int, Place]:
        """The file that holds a record, and its place there: as named, or where it has gone since
        its pack was joined with others. Raises Corruption when it is gone."""
        while True:
            try:
                return self.file(place.pack), place
            except Corruption:
                moved = self.index.current_place(place)
                if moved is None:
                    raise
                place = moved

    def first_places(self, keys: Sequence[bytes]) -> dict[bytes, Place]:
        return self.index.first_places(keys)

    def load_many(self, places: Iterable[Place]) -> dict[Place, Record]:
        """As `load`, of many; what cannot be read is left out."""
        return self._files.load_many(places)

    def file(self, name: str) -> int:
        """A descriptor for reading, valid until the next call. Raises Corruption when gone."""
        return self._files.opened(name).fd

    def forget_files(self) -> None:
        """Files of this directory were moved: what is open is opened anew."""
        self._files.close()

    def close_files(self) -> None:
        """A file that was removed takes its room as long as somebody has it open."""
        self._files.close()

    def close(self) -> None:
        self._files.close()
        self.index.close()


class ObjectStore:
    """The objects of the dot whose directory is `dot_dir`, named by the dot's id in hex.

    Safe to use from several threads. A PageReader.
    """

    def __init__(self, dot_dir: str, lock_wait_s: float = 10.0) -> None:
        """`lock_wait_s`: how long to wait for a sweep to end where the dot has to be held."""
        self.dot_dir = os.fspath(dot_dir)
        self.dot_id = _dot_id_of(self.dot_dir)
        self.lock = RLock()
        self.cache = DecodedCache()
        make_directory_durable(os.path.join(self.dot_dir, "packs"))
        self.sealed = SealedPacks(self.dot_dir)
        self.hold = Hold(self.dot_dir, wait_s=lock_wait_s)
        self.hold.renew = self._renew
        self.hold.rest = self._rest
        self.is_partial: Callable[[], bool] = lambda: False
        """Asked when a page or chunk is missing: is that no damage, since only some subdots are
        kept here?"""
        self._reader = ObjectReader([self.sealed], self.cache, self.lock)
        self._index_is_verified = False

    # --- reading ------------------------------------------------------------------------------

    def read(self, kind: Kind, oid: ObjectId) -> bytes:
        """The object's bytes, verified.

        Raises:
            ObjectMissing: not in this dot. HashMismatch, Corruption: damaged; names the pack.
        """
        try:
            found = self._reader.find(kind, oid)
            if found is None and self._another_process_sealed():
                found = self._reader.find(kind, oid)
        except Corruption:
            if not self._rebuilt_wrong_index(kind):
                raise
            found = self._reader.find(kind, oid)
        if found is None and self._rebuilt_wrong_index(kind):
            found = self._reader.find(kind, oid)
        if found is None:
            raise self.missing(kind, oid)
        return found.data

    def read_many(self, kind: Kind, ids: Iterable[ObjectId]) -> Iterator[bytes]:
        """What `read` gives for each id, in order, with bounded memory and many at once.

        Raises, when the turn of an object comes that cannot be read, what `read` would.
        """
        wanted, asked = tee(ids)
        found_in_turn = iter(self._reader.find_many(kind, wanted))
        for oid in asked:
            try:
                found = next(found_in_turn)
            except Corruption:
                found = None  # told once more below, or healed
            yield found.data if found is not None else self.read(kind, oid)

    def read_chunk(self, oid: ObjectId) -> bytes:
        return self.read(Kind.CHUNK, oid)

    def read_page(self, page: ObjectId) -> bytes:
        return self.read(Kind.PAGE, page)

    def read_commit(self, oid: ObjectId) -> bytes:
        return self.read(Kind.COMMIT, oid)

    def has(self, kind: Kind, oid: ObjectId) -> bool:
        """True when the object is here and sound; a damaged one counts as absent."""
        try:
            return self._reader.find(kind, oid) is not None
        except Corruption:
            return False

    def has_key(self, key: bytes) -> bool:
        """True when something has this short key; says nothing about what it is."""
        with self.lock:
            return self.sealed.index.has_key(key)

    def stored_record(self, kind: Kind, oid: ObjectId) -> Record:
        """The record as stored, after verifying that it is the object. Raises as `read`."""
        record = self._reader.find_record(kind, oid)
        if record is None and self._another_process_sealed():
            record = self._reader.find_record(kind, oid)
        if record is None:
            raise self.missing(kind, oid)
        return record

    def stored_records(self, kind: Kind, ids: Iterable[ObjectId]) -> Iterator[Record]:
        """What `stored_record` gives for each id, in order, many at once in bounded memory."""
        wanted, asked = tee(ids)
        for oid, record in zip(asked, find_records(self._reader, kind, wanted), strict=True):
            yield record if record is not None else self.stored_record(kind, oid)

    def unverified_records(self, ids: Sequence[ObjectId]) -> dict[ObjectId, Record]:
        """What is probably the stored form of some objects, for planning: nothing is decoded, and
        what cannot be read is left out."""
        places = self._reader.first_places([short_key(oid) for oid in ids])
        records = self._reader.load_many(list(places.values()))
        found = ((oid, places.get(short_key(oid))) for oid in ids)
        return {oid: records[place] for oid, place in found if place in records}

    def missing(self, kind: Kind, oid: ObjectId) -> ObjectMissing | ContentAbsent:
        """The error for an object that is nowhere; names damaged packs that may have had it."""
        damaged = sorted(self.sealed.index.unreadable)
        if kind in (Kind.PAGE, Kind.CHUNK) and not damaged and self.is_partial():
            return ContentAbsent(
                f"{kind.name.lower()} {oid.hex()[:12]} is not here: only some subdots of this dot "
                "are kept here",
                hint="dm dot show lists them; clone the whole dot for the others",
                id=oid.hex(),
            )
        return ObjectMissing(
            f"{kind.name.lower()} {oid.hex()[:12]} is not in this dot"
            + (f"; damaged: {', '.join(damaged)}" if damaged else ""),
            id=oid.hex(),
            kind=kind.name,
            damaged_packs=damaged,
        )

    def _rebuilt_wrong_index(self, kind: Kind) -> bool:
        """Before an object is called lost: was it the index that was harmed? Looks once; where
        content is not here for good reason nobody looks. Records of commits are always here, and
        who asks for one may be the catalog, opening, which cannot say yet what is kept."""
        is_content = kind in (Kind.PAGE, Kind.CHUNK)
        if self._index_is_verified or (is_content and self.is_partial()):
            return False
        self._index_is_verified = True
        with self.lock:
            if self.sealed.index.agrees_with_packs():
                return False
            self.sealed.index.rebuild()
        return True

    def _another_process_sealed(self) -> bool:
        """Look for packs that a killed process sealed and did not index."""
        with self.lock:
            before = self.sealed.index.packs()
            self.sealed.index.catch_up()
            return self.sealed.index.packs() != before

    # --- writing ------------------------------------------------------------------------------

    def writer(self) -> "PackWriter":
        """A writer of new packs; several may write at once. Raises Busy: gc is sweeping."""
        from dmsync.storage.pack_writer import PackWriter  # the writer reads through a store

        self.hold.require()
        return PackWriter(self)

    def publish(self, builders: list[PackBuilder]) -> tuple[PackInfo, ...]:
        """Seal packs under construction and index them; durable on return.

        A kill before a rename leaves a temporary file, one after it a sealed pack that the next
        open indexes.
        """
        sealed: list[tuple[PackInfo, Footer]] = []
        for builder in builders:
            info = builder.finish()
            with self.lock:
                self.sealed.index.name_file(builder.path, info.name)
            sealed.append((info, builder.footer()))
            builder.close()
        if sealed:
            fsync_directory(self.sealed.directory)
            with self.lock:
                self.sealed.index.add(sealed)
                consolidate(self.sealed.index, self.sealed.directory, self.dot_id)
        return tuple(info for info, _ in sealed)

    # --- sweeping -------------------------------------------------------------------------------

    def decode_at(self, place: Place, record: Record) -> Decoded:
        """What the record at a place gives, unverified. Raises Corruption."""
        return self._reader.decode_at(place, record)

    def content_of_key(self, kind: Kind, key: bytes) -> Decoded:
        """What has this short key. Raises ObjectMissing, Corruption."""
        return self._reader.content_of_key(kind, key)

    def sound_copies(self, key: bytes) -> list[tuple[Place, Record]]:
        """Of the records that give the same object of this short key, places and forms; of several
        objects (short keys may collide) none."""
        found: dict[tuple[Kind, ObjectId], list[tuple[Place, Record]]] = {}
        with self.lock:
            places = self.sealed.places(key)
        for place in sorted(places):
            try:
                with self.lock:
                    record = self.sealed.load(place)
                # what stands alone is judged by what lies there now, not by what was read before
                alone = not record.bases
                data = decode_record(record, ()) if alone else self.decode_at(place, record).data
            except (BadObject, Corruption):
                continue
            oid = object_id(record.kind, data)
            if short_key(oid) == key:
                found.setdefault((record.kind, oid), []).append((place, record))
        return next(iter(found.values())) if len(found) == 1 else []

    def sweep(self, sealed: list[tuple[PackInfo, Footer]], gone: Sequence[str]) -> None:
        """Take in new packs and let others go: out of the index first, durably, then from the
        disk. The caller holds the dot alone.

        Raises:
            StorageFull, StorageFailed: what was to go may be there still, or again.
        """
        with self.lock:
            index = self.sealed.index
            self.sealed.close_files()
            try:
                index.sweep(sealed, gone)
            except StorageFull:
                # there is always room for no index: it is built again once something is free
                index.sweep_without_room(gone)
            else:
                index.remove_swept_files(gone)
            index.renew()

    # --- the whole ----------------------------------------------------------------------------

    def packs(self) -> list[PackInfo]:
        with self.lock:
            return self.sealed.index.packs()

    def stored_bytes(self) -> int:
        """Bytes of all sealed packs."""
        return sum(pack.bytes for pack in self.packs())

    def check(self, *, full: bool, checked: Checked = _tell_nobody) -> Iterator[Problem]:
        """Problems found, pack by pack; none when all is sound.

        Quick: sizes, header, trailer and table of each pack, and that the index agrees. Full: also
        each file's hash, and each record decoded and compared with its key. `checked` is called
        with a pack's name and how many of its bytes are done.
        """
        indexed = {pack.name for pack in self.packs()}  # first: what is sealed is indexed last
        with self.lock:
            contradictions = self.sealed.index.contradictions() if full else []
        for contradiction in contradictions:
            yield Problem("index.sqlite", None, b"", contradiction)
        with storage_errors(f"listing {self.sealed.directory}"):
            names = sorted(
                name for name in os.listdir(self.sealed.directory) if name.endswith(PACK_SUFFIX)
            )
        for name in sorted(indexed - set(names)):
            if not self._was_joined(name):
                yield Problem(name, None, None, "the file is missing")
        with self.lock:
            leftovers = self.sealed.index.replaced()
            lost = self.sealed.index.lost_packs()
        for name in lost:
            yield Problem(name, None, None, "the file was lost")
        for name in names:
            if name not in leftovers:
                yield from self._check_pack(name, checked, full=full)

    def _was_joined(self, name: str) -> bool:
        """Whether the pack's records are in another one by now."""
        with self.lock:
            return self.sealed.index.current_place(Place(name, HEADER_BYTES)) is not None

    def _check_pack(self, name: str, checked: Checked, *, full: bool) -> Iterator[Problem]:
        try:
            with self.lock:
                fd = os.dup(self.sealed.file(name))
        except (Corruption, StorageFailed) as exc:
            if not self._was_joined(name):
                yield Problem(name, None, None, exc.message)
            return
        try:
            try:
                footer, _ = read_footer(fd, name)
                dot_id = check_header(os.pread(fd, HEADER_BYTES, 0), name)
            except (Corruption, FormatUnsupported) as exc:
                yield Problem(name, None, None, exc.message)
                return
            if dot_id != self.dot_id:
                yield Problem(name, None, None, "it belongs to another dot")
            yield from self._check_index(name, footer)
            if full:
                if not pack_hash_matches(fd, name):
                    yield Problem(name, None, None, "its hash is not the one it states")
                yield from self._check_records(name, fd, footer, checked)
            checked(name, footer.records_end)
        except OSError as exc:
            yield Problem(name, None, None, f"it cannot be read: {exc.strerror or exc}")
        finally:
            os.close(fd)

    def _check_index(self, name: str, footer: Footer) -> Iterator[Problem]:
        with self.lock:
            indexed = self.sealed.index.places_in(name)
        for key, offset in zip(footer.keys, footer.offsets, strict=True):
            if (key, offset) not in indexed:
                yield Problem(name, offset, key, "the index does not have it")
                return

    def _check_records(
        self, name: str, fd: int, footer: Footer, checked: Checked
    ) -> Iterator[Problem]:
        place = Place(name, HEADER_BYTES)
        expected = dict(zip(footer.offsets, footer.keys, strict=True))
        try:
            for record, start, _ in iterate_file_records(fd, HEADER_BYTES, footer.records_end):
                place = Place(name, start)
                checked(name, start)
                key = expected.pop(start, None)
                if key is None:
                    yield Problem(name, start, None, "a record that the table does not have")
                    continue
                problem = self._check_record(place, record, key)
                if problem:
                    yield problem
        except BadObject as exc:
            yield Problem(name, place.offset, None, f"unreadable record behind: {exc.message}")
            return
        for offset, key in expected.items():
            yield Problem(name, offset, key, "the table names a record that is not there")

    def _check_record(self, place: Place, record: Record, key: bytes) -> Problem | None:
        try:
            decoded = self._reader.decode_at(place, record)
        except Corruption as exc:
            return Problem(place.pack, place.offset, key, exc.message)
        if short_key(object_id(record.kind, decoded.data)) != key:
            if self._reader.readable_otherwise(place, record, key):
                return None
            return Problem(place.pack, place.offset, key, "its hash is not its id")
        return None

    def _rest(self) -> None:
        with self.lock:
            self.sealed.close_files()

    def _renew(self) -> None:
        """Know of no pack that a sweep has removed."""
        with self.lock:
            self.sealed.index.renew()

    def close(self) -> None:
        self.hold.close()
        with self.lock:
            self.sealed.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _dot_id_of(dot_dir: str) -> bytes:
    """The dot's id from its directory's name; zeros for a directory that is not in a store."""
    try:
        dot_id = bytes.fromhex(os.path.basename(os.path.normpath(dot_dir)))
    except ValueError:
        return bytes(DOT_ID_BYTES)
    return dot_id if len(dot_id) == DOT_ID_BYTES else bytes(DOT_ID_BYTES)
