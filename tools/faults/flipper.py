"""Swaps names of one directory as fast as the kernel lets it: whoever checks a path and then uses
it loses sooner or later."""

import ctypes
import mmap
import os
import signal
import struct
from collections.abc import Sequence
from types import TracebackType
from typing import Final, Self

_EXCHANGE: Final = 2
_PR_SET_PDEATHSIG: Final = 1
_SWAPS_A_LOOK: Final = 256
_COUNT: Final = struct.Struct("=Q")


class Flipper:
    """A process that exchanges each pair of names of `directory`, over and over, until closed."""

    def __init__(self, directory: str, pairs: Sequence[tuple[str, str]]) -> None:
        self._shared = mmap.mmap(-1, mmap.PAGESIZE)
        self._pid = os.fork()
        if self._pid == 0:
            try:
                self._flip(directory, pairs)
            finally:
                os._exit(1)

    @property
    def swaps(self) -> int:
        found: int = _COUNT.unpack_from(self._shared)[0]
        return found

    def _flip(self, directory: str, pairs: Sequence[tuple[str, str]]) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        exchange = libc.renameat2
        exchange.argtypes = [
            ctypes.c_int,
            ctypes.c_char_p,
            ctypes.c_int,
            ctypes.c_char_p,
            ctypes.c_uint,
        ]
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        names = [(one.encode(), other.encode()) for one, other in pairs]
        count = 0
        while True:
            for _ in range(_SWAPS_A_LOOK):
                for one, other in names:
                    exchange(fd, one, fd, other, _EXCHANGE)
            count += _SWAPS_A_LOOK * len(names)
            _COUNT.pack_into(self._shared, 0, count)

    def close(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
