"""Serving one session: answers a client's questions, receives its pushes, sends what it fetches.

Everything a client may do passes `Access` first; a dot that is absent and one the client may not
read are answered alike. Refs are checked and moved in one transaction, after closure is proven.
"""

import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from dmsync.core.events import DotCreated, Event
from dmsync.core.ids import DotId, ObjectId
from dmsync.core.names import full_name
from dmsync.engine.background import in_thread, steps_in_thread
from dmsync.engine.ports import Access, ByteStream, SyncStore, TargetTree, Verb
from dmsync.engine.progress import SILENT
from dmsync.engine.quotas import Allowance, claim_unmade, forget_claim, trashed_bytes
from dmsync.engine.refusals import note_refusal
from dmsync.engine.session import Session, in_steps
from dmsync.engine.sharing import add_collaborator, remove_collaborator
from dmsync.engine.sync_hollow import (
    Arrivals,
    Holding,
    holding_of,
    is_hollow_here,
    scope_of,
    select_for_fetch,
)
from dmsync.engine.sync_incoming import Incoming, prove_closure
from dmsync.engine.sync_opening import (
    NoCommits,
    graph_of,
    hello,
    knows_tags,
    ref_target,
    require_hollow,
)
from dmsync.engine.sync_records import (
    Outgoing,
    send_eagerly,
    send_plan_and_wait,
    send_records,
)
from dmsync.engine.sync_refs import (
    Decision,
    decide,
    early_divergence,
    shown_ref,
    stash_name,
    tree_events,
)
from dmsync.engine.sync_tags import (
    ReceivedSignatures,
    advertised_tags,
    is_here,
    received_tag,
    signature_pages,
    tags_to_send,
)
from dmsync.engine.tags import peel
from dmsync.engine.transfers import TransferLog
from dmsync.errors import (
    AccessDenied,
    ContentAbsent,
    DmError,
    DotIdClash,
    DotNotFound,
    NetworkError,
    ProtocolError,
    QuotaExceeded,
    RefConflict,
)
from dmsync.storage.catalog import DotRow
from dmsync.wire.connection import Role
from dmsync.wire.limits import (
    DOTS_PAGE_MAX,
    INFLIGHT_BYTES_MAX,
    REFS_PAGE_MAX,
    WORK_BYTES_PER_S,
    WORK_TIMEOUT_S,
)
from dmsync.wire.messages import (
    Done,
    DotsReply,
    DotValue,
    Fetch,
    Intent,
    Known,
    KnownQuery,
    KnownReply,
    ListDots,
    Message,
    Plan,
    Push,
    Ready,
    Records,
    RefMode,
    Refs,
    RefsReply,
    RefUpdate,
    RefValue,
    Result,
    Share,
    ShareAction,
    Shared,
    Signatures,
    Update,
)
from dmsync.wire.windows import SendWindow


async def serve(
    store: SyncStore, stream: ByteStream, access: Access, hooks: TargetTree | None = None
) -> None:
    """Serve one session until the client leaves.

    Raises:
        DmError: what ended the session; the client was told. NetworkError: the client vanished.
    """
    async with Session(stream, Role.SERVER) as session:
        await session.send(hello(store, login=access.login))
        await _Server(store, session, access, hooks or TargetTree()).run()


_PUSHED_SPACES: Final = ("branch/", "tag/")
"""The rest is the server's own: where its remotes are, and what it keeps aside."""


@dataclass(slots=True)
class _Named:
    """The dot that REFS named, and where it is: where asked for, if `row` is None (not here, or
    not for this client)."""

    row: DotRow | None
    namespace: str
    name: str | None


