"""Questions about the commit graph, in time proportional to the distance asked about.

All walks go in strict generation order (a commit's generation is greater than its parents'), so
a commit is reached after all its descendants: what is known about it then is final and no second
pass is needed, which is what date order and breadth-first order get wrong (lakeFS #1948).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from heapq import heapify, heappop, heappush
from itertools import islice
from typing import Final, Protocol

from dmsync.core.ids import ObjectId


class GraphView(Protocol):
    """The commits of one dot that are complete here. Methods raise RevisionNotFound for others."""

    def has(self, commit: ObjectId) -> bool: ...

    def parents(self, commit: ObjectId) -> tuple[ObjectId, ...]:
        """In order; empty for a root."""
        ...

    def generation(self, commit: ObjectId) -> int:
        """1 for a root, otherwise 1 + the greatest of its parents'."""
        ...

    def first_parent_depth(self, commit: ObjectId) -> int:
        """Number of commits before it on its first-parent chain: 0 for a root."""
        ...

    def jump(self, commit: ObjectId) -> ObjectId:
        """Some commit further back on the first-parent chain (itself for a root), placed by the
        skew-binary rule of `jumps_far`."""
        ...


def jumps_far(parent_depth: int, jump_depth_of_parent: int, second_jump_depth: int) -> bool:
    """True when a child jumps to its parent's jump's jump, False when to its parent.

    Skew-binary: two spans of equal length are joined into one, so that any distance is covered
    in O(log n) steps, while a child needs one pointer that never changes.
    """
    return parent_depth - jump_depth_of_parent == jump_depth_of_parent - second_jump_depth


_LEFT: Final = 1
_RIGHT: Final = 2
_STALE: Final = 4


class _Painting:
    """Flags spreading from commits to their parents, in descending generation order.

    `open_count` counts queued commits whose flags are among `open_flags`: when it is zero, no
    further commit can matter.
    """

    def __init__(self, view: GraphView, open_flags: frozenset[int]) -> None:
        self._view = view
        self._open_flags = open_flags
        self._flags: dict[ObjectId, int] = {}
        self._queue: list[tuple[int, ObjectId]] = []
        self.open_count = 0

    def paint(self, commit: ObjectId, flags: int) -> None:
        before = self._flags.get(commit)
        if before is None:
            heappush(self._queue, (-self._view.generation(commit), commit))
            before = 0
        after = before | flags
        self._flags[commit] = after
        self.open_count += (after in self._open_flags) - (before in self._open_flags)

    def take(self) -> tuple[ObjectId, int]:
        """The queued commit of the highest generation (lowest id first) and its final flags."""
        _, commit = heappop(self._queue)
        flags = self._flags.pop(commit)
        self.open_count -= flags in self._open_flags
        return commit, flags


def is_ancestor(view: GraphView, ancestor: ObjectId, descendant: ObjectId) -> bool:
    """True when `ancestor` is `descendant` or reachable from it."""
    lowest = view.generation(ancestor)
    if view.generation(descendant) <= lowest:
        return ancestor == descendant
    distance = view.first_parent_depth(descendant) - view.first_parent_depth(ancestor)
    if distance >= 0 and nth_first_parent(view, descendant, distance) == ancestor:
        return True
    seen = {descendant}
    stack = [descendant]
    while stack:
        for parent in view.parents(stack.pop()):
            if parent == ancestor:
                return True
            if parent not in seen and view.generation(parent) > lowest:
                seen.add(parent)
                stack.append(parent)
    return False


def merge_bases(view: GraphView, ours: ObjectId, theirs: ObjectId) -> list[ObjectId]:
    """All common ancestors that are no ancestor of another one: generation descending, then id.

    Empty when the histories are unrelated; several in a criss-cross.
    """
    if ours == theirs:
        return [ours]
    painting = _Painting(view, frozenset((_LEFT, _RIGHT, _LEFT | _RIGHT)))
    painting.paint(ours, _LEFT)
    painting.paint(theirs, _RIGHT)
    bases = []
    while painting.open_count:
        commit, flags = painting.take()
        if flags == _LEFT | _RIGHT:
            bases.append(commit)
            flags |= _STALE
        for parent in view.parents(commit):
            painting.paint(parent, flags)
    return bases


