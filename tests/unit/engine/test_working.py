"""Commit, status, checkout, reset on real directories: what is kept, refused and brought back."""

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from dmsync.core.events import RefChanged, TreeSwitchStarted
from dmsync.core.ids import ObjectId
from dmsync.engine import branches, dots, history, switching, trees
from dmsync.engine.dot_lookup import resolve_dot
from dmsync.errors import (
    AlreadyExists,
    CaptureFailed,
    Corruption,
    DotNotFound,
    NothingToDo,
    RevisionNotFound,
    UsageError,
    WouldLose,
)
from dmsync.storage.catalog import DotRow
from tests.support.live_tree import as_nobody
from tests.support.working_store import Workshop


def test_commit_makes_history_and_a_clean_tree(shop: Workshop, dot: DotRow, data: Path) -> None:
    (data / "a").write_text("one")
    assert shop.changes(dot) == [("+", b"__default__"), ("+", b"__default__/a")]
    summary = shop.commit(dot, "first", metadata=(("k", "v=w"),))
    assert shop.changes(dot) == []
    (info,) = history.log_commits(shop.store, dot)
    assert (info.id, info.message, info.metadata) == (summary.commit, "first", (("k", "v=w"),))
    assert info.parents == () and info.author == "Ada <ada@example.org>"


def test_no_change_commit_is_a_commit_unless_told(shop: Workshop, dot: DotRow, data: Path) -> None:
    (data / "a").write_text("one")
    first = shop.commit(dot, "first").commit
    second = shop.commit(dot, "again")
    assert second.parents == (first,) and second.changes == []
    with pytest.raises(NothingToDo):
        shop.commit(dot, "nothing", fail_if_nothing=True)
    assert shop.messages(dot) == ["first", "again"]


@pytest.mark.parametrize("message", ["", "  \n"])
def test_commit_without_a_message_is_refused(shop: Workshop, dot: DotRow, message: str) -> None:
    with pytest.raises(UsageError, match="Please provide a commit message"):
        shop.commit(dot, message)


def test_metadata_name_beginning_upper_case_is_refused(shop: Workshop, dot: DotRow) -> None:
    with pytest.raises(UsageError, match="must start with lowercase characters: Apples"):
        shop.commit(dot, "m", metadata=(("Apples", "green"),))
    assert shop.messages(dot) == []


def test_reset_hard_brings_back_files_and_log(shop: Workshop, dot: DotRow, data: Path) -> None:
    (data / "a").write_text("one")
    shop.commit(dot, "first")
    (data / "b").write_text("two")
    os.chmod(data / "a", 0o400)
    second = shop.commit(dot, "second").commit
    summary = shop.reset(dot, "HEAD^", hard=True)
    assert sorted(os.listdir(data)) == ["a"]
    assert (data / "a").stat().st_mode & 0o777 == 0o644
    assert summary.commits_dropped == 1
    assert shop.messages(dot) == ["first"] and shop.changes(dot) == []
    shop.reset(dot, "HEAD@{1}", hard=True)
    assert history.resolve_revision(shop.store, dot, "HEAD") == second
    assert (data / "b").read_text() == "two"


def test_reset_refuses_to_lose_uncommitted_changes(shop: Workshop, dot: DotRow, data: Path) -> None:
    (data / "a").write_text("one")
    shop.commit(dot, "first")
    shop.commit(dot, "second")
    (data / "a").write_text("precious")
    with pytest.raises(WouldLose):
        shop.reset(dot, "HEAD^")
    assert (data / "a").read_text() == "precious"
    assert shop.messages(dot) == ["first", "second"]


def test_what_reset_hard_discards_can_be_had_back(shop: Workshop, dot: DotRow, data: Path) -> None:
    (data / "a").write_text("one")
    shop.commit(dot, "first")
    (data / "a").write_text("precious")
    stash = shop.reset(dot, "HEAD", hard=True).stash
    assert (data / "a").read_text() == "one" and shop.changes(dot) == []
    assert stash is not None and stash.startswith("stash/reset-")
    shop.reopen()
    shop.reset(dot, stash, hard=True)
    assert (data / "a").read_text() == "precious"


