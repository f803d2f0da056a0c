"""What a capture records of a live tree, and how little it reads when little changed."""

import mmap
import os
import socket
import stat
import time
from itertools import pairwise
from pathlib import Path

import pytest

from dmsync.core.ids import Kind
from dmsync.core.objects import ROOT_ENTRY, Entry, EntryKind, Layout
from dmsync.core.pages import ZERO_RUN, file_spans, find_path, walk_tree
from dmsync.engine.file_blocks import OldSpans, regions
from dmsync.errors import CaptureFailed
from dmsync.storage.object_store import ObjectStore
from dmsync.storage.stat_cache import StatCache
from tests.support.live_tree import SUBDOT, LiveTree, as_nobody, make_object_store, set_acl

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
CHUNK = 128 * 1024


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return make_object_store(tmp_path / "home")


@pytest.fixture
def tree(tmp_path: Path, store: ObjectStore) -> LiveTree:
    return LiveTree(tmp_path / "tree", store)


def entry_of(tree: LiveTree, path: bytes) -> Entry:
    found = find_path(tree.store, tree.root, SUBDOT + b"/" + path)
    assert found is not None
    return found


def content_of(tree: LiveTree, path: bytes) -> bytes:
    spans = file_spans(tree.store, entry_of(tree, path))
    return b"".join(
        bytes(span.length) if span.chunk == ZERO_RUN else tree.store.read(Kind.CHUNK, span.chunk)
        for span in spans
    )


def test_empty_tree_is_an_empty_subdot(tree: LiveTree) -> None:
    tree.capture()
    entry = find_path(tree.store, tree.root, SUBDOT)
    assert entry is not None and entry.kind is EntryKind.DIRECTORY and entry.tree is None


@pytest.mark.parametrize(
    ("size", "layout"),
    [
        (0, Layout.EMPTY),
        (1, Layout.SINGLE),
        (CHUNK, Layout.SINGLE),
        (CHUNK + 1, Layout.CDC),
        (CHUNK + 4096, Layout.FIXED),
        (20 * CHUNK + 4096, Layout.FIXED),
        (40 * CHUNK + 5, Layout.CDC),
    ],
)
def test_content_is_recorded_whatever_the_layout(tree: LiveTree, size: int, layout: Layout) -> None:
    data = (b"x" + os.urandom(size))[:size]  # a single zero would be no chunk
    (tree.path / "f").write_bytes(data)
    tree.capture()
    assert entry_of(tree, b"f").layout is layout
    assert content_of(tree, b"f") == data


def test_second_capture_reads_nothing_and_gives_the_same_root(tree: LiveTree) -> None:
    (tree.path / "d").mkdir()
    (tree.path / "d" / "f").write_bytes(b"x" * 1000)
    tree.age()
    first = tree.capture()
    second = tree.capture()
    assert second.root == first.root
    assert second.statistics.bytes_hashed == 0


def test_one_changed_chunk_of_a_large_file_is_the_only_one_offered(tree: LiveTree) -> None:
    data = bytearray(os.urandom(32 * CHUNK))
    (tree.path / "f").write_bytes(data)
    tree.age()
    tree.capture()
    with open(tree.path / "f", "r+b") as file:
        file.seek(5 * CHUNK + 17)
        file.write(b"changed")
    data[5 * CHUNK + 17 : 5 * CHUNK + 24] = b"changed"
    result = tree.capture()
    assert result.statistics.bytes_differing == CHUNK
    assert content_of(tree, b"f") == bytes(data)


def test_one_change_leaves_other_directories_pages_alone(tree: LiveTree) -> None:
    for name in ("a", "b", "c"):
        (tree.path / name / "deep").mkdir(parents=True)
        (tree.path / name / "deep" / "f").write_text(name)
    tree.age()
    tree.capture()
    before = {p: e.tree for p, e in walk_tree(tree.store, tree.root)}
    (tree.path / "b" / "deep" / "f").write_text("other")
    tree.capture()
    after = {p: e.tree for p, e in walk_tree(tree.store, tree.root)}
    moved = {p for p in after if after[p] != before[p]}
    assert moved == {SUBDOT, SUBDOT + b"/b", SUBDOT + b"/b/deep"}


def test_metadata_of_every_kind_is_recorded(tree: LiveTree) -> None:
    os.symlink(b"to\xff/nowhere", os.fsencode(tree.path) + b"/l\xfe")
    os.mkfifo(tree.path / "fifo", 0o640)
    (tree.path / "empty").mkdir(mode=0o711)
    file = tree.path / "f"
    file.write_text("x")
    os.setxattr(file, "user.note", b"\0\xff")
    os.chmod(file, 0o604)
    os.utime(file, ns=(1, 1_234_567_890_123_456_789))
    tree.capture()
    link = entry_of(tree, b"l\xfe")
    assert (link.kind, link.link_target) == (EntryKind.SYMLINK, b"to\xff/nowhere")
    assert entry_of(tree, b"fifo").kind is EntryKind.FIFO
    assert entry_of(tree, b"fifo").mode == 0o640
    assert (entry_of(tree, b"empty").mode, entry_of(tree, b"empty").tree) == (0o711, None)
    entry = entry_of(tree, b"f")
    assert entry.xattrs == ((b"user.note", b"\0\xff"),)
    assert (entry.mode, entry.mtime_ns) == (0o604, 1_234_567_890_123_456_789)


