"""The fast ways of walking a tree find what the plain one finds; and when a walk must sync."""

import mmap
import os
import random
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dmsync.engine import (
    directory_building,
    safe_files,
    scan_workers,
    stat_baseline,
    tree_scan,
)
from dmsync.engine.scan_result import Scan, joined_draft
from dmsync.engine.stat_baseline import Baseline, Sync
from dmsync.engine.tree_scan import NameRuns, Scanner, stat_of
from dmsync.errors import CaptureFailed, StorageFailed
from dmsync.storage import stat_cache
from dmsync.storage.object_store import ObjectStore
from dmsync.storage.stat_cache import StatCache, walk_order
from tests.support.live_tree import LiveTree, make_object_store

NOW_NS = 2**62
"""A clock far ahead: baselines take the filesystem's."""
SEEDS = range(6)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ObjectStore]:
    with make_object_store(tmp_path / "home") as objects:
        yield objects


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every directory is a large one, in parts of three names."""
    monkeypatch.setattr(tree_scan, "LARGE_DIRECTORY_BYTES", 0)
    for module in (tree_scan, stat_cache, directory_building):
        monkeypatch.setattr(module, "PART_NAMES", 3)
    monkeypatch.setattr(stat_cache, "_PART_BYTES_MAX", 100)


@pytest.fixture
def small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trees of a few directories are walked by as many processes as there may be."""
    monkeypatch.setattr(scan_workers, "RANGE_BYTES_MIN", 1)
    # Libraries loaded by other tests of this process may have started threads of their own.
    monkeypatch.setattr(scan_workers, "knows_its_threads", lambda: True)
    monkeypatch.setattr(stat_cache, "_SEGMENT_BYTES", 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})


WAYS = ["plain", "small_parts", "small_ranges", "both"]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    for fixture in ("small_parts", "small_ranges"):
        if name in (fixture, "both"):
            request.getfixturevalue(fixture)
    return name


def _grow(root: Path, chance: random.Random, steps: int) -> None:
    """Random changes of a tree: names come, go, move, change kind, are linked."""
    for _ in range(steps):
        directories = [root, *(p for p in root.rglob("*") if p.is_dir() and not p.is_symlink())]
        place = chance.choice(directories)
        path = place / f"{chance.choice('-.09azÄ')}{chance.randrange(12)}"
        there = sorted(place.iterdir())
        match chance.randrange(8):
            case 0 | 1 | 2:
                if not path.is_dir():
                    path.write_bytes(chance.randbytes(chance.randrange(40)))
            case 3:
                path.mkdir(exist_ok=True) if not path.is_file() else None
            case 4 if there:
                gone = chance.choice(there)
                shutil.rmtree(gone) if gone.is_dir() and not gone.is_symlink() else gone.unlink()
            case 5 if there and not os.path.lexists(path):
                chance.choice(there).rename(path)
            case 6 if there and not os.path.lexists(path):
                old = chance.choice(there)
                os.link(old, path, follow_symlinks=False) if not old.is_dir() else path.symlink_to(
                    "x"
                )
            case _ if there:
                os.utime(chance.choice(there), ns=(1, 1), follow_symlinks=False)


def _scan(tree: LiveTree, cache: StatCache | None, processes: int | None = 1) -> Scan:
    fd = os.open(tree.path, os.O_RDONLY)
    try:
        return Scanner(
            root_fd=fd,
            as_subdot=tree.subdot,
            cache=cache,
            root_metadata=tree.as_root,
            large_bytes=20,
            processes_max=processes,
        ).run(Baseline(NOW_NS, Sync.NEVER))
    finally:
        os.close(fd)


