"""Which commit a revision names: refs, ids and the steps from there; core/revisions has the
syntax."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from heapq import heappop, heappush
from itertools import islice

from dmsync.core.events import HeadSwitched
from dmsync.core.graph import merge_bases, nth_first_parent
from dmsync.core.ids import DotId, ObjectId
from dmsync.core.objects import Commit
from dmsync.core.revisions import (
    Ancestor,
    BranchBefore,
    Parent,
    ReflogEntry,
    ReflogTime,
    Revision,
    Step,
    Upstream,
    parse_revision,
    parse_revision_or_range,
    time_of,
)
from dmsync.engine.store import Store
from dmsync.engine.tags import peel
from dmsync.errors import AmbiguousRevision, RevisionNotFound, UsageError
from dmsync.storage.catalog import DotRow

_CANDIDATES_SHOWN = 10
_SUBJECT_CHARACTERS_SHOWN = 60
_CHECKOUT = "checkout"


def resolve_revision(store: Store, dot: DotRow, text: str) -> ObjectId:
    """The commit that `text` names (README, "Revisions").

    Raises:
        UsageError: not a revision. RevisionNotFound: nothing of that name or that far back.
        AmbiguousRevision: several commits begin so; they are listed.
    """
    return commit_named(store, dot, parse_revision(text))


def resolve_range(
    store: Store, dot: DotRow, text: str
) -> tuple[tuple[ObjectId, ...], tuple[ObjectId, ...]]:
    """(wanted, excluded) commits of a revision, `^REV`, `A..B` or `A...B`.

    Raises as `resolve_revision`.
    """
    if text.startswith("^"):
        return (), (resolve_revision(store, dot, text[1:]),)
    parsed = parse_revision_or_range(text)
    if isinstance(parsed, Revision):
        return (commit_named(store, dot, parsed),), ()
    left = commit_named(store, dot, parsed.left)
    right = commit_named(store, dot, parsed.right)
    if not parsed.symmetric:
        return (right,), (left,)
    return (left, right), tuple(merge_bases(store.catalog.graph(dot.dot), left, right))


def commit_named(store: Store, dot: DotRow, revision: Revision) -> ObjectId:
    """As `resolve_revision`, of a revision parsed already."""
    ref, commit = _base(store, dot, revision)
    for step in revision.steps:
        ref, commit = _step(store, dot, revision, ref, commit, step)
    if commit is None:
        raise RevisionNotFound(
            f"No commits match {revision.base}: branch {ref.removeprefix('branch/')} has no "
            "commits yet"
            if revision.is_head and ref is not None
            else f"No commits match {revision.base}"
        )
    return commit


def head_commit(store: Store, dot: DotId) -> ObjectId | None:
    """The tip of the current branch; None while it is unborn."""
    return commit_at_ref(store, dot, f"branch/{store.catalog.head(dot)}")


def commit_at_ref(store: Store, dot: DotId, name: str) -> ObjectId | None:
    """The commit at the ref of this full name, None when there is no such ref."""
    row = store.catalog.ref(dot, name)
    return None if row is None else _named_by(store, dot, name, row.target)


def _named_by(store: Store, dot: DotId, ref: str, target: ObjectId) -> ObjectId:
    return peel(store, dot, target) if ref.startswith("tag/") else target


def time_told(store: Store, text: str) -> int:
    """Nanoseconds since 1970 UTC of a time as the user writes it, in the local time zone.

    Raises:
        UsageError: not understood.
    """
    now_ns, _ = store.clock()
    return time_of(text, now_ns=now_ns, zone=datetime.now().astimezone().tzinfo or UTC)


# --- the base ------------------------------------------------------------------------------------


def _base(store: Store, dot: DotRow, revision: Revision) -> tuple[str | None, ObjectId | None]:
    """(ref name or None, commit or None for an unborn branch)."""
    head = f"branch/{store.catalog.head(dot.dot)}"
    if revision.is_head:
        return head, commit_at_ref(store, dot.dot, head)
    if revision.message_text is not None:
        return None, _by_message(store, dot.dot, revision.message_text)
    base = revision.base
    found: list[tuple[str, ObjectId]] = []
    for name in (base, f"tag/{base}", f"branch/{base}", f"remote/{base}"):
        commit = commit_at_ref(store, dot.dot, name)
        if commit is not None:
            found.append((name, commit))
    if found:
        _warn_of_other_meanings(store, base, found)
        return found[0]
    if f"branch/{base}" == head:
        return head, None
    return None, _by_prefix(store, dot.dot, revision)


def _warn_of_other_meanings(store: Store, base: str, found: list[tuple[str, ObjectId]]) -> None:
    """A tag wins over a branch of its name. (No ref's name can look like an id.)"""
    name, commit = found[0]
    others = [other for other, target in found[1:] if target != commit]
    if others:
        store.say(f"{base} could also mean {', '.join(others)}: {name} is taken")


def _by_prefix(store: Store, dot: DotId, revision: Revision) -> ObjectId:
    prefix = revision.id_prefix
    found = [] if prefix is None else store.catalog.commits_with_prefix(dot, prefix)
    if not found:
        raise RevisionNotFound(
            f"No commits match {revision.base}", hint="dm log and dm branch show what there is"
        )
    if len(found) > 1:
        raise _ambiguous(store, dot, revision.base, found)
    return found[0]


def _ambiguous(store: Store, dot: DotId, base: str, found: list[ObjectId]) -> AmbiguousRevision:
    candidates = []
    for oid in found[:_CANDIDATES_SHOWN]:
        commit = store.commit(dot, oid)
        subject = commit.message.strip().partition("\n")[0][:_SUBJECT_CHARACTERS_SHOWN]
        candidates.append({"id": oid.hex(), "date": _date(commit), "subject": subject})
    lines = [f"  {c['id'][:16]} {c['date']} {c['subject']}" for c in candidates]
    if len(found) > len(lines):
        lines.append("  and others")
    return AmbiguousRevision(
        f"{base} is the beginning of {len(found)} commits",
        hint="\n".join(("give more digits of one of", *lines)),
        candidates=candidates,
    )


def _date(commit: Commit) -> str:
    """Day and time as its author's clock showed it."""
    seconds = commit.time_ns // 1_000_000_000
    moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(
        seconds=seconds, minutes=commit.offset_minutes
    )
    return f"{moment:%Y-%m-%d %H:%M}"


def _by_message(store: Store, dot: DotId, text: str) -> ObjectId:
    """The newest commit by its date, among those reachable from any ref, whose message holds
    `text`. Reads commits in that order and no further."""
    graph = store.catalog.graph(dot)
    queue: list[tuple[int, int, ObjectId]] = []
    seen: set[ObjectId] = set()
    messages: dict[ObjectId, str] = {}

    def add(oid: ObjectId) -> None:
        if oid not in seen:
            seen.add(oid)
            commit = store.commit(dot, oid)
            messages[oid] = commit.message
            heappush(queue, (-commit.time_ns, -graph.generation(oid), oid))

    for row in store.catalog.refs(dot):
        tip = commit_at_ref(store, dot, row.name)
        if tip is not None and graph.has(tip):
            add(tip)
    while queue:
        _, _, oid = heappop(queue)
        if text in messages.pop(oid):
            return oid
        for parent in graph.parents(oid):
            add(parent)
    raise RevisionNotFound(f"No commits match :/{text}", hint="no message holds that text")


# --- the steps -----------------------------------------------------------------------------------


def _step(
    store: Store,
    dot: DotRow,
    revision: Revision,
    ref: str | None,
    commit: ObjectId | None,
    step: Step,
) -> tuple[str | None, ObjectId | None]:
    match step:
        case ReflogEntry(index):
            return None, _reflog_entry(store, dot, revision, ref, index)
        case ReflogTime(text):
            return None, _reflog_time(store, dot, revision, ref, text)
        case Upstream():
            return _upstream(store, dot, revision, ref)
        case BranchBefore(count):
            name = f"branch/{_branch_before(store, dot.dot, count)}"
            return name, commit_at_ref(store, dot.dot, name)
    if commit is None:
        raise RevisionNotFound(f"No commits match {revision.base}")
    graph = store.catalog.graph(dot.dot)
    found: ObjectId | None
    match step:
        case Parent(0):
            found = commit
        case Parent(number):
            parents = graph.parents(commit)
            found = parents[number - 1] if number <= len(parents) else None
        case Ancestor(count):
            found = nth_first_parent(graph, commit, count)
    if found is None:
        raise RevisionNotFound(f"Commits don't go back that far from {revision.base}")
    return None, found


def _reflog_entry(
    store: Store, dot: DotRow, revision: Revision, ref: str | None, index: int
) -> ObjectId | None:
    if ref is None:
        raise UsageError(f"{revision.base} is no ref: it has no reflog")
    changes = store.catalog.reflog(dot.dot, ref, count=index + 1)  # newest first
    if index < len(changes):
        target = changes[index].new
        return None if target is None else _named_by(store, dot.dot, ref, target)
    if changes and index == len(changes) and changes[-1].old is not None:
        return _named_by(store, dot.dot, ref, changes[-1].old)
    raise RevisionNotFound(f"the reflog of {revision.base} has only {len(changes)} entries")


def _reflog_time(
    store: Store, dot: DotRow, revision: Revision, ref: str | None, text: str
) -> ObjectId | None:
    if ref is None:
        raise UsageError(f"{revision.base} is no ref: it has no reflog")
    wanted_ns = time_told(store, text)
    for change in store.catalog.reflog(dot.dot, ref):
        if change.time_ns <= wanted_ns:
            target = change.new
            return None if target is None else _named_by(store, dot.dot, ref, target)
    raise RevisionNotFound(f"the reflog of {revision.base} does not go back to {text}")


def _upstream(
    store: Store, dot: DotRow, revision: Revision, ref: str | None
) -> tuple[str | None, ObjectId | None]:
    if ref is None or not ref.startswith("branch/"):
        raise UsageError(f"{revision.base} is no branch: it has no upstream")
    branch = ref.removeprefix("branch/")
    for remote, _, _ in store.catalog.upstreams(dot.dot):
        name = f"remote/{remote}/{branch}"
        commit = commit_at_ref(store, dot.dot, name)
        if commit is not None:
            return name, commit
    raise RevisionNotFound(f"no remote holds branch {branch}", hint="dm push or dm fetch first")


def _branch_before(store: Store, dot: DotId, count: int) -> str:
    """The branch that was current before the count-th last checkout."""
    left = list(islice(_branches_left(store, dot), count))
    if len(left) < count:
        raise RevisionNotFound(
            f"@{{-{count}}}: another branch was checked out only {len(left)} times"
        )
    branch = left[-1]
    if store.catalog.branch(dot, branch) is None and store.catalog.head(dot) != branch:
        raise RevisionNotFound(f"@{{-{count}}} was branch {branch}, which is gone")
    return branch


def _branches_left(store: Store, dot: DotId) -> Iterator[str]:
    """What was checked out before each checkout of another branch, newest first. A checkout that
    was undone does not count."""
    undone = store.catalog.undone_operations()
    for operation in store.catalog.operations_by(_CHECKOUT):
        if operation.first_seq in undone:
            continue
        for event in store.catalog.events_of(operation).events:
            if isinstance(event, HeadSwitched) and event.dot == dot:
                left = event.old
                if left is not None and left != event.branch:
                    yield left
