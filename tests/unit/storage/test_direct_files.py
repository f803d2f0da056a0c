"""Appending and reading past the page cache give the bytes that any other way gives."""

import errno
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dmsync.storage import direct_files
from dmsync.storage.direct_files import BUFFER_BYTES, DIRECT_FROM_BYTES, Appender, InOrder

MIB = 1024 * 1024


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    opened = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT | os.O_EXCL)
    yield opened
    os.close(opened)


def cached_bytes(fd: int) -> int:
    count = direct_files._cached_pages_count()
    pages = None if count is None else count(fd, 0, os.fstat(fd).st_size)
    if pages is None:
        pytest.skip("the kernel does not tell what is cached")
    return pages * 4096


def goes_past_the_cache(directory: Path) -> bool:
    try:
        os.close(os.open(directory / "probe", os.O_RDWR | os.O_CREAT | os.O_DIRECT))
    except OSError:
        return False
    return True


def content(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)


def random_parts(seed: int) -> list[bytes]:
    source = random.Random(seed)
    sizes = (1, 52, 4095, 4096, 4097, 70_000, 512 * 1024, BUFFER_BYTES, 3 * MIB)
    return [source.randbytes(source.choice(sizes)) for _ in range(source.randrange(8, 24))]


@pytest.mark.parametrize("seed", range(8))
def test_what_is_flushed_is_in_the_file(fd: int, seed: int) -> None:
    appender, expected = Appender(fd), b""
    for number, part in enumerate(random_parts(seed)):
        appender.append(part, len(expected), past_cache=number % 7 != seed)
        expected += part
        if (number + seed) % 3 == 0:
            appender.flush()
            assert content(fd) == expected
    appender.flush()
    appender.flush()
    assert content(fd) == expected
    appender.close()
    assert content(fd) == expected


def test_a_file_that_ends_anywhere_is_continued(fd: int) -> None:
    first, second = random.Random(1).randbytes(DIRECT_FROM_BYTES + 777), b"s" * (3 * MIB)
    os.pwrite(fd, first, 0)
    appender = Appender(fd)
    appender.append(second, len(first), past_cache=True)
    appender.flush()
    assert content(fd) == first + second


def test_only_the_beginning_and_the_end_go_through_the_page_cache(tmp_path: Path, fd: int) -> None:
    if not goes_past_the_cache(tmp_path):
        pytest.skip("this filesystem knows only the page cache")
    appender, part = Appender(fd), random.Random(2).randbytes(512 * 1024)
    for number in range(64):
        appender.append(part, number * len(part), past_cache=True)
    appender.flush()
    assert cached_bytes(fd) <= DIRECT_FROM_BYTES + 4096
    assert content(fd) == 64 * part


def test_what_may_be_needed_soon_stays_in_the_page_cache(fd: int) -> None:
    part = random.Random(5).randbytes(MIB)
    appender = Appender(fd)
    for number in range(16):
        appender.append(part, number * MIB)
    assert cached_bytes(fd) == 16 * MIB


@pytest.mark.parametrize("refused_from", [1, 2])
def test_a_filesystem_that_refuses_gets_the_bytes_otherwise(
    fd: int, monkeypatch: pytest.MonkeyPatch, refused_from: int
) -> None:
    """It may refuse at any write or read, not only when the file is opened."""
    direct_fds: set[int] = set()
    calls = []

    def refuse(real: Callable[..., int]) -> Callable[..., int]:
        def call(to: int, *rest: object) -> int:
            if to in direct_fds:
                calls.append(to)
                if len(calls) >= refused_from:
                    raise OSError(errno.EINVAL, "Invalid argument")
            return real(to, *rest)

        return call

    opened_directly = direct_files.opened_directly

    def note(of: int, flags: int) -> int:
        found = opened_directly(of, flags)
        direct_fds.add(found)
        return found

    monkeypatch.setattr(direct_files, "opened_directly", note)
    monkeypatch.setattr(os, "pwrite", refuse(os.pwrite))
    monkeypatch.setattr(os, "preadv", refuse(os.preadv))
    parts = [random.Random(number).randbytes(3 * MIB + 5) for number in range(4)]
    appender, size = Appender(fd), 0
    for part in parts:
        appender.append(part, size, past_cache=True)
        size += len(part)
    appender.flush()
    if not direct_fds - {-1}:
        pytest.skip("this filesystem knows only the page cache")
    assert len(calls) == refused_from
    assert content(fd) == b"".join(parts)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    calls.clear()
    assert in_order(fd, 100_000) == b"".join(parts)


def test_an_error_of_the_disk_is_told_and_tried_again(
    tmp_path: Path, fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not goes_past_the_cache(tmp_path):
        pytest.skip("here nothing is held back")
    appender, data = Appender(fd), random.Random(3).randbytes(7 * MIB + 99)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):

        def full(*_: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        appender.append(data[: 5 * MIB], 0, past_cache=True)
        patch.setattr(os, "pwrite", full)
        appender.flush()
    appender.append(data[5 * MIB :], 5 * MIB, past_cache=True)
    appender.flush()
    assert content(fd) == data


# --- reading --------------------------------------------------------------------------------------


def in_order(fd: int, step: int) -> bytes:
    reader, found = InOrder(fd), b""
    while part := reader.held(len(found)) or reader.load(len(found)):
        found += bytes(part[:step])
    reader.close()
    return found


@pytest.mark.parametrize("is_cached", [True, False])
@pytest.mark.parametrize("size", [0, 1, 4096, BUFFER_BYTES - 1, BUFFER_BYTES, 5 * MIB + 321])
def test_a_file_is_read_in_order(fd: int, size: int, is_cached: bool) -> None:
    data = random.Random(size).randbytes(size)
    os.pwrite(fd, data, 0)
    if not is_cached:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    assert in_order(fd, 77_777) == data


def test_what_is_not_cached_is_read_past_the_cache(tmp_path: Path, fd: int) -> None:
    if not goes_past_the_cache(tmp_path):
        pytest.skip("this filesystem knows only the page cache")
    data = random.Random(4).randbytes(16 * MIB)
    os.pwrite(fd, data, 0)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    assert cached_bytes(fd) == 0
    assert in_order(fd, 100_000) == data
    assert cached_bytes(fd) == 0


def test_what_was_appended_meanwhile_is_loaded(fd: int) -> None:
    reader = InOrder(fd)
    os.pwrite(fd, b"first", 0)
    assert reader.load(0) == b"first"
    os.pwrite(fd, b"second", 5)
    assert reader.held(5) == b""
    assert reader.load(3) == b"stsecond"
