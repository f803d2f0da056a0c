"""Users x dots x verbs: every cell of tools/faults/access_cells.py, and that nothing leaks.

In this process, with the rules that the SSH server reads from a real line of its key file. The
same cells over real connections are the scorecard's row `access`; a sample of them is here.
"""

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dmsync.core.ids import DotId, Kind, short_key
from dmsync.engine.access import Access, access_for
from dmsync.engine.session import Session
from dmsync.engine.sync_opening import hello
from dmsync.engine.sync_server import serve
from dmsync.engine.target_tree import TARGET_TREE
from dmsync.errors import AccessDenied, DmError, ObjectMissing
from dmsync.storage.catalog_queries import CatalogQueries
from dmsync.transports.authorized_keys import BadKeyLine, parse_line
from dmsync.wire.connection import Role
from dmsync.wire.messages import (
    Fetch,
    Hello,
    Intent,
    KnownQuery,
    Message,
    Plan,
    PlanReply,
    Push,
    Ready,
    RefMode,
    Refs,
    RefUpdate,
    Share,
    ShareAction,
    Update,
)
from tests.support.keys import make_key
from tests.support.streams import Line
from tools.faults.access import run as run_row
from tools.faults.access_cells import NOWHERE, OWNER, USERS, Cell, Dot, User, cells
from tools.faults.access_client import Attempt, make_commit
from tools.faults.access_scene import Scene, try_cell
from tools.faults.row import Budget

OWNER_NAME = "keeper"
FINGERPRINT = "SHA256:test"


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    made = Scene(str(tmp_path / "store"))
    yield made
    made.close()


class Rules:
    """What a server makes of a login: the decisions of its key file, without the connection."""

    def __init__(self, directory: Path, scene: Scene) -> None:
        self.public = make_key(directory / "key").public
        self.scene = scene

    def access(self, user: User) -> Access:
        """Raises AccessDenied: no login."""
        login = OWNER_NAME if user.login == OWNER else user.login
        try:
            entry = parse_line(f"{user.options} {self.public}".strip())
        except BadKeyLine:
            raise AccessDenied("denied line") from None
        if user.options is None or not entry.admits(login, "127.0.0.1") or "/" in login:
            raise AccessDenied("no login")
        access = access_for(
            login,
            entry.role,
            entry.dots,
            owner=OWNER_NAME,
            is_collaborator=self.scene.store.catalog.is_collaborator,
        )
        return replace(access, fingerprint=FINGERPRINT)


@pytest.fixture
def rules(tmp_path: Path, scene: Scene) -> Rules:
    return Rules(tmp_path, scene)


Server = Callable[[], Coroutine[Any, Any, None]]


def served(scene: Scene, access: Access, line: Line) -> Server:
    async def server() -> None:
        try:
            await serve(scene.store, line.server, access, TARGET_TREE)
        except DmError:
            pass  # the client was told

    return server


@pytest.mark.parametrize("user", USERS, ids=lambda user: user.name)
def test_every_cell(user: User, scene: Scene, rules: Rules) -> None:
    of_user = [cell for cell in cells() if cell.user is user and cell.verb not in NOWHERE]
    assert len(of_user) == 16 * len(Dot)

    async def run() -> list[str]:
        servers: set[asyncio.Task[None]] = set()

        async def connect(cell: Cell) -> Any:
            line = Line()
            access = rules.access(cell.user)
            servers.add(asyncio.create_task(served(scene, access, line)()))
            return line.client

        wrong = []
        for cell in of_user:
            what = await try_cell(scene, cell, connect)
            if servers:
                await asyncio.wait(servers)
            if what:
                wrong.append(f"{cell}: {what}")
        return wrong

    wrong = asyncio.run(run())
    assert wrong == [], "\n".join(wrong)


def test_changes_name_user_and_key_in_the_log(scene: Scene, rules: Rules) -> None:
    alice = next(user for user in USERS if user.name == "namespace user")
    place = scene.places[Dot.OWN]
    asyncio.run(_attempt(scene, rules.access(alice), Dot.OWN, "push"))
    row = scene.store.catalog.operations(1)[0]
    assert (row.actor, row.command) == (f"alice {FINGERPRINT}", "receive-push")
    changes = scene.store.catalog.reflog(place.id, "branch/master", count=1)
    assert FINGERPRINT in (changes[0].reason or "")


async def _attempt(scene: Scene, access: Access, dot: Dot, verb: str) -> bytes:
    line = Line()
    task = asyncio.create_task(served(scene, access, line)())
    place = scene.places[dot]
    attempt = Attempt(
        scene.store,
        line.client,
        place,
        scene.target(place, "branch/master"),
        scene.target(place, "tag/known"),
    )
    try:
        return await attempt.run(verb)
    finally:
        await task


