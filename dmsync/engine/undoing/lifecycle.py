"""`dm undo` and `dm redo`: one operation at a time, newest first.

An undo is an operation itself: events that turn those of another one round, and UndoApplied, which
names it. A redo turns the undo round in the same way.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Final

from dmsync.core.events import (
    BranchRenamed,
    CommitsForgotten,
    CommitsThinned,
    DotCreated,
    DotDeleted,
    DotPurged,
    DotRestored,
    Event,
    GarbageCollected,
    HeadSwitched,
    Operation,
    RefChanged,
    SignatureAdded,
    TreeSwitchStarted,
    UndoApplied,
)
from dmsync.core.graph import is_ancestor
from dmsync.core.ids import DotId
from dmsync.engine import switching, trees
from dmsync.engine.dots import bring_back_directory, finish_deletions
from dmsync.engine.operations import (
    describe,
    find_operation,
    is_incidental,
    is_undoable,
    short,
    talks_to_remote,
    touches,
)
from dmsync.engine.progress import Progress
from dmsync.engine.restore import RestoreResult
from dmsync.engine.store import Store
from dmsync.engine.undoing.returning import (
    HeldTree,
    append_stash,
    append_switch,
    carry_out,
    hold,
    hold_dropped,
    left_in,
    trees_to_return,
)
from dmsync.engine.undoing.reversal import Kind, Reversal
from dmsync.errors import (
    AlreadyExists,
    CannotUndo,
    NotFound,
    NothingToDo,
    UsageError,
)
from dmsync.storage.catalog import OperationRow

_PAGE: Final = 64
"""Operations looked at in one query when searching for one to take back."""
_BRANCH: Final = "branch/"
_ABOUT_DOTS: Final = (DotCreated, DotDeleted, DotRestored)


@dataclass(frozen=True)
class UndoRequest:
    """`dot` restricts undo to operations about it. `in_use` also switches trees in which processes
    write, `trusted` applies devices, setuid bits and capabilities too."""

    dot: DotId | None = None
    in_use: bool = False
    trusted: bool = False


@dataclass(frozen=True)
class TakenBack:
    """One operation taken back, or with a redo done again. `facts` say what it had done, `in_short`
    those of them that tell most; `stashes` keep what trees held beyond it; `remarks` what did not
    come back."""

    operation: int
    command: str
    facts: tuple[str, ...]
    in_short: tuple[str, ...]
    stashes: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    discarded: bool = False
    withheld: tuple[bytes, ...] = ()
    unapplied: tuple[bytes, ...] = ()


def undo(
    store: Store, count: int, request: UndoRequest, progress: Progress | None = None
) -> Iterator[TakenBack]:
    """Take back the newest `count` operations that are not taken back, each as it is asked for.

    Raises:
        CannotUndo: the next one cannot be; `undone` among the facts says how many were.
        NothingToDo: there are no more.
    """
    before = None
    for done in range(count):
        row = _newest_undoable(store, before, request.dot)
        if row is None:
            raise _no_more("undo", done)
        with _counting(done):
            yield take_back(store, row, request, progress)
        before = row.first_seq


def redo(
    store: Store, count: int, request: UndoRequest, progress: Progress | None = None
) -> Iterator[TakenBack]:
    """Take back the newest `count` undos. Raises as `undo`."""
    for done in range(count):
        newest = store.catalog.newest_undos(1)
        if not newest:
            raise _no_more("redo", done)
        with _counting(done):
            yield _reverse(store, *_pair(store, *newest[0]), "redo", request, progress)


def _pair(store: Store, operation: int, by_seq: int) -> tuple[OperationRow, OperationRow]:
    """(the operation whose events are to be turned round, the one that is done again)."""
    return find_operation(store, by_seq), find_operation(store, operation)


def undo_operation(
    store: Store, seq: int, request: UndoRequest, progress: Progress | None = None
) -> TakenBack:
    """Take back the operation that event `seq` belongs to, if nothing it changed moved since.

    Raises:
        NotFound, CannotUndo; UsageError: it changed nothing, or is an undo itself.
    """
    row = find_operation(store, seq)
    _refuse_unfit(store, row)
    return take_back(store, row, request, progress)


def _refuse_unfit(store: Store, row: OperationRow) -> None:
    operation = store.catalog.events_of(row)
    if store.catalog.undone_by(row.first_seq) is not None:
        raise UsageError(f"operation {row.first_seq} is taken back already", hint="dm redo")
    if any(isinstance(event, UndoApplied) for event in operation.events):
        raise UsageError(f"operation {row.first_seq} is an {row.command} itself", hint="dm redo")
    is_push = any(isinstance(e, RefChanged) and e.kind == "push" for e in operation.events)
    if not is_push and not is_undoable(operation):
        raise UsageError(
            f"operation {row.first_seq} ({row.command}) changed nothing that undo takes back",
            hint=f"dm op show {row.first_seq}",
        )


def _no_more(what: Kind, done: int) -> NothingToDo:
    more = " more" if done else ""
    return NothingToDo(f"there is nothing{more} to {what}", undone=done)


@contextmanager
def _counting(done: int) -> Iterator[None]:
    try:
        yield
    except CannotUndo as exc:
        exc.facts["undone"] = done
        raise


def _newest_undoable(store: Store, before: int | None, dot: DotId | None) -> OperationRow | None:
    while rows := store.catalog.undoable_operations(before_seq=before, count=_PAGE):
        for row in rows:
            operation = store.catalog.events_of(row)
            if is_undoable(operation) and (dot is None or touches(operation, dot)):
                return row
        before = rows[-1].first_seq
    return None


def would_undo(store: Store, count: int, request: UndoRequest) -> list[TakenBack]:
    """What `undo` would take back, tried and rolled back as one; the trees are not looked at.

    Raises as `undo`.
    """
    rows: list[OperationRow] = []
    before = None
    for done in range(count):
        row = _newest_undoable(store, before, request.dot)
        if row is None:
            if done == 0:
                raise _no_more("undo", done)
            break
        rows.append(row)
        before = row.first_seq
    return _tried(store, rows, rows, "undo")


def would_redo(store: Store, count: int) -> list[TakenBack]:
    """What `redo` would do again. Raises as `redo`."""
    pairs = [_pair(store, *found) for found in store.catalog.newest_undos(count)]
    if not pairs:
        raise _no_more("redo", 0)
    return _tried(store, [row for row, _ in pairs], [meant for _, meant in pairs], "redo")


def would_undo_operation(store: Store, seq: int) -> list[TakenBack]:
    """What `undo_operation` would take back. Raises as it."""
    row = find_operation(store, seq)
    _refuse_unfit(store, row)
    return _tried(store, [row], [row], "undo")


def _tried(
    store: Store, rows: Sequence[OperationRow], meant: Sequence[OperationRow], kind: Kind
) -> list[TakenBack]:
    operations = [store.catalog.events_of(row) for row in rows]
    with ExitStack() as held:
        for operation in operations:
            _refuse_final(operation)
            held.enter_context(_directories_back(store, operation, kind))
        remarks = _try(store, operations, meant, kind)
    return [
        TakenBack(row.first_seq, row.command, *_facts(store, row), remarks=tuple(said))
        for row, said in zip(meant, remarks, strict=True)
    ]


# --- one operation -------------------------------------------------------------------------------


def take_back(
    store: Store, row: OperationRow, request: UndoRequest, progress: Progress | None = None
) -> TakenBack:
    """Undo one operation. Raises CannotUndo with nothing changed."""
    return _reverse(store, row, row, "undo", request, progress)


def _reverse(
    store: Store,
    row: OperationRow,
    meant: OperationRow,
    kind: Kind,
    request: UndoRequest,
    progress: Progress | None,
) -> TakenBack:
    """Turn the events of operation `row` round; `meant` is the one that this undoes or redoes."""
    operation = store.catalog.events_of(row)
    facts, in_short = _facts(store, meant)
    _refuse_final(operation)
    with ExitStack() as held:
        for dot in _live_dots(store, operation):
            held.enter_context(switching.ready(store, dot, progress))
        held.enter_context(_directories_back(store, operation, kind))
        _try(store, [operation], [meant], kind)
        found = _hold_trees(store, operation, kind, request, progress)
        stashes, remarks = _record(store, operation, meant, kind, found)
        results = _finish(store, operation, kind, found, request, progress)
    discarded = kind == "undo" and any(
        isinstance(event, TreeSwitchStarted) and event.discarded for event in operation.events
    )
    if kind == "undo":
        remarks += _what_stays(store, operation, discarded)
    return TakenBack(
        meant.first_seq,
        meant.command,
        facts,
        in_short,
        tuple(stashes),
        tuple(remarks),
        discarded,
        tuple(path for result in results for path in result.withheld),
        tuple(path for result in results for path in result.unapplied),
    )


def _facts(store: Store, row: OperationRow) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What an operation did in words: all of it, and what tells most."""
    operation = store.catalog.events_of(row)
    told = [
        (fact, is_incidental(event, operation))
        for event in operation.events
        for fact in describe(store, event)
    ]
    return tuple(fact for fact, _ in told), tuple(fact for fact, less in told if not less)


