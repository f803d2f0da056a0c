"""Kernel locks on files: they die with their process, so no lock is ever stale (STORE.md 3).

OFD locks belong to the open file, not to the process: two threads that each open the file
exclude each other like two processes. Order, to exclude deadlock: store, dot, log. Never take
one while holding a later one.
"""

import errno
import fcntl
import os
import struct
import sys
import time
from types import TracebackType
from typing import Final, Self

from dmsync.errors import Busy, StorageFailed
from dmsync.storage.durable import storage_errors

_POLL_SECONDS_MAX: Final = 0.02
_POLL_SECONDS_FIRST: Final = 0.001
_HOLDER_BYTES_MAX: Final = 256
_FLOCK: Final = "hhqqi4x"
"""struct flock of 64-bit Linux: type, whence, start, length, pid (0 for OFD locks)."""


class FileLock:
    """One lock on `path`, taken by `with` or acquire(); the file stays when it is released.

    `what` names it in messages ("the log", "dot shop"). The holder's process id and command are
    written into the file for others' messages only; the kernel decides who holds it.
    """

    def __init__(self, path: str, *, what: str, shared: bool = False, wait_s: float = 10.0) -> None:
        self._path = path
        self._what = what
        self._shared = shared
        self._wait_s = wait_s
        self._file: int | None = None

    @property
    def is_held(self) -> bool:
        return self._file is not None

    def acquire(self) -> None:
        """Wait for the lock up to `wait_s` seconds.

        Raises:
            Busy: somebody else holds it still.
            StorageFailed: the file cannot be opened.
        """
        assert self._file is None, "the lock is held already"
        file = self._open()
        try:
            self._wait(file)
            if not self._shared:
                _write_holder(file)
        except BaseException:
            os.close(file)
            raise
        self._file = file

    def release(self) -> None:
        """Give the lock back; harmless when not held."""
        file, self._file = self._file, None
        if file is None:
            return
        try:
            if not self._shared:
                os.ftruncate(file, 0)
        except OSError:
            pass  # only the text for messages stays behind
        finally:
            os.close(file)

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        with storage_errors(f"opening the lock {self._path}"):
            return os.open(self._path, flags, 0o600)

    def _wait(self, file: int) -> None:
        deadline = time.monotonic() + self._wait_s
        pause_s = _POLL_SECONDS_FIRST
        while not _try_lock(file, shared=self._shared):
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0:
                holder = _read_holder(file)
                raise Busy(
                    f"{self._what} is in use" + (f" by {holder}" if holder else ""),
                    hint="try again, or wait longer with --lock-wait",
                    lock=self._path,
                    holder=holder,
                )
            time.sleep(min(pause_s, remaining_s))
            pause_s = min(2 * pause_s, _POLL_SECONDS_MAX)


def _try_lock(file: int, *, shared: bool) -> bool:
    kind = fcntl.F_RDLCK if shared else fcntl.F_WRLCK
    request = struct.pack(_FLOCK, kind, os.SEEK_SET, 0, 0, 0)
    try:
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, request)
    except OSError as exc:
        if exc.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise StorageFailed(f"cannot lock: {exc.strerror}") from exc
    return True


def _write_holder(file: int) -> None:
    command = os.path.basename(sys.argv[0]) if sys.argv and sys.argv[0] else "python"
    text = f"process {os.getpid()} ({' '.join([command, *sys.argv[1:2]])})"
    try:
        os.ftruncate(file, 0)
        os.pwrite(file, text.encode("utf-8", "replace")[:_HOLDER_BYTES_MAX], 0)
    except OSError:
        pass  # a full disk must not stop a command that may be about to free space


def _read_holder(file: int) -> str:
    try:
        text = os.pread(file, _HOLDER_BYTES_MAX, 0).decode("utf-8", "replace")
    except OSError:
        return ""
    return "".join(c if c.isprintable() else "?" for c in text)
