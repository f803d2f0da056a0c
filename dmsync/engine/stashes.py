"""Stashes: uncommitted states put away under names, and brought back.

A stash is a snapshot commit on the commit it was made from, named by a ref `stash/...`. Those that
other commands make of what they take away (reset, restore, ...) are stashes like any other.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from dmsync.core.events import Event, HeadSwitched, RefChanged, WorkingSaved
from dmsync.core.ids import DotId, ObjectId
from dmsync.core.names import check_branch_name
from dmsync.core.objects import Commit
from dmsync.engine import switching, trees
from dmsync.engine.differences import Change, tree_differences
from dmsync.engine.merging.lifecycle import MergeRequest, refuse_dirty, start_merge
from dmsync.engine.merging.state import ConflictInfo, refuse_merging
from dmsync.engine.progress import Progress
from dmsync.engine.restore import RestoreResult
from dmsync.engine.store import Store
from dmsync.errors import (
    AlreadyExists,
    NotFound,
    NothingToDo,
    RefConflict,
    RevisionNotFound,
    UsageError,
)
from dmsync.storage.catalog import DotRow

PREFIX: Final = "stash/"
_NAME_CHARACTERS_MAX: Final = 90
"""Of a branch in a stash's name, which also holds the time."""


@dataclass(frozen=True)
class Stash:
    """`number` counts from 0, the newest; `branch` is None for a stash of unknown origin. `parent`
    is the commit it was made on, None on an unborn branch. Times as in commits."""

    number: int
    name: str
    commit: ObjectId
    parent: ObjectId | None
    branch: str | None
    message: str
    time_ns: int
    offset_minutes: int


@dataclass(frozen=True)
class StashSummary:
    """What a command did with a stash, or would (dry run). `changes` are those of the working
    tree; with `conflicts` the tree is in a merge and the stash stays."""

    name: str
    commit: ObjectId
    branch: str
    changes: tuple[Change, ...] = ()
    conflicts: tuple[ConflictInfo, ...] = ()
    is_dropped: bool = False
    stash: str | None = None
    """What keeps the state of a tree that was left (for a branch from a stash)."""
    files_written: int = 0
    files_removed: int = 0
    bytes_written: int = 0
    withheld: tuple[bytes, ...] = ()
    unapplied: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class TreeWishes:
    """How a command may treat the working tree: see switching.switch_tree."""

    accept_moved_tree: bool = False
    trusted: bool = False
    in_use: bool = False


# --- which there are -----------------------------------------------------------------------------


def list_stashes(store: Store, dot: DotId) -> list[Stash]:
    """All stashes, the one this store learnt of last first."""
    rows = sorted(store.catalog.refs(dot, PREFIX), key=lambda row: -row.seq)
    return [
        _stash(number, row.name, row.target, store.commit(dot, row.target))
        for number, row in enumerate(rows)
    ]


def _stash(number: int, name: str, oid: ObjectId, commit: Commit) -> Stash:
    return Stash(
        number=number,
        name=name,
        commit=oid,
        parent=commit.parents[0] if commit.parents else None,
        branch=dict(commit.metadata).get(switching.SNAPSHOT_BRANCH),
        message=commit.message,
        time_ns=commit.time_ns,
        offset_minutes=commit.offset_minutes,
    )


def find_stash(store: Store, dot: DotId, text: str | None) -> Stash:
    """The stash that `text` names: a number, `stash@{N}`, the ref or its last part; None for the
    newest.

    Raises:
        RevisionNotFound.
    """
    stashes = list_stashes(store, dot)
    if not stashes:
        raise RevisionNotFound("there are no stashes", hint="dm stash push makes one")
    if text is None:
        return stashes[0]
    digits = text.removeprefix("stash@{").removesuffix("}")
    for stash in stashes:
        if text in (stash.name, stash.name.removeprefix(PREFIX)):
            return stash
        if (
            digits.isascii()
            and digits.isdigit()
            and digits.lstrip("0") == (str(stash.number).lstrip("0"))
        ):
            return stash
    raise RevisionNotFound(f"no stash {text}", hint="dm stash list shows them")


def stash_changes(store: Store, dot: DotRow, text: str | None) -> tuple[Stash, list[Change]]:
    """A stash and what it changes against the commit it was made on."""
    stash = find_stash(store, dot.dot, text)
    before, after = store.root(dot.dot, stash.parent), store.root(dot.dot, stash.commit)
    return stash, tree_differences(store.objects(dot.dot), before, after)


