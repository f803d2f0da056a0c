"""Operations: what each command did to the store, told from its events (`dm op log`, `dm reflog`).

Also which of them undo may take back: those in which a user's command changed something.
"""

from dataclasses import dataclass
from itertools import islice
from typing import Final

from dmsync.core.events import (
    BranchRenamed,
    CollaboratorAdded,
    CollaboratorRemoved,
    CommitsAdded,
    CommitsForgotten,
    CommitsListed,
    CommitsThinned,
    ConflictResolved,
    CurrentDotSwitched,
    DotCreated,
    DotDeleted,
    DotPurged,
    DotRenamed,
    DotRestored,
    DotScopeSet,
    Event,
    GarbageCollected,
    HeadSwitched,
    MergeEnded,
    MergeStarted,
    Operation,
    QuotaSet,
    RefChanged,
    RemoteAdded,
    RemoteObserved,
    RemoteRemoved,
    RemoteRenamed,
    SignatureAdded,
    TransferFinished,
    TransferStarted,
    TreeAttached,
    TreeDetached,
    TreeSwitchStarted,
    UndoApplied,
    UpstreamRemoved,
    UpstreamSet,
    WorkingDropped,
    WorkingSaved,
)
from dmsync.core.ids import DotId, ObjectId
from dmsync.core.names import full_name
from dmsync.engine.store import Store
from dmsync.engine.switching import FINISH_SWITCH
from dmsync.errors import NotFound, RevisionNotFound
from dmsync.storage.catalog import DotRow, OperationRow, ReflogRow

SHORT_ID_DIGITS: Final = 12
TRACKING: Final = "remote/"
_BRANCH, _TAG, _STASH = "branch/", "tag/", "stash/"


@dataclass(frozen=True)
class OperationInfo:
    """One operation: `facts` say in words what it did. `taken_back` is the seq of the UndoApplied
    that took it back; `reverses` the first seq of the operation that it took back itself (or,
    `is_redo`, did again)."""

    row: OperationRow
    facts: tuple[str, ...]
    taken_back: int | None
    reverses: int | None = None
    is_redo: bool = False


def operation_log(
    store: Store, count: int | None = None, *, everything: bool = False
) -> list[OperationInfo]:
    """Newest first, the newest `count`. O(operations told); each reads its record of the log.

    Bookkeeping that did nothing to be told (the end of a switch) is left out, unless `everything`.
    """
    found = (_info(store, row) for row in store.catalog.operations(None))
    return list(islice((info for info in found if everything or info.facts), count))


def find_operation(store: Store, seq: int) -> OperationRow:
    """The operation that event `seq` belongs to. Raises NotFound."""
    row = store.catalog.operation_with(seq)
    if row is None:
        raise NotFound(f"no operation {seq}", hint="dm op log lists them", seq=seq)
    return row


def operation_info(store: Store, seq: int) -> tuple[OperationInfo, Operation]:
    """One operation with its events. Raises NotFound."""
    row = find_operation(store, seq)
    return _info(store, row), store.catalog.events_of(row)


def _info(store: Store, row: OperationRow) -> OperationInfo:
    operation = store.catalog.events_of(row)
    facts: list[str] = []
    reverses, is_redo = None, False
    for event in operation.events:
        facts += describe(store, event)
        if isinstance(event, UndoApplied):
            reverses, is_redo = event.operation, event.is_redo
    return OperationInfo(
        row, tuple(facts), store.catalog.undone_by(row.first_seq), reverses, is_redo
    )


# --- the reflog --------------------------------------------------------------------------------


def ref_history(
    store: Store, dot: DotRow, name: str | None, count: int | None = None
) -> tuple[str, list[ReflogRow]]:
    """(full name, its changes, newest first) of a branch, `tag/x`, `stash/x` or `remote/R/x`, also
    of a deleted one; without a name of the current branch. Raises RevisionNotFound."""
    if name is None:
        name = store.catalog.head(dot.dot)
    candidates = (name,) if name.startswith((_BRANCH, _TAG, _STASH, TRACKING)) else ()
    for full in (*candidates, f"{_BRANCH}{name}"):
        changes = store.catalog.reflog(dot.dot, full, count=count)
        if changes:
            return full, changes
    if name == store.catalog.head(dot.dot):
        return f"{_BRANCH}{name}", []
    raise RevisionNotFound(
        f"there is no reflog of {name}", hint="a branch, or tag/NAME, stash/NAME, remote/R/NAME"
    )


