"""Sweeping: what stays can be decoded whatever it was based on, what goes is gone, also on stops."""

import os
import random
from pathlib import Path

import pytest

from dmsync.core.delta import compress
from dmsync.core.ids import Kind, ObjectId, object_id, short_key
from dmsync.core.records import Record, encode_record, parse_record
from dmsync.errors import Corruption, StorageFailed, StorageFull
from dmsync.storage import pack_sweeping
from dmsync.storage.chunk_forms import NewChunk, delta_form, plain_record
from dmsync.storage.holds import Hold, Sweeping
from dmsync.storage.object_reading import Decoded
from dmsync.storage.object_store import ObjectStore
from dmsync.storage.pack_sweeping import NewPacks, PreparedSweep, SweepPlan, prepare_sweep, survey
from dmsync.storage.packs import PackBuilder

PAGE = 4096
CHUNK = 32 * PAGE
ALL = 1 << 40


class Shelf:
    """An object store in which chunks are rewritten in place, one pack for each round."""

    def __init__(self, directory: Path, seed: int = 1) -> None:
        self.directory = directory / ("ab" * 16)
        self.objects = ObjectStore(str(self.directory))
        self.random = random.Random(seed)
        self.data: dict[ObjectId, bytes] = {}

    def put(self, data: bytes, base: ObjectId | None = None, *, similar: bool = False) -> ObjectId:
        return self.put_all([(data, base)], similar=similar)[0]

    def put_all(
        self, parts: list[tuple[bytes, ObjectId | None]], *, similar: bool = False
    ) -> list[ObjectId]:
        with self.objects.writer() as writer:
            ids = [writer.put(Kind.CHUNK, d, base=b, similar=similar) for d, b in parts]
            writer.seal()
        self.data.update(zip(ids, (d for d, _ in parts), strict=True))
        self.objects.hold.close()
        return ids

    def versions(self, count: int) -> list[ObjectId]:
        """A chunk and its next states, each based on the one before."""
        data = self.random.randbytes(CHUNK)
        ids = [self.put(data)]
        for _ in range(count - 1):
            at = self.random.randrange(CHUNK // PAGE) * PAGE
            data = data[:at] + self.random.randbytes(PAGE) + data[at + PAGE :]
            ids.append(self.put(data, ids[-1]))
        return ids

    def alone(self, data: bytes) -> Record:
        self.data[object_id(Kind.CHUNK, data)] = data
        return plain_record(Kind.CHUNK, data, compress(data))

    def on(self, base: bytes, data: bytes) -> Record:
        """A record of `data` that is a delta."""
        oid = object_id(Kind.CHUNK, data)
        self.data[oid] = data
        new = NewChunk(oid, data, object_id(Kind.CHUNK, base))
        form, _ = delta_form(Kind.CHUNK, new, Decoded(Kind.CHUNK, base, 1, len(base), 0))
        assert form is not None
        record, _ = parse_record(form.encoded)
        assert record.bases
        return record

    def seal(self, *parts: tuple[Record, bytes]) -> Path:
        """A pack of records in just these forms, with what they stand for."""
        directory = self.objects.sealed.directory
        builder = PackBuilder.create(directory, "tmp-", "", self.objects.dot_id)
        for record, data in parts:
            builder.append(encode_record(record), short_key(object_id(Kind.CHUNK, data)))
        (info,) = self.objects.publish([builder])
        return Path(directory) / info.name

    def junk(self) -> tuple[Record, bytes]:
        data = self.random.randbytes(500)
        return self.alone(data), data

    def next(self, data: bytes) -> bytes:
        return data[:100] + self.random.randbytes(100) + data[200:]

    def reopen(self) -> None:
        self.objects.close()
        self.objects = ObjectStore(str(self.directory))

    def prepare(self, live: set[ObjectId], *, room: int = ALL) -> PreparedSweep | None:
        keys = {short_key(oid) for oid in live}
        found = survey(self.objects, keys.__contains__)
        return prepare_sweep(self.objects, found, keys.__contains__, copied_bytes_max=room)

    def sweep(self, live: set[ObjectId], *, room: int = ALL) -> PreparedSweep:
        prepared = self.prepare(live, room=room)
        assert prepared is not None
        prepared.finish()
        prepared.close()
        return prepared

    def check(self, live: set[ObjectId]) -> None:
        for objects in (self.objects, ObjectStore(str(self.directory))):
            for oid in live:
                assert objects.read(Kind.CHUNK, oid) == self.data[oid]
            assert list(objects.check(full=True)) == []
        objects.close()

    def count(self) -> int:
        return sum(pack.records for pack in self.objects.packs())


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path)


