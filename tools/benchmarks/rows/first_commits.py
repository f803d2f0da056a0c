"""First commits: of a database directory, and of many small files."""

from pathlib import Path

from tools.benchmarks.data_sets import data_bytes
from tools.benchmarks.measuring import rotated
from tools.benchmarks.peers import Borg, Bup, Dm, Git, Restic, Store, checked_commit, tar_zstd
from tools.benchmarks.result import RowResult
from tools.benchmarks.workspace import SIDE_RUNS, Workspace

FIRST: tuple[type[Dm] | type[Restic], ...] = (Dm, Restic)
BESIDE: tuple[type[Borg] | type[Git] | type[Bup], ...] = (Borg, Git, Bup)
STEP = "first commit"


def database(work: Workspace, row: RowResult) -> None:
    """A PostgreSQL directory of about 1 GB."""
    source = work.database().data
    row.notes.append(f"{data_bytes(source) / 1e9:.2f} GB, pgbench scale {work.sizes.pgbench_scale}")
    _commit_first(work, row, source)
    for number in range(work.runs):
        for threads in rotated((2, 1), number):
            with work.directory("tar") as directory:
                cost = tar_zstd(source, directory / "tar.zst", threads)
            row.add(STEP, f"tar | zstd -3 -T{threads}", cost)
    row.compare(STEP, "wall_s", "restic", 0.5)
    row.compare(STEP, "wall_s", "tar | zstd -3 -T2", 1.3)
    row.compare(STEP, "stored_bytes", "restic", 1.1)
    _compare_beside(row)


def small_files(work: Workspace, row: RowResult) -> None:
    """/usr/share, which has about 50,000 files."""
    _commit_first(work, row, work.sizes.small_files)
    row.compare(STEP, "cpu_s", "restic", 0.6)
    row.compare(STEP, "wall_s", "restic", None)
    row.compare(STEP, "stored_bytes", "restic", None)
    _compare_beside(row)


def _commit_first(work: Workspace, row: RowResult, source: Path) -> None:
    for number in range(work.runs):
        kinds = [*FIRST, *(BESIDE if number < SIDE_RUNS else ())]
        for kind in rotated(kinds, number):
            with work.directory("store") as directory:
                store: Store = kind(directory)
                row.add(STEP, store.name, checked_commit(store, source))


def _compare_beside(row: RowResult) -> None:
    for kind in BESIDE:
        row.compare(STEP, "wall_s", kind.name, None)
