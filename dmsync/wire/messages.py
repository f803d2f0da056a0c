"""Messages of dmsync/1 and their payloads: fixed-order arrays, every field bounded (WIRE.md 3)."""

import re
from dataclasses import dataclass, field, fields
from enum import IntEnum
from typing import Any, ClassVar, Final

from dmsync.core.encoding import ITEMS_MAX, decode, encode
from dmsync.core.ids import DOT_ID_BYTES, ID_BYTES, KEY_BYTES, DotId, Kind, ObjectId
from dmsync.core.names import check_ref_name
from dmsync.errors import BadObject, InvalidName, ProtocolError
from dmsync.wire import limits
from dmsync.wire.fields import (
    Array,
    Bytes,
    Checked,
    Choice,
    Field,
    Flagged,
    Integer,
    Optional,
    Text,
    Tuple,
    exactly,
)
from dmsync.wire.frames import Flag, Frame, FrameType


class Intent(IntEnum):
    LIST = 0
    PULL = 1
    PUSH = 2


class Known(IntEnum):
    """What a store holds of a commit."""

    ABSENT = 0
    RECORD_ONLY = 1
    CONTENT = 2


HOLLOW_COMMIT: Final = 4
"""In PLAN: a commit of which the record comes and the content does not."""


class RefMode(IntEnum):
    """Under which condition a ref may move."""

    CREATE = 0
    """The ref must not exist (or already be there)."""
    FF = 1
    """Create, or move to a descendant."""
    LEASE = 2
    """Move anywhere, when the ref is what `expected` says."""
    ADVANCE = 3
    """Like FF, but a ref that cannot move is left alone: the ancestors of a pushed branch."""
    STASH = 4
    """Like FF; a diverged tip is first kept under <name>-DIVERGED-<time>."""


class ShareAction(IntEnum):
    """What to do with the collaborators of a dot."""

    LIST = 0
    ADD = 1
    REMOVE = 2


class RefStatus(IntEnum):
    UP_TO_DATE = 0
    CREATED = 1
    FAST_FORWARD = 2
    FORCED = 3
    STASHED = 4
    """Moved; the old tip is kept under the stash name."""
    AHEAD = 5
    """Not moved: it already holds everything (modes ADVANCE and STASH)."""
    LEFT = 6
    """Not moved: mode ADVANCE and not a fast-forward."""
    REFUSED = 7


def is_ref_name(text: str) -> bool:
    """True for `branch/x`, `tag/x`, `stash/x`, `remote/r/x` within the limits."""
    try:
        check_ref_name(text)
    except InvalidName:
        return False
    return len(text) <= limits.REF_NAME_BYTES_MAX


def is_subdot_name(text: str) -> bool:
    """True for what may be the name of a subdot: one name of a file system, as text."""
    size = len(text.encode("utf-8", "surrogatepass"))
    return 0 < size <= 255 and text not in (".", "..") and "/" not in text and "\0" not in text


def is_plain_name(text: str) -> bool:
    """True for a namespace, dot or branch name; made names may reach 128 characters."""
    return (
        len(text) <= limits.NAME_CHARS_MAX
        and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", text, re.ASCII) is not None
    )


_ID: Final = exactly(ID_BYTES)
_DOT: Final = exactly(DOT_ID_BYTES)
_TRANSFER: Final = exactly(16)
_NAME: Final = Checked(is_plain_name, "a name")
_SUBDOTS: Final = Optional(Array(Checked(is_subdot_name, "a subdot"), limits.SUBDOTS_MAX))
_NAMESPACE: Final = Checked(lambda text: text == "" or is_plain_name(text), "a namespace")
"""Empty: the store's own, which is shown as nothing."""
_BRANCH: Final = _NAME
_REF: Final = Checked(is_ref_name, "a ref name")
_COUNT: Final = Integer()


