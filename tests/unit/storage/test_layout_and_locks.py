import errno
import json
import os
import threading
import time

import pytest

from dmsync.core.ids import DotId
from dmsync.errors import (
    AccessDenied,
    AlreadyExists,
    Busy,
    Corruption,
    DmError,
    FormatUnsupported,
    StorageFailed,
    StoreNotFound,
)
from dmsync.storage import layout as layout_module
from dmsync.storage import locks
from dmsync.storage.layout import Layout, open_store, parse_format
from dmsync.storage.locks import FileLock
from tests.support.event_histories import CommitShelf, make_store, open_catalog, start_python


def test_new_store_opens_and_is_private(tmp_path):
    made = make_store(tmp_path / "a" / "s")
    opened = open_store(made.home)
    opened.make_dot_dirs(DotId(b"d" * 16))
    opened.make_dot_dirs(DotId(b"d" * 16))
    with open_catalog(tmp_path / "a" / "s", CommitShelf()):
        for folder, folders, files in os.walk(made.home):
            for name in folders:
                assert os.stat(os.path.join(folder, name)).st_mode & 0o777 == 0o700
            for name in files:
                assert os.stat(os.path.join(folder, name)).st_mode & 0o077 == 0, name


def test_no_store_is_said_so(tmp_path):
    for home in (tmp_path, tmp_path / "missing"):
        with pytest.raises(StoreNotFound):
            open_store(str(home))


def test_second_store_and_foreign_directory_are_refused(tmp_path):
    make_store(tmp_path / "s")
    with pytest.raises(AlreadyExists):
        make_store(tmp_path / "s")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(AlreadyExists):
        make_store(tmp_path / "other")
    assert (tmp_path / "other" / "thesis.txt").read_text() == "mine"


def test_store_cut_while_being_made_is_made_again(tmp_path, monkeypatch):
    """Stop before each step that makes something durable; the next attempt succeeds."""

    class Cut(Exception):
        pass

    for step in range(20):
        home = tmp_path / f"s{step}"
        calls = []
        with monkeypatch.context() as patched:
            for name in ("make_directory_durable", "write_file_atomic", "fsync_directory"):
                real = getattr(layout_module, name)

                def counted(*args, real=real, calls=calls, step=step, **options):
                    calls.append(1)
                    if len(calls) > step:
                        raise Cut
                    return real(*args, **options)

                patched.setattr(layout_module, name, counted)
            try:
                make_store(home)
            except Cut:
                pass
            else:
                break
        with pytest.raises(StoreNotFound):
            open_store(str(home))
        make_store(home)
        open_store(str(home))
    assert 5 <= step < 19


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({"version": 2}, "format 2"),
        ({"version": 1, "incompatible": ["crypt"]}, "crypt"),
        ({"version": 1, "read_only_compatible": ["quota"]}, "quota"),
    ],
)
def test_newer_formats_are_refused_by_name(tmp_path, value, named):
    make_store(tmp_path / "s")
    (tmp_path / "s" / "format").write_text(json.dumps(value))
    with pytest.raises(FormatUnsupported, match=named):
        open_store(str(tmp_path / "s"))
    if "quota" in named:
        open_store(str(tmp_path / "s"), writing=False)


def test_unknown_compatible_features_are_ignored(tmp_path):
    make_store(tmp_path / "s")
    (tmp_path / "s" / "format").write_text('{"version": 1, "compatible": ["x"], "more": 1}')
    open_store(str(tmp_path / "s"))


@pytest.mark.parametrize(
    "data", [b"", b"x", b"[]", b"{}", b'{"version":"1"}', b'{"version":1,"incompatible":[1]}', b"\xff", b"[" * 9999]
)  # fmt: skip
def test_damaged_format_file_is_corruption(data):
    with pytest.raises(Corruption):
        parse_format(data, "format")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make another user's store")
