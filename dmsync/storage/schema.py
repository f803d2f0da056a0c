"""Tables of the catalog, and its connections (protocol/STORE.md 5).

The catalog is a projection of the event log: a change of schema raises SCHEMA_VERSION, and an
older file is rebuilt from the log instead of being migrated.
"""

import os
import sqlite3
from typing import Any, Final

from blake3 import blake3

from dmsync.core.encoding import encode
from dmsync.errors import StorageFailed, StorageFull

SCHEMA_VERSION: Final = 6
BUSY_TIMEOUT_MS: Final = 5000
"""Only recovery and closing of the WAL by another process ever make a statement wait."""

# A `target` is a commit's rid (INTEGER), or the id itself (BLOB) where the object is no commit
# that was known then. Times, commands and actors stand once, in operations.
SCHEMA: Final = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE texts (number INTEGER PRIMARY KEY, text TEXT NOT NULL UNIQUE);
CREATE TABLE operations (
    first_seq INTEGER PRIMARY KEY,
    events INTEGER NOT NULL,
    time_ns INTEGER NOT NULL,
    op_id BLOB NOT NULL UNIQUE,
    command INTEGER NOT NULL REFERENCES texts,
    actor INTEGER NOT NULL REFERENCES texts,
    segment INTEGER NOT NULL,
    record_offset INTEGER NOT NULL
);
CREATE TABLE dots (
    number INTEGER PRIMARY KEY,
    dot BLOB NOT NULL UNIQUE,
    namespace TEXT NOT NULL,
    name TEXT NOT NULL,
    owner TEXT NOT NULL,
    head TEXT NOT NULL,
    created_seq INTEGER NOT NULL,
    trash TEXT
);
CREATE UNIQUE INDEX dots_by_name ON dots (namespace, name) WHERE trash IS NULL;
CREATE TABLE commits (
    rid INTEGER PRIMARY KEY,
    dot INTEGER NOT NULL REFERENCES dots,
    id BLOB NOT NULL,
    generation INTEGER NOT NULL,
    first_parent_depth INTEGER NOT NULL,
    first_parent INTEGER REFERENCES commits,
    jump INTEGER NOT NULL REFERENCES commits,
    is_merge INTEGER NOT NULL,
    is_hollow INTEGER NOT NULL,
    corrected_date_ns INTEGER NOT NULL,
    reachable INTEGER NOT NULL
);
CREATE INDEX commits_by_key ON commits (dot, substr(id, 1, 8));
CREATE INDEX commits_hollow ON commits (dot, rid) WHERE is_hollow;
CREATE TABLE parents (
    child INTEGER NOT NULL REFERENCES commits,
    pos INTEGER NOT NULL,
    parent INTEGER NOT NULL REFERENCES commits,
    PRIMARY KEY (child, pos)
) WITHOUT ROWID;
CREATE TABLE commit_payloads (
    rid INTEGER PRIMARY KEY REFERENCES commits,
    seq INTEGER NOT NULL,
    capture BLOB,
    transfer BLOB,
    payload BLOB NOT NULL
);
CREATE TABLE commit_deltas (rid INTEGER PRIMARY KEY REFERENCES commits, delta BLOB NOT NULL);
CREATE TABLE signatures (
    dot INTEGER NOT NULL REFERENCES dots,
    target BLOB NOT NULL,
    signature BLOB NOT NULL,
    seq INTEGER NOT NULL,
    PRIMARY KEY (dot, target, signature)
) WITHOUT ROWID;
CREATE TABLE scopes (dot INTEGER PRIMARY KEY REFERENCES dots, subdots BLOB NOT NULL);
CREATE TABLE collaborators (
    dot INTEGER NOT NULL REFERENCES dots,
    user TEXT NOT NULL,
    seq INTEGER NOT NULL,
    PRIMARY KEY (dot, user)
) WITHOUT ROWID;
CREATE TABLE quotas (namespace TEXT PRIMARY KEY, bytes_max INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE merges (
    dot INTEGER NOT NULL REFERENCES dots,
    branch TEXT NOT NULL,
    kind TEXT NOT NULL,
    ours BLOB NOT NULL,
    theirs BLOB NOT NULL,
    bases BLOB NOT NULL,
    snapshot BLOB NOT NULL,
    parents BLOB NOT NULL,
    message TEXT NOT NULL,
    seq INTEGER NOT NULL,
    PRIMARY KEY (dot, branch)
) WITHOUT ROWID;
CREATE TABLE conflicts (
    dot INTEGER NOT NULL REFERENCES dots,
    branch TEXT NOT NULL,
    path BLOB NOT NULL,
    reason TEXT NOT NULL,
    detail BLOB NOT NULL,
    resolved TEXT,
    is_touched INTEGER NOT NULL,
    PRIMARY KEY (dot, branch, path)
) WITHOUT ROWID;
CREATE TABLE undone (operation INTEGER PRIMARY KEY, by_seq INTEGER NOT NULL);
CREATE TABLE missing_commits (
    dot INTEGER NOT NULL REFERENCES dots,
    id BLOB NOT NULL,
    PRIMARY KEY (dot, id)
) WITHOUT ROWID;
CREATE TABLE forgotten (
    dot INTEGER NOT NULL REFERENCES dots,
    id BLOB NOT NULL,
    PRIMARY KEY (dot, id)
) WITHOUT ROWID;
CREATE TABLE refs (
    number INTEGER PRIMARY KEY,
    dot INTEGER NOT NULL REFERENCES dots,
    name TEXT NOT NULL,
    target,
    seq INTEGER NOT NULL,
    origin TEXT,
    UNIQUE (dot, name)
);
CREATE TABLE reflog (
    ref INTEGER NOT NULL REFERENCES refs,
    seq INTEGER NOT NULL,
    old,
    new,
    kind INTEGER NOT NULL REFERENCES texts,
    reason TEXT,
    PRIMARY KEY (ref, seq)
) WITHOUT ROWID;
CREATE TABLE working (
    dot INTEGER NOT NULL REFERENCES dots,
    branch TEXT NOT NULL,
    target NOT NULL,
    reason TEXT NOT NULL,
    seq INTEGER NOT NULL,
    PRIMARY KEY (dot, branch)
) WITHOUT ROWID;
CREATE TABLE trees (
    dot INTEGER PRIMARY KEY REFERENCES dots,
    path BLOB NOT NULL UNIQUE,
    as_root INTEGER NOT NULL,
    device BLOB NOT NULL,
    inode BLOB NOT NULL,
    branch TEXT NOT NULL
);
CREATE TABLE switches (
    dot INTEGER NOT NULL REFERENCES dots,
    branch TEXT NOT NULL,
    from_target,
    to_target,
    reason TEXT NOT NULL,
    seq INTEGER NOT NULL,
    PRIMARY KEY (dot, branch)
) WITHOUT ROWID;
CREATE TABLE remotes (name TEXT PRIMARY KEY, url TEXT NOT NULL, dm_command TEXT) WITHOUT ROWID;
CREATE TABLE upstreams (
    dot INTEGER NOT NULL REFERENCES dots,
    remote TEXT NOT NULL,
    namespace TEXT NOT NULL,
    name TEXT NOT NULL,
    PRIMARY KEY (dot, remote)
) WITHOUT ROWID;
CREATE TABLE observed (
    remote TEXT NOT NULL,
    dot BLOB NOT NULL,
    cluster_id BLOB NOT NULL,
    epoch INTEGER NOT NULL,
    seq INTEGER NOT NULL,
    PRIMARY KEY (remote, dot)
) WITHOUT ROWID;
CREATE TABLE transfers (
    transfer_id BLOB PRIMARY KEY,
    started_seq INTEGER NOT NULL,
    direction TEXT NOT NULL,
    remote TEXT NOT NULL,
    dot BLOB,
    branch TEXT,
    finished_seq INTEGER,
    status TEXT,
    summary BLOB
) WITHOUT ROWID;
"""

_UNWRITABLE: Final = frozenset(
    (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_FULL)
)
_FREE_BYTES_MIN: Final = 64 * 1024
"""SQLite needs 32 KiB for its shared memory and some for the WAL before it can read."""

DERIVED_TABLES: Final = frozenset({"commit_deltas"})
"""Caches that are no function of the log alone; a rebuilt catalog starts without them."""


def connect(path: str, *, read_only: bool) -> sqlite3.Connection:
    """Open a catalog with its pragmas set and read back. Raises sqlite3.Error, StorageFailed.

    The database is never opened by other means: closing another descriptor of the file would
    drop SQLite's POSIX locks. Transactions are explicit (isolation_level None).
    """
    connection = sqlite3.connect(
        path,
        timeout=BUSY_TIMEOUT_MS / 1000,
        isolation_level=None,
        check_same_thread=False,
        cached_statements=256,
        factory=CarefulConnection,
    )
    try:
        _set_pragmas(connection, read_only=read_only)
    except BaseException:
        connection.close()
        raise
    return connection


class CarefulConnection(sqlite3.Connection):
    """One whose errors are all of sqlite3: quoting a damaged schema, the module cannot decode
    its own message."""

    def execute(self, sql: str, parameters: Any = (), /) -> sqlite3.Cursor:
        try:
            return super().execute(sql, parameters)
        except UnicodeDecodeError as exc:
            error = sqlite3.DatabaseError("malformed database schema")
            error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
            raise error from exc


class FrozenConnection(CarefulConnection):
    """Reads a database as if nobody could change it: no locks, no WAL, no file is made."""

    fingerprint: tuple[int, ...] = ()
    """Of the file that was opened; see fingerprint()."""


def fingerprint(path: str) -> tuple[int, ...]:
    """Changes when somebody writes the database after all. Raises FileNotFoundError."""
    status = os.stat(path)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, _wal_bytes(path)


def connect_frozen(path: str) -> FrozenConnection | None:
    """Open a database whose WAL and shared memory cannot be made here; None when it has a WAL
    with content, without which the file is not all there is.

    Only for when writing is impossible for us. The risk: somebody else can write (space was
    freed), and pages change under a statement. Who keeps the connection compares fingerprints
    before each statement; one that runs meanwhile may see damage, which is never written.
    Raises sqlite3.Error, FileNotFoundError.
    """
    from urllib.parse import quote  # rarely needed, and slow to import

    found = fingerprint(path)
    if _wal_bytes(path) > 0:
        return None
    connection = sqlite3.connect(
        f"file:{quote(path)}?mode=ro&immutable=1",
        uri=True,
        isolation_level=None,
        check_same_thread=False,
        cached_statements=256,
        factory=FrozenConnection,
    )
    connection.fingerprint = found
    return connection


def is_unwritable(error: sqlite3.Error) -> bool:
    """Could SQLite not make, grow or write a file (its WAL, its shared memory)?"""
    return (getattr(error, "sqlite_errorcode", 0) or 0) & 0xFF in _UNWRITABLE


def storage_error(doing: str, path: str, error: sqlite3.Error) -> StorageFull | StorageFailed:
    """The cause of SQLite's refusal: it says "disk I/O error" when its shared memory does not
    fit on a full disk, and "unable to open database file" on a read-only one."""
    if is_unwritable(error):
        found = os.statvfs(os.path.dirname(path))
        if found.f_flag & os.ST_RDONLY:
            return StorageFailed(f"{doing}: Read-only file system")
        is_full = found.f_bavail * found.f_frsize < _FREE_BYTES_MIN
        if is_full or error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_FULL:
            return StorageFull(f"{doing}: No space left on device ({error})")
        if error.sqlite_errorcode == sqlite3.SQLITE_IOERR_SHMSIZE:
            return StorageFull(f"{doing}: no room for shared memory, or a quota is used up")
    return StorageFailed(f"{doing}: {error}")


def _wal_bytes(path: str) -> int:
    try:
        return os.stat(f"{path}-wal").st_size
    except FileNotFoundError:
        return 0


def _set_pragmas(connection: sqlite3.Connection, *, read_only: bool) -> None:
    wanted: dict[str, int | str] = {
        "journal_mode": "wal",
        "synchronous": 1,  # NORMAL: what a power cut takes back is caught up from the log
        "foreign_keys": 0 if read_only else 1,
        "wal_autocheckpoint": 0,  # checkpoints only under the log lock: the WAL-reset bug
        "trusted_schema": 0,
        "temp_store": 2,
        "query_only": int(read_only),
    }
    for pragma, value in wanted.items():
        connection.execute(f"PRAGMA {pragma} = {value}")
        (actual,) = connection.execute(f"PRAGMA {pragma}").fetchone()
        if actual != value:
            raise StorageFailed(f"SQLite keeps {pragma} at {actual!r} instead of {value!r}")


def checkpoint(connection: sqlite3.Connection, path: str, *, wal_bytes_min: int) -> None:
    """Move the WAL into the database when it has grown; only the holder of the log lock may.

    Gives up at once when a reader is in the way: the next writer tries again.
    """
    wal_bytes = _wal_bytes(path)
    if not wal_bytes or wal_bytes < wal_bytes_min:
        return
    connection.execute("PRAGMA busy_timeout = 0")
    try:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    finally:
        connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")


NAMES_KEY: Final = "names"
NAMES_MAX: Final = 4096
"""Refs beyond which what they say is not checked whenever the catalog is opened, only by fsck."""
_NAMES: Final = (
    "SELECT number, dot, namespace, name, owner, head, trash FROM dots ORDER BY number",
    "SELECT number, dot, name, COALESCE((SELECT id FROM commits WHERE rid = target), target), "
    "origin FROM refs ORDER BY number",
    "SELECT dot, branch, COALESCE((SELECT id FROM commits WHERE rid = target), target) "
    "FROM working ORDER BY dot, branch",
    "SELECT * FROM texts ORDER BY number",
    "SELECT * FROM remotes ORDER BY name",
    "SELECT * FROM upstreams ORDER BY dot, remote",
    "SELECT * FROM trees ORDER BY dot",
    "SELECT * FROM switches ORDER BY dot, branch",
    "SELECT * FROM scopes ORDER BY dot",
    "SELECT * FROM merges ORDER BY dot, branch",
    "SELECT * FROM collaborators ORDER BY dot, user",
    "SELECT * FROM quotas ORDER BY namespace",
    f"SELECT * FROM meta WHERE key <> '{NAMES_KEY}' ORDER BY key",
)
"""Everything whose content nothing else vouches for: a commit is checked by its id."""


def digest_of_names(connection: sqlite3.Connection) -> bytes:
    """A hash of what names things: a database has no checksums of its own, and a name or a place
    with one bit changed would be believed. Empty for a store of very many refs."""
    (count,) = connection.execute("SELECT count(*) FROM refs").fetchone()
    if count > NAMES_MAX:
        return b""
    hasher = blake3()
    for statement in _NAMES:
        hasher.update(repr(connection.execute(statement).fetchall()).encode("utf-8", "replace"))
    return hasher.digest(16)


def names_are_sound(connection: sqlite3.Connection) -> bool:
    """Are they what was stored with them? Raises sqlite3.Error."""
    connection.execute("BEGIN")
    try:
        row = connection.execute("SELECT value FROM meta WHERE key = ?", (NAMES_KEY,)).fetchone()
        if row is not None and row[0] == b"":
            return True
        return row is not None and row[0] == digest_of_names(connection)
    finally:
        connection.execute("ROLLBACK")


def digest_of_rows(connection: sqlite3.Connection) -> dict[str, str]:
    """Per table, a hash of all its rows in key order: equal for equal projections.

    Inspection, so through sqlite-utils (84 ms to import).
    """
    from sqlite_utils import Database

    database = Database(connection, execute_plugins=False)
    digests = {}
    for name in sorted(database.table_names()):
        if name in DERIVED_TABLES or name.startswith("sqlite_"):
            continue
        table = database.table(name)
        order = ", ".join(f'"{column}"' for column in table.pks)
        hasher = blake3()
        for row in database.execute(f'SELECT * FROM "{name}" ORDER BY {order}'):
            hasher.update(encode(tuple(row)))
        digests[name] = hasher.hexdigest()
    return digests