@dataclass(frozen=True, slots=True)
class RefValue:
    """One ref a server advertises. `origin`: the branch it was made from, if known. `id` of an
    annotated tag is that of the tag object, and `peeled` the commit it names."""

    name: str
    id: ObjectId
    origin: str | None = None
    peeled: ObjectId | None = None

    @property
    def commit(self) -> ObjectId:
        return self.peeled or self.id


@dataclass(frozen=True, slots=True)
class DotValue:
    """One dot a server lists; `head` is its current branch."""

    dot: DotId
    namespace: str
    name: str
    head: str | None
    branches_count: int


@dataclass(frozen=True, slots=True)
class RefUpdate:
    """One ref to move. `expected` is the old id for LEASE (None: must not exist); `ahead_count`
    is how many commits the sender's line has beyond the common ones, for messages only."""

    ref: str
    mode: RefMode
    expected: ObjectId | None
    new: ObjectId
    origin: str | None = None
    ahead_count: int = 0


@dataclass(frozen=True, slots=True)
class RefOutcome:
    """What became of one update. `stash` is the ref that keeps the old tip; `code` and `text`
    say why a REFUSED one was."""

    ref: str
    status: RefStatus
    old: ObjectId | None
    new: ObjectId | None
    stash: str | None = None
    code: str = ""
    text: str = ""


_REF_VALUE: Final = Tuple(
    (_REF, _ID, Optional(_BRANCH), Optional(_ID)),
    RefValue,
    ("name", "id", "origin", "peeled"),
    has_optional=True,
)
_DOT_VALUE: Final = Tuple(
    (_DOT, _NAMESPACE, _NAME, Optional(_BRANCH), _COUNT),
    DotValue,
    ("dot", "namespace", "name", "head", "branches_count"),
)
_REF_UPDATE: Final = Tuple(
    (_REF, Choice(RefMode), Optional(_ID), _ID, Optional(_BRANCH), _COUNT),
    RefUpdate,
    ("ref", "mode", "expected", "new", "origin", "ahead_count"),
)
_REF_OUTCOME: Final = Tuple(
    (_REF, Choice(RefStatus), Optional(_ID), Optional(_ID), Optional(_REF), Text(64), Text(4096)),
    RefOutcome,
    ("ref", "status", "old", "new", "stash", "code", "text"),
)


@dataclass(frozen=True, slots=True)
class Hello:
    """Both sides send it at once. `required`: capabilities the peer must have."""

    TYPE: ClassVar[FrameType] = FrameType.HELLO
    FIELDS: ClassVar[tuple[Field, ...]] = (
        Integer(65_535),
        Integer(65_535),
        Array(Tuple((Text(64), Text(256))), limits.CAPABILITIES_MAX),
        Array(Text(64), limits.CAPABILITIES_MAX),
        Text(128),
        Bytes(64),
        _COUNT,
        Array(Tuple((Text(64), _COUNT)), limits.CAPABILITIES_MAX),
    )
    version_min: int
    version_max: int
    capabilities: tuple[tuple[str, str], ...]
    required: tuple[str, ...]
    agent: str
    cluster_id: bytes
    epoch: int
    limits: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Refs:
    """Ask for one dot's refs, by id, by name or both. `cursor`: (epoch, seq) last seen."""

    TYPE: ClassVar[FrameType] = FrameType.REFS
    FIELDS: ClassVar[tuple[Field, ...]] = (
        Optional(_DOT),
        Optional(_NAMESPACE),
        Optional(_NAME),
        Choice(Intent),
        Optional(Tuple((_COUNT, _COUNT))),
    )
    dot: DotId | None
    namespace: str | None
    name: str | None
    intent: Intent
    cursor: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class RefsReply:
    """A page of a dot's refs, by name. `dot` None: no such dot for this caller.

    `hollow`: of some commits the server has the record alone. `subdots`: whose content it keeps.
    """

    TYPE: ClassVar[FrameType] = FrameType.REFS_REPLY
    FIELDS: ClassVar[tuple[Field, ...]] = (
        Optional(_DOT),
        _NAMESPACE,
        Optional(_NAME),
        _NAMESPACE,
        Text(limits.NAME_CHARS_MAX),
        Optional(_BRANCH),
        _COUNT,
        _COUNT,
        Array(_REF_VALUE, limits.REFS_PAGE_MAX),
        Flagged(),
        _SUBDOTS,
    )
    OPTIONAL: ClassVar[int] = 2
    dot: DotId | None
    namespace: str
    name: str | None
    default_namespace: str
    user: str
    head: str | None
    seq: int
    epoch: int
    refs: tuple[RefValue, ...]
    hollow: bool = False
    subdots: tuple[str, ...] | None = None
    last: bool = True