def ancestors_difference(
    view: GraphView, wanted: Iterable[ObjectId], excluded: Iterable[ObjectId]
) -> Iterator[ObjectId]:
    """Commits reachable from `wanted` but not from `excluded`, parents before children.

    The order is generation ascending, then id. Both ends belong to their own side.
    """
    found = [(view.generation(commit), commit) for commit in _difference(view, wanted, excluded)]
    found.sort()
    return (commit for _, commit in found)


def difference_count(
    view: GraphView, wanted: Iterable[ObjectId], excluded: Iterable[ObjectId]
) -> int:
    """How many commits are reachable from `wanted` but not from `excluded`."""
    return sum(1 for _ in _difference(view, wanted, excluded))


def exceeds(
    view: GraphView, wanted: Iterable[ObjectId], excluded: Iterable[ObjectId], count: int
) -> bool:
    """Whether difference_count is more than `count`; reads no further than to know that."""
    return next(islice(_difference(view, wanted, excluded), count, None), None) is not None


def _difference(
    view: GraphView, wanted: Iterable[ObjectId], excluded: Iterable[ObjectId]
) -> Iterator[ObjectId]:
    painting = _Painting(view, frozenset((_LEFT,)))
    for commit in excluded:
        painting.paint(commit, _RIGHT)
    for commit in wanted:
        painting.paint(commit, _LEFT)
    while painting.open_count:
        commit, flags = painting.take()
        if flags == _LEFT:
            yield commit
        # Painting excluded commits with _RIGHT alone is enough: _LEFT | _RIGHT is excluded too.
        for parent in view.parents(commit):
            painting.paint(parent, flags)


def ahead_behind(view: GraphView, ours: ObjectId, theirs: ObjectId) -> tuple[int, int]:
    """How many commits only `ours` has, and how many only `theirs` has."""
    painting = _Painting(view, frozenset((_LEFT, _RIGHT)))
    painting.paint(ours, _LEFT)
    painting.paint(theirs, _RIGHT)
    ahead = behind = 0
    while painting.open_count:
        commit, flags = painting.take()
        ahead += flags == _LEFT
        behind += flags == _RIGHT
        for parent in view.parents(commit):
            painting.paint(parent, flags)
    return ahead, behind


def nth_first_parent(view: GraphView, commit: ObjectId, count: int) -> ObjectId | None:
    """`commit~count`, or None when the chain is shorter. O(log count)."""
    target = view.first_parent_depth(commit) - count
    if target < 0 or count < 0:
        return None
    depth = target + count
    while depth > target:
        further = view.jump(commit)
        further_depth = view.first_parent_depth(further)
        if further_depth < target:
            further, further_depth = view.parents(commit)[0], depth - 1
        commit, depth = further, further_depth
    return commit


def descending(
    view: GraphView,
    tips: Iterable[ObjectId],
    follow: Callable[[ObjectId], Iterable[ObjectId]] | None = None,
    rank: Callable[[ObjectId], int] | None = None,
) -> Iterator[ObjectId]:
    """Commits reachable from `tips`, each once, children before parents.

    The order is `rank` descending, then id; a commit's rank is greater than its parents', by
    default it is the generation. `follow` names the parents to go on to, all by default. Reads
    only as far as it is asked.
    """
    next_of = view.parents if follow is None else follow
    rank_of = view.generation if rank is None else rank
    seen = set(tips)
    queue = [(-rank_of(tip), tip) for tip in seen]
    heapify(queue)
    while queue:
        _, commit = heappop(queue)
        yield commit
        for parent in next_of(commit):
            if parent not in seen:
                seen.add(parent)
                heappush(queue, (-rank_of(parent), parent))


def reaching_tips(view: GraphView, tips: Sequence[ObjectId]) -> Iterator[tuple[ObjectId, int]]:
    """As `descending`, each commit with a bit mask of the tips that reach it: one walk for all.

    Bit n stands for tips[n]; of equal tips each has its bit.
    """
    masks: dict[ObjectId, int] = {}
    for number, tip in enumerate(tips):
        masks[tip] = masks.get(tip, 0) | 1 << number
    for commit in descending(view, list(masks)):
        # All descendants came before: the mask is complete.
        mask = masks.pop(commit)
        yield commit, mask
        for parent in view.parents(commit):
            masks[parent] = masks.get(parent, 0) | mask
