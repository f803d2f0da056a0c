"""System calls of a process, one by one: seen, let through, failed, cut short, or never made.

By the kernel's user notifications (seccomp_unotify(2), Linux 5.9): a filter in the victim stops
every call of a set, in whichever thread, fork or program it is, until the supervisor has answered.
So calls are counted over a whole command, which strace's `when=` does per thread only, and those
that are not of the set cost nothing. A SIGKILL while a call waits for its answer comes before it.
"""

import ctypes
import fcntl
import os
import socket
import struct
import sys
from collections.abc import Collection
from typing import Final, NamedTuple

NUMBERS: Final[dict[str, dict[str, int]]] = {
    "x86_64": {
        **{"read": 0, "write": 1, "pread64": 17, "pwrite64": 18, "readv": 19, "writev": 20},
        **{"preadv": 295, "pwritev": 296, "preadv2": 327, "pwritev2": 328},
        **{"open": 2, "creat": 85, "openat": 257, "openat2": 437},
        **{"stat": 4, "fstat": 5, "lstat": 6, "newfstatat": 262, "statx": 332, "access": 21},
        **{"faccessat": 269, "faccessat2": 439, "getdents64": 217, "readlink": 89},
        **{"readlinkat": 267, "statfs": 137, "fstatfs": 138},
        **{"getxattr": 191, "lgetxattr": 192, "fgetxattr": 193, "listxattr": 194},
        **{"llistxattr": 195, "flistxattr": 196},
        **{"fsync": 74, "fdatasync": 75, "sync": 162, "syncfs": 306, "sync_file_range": 277},
        **{"msync": 26, "truncate": 76, "ftruncate": 77, "fallocate": 285},
        **{"rename": 82, "renameat": 264, "renameat2": 316, "link": 86, "linkat": 265},
        **{"unlink": 87, "unlinkat": 263, "rmdir": 84, "mkdir": 83, "mkdirat": 258},
        **{"symlink": 88, "symlinkat": 266, "mknod": 133, "mknodat": 259},
        **{"chmod": 90, "fchmod": 91, "fchmodat": 268, "fchmodat2": 452},
        **{"chown": 92, "fchown": 93, "lchown": 94, "fchownat": 260},
        **{"utimensat": 280, "futimesat": 261, "utimes": 235, "utime": 132},
        **{"setxattr": 188, "lsetxattr": 189, "fsetxattr": 190, "removexattr": 197},
        **{"lremovexattr": 198, "fremovexattr": 199, "copy_file_range": 326, "sendfile": 40},
        **{"fcntl": 72, "flock": 73, "ioctl": 16, "sendto": 44, "sendmsg": 46},
        **{"recvfrom": 45, "recvmsg": 47, "pipe2": 293, "socketpair": 53, "dup": 32},
        **{"epoll_create1": 291, "eventfd2": 290},
    },
    "aarch64": {
        **{"read": 63, "write": 64, "pread64": 67, "pwrite64": 68, "readv": 65, "writev": 66},
        **{"preadv": 69, "pwritev": 70, "preadv2": 286, "pwritev2": 287},
        **{"openat": 56, "openat2": 437, "fstat": 80, "newfstatat": 79, "statx": 291},
        **{"faccessat": 48, "faccessat2": 439, "getdents64": 61, "readlinkat": 78},
        **{"statfs": 43, "fstatfs": 44, "getxattr": 8, "lgetxattr": 9, "fgetxattr": 10},
        **{"listxattr": 11, "llistxattr": 12, "flistxattr": 13},
        **{"fsync": 82, "fdatasync": 83, "sync": 81, "syncfs": 267, "sync_file_range": 84},
        **{"msync": 227, "truncate": 45, "ftruncate": 46, "fallocate": 47},
        **{"renameat": 38, "renameat2": 276, "linkat": 37, "unlinkat": 35, "mkdirat": 34},
        **{"symlinkat": 36, "mknodat": 33, "fchmod": 52, "fchmodat": 53, "fchmodat2": 452},
        **{"fchown": 55, "fchownat": 54, "utimensat": 88},
        **{"setxattr": 5, "lsetxattr": 6, "fsetxattr": 7, "removexattr": 14},
        **{"lremovexattr": 15, "fremovexattr": 16, "copy_file_range": 285, "sendfile": 71},
        **{"fcntl": 25, "flock": 32, "ioctl": 29, "sendto": 206, "sendmsg": 211},
        **{"recvfrom": 207, "recvmsg": 212, "pipe2": 59, "socketpair": 199, "dup": 23},
        **{"epoll_create1": 20, "eventfd2": 19},
    },
}
_ARCHITECTURES: Final = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_SECCOMP: Final = {"x86_64": 317, "aarch64": 277}
_PIDFD_GETFD: Final = 438

