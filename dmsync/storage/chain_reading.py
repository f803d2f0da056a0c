"""Reading many objects at once: chains of deltas walked level by level, decoded on two threads.

The quick way only: it takes the first candidate for every short key and proves the result by its
full hash. Whatever fails here (a collision, damage, a missing base, an endless chain) is left
undecided, and the exact way of storage.object_reading decides it.

A level is the records that a window of objects needs next: one look-up of all their keys, and
reads that take neighbours together, since chunks of one file lie in order in every pack.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Final, NamedTuple, Protocol, TypeVar

from dmsync.core.delta import PATCH_PAGE_BYTES, overlay_pages
from dmsync.core.ids import Kind, ObjectId, object_id, short_key
from dmsync.core.records import SIMILAR_PAGE_BYTES, STEPS_MAX, Encoding, Record, decode_record
from dmsync.errors import BadObject, Corruption
from dmsync.storage.packs import Place

THREADS: Final = 2
WINDOW_OBJECTS: Final = 64
"""Objects walked together: enough to share look-ups and reads."""
WINDOW_BYTES: Final = 8 * 1024 * 1024
"""A window of larger objects ends here (an object may be 8 MiB)."""
CHAIN_BYTES_MAX: Final = 32 * 1024 * 1024
"""Stored bytes that a window's chains may take; the exact way reads what has more."""
RUN_STEPS: Final = 8
"""A chain that ends with so many small patches is long enough to be based on the state before
them (protocol/decisions/0004-chain-length.md)."""
RUN_CONTRAST: Final = 3
"""A delta this many times larger than the mean of those behind it is not of their run."""
_GROUP: Final = 16
_GROUP_ALONE: Final = 4
"""So few records are decoded by the caller."""
_WINDOWS_AHEAD: Final = 2
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


@dataclass(slots=True)
class _Node:
    """What one short key stands for in a window."""

    place: Place | None
    """None: an object that is in no pack yet."""
    content: Record | Decoded


class _Undecided(Exception):
    """The quick way does not lead to the object."""


