"""What differs between two database files: schema apart, rows by key, counts beyond the limit."""

import json
import shutil
from pathlib import Path

import pytest

from dmsync.engine.databases.sqlite_diff import (
    DatabaseDiff,
    RowChange,
    SchemaChange,
    TableDiff,
    diff_databases,
    is_sqlite,
)
from dmsync.engine.databases.sqlite_values import value_from_json, value_to_json
from tests.support.northwind import VALUES, opened, typed

BASE = """
CREATE TABLE t (id INTEGER PRIMARY KEY, a, b);
INSERT INTO t VALUES (1,'one',1), (2,'two',2), (3,'three',3);
CREATE INDEX i ON t(a);
"""


def diff(tmp_path: Path, base: str, edit: str, *, rows_max: int = 10) -> DatabaseDiff:
    old, new = str(tmp_path / "old"), str(tmp_path / "new")
    with opened(old) as db:
        db.executescript(base)
    shutil.copyfile(old, new)
    with opened(new) as db:
        db.executescript(edit)
    return diff_databases(old, new, rows_max=rows_max)


def test_rows_added_removed_and_changed(tmp_path: Path) -> None:
    found = diff(
        tmp_path,
        BASE,
        "UPDATE t SET b=9 WHERE id=2; DELETE FROM t WHERE id=1; INSERT INTO t VALUES (7,NULL,x'00');",
    )
    rows = (
        RowChange("*", (2,), (2, "two", 2), (2, "two", 9)),
        RowChange("+", (7,), None, (7, None, b"\0")),
        RowChange("-", (1,), (1, "one", 1), None),
    )
    table = TableDiff("t", ("id", "a", "b"), ("id",), 1, 1, 1, rows, False)
    assert found == DatabaseDiff((), (table,))


def test_more_rows_than_wanted_are_counted(tmp_path: Path) -> None:
    (table,) = diff(tmp_path, BASE, "UPDATE t SET b='x'", rows_max=2).tables
    assert (table.changed, len(table.rows), table.is_truncated) == (3, 2, True)


def test_equal_databases_have_no_difference(tmp_path: Path) -> None:
    assert diff(tmp_path, BASE, "VACUUM; UPDATE t SET b=b;") == DatabaseDiff((), ())


def test_schema_changes_stand_apart(tmp_path: Path) -> None:
    found = diff(
        tmp_path,
        BASE,
        "DROP INDEX i; ALTER TABLE t ADD COLUMN c DEFAULT 5; CREATE VIEW v AS SELECT 1;",
    )
    assert [(c.kind, c.type, c.name) for c in found.schema] == [
        ("-", "index", "i"),
        ("*", "table", "t"),
        ("+", "view", "v"),
    ]
    assert found.schema[0] == SchemaChange("-", "index", "i", "CREATE INDEX i ON t(a)", None)
    assert found.tables == ()


def test_renamed_column_is_no_change_of_rows(tmp_path: Path) -> None:
    found = diff(
        tmp_path, BASE, "ALTER TABLE t RENAME COLUMN a TO z; UPDATE t SET z='new' WHERE id=1"
    )
    (table,) = found.tables
    assert table.rows == (RowChange("*", (1,), (1, "one", 1), (1, "new", 1)),)


def test_tables_that_came_and_went(tmp_path: Path) -> None:
    edit = "DROP TABLE t; CREATE TABLE u (x TEXT, y TEXT, PRIMARY KEY (y, x)) WITHOUT ROWID; INSERT INTO u VALUES ('x','y');"
    gone, new = diff(tmp_path, BASE, edit).tables
    assert (gone.name, gone.removed, gone.key_columns) == ("t", 3, ("id",))
    assert new == TableDiff(
        "u", ("x", "y"), ("y", "x"), 1, 0, 0, (RowChange("+", ("y", "x"), None, ("x", "y")),), False
    )


def test_one_version_only(tmp_path: Path) -> None:
    path = str(tmp_path / "only")
    with opened(path) as db:
        db.executescript(BASE)
    assert diff_databases(None, path, rows_max=0).tables[0].added == 3
    assert diff_databases(path, None, rows_max=0).tables[0].removed == 3
    assert [c.kind for c in diff_databases(path, None, rows_max=0).schema] == ["-", "-"]


def test_table_without_key_and_null_keys(tmp_path: Path) -> None:
    base = "CREATE TABLE t (k TEXT PRIMARY KEY, v); INSERT INTO t VALUES (NULL,1),(NULL,1);"
    (table,) = diff(tmp_path, base, "UPDATE t SET v=2 WHERE rowid=2").tables
    assert (table.key_columns, table.rows) == (
        ("rowid",),
        (RowChange("*", (2,), (None, 1), (None, 2)),),
    )


def test_virtual_tables_are_uncompared_where_they_differ(tmp_path: Path) -> None:
    base = BASE + "CREATE VIRTUAL TABLE docs USING fts5(x); INSERT INTO docs VALUES ('a');"
    assert diff(tmp_path, base, "") == DatabaseDiff((), ())
    (tmp_path / "old").unlink()
    found = diff(tmp_path, base, "INSERT INTO docs VALUES ('b'); DELETE FROM t WHERE id=1;")
    assert (found.uncompared, [table.name for table in found.tables]) == (("docs",), ["t"])


def test_table_of_two_thousand_columns(tmp_path: Path) -> None:
    names = ",".join(f"c{i}" for i in range(1999))
    base = f"CREATE TABLE t (id INTEGER PRIMARY KEY, {names}); INSERT INTO t(id, c5) VALUES (1,1),(2,2);"
    (table,) = diff(tmp_path, base, "UPDATE t SET c1998='x' WHERE id=2").tables
    assert (table.changed, table.rows[0].key) == (1, (2,))


@pytest.mark.parametrize("value", [*VALUES, float("-inf"), "\udcff", 2**53, -(2**53)], ids=repr)
def test_values_survive_json(value: object) -> None:
    text = json.dumps(value_to_json(value))  # type: ignore[arg-type]
    assert typed(value_from_json(json.loads(text))) == typed(value)


@pytest.mark.parametrize(
    "bad",
    [True, 1.5, [], {}, {"real": 1}, {"blob": "?"}, {"other": "x"}, {"real": "0x1p0", "blob": ""}],
)
def test_what_is_no_value_is_refused(bad: object) -> None:
    with pytest.raises(ValueError, match=r"not a value|Only base64|Incorrect padding|Non-base64"):
        value_from_json(bad)


def test_header() -> None:
    assert is_sqlite(b"SQLite format 3\0" + bytes(84))
    assert not is_sqlite(b"SQLite format 3")
