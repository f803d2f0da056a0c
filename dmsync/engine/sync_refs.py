"""Moving refs for a peer, and saying in the peer's words why one may not move (WIRE.md 5.4)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from dmsync.core.events import Event, RefChanged
from dmsync.core.graph import (
    GraphView,
    ahead_behind,
    ancestors_difference,
    is_ancestor,
    merge_bases,
)
from dmsync.core.ids import DotId, ObjectId
from dmsync.engine.ports import SyncStore, TargetTree
from dmsync.errors import (
    AlreadyExists,
    Diverged,
    DmError,
    NotFastForward,
    RefConflict,
    UnrelatedHistories,
)
from dmsync.wire.messages import RefMode, RefOutcome, RefStatus, RefUpdate

Role = Literal["push", "pull"]
"""Who is told: a pusher, whose own line is the new one, or a puller, whose own is the current."""

MOVING: frozenset[RefStatus] = frozenset(
    {RefStatus.CREATED, RefStatus.FAST_FORWARD, RefStatus.FORCED, RefStatus.STASHED}
)


@dataclass(frozen=True)
class Decision:
    """What becomes of one update. `stash` is (ref, kept tip); `error` says why it was refused."""

    update: RefUpdate
    status: RefStatus
    old: ObjectId | None
    stash: tuple[str, ObjectId] | None = None
    error: DmError | None = None

    @property
    def moves(self) -> bool:
        return self.status in MOVING

    def outcome(self) -> RefOutcome:
        new = self.update.new if self.moves else self.old
        return RefOutcome(
            self.update.ref,
            self.status,
            self.old,
            new,
            self.stash[0] if self.stash else None,
            self.error.code if self.error else "",
            self.error.message if self.error else "",
        )

    def events(self, dot: DotId, kind: str, reason: str) -> list[RefChanged]:
        """The changes to append, the stash first: at no instant is the old tip unnamed."""
        if not self.moves:
            return []
        found = []
        branch = self.update.ref.partition("/")[2]
        if self.stash:
            name, tip = self.stash
            found.append(RefChanged(dot, name, None, tip, "stash", reason, branch))
        origin = self.update.origin if self.old is None else None
        found.append(
            RefChanged(dot, self.update.ref, self.old, self.update.new, kind, reason, origin)
        )
        return found


def tree_events(
    hooks: TargetTree, store: SyncStore, dot: DotId, decision: Decision
) -> Sequence[Event]:
    """What to record beside a moved branch so that its working tree follows."""
    space, _, branch = decision.update.ref.partition("/")
    if not decision.moves or space != "branch":
        return ()
    held = decision.stash[1] if decision.stash else decision.old
    return hooks.switch_events(store, dot, branch, held, decision.update.new)


def decide(
    graph: GraphView,
    update: RefUpdate,
    current: ObjectId | None,
    stash_name: Callable[[str], str],
    dirty_tip: ObjectId | None = None,
    role: Role = "push",
) -> Decision:
    """Apply the table of WIRE.md 5.4. `graph` knows the new commit and the current one.

    `dirty_tip`: a snapshot of uncommitted state on the current tip, kept as a stash if it moves.
    """
    status, error = _judge(graph, update, current, role)
    stash = None
    kept = dirty_tip or (current if status is RefStatus.STASHED else None)
    if kept is not None and status in MOVING and update.mode is RefMode.STASH:
        stash = (stash_name(update.ref), kept)
        status = RefStatus.STASHED
    return Decision(update, status, current, stash, error)


def _judge(
    graph: GraphView, update: RefUpdate, current: ObjectId | None, role: Role
) -> tuple[RefStatus, DmError | None]:
    if current is None:
        if update.mode is RefMode.LEASE and update.expected is not None:
            return RefStatus.REFUSED, _conflict(update, current)
        return RefStatus.CREATED, None
    if current == update.new:
        return RefStatus.UP_TO_DATE, None
    is_tag = update.ref.startswith("tag/")
    if update.mode is RefMode.CREATE or (is_tag and update.mode is not RefMode.LEASE):
        return RefStatus.REFUSED, AlreadyExists(
            f"{shown_ref(update.ref)} exists already at {current.hex()[:12]}",
            hint="a tag that is there is not moved: push without --tags, or under another name"
            if is_tag
            else "",
            ref=update.ref,
        )
    if update.mode is RefMode.LEASE:
        if update.expected != current:
            return RefStatus.REFUSED, _conflict(update, current)
        ahead = not is_tag and is_ancestor(graph, current, update.new)
        return (RefStatus.FAST_FORWARD if ahead else RefStatus.FORCED), None
    if is_ancestor(graph, current, update.new):
        return RefStatus.FAST_FORWARD, None
    if is_ancestor(graph, update.new, current):
        if update.mode in (RefMode.ADVANCE, RefMode.STASH):
            return RefStatus.AHEAD, None
        return RefStatus.REFUSED, divergence(graph, update.ref, update.new, current, role)
    if update.mode is RefMode.ADVANCE:
        return RefStatus.LEFT, None
    if update.mode is RefMode.STASH:
        return RefStatus.STASHED, None
    return RefStatus.REFUSED, divergence(graph, update.ref, update.new, current, role)


def _conflict(update: RefUpdate, current: ObjectId | None) -> RefConflict:
    found = current.hex()[:12] if current else "nothing"
    wanted = update.expected.hex()[:12] if update.expected else "nothing"
    return RefConflict(
        f"{shown_ref(update.ref)} is at {found} there, not at {wanted} as expected",
        hint="fetch, look at what changed, and try again",
        ref=update.ref,
        expected=update.expected.hex() if update.expected else None,
        actual=current.hex() if current else None,
    )


def shown_ref(ref: str) -> str:
    """`branch 'master'` for `branch/master`."""
    space, _, name = ref.partition("/")
    return f"{space} '{name}'"


def divergence(
    graph: GraphView, ref: str, source: ObjectId, target: ObjectId, role: Role
) -> DmError:
    """The error for a target that cannot fast-forward to `source`; both are in `graph`."""
    ahead, behind = ahead_behind(graph, source, target)
    bases = merge_bases(graph, source, target)
    base = bases[0] if bases else None
    return divergence_error(ref, source, target, base, ahead, behind, role)


def early_divergence(
    graph: GraphView, update: RefUpdate, current: ObjectId, frontier: Sequence[ObjectId]
) -> DmError | None:
    """The same before any data came: the new commit is not here, only the common frontier is.

    None when `current` lies within the frontier: then the update may well be a fast-forward.
    """
    lacking = set(ancestors_difference(graph, [current], frontier))
    if not lacking:
        return None
    ahead = max(update.ahead_count, 0 if graph.has(update.new) else 1)
    bases = {parent for commit in lacking for parent in graph.parents(commit)} - lacking
    base = max(bases, key=graph.generation, default=None)
    return divergence_error(update.ref, update.new, current, base, ahead, len(lacking))


_DIVERGENCE_HINTS: dict[Role, str] = {
    "push": "--stash-on-divergence keeps the remote's line under another name, "
    "--force-with-lease drops it",
    "pull": "dm pull --stash-on-divergence keeps the local line under another name, "
    "dm pull --force takes the remote's instead",
}


def divergence_error(
    ref: str,
    source: ObjectId,
    target: ObjectId,
    base: ObjectId | None,
    ahead: int,
    behind: int,
    role: Role = "push",
) -> DmError:
    """Diverged, NotFastForward (the target is merely ahead) or UnrelatedHistories.

    The texts speak of local and remote as the one who gave the command sees them.
    """
    facts: dict[str, object] = {
        "ref": ref,
        "source": source.hex(),
        "target": target.hex(),
        "base": base.hex() if base else None,
        "ahead": ahead,
        "behind": behind,
    }
    name = shown_ref(ref)
    new, old = ("local", "remote") if role == "push" else ("remote", "local")
    if ahead == 0:
        return NotFastForward(
            f"{name}: the {old} one is ahead of the {new} one by {_commits(behind)} "
            f"({target.hex()[:12]} has all of {source.hex()[:12]})",
            hint="dm pull brings the local branch up to date" if role == "push" else "",
            **facts,
        )
    if base is None:
        return UnrelatedHistories(
            f"{name}: {new} {source.hex()[:12]} and {old} {target.hex()[:12]} have no common "
            "commit",
            hint=_DIVERGENCE_HINTS[role],
            **facts,
        )
    return Diverged(
        f"{name} has diverged: since {base.hex()[:12]} the {new} one ({source.hex()[:12]}) has "
        f"{_commits(ahead)} and the {old} one ({target.hex()[:12]}) {_commits(behind)}",
        hint=_DIVERGENCE_HINTS[role],
        **facts,
    )


def _commits(count: int) -> str:
    return f"{count} commit" if count == 1 else f"{count} commits"


def stash_name(ref: str, now_ns: int, is_taken: Callable[[str], bool]) -> str:
    """`branch/<name>-DIVERGED-<UTC time>`, with -2, -3 ... when that is taken."""
    moment = datetime.fromtimestamp(now_ns // 1_000_000_000, UTC)
    name = f"{ref[:80]}-DIVERGED-{moment.strftime('%Y-%m-%dT%H-%M-%SZ')}"
    found, number = name, 1
    while is_taken(found):
        number += 1
        found = f"{name}-{number}"
    return found
