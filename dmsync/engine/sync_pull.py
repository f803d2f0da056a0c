"""Fetch, pull and clone: bring commits of a remote dot here, then move refs and trees.

Incoming data is quarantined and its closure proven exactly as a server does with a push.
"""

import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

from dmsync.core.events import (
    CommitsAdded,
    DotCreated,
    Event,
    HeadSwitched,
    RefChanged,
    RemoteObserved,
)
from dmsync.core.ids import DotId, ObjectId
from dmsync.core.names import check_dot_name, check_namespace, full_name
from dmsync.engine.background import in_thread, steps_in_thread
from dmsync.engine.ports import ByteStream, Silent, SyncProgress, SyncStore, TargetTree
from dmsync.engine.session import Session
from dmsync.engine.sync_opening import (
    Greeted,
    RemoteDot,
    graph_of,
    hello,
    negotiate,
    open_dot,
    ref_target,
)
from dmsync.engine.sync_push import tracking_changes, upstream_change
from dmsync.engine.sync_records import Incoming, prove_closure
from dmsync.engine.sync_refs import Decision, decide, stash_name, tree_events
from dmsync.engine.transfers import TransferLog
from dmsync.errors import (
    AlreadyExists,
    DmError,
    DotIdClash,
    DotNotFound,
    NotFastForward,
    ProtocolError,
    RevisionNotFound,
    WouldLose,
)
from dmsync.wire.connection import Role
from dmsync.wire.limits import FRONTIER_MAX, WANTS_MAX
from dmsync.wire.messages import (
    Done,
    DotsReply,
    DotValue,
    Fetch,
    Hello,
    Intent,
    ListDots,
    Plan,
    Records,
    RefMode,
    Refs,
    RefStatus,
    RefUpdate,
)

PullMode = Literal["none", "ff", "stash", "force"]
"""What happens to local branches: nothing (fetch), fast-forward, stash our line, replace it."""

PROBED_HEADS_MAX = 256
"""Local heads asked about together with the refs: the usual pull then asks nothing more."""


@dataclass(frozen=True)
class FetchRequest:
    """What to fetch. `dot` None: found by name at the remote (clone). `branches` None: all.

    `local_namespace` and `local_name` name a dot that is not here yet. `move`: local branches.
    """

    remote: str
    dot: DotId | None = None
    remote_namespace: str | None = None
    remote_name: str | None = None
    branches: tuple[str, ...] | None = None
    tags: bool = True
    move: PullMode = "none"
    local_namespace: str | None = None
    local_name: str | None = None
    dry_run: bool = False
    command: str = "fetch"
    actor: str = ""


@dataclass(frozen=True)
class CloneRequest:
    """Make a local dot of `[remote_namespace/]remote_name`; with `branch`, only that and what it
    stems from. `local_name` None: as there. Cloning again what is here under that name pulls."""

    remote: str
    remote_name: str
    local_namespace: str
    remote_namespace: str | None = None
    branch: str | None = None
    local_name: str | None = None
    mode: PullMode = "ff"
    command: str = "clone"
    actor: str = ""


@dataclass(frozen=True)
class FetchedRef:
    """One local ref: a branch or tag (status as for a push)."""

    ref: str
    status: RefStatus
    old: ObjectId | None
    new: ObjectId | None
    stash: str | None = None


@dataclass(frozen=True)
class FetchSummary:
    """What came. `tracking` are the tracking refs that moved: (name, old, new). `remote_tips` are
    the fetched branches' tips there. `rewound`: the remote's log is behind what was seen."""

    dot: DotId
    namespace: str
    name: str
    refs: tuple[FetchedRef, ...]
    tracking: tuple[tuple[str, ObjectId | None, ObjectId], ...]
    remote_tips: tuple[tuple[str, ObjectId], ...]
    new_commits: tuple[ObjectId, ...]
    transfer_id: bytes | None
    commits_received: int = 0
    objects_received: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    round_trips: int = 0
    resumed_objects: int = 0
    verbatim: int = 0
    reencoded: int = 0
    elapsed_s: float = 0.0
    nothing_to_do: bool = False
    created: bool = False
    rewound: bool = False


