"""gc: what is no garbage although nothing names it, and what stops it."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dmsync.core.events import (
    CommitsAdded,
    DotCreated,
    DotRestored,
    RefChanged,
)
from dmsync.core.ids import ObjectId
from dmsync.engine import branches, dots
from dmsync.engine.collecting import collection
from dmsync.engine.collecting.marking import Marking
from dmsync.engine.collecting.roots import NS_PER_DAY
from dmsync.engine.store import Store
from dmsync.engine.undoing.lifecycle import UndoRequest, undo_operation
from dmsync.errors import Busy, Corruption
from dmsync.storage.event_log import EventLog
from dmsync.storage.holds import Sweeping
from dmsync.storage.locks import FileLock
from dmsync.storage.object_store import ObjectStore
from dmsync.storage.pack_sweeping import PreparedSweep, prepare_sweep
from tests.support.yard import Yard


@pytest.fixture
def yard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Yard]:
    yard = Yard(tmp_path, monkeypatch)
    yield yard
    yard.shop.close()


def purge_and_bring_again(yard: Yard) -> ObjectId:
    """The dot is deleted and purged; then the same dot comes from elsewhere."""
    made = yard.commit("one")
    packs = Path(yard.store.layout.packs_dir(yard.dot.dot))
    copies = {path.name: path.read_bytes() for path in packs.glob("*.pack")}
    dots.delete_dot(yard.store, "shop")
    yard.collect(0)
    yard.store.layout.make_dot_dirs(yard.dot.dot)
    for name, data in copies.items():
        (packs / name).write_bytes(data)
    with yard.store.transaction("t") as tx:
        tx.append(DotCreated(yard.dot.dot, yard.dot.namespace, "shop", yard.dot.owner))
        tx.append(CommitsAdded(yard.dot.dot, (made,)))
        tx.append(RefChanged(yard.dot.dot, "branch/master", None, made, "create"))
    return made


def test_a_purged_dot_that_comes_again_outlives_a_rebuild(yard: Yard) -> None:
    made = purge_and_bring_again(yard)
    digest = yard.store.catalog.digest()
    yard.store.catalog.rebuild()
    assert yard.store.catalog.has_commit(yard.dot.dot, made)
    assert yard.store.catalog.digest() == digest
    yard.check()


def test_trash_that_the_log_has_not_purged_is_never_removed(yard: Yard) -> None:
    made = purge_and_bring_again(yard)
    trash = Path(yard.store.layout.trash_dir)
    foreign = trash / ("ab" * 16 + "-00000001")  # known to a log that lost its end
    again = trash / (yard.dot.dot.hex() + "-00000002")
    for path in (foreign, again):
        path.mkdir()
        (path / "pack").write_bytes(b"x" * 9000)
    yard.collect(0)
    assert (foreign / "pack").exists() and (again / "pack").exists() and yard.is_here(made)


def test_trash_of_a_purged_dot_whose_removal_was_cut_goes(yard: Yard) -> None:
    yard.commit("one")
    dots.delete_dot(yard.store, "shop")
    (trash,) = Path(yard.store.layout.trash_dir).iterdir()
    yard.collect(0)
    (trash / "packs").mkdir(parents=True)
    yard.collect(0)
    assert not trash.exists()


@pytest.mark.parametrize("has_pack", [True, False])
def test_what_a_dot_that_came_back_left_in_the_trash_goes(yard: Yard, has_pack: bool) -> None:
    made = yard.commit("one")
    dots.delete_dot(yard.store, "shop")
    (trash,) = Path(yard.store.layout.trash_dir).iterdir()
    yard.store.layout.make_dot_dirs(yard.dot.dot)
    for pack in (trash / "packs").iterdir():
        pack.rename(Path(yard.store.layout.packs_dir(yard.dot.dot)) / pack.name)
    if has_pack:
        (trash / "packs" / "0.pack").write_bytes(b"more than the log knows")
    with yard.store.transaction("t") as tx:
        tx.append(DotRestored(yard.dot.dot, yard.dot.namespace, "shop"))
    yard.collect(14)
    assert trash.exists()
    yard.collect(0)
    assert trash.exists() == has_pack and yard.is_here(made)


@pytest.mark.parametrize("sign", ["lost-end", "catalog"])
@pytest.mark.parametrize("dry_run", [True, False])
def test_a_loss_that_nobody_acknowledged_stops_it(yard: Yard, sign: str, dry_run: bool) -> None:
    yard.commit("kept")
    lost = yard.lost_branch()
    dots.init_dot(yard.store, "other", at=None, as_root=False)
    dots.delete_dot(yard.store, "other")
    (trash,) = Path(yard.store.layout.trash_dir).iterdir()
    kept = yard.home / "damaged" / "catalog-1.sqlite"
    if sign == "catalog":
        kept.parent.mkdir()
        kept.write_bytes(b"")
    else:
        EventLog(yard.store.layout.events_dir).note_lost_end("1 operation is gone")
    with pytest.raises(Corruption) as refused:
        yard.collect(0, dry_run=dry_run)
    assert "dm fsck --repair" in refused.value.hint
    assert yard.is_here(lost) and trash.exists()
    if sign == "catalog":
        kept.rename(f"{kept}.done")
    else:
        EventLog(yard.store.layout.events_dir).forget_lost_end()
    yard.collect(0)
    assert not yard.is_here(lost) and not trash.exists()


def test_a_loss_noticed_on_the_way_stops_it(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    yard.commit("kept")
    lost = yard.lost_branch()
    log = EventLog(yard.store.layout.events_dir)
    mark = Marking.mark

    def mark_and_lose(self: Marking) -> list[bytes]:
        log.note_lost_end("1 operation is gone")
        return mark(self)

    monkeypatch.setattr(Marking, "mark", mark_and_lose)
    with pytest.raises(Corruption):
        yard.collect(0)
    assert yard.is_here(lost)
    log.forget_lost_end()


def test_a_young_deletion_outlives_an_older_one_of_that_name(yard: Yard) -> None:
    yard.commit("old")
    dots.delete_dot(yard.store, "shop")
    other = yard.shop.attach("other", yard.tree)
    for _ in range(20):
        yard.now_ns += NS_PER_DAY
        dots.rename_dot(yard.store, "other", "another")
        dots.rename_dot(yard.store, "another", "other")
    young = dots.init_dot(yard.store, "shop", at=None, as_root=False)
    dots.delete_dot(yard.store, "shop")
    report = yard.collect(14)
    assert report.store.purged == ["shop"]
    assert yard.store.catalog.dot(yard.dot.dot) is None and yard.store.catalog.dot(other.dot)
    row = yard.store.catalog.dot(young.dot)
    assert row is not None and row.trash is not None
    assert Path(yard.store.layout.trashed_dot_dir(row.trash)).exists()


def test_a_gap_in_history_stops_it(yard: Yard) -> None:
    packs = Path(yard.store.layout.packs_dir(yard.dot.dot))
    yard.commit("one")
    yard.commit("two")
    before = set(packs.glob("*.pack"))
    yard.commit("one")  # a tree that is there: its pack holds the commit alone
    (second,) = set(packs.glob("*.pack")) - before
    yard.commit("three")
    lost = yard.lost_branch()
    yard.shop.close()
    second.rename(yard.home / "aside")
    for path in yard.home.glob("catalog.sqlite*"):
        path.unlink()
    yard.shop.store = Store.open(str(yard.home), yard.shop.settings)
    assert yard.store.catalog.missing_commits(yard.dot.dot)
    with pytest.raises(Corruption):
        yard.collect(0)
    assert yard.is_here(lost) and len(list(packs.glob("*.pack"))) >= 3


def test_a_deleted_annotated_tag_comes_back_with_its_commit(yard: Yard) -> None:
    from dmsync.engine.tagging import TagRequest, create_tag, delete_tags

    yard.commit("kept")
    yard.shop.checkout(yard.dot, "side", create=True)
    tagged = yard.commit("tagged")
    create_tag(yard.store, yard.dot, TagRequest("v1", message="annotated"))
    yard.shop.checkout(yard.dot, "master")
    branches.delete_branch(yard.store, yard.dot, "side")
    for _ in range(20):
        yard.commit(days=1)
    delete_tags(yard.store, yard.dot, ["v1"])
    deletion = yard.store.catalog.operations(1)[0].first_seq
    yard.collect(14)
    assert yard.is_here(tagged)
    undo_operation(yard.store, deletion, UndoRequest())
    yard.check()


@pytest.mark.parametrize("is_held", [True, False])
def test_the_place_of_a_purged_dot_is_taken_from_nobody(yard: Yard, is_held: bool) -> None:
    """An undo brought its directory back just before; or it is coming again."""
    yard.commit("one")
    dots.delete_dot(yard.store, "shop")
    place = Path(yard.store.layout.dot_dir(yard.dot.dot))
    (trash,) = Path(yard.store.layout.trash_dir).iterdir()
    trash.rename(place)
    hold = FileLock(str(place / "hold.lock"), what="a transfer", shared=True)
    with hold if is_held else contextlib.nullcontext():
        yard.collect(0)
        assert place.exists() == is_held
    assert yard.store.catalog.dot(yard.dot.dot) is None
    assert not trash.exists()


def test_a_store_of_deleted_dots_ages_by_its_gcs(yard: Yard) -> None:
    yard.commit("one")
    dots.delete_dot(yard.store, "shop")
    purged = []
    for _ in range(16):
        yard.now_ns += NS_PER_DAY
        purged += yard.collect(14).store.purged
    assert purged == ["shop"] and not list(Path(yard.store.layout.trash_dir).iterdir())
    digest = yard.store.catalog.digest()
    yard.store.catalog.rebuild()
    assert yard.store.catalog.digest() == digest


def test_what_moved_meanwhile_is_prepared_again_without_the_hold(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    yard.commit("kept")
    lost, saved = yard.lost_branch("one"), yard.lost_branch("two")
    held: list[bool] = []

    def prepare(objects: ObjectStore, *rest: Any, **options: Any) -> PreparedSweep | None:
        try:
            with Sweeping(objects.dot_dir, wait_s=0):
                held.append(False)
        except Busy:
            held.append(True)
        made = prepare_sweep(objects, *rest, **options)
        if len(held) == 1:
            with (
                Store.open(str(yard.home), yard.shop.settings) as other,
                other.transaction("t") as tx,
            ):
                tx.append(RefChanged(yard.dot.dot, "branch/again", None, saved, "create"))
        return made

    monkeypatch.setattr(collection, "prepare_sweep", prepare)
    yard.collect(0)
    assert held == [False, False]
    assert yard.is_here(saved) and not yard.is_here(lost)
    yard.check()


def test_what_keeps_moving_is_prepared_under_the_hold_in_the_end(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    yard.commit("kept")
    lost = yard.lost_branch()
    answers = [False, False, False]
    fits = PreparedSweep.fits

    def never(self: PreparedSweep, live_since: list[bytes]) -> bool:
        return answers.pop() if answers else fits(self, live_since)

    monkeypatch.setattr(PreparedSweep, "fits", never)
    report = yard.collect(0)
    assert not answers and not yard.is_here(lost) and report.dots[0].commits == 1
    yard.check()
