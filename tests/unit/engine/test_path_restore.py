"""Restore of single paths: what comes back, what stays, what is refused, what is kept."""

import os
import stat
import time
from pathlib import Path

import pytest

from dmsync.core.events import TreeSwitchStarted
from dmsync.core.pages import find_path
from dmsync.engine import branches, dots, history, switching, trees
from dmsync.engine.path_restore import PathRestoreRequest, PathRestoreSummary, restore_paths
from dmsync.errors import CaptureFailed, PathNotFound, RevisionNotFound, UsageError, WouldLose
from dmsync.storage.catalog import DotRow
from tests.support.tree import describe_tree
from tests.support.working_store import Workshop


def restore(
    shop: Workshop, dot: DotRow, *paths: str, revision: str = "HEAD", **wishes: bool
) -> PathRestoreSummary:
    given = tuple(f"__default__/{path}".encode() if path != "." else b"." for path in paths)
    request = PathRestoreRequest(revision, given, **wishes)
    return restore_paths(shop.store, dot, request)


def told(summary: PathRestoreSummary) -> list[tuple[str, str]]:
    return [(c.kind, c.path.decode().removeprefix("__default__/")) for c in summary.changes]


def in_snapshot(shop: Workshop, dot: DotRow, revision: str, path: str) -> bytes:
    return b"".join(history.read_path(shop.store, dot, f"{revision}:__default__/{path}"))


def test_a_file_comes_back_and_the_rest_stays(shop: Workshop, dot: DotRow, data: Path) -> None:
    (data / "a").write_text("one")
    (data / "b").write_text("one")
    first = shop.commit(dot, "first").commit
    (data / "a").write_text("two")
    shop.commit(dot, "second")
    (data / "a").write_text("uncommitted a")
    (data / "b").write_text("uncommitted b")
    (data / "new").write_text("new")
    summary = restore(shop, dot, "a", revision="HEAD~1")
    assert told(summary) == [("*", "a")]
    assert summary.commit == first
    assert (data / "a").read_text() == "one"
    assert (data / "b").read_text() == "uncommitted b"
    assert (data / "new").read_text() == "new"
    assert shop.messages(dot) == ["first", "second"]
    assert summary.stash is not None and summary.stash.startswith("stash/restore-")
    assert in_snapshot(shop, dot, summary.stash, "a") == b"uncommitted a"
    assert shop.store.catalog.switches(dot.dot) == []


def test_metadata_of_files_and_missing_parents_comes_back(
    shop: Workshop, dot: DotRow, data: Path
) -> None:
    deep = data / "x" / "y" / "z"
    deep.mkdir(parents=True)
    (deep / "file").write_text("deep")
    (data / "x" / "other").write_text("other")
    os.chmod(deep / "file", 0o640)
    os.setxattr(deep / "file", "user.colour", b"blue\0")
    os.chmod(data / "x", 0o711)
    os.utime(deep, ns=(1, 1_234_567_890_123_456_789))
    shop.commit(dot, "first")
    before = describe_tree(data)
    for path in (deep / "file", data / "x" / "other"):
        path.unlink()
    for path in (deep, deep.parent, data / "x"):
        path.rmdir()
    summary = restore(shop, dot, "x/y/z/file")
    assert told(summary) == [("+", "x"), ("+", "x/y"), ("+", "x/y/z"), ("+", "x/y/z/file")]
    after = describe_tree(data)
    for name in (b"x/y/z/file", b"x/y/z", b"x/y", b"x"):
        assert after[name] == before[name], name
    assert b"x/other" not in after
    assert shop.changes(dot) == [("-", b"__default__/x/other")]


def test_restoring_everything_makes_the_tree_clean_and_says_so_twice(
    shop: Workshop, dot: DotRow, data: Path
) -> None:
    (data / "a").write_text("one")
    (data / "d").mkdir()
    (data / "d" / "b").write_text("two")
    shop.commit(dot, "first")
    (data / "a").unlink()
    (data / "d" / "b").write_text("changed")
    summary = restore(shop, dot, ".")
    assert told(summary) == [("+", "a"), ("*", "d/b")]
    assert shop.changes(dot) == []
    assert restore(shop, dot, ".").changes == ()
    assert len(shop.store.catalog.refs(dot.dot, "stash/")) == 1


