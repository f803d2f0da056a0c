"""A ByteStream over two file descriptors: pipes, a socket or a terminal.

asyncio's own pipe transports are not used: the writing one takes any readable byte on a socket as
the peer's end, and a stock sshd gives one socket for both directions.
"""

import asyncio
import os
import socket
import stat
from typing import Final

from dmsync.errors import DmError, NetworkError
from dmsync.transports.streams import WRITE_BYTES, Tail

READ_BYTES_MAX: Final = 256 * 1024


class DescriptorStream:
    """Owns both descriptors: they are made non-blocking and closed with the stream."""

    def __init__(self, source_fd: int, target_fd: int) -> None:
        self.tail = Tail()
        self.bytes_received = 0
        self._source_fd = source_fd
        self._target_fd = target_fd
        self._eof_sent = False
        self._closed = False
        # One socket or terminal may be both ends: then it stays non-blocking until both are done.
        self._is_shared = os.path.samestat(os.fstat(source_fd), os.fstat(target_fd))
        self._was_blocking = {fd: os.get_blocking(fd) for fd in (source_fd, target_fd)}
        self._waiting: set[asyncio.Future[None]] = set()
        for fd in (source_fd, target_fd):
            os.set_blocking(fd, False)

    async def read(self, n: int) -> bytes:
        """At least one and at most `n` bytes; b"" at the end. Raises NetworkError."""
        while True:
            if self._closed:
                raise NetworkError("the stream is closed")
            try:
                data = os.read(self._source_fd, min(n, READ_BYTES_MAX))
            except BlockingIOError:
                await self._wait_readable()
                continue
            except ConnectionResetError:
                return b""
            except OSError as exc:
                raise NetworkError(f"the pipe from the peer broke: {exc.strerror}") from exc
            self.bytes_received += len(data)
            if not data and (failure := await self._silent_end()) is not None:
                raise failure
            return data

    async def _silent_end(self) -> DmError | None:
        """Why the peer ended without a byte, where a subclass can know."""
        return None

    async def write(self, data: bytes) -> None:
        """Pass `data` to the kernel; waits while the pipe is full. Raises NetworkError."""
        view = memoryview(data)
        while len(view):
            if self._closed or self._eof_sent:
                raise NetworkError("the stream is closed")
            try:
                written = os.write(self._target_fd, view[:WRITE_BYTES])
            except BlockingIOError:
                await self._wait_writable()
                continue
            except OSError as exc:
                gone = NetworkError(f"the peer closed the pipe: {exc.strerror}")
                raise await self._silent_end() or gone from exc
            view = view[written:]

    async def write_eof(self) -> None:
        """Say that nothing more is sent; reading goes on."""
        if self._eof_sent or self._closed:
            return
        self._eof_sent = True
        if stat.S_ISSOCK(os.fstat(self._target_fd).st_mode):
            # the other descriptor may keep the socket open
            with socket.socket(fileno=os.dup(self._target_fd)) as end:
                try:
                    end.shutdown(socket.SHUT_WR)
                except OSError:
                    pass  # the peer is gone
        self._close_target()

    async def aclose(self) -> None:
        """Close both directions. What was written is with the kernel already."""
        if self._closed:
            return
        await self.write_eof()
        self._closed = True
        self._stop_waiting(self._source_fd)
        self._restore_blocking(self._source_fd)
        os.close(self._source_fd)

    def diagnostics(self) -> str:
        """What the peer wrote to its stderr and how it exited: printable text, at most 4 KiB."""
        return self.tail.describe()

    def _close_target(self) -> None:
        self._stop_waiting(self._target_fd)
        if not self._is_shared:
            self._restore_blocking(self._target_fd)
        os.close(self._target_fd)

    def _restore_blocking(self, fd: int) -> None:
        """The descriptor may be shared with other processes (a terminal, the shell's pipe)."""
        os.set_blocking(fd, self._was_blocking[fd])

    def _stop_waiting(self, fd: int) -> None:
        """Wake who waits for a descriptor that is about to be closed."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(fd)
        loop.remove_writer(fd)
        for ready in self._waiting:
            _wake(ready)

    async def _wait_readable(self) -> None:
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = loop.create_future()
        loop.add_reader(self._source_fd, _wake, ready)
        self._waiting.add(ready)
        try:
            await ready
        finally:
            self._waiting.discard(ready)
            if not self._closed:  # the number may be another file's by now
                loop.remove_reader(self._source_fd)

    async def _wait_writable(self) -> None:
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = loop.create_future()
        loop.add_writer(self._target_fd, _wake, ready)
        self._waiting.add(ready)
        try:
            await ready
        finally:
            self._waiting.discard(ready)
            if not self._eof_sent:
                loop.remove_writer(self._target_fd)


def _wake(ready: "asyncio.Future[None]") -> None:
    if not ready.done():
        ready.set_result(None)
