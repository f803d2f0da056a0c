"""Measure dm beside restic, borg, git, bup, rsync and the floors, against the targets.

tools/bench --compare                    every row, then docs/performance.md from the result
tools/bench --compare --row start        some rows (may be given again; --list shows them)
tools/bench --compare --resume FILE      into the same file; rows that it has are left out
tools/bench --compare --quick            small data, one run: shows that all rows work
tools/bench --report FILE                the page, its figures and the README's section only
"""

import argparse
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from tools.benchmarks.machine import describe_machine, describe_programs
from tools.benchmarks.measuring import measure_unsettled
from tools.benchmarks.result import (
    RESULTS,
    Result,
    RowResult,
    load_result,
    moment_now,
    new_result,
)
from tools.benchmarks.rows import ROWS, Row
from tools.benchmarks.workspace import FULL, QUICK, Workspace

BUDGET_S = 45 * 60


def main() -> int:
    """Measure or report; the exit code is 1 when a row could not be measured."""
    given = _arguments()
    # Ends servers and removes data, as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if given.list:
        for row in ROWS:
            print(f"{row.name:22} {row.title}")
        return 0
    if given.report is not None:
        _report(load_result(given.report))
        return 0
    result = _compare(given)
    failed = [row.name for row in result.rows.values() if row.error]
    if not given.quick and not failed and len(result.rows) == len(ROWS):
        _report(result)
    _print_verdicts([row for row in result.rows.values() if row.name in (given.row or result.rows)])
    return 1 if failed else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tools/bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--compare", action="store_true", help="measure")
    parser.add_argument("--list", action="store_true", help="the rows there are")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the page from FILE")
    names = [row.name for row in ROWS]
    parser.add_argument("--row", action="append", choices=names, metavar="NAME", help="only this")
    parser.add_argument("--runs", type=int, default=5, help="repetitions (default 5)")
    parser.add_argument("--quick", action="store_true", help="small data, one run")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="add to this result")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="where to")
    given = parser.parse_args()
    if not (given.compare or given.list or given.report):
        parser.error("say --compare, --list or --report FILE")
    return given


def _compare(given: argparse.Namespace) -> Result:
    """Measure the rows asked for, writing the result after each."""
    runs = 1 if given.quick else given.runs
    if given.quick:
        measure_unsettled()
    with tempfile.TemporaryDirectory(prefix="dm-bench-") as directory:
        scratch = Path(directory)
        # The database's own user has to get through.
        scratch.chmod(0o711)
        options = {"runs": runs, "quick": given.quick}
        result = (
            load_result(given.resume)
            if given.resume
            else new_result(describe_machine(scratch), describe_programs(), options, given.results)
        )
        work = Workspace(scratch, QUICK if given.quick else FULL, runs)
        run, dm = moment_now(), describe_programs()["dm"]
        for row in _wanted(given.row, result):
            _measure(row, work, result)
            result.rows[row.name].run, result.rows[row.name].dm = run, dm
            result.save()
    spent_s = sum(row.seconds for row in result.rows.values())
    print(f"\n{result.path}: {len(result.rows)} of {len(ROWS)} rows, {spent_s:.0f} s", flush=True)
    if spent_s > BUDGET_S:
        print(f"over the budget of {BUDGET_S} s", flush=True)
    return result


def _wanted(names: Sequence[str] | None, result: Result) -> list[Row]:
    """Rows in the order of the table; named ones are measured again."""
    if names:
        return [row for row in ROWS if row.name in names]
    return [row for row in ROWS if row.name not in result.rows or result.rows[row.name].error]


def _measure(row: Row, work: Workspace, result: Result) -> None:
    """Measure one row; what goes wrong is kept in its place, and others go on."""
    print(f"\n{row.name}: {row.title}", flush=True)
    found = RowResult(row.name, row.title, runs=work.runs)
    started_s = time.perf_counter()
    try:
        row.measure(work, found)
    except Exception as error:
        traceback.print_exc()
        found.error = f"{type(error).__name__}: {error}"[:500]
    found.seconds = time.perf_counter() - started_s
    print(f"{row.name}: {found.seconds:.0f} s", flush=True)
    rows = {**result.rows, row.name: found}
    result.rows = {one.name: rows[one.name] for one in ROWS if one.name in rows}


def _report(result: Result) -> None:
    """Imported here: plots need a library that measuring does not."""
    from tools.benchmarks.report import write_report

    for path in write_report(result):
        print(path)


def _print_verdicts(rows: Sequence[RowResult]) -> None:
    print()
    for row in rows:
        for check in row.checks:
            if not check.holds:
                print(f"misses: {row.name}: {check.what}: {check.verdict}")
        if row.error:
            print(f"failed: {row.name}: {row.error}")


if __name__ == "__main__":
    sys.exit(main())
