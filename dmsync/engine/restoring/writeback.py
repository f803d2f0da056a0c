"""Makes what a restore wrote durable: filesystems synced once at the end, and on the way.

The promise: a restore returns when every byte, name and attribute it wrote is on disk. Nothing
needs to be there earlier. That the tree is being changed was recorded durably before the first
change, so a crash at any point leaves either a tree that is finished by the next command, or a new
one that nobody knows yet and that gets its name after this. So no file is synced alone; but since
the last sync takes as long as there is left to write, a thread begins while names are still being
made.
"""

import os
import threading
from typing import Final

from dmsync.engine.safe_files import sync_filesystem
from dmsync.errors import DmError
from dmsync.storage.stages import stage

_SYNC_BYTES: Final = 64 * 1024 * 1024
"""Written by us since the last sync: enough to keep a disk busy, few enough to leave little."""
_FILE_BYTES: Final = 4096
"""What a name costs on disk besides its bytes."""


class Writeback:
    """The filesystems that a restore writes to. Not for several threads."""

    def __init__(self) -> None:
        self._fds: dict[int, int] = {}
        self._pending_bytes = 0
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_due = False
        self._is_over = False
        self._failure: DmError | None = None

    def __contains__(self, device: int) -> bool:
        return device in self._fds

    def enter(self, fd: int, device: int) -> None:
        """A filesystem that may be written from now on; `fd` is a directory on it.

        Its own descriptor: syncfs reports to each what failed since it was opened.
        """
        self._fds[device] = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fd)

    def wrote(self, count: int) -> None:
        """A file of `count` bytes, or a part of one, was written."""
        self._pending_bytes += count + _FILE_BYTES
        if self._pending_bytes >= _SYNC_BYTES:
            self._pending_bytes = 0
            self._begin()

    def _begin(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="writeback", daemon=True)
            self._thread.start()
        with self._wake:
            self._is_due = True
            self._wake.notify()

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._is_due or self._is_over)
                if self._is_over:
                    return
                self._is_due = False
            try:
                with stage("sync"):
                    self._sync()
            except DmError as exc:
                self._failure = exc
                return

    def _sync(self) -> None:
        for fd in list(self._fds.values()):
            sync_filesystem(fd)

    def finish(self) -> None:
        """Everything written is durable on return. Raises StorageFailed: now or on the way."""
        self._stop()
        if self._failure is not None:
            raise self._failure
        self._sync()

    def _stop(self) -> None:
        if self._thread is not None:
            with self._wake:
                self._is_over = True
                self._wake.notify()
            self._thread.join()
            self._thread = None

    def close(self) -> None:
        """End the thread and close the descriptors, whatever has happened."""
        self._stop()
        while self._fds:
            os.close(self._fds.popitem()[1])