# --- what does not leak -----------------------------------------------------------------------------


def asks(namespace: str, name: str, dot: DotId, commit: Any) -> list[list[Message]]:
    """Sessions in which somebody names a dot; each list is sent at once."""
    refs = [Refs(None, namespace, name, intent) for intent in Intent]
    questions: list[list[Message]] = [[one, KnownQuery((commit,))] for one in refs]
    by_id = Refs(dot, namespace, name, Intent.PUSH)
    transfer = bytes(16)
    update = (RefUpdate("branch/master", RefMode.FF, None, commit),)
    push = Push(transfer, transfer, dot, namespace, name, False, True, update, ())
    create = replace(push, create=True)
    return [
        *questions,
        [refs[0], Fetch(transfer, dot, (commit,), ())],
        [refs[0], push],
        [refs[0], create],
        [refs[0], Share(ShareAction.LIST)],
        [refs[0], Share(ShareAction.ADD, "zoe")],
        [by_id],
    ]


async def _said(scene: Scene, access: Access, messages: list[Message]) -> bytes:
    """Every byte that the server sends in answer."""
    line = Line(record=True)
    task = asyncio.create_task(served(scene, access, line)())
    with pytest.raises(DmError) if isinstance(messages[-1], (Fetch, Push, Share)) else _nothing():
        async with Session(line.client, Role.CLIENT) as session:
            await session.send(hello(scene.store), *messages)
            await session.expect(Hello)
            for _ in messages:
                await session.receive()
    await task
    return bytes(line.down.written or b"")


class _nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


@pytest.mark.parametrize("name", ["stranger", "foreign patterns", "own patterns"])
def test_absent_and_forbidden_dots_are_answered_with_the_same_bytes(
    name: str, scene: Scene, rules: Rules
) -> None:
    """`bob/his` is there and `bob/not` is not; neither may the user read."""
    user = next(user for user in USERS if user.name == name)
    access, commit = rules.access(user), scene.target(scene.places[Dot.FOREIGN], "branch/master")
    there = asks("bob", "his", DotId(bytes(16)), commit)
    absent = asks("bob", "not", DotId(bytes(16)), commit)
    for with_dot, without in zip(there, absent, strict=True):
        forbidden = asyncio.run(_said(scene, access, with_dot))
        nothing = asyncio.run(_said(scene, access, without))
        assert forbidden.replace(b"his", b"not") == nothing, with_dot


def test_a_readable_dot_does_not_tell_whether_a_forbidden_name_is_taken(
    scene: Scene, rules: Rules
) -> None:
    """Asked by the id of a dot of one's own and a name of somebody else's: a clash either way."""
    user = next(user for user in USERS if user.name == "namespace user")
    own = scene.places[Dot.OWN].id
    said = []
    for name in ("his", "not"):
        ask: list[Message] = [Refs(own, "bob", name, Intent.PUSH)]
        with pytest.raises(DmError) as caught:
            asyncio.run(_said(scene, rules.access(user), ask))
        said.append((caught.value.code, caught.value.message.replace("his", "not")))
    assert said[0] == said[1]


