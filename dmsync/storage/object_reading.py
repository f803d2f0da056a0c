"""Reading objects: from candidates for a short key to bytes that have the full id.

Chains of deltas are followed with a stack, never by recursion, first with the first candidate
for every base; only when that fails are other candidates and every intermediate hash tried. So
collisions of short keys and damaged copies cost time and nothing else.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, product
from threading import RLock
from typing import Final, Protocol

from dmsync.core.ids import Kind, ObjectId, object_id, short_key
from dmsync.core.records import STEPS_MAX, Encoding, Record, decode_record
from dmsync.errors import BadObject, Corruption, HashMismatch, ObjectMissing
from dmsync.storage.chain_reading import Decoded, Outcome, read_chains
from dmsync.storage.packs import Place

__all__ = ["Decoded", "DecodedCache", "ObjectReader", "RecordSource", "decode_with_bases"]

CACHE_BYTES_MAX: Final = 32 * 1024 * 1024
_ALTERNATIVES_MAX: Final = 64
"""Combinations of colliding bases tried for one record before it counts as unreadable."""


class RecordSource(Protocol):
    """Where records are: sealed packs, a writer's own pack, a quarantine."""

    def places(self, key: bytes) -> Sequence[Place]:
        """Candidates for a short key; no place is named by two sources."""
        ...

    def load(self, place: Place) -> Record:
        """The record at a place this source named. Raises Corruption."""
        ...

    def first_places(self, keys: Sequence[bytes]) -> dict[bytes, Place]:
        """One candidate for each key that has any."""
        ...

    def load_many(self, places: Sequence[Place]) -> dict[Place, Record]:
        """The records at those places that this source named and that can be read."""
        ...


def decode_with_bases(record: Record, bases: Sequence[Decoded]) -> Decoded:
    """Decode one record, its bases being in the record's order. Raises BadObject."""
    data = decode_record(record, [base.data for base in bases])
    stored = len(record.payload)
    if record.encoding in (Encoding.PREFIX, Encoding.PATCH):
        base = bases[0]
        patch_bytes = base.patch_bytes + stored
        return Decoded(record.kind, data, base.steps + 1, base.full_bytes, patch_bytes)
    steps_of = {base.key: decoded.steps for base, decoded in zip(record.bases, bases, strict=True)}
    return Decoded(record.kind, data, 1 + sum(steps_of.values()), stored, 0)


class DecodedCache:
    """Decoded objects by place, the least recently used dropped beyond a number of bytes."""

    def __init__(self, bytes_max: int = CACHE_BYTES_MAX) -> None:
        self._bytes_max = bytes_max
        self._bytes = 0
        self._held: OrderedDict[Place, Decoded] = OrderedDict()

    def get(self, place: Place) -> Decoded | None:
        found = self._held.get(place)
        if found is not None:
            self._held.move_to_end(place)
        return found

    def put(self, place: Place, decoded: Decoded) -> None:
        if place in self._held or len(decoded.data) > self._bytes_max:
            return
        self._held[place] = decoded
        self._bytes += len(decoded.data)
        while self._bytes > self._bytes_max:
            self._bytes -= len(self._held.popitem(last=False)[1].data)


@dataclass(slots=True)
class _Pending:
    """A record on the stack, waiting for the bases it has not been given yet."""

    place: Place
    record: Record
    bases: dict[bytes, Decoded] = field(default_factory=dict)

    def next_base(self) -> bytes | None:
        for base in self.record.bases:
            if base.key not in self.bases:
                return base.key
        return None

    def decode(self) -> Decoded:
        bases = [self.bases[base.key] for base in self.record.bases]
        try:
            return decode_with_bases(self.record, bases)
        except BadObject as exc:
            raise _unreadable(self.place, exc.message) from exc


class _Outcomes:
    """Iterates over results; one that is an error is raised and does not end the iteration."""

    def __init__(self, outcomes: Iterator[Outcome]) -> None:
        self._outcomes = outcomes

    def __iter__(self) -> "_Outcomes":
        return self

    def __next__(self) -> Decoded | None:
        outcome = next(self._outcomes)
        if isinstance(outcome, Corruption):
            raise outcome
        return outcome


