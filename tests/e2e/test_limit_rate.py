"""`--limit-rate`: what a link sees of a transfer that is held to a rate."""

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.cluster import Cluster, MakeCluster
from tests.support.tree import file_hashes
from tools.netlab.link import Link

DATA_BYTES = 2_000_000
RATE = 1024 * 1024
SLACK_BYTES = 700_000
"""What may be ahead of the rate at the beginning: half a second's window, a buffer, SSH itself."""


@pytest.fixture
def near_and_link(make_cluster: MakeCluster, tmp_path: Path) -> Iterator[tuple[Cluster, Link]]:
    """A cluster with a dot of random data, and a link to its remote `far`."""
    near, far = make_cluster("near"), make_cluster("far")
    data = tmp_path / "data"
    data.mkdir()
    (data / "random").write_bytes(os.urandom(DATA_BYTES))
    near.run("init", "app", "--at", data)
    near.commit("random")
    with ExitStack() as stack:
        link = stack.enter_context(Link(far.serve().port))
        near.add_remote("far", far, port=link.port)
        yield near, link


def test_a_push_sends_no_faster_than_asked(near_and_link: tuple[Cluster, Link]) -> None:
    near, link = near_and_link
    began_s = time.monotonic()
    near.run("push", "far", "--limit-rate", "1M")
    took_s = time.monotonic() - began_s
    assert link.bytes_up >= DATA_BYTES
    assert link.bytes_up <= RATE * took_s + SLACK_BYTES, "it took at least as long as the rate asks"


def test_a_clone_takes_no_faster_than_asked(
    near_and_link: tuple[Cluster, Link], make_cluster: MakeCluster
) -> None:
    near, link = near_and_link
    near.run("push", "far")
    third = make_cluster("third")
    up, down = link.bytes_up, link.bytes_down
    third.known_hosts.write_bytes(near.known_hosts.read_bytes())
    environment = {"DM_SSH_KEY": str(near.user_key.private)}
    began_s = time.monotonic()
    third.run("clone", f"dm@127.0.0.1:{link.port}", "app", "--limit-rate=1M", env=environment)
    took_s = time.monotonic() - began_s
    received = link.bytes_down - down
    assert received >= DATA_BYTES
    assert received <= RATE * took_s + SLACK_BYTES
    assert link.bytes_up - up < 50_000
    assert file_hashes(third.tree("app")) == file_hashes(near.tree("app"))


@pytest.mark.parametrize("rate", ["0", "fast", "-5k", "20Mbit", "1e6"])
def test_what_is_no_rate_is_refused(make_cluster: MakeCluster, rate: str) -> None:
    make_cluster("near").refused("push", "far", f"--limit-rate={rate}", code=2, saying="20M")
