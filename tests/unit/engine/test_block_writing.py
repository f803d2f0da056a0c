"""Large files restored block by block by forked processes: the same tree, whatever becomes of
them."""

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dmsync.core.ids import Kind, object_id, short_key
from dmsync.engine.restoring import block_writing, write_queue
from dmsync.engine.restoring.block_writing import Block, BlockWriter, ForkedBlockWriting
from dmsync.engine.safe_files import is_temporary
from dmsync.engine.worker_processes import WorkerProcesses
from dmsync.errors import Corruption, ObjectMissing, StorageFull
from dmsync.storage.object_store import ObjectStore
from dmsync.storage.packs import PackBuilder, read_footer
from tests.support.live_tree import LiveTree, make_object_store

CHUNK = 128 * 1024
CHUNKS = 21


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_queue, "FILE_BYTES_MIN", 4 * CHUNK)
    monkeypatch.setattr(block_writing, "BLOCK_CHUNKS", 3)
    monkeypatch.setattr(block_writing, "BATCH_CHUNKS", 10)
    monkeypatch.setattr(block_writing, "BATCH_BYTES", 17 * CHUNK)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(2))
    monkeypatch.setattr(write_queue, "may_fork", lambda: True)  # what runs tests has threads


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> list[WorkerProcesses[Any, Any]]:
    """The groups of processes made; a test that has none tests nothing."""
    found: list[WorkerProcesses[Any, Any]] = []
    made = WorkerProcesses.__init__

    def make(processes: WorkerProcesses[Any, Any], *arguments: Any) -> None:
        made(processes, *arguments)
        found.append(processes)

    monkeypatch.setattr(WorkerProcesses, "__init__", make)
    return found


def fill(path: Path, source: random.Random) -> None:
    rows = b"".join(b"%08d some row of text\n" % source.randrange(10**6) for _ in range(120_000))
    (path / "table").write_bytes(rows[: CHUNKS * CHUNK])
    (path / "odd").write_bytes(source.randbytes(7 * CHUNK + 5 * 512))
    (path / "noise").write_bytes(source.randbytes(6 * CHUNK))
    with open(path / "zeros inside", "wb") as file:  # allocated, not holes
        file.write(rows[: 2 * CHUNK] + bytes(4 * CHUNK) + rows[: 2 * CHUNK])
    with open(path / "sparse", "wb") as file:
        file.truncate(20 * CHUNK)
        file.seek(5 * CHUNK)
        file.write(rows[:CHUNK])
    for number in range(20):
        (path / f"small{number}").write_bytes(source.randbytes(5000))


def change(path: Path, source: random.Random) -> None:
    for name in ("table", "odd", "zeros inside"):
        with open(path / name, "r+b") as file:
            for _ in range(30):
                file.seek(source.randrange(7 * CHUNK))
                file.write(source.randbytes(30))


def contents(path: Path) -> dict[str, tuple[bytes, int]]:
    return {found.name: (found.read_bytes(), found.stat().st_mtime_ns) for found in path.iterdir()}


@pytest.fixture
def tree(tmp_path: Path) -> LiveTree:
    """Several versions, so that chunks are chains of patches; captured as it is."""
    tree = LiveTree(tmp_path / "tree", make_object_store(tmp_path / "home"))
    fill(tree.path, random.Random(1))
    for seed in range(4):
        change(tree.path, random.Random(seed))
        tree.capture()
    return tree


def no_children() -> bool:
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return True
    return False


def restored_to(tree: LiveTree, path: Path) -> LiveTree:
    other = LiveTree(path, tree.store)
    other.restore(tree.root)
    return other


def test_new_files_are_what_was_captured(
    tree: LiveTree, tmp_path: Path, forked: list[WorkerProcesses[Any, Any]]
) -> None:
    other = restored_to(tree, tmp_path / "other")
    assert contents(other.path) == contents(tree.path)
    assert [processes.jobs_left_undone for processes in forked] == [0]
    assert no_children()
    allocated = (other.path / "zeros inside").stat().st_blocks * 512
    assert allocated >= 8 * CHUNK
    assert (other.path / "sparse").stat().st_blocks * 512 < 10 * CHUNK


