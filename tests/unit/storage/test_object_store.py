"""Objects in packs: what was put is read back, damaged packs are told, crashes lose nothing."""

import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmsync.core.delta import compress
from dmsync.core.ids import Kind, ObjectId, object_id, short_key
from dmsync.core.records import STEPS_MAX, Encoding, Record, encode_record
from dmsync.errors import (
    BadObject,
    Corruption,
    DmError,
    HashMismatch,
    ObjectMissing,
    StorageFull,
)
from dmsync.storage import object_reading
from dmsync.storage.chunk_forms import NewChunk
from dmsync.storage.object_store import ObjectStore
from dmsync.storage.packs import PackBuilder

CHUNK = 128 * 1024
DOT = "ab" * 16


@pytest.fixture
def store(tmp_path):
    with ObjectStore(str(tmp_path / DOT)) as opened:
        yield opened


def reopened(store: ObjectStore) -> ObjectStore:
    store.close()
    return ObjectStore(store.dot_dir)


def rows(seed: int, size: int = CHUNK) -> bytes:
    """Compressible bytes that look like a table."""
    source = random.Random(seed)
    line = b"account %012d balance %08d branch 17 filler                     \n"
    text = b"".join(
        line % (source.getrandbits(36), source.randrange(10**8)) for _ in range(size // 60)
    )
    return text[:size]


def edited(data: bytes, seed: int, edits: int = 3) -> bytes:
    source, new = random.Random(seed), bytearray(data)
    for _ in range(edits):
        at = source.randrange(len(data) - 8)
        new[at : at + 8] = source.randbytes(8)
    return bytes(new)


def versions(count: int, size: int = CHUNK) -> list[bytes]:
    found = [rows(1, size)]
    for seed in range(1, count):
        found.append(edited(found[-1], seed))
    return found


def put_chain(store: ObjectStore, states: list[bytes]) -> list[ObjectId]:
    """Each state in a commit of its own, on the one before."""
    ids: list[ObjectId] = []
    for state in states:
        with store.writer() as writer:
            ids.append(writer.put(Kind.CHUNK, state, base=ids[-1] if ids else None))
            writer.seal()
    return ids


def files_under(store: ObjectStore) -> set[str]:
    return set(os.listdir(store.sealed.directory))


# --- round trips -------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(list(Kind)),
            st.integers(0, 40_000),
            st.integers(0, 5),
            st.booleans(),
            st.booleans(),
        ),
        max_size=12,
    )
)
def test_whatever_is_put_is_read_back_before_and_after_sealing(tmp_path_factory, plan) -> None:
    with ObjectStore(str(tmp_path_factory.mktemp("dot"))) as store:
        with store.writer() as writer:
            held: dict[ObjectId, tuple[Kind, bytes]] = {}
            previous: dict[Kind, ObjectId] = {}
            for kind, size, seed, with_base, similar in plan:
                data = edited(rows(seed, size), seed) if size > 100 else bytes([seed]) * size
                base = previous.get(kind) if with_base else None
                oid = writer.put(kind, data, base=base, similar=similar)
                held[oid] = kind, data
                previous[kind] = oid
            for oid, (kind, data) in held.items():
                assert writer.read(kind, oid) == data
            writer.seal()
        for oid, (kind, data) in held.items():
            assert oid == object_id(kind, data)
            assert store.read(kind, oid) == data
            assert store.has_key(short_key(oid))
        assert list(store.check(full=True)) == []
        again = reopened(store)
        assert all(again.read(kind, oid) == data for oid, (kind, data) in held.items())
        again.close()


def test_an_object_is_stored_once(store) -> None:
    with store.writer() as writer:
        first = writer.put(Kind.CHUNK, rows(1))
        assert writer.put(Kind.CHUNK, rows(1)) == first
        (pack,) = writer.seal()
        assert pack.records == 1
    with store.writer() as writer:
        assert writer.put(Kind.CHUNK, rows(1)) == first
        assert writer.seal() == ()
    assert len(store.packs()) == 1


