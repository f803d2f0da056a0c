"""Streams of records: a sender that plans, a receiver that verifies (WIRE.md 5.2, 5.3)."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator, Sequence
from typing import Final, NamedTuple

from dmsync.core.delta import compress, compress_with_prefix
from dmsync.core.ids import KEY_BYTES, Kind, ObjectId, short_key
from dmsync.core.objects import Commit, Entry, EntryKind, commit_from_bytes
from dmsync.core.pages import directory_entries
from dmsync.core.records import BaseSlice, Encoding, Record, encode_record, parse_header
from dmsync.engine.background import in_thread
from dmsync.engine.file_content import check_content
from dmsync.engine.ports import SyncProgress
from dmsync.engine.session import Session, in_steps
from dmsync.engine.sync_hollow import (
    Arrivals,
    Holding,
    Selection,
    comparisons,
    complete_children,
    scope_of,
)
from dmsync.engine.sync_objects import AddedObjects, FileKey, ObjectSet, RootComparison, Steps
from dmsync.errors import BadObject, ObjectMissing, ProtocolError
from dmsync.storage.object_store import ObjectStore
from dmsync.storage.quarantine import Quarantine
from dmsync.wire.limits import (
    ACK_INTERVAL_S,
    EAGER_BYTES_MAX,
    PLAN_ENTRIES_MAX,
    PLAN_PAGES_INFLIGHT_MAX,
    RECORDS_BYTES_JOINED,
)
from dmsync.wire.messages import HOLLOW_COMMIT, Ack, Message, Plan, PlanReply, Records
from dmsync.wire.windows import ReceiveWindow, SendWindow

EAGER_OBJECTS_MAX: Final = 8192
"""More objects than this do not fit EAGER_BYTES_MAX in any case worth trying."""
RECORD_RAW_BYTES_GUESS: Final = 512
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

    def eager_records(self) -> list[bytes] | None:
        """All records when they come to at most EAGER_BYTES_MAX; else None, nothing changed."""
        if len(self.plan) > EAGER_OBJECTS_MAX:
            return None
        held = set(self._held)
        records, total = [], 0
        for record in self.records():
            records.append(record)
            total += len(record)
            if total > EAGER_BYTES_MAX:
                self._held, self.verbatim_count, self.reencoded_count = held, 0, 0
                return None
        return records

    def records(self) -> Iterator[bytes]:
        """Each planned record the peer lacks, bases before what needs them."""
        unsent = {
            short_key(planned.oid): planned
            for at, planned in enumerate(self.plan)
            if at not in self._skipped
        }
        for at, planned in enumerate(self.plan):
            if at not in self._skipped and short_key(planned.oid) in unsent:
                yield from self._with_bases(planned, unsent)

    def _with_bases(
        self, planned: PlannedObject, unsent: dict[bytes, PlannedObject]
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
            record = self._objects.stored_record(current.kind, current.oid)
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
    session: Session, outgoing: Outgoing, window: SendWindow, progress: SyncProgress
) -> None:
    """Send all records, never more unacknowledged than the window allows."""
    total = len(outgoing.plan)
    for joined, count in joined_records(outgoing.records()):
        while not window.has_room(len(joined)):
            _take_ack(window, await session.receive())
        while (message := session.poll()) is not None:
            _take_ack(window, message)
        window.sent(len(joined), count)
        await session.send(Records(joined))
        progress.transferred(window.records_sent, total, window.bytes_sent)
        await asyncio.sleep(0)


def _take_ack(window: SendWindow, message: Message) -> None:
    if not isinstance(message, Ack):
        raise ProtocolError(f"{message.TYPE.name} where ACK was due")
    window.acknowledged(message)


def joined_records(records: Iterable[bytes]) -> Iterator[tuple[bytes, int]]:
    """(payload of a RECORDS frame, records in it): small records joined, order kept."""
    parts: list[bytes] = []
    size = 0
    for record in records:
        if parts and size + len(record) > RECORDS_BYTES_JOINED:
            yield b"".join(parts), len(parts)
            parts, size = [], 0
        parts.append(record)
        size += len(record)
    if parts:
        yield b"".join(parts), len(parts)


# --- receiving ---------------------------------------------------------------------------------


class Incoming:
    """Puts records into quarantine, makes them durable in time and acknowledges them."""

    def __init__(
        self, session: Session, objects: ObjectStore, progress: SyncProgress, *, reveal: bool
    ) -> None:
        """`reveal`: may the inventory tell what the store holds, or only what was sent before?

        Adopts what cut sessions left, which may take long.
        """
        self.quarantine = Quarantine(objects)
        self.chunks: dict[ObjectId, int] = {}
        """Chunks of this session, decoded and hashed already, and their lengths in bytes."""
        self.window = ReceiveWindow(last_ack_s=time.monotonic())
        self.resumed_count = 0
        self._commit_keys: set[bytes] = set()
        self._hollow_keys: set[bytes] = set()
        self._objects = objects
        self._reveal = reveal
        self._session = session
        self._progress = progress
        self._planned = 0
        self._plan_total = 0

    def take_plan(self, plan: Plan) -> PlanReply:
        """The inventory of one page. Raises ProtocolError on pages that do not follow."""
        if plan.first_index != self._planned or (
            self._plan_total and plan.objects_total != self._plan_total
        ):
            raise ProtocolError("PLAN pages do not follow each other")
        self._planned += len(plan.kinds)
        self._plan_total = plan.objects_total
        if self._planned > plan.objects_total or (
            plan.last and self._planned != plan.objects_total
        ):
            raise ProtocolError("PLAN does not add up to its total")
        bitmap = bytearray((len(plan.kinds) + 7) // 8)
        for position, kind in enumerate(plan.kinds):
            key = plan.keys[KEY_BYTES * position : KEY_BYTES * (position + 1)]
            if kind == Kind.COMMIT:
                self._commit_keys.add(key)
            elif kind == HOLLOW_COMMIT:
                self._hollow_keys.add(key)
            if self.quarantine.has_key(key) or (self._reveal and self._objects.has_key(key)):
                bitmap[position // 8] |= 1 << position % 8
                self.resumed_count += 1
        return PlanReply(plan.first_index, len(plan.kinds), bytes(bitmap))

    def comes_complete(self, commit: ObjectId) -> bool:
        """Does the plan name the commit with its content?"""
        return short_key(commit) in self._commit_keys

    def comes_hollow(self, commit: ObjectId) -> bool:
        """Does the plan name the commit only as one without content?"""
        key = short_key(commit)
        return key in self._hollow_keys and key not in self._commit_keys

    async def next_message(self) -> Message:
        """The next message; what came before is made durable when it has to wait too long."""
        if self.window.bytes_received == self.window.bytes_durable:
            return await self._session.receive()
        try:
            return await asyncio.wait_for(self._session.receive(), ACK_INTERVAL_S)
        except TimeoutError:
            await self._acknowledge()
        return await self._session.receive()

    async def take(self, records: Records, *, acknowledge: bool) -> None:
        """Verify and keep the records of one frame; nobody waits for ACKs of an eager transfer.

        Raises:
            BadObject, HashMismatch, ObjectMissing: a record that is none, or lacks its base.
        """
        count = 0

        def steps() -> Steps:
            nonlocal count
            offset = 0
            while offset < len(records.joined):
                header, start, payload_bytes = parse_header(records.joined, offset)
                end = start + payload_bytes
                oid = self.quarantine.receive(records.joined[offset:end])
                if header.kind is Kind.CHUNK:
                    self.chunks[oid] = header.raw_bytes
                offset, count = end, count + 1
                yield

        await in_steps(steps())
        if count == 0:
            raise ProtocolError("RECORDS without a record")
        self.window.received(len(records.joined), count)
        if self.window.records_received > self._plan_total:
            raise ProtocolError("more records than planned")
        self._progress.transferred(
            self.window.records_received, self._plan_total, self.window.bytes_received
        )
        if acknowledge and self.window.is_ack_due(time.monotonic()):
            await self._acknowledge()

    async def _acknowledge(self) -> None:
        await in_thread(self.quarantine.sync)
        await self._session.send(self.window.made_durable(time.monotonic()))

    def check_count(self, records_sent: int) -> None:
        """Raises ProtocolError when not all records the peer sent have arrived."""
        if records_sent != self.window.records_received:
            raise ProtocolError(
                f"the peer sent {records_sent} records, {self.window.records_received} arrived"
            )


def prove_closure(
    incoming: Incoming, here: Holding, tips: Iterable[ObjectId]
) -> Generator[None, None, Arrivals]:
    """Prove that every commit reachable from `tips` is here, with all its objects by full id
    unless the plan calls it hollow, and that each new or changed file's size and content are what
    its chunks say. So too for hollow commits of ours that the plan names with content.

    Of each root the subdots are proven that `here` keeps. Whether a commit may be hollow is for
    the caller to judge.

    Raises:
        ObjectMissing, HashMismatch, BadObject: something is not there or not valid.
    """
    quarantine = incoming.quarantine
    new = yield from _new_commits(quarantine, here.graph.has, tips)
    deepened = sorted(filter(incoming.comes_complete, here.hollow), key=here.graph.generation)
    claimed = [*deepened, *(c for c in new if not incoming.comes_hollow(c))]

    def parents_of(commit: ObjectId) -> Sequence[ObjectId]:
        return new[commit] if commit in new else here.graph.parents(commit)

    children = complete_children(here, frozenset(deepened))
    scope = scope_of(here.subdots)
    known = ObjectSet()
    proven: set[FileKey] = set()
    for commit_id, base in comparisons(claimed, parents_of, here.has_content, children):
        commit = _read_commit(quarantine, commit_id)
        old = None if base is None else _read_commit(quarantine, base).root
        comparison = RootComparison(quarantine, old, commit.root, known, trusted=False, scope=scope)
        yield from comparison.steps()
        for chunk, (length, _) in comparison.added.chunks.items():
            _check_chunk(incoming, commit_id, chunk, length)
            yield
        for key, entry in comparison.added.files.items():
            if key not in proven:
                yield from check_content(quarantine, entry)
                proven.add(key)
        comparison.added.add_to(known)
    return Arrivals(tuple(new), tuple(claimed))


def _check_chunk(incoming: Incoming, commit: ObjectId, chunk: ObjectId, length: int) -> None:
    found = incoming.chunks.get(chunk)
    if found is None:
        if not incoming.quarantine.has(Kind.CHUNK, chunk):
            raise ObjectMissing(
                f"commit {commit.hex()[:12]} needs chunk {chunk.hex()[:12]}: never sent"
            )
        found = len(incoming.quarantine.read(Kind.CHUNK, chunk))
    if found != length:
        raise BadObject(
            f"commit {commit.hex()[:12]}: chunk {chunk.hex()[:12]} is {found} bytes long, "
            f"its span {length}"
        )


def _read_commit(quarantine: Quarantine, commit: ObjectId) -> Commit:
    return commit_from_bytes(quarantine.read(Kind.COMMIT, commit))


def _new_commits(
    quarantine: Quarantine, is_known: Callable[[ObjectId], bool], tips: Iterable[ObjectId]
) -> Generator[None, None, dict[ObjectId, tuple[ObjectId, ...]]]:
    """Unknown commits and their parents, in an order with parents first. Hashes rule out cycles."""
    order: dict[ObjectId, tuple[ObjectId, ...]] = {}
    parents: dict[ObjectId, tuple[ObjectId, ...]] = {}
    stack = list(tips)
    while stack:
        commit = stack[-1]
        if commit in order or (commit not in parents and is_known(commit)):
            stack.pop()
            continue
        if commit not in parents:
            parents[commit] = _read_commit(quarantine, commit).parents
            yield
        waiting = [p for p in parents[commit] if p not in order and not is_known(p)]
        if waiting:
            stack.extend(waiting)
            continue
        stack.pop()
        order[commit] = parents[commit]
    return order