def _found(scan: Scan) -> dict[str, Any]:
    """All that a scan says; of directories without a change only that they have none."""
    drafts = [
        joined_draft(draft)[:-1] if is_dirty else (draft.path,)
        for is_dirty, draft in scan.drafts_backward()
    ]
    paths = [draft[0] for draft in drafts]
    numbers = sorted(dict.fromkeys(paths), key=walk_order)
    return {
        "drafts": list(dict.fromkeys(drafts)),
        "groups": {
            key: [(path, numbers[number]) for path, number in members]
            for key, members in scan.groups.items()
        },
        "parents": [number and numbers[scan.parents[number]] for number in range(len(numbers))],
        "gone": scan.gone,
        "large": scan.large,
        "unopened": scan.unopened,
        "hardlinks": scan.hardlinks,
        "counts": (scan.files, scan.bytes, scan.directories),
    }


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("subdot", [b"data", None])
def test_every_way_of_walking_finds_the_same(
    tmp_path: Path, store: ObjectStore, way: str, seed: int, subdot: bytes | None
) -> None:
    chance = random.Random(seed)
    tree = LiveTree(tmp_path / "tree", store, subdot=subdot, as_root=subdot is None)
    _grow(tree.path, chance, 80)
    tree.age()
    tree.capture()
    cache = tree.cache
    assert cache is not None
    tree.age()
    for steps in (0, 1, 5, 30):
        _grow(tree.path, chance, steps)
        unsure = StatCache(cache.root, cache._spool)  # says nothing about listings
        plain = _found(_scan(tree, unsure))
        assert _found(_scan(tree, cache)) == plain
        assert _found(_scan(tree, cache, processes=4)) == plain
    with pytest.MonkeyPatch.context() as simple:
        simple.setattr(tree_scan, "LARGE_DIRECTORY_BYTES", 2**40)
        simple.setattr(tree_scan, "PART_NAMES", 8192)
        assert _found(_scan(tree, unsure)) == plain


@pytest.mark.parametrize("seed", SEEDS)
def test_every_way_of_walking_commits_the_same(
    tmp_path: Path, store: ObjectStore, way: str, seed: int
) -> None:
    chance = random.Random(seed)
    tree = LiveTree(tmp_path / "tree", store)
    for steps in (80, 0, 3, 20):
        _grow(tree.path, chance, steps)
        tree.age()
        stated = tree.status().changes
        captured = tree.capture()
        assert bool(stated) == bool(captured.changes and captured.changes.total().count)
        fresh = LiveTree(tree.path, store)
        with pytest.MonkeyPatch.context() as simple:
            simple.setattr(tree_scan, "LARGE_DIRECTORY_BYTES", 2**40)
            simple.setattr(tree_scan, "PART_NAMES", 8192)
            fresh.capture()
        assert captured.root == fresh.root
        assert not tree.changes()


@pytest.mark.parametrize("seed", SEEDS)
def test_what_changes_during_captures_is_found_at_last(
    tmp_path: Path, store: ObjectStore, way: str, seed: int
) -> None:
    chance = random.Random(seed)
    tree = LiveTree(tmp_path / "tree", store)
    _grow(tree.path, chance, 60)
    ended = threading.Event()

    def change() -> None:
        while not ended.is_set():
            (tree.path / f"extra-{chance.randrange(9)}").mkdir(exist_ok=True)
            (tree.path / f"extra-{chance.randrange(9)}.txt").write_bytes(chance.randbytes(9))
            shutil.rmtree(tree.path / f"extra-{chance.randrange(9)}", ignore_errors=True)

    changing = threading.Thread(target=change)
    changing.start()
    try:
        for _ in range(4):
            _capture_loosely(tree)
    finally:
        ended.set()
        changing.join()
    tree.capture()
    fresh = LiveTree(tree.path, store)
    fresh.capture()
    assert tree.root == fresh.root
    assert not tree.changes()


def _capture_loosely(tree: LiveTree) -> None:
    from dmsync.engine.capture import capture_tree

    with tree.store.writer() as writer:
        result = capture_tree(
            tree_path=os.fspath(tree.path),
            as_subdot=tree.subdot,
            store=tree.store,
            writer=writer,
            base=tree.root,
            stat_cache=tree.cache,
            now_ns=NOW_NS,
        )
        writer.seal()
    tree.root, tree.cache = result.root, result.stat_cache


# --- workers -------------------------------------------------------------------------------------


@pytest.fixture
def wide(tmp_path: Path, store: ObjectStore, small_ranges: None) -> LiveTree:
    tree = LiveTree(tmp_path / "tree", store)
    for name in "abcdef":
        (tree.path / name / "below").mkdir(parents=True)
        (tree.path / name / "below" / "file").write_text(name)
    tree.age()
    tree.capture()
    tree.age()
    (tree.path / "f" / "below" / "file").write_text("changed")
    return tree


def test_several_processes_share_the_walk(wide: LiveTree, monkeypatch: pytest.MonkeyPatch) -> None:
    forks: list[int] = []
    fork = os.fork

    def fork_and_note() -> int:
        forks.append(fork())
        return forks[-1]

    monkeypatch.setattr(os, "fork", fork_and_note)
    assert any(_scan(wide, wide.cache, processes=3).dirty)
    assert len(forks) == 2
    for process in forks:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def _die(*_: object) -> bytes:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def _fail(*_: object) -> bytes:
    raise CaptureFailed("only here")


