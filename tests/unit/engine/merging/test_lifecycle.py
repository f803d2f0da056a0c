"""Merging whole dots: clean, with conflicts, continued, aborted, killed."""

import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dmsync.core.events import CommitsAdded, HeadSwitched, RefChanged
from dmsync.core.ids import Kind, ObjectId
from dmsync.engine import branches, dots, trees
from dmsync.engine.merging import lifecycle, state
from dmsync.engine.merging.lifecycle import MergeOptions, MergeSummary
from dmsync.engine.merging.resolution import resolve_conflicts
from dmsync.engine.settings import DriverCommand
from dmsync.engine.store import Store
from dmsync.errors import (
    DriverFailed,
    MergeConflict,
    NotFastForward,
    NotFound,
    UnrelatedHistories,
    UsageError,
    WouldLose,
)
from dmsync.storage.catalog import DotRow
from tests.support.working_store import Workshop


@pytest.fixture
def workshop(tmp_path: Path):
    made = Workshop(tmp_path / "home")
    yield made
    made.close()


class Branches:
    """A dot in a directory whose branches `master` and `other` stem from one commit."""

    def __init__(self, workshop: Workshop, root: Path, base: dict[str, bytes]) -> None:
        self.workshop = workshop
        self.root = root
        self.dot: DotRow = workshop.attach("app", root)
        self.write(base)
        self.base: Any = workshop.commit(self.dot, "base").commit
        branches.create_branch(workshop.store, self.dot, "other", None)

    def write(self, files: Mapping[str, bytes | None]) -> None:
        for name, data in files.items():
            path = self.root / name
            if data is None:
                path.unlink()
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)

    def on(self, branch: str, files: dict[str, bytes | None], message: str = "") -> None:
        """Commit changes on a branch and come back to master."""
        self.workshop.checkout(self.dot, branch)
        self.write(files)
        self.workshop.commit(self.dot, message or f"change of {branch}")
        self.workshop.checkout(self.dot, "master")

    def merge(self, revision: str = "other", **wishes: object) -> MergeSummary:
        options = MergeOptions(revision, **wishes)  # type: ignore[arg-type]
        return lifecycle.merge_revision(self.workshop.store, self.dot, options)

    def files(self) -> dict[str, bytes]:
        return {
            str(path.relative_to(self.root)): path.read_bytes()
            for path in sorted(self.root.rglob("*"))
            if path.is_file() and not path.is_symlink()
        }

    def tip(self, branch: str = "master") -> Any:
        return trees.branch_tip(self.workshop.store, self.dot.dot, branch)

    def parents(self) -> tuple[ObjectId, ...]:
        tip = self.tip()
        assert tip is not None
        return self.workshop.store.commit(self.dot.dot, tip).parents


@pytest.fixture
def made(workshop: Workshop, tmp_path: Path):
    def make(base: dict[str, bytes]) -> Branches:
        return Branches(workshop, tmp_path / "tree", base)

    return make


def conflict_paths(summary: MergeSummary) -> list[bytes]:
    return [conflict.path for conflict in summary.conflicts]


# --- databases are never mixed ------------------------------------------------------------------

POSTGRESQL = {
    "data/PG_VERSION": b"15\n",
    "data/global/pg_control": b"control 0",
    "data/base/1/1259": b"catalog 0",
    "data/base/1/16384": b"table 0",
    "data/pg_wal/000000010000000000000001": b"wal 0",
    "notes.txt": b"hello\n",
}


def test_a_database_directory_changed_on_both_sides_conflicts_and_is_never_mixed(made):
    dot = made(POSTGRESQL)
    dot.on("other", {"data/base/1/16384": b"table of theirs", "new.txt": b"theirs"})
    ours = {"data/base/1/1259": b"catalog of ours"}
    dot.on("master", ours)
    summary = dot.merge()
    at = b"__default__/data"
    assert conflict_paths(summary) == [at]
    found = dot.files()
    assert {n: d for n, d in found.items() if n.startswith("data/")} == {
        name: data for name, data in {**POSTGRESQL, **ours}.items() if name.startswith("data/")
    }
    assert found["data~theirs/base/1/16384"] == b"table of theirs"
    assert found["data~theirs/base/1/1259"] == b"catalog 0"
    assert found["data~base/base/1/1259"] == b"catalog 0"
    assert found["data~ours/base/1/1259"] == b"catalog of ours"
    assert found["new.txt"] == b"theirs"


