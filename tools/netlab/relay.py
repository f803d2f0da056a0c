"""The process behind a Link: relays TCP connections with delay, rate, cuts and counts.

Needs the standard library only, so that it starts at once. Run by `tools.netlab.link.Link`.
"""

import argparse
import asyncio
import mmap
import os
import socket
from collections import deque
from collections.abc import Callable
from enum import StrEnum
from struct import Struct
from typing import NamedTuple

COUNTERS = Struct("=QQQ")
"""Bytes up, bytes down, connections: in memory that is shared with the Link."""
COUNTER_BYTES = mmap.PAGESIZE
READ_BYTES_MAX = 256 * 1024
READ_BYTES_MIN = 1448
"""The payload of one TCP segment."""
STEPS_PER_S = 250
"""So often a limited direction passes bytes on."""
BURST_S = 0.02
"""Sleeping too long by this much costs no throughput."""
WAITING_BYTES_MAX = 64 * 1024 * 1024
"""Bytes under way in one direction when only the delay is limited."""
SLACK_BYTES = 256 * 1024


class Command(StrEnum):
    """Lines from the Link: a word and a number."""

    STOP_AT = "stop-at"
    GO_ON = "go-on"
    CUT = "cut"


class Notice(StrEnum):
    """Lines to the Link."""

    LISTENING = "listening"
    DONE = "done"
    STOPPED = "stopped"


class Limits(NamedTuple):
    """What a direction does to bytes. `rate_bytes_per_s` 0: as fast as it goes."""

    delay_s: float
    rate_bytes_per_s: float

    @property
    def read_bytes(self) -> int:
        """How much to take at a time."""
        if not self.rate_bytes_per_s:
            return READ_BYTES_MAX
        step = int(self.rate_bytes_per_s / STEPS_PER_S)
        return max(READ_BYTES_MIN, min(step, READ_BYTES_MAX))

    @property
    def waiting_bytes_max(self) -> int:
        """Bytes on the line: more than fit means that the far end does not take them."""
        if not self.rate_bytes_per_s:
            return WAITING_BYTES_MAX
        return int(self.rate_bytes_per_s * self.delay_s) + SLACK_BYTES