def test_changed_files_get_only_what_differs_and_keep_their_inode(
    tree: LiveTree, forked: list[WorkerProcesses[Any, Any]]
) -> None:
    before, root = contents(tree.path), tree.root
    inode = (tree.path / "table").stat().st_ino
    change(tree.path, random.Random(9))
    tree.capture()
    result = tree.restore(root)
    assert contents(tree.path) == before
    assert (tree.path / "table").stat().st_ino == inode
    assert 0 < result.bytes_written <= len(before["odd"][0]) + 2 * 30 * 2 * 4096
    assert [processes.jobs_left_undone for processes in forked] == [0]
    assert no_children()


def test_a_file_changed_unseen_is_restored_too(tree: LiveTree) -> None:
    before = contents(tree.path)
    change(tree.path, random.Random(10))
    tree.cache = None
    tree.restore(tree.root)
    assert contents(tree.path) == before


@pytest.mark.parametrize("signalled", [signal.SIGKILL, signal.SIGTERM])
def test_killed_processes_cost_nothing_but_time(
    tree: LiveTree,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    signalled: signal.Signals,
    forked: list[WorkerProcesses[Any, Any]],
) -> None:
    write: Callable[..., list[int]] = ForkedBlockWriting.__call__

    def write_and_die(self: ForkedBlockWriting, fds: list[int], batch: list[Block]) -> list[int]:
        written = write(self, fds, batch)
        if batch[0].offset >= 6 * CHUNK:
            os.kill(os.getpid(), signalled)
        return written

    monkeypatch.setattr(ForkedBlockWriting, "__call__", write_and_die)
    assert contents(restored_to(tree, tmp_path / "other").path) == contents(tree.path)
    assert forked[0].jobs_left_undone > 0
    assert no_children()


def test_without_direct_writing_it_is_the_same(
    tree: LiveTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_writing, "opened_directly", lambda *_: -1)
    assert contents(restored_to(tree, tmp_path / "other").path) == contents(tree.path)


def without(tree: LiveTree, key: bytes) -> ObjectStore:
    """The tree's objects opened anew, with packs that never had the object of this key."""
    directory = tree.store.sealed.directory
    for pack in tree.store.packs():
        path = os.path.join(directory, pack.name)
        with open(path, "rb") as file:
            footer, _ = read_footer(file.fileno(), pack.name)
            data = file.read()
        builder = PackBuilder.create(directory, "tmp-", "", tree.store.dot_id)
        ends = [*footer.offsets[1:], footer.records_end]
        for found, start, end in zip(footer.keys, footer.offsets, ends, strict=True):
            if found != key:
                builder.append(data[start:end], found)
        info = builder.finish()
        os.rename(builder.path, os.path.join(directory, info.name))
        builder.close()
        if info.name != pack.name:
            os.unlink(path)
    tree.store.close()
    for left in Path(tree.store.dot_dir).glob("index.sqlite*"):
        left.unlink()
    return ObjectStore(tree.store.dot_dir)


def test_a_chunk_that_is_missing_is_named_and_no_part_of_its_file_stays(
    tree: LiveTree, tmp_path: Path
) -> None:
    with open(tree.path / "table", "rb") as file:
        file.seek(10 * CHUNK)
        gone = short_key(object_id(Kind.CHUNK, file.read(CHUNK)))
    other = LiveTree(tmp_path / "other", without(tree, gone))
    with pytest.raises(ObjectMissing):
        other.restore(tree.root)
    assert not (other.path / "table").exists()
    assert not [name for name in os.listdir(other.path) if is_temporary(os.fsencode(name))]
    assert no_children()


def test_a_damaged_chunk_is_never_written(tree: LiveTree, tmp_path: Path) -> None:
    noise = (tree.path / "noise").read_bytes()
    for pack in tree.store.packs():
        path = Path(tree.store.sealed.directory, pack.name)
        data = bytearray(path.read_bytes())
        at = data.find(noise[3 * CHUNK : 3 * CHUNK + 64])
        if at >= 0:
            data[at + 5] ^= 1
            path.write_bytes(data)
    other = LiveTree(tmp_path / "other", make_object_store(tmp_path / "home"))
    with pytest.raises(Corruption):
        other.restore(tree.root)
    assert not (other.path / "noise").exists()
    assert no_children()


def test_a_full_disk_is_told_by_the_calling_process(
    tree: LiveTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(BlockWriter, "write", refuse)
    other = LiveTree(tmp_path / "other", tree.store)
    with pytest.raises(StorageFull):
        other.restore(tree.root)
    assert not [name for name in os.listdir(other.path) if is_temporary(os.fsencode(name))]
    assert no_children()
