"""Checkout that takes the uncommitted changes along, instead of leaving them with their branch."""

from dataclasses import dataclass

from dmsync.core.events import (
    Event,
    HeadSwitched,
    TreeSwitchStarted,
    WorkingDropped,
    WorkingSaved,
)
from dmsync.core.ids import DotId, ObjectId
from dmsync.core.objects import Entry
from dmsync.engine import switching, trees
from dmsync.engine.branches import (
    SwitchSummary,
    accept_place,
    branch_created,
    checkout,
    existing_tip,
    start_point,
    switched,
)
from dmsync.engine.differences import Change, tree_differences
from dmsync.engine.merging.lifecycle import merge_roots
from dmsync.engine.merging.state import refuse_merging
from dmsync.engine.progress import Progress
from dmsync.engine.store import Store
from dmsync.errors import MergeConflict, NotFound, UsageError, WouldLose
from dmsync.storage.catalog import DotRow
from dmsync.storage.pack_writer import PackWriter

_PATHS_SHOWN = 3


@dataclass(frozen=True)
class CarryRequest:
    """What a user asks of `dm checkout --carry`."""

    branch: str
    create: bool = False
    revision: str | None = None
    accept_moved_tree: bool = False
    trusted: bool = False
    in_use: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class _Carried:
    """`held` is the state of the tree of `head`, `target` what the other branch's tree will be:
    snapshots on the branches' tips. `changes` lead from one to the other (dry run)."""

    head: str
    old_tip: ObjectId
    tip: ObjectId
    held: ObjectId
    target: ObjectId
    changes: tuple[Change, ...]


def checkout_carrying(
    store: Store, dot: DotRow, request: CarryRequest, progress: Progress | None = None
) -> SwitchSummary:
    """Make `branch` the current one, with the uncommitted changes of the branch that is left as
    its own; that branch has none any more.

    Where the tips differ the changes are merged in, all or nothing.

    Raises:
        MergeConflict: they do not fit there, or a merge is under way; nothing was changed.
        WouldLose: the other branch has uncommitted changes itself, or a tree is in use.
        RevisionNotFound, AlreadyExists (with `create`), CaptureFailed.
    """
    with switching.ready(store, dot.dot, progress):
        head = store.catalog.head(dot.dot)
        refuse_merging(store, dot.dot, head)
        if request.revision is not None and not request.create:
            raise UsageError("a start point goes with -b: dm checkout -b BRANCH --carry REV")
        if request.create:
            tip: ObjectId | None = start_point(store, dot, request.branch, request.revision)
        else:
            tip = existing_tip(store, dot, request.branch, head)
        place = trees.place_of(store, dot.dot, head)
        if request.branch != head and place is not None and tip is not None:
            if not request.dry_run:
                accept_place(store, dot, place, request.accept_moved_tree)
            _refuse_occupied(store, dot.dot, request.branch)
            carried = _prepare(store, dot.dot, request, place, tip, progress)
            if carried is not None and request.dry_run:
                return SwitchSummary(request.branch, tip, changes=carried.changes)
            if carried is not None:
                return _carry(store, dot, request, carried, progress)
    return checkout(
        store,
        dot,
        request.branch,
        create=request.create,
        revision=request.revision,
        accept_moved_tree=request.accept_moved_tree,
        trusted=request.trusted,
        in_use=request.in_use,
        dry_run=request.dry_run,
        progress=progress,
    )


def _refuse_occupied(store: Store, dot: DotId, branch: str) -> None:
    """Two uncommitted states cannot be one: the other branch must have none."""
    refuse_merging(store, dot, branch)
    place = None if store.catalog.tree(dot) is not None else trees.place_of(store, dot, branch)
    tip = trees.branch_tip(store, dot, branch)
    is_occupied = store.catalog.working(dot, branch) is not None or (
        place is not None and bool(trees.tree_changes(store, dot, place, store.root(dot, tip)))
    )
    if is_occupied:
        raise WouldLose(
            f"branch {branch} has uncommitted changes of its own",
            hint=f"dm checkout {branch} and commit or stash them first",
        )


def _prepare(
    store: Store,
    dot: DotId,
    request: CarryRequest,
    place: trees.TreePlace,
    tip: ObjectId,
    progress: Progress | None,
) -> _Carried | None:
    """Read the tree and fit its changes to the other branch; None when there are no changes.

    Stored and durable, but for a dry run. Raises MergeConflict.
    """
    head, old_tip = place.branch, trees.branch_tip(store, dot, place.branch)
    if old_tip is None:
        raise NotFound(
            f"branch {head} has no commits yet, so there is nothing its tree could go back to",
            hint='dm commit -m "MESSAGE" makes the first',
        )
    with store.objects(dot).writer() as writer:
        live = trees.capture(store, dot, place, writer, progress)
        switching.refuse_unreadable(live, "checkout")
        base = store.root(dot, old_tip)
        if live.root == base:
            return None
        held = switching.put_snapshot(store, writer, head, live.root, old_tip, "checkout")
        target, root = held, live.root
        if tip != old_tip:
            root = _fitted(store, dot, request, writer, base, store.root(dot, tip), live.root)
            message = f"uncommitted state carried from {head} to {request.branch}"
            target = switching.put_snapshot(
                store, writer, request.branch, root, tip, "checkout", message
            )
        changes = tree_differences(writer, live.root, root) if request.dry_run else []
        if not request.dry_run:
            writer.seal()
    if not request.dry_run:
        live.stat_cache.save(place.stat_path)
    return _Carried(head, old_tip, tip, held, target, tuple(changes))


def _fitted(
    store: Store,
    dot: DotId,
    request: CarryRequest,
    writer: PackWriter,
    base: Entry,
    there: Entry,
    live: Entry,
) -> Entry:
    """The other branch's tree with the changes from `base` to `live` in it."""
    merged = merge_roots(store, dot, base, there, live, writer)
    if merged.conflicts:
        paths = [conflict.path for conflict in merged.conflicts]
        named = ", ".join(p.decode("utf-8", "backslashreplace") for p in paths[:_PATHS_SHOWN])
        raise MergeConflict(
            f"the uncommitted changes do not fit branch {request.branch}: {named}"
            + (", ..." if len(paths) > _PATHS_SHOWN else ""),
            hint="commit them here and merge or cherry-pick the commit there",
            paths=len(paths),
        )
    return merged.root


def _carry(
    store: Store,
    dot: DotRow,
    request: CarryRequest,
    carried: _Carried,
    progress: Progress | None,
) -> SwitchSummary:
    head, tip, old_tip = carried.head, carried.tip, carried.old_tip
    events: list[Event] = [
        WorkingSaved(dot.dot, head, carried.held, "checkout --carry"),
        WorkingDropped(dot.dot, head),
    ]
    if request.create:
        events.append(branch_created(store, dot.dot, request.branch, tip))
    events.append(HeadSwitched(dot.dot, request.branch))
    is_managed = store.catalog.tree(dot.dot) is None
    if is_managed:
        switching.check_switch(store, dot.dot, head, old_tip, in_use=request.in_use)
        events.append(TreeSwitchStarted(dot.dot, head, carried.held, old_tip, "checkout"))
    result = switching.switch_new_tree(
        store,
        dot.dot,
        branch=request.branch,
        tip=tip,
        target=carried.target,
        events=events,
        command="checkout",
        trusted=request.trusted,
        in_use=request.in_use,
        progress=progress,
    )
    if is_managed:
        switching.complete_switch(
            store,
            dot.dot,
            head,
            old_tip,
            command="checkout",
            trusted=request.trusted,
            progress=progress,
        )
    return switched(request.branch, tip, None, result)
