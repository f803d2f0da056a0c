"""A store on a full disk or on a read-only filesystem: queries answer, changes are refused by name."""

import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.cluster import Cluster

DISK_BYTES = 20 * 1024 * 1024

LEAVE_A_WAL = """
import os, sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("PRAGMA wal_autocheckpoint = 0")
for change in sys.argv[2:]:
    db.execute(change)
os._exit(0)
"""


class Disk:
    """A filesystem of its own, which holds the store of `cluster` and nothing else."""

    def __init__(self, cluster: Cluster, directory: Path) -> None:
        self.cluster = cluster
        self.directory = directory

    @property
    def dot_dir(self) -> Path:
        (found,) = (self.cluster.home / "dots").iterdir()
        return found

    def fill(self) -> None:
        with (self.directory / "fill").open("wb", buffering=0) as file:
            for size in (1024 * 1024, 4096, 1):
                try:
                    while file.write(bytes(size)) == size:
                        pass
                except OSError:
                    continue

    def free(self) -> None:
        (self.directory / "fill").unlink()

    def remount(self, option: str) -> None:
        command = ["mount", "-o", f"remount,{option}", str(self.directory)]
        subprocess.run(command, check=True)


@pytest.fixture
def disk(cluster: Cluster) -> Iterator[Disk]:
    """A dot with two commits, a branch and an edited file; the store lies on a small disk."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    cluster.home.mkdir(mode=0o700)
    options = f"size={DISK_BYTES},mode=0700"
    mount = ["mount", "-t", "tmpfs", "-o", options, "dmsync-test", str(cluster.home)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr}")
    cluster.init("apples", {"HELLO": "one", "large": os.urandom(300_000)})
    cluster.commit("first")
    cluster.run("branch", "side")
    cluster.write("apples", {"HELLO": "two"})
    cluster.commit("second")
    cluster.write("apples", {"HELLO": "three"})
    yield Disk(cluster, cluster.home)
    subprocess.run(["umount", "--lazy", cluster.home], check=True)


def answers(cluster: Cluster) -> list[str]:
    """What every query says."""
    queries = [
        ["status"],
        ["log"],
        ["list"],
        ["branch"],
        ["diff"],
        ["diff", "HEAD^", "HEAD"],
        ["diff", "-p", "--stat"],
        ["show"],
        ["cat", "HEAD^:__default__/HELLO"],
        ["dot", "show", "apples"],
        ["dot", "path", "apples"],
        ["fsck"],
        ["fsck", "--full"],
    ]
    return [cluster.run(*query).stdout for query in queries]


def refusals(cluster: Cluster, error: str, saying: str) -> None:
    """Each changing command fails by name; what was there stays."""
    before = answers(cluster)
    for command in (
        ["commit", "-m", "third"],
        ["branch", "another"],
        ["checkout", "side"],
        ["reset", "--hard", "HEAD^"],
        ["init", "pears"],
    ):
        result = cluster.run("--json", *command, check=False)
        assert result.code == 1, result.describe()
        assert result.error()["code"] == error, result.describe()
        assert saying in result.error()["message"], result.describe()
    assert answers(cluster) == before


def test_a_full_disk(disk: Disk) -> None:
    before = answers(disk.cluster)
    disk.fill()
    assert answers(disk.cluster) == before
    refusals(disk.cluster, "no-space", "No space left on device")
    disk.free()
    disk.cluster.commit("third")
    assert disk.cluster.messages() == ["first", "second", "third"]
    disk.cluster.run("fsck", "--full")


def test_a_read_only_filesystem(disk: Disk) -> None:
    before = answers(disk.cluster)
    disk.remount("ro")
    assert answers(disk.cluster) == before
    refusals(disk.cluster, "storage", "Read-only file system")
    disk.remount("rw")
    disk.cluster.commit("third")
    disk.cluster.run("fsck", "--full")


def without_catalog(disk: Disk) -> None:
    for path in disk.cluster.home.glob("catalog.sqlite*"):
        path.unlink()


def without_index(disk: Disk) -> None:
    for path in disk.dot_dir.glob("index.*"):
        path.unlink()


def without_lock_files_and_empty_directories(disk: Disk) -> None:
    """As some backup programs leave it."""
    for path in [*disk.cluster.home.rglob("lock"), *disk.cluster.home.rglob("*.lock")]:
        path.unlink()
    (disk.dot_dir / "quarantine").rmdir()


def with_damaged_projections(disk: Disk) -> None:
    for path in (disk.cluster.home / "catalog.sqlite", disk.dot_dir / "index.sqlite"):
        path.write_bytes(b"not a database" * 1000)


def with_wal_files(disk: Disk) -> None:
    """As a killed writer leaves it."""
    # changed and changed back: what is in the WAL counts, and is what it was
    for path, table, number in (
        (disk.cluster.home / "catalog.sqlite", "commits", "generation"),
        (disk.dot_dir / "index.sqlite", "packs", "bytes"),
    ):
        changes = [f"UPDATE {table} SET {number} = {number} {step}" for step in ("+ 1", "- 1")]
        subprocess.run([sys.executable, "-c", LEAVE_A_WAL, path, *changes], check=True)
        assert path.with_name(path.name + "-wal").stat().st_size > 0


def with_projections_behind(disk: Disk) -> None:
    """As a writer leaves it that was killed after log and pack."""
    paths = (disk.cluster.home / "catalog.sqlite", disk.dot_dir / "index.sqlite")
    old = [path.with_name(path.name + ".old") for path in paths]
    for path, copy in zip(paths, old, strict=True):
        with sqlite3.connect(path) as source, sqlite3.connect(copy) as target:
            source.backup(target)
        source.close()
        target.close()
    disk.cluster.commit("not in the projections")
    for path, copy in zip(paths, old, strict=True):
        shutil.copyfile(copy, path)
        copy.unlink()


@pytest.mark.parametrize(
    ("leave", "how"),
    [
        (without_catalog, "full"),
        (without_index, "read-only"),
        (without_lock_files_and_empty_directories, "read-only"),
        (with_damaged_projections, "full"),
        (with_damaged_projections, "read-only"),
        (with_wal_files, "full"),
        (with_wal_files, "read-only"),
        (with_projections_behind, "full"),
        (with_projections_behind, "read-only"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_projections_that_cannot_be_repaired(
    disk: Disk, leave: Callable[[Disk], None], how: str
) -> None:
    """The projections are folded outside the store, for the process that asks."""
    expected = answers(disk.cluster)
    leave(disk)
    if how == "full":
        disk.fill()
    else:
        disk.remount("ro")
    found = answers(disk.cluster)
    if leave is with_projections_behind:
        assert "not in the projections" in found[1]
    else:
        assert found == expected
    disk.remount("rw")
    if how == "full":
        disk.free()
    disk.cluster.write("apples", {"HELLO": "four"})
    disk.cluster.commit("at last")
    disk.cluster.run("fsck", "--full")