# --- putting away --------------------------------------------------------------------------------


def push_stash(
    store: Store,
    dot: DotRow,
    message: str,
    wishes: TreeWishes,
    progress: Progress | None = None,
    *,
    dry_run: bool = False,
) -> StashSummary:
    """Store the uncommitted state of the current branch's tree and make the tree its tip again,
    in one operation.

    Raises:
        NothingToDo: there are no uncommitted changes.
        NotFound: the branch has no commits. MergeConflict: a merge is under way.
        WouldLose: something cannot be read, or processes write in the tree.
    """
    with switching.ready(store, dot.dot, progress):
        branch, tip = _born_branch(store, dot.dot)
        refuse_merging(store, dot.dot, branch)
        place = trees.place_of(store, dot.dot, branch)
        if place is None:
            raise NothingToDo("no local changes: the branch has no working tree yet")
        if wishes.accept_moved_tree and not dry_run:
            trees.record_moved(store, dot.dot, place)
        trees.check_place(store, dot.dot, place, accept_moved=wishes.accept_moved_tree)
        if dry_run:
            found = trees.tree_changes(store, dot.dot, place, store.root(dot.dot, tip))
            if not found:
                raise NothingToDo("no local changes")
            return StashSummary("", tip, branch, tuple(found))
        saved = switching.save_working(store, dot.dot, place, "stash", progress, message.strip())
        if saved is None:
            raise NothingToDo("no local changes")
        changes = _between(store, dot.dot, tip, saved)
        what = branch[:_NAME_CHARACTERS_MAX]
        name, events = switching.stash_events(store, dot.dot, saved, what, _reason(message))
        result = switching.switch_tree(
            store,
            dot.dot,
            branch=branch,
            target=tip,
            events=events,
            command="stash",
            trusted=wishes.trusted,
            in_use=wishes.in_use,
            progress=progress,
        )
    return _summary(StashSummary(name, saved, branch, changes), result)


def _reason(message: str) -> str:
    return message.strip().partition("\n")[0][:200] or "stash push"


def _born_branch(store: Store, dot: DotId) -> tuple[str, ObjectId]:
    branch = store.catalog.head(dot)
    tip = trees.branch_tip(store, dot, branch)
    if tip is None:
        raise NotFound(
            f"branch {branch} has no commits yet", hint='dm commit -m "MESSAGE" makes the first'
        )
    return branch, tip


def _summary(summary: StashSummary, result: RestoreResult | None) -> StashSummary:
    if result is None:
        return summary
    return replace(
        summary,
        files_written=result.files_written,
        files_removed=result.names_removed,
        bytes_written=result.bytes_written,
        withheld=tuple(result.withheld),
        unapplied=tuple(result.unapplied),
    )


# --- bringing back -------------------------------------------------------------------------------


def apply_stash(
    store: Store,
    dot: DotRow,
    text: str | None,
    wishes: TreeWishes,
    progress: Progress | None = None,
    *,
    drop: bool = False,
    dry_run: bool = False,
) -> StashSummary:
    """Bring a stash back into the current branch's tree, uncommitted; with `drop` the stash goes
    when nothing conflicts.

    On the commit it was made from the tree simply becomes the stash's; elsewhere it is merged in
    (base: that commit), and conflicts are resolved and continued like those of any merge.

    Raises:
        RevisionNotFound: no such stash.
        WouldLose: the tree has uncommitted changes, or processes write in it.
        MergeConflict: another merge is under way.
    """
    stash = find_stash(store, dot.dot, text)
    dropped = (_dropped(dot.dot, stash, "stash popped"),) if drop else ()
    branch, tip = _born_branch(store, dot.dot)
    if tip != stash.parent:
        return _merge(store, dot, stash, dropped, wishes, progress, dry_run=dry_run)
    with switching.ready(store, dot.dot, progress):
        refuse_merging(store, dot.dot, branch)
        if _born_branch(store, dot.dot) != (branch, tip):
            raise RefConflict(f"branch {branch} moved meanwhile", hint="try again")
        place = switching.make_place(store, dot.dot, branch, progress)
        if wishes.accept_moved_tree and not dry_run:
            trees.record_moved(store, dot.dot, place)
        refuse_dirty(store, dot.dot, branch, in_use=wishes.in_use, command="stash pop")
        changes = _between(store, dot.dot, tip, stash.commit)
        summary = StashSummary(stash.name, stash.commit, branch, changes, (), drop)
        if dry_run:
            return summary
        result = switching.switch_tree(
            store,
            dot.dot,
            branch=branch,
            target=stash.commit,
            events=dropped,
            command="stash",
            trusted=wishes.trusted,
            in_use=wishes.in_use,
            progress=progress,
        )
    return _summary(summary, result)


