"""Stores with a real log and catalog whose commit payloads come from a dictionary, and random
valid histories for them."""

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from dmsync.core import events as ev
from dmsync.core.graph import ancestors_difference
from dmsync.core.ids import DotId, Kind, ObjectId, object_id
from dmsync.core.objects import ROOT_ENTRY, Commit
from dmsync.errors import DmError, ObjectMissing
from dmsync.storage.catalog import Catalog
from dmsync.storage.layout import Layout, create_store

CLUSTER = b"c" * 16


class CommitShelf:
    """Payloads by (dot, id): stands for the packs."""

    def __init__(self) -> None:
        self.payloads: dict[tuple[DotId, ObjectId], bytes] = {}

    def put(self, dot: DotId, parents: tuple[ObjectId, ...] = (), message: str = "m") -> ObjectId:
        commit = Commit(ROOT_ENTRY, parents, "a <a@b>", "a <a@b>", 1, 0, message)
        payload = commit.to_bytes()
        oid = object_id(Kind.COMMIT, payload)
        self.payloads[dot, oid] = payload
        return oid

    def read(self, dot: DotId, commit: ObjectId) -> bytes:
        try:
            return self.payloads[dot, commit]
        except KeyError:
            raise ObjectMissing("no such commit") from None


def make_store(home: Path) -> Layout:
    return create_store(
        str(home), cluster_id=CLUSTER, epoch=7, op_id=b"0" * 16, time_ns=1, actor="me"
    )


def open_catalog(home: Path, shelf: CommitShelf, **options) -> Catalog:
    return Catalog.open(str(home), shelf.read, **options)


