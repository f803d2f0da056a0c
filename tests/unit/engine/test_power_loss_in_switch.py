"""A loss of power in the middle of a switch: a file that was changed in place may have its new
bytes on disk and its old times, so that its stat vouches for what it no longer holds."""

import os
from pathlib import Path

import pytest

from dmsync.core.chunking import FIXED_CHUNK_BYTES
from dmsync.core.events import TreeSwitchStarted
from dmsync.core.ids import ObjectId
from dmsync.engine import switching, trees
from dmsync.storage.catalog import DotRow
from dmsync.storage.stat_cache import (
    Stat,
    StatCache,
    StatCacheWriter,
    decode_live,
    encode_live,
)
from tests.support.working_store import Workshop

BYTES = 2 * FIXED_CHUNK_BYTES + 100
OLD, NEW = b"o" * BYTES, b"n" * BYTES
MIXED = NEW[:FIXED_CHUNK_BYTES] + OLD[FIXED_CHUNK_BYTES:]


class PowerLoss(Exception):
    pass


@pytest.fixture
def commits(shop: Workshop, dot: DotRow, data: Path) -> dict[str, ObjectId]:
    """first: OLD; second: NEW; third: OLD, and a file more. The tree holds the first."""
    (data / "data.db").write_bytes(OLD)
    made = {"first": shop.commit(dot, "first").commit}
    (data / "data.db").write_bytes(NEW)
    made["second"] = shop.commit(dot, "second").commit
    (data / "data.db").write_bytes(OLD)
    (data / "more").write_text("more")
    made["third"] = shop.commit(dot, "third").commit
    shop.reset(dot, made["first"].hex(), hard=True)
    return made


def lose_power(shop: Workshop, dot: DotRow, data: Path, commits: dict[str, ObjectId]) -> None:
    """In a switch from the first to the second: half of the new bytes arrived, the times did not.

    No call gives a file its old ctime back, so the cache is given the new one instead.
    """
    first, second = commits["first"], commits["second"]
    with shop.store.transaction("reset") as tx:
        tx.append(TreeSwitchStarted(dot.dot, "master", first, second, "reset"))
    with open(data / "data.db", "r+b") as file:
        file.write(MIXED)
    place = trees.place_for(shop.store, dot.dot, "master")
    vouch_for(place.stat_path, data / "data.db")
    shop.reopen()


def vouch_for(stat_path: str, path: Path) -> None:
    cache = StatCache.load(stat_path)
    assert cache is not None
    writer = StatCacheWriter()
    for block in reversed(list(cache.blocks())):
        names, stats = decode_live(block.live)
        now = [
            stat_now(path) if name == b"data.db" else s
            for name, s in zip(names, stats, strict=True)
        ]
        writer.append(block.path, encode_live(names, now), block.remarks)
    writer.finish(cache.root, cache.listed_ns).save(stat_path)


def stat_now(path: Path) -> Stat:
    found = os.stat(path)
    return (
        found.st_mode,
        found.st_ino,
        found.st_size,
        found.st_mtime_ns,
        found.st_ctime_ns,
        found.st_uid,
        found.st_gid,
        found.st_nlink,
    )


def test_reset_to_a_third_commit(
    shop: Workshop, dot: DotRow, data: Path, commits: dict[str, ObjectId]
) -> None:
    lose_power(shop, dot, data, commits)
    shop.reset(dot, commits["third"].hex(), hard=True)
    assert (data / "data.db").read_bytes() == OLD
    assert shop.changes(dot) == []


def test_what_the_tree_held_is_stored_as_it_was(
    shop: Workshop, dot: DotRow, data: Path, commits: dict[str, ObjectId]
) -> None:
    lose_power(shop, dot, data, commits)
    summary = shop.reset(dot, commits["third"].hex(), hard=True)
    assert summary.stash is not None
    shop.reset(dot, summary.stash, hard=True)
    assert (data / "data.db").read_bytes() == MIXED


def test_checkout_of_another_branch(
    shop: Workshop, dot: DotRow, data: Path, commits: dict[str, ObjectId]
) -> None:
    from dmsync.engine import branches

    branches.create_branch(shop.store, dot, "other", commits["third"].hex())
    lose_power(shop, dot, data, commits)
    shop.checkout(dot, "other")
    assert (data / "data.db").read_bytes() == OLD


def test_finishing_the_switch(
    shop: Workshop, dot: DotRow, data: Path, commits: dict[str, ObjectId]
) -> None:
    lose_power(shop, dot, data, commits)
    shop.commit(dot, "after")
    assert (data / "data.db").read_bytes() == NEW


def test_a_second_loss_in_the_switch_that_follows(
    shop: Workshop,
    dot: DotRow,
    data: Path,
    commits: dict[str, ObjectId],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lose_power(shop, dot, data, commits)

    def cut(*_: object, **__: object) -> None:
        raise PowerLoss

    with monkeypatch.context() as patch, pytest.raises(PowerLoss):
        patch.setattr(switching, "complete_switch", cut)
        shop.reset(dot, commits["third"].hex(), hard=True)
    shop.reopen()
    shop.reset(dot, commits["first"].hex(), hard=True)
    assert (data / "data.db").read_bytes() == OLD


def test_status_tells_what_is_there(
    shop: Workshop, dot: DotRow, data: Path, commits: dict[str, ObjectId]
) -> None:
    lose_power(shop, dot, data, commits)
    assert shop.changes(dot) == [("*", b"__default__/data.db")]


def test_a_cache_without_what_the_switch_led_to_vouches_for_nothing(
    shop: Workshop,
    dot: DotRow,
    data: Path,
    commits: dict[str, ObjectId],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from dmsync.errors import ContentAbsent

    lose_power(shop, dot, data, commits)

    def absent(*_: object) -> None:
        raise ContentAbsent("only its record is here")

    place = trees.place_for(shop.store, dot.dot, "master")
    switch = shop.store.catalog.switches(dot.dot)[0]
    with monkeypatch.context() as patch:
        patch.setattr(trees, "snapshot_root", absent)
        trees.save_doubted_cache(shop.store, dot.dot, place, switch)
    assert not os.path.exists(place.stat_path)