@dataclass(frozen=True, slots=True)
class ListDots:
    TYPE: ClassVar[FrameType] = FrameType.LIST_DOTS
    FIELDS: ClassVar[tuple[Field, ...]] = ()


@dataclass(frozen=True, slots=True)
class DotsReply:
    """A page of the dots the caller may read."""

    TYPE: ClassVar[FrameType] = FrameType.DOTS_REPLY
    FIELDS: ClassVar[tuple[Field, ...]] = (_NAMESPACE, Array(_DOT_VALUE, limits.DOTS_PAGE_MAX))
    default_namespace: str
    dots: tuple[DotValue, ...]
    last: bool = True


@dataclass(frozen=True, slots=True)
class Share:
    """List, add or remove collaborators of the dot named by REFS. `user` None: LIST only."""

    TYPE: ClassVar[FrameType] = FrameType.SHARE
    FIELDS: ClassVar[tuple[Field, ...]] = (Choice(ShareAction), Optional(_NAME))
    action: ShareAction
    user: str | None = None


@dataclass(frozen=True, slots=True)
class Shared:
    """The collaborators of the dot as they are now, by name."""

    TYPE: ClassVar[FrameType] = FrameType.SHARED
    FIELDS: ClassVar[tuple[Field, ...]] = (Array(_NAME, limits.COLLABORATORS_MAX),)
    users: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class KnownQuery:
    """Which of these commits of the dot named by REFS does the server hold?"""

    TYPE: ClassVar[FrameType] = FrameType.KNOWN
    FIELDS: ClassVar[tuple[Field, ...]] = (Array(_ID, limits.KNOWN_IDS_MAX),)
    ids: tuple[ObjectId, ...]


@dataclass(frozen=True, slots=True)
class KnownReply:
    """One byte (Known) for each id asked, in order."""

    TYPE: ClassVar[FrameType] = FrameType.KNOWN_REPLY
    FIELDS: ClassVar[tuple[Field, ...]] = (Bytes(limits.KNOWN_IDS_MAX),)
    states: bytes


@dataclass(frozen=True, slots=True)
class Push:
    """Begin to send. `frontier`: heads of what both sides hold, as the sender knows them."""

    TYPE: ClassVar[FrameType] = FrameType.PUSH
    FIELDS: ClassVar[tuple[Field, ...]] = (
        _TRANSFER,
        _TRANSFER,
        _DOT,
        Optional(_NAMESPACE),
        _NAME,
        Flagged(),
        Flagged(),
        Array(_REF_UPDATE, limits.UPDATES_MAX),
        Array(_ID, limits.FRONTIER_MAX),
    )
    transfer: bytes
    op: bytes
    dot: DotId
    namespace: str | None
    name: str
    create: bool
    atomic: bool
    updates: tuple[RefUpdate, ...]
    frontier: tuple[ObjectId, ...]


@dataclass(frozen=True, slots=True)
class Ready:
    """The push may go on. `credits`: record bytes that may be unacknowledged."""

    TYPE: ClassVar[FrameType] = FrameType.READY
    FIELDS: ClassVar[tuple[Field, ...]] = (_TRANSFER, _COUNT)
    transfer: bytes
    credits: int


