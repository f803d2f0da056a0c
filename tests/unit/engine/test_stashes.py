"""Stashes: put away, listed, brought back, merged in, dropped; attached and managed trees."""

import os
from pathlib import Path

import pytest

from dmsync.engine import branches, dots, history, stashes, switching, trees
from dmsync.engine.stashes import StashSummary, TreeWishes
from dmsync.errors import (
    AlreadyExists,
    InvalidName,
    MergeConflict,
    NotFound,
    NothingToDo,
    RevisionNotFound,
    WouldLose,
)
from dmsync.storage.catalog import DotRow
from tests.support.live_tree import as_nobody
from tests.support.tree import describe_tree
from tests.support.working_store import Workshop


@pytest.fixture
def dot(shop: Workshop, data: Path) -> DotRow:
    dot = shop.attach("shop", data)
    (data / "a").write_text("one\n")
    (data / "b").write_text("one\n")
    shop.commit(dot, "first")
    return dot


def push(shop: Workshop, dot: DotRow, message: str = "") -> StashSummary:
    return stashes.push_stash(shop.store, dot, message, TreeWishes())


def bring(
    shop: Workshop, dot: DotRow, text: str | None = None, *, drop: bool = True
) -> StashSummary:
    return stashes.apply_stash(shop.store, dot, text, TreeWishes(), drop=drop)


def names(shop: Workshop, dot: DotRow) -> list[str]:
    return [stash.name for stash in stashes.list_stashes(shop.store, dot.dot)]


def events(shop: Workshop, count: int) -> list[list[str]]:
    """Event types of the last operations, oldest first."""
    rows = shop.store.catalog.operations(count)
    return [
        [type(event).__name__ for event in shop.store.catalog.events_of(row).events]
        for row in reversed(rows)
    ]


def test_push_and_pop_bring_back_exactly_the_same_tree(
    shop: Workshop, dot: DotRow, data: Path
) -> None:
    committed = describe_tree(data)
    (data / "a").write_text("two\n")
    (data / "b").unlink()
    (data / "d").mkdir()
    (data / "d" / "new").write_text("new")
    os.link(data / "d" / "new", data / "link")
    os.setxattr(data / "a", "user.x", b"y")
    changed = describe_tree(data)
    summary = push(shop, dot, "half done\nmore")
    assert summary.name.startswith("stash/master-")
    assert describe_tree(data) == committed
    (stash,) = stashes.list_stashes(shop.store, dot.dot)
    assert (stash.number, stash.branch, stash.message) == (0, "master", "half done\nmore")
    assert shop.messages(dot) == ["first"]
    popped = bring(shop, dot)
    assert popped.is_dropped and not popped.conflicts
    assert describe_tree(data) == changed
    assert names(shop, dot) == []
    assert shop.store.catalog.switches(dot.dot) == []
    assert events(shop, 4) == [
        ["CommitsAdded", "RefChanged", "TreeSwitchStarted"],
        ["TreeSwitchFinished"],
        ["RefChanged", "TreeSwitchStarted"],
        ["TreeSwitchFinished"],
    ]


def test_nothing_to_stash(shop: Workshop, dot: DotRow, data: Path) -> None:
    with pytest.raises(NothingToDo, match="no local changes"):
        push(shop, dot)
    assert names(shop, dot) == []
    with pytest.raises(RevisionNotFound, match="no stashes"):
        bring(shop, dot)


def test_an_unborn_branch_has_nothing_to_go_back_to(shop: Workshop, tmp_path: Path) -> None:
    dot = shop.attach("new", tmp_path / "new")
    (tmp_path / "new" / "a").write_text("one")
    with pytest.raises(NotFound, match="no commits yet"):
        push(shop, dot)
    assert (tmp_path / "new" / "a").read_text() == "one"


def test_stashes_of_all_commands_are_listed_newest_first_and_found_by_any_name(
    shop: Workshop, dot: DotRow, data: Path
) -> None:
    (data / "a").write_text("two\n")
    first = push(shop, dot).name
    (data / "a").write_text("three\n")
    reset = shop.reset(dot, "HEAD", hard=True).stash
    assert reset is not None
    (data / "b").write_text("four\n")
    last = push(shop, dot).name
    assert names(shop, dot) == [last, reset, first]
    assert len(set(names(shop, dot))) == 3
    for text in ("1", "stash@{1}", reset, reset.removeprefix("stash/"), "01"):
        assert stashes.find_stash(shop.store, dot.dot, text).name == reset, text
    assert stashes.find_stash(shop.store, dot.dot, "0").name == last
    assert [s.branch for s in stashes.list_stashes(shop.store, dot.dot)] == ["master"] * 3
    for text in ("3", "-1", "", "x", "stash/", "\x1b[31m", "1" * 5000):
        with pytest.raises(RevisionNotFound):
            stashes.find_stash(shop.store, dot.dot, text)
    found, changes = stashes.stash_changes(shop.store, dot, "2")
    assert found.name == first
    assert [(c.kind, c.path) for c in changes] == [("*", b"__default__/a")]


