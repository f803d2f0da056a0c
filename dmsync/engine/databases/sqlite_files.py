"""Opens SQLite files that anybody may have written, so that nothing in them acts.

The file names what SQLite would run: triggers, views, virtual tables, functions in indexes and
generated columns, and journals that are rolled back on opening. Our connections therefore

- deny every statement that would run inside a trigger or a view, whatever table it claims to be,
  every ATTACH but our own, every pragma but ours, and functions that reach outside (`_Guard`);
- do not trust the schema (`trusted_schema=0`: its functions must be builtins without effects),
  check cells, map no memory, load no extension, and bound values by the file's size;
- end with an error at a deadline that grows with the size of the files;
- refuse a rollback journal that names another journal: SQLite deletes the file of that name.

The files must be private copies: recovering a journal or WAL writes to them.
"""

import os
import sqlite3
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import copysign
from urllib.parse import quote

from dmsync.engine.databases.sqlite_values import decode_text, printable
from dmsync.errors import DmError, StorageFailed, StorageFull

SECONDS_MIN = 60.0
BYTES_PER_SECOND_MIN = 1_000_000  # 50 times slower than what we measured: only traps take longer
VALUE_LENGTH_MIN = 1_000_000
SQL_LENGTH_MAX = 1_000_000  # SQLite's own default; distributions raise it
PATTERN_LENGTH_MAX = 1000
PROGRESS_STEPS = 100_000  # virtual machine steps between two looks at the clock: some milliseconds
CACHE_KIB = 64 * 1024

_JOURNAL_MAGIC = bytes.fromhex("d9d505f920a163d7")

_READING = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_TRANSACTION}
_READING |= {sqlite3.SQLITE_SAVEPOINT}
_WRITING = {sqlite3.SQLITE_INSERT, sqlite3.SQLITE_UPDATE, sqlite3.SQLITE_DELETE}
_SHAPING = {
    sqlite3.SQLITE_CREATE_TABLE,
    sqlite3.SQLITE_CREATE_INDEX,
    sqlite3.SQLITE_DROP_TABLE,
    sqlite3.SQLITE_DROP_INDEX,
    sqlite3.SQLITE_DROP_TRIGGER,
    sqlite3.SQLITE_REINDEX,
}
_SHAPING_TEMP = {sqlite3.SQLITE_CREATE_TEMP_TABLE, sqlite3.SQLITE_DROP_TEMP_TABLE}
_PRAGMAS = {
    "application_id",
    "cache_size",
    "cell_size_check",
    "encoding",
    "foreign_key_check",
    "foreign_key_list",
    "foreign_keys",
    "ignore_check_constraints",
    "index_info",
    "index_list",
    "index_xinfo",
    "integrity_check",
    "journal_mode",
    "mmap_size",
    "page_count",
    "page_size",
    "recursive_triggers",
    "synchronous",
    "table_xinfo",
    "trusted_schema",
    "user_version",
    "writable_schema",
}
_FUNCTIONS_DENIED = {"load_extension", "fts3_tokenizer", "readfile", "writefile", "edit", "eval"}


class UnreadableDatabase(DmError):
    """A file that is no sound SQLite database, or that asks for more than its size justifies."""

    def __init__(self, message: str, *, hint: str = "", **facts: object) -> None:
        super().__init__(printable(message), hint=hint, **facts)  # messages quote the file


@dataclass(frozen=True)
class Version:
    """A recovered database file: one file without companions, checked.

    `journal_mode` is what the file had: "wal" or "delete".
    """

    path: str
    journal_mode: str
    size: int


