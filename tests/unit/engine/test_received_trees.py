"""What a receiver refuses of a tree, and that it takes whatever an honest dm records."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from dmsync.core.ids import Kind, ObjectId
from dmsync.core.objects import ROOT_ENTRY, Entry, EntryKind, entry_from_value
from dmsync.core.pages import DIRECTORY, directory_entries, read_page, walk_tree
from dmsync.engine import restore
from dmsync.engine.content_checks import check_content
from dmsync.engine.restoring.folding import alike, not_told_apart
from dmsync.engine.sync_objects import ObjectSet, RootComparison
from dmsync.engine.tree_bounds import _Bounds, check_bounds, check_extent
from dmsync.errors import BadObject, CaptureFailed, StorageFull
from dmsync.storage.object_store import ObjectStore
from tests.support.live_tree import LiveTree, make_object_store
from tools.faults.content_corpus import KINDS, REFUSED, REFUSED_NAMES, Build, named
from tools.faults.hostile_trees import TreeMaker, raw

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ObjectStore]:
    made = make_object_store(tmp_path / "home")
    yield made
    made.close()


@pytest.fixture
def tree(tmp_path: Path, store: ObjectStore) -> LiveTree:
    return LiveTree(tmp_path / "tree", store)


def built(store: ObjectStore, build: Build) -> Entry:
    with store.writer() as writer:
        value = build(TreeMaker(writer))
        writer.seal()
    return entry_from_value(value)


def receive(
    store: ObjectStore, old: Entry | None, new: Entry, known: ObjectSet | None = None
) -> None:
    """As prove_closure looks at one commit. Raises BadObject."""
    comparison = RootComparison(store, old, new, known or ObjectSet(), trusted=False)
    for _ in comparison.steps():
        pass
    for chunk, (length, _) in comparison.added.chunks.items():
        if len(store.read(Kind.CHUNK, chunk)) != length:
            raise BadObject("a chunk is not as long as its span")
    for entry in comparison.added.files.values():
        for _ in check_content(store, entry):
            pass
    if known is not None:
        comparison.added.add_to(known)


# --- refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", REFUSED.values(), ids=REFUSED.keys())
def test_what_no_dm_records_is_refused(store: ObjectStore, build: Build) -> None:
    with pytest.raises(BadObject):
        receive(store, None, built(store, build))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "hardlink"])
def test_no_unsafe_name_is_taken_of_any_kind(store: ObjectStore, kind: str) -> None:
    for name in REFUSED_NAMES:
        with pytest.raises(BadObject):
            receive(
                store, None, built(store, lambda m, n=name: m.root(named(m, n, kind, b"/outside")))
            )


def test_a_name_twice_beside_pages_that_were_here_is_refused(
    tree: LiveTree, store: ObjectStore
) -> None:
    """The page that is not new is vouched for where it stood, and nowhere else."""
    for number in range(3000):
        path = tree.path / f"f{number:04d}"
        path.touch()
        os.utime(path, ns=(0, number))  # where pages are cut depends on what is in them
    old = tree.capture().root
    directory = next(directory_entries(store, old.tree))
    assert directory.tree is not None
    page = read_page(store, directory.tree, DIRECTORY)
    assert page.level == 1 and len(page.items) > 20
    children = list(page.items)
    for wrong in (
        [*children[:5], children[6], children[5], *children[7:]],
        [*children[:3], children[2], *children[3:]],
    ):
        new = entry_from_value(
            built_top(store, [(c.key, c.page, c.weight) for c in wrong], level=1)
        )
        with pytest.raises(BadObject):
            receive(store, old, new)
    moved = [(c.key, c.page, c.weight) for c in children]
    moved[5] = (moved[5][0] + b"x", *moved[5][1:])
    with pytest.raises(BadObject):
        receive(store, old, entry_from_value(built_top(store, moved, level=1)))
    heavier = [(c.key, c.page, c.weight + (n == 4)) for n, c in enumerate(children)]
    with pytest.raises(BadObject):
        receive(store, old, entry_from_value(built_top(store, heavier, level=1)))
    fewer = [(c.key, c.page, c.weight) for c in children[::2]]
    receive(store, old, entry_from_value(built_top(store, fewer, level=1)))


def built_top(store: ObjectStore, items: list[object], *, level: int) -> tuple[object, ...]:
    with store.writer() as writer:
        maker = TreeMaker(writer)
        page = maker.page(items, level=level)
        root = maker.directory(b"", [raw(b"__default__", 1, page, mode=0o755)])
        writer.seal()
    return root


# --- taken ---------------------------------------------------------------------------------------


def test_every_honest_history_is_taken(tree: LiveTree, store: ObjectStore) -> None:
    """Large directories that grow, shrink and move, files of all layouts with holes, groups."""
    chance = random.Random(5)
    old, known = ROOT_ENTRY, ObjectSet()
    for step in range(6):
        for _ in range((600, 1, 40)[step % 3]):
            name = f"{chance.randrange(4)}/{chance.randrange(3000):x}"
            path = tree.path / name
            path.parent.mkdir(exist_ok=True)
            change(chance, path)
        if step % 4 == 2:
            (tree.path / "0").rename(tree.path / f"moved{step}")
        tree.age()
        new = tree.capture().root
        receive(store, old, new)
        receive(store, None if step % 3 == 0 else old, new, known)
        receive(store, None, new)
        old = new


def change(chance: random.Random, path: Path) -> None:
    match chance.randrange(6):
        case 0 if path.is_file():
            path.unlink()
        case 1 if not path.exists() and path.parent.glob("*"):
            others = [p for p in list(path.parent.iterdir())[:3] if p.is_file()]
            if others:
                os.link(others[0], path)
        case 2 if chance.random() < 0.05:
            with open(path, "wb") as file:
                for _ in range(chance.randrange(1, 4)):
                    file.write(chance.randbytes(chance.choice((131072, 400_000, 524_288))))
                    file.seek(chance.choice((0, 131072, 1 << 20, 12_345)), os.SEEK_CUR)
                file.truncate(file.tell() + chance.choice((0, 1, 4096)))
        case _:
            path.write_bytes(chance.randbytes(chance.randrange(60)))


# --- applied -------------------------------------------------------------------------------------


def test_a_group_of_different_files_is_not_linked(tree: LiveTree, store: ObjectStore) -> None:
    group = b"__default__/a"
    root = built(
        store,
        lambda m: m.root(
            [
                m.file(b"a", b"first", hardlink=group),
                m.file(b"b", b"second", hardlink=group),
                m.file(b"c", b"first", hardlink=group),
            ]
        ),
    )
    tree.restore(root)
    assert [(tree.path / name).read_text() for name in "abc"] == ["first", "second", "first"]
    assert (tree.path / "b").stat().st_nlink == 1


@needs_root
@pytest.mark.parametrize("name", [b"security.evil", b"trusted.evil", b"trusted.overlay.opaque"])
def test_attributes_that_speak_to_the_kernel_wait_for_trust(
    tree: LiveTree, store: ObjectStore, name: bytes
) -> None:
    xattrs = ((name, b"y"), (b"user.fine", b"x"))
    pairs = tuple(sorted(xattrs))
    root = built(store, lambda m: m.root([m.file(b"f", b"x", xattrs=pairs)]))
    result = tree.restore(root, trusted=False)
    assert os.listxattr(tree.path / "f") == ["user.fine"]
    assert result.unapplied == [b"__default__/f"]
    assert tree.changes() == []
    os.utime(tree.path / "f", ns=(1, 1))
    kept = dict(walk_tree(store, tree.capture().root))
    assert kept[b"__default__/f"].xattrs == pairs
    tree.restore(root, trusted=True)
    assert os.getxattr(tree.path / "f", name.decode()) == b"y"


def bomb(levels: int, width: int) -> Build:
    def build(maker: TreeMaker) -> tuple[object, ...]:
        entry = maker.file(b"f")
        for _ in range(levels):
            page = maker.page([raw(b"%03d" % n, *entry[1:2], entry[6]) for n in range(width)])
            entry = raw(b"d", 1, page, mode=0o755)
        return maker.directory(b"", [raw(b"__default__", *entry[1:2], entry[6], mode=0o755)])

    return build


def test_a_few_pages_that_say_a_million_million_names_are_not_written_out(
    tree: LiveTree, store: ObjectStore
) -> None:
    root = built(store, bomb(7, 64))
    receive(store, None, root)
    with pytest.raises(StorageFull, match="names"):
        tree.restore(root)
    assert os.listdir(tree.path) == []
    with pytest.raises(StorageFull):
        check_extent(store, root.tree)
    small = built(store, bomb(2, 8))
    check_bounds(store, None, small.tree, os.fspath(tree.path))


def test_a_directory_put_below_itself_again_and_again_is_too_deep(
    tree: LiveTree, store: ObjectStore
) -> None:
    page: ObjectId | None = None
    with store.writer() as writer:
        maker = TreeMaker(writer)
        for _ in range(2060):
            page = maker.page([raw(b"d", 1, page, mode=0o755)])
        root = entry_from_value(maker.directory(b"", [raw(b"__default__", 1, page)]))
        writer.seal()
    with pytest.raises(BadObject, match="deeper"):
        tree.restore(root)
    assert os.listdir(tree.path) == []


def test_paths_that_nobody_would_take_are_not_committed(tree: LiveTree) -> None:
    fd = os.open(tree.path, os.O_RDONLY)
    for _ in range(16):
        os.mkdir("x" * 255, dir_fd=fd)
        below = os.open("x" * 255, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    with pytest.raises(CaptureFailed, match="4096"):
        tree.capture()
    os.close(fd)
    tree.root, tree.cache = ROOT_ENTRY, None
    tree.restore(ROOT_ENTRY)


# --- names that fold -----------------------------------------------------------------------------


def test_names_that_may_be_one_are_found() -> None:
    for pair in (
        (b"readme", b"README"),
        ("caf\u00e9".encode(), "cafe\u0301".encode()),
        ("stra\u00dfe".encode(), b"STRASSE"),
        (b"a", b"a."),
        (b"a", b"A  "),
        (".g\u200cit".encode(), b".git"),
    ):
        assert alike(pair) == [list(pair)], pair
    assert alike([b"a", b"b", b"\xff", b"\xfe", "\u00e9".encode()]) == []


def test_a_filesystem_that_tells_them_apart_is_believed(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    assert not_told_apart(fd, [b"a", b"A"]) == set()
    assert os.listdir(tmp_path) == []
    os.close(fd)


def folding(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a filesystem without case would answer the probe."""

    def seen(fd: int, names: list[bytes]) -> set[bytes]:
        return set(names[1:])

    monkeypatch.setattr(restore, "not_told_apart", seen)


