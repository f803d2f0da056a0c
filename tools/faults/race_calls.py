"""The kinds of system call that a tree is changed and read with: as the product makes them, and as
a program makes them that checks a path and then uses it."""

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from dmsync.core.objects import Entry, EntryKind
from dmsync.engine.restoring.file_writing import put_in_place, unlink_if_there
from dmsync.engine.restoring.live_directory import LiveDirectory, list_names
from dmsync.engine.restoring.metadata import Link, MetadataWriter
from dmsync.engine.restoring.names import NameRestorer
from dmsync.engine.restoring.result import RestoreResult
from dmsync.engine.safe_files import (
    TreeDirectories,
    handle_path,
    inode_handle,
    open_file,
    open_tree,
    read_xattrs,
    remove_name,
    temporary_name,
)
from dmsync.storage.stat_cache import Spool, StatCache
from tools.faults.sentinels import Outside

Action = Callable[["Ground", int], bytes | None]


class Ground:
    """A tree with the directory `flip` in it, which is sometimes a link to the outside."""

    def __init__(self, tree: str, outside: Outside) -> None:
        self.tree = tree
        self.outside = outside
        self.root_fd = open_tree(tree)
        self.directories = TreeDirectories(self.root_fd)
        self.look()

    def close(self) -> None:
        self.directories.close()
        os.close(self.root_fd)

    def look(self) -> None:
        self._before = self._stats()

    def is_outside_touched(self) -> bool:
        return self._stats() != self._before

    def _stats(self) -> tuple[object, ...]:
        found = []
        for path in (self.outside.path, self.outside.file, self.outside.path + "/below"):
            s = os.stat(path)
            found.append((s.st_mtime_ns, s.st_ctime_ns, s.st_mode, s.st_nlink, s.st_uid))
        return tuple(found)

    def fd(self) -> int:
        """The directory `flip`, opened as the product opens it. Raises OSError."""
        self.directories.open(b"")
        return self.directories.open(b"flip")

    def checked(self, name: str) -> str:
        """`flip/NAME` after a check that nothing on the way is a link. Raises OSError."""
        above = os.path.join(self.tree, "flip")
        path = os.path.join(above, name)
        if stat.S_ISLNK(os.lstat(above).st_mode):
            raise OSError("a link")
        try:
            is_link = stat.S_ISLNK(os.lstat(path).st_mode)
        except FileNotFoundError:
            return path
        if is_link:
            raise OSError("a link")
        return path


@dataclass(frozen=True)
class Call:
    """One kind; both return what they read, if they read anything."""

    real: Action
    naive: Action


def _new(number: int) -> bytes:
    return b"new-%d" % number


def _directory(ground: Ground) -> LiveDirectory:
    return LiveDirectory(b"flip", 0, ground.fd(), 0, False, False, {})


# --- files ---------------------------------------------------------------------------------------

_WRITE_FLAGS: Final = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def _write(ground: Ground, number: int) -> None:
    fd = os.open(b"leaf", _WRITE_FLAGS, dir_fd=ground.fd())
    try:
        os.pwrite(fd, b"inside", 0)
    finally:
        os.close(fd)


def _naive_write(ground: Ground, number: int) -> None:
    with open(ground.checked("leaf"), "r+b") as file:
        file.write(b"inside")


def _read(ground: Ground, number: int) -> bytes:
    fd = open_file(b"leaf", ground.fd())
    try:
        return os.read(fd, 4096)
    finally:
        os.close(fd)


def _naive_read(ground: Ground, number: int) -> bytes:
    with open(ground.checked("leaf"), "rb") as file:
        return file.read(4096)


# --- names ---------------------------------------------------------------------------------------


def _mkdir(ground: Ground, number: int) -> None:
    fd = ground.fd()
    os.mkdir(_new(number), 0o700, dir_fd=fd)
    remove_name(_new(number), fd, b"flip")


def _naive_mkdir(ground: Ground, number: int) -> None:
    os.mkdir(ground.checked(f"new-{number}"))


def _rename(ground: Ground, number: int) -> None:
    directory = _directory(ground)
    temporary = temporary_name()
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=directory.fd))
    put_in_place(directory, temporary, b"victim")


def _naive_rename(ground: Ground, number: int) -> None:
    path = os.path.join(ground.tree, f"made-{number}")
    os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o600))
    os.rename(path, ground.checked("victim"))


def _unlink(ground: Ground, number: int) -> None:
    fd = ground.fd()
    os.close(os.open(_new(0), os.O_CREAT | os.O_NOFOLLOW, 0o600, dir_fd=fd))
    unlink_if_there(_new(0), fd)
    remove_name(b"victim", ground.fd(), b"flip/victim")


def _naive_unlink(ground: Ground, number: int) -> None:
    path = ground.checked("victim")
    os.unlink(path)


def _rmdir(ground: Ground, number: int) -> None:
    fd = ground.fd()
    os.mkdir(_new(0), dir_fd=fd)
    os.mkdir(_new(0) + b"/in", dir_fd=fd)
    remove_name(b"below", ground.fd(), b"flip/below")
    remove_name(_new(0), ground.fd(), b"flip/new")


