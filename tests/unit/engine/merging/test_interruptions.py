"""A merge killed at any moment: the next command finishes it, and it goes on or is given up."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from dmsync.engine import commits, restore, switching, trees
from dmsync.engine.merging import lifecycle
from dmsync.engine.merging.lifecycle import MergeOptions
from dmsync.engine.merging.resolution import resolve_conflicts
from dmsync.engine.store import Store
from dmsync.errors import NotFound
from dmsync.storage.catalog import DotRow
from dmsync.storage.pack_writer import PackWriter
from tests.support.working_store import Workshop

MERGED = {"a": b"\0 theirs", "b": b"2", "c": b"ours"}
OURS = {"a": b"\0 ours", "b": b"1", "c": b"ours"}


@pytest.fixture
def workshop(tmp_path: Path):
    made = Workshop(tmp_path / "home")
    yield made
    made.close()


@pytest.fixture
def dot(workshop: Workshop, tmp_path: Path) -> DotRow:
    root = tmp_path / "tree"
    made = workshop.attach("app", root)
    (root / "a").write_bytes(b"\0 base")
    (root / "b").write_bytes(b"1")
    workshop.commit(made, "base")
    workshop.checkout(made, "other", create=True)
    (root / "a").write_bytes(b"\0 theirs")
    (root / "b").write_bytes(b"2")
    workshop.commit(made, "theirs")
    workshop.checkout(made, "master")
    (root / "a").write_bytes(b"\0 ours")
    (root / "c").write_bytes(b"ours")
    workshop.commit(made, "ours")
    return made


def files(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.iterdir()}


def killed(
    workshop: Workshop, patch: Callable[[pytest.MonkeyPatch], None], work: Callable[[], object]
) -> None:
    """Do `work` in a child that kills itself where `patch` says; go on with the store it left."""
    home = workshop.store.home
    workshop.close()
    child = os.fork()  # with nothing open: the child must not share locks with us
    if child == 0:
        try:
            workshop.store = Store.open(home, workshop.settings)
            patch(pytest.MonkeyPatch())
            work()
        finally:
            os._exit(7)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    workshop.store = Store.open(home, workshop.settings)


def dies(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before_sealing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PackWriter, "seal", dies)


def after_recording(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(switching, "complete_switch", dies)


def in_the_middle_of_the_tree(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(restore._Restore, "_finish_directories", dies)


def at_the_first_file(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(restore._Restore, "_restore_names", dies)


def before_the_end_is_recorded(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(switching, "TreeSwitchFinished", dies)


MOMENTS = [
    after_recording,
    at_the_first_file,
    in_the_middle_of_the_tree,
    before_the_end_is_recorded,
]


def start(workshop: Workshop, dot: DotRow):
    return lifecycle.merge_revision(workshop.store, dot, MergeOptions("other"))


def test_killed_before_anything_is_recorded_nothing_happened(workshop, dot, tmp_path) -> None:
    killed(workshop, before_sealing, lambda: start(workshop, dot))
    with pytest.raises(NotFound):
        lifecycle.abort_merge(workshop.store, dot)
    assert files(tmp_path / "tree") == OURS
    assert start(workshop, dot).outcome == "conflicts"


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_start_is_continued(workshop, dot, tmp_path, moment) -> None:
    killed(workshop, moment, lambda: start(workshop, dot))
    resolve_conflicts(workshop.store, dot, None, "theirs")
    lifecycle.continue_merge(workshop.store, dot)
    assert files(tmp_path / "tree") == MERGED
    assert workshop.changes(dot) == []
    tip = trees.branch_tip(workshop.store, dot.dot, "master")
    assert len(workshop.store.commit(dot.dot, tip).parents) == 2


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_start_is_aborted(workshop, dot, tmp_path, moment) -> None:
    killed(workshop, moment, lambda: start(workshop, dot))
    lifecycle.abort_merge(workshop.store, dot)
    assert files(tmp_path / "tree") == OURS
    assert workshop.changes(dot) == []


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_abort_is_finished(workshop, dot, tmp_path, moment) -> None:
    start(workshop, dot)
    (tmp_path / "tree" / "a").write_bytes(b"work")
    killed(workshop, moment, lambda: lifecycle.abort_merge(workshop.store, dot))
    with switching.ready(workshop.store, dot.dot):
        pass
    assert files(tmp_path / "tree") == OURS
    assert workshop.store.catalog.merge(dot.dot, "master") is None
    (stash,) = workshop.store.catalog.refs(dot.dot, "stash/merge-abort")
    workshop.reset(dot, stash.name, hard=True)
    assert files(tmp_path / "tree")["a"] == b"work"


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_resolution_is_finished(workshop, dot, tmp_path, moment) -> None:
    start(workshop, dot)
    killed(workshop, moment, lambda: resolve_conflicts(workshop.store, dot, None, "theirs"))
    lifecycle.continue_merge(workshop.store, dot)
    assert files(tmp_path / "tree") == MERGED


def test_a_killed_continue_is_done_again(workshop, dot, tmp_path) -> None:
    start(workshop, dot)
    resolve_conflicts(workshop.store, dot, None, "theirs")
    killed(workshop, before_sealing, lambda: lifecycle.continue_merge(workshop.store, dot))
    lifecycle.continue_merge(workshop.store, dot)
    assert files(tmp_path / "tree") == MERGED
    with pytest.raises(NotFound):
        lifecycle.continue_merge(workshop.store, dot)


def test_a_clean_merge_killed_in_the_middle_is_whole_afterwards(workshop, dot, tmp_path) -> None:
    (tmp_path / "tree" / "a").write_bytes(b"\0 base")
    workshop.commit(dot, "no conflict any more")
    killed(workshop, in_the_middle_of_the_tree, lambda: start(workshop, dot))
    commits.commit(workshop.store, dot, commits.CommitRequest("after the kill"))
    assert files(tmp_path / "tree") == MERGED
    merged = trees.branch_tip(workshop.store, dot.dot, "master")
    (parent,) = workshop.store.commit(dot.dot, merged).parents
    assert len(workshop.store.commit(dot.dot, parent).parents) == 2
