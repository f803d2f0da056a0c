"""All kinds of fault in one run, and one table of what they found.

Short: every kind with its short count and a fresh seed, two at a time. Long (`--hours N`):
the long counts, each kind with a share of the time; what it did not reach is seen in its count.
Ends with 1 when a row does not hold, is missing, or found nothing to try.
"""

import argparse
import json
import os
import platform
import secrets
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from tools.faults.catalogue import CATALOGUE, Entry
from tools.faults.row import Row
from tools.faults.table import markdown, table

ROOT: Final = Path(__file__).resolve().parents[2]
SHORT_TIMEOUT_S: Final = 300.0
LATE_FACTOR: Final = 1.5
"""A kind that was told to stop may still verify what it tried."""
JOBS: Final = 2
LIBRARIES: Final = ("asyncssh", "blake3", "msgpack", "zstandard", "backports.zstd")


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools/scorecard", description=__doc__)
    parser.add_argument("--hours", type=float, help="the long form, in about so many hours")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1 << 31))
    parser.add_argument("--only", action="append", choices=sorted(CATALOGUE), metavar="NAME")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the page as Markdown")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as JSON")
    options = parser.parse_args()
    chosen = {name: CATALOGUE[name] for name in options.only or CATALOGUE}
    began = time.monotonic()
    rows = list(_run_all(chosen, options.seed, options.hours))
    order = list(chosen)
    rows.sort(key=lambda pair: order.index(pair[0]))
    flat = [row for _, found in rows for row in found]
    elapsed_s = time.monotonic() - began
    sys.stdout.write(table(flat))
    sys.stdout.write(_closing_line(flat, elapsed_s, options.seed))
    facts = _facts(elapsed_s, options.seed, options.hours)
    if options.report:
        options.report.write_text(_page(flat, facts), encoding="utf-8")
    if options.json:
        rows_json = [vars(row) for row in flat]
        options.json.write_text(json.dumps({"facts": facts, "rows": rows_json}, indent=1) + "\n")
    return 0 if flat and all(row.holds for row in flat) else 1


def _run_all(
    chosen: dict[str, Entry], seed: int, hours: float | None
) -> Iterator[tuple[str, list[Row]]]:
    """(name, rows) as the kinds end; the longest begin first, so that none runs on alone."""
    shares = sum(entry.share for entry in chosen.values())
    names = sorted(chosen, key=lambda name: -chosen[name].share)
    with ThreadPoolExecutor(JOBS) as pool:
        runs = {}
        for name in names:
            seconds = None
            if hours is not None:
                seconds = hours * 3600 * JOBS * chosen[name].share / shares
            runs[pool.submit(_run_kind, name, seed, seconds)] = name
        for run in as_completed(runs):
            found = run.result()
            for row in found:
                state = "holds" if row.holds else "DOES NOT HOLD"
                print(f"{row.name}: {row.tried:,} {row.unit}, {state}", file=sys.stderr)
            yield runs[run], found


def _run_kind(name: str, seed: int, seconds: float | None) -> list[Row]:
    """One kind in a process of its own, with whatever it starts in one group."""
    command = [sys.executable, "-m", "tools.faults", name, "--json", "--seed", str(seed)]
    if seconds is not None:
        command += ["--long", "--seconds", f"{seconds:.0f}"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    timeout_s = SHORT_TIMEOUT_S if seconds is None else LATE_FACTOR * seconds + SHORT_TIMEOUT_S
    try:
        out, error = process.communicate(timeout=timeout_s)
        rows: list[Any] = json.loads(out)
    except subprocess.TimeoutExpired:
        _kill_group(process)
        return [_broken(name, seed, f"not done after {timeout_s:.0f} s")]
    except ValueError:
        return [_broken(name, seed, error.decode(errors="replace")[-2000:])]
    return [Row(**row) for row in rows]


def _kill_group(process: "subprocess.Popen[bytes]") -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def _broken(name: str, seed: int, why: str) -> Row:
    """A kind that could not be run is no kind that holds."""
    row = Row(name, "tries", seed, f"python -m tools.faults {name} --seed {seed}")
    row.lost(why)
    return row


def _closing_line(rows: Sequence[Row], elapsed_s: float, seed: int) -> str:
    held = sum(row.holds for row in rows)
    return f"\n{held} of {len(rows)} rows hold; {elapsed_s:.0f} s, seed {seed}\n"


def _facts(elapsed_s: float, seed: int, hours: float | None) -> dict[str, str]:
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    libraries = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    return {
        "commit": commit or "no git checkout",
        "command": "tools/scorecard" + (f" --hours {hours:g}" if hours else "") + f" --seed {seed}",
        "duration": f"{elapsed_s:.0f} s",
        "machine": f"{platform.system()} {platform.release()}, {os.cpu_count()} cores",
        "versions": f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}, "
        + libraries,
    }


def _page(rows: Sequence[Row], facts: dict[str, str]) -> str:
    head = "".join(f"- {name}: {value}\n" for name, value in facts.items())
    held = sum(row.holds for row in rows)
    lines = ["# Scorecard\n", f"{held} of {len(rows)} rows hold.\n", head, markdown(rows)]
    for row in rows:
        if not row.holds:
            lines.append(f"## {row.name}\n")
            lines += [f"- {failure}\n" for failure in row.failures]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
