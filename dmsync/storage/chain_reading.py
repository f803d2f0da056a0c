"""Reading many objects at once: chains of deltas walked level by level, decoded on two threads.

The quick way only: it takes the first candidate for every short key and proves the result by its
full hash. Whatever fails here (a collision, damage, a missing base, an endless chain) is left
undecided, and the exact way of storage.object_reading decides it.

A level is the records that a window of objects needs next: one look-up of all their keys, and
reads that take neighbours together, since chunks of one file lie in order in every pack. What
chunks with similar pages need is taken for many windows of them at once (storage.shared_pages).
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol, TypeVar

from dmsync.core.delta import decompress
from dmsync.core.ids import Kind, ObjectId, object_id, short_key
from dmsync.core.records import STEPS_MAX, Encoding, Record, decode_record, similar_page
from dmsync.errors import BadObject, Corruption
from dmsync.storage.packs import Place
from dmsync.storage.patched_content import PatchedContent, touching
from dmsync.storage.shared_pages import Chain, SharedPages, patch_pages

if TYPE_CHECKING:
    from concurrent.futures import Executor, Future

THREADS: Final = 2
WINDOW_OBJECTS: Final = 64
"""Objects walked together: enough to share look-ups and reads."""
WINDOW_BYTES: Final = 8 * 1024 * 1024
"""A window ends where the records of its objects take so much."""
CHAIN_BYTES_MAX: Final = 64 * 1024 * 1024
"""Stored bytes that a window's chains may take; the exact way reads what has more."""
JOINED_PAGES_MAX: Final = 16_384
"""A window of chunks with similar pages grows until they name so many pages: each base serves
several of them, so that the work for a megabyte halves."""
JOINED_RECORDS_MAX: Final = 49_152
JOINED_BYTES_MAX: Final = 32 * 1024 * 1024
"""Nor does it grow beyond so many records, which take some 20 MiB, and stored bytes."""
_JOINED_OBJECTS: Final = (16, 256)
"""By so many chunks it grows."""
RUN_STEPS: Final = 4
"""A chain that ends with so many small patches is long enough to be based on the state before
them (protocol/decisions/0004-chain-length.md)."""
RUN_CONTRAST: Final = 3
"""A delta this many times larger than the mean of those behind it is not of their run."""
_GROUP: Final = 16
_GROUP_BYTES: Final = 2 * 1024 * 1024
"""Decoded by one thread at once: no more objects, and no more bytes but for a single object."""
_GROUP_ALONE: Final = 4
"""So few records are decoded by the caller."""
_BYTES_AHEAD: Final = 16 * 1024 * 1024
"""What may be decoded, or about to be, before the caller takes it."""
_NESTING_MAX: Final = 8
"""Chains that begin with similar pages of chains that begin so: deeper ones go the exact way."""


class EarlierState(NamedTuple):
    """What a chain gives before its last steps, unverified, and the short key it should have."""

    key: bytes
    data: bytes


class Decoded(NamedTuple):
    """An object's bytes and what reading them takes.

    `steps` counts frames decoded when nothing is cached; `full_bytes` and `patch_bytes` are the
    stored bytes of the frame its chain starts with and of those that follow. `earlier`, when asked
    for, is the state before the run of small patches that the chain ends with, if that is long.
    """

    kind: Kind
    data: bytes
    steps: int
    full_bytes: int
    patch_bytes: int
    earlier: EarlierState | None = None


class Records(Protocol):
    """Where a walk finds records; called on the thread that iterates."""

    def first_places(self, keys: Sequence[bytes]) -> dict[bytes, Place]:
        """One candidate for each key that has any."""
        ...

    def load_many(self, places: Sequence[Place]) -> dict[Place, Record]:
        """The records at these places; those that cannot be read are left out."""
        ...

    def cached(self, place: Place) -> Decoded | None:
        """What was decoded before. Called on other threads too."""
        ...

    def remember(self, place: Place, decoded: Decoded) -> None:
        """Keep what several chains need. Called on other threads too."""
        ...


