"""System calls on a tree that somebody else may be changing, a hostile container included.

Every path is walked from the tree's root descriptor, one component at a time with O_NOFOLLOW, so
that a directory swapped for a symlink is an error and never a way out (notes: lstat-then-open
loses that race one time in six). Attributes go through `/proc/self/fd`, which names exactly the
inode that was opened.
"""

import ctypes
import errno
import os
import re
import signal
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from dmsync.errors import StorageFailed, StorageFull

DIRECTORY_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ_FLAGS: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
_TEMPORARY_PREFIX: Final = b".dm-tmp-"
_TEMPORARY: Final = re.compile(rb"\.dm-tmp-[0-9a-f]{16}")
OPEN_LEVELS_MAX: Final = 64
"""Directory descriptors a walk holds; deeper ones are opened for as long as they are used."""

_libc = ctypes.CDLL(None, use_errno=True)
_FALLOC_FL_KEEP_SIZE: Final = 1
_FALLOC_FL_PUNCH_HOLE: Final = 2

GONE: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ESTALE, errno.ENXIO})
"""What opening a name says when it went away or became something else after it was listed."""
DENIED: Final = frozenset({errno.EACCES, errno.EPERM})


def temporary_name() -> bytes:
    """A new name for restore to use while it writes: 16 random hex digits behind a prefix."""
    return _TEMPORARY_PREFIX + os.urandom(8).hex().encode()


def is_temporary(name: bytes) -> bool:
    """Is this such a name, of whichever run? Capture never sees them, restore removes them; a
    file of the user's that merely begins so is none."""
    return name.startswith(_TEMPORARY_PREFIX) and _TEMPORARY.fullmatch(name) is not None


def translated(exc: OSError, what: str) -> StorageFailed | StorageFull:
    """The typed error for a refused system call; `what` says what was being done."""
    message = f"{what}: {exc.strerror or exc}"
    if exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageFull(message, errno=exc.errno)
    return StorageFailed(message, errno=exc.errno)


def shown(path: bytes) -> str:
    """`path` for a message: escaped, one line, no control characters."""
    text = path.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def open_tree(tree_path: str | bytes) -> int:
    """Descriptor of the tree's own directory; the path to it is the user's and may hold links.

    Raises:
        StorageFailed: it cannot be opened.
    """
    try:
        return os.open(tree_path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as exc:
        raise translated(exc, f"cannot open the tree {shown(os.fsencode(tree_path))}") from exc


def open_file(name: bytes, directory_fd: int) -> int:
    """Open for reading without waiting, following or moving the access time. Raises OSError."""
    try:
        return os.open(name, _READ_FLAGS | os.O_NOATIME, dir_fd=directory_fd)
    except PermissionError:  # O_NOATIME is for owners only
        return os.open(name, _READ_FLAGS, dir_fd=directory_fd)


def handle_path(fd: int, name: bytes = b"") -> bytes:
    """A path to exactly the inode open as `fd`, or to `name` in that directory."""
    base = b"/proc/self/fd/%d" % fd
    return base + b"/" + name if name else base


@contextmanager
def inode_handle(name: bytes, directory_fd: int) -> Iterator[int]:
    """An O_PATH descriptor of `name` itself, whatever it is. Raises OSError."""
    fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory_fd)
    try:
        yield fd
    finally:
        os.close(fd)


class TreeDirectories:
    """Opens directories of a tree by path, keeping the descriptors of the current branch open."""

    def __init__(self, root_fd: int) -> None:
        self._root_fd = root_fd
        self._names: list[bytes] = []
        self._fds: list[int] = []
        self._deep_fd = -1

    def open(self, path: bytes) -> int:
        """Descriptor of the directory `path` below the root; valid until the next call.

        Raises:
            OSError: it is not there, or a component is no directory or a symlink.
        """
        names = path.split(b"/") if path else []
        common = 0
        for ours, wanted in zip(self._names, names, strict=False):
            if ours != wanted:
                break
            common += 1
        self._drop_below(common)
        for name in names[common:OPEN_LEVELS_MAX]:
            self._fds.append(os.open(name, DIRECTORY_FLAGS, dir_fd=self._last()))
            self._names.append(name)
        for name in names[OPEN_LEVELS_MAX:]:
            above = self._deep_fd
            self._deep_fd = os.open(
                name, DIRECTORY_FLAGS, dir_fd=above if above >= 0 else self._last()
            )
            if above >= 0:
                os.close(above)
        return self._deep_fd if self._deep_fd >= 0 else self._last()

    def _last(self) -> int:
        return self._fds[-1] if self._fds else self._root_fd

    def _drop_below(self, level: int) -> None:
        if self._deep_fd >= 0:
            os.close(self._deep_fd)
            self._deep_fd = -1
        while len(self._fds) > level:
            os.close(self._fds.pop())
            self._names.pop()

    def close(self) -> None:
        """Close what is open, except the root, which belongs to the caller."""
        self._drop_below(0)


