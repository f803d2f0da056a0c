"""Cut lines resume, flipped bytes never succeed silently, strangers get a clear answer."""

import asyncio
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dmsync.core.ids import DotId, Kind, ObjectId
from dmsync.engine.sync_pull import list_remote_dots
from dmsync.engine.sync_push import PushRequest, push
from dmsync.engine.sync_server import serve
from dmsync.errors import (
    BadObject,
    DmError,
    NetworkError,
    NotADmServer,
    ObjectMissing,
    ProtocolError,
)
from dmsync.wire.frames import HEADER, FrameType
from dmsync.wire.limits import INFLIGHT_BYTES_MAX, MAGIC
from tests.support.streams import Line, Script
from tests.support.sync_stores import Everything, Outcome, Pair, noise


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    made = Pair(str(tmp_path))
    yield made
    made.close()


def assert_sound(pair: Pair, dot: DotId) -> None:
    """Whatever a ref names is complete on both sides."""
    for store in (pair.local, pair.remote):
        if store.catalog.dot(dot) is not None:
            for row in store.catalog.refs(dot):
                store.files(dot, row.target)


# --- cuts ------------------------------------------------------------------------------------------


def session_bytes(outcome: Any) -> int:
    return int(outcome.line.up.bytes_written + outcome.line.down.bytes_written)


def run_step(pair: Pair, direction: str, dot: DotId, cut_after: int | None) -> Outcome:
    def line() -> Line:
        return Line(cut_after=cut_after)

    match direction:
        case "push":
            return pair.try_push(dot, line=line)
        case "pull":
            return pair.try_fetch(dot, move="ff", line=line)
        case _:
            return pair.try_clone(line=line)


@pytest.mark.parametrize("direction", ["push", "pull", "clone"])
def test_a_session_cut_anywhere_converges_when_run_again(tmp_path: Path, direction: str) -> None:
    rng = random.Random(direction)
    for attempt in range(12):
        pair = Pair(str(tmp_path / str(attempt)))
        source = pair.local if direction == "push" else pair.remote
        dot = source.create_dot()
        source.commit(dot, {"a": b"base", "d/x": noise(5000)})
        if direction == "pull":
            pair.clone()
        tip = source.commit(dot, {"a": b"more", "d/x": noise(5000), "y": noise(300_000, 1)})
        cut = rng.randrange(310_000) if attempt % 2 else rng.randrange(2_000)
        first = run_step(pair, direction, dot, cut)
        if first.error is not None:
            assert isinstance(first.error, NetworkError | NotADmServer), first.error
        assert_sound(pair, dot)
        pair.reopen()
        again = run_step(pair, direction, dot, None)
        assert again.error is None
        target = pair.remote if direction == "push" else pair.local
        assert target.tip(dot) == tip
        assert target.files(dot, tip) == source.files(dot, tip)
        pair.close()
        shutil.rmtree(tmp_path / str(attempt))


def test_a_cut_costs_only_what_was_in_flight(pair: Pair) -> None:
    dot = pair.local.create_dot()
    tip = pair.local.commit(dot, {"a": noise(40_000_000)})
    first = pair.try_push(dot, line=lambda: Line(cut_after=30_000_000))
    assert isinstance(first.error, NetworkError)
    pair.reopen()
    second = pair.push(dot)
    assert second.resumed_bytes > 30_000_000 - INFLIGHT_BYTES_MAX
    assert second.bytes_sent < 40_000_000 - second.resumed_bytes + 100_000
    assert pair.remote.files(dot, tip) == pair.local.files(dot, tip)
    assert [t.status for t in pair.local.catalog.transfers()].count("failed") == 1


def test_a_cut_clone_resumes(pair: Pair) -> None:
    dot = pair.remote.create_dot()
    tip = pair.remote.commit(dot, {"a": noise(24_000_000)})
    first = pair.try_clone(line=lambda: Line(cut_after=18_000_000))
    assert isinstance(first.error, NetworkError)
    assert pair.local.catalog.dot(dot) is None
    pair.reopen()
    second = pair.clone()
    assert second.resumed_objects > 0
    assert second.bytes_received < 24_000_000
    assert pair.local.files(dot, tip) == pair.remote.files(dot, tip)


# --- flipped bytes -----------------------------------------------------------------------------------


def flipping(position: int, mask: int) -> Callable[[int, bytes], bytes]:
    def change(start: int, data: bytes) -> bytes:
        at = position - start
        if not 0 <= at < len(data):
            return data
        return data[:at] + bytes((data[at] ^ mask,)) + data[at + 1 :]

    return change


