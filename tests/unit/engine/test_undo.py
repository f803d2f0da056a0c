"""Undo and redo: what comes back, what is refused, what stays."""

import os
import shutil
import time
from pathlib import Path

import pytest

from dmsync.core.events import CommitsAdded, CommitsThinned, Operation, RefChanged, UpstreamSet
from dmsync.engine import branches, dots, remotes, switching, trees
from dmsync.engine.merging import lifecycle as merging
from dmsync.engine.merging import resolution
from dmsync.engine.store import Store
from dmsync.engine.undoing import lifecycle
from dmsync.engine.undoing.lifecycle import TakenBack, UndoRequest
from dmsync.errors import CannotUndo, NothingToDo, UsageError
from dmsync.storage.catalog import DotRow
from dmsync.storage.event_log import START, EventLog
from tests.support.tree import describe_tree
from tests.support.working_store import Workshop


def undo(shop: Workshop, count: int = 1) -> list[TakenBack]:
    return list(lifecycle.undo(shop.store, count, UndoRequest()))


def redo(shop: Workshop, count: int = 1) -> list[TakenBack]:
    return list(lifecycle.redo(shop.store, count, UndoRequest()))


def managed_tree(store: Store, dot: DotRow, branch: str) -> Path:
    place = trees.place_of(store, dot.dot, branch)
    assert place is not None
    return Path(os.fsdecode(place.path))


def last_operation(shop: Workshop) -> int:
    return shop.store.catalog.operations(1)[0].first_seq


def test_an_undone_commit_leaves_its_content_uncommitted(shop, dot, data):
    (data / "a").write_text("one")
    first = shop.commit(dot, "first").commit
    (data / "a").write_text("two!")
    second = shop.commit(dot, "second").commit
    before = describe_tree(data)
    (taken,) = undo(shop)
    assert (taken.command, taken.stashes) == ("commit", ())
    assert shop.store.catalog.branch(dot.dot, "master").target == first
    assert describe_tree(data) == before
    assert shop.changes(dot) == [("*", b"__default__/a")]
    redo(shop)
    assert shop.store.catalog.branch(dot.dot, "master").target == second
    assert shop.changes(dot) == []


def test_the_first_commit_undone_leaves_an_unborn_branch(shop, dot, data):
    (data / "a").write_text("one")
    shop.commit(dot, "first")
    undo(shop)
    assert shop.store.catalog.branch(dot.dot, "master") is None
    assert (data / "a").read_text() == "one"


def test_reset_hard_undone_brings_uncommitted_changes_back(shop, dot, data):
    (data / "a").write_text("one")
    shop.commit(dot, "first")
    (data / "a").write_text("two")
    second = shop.commit(dot, "second").commit
    (data / "a").write_text("precious")
    (data / "new").write_text("n")
    before = describe_tree(data)
    changes = shop.changes(dot)
    shop.reset(dot, "HEAD^", hard=True)
    after = describe_tree(data)
    undo(shop)
    assert describe_tree(data) == before and shop.changes(dot) == changes
    assert shop.store.catalog.branch(dot.dot, "master").target == second
    assert shop.store.catalog.refs(dot.dot, "stash/") == []
    redo(shop)
    assert describe_tree(data) == after
    assert len(shop.store.catalog.refs(dot.dot, "stash/")) == 1


def test_a_tree_changed_since_is_stored_and_comes_back_with_redo(shop, dot, data):
    (data / "a").write_text("one")
    shop.commit(dot, "first")
    (data / "a").write_text("two")
    shop.commit(dot, "second")
    shop.reset(dot, "HEAD^")
    (data / "later").write_text("written after the reset")
    later = describe_tree(data)
    (taken,) = undo(shop)
    (stash,) = taken.stashes
    assert stash.startswith("stash/undo-") and (data / "a").read_text() == "two"
    assert not (data / "later").exists() and shop.changes(dot) == []
    redo(shop)
    assert describe_tree(data) == later
    assert shop.store.catalog.ref(dot.dot, stash) is None


