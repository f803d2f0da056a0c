"""Pushes, clones and pulls over SSH: a whole gigabyte, what transactions changed, and nothing."""

import os
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from tests.support.cluster import Cluster
from tools.benchmarks import raw_ssh
from tools.benchmarks.data_sets import (
    Database,
    data_bytes,
    make_incompressible,
    remove,
    require_same,
)
from tools.benchmarks.measuring import Cost, rotated
from tools.benchmarks.peers import Dm
from tools.benchmarks.references import Shadow
from tools.benchmarks.result import RowResult
from tools.benchmarks.senders import (
    OwnServer,
    Rsync,
    Server,
    SshdServer,
    clone,
    pull,
    push,
)
from tools.benchmarks.workspace import Workspace
from tools.netlab.link import Link

REMOTE = "far"
SERVERS: tuple[type[OwnServer] | type[SshdServer], ...] = (OwnServer, SshdServer)


class LinkLimits(NamedTuple):
    """What is between the machines; `delay_ms` one way."""

    delay_ms: float = 0.0
    rate_bits_per_s: float | None = None

    def link(self, port: int) -> Link:
        """A link of this kind to a port."""
        return Link(port, delay_ms=self.delay_ms, rate_bits_per_s=self.rate_bits_per_s)


LOOPBACK = LinkLimits()
SLOW_LINK = LinkLimits(50.0, 20e6)
LONG_FAT_BITS_PER_S = 200e6
LONG_FAT_LINK = LinkLimits(50.0, LONG_FAT_BITS_PER_S)


# --- everything ---------------------------------------------------------------------------------


def database(work: Workspace, row: RowResult) -> None:
    """Push and clone of a database of about 1 GB."""
    _whole(work, row, work.database().data, share_min=0.60)


def incompressible(work: Workspace, row: RowResult) -> None:
    """Push and clone of 1 GB of random bytes."""
    _whole(work, row, work.incompressible(), share_min=0.35)


def _whole(work: Workspace, row: RowResult, source: Path, *, share_min: float) -> None:
    size_bytes = data_bytes(source)
    with work.directory("near") as directory:
        near = Dm(directory)
        near.commit(source)
        row.runs = work.runs_within(100, 6 * size_bytes / 200e6)
        for number in range(row.runs):
            for name in rotated([*(kind.name for kind in SERVERS), "rsync", "asyncssh"], number):
                with work.directory("far") as far:
                    _send_whole(row, near, source, far, name, size_bytes)
    row.notes.append(f"{size_bytes / 1e9:.2f} GB")
    again = sum(row.median("push", kind.name, "reencoded") for kind in SERVERS)
    row.check("push: records compressed again", again, "records", 0)
    for step in ("push", "clone"):
        for kind in SERVERS:
            row.compare(step, "wall_s", "rsync -a", 1.0, ours=kind.name)
            rate = size_bytes / row.median(step, kind.name, "wall_s")
            raw = row.median("raw", "asyncssh", "rate")
            what = f"{step}, {kind.name}: source bytes a second against asyncssh"
            row.check_ratio(what, rate, raw, "rate", share_min, at_least=True)


def _send_whole(
    row: RowResult, near: Dm, source: Path, far: Path, name: str, size_bytes: int
) -> None:
    """One program sends everything to a place that has nothing, and gets it back."""
    if name == "asyncssh":
        with raw_ssh.sink(far) as port:
            seconds = raw_ssh.send_seconds(port, size_bytes)
        row.add("raw", name, Cost(seconds).with_more(rate=size_bytes / seconds))
        return
    if name == "rsync":
        rsync = Rsync(far)
        try:
            row.add("push", "rsync -a", rsync.send(source, far / "copy"))
            row.add("clone", "rsync -a", rsync.receive(far / "copy", far / "back"))
        finally:
            rsync.close()
        return
    kind = next(one for one in SERVERS if one.name == name)
    server = kind(far / "server")
    try:
        server.admit(near.cluster, REMOTE)
        row.add("push", name, push(near, REMOTE))
        near.cluster.run("remote", "rm", REMOTE)
        other = Dm(far)
        server.admit(other.cluster, REMOTE)
        row.add("clone", name, clone(other, REMOTE, far / "tree"))
        if not row.of("clone", name).figures[1:]:
            require_same(far / "tree", source)
    finally:
        server.close()


# --- what transactions changed --------------------------------------------------------------------


class RoundsSent:
    """A database that is sent to two places after each round, each through a link that counts."""

    def __init__(
        self, work: Workspace, directory: Path, undo: ExitStack, limits: LinkLimits
    ) -> None:
        self.database: Database = work.database().copied_to(directory / "data")
        self._shadow = Shadow(self.database.data, directory / "shadow")
        self._target = directory / "copy"
        self._dm = Dm(directory)
        self._dm.commit(self.database.data)
        server = OwnServer(directory / "far")
        rsync = Rsync(directory / "rsync")
        undo.callback(server.close)
        undo.callback(rsync.close)
        self._rsync = rsync
        # All of the first version goes without a link; a push of nothing then meets the server.
        server.admit(self._dm.cluster, "near")
        push(self._dm, "near")
        rsync.send(self.database.data, self._target)
        self._link = undo.enter_context(limits.link(server.port))
        self._rsync_link = undo.enter_context(limits.link(rsync.port))
        server.admit(self._dm.cluster, REMOTE, self._link.port)
        push(self._dm, REMOTE)

    def send_round(self, row: RowResult, step: str, number: int, transactions: int) -> None:
        """Transactions, a commit, then both programs send."""
        self.database.advance(transactions)
        floor = self._shadow.follow().floor_bytes
        self._dm.commit(self.database.data)
        for name in rotated(["dm", "rsync -z"], number):
            link = self._link if name == "dm" else self._rsync_link
            before = link.bytes_total
            if name == "dm":
                cost = push(self._dm, REMOTE)
            else:
                cost = self._rsync.send(
                    self.database.data, self._target, "-z", port=self._rsync_link.port
                )
            cost = cost.with_more(wire_bytes=link.bytes_total - before, floor_bytes=floor)
            row.add(step, name, cost)


