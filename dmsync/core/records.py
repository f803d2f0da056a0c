"""Records: the stored form of one object, which is also its form on the wire.

A record carries no id: whoever reads it hashes what it decodes to. Bases are named by short keys
and must be objects of the same kind and dot. Source: protocol/PACKS.md 1.
"""

from collections.abc import Sequence
from enum import IntEnum
from typing import Final

from dmsync.core.chunking import FIXED_CHUNK_BYTES
from dmsync.core.delta import (
    PATCH_PAGE_BYTES,
    decompress,
    replace_pages,
    select_pages,
)
from dmsync.core.ids import KEY_BYTES, Kind
from dmsync.core.pages import CHUNK_BYTES_MAX, PAGE_BYTES_MAX, XATTR_SLACK_BYTES
from dmsync.core.values import value_type
from dmsync.errors import BadObject

SIMILAR_PAGE_BYTES: Final = 8192
SIMILAR_PAGES_MAX: Final = 64
STEPS_MAX: Final = 256
"""Frames that reading one object may take when nothing is cached (protocol/PACKS.md 3)."""
HEADER_BYTES_MAX: Final = 1024
"""No header is longer: 64 bases of 9 or 10 bytes are the most."""

RAW_BYTES_MAX: Final = {
    Kind.CHUNK: CHUNK_BYTES_MAX,
    Kind.PAGE: PAGE_BYTES_MAX + XATTR_SLACK_BYTES,
    Kind.COMMIT: 8 * 1024 * 1024,
    Kind.TAG: 2 * 1024 * 1024,
}


class Encoding(IntEnum):
    """How a record's payload gives the object's bytes."""

    RAW = 0
    """The bytes themselves."""
    ZSTD = 1
    """One frame."""
    PREFIX = 2
    """One frame with the whole base as prefix."""
    PATCH = 3
    """One frame of the changed 4 KiB pages, with the pages they replace as prefix; the other
    pages are the base's, which has the same length."""
    SIMILAR = 4
    """One frame with 8 KiB pages of up to 64 bases as prefix."""


_KINDS: Final = tuple(Kind)
_ENCODINGS: Final = tuple(Encoding)
"""By number: looking an enum up costs more than the rest of a header."""
_ALIGNED_PAGES: Final = FIXED_CHUNK_BYTES // PATCH_PAGE_BYTES
"""Of the chunks of files that are rewritten in place."""


@value_type
class BaseSlice:
    """A base, by short key; for SIMILAR the number of the 8 KiB page of it that is used."""

    key: bytes
    page: int = 0


@value_type
class Record:
    """One stored object. `changed` (PATCH only) has bit n set when 4 KiB page n is in the frame."""

    kind: Kind
    encoding: Encoding
    raw_bytes: int
    payload: bytes
    bases: tuple[BaseSlice, ...] = ()
    changed: int = 0


# --- bytes ----------------------------------------------------------------------------------------


def encode_varint(value: int) -> bytes:
    """Little-endian groups of 7 bits, high bit set on all but the last."""
    if value < 0x80:
        return bytes((value,))
    if value < 0x4000:
        return bytes((value & 0x7F | 0x80, value >> 7))
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def parse_varint(buffer: bytes | memoryview, offset: int, bits_max: int) -> tuple[int, int]:
    """A number below 2**bits_max in its shortest form, and where it ends. Raises BadObject."""
    if offset < len(buffer) and buffer[offset] < 0x80 and bits_max >= 7:
        return buffer[offset], offset + 1  # mostly
    value = shift = 0
    while offset < len(buffer):
        byte = buffer[offset]
        offset += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >> bits_max or (byte == 0 and shift > 0):
                raise BadObject("number out of range or not in its shortest form")
            return value, offset
        shift += 7
        if shift >= bits_max:
            raise BadObject("number out of range")
    raise BadObject("record is cut short")


