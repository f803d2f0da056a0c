"""Commits of a database that lives on: time beside peers, growth beside the floor."""

from collections.abc import Sequence

from tools.benchmarks.database_history import DatabaseHistory
from tools.benchmarks.measuring import median, rotated
from tools.benchmarks.peers import Borg, Bup, Git, Store, checked_commit
from tools.benchmarks.references import Change, Shadow
from tools.benchmarks.result import RowResult
from tools.benchmarks.workspace import SIDE_RUNS, Workspace

STEP = "commit of a round"


def database(work: Workspace, row: RowResult) -> None:
    """So many commits, each after 4,000 transactions; peers beside the first ones."""
    history = work.new_history()
    shadow = Shadow(history.source, work.new_path("shadow"))
    beside: list[Store] = [Borg(history.directory), Git(history.directory), Bup(history.directory)]
    for peer in beside:
        peer.commit(history.source)
    ratios: list[float] = []
    for number in range(1, work.sizes.database_commits + 1):
        history.advance()
        change = shadow.follow()
        stores: list[Store] = [history.dm]
        stores += [history.restic] if number <= work.runs else []
        stores += beside if number <= SIDE_RUNS else []
        ratios.append(_commit_round(row, history, rotated(stores, number), number, change))
    history.restic.commit(history.source)
    work.keep_history(history)
    row.compare(STEP, "wall_s", "restic", 0.4)
    _check_growth(row, ratios)
    for peer in beside:
        row.compare(STEP, "wall_s", peer.name, None)
    row.compare(STEP, "stored_bytes", "restic", None)


def _commit_round(
    row: RowResult, history: DatabaseHistory, stores: Sequence[Store], number: int, change: Change
) -> float:
    """Commit one round everywhere; dm's growth as a multiple of the floor."""
    grown = 0.0
    for store in stores:
        cost = checked_commit(store, history.source)
        row.add(STEP, store.name, cost)
        if store is history.dm:
            grown = cost.more["stored_bytes"]
            _add_point(row, "seconds", number, cost.wall_s)
            _add_point(row, "growth_bytes", number, grown)
    _add_point(row, "floor_bytes", number, change.floor_bytes)
    _add_point(row, "changed_page_bytes", number, change.page_bytes)
    return grown / max(1, change.floor_bytes)


def _add_point(row: RowResult, name: str, number: int, value: float) -> None:
    row.series.setdefault(name, []).append((number, value))


def _check_growth(row: RowResult, ratios: Sequence[float]) -> None:
    grown = [value for _, value in row.series["growth_bytes"]]
    floors = [value for _, value in row.series["floor_bytes"]]
    count = len(ratios)
    row.check(
        f"growth against the floor, mean of {count} commits",
        sum(ratios) / count,
        "x",
        1.5,
        ours=f"{sum(grown) / count / 1e6:.2f} MB",
        theirs=f"{sum(floors) / count / 1e6:.2f} MB",
    )
    row.check_ratio("growth against the floor, sums", sum(grown), sum(floors), "bytes", None)
    times = [value for _, value in row.series["seconds"]]
    tenth = max(1, count // 10)
    late, early = median(times[-tenth:]), median(times[:tenth])
    row.check_ratio(f"time of the last {tenth} against the first {tenth}", late, early, "s", None)
