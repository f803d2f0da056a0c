"""The index of packs: what it lets go is gone, and what has come since is not, whoever looks when."""

import random
import signal
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest

from dmsync.core.ids import Kind, ObjectId
from dmsync.errors import StorageFull
from dmsync.storage import pack_consolidation, pack_index
from dmsync.storage.durable import Path as AnyPath
from dmsync.storage.object_store import ObjectStore
from dmsync.storage.packs import Footer, PackInfo

DOT = "ab" * 16


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ObjectStore]:
    with ObjectStore(str(tmp_path / DOT)) as opened:
        yield opened


def put(store: ObjectStore, number: int) -> tuple[ObjectId, str]:
    """One object in a pack of its own, and the pack."""
    with store.writer() as writer:
        oid = writer.put(Kind.CHUNK, random.Random(number).randbytes(300))
        (pack,) = writer.seal()
    store.hold.close()
    return oid, pack.name


def assert_there(store: ObjectStore, *ids: ObjectId) -> None:
    with ObjectStore(store.dot_dir) as again:
        for oid in ids:
            assert again.read(Kind.CHUNK, oid)
        assert list(again.check(full=True)) == []


def test_a_pack_that_comes_again_is_not_taken_for_the_one_that_was_swept(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process removes what may go when the file has just got its name."""
    other = ObjectStore(store.dot_dir)
    oid, name = put(store, 1)
    kept = [put(store, number)[0] for number in (2, 3)]
    store.sweep([], [name])
    add = store.sealed.index.add

    def add_late(packs: list[tuple[PackInfo, Footer]]) -> None:
        other.sealed.index.remove_replaced_files()
        add(packs)

    monkeypatch.setattr(store.sealed.index, "add", add_late)
    assert put(store, 1) == (oid, name)
    other.close()
    assert_there(store, oid, *kept)


def test_an_index_of_another_time_lets_nothing_go_that_came_since(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept, name = put(store, 1)
    kept, _ = put(store, 2)
    store.sweep([], [name])
    index = Path(store.dot_dir, "index.sqlite")
    before = index.read_bytes()
    assert put(store, 1) == (swept, name)
    store.close()
    index.write_bytes(before)
    monkeypatch.setattr(pack_consolidation, "PACKS_PER_CLASS", 2)
    with ObjectStore(store.dot_dir) as again:
        assert again.read(Kind.CHUNK, swept)
        late, _ = put(again, 3)
    assert_there(store, swept, kept, late)


def test_what_was_swept_is_told_from_other_files_of_its_name(store: ObjectStore) -> None:
    _, name = put(store, 1)
    put(store, 2)
    path = Path(store.sealed.directory, name)
    index = store.sealed.index
    index.sweep([], [name])
    assert index.replaced() == {name}
    content = path.read_bytes()
    path.unlink()
    assert index.replaced() == set()
    path.write_bytes(content)
    assert index.replaced() == set()
    index.catch_up()
    assert name in {pack.name for pack in store.packs()}


def test_a_sweep_that_finds_the_index_damaged_loses_no_pack(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, name = put(store, 1)
    kept, _ = put(store, 2)
    index = store.sealed.index
    remove, calls = index._remove, []

    def damaged_once(pack: str) -> None:
        calls.append(pack)
        if len(calls) == 1:
            raise sqlite3.DatabaseError("database disk image is malformed")
        remove(pack)

    monkeypatch.setattr(index, "_remove", damaged_once)
    store.sweep([], [name])
    assert calls == [name, name]
    assert index.lost_packs() == []
    assert_there(store, kept)


def test_who_opens_an_index_while_it_goes_with_what_is_swept_misses_nothing(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, name = put(store, 1)
    kept, _ = put(store, 2)
    index = store.sealed.index
    before = ObjectStore(store.dot_dir)
    opening = threading.Thread(target=lambda: ObjectStore(store.dot_dir).close())
    sync, close_files = pack_index.fsync_directory, store.sealed.close_files

    def no_room(*_: object) -> None:
        raise StorageFull("no room")

    def open_meanwhile(path: AnyPath) -> None:
        sync(path)
        if opening.ident is None:
            opening.start()

    def wait_for_it() -> None:
        close_files()
        if opening.ident is not None:
            opening.join()

    monkeypatch.setattr(index, "sweep", no_room)
    monkeypatch.setattr(pack_index, "fsync_directory", open_meanwhile)
    monkeypatch.setattr(store.sealed, "close_files", wait_for_it)
    store.sweep([], [name])
    opening.join()
    assert index.lost_packs() == []
    before.sealed.index.catch_up()
    assert index.lost_packs() == []
    before.close()
    assert_there(store, kept)


def test_damage_found_while_the_index_is_locked_is_no_reason_to_wait_for_the_lock(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, _ = put(store, 1)
    index = store.sealed.index

    def join(_: list[PackInfo]) -> None:
        monkeypatch.setattr(index, "_db", Damaged(index._db))
        index.packs()

    def give_up(_number: int, _frame: FrameType | None) -> None:
        raise AssertionError("it waits for itself")

    earlier = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(5)
    try:
        assert not index.replace(join)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, earlier)
    assert_there(store, kept)


class Damaged:
    """A connection to a database of which the tables of packs cannot be read."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def execute(self, sql: str, values: tuple[object, ...] = ()) -> sqlite3.Cursor:
        if "FROM packs" in sql:
            raise sqlite3.DatabaseError("database disk image is malformed")
        return self._db.execute(sql, values)

    def __getattr__(self, name: str) -> object:
        return getattr(self._db, name)
