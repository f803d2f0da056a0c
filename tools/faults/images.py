"""Filesystems in files: made once from a template, mounted through a loop device, cut like a disk
that loses power. For workers (tools/faults/apart.py), whose mounts end with them."""

import array
import fcntl
import os
import random
import struct
import subprocess
import time
from dataclasses import dataclass
from typing import Final

from tools.faults.apart import mount, unmount

_MIB: Final = 1024 * 1024
KINDS: Final = ("ext4", "xfs", "btrfs")
SIZES: Final = {"ext4": 96 * _MIB, "xfs": 300 * _MIB, "btrfs": 128 * _MIB}
"""XFS makes none below 300 MB; the images are sparse."""
_MAKERS: Final = {
    "ext4": "mkfs.ext4 -q -F -b 4096 -J size=8 -O ^resize_inode -m 0 "
    "-E nodiscard,lazy_itable_init=0,lazy_journal_init=0",
    "xfs": "mkfs.xfs -q -f -K -m reflink=1",
    "btrfs": "mkfs.btrfs -q -f -K -m single -d single",
}
_OPTIONS: Final = {"ext4": "", "xfs": "", "btrfs": "nodiscard,noacl"}
_MS_NOATIME: Final = 0x400

_SHUTDOWN: Final = 0x8004587D
_NO_LOG_FLUSH: Final = 2
_LOOP_CTL_ADD: Final = 0x4C80
_LOOP_CTL_REMOVE: Final = 0x4C81
_LOOP_CONFIGURE: Final = 0x4C0A
_LOOP_SET_CAPACITY: Final = 0x4C07
_BLKFLSBUF: Final = 0x1261
_LO_FLAGS_AUTOCLEAR: Final = 4
_LOOP_CONFIG_BYTES: Final = 304
_LOOP_FLAGS_AT: Final = 8 + 52
_NUMBERS: Final = (1_000, 30_000)
"""Of our loop devices: nobody else asks for these, so that one can be used again and again."""
_ATTEMPTS_MAX: Final = 50
_PAUSE_S: Final = 0.02
_COPY_BYTES: Final = _MIB
_ZEROS: Final = bytes(4096)


@dataclass(frozen=True)
class Extents:
    """What a sparse file holds: its size, and its parts that are not zero."""

    size: int
    parts: tuple[tuple[int, bytes], ...]

    @classmethod
    def of(cls, path: str) -> "Extents":
        parts = []
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            end = 0
            while end < size:
                try:
                    start = os.lseek(file.fileno(), end, os.SEEK_DATA)
                except OSError:  # nothing but a hole up to the end
                    break
                end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
                for offset in range(start, end, _COPY_BYTES):
                    data = os.pread(file.fileno(), min(_COPY_BYTES, end - offset), offset)
                    parts += _without_zeros(offset, data)
        return cls(size, tuple(parts))

    def write(self, path: str) -> None:
        """Make the file anew."""
        with open(path, "wb", buffering=0) as file:
            os.ftruncate(file.fileno(), self.size)
            for offset, data in self.parts:
                os.pwrite(file.fileno(), data, offset)


def _without_zeros(offset: int, data: bytes) -> list[tuple[int, bytes]]:
    """Runs of blocks that are not all zero."""
    runs: list[tuple[int, bytes]] = []
    start = -1
    for place in range(0, len(data) + len(_ZEROS), len(_ZEROS)):
        block = data[place : place + len(_ZEROS)]
        if block and block != _ZEROS[: len(block)]:
            start = place if start < 0 else start
        elif start >= 0:
            runs.append((offset + start, data[start:place]))
            start = -1
    return runs


def make_filesystem(kind: str, path: str) -> None:
    """A new, empty filesystem in a new sparse file. Raises CalledProcessError."""
    with open(path, "wb") as file:
        file.truncate(SIZES[kind])
    environment = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}
    command = [*_MAKERS[kind].split(), path]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)


