"""A ByteStream to the stdin and stdout of a process of ours; its stderr is kept for messages."""

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Final

from dmsync.errors import DmError, NetworkError
from dmsync.transports.descriptor_stream import DescriptorStream
from dmsync.transports.streams import CLOSE_TIMEOUT_S, Tail

_PIPE_BYTES: Final = 1024 * 1024
_STDERR_READ_BYTES: Final = 16 * 1024

SilentEnd = Callable[[Tail], DmError | None]
"""What it means that the process ended without having written a byte."""


class ProcessStream(DescriptorStream):
    """Use `start`."""

    def __init__(
        self,
        source_fd: int,
        target_fd: int,
        process: asyncio.subprocess.Process,
        meaning: SilentEnd,
    ) -> None:
        super().__init__(source_fd, target_fd)
        self._process = process
        self._meaning = meaning
        self._stderr_task = asyncio.create_task(self._keep_stderr())

    @classmethod
    async def start(cls, arguments: Sequence[str], meaning: SilentEnd) -> "ProcessStream":
        """Run a command (no shell). Raises NetworkError when it cannot be run."""
        child_source, target_fd = _wide_pipe()
        source_fd, child_target = _wide_pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                *arguments,
                stdin=child_source,
                stdout=child_target,
                stderr=asyncio.subprocess.PIPE,
            )
        except (OSError, ValueError) as exc:
            os.close(target_fd)
            os.close(source_fd)
            raise NetworkError(f"cannot run {arguments[0]}: {exc}") from exc
        finally:
            os.close(child_source)
            os.close(child_target)
        return cls(source_fd, target_fd, process, meaning)

    async def _keep_stderr(self) -> None:
        assert self._process.stderr is not None
        while text := await self._process.stderr.read(_STDERR_READ_BYTES):
            self.tail.feed(text)

    async def _silent_end(self) -> DmError | None:
        if self.bytes_received == 0 and await self._has_ended():
            return self._meaning(self.tail)
        return None

    async def _has_ended(self) -> bool:
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._note_exit()
        except TimeoutError:
            return False
        return True

    async def _note_exit(self) -> None:
        status = await self._process.wait()
        if status < 0:
            self.tail.exit_signal = signal.Signals(-status).name
        else:
            self.tail.exit_status = status
        await asyncio.wait([self._stderr_task], timeout=1.0)  # a grandchild may hold it open

    async def aclose(self) -> None:
        """Close the pipes and wait for the process; one that does not end is killed."""
        await super().aclose()
        try:
            if not await self._has_ended():
                self._process.terminate()
                if not await self._has_ended():
                    self._process.kill()
                    await self._note_exit()
        except ProcessLookupError:
            pass  # it ended in between
        finally:
            self._stderr_task.cancel()


def _wide_pipe() -> tuple[int, int]:
    """(read end, write end), with room for several writes where the kernel allows."""
    read_end, write_end = os.pipe()
    if sys.platform == "linux":
        import fcntl

        try:
            fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        except OSError:
            pass  # over the user's limit: the default will do
    return read_end, write_end
