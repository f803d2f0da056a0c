"""What the rows of one run share: sizes, data sets made when first asked for, places to work in."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.support.cluster import Cluster
from tests.support.long_histories import build_history, forked
from tools.benchmarks.data_sets import Database, make_incompressible, remove
from tools.benchmarks.database_history import DatabaseHistory
from tools.benchmarks.measuring import settle

USR_SHARE: Final = Path("/usr/share")
CHUNK_BYTES: Final = 128 * 1024
SIDE_RUNS: Final = 1
"""Repetitions of programs that no target names: slow ones, that only stand beside."""
LONG_DOT: Final = "admin/long"
"""What tests.support.long_histories calls the dot that it makes."""


def own_from(side: str, number: int) -> Callable[[int], str]:
    """Messages that make the commits from `number` on differ between sides."""
    return lambda commit: str(commit) if commit < number else f"{side} {commit}"


@dataclass(frozen=True)
class Sizes:
    """How large the data are. The targets hold for FULL; QUICK shows that every row works."""

    pgbench_scale: int
    transactions: int
    database_commits: int
    checkout_distance: int
    small_files: Path
    many_files: int
    incompressible_bytes: int
    long_fat_bytes: int
    long_history: int
    very_long_history: int
    branches: int
    private_heads: int
    commit_window: int
    commits_in_a_row: int
    synthetic_bytes: int
    directory_entries: int


FULL: Final = Sizes(
    pgbench_scale=36,  # about 1 GB with its WAL
    transactions=4000,
    database_commits=100,
    checkout_distance=5,
    small_files=USR_SHARE,
    many_files=1_000_000,
    incompressible_bytes=1_000_000_000,
    long_fat_bytes=200_000_000,
    long_history=100_000,
    very_long_history=1_000_000,
    branches=500,
    private_heads=9_000,
    commit_window=200,
    commits_in_a_row=10_000,
    synthetic_bytes=762_940 * CHUNK_BYTES,  # 100 GB
    directory_entries=1_000_000,
)
QUICK: Final = Sizes(
    pgbench_scale=1,
    transactions=200,
    database_commits=3,
    checkout_distance=2,
    small_files=USR_SHARE / "perl",
    many_files=2_000,
    incompressible_bytes=8_000_000,
    long_fat_bytes=4_000_000,
    long_history=2_000,
    very_long_history=4_000,
    branches=20,
    private_heads=100,
    commit_window=5,
    commits_in_a_row=30,
    synthetic_bytes=400 * CHUNK_BYTES,
    directory_entries=2_000,
)


class Workspace:
    """Data and directories of one run, below `scratch`. `runs`: repetitions of what is timed."""

    def __init__(self, scratch: Path, sizes: Sizes, runs: int) -> None:
        self.scratch = scratch
        self.sizes = sizes
        self.runs = runs
        self._numbers = itertools.count()
        self._database: Database | None = None
        self._incompressible: Path | None = None
        self._history: DatabaseHistory | None = None
        self._very_long: Path | None = None

    def runs_within(self, seconds: float, of_each_s: float) -> int:
        """Repetitions of something that takes `of_each_s`, in about so many seconds; at least 1."""
        return max(1, min(self.runs, int(seconds / max(of_each_s, 0.001))))

    def new_path(self, name: str) -> Path:
        """A path below the scratch directory that is not there yet."""
        return self.scratch / f"{next(self._numbers):03}-{name}"

    @contextmanager
    def directory(self, name: str) -> Iterator[Path]:
        """An empty directory that is removed afterwards, outside of what is timed."""
        path = self.new_path(name)
        path.mkdir()
        try:
            yield path
        finally:
            remove(path)
            settle()

    def database(self) -> Database:
        """PostgreSQL with pgbench's tables as just made; not to be changed: copy it."""
        if self._database is None:
            self._database = Database.make(self.new_path("database"), self.sizes.pgbench_scale)
        return self._database

    def incompressible(self) -> Path:
        """A directory of random bytes; not to be changed."""
        if self._incompressible is None:
            path = self.new_path("incompressible")
            make_incompressible(path, self.sizes.incompressible_bytes)
            self._incompressible = path
        return self._incompressible

    def new_history(self) -> DatabaseHistory:
        """A database history of one commit, to be given back by `keep_history` when complete."""
        return DatabaseHistory(self.new_path("history"), self.database(), self.sizes.transactions)

    def keep_history(self, history: DatabaseHistory) -> None:
        """All rounds are committed: others may read its stores."""
        self._history = history

    def history(self) -> DatabaseHistory:
        """A database history of `sizes.database_commits` rounds; not to be changed."""
        if self._history is None:
            history = self.new_history()
            history.live_through(self.sizes.database_commits)
            self._history = history
        return self._history

    @property
    def side_commits(self) -> int:
        """Commits of either side since the two branches of the very long history forked."""
        return self.sizes.very_long_history // 1000

    def very_long_history(self) -> Path:
        """A cluster's directory: a chain that forks into the branches `near` and `side` at its
        end; its newer half has messages of its own. Not to be changed."""
        if self._very_long is None:
            count, side = self.sizes.very_long_history, self.side_commits
            cluster = Cluster(self.new_path("very-long-history"), "near")
            build_history(
                cluster.home,
                commits=count,
                shape=forked(count - 2 * side, 2, side),
                message=own_from("near", count // 2),
                branches={"side": count - side - 1, "near": count - 1},
            )
            self._very_long = cluster.directory
        return self._very_long
