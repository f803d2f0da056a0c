"""Receiving a stream of records: quarantine, durable in time, and the proof of closure at the end
(WIRE.md 5.2, 5.3).

Frames are verified in a thread while the session reads on, and made durable in another while more
are verified.
"""

import asyncio
import time
from array import array
from bisect import bisect_left
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Final

from dmsync.core.ids import KEY_BYTES, Kind, ObjectId, short_key
from dmsync.core.objects import Commit, commit_from_bytes
from dmsync.engine.background import end_of, in_thread, steps_in_thread
from dmsync.engine.content_checks import check_content
from dmsync.engine.progress import Progress
from dmsync.engine.session import Session
from dmsync.engine.sync_hollow import (
    Arrivals,
    Holding,
    comparisons,
    complete_children,
    scope_of,
)
from dmsync.engine.sync_objects import FileKey, ObjectSet, RootComparison
from dmsync.errors import BadObject, ObjectMissing, ProtocolError
from dmsync.storage.object_store import ObjectStore
from dmsync.storage.quarantine import Quarantine
from dmsync.wire.limits import ACK_INTERVAL_S, PLAN_OBJECTS_MAX
from dmsync.wire.messages import HOLLOW_COMMIT, Message, Plan, PlanReply, Records
from dmsync.wire.windows import ReceiveWindow

_KEY_PARTS: Final = 256


class PlannedKeys:
    """The short keys that a plan names, in eight bytes each."""

    def __init__(self) -> None:
        # Apart by their lowest bits: sorting makes objects of numbers, so not of all at once.
        self._parts = [array("Q") for _ in range(_KEY_PARTS)]
        self._unsorted: set[int] = set()

    def add(self, keys: bytes) -> None:
        """Add joined keys."""
        for number in array("Q", keys):
            which = number % _KEY_PARTS
            self._parts[which].append(number)
            self._unsorted.add(which)

    def __contains__(self, key: object) -> bool:
        if not isinstance(key, bytes):
            return False
        number = array("Q", key)[0]
        which = number % _KEY_PARTS
        if which in self._unsorted:
            self._parts[which] = array("Q", sorted(self._parts[which]))
            self._unsorted.discard(which)
        part = self._parts[which]
        at = bisect_left(part, number)
        return at < len(part) and part[at] == number


class Incoming:
    """Puts records into quarantine, makes them durable in time and acknowledges them."""

    def __init__(
        self, session: Session, objects: ObjectStore, progress: Progress, *, reveal: bool
    ) -> None:
        """`reveal`: may the inventory tell what the store holds, or only what was sent before?

        Adopts what cut sessions left, which may take long.
        """
        self.quarantine = Quarantine(objects)
        self.chunks: dict[ObjectId, int] = {}
        """Chunks of this session, decoded and hashed already, and their lengths in bytes."""
        self.window = ReceiveWindow(last_ack_s=time.monotonic())
        self.resumed_count = 0
        self._commit_keys = PlannedKeys()
        self._hollow_keys = PlannedKeys()
        self._expected = PlannedKeys()
        self._reveal = reveal
        self._session = session
        self._progress = progress
        self._planned = 0
        self._plan_total = 0
        self._acknowledging: asyncio.Task[None] | None = None

    def take_plan(self, plan: Plan) -> PlanReply:
        """The inventory of one page. Raises ProtocolError on pages that do not follow, and on
        plans of too much."""
        if plan.objects_total > PLAN_OBJECTS_MAX:
            raise ProtocolError(f"PLAN of more than {PLAN_OBJECTS_MAX} objects")
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
        self._expected.add(plan.keys)
        keys = [plan.keys[at : at + KEY_BYTES] for at in range(0, len(plan.keys), KEY_BYTES)]
        for kind, key in zip(plan.kinds, keys, strict=True):
            if kind == Kind.COMMIT:
                self._commit_keys.add(key)
            elif kind == HOLLOW_COMMIT:
                self._hollow_keys.add(key)
        # nobody waits for the inventory of an eager plan
        here = set() if plan.eager else self.quarantine.keys_here(keys, stored=self._reveal)
        bitmap = bytearray((len(keys) + 7) // 8)
        for position, key in enumerate(keys):
            if key in here:
                bitmap[position // 8] |= 1 << position % 8
                self.resumed_count += 1
        if plan.last:
            self._progress.phase("receiving", items_total=self._planned - self.resumed_count)
        return PlanReply(plan.first_index, len(keys), bytes(bitmap))

    def comes_complete(self, commit: ObjectId) -> bool:
        """Does the plan name the commit with its content?"""
        return short_key(commit) in self._commit_keys

    def comes_hollow(self, commit: ObjectId) -> bool:
        """Does the plan name the commit only as one without content?"""
        key = short_key(commit)
        return key in self._hollow_keys and key not in self._commit_keys

    async def next_message(self) -> Message:
        """The next message; what came before is made durable when it has to wait too long.

        Raises:
            StorageFull, StorageFailed: what came before could not be made durable.
        """
        while True:
            if self._acknowledging is not None and self._acknowledging.done():
                await self.settle()
            is_durable = self._acknowledging is None and not self.window.waiting_bytes
            if is_durable or self._session.has_arrived:
                return await self._session.receive()
            arrived = await self._session.arrival(ACK_INTERVAL_S)
            if not arrived and self._acknowledging is None:
                await self._acknowledge()

    async def take(self, records: Records, *, acknowledge: bool) -> None:
        """Verify and keep the records of one frame; nobody waits for ACKs of an eager transfer.

        Raises:
            BadObject, HashMismatch, ObjectMissing: a record that is none, or lacks its base.
        """
        received = await steps_in_thread(
            self.quarantine.receive_joined(records.joined, self._expected)
        )
        for kind, oid, length in received:
            if short_key(oid) not in self._expected:
                raise ProtocolError("a record of something that the plan does not name")
            if kind is Kind.CHUNK:
                self.chunks[oid] = length
        if not received:
            raise ProtocolError("RECORDS without a record")
        self.window.received(len(records.joined), len(received))
        if self.window.records_received > self._plan_total:
            raise ProtocolError("more records than planned")
        self._progress.reached(self.window.bytes_received, self.window.records_received)
        is_due = self._acknowledging is None and self.window.is_ack_due(time.monotonic())
        if acknowledge and is_due:
            await self._acknowledge()

    async def _acknowledge(self) -> None:
        """Begin to make durable what came so far; the ACK follows, while more is received."""
        mark = self.window.mark()
        finish_sync = await in_thread(self.quarantine.begin_sync)

        async def finish() -> None:
            try:
                await in_thread(finish_sync)
                await self._session.send(self.window.made_durable(time.monotonic(), mark))
            finally:
                self._session.wake()

        self._acknowledging = asyncio.create_task(finish())

    async def settle(self) -> None:
        """Wait for the ACK under way, if there is one: nothing may be closed under it.

        Raises:
            StorageFull, StorageFailed: it could not be given. NetworkError: nobody takes it.
        """
        acknowledging, self._acknowledging = self._acknowledging, None
        if acknowledging is not None:
            try:
                await asyncio.shield(acknowledging)
            except asyncio.CancelledError:
                await end_of(acknowledging)
                raise

    async def close(self) -> None:
        """Keep what came for a later session and let go of it, however this one went."""
        if self._acknowledging is not None:
            await end_of(self._acknowledging)
        await in_thread(self.quarantine.close)

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