def _naive_rmdir(ground: Ground, number: int) -> None:
    made = os.path.join(ground.outside.path, "below", f"empty-{number}")
    os.mkdir(made)  # so that there is one to lose; it is no loss itself
    ground.look()
    try:
        os.rmdir(ground.checked(f"below/empty-{number}"))
    finally:
        if os.path.isdir(made):
            os.rmdir(made)
            ground.look()


def _symlink(ground: Ground, number: int) -> None:
    entry = Entry(_new(number), EntryKind.SYMLINK, 0o777, link_target=b"anywhere")
    _make_special(ground, entry)


def _naive_symlink(ground: Ground, number: int) -> None:
    os.symlink("anywhere", ground.checked(f"new-{number}"))


def _mkfifo(ground: Ground, number: int) -> None:
    _make_special(ground, Entry(_new(number), EntryKind.FIFO, 0o600))


def _naive_mkfifo(ground: Ground, number: int) -> None:
    os.mkfifo(ground.checked(f"new-{number}"))


def _make_special(ground: Ground, entry: Entry) -> None:
    directory = _directory(ground)
    name = temporary_name()
    restorer = NameRestorer.__new__(NameRestorer)
    restorer._metadata = _metadata()
    restorer._make_special(directory, entry, name)
    put_in_place(directory, name, entry.name)
    os.unlink(entry.name, dir_fd=directory.fd)


def _link(ground: Ground, number: int) -> None:
    fd = ground.fd()
    temporary = temporary_name()
    os.link(b"leaf", temporary, src_dir_fd=ground.fd(), dst_dir_fd=fd, follow_symlinks=False)
    os.unlink(temporary, dir_fd=fd)


def _naive_link(ground: Ground, number: int) -> None:
    path = os.path.join(ground.tree, f"linked-{number}")
    os.link(ground.checked("leaf"), path, follow_symlinks=True)
    os.unlink(path)


# --- metadata ------------------------------------------------------------------------------------


def _metadata() -> MetadataWriter:
    entry = Entry(b"", EntryKind.DIRECTORY, 0o755)
    return MetadataWriter(RestoreResult(StatCache(entry, Spool())), trusted=True, now_ns=1)


def _describe(ground: Ground, **wanted: object) -> None:
    fd = ground.fd()
    with inode_handle(b"leaf", fd) as handle:
        found = os.fstat(handle)
        is_link = stat.S_ISLNK(found.st_mode)
        entry = Entry(
            b"leaf",
            EntryKind.SYMLINK if is_link else EntryKind.FILE,
            stat.S_IMODE(found.st_mode),
            found.st_uid,
            found.st_gid,
            found.st_mtime_ns,
        )
        link = Link(fd, b"leaf" if is_link else None)
        changed = replace(entry, **wanted)  # type: ignore[arg-type]
        _metadata().of(b"flip", changed, handle, link=link).apply()


def _chmod(ground: Ground, number: int) -> None:
    _describe(ground, mode=0o600 + (number & 7))


def _chown(ground: Ground, number: int) -> None:
    _describe(ground, uid=1000 + number % 1000)


def _utimens(ground: Ground, number: int) -> None:
    _describe(ground, mtime_ns=10**18 + number)


def _setxattr(ground: Ground, number: int) -> None:
    _describe(ground, xattrs=((b"user.number", b"%d" % number),))


def _naive_chmod(ground: Ground, number: int) -> None:
    os.chmod(ground.checked("leaf"), 0o600 + (number & 7))


def _naive_chown(ground: Ground, number: int) -> None:
    os.chown(ground.checked("leaf"), 1000 + number % 1000, -1)


def _naive_utimens(ground: Ground, number: int) -> None:
    os.utime(ground.checked("leaf"), ns=(1, 10**18 + number))


def _naive_setxattr(ground: Ground, number: int) -> None:
    os.setxattr(ground.checked("leaf"), "user.number", b"%d" % number)


# --- looking -------------------------------------------------------------------------------------


def _look(ground: Ground, number: int) -> bytes:
    """What scanning asks; the names outside are not those inside."""
    from tools.faults.sentinels import CANARY

    fd = ground.fd()
    names, _ = list_names(fd)
    read_xattrs(handle_path(fd, b"leaf"), follow_symlinks=False)
    os.readlink(b"link", dir_fd=fd)
    return CANARY if b"fifo" in names else b""


def _naive_look(ground: Ground, number: int) -> bytes:
    from tools.faults.sentinels import CANARY

    path = ground.checked("leaf")
    if os.stat(path).st_size > 100:
        return CANARY
    return CANARY if "fifo" in os.listdir(os.path.dirname(path)) else b""


CALLS: Final[dict[str, Call]] = {
    "open to write": Call(_write, _naive_write),
    "open to read": Call(_read, _naive_read),
    "mkdir": Call(_mkdir, _naive_mkdir),
    "rename": Call(_rename, _naive_rename),
    "unlink": Call(_unlink, _naive_unlink),
    "rmdir": Call(_rmdir, _naive_rmdir),
    "symlink": Call(_symlink, _naive_symlink),
    "link": Call(_link, _naive_link),
    "chmod": Call(_chmod, _naive_chmod),
    "chown": Call(_chown, _naive_chown),
    "utimens": Call(_utimens, _naive_utimens),
    "setxattr": Call(_setxattr, _naive_setxattr),
    "mkfifo": Call(_mkfifo, _naive_mkfifo),
    "readlink, stat, listdir": Call(_look, _naive_look),
}
