"""Restored trees are bit-exact, only differences are written, and nothing outside is touched."""

import os
import signal
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dmsync.core.objects import ROOT_ENTRY, Entry, EntryKind
from dmsync.core.pages import DIRECTORY, Page, encode_page, find_path
from dmsync.engine.safe_files import is_temporary, temporary_name
from dmsync.errors import BadObject, DmError, StorageFailed
from dmsync.storage.object_store import ObjectStore
from tests.support.live_tree import SUBDOT, LiveTree, as_nobody, make_object_store, set_acl
from tests.support.memory_store import MemoryStore
from tests.support.tree import describe_tree

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
CHUNK = 128 * 1024


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return make_object_store(tmp_path / "home")


@pytest.fixture
def tree(tmp_path: Path, store: ObjectStore) -> LiveTree:
    return LiveTree(tmp_path / "tree", store)


@pytest.fixture
def copy(tmp_path: Path, store: ObjectStore) -> LiveTree:
    return LiveTree(tmp_path / "copy", store)


def fill(path: Path) -> None:
    """Every kind of entry that any user can make."""
    (path / "d" / "e").mkdir(parents=True)
    (path / "empty").mkdir(mode=0o711)
    (path / "d" / "small").write_bytes(b"small")
    (path / "d" / "fixed").write_bytes(os.urandom(5 * CHUNK))
    (path / "d" / "e" / "shifting").write_bytes(os.urandom(5 * CHUNK + 3))
    (path / "none").write_bytes(b"")
    (path / "zeros").write_bytes(bytes(3 * CHUNK))
    with open(path / "holes", "wb") as file:
        file.truncate(16 << 20)
        file.seek(1 << 20)
        file.write(b"data")
    os.symlink("d/small", path / "link")
    os.mkfifo(path / "fifo", 0o640)
    os.link(path / "d" / "small", path / "hard")
    os.setxattr(path / "none", "user.note", b"kept")
    os.chmod(path / "none", 0o604)
    os.chmod(path / "d" / "e", 0o550)
    for number, name in enumerate(["none", "d/fixed", "link", "d/e", "d", "empty", "fifo"]):
        os.utime(path / name, ns=(1, 10**18 + number), follow_symlinks=False)


def inodes(path: Path) -> dict[bytes, int]:
    return {
        os.path.join(folder, name): os.lstat(os.path.join(folder, name)).st_ino
        for folder, folders, files in os.walk(os.fsencode(path))
        for name in folders + files
    }


def test_restore_into_an_empty_tree_is_bit_exact(tree: LiveTree, copy: LiveTree) -> None:
    fill(tree.path)
    tree.capture()
    copy.restore(tree.root)
    assert describe_tree(copy.path) == describe_tree(tree.path)
    holes = os.stat(copy.path / "holes")
    assert holes.st_blocks * 512 < 1 << 20
    assert os.stat(copy.path / "zeros").st_blocks * 512 >= 3 * CHUNK


def test_restored_tree_is_clean_and_vouched_for(tree: LiveTree, copy: LiveTree) -> None:
    fill(tree.path)
    tree.capture()
    copy.restore(tree.root)
    assert copy.changes() == []
    again = copy.capture()
    assert (again.root, again.statistics.bytes_hashed) == (tree.root, 0)


def test_restoring_what_is_there_touches_nothing(tree: LiveTree) -> None:
    fill(tree.path)
    tree.age()
    tree.capture()
    before = {p: os.lstat(p) for p in inodes(tree.path)}
    for cache in (tree.cache, None):
        tree.cache = cache
        result = tree.restore(tree.root)
        assert (result.files_written, result.bytes_written, result.names_removed) == (0, 0, 0)
    assert {p: os.lstat(p).st_ctime_ns for p in before} == {
        p: s.st_ctime_ns for p, s in before.items()
    }


