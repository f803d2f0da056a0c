"""The life of a merge: started, continued after conflicts, or aborted.

A merge without conflicts is one operation: commit, branch and tree. With conflicts the tree is
given a snapshot in which ours stands at the conflicting paths and the versions lie beside them,
and MergeStarted keeps in the log what is needed to go on: a merge survives kills and reboots.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from dmsync.core.events import (
    PATH_BYTES_MAX,
    CommitsAdded,
    Event,
    MergeEnded,
    MergeStarted,
    RefChanged,
)
from dmsync.core.graph import is_ancestor, merge_bases
from dmsync.core.ids import DotId, Kind, ObjectId
from dmsync.core.objects import MESSAGE_BYTES_MAX, Commit, Entry
from dmsync.engine import switching, trees
from dmsync.engine.commit_deltas import keep_delta
from dmsync.engine.differences import Change, tree_differences
from dmsync.engine.merging.drivers import Bench, merge_drivers, open_bench
from dmsync.engine.merging.entries import Side
from dmsync.engine.merging.state import (
    ConflictInfo,
    decode_conflict,
    encode_detail,
    refuse_merging,
    refuse_open_conflicts,
    require_merge,
)
from dmsync.engine.merging.trees import FoundConflict, MergedTree, MergeRules, Policy, merge_trees
from dmsync.engine.merging.virtual_base import virtual_base
from dmsync.engine.progress import Progress
from dmsync.engine.restore import RestoreResult
from dmsync.engine.revision_lookup import resolve_revision
from dmsync.engine.store import Store
from dmsync.engine.tree_users import refuse_in_use
from dmsync.errors import (
    ContentAbsent,
    MergeConflict,
    NotFastForward,
    NotFound,
    RefConflict,
    UnrelatedHistories,
    UsageError,
    WouldLose,
)
from dmsync.storage.catalog import DotRow
from dmsync.storage.catalog_rows import ConflictRow
from dmsync.storage.pack_writer import PackWriter

FastForward = Literal["auto", "only", "never"]
Outcome = Literal["up-to-date", "fast-forward", "merged", "applied", "nothing", "conflicts"]


@dataclass(frozen=True)
class MergeRequest:
    """One three-way merge into the current branch.

    `bases`: None for the merge bases of ours and theirs (several: a virtual base), () for none.
    `parents` of the commit to be made; () leaves the result uncommitted in the tree.
    """

    kind: str
    theirs: ObjectId
    bases: tuple[ObjectId, ...] | None
    parents: tuple[ObjectId, ...]
    message: str
    author: str | None = None
    metadata: tuple[tuple[str, str], ...] = ()
    favour: Side | None = None
    """Decides conflicts."""
    skip_empty: bool = False
    """Make no commit when the result equals ours."""
    events_when_clean: tuple[Event, ...] = ()
    """Recorded in the same operation when nothing conflicts."""
    trusted: bool = False
    in_use: bool = False
    """Also while processes write in the tree."""
    dry_run: bool = False


@dataclass(frozen=True)
class MergeOptions:
    """What a user asks of `dm merge REV`."""

    revision: str
    fast_forward: FastForward = "auto"
    squash: bool = False
    favour: Side | None = None
    message: str | None = None
    allow_unrelated: bool = False
    in_use: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class MergeSummary:
    """What a merge did, or with a dry run would do. `changes` lead from ours to the result.

    `commit` is the branch's tip afterwards (None: dry run); with `conflicts` nothing was committed.
    """

    outcome: Outcome
    branch: str
    ours: ObjectId | None
    theirs: ObjectId
    commit: ObjectId | None
    conflicts: tuple[ConflictInfo, ...] = ()
    changes: tuple[Change, ...] = ()
    stash: str | None = None
    """What keeps the tree's state that an abort took away."""
    files_written: int = 0
    files_removed: int = 0
    bytes_written: int = 0
    withheld: tuple[bytes, ...] = ()
    unapplied: tuple[bytes, ...] = ()


# --- starting ----------------------------------------------------------------------------------