async def fetch(
    store: SyncStore,
    stream: ByteStream,
    request: FetchRequest,
    hooks: TargetTree | None = None,
    progress: SyncProgress | None = None,
    greeted: Greeted | None = None,
) -> FetchSummary:
    """Fetch over `stream`, which is closed afterwards; local branches move as `request.move` says.

    `greeted`: see open_dot.

    Raises:
        DotNotFound, RevisionNotFound (no such branch there), Diverged and its kin (the commits
        are here then, and the tracking refs moved), WouldLose, DotIdClash, NetworkError,
        NotADmServer, ProtocolError, Corruption (the remote sent what does not add up).
    """
    async with Session(stream, Role.CLIENT) as session:
        fetching = _Fetching(
            store, session, request, hooks or TargetTree(), progress or Silent(), greeted
        )
        return await fetching.run()


async def pull(
    store: SyncStore,
    stream: ByteStream,
    request: FetchRequest,
    hooks: TargetTree | None = None,
    progress: SyncProgress | None = None,
) -> FetchSummary:
    """Fetch and move the local branches: the request's `move` must not be "none"."""
    assert request.move != "none", "a pull moves branches; fetch does not"
    return await fetch(store, stream, request, hooks, progress)


async def clone(
    store: SyncStore,
    stream: ByteStream,
    request: CloneRequest,
    hooks: TargetTree | None = None,
    progress: SyncProgress | None = None,
) -> FetchSummary:
    """Clone a remote dot: a fetch into a dot that is made at the end. A cut clone is run again.

    Raises:
        As `fetch`; DotIdClash: the dot is here under another name. AlreadyExists: the local name
        stands for another dot.
    """
    return await fetch(
        store,
        stream,
        FetchRequest(
            remote=request.remote,
            remote_namespace=request.remote_namespace,
            remote_name=request.remote_name,
            branches=(request.branch,) if request.branch else None,
            move=request.mode,
            local_namespace=request.local_namespace and check_namespace(request.local_namespace),
            local_name=check_dot_name(request.local_name or request.remote_name),
            command=request.command,
            actor=request.actor,
        ),
        hooks,
        progress,
    )


async def list_remote_dots(store: SyncStore, stream: ByteStream) -> list[DotValue]:
    """The dots of a remote that we may read."""
    async with Session(stream, Role.CLIENT) as session:
        await session.send(hello(store), ListDots())
        await session.expect(Hello)
        dots: list[DotValue] = []
        while True:
            page = await session.expect(DotsReply)
            dots += page.dots
            if page.last:
                return dots


