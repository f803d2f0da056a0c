"""Random edits on two branches of one database, merged, compared with a merge of dictionaries."""

import os
import random
import re
import shutil
from pathlib import Path

import pytest

from dmsync.engine.databases.sqlite_diff import DatabaseDiff, diff_databases
from dmsync.engine.databases.sqlite_merge import merge_databases, resolve_rows
from tests.support import northwind
from tests.support.northwind import KEYS

SEEDS = range(600 if os.environ.get("DM_TEST_LONG") else 40)

Rows = dict[tuple[object, ...], tuple[object, ...]]


def branches(tmp_path: Path, seed: int, *, apart: bool = False) -> tuple[str, str, str]:
    rng = random.Random(seed)
    paths = base, ours, theirs = [str(tmp_path / name) for name in ("base", "ours", "theirs")]
    northwind.create(base, rng)
    northwind.edit(base, rng, 30)
    for path, at in ((ours, 0), (theirs, 20)):
        shutil.copyfile(base, path)
        span, offset = (20, at) if apart else (14, 0)
        northwind.edit(path, rng, rng.choice([5, 40, 120]), span=span, base=offset)
    return tuple(paths)  # type: ignore[return-value]


def merged_rows(table: str, base: Rows, ours: Rows, theirs: Rows) -> tuple[Rows, set[object]]:
    """The model: what each row becomes, and the keys in conflict."""
    result = dict(ours)
    conflicts: set[object] = set()
    appended = []
    for key in base.keys() | theirs.keys():
        before, our, their = base.get(key), ours.get(key), theirs.get(key)
        if their in (before, our):
            continue
        if our == before:
            if their is None:
                del result[key]
            else:
                result[key] = their
        elif table == "visits" and before is None:
            appended.append((key, their))
        else:
            conflicts.add(key)
    for _, row in sorted(appended, key=lambda item: item[0]):
        result[(max((key[0] for key in result), default=0) + 1,)] = row  # type: ignore[operator, assignment, type-var]
    return result, conflicts


@pytest.mark.parametrize("seed", SEEDS)
def test_merge_is_what_the_model_says(tmp_path: Path, seed: int) -> None:
    base, ours, theirs = branches(tmp_path, seed)
    result = str(tmp_path / "result")
    merged = merge_databases(
        base=base, ours=ours, theirs=theirs, result=result, favour=None, conflicts_max=1000
    )
    assert merged.refused == ""
    assert northwind.problems(result) == []
    versions = [northwind.everything(path) for path in (base, ours, theirs)]
    violating = {
        (c.table, c.key) for c in merged.conflicts if c.reason in ("unique", "foreign key")
    }
    got = northwind.everything(result)
    for table in KEYS:
        expected, conflicts = merged_rows(table, *(version[table] for version in versions))
        found = {
            c.key for c in merged.conflicts if c.table == table and (table, c.key) not in violating
        }
        found = {
            tuple(str(k).lower() for k in key) if table == "customers" else key for key in found
        }
        assert found == conflicts, table
        for name, key in violating:
            folded = tuple(str(k).lower() for k in key) if table == "customers" else key
            if name != table:
                continue
            expected.pop(folded, None)
            if folded in versions[1][table]:
                expected[folded] = versions[1][table][folded]
        assert got[table] == expected, table


@pytest.mark.parametrize("seed", SEEDS)
def test_every_conflict_resolved_to_theirs_gives_theirs_rows(tmp_path: Path, seed: int) -> None:
    base, ours, theirs = branches(tmp_path, seed + 5000)
    result = str(tmp_path / "result")
    merged = merge_databases(
        base=base, ours=ours, theirs=theirs, result=result, favour=None, conflicts_max=1000
    )
    wanted = northwind.everything(theirs)
    free = [c for c in merged.conflicts if c.table in ("visits", "rates", "audit")]
    resolve_rows(result, [(conflict, "theirs") for conflict in free])
    for conflict in free:
        after = northwind.rows(result, conflict.table)
        assert after.get(conflict.key) == wanted[conflict.table].get(conflict.key)
    assert northwind.problems(result) == []


@pytest.mark.parametrize("seed", SEEDS)
def test_clean_merges_are_symmetric_and_their_diff_is_both_diffs(tmp_path: Path, seed: int) -> None:
    base, ours, theirs = branches(tmp_path, seed + 9000, apart=True)
    results = [str(tmp_path / name) for name in ("one", "two")]
    merges = [
        merge_databases(base=base, ours=a, theirs=b, result=path, favour=None, conflicts_max=1000)
        for (a, b), path in zip([(ours, theirs), (theirs, ours)], results, strict=True)
    ]
    assert bool(merges[0].conflicts) == bool(merges[1].conflicts)
    if merges[0].conflicts:
        return
    one, two = (northwind.everything(path) for path in results)
    appended = {
        table: sorted(map(repr, content.pop("visits").values()))
        for table, content in (("1", one), ("2", two))
    }
    assert one == two
    assert appended["1"] == appended["2"]
    union = changes(diff_databases(base, ours, rows_max=1000)) | changes(
        diff_databases(base, theirs, rows_max=1000)
    )
    assert changes(diff_databases(base, results[0], rows_max=1000)) == union


SCHEMA_CHANGES = [
    "ALTER TABLE orders ADD COLUMN paid INTEGER DEFAULT 0",
    "ALTER TABLE order_details ADD COLUMN discount REAL",
    "ALTER TABLE customers RENAME COLUMN company TO firm",
    "ALTER TABLE employees DROP COLUMN photo",
    "ALTER TABLE rates DROP COLUMN remark",
    "DROP INDEX products_by_name",
    "CREATE UNIQUE INDEX audit_texts ON audit(text)",
    "DROP TABLE visits",
    "DROP TABLE pages",
    "DROP TRIGGER log_products; CREATE TRIGGER log_new AFTER INSERT ON rates BEGIN DELETE FROM rates; END",
    "DROP VIEW sales; CREATE TABLE sales (id INTEGER PRIMARY KEY, x); INSERT INTO sales VALUES (1, 2)",
]


@pytest.mark.parametrize("seed", SEEDS)
def test_schema_changes_with_edits_leave_a_sound_database_or_are_refused(
    tmp_path: Path, seed: int
) -> None:
    base, ours, theirs = branches(tmp_path, seed + 13000, apart=True)
    rng = random.Random(seed)
    # tables go last: SQLite refuses to alter a schema whose triggers name a table that is gone
    chosen = sorted(rng.sample(SCHEMA_CHANGES, 3), key=lambda sql: sql.startswith("DROP TABLE"))
    for change in chosen:
        with northwind.opened(rng.choice([ours, theirs])) as db:
            db.executescript(change)
    result = str(tmp_path / "result")
    merged = merge_databases(
        base=base, ours=ours, theirs=theirs, result=result, favour=None, conflicts_max=1000
    )
    if merged.refused:
        table = "audit|photo|remark|visits"  # what the other side may have changed rows of as well
        assert re.search(table, merged.refused), (chosen, merged.refused)
        return
    assert northwind.problems(result) == []
    with northwind.opened(base) as db:
        for change in chosen:
            db.executescript(change)
    schemas = []
    for path in (base, result):
        with northwind.opened(path) as db:
            schemas.append(
                sorted(db.execute("SELECT type, name, sql FROM sqlite_schema").fetchall(), key=repr)
            )
    assert schemas[0] == schemas[1]


def changes(diff: DatabaseDiff) -> set[object]:
    return {
        (table.name, row.kind, row.key, tuple(map(northwind.typed, row.new or ())))
        for table in diff.tables
        for row in table.rows
        if table.name != "visits"
    }
