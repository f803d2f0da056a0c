"""Commits in which nothing changed: what looking at every file costs."""

from collections.abc import Callable

from tools.benchmarks.data_sets import count_entries, make_files
from tools.benchmarks.measuring import Cost, rotated
from tools.benchmarks.peers import Dm, Git
from tools.benchmarks.result import RowResult
from tools.benchmarks.workspace import Workspace

STEP = "nothing changed"
MEMORY_BYTES_MAX = 150e6
ENTRIES_PER_S_MIN = 150_000


def small_files(work: Workspace, row: RowResult) -> None:
    """/usr/share beside `git status` with a warm index."""
    source = work.sizes.small_files
    with work.directory("stores") as directory:
        dm, git = Dm(directory), Git(directory)
        for store in (dm, git):
            store.commit(source)
        git.status(source)
        measures: list[tuple[str, Callable[[], Cost]]] = [
            ("dm", lambda: dm.commit(source)),
            ("git status", lambda: git.status(source)),
        ]
        for number in range(work.runs):
            for name, measure in rotated(measures, number):
                row.add(STEP, name, measure())
        row.notes.append(f"{count_entries(source)} entries")
    row.compare(STEP, "wall_s", "git status", 2.0)


def many_files(work: Workspace, row: RowResult) -> None:
    """A million files, a thousand in each directory."""
    count = work.sizes.many_files
    with work.directory("many") as directory:
        source = directory / "files"
        make_files(source, count, flat=False)
        dm = Dm(directory)
        row.add("first commit", "dm", dm.commit(source))
        for _ in range(work.runs):
            row.add(STEP, "dm", dm.commit(source))
        entries = count_entries(source)
    row.notes.append(f"{entries} entries, the files empty")
    rate = entries / row.median(STEP, "dm", "wall_s")
    row.check("entries a second", rate, "entries/s", ENTRIES_PER_S_MIN, at_least=True)
    check_memory(row, STEP, MEMORY_BYTES_MAX)
    check_memory(row, "first commit", None)


def check_memory(row: RowResult, step: str, most: float | None) -> None:
    """The largest resident size of a step's commands."""
    peak = max(figures["peak_rss_bytes"] for figures in row.of(step, "dm").figures)
    row.check(f"{step}: memory", peak, "bytes", most)
