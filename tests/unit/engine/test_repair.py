"""Repair of what is on this machine: packs, index, catalog, log. What a remote gives back, and
what commands say meanwhile: tests/e2e/test_corruption.py."""

import os
import shutil
import sqlite3
from pathlib import Path

import pytest

from dmsync.core.ids import Kind
from dmsync.engine.dots import init_dot
from dmsync.engine.fsck import fsck
from dmsync.engine.history import log_commits
from dmsync.engine.repairing.event_log import repair_log
from dmsync.engine.repairing.recovered_state import put_back
from dmsync.engine.repairing.repair import RepairReport, repair
from dmsync.errors import Corruption, StoreNotFound
from dmsync.storage.catalog import DotRow
from dmsync.storage.event_log import EventLog
from dmsync.storage.layout import Layout
from dmsync.storage.packs import HEADER_BYTES, read_footer
from tests.support.working_store import Workshop


@pytest.fixture
def lived_in(shop: Workshop, dot: DotRow, data: Path) -> DotRow:
    """Three commits of a file that changes a little, so that there are deltas."""
    content = bytearray(os.urandom(300_000))
    for number in range(3):
        content[1000 * number] ^= 1
        (data / "large").write_bytes(content)
        (data / "small").write_text(f"version {number}\n" * 50)
        shop.commit(dot, f"commit {number}")
    return dot


def home_of(shop: Workshop) -> Path:
    return Path(shop.store.home)


def packs_of(shop: Workshop, dot: DotRow) -> list[Path]:
    """Largest first."""
    found = (home_of(shop) / "dots" / dot.dot.hex() / "packs").glob("*.pack")
    return sorted(found, key=lambda path: -path.stat().st_size)


def repaired(shop: Workshop) -> RepairReport:
    """What `dm fsck --repair` does without a remote."""
    shop.store.close()
    report = RepairReport()
    repair_log(shop.store.home, report, lock_wait_s=2, dry_run=False)
    shop.store = type(shop.store).open(shop.store.home, shop.settings)
    put_back(shop.store, report, dry_run=False)
    return repair(shop.store, report)


def problems(report: RepairReport) -> list[str]:
    assert report.after is not None
    return [f"{problem.where}: {problem.message}" for problem in report.after.problems]


def flip(path: Path, at: int, bit: int = 3) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << bit]))


# --- packs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("keeps_index", [True, False])
@pytest.mark.parametrize("place", ["header", "end"])
def test_a_pack_without_header_or_table_gives_all_its_records_back(
    shop: Workshop, lived_in: DotRow, place: str, keeps_index: bool
) -> None:
    shop.store.close()
    for pack in packs_of(shop, lived_in):
        if place == "header":
            flip(pack, 2)
        else:
            os.truncate(pack, pack.stat().st_size - 30)
    if not keeps_index:
        for path in (home_of(shop) / "dots" / lived_in.dot.hex()).glob("index.sqlite*"):
            path.unlink()
    shop.store = type(shop.store).open(shop.store.home, shop.settings)
    assert fsck(shop.store, full=True).problems
    report = repaired(shop)
    assert problems(report) == []
    kept = home_of(shop) / "dots" / lived_in.dot.hex() / "damaged"
    assert len(list(kept.iterdir())) >= 3
    assert shop.messages(lived_in) == ["commit 0", "commit 1", "commit 2"]


def test_a_lost_chunk_comes_from_the_working_tree_and_a_commit_from_the_catalog(
    shop: Workshop, lived_in: DotRow
) -> None:
    newest = log_commits(shop.store, lived_in)[0].id
    objects = shop.store.objects(lived_in.dot)
    assert objects.has(Kind.COMMIT, newest)
    shop.store.close()
    for pack in packs_of(shop, lived_in):
        fd = os.open(pack, os.O_RDONLY)
        footer, _ = read_footer(fd, pack.name)
        os.close(fd)
        if newest[:8] in set(footer.keys):
            offset = footer.offsets[list(footer.keys).index(newest[:8])]
            flip(pack, offset + 5)
    shop.store = type(shop.store).open(shop.store.home, shop.settings)
    found = fsck(shop.store, full=True).problems
    assert any(newest.hex() in problem.commits for problem in found)
    report = repaired(shop)
    assert problems(report) == [] and report.objects_healed == 1


def test_what_nothing_has_is_named_with_commits_and_paths(
    shop: Workshop, lived_in: DotRow, data: Path
) -> None:
    shutil.rmtree(data)
    data.mkdir()
    shop.store.close()
    lost = packs_of(shop, lived_in)[0]
    lost.unlink()
    shop.store = type(shop.store).open(shop.store.home, shop.settings)
    report = repaired(shop)
    assert report.after is not None
    assert any("was lost" in problem.message for problem in report.after.problems)
    named = [p for p in report.after.problems if p.paths]
    assert {path for problem in named for path in problem.paths} == {
        "__default__/large",
        "__default__/small",
    } or all(problem.commits for problem in named)
    assert any(lost.name in problem.where for problem in report.after.problems)
    assert shop.messages(lived_in) == ["commit 0", "commit 1", "commit 2"]


