"""The log: which commits, in which order, and how they hang together."""

from dataclasses import dataclass

from dmsync.core.graph import ancestors_difference, descending
from dmsync.core.ids import DotId, ObjectId
from dmsync.core.objects import Commit
from dmsync.engine.commit_deltas import commit_changes
from dmsync.engine.commit_info import CommitInfo, CommitReader
from dmsync.engine.differences import Change
from dmsync.engine.path_history import PathComparison, PathSet, PathSimplifier
from dmsync.engine.revision_lookup import head_commit, resolve_range
from dmsync.engine.store import Store
from dmsync.errors import ContentAbsent, ObjectMissing
from dmsync.storage.catalog import DotRow


@dataclass(frozen=True)
class LogQuery:
    """Which commits a log lists; what is not given excludes nothing.

    `revisions` are revisions, ranges and `^REV`, all together; without one that is not excluded,
    HEAD. `paths` are tree paths (path_history.tree_path). `author` and `message` are texts that
    those fields must hold. Of `metadata`, (key, None) asks for the key alone; all must match.
    Times, in nanoseconds, are bounds that count in. `newest` stops after so many.
    """

    revisions: tuple[str, ...] = ()
    paths: tuple[bytes, ...] = ()
    author: str | None = None
    message: str | None = None
    since_ns: int | None = None
    until_ns: int | None = None
    metadata: tuple[tuple[str, str | None], ...] = ()
    merges: bool | None = None
    first_parent: bool = False
    newest: int | None = None


@dataclass(frozen=True)
class CommitLog:
    """Commits found: newest first by their dates, but children always before their parents.

    `lines` leads from each commit to the nearest listed ancestors, past those left out.
    `unknown_count` counts comparisons of paths that were not possible (hollow commits): those
    commits are listed.
    """

    commits: list[CommitInfo]
    lines: dict[ObjectId, tuple[ObjectId, ...]]
    unknown_count: int = 0


@dataclass(frozen=True, slots=True)
class _Step:
    """One commit of the walk and where it went on."""

    commit: ObjectId
    is_listed: bool
    followed: tuple[ObjectId, ...]


def log_commits(
    store: Store, dot: DotRow, text: str | None = None, newest: int | None = None
) -> list[CommitInfo]:
    """Commits of a revision or range, children before parents, newest first.

    An unborn branch has an empty log. Raises as `resolve_revision`.
    """
    revisions = () if text is None else (text,)
    return find_commits(store, dot, LogQuery(revisions=revisions, newest=newest)).commits


def find_commits(store: Store, dot: DotRow, query: LogQuery) -> CommitLog:
    """The commits that a query asks for. Reads no more history than it must.

    Raises as `resolve_revision`.
    """
    graph = store.catalog.graph(dot.dot)
    wanted, excluded = _ends(store, dot, query.revisions)
    within = set(ancestors_difference(graph, wanted, excluded)) if excluded else None
    reader = CommitReader(store, dot.dot)
    comparison = PathComparison(store, dot.dot, reader)
    simplifier = PathSimplifier(
        graph,
        comparison,
        PathSet(query.paths),
        is_relevant=lambda oid: within is None or oid in within or oid in excluded,
        first_parent=query.first_parent,
    )
    steps: list[_Step] = []
    commits: list[CommitInfo] = []
    tips = wanted if within is None else [tip for tip in wanted if tip in within]
    # The step of a commit stands before its parents are asked for.
    walk = descending(graph, tips, lambda _: steps[-1].followed, graph.corrected_date_ns)
    for oid in walk:
        if query.newest is not None and len(commits) >= query.newest:
            break
        is_listed, parents = simplifier.visit(oid)
        is_listed = is_listed and _matches(query, reader.commit(oid))
        followed = parents if within is None else tuple(p for p in parents if p in within)
        steps.append(_Step(oid, is_listed, followed))
        if is_listed:
            commits.append(reader.info(oid))
    return CommitLog(commits, _lines(steps), comparison.unknown_count)


def _ends(
    store: Store, dot: DotRow, revisions: tuple[str, ...]
) -> tuple[list[ObjectId], list[ObjectId]]:
    wanted: list[ObjectId] = []
    excluded: list[ObjectId] = []
    for text in revisions:
        included, left_out = resolve_range(store, dot, text)
        wanted.extend(included)
        excluded.extend(left_out)
    if not wanted:
        head = head_commit(store, dot.dot)
        wanted = [] if head is None else [head]
    return wanted, excluded


def _matches(query: LogQuery, commit: Commit) -> bool:
    metadata = dict(commit.metadata) if query.metadata else {}
    return (
        (query.author is None or query.author in commit.author)
        and (query.message is None or query.message in commit.message)
        and (query.since_ns is None or commit.time_ns >= query.since_ns)
        and (query.until_ns is None or commit.time_ns <= query.until_ns)
        and (query.merges is None or query.merges == (len(commit.parents) > 1))
        and all(key in metadata and value in (None, metadata[key]) for key, value in query.metadata)
    )


def _lines(steps: list[_Step]) -> dict[ObjectId, tuple[ObjectId, ...]]:
    lines: dict[ObjectId, tuple[ObjectId, ...]] = {}
    nearest: dict[ObjectId, tuple[ObjectId, ...]] = {}
    for step in reversed(steps):
        reached = tuple(
            dict.fromkeys(oid for parent in step.followed for oid in nearest.get(parent, ()))
        )
        nearest[step.commit] = (step.commit,) if step.is_listed else reached
        if step.is_listed:
            lines[step.commit] = reached
    return lines


def changes_of(
    store: Store, dot: DotId, commit: CommitInfo, wanted: PathSet
) -> list[Change] | None:
    """What a commit changed at the wanted paths against its first parent, by path; None when the
    content of one of the two is not here."""
    try:
        found = commit_changes(store, dot, commit.id)
    except (ObjectMissing, ContentAbsent):
        if not _may_be_absent(store, dot, commit):
            raise
        return None
    return [
        change
        for change in found
        if wanted.covers(change.path)
        or (change.old_path is not None and wanted.covers(change.old_path))
    ]


def _may_be_absent(store: Store, dot: DotId, commit: CommitInfo) -> bool:
    return (
        commit.is_hollow
        or any(store.catalog.is_hollow(dot, parent) for parent in commit.parents[:1])
        or store.catalog.scope(dot) is not None
    )
