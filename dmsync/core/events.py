"""Events: what happened to a store, as past-tense facts (protocol/STORE.md 4).

Everything mutable (dots, refs, heads, trees, remotes) is the fold of these. An event is stored as
`[type, version, field...]` in canonical encoding; values are checked both when written and when
read, so that nothing unreadable can enter a log and nothing malformed can leave one.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Final, get_args

from dmsync.core.ids import DOT_ID_BYTES, ID_BYTES, DotId, ObjectId
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
)

Capture = tuple[str, str, int]
"""How a commit was captured: driver, consistency, pause in microseconds."""


@dataclass(frozen=True, slots=True)
class StoreCreated:
    """The first event of every log. `epoch` tells apart logs that reuse sequence numbers."""

    cluster_id: bytes
    epoch: int


@dataclass(frozen=True, slots=True)
class EpochStarted:
    """Sequence numbers may repeat ones given out before (the log lost its end): a remote's cursor
    of an older epoch means nothing any more."""

    epoch: int


@dataclass(frozen=True, slots=True)
class DotCreated:
    dot: DotId
    namespace: str
    name: str
    owner: str


@dataclass(frozen=True, slots=True)
class DotRenamed:
    dot: DotId
    namespace: str
    name: str


@dataclass(frozen=True, slots=True)
class DotDeleted:
    """The dot lies in the trash directory `trash` until the grace is over."""

    dot: DotId
    trash: str


@dataclass(frozen=True, slots=True)
class DotRestored:
    """A deleted dot came back out of the trash."""

    dot: DotId
    namespace: str
    name: str


@dataclass(frozen=True, slots=True)
class DotPurged:
    """A deleted dot's objects are gone for good; its rows go too."""

    dot: DotId


@dataclass(frozen=True, slots=True)
class CurrentDotSwitched:
    dot: DotId | None


@dataclass(frozen=True, slots=True)
class HeadSwitched:
    """The dot's current branch, which may be unborn."""

    dot: DotId
    branch: str


@dataclass(frozen=True, slots=True)
class CommitsAdded:
    """Commits that became complete here: their closure is in the dot's packs."""

    dot: DotId
    commits: tuple[ObjectId, ...]
    transfer: bytes | None = None
    capture: Capture | None = None


@dataclass(frozen=True, slots=True)
class RefChanged:
    """`name` is `branch/x`, `tag/x`, `remote/R/x` or `stash/x`; None stands for no ref."""

    dot: DotId
    name: str
    old: ObjectId | None
    new: ObjectId | None
    kind: str
    reason: str = ""
    origin: str | None = None


@dataclass(frozen=True, slots=True)
class BranchRenamed:
    dot: DotId
    old: str
    new: str


@dataclass(frozen=True, slots=True)
class WorkingSaved:
    """Uncommitted state of `branch`, stored as the snapshot commit `commit`."""

    dot: DotId
    branch: str
    commit: ObjectId
    reason: str = ""


@dataclass(frozen=True, slots=True)
class WorkingDropped:
    dot: DotId
    branch: str


@dataclass(frozen=True, slots=True)
class TreeAttached:
    """The user's directory `path` is the dot's tree; device and inode recognise it later."""

    dot: DotId
    path: bytes
    as_root: bool
    device: int
    inode: int


@dataclass(frozen=True, slots=True)
class TreeDetached:
    dot: DotId


@dataclass(frozen=True, slots=True)
class TreeSwitchStarted:
    """The tree is between two states until TreeSwitchFinished: finish it before anything else."""

    dot: DotId
    branch: str
    from_commit: ObjectId | None
    to_root_commit: ObjectId | None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class TreeSwitchFinished:
    dot: DotId
    branch: str


@dataclass(frozen=True, slots=True)
class RemoteAdded:
    name: str
    url: str
    dm_command: str | None = None


@dataclass(frozen=True, slots=True)
class RemoteRemoved:
    name: str


@dataclass(frozen=True, slots=True)
class RemoteRenamed:
    old: str
    new: str


@dataclass(frozen=True, slots=True)
class UpstreamSet:
    """The dot is called `[namespace/]name` at `remote`."""

    dot: DotId
    remote: str
    namespace: str
    name: str


@dataclass(frozen=True, slots=True)
class RemoteObserved:
    """The remote's log was read up to (epoch, seq) for this dot: the next listing starts there."""

    remote: str
    dot: DotId
    cluster_id: bytes
    epoch: int
    seq: int