_FINAL: Final[dict[type[Event], str]] = {
    CommitsThinned: "prune",
    CommitsForgotten: "gc",
    GarbageCollected: "gc",
    DotPurged: "purged",
}
"""Events that are never turned round, and why."""


def _refuse_final(operation: Operation) -> None:
    for event in operation.events:
        if isinstance(event, tuple(_FINAL)):
            raise CannotUndo(
                f"{operation.command} (operation {operation.first_seq}) is final: "
                "what it gave up is gone for good",
                hint="dm undo --op SEQ takes back an earlier operation",
                operation=operation.first_seq,
                reason=_FINAL[type(event)],
            )


def _live_dots(store: Store, operation: Operation) -> list[DotId]:
    """Dots that the operation is about and that are there, in the order in which to lock them."""
    dots = {dot for event in operation.events if (dot := getattr(event, "dot", None)) is not None}
    rows = [store.catalog.dot(dot) for dot in sorted(dots)]
    return [row.dot for row in rows if row is not None and row.trash is None]


@contextmanager
def _directories_back(store: Store, operation: Operation, kind: Kind) -> Iterator[None]:
    """Have the directories of dots that the operation deleted in place; unless the dots are back
    at the end, their directories go to the trash again."""
    try:
        with ExitStack() as held:
            for event in operation.events:
                if isinstance(event, DotDeleted) and _is_deleted(store, event.dot):
                    _bring_back(store, event, operation, kind)
                    held.enter_context(store.dot_locked(event.dot))
            yield
    finally:
        if any(isinstance(event, _ABOUT_DOTS) for event in operation.events):
            finish_deletions(store)


