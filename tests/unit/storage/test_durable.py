"""Files become durable atomically; refusals get our types."""

import os
import signal

import pytest

from dmsync.errors import StorageFailed, StorageFull
from dmsync.storage.durable import (
    fsync_directory,
    lock_exclusively,
    make_directory_durable,
    whole_file,
    write_file_atomic,
)


def test_an_atomic_write_replaces_and_leaves_nothing_else(tmp_path) -> None:
    target = tmp_path / "file"
    write_file_atomic(str(target), b"one")
    write_file_atomic(os.fsencode(target), b"two", mode=0o640)
    assert target.read_bytes() == b"two"
    assert target.stat().st_mode & 0o777 == 0o640
    assert os.listdir(tmp_path) == ["file"]


def test_a_failed_atomic_write_keeps_the_old_file(tmp_path, monkeypatch) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old")

    def refuse(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StorageFull):
        write_file_atomic(str(target), b"new")
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_what_a_kill_left_of_an_atomic_write_goes_with_the_next(tmp_path) -> None:
    process = os.fork()
    if process == 0:
        with whole_file(str(tmp_path / "file"), mode=0o600, sweep=True) as file:
            file.write(b"half of what was to be wri")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(process, 0)
    (tmp_path / "file2.tmp-0123456789abcdef").write_bytes(b"of another file")
    assert len(os.listdir(tmp_path)) == 2
    with whole_file(str(tmp_path / "file"), mode=0o600, sweep=True) as living:
        living.write(b"slow")
        write_file_atomic(str(tmp_path / "file"), b"quick")
    assert (tmp_path / "file").read_bytes() == b"slow"
    assert sorted(os.listdir(tmp_path)) == ["file", "file2.tmp-0123456789abcdef"]


def test_directories_are_made_with_their_parents(tmp_path) -> None:
    path = tmp_path / "a" / "b" / "c"
    make_directory_durable(str(path))
    make_directory_durable(str(path))
    assert path.stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o700


def test_other_refusals_are_storage_failed(tmp_path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for action in (
        lambda: fsync_directory(str(tmp_path / "missing")),
        lambda: make_directory_durable(str(tmp_path / "file")),
        lambda: write_file_atomic(str(tmp_path / "missing" / "x"), b""),
    ):
        with pytest.raises(StorageFailed):
            action()


def test_a_lock_excludes_other_descriptors_until_closed(tmp_path) -> None:
    path = tmp_path / "lock"
    first = os.open(path, os.O_RDWR | os.O_CREAT)
    second = os.open(path, os.O_RDWR)
    assert lock_exclusively(first, wait=False)
    assert not lock_exclusively(second, wait=False)
    os.close(first)
    assert lock_exclusively(second, wait=False)
    os.close(second)