class _Server:
    def __init__(
        self, store: SyncStore, session: Session, access: Access, hooks: TargetTree
    ) -> None:
        self._store = store
        self._session = session
        self._access = access
        self._hooks = hooks
        self._named = _Named(None, access.default_namespace, None)

    async def run(self) -> None:
        while (message := await self._session.next_request()) is not None:
            match message:
                case Refs():
                    await self._answer_refs(message)
                case ListDots():
                    await self._answer_dots()
                case KnownQuery():
                    await self._answer_known(message)
                case Push():
                    self._look_again()
                    await _Reception(
                        self._store, self._session, self._access, self._hooks, self._named
                    ).run(message)
                case Fetch():
                    await self._answer_fetch(message)
                case Share():
                    await self._answer_share(message)
                case _:
                    self._ignore(message)

    def _ignore(self, message: Message) -> None:
        if message.TYPE.name not in ("HELLO", "ACK"):
            raise ProtocolError(f"{message.TYPE.name} outside a transfer")

    # --- questions --------------------------------------------------------------------------

    def _may(self, row: DotRow, verb: Verb) -> bool:
        return self._access.may(row.namespace, row.name, verb)

    async def _answer_refs(self, ask: Refs) -> None:
        self._named = self._find(ask)
        row = self._named.row
        catalog = self._store.catalog
        hollow = row is not None and catalog.has_hollow_commits(row.dot)
        subdots = None if row is None else catalog.scope(row.dot)
        if hollow or subdots is not None:
            require_hollow(self._session.connection.peer)
        refs = [] if row is None else self._advertised(row.dot)
        head = None if row is None else catalog.head(row.dot)
        for first in range(0, max(1, len(refs)), REFS_PAGE_MAX):
            await self._session.send(
                RefsReply(
                    row.dot if row else None,
                    self._named.namespace,
                    self._named.name,
                    self._access.default_namespace,
                    self._access.user,
                    head,
                    catalog.last_seq(),
                    catalog.epoch(),
                    tuple(refs[first : first + REFS_PAGE_MAX]),
                    hollow,
                    subdots,
                    last=first + REFS_PAGE_MAX >= len(refs),
                )
            )

    def _find(self, ask: Refs) -> _Named:
        """The dot asked for. Raises DotIdClash when the name stands for another dot."""
        catalog = self._store.catalog
        namespace = ask.namespace or self._access.default_namespace
        # A name is judged before it is looked up, and looked up either way: who may not read it
        # sees and waits for the same whether or not there is such a dot.
        may_read_name = ask.name is None or self._access.may(namespace, ask.name, "read")
        by_name = catalog.dot_by_name(namespace, ask.name) if ask.name else None
        by_id = catalog.dot(ask.dot) if ask.dot else None
        if ask.name and not may_read_name:
            note_refusal(self._access, "read", namespace, ask.name, AccessDenied.code)
            by_name = None
        if by_id is not None and (by_id.trash is not None or not self._may(by_id, "read")):
            by_id = None
        if by_name is not None and ask.dot is not None and by_name.dot != ask.dot:
            raise DotIdClash(
                f"Cannot reconcile {full_name(namespace, by_name.name)} here with the dot of "
                f"that name there: two dots, {by_name.dot.hex()[:12]} and {ask.dot.hex()[:12]}",
                hint="push under another name (--remote-name), or rename one of them",
                existing=by_name.dot.hex(),
                dot=ask.dot.hex(),
            )
        if ask.intent is Intent.PUSH and ask.name and by_name is None and by_id is not None:
            raise DotIdClash(
                f"Cannot reconcile {full_name(namespace, ask.name)}: this dot is here already, "
                f"as {full_name(by_id.namespace, by_id.name)}",
                hint=f"push to {full_name(by_id.namespace, by_id.name)}",
                existing_name=full_name(by_id.namespace, by_id.name),
            )
        row = by_name or (None if ask.name else by_id)
        if row is not None:  # whoever names a dot by its id may say anything of its namespace
            return _Named(row, row.namespace, row.name)
        return _Named(None, namespace, ask.name)

    def _advertised(self, dot: DotId) -> list[RefValue]:
        """Branches, tags and stashes by name; tracking refs are nobody else's business."""
        others = [
            RefValue(row.name, row.target, row.origin)
            for row in self._store.catalog.refs(dot)
            if not row.name.startswith(("remote/", "tag/"))
        ]
        annotated = knows_tags(self._session.connection.peer)
        tags = advertised_tags(self._store, dot, annotated=annotated)
        return sorted([*others, *tags], key=lambda value: value.name)

    async def _answer_dots(self) -> None:
        catalog = self._store.catalog
        dots = [
            DotValue(
                row.dot,
                row.namespace,
                row.name,
                catalog.head(row.dot),
                len(catalog.branches(row.dot)),
            )
            for row in catalog.dots()
            if self._may(row, "read")
        ]
        for first in range(0, max(1, len(dots)), DOTS_PAGE_MAX):
            page = tuple(dots[first : first + DOTS_PAGE_MAX])
            last = first + DOTS_PAGE_MAX >= len(dots)
            await self._session.send(DotsReply(self._access.default_namespace, page, last=last))

    def _look_again(self) -> None:
        """A dot may be renamed or deleted within a session."""
        if self._named.row is None:
            return
        row = self._store.catalog.dot(self._named.row.dot)
        if row is None or row.trash is not None:
            self._named = _Named(None, self._named.namespace, self._named.name)
        else:
            self._named = _Named(row, row.namespace, row.name)

    def _readable_row(self) -> DotRow | None:
        """The dot that REFS named, if it is still to be read: access may end within a session."""
        self._look_again()
        row = self._named.row
        return row if row is not None and self._may(row, "read") else None

    async def _answer_share(self, ask: Share) -> None:
        users = await in_thread(partial(self._share, ask))
        await self._session.send(Shared(tuple(users)))

    def _share(self, ask: Share) -> list[str]:
        """The collaborators afterwards. Raises DotNotFound, AccessDenied, NotFound, UsageError."""
        row = self._readable_row()
        if row is None:
            raise DotNotFound("no such dot here, or not for you")
        if not self._may(row, "share"):
            note_refusal(self._access, "share", row.namespace, row.name, AccessDenied.code)
            raise AccessDenied(
                f"You are not the owner of {full_name(row.namespace, row.name)}. "
                "Only the owner can share it."
            )
        actor = self._access.actor
        if ask.action is ShareAction.ADD and ask.user:
            add_collaborator(self._store, row, ask.user, actor)
        elif ask.action is ShareAction.REMOVE and ask.user:
            remove_collaborator(self._store, row, ask.user, actor)
        return self._store.catalog.collaborators(row.dot)

    async def _answer_known(self, ask: KnownQuery) -> None:
        row = self._readable_row()
        here = Holding(NoCommits()) if row is None else holding_of(self._store, row.dot)
        states = bytes(map(partial(_known_state, here), ask.ids))
        await self._session.send(KnownReply(states))

    # --- fetch ------------------------------------------------------------------------------

    async def _answer_fetch(self, ask: Fetch) -> None:
        row = self._readable_row()
        if row is None or row.dot != ask.dot:
            raise DotNotFound("no such dot here, or not for you")
        objects = self._store.objects(row.dot)
        await in_thread(objects.hold.acquire)
        try:
            await self._send_wanted(ask, row)
        finally:
            objects.hold.release()

    async def _send_wanted(self, ask: Fetch, row: DotRow) -> None:
        here = holding_of(self._store, row.dot)
        wants = [want for want in ask.wants if here.graph.has(want)]
        asked_tags = [want for want in ask.wants if not here.graph.has(want)]
        tags = await in_thread(
            partial(tags_to_send, self._store, row.dot, asked_tags, wants, ask.frontier)
        )
        ask = replace(ask, wants=tuple(wants))
        selection = await in_thread(partial(select_for_fetch, here, ask))
        outgoing = Outgoing(self._store.objects(row.dot))
        await in_steps(outgoing.add(selection, scope_of(ask.subdots)))
        outgoing.add_tags(tags)
        window = SendWindow()
        await send_outgoing(self._session, outgoing, window)
        sent = [*selection.listed, *(commit for commit, _ in selection.complete), *tags]
        await self._session.send(
            *await in_thread(partial(self._signatures, ask, sent)),
            Done(
                ask.transfer,
                window.records_sent,
                outgoing.verbatim_count,
                outgoing.reencoded_count,
            ),
        )

    def _signatures(self, ask: Fetch, sent: list[ObjectId]) -> list[Signatures]:
        if not knows_tags(self._session.connection.peer):
            return []
        return list(signature_pages(self._store, ask.dot, ask.transfer, sent))