@needs_root
def test_owners_devices_setuid_and_acls_are_recorded(tree: LiveTree) -> None:
    os.mknod(tree.path / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    file = tree.path / "f"
    file.write_text("x")
    os.chown(file, 1234, 4321)
    os.chmod(file, 0o6755)
    (tree.path / "d").mkdir()
    set_acl(file, "u:7:rw")
    set_acl(tree.path / "d", "g:9:rx", default=True)
    tree.capture()
    assert entry_of(tree, b"null").device == (1, 3)
    entry = entry_of(tree, b"f")
    assert (entry.uid, entry.gid, entry.mode & 0o6000) == (1234, 4321, 0o6000)
    assert [name for name, _ in entry.xattrs] == [b"system.posix_acl_access"]
    assert [name for name, _ in entry_of(tree, b"d").xattrs] == [b"system.posix_acl_default"]


def test_fifo_is_never_opened_and_sockets_are_noticed(tree: LiveTree) -> None:
    os.mkfifo(tree.path / "fifo")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.fspath(tree.path / "sock"))
        began = time.monotonic()
        result = tree.capture()
    assert time.monotonic() - began < 1
    assert [(n.path, n.message) for n in result.notices] == [
        (SUBDOT + b"/sock", "socket not recorded")
    ]
    assert tree.changes() == []


# --- hard links


def test_hardlink_group_is_named_by_its_first_path(tree: LiveTree) -> None:
    (tree.path / "b").mkdir()
    (tree.path / "b" / "f").write_text("shared")
    os.link(tree.path / "b" / "f", tree.path / "c")
    tree.age()
    tree.capture()
    assert entry_of(tree, b"b/f").hardlink == SUBDOT + b"/b/f"
    assert entry_of(tree, b"c").hardlink == SUBDOT + b"/b/f"
    root = tree.root
    assert tree.capture().root == root


def test_group_is_renamed_when_only_a_directory_above_it_moved(tree: LiveTree) -> None:
    (tree.path / "a").mkdir()
    (tree.path / "b").mkdir()
    (tree.path / "a" / "f").write_text("shared")
    os.link(tree.path / "a" / "f", tree.path / "b" / "f")
    tree.age()
    tree.capture()
    os.rename(tree.path / "a", tree.path / "z")
    tree.capture()
    assert entry_of(tree, b"b/f").hardlink == SUBDOT + b"/b/f"
    assert entry_of(tree, b"z/f").hardlink == SUBDOT + b"/b/f"


def test_link_to_outside_the_tree_is_no_group(tree: LiveTree, tmp_path: Path) -> None:
    (tree.path / "f").write_text("x")
    os.link(tree.path / "f", tmp_path / "outside")
    tree.capture()
    assert entry_of(tree, b"f").hardlink == b""


# --- holes


def test_file_of_one_hole_costs_nothing(tree: LiveTree) -> None:
    with open(tree.path / "f", "wb") as file:
        file.truncate(1 << 40)
    began = time.monotonic()
    result = tree.capture()
    entry = entry_of(tree, b"f")
    assert (entry.layout, entry.size, entry.sparse) == (Layout.ZERO, 1 << 40, True)
    assert result.statistics.bytes_hashed == 0 and time.monotonic() - began < 1


@pytest.mark.parametrize("size", [64 << 20, (64 << 20) + 7])
def test_holes_are_not_read_and_zero_runs_are_maximal(tree: LiveTree, size: int) -> None:
    with open(tree.path / "f", "wb") as file:
        file.write(b"head")
        file.seek(32 << 20)
        file.write(b"middle")
        file.truncate(size)
    result = tree.capture()
    assert result.statistics.bytes_hashed < 4 << 20
    spans = list(file_spans(tree.store, entry_of(tree, b"f")))
    zero = [span.chunk == ZERO_RUN for span in spans]
    assert not any(first and second for first, second in pairwise(zero))
    assert content_of(tree, b"f") == (tree.path / "f").read_bytes()