def test_deleted_branch_leaves_its_uncommitted_state_in_a_stash(shop: Workshop) -> None:
    dot = dots.init_dot(shop.store, "apps", at=None, as_root=False)
    shop.commit(dot, "first")
    shop.checkout(dot, "side", create=True)
    side = Path(os.fsdecode(dots.dot_path(shop.store, "apps@side")))
    (side / "f").write_text("unfinished")
    shop.checkout(dot, "master")
    _, stash = branches.delete_branch(shop.store, dot, "side")
    assert stash is not None and not side.exists()
    branches.create_branch(shop.store, dot, "side", "HEAD")
    fresh = Path(os.fsdecode(dots.dot_path(shop.store, "apps@side")))
    assert not (fresh / "f").exists()
    text = b"".join(history.read_path(shop.store, dot, f"{stash}:__default__/f"))
    assert text == b"unfinished"


def test_uncommitted_state_follows_its_branch(shop: Workshop, dot: DotRow, data: Path) -> None:
    (data / "a").write_text("one")
    shop.commit(dot, "first")
    shop.checkout(dot, "side", create=True)
    (data / "a").write_text("side work")
    (data / "new").write_text("n")
    shop.checkout(dot, "master")
    assert (data / "a").read_text() == "one" and not (data / "new").exists()
    assert shop.changes(dot) == []
    (data / "a").write_text("master work")
    shop.checkout(dot, "side")
    assert (data / "a").read_text() == "side work" and (data / "new").exists()
    assert shop.changes(dot) == [("*", b"__default__/a"), ("+", b"__default__/new")]
    shop.commit(dot, "side committed")
    assert shop.messages(dot) == ["first", "side committed"]
    shop.checkout(dot, "master")
    assert (data / "a").read_text() == "master work"
    assert shop.messages(dot) == ["first"]


def test_checkout_of_unknown_or_existing_branch(shop: Workshop, dot: DotRow, data: Path) -> None:
    shop.commit(dot, "first")
    with pytest.raises(RevisionNotFound, match="Branch does not exist: nope"):
        shop.checkout(dot, "nope")
    shop.checkout(dot, "side", create=True)
    with pytest.raises(AlreadyExists, match="Branch already exists: side"):
        shop.checkout(dot, "side", create=True)


def test_unborn_branch_has_nothing_to_branch_from(shop: Workshop, dot: DotRow) -> None:
    with pytest.raises(RevisionNotFound):
        shop.checkout(dot, "side", create=True)
    assert shop.messages(dot) == []


def test_half_switched_tree_is_finished_first(shop: Workshop, dot: DotRow, data: Path) -> None:
    (data / "a").write_text("one")
    first = shop.commit(dot, "first").commit
    (data / "a").write_text("two")
    (data / "b").write_text("b")
    shop.commit(dot, "second")
    with shop.store.transaction("reset") as tx:
        tx.append(TreeSwitchStarted(dot.dot, "master", None, first, "as if killed here"))
    (data / "b").unlink()  # half way
    (data / "mine").write_text("written after the kill")
    shop.reopen()
    assert trees.status(shop.store, dot.dot).switching
    with switching.ready(shop.store, dot.dot):
        pass
    assert (data / "a").read_text() == "one" and os.listdir(data) == ["a"]
    (stash,) = [ref.name for ref in shop.store.catalog.refs(dot.dot, "stash/")]
    text = b"".join(history.read_path(shop.store, dot, f"{stash}:__default__/mine"))
    assert text == b"written after the kill"