class _Guard:
    """The authorizer of a connection: everything that is not listed is denied."""

    def __init__(self) -> None:
        self.attaching = False
        self.foreign_sql = False
        self.read_only: frozenset[str] = frozenset()

    def __call__(
        self, action: int, first: str | None, second: str | None, db: str | None, inside: str | None
    ) -> int:
        return sqlite3.SQLITE_OK if self._allows(action, first, second, db, inside) else 1

    def _allows(
        self, action: int, first: str | None, second: str | None, db: str | None, inside: str | None
    ) -> bool:
        if inside is not None:  # the name of a trigger or view (or a subquery: we write none)
            return False
        if action == sqlite3.SQLITE_SELECT:
            return not self.foreign_sql  # CREATE TABLE ... AS SELECT in the place of a table
        if action in _READING:
            return True
        if action in _WRITING:
            return db not in self.read_only
        if action in _SHAPING:
            return db not in self.read_only
        if action in _SHAPING_TEMP:
            return not self.foreign_sql
        if action == sqlite3.SQLITE_FUNCTION:
            return (second or "").lower() not in _FUNCTIONS_DENIED
        if action == sqlite3.SQLITE_PRAGMA:
            return (first or "").lower() in _PRAGMAS and not self.foreign_sql
        return action == sqlite3.SQLITE_ATTACH and self.attaching


class _Clock:
    """Ends statements after the deadline, or when a signal was raised while one ran."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.raised: BaseException | None = None

    def __call__(self) -> int:
        try:
            return int(time.monotonic() > self.deadline)
        except BaseException as error:  # noqa: BLE001 (SQLite would swallow Ctrl-C here)
            self.raised = error
            return 1

    def check_signal(self, error: object) -> None:
        """Raises what a signal raised: `error` ended a statement, and the deadline did not."""
        if self.raised is not None:
            raise self.raised from None
        name = getattr(error, "sqlite_errorname", "")
        if name == "SQLITE_INTERRUPT" and time.monotonic() < self.deadline:
            raise KeyboardInterrupt  # it came before the first line of our callback


class Database:
    """One guarded connection; use it as a context manager. Statements go through `execute`."""

    def __init__(self, path: str, *, deadline: float, length_max: int) -> None:
        self._guard = _Guard()
        self._clock = _Clock(deadline)
        self.connection = sqlite3.connect(
            _uri(path), uri=True, isolation_level=None, check_same_thread=False
        )
        self._closed = threading.Event()
        self._watch = threading.Thread(target=self._interrupt_when_over, daemon=True)
        self._configure(length_max)
        self._watch.start()

    def __enter__(self) -> "Database":
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self.close()
        self._clock.check_signal(error)

    def close(self) -> None:
        self._closed.set()
        self._watch.join()
        self.connection.close()

    def execute(self, sql: str, parameters: tuple[object, ...] = ()) -> sqlite3.Cursor:
        """One statement of ours. Raises sqlite3.Error: see `translated`."""
        return self.connection.execute(sql, parameters)

    def execute_schema(self, sql: str) -> None:
        """A CREATE TABLE or CREATE INDEX that a file holds: it may create, and nothing else."""
        self._guard.foreign_sql = True
        try:
            self.execute(sql)
        finally:
            self._guard.foreign_sql = False

    def attach(self, path: str, name: str) -> None:
        """Attaches the database at `path`, to be read only."""
        self._guard.attaching = True
        try:
            self.execute(f"ATTACH ? AS {name}", (_uri(path),))
        finally:
            self._guard.attaching = False
        self._guard.read_only |= {name}
        self.execute(f"PRAGMA {name}.mmap_size=0")

    def pragma(self, name: str, schema: str = "main") -> object:
        """The value of a pragma that answers with one."""
        row = self.execute(f"PRAGMA {schema}.{name}").fetchone()
        return None if row is None else row[0]

    def _configure(self, length_max: int) -> None:
        connection = self.connection
        connection.text_factory = decode_text
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, max(length_max, VALUE_LENGTH_MIN))
        connection.setlimit(sqlite3.SQLITE_LIMIT_SQL_LENGTH, SQL_LENGTH_MAX)
        connection.setlimit(sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, PATTERN_LENGTH_MAX)
        connection.setlimit(sqlite3.SQLITE_LIMIT_WORKER_THREADS, 0)
        connection.create_function("dm_sign", 1, _sign, deterministic=True)
        connection.set_progress_handler(self._clock, PROGRESS_STEPS)
        connection.set_authorizer(self._guard)
        for pragma in (
            "trusted_schema=0",
            "cell_size_check=1",
            "mmap_size=0",
            "foreign_keys=0",
            "recursive_triggers=0",
            f"cache_size=-{CACHE_KIB}",
        ):
            connection.execute(f"PRAGMA {pragma}")

    def _interrupt_when_over(self) -> None:
        # loops inside SQLite's C code (integrity_check, sorting) heed interrupts, not progress
        remaining = max(self._clock.deadline - time.monotonic(), 0.0)
        while not self._closed.wait(remaining):
            self.connection.interrupt()
            remaining = 0.1


@contextmanager
def translated(path: str) -> Iterator[None]:
    """SQLite's errors as ours: UnreadableDatabase, StorageFull or StorageFailed."""
    name = os.path.basename(path)
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorname", "") or ""
        if code == "SQLITE_FULL":
            raise StorageFull(f"no space to work on the database {name}") from error
        if code.startswith(("SQLITE_IOERR", "SQLITE_CANTOPEN")):
            raise StorageFailed(f"cannot work on the database {name}: {error}") from error
        if code == "SQLITE_INTERRUPT":
            raise UnreadableDatabase(f"the database {name} takes too long to read") from error
        raise UnreadableDatabase(f"the database {name} cannot be read: {error}") from error
    except (ValueError, OverflowError, MemoryError) as error:
        raise UnreadableDatabase(f"the database {name} cannot be read: {error!r}") from error