def test_nothing_is_removed_without_delete(shop: Workshop, dot: DotRow, data: Path) -> None:
    (data / "d").mkdir()
    (data / "d" / "old").write_text("old")
    shop.commit(dot, "first")
    (data / "d" / "old").write_text("changed")
    (data / "d" / "new").write_text("new")
    before = describe_tree(data)
    with pytest.raises(WouldLose, match="__default__/d/new") as refused:
        restore(shop, dot, "d")
    assert refused.value.exit_code == 18
    with pytest.raises(PathNotFound, match="__default__/d/new") as absent:
        restore(shop, dot, "d/new")
    assert "--delete" in absent.value.hint
    assert describe_tree(data) == before
    assert shop.store.catalog.refs(dot.dot, "stash/") == []
    summary = restore(shop, dot, "d", delete=True)
    assert told(summary) == [("-", "d/new"), ("*", "d/old")]
    assert not (data / "d" / "new").exists()
    assert summary.stash is not None
    assert in_snapshot(shop, dot, summary.stash, "d/new") == b"new"


def test_a_kind_that_changed_comes_back(shop: Workshop, dot: DotRow, data: Path) -> None:
    (data / "d").mkdir()
    (data / "d" / "f").write_text("inside")
    (data / "link").symlink_to("d")
    shop.commit(dot, "first")
    (data / "d" / "f").unlink()
    (data / "d").rmdir()
    (data / "d").write_text("a file now")
    (data / "link").unlink()
    (data / "link").mkdir()
    (data / "link" / "x").write_text("x")
    restore(shop, dot, "d/f")
    assert (data / "d" / "f").read_text() == "inside"
    with pytest.raises(WouldLose, match="link/x"):
        restore(shop, dot, "link")
    restore(shop, dot, "link", delete=True)
    assert os.readlink(data / "link") == "d"
    assert shop.changes(dot) == []


def test_a_dry_run_changes_nothing(shop: Workshop, dot: DotRow, data: Path) -> None:
    (data / "a").write_text("one")
    shop.commit(dot, "first")
    (data / "a").write_text("two")
    (data / "b").write_text("b")
    seq = shop.store.catalog.last_seq()
    summary = restore(shop, dot, "a", "b", delete=True, dry_run=True)
    assert told(summary) == [("*", "a"), ("-", "b")]
    assert (data / "a").read_text() == "two" and (data / "b").exists()
    assert shop.store.catalog.last_seq() == seq


@pytest.mark.parametrize("path", [b"", b"a//b", b"../etc", b"__default__/../x", b"a/./b", b"a\0b"])
def test_what_is_no_path_is_refused(shop: Workshop, dot: DotRow, data: Path, path: bytes) -> None:
    (data / "a").write_text("one")
    shop.commit(dot, "first")
    with pytest.raises(UsageError):
        restore_paths(shop.store, dot, PathRestoreRequest("HEAD", (path,)))


def test_unknown_paths_and_revisions_are_refused(shop: Workshop, dot: DotRow, data: Path) -> None:
    (data / "a").write_text("one")
    with pytest.raises(RevisionNotFound):
        restore(shop, dot, "a")
    shop.commit(dot, "first")
    with pytest.raises(PathNotFound, match="__default__/no"):
        restore(shop, dot, "a", "no", delete=True)
    with pytest.raises(RevisionNotFound):
        restore(shop, dot, "a", revision="nowhere")


def test_a_subdot_outside_the_attached_directory_is_refused(
    shop: Workshop, dot: DotRow, data: Path
) -> None:
    (data / "a").write_text("one")
    shop.commit(dot, "first")
    with pytest.raises(UsageError, match="holds the subdot __default__ alone"):
        restore_paths(shop.store, dot, PathRestoreRequest("HEAD", (b"database/x",)))


def test_a_whole_subdot_of_a_managed_dot(shop: Workshop) -> None:
    dot = dots.init_dot(shop.store, "managed", at=None, as_root=False)
    place = switching.make_place(shop.store, dot.dot, "master", None)
    root = Path(os.fsdecode(place.path))
    (root / "db").mkdir()
    (root / "db" / "rows").write_text("rows")
    (root / "__default__" / "a").write_text("a")
    shop.commit(dot, "first")
    (root / "db" / "rows").unlink()
    (root / "db").rmdir()
    (root / "__default__" / "a").write_text("changed")
    request = PathRestoreRequest("HEAD", (b"db/", b"db/rows"))
    summary = restore_paths(shop.store, dot, request)
    assert [(c.kind, c.path) for c in summary.changes] == [("+", b"db"), ("+", b"db/rows")]
    assert (root / "db" / "rows").read_text() == "rows"
    assert (root / "__default__" / "a").read_text() == "changed"


