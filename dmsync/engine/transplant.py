"""Cherry-pick and revert: what one commit changed, done again or taken back, as a new commit.

Both are three-way merges whose base is chosen: a cherry-pick merges the commit in from its parent,
a revert merges its parent in from the commit (engine/merging/lifecycle.py does the rest).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from dmsync.core.graph import ancestors_difference
from dmsync.core.ids import ObjectId
from dmsync.core.objects import Commit
from dmsync.engine import trees
from dmsync.engine.differences import Change
from dmsync.engine.merging.lifecycle import MergeRequest, start_merge
from dmsync.engine.merging.state import ConflictInfo, refuse_merging
from dmsync.engine.progress import Progress
from dmsync.engine.revision_lookup import resolve_range
from dmsync.engine.store import Store
from dmsync.errors import NotFound, UsageError
from dmsync.storage.catalog import DotRow

_PICK = "cherry-pick"
_REVERT = "revert"


@dataclass(frozen=True)
class TransplantRequest:
    """What a user asks of `dm cherry-pick` or `dm revert`, in the order given; a range stands for
    its commits, oldest first to pick, newest first to revert.

    `mainline` counts parents from 1: the one that a merge is told against. `no_commit` leaves the
    result uncommitted. `mark_origin` names the picked commit in the message.
    """

    revisions: tuple[str, ...]
    mainline: int | None = None
    no_commit: bool = False
    mark_origin: bool = False
    allow_empty: bool = False
    in_use: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class Transplanted:
    """What became of one commit: `outcome` is merged, applied (uncommitted), nothing (its changes
    are there already) or conflicts; `commit` the new one."""

    source: ObjectId
    outcome: str
    commit: ObjectId | None
    changes: tuple[Change, ...]
    withheld: tuple[bytes, ...] = ()
    unapplied: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class TransplantSummary:
    """`done` in order; with `conflicts` the last of them is under way as a merge, and `left` are
    the commits that were not begun."""

    branch: str
    done: tuple[Transplanted, ...]
    conflicts: tuple[ConflictInfo, ...] = ()
    left: tuple[ObjectId, ...] = ()


@dataclass(frozen=True)
class _Source:
    """One commit with the parent it is told against, None for a first commit."""

    id: ObjectId
    commit: Commit
    parent: ObjectId | None


def cherry_pick(
    store: Store, dot: DotRow, request: TransplantRequest, progress: Progress | None = None
) -> TransplantSummary:
    """Make what each commit changed a new commit on the current branch, with its author, message
    and metadata; stops at the first that conflicts. A dry run looks at each by itself.

    Raises:
        RevisionNotFound, AmbiguousRevision; UsageError: a merge without `mainline`, or a parent it
            lacks. Before anything was done.
        WouldLose: uncommitted changes, or a tree in use. MergeConflict: a merge is under way.
        ContentAbsent: a commit or its parent is hollow.
    """

    def picked(source: _Source) -> MergeRequest:
        message = source.commit.message
        if request.mark_origin:
            message = f"{message.rstrip()}\n\n(cherry picked from commit {source.id.hex()})"
        return MergeRequest(
            kind=_PICK,
            theirs=source.id,
            bases=() if source.parent is None else (source.parent,),
            parents=(),
            message=message,
            author=source.commit.author,
            metadata=source.commit.metadata,
        )

    return _transplant(store, dot, request, picked, progress, newest_first=False)


def revert(
    store: Store, dot: DotRow, request: TransplantRequest, progress: Progress | None = None
) -> TransplantSummary:
    """Take back what each commit changed, in a new commit on the current branch.

    Raises as cherry_pick; UsageError also for a first commit, before which there was nothing.
    """

    def reverted(source: _Source) -> MergeRequest:
        if source.parent is None:
            raise UsageError(
                f"{source.id.hex()[:12]} is a first commit: there is nothing to go back to",
                hint="remove the files and commit",
            )
        against = f", to parent {source.parent.hex()}" if len(source.commit.parents) > 1 else ""
        subject = source.commit.message.strip().partition("\n")[0]
        return MergeRequest(
            kind=_REVERT,
            theirs=source.parent,
            bases=(source.id,),
            parents=(),
            message=f'revert "{subject}"\n\nThis reverts commit {source.id.hex()}{against}.',
        )

    return _transplant(store, dot, request, reverted, progress, newest_first=True)


def _transplant(
    store: Store,
    dot: DotRow,
    request: TransplantRequest,
    request_of: Callable[[_Source], MergeRequest],
    progress: Progress | None,
    *,
    newest_first: bool,
) -> TransplantSummary:
    branch = store.catalog.head(dot.dot)
    refuse_merging(store, dot.dot, branch)
    sources = [
        _source(store, dot, oid, request.mainline)
        for text in request.revisions
        for oid in _commits(store, dot, text, newest_first=newest_first)
    ]
    if request.no_commit and len(sources) > 1:
        raise UsageError("--no-commit takes one revision: the tree must be clean for each")
    merges = [request_of(source) for source in sources]
    done: list[Transplanted] = []
    for position, (source, merge) in enumerate(zip(sources, merges, strict=True)):
        merged = start_merge(store, dot, _completed(store, dot, request, merge), progress)
        done.append(
            Transplanted(
                source.id,
                merged.outcome,
                merged.commit if merged.outcome == "merged" else None,
                merged.changes,
                merged.withheld,
                merged.unapplied,
            )
        )
        if merged.conflicts:
            left = tuple(source.id for source in sources[position + 1 :])
            return TransplantSummary(branch, tuple(done), merged.conflicts, left)
    return TransplantSummary(branch, tuple(done))


def _completed(
    store: Store, dot: DotRow, request: TransplantRequest, merge: MergeRequest
) -> MergeRequest:
    """With what is known only when the commits before it are made: the branch's tip."""
    tip = trees.branch_tip(store, dot.dot, store.catalog.head(dot.dot))
    if tip is None:
        raise NotFound(f"branch {store.catalog.head(dot.dot)} has no commits yet")
    return replace(
        merge,
        parents=() if request.no_commit else (tip,),
        skip_empty=not request.allow_empty,
        in_use=request.in_use,
        dry_run=request.dry_run,
    )


def _commits(store: Store, dot: DotRow, text: str, *, newest_first: bool) -> list[ObjectId]:
    """The commit that `text` names, or those of a range. Raises UsageError for an empty one."""
    wanted, excluded = resolve_range(store, dot, text)
    if not excluded:
        return list(wanted)
    found = list(ancestors_difference(store.catalog.graph(dot.dot), wanted, excluded))
    if not found:
        raise UsageError(f"{text} holds no commits", hint="the later end of a range comes last")
    return found[::-1] if newest_first else found


def _source(store: Store, dot: DotRow, oid: ObjectId, mainline: int | None) -> _Source:
    commit = store.commit(dot.dot, oid)
    return _Source(oid, commit, _mainline_parent(oid.hex()[:12], commit.parents, mainline))


def _mainline_parent(
    name: str, parents: Sequence[ObjectId], mainline: int | None
) -> ObjectId | None:
    if mainline is None and len(parents) > 1:
        raise UsageError(
            f"{name} is a merge of {len(parents)} parents",
            hint="-m 1 takes what it changed against its first parent (dm show lists them)",
        )
    if mainline is None or (mainline == 1 and not parents):
        return parents[0] if parents else None
    if not 0 < mainline <= len(parents):
        raise UsageError(f"{name} has no parent {mainline}", hint=f"it has {len(parents)}")
    return parents[mainline - 1]
