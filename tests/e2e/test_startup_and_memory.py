"""What one run costs before it does anything, and how much memory large data needs."""

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.cluster import DM, Cluster

RUNS = 7
STARTUP_RATIO_MAX = 5.0
RSS_BYTES_MAX = 250 * 1000 * 1000
LARGE_BYTES = 1000 * 1000 * 1000
SLOW_MODULES = ("asyncio", "asyncssh", "logging", "rich", "sqlite_utils", "zstandard", "pyfastcdc")


def test_version_imports_nothing_slow() -> None:
    listed = subprocess.run(
        [sys.executable, "-X", "importtime", DM, "version"], capture_output=True, text=True
    )
    assert listed.returncode == 0, listed.stderr
    imported = {line.split("|")[-1].strip() for line in listed.stderr.splitlines() if "|" in line}
    assert "dmsync" in imported
    assert imported.isdisjoint(SLOW_MODULES)


def test_version_takes_less_than_five_bare_interpreters() -> None:
    """Medians; once more when the machine was busy just then."""
    ratios = []
    for _ in range(2):
        bare = median_seconds([sys.executable, "-c", "pass"])
        version = median_seconds([str(DM), "version"])
        ratios.append(version / bare)
        print(f"dm version {version * 1000:.0f} ms, python3 -c pass {bare * 1000:.0f} ms")
        if ratios[-1] < STARTUP_RATIO_MAX:
            return
    pytest.fail(f"dm version takes {ratios} times a bare interpreter")


def median_seconds(command: list[str]) -> float:
    """Median wall time of a few runs."""
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@pytest.mark.slow
def test_memory_stays_bounded_for_a_gigabyte(pair: tuple[Cluster, Cluster], tmp_path: Path) -> None:
    """Commit, push and clone of 1 GB, on both sides, each below 250 MB."""
    near, far = pair
    data = tmp_path / "data"
    data.mkdir()
    write_random(data / "half", LARGE_BYTES // 2)
    write_random(data / "other", LARGE_BYTES // 2)
    near.run("init", "large", "--at", data)
    server = far.serve()
    peaks = {}
    _, peaks["commit"] = near.run_measured("commit", "-m", "large")
    _, peaks["push"] = near.run_measured("push", "far")
    peaks["server, receiving"] = server.daemon.peak_rss_bytes()
    server.kill()
    server.restart()
    other = Cluster(tmp_path / "other", "other")
    other.add_remote("far", far)
    _, peaks["clone"] = other.run_measured("clone", "far", "large")
    peaks["server, sending"] = server.daemon.peak_rss_bytes()
    print({name: f"{peak / 1e6:.0f} MB" for name, peak in peaks.items()})
    assert {name: peak for name, peak in peaks.items() if peak > RSS_BYTES_MAX} == {}
    assert (other.tree("large") / "half").stat().st_size == LARGE_BYTES // 2


def write_random(path: Path, size: int) -> None:
    """A file of random bytes."""
    with path.open("wb") as file:
        while size > 0:
            size -= file.write(os.urandom(min(size, 1024 * 1024)))
