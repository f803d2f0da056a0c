"""The log in a real store: filters, paths, what was left out, and hollow commits."""

from pathlib import Path

import pytest

from dmsync.core.events import DotScopeSet
from dmsync.core.ids import ObjectId
from dmsync.engine.blame import blame
from dmsync.engine.branches import BranchFilter, list_branches
from dmsync.engine.commit_info import CommitReader
from dmsync.engine.log import CommitLog, LogQuery, changes_of, find_commits
from dmsync.engine.path_history import PathSet, tree_path
from dmsync.errors import ContentAbsent, PathNotFound, RevisionNotFound, UsageError
from dmsync.storage.catalog import DotRow
from tests.support.recorded_histories import Planned, point, record, thin
from tests.support.working_store import Workshop

BOB = "Bob <bob@example.org>"
# 0 - 1 - 3 - 5      topic is 4
#   \ 2 /   \
#            4
PLAN = [
    Planned((), {b"s/a": b"0", b"s/d/b": b"0"}, "zero", time_s=100),
    Planned((0,), {b"s/a": b"1", b"s/d/b": b"0"}, "one", time_s=200, metadata=(("k", "v"),)),
    Planned((0,), {b"s/a": b"0", b"s/d/b": b"2"}, "two", BOB, time_s=150, directory_time_ns=9),
    Planned((1, 2), {b"s/a": b"1", b"s/d/b": b"2"}, "three", time_s=300),
    Planned((3,), {b"s/a": b"1", b"s/d/b": b"2", b"s/n": b"4"}, "four", BOB, time_s=400),
    Planned(
        (3,), {b"s/a": b"1", b"s/d/b": b"2"}, "five", time_s=500,
        metadata=(("k", "w"), ("z", "")), directory_time_ns=1,
    ),
]  # fmt: skip


@pytest.fixture
def dot(shop: Workshop, tmp_path: Path) -> DotRow:
    return shop.attach("shop", tmp_path / "data")


@pytest.fixture
def ids(shop: Workshop, dot: DotRow) -> list[ObjectId]:
    made = record(shop.store, dot, PLAN)
    point(shop.store, dot, "branch/master", made[5])
    point(shop.store, dot, "branch/topic", made[4])
    return made


class Asker:
    def __init__(self, shop: Workshop, dot: DotRow, ids: list[ObjectId]) -> None:
        self.shop, self.dot, self.ids = shop, dot, ids

    def log(self, *revisions: str, **wishes: object) -> CommitLog:
        query = LogQuery(revisions=revisions, **wishes)  # type: ignore[arg-type]
        return find_commits(self.shop.store, self.dot, query)

    def numbers(self, *revisions: str, **wishes: object) -> list[int]:
        return sorted(self.ids.index(c.id) for c in self.log(*revisions, **wishes).commits)

    def blame(
        self, *paths: bytes, revision: str = "HEAD", recursive: bool = False
    ) -> dict[bytes, int]:
        found = blame(self.shop.store, self.dot, revision, paths or (b"",), recursive=recursive)
        return {b.path: self.ids.index(b.commit.id) * (-1 if b.is_boundary else 1) for b in found}


@pytest.fixture
def ask(shop: Workshop, dot: DotRow, ids: list[ObjectId]) -> Asker:
    return Asker(shop, dot, ids)


def test_revisions_and_ranges_add_up(ask: Asker) -> None:
    assert ask.numbers() == ask.numbers("master") == [0, 1, 2, 3, 5]
    assert ask.numbers("master", "topic") == [0, 1, 2, 3, 4, 5]
    assert ask.numbers("topic..master") == ask.numbers("master", "^topic") == [5]
    assert ask.numbers("topic...master") == [4, 5]
    assert ask.numbers("^HEAD~1") == [5]
    assert ask.numbers("topic", "^HEAD~1", "HEAD~2..HEAD") == [4, 5]
    assert ask.numbers("HEAD..HEAD") == []


