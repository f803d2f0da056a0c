"""Files made to harm whoever opens them: a typed refusal, in bounded time, without effects."""

import os
import random
import shutil
import signal
import sqlite3
import struct
import threading
import time
from pathlib import Path

import pytest

from dmsync.engine.databases import sqlite_files
from dmsync.engine.databases.sqlite_diff import diff_databases
from dmsync.engine.databases.sqlite_files import Database, UnreadableDatabase, deadline_for
from dmsync.engine.databases.sqlite_merge import RowMerge, merge_databases
from tests.support import northwind
from tests.support.northwind import opened, problems

TABLE = "CREATE TABLE t (id INTEGER PRIMARY KEY, v); INSERT INTO t VALUES (1,1),(2,2);"


def made(path: Path, script: str) -> str:
    with opened(str(path)) as db:
        db.executescript(script)
    return str(path)


def forged(path: Path, script: str, kind: str, name: str, sql: str, rootpage: object = 0) -> str:
    """A database whose schema table says whatever the test wants."""
    made(path, script)
    with opened(str(path)) as db:
        db.execute("PRAGMA writable_schema=1")
        db.execute(
            "INSERT INTO sqlite_schema VALUES (?,?,?,?,?)", (kind, name, name, rootpage, sql)
        )
    return str(path)


def merged(tmp_path: Path, base: str, ours: str, theirs: str) -> RowMerge:
    result = str(tmp_path / "result")
    outcome = merge_databases(
        base=base, ours=ours, theirs=theirs, result=result, favour=None, conflicts_max=100
    )
    assert os.path.exists(result) == (outcome.refused == "")
    if not outcome.refused:
        assert problems(result) == []
    return outcome


def copies(tmp_path: Path, path: str) -> tuple[str, str]:
    found = str(tmp_path / "copy1"), str(tmp_path / "copy2")
    for copy in found:
        shutil.copyfile(path, copy)
    return found


GARBAGE = {
    "empty": b"",
    "header only": b"SQLite format 3\0",
    "encrypted": random.Random(1).randbytes(8192),
    "garbage after the header": b"SQLite format 3\0" + random.Random(2).randbytes(8176),
}


@pytest.mark.parametrize("side", range(3))
@pytest.mark.parametrize("content", GARBAGE.values(), ids=GARBAGE)
def test_what_is_no_database_is_refused(tmp_path: Path, content: bytes, side: int) -> None:
    paths = [made(tmp_path / str(i), TABLE) for i in range(3)]
    Path(paths[side]).write_bytes(content)
    if content:
        with pytest.raises(UnreadableDatabase):
            diff_databases(paths[side], paths[side - 1], rows_max=5)
    outcome = merged(tmp_path, *paths)
    assert outcome.refused or not content


