"""Merging database files row by row: rows, schemas, constraints, what else a file holds."""

import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dmsync.engine.databases.sqlite_merge import (
    RowConflict,
    RowMerge,
    Side,
    merge_databases,
    resolve_row,
    resolve_rows,
)
from dmsync.errors import MergeConflict
from tests.support.northwind import opened, problems

BASE = """
CREATE TABLE t (id INTEGER PRIMARY KEY, a, b);
INSERT INTO t VALUES (1,'one',1), (2,'two',2), (3,'three',3), (4,'four',4);
"""


class Merge:
    """Three files made from scripts: base, and what each side runs after it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def path(self, name: str) -> str:
        return str(self.directory / name)

    def __call__(
        self,
        base: str,
        ours: str,
        theirs: str,
        *,
        favour: Side | None = None,
        conflicts_max: int = 100,
    ) -> RowMerge:
        for name in ("base", "ours", "theirs"):
            Path(self.path(name)).unlink(missing_ok=True)
        self.run("base", base)
        for name, script in (("ours", ours), ("theirs", theirs)):
            shutil.copyfile(self.path("base"), self.path(name))
            self.run(name, script)
        return self.files(favour=favour, conflicts_max=conflicts_max)

    def files(self, *, favour: Side | None = None, conflicts_max: int = 100) -> RowMerge:
        merged = merge_databases(
            base=self.path("base"), ours=self.path("ours"), theirs=self.path("theirs"),
            result=self.path("result"), favour=favour, conflicts_max=conflicts_max,
        )  # fmt: skip
        if merged.refused:
            assert not Path(self.path("result")).exists()
        else:
            assert problems(self.path("result")) == []
        return merged

    def run(self, name: str, script: str) -> None:
        with opened(self.path(name)) as db:
            db.executescript(script)

    def rows(self, sql: str, name: str = "result") -> list[tuple[Any, ...]]:
        with opened(self.path(name)) as db:
            return db.execute(sql).fetchall()


@pytest.fixture
def merge(tmp_path: Path) -> Merge:
    return Merge(tmp_path)


# --- rows ----------------------------------------------------------------------------------------


def test_different_rows_of_both_sides_come_together(merge: Merge) -> None:
    merged = merge(BASE, "UPDATE t SET b=10 WHERE id=1; INSERT INTO t VALUES (5,'five',5);",
                   "UPDATE t SET b=20 WHERE id=2; DELETE FROM t WHERE id=3; INSERT INTO t VALUES (6,'six',6);")  # fmt: skip
    assert (merged.refused, merged.conflicts) == ("", ())
    assert (merged.counts.added, merged.counts.changed, merged.counts.removed) == (1, 1, 1)
    assert merge.rows("SELECT id, b FROM t") == [(1, 10), (2, 20), (4, 4), (5, 5), (6, 6)]


def test_the_same_change_on_both_sides_is_no_conflict(merge: Merge) -> None:
    same = (
        "UPDATE t SET b=9 WHERE id=1; DELETE FROM t WHERE id=2; INSERT INTO t VALUES (7,'x',x'00');"
    )
    assert merge(BASE, same, same) == RowMerge((), "")


@pytest.mark.parametrize(
    ("ours", "theirs", "reason"),
    [
        ("UPDATE t SET a='o' WHERE id=1", "UPDATE t SET b='t' WHERE id=1", "changed twice"),
        ("DELETE FROM t WHERE id=1", "UPDATE t SET b='t' WHERE id=1", "deleted by ours"),
        ("UPDATE t SET b='o' WHERE id=1", "DELETE FROM t WHERE id=1", "deleted by theirs"),
        ("INSERT INTO t VALUES (9,'o',0)", "INSERT INTO t VALUES (9,'t',0)", "added twice"),
    ],
)
def test_one_row_changed_two_ways_is_a_conflict_and_keeps_ours(
    merge: Merge, ours: str, theirs: str, reason: str
) -> None:
    merged = merge(BASE, ours, theirs)
    (conflict,) = merged.conflicts
    assert conflict.reason == reason
    assert (conflict.table, conflict.key_columns, conflict.columns) == (
        "t",
        ("id",),
        ("id", "a", "b"),
    )
    everything = "SELECT * FROM t"
    assert merge.rows(everything) == merge.rows(everything, "ours")
    for name, row in (
        ("base", conflict.base),
        ("ours", conflict.ours),
        ("theirs", conflict.theirs),
    ):
        assert merge.rows(f"SELECT * FROM t WHERE id={conflict.key[0]!r}", name) == (
            [row] if row else []
        )


@pytest.mark.parametrize("favour", ["ours", "theirs"])
def test_favour_decides_conflicts(merge: Merge, favour: Side) -> None:
    ours = "UPDATE t SET b='o' WHERE id=1; DELETE FROM t WHERE id=2; UPDATE t SET b='o' WHERE id=3;"
    theirs = (
        "UPDATE t SET b='t' WHERE id=1; UPDATE t SET b='t' WHERE id=2; DELETE FROM t WHERE id=3;"
    )
    merged = merge(BASE, ours, theirs, favour=favour)
    assert (merged.conflicts, merged.counts.favoured) == ((), 3)
    assert merge.rows("SELECT * FROM t") == merge.rows("SELECT * FROM t", favour)


@pytest.mark.parametrize(
    ("one", "other"),
    [("1", "1.0"), ("1", "'1'"), ("'1'", "x'31'"), ("0.0", "-0.0"), ("NULL", "0"), ("'a'", "'A'"),
     ("9007199254740993", "9007199254740992.0"), ("''", "x''"), ("9e999", "-9e999"),
     ("CAST(x'ff' AS TEXT)", "CAST(x'fe' AS TEXT)"), ("'a'||char(0)||'b'", "'a'||char(0)||'c'")],
)  # fmt: skip
def test_values_of_another_type_or_other_bytes_are_changes(
    merge: Merge, one: str, other: str
) -> None:
    base = f"CREATE TABLE t (id INTEGER PRIMARY KEY, a COLLATE NOCASE); INSERT INTO t VALUES (1, {one}), (2, {other});"
    swap = f"UPDATE t SET a={other} WHERE id=1; UPDATE t SET a={one} WHERE id=2;"
    clean = merge(base, "", swap)
    assert (clean.conflicts, clean.counts.changed) == ((), 2)
    shown = "SELECT id, typeof(a), hex(CAST(a AS BLOB)) FROM t"
    assert merge.rows(shown) == merge.rows(shown, "theirs")
    merged = merge(base, swap, "UPDATE t SET a='third' WHERE id=1")
    (conflict,) = merged.conflicts
    again = RowConflict.from_json(json.loads(json.dumps(conflict.to_json())))
    assert repr(again) == repr(conflict)
    merge.run("result", "UPDATE t SET a='edited' WHERE id=1")
    resolve_row(merge.path("result"), again, "ours")
    assert merge.rows(shown) == merge.rows(shown, "ours")


def test_key_that_changes_its_case_is_one_row(merge: Merge) -> None:
    base = "CREATE TABLE t (k TEXT PRIMARY KEY COLLATE NOCASE NOT NULL, v) WITHOUT ROWID; INSERT INTO t VALUES ('Ab',1),('cd',2);"
    assert (
        merge(base, "UPDATE t SET v=3 WHERE k='cd'", "UPDATE t SET k='AB' WHERE k='ab'").conflicts
        == ()
    )
    assert merge.rows("SELECT * FROM t") == [("AB", 1), ("cd", 3)]
    (conflict,) = merge(
        base, "UPDATE t SET k='aB' WHERE k='ab'", "UPDATE t SET k='AB' WHERE k='ab'"
    ).conflicts
    assert (conflict.ours, conflict.theirs) == (("aB", 1), ("AB", 1))


def test_rows_added_to_a_table_without_key_are_all_kept(merge: Merge) -> None:
    base = "CREATE TABLE log (line); INSERT INTO log VALUES ('a');"
    merged = merge(
        base,
        "INSERT INTO log VALUES ('o1'),('both');",
        "INSERT INTO log VALUES ('t1'),('both'),('t3');",
    )
    assert merged.conflicts == ()
    assert sorted(row[0] for row in merge.rows("SELECT line FROM log")) == [
        "a",
        "both",
        "o1",
        "t1",
        "t3",
    ]


def test_columns_named_like_the_rowid(merge: Merge) -> None:
    base = "CREATE TABLE t (rowid TEXT, oid TEXT, v); INSERT INTO t VALUES (5,6,7),(8,9,10);"
    merged = merge(
        base,
        "UPDATE t SET v=1 WHERE v=7",
        "UPDATE t SET v=2 WHERE v=7; UPDATE t SET v=11 WHERE v=10",
    )
    (conflict,) = merged.conflicts
    resolve_row(merge.path("result"), conflict, "theirs")
    assert merge.rows("SELECT v, _rowid_ FROM t") == [(2, 1), (11, 2)]
    hidden = "CREATE TABLE t (rowid, oid, _rowid_); INSERT INTO t VALUES (5,6,7);"
    assert "cannot be addressed" in merge(hidden, "", "DELETE FROM t").refused


def test_null_in_keys_merges_only_from_one_side(merge: Merge) -> None:
    base = "CREATE TABLE t (k TEXT PRIMARY KEY, v); INSERT INTO t VALUES (NULL,1),(NULL,2),('x',3);"
    assert merge(base, "", "UPDATE t SET v=9 WHERE v=2").refused == ""
    assert merge.rows("SELECT * FROM t") == [(None, 1), (None, 9), ("x", 3)]
    assert (
        "NULL in keys"
        in merge(base, "UPDATE t SET v=8 WHERE v=1", "UPDATE t SET v=9 WHERE v=2").refused
    )


def test_more_conflicts_than_wanted_are_refused(merge: Merge) -> None:
    merged = merge(BASE, "UPDATE t SET a='o'", "UPDATE t SET a='t'", conflicts_max=3)
    assert "too many" in merged.refused
    assert (
        len(merge(BASE, "UPDATE t SET a='o'", "UPDATE t SET a='t'", conflicts_max=4).conflicts) == 4
    )


def test_rows_keep_their_rowids(merge: Merge) -> None:
    base = "CREATE TABLE t (k TEXT PRIMARY KEY, v); INSERT INTO t(rowid,k,v) VALUES (10,'a',1),(20,'b',2);"
    ours = "INSERT INTO t(rowid,k,v) VALUES (30,'o',1); UPDATE t SET v=9 WHERE k='a'"
    merged = merge(
        base,
        ours,
        "UPDATE t SET v=3; INSERT INTO t(rowid,k,v) VALUES (30,'t',1),(40,'u',1);",
    )
    rowids = {row[0]: row[1] for row in merge.rows("SELECT k, rowid FROM t")}
    assert (rowids["a"], rowids["b"], rowids["o"]) == (10, 20, 30)
    assert len(set(rowids.values())) == 5
    resolve_row(merge.path("result"), merged.conflicts[0], "theirs")
    assert merge.rows("SELECT rowid, v FROM t WHERE k='a'") == [(10, 3)]


# --- constraints ---------------------------------------------------------------------------------


def test_unique_values_may_be_exchanged(merge: Merge) -> None:
    base = "CREATE TABLE t (id INTEGER PRIMARY KEY, u UNIQUE ON CONFLICT REPLACE); INSERT INTO t VALUES (1,'a'),(2,'b');"
    merged = merge(
        base,
        "INSERT INTO t VALUES (3,'c')",
        "UPDATE t SET u='x' WHERE id=1; UPDATE t SET u='a' WHERE id=2; UPDATE t SET u='b' WHERE id=1;",
    )
    assert (merged.conflicts, merged.counts.changed) == ((), 2)
    assert merge.rows("SELECT * FROM t ORDER BY id") == [(1, "b"), (2, "a"), (3, "c")]


@pytest.mark.parametrize("favour", [None, "theirs"])
def test_row_that_a_unique_constraint_keeps_out_is_a_conflict(
    merge: Merge, favour: Side | None
) -> None:
    base = "CREATE TABLE t (id INTEGER PRIMARY KEY, u UNIQUE ON CONFLICT REPLACE); INSERT INTO t VALUES (1,'a'),(2,'b');"
    merged = merge(
        base,
        "INSERT INTO t VALUES (3,'z')",
        "UPDATE t SET u='y' WHERE id=2; UPDATE t SET u='b' WHERE id=1; UPDATE t SET u='z' WHERE id=2;",
        favour=favour,
    )
    # row 2 collides with ours; without it row 1 cannot have 'b' either
    assert [(c.key, c.reason) for c in merged.conflicts] == [((1,), "unique"), ((2,), "unique")]
    assert merge.rows("SELECT * FROM t ORDER BY id") == [(1, "a"), (2, "b"), (3, "z")]


FAMILY = """
CREATE TABLE parent (id INTEGER PRIMARY KEY, name TEXT UNIQUE COLLATE NOCASE);
CREATE TABLE child (a, b, parent INTEGER REFERENCES parent(id) ON DELETE CASCADE,
  name REFERENCES parent(name), PRIMARY KEY (a, b)) WITHOUT ROWID;
