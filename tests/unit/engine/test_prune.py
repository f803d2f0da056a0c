"""Pruning: which commits keep their content, and that nothing a name stands on ever loses it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from dmsync.core.ids import ObjectId
from dmsync.core.retention import RetentionPolicy
from dmsync.engine import branches, remotes
from dmsync.engine.prune import PruneRequest, PruneSummary, prune
from dmsync.errors import RemoteNotFound, UsageError
from dmsync.storage.catalog import DotRow
from tests.support.working_store import Workshop

HOUR_NS = 3_600_000_000_000


class History:
    """A dot whose commits the store learnt of at times of the test's choosing."""

    def __init__(
        self, workshop: Workshop, directory: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.workshop = workshop
        self.directory = directory
        self.dot: DotRow = workshop.attach("shop", directory)
        self.now_ns = 1_800_000_000 * 10**9
        monkeypatch.setattr(workshop.store.catalog, "_clock_ns", lambda: self.now_ns)

    def commit(self, *, hours: float = 1) -> ObjectId:
        self.now_ns += int(hours * HOUR_NS)
        (self.directory / "file").write_text(str(self.now_ns))
        made = self.workshop.commit(self.dot, f"at {self.now_ns}").commit
        assert made is not None
        return made

    def prune(self, **rules: object) -> PruneSummary:
        wishes = {k: rules.pop(k) for k in ("tag_patterns", "not_pushed", "dry_run") if k in rules}
        request = PruneRequest(RetentionPolicy(**rules), **wishes)  # type: ignore[arg-type]
        return prune(self.workshop.store, self.dot, request)

    def hollow(self) -> set[ObjectId]:
        return set(self.workshop.store.catalog.hollow_commits(self.dot.dot))


@pytest.fixture
def past(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[History]:
    workshop = Workshop(tmp_path / "home")
    yield History(workshop, tmp_path / "tree", monkeypatch)
    workshop.close()


def test_what_no_rule_keeps_becomes_hollow_and_keeps_its_record(past: History) -> None:
    made = [past.commit() for _ in range(6)]
    summary = past.prune(last=2)
    assert set(summary.thinned) == set(made[:4]) == past.hollow()
    assert len(past.workshop.messages(past.dot)) == 6
    assert past.prune(last=2).thinned == []


def test_dry_run_changes_nothing_and_tells_reasons(past: History) -> None:
    made = [past.commit() for _ in range(3)]
    plan = past.prune(last=1, hourly=2, dry_run=True)
    assert {c.id: c.reasons for c in plan.commits} == {
        made[2]: ("last", "hourly", "branch"),
        made[1]: ("hourly",),
        made[0]: (),
    }
    assert past.hollow() == set()


def test_time_is_when_the_store_learnt_never_what_a_commit_says(past: History) -> None:
    store = past.workshop.store
    made = []
    for claimed_s in (5, 4_000_000_000, 77):
        store.clock = lambda now=claimed_s: (now * 10**9, 0)  # type: ignore[method-assign,misc]
        made.append(past.commit(hours=30))
    assert set(past.prune(daily=2).thinned) == {made[0]}


def test_each_branch_is_judged_by_itself(past: History) -> None:
    made = [past.commit() for _ in range(3)]
    past.workshop.checkout(past.dot, "topic", create=True)
    topic = [past.commit() for _ in range(3)]
    assert set(past.prune(last=2).thinned) == {made[0], topic[0]}


def test_tips_stashes_and_what_they_stand_on_are_always_kept(past: History) -> None:
    store = past.workshop.store
    made = [past.commit() for _ in range(5)]
    branches.create_branch(store, past.dot, "old", made[0].hex())
    branches.reset(store, past.dot, made[1].hex(), hard=True)
    (past.directory / "file").write_text("not committed")
    branches.reset(store, past.dot, made[4].hex(), hard=True)  # keeps a stash on made[1]
    assert set(past.prune(last=1).thinned) == {made[2], made[3]}


def test_tags_are_kept_or_only_those_that_match(past: History) -> None:
    from dmsync.engine.tagging import TagRequest, create_tag

    made = [past.commit() for _ in range(4)]
    for name, commit in (("v1", made[0]), ("tmp", made[1])):
        create_tag(past.workshop.store, past.dot, TagRequest(name, commit.hex()))
    assert set(past.prune(last=1, dry_run=True).thinned) == {made[2]}
    assert set(past.prune(last=1, tag_patterns=("v*",)).thinned) == {made[1], made[2]}


def test_what_a_remote_lacks_is_kept_when_asked(past: History) -> None:
    from dmsync.core.events import RefChanged

    store = past.workshop.store
    made = [past.commit() for _ in range(5)]
    remotes.add_remote(store, "vault", "ssh://vault", None)
    tracked = RefChanged(past.dot.dot, "remote/vault/master", None, made[2], "push")
    with store.transaction("test") as tx:
        tx.append(tracked)
    kept = past.prune(not_pushed=("vault",), dry_run=True)
    assert set(kept.thinned) == {made[0], made[1]}
    # made[2] is what the next push builds on, whatever the rules say
    assert set(past.prune(last=1, dry_run=True).thinned) == {made[0], made[1], made[3]}


def test_no_rule_and_unknown_remotes_are_refused(past: History) -> None:
    past.commit()
    with pytest.raises(UsageError, match="no rule"):
        past.prune()
    with pytest.raises(RemoteNotFound):
        past.prune(last=1, not_pushed=("nowhere",))


def test_a_rebuilt_catalog_has_the_same_hollow_commits(past: History) -> None:
    [past.commit() for _ in range(4)]
    past.prune(last=1)
    before, digest = past.hollow(), past.workshop.store.catalog.digest()
    past.workshop.store.catalog.rebuild()
    assert past.hollow() == before
    assert past.workshop.store.catalog.digest() == digest


def test_where_branches_meet_is_kept_so_that_they_can_be_merged(past: History) -> None:
    made = [past.commit() for _ in range(3)]
    past.workshop.checkout(past.dot, "side", create=True)
    past.commit()
    past.workshop.checkout(past.dot, "master")
    past.commit()
    plan = past.prune(last=1)
    assert set(plan.thinned) == {made[0], made[1]}
    assert "where branches meet" in next(c for c in plan.commits if c.id == made[2]).reasons
