"""Small packs become few, whatever stops on the way and whoever reads meanwhile."""

import os
import random
import sqlite3
import threading
from pathlib import Path

import pytest

from dmsync.core.ids import Kind, ObjectId, object_id, short_key
from dmsync.errors import Corruption, StorageFull
from dmsync.storage import object_store, pack_consolidation, pack_index
from dmsync.storage.object_store import ObjectStore
from dmsync.storage.pack_consolidation import CLASS_BYTES, PACKS_PER_CLASS, packs_to_join
from dmsync.storage.packs import PackInfo
from tests.support.event_histories import start_python

DOT = "ab" * 16


@pytest.fixture
def store(tmp_path):
    with ObjectStore(str(tmp_path / DOT)) as opened:
        yield opened


def put(store: ObjectStore, number: int, *, size: int = 300) -> ObjectId:
    """One object in a pack of its own."""
    with store.writer() as writer:
        oid = writer.put(Kind.CHUNK, random.Random(number).randbytes(size))
        writer.seal()
    return oid


def put_many(store: ObjectStore, count: int, *, first: int = 0) -> dict[int, ObjectId]:
    return {number: put(store, number) for number in range(first, first + count)}


def assert_sound(store: ObjectStore, held: dict[int, ObjectId], *, size: int = 300) -> None:
    for number, oid in held.items():
        assert store.read(Kind.CHUNK, oid) == random.Random(number).randbytes(size)
    assert list(store.check(full=True)) == []


def pack_files(store: ObjectStore) -> set[str]:
    return set(os.listdir(store.sealed.directory))


def reopened(store: ObjectStore) -> ObjectStore:
    store.close()
    return ObjectStore(store.dot_dir)


# --- which -----------------------------------------------------------------------------------------


def infos(*sizes: int) -> list[PackInfo]:
    return [PackInfo(f"{number}.pack", size, 1) for number, size in enumerate(sizes)]


def test_only_a_full_size_class_is_joined_the_smallest_first() -> None:
    small, medium = [500] * PACKS_PER_CLASS, [CLASS_BYTES[0]] * PACKS_PER_CLASS
    assert packs_to_join(infos(*small[1:], *medium[1:])) == []
    assert [p.bytes for p in packs_to_join(infos(*small[1:], *medium))] == medium
    assert [p.bytes for p in packs_to_join(infos(*medium, *small))] == small


def test_large_packs_stay_and_a_join_is_bounded() -> None:
    assert packs_to_join(infos(*[CLASS_BYTES[-1]] * 1000)) == []
    chosen = packs_to_join(infos(*[CLASS_BYTES[-1] - 1] * 1000))
    assert PACKS_PER_CLASS - 1 <= len(chosen) <= PACKS_PER_CLASS + 1


# --- what comes of it -------------------------------------------------------------------------------


def test_packs_grow_in_number_with_the_logarithm_of_history(store) -> None:
    held = put_many(store, 600)
    assert len(store.packs()) < 3 * PACKS_PER_CLASS
    assert pack_files(store) == {pack.name for pack in store.packs()}
    assert sum(pack.records for pack in store.packs()) == len(held)
    assert_sound(store, held)
    again = reopened(store)
    assert_sound(again, held)
    Path(again.dot_dir, "index.sqlite").unlink()
    rebuilt = reopened(again)
    assert_sound(rebuilt, held)
    rebuilt.close()


def test_records_go_verbatim_also_deltas_on_each_other(store) -> None:
    source = random.Random(1)
    states = [bytearray(source.randbytes(20_000))]
    for _ in range(2 * PACKS_PER_CLASS):
        states.append(bytearray(states[-1]))
        states[-1][source.randrange(20_000)] ^= 1
    ids: list[ObjectId] = []
    stored = []
    for state in states:
        with store.writer() as writer:
            ids.append(writer.put(Kind.CHUNK, bytes(state), base=ids[-1] if ids else None))
            writer.seal()
        stored.append(store.stored_record(Kind.CHUNK, ids[-1]))
    assert len(store.packs()) <= PACKS_PER_CLASS + 1
    again = reopened(store)
    for oid, state, record in zip(ids, states, stored, strict=True):
        assert again.read(Kind.CHUNK, oid) == bytes(state)
        assert again.stored_record(Kind.CHUNK, oid) == record
    again.close()


