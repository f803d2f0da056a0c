"""Holds: who relies on objects of a dot that no ref may name yet (protocol/STORE.md 3).

Whoever stores objects, or makes something known that is based on stored ones, holds the dot
shared until that is recorded. A sweep holds it alone, for the moment in which objects go.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Final, Self

from dmsync.errors import Busy, DmError, StorageFailed, StorageFull
from dmsync.storage.locks import FileLock

HOLD_FILE: Final = "hold.lock"
WHAT: Final = "the dot's stored content"
_HOLDERS_TOLD_MAX: Final = 3
_COMMAND_CHARACTERS_MAX: Final = 60


class Hold:
    """The shared hold of one process on one dot, counted. For any thread.

    `renew` is called each time the kernel's lock was just taken: what was known of the dot's packs
    before may be gone.
    """

    def __init__(self, dot_dir: str, *, wait_s: float = 10.0) -> None:
        self._path = os.path.join(dot_dir, HOLD_FILE)
        self.wait_s = wait_s
        self.renew: Callable[[], None] = lambda: None
        self.rest: Callable[[], None] = lambda: None
        """Called when nobody holds it any more."""
        self.refusal: DmError | None = None
        """Why nothing may be stored any more: things were read while it could not be had."""
        self._lock: FileLock | None = None
        self._count = 0
        self._guard = threading.Lock()

    @property
    def is_held(self) -> bool:
        return self._count > 0

    def acquire(self, *, wait_s: float | None = None) -> None:
        """Hold once more; waits for a sweep to end. Raises Busy, StorageFailed."""
        with self._guard:
            if self._count == 0:
                wait_s = self.wait_s if wait_s is None else wait_s
                lock = FileLock(self._path, what=WHAT, shared=True, wait_s=wait_s)
                lock.acquire()
                try:
                    self.renew()
                except BaseException:
                    lock.release()
                    raise
                self._lock = lock
            self._count += 1

    def acquire_or_go_on(self, wait_s: float | None) -> None:
        """Hold once more; where that cannot be, only reading may go on. None: without waiting, and
        reading may go on also where a sweep is under way. Raises Busy, unless None."""
        try:
            self.acquire(wait_s=wait_s or 0.0)
        except Busy as exc:
            if wait_s is not None:
                raise
            self.refusal = exc
        except (StorageFull, StorageFailed) as exc:
            self.refusal = exc

    def release(self) -> None:
        """Let go of it once; harmless when it is not held."""
        with self._guard:
            if self._count == 0:
                return
            self._count -= 1
            if self._count == 0 and self._lock is not None:
                self.rest()
                self._lock.release()
                self._lock = None

    def require(self) -> None:
        """Hold it from now on until `close`, if nobody does yet: something is to be stored.

        Raises:
            Busy: a sweep does not end, or was under way while this process read without a hold.
            StorageFull, StorageFailed: the hold cannot be had here.
        """
        if self.is_held:
            return
        if self.refusal is not None:
            raise self.refusal
        self.acquire()

    def close(self) -> None:
        """Let go of it altogether."""
        with self._guard:
            self._count = 0
            if self._lock is not None:
                self._lock.release()
                self._lock = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Hold it during the body. Raises Busy, StorageFailed."""
        self.acquire()
        try:
            yield
        finally:
            self.release()


class Sweeping:
    """A dot held alone, as a context manager: nobody relies on anything that is not recorded."""

    def __init__(self, dot_dir: str, *, wait_s: float) -> None:
        self._path = os.path.join(dot_dir, HOLD_FILE)
        self._lock = FileLock(self._path, what=WHAT, wait_s=wait_s)

    def __enter__(self) -> Self:
        """Raises Busy (its fact `holder` names the processes that can be told), StorageFailed."""
        try:
            self._lock.acquire()
        except Busy as exc:
            holder = ", ".join(holders_of(self._path)) or exc.facts.get("holder", "")
            by = f" by {holder}" if holder else ""
            raise Busy(
                f"{WHAT} is in use{by}", hint=exc.hint, lock=self._path, holder=holder
            ) from exc
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lock.release()


def holders_of(path: str) -> list[str]:
    """Processes that have the lock file open, as far as this user may look: for messages only."""
    try:
        wanted = os.stat(path)
        processes = [name for name in os.listdir("/proc") if name.isdigit()]
    except OSError:
        return []
    found = []
    for process in processes:
        if int(process) != os.getpid() and _has_open(process, wanted):
            found.append(f"process {process} ({_command_of(process)})")
            if len(found) == _HOLDERS_TOLD_MAX:
                break
    return found


def _has_open(process: str, wanted: os.stat_result) -> bool:
    try:
        for name in os.listdir(f"/proc/{process}/fd"):
            try:
                if os.path.samestat(os.stat(f"/proc/{process}/fd/{name}"), wanted):
                    return True
            except OSError:
                continue
    except OSError:
        pass
    return False


def _command_of(process: str) -> str:
    try:
        with open(f"/proc/{process}/cmdline", "rb") as file:
            words = file.read(4096).split(b"\0")
    except OSError:
        return "?"
    shown = [os.path.basename(word.decode("utf-8", "replace")) for word in words if word]
    text = " ".join(shown)[:_COMMAND_CHARACTERS_MAX]
    return "".join(c if c.isprintable() else "?" for c in text)
