"""P6: a transfer killed on either side, at any byte, costs what was in flight and goes on."""

import os
import random
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.cluster import Cluster, MakeCluster
from tests.support.processes import Daemon
from tests.support.tree import file_hashes
from tools.netlab.link import Link

RESENT_BYTES_MAX = 24 * 1024 * 1024
"""What one cut may cost (protocol/limits.toml: unacknowledged bytes, and what SSH had buffered)."""
PUSH_TIMEOUT_S = 120
MEGABYTE = 1000 * 1000


@dataclass
class Line:
    """Two clusters with a link between them, and data that `near` has committed."""

    near: Cluster
    far: Cluster
    link: Link
    data: Path

    def push_until(self, total_bytes: int, kill: Callable[[Daemon], None]) -> int:
        """Push; run `kill` when the link has counted `total_bytes`. The push's exit code."""
        with self.near.start("push", "far") as push:
            self.link.at_total(total_bytes, lambda: kill(push))
            return push.process.wait(PUSH_TIMEOUT_S)


@pytest.fixture
def line(make_cluster: MakeCluster, tmp_path: Path) -> Iterator[Callable[[int], Line]]:
    """Makes the two clusters for random data of a given size in bytes."""
    links: list[Link] = []

    def make(data_bytes: int) -> Line:
        near, far = make_cluster("near"), make_cluster("far")
        link = Link(far.serve().port)
        links.append(link)
        near.add_remote("far", far, port=link.port)
        data = tmp_path / "data"
        data.mkdir()
        with (data / "random").open("wb") as file:
            for _ in range(data_bytes // MEGABYTE):
                file.write(os.urandom(MEGABYTE))
        near.run("init", "large", "--at", data)
        near.commit("large")
        return Line(near, far, link, data)

    yield make
    for link in links:
        link.close()


SIZES = [
    pytest.param(60 * MEGABYTE, 2, id="60MB-2-cuts"),
    pytest.param(500 * MEGABYTE, 10, id="500MB-10-cuts", marks=pytest.mark.slow),
]


def cut_points(data_bytes: int, count: int) -> list[int]:
    """Random positions in the data, ascending; the seed is printed for a failure."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    return sorted(random.Random(seed).sample(range(1, data_bytes), count))


@pytest.mark.parametrize(("data_bytes", "cuts"), SIZES)
def test_push_killed_on_the_sending_side_goes_on(
    line: Callable[[int], Line], data_bytes: int, cuts: int
) -> None:
    between = line(data_bytes)
    points = cut_points(data_bytes, cuts)
    for point in points:
        assert between.push_until(point, Daemon.kill) == -signal.SIGKILL
    finish_and_check(between, data_bytes, points)


@pytest.mark.parametrize(("data_bytes", "cuts"), SIZES)
def test_push_killed_on_the_receiving_side_goes_on(
    line: Callable[[int], Line], data_bytes: int, cuts: int
) -> None:
    between = line(data_bytes)
    server = between.far.serve()
    points = cut_points(data_bytes, cuts)
    for point in points:
        code = between.push_until(point, lambda _push: server.kill())
        assert code == 13, "a connection that breaks is worth retrying"
        server.restart()
    finish_and_check(between, data_bytes, points)


def finish_and_check(between: Line, data_bytes: int, points: list[int]) -> None:
    """Push to the end; all arrived, and no cut cost more than its share."""
    summary = between.near.run("push", "far", "--json").summary()
    total = between.link.bytes_total
    cuts, resent = len(points), total - data_bytes
    print(f"{cuts} cuts: {total} bytes for {data_bytes}, {resent / cuts / 2**20:.1f} MiB a cut")
    assert resent <= cuts * RESENT_BYTES_MAX
    if points[-1] > cuts * RESENT_BYTES_MAX:  # else all cuts may have come before anything was kept
        assert summary["resumed_bytes"] > 0
    assert file_hashes(between.far.tree("large")) == file_hashes(between.data)
    between.far.run("fsck", "--full")