OPENING: Final = frozenset({"open", "creat", "openat", "openat2"})
WRITING: Final = frozenset({"write", "pwrite64", "writev", "pwritev", "pwritev2"})
READING: Final = frozenset({"read", "pread64", "readv", "preadv", "preadv2"})
SYNCING: Final = frozenset({"fsync", "fdatasync"})
NAMING: Final = frozenset(
    {"rename", "renameat", "renameat2", "link", "linkat", "unlink", "unlinkat", "rmdir", "mkdir"}
    | {"mkdirat", "symlink", "symlinkat", "mknod", "mknodat"}
)
MUTATING: Final = (
    WRITING
    | SYNCING
    | NAMING
    | {"sync", "syncfs", "sync_file_range", "msync", "truncate", "ftruncate", "fallocate"}
    | {"chmod", "fchmod", "fchmodat", "fchmodat2", "chown", "fchown", "lchown", "fchownat"}
    | {"utimensat", "futimesat", "utimes", "utime", "setxattr", "lsetxattr", "fsetxattr"}
    | {"removexattr", "lremovexattr", "fremovexattr", "copy_file_range", "sendfile"}
    | {"sendto", "sendmsg"}
)
"""Besides: opening to create or write, locks, and cloning by ioctl, which the filter picks out."""
LOOKING: Final = (
    READING
    | {"stat", "fstat", "lstat", "newfstatat", "statx", "access", "faccessat", "faccessat2"}
    | {"getdents64", "readlink", "readlinkat", "statfs", "fstatfs"}
    | {"getxattr", "lgetxattr", "fgetxattr", "listxattr", "llistxattr", "flistxattr"}
    | {"recvfrom", "recvmsg", "pipe2", "socketpair", "dup", "epoll_create1", "eventfd2"}
)
_WRITING_FLAGS: Final = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_LOCKING: Final = (fcntl.F_OFD_SETLK, fcntl.F_OFD_SETLKW)
_LOCKING_OF_SQLITE: Final = (fcntl.F_SETLK, fcntl.F_SETLKW)
"""Hundreds in a command, and nothing on disk changes by them: only of the larger set."""
_FICLONE: Final = (0x40049409, 0x4020940D)
"""FICLONE, FICLONERANGE."""


class Call(NamedTuple):
    """A call that waits for its answer. `thread` makes it; `arguments` are raw."""

    token: int
    thread: int
    name: str
    arguments: tuple[int, ...]

    @property
    def is_write(self) -> bool:
        return self.name in WRITING

    def path_of(self, descriptor: int) -> str:
        """What a descriptor of the victim names, as the kernel tells it; empty when none."""
        try:
            return os.readlink(f"/proc/{self.thread}/fd/{descriptor}")
        except OSError:
            return ""

    def text(self, address: int) -> str:
        """The path that a pointer of the victim points to."""
        data = self.memory(address, 4096, is_text=True)
        return os.fsdecode(data.partition(b"\0")[0])

    def memory(self, address: int, length: int, *, is_text: bool = False) -> bytes:
        if is_text:  # not beyond the page's end unless need be: there may be nothing
            length = min(length, 4096 - address % 4096) or length
        with open(f"/proc/{self.thread}/mem", "rb", buffering=0) as memory:
            data = os.pread(memory.fileno(), length, address)
            if is_text and b"\0" not in data:
                data += os.pread(memory.fileno(), 4096, address + length)
            return data

    def process(self) -> int:
        """The id of the process whose thread this is."""
        with open(f"/proc/{self.thread}/status") as status:
            for line in status:
                if line.startswith("Tgid:"):
                    return int(line.split()[1])
        return self.thread


