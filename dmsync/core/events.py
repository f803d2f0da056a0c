"""Events: what happened to a store, as past-tense facts (protocol/STORE.md 4).

Everything mutable (dots, refs, heads, trees, remotes) is the fold of these. An event is stored as
`[type, version, field...]` in canonical encoding; values are checked both when written and when
read, so that nothing unreadable can enter a log and nothing malformed can leave one.
"""

from collections.abc import Callable
from dataclasses import fields
from typing import Any, Final, get_args

from dmsync.core.ids import DOT_ID_BYTES, ID_BYTES, DotId, ObjectId
from dmsync.core.objects import MESSAGE_BYTES_MAX
from dmsync.core.values import plain_value_type
from dmsync.errors import BadObject, FormatUnsupported

UNIQUE_ID_BYTES: Final = 16
"""Length of cluster, operation and transfer ids."""
TEXT_BYTES_MAX: Final = 64 * 1024
PATH_BYTES_MAX: Final = 4096
COMMITS_MAX: Final = 4_000_000
"""Commits one event may name: a first push of a long history is one operation."""
SUMMARY_PAIRS_MAX: Final = 256

REF_CHANGE_KINDS: Final = (
    "create",
    "ff",
    "force",
    "delete",
    "rename",
    "commit",
    "reset",
    "push",
    "pull",
    "fetch",
    "stash",
    "merge",
    "cherry-pick",
    "revert",
    "amend",
    "tag",
    "undo",
    "redo",
    "restore",
    "prune",
    "bundle",
)
MERGE_KINDS: Final = ("merge", "cherry-pick", "revert", "stash-pop")
MERGE_OUTCOMES: Final = ("concluded", "aborted")
CONFLICTS_MAX: Final = 1_000_000
CONFLICT_DETAIL_BYTES_MAX: Final = 4 * 1024 * 1024
SIGNATURE_BYTES_MAX: Final = 16 * 1024

Capture = tuple[str, str, int]
"""How a commit was captured: driver, consistency, pause in microseconds."""
Names = tuple[str, str]
"""A dot's namespace and name."""
Tree = tuple[bytes, bool, int, int]
"""An attached directory: path, as_root, device, inode."""
Conflict = tuple[bytes, str, bytes]
"""Path, reason, and what the driver that found it recorded (engine/merging says how)."""
Resolution = tuple[bytes, str, bytes]
"""Path, how (`open`: in part), and what is recorded of the conflict now."""

# `old` in the events below is what the event replaced; Transaction.append fills it in, so that
# undo needs the operation alone. It is None in logs written before it was recorded.


@plain_value_type
class StoreCreated:
    """The first event of every log. `epoch` tells apart logs that reuse sequence numbers."""

    cluster_id: bytes
    epoch: int


@plain_value_type
class EpochStarted:
    """Sequence numbers may repeat ones given out before (the log lost its end): a remote's cursor
    of an older epoch means nothing any more."""

    epoch: int


@plain_value_type
class DotCreated:
    dot: DotId
    namespace: str
    name: str
    owner: str


@plain_value_type
class DotRenamed:
    dot: DotId
    namespace: str
    name: str
    old: Names | None = None


@plain_value_type
class DotDeleted:
    """The dot lies in the trash directory `trash` until the grace is over."""

    dot: DotId
    trash: str
    was_current: bool = False
    old_tree: Tree | None = None


@plain_value_type
class DotRestored:
    """A deleted dot came back out of the trash."""

    dot: DotId
    namespace: str
    name: str


@plain_value_type
class DotPurged:
    """A deleted dot's objects are gone for good; its rows go too."""

    dot: DotId


@plain_value_type
class CurrentDotSwitched:
    dot: DotId | None
    old: DotId | None = None


@plain_value_type
class HeadSwitched:
    """The dot's current branch, which may be unborn."""

    dot: DotId
    branch: str
    old: str | None = None


@plain_value_type
class CommitsAdded:
    """Commits that became complete here: their closure is in the dot's packs."""

    dot: DotId
    commits: tuple[ObjectId, ...]
    transfer: bytes | None = None
    capture: Capture | None = None


@plain_value_type
class CommitsListed:
    """Commits known by their record alone (hollow): the graph has them, their content is not here.

    CommitsAdded of one of them, later, says that its content has come.
    """

    dot: DotId
    commits: tuple[ObjectId, ...]
    transfer: bytes | None = None