@dataclass
class _Fetching:
    store: SyncStore
    session: Session
    request: FetchRequest
    hooks: TargetTree
    progress: SyncProgress
    greeted: Greeted | None = None
    began_s: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.log = TransferLog(
            self.store,
            direction="fetch" if self.request.move == "none" else "pull",
            remote=self.request.remote,
            command=self.request.command,
            actor=self.request.actor,
        )
        self.done: Done | None = None
        self.incoming: Incoming | None = None
        self.eager = False
        self.rewound = False
        self.resumed_objects = 0

    async def run(self) -> FetchSummary:
        remote, probed = await self._open()
        dot = await in_thread(partial(self._local_dot, remote))
        self.log.dot = dot
        self.rewound = self._is_rewound(dot, remote)
        wanted = self._wanted(remote)
        self.log.branch = next((name.partition("/")[2] for name in wanted), None)
        graph = graph_of(self.store, dot)
        wants = [c for c in dict.fromkeys(wanted.values()) if not graph.has(c)]
        if not wants or self.request.dry_run:
            return await in_thread(partial(self._conclude, dot, remote, wanted, [], None))
        heads = self._local_heads(dot)
        frontier = await negotiate(self.session, graph, heads, remote.tips(), probed)
        try:
            incoming = await in_thread(partial(self._open_quarantine, dot))
            await self._receive(dot, wants, frontier.heads, incoming)
            self.progress.phase("checking")
            commits = await steps_in_thread(prove_closure(incoming, graph.has, wants))
            return await in_thread(partial(self._conclude, dot, remote, wanted, commits, incoming))
        except DmError as exc:
            await in_thread(partial(self.log.record_failure, exc))
            raise
        finally:
            await in_thread(self._close)

    def _open_quarantine(self, dot: DotId) -> Incoming:
        objects = self.store.objects(dot)
        self.incoming = Incoming(self.session, objects, self.progress, reveal=True)
        return self.incoming

    def _close(self) -> None:
        self.log.close()
        if self.incoming is not None:
            self.incoming.quarantine.close()

    # --- what is where ------------------------------------------------------------------------

    async def _open(self) -> tuple[RemoteDot, dict[ObjectId, int]]:
        request = self.request
        ask = Refs(request.dot, request.remote_namespace, request.remote_name, Intent.PULL)
        probe = [] if request.dot is None else self._local_heads(request.dot)[:PROBED_HEADS_MAX]
        remote, answer = await open_dot(self.session, self.store, ask, probe, self.greeted)
        if remote.dot is None:
            raise DotNotFound(
                f"no dot {self._asked_name()} at {request.remote}, or not for you",
                hint="dm list shows local dots; ask its owner for access to a remote one",
            )
        if request.dot is not None and remote.dot != request.dot:
            raise DotIdClash(
                f"Cannot reconcile: {full_name(remote.namespace, remote.name or '')} at "
                f"{request.remote} is "
                f"another dot ({remote.dot.hex()[:12]}) than the local one "
                f"({request.dot.hex()[:12]})",
                hint="clone it under another name: dm clone --local-name",
            )
        states = dict(zip(probe, answer.states, strict=False)) if answer else {}
        if answer is not None and len(answer.states) != len(probe):
            raise ProtocolError("KNOWN_REPLY does not answer the ids asked")
        return remote, states

    def _asked_name(self) -> str:
        """The dot as it was named for the remote: by the user, an upstream, or as it is here."""
        request = self.request
        if request.remote_name is not None:
            return full_name(request.remote_namespace or "", request.remote_name)
        row = None if request.dot is None else self.store.catalog.dot(request.dot)
        assert row is not None, "a dot is asked for by its name unless it is here"
        return full_name(row.namespace, row.name)

    def _local_dot(self, remote: RemoteDot) -> DotId:
        """The dot to fetch into, checked against what is here. Raises DotIdClash, AlreadyExists."""
        assert remote.dot is not None
        request, catalog = self.request, self.store.catalog
        here = catalog.dot(remote.dot)
        is_deleted = here is not None and here.trash is not None
        if request.dot is not None or request.local_name is None:
            if here is None or is_deleted:
                raise DotNotFound("no such dot here", hint="dm clone makes one")
            return remote.dot
        namespace = remote.namespace if request.local_namespace is None else request.local_namespace
        is_named_otherwise = here is not None and (here.namespace, here.name) != (
            namespace,
            request.local_name,
        )
        if here is not None and is_named_otherwise and not is_deleted:
            existing = full_name(here.namespace, here.name)
            raise DotIdClash(
                f"Cannot reconcile: this dot is here already, as {existing}",
                hint=f"dm pull {request.remote} {existing}",
                existing_name=existing,
            )
        taken = catalog.dot_by_name(namespace, request.local_name)
        if taken is not None and taken.dot != remote.dot:
            raise AlreadyExists(
                f"Cannot reconcile: {full_name(namespace, request.local_name)} is another dot here",
                hint="dm clone --local-name chooses another name",
            )
        if is_deleted and not request.dry_run:
            self.hooks.revive(self.store, remote.dot, namespace, request.local_name)
        return remote.dot

    def _is_rewound(self, dot: DotId, remote: RemoteDot) -> bool:
        """True when the remote's log is shorter than we saw it: restored from an old copy?"""
        seen = self.store.catalog.observed(self.request.remote, dot)
        return (
            seen is not None
            and (seen.cluster_id, seen.epoch) == (remote.cluster_id, remote.epoch)
            and remote.seq < seen.seq
        )

    def _wanted(self, remote: RemoteDot) -> dict[str, ObjectId]:
        """The remote refs to bring: branches after what they stem from, and tags."""
        names = self.request.branches
        branches = [r.partition("/")[2] for r in remote.refs if r.startswith("branch/")]
        asked = branches if names is None else list(names)
        wanted: dict[str, ObjectId] = {}
        for name in asked:
            if f"branch/{name}" not in remote.refs:
                raise RevisionNotFound(
                    f"no branch '{name}' at {self.request.remote}",
                    hint=f"there are: {', '.join(sorted(branches)[:20]) or 'none'}",
                )
            for link in reversed(remote.branch_chain(name)):
                wanted.setdefault(f"branch/{link}", remote.refs[f"branch/{link}"].id)
        if self.request.tags and names is None:
            wanted |= {n: v.id for n, v in remote.refs.items() if n.startswith("tag/")}
        if len(set(wanted.values())) > WANTS_MAX:
            raise ProtocolError(f"more than {WANTS_MAX} tips: fetch branches one by one")
        return wanted

    def _local_heads(self, dot: DotId) -> list[ObjectId]:
        """Everything refs name here, tracking refs of the remote first."""
        if self.store.catalog.dot(dot) is None:
            return []
        graph = self.store.catalog.graph(dot)
        refs = self.store.catalog.refs(dot)
        tracked = f"remote/{self.request.remote}/"
        ordered = sorted(refs, key=lambda row: not row.name.startswith(tracked))
        return [c for c in dict.fromkeys(row.target for row in ordered) if graph.has(c)]

    # --- receiving ------------------------------------------------------------------------------

    async def _receive(
        self, dot: DotId, wants: list[ObjectId], frontier: list[ObjectId], incoming: Incoming
    ) -> None:
        await self.session.send(
            Fetch(self.log.id, dot, tuple(wants), tuple(frontier[:FRONTIER_MAX]))
        )
        while True:
            message = await incoming.next_message()
            match message:
                case Plan():
                    reply = incoming.take_plan(message)
                    if not message.eager:
                        if message.last and message.objects_total:
                            await in_thread(self.log.record_start)
                        await self.session.send(reply)
                    self.eager = message.eager
                case Records():
                    self.log.has_moved = True
                    await incoming.take(message, acknowledge=not self.eager)
                case Done():
                    if message.transfer != self.log.id:
                        raise ProtocolError("DONE of another transfer")
                    incoming.check_count(message.records_sent)
                    self.done = message
                    self.resumed_objects = 0 if self.eager else incoming.resumed_count
                    return
                case _:
                    raise ProtocolError(f"{message.TYPE.name} within a fetch")

    # --- concluding -----------------------------------------------------------------------------

    def _conclude(
        self,
        dot: DotId,
        remote: RemoteDot,
        wanted: dict[str, ObjectId],
        commits: list[ObjectId],
        incoming: Incoming | None,
    ) -> FetchSummary:
        """Promote, record commits, tracking refs and local refs in one transaction, move trees."""
        if incoming is not None:
            incoming.quarantine.promote()
        catalog = self.store.catalog
        is_new = catalog.dot(dot) is None
        with ExitStack() as locked:
            if not is_new and self.request.move != "none" and not self.request.dry_run:
                locked.enter_context(self.hooks.locked(self.store, dot))
            change = _Conclusion(self, dot, remote, wanted, commits, incoming, is_new)
            if not self.request.dry_run:
                change.record()
                if not is_new and self.request.move != "none":
                    self.hooks.finish_switches(self.store, dot)
        if change.refused is not None:
            raise change.refused
        return self._summary(dot, change)

    def _summary(self, dot: DotId, change: "_Conclusion") -> FetchSummary:
        row = self.store.catalog.dot(dot)
        incoming, done = change.incoming, self.done
        return FetchSummary(
            dot=dot,
            namespace=row.namespace if row else "",
            name=row.name if row else "",
            refs=tuple(
                FetchedRef(
                    d.update.ref,
                    d.status,
                    d.old,
                    d.update.new if d.moves else d.old,
                    d.stash[0] if d.stash else None,
                )
                for d in change.decisions
            ),
            tracking=tuple(change.tracking),
            remote_tips=tuple(
                (n.partition("/")[2], c) for n, c in change.wanted.items() if n[:7] == "branch/"
            ),
            new_commits=tuple(change.commits),
            transfer_id=self.log.id if incoming else None,
            commits_received=len(change.commits),
            objects_received=incoming.window.records_received if incoming else 0,
            bytes_sent=self.session.bytes_sent,
            bytes_received=self.session.bytes_received,
            round_trips=self.session.round_trips,
            resumed_objects=self.resumed_objects,
            verbatim=done.verbatim_count if done else 0,
            reencoded=done.reencoded_count if done else 0,
            elapsed_s=time.monotonic() - self.began_s,
            nothing_to_do=not change.commits and not any(d.moves for d in change.decisions),
            created=change.is_new,
            rewound=self.rewound,
        )