def test_checkout_undone_brings_branch_tree_and_both_snapshots_back(shop, dot, data):
    (data / "a").write_text("one")
    shop.commit(dot, "first")
    shop.checkout(dot, "topic", create=True)
    (data / "a").write_text("topic, uncommitted")
    shop.checkout(dot, "master")
    (data / "b").write_text("master, uncommitted")
    before = describe_tree(data)
    shop.checkout(dot, "topic")
    after = describe_tree(data)
    undo(shop)
    catalog = shop.store.catalog
    assert catalog.head(dot.dot) == "master" and describe_tree(data) == before
    assert [row.branch for row in catalog.working_snapshots(dot.dot)] == ["topic"]
    redo(shop)
    assert catalog.head(dot.dot) == "topic" and describe_tree(data) == after
    undo(shop, 3)
    assert catalog.head(dot.dot) == "master"
    assert [row.short_name for row in catalog.branches(dot.dot)] == ["master"]
    assert (data / "a").read_text() == "one" and catalog.working_snapshots(dot.dot) == []


def test_a_deleted_managed_branch_comes_back_with_its_uncommitted_tree(shop):
    dot = dots.init_dot(shop.store, "apps", at=None, as_root=False)
    (managed_tree(shop.store, dot, "master") / "__default__/a").write_text("one")
    shop.commit(dot, "first")
    shop.checkout(dot, "topic", create=True)
    tree = managed_tree(shop.store, dot, "topic")
    (tree / "__default__/a").write_text("uncommitted")
    before = describe_tree(tree)
    shop.checkout(dot, "master")
    branches.delete_branch(shop.store, dot, "topic")
    assert not tree.exists()
    undo(shop)
    assert describe_tree(tree) == before
    assert shop.store.catalog.refs(dot.dot, "stash/") == []
    redo(shop)
    assert not tree.exists()


def test_a_made_branch_undone_takes_its_managed_tree_along_and_redo_brings_it(shop):
    dot = dots.init_dot(shop.store, "apps", at=None, as_root=False)
    (managed_tree(shop.store, dot, "master") / "__default__/a").write_text("one")
    shop.commit(dot, "first")
    shop.checkout(dot, "topic", create=True)
    tree = managed_tree(shop.store, dot, "topic")
    (tree / "__default__/a").write_text("uncommitted")
    before = describe_tree(tree)
    (taken,) = undo(shop)
    assert shop.store.catalog.head(dot.dot) == "master" and not tree.exists()
    assert len(taken.stashes) == 1
    redo(shop)
    assert shop.store.catalog.head(dot.dot) == "topic" and describe_tree(tree) == before


def test_a_renamed_branch_takes_its_name_and_tree_back(shop):
    dot = dots.init_dot(shop.store, "apps", at=None, as_root=False)
    (managed_tree(shop.store, dot, "master") / "__default__/a").write_text("one")
    shop.commit(dot, "first")
    branches.rename_branch(shop.store, dot, "master", "main")
    (managed_tree(shop.store, dot, "main") / "__default__/a").write_text("two")
    undo(shop)
    tree = managed_tree(shop.store, dot, "master")
    assert (tree / "__default__/a").read_text() == "two"
    assert shop.store.catalog.head(dot.dot) == "master"
    assert os.listdir(tree.parent) == ["master"]


def test_a_deleted_dot_comes_back_whole(shop):
    dot = dots.init_dot(shop.store, "apps", at=None, as_root=False)
    tree = managed_tree(shop.store, dot, "master")
    (tree / "__default__/a").write_text("one")
    first = shop.commit(dot, "first").commit
    (tree / "__default__/a").write_text("uncommitted")
    before = describe_tree(tree)
    dots.delete_dot(shop.store, "apps")
    assert not tree.exists()
    undo(shop)
    row = shop.store.catalog.dot(dot.dot)
    assert row.trash is None and shop.store.catalog.current_dot() == dot.dot
    assert describe_tree(tree) == before
    assert shop.store.catalog.branch(dot.dot, "master").target == first
    assert shop.commit(row, "second").parents == (first,)
    undo(shop)
    redo(shop)
    assert os.listdir(shop.store.layout.trash_dir) == []


