"""Walking, opening and removing below a descriptor, never through a link."""

import os
from pathlib import Path

import pytest

from dmsync.engine.safe_files import (
    OPEN_LEVELS_MAX,
    TreeDirectories,
    filesystem_now_ns,
    open_file,
    remove_name,
    shown,
)
from dmsync.errors import StorageFailed


@pytest.fixture
def fd(tmp_path: Path) -> int:
    return os.open(tmp_path, os.O_RDONLY)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_component_that_is_a_link_is_an_error(tmp_path: Path, fd: int) -> None:
    (tmp_path / "real" / "below").mkdir(parents=True)
    os.symlink("real", tmp_path / "link")
    directories = TreeDirectories(fd)
    assert os.fstat(directories.open(b"real/below")).st_ino
    for path in (b"link", b"link/below"):
        with pytest.raises(OSError):
            directories.open(path)
    directories.close()


def test_deep_paths_hold_few_descriptors(tmp_path: Path, fd: int) -> None:
    deep = b"/".join([b"d"] * (OPEN_LEVELS_MAX * 3))
    os.makedirs(os.fsencode(tmp_path) + b"/" + deep)
    before = open_descriptors()
    directories = TreeDirectories(fd)
    found = os.fstat(directories.open(deep)).st_ino
    assert found == os.stat(os.fsencode(tmp_path) + b"/" + deep).st_ino
    assert open_descriptors() - before <= OPEN_LEVELS_MAX + 1
    assert os.fstat(directories.open(b"")).st_ino == os.fstat(fd).st_ino
    directories.close()
    assert open_descriptors() == before


def test_failed_open_leaves_no_descriptor(tmp_path: Path, fd: int) -> None:
    (tmp_path / "a").mkdir()
    before = open_descriptors()
    directories = TreeDirectories(fd)
    with pytest.raises(FileNotFoundError):
        directories.open(b"a/missing/b")
    with pytest.raises(FileNotFoundError):
        directories.open(b"a/" + b"/".join([b"x"] * OPEN_LEVELS_MAX * 2))
    directories.close()
    assert open_descriptors() == before


def test_files_are_opened_neither_through_links_nor_waiting(tmp_path: Path, fd: int) -> None:
    (tmp_path / "f").write_text("x")
    os.symlink("f", tmp_path / "link")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError):
        open_file(b"link", fd)
    os.close(open_file(b"fifo", fd))


def test_removal_does_not_follow_links(tmp_path: Path, fd: int) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "f").write_text("canary")
    (tmp_path / "extra" / "below").mkdir(parents=True)
    os.symlink(outside, tmp_path / "extra" / "below" / "link")
    remove_name(b"extra", fd, b"extra")
    assert not (tmp_path / "extra").exists()
    assert (outside / "f").read_text() == "canary"


def test_removal_of_what_is_gone_is_done(fd: int) -> None:
    remove_name(b"missing", fd, b"missing")


def test_removal_of_wide_and_deep_trees(tmp_path: Path, fd: int) -> None:
    for number in range(200):
        (tmp_path / "extra" / f"{number}" / "a" / "b").mkdir(parents=True)
    below = os.open(tmp_path / "extra", os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("d", dir_fd=below)
        next_below = os.open("d", os.O_RDONLY, dir_fd=below)
        os.close(below)
        below = next_below
    os.close(below)
    remove_name(b"extra", fd, b"extra")
    assert os.listdir(tmp_path) == []


def test_clock_probe_moves_no_directory_time(tmp_path: Path, fd: int) -> None:
    before = os.fstat(fd)
    assert filesystem_now_ns(fd, 0) >= before.st_mtime_ns
    after = os.fstat(fd)
    assert (after.st_mtime_ns, after.st_ctime_ns) == (before.st_mtime_ns, before.st_ctime_ns)


def test_paths_are_shown_without_control_characters() -> None:
    assert shown(b"a\x1b[31m\n\xff\xc2\x9b") == "a\\x1b[31m\\n\\xff\\x9b"


def test_unremovable_name_is_named(fd: int) -> None:
    with pytest.raises(StorageFailed, match="cannot remove"):
        remove_name(b"x" * 300, fd, b"x")
