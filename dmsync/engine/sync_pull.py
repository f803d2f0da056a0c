"""Fetch, pull and clone: bring commits of a remote dot here, then move refs and trees.

Incoming data is quarantined and its closure proven exactly as a server does with a push.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Literal, TypeVar

from dmsync.core.events import (
    DotCreated,
    DotScopeSet,
    Event,
    HeadSwitched,
    RefChanged,
    RemoteObserved,
)
from dmsync.core.graph import GraphView
from dmsync.core.ids import DotId, Kind, ObjectId
from dmsync.core.names import check_dot_name, check_namespace, full_name
from dmsync.core.objects import commit_from_bytes
from dmsync.core.pages import directory_entries
from dmsync.engine.background import in_thread, steps_in_thread
from dmsync.engine.ports import ByteStream, SyncStore, TargetTree
from dmsync.engine.progress import SILENT, Progress
from dmsync.engine.session import Session
from dmsync.engine.sync_hollow import (
    Arrivals,
    Holding,
    first_hollow,
    holding_of,
    hollow_within,
    is_hollow_here,
    within_depth,
)
from dmsync.engine.sync_incoming import Incoming, prove_closure
from dmsync.engine.sync_opening import (
    Greeted,
    RemoteDot,
    graph_of,
    hello,
    negotiate,
    open_dot,
    ref_target,
    require_hollow,
)
from dmsync.engine.sync_push import tracking_changes, upstream_change
from dmsync.engine.sync_refs import Decision, decide, shown_ref, stash_name, tree_events
from dmsync.engine.sync_standing import Standing, last_seen, refuse_rewound
from dmsync.engine.sync_tags import (
    ReceivedSignatures,
    check_received,
    is_here,
    received_tag,
)
from dmsync.engine.transfers import TransferLog
from dmsync.errors import (
    AlreadyExists,
    ContentAbsent,
    DmError,
    DotIdClash,
    DotNotFound,
    NotFastForward,
    PathNotFound,
    ProtocolError,
    RevisionNotFound,
    UsageError,
    WouldLose,
)
from dmsync.storage.stages import stage
from dmsync.wire.connection import Role
from dmsync.wire.limits import ABSENT_MAX, CONTENT_MAX, DOTS_MAX, FRONTIER_MAX, WANTS_MAX
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
    RefValue,
    Signatures,
)

PullMode = Literal["none", "ff", "stash", "force"]
"""What happens to local branches: nothing (fetch), fast-forward, stash our line, replace it."""

_Result = TypeVar("_Result")
PROBED_HEADS_MAX = 256
"""Local heads asked about together with the refs: the usual pull then asks nothing more."""


@dataclass(frozen=True)
class FetchRequest:
    """What to fetch. `dot` None: found by name at the remote (clone). `branches` None: all.

    `local_namespace` and `local_name` name a dot that is not here yet. `move`: local branches.
    Commits further than `depth` steps from a tip come by their record alone (0: none does).
    `deepen`: so many more come with content than are here; `unshallow`: all that the remote has.
    `subdots`: whose content a dot that is not here yet keeps (None: all).
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
    depth: int = 0
    deepen: int = 0
    unshallow: bool = False
    subdots: tuple[str, ...] | None = None
    dry_run: bool = False
    accept_rewind: bool = False
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
    depth: int = 0
    subdots: tuple[str, ...] | None = None
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
    the fetched branches' tips there. `rewound`: the remote's log is behind what was seen.

    Of the commits received `commits_hollow` came by their record alone; `commits_deepened` had been
    here so and have their content now; `commits_unavailable` were asked for, but have none there.
    `tags_kept` are tags that stand for something else there and stayed as they are here.
    """

    dot: DotId
    namespace: str
    name: str
    refs: tuple[FetchedRef, ...]
    tracking: tuple[tuple[str, ObjectId | None, ObjectId], ...]
    remote_tips: tuple[tuple[str, ObjectId], ...]
    new_commits: tuple[ObjectId, ...]
    transfer_id: bytes | None
    commits_received: int = 0
    commits_hollow: int = 0
    commits_deepened: int = 0
    commits_unavailable: int = 0
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
    remote_user: str = ""
    """Whom the server takes us for."""
    remote_standing: Standing = Standing.SAME
    tags_kept: tuple[str, ...] = ()


async def fetch(
    store: SyncStore,
    stream: ByteStream,
    request: FetchRequest,
    hooks: TargetTree | None = None,
    progress: Progress | None = None,
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
            store, session, request, hooks or TargetTree(), progress or SILENT, greeted
        )
        return await fetching.run()


async def pull(
    store: SyncStore,
    stream: ByteStream,
    request: FetchRequest,
    hooks: TargetTree | None = None,
    progress: Progress | None = None,
) -> FetchSummary:
    """Fetch and move the local branches: the request's `move` must not be "none"."""
    assert request.move != "none", "a pull moves branches; fetch does not"
    return await fetch(store, stream, request, hooks, progress)


