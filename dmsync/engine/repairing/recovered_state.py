"""What a log that lost events no longer says and a catalog kept aside still knows.

Put back by new events on top of what the log has, in an epoch of their own. A ref that went its
own way since is not moved: what the old catalog knew of it gets a branch `recovered-...`.
"""

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from sqlite3 import DatabaseError, connect
from typing import Final

from dmsync.core.events import (
    CommitsAdded,
    CommitsListed,
    CurrentDotSwitched,
    DotCreated,
    DotRenamed,
    DotScopeSet,
    Event,
    HeadSwitched,
    RefChanged,
    RemoteAdded,
    SignatureAdded,
    TreeAttached,
    TreeSwitchFinished,
    TreeSwitchStarted,
    UpstreamSet,
    WorkingSaved,
)
from dmsync.core.graph import is_ancestor
from dmsync.core.ids import DotId, Kind, ObjectId
from dmsync.core.objects import commit_from_bytes
from dmsync.engine.repairing.losses import (
    Loss,
    Report,
    add_losses,
    read_losses,
    write_losses,
)
from dmsync.engine.store import Store
from dmsync.errors import DmError
from dmsync.storage.catalog import DotRow, PastCatalog, Transaction, WorkingRow
from dmsync.storage.durable import fsync_directory, storage_errors
from dmsync.storage.layout import Layout

COMMAND: Final = "fsck --repair"
REASON: Final = "known to the catalog, lost by the event log"
COMMIT: Final = "commit"
HOLLOW_COMMIT: Final = "commit without content"
_DONE: Final = ".done"


def known_cluster_id(layout: Layout) -> bytes | None:
    """The store's identity out of a catalog, for a log that is gone. None when none says it."""
    for path in [layout.catalog_file, *reversed(layout.kept_catalogs())]:
        try:
            with _sound(path, layout) as catalog:
                return catalog.cluster_id()
        except (DmError, DatabaseError, FileNotFoundError):
            continue
    return None


def is_known_past(layout: Layout, last_seq: int) -> bool:
    """Whether a sound catalog knows events behind that one, so that a loss can be told by name."""
    for path in [layout.catalog_file, *layout.kept_catalogs()]:
        try:
            with _sound(path, layout) as catalog:
                if catalog.last_seq() > last_seq:
                    return True
        except (DmError, DatabaseError, FileNotFoundError):
            continue
    return False


def put_back(store: Store, report: Report, *, dry_run: bool) -> None:
    """Append what kept catalogs know and the log does not, each once. What cannot be put back is
    a loss (losses): told, and tried again by each later repair until somebody accepts it.

    Raises:
        Busy, StorageFull, StorageFailed.
    """
    layout = store.layout
    kept = layout.kept_catalogs()
    if dry_run:
        for path in kept:
            report.did("", "events", f"{os.path.basename(path)} knows what the log lost")
        return
    _try_again(store, report)
    for path in kept:
        lost: list[Loss] = []
        try:
            with _sound(path, layout) as old, store.transaction(COMMAND) as tx:
                _PuttingBack(store, tx, report, lost, old).run()
        except (DatabaseError, FileNotFoundError) as exc:
            report.did("", os.path.basename(path), f"of no use: {exc}")
            lost.append(Loss("", "", "events", "", f"{os.path.basename(path)} is of no use: {exc}"))
        add_losses(layout, lost)  # before the catalog counts as done
        for suffix in ("-wal", "-shm"):
            if os.path.lexists(path + suffix):
                os.unlink(path + suffix)
        with storage_errors(f"renaming {path}"):
            os.rename(path, _done_name(path))
        fsync_directory(layout.damaged_dir)


def _done_name(path: str) -> str:
    """One that nothing has: what was put back before stays."""
    name, number = path + _DONE, 1
    while os.path.lexists(name):
        number += 1
        name = f"{path}{_DONE}.{number}"
    return name


def _try_again(store: Store, report: Report) -> None:
    """Put back refs whose commits came since, from wherever."""
    losses = read_losses(store.layout)
    left: list[Loss] = []
    if not any(loss.commit for loss in losses):
        return
    with store.transaction(COMMAND) as tx:
        again = _Putting(store, tx, report, left)
        for loss in losses:
            again.try_again(loss)
    if left != losses:
        write_losses(store.layout, left)


@contextmanager
def _sound(path: str, layout: Layout) -> Iterator[PastCatalog]:
    """A kept catalog, if SQLite finds nothing wrong with it. Raises DatabaseError."""
    with closing(connect(f"file:{path}?mode=ro", uri=True)) as probe:
        (verdict,) = probe.execute("PRAGMA integrity_check(1)").fetchone()
    if verdict != "ok":
        raise DatabaseError(verdict)
    there = Layout(layout.home)
    there.catalog_file = path

    def nothing(dot: DotId, commit: ObjectId) -> bytes:
        raise AssertionError("a kept catalog folds nothing")

    with PastCatalog(there, nothing) as catalog:
        yield catalog