def test_content_id_does_not_depend_on_holes(tree: LiveTree) -> None:
    for name, size in (("fixed", 4 << 20), ("cdc", (4 << 20) + 9)):
        data = b"head" + bytes(2 << 20) + b"tail"
        data += bytes(size - len(data))
        (tree.path / (name + "-dense")).write_bytes(data)
        with open(tree.path / (name + "-holes"), "wb") as file:
            file.write(b"head")
            file.seek((2 << 20) + 4)
            file.write(b"tail")
            file.truncate(size)
    tree.capture()
    for kind in (b"fixed", b"cdc"):
        dense, holes = entry_of(tree, kind + b"-dense"), entry_of(tree, kind + b"-holes")
        assert dense.content == holes.content and holes.sparse and not dense.sparse


# --- finding change


def test_change_within_the_tick_of_the_capture_is_found(tree: LiveTree) -> None:
    """Same size, same times put back: only the distrust of fresh times finds it."""
    file = tree.path / "f"
    file.write_text("one")
    tree.capture()
    before = os.stat(file)
    file.write_text("two")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    tree.capture()
    assert content_of(tree, b"f") == b"two"


def test_fresh_times_are_not_trusted_and_older_ones_are(tree: LiveTree) -> None:
    (tree.path / "f").write_bytes(b"x" * 100)
    tree.capture()
    assert tree.capture().statistics.bytes_hashed == 100
    tree.age()
    tree.capture()
    assert tree.capture().statistics.bytes_hashed == 0


def test_store_through_an_mmap_that_was_dirty_at_the_capture_is_found(tree: LiveTree) -> None:
    file = tree.path / "f"
    file.write_bytes(b"\1" * 4096)
    with open(file, "r+b") as opened, mmap.mmap(opened.fileno(), 4096) as mapped:
        mapped[0] = 2
        tree.age()
        mapped[1] = 3
        tree.capture()
        mapped[2] = 4
        tree.capture()
        assert content_of(tree, b"f")[:4] == b"\2\3\4\1"
        tree.age()
        tree.capture()
        mapped[3] = 5
        tree.capture()
    assert content_of(tree, b"f")[:4] == b"\2\3\4\5"


def test_renamed_file_stores_no_new_chunk(tree: LiveTree) -> None:
    (tree.path / "wal-1").write_bytes(os.urandom(16 * CHUNK))
    tree.age()
    tree.capture()
    os.rename(tree.path / "wal-1", tree.path / "wal-2")
    assert tree.capture().statistics.bytes_differing == 0


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped", "foreign"])
def test_bad_stat_cache_means_hashing_again(tree: LiveTree, tmp_path: Path, damage: str) -> None:
    (tree.path / "f").write_bytes(b"x" * 100)
    tree.age()
    result = tree.capture()
    path = tmp_path / "cache"
    result.stat_cache.save(os.fspath(path))
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "foreign":
        tree.root = ROOT_ENTRY
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data[:-5] if damage == "cut" else data)
    tree.cache = StatCache.load(os.fspath(path))
    again = tree.capture()
    assert again.statistics.bytes_hashed == 100 and again.root == result.root


def test_saved_stat_cache_vouches_for_the_tree(tree: LiveTree, tmp_path: Path) -> None:
    for number in range(300):
        (tree.path / f"d{number}").mkdir()
        (tree.path / f"d{number}" / "f").write_text("x")
    tree.age()
    tree.capture().stat_cache.save(os.fspath(tmp_path / "cache"))
    tree.cache = StatCache.load(os.fspath(tmp_path / "cache"))
    assert tree.capture().statistics.bytes_hashed == 0


