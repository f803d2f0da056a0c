"""A simulated disk: real files, and knowledge of what of them would survive a power cut.

Content is durable up to the last successful fsync of the file, names up to the last fsync of their
directory. What is younger survives a cut as the seed says: all of it, none, or what a journalling
filesystem may leave: the changes of names up to some point in time, and of content any sectors.
SQLite syncs by itself: its databases survive, their write-ahead logs up to any byte of what no
checkpoint has taken over.
"""

import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any, Final

SECTOR_BYTES: Final = 512
WRITING: Final = os.O_WRONLY | os.O_RDWR
Names = dict[str, int]
"""Name to inode number, of one directory."""
NameChange = tuple[tuple[str, str, int | None], ...]
"""(directory, name, inode or None) of what one system call changed."""


class RealOs:
    """The system calls themselves, whatever is put in their place."""

    def __init__(self) -> None:
        for name in (
            "open", "close", "read", "pread", "write", "pwrite", "fsync", "fdatasync", "ftruncate",
            "rename", "replace", "link", "unlink", "remove", "mkdir", "rmdir", "listdir", "stat",
            "fstat", "urandom",
        ):  # fmt: skip
            setattr(self, name, getattr(os, name))

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


real: Final = RealOs()


@dataclass
class Fault:
    """From the `after`-th changing system call on, the next `count` of `calls` fail."""

    calls: frozenset[str]
    error: int
    after: int
    count: int


@dataclass
class _Failed:
    """A file of which an fsync failed: the kernel dropped pages and took them for clean."""

    durable: bytes
    rewritten: list[tuple[int, int]] = field(default_factory=list)


