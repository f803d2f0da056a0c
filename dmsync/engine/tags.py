"""What tags name: a light tag is a ref that holds a commit's id, an annotated one holds the id of a
tag object (protocol/OBJECTS.md 6). Making, listing and deleting them: engine/tagging."""

from dmsync.core.ids import DotId, Kind, ObjectId
from dmsync.core.objects import Tag, tag_from_bytes
from dmsync.engine.ports import SyncStore


def read_tag(store: SyncStore, dot: DotId, oid: ObjectId) -> Tag:
    """An annotated tag. Raises ObjectMissing, HashMismatch, Corruption."""
    return tag_from_bytes(store.objects(dot).read(Kind.TAG, oid), trusted=True)


def annotation(store: SyncStore, dot: DotId, oid: ObjectId) -> Tag | None:
    """The annotated tag of this id, or None for a commit. Raises as read_tag."""
    return None if store.catalog.has_commit(dot, oid) else read_tag(store, dot, oid)


def peel(store: SyncStore, dot: DotId, oid: ObjectId) -> ObjectId:
    """The commit that a ref's target stands for: itself, or what the annotated tag names.

    Raises:
        ObjectMissing: neither a commit nor a tag of this dot.
    """
    tag = annotation(store, dot, oid)
    return oid if tag is None else tag.target