# --- which operations undo may take back ---------------------------------------------------------


def is_undoable(operation: Operation) -> bool:
    """Did a user's command change something that can be taken back, or, like prune, not?"""
    if any(isinstance(event, UndoApplied) for event in operation.events):
        return False
    if is_received_push(operation) or _records_moved_tree(operation):
        return False
    if operation.command == FINISH_SWITCH:
        return False
    return any(_is_change(event, operation) for event in operation.events)


def is_received_push(operation: Operation) -> bool:
    """Refs that a peer pushed here: undone by `--op` only."""
    return any(
        isinstance(event, RefChanged) and event.kind == "push" and not is_tracking(event.name)
        for event in operation.events
    )


def _records_moved_tree(operation: Operation) -> bool:
    """`--accept-moved-tree` merely noted where the directory is now."""
    return [type(event) for event in operation.events] == [TreeDetached, TreeAttached]


def touches(operation: Operation, dot: DotId) -> bool:
    """Is any of it about that dot?"""
    return any(getattr(event, "dot", None) == dot for event in operation.events)


def is_tracking(ref: str) -> bool:
    return ref.startswith(TRACKING)


def talks_to_remote(operation: Operation) -> bool:
    """Part of a push, pull or fetch: what it noted about the remote stays noted."""
    return any(isinstance(event, RemoteObserved) for event in operation.events)


def _is_change(event: Event, operation: Operation) -> bool:
    match event:
        case RefChanged():
            return not is_tracking(event.name)
        case TreeSwitchStarted():
            return event.discarded or event.from_commit != event.to_root_commit
        case UpstreamSet():
            return not talks_to_remote(operation)
        case GarbageCollected():
            return any(number for _, number in event.freed)
        case (
            BranchRenamed()
            | CollaboratorAdded()
            | CollaboratorRemoved()
            | CommitsForgotten()
            | CommitsThinned()
            | ConflictResolved()
            | CurrentDotSwitched()
            | DotCreated()
            | DotDeleted()
            | DotPurged()
            | DotRenamed()
            | DotRestored()
            | DotScopeSet()
            | HeadSwitched()
            | MergeEnded()
            | MergeStarted()
            | QuotaSet()
            | RemoteAdded()
            | RemoteRemoved()
            | RemoteRenamed()
            | TreeAttached()
            | TreeDetached()
            | UpstreamRemoved()
            | WorkingDropped()
            | WorkingSaved()
        ):
            return True
        case _:
            return False


# --- in words ------------------------------------------------------------------------------------


def describe(store: Store, event: Event) -> list[str]:
    """What an event did, a line each; nothing for bookkeeping. Names are not escaped."""
    match event:
        case RefChanged():
            return [f"{event.name} {short(event.old)} -> {short(event.new)} ({event.kind})"]
        case BranchRenamed():
            return [f"branch/{event.old} renamed to branch/{event.new}"]
        case HeadSwitched():
            return [f"current branch {_arrow(event.old, event.branch)}"]
        case CurrentDotSwitched():
            return [f"current dot {_arrow(_named(store, event.old), _named(store, event.dot))}"]
        case WorkingSaved():
            return [f"uncommitted state of {event.branch} kept as {short(event.commit)}"]
        case WorkingDropped():
            return [f"uncommitted state of {event.branch} taken from {short(event.old)}"]
        case TreeSwitchStarted():
            lost = ", uncommitted changes discarded" if event.discarded else ""
            return [f"tree of {event.branch} now {short(event.to_root_commit)}{lost}"]
        case CommitsAdded() | CommitsListed():
            return _commits(event.commits, isinstance(event, CommitsListed))
        case CommitsThinned():
            return [f"content of {len(event.commits)} commits given up ({event.reason})"]
        case CommitsForgotten():
            return [f"{len(event.commits)} commits that nothing named given up"]
        case GarbageCollected():
            return [f"garbage of {_named(store, event.dot)} collected{_freed(event.freed)}"]
        case SignatureAdded():
            return [f"signature of {short(event.target)}"]
        case DotScopeSet():
            kept = "all subdots" if event.subdots is None else ", ".join(event.subdots)
            return [f"keeps {kept}"]
        case UndoApplied():
            return [f"{'redo' if event.is_redo else 'undo'} of operation {event.operation}"]
        case TransferStarted():
            return [f"{event.direction} begun: {event.remote}"]
        case TransferFinished():
            return [f"transfer {event.status}"]
        case _:
            return _describe_dot(store, event) + _describe_merge(event) + _describe_remote(event)