class Disk:
    """What is below `home`. `graves` is a directory beside it for what was unlinked."""

    def __init__(self, home: str, graves: str) -> None:
        self.home = home
        self.calls = 0
        """Changing system calls so far."""
        self.fault: Fault | None = None
        self.cut_at: int | None = None
        """The power goes at this changing system call."""
        self.failed_calls = 0
        self._graves = graves
        self._content: dict[int, bytes] = {}
        """Durable content, by inode, of files whose content is another now."""
        self._failed: dict[int, _Failed] = {}
        self._buried: dict[int, bytes] = {}
        """Content of files that lost their name. (A second name would show in their link count.)"""
        self._names: dict[str, Names] = {}
        """Durable names of directories that changed."""
        self._pending: list[NameChange] = []

    # --- before system calls --------------------------------------------------------------------

    def count(self, call: str) -> None:
        """A changing system call is about to be made. Raises OSError when it has to fail."""
        self.calls += 1
        fault = self.fault
        if fault is None or self.calls < fault.after or call not in fault.calls:
            return
        fault.count -= 1
        if fault.count <= 0:
            self.fault = None
        self.failed_calls += 1
        raise OSError(fault.error, os.strerror(fault.error))

    def has(self, path: str) -> bool:
        return path.startswith(self.home)

    # --- content --------------------------------------------------------------------------------

    def will_change(self, fd: int, start: int = 0, length: int = 0) -> None:
        """The content of an open file is about to change."""
        inode = real.fstat(fd).st_ino
        if inode not in self._content:
            self._content[inode] = _content_of(fd)
        if length and (failed := self._failed.get(inode)) is not None:
            failed.rewritten.append((start, start + length))

    def made(self, fd: int) -> None:
        """A file was made or opened to be written."""
        found = real.fstat(fd)
        self._content.setdefault(found.st_ino, _content_of(fd))

    def synced(self, fd: int) -> None:
        """An fsync has succeeded."""
        found = real.fstat(fd)
        if os.path.stat.S_ISDIR(found.st_mode):  # type: ignore[attr-defined]
            self._names_synced(os.readlink(f"/proc/self/fd/{fd}"))
            return
        self._content.pop(found.st_ino, None)
        failed = self._failed.get(found.st_ino)
        if failed is not None:
            self._content[found.st_ino] = _overlaid(failed, _content_of(fd))

    def sync_failed(self, fd: int) -> None:
        """An fsync has failed: the next one will succeed and write nothing of what there is."""
        inode = real.fstat(fd).st_ino
        if inode in self._content:
            self._failed[inode] = _Failed(self._content[inode])

    # --- names ----------------------------------------------------------------------------------

    def will_rename(self, *paths: str) -> None:
        """Names in the directories of `paths` are about to change."""
        for path in paths:
            directory = os.path.dirname(path)
            if directory not in self._names:
                self._names[directory] = _names_in(directory)

    def renamed(self, *changes: tuple[str, int | None]) -> None:
        """One system call has changed names: (path, inode or None) each."""
        self._pending.append(tuple((*os.path.split(path), inode) for path, inode in changes))

    def directory_made(self, path: str) -> None:
        self._names[path] = {}

    def bury(self, path: str) -> None:
        """A file is about to lose its name: keep what a cut may bring back."""
        try:
            inode = real.stat(path).st_ino
            if _is_of_sqlite(path):  # a file that is never opened beside SQLite
                real.link(path, os.path.join(self._graves, str(inode)))
            else:
                with open(path, "rb") as file:
                    self._buried[inode] = file.read()
        except (FileNotFoundError, FileExistsError):
            pass

    def _names_synced(self, directory: str) -> None:
        kept: list[NameChange] = []
        for change in self._pending:
            if any(where == directory for where, _, _ in change):
                self._apply(change)
            else:
                kept.append(change)
        self._pending = kept

    def _apply(self, change: NameChange) -> None:
        for directory, name, inode in change:
            names = self._names.setdefault(directory, {})
            if inode is None:
                names.pop(name, None)
            else:
                names[name] = inode

    # --- the cut --------------------------------------------------------------------------------

    def survive(self, target: str, random: Random, *, power: bool) -> None:
        """Write what a cut leaves of `home` to `target`. Without `power` it was a mere kill."""
        current = _tree_of(self.home)
        paths = {inode: path for path, inode in current.items()}
        if power:
            extent = random.choice((0.0, 1.0, random.random()))
            for change in self._pending[: round(extent * len(self._pending))]:
                self._apply(change)
        else:
            for change in self._pending:
                self._apply(change)
        lose_projections = power and random.random() < 0.1
        extent = random.choice((0.0, 1.0, random.random()))
        surviving = self._surviving_names(current)
        for path in sorted(surviving, key=lambda path: (surviving[path], path)):
            inode = surviving[path]
            relative = os.path.relpath(path, self.home)
            destination = os.path.normpath(os.path.join(target, relative))
            os.makedirs(os.path.dirname(destination), exist_ok=True)
            source = paths.get(inode) or os.path.join(self._graves, str(inode))
            if os.path.isdir(source):
                os.makedirs(destination, exist_ok=True)
            elif _is_of_sqlite(path):
                if not path.endswith("-shm") and not lose_projections:
                    self._keep_database(source, destination, random, power=power)
            else:
                self._keep_file(inode, source, destination, random, extent, power=power)

    def _surviving_names(self, current: dict[str, int]) -> dict[str, int]:
        """Path to inode, of everything whose name and whose parents' names survive."""
        found: dict[str, int] = {self.home: 0}
        for path in sorted(current):
            directory, name = os.path.split(path)
            if directory in self._names and name not in self._names[directory]:
                if not _is_of_sqlite(name):
                    continue
            elif directory in self._names:
                found[path] = self._names[directory][name]
                continue
            found[path] = current[path]
        for directory, names in self._names.items():
            for name, inode in names.items():
                found.setdefault(os.path.join(directory, name), inode)
        return {path: inode for path, inode in found.items() if self._is_rooted(path, found)}

    def _is_rooted(self, path: str, found: dict[str, int]) -> bool:
        while path != self.home:
            if path not in found or not path.startswith(self.home):
                return False
            path = os.path.dirname(path)
        return True

    def _keep_file(
        self,
        inode: int,
        source: str,
        destination: str,
        random: Random,
        extent: float,
        *,
        power: bool,
    ) -> None:
        found = self._buried.get(inode)
        if os.path.exists(source):
            with open(source, "rb") as file:
                found = file.read()
        if found is None:
            return
        now = found
        durable = self._content.get(inode)
        if power and durable is not None and durable != now:
            now = _torn(durable, now, random, extent)
        with open(destination, "wb") as file:
            file.write(now)
        os.chmod(destination, 0o600)

    @staticmethod
    def _keep_database(source: str, destination: str, random: Random, *, power: bool) -> None:
        try:
            shutil.copyfile(source, destination)
        except FileNotFoundError:
            return
        if power and destination.endswith("-wal") and random.random() < 0.7:
            os.truncate(destination, int(os.path.getsize(destination) * random.random()))


