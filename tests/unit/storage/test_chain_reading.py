"""Many objects at once: the same bytes, ids, steps and errors as one at a time."""

import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from dmsync.core.delta import compress, compress_with_prefix, select_pages
from dmsync.core.ids import Kind, ObjectId, object_id, short_key
from dmsync.core.records import STEPS_MAX, BaseSlice, Encoding, Record, parse_record
from dmsync.errors import Corruption, DmError, ObjectMissing
from dmsync.storage import chain_reading, shared_pages
from dmsync.storage.chunk_forms import NewChunk
from dmsync.storage.object_store import ObjectStore
from tests.unit.storage.test_object_store import (
    CHUNK,
    DOT,
    edited,
    planted,
    put_chain,
    reopened,
    rows,
    versions,
)


@pytest.fixture
def store(tmp_path):
    with ObjectStore(str(tmp_path / DOT)) as opened:
        yield opened


def one_by_one(store: ObjectStore, kind: Kind, ids: list[ObjectId]) -> Iterator[object]:
    """Bytes, or type and message of the error, of each."""
    for oid in ids:
        try:
            yield store.read(kind, oid)
        except DmError as exc:
            yield type(exc), exc.message


def many(store: ObjectStore, kind: Kind, ids: list[ObjectId]) -> Iterator[object]:
    """The same by `read_many`, which is begun again behind every error."""
    done = 0
    while done < len(ids):
        try:
            for data in store.read_many(kind, ids[done:]):
                done += 1
                yield data
        except DmError as exc:
            done += 1
            yield type(exc), exc.message


def written(store: ObjectStore, commits: int, chunks: int, size: int) -> list[ObjectId]:
    """Chunks that change from commit to commit, with logs of what changed; all ids, oldest first."""
    source = random.Random(commits * chunks)
    states = [rows(seed, size) for seed in range(chunks)]
    ids: dict[int, ObjectId] = {}
    everything: list[ObjectId] = []
    for _ in range(commits):
        with store.writer() as writer:
            log = b""
            for number in range(chunks):
                if number in ids and source.random() < 0.3:
                    continue
                if number in ids:
                    log += states[number][:8192]
                    states[number] = edited(states[number], source.randrange(10**6), 1)
                ids[number] = writer.put(Kind.CHUNK, states[number], base=ids.get(number))
                everything.append(ids[number])
            log += source.randbytes(64)
            everything.append(writer.put(Kind.CHUNK, log[:CHUNK], similar=True))
            writer.seal()
    return everything


@pytest.mark.parametrize(
    "limits",
    [
        "usual",
        "small windows",
        "few stored bytes",
        "windows that grow",
        "pages held compressed",
        "no pages held",
    ],
)
def test_many_at_once_are_what_one_at_a_time_is(store, monkeypatch, limits) -> None:
    ids = written(store, 8, 30, 32 * 1024)
    encodings = {store.stored_record(Kind.CHUNK, oid).encoding for oid in ids}
    assert encodings >= {Encoding.ZSTD, Encoding.PATCH, Encoding.SIMILAR}
    missing = object_id(Kind.CHUNK, b"missing")
    asked = [*ids, missing, *ids[:50], object_id(Kind.PAGE, b"a page")]
    random.Random(1).shuffle(asked)
    if limits == "small windows":
        monkeypatch.setattr(chain_reading, "WINDOW_BYTES", 1)
    elif limits == "few stored bytes":
        monkeypatch.setattr(chain_reading, "CHAIN_BYTES_MAX", 1000)
    elif limits == "windows that grow":
        monkeypatch.setattr(chain_reading, "WINDOW_OBJECTS", 4)
        monkeypatch.setattr(chain_reading, "_JOINED_OBJECTS", (1, 9))
        monkeypatch.setattr(chain_reading, "JOINED_RECORDS_MAX", 300)
    elif limits == "pages held compressed":
        monkeypatch.setattr(shared_pages, "HELD_PLAIN_BYTES_MAX", 0)
    elif limits == "no pages held":
        monkeypatch.setattr(shared_pages, "HELD_BYTES_MAX", 0)
    store = reopened(store)
    expected = list(one_by_one(store, Kind.CHUNK, asked))
    store = reopened(store)
    assert list(many(store, Kind.CHUNK, asked)) == expected
    assert sum(isinstance(one, tuple) for one in expected) == 2
    store.close()