def test_directory_that_is_not_the_attached_one_is_refused(
    shop: Workshop, dot: DotRow, data: Path
) -> None:
    (data / "a").write_text("one")
    shop.commit(dot, "first")
    data.rename(data.with_name("elsewhere"))
    with pytest.raises(CaptureFailed):
        shop.commit(dot, "gone")
    data.mkdir()
    (data / "x").write_text("other disk")
    with pytest.raises(CaptureFailed, match="not the directory"):
        shop.commit(dot, "other")
    shop.commit(dot, "told", accept_moved_tree=True)
    shop.commit(dot, "recorded now")


def test_emptied_subdot_is_refused(shop: Workshop, dot: DotRow, data: Path) -> None:
    (data / "a").write_text("one")
    shop.commit(dot, "first")
    (data / "a").unlink()
    with pytest.raises(CaptureFailed, match="__default__"):
        shop.commit(dot, "emptied")
    shop.commit(dot, "told", accept_moved_tree=True)


def test_a_managed_tree_that_is_gone_is_no_tree_yet_to_be_made(shop: Workshop) -> None:
    dot = dots.init_dot(shop.store, "apps", at=None, as_root=False)
    root = Path(os.fsdecode(dots.dot_path(shop.store, "apps.__root__")))
    shutil.rmtree(root)
    shop.commit(dot, "nothing was in it")
    (root / "__default__" / "a").write_text("one")
    first = shop.commit(dot, "first").commit
    shutil.rmtree(root)
    assert isinstance(trees.status(shop.store, dot.dot).problem, CaptureFailed)
    with pytest.raises(CaptureFailed, match="is gone"):
        shop.commit(dot, "gone")
    assert not root.exists()
    assert trees.branch_tip(shop.store, dot.dot, "master") == first
    shop.commit(dot, "told", accept_moved_tree=True)
    assert (root / "__default__" / "a").read_text() == "one"
    shutil.rmtree(root)
    dots.dot_path(shop.store, "apps")
    shop.commit(dot, "written out again")
    assert shop.changes(dot) == []


def test_attaching_twice_or_within_the_store_is_refused(
    shop: Workshop, dot: DotRow, data: Path
) -> None:
    for place in (data, Path(shop.store.home) / "dots", Path(shop.store.home).parent):
        with pytest.raises(UsageError):
            dots.init_dot(shop.store, "other", at=str(place), as_root=False)
    assert [row.name for row in shop.store.catalog.dots()] == ["shop"]


def test_managed_dot_has_a_tree_per_branch_and_subdots(shop: Workshop) -> None:
    dot = dots.init_dot(shop.store, "apps", at=None, as_root=False)
    frogs = Path(os.fsdecode(dots.dot_path(shop.store, "apps.frogs")))
    (frogs / "f").write_text("frog")
    (Path(os.fsdecode(dots.dot_path(shop.store, "apps"))) / "d").write_text("default")
    shop.commit(dot, "first")
    shop.checkout(dot, "side", create=True)
    side = Path(os.fsdecode(dots.dot_path(shop.store, "apps.__root__")))
    assert (side / "frogs/f").read_text() == "frog" and (side / "__default__/d").exists()
    (side / "frogs/f").write_text("changed")
    shop.checkout(dot, "master")
    assert (frogs / "f").read_text() == "frog"
    assert Path(os.fsdecode(dots.dot_path(shop.store, "apps@side.frogs"))) == side / "frogs"


def test_deleted_dot_frees_its_name_and_leaves_the_attached_directory(
    shop: Workshop, dot: DotRow, data: Path
) -> None:
    (data / "a").write_text("one")
    shop.commit(dot, "first")
    dots.delete_dot(shop.store, "shop")
    assert (data / "a").read_text() == "one"
    with pytest.raises(DotNotFound, match="No such filesystem"):
        dots.delete_dot(shop.store, "shop")
    again = shop.attach("shop", data)
    assert again.dot != dot.dot and shop.messages(again) == []