@dataclass
class _Putting:
    """Into the store as it is now, within one transaction; what cannot be goes to `lost`."""

    store: Store
    tx: Transaction
    report: Report
    lost: list[Loss]
    count: int = field(default=0, init=False)

    def _append(self, event: Event) -> str | None:
        """Why the store refuses it, or None."""
        try:
            self.tx.append(event)
        except DmError as exc:
            return exc.message
        self.count += 1
        return None

    def try_again(self, loss: Loss) -> None:
        """A commit, or a ref whose commit is known by now; a commit comes before what names it."""
        dot = self.store.catalog.dot(DotId(bytes.fromhex(loss.dot))) if loss.dot else None
        commit = ObjectId(bytes.fromhex(loss.commit))
        if dot is not None and dot.trash is None and commit:
            if loss.where in (COMMIT, HOLLOW_COMMIT):
                self._add_commit(dot, commit, is_hollow=loss.where == HOLLOW_COMMIT)
            if self._is_here(dot, commit):
                if "/" in loss.where:
                    self._ref(dot, loss.where, commit, loss.origin)
                elif loss.where in (COMMIT, HOLLOW_COMMIT):
                    self.report.did(dot.name, loss.where, f"{loss.commit[:12]} is here again")
                else:
                    self.lost.append(loss)
                return
        self.lost.append(loss)

    def _add_commit(self, dot: DotRow, commit: ObjectId, *, is_hollow: bool) -> None:
        catalog, objects = self.store.catalog, self.store.objects(dot.dot)
        if catalog.has_commit(dot.dot, commit) or not objects.has(Kind.COMMIT, commit):
            return
        parents = commit_from_bytes(objects.read_commit(commit), trusted=True).parents
        if all(catalog.has_commit(dot.dot, parent) for parent in parents):
            make = CommitsListed if is_hollow else CommitsAdded
            self._append(make(dot.dot, (commit,)))

    def _is_here(self, dot: DotRow, target: ObjectId) -> bool:
        if not target:
            return False
        is_commit = self.store.catalog.has_commit(dot.dot, target)
        return is_commit or self.store.objects(dot.dot).has(Kind.TAG, target)

    def _lose(
        self, dot: DotRow, where: str, commit: ObjectId | None, why: str, origin: str | None = None
    ) -> None:
        at = "" if commit is None else commit.hex()
        shown = f" at {at[:12]}" if at else ""
        self.report.did(dot.name, where, f"not put back{shown}: {why}")
        self.lost.append(Loss(dot.dot.hex(), dot.name, where, at, why, origin))

    def _ref(self, dot: DotRow, ref: str, target: ObjectId, origin: str | None) -> None:
        now = self.store.catalog.ref(dot.dot, ref)
        current = None if now is None else now.target
        if current == target:
            return
        if current is not None and not self._is_forward(dot.dot, current, target):
            kind, _, short_name = ref.partition("/")
            if kind != "branch":
                if kind != "remote":  # a tracking ref follows with the next fetch
                    self._lose(dot, ref, target, "it names something else now", origin)
                return
            name = f"branch/recovered-{short_name}"
            if self.store.catalog.ref(dot.dot, name) is None:
                self._change(dot, name, None, target, short_name)
            return
        self._change(dot, ref, current, target, origin)

    def _change(
        self, dot: DotRow, name: str, old: ObjectId | None, new: ObjectId, origin: str | None
    ) -> None:
        if not name.startswith("remote/") and not self._is_here(dot, new):
            why: str | None = "what it names is gone"
        else:
            why = self._append(RefChanged(dot.dot, name, old, new, "restore", REASON, origin))
        if why is None:
            self.report.did(dot.name, name, f"put back at {new.hex()[:12]}")
        else:
            self._lose(dot, name, new, why, origin)

    def _is_forward(self, dot: DotId, old: ObjectId, new: ObjectId) -> bool:
        graph = self.store.catalog.graph(dot)
        return graph.has(old) and graph.has(new) and is_ancestor(graph, old, new)


