"""What can be asked of the catalog: one question a method, answered by SQL on its projection.

Queries never wait for a writer and never write. Which database answers (the file, or a fold of
the log elsewhere when the file cannot be used) is the business of storage/catalog.py.
"""

from abc import ABC, abstractmethod
from typing import Any, Final, cast

from dmsync.core.encoding import decode
from dmsync.core.ids import ID_BYTES, DotId, Kind, ObjectId, object_id
from dmsync.errors import Corruption, DotNotFound, UsageError
from dmsync.storage.catalog_graph import CatalogGraph
from dmsync.storage.catalog_rows import (
    CommitRow,
    ConflictRow,
    DotRow,
    MergeRow,
    ObservedRow,
    OperationRow,
    ReflogRow,
    RefRow,
    RemoteRow,
    SwitchRow,
    TransferRow,
    TreeRow,
    WorkingRow,
)

PREFIX_MATCHES_MAX: Final = 32


_TIME_OF: Final = (
    "(SELECT time_ns FROM operations WHERE first_seq <= {} ORDER BY first_seq DESC LIMIT 1)"
)
_ID_OF: Final = "COALESCE((SELECT id FROM commits WHERE rid = {0}), {0})"
_DOT_COLUMNS: Final = f"dot, namespace, name, owner, head, {_TIME_OF.format('created_seq')}, trash"
_OPERATION_COLUMNS: Final = (
    "first_seq, first_seq + events - 1, time_ns, op_id, "
    "COALESCE((SELECT text FROM texts WHERE number = command), '?'), "
    "COALESCE((SELECT text FROM texts WHERE number = actor), '?'), segment, record_offset"
)
_TRANSFER_COLUMNS: Final = (
    f"transfer_id, direction, remote, dot, branch, {_TIME_OF.format('started_seq')}, "
    f"CASE WHEN finished_seq IS NULL THEN NULL ELSE {_TIME_OF.format('finished_seq')} END, "
    "status, summary"
)
_NUMBER_OF_DOT: Final = "(SELECT number FROM dots WHERE dot = ?)"
COMMIT_IS: Final = f"c.dot = {_NUMBER_OF_DOT} AND substr(c.id, 1, 8) = substr(?, 1, 8) AND c.id = ?"