@pytest.mark.parametrize("seed", range(60))
def test_damaged_pages_are_refused_or_read_never_a_crash(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    paths = [str(tmp_path / str(i)) for i in range(3)]
    northwind.create(paths[0], rng)
    for path in paths[1:]:
        shutil.copyfile(paths[0], path)
        northwind.edit(path, rng, 20)
    victim = Path(rng.choice(paths))
    content = bytearray(victim.read_bytes())
    for _ in range(rng.choice([1, 5, 50])):
        at = rng.choice(
            [
                rng.randrange(len(content)),
                4096 * rng.randrange(len(content) // 4096) + rng.randrange(12),
            ]
        )
        content[max(at, 16)] = rng.randrange(256)
    if seed % 5 == 0:
        del content[rng.randrange(len(content)) :]
    victim.write_bytes(content)
    try:
        diff_databases(paths[0], paths[1], rows_max=5)
    except UnreadableDatabase:
        pass
    merged(tmp_path, *paths)


def test_index_that_hides_rows_is_found_before_rows_are_lost(tmp_path: Path) -> None:
    script = "CREATE TABLE t (k TEXT PRIMARY KEY, v); INSERT INTO t VALUES ('a',1),('b',2);"
    base = made(tmp_path / "base", script)
    ours, theirs = copies(tmp_path, base)
    with opened(theirs) as db:
        root = db.execute("SELECT rootpage FROM sqlite_schema WHERE type='index'").fetchone()[0]
    content = bytearray(Path(theirs).read_bytes())
    content[(root - 1) * 4096 + 3 : (root - 1) * 4096 + 5] = b"\0\1"  # one cell instead of two
    Path(theirs).write_bytes(content)
    assert "damaged" in merged(tmp_path, base, ours, theirs).refused


def test_view_with_endless_recursion_is_never_evaluated(tmp_path: Path) -> None:
    view = "CREATE VIEW v AS WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x FROM r) SELECT * FROM r;"
    base = made(tmp_path / "base", TABLE + view)
    ours, theirs = copies(tmp_path, base)
    made(Path(theirs), "INSERT INTO t VALUES (3,3)")
    assert merged(tmp_path, base, ours, theirs).counts.added == 1


def test_views_that_double_each_other_cost_nothing(tmp_path: Path) -> None:
    views = "".join(
        f"CREATE VIEW v{i} AS SELECT a.x FROM v{i - 1} a, v{i - 1} b;" for i in range(1, 40)
    )
    base = made(tmp_path / "base", TABLE + "CREATE VIEW v0 AS SELECT 1 AS x;" + views)
    ours, theirs = copies(tmp_path, base)
    made(Path(theirs), "INSERT INTO t VALUES (3,3)")
    started = time.monotonic()
    assert merged(tmp_path, base, ours, theirs).refused == ""
    assert time.monotonic() - started < 5


def test_view_in_the_place_of_a_table_is_not_read(tmp_path: Path) -> None:
    view = "CREATE VIEW trap AS WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x FROM r) SELECT * FROM r"
    base = forged(tmp_path / "base", TABLE, "table", "trap", view)
    ours, theirs = copies(tmp_path, base)
    started = time.monotonic()
    with pytest.raises(UnreadableDatabase):
        diff_databases(ours, theirs, rows_max=5)
    assert merged(tmp_path, base, ours, theirs).refused != ""
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    "sql",
    [
        "CREATE TABLE trap AS SELECT load_extension('/nonexistent')",
        "CREATE TABLE trap (x DEFAULT (load_extension('/x')), y AS (load_extension('/x')))",
        "CREATE TABLE other (x)",
        "CREATE TABLE trap",
        "DROP TABLE t",
        "ATTACH '/tmp/x' AS y",
        'CREATE TABLE "tr\0ap" (x)',
        "",
    ],
)
@pytest.mark.parametrize("kind", ["table", "index", "view", "trigger"])
def test_schema_texts_do_not_act(tmp_path: Path, sql: str, kind: str) -> None:
    base = made(tmp_path / "base", TABLE)
    ours, _ = copies(tmp_path, base)
    theirs = forged(tmp_path / "theirs", TABLE, kind, "trap", sql, 2)
    merged(tmp_path, base, ours, theirs)
    with opened(ours) as db:
        assert db.execute("SELECT count(*) FROM t").fetchone() == (2,)


@pytest.mark.parametrize("names", [("a", "A"), ("x", b"x"), (None, "x"), ("\udcff", "y")])
def test_schema_that_contradicts_itself(tmp_path: Path, names: tuple[object, object]) -> None:
    base = made(tmp_path / "base", TABLE)
    ours, theirs = copies(tmp_path, base)
    with opened(theirs) as db:
        db.execute("PRAGMA writable_schema=1")
        for name in names:
            raw = name.encode("utf-8", "surrogateescape") if isinstance(name, str) else name
            value = "CAST(? AS TEXT)" if isinstance(name, str) else "?"
            db.execute(
                f"INSERT INTO sqlite_schema VALUES ('view',{value},'z',0,'CREATE VIEW z AS SELECT 1')",
                (raw,),
            )
    assert merged(tmp_path, base, ours, theirs).refused != ""


def test_ten_thousand_tables(tmp_path: Path) -> None:
    script = "".join(f"CREATE TABLE t{i} (id INTEGER PRIMARY KEY, v);" for i in range(10_000))
    base = made(tmp_path / "base", f"BEGIN; {script} COMMIT;")
    ours, theirs = copies(tmp_path, base)
    made(Path(ours), "INSERT INTO t5 VALUES (1,1)")
    made(Path(theirs), "INSERT INTO t9000 VALUES (1,1)")
    started = time.monotonic()
    assert merged(tmp_path, base, ours, theirs).counts.added == 1
    assert time.monotonic() - started < 60


def test_columns_that_compute_for_ever_ends_at_the_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_files, "SECONDS_MIN", 1.0)
    heavy = "length(hex(zeroblob(400000)))" + "+length(hex(zeroblob(400000)))" * 200
    numbers = ",".join(f"({i},1)" for i in range(3000))
    base = made(
        tmp_path / "base",
        f"CREATE TABLE g (id INTEGER PRIMARY KEY, v, x AS (v + {heavy}), CHECK (v + {heavy} > 0));"
        f"PRAGMA ignore_check_constraints=1; INSERT INTO g(id, v) VALUES {numbers};",
    )
    ours, theirs = copies(tmp_path, base)
    made(Path(theirs), "PRAGMA ignore_check_constraints=1; UPDATE g SET v=2")
    started = time.monotonic()
    diff = diff_databases(base, theirs, rows_max=5)  # generated columns are not even read
    assert diff.tables[0].changed == 3000
    assert time.monotonic() - started < 5
    assert "too long" in merged(tmp_path, base, ours, theirs).refused
    assert time.monotonic() - started < 15


