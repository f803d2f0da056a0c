"""Other forms for records that stay when their bases go (decisions/0011).

A chunk that was rewritten again and again is a family: every version of it is a delta of an
earlier one. Of a family whose earlier versions go, one that stays is stored alone, and the others
on it; where an ancestor stays, they are stored on that. A page that a record was compressed with
is taken from a relative too: most of it is the same.

Nothing goes round in circles: a new base is an ancestor by the old bases, or is stored alone.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dmsync.core.delta import compress, compress_with_prefix
from dmsync.core.ids import Kind, ObjectId, object_id, short_key
from dmsync.core.records import (
    BaseSlice,
    Encoding,
    Record,
    decode_record,
    encode_record,
    parse_record,
    similar_page,
)
from dmsync.errors import BadObject, Corruption
from dmsync.storage.chain_reading import Decoded
from dmsync.storage.chunk_forms import NewChunk, delta_form, plain_record
from dmsync.storage.pack_sweeping import Edge, IsLive, NewPacks, SweepPlan, place_of

if TYPE_CHECKING:
    from dmsync.storage.object_store import ObjectStore

_LINEAR = (Encoding.PATCH, Encoding.PREFIX)
_NAME_BYTES = 10
"""What naming a similar page takes."""


class Reencoding:
    """Gives every live record of the rewritten packs that would lose a base another form."""

    def __init__(
        self, objects: "ObjectStore", plan: SweepPlan, is_live: IsLive, packs: NewPacks
    ) -> None:
        self._objects = objects
        self._plan = plan
        self._is_live = is_live
        self._packs = packs
        self._ends: dict[bytes, tuple[bytes, bool]] = {}
        """Dead base: where its chain ends, and is that something that stays?"""
        self._alone: dict[bytes, bytes] = {}
        """The dead frame that a family begins with: its member that is stored alone now."""

    def run(self) -> set[bytes]:
        """Returns the keys of what was written anew. Raises Corruption, StorageFull."""
        renewed: set[bytes] = set()
        for number in sorted(self._plan.rewritten):
            for edge in self._plan.survey.edges.get(number, ()):
                lost = [base for base in edge.bases if self._plan.is_going(base)]
                if not lost or edge.key in renewed or not self._is_live(edge.key):
                    continue
                if not self._plan.stays(edge.key, edge.entry):
                    continue  # another record of it is kept, one that stands alone
                if edge.key in self._plan.survey.repeated:
                    # its new base may be based on it, by way of another of its records
                    self._plan.keep(lost)
                    continue
                found = self._renewed(edge)
                if found is None or self._is_dearer(found[0], edge, lost):
                    self._plan.keep(lost)
                    continue
                record, family = found
                if family is not None:
                    self._alone[family] = edge.key
                self._packs.append_joined(record, [len(record)], [edge.key])
                renewed.add(edge.key)
        return renewed

    def _is_dearer(self, record: bytes, edge: Edge, lost: list[bytes]) -> bool:
        return len(record) - edge.entry.length > self._plan.keeping_bytes(lost)

    def _renewed(self, edge: Edge) -> tuple[bytes, bytes | None] | None:
        """The record's new bytes, and the family that it is to stand for; None: it cannot be read
        in the usual way, and keeps its bases."""
        place = place_of(self._plan.survey, edge.entry)
        try:
            old = self._objects.sealed.load(place)
            decoded = self._objects.decode_at(place, old)
            oid = object_id(old.kind, decoded.data)
            if short_key(oid) != edge.key:
                return None
            if old.encoding in _LINEAR:
                return self._on_relative(oid, old, decoded)
            return self._on_similar(oid, old, decoded), None
        except Corruption:
            return None

    def _on_relative(
        self, oid: ObjectId, old: Record, decoded: Decoded
    ) -> tuple[bytes, bytes | None]:
        end, stays = self._end_of(old.bases[0].key)
        base = end if stays else self._alone.get(end)
        frame = None
        if base is not None:
            relative = self._objects.content_of_key(old.kind, base)
            base_id = object_id(old.kind, relative.data)
            new = NewChunk(oid, decoded.data, base_id)
            form, frame = delta_form(old.kind, new, relative)
            if form is not None:
                return self._checked(form.encoded, (relative.data,), decoded.data), None
        record = plain_record(
            old.kind, decoded.data, compress(decoded.data) if frame is None else frame
        )
        family = end if base is None and not stays else None
        return self._checked(encode_record(record), (), decoded.data), family

    def _on_similar(self, oid: ObjectId, old: Record, decoded: Decoded) -> bytes:
        slices: list[BaseSlice] = []
        contents: list[bytes] = []
        for base in old.bases:
            key: bytes | None = base.key
            if self._plan.is_going(base.key):
                end, stays = self._end_of(base.key)
                key = end if stays else self._alone.get(end)
            if key is None or key == short_key(oid):
                continue
            data = self._objects.content_of_key(old.kind, key).data
            try:
                similar_page(data, base.page)
            except BadObject:
                continue
            slices.append(BaseSlice(key, base.page))
            contents.append(data)
        alone = plain_record(old.kind, decoded.data, compress(decoded.data))
        if slices:
            pages = [similar_page(d, s.page) for d, s in zip(contents, slices, strict=True)]
            frame = compress_with_prefix(decoded.data, b"".join(pages))
            if len(frame) + _NAME_BYTES * len(slices) < len(alone.payload):
                similar = Record(
                    old.kind, Encoding.SIMILAR, len(decoded.data), frame, tuple(slices)
                )
                return self._checked(encode_record(similar), contents, decoded.data)
        return self._checked(encode_record(alone), (), decoded.data)

    @staticmethod
    def _checked(encoded: bytes, bases: Sequence[bytes], data: bytes) -> bytes:
        """What is about to take another record's place gives the same bytes."""
        record, _ = parse_record(encoded)
        if decode_record(record, bases) != data:
            raise Corruption("a record stored anew does not give its object")
        return encoded

    def _end_of(self, key: bytes) -> tuple[bytes, bool]:
        """Where the chain below a base that goes ends: at something that stays, or at the frame
        that it begins with, or at what there are several records of: by another one of those the
        chain may have come from elsewhere, and what is below this one be based on what is above."""
        passed: list[bytes] = []
        end: tuple[bytes, bool]
        while True:
            known = self._ends.get(key)
            if known is not None:
                end = known
                break
            if not self._plan.is_going(key):
                end = (key, True)
                break
            passed.append(key)
            entries = self._plan.survey.dead[key]
            if len(entries) > 1:
                end = (key, False)
                break
            record = self._objects.sealed.load(place_of(self._plan.survey, entries[0]))
            if record.encoding not in _LINEAR or record.kind not in (Kind.CHUNK, Kind.PAGE):
                end = (key, False)
                break
            key = record.bases[0].key
        for one in passed:
            self._ends[one] = end
        return end
