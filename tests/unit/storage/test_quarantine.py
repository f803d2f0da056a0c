"""Incoming records: verified, resumed after a cut, promoted whole, hostile ones refused."""

import os
import random
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dmsync.core.chunking import FileHasher
from dmsync.core.delta import compress, compress_with_prefix
from dmsync.core.ids import Kind, ObjectId, object_id, short_key
from dmsync.core.objects import ROOT_ENTRY, Commit, Entry, EntryKind, Layout
from dmsync.core.pages import DIRECTORY, MANIFEST, Page, Span, encode_page
from dmsync.core.records import STEPS_MAX, BaseSlice, Encoding, Record, encode_record
from dmsync.engine.content_checks import check_content
from dmsync.errors import BadObject, Corruption, ObjectMissing, StorageFailed
from dmsync.storage.object_store import ObjectStore
from dmsync.storage.packs import HEADER_BYTES
from dmsync.storage.quarantine import Quarantine

Received = list[tuple[Kind, ObjectId, int]]

COMMIT = Commit(ROOT_ENTRY, (), "a", "a", 0, 0, "message").to_bytes()
PAGE = encode_page(Page(DIRECTORY, 0, (Entry(b"name", EntryKind.FIFO, 0o600),)))


@pytest.fixture
def sender(tmp_path):
    with ObjectStore(str(tmp_path / "sender" / ("cd" * 16))) as opened:
        yield opened


@pytest.fixture
def store(tmp_path):
    with ObjectStore(str(tmp_path / "receiver" / ("cd" * 16))) as opened:
        yield opened