def test_filters_combine(ask: Asker) -> None:
    both = ("master", "topic")
    assert ask.numbers(*both, author="Bob") == [2, 4]
    assert ask.numbers(*both, author="Bob", message="o") == [2, 4]
    assert ask.numbers(*both, author="Bob", message="ou") == [4]
    assert ask.numbers(*both, since_ns=200 * 10**9, until_ns=400 * 10**9) == [1, 3, 4]
    assert ask.numbers(metadata=(("k", None),)) == [1, 5]
    assert ask.numbers(metadata=(("k", "w"),)) == [5]
    assert ask.numbers(metadata=(("k", None), ("z", ""))) == [5]
    assert ask.numbers(metadata=(("k", ""),)) == []
    assert ask.numbers(merges=True) == [3] and ask.numbers(merges=False) == [0, 1, 2, 5]
    assert ask.numbers(first_parent=True) == [0, 1, 3, 5]
    assert ask.numbers(newest=2) == [3, 5] and ask.numbers(newest=0) == []
    assert ask.numbers(author="Ada", newest=2, merges=False, first_parent=True) == [1, 5]


def test_paths_list_what_changed_them(ask: Asker) -> None:
    assert ask.numbers(paths=(b"s/a",)) == [0, 1]
    assert ask.numbers(paths=(b"s/d",)) == ask.numbers(paths=(b"s/d/b",)) == [0, 2]
    assert ask.numbers("topic", paths=(b"s/n",)) == [4]
    assert ask.numbers(paths=(b"s/n",)) == []
    assert ask.numbers(paths=(b"s/a", b"s/d/b")) == [0, 1, 2, 3]  # the merge differs from both
    assert ask.numbers(paths=(b"s/a/below", b"s/d/b/below")) == []
    assert ask.numbers(paths=(b"s/d",), first_parent=True) == [0, 3]
    assert ask.numbers("HEAD", paths=(b"s/a",), newest=1) == [1]


def test_a_directorys_time_alone_is_no_change(ask: Asker) -> None:
    assert 5 not in ask.numbers(paths=(b"s",))
    assert 5 not in ask.numbers(paths=(b"",))


def test_lines_lead_past_what_is_left_out(ask: Asker) -> None:
    ids = ask.ids
    assert ask.log().lines[ids[3]] == (ids[1], ids[2])
    found = ask.log("master", "topic", author="Ada")
    assert found.lines[ids[3]] == (ids[1], ids[0])
    assert ask.log(merges=True).lines == {ids[3]: ()}
    assert ask.log(paths=(b"s/a",)).lines == {ids[1]: (ids[0],), ids[0]: ()}


def test_hollow_commits_are_listed_when_nothing_is_known(
    ask: Asker, shop: Workshop, dot: DotRow, ids: list[ObjectId]
) -> None:
    thin(shop.store, dot, ids[0], ids[2])
    found = ask.log(paths=(b"s/a",))
    assert {ids.index(c.id) for c in found.commits} == {0, 1}
    assert found.unknown_count > 0
    assert [c.is_hollow for c in ask.log().commits].count(True) == 2
    assert ask.log().unknown_count == 0


def test_hollow_commits_of_equal_trees_are_known_to_be_equal(shop: Workshop, dot: DotRow) -> None:
    same = {b"s/a": b"1"}
    plan = [Planned((), same), Planned((0,), same), Planned((1,), same)]
    ids = record(shop.store, dot, plan)
    point(shop.store, dot, "branch/master", ids[2])
    thin(shop.store, dot, *ids[:2])
    found = find_commits(shop.store, dot, LogQuery(paths=(b"s/a",)))
    assert [c.id for c in found.commits] == [ids[0]]


def test_changes_for_the_stat(ask: Asker, shop: Workshop, dot: DotRow, ids: list[ObjectId]) -> None:
    def paths(number: int, *wanted: bytes) -> list[bytes] | None:
        info = CommitReader(shop.store, dot.dot).info(ids[number])
        found = changes_of(shop.store, dot.dot, info, PathSet(wanted))
        return None if found is None else [change.path for change in found]

    assert paths(4, b"") == [b"s/n"] and paths(4, b"s/d") == []
    assert paths(0, b"s/d") == [b"s/d", b"s/d/b"]
    assert paths(3, b"") == [b"s/d/b"]


