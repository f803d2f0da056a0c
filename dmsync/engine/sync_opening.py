"""Opening a session as a client: greeting, naming a dot, classifying commits."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Final

from dmsync import __version__
from dmsync.core.graph import GraphView, ancestors_difference, exceeds, nth_first_parent
from dmsync.core.ids import DotId, ObjectId
from dmsync.engine.background import in_thread
from dmsync.engine.ports import SyncStore
from dmsync.engine.session import Session
from dmsync.errors import ProtocolError, RevisionNotFound, VersionMismatch
from dmsync.wire import limits
from dmsync.wire.messages import (
    Hello,
    Known,
    KnownQuery,
    KnownReply,
    Refs,
    RefsReply,
    RefValue,
)
from dmsync.wire.negotiation import NEWEST_HEADS_PROBED, Negotiator

HOLLOW: Final = "hollow"
"""Capability: knows commits without content, and dots of which only some subdots are kept."""
TAGS: Final = "tags"
"""Capability: knows annotated tags, and signatures of commits and tags."""
SHARING: Final = "share"
"""Capability of a server: collaborators can be asked for and changed over the wire."""
LOGIN: Final = "login"
"""Capability of a server: its value is the name that it logged the client in as."""
FEW_UNDECIDED: Final = 4096
"""Of so many commits each is looked at without asking first."""
Greeted = Callable[[Hello], None]
"""Called with the greeting once the other side has proven to be a dm server: an address is worth
remembering, and it may have taken us for somebody else. What it raises ends the session."""


def hello(store: SyncStore, *, login: str = "") -> Hello:
    """What either side says first; `login`: as whom a server took the client in."""
    return Hello(
        version_min=limits.VERSION_MIN,
        version_max=limits.VERSION_MAX,
        capabilities=(
            ("hash", "blake3-256"),
            ("zstd", "1"),
            ("resume", "1"),
            ("atomic", "1"),
            (HOLLOW, "1"),
            (TAGS, "1"),
            (SHARING, "1"),
            *(((LOGIN, login),) if login else ()),
        ),
        required=(),
        agent=f"dmsync/{__version__}",
        cluster_id=store.catalog.cluster_id(),
        epoch=store.catalog.epoch(),
        limits=(("inflight-bytes", limits.INFLIGHT_BYTES_MAX),),
    )


@dataclass(frozen=True)
class RemoteDot:
    """What the server said about one dot. `dot` None: it has none of that name for us.

    `hollow`: some of its commits lack content there; `subdots`: whose content it keeps (None: all).
    """

    dot: DotId | None
    namespace: str
    name: str | None
    default_namespace: str
    user: str
    head: str | None
    refs: dict[str, RefValue]
    cluster_id: bytes
    epoch: int
    seq: int
    hollow: bool = False
    subdots: tuple[str, ...] | None = None

    def tips(self) -> list[ObjectId]:
        return list(dict.fromkeys(value.commit for value in self.refs.values()))

    def branch_chain(self, branch: str) -> list[str]:
        """`branch` and the branches it stems from, as far as they exist, itself first."""
        chain = [branch]
        while (value := self.refs.get(f"branch/{chain[-1]}")) is not None:
            if value.origin is None or value.origin in chain:
                break
            if f"branch/{value.origin}" not in self.refs:
                break
            chain.append(value.origin)
        return chain


async def open_dot(
    session: Session,
    store: SyncStore,
    ask: Refs,
    probe: Sequence[ObjectId] = (),
    greeted: Greeted | None = None,
    *,
    is_partial: bool = False,
) -> tuple[RemoteDot, KnownReply | None]:
    """Greet and name a dot in one round trip; `probe` commits are asked about along with it.

    `greeted` is called, in a thread, when a dm server has answered. `is_partial`: this side has or
    wants commits without content, or some subdots only.

    Raises:
        VersionMismatch: the server does not know such a thing.
    """
    await session.send(hello(store), ask, *([KnownQuery(tuple(probe))] if probe else []))
    peer = await session.expect(Hello)
    if is_partial:
        require_hollow(peer)
    if greeted is not None:
        await in_thread(partial(greeted, peer))
    pages = [await session.expect(RefsReply)]
    refs_count = len(pages[0].refs)
    while not pages[-1].last:
        pages.append(await session.expect(RefsReply))
        refs_count += len(pages[-1].refs)
        if refs_count > limits.REFS_MAX:
            raise ProtocolError(f"more than {limits.REFS_MAX} refs")
    answer = await session.expect(KnownReply) if probe else None
    first = pages[0]
    refs = {value.name: value for page in pages for value in page.refs}
    if any(page.dot != first.dot for page in pages) or any(r.startswith("remote/") for r in refs):
        raise ProtocolError("REFS_REPLY pages contradict each other")
    remote = RemoteDot(
        first.dot,
        first.namespace,
        first.name,
        first.default_namespace,
        first.user,
        first.head,
        refs,
        peer.cluster_id,
        first.epoch,
        first.seq,
        first.hollow,
        first.subdots,
    )
    return remote, answer


def require_hollow(peer: Hello | None) -> None:
    """Refuse a peer that takes every commit it hears of for a complete one.

    Raises:
        VersionMismatch.
    """
    if peer is None or HOLLOW not in dict(peer.capabilities):
        raise VersionMismatch(
            "this dot is not complete on one side, and the other side's dm is too old to know that",
            hint="upgrade it, or use a dot with all its content",
            agent=peer.agent if peer else "",
        )


def knows_tags(peer: Hello | None) -> bool:
    """Whether the peer can be sent tag objects and signatures."""
    return peer is not None and TAGS in dict(peer.capabilities)


async def ask_known(session: Session, commits: Sequence[ObjectId]) -> dict[ObjectId, int]:
    """What the server holds of commits (Known values)."""
    states: dict[ObjectId, int] = {}
    for first in range(0, len(commits), limits.KNOWN_IDS_MAX):
        query = tuple(commits[first : first + limits.KNOWN_IDS_MAX])
        await session.send(KnownQuery(query))
        answer = (await session.expect(KnownReply)).states
        if len(answer) != len(query):
            raise ProtocolError("KNOWN_REPLY does not answer the ids asked")
        states.update(zip(query, answer, strict=True))
    return states


@dataclass(frozen=True)
class Frontier:
    """`heads` of what both sides hold; `missing` local commits the server lacks, parents first."""

    heads: list[ObjectId]
    missing: list[ObjectId]
    queries_count: int = 0


async def negotiate(
    session: Session,
    graph: GraphView,
    local_heads: Iterable[ObjectId],
    remote_tips: Iterable[ObjectId],
    probed: dict[ObjectId, int] | None = None,
) -> Frontier:
    """Classify the ancestors of `local_heads`.

    When every remote tip is held here, their ancestors are all the server holds of these, and
    nothing is asked. `probed`: answers that came with the refs.
    """
    tips = list(remote_tips)
    held = [tip for tip in tips if graph.has(tip)]
    holds_all = len(held) == len(tips)
    heads = list(dict.fromkeys(local_heads))
    answers = dict(probed or {})
    probes_count = 0
    if not holds_all and exceeds(graph, heads, held, FEW_UNDECIDED):
        # History behind the frontier is not to be walked: look how far back that is first.
        chains = _probe_chains(graph, heads)
        probes = dict.fromkeys(oid for chain in chains for oid in chain if oid not in answers)
        answers |= await ask_known(session, list(probes)[: limits.KNOWN_IDS_MAX])
        probes_count = 1
        held = list(dict.fromkeys([*held, *_nearest_common(chains, answers)]))
    undecided = list(ancestors_difference(graph, heads, held))
    if not undecided or holds_all:
        return Frontier(held, undecided, probes_count)
    negotiator = Negotiator(graph, undecided, held)
    negotiator.take_known(answers)
    while query := negotiator.next_query():
        await session.send(KnownQuery(query))
        negotiator.answer((await session.expect(KnownReply)).states)
    queries_count = probes_count + negotiator.queries_count
    return Frontier(negotiator.frontier(), negotiator.missing(), queries_count)


def _probe_chains(graph: GraphView, heads: Sequence[ObjectId]) -> list[list[ObjectId]]:
    """Each head and, of the newest, its first parents at distances 1, 2, 4, ...: O(log history)."""
    newest = sorted(heads, key=graph.generation, reverse=True)
    chains = [[head] for head in newest[: limits.KNOWN_IDS_MAX]]
    for chain in chains[:NEWEST_HEADS_PROBED]:
        distance = 1
        while (further := nth_first_parent(graph, chain[0], distance)) is not None:
            chain.append(further)
            distance *= 2
    return chains


def _nearest_common(
    chains: Iterable[Sequence[ObjectId]], answers: Mapping[ObjectId, int]
) -> list[ObjectId]:
    """Of each chain the first commit that the server holds. Raises ProtocolError: the server holds
    a commit but not its history."""
    found: list[ObjectId] = []
    for chain in chains:
        known = [answers[oid] != Known.ABSENT for oid in chain if oid in answers]
        if known != sorted(known):
            raise ProtocolError("the peer holds a commit but not its history")
        common = (oid for oid in chain if answers.get(oid, Known.ABSENT) != Known.ABSENT)
        found.extend(islice(common, 1))
    return found


class NoCommits:
    """The graph of a dot that is not here yet."""

    def has(self, commit: ObjectId) -> bool:
        return False

    def parents(self, commit: ObjectId) -> tuple[ObjectId, ...]:
        raise RevisionNotFound(f"no commit {commit.hex()[:12]}")

    def generation(self, commit: ObjectId) -> int:
        raise RevisionNotFound(f"no commit {commit.hex()[:12]}")

    def first_parent_depth(self, commit: ObjectId) -> int:
        raise RevisionNotFound(f"no commit {commit.hex()[:12]}")

    def jump(self, commit: ObjectId) -> ObjectId:
        raise RevisionNotFound(f"no commit {commit.hex()[:12]}")


def graph_of(store: SyncStore, dot: DotId) -> GraphView:
    """The commits of a dot as they are now; none when the dot is not here (yet)."""
    return NoCommits() if store.catalog.dot(dot) is None else store.catalog.graph(dot)


def ref_target(store: SyncStore, dot: DotId, name: str) -> ObjectId | None:
    """What a ref names now."""
    row = store.catalog.ref(dot, name)
    return None if row is None else row.target