class _Undecided(Exception):
    """The quick way does not lead to the object."""


class _Window:
    """The records that some objects of one kind need, all loaded; decodes them."""

    def __init__(self, records: Records, kind: Kind, *, earlier: bool = False) -> None:
        self._records = records
        self._earlier = earlier
        self._kind = kind
        self._contents: dict[bytes, Record | Decoded] = {}
        """What short keys stand for."""
        self._places: dict[bytes, Place] = {}
        """Where those are that may be worth remembering: all but patches."""
        self._stored_bytes = 0
        self._shared = SharedPages()
        self.ids: list[ObjectId] = []

    def load(self, ids: list[ObjectId]) -> list[ObjectId]:
        """Load the records of these objects and what they need; returns the ids that the window
        is for: fewer when they are large."""
        taken, contents = self._take(ids)
        self._want(contents)
        self._walk(self._bases_of(contents))
        self.ids += taken
        return taken

    def load_bases(self, arriving: Sequence[Record], known: Mapping[bytes, Decoded]) -> None:
        """Load what records need that are in no pack yet; `known` are such that were decoded."""
        self._contents.update(known)
        self._want(arriving)
        self._walk(self._bases_of(arriving))

    def growth(self) -> int:
        """How many objects more there is room for, 0 unless most share bases with their like."""
        if len(self._shared) < len(self.ids):
            return 0
        used = max(
            len(self._shared) / JOINED_PAGES_MAX,
            len(self._contents) / JOINED_RECORDS_MAX,
            self._stored_bytes / JOINED_BYTES_MAX,
        )
        fewest, most = _JOINED_OBJECTS
        room = int(len(self.ids) * (1 - used) / used)
        return min(room, most) if room >= fewest else 0

    def groups(self) -> Iterator[tuple[list[ObjectId], int]]:
        """The objects, some at a time, and how many bytes they are."""
        group: list[ObjectId] = []
        group_bytes = 0
        for oid in self.ids:
            content = self._contents.get(short_key(oid))
            size = 0 if content is None else _raw_bytes(content)
            if group and (len(group) == _GROUP or group_bytes + size > _GROUP_BYTES):
                yield group, group_bytes
                group, group_bytes = [], 0
            group.append(oid)
            group_bytes += size
        if group:
            yield group, group_bytes

    def share_pages(self, pool: "Executor | None") -> None:
        """Decode what several of the objects may be decoded with, on the threads of `pool`; to be
        called once, before anything is decoded."""
        self._want(self._starts())
        if not len(self._shared):
            return
        is_complete = self._shared.take(self._chains_of(self._shared.keys()), pool)
        if is_complete and self.ids:
            self._forget_bases()

    def _starts(self) -> Iterator[Record | Decoded]:
        """What the objects' own chains begin with."""
        for oid in self.ids:
            content = self._contents.get(short_key(oid))
            if isinstance(content, Record):
                with suppress(_Undecided):
                    yield self._chain(content, b"")[1]

    def _chains_of(self, keys: Iterable[bytes]) -> Iterator[tuple[bytes, Chain]]:
        """How bases are made, of those that begin with a frame that needs no other object."""
        for key in keys:
            try:
                first_key, first, deltas = self._chain(self._content(key), key)
            except _Undecided:
                continue
            if not isinstance(first, Record) or not first.bases:
                yield key, Chain(first_key, first, deltas)

    def _forget_bases(self) -> None:
        """Keep the records that the objects' own chains consist of."""
        kept: dict[bytes, Record | Decoded] = {}
        for oid in self.ids:
            key = short_key(oid)
            while key not in kept and (content := self._contents.get(key)) is not None:
                kept[key] = content
                if not isinstance(content, Record) or content.encoding not in _LINEAR:
                    break
                key = content.bases[0].key
        self._contents = kept

    def _want(self, contents: Iterable[Record | Decoded]) -> None:
        for content in contents:
            if isinstance(content, Record) and content.encoding is Encoding.SIMILAR:
                self._shared.want(content.bases)

    def _take(self, ids: list[ObjectId]) -> tuple[list[ObjectId], list[Record | Decoded]]:
        """Load the objects' own records; returns the ids this was done for, and these."""
        held_bytes = 0
        contents: list[Record | Decoded] = []
        for start in range(0, len(ids), _GROUP):
            group = ids[start : start + _GROUP]
            keys = [short_key(oid) for oid in group]
            self._load([key for key in keys if key not in self._contents])
            found = [self._contents[key] for key in keys if key in self._contents]
            contents += found
            held_bytes += sum(map(_held_bytes, found))
            if held_bytes >= WINDOW_BYTES:
                return ids[: start + _GROUP], contents
        return ids, contents

    def _walk(self, wanted: list[bytes]) -> None:
        for _ in range(STEPS_MAX):
            if not wanted or self._stored_bytes > CHAIN_BYTES_MAX:
                return
            wanted = self._bases_of(self._load(wanted))

    def _bases_of(self, contents: Iterable[Record | Decoded]) -> list[bytes]:
        """Keys of bases that are not loaded yet, each once."""
        known = self._contents
        return list(
            dict.fromkeys(
                base.key
                for content in contents
                if isinstance(content, Record)
                for base in content.bases
                if base.key not in known
            )
        )

    def _load(self, keys: list[bytes]) -> list[Record | Decoded]:
        contents = self._contents
        loaded: list[Record | Decoded] = []
        missing: dict[bytes, Place] = {}
        for key, place in self._records.first_places(keys).items():
            # What is held decoded has no earlier state.
            cached = None if self._earlier else self._records.cached(place)
            if cached is None:
                missing[key] = place
            else:
                contents[key] = cached
                loaded.append(cached)
        records = self._records.load_many(list(missing.values()))
        for key, place in missing.items():
            record = records.get(place)
            if record is not None and record.kind is self._kind:
                self._stored_bytes += len(record.payload)
                contents[key] = record
                loaded.append(record)
                if record.encoding is not Encoding.PATCH:
                    self._places[key] = place
        return loaded

    def decode(self, oid: ObjectId) -> Decoded | None:
        """The object, verified; None when the exact way has to decide. For any thread."""
        key = short_key(oid)
        try:
            decoded = self._decoded(self._content(key), 0, earlier=self._earlier)
        except (_Undecided, BadObject):
            return None
        if decoded.kind is not self._kind or object_id(self._kind, decoded.data) != oid:
            return None
        if self._kind is not Kind.CHUNK:
            self._remember(key, decoded)
        return decoded

    def decode_on(self, record: Record) -> Decoded | None:
        """What a record gives whose bases `load_bases` has loaded, unverified: the first candidates
        are taken. None when the exact way has to decide. For any thread."""
        try:
            return self._decoded(record, 0)
        except (_Undecided, BadObject):
            return None

    def _decoded(
        self, content: Record | Decoded, nesting: int, *, earlier: bool = False
    ) -> Decoded:
        _, start, deltas = self._chain(content, b"")
        first = self._first(start, nesting) if isinstance(start, Record) else start
        return _follow(first, deltas, earlier=earlier) if deltas else first

    def _chain(
        self, content: Record | Decoded, key: bytes
    ) -> tuple[bytes, Record | Decoded, list[Record]]:
        """What a chain begins with and its key, `key` being that of `content`; and its deltas, the
        last one first."""
        deltas: list[Record] = []
        while isinstance(content, Record) and content.encoding in _LINEAR:
            deltas.append(content)
            if len(deltas) > STEPS_MAX:
                raise _Undecided
            key = content.bases[0].key
            content = self._content(key)
        return key, content, deltas

    def _content(self, key: bytes) -> Record | Decoded:
        content = self._contents.get(key)
        if content is None:
            raise _Undecided
        return content

    def _first(self, record: Record, nesting: int) -> Decoded:
        """The frame that a chain starts with."""
        if not record.bases:
            data = decode_record(record, ())
            return Decoded(record.kind, data, 1, len(record.payload), 0)
        pages = [self._shared.page(base) for base in record.bases]
        wanted: dict[bytes, set[int]] = {}
        steps_of: dict[bytes, int] = {}
        for base, page in zip(record.bases, pages, strict=True):
            if page is None:
                wanted.setdefault(base.key, set()).add(base.page)
            else:
                steps_of[base.key] = self._shared.steps(base.key)
        if wanted and nesting >= _NESTING_MAX:
            raise _Undecided
        alone: dict[bytes, bytes] = {}
        for key, numbers in wanted.items():
            decoded = self._base(key, patch_pages(numbers), nesting + 1)
            alone[key], steps_of[key] = decoded.data, decoded.steps
        prefix = b"".join(
            [
                similar_page(alone[base.key], base.page) if page is None else page
                for base, page in zip(record.bases, pages, strict=True)
            ]
        )
        data = decompress(record.payload, record.raw_bytes, prefix)
        return Decoded(record.kind, data, 1 + sum(steps_of.values()), len(record.payload), 0)

    def _base(self, key: bytes, pages: int, nesting: int) -> Decoded:
        """A base of which only some patch pages, named by bits, have to be right."""
        first_key, start, deltas = self._chain(self._content(key), key)
        if isinstance(start, Record):
            start = self._start(first_key, start, nesting)
        kept = touching(deltas, pages)
        if kept is None:
            kept = deltas
        return _follow(start, kept)._replace(steps=start.steps + len(deltas))

    def _start(self, key: bytes, record: Record, nesting: int) -> Decoded:
        """As `_first`; similar pages of similar pages are remembered: neighbours need them too."""
        if not record.bases:
            return self._first(record, nesting)
        place = self._places.get(key)
        cached = self._records.cached(place) if place is not None else None
        if cached is None:
            cached = self._first(record, nesting)
            self._remember(key, cached)
        return cached

    def _remember(self, key: bytes, decoded: Decoded) -> None:
        place = self._places.get(key)
        if place is not None:
            self._records.remember(place, decoded)


