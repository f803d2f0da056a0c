"""Two states of a real dot compared: which, where, and what is told of their files."""

import json
import os
import sqlite3
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from dmsync.engine import file_versions
from dmsync.engine.comparison import CHANGED_MEANWHILE, Comparison, compare
from dmsync.engine.databases import sqlite_diff
from dmsync.engine.databases.sqlite_diff import DatabaseDiff, diff_databases
from dmsync.engine.diff_drivers import CommandDriver, DiffDriver, RowsDriver, drivers_of
from dmsync.engine.materialise import copy_open_file
from dmsync.engine.settings import DriverCommand
from dmsync.errors import CaptureFailed, DriverFailed, RevisionNotFound
from dmsync.storage.catalog import DotRow
from tests.support.working_store import Workshop

PREFIX = b"__default__/"


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Workshop]:
    shop = Workshop(tmp_path / "store")
    yield shop
    shop.close()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return tmp_path / "tree"


@pytest.fixture
def dot(shop: Workshop, tree: Path) -> DotRow:
    dot = shop.attach("app", tree)
    (tree / "a.txt").write_text("one\ntwo\n")
    shop.commit(dot, "first")
    return dot


def hunks(shop: Workshop) -> tuple[DiffDriver, ...]:
    """All drivers but those of a user."""
    return drivers_of([], shop.store.layout)


def rows(shop: Workshop, rows_max: int = 100) -> RowsDriver:
    return RowsDriver(shop.store.layout, rows_max)


def kinds(comparison: Comparison) -> list[tuple[str, bytes]]:
    return [(change.kind, change.path.removeprefix(PREFIX)) for change in comparison.changes]


def told(comparison: Comparison, drivers: Sequence[DiffDriver]) -> dict[bytes, list[str]]:
    found = {}
    for change in comparison.changes:
        difference = comparison.told(change, drivers)
        if difference is not None:
            found[change.path.removeprefix(PREFIX)] = list(difference.lines)
    assert left_over(comparison) == []
    return found


def left_over(comparison: Comparison) -> list[str]:
    directory = comparison.store.layout.temporary_dir
    return os.listdir(directory) if os.path.isdir(directory) else []


# --- which states --------------------------------------------------------------------------------


def test_revisions_ranges_stashes_and_the_tree(shop: Workshop, dot: DotRow, tree: Path) -> None:
    (tree / "b.txt").write_text("b")
    shop.commit(dot, "second")
    (tree / "c.txt").write_text("c")
    store = shop.store
    assert kinds(compare(store, dot, [])) == [("+", b"c.txt")]
    assert kinds(compare(store, dot, ["HEAD^"])) == [("+", b"b.txt"), ("+", b"c.txt")]
    for ends in (["HEAD^", "HEAD"], ["HEAD^..HEAD"], ["HEAD^.."], ["HEAD^...HEAD"]):
        assert kinds(compare(store, dot, ends)) == [("+", b"b.txt")], ends
    assert kinds(compare(store, dot, ["HEAD..HEAD^"])) == [("-", b"b.txt")]
    assert kinds(compare(store, dot, ["HEAD...HEAD^"])) == [], "the merge base is HEAD^ itself"
    shop.reset(dot, "HEAD", hard=True)
    (stash,) = [r.name for r in store.catalog.refs(dot.dot) if r.name.startswith("stash/")]
    assert kinds(compare(store, dot, ["HEAD", stash])) == [("+", b"c.txt")]
    assert kinds(compare(store, dot, [stash])) == [("-", b"c.txt")]
    with pytest.raises(RevisionNotFound):
        compare(store, dot, ["HEAD", "absent"])


def test_the_base_of_two_branches(shop: Workshop, dot: DotRow, tree: Path) -> None:
    shop.checkout(dot, "topic", create=True)
    (tree / "topic.txt").write_text("t")
    shop.commit(dot, "topic")
    shop.checkout(dot, "master")
    (tree / "master.txt").write_text("m")
    shop.commit(dot, "master")
    assert kinds(compare(shop.store, dot, ["master...topic"])) == [("+", b"topic.txt")]
    assert kinds(compare(shop.store, dot, ["master..topic"])) == [
        ("-", b"master.txt"), ("+", b"topic.txt"),
    ]  # fmt: skip


