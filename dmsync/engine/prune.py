"""Prune: thin out a dot's history by rules. Commits stay as records, their content may go."""

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import combinations

from dmsync.core.events import CommitsThinned
from dmsync.core.graph import ancestors_difference, merge_bases
from dmsync.core.ids import DotId, ObjectId
from dmsync.core.retention import Learnt, RetentionPolicy, judge
from dmsync.engine import switching
from dmsync.engine.progress import SILENT, Progress
from dmsync.engine.store import Store
from dmsync.engine.tags import peel
from dmsync.errors import RemoteNotFound, UsageError
from dmsync.storage.catalog import DotRow

_REASON_CHARACTERS_MAX = 500


@dataclass(frozen=True)
class PruneRequest:
    """The rules. `tag_patterns`: tagged commits to keep (None: every tagged one);
    `not_pushed`: remotes whose lack of a commit keeps it."""

    policy: RetentionPolicy
    tag_patterns: tuple[str, ...] | None = None
    not_pushed: tuple[str, ...] = ()
    dry_run: bool = False


@dataclass(frozen=True)
class PrunedCommit:
    """One commit of the plan; `reasons` are the rules that keep it, none when it is thinned."""

    id: ObjectId
    learnt_ns: int
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class PruneSummary:
    """The plan, newest first, that was carried out (or, dry run, would be)."""

    commits: tuple[PrunedCommit, ...]

    @property
    def thinned(self) -> list[ObjectId]:
        return [commit.id for commit in self.commits if not commit.reasons]


def prune(
    store: Store, dot: DotRow, request: PruneRequest, progress: Progress = SILENT
) -> PruneSummary:
    """Make the commits hollow that no rule keeps; durable when it returns.

    The rules are applied to each branch (and each branch of a remote) by itself. Whatever they
    say, these keep their content: what a ref names (tags: see PruneRequest), what a working tree
    or a merge under way stands on, and the commits that branches have last in common, here with
    one another and with those of a remote: without them nothing could be merged any more.

    Raises:
        UsageError: no rule was given. RemoteNotFound: no such remote.
    """
    if request.policy == RetentionPolicy() and not request.not_pushed:
        raise UsageError("no rule says what to keep", hint="for example --keep-daily 14")
    for remote in request.not_pushed:
        if store.catalog.remote(remote) is None:
            raise RemoteNotFound(f"Unable to find remote '{remote}'", hint="dm remote -v")
    if request.dry_run:
        return PruneSummary(_plan(store, dot.dot, request, progress))
    with switching.ready(store, dot.dot):
        summary = PruneSummary(_plan(store, dot.dot, request, progress))
        thinned = summary.thinned
        if thinned:
            progress.phase("thinning", items_total=len(thinned))
            with store.transaction("prune") as tx:
                tx.append(CommitsThinned(dot.dot, tuple(thinned), _rules(request)))
    return summary


def _plan(
    store: Store, dot: DotId, request: PruneRequest, progress: Progress
) -> tuple[PrunedCommit, ...]:
    graph = store.catalog.graph(dot)
    hollow = set(store.catalog.hollow_commits(dot))
    reasons: dict[ObjectId, dict[str, None]] = {}  # ordered sets
    learnt: dict[ObjectId, Learnt] = {}
    progress.phase("judging")
    for tip in _branch_tips(store, dot):
        commits = []
        for commit in ancestors_difference(graph, [tip], []):
            if commit not in hollow:
                commits.append(learnt.get(commit) or _learnt(store, dot, commit))
        for verdict in judge(commits, request.policy):
            learnt[verdict.commit.id] = verdict.commit
            kept_by = reasons.setdefault(verdict.commit.id, {})
            kept_by.update(dict.fromkeys(verdict.reasons))
        progress.reached(0, len(learnt))
    for reason, kept in _always_kept(store, dot, request):
        for commit in kept:
            if commit in reasons:
                reasons[commit][reason] = None
    ordered = sorted(learnt.values(), key=lambda c: (-c.learnt_ns, -c.generation, c.id))
    return tuple(PrunedCommit(c.id, c.learnt_ns, tuple(reasons[c.id])) for c in ordered)