def test_an_attached_directory_is_attached_again_only_if_it_is_the_same(shop, dot, data, tmp_path):
    (data / "a").write_text("one")
    shop.commit(dot, "first")
    dots.delete_dot(shop.store, "shop")
    undo(shop)
    assert shop.store.catalog.tree(dot.dot).path == os.fsencode(data)
    redo(shop)
    data.rename(tmp_path / "kept")  # its inode must stay taken, or the new one may get it
    data.mkdir()
    (taken,) = undo(shop)
    assert shop.store.catalog.tree(dot.dot) is None
    assert "comes back without it" in taken.remarks[0]


def test_init_undone_takes_the_dot_away_and_redo_brings_all_of_it(shop, dot, data):
    (data / "a").write_text("one")
    undo(shop)
    assert shop.store.catalog.dots() == [] and (data / "a").exists()
    redo(shop)
    assert shop.store.catalog.current_dot() == dot.dot
    assert shop.store.catalog.tree(dot.dot).path == os.fsencode(data)


def test_a_name_taken_since_refuses(shop, dot):
    dots.delete_dot(shop.store, "shop")
    deletion = last_operation(shop)
    dots.init_dot(shop.store, "shop", at=None, as_root=False)
    with pytest.raises(CannotUndo, match="shop exists already"):
        lifecycle.undo_operation(shop.store, deletion, UndoRequest())
    assert shop.store.catalog.dot(dot.dot).trash is not None
    assert not os.path.exists(shop.store.layout.dot_dir(dot.dot))


def test_an_emptied_trash_refuses(shop, dot):
    dots.delete_dot(shop.store, "shop")
    shutil.rmtree(shop.store.layout.trash_dir)
    os.mkdir(shop.store.layout.trash_dir)
    with pytest.raises(CannotUndo, match="emptied"):
        undo(shop)
    assert shop.store.catalog.dots() == []


def test_a_ref_moved_since_by_somebody_else_refuses_and_says_who(shop, dot, data):
    (data / "a").write_text("one")
    shop.commit(dot, "first")
    first = shop.store.catalog.branch(dot.dot, "master").target
    (data / "a").write_text("two")
    second = shop.commit(dot, "second").commit
    with shop.store.catalog.transaction("receive", "bob") as tx:
        tx.append(RefChanged(dot.dot, "branch/master", second, first, "push", "push by bob"))
    before = shop.store.catalog.last_seq()
    with pytest.raises(CannotUndo, match="moved by receive of bob") as refused:
        undo(shop)
    facts = refused.value.facts
    assert facts["ref"] == "branch/master" and facts["undone"] == 0
    assert (facts["expected"], facts["actual"]) == (second.hex(), first.hex())
    assert facts["by"] == last_operation(shop)
    assert shop.store.catalog.last_seq() == before


def test_several_stop_at_the_first_refusal_and_say_how_far_they_came(shop, dot, data):
    old = shop.commit(dot, "first").commit
    second = shop.commit(dot, "second").commit
    with shop.store.transaction("prune") as tx:
        tx.append(CommitsThinned(dot.dot, (old,), "keep-last 1"))
    shop.commit(dot, "third")
    shop.commit(dot, "fourth")
    with pytest.raises(CannotUndo) as refused:
        undo(shop, 5)
    assert refused.value.facts["undone"] == 2
    assert shop.store.catalog.branch(dot.dot, "master").target == second


def test_prune_is_final(shop, dot, data):
    shop.commit(dot, "first")
    tip = shop.store.catalog.branch(dot.dot, "master").target
    with shop.store.transaction("prune") as tx:
        tx.append(CommitsThinned(dot.dot, (tip,), "keep-last 0"))
    with pytest.raises(CannotUndo, match="final") as refused:
        undo(shop)
    assert refused.value.facts["reason"] == "prune"


def test_nothing_is_left_to_undo_or_redo(shop):
    with pytest.raises(NothingToDo):
        undo(shop)
    with pytest.raises(NothingToDo):
        redo(shop)
    remotes.add_remote(shop.store, "r", "ssh://h")
    undo(shop)
    with pytest.raises(NothingToDo):
        undo(shop)
    redo(shop)
    with pytest.raises(NothingToDo):
        redo(shop)