class ObjectReader:
    """Reads through `sources` in order. Safe to use from several threads."""

    def __init__(self, sources: Sequence[RecordSource], cache: DecodedCache, lock: RLock) -> None:
        self._sources = sources
        self._cache = cache
        self._lock = lock

    def find(self, kind: Kind, oid: ObjectId) -> Decoded | None:
        """The object, verified; None when no source has it.

        Raises:
            Corruption: a record that should be it does not decode; names the pack.
            HashMismatch: it decodes to something else.
        """
        with self._lock:
            found = self._locate(kind, oid)
            return found[1] if found else None

    def find_many(
        self, kind: Kind, ids: Iterable[ObjectId], *, earlier: bool = False
    ) -> Iterator[Decoded | None]:
        """What `find` gives for each id, in order, with bounded memory and many at once.

        An object that cannot be read raises when its turn comes, as `find` would; the iteration
        may go on behind it.
        """

        def exactly(oid: ObjectId) -> Outcome:
            try:
                return self.find(kind, oid)
            except Corruption as exc:
                return exc

        return _Outcomes(read_chains(self, kind, ids, exactly, earlier=earlier))

    # What read_chains asks for, under the lock.

    def first_places(self, keys: Sequence[bytes]) -> dict[bytes, Place]:
        """One candidate for each key that has any, of the first source that has one."""
        found: dict[bytes, Place] = {}
        with self._lock:
            for source in self._sources:
                found = source.first_places([key for key in keys if key not in found]) | found
        return found

    def load_many(self, places: Sequence[Place]) -> dict[Place, Record]:
        """The records at places that `first_places` named; unreadable ones are left out."""
        found: dict[Place, Record] = {}
        with self._lock:
            for source in self._sources:
                found |= source.load_many([place for place in places if place not in found])
        return found

    def cached(self, place: Place) -> Decoded | None:
        """What was decoded before and is still held."""
        with self._lock:
            return self._cache.get(place)

    def remember(self, place: Place, decoded: Decoded) -> None:
        """Hold an object that is likely to be read again."""
        with self._lock:
            self._cache.put(place, decoded)

    def find_record(self, kind: Kind, oid: ObjectId) -> Record | None:
        """The stored form of an object, after verifying it. Raises as `find`."""
        with self._lock:
            while (found := self._locate(kind, oid)) is not None:
                for source, place in self._places(short_key(oid)):
                    if place == found[0]:
                        return source.load(place)
                # Its pack has just been joined with others: it is found elsewhere now.
            return None

    def decode(self, record: Record) -> Decoded:
        """Decode a record that is in no source yet; its hash is the caller's to judge.

        Raises:
            ObjectMissing: a base is not there. BadObject: it does not decode.
            Corruption: a base of ours is damaged.
        """
        with self._lock:
            bases = [self._verified_base(record.kind, base.key) for base in record.bases]
            return decode_with_bases(record, bases)

    def decode_at(self, place: Place, record: Record) -> Decoded:
        """Decode the record that is at `place`. Raises Corruption, ObjectMissing."""
        with self._lock:
            return self._cache.get(place) or self._decode(place, record)

    def content_of_key(self, kind: Kind, key: bytes) -> Decoded:
        """What has this short key. Raises ObjectMissing, Corruption."""
        with self._lock:
            return self._verified_base(kind, key)

    def readable_otherwise(self, place: Place, record: Record, key: bytes) -> bool:
        """True when some other choice among colliding bases gives an object of that key."""
        with self._lock:
            alternatives = _Alternatives(self._places)
            for source, candidate in self._places(key):
                if candidate == place:
                    return bool(alternatives.contents(source, place, record.kind, key, 0))
            return False

    def _verified_base(self, kind: Kind, key: bytes) -> Decoded:
        for source, place in self._places(key):
            found = self._content(source, place, kind)
            if found is not None and short_key(object_id(kind, found.data)) == key:
                self._cache.put(place, found)
                return found
        raise ObjectMissing(f"base {key.hex()} is not there", key=key.hex())

    def _locate(self, kind: Kind, oid: ObjectId) -> tuple[Place, Decoded] | None:
        failure: Corruption | None = None
        for source, place in self._places(short_key(oid)):
            try:
                found = self._content(source, place, kind)
            except Corruption as exc:
                failure = exc
                continue
            if found is None:
                continue
            if object_id(kind, found.data) == oid:
                self._cache.put(place, found)
                return place, found
            failure = HashMismatch(
                f"pack {place.pack}: the record at {place.offset} is not {oid.hex()[:12]}",
                pack=place.pack,
                offset=place.offset,
            )
        if failure is None:
            return None
        return self._locate_among_alternatives(kind, oid, failure)

    def _locate_among_alternatives(
        self, kind: Kind, oid: ObjectId, failure: Corruption
    ) -> tuple[Place, Decoded] | None:
        alternatives = _Alternatives(self._places)
        collides = False
        for source, place in self._places(short_key(oid)):
            for found in alternatives.contents(source, place, kind, short_key(oid), 0):
                if object_id(kind, found.data) == oid:
                    return place, found
                collides = True
        if collides and isinstance(failure, HashMismatch):
            return None  # a sound record of another object with the same short key
        raise failure

    def _places(self, key: bytes) -> Iterator[tuple[RecordSource, Place]]:
        for source in self._sources:
            for place in source.places(key):
                yield source, place

    def _content(self, source: RecordSource, place: Place, kind: Kind) -> Decoded | None:
        """What is at a place by first candidates, unverified; None when of another kind."""
        cached = self._cache.get(place)
        if cached is not None:
            return cached if cached.kind is kind else None
        record = source.load(place)
        return self._decode(place, record) if record.kind is kind else None

    def _decode(self, place: Place, record: Record) -> Decoded:
        """Decode a record, its bases first, taking the first candidate for each."""
        stack = [_Pending(place, record)]
        while True:
            pending = stack[-1]
            key = pending.next_base()
            if key is not None:
                base = self._first_candidate(pending, key)
                if isinstance(base, Decoded):
                    pending.bases[key] = base
                elif len(stack) > STEPS_MAX:
                    raise _unreadable(place, "endless chain of bases")
                else:
                    stack.append(base)
                continue
            decoded = pending.decode()
            stack.pop()
            if not stack:
                return decoded
            above = stack[-1]
            above.bases[next(b.key for b in above.record.bases if b.key not in above.bases)] = (
                decoded
            )
            if above.record.encoding is Encoding.SIMILAR:
                # Bases of neighbouring chunks overlap; steps of one chain never do.
                self._cache.put(pending.place, decoded)

    def _first_candidate(self, pending: _Pending, key: bytes) -> Decoded | _Pending:
        kind = pending.record.kind
        for source, place in self._places(key):
            if place == pending.place:
                continue
            cached = self._cache.get(place)
            if cached is not None:
                if cached.kind is kind:
                    return cached
                continue
            record = source.load(place)
            if record.kind is kind:
                return _Pending(place, record)
        raise ObjectMissing(
            f"pack {pending.place.pack}: the record at {pending.place.offset} "
            f"needs {key.hex()}, which is not there",
            pack=pending.place.pack,
            offset=pending.place.offset,
            key=key.hex(),
        )