@dataclass(frozen=True, slots=True)
class Plan:
    """A page of the objects to send: one kind byte and one 8-byte short key each, joined.

    HOLLOW_COMMIT in place of a kind is a commit that comes without its content.

    `raw_bytes_total` is what the objects come to decoded: a bound for progress, not a promise.
    """

    TYPE: ClassVar[FrameType] = FrameType.PLAN
    FIELDS: ClassVar[tuple[Field, ...]] = (
        _COUNT,
        Bytes(limits.PLAN_ENTRIES_MAX),
        Bytes(KEY_BYTES * limits.PLAN_ENTRIES_MAX),
        _COUNT,
        _COUNT,
    )
    first_index: int
    kinds: bytes
    keys: bytes
    objects_total: int
    raw_bytes_total: int
    last: bool = True
    eager: bool = False

    def entries(self) -> list[tuple[Kind, bytes]]:
        """(kind, short key) of each object of the page."""
        return [
            (
                Kind.COMMIT if kind == HOLLOW_COMMIT else Kind(kind),
                self.keys[KEY_BYTES * at : KEY_BYTES * (at + 1)],
            )
            for at, kind in enumerate(self.kinds)
        ]


@dataclass(frozen=True, slots=True)
class PlanReply:
    """What of one PLAN page the receiver holds durably: bit i of byte i//8, lowest bit first."""

    TYPE: ClassVar[FrameType] = FrameType.PLAN_REPLY
    FIELDS: ClassVar[tuple[Field, ...]] = (
        _COUNT,
        Integer(limits.PLAN_ENTRIES_MAX),
        Bytes(limits.PLAN_ENTRIES_MAX // 8),
    )
    first_index: int
    count: int
    bitmap: bytes

    def holds(self, position: int) -> bool:
        return bool(self.bitmap[position // 8] >> (position % 8) & 1)


@dataclass(frozen=True, slots=True)
class Records:
    """Stored records, verbatim, joined (core.records); the payload is not msgpack."""

    TYPE: ClassVar[FrameType] = FrameType.RECORDS
    FIELDS: ClassVar[tuple[Field, ...]] = ()
    joined: bytes


@dataclass(frozen=True, slots=True)
class Signatures:
    """Armoured SSHSIGs over commits and tags of this transfer: (target, signature)."""

    TYPE: ClassVar[FrameType] = FrameType.SIGNATURES
    FIELDS: ClassVar[tuple[Field, ...]] = (
        _TRANSFER,
        Array(
            Tuple((_ID, Bytes(limits.SIGNATURE_BYTES_MAX, 1))),
            limits.SIGNATURES_PAGE_MAX,
        ),
    )
    transfer: bytes
    signatures: tuple[tuple[ObjectId, bytes], ...]


@dataclass(frozen=True, slots=True)
class Ack:
    """Records and record bytes of this transfer that are durable at the receiver, so far."""

    TYPE: ClassVar[FrameType] = FrameType.ACK
    FIELDS: ClassVar[tuple[Field, ...]] = (_COUNT, _COUNT, _COUNT)
    records_durable: int
    bytes_durable: int
    credits: int


@dataclass(frozen=True, slots=True)
class Update:
    """All records are sent: check, promote and move the refs that PUSH named."""

    TYPE: ClassVar[FrameType] = FrameType.UPDATE
    FIELDS: ClassVar[tuple[Field, ...]] = (_TRANSFER, _COUNT)
    transfer: bytes
    records_sent: int


@dataclass(frozen=True, slots=True)
class Result:
    """The only success of a push: what became of each ref, durably. `hollow_count`: commits that
    came by their record alone."""

    TYPE: ClassVar[FrameType] = FrameType.RESULT
    FIELDS: ClassVar[tuple[Field, ...]] = (
        _TRANSFER,
        Array(_REF_OUTCOME, limits.UPDATES_MAX),
        _COUNT,
        _COUNT,
        _COUNT,
    )
    OPTIONAL: ClassVar[int] = 1
    transfer: bytes
    outcomes: tuple[RefOutcome, ...]
    seq: int
    epoch: int
    hollow_count: int = 0


@dataclass(frozen=True, slots=True)
class Fetch:
    """Ask for the ancestors of `wants` that are no ancestors of `frontier`.

    With content come those less than `depth` steps from a want (0: all), and `content`: commits
    whose record the client has. It has the content of the ancestors of `frontier` that are no
    ancestors of `absent`. `subdots`: whose content it wants and has; None for all.
    """

    TYPE: ClassVar[FrameType] = FrameType.FETCH
    FIELDS: ClassVar[tuple[Field, ...]] = (
        _TRANSFER,
        _DOT,
        Array(_ID, limits.WANTS_MAX),
        Array(_ID, limits.FRONTIER_MAX),
        _COUNT,
        Array(_ID, limits.CONTENT_MAX),
        Array(_ID, limits.ABSENT_MAX),
        _SUBDOTS,
    )
    OPTIONAL: ClassVar[int] = 4
    transfer: bytes
    dot: DotId
    wants: tuple[ObjectId, ...]
    frontier: tuple[ObjectId, ...]
    depth: int = 0
    content: tuple[ObjectId, ...] = ()
    absent: tuple[ObjectId, ...] = ()
    subdots: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Done:
    """All records of a FETCH are sent."""

    TYPE: ClassVar[FrameType] = FrameType.DONE
    FIELDS: ClassVar[tuple[Field, ...]] = (_TRANSFER, _COUNT, _COUNT, _COUNT)
    transfer: bytes
    records_sent: int
    verbatim_count: int
    reencoded_count: int


@dataclass(frozen=True, slots=True)
class Ping:
    TYPE: ClassVar[FrameType] = FrameType.PING
    FIELDS: ClassVar[tuple[Field, ...]] = ()


@dataclass(frozen=True, slots=True)
class Pong:
    TYPE: ClassVar[FrameType] = FrameType.PONG
    FIELDS: ClassVar[tuple[Field, ...]] = ()


@dataclass(frozen=True, slots=True)
class Failure:
    """ERROR: the sender gives up the session. `facts_json` is a JSON object."""

    TYPE: ClassVar[FrameType] = FrameType.ERROR
    FIELDS: ClassVar[tuple[Field, ...]] = (
        Text(64),
        Text(limits.TEXT_CHARS_MAX),
        Text(limits.TEXT_CHARS_MAX),
        Text(limits.FACTS_CHARS_MAX),
        Flagged(),
    )
    code: str
    message: str
    hint: str = ""
    facts_json: str = "{}"
    retryable: bool = field(default=False)


@dataclass(frozen=True, slots=True)
class Bye:
    TYPE: ClassVar[FrameType] = FrameType.BYE
    FIELDS: ClassVar[tuple[Field, ...]] = ()


Message = (
    Hello
    | Refs
    | RefsReply
    | ListDots
    | DotsReply
    | KnownQuery
    | KnownReply
    | Push
    | Ready
    | Plan
    | PlanReply
    | Records
    | Ack
    | Update
    | Result
    | Fetch
    | Done
    | Ping
    | Pong
    | Failure
    | Bye
    | Signatures
    | Share
    | Shared
)

_CLASSES: Final[dict[FrameType, Any]] = {
    cls.TYPE: cls
    for cls in (
        *(Hello, Refs, RefsReply, ListDots, DotsReply, KnownQuery, KnownReply, Push, Ready, Plan),
        *(PlanReply, Records, Ack, Update, Result, Fetch, Done, Ping, Pong, Failure, Bye),
        *(Signatures, Share, Shared),
    )
}
_PAGED: Final = {
    FrameType.REFS_REPLY: Flag.LAST,
    FrameType.DOTS_REPLY: Flag.LAST,
    FrameType.PLAN: Flag.LAST | Flag.EAGER,
}
_FLAG_FIELDS: Final = ("last", "eager")


def frame_from_message(message: Message) -> Frame:
    """The frame of one of our own messages."""
    if isinstance(message, Records):
        return Frame(FrameType.RECORDS, Flag.NONE, message.joined)
    named = [f for f in fields(message) if f.name not in _FLAG_FIELDS]
    values = [getattr(message, f.name) for f in named]
    for left_out in range(getattr(message, "OPTIONAL", 0)):
        if values[-1] != named[-1 - left_out].default:
            break
        values.pop()
    built = tuple(f.build(v) for f, v in zip(message.FIELDS, values, strict=False))
    flags = Flag.NONE
    if getattr(message, "last", False):
        flags |= Flag.LAST
    if getattr(message, "eager", False):
        flags |= Flag.EAGER
    return Frame(message.TYPE, flags, encode(built) if built else b"")


def message_from_frame(frame: Frame) -> Message:
    """The checked message of a frame.

    Raises:
        ProtocolError: payload not canonical, a field out of its bounds, a flag where none is.
    """
    if frame.type is FrameType.RECORDS:
        _refuse_flags(frame, Flag.NONE)
        return Records(frame.payload)
    cls = _CLASSES[frame.type]
    values = _parse_fields(cls.FIELDS, frame, getattr(cls, "OPTIONAL", 0))
    flags: dict[str, bool] = {}
    if frame.type in _PAGED:
        flags["last"] = Flag.LAST in frame.flags
    if frame.type is FrameType.PLAN:
        flags["eager"] = Flag.EAGER in frame.flags
    _refuse_flags(frame, _PAGED.get(frame.type, Flag.NONE))
    return _check(cls(*values, **flags))


def _refuse_flags(frame: Frame, allowed: Flag) -> None:
    if int(frame.flags) & ~int(allowed | Flag.MAY_IGNORE):
        raise ProtocolError(f"{frame.type.name} carries flags {int(frame.flags)}")


def _parse_fields(expected: tuple[Field, ...], frame: Frame, optional: int) -> tuple[Any, ...]:
    """The fields' values; of the last `optional` ones those may lack that are as by default."""
    if not expected:
        if frame.payload:
            raise ProtocolError(f"{frame.type.name} carries a payload")
        return ()
    try:
        value = decode(frame.payload, items_max=ITEMS_MAX)
    except BadObject as exc:
        raise ProtocolError(f"{frame.type.name}: {exc.message}") from exc
    if type(value) is tuple and len(expected) - optional <= len(value) < len(expected):
        expected = expected[: len(value)]
    parsed: tuple[Any, ...] = Tuple(expected).parse(value)
    return parsed


def _check(message: Any) -> Message:
    """Checks that span fields."""
    match message:
        case RefsReply(refs=(), last=False) | DotsReply(dots=(), last=False):
            raise ProtocolError("an empty page that is not the last")
        case Plan(kinds=kinds, keys=keys):
            if not kinds and not message.last:
                raise ProtocolError("an empty page that is not the last")
            if len(keys) != KEY_BYTES * len(kinds):
                raise ProtocolError("PLAN: as many keys as kinds")
            if any(kind not in _KIND_NUMBERS for kind in set(kinds)):
                raise ProtocolError("PLAN: unknown kind of object")
        case PlanReply(count=count, bitmap=bitmap):
            if len(bitmap) != (count + 7) // 8:
                raise ProtocolError("PLAN_REPLY: bitmap does not fit its count")
        case Share(action=action, user=user):
            if (user is None) != (action is ShareAction.LIST):
                raise ProtocolError("SHARE: a user to add or remove, and none to list")
        case KnownReply(states=states):
            if any(state > Known.CONTENT for state in set(states)):
                raise ProtocolError("KNOWN_REPLY: unknown state")
        case _:
            pass
    checked: Message = message
    return checked


_KIND_NUMBERS: Final = frozenset((*(int(kind) for kind in Kind), HOLLOW_COMMIT))
