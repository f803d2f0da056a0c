"""Reading sealed objects beside the process that has the databases open."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from dmsync.core.ids import Kind, ObjectId, object_id
from dmsync.storage.detached_reading import DetachedReader, Undecided
from dmsync.storage.object_store import ObjectStore

CHUNK = 128 * 1024


def versions(seed: int, count: int) -> list[bytes]:
    source = random.Random(seed)
    data = bytearray(b"".join(b"%08d a row\n" % source.randrange(10**6) for _ in range(6900)))
    data = data[:CHUNK]
    states = []
    for _ in range(count):
        at = source.randrange(CHUNK - 40)
        data[at : at + 40] = source.randbytes(40)
        states.append(bytes(data))
    return states


@pytest.fixture(params=["plain", "odd ? # % name"])
def store(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[ObjectStore]:
    with ObjectStore(str(tmp_path / request.param / ("ab" * 16))) as store:
        yield store


def put_chains(store: ObjectStore, chains: int, length: int) -> dict[ObjectId, bytes]:
    """Chains of patches, one commit's worth of them in each pack; the newest of each."""
    states = [versions(seed, length) for seed in range(chains)]
    bases: list[ObjectId | None] = [None] * chains
    for step in range(length):
        with store.writer() as writer:
            bases = [
                writer.put(Kind.CHUNK, chain[step], base=base)
                for chain, base in zip(states, bases, strict=True)
            ]
            writer.seal()
    return {object_id(Kind.CHUNK, chain[-1]): chain[-1] for chain in states}


def test_it_reads_what_the_store_reads(store: ObjectStore) -> None:
    stored = put_chains(store, 70, 6)
    reader = DetachedReader(store.dot_dir)
    assert [found.data for found in reader.find_many(Kind.CHUNK, stored)] == list(stored.values())
    (alone, expected), *_ = stored.items()
    (found,) = reader.find_many(Kind.CHUNK, [alone], earlier=True)
    assert (found.data, found.steps) == (expected, 6)
    assert found.earlier is not None


def test_what_is_not_there_is_left_to_the_other(store: ObjectStore) -> None:
    put_chains(store, 1, 1)
    reader = DetachedReader(store.dot_dir)
    with pytest.raises(Undecided):
        list(reader.find_many(Kind.CHUNK, [ObjectId(bytes(32))]))


def test_an_index_with_a_log_beside_it_is_not_read(store: ObjectStore) -> None:
    put_chains(store, 1, 1)
    Path(store.dot_dir, "index.sqlite-wal").write_bytes(b"what a killed writer left")
    with pytest.raises(Undecided):
        DetachedReader(store.dot_dir)
    os.unlink(Path(store.dot_dir, "index.sqlite-wal"))
    DetachedReader(store.dot_dir)


def test_an_index_that_is_none_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "packs").mkdir()
    with pytest.raises(Undecided):
        DetachedReader(str(tmp_path))
    (tmp_path / "index.sqlite").write_bytes(os.urandom(20_000))
    with pytest.raises(Undecided):
        DetachedReader(str(tmp_path))


def test_packs_joined_meanwhile_cost_an_answer_and_never_give_a_wrong_one(
    store: ObjectStore,
) -> None:
    stored = put_chains(store, 3, 4)
    reader = DetachedReader(store.dot_dir)
    before = {pack.name for pack in store.packs()}
    put_chains(store, 3, 40)  # small packs: they are joined on the way
    assert before - {pack.name for pack in store.packs()}
    for oid, data in stored.items():
        try:
            (found,) = reader.find_many(Kind.CHUNK, [oid])
        except Undecided:
            continue
        assert found.data == data


def test_an_index_written_while_it_is_read_gives_right_answers_or_none(store: ObjectStore) -> None:
    stored = put_chains(store, 5, 3)
    reader = DetachedReader(store.dot_dir)
    for seed in range(12):
        with store.writer() as writer:
            for number in range(300):
                writer.put(Kind.CHUNK, random.Random(seed * 1000 + number).randbytes(200))
            writer.seal()
        for oid, data in stored.items():
            try:
                (found,) = reader.find_many(Kind.CHUNK, [oid])
            except Undecided:
                continue
            assert found.data == data