def _between(store: Store, dot: DotId, old: ObjectId, new: ObjectId) -> tuple[Change, ...]:
    """Changes that lead from one commit or snapshot to another."""
    roots = (trees.snapshot_root(store, dot, commit) for commit in (old, new))
    return tuple(tree_differences(store.objects(dot), *roots))


def _dropped(dot: DotId, stash: Stash, reason: str) -> RefChanged:
    return RefChanged(dot, stash.name, stash.commit, None, "delete", reason)


def _merge(
    store: Store,
    dot: DotRow,
    stash: Stash,
    dropped: Sequence[Event],
    wishes: TreeWishes,
    progress: Progress | None,
    *,
    dry_run: bool,
) -> StashSummary:
    request = MergeRequest(
        kind="stash-pop",
        theirs=stash.commit,
        bases=() if stash.parent is None else (stash.parent,),
        parents=(),
        message=stash.message,
        events_when_clean=tuple(dropped),
        trusted=wishes.trusted,
        in_use=wishes.in_use,
        dry_run=dry_run,
    )
    merged = start_merge(store, dot, request, progress)
    return StashSummary(
        name=stash.name,
        commit=stash.commit,
        branch=merged.branch,
        changes=merged.changes,
        conflicts=merged.conflicts,
        is_dropped=bool(dropped) and not merged.conflicts,
        withheld=merged.withheld,
        unapplied=merged.unapplied,
    )


def drop_stash(store: Store, dot: DotRow, text: str, *, dry_run: bool = False) -> Stash:
    """Give a stash up; undo brings it back until gc. Raises RevisionNotFound."""
    stash = find_stash(store, dot.dot, text)
    if not dry_run:
        with store.transaction("stash") as tx:
            tx.append(_dropped(dot.dot, stash, "stash dropped"))
    return stash


def branch_stash(
    store: Store,
    dot: DotRow,
    name: str,
    text: str | None,
    wishes: TreeWishes,
    progress: Progress | None = None,
    *,
    dry_run: bool = False,
) -> StashSummary:
    """Make branch `name` at the commit the stash was made on, check it out with the stash as its
    uncommitted state, and drop the stash: where a stash no longer fits, this always works.

    Raises:
        RevisionNotFound, AlreadyExists, InvalidName; UsageError: it was made on no commit.
        MergeConflict: a merge is under way. WouldLose: processes write in the tree.
    """
    stash = find_stash(store, dot.dot, text)
    check_branch_name(name)
    if store.catalog.branch(dot.dot, name) is not None:
        raise AlreadyExists(f"Branch already exists: {name}")
    if stash.parent is None:
        raise UsageError(
            f"{stash.name} was made on no commit, so a branch cannot begin there",
            hint=f"dm stash apply {stash.name}",
        )
    with switching.ready(store, dot.dot, progress):
        head = store.catalog.head(dot.dot)
        refuse_merging(store, dot.dot, head)
        changes = _between(store, dot.dot, stash.parent, stash.commit)
        summary = StashSummary(stash.name, stash.commit, name, changes, (), True)
        if dry_run:
            return summary
        events: list[Event] = []
        if store.catalog.tree(dot.dot) is not None:
            place = trees.require_place(store, dot.dot, head)
            if wishes.accept_moved_tree:
                trees.record_moved(store, dot.dot, place)
            trees.check_place(store, dot.dot, place, accept_moved=wishes.accept_moved_tree)
            saved = switching.save_working(store, dot.dot, place, "stash branch", progress)
            if saved is not None:
                events.append(WorkingSaved(dot.dot, head, saved, "stash branch"))
        ref = f"branch/{name}"
        events += [
            RefChanged(dot.dot, ref, None, stash.parent, "create", "from a stash", origin=head),
            HeadSwitched(dot.dot, name),
            _dropped(dot.dot, stash, "stash became a branch"),
        ]
        result = switching.switch_new_tree(
            store,
            dot.dot,
            branch=name,
            tip=stash.parent,
            target=stash.commit,
            events=events,
            command="stash",
            trusted=wishes.trusted,
            in_use=wishes.in_use,
            progress=progress,
        )
    return _summary(summary, result)