@pytest.mark.parametrize("window", [4, 64])
def test_the_quick_way_decides_all_of_a_sound_store(store, monkeypatch, window) -> None:
    ids = written(store, 8, 30, 32 * 1024)
    logs = [oid for oid in ids if store.stored_record(Kind.CHUNK, oid).encoding is Encoding.SIMILAR]
    assert logs
    with store.writer() as writer:
        for log in logs:  # chains that begin with similar pages, some of these with such again
            content = store.read_chunk(log)
            for seed in range(3):
                content = edited(content, seed, 1)
                log = writer.put(Kind.CHUNK, content, base=log)
                ids.append(log)
        writer.seal()
    random.Random(window).shuffle(ids)
    expected = list(one_by_one(store, Kind.CHUNK, ids))
    store = reopened(store)

    def undecided(*_: object) -> None:
        raise AssertionError("the exact way was asked")

    monkeypatch.setattr(store._reader, "find", undecided)
    monkeypatch.setattr(chain_reading, "WINDOW_OBJECTS", window)
    monkeypatch.setattr(chain_reading, "_JOINED_OBJECTS", (1, window))
    assert list(many(store, Kind.CHUNK, ids)) == expected
    store.close()


def test_what_reading_takes_is_counted_alike(store) -> None:
    ids = written(store, 6, 20, 16 * 1024)
    store = reopened(store)
    expected = [store._reader.find(Kind.CHUNK, oid) for oid in ids]
    store = reopened(store)
    assert list(store._reader.find_many(Kind.CHUNK, ids)) == expected
    store.close()


def test_an_error_is_of_its_object_only(store) -> None:
    with store.writer() as writer:
        ids = [writer.put(Kind.CHUNK, rows(seed, 5000)) for seed in range(200)]
        writer.seal()
    bad = 130
    planted(
        store, [(Record(Kind.CHUNK, Encoding.RAW, 5, b"other"), object_id(Kind.CHUNK, b"?")[:8])]
    )
    ids[bad] = object_id(Kind.CHUNK, b"?")
    found = store._reader.find_many(Kind.CHUNK, ids)
    for number in range(len(ids)):
        if number == bad:
            with pytest.raises(Corruption):
                next(found)
        else:
            assert next(found).data == rows(number, 5000)
    assert next(found, "ended") == "ended"


def test_objects_of_another_kind_are_not_there(store) -> None:
    with store.writer() as writer:
        ids = [writer.put(Kind.PAGE, b"page %d" % number) for number in range(70)]
        writer.seal()
    with pytest.raises(ObjectMissing):
        next(store.read_many(Kind.CHUNK, ids))
    assert list(store.read_many(Kind.PAGE, ids)) == [b"page %d" % number for number in range(70)]
    assert list(store.read_many(Kind.PAGE, [])) == []


def test_collisions_of_short_keys_are_slow_and_never_wrong(store, monkeypatch) -> None:
    states = versions(6)
    ids = put_chain(store, states)
    for oid in ids:
        planted(store, [(Record(Kind.CHUNK, Encoding.RAW, 3, b"no!"), short_key(oid))])
    for first in (True, False):
        opened = reopened(store)

        def first_places(keys, opened=opened, first=first):
            found = {key: sorted(opened.sealed.places(key)) for key in keys}
            return {key: places[0 if first else -1] for key, places in found.items() if places}

        monkeypatch.setattr(opened.sealed, "first_places", first_places)
        assert list(opened.read_many(Kind.CHUNK, ids * 30)) == states * 30
        opened.close()


def test_circles_and_missing_bases_are_told_as_one_by_one(store) -> None:
    frame = compress(b"x" * 100)

    def prefix(base: bytes) -> Record:
        return Record(Kind.CHUNK, Encoding.PREFIX, 100, frame, (BaseSlice(base),))

    def similar(base: bytes) -> Record:
        return Record(Kind.CHUNK, Encoding.SIMILAR, 100, frame, (BaseSlice(base, 0),))

    keys = [bytes([letter]) * 8 for letter in b"klmno"]
    planted(
        store,
        [
            (prefix(keys[1]), keys[0]),
            (prefix(keys[0]), keys[1]),
            (prefix(b"nowhere!"), keys[2]),
            (similar(keys[4]), keys[3]),
            (similar(keys[3]), keys[4]),
        ],
    )
    ids = [ObjectId(key + bytes(24)) for key in keys]
    assert list(many(store, Kind.CHUNK, ids)) == list(one_by_one(store, Kind.CHUNK, ids))