class Relay:
    """All connections of one link."""

    def __init__(self, target_port: int, limits: Limits, counters: mmap.mmap) -> None:
        self.target_port = target_port
        self.limits = limits
        self.stop_at: int | None = None
        self.cuts_at_stop = False
        self.on_stop: Callable[[], None] = _do_nothing
        self.gate = asyncio.Event()
        self.gate.set()
        self._counters = counters
        self._counts = [0, 0, 0]
        self._open: set[socket.socket] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def accept(self, listener: socket.socket) -> None:
        """Relay every connection, for ever."""
        loop = asyncio.get_running_loop()
        while True:
            client, _ = await loop.sock_accept(listener)
            self._count(2, 1)
            self.spawn(self._relay(client))

    def spawn(self, work: "asyncio._CoroutineLike[None]") -> None:
        """Run in the background; kept until done, as the loop itself does not."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def cut(self) -> None:
        """Break what is open."""
        ends, self._open = self._open, set()
        for end in ends:
            _shut(end, socket.SHUT_RDWR)

    def _count(self, number: int, more: int) -> None:
        self._counts[number] += more
        COUNTERS.pack_into(self._counters, 0, *self._counts)

    async def _relay(self, client: socket.socket) -> None:
        server = socket.socket()
        ends = {client, server}
        self._open |= ends
        try:
            for end in ends:
                end.setblocking(False)
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await asyncio.sleep(2 * self.limits.delay_s)  # TCP's own handshake
            loop = asyncio.get_running_loop()
            await loop.sock_connect(server, ("127.0.0.1", self.target_port))
            await asyncio.gather(
                Direction(self, client, server, 0).run(), Direction(self, server, client, 1).run()
            )
        except OSError:
            pass  # one end is gone: let the other see it
        finally:
            for end in ends:
                _shut(end, socket.SHUT_RDWR)
            self._open -= ends
            await asyncio.sleep(0)  # both directions saw it
            for end in ends:
                end.close()

    async def pass_on(self, target: socket.socket, chunk: memoryview, number: int) -> None:
        """Send and count bytes, stopping exactly where that was asked for."""
        loop = asyncio.get_running_loop()
        while len(chunk):
            await self.gate.wait()
            if target not in self._open:
                raise ConnectionAbortedError("cut")
            part, stops = chunk, False
            if self.stop_at is not None:
                left = max(0, self.stop_at - self._counts[0] - self._counts[1])
                part, stops = chunk[:left], len(chunk) >= left
            self._count(number, len(part))  # before it is seen: who saw it may ask
            if stops:
                self.stop_at = None
                self.gate.clear()
            await loop.sock_sendall(target, part)
            chunk = chunk[len(part) :]
            if stops:
                self.on_stop()


class Direction:
    """One direction of one connection: reads, waits as the rate asks, delivers after the delay."""

    def __init__(
        self, relay: Relay, source: socket.socket, target: socket.socket, number: int
    ) -> None:
        self._relay = relay
        self._limits = relay.limits
        self._source = source
        self._target = target
        self._number = number
        self._line: deque[tuple[float, memoryview]] = deque()
        self._waiting_bytes = 0
        self._changed = asyncio.Event()
        self._left_s = 0.0
        """When the last byte so far leaves, by the rate alone."""

    async def run(self) -> None:
        """Until the source ends or something breaks."""
        if self._limits.delay_s:
            await asyncio.gather(self._read(), self._deliver())
        else:
            await self._read()

    async def _read(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            chunk = memoryview(await loop.sock_recv(self._source, self._limits.read_bytes))
            if self._limits.rate_bytes_per_s and chunk:
                await self._take_turn(len(chunk))
            if not self._limits.delay_s:
                await self._pass_on(chunk)
            else:
                self._line.append((loop.time() + self._limits.delay_s, chunk))
                self._waiting_bytes += len(chunk)
                self._changed.set()
                while self._waiting_bytes > self._limits.waiting_bytes_max:
                    await self._wait()
            if not chunk:
                return

    async def _take_turn(self, size: int) -> None:
        loop = asyncio.get_running_loop()
        began_s = max(self._left_s, loop.time() - BURST_S)
        self._left_s = began_s + size / self._limits.rate_bytes_per_s
        await asyncio.sleep(self._left_s - loop.time())

    async def _deliver(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            while not self._line:
                await self._wait()
            due_s, chunk = self._line.popleft()
            await asyncio.sleep(due_s - loop.time())
            await self._pass_on(chunk)
            self._waiting_bytes -= len(chunk)
            self._changed.set()
            if not chunk:
                return

    async def _wait(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    async def _pass_on(self, chunk: memoryview) -> None:
        if chunk:
            await self._relay.pass_on(self._target, chunk, self._number)
        else:
            _shut(self._target, socket.SHUT_WR)


def _do_nothing() -> None:
    """Nobody asked for a stop yet."""


def _shut(end: socket.socket, how: int) -> None:
    try:
        end.shutdown(how)
    except OSError:
        pass  # never connected, or gone


class Control:
    """The conversation with the Link."""

    def __init__(self, relay: Relay, descriptor: int) -> None:
        self._relay = relay
        self._socket = socket.socket(fileno=descriptor)
        self._socket.setblocking(False)
        relay.on_stop = self._stopped

    def say(self, notice: Notice, argument: int = 0) -> None:
        """A line is far smaller than the socket's buffer: it never blocks."""
        try:
            self._socket.send(
                f"{notice} {argument}\n".encode() if argument else f"{notice}\n".encode()
            )
        except OSError:
            pass  # the Link is gone: the end of its stream says so, too

    async def run(self) -> None:
        """Obey until the Link closes."""
        reader, _ = await asyncio.open_connection(sock=self._socket)
        while line := await reader.readline():
            command, argument = line.decode().split()
            if command == Command.STOP_AT:
                self._relay.stop_at, self._relay.cuts_at_stop = int(argument), False
            elif command == Command.CUT:
                self._relay.cut()
            elif command == Command.GO_ON:
                self._relay.gate.set()
                continue
            self.say(Notice.DONE)

    def _stopped(self) -> None:
        if self._relay.cuts_at_stop:
            self._relay.cut()
            self._relay.gate.set()
        else:
            self.say(Notice.STOPPED)


async def serve(given: argparse.Namespace) -> None:
    """Relay until the control ends."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    counters = mmap.mmap(given.counters_fd, COUNTER_BYTES)
    relay = Relay(given.target_port, Limits(given.delay_s, given.rate_bytes_per_s), counters)
    control = Control(relay, os.dup(given.control_fd))
    os.close(given.control_fd)
    if given.cut_after_bytes:
        relay.stop_at, relay.cuts_at_stop = given.cut_after_bytes, True
    relay.spawn(relay.accept(listener))
    if given.cut_after_s:
        asyncio.get_running_loop().call_later(given.cut_after_s, relay.cut)
    control.say(Notice.LISTENING, listener.getsockname()[1])
    await control.run()


def main() -> None:
    """Entry point of the process."""
    parser = argparse.ArgumentParser()
    for name in ("target-port", "cut-after-bytes", "counters-fd", "control-fd"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("delay-s", "rate-bytes-per-s", "cut-after-s"):
        parser.add_argument(f"--{name}", type=float, required=True)
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
