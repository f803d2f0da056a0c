"""Push: send branches, what they stem from, and the commits these need, to a remote dot."""

import time
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

from dmsync.core.events import Event, RefChanged, RemoteObserved, UpstreamSet
from dmsync.core.graph import ancestors_difference, is_ancestor, merge_bases
from dmsync.core.ids import DotId, ObjectId
from dmsync.engine.background import in_thread
from dmsync.engine.ports import ByteStream, SyncStore
from dmsync.engine.progress import SILENT, Progress
from dmsync.engine.session import Session, in_steps
from dmsync.engine.sync_hollow import (
    Contents,
    Selection,
    content_absent_there,
    holding_of,
    scope_of,
    select_for_push,
)
from dmsync.engine.sync_opening import (
    Frontier,
    Greeted,
    RemoteDot,
    ask_known,
    knows_tags,
    negotiate,
    open_dot,
    ref_target,
)
from dmsync.engine.sync_records import (
    Outgoing,
    send_eagerly,
    send_plan_and_wait,
    send_records,
)
from dmsync.engine.sync_refs import MOVING, decide
from dmsync.engine.sync_standing import Standing, last_seen, refuse_rewound
from dmsync.engine.sync_tags import signature_pages
from dmsync.engine.tags import peel
from dmsync.engine.transfers import TransferLog
from dmsync.errors import DmError, DotIdClash, DotNotFound, ProtocolError, RevisionNotFound
from dmsync.storage.catalog import RefRow
from dmsync.storage.stages import stage
from dmsync.wire.connection import Role
from dmsync.wire.failures import error_from_code, printable
from dmsync.wire.limits import FRONTIER_MAX
from dmsync.wire.messages import (
    Ack,
    Intent,
    Known,
    Push,
    Ready,
    RefMode,
    RefOutcome,
    Refs,
    RefStatus,
    RefUpdate,
    Result,
    Signatures,
    Update,
)
from dmsync.wire.windows import SendWindow

PushMode = Literal["ff", "lease", "stash"]


@dataclass(frozen=True)
class PushRequest:
    """What to push. `branches` None: every branch. `remote_name` None: found by the dot's id, else
    the dot's own name is used; `remote_namespace` None: the server's default for this user.

    `expected` (mode lease): what the remote branch must be at; without it the tracking ref.
    """

    remote: str
    dot: DotId
    branches: tuple[str, ...] | None
    remote_namespace: str | None = None
    remote_name: str | None = None
    tags: bool = False
    mode: PushMode = "ff"
    expected: ObjectId | None = None
    atomic: bool = False
    dry_run: bool = False
    accept_rewind: bool = False
    command: str = "push"
    actor: str = ""


@dataclass(frozen=True)
class PushedRef:
    """One ref of a push; `error` is set when it was refused while others went through."""

    ref: str
    status: RefStatus
    old: ObjectId | None
    new: ObjectId | None
    stash: str | None = None
    error: DmError | None = None


@dataclass(frozen=True)
class PushSummary:
    """What a push did. `resumed_bytes` are decoded bytes the server held from a cut attempt.

    `commits_hollow` of the commits sent went by their record alone: their content is not here.
    `tags_left_out`: the server is too old for annotated tags, or the content is not here.
    `bytes_planned`: what a dry run would send, before compression (pages are estimated).
    """

    refs: tuple[PushedRef, ...]
    remote_namespace: str
    remote_name: str
    transfer_id: bytes | None
    commits_sent: int = 0
    commits_hollow: int = 0
    objects_sent: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    round_trips: int = 0
    resumed_bytes: int = 0
    verbatim: int = 0
    reencoded: int = 0
    elapsed_s: float = 0.0
    nothing_to_do: bool = False
    bytes_planned: int = 0
    tags_left_out: tuple[str, ...] = ()
    remote_user: str = ""
    """Whom the server takes us for."""
    remote_standing: Standing = Standing.SAME
    remote_is_hollow: bool = False
    """Some commits are there by their record alone, and a push does not fill them."""


