"""Folding events into the catalog's tables: `apply` is a function of (tables, event) alone.

`check` is what makes an event acceptable now (compare-and-swap, names not taken); it runs before
an event is logged. `apply` runs then and in every replay and must give the same rows each time.
"""

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, assert_never

from dmsync.core.encoding import decode, encode
from dmsync.core.events import (
    BranchRenamed,
    CollaboratorAdded,
    CollaboratorRemoved,
    CommitsAdded,
    CommitsForgotten,
    CommitsListed,
    CommitsThinned,
    ConflictResolved,
    CurrentDotSwitched,
    DotCreated,
    DotDeleted,
    DotPurged,
    DotRenamed,
    DotRestored,
    DotScopeSet,
    EpochStarted,
    Event,
    GarbageCollected,
    HeadSwitched,
    MergeEnded,
    MergeStarted,
    Operation,
    QuotaSet,
    RefChanged,
    RemoteAdded,
    RemoteObserved,
    RemoteRemoved,
    RemoteRenamed,
    SignatureAdded,
    StoreCreated,
    TransferFinished,
    TransferStarted,
    Tree,
    TreeAttached,
    TreeDetached,
    TreeSwitchFinished,
    TreeSwitchStarted,
    UndoApplied,
    UpstreamRemoved,
    UpstreamSet,
    WorkingDropped,
    WorkingSaved,
)
from dmsync.core.ids import DotId, ObjectId
from dmsync.core.names import check_branch_name, check_namespace, check_ref_name
from dmsync.core.objects import tag_from_bytes
from dmsync.errors import (
    AlreadyExists,
    BadObject,
    ContentAbsent,
    Corruption,
    DotIdClash,
    DotNotFound,
    NotFound,
    ObjectMissing,
    RefConflict,
    RemoteNotFound,
)
from dmsync.storage.commit_projection import CommitInsertion, ReadCommit, commit_rid
from dmsync.storage.forgetting import Given, forget_commits, is_forgotten, remember_commits

ReadTag = Callable[[DotId, ObjectId], bytes]
"""Verified payload of an annotated tag from the dot's packs."""

DEFAULT_BRANCH = "master"
_Target = int | bytes | None


