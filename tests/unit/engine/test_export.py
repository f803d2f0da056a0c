"""Export: as a directory and as tar archives that real tar unpacks into the same tree."""

import gzip
import io
import os
import random
import socket
import subprocess
import tarfile
from pathlib import Path

import pytest

from dmsync.engine import dots, switching
from dmsync.engine.export import STDOUT, ExportRequest, ExportSummary, export
from dmsync.errors import (
    AlreadyExists,
    NotFound,
    ObjectMissing,
    PathNotFound,
    RevisionNotFound,
    UsageError,
    WouldLose,
)
from dmsync.storage.catalog import DotRow
from dmsync.storage.object_store import ObjectStore
from tests.support.live_tree import set_acl
from tests.support.tree import describe_tree
from tests.support.working_store import Workshop

TAR = ("tar", "--xattrs", "--xattrs-include=*", "--numeric-owner", "-p")


@pytest.fixture
def rich(shop: Workshop, dot: DotRow, data: Path) -> Path:
    """A commit with everything a tree can hold."""
    noise = random.Random(7)
    (data / "empty").write_bytes(b"")
    (data / "large").write_bytes(noise.randbytes(700_000))
    long = data / ("d" * 120) / ("e" * 120)
    long.mkdir(parents=True)
    (long / ("f" * 200)).write_text("a long way")
    (long / "link").symlink_to("x" * 150)
    (data / os.fsdecode(b"caf\xe9\n\xff")).write_text("no UTF-8")
    (data / "snow☃").write_text("Unicode")
    (data / "plain").write_text("plain")
    os.link(data / "plain", long / "a-link")
    os.link(data / "plain", data / "another")
    (data / "a-dir").mkdir()
    os.link(data / "plain", data / "a-dir" / "first")
    os.mkfifo(data / "fifo", 0o620)
    os.setxattr(data / "plain", "user.k=%v", bytes(range(256)))
    os.setxattr(data / "a-dir", "user.note", b"on a directory")
    set_acl(data / "large", "u:65534:r")
    set_acl(data / "a-dir", "u:65534:rwx", default=True)
    with open(data / "holes", "wb") as file:
        file.truncate(3_000_000)
        for offset in (262_144, 1_048_576):
            file.seek(offset)
            file.write(noise.randbytes(131_072))
    with open(data / "hole-first", "wb") as file:
        file.seek(1_000_000)
        file.write(b"the end")
    with open(data / "all-hole", "wb") as file:
        file.truncate(500_001)
    for name, mode in (("large", 0o600), ("plain", 0o4755), ("a-dir", 0o2711)):
        os.chmod(data / name, mode)
    os.chown(data / "empty", 1234, 56789)
    for number, path in enumerate(sorted(data.rglob("*"), reverse=True)):
        moment = 1_600_000_000_123_456_789 + number
        os.utime(path, ns=(moment, moment), follow_symlinks=False)
    os.utime(data / "empty", ns=(0, -1_500_000_000))
    os.utime(data / "large", ns=(0, 10_000_000_000))
    shop.commit(dot, "rich")
    return data


def run(
    shop: Workshop, dot: DotRow, destination: Path, place: str = "HEAD:__default__", **wishes: bool
) -> ExportSummary:
    request = ExportRequest(place, os.fsencode(destination), None, **wishes)
    return export(shop.store, dot, request)


def unpacked(archive: Path, into: Path, *options: str) -> Path:
    into.mkdir()
    done = subprocess.run([*TAR, *options, "-xf", archive, "-C", into], capture_output=True)
    told = [line for line in done.stderr.splitlines() if b"implausibly old" not in line]
    assert done.returncode == 0 and not told, done.stderr
    return into


def test_a_directory_equals_the_tree(
    shop: Workshop, dot: DotRow, rich: Path, tmp_path: Path
) -> None:
    summary = run(shop, dot, tmp_path / "out", trusted=True)
    assert describe_tree(tmp_path / "out") == describe_tree(rich)
    assert summary.unapplied == () and summary.withheld == ()
    assert (tmp_path / "out" / "holes").stat().st_blocks * 512 < 1_500_000
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".dm-tmp")]


@pytest.mark.parametrize(("suffix", "option"), [("", "-S"), (".zst", "--zstd"), (".gz", "-z")])
def test_an_archive_unpacks_into_the_tree(
    shop: Workshop, dot: DotRow, rich: Path, tmp_path: Path, suffix: str, option: str
) -> None:
    archive = tmp_path / f"out.tar{suffix}"
    run(shop, dot, archive)
    assert describe_tree(unpacked(archive, tmp_path / "x", option)) == describe_tree(rich)
    assert (tmp_path / "x" / "holes").stat().st_blocks * 512 < 1_500_000


def test_python_reads_the_archive_too(
    shop: Workshop, dot: DotRow, rich: Path, tmp_path: Path
) -> None:
    run(shop, dot, tmp_path / "out.tar")
    with tarfile.open(tmp_path / "out.tar") as archive:
        members = {os.fsencode(member.name): member for member in archive}
        holes = archive.extractfile(members[b"holes"])
        assert holes is not None and holes.read() == (rich / "holes").read_bytes()
        assert os.fsencode("snow☃") in members and b"caf\xe9\n\xff" in members
    assert (tmp_path / "out.tar").stat().st_size < 2_500_000  # of 4.5 MB: the holes are none of it


