"""The base of a merge: the one merge base, or several merged into a virtual one.

In a criss-cross neither of two merge bases is the one; both are merged first, over their own
bases, and what conflicts there counts as changed on both sides: it is decided again.
"""

from collections.abc import Callable, Sequence
from typing import Final

from dmsync.core.graph import GraphView, is_ancestor, merge_bases
from dmsync.core.ids import ObjectId
from dmsync.core.objects import Entry

DEPTH_MAX: Final = 100
"""Criss-crosses on top of each other that are followed; below, the first base stands for all."""

RootOf = Callable[[ObjectId], Entry]
MergeRoots = Callable[[Entry | None, Entry, Entry], Entry]
"""Merges two trees over a base; what conflicts is absent from the result."""


def virtual_base(
    graph: GraphView, bases: Sequence[ObjectId], root_of: RootOf, merge: MergeRoots
) -> Entry | None:
    """The root of the base that `bases` (in the order of merge_bases) stand for; None for none."""
    return _Bases(graph, root_of, merge).of(tuple(bases), 0)


class _Bases:
    def __init__(self, graph: GraphView, root_of: RootOf, merge: MergeRoots) -> None:
        self._graph = graph
        self._root_of = root_of
        self._merge = merge
        self._known: dict[tuple[ObjectId, ...], Entry | None] = {}

    def of(self, bases: tuple[ObjectId, ...], depth: int) -> Entry | None:
        if bases not in self._known:
            self._known[bases] = self._merged(bases, depth)
        return self._known[bases]

    def _merged(self, bases: tuple[ObjectId, ...], depth: int) -> Entry | None:
        if not bases:
            return None
        root = self._root_of(bases[0])
        if depth >= DEPTH_MAX:
            return root
        for number in range(1, len(bases)):
            below = self._common(bases[:number], bases[number])
            root = self._merge(self.of(below, depth + 1), root, self._root_of(bases[number]))
        return root

    def _common(self, merged: tuple[ObjectId, ...], other: ObjectId) -> tuple[ObjectId, ...]:
        """The maximal common ancestors of a merge of `merged` and of `other`."""
        found = {base for one in merged for base in merge_bases(self._graph, one, other)}
        maximal = [
            base
            for base in found
            if not any(above != base and is_ancestor(self._graph, base, above) for above in found)
        ]
        return tuple(sorted(maximal, key=lambda base: (-self._graph.generation(base), base)))