@plain_value_type
class CommitsThinned:
    """Complete commits that are hollow from now on: their content may go, their record stays."""

    dot: DotId
    commits: tuple[ObjectId, ...]
    reason: str = ""


@plain_value_type
class CommitsForgotten:
    """Commits that nothing names any more: gc gave them up, records and all. CommitsAdded of one
    of them, later, says that it came again."""

    dot: DotId
    commits: tuple[ObjectId, ...]


@plain_value_type
class DotScopeSet:
    """The subdots whose content this store keeps; None for all."""

    dot: DotId
    subdots: tuple[str, ...] | None
    old: tuple[str, ...] | None = None


@plain_value_type
class SignatureAdded:
    """A detached SSHSIG (armoured text) over the commit or tag `target`."""

    dot: DotId
    target: ObjectId
    signature: bytes


@plain_value_type
class RefChanged:
    """`name` is `branch/x`, `tag/x`, `remote/R/x` or `stash/x`; None stands for no ref."""

    dot: DotId
    name: str
    old: ObjectId | None
    new: ObjectId | None
    kind: str
    reason: str = ""
    origin: str | None = None
    old_origin: str | None = None


@plain_value_type
class BranchRenamed:
    """The branch with its reflog, its working snapshot and its managed tree: a tree whose rename
    a kill prevented follows when the dot is next changed.

    `strays`: refs whose origin was a former branch called `new`.
    """

    dot: DotId
    old: str
    new: str
    strays: tuple[str, ...] = ()


@plain_value_type
class WorkingSaved:
    """Uncommitted state of `branch`, stored as the snapshot commit `commit`."""

    dot: DotId
    branch: str
    commit: ObjectId
    reason: str = ""
    old: ObjectId | None = None


@plain_value_type
class WorkingDropped:
    dot: DotId
    branch: str
    old: ObjectId | None = None


@plain_value_type
class TreeAttached:
    """The user's directory `path` is the dot's tree; device and inode recognise it later."""

    dot: DotId
    path: bytes
    as_root: bool
    device: int
    inode: int


@plain_value_type
class TreeDetached:
    dot: DotId
    old: Tree | None = None


@plain_value_type
class TreeSwitchStarted:
    """The tree is between two states until TreeSwitchFinished: finish it before anything else.

    `discarded`: uncommitted changes went without being stored (--discard).
    """

    dot: DotId
    branch: str
    from_commit: ObjectId | None
    to_root_commit: ObjectId | None
    reason: str = ""
    discarded: bool = False


@plain_value_type
class TreeSwitchFinished:
    dot: DotId
    branch: str


@plain_value_type
class MergeStarted:
    """The tree of `branch` is being merged into, until MergeEnded; `dm merge --continue` commits.

    `ours` is the branch's tip, `theirs` what comes in, `bases` what both stem from; `snapshot` is
    the commit whose tree the working tree was given (conflicts beside their paths). The commit to
    be has `parents` and `message`; without parents the result stays uncommitted.
    """

    dot: DotId
    branch: str
    kind: str
    ours: ObjectId
    theirs: ObjectId
    bases: tuple[ObjectId, ...]
    snapshot: ObjectId
    parents: tuple[ObjectId, ...]
    message: str
    conflicts: tuple[Conflict, ...]


@plain_value_type
class ConflictResolved:
    """`how` is ours, theirs, base or as-is, or `open` when only part of it is: `detail` is then
    what is left of the conflict's."""

    dot: DotId
    branch: str
    path: bytes
    how: str
    detail: bytes = b""
    old_how: str | None = None
    old_detail: bytes = b""


@plain_value_type
class MergeEnded:
    """`started` is the sequence number of the MergeStarted that this ends; `resolutions` are the
    conflicts decided since, at least in part: path, how, detail."""

    dot: DotId
    branch: str
    outcome: str
    started: int = 0
    resolutions: tuple[Resolution, ...] = ()


@plain_value_type
class RemoteAdded:
    name: str
    url: str
    dm_command: str | None = None