@dataclass
class _PuttingBack(_Putting):
    """One kept catalog."""

    old: PastCatalog

    def run(self) -> None:
        known = {row.name for row in self.store.catalog.remotes()}
        for remote in self.old.remotes():
            if remote.name not in known:
                self._put("remote", RemoteAdded(remote.name, remote.url, remote.dm_command))
        for dot in self.old.dots():
            self._dot(dot)
        current = self.old.current_dot()
        if current is not None and self.store.catalog.current_dot() is None:
            self._put("current dot", CurrentDotSwitched(current))
        if self.count:
            self.report.did("", "events", f"{self.count} events put back that the log had lost")

    def _put(self, where: str, event: Event, dot: DotRow | None = None) -> bool:
        """Anything but a ref."""
        why = self._append(event)
        if why is None:
            return True
        if dot is not None:
            self._lose(dot, where, None, why)
        else:
            self.report.did("", where, f"not put back: {why}")
            self.lost.append(Loss("", "", where, "", why))
        return False

    def _dot(self, dot: DotRow) -> None:
        now = self.store.catalog.dot(dot.dot)
        is_new = now is None
        if now is None:
            if not self._put("dot", DotCreated(dot.dot, dot.namespace, dot.name, dot.owner), dot):
                return
        elif now.trash is not None:
            return  # deleted, as the log says
        elif (now.namespace, now.name) != (dot.namespace, dot.name):
            self._put("name", DotRenamed(dot.dot, dot.namespace, dot.name), dot)
        self._settings(dot, is_new=is_new)
        self._commits(dot)
        for ref in self.old.refs(dot.dot):
            self._ref(dot, ref.name, ref.target, ref.origin)
        self._tree(dot)
        for saved in self.old.working_snapshots(dot.dot):
            here = {row.branch for row in self.store.catalog.working_snapshots(dot.dot)}
            if saved.branch not in here:
                self._saved(dot, saved)
        for target in sorted(self.old.signed(dot.dot)):
            known = self.store.catalog.signatures(dot.dot, target)
            for signature in self.old.signatures(dot.dot, target):
                if signature not in known:
                    self._put("signature", SignatureAdded(dot.dot, target, signature), dot)

    def _saved(self, dot: DotRow, saved: WorkingRow) -> None:
        where = f"uncommitted state of {saved.branch}"
        if not self._is_here(dot, saved.commit):
            self._lose(dot, where, saved.commit, "what it names is gone")
        else:
            event = WorkingSaved(dot.dot, saved.branch, saved.commit, saved.reason)
            self._put(where, event, dot)

    def _settings(self, dot: DotRow, *, is_new: bool) -> None:
        catalog = self.store.catalog
        scope = self.old.scope(dot.dot)
        if scope is not None and catalog.scope(dot.dot) is None:
            self._put("subdots", DotScopeSet(dot.dot, scope), dot)
        for remote, namespace, name in self.old.upstreams(dot.dot):
            if catalog.upstream(dot.dot, remote) is None:
                self._put("upstream", UpstreamSet(dot.dot, remote, namespace, name), dot)
        if is_new or catalog.head(dot.dot) != dot.head:
            self._put("HEAD", HeadSwitched(dot.dot, dot.head), dot)

    def _tree(self, dot: DotRow) -> None:
        """The attached directory, with the branch whose content lies in it."""
        tree = self.old.tree(dot.dot)
        if tree is None:
            return
        if self.store.catalog.tree(dot.dot) is None:
            attached = TreeAttached(dot.dot, tree.path, tree.as_root, tree.device, tree.inode)
            self._put("tree", attached, dot)
        now = self.store.catalog.tree(dot.dot)
        if now is not None and now.branch != tree.branch and now.switching_to is None:
            self._put("tree", TreeSwitchStarted(dot.dot, tree.branch, None, None, COMMAND), dot)
            self._put("tree", TreeSwitchFinished(dot.dot, tree.branch), dot)

    def _commits(self, dot: DotRow) -> None:
        """Those whose record is still in the packs, as the same kind of commit."""
        catalog, objects = self.store.catalog, self.store.objects(dot.dot)
        hollow = set(self.old.hollow_commits(dot.dot))
        known: set[ObjectId] = set()
        complete: list[ObjectId] = []
        listed: list[ObjectId] = []
        for commit in self.old.commit_ids(dot.dot):
            if catalog.has_commit(dot.dot, commit):
                known.add(commit)
                continue
            kind = HOLLOW_COMMIT if commit in hollow else COMMIT
            if not objects.has(Kind.COMMIT, commit):
                self._lose(dot, kind, commit, "the commit is gone")
                continue
            parents = commit_from_bytes(objects.read_commit(commit), trusted=True).parents
            if all(parent in known for parent in parents):
                known.add(commit)
                (listed if commit in hollow else complete).append(commit)
            else:
                self._lose(dot, kind, commit, "a parent of the commit is gone")
        if listed:
            fresh = set(listed).union(complete)
            in_order = (commit for commit in self.old.commit_ids(dot.dot) if commit in fresh)
            self._put("commits", CommitsListed(dot.dot, tuple(in_order)), dot)
        if complete:
            self._put("commits", CommitsAdded(dot.dot, tuple(complete)), dot)
