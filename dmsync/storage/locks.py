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
from dmsync.storage.durable import is_at, storage_errors

_POLL_SECONDS_MAX: Final = 0.02
_POLL_SECONDS_FIRST: Final = 0.001
_HOLDER_BYTES_MAX: Final = 256
_FLOCK: Final = "hhqqi4x"
"""struct flock of 64-bit Linux: type, whence, start, length, pid (0 for OFD locks)."""


class FileLock:
    """One lock on `path`, taken by `with` or acquire(); the file stays when it is released.

    `what` names it in messages ("the log", "dot shop"). The holder's process id and command are
    written into the file for others' messages only; the kernel decides who holds it.

    A shared one writes nothing when the file is there. On a read-only filesystem without the file
    it is held without a lock: nobody can take the exclusive one there.
    """

    def __init__(self, path: str, *, what: str, shared: bool = False, wait_s: float = 10.0) -> None:
        self._path = path
        self._what = what
        self._shared = shared
        self._wait_s = wait_s
        self._file: int | None = None
        self._is_held = False

    @property
    def is_held(self) -> bool:
        return self._is_held

    def acquire(self) -> None:
        """Wait for the lock up to `wait_s` seconds.

        Raises:
            Busy: somebody else holds it still.
            StorageFailed: the file cannot be opened.
        """
        assert not self._is_held, "the lock is held already"
        file = self._open()
        if file is not None:
            try:
                self._wait(file)
                if not self._shared:
                    _write_holder(file)
            except BaseException:
                os.close(file)
                raise
        self._file = file
        self._is_held = True

    def release(self) -> None:
        """Give the lock back; harmless when not held."""
        file, self._file = self._file, None
        self._is_held = False
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

    def _open(self) -> int | None:
        flags = os.O_CLOEXEC | os.O_NOFOLLOW
        with storage_errors(f"opening the lock {self._path}"):
            if self._shared:
                try:
                    return os.open(self._path, os.O_RDONLY | flags)
                except FileNotFoundError:
                    pass  # the first one to lock makes the file
            try:
                return os.open(self._path, os.O_RDWR | os.O_CREAT | flags, 0o600)
            except OSError as exc:
                if self._shared and exc.errno == errno.EROFS:
                    return None
                raise

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


class ProofOfLife:
    """A lock file that shows others that its maker lives; gone with it, or left unlocked by a kill.

    Its path is this maker's alone (it has a random part). Take it before anything that others
    judge by it.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._file: int | None = None

    def acquire(self) -> None:
        """Raises StorageFull, StorageFailed."""
        assert self._file is None, "the proof is given already"
        while self._file is None:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            with storage_errors(f"making {self._path}"):
                file = os.open(self._path, flags, 0o600)
            # somebody who sweeps may have found it in the moment before it was locked
            if _try_lock(file, shared=False) and is_at(file, self._path):
                self._file = file
            else:
                os.close(file)

    def release(self) -> None:
        """Remove the file; harmless when it is not held."""
        file, self._file = self._file, None
        if file is not None:
            _unlink_quietly(self._path)
            os.close(file)

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def is_alive(path: str) -> bool:
    """True while the maker of the ProofOfLife at `path` lives. Changes nothing."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        request = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        answer = fcntl.fcntl(file, fcntl.F_OFD_GETLK, request)
        return bool(struct.unpack(_FLOCK, answer)[0] != fcntl.F_UNLCK)
    except OSError:
        return False
    finally:
        os.close(file)


def remove_if_dead(path: str) -> None:
    """Remove the file of a ProofOfLife whose maker was killed; any other stays."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        if _try_lock(file, shared=False) and is_at(file, path):
            _unlink_quietly(path)
    finally:
        os.close(file)


def _unlink_quietly(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass  # without its lock it proves nothing


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
