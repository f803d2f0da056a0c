"""In-memory duplex byte streams: plain, counting round trips, cut at a byte, flipping a byte."""

import asyncio
from collections.abc import Callable

from dmsync.errors import NetworkError

Change = Callable[[int, bytes], bytes]
"""(position in the stream, bytes written) -> bytes that arrive."""


class Pipe:
    """One direction. `cut_at`: after so many bytes both directions break."""

    def __init__(self, line: "Line", change: Change | None, window_bytes: int) -> None:
        self._line = line
        self._change = change
        self._window_bytes = window_bytes
        self._buffer = bytearray()
        self._event = asyncio.Event()
        self.written = bytearray() if line.record else None
        self.bytes_written = 0
        self.closed = False

    async def write(self, data: bytes, side: str) -> None:
        self._line.note(side)
        if self.closed or self._line.is_cut:
            raise NetworkError("the connection broke")
        room = self._line.room(len(data))
        if self._change is not None:
            data = self._change(self.bytes_written, data)
        data = data[:room]
        if self.written is not None:
            self.written += data
        self.bytes_written += len(data)
        self._buffer += data
        self._event.set()
        if self._line.has_just_been_cut():
            raise NetworkError("the connection broke")
        while len(self._buffer) > self._window_bytes and not self._line.is_cut:
            await asyncio.sleep(0)
        await asyncio.sleep(0)

    async def read(self, n: int) -> bytes:
        while not self._buffer:
            if self._line.is_cut:
                raise NetworkError("the connection broke")
            if self.closed:
                return b""
            self._event.clear()
            await self._event.wait()
        data = bytes(self._buffer[:n])
        del self._buffer[:n]
        return data

    def wake(self) -> None:
        self._event.set()

    def close(self) -> None:
        self.closed = True
        self._event.set()


class Line:
    """A connection between a client and a server; both ends are ByteStreams.

    `turns` counts how often the client spoke after the server did: round trips.
    """

    def __init__(
        self,
        *,
        cut_after: int | None = None,
        change_up: Change | None = None,
        change_down: Change | None = None,
        record: bool = False,
        window_bytes: int = 1 << 20,
    ) -> None:
        self.record = record
        self.turns = 0
        self._last = "server"
        self._left = cut_after
        self.up = Pipe(self, change_up, window_bytes)
        self.down = Pipe(self, change_down, window_bytes)
        self.client = End(self.down, self.up, "client")
        self.server = End(self.up, self.down, "server")

    @property
    def is_cut(self) -> bool:
        return self._left is not None and self._left <= 0

    def room(self, size: int) -> int:
        if self._left is None:
            return size
        room = min(size, self._left)
        self._left -= size
        return room

    def has_just_been_cut(self) -> bool:
        if self.is_cut:
            self.up.wake()
            self.down.wake()
        return self.is_cut

    def note(self, side: str) -> None:
        if side == "client" and self._last == "server":
            self.turns += 1
        self._last = side


class End:
    """One end of a Line: a ByteStream."""

    def __init__(self, incoming: Pipe, outgoing: Pipe, side: str) -> None:
        self._incoming = incoming
        self._outgoing = outgoing
        self._side = side

    async def read(self, n: int) -> bytes:
        return await self._incoming.read(n)

    async def write(self, data: bytes) -> None:
        await self._outgoing.write(data, self._side)

    async def aclose(self) -> None:
        self._outgoing.close()
        self._incoming.close()


class Script:
    """A peer that says fixed bytes, then ends (or stays silent)."""

    def __init__(self, said: bytes, *, ends: bool = True) -> None:
        self._said = said
        self._ends = ends
        self.heard = bytearray()

    async def read(self, n: int) -> bytes:
        await asyncio.sleep(0)
        data, self._said = self._said[:n], self._said[n:]
        if not data and not self._ends:
            await asyncio.Event().wait()
        return data

    async def write(self, data: bytes) -> None:
        self.heard += data

    async def aclose(self) -> None:
        return None