def copy_sparse(source: str, target: str) -> None:
    """Make `target` hold what `source` does, holes as holes."""
    with open(source, "rb", buffering=0) as old, open(target, "wb", buffering=0) as new:
        size = os.fstat(old.fileno()).st_size
        os.ftruncate(new.fileno(), size)
        end = 0
        while end < size:
            try:
                start = os.lseek(old.fileno(), end, os.SEEK_DATA)
            except OSError:  # nothing but a hole up to the end
                return
            end = os.lseek(old.fileno(), start, os.SEEK_HOLE)
            for offset in range(start, end, _COPY_BYTES):
                count = min(_COPY_BYTES, end - offset)
                os.pwrite(new.fileno(), os.pread(old.fileno(), count, offset), offset)


class Disk:
    """A loop device on a file, kept for as long as this process wants: device numbers stay what
    they were when the filesystem on it is made anew and mounted again. It goes with the process."""

    def __init__(self, backing: str, number: int | None = None) -> None:
        """With `number` it is that loop device."""
        self.backing = backing
        self.number = random.randrange(*_NUMBERS) if number is None else number
        self._fd = -1
        if not os.path.exists(backing):
            with open(backing, "wb") as made:
                made.truncate(max(SIZES.values()))
        self.open()

    def open(self) -> None:
        """Put the file under the device, again after `close`. Raises OSError."""
        file = os.open(self.backing, os.O_RDWR | os.O_CLOEXEC)
        try:
            for _ in range(_ATTEMPTS_MAX):
                if self._attached(file):
                    return
                time.sleep(_PAUSE_S)
        finally:
            os.close(file)
        raise OSError(f"loop device {self.number} is not free")

    @property
    def path(self) -> str:
        return f"/dev/loop{self.number}"

    def _attached(self, file: int) -> bool:
        with open("/dev/loop-control", "rb") as control:
            try:
                fcntl.ioctl(control, _LOOP_CTL_ADD, self.number)
            except FileExistsError:
                pass  # it was used before
        if not os.path.exists(self.path):  # a /dev that no device manager keeps
            os.mknod(self.path, 0o60600, os.makedev(7, self.number))
        self._fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        config = bytearray(_LOOP_CONFIG_BYTES)
        struct.pack_into("=II", config, 0, file, 512)
        struct.pack_into("=I", config, _LOOP_FLAGS_AT, _LO_FLAGS_AUTOCLEAR)
        try:
            fcntl.ioctl(self._fd, _LOOP_CONFIGURE, bytes(config))
        except OSError:  # somebody else was quicker
            self.close()
            return False
        return True

    def fill(self, content: "Extents") -> None:
        """Make the disk hold `content`, of which it takes the size. Nothing on it is mounted."""
        content.write(self.backing)
        self.forget()

    def forget(self) -> None:
        """The file was changed behind the device: take its size, drop what is in the cache."""
        fcntl.ioctl(self._fd, _LOOP_SET_CAPACITY)
        fcntl.ioctl(self._fd, _BLKFLSBUF)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def remove(self) -> None:
        """Let the device go, too."""
        self.close()
        with open("/dev/loop-control", "rb") as control:
            try:
                fcntl.ioctl(control, _LOOP_CTL_REMOVE, self.number)
            except OSError:
                pass  # still in use: it stays, on nothing


class Mounted:
    """A filesystem on a disk, mounted at `path` until `close`."""

    def __init__(self, kind: str, disk: Disk, path: str) -> None:
        self.path = path
        os.makedirs(path, exist_ok=True)
        mount(disk.path, path, kind, _MS_NOATIME, _OPTIONS[kind])
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def cut(self) -> None:
        """What is not on the device by now never gets there. Not for btrfs."""
        fcntl.ioctl(self._fd, _SHUTDOWN, array.array("I", [_NO_LOG_FLUSH]))

    def close(self) -> None:
        """Unmount. Raises OSError while somebody uses it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            unmount(self.path)
