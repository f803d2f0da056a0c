"""Reading, hashing and compressing on several threads: the same result as on one, and no thread,
file or pack left behind when something fails on the way."""

import errno
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dmsync.core.ids import Kind
from dmsync.core.objects import Entry, Layout
from dmsync.core.pages import ZERO_RUN, file_spans, find_path, walk_tree
from dmsync.core.records import Encoding, Record
from dmsync.engine import block_content, file_blocks, file_content, ordered_jobs
from dmsync.engine.capture import CaptureStatistics
from dmsync.engine.file_blocks import READ_BYTES, FileMoved
from dmsync.engine.worker_processes import WorkerProcesses
from dmsync.errors import StorageFull
from dmsync.storage.chunk_forms import NewChunk, PreparedChunk
from dmsync.storage.object_store import ObjectStore
from dmsync.storage.pack_writer import PackWriter
from dmsync.storage.packs import HEADER_BYTES, iterate_file_records, read_footer
from tests.support.live_tree import SUBDOT, LiveTree, make_object_store

CHUNK = 128 * 1024


def fill(path: Path, source: random.Random) -> None:
    """Files of every layout and size class, compressible and not, with duplicates and holes."""
    rows = b"".join(b"%08d some row of text\n" % source.randrange(10**6) for _ in range(210_000))
    (path / "table").write_bytes(rows[: 40 * CHUNK])
    (path / "copy").write_bytes(rows[: 40 * CHUNK])
    (path / "a part").write_bytes(rows[: 8 * CHUNK])
    (path / "log").write_bytes(rows[: 30 * CHUNK + 77])
    (path / "noise").write_bytes(source.randbytes(20 * CHUNK))
    (path / "middle").write_bytes(rows[: 3 * CHUNK])
    (path / "odd").write_bytes(rows[: 3 * CHUNK + 1])
    (path / "zeros").write_bytes(bytes(18 * CHUNK))
    with open(path / "sparse", "wb") as file:
        file.truncate(64 * CHUNK)
        file.seek(3 * CHUNK)
        file.write(rows[: 2 * CHUNK])
        file.seek(40 * CHUNK)
        file.write(rows[: 18 * CHUNK])
    for number in range(300):
        below = path / f"d{number % 7}"
        below.mkdir(exist_ok=True)
        (below / f"f{number}").write_bytes(source.randbytes(source.randrange(9000)) * 2)
        (below / f"g{number}").write_bytes(b"the same in many files\n" * 300)


def change(path: Path, source: random.Random) -> None:
    """Pages rewritten in place, a file grown, one new that repeats pages that were replaced."""
    old = bytearray((path / "table").read_bytes())
    log = b""
    for _ in range(60):
        at = source.randrange(len(old) // 8192) * 8192
        log += old[at : at + 8192] + source.randbytes(40)
        old[at + 100 : at + 120] = source.randbytes(20)
    (path / "table").write_bytes(bytes(old) + source.randbytes(8192))
    (path / "a part").write_bytes(bytes(old[8 * CHUNK : 16 * CHUNK]))
    (path / "replayed").write_bytes(log[: len(log) // 4096 * 4096])
    (path / "middle").write_bytes((path / "middle").read_bytes()[::-1])
    (path / "d1" / "f1").write_bytes(b"other")


def packs(store: ObjectStore) -> dict[str, bytes]:
    directory = store.sealed.directory
    return {name: Path(directory, name).read_bytes() for name in os.listdir(directory)}


def records(store: ObjectStore) -> Iterator[Record]:
    for pack in store.packs():
        fd = store.sealed.file(pack.name)
        footer, _ = read_footer(fd, pack.name)
        for record, _, _ in iterate_file_records(fd, HEADER_BYTES, footer.records_end):
            yield record


def job_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("dm-jobs")]


def content_of(store: ObjectStore, entry: Entry) -> bytes:
    return b"".join(
        bytes(span.length) if span.chunk == ZERO_RUN else store.read(Kind.CHUNK, span.chunk)
        for span in file_spans(store, entry)
    )


def test_ids_and_packs_do_not_depend_on_the_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tree"
    path.mkdir()
    fill(path, random.Random(1))
    states: list[tuple[Entry, dict[str, bytes], CaptureStatistics]] = []
    for step in range(2):
        if step:
            change(path, random.Random(2))
        for threads in (0, 1, 3):
            monkeypatch.setattr(ordered_jobs, "THREADS_MAX", threads)
            monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
            home = tmp_path / f"home{threads}"
            if not step:
                home.mkdir()
            tree = LiveTree(path, make_object_store(home))
            if step:
                tree.root, tree.cache = states[0][0], None
            result = tree.capture()
            states.append((result.root, packs(tree.store), result.statistics))
            assert job_threads() == []
            for found, entry in walk_tree(tree.store, tree.root):
                live = tmp_path / "tree" / os.fsdecode(found[len(SUBDOT) + 1 :])
                if live.is_file():
                    assert content_of(tree.store, entry) == live.read_bytes()
            assert list(tree.store.check(full=True)) == []
            encodings = {record.encoding for record in records(tree.store)}
            assert encodings >= ({Encoding.PATCH, Encoding.SIMILAR} if step else {Encoding.RAW})
            tree.store.close()
    for first in (0, 3):
        assert states[first] == states[first + 1] == states[first + 2]


@pytest.mark.parametrize("lost", [False, True])
def test_packs_do_not_depend_on_forked_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    path = tmp_path / "tree"
    path.mkdir()
    fill(path, random.Random(1))
    stored = []
    forked: list[WorkerProcesses[Any, Any]] = []
    made = WorkerProcesses.__init__

    def make(processes: WorkerProcesses[Any, Any], *arguments: Any) -> None:
        made(processes, *arguments)
        forked.append(processes)
        if lost:
            os.kill(processes._workers[0].process, signal.SIGKILL)

    monkeypatch.setattr(WorkerProcesses, "__init__", make)
    monkeypatch.setattr(file_content, "may_fork", lambda: True)  # what runs tests has threads
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(2))
    trees = []
    for home in ("forking", "not"):
        (tmp_path / home).mkdir()
        trees.append(LiveTree(path, make_object_store(tmp_path / home)))
        trees[-1].capture()
    change(path, random.Random(2))
    for tree, fewest_bytes in zip(trees, (READ_BYTES + 1, 1 << 40), strict=True):
        monkeypatch.setattr(file_content, "_FORKED_BYTES_MIN", fewest_bytes)
        result = tree.capture()
        stored.append((result.root, packs(tree.store)))
        assert list(tree.store.check(full=True)) == []
        tree.store.close()
    assert stored[0] == stored[1]
    assert [processes.jobs_left_undone > 0 for processes in forked] == [lost]
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LiveTree:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(3))
    return LiveTree(tmp_path / "tree", make_object_store(tmp_path / "home"))