def test_file_that_keeps_changing_is_recorded_and_told(
    tree: LiveTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tree.path / "f"
    file.write_bytes(b"0" * 100)
    from dmsync.engine.safe_files import read_xattrs

    def append_meanwhile(target: int | bytes, **options: bool) -> object:
        with open(file, "ab") as opened:
            opened.write(b"more")
        return read_xattrs(target, **options)

    monkeypatch.setattr("dmsync.engine.file_reading.read_xattrs", append_meanwhile)
    result = tree.capture()
    assert result.unstable_paths == [SUBDOT + b"/f"]
    monkeypatch.undo()
    tree.age()
    tree.capture()
    assert content_of(tree, b"f") == file.read_bytes()


# --- status


def test_status_lists_what_changed_and_writes_nothing(tree: LiveTree) -> None:
    for name in ("keep", "change", "remove", "touch", "move"):
        (tree.path / name).write_text("content of " + name)
    (tree.path / "gone").mkdir()
    (tree.path / "gone" / "f").write_text("below")
    tree.age()
    tree.capture()
    packs = tree.store.packs()
    (tree.path / "change").write_text("other")
    (tree.path / "remove").unlink()
    os.utime(tree.path / "touch", ns=(5, 5))
    os.rename(tree.path / "move", tree.path / "moved")
    (tree.path / "gone" / "f").unlink()
    (tree.path / "gone").rmdir()
    (tree.path / "new").mkdir()
    (tree.path / "new" / "f").write_text("fresh")
    assert tree.changes() == [
        ("*", b"change"),
        ("-", b"gone"),
        ("-", b"gone/f"),
        ("R", b"moved"),
        ("+", b"new"),
        ("+", b"new/f"),
        ("-", b"remove"),
        ("*", b"touch"),
    ]
    assert tree.store.packs() == packs
    tree.capture()
    assert tree.changes() == []


def test_same_content_written_again_is_a_metadata_change(tree: LiveTree) -> None:
    (tree.path / "f").write_text("same")
    tree.capture()
    (tree.path / "f").write_text("same")
    (change,) = tree.status().changes
    assert (change.kind, change.metadata_only) == ("*", True)


# --- refusals


def test_missing_tree_is_refused(tree: LiveTree) -> None:
    tree.path.rmdir()
    with pytest.raises(Exception, match="cannot open the tree"):
        tree.capture()


def test_tree_too_deep_is_refused_without_recursion(tree: LiveTree) -> None:
    fd = os.open(tree.path, os.O_RDONLY)
    for _ in range(2100):
        os.mkdir("d", dir_fd=fd)
        below = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    with pytest.raises(CaptureFailed, match=r"deeper than 2048|longer than 4096"):
        tree.capture()
    tree.root, tree.cache = ROOT_ENTRY, None
    tree.restore(ROOT_ENTRY)
    assert os.listdir(tree.path) == []


@needs_root
def test_plain_user_keeps_what_he_cannot_read(tmp_path: Path) -> None:
    os.chmod(tmp_path, 0o777)
    for parent in tmp_path.parents:
        if parent.stat().st_mode & 0o005 != 0o005:
            os.chmod(parent, parent.stat().st_mode | 0o055)

    def work() -> None:
        os.mkdir(tmp_path / "work")
        tree = LiveTree(tmp_path / "work" / "tree", make_object_store(tmp_path / "work"))
        (tree.path / "secret").write_text("x")
        (tree.path / "locked").mkdir()
        (tree.path / "locked" / "f").write_text("below")
        tree.age()
        tree.capture()
        before = tree.root
        os.chmod(tree.path / "secret", 0)
        os.chmod(tree.path / "locked", 0)
        (tree.path / "new").write_text("y")
        os.chmod(tree.path / "new", 0)
        result = tree.capture()
        names = [SUBDOT + b"/" + name for name in (b"locked", b"new", b"secret")]
        assert result.unreadable_paths == names
        assert entry_of(tree, b"secret") == find_path(tree.store, before, SUBDOT + b"/secret")
        assert find_path(tree.store, tree.root, SUBDOT + b"/locked/f") is not None
        assert find_path(tree.store, tree.root, SUBDOT + b"/new") is None

    as_nobody(work)


# --- dot roots


def test_managed_tree_has_subdots_and_no_metadata_of_its_own(
    tmp_path: Path, store: ObjectStore
) -> None:
    tree = LiveTree(tmp_path / "tree", store, subdot=None)
    os.chmod(tree.path, 0o700)
    (tree.path / "db").mkdir()
    (tree.path / "db" / "f").write_text("x")
    (tree.path / "stray").write_text("y")
    tree.capture()
    assert (tree.root.mode, tree.root.mtime_ns) == (0o755, 0)
    assert [path for path, _ in walk_tree(store, tree.root)] == [b"db", b"db/f", b"stray"]


def test_tree_as_root_records_its_own_metadata(tmp_path: Path, store: ObjectStore) -> None:
    tree = LiveTree(tmp_path / "tree", store, subdot=None, as_root=True)
    os.chmod(tree.path, 0o750)
    (tree.path / "f").write_text("x")
    os.utime(tree.path, ns=(7, 7))
    tree.age()
    tree.capture()
    assert (tree.root.mode, tree.root.mtime_ns) == (0o750, 7)
    assert tree.capture().statistics.bytes_hashed == 0
    os.chmod(tree.path, 0o700)
    assert tree.changes() == [("*", b"")]


# --- parts


def test_regions_cover_the_file_and_align_holes_inwards() -> None:
    found = list(regions(iter([(5, 10), (25, 26)]), 45, 10))
    assert [(r.offset, r.length, r.is_hole) for r in found] == [
        (0, 10, False),
        (10, 10, True),
        (20, 10, False),
        (30, 15, True),
    ]


def test_old_spans_answer_inside_zero_runs_only(tree: LiveTree) -> None:
    (tree.path / "f").write_bytes(b"a" * CHUNK + bytes(2 * CHUNK) + b"b" * CHUNK)
    tree.capture()
    spans = OldSpans(tree.store, entry_of(tree, b"f"))
    found = [spans.at(offset * CHUNK) for offset in range(5)]
    assert found[1:3] == [ZERO_RUN, ZERO_RUN] and found[4] is None
    assert None not in found[:4]
