"""Turning an operation's events round, newest first, each only if what it changed is unmoved.

Everything is read from the operation alone (`old` values) and compared with the catalog as the
transaction shows it: what cannot be taken back raises CannotUndo, and the transaction is rolled
back as a whole.
"""

import os
from dataclasses import replace
from typing import Final, Literal

from dmsync.core.events import (
    BranchRenamed,
    CollaboratorAdded,
    CollaboratorRemoved,
    CommitsForgotten,
    CommitsThinned,
    ConflictResolved,
    CurrentDotSwitched,
    DotCreated,
    DotDeleted,
    DotPurged,
    DotRenamed,
    DotRestored,
    DotScopeSet,
    Event,
    GarbageCollected,
    HeadSwitched,
    MergeEnded,
    MergeStarted,
    Operation,
    QuotaSet,
    RefChanged,
    RemoteAdded,
    RemoteRemoved,
    RemoteRenamed,
    Tree,
    TreeAttached,
    TreeDetached,
    UpstreamRemoved,
    UpstreamSet,
    WorkingDropped,
    WorkingSaved,
)
from dmsync.core.ids import DotId
from dmsync.core.names import full_name
from dmsync.engine.dots import new_trash
from dmsync.engine.operations import is_tracking, short, talks_to_remote
from dmsync.engine.store import Store
from dmsync.errors import (
    AlreadyExists,
    CannotUndo,
    NotFound,
    ObjectMissing,
    RefConflict,
)
from dmsync.storage.catalog import OperationRow, Transaction

Kind = Literal["undo", "redo"]

_BRANCH: Final = "branch/"
_MADE_ON_PURPOSE: Final = frozenset({"create", "stash"})
"""Kinds of RefChanged whose branch cannot go while it is the current one; any other made the
first commit of a branch that was current and unborn, and is so again."""