_ALIGNED_PATCH: Final = bytes((Kind.CHUNK | Encoding.PATCH << 4,)) + encode_varint(
    FIXED_CHUNK_BYTES
)
"""How the records of their patches begin."""


def encode_record(record: Record) -> bytes:
    """Header and payload."""
    parts = [
        bytes((record.kind | record.encoding << 4,)),
        encode_varint(record.raw_bytes),
        encode_varint(len(record.payload)),
    ]
    match record.encoding:
        case Encoding.RAW | Encoding.ZSTD:
            pass
        case Encoding.PREFIX:
            parts.append(record.bases[0].key)
        case Encoding.PATCH:
            parts.append(record.bases[0].key)
            parts.append(encode_varint(record.changed))
        case Encoding.SIMILAR:
            parts.append(bytes((len(record.bases),)))
            for base in record.bases:
                parts.append(base.key + encode_varint(base.page))
    parts.append(record.payload)
    return b"".join(parts)


def parse_record(buffer: bytes | memoryview, offset: int = 0) -> tuple[Record, int]:
    """The record at `offset`, checked field by field, and where it ends. Raises BadObject."""
    found = _parse_aligned_patch(buffer, offset)
    if found is not None:
        return found
    kind, encoding, raw_bytes, payload_bytes, bases, changed, start = _parse_fields(buffer, offset)
    end = start + payload_bytes
    if end > len(buffer):
        raise BadObject("record is cut short")
    payload = bytes(buffer[start:end])
    return Record(kind, encoding, raw_bytes, payload, bases, changed), end


def parse_header(buffer: bytes | memoryview, offset: int = 0) -> tuple[Record, int, int]:
    """A record without its payload, where the payload starts and its length. Raises BadObject."""
    kind, encoding, raw_bytes, payload_bytes, bases, changed, start = _parse_fields(buffer, offset)
    return Record(kind, encoding, raw_bytes, b"", bases, changed), start, payload_bytes


def _parse_aligned_patch(buffer: bytes | memoryview, offset: int) -> tuple[Record, int] | None:
    """What `parse_record` gives for a patch of a chunk of the usual size, most of what chains
    consist of, in a third of the time; None for all else, also for what is cut short."""
    if buffer[offset : offset + 4] != _ALIGNED_PATCH:
        return None
    try:
        payload_bytes = buffer[offset + 4]
        start = offset + 5
        if payload_bytes >= 0x80:
            payload_bytes += (buffer[start] << 7) - 0x80
            start += 1
            if not 0x80 <= payload_bytes < 0x4000:
                return None
        key = bytes(buffer[start : start + KEY_BYTES])
        start += KEY_BYTES
        changed = shift = 0
        while (byte := buffer[start]) >= 0x80:
            changed |= (byte & 0x7F) << shift
            shift += 7
            start += 1
            if shift > _ALIGNED_PAGES:
                return None
    except IndexError:
        return None
    changed |= byte << shift
    start += 1
    end = start + payload_bytes
    if not byte or changed >> _ALIGNED_PAGES or end > len(buffer):
        return None
    payload = bytes(buffer[start:end])
    bases = (BaseSlice(key),)
    return Record(Kind.CHUNK, Encoding.PATCH, FIXED_CHUNK_BYTES, payload, bases, changed), end


