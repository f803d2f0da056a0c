"""Reading sealed objects in a forked process, which must not use the databases it inherited.

It opens packs and their index itself. Only the quick way of storage.chain_reading: what it leaves
undecided, and what is not there, is left to the process that started it, which has the exact way.
"""

import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from dmsync.core.ids import Kind, ObjectId
from dmsync.core.records import Record
from dmsync.storage.chain_reading import Decoded, read_chains
from dmsync.storage.object_reading import DecodedCache
from dmsync.storage.pack_files import PackFiles
from dmsync.storage.pack_index import IndexSnapshot
from dmsync.storage.packs import Place

_CACHE_BYTES_MAX: Final = 8 * 1024 * 1024


class Undecided(Exception):
    """Only the calling process can read this object, or say that it is not there."""


class DetachedReader:
    """Stands for an ObjectReader of what is sealed in a dot; for one thread. Raises Undecided when
    the index cannot be read as it lies there."""

    def __init__(self, dot_dir: str) -> None:
        self._files = PackFiles(os.path.join(dot_dir, "packs"))
        self._index = _index_of(dot_dir)
        self._cache = DecodedCache(_CACHE_BYTES_MAX)

    def find_many(
        self, kind: Kind, ids: Iterable[ObjectId], *, earlier: bool = False
    ) -> Iterator[Decoded]:
        """Each object in order, verified. Raises Undecided."""
        for found in read_chains(self, kind, ids, _undecided, earlier=earlier, may_thread=False):
            assert isinstance(found, Decoded), "_undecided gives nothing"
            yield found

    # What read_chains asks for.

    def first_places(self, keys: Sequence[bytes]) -> dict[bytes, Place]:
        try:
            return self._index.first_places(keys)
        except sqlite3.DatabaseError as exc:
            raise Undecided(str(exc)) from exc

    def load_many(self, places: Sequence[Place]) -> dict[Place, Record]:
        return self._files.load_many(places)

    def cached(self, place: Place) -> Decoded | None:
        return self._cache.get(place)

    def remember(self, place: Place, decoded: Decoded) -> None:
        self._cache.put(place, decoded)


def _index_of(dot_dir: str) -> IndexSnapshot:
    try:
        return IndexSnapshot(dot_dir)
    except (sqlite3.DatabaseError, OSError) as exc:
        raise Undecided(str(exc)) from exc


def _undecided(oid: ObjectId) -> Decoded:
    raise Undecided(oid.hex())
