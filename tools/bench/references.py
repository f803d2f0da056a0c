"""What growth and traffic are measured against: figures that need no store and no protocol.

The xor reference of two versions of a directory: every changed 8 KiB page xor the page it replaces,
new pages as they are, all in one zstd level 3 stream. `tar | zstd -3` is the one of a first commit.
"""

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import zstandard

PAGE_BYTES: Final = 8192
"""PostgreSQL's page."""
ZSTD_LEVEL: Final = 3
READ_PAGES: Final = 512


@dataclass(frozen=True, slots=True)
class XorReference:
    """`compressed_bytes` of one stream over all changed pages, zero pages left out.

    `placed_bytes` is what a stream over those pages alone would take that had an old place.
    """

    compressed_bytes: int
    placed_bytes: int
    placed_pages: int
    new_pages: int

    @property
    def mostly_new(self) -> bool:
        """Whether pages without an old place make up more than half of the reference."""
        return self.compressed_bytes - self.placed_bytes > self.compressed_bytes / 2


def xor(left: bytes, right: bytes) -> bytes:
    """Exclusive or of two equally long strings."""
    number = int.from_bytes(left, "little") ^ int.from_bytes(right, "little")
    return number.to_bytes(len(left), "little")


def xor_reference(old_root: Path, new_root: Path) -> XorReference:
    """The xor reference of two versions of a directory."""
    everything, placed = _Stream(), _Stream()
    placed_pages = new_pages = 0
    for old, new in changed_pages(old_root, new_root):
        if len(old) == len(new):
            delta = xor(new, old)
            everything.add(delta)
            placed.add(delta)
            placed_pages += 1
        else:
            everything.add(new)
            new_pages += 1
    return XorReference(everything.finish(), placed.finish(), placed_pages, new_pages)


def tar_zstd_bytes(root: Path) -> int:
    """Size of `tar -c . | zstd -3` of a directory."""
    with subprocess.Popen(["tar", "-C", root, "-c", "."], stdout=subprocess.PIPE) as tar:
        assert tar.stdout is not None
        stream = _Stream()
        while data := tar.stdout.read(1024 * 1024):
            stream.add(data)
    assert tar.returncode == 0, f"tar: {tar.returncode}"
    return stream.finish()


def changed_pages(old_root: Path, new_root: Path) -> Iterator[tuple[bytes, bytes]]:
    """Changed pages of all regular files, as (what stood there, what stands there).

    The first is b"" where nothing stood; zero pages are left out: they cost nobody anything.
    """
    for path in regular_files(new_root):
        old_path = old_root / path
        old = old_path if old_path.is_file() and not old_path.is_symlink() else Path(os.devnull)
        yield from _changed_pages_of_file(old, new_root / path)


def regular_files(root: Path) -> list[str]:
    """Relative paths of the regular files below a directory, sorted."""
    return sorted(
        os.path.relpath(path, root)
        for folder, _, names in os.walk(root)
        for path in (os.path.join(folder, name) for name in names)
        if os.path.isfile(path) and not os.path.islink(path)
    )


def _changed_pages_of_file(old_path: Path, new_path: Path) -> Iterator[tuple[bytes, bytes]]:
    with old_path.open("rb") as old_file, new_path.open("rb") as new_file:
        while new_run := new_file.read(READ_PAGES * PAGE_BYTES):
            old_run = old_file.read(READ_PAGES * PAGE_BYTES)
            if new_run == old_run:
                continue
            for start in range(0, len(new_run), PAGE_BYTES):
                old, new = (run[start : start + PAGE_BYTES] for run in (old_run, new_run))
                if new != old and any(new):
                    yield old, new


class _Stream:
    """Counts the bytes of one zstd stream without keeping them."""

    def __init__(self) -> None:
        self._compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL).compressobj()
        self._bytes = 0

    def add(self, data: bytes) -> None:
        self._bytes += len(self._compressor.compress(data))

    def finish(self) -> int:
        return self._bytes + len(self._compressor.flush())
