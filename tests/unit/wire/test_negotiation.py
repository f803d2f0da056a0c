"""The negotiator finds the exact frontier in few queries, whatever the shape of the graph."""

import random
from collections.abc import Callable

import pytest

from dmsync.core.ids import ObjectId
from dmsync.errors import ProtocolError
from dmsync.wire.limits import KNOWN_IDS_MAX
from dmsync.wire.messages import Known
from dmsync.wire.negotiation import Negotiator


class Graph:
    """A history given by numbers: parents of commit n, all smaller than n."""

    def __init__(self, parents: list[tuple[int, ...]]) -> None:
        self._parents = parents

    def parents(self, commit: ObjectId) -> tuple[ObjectId, ...]:
        return tuple(named(n) for n in self._parents[int.from_bytes(commit, "big")])


def named(number: int) -> ObjectId:
    return ObjectId(number.to_bytes(32, "big"))


def closure(parents: list[tuple[int, ...]], tips: list[int]) -> set[int]:
    seen, stack = set(tips), list(tips)
    while stack:
        for parent in parents[stack.pop()]:
            if parent not in seen:
                seen.add(parent)
                stack.append(parent)
    return seen


def negotiate(parents: list[tuple[int, ...]], held: set[int]) -> Negotiator:
    negotiator = Negotiator(Graph(parents), [named(n) for n in range(len(parents))])
    while query := negotiator.next_query():
        assert len(query) <= KNOWN_IDS_MAX
        assert len(set(query)) == len(query)
        numbers = [int.from_bytes(commit, "big") for commit in query]
        negotiator.answer(bytes(Known.CONTENT if n in held else Known.ABSENT for n in numbers))
    expected = [named(n) for n in range(len(parents)) if n not in held]
    assert negotiator.missing() == expected
    ids = [int.from_bytes(commit, "big") for commit in negotiator.frontier()]
    assert closure(parents, ids) == held
    return negotiator


def linear(length: int) -> list[tuple[int, ...]]:
    return [(n - 1,) if n else () for n in range(length)]


def branches(count: int, length: int) -> list[tuple[int, ...]]:
    """A root and `count` independent lines of `length` commits."""
    return [()] + [(n - count if n > count else 0,) for n in range(1, count * length + 1)]


def comb(mainline: int, teeth: int) -> list[tuple[int, ...]]:
    return linear(mainline) + [(n % mainline,) for n in range(teeth)]


@pytest.mark.parametrize(
    ("name", "parents", "tips", "queries_max"),
    [
        ("10 diverged", linear(20), [9], 2),
        ("1,000 diverged", linear(2_000), [999], 3),
        ("100k, half diverged", linear(100_000), [49_999], 4),
        ("nothing known", linear(100_000), [], 4),
        ("all known", linear(100_000), [99_999], 1),
        ("64 branches", branches(64, 1_500), list(range(48_001, 48_065)), 6),
        ("500 branches", branches(500, 200), list(range(49_501, 50_001)), 8),
        ("9,000 private heads", comb(91_000, 9_000), [90_999], 8),
        ("9,000 private heads, half the mainline", comb(91_000, 9_000), [45_000], 8),
    ],
)
def test_negotiation_is_exact_and_bounded(
    name: str, parents: list[tuple[int, ...]], tips: list[int], queries_max: int
) -> None:
    negotiator = negotiate(parents, closure(parents, tips))
    assert negotiator.queries_count <= queries_max, name


@pytest.mark.parametrize("seed", range(40))
def test_negotiation_is_exact_on_random_graphs_with_merges(seed: int) -> None:
    rng = random.Random(seed)
    size = rng.randrange(1, 3_000)
    reach = rng.choice([1, 3, 50])
    parents: list[tuple[int, ...]] = [()]
    for n in range(1, size):
        low = max(0, n - reach)
        picked = {rng.randrange(low, n) for _ in range(rng.choice([0, 1, 1, 1, 2]))}
        parents.append(tuple(sorted(picked, reverse=True)))
    tips = [rng.randrange(size) for _ in range(rng.randrange(0, 4))]
    assert negotiate(parents, closure(parents, tips)).queries_count <= 10


def test_contradicting_answers_are_refused() -> None:
    negotiator = Negotiator(Graph(linear(10)), [named(n) for n in range(10)])
    query = negotiator.next_query()
    states = bytes(Known.CONTENT if commit == query[0] else Known.ABSENT for commit in query)
    with pytest.raises(ProtocolError):
        negotiator.answer(states)


@pytest.mark.parametrize("change", [lambda s: s[:-1], lambda s: s + b"\0"])
def test_an_answer_of_another_length_is_refused(change: Callable[[bytes], bytes]) -> None:
    negotiator = Negotiator(Graph(linear(10)), [named(n) for n in range(10)])
    with pytest.raises(ProtocolError):
        negotiator.answer(change(bytes(len(negotiator.next_query()))))