def _is_deleted(store: Store, dot: DotId) -> bool:
    row = store.catalog.dot(dot)
    return row is not None and row.trash is not None


def _bring_back(store: Store, event: DotDeleted, operation: Operation, kind: Kind) -> None:
    try:
        bring_back_directory(store, event.dot, event.trash)
    except (AlreadyExists, NotFound) as exc:
        raise CannotUndo(
            f"cannot {kind} {operation.command} (operation {operation.first_seq}): {exc.message}",
            operation=operation.first_seq,
            dot=event.dot.hex(),
        ) from exc


class _RolledBack(Exception):
    """Ends a transaction that was only a trial."""


def _try(
    store: Store, operations: Sequence[Operation], meant: Sequence[OperationRow], kind: Kind
) -> list[list[str]]:
    """Turn operations round and roll that back, so that a refusal comes before anything is done.

    Returns the remarks of each. Raises CannotUndo.
    """
    remarks: list[list[str]] = []
    try:
        with store.transaction(kind) as tx:
            for operation, row in zip(operations, meant, strict=True):
                reversal = Reversal(store, tx, operation, kind, row)
                reversal.run()
                remarks.append(reversal.remarks)
            raise _RolledBack
    except _RolledBack:
        return remarks


def _hold_trees(
    store: Store,
    operation: Operation,
    kind: Kind,
    request: UndoRequest,
    progress: Progress | None,
) -> list[HeldTree]:
    """The trees that will be switched or dropped, what they hold stored first."""
    found: list[HeldTree | None] = []
    for wanted in trees_to_return(store, operation):
        found.append(hold(store, wanted, reason=kind, in_use=request.in_use, progress=progress))
    coming_or_going = {event.dot for event in operation.events if isinstance(event, _ABOUT_DOTS)}
    for event in operation.events:
        if not isinstance(event, RefChanged) or event.old is not None or event.new is None:
            continue
        if event.dot in coming_or_going:
            continue  # its trees stay in its directory, in the trash or out of it
        branch = event.name.removeprefix(_BRANCH)
        if branch != event.name and branch != _head_after(store, operation, event.dot):
            dropped = hold_dropped(
                store,
                event.dot,
                branch,
                known=left_in(operation, event.dot, branch),
                reason=kind,
                in_use=request.in_use,
                progress=progress,
            )
            found.append(dropped)
    return _without_dropped(found)