def test_every_difference_is_undone(tree: LiveTree) -> None:
    fill(tree.path)
    tree.age()
    tree.capture()
    target, expected = tree.root, describe_tree(tree.path)
    path = tree.path
    (path / "d" / "small").unlink()
    with open(path / "d" / "fixed", "r+b") as file:
        file.seek(2 * CHUNK)
        file.write(b"changed")
    os.chmod(path / "none", 0o777)
    os.removexattr(path / "none", "user.note")
    (path / "link").unlink()
    (path / "link").mkdir()
    (path / "link" / "x").write_text("x")
    (path / "fifo").unlink()
    (path / "fifo").write_text("no fifo")
    (path / "empty").rmdir()
    (path / "empty").write_text("no directory")
    (path / "extra" / "deep").mkdir(parents=True)
    (path / "extra" / "deep" / "f").write_text("x")
    os.chmod(path / "extra" / "deep", 0)
    (path / ".dm-tmp-0123456789abcdef").write_text("left by a killed restore")
    tree.restore(target)
    assert describe_tree(path) == expected
    assert tree.changes() == []


def test_a_user_s_file_that_looks_like_a_temporary_one_is_a_file(tree: LiveTree) -> None:
    looks = (
        ".dm-tmp-notes",
        ".dm-tmp-1-2",
        ".dm-tmp-0123456789abcdef0",
        ".dm-tmp-0123456789ABCDEF",
    )
    for name in looks:
        (tree.path / name).write_text("mine")
    tree.age()
    tree.capture()
    target = tree.root
    for name in looks:
        (tree.path / name).unlink()
    assert len(tree.changes()) == len(looks)
    tree.restore(target)
    assert all((tree.path / name).read_text() == "mine" for name in looks)
    assert tree.changes() == []


def test_temporary_names_are_told_from_others() -> None:
    made = {temporary_name() for _ in range(100)}
    assert len(made) == 100 and all(map(is_temporary, made))
    for name in (b".dm-tmp-", b".dm-tmp-notes", b"x.dm-tmp-0123456789abcdef", b".dm-tmp-12-34"):
        assert not is_temporary(name)


def test_large_file_changed_in_place_keeps_its_inode(tree: LiveTree) -> None:
    file = tree.path / "f"
    file.write_bytes(os.urandom(64 * CHUNK))
    tree.age()
    tree.capture()
    before, target = os.stat(file), tree.root
    with open(file, "r+b") as opened:
        opened.seek(9 * CHUNK)
        opened.write(b"changed")
    tree.age()
    tree.capture()
    result = tree.restore(target)
    assert result.bytes_written == 4096
    after = os.stat(file)
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_file_shorter_or_longer_than_recorded_is_made_equal(tree: LiveTree) -> None:
    data = os.urandom(8 * CHUNK)
    (tree.path / "f").write_bytes(data)
    tree.capture()
    for wrong in (data[: 3 * CHUNK + 5], data + b"more", b"", data[::-1]):
        (tree.path / "f").write_bytes(wrong)
        tree.restore(tree.root)
        assert (tree.path / "f").read_bytes() == data


def test_hole_punched_file_gets_its_data_back_and_its_holes(tree: LiveTree) -> None:
    file = tree.path / "f"
    with open(file, "wb") as opened:
        opened.write(b"\1" * CHUNK)
        opened.truncate(16 * CHUNK)
    tree.age()
    tree.capture()
    file.write_bytes(b"\2" * (16 * CHUNK))
    tree.restore(tree.root)
    assert file.read_bytes() == b"\1" * CHUNK + bytes(15 * CHUNK)
    assert os.stat(file).st_blocks * 512 < 2 * CHUNK


# --- hard links


def test_links_are_made_split_and_joined_as_recorded(tree: LiveTree) -> None:
    path = tree.path
    for name in ("a", "b", "c", "d"):
        (path / name).write_text("same")
        os.utime(path / name, ns=(1, 1))
    apart = tree.capture().root
    for name in ("b", "c"):
        (path / name).unlink()
        os.link(path / "a", path / name)
    joined = tree.capture().root
    for known in (True, False):
        for target, count in ((apart, 1), (joined, 3)):
            if not known:
                tree.cache = None
            tree.restore(target)
            assert os.stat(path / "a").st_nlink == count
            assert len({os.stat(path / n).st_ino for n in "abc"}) == (1 if count == 3 else 3)
            assert os.stat(path / "d").st_nlink == 1
            assert tree.changes() == []