class Projection:
    """The tables behind one connection, which has a transaction open while this writes.

    With `is_replay`, commits whose payloads are gone are noted in missing_commits instead of
    stopping the replay.
    """

    def __init__(
        self,
        connection: sqlite3.Connection,
        read_commit: ReadCommit,
        *,
        read_tag: ReadTag | None = None,
        is_replay: bool = False,
        given_up: Given | None = None,
    ) -> None:
        """`given_up`: commits that later events of the replay forget, and dots that they purge: no
        payload of those is asked for."""
        self._db = connection
        self._read_commit = read_commit
        self._read_tag = read_tag
        self._is_replay = is_replay
        self._given_up = given_up or Given()

    @contextmanager
    def savepoint(self) -> Iterator[None]:
        """Undo what the body changed when it raises."""
        self._db.execute("SAVEPOINT event")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK TO event")
            self._db.execute("RELEASE event")
            raise
        self._db.execute("RELEASE event")

    # --- operations -----------------------------------------------------------------------------

    def begin_operation(self, operation: Operation) -> None:
        """Note the operation (its events may still be few); its place in the log comes last."""
        self._db.execute(
            "INSERT INTO operations VALUES (?, ?, ?, ?, ?, ?, 0, 0)",
            (
                operation.first_seq,
                len(operation.events),
                operation.time_ns,
                operation.op_id,
                self._text(operation.command),
                self._text(operation.actor),
            ),
        )

    def end_operation(self, first_seq: int, events: int, segment: int, offset: int) -> None:
        self._db.execute(
            "UPDATE operations SET events = ?, segment = ?, record_offset = ? WHERE first_seq = ?",
            (events, segment, offset, first_seq),
        )

    def apply_operation(self, operation: Operation, segment: int, offset: int) -> None:
        """Replay one operation as the log has it. Raises Corruption when it cannot be."""
        try:
            self.begin_operation(operation)
            for stored in operation.stored_events():
                self.apply(stored.seq, stored.event)
        except (sqlite3.IntegrityError, NotFound) as exc:
            raise Corruption(
                f"event log: operation {operation.first_seq} does not follow from those before",
                seq=operation.first_seq,
            ) from exc
        self.end_operation(operation.first_seq, len(operation.events), segment, offset)

    # --- lookups --------------------------------------------------------------------------------

    def _one(self, sql: str, *parameters: object) -> Any:
        return self._db.execute(sql, parameters).fetchone()

    def _text(self, text: str) -> int:
        row = self._db.execute("SELECT number FROM texts WHERE text = ?", (text,)).fetchone()
        if row is None:
            cursor = self._db.execute("INSERT INTO texts (text) VALUES (?)", (text,))
            assert cursor.lastrowid is not None
            return cursor.lastrowid
        return int(row[0])

    def _dot(self, dot: DotId) -> int:
        """The dot's number, deleted or not. Raises DotNotFound."""
        row = self._db.execute("SELECT number FROM dots WHERE dot = ?", (dot,)).fetchone()
        if row is None:
            raise DotNotFound(f"no dot with id {dot.hex()}", dot=dot.hex())
        return int(row[0])

    def _rid(self, dot_number: int, commit: ObjectId) -> int | None:
        return commit_rid(self._db, dot_number, commit)

    def _target(self, dot_number: int, commit: ObjectId | None) -> _Target:
        if commit is None:
            return None
        rid = self._rid(dot_number, commit)
        return commit if rid is None else rid

    def _id(self, target: _Target) -> ObjectId | None:
        if isinstance(target, int):
            row = self._db.execute("SELECT id FROM commits WHERE rid = ?", (target,)).fetchone()
            return ObjectId(row[0])
        return None if target is None else ObjectId(target)

    # --- checks before logging ------------------------------------------------------------------

    def check(self, event: Event) -> None:
        """Refuse an event that is not acceptable now.

        Raises:
            RefConflict: RefChanged.old is not the current value.
            AlreadyExists, DotIdClash: the name, path, id is taken.
            NotFound: what the event is about is not there.
            InvalidName, ObjectMissing
        """
        match event:
            case StoreCreated():
                if self._one("SELECT 1 FROM meta WHERE key = 'cluster_id'"):
                    raise AlreadyExists("the store has been created already")
            case DotCreated(dot=dot):
                if self._one("SELECT 1 FROM dots WHERE dot = ?", dot):
                    raise DotIdClash(f"dot {dot.hex()} is here already", dot=dot.hex())
                self._check_free(event.namespace, event.name)
            case DotRenamed():
                self._check_live(event.dot)
                self._check_free(event.namespace, event.name)
            case DotRestored():
                self._check_deleted(event.dot)
                self._check_free(event.namespace, event.name)
            case DotPurged():
                self._check_deleted(event.dot)
            case CurrentDotSwitched():
                if event.dot is not None:
                    self._check_live(event.dot)
            case RefChanged():
                self._check_ref_change(event)
            case BranchRenamed():
                self._check_branch_rename(event)
            case TreeAttached():
                self._check_attach(event)
            case TreeDetached():
                number = self._check_live(event.dot)
                if not self._one("SELECT 1 FROM trees WHERE dot = ?", number):
                    raise NotFound("the dot has no attached directory")
            case RemoteAdded():
                self._check_no_remote(event.name)
            case RemoteRemoved():
                self._check_remote(event.name)
            case RemoteRenamed():
                self._check_remote(event.old)
                self._check_no_remote(event.new)
            case UpstreamSet():
                self._check_live(event.dot)
                self._check_remote(event.remote)
            case TransferStarted(transfer_id=transfer):
                if self._one("SELECT 1 FROM transfers WHERE transfer_id = ?", transfer):
                    raise AlreadyExists(f"transfer {transfer.hex()} has started already")
            case TransferFinished(transfer_id=transfer):
                if not self._one("SELECT 1 FROM transfers WHERE transfer_id = ?", transfer):
                    raise NotFound(f"no transfer {transfer.hex()}")
            case CommitsThinned():
                self._check_commits(event)
            case SignatureAdded():
                self._check_live(event.dot)
            case CollaboratorAdded() | CollaboratorRemoved():
                self._check_collaborator(event)
            case MergeStarted():
                self._check_no_merge(event)
                named = (event.ours, event.theirs, *event.bases, event.snapshot)
                self._check_not_forgotten(event.dot, *named)
            case ConflictResolved() | MergeEnded():
                self._check_merge(event)
            case UndoApplied():
                if not self._one("SELECT 1 FROM operations WHERE first_seq = ?", event.operation):
                    raise NotFound(f"no operation {event.operation}")
            case HeadSwitched() | WorkingSaved():
                self._check_live(event.dot)
                check_branch_name(event.branch, made_by_dm=True)
                if isinstance(event, WorkingSaved):
                    self._check_not_forgotten(event.dot, event.commit)
            case TreeSwitchStarted():
                self._check_live(event.dot)
                self._check_not_forgotten(event.dot, event.from_commit, event.to_root_commit)
            case (
                DotDeleted()
                | CommitsAdded()
                | CommitsListed()
                | DotScopeSet()
                | UpstreamRemoved()
                | WorkingDropped()
                | TreeSwitchFinished()
            ):
                self._check_live(event.dot)
            case CommitsForgotten():
                if not self._one("SELECT 1 FROM dots WHERE dot = ?", event.dot):
                    raise DotNotFound(f"no dot with id {event.dot.hex()}", dot=event.dot.hex())
            case EpochStarted() | RemoteObserved() | QuotaSet() | GarbageCollected():
                pass
            case _:
                assert_never(event)

    def _check_live(self, dot: DotId) -> int:
        row = self._db.execute(
            "SELECT number FROM dots WHERE dot = ? AND trash IS NULL", (dot,)
        ).fetchone()
        if row is None:
            raise DotNotFound(f"no dot with id {dot.hex()}", dot=dot.hex())
        return int(row[0])

    def _check_deleted(self, dot: DotId) -> None:
        if not self._one("SELECT 1 FROM dots WHERE dot = ? AND trash IS NOT NULL", dot):
            raise DotNotFound(f"no deleted dot with id {dot.hex()}", dot=dot.hex())

    def _check_free(self, namespace: str, name: str) -> None:
        if self._one(
            "SELECT 1 FROM dots WHERE namespace = ? AND name = ? AND trash IS NULL", namespace, name
        ):
            raise AlreadyExists(f"{name} exists already", namespace=namespace, name=name)

    def _check_remote(self, name: str) -> None:
        if not self._one("SELECT 1 FROM remotes WHERE name = ?", name):
            raise RemoteNotFound(f"no remote {name}", remote=name)

    def _check_no_remote(self, name: str) -> None:
        if self._one("SELECT 1 FROM remotes WHERE name = ?", name):
            raise AlreadyExists(f"remote {name} exists already", remote=name)

    def _check_ref_change(self, event: RefChanged) -> None:
        number = self._check_live(event.dot)
        check_ref_name(event.name)
        row = self._db.execute(
            "SELECT target FROM refs WHERE dot = ? AND name = ?", (number, event.name)
        ).fetchone()
        current = self._id(row[0]) if row else None
        if current != event.old:
            raise RefConflict(
                f"{event.name} has moved",
                hint="look at it and try again",
                ref=event.name,
                expected=event.old.hex() if event.old else None,
                actual=current.hex() if current else None,
            )
        if event.new is None:
            return
        self._check_not_forgotten(event.dot, event.new)
        rid = self._rid(number, event.new)
        if rid is not None:
            self._check_content(event.name, event.new, rid)
            return
        if event.name.startswith("tag/") and self._read_tag is not None:
            self._check_tag(number, event.name, self._read_tag(event.dot, event.new))
        elif event.name.startswith(("branch/", "tag/", "stash/")):
            raise ObjectMissing(
                f"commit {event.new.hex()} is not here", kind="commit", id=event.new.hex()
            )

    def _check_not_forgotten(self, dot: DotId, *commits: ObjectId | None) -> None:
        """What gc gave up can be named again only once it has come again."""
        for commit in commits:
            if commit is not None and is_forgotten(self._db, self._dot(dot), commit):
                raise ObjectMissing(
                    f"commit {commit.hex()[:12]} is gone: gc gave it up",
                    hint="a remote that has it can give it back: dm fetch",
                    kind="commit",
                    id=commit.hex(),
                )

    def _check_content(self, ref: str, commit: ObjectId, rid: int) -> None:
        """Refs name commits whose content is here; those of a remote say what is there."""
        if ref.startswith("remote/"):
            return
        if self._one("SELECT 1 FROM commits WHERE rid = ? AND is_hollow", rid):
            raise ContentAbsent.of_commit(commit)

    def _check_tag(self, number: int, ref: str, payload: bytes) -> None:
        """An annotated tag bears the ref's name and names a commit that is here."""
        tag = tag_from_bytes(payload)
        if ref != f"tag/{tag.name}":
            raise BadObject(f"the tag object of {ref} is called {tag.name}")
        if self._rid(number, tag.target) is None:
            raise ObjectMissing(
                f"{ref} names commit {tag.target.hex()}, which is not here",
                kind="commit",
                id=tag.target.hex(),
            )

    def _check_branch_rename(self, event: BranchRenamed) -> None:
        number = self._check_live(event.dot)
        check_branch_name(event.new)
        exists = "SELECT 1 FROM refs WHERE dot = ? AND name = ? AND target IS NOT NULL"
        is_head = "SELECT 1 FROM dots WHERE number = ? AND head = ?"
        old_exists = self._one(exists, number, f"branch/{event.old}")
        if not old_exists and not self._one(is_head, number, event.old):
            raise NotFound(f"no branch {event.old}", branch=event.old)
        if self._one(exists, number, f"branch/{event.new}") or (
            self._one(is_head, number, event.new)
        ):
            raise AlreadyExists(f"branch {event.new} exists already", branch=event.new)

    def _check_attach(self, event: TreeAttached) -> None:
        number = self._check_live(event.dot)
        if self._one("SELECT 1 FROM trees WHERE dot = ?", number):
            raise AlreadyExists("the dot has an attached directory already")
        if self._one("SELECT 1 FROM trees WHERE path = ?", event.path):
            raise AlreadyExists("the directory is attached to another dot already")

    def _check_commits(self, event: CommitsThinned) -> None:
        number = self._check_live(event.dot)
        for commit in event.commits:
            if self._rid(number, commit) is None:
                raise ObjectMissing(
                    f"commit {commit.hex()} is not here", kind="commit", id=commit.hex()
                )

    def _check_collaborator(self, event: CollaboratorAdded | CollaboratorRemoved) -> None:
        number = self._check_live(event.dot)
        is_shared = self._one(
            "SELECT 1 FROM collaborators WHERE dot = ? AND user = ?", number, event.user
        )
        if isinstance(event, CollaboratorAdded):
            check_namespace(event.user)
            if is_shared:
                raise AlreadyExists(f"{event.user} is a collaborator already", user=event.user)
        elif not is_shared:
            raise NotFound(f"{event.user} is no collaborator of the dot", user=event.user)

    def _check_no_merge(self, event: MergeStarted) -> None:
        number = self._check_live(event.dot)
        if self._one("SELECT 1 FROM merges WHERE dot = ? AND branch = ?", number, event.branch):
            raise AlreadyExists(f"a merge into {event.branch} is under way already")

    def _check_merge(self, event: ConflictResolved | MergeEnded) -> None:
        number = self._check_live(event.dot)
        if not self._one("SELECT 1 FROM merges WHERE dot = ? AND branch = ?", number, event.branch):
            raise NotFound(f"no merge into {event.branch} is under way")

    # --- what an event replaces -----------------------------------------------------------------

    def completed(self, event: Event) -> Event:
        """The event with what it replaces filled in (undo reads it); before it is applied."""
        match event:
            case DotRenamed():
                row = self._one("SELECT namespace, name FROM dots WHERE dot = ?", event.dot)
                return replace(event, old=row)
            case DotDeleted():
                is_current = self._one(
                    "SELECT 1 FROM meta WHERE key = 'current_dot' AND value = ?", event.dot
                )
                tree = self._tree(event.dot)
                return replace(event, was_current=bool(is_current), old_tree=tree)
            case CurrentDotSwitched():
                row = self._one("SELECT value FROM meta WHERE key = 'current_dot'")
                return replace(event, old=row[0] if row else None)
            case HeadSwitched():
                row = self._one("SELECT head FROM dots WHERE dot = ?", event.dot)
                return replace(event, old=row[0] if row else None)
            case RefChanged():
                row = self._one(
                    "SELECT r.origin FROM refs r JOIN dots d ON d.number = r.dot "
                    "WHERE d.dot = ? AND r.name = ?",
                    event.dot,
                    event.name,
                )
                return replace(event, old_origin=row[0] if row else None)
            case WorkingSaved() | WorkingDropped():
                row = self._one(
                    "SELECT w.target FROM working w JOIN dots d ON d.number = w.dot "
                    "WHERE d.dot = ? AND w.branch = ?",
                    event.dot,
                    event.branch,
                )
                return replace(event, old=self._id(row[0]) if row else None)
            case TreeDetached():
                return replace(event, old=self._tree(event.dot))
            case RemoteRemoved():
                return self._completed_removal(event)
            case ConflictResolved():
                row = self._one(
                    "SELECT c.resolved, c.detail FROM conflicts c JOIN dots d "
                    "ON d.number = c.dot WHERE d.dot = ? AND c.branch = ? AND c.path = ?",
                    event.dot,
                    event.branch,
                    event.path,
                )
                how, detail = (row[0] or "open", row[1]) if row else (None, b"")
                return replace(event, old_how=how, old_detail=detail)
            case QuotaSet():
                row = self._one("SELECT bytes_max FROM quotas WHERE namespace = ?", event.namespace)
                return replace(event, old=row[0] if row else None)
            case MergeEnded():
                return self._completed_end(event)
            case DotScopeSet():
                row = self._one(
                    "SELECT s.subdots FROM scopes s JOIN dots d ON d.number = s.dot "
                    "WHERE d.dot = ?",
                    event.dot,
                )
                return replace(event, old=decode(row[0]) if row else None)
            case BranchRenamed():
                strays = self._db.execute(
                    "SELECT r.name FROM refs r JOIN dots d ON d.number = r.dot "
                    "WHERE d.dot = ? AND r.origin = ? ORDER BY r.name",
                    (event.dot, event.new),
                ).fetchall()
                return replace(event, strays=tuple(name for (name,) in strays))
            case UpstreamSet() | UpstreamRemoved():
                row = self._one(
                    "SELECT u.namespace, u.name FROM upstreams u JOIN dots d ON d.number = u.dot "
                    "WHERE d.dot = ? AND u.remote = ?",
                    event.dot,
                    event.remote,
                )
                return replace(event, old=row)
            case _:
                return event

    def _tree(self, dot: DotId) -> Tree | None:
        row = self._db.execute(
            "SELECT t.path, t.as_root, t.device, t.inode FROM trees t "
            "JOIN dots d ON d.number = t.dot WHERE d.dot = ?",
            (dot,),
        ).fetchone()
        if row is None:
            return None
        path, as_root, device, inode = row
        return path, bool(as_root), int.from_bytes(device, "big"), int.from_bytes(inode, "big")

    def _completed_end(self, event: MergeEnded) -> MergeEnded:
        row = self._one(
            "SELECT m.dot, m.seq FROM merges m JOIN dots d ON d.number = m.dot "
            "WHERE d.dot = ? AND m.branch = ?",
            event.dot,
            event.branch,
        )
        if row is None:
            return event
        number, started = row
        resolutions = self._db.execute(
            "SELECT path, COALESCE(resolved, 'open'), detail FROM conflicts "
            "WHERE dot = ? AND branch = ? AND is_touched ORDER BY path",
            (number, event.branch),
        ).fetchall()
        return replace(event, started=started, resolutions=tuple(resolutions))

    def _completed_removal(self, event: RemoteRemoved) -> RemoteRemoved:
        row = self._db.execute(
            "SELECT url, dm_command FROM remotes WHERE name = ?", (event.name,)
        ).fetchone()
        if row is None:
            return event
        upstreams = self._db.execute(
            "SELECT d.dot, u.namespace, u.name FROM upstreams u JOIN dots d ON d.number = u.dot "
            "WHERE u.remote = ? ORDER BY d.dot",
            (event.name,),
        ).fetchall()
        prefix = f"remote/{event.name}/"
        refs = self._db.execute(
            "SELECT d.dot, r.name, r.target FROM refs r JOIN dots d ON d.number = r.dot "
            "WHERE substr(r.name, 1, ?) = ? AND r.target IS NOT NULL ORDER BY d.dot, r.name",
            (len(prefix), prefix),
        ).fetchall()
        targets = [(dot, name, self._id(target)) for dot, name, target in refs]
        return replace(
            event,
            old_url=row[0],
            old_dm_command=row[1],
            old_upstreams=tuple(upstreams),
            old_refs=tuple((dot, name, oid) for dot, name, oid in targets if oid is not None),
        )

    # --- applying -------------------------------------------------------------------------------

    def apply(self, seq: int, event: Event) -> None:
        """Change the tables by one event. Raises DotNotFound, sqlite3.IntegrityError when the
        event does not follow from those before, ObjectMissing (not in a replay)."""
        db = self._db
        match event:
            case StoreCreated():
                self.set_meta("cluster_id", event.cluster_id)
                self.set_meta("epoch", event.epoch)
            case EpochStarted():
                self.set_meta("epoch", event.epoch)
            case DotCreated():
                db.execute(
                    "INSERT INTO dots (dot, namespace, name, owner, head, created_seq) "
                    "VALUES (?, ?, ?, ?, ?, ?)",
                    (event.dot, event.namespace, event.name, event.owner, DEFAULT_BRANCH, seq),
                )
            case DotRenamed():
                db.execute(
                    "UPDATE dots SET namespace = ?, name = ? WHERE number = ?",
                    (event.namespace, event.name, self._dot(event.dot)),
                )
            case DotDeleted():
                self._delete_dot(event)
            case DotRestored():
                db.execute(
                    "UPDATE dots SET namespace = ?, name = ?, trash = NULL WHERE number = ?",
                    (event.namespace, event.name, self._dot(event.dot)),
                )
            case DotPurged():
                self._purge_dot(self._dot(event.dot), event.dot)
            case CurrentDotSwitched():
                self.set_meta("current_dot", event.dot)
            case HeadSwitched():
                db.execute(
                    "UPDATE dots SET head = ? WHERE number = ?",
                    (event.branch, self._dot(event.dot)),
                )
            case CommitsAdded():
                self._add_commits(seq, event)
            case CommitsListed():
                self._add_commits(seq, event)
            case CommitsForgotten():
                if not self._given_up.is_purged_after(seq, event.dot):
                    forget_commits(db, self._dot(event.dot), event.commits)
            case GarbageCollected():
                pass
            case CommitsThinned():
                self._thin_commits(seq, event)
            case DotScopeSet():
                number = self._dot(event.dot)
                db.execute("DELETE FROM scopes WHERE dot = ?", (number,))
                if event.subdots is not None:
                    db.execute("INSERT INTO scopes VALUES (?, ?)", (number, encode(event.subdots)))
            case SignatureAdded():
                db.execute(
                    "INSERT OR IGNORE INTO signatures VALUES (?, ?, ?, ?)",
                    (self._dot(event.dot), event.target, event.signature, seq),
                )
            case CollaboratorAdded():
                db.execute(
                    "INSERT OR REPLACE INTO collaborators VALUES (?, ?, ?)",
                    (self._dot(event.dot), event.user, seq),
                )
            case CollaboratorRemoved():
                db.execute(
                    "DELETE FROM collaborators WHERE dot = ? AND user = ?",
                    (self._dot(event.dot), event.user),
                )
            case QuotaSet():
                self._set_quota(event)
            case RefChanged():
                self._change_ref(seq, event)
            case BranchRenamed():
                self._rename_branch(seq, event)
            case WorkingSaved():
                number = self._dot(event.dot)
                db.execute(
                    "INSERT OR REPLACE INTO working VALUES (?, ?, ?, ?, ?)",
                    (number, event.branch, self._target(number, event.commit), event.reason, seq),
                )
            case WorkingDropped():
                db.execute(
                    "DELETE FROM working WHERE dot = ? AND branch = ?",
                    (self._dot(event.dot), event.branch),
                )
            case TreeAttached():
                self._attach_tree(event)
            case TreeDetached():
                number = self._dot(event.dot)
                db.execute("DELETE FROM trees WHERE dot = ?", (number,))
                db.execute("DELETE FROM switches WHERE dot = ?", (number,))
            case TreeSwitchStarted():
                self._start_switch(seq, event)
            case TreeSwitchFinished():
                number = self._dot(event.dot)
                db.execute(
                    "DELETE FROM switches WHERE dot = ? AND branch = ?", (number, event.branch)
                )
                db.execute("UPDATE trees SET branch = ? WHERE dot = ?", (event.branch, number))
            case MergeStarted():
                self._start_merge(seq, event)
            case ConflictResolved():
                self._resolve_conflict(event)
            case MergeEnded():
                number = self._dot(event.dot)
                for table in ("merges", "conflicts"):
                    db.execute(
                        f"DELETE FROM {table} WHERE dot = ? AND branch = ?", (number, event.branch)
                    )
            case RemoteAdded():
                db.execute(
                    "INSERT INTO remotes VALUES (?, ?, ?)",
                    (event.name, event.url, event.dm_command),
                )
            case RemoteRemoved():
                self._remove_remote(seq, event.name)
            case RemoteRenamed():
                self._rename_remote(event)
            case UpstreamSet():
                db.execute(
                    "INSERT OR REPLACE INTO upstreams VALUES (?, ?, ?, ?)",
                    (self._dot(event.dot), event.remote, event.namespace, event.name),
                )
            case UpstreamRemoved():
                db.execute(
                    "DELETE FROM upstreams WHERE dot = ? AND remote = ?",
                    (self._dot(event.dot), event.remote),
                )
            case UndoApplied():
                if event.is_redo:
                    db.execute("DELETE FROM undone WHERE operation = ?", (event.operation,))
                else:
                    db.execute(
                        "INSERT OR REPLACE INTO undone VALUES (?, ?)", (event.operation, seq)
                    )
            case RemoteObserved():
                db.execute(
                    "INSERT OR REPLACE INTO observed VALUES (?, ?, ?, ?, ?)",
                    (event.remote, event.dot, event.cluster_id, event.epoch, event.seq),
                )
            case TransferStarted():
                db.execute(
                    "INSERT INTO transfers (transfer_id, started_seq, direction, remote, dot, "
                    "branch) VALUES (?, ?, ?, ?, ?, ?)",
                    (
                        event.transfer_id,
                        seq,
                        event.direction,
                        event.remote,
                        event.dot,
                        event.branch,
                    ),
                )
            case TransferFinished():
                db.execute(
                    "UPDATE transfers SET finished_seq = ?, status = ?, summary = ? "
                    "WHERE transfer_id = ?",
                    (seq, event.status, encode(event.summary), event.transfer_id),
                )
            case _:
                assert_never(event)

    def _set_quota(self, event: QuotaSet) -> None:
        self._db.execute("DELETE FROM quotas WHERE namespace = ?", (event.namespace,))
        if event.bytes_max is not None:
            self._db.execute("INSERT INTO quotas VALUES (?, ?)", (event.namespace, event.bytes_max))

    def set_meta(self, key: str, value: object) -> None:
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def _delete_dot(self, event: DotDeleted) -> None:
        number = self._dot(event.dot)
        self._db.execute("UPDATE dots SET trash = ? WHERE number = ?", (event.trash, number))
        # The user's directory is free for another dot at once.
        self._db.execute("DELETE FROM trees WHERE dot = ?", (number,))
        self._db.execute("DELETE FROM switches WHERE dot = ?", (number,))
        self._db.execute(
            "UPDATE meta SET value = NULL WHERE key = 'current_dot' AND value = ?", (event.dot,)
        )

    def _purge_dot(self, number: int, dot: DotId) -> None:
        db = self._db
        db.execute(
            "DELETE FROM reflog WHERE ref IN (SELECT number FROM refs WHERE dot = ?)", (number,)
        )
        of_commit = "IN (SELECT rid FROM commits WHERE dot = ?)"
        db.execute(f"DELETE FROM parents WHERE child {of_commit}", (number,))
        db.execute(f"DELETE FROM commit_payloads WHERE rid {of_commit}", (number,))
        db.execute(f"DELETE FROM commit_deltas WHERE rid {of_commit}", (number,))
        # Commits refer to each other; checked at the end of the transaction only.
        db.execute("PRAGMA defer_foreign_keys = 1")
        for table in (
            "refs",
            "working",
            "trees",
            "switches",
            "upstreams",
            "scopes",
            "signatures",
            "collaborators",
            "merges",
            "conflicts",
            "missing_commits",
            "forgotten",
            "commits",
        ):
            db.execute(f"DELETE FROM {table} WHERE dot = ?", (number,))
        db.execute("DELETE FROM observed WHERE dot = ?", (dot,))
        db.execute("DELETE FROM dots WHERE number = ?", (number,))

    # --- commits --------------------------------------------------------------------------------

    def _add_commits(self, seq: int, event: CommitsAdded | CommitsListed) -> None:
        number = self._dot(event.dot)
        row = self._one("SELECT value FROM meta WHERE key = 'next_rid'")
        rid = int(row[0]) if row else 1
        # Each listed commit uses up a rid, known already or not, so that a replay without the
        # payloads of purged dots numbers the others alike.
        self.set_meta("next_rid", rid + len(event.commits))
        if self._given_up.is_purged_after(seq, event.dot):
            return
        remember_commits(self._db, number, event.commits)
        CommitInsertion(
            self._db,
            self._read_commit,
            number,
            seq,
            event,
            is_replay=self._is_replay,
            given_up=self._given_up.after(seq, event.dot),
        ).insert(rid)

    def _thin_commits(self, seq: int, event: CommitsThinned) -> None:
        if self._given_up.is_purged_after(seq, event.dot):
            return
        number = self._dot(event.dot)
        for commit in event.commits:
            rid = self._rid(number, commit)
            if rid is not None:
                self._db.execute("UPDATE commits SET is_hollow = 1 WHERE rid = ?", (rid,))
                # Deltas of commits whose parent is hollow could not be computed again.
                self._db.execute("DELETE FROM commit_deltas WHERE rid = ?", (rid,))

    # --- refs -----------------------------------------------------------------------------------

    def _ref(self, number: int, name: str, seq: int) -> int:
        row = self._db.execute(
            "SELECT number FROM refs WHERE dot = ? AND name = ?", (number, name)
        ).fetchone()
        if row is not None:
            return int(row[0])
        cursor = self._db.execute(
            "INSERT INTO refs (dot, name, seq) VALUES (?, ?, ?)", (number, name, seq)
        )
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def _note_in_reflog(
        self, ref: int, seq: int, old: _Target, new: _Target, kind: str, reason: str
    ) -> None:
        self._db.execute(
            "INSERT INTO reflog VALUES (?, ?, ?, ?, ?, ?)",
            (ref, seq, old, new, self._text(kind), reason or None),
        )

    def _change_ref(self, seq: int, event: RefChanged) -> None:
        number = self._dot(event.dot)
        ref = self._ref(number, event.name, seq)
        old, new = self._target(number, event.old), self._target(number, event.new)
        # A deleted ref keeps its row: its reflog shows what undo can bring back.
        self._db.execute(
            "UPDATE refs SET target = ?1, seq = ?2, "
            "origin = CASE WHEN ?1 IS NULL THEN NULL ELSE COALESCE(?3, origin) END "
            "WHERE number = ?4",
            (new, seq, event.origin, ref),
        )
        self._note_in_reflog(ref, seq, old, new, event.kind, event.reason)

    def _move_ref(self, number: int, old: str, new: str, seq: int | None) -> int | None:
        """Give a ref's row another name, together with its reflog; the other's reflog joins it."""
        row = self._db.execute(
            "SELECT number FROM refs WHERE dot = ? AND name = ?", (number, old)
        ).fetchone()
        if row is None:
            return None
        ref = int(row[0])
        gone = self._db.execute(
            "SELECT number FROM refs WHERE dot = ? AND name = ?", (number, new)
        ).fetchone()
        if gone is not None:
            self._db.execute("UPDATE reflog SET ref = ? WHERE ref = ?", (ref, gone[0]))
            self._db.execute("DELETE FROM refs WHERE number = ?", (gone[0],))
        self._db.execute(
            "UPDATE refs SET name = ?, seq = COALESCE(?, seq) WHERE number = ?", (new, seq, ref)
        )
        return ref

    def _rename_branch(self, seq: int, event: BranchRenamed) -> None:
        number = self._dot(event.dot)
        names = (event.new, number, event.old)
        ref = self._move_ref(number, f"branch/{event.old}", f"branch/{event.new}", seq)
        if ref is not None:
            row = self._db.execute("SELECT target FROM refs WHERE number = ?", (ref,)).fetchone()
            reason = f"renamed from {event.old}"
            self._note_in_reflog(ref, seq, row[0], row[0], "rename", reason)
        self._db.execute("UPDATE refs SET origin = ? WHERE dot = ? AND origin = ?", names)
        self._db.execute("UPDATE dots SET head = ? WHERE number = ? AND head = ?", names)
        self._db.execute("UPDATE trees SET branch = ? WHERE dot = ? AND branch = ?", names)
        for table in ("working", "switches", "merges", "conflicts"):
            self._db.execute(
                f"DELETE FROM {table} WHERE dot = ? AND branch = ?", (number, event.new)
            )
            self._db.execute(f"UPDATE {table} SET branch = ? WHERE dot = ? AND branch = ?", names)

    # --- trees ----------------------------------------------------------------------------------

    def _attach_tree(self, event: TreeAttached) -> None:
        number = self._dot(event.dot)
        (head,) = self._db.execute("SELECT head FROM dots WHERE number = ?", (number,)).fetchone()
        # Device and inode are unsigned 64 bit, SQLite's integers are signed.
        device, inode = event.device.to_bytes(8, "big"), event.inode.to_bytes(8, "big")
        self._db.execute(
            "INSERT INTO trees VALUES (?, ?, ?, ?, ?, ?)",
            (number, event.path, int(event.as_root), device, inode, head),
        )

    def _start_merge(self, seq: int, event: MergeStarted) -> None:
        number = self._dot(event.dot)
        self._db.execute(
            "INSERT INTO merges VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                number,
                event.branch,
                event.kind,
                event.ours,
                event.theirs,
                encode(event.bases),
                event.snapshot,
                encode(event.parents),
                event.message,
                seq,
            ),
        )
        self._db.executemany(
            "INSERT OR REPLACE INTO conflicts VALUES (?, ?, ?, ?, ?, NULL, 0)",
            [(number, event.branch, *conflict) for conflict in event.conflicts],
        )

    def _resolve_conflict(self, event: ConflictResolved) -> None:
        key = (self._dot(event.dot), event.branch, event.path)
        if event.how == "open":
            self._db.execute(
                "UPDATE conflicts SET resolved = NULL, detail = ?, is_touched = 1 "
                "WHERE dot = ? AND branch = ? AND path = ?",
                (event.detail, *key),
            )
            return
        self._db.execute(
            "UPDATE conflicts SET resolved = ?, is_touched = 1 "
            "WHERE dot = ? AND branch = ? AND path = ?",
            (event.how, *key),
        )

    def _start_switch(self, seq: int, event: TreeSwitchStarted) -> None:
        number = self._dot(event.dot)
        if self._one("SELECT 1 FROM trees WHERE dot = ?", number):
            # One directory: a new switch replaces one that was never finished.
            self._db.execute("DELETE FROM switches WHERE dot = ?", (number,))
        self._db.execute(
            "INSERT OR REPLACE INTO switches VALUES (?, ?, ?, ?, ?, ?)",
            (
                number,
                event.branch,
                self._target(number, event.from_commit),
                self._target(number, event.to_root_commit),
                event.reason,
                seq,
            ),
        )

    # --- remotes --------------------------------------------------------------------------------

    def _tracking_refs(self, remote: str) -> list[tuple[int, str, int, _Target]]:
        """(dot number, name, ref number, target) of all refs `remote/REMOTE/...`."""
        prefix = f"remote/{remote}/"
        rows: list[tuple[int, str, int, _Target]] = self._db.execute(
            "SELECT dot, name, number, target FROM refs "
            "WHERE substr(name, 1, ?) = ? ORDER BY number",
            (len(prefix), prefix),
        ).fetchall()
        return rows

    def _remove_remote(self, seq: int, name: str) -> None:
        for _, _, ref, target in self._tracking_refs(name):
            if target is not None:
                self._note_in_reflog(ref, seq, target, None, "delete", "remote removed")
                self._db.execute(
                    "UPDATE refs SET target = NULL, origin = NULL, seq = ? WHERE number = ?",
                    (seq, ref),
                )
        self._db.execute("DELETE FROM remotes WHERE name = ?", (name,))
        self._db.execute("DELETE FROM upstreams WHERE remote = ?", (name,))
        self._db.execute("DELETE FROM observed WHERE remote = ?", (name,))

    def _rename_remote(self, event: RemoteRenamed) -> None:
        old_prefix, new_prefix = f"remote/{event.old}/", f"remote/{event.new}/"
        for number, name, _, _ in self._tracking_refs(event.old):
            self._move_ref(number, name, new_prefix + name.removeprefix(old_prefix), None)
        names = (event.new, event.old)
        self._db.execute("UPDATE remotes SET name = ? WHERE name = ?", names)
        for table in ("upstreams", "observed"):
            self._db.execute(f"DELETE FROM {table} WHERE remote = ?", (event.new,))
            self._db.execute(f"UPDATE {table} SET remote = ? WHERE remote = ?", names)