def test_a_database_directory_changed_on_one_side_is_taken_whole(made):
    dot = made(POSTGRESQL)
    changed = {"data/base/1/16384": b"table 1", "data/global/pg_control": b"control 1"}
    dot.on("other", {**changed, "data/pg_wal/000000010000000000000001": None})
    dot.on("master", {"notes.txt": b"mine\n"})
    # a mere touch is no change of the database
    os.utime(dot.root / "data/base/1/1259", ns=(1, 1))
    dot.workshop.commit(dot.dot, "touched")
    summary = dot.merge()
    assert summary.outcome == "merged"
    expected = {**POSTGRESQL, **changed, "notes.txt": b"mine\n"}
    del expected["data/pg_wal/000000010000000000000001"]
    assert dot.files() == expected


@pytest.mark.parametrize(
    "marker",
    [
        {"db/ibdata1": b"x"},
        {"db/WiredTiger": b"x"},
        {"db/appendonlydir/a": b"x"},
        {"db/dump.rdb": b"x", "db/appendonly.aof": b"y"},
        {"db/CURRENT": b"x", "db/MANIFEST-000001": b"y"},
    ],
)
def test_database_directories_are_known_by_their_markers(made, marker):
    dot = made({"db/one": b"1", "db/sub/two": b"2", **marker})
    dot.on("other", {"db/one": b"theirs"})
    dot.on("master", {"db/sub/two": b"ours"})
    summary = dot.merge()
    assert conflict_paths(summary) == [b"__default__/db"]
    assert dot.files()["db/one"] == b"1"


def test_a_marker_in_the_base_alone_still_makes_a_unit(made):
    dot = made({"db/ibdata1": b"x", "db/one": b"1", "db/two": b"2"})
    dot.on("other", {"db/ibdata1": None, "db/one": b"theirs"})
    dot.on("master", {"db/ibdata1": None, "db/two": b"ours"})
    assert conflict_paths(dot.merge()) == [b"__default__/db"]


def test_directories_named_in_the_settings_are_units(workshop, tmp_path):
    workshop.settings = workshop.settings.__class__(
        author="Ada <ada@example.org>", merge_units=("state",)
    )
    workshop.reopen()
    dot = Branches(workshop, tmp_path / "tree", {"state/one": b"1", "state/two": b"2"})
    dot.on("other", {"state/one": b"theirs"})
    dot.on("master", {"state/two": b"ours"})
    assert conflict_paths(dot.merge()) == [b"__default__/state"]


def test_a_whole_subdot_that_is_a_database_conflicts_without_copies(made):
    dot = made({"ibdata1": b"x", "one": b"1", "two": b"2"})
    dot.on("other", {"one": b"theirs"})
    dot.on("master", {"two": b"ours"})
    summary = dot.merge()
    assert conflict_paths(summary) == [b"__default__"]
    assert summary.conflicts[0].copies == ()
    assert dot.files() == {"ibdata1": b"x", "one": b"1", "two": b"ours"}
    with pytest.raises(MergeConflict):
        dot.workshop.commit(dot.dot, "too early")
    resolve_conflicts(dot.workshop.store, dot.dot, [b"__default__"], "theirs")
    lifecycle.continue_merge(dot.workshop.store, dot.dot)
    assert dot.files() == {"ibdata1": b"x", "one": b"theirs", "two": b"2"}


def test_a_database_deleted_on_one_side_and_changed_on_the_other_conflicts_whole(made):
    dot = made(POSTGRESQL)
    dot.on("other", {"data/base/1/16384": b"table 1"})
    gone = {name: None for name in POSTGRESQL if name.startswith("data/")}
    dot.on("master", gone)
    for folder in sorted((dot.root / "data").rglob("*"), reverse=True):
        folder.rmdir()
    (dot.root / "data").rmdir()
    dot.workshop.commit(dot.dot, "no directory")
    summary = dot.merge()
    assert conflict_paths(summary) == [b"__default__/data"]
    assert not (dot.root / "data").exists()
    assert dot.files()["data~theirs/base/1/16384"] == b"table 1"


