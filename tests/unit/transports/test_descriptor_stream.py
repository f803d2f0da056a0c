"""Streams over pipes and over one socket for both ways, as sshd gives."""

import asyncio
import os
import socket
from collections.abc import Coroutine
from typing import Any

import pytest

from dmsync.errors import NetworkError
from dmsync.transports.child_process import ProcessStream
from dmsync.transports.descriptor_stream import DescriptorStream


def run(work: Coroutine[Any, Any, Any]) -> Any:
    async def limited() -> Any:
        async with asyncio.timeout(20):
            return await work

    return asyncio.run(limited())


async def read_all(stream: Any) -> bytes:
    received = b""
    while data := await stream.read(65536):
        received += data
    return received


def test_one_socket_serves_both_ways_and_halves_close_alone() -> None:
    payload = os.urandom(2_000_000)

    async def work() -> None:
        near, far = socket.socketpair()
        stream = DescriptorStream(os.dup(near.fileno()), os.dup(near.fileno()))
        other = DescriptorStream(os.dup(far.fileno()), os.dup(far.fileno()))
        near.close()
        far.close()
        _, received = await asyncio.gather(_send(stream, payload), read_all(other))
        assert received == payload
        await other.write(b"still open")
        await other.aclose()
        assert await read_all(stream) == b"still open"
        await stream.aclose()

    run(work())


async def _send(stream: Any, payload: bytes) -> None:
    await stream.write(payload)
    await stream.write_eof()


def test_writing_waits_while_the_pipe_is_full() -> None:
    async def work() -> None:
        source, target = os.pipe()
        unused, _ = os.pipe()
        stream = DescriptorStream(unused, target)
        writing = asyncio.create_task(stream.write(bytes(1_000_000)))
        await asyncio.sleep(0.05)
        assert not writing.done()
        os.close(source)
        with pytest.raises(NetworkError):
            await writing
        await stream.aclose()

    run(work())


def test_closing_wakes_a_reader_and_gives_the_mode_back() -> None:
    async def work() -> None:
        source, peer = os.pipe()
        kept = os.dup(source)
        _, target = os.pipe()
        stream = DescriptorStream(source, target)
        assert not os.get_blocking(kept)
        reading = asyncio.create_task(stream.read(1))
        await asyncio.sleep(0)
        await stream.aclose()
        await stream.aclose()
        with pytest.raises(NetworkError):
            await reading
        assert os.get_blocking(kept)
        os.close(peer)

    run(work())


def test_a_process_that_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dmsync.transports.child_process.CLOSE_TIMEOUT_S", 0.2)

    async def work() -> None:
        script = "trap '' TERM; echo x; while :; do sleep 0.05; done"
        stream = await ProcessStream.start(["sh", "-c", script], lambda tail: None)
        assert await stream.read(1) == b"x"
        await stream.aclose()
        assert stream.tail.exit_signal == "SIGKILL"

    run(work())
