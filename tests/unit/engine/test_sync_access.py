"""What a server asks before it does anything: of a dot named by its id alone, of refs that are not
a client's to name, of dots that are deleted before or during a session."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dmsync.core.events import CollaboratorAdded, DotDeleted, QuotaSet
from dmsync.core.ids import DotId
from dmsync.engine import sync_push, sync_server
from dmsync.engine.access import Access, Role, access_for
from dmsync.engine.ports import TargetTree
from dmsync.engine.quotas import used_bytes
from dmsync.engine.session import Session
from dmsync.errors import AccessDenied, DotNotFound, NetworkError, ProtocolError, QuotaExceeded
from dmsync.wire.limits import WORK_BYTES_PER_S, WORK_TIMEOUT_S
from dmsync.wire.messages import (
    Fetch,
    Intent,
    Known,
    KnownQuery,
    KnownReply,
    Plan,
    Push,
    Ready,
    Records,
    RefMode,
    Refs,
    RefsReply,
    RefUpdate,
    Result,
    Update,
)
from tests.support.sync_stores import Pair, noise
from tests.unit.engine.test_hostile_peers import TRANSFER, as_client, commit_of, plan_of


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    monkeypatch.setattr("dmsync.engine.session.DRAIN_S", 0.1)
    made = Pair(str(tmp_path))
    made.access = access_of(made, "alice")
    yield made
    made.close()


def access_of(pair: Pair, user: str, role: Role = Role.WRITE) -> Any:
    shared = pair.remote.catalog.is_collaborator
    return access_for(user, role, None, owner="keeper", is_collaborator=shared)


def pushed_dot(pair: Pair) -> DotId:
    dot = pair.local.create_dot()
    pair.local.commit(dot, {"a": noise(50_000)})
    pair.push(dot, remote_namespace="alice")
    return dot


def delete_there(pair: Pair, dot: DotId) -> None:
    pair.remote.append(DotDeleted(dot, f"{dot.hex()}-1"))


@pytest.mark.parametrize("namespace", ["zzz", None])
@pytest.mark.parametrize("user", ["alice", "bob"])
def test_the_quota_of_a_dot_named_by_its_id_is_that_of_its_own_namespace(
    pair: Pair, user: str, namespace: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    dot = pushed_dot(pair)
    bytes_max = used_bytes(pair.remote, "alice") + 20_000
    pair.remote.append(QuotaSet("alice", bytes_max), CollaboratorAdded(dot, "bob"))
    pair.access = access_of(pair, user, Role.APPEND)
    pair.local.commit(dot, {"a": noise(50_000), "b": noise(300_000, 5)})
    monkeypatch.setattr(
        sync_push, "Refs", lambda dot, _, name, *rest: Refs(dot, namespace, None, *rest)
    )
    assert isinstance(pair.try_push(dot).error, QuotaExceeded)
    assert used_bytes(pair.remote, "alice") <= bytes_max


@pytest.mark.parametrize("ref", ["remote/vault/master", "remote/vault/tag/v1", "stash/x"])
def test_only_branches_and_tags_are_a_client_s_to_name(pair: Pair, ref: str) -> None:
    dot = pushed_dot(pair)
    tip = pair.local.tip(dot)
    assert tip is not None

    async def talk(session: Session) -> Any:
        await session.send(Refs(dot, "alice", "apples", Intent.PUSH))
        await session.expect(RefsReply)
        update = RefUpdate(ref, RefMode.FF, None, tip)
        await session.send(
            Push(TRANSFER, os.urandom(16), dot, "alice", "apples", False, True, (update,), ())
        )
        await session.expect(Ready)
        await session.send(Plan(0, b"", b"", 0, 0, eager=True), Update(TRANSFER, 0))
        return await session.receive()

    with pytest.raises(ProtocolError, match="neither a branch nor a tag"):
        as_client(pair, talk)
    assert pair.remote.ref(dot, ref) is None


def reviving(pair: Pair) -> list[str]:
    """From now on deleted dots come back on the server; the actors that had one come back."""
    actors: list[str] = []

    def revive(store: Any, dot: DotId, namespace: str, name: str, actor: str) -> None:
        from dmsync.core.events import DotRestored, RefChanged

        store.append(
            DotRestored(dot, namespace, name),
            *(
                RefChanged(dot, ref.name, ref.target, None, "delete")
                for ref in store.catalog.refs(dot)
            ),
        )
        actors.append(actor)

    pair.server_tree = TargetTree(revive=revive)
    return actors


def test_a_push_that_does_not_fit_leaves_a_deleted_dot_deleted(pair: Pair) -> None:
    dot = pushed_dot(pair)
    delete_there(pair, dot)
    actors = reviving(pair)
    other = pair.local.create_dot("pears")
    pair.local.commit(other, {"a": noise(50_000, 3)})
    pair.push(other, remote_namespace="alice", remote_name="pears")
    pair.remote.append(QuotaSet("alice", 1000))
    assert isinstance(pair.try_push(dot, remote_namespace="alice").error, QuotaExceeded)
    row = pair.remote.catalog.dot(dot)
    assert row is not None and row.trash is not None and actors == []
    pair.remote.append(QuotaSet("alice", None))
    pair.push(dot, remote_namespace="alice")
    assert actors == ["alice"]


def test_a_deleted_dot_comes_back_only_if_it_fits_itself(pair: Pair) -> None:
    dot = pushed_dot(pair)
    delete_there(pair, dot)
    actors = reviving(pair)
    packs = Path(pair.remote.layout.trashed_dot_dir(f"{dot.hex()}-1"), "packs")
    packs.mkdir(parents=True)
    (packs / "x.pack").write_bytes(bytes(200_000))
    pair.remote.append(QuotaSet("alice", 150_000))
    assert isinstance(pair.try_push(dot, remote_namespace="alice").error, QuotaExceeded)
    assert actors == []


def test_a_push_that_its_key_may_not_do_leaves_a_deleted_dot_deleted(pair: Pair) -> None:
    dot = pushed_dot(pair)
    delete_there(pair, dot)
    actors = reviving(pair)
    pair.access = access_of(pair, "alice", Role.APPEND)
    outcome = pair.try_push(dot, remote_namespace="alice", mode="stash")
    assert isinstance(outcome.error, AccessDenied) and actors == []


def test_a_dot_that_is_deleted_within_a_session_is_answered_as_one_that_is_absent(
    pair: Pair,
) -> None:
    dot = pushed_dot(pair)
    tip = pair.local.tip(dot)
    assert tip is not None

    async def talk(session: Session) -> tuple[KnownReply, KnownReply]:
        await session.send(Refs(dot, "alice", "apples", Intent.PULL))
        await session.expect(RefsReply)
        await session.send(KnownQuery((tip,)))
        before = await session.expect(KnownReply)
        delete_there(pair, dot)
        await session.send(KnownQuery((tip,)))
        after = await session.expect(KnownReply)
        assert (before.states, after.states) == (bytes([Known.CONTENT]), bytes([Known.ABSENT]))
        await session.send(Fetch(TRANSFER, dot, (tip,), ()))
        await session.receive()
        raise AssertionError("it was sent")

    with pytest.raises(DotNotFound):
        as_client(pair, talk)


@pytest.mark.parametrize("when", ["before", "during"])
def test_nothing_is_pushed_into_a_dot_that_was_deleted_within_the_session(
    pair: Pair, when: str
) -> None:
    dot = pushed_dot(pair)
    tip = pair.local.tip(dot)
    assert tip is not None
    commit = commit_of(tip)

    async def talk(session: Session) -> Any:
        await session.send(Refs(dot, "alice", "apples", Intent.PUSH))
        await session.expect(RefsReply)
        if when == "before":
            delete_there(pair, dot)
        update = RefUpdate("branch/master", RefMode.FF, None, commit[1])
        await session.send(
            Push(TRANSFER, os.urandom(16), dot, "alice", "apples", False, True, (update,), (tip,))
        )
        await session.expect(Ready)
        delete_there(pair, dot)
        await session.send(plan_of([commit[:2]]), Records(commit[2]), Update(TRANSFER, 1))
        return await session.expect(Result)

    with pytest.raises(DotNotFound):
        as_client(pair, talk)
    assert pair.remote.tip(dot) == tip


def test_who_is_not_let_in_any_more_may_nothing(pair: Pair) -> None:
    is_in = True
    access = Access("alice", Role.ADMIN, is_owner=True, is_valid=lambda: is_in)
    assert access.may("alice", "apples", "read")
    is_in = False
    assert not any(access.may("alice", "apples", verb) for verb in ("read", "append", "share"))


def test_a_proof_gets_more_time_for_more_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = time.monotonic()
    monkeypatch.setattr(sync_server.time, "monotonic", lambda: now_s)

    class Present:
        def check_peer(self) -> None: ...

    reception = object.__new__(sync_server._Reception)
    reception._session = Present()  # type: ignore[assignment]
    check = reception._check_worth_while(WORK_BYTES_PER_S * 3600)
    now_s += WORK_TIMEOUT_S + 3599
    check()
    now_s += 2
    with pytest.raises(NetworkError, match="18000 s to prove"):
        check()
