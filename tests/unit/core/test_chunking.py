"""Cuts and content ids do not depend on how a file arrives."""

import random

from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from dmsync.core.chunking import (
    CDC_BYTES_MAX,
    FIXED_CHUNK_BYTES,
    SEGMENT_BYTES,
    FileHasher,
    cdc_cuts,
    choose_layout,
    is_zero,
)
from dmsync.core.ids import CONTENT_CONTEXT
from dmsync.core.objects import Layout

DATA = random.Random(5).randbytes(3 * 1024 * 1024 + 17)


def reference_content(data: bytes) -> bytes:
    parts = [data[at : at + SEGMENT_BYTES] for at in range(0, len(data), SEGMENT_BYTES)]
    hashes = [blake3(part).digest() for part in parts] or [blake3(b"").digest()]
    return (
        hashes[0]
        if len(hashes) == 1
        else blake3(b"".join(hashes), derive_key_context=CONTENT_CONTEXT).digest()
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 5 * SEGMENT_BYTES), st.lists(st.integers(1, 2 * SEGMENT_BYTES), max_size=6))
def test_content_id_is_the_same_for_every_split(size: int, lengths: list[int]) -> None:
    data, hasher, at = DATA[:size], FileHasher(), 0
    for length in lengths:
        hasher.update(data[at : at + length])
        at += length
    hasher.update(memoryview(data)[at:])
    assert hasher.content() == reference_content(data)
    assert hasher.size == size


def test_known_segment_hashes_stand_for_their_bytes() -> None:
    for size in (1, SEGMENT_BYTES, SEGMENT_BYTES + 1, 3 * SEGMENT_BYTES):
        hasher = FileHasher()
        for at in range(0, size, SEGMENT_BYTES):
            part = DATA[:size][at : at + SEGMENT_BYTES]
            hasher.add_segment_hash(blake3(part).digest(), len(part))
        assert hasher.content() == reference_content(DATA[:size])


@settings(max_examples=20, deadline=None)
@given(st.integers(600_000, 2_000_000))
def test_cdc_cuts_do_not_depend_on_the_buffers(step: int) -> None:
    expected = cdc_cuts(DATA, final=True)
    assert sum(expected) == len(DATA)
    assert max(expected) <= CDC_BYTES_MAX
    found, start, end = [], 0, 0
    while end < len(DATA):
        end = min(len(DATA), end + step)
        cuts = cdc_cuts(memoryview(DATA)[start:end], final=end == len(DATA))
        found += cuts
        start += sum(cuts)
    assert found == expected


def test_an_insertion_moves_only_the_cuts_near_it() -> None:
    changed = DATA[:500_000] + b"inserted" + DATA[500_000:]

    def chunks(data: bytes) -> set[bytes]:
        found, at = set(), 0
        for length in cdc_cuts(data, final=True):
            found.add(data[at : at + length])
            at += length
        return found

    assert len(chunks(changed) - chunks(DATA)) <= 3


def test_layout_follows_size_and_what_the_file_was() -> None:
    small, pages = FIXED_CHUNK_BYTES, 10 * FIXED_CHUNK_BYTES
    assert choose_layout(0, previous=Layout.FIXED) is Layout.EMPTY
    assert choose_layout(small, previous=Layout.CDC) is Layout.SINGLE
    assert choose_layout(pages, previous=None) is Layout.FIXED
    assert choose_layout(pages + 1, previous=None) is Layout.CDC
    assert choose_layout(pages + 1, previous=Layout.FIXED) is Layout.FIXED
    assert choose_layout(pages, previous=Layout.CDC) is Layout.CDC
    assert choose_layout(pages, previous=Layout.ZERO) is Layout.FIXED


def test_zeros_are_told_from_data() -> None:
    for size in (0, 1, 4096, FIXED_CHUNK_BYTES, 5 * FIXED_CHUNK_BYTES):
        assert is_zero(bytes(size))
        assert is_zero(memoryview(bytes(size)))
        for at in {0, size // 2, size - 1} if size else set():
            data = bytearray(size)
            data[at] = 1
            assert not is_zero(bytes(data))