def test_a_subdirectory_brings_its_own_metadata_and_links(
    shop: Workshop, dot: DotRow, rich: Path, tmp_path: Path
) -> None:
    run(shop, dot, tmp_path / "out", place="HEAD:__default__/a-dir")
    run(shop, dot, tmp_path / "out.tar", place="HEAD:__default__/a-dir")
    unpacked(tmp_path / "out.tar", tmp_path / "x")
    for made in (tmp_path / "out", tmp_path / "x"):
        assert (made / "first").read_text() == "plain"
        assert os.getxattr(made, "user.note") == b"on a directory"
        assert made.stat().st_mtime_ns == (rich / "a-dir").stat().st_mtime_ns


def test_a_single_file_goes_into_an_archive_only(
    shop: Workshop, dot: DotRow, rich: Path, tmp_path: Path
) -> None:
    run(shop, dot, tmp_path / "out.tar", place="HEAD:__default__/plain")
    assert (unpacked(tmp_path / "out.tar", tmp_path / "x") / "plain").read_text() == "plain"
    with pytest.raises(PathNotFound, match="no directory"):
        run(shop, dot, tmp_path / "out", place="HEAD:__default__/plain")
    assert not (tmp_path / "out").exists()


def test_all_subdots_of_a_managed_dot(shop: Workshop, tmp_path: Path) -> None:
    dot = dots.init_dot(shop.store, "managed", at=None, as_root=False)
    place = switching.make_place(shop.store, dot.dot, "master", None)
    root = Path(os.fsdecode(place.path))
    (root / "db").mkdir()
    (root / "db" / "rows").write_text("rows")
    shop.commit(dot, "first")
    run(shop, dot, tmp_path / "out", place="HEAD")
    run(shop, dot, tmp_path / "out.tar", place="HEAD")
    tree = describe_tree(root)
    assert describe_tree(tmp_path / "out") == tree
    assert describe_tree(unpacked(tmp_path / "out.tar", tmp_path / "x")) == tree


def test_standard_output_gets_the_same_archive(
    shop: Workshop, dot: DotRow, rich: Path, tmp_path: Path
) -> None:
    stream = io.BytesIO()
    export(shop.store, dot, ExportRequest("HEAD:__default__", STDOUT, stream))
    run(shop, dot, tmp_path / "out.tar")
    run(shop, dot, tmp_path / "out.tar.gz")
    assert stream.getvalue() == (tmp_path / "out.tar").read_bytes()
    assert gzip.decompress((tmp_path / "out.tar.gz").read_bytes()) == stream.getvalue()


def test_what_exists_is_refused_without_force(
    shop: Workshop, dot: DotRow, data: Path, tmp_path: Path
) -> None:
    (data / "a").write_text("one")
    shop.commit(dot, "first")
    taken, archive = tmp_path / "taken", tmp_path / "taken.tar"
    taken.mkdir()
    (taken / "mine").write_text("mine")
    archive.write_text("mine")
    for destination in (taken, archive):
        with pytest.raises(AlreadyExists):
            run(shop, dot, destination)
    assert (taken / "mine").read_text() == archive.read_text() == "mine"
    run(shop, dot, taken, force=True)
    run(shop, dot, archive, force=True)
    assert os.listdir(taken) == ["a"]
    assert tarfile.is_tarfile(archive)
    empty = tmp_path / "empty"
    empty.mkdir()
    run(shop, dot, empty)
    assert (empty / "a").read_text() == "one"


def test_odd_destinations_are_refused(
    shop: Workshop, dot: DotRow, data: Path, tmp_path: Path
) -> None:
    (data / "a").write_text("one")
    shop.commit(dot, "first")
    (tmp_path / "file").write_text("x")
    (tmp_path / "dir.tar").mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket.tar"))
        for name in ("file", "dir.tar", "socket.tar"):
            with pytest.raises(AlreadyExists):
                run(shop, dot, tmp_path / name, force=True)
    with pytest.raises(NotFound, match="no directory"):
        run(shop, dot, tmp_path / "nowhere" / "out.tar")
    for destination in (data, data / "sub", data.parent, tmp_path / "home" / "x.tar", Path("/")):
        with pytest.raises(WouldLose):
            run(shop, dot, destination, force=True)
    with pytest.raises(UsageError):
        export(shop.store, dot, ExportRequest("HEAD", b""))
    for place, error in (("HEAD:no", PathNotFound), ("no", RevisionNotFound), ("a..b", UsageError)):
        with pytest.raises(error):
            run(shop, dot, tmp_path / "out.tar", place=place)
    assert not (tmp_path / "out.tar").exists()
    assert (data / "a").read_text() == "one"


@pytest.mark.parametrize("name", ["out", "out.tar", "out.tar.zst"])
def test_a_failure_leaves_nothing(
    shop: Workshop,
    dot: DotRow,
    rich: Path,
    tmp_path: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read, reads = ObjectStore.read, []

    def failing(self: ObjectStore, kind: object, oid: object) -> bytes:
        reads.append(oid)
        if len(reads) > 5:
            raise ObjectMissing("lost")
        return read(self, kind, oid)  # type: ignore[arg-type]

    monkeypatch.setattr(ObjectStore, "read", failing)
    before = set(os.listdir(tmp_path))
    with pytest.raises(ObjectMissing):
        run(shop, dot, tmp_path / name)
    assert set(os.listdir(tmp_path)) == before


def test_a_dry_run_writes_nothing(shop: Workshop, dot: DotRow, rich: Path, tmp_path: Path) -> None:
    summary = run(shop, dot, tmp_path / "out", dry_run=True)
    assert summary.files == sum(
        1 for path in rich.rglob("*") if path.is_symlink() or not path.is_dir()
    )
    assert run(shop, dot, tmp_path / "out.tar").files == summary.files
    assert not (tmp_path / "out").exists()
