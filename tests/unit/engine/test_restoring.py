"""The parts of a restore: batches, in-place changes, failures half way, syncing on the way."""

import gc
import os
import random
import shutil
import subprocess
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dmsync.core.ids import Kind, ObjectId
from dmsync.core.objects import Entry
from dmsync.core.pages import ZERO_RUN, Span, file_spans, find_path
from dmsync.engine.differing_bytes import differing_spans
from dmsync.engine.restoring import write_queue, writeback
from dmsync.engine.restoring.file_writing import write_files, write_where_different
from dmsync.engine.restoring.writeback import Writeback
from dmsync.engine.safe_files import is_temporary
from dmsync.errors import BadObject, ObjectMissing, StorageFailed
from dmsync.storage.object_store import ObjectStore
from tests.support.live_tree import LiveTree, make_object_store, set_acl
from tests.support.memory_store import MemoryStore
from tests.support.tree import describe_tree

CHUNK = 128 * 1024
PAGE = 4096


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return make_object_store(tmp_path / "home")


@pytest.fixture
def tree(tmp_path: Path, store: ObjectStore) -> LiveTree:
    return LiveTree(tmp_path / "tree", store)


@pytest.fixture
def copy(tmp_path: Path, store: ObjectStore) -> LiveTree:
    return LiveTree(tmp_path / "copy", store)


def entry_of(tree: LiveTree, name: str) -> Entry:
    found = find_path(tree.store, tree.root, b"__default__/" + name.encode())
    assert found is not None
    return found


def open_descriptors() -> int:
    gc.collect()  # not what other tests left open in cycles
    count = 0
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the listing's own
            # how often the store has a pack open is its own affair, and bounded there
            count += not os.readlink(f"/proc/self/fd/{name}").endswith(".pack")
    return count


def temporaries(path: Path) -> list[str]:
    return [
        name
        for _, folders, files in os.walk(path)
        for name in folders + files
        if is_temporary(os.fsencode(name))
    ]


# --- batches -------------------------------------------------------------------------------------


def fill_wide(path: Path) -> None:
    """Directories of files and of directories, in turns, some of them empty."""
    for number in range(40):
        folder = path / f"d{number % 7}" / f"e{number}"
        folder.mkdir(parents=True)
        for name in range(number % 4):
            (folder / f"f{name}").write_bytes(os.urandom(100 * name))
        (path / f"d{number % 7}" / f"zz{number}").write_bytes(b"behind a directory")
        os.utime(folder, ns=(1, 10**18 + number))
    (path / "large").write_bytes(os.urandom(9 * CHUNK))
    os.link(path / "d0" / "zz0", path / "d6" / "a link")
    os.chmod(path / "d3", 0o550)


