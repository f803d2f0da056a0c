"""Branches: list, make, delete, rename, check out, reset."""

from itertools import takewhile

from dmsync.core.events import (
    BranchRenamed,
    Event,
    HeadSwitched,
    MergeEnded,
    RefChanged,
    TreeSwitchFinished,
    WorkingDropped,
    WorkingSaved,
)
from dmsync.core.graph import ancestors_difference, descending, reaching_tips
from dmsync.core.ids import DotId, ObjectId
from dmsync.core.names import check_branch_name
from dmsync.core.values import plain_value_type
from dmsync.engine import switching, trees
from dmsync.engine.differences import Change, tree_differences
from dmsync.engine.merging.state import refuse_merging
from dmsync.engine.progress import Progress
from dmsync.engine.restore import RestoreResult
from dmsync.engine.revision_lookup import resolve_revision
from dmsync.engine.store import Store
from dmsync.errors import AlreadyExists, NotFound, RevisionNotFound, UsageError, WouldLose
from dmsync.storage.catalog import DotRow


@plain_value_type
class BranchSummary:
    """One branch; `tip` is None when unborn, `commits` counts those reachable from it (None when
    nobody asked)."""

    name: str
    tip: ObjectId | None
    current: bool
    commits: int | None
    origin: str | None


@plain_value_type
class BranchFilter:
    """Which branches to list, by revisions; all that are given must hold.

    A branch contains a commit that its tip can reach, and is merged into one that can reach its
    tip. An unborn branch passes no filter.
    """

    contains: str | None = None
    lacks: str | None = None
    merged_into: str | None = None
    not_merged_into: str | None = None


@plain_value_type
class SwitchSummary:
    """What a checkout or reset did, or with a dry run would do (`changes`, against the tree)."""

    branch: str
    commit: ObjectId | None
    commits_dropped: int = 0
    stash: str | None = None
    """The ref that keeps what the tree held beyond the tip (reset)."""
    files_written: int = 0
    files_removed: int = 0
    bytes_written: int = 0
    changes: tuple[Change, ...] = ()
    withheld: tuple[bytes, ...] = ()
    """Devices that were recorded but not made, for want of trust or rights."""
    unapplied: tuple[bytes, ...] = ()
    """Paths whose owner, setuid, capability or attributes were recorded but not applied."""


def list_branches(
    store: Store, dot: DotRow, wanted: BranchFilter | None = None, *, count: bool = False
) -> list[BranchSummary]:
    """Branches by name; the unborn current one included. `count` tells of how many commits.

    Raises as `resolve_revision`.
    """
    head = store.catalog.head(dot.dot)
    rows = {row.short_name: row for row in store.catalog.branches(dot.dot)}
    tips = {name: row.target for name, row in rows.items()}
    names = {*rows, head}
    if wanted is not None:
        names = _passing(store, dot, wanted, tips)
    counts = _commit_counts(
        store, dot.dot, {n: tips[n] for n in names if n in tips} if count else {}
    )
    found = []
    for name in sorted(names):
        origin = rows[name].origin if name in rows else None
        commits = counts.get(name, 0) if count else None
        found.append(BranchSummary(name, tips.get(name), name == head, commits, origin))
    return found


def _passing(
    store: Store, dot: DotRow, wanted: BranchFilter, tips: dict[str, ObjectId]
) -> set[str]:
    names = set(tips)
    if wanted.contains is not None:
        names &= _containing(store, dot, wanted.contains, tips)
    if wanted.lacks is not None:
        names -= _containing(store, dot, wanted.lacks, tips)
    if wanted.merged_into is not None:
        names &= _merged(store, dot, wanted.merged_into, tips)
    if wanted.not_merged_into is not None:
        names -= _merged(store, dot, wanted.not_merged_into, tips)
    return names