def test_file_linked_from_outside_is_not_written_through(tree: LiveTree, tmp_path: Path) -> None:
    file, outside = tree.path / "f", tmp_path / "backup"
    file.write_bytes(b"a" * (4 * CHUNK))
    target = tree.capture().root
    file.write_bytes(b"b" * (4 * CHUNK))
    os.link(file, outside)
    os.chmod(outside, 0o600)
    facts = os.stat(outside)
    tree.restore(target)
    assert outside.read_bytes() == b"b" * (4 * CHUNK)
    assert (os.stat(outside).st_mode, os.stat(outside).st_mtime_ns) == (
        facts.st_mode,
        facts.st_mtime_ns,
    )
    assert file.read_bytes() == b"a" * (4 * CHUNK)


# --- rights


@needs_root
def test_owners_devices_set_id_bits_and_acls_come_back(tree: LiveTree, copy: LiveTree) -> None:
    path = tree.path
    os.mknod(path / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    (path / "f").write_text("x")
    os.chown(path / "f", 1234, 4321)
    os.chmod(path / "f", 0o6755)
    capability = bytes.fromhex("0100000200200000000000000000000000000000")
    (path / "tool").write_text("x")
    os.setxattr(path / "tool", "security.capability", capability)
    (path / "d").mkdir()
    os.chmod(path / "d", 0o1777)
    set_acl(path / "d", "g:9:rx", "u:8:rwx", default=True)
    set_acl(path / "f", "u:7:rw")
    (path / "d" / "inherits").write_text("x")
    os.symlink("f", path / "link")
    os.chown(path / "link", 5, 6, follow_symlinks=False)
    tree.capture()
    copy.restore(tree.root, trusted=True)
    assert describe_tree(copy.path) == describe_tree(path)


@needs_root
def test_without_trust_dangerous_things_wait_and_are_committed_back(
    tree: LiveTree, copy: LiveTree
) -> None:
    path = tree.path
    os.mknod(path / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    (path / "f").write_text("x")
    os.chmod(path / "f", 0o6755)
    (path / "tool").write_text("x")
    capability = bytes.fromhex("0100000200200000000000000000000000000000")
    os.setxattr(path / "tool", "security.capability", capability)
    tree.capture()
    result = copy.restore(tree.root, trusted=False)
    assert result.withheld == [SUBDOT + b"/null"]
    assert sorted(result.unapplied) == [SUBDOT + b"/f", SUBDOT + b"/tool"]
    assert not (copy.path / "null").exists()
    assert stat.S_IMODE(os.stat(copy.path / "f").st_mode) == 0o755
    assert os.listxattr(copy.path / "tool") == []
    assert copy.changes() == []
    (copy.path / "f").write_text("changed")
    (copy.path / "tool").write_text("changed")
    assert copy.changes() == [("*", b"f"), ("*", b"tool")]
    copy.capture()
    for name in (b"f", b"tool", b"null"):
        entry = find_path(copy.store, copy.root, SUBDOT + b"/" + name)
        recorded = find_path(copy.store, tree.root, SUBDOT + b"/" + name)
        assert entry is not None and recorded is not None
        assert (entry.mode, entry.xattrs) == (recorded.mode, recorded.xattrs)
    root = copy.root
    assert copy.capture().root == root
    os.chmod(copy.path / "f", 0o700)
    copy.capture()
    entry = find_path(copy.store, copy.root, SUBDOT + b"/f")
    assert entry is not None and entry.mode == 0o6700  # what was never there was not taken away
    copy.restore(copy.root, trusted=True)
    os.chmod(copy.path / "f", 0o700)
    copy.capture()
    entry = find_path(copy.store, copy.root, SUBDOT + b"/f")
    assert entry is not None and entry.mode == 0o700


@needs_root
def test_what_waited_for_trust_is_applied_once_there_is(tree: LiveTree, copy: LiveTree) -> None:
    path = tree.path
    os.mknod(path / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    capability = bytes.fromhex("0100000200200000000000000000000000000000")
    (path / "d" / "e").mkdir(parents=True)
    for name in ("su", "d/e/su", "tool", "d/one", "d/other"):
        (path / name).write_text(name)
    os.setxattr(path / "tool", "security.capability", capability)
    os.remove(path / "d" / "other")
    os.link(path / "d" / "one", path / "d" / "other")
    for name in ("su", "d/e/su", "d/one", "d/e"):
        os.chmod(path / name, 0o6755)
    tree.capture()
    copy.restore(tree.root, trusted=False)
    assert stat.S_IMODE(os.stat(copy.path / "d" / "e").st_mode) == 0o755
    copy.age()
    copy.capture()
    result = copy.restore(tree.root, trusted=True)
    assert (result.withheld, result.unapplied) == ([], [])
    assert describe_tree(copy.path) == describe_tree(path)
    assert copy.restore(tree.root, trusted=True).files_written == 0


@needs_root
def test_plain_user_restores_and_commits_back_foreign_owners(tmp_path: Path) -> None:
    for parent in (tmp_path, *tmp_path.parents):
        if parent.stat().st_mode & 0o005 != 0o005:
            os.chmod(parent, parent.stat().st_mode | 0o055)
    home = tmp_path / "work"
    home.mkdir()
    tree = LiveTree(tmp_path / "tree", make_object_store(home))
    fill(tree.path)
    (tree.path / "d" / "e" / "below").write_text("x")
    os.chown(tree.path / "d" / "fixed", 1234, 4321)
    os.chmod(tree.path / "d", 0o500)
    tree.capture()
    expected = describe_tree(tree.path, owners=False)
    for folder, folders, files in os.walk(home):
        for name in [".", *folders, *files]:
            os.chown(os.path.join(folder, name), 65534, 65534)

    def work() -> None:
        store = make_object_store(home)
        copy = LiveTree(home / "copy", store)
        copy.restore(tree.root, trusted=False)
        assert describe_tree(copy.path, owners=False) == expected
        assert copy.changes() == []
        os.chmod(copy.path / "d", 0o700)
        with open(copy.path / "d" / "fixed", "ab") as file:
            file.write(b"x")
        os.chmod(copy.path / "d", 0o500)
        copy.capture()
        entry = find_path(store, copy.root, SUBDOT + b"/d/fixed")
        assert entry is not None and (entry.uid, entry.gid) == (1234, 4321)
        os.chmod(copy.path / "d" / "e", 0)
        copy.restore(tree.root, trusted=False)
        assert describe_tree(copy.path, owners=False) == expected
        copy.restore(ROOT_ENTRY, trusted=False)
        assert os.listdir(copy.path) == []

    as_nobody(work)


# --- hostile trees


class _Forged:
    """A recorded tree whose pages no decoder would have let in."""

    def __init__(self) -> None:
        self.store = MemoryStore()

    def root(self, *entries: Entry) -> Entry:
        page = self.store.writer().write_page(encode_page(Page(DIRECTORY, 0, entries)), None)
        subdot = Entry(SUBDOT, EntryKind.DIRECTORY, 0o755, tree=page)
        top = self.store.writer().write_page(encode_page(Page(DIRECTORY, 0, (subdot,))), None)
        return Entry(b"", EntryKind.DIRECTORY, 0o755, tree=top)


@pytest.mark.parametrize("name", [b"..", b".", b"a/b", b"/etc", b"a\0b", b"../x", b"x" * 256])
@pytest.mark.parametrize("kind", [EntryKind.SYMLINK, EntryKind.DIRECTORY, EntryKind.FIFO])
def test_unsafe_names_are_refused_and_nothing_is_written(
    tmp_path: Path, name: bytes, kind: EntryKind
) -> None:
    forged = _Forged()
    target = b"t" if kind is EntryKind.SYMLINK else b""
    root = forged.root(Entry(name, kind, 0o644, link_target=target))
    tree = LiveTree(tmp_path / "tree", forged.store)  # type: ignore[arg-type]
    with pytest.raises(BadObject):
        tree.restore(root)
    assert os.listdir(tmp_path) == ["tree"] and os.listdir(tree.path) == []


def test_hardlink_group_naming_a_path_outside_is_only_a_name(tmp_path: Path) -> None:
    forged = _Forged()
    (tmp_path / "canary").write_text("secret")
    root = forged.root(
        Entry(b"a", EntryKind.FILE, 0o644, hardlink=b"../../canary"),
        Entry(b"b", EntryKind.FILE, 0o644, hardlink=b"../../canary"),
    )
    tree = LiveTree(tmp_path / "tree", forged.store)  # type: ignore[arg-type]
    with pytest.raises(BadObject):
        tree.restore(root)
    assert os.stat(tmp_path / "canary").st_nlink == 1


def test_link_in_the_way_of_a_directory_is_replaced_not_followed(
    tree: LiveTree, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "f").write_text("canary")
    (tree.path / "d").mkdir()
    (tree.path / "d" / "f").write_text("mine")
    target = tree.capture().root
    (tree.path / "d" / "f").unlink()
    (tree.path / "d").rmdir()
    os.symlink(outside, tree.path / "d")
    tree.restore(target)
    assert (outside / "f").read_text() == "canary"
    assert (tree.path / "d" / "f").read_text() == "mine"


@pytest.fixture
def flipper(tree: LiveTree, tmp_path: Path) -> Iterator[Path]:
    """Swaps the directory `tree/d` and a symlink to `outside` as fast as it can."""
    outside = tmp_path / "outside"
    outside.mkdir()
    for number in range(20):
        (outside / f"f{number}").write_text("CANARY")
    os.utime(outside, ns=(1, 1))
    (tree.path / "d").mkdir()
    for number in range(20):
        (tree.path / "d" / f"f{number}").write_text("mine")
    os.symlink(outside, tree.path / "s")
    tree.capture()
    from ctypes import CDLL, c_char_p, c_uint

    renameat2 = CDLL(None).renameat2
    renameat2.argtypes = [c_uint, c_char_p, c_uint, c_char_p, c_uint]
    directory = os.open(tree.path, os.O_RDONLY)
    stop = threading.Event()

    def flip() -> None:
        while not stop.is_set():
            renameat2(directory, b"d", directory, b"s", 2)

    thread = threading.Thread(target=flip)
    thread.start()
    yield outside
    stop.set()
    thread.join()
    os.close(directory)


def test_swapped_directory_never_leaks_into_a_capture(tree: LiveTree, flipper: Path) -> None:
    end = time.monotonic() + 3
    canary = None
    captures = naive_escapes = 0
    while time.monotonic() < end:
        naive_escapes += b"CANARY" in _read_by_path(tree.path / "d" / "f0")
        store = MemoryStore()
        other = LiveTree(tree.path, store)  # type: ignore[arg-type]
        other.capture()
        captures += 1
        canary = next((data for data in store.objects.values() if b"CANARY" in data), None)
        assert canary is None
    assert captures > 10
    assert naive_escapes > 0, "the flipper never showed the outside: this test is blind"


def test_swapped_directory_is_never_written_through(tree: LiveTree, flipper: Path) -> None:
    before = {p: (s.st_mtime_ns, s.st_ctime_ns) for p, s in _stats(flipper).items()}
    target = tree.root
    end = time.monotonic() + 3
    attempts = 0
    while time.monotonic() < end:
        attempts += 1
        tree.cache = None
        try:
            for wanted in (ROOT_ENTRY, target):
                tree.restore(wanted)
        except DmError:
            continue
    assert attempts > 5
    assert {p: (s.st_mtime_ns, s.st_ctime_ns) for p, s in _stats(flipper).items()} == before
    assert (flipper / "f0").read_text() == "CANARY"


def _read_by_path(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _stats(path: Path) -> dict[str, os.stat_result]:
    return {os.fspath(p): os.lstat(p) for p in [path, *path.iterdir()]}


# --- crash


@pytest.mark.parametrize("attempt", range(6))
def test_killed_restore_is_completed_by_the_next(
    tree: LiveTree, copy: LiveTree, attempt: int
) -> None:
    fill(tree.path)
    for number in range(300):
        (tree.path / f"n{number}").write_bytes(os.urandom(2000))
    (tree.path / "d" / "big").write_bytes(os.urandom(100 * CHUNK))
    tree.capture()
    fill(copy.path)
    (copy.path / "d" / "big").write_bytes(os.urandom(90 * CHUNK))
    copy.age()
    copy.capture()
    child = os.fork()
    if child == 0:
        try:
            copy.restore(tree.root)
        finally:
            os._exit(0)
    time.sleep(0.004 * 2.2**attempt)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    copy.restore(tree.root)
    assert describe_tree(copy.path) == describe_tree(tree.path)
    assert copy.changes() == []


def test_mount_point_in_the_way_is_not_emptied(
    tree: LiveTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A foreign device number below a directory to be removed stops the removal."""
    (tree.path / "extra").mkdir()
    (tree.path / "extra" / "f").write_text("x")
    from dmsync.engine import safe_files

    fstat = os.fstat
    calls = []

    def elsewhere(fd: int) -> os.stat_result:
        found = fstat(fd)
        calls.append(fd)
        if len(calls) == 2:  # the directory to be emptied, after its parent
            return os.stat_result((*found[:2], found.st_dev + 1, *found[3:]))
        return found

    fd = os.open(tree.path, os.O_RDONLY)
    monkeypatch.setattr(os, "fstat", elsewhere)
    with pytest.raises(StorageFailed, match="mount point"):
        safe_files.remove_name(b"extra", fd, b"extra")
    monkeypatch.undo()
    os.close(fd)
    assert (tree.path / "extra" / "f").exists()


# --- random trees

names = st.binary(min_size=1, max_size=12).filter(
    lambda n: b"/" not in n and b"\0" not in n and n not in (b".", b"..") and not is_temporary(n)
)
leaves = st.one_of(
    st.binary(max_size=40),
    st.integers(0, 3 * CHUNK).map(lambda n: bytes(n)),
    st.tuples(st.just("link"), names),
)
random_trees = st.recursive(
    st.dictionaries(names, leaves, max_size=4),
    lambda below: st.dictionaries(names, st.one_of(leaves, below), max_size=5),
    max_leaves=25,
)


def build(path: bytes, shape: dict[bytes, object], files: list[bytes]) -> None:
    for name, value in shape.items():
        at = path + b"/" + name
        if isinstance(value, dict):
            os.mkdir(at)
            build(at, value, files)
        elif isinstance(value, tuple):
            if files and len(value[1]) % 2:
                os.link(files[len(value[1]) % len(files)], at)
            else:
                os.symlink(value[1], at)
        else:
            assert isinstance(value, bytes)
            with open(at, "wb") as file:
                file.write(value)
            files.append(at)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(first=random_trees, second=random_trees)
def test_random_trees_round_trip_and_switch(
    tmp_path_factory: pytest.TempPathFactory,
    first: dict[bytes, object],
    second: dict[bytes, object],
) -> None:
    folder = tmp_path_factory.mktemp("random")
    store = MemoryStore()
    roots, expected = [], []
    for number, shape in enumerate((first, second)):
        source = LiveTree(folder / f"source{number}", store)  # type: ignore[arg-type]
        build(os.fsencode(source.path), shape, [])
        source.capture()
        roots.append(source.root)
        expected.append(describe_tree(source.path))
    tree = LiveTree(folder / "tree", store)  # type: ignore[arg-type]
    for which in (0, 1, 0, 0, 1):
        tree.restore(roots[which])
        assert describe_tree(tree.path) == expected[which]
        assert tree.changes() == []