_LINEAR: Final = (Encoding.PATCH, Encoding.PREFIX)


def _raw_bytes(content: Record | Decoded) -> int:
    return content.raw_bytes if isinstance(content, Record) else len(content.data)


def _held_bytes(content: Record | Decoded) -> int:
    return len(content.payload if isinstance(content, Record) else content.data)


def _follow(first: Decoded, deltas: Sequence[Record], *, earlier: bool = False) -> Decoded:
    """Apply deltas, the last one first in `deltas`. Raises BadObject."""
    content = PatchedContent(first.data)
    stored = 0
    run = _trailing_run([len(record.payload) for record in deltas]) if earlier else 0
    state: EarlierState | None = None
    for left, record in zip(range(len(deltas), 0, -1), reversed(deltas), strict=True):
        if left == run >= RUN_STEPS:
            state = EarlierState(record.bases[0].key, content.joined())
        stored += len(record.payload)
        if record.encoding is Encoding.PATCH:
            content.replace(content.decoded(record))
        else:
            content = PatchedContent(decode_record(record, [content.joined()]))
    steps = first.steps + len(deltas)
    patch_bytes = first.patch_bytes + stored
    return Decoded(first.kind, content.joined(), steps, first.full_bytes, patch_bytes, state)


def _trailing_run(sizes: Sequence[int]) -> int:
    """How many deltas of like size, newest first, there are before a much larger one."""
    total = 0
    for count, size in enumerate(sizes):
        if size * count > RUN_CONTRAST * total and count:
            return count
        total += size
    return len(sizes)