@dataclass(frozen=True, slots=True)
class TransferStarted:
    transfer_id: bytes
    direction: str
    remote: str
    dot: DotId | None = None
    branch: str | None = None


@dataclass(frozen=True, slots=True)
class TransferFinished:
    """`summary` holds (name, text or integer or None) pairs."""

    transfer_id: bytes
    status: str
    summary: tuple[tuple[str, str | int | None], ...] = ()


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
    | RefChanged
    | BranchRenamed
    | WorkingSaved
    | WorkingDropped
    | TreeAttached
    | TreeDetached
    | TreeSwitchStarted
    | TreeSwitchFinished
    | RemoteAdded
    | RemoteRemoved
    | RemoteRenamed
    | UpstreamSet
    | RemoteObserved
    | TransferStarted
    | TransferFinished
)


@dataclass(frozen=True, slots=True)
class StoredEvent:
    """An event with its place in the log. Order is `seq` alone: `time_ns` (when this store learnt
    of it) may jump either way."""

    seq: int
    time_ns: int
    op_id: bytes
    command: str
    actor: str
    event: Event


@dataclass(frozen=True, slots=True)
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

# type number, version written, checks in the order of the fields. Numbers are never reused.
_TYPES: Final[dict[type, tuple[int, int, tuple[_Check, ...]]]] = {
    StoreCreated: (1, 1, (_unique_id, _uint63)),
    EpochStarted: (2, 1, (_uint63,)),
    DotCreated: (10, 1, (_dot, _text, _text, _text)),
    DotRenamed: (11, 1, (_dot, _text, _text)),
    DotDeleted: (12, 1, (_dot, _text)),
    DotRestored: (13, 1, (_dot, _text, _text)),
    DotPurged: (14, 1, (_dot,)),
    CurrentDotSwitched: (15, 1, (_optional(_dot),)),
    HeadSwitched: (16, 1, (_dot, _text)),
    CommitsAdded: (20, 1, (_dot, _object_ids, _optional(_unique_id), _optional(_capture))),
    RefChanged: (
        21,
        1,
        (
            _dot,
            _text,
            _optional(_object_id),
            _optional(_object_id),
            _choice(*REF_CHANGE_KINDS),
            _text,
            _optional(_text),
        ),
    ),
    BranchRenamed: (22, 1, (_dot, _text, _text)),
    WorkingSaved: (30, 1, (_dot, _text, _object_id, _text)),
    WorkingDropped: (31, 1, (_dot, _text)),
    TreeAttached: (32, 1, (_dot, _path, _flag, _uint64, _uint64)),
    TreeDetached: (33, 1, (_dot,)),
    TreeSwitchStarted: (
        34,
        1,
        (_dot, _text, _optional(_object_id), _optional(_object_id), _text),
    ),
    TreeSwitchFinished: (35, 1, (_dot, _text)),
    RemoteAdded: (40, 1, (_text, _text, _optional(_text))),
    RemoteRemoved: (41, 1, (_text,)),
    RemoteRenamed: (42, 1, (_text, _text)),
    UpstreamSet: (43, 1, (_dot, _text, _text, _text)),
    RemoteObserved: (44, 1, (_text, _dot, _unique_id, _uint63, _uint63)),
    TransferStarted: (50, 1, (_unique_id, _text, _text, _optional(_dot), _optional(_text))),
    TransferFinished: (51, 1, (_unique_id, _text, _summary)),
}
_BY_NUMBER: Final = {number: (cls, version) for cls, (number, version, _) in _TYPES.items()}
_FIELD_NAMES: Final = {cls: tuple(field.name for field in fields(cls)) for cls in _TYPES}

_UPCASTS: Final[dict[tuple[int, int], Callable[[tuple[Any, ...]], tuple[Any, ...]]]] = {}
"""(type number, version) -> the fields as version + 1 has them; applied one step at a time."""

assert set(_TYPES) == set(get_args(Event))


def event_to_value(event: Event) -> tuple[Any, ...]:
    """`[type, version, field...]`, checked as a reader would check it. Raises BadObject."""
    number, version, checks = _TYPES[type(event)]
    values = [getattr(event, name) for name in _FIELD_NAMES[type(event)]]
    for check, value in zip(checks, values, strict=True):
        check(value)
    return (number, version, *(int(v) if type(v) is bool else v for v in values))


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