async def push(
    store: SyncStore,
    stream: ByteStream,
    request: PushRequest,
    progress: Progress | None = None,
    greeted: Greeted | None = None,
) -> PushSummary:
    """Push over `stream`, which is closed afterwards; `greeted`: see open_dot.

    A push that was cut is run again: what the server holds durably is not sent again.

    Raises:
        RevisionNotFound (no such branch, or unborn), Diverged and its kin, RefConflict, WouldLose,
        DotIdClash, AccessDenied, NetworkError, NotADmServer, ProtocolError.
    """
    async with Session(stream, Role.CLIENT) as session:
        pushing = _Pushing(store, session, request, progress or SILENT, greeted)
        return await pushing.run()


@dataclass
class _Pushing:
    store: SyncStore
    session: Session
    request: PushRequest
    progress: Progress
    greeted: Greeted | None = None
    window: SendWindow = field(default_factory=SendWindow)
    began_s: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        request = self.request
        self.log = TransferLog(
            self.store,
            direction="push",
            remote=request.remote,
            command=request.command,
            actor=request.actor,
        )
        self.log.dot = request.dot
        self.here = holding_of(self.store, request.dot)
        self.graph = self.here.graph
        self.outgoing = Outgoing(self.store.objects(request.dot))
        self.annotated: dict[ObjectId, ObjectId] = {}
        """Annotated tags to push, and the commits they name."""
        self.tags_left_out: tuple[str, ...] = ()
        self.standing = Standing.SAME
        self.sent: list[ObjectId] = []
        """Commits and tags that this push brings: their signatures go along."""

    async def run(self) -> PushSummary:
        targets = self._targets()
        self.log.branch = targets[0].ref.partition("/")[2]
        self.known = last_seen(self.store, self.request.remote, self.request.dot)
        remote = await self._open()
        self.standing = await in_thread(partial(self._standing, remote))
        targets = self._understood(targets)
        updates = [u for u in map(self._with_lease, targets) if not self._is_done(u, remote)]
        if remote.dot is not None and not updates:
            return await in_thread(partial(self._nothing_to_do, targets, remote))
        self._refuse_locally(updates, remote)
        frontier = await self._frontier(updates, remote)
        selection = await self._selection(updates, remote, frontier.missing)
        with stage("plan"):
            await in_steps(self.outgoing.add(selection, scope_of(remote.subdots)))
        tags = [update.new for update in updates if update.new in self.annotated]
        self.outgoing.add_tags(tags)
        self.sent = [*selection.listed, *(commit for commit, _ in selection.complete), *tags]
        push = self._message(updates, remote, frontier)
        if self.request.dry_run:
            return self._summary(remote, self._foreseen(updates, remote), None)
        try:
            result = await self._transfer(push, remote)
            return await in_thread(partial(self._conclude, targets, remote, result))
        finally:
            self.log.close()

    # --- what to push -------------------------------------------------------------------------

    def _targets(self) -> list[RefUpdate]:
        """The refs to move there, ancestors of the asked branches first."""
        names = self.request.branches
        rows = {row.short_name: row for row in self.store.catalog.branches(self.request.dot)}
        wanted = list(rows) if names is None else list(names)
        updates: dict[str, RefUpdate] = {}
        for name in wanted:
            if name not in rows:
                raise RevisionNotFound(
                    f"branch '{name}' has no commit to push", hint="dm commit makes one"
                )
            for update in self._ancestors(name, rows, wanted):
                updates.setdefault(update.ref, update)
        mode = {"ff": RefMode.FF, "lease": RefMode.LEASE, "stash": RefMode.STASH}
        for name in wanted:
            ref = f"branch/{name}"
            updates[ref] = RefUpdate(
                ref, mode[self.request.mode], None, rows[name].target, rows[name].origin
            )
        for ref, commit in self._tags():
            updates[ref] = RefUpdate(ref, RefMode.CREATE, None, commit)
        if not updates:
            raise RevisionNotFound("no branch has a commit to push", hint="dm commit makes one")
        return list(updates.values())

    def _ancestors(self, name: str, rows: dict[str, RefRow], wanted: list[str]) -> list[RefUpdate]:
        """The branches `name` stems from, each up to where the next one leaves it."""
        chain: list[RefUpdate] = []
        tip, origin = rows[name].target, rows[name].origin
        seen = {name}
        while origin is not None and origin in rows and origin not in seen:
            row = rows[origin]
            seen.add(origin)
            bases = merge_bases(self.graph, row.target, tip)
            if not bases:
                break
            tip = bases[0]
            if origin not in wanted:
                ref = f"branch/{origin}"
                chain.insert(0, RefUpdate(ref, RefMode.ADVANCE, None, tip, row.origin))
            origin = row.origin
        return chain

    def _tags(self) -> list[tuple[str, ObjectId]]:
        if not self.request.tags:
            return []
        found = []
        for row in self.store.catalog.refs(self.request.dot, "tag/"):
            commit = peel(self.store, self.request.dot, row.target)
            if commit in self.here.hollow:
                self.tags_left_out += (row.short_name,)  # it cannot be a tip anywhere
            elif self.graph.has(commit):
                found.append((row.name, row.target))
                if commit != row.target:
                    self.annotated[row.target] = commit
        return found

    def _commit_of(self, update: RefUpdate) -> ObjectId:
        return self.annotated.get(update.new, update.new)

    def _understood(self, targets: list[RefUpdate]) -> list[RefUpdate]:
        """Leave out the annotated tags when the server knows no such thing."""
        if knows_tags(self.session.connection.peer):
            return targets
        left_out = [target.ref for target in targets if target.new in self.annotated]
        self.tags_left_out += tuple(ref.removeprefix("tag/") for ref in left_out)
        return [target for target in targets if target.ref not in left_out]

    def _with_lease(self, update: RefUpdate) -> RefUpdate:
        if update.mode is not RefMode.LEASE:
            return update
        expected = self.request.expected or self._tracked(update.ref)
        return RefUpdate(update.ref, update.mode, expected, update.new, update.origin)

    def _tracked(self, ref: str) -> ObjectId | None:
        return ref_target(self.store, self.request.dot, tracking_ref(self.request.remote, ref))

    # --- what the server has ------------------------------------------------------------------

    async def _open(self) -> RemoteDot:
        request = self.request
        row = self.store.catalog.dot(request.dot)
        if row is None or row.trash is not None:
            raise DotNotFound("no such dot here")
        self.local_name = row.name
        ask = Refs(request.dot, request.remote_namespace, request.remote_name, Intent.PUSH)
        is_partial = bool(self.here.hollow) or self.here.subdots is not None
        remote, _ = await open_dot(
            self.session, self.store, ask, greeted=self.greeted, is_partial=is_partial
        )
        if remote.dot not in (None, request.dot):
            raise DotIdClash("the server answered with another dot", hint="this is a server error")
        return remote

    def _standing(self, remote: RemoteDot) -> Standing:
        request = self.request
        return refuse_rewound(
            self.store,
            request.remote,
            request.dot,
            remote,
            self.known,
            accept_rewind=request.accept_rewind,
        )

    def _is_done(self, update: RefUpdate, remote: RemoteDot) -> bool:
        """True when the server's ref needs nothing, as far as its answer tells."""
        current = remote.refs.get(update.ref)
        if current is None:
            return False
        if current.id == update.new:
            return True
        if update.mode in (RefMode.ADVANCE, RefMode.STASH) and self.graph.has(current.id):
            decision = decide(self.graph, update, current.id, lambda ref: ref)
            return not decision.moves
        if update.mode is RefMode.ADVANCE:
            # the server moved on without us: enough that it has the commit
            tips = [tip for tip in remote.tips() if self.graph.has(tip)]
            return any(is_ancestor(self.graph, update.new, tip) for tip in tips)
        return False

    def _refuse_locally(self, updates: list[RefUpdate], remote: RemoteDot) -> None:
        """What this side can tell alone is refused before anything is sent."""
        for update in updates:
            current = remote.refs.get(update.ref)
            is_telling = update.mode is RefMode.CREATE  # whatever stands there
            if current is None or not (is_telling or self.graph.has(current.id)):
                continue
            decision = decide(self.graph, update, current.id, lambda ref: ref)
            if decision.error is not None and (self._is_atomic(updates) or len(updates) == 1):
                raise decision.error

    def _is_atomic(self, updates: list[RefUpdate]) -> bool:
        """All or nothing is the default for one dot's refs; pushing every branch is not."""
        return self.request.atomic or (len(updates) > 1 and self.request.branches is not None)

    async def _frontier(self, updates: list[RefUpdate], remote: RemoteDot) -> Frontier:
        wanted = list(dict.fromkeys(map(self._commit_of, updates)))
        if remote.dot is None:
            return Frontier([], list(ancestors_difference(self.graph, wanted, [])))
        with stage("negotiate"):
            return await negotiate(self.session, self.graph, wanted, remote.tips())

    async def _selection(
        self, updates: list[RefUpdate], remote: RemoteDot, missing: list[ObjectId]
    ) -> Selection:
        """What goes with content. Only a server with hollow commits is asked where its content is.

        Raises:
            ContentAbsent: a tip's content is neither here nor there.
        """
        lacking = set(missing)
        tips = dict.fromkeys(map(self._commit_of, updates))
        states: dict[ObjectId, int] = {}
        if remote.hollow:
            edge = dict.fromkeys(tip for tip in tips if tip not in lacking)
            for commit in missing:
                edge.update(dict.fromkeys(self.graph.parents(commit)))
            states = await ask_known(self.session, [c for c in edge if c not in lacking])
        there = frozenset(c for c, state in states.items() if state == Known.CONTENT)
        upgrades = [t for t in tips if states.get(t) == Known.RECORD_ONLY]
        for tip in (*upgrades, *lacking.intersection(tips)):
            if tip in self.here.hollow:
                raise content_absent_there(tip)
        contents = Contents(there if remote.hollow else None)
        return await in_thread(partial(select_for_push, self.here, missing, upgrades, contents))

    def _message(self, updates: list[RefUpdate], remote: RemoteDot, frontier: Frontier) -> Push:
        missing = set(frontier.missing)
        counted = []
        for update in updates:
            ahead = 0
            current = remote.refs.get(update.ref)
            if missing and current is not None and not self.graph.has(current.id):
                ahead = sum(
                    1
                    for _ in ancestors_difference(
                        self.graph, [self._commit_of(update)], frontier.heads
                    )
                )
            counted.append(
                RefUpdate(
                    update.ref, update.mode, update.expected, update.new, update.origin, ahead
                )
            )
        return Push(
            self.log.id,
            self.log.id,
            self.request.dot,
            remote.namespace,
            remote.name or self.request.remote_name or self.local_name,
            remote.dot is None,
            self._is_atomic(updates),
            tuple(counted),
            tuple(frontier.heads[:FRONTIER_MAX]),
        )

    # --- sending ------------------------------------------------------------------------------

    async def _transfer(self, push: Push, remote: RemoteDot) -> Result:
        try:
            return await self._send(push, remote)
        except DmError as exc:
            await in_thread(partial(self.log.record_failure, exc))
            raise

    async def _send(self, push: Push, remote: RemoteDot) -> Result:
        unknown_tip = any(
            (value := remote.refs.get(update.ref)) is not None and not self.graph.has(value.id)
            for update in push.updates
        )
        if not unknown_tip and await in_thread(self.outgoing.is_small):
            await self._send_all(push)
        else:
            await self._send_rest(push, is_refusal_likely=unknown_tip)
        return await self._result(push)

    async def _send_all(self, push: Push) -> None:
        """Everything without waiting for an answer: a small push."""
        self.log.has_moved = bool(self.outgoing.plan)
        await self.session.send(push, *self.outgoing.pages(eager=True))
        await send_eagerly(self.session, self.outgoing, self.window)
        await self._send_end(push)
        await self._ready(push)

    async def _send_end(self, push: Push) -> None:
        signatures = await in_thread(partial(self._signatures, push))
        await self.session.send(*signatures, Update(push.transfer, self.window.records_sent))

    async def _send_rest(self, push: Push, *, is_refusal_likely: bool) -> None:
        """What the inventory lacks. The plan waits for READY only when a refusal is likely."""

        async def opened() -> None:
            await self._ready(push)
            if self.outgoing.plan:
                await in_thread(self.log.record_start)

        if is_refusal_likely:
            await self.session.send(push)
            await opened()
            await send_plan_and_wait(self.session, self.outgoing)
        else:
            await send_plan_and_wait(self.session, self.outgoing, [push], opened)
        await send_records(self.session, self.outgoing, self.window, self.progress)
        self.progress.phase("waiting for the remote")
        self.session.work_bytes = sum(planned.raw_bytes for planned in self.outgoing.plan)
        await self._send_end(push)

    def _signatures(self, push: Push) -> list[Signatures]:
        if not knows_tags(self.session.connection.peer):
            return []
        return list(signature_pages(self.store, push.dot, push.transfer, self.sent))

    async def _ready(self, push: Push) -> None:
        ready = await self.session.expect(Ready)
        if ready.transfer != push.transfer:
            raise ProtocolError("READY of another transfer")
        self.window.credits = min(self.window.credits, ready.credits) or self.window.credits

    async def _result(self, push: Push) -> Result:
        while isinstance(message := await self.session.receive(), Ack):
            self.window.acknowledged(message)
        if not isinstance(message, Result) or message.transfer != push.transfer:
            raise ProtocolError("no RESULT of this transfer")
        if [outcome.ref for outcome in message.outcomes] != [u.ref for u in push.updates]:
            raise ProtocolError("RESULT is not about the refs that were pushed")
        for outcome, update in zip(message.outcomes, push.updates, strict=True):
            if outcome.status in MOVING and outcome.new != update.new:
                raise ProtocolError("RESULT says a ref went elsewhere")
        return message

    # --- concluding -----------------------------------------------------------------------------

    def _nothing_to_do(self, targets: list[RefUpdate], remote: RemoteDot) -> PushSummary:
        refs = self._foreseen(targets, remote)
        if not self.request.dry_run:
            seen = {target.ref: remote.refs[target.ref].id for target in targets}
            self._record(remote, seen, [], (remote.epoch, remote.seq))
        return self._summary(remote, refs, None, nothing_to_do=True)

    def _foreseen(self, updates: list[RefUpdate], remote: RemoteDot) -> list[PushedRef]:
        """What would become of each ref; REFUSED where only the server can tell."""
        refs = []
        for update in updates:
            current = remote.refs.get(update.ref)
            old = current.id if current else None
            is_telling = update.mode is RefMode.CREATE
            if old is not None and not (is_telling or self.graph.has(old)):
                # a parent branch that moved on there is not asked to move
                is_parent = update.mode is RefMode.ADVANCE
                status = RefStatus.LEFT if is_parent else RefStatus.REFUSED
                refs.append(PushedRef(update.ref, status, old, old))
                continue
            decision = decide(self.graph, update, old, lambda ref: ref)
            new = update.new if decision.moves else old
            refs.append(PushedRef(update.ref, decision.status, old, new, error=decision.error))
        return refs

    def _conclude(self, targets: list[RefUpdate], remote: RemoteDot, result: Result) -> PushSummary:
        refs = [_pushed(outcome) for outcome in result.outcomes]
        pushed = {ref.ref for ref in refs}
        refs += self._foreseen([t for t in targets if t.ref not in pushed], remote)
        seen = {ref.ref: ref.new for ref in refs if ref.new is not None}
        seen |= {ref.stash: ref.old for ref in refs if ref.stash and ref.old is not None}
        has_moved = self.log.has_moved or any(ref.status in MOVING for ref in refs)
        summary = self._summary(remote, refs, self.log.id, nothing_to_do=not has_moved)
        summary = replace(summary, commits_hollow=result.hollow_count)
        done = self._log_summary(summary)
        events = self.log.finish_events("done", done) if has_moved else []
        self._record(remote, seen, events, (result.epoch, result.seq))
        self.log.finished()
        return summary

    def _record(
        self,
        remote: RemoteDot,
        seen: dict[str, ObjectId],
        events: list[Event],
        cursor: tuple[int, int],
    ) -> None:
        """Tracking refs, upstream and the transfer, in one transaction; nothing if none changed."""
        is_same = self.standing is Standing.SAME
        if is_same and not events and not self._tracking_events(remote, seen):
            return
        observed = RemoteObserved(
            self.request.remote, self.request.dot, remote.cluster_id, cursor[0], cursor[1]
        )
        with self.store.catalog.transaction(self.log.command, self.log.actor) as tx:
            # Looked up in here: another push or fetch of ours may have moved them a moment ago.
            for event in [*self._tracking_events(remote, seen), *events, observed]:
                tx.append(event)

    def _tracking_events(self, remote: RemoteDot, seen: dict[str, ObjectId]) -> list[Event]:
        name = remote.name or self.request.remote_name or self.local_name
        store, dot, remote_name = self.store, self.request.dot, self.request.remote
        changes = tracking_changes(store, dot, remote_name, seen, "push")
        return changes + upstream_change(store, dot, remote_name, remote.namespace, name)

    def _summary(
        self,
        remote: RemoteDot,
        refs: list[PushedRef],
        transfer: bytes | None,
        *,
        nothing_to_do: bool = False,
    ) -> PushSummary:
        return PushSummary(
            refs=tuple(refs),
            remote_namespace=remote.namespace,
            remote_name=remote.name or self.request.remote_name or self.local_name,
            transfer_id=transfer,
            commits_sent=self.outgoing.commits_count,
            commits_hollow=self.outgoing.hollow_count,
            objects_sent=self.window.records_sent if transfer else len(self.outgoing.plan),
            bytes_sent=self.session.bytes_sent,
            bytes_received=self.session.bytes_received,
            round_trips=self.session.round_trips,
            resumed_bytes=self.outgoing.resumed_bytes,
            verbatim=self.outgoing.verbatim_count,
            reencoded=self.outgoing.reencoded_count,
            elapsed_s=time.monotonic() - self.began_s,
            nothing_to_do=nothing_to_do,
            bytes_planned=0 if transfer else sum(p.raw_bytes for p in self.outgoing.plan),
            tags_left_out=self.tags_left_out,
            remote_user=remote.user,
            remote_standing=self.standing,
            remote_is_hollow=remote.hollow,
        )

    def _log_summary(self, summary: PushSummary) -> tuple[tuple[str, str | int | None], ...]:
        return (
            ("refs_moved", sum(ref.status in MOVING for ref in summary.refs)),
            ("commits", summary.commits_sent),
            ("commits_hollow", summary.commits_hollow),
            ("objects", summary.objects_sent),
            ("bytes_sent", summary.bytes_sent),
            ("bytes_received", summary.bytes_received),
            ("verbatim", summary.verbatim),
            ("reencoded", summary.reencoded),
        )


