"""Writing past the page cache gives the bytes that any other way of writing gives."""

import errno
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from dmsync.engine.restoring.direct_writing import DirectWriter, aligned_buffer

MIB = 1024 * 1024
Part = bytes | int
"""Content, or so many zeros."""


def write(path: Path, parts: list[Part]) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        writer = DirectWriter(fd, aligned_buffer())
        for part in parts:
            if isinstance(part, int):
                writer.write_zeros(part)
            else:
                writer.write(part)
        writer.finish()
    finally:
        os.close(fd)


def whole(parts: list[Part]) -> bytes:
    return b"".join(bytes(part) if isinstance(part, int) else part for part in parts)


def random_parts(seed: int) -> list[Part]:
    source = random.Random(seed)
    parts: list[Part] = []
    for _ in range(source.randrange(1, 12)):
        length = source.choice((1, 4095, 4096, 4097, 8192, MIB - 1, MIB, source.randrange(3 * MIB)))
        parts.append(length if source.random() < 0.4 else source.randbytes(length))
    return parts


@pytest.mark.parametrize("seed", range(12))
def test_any_parts_give_their_bytes(tmp_path: Path, seed: int) -> None:
    parts = random_parts(seed)
    write(tmp_path / "file", parts)
    assert (tmp_path / "file").read_bytes() == whole(parts)


@pytest.mark.parametrize(
    "parts",
    [[], [b""], [0], [b"x"], [5000], [b"x", 5000, b"y"], [bytes(4096)], [b"a" * MIB, MIB, b"b" * MIB]],
)  # fmt: skip
def test_edges(tmp_path: Path, parts: list[Part]) -> None:
    write(tmp_path / "file", parts)
    assert (tmp_path / "file").read_bytes() == whole(parts)


def test_one_buffer_serves_one_file_after_the_other(tmp_path: Path) -> None:
    buffer = aligned_buffer()
    for name, content in (("long", b"l" * (MIB + 5)), ("short", b"s" * 7)):
        with open(tmp_path / name, "wb") as file:
            writer = DirectWriter(file.fileno(), buffer)
            writer.write(content)
            writer.finish()
        assert (tmp_path / name).read_bytes() == content


@pytest.mark.parametrize("refusals", [1, 2])
def test_a_filesystem_that_refuses_gets_the_bytes_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusals: int
) -> None:
    """It may refuse at any write, not only the first."""
    real, calls = os.pwrite, []

    def refuse(fd: int, data: memoryview, offset: int) -> int:
        calls.append(offset)
        if len(calls) == refusals:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", refuse)
    content = random.Random(1).randbytes(3 * MIB + 17)
    write(tmp_path / "file", [content])
    monkeypatch.undo()
    assert (tmp_path / "file").read_bytes() == content


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:5000], offset))
    content = random.Random(2).randbytes(MIB + 4097)
    write(tmp_path / "file", [content])
    monkeypatch.undo()
    assert (tmp_path / "file").read_bytes() == content


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_other_errors_are_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(fd: int, data: memoryview, offset: int) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(OSError) as raised:
        write(tmp_path / "file", [bytes(range(256)) * 8192])
    assert raised.value.errno == number


def test_a_memory_filesystem(tmp_path: Path) -> None:
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        pytest.skip("no memory filesystem here")
    path = shared / f"direct-writing-{os.getpid()}"
    try:
        write(path, [b"x" * (MIB + 3), 2 * MIB, b"y"])
        assert path.read_bytes() == whole([b"x" * (MIB + 3), 2 * MIB, b"y"])
    finally:
        path.unlink()


@pytest.fixture
def ext2(tmp_path: Path) -> Iterator[Path]:
    """A filesystem that writes directly and allocates nothing ahead."""
    program = shutil.which("mkfs.ext2", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if program is None or os.geteuid() != 0:
        pytest.skip("an ext2 image takes mkfs.ext2 and root")
    image, directory = tmp_path / "image", tmp_path / "ext2"
    directory.mkdir()
    image.touch()
    os.truncate(image, 32 * MIB)
    subprocess.run([program, "-q", image], check=True)
    if subprocess.run(["mount", "-t", "ext2", "-o", "loop", image, directory]).returncode:
        pytest.skip("mounting is not allowed here")
    yield directory
    subprocess.run(["umount", directory], check=True)


def test_a_filesystem_that_allocates_nothing_gets_zeros_written(ext2: Path) -> None:
    parts: list[Part] = [b"x" * (MIB + 3), 3 * MIB, b"y", 4096, 2 * MIB + 5]
    write(ext2 / "file", parts)
    assert (ext2 / "file").read_bytes() == whole(parts)
    assert os.stat(ext2 / "file").st_blocks * 512 >= len(whole(parts)), "no holes"