def test_remotes_come_back_with_upstreams_and_tracking_refs(shop, dot, data):
    shop.commit(dot, "first")
    tip = shop.store.catalog.branch(dot.dot, "master").target
    remotes.add_remote(shop.store, "r", "ssh://h", "my dm")
    dots.set_upstream(shop.store, "shop", "r", "company/app")
    with shop.store.transaction("fetch") as tx:
        tx.append(RefChanged(dot.dot, "remote/r/master", None, tip, "fetch"))
    remotes.rename_remote(shop.store, "r", "s")
    remotes.remove_remote(shop.store, "s")
    undo(shop)
    catalog = shop.store.catalog
    assert (catalog.remote("s").url, catalog.remote("s").dm_command) == ("ssh://h", "my dm")
    assert catalog.upstream(dot.dot, "s") == ("company", "app")
    assert catalog.ref(dot.dot, "remote/s/master").target == tip
    undo(shop, 3)
    assert catalog.remotes() == [] and catalog.upstreams(dot.dot) == []


def test_what_was_discarded_does_not_come_back_and_undo_says_so(shop, dot, data):
    (data / "a").write_text("one")
    shop.commit(dot, "first")
    (data / "a").write_text("lost")
    branches.reset(shop.store, dot, "HEAD", hard=True, discard=True)
    (taken,) = undo(shop)
    assert taken.discarded and "do not come back" in taken.remarks[0]
    assert (data / "a").read_text() == "one"


def test_pushed_commits_stay_at_the_remote(shop, dot, data):
    shop.commit(dot, "first")
    remotes.add_remote(shop.store, "r", "ssh://h")
    second = shop.commit(dot, "second").commit
    with shop.store.transaction("push") as tx:
        tx.append(RefChanged(dot.dot, "remote/r/master", None, second, "push"))
    (taken,) = undo(shop)
    assert taken.command == "commit" and "keeps what was pushed" in taken.remarks[0]


def test_one_operation_is_taken_back_out_of_order(shop, dot, data):
    (data / "a").write_text("one")
    shop.commit(dot, "first")
    branches.create_branch(shop.store, dot, "topic", None)
    making = last_operation(shop)
    shop.commit(dot, "second")
    lifecycle.undo_operation(shop.store, making, UndoRequest())
    assert shop.store.catalog.branch(dot.dot, "topic") is None
    assert shop.messages(dot) == ["first", "second"]
    with pytest.raises(UsageError, match="already"):
        lifecycle.undo_operation(shop.store, making, UndoRequest())
    with pytest.raises(UsageError, match="is an undo itself"):
        lifecycle.undo_operation(shop.store, last_operation(shop), UndoRequest())


def test_a_branch_that_is_current_now_is_not_taken_away(shop, dot, data):
    shop.commit(dot, "first")
    branches.create_branch(shop.store, dot, "topic", None)
    making = last_operation(shop)
    shop.checkout(dot, "topic")
    with pytest.raises(CannotUndo, match="current branch"):
        lifecycle.undo_operation(shop.store, making, UndoRequest())


def test_a_directory_switched_to_another_branch_since_refuses(shop, dot, data):
    (data / "a").write_text("one")
    shop.commit(dot, "first")
    (data / "a").write_text("two")
    shop.commit(dot, "second")
    shop.reset(dot, "HEAD^")
    resetting = last_operation(shop)
    if resetting and shop.store.catalog.operations(1)[0].last_seq == resetting:
        resetting = shop.store.catalog.operations(2)[1].first_seq
    shop.checkout(dot, "topic", create=True)
    with pytest.raises(CannotUndo, match="the directory holds branch topic"):
        lifecycle.undo_operation(shop.store, resetting, UndoRequest())


def test_only_operations_of_one_dot_with_dot(shop, dot, data, tmp_path):
    shop.commit(dot, "first")
    other = shop.attach("other", tmp_path / "other")
    shop.commit(other, "elsewhere")
    (taken,) = lifecycle.undo(shop.store, 1, UndoRequest(dot=dot.dot))
    assert taken.command == "commit"
    assert shop.store.catalog.branch(dot.dot, "master") is None
    assert shop.store.catalog.branch(other.dot, "master") is not None


