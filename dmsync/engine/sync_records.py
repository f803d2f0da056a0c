"""Sending a stream of records: what the peer lacks is planned, read, verified and sent as stored
(WIRE.md 5.2).
"""

import asyncio
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Generator,
    Iterable,
    Iterator,
    Sequence,
)
from contextlib import aclosing
from itertools import islice
from typing import Final, NamedTuple

from dmsync.core.delta import compress, compress_with_prefix
from dmsync.core.ids import Kind, ObjectId, short_key
from dmsync.core.objects import Commit, Entry, EntryKind, commit_from_bytes
from dmsync.core.pages import directory_entries
from dmsync.core.records import BaseSlice, Encoding, Record, encode_record
from dmsync.engine.background import end_of, in_thread
from dmsync.engine.progress import Progress
from dmsync.engine.session import Session
from dmsync.engine.sync_hollow import Selection
from dmsync.engine.sync_objects import AddedObjects, ObjectSet, RootComparison, Steps
from dmsync.errors import ProtocolError
from dmsync.storage.object_store import ObjectStore
from dmsync.storage.stages import stage
from dmsync.wire.limits import (
    EAGER_BYTES_MAX,
    PLAN_ENTRIES_MAX,
    PLAN_PAGES_INFLIGHT_MAX,
    RECORDS_BYTES_JOINED,
)
from dmsync.wire.messages import HOLLOW_COMMIT, Ack, Message, Plan, PlanReply, Records
from dmsync.wire.windows import SendWindow

EAGER_OBJECTS_MAX: Final = 8192
"""More objects than this do not fit EAGER_BYTES_MAX in any case worth trying."""
RECORD_RAW_BYTES_GUESS: Final = 512
RECORD_HEADER_BYTES_GUESS: Final = 16
BATCH_RAW_BYTES: Final = 16 * 1024 * 1024
BATCH_OBJECTS: Final = 512
"""What is read and verified at a time."""
FRAMES_AHEAD: Final = 2
EAGER_FRAME_BYTES: Final = 64 * 1024
"""A small transfer goes in small frames, so that the receiver works while more are made."""
PAGE_RAW_BYTES_GUESS: Final = 4096
"""For progress totals only: the plan does not read the sizes of pages and commits."""


class PlannedObject(NamedTuple):
    kind: Kind
    oid: ObjectId
    raw_bytes: int
    base: ObjectId | None
    """What takes its place in the commit compared with: a delta base when it is re-encoded."""
    is_hollow: bool = False
    """A commit that goes without its content."""


