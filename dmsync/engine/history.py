"""Questions about history: which commit a revision names, the log, what a commit holds."""

import heapq
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from dmsync.core.graph import ancestors_difference, merge_bases, nth_first_parent
from dmsync.core.ids import DotId, ObjectId
from dmsync.core.objects import Entry, EntryKind, commit_from_bytes
from dmsync.core.pages import ZERO_RUN, directory_entries, file_spans, find_path
from dmsync.core.revisions import (
    Ancestor,
    Parent,
    ReflogEntry,
    ReflogTime,
    Revision,
    Step,
    Upstream,
    parse_revision,
    parse_revision_or_range,
    split_path,
    time_of,
)
from dmsync.engine.commit_deltas import commit_changes
from dmsync.engine.differences import Change, tree_differences
from dmsync.engine.store import Store
from dmsync.errors import AmbiguousRevision, PathNotFound, RevisionNotFound, UsageError
from dmsync.storage.catalog import DotRow

_CANDIDATES_SHOWN = 5
_ZEROS = bytes(1024 * 1024)


@dataclass(frozen=True)
class CommitInfo:
    """A commit as `dm log` and `dm show` tell it. Times in nanoseconds UTC, offset in minutes.

    `refs` names branches and tags that point at it.
    """

    id: ObjectId
    parents: tuple[ObjectId, ...]
    author: str
    committer: str
    time_ns: int
    offset_minutes: int
    message: str
    metadata: tuple[tuple[str, str], ...]
    generation: int
    capture: tuple[str, str, int] | None
    refs: tuple[str, ...]


# --- which commit ------------------------------------------------------------------------------


def resolve_revision(store: Store, dot: DotRow, text: str) -> ObjectId:
    """The commit that `text` names (README, "Revisions").

    Raises:
        UsageError: not a revision. RevisionNotFound: nothing of that name or that far back.
        AmbiguousRevision: several commits begin so; they are listed.
    """
    return _resolve(store, dot, parse_revision(text))


def _resolve(store: Store, dot: DotRow, revision: Revision) -> ObjectId:
    ref, commit = _base(store, dot, revision)
    for step in revision.steps:
        ref, commit = _step(store, dot, revision, ref, commit, step)
    if commit is None:
        raise RevisionNotFound(
            f"No commits match {revision.base}: branch {ref.removeprefix('branch/')} has no "
            "commits yet"
            if revision.is_head and ref is not None
            else f"No commits match {revision.base}"
        )
    return commit


def _base(store: Store, dot: DotRow, revision: Revision) -> tuple[str | None, ObjectId | None]:
    """(ref name or None, commit or None for an unborn branch)."""
    catalog = store.catalog
    if revision.is_head:
        ref = f"branch/{catalog.head(dot.dot)}"
        return ref, _target(store, dot.dot, ref)
    names = (revision.base, f"tag/{revision.base}", f"branch/{revision.base}")
    for name in (*names, f"remote/{revision.base}"):
        commit = _target(store, dot.dot, name)
        if commit is not None:
            return name, commit
    if revision.base == catalog.head(dot.dot):
        return f"branch/{revision.base}", None
    return None, _by_prefix(store, dot, revision)


def _target(store: Store, dot: DotId, ref: str) -> ObjectId | None:
    row = store.catalog.ref(dot, ref)
    return None if row is None else row.target


def _by_prefix(store: Store, dot: DotRow, revision: Revision) -> ObjectId:
    prefix = revision.id_prefix
    found = [] if prefix is None else store.catalog.commits_with_prefix(dot.dot, prefix)
    if not found:
        raise RevisionNotFound(
            f"No commits match {revision.base}", hint="dm log and dm branch show what there is"
        )
    if len(found) > 1:
        shown = [oid.hex()[:16] for oid in found[:_CANDIDATES_SHOWN]]
        raise AmbiguousRevision(
            f"{revision.base} is the beginning of {len(found)} commits: {', '.join(shown)}",
            hint="give more digits",
            candidates=shown,
        )
    return found[0]


def _step(
    store: Store,
    dot: DotRow,
    revision: Revision,
    ref: str | None,
    commit: ObjectId | None,
    step: Step,
) -> tuple[str | None, ObjectId | None]:
    match step:
        case ReflogEntry(index):
            return None, _reflog_entry(store, dot, revision, ref, index)
        case ReflogTime(text):
            return None, _reflog_time(store, dot, revision, ref, text)
        case Upstream():
            return _upstream(store, dot, revision, ref)
    if commit is None:
        raise RevisionNotFound(f"No commits match {revision.base}")
    graph = store.catalog.graph(dot.dot)
    found: ObjectId | None
    match step:
        case Parent(0):
            found = commit
        case Parent(number):
            parents = graph.parents(commit)
            found = parents[number - 1] if number <= len(parents) else None
        case Ancestor(count):
            found = nth_first_parent(graph, commit, count)
    if found is None:
        raise RevisionNotFound(f"Commits don't go back that far from {revision.base}")
    return None, found


def _reflog_entry(
    store: Store, dot: DotRow, revision: Revision, ref: str | None, index: int
) -> ObjectId | None:
    if ref is None:
        raise UsageError(f"{revision.base} is no ref: it has no reflog")
    changes = store.catalog.reflog(dot.dot, ref)  # newest first
    if index < len(changes):
        return changes[index].new
    if changes and index == len(changes) and changes[-1].old is not None:
        return changes[-1].old
    raise RevisionNotFound(f"the reflog of {revision.base} has only {len(changes)} entries")


