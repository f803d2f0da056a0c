"""Records: round trips, golden bytes, and bounded refusal of everything else."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dmsync.core.delta import compress, compress_with_prefix
from dmsync.core.ids import Kind, object_id
from dmsync.core.records import (
    HEADER_BYTES_MAX,
    BaseSlice,
    Encoding,
    Record,
    decode_record,
    encode_record,
    encode_varint,
    pages_bitmap,
    parse_header,
    parse_record,
    patched_pages,
)
from dmsync.errors import BadObject

VECTORS = Path(__file__).parents[3] / "protocol" / "vectors" / "records"
KEY = bytes(range(8))
keys = st.binary(min_size=8, max_size=8)


@st.composite
def valid_records(draw: st.DrawFn) -> Record:
    encoding = draw(st.sampled_from(Encoding))
    kind = draw(st.sampled_from(list(Kind)[: 2 if encoding > Encoding.ZSTD else 4]))
    payload = draw(st.binary(min_size=1, max_size=300))
    raw_bytes = len(payload) if encoding is Encoding.RAW else draw(st.integers(400, 500_000))
    bases: tuple[BaseSlice, ...] = ()
    changed = 0
    if encoding in (Encoding.PREFIX, Encoding.PATCH):
        bases = (BaseSlice(draw(keys)),)
    if encoding is Encoding.PATCH:
        changed = draw(st.integers(1, 2 ** (-(-raw_bytes // 4096)) - 1))
    if encoding is Encoding.SIMILAR:
        slices = st.builds(BaseSlice, keys, st.integers(0, 2000))
        bases = tuple(draw(st.lists(slices, min_size=1, max_size=64)))
    return Record(kind, encoding, raw_bytes, payload, bases, changed)


@given(st.lists(valid_records(), min_size=1, max_size=4))
def test_joined_records_round_trip(records: list[Record]) -> None:
    joined = b"".join(map(encode_record, records))
    for buffer in (joined, memoryview(joined)):
        end = 0
        for record in records:
            found, end = parse_record(buffer, end)
            assert found == record
        assert end == len(joined)


@given(valid_records())
def test_every_cut_of_a_record_is_refused(record: Record) -> None:
    encoded = encode_record(record)
    for end in {*range(min(40, len(encoded))), len(encoded) // 2, len(encoded) - 1}:
        with pytest.raises(BadObject):
            parse_record(encoded[:end])


@settings(max_examples=500)
@given(st.binary(max_size=120))
@example(b"\x30\x80\x20\x05" + KEY)
def test_hostile_bytes_raise_bad_object_or_are_canonical(data: bytes) -> None:
    try:
        record, end = parse_record(data)
    except BadObject:
        return
    assert encode_record(record) == data[:end]
    try:
        decode_record(record, [b"base bytes"] * len(record.bases))
    except BadObject:
        pass


@settings(max_examples=300)
@given(valid_records(), st.integers(0, 10_000), st.integers(1, 255))
def test_a_changed_byte_is_refused_or_gives_another_canonical_record(
    record: Record, at: int, mask: int
) -> None:
    encoded = bytearray(encode_record(record))
    encoded[at % len(encoded)] ^= mask
    try:
        found, end = parse_record(bytes(encoded))
    except BadObject:
        return
    assert encode_record(found) == encoded[:end]


@pytest.mark.parametrize(
    ("why", "data"),
    [
        ("unknown kind", b"\x04\x00\x00"),
        ("unknown encoding", b"\x50\x00\x00"),
        ("raw sizes differ", b"\x00\x05\x04abcd"),
        ("chunk over 1 MiB", b"\x10\x81\x80\x40\x01x"),
        ("payload over its object", b"\x10\x01\xff\x01" + bytes(255)),
        ("number not shortest", b"\x00\x81\x00\x01x"),
        ("number too long", b"\x00\xff\xff\xff\xff\xff\xff\x01"),
        ("commit with a base", b"\x22\x10\x01" + KEY + b"x"),
        ("patch of nothing", b"\x30\x80\x20\x01" + KEY + b"\x00x"),
        ("patch beyond its object", b"\x30\x80\x20\x01" + KEY + b"\x02x"),
        ("no similar page", b"\x40\x10\x01\x00x"),
        ("too many similar pages", b"\x40\x10\x01\x41" + (KEY + b"\x00") * 65 + b"x"),
    ],
)
def test_out_of_bounds_is_refused(why: str, data: bytes) -> None:
    with pytest.raises(BadObject):
        parse_record(data)


def test_the_largest_header_fits_its_bound() -> None:
    slices = tuple(BaseSlice(KEY, 2047) for _ in range(64))
    record = Record(Kind.CHUNK, Encoding.SIMILAR, 1 << 20, b"", slices)
    assert parse_header(encode_record(record))[1] <= HEADER_BYTES_MAX


def test_each_encoding_decodes_to_the_object() -> None:
    source = random.Random(1)
    old = source.randbytes(20_000)
    new = bytearray(old)
    new[5000:5010] = new[19_990:] = source.randbytes(10)
    data = bytes(new)
    bitmap = pages_bitmap([1, 4])
    patched = data[4096:8192] + data[16384:]
    replaced = old[4096:8192] + old[16384:]
    whole, pages = (BaseSlice(KEY),), (BaseSlice(KEY, 1), BaseSlice(KEY, 0), BaseSlice(KEY, 2))
    similar = old[8192:16384] + old[:8192] + old[16384:]
    size = len(data)
    for record, bases in [
        (Record(Kind.CHUNK, Encoding.RAW, size, data), []),
        (Record(Kind.CHUNK, Encoding.ZSTD, size, compress(data)), []),
        (Record(Kind.CHUNK, Encoding.PREFIX, size, compress_with_prefix(data, old), whole), [old]),
        (
            Record(
                Kind.CHUNK,
                Encoding.PATCH,
                size,
                compress_with_prefix(patched, replaced),
                whole,
                bitmap,
            ),
            [old],
        ),
        (
            Record(Kind.CHUNK, Encoding.SIMILAR, size, compress_with_prefix(data, similar), pages),
            [old] * 3,
        ),
    ]:
        again, _ = parse_record(encode_record(record))
        assert decode_record(again, bases) == data


def test_a_patch_on_a_base_of_another_length_is_refused() -> None:
    record = Record(Kind.CHUNK, Encoding.PATCH, 8192, compress(bytes(4096)), (BaseSlice(KEY),), 1)
    with pytest.raises(BadObject):
        decode_record(record, [bytes(8191)])


def test_a_similar_page_behind_its_base_is_refused() -> None:
    record = Record(Kind.CHUNK, Encoding.SIMILAR, 100, compress(bytes(100)), (BaseSlice(KEY, 1),))
    with pytest.raises(BadObject):
        decode_record(record, [bytes(8192)])


@given(st.lists(st.integers(0, 255), unique=True).map(sorted))
def test_bitmaps_round_trip(pages: list[int]) -> None:
    assert patched_pages(pages_bitmap(pages)) == pages


@pytest.mark.parametrize("path", sorted(VECTORS.glob("*.json")), ids=lambda p: p.stem)
def test_golden_vector(path: Path) -> None:
    vector = json.loads(path.read_text())
    encoded = bytes.fromhex(vector["record"])
    if vector["expect"] == "bad-object":
        with pytest.raises(BadObject):
            record, _ = parse_record(encoded)
            decode_record(record, [bytes.fromhex(base) for base in vector["bases"]])
        return
    record, end = parse_record(encoded)
    assert end == len(encoded)
    assert encode_record(record) == encoded
    assert (record.kind.name, record.encoding.name) == (vector["kind"], vector["encoding"])
    data = decode_record(record, [bytes.fromhex(base) for base in vector["bases"]])
    assert object_id(record.kind, data).hex() == vector["id"]


def test_there_is_a_golden_vector_for_every_encoding() -> None:
    vectors = [json.loads(path.read_text()) for path in VECTORS.glob("*.json")]
    assert {v["encoding"] for v in vectors if v["expect"] == "object"} == {e.name for e in Encoding}


def outcome_of(parse: Callable[[bytes, int], object], buffer: bytes) -> object:
    try:
        return parse(buffer, 3)
    except BadObject as exc:
        return exc.message


def parsed_by_header(buffer: bytes, offset: int) -> tuple[Record, int]:
    header, start, payload_bytes = parse_header(buffer, offset)
    if start + payload_bytes > len(buffer):
        raise BadObject("record is cut short")
    payload = buffer[start : start + payload_bytes]
    fields = (header.kind, header.encoding, header.raw_bytes, payload)
    return Record(*fields, header.bases, header.changed), start + payload_bytes


@given(
    st.one_of(st.integers(0, 300), st.sampled_from([0x3FFF, 0x4000, 0x20040, 0x20041])),
    keys,
    st.integers(0, (1 << 36) - 1),
    st.integers(0, 400),
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 255)), max_size=2),
)
def test_patches_of_aligned_chunks_are_parsed_as_others(
    payload_bytes: int, key: bytes, changed: int, there: int, damage: list[tuple[int, int]]
) -> None:
    start = b"\x30" + encode_varint(128 * 1024) + encode_varint(payload_bytes)
    record = bytearray(b"...") + start + key + encode_varint(changed) + bytes(there)
    for at, byte in damage:
        if at + 3 < len(record):
            record[at + 3] = byte
    for length in {len(record), len(record) - there, len(record) // 2}:
        buffer = bytes(record[:length])
        assert outcome_of(parse_record, buffer) == outcome_of(parsed_by_header, buffer)


def test_a_bitmap_that_does_not_end_is_refused() -> None:
    for end in (b"", b"\x01", b"\x80" * 100_000):
        with pytest.raises(BadObject):
            parse_record(b"\x30\x80\x80\x08\x05" + KEY + b"\x80" * 5 + end)