class Outgoing:
    """The objects of the commits the peer lacks, and their records in a sendable order.

    `held` are short keys of objects known to be at the peer; it grows while records are made.
    """

    def __init__(self, objects: ObjectStore) -> None:
        self.plan: list[PlannedObject] = []
        self.commits_count = 0
        self.hollow_count = 0
        self.verbatim_count = 0
        self.reencoded_count = 0
        self.resumed_bytes = 0
        self._objects = objects
        self._held: set[bytes] = set()
        self._skipped: set[int] = set()

    # --- planning -----------------------------------------------------------------------------

    def add_commits(self, commits: Iterable[ObjectId]) -> Steps:
        """Plan `commits`, parents first, all with content; parents outside them are complete at
        the peer."""
        parents = {commit: self._commit(commit).parents for commit in commits}
        complete = [(commit, above[0] if above else None) for commit, above in parents.items()]
        yield from self.add(Selection((), complete, lambda commit: commit not in parents))

    def add(self, selection: Selection, scope: frozenset[bytes] | None = None) -> Steps:
        """Plan what was selected, of each root the entries in `scope` (None: all)."""
        for commit_id in selection.listed:
            record = PlannedObject(Kind.COMMIT, commit_id, RECORD_RAW_BYTES_GUESS, None, True)
            self.plan.append(record)
        self.hollow_count = len(selection.listed)
        self.commits_count += self.hollow_count
        known = ObjectSet()
        for commit_id, base in selection.complete:
            commit = self._commit(commit_id)
            added = yield from self._added_by(commit, base, selection, known, scope)
            self._list(commit_id, added)
            added.add_to(known)
            self.commits_count += 1
            yield
        # what is planned is there only once it was sent, also when a comparison calls it old
        self._held.difference_update(short_key(planned.oid) for planned in self.plan)

    def add_tags(self, tags: Iterable[ObjectId]) -> None:
        """Plan annotated tags' objects, after the commits they name."""
        for tag in tags:
            self.plan.append(PlannedObject(Kind.TAG, tag, RECORD_RAW_BYTES_GUESS, None))

    def _commit(self, commit: ObjectId) -> Commit:
        return commit_from_bytes(self._objects.read_commit(commit), trusted=True)

    def _added_by(
        self,
        commit: Commit,
        base: ObjectId | None,
        selection: Selection,
        known: ObjectSet,
        scope: frozenset[bytes] | None,
    ) -> Generator[None, None, AddedObjects]:
        old = None if base is None else self._commit(base).root
        held = [parent for parent in commit.parents if selection.has_base(parent)]
        if self._objects.is_partial():
            self._know_subdots(held, known, scope)
        comparison = RootComparison(
            self._objects, old, commit.root, known, trusted=True, scope=scope
        )
        yield from comparison.steps()
        added = comparison.added
        for parent in held:
            if parent != base:
                other = self._commit(parent).root
                yield from self._subtract(added, other, commit.root, known, scope)
        return added

    def _know_subdots(
        self, held: Iterable[ObjectId], known: ObjectSet, scope: frozenset[bytes] | None
    ) -> None:
        """The subdots of commits that are at the peer: a merge may have taken one whole from a
        further parent, and its pages are not here to be compared."""
        for commit in held:
            for entry in directory_entries(self._objects, self._commit(commit).root.tree):
                is_there = scope is None or entry.name in scope
                if is_there and entry.kind is EntryKind.DIRECTORY and entry.tree is not None:
                    known.directories.add(entry.tree)

    def _subtract(
        self,
        added: AddedObjects,
        other: Entry,
        root: Entry,
        known: ObjectSet,
        scope: frozenset[bytes] | None,
    ) -> Steps:
        """Leave out what a further parent, complete at the peer, has."""
        comparison = RootComparison(self._objects, other, root, known, trusted=True, scope=scope)
        yield from comparison.steps()
        needed = comparison.added
        for chunk in added.chunks.keys() - needed.chunks.keys():
            del added.chunks[chunk]
        for page in added.pages.keys() - needed.pages.keys():
            del added.pages[page]

    def _list(self, commit_id: ObjectId, added: AddedObjects) -> None:
        for chunk, (length, base) in added.chunks.items():
            self.plan.append(PlannedObject(Kind.CHUNK, chunk, length, base))
        for page, (_, base) in added.pages.items():
            self.plan.append(PlannedObject(Kind.PAGE, page, PAGE_RAW_BYTES_GUESS, base))
        self.plan.append(PlannedObject(Kind.COMMIT, commit_id, PAGE_RAW_BYTES_GUESS, None))
        old = added.replaced
        for ids in (old.chunks, old.directories, old.manifests, old.scoped_roots):
            self._held.update(map(short_key, ids))

    def pages(self, *, eager: bool) -> Iterator[Plan]:
        """The plan as messages; at least one, even when empty."""
        raw_bytes = sum(planned.raw_bytes for planned in self.plan)
        for first in range(0, max(1, len(self.plan)), PLAN_ENTRIES_MAX):
            page = self.plan[first : first + PLAN_ENTRIES_MAX]
            yield Plan(
                first,
                bytes(HOLLOW_COMMIT if planned.is_hollow else planned.kind for planned in page),
                b"".join(short_key(planned.oid) for planned in page),
                len(self.plan),
                raw_bytes,
                last=first + PLAN_ENTRIES_MAX >= len(self.plan),
                eager=eager,
            )

    @property
    def lacking_count(self) -> int:
        """Of the planned objects, those that the peer does not hold."""
        return len(self.plan) - len(self._skipped)

    def take_inventory(self, reply: PlanReply) -> None:
        """Skip what the peer holds. Raises ProtocolError when the reply is about no plan page."""
        page_count = min(PLAN_ENTRIES_MAX, len(self.plan) - reply.first_index)
        if reply.first_index % PLAN_ENTRIES_MAX or reply.count != page_count:
            raise ProtocolError("PLAN_REPLY does not fit the plan")
        for position in range(reply.count):
            if reply.holds(position):
                planned = self.plan[reply.first_index + position]
                self._skipped.add(reply.first_index + position)
                self._held.add(short_key(planned.oid))
                self.resumed_bytes += planned.raw_bytes

    # --- encoding -----------------------------------------------------------------------------

    def is_small(self) -> bool:
        """Do all records come to at most EAGER_BYTES_MAX? As far as their stored forms tell; one
        that may have to be re-encoded counts with what it decodes to."""
        if len(self.plan) > EAGER_OBJECTS_MAX:
            return False
        sendable = self._held | {short_key(planned.oid) for planned in self.plan}
        total = 0
        for batch in self._batches():
            stored = self._objects.unverified_records([planned.oid for planned in batch])
            for planned in batch:
                record = stored.get(planned.oid)
                if record is None or not all(base.key in sendable for base in record.bases):
                    total += planned.raw_bytes if record is None else record.raw_bytes
                else:
                    total += len(record.payload)
                total += RECORD_HEADER_BYTES_GUESS
            if total > EAGER_BYTES_MAX:
                return False
        return True

    def records(self) -> Iterator[bytes]:
        """Each planned record the peer lacks, bases before what needs them."""
        unsent = {
            short_key(planned.oid): planned
            for at, planned in enumerate(self.plan)
            if at not in self._skipped
        }
        for batch in self._batches():
            lacking = [planned for planned in batch if short_key(planned.oid) in unsent]
            stored = self._stored(lacking)
            for planned in lacking:
                if short_key(planned.oid) in unsent:
                    yield from self._with_bases(planned, unsent, stored)

    def _batches(self) -> Iterator[list[PlannedObject]]:
        """What is to be sent, in order, as much as is read at a time."""
        batch: list[PlannedObject] = []
        raw_bytes = 0
        for at, planned in enumerate(self.plan):
            if at in self._skipped:
                continue
            batch.append(planned)
            raw_bytes += planned.raw_bytes
            if raw_bytes >= BATCH_RAW_BYTES or len(batch) == BATCH_OBJECTS:
                yield batch
                batch, raw_bytes = [], 0
        if batch:
            yield batch

    def _stored(self, batch: Iterable[PlannedObject]) -> dict[bytes, Record]:
        """The stored forms of some objects by short key, verified."""
        by_kind: dict[Kind, list[ObjectId]] = {}
        for planned in batch:
            by_kind.setdefault(planned.kind, []).append(planned.oid)
        found: dict[bytes, Record] = {}
        with stage("read"):
            for kind, ids in by_kind.items():
                records = self._objects.stored_records(kind, ids)
                found.update((short_key(oid), rec) for oid, rec in zip(ids, records, strict=True))
        return found

    def _with_bases(
        self,
        planned: PlannedObject,
        unsent: dict[bytes, PlannedObject],
        stored: dict[bytes, Record],
    ) -> Iterator[bytes]:
        """The record of `planned`, after those of its bases that are still to be sent."""
        stack = [planned]
        entered: set[bytes] = set()
        while stack:
            current = stack[-1]
            key = short_key(current.oid)
            if key not in unsent:
                stack.pop()
                continue
            record = stored.get(key) or self._objects.stored_record(current.kind, current.oid)
            waiting = [
                unsent[base.key]
                for base in record.bases
                if base.key in unsent and base.key not in entered and base.key not in self._held
            ]
            if waiting and key not in entered:
                entered.add(key)
                stack.extend(waiting)
                continue
            stack.pop()
            del unsent[key]
            stored.pop(key, None)
            yield self._sendable(current, record, unsent)
            self._held.add(key)

    def _sendable(
        self, planned: PlannedObject, record: Record, unsent: dict[bytes, PlannedObject]
    ) -> bytes:
        if all(base.key in self._held for base in record.bases):
            self.verbatim_count += 1
            return encode_record(record)
        self.reencoded_count += 1
        return encode_record(self._reencoded(planned, unsent))

    def _reencoded(self, planned: PlannedObject, unsent: dict[bytes, PlannedObject]) -> Record:
        """A record that needs only what the peer has: a delta on the replaced object, or whole."""
        data = self._objects.read(planned.kind, planned.oid)
        base = self._replacement(planned, unsent)
        if base is not None and self._can_be_base(planned.kind, base):
            frame = compress_with_prefix(data, self._objects.read(planned.kind, base))
            if len(frame) < len(data) // 2:
                slices = (BaseSlice(short_key(base)),)
                return Record(planned.kind, Encoding.PREFIX, len(data), frame, slices)
        frame = compress(data)
        if len(frame) < len(data):
            return Record(planned.kind, Encoding.ZSTD, len(data), frame)
        return Record(planned.kind, Encoding.RAW, len(data), data)

    def _replacement(
        self, planned: PlannedObject, unsent: dict[bytes, PlannedObject]
    ) -> ObjectId | None:
        """What takes the object's place in the nearest commit that the peer has by now: commits
        that are compared with their children are sent before these."""
        base, seen = planned.base, {planned.oid}
        while base is not None and base not in seen and (later := unsent.get(short_key(base))):
            seen.add(base)
            base = later.base
        return base

    def _can_be_base(self, kind: Kind, base: ObjectId) -> bool:
        return short_key(base) in self._held and self._objects.has(kind, base)