def test_a_root_dot_keeps_its_own_metadata(shop: Workshop, tmp_path: Path) -> None:
    tree = tmp_path / "whole"
    dot = shop.attach("whole", tree, as_root=True)
    (tree / "etc").mkdir()
    (tree / "etc" / "conf").write_text("old")
    os.chmod(tree, 0o750)
    shop.commit(dot, "first")
    (tree / "etc" / "conf").write_text("new")
    os.chmod(tree, 0o700)
    summary = restore_paths(shop.store, dot, PathRestoreRequest("HEAD", (b"etc/conf",)))
    assert [(c.kind, c.path) for c in summary.changes] == [("*", b"etc/conf")]
    assert (tree / "etc" / "conf").read_text() == "old"
    assert tree.stat().st_mode & 0o7777 == 0o700


def test_a_moved_tree_is_refused(shop: Workshop, dot: DotRow, data: Path) -> None:
    (data / "a").write_text("one")
    shop.commit(dot, "first")
    data.rename(data.with_name("moved"))
    data.mkdir()
    with pytest.raises(CaptureFailed):
        restore(shop, dot, "a")
    assert list(data.iterdir()) == []
    restore(shop, dot, "a", accept_moved_tree=True)
    assert (data / "a").read_text() == "one"


# --- hardlinks ---------------------------------------------------------------------------------


def links(data: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in sorted(data.iterdir())}


def test_a_linked_name_comes_back_alone(shop: Workshop, dot: DotRow, data: Path) -> None:
    (data / "a").write_text("one")
    for name in ("b", "c"):
        os.link(data / "a", data / name)
    shop.commit(dot, "first")
    (data / "a").write_text("two")  # all three names
    shop.commit(dot, "second")
    restore(shop, dot, "a", revision="HEAD~1")
    assert (data / "a").read_text() == "one"
    assert (data / "b").read_text() == (data / "c").read_text() == "two"
    inodes = links(data)
    assert inodes["b"] == inodes["c"] != inodes["a"]
    assert shop.changes(dot) == [
        ("*", b"__default__/a"), ("*", b"__default__/b"), ("*", b"__default__/c")
    ]  # fmt: skip
    restore(shop, dot, "b", "c", revision="HEAD~1")
    assert (data / "c").read_text() == "one"
    assert len(set(links(data).values())) == 1
    check_capture_agrees(shop, dot)


def check_capture_agrees(shop: Workshop, dot: DotRow) -> None:
    """What the journal says the tree holds is what reading it all again finds."""
    place = trees.require_place(shop.store, dot.dot, "master")
    from dmsync.storage.stat_cache import StatCache

    cache = StatCache.load(place.stat_path)
    assert cache is not None
    os.unlink(place.stat_path)
    with shop.store.objects(dot.dot).writer() as writer:
        assert trees.capture(shop.store, dot.dot, place, writer, None).root == cache.root


def test_a_lost_name_is_linked_again(shop: Workshop, dot: DotRow, data: Path) -> None:
    (data / "a").write_text("one")
    os.link(data / "a", data / "b")
    shop.commit(dot, "first")
    for name in ("a", "b"):
        (data / name).unlink()
        restore(shop, dot, name)
        assert shop.changes(dot) == []
        assert len(set(links(data).values())) == 1
        check_capture_agrees(shop, dot)


def test_removing_the_first_name_of_a_group(shop: Workshop, dot: DotRow, data: Path) -> None:
    (data / "z").write_text("z")
    shop.commit(dot, "first")
    (data / "a").write_text("one")
    for name in ("b", "c"):
        os.link(data / "a", data / name)
    shop.commit(dot, "second")
    restore(shop, dot, "a", revision="HEAD~1", delete=True)
    inodes = links(data)
    assert set(inodes) == {"b", "c", "z"} and inodes["b"] == inodes["c"]
    check_capture_agrees(shop, dot)


def test_a_group_in_a_directory_comes_back_linked(shop: Workshop, dot: DotRow, data: Path) -> None:
    (data / "d").mkdir()
    (data / "d" / "a").write_text("one")
    os.link(data / "d" / "a", data / "d" / "b")
    os.link(data / "d" / "a", data / "outside")
    shop.commit(dot, "first")
    for name in ("a", "b"):
        (data / "d" / name).unlink()
        (data / "d" / name).write_text(f"new {name}")
    (data / "outside").write_text("two")
    restore(shop, dot, "d")
    assert (data / "d" / "a").stat().st_ino == (data / "d" / "b").stat().st_ino
    assert (data / "d" / "a").read_text() == "one" and (data / "outside").read_text() == "two"
    check_capture_agrees(shop, dot)