def wal_database(path: Path, value: str) -> None:
    """A database whose last change is in its write-ahead log, left as a killed process would."""
    child = os.fork()
    if child == 0:
        db = sqlite3.connect(path, isolation_level=None)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("CREATE TABLE IF NOT EXISTS t (id INTEGER PRIMARY KEY, v TEXT)")
        db.execute("INSERT OR REPLACE INTO t VALUES (1, ?)", (value,))
        os._exit(0)
    os.waitpid(child, 0)


def test_a_sqlite_database_goes_with_its_companions(made):
    dot = made({"a.txt": b"1\n"})
    dot.workshop.checkout(dot.dot, "other")
    wal_database(dot.root / "db", "theirs")
    assert (dot.root / "db-wal").stat().st_size > 0
    dot.workshop.commit(dot.dot, "database with a log")
    dot.workshop.checkout(dot.dot, "master")
    dot.on("master", {"a.txt": b"2\n"})
    assert dot.merge().outcome == "merged"
    with sqlite3.connect(dot.root / "db") as db:
        assert db.execute("SELECT v FROM t").fetchall() == [("theirs",)]


def test_a_database_file_is_never_joined_with_the_other_sides_log(made):
    dot = made({"db": b"main 0", "db-wal": b"log 0"})
    dot.on("other", {"db-wal": b"log of theirs"})
    dot.on("master", {"db": b"main of ours", "db-wal": None})
    summary = dot.merge()
    assert conflict_paths(summary) == [b"__default__/db"]
    found = dot.files()
    assert found["db"] == b"main of ours" and "db-wal" not in found
    assert (found["db~theirs"], found["db~theirs-wal"]) == (b"main 0", b"log of theirs")
    resolve_conflicts(dot.workshop.store, dot.dot, [b"__default__/db"], "theirs")
    assert dot.files() == {"db": b"main 0", "db-wal": b"log of theirs"}


# --- starting -----------------------------------------------------------------------------------


def test_different_files_merge_into_a_commit_with_two_parents(made):
    dot = made({"a": b"1\n", "b": b"1\n"})
    dot.on("other", {"b": b"2\n", "sub/c": b"3"})
    dot.on("master", {"a": b"2\n"})
    ours, theirs = dot.tip(), dot.tip("other")
    summary = dot.merge()
    assert (summary.outcome, summary.commit) == ("merged", dot.tip())
    assert dot.parents() == (ours, theirs)
    assert dot.files() == {"a": b"2\n", "b": b"2\n", "sub/c": b"3"}
    assert dot.workshop.changes(dot.dot) == []
    assert sorted(change.path for change in summary.changes) == [
        b"__default__/b",
        b"__default__/sub",
        b"__default__/sub/c",
    ]
    log = dot.workshop.store.catalog.reflog(dot.dot.dot, "branch/master", count=1)
    assert (log[0].kind, log[0].reason) == ("merge", "merge other into master")


def test_fast_forward_is_the_default_and_can_be_refused_or_required(made):
    dot = made({"a": b"1\n"})
    dot.on("other", {"a": b"2\n"})
    theirs = dot.tip("other")
    assert dot.merge(dry_run=True).outcome == "fast-forward"
    assert dot.tip() != theirs
    summary = dot.merge()
    assert (summary.outcome, dot.tip()) == ("fast-forward", theirs)
    assert dot.files() == {"a": b"2\n"}
    assert dot.merge().outcome == "up-to-date"
    dot.on("other", {"a": b"3\n"})
    assert dot.merge(fast_forward="never").outcome == "merged"
    assert dot.parents() == (theirs, dot.tip("other"))
    dot.on("other", {"b": b"3\n"})
    with pytest.raises(NotFastForward):
        dot.merge(fast_forward="only")