# --- sending -----------------------------------------------------------------------------------


async def send_plan_and_wait(
    session: Session,
    outgoing: Outgoing,
    opening: Sequence[Message] = (),
    opened: Callable[[], Awaitable[None]] | None = None,
) -> None:
    """Send the plan's pages and take the inventory of each, a few pages ahead.

    `opening` goes out together with the first page; `opened` takes its answer.
    """
    unanswered = 0
    for page in outgoing.pages(eager=False):
        await session.send(*opening, page)
        if opening and opened is not None:
            await opened()
        opening = ()
        unanswered += 1
        if unanswered >= PLAN_PAGES_INFLIGHT_MAX:
            outgoing.take_inventory(await session.expect(PlanReply))
            unanswered -= 1
    for _ in range(unanswered):
        outgoing.take_inventory(await session.expect(PlanReply))


async def send_records(
    session: Session, outgoing: Outgoing, window: SendWindow, progress: Progress
) -> None:
    """Send all records, never more unacknowledged than the window allows."""
    progress.phase("sending", items_total=outgoing.lacking_count)
    async with aclosing(_made_ahead(outgoing, RECORDS_BYTES_JOINED, FRAMES_AHEAD)) as frames:
        async for joined, count in frames:
            while not window.has_room(len(joined)):
                _take_ack(window, await session.receive())
            while (message := session.poll()) is not None:
                _take_ack(window, message)
            window.sent(len(joined), count)
            with stage("send"):
                await session.send(Records(joined))
            progress.reached(window.bytes_sent, window.records_sent)


