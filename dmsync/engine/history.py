"""Questions about history: what commits hold, and what differs between them.

Which commit a revision names is engine/revision_lookup's question, which commits there are
engine/log's.
"""

from collections.abc import Iterator

from dmsync.core.ids import DotId, ObjectId
from dmsync.core.objects import Entry, EntryKind
from dmsync.core.pages import ZERO_RUN, directory_entries, file_spans, find_path
from dmsync.core.revisions import split_path
from dmsync.engine.commit_deltas import commit_changes
from dmsync.engine.commit_info import CommitInfo, CommitReader
from dmsync.engine.differences import Change, tree_differences
from dmsync.engine.log import log_commits
from dmsync.engine.revision_lookup import commit_named, resolve_revision
from dmsync.engine.store import Store
from dmsync.errors import ContentAbsent, PathNotFound
from dmsync.storage.catalog import DotRow

__all__ = [
    "CommitInfo",
    "changes_between",
    "list_path",
    "log_commits",
    "read_path",
    "resolve_revision",
    "show",
]

_ZEROS = bytes(1024 * 1024)


def show(store: Store, dot: DotRow, text: str) -> tuple[CommitInfo, list[Change] | None]:
    """A commit and its changes against its first parent; None when the content of one of the two
    is not here."""
    info = CommitReader(store, dot.dot).info(resolve_revision(store, dot, text))
    try:
        return info, commit_changes(store, dot.dot, info.id)
    except ContentAbsent:
        return info, None


def changes_between(
    store: Store, dot: DotId, old: ObjectId | None, new: ObjectId | None
) -> list[Change]:
    """Changes that lead from one commit's tree to another's, sorted by path."""
    return tree_differences(store.objects(dot), store.root(dot, old), store.root(dot, new))


def list_path(store: Store, dot: DotRow, text: str) -> list[tuple[bytes, Entry]]:
    """`REV:PATH`: the entries of a directory, or the one entry that PATH names, with their paths.

    Raises:
        PathNotFound.
    """
    path, entry = _find(store, dot, text)
    if entry.kind is not EntryKind.DIRECTORY:
        return [(path, entry)]
    prefix = path + b"/" if path else b""
    return [
        (prefix + found.name, found)
        for found in directory_entries(store.objects(dot.dot), entry.tree)
    ]


def read_path(store: Store, dot: DotRow, text: str) -> Iterator[bytes]:
    """`REV:PATH`: the bytes of a file, in pieces of at most 1 MiB.

    Raises:
        PathNotFound: no such path, or no regular file.
    """
    path, entry = _find(store, dot, text)
    if entry.kind is not EntryKind.FILE:
        if not path:
            revision = text.removesuffix(":")
            raise PathNotFound(
                f"{revision} names a whole commit, not a file in it",
                hint=f"dm ls {revision}: lists it, dm cat {revision}:PATH prints a file",
            )
        raise PathNotFound(
            f"{path.decode('utf-8', 'backslashreplace')} is not a regular file",
            hint=f"dm ls {text} lists it" if entry.kind is EntryKind.DIRECTORY else "",
        )
    return _file_bytes(store, dot.dot, entry)


def _file_bytes(store: Store, dot: DotId, entry: Entry) -> Iterator[bytes]:
    objects = store.objects(dot)
    for span in file_spans(objects, entry):
        if span.chunk != ZERO_RUN:
            yield objects.read_chunk(span.chunk)
            continue
        left = span.length
        while left:
            piece = min(left, len(_ZEROS))
            yield _ZEROS[:piece]
            left -= piece


def _find(store: Store, dot: DotRow, text: str) -> tuple[bytes, Entry]:
    if ":" not in text:
        text = f"{text}:"
    revision, path_text = split_path(text)
    path = path_text.encode("utf-8", "surrogateescape").strip(b"/")
    root = store.root(dot.dot, commit_named(store, dot, revision))
    entry = find_path(store.objects(dot.dot), root, path)
    if entry is None:
        raise PathNotFound(
            f"no path {path_text} in {revision.base}", hint=f"dm ls {revision.base}:"
        )
    return path, entry
