"""Incoming records of one dot, verified one by one, until their closure is complete.

Records from a peer are hostile until decoded and hashed. They are appended to a part file that
has the form of a pack without its end; promotion writes the end and renames it. What a cut
session leaves is adopted, verified again, by the next one. Source: protocol/PACKS.md 7.
"""

import os
from collections.abc import Callable, Collection, Container, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final, Self

from dmsync.core.delta import compress
from dmsync.core.ids import Kind, ObjectId, object_id, short_key
from dmsync.core.records import STEPS_MAX, Record, decode_record, encode_record, parse_record
from dmsync.errors import BadObject, Corruption, FormatUnsupported, ObjectMissing
from dmsync.storage.arriving import (
    Arriving,
    Verified,
    batches,
    check_object,
    verify_quickly,
)
from dmsync.storage.chain_reading import THREADS, Decoded
from dmsync.storage.chunk_forms import plain_record
from dmsync.storage.durable import (
    fsync_directory,
    lock_exclusively,
    make_directory_durable,
    remove_if_there,
    storage_errors,
)
from dmsync.storage.object_reading import ObjectReader
from dmsync.storage.pack_writer import BuiltPacks
from dmsync.storage.packs import (
    HEADER_BYTES,
    PACK_BYTES_MAX,
    PackBuilder,
    PackInfo,
    check_header,
    iterate_file_records,
)
from dmsync.storage.stages import stage

if TYPE_CHECKING:
    from dmsync.storage.object_store import ObjectStore

PART_SUFFIX: Final = ".part"