class CatalogQueries(ABC):
    """The questions; a subclass says which rows a statement finds."""

    @abstractmethod
    def _rows(self, sql: str, *parameters: object) -> list[Any]: ...

    @abstractmethod
    def _heal(self, reason: str) -> None:
        """Have the projection built anew, since what it says cannot be; within a transaction
        nothing is done."""

    def _row(self, sql: str, *parameters: object) -> Any:
        rows = self._rows(sql, *parameters)
        return rows[0] if rows else None

    def _meta(self, key: str) -> Any:
        row = self._row("SELECT value FROM meta WHERE key = ?", key)
        return row[0] if row else None

    def cluster_id(self) -> bytes:
        """Raises Corruption when the log does not begin with StoreCreated."""
        value = self._meta("cluster_id")
        if value is None:
            raise Corruption("the event log does not begin with the store's creation")
        return cast(bytes, value)

    def epoch(self) -> int:
        return int(self._meta("epoch") or 0)

    def last_seq(self) -> int:
        """Sequence number of the newest event that the projection shows."""
        value = self._meta("position")
        return int(decode(value)[3]) if value is not None else 0

    # --- queries: dots --------------------------------------------------------------------------

    def dots(self, *, include_deleted: bool = False) -> list[DotRow]:
        """By namespace and name."""
        condition = "" if include_deleted else "WHERE trash IS NULL"
        rows = self._rows(
            f"SELECT {_DOT_COLUMNS} FROM dots {condition} ORDER BY namespace, name, number"
        )
        return [DotRow(*row) for row in rows]

    def dot(self, dot: DotId) -> DotRow | None:
        """Also a deleted one (`trash` is set) until it is purged."""
        row = self._row(f"SELECT {_DOT_COLUMNS} FROM dots WHERE dot = ?", dot)
        return DotRow(*row) if row else None

    def dot_by_name(self, namespace: str, name: str) -> DotRow | None:
        row = self._row(
            f"SELECT {_DOT_COLUMNS} FROM dots WHERE namespace = ? AND name = ? AND trash IS NULL",
            namespace,
            name,
        )
        return DotRow(*row) if row else None

    def current_dot(self) -> DotId | None:
        value = self._meta("current_dot")
        return DotId(value) if value is not None else None

    def head(self, dot: DotId) -> str:
        """The dot's current branch. Raises DotNotFound."""
        row = self._row("SELECT head FROM dots WHERE dot = ?", dot)
        if row is None:
            raise DotNotFound(f"no dot with id {dot.hex()}", dot=dot.hex())
        return cast(str, row[0])

    # --- queries: refs --------------------------------------------------------------------------

    def refs(self, dot: DotId, prefix: str = "", *, since_seq: int = 0) -> list[RefRow]:
        """Existing refs whose full name begins with `prefix`, by name; only those changed after
        `since_seq`."""
        rows = self._rows(
            f"SELECT name, {_ID_OF.format('target')}, seq, origin FROM refs "
            f"WHERE dot = {_NUMBER_OF_DOT} AND target IS NOT NULL "
            "AND substr(name, 1, ?) = ? AND seq > ? ORDER BY name",
            dot,
            len(prefix),
            prefix,
            since_seq,
        )
        return [RefRow(*row) for row in rows]

    def ref(self, dot: DotId, name: str) -> RefRow | None:
        """`name` is the full name: `branch/x`, `tag/x`, `remote/R/x`, `stash/x`."""
        row = self._row(
            f"SELECT name, {_ID_OF.format('target')}, seq, origin FROM refs "
            f"WHERE dot = {_NUMBER_OF_DOT} AND name = ? AND target IS NOT NULL",
            dot,
            name,
        )
        return RefRow(*row) if row else None

    def branches(self, dot: DotId) -> list[RefRow]:
        """By name; an unborn branch is none."""
        return self.refs(dot, "branch/")

    def branch(self, dot: DotId, name: str) -> RefRow | None:
        return self.ref(dot, f"branch/{name}")

    def reflog(self, dot: DotId, name: str, *, count: int | None = None) -> list[ReflogRow]:
        """Changes of the ref of this full name, newest first; also of a deleted ref."""
        rows = self._rows(
            f"SELECT l.seq, {_TIME_OF.format('l.seq')}, "
            "(SELECT text FROM texts t, operations o WHERE t.number = o.command "
            " AND o.first_seq <= l.seq ORDER BY o.first_seq DESC LIMIT 1), "
            "(SELECT text FROM texts t, operations o WHERE t.number = o.actor "
            " AND o.first_seq <= l.seq ORDER BY o.first_seq DESC LIMIT 1), "
            f"{_ID_OF.format('l.old')}, {_ID_OF.format('l.new')}, "
            "(SELECT text FROM texts WHERE number = l.kind), COALESCE(l.reason, '') "
            "FROM refs r JOIN reflog l ON l.ref = r.number "
            f"WHERE r.dot = {_NUMBER_OF_DOT} AND r.name = ? ORDER BY l.seq DESC LIMIT ?",
            dot,
            name,
            -1 if count is None else count,
        )
        return [ReflogRow(*row) for row in rows]

    # --- queries: commits -----------------------------------------------------------------------

    def has_commit(self, dot: DotId, commit: ObjectId) -> bool:
        return bool(self._rows(f"SELECT 1 FROM commits c WHERE {COMMIT_IS}", dot, commit, commit))

    def commit(self, dot: DotId, commit: ObjectId, *, is_again: bool = False) -> CommitRow | None:
        """A commit's row. A payload that is not the commit has the catalog built anew.

        Raises:
            Corruption: it is not even then.
        """
        row = self._row(
            f"SELECT c.generation, p.payload, {_TIME_OF.format('p.seq')}, p.capture, p.transfer, "
            "c.is_hollow "
            f"FROM commits c JOIN commit_payloads p ON p.rid = c.rid WHERE {COMMIT_IS}",
            dot,
            commit,
            commit,
        )
        if row is None:
            return None
        generation, payload, learnt_ns, capture, transfer, is_hollow = row
        if not isinstance(payload, bytes) or object_id(Kind.COMMIT, payload) != commit:
            if is_again:
                raise Corruption(
                    f"catalog.sqlite is damaged: its copy of commit {commit.hex()[:12]} is another",
                    hint="dm fsck --repair builds it again from the event log",
                    file="catalog.sqlite",
                    commit=commit.hex(),
                )
            self._heal(f"its copy of commit {commit.hex()[:12]} is another")
            return self.commit(dot, commit, is_again=True)
        return CommitRow(
            commit,
            generation,
            payload,
            learnt_ns,
            decode(capture) if capture is not None else None,
            transfer,
            bool(is_hollow),
        )

    def is_hollow(self, dot: DotId, commit: ObjectId) -> bool:
        """Whether only the record of the commit is here; also True when not even that is."""
        row = self._row(f"SELECT c.is_hollow FROM commits c WHERE {COMMIT_IS}", dot, commit, commit)
        return row is None or bool(row[0])

    def has_hollow_commits(self, dot: DotId) -> bool:
        """Whether some commit of the dot is known by its record alone; one look at an index."""
        return bool(
            self._rows(
                f"SELECT 1 FROM commits WHERE dot = {_NUMBER_OF_DOT} AND is_hollow LIMIT 1", dot
            )
        )

    def hollow_commits(self, dot: DotId) -> list[ObjectId]:
        """Commits known by their record alone. O(commits of the dot)."""
        rows = self._rows(
            f"SELECT id FROM commits WHERE dot = {_NUMBER_OF_DOT} AND is_hollow ORDER BY rid", dot
        )
        return [ObjectId(row[0]) for row in rows]

    def signatures(self, dot: DotId, target: ObjectId) -> list[bytes]:
        """Armoured SSHSIGs over a commit or tag, oldest first."""
        rows = self._rows(
            f"SELECT signature FROM signatures WHERE dot = {_NUMBER_OF_DOT} AND target = ? "
            "ORDER BY seq",
            dot,
            target,
        )
        return [row[0] for row in rows]

    def signed(self, dot: DotId) -> set[ObjectId]:
        """Ids of the commits and tags that have signatures."""
        rows = self._rows(
            f"SELECT DISTINCT target FROM signatures WHERE dot = {_NUMBER_OF_DOT}", dot
        )
        return {ObjectId(row[0]) for row in rows}

    def collaborators(self, dot: DotId) -> list[str]:
        """Users who may read and write the dot beside its owner, by name."""
        return [
            user
            for (user,) in self._rows(
                "SELECT c.user FROM collaborators c JOIN dots d ON d.number = c.dot "
                "WHERE d.dot = ? ORDER BY c.user",
                dot,
            )
        ]

    def is_collaborator(self, user: str, namespace: str, name: str) -> bool:
        """Whether the live dot of that name is shared with the user."""
        row = self._row(
            "SELECT 1 FROM collaborators c JOIN dots d ON d.number = c.dot "
            "WHERE d.namespace = ? AND d.name = ? AND d.trash IS NULL AND c.user = ?",
            namespace,
            name,
            user,
        )
        return row is not None

    def quotas(self) -> list[tuple[str, int]]:
        """(namespace, bytes) of each namespace that has a quota, by name."""
        return self._rows("SELECT namespace, bytes_max FROM quotas ORDER BY namespace")

    def quota(self, namespace: str) -> int | None:
        """How many bytes the namespace's dots may take; None: as many as fit."""
        row = self._row("SELECT bytes_max FROM quotas WHERE namespace = ?", namespace)
        return None if row is None else int(row[0])

    def scope(self, dot: DotId) -> tuple[str, ...] | None:
        """The subdots whose content is kept here; None for all."""
        row = self._row(f"SELECT subdots FROM scopes WHERE dot = {_NUMBER_OF_DOT}", dot)
        return cast(tuple[str, ...], decode(row[0])) if row else None

    def commits_with_prefix(self, dot: DotId, hex_prefix: str) -> list[ObjectId]:
        """Ids beginning with these hex digits, ascending, at most PREFIX_MATCHES_MAX.

        Raises:
            UsageError: not 1 to 64 hex digits.
        """
        digits = 2 * ID_BYTES
        try:
            low = bytes.fromhex(hex_prefix.ljust(digits, "0"))
            high = bytes.fromhex(hex_prefix.ljust(digits, "f"))
        except ValueError as exc:
            raise UsageError("a commit id has hex digits only") from exc
        if not hex_prefix or len(low) != ID_BYTES:
            raise UsageError("a commit id has 64 hex digits")
        rows = self._rows(
            f"SELECT id FROM commits WHERE dot = {_NUMBER_OF_DOT} "
            "AND substr(id, 1, 8) BETWEEN ? AND ? AND id BETWEEN ? AND ? ORDER BY id LIMIT ?",
            dot,
            low[:8],
            high[:8],
            low,
            high,
            PREFIX_MATCHES_MAX,
        )
        return [ObjectId(row[0]) for row in rows]

    def commit_count(self, dot: DotId) -> int:
        """O(commits of the dot), over an index."""
        return int(self._row(f"SELECT count(*) FROM commits WHERE dot = {_NUMBER_OF_DOT}", dot)[0])

    def commit_ids(self, dot: DotId) -> list[ObjectId]:
        """All commits of the dot, parents first. O(commits of the dot)."""
        rows = self._rows(f"SELECT id FROM commits WHERE dot = {_NUMBER_OF_DOT} ORDER BY rid", dot)
        return [ObjectId(row[0]) for row in rows]

    def missing_commits(self, dot: DotId) -> list[ObjectId]:
        """Commits that the log names but whose payload was gone when it was replayed."""
        rows = self._rows(
            f"SELECT id FROM missing_commits WHERE dot = {_NUMBER_OF_DOT} ORDER BY id", dot
        )
        return [ObjectId(row[0]) for row in rows]

    def is_forgotten(self, dot: DotId, commit: ObjectId) -> bool:
        """Did gc give the commit up, and has it not come again?"""
        return bool(
            self._rows(
                f"SELECT 1 FROM forgotten WHERE dot = {_NUMBER_OF_DOT} AND id = ?", dot, commit
            )
        )

    def parents(self, dot: DotId, commit: ObjectId) -> tuple[ObjectId, ...]:
        """In order. Raises RevisionNotFound."""
        return self.graph(dot).parents(commit)

    def graph(self, dot: DotId) -> CatalogGraph:
        """The dot's commits as core.graph.GraphView; caches what it has read, so make a new one
        for each question. Raises DotNotFound."""
        row = self._row("SELECT number FROM dots WHERE dot = ?", dot)
        if row is None:
            raise DotNotFound(f"no dot with id {dot.hex()}", dot=dot.hex())
        return CatalogGraph(self._rows, row[0], self._heal)

    def commit_delta(self, dot: DotId, commit: ObjectId) -> bytes | None:
        """The cached delta against the first parent, as store_commit_delta was given it."""
        row = self._row(
            "SELECT d.delta FROM commits c JOIN commit_deltas d ON d.rid = c.rid "
            f"WHERE {COMMIT_IS}",
            dot,
            commit,
            commit,
        )
        return cast(bytes, row[0]) if row else None

    # --- queries: trees, remotes, transfers, operations -----------------------------------------

    def working(self, dot: DotId, branch: str) -> ObjectId | None:
        """The snapshot of the branch's uncommitted state."""
        row = self._row(
            f"SELECT {_ID_OF.format('target')} FROM working "
            f"WHERE dot = {_NUMBER_OF_DOT} AND branch = ?",
            dot,
            branch,
        )
        return ObjectId(row[0]) if row else None

    def working_snapshots(self, dot: DotId) -> list[WorkingRow]:
        rows = self._rows(
            f"SELECT branch, {_ID_OF.format('target')}, reason, seq FROM working "
            f"WHERE dot = {_NUMBER_OF_DOT} ORDER BY branch",
            dot,
        )
        return [WorkingRow(*row) for row in rows]

    def switches(self, dot: DotId) -> list[SwitchRow]:
        """Trees of the dot, attached or managed, whose switch has not finished."""
        rows = self._rows(
            f"SELECT branch, {_ID_OF.format('from_target')}, {_ID_OF.format('to_target')}, reason "
            f"FROM switches WHERE dot = {_NUMBER_OF_DOT} ORDER BY branch",
            dot,
        )
        return [SwitchRow(*row) for row in rows]

    def tree(self, dot: DotId) -> TreeRow | None:
        """The attached directory; None when the dot's trees are managed."""
        row = self._row(
            f"SELECT path, as_root, device, inode, branch FROM trees WHERE dot = {_NUMBER_OF_DOT}",
            dot,
        )
        if row is None:
            return None
        path, as_root, device, inode, branch = row
        switches = self.switches(dot)
        return TreeRow(
            path,
            bool(as_root),
            int.from_bytes(device, "big"),
            int.from_bytes(inode, "big"),
            branch,
            switches[0] if switches else None,
        )

    def attached_paths(self) -> list[tuple[DotId, bytes]]:
        rows = self._rows(
            "SELECT d.dot, t.path FROM trees t JOIN dots d ON d.number = t.dot ORDER BY t.path"
        )
        return [(DotId(dot), path) for dot, path in rows]

    def merge(self, dot: DotId, branch: str) -> MergeRow | None:
        """What is being merged into the tree of `branch`."""
        row = self._row(
            "SELECT branch, kind, ours, theirs, bases, snapshot, parents, message FROM merges "
            f"WHERE dot = {_NUMBER_OF_DOT} AND branch = ?",
            dot,
            branch,
        )
        if row is None:
            return None
        name, kind, ours, theirs, bases, snapshot, parents, message = row
        return MergeRow(name, kind, ours, theirs, decode(bases), snapshot, decode(parents), message)

    def merges(self, dot: DotId) -> list[MergeRow]:
        """All that are under way in trees of the dot, by branch."""
        rows = self._rows(
            f"SELECT branch FROM merges WHERE dot = {_NUMBER_OF_DOT} ORDER BY branch", dot
        )
        found = [self.merge(dot, branch) for (branch,) in rows]
        return [merge for merge in found if merge is not None]

    def conflicts(self, dot: DotId, branch: str) -> list[ConflictRow]:
        """Of the merge under way, resolved ones too, by path."""
        rows = self._rows(
            "SELECT path, reason, detail, resolved FROM conflicts "
            f"WHERE dot = {_NUMBER_OF_DOT} AND branch = ? ORDER BY path",
            dot,
            branch,
        )
        return [ConflictRow(*row) for row in rows]

    def remotes(self) -> list[RemoteRow]:
        return [
            RemoteRow(*row)
            for row in self._rows("SELECT name, url, dm_command FROM remotes ORDER BY name")
        ]

    def remote(self, name: str) -> RemoteRow | None:
        row = self._row("SELECT name, url, dm_command FROM remotes WHERE name = ?", name)
        return RemoteRow(*row) if row else None

    def upstream(self, dot: DotId, remote: str) -> tuple[str, str] | None:
        """(namespace, name) that the dot has at the remote."""
        row = self._row(
            f"SELECT namespace, name FROM upstreams WHERE dot = {_NUMBER_OF_DOT} AND remote = ?",
            dot,
            remote,
        )
        return (row[0], row[1]) if row else None

    def upstreams(self, dot: DotId) -> list[tuple[str, str, str]]:
        """(remote, namespace, name), by remote."""
        rows = self._rows(
            f"SELECT remote, namespace, name FROM upstreams WHERE dot = {_NUMBER_OF_DOT} "
            "ORDER BY remote",
            dot,
        )
        return [(remote, namespace, name) for remote, namespace, name in rows]

    def observed(self, remote: str, dot: DotId) -> ObservedRow | None:
        row = self._row(
            "SELECT cluster_id, epoch, seq FROM observed WHERE remote = ? AND dot = ?", remote, dot
        )
        return ObservedRow(*row) if row else None

    def transfers(self, count: int | None = None) -> list[TransferRow]:
        """Newest first."""
        rows = self._rows(
            f"SELECT {_TRANSFER_COLUMNS} FROM transfers ORDER BY started_seq DESC LIMIT ?",
            -1 if count is None else count,
        )
        return [_transfer(row) for row in rows]

    def transfer(self, transfer_id: bytes) -> TransferRow | None:
        row = self._row(
            f"SELECT {_TRANSFER_COLUMNS} FROM transfers WHERE transfer_id = ?", transfer_id
        )
        return _transfer(row) if row else None

    def operations(self, count: int | None = None) -> list[OperationRow]:
        """Newest first."""
        rows = self._rows(
            f"SELECT {_OPERATION_COLUMNS} FROM operations ORDER BY first_seq DESC LIMIT ?",
            -1 if count is None else count,
        )
        return [OperationRow(*row) for row in rows]

    def operations_before(self, seq: int, count: int) -> list[OperationRow]:
        """The newest `count` of those that began before event `seq`, newest first."""
        rows = self._rows(
            f"SELECT {_OPERATION_COLUMNS} FROM operations WHERE first_seq < ? "
            "ORDER BY first_seq DESC LIMIT ?",
            seq,
            count,
        )
        return [OperationRow(*row) for row in rows]

    def operations_by(self, command: str) -> list[OperationRow]:
        """Those that `command` made, newest first. O(operations), over small rows."""
        rows = self._rows(
            f"SELECT {_OPERATION_COLUMNS} FROM operations "
            "WHERE command = (SELECT number FROM texts WHERE text = ?) ORDER BY first_seq DESC",
            command,
        )
        return [OperationRow(*row) for row in rows]

    def undoable_operations(self, *, before_seq: int | None, count: int) -> list[OperationRow]:
        """Newest first, those that undo has not taken back and that are none of its own."""
        rows = self._rows(
            f"SELECT {_OPERATION_COLUMNS} FROM operations o WHERE first_seq < ? "
            "AND NOT EXISTS (SELECT 1 FROM undone WHERE operation = o.first_seq) "
            "AND command NOT IN (SELECT number FROM texts WHERE text IN ('undo', 'redo')) "
            "ORDER BY first_seq DESC LIMIT ?",
            2**63 - 1 if before_seq is None else before_seq,
            count,
        )
        return [OperationRow(*row) for row in rows]

    def newest_undos(self, count: int) -> list[tuple[int, int]]:
        """(first sequence number of an operation taken back, seq that says so), newest first."""
        rows = self._rows(
            "SELECT operation, by_seq FROM undone ORDER BY by_seq DESC LIMIT ?", count
        )
        return [(int(operation), int(by_seq)) for operation, by_seq in rows]

    def undone_by(self, operation: int) -> int | None:
        """Seq of the UndoApplied that took back the operation of this first sequence number."""
        row = self._row("SELECT by_seq FROM undone WHERE operation = ?", operation)
        return int(row[0]) if row else None

    def branch_renamed_from(self, dot: DotId, name: str) -> str | None:
        """The branch that was called `name` until it was renamed. O(reflog of the dot)."""
        row = self._row(
            "SELECT substr(r.name, 8) FROM reflog l JOIN refs r ON r.number = l.ref "
            f"WHERE r.dot = {_NUMBER_OF_DOT} AND l.reason = ? AND r.target IS NOT NULL "
            "AND l.kind = (SELECT number FROM texts WHERE text = 'rename') "
            "ORDER BY l.seq DESC LIMIT 1",
            dot,
            f"renamed from {name}",
        )
        return str(row[0]) if row else None

    def undone_operations(self) -> set[int]:
        """First sequence numbers of the operations that undo has taken back."""
        return {int(row[0]) for row in self._rows("SELECT operation FROM undone")}

    def operation_result(self, op_id: bytes) -> OperationRow | None:
        """The operation that was applied under this op_id, if any."""
        row = self._row(f"SELECT {_OPERATION_COLUMNS} FROM operations WHERE op_id = ?", op_id)
        return OperationRow(*row) if row else None

    def operation_with(self, seq: int) -> OperationRow | None:
        """The operation that event `seq` belongs to."""
        row = self._row(
            f"SELECT {_OPERATION_COLUMNS} FROM operations WHERE first_seq <= ? "
            "AND first_seq + events > ? ORDER BY first_seq DESC LIMIT 1",
            seq,
            seq,
        )
        return OperationRow(*row) if row else None


def _transfer(row: tuple[Any, ...]) -> TransferRow:
    summary = decode(row[-1]) if row[-1] is not None else ()
    return TransferRow(*(*row[:-1], summary))
