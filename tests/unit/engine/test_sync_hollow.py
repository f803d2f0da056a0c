"""Shallow histories: commits known by their record alone, and what goes over the wire of them."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dmsync.core.chunking import FIXED_CHUNK_BYTES
from dmsync.core.events import CommitsAdded, CommitsThinned, DotScopeSet, RefChanged
from dmsync.core.graph import ancestors_difference, merge_bases
from dmsync.core.ids import DotId, Kind, ObjectId
from dmsync.core.objects import Commit, Entry, EntryKind
from dmsync.core.pages import directory_entries, write_directory
from dmsync.engine import sync_opening, sync_pull, sync_push, sync_server
from dmsync.engine.fsck import fsck
from dmsync.engine.sync_hollow import Contents, Holding, Selection
from dmsync.engine.sync_records import Outgoing, PlannedObject
from dmsync.errors import (
    BadObject,
    ContentAbsent,
    NetworkError,
    ObjectMissing,
    PathNotFound,
    VersionMismatch,
)
from dmsync.wire.messages import Fetch, Hello, Plan
from tests.support.hollow_stores import complete_commits, drop_content
from tests.support.streams import Line
from tests.support.sync_stores import FakeStore, Pair, noise

DATABASE = noise(3 * FIXED_CHUNK_BYTES)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    made = Pair(str(tmp_path))
    yield made
    made.close()


def history(store: FakeStore, count: int, *, dot: DotId | None = None) -> DotId:
    """Commits m1..m<count>: a large file of which a page changes each time, and small ones."""
    dot = dot or store.create_dot()
    for number in range(1, count + 1):
        data = bytearray(DATABASE)
        data[number * 4096 : (number + 1) * 4096] = noise(4096, number)
        files = {"db/data": bytes(data), "log": b"%d" % number, f"db/{number}": noise(900, number)}
        store.commit(dot, files, message=f"m{number}")
    return dot


def content_is_here(store: FakeStore, dot: DotId, commit: ObjectId) -> bool:
    try:
        store.files(dot, commit)
    except ObjectMissing:
        return False
    return True


def complete(store: FakeStore, dot: DotId) -> set[ObjectId]:
    """Commits that the store says it has with content, each of them read whole."""
    found = complete_commits(store, dot)
    for commit in found:
        store.files(dot, commit)
    return found


def hollow(store: FakeStore, dot: DotId, branch: str = "master") -> list[bool]:
    """Newest first: is the commit hollow?"""
    known = set(store.catalog.hollow_commits(dot))
    return [commit in known for commit in store.log(dot, branch)]


def between(pair: Pair, local: FakeStore, remote: FakeStore) -> Pair:
    """Sessions between two stores of which some may belong to `pair`."""
    made = copy.copy(pair)
    made.local, made.remote = local, remote
    if local.catalog.remote("origin") is None:
        local.add_remote()
    return made


# --- clone ---------------------------------------------------------------------------------------


def test_shallow_clone_has_all_records_and_the_content_of_the_newest(pair: Pair) -> None:
    dot = history(pair.remote, 9)
    summary = pair.clone(depth=2)
    assert (summary.commits_received, summary.commits_hollow) == (9, 7)
    assert pair.local.log(dot) == pair.remote.log(dot)
    assert hollow(pair.local, dot) == [False, False] + [True] * 7
    for commit in pair.local.log(dot)[:2]:
        assert pair.local.files(dot, commit) == pair.remote.files(dot, commit)
    assert not content_is_here(pair.local, dot, pair.local.log(dot)[2])
    there, here = pair.remote.catalog.graph(dot), pair.local.catalog.graph(dot)
    assert all(here.generation(c) == there.generation(c) for c in pair.remote.log(dot))


def test_depth_counts_steps_along_all_parents_from_each_tip(pair: Pair) -> None:
    dot = history(pair.remote, 4)
    base = pair.remote.log(dot)[2]
    pair.remote.branch(dot, "side", base)
    pair.remote.commit(dot, {"s": b"1"}, "side")
    pair.remote.commit(dot, {"s": b"2"}, "side")
    tips = (pair.remote.tip(dot), pair.remote.tip(dot, "side"))
    assert tips[0] and tips[1]
    pair.remote.commit(dot, {"merged": b"x"}, parents=(tips[0], tips[1]))
    pair.clone(depth=2)
    assert hollow(pair.local, dot) == [False, False, True, True, True]
    assert hollow(pair.local, dot, "side") == [False, False, True, True]
    assert merge_bases(pair.local.catalog.graph(dot), tips[0], tips[1]) == [base]


def test_a_branch_at_an_old_commit_comes_with_content(pair: Pair) -> None:
    dot = history(pair.remote, 6)
    old = pair.remote.log(dot)[4]
    pair.remote.branch(dot, "v1", old)
    pair.clone(depth=1)
    assert hollow(pair.local, dot) == [False, True, True, True, False, True]
    assert pair.local.files(dot, old) == pair.remote.files(dot, old)


def test_huge_depth_is_a_full_clone(pair: Pair) -> None:
    dot = history(pair.remote, 5)
    summary = pair.clone(depth=2**62)
    assert summary.commits_hollow == 0
    assert hollow(pair.local, dot) == [False] * 5


# --- going on ------------------------------------------------------------------------------------


def test_pull_into_a_shallow_clone_brings_new_commits_with_content(pair: Pair) -> None:
    dot = history(pair.remote, 5)
    pair.clone(depth=1)
    history(pair.remote, 3, dot=dot)
    summary = pair.pull(dot)
    assert (summary.commits_received, summary.commits_hollow, summary.round_trips) == (3, 0, 2)
    assert hollow(pair.local, dot) == [False] * 4 + [True] * 4
    assert pair.local.files(dot, pair.local.tip(dot)) == pair.remote.files(
        dot, pair.remote.tip(dot)
    )
    assert pair.pull(dot).round_trips == 1


def test_deepen_brings_so_many_more_and_unshallow_all(pair: Pair) -> None:
    dot = history(pair.remote, 9)
    pair.clone(depth=2)
    summary = pair.fetch(dot, deepen=3)
    assert (summary.commits_deepened, summary.nothing_to_do) == (3, False)
    assert hollow(pair.local, dot) == [False] * 5 + [True] * 4
    assert pair.fetch(dot, depth=7).commits_deepened == 2
    summary = pair.fetch(dot, unshallow=True)
    assert (summary.commits_deepened, summary.commits_unavailable) == (2, 0)
    assert pair.local.catalog.hollow_commits(dot) == []
    for commit in pair.remote.log(dot):
        assert pair.local.files(dot, commit) == pair.remote.files(dot, commit)
    again = pair.fetch(dot, unshallow=True)
    assert again.nothing_to_do and again.round_trips == 1


def test_deepening_sends_little_beside_what_is_here(pair: Pair) -> None:
    dot = history(pair.remote, 30)
    pair.clone(depth=1)
    summary = pair.fetch(dot, deepen=1)
    assert summary.commits_deepened == 1
    assert summary.bytes_received < 12_000  # two 4 KiB pages changed between the two
    assert summary.objects_received < 12


def test_fetch_with_depth_limits_new_commits_too(pair: Pair) -> None:
    dot = history(pair.remote, 3)
    pair.clone()
    history(pair.remote, 6, dot=dot)
    summary = pair.pull(dot, depth=2)
    assert (summary.commits_received, summary.commits_hollow) == (6, 4)
    assert hollow(pair.local, dot) == [False] * 2 + [True] * 4 + [False] * 3
    pair.fetch(dot, unshallow=True)
    assert len(complete(pair.local, dot)) == 9


def test_a_branch_at_a_hollow_commit_gets_its_content_when_fetched(pair: Pair) -> None:
    dot = history(pair.remote, 6)
    pair.clone(depth=1)
    old = pair.remote.log(dot)[3]
    pair.remote.branch(dot, "old", old)
    summary = pair.pull(dot, branches=("old",))
    assert (summary.commits_received, summary.commits_deepened) == (0, 1)
    assert pair.local.files(dot, old) == pair.remote.files(dot, old)
    assert pair.local.tip(dot, "old") == old


# --- pushing from and to partial histories -------------------------------------------------------


def test_push_from_a_shallow_clone_to_its_origin_and_to_an_empty_store(
    pair: Pair, tmp_path: Path
) -> None:
    dot = history(pair.remote, 8)
    pair.clone(depth=2)
    new = pair.local.commit(dot, {"log": b"mine", "db/data": DATABASE})
    summary = pair.push(dot)
    assert (summary.commits_sent, summary.commits_hollow, summary.round_trips) == (1, 0, 2)
    assert pair.remote.files(dot, new) == pair.local.files(dot, new)

    third = between(pair, pair.local, FakeStore(str(tmp_path / "third")))
    summary = third.push(dot)
    assert (summary.commits_sent, summary.commits_hollow) == (9, 6)
    assert hollow(third.remote, dot) == [False] * 3 + [True] * 6
    assert len(complete(third.remote, dot)) == 3

    # a full store pushes to the shallow one: only what is new, and nothing is lost
    full = between(pair, pair.remote, third.remote)
    newer = pair.remote.commit(dot, {"log": b"newer", "db/data": DATABASE})
    summary = full.push(dot)
    assert summary.commits_sent == 1 and summary.objects_sent < 8
    assert third.remote.files(dot, newer) == pair.remote.files(dot, newer)
    assert hollow(pair.remote, dot) == [False] * 10  # never downgraded
    third.remote.close()


def test_a_full_store_never_becomes_hollow_by_what_a_shallow_one_sends(pair: Pair) -> None:
    dot = history(pair.local, 5)
    pair.push(dot)
    thinned = pair.local.log(dot)[1:4]
    pair.local.append(CommitsThinned(dot, tuple(thinned), "test"))
    for _ in range(3):
        pair.local.commit(dot, {"log": noise(10).hex().encode()})
    pair.push(dot)
    assert hollow(pair.remote, dot) == [False] * 8


def test_push_to_a_thinned_server_sends_whole_what_it_cannot_compare(pair: Pair) -> None:
    dot = history(pair.local, 4)
    pair.push(dot)
    tip = pair.local.tip(dot)
    assert tip
    drop_content(pair.remote, dot, pair.remote.log(dot))
    new = pair.local.commit(dot, {"db/data": DATABASE, "log": b"new"})
    summary = pair.push(dot)
    assert summary.round_trips == 3  # one more: where is content?
    assert pair.remote.files(dot, new) == pair.local.files(dot, new)
    assert hollow(pair.remote, dot) == [False] + [True] * 4


def test_a_branch_pushed_to_a_commit_that_is_hollow_there_brings_its_content(pair: Pair) -> None:
    dot = history(pair.local, 4)
    pair.push(dot)
    old = pair.local.log(dot)[2]
    drop_content(pair.remote, dot, [old])
    pair.local.branch(dot, "old", old)
    summary = pair.push(dot, "old")
    assert summary.commits_hollow == 0
    assert pair.remote.files(dot, old) == pair.local.files(dot, old)
    assert pair.remote.tip(dot, "old") == old


def test_a_tip_without_content_is_refused_by_push_and_fetch(pair: Pair) -> None:
    dot = history(pair.local, 4)
    old = pair.local.log(dot)[2]
    pair.local.branch(dot, "old", old)
    drop_content(pair.local, dot, [old])
    outcome = pair.try_push(dot, "old")
    assert isinstance(outcome.error, ContentAbsent) and "--deepen" in outcome.error.hint
    assert pair.remote.catalog.dots() == []
    pair.push(dot)  # master is complete, its history partly hollow
    assert hollow(pair.remote, dot) == [False, False, True, False]
    other = between(pair, FakeStore(pair.directory + "/other"), pair.local)
    outcome = other.try_clone()
    assert isinstance(outcome.error, ContentAbsent)
    assert other.local.catalog.dots() == []
    other.local.close()


def test_unshallow_from_a_server_that_lacks_some_content_says_so(pair: Pair) -> None:
    dot = history(pair.remote, 6)
    pair.clone(depth=1)
    drop_content(pair.remote, dot, pair.remote.log(dot)[4:])
    summary = pair.fetch(dot, unshallow=True)
    assert (summary.commits_deepened, summary.commits_unavailable) == (3, 2)
    assert hollow(pair.local, dot) == [False] * 4 + [True] * 2


def test_deepening_far_costs_about_what_the_changes_are(pair: Pair) -> None:
    dot = history(pair.remote, 16)
    pair.clone(depth=1)
    summary = pair.fetch(dot, deepen=12)
    assert summary.commits_deepened == 12
    assert summary.bytes_received < 12 * 11_000  # two 4 KiB pages and a small file a commit
    assert len(complete(pair.local, dot)) == 13


# --- cuts ----------------------------------------------------------------------------------------


def test_a_deepening_cut_anywhere_loses_nothing_and_goes_on(tmp_path: Path) -> None:
    total = 0
    for cut_after in range(2_000, 10**9, 130_000):
        directory = tmp_path / str(cut_after)
        directory.mkdir()
        pair = Pair(str(directory))
        dot = history(pair.remote, 30)
        pair.clone(depth=1)
        before = complete(pair.local, dot)
        outcome = pair.try_fetch(
            dot, unshallow=True, line=lambda cut=cut_after: Line(cut_after=cut)
        )
        pair.reopen()
        assert before <= complete(pair.local, dot)
        again = pair.fetch(dot, unshallow=True)
        assert len(complete(pair.local, dot)) == 30
        pair.close()
        if outcome.error is None:
            total = cut_after
            break
        assert isinstance(outcome.error, NetworkError)
    assert again.nothing_to_do and total > 300_000


def test_a_cut_deepening_sends_no_record_twice(pair: Pair) -> None:
    dot = history(pair.remote, 60)
    pair.clone(depth=1)
    outcome = pair.try_fetch(dot, unshallow=True, line=lambda: Line(cut_after=700_000))
    assert isinstance(outcome.error, NetworkError)
    pair.reopen()
    summary = pair.fetch(dot, unshallow=True)
    assert summary.resumed_objects > 100
    assert len(complete(pair.local, dot)) == 60


def test_batches_of_a_deepening_are_recorded_one_by_one(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sync_pull, "CONTENT_MAX", 4)
    dot = history(pair.remote, 14)
    pair.clone(depth=1)
    summary = pair.fetch(dot, unshallow=True)
    assert (summary.commits_deepened, summary.round_trips) == (13, 5)
    assert len(complete(pair.local, dot)) == 14
    assert len([row for row in pair.local.catalog.transfers() if row.status == "done"]) == 5


# --- hostile and mistaken peers ------------------------------------------------------------------


def test_a_server_that_sends_tips_without_content_is_refused(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    dot = history(pair.remote, 4)

    def nothing_complete(here: Holding, ask: Fetch) -> Selection:
        missing = list(ancestors_difference(here.graph, ask.wants, []))
        return Selection(missing, [], lambda commit: False)

    monkeypatch.setattr(sync_server, "select_for_fetch", nothing_complete)
    outcome = pair.try_clone()
    assert isinstance(outcome.error, ContentAbsent)
    assert pair.local.catalog.dot(dot) is None


def test_a_pusher_that_sends_its_tip_without_content_is_refused(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    dot = history(pair.local, 3)
    pair.push(dot)
    pair.local.commit(dot, {"log": b"new"})
    monkeypatch.setattr(
        sync_push,
        "select_for_push",
        lambda here, missing, upgrades, there: Selection(missing, [], lambda commit: False),
    )
    outcome = pair.try_push(dot)
    assert isinstance(outcome.error, ContentAbsent)
    assert len(pair.remote.log(dot)) == 3


@pytest.mark.parametrize("what", ["clone", "deepen"])
def test_content_that_is_claimed_and_not_sent_is_found(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    dot = history(pair.remote, 6)
    if what == "deepen":
        pair.clone(depth=1)

    def only_the_commit(self: Outgoing, commit: ObjectId, added: object) -> None:
        self.plan.append(PlannedObject(Kind.COMMIT, commit, 100, None))

    monkeypatch.setattr(Outgoing, "_list", only_the_commit)
    if what == "deepen":
        outcome = pair.try_fetch(dot, unshallow=True)
        assert hollow(pair.local, dot) == [False] + [True] * 5
        assert len(complete(pair.local, dot)) == 1
    else:
        outcome = pair.try_clone(depth=2)
        assert pair.local.catalog.dot(dot) is None
    assert isinstance(outcome.error, ObjectMissing)


def test_a_client_that_claims_content_it_lacks_harms_itself_alone(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    dot = history(pair.remote, 6)
    pair.clone(depth=1)
    monkeypatch.setattr(sync_pull, "first_hollow", lambda here, heads: {})
    outcome = pair.try_fetch(dot, deepen=2)
    if outcome.error is None:  # the child was no base, all was sent whole
        assert len(complete(pair.local, dot)) == 3
    assert complete(pair.local, dot) >= {pair.local.log(dot)[0]}
    assert pair.remote.catalog.hollow_commits(dot) == []


def test_a_pusher_that_takes_hollow_commits_of_the_server_for_complete_is_refused(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    dot = history(pair.local, 3)
    pair.push(dot)
    drop_content(pair.remote, dot, pair.remote.log(dot))
    pair.local.commit(dot, {"db/data": DATABASE, "log": b"new"})
    monkeypatch.setattr(sync_push, "Contents", lambda known: Contents(None))
    outcome = pair.try_push(dot)
    assert isinstance(outcome.error, ObjectMissing | BadObject)
    assert len(pair.remote.log(dot)) == 3
    monkeypatch.undo()
    pair.push(dot)
    assert len(complete(pair.remote, dot)) == 1


def test_content_beside_a_hollow_mark_makes_nothing_complete(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    dot = history(pair.remote, 5)
    pages = Outgoing.pages

    def marked(self: Outgoing, *, eager: bool) -> Iterator[Plan]:
        """Everything but the last commit is called hollow; its content comes all the same."""
        last = len(self.plan) - 1
        self.plan = [
            planned._replace(is_hollow=planned.kind is Kind.COMMIT and at < last)
            for at, planned in enumerate(self.plan)
        ]
        return pages(self, eager=eager)

    monkeypatch.setattr(Outgoing, "pages", marked)
    summary = pair.clone()
    assert summary.commits_hollow == 4
    assert hollow(pair.local, dot) == [False] + [True] * 4
    assert len(complete(pair.local, dot)) == 1


def test_a_commit_that_is_complete_stays_so_when_it_comes_hollow(pair: Pair) -> None:
    dot = history(pair.local, 4)
    pair.push(dot)
    drop_content(pair.local, dot, pair.local.log(dot)[1:])
    pair.local.branch(dot, "other", pair.local.log(dot)[0])
    pair.push(dot, "other")
    pair.fetch(dot)
    assert hollow(pair.remote, dot) == [False] * 4
    assert hollow(pair.local, dot) == [False] + [True] * 3


def test_a_peer_that_does_not_know_hollow_commits_is_refused(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    dot = history(pair.remote, 4)
    drop_content(pair.remote, dot, pair.remote.log(dot)[1:])

    def of_old(store: object, *, login: str = "") -> Hello:
        said = sync_opening.hello(store)  # type: ignore[arg-type]
        kept = tuple(pair for pair in said.capabilities if pair[0] != "hollow")
        return replace(said, capabilities=kept)

    monkeypatch.setattr(sync_server, "hello", of_old)
    pair.remote.append(CommitsAdded(dot, tuple(reversed(pair.remote.log(dot)))))
    assert isinstance(pair.try_clone(depth=1).error, VersionMismatch)
    assert pair.local.catalog.dots() == []


# --- subdots -------------------------------------------------------------------------------------

TREE = {"db/rows": b"rows", "media/film": noise(90_000, 5), "web/page": b"page"}


def test_a_partial_clone_gets_its_subdots_of_every_commit(pair: Pair) -> None:
    dot = pair.remote.create_dot()
    for number in range(3):
        pair.remote.commit(dot, {**TREE, "db/rows": b"%d" % number})
    summary = pair.clone(subdots=("db", "web"))
    assert (summary.commits_hollow, pair.local.catalog.scope(dot)) == (0, ("db", "web"))
    assert summary.bytes_received < 8_000
    root = pair.local._root(dot, pair.local.log(dot)[0])
    names = [entry.name for entry in directory_entries(pair.local.objects(dot), root.tree)]
    assert names == [b"db", b"media", b"web"]
    with pytest.raises(ContentAbsent):
        pair.local.files(dot, pair.local.tip(dot))
    row = pair.local.catalog.dot(dot)
    assert row is not None
    report = fsck(pair.local, [row], full=True)  # type: ignore[arg-type]
    assert report.problems == [] and report.commits == 3
    pair.remote.commit(dot, {**TREE, "media/film": noise(90_000, 6)})
    assert pair.pull(dot).bytes_received < 3_000


def test_fsck_finds_what_is_missing_of_a_kept_subdot(pair: Pair) -> None:
    dot = pair.remote.create_dot()
    pair.remote.commit(dot, TREE)
    pair.clone(subdots=("db",))
    pair.local.append(DotScopeSet(dot, ("db", "media")))
    row = pair.local.catalog.dot(dot)
    assert row is not None
    assert fsck(pair.local, [row], full=False).problems != []  # type: ignore[arg-type]


def test_a_page_of_a_root_proves_nothing_about_a_directory_that_is_the_same_page(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The root of the first commit is, byte for byte, the directory `db` of the second."""
    dot = pair.remote.create_dot()
    film = noise(90_000, 7)
    first = pair.remote.commit(dot, {"media/film": film, "db/rows": b"1"})
    objects = pair.remote.objects(dot)
    inner = pair.remote._root(dot, first)
    with objects.writer() as writer:
        entry = Entry(b"db", EntryKind.DIRECTORY, 0o755, tree=inner.tree)
        top = Entry(b"", EntryKind.DIRECTORY, 0o755, tree=write_directory(writer, [entry]))
        commit = Commit(top, (first,), "a", "a", 1, 0, "nested")
        second = writer.put(Kind.COMMIT, commit.to_bytes())
        writer.seal()
    pair.remote.append(
        CommitsAdded(dot, (second,)), RefChanged(dot, "branch/master", first, second, "commit")
    )
    pair.clone(subdots=("db",))
    assert pair.local.files(dot, second) == {"db/media/film": film, "db/db/rows": b"1"}