def test_nothing_unsealed_stays(store) -> None:
    with store.writer() as writer:
        oid = writer.put(Kind.PAGE, rows(1))
        assert writer.has(Kind.PAGE, oid)
        assert len(files_under(store)) == 1
    assert files_under(store) == set()
    assert not store.has(Kind.PAGE, oid)
    with pytest.raises(ObjectMissing):
        store.read_page(oid)


def test_kinds_do_not_answer_for_each_other(store) -> None:
    with store.writer() as writer:
        oid = writer.put(Kind.CHUNK, b"bytes")
        writer.seal()
    assert not store.has(Kind.PAGE, oid)
    with pytest.raises(ObjectMissing):
        store.stored_record(Kind.PAGE, oid)


def test_too_large_an_object_is_refused(store) -> None:
    with store.writer() as writer, pytest.raises(BadObject):
        writer.put(Kind.CHUNK, bytes(1024 * 1024 + 1))


def test_a_pack_beyond_its_bound_becomes_several(store, monkeypatch) -> None:
    monkeypatch.setattr("dmsync.storage.pack_writer.PACK_BYTES_MAX", 100_000)
    data = [random.Random(seed).randbytes(60_000) for seed in range(6)]
    with store.writer() as writer:
        ids = [writer.put(Kind.CHUNK, part) for part in data]
        assert [writer.read_chunk(oid) for oid in ids] == data
        sealed = writer.seal()
    assert len(sealed) == 3
    assert store.stored_bytes() == sum(pack.bytes for pack in sealed)
    assert [store.read_chunk(oid) for oid in ids] == data


# --- forms -------------------------------------------------------------------------------------


def test_a_changed_chunk_is_a_small_patch_and_a_chain_reads_back(store) -> None:
    states = versions(60)
    ids = put_chain(store, states)
    record = store.stored_record(Kind.CHUNK, ids[1])
    assert record.encoding is Encoding.PATCH
    assert len(record.payload) < 200
    store = reopened(store)
    for oid, state in zip(reversed(ids), reversed(states), strict=True):
        assert store.read_chunk(oid) == state


def test_chains_are_renewed_before_they_cost_more_than_they_save(store, monkeypatch) -> None:
    monkeypatch.setattr("dmsync.storage.chunk_forms.RENEWAL_STEPS", (10, 11))
    ids = put_chain(store, versions(25, 32 * 1024))
    encodings = [store.stored_record(Kind.CHUNK, oid).encoding for oid in ids]
    assert encodings.count(Encoding.ZSTD) == 3
    monkeypatch.setattr("dmsync.storage.chunk_forms.PATCHES_PER_FULL", 0.005)
    more = put_chain(store, versions(25, 48 * 1024))
    encodings = [store.stored_record(Kind.CHUNK, oid).encoding for oid in more]
    assert encodings.count(Encoding.ZSTD) > 3


def test_random_data_is_stored_raw(store) -> None:
    with store.writer() as writer:
        oid = writer.put(Kind.CHUNK, random.Random(1).randbytes(CHUNK))
        writer.seal()
    assert store.stored_record(Kind.CHUNK, oid).encoding is Encoding.RAW


def test_pages_of_replaced_chunks_serve_new_chunks(store) -> None:
    """A write-ahead log repeats the pages that changed."""
    noise = random.Random(7)
    old = [noise.randbytes(CHUNK) for _ in range(4)]
    with store.writer() as writer:
        bases = [writer.put(Kind.CHUNK, data) for data in old]
        writer.seal()
    log = b"".join(data[8192:16384] + noise.randbytes(50) for data in old)
    with store.writer() as writer:
        for data, base in zip(old, bases, strict=True):
            new = bytearray(data)
            new[9000:9008] = b"replaced"
            writer.put(Kind.CHUNK, bytes(new), base=base)
        logged = writer.put(Kind.CHUNK, log, similar=True)
        writer.seal()
    record = store.stored_record(Kind.CHUNK, logged)
    assert record.encoding is Encoding.SIMILAR
    assert {base.key for base in record.bases} == {short_key(base) for base in bases}
    assert len(record.payload) < 1000
    assert reopened(store).read_chunk(logged) == log


