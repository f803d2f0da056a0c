"""What is measured: one entry a row of the table of targets, in the order of the table."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from tools.benchmarks.result import RowResult
from tools.benchmarks.rows import (
    first_commits,
    histories,
    negotiation,
    no_change,
    restores,
    rounds,
    scale,
    start,
    transfers,
)
from tools.benchmarks.workspace import Workspace


@dataclass(frozen=True)
class Row:
    """`measure` fills the result: samples first, then checks against the targets."""

    name: str
    title: str
    measure: Callable[[Workspace, RowResult], None]


ROWS: Final = (
    Row("first-commit", "First commit of a PostgreSQL directory", first_commits.database),
    Row("rounds", "Commits after 4,000 pgbench transactions", rounds.database),
    Row("no-change", "Commit of 50,000 files without change", no_change.small_files),
    Row("no-change-million", "Commit of 1,000,000 files without change", no_change.many_files),
    Row("small-files", "First commit of 50,000 small files", first_commits.small_files),
    Row("checkout", "Checkout of another commit of a database", restores.checkout),
    Row("restore", "Full restore of a database", restores.database),
    Row("restore-small-files", "Full restore of 50,000 small files", restores.small_files),
    Row("transfer-database", "Push and clone of 1 GB of a database", transfers.database),
    Row("transfer-random", "Push and clone of 1 GB, incompressible", transfers.incompressible),
    Row("push-rounds", "Push after 4,000 pgbench transactions", transfers.rounds),
    Row("long-fat-link", "Push and clone through 100 ms, 200 Mbit/s", transfers.long_fat_link),
    Row("negotiation", "Negotiation, 100,000 commits diverged", negotiation.long_history),
    Row("negotiation-million", "Negotiation, 1,000,000 commits", negotiation.very_long_history),
    Row("negotiation-branches", "Negotiation, 500 branches", negotiation.many_branches),
    Row("negotiation-heads", "Negotiation, 9,000 private heads", negotiation.private_heads),
    Row("no-op", "Push and pull of nothing", transfers.nothing),
    Row("graph", "Graph of 1,000,000 commits", histories.graph),
    Row("commit-10000", "Commit 10,000 beside commit 10", histories.commit_10000),
    Row("huge-file", "One page of 100 GB changed", scale.huge_file),
    Row("huge-directory", "One of 1,000,000 entries changed", scale.huge_directory),
    Row("start", "Start", start.small_dot),
)
