"""A stream held to a rate: `--limit-rate` of push, pull, fetch and clone.

What is sent is held exactly. What is received is held by taking no more: the peer stops when the
windows between it and us are full, so these are made small where they are ours (`window_bytes`).
"""

import asyncio
from typing import Final

from dmsync.transports.streams import PeerStream

STEP_S: Final = 0.1
"""What passes at a time: short enough to look steady, long enough for full packets."""
_STEP_BYTES_MIN: Final = 1024
_WINDOW_BYTES_MIN: Final = 32 * 1024
"""Less than one SSH packet as most implementations send it would stop them."""


def window_bytes(limit_bytes_per_s: int) -> int:
    """How much a peer may send ahead of what was taken: half a second's worth."""
    return max(_WINDOW_BYTES_MIN, limit_bytes_per_s // 2)


class _Pace:
    """When the next bytes of one direction may pass."""

    def __init__(self, limit_bytes_per_s: int) -> None:
        self._limit = limit_bytes_per_s
        self._free_at_s = 0.0

    async def passed(self, size: int) -> None:
        """Wait until `size` bytes more have kept to the rate. A pause is not made up for."""
        now_s = asyncio.get_running_loop().time()
        self._free_at_s = max(self._free_at_s, now_s - STEP_S) + size / self._limit
        await asyncio.sleep(self._free_at_s - now_s)


class LimitedStream:
    """Another stream at no more than so many bytes a second in each direction."""

    def __init__(self, stream: PeerStream, limit_bytes_per_s: int) -> None:
        self._stream = stream
        self._step_bytes = max(_STEP_BYTES_MIN, int(limit_bytes_per_s * STEP_S))
        self._sending = _Pace(limit_bytes_per_s)
        self._receiving = _Pace(limit_bytes_per_s)

    async def read(self, n: int) -> bytes:
        """At least one and at most `n` bytes; b"" at the end. Raises NetworkError."""
        data = await self._stream.read(min(n, self._step_bytes))
        await self._receiving.passed(len(data))
        return data

    async def write(self, data: bytes) -> None:
        """Pass `data` on as the rate allows. Raises NetworkError."""
        for start in range(0, len(data), self._step_bytes):
            part = data[start : start + self._step_bytes]
            await self._sending.passed(len(part))
            await self._stream.write(part)

    async def write_eof(self) -> None:
        """Say that nothing more is sent; reading goes on. Raises NetworkError."""
        await self._stream.write_eof()

    async def aclose(self) -> None:
        """Close the stream below."""
        await self._stream.aclose()

    def diagnostics(self) -> str:
        """What the peer wrote to its stderr and how it exited."""
        return self._stream.diagnostics()