def test_a_missing_base_costs_a_full_frame_only(store) -> None:
    with store.writer() as writer:
        oid = writer.put(Kind.CHUNK, rows(1), base=ObjectId(bytes(32)))
        writer.seal()
    assert store.stored_record(Kind.CHUNK, oid).encoding is Encoding.ZSTD


# --- collisions --------------------------------------------------------------------------------


def planted(store: ObjectStore, records: list[tuple[Record, bytes]]) -> None:
    """A sealed pack whose table names the records by the given keys, true or not."""
    builder = PackBuilder.create(store.sealed.directory, "tmp-", "", store.dot_id)
    for record, key in records:
        builder.append(encode_record(record), key)
    store.publish([builder])


def test_a_collision_of_short_keys_is_slow_and_never_wrong(store) -> None:
    states = versions(4)
    ids = put_chain(store, states)
    for oid in ids:  # another record under each key, in a pack of its own
        planted(store, [(Record(Kind.CHUNK, Encoding.RAW, 3, b"no!"), short_key(oid))])
    # A candidate earlier in the order than the true ones.
    for name in ("first", "last"):
        places = store.sealed.index.places
        order = 1 if name == "first" else -1
        store.sealed.places = lambda key, order=order, places=places: sorted(
            places(key), key=lambda place: order * (place.offset + (place.pack == "x"))
        )[::order]
        store.cache.__init__()
        assert [store.read_chunk(oid) for oid in ids] == states


def test_a_wrong_record_alone_is_a_hash_mismatch(store) -> None:
    wanted = object_id(Kind.CHUNK, b"wanted")
    planted(store, [(Record(Kind.CHUNK, Encoding.RAW, 5, b"other"), short_key(wanted))])
    with pytest.raises(HashMismatch) as caught:
        store.read_chunk(wanted)
    assert caught.value.facts["pack"] == store.packs()[0].name
    assert not store.has(Kind.CHUNK, wanted)
    assert [problem.key for problem in store.check(full=True)] == [short_key(wanted)]
    with store.writer() as writer:  # storing it again repairs the dot
        writer.put(Kind.CHUNK, b"wanted")
        writer.seal()
    assert store.read_chunk(wanted) == b"wanted"


def test_a_chain_in_a_circle_is_corruption(store) -> None:
    from dmsync.core.records import BaseSlice

    one, two = b"k" * 8, b"l" * 8
    frame = compress(b"x" * 100)
    planted(
        store,
        [
            (Record(Kind.CHUNK, Encoding.PREFIX, 100, frame, (BaseSlice(two),)), one),
            (Record(Kind.CHUNK, Encoding.PREFIX, 100, frame, (BaseSlice(one),)), two),
        ],
    )
    with pytest.raises(Corruption):
        store.read_chunk(ObjectId(one + bytes(24)))
    assert len(list(store.check(full=True))) == 2


# --- damage ------------------------------------------------------------------------------------


def damaged_copy(source: Path, target: Path, at: int) -> None:
    data = bytearray(source.read_bytes())
    data[at] ^= 1 << at % 8
    target.write_bytes(data)


def test_any_flipped_bit_is_found_and_never_gives_wrong_bytes(store) -> None:
    states = versions(5, 20_000)
    with store.writer() as writer:
        ids, base = [], None
        for state in states:
            base = writer.put(Kind.CHUNK, state, base=base)
            ids.append(base)
        writer.seal()
    path = Path(store.sealed.directory) / store.packs()[0].name
    store.close()
    good = path.read_bytes()
    source = random.Random(2)
    spots = {*range(64), *range(len(good) - 150, len(good)), *source.sample(range(len(good)), 60)}
    for at in sorted(spots):
        bad = bytearray(good)
        bad[at] ^= 1 << source.randrange(8)
        path.write_bytes(bad)
        Path(store.dot_dir, "index.sqlite").unlink(missing_ok=True)
        try:
            with ObjectStore(store.dot_dir) as opened:
                problems = list(opened.check(full=True))
                assert problems, at
                assert {problem.pack for problem in problems} == {path.name}
                for oid, state in zip(ids, states, strict=True):
                    try:
                        assert opened.read_chunk(oid) == state
                    except Corruption as exc:
                        # A flipped kind hides the record from those who ask for the true one.
                        assert path.name in exc.message or type(exc) is ObjectMissing
        except DmError as exc:
            assert path.name in exc.message  # a newer version, as far as anyone can tell
    path.write_bytes(good)
    with ObjectStore(store.dot_dir) as opened:
        assert list(opened.check(full=True)) == []