@plain_value_type
class RemoteRemoved:
    name: str
    old_url: str | None = None
    old_dm_command: str | None = None
    old_upstreams: tuple[tuple[DotId, str, str], ...] = ()
    old_refs: tuple[tuple[DotId, str, ObjectId], ...] = ()


@plain_value_type
class RemoteRenamed:
    old: str
    new: str


@plain_value_type
class UpstreamSet:
    """The dot is called `[namespace/]name` at `remote`."""

    dot: DotId
    remote: str
    namespace: str
    name: str
    old: Names | None = None


@plain_value_type
class UpstreamRemoved:
    dot: DotId
    remote: str
    old: Names | None = None


@plain_value_type
class RemoteObserved:
    """The remote's log was read up to (epoch, seq) for this dot: the next listing starts there."""

    remote: str
    dot: DotId
    cluster_id: bytes
    epoch: int
    seq: int


@plain_value_type
class TransferStarted:
    transfer_id: bytes
    direction: str
    remote: str
    dot: DotId | None = None
    branch: str | None = None


@plain_value_type
class TransferFinished:
    """`summary` holds (name, text or integer or None) pairs."""

    transfer_id: bytes
    status: str
    summary: tuple[tuple[str, str | int | None], ...] = ()


@plain_value_type
class UndoApplied:
    """This operation takes back the one whose first event is `operation` (or, `is_redo`, takes
    back that taking back)."""

    operation: int
    is_redo: bool = False


@plain_value_type
class GarbageCollected:
    """gc went over a dot: `freed` says in numbers (bytes, objects, commits ...) what went."""

    dot: DotId
    freed: tuple[tuple[str, int], ...]


@plain_value_type
class CollaboratorAdded:
    """`user` may read and write the dot beside its owner; never delete or share it."""

    dot: DotId
    user: str


@plain_value_type
class CollaboratorRemoved:
    dot: DotId
    user: str


@plain_value_type
class QuotaSet:
    """How many bytes the dots of a namespace may take on this store; None: as many as fit."""

    namespace: str
    bytes_max: int | None
    old: int | None = None


Event = (
    StoreCreated
    | EpochStarted
    | DotCreated
    | DotRenamed
    | DotDeleted
    | DotRestored
    | DotPurged
    | CurrentDotSwitched
    | HeadSwitched
    | CommitsAdded
    | CommitsListed
    | CommitsThinned
    | CommitsForgotten
    | DotScopeSet
    | SignatureAdded
    | RefChanged
    | BranchRenamed
    | WorkingSaved
    | WorkingDropped
    | TreeAttached
    | TreeDetached
    | TreeSwitchStarted
    | TreeSwitchFinished
    | MergeStarted
    | ConflictResolved
    | MergeEnded
    | RemoteAdded
    | RemoteRemoved
    | RemoteRenamed
    | UpstreamSet
    | UpstreamRemoved
    | RemoteObserved
    | TransferStarted
    | TransferFinished
    | UndoApplied
    | GarbageCollected
    | CollaboratorAdded
    | CollaboratorRemoved
    | QuotaSet
)


@plain_value_type
class StoredEvent:
    """An event with its place in the log. Order is `seq` alone: `time_ns` (when this store learnt
    of it) may jump either way."""

    seq: int
    time_ns: int
    op_id: bytes
    command: str
    actor: str
    event: Event


@plain_value_type
class Operation:
    """What one command appended, all or nothing: one record of the log. The first event has
    sequence number `first_seq`, the others follow without a gap."""

    first_seq: int
    time_ns: int
    op_id: bytes
    command: str
    actor: str
    events: tuple[Event, ...]

    @property
    def last_seq(self) -> int:
        return self.first_seq + len(self.events) - 1

    def stored_events(self) -> tuple[StoredEvent, ...]:
        return tuple(
            StoredEvent(seq, self.time_ns, self.op_id, self.command, self.actor, event)
            for seq, event in enumerate(self.events, self.first_seq)
        )

    def to_value(self) -> tuple[Any, ...]:
        """The canonical array of this operation. Raises BadObject."""
        value = (
            self.first_seq,
            self.time_ns,
            self.op_id,
            self.command,
            self.actor,
            tuple(event_to_value(event) for event in self.events),
        )
        _check_operation(value)
        return value


# --- checks of single values, used in both directions -------------------------------------------

_Check = Callable[[Any], Any]