def _parse_fields(
    buffer: bytes | memoryview, offset: int
) -> tuple[Kind, Encoding, int, int, tuple[BaseSlice, ...], int, int]:
    """Kind, encoding, size, payload size, bases, bitmap, and where the payload starts."""
    if offset >= len(buffer):
        raise BadObject("record is cut short")
    first = buffer[offset]
    if first & 15 >= len(_KINDS) or first >> 4 >= len(_ENCODINGS):
        raise BadObject("record of an unknown kind or encoding")
    kind, encoding = _KINDS[first & 15], _ENCODINGS[first >> 4]
    raw_bytes, offset = parse_varint(buffer, offset + 1, 32)
    payload_bytes, offset = parse_varint(buffer, offset, 32)
    if raw_bytes > RAW_BYTES_MAX[kind] or payload_bytes > raw_bytes + 64:
        raise BadObject("record larger than its kind may be", kind=kind.name, raw_bytes=raw_bytes)
    if encoding is Encoding.RAW and payload_bytes != raw_bytes:
        raise BadObject("raw record of another size than it states")
    if encoding > Encoding.ZSTD and kind not in (Kind.CHUNK, Kind.PAGE):
        raise BadObject("only chunks and pages have bases")
    bases: tuple[BaseSlice, ...] = ()
    changed = 0
    if encoding is Encoding.PATCH:
        key, offset = _parse_key(buffer, offset)
        bases = (BaseSlice(key),)
        page_count = -(-raw_bytes // PATCH_PAGE_BYTES)
        changed, offset = parse_varint(buffer, offset, page_count)
        if not changed:
            raise BadObject("a patch changes something")
    elif encoding is Encoding.PREFIX:
        key, offset = _parse_key(buffer, offset)
        bases = (BaseSlice(key),)
    elif encoding is Encoding.SIMILAR:
        bases, offset = _parse_slices(buffer, offset)
    return kind, encoding, raw_bytes, payload_bytes, bases, changed, offset


def _parse_key(buffer: bytes | memoryview, offset: int) -> tuple[bytes, int]:
    key = bytes(buffer[offset : offset + KEY_BYTES])
    if len(key) != KEY_BYTES:
        raise BadObject("record is cut short")
    return key, offset + KEY_BYTES


def _parse_slices(buffer: bytes | memoryview, offset: int) -> tuple[tuple[BaseSlice, ...], int]:
    count = buffer[offset] if offset < len(buffer) else 0
    if not 0 < count <= SIMILAR_PAGES_MAX:
        raise BadObject("a record has 1 to 64 similar pages")
    offset += 1
    slices = []
    for _ in range(count):
        key, offset = _parse_key(buffer, offset)
        page, offset = parse_varint(buffer, offset, 11)
        slices.append(BaseSlice(key, page))
    return tuple(slices), offset


# --- decoding ----------------------------------------------------------------------


def patched_pages(changed: int) -> list[int]:
    """Page numbers of a PATCH bitmap, ascending."""
    pages = []
    while changed:
        lowest = changed & -changed
        pages.append(lowest.bit_length() - 1)
        changed ^= lowest
    return pages


def pages_bitmap(pages: Sequence[int]) -> int:
    bitmap = 0
    for page in pages:
        bitmap |= 1 << page
    return bitmap


def similar_page(data: bytes, page: int) -> bytes:
    """Page `page` of 8 KiB. Raises BadObject when `data` ends before it."""
    part = data[page * SIMILAR_PAGE_BYTES : (page + 1) * SIMILAR_PAGE_BYTES]
    if not part:
        raise BadObject("base has no such page")
    return part


def decode_record(record: Record, bases: Sequence[bytes]) -> bytes:
    """The object's bytes, not yet hashed; `bases` are the whole bases in the record's order.

    Raises:
        BadObject: sizes do not fit or the frame does not decode.
    """
    match record.encoding:
        case Encoding.RAW:
            return record.payload
        case Encoding.ZSTD:
            return decompress(record.payload, record.raw_bytes)
        case Encoding.PREFIX:
            return decompress(record.payload, record.raw_bytes, bases[0])
        case Encoding.PATCH:
            return _decode_patch(record, bases[0])
        case Encoding.SIMILAR:
            parts = [
                similar_page(data, base.page)
                for base, data in zip(record.bases, bases, strict=True)
            ]
            return decompress(record.payload, record.raw_bytes, b"".join(parts))


def _decode_patch(record: Record, base: bytes) -> bytes:
    if len(base) != record.raw_bytes:
        raise BadObject("a patch and its base have the same length")
    pages = patched_pages(record.changed)
    replaced = select_pages(base, pages)
    return replace_pages(base, pages, decompress(record.payload, len(replaced), replaced))