def test_a_dry_run_tries_and_changes_nothing(shop, dot, data):
    (data / "a").write_text("one")
    shop.commit(dot, "first")
    dots.delete_dot(shop.store, "shop")
    before = shop.store.catalog.last_seq()
    would = lifecycle.would_undo(shop.store, 3, UndoRequest())
    assert [one.command for one in would] == ["delete", "commit", "init"]
    assert shop.store.catalog.last_seq() == before
    assert len(os.listdir(shop.store.layout.trash_dir)) == 1


def test_a_received_push_is_skipped(shop, dot, data):
    shop.commit(dot, "first")
    tip = shop.store.catalog.branch(dot.dot, "master").target
    with shop.store.catalog.transaction("receive", "bob") as tx:
        tx.append(CommitsAdded(dot.dot, (tip,)))
        tx.append(RefChanged(dot.dot, "branch/theirs", None, tip, "push", "push by bob"))
    (taken,) = undo(shop)
    assert taken.command == "commit"
    assert shop.store.catalog.branch(dot.dot, "theirs") is not None


def test_a_tree_whose_rename_was_cut_short_follows(shop, monkeypatch):
    dot = dots.init_dot(shop.store, "apps", at=None, as_root=False)
    (managed_tree(shop.store, dot, "master") / "__default__/a").write_text("one")
    shop.commit(dot, "first")
    with monkeypatch.context() as cut:
        cut.setattr(trees, "rename_place", lambda *args: None)
        branches.rename_branch(shop.store, dot, "master", "main")
    assert trees.place_of(shop.store, dot.dot, "main") is None
    with switching.ready(shop.store, dot.dot):
        pass
    tree = managed_tree(shop.store, dot, "main")
    assert (tree / "__default__/a").read_text() == "one" and os.listdir(tree.parent) == ["main"]


# --- merges ------------------------------------------------------------------------------------


@pytest.fixture
def diverged(shop: Workshop, dot: DotRow, data: Path) -> DotRow:
    """master and topic changed the same file otherwise; master is current."""
    (data / "a").write_text("base\n")
    shop.commit(dot, "base")
    shop.checkout(dot, "topic", create=True)
    (data / "a").write_text("theirs\n")
    shop.commit(dot, "theirs")
    shop.checkout(dot, "master")
    (data / "a").write_text("ours\n")
    shop.commit(dot, "ours")
    return dot


def test_each_step_of_a_merge_is_taken_back_by_itself(shop, diverged, data):
    dot, catalog = diverged, shop.store.catalog
    seen = [describe_tree(data)]
    merging.merge_revision(shop.store, dot, merging.MergeOptions("topic"))
    seen.append(describe_tree(data))
    resolution.resolve_conflicts(shop.store, dot, None, "theirs")
    seen.append(describe_tree(data))
    (row,) = catalog.conflicts(dot.dot, "master")
    merged = merging.continue_merge(shop.store, dot).commit
    assert catalog.merge(dot.dot, "master") is None
    undo(shop)  # the conclusion: under way again, decided
    assert describe_tree(data) == seen[2]
    assert catalog.conflicts(dot.dot, "master") == [row] and row.resolved == "theirs"
    undo(shop)  # the decision
    assert describe_tree(data) == seen[1]
    assert catalog.conflicts(dot.dot, "master")[0].resolved is None
    undo(shop)  # the merge
    assert describe_tree(data) == seen[0] and catalog.merge(dot.dot, "master") is None
    redo(shop, 3)
    assert catalog.branch(dot.dot, "master").target == merged
    assert shop.changes(dot) == [] and (data / "a").read_text() == "theirs\n"


def test_an_aborted_merge_is_under_way_again(shop, diverged, data):
    dot = diverged
    merging.merge_revision(shop.store, dot, merging.MergeOptions("topic"))
    (data / "a").write_text("half decided\n")
    before = describe_tree(data)
    merging.abort_merge(shop.store, dot)
    undo(shop)
    assert describe_tree(data) == before
    assert shop.store.catalog.merge(dot.dot, "master") is not None
    redo(shop)
    assert (data / "a").read_text() == "ours\n"