def test_endless_statement_is_interrupted(tmp_path: Path) -> None:
    path = made(tmp_path / "base", TABLE)
    endless = "WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x FROM r) SELECT max(x) FROM r"
    with Database(path, deadline=time.monotonic() + 0.3, length_max=0) as database:
        database.connection.set_authorizer(None)
        with pytest.raises(sqlite3.OperationalError, match="interrupted"):
            database.execute(endless).fetchone()


def test_ctrl_c_during_a_statement_is_not_swallowed(tmp_path: Path) -> None:
    path = made(tmp_path / "base", TABLE)
    endless = "WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x FROM r) SELECT max(x) FROM r"
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        with Database(path, deadline=time.monotonic() + 20, length_max=0) as database:
            database.connection.set_authorizer(None)
            timer.start()
            database.execute(endless).fetchone()


@pytest.mark.parametrize(
    "sql",
    [
        "ATTACH ':memory:' AS x",
        "SELECT load_extension('x')",
        "SELECT * FROM v",
        "INSERT INTO t VALUES (3,3)",
        "INSERT INTO old.other VALUES (1)",
        "PRAGMA temp_store_directory='/tmp'",
        "WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x FROM r) SELECT * FROM r LIMIT 1",
        "CREATE TRIGGER r2 AFTER DELETE ON t BEGIN DELETE FROM t; END",
        "VACUUM",
    ],
)
def test_guard_denies(tmp_path: Path, sql: str) -> None:
    trap = "CREATE VIEW v AS SELECT * FROM t; CREATE TRIGGER r AFTER INSERT ON t BEGIN DELETE FROM t; END;"
    path = made(tmp_path / "base", TABLE + trap)
    other = made(tmp_path / "other", "CREATE TABLE other (x)")
    with Database(path, deadline=deadline_for(path), length_max=0) as database:
        database.attach(other, "old")
        with pytest.raises(sqlite3.DatabaseError):
            database.execute(sql).fetchall()


def test_journal_that_names_a_file_to_delete_is_refused(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("do not delete")
    path = made(tmp_path / "base", TABLE)
    other = made(tmp_path / "other", TABLE)
    name = os.fsencode(str(precious))
    checksum = sum(struct.unpack(f"{len(name)}b", name)) & 0xFFFFFFFF
    magic = bytes.fromhex("d9d505f920a163d7")
    header = magic + struct.pack(">IIIII", 0, 1, 2, 512, 4096)
    tail = struct.pack(">I", 262145) + name + struct.pack(">II", len(name), checksum) + magic
    journal = header.ljust(512, b"\0") + tail

    def plant() -> None:
        Path(path + "-journal").write_bytes(journal)

    plant()
    with pytest.raises(UnreadableDatabase, match="several databases"):
        diff_databases(path, other, rows_max=1)
    plant()
    assert merged(tmp_path, path, other, str(shutil.copyfile(other, tmp_path / "third"))).refused
    assert precious.read_text() == "do not delete"
    plant()
    with opened(path) as db:  # what SQLite itself does with this journal
        db.execute("SELECT count(*) FROM t").fetchall()
    assert not precious.exists()


def test_symbolic_link_beside_the_database_is_refused(tmp_path: Path) -> None:
    path = made(tmp_path / "base", TABLE)
    other = made(tmp_path / "other", TABLE)
    Path(path + "-wal").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnreadableDatabase, match="regular"):
        diff_databases(path, other, rows_max=1)


def test_damaged_wal_is_read_as_sqlite_reads_it(tmp_path: Path) -> None:
    live = sqlite3.connect(str(tmp_path / "live"), isolation_level=None)
    live.execute("PRAGMA journal_mode=WAL")
    live.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, v)")
    for i in range(20):
        live.execute("INSERT INTO t VALUES (?,?)", (i, i))
    wal = bytearray((tmp_path / "live-wal").read_bytes())
    for seed in range(20):
        broken = bytearray(wal)
        rng = random.Random(seed)
        for _ in range(5):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        paths = [str(tmp_path / str(i)) for i in range(3)]
        for at, path in enumerate(paths):
            shutil.copyfile(tmp_path / "live", path)
            Path(path + "-wal").write_bytes(broken if at == seed % 3 else wal)
        merged(tmp_path, *paths)
    live.close()
