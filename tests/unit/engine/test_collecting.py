"""gc: what is live and for how long, what is recorded, and that it stops where something lacks."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dmsync.core.events import (
    CommitsAdded,
    CommitsForgotten,
    GarbageCollected,
    RefChanged,
)
from dmsync.core.ids import Kind
from dmsync.core.retention import RetentionPolicy
from dmsync.engine import branches, dots
from dmsync.engine.collecting.collection import CollectionRequest, collect
from dmsync.engine.collecting.marking import Marking
from dmsync.engine.collecting.roots import NS_PER_DAY, read_grace, young_operations
from dmsync.engine.collecting.space import space
from dmsync.engine.prune import PruneRequest, prune
from dmsync.engine.settings import EngineSettings
from dmsync.engine.store import Store
from dmsync.engine.undoing.lifecycle import UndoRequest, undo, undo_operation
from dmsync.errors import CannotUndo, Corruption, ObjectMissing, RevisionNotFound
from tests.support.yard import YEARS_NS, Yard


@pytest.fixture
def yard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Yard]:
    yard = Yard(tmp_path, monkeypatch)
    yield yard
    yard.shop.close()


def test_a_deleted_branch_stays_for_the_grace_and_no_longer(yard: Yard) -> None:
    kept = yard.commit("kept")
    lost = yard.lost_branch()
    for _ in range(13):
        yard.commit(days=1)
        yard.collect(14)
        assert yard.is_here(lost)
    yard.commit(days=2)
    report = yard.collect(14)
    assert not yard.is_here(lost) and yard.is_here(kept)
    assert report.dots[0].commits == 1 and report.dots[0].pack_bytes > 0
    yard.check()


@pytest.mark.parametrize("jump_ns", [YEARS_NS, -YEARS_NS])
def test_a_clock_that_jumps_ages_nothing_by_more_than_a_day(yard: Yard, jump_ns: int) -> None:
    yard.commit("kept")
    lost = yard.lost_branch()
    yard.now_ns += jump_ns
    yard.collect(14)
    for _ in range(10):
        yard.commit(days=0.1)
        yard.now_ns += (1 if _ % 2 else -1) * jump_ns
        yard.collect(14)
        assert yard.is_here(lost)


def test_an_operations_age_is_counted_from_one_to_the_next(yard: Yard) -> None:
    for days in (0, 0.5, 3, -2, 0.25):
        yard.commit(days=days)
    yard.now_ns += NS_PER_DAY // 4
    ages = [age / NS_PER_DAY for _, age in young_operations(yard.store, 1 << 62)]
    # its own time to now, then each step back: a jump of three days is one, one back is none
    assert ages[:5] == [0.25, 0.5, 0.5, 1.5, 2.0]


def test_a_store_that_nobody_uses_ages_by_its_gcs(yard: Yard) -> None:
    yard.commit("kept")
    lost = yard.lost_branch()
    for _ in range(16):
        yard.now_ns += NS_PER_DAY
        yard.collect(14)
    assert not yard.is_here(lost)


def test_dry_run_tells_the_same_numbers_and_changes_nothing(yard: Yard) -> None:
    for number in range(5):
        yard.commit(str(number) * 9000)
    lost = yard.lost_branch()
    seq = yard.store.catalog.last_seq()
    foreseen = yard.collect(dry_run=True)
    assert yard.is_here(lost) and yard.store.catalog.last_seq() == seq
    done = yard.collect()
    assert [(d.commits, d.objects, d.pack_bytes) for d in foreseen.dots] == [
        (d.commits, d.objects, d.pack_bytes) for d in done.dots
    ]
    assert yard.collect().bytes == 0


def test_what_working_states_merges_and_tags_name_is_live_without_any_grace(yard: Yard) -> None:
    from dmsync.engine.tagging import TagRequest, create_tag

    yard.commit("one")
    yard.shop.checkout(yard.dot, "other", create=True)
    (yard.tree / "file").write_text("uncommitted on other")
    yard.shop.checkout(yard.dot, "master")  # stores what the tree held
    tagged = yard.commit("tagged")
    create_tag(yard.store, yard.dot, TagRequest("v1", message="annotated"))
    yard.shop.reset(yard.dot, "HEAD~1", hard=True)
    snapshot = yard.store.catalog.working(yard.dot.dot, "other")
    assert snapshot is not None
    yard.collect(0)
    yard.check()
    assert yard.is_here(tagged)
    yard.shop.checkout(yard.dot, "other")
    assert (yard.tree / "file").read_text() == "uncommitted on other"


def test_an_open_merge_survives(yard: Yard) -> None:
    from dmsync.engine.merging import lifecycle as merging

    yard.commit("base\n")
    yard.shop.checkout(yard.dot, "topic", create=True)
    yard.commit("theirs\n")
    yard.shop.checkout(yard.dot, "master")
    yard.commit("ours\n")
    merging.merge_revision(yard.store, yard.dot, merging.MergeOptions("topic"))
    assert yard.store.catalog.merges(yard.dot.dot)
    branches.delete_branch(yard.store, yard.dot, "topic")
    yard.collect(0)
    yard.check()
    merge = yard.store.catalog.merges(yard.dot.dot)[0]
    for commit in (merge.ours, merge.theirs, merge.snapshot):
        assert yard.store.objects(yard.dot.dot).has(Kind.COMMIT, commit)


def test_pruned_content_goes_after_the_grace_and_records_stay(yard: Yard) -> None:
    made = [yard.commit(str(n) * 5000) for n in range(4)]
    prune(yard.store, yard.dot, PruneRequest(RetentionPolicy(last=1)))
    roots = [yard.store.commit(yard.dot.dot, c).root.tree for c in made]
    yard.collect(14)
    objects = yard.store.objects(yard.dot.dot)
    assert all(objects.has(Kind.PAGE, root) for root in roots if root)
    yard.collect(0)
    objects = yard.store.objects(yard.dot.dot)
    assert [objects.has(Kind.PAGE, root) for root in roots if root] == [False] * 3 + [True]
    assert all(yard.is_here(commit) for commit in made)
    yard.collect(14)  # what is gone already is not missed
    yard.check()


def test_gc_is_recorded_and_undo_says_that_it_is_final(yard: Yard) -> None:
    yard.commit("kept")
    lost = yard.lost_branch()
    deletion = yard.store.catalog.operations(1)[0].first_seq
    yard.collect()
    newest = yard.store.catalog.operations(2)
    events = [yard.store.catalog.events_of(row).events[0] for row in newest]
    assert isinstance(events[0], GarbageCollected) and isinstance(events[1], CommitsForgotten)
    assert events[1].commits == (lost,)
    with pytest.raises(CannotUndo) as final:
        list(undo(yard.store, 1, UndoRequest()))
    assert final.value.facts["reason"] == "gc"
    with pytest.raises(CannotUndo) as gone:
        undo_operation(yard.store, deletion, UndoRequest())
    assert "gc gave it up" in gone.value.message


def test_what_was_forgotten_can_come_again(yard: Yard) -> None:
    yard.commit("kept")
    lost = yard.lost_branch()
    payload = yard.store.objects(yard.dot.dot).read_commit(lost)
    root = yard.store.commit(yard.dot.dot, lost).root
    yard.collect()
    catalog = yard.store.catalog
    assert catalog.is_forgotten(yard.dot.dot, lost)
    with pytest.raises((ObjectMissing, RevisionNotFound)), yard.store.transaction("t") as tx:
        tx.append(RefChanged(yard.dot.dot, "branch/again", None, lost, "create"))
    (yard.tree / "file").write_text("on side")
    yard.commit("on side")  # the same tree
    with yard.store.objects(yard.dot.dot).writer() as writer:
        assert writer.put(Kind.COMMIT, payload) == lost
        writer.seal()
    with yard.store.transaction("t") as tx:
        tx.append(CommitsAdded(yard.dot.dot, (lost,)))
        tx.append(RefChanged(yard.dot.dot, "branch/again", None, lost, "create"))
    assert root and not catalog.is_forgotten(yard.dot.dot, lost)
    digest = catalog.digest()
    catalog.rebuild()
    assert catalog.digest() == digest


def test_something_missing_stops_it_before_anything_is_removed(yard: Yard) -> None:
    yard.commit("one")
    yard.commit("two")
    yard.lost_branch()
    packs = Path(yard.store.layout.packs_dir(yard.dot.dot))
    first = yard.store.objects(yard.dot.dot).packs()[0].name
    yard.shop.close()
    (packs / first).rename(packs.parent / "aside")
    yard.shop.store = Store.open(str(yard.home), yard.shop.settings)
    before = sorted(path.name for path in packs.glob("*.pack"))
    with pytest.raises(Corruption):
        yard.collect()
    assert sorted(path.name for path in packs.glob("*.pack")) == before
    yard.shop.close()
    (packs.parent / "aside").rename(packs / first)
    yard.shop.store = Store.open(str(yard.home), yard.shop.settings)


def test_deleted_dots_go_after_the_grace(yard: Yard) -> None:
    yard.commit("one")
    dots.delete_dot(yard.store, "shop")
    trash = Path(yard.store.layout.trash_dir)
    yard.collect(14)
    assert list(trash.iterdir())
    report = yard.collect(0)
    assert report.store.purged == ["shop"] and not list(trash.iterdir())
    assert yard.store.catalog.dot(yard.dot.dot) is None
    digest = yard.store.catalog.digest()
    yard.store.catalog.rebuild()
    assert yard.store.catalog.digest() == digest


def test_leftovers_of_killed_commands_go(yard: Yard) -> None:
    yard.commit("one")
    layout = yard.store.layout
    scratch = Path(layout.temporary_dir) / ("ab" * 16)
    scratch.mkdir(parents=True)
    (scratch / "copy").write_bytes(b"x" * 9000)
    unsealed = Path(layout.packs_dir(yard.dot.dot)) / "tmp-left"
    unsealed.write_bytes(b"x" * 9000)
    part = Path(layout.quarantine_dir(yard.dot.dot)) / "left.part"
    part.write_bytes(b"x" * 9000)
    report = yard.collect(0)
    assert report.bytes >= 3 * 9000
    assert not scratch.exists() and not unsealed.exists() and not part.exists()


def test_stat_caches_of_what_goes_are_removed(yard: Yard) -> None:
    yard.commit("one")
    yard.commit("two")
    cache = Path(yard.store.layout.stat_cache_file(yard.dot.dot, "__attached__"))
    old = cache.read_bytes()
    yard.commit("three")
    yard.shop.reset(yard.dot, "HEAD~2", hard=True)
    cache.write_bytes(old)
    yard.collect(0)
    assert not cache.exists()
    (yard.tree / "file").write_text("two")
    os.utime(yard.tree / "file", ns=(yard.now_ns, yard.now_ns))
    yard.commit("two")
    yard.check()


def test_a_dot_in_use_is_left_out_and_named(yard: Yard) -> None:
    yard.commit("one")
    yard.lost_branch()
    settings = EngineSettings("gc", lock_wait_s=0, holding="never")
    with Store.open(str(yard.home), settings) as store:
        report = collect(store, None, CollectionRequest(0))
    assert [dot.name for dot in report.skipped] == ["shop"]


def test_df_tells_what_gc_frees(yard: Yard) -> None:
    yard.commit("one")
    yard.lost_branch()
    now = space(yard.store, None, 14 * NS_PER_DAY).dots[0]
    assert now.grace_bytes > 0 and now.dead_bytes == 0 and now.grace_left_ns is not None
    later = space(yard.store, None, 0).dots[0]
    assert later.grace_bytes == 0 and later.dead_bytes == now.grace_bytes
    assert {keeper.why for keeper in now.keepers} == {"branch", "grace"}
    yard.collect(0)
    after = space(yard.store, None, 0).dots[0]
    assert after.dead_bytes == 0 and after.live_bytes <= now.live_bytes


def test_content_that_comes_while_gc_marks_is_live(yard: Yard) -> None:
    """A fetch may fill commits that were hollow when they were marked."""
    from dmsync.core.events import CommitsAdded
    from dmsync.core.ids import short_key

    made = [yard.commit(str(n) * 5000) for n in range(3)]
    prune(yard.store, yard.dot, PruneRequest(RetentionPolicy(last=1)))
    root = yard.store.commit(yard.dot.dot, made[0]).root.tree
    assert root is not None
    marking = Marking(yard.store, yard.dot.dot, read_grace(yard.store, 0))
    marking.mark()
    assert not marking.is_live(short_key(root))
    with yard.store.transaction("t") as tx:
        tx.append(CommitsAdded(yard.dot.dot, (made[0],)))
    assert short_key(root) in marking.mark()
    assert marking.is_live(short_key(root))


def test_what_is_made_and_left_while_gc_marks_has_its_grace(yard: Yard) -> None:
    yard.commit("kept")
    marking = Marking(yard.store, yard.dot.dot, read_grace(yard.store, 14 * NS_PER_DAY))
    marking.mark()
    lost = yard.lost_branch()
    marking.mark()
    assert lost in marking.commits