async def clone(
    store: SyncStore,
    stream: ByteStream,
    request: CloneRequest,
    hooks: TargetTree | None = None,
    progress: Progress | None = None,
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
            depth=request.depth,
            subdots=request.subdots,
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
            if len(dots) > DOTS_MAX:
                raise ProtocolError(f"more than {DOTS_MAX} dots")
            if page.last:
                return dots


@dataclass
class _Fetching:
    store: SyncStore
    session: Session
    request: FetchRequest
    hooks: TargetTree
    progress: Progress
    greeted: Greeted | None = None
    began_s: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.log = self._new_log()
        self.done: Done | None = None
        self.incoming: Incoming | None = None
        self.eager = False
        self.standing = Standing.SAME
        self.resumed_objects = 0
        self.tags: dict[str, RefValue] = {}
        """Tags of the remote, by ref; those come whose commits are here then."""
        self.tag_objects: dict[str, RefValue] = {}
        """Annotated tags whose objects are asked for."""
        self.signatures = ReceivedSignatures()

    async def run(self) -> FetchSummary:
        self.known = last_seen(self.store, self.request.remote, self.request.dot)
        remote, probed = await self._open()
        dot = await in_thread(partial(self._local_dot, remote))
        self.log.dot = dot
        self.standing = await in_thread(partial(self._standing, dot, remote))
        wanted = self._wanted(remote)
        self.log.branch = next((name.partition("/")[2] for name in wanted), None)
        here = await in_thread(partial(self._holding, dot))
        if here.hollow or here.subdots is not None:
            require_hollow(self.session.connection.peer)
        tips = list(dict.fromkeys(wanted.values()))
        wants = [tip for tip in tips if not here.graph.has(tip)]
        hollow_tips = [tip for tip in tips if tip in here.hollow]
        self.tag_objects = await in_thread(partial(self._tags_to_ask, here, dot, wants))
        if not (wants or hollow_tips or self.tag_objects) or self.request.dry_run:
            none = Arrivals()
            summary = await in_thread(partial(self._conclude, dot, remote, wanted, none, None))
        else:
            heads = self._local_heads(dot)
            with stage("negotiate"):
                common = await negotiate(self.session, here.graph, heads, remote.tips(), probed)
            ask = self._ask(dot, here, common.heads, wants, hollow_tips)
            summary = await self._transfer(
                ask, here, lambda arrivals: self._conclude_tips(dot, remote, wanted, arrivals)
            )
        if self.request.dry_run:
            return summary
        return await self._deepen(dot, remote, tips, summary)

    async def _transfer(
        self, ask: Fetch, here: Holding, conclude: Callable[[Arrivals], _Result]
    ) -> _Result:
        """Fetch, prove, and let `conclude` record what arrived."""
        try:
            incoming = await in_thread(partial(self._open_quarantine, ask.dot))
            await self._receive(ask, incoming)
            self.progress.phase("checking")
            with stage("verify"):
                arrivals = await steps_in_thread(prove_closure(incoming, here, ask.wants))
            check_received(incoming.quarantine, self.tag_objects)
            self.signatures.check(is_here(here.graph, incoming.quarantine, arrivals.new))
            return await in_thread(partial(conclude, arrivals))
        except DmError as exc:
            await in_thread(partial(self.log.record_failure, exc))
            raise
        finally:
            await self._close()

    def _new_log(self) -> TransferLog:
        return TransferLog(
            self.store,
            direction="fetch" if self.request.move == "none" else "pull",
            remote=self.request.remote,
            command=self.request.command,
            actor=self.request.actor,
        )

    def _holding(self, dot: DotId) -> Holding:
        """What is here; a dot that is not will keep the subdots that were asked for."""
        here, asked = holding_of(self.store, dot), self.request.subdots
        if self.store.catalog.dot(dot) is None:
            return replace(here, subdots=asked)
        if asked is not None and set(asked) != set(here.subdots or ()):
            kept = "all" if here.subdots is None else ", ".join(here.subdots)
            raise UsageError(
                f"this dot is here already, with other subdots: {kept}",
                hint="clone into another store to keep other subdots",
            )
        return here

    def _ask(
        self,
        dot: DotId,
        here: Holding,
        frontier: Sequence[ObjectId],
        wants: Sequence[ObjectId],
        content: Sequence[ObjectId],
    ) -> Fetch:
        frontier = frontier[:FRONTIER_MAX]
        absent: Sequence[ObjectId] = list(first_hollow(here, frontier))
        if len(absent) > ABSENT_MAX:  # claim nothing: what is here is left out by the inventory
            absent = frontier = frontier[:ABSENT_MAX]
        return Fetch(
            self.log.id,
            dot,
            tuple(wants),
            tuple(frontier),
            self.request.depth,
            tuple(content),
            tuple(absent),
            here.subdots,
        )

    # --- content of commits whose record is here -----------------------------------------------

    async def _deepen(
        self, dot: DotId, remote: RemoteDot, tips: list[ObjectId], summary: FetchSummary
    ) -> FetchSummary:
        """Bring the content that was asked for, newest first: each commit is compared with a child,
        and what a cut leaves is a history that goes less far back."""
        here = await in_thread(partial(self._holding, dot))
        targets = self._targets(here, tips)
        frontier = [tip for tip in remote.tips() if here.graph.has(tip)]
        gained = 0
        for first in range(0, len(targets), CONTENT_MAX):
            batch = targets[first : first + CONTENT_MAX]
            self.log, self.incoming = self._new_log(), None
            self.tag_objects, self.signatures = {}, ReceivedSignatures()
            self.log.dot = dot
            ask = self._ask(dot, here, frontier, [], batch)
            summary, count = await self._transfer(
                ask, here, partial(self._conclude_deepening, dot, summary)
            )
            gained += count
            here = await in_thread(partial(self._holding, dot))
        return replace(summary, commits_unavailable=len(targets) - gained)

    def _targets(self, here: Holding, tips: list[ObjectId]) -> list[ObjectId]:
        """Hollow commits whose content is asked for, newest first."""
        request = self.request
        if request.unshallow:
            found = set(here.hollow)
        elif request.deepen:
            found = hollow_within(here, tips, request.deepen)
        elif request.depth:
            found = within_depth(here.graph, tips, request.depth) & here.hollow
        else:
            return []
        return sorted(found, key=lambda c: (here.graph.generation(c), c), reverse=True)

    def _conclude_deepening(
        self, dot: DotId, summary: FetchSummary, arrivals: Arrivals
    ) -> tuple[FetchSummary, int]:
        """Record the commits that are complete now; the summary with them, and how many."""
        assert self.incoming is not None
        received = self.incoming.window.records_received
        count = arrivals.deepened_count
        if count:
            self.incoming.quarantine.promote()
            with self.store.catalog.transaction(self.log.command, self.log.actor) as tx:
                for event in arrivals.events(dot, self.log.id):
                    tx.append(event)
                for event in self.signatures.events(self.store.catalog, dot):
                    tx.append(event)
                for event in self.log.finish_events("done", self.log_summary(arrivals)):
                    tx.append(event)
            self.log.finished()
        done = self.done
        return replace(
            summary,
            transfer_id=summary.transfer_id or self.log.id,
            commits_deepened=summary.commits_deepened + count,
            objects_received=summary.objects_received + received,
            bytes_sent=self.session.bytes_sent,
            bytes_received=self.session.bytes_received,
            round_trips=self.session.round_trips,
            resumed_objects=summary.resumed_objects + self.resumed_objects,
            verbatim=summary.verbatim + (done.verbatim_count if done else 0),
            reencoded=summary.reencoded + (done.reencoded_count if done else 0),
            elapsed_s=time.monotonic() - self.began_s,
            nothing_to_do=summary.nothing_to_do and not count,
        ), count

    def _open_quarantine(self, dot: DotId) -> Incoming:
        objects = self.store.objects(dot)
        self.incoming = Incoming(self.session, objects, self.progress, reveal=True)
        return self.incoming

    async def _close(self) -> None:
        await in_thread(self.log.close)
        if self.incoming is not None:
            await self.incoming.close()

    # --- what is where ------------------------------------------------------------------------

    async def _open(self) -> tuple[RemoteDot, dict[ObjectId, int]]:
        request = self.request
        ask = Refs(request.dot, request.remote_namespace, request.remote_name, Intent.PULL)
        probe = [] if request.dot is None else self._local_heads(request.dot)[:PROBED_HEADS_MAX]
        is_partial = bool(request.depth or request.subdots)
        remote, answer = await open_dot(
            self.session, self.store, ask, probe, self.greeted, is_partial=is_partial
        )
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
                hint=f"dm {'bundle apply' if request.command == 'bundle' else 'clone'} "
                "--local-name chooses another name",
            )
        if is_deleted and not request.dry_run:
            self.hooks.revive(self.store, remote.dot, namespace, request.local_name, request.actor)
        return remote.dot

    def _standing(self, dot: DotId, remote: RemoteDot) -> Standing:
        request = self.request
        return refuse_rewound(
            self.store,
            request.remote,
            dot,
            remote,
            self.known,
            accept_rewind=request.accept_rewind,
        )

    def _wanted(self, remote: RemoteDot) -> dict[str, ObjectId]:
        """The refs to bring and their commits: branches after what they stem from, and tags. Of
        some branches, or only so far back, only the tags come that lie in what is brought."""
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
        if self.request.tags:
            self.tags = {n: v for n, v in remote.refs.items() if n.startswith("tag/")}
        if names is None and not self.request.depth:
            wanted |= {name: value.commit for name, value in self.tags.items()}
        if len(set(wanted.values())) > WANTS_MAX:
            raise ProtocolError(f"more than {WANTS_MAX} tips: fetch branches one by one")
        return wanted

    def _tags_to_ask(
        self, here: Holding, dot: DotId, wants: Sequence[ObjectId]
    ) -> dict[str, RefValue]:
        """Annotated tags that are new here and name what is here, or may be afterwards; as many as
        one FETCH has room for beside `wants`."""
        is_known = self.store.catalog.dot(dot) is not None
        objects = self.store.objects(dot) if is_known else None
        found: dict[str, RefValue] = {}
        for name, value in self._new_tags(dot):
            may_come = bool(wants) or here.graph.has(value.commit)
            if value.peeled is None or not may_come:
                continue
            if objects is None or not objects.has(Kind.TAG, value.id):
                found[name] = value
        return dict(islice(found.items(), WANTS_MAX - len(wants)))

    def _new_tags(self, dot: DotId) -> Iterator[tuple[str, RefValue]]:
        """Tags that are not here, or with --force otherwise."""
        rows = self.store.catalog.refs(dot, "tag/")
        local = {row.name: row.target for row in rows}
        for name, value in self.tags.items():
            if name not in local or (self.request.move == "force" and local[name] != value.id):
                yield name, value

    def new_tags(self, dot: DotId, graph: GraphView) -> Iterator[RefUpdate]:
        """Updates of the tags whose commits are here with content, and whose objects are."""
        objects = None
        for name, value in self._new_tags(dot):
            if not graph.has(value.commit):
                continue
            if is_hollow_here(self.store.catalog, dot, value.commit):
                continue
            if value.peeled is not None:
                objects = objects or self.store.objects(dot)
                if received_tag(objects, name, value.id) is None:
                    continue
            old = ref_target(self.store, dot, name)
            yield RefUpdate(name, RefMode.LEASE if old else RefMode.CREATE, old, value.id)

    def tags_kept(self, dot: DotId) -> tuple[str, ...]:
        """Tags that stand for something else at the remote and stay as they are here."""
        if self.request.move == "force":
            return ()
        local = {row.name: row.target for row in self.store.catalog.refs(dot, "tag/")}
        return tuple(
            name.removeprefix("tag/")
            for name, value in self.tags.items()
            if local.get(name, value.id) != value.id
        )

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

    async def _receive(self, ask: Fetch, incoming: Incoming) -> None:
        tags = tuple(dict.fromkeys(value.id for value in self.tag_objects.values()))
        await self.session.send(replace(ask, wants=(*ask.wants, *tags)))
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
                case Signatures():
                    self.signatures.take(message, self.log.id)
                case Done():
                    if message.transfer != self.log.id:
                        raise ProtocolError("DONE of another transfer")
                    incoming.check_count(message.records_sent)
                    await incoming.settle()
                    self.done = message
                    self.resumed_objects = 0 if self.eager else incoming.resumed_count
                    return
                case _:
                    raise ProtocolError(f"{message.TYPE.name} within a fetch")

    # --- concluding -----------------------------------------------------------------------------

    def _conclude_tips(
        self, dot: DotId, remote: RemoteDot, wanted: dict[str, ObjectId], arrivals: Arrivals
    ) -> FetchSummary:
        """Raises ContentAbsent when a tip came by its record alone: no ref may name it."""
        complete = frozenset(arrivals.complete)
        lacking = frozenset(arrivals.new) | frozenset(self._holding(dot).hollow)
        for name, commit in wanted.items():
            if commit in lacking - complete:
                raise ContentAbsent(
                    f"{shown_ref(name)}: {self.request.remote} has only the record of "
                    f"{commit.hex()[:12]}, not its content",
                    hint="fetch from a remote that has it",
                    ref=name,
                    commit=commit.hex(),
                )
        if self.request.subdots is not None:
            self._refuse_unknown_subdots(wanted)
        return self._conclude(dot, remote, wanted, arrivals, self.incoming)

    def _refuse_unknown_subdots(self, wanted: dict[str, ObjectId]) -> None:
        """A name that no fetched tip has as a subdot is a mistake. Raises PathNotFound."""
        assert self.incoming is not None and self.request.subdots is not None
        quarantine = self.incoming.quarantine
        found: set[bytes] = set()
        for commit in set(wanted.values()):
            root = commit_from_bytes(quarantine.read(Kind.COMMIT, commit), trusted=True).root
            found.update(entry.name for entry in directory_entries(quarantine, root.tree))
        for name in self.request.subdots:
            if name.encode() not in found:
                shown = (subdot.decode("utf-8", "backslashreplace") for subdot in sorted(found))
                raise PathNotFound(
                    f"no subdot {name} at {self.request.remote}",
                    hint=f"there are: {', '.join(shown) or 'none'}",
                )

    def _conclude(
        self,
        dot: DotId,
        remote: RemoteDot,
        wanted: dict[str, ObjectId],
        arrivals: Arrivals,
        incoming: Incoming | None,
    ) -> FetchSummary:
        """Promote, record commits, tracking refs and local refs in one transaction, move trees."""
        if incoming is not None:
            incoming.quarantine.promote()
        is_new = self.store.catalog.dot(dot) is None
        change = _Conclusion(self, dot, remote, wanted, arrivals, incoming, is_new)
        if self.request.dry_run or change.is_nothing():
            pass  # not even the lock is taken, which would write its holder's name
        elif is_new or self.request.move == "none":
            change.record()
        else:
            with self.hooks.locked(self.store, dot):
                change.record()
                self.hooks.finish_switches(self.store, dot)
        if change.refused is not None:
            raise change.refused
        return self._summary(dot, change)

    def log_summary(self, arrivals: Arrivals) -> tuple[tuple[str, str | int | None], ...]:
        """What the log tells of a transfer."""
        received = self.incoming.window.records_received if self.incoming else 0
        return (
            ("commits", len(arrivals.new)),
            ("commits_hollow", arrivals.hollow_count),
            ("commits_deepened", arrivals.deepened_count),
            ("objects", received),
            ("bytes_received", self.session.bytes_received),
        )

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
            new_commits=change.arrivals.new,
            transfer_id=self.log.id if incoming else None,
            commits_received=len(change.arrivals.new),
            commits_hollow=change.arrivals.hollow_count,
            commits_deepened=change.arrivals.deepened_count,
            objects_received=incoming.window.records_received if incoming else 0,
            bytes_sent=self.session.bytes_sent,
            bytes_received=self.session.bytes_received,
            round_trips=self.session.round_trips,
            resumed_objects=self.resumed_objects,
            verbatim=done.verbatim_count if done else 0,
            reencoded=done.reencoded_count if done else 0,
            elapsed_s=time.monotonic() - self.began_s,
            nothing_to_do=not change.arrivals and not any(d.moves for d in change.decisions),
            created=change.is_new,
            rewound=self.standing is Standing.REWOUND,
            remote_user=change.remote.user,
            remote_standing=self.standing,
            tags_kept=self.tags_kept(dot),
        )