def test_packs_that_changed_places_between_dots_go_home(
    shop: Workshop, lived_in: DotRow, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    other = init_dot(shop.store, "other", at=str(tmp_path / "other"), as_root=False)
    (tmp_path / "other" / "file").write_bytes(os.urandom(5000))
    shop.commit(other, "in another dot")
    shop.store.close()
    mine, theirs = packs_of(shop, lived_in)[0], packs_of(shop, other)[0]
    mine.rename(theirs.parent / mine.name)
    theirs.rename(mine.parent / theirs.name)
    shop.store = type(shop.store).open(shop.store.home, shop.settings)
    told = [problem.message for problem in fsck(shop.store, full=True).problems]
    assert "it belongs to another dot" in told
    assert problems(repaired(shop)) == []
    assert mine.exists() and theirs.exists()


def test_records_of_a_cut_pack_are_found_without_table_and_index(
    shop: Workshop, lived_in: DotRow
) -> None:
    """Behind bytes that are no record the search goes on."""
    shop.store.close()
    pack = packs_of(shop, lived_in)[0]
    fd = os.open(pack, os.O_RDONLY)
    footer, _ = read_footer(fd, pack.name)
    os.close(fd)
    offsets = list(footer.offsets)
    with pack.open("r+b") as file:
        file.seek(offsets[1])
        file.write(b"\xff" * 40)
        file.truncate(footer.records_end)
    for path in pack.parent.parent.glob("index.sqlite*"):
        path.unlink()
    shop.store = type(shop.store).open(shop.store.home, shop.settings)
    report = repaired(shop)
    (action,) = [action for action in report.actions if action.where == pack.name]
    sound = int(action.message.partition("; ")[2].split()[0])
    assert sound >= len(offsets) - 2
    assert offsets[0] == HEADER_BYTES


# --- projections -----------------------------------------------------------------------------------


def test_an_index_that_misses_records_is_built_again_before_anything_is_called_lost(
    shop: Workshop, lived_in: DotRow
) -> None:
    """A stale index with the right names of packs."""
    path = home_of(shop) / "dots" / lived_in.dot.hex() / "index.sqlite"
    shop.store.close()
    with sqlite3.connect(path) as index:
        index.execute("DELETE FROM objects WHERE key % 2 = 0")
        index.execute("UPDATE objects SET offset = offset + 1 WHERE key % 3 = 0")
    index.close()
    shop.store = type(shop.store).open(shop.store.home, shop.settings)
    for info in log_commits(shop.store, lived_in):
        assert shop.store.objects(lived_in.dot).read_commit(info.id)
    assert fsck(shop.store, full=True).problems == []


@pytest.mark.parametrize(
    "harm",
    [
        "UPDATE commits SET first_parent = rid",
        "UPDATE commits SET first_parent = (SELECT max(rid) FROM commits)",
        "UPDATE commits SET generation = 1",
        "UPDATE commits SET jump = (SELECT max(rid) FROM commits)",
        "UPDATE commit_payloads SET payload = (SELECT payload FROM commit_payloads LIMIT 1)",
        "UPDATE refs SET name = 'branch/mastes' WHERE name = 'branch/master'",
        "UPDATE refs SET target = 1 WHERE name = 'branch/master'",
        "UPDATE dots SET head = 'mastes'",
        "DELETE FROM refs",
    ],
)
def test_a_catalog_that_contradicts_itself_is_built_again_and_every_walk_ends(
    shop: Workshop, lived_in: DotRow, harm: str
) -> None:
    shop.store.close()
    with sqlite3.connect(home_of(shop) / "catalog.sqlite") as catalog:
        catalog.execute(harm)
    catalog.close()
    shop.store = type(shop.store).open(shop.store.home, shop.settings)
    assert shop.messages(lived_in) == ["commit 0", "commit 1", "commit 2"]
    assert shop.store.catalog.head(lived_in.dot) == "master"
    assert problems(repaired(shop)) == []


def test_an_older_catalog_copied_over_is_caught_up(
    shop: Workshop, lived_in: DotRow, data: Path
) -> None:
    catalog = home_of(shop) / "catalog.sqlite"
    shop.store.close()
    older = catalog.read_bytes()
    shop.store = type(shop.store).open(shop.store.home, shop.settings)
    (data / "small").write_text("newer")
    shop.commit(lived_in, "commit 3")
    shop.store.close()
    catalog.write_bytes(older)
    shop.store = type(shop.store).open(shop.store.home, shop.settings)
    assert shop.messages(lived_in)[-1] == "commit 3"
    assert fsck(shop.store, full=True).problems == []


def test_the_stat_cache_of_another_branch_hides_no_change(
    shop: Workshop, lived_in: DotRow, data: Path
) -> None:
    stat = next((home_of(shop) / "dots" / lived_in.dot.hex() / "stat").iterdir())
    foreign = stat.read_bytes()
    (data / "small").write_text("changed, of the same length"[:9])
    shop.commit(lived_in, "changed")
    (data / "small").write_text("not committed")
    stat.write_bytes(foreign)
    assert shop.changes(lived_in) == [("*", b"__default__/small")]


# --- the log -----------------------------------------------------------------------------------------


def test_any_flipped_bit_of_the_log_is_corrected_exactly(shop: Workshop, lived_in: DotRow) -> None:
    segment = home_of(shop) / "events" / "00000001.log"
    shop.store.close()
    sound = segment.read_bytes()
    for at in range(0, len(sound), 37):
        flip(segment, at, at % 8)
        report = RepairReport()
        assert not repair_log(shop.store.home, report, lock_wait_s=2, dry_run=False)
        assert segment.read_bytes() == sound, at
        assert len(report.actions) == 1
    shop.store = type(shop.store).open(shop.store.home, shop.settings)
    assert fsck(shop.store, full=True).problems == []


@pytest.mark.parametrize("loss", ["middle", "end", "whole"])
def test_what_the_log_lost_is_put_back_from_the_catalog(
    shop: Workshop, lived_in: DotRow, data: Path, loss: str
) -> None:
    shop.checkout(lived_in, "topic", create=True)
    (data / "small").write_text("on topic")
    shop.commit(lived_in, "topical")
    refs = {row.name: row.target for row in shop.store.catalog.refs(lived_in.dot)}
    epoch, cluster = shop.store.catalog.epoch(), shop.store.catalog.cluster_id()
    segment = home_of(shop) / "events" / "00000001.log"
    ends = [end for _, end in EventLog(str(segment.parent)).read()]
    shop.store.close()
    if loss == "whole":
        segment.unlink()
    elif loss == "end":
        os.truncate(segment, ends[-3].end_offset)
    else:
        with segment.open("r+b") as file:
            file.seek(ends[3].end_offset + 60)
            file.write(os.urandom(30))
    report = repaired(shop)
    assert problems(report) == []
    catalog = shop.store.catalog
    assert {row.name: row.target for row in catalog.refs(lived_in.dot)} == refs
    assert catalog.epoch() != epoch and catalog.cluster_id() == cluster
    assert shop.messages(lived_in, "topic")[-1] == "topical"
    (data / "small").write_text("and on")
    shop.commit(lived_in, "after the repair")
    assert EventLog(str(segment.parent)).lost_end() == []
    assert problems(repaired(shop)) == []


def test_a_store_whose_log_is_gone_says_so_and_keeps_its_catalog(
    shop: Workshop, lived_in: DotRow
) -> None:
    shop.store.close()
    (home_of(shop) / "events" / "00000001.log").unlink()
    catalog = (home_of(shop) / "catalog.sqlite").read_bytes()
    with pytest.raises(Corruption, match="event log is gone"):
        type(shop.store).open(shop.store.home, shop.settings)
    assert (home_of(shop) / "catalog.sqlite").read_bytes() == catalog


def test_a_lost_format_is_no_missing_store(
    shop: Workshop, lived_in: DotRow, tmp_path: Path
) -> None:
    shop.store.close()
    (home_of(shop) / "format").unlink()
    with pytest.raises(Corruption, match="lost its file format"):
        type(shop.store).open(shop.store.home, shop.settings, create=False)
    assert problems(repaired(shop)) == []
    with pytest.raises(StoreNotFound):
        Layout(str(tmp_path / "nowhere")).read_format()
    with pytest.raises(StoreNotFound):
        repair_log(str(tmp_path / "nowhere"), RepairReport(), lock_wait_s=2, dry_run=False)


def test_a_dry_run_changes_nothing(shop: Workshop, lived_in: DotRow) -> None:
    shop.store.close()
    flip(packs_of(shop, lived_in)[0], 500)
    flip(home_of(shop) / "events" / "00000001.log", 200)
    before = {path: path.read_bytes() for path in home_of(shop).rglob("*.pack")}
    before |= {path: path.read_bytes() for path in home_of(shop).rglob("*.log")}
    report = RepairReport()
    assert not repair_log(shop.store.home, report, lock_wait_s=2, dry_run=True)
    shop.store = type(shop.store).open(shop.store.home, shop.settings)
    repair(shop.store, report, dry_run=True)
    assert len(report.actions) >= 2
    assert {path: path.read_bytes() for path in before} == before