# --- the filter ----------------------------------------------------------------------------------

_LOAD: Final = 0x20
_EQUAL: Final = 0x15
_ANY_BIT: Final = 0x45
_RETURN: Final = 0x06
_ALLOW: Final = 0x7FFF0000
_NOTIFY: Final = 0x7FC00000
_NUMBER_AT: Final = 0
_ARCHITECTURE_AT: Final = 4
_ARGUMENTS_AT: Final = 16


def _argument(index: int) -> int:
    return _ARGUMENTS_AT + 8 * index  # the lower half: both machines are little-endian


def _program(names: Collection[str], supervisor: int, *, all_opens: bool) -> bytes:
    """A classic BPF program that notifies of `names`; of opens, locks and ioctls those that may
    change something, or all opens. What is sent to the descriptor `supervisor` goes through."""
    numbers = NUMBERS[os.uname().machine]
    steps: list[tuple[int, int, int, int]] = [
        (_LOAD, 0, 0, _ARCHITECTURE_AT),
        (_EQUAL, 1, 0, _ARCHITECTURES[os.uname().machine]),
        (_RETURN, 0, 0, _ALLOW),
        (_LOAD, 0, 0, _NUMBER_AT),
    ]
    steps += [
        (_EQUAL, 0, 4, numbers["sendmsg"]),
        (_LOAD, 0, 0, _argument(0)),
        (_EQUAL, 0, 1, supervisor),
        (_RETURN, 0, 0, _ALLOW),
        (_LOAD, 0, 0, _NUMBER_AT),
    ]
    for name in sorted(names):
        if name in numbers:
            steps += [(_EQUAL, 0, 1, numbers[name]), (_RETURN, 0, 0, _NOTIFY)]
    for name, index in (("open", 1), ("openat", 2)):
        if name in numbers:
            judged = [(_RETURN, 0, 0, _NOTIFY)]
            if not all_opens:
                judged = [
                    (_LOAD, 0, 0, _argument(index)),
                    (_ANY_BIT, 0, 1, _WRITING_FLAGS),
                    (_RETURN, 0, 0, _NOTIFY),
                    (_RETURN, 0, 0, _ALLOW),
                ]
            steps += [(_EQUAL, 0, len(judged), numbers[name]), *judged]
    locking = _LOCKING + _LOCKING_OF_SQLITE if all_opens else _LOCKING
    for name, wanted in (("fcntl", locking), ("ioctl", _FICLONE)):
        judged = [(_LOAD, 0, 0, _argument(1))]
        for value in wanted:
            judged += [(_EQUAL, 0, 1, value), (_RETURN, 0, 0, _NOTIFY)]
        judged.append((_RETURN, 0, 0, _ALLOW))
        steps += [(_EQUAL, 0, len(judged), numbers[name]), *judged]
    steps.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("HBBI", *step) for step in steps)


class _Filter(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("steps", ctypes.c_void_p))


_NO_NEW_PRIVILEGES: Final = 38
_SET_MODE_FILTER: Final = 1
_NEW_LISTENER: Final = 8
_OWN_DESCRIPTOR: Final = 900
_libc = ctypes.CDLL(None, use_errno=True)


def is_supported() -> bool:
    """Does this machine have numbers here, and a kernel for it?"""
    return sys.platform == "linux" and os.uname().machine in NUMBERS


