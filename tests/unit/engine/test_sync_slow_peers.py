"""A peer that takes little at a time, and is held to a rate, is no peer that takes nothing."""

import asyncio

import pytest

from dmsync.core.ids import DotId
from dmsync.engine.ports import ByteStream
from dmsync.engine.session import Session
from dmsync.errors import NetworkError
from dmsync.transports.limited_stream import LimitedStream
from dmsync.wire.connection import Role
from dmsync.wire.frames import encode_frame
from dmsync.wire.limits import MAGIC
from dmsync.wire.messages import (
    Hello,
    Intent,
    Message,
    Ping,
    Plan,
    Push,
    Records,
    Refs,
    frame_from_message,
)
from tests.support.virtual_time import run_in_virtual_time


class Sink:
    """Takes everything at once, and sends heartbeats."""

    def __init__(self, said: bytes) -> None:
        self._said = said
        self.taken_bytes = 0

    async def read(self, n: int) -> bytes:
        if not self._said:
            await asyncio.sleep(20)
            self._said = bytes_of(Ping())
        data, self._said = self._said[:n], self._said[n:]
        return data

    async def write(self, data: bytes) -> None:
        self.taken_bytes += len(data)

    async def write_eof(self) -> None: ...

    async def aclose(self) -> None: ...

    def diagnostics(self) -> str:
        return ""


class SlowSink(Sink):
    """Takes what fits into a window at once, and the rest as the far side takes it."""

    def __init__(self, said: bytes, window_bytes: int, bytes_per_s: int) -> None:
        super().__init__(said)
        self._window_bytes, self._rate = window_bytes, bytes_per_s
        self._empty_at_s = 0.0

    async def write(self, data: bytes) -> None:
        await super().write(data)
        now_s = asyncio.get_running_loop().time()
        self._empty_at_s = max(self._empty_at_s, now_s) + len(data) / self._rate
        await asyncio.sleep(self._empty_at_s - now_s - self._window_bytes / self._rate)


TRANSFER = bytes(range(16))
HELLO = Hello(
    1, 1, (("hash", "blake3-256"), ("zstd", "1")), (), "test", bytes(16), epoch=1, limits=()
)
SENT_BYTES = 400_000


def bytes_of(message: Message) -> bytes:
    return encode_frame(frame_from_message(message))


async def send_records(stream: ByteStream) -> None:
    """An eager push, as far as its records."""
    async with Session(stream, Role.CLIENT) as session:
        dot = DotId(TRANSFER)
        await session.send(HELLO, Refs(None, None, "a", Intent.PUSH))
        await session.send(Push(TRANSFER, TRANSFER, dot, None, "a", True, False, (), ()))
        await session.send(Plan(0, b"\0", bytes(8), 1, 1, eager=True), Records(bytes(SENT_BYTES)))


def test_a_rate_of_a_kilobyte_is_held_and_not_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    sink = Sink(MAGIC + bytes_of(HELLO))
    work = send_records(LimitedStream(sink, 1024))
    _, took_s = run_in_virtual_time(work, monkeypatch, "dmsync.engine.session")
    assert sink.taken_bytes > SENT_BYTES and took_s > SENT_BYTES / 1024


def test_a_peer_that_takes_a_kilobyte_a_second_is_not_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a client that holds itself to a rate: a small window is empty, then no more is taken."""
    sink = SlowSink(MAGIC + bytes_of(HELLO), 64 * 1024, 1024)
    run_in_virtual_time(send_records(sink), monkeypatch, "dmsync.engine.session")
    assert sink.taken_bytes > SENT_BYTES


def test_a_peer_that_takes_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    sink = SlowSink(MAGIC + bytes_of(HELLO), 64 * 1024, 1)
    with pytest.raises(NetworkError, match="took nothing"):
        run_in_virtual_time(send_records(sink), monkeypatch, "dmsync.engine.session")
