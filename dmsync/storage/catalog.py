"""The catalog: every question about a store, answered from a projection of the event log.

The log is the truth; `catalog.sqlite` can be dropped at any time and is rebuilt by replaying it.
Queries never wait for a writer and never write. A projection that is behind (its writer died
between log and projection) is caught up by whoever gets the log lock; a reader that finds the
lock taken reads what is there, for the holder is catching up itself (protocol/STORE.md 5).

On a full disk or a read-only filesystem queries go on: the file is read as it lies there, or
folded anew outside the store when it is not all there is.
"""

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, NoReturn, Self, cast

from dmsync.core.encoding import decode, encode
from dmsync.core.events import (
    UNIQUE_ID_BYTES,
    CommitsForgotten,
    DotPurged,
    EpochStarted,
    Event,
    Operation,
    event_to_value,
)
from dmsync.core.ids import DotId, ObjectId
from dmsync.errors import (
    BadObject,
    Busy,
    Corruption,
    StorageFailed,
    StorageFull,
    UsageError,
)
from dmsync.storage import schema
from dmsync.storage.catalog_graph import CatalogGraph
from dmsync.storage.catalog_queries import COMMIT_IS, CatalogQueries
from dmsync.storage.catalog_rows import (
    CommitRow,
    DotRow,
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
from dmsync.storage.commit_projection import ReadCommit
from dmsync.storage.durable import (
    fsync_directory,
    make_directory_durable,
    remove_if_there,
    storage_errors,
)
from dmsync.storage.event_log import START, EventLog, Position, segment_name
from dmsync.storage.forgetting import Given
from dmsync.storage.layout import Layout, open_store
from dmsync.storage.locks import FileLock
from dmsync.storage.projections import Projection, ReadTag

if TYPE_CHECKING:
    from tempfile import TemporaryDirectory

__all__ = [
    "Catalog",
    "CatalogGraph",
    "CommitRow",
    "DotRow",
    "ObservedRow",
    "OperationRow",
    "PastCatalog",
    "RefRow",
    "ReflogRow",
    "RemoteRow",
    "SwitchRow",
    "Transaction",
    "TransferRow",
    "TreeRow",
    "WorkingRow",
]

LOCK_WAIT_S_DEFAULT: Final = 10.0
CHECKPOINT_WAL_BYTES: Final = 4 * 1024 * 1024


_transaction_locks: dict[str, threading.Lock] = {}
"""Per store: threads of one process queue here instead of polling the file lock."""
_transaction_locks_guard: Final = threading.Lock()


def _transaction_lock(home: str) -> threading.Lock:
    with _transaction_locks_guard:
        return _transaction_locks.setdefault(os.path.realpath(home), threading.Lock())


_REBUILD_HINT: Final = "dm fsck --repair builds it again from the event log"


class _Unusable(Corruption):
    """The database file is missing, damaged, of another schema, or not of this log. Met here, where
    it is built again; what that does not help against (a disk that cannot be read) is told."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason, hint=_REBUILD_HINT)
        self.message = f"catalog.sqlite cannot be used: {reason}"


_DAMAGED: Final = frozenset((sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB))


def _is_damage(error: sqlite3.Error) -> bool:
    code = getattr(error, "sqlite_errorcode", None)
    text = str(error) if isinstance(error, sqlite3.OperationalError) else ""
    is_wrong = "no such" in text or "decode to UTF-8" in text
    return (code is not None and code & 0xFF in _DAMAGED) or is_wrong


class Transaction:
    """One operation being put together; see Catalog.transaction."""

    def __init__(
        self, projection: Projection, operation: Operation, already_applied: OperationRow | None
    ) -> None:
        self._projection = projection
        self._operation = operation
        self._events: list[Event] = []
        self.already_applied = already_applied
        """The operation of the same op_id, when this is a retry: appending does nothing."""

    @property
    def op_id(self) -> bytes:
        return self._operation.op_id

    @property
    def time_ns(self) -> int:
        """When this store learns of what is appended."""
        return self._operation.time_ns

    @property
    def is_empty(self) -> bool:
        return not self._events

    def append(self, event: Event) -> int:
        """Add an event; queries of this thread see its effect at once. Returns its seq.

        Raises:
            RefConflict: RefChanged.old is not the ref's value.
            ObjectMissing: a commit or its parent is not in the dot's packs.
            AlreadyExists, NotFound, InvalidName, BadObject: the event is not acceptable; what was
                appended before stays, if the caller goes on.
        """
        seq = self._operation.first_seq + len(self._events)
        if self.already_applied is not None:
            return self.already_applied.last_seq
        event_to_value(event)
        with self._projection.savepoint():
            self._projection.check(event)
            event = self._projection.completed(event)
            if not self._events:
                self._projection.begin_operation(self._operation)
            self._projection.apply(seq, event)
        self._events.append(event)
        return seq

    def finished(self) -> Operation:
        return replace(self._operation, events=tuple(self._events))


class Catalog(CatalogQueries):
    """One store's catalog: its database, its transactions, and (CatalogQueries) all questions.

    Safe to share between threads."""

    def __init__(
        self,
        layout: Layout,
        read_commit: ReadCommit,
        *,
        read_tag: ReadTag | None = None,
        lock_wait_s: float = LOCK_WAIT_S_DEFAULT,
        clock_ns: Callable[[], int] | None = None,
    ) -> None:
        """Opens nothing; use Catalog.open."""
        self.layout = layout
        self.lock_wait_s = lock_wait_s
        self._read_commit = read_commit
        self._read_tag = read_tag
        self._clock_ns = clock_ns or time.time_ns
        self._path = layout.catalog_file
        self._log = EventLog(layout.events_dir)
        self._thread_lock = _transaction_lock(layout.home)
        self._local = threading.local()
        self._connections: list[sqlite3.Connection] = []
        self._connections_guard = threading.Lock()
        self._elsewhere: Catalog | None = None
        """Answers instead of this one while its file cannot be used and not be written."""
        self._elsewhere_guard = threading.Lock()
        self._scratch: list[tuple[Catalog, TemporaryDirectory[str]]] = []
        self.rebuilt_because: str | None = None
        """Why this object had to rebuild the projection, for fsck and logs."""

    @classmethod
    def open(
        cls,
        home: str | Layout,
        read_commit: ReadCommit,
        *,
        read_tag: ReadTag | None = None,
        lock_wait_s: float = LOCK_WAIT_S_DEFAULT,
        clock_ns: Callable[[], int] | None = None,
    ) -> Self:
        """Open a store's catalog, caught up with the log.

        `read_commit(dot, id)` reads a commit's payload from the dot's packs, `read_tag` that of an
        annotated tag; without it tags can name commits only.

        Raises:
            StoreNotFound, FormatUnsupported, AccessDenied, Corruption
            Busy: the projection must be rebuilt and a writer holds the log lock.
        """
        layout = home if isinstance(home, Layout) else open_store(home)
        catalog = cls(
            layout, read_commit, read_tag=read_tag, lock_wait_s=lock_wait_s, clock_ns=clock_ns
        )
        try:
            catalog.refresh()
        except BaseException:
            catalog.close()
            raise
        return catalog

    @classmethod
    def folded_at(
        cls, path: str, layout: Layout, read_commit: ReadCommit, *, up_to: int | None = None
    ) -> Self:
        """The same log folded into a new file at `path`, for queries only. Takes no lock and
        writes nothing into the store.

        With `up_to`, as the operation with the event of that sequence number left it.

        Raises:
            Corruption, StorageFull, StorageFailed
        """
        there = Layout(layout.home)
        there.catalog_file = path
        catalog = cls(there, read_commit)
        catalog._build(path, settle_end=False, up_to=up_to)
        return catalog

    def close(self) -> None:
        """Close the connections of all threads; the catalog may not be used any more."""
        with self._connections_guard:
            connections, self._connections = self._connections, []
        for connection in connections:
            connection.close()
        self._local = threading.local()
        self._elsewhere = None
        while self._scratch:
            catalog, directory = self._scratch.pop()
            catalog.close()
            directory.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # --- connections ----------------------------------------------------------------------------

    def _reader(self) -> sqlite3.Connection:
        """This thread's reading connection; inside a transaction the writing one."""
        writing: sqlite3.Connection | None = getattr(self._local, "writing", None)
        if writing is not None:
            return writing
        elsewhere = self._elsewhere
        if elsewhere is not None:
            return elsewhere._reader()
        identity = self._file_identity()
        connection: sqlite3.Connection | None = getattr(self._local, "reader", None)
        if connection is not None:
            if self._local.identity == identity and not self._has_thawed(connection):
                return connection
            self._local.reader = None
            self._forget(connection)  # the file has been replaced by a rebuilt one, or written
        try:
            connection = self._connect(read_only=True)
        except (StorageFull, StorageFailed) as exc:
            return self._fold_elsewhere(exc)._reader()
        self._local.reader = connection
        self._local.identity = identity
        return connection

    def _has_thawed(self, connection: sqlite3.Connection) -> bool:
        """Was a database written that we opened as one nobody can write?"""
        if not isinstance(connection, schema.FrozenConnection):
            return False
        return connection.fingerprint != schema.fingerprint(self._path)

    def _fold_elsewhere(self, reason: StorageFull | StorageFailed) -> "Catalog":
        """Have queries answered from a fold of the log in the system's temporary directory.

        Raises:
            StorageFull, StorageFailed: `reason`, when that is impossible too.
            Corruption
        """
        from tempfile import TemporaryDirectory  # rarely needed, and slow to import

        with self._elsewhere_guard:
            if self._elsewhere is None:
                try:
                    with storage_errors("making a temporary directory"):
                        directory = TemporaryDirectory(prefix="dmsync-")
                    path = os.path.join(directory.name, "catalog.sqlite")
                    catalog = Catalog.folded_at(path, self.layout, self._read_commit)
                except (StorageFull, StorageFailed):
                    raise reason from None
                self._scratch.append((catalog, directory))
                self._elsewhere = catalog
            return self._elsewhere

    def _file_identity(self) -> tuple[int, int]:
        try:
            status = os.stat(self._path)
        except FileNotFoundError as exc:
            raise _Unusable("it is missing") from exc
        return status.st_dev, status.st_ino

    def _connect(self, *, read_only: bool, is_believed: bool = False) -> sqlite3.Connection:
        """Connect to the file now in place, which has a schema of ours and, unless it is believed
        all the same, names that are what was stored. Raises _Unusable."""
        for _ in range(8):
            identity = self._file_identity()
            try:
                connection, version = self._open(read_only=read_only)
                are_sound = is_believed or version != schema.SCHEMA_VERSION
                are_sound = are_sound or schema.names_are_sound(connection)
            except sqlite3.Error as exc:
                if _is_damage(exc):
                    raise _Unusable(f"it is damaged: {exc}") from exc
                raise self._translated(exc) from exc
            if version != schema.SCHEMA_VERSION:
                connection.close()
                raise _Unusable(f"it has schema {version}")
            if not are_sound:
                connection.close()
                raise _Unusable("it is damaged: its names are not those that were stored")
            if self._file_identity() == identity:
                with self._connections_guard:
                    self._connections.append(connection)
                return connection
            connection.close()
        raise StorageFailed("catalog.sqlite is being replaced again and again")

    def _open(self, *, read_only: bool) -> tuple[sqlite3.Connection, int]:
        """A connection and the schema's version. Raises sqlite3.Error, StorageFailed."""
        connection: sqlite3.Connection | None = None
        try:
            connection = schema.connect(self._path, read_only=read_only)
            return connection, _version(connection)
        except sqlite3.Error as exc:
            if connection is not None:
                connection.close()
            if not (read_only and schema.is_unwritable(exc)):
                raise
            try:
                connection = schema.connect_frozen(self._path)
            except FileNotFoundError:
                connection = None
            if connection is None:
                raise
        try:
            return connection, _version(connection)
        except BaseException:
            connection.close()
            raise

    def _forget(self, connection: sqlite3.Connection) -> None:
        with self._connections_guard:
            if connection in self._connections:
                self._connections.remove(connection)
        connection.close()

    # --- catching up ----------------------------------------------------------------------------

    def refresh(self) -> None:
        """Bring the projection up to the log if it is behind; see the module's text for when a
        reader waits. Cheap when there is nothing to do.

        Raises:
            Busy: it must be rebuilt and a writer holds the log lock too long.
        """
        elsewhere = self._elsewhere
        if elsewhere is not None and elsewhere._is_current():
            return
        self._elsewhere = None  # others may still be asking it: it is closed at the end
        try:
            self._refresh()
        except (StorageFull, StorageFailed) as exc:
            self._fold_elsewhere(exc)

    def _is_current(self) -> bool:
        position = self._position(self._reader())
        return self._log.holds(position) and not self._log.reaches_past(position)

    def _refresh(self) -> None:
        try:
            position = self._position(self._reader())
            if self._log.holds(position) and not self._log.reaches_past(position):
                return
            wait_s = 0.0 if self._log.holds(position) else self.lock_wait_s
        except _Unusable:
            wait_s = self.lock_wait_s
        try:
            with self._locked(wait_s):
                self._catch_up_locked()
        except Busy:
            if wait_s > 0:
                raise

    @contextmanager
    def _locked(self, wait_s: float) -> Iterator[None]:
        """Hold the log lock. Raises Busy."""
        if getattr(self._local, "writing", None) is not None:
            raise AssertionError("transactions do not nest")
        deadline = time.monotonic() + wait_s
        if not self._thread_lock.acquire(timeout=max(wait_s, 0)):
            raise Busy("the event log is in use by this process", hint="try again")
        try:
            remaining_s = max(0.0, deadline - time.monotonic())
            with FileLock(self.layout.log_lock_file, what="the event log", wait_s=remaining_s):
                yield
        finally:
            self._thread_lock.release()

    @property
    def is_in_transaction(self) -> bool:
        """Is this thread inside a transaction, and so has the log's lock?"""
        return getattr(self._local, "writing", None) is not None

    def _position(self, connection: sqlite3.Connection) -> Position:
        """How far the projection has got. Raises _Unusable."""
        try:
            row = connection.execute("SELECT value FROM meta WHERE key = 'position'").fetchone()
        except sqlite3.Error as exc:
            if _is_damage(exc):
                raise _Unusable(f"it is damaged: {exc}") from exc
            raise self._translated(exc) from exc
        if row is None:
            raise _Unusable("it is incomplete")
        try:
            segment, record_offset, end_offset, last_seq, chain_hash = decode(row[0])
        except (BadObject, Corruption, TypeError, ValueError) as exc:
            raise _Unusable("it is damaged") from exc
        return Position(segment, record_offset, end_offset, last_seq, chain_hash)

    def _catch_up_locked(self) -> Position:
        """Under the log lock: the projection equals the log on return."""
        self.layout.read_format().check(writing=True)
        try:
            connection = self._connect(read_only=False)
            try:
                position = self._position(connection)
                if not self._log.holds(position):
                    raise _Unusable("it is not of this log")
                if not self._log.reaches_past(position):
                    return position
                return self._replay(connection, position)
            finally:
                self._forget(connection)
        except _Unusable as exc:
            return self._rebuild_locked(str(exc))
        except sqlite3.Error as exc:
            if not _is_damage(exc):
                raise self._translated(exc) from exc
            return self._rebuild_locked(f"it is damaged: {exc}")

    def _replay(
        self,
        connection: sqlite3.Connection,
        after: Position,
        *,
        settle_end: bool = True,
        up_to: int | None = None,
    ) -> Position:
        """Apply what the log has after a position, in one SQL transaction. With `settle_end`
        the log's end is put in order, which needs the log lock; with `up_to` all later events
        are left out."""
        given_up = Given()
        for operation, _ in self._log.read(after):
            for seq, event in enumerate(operation.events, operation.first_seq):
                if isinstance(event, DotPurged | CommitsForgotten):
                    given_up.note(seq, event)
        projection = Projection(connection, self._read_commit, is_replay=True, given_up=given_up)
        position = after
        operations = self._log.recover(after) if settle_end else self._log.read(after)
        connection.execute("BEGIN IMMEDIATE")
        try:
            for operation, end in operations:
                if up_to is not None and operation.first_seq > up_to:
                    break
                position = end
                projection.apply_operation(operation, position.segment, position.record_offset)
            _store_position(projection, position)
            projection.set_meta(schema.NAMES_KEY, schema.digest_of_names(connection))
            connection.execute("COMMIT")
        except BaseException:
            _roll_back(connection)
            raise
        return position

    def rebuild(self) -> None:
        """Replace the projection by a replay of the whole log (fsck, after repairs).

        Raises:
            Busy, Corruption, StorageFull, StorageFailed
        """
        with self._locked(self.lock_wait_s):
            self._rebuild_locked("asked for")

    def _rebuild_locked(self, reason: str) -> Position:
        if not self._log.segments():
            raise Corruption(
                "the event log is gone: there is no segment in events",
                hint="restore the events directory from a backup, or run: dm fsck --repair",
                segment=segment_name(1),
            )
        was_ahead = self._projection_was_ahead()
        if was_ahead:
            self._keep_aside()
        self.rebuilt_because = reason
        fresh = f"{self._path}.new"
        for suffix in ("", "-wal", "-shm", "-journal"):
            remove_if_there(fresh + suffix)
        position = self._build(fresh)
        if was_ahead:
            self._log.note_lost_end(self._lost_end(fresh))
        with storage_errors("replacing catalog.sqlite"):
            # A WAL belongs to the database by its name: the old one must not meet the new file.
            for suffix in ("-wal", "-shm"):
                remove_if_there(self._path + suffix)
            os.rename(fresh, self._path)
        fsync_directory(self.layout.home)
        return self._start_epoch(position) if was_ahead else position

    def _projection_was_ahead(self) -> bool:
        """Whether the old file knew events that the log no longer has."""
        try:
            connection = self._connect(read_only=True, is_believed=True)
        except (_Unusable, StorageFailed):
            return False
        try:
            position = self._position(connection)
            return not self._log.holds(position)
        except _Unusable:
            return False
        finally:
            self._forget(connection)

    def _keep_aside(self) -> None:
        """Copy a catalog that knows more than the log into `damaged`, for a repair to put back
        what it knows. One that cannot be copied is of no use there either."""
        kept = os.path.join(self.layout.home, "damaged")
        make_directory_durable(kept)
        number = 1
        while os.path.lexists(path := os.path.join(kept, f"catalog-{number}.sqlite")):
            number += 1
        try:
            known = self._connect(read_only=True, is_believed=True)
            try:
                with closing(sqlite3.connect(path)) as copy:
                    known.backup(copy)
                os.chmod(path, 0o600)
            finally:
                self._forget(known)
        except (_Unusable, sqlite3.Error):
            remove_if_there(path)
            return
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        fsync_directory(kept)

    def _lost_end(self, fresh: str) -> str:
        """Which operations the old file knew and the log no longer has, for the user."""
        lost: list[tuple[int, int]] = []
        newest_first = (
            "SELECT op_id, first_seq + events - 1, time_ns FROM operations ORDER BY first_seq DESC"
        )
        is_kept = "SELECT 1 FROM operations WHERE op_id = ?"
        try:
            known = self._connect(read_only=True, is_believed=True)
            try:
                with closing(sqlite3.connect(fresh)) as kept:
                    for op_id, last_seq, time_ns in known.execute(newest_first):
                        if kept.execute(is_kept, (op_id,)).fetchone():
                            break
                        lost.append((last_seq, time_ns))
            finally:
                self._forget(known)
        except (_Unusable, StorageFull, StorageFailed, sqlite3.Error):
            pass  # how many they were is not known, and that they are gone must be told anyway
        if not lost:
            return "the log lost its end: operations that were done are gone"
        count = "1 operation" if len(lost) == 1 else f"{len(lost)} operations"
        return (
            f"the log lost its end: {count} since {_utc(lost[-1][1])}, up to event {lost[0][0]}, "
            "were done and are gone"
        )

    def _build(self, path: str, *, settle_end: bool = True, up_to: int | None = None) -> Position:
        connection = sqlite3.connect(path, isolation_level=None)
        try:
            # Nobody reads it before the rename, and a cut build is thrown away.
            connection.execute("PRAGMA journal_mode = OFF")
            connection.execute("PRAGMA synchronous = OFF")
            connection.executescript(schema.SCHEMA)
            connection.execute(f"PRAGMA user_version = {schema.SCHEMA_VERSION}")
            position = self._replay(connection, START, settle_end=settle_end, up_to=up_to)
            connection.execute("PRAGMA synchronous = FULL")
            (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
            if mode != "wal":
                raise StorageFailed("SQLite cannot use a WAL on this filesystem")
            # A last write through the WAL makes closing checkpoint, and so sync, the whole file.
            connection.execute("UPDATE meta SET value = value WHERE key = 'position'")
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        except sqlite3.Error as exc:
            raise self._translated(exc) from exc
        finally:
            connection.close()
        os.chmod(path, 0o600)
        return position

    def _start_epoch(self, position: Position) -> Position:
        """Sequence numbers that peers may have seen will be given out again: say so."""
        operation = Operation(
            position.last_seq + 1,
            self._clock_ns(),
            os.urandom(UNIQUE_ID_BYTES),
            "recover",
            "",
            (EpochStarted(int.from_bytes(os.urandom(8), "big") >> 1),),
        )
        self._log.append(operation, position)
        connection = self._connect(read_only=False)
        try:
            return self._replay(connection, position)
        finally:
            self._forget(connection)

    # --- transactions ---------------------------------------------------------------------------

    @contextmanager
    def transaction(
        self, command: str, actor: str, op_id: bytes | None = None
    ) -> Iterator[Transaction]:
        """Append events as one operation: all of them, durable on leaving, or none.

        Holds the log lock: keep the body short and do not await in it. Nothing is logged when
        the body raises or appends nothing. With an op_id that was applied before,
        `tx.already_applied` says so and appending does nothing.

        Raises:
            Busy: the log lock is held by another for longer than `lock_wait_s`.
            StorageFull, StorageFailed: nothing was recorded, unless `recorded` is among the facts:
                then the log has it and the projection follows when it can be written.
        """
        with self._locked(self.lock_wait_s):
            position = self._catch_up_locked()
            self._elsewhere = None  # the file can be written again
            connection = self._connect(read_only=False)
            self._local.writing = connection
            try:
                yield from self._run_transaction(connection, position, command, actor, op_id)
            finally:
                self._local.writing = None
                self._forget(connection)

    def _run_transaction(
        self,
        connection: sqlite3.Connection,
        position: Position,
        command: str,
        actor: str,
        op_id: bytes | None,
    ) -> Iterator[Transaction]:
        operation = Operation(
            position.last_seq + 1,
            self._clock_ns(),
            op_id if op_id is not None else os.urandom(UNIQUE_ID_BYTES),
            _storable(command),
            _storable(actor),
            (),
        )
        projection = Projection(connection, self._read_commit, read_tag=self._read_tag)
        try:
            connection.execute("BEGIN IMMEDIATE")
            applied = self.operation_result(operation.op_id) if op_id is not None else None
            transaction = Transaction(projection, operation, applied)
            yield transaction
            end = position
            if not transaction.is_empty:
                end = self._log.append(transaction.finished(), position)
        except BaseException as exc:
            _roll_back(connection)
            if isinstance(exc, sqlite3.Error):
                raise self._translated(exc) from exc
            raise
        if transaction.is_empty:
            _roll_back(connection)
            return
        self._project(connection, projection, transaction.finished(), position, end)

    def _project(
        self,
        connection: sqlite3.Connection,
        projection: Projection,
        operation: Operation,
        before: Position,
        end: Position,
    ) -> None:
        """Commit what the log now has; from here on failures cannot take the operation back."""
        try:
            projection.end_operation(
                operation.first_seq, len(operation.events), end.segment, end.record_offset
            )
            _store_position(projection, end)
            projection.set_meta(schema.NAMES_KEY, schema.digest_of_names(connection))
            connection.execute("COMMIT")
            schema.checkpoint(connection, self._path, wal_bytes_min=CHECKPOINT_WAL_BYTES)
        except sqlite3.Error as exc:
            _roll_back(connection)
            error = self._translated(exc)
            error.message = f"the change is recorded, but not yet visible: {error.message}"
            error.facts["recorded"] = True
            error.facts["seq"] = operation.last_seq
            raise error from exc

    def _translated(self, error: sqlite3.Error) -> StorageFull | StorageFailed | Corruption:
        if _is_damage(error):
            return Corruption(f"catalog.sqlite is damaged: {error}", hint=_REBUILD_HINT)
        return schema.storage_error("catalog", self._path, error)

    # --- queries: the store ---------------------------------------------------------------------

    def _rows(self, sql: str, *parameters: object) -> list[Any]:
        try:
            return self._reader().execute(sql, parameters).fetchall()
        except _Unusable as exc:
            damage: Exception = exc
        except sqlite3.Error as exc:
            if not _is_damage(exc):
                raise self._translated(exc) from exc
            damage = exc
        return self._rows_after_rebuild(damage, sql, parameters)

    def _rows_after_rebuild(
        self, damage: Exception, sql: str, parameters: tuple[object, ...]
    ) -> list[Any]:
        """Damage that shows only now: rebuild once and ask again."""
        if getattr(self._local, "writing", None) is not None:
            raise Corruption(
                f"catalog.sqlite is damaged: {damage}",
                hint=_REBUILD_HINT,
            ) from damage
        self._heal(str(damage))
        try:
            return self._reader().execute(sql, parameters).fetchall()
        except sqlite3.Error as exc:
            raise self._translated(exc) from exc

    def contradictions(self) -> list[str]:
        """What SQLite finds wrong in its own structures, indexes that do not agree with their
        tables included; the first few. O(size)."""
        try:
            rows = self._reader().execute("PRAGMA integrity_check(3)").fetchall()
        except sqlite3.Error as exc:
            return [str(exc)]
        except _Unusable as exc:
            return [str(exc)]
        return [str(row[0]) for row in rows if row[0] != "ok"]

    def _heal(self, reason: str) -> None:
        if getattr(self._local, "writing", None) is not None:
            return
        reader: sqlite3.Connection | None = getattr(self._local, "reader", None)
        if reader is not None:
            self._local.reader = None
            self._forget(reader)
        try:
            with self._locked(self.lock_wait_s):
                self._rebuild_locked(reason)
        except (StorageFull, StorageFailed) as exc:
            self._fold_elsewhere(exc)

    def digest(self) -> dict[str, str]:
        """Per table a hash of its rows: a rebuilt projection has the same. Raises Corruption."""
        try:
            return schema.digest_of_rows(self._reader())
        except sqlite3.Error as exc:
            raise self._translated(exc) from exc
        except _Unusable as exc:
            raise Corruption(f"catalog.sqlite: {exc}", hint=_REBUILD_HINT) from exc

    def store_commit_delta(self, dot: DotId, commit: ObjectId, delta: bytes) -> bool:
        """Cache a delta, within the transaction when there is one. False when the log lock is
        taken or the commit unknown: a cache is not worth waiting for."""
        sql = (
            f"INSERT OR REPLACE INTO commit_deltas SELECT c.rid, ? FROM commits c WHERE {COMMIT_IS}"
        )
        parameters = (delta, dot, commit, commit)
        writing: sqlite3.Connection | None = getattr(self._local, "writing", None)
        try:
            if writing is not None:
                return writing.execute(sql, parameters).rowcount > 0
            with self._locked(0.0):
                self._catch_up_locked()
                connection = self._connect(read_only=False)
                try:
                    return connection.execute(sql, parameters).rowcount > 0
                finally:
                    self._forget(connection)
        except (Busy, StorageFull, StorageFailed, sqlite3.Error):
            return False

    def events_of(self, operation: OperationRow) -> Operation:
        """Read an operation with its events from the log. Raises Corruption."""
        found = self._log.operation_at(operation.segment, operation.record_offset)
        if found.first_seq != operation.first_seq:
            raise Corruption("the catalog and the event log disagree", seq=operation.first_seq)
        return found


class PastCatalog(Catalog):
    """A catalog folded up to some event: answers questions, never catches up, takes no change."""

    def refresh(self) -> None:
        return

    def transaction(self, command: str, actor: str, op_id: bytes | None = None) -> NoReturn:
        raise UsageError("the past cannot be changed", hint="leave out --at-op")

    def store_commit_delta(self, dot: DotId, commit: ObjectId, delta: bytes) -> bool:
        return False

    def _rebuild_locked(self, reason: str) -> Position:
        raise Corruption(f"the catalog of the past: {reason}")


def _version(connection: sqlite3.Connection) -> int:
    """Also opens the WAL, which is found by name: the caller makes sure that database and WAL are
    of the same file, not of one renamed into place in between."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    connection.execute("SELECT 1 FROM meta").fetchone()
    return cast(int, version)


def _utc(time_ns: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(time_ns // 1_000_000_000))


def _store_position(projection: Projection, position: Position) -> None:
    projection.set_meta(
        "position",
        encode(
            (
                position.segment,
                position.record_offset,
                position.end_offset,
                position.last_seq,
                position.chain_hash,
            )
        ),
    )


def _roll_back(connection: sqlite3.Connection) -> None:
    if connection.in_transaction:
        try:
            connection.execute("ROLLBACK")
        except sqlite3.Error:
            pass  # SQLite has rolled back by itself; the first error is the one to report


def _storable(text: str) -> str:
    """Text from an argument vector may hold lone surrogates, which no UTF-8 can."""
    return text.encode("utf-8", "replace").decode()
