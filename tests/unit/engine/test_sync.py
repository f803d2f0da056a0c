"""Push, fetch, pull and clone between two real stores over memory."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dmsync.core.events import DotDeleted, Event, RefChanged, RemoteObserved
from dmsync.core.ids import DotId, ObjectId
from dmsync.engine import sync_pull, sync_push, sync_records
from dmsync.engine.ports import TargetTree
from dmsync.engine.sync_pull import list_remote_dots
from dmsync.engine.sync_refs import stash_name
from dmsync.errors import (
    AccessDenied,
    AlreadyExists,
    Diverged,
    DotIdClash,
    DotNotFound,
    NotFastForward,
    RefConflict,
    RemoteRewound,
    RevisionNotFound,
    StorageFailed,
    UnrelatedHistories,
    WouldLose,
)
from dmsync.storage import pack_writer, quarantine
from dmsync.wire.messages import RefStatus
from tests.support.sync_stores import Everything, FakeStore, Pair, noise


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    made = Pair(str(tmp_path))
    yield made
    made.close()


def seqs(pair: Pair) -> tuple[int, int]:
    return pair.local.catalog.last_seq(), pair.remote.catalog.last_seq()


def pushed(pair: Pair, **files: bytes) -> DotId:
    """A dot with one commit, pushed."""
    dot = pair.local.create_dot()
    pair.local.commit(dot, files or {"a": b"one"})
    pair.push(dot)
    return dot


# --- push ----------------------------------------------------------------------------------------


def test_first_push_creates_the_dot_with_all_content(pair: Pair) -> None:
    dot = pair.local.create_dot()
    pair.local.commit(dot, {"a": b"one"}, message="first")
    tip = pair.local.commit(dot, {"a": b"two", "d/b": noise(400_000)}, message="second")
    summary = pair.push(dot)
    assert summary.round_trips == 2
    assert summary.commits_sent == 2
    assert pair.remote.tip(dot) == tip
    assert pair.remote.files(dot, tip) == pair.local.files(dot, tip)
    row = pair.remote.catalog.dot_by_name("admin", "apples")
    assert row is not None and row.dot == dot
    assert pair.local.ref(dot, "remote/origin/master") == tip
    assert pair.local.catalog.upstream(dot, "origin") == ("admin", "apples")


def test_push_without_news_takes_one_round_trip_and_writes_nothing(pair: Pair) -> None:
    dot = pushed(pair)
    before = seqs(pair)
    outcome = pair.try_push(dot)
    assert outcome.error is None
    assert outcome.result.nothing_to_do
    assert outcome.result.round_trips == 1
    assert outcome.line.turns == 2  # the question, and BYE
    assert seqs(pair) == before


def test_usual_push_takes_two_round_trips_and_sends_the_change_only(pair: Pair) -> None:
    dot = pushed(pair, a=noise(3_000_000), b=b"x")
    tip = pair.local.commit(dot, {"a": noise(3_000_000), "b": b"y"})
    outcome = pair.try_push(dot)
    assert outcome.result.round_trips == 2
    assert outcome.result.bytes_sent < 4000
    assert pair.remote.tip(dot) == tip


def test_records_go_verbatim_when_the_base_is_there(pair: Pair) -> None:
    data = noise(1_000_000)
    dot = pushed(pair, a=data)
    changed = data[:500_000] + b"changed" + data[500_007:]
    pair.local.commit(dot, {"a": changed})
    again = changed[:100_000] + b"again" + changed[100_005:]
    tip = pair.local.commit(dot, {"a": again})
    summary = pair.push(dot)
    assert summary.reencoded == 0 and summary.verbatim == summary.objects_sent
    assert summary.bytes_sent < 6000
    assert pair.remote.files(dot, tip)["a"] == again


@contextmanager
def compressions() -> Iterator[list[str]]:
    """The names of the functions that make frames, once for each call by whoever handles objects."""
    calls: list[str] = []

    def counted(name: str, compress: Callable[..., Any]) -> Callable[..., Any]:
        def count_and_compress(*given: Any) -> Any:
            calls.append(name)
            return compress(*given)

        return count_and_compress

    with pytest.MonkeyPatch.context() as patch:
        for module in (sync_records, quarantine, pack_writer):
            for name in ("compress", "compress_all", "compress_with_prefix"):
                if hasattr(module, name):
                    patch.setattr(module, name, counted(name, getattr(module, name)))
        yield calls


def test_an_ordinary_push_and_pull_compress_nothing(pair: Pair) -> None:
    """P8: what is stored goes as it is and is kept as it came, on both sides."""
    data = noise(3_000_000) + b"the same line again\n" * 100_000
    dot = pushed(pair, a=data, b=b"x" * 5000)
    with compressions() as calls:
        pair.local.commit(
            dot, {"a": data[:500_000] + b"changed" + data[500_007:], "b": b"y" * 5000}
        )
        assert calls, "a commit does compress"
        pair.local.commit(dot, {"a": data + b"longer", "b": b"y" * 5000, "c": noise(400_000, 2)})
        calls.clear()
        pushed_more = pair.push(dot)
        assert pushed_more.reencoded == 0 and pushed_more.verbatim == pushed_more.objects_sent >= 10
        assert calls == []
        tip = pair.remote.commit(dot, {"a": data + b"longest", "c": noise(500_000, 2)})
        calls.clear()
        pulled = pair.pull(dot)
        assert pulled.reencoded == 0 and pulled.verbatim == pulled.objects_received > 3
        assert calls == []
    assert pair.local.tip(dot) == tip


def test_records_whose_base_the_receiver_lacks_are_reencoded(pair: Pair) -> None:
    data = noise(200_000)
    dot = pair.local.create_dot()
    first = pair.local.commit(dot, {"a": b"root"})
    pair.push(dot)
    pair.local.commit(dot, {"a": data}, branch="side", parents=(first,))
    changed = data[:50_000] + b"changed" + data[50_007:]
    # made as a delta on the side's chunk, then brought to master without that history
    pair.local.commit(dot, {"a": changed}, branch="side")
    tip = pair.local.commit(dot, {"a": changed}, parents=(first,))
    summary = pair.push(dot)
    assert summary.reencoded >= 1
    assert pair.remote.files(dot, tip)["a"] == changed


def test_large_push_waits_for_the_inventory_and_acknowledges(pair: Pair) -> None:
    dot = pair.local.create_dot()
    tip = pair.local.commit(dot, {"a": noise(20_000_000)})
    outcome = pair.try_push(dot)
    assert outcome.error is None
    assert outcome.result.round_trips == 3
    assert pair.remote.files(dot, tip) == pair.local.files(dot, tip)
    transfers = pair.remote.catalog.transfers()
    assert [t.status for t in transfers] == ["done"]


def test_moved_files_are_not_sent_again(pair: Pair) -> None:
    data = noise(2_000_000)
    dot = pushed(pair, a=data)
    tip = pair.local.commit(dot, {"d/moved": data})
    assert pair.push(dot).bytes_sent < 3000
    assert pair.remote.files(dot, tip) == {"d/moved": data}


def test_content_of_a_second_parent_that_is_there_is_not_sent_again(pair: Pair) -> None:
    data = noise(900_000)
    dot = pushed(pair)
    first = pair.local.tip(dot)
    assert first is not None
    pair.local.branch(dot, "side", first)
    side = pair.local.commit(dot, {"a": b"one", "big": data}, branch="side")
    pair.push(dot, "side")
    ours = pair.local.commit(dot, {"a": b"two"})
    merge = pair.local.commit(dot, {"a": b"two", "big": data}, parents=(ours, side))
    assert pair.push(dot).bytes_sent < 3000
    assert pair.remote.files(dot, merge) == {"a": b"two", "big": data}


def test_branch_takes_its_chain_along(pair: Pair) -> None:
    dot = pair.local.create_dot()
    m1 = pair.local.commit(dot, {"a": b"1"})
    pair.local.branch(dot, "b1", m1)
    m2 = pair.local.commit(dot, {"a": b"2"})
    b1 = pair.local.commit(dot, {"a": b"1", "b": b"1"}, branch="b1")
    pair.local.branch(dot, "b2", b1, origin="b1")
    b2 = pair.local.commit(dot, {"a": b"1", "c": b"2"}, branch="b2")
    summary = pair.push(dot, "b2")
    assert [ref.ref for ref in summary.refs] == ["branch/master", "branch/b1", "branch/b2"]
    assert pair.remote.tip(dot) == m1 and m1 != m2
    assert pair.remote.tip(dot, "b1") == b1
    assert pair.remote.log(dot, "b2") == [b2, b1, m1]
    row = pair.remote.catalog.branch(dot, "b2")
    assert row is not None and row.origin == "b1"
    before = seqs(pair)
    assert pair.push(dot, "b2").nothing_to_do
    assert seqs(pair) == before


def test_push_of_every_branch_and_tags(pair: Pair) -> None:
    dot = pair.local.create_dot()
    first = pair.local.commit(dot, {"a": b"1"})
    pair.local.branch(dot, "b1", first)
    pair.local.append(RefChanged(dot, "tag/v1.0", None, first, "create"))
    pair.push(dot, every=True, tags=True)
    assert pair.remote.branch_names(dot) == ["b1", "master"]
    assert pair.remote.ref(dot, "tag/v1.0") == first


def test_many_commits_arrive_in_order(pair: Pair) -> None:
    dot = pair.local.create_dot()
    for number in range(60):
        pair.local.commit(dot, {"a": str(number).encode()}, message=str(number))
    pair.push(dot)
    assert pair.remote.log(dot) == pair.local.log(dot)


def test_unborn_branch_is_refused(pair: Pair) -> None:
    dot = pair.local.create_dot()
    with pytest.raises(RevisionNotFound):
        pair.push(dot)


def test_dry_run_sends_nothing(pair: Pair) -> None:
    dot = pair.local.create_dot()
    pair.local.commit(dot, {"a": b"1"})
    before = seqs(pair)
    summary = pair.push(dot, dry_run=True)
    assert summary.commits_sent == 1 and summary.refs[0].status is RefStatus.CREATED
    assert seqs(pair) == before
    assert pair.remote.catalog.dots() == []


# --- divergence --------------------------------------------------------------------------------


def diverged(pair: Pair) -> tuple[DotId, ObjectId, ObjectId, ObjectId]:
    """Both sides have one commit the other lacks: (dot, base, local tip, remote tip)."""
    dot = pushed(pair)
    base = pair.local.tip(dot)
    assert base is not None
    theirs = pair.remote.commit(dot, {"a": b"theirs"})
    ours = pair.local.commit(dot, {"a": b"ours"})
    return dot, base, ours, theirs


def test_diverged_push_is_refused_with_facts_and_changes_nothing(pair: Pair) -> None:
    dot, base, ours, theirs = diverged(pair)
    pair.local.commit(dot, {"a": b"ours 2"})
    before = seqs(pair)
    outcome = pair.try_push(dot)
    assert isinstance(outcome.error, Diverged) and outcome.error.code == "diverged"
    facts = outcome.error.facts
    assert facts["base"] == base.hex() and facts["target"] == theirs.hex()
    assert (facts["ahead"], facts["behind"]) == (2, 1)
    assert ours != facts["source"]
    assert "stash-on-divergence" in outcome.error.hint
    assert seqs(pair) == before
    assert outcome.line.up.bytes_written < 2000


def test_a_parent_branch_that_diverged_is_left_and_not_refused(pair: Pair) -> None:
    dot, _, ours, theirs = diverged(pair)
    pair.local.branch(dot, "side", ours)
    pair.local.commit(dot, {"a": b"side"}, branch="side")
    for attempt in range(2):
        summary = pair.push(dot, "side")
        statuses = {ref.ref: ref.status for ref in summary.refs}
        assert statuses["branch/master"] is RefStatus.LEFT, attempt
        assert all(ref.error is None for ref in summary.refs)
    assert pair.remote.tip(dot) == theirs
    assert pair.remote.tip(dot, "side") == pair.local.tip(dot, "side")


def test_push_to_a_branch_that_is_ahead_says_so(pair: Pair) -> None:
    dot = pushed(pair)
    pair.remote.commit(dot, {"a": b"theirs"})
    outcome = pair.try_push(dot)
    assert type(outcome.error) is NotFastForward
    assert "ahead" in outcome.error.message


def test_push_of_what_is_behind_a_held_tip_is_not_fast_forward(pair: Pair) -> None:
    dot = pushed(pair)
    base = pair.local.tip(dot)
    assert base is not None
    pair.local.commit(dot, {"a": b"two"})
    pair.push(dot)
    pair.local.reset(dot, "master", base)
    outcome = pair.try_push(dot)
    assert type(outcome.error) is NotFastForward


def test_stash_on_divergence_keeps_the_remote_line(pair: Pair) -> None:
    dot, _, ours, theirs = diverged(pair)
    summary = pair.push(dot, mode="stash")
    assert summary.refs[0].status is RefStatus.STASHED
    names = pair.remote.branch_names(dot)
    assert pair.remote.tip(dot) == ours
    stashed = [name for name in names if name.startswith("master-DIVERGED-")]
    assert len(stashed) == 1 and summary.refs[0].stash == f"branch/{stashed[0]}"
    assert pair.remote.tip(dot, stashed[0]) == theirs


def test_stash_when_the_remote_is_merely_ahead_is_a_success(pair: Pair) -> None:
    dot = pushed(pair)
    theirs = pair.remote.commit(dot, {"a": b"theirs"})
    before = seqs(pair)
    summary = pair.push(dot, mode="stash")
    assert summary.refs[0].status is RefStatus.AHEAD
    assert pair.remote.tip(dot) == theirs
    assert seqs(pair) == before


def test_stash_names_do_not_clash(pair: Pair) -> None:
    taken = {
        "branch/m-DIVERGED-1970-01-01T00-00-00Z",
        "branch/m-DIVERGED-1970-01-01T00-00-00Z-2",
    }
    name = stash_name("branch/m", 5, taken.__contains__)
    assert name == "branch/m-DIVERGED-1970-01-01T00-00-00Z-3"


def test_lease_moves_only_from_the_expected_value(pair: Pair) -> None:
    dot, _, ours, theirs = diverged(pair)
    with pytest.raises(RefConflict):
        pair.push(dot, mode="lease")  # the tracking ref still says base
    assert pair.remote.tip(dot) == theirs
    summary = pair.push(dot, mode="lease", expected=theirs)
    assert summary.refs[0].status is RefStatus.FORCED
    assert pair.remote.tip(dot) == ours


def test_unrelated_histories_are_refused_and_can_be_stashed(pair: Pair) -> None:
    dot = pushed(pair)
    other = pair.local.commit(dot, {"z": b"z"}, branch="other", parents=())
    pair.local.reset(dot, "master", other)
    with pytest.raises(UnrelatedHistories):
        pair.push(dot)
    pair.push(dot, mode="stash")
    assert pair.remote.tip(dot) == other


def test_dirty_target_is_refused_before_data_and_kept_by_stash(pair: Pair) -> None:
    dot = pushed(pair)
    tip = pair.local.commit(dot, {"a": noise(300_000)})

    def dirty(store: Any, which: DotId, branch: str) -> None:
        raise WouldLose("uncommitted changes on volume where data would be written")

    snapshots: list[ObjectId] = []

    def save(store: FakeStore, which: DotId, branch: str) -> ObjectId:
        snapshots.append(
            store.commit(which, {"a": b"dirty"}, branch="tmp", parents=(store.tip(which),))  # type: ignore[arg-type]
        )
        return snapshots[0]

    moved: list[ObjectId] = []

    def switch(
        store: FakeStore, which: DotId, branch: str, held: ObjectId | None, commit: ObjectId
    ) -> list[Event]:
        assert held is not None, "the branch was there, and its tree held something"
        moved.append(commit)
        return []

    pair.server_tree = TargetTree(dirty, save, switch)
    outcome = pair.try_push(dot)
    assert isinstance(outcome.error, WouldLose)
    assert "uncommitted changes on volume" in outcome.error.message
    summary = pair.push(dot, mode="stash")
    assert summary.refs[0].stash is not None
    assert pair.remote.ref(dot, summary.refs[0].stash) == snapshots[0]
    assert moved == [tip]


# --- names and access ----------------------------------------------------------------------------


def test_another_dot_of_that_name_is_a_clash(pair: Pair) -> None:
    pushed(pair)
    other = pair.local.create_dot("pears")
    pair.local.commit(other, {"p": b"p"})
    with pytest.raises(DotIdClash, match="Cannot reconcile"):
        pair.push(other, remote_name="apples")
    with pytest.raises(DotIdClash):
        pair.fetch(other, remote_name="apples")


def test_one_dot_has_one_name_at_a_server(pair: Pair) -> None:
    dot = pushed(pair)
    with pytest.raises(DotIdClash, match="apples"):
        pair.push(dot, remote_name="pears")


def test_push_without_a_name_finds_the_dot_by_id(pair: Pair) -> None:
    dot = pushed(pair)
    tip = pair.local.commit(dot, {"a": b"2"})
    pair.push(dot, remote_name=None)
    assert pair.remote.tip(dot) == tip


def test_absent_and_forbidden_dots_look_alike(pair: Pair) -> None:
    dot = pushed(pair)
    pair.access = Everything("eve", "eve", lambda namespace, name, verb: namespace == "eve")
    forbidden = pair.try_fetch(dot, remote_namespace="admin", remote_name="apples")
    absent = pair.try_fetch(dot, remote_namespace="admin", remote_name="nothing")
    assert isinstance(forbidden.error, DotNotFound) and isinstance(absent.error, DotNotFound)
    assert forbidden.error.message.replace("apples", "X") == absent.error.message.replace(
        "nothing", "X"
    )
    assert forbidden.line.down.bytes_written - absent.line.down.bytes_written == len(
        "apples"
    ) - len("nothing")


def test_push_into_a_foreign_namespace_is_denied_and_creates_nothing(pair: Pair) -> None:
    dot = pair.local.create_dot()
    pair.local.commit(dot, {"a": b"1"})
    pair.access = Everything("eve", "eve", lambda namespace, name, verb: namespace == "eve")
    with pytest.raises(AccessDenied):
        pair.push(dot, remote_namespace="bob")
    assert pair.remote.catalog.dots() == []
    pair.push(dot)
    assert pair.remote.catalog.dot_by_name("eve", "apples") is not None


@pytest.mark.parametrize(
    ("verbs", "mode", "allowed"),
    [
        ({"read"}, "ff", False),
        ({"read", "append"}, "ff", True),
        ({"read", "append"}, "stash", False),  # it moves what is there aside
        ({"read", "append"}, "lease", False),
        ({"read", "append", "write"}, "lease", True),
        ({"read", "append", "write"}, "stash", True),
    ],
)
def test_each_mode_needs_its_verb(pair: Pair, verbs: set[str], mode: str, allowed: bool) -> None:
    dot = pushed(pair)
    pair.access = Everything("eve", "admin", lambda namespace, name, verb: verb in verbs)
    tip = pair.local.commit(dot, {"a": b"2"})
    outcome = pair.try_push(dot, mode=mode)
    assert isinstance(outcome.error, AccessDenied) is not allowed
    assert (pair.remote.tip(dot) == tip) is allowed


def test_a_deleted_history_is_not_offered(pair: Pair) -> None:
    dot = pushed(pair)
    pair.remote.append(DotDeleted(dot, "x-1"))
    assert isinstance(pair.try_fetch(dot).error, DotNotFound)


# --- fetch, pull, clone ------------------------------------------------------------------------------


def test_clone_brings_branches_tags_and_content(pair: Pair) -> None:
    dot = pair.remote.create_dot()
    first = pair.remote.commit(dot, {"a": noise(300_000), "d/e": b"e"})
    pair.remote.branch(dot, "b1", first)
    b1 = pair.remote.commit(dot, {"b": b"b"}, branch="b1")
    pair.remote.append(RefChanged(dot, "tag/v1", None, first, "create"))
    summary = pair.clone()
    assert summary.created and summary.round_trips == 2
    assert pair.local.files(dot, first) == pair.remote.files(dot, first)
    assert pair.local.tip(dot, "b1") == b1
    assert pair.local.ref(dot, "tag/v1") == first
    assert pair.local.ref(dot, "remote/origin/master") == first
    row = pair.local.catalog.branch(dot, "b1")
    assert row is not None and row.origin == "master"
    assert pair.local.catalog.upstream(dot, "origin") == ("admin", "apples")


def test_clone_of_a_branch_brings_what_it_stems_from(pair: Pair) -> None:
    dot = pair.remote.create_dot()
    first = pair.remote.commit(dot, {"a": b"1"})
    pair.remote.branch(dot, "b1", first)
    b1 = pair.remote.commit(dot, {"b": b"b"}, branch="b1")
    pair.remote.branch(dot, "b2", first)
    pair.clone(branch="b1", local_name="mine")
    assert pair.local.branch_names(dot) == ["b1", "master"]
    assert pair.local.log(dot, "b1") == [b1, first]
    assert pair.local.catalog.head(dot) == "b1"
    more = pair.local.commit(dot, {"b": b"c"}, branch="b1")
    pair.push(dot, "b1")
    assert pair.remote.tip(dot, "b1") == more


def test_clone_under_a_second_name_is_a_clash(pair: Pair) -> None:
    dot = pair.remote.create_dot()
    pair.remote.commit(dot, {"a": b"1"})
    pair.clone()
    with pytest.raises(DotIdClash, match="apples"):
        pair.clone(local_name="pears")
    tip = pair.remote.commit(dot, {"a": b"2"})
    pair.clone()  # the same name again is a pull
    assert pair.local.tip(dot) == tip


def test_clone_over_another_dot_of_that_name_is_refused(pair: Pair) -> None:
    pair.local.create_dot()
    dot = pair.remote.create_dot()
    pair.remote.commit(dot, {"a": b"1"})
    with pytest.raises(AlreadyExists):
        pair.clone()


def test_clone_of_an_empty_dot(pair: Pair) -> None:
    dot = pair.remote.create_dot()
    assert pair.clone().created
    assert pair.local.catalog.dot(dot) is not None


def test_usual_pull_takes_two_round_trips_and_nothing_new_one(pair: Pair) -> None:
    dot = pushed(pair)
    tip = pair.remote.commit(dot, {"a": b"2"})
    summary = pair.pull(dot)
    assert summary.round_trips == 2
    assert pair.local.tip(dot) == tip and summary.new_commits == (tip,)
    before = seqs(pair)
    pair.local_tree = TargetTree(locked=lambda *_: pytest.fail("taking the lock writes to it"))
    again = pair.pull(dot)
    assert again.round_trips == 1 and again.nothing_to_do
    assert seqs(pair) == before


def test_a_remote_restored_from_an_old_copy_is_noticed(pair: Pair, tmp_path: Path) -> None:
    dot = pushed(pair)
    pair.remote.close()
    shutil.copytree(tmp_path / "remote", tmp_path / "old")
    pair.remote = FakeStore(str(tmp_path / "remote"))
    pair.remote.commit(dot, {"a": b"2"})
    assert not pair.pull(dot).rewound
    pair.remote.close()
    pair.remote = FakeStore(str(tmp_path / "old"))
    before, refused = seqs(pair), pair.try_pull(dot)
    assert isinstance(refused.error, RemoteRewound) and seqs(pair) == before
    assert pair.pull(dot, accept_rewind=True).rewound
    assert not pair.pull(dot).rewound, "what was accepted is recorded"


@pytest.mark.parametrize("command", ["fetch", "push"])
def test_what_another_command_learns_meanwhile_is_no_rewind(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """The answer was given before the other command moved the remote."""
    dot = pushed(pair)
    asked = sync_pull.open_dot

    async def open_dot(*given: Any, **named: Any) -> Any:
        answer = await asked(*given, **named)
        seen = pair.local.catalog.observed("origin", dot)
        assert seen is not None
        newer = RemoteObserved("origin", dot, seen.cluster_id, seen.epoch, seen.seq + 5)
        pair.local.append(newer)
        return answer

    monkeypatch.setattr(sync_push if command == "push" else sync_pull, "open_dot", open_dot)
    if command == "push":
        assert pair.push(dot).nothing_to_do
    else:
        assert not pair.fetch(dot).rewound


def test_a_push_succeeds_whatever_another_command_learnt_last(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two pushes of one store at once: the second finds the tracking ref moved when it is done."""
    dot = pushed(pair)
    before = pair.local.ref(dot, "remote/origin/master")
    tip = pair.local.commit(dot, {"a": b"2"})
    real = sync_push.RemoteObserved

    def observed(*given: Any) -> RemoteObserved:
        monkeypatch.undo()
        moved = RefChanged(dot, "remote/origin/master", before, tip, "push", "")
        pair.local.append(moved)
        return real(*given)

    monkeypatch.setattr(sync_push, "RemoteObserved", observed)
    pair.push(dot)
    assert pair.remote.tip(dot) == pair.local.ref(dot, "remote/origin/master") == tip