def merge_revision(
    store: Store, dot: DotRow, options: MergeOptions, progress: Progress | None = None
) -> MergeSummary:
    """Merge a revision into the current branch: nothing to do, fast-forward, commit or conflicts.

    Raises:
        RevisionNotFound, AmbiguousRevision: no such revision.
        MergeConflict: another merge is under way. WouldLose: uncommitted changes, tree in use.
        NotFastForward: and only that was allowed. UnrelatedHistories: no common commit.
        DriverFailed, ContentAbsent.
    """
    if options.squash and options.fast_forward != "auto":
        raise UsageError("--squash makes one commit: neither --ff-only nor --no-ff goes with it")
    with switching.ready(store, dot.dot, progress):
        branch = store.catalog.head(dot.dot)
        refuse_merging(store, dot.dot, branch)
        theirs = resolve_revision(store, dot, options.revision)
        tip = trees.branch_tip(store, dot.dot, branch)
        graph = store.catalog.graph(dot.dot)
        if tip is not None and is_ancestor(graph, theirs, tip):
            return MergeSummary("up-to-date", branch, tip, theirs, tip)
        if tip is None:
            return _fast_forward(store, dot, branch, None, theirs, options, progress)
        leads_on = is_ancestor(graph, tip, theirs)
        if leads_on and options.fast_forward != "never" and not options.squash:
            return _fast_forward(store, dot, branch, tip, theirs, options, progress)
        if options.fast_forward == "only":
            raise NotFastForward(
                f"{branch} has commits that {options.revision} lacks",
                hint="merge without --ff-only",
            )
        verb = "squash" if options.squash else "merge"
        request = MergeRequest(
            kind="merge",
            theirs=theirs,
            bases=() if options.allow_unrelated and not merge_bases(graph, tip, theirs) else None,
            parents=(tip,) if options.squash else (tip, theirs),
            message=options.message or f"{verb} {options.revision} into {branch}",
            favour=options.favour,
            in_use=options.in_use,
            dry_run=options.dry_run,
        )
        return _start(store, dot, request, progress)


def start_merge(
    store: Store, dot: DotRow, request: MergeRequest, progress: Progress | None = None
) -> MergeSummary:
    """Merge into the current branch as the request says, in one operation.

    Clean: the commit is made and the tree switched (without parents: the tree changed only).
    Conflicts: the tree holds the snapshot, MergeStarted is recorded, `conflicts` is not empty.

    Raises:
        As merge_revision; NotFound: the branch has no commits.
    """
    with switching.ready(store, dot.dot, progress):
        return _start(store, dot, request, progress)


def _fast_forward(
    store: Store,
    dot: DotRow,
    branch: str,
    tip: ObjectId | None,
    theirs: ObjectId,
    options: MergeOptions,
    progress: Progress | None,
) -> MergeSummary:
    _refuse_absent(store, dot.dot, [theirs])
    refuse_dirty(store, dot.dot, branch, in_use=options.in_use, command="merge")
    root = store.root(dot.dot, theirs)
    changes = tree_differences(store.objects(dot.dot), store.root(dot.dot, tip), root)
    if options.dry_run:
        return MergeSummary("fast-forward", branch, tip, theirs, None, changes=tuple(changes))
    reason = f"merge {options.revision}: fast-forward"
    moved = RefChanged(dot.dot, f"branch/{branch}", tip, theirs, "merge", reason[:200])
    result = switching.switch_tree(
        store,
        dot.dot,
        branch=branch,
        target=theirs,
        events=[moved],
        command="merge",
        in_use=options.in_use,
        progress=progress,
    )
    return _summary("fast-forward", branch, tip, theirs, theirs, changes, result)


