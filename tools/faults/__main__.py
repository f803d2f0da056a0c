"""Run one kind of fault: `python -m tools.faults NAME [--count N] [--seed S] [--long]`."""

import argparse
import json
import secrets
import shutil
import sys
import tempfile
import time
from dataclasses import asdict

from tools.faults.catalogue import CATALOGUE
from tools.faults.row import Budget, Row
from tools.faults.table import table


def run_entry(
    name: str, seed: int, count: int | None, *, is_long: bool, seconds: float | None = None
) -> list[Row]:
    """Run one entry of the catalogue in scratch space of its own."""
    entry = CATALOGUE[name]
    if count is None:
        count = entry.long if is_long else entry.short
    # no TemporaryDirectory: forks of this process that end in good order would remove it
    scratch = tempfile.mkdtemp(prefix=f"dm-{name}-")
    try:
        began = time.monotonic()
        deadline_s = None if seconds is None else began + seconds
        rows = entry.run(Budget(scratch, seed, count, is_long, deadline_s=deadline_s))
        for row in rows:
            row.elapsed_s = row.elapsed_s or (time.monotonic() - began) / len(rows)
        return rows
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.faults", description=__doc__)
    parser.add_argument("name", choices=sorted(CATALOGUE))
    parser.add_argument("--count", type=int, help="how much to try, in the row's unit")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1 << 31))
    parser.add_argument("--long", action="store_true", help="the long form's count")
    parser.add_argument("--seconds", type=float, help="start nothing new after so long")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    options = parser.parse_args()
    rows = run_entry(
        options.name,
        options.seed,
        options.count,
        is_long=options.long,
        seconds=options.seconds,
    )
    if options.json:
        json.dump([asdict(row) for row in rows], sys.stdout)
    else:
        sys.stdout.write(table(rows))
    return 0 if all(row.holds for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
