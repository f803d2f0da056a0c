"""Commits that gc gave up, in the catalog: their rows go, and their ids stay known as gone.

A replay never looks for the payload of a commit that a later event of it forgets, or whose dot a
later event purges: there is none, and none of its rows would be left. Each id uses up its rid all
the same (protocol/STORE.md 5).
"""

import sqlite3
from collections.abc import Container, Iterable

from dmsync.core.events import CommitsForgotten, DotPurged
from dmsync.core.ids import DotId, ObjectId
from dmsync.storage.commit_projection import commit_rid


class Given:
    """Which commits the events of a replay forget, which dots they purge, and where they do so
    last: both may come again."""

    def __init__(self) -> None:
        self._last: dict[DotId, dict[ObjectId, int]] = {}
        self._purged: dict[DotId, int] = {}

    def note(self, seq: int, event: CommitsForgotten | DotPurged) -> None:
        """Take note of an event; called in the order of the log."""
        if isinstance(event, DotPurged):
            self._purged[event.dot] = seq
            return
        of_dot = self._last.setdefault(event.dot, {})
        for commit in event.commits:
            of_dot[commit] = seq

    def is_purged_after(self, seq: int, dot: DotId) -> bool:
        """Does an event behind `seq` purge the dot?"""
        return self._purged.get(dot, 0) > seq

    def after(self, seq: int, dot: DotId) -> Container[ObjectId]:
        """The commits of a dot that events behind `seq` forget."""
        of_dot = self._last.get(dot)
        return _Later(of_dot, seq) if of_dot else frozenset()


class _Later:
    def __init__(self, last: dict[ObjectId, int], seq: int) -> None:
        self._last = last
        self._seq = seq

    def __contains__(self, commit: object) -> bool:
        return self._last.get(commit, 0) > self._seq  # type: ignore[call-overload, no-any-return]


def forget_commits(db: sqlite3.Connection, dot_number: int, commits: Iterable[ObjectId]) -> None:
    """Remove all rows of commits. Whatever else names one by its row names it by its id then."""
    # Commits refer to each other; checked at the end of the transaction only.
    db.execute("PRAGMA defer_foreign_keys = 1")
    gone: list[tuple[int, ObjectId]] = []
    for commit in commits:
        db.execute("INSERT OR IGNORE INTO forgotten VALUES (?, ?)", (dot_number, commit))
        key = (dot_number, commit)
        db.execute("DELETE FROM missing_commits WHERE dot = ? AND id = ?", key)
        db.execute("DELETE FROM signatures WHERE dot = ? AND target = ?", key)
        rid = commit_rid(db, dot_number, commit)
        if rid is not None:
            gone.append((rid, commit))
    if not gone:
        return
    _name_by_id(db, dot_number, dict(gone))
    rids = [(rid,) for rid, _ in gone]
    for table in ("commit_payloads", "commit_deltas", "commits"):
        db.executemany(f"DELETE FROM {table} WHERE rid = ?", rids)
    db.executemany("DELETE FROM parents WHERE child = ?", rids)


def _name_by_id(db: sqlite3.Connection, dot_number: int, gone: dict[int, ObjectId]) -> None:
    """One pass over the dot's reflog, whose rows are small."""
    rows = db.execute(
        "SELECT l.ref, l.seq, l.old, l.new FROM reflog l JOIN refs r ON r.number = l.ref "
        "WHERE r.dot = ?",
        (dot_number,),
    ).fetchall()
    for ref, seq, old, new in rows:
        if old in gone or new in gone:
            db.execute(
                "UPDATE reflog SET old = ?, new = ? WHERE ref = ? AND seq = ?",
                (gone.get(old, old), gone.get(new, new), ref, seq),
            )
    targets = (
        ("refs", "target"),
        ("working", "target"),
        ("switches", "from_target"),
        ("switches", "to_target"),
    )
    for table, column in targets:
        found = db.execute(
            f"SELECT DISTINCT {column} FROM {table} WHERE dot = ?", (dot_number,)
        ).fetchall()
        for (target,) in found:
            if target in gone:
                db.execute(
                    f"UPDATE {table} SET {column} = ? WHERE dot = ? AND {column} = ?",
                    (gone[target], dot_number, target),
                )


def remember_commits(db: sqlite3.Connection, dot_number: int, commits: Iterable[ObjectId]) -> None:
    """They have come again, if they ever were forgotten."""
    if db.execute("SELECT 1 FROM forgotten WHERE dot = ? LIMIT 1", (dot_number,)).fetchone():
        db.executemany(
            "DELETE FROM forgotten WHERE dot = ? AND id = ?",
            [(dot_number, commit) for commit in commits],
        )


def is_forgotten(db: sqlite3.Connection, dot_number: int, commit: ObjectId) -> bool:
    row = db.execute(
        "SELECT 1 FROM forgotten WHERE dot = ? AND id = ?", (dot_number, commit)
    ).fetchone()
    return row is not None
