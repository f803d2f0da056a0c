"""Stored bytes are checked, and what SQLite holds can be thrown away."""

import os
from pathlib import Path

import pytest

from tests.support.cluster import Cluster

POSITIONS_PER_PACK = 9
PROJECTIONS = ("catalog.sqlite", "index.sqlite")

QUERIES = (
    ("log",),
    ("log", "--json"),
    ("log", "--graph"),
    ("branch",),
    ("branch", "--json"),
    ("list", "-H"),
    ("diff", "HEAD^", "HEAD"),
    ("diff", "master", "other", "--stat"),
    ("diff",),
    ("show", "HEAD"),
    ("show", "HEAD", "--json"),
    ("remote",),
    ("remote", "-v"),
    ("dot", "show"),
    ("dot", "show", "-H"),
    ("dot", "show", "--json"),
    ("cat", "HEAD:__default__/HELLO"),
    ("ls", "HEAD:__default__"),
)


@pytest.fixture
def lived_in(pair: tuple[Cluster, Cluster]) -> Cluster:
    """A store with branches, a remote, a rename, a reset and uncommitted changes."""
    near, far = pair
    near.init("apples", {"HELLO": "one", "large": bytes(range(256)) * 4096, "gone": "x"})
    near.commit("first", "-d", "apples=green")
    near.write("apples", {"HELLO": "two"})
    near.commit("second")
    near.run("checkout", "-b", "other")
    near.write("apples", {"OTHER": "other"})
    near.commit("on other")
    near.run("push", "far")
    far.run("switch", "apples")
    far.write("apples@other", {"FAR": "far"})
    far.run("checkout", "other")
    far.commit("from far")
    near.run("pull", "far")
    near.run("checkout", "master")
    near.run("reset", "--hard", "HEAD^")
    (near.tree("apples") / "gone").rename(near.tree("apples") / "renamed")
    near.commit("renamed")
    near.write("apples", {"HELLO": "not committed"})
    return near


def answers(cluster: Cluster) -> dict[str, str]:
    """What every query prints."""
    return {" ".join(query): cluster.run(*query).stdout for query in QUERIES}


def projections(cluster: Cluster) -> list[Path]:
    """SQLite's files in the store, its journals included."""
    return [path for name in PROJECTIONS for path in sorted(cluster.home.rglob(f"{name}*"))]


def test_every_query_answers_the_same_after_sqlite_is_deleted(lived_in: Cluster) -> None:
    """P3: the log and the packs are all there is; byte for byte."""
    before = answers(lived_in)
    found = projections(lived_in)
    assert {path.name for path in found} >= set(PROJECTIONS)
    for path in found:
        path.unlink()
    after = answers(lived_in)
    for query, text in before.items():
        assert after[query] == text, query
    lived_in.run("fsck", "--full")


def test_damaged_sqlite_files_are_made_anew(lived_in: Cluster) -> None:
    """Zeros over the first page: neither a crash nor a wrong answer."""
    before = answers(lived_in)
    for path in projections(lived_in):
        if path.name in PROJECTIONS:
            with path.open("r+b") as file:
                file.write(bytes(4096))
        else:
            path.unlink()
    assert answers(lived_in) == before


def test_fsck_finds_a_flipped_bit_anywhere_in_a_pack(lived_in: Cluster) -> None:
    packs = sorted(lived_in.home.glob("dots/*/packs/*.pack"))
    assert len(packs) >= 3
    for pack in packs:
        for position in positions_in(pack):
            flip_bit(pack, position)
            damaged = lived_in.run("fsck", "--full", check=False)
            assert damaged.code == 16, f"{pack.name} at {position}: {damaged.describe()}"
            assert pack.name in damaged.stdout + damaged.stderr
            flip_bit(pack, position)
    lived_in.run("fsck", "--full")


def test_reading_a_damaged_record_fails_instead_of_returning_it(lived_in: Cluster) -> None:
    """The file's bytes are either right or not there (16)."""
    sound = lived_in.run("cat", "other:__default__/large").stdout
    damaged_reads = 0
    for pack in sorted(lived_in.home.glob("dots/*/packs/*.pack")):
        for position in positions_in(pack):
            flip_bit(pack, position)
            read = lived_in.run("cat", "other:__default__/large", check=False)
            assert read.code in (0, 16), read.describe()
            assert read.stdout == sound if read.code == 0 else sound.startswith(read.stdout)
            damaged_reads += read.code == 16
            flip_bit(pack, position)
    assert damaged_reads > 0


def positions_in(pack: Path) -> list[int]:
    """Byte positions over the whole pack, its first and last byte among them."""
    last = pack.stat().st_size - 1
    return sorted({last * step // (POSITIONS_PER_PACK - 1) for step in range(POSITIONS_PER_PACK)})


def flip_bit(path: Path, position: int) -> None:
    """Flip one bit; doing it twice restores the file. Its time stays: bits rot silently."""
    times = path.stat()
    mode = times.st_mode
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 0x10]))
    path.chmod(mode)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
