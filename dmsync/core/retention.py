"""Which commits retention rules keep: pure values, no clock (README, "Retention").

Rules are a union: what no rule keeps may be thinned. Time is when the store learnt of a commit,
never what a commit says of itself; ages count back from the newest commit, so that neither a
wrong clock nor a long pause makes everything old. Running the rules again on what they kept keeps
the same.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final

from dmsync.core.ids import ObjectId

COUNT_MAX: Final = 1_000_000
_NS: Final = 1_000_000_000
_DAY_S: Final = 86_400
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Learnt:
    """A commit and when this store learnt of it."""

    id: ObjectId
    learnt_ns: int
    generation: int


@dataclass(frozen=True, slots=True)
class RetentionPolicy:
    """How many to keep; 0 turns a rule off. `hourly` keeps the newest commit of each of the last
    so many hours that have one, and so on (UTC; weeks begin on Monday)."""

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    yearly: int = 0
    within_ns: int = 0


@dataclass(slots=True)
class Verdict:
    """One commit and the rules that keep it; without any it may be thinned."""

    commit: Learnt
    reasons: list[str] = field(default_factory=list)


def _moment(learnt_ns: int) -> datetime:
    return _EPOCH + timedelta(seconds=learnt_ns // _NS)


def _month(learnt_ns: int) -> int:
    moment = _moment(learnt_ns)
    return moment.year * 12 + moment.month


_BUCKETS: Final[tuple[tuple[str, Callable[[int], int]], ...]] = (
    ("hourly", lambda ns: ns // (3600 * _NS)),
    ("daily", lambda ns: ns // (_DAY_S * _NS)),
    ("weekly", lambda ns: (ns // (_DAY_S * _NS) + 3) // 7),
    ("monthly", _month),
    ("yearly", lambda ns: _moment(ns).year),
)


def judge(commits: Iterable[Learnt], policy: RetentionPolicy) -> list[Verdict]:
    """One verdict a commit, newest first (equal times: the later generation, then the id)."""
    ordered = sorted(commits, key=lambda c: (-c.learnt_ns, -c.generation, c.id))
    verdicts = [Verdict(commit) for commit in ordered]
    for verdict in verdicts[: policy.last]:
        verdict.reasons.append("last")
    for name, bucket_of in _BUCKETS:
        _keep_newest_of_each(verdicts, name, bucket_of, getattr(policy, name))
    if policy.within_ns and verdicts:
        oldest_ns = verdicts[0].commit.learnt_ns - policy.within_ns
        for verdict in verdicts:
            if verdict.commit.learnt_ns >= oldest_ns:
                verdict.reasons.append("within")
    return verdicts


def _keep_newest_of_each(
    verdicts: list[Verdict], name: str, bucket_of: Callable[[int], int], buckets_max: int
) -> None:
    seen: set[int] = set()
    for verdict in verdicts:
        if len(seen) >= buckets_max:
            return
        bucket = bucket_of(verdict.commit.learnt_ns)
        if bucket not in seen:
            seen.add(bucket)
            verdict.reasons.append(name)
