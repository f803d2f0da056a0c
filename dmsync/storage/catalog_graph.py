"""The commit graph of one dot, read from the catalog in windows (core.graph asks)."""

from collections.abc import Callable
from typing import Any, Final

from dmsync.core.ids import ObjectId
from dmsync.errors import RevisionNotFound

_NODES_MAX: Final = 200_000
"""Commits kept; about 200 bytes each."""
_WINDOW_RIDS_MIN: Final = 4
_WINDOW_RIDS_MAX: Final = 512


class CatalogGraph:
    """One dot's commits as a core.graph.GraphView.

    Reads commits in windows of neighbouring rids: rids grow from parents to children, so those
    just below a commit are mostly its ancestors. Windows grow while a walk goes on below the last
    one, so that a single question reads few rows and a long walk few statements.
    """

    def __init__(self, rows: Callable[..., list[Any]], dot_number: int) -> None:
        self._rows = rows
        self._dot = dot_number
        self._nodes: dict[ObjectId, tuple[Any, ...]] = {}
        self._parents: dict[ObjectId, tuple[ObjectId, ...]] = {}
        self._window = _WINDOW_RIDS_MIN
        self._lowest_read = 0

    _COLUMNS: Final = (
        "c.id, c.rid, c.generation, c.first_parent_depth, p.id, p.rid, j.id, j.rid, c.is_merge "
        "FROM commits c LEFT JOIN commits p ON p.rid = c.first_parent "
        "JOIN commits j ON j.rid = c.jump"
    )

    def _node(self, commit: ObjectId) -> tuple[Any, ...]:
        node = self._nodes.get(commit)
        if node is None:
            rid = self._rid(commit)
            self._read_window(rid)
            node = self._nodes[commit]
        return node

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
        goes_on = self._lowest_read - 2 * self._window <= rid < self._lowest_read
        self._window = min(2 * self._window, _WINDOW_RIDS_MAX) if goes_on else _WINDOW_RIDS_MIN
        self._lowest_read = rid - self._window + 1
        # The plus keeps SQLite from walking the index of all the dot's commits instead.
        rows = self._rows(
            f"SELECT {self._COLUMNS} WHERE c.rid BETWEEN ? AND ? AND +c.dot = ?",
            self._lowest_read,
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
                "SELECT c.id FROM parents p JOIN commits c ON c.rid = p.parent "
                "WHERE p.child = ? ORDER BY p.pos",
                node[1],
            )
            known = (first, *(ObjectId(row[0]) for row in rows))
            self._parents[commit] = known
        return known