def test_apply_keeps_and_drop_gives_up(shop: Workshop, dot: DotRow, data: Path) -> None:
    (data / "a").write_text("two\n")
    name = push(shop, dot).name
    assert not bring(shop, dot, drop=False).is_dropped
    assert (data / "a").read_text() == "two\n"
    assert names(shop, dot) == [name]
    stashes.drop_stash(shop.store, dot, "0", dry_run=True)
    assert names(shop, dot) == [name]
    assert stashes.drop_stash(shop.store, dot, "0").name == name
    assert names(shop, dot) == []
    assert (data / "a").read_text() == "two\n"


def test_a_dirty_tree_is_refused(shop: Workshop, dot: DotRow, data: Path) -> None:
    (data / "a").write_text("two\n")
    name = push(shop, dot).name
    (data / "b").write_text("uncommitted\n")
    with pytest.raises(WouldLose) as refused:
        bring(shop, dot)
    assert refused.value.exit_code == 18 and "dm stash" in refused.value.hint
    assert (data / "b").read_text() == "uncommitted\n" and names(shop, dot) == [name]
    shop.commit(dot, "second")  # the tip is another one: the merge refuses a dirty tree as well
    (data / "b").write_text("again\n")
    with pytest.raises(WouldLose):
        bring(shop, dot)
    assert (data / "b").read_text() == "again\n" and names(shop, dot) == [name]


def test_a_stash_is_merged_where_the_branch_moved_on(
    shop: Workshop, dot: DotRow, data: Path
) -> None:
    (data / "a").write_text("stashed\n")
    (data / "new").write_text("stashed\n")
    push(shop, dot)
    (data / "b").write_text("committed\n")
    shop.commit(dot, "second")
    summary = bring(shop, dot)
    assert summary.is_dropped and not summary.conflicts
    assert [(data / name).read_text() for name in ("a", "b", "new")] == [
        "stashed\n", "committed\n", "stashed\n"
    ]  # fmt: skip
    assert shop.changes(dot) == [("*", b"__default__/a"), ("+", b"__default__/new")]
    assert shop.messages(dot) == ["first", "second"]
    assert names(shop, dot) == []
    assert shop.store.catalog.merge(dot.dot, "master") is None


def test_conflicts_keep_the_stash(shop: Workshop, dot: DotRow, data: Path) -> None:
    (data / "a").write_text("stashed\n")
    name = push(shop, dot).name
    (data / "a").write_text("committed\n")
    shop.commit(dot, "second")
    summary = bring(shop, dot)
    assert not summary.is_dropped
    assert [conflict.path for conflict in summary.conflicts] == [b"__default__/a"]
    assert (data / "a").read_text() == "committed\n"
    assert names(shop, dot) == [name]
    with pytest.raises(MergeConflict, match="under way"):
        push(shop, dot)
    with pytest.raises(MergeConflict, match="under way"):
        bring(shop, dot)
    with pytest.raises(MergeConflict, match="under way"):
        stashes.branch_stash(shop.store, dot, "other", None, TreeWishes())


def test_a_branch_from_a_stash(shop: Workshop, dot: DotRow, data: Path) -> None:
    (data / "a").write_text("stashed\n")
    push(shop, dot, "work")
    (data / "a").write_text("committed\n")
    shop.commit(dot, "second")
    (data / "b").write_text("uncommitted\n")
    with pytest.raises(AlreadyExists):
        stashes.branch_stash(shop.store, dot, "master", None, TreeWishes())
    with pytest.raises(InvalidName):
        stashes.branch_stash(shop.store, dot, "no/name", None, TreeWishes())
    summary = stashes.branch_stash(shop.store, dot, "work", None, TreeWishes())
    assert summary.is_dropped and names(shop, dot) == []
    assert shop.store.catalog.head(dot.dot) == "work"
    assert shop.messages(dot) == ["first"]
    assert shop.changes(dot) == [("*", b"__default__/a")]
    assert (data / "a").read_text() == "stashed\n" and (data / "b").read_text() == "one\n"
    shop.commit(dot, "work done")
    shop.checkout(dot, "master")
    assert (data / "a").read_text() == "committed\n"
    assert (data / "b").read_text() == "uncommitted\n"