def _integer(low: int, high: int) -> _Check:
    def check(value: Any) -> Any:
        if type(value) is not int or not low <= value < high:
            raise BadObject("event: number out of range")
        return value

    return check


def _fixed(length: int) -> _Check:
    def check(value: Any) -> Any:
        if type(value) is not bytes or len(value) != length:
            raise BadObject(f"event: not {length} bytes")
        return value

    return check


def _text(value: Any) -> Any:
    if type(value) is not str:
        raise BadObject("event: not text")
    try:
        size = len(value.encode())
    except UnicodeEncodeError as exc:
        raise BadObject("event: text is not Unicode") from exc
    if size > TEXT_BYTES_MAX:
        raise BadObject("event: text is too long")
    return value


def _path(value: Any) -> Any:
    if type(value) is not bytes or not 0 < len(value) <= PATH_BYTES_MAX or b"\0" in value:
        raise BadObject("event: not a path")
    return value


def _optional(check: _Check) -> _Check:
    return lambda value: None if value is None else check(value)


def _flag(value: Any) -> Any:
    return bool(_integer(0, 2)(int(value) if type(value) is bool else value))


def _choice(*allowed: str) -> _Check:
    def check(value: Any) -> Any:
        if type(value) is not str or value not in allowed:
            raise BadObject(f"event: {value!r:.40} is none of {', '.join(allowed)}")
        return value

    return check


def _object_ids(value: Any) -> Any:
    if type(value) is not tuple or len(value) > COMMITS_MAX:
        raise BadObject("event: not a list of ids")
    for oid in value:
        _object_id(oid)
    return value


def _capture(value: Any) -> Any:
    if type(value) is not tuple or len(value) != 3:
        raise BadObject("event: capture is not [driver, consistency, pause]")
    _text(value[0])
    _text(value[1])
    _uint63(value[2])
    return value


def _bounded(length_max: int) -> _Check:
    def check(value: Any) -> Any:
        if type(value) is not bytes or len(value) > length_max:
            raise BadObject(f"event: not bytes of at most {length_max}")
        return value

    return check


def _array_of(*checks: _Check, most: int) -> _Check:
    """An array of at most `most` arrays, each of these fields."""

    def check(value: Any) -> Any:
        if type(value) is not tuple or len(value) > most:
            raise BadObject("event: not an array, or too long")
        for item in value:
            row(item)
        return value

    row = _fields(*checks)
    return check


def _fields(*checks: _Check) -> _Check:
    def check(value: Any) -> Any:
        if type(value) is not tuple or len(value) != len(checks):
            raise BadObject(f"event: not an array of {len(checks)}")
        return tuple(check(item) for check, item in zip(checks, value, strict=True))

    return check


def _texts_up_to(most: int) -> _Check:
    def check(value: Any) -> Any:
        if type(value) is not tuple or len(value) > most:
            raise BadObject("event: not a list of texts")
        for text in value:
            _text(text)
        return value

    return check


def _message(value: Any) -> Any:
    if type(value) is not str or len(value.encode("utf-8", "surrogatepass")) > MESSAGE_BYTES_MAX:
        raise BadObject("event: not a commit message")
    return value


def _summary(value: Any) -> Any:
    if type(value) is not tuple or len(value) > SUMMARY_PAIRS_MAX:
        raise BadObject("event: summary is not a list of pairs")
    for pair in value:
        if type(pair) is not tuple or len(pair) != 2:
            raise BadObject("event: summary is not a list of pairs")
        _text(pair[0])
        if pair[1] is not None and type(pair[1]) is not int:
            _text(pair[1])
        elif type(pair[1]) is int:
            _int64(pair[1])
    return value


_uint63: Final = _integer(0, 2**63)
_uint64: Final = _integer(0, 2**64)
_int64: Final = _integer(-(2**63), 2**63)
_object_id: Final = _fixed(ID_BYTES)
_dot: Final = _fixed(DOT_ID_BYTES)
_unique_id: Final = _fixed(UNIQUE_ID_BYTES)
_names: Final = _optional(_fields(_text, _text))
_texts: Final = _texts_up_to(SUMMARY_PAIRS_MAX)
_tree: Final = _optional(_fields(_path, _flag, _uint64, _uint64))
_conflicts: Final = _array_of(_path, _text, _bounded(CONFLICT_DETAIL_BYTES_MAX), most=CONFLICTS_MAX)
_how: Final = _choice("ours", "theirs", "base", "as-is", "open")
_resolutions: Final = _array_of(
    _path, _how, _bounded(CONFLICT_DETAIL_BYTES_MAX), most=CONFLICTS_MAX
)
_refs: Final = _texts_up_to(COMMITS_MAX)

