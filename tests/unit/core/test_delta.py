"""Frames: round trips, and refusing everything that is not the one expected frame."""

import random
from contextlib import suppress

import pytest
import zstandard
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dmsync.core.delta import (
    changed_pages,
    compress,
    compress_all,
    compress_with_prefix,
    decode_pages,
    decompress,
    replace_pages,
    select_pages,
)
from dmsync.errors import BadObject

RANDOM = random.Random(3).randbytes(128 * 1024)
RAW_CONTENT = zstandard.DICT_TYPE_RAWCONTENT


@given(st.binary(max_size=5000), st.binary(max_size=3000))
def test_frames_round_trip_with_and_without_prefix(data: bytes, prefix: bytes) -> None:
    assert decompress(compress(data), len(data)) == data
    assert decompress(compress_with_prefix(data, prefix), len(data), prefix) == data
    assert decompress(compress_with_prefix(data, prefix, 6), len(data), prefix) == data


def test_a_frame_on_two_mebibytes_of_prefix_finds_the_end_of_it() -> None:
    prefix = random.Random(4).randbytes(2 * 1024 * 1024)
    frame = compress_with_prefix(prefix[-65536:], prefix)
    assert len(frame) < 1000
    assert decompress(frame, 65536, prefix) == prefix[-65536:]


def test_a_batch_gives_the_frames_in_order() -> None:
    parts = [RANDOM[: 1000 * n + 1] + bytes(n * 100) for n in range(40)]
    frames = compress_all(parts)
    assert [decompress(f, len(p)) for f, p in zip(frames, parts, strict=True)] == parts


@pytest.mark.parametrize("raw_bytes", [0, 999, 1001, 10**9])
def test_a_frame_of_another_size_than_stated_is_refused(raw_bytes: int) -> None:
    with pytest.raises(BadObject):
        decompress(compress(bytes(1000)), raw_bytes)


def test_a_bomb_is_refused_without_being_decoded() -> None:
    bomb = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(50_000_000))
    with pytest.raises(BadObject):
        decompress(bomb, 1000)


def test_a_frame_that_lies_about_its_size_is_refused() -> None:
    honest = compress(bytes(200_000))
    header = zstandard.get_frame_parameters(honest)
    assert header.content_size == 200_000
    size_at = honest.index((200_000).to_bytes(4, "little"))
    lying = honest[:size_at] + (1000).to_bytes(4, "little") + honest[size_at + 4 :]
    assert zstandard.get_frame_parameters(lying).content_size == 1000
    with pytest.raises(BadObject):
        decompress(lying, 1000)


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"no frame at all",
        compress(RANDOM[:5000])[:-1],
        compress(RANDOM[:5000]) + b"x",
        compress(RANDOM[:5000]) * 2,
        bytes.fromhex("502a4d1804000000") + b"skip",
    ],
)
def test_what_is_not_exactly_one_frame_is_refused(frame: bytes) -> None:
    with pytest.raises(BadObject):
        decompress(frame, 5000)


def test_a_window_beyond_the_bound_is_refused() -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=27, compression_level=3)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj(
        size=40_000_000
    )
    frame = compressor.compress(bytes(40_000_000)) + compressor.flush()
    assert zstandard.get_frame_parameters(frame).window_size > 16 * 1024 * 1024
    with pytest.raises(BadObject):
        decompress(frame, 40_000_000)


@settings(max_examples=300)
@given(st.binary(max_size=200), st.integers(0, 10_000))
def test_hostile_frames_raise_bad_object_only(tail: bytes, raw_bytes: int) -> None:
    for frame in (tail, b"\x28\xb5\x2f\xfd" + tail):
        try:
            assert len(decompress(frame, raw_bytes)) == raw_bytes
        except BadObject:
            pass


@given(st.lists(st.integers(0, 9), unique=True).map(sorted), st.integers(0, 4096))
def test_replacing_the_changed_pages_gives_the_new_bytes(pages: list[int], last: int) -> None:
    old = RANDOM[: 9 * 4096 + last]
    pages = [page for page in pages if page * 4096 < len(old)]
    new = bytearray(old)
    for page in pages:
        new[page * 4096] ^= 1
    assert changed_pages(old, bytes(new)) == pages
    assert replace_pages(old, pages, select_pages(bytes(new), pages)) == new