def _start(
    store: Store, dot: DotRow, request: MergeRequest, progress: Progress | None
) -> MergeSummary:
    branch = store.catalog.head(dot.dot)
    refuse_merging(store, dot.dot, branch)
    _check_message(request)
    tip = trees.branch_tip(store, dot.dot, branch)
    if tip is None:
        raise NotFound(f"branch {branch} has no commits yet")
    if request.parents and request.parents[0] != tip:
        raise RefConflict(f"branch {branch} moved meanwhile", hint="try again")
    command = request.kind.replace("-pop", " pop")
    refuse_dirty(store, dot.dot, branch, in_use=request.in_use, command=command)
    bases = request.bases
    if bases is None:
        bases = tuple(merge_bases(store.catalog.graph(dot.dot), tip, request.theirs))
        if not bases:
            raise UnrelatedHistories(
                f"{branch} and {request.theirs.hex()[:12]} have no commit in common",
                hint="--allow-unrelated merges them as if both had added all their files",
            )
    _refuse_absent(store, dot.dot, [tip, request.theirs, *bases])
    if progress is not None:
        progress.phase("merging")
    with store.objects(dot.dot).writer() as writer:
        merged = _merge_commits(store, dot.dot, writer, request, tip, bases)
        _refuse_unrecordable(merged.conflicts)
        ours = store.root(dot.dot, tip)
        changes = tree_differences(writer, ours, merged.root)
        conflicts = _infos(merged.conflicts)
        is_empty = request.skip_empty and merged.root == ours and not conflicts
        if request.dry_run or is_empty:
            outcome: Outcome = "conflicts" if conflicts else "merged"
            return MergeSummary(
                "nothing" if is_empty else outcome if request.parents else "applied",
                branch,
                tip,
                request.theirs,
                None,
                conflicts,
                tuple(changes),
            )
        is_commit = bool(request.parents) and not conflicts
        parents = request.parents if is_commit else (tip,)
        value = _commit_value(store, dot.dot, request, tip, merged.root, parents)
        new = writer.put(Kind.COMMIT, value.to_bytes())
        writer.seal()
    events: list[Event] = [CommitsAdded(dot.dot, (new,))]
    if conflicts:
        events.append(_started(dot.dot, branch, request, tip, bases, new, merged.conflicts))
    else:
        events.extend(request.events_when_clean)
    if is_commit:
        reason = request.message.partition("\n")[0][:200]
        events.append(RefChanged(dot.dot, f"branch/{branch}", tip, new, request.kind, reason))
    else:
        switching.make_place(store, dot.dot, branch, progress)
    result = switching.switch_tree(
        store,
        dot.dot,
        branch=branch,
        target=new,
        events=events,
        command=request.kind,
        trusted=request.trusted,
        in_use=request.in_use,
        progress=progress,
    )
    if is_commit:
        keep_delta(store, dot.dot, new, changes)
        return _summary("merged", branch, tip, request.theirs, new, changes, result)
    outcome = "conflicts" if conflicts else "applied"
    return _summary(outcome, branch, tip, request.theirs, tip, changes, result, conflicts)


def _check_message(request: MergeRequest) -> None:
    if request.parents and not request.message.strip():
        raise UsageError("Please provide a commit message", hint='-m "MESSAGE"')
    if len(request.message.encode()) > MESSAGE_BYTES_MAX:
        raise UsageError("the commit message is longer than 1 MiB")


def refuse_dirty(
    store: Store, dot: DotId, branch: str, *, in_use: bool = False, command: str
) -> None:
    """Refuse to merge into a tree with uncommitted changes, one in use (unless `in_use`), or not
    the recorded one. `command` is what is to be said with --in-use.

    Raises:
        WouldLose, CaptureFailed.
    """
    place = trees.place_of(store, dot, branch)
    if place is None:
        return
    trees.check_place(store, dot, place, accept_moved=False)
    if not in_use:
        refuse_in_use(place.path, insist=f"dm {command} --in-use")
    tip = trees.branch_tip(store, dot, branch)
    changes = trees.tree_changes(store, dot, place, store.root(dot, tip))
    if changes:
        raise WouldLose(
            f"{len(changes)} uncommitted changes are in the way",
            hint="commit them, or put them away with dm stash",
            paths=len(changes),
        )


def _refuse_absent(store: Store, dot: DotId, commits: Sequence[ObjectId]) -> None:
    for commit in commits:
        if store.catalog.is_hollow(dot, commit):
            raise ContentAbsent.of_commit(commit)