class _Window:
    """The records that some objects of one kind need, all loaded; decodes them."""

    def __init__(
        self, records: Records, kind: Kind, ids: list[ObjectId], *, earlier: bool = False
    ) -> None:
        self._records = records
        self._earlier = earlier
        self._kind = kind
        self._nodes: dict[bytes, _Node] = {}
        self._stored_bytes = 0
        self.ids = self._take(ids)
        self._walk(self._bases_of([node.content for node in self._nodes.values()]))

    def load_bases(self, arriving: Sequence[Record], known: Mapping[bytes, Decoded]) -> None:
        """Load what records need that are in no pack yet; `known` are such that were decoded."""
        self._nodes.update((key, _Node(None, decoded)) for key, decoded in known.items())
        self._walk(self._bases_of(arriving))

    def _take(self, ids: list[ObjectId]) -> list[ObjectId]:
        """Load the objects' own records; returns the ids that this window is for."""
        raw_bytes = 0
        for start in range(0, len(ids), _GROUP):
            group = ids[start : start + _GROUP]
            for node in self._load([short_key(oid) for oid in group]):
                content = node.content
                raw_bytes += content.raw_bytes if isinstance(content, Record) else 0
            if raw_bytes >= WINDOW_BYTES:
                return ids[: start + _GROUP]
        return ids

    def _walk(self, wanted: list[bytes]) -> None:
        for _ in range(STEPS_MAX):
            if not wanted or self._stored_bytes > CHAIN_BYTES_MAX:
                return
            wanted = self._bases_of([node.content for node in self._load(wanted)])

    def _bases_of(self, contents: Iterable[Record | Decoded]) -> list[bytes]:
        """Keys of bases that are not loaded yet, each once."""
        known = self._nodes
        return list(
            dict.fromkeys(
                base.key
                for content in contents
                if isinstance(content, Record)
                for base in content.bases
                if base.key not in known
            )
        )

    def _load(self, keys: list[bytes]) -> list[_Node]:
        places = self._records.first_places(keys)
        loaded: list[_Node] = []
        missing: dict[bytes, Place] = {}
        for key, place in places.items():
            cached = self._records.cached(place)
            if cached is None:
                missing[key] = place
            else:
                self._nodes[key] = node = _Node(place, cached)
                loaded.append(node)
        records = self._records.load_many(list(missing.values()))
        for key, place in missing.items():
            record = records.get(place)
            if record is not None and record.kind is self._kind:
                self._stored_bytes += len(record.payload)
                self._nodes[key] = node = _Node(place, record)
                loaded.append(node)
        return loaded

    def decode(self, oid: ObjectId) -> Decoded | None:
        """The object, verified; None when the exact way has to decide. For any thread."""
        key = short_key(oid)
        try:
            decoded = self._content(key, 0, earlier=self._earlier)
        except (_Undecided, BadObject):
            return None
        if decoded.kind is not self._kind or object_id(self._kind, decoded.data) != oid:
            return None
        place = self._nodes[key].place
        if self._kind is not Kind.CHUNK and place is not None:
            self._records.remember(place, decoded)
        return decoded

    def decode_on(self, record: Record) -> Decoded | None:
        """What a record gives whose bases `load_bases` has loaded, unverified: the first candidates
        are taken. None when the exact way has to decide. For any thread."""
        try:
            return self._decoded(record, 0)
        except (_Undecided, BadObject):
            return None

    def _content(self, key: bytes, nesting: int, *, earlier: bool = False) -> Decoded:
        """What the first candidates give for a key, unverified. Raises _Undecided, BadObject."""
        return self._decoded(self._node(key).content, nesting, earlier=earlier)

    def _decoded(
        self, content: Record | Decoded, nesting: int, *, earlier: bool = False
    ) -> Decoded:
        start, deltas = self._chain(content)
        first = self._first(start, nesting) if isinstance(start, Record) else start
        return _follow(first, deltas, earlier=earlier) if deltas else first

    def _chain(self, content: Record | Decoded) -> tuple[Record | Decoded, list[Record]]:
        """What a chain begins with, and its deltas, the last one first."""
        deltas: list[Record] = []
        while isinstance(content, Record) and content.encoding in _LINEAR:
            deltas.append(content)
            if len(deltas) > STEPS_MAX:
                raise _Undecided
            content = self._node(content.bases[0].key).content
        return content, deltas

    def _node(self, key: bytes) -> _Node:
        node = self._nodes.get(key)
        if node is None:
            raise _Undecided
        return node

    def _first(self, record: Record, nesting: int) -> Decoded:
        """The frame that a chain starts with."""
        steps = 1
        bases: list[bytes] = []
        if record.bases:
            if nesting >= _NESTING_MAX:
                raise _Undecided
            wanted: dict[bytes, int] = {}
            for base in record.bases:
                wanted[base.key] = wanted.get(base.key, 0) | _PATCH_PAGES << base.page * _RATIO
            needed = {key: self._base(key, pages, nesting + 1) for key, pages in wanted.items()}
            bases = [needed[base.key].data for base in record.bases]
            steps += sum(base.steps for base in needed.values())
        data = decode_record(record, bases)
        return Decoded(record.kind, data, steps, len(record.payload), 0)

    def _base(self, key: bytes, pages: int, nesting: int) -> Decoded:
        """A base of which only some patch pages, named by bits, have to be right."""
        node = self._node(key)
        cached = self._records.cached(node.place) if node.place is not None else None
        if cached is not None:
            return cached
        start, deltas = self._chain(node.content)
        if isinstance(start, Record) and start.bases:
            return self._remembered(node, self._decoded(node.content, nesting))
        first = self._first(start, nesting) if isinstance(start, Record) else start
        kept = []
        for record in deltas:
            if record.encoding is not Encoding.PATCH or record.changed & pages:
                kept.append(record)
                pages |= record.changed if record.changed else -1
        if not kept:
            return first._replace(steps=first.steps + len(deltas))
        return _follow(first, kept)._replace(steps=first.steps + len(deltas))

    def _remembered(self, node: _Node, decoded: Decoded) -> Decoded:
        """Similar pages of similar pages: neighbouring chunks need the same ones."""
        if node.place is not None:
            self._records.remember(node.place, decoded)
        return decoded


