"""A real PostgreSQL, committed, pushed, cloned and started on the other side; and what that costs."""

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.cluster import Cluster, MakeCluster
from tests.support.postgresql import PostgresServer, programs_directory
from tests.support.tree import describe_tree
from tools.benchmarks.references import XorReference, tar_zstd_bytes, xor_reference
from tools.netlab.link import Link

SCALE = 40
CLIENTS = 4
TRANSACTIONS = 1000
FIRST_COMMIT_RATIO_MAX = 1.1
PLACED_RATIO_MAX = 1.5
NEW_RATIO_MAX = 1.0
TIMEOUT_S = 300.0

pytestmark = pytest.mark.skipif(programs_directory() is None, reason="PostgreSQL is not installed")


@dataclass
class Replica:
    """A database on `near`, committed in place, and its clone on `other`, by way of `far`."""

    near: Cluster
    far: Cluster
    other: Cluster
    link: Link
    server: PostgresServer
    expected_rows: dict[str, int]

    def commit(self, message: str) -> int:
        """Commit; growth of the store in bytes, the command having ended."""
        before = self.near.stored_bytes() if self.near.home.exists() else 0
        self.near.run("commit", "-m", message, timeout_s=TIMEOUT_S)
        return self.near.stored_bytes() - before

    def push(self) -> int:
        """Push; bytes on the wire, both directions."""
        before = self.link.bytes_total
        self.near.run("push", "far", timeout_s=TIMEOUT_S)
        return self.link.bytes_total - before

    def check_clone(self) -> None:
        """The clone's tree is the original's; PostgreSQL starts on it and finds the same, sound."""
        tree = self.other.tree("db")
        assert describe_tree(tree) == describe_tree(self.server.data)
        with PostgresServer(tree) as clone:
            clone.start()
            assert clone.row_counts() == self.expected_rows
            clone.amcheck()
            clone.stop()
        # Running it changed the clone's tree; the next pull wants a clean one.
        self.other.run("reset", "--hard", "HEAD", timeout_s=TIMEOUT_S)


@pytest.fixture
def replica(make_cluster: MakeCluster, tmp_path: Path) -> Iterator[Replica]:
    """A database with pgbench's tables, stopped; nothing committed yet."""
    near, far, other = make_cluster("near"), make_cluster("far"), make_cluster("other")
    link = Link(far.serve().port)
    near.add_remote("far", far, port=link.port)
    other.add_remote("far", far)
    with link, PostgresServer(tmp_path / "data") as server:
        server.initdb()
        server.start()
        server.pgbench("-i", "-q", "-s", str(SCALE))
        rows = server.row_counts()
        server.stop()
        near.run("init", "db", "--at", server.data)
        yield Replica(near, far, other, link, server, rows)


@pytest.mark.slow
def test_pgbench_database_grows_and_travels_within_the_xor_reference(
    replica: Replica, tmp_path: Path
) -> None:
    grown = replica.commit("first")
    tar_bytes = tar_zstd_bytes(replica.server.data)
    sent = replica.push()
    print(f"\nfirst: stored {grown}, sent {sent}, tar | zstd -3 {tar_bytes}")
    assert grown <= FIRST_COMMIT_RATIO_MAX * tar_bytes
    replica.other.run("clone", "far", "db", timeout_s=TIMEOUT_S)
    replica.check_clone()

    over_the_limit = []
    new_wal_rounds = 0
    for number, new_wal in enumerate((False, False, False, True, True), start=1):
        reference = run_transactions(replica, tmp_path / "before", new_wal=new_wal)
        grown = replica.commit(f"round {number}")
        sent = replica.push()
        line = describe_round(number, reference, grown, sent)
        print(line)
        limit = NEW_RATIO_MAX if reference.mostly_new else PLACED_RATIO_MAX
        if max(grown, sent) > limit * reference.compressed_bytes:
            over_the_limit.append(f"{line} (limit {limit})")
        new_wal_rounds += reference.mostly_new
        replica.other.run("pull", "far", timeout_s=TIMEOUT_S)
        replica.check_clone()
    assert not over_the_limit
    assert new_wal_rounds, "no round wrote mostly new WAL: that limit was not tried"


def run_transactions(replica: Replica, before: Path, *, new_wal: bool) -> XorReference:
    """One round of pgbench, stopped cleanly; the reference of what it changed."""
    server = replica.server
    if before.exists():
        shutil.rmtree(before)
    subprocess.run(["cp", "-a", "--reflink=auto", server.data, before], check=True)
    server.start()
    if new_wal:
        use_up_recycled_wal(server)
    server.pgbench("-n", "-c", str(CLIENTS), "-t", str(TRANSACTIONS))
    replica.expected_rows = server.row_counts()
    server.stop()
    return xor_reference(before, server.data)


def use_up_recycled_wal(server: PostgresServer) -> None:
    """Switch segments until those that initialising left for reuse are gone: new ones follow."""
    for _ in range(12):
        server.sql("select pg_switch_wal()")
        server.sql("checkpoint")
        server.sql("select txid_current()")  # something in the segment, so that it can be switched


def describe_round(number: int, reference: XorReference, grown: int, sent: int) -> str:
    """One line of figures."""
    whole = reference.compressed_bytes
    kind = "mostly new" if reference.mostly_new else "mostly placed"
    return (
        f"round {number} ({kind}; {reference.placed_pages} placed, {reference.new_pages} new pages): "
        f"xor reference {whole}, stored {grown} = {grown / whole:.2f}x, "
        f"sent {sent} = {sent / whole:.2f}x"
    )