@pytest.mark.parametrize("kept", [(9,), (0,), (5, 9), (2, 3, 7), (0, 9)])
def test_versions_survive_the_loss_of_those_they_are_deltas_of(
    shelf: Shelf, kept: tuple[int, ...]
) -> None:
    ids = shelf.versions(10)
    live = {ids[number] for number in kept}
    shelf.sweep(live)
    shelf.check(live)
    assert shelf.count() == len(live)
    # one is stored alone, the others on it
    assert shelf.objects.stored_bytes() < CHUNK + (len(live) - 1) * 3 * PAGE * 10 + 4 * PAGE


def test_pages_of_similar_chunks_are_taken_from_what_stays(shelf: Shelf) -> None:
    old = shelf.versions(2)
    before = shelf.data[old[1]]
    pages = [shelf.random.randbytes(PAGE) for _ in range(4)]
    data = b"".join(pages) + before[4 * PAGE :]
    # the log of a database holds the pages that were written
    log = b"".join([before[2 * PAGE * n : 2 * PAGE * (n + 1)] for n in (0, 1)]) * 4
    with shelf.objects.writer() as writer:
        new = writer.put(Kind.CHUNK, data, base=old[1])
        image = writer.put(Kind.CHUNK, log + shelf.random.randbytes(PAGE), similar=True)
        writer.seal()
    shelf.data[new], shelf.data[image] = data, log + shelf.objects.read(Kind.CHUNK, image)[-PAGE:]
    shelf.sweep({new, image})
    shelf.check({new, image})


def test_garbage_below_a_tenth_of_a_large_pack_stays_with_what_needs_it(shelf: Shelf) -> None:
    first = shelf.put_all([(shelf.random.randbytes(CHUNK), None) for _ in range(16)])
    data = shelf.data[first[0]]
    changed = shelf.put(shelf.random.randbytes(PAGE) + data[PAGE:], first[0])
    live = {*first[1:], changed}
    prepared = shelf.prepare(live)
    # the base is a sixteenth of a large pack: its delta alone is no reason to copy that
    if prepared is not None:
        prepared.finish()
        prepared.close()
    shelf.check(live)