_LINEAR: Final = (Encoding.PATCH, Encoding.PREFIX)
_RATIO: Final = SIMILAR_PAGE_BYTES // PATCH_PAGE_BYTES
_PATCH_PAGES: Final = (1 << _RATIO) - 1
"""The bits of the patch pages in the first similar page."""


def _follow(first: Decoded, deltas: Sequence[Record], *, earlier: bool = False) -> Decoded:
    """Apply deltas, the last one first in `deltas`; patches in place. Raises BadObject."""
    content = bytearray(first.data)
    stored = 0
    run = _trailing_run([len(record.payload) for record in deltas]) if earlier else 0
    state: EarlierState | None = None
    for left, record in zip(range(len(deltas), 0, -1), reversed(deltas), strict=True):
        if left == run >= RUN_STEPS:
            state = EarlierState(record.bases[0].key, bytes(content))
        stored += len(record.payload)
        if record.encoding is Encoding.PATCH:
            if record.raw_bytes != len(content):
                raise BadObject("a patch and its base have the same length")
            overlay_pages(content, record.changed, record.payload)
        else:
            content = bytearray(decode_record(record, [bytes(content)]))
    steps = first.steps + len(deltas)
    patch_bytes = first.patch_bytes + stored
    return Decoded(first.kind, bytes(content), steps, first.full_bytes, patch_bytes, state)


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
) -> "Iterator[Outcome]":
    """Each object in order, None when it is nowhere, or the error that reading it gives.

    Walks ahead by a few windows, so that decoding overlaps with what the caller does; `exactly`
    reads what the quick way leaves undecided, when its turn comes.
    """
    remaining = iter(ids)
    waiting: list[ObjectId] = []

    def next_window() -> _Window | None:
        waiting.extend(islice(remaining, WINDOW_OBJECTS - len(waiting)))
        if not waiting:
            return None
        window = _Window(records, kind, waiting.copy(), earlier=earlier)
        del waiting[: len(window.ids)]
        return window

    window = next_window()
    if window is None:
        return
    following = next_window()
    if following is None:  # not worth threads, of which a caller with few objects has its own
        for oid in window.ids:
            yield window.decode(oid) or exactly(oid)
        return
    with ThreadPoolExecutor(THREADS) as pool:
        ahead: deque[tuple[list[ObjectId], list[Future[list[Decoded | None]]]]] = deque()
        while window is not None or ahead:
            if window is not None:
                groups = [window.ids[at : at + _GROUP] for at in range(0, len(window.ids), _GROUP)]
                jobs = [pool.submit(_decode_group, window, group) for group in groups]
                ahead.append((window.ids, jobs))
            if window is None or len(ahead) > _WINDOWS_AHEAD:
                done, jobs = ahead.popleft()
                decoded = (one for job in jobs for one in job.result())
                for oid, found in zip(done, decoded, strict=True):
                    yield found or exactly(oid)
            window, following = following, next_window()


_Finished = TypeVar("_Finished")


def decode_arriving(
    records: Records,
    arriving: Sequence[Record],
    known: Mapping[bytes, Decoded],
    finish: Callable[[Record, Decoded | None], _Finished],
    pool: Executor,
) -> list[_Finished]:
    """`finish(record, content)` for each record, on the threads of `pool`, in order; the records
    are of one kind and in no pack yet.

    A content is unverified, since nothing says what it should be, and None when the quick way
    does not give one. `known` are objects by short key that are in no pack either.
    """
    window = _Window(records, arriving[0].kind, [])
    window.load_bases(arriving, known)

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