class Quarantine:
    """One receive session. A PageReader over what came in and the store; for one thread at a time.

    Parts are locked while a session has them, so two sessions into one dot never share one.
    """

    def __init__(self, store: "ObjectStore") -> None:
        store.hold.require()
        self._store = store
        self._directory = os.path.join(store.dot_dir, "quarantine")
        make_directory_durable(self._directory)
        self._parts = BuiltPacks()
        self._reader = ObjectReader([self._parts, store.sealed], store.cache, store.lock)
        self._own_part: PackBuilder | None = None
        self._pool: ThreadPoolExecutor | None = None
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
        verified = self._verified(record)
        self._keep(bytes(record_bytes), [(Arriving(record, 0, end), verified)])
        return verified.oid

    def receive_joined(
        self, joined: bytes, expected: Container[bytes] = frozenset()
    ) -> Generator[None, None, list[tuple[Kind, ObjectId, int]]]:
        """As `receive` for all records of a frame, in steps of a few megabytes; returns kind, id
        and length of what each decodes to.

        `expected`: short keys of what the peer announced, which are verified many at a time.
        """
        received: list[tuple[Kind, ObjectId, int]] = []
        for batch in batches(joined):
            with stage("verify"):
                kind = batch[0].record.kind
                for oid, decoded in self._receive_batch(joined, batch, expected):
                    received.append((kind, oid, len(decoded.data)))
            yield
        return received

    def _receive_batch(
        self, joined: bytes, batch: list[Arriving], expected: Container[bytes]
    ) -> list[Verified]:
        known: dict[bytes, Decoded] = {}
        found = self._quickly([arriving.record for arriving in batch], known, expected)
        verified: list[Verified] = []
        kept = 0
        for position, arriving in enumerate(batch):
            one = found[position]
            if one is None and arriving.record.bases:  # maybe on one that came just before
                one = self._quickly([arriving.record], known, expected)[0]
            if one is None:
                self._keep(joined, list(zip(batch[kept:position], verified[kept:], strict=True)))
                kept = position
                one = self._verified(arriving.record)
            known[short_key(one.oid)] = one.decoded
            verified.append(one)
        self._keep(joined, list(zip(batch[kept:], verified[kept:], strict=True)))
        return verified

    def _quickly(
        self, records: list[Record], known: dict[bytes, Decoded], expected: Container[bytes]
    ) -> list[Verified | None]:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(THREADS, "dm-verify")
        return verify_quickly(self._reader, records, known, expected, self._pool)

    def _keep(self, joined: bytes, arrived: list[tuple[Arriving, Verified]]) -> None:
        """Append what is not here yet, as it came where reading it again is cheap enough."""
        keys = [short_key(verified.oid) for _, verified in arrived]
        stored = self._reader.first_places(keys)
        run: list[tuple[Arriving, Verified]] = []
        for key, (arriving, verified) in zip(keys, arrived, strict=True):
            kind = arriving.record.kind
            # A damaged one is not here: the sound copy that came repairs it.
            is_here = verified.oid in self.received_ids or (
                key in stored and self.has(kind, verified.oid)
            )
            if is_here:
                continue
            self.received_ids.add(verified.oid)
            if run and run[-1][0].end != arriving.start:
                self._append(joined, run)
                run = []
            if verified.decoded.steps <= STEPS_MAX:
                run.append((arriving, verified))
                continue
            self._append(joined, run)
            run = []
            data = verified.decoded.data
            record = encode_record(plain_record(kind, data, compress(data)))
            plain = verified._replace(decoded=Decoded(kind, data, 1, len(record), 0))
            self._append(record, [(Arriving(arriving.record, 0, len(record)), plain)])
        self._append(joined, run)

    def _append(self, joined: bytes, run: list[tuple[Arriving, Verified]]) -> None:
        """Append records that lie one behind the other in `joined`."""
        if not run:
            return
        self._parts_for_append()
        places = self._parts.append_joined(
            memoryview(joined)[run[0][0].start : run[-1][0].end],
            [arriving.end - arriving.start for arriving, _ in run],
            [short_key(verified.oid) for _, verified in run],
        )
        with self._store.lock:
            for place, (_, verified) in zip(places, run, strict=True):
                self._store.cache.put(place, verified.decoded)

    def sync(self) -> None:
        """Everything received so far survives a crash when this returns."""
        self.begin_sync()()

    def begin_sync(self) -> Callable[[], None]:
        """What makes all that was received until now survive a crash; may run in another thread
        while more is received. It must have returned before the session ends."""
        part, name_is_durable = self._own_part, self._name_is_durable
        if part is not None:
            part.flush()

        def finish() -> None:
            with stage("sync"):
                if part is not None:
                    part.sync_flushed()
                if not name_is_durable:
                    fsync_directory(self._directory)

        self._name_is_durable = True
        return finish

    def _verified(self, record: Record) -> Verified:
        try:
            decoded = self._reader.decode(record)
        except ObjectMissing as exc:
            raise BadObject(f"a record needs a base that is not here: {exc.message}") from exc
        check_object(record.kind, decoded.data)
        return Verified(object_id(record.kind, decoded.data), decoded)

    def _parts_for_append(self) -> None:
        if self._own_part is not None and self._own_part.size < PACK_BYTES_MAX:
            return
        if self._own_part is not None:
            self._own_part.sync()
        self._own_part = PackBuilder.create(self._directory, "", PART_SUFFIX, self._store.dot_id)
        self._name_is_durable = False
        self._parts.builders.append(self._own_part)

    # --- reading ------------------------------------------------------------------------------

    def keys_here(self, keys: Collection[bytes], *, stored: bool) -> set[bytes]:
        """Those of `keys` that something received has, or with `stored` something in the store.
        Unverified."""
        reader = self._reader if stored else self._parts
        return set(reader.first_places(list(keys)))

    def has(self, kind: Kind, oid: ObjectId) -> bool:
        """True when the object is here or in the store, and sound."""
        try:
            return self._reader.find(kind, oid) is not None
        except Corruption:
            return False

    def read(self, kind: Kind, oid: ObjectId) -> bytes:
        """Raises ObjectMissing, HashMismatch, Corruption."""
        again = self._read_again(oid) if kind is Kind.CHUNK else None
        if again is not None:
            return again
        found = self._reader.find(kind, oid)
        if found is None:
            raise self._store.missing(kind, oid)
        return found.data

    def _read_again(self, oid: ObjectId) -> bytes | None:
        """A chunk that was verified as it came and needs no other. It is not hashed a second time:
        who checks a file's content hashes what is read here."""
        places = self._parts.places(short_key(oid)) if oid in self.received_ids else []
        if len(places) != 1:
            return None
        record = self._parts.load(places[0])
        try:
            return None if record.bases else decode_record(record, ())
        except BadObject as exc:  # it was sound when it came
            raise Corruption(f"what was received is damaged: {exc.message}") from exc

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
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
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

    @property
    def bytes_held(self) -> int:
        """What came in, in this session or in those it adopted from, as it lies on the disk."""
        return sum(builder.size for builder in self._parts.builders)

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
            if os.fstat(fd).st_nlink > 1:
                # A pack by now: after a loss of power its renaming may have left both names (btrfs
                # does that), and whatever is done to the part is done to the sealed pack.
                os.close(fd)
                remove_if_there(path)
                return
        builder = PackBuilder.adopt(path, fd)
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
                oid = self._verified(record).oid
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
