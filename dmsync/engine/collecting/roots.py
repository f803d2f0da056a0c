"""What of a dot is live: named by something that is there, or by an operation young enough.

The grace is for undo alone. An operation's age is the sum of the times between it and what came
after, none counted as more than a day and none as less than nothing: a clock that jumps makes
nothing old (decisions/0011).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, Final, NamedTuple, get_args

from dmsync.core.events import CommitsForgotten, CommitsThinned, DotDeleted, DotScopeSet, Event
from dmsync.core.ids import ID_BYTES, DotId, Kind, ObjectId
from dmsync.core.objects import tag_from_bytes
from dmsync.engine.store import Store
from dmsync.errors import Corruption, ObjectMissing
from dmsync.storage.catalog import OperationRow, RefRow

_TOLD_MAX: Final = 3
NS_PER_DAY: Final = 86_400 * 1_000_000_000
GRACE_NS_DEFAULT: Final = 14 * NS_PER_DAY
_PAGE: Final = 256


class YoungOperation(NamedTuple):
    """An operation and how old it is."""

    row: OperationRow
    age_ns: int


def young_operations(store: Store, grace_ns: int) -> Iterator[YoungOperation]:
    """Those younger than the grace, newest first."""
    later_ns, _ = store.clock()
    age_ns, before = 0, 2**63 - 1
    while rows := store.catalog.operations_before(before, _PAGE):
        for row in rows:
            age_ns += min(max(later_ns - row.time_ns, 0), NS_PER_DAY)
            if age_ns >= grace_ns:
                return
            yield YoungOperation(row, age_ns)
            later_ns = row.time_ns
        before = rows[-1].first_seq


@dataclass
class Grace:
    """What the young operations name, by dot; `trash` are directories of young deletions."""

    grace_ns: int
    commits: dict[DotId, dict[ObjectId, int]] = field(default_factory=dict)
    """Each with the age of the youngest operation that names it."""
    thinned: dict[DotId, set[ObjectId]] = field(default_factory=dict)
    scopes: dict[DotId, list[frozenset[bytes] | None]] = field(default_factory=dict)
    trash: set[str] = field(default_factory=set)
    oldest_ns: int | None = None
    """When the oldest young operation was; None: there is none."""
    newest_seq: int = 0
    """The last event that was read."""

    def left_ns(self, dot: DotId) -> tuple[int, int] | None:
        """How long at least and at most something is kept by the grace alone, if time runs."""
        ages = self.commits.get(dot, {}).values()
        if not ages:
            return None
        return self.grace_ns - max(ages), self.grace_ns - min(ages)


def read_grace(store: Store, grace_ns: int) -> Grace:
    """Go through the young operations. Raises Corruption."""
    found = Grace(grace_ns)
    extend_grace(store, found)
    return found


def extend_grace(store: Store, found: Grace) -> None:
    """Take in the operations since it was read. Raises Corruption."""
    newest_seq = found.newest_seq
    for row, age_ns in young_operations(store, found.grace_ns):
        if row.first_seq <= found.newest_seq:
            break
        newest_seq = max(newest_seq, row.last_seq)
        if found.oldest_ns is None or found.newest_seq == 0:
            found.oldest_ns = row.time_ns
        for event in store.catalog.events_of(row).events:
            _note(found, event, age_ns)
    found.newest_seq = newest_seq


def _note(found: Grace, event: Event, age_ns: int) -> None:
    if isinstance(event, CommitsForgotten):
        return
    if isinstance(event, DotDeleted):
        found.trash.add(event.trash)
    if isinstance(event, CommitsThinned):
        found.thinned.setdefault(event.dot, set()).update(event.commits)
    if isinstance(event, DotScopeSet):
        old = None if event.old is None else frozenset(name.encode() for name in event.old)
        found.scopes.setdefault(event.dot, []).append(old)
    for dot, commit in named_by(event):
        found.commits.setdefault(dot, {}).setdefault(commit, age_ns)


def named_by(event: Event) -> Iterator[tuple[DotId, ObjectId]]:
    """Every (dot, object) that an event names, in whichever field."""
    dot = getattr(event, "dot", None)
    for name in _FIELDS_WITH_IDS[type(event)]:
        yield from _ids_in(getattr(event, name), dot)


_FIELDS_WITH_IDS: Final[dict[type, tuple[str, ...]]] = {
    cls: tuple(one.name for one in fields(cls) if "ObjectId" in str(one.type))
    for cls in get_args(Event)
}


def _ids_in(value: Any, dot: DotId | None) -> Iterator[tuple[DotId, ObjectId]]:
    if isinstance(value, tuple):
        # [dot, ref, id] of a removed remote says its dot itself
        is_own = len(value) == 3 and isinstance(value[0], bytes) and len(value[0]) != ID_BYTES
        for item in value:
            yield from _ids_in(item, DotId(value[0]) if is_own else dot)
    elif isinstance(value, bytes) and len(value) == ID_BYTES and dot is not None:
        yield dot, ObjectId(value)


# --- what may be missing --------------------------------------------------------------------------


def require_nothing_lost(store: Store) -> None:
    """What only lost events named looks like garbage, and a repair may put those back.

    Raises:
        Corruption: something was lost, and nobody has repaired or confirmed it since.
        StorageFailed.
    """
    told = store.layout.unacknowledged_losses()
    if told:
        raise Corruption(
            "something was lost, so that nobody knows what is garbage: "
            + "; ".join(told[:_TOLD_MAX]),
            hint="dm fsck --repair puts back what can be; --accept-loss confirms the rest",
        )


def require_whole_history(store: Store, dot: DotId) -> None:
    """What lies behind a gap is not known to be needed. Raises Corruption."""
    missing = store.catalog.missing_commits(dot)
    if missing:
        raise Corruption(
            f"commit {missing[0].hex()[:12]} and perhaps what came before it is not here",
            hint="dm fsck tells more; dm fsck --repair brings back what can be",
            commit=missing[0].hex(),
            missing=len(missing),
        )


# --- what is there --------------------------------------------------------------------------------


class Root(NamedTuple):
    """Something that names a commit: `why` and `name` are for people. `tag` is the annotated tag's
    object on the way to it."""

    why: str
    name: str
    commit: ObjectId | None
    tag: ObjectId | None = None


def roots_of(store: Store, dot: DotId) -> list[Root]:
    """All that names commits of a dot, whatever the clock says.

    Raises:
        Corruption: a ref names what is not here.
    """
    catalog = store.catalog
    found = [root for ref in catalog.refs(dot) for root in _roots_of_ref(store, dot, ref)]
    found += [
        Root("uncommitted state", row.branch, row.commit) for row in catalog.working_snapshots(dot)
    ]
    for merge in catalog.merges(dot):
        named = (merge.ours, merge.theirs, *merge.bases, merge.snapshot, *merge.parents)
        found += [Root(f"{merge.kind} under way", merge.branch, commit) for commit in named]
    for switch in catalog.switches(dot):
        ends = (switch.from_commit, switch.to_root_commit)
        found += [Root("switch under way", switch.branch, end) for end in ends if end is not None]
    return found


_WHY: Final = {"branch": "branch", "tag": "tag", "stash": "stash", "remote": "remote branch"}


def _roots_of_ref(store: Store, dot: DotId, ref: RefRow) -> Iterator[Root]:
    kind = ref.name.partition("/")[0]
    why = _WHY.get(kind, "ref")
    if store.catalog.has_commit(dot, ref.target):
        yield Root(why, ref.name, ref.target)
        return
    try:
        tag = tag_from_bytes(store.objects(dot).read(Kind.TAG, ref.target))
    except ObjectMissing as exc:
        if kind == "remote":  # it says what is there, which need not be here
            return
        raise Corruption(
            f"{ref.name} names {ref.target.hex()[:12]}, which is not here",
            hint="dm fsck tells more",
            ref=ref.name,
        ) from exc
    if store.catalog.has_commit(dot, tag.target):
        yield Root(why, ref.name, tag.target, ref.target)
    elif kind != "remote":
        raise Corruption(
            f"{ref.name} names commit {tag.target.hex()[:12]}, which is not here", ref=ref.name
        )
