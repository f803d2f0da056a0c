"""What a repair cannot put back: named until somebody accepts it, also when the repair is cut."""

import os
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
from blake3 import blake3

from dmsync.core.ids import Kind
from dmsync.engine.history import log_commits
from dmsync.engine.repairing.event_log import repair_log
from dmsync.engine.repairing.losses import Loss, accept_losses, add_losses, read_losses
from dmsync.engine.repairing.packs import harmed_files
from dmsync.engine.repairing.recovered_state import put_back
from dmsync.engine.repairing.repair import RepairReport, repair
from dmsync.errors import Corruption, FormatUnsupported
from dmsync.storage import event_log
from dmsync.storage.catalog import DotRow
from dmsync.storage.event_log import EventLog
from dmsync.storage.layout import Layout
from tests.support.working_store import Workshop


@pytest.fixture
def lived_in(shop: Workshop, dot: DotRow, data: Path) -> DotRow:
    """Two commits on master, one on topic."""
    for number in range(2):
        (data / "small").write_text(f"version {number}\n" * 50)
        shop.commit(dot, f"commit {number}")
    shop.checkout(dot, "topic", create=True)
    (data / "small").write_text("topical")
    shop.commit(dot, "topical")
    return dot


def layout_of(shop: Workshop) -> Layout:
    return Layout(shop.store.home)


def events_of(shop: Workshop) -> Path:
    return Path(layout_of(shop).events_dir)


def reopened(shop: Workshop) -> None:
    shop.store.close()
    shop.store = type(shop.store).open(shop.store.home, shop.settings)


def repaired(shop: Workshop) -> RepairReport:
    shop.store.close()
    report = RepairReport()
    repair_log(shop.store.home, report, lock_wait_s=2, dry_run=False)
    shop.store = type(shop.store).open(shop.store.home, shop.settings)
    put_back(shop.store, report, dry_run=False)
    return repair(shop.store, report)


def lost_in(report: RepairReport) -> set[tuple[str, tuple[str, ...]]]:
    assert report.after is not None
    found = [p for p in report.after.problems if p.message.startswith("lost: ")]
    assert len(found) == len(report.after.problems)
    return {(problem.where, problem.commits) for problem in found}


def lose_topic(shop: Workshop, dot: DotRow) -> tuple[str, dict[Path, Path]]:
    """Cut topic and its commit off the log, and take its packs away: (id, where those are)."""
    objects = shop.store.objects(dot.dot)
    topical = log_commits(shop.store, dot)[0].id
    operations = list(EventLog(str(events_of(shop))).read())
    (before, end) = next(
        (at, position)
        for (_, at), (operation, position) in pairwise(operations)
        if operation.command.startswith("checkout")
    )
    assert end.end_offset > before.end_offset
    shop.store.close()
    os.truncate(events_of(shop) / "00000001.log", before.end_offset)
    reopened(shop)  # which keeps the catalog and builds a new one
    moved = {}
    for pack in sorted(Path(objects.dot_dir, "packs").glob("*.pack")):
        if topical[:8] in pack.read_bytes():
            moved[pack] = Path(shop.store.home).parent / pack.name
            shop.store.close()
            shutil.move(pack, moved[pack])
    for index in Path(objects.dot_dir).glob("index.sqlite*"):
        index.unlink()
    Path(objects.dot_dir, "lost-packs").unlink(missing_ok=True)
    shop.store = type(shop.store).open(shop.store.home, shop.settings)
    assert moved and not shop.store.objects(dot.dot).has(Kind.COMMIT, topical)
    return topical.hex(), moved


def test_what_cannot_be_put_back_is_named_by_every_check_until_it_is_accepted(
    shop: Workshop, lived_in: DotRow
) -> None:
    topical, _ = lose_topic(shop, lived_in)
    assert len(layout_of(shop).kept_catalogs()) == 1
    named = {("branch/topic", (topical,)), ("commit", (topical,))}
    assert named <= lost_in(repaired(shop))
    assert layout_of(shop).kept_catalogs() == []
    assert layout_of(shop).unacknowledged_losses()
    assert named <= lost_in(repaired(shop))
    report = RepairReport()
    accept_losses(layout_of(shop), report, dry_run=False)
    assert {("branch/topic"), ("commit")} <= {action.where for action in report.actions}
    assert layout_of(shop).unacknowledged_losses() == []
    assert lost_in(repaired(shop)) == set()


def test_what_came_back_is_put_back_by_the_next_repair(shop: Workshop, lived_in: DotRow) -> None:
    topical, moved = lose_topic(shop, lived_in)
    assert lost_in(repaired(shop))
    shop.store.close()
    for pack, aside in moved.items():
        shutil.move(aside, pack)
    reopened(shop)
    assert lost_in(repaired(shop)) == set()
    ref = shop.store.catalog.ref(lived_in.dot, "branch/topic")
    assert ref is not None and ref.target.hex() == topical
    assert shop.messages(lived_in, "topic")[-1] == "topical"


def test_a_line_of_the_losses_that_cannot_be_read_is_a_loss(shop: Workshop) -> None:
    add_losses(layout_of(shop), [Loss("", "", "events", "", "gone")])
    with open(layout_of(shop).losses_file, "a") as file:
        file.write('{"dot": 3}\n')
    assert [loss.where for loss in read_losses(layout_of(shop))] == ["events", "damaged/lost"]