async def send_eagerly(session: Session, outgoing: Outgoing, window: SendWindow) -> None:
    """Send all records of a small transfer, of which nobody acknowledges any."""
    async with aclosing(_made_ahead(outgoing, EAGER_FRAME_BYTES, 1)) as frames:
        async for joined, count in frames:
            window.sent(len(joined), count)
            await session.send(Records(joined))


async def _made_ahead(
    outgoing: Outgoing, frame_bytes: int, frames_ahead: int
) -> AsyncGenerator[tuple[bytes, int], None]:
    """Frames of records; the next ones are made in a thread while some are sent."""
    frames = joined_records(outgoing.records(), frame_bytes)

    def some() -> list[tuple[bytes, int]]:
        return list(islice(frames, frames_ahead))

    making = asyncio.ensure_future(in_thread(some))
    try:
        while made := await making:
            making = asyncio.ensure_future(in_thread(some))
            for frame in made:
                yield frame
    finally:
        await end_of(making)


def _take_ack(window: SendWindow, message: Message) -> None:
    if not isinstance(message, Ack):
        raise ProtocolError(f"{message.TYPE.name} where ACK was due")
    window.acknowledged(message)


def joined_records(
    records: Iterable[bytes], frame_bytes: int = RECORDS_BYTES_JOINED
) -> Iterator[tuple[bytes, int]]:
    """(payload of a RECORDS frame, records in it): small records joined, order kept."""
    parts: list[bytes] = []
    size = 0
    for record in records:
        if parts and size + len(record) > frame_bytes:
            yield b"".join(parts), len(parts)
            parts, size = [], 0
        parts.append(record)
        size += len(record)
    if parts:
        yield b"".join(parts), len(parts)