def read_chains(
    records: Records,
    kind: Kind,
    ids: Iterable[ObjectId],
    exactly: "Callable[[ObjectId], Outcome]",
    *,
    earlier: bool = False,
    may_thread: bool = True,
) -> "Iterator[Outcome]":
    """Each object in order, None when it is nowhere, or the error that reading it gives.

    With `may_thread` reads ahead, so that decoding overlaps with what the caller does; `exactly`
    reads what the quick way leaves undecided, when its turn comes.
    """
    coming = _Coming(ids)
    window = _next_window(coming, records, kind, earlier=earlier)
    if not may_thread or not coming.any():
        # Few objects are not worth threads, of which such a caller often has its own.
        while window.ids:
            window.share_pages(None)
            for oid in window.ids:
                yield window.decode(oid) or exactly(oid)
            window = _next_window(coming, records, kind, earlier=earlier)
        return
    ahead: deque[tuple[list[ObjectId], int, Future[list[Decoded | None]]]] = deque()
    ahead_bytes = 0

    def finished() -> "Iterator[Outcome]":
        nonlocal ahead_bytes
        group, group_bytes, job = ahead.popleft()
        ahead_bytes -= group_bytes
        for oid, found in zip(group, job.result(), strict=True):
            yield found or exactly(oid)

    from concurrent.futures import ThreadPoolExecutor  # slow to import, and hardly ever needed

    with ThreadPoolExecutor(THREADS) as pool:
        while window.ids:
            window.share_pages(pool)
            for group, group_bytes in window.groups():
                ahead.append((group, group_bytes, pool.submit(_decode_group, window, group)))
                ahead_bytes += group_bytes
                while ahead_bytes > _BYTES_AHEAD and len(ahead) > 1:
                    yield from finished()
            window = _next_window(coming, records, kind, earlier=earlier)
        while ahead:
            yield from finished()


