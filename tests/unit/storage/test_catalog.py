import os
import sqlite3

import pytest

from dmsync.core import events as ev
from dmsync.core.ids import DotId
from dmsync.errors import (
    AlreadyExists,
    Busy,
    Corruption,
    ObjectMissing,
    RefConflict,
    StorageFull,
)
from dmsync.storage import schema
from dmsync.storage.event_log import EventLog
from dmsync.storage.locks import FileLock
from tests.support.event_histories import (
    CLUSTER,
    CommitShelf,
    RandomHistory,
    drop_catalog,
    make_store,
    open_catalog,
)

DOT = DotId(b"d" * 16)


@pytest.fixture
def shelf():
    return CommitShelf()


@pytest.fixture
def home(tmp_path):
    make_store(tmp_path / "s")
    return tmp_path / "s"


@pytest.fixture
def catalog(home, shelf):
    with open_catalog(home, shelf) as opened:
        yield opened


def create_dot(catalog, dot=DOT, name="shop"):
    with catalog.transaction("init", "me") as tx:
        tx.append(ev.DotCreated(dot, "ns", name, "me"))


def commit(catalog, shelf, parents=(), branch="master", message="m", dot=DOT):
    oid = shelf.put(dot, tuple(parents), message)
    with catalog.transaction("commit", "me") as tx:
        current = catalog.branch(dot, branch)
        tx.append(ev.CommitsAdded(dot, (oid,), None, ("managed", "best-effort", 3)))
        tx.append(
            ev.RefChanged(dot, f"branch/{branch}", current and current.target, oid, "commit", "msg")
        )
    return oid


def test_new_store_has_an_identity_and_nothing_else(catalog):
    assert (catalog.cluster_id(), catalog.epoch(), catalog.last_seq()) == (CLUSTER, 7, 1)
    assert catalog.dots() == [] and catalog.current_dot() is None and catalog.remotes() == []


def test_commit_moves_branch_and_is_found_every_way(catalog, shelf):
    create_dot(catalog)
    first = commit(catalog, shelf)
    second = commit(catalog, shelf, [first], message="2")
    assert catalog.branch(DOT, "master").target == second
    assert catalog.parents(DOT, second) == (first,)
    assert catalog.has_commit(DOT, first) and not catalog.has_commit(DOT, b"\1" * 32)
    assert catalog.commits_with_prefix(DOT, second.hex()[:7]) == [second]
    row = catalog.commit(DOT, second)
    assert row.generation == 2 and row.capture == ("managed", "best-effort", 3)
    assert row.payload == shelf.payloads[DOT, second]
    assert [(line.old, line.new) for line in catalog.reflog(DOT, "branch/master")] == [
        (first, second),
        (None, first),
    ]
    assert catalog.reflog(DOT, "branch/master")[0].command == "commit"


def test_exception_in_transaction_changes_nothing(catalog, home, shelf):
    create_dot(catalog)
    before = (catalog.digest(), list(EventLog(str(home / "events")).read()))
    with pytest.raises(ZeroDivisionError):
        with catalog.transaction("x", "me") as tx:
            tx.append(ev.DotRenamed(DOT, "ns", "other"))
            assert catalog.dot_by_name("ns", "other") is not None
            raise ZeroDivisionError
    assert (catalog.digest(), list(EventLog(str(home / "events")).read())) == before


def test_ref_change_with_wrong_old_value_is_refused(catalog, shelf):
    create_dot(catalog)
    first = commit(catalog, shelf)
    with pytest.raises(RefConflict) as caught:
        with catalog.transaction("x", "me") as tx:
            tx.append(ev.RefChanged(DOT, "branch/master", None, first, "create"))
    assert caught.value.facts["actual"] == first.hex()


def test_refused_event_leaves_the_earlier_ones_of_its_operation(catalog, shelf):
    create_dot(catalog)
    with catalog.transaction("x", "me") as tx:
        tx.append(ev.RemoteAdded("r", "ssh://h"))
        with pytest.raises(ObjectMissing):
            tx.append(ev.CommitsAdded(DOT, (shelf.put(DOT), shelf.put(DOT, (b"\1" * 32,)))))
        with pytest.raises(AlreadyExists):
            tx.append(ev.RemoteAdded("r", "ssh://h"))
    assert catalog.remote("r") is not None and catalog.commit_count(DOT) == 0


def test_ref_may_not_name_a_commit_that_is_not_here(catalog):
    create_dot(catalog)
    with pytest.raises(ObjectMissing):
        with catalog.transaction("x", "me") as tx:
            tx.append(ev.RefChanged(DOT, "branch/master", None, b"\1" * 32, "create"))