# --- kills, and a long log ---------------------------------------------------------------------


class _Killed(BaseException):
    """Stands for SIGKILL: nothing catches it, and what it leaves is found by the next command."""


def kill(*_: object, **__: object) -> None:
    raise _Killed


@pytest.fixture
def renamed(shop: Workshop) -> DotRow:
    """A managed dot with two commits whose branch master has been renamed to main."""
    dot = dots.init_dot(shop.store, "apps", at=None, as_root=False)
    file = managed_tree(shop.store, dot, "master") / "__default__/a"
    file.write_text("one")
    shop.commit(dot, "first")
    file.write_text("two!")
    shop.commit(dot, "second")
    branches.rename_branch(shop.store, dot, "master", "main")
    return dot


def test_a_switch_cut_short_is_completed_by_the_next_command(shop, renamed, monkeypatch):
    tree = managed_tree(shop.store, renamed, "main")
    expected = describe_tree(tree)
    shop.reset(renamed, "HEAD^", hard=True)
    with monkeypatch.context() as cut, pytest.raises(_Killed):
        cut.setattr(switching, "complete_switch", kill)
        undo(shop)
    shop.reopen()
    assert describe_tree(tree) != expected
    with switching.ready(shop.store, renamed.dot):
        pass
    assert describe_tree(tree) == expected and shop.changes(renamed) == []
    assert shop.store.catalog.refs(renamed.dot, "stash/") == []


def test_a_rename_back_cut_short_is_completed_by_the_next_command(shop, renamed, monkeypatch):
    tree = managed_tree(shop.store, renamed, "main")
    expected = describe_tree(tree)
    with monkeypatch.context() as cut, pytest.raises(_Killed):
        cut.setattr(lifecycle, "_finish", kill)
        undo(shop)
    shop.reopen()
    assert trees.place_of(shop.store, renamed.dot, "master") is None
    with switching.ready(shop.store, renamed.dot):
        pass
    assert describe_tree(managed_tree(shop.store, renamed, "master")) == expected
    assert not tree.exists()


def test_a_dot_brought_back_too_early_goes_to_the_trash_again(shop, renamed, monkeypatch):
    expected = describe_tree(managed_tree(shop.store, renamed, "main"))
    dots.delete_dot(shop.store, "apps")
    with monkeypatch.context() as cut, pytest.raises(_Killed):
        cut.setattr(lifecycle, "_record", kill)
        cut.setattr(lifecycle, "finish_deletions", lambda store: None)
        undo(shop)
    shop.reopen()
    assert os.path.isdir(shop.store.layout.dot_dir(renamed.dot))
    dots.init_dot(shop.store, "another", at=None, as_root=False)
    assert not os.path.exists(shop.store.layout.dot_dir(renamed.dot))
    undo(shop, 2)
    assert describe_tree(managed_tree(shop.store, renamed, "main")) == expected


def test_undo_costs_the_same_in_a_long_log(tmp_path):
    """10 or 10,000 operations lie before the commit that is taken back and made again."""
    seconds = []
    for name, count in (("short", 10), ("long", 10_000)):
        shop = Workshop(tmp_path / name)
        dot = shop.attach("shop", tmp_path / f"{name}-data")
        lengthen(shop, dot, count)
        shop.commit(dot, "first")
        samples = []
        for _ in range(5):
            began = time.perf_counter()
            undo(shop)
            redo(shop)
            samples.append(time.perf_counter() - began)
        seconds.append(min(samples))
        shop.close()
    assert seconds[1] < 3 * seconds[0] + 0.05, seconds


def lengthen(shop: Workshop, dot: DotRow, count: int) -> None:
    """Append `count` operations to the log itself; the catalog catches up by replaying it."""
    log = EventLog(shop.store.layout.events_dir)
    position = START
    for _, end in log.read(START):
        position = end
    for number in range(count):
        event = UpstreamSet(dot.dot, "r", "far", f"name{number}")
        operation = Operation(
            position.last_seq + 1,
            number,
            number.to_bytes(16, "big"),
            "set-upstream",
            "me",
            (event,),
        )
        position = log.append(operation, position)
    shop.store.catalog.refresh()