def sync_filesystem(fd: int) -> None:
    """syncfs(2): everything written on the filesystem of `fd` is durable on return.

    Raises:
        StorageFailed: the kernel could not write it.
    """
    if _libc.syncfs(fd) != 0:
        number = ctypes.get_errno()
        raise translated(OSError(number, os.strerror(number)), "cannot sync the tree")


def filesystem_now_ns(fd: int, fallback_ns: int) -> int:
    """The time by the clock that stamps files on the filesystem of directory `fd`.

    Read from a nameless file, which moves no directory's time; `fallback_ns` where that fails.
    """
    try:
        probe = os.open(b".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=fd)
    except OSError:
        return fallback_ns
    try:
        return os.fstat(probe).st_mtime_ns
    finally:
        os.close(probe)


def keeps_no_pages(device: int) -> bool:
    """True for memory filesystems, where stores through mmap never move a file's times again.

    They have no writeback that would write-protect a page and so catch the next store.
    """
    wanted = b"%d:%d" % (os.major(device), os.minor(device))
    try:
        with open("/proc/self/mountinfo", "rb") as mounts:
            for line in mounts:
                fields = line.split(b" ")
                if fields[2] == wanted:
                    return fields[fields.index(b"-") + 1] in (b"tmpfs", b"ramfs", b"devtmpfs")
    except OSError:
        return False
    return False


_PROMPT_FILESYSTEMS: Final = frozenset({0xEF53, 0x58465342, 0x9123683E, 0x01021994, 0x858458F6})
"""ext2 to ext4, XFS, btrfs, tmpfs, ramfs."""
_STATFS_BYTES: Final = 256


def moves_times_promptly(fd: int) -> bool:
    """True where the first store through mmap to a clean page moves the file's times at once.

    Others (ZFS, CIFS, 9p; overlayfs, which may lie on any) may do so only when the page is written
    back, so that a stat says nothing before a sync.
    """
    buffer = ctypes.create_string_buffer(_STATFS_BYTES)
    if _libc.fstatfs(fd, buffer) != 0:
        return False
    return ctypes.c_long.from_buffer(buffer).value & 0xFFFFFFFF in _PROMPT_FILESYSTEMS


def die_with_parent() -> None:
    """The kernel is to kill this process when the one that started it ends."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


_PR_SET_PDEATHSIG: Final = 1


def punch_hole(fd: int, offset: int, length: int) -> bool:
    """Make a run of an open file a hole; False where the filesystem cannot."""
    mode = _FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE
    result: int = _libc.fallocate(
        fd, mode, ctypes.c_int64(offset).value, ctypes.c_int64(length).value
    )
    return result == 0


_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]

# --- extended attributes -------------------------------------------------------------------------

_KEPT_ATTRIBUTES: Final = frozenset(
    {"security.capability", "system.posix_acl_access", "system.posix_acl_default"}
)
"""Besides `user.*`. Others belong to the machine and its policy (security.selinux, trusted.*)."""

Xattrs = tuple[tuple[bytes, bytes], ...]


def _is_kept(name: str) -> bool:
    return name.startswith("user.") or name in _KEPT_ATTRIBUTES


def read_xattrs(target: int | bytes, *, follow_symlinks: bool = True) -> Xattrs:
    """Attributes worth keeping of a descriptor or a `handle_path`, sorted by name.

    Raises:
        OSError: the inode went away or may not be read.
    """
    try:
        names = os.listxattr(target, follow_symlinks=follow_symlinks)
    except OSError as exc:
        if exc.errno in (errno.ENOTSUP, errno.ENOSYS, errno.EPERM):
            return ()
        raise
    if not names:  # nearly every file of most trees
        return ()
    found = []
    for name in names:
        if _is_kept(name):
            try:
                value = os.getxattr(target, name, follow_symlinks=follow_symlinks)
            except OSError as exc:
                if exc.errno in (errno.ENODATA, errno.ENOTSUP):
                    continue
                raise
            found.append((os.fsencode(name), value))
    return tuple(sorted(found))


# --- removing ------------------------------------------------------------------------------------


def remove_name(name: bytes, directory_fd: int, path: bytes) -> None:
    """Remove `name`, and all below it when it is a directory, iteratively; never through a link.

    Raises:
        StorageFailed: something is mounted there, or the system refused.
    """
    try:
        try:
            os.unlink(name, dir_fd=directory_fd)
        except IsADirectoryError:
            _remove_directory(name, directory_fd, path)
        except PermissionError:  # POSIX allows EPERM for a directory
            if not stat.S_ISDIR(os.lstat(handle_path(directory_fd, name)).st_mode):
                raise
            _remove_directory(name, directory_fd, path)
    except FileNotFoundError:
        return
    except OSError as exc:
        raise translated(exc, f"cannot remove {shown(path)}") from exc


def remove_tree(path: bytes) -> None:
    """Remove a directory of any depth with all below it; nothing when it is not there.

    Raises:
        StorageFailed: something is mounted in it, or the system refused.
    """
    above, _, name = os.path.abspath(path).rpartition(b"/")
    fd = open_tree(above or b"/")
    try:
        remove_name(name, fd, path)
    finally:
        os.close(fd)


def _remove_directory(name: bytes, directory_fd: int, path: bytes) -> None:
    """Empty and remove one directory, the deepest directories first.

    What lies deeper than a walk holds open is moved up first, so that a chain of 100,000
    directories takes as many steps and not their square.
    """
    waiting = [name]
    while waiting:
        waiting.extend(_remove_levels(waiting.pop(), directory_fd, path))


def _remove_levels(name: bytes, directory_fd: int, path: bytes) -> list[bytes]:
    """Remove the directory `name`; the names beside it that its deepest parts got."""
    device = os.fstat(directory_fd).st_dev
    directories = TreeDirectories(directory_fd)
    moved: list[bytes] = []
    try:
        trail = [name]
        below = [_unlink_files(directories.open(name), device, path)]
        while trail:
            if below[-1]:
                trail.append(below[-1].pop())
                fd = directories.open(b"/".join(trail))
                left = _unlink_files(fd, device, path)
                if len(trail) >= OPEN_LEVELS_MAX:
                    left = _move_up(left, fd, directory_fd, moved)
                below.append(left)
            else:
                below.pop()
                last = trail.pop()
                os.rmdir(last, dir_fd=directories.open(b"/".join(trail)))
    finally:
        directories.close()
    return moved


def _move_up(names: list[bytes], fd: int, directory_fd: int, moved: list[bytes]) -> list[bytes]:
    """Move directories into `directory_fd` under temporary names; those that may not be moved."""
    left = []
    for name in names:
        temporary = temporary_name()
        try:
            os.rename(name, temporary, src_dir_fd=fd, dst_dir_fd=directory_fd)
            moved.append(temporary)
        except OSError:  # a plain user needs write permission on it, a mount point stays
            left.append(name)
    return left


def _unlink_files(fd: int, device: int, path: bytes) -> list[bytes]:
    """Remove what is no directory in `fd`; the names of the directories that are left."""
    if os.fstat(fd).st_dev != device:
        raise StorageFailed(f"{shown(path)} holds a mount point and is not removed")
    make_writable(fd)
    left = []
    for text in os.listdir(fd):
        name = os.fsencode(text)
        try:
            os.unlink(name, dir_fd=fd)
        except (IsADirectoryError, PermissionError):
            left.append(name)
        except FileNotFoundError:
            continue
    return left


def make_writable(fd: int) -> None:
    """Give the owner of a directory the right to change it; root needs none."""
    mode = os.fstat(fd).st_mode
    if mode & 0o700 != 0o700 and os.geteuid() != 0:
        try:
            os.fchmod(fd, stat.S_IMODE(mode) | 0o700)
        except PermissionError:
            return
