"""Working trees that come back when an operation is taken back.

What a tree held before an operation stands in the operation: a snapshot it stored, else the commit
that TreeSwitchStarted left. What the tree holds now, beyond what the operation left in it, is
stored first; whoever takes this taking back brings that back.
"""

from dataclasses import dataclass, replace
from typing import Final

from dmsync.core.events import (
    DotCreated,
    DotDeleted,
    DotRestored,
    Event,
    HeadSwitched,
    Operation,
    RefChanged,
    TreeAttached,
    TreeDetached,
    TreeSwitchStarted,
    WorkingDropped,
    WorkingSaved,
)
from dmsync.core.ids import DotId, ObjectId
from dmsync.core.objects import commit_from_bytes
from dmsync.engine import switching, trees
from dmsync.engine.progress import Progress
from dmsync.engine.restore import RestoreResult
from dmsync.engine.store import Store
from dmsync.engine.tree_users import refuse_in_use
from dmsync.errors import CannotUndo, ContentAbsent, ObjectMissing
from dmsync.storage.catalog import Transaction

_BRANCH: Final = "branch/"
OWN_REASONS: Final = frozenset({"undo", "redo", "op-restore"})
"""Reasons of switches whose `from_commit` says exactly what the tree held; a WorkingSaved beside
them is about another moment."""


@dataclass(frozen=True)
class TreeReturn:
    """One tree: what the operation left in it and what it held before. `branch_now` is whose tree
    it is, `branch_then` whose it will be (the same but for an attached directory).

    `is_gone`: the operation removed the managed tree; it is made again.
    """

    dot: DotId
    branch_now: str
    branch_then: str
    left: ObjectId | None
    before: ObjectId | None
    is_gone: bool = False


@dataclass(frozen=True)
class HeldTree:
    """A tree that will be switched, or dropped with its branch (`target` is None and `is_dropped`).

    `held` is what it holds now; `is_new` when that is a snapshot stored just now.
    """

    dot: DotId
    branch_now: str
    branch_then: str
    held: ObjectId | None
    is_new: bool
    target: ObjectId | None
    is_dropped: bool = False


def trees_to_return(store: Store, operation: Operation) -> list[TreeReturn]:
    """The trees that an operation switched or removed; none of dots it made, deleted or moved."""
    moved = (DotCreated, DotDeleted, DotRestored, TreeAttached, TreeDetached)
    excluded = {event.dot for event in operation.events if isinstance(event, moved)}
    found: dict[tuple[DotId, str], TreeReturn] = {}
    for event in operation.events:
        if isinstance(event, TreeSwitchStarted) and event.dot not in excluded:
            if event.discarded and not _moves_branch(operation, event.dot):
                continue  # what it gave up is gone; what it left uncommitted is all there is
            key = (event.dot, "" if _is_attached(store, event.dot) else event.branch)
            first = found.get(key)
            if first is not None:
                found[key] = replace(first, left=event.to_root_commit, branch_now=event.branch)
            else:
                found[key] = _switched(store, operation, event)
    for event in operation.events:
        if isinstance(event, RefChanged) and event.dot not in excluded:
            gone = _removed(store, operation, event)
            if gone is not None and (gone.dot, gone.branch_then) not in found:
                found[gone.dot, gone.branch_then] = gone
    return list(found.values())


def _moves_branch(operation: Operation, dot: DotId) -> bool:
    return any(
        (isinstance(event, RefChanged) and event.dot == dot and event.name.startswith(_BRANCH))
        or (isinstance(event, HeadSwitched) and event.dot == dot)
        for event in operation.events
    )


def _is_attached(store: Store, dot: DotId) -> bool:
    return store.catalog.tree(dot) is not None


def _switched(store: Store, operation: Operation, event: TreeSwitchStarted) -> TreeReturn:
    then = event.branch
    if _is_attached(store, event.dot):
        heads = [e for e in operation.events if isinstance(e, HeadSwitched) and e.dot == event.dot]
        then = heads[0].old or then if heads else then
    before = _kept(store, operation, event.dot, then)
    if before is None and event.reason not in OWN_REASONS:
        before = _saved(operation, event.dot, then)
    if before is None:
        before = event.from_commit or _former_tip(operation, event)
    return TreeReturn(event.dot, event.branch, then, event.to_root_commit, before)


