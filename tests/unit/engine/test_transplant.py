"""Cherry-pick and revert: what one commit changed, done again or taken back."""

from pathlib import Path

import pytest

from dmsync.core.objects import Commit
from dmsync.engine import branches, history
from dmsync.engine.merging.lifecycle import MergeOptions, continue_merge, merge_revision
from dmsync.engine.merging.resolution import resolve_conflicts
from dmsync.engine.transplant import (
    TransplantRequest,
    TransplantSummary,
    cherry_pick,
    revert,
)
from dmsync.errors import MergeConflict, RevisionNotFound, UsageError, WouldLose
from dmsync.storage.catalog import DotRow
from tests.support.working_store import Workshop


@pytest.fixture
def dot(shop: Workshop, data: Path) -> DotRow:
    """master: first, second; side: first, fix (by Bob, changes b), more (changes c)."""
    dot = shop.attach("shop", data)
    for name in "abc":
        (data / name).write_text("one\n")
    shop.commit(dot, "first")
    shop.checkout(dot, "side", create=True)
    (data / "b").write_text("fixed\n")
    (data / "new").write_text("new\n")
    shop.commit(dot, "fix b\n\nat length", author="Bob <b@x>", metadata=(("ticket", "42"),))
    (data / "c").write_text("more\n")
    shop.commit(dot, "more")
    shop.checkout(dot, "master")
    (data / "a").write_text("two\n")
    shop.commit(dot, "second")
    return dot


def pick(shop: Workshop, dot: DotRow, *revisions: str, **wishes: object) -> TransplantSummary:
    return cherry_pick(shop.store, dot, TransplantRequest(revisions, **wishes))  # type: ignore[arg-type]


def take_back(shop: Workshop, dot: DotRow, *revisions: str, **wishes: object) -> TransplantSummary:
    return revert(shop.store, dot, TransplantRequest(revisions, **wishes))  # type: ignore[arg-type]


def tip(shop: Workshop, dot: DotRow) -> Commit:
    row = shop.store.catalog.branch(dot.dot, shop.store.catalog.head(dot.dot))
    assert row is not None
    return shop.store.commit(dot.dot, row.target)


def contents(data: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(data.iterdir())}


def test_a_picked_commit_keeps_author_message_and_metadata(
    shop: Workshop, dot: DotRow, data: Path
) -> None:
    before = shop.store.catalog.branch(dot.dot, "master")
    (done,) = pick(shop, dot, "side~1").done
    made = tip(shop, dot)
    assert done.outcome == "merged" and before is not None and made.parents == (before.target,)
    assert (made.author, made.message) == ("Bob <b@x>", "fix b\n\nat length")
    assert made.committer == "Ada <ada@example.org>"
    assert made.metadata == (("ticket", "42"),)
    assert contents(data) == {"a": "two\n", "b": "fixed\n", "c": "one\n", "new": "new\n"}
    assert shop.changes(dot) == []
    reflog = shop.store.catalog.reflog(dot.dot, "branch/master")
    assert reflog[0].kind == "cherry-pick"


def test_the_origin_is_named_when_asked(shop: Workshop, dot: DotRow) -> None:
    (done,) = pick(shop, dot, "side", mark_origin=True).done
    assert tip(shop, dot).message == f"more\n\n(cherry picked from commit {done.source.hex()})"


def test_several_are_picked_in_the_order_given(shop: Workshop, dot: DotRow, data: Path) -> None:
    summary = pick(shop, dot, "side~1", "side")
    assert [done.outcome for done in summary.done] == ["merged", "merged"]
    assert shop.messages(dot) == ["first", "second", "fix b\n\nat length", "more"]
    assert contents(data)["c"] == "more\n"


def test_a_range_is_picked_oldest_first_and_reverted_newest_first(
    shop: Workshop, dot: DotRow, data: Path
) -> None:
    before = contents(data)
    pick(shop, dot, "master..side")
    assert shop.messages(dot) == ["first", "second", "fix b\n\nat length", "more"]
    (data / "b").write_text("fixed again\n")
    shop.commit(dot, "again")
    take_back(shop, dot, "HEAD~3..")
    assert shop.messages(dot)[-3:] == [
        message + tip_of(shop, dot, back)
        for message, back in (
            ('revert "again"\n\nThis reverts commit ', "HEAD~3"),
            ('revert "more"\n\nThis reverts commit ', "HEAD~4"),
            ('revert "fix b"\n\nThis reverts commit ', "HEAD~5"),
        )
    ]
    assert contents(data) == before


def tip_of(shop: Workshop, dot: DotRow, revision: str) -> str:
    return f"{history.resolve_revision(shop.store, dot, revision).hex()}."


def test_what_is_there_already_makes_no_commit_unless_allowed(shop: Workshop, dot: DotRow) -> None:
    pick(shop, dot, "side")
    made = tip(shop, dot)
    assert [done.outcome for done in pick(shop, dot, "side").done] == ["nothing"]
    assert tip(shop, dot) == made
    pick(shop, dot, "side", allow_empty=True)
    assert tip(shop, dot).root == made.root and tip(shop, dot) != made