@pytest.mark.parametrize("fault", [_die, _fail])
def test_range_of_a_worker_that_fails_is_walked_all_the_same(
    wide: LiveTree, monkeypatch: pytest.MonkeyPatch, fault: Callable[..., bytes]
) -> None:
    plain = _found(_scan(wide, wide.cache))
    monkeypatch.setattr(Scanner, "_scan_apart", fault)
    assert _found(_scan(wide, wide.cache, processes=4)) == plain


def test_worker_that_hangs_is_ended(wide: LiveTree, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = _found(_scan(wide, wide.cache))
    monkeypatch.setattr(Scanner, "_scan_apart", lambda *_: signal.pause())
    monkeypatch.setattr(tree_scan, "PATIENCE_S", 0.01)
    assert _found(_scan(wide, wide.cache, processes=4)) == plain


def test_error_in_a_workers_range_is_typed(wide: LiveTree, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, *, is_large: bool = False) -> list[bytes]:
        if b"f/below" in os.readlink(f"/proc/self/fd/{fd}").encode():
            raise OSError(5, "Input/output error")
        return sorted(map(os.fsencode, os.listdir(fd)))

    monkeypatch.setattr(tree_scan, "list_names", refuse)
    (wide.path / "f" / "below" / "new").touch()
    with pytest.raises(CaptureFailed, match="f/below"):
        _scan(wide, wide.cache, processes=4)


def test_stop_at_change_stays_in_one_process(
    wide: LiveTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("forked"))
    (wide.path / "a" / "below" / "file").write_text("changed")
    fd = os.open(wide.path, os.O_RDONLY)
    scanner = Scanner(
        root_fd=fd, as_subdot=wide.subdot, cache=wide.cache, root_metadata=False, large_bytes=20
    )
    scan = scanner.run(Baseline(NOW_NS, Sync.NEVER), stop_at_change=True)
    os.close(fd)
    assert any(scan.dirty)
    assert scan.directories < 2 + 2 * 6


# --- listing -------------------------------------------------------------------------------------


def test_unchanged_directories_are_not_listed(
    tmp_path: Path, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = LiveTree(tmp_path / "tree", store)
    (tree.path / "same").mkdir()
    (tree.path / "other").mkdir()
    (tree.path / "same" / "file").touch()
    tree.age()
    tree.capture()
    tree.age()
    (tree.path / "other" / "new").touch()
    (tree.path / "same" / "file").write_text("changed")
    listed = []
    list_names = tree_scan.list_names

    def note(fd: int, *, is_large: bool = False) -> list[bytes]:
        listed.append(Path(f"/proc/self/fd/{fd}").readlink().name)
        return list_names(fd, is_large=is_large)

    monkeypatch.setattr(tree_scan, "list_names", note)
    assert {path for _, path in tree.changes()} == {b"other/new", b"same/file"}
    assert listed == ["other"]


def test_name_made_right_after_its_directory_was_listed_is_found(
    tmp_path: Path, store: ObjectStore, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    tree = LiveTree(tmp_path / "tree", store)
    (tree.path / "d").mkdir()
    list_names = tree_scan.list_names

    def list_and_add(fd: int, *, is_large: bool = False) -> list[bytes]:
        names = list_names(fd, is_large=is_large)
        if Path(f"/proc/self/fd/{fd}").readlink().name == "d":
            os.close(os.open("late", os.O_CREAT, dir_fd=fd))
        return names

    tree.age()
    with monkeypatch.context() as patched:
        patched.setattr(tree_scan, "list_names", list_and_add)
        _capture_loosely(tree)
    tree.age()
    assert b"d/late" in {path for _, path in tree.changes()}


def test_restored_tree_is_listed_until_a_capture_vouches_for_it(
    tmp_path: Path, store: ObjectStore
) -> None:
    tree = LiveTree(tmp_path / "tree", store)
    (tree.path / "d").mkdir()
    (tree.path / "d" / "file").touch()
    tree.capture()
    other = LiveTree(tmp_path / "other", store)
    other.restore(tree.root)
    assert other.cache is not None
    assert other.cache.listed_ns == 0
    other.age()
    other.capture()
    assert other.cache.listed_ns > 0
    assert not other.changes()


def test_name_runs_come_back_in_order_and_up_to_where_asked() -> None:
    names = [b".", *sorted(f"{number:x}".encode() for number in range(20_000)), b"~"]
    runs = NameRuns(list(names))
    found = [name for run in runs.before(b"8") for name in run]
    assert found == [name for name in names if name < b"8"]
    assert [name for run in runs.before(b"8") for name in run] == []
    assert found + [name for run in runs.before(None) for name in run] == names
    assert list(runs.before(None)) == [[]]


# --- the mmap rule -------------------------------------------------------------------------------


@pytest.fixture
def syncs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens, in order: `sync`, and `read` of a file."""
    events: list[str] = []
    sync, read = safe_files.sync_filesystem, safe_files.open_file
    monkeypatch.setattr(stat_baseline, "moves_times_promptly", lambda _: True)

    def sync_and_note(fd: int) -> None:
        sync(fd)
        events.append("sync")

    def read_and_note(name: bytes, directory_fd: int) -> int:
        events.append("read")
        return read(name, directory_fd)

    monkeypatch.setattr(stat_baseline, "sync_filesystem", sync_and_note)
    monkeypatch.setattr("dmsync.engine.file_reading.open_file", read_and_note)
    return events


@pytest.fixture
def settled(tmp_path: Path, store: ObjectStore) -> LiveTree:
    tree = LiveTree(tmp_path / "tree", store)
    (tree.path / "file").write_bytes(bytes(4096))
    (tree.path / "other").write_text("x")
    tree.age()
    tree.capture()
    tree.age()
    return tree


def test_nothing_changed_means_no_sync(settled: LiveTree, syncs: list[str]) -> None:
    settled.capture()
    assert not settled.changes()
    assert syncs == []


def test_sync_is_over_before_the_first_read(settled: LiveTree, syncs: list[str]) -> None:
    (settled.path / "other").write_text("y")
    settled.capture()
    assert syncs == ["sync", "read"]


def test_status_reads_without_a_sync(settled: LiveTree, syncs: list[str]) -> None:
    (settled.path / "other").write_text("y")
    assert settled.changes() == [("*", b"other")]
    assert syncs == ["read"]


def test_filesystem_that_moves_times_late_is_synced_first(
    settled: LiveTree, syncs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stat_baseline, "moves_times_promptly", lambda _: False)

    def stat_and_note(found: os.stat_result) -> stat_cache.Stat:
        syncs.append("stat")
        return stat_of(found)

    monkeypatch.setattr(tree_scan, "stat_of", stat_and_note)
    assert not settled.changes()
    assert syncs[0] == "sync"
    assert "sync" not in syncs[1:]


def test_failed_sync_fails_the_capture(settled: LiveTree, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise StorageFailed("cannot sync the tree: Input/output error", errno=5)

    monkeypatch.setattr(stat_baseline, "moves_times_promptly", lambda _: True)
    monkeypatch.setattr(stat_baseline, "sync_filesystem", fail)
    (settled.path / "other").write_text("y")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(StorageFailed):
        settled.capture()
    assert len(os.listdir("/proc/self/fd")) == before


def test_store_through_an_mmap_is_found_after_captures_that_did_not_sync(
    settled: LiveTree, syncs: list[str]
) -> None:
    with (
        open(settled.path / "file", "r+b") as opened,
        mmap.mmap(opened.fileno(), 4096) as mapped,
    ):
        mapped[0] = 1  # dirty from here on
        settled.age()
        settled.capture()
        settled.age()
        del syncs[:]
        settled.capture()
        assert syncs == []
        settled.age()
        mapped[1] = 2  # with no sync since the one of the capture that read it
        assert settled.changes() == [("*", b"file")]
        settled.capture()
        settled.age()
        mapped[2] = 3
        settled.capture()
    fresh = LiveTree(settled.path, settled.store)
    fresh.capture()
    assert fresh.root == settled.root


# --- the cache -----------------------------------------------------------------------------------


def test_cache_of_version_1_is_read(settled: LiveTree, tmp_path: Path, syncs: list[str]) -> None:
    import xxhash

    from dmsync.core.encoding import encode

    cache = settled.cache
    assert cache is not None
    body = encode((cache.root.to_value(), tuple(bytes(part) for part in cache._spool.segments)))
    path = tmp_path / "old"
    path.write_bytes(b"dmstat01" + xxhash.xxh3_64_digest(body) + body)
    settled.cache = StatCache.load(os.fspath(path))
    assert settled.cache is not None
    assert settled.cache.listed_ns == 0
    settled.capture()
    assert syncs == []
    assert settled.cache.listed_ns > 0


def test_unchanged_cache_is_not_written_again(settled: LiveTree, tmp_path: Path) -> None:
    path = os.fspath(tmp_path / "cache")
    assert settled.cache is not None
    settled.cache.save(path)
    settled.cache = StatCache.load(path)
    before = os.stat(path)
    settled.capture().stat_cache.save(path)
    assert os.stat(path) == before
    os.unlink(path)
    settled.capture().stat_cache.save(path)
    assert StatCache.load(path) is not None