class Reversal:
    """Takes back the events of one operation within a transaction."""

    def __init__(
        self,
        store: Store,
        tx: Transaction,
        operation: Operation,
        kind: Kind,
        meant: OperationRow,
        dropped_trees: frozenset[tuple[DotId, str]] = frozenset(),
    ) -> None:
        """`meant` is the user's operation that this undoes or redoes. `dropped_trees`: managed
        trees that go with their branches, and whose uncommitted state is stored."""
        self._store = store
        self._catalog = store.catalog
        self._tx = tx
        self._operation = operation
        self._kind: Kind = kind
        self._meant = meant
        self._dropped_trees = dropped_trees
        self._unmade: list[tuple[DotId, str]] = []
        """Branches that go with the command that made them."""
        self.remarks: list[str] = []
        """What does not come back as it was, for the user."""

    def run(self) -> None:
        """Raises CannotUndo."""
        for event in reversed(self._operation.events):
            try:
                self._take_back(event)
            except (AlreadyExists, NotFound, RefConflict, ObjectMissing) as exc:
                raise self.refusal(exc.message, hint=exc.hint, **exc.facts) from exc
        for event in self._operation.events:
            if isinstance(event, HeadSwitched):
                self._refuse_deleted_head(event.dot)
        for dot, branch in self._unmade:
            if self._is_live(dot) and self._catalog.head(dot) == branch:
                raise self.refusal(
                    f"{branch} is the current branch",
                    hint="dm checkout another branch first",
                    ref=_BRANCH + branch,
                )

    def _refuse_deleted_head(self, dot: DotId) -> None:
        """The branch that is current again may be unborn, but not deleted since."""
        if not self._is_live(dot):
            return
        head = self._catalog.head(dot)
        last = self._catalog.reflog(dot, _BRANCH + head, count=1)
        if last and last[0].kind == "delete":
            raise self.refusal(f"branch {head} is gone", ref=_BRANCH + head)

    def refusal(self, why: str, *, hint: str = "", **facts: object) -> CannotUndo:
        """Why it cannot be done, for raising."""
        meant = self._meant
        return CannotUndo(
            f"cannot {self._kind} {meant.command} (operation {meant.first_seq}): {why}",
            hint=hint,
            operation=meant.first_seq,
            **facts,
        )

    def _append(self, event: Event) -> None:
        self._tx.append(event)

    def _take_back(self, event: Event) -> None:
        match event:
            case RefChanged():
                self._ref(event)
            case BranchRenamed():
                self._branch_rename(event)
            case HeadSwitched():
                self._head(event)
            case CurrentDotSwitched():
                self._current_dot(event)
            case WorkingSaved():
                self._working_saved(event)
            case WorkingDropped():
                if event.old is not None:
                    self._append(WorkingSaved(event.dot, event.branch, event.old, self._kind))
            case DotCreated():
                self._dot_made(event.dot)
            case DotRestored():
                self._append(DotDeleted(event.dot, new_trash(event.dot)))
            case DotRenamed():
                self._dot_rename(event)
            case DotDeleted():
                self._dot_deleted(event)
            case DotScopeSet():
                self._append(DotScopeSet(event.dot, event.old))
            case CollaboratorAdded():
                self._append(CollaboratorRemoved(event.dot, event.user))
            case CollaboratorRemoved():
                self._append(CollaboratorAdded(event.dot, event.user))
            case QuotaSet():
                self._quota(event)
            case TreeAttached():
                self._tree_attached(event)
            case TreeDetached():
                self._attach_again(event.dot, event.old)
            case MergeStarted():
                self._merge_started(event)
            case ConflictResolved():
                self._conflict(event)
            case MergeEnded():
                self._merge_ended(event)
            case CommitsThinned():
                raise self.refusal("what prune gave up is gone for good", reason="prune")
            case DotPurged():
                raise self.refusal("the dot has been purged", reason="purged")
            case CommitsForgotten() | GarbageCollected():
                raise self.refusal("what gc gave up is gone for good", reason="gc")
            case _:
                self._take_back_remote(event)

    # --- refs ----------------------------------------------------------------------------------

    def _ref(self, event: RefChanged) -> None:
        if is_tracking(event.name):
            return  # what was seen at a remote was seen
        row = self._catalog.ref(event.dot, event.name)
        current = None if row is None else row.target
        if current != event.new:
            last = self._catalog.reflog(event.dot, event.name, count=1)
            by = f", moved by {last[0].command} of {last[0].actor}" if last else ""
            raise self.refusal(
                f"{event.name} has moved since: it is at {short(current)}, "
                f"not at {short(event.new)}{by}",
                hint=f"dm reflog {event.name.removeprefix(_BRANCH)} shows how",
                ref=event.name,
                expected=event.new.hex() if event.new else None,
                actual=current.hex() if current else None,
                by=self._operation_of(last[0].seq) if last else None,
            )
        is_branch = event.name.startswith(_BRANCH)
        if event.old is not None and is_branch and self._catalog.is_hollow(event.dot, event.old):
            is_gone = self._catalog.is_forgotten(event.dot, event.old)
            raise self.refusal(
                f"commit {short(event.old)} is gone: gc gave it up"
                if is_gone
                else f"the content of commit {short(event.old)} is not here "
                "(pruned, or never fetched)",
                ref=event.name,
                commit=event.old.hex(),
            )
        self._append(
            RefChanged(
                event.dot,
                event.name,
                event.new,
                event.old,
                self._ref_kind(event),
                f"{self._kind} of {self._meant.command} ({self._meant.first_seq})",
                event.old_origin,
            )
        )

    def _ref_kind(self, event: RefChanged) -> str:
        branch = event.name.removeprefix(_BRANCH)
        if event.old is not None or branch == event.name:
            return self._kind
        if self._is_unmade(event):
            self._unmade.append((event.dot, branch))
        # "delete" says that the tree may go with the branch, should a kill prevent that now.
        return "delete" if (event.dot, branch) in self._dropped_trees else self._kind

    def _is_unmade(self, event: RefChanged) -> bool:
        """Does the branch that `event` made go, rather than become unborn as the current one?

        A redo does again what the user's operation did, whatever kind the undo's event is of.
        """
        if self._kind == "undo":
            return event.kind in _MADE_ON_PURPOSE
        return any(
            isinstance(meant, RefChanged)
            and (meant.dot, meant.name, meant.new) == (event.dot, event.name, None)
            and meant.kind == "delete"
            for meant in self._catalog.events_of(self._meant).events
        )

    def _operation_of(self, seq: int) -> int | None:
        row = self._catalog.operation_with(seq)
        return None if row is None else row.first_seq

    def _branch_rename(self, event: BranchRenamed) -> None:
        if self._catalog.branch(event.dot, event.new) is None:
            raise self.refusal(f"branch {event.new} is gone", ref=_BRANCH + event.new)
        self._append(BranchRenamed(event.dot, event.new, event.old))
        for name in event.strays:
            row = self._catalog.ref(event.dot, name)
            if row is not None and row.origin == event.old:
                self._append(
                    RefChanged(event.dot, name, row.target, row.target, self._kind, "", event.new)
                )

    def _head(self, event: HeadSwitched) -> None:
        head = self._catalog.head(event.dot)
        if head != event.branch:
            raise self.refusal(
                f"the current branch is {head} now, not {event.branch}",
                hint=f"dm checkout {event.branch} first",
                expected=event.branch,
                actual=head,
            )
        if event.old is None:
            raise self.refusal("an older dm did not record the branch that was left")
        self._append(HeadSwitched(event.dot, event.old))

    def _working_saved(self, event: WorkingSaved) -> None:
        current = self._catalog.working(event.dot, event.branch)
        if current != event.commit:
            raise self.refusal(
                f"the uncommitted state of {event.branch} is another one now",
                expected=event.commit.hex(),
                actual=current.hex() if current else None,
            )
        if event.old is None:
            self._append(WorkingDropped(event.dot, event.branch))
        else:
            self._append(WorkingSaved(event.dot, event.branch, event.old, self._kind))

    # --- dots ------------------------------------------------------------------------------------

    def _current_dot(self, event: CurrentDotSwitched) -> None:
        current = self._catalog.current_dot()
        if current != event.dot:
            raise self.refusal(
                "another dot is the current one now",
                expected=event.dot.hex() if event.dot else None,
                actual=current.hex() if current else None,
            )
        self._append(CurrentDotSwitched(event.old))

    def _dot_made(self, dot: DotId) -> None:
        for ref in self._catalog.refs(dot):
            if not is_tracking(ref.name) and not ref.name.startswith("stash/"):
                raise self.refusal(
                    f"the dot has {ref.name} since",
                    ref=ref.name,
                    expected=None,
                    actual=ref.target.hex(),
                    by=self._operation_of(ref.seq),
                )
        self._append(DotDeleted(dot, new_trash(dot)))

    def _dot_rename(self, event: DotRenamed) -> None:
        row = self._catalog.dot(event.dot)
        if event.old is None:
            raise self.refusal("an older dm did not record the former name")
        if row is None or (row.namespace, row.name) != (event.namespace, event.name):
            raise self.refusal(
                "the dot has another name now",
                expected=full_name(event.namespace, event.name),
                actual=None if row is None else full_name(row.namespace, row.name),
            )
        self._append(DotRenamed(event.dot, *event.old))

    def _dot_deleted(self, event: DotDeleted) -> None:
        row = self._catalog.dot(event.dot)
        if row is None:
            raise self.refusal("the dot has been purged", reason="purged", dot=event.dot.hex())
        if row.trash is None:
            raise self.refusal("the dot is back already", dot=event.dot.hex())
        self._append(DotRestored(event.dot, row.namespace, row.name))
        self._attach_again(event.dot, event.old_tree)
        if event.was_current and self._catalog.current_dot() is None:
            self._append(CurrentDotSwitched(event.dot))

    def _quota(self, event: QuotaSet) -> None:
        current = self._catalog.quota(event.namespace)
        if current != event.bytes_max:
            raise self.refusal(
                f"the quota of {event.namespace or 'the owner'} is another one now",
                expected=event.bytes_max,
                actual=current,
            )
        self._append(QuotaSet(event.namespace, event.old))

    # --- attached directories --------------------------------------------------------------------

    def _tree_attached(self, event: TreeAttached) -> None:
        tree = self._catalog.tree(event.dot)
        if tree is None or tree.path != event.path:
            raise self.refusal("the dot's directory is another one now")
        self._append(TreeDetached(event.dot))

    def _attach_again(self, dot: DotId, tree: Tree | None) -> None:
        if tree is None:
            return
        path, as_root, device, inode = tree
        if is_directory(path, device, inode):
            self._append(TreeAttached(dot, path, as_root, device, inode))
        else:
            self.remarks.append(
                f"{os.fsdecode(path)} is not the directory that was attached any more: "
                "the dot comes back without it"
            )

    # --- merges ----------------------------------------------------------------------------------

    def _merge_started(self, event: MergeStarted) -> None:
        merge = self._catalog.merge(event.dot, event.branch)
        if merge is None or (merge.theirs, merge.snapshot) != (event.theirs, event.snapshot):
            raise self.refusal(f"that merge into {event.branch} is over")
        self._append(MergeEnded(event.dot, event.branch, "aborted"))

    def _merge_ended(self, event: MergeEnded) -> None:
        self._append(replace(self._started(event), branch=event.branch))
        for path, how, detail in event.resolutions:
            self._append(ConflictResolved(event.dot, event.branch, path, "open", detail))
            if how != "open":
                self._append(ConflictResolved(event.dot, event.branch, path, how))

    def _started(self, event: MergeEnded) -> MergeStarted:
        row = self._catalog.operation_with(event.started)
        if row is not None:
            found = self._catalog.events_of(row).events[event.started - row.first_seq]
            if isinstance(found, MergeStarted):
                return found
        raise self.refusal("the log does not say which merge it ended")

    def _conflict(self, event: ConflictResolved) -> None:
        if event.old_how is None:
            return
        found = {row.path: row for row in self._catalog.conflicts(event.dot, event.branch)}
        row = found.get(event.path)
        if row is None or (row.resolved or "open") != event.how:
            raise self.refusal(
                f"the conflict in {event.path.decode('utf-8', 'backslashreplace')} "
                "has been decided otherwise since"
            )
        self._append(
            ConflictResolved(event.dot, event.branch, event.path, event.old_how, event.old_detail)
        )

    # --- remotes ---------------------------------------------------------------------------------

    def _take_back_remote(self, event: Event) -> None:
        match event:
            case RemoteAdded():
                remote = self._catalog.remote(event.name)
                if remote is None or (remote.url, remote.dm_command) != (
                    event.url,
                    event.dm_command,
                ):
                    raise self.refusal(f"remote {event.name} is another one now")
                self._append(RemoteRemoved(event.name))
            case RemoteRemoved():
                self._remote_removed(event)
            case RemoteRenamed():
                self._append(RemoteRenamed(event.new, event.old))
            case UpstreamSet():
                is_clone = any(isinstance(e, DotCreated) for e in self._operation.events)
                if is_clone or not talks_to_remote(self._operation):
                    self._upstream_set(event)
            case UpstreamRemoved():
                if event.old is not None:
                    self._append(UpstreamSet(event.dot, event.remote, *event.old))
            case _:
                return  # a fact that stays: commits, signatures, what a remote said

    def _remote_removed(self, event: RemoteRemoved) -> None:
        if event.old_url is None:
            raise self.refusal("an older dm did not record where the remote was")
        self._append(RemoteAdded(event.name, event.old_url, event.old_dm_command))
        for dot, namespace, name in event.old_upstreams:
            if self._is_live(dot):
                self._append(UpstreamSet(dot, event.name, namespace, name))
        for dot, name, target in event.old_refs:
            if self._is_live(dot):
                self._append(RefChanged(dot, name, None, target, self._kind))

    def _upstream_set(self, event: UpstreamSet) -> None:
        current = self._catalog.upstream(event.dot, event.remote)
        if current != (event.namespace, event.name):
            raise self.refusal(
                f"the upstream at {event.remote} is another one now",
                expected=full_name(event.namespace, event.name),
                actual=full_name(*current) if current else None,
            )
        if event.old is None:
            self._append(UpstreamRemoved(event.dot, event.remote))
        else:
            self._append(UpstreamSet(event.dot, event.remote, *event.old))

    def _is_live(self, dot: DotId) -> bool:
        row = self._catalog.dot(dot)
        return row is not None and row.trash is None


def is_directory(path: bytes, device: int, inode: int) -> bool:
    """Is the directory at `path` the one that was attached?"""
    try:
        found = os.stat(path)
    except OSError:
        return False
    return (found.st_dev, found.st_ino) == (device, inode)
