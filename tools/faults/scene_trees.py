"""The files of a scene: small, but of each kind, with one that is changed in place like a database.

Deterministic: the same for each template.
"""

import hashlib
import os
from typing import Final

PAGE_BYTES: Final = 8192
DATABASE_PAGES: Final = 37


def page(number: int, version: int) -> bytes:
    """A database page: a header, rows that repeat, and some that do not."""
    noise = hashlib.shake_128(b"%d %d" % (number, version)).digest(PAGE_BYTES // 4)
    rows = b"".join(b"row %06d balance %08d;" % (number, n) for n in range(400))
    return (b"PAGE%08d%08d" % (number, version) + noise + rows)[:PAGE_BYTES]


def write(directory: str, name: str, data: bytes) -> None:
    path = os.path.join(directory, name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(data)


def write_first(directory: str) -> None:
    """Some 20 names: the first state."""
    pages = b"".join(page(number, 0) for number in range(DATABASE_PAGES))
    write(directory, "data.db", pages)
    write(directory, "app.conf", b"listen 5432\n")
    write(directory, "empty", b"")
    write(directory, "bin/run", b"#!/bin/sh\nexec true\n")
    os.chmod(os.path.join(directory, "bin/run"), 0o755)
    write(directory, "logs/2026/a.log", b"started\n" * 50)
    for number in range(8):
        write(directory, f"notes/{number:02}", b"note %d\n" % number * 5)
    write(directory, "odd\udcff name", b"bytes that are no text")
    write(directory, "was-directory/inside", b"soon gone")
    os.link(os.path.join(directory, "app.conf"), os.path.join(directory, "app.conf.linked"))
    os.symlink("app.conf", os.path.join(directory, "link"))
    with open(os.path.join(directory, "sparse"), "wb") as file:
        file.truncate(512 * 1024)
        file.seek(300 * 1024)
        file.write(b"in the middle of nothing")


def write_second(directory: str) -> None:
    """A round of changes: pages in place, appended lines, new small files, what vanished and what
    became something else."""
    with open(os.path.join(directory, "data.db"), "r+b") as file:
        for number in (2, 3, 20, DATABASE_PAGES):
            file.seek(number * PAGE_BYTES)
            file.write(page(number, 1))
    with open(os.path.join(directory, "logs/2026/a.log"), "ab") as file:
        file.write(b"went on\n" * 20)
    for number in range(40):
        write(directory, f"many/{number % 4}/{number:03}", b"small file %d\n" % number)
    for number in (1, 2):
        os.unlink(os.path.join(directory, f"notes/{number:02}"))
    os.chmod(os.path.join(directory, "bin/run"), 0o700)
    os.unlink(os.path.join(directory, "link"))
    os.symlink("logs/2026/a.log", os.path.join(directory, "link"))
    os.unlink(os.path.join(directory, "was-directory/inside"))
    os.rmdir(os.path.join(directory, "was-directory"))
    write(directory, "was-directory", b"a file now")


def write_aside(directory: str) -> None:
    """Changes that go well with those of `write_second`."""
    write(directory, "notes/06", b"changed on the side\n")
    write(directory, "extra/first", b"only on the side")
    write(directory, "extra/second", page(99, 2) * 3)
    os.unlink(os.path.join(directory, "empty"))
