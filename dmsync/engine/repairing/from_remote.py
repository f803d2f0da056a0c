"""Objects that a remote has of a dot and this store has lost: an ordinary FETCH of the content of
the commits that need them (WIRE.md 5.7), whose inventory says what is here."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from dmsync.core.ids import Kind, ObjectId
from dmsync.engine.background import in_thread
from dmsync.engine.fsck import Harm
from dmsync.engine.ports import ByteStream
from dmsync.engine.progress import Progress
from dmsync.engine.session import Session
from dmsync.engine.store import Store
from dmsync.engine.sync_incoming import Incoming
from dmsync.engine.sync_opening import Greeted, open_dot
from dmsync.errors import DotNotFound, ProtocolError
from dmsync.storage.catalog import DotRow
from dmsync.wire.connection import Role
from dmsync.wire.limits import CONTENT_MAX, WANTS_MAX
from dmsync.wire.messages import Done, Fetch, Intent, Plan, Records, Refs, Signatures

TRANSFER_BYTES = 16


@dataclass(frozen=True)
class Asked:
    """What one FETCH brings: the content of commits, parents first, and tag objects."""

    commits: Sequence[ObjectId]
    tags: Sequence[ObjectId]

    def halves(self) -> "list[Asked]":
        """For a remote that is harmed itself: what it cannot read must not keep the rest."""
        half = len(self.commits) // 2
        if not half:
            return [Asked(self.commits, ()), Asked((), self.tags)] if self.tags else []
        return [Asked(self.commits[:half], ()), Asked(self.commits[half:], self.tags)]


def questions(harm: Harm) -> list[Asked]:
    """What has to be asked to heal, as many at a time as a message holds."""
    tags = [oid for oid, kind in harm.objects.items() if kind is Kind.TAG][:WANTS_MAX]
    batches = [
        Asked(harm.commits[first : first + CONTENT_MAX], ())
        for first in range(0, len(harm.commits), CONTENT_MAX)
    ]
    return [*batches, Asked((), tags)] if tags else batches


async def bring(
    store: Store,
    stream: ByteStream,
    dot: DotRow,
    names: tuple[str | None, str | None],
    asked: Asked,
    progress: Progress,
    greeted: Greeted | None = None,
) -> int:
    """Fetch over `stream`, verify and keep, durably; returns how many records came.

    `names`: namespace and name over there, for a remote that knows the dot under another one.

    Raises:
        DotNotFound: the remote has no such dot, or not for us.
        NetworkError, ProtocolError, and what the remote could not read (Corruption and such).
    """
    async with Session(stream, Role.CLIENT) as session:
        ask = Refs(dot.dot, names[0], names[1], Intent.PULL)
        remote, _ = await open_dot(session, store, ask, (), greeted, is_partial=True)
        if remote.dot != dot.dot:
            raise DotNotFound(f"the remote does not have dot {dot.name}, or not for you")
        incoming = await in_thread(
            partial(Incoming, session, store.objects(dot.dot), progress, reveal=True)
        )
        try:
            await _receive(session, incoming, _message(store, dot, asked, remote.tips()))
            await in_thread(incoming.quarantine.promote)
            return incoming.window.records_received
        finally:
            await incoming.close()


def _message(store: Store, dot: DotRow, asked: Asked, tips: Sequence[ObjectId]) -> Fetch:
    """Claims to hold all commits but those asked for: theirs are the harmed ones."""
    frontier = tuple(tip for tip in tips if store.catalog.has_commit(dot.dot, tip))
    subdots = store.catalog.scope(dot.dot)
    transfer = os.urandom(TRANSFER_BYTES)
    return Fetch(
        transfer, dot.dot, tuple(asked.tags), frontier, 0, tuple(asked.commits), (), subdots
    )


async def _receive(session: Session, incoming: Incoming, ask: Fetch) -> None:
    await session.send(ask)
    is_eager = False
    while True:
        message = await incoming.next_message()
        match message:
            case Plan():
                reply = incoming.take_plan(message)
                if not message.eager:
                    await session.send(reply)
                is_eager = message.eager
            case Records():
                await incoming.take(message, acknowledge=not is_eager)
            case Signatures():
                pass  # they are in the log, which objects are not
            case Done():
                incoming.check_count(message.records_sent)
                await incoming.settle()
                return
            case _:
                raise ProtocolError(f"{message.TYPE.name} within a fetch")