def be_supervised(supervisor: socket.socket, names: Collection[str], *, all_opens: bool) -> None:
    """From now on calls of this process and all it starts wait for the supervisor at the other end
    of the socket. Raises OSError."""
    # A number that nothing else will get: it stays out of the filter.
    own = fcntl.fcntl(supervisor.fileno(), fcntl.F_DUPFD_CLOEXEC, _OWN_DESCRIPTOR)
    steps = _program(names, own, all_opens=all_opens)
    buffer = ctypes.create_string_buffer(steps, len(steps))
    program = _Filter(len(steps) // 8, ctypes.addressof(buffer))
    _libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    listener = _libc.syscall(
        _SECCOMP[os.uname().machine], _SET_MODE_FILTER, _NEW_LISTENER, ctypes.byref(program)
    )
    if listener < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), "seccomp")
    with socket.socket(fileno=own) as sender:
        socket.send_fds(sender, [b"x"], [listener])
    os.close(listener)


# --- the supervisor ------------------------------------------------------------------------------

_RECEIVE: Final = 0xC0502100
_SEND: Final = 0xC0182101
_NOTIFICATION: Final = "QIIiIQ6Q"
_NOTIFICATION_BYTES: Final = struct.calcsize(_NOTIFICATION)
_GO_ON: Final = 1


class Listener:
    """The supervisor's end: calls come out of it, and answers go in."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.has_spoken = False
        self._names = {number: name for name, number in NUMBERS[os.uname().machine].items()}

    def next_call(self) -> Call | None:
        """The next waiting call; None when its thread was killed meanwhile."""
        buffer = bytearray(_NOTIFICATION_BYTES)
        try:
            fcntl.ioctl(self.descriptor, _RECEIVE, buffer)
        except FileNotFoundError:
            return None
        token, thread, _, number, _, _, *arguments = struct.unpack(_NOTIFICATION, buffer)
        return Call(token, thread, self._names.get(number, str(number)), tuple(arguments))

    def let_through(self, call: Call) -> None:
        self._answer(call, 0, 0, _GO_ON)

    def fail(self, call: Call, number: int) -> None:
        self._answer(call, 0, -number, 0)

    def succeed(self, call: Call, value: int) -> None:
        """The call returns `value` without being made."""
        self._answer(call, value, 0, 0)

    def cut_short(self, call: Call) -> bool:
        """Do half of a read or write in the victim's stead; False when there is nothing to halve,
        and the call still waits."""
        length = call.arguments[2]
        if call.name not in ("write", "pwrite64", "read", "pread64") or length < 2:
            return False
        length //= 2
        descriptor = _descriptor_of(call.process(), call.arguments[0])
        try:
            if call.name == "write":
                count = os.write(descriptor, call.memory(call.arguments[1], length))
            elif call.name == "pwrite64":
                data = call.memory(call.arguments[1], length)
                count = os.pwrite(descriptor, data, call.arguments[3])
            else:
                is_placed = call.name == "pread64"
                data = (
                    os.pread(descriptor, length, call.arguments[3])
                    if is_placed
                    else os.read(descriptor, length)
                )
                with open(f"/proc/{call.thread}/mem", "r+b", buffering=0) as memory:
                    os.pwrite(memory.fileno(), data, call.arguments[1])
                count = len(data)
        except OSError as exc:
            self.fail(call, exc.errno or 5)
            return True
        finally:
            os.close(descriptor)
        self.succeed(call, count)
        return True

    def _answer(self, call: Call, value: int, error: int, flags: int) -> None:
        try:
            fcntl.ioctl(
                self.descriptor, _SEND, struct.pack("QqiI", call.token, value, error, flags)
            )
        except FileNotFoundError:
            pass  # it was killed, or a signal came


def _descriptor_of(process: int, number: int) -> int:
    """A descriptor of ours for one of another process."""
    pidfd = os.pidfd_open(process)
    try:
        got: int = _libc.syscall(_PIDFD_GETFD, pidfd, number, 0)
    finally:
        os.close(pidfd)
    if got < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return got