INSERT INTO parent VALUES (1,'P1'),(2,'P2'),(3,'P3');
INSERT INTO child VALUES (1,1,1,'p1'),(2,2,2,NULL);
"""


def test_child_whose_parent_ours_deleted_is_left_out(merge: Merge) -> None:
    merged = merge(
        FAMILY,
        "DELETE FROM parent WHERE id=3",
        "INSERT INTO child VALUES (9,9,3,NULL), (8,8,2,'p2')",
    )
    assert [(c.table, c.key, c.reason) for c in merged.conflicts] == [
        ("child", (9, 9), "foreign key")
    ]
    assert merge.rows("SELECT a FROM child") == [(1,), (2,), (8,)]
    with pytest.raises(MergeConflict):
        resolve_row(merge.path("result"), merged.conflicts[0], "theirs")
    assert merge.rows("SELECT a FROM child") == [(1,), (2,), (8,)]


def test_parent_that_ours_refers_to_stays(merge: Merge) -> None:
    merged = merge(
        FAMILY,
        "INSERT INTO child VALUES (9,9,NULL,'p3')",
        "DELETE FROM parent WHERE id=3; UPDATE parent SET name='new' WHERE id=2",
    )
    assert [(c.table, c.key, c.reason) for c in merged.conflicts] == [
        ("parent", (3,), "foreign key")
    ]
    assert merge.rows("SELECT * FROM parent") == [(1, "P1"), (2, "new"), (3, "P3")]


def test_foreign_keys_that_ours_violates_already_are_refused(merge: Merge) -> None:
    orphan = "INSERT INTO child VALUES (7,7,77,NULL)"
    assert "foreign key" in merge(FAMILY, orphan, "UPDATE parent SET name='x' WHERE id=1").refused


def test_triggers_do_not_fire_and_are_still_there(merge: Merge) -> None:
    base = (
        BASE
        + """
    CREATE TABLE log (id INTEGER PRIMARY KEY, x);
    CREATE TRIGGER wipe AFTER UPDATE ON t BEGIN DELETE FROM t; INSERT INTO log(x) VALUES (1); END;
    CREATE TRIGGER wipe2 BEFORE INSERT ON t BEGIN DELETE FROM t; END;
    CREATE VIEW v AS SELECT * FROM t; CREATE TRIGGER wipe3 INSTEAD OF INSERT ON v BEGIN DELETE FROM t; END;"""
    )
    merged = merge(base, "INSERT INTO log(x) VALUES (5)", "DROP TRIGGER wipe; UPDATE t SET b=9 WHERE id=2; DROP TRIGGER wipe2; INSERT INTO t VALUES (8,8,8);"
                   "CREATE TRIGGER wipe AFTER UPDATE ON t BEGIN DELETE FROM t; INSERT INTO log(x) VALUES (1); END;")  # fmt: skip
    assert (merged.refused, merged.conflicts) == ("", ())
    assert merge.rows("SELECT count(*) FROM t") == [(5,)]
    assert merge.rows("SELECT name FROM sqlite_schema WHERE type='trigger' ORDER BY 1") == [
        ("wipe",),
        ("wipe3",),
    ]
    merge.run("result", "UPDATE t SET b=1 WHERE id=1")
    assert merge.rows("SELECT count(*) FROM t") == [(0,)], "the trigger works again"


def test_resolving_fires_no_trigger_and_keeps_them(merge: Merge) -> None:
    base = (
        BASE
        + "CREATE TRIGGER wipe AFTER INSERT ON t BEGIN DELETE FROM t; END; CREATE TRIGGER wipe2 AFTER DELETE ON t BEGIN DELETE FROM t; END;"
    )
    merged = merge(base, "UPDATE t SET b='o'", "UPDATE t SET b='t' WHERE id<3")
    schema = merge.rows("SELECT type, name, tbl_name, sql FROM sqlite_schema ORDER BY 2")
    resolve_rows(merge.path("result"), [(c, "theirs") for c in merged.conflicts])
    assert merge.rows("SELECT b FROM t") == [("t",), ("t",), ("o",), ("o",)]
    assert merge.rows("SELECT type, name, tbl_name, sql FROM sqlite_schema ORDER BY 2") == schema
    resolve_row(merge.path("result"), merged.conflicts[0], "base")
    assert merge.rows("SELECT b FROM t") == [(1,), ("t",), ("o",), ("o",)]


# --- schemas -------------------------------------------------------------------------------------

EDIT = "UPDATE t SET b='edit' WHERE id=2; INSERT INTO t(id,a,b) VALUES (9,'nine',9); DELETE FROM t WHERE id=3;"


@pytest.mark.parametrize("who", ["ours", "theirs"])
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("ALTER TABLE t ADD COLUMN c TEXT DEFAULT 5", [(1, "one", 1, "5"), (2, "two", "edit", "5"), (4, "four", 4, "5"), (9, "nine", 9, "5")]),
        ("ALTER TABLE t DROP COLUMN a", [(1, 1), (2, "edit"), (4, 4), (9, 9)]),
        ("ALTER TABLE t RENAME COLUMN a TO label", [(1, "one", 1), (2, "two", "edit"), (4, "four", 4), (9, "nine", 9)]),
        ("ALTER TABLE t RENAME COLUMN id TO number", [(1, "one", 1), (2, "two", "edit"), (4, "four", 4), (9, "nine", 9)]),
        ("CREATE UNIQUE INDEX i ON t(a); CREATE TABLE u(x PRIMARY KEY); INSERT INTO u VALUES (1);", [(1, "one", 1), (2, "two", "edit"), (4, "four", 4), (9, "nine", 9)]),
        ("CREATE VIEW v AS SELECT 1; CREATE TRIGGER r AFTER INSERT ON t BEGIN DELETE FROM t; END;", [(1, "one", 1), (2, "two", "edit"), (4, "four", 4), (9, "nine", 9)]),
    ],
)  # fmt: skip
def test_schema_changed_on_one_side_is_carried_over(
    merge: Merge, who: str, change: str, expected: list[tuple[object, ...]]
) -> None:
    merged = merge(BASE, *((change, EDIT) if who == "ours" else (EDIT, change)))
    assert (merged.refused, merged.conflicts) == ("", ())
    assert merge.rows("SELECT * FROM t ORDER BY 1") == expected
    schema = "SELECT type, name, sql FROM sqlite_schema ORDER BY 1, 2"
    assert merge.rows(schema) == merge.rows(schema, who)


@pytest.mark.parametrize("who", ["ours", "theirs"])
def test_values_of_an_added_column_are_changes_of_rows(merge: Merge, who: str) -> None:
    change = "ALTER TABLE t ADD COLUMN c; UPDATE t SET c=a||'!' WHERE id IN (1,2);"
    merged = merge(BASE, *((change, EDIT) if who == "ours" else (EDIT, change)))
    assert [c.key for c in merged.conflicts] == [(2,)]
    assert merge.rows("SELECT id, c FROM t WHERE id<>2 ORDER BY 1") == [
        (1, "one!"),
        (4, None),
        (9, None),
    ]


@pytest.mark.parametrize("who", ["ours", "theirs"])
def test_changes_in_a_dropped_column_are_not_lost_unseen(merge: Merge, who: str) -> None:
    sides = ("ALTER TABLE t DROP COLUMN a", "UPDATE t SET a='lost' WHERE id=1")
    assert "dropped" in merge(BASE, *(sides if who == "ours" else sides[::-1])).refused


@pytest.mark.parametrize("who", ["ours", "theirs"])
def test_dropped_table_must_be_unchanged_on_the_other_side(merge: Merge, who: str) -> None:
    base = BASE + "CREATE TABLE other (x PRIMARY KEY); INSERT INTO other VALUES (1);"
    sides = ("DROP TABLE t", "INSERT INTO other VALUES (2)")
    assert merge(base, *(sides if who == "ours" else sides[::-1])).refused == ""
    assert merge.rows("SELECT name FROM sqlite_schema WHERE sql IS NOT NULL") == [("other",)]
    assert merge.rows("SELECT x FROM other") == [(1,), (2,)]
    sides = ("DROP TABLE t", EDIT)
    assert "dropped the table t" in merge(base, *(sides if who == "ours" else sides[::-1])).refused


def test_disjoint_schema_changes_are_both_carried(merge: Merge) -> None:
    base = (
        BASE
        + "CREATE TABLE other (x INTEGER PRIMARY KEY, y); INSERT INTO other VALUES (1,1),(2,2); CREATE INDEX gone ON other(y);"
    )
    merged = merge(base, "ALTER TABLE t ADD COLUMN c; UPDATE other SET y=5 WHERE x=1; CREATE TABLE mine(z);",
                   "ALTER TABLE other ADD COLUMN w DEFAULT 'w'; DROP INDEX gone; CREATE INDEX new ON other(w); UPDATE t SET b=7 WHERE id=1; CREATE TABLE yours(z);")  # fmt: skip
    assert (merged.refused, merged.conflicts) == ("", ())
    assert merge.rows("SELECT * FROM other") == [(1, 5, "w"), (2, 2, "w")]
    assert merge.rows("SELECT * FROM t WHERE id=1") == [(1, "one", 7, None)]
    assert merge.rows("SELECT name FROM sqlite_schema ORDER BY 1") == [
        ("mine",),
        ("new",),
        ("other",),
        ("t",),
        ("yours",),
    ]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("ALTER TABLE t ADD COLUMN c", "ALTER TABLE t ADD COLUMN d"),
        ("CREATE VIEW v AS SELECT 1", "CREATE VIEW v AS SELECT 2"),
        ("CREATE VIEW v AS SELECT 1", "CREATE TABLE v(x)"),
        ("DROP TABLE t", "CREATE INDEX i ON t(a)"),
        ("CREATE INDEX i ON t(a)", "DROP TABLE t"),
        ("PRAGMA user_version=1", "PRAGMA user_version=2"),
        ("INSERT INTO t VALUES (9,'one',1)", "CREATE UNIQUE INDEX i ON t(a)"),
    ],
)
def test_schema_changes_that_do_not_fit_are_refused(merge: Merge, ours: str, theirs: str) -> None:
    assert merge(BASE, ours, theirs).refused != ""


@pytest.mark.parametrize("who", ["ours", "theirs"])
def test_table_with_another_key(merge: Merge, who: str) -> None:
    change = "CREATE TABLE n(a PRIMARY KEY, id, b); INSERT INTO n SELECT a,id,b FROM t; DROP TABLE t; ALTER TABLE n RENAME TO t;"
    assert merge(BASE, *((change, "") if who == "ours" else ("", change))).refused == ""
    assert merge.rows("SELECT * FROM t") == merge.rows("SELECT * FROM t", who)
    assert "key" in merge(BASE, *((change, EDIT) if who == "ours" else (EDIT, change))).refused


# --- what else a file holds ------------------------------------------------------------------------


def test_sequences_and_header_values(merge: Merge) -> None:
    base = "CREATE TABLE s (id INTEGER PRIMARY KEY AUTOINCREMENT, v); INSERT INTO s(v) VALUES (1); PRAGMA application_id=7;"
    merge(
        base,
        "INSERT INTO s VALUES (50,1); DELETE FROM s WHERE id=50; PRAGMA user_version=3;",
        "INSERT INTO s VALUES (9,1); PRAGMA application_id=8;",
    )
    assert merge.rows("SELECT * FROM sqlite_sequence") == [("s", 50)]
    assert merge.rows("PRAGMA user_version") + merge.rows("PRAGMA application_id") == [(3,), (8,)]
    merge(base, "UPDATE s SET v=2", "INSERT INTO s VALUES (90,1); DELETE FROM s WHERE id=90;")
    assert merge.rows("SELECT * FROM sqlite_sequence") == [("s", 90)]


FTS = BASE + "CREATE VIRTUAL TABLE docs USING fts5(body); INSERT INTO docs VALUES ('hello world');"


@pytest.mark.parametrize("who", ["ours", "theirs"])
def test_virtual_table_changed_on_one_side_is_taken_whole(merge: Merge, who: str) -> None:
    change = "INSERT INTO docs VALUES ('another text'); DELETE FROM docs WHERE rowid=1;"
    merged = merge(FTS, *((change, EDIT) if who == "ours" else (EDIT, change)))
    assert (merged.refused, merged.conflicts) == ("", ())
    assert merge.rows("SELECT rowid, body FROM docs WHERE docs MATCH 'another'") == [
        (2, "another text")
    ]
    assert merge.rows("SELECT * FROM docs WHERE docs MATCH 'hello'") == []
    merge.run(
        "result",
        "INSERT INTO docs(docs) VALUES ('integrity-check'); INSERT INTO docs VALUES ('more');",
    )


@pytest.mark.parametrize("who", ["ours", "theirs"])
def test_virtual_table_added_or_dropped_on_one_side(merge: Merge, who: str) -> None:
    added = FTS.removeprefix(BASE)
    assert merge(BASE, *((added, EDIT) if who == "ours" else (EDIT, added))).refused == ""
    assert merge.rows("SELECT * FROM docs WHERE docs MATCH 'world'") == [("hello world",)]
    merge.run("result", "INSERT INTO docs(docs) VALUES ('integrity-check'); DROP TABLE docs;")
    assert (
        merge(
            FTS, *(("DROP TABLE docs", EDIT) if who == "ours" else (EDIT, "DROP TABLE docs"))
        ).refused
        == ""
    )
    assert merge.rows("SELECT name FROM sqlite_schema") == [("t",)]


def test_virtual_table_changed_on_both_sides_is_refused(merge: Merge) -> None:
    merged = merge(FTS, "INSERT INTO docs VALUES ('a')", "INSERT INTO docs VALUES ('b')")
    assert "virtual table docs" in merged.refused
    conflict = merge(FTS, "UPDATE t SET b='o'", "UPDATE t SET b='t'; INSERT INTO docs VALUES ('b')")
    assert "left out" in conflict.refused


def test_generated_columns_are_computed_not_copied(merge: Merge) -> None:
    base = "CREATE TABLE g (id INTEGER PRIMARY KEY, a, v AS (a*2), s AS (a*3) STORED); CREATE INDEX gi ON g(v); INSERT INTO g(id,a) VALUES (1,1),(2,2);"
    merge(
        base,
        "UPDATE g SET a=5 WHERE id=1",
        "UPDATE g SET a=6 WHERE id=2; INSERT INTO g(id,a) VALUES (3,7);",
    )
    assert merge.rows("SELECT * FROM g") == [(1, 5, 10, 15), (2, 6, 12, 18), (3, 7, 14, 21)]


@pytest.mark.parametrize("encoding", ["UTF-8", "UTF-16le", "UTF-16be"])
def test_encodings(merge: Merge, encoding: str) -> None:
    merged = merge(
        f"PRAGMA encoding='{encoding}';" + BASE,
        "UPDATE t SET a='ä𝄞' WHERE id=1; UPDATE t SET b='ö' WHERE id=3",
        "UPDATE t SET a='€' WHERE id=2; UPDATE t SET b='ü' WHERE id=3;",
    )
    (conflict,) = merged.conflicts
    assert merge.rows("PRAGMA encoding") == [(encoding,)]
    resolve_row(merge.path("result"), conflict, "theirs")
    assert merge.rows("SELECT a, b FROM t WHERE id<4") == [("ä𝄞", 1), ("€", 2), ("three", "ü")]


@pytest.mark.parametrize("mode", ["wal", "delete"])
def test_wal_is_recovered_and_the_journal_mode_of_ours_is_kept(merge: Merge, mode: str) -> None:
    for name, edit in (
        ("base", BASE),
        ("ours", "UPDATE t SET b=10 WHERE id=1"),
        ("theirs", "UPDATE t SET b=20 WHERE id=2"),
    ):
        live = merge.path("live-" + name)
        if name != "base":
            shutil.copyfile(merge.path("base"), live)
        db = sqlite3.connect(live, isolation_level=None)
        db.execute(f"PRAGMA journal_mode={mode}")
        db.execute("PRAGMA wal_autocheckpoint=0")
        db.executescript(edit)
        for suffix in ("", "-wal"):
            if Path(live + suffix).exists():
                shutil.copyfile(live + suffix, merge.path(name) + suffix)
        assert Path(merge.path(name) + "-wal").exists() == (mode == "wal")
        if name == "base":
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            shutil.copyfile(live, merge.path(name))
        db.close()
    merged = merge.files()
    assert (merged.refused, merged.conflicts) == ("", ())
    assert [file.name for file in merge.directory.glob("result*")] == ["result"]
    assert merge.rows("SELECT b FROM t") == [(10,), (20,), (3,), (4,)]
    assert merge.rows("PRAGMA journal_mode") == [(mode,)]


def test_changed_table_refuses_to_be_resolved(merge: Merge) -> None:
    merged = merge(BASE, "UPDATE t SET a='o' WHERE id=1", "UPDATE t SET a='t' WHERE id=1")
    merge.run("result", "ALTER TABLE t ADD COLUMN c")
    before: Callable[[], bytes] = Path(merge.path("result")).read_bytes
    content = before()
    with pytest.raises(MergeConflict):
        resolve_row(merge.path("result"), merged.conflicts[0], "theirs")
    assert before() == content


def test_unique_value_in_the_way_of_a_resolution(merge: Merge) -> None:
    base = "CREATE TABLE t (id INTEGER PRIMARY KEY, u UNIQUE); INSERT INTO t VALUES (1,'a');"
    merged = merge(base, "INSERT INTO t VALUES (2,'x')", "INSERT INTO t VALUES (3,'x')")
    (conflict,) = merged.conflicts
    with pytest.raises(MergeConflict):
        resolve_row(merge.path("result"), conflict, "theirs")
    assert merge.rows("SELECT * FROM t") == [(1, "a"), (2, "x")]


def test_foreign_key_over_a_generated_column_is_refused_when_violated(merge: Merge) -> None:
    base = "CREATE TABLE p (id INTEGER PRIMARY KEY); INSERT INTO p VALUES (1),(2); CREATE TABLE c (id INTEGER PRIMARY KEY, v, x AS (v) REFERENCES p(id));"
    assert (
        merge(base, "DELETE FROM p WHERE id=2", "INSERT INTO c(id, v) VALUES (1, 1)").refused == ""
    )
    merged = merge(base, "DELETE FROM p WHERE id=2", "INSERT INTO c(id, v) VALUES (1, 2)")
    assert "generated column" in merged.refused


def test_names_that_are_no_utf8_are_told_as_escapes(merge: Merge) -> None:
    merged = merge(BASE, "", "")
    assert merged.refused == ""
    for name, script in (("ours", "SELECT 1"), ("theirs", "SELECT 2")):
        with opened(merge.path(name)) as db:
            db.execute("PRAGMA writable_schema=1")
            view = b'CREATE VIEW "v\xff" AS ' + script.encode()
            sql = "INSERT INTO sqlite_schema VALUES ('view', CAST(? AS TEXT), 'v', 0, CAST(? AS TEXT))"
            db.execute(sql, (b"v\xff", view))
    refused = merge.files().refused
    assert "v\\xff" in refused
    assert refused.encode()