def test_squash_makes_one_commit_with_one_parent(made):
    dot = made({"a": b"1\n"})
    dot.on("other", {"b": b"2\n"})
    dot.on("other", {"b": b"3\n"})
    ours = dot.tip()
    dot.merge(squash=True, message="all of it")
    assert dot.parents() == (ours,)
    assert dot.files() == {"a": b"1\n", "b": b"3\n"}
    with pytest.raises(UsageError):
        dot.merge(squash=True, fast_forward="only")


def test_uncommitted_changes_are_in_the_way(made):
    dot = made({"a": b"1\n"})
    dot.on("other", {"b": b"2\n"})
    dot.write({"a": b"not committed"})
    tip = dot.tip()
    with pytest.raises(WouldLose):
        dot.merge()
    assert (dot.tip(), dot.files()) == (tip, {"a": b"not committed"})


@contextmanager
def written(path: Path) -> Iterator[None]:
    """A process that has the file open for writing."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        file = os.open(path, os.O_WRONLY)
        os.write(writing, b"x")
        os.read(os.pipe()[0], 1)
        os._exit(file)
    os.read(reading, 1)
    try:
        yield
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
        os.close(reading)
        os.close(writing)


def test_a_tree_in_use_is_refused(made):
    dot = made({"a": b"1\n"})
    dot.on("other", {"b": b"2\n"})
    dot.on("master", {"a": b"2\n"})
    with written(dot.root / "a"):
        with pytest.raises(WouldLose, match="open for writing") as refused:
            dot.merge()
        assert "dm merge --in-use" in refused.value.hint
        with pytest.raises(WouldLose) as refused:
            trees.refuse_if_dirty(dot.workshop.store, dot.dot.dot, "master")
        assert "--in-use" not in refused.value.hint  # no push or pull has it
        assert dot.merge(in_use=True).outcome == "merged"
    assert dot.files() == {"a": b"2\n", "b": b"2\n"}


def test_a_fast_forward_of_a_tree_in_use_happens_when_asked(made):
    dot = made({"a": b"1\n"})
    dot.on("other", {"b": b"2\n"})
    with written(dot.root / "a"):
        with pytest.raises(WouldLose):
            dot.merge()
        assert dot.merge(in_use=True).outcome == "fast-forward"


def test_conflicts_of_a_tree_in_use_are_decided_and_given_up_when_asked(made):
    dot = conflicting(made)
    before, store = dot.files(), dot.workshop.store
    dot.merge()
    with written(dot.root / "a"):
        with pytest.raises(WouldLose):
            resolve_conflicts(store, dot.dot, None, "theirs")
        resolve_conflicts(store, dot.dot, [b"__default__/a"], "theirs", in_use=True)
    assert dot.files()["a"] == b"\0 theirs"
    with written(dot.root / "a"):
        with pytest.raises(WouldLose):
            lifecycle.abort_merge(store, dot.dot)
        lifecycle.abort_merge(store, dot.dot, in_use=True)
    assert dot.files() == before


def unrelated(dot: Branches) -> None:
    """A branch `foreign` whose history begins anew, made of what the other branch holds."""
    store = dot.workshop.store
    value = replace(store.commit(dot.dot.dot, dot.tip("other")), parents=(), message="foreign")
    with store.objects(dot.dot.dot).writer() as writer:
        new = writer.put(Kind.COMMIT, value.to_bytes())
        writer.seal()
    with store.transaction("test") as tx:
        tx.append(CommitsAdded(dot.dot.dot, (new,)))
        tx.append(RefChanged(dot.dot.dot, "branch/foreign", None, new, "create"))


def test_unrelated_histories_merge_only_when_asked(made):
    dot = made({"a": b"1\n"})
    dot.on("other", {"b": b"2\n"})
    unrelated(dot)
    with pytest.raises(UnrelatedHistories):
        dot.merge("foreign")
    dot.merge("foreign", allow_unrelated=True)
    assert dot.files() == {"a": b"1\n", "b": b"2\n"}
    assert dot.parents() == (dot.base, dot.tip("foreign"))


def test_criss_cross_merges_over_a_virtual_base(made):
    text = b"".join(b"line %d\n" % number for number in range(30))
    dot = made({"t": text, "x": b"0"})
    store = dot.workshop.store
    dot.on("other", {"t": text.replace(b"line 25\n", b"theirs 25\n"), "x": b"1"})
    dot.on("master", {"t": text.replace(b"line 5\n", b"ours 5\n")})
    branches.create_branch(store, dot.dot, "cross", "master")
    dot.merge("other")
    dot.workshop.checkout(dot.dot, "other")
    dot.merge("cross")
    dot.write({"t": (dot.root / "t").read_bytes() + b"end of other\n"})
    dot.workshop.commit(dot.dot, "on other")
    dot.workshop.checkout(dot.dot, "master")
    dot.on("master", {"x": b"2"})
    summary = dot.merge("other")
    assert summary.outcome == "merged"
    merged = text.replace(b"line 25\n", b"theirs 25\n").replace(b"line 5\n", b"ours 5\n")
    assert dot.files() == {"t": merged + b"end of other\n", "x": b"2"}


def test_a_criss_cross_does_not_bring_back_what_one_side_deleted(made):
    dot = made({"f": b"\0 1", "x": b"0"})
    store = dot.workshop.store
    dot.on("other", {"f": b"\0 other"})
    dot.on("master", {"f": b"\0 master"})
    branches.create_branch(store, dot.dot, "cross", "master")
    dot.merge("other", favour="ours")
    dot.workshop.checkout(dot.dot, "other")
    dot.merge("cross", favour="ours")
    dot.write({"f": None})
    dot.workshop.commit(dot.dot, "f goes")
    dot.workshop.checkout(dot.dot, "master")
    assert [c.reason for c in dot.merge("other").conflicts] == [
        "deleted by theirs, changed by ours"
    ]
    lifecycle.abort_merge(store, dot.dot)
    dot.workshop.checkout(dot.dot, "other")
    assert [c.reason for c in dot.merge("master").conflicts] == [
        "deleted by ours, changed by theirs"
    ]
    assert "f" not in dot.files()


def test_merging_into_a_branch_without_commits_moves_it_there(workshop):
    store: Store = workshop.store
    dot = dots.init_dot(store, "app", at=None, as_root=False)
    tip = workshop.commit(dot, "first").commit
    with store.transaction("test") as tx:
        tx.append(HeadSwitched(dot.dot, "fresh"))
    summary = lifecycle.merge_revision(store, dot, MergeOptions("master"))
    assert (summary.outcome, summary.ours, summary.commit) == ("fast-forward", None, tip)
    assert trees.branch_tip(store, dot.dot, "fresh") == tip


# --- conflicts ----------------------------------------------------------------------------------


def conflicting(made) -> Branches:
    dot: Branches = made({"a": b"\0 1", "b": b"1", "gone": b"\0 old"})
    dot.on("other", {"a": b"\0 theirs", "b": b"2", "gone": b"\0 changed"})
    dot.on("master", {"a": b"\0 ours", "gone": None})
    return dot


def test_conflicts_keep_ours_and_lay_the_versions_beside(made):
    dot = conflicting(made)
    tip = dot.tip()
    summary = dot.merge()
    assert summary.outcome == "conflicts"
    assert [(c.path, c.reason, c.sides) for c in summary.conflicts] == [
        (b"__default__/a", "changed on both sides", ("ours", "theirs", "base")),
        (b"__default__/gone", "deleted by ours, changed by theirs", ("theirs", "base")),
    ]
    assert dot.files() == {
        "a": b"\0 ours",
        "a~ours": b"\0 ours",
        "a~theirs": b"\0 theirs",
        "a~base": b"\0 1",
        "b": b"2",
        "gone~theirs": b"\0 changed",
        "gone~base": b"\0 old",
    }
    assert dot.tip() == tip
    report = trees.status(dot.workshop.store, dot.dot.dot)
    assert report.merge is not None and len(report.conflicts) == 2


def test_taken_copy_names_are_numbered(made):
    dot = made({"a": b"\0 1", "a~theirs": b"mine"})
    dot.on("other", {"a": b"\0 2"})
    dot.on("master", {"a": b"\0 3"})
    dot.merge()
    assert dot.files()["a~theirs"] == b"mine"
    assert dot.files()["a~theirs~2"] == b"\0 2"


def test_nothing_else_is_possible_until_the_merge_is_over(made):
    dot = conflicting(made)
    dot.merge()
    store = dot.workshop.store
    for attempt in (
        lambda: dot.workshop.commit(dot.dot, "too early"),
        lambda: dot.workshop.checkout(dot.dot, "other"),
        lambda: dot.merge(),
        lambda: lifecycle.continue_merge(store, dot.dot),
        lambda: dot.workshop.reset(dot.dot, "HEAD"),
    ):
        with pytest.raises(MergeConflict):
            attempt()
    with pytest.raises(WouldLose):
        trees.refuse_if_dirty(store, dot.dot.dot, "master")


def test_resolved_merges_are_committed_with_their_parents(made):
    dot = conflicting(made)
    ours, theirs = dot.tip(), dot.tip("other")
    dot.merge(message="joined")
    store = dot.workshop.store
    done = resolve_conflicts(store, dot.dot, [b"__default__/a"], "theirs")
    assert done.left == 1
    assert "a~theirs" not in dot.files() and dot.files()["a"] == b"\0 theirs"
    dot.write({"gone": b"both"})
    done = resolve_conflicts(store, dot.dot, None, "as-is")
    assert (done.paths, done.left) == ((b"__default__/gone",), 0)
    summary = lifecycle.continue_merge(store, dot.dot)
    assert summary.commit is not None
    assert dot.files() == {"a": b"\0 theirs", "b": b"2", "gone": b"both"}
    assert dot.workshop.changes(dot.dot) == []
    assert dot.parents() == (ours, theirs)
    assert store.commit(dot.dot.dot, summary.commit).message == "joined"
    assert store.catalog.merge(dot.dot.dot, "master") is None
    assert state.list_conflicts(store, dot.dot.dot) == []


def test_commit_concludes_a_resolved_merge(made):
    dot = conflicting(made)
    theirs = dot.tip("other")
    dot.merge()
    resolve_conflicts(dot.workshop.store, dot.dot, None, "ours")
    dot.workshop.commit(dot.dot, "my own words")
    assert dot.parents()[1] == theirs
    assert dot.files() == {"a": b"\0 ours", "b": b"2"}


def test_resolving_keeps_what_the_user_had_written(made):
    dot = conflicting(made)
    dot.merge()
    dot.write({"a": b"worked on it", "a~theirs": b"and on this"})
    done = resolve_conflicts(dot.workshop.store, dot.dot, [b"__default__/a"], "base")
    assert dot.files()["a"] == b"\0 1"
    assert done.kept == (b"__default__/a~theirs",)
    assert done.stash is not None
    kept = dot.workshop.store.catalog.ref(dot.dot.dot, done.stash)
    assert kept is not None
    resolve_conflicts(dot.workshop.store, dot.dot, None, "as-is")
    lifecycle.continue_merge(dot.workshop.store, dot.dot)
    dot.workshop.reset(dot.dot, done.stash, hard=True)
    assert dot.files()["a"] == b"worked on it"


def test_abort_brings_the_tree_back_and_keeps_what_it_held(made):
    dot = conflicting(made)
    before, tip = dot.files(), dot.tip()
    dot.merge()
    dot.write({"a": b"worked on it"})
    summary = lifecycle.abort_merge(dot.workshop.store, dot.dot)
    assert (dot.files(), dot.tip()) == (before, tip)
    assert summary.stash is not None
    with pytest.raises(NotFound):
        lifecycle.abort_merge(dot.workshop.store, dot.dot)
    dot.workshop.reset(dot.dot, summary.stash, hard=True)
    assert dot.files()["a"] == b"worked on it"


def test_reset_hard_ends_the_merge(made):
    dot = conflicting(made)
    before = dot.files()
    dot.merge()
    dot.workshop.reset(dot.dot, "HEAD", hard=True)
    assert dot.files() == before
    assert dot.workshop.store.catalog.merge(dot.dot.dot, "master") is None
    assert dot.merge().outcome == "conflicts"


@pytest.mark.parametrize(("favour", "expected"), [("ours", b"\0 ours"), ("theirs", b"\0 theirs")])
def test_a_favoured_side_decides(made, favour, expected):
    dot = conflicting(made)
    assert dot.merge(favour=favour).outcome == "merged"
    files = {"a": expected, "b": b"2"}
    if favour == "theirs":
        files["gone"] = b"\0 changed"
    assert dot.files() == files


def test_a_dry_run_changes_nothing(made):
    dot = conflicting(made)
    before, tip = dot.files(), dot.tip()
    packs = dot.workshop.store.objects(dot.dot.dot).packs()
    summary = dot.merge(dry_run=True)
    assert (summary.outcome, len(summary.conflicts)) == ("conflicts", 2)
    assert (dot.files(), dot.tip()) == (before, tip)
    assert dot.workshop.store.catalog.merge(dot.dot.dot, "master") is None
    assert dot.workshop.store.objects(dot.dot.dot).packs() == packs


def test_a_result_without_parents_stays_uncommitted(made):
    dot = made({"a": b"1\n", "b": b"1\n"})
    dot.on("other", {"b": b"2\n"})
    dot.on("master", {"a": b"2\n"})
    store, tip = dot.workshop.store, dot.tip()
    request = lifecycle.MergeRequest(
        "stash-pop", dot.tip("other"), bases=(dot.base,), parents=(), message="popped"
    )
    assert lifecycle.start_merge(store, dot.dot, request).outcome == "applied"
    assert dot.tip() == tip
    assert dot.files() == {"a": b"2\n", "b": b"2\n"}
    assert dot.workshop.changes(dot.dot) == [("*", b"__default__/b")]
    assert store.catalog.merge(dot.dot.dot, "master") is None


def test_author_and_metadata_of_the_request_survive_conflicts(made):
    dot = conflicting(made)
    store = dot.workshop.store
    request = lifecycle.MergeRequest(
        "cherry-pick",
        dot.tip("other"),
        bases=(dot.base,),
        parents=(dot.tip(),),
        message="picked",
        author="Grace <grace@example.org>",
        metadata=(("ticket", "7"),),
    )
    assert lifecycle.start_merge(store, dot.dot, request).outcome == "conflicts"
    resolve_conflicts(store, dot.dot, None, "theirs")
    summary = lifecycle.continue_merge(store, dot.dot)
    assert summary.commit is not None
    made_commit = store.commit(dot.dot.dot, summary.commit)
    assert made_commit.author == "Grace <grace@example.org>"
    assert made_commit.metadata == (("ticket", "7"),)
    assert made_commit.message == "picked"
    assert len(made_commit.parents) == 1
    log = store.catalog.reflog(dot.dot.dot, "branch/master", count=1)
    assert log[0].kind == "cherry-pick"


def test_a_branch_without_a_tree_merges_without_one(workshop):
    store: Store = workshop.store
    dot = dots.init_dot(store, "bare", at=None, as_root=False)
    workshop.commit(dot, "base")
    place = trees.require_place(store, dot.dot, "master")
    root = Path(os.fsdecode(place.path)) / "__default__"
    (root / "a").write_bytes(b"1")
    workshop.commit(dot, "a")
    branches.create_branch(store, dot, "other", "HEAD~1")
    branches.checkout(store, dot, "other")
    other = Path(os.fsdecode(trees.require_place(store, dot.dot, "other").path)) / "__default__"
    (other / "b").write_bytes(b"2")
    workshop.commit(dot, "b")
    branches.create_branch(store, dot, "third", "other")
    with store.transaction("test") as tx:
        tx.append(HeadSwitched(dot.dot, "third"))
    summary = lifecycle.merge_revision(store, dot, MergeOptions("master"))
    assert summary.outcome == "merged"
    assert trees.place_of(store, dot.dot, "third") is None


def test_conflicts_of_a_branch_without_a_tree_make_one(workshop):
    store: Store = workshop.store
    dot = dots.init_dot(store, "bare", at=None, as_root=False)
    workshop.commit(dot, "base")
    for branch in ("other", "third"):
        branches.create_branch(store, dot, branch, "master")
        branches.checkout(store, dot, branch)
        place = trees.require_place(store, dot.dot, branch)
        (Path(os.fsdecode(place.path)) / "__default__" / "f").write_bytes(branch.encode())
        workshop.commit(dot, branch)
    branches.create_branch(store, dot, "fourth", "third")
    with store.transaction("test") as tx:
        tx.append(HeadSwitched(dot.dot, "fourth"))
    assert lifecycle.merge_revision(store, dot, MergeOptions("other")).outcome == "conflicts"
    place = trees.require_place(store, dot.dot, "fourth")
    assert (Path(os.fsdecode(place.path)) / "__default__" / "f~theirs").read_bytes() == b"other"
    resolve_conflicts(store, dot, None, "theirs")
    lifecycle.continue_merge(store, dot)
    assert sorted(os.listdir(os.path.join(place.path, b"__default__"))) == [b"f"]


# --- drivers ------------------------------------------------------------------------------------


def with_driver(workshop: Workshop, command: str) -> None:
    workshop.settings = workshop.settings.__class__(
        author="Ada <ada@example.org>",
        merge_drivers=(DriverCommand("join", command, ("*.list",)),),
    )
    workshop.reopen()


def lists(workshop: Workshop, tmp_path: Path) -> Branches:
    dot = Branches(workshop, tmp_path / "tree", {"x.list": b"\0base"})
    dot.on("other", {"x.list": b"\0theirs"})
    dot.on("master", {"x.list": b"\0ours"})
    return dot


def test_a_command_of_the_settings_merges(workshop, tmp_path):
    with_driver(
        workshop, 'cat "$DM_BASE" "$DM_OURS" "$DM_THEIRS" > "$DM_RESULT"; echo "$DM_PATH" >&2'
    )
    dot = lists(workshop, tmp_path)
    assert dot.merge().outcome == "merged"
    assert dot.files() == {"x.list": b"\0base\0ours\0theirs"}


def test_a_commands_conflict_lays_its_result_beside(workshop, tmp_path):
    with_driver(workshop, 'echo half > "$DM_RESULT"; exit 1')
    dot = lists(workshop, tmp_path)
    assert dot.merge().outcome == "conflicts"
    assert dot.files()["x.list"] == b"\0ours"
    assert dot.files()["x.list~merged"] == b"half\n"
    resolve_conflicts(workshop.store, dot.dot, None, "as-is")
    assert dot.files() == {"x.list": b"\0ours"}


@pytest.mark.parametrize("command", ["exit 3", "true", "kill -9 $$"])
def test_a_command_that_fails_stops_the_merge(workshop, tmp_path, command):
    with_driver(workshop, command)
    dot = lists(workshop, tmp_path)
    tip = dot.tip()
    with pytest.raises(DriverFailed):
        dot.merge()
    assert (dot.tip(), dot.files()) == (tip, {"x.list": b"\0ours"})
    assert workshop.store.catalog.merge(dot.dot.dot, "master") is None


def test_texts_merge_by_hunks(made):
    text = b"".join(b"line %d\n" % number for number in range(40))
    dot = made({"t": text})
    dot.on("other", {"t": text.replace(b"line 30\n", b"theirs\n")})
    dot.on("master", {"t": b"first\n" + text})
    assert dot.merge().outcome == "merged"
    assert dot.files()["t"] == b"first\n" + text.replace(b"line 30\n", b"theirs\n")


def test_overlapping_texts_conflict_with_a_marked_version_beside(made):
    dot = made({"t": b"one\ntwo\nthree\n"})
    dot.on("other", {"t": b"one\nTHEIRS\nthree\n"})
    dot.on("master", {"t": b"one\nOURS\nthree\n"})
    summary = dot.merge()
    assert summary.conflicts[0].reason == "1 part of the text changed on both sides"
    assert dot.files()["t"] == b"one\nOURS\nthree\n"
    assert dot.files()["t~merged"] == (
        b"one\n<<<<<<< ours\nOURS\n||||||| base\ntwo\n=======\nTHEIRS\n>>>>>>> theirs\nthree\n"
    )