@dataclass
class _Conclusion:
    """The catalog's part of a fetch: what to append, decided inside the transaction."""

    fetching: _Fetching
    dot: DotId
    remote: RemoteDot
    wanted: dict[str, ObjectId]
    commits: list[ObjectId]
    incoming: Incoming | None
    is_new: bool
    decisions: list[Decision] = field(default_factory=list)
    tracking: list[tuple[str, ObjectId | None, ObjectId]] = field(default_factory=list)
    refused: DmError | None = None
    kept: set[str] = field(default_factory=set)
    """Refs that stay because their tree has uncommitted changes."""
    blocked: WouldLose | None = None

    @property
    def request(self) -> FetchRequest:
        return self.fetching.request

    def record(self) -> None:
        """Append everything at once; nothing when nothing changes.

        A branch that may not move is no reason to drop what came: commits and tracking refs are
        recorded, the branches stay, and `refused` says why.
        """
        store, log = self.fetching.store, self.fetching.log
        saved = self._prepare_trees()
        if not self.commits and not self.is_new and not self._ref_changes(saved):
            return
        with store.catalog.transaction(log.command, log.actor) as tx:
            for event in self._arrivals():
                tx.append(event)
            for event in self._ref_changes(saved):
                tx.append(event)
            for decision in self.decisions:
                for event in tree_events(self.fetching.hooks, store, self.dot, decision):
                    tx.append(event)
            if self.incoming is not None:
                status = "refused" if self.refused else "done"
                for event in log.finish_events(status, self._log_summary()):
                    tx.append(event)
        log.finished()

    def _prepare_trees(self) -> dict[str, ObjectId]:
        """Look at the trees of branches that may move, before the log is locked.

        Returns snapshots of uncommitted state (mode stash). Otherwise uncommitted changes keep
        the branch, or for one that was asked for all branches, where they are.
        """
        saved: dict[str, ObjectId] = {}
        store, hooks = self.fetching.store, self.fetching.hooks
        for update in [] if self.is_new else self._updates():
            space, _, branch = update.ref.partition("/")
            if space != "branch" or not self._may_move(update):
                continue
            if update.mode is RefMode.STASH:
                snapshot = hooks.save_dirty(store, self.dot, branch)
                if snapshot is not None:
                    saved[update.ref] = snapshot
                continue
            try:
                hooks.refuse_if_dirty(store, self.dot, branch)
            except WouldLose as exc:
                self.kept.add(update.ref)
                if update.mode is not RefMode.ADVANCE:
                    self.blocked = exc
        return saved

    def _may_move(self, update: RefUpdate) -> bool:
        """A ref that exists and is not plainly up to date, ahead or diverged."""
        catalog = self.fetching.store.catalog
        current = ref_target(self.fetching.store, self.dot, update.ref)
        graph = catalog.graph(self.dot)
        if current is None or not graph.has(update.new):
            return current is not None
        return decide(graph, update, current, lambda ref: ref, role="pull").moves

    def _arrivals(self) -> list[Event]:
        request = self.request
        events: list[Event] = []
        if self.is_new:
            given = request.local_namespace
            namespace = self.remote.namespace if given is None else given
            name = request.local_name or self.remote.name or ""
            events.append(DotCreated(self.dot, namespace, name, request.actor))
        if self.commits:
            events.append(CommitsAdded(self.dot, tuple(self.commits), self.fetching.log.id, None))
        return events

    def _ref_changes(self, saved: dict[str, ObjectId]) -> list[Event]:
        """Tracking refs, upstream, cursor, branches and tags, on values read in the transaction."""
        store, request, remote = self.fetching.store, self.request, self.remote
        tracked = tracking_changes(store, self.dot, request.remote, self.wanted, "fetch")
        self.tracking = [
            (e.name, e.old, e.new) for e in tracked if isinstance(e, RefChanged) and e.new
        ]
        events = tracked + upstream_change(
            store, self.dot, request.remote, remote.namespace, remote.name or ""
        )
        self._decide(saved)
        for decision in self.decisions:
            events += decision.events(self.dot, "pull", f"pull from {request.remote}")
        if self.is_new:
            events += self._first_head()
        if events or self.commits:
            events.append(
                RemoteObserved(
                    request.remote, self.dot, remote.cluster_id, remote.epoch, remote.seq
                )
            )
        return events

    def _first_head(self) -> list[Event]:
        """A clone starts on the branch asked for, else on the remote's."""
        branches = self.request.branches
        head = branches[0] if branches else self.remote.head
        if head is None or self.fetching.store.catalog.head(self.dot) == head:
            return []
        return [HeadSwitched(self.dot, head)]

    def _updates(self) -> list[RefUpdate]:
        modes = {"ff": RefMode.FF, "stash": RefMode.STASH, "force": RefMode.LEASE}
        catalog = self.fetching.store.catalog
        asked = self.request.branches
        updates = []
        for name, commit in self.wanted.items():
            space, _, short = name.partition("/")
            if space == "tag":
                if catalog.ref(self.dot, name) is None:
                    updates.append(RefUpdate(name, RefMode.ADVANCE, None, commit))
            elif self.request.move != "none":
                is_asked = asked is not None and short in asked
                mode = modes[self.request.move] if is_asked else RefMode.ADVANCE
                if asked is None:
                    mode = modes[self.request.move]
                expected = None
                if mode is RefMode.LEASE:
                    expected = ref_target(self.fetching.store, self.dot, name)
                origin = self.remote.refs[name].origin
                updates.append(RefUpdate(name, mode, expected, commit, origin))
        return updates

    def _decide(self, saved: dict[str, ObjectId]) -> None:
        """Decide every update; when one asked for is refused, no local branch moves."""
        catalog = self.fetching.store.catalog
        graph = catalog.graph(self.dot)
        now_ns = time.time_ns()

        def free_name(ref: str) -> str:
            return stash_name(ref, now_ns, lambda name: catalog.ref(self.dot, name) is not None)

        decisions = []
        for update in self._updates():
            if update.ref in self.kept or not graph.has(update.new):
                continue
            current = ref_target(self.fetching.store, self.dot, update.ref)
            dirty = saved.get(update.ref)
            decision = decide(graph, update, current, free_name, dirty, role="pull")
            if isinstance(decision.error, NotFastForward):
                # a local branch that is merely ahead is up to date for a pull
                decision = replace(decision, status=RefStatus.AHEAD, error=None)
            decisions.append(decision)
        errors = (decision.error for decision in decisions if decision.error is not None)
        self.refused = self.blocked or next(errors, None)
        self.decisions = [] if self.refused else decisions

    def _log_summary(self) -> tuple[tuple[str, str | int | None], ...]:
        received = self.incoming.window.records_received if self.incoming else 0
        return (
            ("commits", len(self.commits)),
            ("objects", received),
            ("bytes_received", self.fetching.session.bytes_received),
        )
