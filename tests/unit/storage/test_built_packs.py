"""Packs under construction remember millions of records in little memory, and index them sorted."""

import os
import random
import tracemalloc
from array import array
from pathlib import Path

import pytest

from dmsync.core.ids import KEY_BYTES
from dmsync.storage import pack_index
from dmsync.storage.pack_writer import BuiltPacks
from dmsync.storage.packs import Footer, PackBuilder, Place

DOT_ID = bytes(16)


@pytest.fixture
def built(tmp_path: Path) -> BuiltPacks:
    packs = BuiltPacks()
    packs.builders += [PackBuilder.create(str(tmp_path), "tmp-", "", DOT_ID) for _ in range(3)]
    return packs


def keys_alike(chance: random.Random) -> list[bytes]:
    """Keys that begin alike, end alike, are found again inside of others' notes, and repeat."""
    endings = [b"\0" * 6, b"\0\0\0\0\0\1", b"\1\0\0\0\0\0", b"abcabc", b"bcabca"]
    return [bytes((0, chance.randrange(3))) + chance.choice(endings) for _ in range(200)]


@pytest.mark.parametrize("seed", range(10))
def test_places_are_those_noted_in_their_order(built: BuiltPacks, seed: int) -> None:
    chance = random.Random(seed)
    noted: dict[bytes, list[Place]] = {}
    for key in keys_alike(chance):
        number, offset = chance.randrange(3), chance.choice((0, 1, 256, 2**40 - 1))
        built.note(number, offset, key)
        noted.setdefault(key, []).append(Place(built.builders[number].name, offset))
    assert {key: built.places(key) for key in noted} == noted
    missing = [b"\0\0" + os.urandom(6), b"\7\7\0\0\0\0\0\0"]
    assert not any(built.places(key) for key in missing)
    assert built.first_places([*missing, *noted]) == {key: some[0] for key, some in noted.items()}
    assert [built.has_key(key) for key in (*noted, *missing)] == [True] * len(noted) + [False] * 2
    built.forget()
    assert not any(built.has_key(key) for key in noted)


def test_a_record_takes_little_memory(built: BuiltPacks) -> None:
    builder, count = built.builders[-1], 300_000
    tracemalloc.start()
    try:
        for number in range(count):
            built.append(b"r", random.Random(number).randbytes(KEY_BYTES))
        held_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert builder.records == count
    assert held_bytes / count < 80, "a dictionary of keys took 126"


@pytest.mark.parametrize("at_once", [1, 7, 100, 131_072])
def test_rows_come_in_key_order_whatever_is_sorted_at_once(
    monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(pack_index, "_ROWS_SORTED_AT_ONCE", at_once)
    chance = random.Random(at_once)
    for count in (0, 1, 2, 99, 100, 500):
        extremes = [bytes(8), b"\xff" * 8, b"\x7f" + b"\xff" * 7, b"\x80" + bytes(7)]
        keys = [*extremes, *(chance.randbytes(8) for _ in range(count))][:count]
        offsets = array("Q", range(100, 100 + count))
        footer = Footer(b"".join(keys), offsets, 100 + count)
        rows = list(pack_index._rows_in_key_order(footer, 5))
        signed = [int.from_bytes(key, "big", signed=True) for key in keys]
        assert rows == sorted(zip(signed, [5] * count, offsets, strict=True))
