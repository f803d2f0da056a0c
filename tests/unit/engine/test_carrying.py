"""`checkout --carry` and `commit --amend`: uncommitted changes that go along, tips replaced."""

import os
from pathlib import Path

import pytest

from dmsync.core.events import CommitsAdded, RefChanged
from dmsync.core.objects import Commit
from dmsync.engine import branches, dots, history, switching
from dmsync.engine.branches import SwitchSummary
from dmsync.engine.carrying import CarryRequest, checkout_carrying
from dmsync.errors import (
    AlreadyExists,
    MergeConflict,
    NotFound,
    NothingToDo,
    RevisionNotFound,
    UsageError,
    WouldLose,
)
from dmsync.storage.catalog import DotRow
from tests.support.tree import describe_tree
from tests.support.working_store import Workshop


@pytest.fixture
def dot(shop: Workshop, data: Path) -> DotRow:
    dot = shop.attach("shop", data)
    for name in "ab":
        (data / name).write_text("one\n")
    shop.commit(dot, "first")
    return dot


def carry(
    shop: Workshop, dot: DotRow, branch: str, revision: str | None = None, **wishes: bool
) -> SwitchSummary:
    request = CarryRequest(branch, revision=revision, **wishes)
    return checkout_carrying(shop.store, dot, request)


def head(shop: Workshop, dot: DotRow) -> str:
    return shop.store.catalog.head(dot.dot)


def contents(data: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(data.iterdir())}


def tip(shop: Workshop, dot: DotRow, revision: str = "HEAD") -> Commit:
    oid = history.resolve_revision(shop.store, dot, revision)
    return shop.store.commit(dot.dot, oid)


# --- carry ----------------------------------------------------------------------------------------


def test_changes_go_along_to_a_new_branch(shop: Workshop, dot: DotRow, data: Path) -> None:
    (data / "a").write_text("uncommitted\n")
    (data / "new").write_text("new\n")
    inode = (data / "a").stat().st_ino
    before = describe_tree(data)
    carry(shop, dot, "feature", create=True)
    assert head(shop, dot) == "feature"
    assert describe_tree(data) == before and (data / "a").stat().st_ino == inode
    assert shop.changes(dot) == [("*", b"__default__/a"), ("+", b"__default__/new")]
    shop.commit(dot, "on feature")
    shop.checkout(dot, "master")
    assert contents(data) == {"a": "one\n", "b": "one\n"}
    assert shop.changes(dot) == []
    assert shop.store.catalog.working(dot.dot, "master") is None


def test_a_clean_tree_is_an_ordinary_checkout(shop: Workshop, dot: DotRow) -> None:
    carry(shop, dot, "feature", create=True)
    carry(shop, dot, "feature")
    assert head(shop, dot) == "feature" and shop.changes(dot) == []


def test_changes_are_merged_into_another_commit(shop: Workshop, dot: DotRow, data: Path) -> None:
    shop.checkout(dot, "other", create=True)
    (data / "b").write_text("other\n")
    shop.commit(dot, "other")
    shop.checkout(dot, "master")
    (data / "a").write_text("uncommitted\n")
    carry(shop, dot, "other", dry_run=True)
    assert head(shop, dot) == "master" and contents(data)["b"] == "one\n"
    carry(shop, dot, "other")
    assert contents(data) == {"a": "uncommitted\n", "b": "other\n"}
    assert shop.changes(dot) == [("*", b"__default__/a")]
    carry(shop, dot, "from-first", revision="master", create=True)
    assert contents(data) == {"a": "uncommitted\n", "b": "one\n"}
    shop.checkout(dot, "other")
    assert shop.changes(dot) == []


def test_changes_that_do_not_fit_stay(shop: Workshop, dot: DotRow, data: Path) -> None:
    shop.checkout(dot, "other", create=True)
    (data / "a").write_text("other\n")
    shop.commit(dot, "other")
    shop.checkout(dot, "master")
    (data / "a").write_text("uncommitted\n")
    before, seq = describe_tree(data), shop.store.catalog.last_seq()
    with pytest.raises(MergeConflict, match="__default__/a") as refused:
        carry(shop, dot, "other")
    assert refused.value.exit_code == 15
    assert (describe_tree(data), shop.store.catalog.last_seq()) == (before, seq)
    assert head(shop, dot) == "master"