def test_dot_is_found_by_default_only_when_it_is_clear(shop: Workshop, tmp_path: Path) -> None:
    with pytest.raises(DotNotFound, match="No current dot is selected"):
        resolve_dot(shop.store, None)
    first = shop.attach("one", tmp_path / "1")
    assert resolve_dot(shop.store, None).dot == first.dot
    second = shop.attach("two", tmp_path / "2")
    assert resolve_dot(shop.store, None).dot == second.dot
    dots.delete_dot(shop.store, "two")
    shop.attach("three", tmp_path / "3")
    dots.delete_dot(shop.store, "three")
    assert resolve_dot(shop.store, None).dot == first.dot


def test_deleted_branch_stays_in_the_store(shop: Workshop, dot: DotRow, data: Path) -> None:
    (data / "a").write_text("one")
    shop.commit(dot, "first")
    shop.checkout(dot, "side", create=True)
    (data / "a").write_text("two")
    tip = shop.commit(dot, "second").commit
    assert tip is not None
    with pytest.raises(WouldLose):
        branches.delete_branch(shop.store, dot, "side")
    shop.checkout(dot, "master")
    assert branches.delete_branch(shop.store, dot, "side") == (tip, None)
    assert [b.name for b in branches.list_branches(shop.store, dot)] == ["master"]
    assert history.resolve_revision(shop.store, dot, tip.hex()) == tip


def test_revisions_name_commits(shop: Workshop, dot: DotRow, data: Path) -> None:
    ids = [shop.commit(dot, f"c{number}").commit for number in range(5)]
    resolve = history.resolve_revision

    def at(text: str) -> int:
        return ids.index(resolve(shop.store, dot, text))

    assert [at(t) for t in ("HEAD", "@", "master", "HEAD^", "HEAD~3", "HEAD^^~1", "HEAD@{2}")] == [
        4, 4, 4, 3, 1, 1, 2,
    ]  # fmt: skip
    assert at(ids[2].hex()[:12]) == 2  # type: ignore[union-attr]
    for bad in ("HEAD~5", "HEAD^2", "nope", "ffff", "HEAD@{9}"):
        with pytest.raises(RevisionNotFound):
            resolve(shop.store, dot, bad)
    assert shop.messages(dot, "HEAD~3..HEAD~1") == ["c2", "c3"]


def test_busy_dot_is_reported(shop: Workshop, dot: DotRow) -> None:
    from dmsync.errors import Busy

    with shop.store.dot_locked(dot.dot), pytest.raises(Busy):
        shop.commit(dot, "waits in vain")