class _Alternatives:
    """The slow way: every candidate for every base, each intermediate checked by its short key."""

    def __init__(self, places: "PlacesOfKey") -> None:
        self._places = places
        self._known: dict[Place, list[Decoded]] = {}

    def contents(
        self, source: RecordSource, place: Place, kind: Kind, key: bytes, depth: int
    ) -> list[Decoded]:
        """Everything the record at `place` can stand for that has the short key; mostly one."""
        known = self._known.get(place)
        if known is not None:
            return known
        self._known[place] = []  # ends a cycle of bases
        try:
            record = source.load(place)
        except Corruption:
            return []
        if record.kind is not kind or depth > STEPS_MAX:
            return []
        found: dict[bytes, Decoded] = {}
        options = [self._bases(kind, base.key, depth) for base in record.bases]
        for bases in islice(product(*options), _ALTERNATIVES_MAX):
            try:
                decoded = decode_with_bases(record, bases)
            except BadObject:
                continue
            oid = object_id(kind, decoded.data)
            if short_key(oid) == key:
                found[oid] = decoded
        self._known[place] = list(found.values())
        return self._known[place]

    def _bases(self, kind: Kind, key: bytes, depth: int) -> list[Decoded]:
        found: dict[bytes, Decoded] = {}
        for source, place in self._places(key):
            for decoded in self.contents(source, place, kind, key, depth + 1):
                found[decoded.data] = decoded
        return list(found.values())


class PlacesOfKey(Protocol):
    def __call__(self, key: bytes, /) -> Iterator[tuple[RecordSource, Place]]: ...


def _unreadable(place: Place, why: str) -> Corruption:
    return Corruption(
        f"pack {place.pack}: the record at {place.offset} is damaged: {why}",
        pack=place.pack,
        offset=place.offset,
    )
