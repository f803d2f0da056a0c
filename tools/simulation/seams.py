"""Puts the simulated clock, randomness, disks, locks and threads in the place of the real ones.

The product has no switch for this: what it takes from the operating system is replaced in the
modules it takes it from, while a run goes on and for simulated processes only.
"""

import concurrent.futures
import fcntl
import os
import sqlite3
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random
from types import SimpleNamespace
from typing import Any, Final, Protocol

from dmsync.engine import store as engine_store
from dmsync.storage import (
    catalog,
    holds,
    object_reading,
    object_store,
    pack_index,
    quarantine,
    schema,
)
from tools.simulation.disk import WRITING, Disk, real, scratch_parent
from tools.simulation.scheduler import PowerCut, Scheduler, StrandLocal, StrandLock, StrandRLock


class Machine(Protocol):
    """What a simulated process runs on."""

    disk: Disk

    def wall_ns(self) -> int:
        """Its clock, in nanoseconds since 1970."""
        ...

    def lose_power(self) -> None:
        """Its disk has reached the system call at which it was to lose its power."""
        ...


class InlineExecutor:
    """A pool of threads that does everything at once."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def submit(self, work: Callable[..., Any], *args: Any, **named: Any) -> Any:
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        try:
            future.set_result(work(*args, **named))
        except Exception as exc:
            future.set_exception(exc)
        return future

    def map(self, work: Callable[..., Any], *iterables: Any) -> Iterator[Any]:
        return iter([work(*args) for args in zip(*iterables, strict=False)])

    def shutdown(self, *_: object, **__: object) -> None:
        pass

    def __enter__(self) -> "InlineExecutor":
        return self

    def __exit__(self, *_: object) -> None:
        pass


class SimulatedCalls:
    """The system calls of simulated processes."""

    def __init__(self, scheduler: Scheduler, random: Random) -> None:
        self._scheduler = scheduler
        self._random = random

    def machine(self) -> Machine | None:
        found: Machine | None = self._scheduler.process.machine
        return found

    def _before(self, call: str) -> Disk | None:
        """Others may go first, the power may go, the disk may fail. Raises PowerCut, OSError."""
        self._scheduler.breathe()
        machine = self.machine()
        if machine is None:
            return None
        disk = machine.disk
        if disk.cut_at is not None and disk.calls + 1 >= disk.cut_at:
            machine.lose_power()
            raise PowerCut
        disk.count(call)
        return disk

    # --- content --------------------------------------------------------------------------------

    def open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if not flags & (WRITING | os.O_CREAT) or not isinstance(path, str | bytes) or dir_fd:
            self._refuse_dead()
            return int(real.open(path, flags, mode, dir_fd=dir_fd))
        name = os.fsdecode(path)
        disk = self._before("open" if flags & os.O_CREAT else "open-to-write")
        if disk is None or not disk.has(name):
            return int(real.open(path, flags, mode))
        is_new = bool(flags & os.O_CREAT) and not os.path.lexists(name)
        if is_new:
            disk.will_rename(name)
        fd = int(real.open(path, flags, mode))
        disk.made(fd)
        if is_new:
            disk.renamed((name, real.fstat(fd).st_ino))
        return fd

    def write(self, fd: int, data: Any) -> int:
        disk = self._before("write")
        if disk is not None:
            disk.will_change(fd, os.lseek(fd, 0, os.SEEK_CUR), len(data))
        return int(real.write(fd, data))

    def pwrite(self, fd: int, data: Any, offset: int) -> int:
        disk = self._before("pwrite")
        if disk is not None:
            disk.will_change(fd, offset, len(data))
        return int(real.pwrite(fd, data, offset))

    def ftruncate(self, fd: int, length: int) -> None:
        disk = self._before("ftruncate")
        if disk is not None:
            disk.will_change(fd)
        real.ftruncate(fd, length)

    def fsync(self, fd: int) -> None:
        try:
            disk = self._before("fsync")
        except OSError:
            machine = self.machine()
            if machine is not None:
                machine.disk.sync_failed(fd)
            raise
        if disk is not None:
            disk.synced(fd)
        # the simulated disk is all the disk there is: nothing is to be waited for

    # --- names ----------------------------------------------------------------------------------

    def rename(self, source: Any, target: Any, **options: Any) -> None:
        old, new = os.fsdecode(source), os.fsdecode(target)
        disk = self._before("rename")
        if disk is None or options or not disk.has(old) or not disk.has(new):
            real.rename(source, target, **options)
            return
        disk.will_rename(old, new)
        disk.bury(new)
        inode = os.lstat(old).st_ino
        real.rename(old, new)
        disk.renamed((old, None), (new, inode))

    def unlink(self, path: Any, *, dir_fd: int | None = None) -> None:
        disk = self._before("unlink")
        name = os.fsdecode(path)
        if disk is None or dir_fd is not None or not disk.has(name):
            real.unlink(path, dir_fd=dir_fd)
            return
        disk.will_rename(name)
        disk.bury(name)
        real.unlink(path)
        disk.renamed((name, None))

    def mkdir(self, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        disk = self._before("mkdir")
        name = os.fsdecode(path)
        if disk is None or dir_fd is not None or not disk.has(name):
            real.mkdir(path, mode, dir_fd=dir_fd)
            return
        disk.will_rename(name)
        real.mkdir(path, mode)
        disk.renamed((name, real.stat(name).st_ino))
        disk.directory_made(name)

    def rmdir(self, path: Any, *, dir_fd: int | None = None) -> None:
        disk = self._before("rmdir")
        name = os.fsdecode(path)
        if disk is None or dir_fd is not None or not disk.has(name):
            real.rmdir(path, dir_fd=dir_fd)
            return
        disk.will_rename(name)
        real.rmdir(path)
        disk.renamed((name, None))

    def listdir(self, path: Any = ".") -> list[Any]:
        self._refuse_dead()
        return sorted(real.listdir(path))

    # --- locks, time, randomness ----------------------------------------------------------------

    def lock(self, fd: Any, command: int, argument: Any = 0) -> Any:
        """fcntl.fcntl, which never waits inside the kernel."""
        if command != fcntl.F_OFD_SETLKW or self._scheduler.current is None:
            return _real_fcntl(fd, command, argument)
        while True:
            try:
                return _real_fcntl(fd, fcntl.F_OFD_SETLK, argument)
            except BlockingIOError:
                self._scheduler.sleep(0.001)

    def wall_ns(self) -> int:
        machine = self.machine()
        return EPOCH_NS + int(self._scheduler.now_s * 1e9) if machine is None else machine.wall_ns()

    def sleep(self, seconds: float) -> None:
        if self._scheduler.current is None:
            raise AssertionError("the hub of a simulation does not sleep")
        self._scheduler.sleep(seconds)

    def urandom(self, size: int) -> bytes:
        return self._random.randbytes(size)

    def _refuse_dead(self) -> None:
        if self._scheduler.process.is_dead:
            raise PowerCut


@contextmanager
def installed(
    scheduler: Scheduler, random: Random, fault: Callable[[], None] | None = None
) -> Iterator[SimulatedCalls]:
    """Everything in place for the body. `fault` then breaks the product, for controls; what it
    does to system calls ends with the body."""
    calls = SimulatedCalls(scheduler, random)
    threads = SimpleNamespace(
        Lock=lambda: StrandLock(scheduler),
        RLock=lambda: StrandRLock(scheduler),
        local=lambda: StrandLocal(scheduler),
        current_thread=threading.current_thread,
        main_thread=threading.main_thread,
    )
    replaced: list[tuple[Any, str, Any]] = [
        (os, "open", calls.open),
        (os, "write", calls.write),
        (os, "pwrite", calls.pwrite),
        (os, "ftruncate", calls.ftruncate),
        (os, "fsync", calls.fsync),
        (os, "fdatasync", calls.fsync),
        (os, "rename", calls.rename),
        (os, "replace", calls.rename),
        (os, "unlink", calls.unlink),
        (os, "remove", calls.unlink),
        (os, "mkdir", calls.mkdir),
        (os, "rmdir", calls.rmdir),
        (os, "listdir", calls.listdir),
        (os, "urandom", calls.urandom),
        (fcntl, "fcntl", calls.lock),
        (time, "time_ns", calls.wall_ns),
        (time, "time", lambda: calls.wall_ns() / 1e9),
        (time, "monotonic", lambda: scheduler.now_s),
        (time, "sleep", calls.sleep),
        (os, "getpid", lambda: PROCESS_ID),
        (sys, "argv", ["dm"]),
        (catalog, "threading", threads),
        (holds, "threading", threads),
        (holds, "holders_of", lambda path: []),
        (engine_store, "threading", threads),
        (object_store, "RLock", lambda: StrandRLock(scheduler)),
        (object_reading, "RLock", lambda: StrandRLock(scheduler)),
        (quarantine, "ThreadPoolExecutor", InlineExecutor),
        (quarantine, "_age", lambda entry: (entry.inode(), entry.name)),
        (concurrent.futures, "ThreadPoolExecutor", InlineExecutor),
        (tempfile, "tempdir", scratch_parent()),
        # A tenth of a run's time went into reading each setting of each connection back.
        (schema, "_set_pragmas", _set_pragmas),
        # Nobody runs meanwhile who could end a statement: waiting in SQLite would be for nothing.
        (schema, "BUSY_TIMEOUT_MS", 0),
        (pack_index, "_BUSY_TIMEOUT_S", 0),
    ]
    before = [(module, name, getattr(module, name)) for module, name, _ in replaced]
    locks = dict(catalog._transaction_locks)
    catalog._transaction_locks.clear()
    for module, name, value in replaced:
        setattr(module, name, value)
    if fault is not None:
        fault()
    try:
        yield calls
    finally:
        for module, name, value in before:
            setattr(module, name, value)
        catalog._transaction_locks.clear()
        catalog._transaction_locks.update(locks)


def _set_pragmas(connection: sqlite3.Connection, *, read_only: bool) -> None:
    """What matters of the settings here: the simulated disk does without SQLite's syncs."""
    connection.execute("PRAGMA synchronous = 0")
    connection.execute("PRAGMA wal_autocheckpoint = 0")
    connection.execute(f"PRAGMA {'query_only' if read_only else 'foreign_keys'} = 1")


EPOCH_NS: Final = 1_800_000_000 * 1_000_000_000
"""When simulations begin."""
PROCESS_ID: Final = 4_000
"""It is told in messages, which are told in logs."""
_real_fcntl: Final = fcntl.fcntl
