"""Going back to an earlier operation, looking at the store as it was, and telling what was done."""

import os
from pathlib import Path

import pytest

from dmsync.engine import branches, dots, history, operations, remotes, trees
from dmsync.engine.past import PastStore
from dmsync.engine.undoing import lifecycle
from dmsync.engine.undoing.going_back import go_back
from dmsync.engine.undoing.lifecycle import UndoRequest
from dmsync.errors import CannotUndo, NotFound, NothingToDo, UsageError
from tests.support.tree import describe_tree
from tests.support.working_store import Workshop


def last_seq(shop: Workshop) -> int:
    return shop.store.catalog.last_seq()


def undo(shop: Workshop) -> None:
    list(lifecycle.undo(shop.store, 1, UndoRequest()))


def test_refs_heads_names_and_the_tree_are_as_they_were(shop, dot, data, tmp_path):
    (data / "a").write_text("one")
    first = shop.commit(dot, "first").commit
    as_it_was = describe_tree(data)
    seq = last_seq(shop)
    (data / "a").write_text("two!")
    shop.commit(dot, "second")
    shop.checkout(dot, "topic", create=True)
    (data / "a").write_text("uncommitted")
    dots.rename_dot(shop.store, "shop", "market")
    shop.attach("later", tmp_path / "later")
    before = describe_tree(data)
    done = go_back(shop.store, seq)
    catalog = shop.store.catalog
    assert describe_tree(data) == as_it_was
    assert catalog.branch(dot.dot, "master").target == first
    assert catalog.branch(dot.dot, "topic") is None and catalog.head(dot.dot) == "master"
    assert [row.name for row in catalog.dots()] == ["shop"]
    assert catalog.current_dot() == dot.dot
    assert len(done.stashes) == 1 and not shop.changes(dot)
    assert "branch/master" in " ".join(done.facts)
    undo(shop)
    assert describe_tree(data) == before and catalog.head(dot.dot) == "topic"
    assert sorted(row.name for row in catalog.dots()) == ["later", "market"]


def test_a_deleted_dot_and_swapped_names_come_back(shop, tmp_path):
    one = shop.attach("one", tmp_path / "1")
    two = shop.attach("two", tmp_path / "2")
    gone = dots.init_dot(shop.store, "gone", at=None, as_root=False)
    seq = last_seq(shop)
    for old, new in (("one", "three"), ("two", "one"), ("three", "two")):
        dots.rename_dot(shop.store, old, new)
    dots.delete_dot(shop.store, "gone")
    go_back(shop.store, seq)
    catalog = shop.store.catalog
    assert {row.name: row.dot for row in catalog.dots()} == {
        "one": one.dot, "two": two.dot, "gone": gone.dot,
    }  # fmt: skip
    assert os.path.isdir(shop.store.layout.tree_dir(gone.dot, "master"))
    assert os.listdir(shop.store.layout.trash_dir) == []


def test_managed_trees_follow_and_what_they_held_is_stored(shop):
    dot = dots.init_dot(shop.store, "apps", at=None, as_root=False)
    file = Path(os.fsdecode(trees.require_place(shop.store, dot.dot, "master").path))
    file /= "__default__/a"
    file.write_text("one")
    shop.commit(dot, "first")
    seq = last_seq(shop)
    file.write_text("two!")
    shop.commit(dot, "second")
    shop.checkout(dot, "topic", create=True)
    other = Path(os.fsdecode(trees.require_place(shop.store, dot.dot, "topic").path))
    (other / "__default__/a").write_text("uncommitted")
    done = go_back(shop.store, seq)
    assert file.read_text() == "one" and not other.exists() and len(done.stashes) == 1
    undo(shop)
    assert file.read_text() == "two!"
    assert (other / "__default__/a").read_text() == "uncommitted"


def redo(shop: Workshop) -> None:
    list(lifecycle.redo(shop.store, 1, UndoRequest()))


def test_the_current_branch_becomes_unborn_again_with_redo(shop, dot, data):
    seq = last_seq(shop)
    (data / "a").write_text("one")
    first = shop.commit(dot, "first").commit
    go_back(shop.store, seq)
    undo(shop)
    assert shop.store.catalog.branch(dot.dot, "master").target == first
    redo(shop)
    assert shop.store.catalog.branch(dot.dot, "master") is None
    assert shop.store.catalog.head(dot.dot) == "master" and (data / "a").read_text() == "one"


def test_redo_does_not_take_away_a_branch_that_is_current_now(shop, dot, data):
    shop.commit(dot, "first")
    seq = last_seq(shop)
    branches.create_branch(shop.store, dot, "topic", None)
    go_back(shop.store, seq)
    undo(shop)
    shop.checkout(dot, "topic")
    with pytest.raises(CannotUndo, match="topic is the current branch"):
        redo(shop)
    assert shop.store.catalog.branch(dot.dot, "topic") is not None


def test_a_dot_that_came_back_keeps_its_trees_through_undo_and_redo(shop):
    dot = dots.init_dot(shop.store, "apps", at=None, as_root=False)
    shop.commit(dot, "first")
    seq = last_seq(shop)
    shop.checkout(dot, "topic", create=True)
    file = Path(os.fsdecode(trees.require_place(shop.store, dot.dot, "topic").path))
    file /= "__default__/a"
    file.write_text("uncommitted")
    dots.delete_dot(shop.store, "apps")
    go_back(shop.store, seq)
    assert shop.store.catalog.head(dot.dot) == "master"
    undo(shop)
    redo(shop)
    assert shop.store.catalog.branch(dot.dot, "topic") is None
    undo(shop)
    undo(shop)
    assert shop.store.catalog.head(dot.dot) == "topic" and file.read_text() == "uncommitted"