def _without_dropped(found: Sequence[HeldTree | None]) -> list[HeldTree]:
    """A tree that goes with its branch is not switched before."""
    held = [tree for tree in found if tree is not None]
    dropped = {(tree.dot, tree.branch_now) for tree in held if tree.is_dropped}
    return [tree for tree in held if tree.is_dropped or (tree.dot, tree.branch_now) not in dropped]


def _head_after(store: Store, operation: Operation, dot: DotId) -> str:
    for event in operation.events:
        if isinstance(event, HeadSwitched) and event.dot == dot and event.old is not None:
            return event.old
    return store.catalog.head(dot)


def _record(
    store: Store, operation: Operation, meant: OperationRow, kind: Kind, found: list[HeldTree]
) -> tuple[list[str], list[str]]:
    """Append everything as one operation; returns (stash refs, remarks)."""
    dropped = frozenset((tree.dot, tree.branch_now) for tree in found if tree.is_dropped)
    with store.transaction(kind) as tx:
        names = [append_stash(store, tx, tree, kind) for tree in found]
        reversal = Reversal(store, tx, operation, kind, meant, dropped)
        reversal.run()
        tx.append(UndoApplied(meant.first_seq, kind == "redo"))
        for tree in found:
            append_switch(tx, tree, kind)
    return [name for name in names if name is not None], reversal.remarks


def _finish(
    store: Store,
    operation: Operation,
    kind: Kind,
    found: Sequence[HeldTree],
    request: UndoRequest,
    progress: Progress | None,
) -> list[RestoreResult]:
    """Bring directories into line with what has been recorded; a kill in here is made good by
    switching.ready and dots.finish_deletions."""
    dots = _live_dots(store, operation)
    for dot in dots:
        trees.settle_places(store, dot)
    results = [
        carry_out(store, tree, kind, trusted=request.trusted, progress=progress) for tree in found
    ]
    moved = (HeadSwitched, BranchRenamed)
    for dot in dots:
        is_moved = any(isinstance(e, moved) and e.dot == dot for e in operation.events)
        if is_moved and store.catalog.tree(dot) is None:
            switching.make_place(store, dot, store.catalog.head(dot), progress)
    return [result for result in results if result is not None]


# --- what does not come back ---------------------------------------------------------------------


def _what_stays(store: Store, operation: Operation, discarded: bool) -> list[str]:
    remarks = []
    if discarded:
        remarks.append(
            f"uncommitted changes that {operation.command} --discard gave up do not come back"
        )
    is_pull = talks_to_remote(operation)
    for event in operation.events:
        if isinstance(event, SignatureAdded):
            remarks.append(f"the signature of {short(event.target)} stays")
        if isinstance(event, RefChanged) and event.name.startswith(_BRANCH) and not is_pull:
            remarks += _pushed(store, event)
    return remarks


def _pushed(store: Store, event: RefChanged) -> list[str]:
    """Remotes that were seen to have what the branch no longer has."""
    if event.new is None or not _is_live(store, event.dot):
        return []
    graph = store.catalog.graph(event.dot)
    branch = event.name.removeprefix(_BRANCH)
    remarks = []
    for row in store.catalog.refs(event.dot, "remote/"):
        remote, _, name = row.name.removeprefix("remote/").partition("/")
        if name != branch or not graph.has(row.target) or not graph.has(event.new):
            continue
        if event.old is not None and is_ancestor(graph, row.target, event.old):
            continue
        if is_ancestor(graph, event.new, row.target):
            remarks.append(
                f"{remote} has {branch} at {short(row.target)}: it keeps what was pushed"
            )
    return remarks


def _is_live(store: Store, dot: DotId) -> bool:
    """Is the dot there, and not deleted?"""
    row = store.catalog.dot(dot)
    return row is not None and row.trash is None
