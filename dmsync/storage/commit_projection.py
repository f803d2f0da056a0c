"""Folding commits into the catalog: each one's payload and its place in the graph.

What core.graph needs to answer in time proportional to a distance is computed once, here, from
the parents' rows (protocol/STORE.md 5). Costs what the event's commits cost, whatever is there.
"""

import sqlite3
from collections.abc import Callable, Container, Sequence
from dataclasses import replace
from typing import Any, Final, NamedTuple

from dmsync.core.encoding import encode
from dmsync.core.events import CommitsAdded, CommitsListed
from dmsync.core.graph import difference_count, jumps_far
from dmsync.core.ids import DotId, ObjectId
from dmsync.core.objects import Commit, commit_from_bytes
from dmsync.errors import Corruption, ObjectMissing
from dmsync.storage.catalog_graph import CatalogGraph

ReadCommit = Callable[[DotId, ObjectId], bytes]
"""Verified payload of a commit from the dot's packs. Raises ObjectMissing, Corruption."""

DATE_NS_MAX: Final = 2**62
"""No commit counts as later, so that its descendants' corrected dates fit 64 bits."""
_ROWS_HELD_MAX: Final = 1024
_PLACES_KEPT: Final = 100_000
"""About 300 bytes each."""


class _Place(NamedTuple):
    """A commit's row without its id: what its children's rows are computed from."""

    rid: int
    generation: int
    first_parent_depth: int
    jump: int
    corrected_date_ns: int
    reachable: int


_PLACE_COLUMNS: Final = "rid, generation, first_parent_depth, jump, corrected_date_ns, reachable"


def commit_rid(db: sqlite3.Connection, dot_number: int, commit: ObjectId) -> int | None:
    """The row of a commit of a dot, hollow or not."""
    row = db.execute(
        "SELECT rid FROM commits WHERE dot = ? AND substr(id, 1, 8) = substr(?, 1, 8) AND id = ?",
        (dot_number, commit, commit),
    ).fetchone()
    return None if row is None else int(row[0])