def test_a_server_that_leaves_out_what_is_in_scope_is_found(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    dot = pair.remote.create_dot()
    pair.remote.commit(dot, TREE)
    monkeypatch.setattr(sync_server, "scope_of", lambda subdots: frozenset((b"media",)))
    outcome = pair.try_clone(subdots=("db",))
    assert isinstance(outcome.error, ObjectMissing | ContentAbsent)
    assert pair.local.catalog.dot(dot) is None


def test_a_push_to_a_partial_server_sends_what_it_keeps(pair: Pair) -> None:
    dot = pair.remote.create_dot()
    pair.remote.commit(dot, TREE)
    pair.clone(subdots=("db",))
    back = between(pair, pair.remote, pair.local)
    pair.remote.commit(dot, {**TREE, "media/film": noise(90_000, 8), "db/rows": b"new"})
    summary = back.push(dot)
    assert summary.bytes_sent < 4_000
    row = pair.local.catalog.dot(dot)
    assert row is not None
    assert fsck(pair.local, [row], full=True).problems == []  # type: ignore[arg-type]


def test_an_unknown_subdot_is_refused(pair: Pair) -> None:
    dot = pair.remote.create_dot()
    pair.remote.commit(dot, TREE)
    outcome = pair.try_clone(subdots=("db", "nothing"))
    assert isinstance(outcome.error, PathNotFound) and "media" in outcome.error.hint
    assert pair.local.catalog.dot(dot) is None