# --- kills and other processes -------------------------------------------------------------------


def test_a_restore_cut_short_is_finished_by_the_next_command(
    shop: Workshop, dot: DotRow, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (data / "a").write_text("one")
    (data / "b").write_text("one")
    shop.commit(dot, "first")
    (data / "a").write_text("two")
    (data / "b").write_text("two")
    time.sleep(0.02)

    def killed(*arguments: object, **more: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(switching, "_restore", killed)
        with pytest.raises(KeyboardInterrupt):
            restore(shop, dot, "a")
    shop.reopen()
    (switch,) = shop.store.catalog.switches(dot.dot)
    assert (data / "a").read_text() == "two"
    with switching.ready(shop.store, dot.dot):
        pass
    assert (data / "a").read_text() == "one" and (data / "b").read_text() == "two"
    root = trees.snapshot_root(shop.store, dot.dot, switch.to_root_commit)
    entry = find_path(shop.store.objects(dot.dot), root, b"__default__/a")
    assert entry is not None and entry.size == 3
    assert shop.store.catalog.switches(dot.dot) == []


def test_one_operation_carries_stash_and_switch(shop: Workshop, dot: DotRow, data: Path) -> None:
    (data / "a").write_text("one")
    shop.commit(dot, "first")
    (data / "a").write_text("two")
    summary = restore(shop, dot, "a")
    switch, began = shop.store.catalog.operations(2)
    events = shop.store.catalog.events_of(began).events
    kinds = [type(event).__name__ for event in events]
    assert kinds == ["CommitsAdded", "RefChanged", "TreeSwitchStarted"]
    assert [type(event).__name__ for event in shop.store.catalog.events_of(switch).events] == [
        "TreeSwitchFinished"
    ]
    started = events[-1]
    assert isinstance(started, TreeSwitchStarted) and not started.discarded
    assert started.to_root_commit == summary.commit  # the tree is what the tip holds


def test_a_tree_in_use_is_refused(shop: Workshop, dot: DotRow, data: Path) -> None:
    import subprocess
    import sys

    (data / "a").write_text("one")
    shop.commit(dot, "first")
    (data / "a").write_text("two")
    script = "import sys; f = open(sys.argv[1], 'r+'); print('open', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", script, str(data / "a")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as user:  # fmt: skip
        assert user.stdout is not None
        user.stdout.readline()
        with pytest.raises(WouldLose, match="open for writing"):
            restore(shop, dot, "a")
        assert (data / "a").read_text() == "two"
        restore(shop, dot, "a", in_use=True)
        assert user.stdin is not None
        user.stdin.close()
    assert (data / "a").read_text() == "one"


@pytest.mark.skipif(os.geteuid() != 0, reason="makes devices")
def test_what_an_untrusted_restore_withheld_comes_with_trust(
    shop: Workshop, dot: DotRow, data: Path
) -> None:
    (data / "su").write_text("x")
    (data / "plain").write_text("x")
    os.chmod(data / "su", 0o4755)
    os.mknod(data / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    shop.commit(dot, "first")
    os.remove(data / "su")
    os.remove(data / "null")
    withheld = restore(shop, dot, ".")
    assert withheld.withheld == (b"__default__/null",)
    assert withheld.unapplied == (b"__default__/su",)
    would = restore(shop, dot, ".", trusted=True, dry_run=True)
    assert would.trusted == (b"__default__/null", b"__default__/su")
    assert not (data / "null").exists()
    summary = restore(shop, dot, ".", trusted=True)
    assert (summary.changes, summary.trusted) == ((), would.trusted)
    assert stat.S_ISCHR(os.stat(data / "null").st_mode)
    assert stat.S_IMODE(os.stat(data / "su").st_mode) == 0o4755
    assert restore(shop, dot, "plain", trusted=True).trusted == ()


@pytest.mark.skipif(os.geteuid() != 0, reason="sets foreign bits")
def test_reset_with_trust_applies_what_a_restore_withheld(
    shop: Workshop, dot: DotRow, data: Path
) -> None:
    (data / "su").write_text("x")
    os.chmod(data / "su", 0o4755)
    shop.commit(dot, "first")
    os.remove(data / "su")
    restore(shop, dot, "su")
    assert stat.S_IMODE(os.stat(data / "su").st_mode) == 0o755
    branches.reset(shop.store, dot, "HEAD", hard=True, trusted=True)
    assert stat.S_IMODE(os.stat(data / "su").st_mode) == 0o4755