def test_blame_names_the_last_change_of_each_path(ask: Asker) -> None:
    assert ask.blame() == {b"s": 3}
    assert ask.blame(b"s") == {b"s/a": 1, b"s/d": 2}
    assert ask.blame(b"s", b"s/a", recursive=True) == {b"s/a": 1, b"s/d/b": 2}
    assert ask.blame(b"s/a", revision="topic~1^2") == {b"s/a": 0}
    assert ask.blame(b"s", revision="topic") == {b"s/a": 1, b"s/d": 2, b"s/n": 4}
    for bad in (b"absent", b"s/a/below"):
        with pytest.raises(PathNotFound):
            ask.blame(bad)
    with pytest.raises(RevisionNotFound):
        ask.blame(revision="nope")


def test_blame_stops_at_hollow_commits(
    ask: Asker, shop: Workshop, dot: DotRow, ids: list[ObjectId]
) -> None:
    thin(shop.store, dot, ids[0], ids[1], ids[2])
    assert ask.blame(b"s") == {b"s/a": -3, b"s/d": -3}
    with pytest.raises(ContentAbsent):
        ask.blame(revision="HEAD~2")


def test_blame_of_an_empty_dot(shop: Workshop, dot: DotRow) -> None:
    (oid,) = record(shop.store, dot, [Planned()])
    point(shop.store, dot, "branch/master", oid)
    assert blame(shop.store, dot) == []


@pytest.mark.parametrize(
    ("text", "path"),
    [(b".", b""), (b"/", b""), (b"", b""), (b"/s/a/", b"s/a"), (b"s/\xff", b"s/\xff")],
)
def test_tree_paths(text: bytes, path: bytes) -> None:
    assert tree_path(text) == path


@pytest.mark.parametrize("text", [b"..", b"../x", b"s/../a", b"s/./a", b"s//a", b"s/.."])
def test_bad_tree_paths(text: bytes) -> None:
    with pytest.raises(UsageError):
        tree_path(text)


def test_path_sets() -> None:
    paths = PathSet([b"a/b", b"a/b/c", b"d"])
    assert set(paths) == {b"a/b", b"a/b/c", b"d"}
    assert [paths.covers(p) for p in (b"a", b"a/b", b"a/b/x", b"a/bb", b"d/e/f", b"")] == [
        False, True, True, False, True, False,
    ]  # fmt: skip
    paths.remove(b"a/b")
    assert set(paths) == {b"a/b/c", b"d"}
    paths.remove(b"a/b/c")
    assert set(paths) == {b"d"} and set(paths.below) == {b"d"}
    paths.remove(b"d")
    assert not paths and PathSet([b""]) and PathSet([b""]).covers(b"x/y")


def test_branches_by_what_they_hold(
    ask: Asker, shop: Workshop, dot: DotRow, ids: list[ObjectId]
) -> None:
    point(shop.store, dot, "branch/old", ids[1])
    (lone,) = record(shop.store, dot, [Planned((), message="unrelated")])
    point(shop.store, dot, "branch/lone", lone)

    def names(**wanted: str) -> list[str]:
        return [b.name for b in list_branches(shop.store, dot, BranchFilter(**wanted))]

    assert names(contains=ids[1].hex()) == ["master", "old", "topic"]
    assert names(contains="HEAD") == ["master"]
    assert names(lacks=ids[1].hex()) == ["lone"]
    assert names(merged_into="HEAD") == ["master", "old"]
    assert names(not_merged_into="topic") == ["lone", "master"]
    assert names(contains=ids[0].hex(), not_merged_into="HEAD") == ["topic"]
    assert names(contains="lone", lacks="lone") == []
    with pytest.raises(RevisionNotFound):
        names(contains="nope")


def test_branches_are_counted_only_when_asked(
    ask: Asker, shop: Workshop, dot: DotRow, ids: list[ObjectId]
) -> None:
    point(shop.store, dot, "branch/old", ids[1])
    assert {b.commits for b in list_branches(shop.store, dot)} == {None}
    counted = {b.name: b.commits for b in list_branches(shop.store, dot, count=True)}
    assert counted == {"master": 5, "old": 2, "topic": 5}