def _reflog_time(
    store: Store, dot: DotRow, revision: Revision, ref: str | None, text: str
) -> ObjectId | None:
    if ref is None:
        raise UsageError(f"{revision.base} is no ref: it has no reflog")
    now_ns, _ = store.clock()
    wanted_ns = time_of(text, now_ns=now_ns, zone=datetime.now().astimezone().tzinfo or UTC)
    for change in store.catalog.reflog(dot.dot, ref):
        if change.time_ns <= wanted_ns:
            return change.new
    raise RevisionNotFound(f"the reflog of {revision.base} does not go back to {text}")


def _upstream(
    store: Store, dot: DotRow, revision: Revision, ref: str | None
) -> tuple[str | None, ObjectId | None]:
    if ref is None or not ref.startswith("branch/"):
        raise UsageError(f"{revision.base} is no branch: it has no upstream")
    branch = ref.removeprefix("branch/")
    for remote, _, _ in store.catalog.upstreams(dot.dot):
        name = f"remote/{remote}/{branch}"
        commit = _target(store, dot.dot, name)
        if commit is not None:
            return name, commit
    raise RevisionNotFound(f"no remote holds branch {branch}", hint="dm push or dm fetch first")


# --- the log -----------------------------------------------------------------------------------


def log_commits(
    store: Store, dot: DotRow, text: str | None = None, newest: int | None = None
) -> list[CommitInfo]:
    """Commits of a revision or range, children before parents, newest first.

    An unborn branch has an empty log. Raises as `resolve_revision`.
    """
    graph = store.catalog.graph(dot.dot)
    if text is None:
        tip = _target(store, dot.dot, f"branch/{store.catalog.head(dot.dot)}")
        wanted: list[ObjectId] = [] if tip is None else [tip]
        excluded: list[ObjectId] = []
    else:
        wanted, excluded = _ends(store, dot, text)
    refs = _refs_by_commit(store, dot.dot)
    if excluded:
        oids: Iterator[ObjectId] = reversed(list(ancestors_difference(graph, wanted, excluded)))
    else:
        oids = _newest_first(store, dot.dot, wanted)
    return [_info(store, dot.dot, oid, refs) for oid in itertools.islice(oids, newest)]


def _ends(store: Store, dot: DotRow, text: str) -> tuple[list[ObjectId], list[ObjectId]]:
    parsed = parse_revision_or_range(text)
    if isinstance(parsed, Revision):
        return [_resolve(store, dot, parsed)], []
    left, right = _resolve(store, dot, parsed.left), _resolve(store, dot, parsed.right)
    if not parsed.symmetric:
        return [right], [left]
    return [left, right], list(merge_bases(store.catalog.graph(dot.dot), left, right))


def _newest_first(store: Store, dot: DotId, tips: list[ObjectId]) -> Iterator[ObjectId]:
    """All ancestors in descending generation: reads only as far as it is asked."""
    graph = store.catalog.graph(dot)
    queue = [(-graph.generation(tip), tip) for tip in tips]
    heapq.heapify(queue)
    seen = set(tips)
    while queue:
        _, commit = heapq.heappop(queue)
        yield commit
        for parent in graph.parents(commit):
            if parent not in seen:
                seen.add(parent)
                heapq.heappush(queue, (-graph.generation(parent), parent))


def _refs_by_commit(store: Store, dot: DotId) -> dict[ObjectId, tuple[str, ...]]:
    found: dict[ObjectId, tuple[str, ...]] = {}
    for row in store.catalog.refs(dot):
        shown = row.name.removeprefix("branch/").removeprefix("remote/")
        found[row.target] = (*found.get(row.target, ()), shown)
    return found


def _info(
    store: Store, dot: DotId, oid: ObjectId, refs: dict[ObjectId, tuple[str, ...]]
) -> CommitInfo:
    row = store.catalog.commit(dot, oid)
    assert row is not None, "the graph named this commit"
    commit = commit_from_bytes(row.payload, trusted=True)
    return CommitInfo(
        id=oid,
        parents=commit.parents,
        author=commit.author,
        committer=commit.committer,
        time_ns=commit.time_ns,
        offset_minutes=commit.offset_minutes,
        message=commit.message,
        metadata=commit.metadata,
        generation=row.generation,
        capture=row.capture,
        refs=refs.get(oid, ()),
    )


# --- what commits hold ---------------------------------------------------------------------------


def show(store: Store, dot: DotRow, text: str) -> tuple[CommitInfo, list[Change]]:
    """A commit and its changes against its first parent."""
    oid = resolve_revision(store, dot, text)
    info = _info(store, dot.dot, oid, _refs_by_commit(store, dot.dot))
    return info, commit_changes(store, dot.dot, oid)


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
    root = store.root(dot.dot, _resolve(store, dot, revision))
    entry = find_path(store.objects(dot.dot), root, path)
    if entry is None:
        raise PathNotFound(
            f"no path {path_text} in {revision.base}", hint=f"dm ls {revision.base}:"
        )
    return path, entry