def test_the_second_of_two_names_that_fold_waits_and_is_kept(
    tree: LiveTree, store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CVE-2024-32002: a link and a directory whose names fold must never become one."""
    outside = tmp_path / "outside"
    outside.mkdir()
    root = built(
        store,
        lambda m: m.root(
            [
                m.directory(b"A", [m.directory(b"modules", [m.file(b"hook", b"evil")])]),
                m.symlink(b"a", os.fsencode(outside)),
                m.file(b"other", b"x"),
            ]
        ),
    )
    folding(monkeypatch)
    result = tree.restore(root)
    assert result.withheld == [b"__default__/a"]
    assert sorted(os.listdir(tree.path)) == ["A", "other"] and not os.listdir(outside)
    assert tree.changes() == []
    (tree.path / "other").write_text("changed")
    kept = dict(walk_tree(store, tree.capture().root))
    assert kept[b"__default__/a"].kind is EntryKind.SYMLINK
    monkeypatch.undo()
    tree.restore(tree.root)
    assert sorted(os.listdir(tree.path)) == ["A", "a", "other"]


def test_of_names_that_fold_the_one_that_is_there_stays(
    tree: LiveTree, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tree.path / "a").write_text("here")
    tree.capture()
    both = built(store, lambda m: m.root([m.file(b"A", b"new"), m.file(b"a", b"here")]))
    folding(monkeypatch)
    assert tree.restore(both).withheld == [b"__default__/A"]
    assert os.listdir(tree.path) == ["a"]


def test_a_renamed_directory_gains_nothing(tree: LiveTree) -> None:
    """However many files it has, the tree needs no more names than it had."""
    (tree.path / "old").mkdir()
    for number in range(100):
        (tree.path / "old" / str(number)).touch()
    tree.capture()
    before = tree.root
    (tree.path / "old").rename(tree.path / "new")
    (tree.path / "new" / "one more").touch()
    tree.capture()
    assert _Bounds(tree.store).gained(before.tree, tree.root.tree) == 1
    assert _Bounds(tree.store).gained(None, tree.root.tree) == 103
    assert _Bounds(tree.store).gained(tree.root.tree, None) == -103