def _former_tip(operation: Operation, event: TreeSwitchStarted) -> ObjectId | None:
    """Pulls and received pushes record the move of the branch alone."""
    for change in operation.events:
        if isinstance(change, RefChanged) and (change.dot, change.name) == (
            event.dot,
            _BRANCH + event.branch,
        ):
            return change.old
    return None


def _removed(store: Store, operation: Operation, event: RefChanged) -> TreeReturn | None:
    """A managed tree with uncommitted changes that went with its branch."""
    is_deletion = event.name.startswith(_BRANCH) and event.new is None and event.old is not None
    if not is_deletion or _is_attached(store, event.dot):
        return None
    branch = event.name.removeprefix(_BRANCH)
    kept = _kept(store, operation, event.dot, branch)
    if kept is None:
        kept = _saved(operation, event.dot, branch)
    if kept is None or trees.place_of(store, event.dot, branch) is not None:
        return None
    return TreeReturn(event.dot, branch, branch, event.old, kept, is_gone=True)


def _kept(store: Store, operation: Operation, dot: DotId, branch: str) -> ObjectId | None:
    """The snapshot of that branch's tree which the operation stored under a name."""
    for event in operation.events:
        if not isinstance(event, RefChanged) or (event.dot, event.kind) != (dot, "stash"):
            continue
        is_made = event.old is None and event.new is not None
        if is_made and event.new and _is_of_branch(store, event, event.new, branch):
            return event.new
    return None


def _saved(operation: Operation, dot: DotId, branch: str) -> ObjectId | None:
    """The snapshot that a checkout stored as the uncommitted state of the branch it left, or an
    undo as what the tree that went held."""
    for event in operation.events:
        if isinstance(event, WorkingSaved) and (event.dot, event.branch) == (dot, branch):
            return event.commit
    return None


def _is_of_branch(store: Store, event: RefChanged, snapshot: ObjectId, branch: str) -> bool:
    if event.origin is not None:
        return event.origin == branch
    commit = commit_from_bytes(store.objects(event.dot).read_commit(snapshot), trusted=True)
    return dict(commit.metadata).get(switching.SNAPSHOT_BRANCH, branch) == branch


# --- before anything is recorded ----------------------------------------------------------------


def hold(
    store: Store, wanted: TreeReturn, *, reason: str, in_use: bool, progress: Progress | None
) -> HeldTree | None:
    """Store what the tree holds now and see that it can be switched; None when it stays as it is.

    Raises:
        CannotUndo: an attached directory holds another branch now, or the content is gone.
        CaptureFailed, Corruption, StorageFull, WouldLose: as for every switch.
    """
    _refuse_absent(store, wanted)
    pending = switching.pending_switch(store, wanted.dot, wanted.branch_now)
    may_stay = wanted.branch_now == wanted.branch_then and pending is None
    if may_stay and not wanted.is_gone and _same(store, wanted.dot, wanted.before, wanted.left):
        return None  # the operation left the tree as it was
    place = trees.place_of(store, wanted.dot, wanted.branch_now)
    if place is None:
        held, is_new = _without_place(store, wanted), False
    else:
        trees.check_place(store, wanted.dot, place, accept_moved=False)
        tip = trees.branch_tip(store, wanted.dot, wanted.branch_now)
        known = (wanted.left, tip, wanted.before)
        held = switching.save_held(store, wanted.dot, place, known, reason, progress)
        is_new = held not in known
    if may_stay and _same(store, wanted.dot, held, wanted.before):
        return None
    if place is not None:
        switching.check_switch(store, wanted.dot, wanted.branch_then, wanted.before, in_use=in_use)
    return HeldTree(wanted.dot, wanted.branch_now, wanted.branch_then, held, is_new, wanted.before)


def _without_place(store: Store, wanted: TreeReturn) -> ObjectId | None:
    attached = store.catalog.tree(wanted.dot)
    if attached is not None:
        raise CannotUndo(
            f"the directory holds branch {attached.branch} now, not {wanted.branch_now}",
            hint=f"dm checkout {wanted.branch_now} first",
            expected=wanted.branch_now,
            actual=attached.branch,
        )
    return wanted.left