# --- prefixes as blocks before the frame ----------------------------------------------------------


def _with_dictionary(frame: bytes, prefix: bytes) -> bytes:
    dictionary = zstandard.ZstdCompressionDict(prefix, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    return zstandard.ZstdDecompressor(dict_data=dictionary).decompress(frame)


@pytest.mark.parametrize("prefix_bytes", [8, 4096, 131_071, 131_072, 131_073, 300_000])
@pytest.mark.parametrize("data_bytes", [0, 1, 255, 256, 65_791, 65_792, 131_072, 400_000])
@pytest.mark.parametrize("level", [1, 3, 6, 19])
def test_a_prefix_decodes_as_the_librarys_dictionary(
    prefix_bytes: int, data_bytes: int, level: int
) -> None:
    source = random.Random(prefix_bytes * data_bytes)
    prefix = source.randbytes(prefix_bytes // 2) + bytes(prefix_bytes - prefix_bytes // 2)
    data = (prefix[100:9000] + source.randbytes(50) + b"text " * 99) * (data_bytes // 500 + 1)
    data = data[:data_bytes]
    for frame in (
        compress_with_prefix(data, prefix, level),
        zstandard.ZstdCompressor(
            level=level,
            dict_data=zstandard.ZstdCompressionDict(
                prefix, dict_type=zstandard.DICT_TYPE_RAWCONTENT
            ),
            write_checksum=level == 6,
        ).compress(data),
    ):
        assert decompress(frame, len(data), prefix) == _with_dictionary(frame, prefix) == data
        assert decompress(frame, len(data), bytearray(prefix)) == data


def test_a_checksum_is_still_checked_with_a_prefix() -> None:
    dictionary = zstandard.ZstdCompressionDict(RANDOM, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    compressor = zstandard.ZstdCompressor(dict_data=dictionary, write_checksum=True)
    frame = compressor.compress(RANDOM[500:2500])
    with pytest.raises(BadObject):
        decompress(frame[:-1] + bytes((frame[-1] ^ 1,)), 2000, RANDOM)


@given(
    st.integers(1, (1 << 32) - 1),
    st.integers(1, 131_072),
    st.sampled_from([-5, 3, 6]),
    st.booleans(),
)
def test_pages_decoded_are_what_replaced_them(
    changed: int, size: int, level: int, checksum: bool
) -> None:
    pages = [page for page in range(32) if changed >> page & 1 and page * 4096 < size]
    assume(pages)
    old, new = RANDOM[:size], RANDOM[::-1][:size]
    replaced, replacement = select_pages(old, pages), select_pages(new, pages)
    if checksum and len(replaced) >= 8:
        dictionary = zstandard.ZstdCompressionDict(replaced, dict_type=RAW_CONTENT)
        compressor = zstandard.ZstdCompressor(level, dict_data=dictionary, write_checksum=True)
        frame = compressor.compress(replacement)
    else:
        frame = compress_with_prefix(replacement, replaced, level)
    parts = [old[page * 4096 : page * 4096 + 4096] for page in pages]
    decoded = decode_pages(frame, parts)
    assert b"".join(decoded) == replacement
    assert [len(page) for page in decoded] == [len(part) for part in parts]


def test_pages_are_not_decoded_from_what_is_no_frame_of_them() -> None:
    old, new = RANDOM[:8192], RANDOM[8192:16384]
    frame = compress_with_prefix(new, old)
    parts = [old[:4096], old[4096:]]
    for wrong in (
        b"",
        b"\x28\xb5\x2f\xfd\x60",
        frame[:-1],
        frame + b"more",
        compress_with_prefix(new[:-1], old),
        bytes(100),
    ):
        with pytest.raises(BadObject):
            decode_pages(wrong, parts)
    for at in range(5, 9):
        flipped = bytearray(frame)
        flipped[at] ^= 1
        with suppress(BadObject):
            assert len(b"".join(decode_pages(bytes(flipped), parts))) == 8192
