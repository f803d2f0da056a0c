"""The drawing beside `dm log --graph`: one column a line of history, newest or oldest first."""

from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Generic, TypeVar

Node = TypeVar("Node", bound=Hashable)


class GraphLanes(Generic[Node]):
    """Draws nodes in the order shown; each names the later nodes it leads to.

    Newest first a commit leads to its parents, oldest first to its children; the drawing is the
    same. A lane is a column that waits for one node.
    """

    def __init__(self) -> None:
        self._lanes: list[Node] = []

    def place(self, node: Node, following: Sequence[Node]) -> "NodeLines":
        """The lines of one node: joins above it, its mark, forks below, bars beside its text."""
        above = list(self._join(node))
        if node not in self._lanes:
            self._lanes.append(node)
        column = self._lanes.index(node)
        mark = "".join("* " if lane == column else "| " for lane in range(len(self._lanes)))
        below = list(self._fork(column, following))
        beside = "| " * len(self._lanes)
        return NodeLines(above, mark.rstrip(), below, beside)

    def _join(self, node: Node) -> Iterator[str]:
        """Lanes that wait for the same node end in the leftmost of them, one line each."""
        while self._lanes.count(node) > 1:
            first = self._lanes.index(node)
            last = len(self._lanes) - 1 - self._lanes[::-1].index(node)
            yield _join_line(len(self._lanes), first, last)
            del self._lanes[last]

    def _fork(self, column: int, following: Sequence[Node]) -> Iterator[str]:
        """The node's lane goes on to the first that follows; each further one opens a lane."""
        if not following:
            right = len(self._lanes) - column - 1
            del self._lanes[column]
            if right:
                yield ("| " * column + "  " + " ".join("/" * right)).rstrip()
            return
        self._lanes[column] = following[0]
        for further in following[1:]:
            if further in self._lanes:
                yield from self._reach(column, self._lanes.index(further))
                continue
            right = len(self._lanes) - column - 1
            self._lanes.insert(column + 1, further)
            yield ("| " * column + "|\\" + " \\" * right).rstrip()

    def _reach(self, column: int, lane: int) -> Iterator[str]:
        """A line from the node to a lane that waits for the same one already."""
        left, right = sorted((column, lane))
        cells = ["|"] * len(self._lanes)
        gaps = [" "] * len(self._lanes)
        for gap in range(left, right):
            gaps[gap] = "_"
        if lane > column:
            gaps[column] = "\\"
        else:
            gaps[column - 1] = "/"
        yield "".join(cell + gap for cell, gap in zip(cells, gaps, strict=True)).rstrip()


def _join_line(lanes: int, first: int, last: int) -> str:
    """Lane `last` bends into lane `first`; the lanes right of it move one to the left."""
    line = "| " * first + "|"
    for lane in range(first + 1, last):
        line += "_|" if lane < last else "|"
    line += "/" + " /" * (lanes - last - 1)
    return line


class NodeLines:
    """The drawing of one node, line by line."""

    def __init__(self, above: list[str], mark: str, below: list[str], beside: str) -> None:
        self.above = above
        self.mark = mark
        self.below = below
        self.beside = beside

    def beside_text(self, text: Iterable[str]) -> Iterator[str]:
        """The node's text with the drawing left of it."""
        yield from self.above
        lines = list(text)
        width = max([len(self.mark), len(self.beside.rstrip()), *map(len, self.below)]) + 1
        drawing = [self.mark, *self.below]
        for number in range(max(len(lines), len(drawing))):
            bars = drawing[number] if number < len(drawing) else self.beside
            line = lines[number] if number < len(lines) else ""
            yield (bars.ljust(width) + line).rstrip()