@pytest.mark.parametrize(("jobs", "descriptors"), [(1, 1), (3, 2), (5, 128), (4096, 3)])
def test_batches_of_any_size_give_the_same_tree(
    tree: LiveTree,
    copy: LiveTree,
    jobs: int,
    descriptors: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fill_wide(tree.path)
    tree.capture()
    monkeypatch.setattr(write_queue, "_JOBS_MAX", jobs)
    monkeypatch.setattr(write_queue, "_DESCRIPTORS_MAX", descriptors)
    copy.restore(tree.root)
    before = open_descriptors()
    (copy.path / "d2" / "e2" / "f1").unlink()
    (copy.path / "d4" / "zz4").write_bytes(b"changed")
    with open(copy.path / "large", "r+b") as file:
        file.write(b"changed")
    copy.restore(tree.root)
    assert open_descriptors() == before
    assert describe_tree(copy.path) == describe_tree(tree.path)
    assert copy.changes() == []


MIB = 1024 * 1024


@pytest.fixture
def ext2(tmp_path: Path) -> Iterator[Path]:
    """A filesystem that writes past the page cache and allocates nothing ahead."""
    program = shutil.which("mkfs.ext2", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if program is None or os.geteuid() != 0:
        pytest.skip("an ext2 image takes mkfs.ext2 and root")
    image, directory = tmp_path / "image", tmp_path / "ext2"
    directory.mkdir()
    image.touch()
    os.truncate(image, 64 * MIB)
    subprocess.run([program, "-q", image], check=True)
    if subprocess.run(["mount", "-t", "ext2", "-o", "loop", image, directory]).returncode:
        pytest.skip("mounting is not allowed here")
    yield directory
    subprocess.run(["umount", directory], check=True)


def fill_long(path: Path) -> dict[str, bytes]:
    """Files of a MiB and more, with runs of zeros that are no holes, ending anywhere."""
    source = random.Random(3)
    text = b"".join(b"%d of these rows\n" % source.randrange(10**9) for _ in range(60_000))
    contents = {
        "rows": text,
        "noise": source.randbytes(3 * MIB + 17),
        "zeros inside": text[:MIB] + bytes(3 * MIB) + text[: MIB + 5],
        "zeros at an odd place": text[: MIB + 3] + bytes(2 * MIB + 7) + source.randbytes(4097),
        "zeros at the end": text[:MIB] + bytes(2 * MIB),
        "zeros at the beginning": bytes(2 * MIB) + text[: MIB + 1],
    }
    for name, content in contents.items():
        (path / name).write_bytes(content)
    return contents


@pytest.mark.parametrize("pwrite_max", [None, 5000])
def test_long_files_are_whole_and_have_no_holes(
    tree: LiveTree, copy: LiveTree, monkeypatch: pytest.MonkeyPatch, pwrite_max: int | None
) -> None:
    contents = fill_long(tree.path)
    tree.capture()
    if pwrite_max is not None:
        write = os.pwrite
        monkeypatch.setattr(os, "pwrite", lambda fd, data, at: write(fd, data[:pwrite_max], at))
    copy.restore(tree.root)
    check_long(copy.path, contents)


def test_a_filesystem_that_allocates_nothing_ahead_gets_zeros_written(
    tree: LiveTree, ext2: Path
) -> None:
    contents = fill_long(tree.path)
    tree.capture()
    other = LiveTree(ext2 / "tree", tree.store)
    other.restore(tree.root)
    check_long(other.path, contents)


def check_long(path: Path, contents: dict[str, bytes]) -> None:
    for name, content in contents.items():
        assert (path / name).read_bytes() == content
        assert (path / name).stat().st_blocks * 512 >= len(content)


class LosingStore(MemoryStore):
    """Objects that go missing when they are asked for in a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.lost: set[ObjectId] = set()

    def read(self, kind: Kind, oid: ObjectId) -> bytes:
        if oid in self.lost:
            raise ObjectMissing("lost")
        return super().read(kind, oid)


def test_object_missing_half_way_leaves_no_part_of_a_file_and_can_be_completed(
    tmp_path: Path,
) -> None:
    store = LosingStore()
    tree = LiveTree(tmp_path / "tree", store)  # type: ignore[arg-type]
    copy = LiveTree(tmp_path / "copy", store)  # type: ignore[arg-type]
    fill_wide(tree.path)
    tree.capture()
    spans = list(file_spans(store, entry_of(tree, "large")))
    for lost in (spans[4].chunk, ObjectId(entry_of(tree, "d5/zz5").content)):
        store.lost = {lost}
        before = open_descriptors()
        with pytest.raises(ObjectMissing):
            copy.restore(tree.root)
        assert open_descriptors() == before
        assert temporaries(copy.path) == []
        for folder, _, files in os.walk(copy.path):
            for name in files:
                ours = Path(folder) / name
                theirs = tree.path / ours.relative_to(copy.path)
                assert ours.read_bytes() == theirs.read_bytes(), "whole or not there"
    store.lost = set()
    copy.restore(tree.root)
    assert describe_tree(copy.path) == describe_tree(tree.path)


class ShortStore(MemoryStore):
    """Gives chunks that are too short, as no store that verifies does."""

    def read_many(self, kind: Kind, ids: Iterable[ObjectId]) -> Iterator[bytes]:
        return (content[:-1] for content in super().read_many(kind, ids))


def test_chunk_that_is_not_as_long_as_its_span_is_refused(tmp_path: Path) -> None:
    store = ShortStore()
    tree = LiveTree(tmp_path / "tree", store)  # type: ignore[arg-type]
    copy = LiveTree(tmp_path / "copy", store)  # type: ignore[arg-type]
    (tree.path / "f").write_bytes(b"content")
    tree.capture()
    with pytest.raises(BadObject):
        copy.restore(tree.root)
    assert os.listdir(copy.path) == []


def test_jobs_are_finished_in_their_order_with_and_without_content() -> None:
    store = MemoryStore()
    chunk = store.writer().put(Kind.CHUNK, b"content")
    done: list[object] = []

    class Job:
        def __init__(self, *spans: Span) -> None:
            self._spans = spans

        def spans(self) -> Iterator[tuple[int, Span]]:
            return ((0, span) for span in self._spans)

        def write(self, offset: int, span: Span, content: bytes | None) -> None:
            done.append(content)

        def finish(self) -> None:
            done.append(self)

        def abandon(self) -> None:
            raise AssertionError("nothing fails")

    content, zeros = Span(7, chunk), Span(9, ZERO_RUN)
    jobs = [Job(), Job(zeros), Job(content, zeros), Job(), Job(zeros, content), Job(zeros), Job()]
    write_files(store, jobs)
    a, b, c, d, e, f, g = jobs
    data = b"content"
    assert done == [a, None, b, data, None, c, d, None, data, e, None, f, g]


# --- names made in place --------------------------------------------------------------------------


def test_file_in_a_directory_with_a_default_acl_has_only_what_is_recorded(
    tree: LiveTree, copy: LiveTree
) -> None:
    (tree.path / "d" / "below").mkdir(parents=True)
    (tree.path / "d" / "f").write_bytes(b"f")
    os.symlink("f", tree.path / "d" / "link")
    os.chmod(tree.path / "d" / "f", 0o640)
    tree.age()
    tree.capture()
    for existing in ("d", ""):
        (copy.path / existing).mkdir(exist_ok=True)
        set_acl(copy.path / existing, "u:65534:rwx", default=True)
        copy.cache = None
        copy.restore(tree.root)
        assert describe_tree(copy.path / "d") == describe_tree(tree.path / "d")
        assert os.listxattr(copy.path / "d" / "f") == []
        assert os.listxattr(copy.path / "d" / "below") == []
        for name in ("d/f", "d/link"):
            (copy.path / name).unlink()
        (copy.path / "d" / "below").rmdir()


def test_modes_that_the_umask_would_cut_are_exact(tree: LiveTree, copy: LiveTree) -> None:
    (tree.path / "d").mkdir()
    for mode in (0o000, 0o444, 0o600, 0o666, 0o777, 0o1644):
        (tree.path / "d" / f"{mode:o}").write_bytes(b"x")
        os.chmod(tree.path / "d" / f"{mode:o}", mode)
    tree.capture()
    before = os.umask(0o027)
    try:
        copy.restore(tree.root)
    finally:
        os.umask(before)
    assert describe_tree(copy.path) == describe_tree(tree.path)


# --- changes in place ------------------------------------------------------------------------------


def test_only_the_pages_that_differ_are_written(tmp_path: Path) -> None:
    live, wanted = bytearray(os.urandom(5 * PAGE + 100)), b""
    path = tmp_path / "f"
    path.write_bytes(b"before" + live)
    for place in (PAGE + 5, 2 * PAGE, 5 * PAGE + 99):
        live[place] ^= 1
    wanted = bytes(live)
    with open(path, "r+b") as file:
        assert write_where_different(file.fileno(), wanted, 6) == 2 * PAGE + 100
        assert write_where_different(file.fileno(), wanted, 6) == 0
    assert path.read_bytes() == b"before" + wanted


def test_pages_behind_the_end_of_the_file_are_written(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"x" * PAGE)
    with open(path, "r+b") as file:
        assert write_where_different(file.fileno(), b"x" * PAGE * 3, 0) == 2 * PAGE
    assert path.read_bytes() == b"x" * PAGE * 3


def test_log_that_grew_is_taken_back_and_on_again_in_place(tree: LiveTree) -> None:
    log = tree.path / "log"
    log.write_bytes(os.urandom(30 * CHUNK + 7))
    tree.age()
    tree.capture()
    short, short_content = tree.root, log.read_bytes()
    with open(log, "ab") as file:
        file.write(os.urandom(CHUNK + 1))
    tree.age()
    tree.capture()
    long, long_content = tree.root, log.read_bytes()
    inode = os.stat(log).st_ino
    for target, content in ((short, short_content), (long, long_content)):
        result = tree.restore(target)
        assert log.read_bytes() == content
        assert os.stat(log).st_ino == inode
        assert result.bytes_written < 6 * CHUNK
        assert tree.changes() == []
        tree.age()


def test_file_that_shifted_gets_a_new_inode(tree: LiveTree) -> None:
    file = tree.path / "f"
    content = os.urandom(20 * CHUNK + 7)
    file.write_bytes(content)
    tree.age()
    tree.capture()
    target = tree.root
    file.write_bytes(b"shifted" + content)
    tree.age()
    tree.capture()
    inode = os.stat(file).st_ino
    tree.restore(target)
    assert file.read_bytes() == content
    assert os.stat(file).st_ino != inode


def test_first_of_a_link_group_changed_in_place_is_linked_to(tree: LiveTree) -> None:
    first, second = tree.path / "a", tree.path / "b"
    first.write_bytes(os.urandom(4 * CHUNK))
    os.link(first, second)
    tree.age()
    tree.capture()
    target, content = tree.root, first.read_bytes()
    second.unlink()
    with open(first, "r+b") as file:
        file.write(b"changed")
    tree.restore(target)
    assert os.path.samefile(first, second)
    assert first.read_bytes() == content
    assert tree.changes() == []


edits = st.lists(
    st.tuples(st.integers(0, 12 * CHUNK), st.integers(1, 3 * CHUNK), st.booleans()), max_size=3
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(edits=edits, sizes=st.tuples(st.integers(1, 12), st.integers(1, 12)), odd=st.booleans())
def test_spans_said_to_be_the_same_are(
    edits: list[tuple[int, int, bool]],
    sizes: tuple[int, int],
    odd: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    store = MemoryStore()
    tree = LiveTree(tmp_path_factory.mktemp("t"), store)  # type: ignore[arg-type]
    old = bytearray(bytes(range(1, 252)) * (sizes[0] * CHUNK // 251 + 1))[: sizes[0] * CHUNK + odd]
    for number in range(0, len(old), PAGE):
        old[number : number + 4] = number.to_bytes(4, "big")
    new = bytearray(old[: sizes[1] * CHUNK])
    for offset, length, zero in edits:
        part = new[offset : offset + length]
        new[offset : offset + length] = bytes(len(part)) if zero else bytes(b ^ 85 for b in part)
    entries = []
    for content in (old, new):
        (tree.path / "f").write_bytes(content)
        tree.cache = None
        tree.capture()
        entries.append(entry_of(tree, "f"))
    said = dict(differing_spans(store, *entries))
    offset = 0
    for span in file_spans(store, entries[1]):
        if offset in said:
            assert said.pop(offset) == span
        else:
            end = offset + span.length
            assert old[offset:end] == new[offset:end]
        offset += span.length
    assert said == {}


# --- durability ------------------------------------------------------------------------------------


def test_filesystem_is_synced_on_the_way_and_once_all_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_the_way = threading.Event()
    threads: list[str] = []

    def sync(fd: int) -> None:
        threads.append(threading.current_thread().name)
        on_the_way.set()

    monkeypatch.setattr(writeback, "sync_filesystem", sync)
    monkeypatch.setattr(writeback, "_SYNC_BYTES", 100_000)
    synced = Writeback()
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        synced.enter(fd, os.fstat(fd).st_dev)
        assert os.fstat(fd).st_dev in synced
        synced.wrote(10)
        assert threads == []
        synced.wrote(100_000)
        assert on_the_way.wait(30)
        synced.finish()
        assert threads[0] == "writeback"
        assert threads[-1] == threading.current_thread().name
    finally:
        synced.close()
        os.close(fd)


def test_failure_to_sync_on_the_way_is_not_lost(
    tree: LiveTree, copy: LiveTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel tells of a failed write once."""
    (tree.path / "f").write_bytes(os.urandom(3 * CHUNK))
    tree.capture()
    told = threading.Event()

    def sync(fd: int) -> None:
        if threading.current_thread().name == "writeback" and not told.is_set():
            told.set()
            raise StorageFailed("cannot sync the tree: Input/output error")

    monkeypatch.setattr(writeback, "sync_filesystem", sync)
    monkeypatch.setattr(writeback, "_SYNC_BYTES", CHUNK)
    original = Writeback.finish

    def finish(self: Writeback) -> None:
        assert told.wait(30)
        original(self)

    monkeypatch.setattr(Writeback, "finish", finish)
    before = open_descriptors()
    with pytest.raises(StorageFailed, match="Input/output"):
        copy.restore(tree.root)
    assert open_descriptors() == before