@pytest.mark.parametrize("up", [True, False])
@pytest.mark.parametrize("direction", ["push", "clone"])
def test_a_flipped_byte_never_succeeds_silently(
    tmp_path: Path, direction: str, up: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result is a refusal, or exactly what would have happened without the flip."""
    monkeypatch.setattr("dmsync.engine.session.DRAIN_S", 0.05)
    monkeypatch.setattr("dmsync.engine.session.IDLE_TIMEOUT_S", 0.3)
    monkeypatch.setattr("dmsync.engine.session.HANDSHAKE_TIMEOUT_S", 0.3)
    base = Pair(str(tmp_path / "base"))
    source = base.local if direction == "push" else base.remote
    dot = source.create_dot()
    tip = source.commit(dot, {"a": b"one two", "d/b": b"three"})
    base.close()
    rng = random.Random(direction)
    length = 700
    for number, position in enumerate(sorted(rng.sample(range(length), 45))):
        home = tmp_path / str(number)
        shutil.copytree(tmp_path / "base", home)
        pair = Pair(str(home))
        change = flipping(position, 1 << rng.randrange(8))
        line = lambda c=change: Line(**{"change_up" if up else "change_down": c})  # noqa: E731
        outcome = (
            pair.try_push(dot, line=line) if direction == "push" else pair.try_clone(line=line)
        )
        target = pair.remote if direction == "push" else pair.local
        if outcome.error is None and target.catalog.dot(dot) is not None:
            for name in target.branch_names(dot):
                assert target.tip(dot, name) == tip, position
        assert_sound(pair, dot)
        pair.close()
        shutil.rmtree(home)


# --- strangers ---------------------------------------------------------------------------------------


def run_client(script: Script, pair: Pair) -> DmError:
    async def client() -> DmError:
        try:
            await list_remote_dots(pair.local, script)
        except DmError as exc:
            return exc
        raise AssertionError("no error")

    return asyncio.run(client())


def test_a_shell_that_does_not_find_dm_is_named(pair: Pair) -> None:
    error = run_client(Script(b"bash: line 1: dm: command not found\n\x1b[0m"), pair)
    assert isinstance(error, NotADmServer)
    assert "command not found" in error.message and "\x1b" not in error.message
    assert "dm-command" in error.hint


def test_a_peer_that_closes_at_once_is_no_dm_server(pair: Pair) -> None:
    error = run_client(Script(b""), pair)
    assert isinstance(error, NotADmServer) and "dm-command" in error.hint


def test_a_silent_peer_is_given_up(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dmsync.engine.session.HANDSHAKE_TIMEOUT_S", 0.1)
    assert isinstance(run_client(Script(b"", ends=False), pair), NetworkError)


def test_an_oversized_frame_is_refused_at_its_length(pair: Pair) -> None:
    huge = HEADER.pack(2**32 - 1, FrameType.HELLO, 0)
    error = run_client(Script(b"Welcome!\r\n" + MAGIC + huge, ends=False), pair)
    assert isinstance(error, ProtocolError) and "4294967295" in error.message


def test_a_server_survives_garbage(pair: Pair) -> None:
    async def session() -> None:
        await serve(pair.remote, Script(b"GET / HTTP/1.1\r\n\r\n"), Everything())

    with pytest.raises(ProtocolError):
        asyncio.run(session())


# --- hostile content -----------------------------------------------------------------------------------


def run_hostile(
    pair: Pair, dot: DotId, monkeypatch: pytest.MonkeyPatch, forget: Callable[[Any], bool]
) -> DmError | None:
    """Push while leaving out the planned objects that `forget` picks."""
    from dmsync.engine import sync_records

    plan_all = sync_records.Outgoing._list

    def plan_some(self: Any, commit: ObjectId, added: Any) -> None:
        plan_all(self, commit, added)
        self.plan = [planned for planned in self.plan if not forget(planned)]

    monkeypatch.setattr(sync_records.Outgoing, "_list", plan_some)
    return pair.try_push(dot).error


@pytest.mark.parametrize("kind", [Kind.CHUNK, Kind.PAGE, Kind.COMMIT])
def test_a_push_that_leaves_something_out_changes_nothing(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    dot = pair.local.create_dot()
    pair.local.commit(dot, {"a": b"one", "d/b": noise(200_000)})
    error = run_hostile(pair, dot, monkeypatch, lambda planned: planned.kind is kind)
    assert isinstance(error, ObjectMissing | BadObject)
    assert pair.remote.catalog.dot(dot) is None


def test_an_object_of_another_dot_does_not_count(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = noise(50_000)
    theirs = pair.remote.create_dot("secret")
    pair.remote.commit(theirs, {"s": secret})
    dot = pair.local.create_dot()
    pair.local.commit(dot, {"mine": secret})
    error = run_hostile(pair, dot, monkeypatch, lambda planned: planned.kind is Kind.CHUNK)
    assert isinstance(error, ObjectMissing)


def test_records_before_a_plan_are_refused(pair: Pair) -> None:
    from dmsync.engine.session import Session
    from dmsync.engine.sync_opening import hello
    from dmsync.wire.connection import Role
    from dmsync.wire.messages import Intent, Records, Refs

    async def client(stream: Any) -> Any:
        async with Session(stream, Role.CLIENT) as session:
            await session.send(hello(pair.local), Refs(None, None, "x", Intent.PUSH))
            await session.send(Records(b"\0\0\0"))
            while True:
                await session.receive()

    assert isinstance(pair.run(client).error, ProtocolError)


def test_a_failed_large_push_is_recorded_and_a_refused_one_is_not(pair: Pair) -> None:
    dot = pair.local.create_dot()
    pair.local.commit(dot, {"a": b"1"})
    before = pair.local.catalog.last_seq()
    pair.access = Everything("eve", "eve", lambda *_: False)
    assert pair.try_push(dot).error is not None
    assert all(t.status == "failed" for t in pair.local.catalog.transfers())
    assert pair.remote.catalog.transfers() == []
    assert pair.local.catalog.last_seq() <= before + 2


def test_cancelling_a_push_ends_both_sides(pair: Pair) -> None:
    dot = pair.local.create_dot()
    pair.local.commit(dot, {"a": noise(20_000_000)})

    async def session() -> None:
        line = Line()
        server = asyncio.create_task(serve(pair.remote, line.server, pair.access))
        request = PushRequest("origin", dot, ("master",), remote_name="apples")
        client = asyncio.create_task(push(pair.local, line.client, request))
        while line.up.bytes_written < 2_000_000:
            await asyncio.sleep(0)
        client.cancel()
        with pytest.raises(asyncio.CancelledError):
            await client
        async with asyncio.timeout(10):
            with pytest.raises(NetworkError):
                await server

    asyncio.run(session())
    assert pair.push(dot).resumed_bytes >= 0