def test_store_of_another_user_is_refused(tmp_path, monkeypatch):
    make_store(tmp_path / "s")
    os.chown(tmp_path / "s", 4242, 4242)
    with pytest.raises(AccessDenied):
        open_store(str(tmp_path / "s"))  # nor may root
    open_store(str(tmp_path / "s"), sudo_user=4242)
    with pytest.raises(AccessDenied):
        open_store(str(tmp_path / "s"), sudo_user=4343)
    monkeypatch.setattr(layout_module.os, "geteuid", lambda: 4343)
    with pytest.raises(AccessDenied):
        open_store(str(tmp_path / "s"))


def test_exclusive_lock_excludes_threads_and_names_its_holder(tmp_path):
    path = str(tmp_path / "lock")
    with FileLock(path, what="the log"):
        refusals = []

        def attempt():
            try:
                FileLock(path, what="the log", wait_s=0.02).acquire()
            except Busy as exc:
                refusals.append(exc.message)

        thread = threading.Thread(target=attempt)
        thread.start()
        thread.join()
        assert f"process {os.getpid()}" in refusals[0] and "the log is in use" in refusals[0]
    FileLock(path, what="the log", wait_s=0).acquire()


def test_shared_locks_go_together_but_not_with_an_exclusive_one(tmp_path):
    path = str(tmp_path / "lock")
    with FileLock(path, what="it", shared=True), FileLock(path, what="it", shared=True, wait_s=0):
        with pytest.raises(Busy):
            FileLock(path, what="it", wait_s=0).acquire()


def test_a_shared_lock_writes_nothing_and_needs_no_file_where_none_can_be(tmp_path, monkeypatch):
    path = tmp_path / "lock"
    path.touch(0o400)
    really_open = os.open

    def open_read_only(name, flags, *rest):
        if flags & (os.O_RDWR | os.O_CREAT):
            raise OSError(errno.EROFS, "Read-only file system")
        return really_open(name, flags, *rest)

    monkeypatch.setattr(locks.os, "open", open_read_only)
    for _ in range(2):
        with FileLock(str(path), what="it", shared=True) as lock:
            assert lock.is_held
        assert not lock.is_held
        with pytest.raises(StorageFailed, match="Read-only file system"):
            FileLock(str(path), what="it").acquire()
        path.unlink(missing_ok=True)


def test_lock_of_a_killed_process_is_free_at_once(tmp_path):
    path = str(tmp_path / "lock")
    child = start_python(
        "import sys,time\n"
        "from dmsync.storage.locks import FileLock\n"
        "lock = FileLock(sys.argv[1], what='it'); lock.acquire()\n"
        "print('held', flush=True); time.sleep(60)",
        path,
    )
    assert child.stdout.readline() == b"held\n"
    with pytest.raises(Busy, match=f"process {child.pid}"):
        FileLock(path, what="it", wait_s=0).acquire()
    child.kill()
    child.communicate()
    with FileLock(path, what="it", wait_s=0.5):
        pass


def test_waiting_ends_soon_after_release(tmp_path):
    path = str(tmp_path / "lock")
    holder = FileLock(path, what="it")
    holder.acquire()
    threading.Timer(0.1, holder.release).start()
    began = time.monotonic()
    with FileLock(path, what="it", wait_s=5):
        assert time.monotonic() - began < 1


def test_lock_file_may_not_be_a_symlink(tmp_path):
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DmError):
        FileLock(str(tmp_path / "lock"), what="it").acquire()
    assert not (tmp_path / "elsewhere").exists()


def test_layout_paths_stay_inside_home(tmp_path):
    layout = Layout(str(tmp_path))
    dot = DotId(b"\xff" * 16)
    for path in (layout.dot_dir(dot), layout.tree_dir(dot, "x"), layout.stat_cache_file(dot, "x")):
        assert path.startswith(str(tmp_path) + "/dots/" + "ff" * 16)


def test_a_format_that_cannot_be_read_is_a_storage_failure(tmp_path):
    layout = Layout(str(tmp_path))
    (tmp_path / "format").mkdir()  # EISDIR stands for what a dying disk says
    with pytest.raises(StorageFailed, match="format"):
        layout.read_format()
