"""The frontier that a client finds is exact, in few queries, without walking history behind it."""

import asyncio
import random
from collections.abc import Sequence

import pytest

from dmsync.core.ids import ObjectId
from dmsync.engine.sync_opening import Frontier, negotiate
from dmsync.errors import ProtocolError
from dmsync.wire.limits import KNOWN_IDS_MAX
from dmsync.wire.messages import Known, KnownQuery, KnownReply
from tests.support.commit_graphs import MemoryGraph, Shape, memory_graph, random_shape
from tests.support.long_histories import chain, forked

UNKNOWN_TIP = ObjectId(b"x" * 32)


class Peer:
    """The server's end of a session, which holds some commits."""

    def __init__(self, held: set[ObjectId]) -> None:
        self.held = held
        self.queries: list[tuple[ObjectId, ...]] = []

    async def send(self, query: KnownQuery) -> None:
        assert 0 < len(query.ids) <= KNOWN_IDS_MAX
        assert len(set(query.ids)) == len(query.ids)
        self.queries.append(query.ids)

    async def expect(self, kind: type[KnownReply]) -> KnownReply:
        states = (Known.CONTENT if c in self.held else Known.ABSENT for c in self.queries[-1])
        return kind(bytes(states))


def found(
    graph: MemoryGraph, ids: list[ObjectId], held: Sequence[int], heads: Sequence[int]
) -> tuple[Frontier, Peer]:
    """The frontier, which has been compared with what it must be."""
    peer = Peer(graph.ancestors(*(ids[n] for n in held)))
    graph.visited = 0
    local = [ids[n] for n in heads]
    frontier = asyncio.run(negotiate(peer, graph, local, [UNKNOWN_TIP]))  # type: ignore[arg-type]
    here = graph.ancestors(*local)
    assert set(frontier.missing) == here - peer.held
    assert len(set(frontier.missing)) == len(frontier.missing)
    assert graph.ancestors(*frontier.heads) == here & peer.held
    assert frontier.queries_count == len(peer.queries)
    return frontier, peer


@pytest.mark.parametrize("apart", [0, 1, 10, 1000])
def test_a_long_common_history_is_not_walked(apart: int) -> None:
    graph, ids = memory_graph(list(chain(50_000)))
    _, peer = found(graph, ids, [49_999 - apart], [49_999])
    assert graph.visited < 10_000
    assert len(peer.queries) <= 3


@pytest.mark.parametrize(
    ("shape", "held", "heads", "queries_max"),
    [
        (list(chain(40_000)), [19_999], [39_999], 4),
        (list(chain(20_000)), [], [19_999], 4),
        (list(forked(20_000, 500, 20)), [25_000], range(20_019, 30_000, 20), 8),
        (list(forked(20_000, 9_000)), [19_999], range(20_000, 29_000), 8),
    ],
)
def test_the_frontier_is_exact_in_few_queries(
    shape: Shape, held: Sequence[int], heads: Sequence[int], queries_max: int
) -> None:
    graph, ids = memory_graph(shape)
    _, peer = found(graph, ids, held, heads)
    assert len(peer.queries) <= queries_max


@pytest.mark.parametrize("seed", range(8))
def test_the_frontier_is_exact_with_merges(seed: int) -> None:
    chance = random.Random(seed)
    graph, ids = memory_graph(random_shape(seed, 9_000))
    held = [chance.randrange(9_000) for _ in range(chance.randrange(4))]
    found(graph, ids, held, [8_999, 8_990, chance.randrange(9_000)])


def test_a_server_that_holds_a_commit_but_not_its_history_is_refused() -> None:
    graph, ids = memory_graph(list(chain(20_000)))
    peer = Peer({ids[19_999]})
    with pytest.raises(ProtocolError):
        asyncio.run(negotiate(peer, graph, [ids[19_999]], [UNKNOWN_TIP]))  # type: ignore[arg-type]