def test_a_branch_with_changes_of_its_own_is_refused(
    shop: Workshop, dot: DotRow, data: Path
) -> None:
    shop.checkout(dot, "other", create=True)
    (data / "b").write_text("of other\n")
    shop.checkout(dot, "master")
    (data / "a").write_text("of master\n")
    with pytest.raises(WouldLose, match="of its own"):
        carry(shop, dot, "other")
    assert contents(data) == {"a": "of master\n", "b": "one\n"}
    shop.checkout(dot, "other")
    assert contents(data) == {"a": "one\n", "b": "of other\n"}


def test_bad_names_and_revisions_change_nothing(shop: Workshop, dot: DotRow, data: Path) -> None:
    (data / "a").write_text("uncommitted\n")
    seq = shop.store.catalog.last_seq()
    with pytest.raises(AlreadyExists):
        carry(shop, dot, "master", create=True)
    with pytest.raises(RevisionNotFound):
        carry(shop, dot, "nowhere")
    with pytest.raises(RevisionNotFound):
        carry(shop, dot, "x", "nowhere", create=True)
    with pytest.raises(UsageError, match="-b"):
        carry(shop, dot, "master", "HEAD")
    assert shop.store.catalog.last_seq() == seq


def test_an_unborn_branch_keeps_its_tree(shop: Workshop, dot: DotRow, tmp_path: Path) -> None:
    new = shop.attach("new", tmp_path / "new")
    (tmp_path / "new" / "a").write_text("only here\n")
    with pytest.raises(RevisionNotFound):
        carry(shop, new, "feature", create=True)
    with shop.store.transaction("fetch") as tx:
        with shop.store.objects(new.dot).writer() as writer:
            oid = switching.put_snapshot(
                shop.store, writer, "other", tip(shop, dot).root, None, "x"
            )
            writer.seal()
        tx.append(CommitsAdded(new.dot, (oid,)))
        tx.append(RefChanged(new.dot, "branch/other", None, oid, "fetch"))
    with pytest.raises(NotFound, match="no commits yet"):
        carry(shop, new, "other")
    assert (tmp_path / "new" / "a").read_text() == "only here\n"


@pytest.fixture
def managed(shop: Workshop) -> DotRow:
    dot = dots.init_dot(shop.store, "managed", at=None, as_root=False)
    root = tree_of(shop, dot, "master")
    (root / "db").mkdir()
    (root / "db" / "rows").write_text("one\n")
    shop.commit(dot, "first")
    return dot


def tree_of(shop: Workshop, dot: DotRow, branch: str) -> Path:
    place = switching.make_place(shop.store, dot.dot, branch, None)
    return Path(os.fsdecode(place.path))


def test_a_managed_branch_gets_the_changes_and_the_old_one_none(
    shop: Workshop, managed: DotRow
) -> None:
    root = tree_of(shop, managed, "master")
    (root / "db" / "rows").write_text("uncommitted\n")
    (root / "logs").mkdir()
    os.link(root / "db" / "rows", root / "logs" / "link")
    changed = describe_tree(root)
    carry(shop, managed, "feature", create=True)
    assert describe_tree(tree_of(shop, managed, "feature")) == changed
    assert (root / "db" / "rows").read_text() == "one\n" and not (root / "logs").exists()
    assert shop.store.catalog.switches(managed.dot) == []
    shop.commit(managed, "on feature")
    shop.checkout(managed, "master")
    assert shop.changes(managed) == []
    (root / "db" / "new").write_text("new\n")
    carry(shop, managed, "feature")
    assert (tree_of(shop, managed, "feature") / "db" / "new").read_text() == "new\n"
    assert not (root / "db" / "new").exists()


