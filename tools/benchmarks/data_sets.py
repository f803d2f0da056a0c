"""The data that programs are measured on."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Final

from tests.support.postgresql import PostgresServer

CLIENTS: Final = 4
WRITE_BYTES: Final = 1 << 22
FILES_OF_A_DIRECTORY: Final = 1000


class Database:
    """A stopped PostgreSQL directory with pgbench's tables, which can live on for a while."""

    def __init__(self, data: Path) -> None:
        self.data = data

    @classmethod
    def make(cls, data: Path, scale: int) -> "Database":
        """`initdb` and `pgbench -i`, then stopped."""
        with PostgresServer(data) as server:
            server.initdb()
            server.start()
            server.pgbench("-i", "-q", "-s", str(scale))
            server.stop()
        return cls(data)

    def copied_to(self, data: Path) -> "Database":
        """A copy with a life of its own."""
        subprocess.run(["cp", "-a", self.data, data], check=True)
        return Database(data)

    def advance(self, transactions: int) -> None:
        """Start, run pgbench's transactions, stop."""
        with PostgresServer(self.data) as server:
            server.start()
            server.pgbench("-n", "-c", str(CLIENTS), "-t", str(transactions // CLIENTS))
            server.stop()


def data_bytes(directory: Path) -> int:
    """Bytes of the regular files below a directory."""
    return sum(
        os.lstat(os.path.join(folder, name)).st_size
        for folder, _, names in os.walk(directory)
        for name in names
        if not os.path.islink(os.path.join(folder, name))
    )


def count_entries(directory: Path) -> int:
    """Files, directories and all else below a directory, itself included."""
    return 1 + sum(len(folders) + len(names) for _, folders, names in os.walk(directory))


def make_incompressible(directory: Path, size_bytes: int) -> None:
    """Random bytes in four files."""
    directory.mkdir()
    for number in range(4):
        with (directory / f"random{number}").open("wb") as file:
            left = size_bytes // 4
            while left > 0:
                left -= file.write(os.urandom(min(left, WRITE_BYTES)))


def make_files(directory: Path, count: int, *, flat: bool) -> None:
    """Empty files: all in one directory, or a thousand in each."""
    directory.mkdir()
    folder = directory
    for number in range(count):
        if not flat and number % FILES_OF_A_DIRECTORY == 0:
            folder = directory / f"{number // FILES_OF_A_DIRECTORY:04}"
            folder.mkdir()
        os.close(os.open(folder / f"{number:07}", os.O_CREAT | os.O_WRONLY, 0o644))


def require_same(restored: Path, original: Path) -> None:
    """Raise RuntimeError unless two directories hold the same files with the same bytes."""
    compare = ["diff", "--recursive", "--brief", "--no-dereference", str(restored), str(original)]
    done = subprocess.run(compare, capture_output=True, text=True, errors="replace")
    if done.returncode != 0:
        raise RuntimeError(f"{restored} is not {original}:\n{(done.stdout + done.stderr)[:2000]}")


def remove(directory: Path) -> None:
    """Remove a directory and everything in it, if it is there."""
    if directory.exists():
        shutil.rmtree(directory)