def test_an_attached_directory_that_is_gone_is_no_empty_answer(
    shop: Workshop, dot: DotRow, tree: Path
) -> None:
    tree.rename(tree.with_name("moved"))
    with pytest.raises(CaptureFailed):
        compare(shop.store, dot, [])
    with pytest.raises(CaptureFailed):
        compare(shop.store, dot, ["HEAD"])


def test_paths_keep_what_is_at_or_below_them(shop: Workshop, dot: DotRow, tree: Path) -> None:
    for name in ("d/x", "d/e/y", "dx", "z"):
        (tree / name).parent.mkdir(exist_ok=True, parents=True)
        (tree / name).write_text(name)
    (tree / "a.txt").rename(tree / "d" / "renamed.txt")

    def below(*paths: bytes) -> list[tuple[str, bytes]]:
        return kinds(compare(shop.store, dot, [], paths=[PREFIX + path for path in paths]))

    assert below(b"d/e") == [("+", b"d/e"), ("+", b"d/e/y")]
    assert below(b"z", b"dx") == [("+", b"dx"), ("+", b"z")]
    assert below(b"a.txt") == [("R", b"d/renamed.txt")]
    assert below(b"nothing") == []
    assert len(kinds(compare(shop.store, dot, [], paths=[b""]))) == 7


def test_measured_and_plain_comparisons_agree(shop: Workshop, dot: DotRow, tree: Path) -> None:
    (tree / "big").write_bytes(os.urandom(2**20))
    (tree / "copied.txt").write_text("one\ntwo\n")
    shop.commit(dot, "second")
    with open(tree / "big", "r+b") as out:
        out.seek(600_000)
        out.write(b"page")
    (tree / "again.txt").write_text("one\ntwo\n")
    plain, measured = (compare(shop.store, dot, [], measured=m) for m in (False, True))
    assert kinds(plain) == kinds(measured) == [("+", b"again.txt"), ("*", b"big")]
    (_, big) = measured.changes
    assert measured.differing_bytes(big) == 128 * 1024
    found = compare(shop.store, dot, [], find_copies=True)
    assert [(c.kind, c.old_path) for c in found.changes] == [("C", PREFIX + b"a.txt"), ("*", None)]


# --- text ----------------------------------------------------------------------------------------


def test_text_of_all_kinds_of_changes(shop: Workshop, dot: DotRow, tree: Path) -> None:
    (tree / "bin").write_bytes(b"a\0b")
    (tree / "gone").write_text("gone\n")
    shop.commit(dot, "second")
    (tree / "a.txt").write_text("one\n2\n")
    (tree / "bin").write_bytes(b"a\0c")
    (tree / "gone").unlink()
    (tree / "large").write_bytes(b"x" * (8 * 2**20 + 1))
    (tree / "lines").write_bytes(b"\n" * 1_000_001)
    (tree / "new").write_text("new")
    hostile = os.fsencode(tree) + b"/\x1b[31m\xff\n"
    Path(os.fsdecode(hostile)).write_text("h\n")
    comparison = compare(shop.store, dot, [])
    expected = {
        b"\x1b[31m\xff\n": ["@@ -0,0 +1 @@", "+h"],
        b"a.txt": ["@@ -1,2 +1,2 @@", " one", "-two", "+2"],
        b"bin": ["binary file"],
        b"gone": ["@@ -1 +0,0 @@", "-gone"],
        b"large": ["large file, not shown"],
        b"lines": ["large file, not shown"],
        b"new": ["@@ -0,0 +1 @@", "+new", "\\ No newline at end of file"],
    }
    assert told(comparison, hunks(shop)) == expected
    shop.commit(dot, "third")
    assert told(compare(shop.store, dot, ["HEAD^..HEAD"]), hunks(shop)) == expected