def entry_of(tree: LiveTree, path: bytes) -> Entry | None:
    return find_path(tree.store, tree.root, SUBDOT + b"/" + path)


Reads = Callable[[int, int, memoryview], None]


def failing_at(offset: int, error: BaseException, times: list[int]) -> Reads:
    """read_into that fails at an offset; `times[0]` counts down to reads that succeed."""
    original = file_blocks.read_into

    def read(fd: int, at: int, block: memoryview) -> None:
        if at == offset and times[0] > 0:
            times[0] -= 1
            raise error
        original(fd, at, block)

    return read


def test_a_block_that_cannot_be_read_makes_its_file_unreadable_and_no_other(
    tree: LiveTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tree.path / "large").write_bytes(random.Random(3).randbytes(5 * READ_BYTES))
    (tree.path / "small").write_bytes(b"fine")
    error = OSError(errno.EIO, "Input/output error")
    monkeypatch.setattr(block_content, "read_into", failing_at(2 * READ_BYTES, error, [99]))
    result = tree.capture()
    assert result.unreadable_paths == [SUBDOT + b"/large"]
    assert entry_of(tree, b"large") is None
    assert entry_of(tree, b"small") is not None
    assert job_threads() == []


@pytest.mark.parametrize("failures", [1, 2, 3])
def test_a_file_that_shrinks_while_blocks_are_read_is_read_up_to_three_times(
    tree: LiveTree, monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    data = random.Random(4).randbytes(4 * READ_BYTES)
    (tree.path / "large").write_bytes(data)
    read = failing_at(READ_BYTES, FileMoved(), [failures])
    monkeypatch.setattr(block_content, "read_into", read)
    result = tree.capture()
    entry = entry_of(tree, b"large")
    if failures < 3:
        assert entry is not None and entry.layout is Layout.FIXED
        assert content_of(tree.store, entry) == data
        assert result.unstable_paths == []
    else:
        assert entry is None
        assert result.unstable_paths == [SUBDOT + b"/large"]


@pytest.mark.parametrize("error", [StorageFull("writing pack: no space left"), KeyboardInterrupt()])
@pytest.mark.parametrize("good", [0, 3])
def test_an_error_while_packing_ends_all_threads_and_seals_nothing(
    tree: LiveTree, monkeypatch: pytest.MonkeyPatch, error: BaseException, good: int
) -> None:
    fill(tree.path, random.Random(5))
    original = PackWriter.put_prepared
    left = [good]

    def put(writer: PackWriter, chunks: list[PreparedChunk]) -> None:
        if left[0] == 0:
            raise error
        left[0] -= 1
        original(writer, chunks)

    monkeypatch.setattr(PackWriter, "put_prepared", put)
    with pytest.raises(type(error)):
        tree.capture()
    assert job_threads() == []
    assert os.listdir(tree.store.sealed.directory) == []
    monkeypatch.setattr(PackWriter, "put_prepared", original)
    tree.capture()
    assert list(tree.store.check(full=True)) == []


def test_an_error_while_preparing_is_raised_and_ends_all_threads(
    tree: LiveTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tree.path, random.Random(6))

    def prepare(writer: PackWriter, runs: list[list[NewChunk]], *, similar: bool) -> None:
        raise StorageFull("reading a base: no space left")

    monkeypatch.setattr(PackWriter, "prepare", prepare)
    with pytest.raises(StorageFull):
        tree.capture()
    assert job_threads() == []
    assert os.listdir(tree.store.sealed.directory) == []


def test_status_hashes_large_files_on_threads_and_starts_none_for_small_ones(
    tree: LiveTree,
) -> None:
    (tree.path / "large").write_bytes(random.Random(7).randbytes(3 * READ_BYTES))
    tree.capture()
    with open(tree.path / "large", "r+b") as file:
        file.seek(READ_BYTES + 5)
        file.write(b"x")
    assert tree.changes() == [("*", b"large")]
    assert tree.status().dirty_bytes == CHUNK
    assert job_threads() == []