def test_damage_gives_the_same_errors_and_never_other_bytes(store) -> None:
    ids = written(store, 4, 6, 16 * 1024)
    states = list(store.read_many(Kind.CHUNK, ids))
    paths = [Path(store.sealed.directory) / pack.name for pack in store.packs()]
    store.close()
    source = random.Random(5)
    for path in paths:
        good = path.read_bytes()
        for at in source.sample(range(56, len(good) * 3 // 4), 12):
            bad = bytearray(good)
            bad[at] ^= 1 << source.randrange(8)
            path.write_bytes(bad)
            with ObjectStore(store.dot_dir) as opened:
                quickly = list(many(opened, Kind.CHUNK, ids))
            with ObjectStore(store.dot_dir) as opened:
                assert quickly == list(one_by_one(opened, Kind.CHUNK, ids))
            for got, state in zip(quickly, states, strict=True):
                assert got == state or isinstance(got, tuple)
        path.write_bytes(good)


def test_chains_up_to_the_longest_are_read(store) -> None:
    states = [rows(3, 8192)]
    records = [(Record(Kind.CHUNK, Encoding.ZSTD, 8192, compress(states[0])), b"")]
    for number in range(STEPS_MAX - 1):
        old, new = states[-1], edited(states[-1], number, 1)
        pages = [page for page in (0, 1) if old[page * 4096 :][:4096] != new[page * 4096 :][:4096]]
        frame = compress_with_prefix(select_pages(new, pages), select_pages(old, pages))
        base = (BaseSlice(short_key(object_id(Kind.CHUNK, old))),)
        changed = sum(1 << page for page in pages)
        records.append((Record(Kind.CHUNK, Encoding.PATCH, 8192, frame, base, changed), b""))
        states.append(new)
    ids = [object_id(Kind.CHUNK, state) for state in states]
    planted(
        store, [(record, short_key(oid)) for (record, _), oid in zip(records, ids, strict=True)]
    )
    decoded = list(store._reader.find_many(Kind.CHUNK, ids))
    assert [one.data for one in decoded] == states
    assert [one.steps for one in decoded] == list(range(1, STEPS_MAX + 1))


def test_an_abandoned_reading_leaves_no_thread(store) -> None:
    with store.writer() as writer:
        ids = [writer.put(Kind.CHUNK, rows(seed, 5000)) for seed in range(300)]
        writer.seal()
    before = threading.active_count()
    reading = store.read_many(Kind.CHUNK, ids)
    assert next(reading) == rows(0, 5000)
    del reading
    assert threading.active_count() == before


def test_long_runs_of_patches_are_skipped_by_later_chunks(store) -> None:
    """Reading the hundredth state takes few steps, though each is stored as what changed."""
    states = versions(100)
    ids: list[ObjectId] = []
    for state in states:
        with store.writer() as writer:
            chunk = NewChunk(object_id(Kind.CHUNK, state), state, ids[-1] if ids else None)
            writer.put_prepared(writer.prepare([[chunk]], similar=False))
            writer.seal()
        ids.append(chunk.id)
    store = reopened(store)
    decoded = list(store._reader.find_many(Kind.CHUNK, ids))
    assert [one.data for one in decoded] == states
    assert max(one.steps for one in decoded) <= 12
    stored = [store.stored_record(Kind.CHUNK, oid) for oid in ids]
    assert [record.encoding for record in stored[1:]].count(Encoding.PATCH) > 95
    assert list(store.check(full=True)) == []
    store.close()


def test_an_earlier_state_that_is_damaged_is_no_base(store, monkeypatch) -> None:
    states = versions(12)
    ids = put_chain(store, states[:11])
    store = reopened(store)  # what is held decoded has no earlier state
    found = next(store._reader.find_many(Kind.CHUNK, [ids[-1]], earlier=True))
    assert found.earlier is not None and found.earlier.data == states[0]
    forged = found._replace(earlier=found.earlier._replace(data=rows(9)))
    with store.writer() as writer:
        monkeypatch.setattr(writer._sealed, "find_many", lambda *_, **__: iter([forged]))
        chunk = NewChunk(object_id(Kind.CHUNK, states[11]), states[11], ids[-1])
        (form,) = writer.prepare([[chunk]], similar=False)
    assert parse_record(form.encoded)[0].bases == (BaseSlice(short_key(ids[-1])),)
    store.close()