@pytest.mark.parametrize("cut", [1, 2])
def test_a_managed_carry_survives_a_kill(
    shop: Workshop, managed: DotRow, cut: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tree_of(shop, managed, "master")
    (root / "db" / "rows").write_text("uncommitted\n")
    complete, calls = switching.complete_switch, []

    def killed(*arguments: object, **more: object) -> object:
        calls.append(arguments)
        if len(calls) == cut:
            raise KeyboardInterrupt
        return complete(*arguments, **more)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(switching, "complete_switch", killed)
        with pytest.raises(KeyboardInterrupt):
            carry(shop, managed, "feature", create=True)
    shop.reopen()
    for branch in ("feature", "master"):
        shop.checkout(managed, branch)
        with switching.ready(shop.store, managed.dot):
            pass
    assert (root / "db" / "rows").read_text() == "one\n"
    assert (tree_of(shop, managed, "feature") / "db" / "rows").read_text() == "uncommitted\n"
    assert shop.store.catalog.switches(managed.dot) == []


def test_a_branch_is_made_at_any_commit_while_others_are_dirty(
    shop: Workshop, managed: DotRow
) -> None:
    root = tree_of(shop, managed, "master")
    (root / "db" / "rows").write_text("two\n")
    shop.commit(managed, "second")
    (root / "db" / "rows").write_text("uncommitted\n")
    for number, revision in enumerate(("HEAD~1", "master^", "master@{1}")):
        made = branches.create_branch(shop.store, managed, f"at-{number}", revision)
        assert shop.store.commit(managed.dot, made).message == "first"
        shop.checkout(managed, f"at-{number}")
        tree = tree_of(shop, managed, f"at-{number}")
        assert (tree / "db" / "rows").read_text() == "one\n"
    assert (root / "db" / "rows").read_text() == "uncommitted\n"
    shop.checkout(managed, "master")
    assert shop.changes(managed) == [("*", b"db/rows")]


# --- amend ----------------------------------------------------------------------------------------


def test_amending_replaces_the_tip(shop: Workshop, dot: DotRow, data: Path) -> None:
    (data / "a").write_text("two\n")
    old = shop.commit(
        dot, "second", author="Bob <b@x>", metadata=(("one", "1"), ("two", "2"))
    ).commit
    assert old is not None
    (data / "b").write_text("two\n")
    amended = shop.commit(dot, "", amend=True, metadata=(("two", "zwei"), ("three", "3")))
    made = tip(shop, dot)
    assert made.parents == tip(shop, dot, old.hex()).parents == amended.parents
    assert (made.message, made.author) == ("second", "Bob <b@x>")
    assert made.metadata == (("one", "1"), ("three", "3"), ("two", "zwei"))
    assert [(c.kind, c.path) for c in amended.changes] == [
        ("*", b"__default__/a"), ("*", b"__default__/b")
    ]  # fmt: skip
    assert history.show(shop.store, dot, "HEAD")[1] == amended.changes
    assert shop.messages(dot) == ["first", "second"] and shop.changes(dot) == []
    (last, *_) = shop.store.catalog.reflog(dot.dot, "branch/master")
    assert (last.kind, last.old, last.new) == ("amend", old, amended.commit)
    shop.commit(dot, "other words", amend=True, author="Eve <e@x>")
    assert (tip(shop, dot).message, tip(shop, dot).author) == ("other words", "Eve <e@x>")


def test_the_first_commit_is_amended_too(shop: Workshop, dot: DotRow, data: Path) -> None:
    (data / "a").write_text("two\n")
    shop.commit(dot, "really first", amend=True)
    assert shop.messages(dot) == ["really first"] and tip(shop, dot).parents == ()


def test_there_must_be_a_tip_to_amend(shop: Workshop, tmp_path: Path) -> None:
    dot = shop.attach("new", tmp_path / "new")
    with pytest.raises(WouldLose, match="no commits yet"):
        shop.commit(dot, "x", amend=True)


def test_amending_with_nothing_changed(shop: Workshop, dot: DotRow) -> None:
    with pytest.raises(NothingToDo):
        shop.commit(dot, "", amend=True, fail_if_nothing=True)
    with pytest.raises(UsageError):
        shop.commit(dot, "", amend=True, metadata=(("Upper", "x"),))
    assert shop.commit(dot, "", amend=True, dry_run=True).commit is None
    assert len(shop.store.catalog.reflog(dot.dot, "branch/master")) == 1


def test_what_a_remote_holds_is_not_amended(shop: Workshop, dot: DotRow, data: Path) -> None:
    old = history.resolve_revision(shop.store, dot, "HEAD")
    (data / "a").write_text("two\n")
    newer = shop.commit(dot, "second").commit
    shop.reset(dot, "HEAD~1", hard=True)
    with shop.store.transaction("push") as tx:
        tx.append(RefChanged(dot.dot, "remote/vault/master", None, newer, "push"))
    with pytest.raises(WouldLose, match="of vault") as refused:
        shop.commit(dot, "other", amend=True)
    assert "--amend-pushed" in refused.value.hint
    assert history.resolve_revision(shop.store, dot, "HEAD") == old
    shop.commit(dot, "other", amend=True, amend_pushed=True)
    assert shop.messages(dot) == ["other"]
