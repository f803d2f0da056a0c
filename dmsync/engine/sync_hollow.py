"""Commits with content and commits by their record alone: what is where, and what to send.

A hollow commit is in the graph like any other, so graph questions (what is common, who descends
from whom) never depend on which content is where. This module answers the second question: what
content the other side has and lacks, and with which commit each one sent is best compared.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from dmsync.core.events import CommitsAdded, CommitsListed, Event
from dmsync.core.graph import GraphView, ancestors_difference
from dmsync.core.ids import DotId, ObjectId
from dmsync.engine.ports import SyncStore
from dmsync.engine.sync_opening import graph_of
from dmsync.errors import ContentAbsent
from dmsync.storage.catalog_queries import CatalogQueries
from dmsync.wire.messages import Fetch

Compared = tuple[ObjectId, ObjectId | None]
"""A commit, and the one whose content its own is compared with; None: with nothing."""
_Parents = Callable[[ObjectId], Sequence[ObjectId]]


@dataclass(frozen=True)
class Holding:
    """What a store has of one dot: all commits, those without content, its refs' commits, and the
    subdots whose content it keeps (None: all)."""

    graph: GraphView
    hollow: frozenset[ObjectId] = frozenset()
    tips: tuple[ObjectId, ...] = ()
    subdots: tuple[str, ...] | None = None

    def has_content(self, commit: ObjectId) -> bool:
        return commit not in self.hollow and self.graph.has(commit)


def holding_of(store: SyncStore, dot: DotId) -> Holding:
    """What is here now; nothing when the dot is not here (yet)."""
    catalog = store.catalog
    graph = graph_of(store, dot)
    if catalog.dot(dot) is None:
        return Holding(graph)
    refs = catalog.refs(dot)
    tips = tuple(dict.fromkeys(row.target for row in refs if graph.has(row.target)))
    return Holding(graph, frozenset(catalog.hollow_commits(dot)), tips, catalog.scope(dot))


def is_hollow_here(catalog: CatalogQueries, dot: DotId, commit: ObjectId) -> bool:
    """True when the commit is here by its record alone."""
    return catalog.has_commit(dot, commit) and catalog.is_hollow(dot, commit)


def scope_of(subdots: Sequence[str] | None) -> frozenset[bytes] | None:
    """Subdots as the names of root entries."""
    return None if subdots is None else frozenset(name.encode() for name in subdots)


# --- what to send ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Selection:
    """What a sender sends: records alone, and commits with content, each with what it is compared
    with. `has_base(commit)`: its content is at both sides (before, or by this transfer)."""

    listed: Sequence[ObjectId]
    complete: Sequence[Compared]
    has_base: Callable[[ObjectId], bool]


def select_for_push(
    here: Holding, missing: Sequence[ObjectId], upgrades: Sequence[ObjectId], there: "Contents"
) -> Selection:
    """The commits the server lacks, parents first, and `upgrades`, whose record it has."""
    lacking = frozenset((*missing, *upgrades))

    def has_base(commit: ObjectId) -> bool:
        return commit not in lacking and commit not in here.hollow and there.has(commit)

    return _selection(here, missing, {*missing, *upgrades} - here.hollow, has_base, {})


def select_for_fetch(here: Holding, ask: Fetch) -> Selection:
    """What answers a FETCH. Raises ContentAbsent when a wanted commit is hollow here."""
    graph = here.graph
    for want in ask.wants:
        if want in here.hollow:
            raise content_absent_there(want)
    frontier = [commit for commit in ask.frontier if graph.has(commit)]
    missing = list(ancestors_difference(graph, ask.wants, frontier))
    near = missing
    if ask.depth:
        near = list(within_depth(graph, ask.wants, ask.depth, among=set(missing)))
    asked = {commit for commit in ask.content if graph.has(commit)}
    wanted = {*near, *asked} - here.hollow
    lacking = wanted.union(missing)
    held = None
    if ask.absent:
        absent = [commit for commit in ask.absent if graph.has(commit)]
        held = set(ancestors_difference(graph, frontier, absent))

    def has_base(commit: ObjectId) -> bool:
        if commit in lacking or commit in here.hollow:
            return False
        return held is None or commit in held

    children = _children_among(graph, filter(has_base, held or ()), asked)
    return _selection(here, missing, wanted, has_base, children)


def _selection(
    here: Holding,
    missing: Sequence[ObjectId],
    wanted: Collection[ObjectId],
    has_base: Callable[[ObjectId], bool],
    children: Mapping[ObjectId, ObjectId],
) -> Selection:
    listed = [commit for commit in missing if commit not in wanted]
    known = sorted(set(wanted).difference(missing), key=here.graph.generation)
    complete = known + [commit for commit in missing if commit in wanted]
    return Selection(
        listed, comparisons(complete, here.graph.parents, has_base, children), has_base
    )


@dataclass(frozen=True)
class Contents:
    """Which common commits the server has with content: all, or those in `known`."""

    known: frozenset[ObjectId] | None = None

    def has(self, commit: ObjectId) -> bool:
        return self.known is None or commit in self.known


def comparisons(
    commits: Sequence[ObjectId],
    parents_of: _Parents,
    has_base: Callable[[ObjectId], bool],
    children: Mapping[ObjectId, ObjectId],
) -> list[Compared]:
    """`commits` (parents first) in an order in which each is compared with a commit before it.

    That is the first parent wherever its content is there; above a hollow parent a neighbour,
    also a child (`children`: commit -> a child whose content is there): what little differs from
    it is sent, or read by who proves it, and not the whole tree again.
    """
    order: list[Compared] = []
    done: set[ObjectId] = set()
    waiting: dict[ObjectId, Sequence[ObjectId]] = {}
    for commit in commits:
        parents = parents_of(commit)
        if not parents or parents[0] in done or has_base(parents[0]):
            order.append((commit, parents[0] if parents else None))
            done.add(commit)
        else:
            waiting[commit] = parents
    if waiting:
        neighbours = _neighbours(commits, parents_of, waiting)
        queue: deque[Compared] = deque()
        for commit, parents in waiting.items():
            near = [p for p in (*parents, *neighbours[commit]) if p in done or has_base(p)]
            if near or commit in children:
                queue.append((commit, near[0] if near else children[commit]))
        for commit in list(waiting):
            _spread(queue, waiting, neighbours, order)
            if commit in waiting:
                queue.append((commit, None))
        _spread(queue, waiting, neighbours, order)
    return order


def _neighbours(
    commits: Sequence[ObjectId], parents_of: _Parents, waiting: Mapping[ObjectId, object]
) -> dict[ObjectId, list[ObjectId]]:
    """Parents and children of each waiting commit among `commits`."""
    found: dict[ObjectId, list[ObjectId]] = {commit: [] for commit in waiting}
    for commit in commits:
        for parent in parents_of(commit):
            if parent in waiting:
                found[parent].append(commit)
                if commit in waiting:
                    found[commit].append(parent)
    return found


def _spread(
    queue: "deque[Compared]",
    waiting: dict[ObjectId, Sequence[ObjectId]],
    neighbours: Mapping[ObjectId, Sequence[ObjectId]],
    order: list[Compared],
) -> None:
    while queue:
        commit, base = queue.popleft()
        if waiting.pop(commit, None) is None:
            continue
        order.append((commit, base))
        queue.extend((near, commit) for near in neighbours[commit] if near in waiting)


def _children_among(
    graph: GraphView, commits: Iterable[ObjectId], parents: Collection[ObjectId]
) -> dict[ObjectId, ObjectId]:
    """For each of `parents` a child that is among `commits`."""
    if not parents:
        return {}
    return {p: commit for commit in commits for p in graph.parents(commit) if p in parents}


# --- what to ask for ---------------------------------------------------------------------------


def first_hollow(here: Holding, heads: Iterable[ObjectId]) -> dict[ObjectId, ObjectId | None]:
    """The hollow commits met first on the ways down from `heads`, each with a complete child.

    Every hollow ancestor of the heads is one of these or an ancestor of one.
    """
    found: dict[ObjectId, ObjectId | None] = {}
    seen: set[ObjectId] = set()
    stack: list[tuple[ObjectId, ObjectId | None]] = [(head, None) for head in heads]
    if not here.hollow:
        return found
    while stack:
        commit, child = stack.pop()
        if commit in here.hollow:
            if found.get(commit) is None:
                found[commit] = child
        elif commit not in seen:
            seen.add(commit)
            stack.extend((parent, commit) for parent in here.graph.parents(commit))
    return found


def complete_children(here: Holding, parents: Collection[ObjectId]) -> dict[ObjectId, ObjectId]:
    """For each of `parents`, which are hollow here, a child with content that refs reach."""
    if not parents:
        return {}
    reached = _reachable(here.graph, here.tips)
    return _children_among(here.graph, filter(here.has_content, reached), parents)


def _reachable(graph: GraphView, tips: Iterable[ObjectId]) -> Iterable[ObjectId]:
    return ancestors_difference(graph, tips, [])


def within_depth(
    graph: GraphView,
    tips: Iterable[ObjectId],
    depth: int,
    among: Collection[ObjectId] | None = None,
) -> set[ObjectId]:
    """Commits less than `depth` steps from a tip, along all parents (and only through `among`)."""
    level = {tip for tip in tips if among is None or tip in among}
    found: set[ObjectId] = set()
    while level and depth > 0:
        found |= level
        parents = {parent for commit in level for parent in graph.parents(commit)}
        level = {p for p in parents if p not in found and (among is None or p in among)}
        depth -= 1
    return found


def hollow_within(here: Holding, tips: Iterable[ObjectId], levels: int) -> set[ObjectId]:
    """Hollow commits that a way from a tip reaches by at most `levels` hollow ones, itself
    counted: what deepening by `levels` asks for."""
    cost = {tip: int(tip in here.hollow) for tip in tips}
    queue = deque(sorted(cost, key=lambda commit: cost[commit]))
    while queue:
        commit = queue.popleft()
        for parent in here.graph.parents(commit):
            is_hollow = parent in here.hollow
            reached = cost[commit] + is_hollow
            if reached <= levels and reached < cost.get(parent, levels + 1):
                cost[parent] = reached
                queue.append(parent) if is_hollow else queue.appendleft(parent)
    return {c for c, reached in cost.items() if c in here.hollow and reached <= levels}


# --- what arrived ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arrivals:
    """What a transfer brought: commits that were unknown, parents first, and all whose content is
    proven now, which may have been here by their record."""

    new: tuple[ObjectId, ...] = ()
    complete: tuple[ObjectId, ...] = ()

    @property
    def hollow_count(self) -> int:
        return len(set(self.new).difference(self.complete))

    @property
    def deepened_count(self) -> int:
        """Commits that had been here by their record alone."""
        return len(set(self.complete).difference(self.new))

    def __bool__(self) -> bool:
        return bool(self.new or self.complete)

    def events(self, dot: DotId, transfer: bytes) -> list[Event]:
        """Hollow commits are listed, among all new ones: parents come first in either event."""
        events: list[Event] = []
        if self.hollow_count:
            events.append(CommitsListed(dot, self.new, transfer))
        if self.complete:
            events.append(CommitsAdded(dot, self.complete, transfer, None))
        return events


def content_absent_there(commit: ObjectId, what: str = "") -> ContentAbsent:
    """The error for a tip that the sender has by its record alone."""
    name = f"{what} ({commit.hex()[:12]})" if what else f"commit {commit.hex()[:12]}"
    return ContentAbsent(
        f"{name} cannot be sent: only its record is there, its content was never fetched or was "
        "pruned",
        hint="dm fetch --deepen or --unshallow there brings the content, if some remote has it",
        commit=commit.hex(),
    )
