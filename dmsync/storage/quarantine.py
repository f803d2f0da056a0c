"""Incoming records of one dot, verified one by one, until their closure is complete.

Records from a peer are hostile until decoded and hashed. They are appended to a part file that
has the form of a pack without its end; promotion writes the end and renames it. What a cut
session leaves is adopted, verified again, by the next one. Source: protocol/PACKS.md 7.
"""

import os
from typing import TYPE_CHECKING, Final, Self

from dmsync.core.delta import compress
from dmsync.core.ids import Kind, ObjectId, object_id, short_key
from dmsync.core.objects import commit_from_bytes, tag_from_bytes
from dmsync.core.pages import decode_page
from dmsync.core.records import STEPS_MAX, Record, encode_record, parse_record
from dmsync.errors import BadObject, Corruption, FormatUnsupported, ObjectMissing
from dmsync.storage.durable import (
    fsync_directory,
    lock_exclusively,
    make_directory_durable,
    storage_errors,
)
from dmsync.storage.object_reading import Decoded, ObjectReader
from dmsync.storage.pack_writer import BuiltPacks, plain_record
from dmsync.storage.packs import (
    HEADER_BYTES,
    PACK_BYTES_MAX,
    PackBuilder,
    PackInfo,
    check_header,
    iterate_file_records,
)

if TYPE_CHECKING:
    from dmsync.storage.object_store import ObjectStore

PART_SUFFIX: Final = ".part"


