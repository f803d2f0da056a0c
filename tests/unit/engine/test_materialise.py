"""Content written to paths: exact, sparse, private, gone afterwards whatever happens."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from dmsync.core.ids import Kind, ObjectId
from dmsync.core.objects import Entry, EntryKind
from dmsync.core.objects import Layout as FileLayout
from dmsync.core.pages import find_path
from dmsync.engine.materialise import copy_open_file, private_directory, write_content
from dmsync.errors import ObjectMissing, StorageFailed, StorageFull
from dmsync.storage.layout import Layout
from tests.support.live_tree import SUBDOT, LiveTree
from tests.support.memory_store import MemoryStore

MEBIBYTE = 1024 * 1024


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


def recorded(tmp_path: Path, store: MemoryStore) -> tuple[Path, Entry]:
    tree = LiveTree(tmp_path / "tree", store)  # type: ignore[arg-type]
    path = tree.path / "f"
    with open(path, "wb") as out:
        out.truncate(40 * MEBIBYTE + 3)
        out.seek(20 * MEBIBYTE + 7)
        out.write(os.urandom(300_000))
    entry = find_path(store, tree.capture().root, SUBDOT + b"/f")
    assert entry is not None
    return path, entry


def test_a_recorded_file_is_written_with_its_holes(tmp_path: Path, store: MemoryStore) -> None:
    source, entry = recorded(tmp_path, store)
    target = tmp_path / "out"
    write_content(store, entry, str(target))
    assert target.read_bytes() == source.read_bytes()
    assert target.stat().st_blocks * 512 < 2 * MEBIBYTE
    assert stat.S_IMODE(target.stat().st_mode) == 0o600


def test_a_live_file_is_copied_with_its_holes(tmp_path: Path, store: MemoryStore) -> None:
    source, _ = recorded(tmp_path, store)
    target = tmp_path / "out"
    with open(source, "rb") as file:
        assert copy_open_file(file.fileno(), str(target))
    assert target.read_bytes() == source.read_bytes()
    assert target.stat().st_blocks * 512 < 2 * MEBIBYTE


def test_a_missing_chunk_leaves_no_file(tmp_path: Path, store: MemoryStore) -> None:
    _, entry = recorded(tmp_path, store)
    for kind, oid in list(store.objects):
        if kind is Kind.CHUNK:
            del store.objects[kind, oid]
    with pytest.raises(ObjectMissing):
        write_content(store, entry, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_not_written_over(tmp_path: Path, store: MemoryStore) -> None:
    _, entry = recorded(tmp_path, store)
    (tmp_path / "aim").write_text("precious")
    os.symlink("aim", tmp_path / "out")
    with pytest.raises(StorageFailed):
        write_content(store, entry, str(tmp_path / "out"))
    assert (tmp_path / "aim").read_text() == "precious"


def test_a_disk_without_room_is_not_filled_up(tmp_path: Path, store: MemoryStore) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"x")
    space = os.statvfs(tmp_path)
    huge = _file_of(2 * space.f_bavail * space.f_frsize)
    with pytest.raises(StorageFull, match="no room"):
        write_content(store, huge, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def _file_of(size: int) -> Entry:
    tree, content = ObjectId(bytes(32)), bytes(32)
    return Entry(
        b"f", EntryKind.FILE, 0o644, size=size, content=content, layout=FileLayout.FIXED, tree=tree
    )


def test_a_private_directory_is_gone_after_success_failure_and_a_kill(tmp_path: Path) -> None:
    layout = Layout(str(tmp_path))
    with private_directory(layout) as path:
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o700
        Path(path, "f").write_text("x")
    assert os.listdir(layout.temporary_dir) == []
    with pytest.raises(ZeroDivisionError), private_directory(layout) as path:
        raise ZeroDivisionError
    assert os.listdir(layout.temporary_dir) == []
    program = (
        "import os, signal, sys\n"
        "from dmsync.engine.materialise import private_directory\n"
        "from dmsync.storage.layout import Layout\n"
        f"with private_directory(Layout({str(tmp_path)!r})) as path:\n"
        "    open(path + '/secret', 'w').close()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", program])
    assert len(os.listdir(layout.temporary_dir)) == 2
    with private_directory(layout) as mine, private_directory(layout) as other:
        left = {os.path.basename(path) for path in (mine, other)}
        assert {n for n in os.listdir(layout.temporary_dir) if not n.endswith(".lock")} == left
    assert os.listdir(layout.temporary_dir) == []