def test_a_base_that_a_pack_needs_which_stays_is_kept(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only some packs may be copied: what the others are based on must not go with its pack."""
    ids = shelf.versions(6)
    other = shelf.versions(3)
    live = {ids[5], other[2]}
    monkeypatch.setattr(pack_sweeping, "SMALL_PACK_BYTES", 0)
    prepared = shelf.prepare(live, room=0)
    if prepared is not None:
        prepared.finish()
        prepared.close()
    shelf.check(live)
    shelf.sweep(live)
    shelf.check(live)
    assert shelf.count() == 2


def test_a_sound_copy_is_never_given_up_for_a_damaged_one(shelf: Shelf) -> None:
    oid = shelf.put(shelf.random.randbytes(CHUNK))
    pack = shelf.objects.packs()[0].name
    path = Path(shelf.objects.sealed.directory) / pack
    content = bytearray(path.read_bytes())
    content[PAGE] ^= 1
    path.chmod(0o600)
    path.write_bytes(content)
    shelf.objects.close()
    again = Shelf(shelf.directory.parent, 2)
    again.put_all([(shelf.data[oid], None), (again.random.randbytes(CHUNK), None)])
    assert again.count() == 3
    prepared = again.prepare({oid})
    if prepared is not None:
        prepared.finish()
    assert again.objects.read(Kind.CHUNK, oid) == shelf.data[oid]


def flip_a_bit(pack: Path, at: int) -> None:
    content = bytearray(pack.read_bytes())
    content[at] ^= 1
    pack.chmod(0o600)
    pack.write_bytes(content)


def sweep_if_worth_it(shelf: Shelf, live: set[ObjectId]) -> None:
    prepared = shelf.prepare(live)
    if prepared is not None:
        prepared.finish()
        prepared.close()
    shelf.reopen()
    for oid in live:
        assert shelf.objects.read(Kind.CHUNK, oid) == shelf.data[oid]


@pytest.mark.parametrize("is_noticed", [True, False])
def test_a_damaged_copy_does_not_let_a_sound_base_go(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch, is_noticed: bool
) -> None:
    """Whether its pack stays since it is damaged, or since little of it is garbage."""
    base, *others = (shelf.random.randbytes(CHUNK) for _ in range(13))
    changed = shelf.next(base)
    pack = shelf.seal(*((shelf.alone(data), data) for data in (base, *others)))
    flip_a_bit(pack, CHUNK // 2)
    shelf.reopen()
    shelf.seal((shelf.alone(base), base), shelf.junk())
    shelf.seal((shelf.on(base, changed), changed))
    shelf.reopen()
    if not is_noticed:
        monkeypatch.setattr(pack_sweeping, "SMALL_PACK_BYTES", 0)
    live = {object_id(Kind.CHUNK, data) for data in (changed, *others)}
    for _ in range(2):
        sweep_if_worth_it(shelf, live)


def test_what_stays_of_several_records_is_not_based_on_itself(shelf: Shelf) -> None:
    """Each of two objects once alone and once on the other: nobody keeps both deltas."""
    for number in range(16):  # which one comes first is the hash's affair
        dot = Shelf(shelf.directory.parent / str(number), number)
        one = dot.random.randbytes(4 * PAGE)
        two = dot.next(one)
        dot.seal((dot.alone(one), one), dot.junk())
        dot.seal((dot.on(one, two), two))
        dot.seal((dot.alone(two), two), (dot.on(two, one), one))
        dot.reopen()
        live = {object_id(Kind.CHUNK, one), object_id(Kind.CHUNK, two)}
        sweep_if_worth_it(dot, live)
        dot.check(live)
        assert dot.count() == 2


def test_what_is_stored_anew_is_not_based_on_itself(shelf: Shelf) -> None:
    """An object is there alone, and on a dead version of what is based on it."""
    one = shelf.random.randbytes(CHUNK)
    two, dead = shelf.next(one), shelf.next(one)
    shelf.seal((shelf.alone(one), one), shelf.junk())
    shelf.seal((shelf.on(one, two), two), shelf.junk())
    shelf.seal((shelf.on(two, dead), dead))
    shelf.seal((shelf.on(dead, one), one), shelf.junk())
    shelf.reopen()
    live = {object_id(Kind.CHUNK, one), object_id(Kind.CHUNK, two)}
    sweep_if_worth_it(shelf, live)
    shelf.check(live)
    assert shelf.count() == 2


def test_a_record_of_a_damaged_pack_is_not_copied_where_all_of_that_was_to_go(
    shelf: Shelf,
) -> None:
    base = shelf.random.randbytes(CHUNK)
    changed = shelf.next(base)
    pack = shelf.seal((shelf.alone(base), base))
    shelf.seal((shelf.on(base, changed), changed), shelf.junk())
    flip_a_bit(pack, CHUNK // 2)
    shelf.reopen()
    prepared = shelf.prepare({object_id(Kind.CHUNK, changed)})
    if prepared is not None:
        prepared.finish()
        prepared.close()
    # the base cannot be read and is needed: its pack says that it is damaged, as before
    assert pack.exists()


@pytest.mark.parametrize(("fails", "error"), [(True, StorageFailed), (False, Corruption)])
def test_a_read_that_fails_or_ends_early_is_no_part_of_a_new_pack(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch, fails: bool, error: type[Exception]
) -> None:
    kept = shelf.random.randbytes(CHUNK)
    shelf.seal((shelf.alone(kept), kept), shelf.junk())
    copy, read = pack_sweeping._copy_survivors, os.pread

    def pread(fd: int, count: int, offset: int) -> bytes:
        if count < CHUNK:
            return read(fd, count, offset)
        if fails:
            raise OSError(5, "Input/output error")
        return read(fd, count, offset)[:-1]

    def copy_survivors(
        objects: ObjectStore, plan: SweepPlan, number: int, renewed: set[bytes], packs: NewPacks
    ) -> int:
        with monkeypatch.context() as patch:
            patch.setattr(os, "pread", pread)
            return copy(objects, plan, number, renewed, packs)

    monkeypatch.setattr(pack_sweeping, "_copy_survivors", copy_survivors)
    with pytest.raises(error):
        shelf.prepare({object_id(Kind.CHUNK, kept)})
    assert not [name for name in os.listdir(shelf.objects.sealed.directory) if "tmp" in name]


def test_second_copies_go(shelf: Shelf, tmp_path: Path) -> None:
    oid = shelf.put(shelf.random.randbytes(CHUNK))
    twin = Shelf(tmp_path / "other", 2)
    twin.put_all([(shelf.data[oid], None), (twin.random.randbytes(CHUNK), None)])
    for path in (twin.directory / "packs").glob("*.pack"):
        (shelf.directory / "packs" / path.name).write_bytes(path.read_bytes())
    shelf.objects.sealed.index.catch_up()
    live = {oid}
    shelf.sweep(live)
    shelf.check(live)
    assert shelf.count() == 1


def test_what_was_sealed_on_something_that_goes_stops_the_sweep(shelf: Shelf) -> None:
    ids = shelf.versions(3)
    live = {ids[2]}
    prepared = shelf.prepare(live)
    assert prepared is not None
    changed = shelf.random.randbytes(PAGE) + shelf.data[ids[0]][PAGE:]
    late = shelf.put(changed, ids[0])
    assert not prepared.fits([])
    prepared.close()
    assert shelf.prepare(live | {late}) is not None


def test_what_became_live_stops_the_sweep(shelf: Shelf) -> None:
    ids = shelf.versions(3)
    prepared = shelf.prepare({ids[2]})
    assert prepared is not None
    assert prepared.fits([]) and prepared.fits([short_key(ids[2])])
    assert not prepared.fits([short_key(ids[0])])
    prepared.close()
    assert not [name for name in os.listdir(shelf.objects.sealed.directory) if "tmp" in name]


def test_a_stop_before_the_old_files_went_leaves_nothing_to_read_there(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = shelf.versions(6)
    live = {ids[5]}
    prepared = shelf.prepare(live)
    assert prepared is not None
    monkeypatch.setattr(shelf.objects.sealed.index, "remove_swept_files", lambda _: None)
    prepared.finish()
    monkeypatch.undo()
    files = len(list((shelf.directory / "packs").glob("*.pack")))
    assert files > len(shelf.objects.packs()) == 1
    shelf.check(live)
    shelf.put(b"garbage" * 999)
    shelf.sweep(live)
    shelf.check(live)
    # files that an earlier sweep let go stay known as such until they are removed
    listed = {path.name for path in (shelf.directory / "packs").glob("*.pack")}
    assert listed - shelf.objects.sealed.index.replaced() == {
        pack.name for pack in shelf.objects.packs()
    }


def test_an_index_that_cannot_be_written_goes_before_the_packs_do(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = shelf.versions(4)
    index = shelf.objects.sealed.index

    def full(*_: object) -> None:
        raise StorageFull("no room")

    monkeypatch.setattr(index, "sweep", full)
    shelf.sweep({ids[3]})
    shelf.check({ids[3]})
    assert shelf.count() == 1


def test_another_process_learns_of_a_sweep_when_it_takes_its_hold(shelf: Shelf) -> None:
    """A server with everything in its caches must store again what a sweep has removed."""
    ids = shelf.versions(3)
    server = ObjectStore(str(shelf.directory))
    for oid in ids:
        server.read(Kind.CHUNK, oid)
    shelf.sweep({ids[2]})
    server.hold.acquire()
    assert not server.has(Kind.CHUNK, ids[0])
    assert not server.has_key(short_key(ids[0]))
    with server.writer() as writer:
        assert writer.put(Kind.CHUNK, shelf.data[ids[0]]) == ids[0]
        assert writer.seal()
    assert server.read(Kind.CHUNK, ids[0]) == shelf.data[ids[0]]
    server.close()


def test_a_hold_keeps_a_sweep_out_and_is_counted(tmp_path: Path) -> None:
    from dmsync.errors import Busy

    hold = Hold(str(tmp_path), wait_s=0)
    hold.acquire()
    with hold():
        pass
    with pytest.raises(Busy) as refused, Sweeping(str(tmp_path), wait_s=0):
        pass
    assert "in use" in refused.value.message
    hold.release()
    with Sweeping(str(tmp_path), wait_s=0):
        with pytest.raises(Busy):
            hold.acquire()
        late = Hold(str(tmp_path), wait_s=0)
        late.acquire_or_go_on(None)
        with pytest.raises(Busy):
            late.require()
    hold.acquire()
    hold.close()