class Quarantine:
    """One receive session. A PageReader over what came in and the store; for one thread at a time.

    Parts are locked while a session has them, so two sessions into one dot never share one.
    """

    def __init__(self, store: "ObjectStore") -> None:
        self._store = store
        self._directory = os.path.join(store.dot_dir, "quarantine")
        make_directory_durable(self._directory)
        self._parts = BuiltPacks()
        self._reader = ObjectReader([self._parts, store.sealed], store.cache, store.lock)
        self._own_part: PackBuilder | None = None
        self._name_is_durable = True
        self.received_ids: set[ObjectId] = set()
        """Full ids of everything verified in this session or adopted by it."""
        adopted = False
        try:
            self._adopt_parts()
            adopted = True
        finally:
            if not adopted:
                self._give_up_parts()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- receiving ----------------------------------------------------------------------------

    def receive(self, record_bytes: bytes | memoryview) -> ObjectId:
        """Verify one record and keep it; returns the id of what it decodes to. Buffered.

        An object that is here already is not stored again. A record whose chain would be longer
        here than reading allows (our bases may be stored otherwise) is kept as a full frame.

        Raises:
            BadObject: not a record, or not of a sound object, or its bases are not here.
            StorageFull, StorageFailed.
        """
        record, end = parse_record(record_bytes)
        if end != len(record_bytes):
            raise BadObject("bytes behind a record")
        oid, decoded = self._verified(record)
        if oid in self.received_ids or self._reader.find(record.kind, oid) is not None:
            return oid
        if decoded.steps > STEPS_MAX:
            record = plain_record(record.kind, decoded.data, compress(decoded.data))
        self._parts_for_append()
        place = self._parts.append(encode_record(record), short_key(oid))
        with self._store.lock:
            self._store.cache.put(place, decoded)
        self.received_ids.add(oid)
        return oid

    def sync(self) -> None:
        """Everything received so far survives a crash when this returns."""
        if self._own_part is not None:
            self._own_part.sync()
        if not self._name_is_durable:
            fsync_directory(self._directory)
            self._name_is_durable = True

    def _verified(self, record: Record) -> tuple[ObjectId, Decoded]:
        try:
            decoded = self._reader.decode(record)
        except ObjectMissing as exc:
            raise BadObject(f"a record needs a base that is not here: {exc.message}") from exc
        _check_object(record.kind, decoded.data)
        return object_id(record.kind, decoded.data), decoded

    def _parts_for_append(self) -> None:
        if self._own_part is not None and self._own_part.size < PACK_BYTES_MAX:
            return
        if self._own_part is not None:
            self._own_part.sync()
        self._own_part = PackBuilder.create(self._directory, "", PART_SUFFIX, self._store.dot_id)
        self._name_is_durable = False
        self._parts.builders.append(self._own_part)

    # --- reading ------------------------------------------------------------------------------

    def has_key(self, key: bytes) -> bool:
        """True when something received has this short key. Unverified; the store is not asked."""
        return self._parts.has_key(key)

    def inventory_keys(self) -> set[bytes]:
        """Short keys of everything received and adopted."""
        return self._parts.keys()

    def has(self, kind: Kind, oid: ObjectId) -> bool:
        """True when the object is here or in the store, and sound."""
        try:
            return self._reader.find(kind, oid) is not None
        except Corruption:
            return False

    def read(self, kind: Kind, oid: ObjectId) -> bytes:
        """Raises ObjectMissing, HashMismatch, Corruption."""
        found = self._reader.find(kind, oid)
        if found is None:
            raise self._store.missing(kind, oid)
        return found.data

    def read_page(self, page: ObjectId) -> bytes:
        return self.read(Kind.PAGE, page)

    # --- ending -------------------------------------------------------------------------------

    def promote(self) -> tuple[PackInfo, ...]:
        """Seal everything received into packs of the store; durable on return.

        The caller has proven the closure. The session is empty afterwards.
        """
        builders = self._nonempty_parts()
        sealed = self._store.publish(builders)
        if sealed:
            fsync_directory(self._directory)
        self._forget()
        return sealed

    def close(self) -> None:
        """Keep what was received for a later session, durably, and give the parts up."""
        try:
            self.sync()
            self._nonempty_parts()
        finally:
            self._give_up_parts()

    def discard(self) -> None:
        """Throw everything received away."""
        for builder in self._parts.builders:
            builder.discard()
        self._forget()

    def _give_up_parts(self) -> None:
        for builder in self._parts.builders:
            builder.close()
        self._forget()

    def _nonempty_parts(self) -> list[PackBuilder]:
        """Parts with records; those without are removed."""
        for builder in self._parts.builders:
            if not builder.records:
                builder.discard()
        return [builder for builder in self._parts.builders if builder.records]

    def _forget(self) -> None:
        self._parts.forget()
        self._own_part = None
        self._name_is_durable = True
        self.received_ids.clear()

    # --- adopting -----------------------------------------------------------------------------

    def _adopt_parts(self) -> None:
        with storage_errors(f"listing {self._directory}"):
            paths = [
                entry.path
                for entry in sorted(os.scandir(self._directory), key=_age)
                if entry.name.endswith(PART_SUFFIX)
            ]
        for path in paths:
            self._adopt(path)

    def _adopt(self, path: str) -> None:
        with storage_errors(f"adopting {path}"):
            try:
                fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            except FileNotFoundError:
                return  # promoted or discarded a moment ago
            if not lock_exclusively(fd, wait=False) or not os.fstat(fd).st_nlink:
                os.close(fd)
                return  # a living session has it
        builder = PackBuilder.adopt(path, fd, self._store.dot_id)
        if not _is_ours(fd, builder.name, self._store.dot_id):
            builder.discard()
            return
        self._parts.builders.append(builder)
        self._restore_records(builder, fd)
        self._own_part = builder

    def _restore_records(self, builder: PackBuilder, fd: int) -> None:
        """Take over the records up to the first that is torn or not sound; drop the rest."""
        number = len(self._parts.builders) - 1
        try:
            for record, start, _ in iterate_file_records(fd, HEADER_BYTES, os.fstat(fd).st_size):
                oid, _ = self._verified(record)
                builder.restore(encode_record(record), short_key(oid))
                self._parts.note(number, start, short_key(oid))
                self.received_ids.add(oid)
        except BadObject:
            pass  # a torn tail: the sender has it still
        builder.truncate_to_restored()


def _age(entry: "os.DirEntry[str]") -> tuple[int, str]:
    """Oldest first: a part's bases may be in an earlier one."""
    try:
        return entry.stat(follow_symlinks=False).st_mtime_ns, entry.name
    except FileNotFoundError:
        return 0, entry.name


def _is_ours(fd: int, name: str, dot_id: bytes) -> bool:
    try:
        return check_header(os.pread(fd, HEADER_BYTES, 0), name) == dot_id
    except (Corruption, FormatUnsupported):
        return False


def _check_object(kind: Kind, data: bytes) -> None:
    """Refuse bytes that are no valid object of their kind. Raises BadObject."""
    match kind:
        case Kind.CHUNK:
            if not data:
                raise BadObject("an empty chunk")
        case Kind.PAGE:
            # An array of three whose first element, the page's type, is one byte.
            page_type = data[1] if len(data) > 1 else 0
            decode_page(data, page_type)
        case Kind.COMMIT:
            commit_from_bytes(data)
        case Kind.TAG:
            tag_from_bytes(data)
