"""Every command that moves work is taken back as a whole: refs, branch and trees as before."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from dmsync.engine import dots, stashes, switching
from dmsync.engine.carrying import CarryRequest, checkout_carrying
from dmsync.engine.path_restore import PathRestoreRequest, restore_paths
from dmsync.engine.stashes import TreeWishes
from dmsync.engine.transplant import TransplantRequest, cherry_pick, revert
from dmsync.engine.undoing.lifecycle import UndoRequest, redo, undo
from dmsync.storage.catalog import DotRow
from tests.support.tree import describe_tree
from tests.support.working_store import Workshop

Act = Callable[[Workshop, DotRow], object]

ON_DIRTY_TREES: dict[str, Act] = {
    "restore": lambda shop, dot: restore_paths(
        shop.store, dot, PathRestoreRequest("HEAD~1", (b"__default__/a",))
    ),
    "restore --delete": lambda shop, dot: restore_paths(
        shop.store, dot, PathRestoreRequest("HEAD", (b".",), delete=True)
    ),
    "stash push": lambda shop, dot: stashes.push_stash(shop.store, dot, "m", TreeWishes()),
    "carry to a new branch": lambda shop, dot: checkout_carrying(
        shop.store, dot, CarryRequest("new", create=True)
    ),
    "carry to another commit": lambda shop, dot: checkout_carrying(
        shop.store, dot, CarryRequest("side")
    ),
    "amend": lambda shop, dot: shop.commit(dot, "x", amend=True),
}
ON_CLEAN_TREES: dict[str, Act] = {
    "pop": lambda shop, dot: stashes.apply_stash(shop.store, dot, "0", TreeWishes(), drop=True),
    "pop, merged": lambda shop, dot: stashes.apply_stash(
        shop.store, dot, "1", TreeWishes(), drop=True
    ),
    "drop": lambda shop, dot: stashes.drop_stash(shop.store, dot, "1"),
    "branch from a stash": lambda shop, dot: stashes.branch_stash(
        shop.store, dot, "from-stash", "1", TreeWishes()
    ),
    "cherry-pick": lambda shop, dot: cherry_pick(shop.store, dot, TransplantRequest(("side",))),
    "revert": lambda shop, dot: revert(shop.store, dot, TransplantRequest(("HEAD",))),
}


@pytest.fixture(params=["attached", "managed"])
def dot(request: pytest.FixtureRequest, shop: Workshop, tmp_path: Path) -> DotRow:
    """Branch side beside master, both with commits of their own; the tree is dirty."""
    if request.param == "attached":
        dot = shop.attach("shop", tmp_path / "data")
    else:
        dot = dots.init_dot(shop.store, "shop", at=None, as_root=False)
    write(shop, dot, tmp_path, a="1", b="1")
    shop.commit(dot, "first")
    shop.checkout(dot, "side", create=True)
    write(shop, dot, tmp_path, b="side")
    shop.commit(dot, "side")
    shop.checkout(dot, "master")
    write(shop, dot, tmp_path, a="2")
    shop.commit(dot, "second")
    write(shop, dot, tmp_path, new="new")
    return dot


def write(shop: Workshop, dot: DotRow, tmp_path: Path, **files: str) -> None:
    place = switching.make_place(shop.store, dot.dot, shop.store.catalog.head(dot.dot), None)
    tree = Path(os.fsdecode(place.path))
    if not place.attached:
        tree /= "__default__"
    for name, content in files.items():
        (tree / name).write_text(content)


def state(shop: Workshop, dot: DotRow, tmp_path: Path) -> tuple[object, ...]:
    """Refs, the current branch, saved states and every tree; not what undo itself stored."""
    catalog = shop.store.catalog
    refs = [(row.name, row.target) for row in catalog.refs(dot.dot)]
    if catalog.tree(dot.dot) is not None:
        found = {"": describe_tree(tmp_path / "data")}
    else:
        trees_dir = Path(shop.store.layout.trees_dir(dot.dot))
        found = {tree.name: describe_tree(tree) for tree in trees_dir.iterdir()}
    return (
        sorted(ref for ref in refs if not ref[0].startswith(("stash/undo-", "stash/redo-"))),
        catalog.head(dot.dot),
        [row.branch for row in catalog.working_snapshots(dot.dot)],
        catalog.switches(dot.dot),
        found,
    )


def check_taken_back(shop: Workshop, dot: DotRow, tmp_path: Path, act: Act) -> None:
    before = state(shop, dot, tmp_path)
    act(shop, dot)
    after = state(shop, dot, tmp_path)
    assert after != before
    list(undo(shop.store, 1, UndoRequest()))
    assert state(shop, dot, tmp_path) == before
    list(redo(shop.store, 1, UndoRequest()))
    assert state(shop, dot, tmp_path)[1:] == after[1:]
    list(undo(shop.store, 1, UndoRequest()))
    assert state(shop, dot, tmp_path) == before


@pytest.mark.parametrize("name", ON_DIRTY_TREES)
def test_with_uncommitted_changes(shop: Workshop, dot: DotRow, tmp_path: Path, name: str) -> None:
    check_taken_back(shop, dot, tmp_path, ON_DIRTY_TREES[name])


def test_what_was_carried_to_a_new_branch_is_not_stored_again(
    shop: Workshop, dot: DotRow, tmp_path: Path
) -> None:
    checkout_carrying(shop.store, dot, CarryRequest("new", create=True))
    after = state(shop, dot, tmp_path)
    (taken,) = undo(shop.store, 1, UndoRequest())
    assert taken.stashes == ()
    list(redo(shop.store, 1, UndoRequest()))
    assert state(shop, dot, tmp_path) == after
    write(shop, dot, tmp_path, new="edited since")
    edited = state(shop, dot, tmp_path)
    (taken,) = undo(shop.store, 1, UndoRequest())
    assert len(taken.stashes) == 1
    list(redo(shop.store, 1, UndoRequest()))
    assert state(shop, dot, tmp_path) == edited


@pytest.mark.parametrize("name", ON_CLEAN_TREES)
def test_with_a_clean_tree_and_two_stashes(
    shop: Workshop, dot: DotRow, tmp_path: Path, name: str
) -> None:
    stashes.push_stash(shop.store, dot, "older", TreeWishes())
    write(shop, dot, tmp_path, third="3")
    shop.commit(dot, "third")
    write(shop, dot, tmp_path, b="again")
    stashes.push_stash(shop.store, dot, "newer", TreeWishes())
    check_taken_back(shop, dot, tmp_path, ON_CLEAN_TREES[name])
