"""Commit deltas: what a commit changed against its first parent, kept beside the graph.

Derived, never trusted for safety (gc walks pages), and cheap to lose: whoever finds none computes
it from the trees. Roots have none. One zstd frame of canonical arrays, one for each change.
"""

from typing import Any, Final

import zstandard

from dmsync.core.encoding import decode, encode
from dmsync.core.ids import DotId, ObjectId
from dmsync.core.objects import Entry, entry_from_value
from dmsync.engine.differences import Change, tree_differences
from dmsync.engine.store import Store
from dmsync.errors import BadObject

CHANGES_MAX: Final = 10_000
"""A longer delta costs more to keep than to compute again."""
_DELTA_BYTES_MAX: Final = 64 * 1024 * 1024


def commit_changes(store: Store, dot: DotId, commit: ObjectId) -> list[Change]:
    """Changes of a commit against its first parent, by path; from its delta if it has one."""
    stored = store.catalog.commit_delta(dot, commit)
    if stored is not None:
        try:
            return decode_delta(stored)
        except (BadObject, zstandard.ZstdError, ValueError, TypeError):
            pass  # written by another release, or damaged: it is only a shortcut
    parents = store.commit(dot, commit).parents
    before = store.root(dot, parents[0] if parents else None)
    return tree_differences(store.objects(dot), before, store.root(dot, commit))


def keep_delta(store: Store, dot: DotId, commit: ObjectId, changes: list[Change] | None) -> None:
    """Keep the delta of a commit that has a parent, when it is short; None is long."""
    if changes is not None and 0 < len(changes) <= CHANGES_MAX:
        store.catalog.store_commit_delta(dot, commit, encode_delta(changes))


def encode_delta(changes: list[Change]) -> bytes:
    value = tuple(
        (
            change.path,
            change.kind,
            change.old_path,
            int(change.metadata_only),
            None if change.old is None else change.old.to_value(),
            None if change.new is None else change.new.to_value(),
        )
        for change in changes
    )
    return zstandard.ZstdCompressor(level=3).compress(encode(value))


def decode_delta(data: bytes) -> list[Change]:
    decompressor = zstandard.ZstdDecompressor()
    if zstandard.frame_content_size(data) > _DELTA_BYTES_MAX:
        raise BadObject("commit delta too large")
    value = decode(decompressor.decompress(data), trusted=True)
    return [
        Change(path, kind, _entry(old), _entry(new), old_path, bool(metadata_only))
        for path, kind, old_path, metadata_only, old, new in value
    ]


def _entry(value: Any) -> Entry | None:
    return None if value is None else entry_from_value(value)