def test_stored_records_are_those_that_are_read_one_by_one(store) -> None:
    """Also where a record is damaged: the same error, at the same object."""
    states = versions(60, 20_000)
    ids: list[ObjectId] = []
    with store.writer() as writer:
        for number, state in enumerate(states):
            base = ids[-1] if number % 20 else None
            ids.append(writer.put(Kind.CHUNK, state, base=base))
        writer.seal()
    asked = [*ids[::-1], *ids[:5]]
    one_by_one = [store.stored_record(Kind.CHUNK, oid) for oid in asked]
    assert list(store.stored_records(Kind.CHUNK, asked)) == one_by_one
    hints = store.unverified_records(ids)
    assert [hints[oid] for oid in ids] == one_by_one[: len(ids)][::-1]
    with pytest.raises(ObjectMissing):
        list(store.stored_records(Kind.CHUNK, [*ids[:3], ObjectId(bytes(32))]))

    place = store.sealed.places(short_key(ids[30]))[0]
    path = Path(store.sealed.directory) / place.pack
    data = bytearray(path.read_bytes())
    data[place.offset + 40] ^= 4
    path.write_bytes(data)
    outcomes: list[list[object]] = []
    for at_once in (False, True):
        seen: list[object] = []
        with reopened(store) as opened:  # what was read before may still be in memory
            many = opened.stored_records(Kind.CHUNK, ids)
            single = (opened.stored_record(Kind.CHUNK, oid) for oid in ids)
            try:
                seen.extend(many if at_once else single)
            except Corruption as exc:
                seen.append(exc.message)
        outcomes.append(seen)
    assert outcomes[0] == outcomes[1]
    assert isinstance(outcomes[0][-1], str)


def test_the_quick_check_finds_truncation_and_missing_files(store) -> None:
    put_chain(store, versions(3))
    paths = [Path(store.sealed.directory) / pack.name for pack in store.packs()]
    paths[0].unlink()
    os.truncate(paths[1], paths[1].stat().st_size - 1)
    found = {problem.pack for problem in store.check(full=False)}
    assert found == {paths[0].name, paths[1].name}
    assert next(iter(store.check(full=False))).message == "the file is missing"


def test_one_damaged_pack_leaves_the_others_readable(store) -> None:
    with store.writer() as writer:
        lost = writer.put(Kind.CHUNK, rows(1))
        writer.seal()
    with store.writer() as writer:
        kept = writer.put(Kind.CHUNK, rows(2))
        writer.seal()
    victim = store.packs()[0].name
    os.truncate(os.path.join(store.sealed.directory, victim), 1000)
    store.close()
    Path(store.dot_dir, "index.sqlite").unlink()
    with ObjectStore(store.dot_dir) as opened:
        assert opened.read_chunk(kept) == rows(2)
        with pytest.raises(ObjectMissing) as caught:
            opened.read_chunk(lost)
        assert victim in caught.value.message
        assert [problem.pack for problem in opened.check(full=False)] == [victim]


# --- the index is a projection -----------------------------------------------------------------


@pytest.mark.parametrize("damage", ["removed", "garbage", "truncated", "table dropped", "newer"])
def test_a_lost_or_corrupt_index_is_built_again(store, damage) -> None:
    states = versions(5)
    ids = put_chain(store, states)
    expected = {key for oid in ids for key in [short_key(oid)]}
    store.close()
    path = Path(store.dot_dir, "index.sqlite")
    match damage:
        case "removed":
            path.unlink()
        case "garbage":
            path.write_bytes(os.urandom(8192))
        case "truncated":
            os.truncate(path, 4096)
        case "table dropped":
            with sqlite3.connect(path) as db:
                db.execute("DROP TABLE objects")
        case "newer":
            with sqlite3.connect(path) as db:
                db.execute("PRAGMA user_version = 9")
    with ObjectStore(store.dot_dir) as opened:
        assert [opened.read_chunk(oid) for oid in ids] == states
        assert opened.sealed.index.keys() == expected
        assert list(opened.check(full=True)) == []


