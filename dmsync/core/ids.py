"""Object ids: BLAKE3-256, separated by kind (protocol/OBJECTS.md 2)."""

from enum import IntEnum
from typing import Final, NewType

from blake3 import blake3

ObjectId = NewType("ObjectId", bytes)
"""32 bytes: the id of an object."""

DotId = NewType("DotId", bytes)
"""16 random bytes: one dot, the same on every cluster."""

ID_BYTES: Final = 32
DOT_ID_BYTES: Final = 16
KEY_BYTES: Final = 8


class Kind(IntEnum):
    """What an object is; part of its stored record and of its id's derivation."""

    CHUNK = 0
    PAGE = 1
    COMMIT = 2
    TAG = 3


_CONTEXTS: Final = {
    Kind.PAGE: "dmsync 2026-11-21 page v1",
    Kind.COMMIT: "dmsync 2026-11-21 commit v1",
    Kind.TAG: "dmsync 2026-11-21 tag v1",
}
CONTENT_CONTEXT: Final = "dmsync 2026-11-21 file content v1"
"""Of the identity of a file longer than one segment: a hash of its segments' joined hashes."""


def object_id(kind: Kind, data: bytes | memoryview) -> ObjectId:
    """Id of `data` as an object of `kind`: plain BLAKE3 for chunks, derived key for the others."""
    if kind is Kind.CHUNK:
        return ObjectId(blake3(data).digest())
    return ObjectId(blake3(data, derive_key_context=_CONTEXTS[kind]).digest())


def short_key(oid: ObjectId) -> bytes:
    """The first 8 bytes: how packs, the index and plans name an object (never trusted alone)."""
    return oid[:KEY_BYTES]
