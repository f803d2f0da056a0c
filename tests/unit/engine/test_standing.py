"""A remote that is not what it was, or takes us for somebody else; a push that is played again."""

import asyncio
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dmsync.core.events import EpochStarted
from dmsync.core.names import parse_remote_url
from dmsync.engine.sync_push import PushRequest, push
from dmsync.engine.sync_server import serve
from dmsync.engine.sync_standing import Standing
from dmsync.errors import AccessDenied, DmError, RemoteRewound
from dmsync.surfaces.cli.connection import Remote, _greeted
from tests.support.streams import Line
from tests.support.sync_stores import FakeStore, Pair


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    made = Pair(str(tmp_path))
    yield made
    made.close()


def put_back(pair: Pair, tmp_path: Path) -> tuple[Any, Any, Any]:
    """Two pushes, and the remote is what it was after the first: (dot, first, second commit)."""
    dot = pair.local.create_dot()
    first = pair.local.commit(dot, {"a": b"1"})
    pair.push(dot)
    pair.remote.close()
    shutil.copytree(tmp_path / "remote", tmp_path / "old")
    pair.remote = FakeStore(str(tmp_path / "remote"))
    second = pair.local.commit(dot, {"a": b"2"})
    pair.push(dot)
    pair.remote.close()
    pair.remote = FakeStore(str(tmp_path / "old"))
    return dot, first, second


def test_nothing_moves_on_either_side_until_it_is_accepted(pair: Pair, tmp_path: Path) -> None:
    dot, _, second = put_back(pair, tmp_path)
    before = pair.local.catalog.last_seq(), pair.remote.catalog.last_seq()
    pair.local.commit(dot, {"a": b"3"})
    for outcome in (pair.try_push(dot), pair.try_fetch(dot), pair.try_pull(dot)):
        assert isinstance(outcome.error, RemoteRewound) and outcome.error.exit_code == 14
        assert "--accept-rewind" in outcome.error.hint
        assert second.hex()[:12] in outcome.error.message
    assert (before[0] + 2, before[1]) == (
        pair.local.catalog.last_seq(),
        pair.remote.catalog.last_seq(),
    ), "our own commit and nothing else"
    assert pair.local.ref(dot, "remote/origin/master") == second


def test_an_accepting_push_brings_back_what_was_lost(pair: Pair, tmp_path: Path) -> None:
    dot, first, second = put_back(pair, tmp_path)
    assert pair.remote.tip(dot) == first
    summary = pair.push(dot, accept_rewind=True)
    assert summary.remote_standing is Standing.REWOUND
    assert pair.remote.log(dot) == [second, first]
    assert pair.push(dot).remote_standing is Standing.SAME
    assert not pair.pull(dot).rewound


def test_an_accepting_fetch_keeps_what_was_seen_in_the_reflog(pair: Pair, tmp_path: Path) -> None:
    dot, first, second = put_back(pair, tmp_path)
    assert pair.fetch(dot, accept_rewind=True).remote_standing is Standing.REWOUND
    assert pair.local.ref(dot, "remote/origin/master") == first
    seen = [row.new for row in pair.local.catalog.reflog(dot, "remote/origin/master")]
    assert second in seen and pair.local.tip(dot) == second
    assert pair.fetch(dot).remote_standing is Standing.SAME, "accepting is recorded"


def test_a_remote_that_lost_even_the_dot_is_noticed(pair: Pair, tmp_path: Path) -> None:
    """Put back to before the first push: a push would make the dot as if it had never been."""
    pair.remote.close()
    shutil.copytree(tmp_path / "remote", tmp_path / "empty")
    pair.remote = FakeStore(str(tmp_path / "remote"))
    dot = pair.local.create_dot()
    pair.local.commit(dot, {"a": b"1"})
    pair.push(dot)
    pair.remote.close()
    pair.remote = FakeStore(str(tmp_path / "empty"))
    assert isinstance(pair.try_push(dot).error, RemoteRewound)
    assert pair.remote.catalog.dot(dot) is None
    assert pair.push(dot, accept_rewind=True).remote_standing is Standing.REWOUND


def test_a_new_epoch_and_another_store_are_told(pair: Pair, tmp_path: Path) -> None:
    dot = pair.local.create_dot()
    pair.local.commit(dot, {"a": b"1"})
    pair.push(dot)
    pair.remote.append(EpochStarted(99))
    assert pair.fetch(dot).remote_standing is Standing.NEW_EPOCH
    assert pair.fetch(dot).remote_standing is Standing.SAME
    pair.remote.close()
    pair.remote = FakeStore(str(tmp_path / "other"))
    assert pair.push(dot).remote_standing is Standing.OTHER_STORE


def test_a_captured_push_that_is_played_again_moves_nothing(pair: Pair) -> None:
    dot = pair.local.create_dot()
    pair.local.commit(dot, {"a": b"1"})
    pair.push(dot)
    pair.local.commit(dot, {"a": b"2"})
    request = PushRequest("origin", dot, ("master",), remote_name="apples", actor="me")
    outcome = pair.run(lambda stream: push(pair.local, stream, request), lambda: Line(record=True))
    captured = bytes(outcome.line.up.written or b"")
    newest = pair.local.commit(dot, {"a": b"3"})
    pair.push(dot)
    before = pair.remote.catalog.last_seq()

    async def play_again() -> None:
        line = Line()
        task = asyncio.create_task(serve(pair.remote, line.server, pair.access))
        await line.client.write(captured)
        await asyncio.wait([task], timeout=20)
        if not task.done():
            await line.client.aclose()
        with pytest.raises(DmError):
            await task

    asyncio.run(play_again())
    assert pair.remote.tip(dot) == newest
    moved = [row for row in pair.remote.catalog.operations(None) if row.first_seq > before]
    assert all(row.command == "receive-push" for row in moved)


@pytest.mark.parametrize(("login", "is_refused"), [("alice", False), ("", False), ("eve", True)])
def test_a_server_that_takes_us_for_somebody_else_is_left(
    pair: Pair, login: str, is_refused: bool
) -> None:
    """The name it logged us in under has to be the one that the URL says."""
    dot = pair.local.create_dot()
    pair.local.commit(dot, {"a": b"1"})
    pair.access.login = login
    said: list[str] = []
    invocation: Any = SimpleNamespace(verbose=1, talk=said.append, dry_run=True)
    there = Remote("origin", parse_remote_url("ssh://alice@host"), None)
    local: Any = pair.local
    greeted: Any = partial(_greeted, invocation, local, there)
    request = PushRequest("origin", dot, ("master",), remote_name="apples", actor="me")
    outcome = pair.run(lambda stream: push(pair.local, stream, request, None, greeted))
    assert isinstance(outcome.error, AccessDenied) == is_refused
    assert (pair.remote.catalog.dot(dot) is None) == is_refused
    assert said and (login in said[0])