def deadline_for(*paths: str) -> float:
    """When (monotonic clock, s) work on the files at `paths` has taken longer than it can."""
    return time.monotonic() + SECONDS_MIN + total_size(*paths) / BYTES_PER_SECOND_MIN


def total_size(*paths: str) -> int:
    """Bytes of the files at `paths` with their companions."""
    names = [path + suffix for path in paths for suffix in ("", "-wal", "-journal")]
    return sum(os.lstat(name).st_size for name in names if os.path.lexists(name))


def recover(path: str, *, deadline: float, check: bool) -> Version:
    """Brings the private copy at `path` to one sound file: journal rolled back, WAL moved in.

    With `check`, `PRAGMA integrity_check` must pass. Raises UnreadableDatabase, StorageFull,
    StorageFailed.
    """
    size = total_size(path)
    check_companions(path)
    with translated(path), Database(path, deadline=deadline, length_max=size) as database:
        mode = str(database.pragma("journal_mode"))
        if database.pragma("journal_mode=DELETE") != "delete":
            raise UnreadableDatabase(f"the journal of {os.path.basename(path)} cannot be ended")
        pages, page_size = database.pragma("page_count"), database.pragma("page_size")
        assert isinstance(pages, int) and isinstance(page_size, int)
        if pages * page_size > size:
            raise UnreadableDatabase(f"{os.path.basename(path)} claims more pages than it has")
        if check and (problem := integrity_problem(database)):
            raise UnreadableDatabase(f"{os.path.basename(path)} is damaged: {problem}")
    return Version(path, "wal" if mode == "wal" else "delete", os.lstat(path).st_size)


def integrity_problem(database: Database) -> str:
    """The first thing `PRAGMA integrity_check` finds in the main database; "" when it is sound."""
    found = str(database.execute("PRAGMA main.integrity_check(1)").fetchone()[0])
    return "" if found == "ok" else found


def check_companions(path: str) -> None:
    for suffix in ("", "-wal", "-journal", "-shm"):
        if suffix and not os.path.lexists(path + suffix):
            continue
        if not stat.S_ISREG(os.lstat(path + suffix).st_mode):
            raise UnreadableDatabase(f"{os.path.basename(path)}{suffix} is not a regular file")
    if os.path.lexists(path + "-journal") and _names_another(path + "-journal"):
        raise UnreadableDatabase(
            f"the journal of {os.path.basename(path)} belongs to a transaction over several"
            " databases",
            hint="let the program that wrote the database recover it",
        )


def _names_another(journal: str) -> bool:
    """Whether the rollback journal ends with the name of a super-journal (and is not void)."""
    with open(journal, "rb") as file:
        if file.read(1) in (b"", b"\0"):
            return False
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - len(_JOURNAL_MAGIC), 0))
        return file.read() == _JOURNAL_MAGIC


def _sign(value: object) -> float:
    """Tells 0.0 from -0.0, which SQL holds to be equal."""
    return copysign(1.0, value) if isinstance(value, float) else 0.0


def _uri(path: str) -> str:
    return "file:" + quote(os.fsencode(os.path.abspath(path))) + "?mode=rw"