# type number, version written, checks in the order of the fields. Numbers are never reused.
_TYPES: Final[dict[type, tuple[int, int, tuple[_Check, ...]]]] = {
    StoreCreated: (1, 1, (_unique_id, _uint63)),
    EpochStarted: (2, 1, (_uint63,)),
    DotCreated: (10, 1, (_dot, _text, _text, _text)),
    DotRenamed: (11, 2, (_dot, _text, _text, _names)),
    DotDeleted: (12, 2, (_dot, _text, _flag, _tree)),
    DotRestored: (13, 1, (_dot, _text, _text)),
    DotPurged: (14, 1, (_dot,)),
    CurrentDotSwitched: (15, 2, (_optional(_dot), _optional(_dot))),
    HeadSwitched: (16, 2, (_dot, _text, _optional(_text))),
    CommitsAdded: (20, 1, (_dot, _object_ids, _optional(_unique_id), _optional(_capture))),
    RefChanged: (
        21,
        2,
        (
            _dot,
            _text,
            _optional(_object_id),
            _optional(_object_id),
            _choice(*REF_CHANGE_KINDS),
            _text,
            _optional(_text),
            _optional(_text),
        ),
    ),
    BranchRenamed: (22, 2, (_dot, _text, _text, _refs)),
    CommitsListed: (23, 1, (_dot, _object_ids, _optional(_unique_id))),
    CommitsThinned: (24, 1, (_dot, _object_ids, _text)),
    CommitsForgotten: (27, 1, (_dot, _object_ids)),
    DotScopeSet: (25, 2, (_dot, _optional(_texts), _optional(_texts))),
    SignatureAdded: (26, 1, (_dot, _object_id, _bounded(SIGNATURE_BYTES_MAX))),
    WorkingSaved: (30, 2, (_dot, _text, _object_id, _text, _optional(_object_id))),
    WorkingDropped: (31, 2, (_dot, _text, _optional(_object_id))),
    TreeAttached: (32, 1, (_dot, _path, _flag, _uint64, _uint64)),
    TreeDetached: (33, 2, (_dot, _tree)),
    TreeSwitchStarted: (
        34,
        2,
        (_dot, _text, _optional(_object_id), _optional(_object_id), _text, _flag),
    ),
    TreeSwitchFinished: (35, 1, (_dot, _text)),
    MergeStarted: (
        36,
        1,
        (
            _dot,
            _text,
            _choice(*MERGE_KINDS),
            _object_id,
            _object_id,
            _object_ids,
            _object_id,
            _object_ids,
            _message,
            _conflicts,
        ),
    ),
    ConflictResolved: (
        37,
        1,
        (
            _dot,
            _text,
            _path,
            _how,
            _bounded(CONFLICT_DETAIL_BYTES_MAX),
            _optional(_how),
            _bounded(CONFLICT_DETAIL_BYTES_MAX),
        ),
    ),
    MergeEnded: (38, 2, (_dot, _text, _choice(*MERGE_OUTCOMES), _uint63, _resolutions)),
    RemoteAdded: (40, 1, (_text, _text, _optional(_text))),
    RemoteRemoved: (
        41,
        2,
        (
            _text,
            _optional(_text),
            _optional(_text),
            _array_of(_dot, _text, _text, most=COMMITS_MAX),
            _array_of(_dot, _text, _object_id, most=COMMITS_MAX),
        ),
    ),
    RemoteRenamed: (42, 1, (_text, _text)),
    UpstreamSet: (43, 2, (_dot, _text, _text, _text, _names)),
    RemoteObserved: (44, 1, (_text, _dot, _unique_id, _uint63, _uint63)),
    UpstreamRemoved: (45, 1, (_dot, _text, _names)),
    TransferStarted: (50, 1, (_unique_id, _text, _text, _optional(_dot), _optional(_text))),
    TransferFinished: (51, 1, (_unique_id, _text, _summary)),
    UndoApplied: (60, 1, (_uint63, _flag)),
    GarbageCollected: (61, 1, (_dot, _array_of(_text, _uint63, most=SUMMARY_PAIRS_MAX))),
    CollaboratorAdded: (70, 1, (_dot, _text)),
    CollaboratorRemoved: (71, 1, (_dot, _text)),
    QuotaSet: (72, 1, (_text, _optional(_uint63), _optional(_uint63))),
}
_BY_NUMBER: Final = {number: (cls, version) for cls, (number, version, _) in _TYPES.items()}
_FIELD_NAMES: Final = {cls: tuple(field.name for field in fields(cls)) for cls in _TYPES}