def rounds(work: Workspace, row: RowResult) -> None:
    """Push after 4,000 transactions, on the loopback and over a slow link."""
    for step, limits in (("loopback", LOOPBACK), ("100 ms, 20 Mbit/s", SLOW_LINK)):
        with ExitStack() as undo:
            directory = undo.enter_context(work.directory("rounds"))
            sent = RoundsSent(work, directory, undo, limits)
            for number in range(work.runs):
                sent.send_round(row, step, number, work.sizes.transactions)
        row.compare(step, "wire_bytes", "rsync -z", 0.2)
        row.compare(step, "wall_s", "rsync -z", 0.5)
        pairs = [
            figures["wire_bytes"] / max(1.0, figures["floor_bytes"])
            for figures in row.of(step, "dm").figures
        ]
        ours, floor = (row.median(step, "dm", name) for name in ("wire_bytes", "floor_bytes"))
        row.check(
            f"{step}: bytes against the floor, mean",
            sum(pairs) / len(pairs),
            "x",
            1.5,
            ours=f"{ours / 1e6:.2f} MB",
            theirs=f"{floor / 1e6:.2f} MB",
        )


def long_fat_link(work: Workspace, row: RowResult) -> None:
    """Incompressible bytes through 100 ms and 200 Mbit/s, with the own server."""
    step = "100 ms, 200 Mbit/s"
    size_bytes = work.sizes.long_fat_bytes
    with work.directory("long-fat") as directory:
        source = directory / "data"
        make_incompressible(source, size_bytes)
        near = Dm(directory)
        near.commit(source)
        runs = work.runs_within(40, size_bytes / 15e6)
        for number in range(runs):
            far = directory / f"far{number}"
            server: Server = OwnServer(far / "server")
            with LONG_FAT_LINK.link(server.port) as link:
                server.admit(near.cluster, REMOTE, link.port)
                row.add(step, "push", push(near, REMOTE))
                near.cluster.run("remote", "rm", REMOTE)
                other = Dm(far)
                server.admit(other.cluster, REMOTE, link.port)
                row.add(step, "clone", clone(other, REMOTE))
            server.close()
            remove(far)
    row.runs = runs
    row.notes.append(f"{size_bytes / 1e6:.0f} MB of random bytes; the clone writes no tree")
    capacity = LONG_FAT_BITS_PER_S / 8
    for name in ("push", "clone"):
        rate = size_bytes / row.median(step, name, "wall_s")
        row.check_ratio(f"{name}: share of the link", rate, capacity, "rate", 0.8, at_least=True)


# --- nothing ------------------------------------------------------------------------------------


def nothing(work: Workspace, row: RowResult) -> None:
    """Push and pull when both sides have the same."""
    with work.directory("nothing") as directory:
        near = Dm(directory)
        source = directory / "data"
        source.mkdir()
        (source / "file").write_text("content\n")
        near.commit(source)
        server = OwnServer(directory / "far")
        try:
            server.admit(near.cluster, REMOTE)
            push(near, REMOTE)
            written: set[str] = set()
            for _ in range(work.runs):
                for step, send in (("push", push), ("pull", pull)):
                    before = _files_of(near.cluster, server.cluster)
                    cost = send(near, REMOTE)
                    changed = {
                        found[0] for found in _files_of(near.cluster, server.cluster) ^ before
                    }
                    row.add(step, "dm", cost.with_more(files_changed=len(changed)))
                    written |= {f"{step}: {os.path.basename(path)}" for path in changed}
        finally:
            server.close()
    if written:
        row.notes.append(f"files written: {', '.join(sorted(written))}")
    for step in ("push", "pull"):
        figures = row.of(step, "dm")
        sent = figures.median("bytes_sent") + figures.median("bytes_received")
        row.check(f"{step}: round trips", figures.median("round_trips"), "round trips", 1)
        row.check(f"{step}: bytes, both directions", sent, "bytes", 4096)
        row.check(f"{step}: files changed", figures.median("files_changed"), "files", 0)


def _files_of(*clusters: Cluster) -> set[tuple[str, int, int, int]]:
    """Files of stores with what a write would change; SQLite's shared memory is no write."""
    return {
        (str(path), found.st_ino, found.st_size, found.st_mtime_ns)
        for cluster in clusters
        for path in cluster.home.rglob("*")
        if not path.name.endswith("-shm") and path.is_file()
        for found in [path.stat()]
    }
