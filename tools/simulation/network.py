"""Connections between simulated processes: bytes take time, come in pieces, stall and break."""

import asyncio
import contextvars
from dataclasses import dataclass
from random import Random
from typing import Final, Literal

from dmsync.errors import NetworkError
from tools.simulation.scheduler import Scheduler

Fault = Literal["none", "cut", "stall", "half-close"]
BROKEN: Final = "the connection broke"
WINDOWS_BYTES: Final = (512, 16 * 1024, 256 * 1024, 4 * 1024 * 1024)


@dataclass(frozen=True)
class Weather:
    """What becomes of one connection. `after_bytes`, of both directions together, counts up to
    the fault; `stall_s` is how long nothing moves then."""

    delay_s: float
    piece_bytes: int
    window_bytes: int
    fault: Fault = "none"
    after_bytes: int = 0
    stall_s: float = 0.0

    @classmethod
    def drawn(cls, random: Random, *, is_rough: bool) -> "Weather":
        fault: Fault = "none"
        if is_rough and random.random() < 0.45:
            fault = random.choice(("cut", "cut", "cut", "stall", "half-close"))
        return cls(
            random.choice((0.0, 0.001, 0.04, 0.3)),
            random.choice((7, 300, 5_000, 1 << 20, 1 << 20)),
            random.choice(WINDOWS_BYTES),
            fault,
            int(2 ** random.uniform(0, 16)),
            random.choice((1.0, 20.0, 200.0)),
        )


class Direction:
    """Bytes one way."""

    def __init__(self, link: "Link") -> None:
        self.link = link
        self.buffer = bytearray()
        self.in_flight = 0
        self.is_ended = False
        self.is_deaf = False
        """Half closed: what is written gets lost."""
        self.changed = asyncio.Event()
        self.drained = asyncio.Event()
        self._free_at_s = 0.0

    def send(self, data: bytes) -> None:
        """Put bytes on their way, in pieces."""
        link = self.link
        at = 0
        while at < len(data):
            size = 1 + link.random.randrange(link.weather.piece_bytes)
            if len(data) - at > 64 * size:
                size = (len(data) - at) // 16
            piece = data[at : at + size]
            at += size
            self.in_flight += len(piece)
            delay_s = link.weather.delay_s * (0.5 + link.random.random())
            self._free_at_s = max(self._free_at_s, link.scheduler.now_s + delay_s)
            link.later(self._free_at_s, self, piece)

    def end(self) -> None:
        """Nothing follows what is on its way."""
        self.link.later(max(self._free_at_s, self.link.scheduler.now_s), self, b"")

    def arrive(self, piece: bytes) -> None:
        self.in_flight -= len(piece)
        if self.link.is_broken or (piece and self.is_deaf):
            return
        if piece:
            self.buffer += piece
        else:
            self.is_ended = True
        self.changed.set()

    def is_full(self) -> bool:
        return self.in_flight + len(self.buffer) > self.link.weather.window_bytes


class Link:
    """A connection; `client` and `server` are its ends (ByteStreams)."""

    def __init__(self, scheduler: Scheduler, random: Random, weather: Weather) -> None:
        self.scheduler = scheduler
        self.random = random
        self.weather = weather
        self.is_broken = False
        self.bytes_written = 0
        self._has_failed = weather.fault == "none"
        self._stalled_until_s = 0.0
        self._nobody = contextvars.Context()
        up, down = Direction(self), Direction(self)
        self._directions = (up, down)
        self.client = End(self, reads=down, writes=up)
        self.server = End(self, reads=up, writes=down)

    def later(self, when_s: float, direction: Direction, piece: bytes) -> None:
        """Let a piece arrive, not before a stall is over."""
        when_s = max(when_s, self._stalled_until_s)
        self.scheduler.call_at(when_s, direction.arrive, piece, context=self._nobody)

    def take(self, data: bytes, direction: Direction) -> bytes:
        """What of written bytes gets on its way; the fault strikes at its byte."""
        before = self.bytes_written
        self.bytes_written += len(data)
        if self._has_failed or self.bytes_written < self.weather.after_bytes:
            return data
        self._has_failed = True
        if self.weather.fault == "cut":
            self.scheduler.call_at(
                self.scheduler.now_s + self.weather.delay_s, self.cut, context=self._nobody
            )
            return data[: self.weather.after_bytes - before]
        if self.weather.fault == "stall":
            self._stalled_until_s = self.scheduler.now_s + self.weather.stall_s
        elif self.weather.fault == "half-close":
            direction.end()
            direction.is_deaf = True
        return data

    def cut(self) -> None:
        """Break the connection; what is on its way is lost."""
        self.is_broken = True
        for direction in self._directions:
            direction.changed.set()
            direction.drained.set()


class End:
    """One end: a ByteStream."""

    def __init__(self, link: Link, *, reads: Direction, writes: Direction) -> None:
        self._link = link
        self._reads = reads
        self._writes = writes
        self._is_closed = False

    async def read(self, n: int) -> bytes:
        reads = self._reads
        while not reads.buffer:
            if self._link.is_broken:
                raise NetworkError(BROKEN)
            if reads.is_ended or self._is_closed:
                return b""
            reads.changed.clear()
            await reads.changed.wait()
        size = min(n, len(reads.buffer))
        if not self._link.random.randrange(3):
            size = 1 + self._link.random.randrange(size)
        data = bytes(reads.buffer[:size])
        del reads.buffer[:size]
        reads.drained.set()
        return data

    async def write(self, data: bytes) -> None:
        if self._link.is_broken or self._is_closed:
            raise NetworkError(BROKEN)
        taken = self._link.take(data, self._writes)
        if not self._writes.is_deaf:
            self._writes.send(taken)
        # whoever closed reads no more: what is written then is lost, as it is in a socket
        while self._writes.is_full() and not self._link.is_broken and not self._is_closed:
            self._writes.drained.clear()
            await self._writes.drained.wait()
        if self._link.is_broken:
            raise NetworkError(BROKEN)

    async def aclose(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._reads.changed.set()
            self._reads.drained.set()
            self._writes.drained.set()
            if not self._link.is_broken:
                self._writes.end()