def _known_state(here: Holding, commit: ObjectId) -> Known:
    if not here.graph.has(commit):
        return Known.ABSENT
    return Known.RECORD_ONLY if commit in here.hollow else Known.CONTENT


async def send_outgoing(session: Session, outgoing: Outgoing, window: SendWindow) -> None:
    """Plan and records: all at once when small, else what the receiver's inventory lacks."""
    if await in_thread(outgoing.is_small):
        await session.send(*outgoing.pages(eager=True))
        await send_eagerly(session, outgoing, window)
    else:
        await send_plan_and_wait(session, outgoing)
        await send_records(session, outgoing, window, SILENT)


class _Reception:
    """One push, from PUSH to RESULT."""

    def __init__(
        self,
        store: SyncStore,
        session: Session,
        access: Access,
        hooks: TargetTree,
        named: _Named,
    ) -> None:
        self._store = store
        self._session = session
        self._access = access
        self._hooks = hooks
        self._named = named
        self._incoming: Incoming | None = None
        self._signatures = ReceivedSignatures()
        self._tags: dict[ObjectId, ObjectId] = {}
        """Annotated tags that came, and the commits they name."""
        self._log = TransferLog(
            store,
            direction="receive",
            remote=access.user,
            command="receive-push",
            actor=access.actor,
        )

    async def run(self, push: Push) -> None:
        await in_thread(partial(self._begin, push))
        objects = self._store.objects(push.dot)
        await in_thread(objects.hold.acquire)
        try:
            await self._run_held(push)
        finally:
            objects.hold.release()

    async def _run_held(self, push: Push) -> None:
        """What came and what it is based on may not go before it is recorded."""
        await self._session.send(Ready(push.transfer, INFLIGHT_BYTES_MAX))
        try:
            incoming = await in_thread(partial(self._open_quarantine, push))
            update = await self._receive(push, incoming)
            await self._conclude(push, update, incoming)
        except DmError as exc:
            await in_thread(partial(self._refused_meanwhile, exc))
            await in_thread(partial(self._log.record_failure, exc))
            raise
        finally:
            await self._close()

    def _begin(self, push: Push) -> None:
        deleted = self._admit(push)
        self._allowance = Allowance(self._store, self._named.namespace)
        if deleted is not None:
            self._revive(push, deleted)
        self._log.dot = push.dot
        self._log.branch = next((u.ref.partition("/")[2] for u in push.updates), None)
        self._refuse_early(push)

    def _open_quarantine(self, push: Push) -> Incoming:
        if self._named.row is None:
            claim_unmade(self._store, push.dot, self._named.namespace)
        reveal = self._named.row is not None and self._may("read")
        objects = self._store.objects(push.dot)
        self._incoming = Incoming(self._session, objects, SILENT, reveal=reveal)
        return self._incoming

    async def _close(self) -> None:
        await in_thread(self._log.close)
        if self._incoming is not None:
            await self._incoming.close()

    def _refused_meanwhile(self, error: DmError) -> None:
        """What does not fit is thrown away: it would stand in the way of what does."""
        if not isinstance(error, QuotaExceeded):
            return
        self._note_refusal("append", error.code)
        if self._incoming is not None:
            self._incoming.quarantine.discard()

    def _note_refusal(self, verb: str, why: str) -> None:
        note_refusal(self._access, verb, self._named.namespace, self._named.name or "", why)

    # --- before data ------------------------------------------------------------------------

    def _may(self, verb: Verb) -> bool:
        return self._access.may(self._named.namespace, self._named.name or "", verb)

    def _admit(self, push: Push) -> DotRow | None:
        """Refuse what the client may not do. Returns the deleted dot that is to come back.

        Raises AccessDenied, DotNotFound, DotIdClash, ProtocolError.
        """
        for update in push.updates:
            if not update.ref.startswith(_PUSHED_SPACES):
                raise ProtocolError(f"PUSH of {update.ref}: neither a branch nor a tag")
        row, namespace = self._named.row, push.namespace or self._access.default_namespace
        if row is None:
            self._named = _Named(None, namespace, push.name)
            if not push.create:
                raise DotNotFound(f"no dot {full_name(namespace, push.name)} here, or not for you")
            if not self._may("append"):
                self._note_refusal("create", AccessDenied.code)
                raise AccessDenied(
                    f"{self._access.user} may not create dots in namespace {namespace}"
                )
            self._check_allowed(push)
            deleted = self._store.catalog.dot(push.dot)
            is_free = self._store.catalog.dot_by_name(namespace, push.name) is None
            if deleted and deleted.trash and is_free and self._may_revive(deleted, namespace):
                return deleted
            self._refuse_clash(push, namespace)
            return None
        if row.dot != push.dot:
            raise ProtocolError("PUSH names another dot than REFS")
        self._check_allowed(push)
        return None

    def _revive(self, push: Push, deleted: DotRow) -> None:
        """Take a deleted dot out of the trash, if its namespace has room for it."""
        namespace, trash = self._named.namespace, deleted.trash or ""
        self._allowance.check_coming(trashed_bytes(self._store, trash))
        self._hooks.revive(self._store, push.dot, namespace, push.name, self._access.actor)
        row = self._store.catalog.dot(push.dot)
        self._named = _Named(row, namespace, push.name)

    def _may_revive(self, deleted: DotRow, namespace: str) -> bool:
        """A deleted dot comes back for who might have pushed to it under the name it had."""
        return deleted.namespace == namespace and self._access.may(
            deleted.namespace, deleted.name, "append"
        )

    def _check_allowed(self, push: Push) -> None:
        """Raises AccessDenied. Asked again at the end: access may end during a long push."""
        verb: Verb = "append"
        if any(update.mode in (RefMode.LEASE, RefMode.STASH) for update in push.updates):
            verb = "write"  # both move a branch off what it holds
        if self._may(verb):
            return
        self._note_refusal(verb, AccessDenied.code)
        shown = full_name(self._named.namespace, self._named.name or "")
        if not self._may("read"):  # it may not even know that there is such a dot
            raise DotNotFound(f"no dot {shown} here, or not for you")
        raise AccessDenied(f"{self._access.user} may not {verb} to {shown}")

    def _check_still_here(self, push: Push) -> None:
        """Raises DotNotFound for a dot that was deleted during the push."""
        row = self._store.catalog.dot(push.dot)
        if self._named.row is not None and (row is None or row.trash is not None):
            shown = full_name(self._named.namespace, self._named.name or "")
            raise DotNotFound(f"{shown} was deleted here meanwhile")

    def _refuse_clash(self, push: Push, namespace: str) -> None:
        catalog = self._store.catalog
        taken = catalog.dot_by_name(namespace, push.name) or catalog.dot(push.dot)
        if taken is not None:
            raise DotIdClash(
                f"Cannot reconcile {full_name(namespace, push.name)}: "
                "the name or the dot is in use here",
                hint="push under another name (--remote-name)",
            )

    def _refuse_early(self, push: Push) -> None:
        """Say before data is sent what would be refused after it."""
        if self._named.row is None:
            return
        graph = graph_of(self._store, push.dot)
        frontier = [commit for commit in push.frontier if graph.has(commit)]
        for update in push.updates:
            current = ref_target(self._store, push.dot, update.ref)
            if current is None or current == update.new:
                continue
            if update.mode is RefMode.FF and not graph.has(update.new):
                error = early_divergence(graph, update, current, frontier)
                if error is not None and (push.atomic or len(push.updates) == 1):
                    raise error
            if update.mode is not RefMode.STASH and self._may_move(update, current):
                self._refuse_dirty(push.dot, update.ref)

    def _may_move(self, update: RefUpdate, current: ObjectId) -> bool:
        """False when it is plain that the update leaves the ref where it is."""
        graph = self._store.catalog.graph(self._named.row.dot) if self._named.row else None
        if graph is None or not graph.has(update.new):
            return True
        return decide(graph, update, current, lambda ref: ref).moves

    def _refuse_dirty(self, dot: DotId, ref: str) -> None:
        space, _, branch = ref.partition("/")
        if space == "branch":
            self._hooks.refuse_if_dirty(self._store, dot, branch)

    # --- data -------------------------------------------------------------------------------

    async def _receive(self, push: Push, incoming: Incoming) -> Update:
        """Plan, records and signatures, up to UPDATE."""
        eager = False
        while True:
            message = await incoming.next_message()
            match message:
                case Plan():
                    eager = message.eager
                    self._allowance.check_announced(message.objects_total)
                    if not eager:
                        reply = incoming.take_plan(message)
                        if message.last and message.objects_total:
                            await in_thread(self._log.record_start)
                        await self._session.send(reply)
                    else:
                        incoming.take_plan(message)
                case Records():
                    self._log.has_moved = True
                    if self._allowance.is_measure_due(len(message.joined)):
                        await in_thread(self._allowance.measure)
                    await incoming.take(message, acknowledge=not eager)
                case Signatures():
                    self._signatures.take(message, push.transfer)
                case Update():
                    incoming.check_count(message.records_sent)
                    await incoming.settle()
                    return message
                case _:
                    raise ProtocolError(f"{message.TYPE.name} within a push")

    def _check_worth_while(self, arrived_bytes: int) -> Callable[[], None]:
        """What ends the proof of a push whose client left, or no longer waits (WIRE.md 7). A few
        pages that name each other again and again make files that nobody reads to their end."""
        most_s = WORK_TIMEOUT_S + arrived_bytes / WORK_BYTES_PER_S
        until_s = time.monotonic() + most_s

        def check() -> None:
            self._session.check_peer()
            if time.monotonic() > until_s:
                raise NetworkError(f"what came takes more than {most_s:.0f} s to prove")

        return check

    async def _conclude(self, push: Push, update: Update, incoming: Incoming) -> None:
        """Prove closure, then record everything and answer."""
        if update.transfer != push.transfer:
            raise ProtocolError("UPDATE of another transfer")
        await in_thread(self._allowance.measure)
        here = holding_of(self._store, push.dot)
        self._tags = {
            update.new: tag.target
            for update in push.updates
            if not here.graph.has(update.new)
            and (tag := received_tag(incoming.quarantine, update.ref, update.new)) is not None
        }
        tips = [self._tags.get(update.new, update.new) for update in push.updates]
        proof = prove_closure(incoming, here, tips)
        arrivals = await steps_in_thread(
            proof, self._check_worth_while(incoming.quarantine.bytes_held)
        )
        self._signatures.check(is_here(here.graph, incoming.quarantine, arrivals.new))
        decisions = await in_thread(partial(self._record, push, arrivals, incoming))
        catalog = self._store.catalog
        outcomes = tuple(decision.outcome() for decision in decisions)
        await self._session.send(
            Result(
                push.transfer,
                outcomes,
                catalog.last_seq(),
                catalog.epoch(),
                arrivals.hollow_count,
            )
        )

    def _record(self, push: Push, arrivals: Arrivals, incoming: Incoming) -> list[Decision]:
        """Promote, move refs in one transaction, then the trees."""
        self._check_allowed(push)
        self._check_still_here(push)
        if arrivals or self._tags:
            incoming.quarantine.promote()
        with ExitStack() as locked:
            if self._named.row is not None:
                locked.enter_context(self._hooks.locked(self._store, push.dot))
            decisions = self._move_refs(push, arrivals, incoming)
            self._hooks.finish_switches(self._store, push.dot)
        if self._named.row is None:
            forget_claim(self._store, push.dot)
        return decisions

    def _dirty_tips(self, push: Push) -> dict[str, ObjectId]:
        """Uncommitted state on the branches about to move: refused, or kept by a stash."""
        tips: dict[str, ObjectId] = {}
        for update in push.updates:
            space, _, branch = update.ref.partition("/")
            current = ref_target(self._store, push.dot, update.ref)
            if space != "branch" or current is None or not self._may_move(update, current):
                continue
            if update.mode is RefMode.STASH:
                saved = self._hooks.save_dirty(self._store, push.dot, branch)
                if saved is not None:
                    tips[update.ref] = saved
            else:
                self._hooks.refuse_if_dirty(self._store, push.dot, branch)
        return tips

    def _move_refs(self, push: Push, arrivals: Arrivals, incoming: Incoming) -> list[Decision]:
        """Record commits and refs, or nothing when nothing changes or `atomic` forbids it."""
        dirty = self._dirty_tips(push) if self._named.row is not None else {}
        catalog = self._store.catalog
        if not arrivals and not self._anything_moves(push):
            return self._decide_all(push, dirty)
        with catalog.transaction(self._log.command, self._log.actor, op_id=push.op) as tx:
            if tx.already_applied is not None:
                # appending would do nothing, and the answer would say that refs moved
                raise RefConflict("this very push was recorded before", hint="push again")
            for event in self._creation(push):
                tx.append(event)
            for event in arrivals.events(push.dot, self._log.id):
                tx.append(event)
            for event in self._signatures.events(catalog, push.dot):
                tx.append(event)
            decisions = self._decide_all(push, dirty)
            self._refuse_hollow(push.dot, decisions)
            for decision in decisions:
                for change in decision.events(push.dot, "push", f"push by {self._log.actor}"):
                    tx.append(change)
                for event in tree_events(self._hooks, self._store, push.dot, decision):
                    tx.append(event)
            for event in self._log.finish_events("done", _summary(decisions, arrivals, incoming)):
                tx.append(event)
        self._log.finished()
        return decisions

    def _refuse_hollow(self, dot: DotId, decisions: list[Decision]) -> None:
        """A ref may name only what is here with its content. Raises ContentAbsent."""
        for decision in decisions:
            if not decision.moves:
                continue
            new = peel(self._store, dot, decision.update.new)
            if is_hollow_here(self._store.catalog, dot, new):
                raise ContentAbsent(
                    f"{shown_ref(decision.update.ref)}: only the record of {new.hex()[:12]} came, "
                    "not its content",
                    hint="push from where the content is",
                    ref=decision.update.ref,
                    commit=new.hex(),
                )

    def _anything_moves(self, push: Push) -> bool:
        return self._named.row is None or any(d.moves for d in self._decide_all(push, {}))

    def _creation(self, push: Push) -> Iterable[Event]:
        if self._named.row is not None:
            return []
        self._refuse_clash(push, self._named.namespace)
        return [DotCreated(push.dot, self._named.namespace, push.name, self._access.user)]

    def _decide_all(self, push: Push, dirty: dict[str, ObjectId]) -> list[Decision]:
        """One decision each. Raises the first refusal of an atomic or single update."""
        catalog = self._store.catalog
        graph = graph_of(self._store, push.dot)
        now_ns = time.time_ns()
        pushed = {update.ref for update in push.updates}

        def free_name(ref: str) -> str:
            return stash_name(
                ref, now_ns, lambda name: name in pushed or catalog.ref(push.dot, name) is not None
            )

        decisions = [
            decide(
                graph,
                update,
                ref_target(self._store, push.dot, update.ref),
                free_name,
                dirty.get(update.ref),
            )
            for update in push.updates
        ]
        for decision in decisions:
            if decision.error is not None and (push.atomic or len(decisions) == 1):
                raise decision.error
        return decisions


def _summary(
    decisions: list[Decision], arrivals: Arrivals, incoming: Incoming
) -> tuple[tuple[str, str | int | None], ...]:
    return (
        ("refs_moved", sum(decision.moves for decision in decisions)),
        ("commits", len(arrivals.new)),
        ("commits_hollow", arrivals.hollow_count),
        ("records", incoming.window.records_received),
        ("bytes", incoming.window.bytes_received),
    )
