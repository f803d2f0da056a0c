"""Negotiation: the exact frontier between two histories, by set queries (WIRE.md 5.1).

Classifies the local commits as common or missing at the peer. A commit the peer holds, be it by
its record alone, makes all its ancestors common; one it lacks makes all its descendants missing (a
store holds a commit's record only with those of its whole history). Where the content is, is
another question. Never sends bytes in proportion to the length of the history.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Protocol

from dmsync.core.ids import ObjectId
from dmsync.errors import ProtocolError
from dmsync.wire.limits import KNOWN_IDS_MAX
from dmsync.wire.messages import Known

FIRST_BUDGET: Final = 256
NEWEST_HEADS_PROBED: Final = 64

_UNDECIDED: Final = 0
_COMMON: Final = 1
_MISSING: Final = 2


class Parents(Protocol):
    def parents(self, commit: ObjectId) -> Sequence[ObjectId]: ...


class Negotiator:
    """Asks about `undecided` (topological order, parents first) until all are classified.

    `common` are heads known beforehand to be held by both; `undecided` holds neither them nor
    their ancestors.
    """

    def __init__(
        self, graph: Parents, undecided: Iterable[ObjectId], common: Iterable[ObjectId] = ()
    ) -> None:
        self._ids = list(undecided)
        self._position = {commit: at for at, commit in enumerate(self._ids)}
        self._seeds = tuple(dict.fromkeys(common))
        self._seed_children: dict[ObjectId, list[int]] = {seed: [] for seed in self._seeds}
        self._parents: list[tuple[int, ...]] = []
        self._children: list[list[int]] = [[] for _ in self._ids]
        self._link(graph)
        self._state = bytearray(len(self._ids))
        self._undecided_count = len(self._ids)
        self._asked: list[int] = []
        self._budget = FIRST_BUDGET
        self.queries_count = 0

    def _link(self, graph: Parents) -> None:
        for at, commit in enumerate(self._ids):
            parents = graph.parents(commit)
            for seed in self._seed_children.keys() & parents:
                self._seed_children[seed].append(at)
            positions = [self._position.get(parent) for parent in parents]
            known = tuple(p for p in positions if p is not None)
            assert all(p < at for p in known), "undecided commits come parents first"
            self._parents.append(known)
            for parent in known:
                self._children[parent].append(at)

    @property
    def is_finished(self) -> bool:
        return self._undecided_count == 0

    def next_query(self) -> tuple[ObjectId, ...]:
        """The commits to ask about next (each undecided, at most 4,096), empty when finished."""
        if self.is_finished:
            return ()
        chosen = self._first_query() if self.queries_count == 0 else []
        chosen = chosen or self._later_query()
        self._asked = chosen
        self.queries_count += 1
        return tuple(self._ids[at] for at in chosen)

    def answer(self, states: bytes) -> None:
        """Take the peer's answer (one Known byte per id asked) to the last query.

        Raises:
            ProtocolError: wrong length, or the answers contradict each other.
        """
        if len(states) != len(self._asked):
            raise ProtocolError("KNOWN_REPLY does not answer the ids asked")
        for at, state in zip(self._asked, states, strict=True):
            if state == Known.ABSENT:
                self._spread(at, _MISSING, self._children)
            else:
                self._spread(at, _COMMON, self._parents)
        self._asked = []

    def take_known(self, states: Mapping[ObjectId, int]) -> None:
        """Take answers that were asked for otherwise. Raises ProtocolError on contradictions."""
        self._asked = [at for at, commit in enumerate(self._ids) if commit in states]
        self.answer(bytes(states[self._ids[at]] for at in self._asked))

    def _spread(self, start: int, value: int, edges: Sequence[Sequence[int]]) -> None:
        if self._state[start] not in (_UNDECIDED, value):
            raise ProtocolError("the peer holds a commit but not its history")
        stack = [start]
        while stack:
            at = stack.pop()
            if self._state[at] == value:
                continue
            if self._state[at] != _UNDECIDED:
                raise ProtocolError("the peer holds a commit but not its history")
            self._state[at] = value
            self._undecided_count -= 1
            stack.extend(edges[at])

    def missing(self) -> list[ObjectId]:
        """The commits the peer lacks, parents first."""
        return [c for c, state in zip(self._ids, self._state, strict=True) if state == _MISSING]

    def frontier(self) -> list[ObjectId]:
        """Heads of what both hold: seeds and common commits, without a common child."""
        heads = [
            commit
            for at, commit in enumerate(self._ids)
            if self._state[at] == _COMMON
            and not any(self._state[child] == _COMMON for child in self._children[at])
        ]
        seeds = [
            seed
            for seed, children in self._seed_children.items()
            if not any(self._state[child] == _COMMON for child in children)
        ]
        return [*seeds, *heads]

    # --- choosing ---------------------------------------------------------------------------

    def _first_query(self) -> list[int]:
        heads = [at for at in reversed(range(len(self._ids))) if not self._children[at]]
        chosen = dict.fromkeys(heads[:KNOWN_IDS_MAX])
        for head in heads[:NEWEST_HEADS_PROBED]:
            at, distance = head, 0
            wanted = 1
            while self._parents[at]:
                at, distance = self._parents[at][0], distance + 1
                if distance == wanted:
                    chosen[at] = None
                    wanted *= 2
        undecided = [at for at in chosen if self._state[at] == _UNDECIDED]
        return undecided[:KNOWN_IDS_MAX]

    def _later_query(self) -> list[int]:
        undecided = [at for at in range(len(self._ids)) if self._state[at] == _UNDECIDED]
        budget, self._budget = self._budget, min(self._budget * 2, KNOWN_IDS_MAX)
        if len(undecided) <= budget:
            return undecided
        chosen = dict.fromkeys(_evenly(self._edge(undecided, self._children), budget // 3))
        chosen.update(dict.fromkeys(_evenly(self._edge(undecided, self._parents), budget // 3)))
        chosen.update(dict.fromkeys(_evenly(undecided, budget - len(chosen))))
        return list(chosen)

    def _edge(self, undecided: list[int], edges: Sequence[Sequence[int]]) -> list[int]:
        """Undecided commits with no undecided neighbour along `edges`: heads or roots."""
        return [
            at for at in undecided if all(self._state[next_] != _UNDECIDED for next_ in edges[at])
        ]


def _evenly(items: list[int], count: int) -> list[int]:
    """At most `count` of `items`, evenly spaced, none at the very ends when there are more."""
    if len(items) <= count:
        return items
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]
