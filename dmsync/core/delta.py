"""Zstandard frames: alone, against a prefix, and as changed pages of the object they replace.

Decoding never trusts a frame: its stated size must be the expected one before a byte is decoded,
and the output buffer has exactly that size. A frame decoded against the wrong prefix gives wrong
bytes without an error, so whoever decodes compares the hash. Source: protocol/PACKS.md 2.
"""

import sys
from collections.abc import Sequence
from typing import Final

import zstandard

from dmsync.errors import BadObject

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

LEVEL: Final = 3
PATCH_LEVEL: Final = 6
"""Changed pages are few: a third smaller than at level 3 for a fifth more time
(protocol/decisions/0001-pack-format.md)."""
WINDOW_BYTES_MAX: Final = 16 * 1024 * 1024
"""More than the largest object (a page with 64 attributes) needs."""
PREFIX_BYTES_MIN: Final = 8
"""zstd refuses shorter raw dictionaries."""
PATCH_PAGE_BYTES: Final = 4096
"""The smallest unit databases rewrite in place; larger ones are runs of these."""
_PAGES_COMPARED_TOGETHER: Final = 8
"""Most chunks differ in a page or two: a comparison of equal pages one by one is mostly calls."""
_BLOCK_BYTES_MAX: Final = 128 * 1024
_SINGLE_SEGMENT: Final = b"\x28\xb5\x2f\xfd\xa0"
"""Magic number and a descriptor: content size in 4 bytes, which is also the window."""
_PLAIN_HEADERS: Final = ((b"\x28\xb5\x2f\xfd\x60", 2, 256), (_SINGLE_SEGMENT, 4, 0))
"""How frames begin that state their size in 2 or 4 bytes, and what is to be added to it."""


_idle_compressors: list[zstandard.ZstdCompressor] = []
"""Compressors that no thread is using; taking and giving back are atomic. Making one for each
frame costs as much as a frame of 4 KiB."""


def compress(data: bytes | memoryview) -> bytes:
    """A frame of `data` alone, stating its size."""
    try:
        compressor = _idle_compressors.pop()
    except IndexError:
        compressor = _new_compressor()
    frame = compressor.compress(data)
    _idle_compressors.append(compressor)
    return frame


def compress_all(parts: Sequence[bytes | memoryview]) -> list[bytes]:
    """A frame for each of `parts`, none empty; other threads run meanwhile."""
    if not parts:
        return []
    assert all(len(part) for part in parts), "zstandard's batches refuse or lose empty parts"
    collected = _new_compressor().multi_compress_to_buffer(list(parts))
    return [collected[position].tobytes() for position in range(len(parts))]


def _new_compressor() -> zstandard.ZstdCompressor:
    return zstandard.ZstdCompressor(level=LEVEL, write_content_size=True)


def compress_with_prefix(data: bytes | memoryview, prefix: bytes, level: int = LEVEL) -> bytes:
    """A frame of `data` that may copy from `prefix`; alone when the prefix is too short."""
    if len(prefix) < PREFIX_BYTES_MIN:
        return compress(data)
    dictionary = zstd.ZstdDict(prefix, is_raw=True)
    frame: bytes = zstd.compress(data, level, zstd_dict=dictionary.as_prefix)
    return frame


def decompress(frame: bytes, raw_bytes: int, prefix: bytes | bytearray | None = None) -> bytes:
    """Decode one frame to exactly `raw_bytes` bytes.

    Raises:
        BadObject: it states another size, needs a larger window or a dictionary, is cut short,
            has bytes behind it, or does not decode.
    """
    try:
        header = zstandard.get_frame_parameters(frame)
        if header.content_size != raw_bytes or header.window_size > WINDOW_BYTES_MAX:
            raise BadObject("frame of another size than its record states")
        if header.dict_id:
            raise BadObject("frame needs a dictionary")
        if prefix is None or len(prefix) < PREFIX_BYTES_MIN:
            data = _decompressed(frame)
        elif header.has_checksum:
            data = _decompressor_for(prefix).decompress(frame, allow_extra_data=False)
        else:
            extended = _extended_frame(prefix, frame, raw_bytes)
            data = _decompressed(extended)[len(prefix) :]
    except zstandard.ZstdError as exc:
        raise BadObject(f"frame does not decode: {exc}") from exc
    if len(data) != raw_bytes:
        raise BadObject("frame decodes to another size than it states")
    return data


_idle_decompressors: list[zstandard.ZstdDecompressor] = []


def _decompressed(frame: bytes) -> bytes:
    """By a decompressor that no thread is using: making one takes longer than most frames."""
    try:
        decompressor = _idle_decompressors.pop()
    except IndexError:
        decompressor = zstandard.ZstdDecompressor(max_window_size=WINDOW_BYTES_MAX)
    data = decompressor.decompress(frame, allow_extra_data=False)
    _idle_decompressors.append(decompressor)
    return data