def test_packs_added_and_removed_behind_the_index_are_noticed(store) -> None:
    ids = put_chain(store, [rows(1), rows(2)])
    store.close()
    directory = Path(store.sealed.directory)
    aside = Path(store.dot_dir, "aside")
    names = sorted(os.listdir(directory))
    aside.mkdir()
    for pack in names:
        os.rename(directory / pack, aside / pack)
    with ObjectStore(store.dot_dir) as opened:
        assert opened.packs() == []
        assert not any(opened.has(Kind.CHUNK, oid) for oid in ids)
        for pack in names:
            os.rename(aside / pack, directory / pack)
        assert opened.read_chunk(ids[0]) == rows(1)
        assert opened.read_chunk(ids[1]) == rows(2)


def test_an_open_store_sees_what_another_seals(store) -> None:
    with ObjectStore(store.dot_dir) as other:
        ids = put_chain(store, versions(3))
        assert [other.read_chunk(oid) for oid in ids] == versions(3)
        more = put_chain(other, [rows(9)])
        assert store.read_chunk(more[0]) == rows(9)


def test_the_index_stays_small(store) -> None:
    def commit(count: int) -> int:
        with store.writer() as writer:
            for _ in range(count):
                writer.put(Kind.COMMIT, os.urandom(40))
            writer.seal()
        return os.path.getsize(os.path.join(store.dot_dir, "index.sqlite"))

    before = commit(20_000)
    after = commit(4_500)
    assert after - before < 150_000
    assert os.path.getsize(os.path.join(store.dot_dir, "index.sqlite-wal")) == 0


# --- crashes and full disks --------------------------------------------------------------------

WRITER = """
import os, sys
from dmsync.core.ids import Kind
from dmsync.storage.object_store import ObjectStore
store = ObjectStore(sys.argv[1])
number = 0
while True:
    with store.writer() as writer:
        ids = [writer.put(Kind.PAGE, os.urandom(3000)) for _ in range(20)]
        writer.seal()
    print("".join(oid.hex() + " " for oid in ids), flush=True)
"""


def test_a_killed_writer_leaves_sealed_packs_or_sweepable_files(tmp_path) -> None:
    source = random.Random(11)
    dot = str(tmp_path / DOT)
    sealed: set[str] = set()
    for _ in range(8):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(WRITER), dot], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        sealed.update(process.stdout.readline().split())
        time.sleep(source.random() * 0.08)
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read()
        process.wait()
        for line in rest.splitlines(keepends=True):
            if line.endswith("\n"):
                sealed.update(line.split())
        with ObjectStore(dot) as store:
            assert list(store.check(full=True)) == []
            assert all(store.has(Kind.PAGE, ObjectId(bytes.fromhex(oid))) for oid in sealed)
            store.writer().abort()
            assert all(name.endswith(".pack") for name in files_under(store))


@pytest.mark.parametrize("point", ["write", "fsync", "rename", "listdir after rename"])
def test_a_stop_at_any_step_of_sealing_leaves_a_sound_store(store, monkeypatch, point) -> None:
    class Stopped(BaseException):
        pass

    ids = put_chain(store, [rows(1)])
    writer = store.writer()
    new = writer.put(Kind.PAGE, rows(2))

    def stop(*_args, **_kwargs):
        raise Stopped

    target = {
        "write": (os, "pwrite"),
        "fsync": (os, "fsync"),
        "rename": (os, "rename"),
        "listdir after rename": (store.sealed.index, "add"),
    }[point]
    with monkeypatch.context() as patch:
        patch.setattr(*target, stop)
        with pytest.raises(Stopped):
            writer.seal()
    for builder in writer._built.builders:  # what the kernel does for a killed process
        builder.close()
    again = reopened(store)
    assert again.read_chunk(ids[0]) == rows(1)
    assert again.has(Kind.PAGE, new) == (point == "listdir after rename")
    assert list(again.check(full=True)) == []
    again.writer().abort()
    assert all(name.endswith(".pack") for name in files_under(again))
    again.close()