def test_a_push_whose_record_may_be_in_the_log_is_not_refused(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's log takes the push, its fsync fails, and the next append makes it durable: the
    client has to be told of the disk, not that something exists already."""
    dot = pushed(pair)
    tip = pair.local.commit(dot, {"a": b"2"})
    real, events = os.fsync, os.path.join(pair.remote.home, "events")
    failed: list[str] = []

    def fsync(fd: int) -> None:
        path = os.readlink(f"/proc/self/fd/{fd}")
        if not failed and path.startswith(events) and path.endswith(".log"):
            failed.append(path)
            raise OSError(5, "Input/output error")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    outcome = pair.try_push(dot)
    assert failed and isinstance(outcome.error, StorageFailed), outcome.error
    assert pair.push(dot).nothing_to_do and pair.remote.tip(dot) == tip


def test_fetch_moves_tracking_refs_only(pair: Pair) -> None:
    dot = pushed(pair)
    old = pair.local.tip(dot)
    tip = pair.remote.commit(dot, {"a": b"2"})
    summary = pair.fetch(dot)
    assert pair.local.tip(dot) == old
    assert summary.tracking == (("remote/origin/master", old, tip),)


def test_diverged_pull_keeps_what_came_and_says_so(pair: Pair) -> None:
    dot, base, ours, theirs = diverged(pair)
    with pytest.raises(Diverged) as caught:
        pair.pull(dot)
    assert caught.value.facts["base"] == base.hex()
    assert pair.local.tip(dot) == ours
    assert pair.local.ref(dot, "remote/origin/master") == theirs
    summary = pair.pull(dot, move="stash")
    assert pair.local.tip(dot) == theirs
    assert summary.refs[0].stash is not None
    assert pair.local.ref(dot, summary.refs[0].stash) == ours


def test_forced_pull_replaces_the_local_line(pair: Pair) -> None:
    dot, _, _, theirs = diverged(pair)
    summary = pair.pull(dot, move="force")
    assert summary.refs[0].status is RefStatus.FORCED
    assert pair.local.tip(dot) == theirs


@pytest.mark.parametrize("move", ["ff", "stash"])
def test_pull_into_a_branch_that_is_ahead_does_nothing(pair: Pair, move: str) -> None:
    dot = pushed(pair)
    ours = pair.local.commit(dot, {"a": b"ours"})
    before = seqs(pair)
    summary = pair.pull(dot, move=move)
    assert summary.nothing_to_do and summary.refs[0].status is RefStatus.AHEAD
    assert pair.local.tip(dot) == ours and seqs(pair) == before


def test_pull_over_uncommitted_changes_is_refused_and_stash_keeps_them(pair: Pair) -> None:
    dot = pushed(pair)
    old = pair.local.tip(dot)
    tip = pair.remote.commit(dot, {"a": b"2"})

    def dirty(store: Any, which: DotId, branch: str) -> None:
        raise WouldLose("uncommitted changes on volume where data would be written")

    def save(store: FakeStore, which: DotId, branch: str) -> ObjectId:
        return store.commit(which, {"a": b"dirty"}, branch="tmp", parents=(old,))  # type: ignore[arg-type]

    pair.local_tree = TargetTree(dirty, save)
    with pytest.raises(WouldLose):
        pair.pull(dot)
    assert pair.local.tip(dot) == old
    summary = pair.pull(dot, move="stash")
    assert summary.refs[0].stash is not None and pair.local.tip(dot) == tip
    kept = pair.local.ref(dot, summary.refs[0].stash)
    assert pair.local.files(dot, kept) == {"a": b"dirty"}


def test_pull_of_an_unknown_branch(pair: Pair) -> None:
    dot = pushed(pair)
    with pytest.raises(RevisionNotFound) as caught:
        pair.pull(dot, branches=("nope",))
    assert "master" in caught.value.hint


def test_large_clone_is_acknowledged_and_complete(pair: Pair) -> None:
    dot = pair.remote.create_dot()
    tip = pair.remote.commit(dot, {"a": noise(20_000_000)})
    summary = pair.clone()
    assert summary.round_trips == 3
    assert pair.local.files(dot, tip) == pair.remote.files(dot, tip)


def test_diverged_histories_are_negotiated_exactly(pair: Pair) -> None:
    dot = pair.local.create_dot()
    for number in range(40):
        pair.local.commit(dot, {"a": str(number).encode()})
    pair.push(dot)
    for number in range(60):
        pair.local.commit(dot, {"a": f"ours {number}".encode()})
        pair.remote.commit(dot, {"a": f"theirs {number}".encode()})
    summary = pair.push(dot, mode="stash")
    assert summary.commits_sent == 60
    assert summary.round_trips <= 6


def test_list_of_remote_dots_shows_what_may_be_read(pair: Pair) -> None:
    pair.remote.create_dot("a")
    pair.remote.create_dot("b", "bob")
    pair.access = Everything("eve", "eve", lambda namespace, name, verb: namespace == "bob")
    outcome = pair.run(lambda stream: list_remote_dots(pair.local, stream))
    assert [(d.namespace, d.name) for d in outcome.result] == [("bob", "b")]


def test_two_users_same_named_dots(pair: Pair, tmp_path: Path) -> None:
    for user in ("alice", "bob"):
        dot = pair.remote.create_dot("apples", user)
        pair.remote.commit(dot, {"who": user.encode()})
        summary = pair.clone(remote_namespace=user, local_name=f"{user}-apples")
        assert pair.local.files(dot, pair.local.tip(dot)) == {"who": user.encode()}
        assert summary.name == f"{user}-apples"
    assert os.listdir(tmp_path)