# --- managed trees --------------------------------------------------------------------------------


@pytest.fixture
def managed(shop: Workshop) -> DotRow:
    dot = dots.init_dot(shop.store, "managed", at=None, as_root=False)
    root = tree_of(shop, dot)
    (root / "db").mkdir()
    (root / "db" / "rows").write_text("one\n")
    (root / "__default__" / "a").write_text("one\n")
    shop.commit(dot, "first")
    return dot


def tree_of(shop: Workshop, dot: DotRow, branch: str = "master") -> Path:
    place = switching.make_place(shop.store, dot.dot, branch, None)
    return Path(os.fsdecode(place.path))


def test_managed_trees_are_stashed_with_all_subdots(shop: Workshop, managed: DotRow) -> None:
    root = tree_of(shop, managed)
    (root / "db" / "rows").write_text("two\n")
    (root / "logs").mkdir()
    (root / "logs" / "x").write_text("x\n")
    changed = describe_tree(root)
    push(shop, managed)
    assert (root / "db" / "rows").read_text() == "one\n" and not (root / "logs").exists()
    bring(shop, managed)
    assert describe_tree(root) == changed


def test_a_managed_branch_from_a_stash_survives_a_kill(
    shop: Workshop, managed: DotRow, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tree_of(shop, managed)
    (root / "db" / "rows").write_text("stashed\n")
    push(shop, managed)

    def killed(*arguments: object, **more: object) -> None:
        raise KeyboardInterrupt

    for cut in ("make_place", "complete_switch"):
        name = cut.replace("_", "-")
        if cut == "complete_switch":
            (root / "db" / "rows").write_text("stashed\n")
            shop.checkout(managed, "master")
            push(shop, managed)
        with monkeypatch.context() as patch:
            patch.setattr(switching, cut, killed)
            with pytest.raises(KeyboardInterrupt):
                stashes.branch_stash(shop.store, managed, name, None, TreeWishes())
        shop.reopen()
        with switching.ready(shop.store, managed.dot):
            pass
        made = tree_of(shop, managed, name)
        assert (made / "db" / "rows").read_text() == "stashed\n"
        assert shop.changes(managed) == [("*", b"db/rows")]
        assert (root / "db" / "rows").read_text() == "one\n"
        assert names(shop, managed) == []
        assert shop.store.catalog.switches(managed.dot) == []


def test_a_pop_cut_short_is_finished(
    shop: Workshop, dot: DotRow, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (data / "a").write_text("two\n")
    push(shop, dot)

    def killed(*arguments: object, **more: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(switching, "_restore", killed)
        with pytest.raises(KeyboardInterrupt):
            bring(shop, dot)
    shop.reopen()
    assert (data / "a").read_text() == "one\n"
    with switching.ready(shop.store, dot.dot):
        pass
    assert (data / "a").read_text() == "two\n"
    assert names(shop, dot) == []


def test_a_plain_user_stashes_and_pops(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    for parent in tmp_path.parents:
        if parent.stat().st_uid == os.getuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o711)

    def work() -> None:
        shop = Workshop(tmp_path / "theirs")
        data = tmp_path / "their-data"
        dot = shop.attach("shop", data)
        (data / "a").write_text("one\n")
        shop.commit(dot, "first")
        (data / "a").write_text("two\n")
        (data / "a").chmod(0o600)
        push(shop, dot)
        assert (data / "a").read_text() == "one\n"
        bring(shop, dot)
        assert (data / "a").read_text() == "two\n"
        assert (data / "a").stat().st_mode & 0o777 == 0o600
        shop.close()

    as_nobody(work)


def test_a_long_branch_name_still_names_a_stash(shop: Workshop, dot: DotRow, data: Path) -> None:
    branch = "x" * 64
    branches.checkout(shop.store, dot, branch, create=True)
    (data / "a").write_text("two\n")
    assert push(shop, dot).name.startswith("stash/xxx")
    assert trees.status(shop.store, dot.dot).changes == []
    assert history.resolve_revision(shop.store, dot, names(shop, dot)[0])
