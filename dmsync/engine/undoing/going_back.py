"""`dm op restore SEQ`: refs, heads, names and the current dot as they were after an operation.

The log folded up to SEQ is compared with the store as it is, and what differs is changed by one
operation, which can be undone like any other. Remotes stay as they are: what others have is not
ours to turn back.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Final

from dmsync.core.events import (
    CurrentDotSwitched,
    DotDeleted,
    DotRenamed,
    DotRestored,
    Event,
    HeadSwitched,
    MergeEnded,
    RefChanged,
    TreeAttached,
    WorkingDropped,
    WorkingSaved,
)
from dmsync.core.ids import DotId, ObjectId
from dmsync.core.names import full_name
from dmsync.engine import switching, trees
from dmsync.engine.dots import bring_back_directory, finish_deletions, new_trash
from dmsync.engine.operations import describe, is_tracking, short
from dmsync.engine.past import catalog_at
from dmsync.engine.progress import Progress
from dmsync.engine.store import Store
from dmsync.engine.undoing.returning import (
    HeldTree,
    append_stash,
    append_switch,
    carry_out,
    hold_dropped,
)
from dmsync.engine.undoing.reversal import is_directory
from dmsync.errors import (
    AlreadyExists,
    CannotUndo,
    NotFound,
    NothingToDo,
    ObjectMissing,
    RefConflict,
)
from dmsync.storage.catalog import Catalog, DotRow, Transaction

COMMAND: Final = "op-restore"
_BRANCH: Final = "branch/"
_STASH: Final = "stash/"


@dataclass(frozen=True)
class WentBack:
    """What going back did, or with a dry run would do: `facts` in words, a change each; `remarks`
    say what cannot come back; `stashes` keep what trees held."""

    seq: int
    facts: tuple[str, ...]
    remarks: tuple[str, ...] = ()
    stashes: tuple[str, ...] = ()
    withheld: tuple[bytes, ...] = ()
    unapplied: tuple[bytes, ...] = ()


@dataclass
class _Journey:
    """What has to change. Dots are those that were there then, unless they have been purged."""

    seq: int
    kept: list[DotRow] = field(default_factory=list)
    """There then and now, as they were."""
    returning: list[DotRow] = field(default_factory=list)
    """Deleted since, as they were."""
    leaving: list[DotRow] = field(default_factory=list)
    """Made, or brought back, since."""
    remarks: list[str] = field(default_factory=list)

    @property
    def live(self) -> list[DotRow]:
        """Dots that will be there."""
        return self.kept + self.returning


def go_back(
    store: Store,
    seq: int,
    *,
    dry_run: bool = False,
    in_use: bool = False,
    trusted: bool = False,
    progress: Progress | None = None,
) -> WentBack:
    """Make the store as it was after event `seq`; the trees follow, what they hold stored first.

    Raises:
        NotFound: no such event. NothingToDo: it is so already.
        CannotUndo, CaptureFailed, WouldLose, StorageFull: with nothing changed.
    """
    with catalog_at(store, seq) as past, ExitStack() as held:
        journey = _journey(store, past, seq)
        for row in sorted(journey.kept + journey.leaving, key=lambda row: row.dot):
            held.enter_context(switching.ready(store, row.dot, progress))
        if journey.returning or journey.leaving:
            held.callback(finish_deletions, store)
        for row in journey.returning:
            _bring_back(store, row)
            held.enter_context(store.dot_locked(row.dot))
        facts = _facts(store, past, journey)
        if not facts:
            raise NothingToDo(f"the store is as it was after operation {seq}")
        if dry_run:
            return WentBack(seq, facts, tuple(journey.remarks))
        found = _hold_trees(store, past, journey, in_use, progress)
        for remark in journey.remarks:
            store.say(remark)
        stashes = _record(store, past, journey, found)
        for row in journey.live:
            trees.settle_places(store, row.dot)
        results = [
            carry_out(store, tree, COMMAND, trusted=trusted, progress=progress) for tree in found
        ]
        done = [result for result in results if result is not None]
    return WentBack(
        seq,
        facts,
        tuple(journey.remarks),
        tuple(stashes),
        tuple(path for result in done for path in result.withheld),
        tuple(path for result in done for path in result.unapplied),
    )


def _journey(store: Store, past: Catalog, seq: int) -> _Journey:
    journey = _Journey(seq)
    then = {row.dot: row for row in past.dots()}
    now = {row.dot: row for row in store.catalog.dots(include_deleted=True)}
    for dot, row in then.items():
        current = now.get(dot)
        if current is None:
            journey.remarks.append(f"{_written(row)} has been purged and cannot come back")
        elif current.trash is None:
            journey.kept.append(row)
        else:
            journey.returning.append(row)
    journey.leaving = [row for dot, row in now.items() if row.trash is None and dot not in then]
    return journey


def _written(row: DotRow) -> str:
    return full_name(row.namespace, row.name)


def _bring_back(store: Store, row: DotRow) -> None:
    current = store.catalog.dot(row.dot)
    assert current is not None and current.trash is not None, "it is among the deleted dots"
    try:
        bring_back_directory(store, row.dot, current.trash)
    except (AlreadyExists, NotFound) as exc:
        raise CannotUndo(f"{_written(row)} cannot come back: {exc.message}") from exc


# --- what changes --------------------------------------------------------------------------------


class _RolledBack(Exception):
    """Ends the transaction that was only a trial."""


def _facts(store: Store, past: Catalog, journey: _Journey) -> tuple[str, ...]:
    """Try it and roll it back; what it would do in words."""
    facts: list[str] = []
    try:
        with store.transaction(COMMAND) as tx:
            _append_all(store, past, journey, tx, frozenset())
            if not tx.is_empty:
                events = tx.finished().events
                facts = [fact for event in events for fact in describe(store, event)]
            raise _RolledBack
    except _RolledBack:
        return tuple(facts)


def _record(store: Store, past: Catalog, journey: _Journey, found: list[HeldTree]) -> list[str]:
    dropped = frozenset((tree.dot, tree.branch_now) for tree in found if tree.is_dropped)
    with store.transaction(COMMAND) as tx:
        names = [append_stash(store, tx, tree, COMMAND) for tree in found]
        _append_all(store, past, journey, tx, dropped)
        for tree in found:
            append_switch(tx, tree, COMMAND)
    return [name for name in names if name is not None]


def _append_all(
    store: Store,
    past: Catalog,
    journey: _Journey,
    tx: Transaction,
    dropped: frozenset[tuple[DotId, str]],
) -> None:
    try:
        for row in journey.leaving:
            tx.append(DotDeleted(row.dot, new_trash(row.dot)))
        _append_names(store, journey, tx)
        for row in journey.live:
            for event in _dot_events(store, past, row.dot, dropped):
                tx.append(event)
        current = past.current_dot()
        live = {row.dot for row in journey.live}
        if current != store.catalog.current_dot() and (current is None or current in live):
            tx.append(CurrentDotSwitched(current))
    except (AlreadyExists, NotFound, RefConflict, ObjectMissing) as exc:
        raise CannotUndo(f"cannot go back: {exc.message}", hint=exc.hint) from exc


def _append_names(store: Store, journey: _Journey, tx: Transaction) -> None:
    """Bring dots back and give all of them the names they had.

    A dot comes back under the name it was deleted with and is renamed then, so that who takes
    this back finds that name in the events.
    """
    _append_renames(store, journey, tx, journey.kept)
    for row in journey.returning:
        deleted = store.catalog.dot(row.dot)
        assert deleted is not None, "it is among the deleted dots"
        holder = store.catalog.dot_by_name(deleted.namespace, deleted.name)
        if holder is not None:
            _append_aside(store, journey, tx, holder)
        tx.append(DotRestored(row.dot, deleted.namespace, deleted.name))
    _append_renames(store, journey, tx, journey.live)


def _append_renames(
    store: Store, journey: _Journey, tx: Transaction, rows: Sequence[DotRow]
) -> None:
    """Rename dots; one whose name another still bears waits, and when all wait (two swapped their
    names) one steps aside."""
    waiting = [row for row in rows if not _is_named(store, row)]
    while waiting:
        free = [row for row in waiting if not _is_taken(store, row)]
        if not free:
            _append_aside(store, journey, tx, waiting[0])
            continue
        for row in free:
            tx.append(DotRenamed(row.dot, row.namespace, row.name))
        waiting = [row for row in waiting if row not in free]


def _append_aside(store: Store, journey: _Journey, tx: Transaction, row: DotRow) -> None:
    """Rename a dot out of the way, for a moment."""
    name = aside = f"{row.name}-{journey.seq}"
    number = 1
    while store.catalog.dot_by_name(row.namespace, aside) is not None:
        number += 1
        aside = f"{name}-{number}"
    tx.append(DotRenamed(row.dot, row.namespace, aside))


def _is_named(store: Store, row: DotRow) -> bool:
    now = store.catalog.dot(row.dot)
    return (
        now is not None
        and now.trash is None
        and (now.namespace, now.name) == (row.namespace, row.name)
    )


def _is_taken(store: Store, row: DotRow) -> bool:
    return store.catalog.dot_by_name(row.namespace, row.name) is not None


def _is_deleted(store: Store, dot: DotId) -> bool:
    row = store.catalog.dot(dot)
    return row is not None and row.trash is not None


def _dot_events(
    store: Store, past: Catalog, dot: DotId, dropped: frozenset[tuple[DotId, str]]
) -> Iterator[Event]:
    """What makes one dot as it was. Stashes made since stay: they keep what was not committed."""
    for merge in store.catalog.merges(dot):
        yield MergeEnded(dot, merge.branch, "aborted")
    then = _refs(past, dot)
    now = _refs(store.catalog, dot)
    for name in sorted(then.keys() | now.keys()):
        old, new = now.get(name), then.get(name)
        if old == new or (new is None and name.startswith(_STASH)):
            continue
        is_gone = new is None and _is_gone(store, past, dot, name, dropped)
        origin = past.ref(dot, name)
        yield RefChanged(
            dot,
            name,
            old,
            new,
            "delete" if is_gone else "restore",
            COMMAND,
            origin.origin if origin is not None and old is None else None,
        )
    if past.head(dot) != store.catalog.head(dot):
        yield HeadSwitched(dot, past.head(dot))
    yield from _working_events(store, past, dot)
    if store.catalog.tree(dot) is None:
        yield from _attachment(store, past, dot)


def _is_gone(
    store: Store, past: Catalog, dot: DotId, name: str, dropped: frozenset[tuple[DotId, str]]
) -> bool:
    """Does a branch go for good, and not only become unborn as the one that was current, or with
    a tree that nobody has stored?"""
    branch = name.removeprefix(_BRANCH)
    if branch == name or branch == past.head(dot):
        return False
    has_tree = store.catalog.tree(dot) is None and trees.place_of(store, dot, branch) is not None
    return not has_tree or (dot, branch) in dropped


def _attachment(store: Store, past: Catalog, dot: DotId) -> Iterator[Event]:
    """The directory of a dot that was deleted since, if it is still there and free."""
    tree = past.tree(dot)
    if tree is None or not is_directory(tree.path, tree.device, tree.inode):
        return
    if tree.path not in {path for _, path in store.catalog.attached_paths()}:
        yield TreeAttached(dot, tree.path, tree.as_root, tree.device, tree.inode)


def _refs(catalog: Catalog, dot: DotId) -> dict[str, ObjectId]:
    return {row.name: row.target for row in catalog.refs(dot) if not is_tracking(row.name)}


def _working_events(store: Store, past: Catalog, dot: DotId) -> Iterator[Event]:
    then = {row.branch: row.commit for row in past.working_snapshots(dot)}
    now = {row.branch: row.commit for row in store.catalog.working_snapshots(dot)}
    for branch in sorted(then.keys() | now.keys()):
        commit = then.get(branch)
        if commit == now.get(branch):
            continue
        if commit is None:
            yield WorkingDropped(dot, branch)
        else:
            yield WorkingSaved(dot, branch, commit, COMMAND)


# --- trees ---------------------------------------------------------------------------------------


def _hold_trees(
    store: Store,
    past: Catalog,
    journey: _Journey,
    in_use: bool,
    progress: Progress | None,
) -> list[HeldTree]:
    found: list[HeldTree | None] = []
    for row in journey.live:
        attached = store.catalog.tree(row.dot)
        if attached is not None:
            found.append(_hold_attached(store, past, row.dot, attached.branch, in_use, progress))
        elif not _is_deleted(store, row.dot):
            found += _hold_managed(store, past, row.dot, in_use, progress)
    return [tree for tree in found if tree is not None]


def _hold_attached(
    store: Store,
    past: Catalog,
    dot: DotId,
    branch_now: str,
    in_use: bool,
    progress: Progress | None,
) -> HeldTree | None:
    branch_then = past.head(dot)
    return _hold(store, past, dot, branch_now, branch_then, in_use, progress)


def _hold_managed(
    store: Store, past: Catalog, dot: DotId, in_use: bool, progress: Progress | None
) -> Iterator[HeldTree | None]:
    branches = {row.short_name for row in store.catalog.branches(dot)} | {store.catalog.head(dot)}
    stay = {row.short_name for row in past.branches(dot)} | {past.head(dot)}
    for branch in sorted(branches):
        if branch in stay:
            yield _hold(store, past, dot, branch, branch, in_use, progress)
        else:
            yield hold_dropped(store, dot, branch, reason=COMMAND, in_use=in_use, progress=progress)


def _hold(
    store: Store,
    past: Catalog,
    dot: DotId,
    branch_now: str,
    branch_then: str,
    in_use: bool,
    progress: Progress | None,
) -> HeldTree | None:
    """None for a tree that stays: its branch was where it is, or was unborn."""
    place = trees.place_of(store, dot, branch_now)
    row = past.branch(dot, branch_then)
    target = None if row is None else row.target
    tip = trees.branch_tip(store, dot, branch_now)
    if place is None or (branch_now == branch_then and target in (tip, None)):
        return None
    trees.check_place(store, dot, place, accept_moved=False)
    if target is not None and store.catalog.is_hollow(dot, target):
        raise CannotUndo(
            f"the content of {branch_then} at {short(target)} is not here any more",
            commit=target.hex(),
        )
    held = switching.save_held(store, dot, place, (tip,), COMMAND, progress)
    if target is None:
        target = held  # what an unborn branch's tree held was never recorded
    switching.check_switch(store, dot, branch_then, target, in_use=in_use)
    return HeldTree(dot, branch_now, branch_then, held, held != tip, target)