def _content_of(fd: int) -> bytes:
    size = real.fstat(fd).st_size
    if not size:
        return b""
    try:
        content: bytes = real.pread(fd, size, 0)
    except OSError as exc:
        if exc.errno != errno.EBADF:  # open for writing only
            raise
        with open(f"/proc/self/fd/{fd}", "rb") as file:
            content = file.read()
    return content


def _names_in(directory: str) -> Names:
    try:
        with os.scandir(directory) as entries:
            return {entry.name: entry.inode() for entry in entries}
    except FileNotFoundError:
        return {}


def _tree_of(home: str) -> dict[str, int]:
    """Path to inode of everything below `home`."""
    found: dict[str, int] = {}
    waiting = [home]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                found[entry.path] = entry.inode()
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
    return found


def _is_of_sqlite(path: str) -> bool:
    return ".sqlite" in path


def _overlaid(failed: _Failed, now: bytes) -> bytes:
    """What an fsync that followed a failed one leaves: only what was written again is durable."""
    kept = bytearray(failed.durable)
    for start, end in failed.rewritten:
        if len(kept) < start:
            kept.extend(bytes(start - len(kept)))
        kept[start:end] = now[start:end]
    return bytes(kept[: len(now)])


def _torn(durable: bytes, now: bytes, random: Random, extent: float) -> bytes:
    """Some sectors as they are now, the others as they were durably."""
    length = len(durable) + round(extent * (len(now) - len(durable)))
    if extent in (0.0, 1.0):
        return now if extent else durable
    result = bytearray(durable[:length].ljust(length, b"\0"))
    for start in range(0, length, SECTOR_BYTES):
        end = min(start + SECTOR_BYTES, length)
        if now[start:end] != result[start:end] and random.random() < extent:
            result[start:end] = now[start:end].ljust(end - start, b"\0")
    return bytes(result)


FAULTS: Final[tuple[Callable[[Random], Fault], ...]] = (
    lambda random: Fault(
        frozenset(("write", "pwrite", "open", "mkdir")),
        errno.ENOSPC,
        0,
        random.choice((1, 3, 30)),
    ),
    lambda random: Fault(frozenset(("fsync",)), errno.EIO, 0, random.choice((1, 2))),
    lambda random: Fault(frozenset(("write", "pwrite")), errno.EIO, 0, random.choice((1, 2))),
    lambda random: Fault(frozenset(("rename", "open")), errno.EIO, 0, 1),
)
"""What disks do: full for a while, or failing at one place."""


@contextmanager
def scratch(name: str) -> Iterator[str]:
    """An empty directory of the same path each time, as paths are told in messages and these in
    logs. In memory where there is such a place; who wants it meanwhile waits."""
    parent = os.path.join(scratch_parent(), f"dm-simulation-{os.geteuid()}")
    os.makedirs(parent, 0o700, exist_ok=True)
    directory = os.path.join(parent, name)
    while True:
        fd = os.open(f"{directory}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink:
            break
        os.close(fd)  # whoever had it has removed it
    try:
        shutil.rmtree(directory, ignore_errors=True)
        os.mkdir(directory)
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        os.unlink(f"{directory}.lock")
        os.close(fd)


def scratch_parent() -> str:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else "/tmp"