def _refuse_unrecordable(conflicts: Sequence[FoundConflict]) -> None:
    longest = max((conflict.path for conflict in conflicts), key=len, default=b"")
    if len(longest) > PATH_BYTES_MAX:
        raise MergeConflict(
            f"a conflict lies at a path of {len(longest)} bytes, too long to be recorded",
            hint="merge with --ours or --theirs, or shorten the path first",
        )


def _infos(conflicts: Sequence[FoundConflict]) -> tuple[ConflictInfo, ...]:
    return tuple(
        decode_conflict(ConflictRow(found.path, found.reason, encode_detail(found), None))
        for found in conflicts
    )


def _started(
    dot: DotId,
    branch: str,
    request: MergeRequest,
    tip: ObjectId,
    bases: tuple[ObjectId, ...],
    snapshot: ObjectId,
    conflicts: Sequence[FoundConflict],
) -> MergeStarted:
    return MergeStarted(
        dot=dot,
        branch=branch,
        kind=request.kind,
        ours=tip,
        theirs=request.theirs,
        bases=bases,
        snapshot=snapshot,
        parents=request.parents,
        message=request.message,
        conflicts=tuple((c.path, c.reason, encode_detail(c)) for c in conflicts),
    )


def _commit_value(
    store: Store,
    dot: DotId,
    request: MergeRequest,
    tip: ObjectId,
    root: Entry,
    parents: tuple[ObjectId, ...],
) -> Commit:
    """The merge commit, or the snapshot that carries what the commit to be will say."""
    time_ns, offset_minutes = store.clock()
    ours, theirs = store.commit(dot, tip), store.commit(dot, request.theirs)
    return Commit(
        root=root,
        parents=parents,
        author=request.author or store.settings.author,
        committer=store.settings.author,
        time_ns=time_ns,
        offset_minutes=offset_minutes,
        message=request.message,
        metadata=tuple(sorted(request.metadata)),
        user_names=tuple(sorted({**dict(theirs.user_names), **dict(ours.user_names)}.items())),
        group_names=tuple(sorted({**dict(theirs.group_names), **dict(ours.group_names)}.items())),
    )


def _summary(
    outcome: Outcome,
    branch: str,
    tip: ObjectId | None,
    theirs: ObjectId,
    commit: ObjectId | None,
    changes: Sequence[Change],
    result: RestoreResult | None,
    conflicts: tuple[ConflictInfo, ...] = (),
    stash: str | None = None,
) -> MergeSummary:
    return MergeSummary(
        outcome=outcome,
        branch=branch,
        ours=tip,
        theirs=theirs,
        commit=commit,
        conflicts=conflicts,
        changes=tuple(changes),
        stash=stash,
        files_written=result.files_written if result else 0,
        files_removed=result.names_removed if result else 0,
        bytes_written=result.bytes_written if result else 0,
        withheld=tuple(result.withheld) if result else (),
        unapplied=tuple(result.unapplied) if result else (),
    )


# --- merging trees -----------------------------------------------------------------------------


def merge_roots(
    store: Store,
    dot: DotId,
    base: Entry | None,
    ours: Entry,
    theirs: Entry,
    writer: PackWriter,
    favour: Side | None = None,
) -> MergedTree:
    """The pure three-way merge of three root entries; written to `writer`, no tree is touched.

    Raises:
        DriverFailed; ObjectMissing, BadObject.
    """
    with open_bench(store.layout, writer) as bench:
        return merge_trees(writer, bench, _rules(store, favour or "beside"), base, ours, theirs)


def _rules(store: Store, policy: Policy) -> MergeRules:
    return MergeRules(
        drivers=merge_drivers(store.settings),
        unit_patterns=store.settings.merge_units,
        policy=policy,
        renames=policy != "absent",
    )


def _merge_commits(
    store: Store,
    dot: DotId,
    writer: PackWriter,
    request: MergeRequest,
    tip: ObjectId,
    bases: tuple[ObjectId, ...],
) -> MergedTree:
    with open_bench(store.layout, writer) as bench:
        base, undecided = _base_root(store, dot, writer, bench, bases)
        ours, theirs = store.root(dot, tip), store.root(dot, request.theirs)
        rules = replace(_rules(store, request.favour or "beside"), undecided=undecided)
        return merge_trees(writer, bench, rules, base, ours, theirs)


