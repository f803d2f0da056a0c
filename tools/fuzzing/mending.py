"""Correcting checksums and lengths of a changed input, so that what they guard is reached too."""

from blake3 import blake3

from dmsync.core.encoding import encode
from dmsync.core.ids import KEY_BYTES
from dmsync.storage.event_log import _HASH_BYTES as HASH_BYTES
from dmsync.storage.event_log import _RECORD_HEADER_BYTES as RECORD_HEADER_BYTES
from dmsync.storage.event_log import _SEGMENT_CHECK_BYTES as SEGMENT_CHECK_BYTES
from dmsync.storage.event_log import _SEGMENT_CONTEXT as SEGMENT_CONTEXT
from dmsync.storage.event_log import SEGMENT_HEADER_BYTES, chain, encode_record_prefix
from dmsync.storage.packs import _TRAILER as TRAILER
from dmsync.storage.packs import HEADER_BYTES
from dmsync.storage.stat_cache import _DIGEST_BYTES as DIGEST_BYTES
from dmsync.storage.stat_cache import MAGIC as CACHE_MAGIC
from dmsync.wire.bundle_header import BUNDLE_CONTEXT, BUNDLE_MAGIC
from dmsync.wire.frames import HEADER


def frame_lengths(data: bytes) -> bytes:
    """One frame of a known type whose length is what there is."""
    if len(data) < HEADER.size:
        return data
    return HEADER.pack(len(data) - HEADER.size, data[4] % 24, data[5] & 3) + data[HEADER.size :]


def message_value(data: bytes) -> bytes:
    """A payload in its canonical encoding."""
    import msgpack

    try:
        value = msgpack.unpackb(data[2:], use_list=False, strict_map_key=False)
        return data[:2] + encode(value)
    except Exception:
        return data


def frame_size(data: bytes) -> bytes:
    """The size that the zstd frame states."""
    import zstandard

    try:
        size = zstandard.get_frame_parameters(data[4:]).content_size
    except zstandard.ZstdError:
        return data
    return size.to_bytes(8, "big")[-3:] + data[3:]


def pack(data: bytes) -> bytes:
    """Sizes and hash of the footer, whose place is where the trailer says or the middle."""
    if len(data) < HEADER_BYTES + TRAILER.size:
        return data
    at, _, table, raw, count, _, *rest = TRAILER.unpack(data[-TRAILER.size :])
    end = len(data) - TRAILER.size
    at = at if HEADER_BYTES <= at <= end else HEADER_BYTES
    footer = data[at:end]
    count = min(count, len(footer) // KEY_BYTES)
    table = len(footer) - count * KEY_BYTES
    raw = min(raw, count * 5)
    digest = blake3(footer).digest()[:4]
    return data[:end] + TRAILER.pack(at, len(footer), table, raw, count, digest, *rest)


def segment(data: bytes) -> bytes:
    """The check of a segment's header, the prefix of each record, and the chain of hashes."""
    body = data[: SEGMENT_HEADER_BYTES - SEGMENT_CHECK_BYTES]
    check = blake3(body, derive_key_context=SEGMENT_CONTEXT).digest(SEGMENT_CHECK_BYTES)
    out, at, before = bytearray(body + check), SEGMENT_HEADER_BYTES, body[-HASH_BYTES:]
    while len(data) - at > RECORD_HEADER_BYTES:
        length = int.from_bytes(data[at : at + 4], "big")
        length = max(1, min(length, len(data) - at - RECORD_HEADER_BYTES))
        payload = data[at + RECORD_HEADER_BYTES :][:length]
        before = chain(before, payload)
        out += encode_record_prefix(1, len(out), length) + before + payload
        at += RECORD_HEADER_BYTES + length
    return bytes(out)


def stat_cache(data: bytes) -> bytes:
    """The digest of the body."""
    import xxhash

    start = len(CACHE_MAGIC) + DIGEST_BYTES
    magic = data[: len(CACHE_MAGIC)]
    return magic + xxhash.xxh3_64_digest(data[start:]) + data[start:]


def bundle(data: bytes) -> bytes:
    """The hash at the end; a header's length where it does not begin like a bundle."""
    body = data[:-32]
    if not data.startswith(BUNDLE_MAGIC):
        body = BUNDLE_MAGIC + len(data).to_bytes(4, "big") + data
    return body + blake3(body, derive_key_context=BUNDLE_CONTEXT).digest()