def test_uncommitted_when_asked(shop: Workshop, dot: DotRow) -> None:
    (done,) = pick(shop, dot, "side~1", no_commit=True).done
    assert done.outcome == "applied" and done.commit is None
    assert shop.messages(dot) == ["first", "second"]
    assert shop.changes(dot) == [("*", b"__default__/b"), ("+", b"__default__/new")]
    with pytest.raises(WouldLose):
        pick(shop, dot, "side")


def test_a_dry_run_changes_nothing(shop: Workshop, dot: DotRow, data: Path) -> None:
    seq, before = shop.store.catalog.last_seq(), contents(data)
    (done,) = pick(shop, dot, "side~1", dry_run=True).done
    assert [(c.kind, c.path) for c in done.changes] == [
        ("*", b"__default__/b"), ("+", b"__default__/new")
    ]  # fmt: skip
    take_back(shop, dot, "HEAD", dry_run=True)
    assert (shop.store.catalog.last_seq(), contents(data)) == (seq, before)


def test_a_conflict_stops_and_says_what_is_left(shop: Workshop, dot: DotRow, data: Path) -> None:
    (data / "b").write_text("other\n")
    shop.commit(dot, "third")
    summary = pick(shop, dot, "side~1", "side", "master~1")
    assert [conflict.path for conflict in summary.conflicts] == [b"__default__/b"]
    assert len(summary.left) == 2
    assert [done.outcome for done in summary.done] == ["conflicts"]
    with pytest.raises(MergeConflict, match="under way"):
        pick(shop, dot, "side")
    with pytest.raises(MergeConflict, match="under way"):
        shop.commit(dot, "no", amend=True)
    resolve_conflicts(shop.store, dot, [b"__default__/b"], "theirs")
    continue_merge(shop.store, dot)
    made = tip(shop, dot)
    assert (made.author, made.message) == ("Bob <b@x>", "fix b\n\nat length")
    assert made.metadata == (("ticket", "42"),) and len(made.parents) == 1
    assert contents(data)["b"] == "fixed\n"


def test_a_revert_takes_back_and_a_revert_of_it_brings_again(
    shop: Workshop, dot: DotRow, data: Path
) -> None:
    shop.checkout(dot, "side")
    after = contents(data)
    (done,) = take_back(shop, dot, "HEAD~1").done
    made = tip(shop, dot)
    assert made.message == f'revert "fix b"\n\nThis reverts commit {done.source.hex()}.'
    assert made.author == "Ada <ada@example.org>" and made.metadata == ()
    assert contents(data) == {"a": "one\n", "b": "one\n", "c": "more\n"}
    take_back(shop, dot, "HEAD")
    assert contents(data) == after


def test_a_revert_that_conflicts(shop: Workshop, dot: DotRow, data: Path) -> None:
    (data / "a").write_text("three\n")
    shop.commit(dot, "third")
    summary = take_back(shop, dot, "HEAD~1")
    assert [conflict.path for conflict in summary.conflicts] == [b"__default__/a"]
    assert contents(data)["a"] == "three\n"


def test_merges_need_a_mainline(shop: Workshop, dot: DotRow, data: Path) -> None:
    merge_revision(shop.store, dot, MergeOptions("side"))
    assert len(tip(shop, dot).parents) == 2
    merged = contents(data)
    with pytest.raises(UsageError, match="merge of 2 parents"):
        take_back(shop, dot, "HEAD")
    with pytest.raises(UsageError, match="no parent 3"):
        take_back(shop, dot, "HEAD", mainline=3)
    with pytest.raises(UsageError, match="no parent 0"):
        take_back(shop, dot, "HEAD", mainline=0)
    assert contents(data) == merged
    take_back(shop, dot, "HEAD", mainline=1)
    assert contents(data) == {"a": "two\n", "b": "one\n", "c": "one\n"}
    branches.checkout(shop.store, dot, "third", create=True, revision="master~2")
    pick(shop, dot, "master~1", mainline=1)
    assert contents(data)["b"] == "fixed\n"


def test_a_first_commit_is_picked_but_not_reverted(shop: Workshop, dot: DotRow, data: Path) -> None:
    with pytest.raises(UsageError, match="first commit"):
        take_back(shop, dot, "HEAD", "master~1")
    assert shop.messages(dot) == ["first", "second"]
    (data / "c").unlink()
    shop.commit(dot, "third")
    summary = pick(shop, dot, "master~2")
    assert "c" in contents(data) and [c.path for c in summary.conflicts] == [b"__default__/a"]


def test_nothing_happens_when_one_of_several_is_wrong(shop: Workshop, dot: DotRow) -> None:
    seq = shop.store.catalog.last_seq()
    for wrong, error in (
        ("nowhere", RevisionNotFound),
        ("master..", UsageError),
        ("side..no", RevisionNotFound),
        ("a:b", UsageError),
    ):
        with pytest.raises(error):
            pick(shop, dot, "side", wrong)
    with pytest.raises(UsageError, match="one revision"):
        pick(shop, dot, "side", "side~1", no_commit=True)
    assert shop.store.catalog.last_seq() == seq


def test_uncommitted_changes_are_in_the_way(shop: Workshop, dot: DotRow, data: Path) -> None:
    (data / "c").write_text("uncommitted\n")
    with pytest.raises(WouldLose, match="uncommitted"):
        pick(shop, dot, "side")
    assert contents(data)["c"] == "uncommitted\n"