class RandomHistory:
    """Appends random operations; what the catalog refuses is simply not in the history."""

    def __init__(self, catalog: Catalog, shelf: CommitShelf, seed: int) -> None:
        self.catalog = catalog
        self.shelf = shelf
        self.random = random.Random(seed)
        self.dots: list[DotId] = []
        self.commits: dict[DotId, list[ObjectId]] = {}
        self.transfers: list[bytes] = []
        self.refused = 0
        self.dropped: list[tuple[DotId, ObjectId]] = []

    def step(self) -> None:
        op_id = self.random.randbytes(16)
        try:
            with self.catalog.transaction("test", "me", op_id) as tx:
                for _ in range(self.random.choice((1, 1, 2, 3))):
                    tx.append(self.event())
        except DmError:
            self.refused += 1
        self.drop_forgotten()

    def dot(self) -> DotId:
        if not self.dots or self.random.random() < 0.02:
            self.dots.append(DotId(self.random.randbytes(16)))
        return self.random.choice(self.dots)

    def name(self) -> str:
        return self.random.choice(("master", "topic", "x1", "old", "prod"))

    def commit(self, dot: DotId) -> ObjectId | None:
        known = self.commits.get(dot)
        return self.random.choice(known) if known and self.random.random() < 0.9 else None

    def some_commit(self, dot: DotId) -> ObjectId:
        return self.commit(dot) or ObjectId(self.random.randbytes(32))

    def new_commits(self, dot: DotId) -> tuple[ObjectId, ...]:
        known = self.commits.setdefault(dot, [])
        made = []
        for _ in range(self.random.randrange(1, 5)):
            parents = self.random.sample(
                known, min(len(known), self.random.choice((0, 1, 1, 2, 3)))
            )
            oid = self.shelf.put(dot, tuple(parents), str(self.random.random()))
            known.append(oid)
            made.append(oid)
        if self.random.random() < 0.2:
            made.insert(0, known[0])
        return tuple(made)

    def ref_change(self, dot: DotId) -> ev.RefChanged:
        name = self.random.choice(("branch/", "tag/", "remote/r1/", "stash/")) + self.name()
        current = self.catalog.ref(dot, name)
        old = current.target if current and self.random.random() < 0.95 else None
        new = self.commit(dot)
        kind = self.random.choice(ev.REF_CHANGE_KINDS)
        return ev.RefChanged(dot, name, old, new, kind, "why", self.random.choice((None, "topic")))

    def event(self) -> ev.Event:
        r, dot = self.random, self.dot()
        remote = r.choice(("r1", "r2"))
        if dot not in self.commits and r.random() < 0.8:
            self.commits[dot] = []
            return ev.DotCreated(dot, r.choice(("ns", "admin")), self.name(), "me")
        branch = self.name()
        makers: dict[str, tuple[float, Callable[[], ev.Event]]] = {
            "list": (2, lambda: ev.CommitsListed(dot, self.new_commits(dot))),
            "forget": (2, lambda: self.forgotten(dot)),
            "collected": (1, lambda: ev.GarbageCollected(dot, (("commits", 2), ("bytes", 9)))),
            "thin": (1, lambda: ev.CommitsThinned(dot, (self.some_commit(dot),), "keep-last 1")),
            "scope": (1, lambda: ev.DotScopeSet(dot, r.choice((None, ("db",), ("db", "web"))))),
            "share": (3, lambda: ev.CollaboratorAdded(dot, r.choice(("ann", "bob")))),
            "unshare": (2, lambda: ev.CollaboratorRemoved(dot, r.choice(("ann", "bob")))),
            "quota": (2, lambda: ev.QuotaSet(self.name(), r.choice((None, 5, 1 << 40)))),
            "sign": (1, lambda: ev.SignatureAdded(dot, self.some_commit(dot), b"sig")),
            "merge": (3, lambda: self.merge_started(dot, branch)),
            "resolve": (
                3,
                lambda: ev.ConflictResolved(
                    dot, branch, b"a", r.choice(("ours", "theirs", "open")), b"left"
                ),
            ),
            "merged": (
                2,
                lambda: ev.MergeEnded(dot, branch, r.choice(ev.MERGE_OUTCOMES)),
            ),
            "unupstream": (1, lambda: ev.UpstreamRemoved(dot, remote)),
            "undo": (
                2,
                lambda: ev.UndoApplied(
                    r.choice(self.catalog.operations(9)).first_seq, r.random() < 0.4
                ),
            ),
            "create": (2, lambda: ev.DotCreated(dot, "ns", self.name(), "me")),
            "rename": (1, lambda: ev.DotRenamed(dot, "ns", self.name())),
            "delete": (0.3, lambda: ev.DotDeleted(dot, f"{dot.hex()}-1")),
            "restore": (2, lambda: ev.DotRestored(dot, "ns", self.name())),
            "purge": (0.4, lambda: ev.DotPurged(dot)),
            "current": (1, lambda: ev.CurrentDotSwitched(r.choice((dot, None)))),
            "head": (2, lambda: ev.HeadSwitched(dot, self.name())),
            "commits": (
                12,
                lambda: ev.CommitsAdded(
                    dot,
                    self.new_commits(dot),
                    r.choice((None, b"t" * 16)),
                    r.choice((None, ("freeze", "frozen", 12))),
                ),
            ),
            "ref": (12, lambda: self.ref_change(dot)),
            "branch": (3, lambda: ev.BranchRenamed(dot, self.name(), self.name())),
            "save": (3, lambda: ev.WorkingSaved(dot, self.name(), self.some_commit(dot), "x")),
            "drop": (1, lambda: ev.WorkingDropped(dot, self.name())),
            "attach": (
                2,
                lambda: ev.TreeAttached(dot, b"/d/" + self.name().encode(), True, 2**64 - 1, 5),
            ),
            "detach": (1, lambda: ev.TreeDetached(dot)),
            "switch": (
                3,
                lambda: ev.TreeSwitchStarted(
                    dot,
                    self.name(),
                    self.commit(dot),
                    self.commit(dot),
                    "checkout",
                    r.random() < 0.2,
                ),
            ),
            "switched": (2, lambda: ev.TreeSwitchFinished(dot, self.name())),
            "remote": (2, lambda: ev.RemoteAdded(remote, "ssh://h", None)),
            "unremote": (1, lambda: ev.RemoteRemoved(remote)),
            "reremote": (1, lambda: ev.RemoteRenamed(remote, r.choice(("r1", "r2", "r3")))),
            "upstream": (1, lambda: ev.UpstreamSet(dot, remote, "ns", "other")),
            "observed": (1, lambda: ev.RemoteObserved(remote, dot, CLUSTER, 3, r.randrange(99))),
            "start": (2, lambda: self.transfer_started(dot, remote)),
            "finish": (
                2,
                lambda: ev.TransferFinished(
                    r.choice(self.transfers or [b"z" * 16]),
                    "done",
                    (("n", 1), ("t", "x"), ("z", None)),
                ),
            ),
        }
        weights = [weight for weight, _ in makers.values()]
        return r.choices([make for _, make in makers.values()], weights)[0]()

    def forgotten(self, dot: DotId) -> ev.CommitsForgotten:
        """All that nothing names, as gc finds it; payloads go too."""
        tips = {ref.target for ref in self.catalog.refs(dot)}
        tips |= {row.commit for row in self.catalog.working_snapshots(dot)}
        for row in self.catalog.switches(dot):
            tips |= {row.from_commit, row.to_root_commit}
        for merge in self.catalog.merges(dot):
            tips |= {merge.ours, merge.theirs, *merge.bases, merge.snapshot}
        known = self.catalog.commit_ids(dot)
        if not known:
            return ev.CommitsForgotten(dot, ())
        graph = self.catalog.graph(dot)
        live = set(ancestors_difference(graph, [tip for tip in tips if tip in known], []))
        dead = tuple(commit for commit in known if commit not in live)
        self.dropped += [(dot, commit) for commit in dead]
        return ev.CommitsForgotten(dot, dead)

    def drop_forgotten(self) -> None:
        """Lose the payloads of what is forgotten now, as a sweep does."""
        for dot, commit in self.dropped:
            if self.catalog.is_forgotten(dot, commit):
                self.shelf.payloads.pop((dot, commit), None)
                if commit in self.commits.get(dot, []):
                    self.commits[dot].remove(commit)

    def merge_started(self, dot: DotId, branch: str) -> ev.MergeStarted:
        ours, theirs, snapshot = (self.some_commit(dot) for _ in range(3))
        conflicts = ((b"a", "both changed", b"[]"), (b"b", "deleted by us", b""))
        return ev.MergeStarted(
            dot,
            branch,
            self.random.choice(ev.MERGE_KINDS),
            ours,
            theirs,
            (ours,),
            snapshot,
            (ours, theirs),
            "join",
            conflicts[: self.random.randrange(3)],
        )

    def transfer_started(self, dot: DotId, remote: str) -> ev.TransferStarted:
        transfer = self.random.randbytes(16)
        self.transfers.append(transfer)
        return ev.TransferStarted(transfer, "push", remote, dot, "master")


def drop_catalog(home: Path) -> None:
    for name in ("catalog.sqlite", "catalog.sqlite-wal", "catalog.sqlite-shm"):
        (home / name).unlink(missing_ok=True)


def start_python(code: str, *arguments: str) -> subprocess.Popen[bytes]:
    """A real process running `code`, importing this checkout."""
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    )