def test_absent_and_forbidden_dots_cost_the_same(
    scene: Scene, rules: Rules, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many queries of the catalog; time is compared over real connections (row `access`)."""
    access = rules.access(next(user for user in USERS if user.name == "stranger"))
    queries: list[str] = []
    real = CatalogQueries._row

    def counted(self: Any, sql: str, *parameters: object) -> Any:
        queries.append(sql)
        return real(self, sql, *parameters)

    monkeypatch.setattr(CatalogQueries, "_row", counted)
    seen = []
    for name in ("his", "not"):
        queries.clear()
        asyncio.run(_said(scene, access, [Refs(None, "bob", name, Intent.LIST)]))
        seen.append(list(queries))
    assert seen[0] == seen[1] and len(seen[0]) > 2


def test_who_writes_one_dot_gets_nothing_of_another(scene: Scene, rules: Rules) -> None:
    """Bob names objects of alice's dot in a push to his own: none counts as there, and a commit
    over her root is refused as one whose objects never came."""
    bob = rules.access(next(user for user in USERS if user.name == "collaborator"))
    hers, his = scene.places[Dot.OWN], scene.places[Dot.FOREIGN]
    tip = scene.target(hers, "branch/master")
    keys = b"".join(map(short_key, (tip, hers.root.tree)))  # type: ignore[arg-type]
    parent = scene.target(his, "branch/master")
    new = make_commit(hers.root, (parent,))

    async def inventory() -> bytes:
        line = Line()
        task = asyncio.create_task(served(scene, bob, line)())
        push = _push(his, tip, scene.target(his, "branch/master"))
        plan = Plan(0, bytes((Kind.COMMIT, Kind.PAGE)), keys, 2, 100)
        try:
            async with Session(line.client, Role.CLIENT) as session:
                named = Refs(None, "bob", "his", Intent.PUSH)
                await session.send(hello(scene.store), named, push, plan)
                await session.expect(Hello)
                await session.receive()
                await session.expect(Ready)
                return (await session.expect(PlanReply)).bitmap
        finally:
            await task

    assert asyncio.run(inventory()) == b"\0"
    before = scene.store.catalog.last_seq()
    with pytest.raises(ObjectMissing):
        asyncio.run(_send_commit(scene, bob, his, new))
    done = scene.store.catalog.operations(None)
    kept = [row for row in done if row.first_seq > before]
    assert {row.command for row in kept} <= {"receive-push"}, "nothing but that it failed"
    assert scene.target(his, "branch/master") == parent


def _push(place: Any, new: Any, *frontier: Any) -> Push:
    update = (RefUpdate("branch/master", RefMode.FF, None, new),)
    return Push(
        bytes(16), bytes(16), place.id, place.namespace, place.name, False, True, update, frontier
    )


async def _send_commit(scene: Scene, access: Access, place: Any, commit: bytes) -> None:
    from dmsync.core.ids import object_id
    from dmsync.core.records import Encoding, Record, encode_record
    from dmsync.wire.messages import Records, Result

    new = object_id(Kind.COMMIT, commit)
    record = encode_record(Record(Kind.COMMIT, Encoding.RAW, len(commit), commit))
    line = Line()
    task = asyncio.create_task(served(scene, access, line)())
    try:
        async with Session(line.client, Role.CLIENT) as session:
            await session.send(
                hello(scene.store),
                Refs(None, place.namespace, place.name, Intent.PUSH),
                _push(place, new, scene.target(place, "branch/master")),
                Plan(0, bytes((Kind.COMMIT,)), short_key(new), 1, len(commit), eager=True),
                Records(record),
                Update(bytes(16), 1),
            )
            await session.expect(Hello)
            await session.receive()
            await session.expect(Ready)
            await session.expect(Result)
    finally:
        await task


def test_access_that_ends_during_a_push_ends_the_push(scene: Scene, rules: Rules) -> None:
    from dmsync.core.events import CollaboratorRemoved

    bob = rules.access(next(user for user in USERS if user.name == "collaborator"))
    shared = scene.places[Dot.SHARED]
    tip = scene.target(shared, "branch/master")

    async def push() -> None:
        line = Line()
        task = asyncio.create_task(served(scene, bob, line)())
        update = (RefUpdate("branch/late", RefMode.CREATE, None, tip),)
        ask = replace(_push(shared, tip), updates=update)
        try:
            async with Session(line.client, Role.CLIENT) as session:
                named = Refs(None, "alice", "shared", Intent.PUSH)
                await session.send(hello(scene.store), named, ask)
                await session.expect(Hello)
                await session.receive()
                await session.expect(Ready)
                with scene.store.transaction("scene") as tx:
                    tx.append(CollaboratorRemoved(shared.id, "bob"))
                await session.send(Plan(0, b"", b"", 0, 0, eager=True), Update(bytes(16), 0))
                await session.receive()
        finally:
            await task

    with pytest.raises(DmError) as caught:
        asyncio.run(push())
    assert caught.value.code == "no-dot"
    assert scene.store.catalog.ref(shared.id, "branch/late") is None


def test_a_sample_over_real_connections(tmp_path: Path) -> None:
    """Every tenth cell, through the installed server; the scorecard's row has them all."""
    (row, *_) = run_row(Budget(str(tmp_path), 1, 200))
    assert row.failures == [] and row.tried >= 200


def test_retention_never_counts_what_commits_say_of_themselves(scene: Scene) -> None:
    """1,000 commits with dates of their author's choice expire none of the good ones."""
    from dmsync.core.ids import object_id
    from dmsync.core.objects import ROOT_ENTRY, Commit
    from dmsync.core.retention import Learnt, RetentionPolicy, judge

    day_ns = 86_400 * 10**9
    good = [
        Learnt(object_id(Kind.COMMIT, b"%d" % day), day * day_ns + day_ns // 2, day)
        for day in range(1, 31)
    ]
    dates = [0, 1, 2**62, -(2**62)]
    junk = []
    for number in range(1000):
        commit = Commit(ROOT_ENTRY, (), "x", "x", dates[number % 4], 0, str(number))
        learnt_ns = 31 * day_ns + number
        junk.append(Learnt(object_id(Kind.COMMIT, commit.to_bytes()), learnt_ns, 31 + number))
    policy = RetentionPolicy(daily=31, within_ns=31 * day_ns)
    kept = {verdict.commit.id for verdict in judge([*good, *junk], policy) if verdict.reasons}
    assert {commit.id for commit in good} <= kept
