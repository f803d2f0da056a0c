"""The stored forms of many objects, verified: what a sender passes on as it is."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import tee
from typing import Protocol

from dmsync.core.ids import Kind, ObjectId, short_key
from dmsync.core.records import Record
from dmsync.storage.chain_reading import Decoded, Records, read_chains
from dmsync.storage.packs import Place


class RecordReader(Records, Protocol):
    """Where records are, also one by one (storage.object_reading.ObjectReader is one)."""

    def find_record(self, kind: Kind, oid: ObjectId) -> Record | None:
        """The stored form of an object, after verifying it. Raises Corruption, HashMismatch."""
        ...


def find_records(
    reader: RecordReader, kind: Kind, ids: Iterable[ObjectId]
) -> Iterator[Record | None]:
    """What `reader.find_record` gives for each id, in order, with bounded memory and many at once.

    Raises as `find_record`, when the turn of an object comes that cannot be read.
    """
    noted = _Noted(reader)
    exact: dict[ObjectId, Record | None] = {}

    def exactly(oid: ObjectId) -> None:
        exact[oid] = reader.find_record(kind, oid)

    wanted, asked = tee(ids)
    chains = read_chains(noted, kind, noted.wanting(wanted), exactly)
    for oid, found in zip(asked, chains, strict=True):
        record = noted.taken(short_key(oid))
        yield exact.pop(oid, None) if found is None else record


class _Noted:
    """Records as `read_chains` looks them up, those of the objects themselves kept for a moment."""

    def __init__(self, reader: RecordReader) -> None:
        self._reader = reader
        self._wanted: set[bytes] = set()
        self._places: dict[bytes, Place] = {}
        self._own: set[Place] = set()
        self._records: dict[Place, Record] = {}

    def wanting(self, ids: Iterable[ObjectId]) -> Iterator[ObjectId]:
        """The same ids, noted as they are asked for."""
        for oid in ids:
            self._wanted.add(short_key(oid))
            yield oid

    def taken(self, key: bytes) -> Record | None:
        """The record that the first candidate for `key` is; no longer kept."""
        self._wanted.discard(key)
        place = self._places.pop(key, None)
        if place is None:
            return None
        self._own.discard(place)
        return self._records.pop(place, None)

    def first_places(self, keys: Sequence[bytes]) -> dict[bytes, Place]:
        found = self._reader.first_places(keys)
        own = {key: place for key, place in found.items() if key in self._wanted}
        self._places |= own
        self._own.update(own.values())
        return found

    def load_many(self, places: Sequence[Place]) -> dict[Place, Record]:
        found = self._reader.load_many(places)
        self._records |= {place: found[place] for place in found if place in self._own}
        return found

    def cached(self, place: Place) -> Decoded | None:
        # the record is what is asked for: it must be loaded in any case
        return None if place in self._own else self._reader.cached(place)

    def remember(self, place: Place, decoded: Decoded) -> None:
        self._reader.remember(place, decoded)