def _decompressor_for(prefix: bytes | bytearray) -> zstandard.ZstdDecompressor:
    dictionary = zstandard.ZstdCompressionDict(
        bytes(prefix), dict_type=zstandard.DICT_TYPE_RAWCONTENT
    )
    return zstandard.ZstdDecompressor(dict_data=dictionary, max_window_size=WINDOW_BYTES_MAX)


def _extended_frame(prefix: bytes | bytearray, frame: bytes, raw_bytes: int) -> bytes:
    """The frame (no dictionary id, no checksum) of `prefix` and what `frame` holds together.

    A raw-content dictionary is content before the frame and nothing else: raw blocks of the prefix
    before the frame's own blocks decode to the same bytes. So one decompressor serves all
    prefixes, where the library wants a new one (20 us) for each. RFC 8878, 3.1.1.
    """
    size = len(prefix) + raw_bytes
    parts: list[bytes | bytearray] = [_SINGLE_SEGMENT, size.to_bytes(4, "little")]
    for start in range(0, len(prefix), _BLOCK_BYTES_MAX):
        block = prefix[start : start + _BLOCK_BYTES_MAX]
        parts.append((len(block) << 3).to_bytes(3, "little"))
        parts.append(block)
    parts.append(frame[zstandard.frame_header_size(frame) :])
    return b"".join(parts)


# --- changed pages ------------------------------------------------------------------------------


def changed_pages(
    old: bytes, new: bytes | memoryview, page_bytes: int = PATCH_PAGE_BYTES
) -> list[int]:
    """Numbers of the pages in which two equally long strings differ, ascending."""
    view = memoryview(new)
    group_bytes = _PAGES_COMPARED_TOGETHER * page_bytes
    return [
        start // page_bytes
        for group in range(0, len(view), group_bytes)
        # compares where they are: slices of bytes would be copies
        if not old.startswith(view[group : group + group_bytes], group)
        for start in range(group, min(group + group_bytes, len(view)), page_bytes)
        if not old.startswith(view[start : start + page_bytes], start)
    ]


def select_pages(data: bytes | memoryview, pages: Sequence[int]) -> bytes:
    """The named pages of `data`, joined."""
    size = PATCH_PAGE_BYTES
    view = memoryview(data)
    return b"".join([view[page * size : (page + 1) * size] for page in pages])


def replace_pages(old: bytes, pages: Sequence[int], replacement: bytes) -> bytes:
    """`old` with the named pages (ascending) replaced by the parts of `replacement`, in order."""
    parts = []
    copied = taken = 0
    for page in pages:
        start = page * PATCH_PAGE_BYTES
        length = min(PATCH_PAGE_BYTES, len(old) - start)
        parts.append(old[copied:start])
        parts.append(replacement[taken : taken + length])
        copied, taken = start + length, taken + length
    parts.append(old[copied:])
    return b"".join(parts)


def decode_pages(frame: bytes, replaced: Sequence[bytes]) -> list[bytes]:
    """The pages that take the place of `replaced` (whole ones, but for the last), from a frame of
    them with these as prefix. Raises BadObject."""
    raw_bytes = sum(map(len, replaced))
    payload_at = _plain_header_bytes(frame, raw_bytes)
    if payload_at and PREFIX_BYTES_MIN <= raw_bytes <= _BLOCK_BYTES_MAX:
        header = _SINGLE_SEGMENT + (raw_bytes << 1 | raw_bytes << 35).to_bytes(7, "little")
        try:
            data = _decompressed(b"".join((header, *replaced, frame[payload_at:])))
        except zstandard.ZstdError as exc:
            raise BadObject(f"frame does not decode: {exc}") from exc
        if len(data) != 2 * raw_bytes:
            raise BadObject("frame decodes to another size than it states")
        start = raw_bytes
    else:
        data = decompress(frame, raw_bytes, b"".join(replaced))
        start = 0
    return [data[at : at + PATCH_PAGE_BYTES] for at in range(start, len(data), PATCH_PAGE_BYTES)]


def _plain_header_bytes(frame: bytes, raw_bytes: int) -> int:
    """How long the header of a frame is that states this size, which is also its window, and has
    no checksum and no dictionary; 0 for other frames. RFC 8878, 3.1.1.1."""
    for start, size_bytes, offset in _PLAIN_HEADERS:
        if frame.startswith(start):
            end = len(start) + size_bytes
            stated = int.from_bytes(frame[len(start) : end], "little") + offset
            return end if stated == raw_bytes else 0
    return 0