def _refuse_absent(store: Store, wanted: TreeReturn) -> None:
    commit = wanted.before
    if commit is None:
        return
    known = store.catalog.has_commit(wanted.dot, commit)
    try:
        is_absent = known and store.catalog.is_hollow(wanted.dot, commit)
        trees.snapshot_root(store, wanted.dot, commit)
    except (ContentAbsent, ObjectMissing):
        is_absent = True
    if is_absent:
        raise CannotUndo(
            f"what the tree of {wanted.branch_then} held ({commit.hex()[:12]}) has been pruned",
            commit=commit.hex(),
        )


def _same(store: Store, dot: DotId, one: ObjectId | None, other: ObjectId | None) -> bool:
    return one == other or (
        trees.snapshot_root(store, dot, one) == trees.snapshot_root(store, dot, other)
    )


def left_in(operation: Operation, dot: DotId, branch: str) -> tuple[ObjectId, ...]:
    """What the operation left in the tree of a branch, if it switched it."""
    return tuple(
        event.to_root_commit
        for event in operation.events
        if isinstance(event, TreeSwitchStarted)
        and (event.dot, event.branch) == (dot, branch)
        and event.to_root_commit is not None
    )[-1:]


def hold_dropped(
    store: Store,
    dot: DotId,
    branch: str,
    *,
    known: tuple[ObjectId, ...] = (),
    reason: str,
    in_use: bool,
    progress: Progress | None,
) -> HeldTree | None:
    """Store what the managed tree of a branch that is about to go holds, unless it is that of a
    `known` snapshot or the branch's tip; None without a tree.

    Raises:
        WouldLose: something in it cannot be read, or processes are writing in it.
    """
    place = trees.place_of(store, dot, branch)
    if place is None or place.attached:
        return None
    if not in_use:
        refuse_in_use(place.path)
    tip = trees.branch_tip(store, dot, branch)
    if store.catalog.working(dot, branch) is not None:
        known = ()  # append_stash notes a known snapshot there
    held = switching.save_held(store, dot, place, (tip, *known), reason, progress)
    is_new = held not in (tip, *known)
    return HeldTree(dot, branch, branch, held, is_new, None, is_dropped=True)


# --- recording and doing -------------------------------------------------------------------------


def append_stash(store: Store, tx: Transaction, tree: HeldTree, what: str) -> str | None:
    """Name what the tree held beyond what is known, if anything; returns the ref.

    A snapshot that a dropped tree held, and that is known, is noted without a name.
    """
    if tree.held is None:
        return None
    if not tree.is_new:
        if tree.is_dropped and tree.held != trees.branch_tip(store, tree.dot, tree.branch_now):
            tx.append(WorkingSaved(tree.dot, tree.branch_now, tree.held, what))
            tx.append(WorkingDropped(tree.dot, tree.branch_now))
        return None
    name, events = switching.stash_events(store, tree.dot, tree.held, what)
    for event in events:
        tx.append(_of_branch(event, tree.branch_now))
    return name


def _of_branch(event: Event, branch: str) -> Event:
    """A stash says by its origin whose tree it was: one operation may store several."""
    return replace(event, origin=branch) if isinstance(event, RefChanged) else event


def append_switch(tx: Transaction, tree: HeldTree, what: str) -> None:
    """Record that the tree is about to be switched."""
    if not tree.is_dropped:
        tx.append(TreeSwitchStarted(tree.dot, tree.branch_then, tree.held, tree.target, what))


def carry_out(
    store: Store,
    tree: HeldTree,
    what: str,
    *,
    trusted: bool = False,
    progress: Progress | None = None,
) -> RestoreResult | None:
    """Do what `append_switch` recorded; trees.settle_places drops the others."""
    if tree.is_dropped:
        return None
    if not _is_attached(store, tree.dot):
        switching.make_place(store, tree.dot, tree.branch_then, progress)
    return switching.complete_switch(
        store,
        tree.dot,
        tree.branch_then,
        tree.target,
        command=what,
        trusted=trusted,
        progress=progress,
    )
