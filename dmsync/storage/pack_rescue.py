"""Reading a harmed pack: what of it is sound, told by hash and by nothing else.

Where the records begin is taken from the pack's table if that can be read, else from the index
that was made of it, else from going through the file: behind a place that is no record every byte
is tried, and a record counts when what it decodes to has a key that is asked for.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from threading import RLock
from typing import Final

from dmsync.core.ids import Kind, ObjectId, object_id, short_key
from dmsync.core.records import (
    HEADER_BYTES_MAX,
    Encoding,
    Record,
    decode_record,
    encode_record,
    parse_header,
)
from dmsync.errors import BadObject, Corruption
from dmsync.storage.durable import storage_errors
from dmsync.storage.object_reading import Decoded, DecodedCache, ObjectReader, RecordSource
from dmsync.storage.packs import HEADER_BYTES, Place, read_record, read_table

_FRAME_MAGIC: Final = b"\x28\xb5\x2f\xfd"
_RUN_RECORDS: Final = 3
"""So many headers that fit one behind the other are no accident."""
_WINDOW_BYTES: Final = 1024 * 1024
_SEARCHED_BYTES_MAX: Final = 64 * 1024 * 1024
"""Of one pack without a table, how much is searched byte by byte."""


class HarmedPack:
    """The records of one harmed file as a RecordSource. Close it.

    `indexed` is what is known of it otherwise: key and offset of each record.
    """

    def __init__(self, path: str, indexed: Iterable[tuple[bytes, int]] = ()) -> None:
        self.name = os.path.basename(path)
        self.unread_offsets: list[int] = []
        """Where a record should be and none is."""
        with storage_errors(f"opening {path}"):
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            self._bytes = os.fstat(self._fd).st_size
        self._named: dict[int, bytes] = {}
        """The key of the record at each offset, as far as somebody says."""
        self._places: dict[bytes, list[Place]] = {}
        for key, offset in indexed:
            self._note(offset, key)
        try:
            footer = read_table(self._fd, self.name)
        except (Corruption, OSError):
            footer = None
        if footer is not None:
            for key, offset in zip(footer.keys, footer.offsets, strict=True):
                self._note(offset, key)
        self.has_table = bool(self._named)

    def _note(self, offset: int, key: bytes) -> None:
        if self._named.get(offset) != key:
            self._named[offset] = key
            self._places.setdefault(key, []).append(Place(self.name, offset))

    def offsets(self) -> Iterator[int]:
        """Where records begin, in file order; those found by searching are known to parse only."""
        if self.has_table:
            yield from sorted(self._named)
            return
        yield from self._searched()

    def _searched(self) -> Iterator[int]:
        at, budget = HEADER_BYTES, _SEARCHED_BYTES_MAX
        window, window_at = b"", 0
        is_lost = False
        """Is `at` any byte, and not where a record ended?"""
        while at < self._bytes and budget > 0:
            if at + HEADER_BYTES_MAX > window_at + len(window) and (
                window_at + len(window) < self._bytes
            ):
                window, window_at = self._bytes_at(at, _WINDOW_BYTES), at
                if not window:  # cannot be read: on with what is behind
                    at += _WINDOW_BYTES
                    continue
            try:
                _, payload_at, payload_bytes = parse_header(window, at - window_at)
            except BadObject:
                at, budget, is_lost = at + 1, budget - 1, True
                continue
            end = window_at + payload_at + payload_bytes
            if end > self._bytes or not self._is_record(at, is_lost=is_lost):
                at, budget, is_lost = at + 1, budget - 1, True
                continue
            yield at
            at, is_lost = end, False

    def _is_record(self, offset: int, *, is_lost: bool) -> bool:
        """Is this a record, or bytes that look like a header? One with bases cannot be decoded
        yet; anything is a RAW one, behind which records must follow therefore."""
        try:
            record = self.load(Place(self.name, offset))
        except Corruption:
            return False
        if record.encoding is Encoding.RAW:
            return not is_lost or self._begins_run(offset)
        is_frame = record.payload.startswith(_FRAME_MAGIC)
        return is_frame and (bool(record.bases) or _decodes_alone(record))

    def _begins_run(self, offset: int) -> bool:
        """Do records follow here, one behind the other, or the end of the file?"""
        for _ in range(_RUN_RECORDS):
            if offset == self._bytes:
                return True
            header = self._bytes_at(offset, HEADER_BYTES_MAX)
            try:
                _, payload_at, payload_bytes = parse_header(header)
            except BadObject:
                return False
            offset += payload_at + payload_bytes
            if offset > self._bytes:
                return False
        return True

    def _bytes_at(self, offset: int, length: int) -> bytes:
        try:
            return os.pread(self._fd, length, offset)
        except OSError:
            return b""

    def key_at(self, offset: int) -> bytes | None:
        """What the table or the index says of the record there."""
        return self._named.get(offset)

    def found(self, offset: int, key: bytes) -> None:
        """Take note of what a record proved to be."""
        self._note(offset, key)

    # --- a RecordSource -----------------------------------------------------------------------

    def places(self, key: bytes) -> Sequence[Place]:
        return self._places.get(key, ())

    def load(self, place: Place) -> Record:
        return read_record(self._fd, place)

    def first_places(self, keys: Sequence[bytes]) -> dict[bytes, Place]:
        return {key: self._places[key][0] for key in keys if key in self._places}

    def load_many(self, places: Sequence[Place]) -> dict[Place, Record]:
        found: dict[Place, Record] = {}
        for place in places:
            if place.pack == self.name:
                try:
                    found[place] = self.load(place)
                except Corruption:
                    continue
        return found

    def close(self) -> None:
        os.close(self._fd)


def _decodes_alone(record: Record) -> bool:
    try:
        decode_record(record, ())
    except BadObject:
        return False
    return True


class Rescue:
    """Tells the sound records of harmed packs, whose bases may be in each other or in `sources`."""

    def __init__(self, packs: Sequence[HarmedPack], sources: Sequence[RecordSource]) -> None:
        self._packs = packs
        self._reader = ObjectReader([*packs, *sources], DecodedCache(), RLock())

    def sound_records(
        self,
    ) -> Iterator[tuple[HarmedPack, int, bytes, bytes]]:
        """(pack, offset, key, encoded record) of each record whose content has the key that the
        table states for it, or, where no table is left, that decodes to some object."""
        waiting: list[tuple[HarmedPack, int]] = []
        for pack in self._packs:
            for offset in pack.offsets():
                found = self._judged(pack, offset)
                if found is None:
                    waiting.append((pack, offset))
                else:
                    yield (pack, offset, *found)
        # A base may lie behind what needs it, or in a pack that came later.
        progressed = True
        while waiting and progressed:
            progressed, left = False, []
            for pack, offset in waiting:
                found = self._judged(pack, offset)
                if found is None:
                    left.append((pack, offset))
                else:
                    progressed = True
                    yield (pack, offset, *found)
            waiting = left
        for pack, offset in waiting:
            pack.unread_offsets.append(offset)

    def find(self, kind: Kind, oid: ObjectId) -> bytes | None:
        """One object out of all of these, verified; None when it is in none."""
        try:
            found = self._reader.find(kind, oid)
        except Corruption:
            return None
        return None if found is None else found.data

    def _judged(self, pack: HarmedPack, offset: int) -> tuple[bytes, bytes] | None:
        place = Place(pack.name, offset)
        try:
            record = pack.load(place)
            decoded: Decoded = self._reader.decode_at(place, record)
        except (Corruption, BadObject):
            return None
        key = short_key(object_id(record.kind, decoded.data))
        stated = pack.key_at(offset)
        if stated is not None and stated != key:
            if not self._reader.readable_otherwise(place, record, stated):
                return None
            key = stated
        if stated is None:
            pack.found(offset, key)
        return key, encode_record(record)
