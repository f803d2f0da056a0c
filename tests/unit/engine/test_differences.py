"""Differences of recorded trees: complete, in order, and only differing pages are read."""

import os
from pathlib import Path

import pytest

from dmsync.core.objects import Entry, EntryKind, Layout
from dmsync.core.pages import walk_tree
from dmsync.engine.differences import (
    Change,
    compared,
    tree_differences,
    with_copies,
    with_renames,
)
from tests.support.live_tree import SUBDOT, LiveTree
from tests.support.memory_store import MemoryStore


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def tree(tmp_path: Path, store: MemoryStore) -> LiveTree:
    return LiveTree(tmp_path / "tree", store)  # type: ignore[arg-type]


def shown(changes: list[Change]) -> list[tuple[str, bytes]]:
    return [(c.kind, c.path[len(SUBDOT) + 1 :]) for c in changes]


def file(name: bytes, content: bytes, *, mode: int = 0o644) -> Entry:
    return Entry(
        name, EntryKind.FILE, mode, size=1, content=content.ljust(32), layout=Layout.SINGLE
    )


def test_equal_trees_do_not_differ_and_are_not_read(tree: LiveTree, store: MemoryStore) -> None:
    (tree.path / "f").write_text("x")
    root = tree.capture().root
    store.reads = 0
    assert tree_differences(store, root, root) == [] and store.reads == 0


def test_both_directions_mirror_each_other(tree: LiveTree, store: MemoryStore) -> None:
    (tree.path / "a" / "deep").mkdir(parents=True)
    (tree.path / "a" / "deep" / "f").write_text("one")
    (tree.path / "swap").write_text("file")
    old = tree.capture().root
    (tree.path / "a" / "deep" / "f").unlink()
    (tree.path / "a" / "deep").rmdir()
    (tree.path / "swap").unlink()
    (tree.path / "swap").mkdir()
    (tree.path / "swap" / "in").write_text("two")
    new = tree.capture().root
    forward = shown(tree_differences(store, old, new))
    assert forward == [("-", b"a/deep"), ("-", b"a/deep/f"), ("*", b"swap"), ("+", b"swap/in")]
    mirror = {"+": "-", "-": "+", "*": "*"}
    assert shown(tree_differences(store, new, old)) == [(mirror[k], p) for k, p in forward]


def test_one_change_among_many_reads_few_pages(tree: LiveTree, store: MemoryStore) -> None:
    for number in range(2000):
        (tree.path / f"{number:05}").write_bytes(b"")
    old = tree.capture().root
    (tree.path / "01000").write_text("x")
    new = tree.capture().root
    store.reads = 0
    assert shown(tree_differences(store, old, new)) == [("*", b"01000")]
    assert store.reads < 20


def test_differences_agree_with_status(tree: LiveTree, store: MemoryStore) -> None:
    for name in "abcdef":
        (tree.path / name).write_text("content " + name)
    old = tree.capture().root
    os.rename(tree.path / "a", tree.path / "z")
    (tree.path / "b").unlink()
    (tree.path / "c").write_text("other")
    os.chmod(tree.path / "d", 0o600)
    live = tree.status().changes
    new = tree.capture().root
    recorded = tree_differences(store, old, new)
    assert shown(live) == shown(recorded)
    assert [c.metadata_only for c in live] == [c.metadata_only for c in recorded]


def test_rename_prefers_the_same_last_name() -> None:
    removed = [Change(p, "-", file(b"x", b"c"), None) for p in (b"a/one", b"b/two")]
    added = [Change(p, "+", None, file(b"x", b"c")) for p in (b"z/two", b"z/three")]
    found = with_renames([*removed, *added])
    assert (b"z/two", b"b/two") in {(c.path, c.old_path) for c in found}
    assert [c.kind for c in found] == ["R", "R"]


def test_empty_files_are_no_renames() -> None:
    empty = Entry(b"e", EntryKind.FILE, 0o644)
    changes = [Change(b"a", "-", empty, None), Change(b"b", "+", None, empty)]
    assert [c.kind for c in with_renames(changes)] == ["-", "+"]


def test_only_metadata_is_flagged_and_a_directorys_time_is_no_change() -> None:
    change = compared(b"f", file(b"f", b"c"), file(b"f", b"c", mode=0o600))
    assert change is not None and change.metadata_only
    directory = Entry(b"d", EntryKind.DIRECTORY, 0o755)
    later = Entry(b"d", EntryKind.DIRECTORY, 0o755, mtime_ns=5)
    assert compared(b"d", directory, later) is None


def kinds(changes: list[Change]) -> list[tuple[str, bytes, bytes | None]]:
    return [(c.kind, c.path, c.old_path) for c in changes]


def test_a_copy_of_a_changed_file_is_one_of_what_it_held_before() -> None:
    was, now = file(b"a", b"one"), file(b"a", b"two")
    found = with_copies(
        [Change(b"a", "*", was, now), Change(b"b", "+", None, was), Change(b"c", "+", None, now)]
    )
    assert kinds(found) == [("*", b"a", None), ("C", b"b", b"a"), ("+", b"c", None)]


def test_a_renamed_file_has_copies_too() -> None:
    changes = [
        Change(b"a", "-", file(b"a", b"c"), None),
        Change(b"b", "+", None, file(b"b", b"c")),
        Change(b"d", "+", None, file(b"d", b"c")),
    ]
    assert kinds(with_copies(with_renames(changes))) == [("R", b"b", b"a"), ("C", b"d", b"a")]


def test_copies_of_unchanged_files_prefer_the_same_last_name() -> None:
    added = Change(b"new/two", "+", None, file(b"two", b"c"))
    unchanged = [(b"one", file(b"one", b"c")), (b"x/two", file(b"two", b"c"))]
    assert kinds(with_copies([added])) == [("+", b"new/two", None)]
    assert kinds(with_copies([added], unchanged)) == [("C", b"new/two", b"x/two")]


def test_empty_files_are_no_copies() -> None:
    empty = Entry(b"e", EntryKind.FILE, 0o644)
    assert kinds(with_copies([Change(b"b", "+", None, empty)], [(b"a", empty)])) == [
        ("+", b"b", None)
    ]


def test_a_hard_link_is_no_copy_but_a_linked_copy_is_one(
    tree: LiveTree, store: MemoryStore
) -> None:
    (tree.path / "b").write_text("content")
    old = tree.capture().root
    os.link(tree.path / "b", tree.path / "a")
    os.link(tree.path / "b", tree.path / "c")
    new = tree.capture().root
    assert shown(with_copies(tree_differences(store, old, new))) == [
        ("+", b"a"), ("*", b"b"), ("+", b"c"),
    ]  # fmt: skip
    (tree.path / "x").write_text("content")
    os.link(tree.path / "x", tree.path / "y")
    last = tree.capture().root
    below = [
        (SUBDOT + b"/b", walked) for path, walked in walk_tree(store, new) if path[-2:] == b"/b"
    ]
    found = with_copies(tree_differences(store, new, last), below)
    assert shown(found) == [("C", b"x"), ("+", b"y")]
