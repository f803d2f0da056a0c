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
_PROBE_BYTES: Final = 4096


def compress(data: bytes) -> bytes:
    """A frame of `data` alone, stating its size."""
    frame: bytes = zstd.compress(data, LEVEL)
    return frame


def compress_all(parts: Sequence[bytes]) -> list[bytes]:
    """A frame for each of `parts`, none empty, on two threads; worth it from about 2 MiB."""
    assert all(parts), "zstandard's batches refuse or lose empty parts"
    compressor = zstandard.ZstdCompressor(level=LEVEL, write_content_size=True)
    collected = compressor.multi_compress_to_buffer(list(parts), threads=2)
    return [collected[position].tobytes() for position in range(len(parts))]


def compress_with_prefix(data: bytes, prefix: bytes, level: int = LEVEL) -> bytes:
    """A frame of `data` that may copy from `prefix`; alone when the prefix is too short."""
    if len(prefix) < PREFIX_BYTES_MIN:
        return compress(data)
    dictionary = zstd.ZstdDict(prefix, is_raw=True)
    frame: bytes = zstd.compress(data, level, zstd_dict=dictionary.as_prefix)
    return frame


def decompress(frame: bytes, raw_bytes: int, prefix: bytes | None = None) -> bytes:
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
        decompressor = zstandard.ZstdDecompressor(
            dict_data=_raw_dictionary(prefix), max_window_size=WINDOW_BYTES_MAX
        )
        data = decompressor.decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as exc:
        raise BadObject(f"frame does not decode: {exc}") from exc
    if len(data) != raw_bytes:
        raise BadObject("frame decodes to another size than it states")
    return data


def _raw_dictionary(prefix: bytes | None) -> zstandard.ZstdCompressionDict | None:
    if prefix is None or len(prefix) < PREFIX_BYTES_MIN:
        return None
    return zstandard.ZstdCompressionDict(prefix, dict_type=zstandard.DICT_TYPE_RAWCONTENT)


def looks_incompressible(data: bytes) -> bool:
    """A cheap guess from the first 4 KiB and 4 KiB in the middle."""
    if len(data) < 4 * _PROBE_BYTES:
        return False
    middle = len(data) // 2
    probe = data[:_PROBE_BYTES] + data[middle : middle + _PROBE_BYTES]
    return len(zstd.compress(probe, 1)) >= len(probe)


# --- changed pages ------------------------------------------------------------------------------


def changed_pages(old: bytes, new: bytes, page_bytes: int = PATCH_PAGE_BYTES) -> list[int]:
    """Numbers of the pages in which two equally long strings differ, ascending."""
    return [
        start // page_bytes
        for start in range(0, len(new), page_bytes)
        if new[start : start + page_bytes] != old[start : start + page_bytes]
    ]


def select_pages(data: bytes, pages: Sequence[int]) -> bytes:
    """The named pages of `data`, joined."""
    size = PATCH_PAGE_BYTES
    return b"".join([data[page * size : (page + 1) * size] for page in pages])


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
