"""The commit graph of one dot, read from the catalog in windows (core.graph asks)."""

from collections.abc import Callable
from typing import Any, Final

from dmsync.core.ids import ObjectId
from dmsync.errors import Corruption, RevisionNotFound

_NODES_MAX: Final = 200_000
"""Commits kept; about 200 bytes each."""
_WINDOW_RIDS_MIN: Final = 4
_WINDOW_RIDS_MAX: Final = 512
_WINDOWS_KEPT: Final = 8
CONTRADICTION: Final = "its commits contradict each other"


def _is_sound(node: tuple[Any, ...]) -> bool:
    """Rids and generations grow from parents to children, so that every walk ends."""
    _, rid, generation, depth, first, first_rid, _, jump_rid, *_, first_generation = node
    if first is None:
        return bool(jump_rid == rid and depth == 0)
    return bool(first_rid < rid and jump_rid < rid and generation > first_generation >= 1)


class CatalogGraph:
    """One dot's commits as a core.graph.GraphView.

    Reads commits in windows of neighbouring rids: rids grow from parents to children, so those
    below a commit are mostly its ancestors. Windows grow while a walk goes on below an earlier
    one, so that a single question reads few rows and a long walk few statements, also one that
    goes down several branches in turn.
    """

    def __init__(
        self,
        rows: Callable[..., list[Any]],
        dot_number: int,
        heal: Callable[[str], None] | None = None,
    ) -> None:
        """`heal(why)` has the catalog built anew when it contradicts itself."""
        self._rows = rows
        self._heal = heal
        self._dot = dot_number
        self._nodes: dict[ObjectId, tuple[Any, ...]] = {}
        self._parents: dict[ObjectId, tuple[ObjectId, ...]] = {}
        self._windows: list[tuple[int, int]] = []
        """(lowest rid, size) of the last window of each branch being walked, latest last."""

    _COLUMNS: Final = (
        "c.id, c.rid, c.generation, c.first_parent_depth, p.id, p.rid, j.id, j.rid, c.is_merge, "
        "c.corrected_date_ns, c.reachable, p.generation "
        "FROM commits c LEFT JOIN commits p ON p.rid = c.first_parent "
        "JOIN commits j ON j.rid = c.jump"
    )

    def _node(self, commit: ObjectId) -> tuple[Any, ...]:
        node = self._nodes.get(commit)
        if node is None:
            rid = self._rid(commit)
            self._read_window(rid)
            node = self._nodes.get(commit)
            if node is None or not _is_sound(node):
                self._heal_once()
                return self._node(commit)
        return node

    def _heal_once(self) -> None:
        """Raises Corruption when it has been done before, or nobody can."""
        heal, self._heal = self._heal, None
        if heal is None:
            raise Corruption(
                f"catalog.sqlite is damaged: {CONTRADICTION}",
                hint="dm fsck --repair builds it again from the event log",
                file="catalog.sqlite",
            )
        heal(CONTRADICTION)
        self._nodes.clear()
        self._parents.clear()

    def _rid(self, commit: ObjectId) -> int:
        rows = self._rows(
            "SELECT rid FROM commits "
            "WHERE dot = ? AND substr(id, 1, 8) = substr(?, 1, 8) AND id = ?",
            self._dot,
            commit,
            commit,
        )
        if not rows:
            raise RevisionNotFound(f"no commit {commit.hex()} here", id=commit.hex())
        return int(rows[0][0])

    def _read_window(self, rid: int) -> None:
        if len(self._nodes) > _NODES_MAX:
            self._nodes.clear()
            self._parents.clear()
        size = _WINDOW_RIDS_MIN
        for window in self._windows:
            if window[0] - 2 * window[1] <= rid < window[0]:
                size = min(2 * window[1], _WINDOW_RIDS_MAX)
                self._windows.remove(window)
                break
        lowest = rid - size + 1
        self._windows = [*self._windows[-_WINDOWS_KEPT + 1 :], (lowest, size)]
        # The plus keeps SQLite from walking the index of all the dot's commits instead.
        rows = self._rows(
            f"SELECT {self._COLUMNS} WHERE c.rid BETWEEN ? AND ? AND +c.dot = ?",
            lowest,
            rid,
            self._dot,
        )
        for row in rows:
            self._nodes[row[0]] = row

    def has(self, commit: ObjectId) -> bool:
        if commit in self._nodes:
            return True
        try:
            self._rid(commit)
        except RevisionNotFound:
            return False
        return True

    def generation(self, commit: ObjectId) -> int:
        return int(self._node(commit)[2])

    def corrected_date_ns(self, commit: ObjectId) -> int:
        """The commit's own time, but later than its parents': what a log is sorted by."""
        return int(self._node(commit)[9])

    def reachable_count(self, commit: ObjectId) -> int:
        """Number of commits reachable from it, itself included."""
        return int(self._node(commit)[10])

    def first_parent_depth(self, commit: ObjectId) -> int:
        return int(self._node(commit)[3])

    def jump(self, commit: ObjectId) -> ObjectId:
        return ObjectId(self._node(commit)[6])

    def parents(self, commit: ObjectId) -> tuple[ObjectId, ...]:
        node = self._node(commit)
        first = node[4]
        if first is None:
            return ()
        if not node[8]:
            return (first,)
        known = self._parents.get(commit)
        if known is None:
            rows = self._rows(
                "SELECT c.id, c.rid FROM parents p JOIN commits c ON c.rid = p.parent "
                "WHERE p.child = ? ORDER BY p.pos",
                node[1],
            )
            if any(row[1] >= node[1] for row in rows):
                self._heal_once()
                return self.parents(commit)
            known = (first, *(ObjectId(row[0]) for row in rows))
            self._parents[commit] = known
        return known