class _Coming:
    """Ids that are asked for, some of them back from where they were taken."""

    def __init__(self, ids: Iterable[ObjectId]) -> None:
        self._remaining = iter(ids)
        self._waiting: list[ObjectId] = []

    def next(self, count: int) -> list[ObjectId]:
        """At most so many, which stay until they are `taken`."""
        self._waiting.extend(islice(self._remaining, max(0, count - len(self._waiting))))
        return self._waiting[:count]

    def taken(self, count: int) -> None:
        del self._waiting[:count]

    def any(self) -> bool:
        return bool(self.next(1))


def _next_window(coming: _Coming, records: Records, kind: Kind, *, earlier: bool) -> _Window:
    """The records of the objects that are next; of none when there are no more."""
    window = _Window(records, kind, earlier=earlier)
    count = WINDOW_OBJECTS
    while count and (ids := coming.next(count)):
        coming.taken(len(window.load(ids)))
        count = window.growth()
    return window


_Finished = TypeVar("_Finished")


def decode_arriving(
    records: Records,
    arriving: Sequence[Record],
    known: Mapping[bytes, Decoded],
    finish: Callable[[Record, Decoded | None], _Finished],
    pool: "Executor",
) -> list[_Finished]:
    """`finish(record, content)` for each record, on the threads of `pool`, in order; the records
    are of one kind and in no pack yet.

    A content is unverified, since nothing says what it should be, and None when the quick way
    does not give one. `known` are objects by short key that are in no pack either.
    """
    window = _Window(records, arriving[0].kind)
    window.load_bases(arriving, known)
    window.share_pages(pool)

    def run(group: Sequence[Record]) -> list[_Finished]:
        return [finish(record, window.decode_on(record)) for record in group]

    if len(arriving) <= _GROUP_ALONE:
        return run(arriving)
    size = -(-len(arriving) // THREADS)
    groups = [arriving[at : at + size] for at in range(0, len(arriving), size)]
    return [one for job in [pool.submit(run, group) for group in groups] for one in job.result()]


def _decode_group(window: _Window, ids: Sequence[ObjectId]) -> list[Decoded | None]:
    return [window.decode(oid) for oid in ids]


Outcome = Decoded | Corruption | None
