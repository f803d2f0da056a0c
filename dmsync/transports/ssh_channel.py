"""A ByteStream over one SSH channel, for either end of it."""

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from dmsync.errors import DmError, NetworkError
from dmsync.transports.streams import CLOSE_TIMEOUT_S, WRITE_BYTES, Tail

if TYPE_CHECKING:
    from dmsync.transports.ssh_library import asyncssh

BUFFERED_BYTES_MAX: Final = 4 * 1024 * 1024
"""Above it the channel is paused: then the peer can send one window (32 MiB) more."""
_JOIN_BELOW_BYTES: Final = 32 * 1024


def _gone() -> NetworkError:
    return NetworkError("the peer closed the connection")


class ChannelStream:
    """The session object of a channel: asyncssh feeds it, the engine reads and writes it."""

    def __init__(self, buffered_bytes_max: int = BUFFERED_BYTES_MAX) -> None:
        self.tail = Tail()
        self._buffered_bytes_max = buffered_bytes_max
        self._channel: Any = None
        self._chunks: deque[bytes] = deque()
        self._buffered_bytes = 0
        self._paused = False
        self._ended = False
        self._broken: Exception | None = None
        self._arrived = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()
        self._closed = asyncio.Event()
        self.bytes_received = 0

    # --- called by asyncssh -------------------------------------------------------------------

    def connection_made(
        self, chan: "asyncssh.SSHClientChannel[bytes] | asyncssh.SSHServerChannel[bytes]"
    ) -> None:
        self._channel = chan
        # Paused while anything waits for the window: "writable" then means "handed to TCP".
        chan.set_write_buffer_limits(high=0)

    def data_received(self, data: bytes, datatype: int | None) -> None:
        if datatype is not None:
            self.tail.feed(data)
            return
        self.bytes_received += len(data)
        self._chunks.append(data)
        self._buffered_bytes += len(data)
        if self._buffered_bytes > self._buffered_bytes_max and not self._paused:
            self._paused = True
            self._channel.pause_reading()
        self._arrived.set()

    def eof_received(self) -> bool:
        self._ended = True
        self._arrived.set()
        return True  # we may still be sending

    def connection_lost(self, exc: Exception | None) -> None:
        self._broken = exc
        self._ended = True
        self._arrived.set()
        self._writable.set()
        self._closed.set()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    # --- ByteStream ---------------------------------------------------------------------------

    async def read(self, n: int) -> bytes:
        """At least one and at most `n` bytes; b"" at the end. Raises NetworkError."""
        while not self._chunks:
            if self._ended:
                return await self._at_end()
            self._arrived.clear()
            await self._arrived.wait()
        data = self._take(n)
        self._buffered_bytes -= len(data)
        if self._paused and self._buffered_bytes <= self._buffered_bytes_max // 2:
            self._paused = False
            if not self._closed.is_set():
                self._channel.resume_reading()
        return data

    def _take(self, n: int) -> bytes:
        first = self._chunks.popleft()
        if len(first) > n:
            self._chunks.appendleft(first[n:])
            return first[:n]
        if len(first) >= _JOIN_BELOW_BYTES or not self._chunks:
            return first
        joined, joined_bytes = [first], len(first)
        while self._chunks and joined_bytes + len(self._chunks[0]) <= n:
            joined.append(self._chunks.popleft())
            joined_bytes += len(joined[-1])
        return b"".join(joined)

    async def _at_end(self) -> bytes:
        if self._broken is not None:
            raise NetworkError(f"the connection broke: {self._broken}") from self._broken
        failure = await self._silent_end()
        if failure is not None:
            raise failure
        return b""

    async def _silent_end(self) -> DmError | None:
        """Why the peer ended without a byte, where a subclass can know."""
        return None

    async def write(self, data: bytes) -> None:
        """Queue `data`; waits while the peer's window is full. Raises NetworkError."""
        for start in range(0, len(data), WRITE_BYTES):
            part = data if len(data) <= WRITE_BYTES else data[start : start + WRITE_BYTES]
            try:
                self._channel.write(part)
            except OSError as exc:
                raise await self._silent_end() or _gone() from (self._broken or exc)
            await self._writable.wait()
            if self._closed.is_set():
                raise await self._silent_end() or _gone() from self._broken

    async def write_eof(self) -> None:
        """Say that nothing more is sent; reading goes on. Raises NetworkError."""
        try:
            self._channel.write_eof()
        except OSError as exc:
            raise await self._silent_end() or _gone() from (self._broken or exc)

    async def aclose(self) -> None:
        """Send what is queued and close the channel; waits a few seconds for the peer to agree."""
        if self._channel is None:
            return
        self._close_channel()
        try:
            # The peer's own close says that it has what we sent; closing the connection under it
            # before would drop what the kernel has not taken yet.
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._closed.wait()
        except TimeoutError:
            self._channel.abort()

    def _close_channel(self) -> None:
        self._channel.close()

    def diagnostics(self) -> str:
        """What the peer wrote to its stderr and how it exited: printable text, at most 4 KiB."""
        return self.tail.describe()