def is_incidental(event: Event, operation: Operation) -> bool:
    """Does `event` merely store what the rest of the operation is about: commits, and stashes that
    a command other than stash made?"""
    match event:
        case CommitsAdded() | CommitsListed():
            return True
        case RefChanged():
            return event.name.startswith(_STASH) and operation.command != "stash"
        case _:
            return False


def _describe_dot(store: Store, event: Event) -> list[str]:
    match event:
        case DotCreated():
            return [f"dot {full_name(event.namespace, event.name)} made"]
        case DotRenamed():
            old = full_name(*event.old) if event.old else _named(store, event.dot)
            return [f"dot {old} renamed to {full_name(event.namespace, event.name)}"]
        case DotDeleted():
            return [f"dot {_named(store, event.dot)} deleted"]
        case DotRestored():
            return [f"dot {full_name(event.namespace, event.name)} brought back"]
        case DotPurged():
            return [f"dot {event.dot.hex()[:SHORT_ID_DIGITS]} purged"]
        case TreeAttached():
            return [f"directory {event.path.decode('utf-8', 'backslashreplace')} attached"]
        case TreeDetached():
            return ["directory detached"]
        case CollaboratorAdded():
            return [f"dot {_named(store, event.dot)} shared with {event.user}"]
        case CollaboratorRemoved():
            return [f"dot {_named(store, event.dot)} no longer shared with {event.user}"]
        case QuotaSet():
            limit = "none" if event.bytes_max is None else f"{event.bytes_max} bytes"
            return [f"quota of {event.namespace or 'the store itself'}: {limit}"]
        case _:
            return []


def _describe_merge(event: Event) -> list[str]:
    match event:
        case MergeStarted():
            return [
                f"{event.kind} of {short(event.theirs)} into {event.branch} begun, "
                f"{len(event.conflicts)} conflicts"
            ]
        case ConflictResolved():
            path = event.path.decode("utf-8", "backslashreplace")
            return [f"conflict in {path} decided: {event.how}"]
        case MergeEnded():
            return [f"merge into {event.branch} {event.outcome}"]
        case _:
            return []


def _describe_remote(event: Event) -> list[str]:
    match event:
        case RemoteAdded():
            return [f"remote {event.name} added: {event.url}"]
        case RemoteRemoved():
            return [f"remote {event.name} removed"]
        case RemoteRenamed():
            return [f"remote {event.old} renamed to {event.new}"]
        case UpstreamSet():
            return [f"upstream at {event.remote} is {full_name(event.namespace, event.name)}"]
        case UpstreamRemoved():
            return [f"no upstream at {event.remote}"]
        case _:
            return []


def _freed(freed: tuple[tuple[str, int], ...]) -> str:
    told = [f"{number} {name}" for name, number in freed if number]
    return f": {', '.join(told)}" if told else ", nothing to free"


def _commits(commits: tuple[ObjectId, ...], are_hollow: bool) -> list[str]:
    what = "commit record" if are_hollow else "commit"
    if len(commits) == 1:
        return [f"{what} {short(commits[0])}"]
    return [f"{len(commits)} {what}s"]


def short(oid: ObjectId | None) -> str:
    """An id for people; `-` for none."""
    return "-" if oid is None else oid.hex()[:SHORT_ID_DIGITS]


def _arrow(old: str | None, new: str | None) -> str:
    return f"{old or '-'} -> {new or '-'}"


def _named(store: Store, dot: DotId | None) -> str | None:
    if dot is None:
        return None
    row = store.catalog.dot(dot)
    return dot.hex()[:SHORT_ID_DIGITS] if row is None else full_name(row.namespace, row.name)