def test_retried_operation_is_applied_once(catalog):
    create_dot(catalog)
    for attempt in range(2):
        with catalog.transaction("x", "me", b"o" * 16) as tx:
            assert (tx.already_applied is not None) == bool(attempt)
            tx.append(ev.RemoteAdded("r", "ssh://h"))
    assert catalog.operation_result(b"o" * 16).last_seq == catalog.last_seq() == 3
    assert catalog.events_of(catalog.operations(1)[0]).events == (ev.RemoteAdded("r", "ssh://h"),)


@pytest.mark.parametrize("seed", range(12))
def test_dropped_projection_is_rebuilt_with_equal_rows(tmp_path, seed):
    shelf = CommitShelf()
    home = tmp_path / "s"
    make_store(home)
    with open_catalog(home, shelf) as live:
        history = RandomHistory(live, shelf, seed)
        for _ in range(200):
            history.step()
        digest = live.digest()
        assert live.last_seq() > 20 and history.refused > 5
        # What is gone for good must not be asked for in a replay.
        here = {row.dot for row in live.dots(include_deleted=True)}
        shelf.payloads = {k: v for k, v in shelf.payloads.items() if k[0] in here}
    drop_catalog(home)
    with open_catalog(home, shelf) as rebuilt:
        assert rebuilt.digest() == digest
        assert rebuilt.rebuilt_because is not None


def test_projection_that_is_behind_catches_up(home, shelf):
    with open_catalog(home, shelf) as catalog:
        create_dot(catalog)
        saved = {}
        catalog.close()
        saved = (home / "catalog.sqlite").read_bytes()
    with open_catalog(home, shelf) as catalog:
        commit(catalog, shelf)
        digest = catalog.digest()
    (home / "catalog.sqlite").write_bytes(saved)
    with open_catalog(home, shelf) as catalog:
        assert catalog.digest() == digest and catalog.rebuilt_because is None


def test_reader_does_not_wait_for_a_writer(home, shelf, catalog):
    create_dot(catalog)
    with FileLock(str(home / "events" / "lock"), what="log"):
        with open_catalog(home, shelf, lock_wait_s=0.05) as other:
            assert other.dot_by_name("ns", "shop") is not None
            with pytest.raises(Busy):
                with other.transaction("x", "me"):
                    pass


