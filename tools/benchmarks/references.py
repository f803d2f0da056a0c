"""What growth and traffic are measured against: figures that need no store and no protocol.

The floor of two versions of a directory: all changed and new 8 KiB pages in one `zstd -3 --long=27`
stream with the pages they replace as prefix. The xor reference: every changed page xor the page it
replaces, new pages as they are, in one zstd level 3 stream; it needs less memory and is two to five
times larger. `tar | zstd -3` is the reference of a first commit.
"""

import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import zstandard
from backports import zstd

PAGE_BYTES: Final = 8192
"""PostgreSQL's page."""
ZSTD_LEVEL: Final = 3
READ_PAGES: Final = 512
FLOOR_OPTIONS: Final[dict[int, int]] = {
    zstd.CompressionParameter.compression_level: ZSTD_LEVEL,
    zstd.CompressionParameter.enable_long_distance_matching: 1,
    zstd.CompressionParameter.window_log: 27,
}


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


def floor_bytes(pages: Iterable[tuple[bytes, bytes]]) -> int:
    """The floor of changed pages, given as `changed_pages` does; all are held in memory."""
    old, new = bytearray(), bytearray()
    for before, after in pages:
        old += before
        new += after
    if not new:
        return 0
    # Fewer than 8 bytes are no prefix for zstd.
    prefix = zstd.ZstdDict(bytes(old), is_raw=True).as_prefix if len(old) >= 8 else None
    return len(zstd.compress(new, options=FLOOR_OPTIONS, zstd_dict=prefix))


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
    for _, old, new in _differing_pages(old_path, new_path):
        if any(new):
            yield old, new


def _differing_pages(old_path: Path, new_path: Path) -> Iterator[tuple[int, bytes, bytes]]:
    """(offset, what stood there, what stands there) of each page that differs, zero pages too."""
    offset = 0
    with old_path.open("rb") as old_file, new_path.open("rb") as new_file:
        while new_run := new_file.read(READ_PAGES * PAGE_BYTES):
            old_run = old_file.read(READ_PAGES * PAGE_BYTES)
            if new_run != old_run:
                for start in range(0, len(new_run), PAGE_BYTES):
                    old, new = (run[start : start + PAGE_BYTES] for run in (old_run, new_run))
                    if new != old:
                        yield offset + start, old, new
            offset += len(new_run)


@dataclass(frozen=True, slots=True)
class Change:
    """What one version of a directory changed: the floor, and the bytes of changed pages."""

    floor_bytes: int
    page_bytes: int


class Shadow:
    """A copy of a directory's regular files that follows it and says what each step changed."""

    def __init__(self, root: Path, copy: Path) -> None:
        self._root = root
        self._copy = copy
        copy.mkdir()
        for path in regular_files(root):
            self._replace(path)

    def follow(self) -> Change:
        """Make the copy equal to the directory again; what had changed since the last time.

        A file of the same size and time is taken for unchanged: nobody forges times here.
        """
        pages: list[tuple[bytes, bytes]] = []
        found = regular_files(self._root)
        for path in found:
            if not self._is_current(path):
                pages.extend(self._follow_file(path))
        for path in set(regular_files(self._copy)) - set(found):
            (self._copy / path).unlink()
        return Change(floor_bytes(pages), sum(len(new) for _, new in pages))

    def _is_current(self, path: str) -> bool:
        try:
            old = (self._copy / path).stat()
        except FileNotFoundError:
            return False
        new = (self._root / path).stat()
        return (old.st_size, old.st_mtime_ns) == (new.st_size, new.st_mtime_ns)

    def _follow_file(self, path: str) -> list[tuple[bytes, bytes]]:
        """Bring one file up to date by its changed pages only; those that are not of zeros."""
        source, target = self._root / path, self._copy / path
        if not target.exists():
            self._replace(path)
            return list(_changed_pages_of_file(Path(os.devnull), source))
        pages = []
        with target.open("r+b", buffering=0) as file:
            for offset, old, new in _differing_pages(target, source):
                file.seek(offset)
                file.write(new)
                if any(new):
                    pages.append((old, new))
            file.truncate(source.stat().st_size)
        shutil.copystat(source, target)
        return pages

    def _replace(self, path: str) -> None:
        target = self._copy / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(self._root / path, target)


class _Stream:
    """Counts the bytes of one zstd stream without keeping them."""

    def __init__(self) -> None:
        self._compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL).compressobj()
        self._bytes = 0

    def add(self, data: bytes) -> None:
        self._bytes += len(self._compressor.compress(data))

    def finish(self) -> int:
        return self._bytes + len(self._compressor.flush())
