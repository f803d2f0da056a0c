"""Verifying records of a peer many at a time: cutting frames into batches, decoding on threads.

What a record gives is named by its hash, so the quick way, which takes the first candidate for
every base, needs a witness that these were the right ones: the plan, which says what is to come.
What it does not vouch for goes the exact way, one by one.
"""

from collections.abc import Container, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from typing import Final, NamedTuple

from dmsync.core.ids import Kind, ObjectId, object_id, short_key
from dmsync.core.objects import commit_from_bytes, tag_from_bytes
from dmsync.core.pages import decode_page
from dmsync.core.records import Record, parse_record
from dmsync.errors import BadObject
from dmsync.storage.chain_reading import Decoded, Records, decode_arriving

BATCH_RAW_BYTES: Final = 8 * 1024 * 1024
"""Decoded bytes that a batch holds, and one object more."""
BATCH_RECORDS: Final = 256


class Arriving(NamedTuple):
    """A record and where its bytes are in the frame it came in."""

    record: Record
    start: int
    end: int


class Verified(NamedTuple):
    """What a record stands for. Its bytes make a sound object of its kind."""

    oid: ObjectId
    decoded: Decoded


def batches(joined: bytes) -> Iterator[list[Arriving]]:
    """The records of a frame in order, some of one kind at a time. Raises BadObject."""
    batch: list[Arriving] = []
    raw_bytes = offset = 0
    while offset < len(joined):
        record, end = parse_record(joined, offset)
        is_full = raw_bytes >= BATCH_RAW_BYTES or len(batch) >= BATCH_RECORDS
        if batch and (is_full or record.kind is not batch[0].record.kind):
            yield batch
            batch, raw_bytes = [], 0
        batch.append(Arriving(record, offset, end))
        raw_bytes += record.raw_bytes
        offset = end
    if batch:
        yield batch


def verify_quickly(
    reader: Records,
    records: Sequence[Record],
    known: Mapping[bytes, Decoded],
    expected: Container[bytes],
    pool: Executor,
) -> list[Verified | None]:
    """What each record stands for, None where the exact way has to tell.

    The records are of one kind; `known` are objects by short key that no pack has, `expected` the
    short keys of what the peer said would come.

    Raises:
        BadObject: one decodes to what is no object of its kind.
    """

    def finish(record: Record, decoded: Decoded | None) -> Verified | None:
        if decoded is None:
            return None
        oid = object_id(record.kind, decoded.data)
        if record.bases and short_key(oid) not in expected:
            return None
        check_object(record.kind, decoded.data)
        return Verified(oid, decoded)

    return decode_arriving(reader, records, known, finish, pool)


def check_object(kind: Kind, data: bytes) -> None:
    """Refuse bytes that are no valid object of their kind. Raises BadObject."""
    match kind:
        case Kind.CHUNK:
            if not data:
                raise BadObject("an empty chunk")
        case Kind.PAGE:
            # An array of three whose first element, the page's type, is one byte.
            page_type = data[1] if len(data) > 1 else 0
            decode_page(data, page_type)
        case Kind.COMMIT:
            commit_from_bytes(data)
        case Kind.TAG:
            tag_from_bytes(data)