def _containing(store: Store, dot: DotRow, revision: str, tips: dict[str, ObjectId]) -> set[str]:
    """Branches that can reach the commit: one walk from all tips down to its generation."""
    commit = resolve_revision(store, dot, revision)
    graph = store.catalog.graph(dot.dot)
    lowest = graph.generation(commit)
    for found, mask in reaching_tips(graph, list(tips.values())):
        if found == commit:
            return {name for number, name in enumerate(tips) if mask >> number & 1}
        if graph.generation(found) < lowest:
            break
    return set()


def _merged(store: Store, dot: DotRow, revision: str, tips: dict[str, ObjectId]) -> set[str]:
    """Branches whose tip the commit can reach: one walk from it down to the lowest tip."""
    commit = resolve_revision(store, dot, revision)
    graph = store.catalog.graph(dot.dot)
    lowest = min(map(graph.generation, tips.values()), default=0)
    reached = takewhile(lambda oid: graph.generation(oid) >= lowest, descending(graph, [commit]))
    merged = set(tips.values()).intersection(reached)
    return {name for name, tip in tips.items() if tip in merged}


def _commit_counts(store: Store, dot: DotId, tips: dict[str, ObjectId]) -> dict[str, int]:
    """Numbers of commits reachable from each tip."""
    graph = store.catalog.graph(dot)
    return {name: graph.reachable_count(tip) for name, tip in tips.items()}


def commit_count(store: Store, dot: DotId, tip: ObjectId) -> int:
    """Number of commits reachable from `tip`, itself included."""
    return store.catalog.graph(dot).reachable_count(tip)


def create_branch(store: Store, dot: DotRow, name: str, revision: str | None) -> ObjectId:
    """Make a branch at `revision` (default HEAD). Raises AlreadyExists, RevisionNotFound."""
    tip = start_point(store, dot, name, revision)
    with store.transaction("branch") as tx:
        tx.append(branch_created(store, dot.dot, name, tip))
    return tip


def start_point(store: Store, dot: DotRow, name: str, revision: str | None) -> ObjectId:
    """Where the new branch `name` begins. Raises InvalidName, AlreadyExists, RevisionNotFound."""
    check_branch_name(name)
    if store.catalog.branch(dot.dot, name) is not None:
        raise AlreadyExists(f"Branch already exists: {name}")
    return resolve_revision(store, dot, revision or "HEAD")


def branch_created(store: Store, dot: DotId, name: str, tip: ObjectId) -> RefChanged:
    """The event that makes a branch, stemming from the current one."""
    head = store.catalog.head(dot)
    return RefChanged(dot, f"branch/{name}", None, tip, "create", "branch created", origin=head)


def delete_branch(store: Store, dot: DotRow, name: str) -> tuple[ObjectId, str | None]:
    """Delete a branch; returns its tip and the stash ref of its uncommitted state, if it had any.

    Its commits stay until gc.

    Raises:
        NotFound, WouldLose (it is the current branch).
    """
    row = store.catalog.branch(dot.dot, name)
    if row is None:
        raise RevisionNotFound(f"Branch does not exist: {name}")
    if store.catalog.head(dot.dot) == name:
        raise WouldLose(f"{name} is the current branch", hint="dm checkout another branch first")
    with switching.ready(store, dot.dot):
        events: list[Event] = []
        place = trees.place_of(store, dot.dot, name)
        saved = store.catalog.working(dot.dot, name)
        if saved is not None:
            events.append(WorkingDropped(dot.dot, name))
        if switching.pending_switch(store, dot.dot, name) is not None and place is not None:
            events.append(TreeSwitchFinished(dot.dot, name))
        if place is not None:
            saved = switching.save_working(store, dot.dot, place, "branch deletion", None)
        stash = _stash(store, dot, saved, "branch-deletion", events)
        if store.catalog.merge(dot.dot, name) is not None:
            events.append(MergeEnded(dot.dot, name, "aborted"))
        events.append(
            RefChanged(dot.dot, f"branch/{name}", row.target, None, "delete", "branch deleted")
        )
        with store.transaction("branch") as tx:
            for event in events:
                tx.append(event)
        if place is not None and not place.attached:
            trees.discard_place(store, dot.dot, place)
    return row.target, stash