def rows(seed: int, size: int = 20_000) -> bytes:
    source = random.Random(seed)
    return b"".join(b"row %012d\n" % source.getrandbits(36) for _ in range(size // 17 + 1))[:size]


def sent_records(sender: ObjectStore) -> list[tuple[Kind, ObjectId, bytes]]:
    """A chain of chunks, a page and a commit, as stored."""
    states = [rows(1)]
    for at in range(5):
        new = bytearray(states[-1])
        new[at * 4000 : at * 4000 + 5] = b"NEWER"
        states.append(bytes(new))
    with sender.writer() as writer:
        ids: list[tuple[Kind, ObjectId]] = []
        for state in states:
            ids.append(
                (Kind.CHUNK, writer.put(Kind.CHUNK, state, base=ids[-1][1] if ids else None))
            )
        ids.append((Kind.PAGE, writer.put(Kind.PAGE, PAGE)))
        ids.append((Kind.COMMIT, writer.put(Kind.COMMIT, COMMIT)))
        writer.seal()
    return [(kind, oid, encode_record(sender.stored_record(kind, oid))) for kind, oid in ids]


def parts(store: ObjectStore) -> list[Path]:
    return sorted(Path(store.dot_dir, "quarantine").iterdir())


def raw(kind: Kind, data: bytes) -> bytes:
    return encode_record(Record(kind, Encoding.RAW, len(data), data))


def test_received_records_are_readable_and_promoted_verbatim(sender, store) -> None:
    sent = sent_records(sender)
    with Quarantine(store) as quarantine:
        for kind, oid, record in sent:
            assert quarantine.receive(record) == oid
            assert quarantine.read(kind, oid) == sender.read(kind, oid)
            assert quarantine.keys_here([short_key(oid)], stored=False)
            assert not store.has(kind, oid), "not the store's before promotion"
        assert quarantine.read_page(sent[-2][1]) == PAGE
        assert quarantine.received_ids == {oid for _, oid, _ in sent}
        assert len(quarantine.promote()) == 1
        assert quarantine.promote() == ()
    assert parts(store) == []
    for kind, oid, record in sent:
        assert store.read(kind, oid) == sender.read(kind, oid)
        assert encode_record(store.stored_record(kind, oid)) == record
    assert list(store.check(full=True)) == []


def drain(steps: Generator[None, None, Received]) -> Received:
    """Run a generator of steps to its end; what it returns."""
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            received: Received = stop.value
            return received


@pytest.mark.parametrize("announced", [True, False], ids=["as announced", "unannounced"])
def test_a_frame_gives_what_its_records_give_one_by_one(sender, tmp_path, announced) -> None:
    """On threads or not, by the plan or by the bases' hashes: same ids, same bytes kept."""
    sent = sent_records(sender) + many_records(sender)
    kept = []
    for name in ("single", "joined"):
        with ObjectStore(str(tmp_path / name / ("cd" * 16))) as store, Quarantine(store) as here:
            if name == "single":
                ids = [here.receive(record) for _, _, record in sent]
            else:
                expected = {short_key(oid) for _, oid, _ in sent} if announced else frozenset()
                joined = b"".join(record for _, _, record in sent)
                received = drain(here.receive_joined(joined, expected))
                ids = [oid for _, oid, _ in received]
                assert [kind for kind, _, _ in received] == [kind for kind, _, _ in sent]
                lengths = [len(here.read(kind, oid)) for kind, oid, _ in sent]
                assert [length for _, _, length in received] == lengths
            here.sync()
            kept.append((ids, [part.read_bytes()[64:] for part in parts(store)]))
            assert ids == [oid for _, oid, _ in sent]
            here.discard()
    assert kept[0] == kept[1]


def many_records(sender: ObjectStore) -> list[tuple[Kind, ObjectId, bytes]]:
    """Enough chunks for several threads: half of them deltas on chunks of the same frame, some
    equal to others."""
    ids = []
    with sender.writer() as writer:
        for number in range(40):
            old = rows(100 + number % 30, 9_000)
            base = writer.put(Kind.CHUNK, old)
            new = old[:4000] + b"CHANGED" + old[4007:]
            ids += [base, writer.put(Kind.CHUNK, new, base=base)]
        writer.seal()
    return [(Kind.CHUNK, oid, encode_record(sender.stored_record(Kind.CHUNK, oid))) for oid in ids]


def test_deltas_on_a_chain_of_the_store_come_in_one_frame(sender, store) -> None:
    """What a usual push brings: each record's base is stored as a chain of patches here."""
    chunks = [rows(seed, 40_000) for seed in range(24)]
    last: list[ObjectId | None] = [None] * len(chunks)
    for round_number in range(3):
        for objects in (sender, store):
            with objects.writer() as writer:
                for at, data in enumerate(chunks):
                    last[at] = writer.put(Kind.CHUNK, data, base=previous(last, at, round_number))
                writer.seal()
        chunks = [
            c[: 8000 * round_number] + b"%08d" % 7 + c[8000 * round_number + 8 :] for c in chunks
        ]
    with sender.writer() as writer:
        new = [writer.put(Kind.CHUNK, c, base=last[at]) for at, c in enumerate(chunks)]
        writer.seal()
    records = [encode_record(r) for r in sender.stored_records(Kind.CHUNK, new)]
    with Quarantine(store) as quarantine:
        received = drain(quarantine.receive_joined(b"".join(records), set(map(short_key, new))))
        assert [oid for _, oid, _ in received] == new
        quarantine.promote()
    assert list(store.read_many(Kind.CHUNK, new)) == chunks


def previous(last: list[ObjectId | None], at: int, round_number: int) -> ObjectId | None:
    return last[at] if round_number else None


def test_a_damaged_base_of_ours_is_told_and_nothing_wrong_is_kept(sender, store) -> None:
    """The plan vouches for the result: a base that decodes to something else cannot pass."""
    old = rows(1, 40_000)
    new = old[:-5] + b"newer"
    with store.writer() as writer:
        base = writer.put(Kind.CHUNK, old)
        writer.seal()
    pack = Path(store.sealed.directory) / store.packs()[0].name
    data = bytearray(pack.read_bytes())
    data[len(data) // 3] ^= 1
    pack.write_bytes(data)
    frame = compress_with_prefix(new, old)
    delta = Record(Kind.CHUNK, Encoding.PREFIX, len(new), frame, (BaseSlice(short_key(base)),))
    expected = {short_key(object_id(Kind.CHUNK, new))}
    with Quarantine(store) as quarantine:
        with pytest.raises(Corruption):
            drain(quarantine.receive_joined(encode_record(delta), expected))
        assert quarantine.received_ids == set()


def test_what_is_here_already_is_not_kept_again(sender, store) -> None:
    sent = sent_records(sender)
    with Quarantine(store) as quarantine:
        for _, _, record in sent + sent:
            quarantine.receive(record)
        assert quarantine.promote()[0].records == len(sent)
    with Quarantine(store) as quarantine:
        for _, oid, record in sent:
            assert quarantine.receive(record) == oid
        assert quarantine.promote() == ()


def test_a_cut_session_goes_on_where_it_was_synced(sender, store) -> None:
    sent = sent_records(sender)
    first = Quarantine(store)
    for _, _, record in sent[:4]:
        first.receive(record)
    first.close()
    with Quarantine(store) as second:
        assert second.received_ids == {oid for _, oid, _ in sent[:4]}
        keys = [short_key(oid) for _, oid, _ in sent]
        assert second.keys_here(keys, stored=False) == set(keys[:4])
        for _, _, record in sent[4:]:
            second.receive(record)
        assert len(parts(store)) == 1
        second.promote()
    assert all(store.has(kind, oid) for kind, oid, _ in sent)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.integers(0, 100_000), st.booleans())
def test_a_part_torn_or_flipped_anywhere_keeps_only_sound_records(
    tmp_path_factory, at, flip
) -> None:
    base = tmp_path_factory.mktemp("torn")
    with ObjectStore(str(base / "s" / ("cd" * 16))) as sender:
        sent = sent_records(sender)
        with ObjectStore(str(base / "r" / ("cd" * 16))) as store:
            with Quarantine(store) as quarantine:
                for _, _, record in sent:
                    quarantine.receive(record)
            (part,) = parts(store)
            data = bytearray(part.read_bytes())
            at %= len(data)
            if flip:
                data[at] ^= 4
            else:
                del data[at:]
            part.write_bytes(data)
            store.cache.__init__()
            with Quarantine(store) as resumed:
                kept = [oid for _, oid, _ in sent if oid in resumed.received_ids]
                assert kept == [oid for _, oid, _ in sent][: len(kept)] or flip
                for kind, oid, record in sent:
                    if oid in resumed.received_ids:
                        assert resumed.read(kind, oid) == sender.read(kind, oid)
                    else:
                        assert resumed.receive(record) == oid
                resumed.promote()
            assert all(store.has(kind, oid) for kind, oid, _ in sent)
            assert list(store.check(full=True)) == []


def test_a_living_session_is_not_adopted(sender, store) -> None:
    sent = sent_records(sender)
    with Quarantine(store) as first:
        first.receive(sent[0][2])
        first.sync()
        with Quarantine(store) as second:
            assert second.received_ids == set()
            second.receive(sent[0][2])
            assert len(parts(store)) == 2
        first.promote()
    assert store.has(*sent[0][:2])


def test_what_is_discarded_is_gone(sender, store) -> None:
    with Quarantine(store) as quarantine:
        quarantine.receive(raw(Kind.COMMIT, COMMIT))
        quarantine.sync()
        quarantine.discard()
    assert parts(store) == []
    assert store.packs() == []


def test_a_session_without_records_leaves_no_file(store) -> None:
    Quarantine(store).close()
    assert parts(store) == []


def test_foreign_part_files_are_removed(store) -> None:
    directory = Path(store.dot_dir, "quarantine")
    directory.mkdir()
    (directory / "x.part").write_bytes(b"not a pack")
    with Quarantine(store) as quarantine:
        assert quarantine.received_ids == set()
    assert parts(store) == []


HUGE = encode_record(
    Record(Kind.CHUNK, Encoding.ZSTD, 1 << 20, compress(bytes(1 << 20)) + bytes(1 << 19))
)


@pytest.mark.parametrize(
    ("why", "record"),
    [
        ("no record", b"\xff\xff"),
        ("bytes behind", raw(Kind.CHUNK, b"x") + b"y"),
        ("empty chunk", raw(Kind.CHUNK, b"")),
        ("page that is none", raw(Kind.PAGE, b"\x93\x01\x00\x90")),
        ("empty page", raw(Kind.PAGE, b"")),
        ("unsafe name", raw(Kind.PAGE, PAGE.replace(b"\xc4\x04name", b"\xc4\x04a/bc"))),
        ("commit with bytes behind", raw(Kind.COMMIT, COMMIT + b"\x00")),
        ("commit that is none", raw(Kind.COMMIT, b"\x90")),
        ("tag that is no value", raw(Kind.TAG, b"\xc1")),
        ("frame with bytes behind", HUGE),
        (
            "base that is not here",
            encode_record(
                Record(
                    Kind.CHUNK, Encoding.PREFIX, 9, compress(b"123456789"), (BaseSlice(b"k" * 8),)
                )
            ),
        ),
    ],
)
def test_hostile_records_are_refused_and_leave_nothing(store, why, record) -> None:
    with Quarantine(store) as quarantine:
        with pytest.raises(BadObject):
            quarantine.receive(record)
        with pytest.raises(BadObject):
            drain(quarantine.receive_joined(record + raw(Kind.CHUNK, b"behind")[:-1]))
        assert quarantine.received_ids == set()
        assert quarantine.promote() == ()


@settings(
    max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(st.binary(max_size=100))
def test_arbitrary_bytes_raise_corruption_only(store, data) -> None:
    with Quarantine(store) as quarantine:
        try:
            quarantine.receive(data)
        except Corruption:
            pass
        quarantine.discard()


def test_a_base_in_the_store_serves_incoming_deltas(store) -> None:
    old, new = rows(1), rows(1)[:-5] + b"newer"
    with store.writer() as writer:
        base = writer.put(Kind.CHUNK, old)
        writer.seal()
    frame = compress_with_prefix(new, old)
    delta = Record(Kind.CHUNK, Encoding.PREFIX, len(new), frame, (BaseSlice(short_key(base)),))
    with Quarantine(store) as quarantine:
        assert quarantine.receive(encode_record(delta)) == object_id(Kind.CHUNK, new)
        quarantine.promote()
    assert store.read_chunk(object_id(Kind.CHUNK, new)) == new


def test_a_chain_too_long_for_reading_is_kept_as_a_full_frame(store) -> None:
    """The peer's chain may start where ours already is deep: no chain exceeds the bound."""
    state, base = rows(1, 5000), None
    with Quarantine(store) as quarantine:
        for number in range(STEPS_MAX + 3):
            new = state[:-8] + b"%08d" % number
            if base is None:
                record = Record(Kind.CHUNK, Encoding.ZSTD, len(new), compress(new))
            else:
                frame = compress_with_prefix(new, state)
                record = Record(Kind.CHUNK, Encoding.PREFIX, len(new), frame, (BaseSlice(base),))
            base, state = short_key(quarantine.receive(encode_record(record))), new
        quarantine.promote()
    store.cache.__init__()
    last = object_id(Kind.CHUNK, state)
    assert store.read_chunk(last) == state
    assert store._reader.find(Kind.CHUNK, last).steps <= STEPS_MAX


def test_reading_what_never_came_is_object_missing(store) -> None:
    with Quarantine(store) as quarantine:
        assert not quarantine.has(Kind.CHUNK, ObjectId(bytes(32)))
        with pytest.raises(ObjectMissing):
            quarantine.read(Kind.CHUNK, ObjectId(bytes(32)))


def test_promotion_stopped_before_its_rename_is_resumed(sender, store, monkeypatch) -> None:
    class Stopped(BaseException):
        pass

    def stop(*_args):
        raise Stopped

    sent = sent_records(sender)
    quarantine = Quarantine(store)
    for _, _, record in sent:
        quarantine.receive(record)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", stop)
        with pytest.raises(Stopped):
            quarantine.promote()
    for builder in quarantine._parts.builders:  # what the kernel does for a killed process
        builder.close()
    with Quarantine(store) as again:
        assert again.received_ids == {oid for _, oid, _ in sent}
        again.promote()
    assert list(store.check(full=True)) == []
    assert all(store.has(kind, oid) for kind, oid, _ in sent)


# --- more than the page cache is used for ---------------------------------------------------------


def large_chunks(count: int) -> list[bytes]:
    return [random.Random(number).randbytes(400_000 + number) for number in range(count)]


def test_a_part_that_is_a_sealed_pack_as_well_is_left_alone(sender, store) -> None:
    """After a loss of power in a promotion btrfs has the file under both of its names."""
    sent = sent_records(sender)
    with Quarantine(store) as quarantine:
        for _, _, record in sent[:4]:
            quarantine.receive(record)
        (part,) = parts(store)
        (sealed,) = quarantine.promote()
    pack = Path(store.sealed.directory, sealed.name)
    content = pack.read_bytes()
    os.link(pack, part)
    with Quarantine(store) as quarantine:
        for _, _, record in sent[4:]:
            quarantine.receive(record)
        assert part not in parts(store)
        quarantine.promote()
    assert pack.read_bytes() == content and pack.stat().st_nlink == 1
    for kind, oid, _ in sent:
        assert store.read(kind, oid) == sender.read(kind, oid)


def test_a_large_session_is_in_its_part_when_it_was_synced(store) -> None:
    chunks = large_chunks(40)
    with Quarantine(store) as quarantine:
        sent = b""
        for number, chunk in enumerate(chunks):
            record = raw(Kind.CHUNK, chunk)
            drain(quarantine.receive_joined(record))
            sent += record
            if number % 9 == 0:
                quarantine.begin_sync()()
                assert parts(store)[0].read_bytes()[HEADER_BYTES:] == sent
        for chunk in chunks:
            assert quarantine.read(Kind.CHUNK, object_id(Kind.CHUNK, chunk)) == chunk
        quarantine.promote()
    assert list(store.check(full=True)) == []
    ids = [object_id(Kind.CHUNK, chunk) for chunk in chunks]
    found = store.read_many(Kind.CHUNK, ids)
    assert list(found) == chunks


def test_a_large_session_that_was_cut_goes_on(store) -> None:
    chunks = large_chunks(30)
    with Quarantine(store) as quarantine:
        for chunk in chunks[:17]:
            quarantine.receive(raw(Kind.CHUNK, chunk))
    with Quarantine(store) as quarantine:
        for chunk in chunks:
            quarantine.receive(raw(Kind.CHUNK, chunk))
        assert len(quarantine.received_ids) == len(chunks)
        quarantine.promote()
    assert list(store.check(full=True)) == []
    for chunk in chunks:
        assert store.read_chunk(object_id(Kind.CHUNK, chunk)) == chunk


def test_a_chunk_that_the_disk_changed_meanwhile_does_not_pass_for_a_file(store) -> None:
    """Chunks are not hashed when they are read again; the file that they make is."""
    chunks = large_chunks(30)
    hasher, spans = FileHasher(), []
    with Quarantine(store) as quarantine:
        for chunk in chunks:
            quarantine.receive(raw(Kind.CHUNK, chunk))
            hasher.update(chunk)
            spans.append(Span(len(chunk), object_id(Kind.CHUNK, chunk)))
        page = encode_page(Page(MANIFEST, 0, tuple(spans)))
        tree = quarantine.receive(raw(Kind.PAGE, page))
        entry = Entry(
            b"file", EntryKind.FILE, 0o600, size=hasher.size, content=hasher.content(),
            layout=Layout.CDC, tree=tree,
        )  # fmt: skip
        quarantine.sync()
        for _ in check_content(quarantine, entry):
            pass
        with parts(store)[0].open("r+b") as file:
            file.seek(11_000_000)
            file.write(b"\x00\x01\x02\x03")
        with pytest.raises((BadObject, Corruption)):
            for _ in check_content(quarantine, entry):
                pass
        quarantine.discard()


def test_a_part_whose_sync_failed_is_never_taken_up_again(sender, store, monkeypatch):
    """The kernel drops what it could not write and calls it clean: the next fsync would lie."""
    records = sent_records(sender)
    real = os.fsync

    def failing(fd: int) -> None:
        if os.readlink(f"/proc/self/fd/{fd}").endswith(".part"):
            raise OSError(5, "Input/output error")
        real(fd)

    with pytest.raises(StorageFailed), Quarantine(store) as quarantine:
        for _, _, record in records:
            quarantine.receive(record)
        monkeypatch.setattr(os, "fsync", failing)
        quarantine.promote()
    monkeypatch.undo()
    with Quarantine(store) as quarantine:
        assert quarantine.received_ids == set()
        assert not any(quarantine.has(kind, oid) for kind, oid, _ in records)