def _base_root(
    store: Store, dot: DotId, writer: PackWriter, bench: Bench, bases: tuple[ObjectId, ...]
) -> tuple[Entry | None, frozenset[bytes]]:
    """The base, and the paths at which the bases it is made of disagree."""
    rules = _rules(store, "absent")
    undecided: set[bytes] = set()

    def merge(base: Entry | None, ours: Entry, theirs: Entry) -> Entry:
        careful = replace(rules, undecided=frozenset(undecided))
        merged = merge_trees(writer, bench, careful, base, ours, theirs)
        undecided.update(merged.undecided)
        return merged.root

    def root_of(commit: ObjectId) -> Entry:
        _refuse_absent(store, dot, [commit])
        return store.root(dot, commit)

    base = virtual_base(store.catalog.graph(dot), bases, root_of, merge)
    return base, frozenset(undecided)


# --- ending ------------------------------------------------------------------------------------


def continue_merge(
    store: Store,
    dot: DotRow,
    message: str | None = None,
    progress: Progress | None = None,
    *,
    dry_run: bool = False,
) -> MergeSummary:
    """Conclude the merge under way: commit what the tree holds with the merge's parents, or for
    one without parents leave it uncommitted in the tree.

    Raises:
        NotFound: no merge is under way. MergeConflict: conflicts are open.
        As engine.commits.commit.
    """
    from dmsync.engine.commit_deltas import commit_changes
    from dmsync.engine.commits import CommitRequest, commit

    branch = store.catalog.head(dot.dot)
    row = require_merge(store, dot.dot, branch)
    refuse_open_conflicts(store, dot.dot, branch)
    if row.parents:
        made = commit(store, dot, CommitRequest(message or row.message, dry_run=dry_run), progress)
        changes = made.changes
        if changes is None:
            assert made.commit is not None, "a dry run has them all"
            changes = commit_changes(store, dot.dot, made.commit)
        return MergeSummary(
            "merged", branch, row.ours, row.theirs, made.commit, changes=tuple(changes)
        )
    if not dry_run:
        with switching.ready(store, dot.dot, progress):
            refuse_open_conflicts(store, dot.dot, branch)
            with store.transaction(f"{row.kind} --continue") as tx:
                tx.append(MergeEnded(dot.dot, branch, "concluded"))
    return MergeSummary("applied", branch, row.ours, row.theirs, row.ours)


def abort_merge(
    store: Store,
    dot: DotRow,
    progress: Progress | None = None,
    *,
    in_use: bool = False,
    dry_run: bool = False,
) -> MergeSummary:
    """Give the merge under way up: the tree becomes the branch's tip again; what it held is kept
    as a stash.

    Raises:
        NotFound: no merge is under way. WouldLose: the tree is in use, or cannot be read.
    """
    with switching.ready(store, dot.dot, progress):
        branch = store.catalog.head(dot.dot)
        row = require_merge(store, dot.dot, branch)
        tip = trees.branch_tip(store, dot.dot, branch)
        place = trees.require_place(store, dot.dot, branch)
        trees.check_place(store, dot.dot, place, accept_moved=False)
        if dry_run:
            changes = trees.changes_towards(store, dot.dot, place, store.root(dot.dot, tip))
            return MergeSummary(
                "nothing", branch, row.ours, row.theirs, None, changes=tuple(changes)
            )
        events: list[Event] = []
        stash = None
        saved = switching.save_working(store, dot.dot, place, f"{row.kind} abort", progress)
        if saved is not None:
            stash, events = switching.stash_events(store, dot.dot, saved, f"{row.kind}-abort")
        events.append(MergeEnded(dot.dot, branch, "aborted"))
        result = switching.switch_tree(
            store,
            dot.dot,
            branch=branch,
            target=tip,
            events=events,
            command=f"{row.kind} --abort",
            in_use=in_use,
            progress=progress,
        )
    return _summary("nothing", branch, row.ours, row.theirs, tip, (), result, stash=stash)
