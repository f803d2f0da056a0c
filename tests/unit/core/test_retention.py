"""Retention rules: a union, by the time of learning, stable when run again."""

import random
from datetime import UTC, datetime, timedelta

from hypothesis import given, settings
from hypothesis import strategies as st

from dmsync.core.ids import ObjectId
from dmsync.core.retention import Learnt, RetentionPolicy, Verdict, judge

START = datetime(2026, 1, 31, 23, 30, tzinfo=UTC)
HOUR_NS = 3_600_000_000_000


def learnt(number: int, moment: datetime) -> Learnt:
    return Learnt(ObjectId(number.to_bytes(32, "big")), int(moment.timestamp()) * 10**9, number + 1)


def every(step: timedelta, count: int) -> list[Learnt]:
    return [learnt(n, START + n * step) for n in range(count)]


def kept(verdicts: list[Verdict]) -> list[int]:
    return sorted(int.from_bytes(v.commit.id, "big") for v in verdicts if v.reasons)


def test_last_keeps_the_newest() -> None:
    assert kept(judge(every(timedelta(hours=1), 10), RetentionPolicy(last=3))) == [7, 8, 9]


def test_each_hour_day_week_month_and_year_keeps_its_newest() -> None:
    half_hours = every(timedelta(minutes=30), 6)  # 23:30, 0:00, 0:30, 1:00, 1:30, 2:00
    assert kept(judge(half_hours, RetentionPolicy(hourly=3))) == [2, 4, 5]
    assert kept(judge(half_hours, RetentionPolicy(daily=9))) == [0, 5]
    assert kept(judge(half_hours, RetentionPolicy(monthly=9))) == [0, 5]
    assert kept(judge(half_hours, RetentionPolicy(yearly=9))) == [5]
    days = every(timedelta(days=1), 10)  # 2026-01-31 is a Saturday
    assert kept(judge(days, RetentionPolicy(weekly=9))) == [1, 8, 9]


def test_hours_without_commits_do_not_count() -> None:
    sparse = [
        learnt(0, START),
        learnt(1, START + timedelta(days=40)),
        learnt(2, START + timedelta(days=90)),
    ]
    assert kept(judge(sparse, RetentionPolicy(hourly=2))) == [1, 2]


def test_within_counts_back_from_the_newest_and_includes_its_end() -> None:
    policy = RetentionPolicy(within_ns=3 * HOUR_NS)
    assert kept(judge(every(timedelta(hours=1), 10), policy)) == [6, 7, 8, 9]


def test_rules_are_a_union_and_say_who_kept_what() -> None:
    verdicts = judge(every(timedelta(days=1), 400), RetentionPolicy(last=2, monthly=2, yearly=5))
    reasons = {int.from_bytes(v.commit.id, "big"): v.reasons for v in verdicts if v.reasons}
    assert reasons == {
        399: ["last", "monthly", "yearly"],
        398: ["last"],
        393: ["monthly"],
        334: ["yearly"],
    }


def test_commits_learnt_together_are_ordered_by_generation() -> None:
    together = [Learnt(ObjectId(bytes([9 - n] * 32)), 5, n + 1) for n in range(5)]
    first = judge(together, RetentionPolicy(hourly=1))[0]
    assert first.commit.generation == 5 and first.reasons == ["hourly"]


counts = st.integers(0, 4)
policies = st.builds(
    RetentionPolicy,
    last=counts, hourly=counts, daily=counts, weekly=counts, monthly=counts, yearly=counts,
    within_ns=st.sampled_from([0, HOUR_NS, 50 * HOUR_NS]),
)  # fmt: skip


@settings(max_examples=300)
@given(policies, st.lists(st.integers(0, 3 * 365 * 24 * 60), max_size=60), st.integers())
def test_rules_run_again_on_what_they_kept_keep_the_same(
    policy: RetentionPolicy, minutes: list[int], seed: int
) -> None:
    commits = [learnt(n, START + timedelta(minutes=m)) for n, m in enumerate(minutes)]
    first = [v.commit for v in judge(commits, policy) if v.reasons]
    random.Random(seed).shuffle(first)
    again = judge(first, policy)
    assert all(verdict.reasons for verdict in again)


def test_a_backup_every_hour_pruned_every_hour_ends_as_pruned_once() -> None:
    """Buckets that are over keep their commit for good: pruning often loses nothing more."""
    policy = RetentionPolicy(last=1, hourly=5, daily=4, weekly=3)
    commits = every(timedelta(hours=1), 24 * 40)
    survivors: list[Learnt] = []
    for commit in commits:
        survivors = [v.commit for v in judge([*survivors, commit], policy) if v.reasons]
    assert {c.id for c in survivors} == {v.commit.id for v in judge(commits, policy) if v.reasons}
