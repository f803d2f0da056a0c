"""Long histories: questions to the graph of a million commits, and commit number 10,000."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dmsync.core.graph import is_ancestor, merge_bases
from dmsync.engine.commits import CommitRequest, commit
from dmsync.engine.dots import init_dot
from dmsync.engine.revision_lookup import resolve_revision
from dmsync.engine.settings import EngineSettings
from dmsync.engine.store import Store
from dmsync.storage.catalog import DotRow
from tools.benchmarks.measuring import Cost, apparent_bytes, median
from tools.benchmarks.peers import Dm
from tools.benchmarks.result import RowResult, quantity_of, unit_of
from tools.benchmarks.workspace import LONG_DOT, Workspace

SETTINGS = EngineSettings(author="bench", actor="bench")
FILES = 20
FILE_BYTES = 1000
FIRST_COMMIT_MEASURED = 10
GROWTH_MAX = 1.2
DATABASE_SUFFIXES = (".sqlite", ".sqlite-wal", ".db", ".db-wal")


# --- graph --------------------------------------------------------------------------------------


def graph(work: Workspace, row: RowResult) -> None:
    """Questions to a store just opened, and one command."""
    home = work.very_long_history() / "store"
    distance = work.sizes.very_long_history // 2
    side = work.side_commits

    def far_ancestor(store: Store, dot: DotRow) -> None:
        assert resolve_revision(store, dot, f"near~{distance}")

    def ancestry(store: Store, dot: DotRow) -> None:
        tips = [resolve_revision(store, dot, name) for name in ("near", "near~100", "side")]
        view = store.catalog.graph(dot.dot)
        assert is_ancestor(view, tips[1], tips[0])
        assert not is_ancestor(view, tips[2], tips[0])

    def base(store: Store, dot: DotRow) -> None:
        tips = [resolve_revision(store, dot, name) for name in ("near", "side")]
        assert len(merge_bases(store.catalog.graph(dot.dot), *tips)) == 1

    questions: list[tuple[str, float, Callable[[Store, DotRow], None]]] = [
        (f"HEAD~{distance}", 0.050, far_ancestor),
        ("is-ancestor of near tips, twice", 0.040, ancestry),
        (f"merge base of {side} + {side}", 0.020, base),
    ]
    for step, _, ask in questions:
        for _ in range(work.runs):
            row.add(step, "dm", Cost(_seconds(home, ask)))
    with work.directory("log") as directory:
        dm = Dm(directory)
        dm.cluster.environment["DM_HOME"] = str(home)
        for _ in range(work.runs):
            cost, _ = dm.measure("log", "-n", "20", "--dot", LONG_DOT, "near")
            row.add("dm log -n 20", "dm", cost)
    for step, most_s in (*((name, most) for name, most, _ in questions), ("dm log -n 20", 0.150)):
        row.check(step, row.median(step, "dm", "wall_s"), "s", most_s)
    row.notes.append(
        f"{work.sizes.very_long_history} commits; each question to a store just opened"
    )


def _seconds(home: Path, ask: Callable[[Store, DotRow], None]) -> float:
    with Store.open(str(home), SETTINGS) as store:
        namespace, name = LONG_DOT.split("/")
        dot = store.catalog.dot_by_name(namespace, name)
        assert dot is not None
        started_s = time.perf_counter()
        ask(store, dot)
        return time.perf_counter() - started_s


# --- many commits -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Window:
    """Some commits in a row: median time of one, and what all of them stored."""

    wall_s: float
    cpu_s: float
    packs_bytes: int
    database_bytes: int
    other_bytes: int


def commit_10000(work: Workspace, row: RowResult) -> None:
    """Commits 10 and following beside the last of 10,000, all in one process."""
    count, size = work.sizes.commits_in_a_row, work.sizes.commit_window
    with work.directory("many-commits") as directory:
        home, tree = directory / "store", directory / "tree"
        tree.mkdir()
        for number in range(FILES):
            (tree / f"file{number:02}").write_bytes(os.urandom(FILE_BYTES))
        committer = _Committer(home, tree)
        committer.commit(FIRST_COMMIT_MEASURED - 1)
        early = committer.window(size)
        committer.commit(count - committer.made - size)
        late = committer.window(size)
    for step, window in (("early", early), ("late", late)):
        more = {
            "packs_bytes": window.packs_bytes,
            "database_bytes": window.database_bytes,
            "other_bytes": window.other_bytes,
        }
        row.add(step, "dm", Cost(window.wall_s, window.cpu_s).with_more(**more))
    row.notes.append(
        f"{size} commits from number {FIRST_COMMIT_MEASURED} and the last {size} of {count}, each "
        f"with one of {FILES} files changed; median time of one, bytes of all, without start-up"
    )
    for name in ("wall_s", "cpu_s", "packs_bytes", "database_bytes", "other_bytes"):
        late_median, early_median = (row.median(step, "dm", name) for step in ("late", "early"))
        target = None if name == "cpu_s" else GROWTH_MAX
        what = f"{quantity_of(name)} of late commits against early ones"
        row.check_ratio(what, late_median, early_median, unit_of(name), target)


class _Committer:
    """A store that gets one commit after the other."""

    def __init__(self, home: Path, tree: Path) -> None:
        self.made = 0
        self._home = home
        self._tree = tree
        self._store = Store.open(str(home), SETTINGS, create=True)
        self._dot = init_dot(self._store, "many", at=str(tree), as_root=False)

    def commit(self, count: int) -> tuple[list[float], list[float]]:
        """So many commits; wall and CPU seconds of each."""
        wall: list[float] = []
        cpu: list[float] = []
        for _ in range(count):
            self.made += 1
            path = self._tree / f"file{self.made % FILES:02}"
            path.write_bytes(os.urandom(FILE_BYTES))
            started_s, cpu_started_s = time.perf_counter(), time.process_time()
            commit(self._store, self._dot, CommitRequest(f"commit {self.made}"))
            cpu.append(time.process_time() - cpu_started_s)
            wall.append(time.perf_counter() - started_s)
        return wall, cpu

    def window(self, count: int) -> _Window:
        """So many commits from one opening of the store to its closing, and what they added."""
        self._reopen()
        before = self._sizes()
        wall, cpu = self.commit(count)
        self._reopen()
        grown = [now - then for now, then in zip(self._sizes(), before, strict=True)]
        return _Window(median(wall), median(cpu), *grown)

    def _reopen(self) -> None:
        """Closing brings what waits in SQLite's log into its file."""
        self._store.close()
        self._store = Store.open(str(self._home), SETTINGS)

    def _sizes(self) -> tuple[int, int, int]:
        """Bytes of packs with their indexes, of databases, of all else."""
        files = [path for path in self._home.rglob("*") if path.is_file()]
        packs = sum(path.stat().st_size for path in files if "packs" in path.parts)
        databases = sum(
            path.stat().st_size for path in files if path.name.endswith(DATABASE_SUFFIXES)
        )
        return packs, databases, apparent_bytes(self._home) - packs - databases