def test_an_unborn_branch_passes_no_filter(shop: Workshop, dot: DotRow) -> None:
    (lone,) = record(shop.store, dot, [Planned()])
    point(shop.store, dot, "branch/lone", lone)
    assert [(b.name, b.commits) for b in list_branches(shop.store, dot, count=True)] == [
        ("lone", 1), ("master", 0),
    ]  # fmt: skip
    found = list_branches(shop.store, dot, BranchFilter(not_merged_into="lone"))
    assert found == [] and find_commits(shop.store, dot, LogQuery()).commits == []


def test_content_outside_a_partial_clone_is_not_known(
    shop: Workshop, dot: DotRow, ids: list[ObjectId]
) -> None:
    """Pages that a partial clone left out: the commits are listed, nothing fails."""
    from dmsync.core.ids import Kind
    from dmsync.core.objects import ROOT_ENTRY, Commit, Entry, EntryKind
    from dmsync.core.pages import write_directory
    from tests.support.recorded_histories import add_commits

    made: list[ObjectId] = []
    with shop.store.objects(dot.dot).writer() as writer:
        for number in (1, 2):
            absent = ObjectId(bytes([number]) * 32)
            tree = write_directory(writer, [Entry(b"s", EntryKind.DIRECTORY, 0o755, tree=absent)])
            root = Entry(b"", EntryKind.DIRECTORY, ROOT_ENTRY.mode, tree=tree)
            commit = Commit(root, tuple(made[-1:]), "a", "a", number, 0, f"{number}")
            made.append(writer.put(Kind.COMMIT, commit.to_bytes()))
        writer.seal()
    add_commits(shop.store, dot, made)
    with shop.store.transaction("test") as tx:
        tx.append(DotScopeSet(dot.dot, ("t",)))
    query = LogQuery(revisions=(made[1].hex(),), paths=(b"s/x",))
    found = find_commits(shop.store, dot, query)
    assert len(found.commits) == 2 and found.unknown_count
    assert (
        find_commits(shop.store, dot, LogQuery(revisions=(made[1].hex(),), paths=(b"t",))).commits
        == []
    )


def test_a_directory_of_many_pages(shop: Workshop, dot: DotRow) -> None:
    many = {b"s/%04d" % number: b"%d" % number for number in range(700)}
    plan = [
        Planned((), {b"s/0001": b"1"}, "few"),
        Planned((0,), many, "many"),
        Planned((1,), {**many, b"s/0333": b"new"}, "one of many"),
        Planned((2,), {**many, b"s/0333": b"new", b"t": b"1"}, "elsewhere"),
    ]
    ids = record(shop.store, dot, plan)
    point(shop.store, dot, "branch/master", ids[3])
    ask = Asker(shop, dot, ids)
    assert ask.numbers(paths=(b"s/0333",)) == [1, 2]
    assert ask.numbers(paths=(b"s/0001",)) == [0]
    assert ask.numbers(paths=(b"s",)) == [0, 1, 2]
    blamed = ask.blame(recursive=True)
    assert len(blamed) == 701 and set(blamed.values()) == {0, 1, 2, 3}
    assert (blamed[b"s/0001"], blamed[b"s/0333"], blamed[b"s/0002"], blamed[b"t"]) == (0, 2, 1, 3)


def test_newest_is_by_date_but_never_before_its_children(
    shop: Workshop, dot: DotRow, tmp_path: Path
) -> None:
    """A late commit on an old base is new; a commit dated before its parent follows it all the same."""
    files = {b"s/a": b"0"}
    plan = [
        Planned((), files, "base", time_s=100),
        Planned((0,), files, "m1", time_s=200),
        Planned((1,), files, "m2", time_s=300),
        Planned((0,), files, "late", time_s=400),
        Planned((2,), files, "clock set back", time_s=50),
        Planned((4, 3), files, "merge", time_s=9_000_000_000),
        Planned((5,), files, "after the end of time", time_s=500),
    ]
    found = record(shop.store, dot, plan)
    point(shop.store, dot, "branch/master", found[-1])
    told = shop.messages(dot)
    assert told == ["base", "m1", "m2", "clock set back", "late", "merge", "after the end of time"]
    newest = find_commits(shop.store, dot, LogQuery(newest=3)).commits
    assert [info.message for info in newest] == told[-1:-4:-1]