def _stash(
    store: Store, dot: DotRow, snapshot: ObjectId | None, what: str, events: list[Event]
) -> str | None:
    """Add to `events` what keeps a snapshot under a name; returns the name."""
    if snapshot is None:
        return None
    name, kept = switching.stash_events(store, dot.dot, snapshot, what)
    events.extend(kept)
    return name


def rename_branch(store: Store, dot: DotRow, old: str, new: str) -> None:
    """Rename a branch, its tree and its reflog. Raises NotFound, AlreadyExists."""
    check_branch_name(new)
    if store.catalog.branch(dot.dot, old) is None:
        raise RevisionNotFound(f"Branch does not exist: {old}")
    if store.catalog.branch(dot.dot, new) is not None:
        raise AlreadyExists(f"Branch already exists: {new}")
    with switching.ready(store, dot.dot):
        place = trees.place_of(store, dot.dot, old)
        with store.transaction("branch") as tx:
            tx.append(BranchRenamed(dot.dot, old, new))
        if place is not None:
            trees.rename_place(store, dot.dot, place, new)


def checkout(
    store: Store,
    dot: DotRow,
    branch: str,
    *,
    create: bool = False,
    revision: str | None = None,
    discard: bool = False,
    accept_moved_tree: bool = False,
    trusted: bool = False,
    in_use: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> SwitchSummary:
    """Make `branch` the current one.

    An attached directory is switched to it: the state left behind is stored as the old branch's
    working snapshot (unless `discard`) and the new branch's own snapshot, if any, comes back. A
    managed dot has a tree per branch, so only a missing one is written.

    Raises:
        RevisionNotFound, AlreadyExists (with `create`).
    """
    is_attached = store.catalog.tree(dot.dot) is not None
    with switching.ready(store, dot.dot, progress, finish=not is_attached):
        head = store.catalog.head(dot.dot)
        refuse_merging(store, dot.dot, head)
        pending = switching.pending_switch(store, dot.dot, head)
        events: list[Event] = []
        if create:
            tip: ObjectId | None = start_point(store, dot, branch, revision)
            assert tip is not None
            events.append(branch_created(store, dot.dot, branch, tip))
        else:
            if revision is not None:
                raise UsageError("a start point goes with -b: dm checkout -b BRANCH REV")
            tip = existing_tip(store, dot, branch, head)
        target = store.catalog.working(dot.dot, branch) or tip
        if dry_run:
            return SwitchSummary(branch, tip, changes=_would_change(store, dot, head, target))
        if branch == head and pending is None:
            switching.make_place(store, dot.dot, branch, progress)
            return SwitchSummary(branch, tip)
        events.append(HeadSwitched(dot.dot, branch))
        if not is_attached:
            with store.transaction("checkout") as tx:
                for event in events:
                    tx.append(event)
            switching.make_place(store, dot.dot, branch, progress)
            switching.finish_switch(store, dot.dot, progress)
            return SwitchSummary(branch, tip)
        place = trees.require_place(store, dot.dot, head)
        accept_place(store, dot, place, accept_moved_tree)
        saved = None
        if pending is not None:
            switching.stash_found(store, dot.dot, pending, progress)
        elif not discard:
            saved = switching.save_working(store, dot.dot, place, "checkout", progress)
        if saved is not None:
            events.insert(0, WorkingSaved(dot.dot, head, saved, "checkout"))
        if target != tip:
            events.append(WorkingDropped(dot.dot, branch))
        result = switching.switch_tree(
            store,
            dot.dot,
            branch=branch,
            target=target,
            events=events,
            command="checkout",
            discarded=discard,
            trusted=trusted,
            in_use=in_use,
            progress=progress,
        )
    return switched(branch, tip, None, result)


def accept_place(store: Store, dot: DotRow, place: trees.TreePlace, accept_moved: bool) -> None:
    """Check that the attached directory is the recorded one, or take the one that is there."""
    if accept_moved:
        trees.record_moved(store, dot.dot, place)
    trees.check_place(store, dot.dot, place, accept_moved=accept_moved)


def existing_tip(store: Store, dot: DotRow, branch: str, head: str) -> ObjectId | None:
    """Tip of a branch to check out; only the current one may be unborn. Raises RevisionNotFound."""
    row = store.catalog.branch(dot.dot, branch)
    if row is None and branch != head:
        raise RevisionNotFound(
            f"Branch does not exist: {branch}", hint=f"dm checkout -b {branch} makes it"
        )
    return None if row is None else row.target


def switched(
    branch: str,
    commit: ObjectId | None,
    stash: str | None,
    result: RestoreResult | None,
    dropped: int = 0,
) -> SwitchSummary:
    """What a switch did, told from the result of its restore."""
    if result is None:
        return SwitchSummary(branch, commit, dropped, stash)
    return SwitchSummary(
        branch,
        commit,
        dropped,
        stash,
        result.files_written,
        result.names_removed,
        result.bytes_written,
        withheld=tuple(result.withheld),
        unapplied=tuple(result.unapplied),
    )


def _would_change(
    store: Store, dot: DotRow, branch: str, target: ObjectId | None
) -> tuple[Change, ...]:
    root = trees.snapshot_root(store, dot.dot, target)
    place = trees.place_of(store, dot.dot, branch)
    if place is None:
        before = store.root(dot.dot, trees.branch_tip(store, dot.dot, branch))
        return tuple(tree_differences(store.objects(dot.dot), before, root))
    return tuple(trees.changes_towards(store, dot.dot, place, root))


def reset(
    store: Store,
    dot: DotRow,
    revision: str,
    *,
    hard: bool = False,
    discard: bool = False,
    accept_moved_tree: bool = False,
    trusted: bool = False,
    in_use: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> SwitchSummary:
    """Move the current branch, and its tree, to `revision`.

    What the tree held beyond the tip is stored first (unless `discard`); the commits left behind
    stay in the store and in the reflog.

    Raises:
        WouldLose: uncommitted changes would go and `hard` was not given.
        MergeConflict: a merge is under way (which `hard` aborts).
        RevisionNotFound: no such commit.
    """
    with switching.ready(store, dot.dot, progress, finish=False):
        branch = store.catalog.head(dot.dot)
        tip = trees.branch_tip(store, dot.dot, branch)
        if tip is None:
            raise NotFound(f"branch {branch} has no commits yet")
        target = resolve_revision(store, dot, revision)
        graph = store.catalog.graph(dot.dot)
        dropped = sum(1 for _ in ancestors_difference(graph, [tip], [target]))
        if dry_run:
            changes = _would_change(store, dot, branch, target)
            return SwitchSummary(branch, target, dropped, changes=changes)
        if not hard:
            refuse_merging(store, dot.dot, branch)
        place = trees.place_of(store, dot.dot, branch)
        stash = None
        events: list[Event] = []
        if place is not None:
            accept_place(store, dot, place, accept_moved_tree)
            if not hard:
                _refuse_uncommitted(store, dot, place, tip)
            if not discard:
                saved = switching.save_working(store, dot.dot, place, "reset", progress)
                stash = _stash(store, dot, saved, "reset", events)
        if store.catalog.merge(dot.dot, branch) is not None:
            events.append(MergeEnded(dot.dot, branch, "aborted"))
        if target != tip:
            events.append(
                RefChanged(dot.dot, f"branch/{branch}", tip, target, "reset", f"reset {revision}")
            )
        result = switching.switch_tree(
            store,
            dot.dot,
            branch=branch,
            target=target,
            events=events,
            command="reset",
            discarded=discard,
            trusted=trusted,
            in_use=in_use,
            progress=progress,
        )
    return switched(branch, target, stash, result, dropped)


def _refuse_uncommitted(store: Store, dot: DotRow, place: trees.TreePlace, tip: ObjectId) -> None:
    changes = trees.tree_changes(store, dot.dot, place, store.root(dot.dot, tip))
    if changes:
        raise WouldLose(
            f"{len(changes)} uncommitted changes would go",
            hint="commit them, or use --hard (they are stored first and can be brought back)",
            paths=len(changes),
        )