def _branch_tips(store: Store, dot: DotId) -> list[ObjectId]:
    """Tips of the branches here and of those seen at remotes; not their tags."""
    refs = store.catalog.refs(dot, "branch/")
    refs += [r for r in store.catalog.refs(dot, "remote/") if r.name.count("/") == 2]
    return list(dict.fromkeys(ref.target for ref in refs))


def _learnt(store: Store, dot: DotId, commit: ObjectId) -> Learnt:
    row = store.catalog.commit(dot, commit)
    assert row is not None, "the graph named this commit"
    return Learnt(commit, row.learnt_ns, row.generation)


def _always_kept(
    store: Store, dot: DotId, request: PruneRequest
) -> Iterable[tuple[str, Iterable[ObjectId]]]:
    catalog = store.catalog
    yield "branch", [ref.target for ref in catalog.branches(dot)]
    yield "remote branch", [ref.target for ref in catalog.refs(dot, "remote/")]
    stashes = [ref.target for ref in catalog.refs(dot, "stash/")]
    stashes += [row.commit for row in catalog.working_snapshots(dot)]
    yield "stash", [*stashes, *_parents_of(store, dot, stashes)]
    for merge in catalog.merges(dot):
        yield "merge under way", [merge.ours, merge.theirs, *merge.bases]
    for switch in catalog.switches(dot):
        ends = (switch.from_commit, switch.to_root_commit)
        yield "checkout under way", [commit for commit in ends if commit is not None]
    yield "tag", _tagged(store, dot, request.tag_patterns)
    yield "where branches meet", _common_of_branches(store, dot)
    yield "common with a remote", _common_with_remotes(store, dot)
    for remote in request.not_pushed:
        yield f"not at {remote}", _not_at(store, dot, remote)


def _parents_of(store: Store, dot: DotId, snapshots: list[ObjectId]) -> list[ObjectId]:
    """What uncommitted states were made on: bringing one back merges against it."""
    graph = store.catalog.graph(dot)
    known = [commit for commit in snapshots if graph.has(commit)]
    return [parent for commit in known for parent in graph.parents(commit)]


def _tagged(store: Store, dot: DotId, patterns: tuple[str, ...] | None) -> list[ObjectId]:
    return [
        peel(store, dot, ref.target)
        for ref in store.catalog.refs(dot, "tag/")
        if patterns is None or any(fnmatchcase(ref.short_name, p) for p in patterns)
    ]


def _common_of_branches(store: Store, dot: DotId) -> set[ObjectId]:
    """What merging one branch into another stands on. Quadratic in the number of tips."""
    graph = store.catalog.graph(dot)
    tips = sorted({ref.target for ref in store.catalog.branches(dot)})
    common: set[ObjectId] = set()
    for ours, theirs in combinations(tips, 2):
        common.update(merge_bases(graph, ours, theirs))
    return common


def _common_with_remotes(store: Store, dot: DotId) -> set[ObjectId]:
    """What the next push or pull builds on: without its content everything would be sent again."""
    graph = store.catalog.graph(dot)
    common: set[ObjectId] = set()
    for ref in store.catalog.refs(dot, "remote/"):
        branch = store.catalog.branch(dot, ref.name.split("/", 2)[2])
        if branch is not None and graph.has(ref.target):
            common.update(merge_bases(graph, branch.target, ref.target))
    return common


def _not_at(store: Store, dot: DotId, remote: str) -> Iterable[ObjectId]:
    graph = store.catalog.graph(dot)
    there = [ref.target for ref in store.catalog.refs(dot, f"remote/{remote}/")]
    return ancestors_difference(graph, _branch_tips(store, dot), [t for t in there if graph.has(t)])


def _rules(request: PruneRequest) -> str:
    """The rules in words, for the log."""
    policy = request.policy
    names = ("last", "hourly", "daily", "weekly", "monthly", "yearly")
    words = [f"{name} {getattr(policy, name)}" for name in names if getattr(policy, name)]
    if policy.within_ns:
        words.append(f"within {policy.within_ns // 3_600_000_000_000}h")
    words += [f"not at {remote}" for remote in request.not_pushed]
    return f"keep {', '.join(words)}"[:_REASON_CHARACTERS_MAX]
