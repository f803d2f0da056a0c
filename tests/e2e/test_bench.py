"""tools/bench with small data: every row measures something, so that the tool cannot rot."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.support.cluster import has_command
from tests.support.postgresql import programs_directory
from tools.benchmarks.rows import ROWS

BENCH = Path(__file__).parents[2] / "tools" / "bench"
PEERS = ("restic", "borg", "git", "bup", "rsync", "zstd", "ssh", "sshd")
TIMEOUT_S = 1800.0


@pytest.mark.slow
@pytest.mark.skipif(programs_directory() is None, reason="PostgreSQL is not installed")
@pytest.mark.skipif(not all(map(has_command, PEERS)), reason="a peer is not installed")
def test_every_row_can_be_measured(tmp_path: Path) -> None:
    results = tmp_path / "results"
    done = subprocess.run(
        [BENCH, "--compare", "--quick", "--results", results],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env={**os.environ, "TMPDIR": "/tmp"},  # sockets of servers need short paths
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = results.glob("*.json")
    rows = json.loads(path.read_text())["rows"]
    assert list(rows) == [row.name for row in ROWS]
    without_figures = [
        name
        for name, row in rows.items()
        if row["error"] or not row["checks"] or not row["samples"]
    ]
    assert without_figures == []
    # What does not depend on the size of the data holds for small data, too.
    missed = [
        check["what"]
        for name in ("no-op", "negotiation-branches", "negotiation-heads")
        for check in rows[name]["checks"]
        if check["verdict"].startswith("misses") and "too many" in check["what"]
    ]
    assert missed == []
