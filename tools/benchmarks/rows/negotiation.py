"""Finding out what the other side lacks, on long and on wide histories: round trips and bytes."""

from collections.abc import Callable, Iterable
from pathlib import Path

from tests.support.cluster import Cluster
from tests.support.long_histories import Parents, build_history, chain, forked
from tools.benchmarks.peers import Dm
from tools.benchmarks.result import RowResult
from tools.benchmarks.senders import push
from tools.benchmarks.workspace import LONG_DOT, Workspace, own_from

REMOTE = "far"
KIB, MIB = 1024, 1024 * 1024


def long_history(work: Workspace, row: RowResult) -> None:
    """100,000 commits on each side, the newer half of them private."""
    count = work.sizes.long_history
    with work.directory("long") as directory:
        near, far = directory / "near", directory / "far"
        _build(near, "near", chain(count), count, count // 2)
        _build(far, "far", chain(count), count, count // 2)
        _negotiate(row, f"{count} commits", directory, near, far, count - count // 2)
    _check(row, f"{count} commits", round_trips_max=6, bytes_max=64 * KIB)


def very_long_history(work: Workspace, row: RowResult) -> None:
    """1,000,000 commits on each side, the newer half of them private."""
    count = work.sizes.very_long_history
    near = work.very_long_history()
    with work.directory("very-long") as directory:
        far = directory / "far"
        _build(far, "far", chain(count), count, count // 2)
        private = count - count // 2 - work.side_commits  # the other branch is not pushed
        _negotiate(row, f"{count} commits", directory, near, far, private)
    _check(row, f"{count} commits", round_trips_max=7, bytes_max=None)


def many_branches(work: Workspace, row: RowResult) -> None:
    """500 branches with 20 private commits each, on both sides."""
    _wide(work, row, f"{work.sizes.branches} branches", work.sizes.branches, 20)


def private_heads(work: Workspace, row: RowResult) -> None:
    """9,000 branches with a private commit each, on both sides."""
    _wide(work, row, f"{work.sizes.private_heads} heads", work.sizes.private_heads, 1)


def _wide(work: Workspace, row: RowResult, step: str, heads: int, private: int) -> None:
    common = work.sizes.long_history // 10
    count = common + heads * private
    with work.directory("wide") as directory:
        for side in ("near", "far"):
            tips = {f"{side}{head}": common + (head + 1) * private - 1 for head in range(heads)}
            shape = forked(common, heads, private)
            _build(directory / side, side, shape, count, common, tips)
        near, far = directory / "near", directory / "far"
        _negotiate(row, step, directory, near, far, heads * private, "--all")
    _check(row, step, round_trips_max=12, bytes_max=MIB)


def _build(
    directory: Path,
    side: str,
    shape: Iterable[Parents],
    commits: int,
    own: int,
    branches: dict[str, int] | None = None,
) -> None:
    """A cluster whose commits from number `own` on no other has; its branch is named after it."""
    cluster = Cluster(directory, side)
    message: Callable[[int], str] = own_from(side, own)
    tips = branches or {side: commits - 1}
    build_history(cluster.home, commits=commits, shape=shape, message=message, branches=tips)


def _negotiate(
    row: RowResult, step: str, directory: Path, near: Path, far: Path, private: int, *more: str
) -> None:
    """What a push would have to send, found out and not sent; counted by the push itself."""
    dm = Dm(directory)
    dm.cluster.environment["DM_HOME"] = str(near / "store")
    dm.cluster.run("remote", "add", REMOTE, far / "store")
    branch = () if more else ("near",)
    cost = push(dm, REMOTE, LONG_DOT, *branch, "--dry-run", *more)
    dm.cluster.run("remote", "rm", REMOTE)
    row.add(step, "dm", cost.with_more(commits_expected=private))


def _check(row: RowResult, step: str, *, round_trips_max: int, bytes_max: int | None) -> None:
    figures = row.of(step, "dm")
    sent = figures.median("bytes_sent") + figures.median("bytes_received")
    trips = figures.median("round_trips")
    row.check(f"{step}: round trips, opening included", trips, "round trips", round_trips_max)
    row.check(f"{step}: bytes, both directions", sent, "bytes", bytes_max)
    extra = figures.median("commits_sent") - figures.median("commits_expected")
    row.check(f"{step}: commits too many", abs(extra), "commits", 0)