class Killed(BaseException):
    """The process ends here."""


@contextmanager
def killed_at(step: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """End before the step-th change of a file system entry or sync of one."""
    steps = [0]

    with monkeypatch.context() as patched:
        for name in ("fsync", "rename", "replace", "link", "ftruncate"):
            real = getattr(os, name)

            def counted(*args: object, real: object = real, **named: object) -> object:
                steps[0] += 1
                if steps[0] > step:
                    raise Killed
                return real(*args, **named)  # type: ignore[operator]

            patched.setattr(os, name, counted)
        yield steps


@pytest.mark.parametrize("loss", ["middle", "whole", "segment"])
def test_a_cut_log_never_looks_whole(
    shop: Workshop, lived_in: DotRow, monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    """With the catalog gone too and the repair killed anywhere: the log is refused, or its loss is
    noted and a new epoch has begun."""
    harmed = Path(shop.store.home).parent / "harmed"
    epoch = shop.store.catalog.epoch()
    ends = [end for _, end in EventLog(str(events_of(shop))).read()]
    shop.store.close()
    for catalog in Path(shop.store.home).glob("catalog.sqlite*"):
        catalog.unlink()
    segment = events_of(shop) / "00000001.log"
    if loss == "whole":
        segment.unlink()
    else:
        with segment.open("r+b") as file:
            file.seek(ends[3].end_offset + 60)
            file.write(os.urandom(30))
    if loss == "segment":
        shutil.copy(segment, events_of(shop) / "00000002.log")
    shutil.copytree(shop.store.home, harmed)
    for step in range(100):
        shutil.rmtree(shop.store.home)
        shutil.copytree(harmed, shop.store.home)
        is_whole = False
        with killed_at(step, monkeypatch):
            try:
                repair_log(shop.store.home, RepairReport(), lock_wait_s=2, dry_run=False)
                is_whole = True
            except Killed:
                pass
        try:
            shop.store = type(shop.store).open(shop.store.home, shop.settings)
        except Corruption:
            pass
        else:
            assert shop.store.catalog.epoch() != epoch
            assert EventLog(str(events_of(shop))).lost_end()
            assert [problem.where for problem in read_losses(layout_of(shop))]
            shop.store.close()
        if is_whole:
            assert step > 5
            break
    else:
        pytest.fail("the repair has no end")
    shop.store = type(shop.store).open(shop.store.home, shop.settings)
    assert ("events", ()) in lost_in(repaired(shop))


def test_a_segment_missing_between_others_costs_no_ref(
    shop: Workshop, dot: DotRow, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_log, "SEGMENT_BYTES_MAX", 100)
    for number in range(4):
        (data / "small").write_text(f"version {number}")
        shop.commit(dot, f"commit {number}")
    assert len(list(events_of(shop).glob("*.log"))) >= 4
    shop.store.close()
    sound = (events_of(shop) / "00000002.log").read_bytes()
    (events_of(shop) / "00000003.log").unlink()
    assert lost_in(repaired(shop)) == set()
    assert (events_of(shop) / "00000002.log").read_bytes() == sound
    assert shop.messages(dot) == [f"commit {number}" for number in range(4)]


def newer_pack(pack: Path) -> Path:
    """The pack as a later version would have written it: consistent, with another header."""
    content = bytearray(pack.read_bytes())
    struct.pack_into("<I", content, 8, 7)
    digest = blake3(bytes(content[:-40])).digest()
    content[-40:-8] = digest
    pack.unlink()
    newer = pack.with_name(digest[:16].hex() + ".pack")
    newer.write_bytes(content)
    return newer


def test_a_pack_of_a_newer_release_is_refused_by_name_and_stays(
    shop: Workshop, lived_in: DotRow
) -> None:
    objects = shop.store.objects(lived_in.dot)
    newer = newer_pack(sorted(Path(objects.dot_dir, "packs").glob("*.pack"))[0])
    content = newer.read_bytes()
    with pytest.raises(FormatUnsupported, match=newer.name):
        list(harmed_files(objects))
    shop.store.close()
    shop.store = type(shop.store).open(shop.store.home, shop.settings)
    with pytest.raises(FormatUnsupported, match=newer.name):
        repaired(shop)
    assert newer.read_bytes() == content


@pytest.mark.parametrize("harm", [b"\x03", bytes(range(1, 90))])
def test_a_harmed_header_is_no_newer_release(shop: Workshop, lived_in: DotRow, harm: bytes) -> None:
    packs = sorted(Path(shop.store.objects(lived_in.dot).dot_dir, "packs").glob("*.pack"))
    shop.store.close()
    with packs[0].open("r+b") as file:
        file.seek(8)
        file.write(harm)
    shop.store = type(shop.store).open(shop.store.home, shop.settings)
    report = repaired(shop)
    assert [action.where for action in report.actions][:1] == [packs[0].name]


def test_a_store_of_a_newer_release_is_not_repaired(shop: Workshop, lived_in: DotRow) -> None:
    shop.store.close()
    segment = events_of(shop) / "00000001.log"
    os.truncate(segment, segment.stat().st_size // 2)
    Path(layout_of(shop).format_file).write_text('{"version": 2}')
    content = segment.read_bytes()
    with pytest.raises(FormatUnsupported):
        repair_log(shop.store.home, RepairReport(), lock_wait_s=2, dry_run=False)
    assert segment.read_bytes() == content