def test_what_cannot_be_read_is_not_written_over(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as base:
        os.chmod(base, 0o777)

        def work() -> None:  # root reads everything, so this runs as somebody else
            shop = Workshop(Path(base) / "home")
            data = Path(base) / "data"
            dot = shop.attach("shop", data)
            (data / "a").write_text("one")
            shop.commit(dot, "first")
            (data / "locked").write_text("secret")
            (data / "locked").chmod(0)
            with pytest.raises(WouldLose):
                shop.reset(dot, "HEAD", hard=True)
            assert (data / "locked").exists()
            shop.close()

        as_nobody(work)


def test_switch_that_cannot_be_finished_can_be_replaced(
    shop: Workshop, dot: DotRow, data: Path
) -> None:
    """A kill left the tree half switched to a commit; going back must not need that commit."""
    (data / "a").write_text("one")
    first = shop.commit(dot, "first").commit
    (data / "a").write_text("two")
    shop.commit(dot, "second")
    with shop.store.transaction("reset") as tx:
        tx.append(RefChanged(dot.dot, "branch/master", tip_of(shop, dot), first, "reset"))
        tx.append(TreeSwitchStarted(dot.dot, "master", None, first, "as if killed here"))
    (data / "a").write_text("half")
    summary = shop.reset(dot, "HEAD@{1}", hard=True)
    assert (data / "a").read_text() == "two" and shop.changes(dot) == []
    assert summary.stash is not None
    assert shop.store.catalog.switches(dot.dot) == []


def test_damaged_target_is_found_before_anything_changes(
    shop: Workshop, dot: DotRow, data: Path
) -> None:
    content = os.urandom(1 << 20)
    (data / "big").write_bytes(content)
    shop.commit(dot, "first")
    (data / "big").write_bytes(b"small")
    tip = shop.commit(dot, "second").commit
    first_pack = shop.store.objects(dot.dot).packs()[0].name
    path = Path(shop.store.layout.packs_dir(dot.dot)) / first_pack
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.chmod(0o600)
    path.write_bytes(damaged)
    shop.reopen()
    with pytest.raises(Corruption):
        shop.reset(dot, "HEAD^", hard=True)
    assert (data / "big").read_bytes() == b"small" and shop.changes(dot) == []
    assert tip_of(shop, dot) == tip
    shop.commit(dot, "goes on")


def test_lost_directory_is_written_out_again_when_told(
    shop: Workshop, dot: DotRow, data: Path
) -> None:
    (data / "a").write_text("one")
    shop.commit(dot, "first")
    data.rename(data.with_name("elsewhere"))
    assert isinstance(trees.status(shop.store, dot.dot).problem, CaptureFailed)
    with pytest.raises(CaptureFailed):
        shop.reset(dot, "HEAD", hard=True)
    branches.reset(shop.store, dot, "HEAD", hard=True, accept_moved_tree=True)
    assert (data / "a").read_text() == "one" and shop.changes(dot) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes devices")
def test_devices_and_setuid_come_back_only_when_trusted(
    shop: Workshop, dot: DotRow, data: Path
) -> None:
    (data / "tool").write_text("#!/bin/sh")
    (data / "tool").chmod(0o4755)
    os.mknod(data / "null", 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    shop.commit(dot, "first")
    (data / "tool").write_text("changed")
    (data / "null").unlink()
    shop.commit(dot, "second")
    told = shop.reset(dot, "HEAD^", hard=True)
    assert told.withheld == (b"__default__/null",) and not (data / "null").exists()
    assert told.unapplied == (b"__default__/tool",)
    assert shop.changes(dot) == []  # what is recorded stands behind what is applied
    shop.reset(dot, "HEAD@{1}", hard=True)
    told = branches.reset(shop.store, dot, "HEAD@{1}", hard=True, trusted=True)
    assert told.withheld == () and told.unapplied == ()
    assert (data / "tool").stat().st_mode & 0o7777 == 0o4755
    assert stat.S_ISCHR((data / "null").stat().st_mode)


def tip_of(shop: Workshop, dot: DotRow) -> ObjectId | None:
    return trees.branch_tip(shop.store, dot.dot, shop.store.catalog.head(dot.dot))


def test_tree_is_not_switched_under_a_process_that_writes_in_it(
    shop: Workshop, dot: DotRow, data: Path
) -> None:
    (data / "db").write_text("one")
    shop.commit(dot, "first")
    (data / "db").write_text("two")
    shop.commit(dot, "second")
    keep_open = (
        "import sys; f = open(sys.argv[1], sys.argv[2]); print(1, flush=True); sys.stdin.read()"
    )
    for mode, refused in (("r", False), ("r+", True)):
        user = subprocess.Popen(
            [sys.executable, "-c", keep_open, str(data / "db"), mode],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert user.stdout and user.stdout.readline()
        try:
            if refused:
                with pytest.raises(WouldLose, match=str(user.pid)):
                    shop.reset(dot, "HEAD@{1}", hard=True)
                branches.reset(shop.store, dot, "HEAD@{1}", hard=True, in_use=True)
                assert (data / "db").read_text() == "two"
            else:
                shop.reset(dot, "HEAD^", hard=True)
                assert (data / "db").read_text() == "one"
        finally:
            user.communicate(b"")