def _pushed(outcome: RefOutcome) -> PushedRef:
    error = None
    if outcome.status is RefStatus.REFUSED:
        error = error_from_code(outcome.code, printable(outcome.text))
    return PushedRef(outcome.ref, outcome.status, outcome.old, outcome.new, outcome.stash, error)


# --- what both directions record ----------------------------------------------------------------


def tracking_ref(remote: str, ref: str) -> str:
    """Where `ref` of `remote` is remembered: `remote/R/x`, tags under `remote/R/tag/x`."""
    space, _, name = ref.partition("/")
    return f"remote/{remote}/{name}" if space == "branch" else f"remote/{remote}/{ref}"


def tracking_changes(
    store: SyncStore, dot: DotId, remote: str, seen: dict[str, ObjectId], kind: str
) -> list[Event]:
    """RefChanged for each branch of `seen` whose tracking ref says otherwise.

    A tip that is hollow here is left for the next fetch, which brings its content.
    """
    if store.catalog.remote(remote) is None:
        return []  # pushed to or fetched from a URL: nothing is remembered
    graph = store.catalog.graph(dot)
    changes: list[Event] = []
    for ref, commit in seen.items():
        name = tracking_ref(remote, ref)
        old = ref_target(store, dot, name)
        is_branch = ref.startswith("branch/") and old != commit and graph.has(commit)
        if is_branch and not store.catalog.is_hollow(dot, commit):
            changes.append(RefChanged(dot, name, old, commit, kind, ""))
    return changes


def upstream_change(
    store: SyncStore, dot: DotId, remote: str, namespace: str, name: str
) -> list[Event]:
    """UpstreamSet the first time a dot meets a remote."""
    if store.catalog.remote(remote) is None or store.catalog.upstream(dot, remote) is not None:
        return []
    return [UpstreamSet(dot, remote, namespace, name)]