class CommitInsertion:
    """The commits of one event, which become rows together.

    With `is_replay`, a commit whose payload is gone is noted in missing_commits instead of
    raising, its children begin history anew, and payloads, accepted once, are not checked again
    beyond their hash. Commits in
    `given_up`, which later events of the replay forget, are passed over.
    """

    def __init__(
        self,
        db: sqlite3.Connection,
        read_commit: ReadCommit,
        dot_number: int,
        seq: int,
        event: CommitsAdded | CommitsListed,
        *,
        is_replay: bool,
        given_up: Container[ObjectId] = frozenset(),
    ) -> None:
        self._db = db
        self._read_commit = read_commit
        self._dot = dot_number
        self._seq = seq
        self._event = event
        self._is_replay = is_replay
        self._given_up = given_up
        self._is_listed = isinstance(event, CommitsListed)
        self._capture = None
        if isinstance(event, CommitsAdded) and event.capture:
            self._capture = encode(event.capture)
        self._graph = CatalogGraph(self._rows, dot_number)
        self._places: dict[ObjectId, _Place] = {}
        self._jumps: dict[int, tuple[int, int]] = {}
        """First-parent depth and jump by rid."""
        self._commits: list[tuple[object, ...]] = []
        self._payloads: list[tuple[object, ...]] = []
        self._parents: list[tuple[int, int, int]] = []

    def insert(self, first_rid: int) -> None:
        """Insert those not known yet, each with the rid of its position in the event; the others
        are complete from now on, unless only listed.

        Raises:
            ObjectMissing: a payload or a parent is not here (not in a replay). Corruption.
        """
        for rid, commit in enumerate(self._event.commits, first_rid):
            if commit in self._given_up:
                continue
            known = self._place_of(commit)
            if known is None:
                self._insert_one(rid, commit)
            elif not self._is_listed:
                self._flush()
                self._db.execute(
                    "UPDATE commits SET is_hollow = 0 WHERE rid = ? AND is_hollow", (known.rid,)
                )
        self._flush()

    def _insert_one(self, rid: int, commit: ObjectId) -> None:
        try:
            payload = self._read_commit(self._event.dot, commit)
            value = commit_from_bytes(payload, trusted=self._is_replay)
            if self._is_replay and not all(map(self._place_of, value.parents)):
                value = replace(value, parents=())  # one was lost: what follows it was not
            parents = [self._parent(commit, parent) for parent in value.parents]
        except Corruption:
            if not self._is_replay:
                raise
            # The log says that it was here: what else is there must stay usable, fsck tells.
            self._db.execute(
                "INSERT OR IGNORE INTO missing_commits VALUES (?, ?)", (self._dot, commit)
            )
            return
        place = self._place(rid, value, parents)
        self._keep(commit, place)
        self._commits.append(
            (
                rid,
                self._dot,
                commit,
                place.generation,
                place.first_parent_depth,
                parents[0].rid if parents else None,
                place.jump,
                int(len(parents) > 1),
                int(self._is_listed),
                place.corrected_date_ns,
                place.reachable,
            )
        )
        self._payloads.append((rid, self._seq, self._capture, self._event.transfer, payload))
        self._parents.extend(
            (rid, position, parent.rid) for position, parent in enumerate(parents[1:], 1)
        )
        if len(self._commits) >= _ROWS_HELD_MAX:
            self._flush()

    def _flush(self) -> None:
        self._db.executemany(
            "INSERT INTO commits VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", self._commits
        )
        self._db.executemany("INSERT INTO commit_payloads VALUES (?, ?, ?, ?, ?)", self._payloads)
        self._db.executemany("INSERT INTO parents VALUES (?, ?, ?)", self._parents)
        self._commits.clear()
        self._payloads.clear()
        self._parents.clear()

    def _rows(self, sql: str, *parameters: object) -> list[Any]:
        """For the graph, which is to see every commit of this event so far."""
        if self._commits:
            self._flush()
        return self._db.execute(sql, parameters).fetchall()

    # --- places in the graph --------------------------------------------------------------------

    def _place_of(self, commit: ObjectId) -> _Place | None:
        found = self._places.get(commit)
        if found is None:
            row = self._db.execute(
                f"SELECT {_PLACE_COLUMNS} FROM commits "
                "WHERE dot = ? AND substr(id, 1, 8) = substr(?, 1, 8) AND id = ?",
                (self._dot, commit, commit),
            ).fetchone()
            if row is None:
                return None
            found = _Place(*row)
            self._keep(commit, found)
        return found

    def _keep(self, commit: ObjectId, place: _Place) -> None:
        if len(self._places) >= _PLACES_KEPT:
            self._flush()
            self._places.clear()
            self._jumps.clear()
        self._places[commit] = place
        self._jumps[place.rid] = (place.first_parent_depth, place.jump)

    def _parent(self, commit: ObjectId, parent: ObjectId) -> _Place:
        found = self._place_of(parent)
        if found is None:
            raise ObjectMissing(
                f"parent {parent.hex()} of commit {commit.hex()} is not here",
                hint="list parents before their children",
                kind="commit",
                id=parent.hex(),
            )
        return found

    def _place(self, rid: int, commit: Commit, parents: Sequence[_Place]) -> _Place:
        """The new commit's place in the graph: core.graph says what the numbers mean."""
        time_ns = min(max(commit.time_ns, -DATE_NS_MAX), DATE_NS_MAX)
        if not parents:
            return _Place(rid, 1, 0, rid, time_ns, 1)
        first = parents[0]
        reachable = 1 + first.reachable
        if len(parents) > 1:
            reachable += difference_count(self._graph, commit.parents[1:], commit.parents[:1])
        return _Place(
            rid,
            1 + max(parent.generation for parent in parents),
            1 + first.first_parent_depth,
            self._jump(first),
            max(time_ns, *(parent.corrected_date_ns + 1 for parent in parents)),
            reachable,
        )

    def _jump(self, parent: _Place) -> int:
        first_depth, second = self._depth_and_jump(parent.jump)
        second_depth, _ = self._depth_and_jump(second)
        is_far = jumps_far(parent.first_parent_depth, first_depth, second_depth)
        return second if is_far else parent.rid

    def _depth_and_jump(self, rid: int) -> tuple[int, int]:
        found = self._jumps.get(rid)
        if found is None:
            found = self._db.execute(
                "SELECT first_parent_depth, jump FROM commits WHERE rid = ?", (rid,)
            ).fetchone()
            self._jumps[rid] = found
        return found
