"""What the catalog's queries return."""

from dmsync.core.events import Capture
from dmsync.core.ids import DotId, ObjectId
from dmsync.core.values import plain_value_type


@plain_value_type
class DotRow:
    """`head` is the current branch, perhaps unborn; `trash` is None unless the dot is deleted."""

    dot: DotId
    namespace: str
    name: str
    owner: str
    head: str
    created_ns: int
    trash: str | None


@plain_value_type
class RefRow:
    """`name` is the full name (`branch/x`); `origin` the branch it stems from; `seq` that of the
    event that last changed it."""

    name: str
    target: ObjectId
    seq: int
    origin: str | None

    @property
    def short_name(self) -> str:
        return self.name.partition("/")[2]


@plain_value_type
class CommitRow:
    """`learnt_ns` is when this store learnt of the commit, by its own clock; a hollow commit is
    known by its record alone: its content never came (shallow) or went (pruned)."""

    id: ObjectId
    generation: int
    payload: bytes
    learnt_ns: int
    capture: Capture | None
    transfer: bytes | None
    is_hollow: bool = False


@plain_value_type
class SwitchRow:
    """A tree that was being switched: finish this before anything else."""

    branch: str
    from_commit: ObjectId | None
    to_root_commit: ObjectId | None
    reason: str


@plain_value_type
class TreeRow:
    """The attached directory; `branch` is materialised in it unless `switching_to` is set."""

    path: bytes
    as_root: bool
    device: int
    inode: int
    branch: str
    switching_to: SwitchRow | None


@plain_value_type
class WorkingRow:
    branch: str
    commit: ObjectId
    reason: str
    seq: int


@plain_value_type
class RemoteRow:
    name: str
    url: str
    dm_command: str | None


@plain_value_type
class ObservedRow:
    """How far a remote's log has been read for one dot."""

    cluster_id: bytes
    epoch: int
    seq: int


@plain_value_type
class ReflogRow:
    seq: int
    time_ns: int
    command: str
    actor: str
    old: ObjectId | None
    new: ObjectId | None
    kind: str
    reason: str


@plain_value_type
class OperationRow:
    """One command's place in the log; `Catalog.events_of` reads its events."""

    first_seq: int
    last_seq: int
    time_ns: int
    op_id: bytes
    command: str
    actor: str
    segment: int
    record_offset: int


@plain_value_type
class TransferRow:
    """`status` is None while the transfer runs (or was killed)."""

    transfer_id: bytes
    direction: str
    remote: str
    dot: DotId | None
    branch: str | None
    started_ns: int
    finished_ns: int | None
    status: str | None
    summary: tuple[tuple[str, str | int | None], ...]


@plain_value_type
class MergeRow:
    """A merge, cherry-pick, revert or stash pop under way; see core.events.MergeStarted."""

    branch: str
    kind: str
    ours: ObjectId
    theirs: ObjectId
    bases: tuple[ObjectId, ...]
    snapshot: ObjectId
    parents: tuple[ObjectId, ...]
    message: str


@plain_value_type
class ConflictRow:
    """`detail` is what the driver that found it recorded; `resolved` says how, None while open."""

    path: bytes
    reason: str
    detail: bytes
    resolved: str | None