def _appending(*values: Any) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """An upcast that only adds fields, with what stands for "not recorded"."""
    return lambda fields: (*fields, *values)


_UPCASTS: Final[dict[tuple[int, int], Callable[[tuple[Any, ...]], tuple[Any, ...]]]] = {
    (11, 1): _appending(None),
    (12, 1): _appending(0, None),
    (15, 1): _appending(None),
    (16, 1): _appending(None),
    (21, 1): _appending(None),
    (22, 1): _appending(()),
    (25, 1): _appending(None),
    (30, 1): _appending(None),
    (31, 1): _appending(None),
    (33, 1): _appending(None),
    (34, 1): _appending(0),
    (38, 1): _appending(()),
    (41, 1): _appending(None, None, (), ()),
    (43, 1): _appending(None),
}
"""(type number, version) -> the fields as version + 1 has them; applied one step at a time."""

assert set(_TYPES) == set(get_args(Event))


def event_to_value(event: Event) -> tuple[Any, ...]:
    """`[type, version, field...]`, checked as a reader would check it. Raises BadObject."""
    number, version, checks = _TYPES[type(event)]
    values = [getattr(event, name) for name in _FIELD_NAMES[type(event)]]
    for check, value in zip(checks, values, strict=True):
        check(value)
    return (number, version, *(_without_flags(value) for value in values))


def _without_flags(value: Any) -> Any:
    """The encoding has no booleans."""
    if type(value) is bool:
        return int(value)
    if type(value) is tuple:
        return tuple(map(_without_flags, value))
    return value


def event_from_value(value: Any) -> Event:
    """Build a checked event from a decoded array.

    Raises:
        FormatUnsupported: a type or version of a newer dmsync.
        BadObject: anything else that is no event.
    """
    if type(value) is not tuple or len(value) < 2:
        raise BadObject("event is not an array of type, version and fields")
    number, version, *values = value
    _uint63(number)
    _uint63(version)
    if number not in _BY_NUMBER:
        raise FormatUnsupported(f"event type {number} is of a newer dmsync", event_type=number)
    cls, current = _BY_NUMBER[number]
    if version > current:
        raise FormatUnsupported(
            f"version {version} of event {cls.__name__} is of a newer dmsync", event_type=number
        )
    if version < 1:
        raise BadObject("event version is not positive")
    fields_now = tuple(values)
    for step in range(version, current):
        fields_now = _UPCASTS[number, step](fields_now)
    checks = _TYPES[cls][2]
    if len(fields_now) != len(checks):
        raise BadObject(f"event {cls.__name__} has {len(fields_now)} fields, not {len(checks)}")
    checked = [check(item) for check, item in zip(checks, fields_now, strict=True)]
    event: Event = cls(*checked)
    return event


def _check_operation(value: Any) -> None:
    if type(value) is not tuple or len(value) != 6:
        raise BadObject("operation is not an array of 6")
    first_seq, time_ns, op_id, command, actor, events = value
    _integer(1, 2**63)(first_seq)
    _int64(time_ns)
    _unique_id(op_id)
    _text(command)
    _text(actor)
    if type(events) is not tuple or not events:
        raise BadObject("operation without events")


def operation_from_value(value: Any) -> Operation:
    """Build a checked operation. Raises BadObject, FormatUnsupported."""
    _check_operation(value)
    first_seq, time_ns, op_id, command, actor, events = value
    return Operation(
        first_seq,
        time_ns,
        op_id,
        command,
        actor,
        tuple(event_from_value(event) for event in events),
    )