def test_a_dot_is_deleted_again_under_the_name_that_it_had(shop, tmp_path):
    shop.attach("web", tmp_path / "web")
    seq = last_seq(shop)
    dots.rename_dot(shop.store, "web", "renamed")
    dots.delete_dot(shop.store, "renamed")
    go_back(shop.store, seq)
    assert [row.name for row in shop.store.catalog.dots()] == ["web"]
    undo(shop)
    undo(shop)
    assert [row.name for row in shop.store.catalog.dots()] == ["renamed"]
    redo(shop)
    redo(shop)
    assert [row.name for row in shop.store.catalog.dots()] == ["web"]


def test_the_name_a_dot_was_deleted_with_may_be_taken(shop, tmp_path):
    one = shop.attach("one", tmp_path / "1")
    two = shop.attach("two", tmp_path / "2")
    names = {"one": one.dot, "two": two.dot}
    seq = last_seq(shop)
    dots.rename_dot(shop.store, "two", "other")
    dots.rename_dot(shop.store, "one", "two")
    dots.delete_dot(shop.store, "two")
    dots.rename_dot(shop.store, "other", "two")
    go_back(shop.store, seq)
    assert {row.name: row.dot for row in shop.store.catalog.dots()} == names
    undo(shop)
    assert {row.name: row.dot for row in shop.store.catalog.dots()} == {"two": two.dot}
    for _ in range(2):
        undo(shop)
    assert {row.name: row.dot for row in shop.store.catalog.dots()} == {
        "two": one.dot, "other": two.dot,
    }  # fmt: skip


def test_going_back_to_now_is_nothing_to_do_and_a_dry_run_changes_nothing(shop, dot, data):
    (data / "a").write_text("one")
    shop.commit(dot, "first")
    seq = last_seq(shop)
    shop.commit(dot, "second")
    with pytest.raises(NothingToDo):
        go_back(shop.store, last_seq(shop))
    before = last_seq(shop)
    would = go_back(shop.store, seq, dry_run=True)
    assert any(fact.startswith("branch/master") for fact in would.facts)
    assert last_seq(shop) == before
    with pytest.raises(NotFound):
        go_back(shop.store, before + 1)


def test_the_past_is_shown_and_takes_no_change(shop, dot, data):
    (data / "a").write_text("one")
    first = shop.commit(dot, "first").commit
    seq = last_seq(shop)
    (data / "a").write_text("two!")
    shop.commit(dot, "second")
    branches.create_branch(shop.store, dot, "topic", None)
    dots.delete_dot(shop.store, "shop")
    with PastStore(shop.store.home, shop.settings, seq) as past:
        (row,) = past.catalog.dots()
        assert [info.id for info in history.log_commits(past, row)] == [first]
        assert past.root(row.dot, first).tree is not None
        assert trees.status(past, row.dot).materialised is False
        with pytest.raises(UsageError, match="past"):
            branches.create_branch(past, row, "new", None)
        with pytest.raises(UsageError, match="past"):
            branches.reset(past, row, "HEAD", hard=True)
    assert shop.store.catalog.dots() == []
    assert not os.path.exists(shop.store.layout.dot_dir(dot.dot))
    with pytest.raises(NotFound):
        PastStore(shop.store.home, shop.settings, 10**9)


def test_an_operation_is_looked_at_as_a_whole_by_any_of_its_events(shop, dot):
    """The operation log names it by its first event: that must not show it half done."""
    created = shop.store.catalog.operations(1)[0]
    assert created.last_seq > created.first_seq
    for seq in range(created.first_seq, created.last_seq + 1):
        with PastStore(shop.store.home, shop.settings, seq) as past:
            assert past.catalog.current_dot() == dot.dot
    with PastStore(shop.store.home, shop.settings, created.first_seq - 1) as past:
        assert past.catalog.dots() == []


def test_operations_are_told_in_words(shop, dot, data):
    (data / "a").write_text("one")
    commit = shop.commit(dot, "first").commit
    remotes.add_remote(shop.store, "r", "ssh://h")
    undo(shop)
    undone, added, made = operations.operation_log(shop.store, 3)
    assert made.facts[-1] == f"branch/master - -> {commit.hex()[:12]} (commit)"
    assert added.facts == ("remote r added: ssh://h",) and added.taken_back is not None
    assert undone.reverses == added.row.first_seq and not undone.is_redo
    info, operation = operations.operation_info(shop.store, made.row.last_seq)
    assert info.row == made.row and len(operation.events) == 2
    with pytest.raises(NotFound):
        operations.operation_info(shop.store, 10**6)


def test_the_reflog_of_a_deleted_branch_is_told(shop, dot, data):
    (data / "a").write_text("one")
    shop.commit(dot, "first")
    branches.create_branch(shop.store, dot, "topic", None)
    branches.delete_branch(shop.store, dot, "topic")
    full, changes = operations.ref_history(shop.store, dot, "topic")
    assert full == "branch/topic" and [row.kind for row in changes] == ["delete", "create"]
    assert operations.ref_history(shop.store, dot, None)[0] == "branch/master"
    with pytest.raises(NotFound):
        operations.ref_history(shop.store, dot, "never")