def test_a_file_that_moves_while_it_is_read_is_not_shown(
    shop: Workshop, dot: DotRow, tree: Path
) -> None:
    (tree / "a.txt").write_text("one\n2\n")
    comparison = compare(shop.store, dot, [])
    for content in ("one\n3\n", "longer than it was"):  # of the size that was found, and not
        (tree / "a.txt").write_text(content)
        assert comparison.told(comparison.changes[0], hunks(shop)) is CHANGED_MEANWHILE
    (tree / "a.txt").unlink()
    assert comparison.told(comparison.changes[0], hunks(shop)) is CHANGED_MEANWHILE
    (tree / "secret").write_text("one\n2\n")
    os.symlink("secret", tree / "a.txt")
    assert comparison.told(comparison.changes[0], hunks(shop)) is CHANGED_MEANWHILE


def test_a_directory_swapped_for_a_link_leads_nowhere(
    shop: Workshop, dot: DotRow, tree: Path, tmp_path: Path
) -> None:
    (tree / "d").mkdir()
    (tree / "d" / "f").write_text("mine\n")
    comparison = compare(shop.store, dot, [])
    (tree / "d").rename(tmp_path / "outside")
    os.symlink(tmp_path / "outside", tree / "d")
    assert told(comparison, hunks(shop)) == {b"d/f": list(CHANGED_MEANWHILE.lines)}


# --- rows ----------------------------------------------------------------------------------------


def execute(path: Path, *statements: str) -> None:
    connection = sqlite3.connect(path, isolation_level=None)
    for statement in statements:
        connection.execute(statement)
    connection.close()


def test_rows_of_a_database(shop: Workshop, dot: DotRow, tree: Path) -> None:
    execute(
        tree / "app.db",
        "CREATE TABLE users (id INTEGER PRIMARY KEY, name TEXT, photo BLOB)",
        "INSERT INTO users VALUES (1, 'Al', x'00ff'), (2, 'Bo', NULL)",
    )
    shop.commit(dot, "second")
    execute(
        tree / "app.db",
        "UPDATE users SET name = 'A''da' WHERE id = 1",
        "DELETE FROM users WHERE id = 2",
        "INSERT INTO users VALUES (3, 'Cy', zeroblob(20))",
        "CREATE INDEX by_name ON users (name)",
    )
    expected = [
        "+ index by_name",
        "    + CREATE INDEX by_name ON users (name)",
        "table users: 1 added, 1 removed, 1 changed",
        "  * (id=1) name: 'Al' -> 'A''da'",
        "  + (id=3) name='Cy', photo=x'00000000000000000000000000000000...' (20 bytes)",
        "  - (id=2) name='Bo', photo=NULL",
    ]
    live = compare(shop.store, dot, [])
    assert sorted(told(live, [rows(shop)])[b"app.db"]) == sorted(expected)
    shop.commit(dot, "third")
    recorded = compare(shop.store, dot, ["HEAD^", "HEAD"])
    for drivers in ([rows(shop)], hunks(shop)):
        assert sorted(told(recorded, drivers)[b"app.db"]) == sorted(expected)
    (few,) = told(recorded, [rows(shop, 1)]).values()
    assert len(few) == 5 and few[-1] == "  (2 more)"
    (change,) = recorded.changes
    difference = recorded.told(change, [rows(shop)])
    assert difference is not None
    assert [name for name, _ in sorted(difference.fields.items())] == [
        "schema", "tables", "uncompared",
    ]  # fmt: skip
    table = json.loads(json.dumps(difference.fields))["tables"][0]
    assert (table["name"], table["added"], table["truncated"]) == ("users", 1, False)


def test_rows_that_are_only_in_the_journal_of_a_live_database(
    shop: Workshop, dot: DotRow, tree: Path
) -> None:
    connection = sqlite3.connect(tree / "app.db", isolation_level=None)
    connection.execute("CREATE TABLE t (k TEXT PRIMARY KEY, v REAL)")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA wal_autocheckpoint = 0")
    connection.execute("INSERT INTO t VALUES ('before', 1)")
    shop.commit(dot, "second")
    before = (tree / "app.db").read_bytes()
    connection.execute("INSERT INTO t VALUES ('after', 1.5)")
    assert (tree / "app.db").read_bytes() == before, "the row is in the journal alone"
    expected = ["table t: 1 added, 0 removed, 0 changed", "  + (k='after') v=1.5"]
    live = compare(shop.store, dot, [])
    assert told(live, [rows(shop)])[b"app.db-wal"] == expected
    assert connection.execute("SELECT count(*) FROM t").fetchone() == (2,), "it was not touched"
    shop.commit(dot, "third")
    recorded = compare(shop.store, dot, ["HEAD^", "HEAD"])
    assert told(recorded, [rows(shop)])[b"app.db-wal"] == expected
    connection.close()


