"""Long work of one side does not look like silence to the other, and is never cut short."""

import asyncio
import os
import socket
import threading
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dmsync.core.ids import DotId
from dmsync.engine.background import in_thread, steps_in_thread
from dmsync.engine.ports import TargetTree
from dmsync.engine.sync_pull import FetchRequest, pull
from dmsync.engine.sync_push import PushRequest, push
from dmsync.engine.sync_server import serve
from dmsync.transports.descriptor_stream import DescriptorStream
from tests.support.sync_stores import Pair

BLOCKED_S = 8.0


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    monkeypatch.setattr("dmsync.engine.session.IDLE_TIMEOUT_S", 4.0)
    monkeypatch.setattr("dmsync.engine.session.PING_INTERVAL_S", 0.5)
    made = Pair(str(tmp_path))
    yield made
    made.close()


def blocking(store: Any, dot: DotId, branch: str) -> None:
    time.sleep(BLOCKED_S)


def over_sockets(pair: Pair, client: Any) -> Any:
    """Run `client(stream)` here and the server in a loop of its own, as in two processes."""
    ours, theirs = socket.socketpair()

    async def served() -> None:
        fd = theirs.detach()
        await serve(pair.remote, DescriptorStream(fd, os.dup(fd)), pair.access, pair.server_tree)

    async def asked() -> Any:
        fd = ours.detach()
        return await client(DescriptorStream(fd, os.dup(fd)))

    with ThreadPoolExecutor(1) as threads:
        server = threads.submit(lambda: asyncio.run(served()))
        result = asyncio.run(asked())
        server.result()
        return result


def test_a_push_survives_a_slow_look_at_the_server_s_tree(pair: Pair) -> None:
    dot = pair.local.create_dot()
    pair.local.commit(dot, {"a": b"one"})
    pair.push(dot)
    tip = pair.local.commit(dot, {"a": b"two"})
    pair.server_tree = TargetTree(refuse_if_dirty=blocking)
    request = PushRequest("origin", dot, ("master",), remote_name="apples")
    over_sockets(pair, lambda stream: push(pair.local, stream, request))
    assert pair.remote.tip(dot) == tip


def test_a_pull_survives_a_slow_look_at_its_own_tree(pair: Pair) -> None:
    dot = pair.local.create_dot()
    pair.local.commit(dot, {"a": b"one"})
    pair.push(dot)
    tip = pair.remote.commit(dot, {"a": b"two"})
    request = FetchRequest("origin", dot, move="ff")
    tree = TargetTree(refuse_if_dirty=blocking)
    over_sockets(pair, lambda stream: pull(pair.local, stream, request, tree))
    assert pair.local.tip(dot) == tip


def test_who_is_cancelled_waits_for_the_thread() -> None:
    ended = threading.Event()

    def work() -> None:
        time.sleep(0.3)
        ended.set()

    async def session() -> bool:
        task = asyncio.create_task(in_thread(work))
        await asyncio.sleep(0.05)
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0.01)
        with pytest.raises(asyncio.CancelledError):
            await task
        return ended.is_set()

    assert asyncio.run(session())


def test_steps_stop_when_cancelled() -> None:
    taken = 0

    def steps() -> Generator[None, None, int]:
        nonlocal taken
        while True:
            taken += 1
            time.sleep(0.01)
            yield

    async def session() -> None:
        task = asyncio.create_task(steps_in_thread(steps()))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(session())
    assert 0 < taken < 50


def test_a_result_and_an_error_come_through() -> None:
    def steps() -> Any:
        yield
        return 7

    def failing() -> None:
        raise KeyError("x")

    assert asyncio.run(steps_in_thread(steps())) == 7
    with pytest.raises(KeyError):
        asyncio.run(in_thread(failing))