def test_a_living_writers_file_is_not_swept(store) -> None:
    with store.writer() as writer:
        oid = writer.put(Kind.PAGE, rows(1))
        store.writer().abort()
        writer.seal()
    assert store.read_page(oid) == rows(1)


def test_a_full_disk_is_told_and_changes_nothing(tmp_path) -> None:
    """RLIMIT_FSIZE stands for the full disk; it needs no privilege."""
    script = """
    import os, resource, sys
    from dmsync.core.ids import Kind
    from dmsync.errors import StorageFull
    from dmsync.storage.object_store import ObjectStore
    store = ObjectStore(sys.argv[1])
    with store.writer() as writer:
        writer.put(Kind.PAGE, b"kept" * 100)
        writer.seal()
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
    try:
        with store.writer() as writer:
            for _ in range(100):
                writer.put(Kind.CHUNK, os.urandom(100_000))
            writer.seal()
    except StorageFull:
        print("full", os.listdir(store.sealed.directory) == [store.packs()[0].name])
    """
    dot = str(tmp_path / DOT)
    command = [sys.executable, "-c", textwrap.dedent(script), dot]
    assert subprocess.check_output(command, text=True) == "full True\n"
    with ObjectStore(dot) as store:
        assert store.read_page(object_id(Kind.PAGE, b"kept" * 100)) == b"kept" * 100
        assert list(store.check(full=True)) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_full_filesystem_is_told_and_the_dot_goes_on(tmp_path) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(tmp_path)])
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with ObjectStore(str(tmp_path / DOT)) as store:
            with pytest.raises(StorageFull), store.writer() as writer:
                for _ in range(40):
                    writer.put(Kind.CHUNK, os.urandom(100_000))
            with store.writer() as writer:
                oid = writer.put(Kind.CHUNK, os.urandom(100_000))
                writer.seal()
            assert store.has(Kind.CHUNK, oid)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


# --- bounds ------------------------------------------------------------------------------------


def test_the_cache_and_open_files_are_bounded(store, monkeypatch) -> None:
    monkeypatch.setattr("dmsync.storage.pack_files.OPEN_PACKS_MAX", 4)
    ids = put_chain(store, [rows(seed) for seed in range(12)])
    cache = object_reading.DecodedCache(3 * CHUNK)
    store._reader._cache = cache
    for oid in ids:
        store.read_chunk(oid)
    assert len(store.sealed._files._open) <= 4
    assert len(cache._held) == 3
    assert cache._bytes <= 3 * CHUNK


def test_a_chain_of_the_longest_length_reads_without_recursion(store) -> None:
    states = versions(STEPS_MAX, 8192)
    with store.writer() as writer:
        base = None
        for state in states:
            base = writer.put(Kind.CHUNK, state, base=base)
        writer.seal()
    limit = sys.getrecursionlimit()
    store = reopened(store)
    try:
        sys.setrecursionlimit(150)
        assert store.read_chunk(base) == states[-1]
    finally:
        sys.setrecursionlimit(limit)