def test_copies_of_a_database_are_private_and_the_original_is_not_opened(
    shop: Workshop, dot: DotRow, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute(tree / "app.db", "CREATE TABLE t (k)")
    comparison = compare(shop.store, dot, [])
    modes: list[int] = []

    def watching(old: str | None, new: str | None, *, rows_max: int) -> DatabaseDiff:
        assert old is None and new is not None
        modes.extend(stat.S_IMODE(os.stat(path).st_mode) for path in (os.path.dirname(new), new))
        return diff_databases(old, new, rows_max=rows_max)

    monkeypatch.setattr(sqlite_diff, "diff_databases", watching)
    (tree / "app.db").chmod(0o644)
    before = os.stat(tree / "app.db")
    told(comparison, [rows(shop)])
    after = os.stat(tree / "app.db")
    assert modes == [0o700, 0o600]
    assert (before.st_mtime_ns, before.st_ctime_ns) == (after.st_mtime_ns, after.st_ctime_ns)


def test_a_damaged_database_is_said_to_be_one(shop: Workshop, dot: DotRow, tree: Path) -> None:
    (tree / "app.db").write_bytes(b"SQLite format 3\0" + os.urandom(9000))
    (note,) = told(compare(shop.store, dot, []), [rows(shop)])[b"app.db"]
    assert note.startswith("rows cannot be compared: ")


def test_a_live_database_that_never_rests_is_said_to_change(
    shop: Workshop, dot: DotRow, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute(tree / "app.db", "CREATE TABLE t (k)")
    comparison = compare(shop.store, dot, [])
    copy = copy_open_file

    def busy(source_fd: int, path: str) -> bool:
        done = copy(source_fd, path)
        execute(tree / "app.db", "INSERT INTO t VALUES (1)")
        return done

    monkeypatch.setattr(file_versions, "copy_open_file", busy)
    assert told(comparison, [rows(shop)])[b"app.db"] == list(CHANGED_MEANWHILE.lines)


# --- the user's commands -------------------------------------------------------------------------


def command(text: str, *patterns: str) -> DriverCommand:
    return DriverCommand("mine", text, patterns or ("*",))


def test_a_command_gets_both_versions_and_comes_first(
    shop: Workshop, dot: DotRow, tree: Path
) -> None:
    (tree / "a.txt").write_text("one\n2\n")
    (tree / "b.bin").write_bytes(b"\0")
    mine = command('echo "$DM_PATH"; cat "$DM_OLD" "$DM_NEW"', "*.txt")
    assert told(compare(shop.store, dot, []), drivers_of([mine], shop.store.layout)) == {
        b"a.txt": ["__default__/a.txt", "one", "two", "one", "2"],
        b"b.bin": ["binary file"],
    }
    absent = CommandDriver(command('echo "$DM_OLD"'), shop.store.layout)
    assert told(compare(shop.store, dot, []), [absent])[b"b.bin"] == ["/dev/null"]


@pytest.mark.parametrize("ending", ["exit 1", "exec 3</absent", "kill -9 $$"])
def test_a_command_that_fails_is_an_error_and_leaves_nothing(
    shop: Workshop, dot: DotRow, tree: Path, ending: str
) -> None:
    (tree / "a.txt").write_text("one\n2\n")
    comparison = compare(shop.store, dot, [])
    with pytest.raises(DriverFailed, match="driver mine"):
        comparison.told(
            comparison.changes[0], [CommandDriver(command(f"echo x; {ending}"), shop.store.layout)]
        )
    assert left_over(comparison) == []