def test_what_the_index_remembers_of_old_places_is_bounded(store, monkeypatch) -> None:
    monkeypatch.setattr(pack_index, "REPLACED_KEPT", 20)
    put_many(store, 100)
    with sqlite3.connect(Path(store.dot_dir, "index.sqlite")) as database:
        assert database.execute("SELECT count(*) FROM replaced").fetchone() == (20,)


def test_a_store_with_very_many_packs_is_consolidated_at_once(store, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(object_store, "consolidate", lambda *_: None)
        held = put_many(store, 100)
    assert len(store.packs()) == 100
    monkeypatch.setattr(pack_consolidation, "JOINED_PACKS_MAX", 20)
    monkeypatch.setattr(pack_index, "REPLACED_KEPT", 40)
    held |= put_many(store, 1, first=100)
    assert len(store.packs()) < PACKS_PER_CLASS
    assert pack_files(store) == {pack.name for pack in store.packs()}
    assert_sound(store, held)


def test_a_damaged_pack_is_not_joined_and_stays_told(store) -> None:
    held = put_many(store, PACKS_PER_CLASS - 2)
    damaged = put(store, 999)
    (place,) = store.sealed.index.places(short_key(damaged))
    with open(os.path.join(store.sealed.directory, place.pack), "r+b") as file:
        file.seek(100)
        file.write(b"damage")
    held |= put_many(store, 3, first=100)
    assert len(store.packs()) < PACKS_PER_CLASS
    with pytest.raises(Corruption):
        store.read(Kind.CHUNK, damaged)
    assert {problem.pack for problem in store.check(full=True)} == {place.pack}
    for number, oid in held.items():
        assert store.read(Kind.CHUNK, oid) == random.Random(number).randbytes(300)


def test_a_pack_is_sealed_although_there_is_no_room_to_join_it(store, monkeypatch) -> None:
    held = put_many(store, PACKS_PER_CLASS - 1)

    def full(*_args: object) -> None:
        raise StorageFull("no space")

    with monkeypatch.context() as patch:
        patch.setattr(pack_consolidation, "_append", full)
        held |= put_many(store, 3, first=100)
    assert len(store.packs()) == PACKS_PER_CLASS + 2
    assert_sound(store, held)
    held |= put_many(store, 1, first=200)
    assert len(store.packs()) == 1
    assert_sound(store, held)


# --- a stop at any step -----------------------------------------------------------------------------


class Stopped(BaseException):
    pass


def stop(*_args: object, **_kwargs: object) -> None:
    raise Stopped


@pytest.mark.parametrize(
    "step", ["copying", "renaming", "syncing", "indexing", "removing", "removing some"]
)
def test_a_stop_at_any_step_loses_nothing(store, monkeypatch, step: str) -> None:
    held = put_many(store, PACKS_PER_CLASS - 1)
    number = 500
    with monkeypatch.context() as patch:
        if step == "removing some":
            removed: list[str] = []
            remove = pack_index.remove_if_there

            def remove_three(path: str) -> None:
                if len(removed) == 3:
                    raise Stopped
                removed.append(path)
                remove(path)

            patch.setattr(pack_index, "remove_if_there", remove_three)
        else:
            where = {
                "copying": (pack_consolidation, "_append"),
                "renaming": (pack_consolidation.PackBuilder, "finish"),
                "syncing": (pack_consolidation, "fsync_directory"),
                "indexing": (store.sealed.index, "_replace"),
                "removing": (pack_index, "remove_if_there"),
            }[step]
            if step == "renaming":
                # The new pack's own seal calls it first.
                finish, calls = pack_consolidation.PackBuilder.finish, []

                def finish_once(builder: pack_consolidation.PackBuilder) -> PackInfo:
                    calls.append(builder)
                    if len(calls) > 1:
                        raise Stopped
                    return finish(builder)

                patch.setattr(*where, finish_once)
            else:
                patch.setattr(*where, stop)
        with pytest.raises(Stopped):
            put(store, number)
    again = reopened(store)
    held[number] = object_id(Kind.CHUNK, random.Random(number).randbytes(300))
    assert_sound(again, held)
    held |= put_many(again, PACKS_PER_CLASS, first=1000)
    assert_sound(again, held)
    assert pack_files(again) == {pack.name for pack in again.packs()}
    assert len(again.packs()) < 2 * PACKS_PER_CLASS
    again.close()


# --- others at the same time -------------------------------------------------------------------------


def test_a_place_looked_up_before_is_read_after_two_joins(store) -> None:
    held = put_many(store, PACKS_PER_CLASS - 1)
    with ObjectStore(store.dot_dir) as reader:
        looked_up = {
            number: reader.sealed.index.places(short_key(oid)) for number, oid in held.items()
        }
        put_many(store, 3 * PACKS_PER_CLASS, first=100)
        for places in looked_up.values():
            assert not Path(reader.sealed.directory, places[0].pack).exists()
            record = reader.sealed.load(places[0])
            assert record.raw_bytes == 300
        assert_sound(reader, held)


def test_readers_in_another_process_never_miss_an_object(tmp_path) -> None:
    dot = tmp_path / DOT
    with ObjectStore(str(dot)) as store:
        held = list(put_many(store, 5).values())
    code = """
import random, sys
from dmsync.core.ids import Kind, ObjectId
from dmsync.storage.object_store import ObjectStore
ids = [ObjectId(bytes.fromhex(oid)) for oid in sys.argv[2:]]
with ObjectStore(sys.argv[1]) as store:
    print("ready", flush=True)
    for number in range(150):
        with store.writer() as writer:
            ids.append(writer.put(Kind.CHUNK, random.Random(-number - 1).randbytes(300)))
            writer.seal()
        print(ids[-1].hex(), flush=True)
"""
    writer = start_python(code, str(dot), *(oid.hex() for oid in held))
    assert writer.stdout is not None
    assert writer.stdout.readline() == b"ready\n"
    failures: list[BaseException] = []
    ended = threading.Event()

    def read_on() -> None:
        chance = random.Random(threading.get_ident())
        try:
            with ObjectStore(str(dot)) as reader:
                reader.cache._bytes_max = 0
                while not ended.is_set():
                    oid = chance.choice(held)
                    assert reader.read(Kind.CHUNK, oid)
                    assert reader.stored_record(Kind.CHUNK, oid).raw_bytes == 300
        except BaseException as exc:  # told by the thread that waits
            failures.append(exc)

    threads = [threading.Thread(target=read_on) for _ in range(2)]
    for thread in threads:
        thread.start()
    for line in writer.stdout:
        held.append(ObjectId(bytes.fromhex(line.decode().strip())))
    ended.set()
    for thread in threads:
        thread.join()
    assert writer.wait() == 0, writer.stderr.read() if writer.stderr else ""
    assert failures == []
    with ObjectStore(str(dot)) as store:
        assert len(store.packs()) < 2 * PACKS_PER_CLASS
        assert all(store.read(Kind.CHUNK, oid) for oid in held)
        assert list(store.check(full=True)) == []


def test_two_writers_join_without_losing_each_others_packs(tmp_path) -> None:
    dot = str(tmp_path / DOT)
    with ObjectStore(dot):
        pass
    code = """
import random, sys
from dmsync.core.ids import Kind
from dmsync.storage.object_store import ObjectStore
with ObjectStore(sys.argv[1]) as store:
    for number in range(80):
        with store.writer() as writer:
            oid = writer.put(Kind.CHUNK, random.Random(f"{sys.argv[2]} {number}").randbytes(300))
            writer.seal()
        print(oid.hex())
"""
    writers = [start_python(code, dot, name) for name in ("one", "two")]
    outputs = [writer.communicate() for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0], outputs
    ids = [bytes.fromhex(line) for out, _ in outputs for line in out.decode().split()]
    with ObjectStore(dot) as store:
        assert len(ids) == 160
        assert all(store.has(Kind.CHUNK, ObjectId(oid)) for oid in ids)
        assert list(store.check(full=True)) == []
        assert pack_files(store) == {pack.name for pack in store.packs()}


def test_an_index_of_an_older_schema_is_built_again(store) -> None:
    held = put_many(store, 5)
    store.close()
    with sqlite3.connect(Path(store.dot_dir, "index.sqlite")) as database:
        database.execute("DROP TABLE replaced")
        database.execute("PRAGMA user_version = 1")
    again = ObjectStore(store.dot_dir)
    held |= put_many(again, PACKS_PER_CLASS, first=100)
    assert_sound(again, held)
    assert len(again.packs()) < PACKS_PER_CLASS
    again.close()