def test_memory_of_a_commit_follows_no_size(store) -> None:
    source = random.Random(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with store.writer() as writer:
        for _ in range(800):
            writer.put(Kind.CHUNK, source.randbytes(CHUNK))
        writer.seal()
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kib < 60_000


def test_prepared_chunks_are_stored_as_if_they_were_put(tmp_path) -> None:
    noise = random.Random(9)
    old = [rows(1), noise.randbytes(CHUNK), rows(2, 9000)]
    new = [edited(rows(1), 5), noise.randbytes(CHUNK), rows(3, 500), b"", rows(1), rows(4)]
    bases = [object_id(Kind.CHUNK, old[0]), object_id(Kind.CHUNK, old[1]), None, None, None, None]
    stored = []
    for way in ("put", "prepared"):
        with ObjectStore(str(tmp_path / way / ("ab" * 16))) as store:
            with store.writer() as writer:
                for data in old:
                    writer.put(Kind.CHUNK, data)
                writer.seal()
            with store.writer() as writer:
                if way == "put":
                    for data, base in zip(new, bases, strict=True):
                        writer.put(Kind.CHUNK, data, base=base, similar=True)
                else:
                    buffers = [bytearray(data) for data in new]
                    chunks = [
                        NewChunk(object_id(Kind.CHUNK, data), memoryview(buffer), base)
                        for data, buffer, base in zip(new, buffers, bases, strict=True)
                    ]
                    prepared = writer.prepare([chunks], similar=True)
                    for buffer in buffers:
                        buffer[:] = bytes(len(buffer))  # they are the caller's again
                    writer.put_prepared(prepared)
                    writer.put_prepared(prepared)
                writer.seal()
            stored.append([store.stored_record(Kind.CHUNK, object_id(Kind.CHUNK, d)) for d in new])
            assert [store.read_chunk(object_id(Kind.CHUNK, data)) for data in new] == new
            assert len(store.packs()) == 2
            assert store.packs()[-1].records + store.packs()[0].records == 8
    assert stored[0] == stored[1]


def test_what_was_written_anew_before_is_not_read_to_see_whether_it_is_again(
    store, monkeypatch
) -> None:
    tables = [rows(seed) for seed in range(16)]
    logs = [b"".join(table[at : at + 8192] for table in tables) for at in range(0, CHUNK, 8192)]
    with store.writer() as writer:
        bases = [writer.put(Kind.CHUNK, table) for table in tables]
        writer.seal()
    with store.writer() as writer:
        for table, base in zip(tables, bases, strict=True):
            everywhere = bytearray(table)
            everywhere[100::8192] = bytes(len(everywhere[100::8192]))
            writer.put(Kind.CHUNK, bytes(everywhere), base=base)
        log_ids = [writer.put(Kind.CHUNK, log, similar=True) for log in logs]
        writer.seal()
    stored = {store.stored_record(Kind.CHUNK, oid).encoding for oid in log_ids}
    assert stored == {Encoding.SIMILAR}
    news = [rows(100 + number) for number in range(16)]
    with store.writer() as writer:
        monkeypatch.setattr(writer._sealed, "find_many", None)
        chunks = [
            NewChunk(object_id(Kind.CHUNK, data), data, base)
            for data, base in zip(news, log_ids, strict=True)
        ]
        writer.put_prepared(writer.prepare([chunks], similar=True))
        writer.seal()
    assert [store.read_chunk(chunk.id) for chunk in chunks] == news


@pytest.mark.parametrize("is_edited", [True, False])
def test_what_a_block_written_anew_replaces_is_not_read(store, monkeypatch, is_edited) -> None:
    old = [rows(seed) for seed in range(16)]
    new = [edited(data, 7) if is_edited else rows(100 + n) for n, data in enumerate(old)]
    with store.writer() as writer:
        bases = [writer.put(Kind.CHUNK, data) for data in old]
        writer.seal()
    read: list[ObjectId] = []
    with store.writer() as writer:
        find_many = writer._sealed.find_many
        monkeypatch.setattr(
            writer._sealed,
            "find_many",
            lambda kind, ids, **more: (read.extend(ids), find_many(kind, ids, **more))[1],
        )
        chunks = [
            NewChunk(object_id(Kind.CHUNK, data), data, base)
            for data, base in zip(new, bases, strict=True)
        ]
        writer.put_prepared(writer.prepare([chunks], similar=False))
        writer.seal()
    records = [store.stored_record(Kind.CHUNK, chunk.id) for chunk in chunks]
    assert {record.encoding for record in records} == {
        Encoding.PATCH if is_edited else Encoding.ZSTD
    }
    assert sorted(read) == sorted(bases) if is_edited else len(read) == 2
    assert [store.read_chunk(chunk.id) for chunk in chunks] == new