@dataclass
class _Conclusion:
    """The catalog's part of a fetch: what to append, decided inside the transaction."""

    fetching: _Fetching
    dot: DotId
    remote: RemoteDot
    wanted: dict[str, ObjectId]
    arrivals: Arrivals
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

    def is_nothing(self) -> bool:
        """Is all as the remote has it, and no switch of a tree left to complete?"""
        if self.arrivals or self.is_new or self.fetching.store.catalog.switches(self.dot):
            return False
        if self.fetching.standing is not Standing.SAME:
            return False
        return not self._ref_changes({}) and self.refused is None

    def record(self) -> None:
        """Append everything at once; nothing when nothing changes.

        A branch that may not move is no reason to drop what came: commits and tracking refs are
        recorded, the branches stay, and `refused` says why.
        """
        store, log = self.fetching.store, self.fetching.log
        saved = self._prepare_trees()
        if not self.arrivals and not self.is_new and not self._ref_changes(saved):
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
                summary = self.fetching.log_summary(self.arrivals)
                for event in log.finish_events(status, summary):
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
            if request.subdots is not None:
                events.append(DotScopeSet(self.dot, request.subdots))
        events += self.arrivals.events(self.dot, self.fetching.log.id)
        catalog = self.fetching.store.catalog
        return events + self.fetching.signatures.events(catalog, self.dot)

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
        if events or self.arrivals or self.fetching.standing is not Standing.SAME:
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
        asked = self.request.branches
        updates = []
        for name, commit in self.wanted.items():
            space, _, short = name.partition("/")
            if space == "branch" and self.request.move != "none":
                is_asked = asked is not None and short in asked
                mode = modes[self.request.move] if is_asked else RefMode.ADVANCE
                if asked is None:
                    mode = modes[self.request.move]
                expected = None
                if mode is RefMode.LEASE:
                    expected = ref_target(self.fetching.store, self.dot, name)
                origin = self.remote.refs[name].origin
                updates.append(RefUpdate(name, mode, expected, commit, origin))
        graph = graph_of(self.fetching.store, self.dot)
        return [*updates, *self.fetching.new_tags(self.dot, graph)]

    def _decide(self, saved: dict[str, ObjectId]) -> None:
        """Decide every update; when one asked for is refused, no local branch moves."""
        catalog = self.fetching.store.catalog
        graph = catalog.graph(self.dot)
        now_ns = time.time_ns()

        def free_name(ref: str) -> str:
            return stash_name(
                ref,
                now_ns,
                lambda name: name in self.wanted or catalog.ref(self.dot, name) is not None,
            )

        decisions = []
        for update in self._updates():
            is_tag = update.ref.startswith("tag/")  # whose commit is here
            if update.ref in self.kept or not (is_tag or graph.has(update.new)):
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