@pytest.mark.parametrize("damage", ["zeros", "text", "empty", "cut", "middle"])
def test_damaged_projection_is_rebuilt(home, shelf, damage):
    with open_catalog(home, shelf) as catalog:
        create_dot(catalog)
        parent = ()
        for n in range(60):
            parent = (commit(catalog, shelf, parent, message=str(n)),)
        digest = catalog.digest()
    path = home / "catalog.sqlite"
    whole = path.read_bytes()
    path.write_bytes(
        {
            "zeros": bytes(len(whole)),
            "text": b"not a database" * 100,
            "empty": b"",
            "cut": whole[: len(whole) // 2],
            "middle": whole[:4096] + b"\xff" * (len(whole) - 4096),
        }[damage]
    )
    with open_catalog(home, shelf) as catalog:
        assert catalog.branch(DOT, "master").target == parent[0]
        assert len(catalog.operations()) == 62
        assert catalog.digest() == digest and catalog.rebuilt_because


def test_log_that_lost_its_end_starts_a_new_epoch(home, shelf):
    with open_catalog(home, shelf) as catalog:
        create_dot(catalog)
        epoch = catalog.epoch()
        log_file = home / "events" / "00000001.log"
        saved = log_file.read_bytes()
        commit(catalog, shelf)
    log_file.write_bytes(saved)
    with open_catalog(home, shelf) as catalog:
        assert catalog.branch(DOT, "master") is None
        assert catalog.epoch() != epoch and catalog.rebuilt_because


def test_what_the_log_lost_is_noted_until_somebody_removes_the_note(home, shelf):
    log, log_file = EventLog(str(home / "events")), home / "events" / "00000001.log"
    sizes = []
    with open_catalog(home, shelf, clock_ns=lambda: 10**18) as catalog:
        create_dot(catalog)
        sizes.append(log_file.stat().st_size)
        commit(catalog, shelf)
        commit(catalog, shelf, branch="other", message="2")
    os.truncate(log_file, sizes[0])
    with open_catalog(home, shelf) as catalog:
        catalog.rebuild()
    (note,) = log.lost_end()
    assert "2 operations since 2001-09-09 01:46:40 UTC, up to event 6" in note
    os.truncate(log_file, log_file.stat().st_size - 5)
    open_catalog(home, shelf).close()
    first, second = log.lost_end()
    assert first == note and "1 operation since" in second


def test_queries_go_on_beside_a_file_that_cannot_be_opened(home, shelf, monkeypatch):
    """Frozen as it lies there while it is all there is; written by others, it is opened anew."""
    with open_catalog(home, shelf) as catalog:
        create_dot(catalog)
    refused = sqlite3.OperationalError("disk I/O error")
    refused.sqlite_errorcode = sqlite3.SQLITE_IOERR_SHMSIZE

    def refuse(path, *, read_only):
        raise refused

    reader = open_catalog(home, shelf)
    with monkeypatch.context() as full_disk:
        full_disk.setattr(schema, "connect", refuse)
        reader.close()
        reader = open_catalog(home, shelf)
        assert [dot.name for dot in reader.dots()] == ["shop"]
        with pytest.raises(StorageFull), reader.transaction("init", "me"):
            pass
    with open_catalog(home, shelf) as writer:
        create_dot(writer, DotId(b"e" * 16), "second")
        assert [dot.name for dot in reader.dots()] == ["second", "shop"]
        with reader.transaction("rename", "me") as tx:
            tx.append(ev.DotRenamed(DOT, "ns", "first"))
        assert [dot.name for dot in reader.dots()] == ["first", "second"]
    reader.close()


def test_replay_notes_lost_commits_and_goes_on(home, shelf):
    with open_catalog(home, shelf) as catalog:
        create_dot(catalog)
        first = commit(catalog, shelf)
        second = commit(catalog, shelf, [first], message="2")
    payload = shelf.payloads.pop((DOT, first))
    drop_catalog(home)
    with open_catalog(home, shelf) as catalog:
        assert catalog.missing_commits(DOT) == [first]
        assert catalog.graph(DOT).parents(second) == ()  # what follows a lost one is not lost
        assert catalog.branch(DOT, "master").target == second
        shelf.payloads[DOT, first] = payload
        catalog.rebuild()
        assert catalog.missing_commits(DOT) == [] and catalog.has_commit(DOT, first)
        assert catalog.graph(DOT).parents(second) == (first,)


def test_open_catalog_follows_a_rebuild_by_another(home, shelf, catalog):
    create_dot(catalog)
    with open_catalog(home, shelf) as other:
        other.rebuild()
        create_dot(other, DotId(b"e" * 16), "second")
    assert [row.name for row in catalog.dots()] == ["second", "shop"]


def test_threads_share_a_catalog(catalog):
    import threading

    def work(tag):
        for n in range(25):
            with catalog.transaction("t", "me") as tx:
                tx.append(ev.RemoteAdded(f"{tag}{n}", "ssh://h"))
            assert catalog.remote(f"{tag}{n}") is not None

    threads = [threading.Thread(target=work, args=(tag,)) for tag in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(catalog.remotes()) == 100 and catalog.last_seq() == 101


def test_catalog_graph_has_parents_in_order_and_jumps(catalog, shelf):
    from dmsync.core.graph import ancestors_difference, nth_first_parent

    create_dot(catalog)
    side = shelf.put(DOT, (), "side")
    chain = [shelf.put(DOT, (), "root")]
    for n in range(300):
        chain.append(shelf.put(DOT, (chain[-1], side) if n == 150 else (chain[-1],), str(n)))
    with catalog.transaction("push", "me") as tx:
        tx.append(ev.CommitsAdded(DOT, (side, *chain)))
    graph = catalog.graph(DOT)
    assert graph.parents(chain[151]) == (chain[150], side)
    assert nth_first_parent(graph, chain[-1], 299) == chain[1]
    assert set(ancestors_difference(graph, [chain[-1]], [chain[100]])) == {side, *chain[101:]}


def test_clock_jumps_do_not_matter(home, shelf):
    times = iter([5 * 10**18, -(10**18), 0, 10**18])
    with open_catalog(home, shelf, clock_ns=lambda: next(times)) as catalog:
        create_dot(catalog)
        first = commit(catalog, shelf)
        second = commit(catalog, shelf, [first], message="2")
        assert [line.new for line in catalog.reflog(DOT, "branch/master")] == [second, first]


def test_delta_cache_is_kept_and_lost_without_harm(catalog, home, shelf):
    create_dot(catalog)
    first = commit(catalog, shelf)
    assert catalog.commit_delta(DOT, first) is None
    assert catalog.store_commit_delta(DOT, first, b"delta")
    assert catalog.commit_delta(DOT, first) == b"delta"
    with FileLock(str(home / "events" / "lock"), what="log"):
        assert not catalog.store_commit_delta(DOT, first, b"other")
    catalog.rebuild()
    assert catalog.commit_delta(DOT, first) is None


def test_a_catalog_that_cannot_be_read_again_and_again_is_named(catalog, monkeypatch):
    """Built anew, and damaged once more when it is written: a disk that fails for good."""
    real = catalog._connect

    def connect(*, read_only, **wishes):
        if not read_only:
            monkeypatch.setattr(
                schema, "names_are_sound", lambda _: (_ for _ in ()).throw(_malformed())
            )
        return real(read_only=read_only, **wishes)

    monkeypatch.setattr(catalog, "_connect", connect)
    with pytest.raises(Corruption) as met:
        create_dot(catalog)
    assert met.value.message.startswith("catalog.sqlite cannot be used: it is damaged")


def _malformed():
    error = sqlite3.DatabaseError("database disk image is malformed")
    error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
    return error
