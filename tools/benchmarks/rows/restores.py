"""Writing a version out: switching a live tree to another commit, and whole trees."""

import os
from pathlib import Path

from tools.benchmarks.data_sets import data_bytes, require_same
from tools.benchmarks.measuring import TIMEOUT_S, rotated
from tools.benchmarks.peers import Dm, Restic, Restorer
from tools.benchmarks.references import Shadow, changed_pages
from tools.benchmarks.result import RowResult
from tools.benchmarks.workspace import Workspace

NEAR, FAR = "one commit back", "several commits back"
WRITTEN_RATIO_MAX = 2.0
"""Files are patched by chunks of 128 KiB or their pages; "follows the difference" in a number."""


def checkout(work: Workspace, row: RowResult) -> None:
    """`dm reset --hard` of a database to its previous commit, and to one several rounds ago."""
    with work.directory("checkout") as directory:
        database = work.database().copied_to(directory / "data")
        dm = Dm(directory)
        dm.commit(database.data)
        first = database.copied_to(directory / "first").data
        shadow = Shadow(database.data, directory / "shadow")
        differing = {NEAR: 0, FAR: 0}
        for _ in range(work.sizes.checkout_distance):
            database.advance(work.sizes.transactions)
            differing[NEAR] = shadow.follow().page_bytes
            dm.commit(database.data)
        differing[FAR] = sum(len(new) for _, new in changed_pages(first, database.data))
        tip = dm.cluster.tip()
        for number in range(work.runs):
            for step, distance in ((NEAR, 1), (FAR, work.sizes.checkout_distance)):
                cost, _ = dm.measure("reset", "--hard", f"HEAD~{distance}")
                row.add(step, "dm", cost.with_more(differing_bytes=differing[step]))
                if number == 0 and step is FAR:
                    require_same(database.data, first)
                dm.cluster.run("reset", "--hard", tip, timeout_s=TIMEOUT_S)
    _check_follows(row)


def _check_follows(row: RowResult) -> None:
    """Bytes written and time beside the bytes of differing 8 KiB pages."""
    for step in (NEAR, FAR):
        differing = row.median(step, "dm", "differing_bytes")
        for what, figure, target in (
            ("bytes handed to write", "handed_bytes", WRITTEN_RATIO_MAX),
            ("bytes written as the kernel counts", "written_bytes", None),
        ):
            row.check_ratio(
                f"{step}: {what} against differing pages",
                row.median(step, "dm", figure),
                differing,
                "bytes",
                target,
            )
    row.notes.append("the kernel takes a whole folio for written when a page of it is dirtied")
    times = [row.median(step, "dm", "wall_s") for step in (FAR, NEAR)]
    bytes_ = [row.median(step, "dm", "differing_bytes") for step in (FAR, NEAR)]
    row.check(
        "time grows no faster than the difference",
        times[0] / times[1],
        "x",
        max(1.0, bytes_[0] / bytes_[1]),
        ours=f"{times[0]:.2f} s, {bytes_[0] / 1e6:.0f} MB",
        theirs=f"{times[1]:.2f} s, {bytes_[1] / 1e6:.0f} MB",
    )


def database(work: Workspace, row: RowResult) -> None:
    """The whole database, from a store with one commit and from one with a hundred."""
    source = work.database().data
    first = "restore at commit 1"
    with work.directory("stores") as directory:
        stores: list[Restorer] = [Dm(directory), Restic(directory)]
        for store in stores:
            store.commit(source)
        _restore(work, row, first, stores, source)
    history = work.history()
    last = f"restore at commit {work.sizes.database_commits}"
    _restore(work, row, last, [history.dm, history.restic], history.source)
    row.compare(first, "wall_s", "restic", 0.8)
    row.compare(last, "wall_s", "restic", 1.0)
    row.notes.append(
        f"restic's store has only the first commits and the last; {data_bytes(source) / 1e9:.2f} GB"
    )


def small_files(work: Workspace, row: RowResult) -> None:
    """/usr/share, which has about 50,000 files."""
    source = work.sizes.small_files
    step = "restore of small files"
    with work.directory("stores") as directory:
        stores: list[Restorer] = [Dm(directory), Restic(directory)]
        for store in stores:
            store.commit(source)
        _restore(work, row, step, stores, source)
    row.compare(step, "wall_s", "restic", 1.0)
    row.compare(step, "cpu_s", "restic", None)


def _restore(
    work: Workspace, row: RowResult, step: str, stores: list[Restorer], source: Path
) -> None:
    for number in range(work.runs):
        for store in rotated(stores, number):
            with work.directory("restored") as directory:
                cost, root = store.restore(directory / "tree")
                row.add(step, store.name, cost)
                if number == 0:
                    require_same(root, source)
                assert os.path.lexists(root), "a program that ends with 0 has written something"
