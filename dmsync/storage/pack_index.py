"""The index of one dot's packs: short key to places, in SQLite (protocol/PACKS.md 5).

A projection of the packs directory and nothing else: what is missing is read from footers, what
is gone is removed, and a lost or corrupt database is built again. It answers with candidates
only; who reads a record hashes it.

Opening a sound one writes nothing. On a full disk or a read-only filesystem it is read as it lies
there, or built for this process alone when it does not say what the packs directory holds.
"""

import math
import os
import re
import sqlite3
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final

from dmsync.core.ids import KEY_BYTES
from dmsync.errors import Corruption, StorageFailed, StorageFull
from dmsync.storage import schema
from dmsync.storage.durable import (
    fsync_directory,
    lock_exclusively,
    remove_if_there,
    storage_errors,
    write_file_atomic,
)
from dmsync.storage.locks import FileLock
from dmsync.storage.pack_consolidation import JOINED_PACKS_MAX, JoinedPack
from dmsync.storage.packs import PACK_SUFFIX, Footer, PackInfo, Place, read_footer

SCHEMA_VERSION: Final = 4
_FILE_NAME: Final = "index.sqlite"
_PACK_NAME: Final = re.compile(r"[0-9a-f]{32}\.pack", re.ASCII)
REPLACED_KEPT: Final = 2 * JOINED_PACKS_MAX
"""Packs that were joined into others and whose records can be asked for by their old places: what
may happen between somebody's look-up and his read."""
_KEYS_PER_LOOKUP: Final = 256
_ROWS_SORTED_AT_ONCE: Final = 131_072
"""About: keys are spread evenly. 20 MB of rows; each pass over a million keys takes 50 ms."""
_CACHE_KIB: Final = 16 * 1024
"""Taken as needed: keys are random, so chains touch every page of the table again and again."""
_BUSY_TIMEOUT_S: Final = 30.0
"""Writers hold the lock file; a reader only ever waits for a checkpoint's last step."""

_SCHEMA: Final = """
CREATE TABLE packs (
    rid INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE,
    bytes INTEGER NOT NULL, records INTEGER NOT NULL
);
CREATE TABLE objects (
    key INTEGER NOT NULL, pack INTEGER NOT NULL, offset INTEGER NOT NULL,
    PRIMARY KEY (key, pack, offset)
) WITHOUT ROWID;
CREATE TABLE replaced (
    number INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE,
    pack INTEGER NOT NULL, shift INTEGER NOT NULL, file TEXT NOT NULL
);
CREATE TABLE condemned (name TEXT PRIMARY KEY, file TEXT NOT NULL) WITHOUT ROWID;
"""


class IndexSnapshot:
    """Look-ups in the index as it lies there, for a process that was forked beside an open one.

    Takes no locks and writes nothing: SQLite is told that the file does not change. When it does
    all the same, answers may be wrong, which candidates may be, or sqlite3.DatabaseError.
    """

    def __init__(self, dot_dir: str) -> None:
        """Raises OSError, sqlite3.DatabaseError."""
        path = os.path.join(dot_dir, _FILE_NAME)
        with suppress(FileNotFoundError):
            if os.stat(path + "-wal").st_size:
                raise sqlite3.DatabaseError("a writer was stopped before its checkpoint")
        self._db = sqlite3.connect(f"file:{_in_uri(path)}?immutable=1", uri=True)
        self._db.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        self._names = dict(self._select("SELECT rid, name FROM packs", ()))

    def first_places(self, keys: Sequence[bytes]) -> dict[bytes, Place]:
        """As PackIndex.first_places. Raises sqlite3.DatabaseError."""
        return _first_places(self._select, lambda rid: self._names.get(rid, ""), keys)

    def _select(self, sql: str, values: tuple[object, ...]) -> list[Any]:
        return self._db.execute(sql, values).fetchall()


def _in_uri(path: str) -> str:
    """A path as it is written in a URI for SQLite, which takes all but these as they are."""
    return path.replace("%", "%25").replace("?", "%3f").replace("#", "%23")


def _first_places(
    select: Callable[[str, tuple[object, ...]], list[Any]],
    pack_name: Callable[[int], str],
    keys: Sequence[bytes],
) -> dict[bytes, Place]:
    found: dict[bytes, Place] = {}
    for start in range(0, len(keys), _KEYS_PER_LOOKUP):
        numbers = {_signed(key): key for key in keys[start : start + _KEYS_PER_LOOKUP]}
        marks = ",".join("?" * len(numbers))
        rows = select(
            f"SELECT key, pack, offset FROM objects WHERE key IN ({marks})", tuple(numbers)
        )
        for number, rid, offset in rows:
            found.setdefault(numbers[number], Place(pack_name(rid), offset))
    return found


def _rows_in_key_order(footer: Footer, rid: int) -> Iterator[tuple[int, int, int]]:
    """In key order a leaf is visited once: fewer pages in the write-ahead log. Sorted one range of
    keys after the other, so that memory does not follow the number of records."""
    keys = array("q", footer.joined_keys)
    if sys.byteorder == "little":
        keys.byteswap()
    parts = -(-len(keys) // _ROWS_SORTED_AT_ONCE)
    for part in range(parts):
        low, end = (-(1 << 63) + (number << 64) // parts for number in (part, part + 1))
        yield from sorted(
            (key, rid, offset)
            for key, offset in zip(keys, footer.offsets, strict=True)
            if low <= key < end
        )


def _signed(key: bytes) -> int:
    return int.from_bytes(key, "big", signed=True)


class PackIndex:
    """Opens, catches up and answers. One connection; the caller serialises threads."""

    def __init__(self, dot_dir: str) -> None:
        self._packs_dir = os.path.join(dot_dir, "packs")
        self._path = os.path.join(dot_dir, _FILE_NAME)
        self._lock_path = os.path.join(dot_dir, "index.lock")
        self._lost_path = os.path.join(dot_dir, "lost-packs")
        self._names: dict[int, str] = {}
        self.unreadable: set[str] = set()
        """Packs whose table cannot be read: not indexed, found by `ObjectStore.check`."""
        self._is_private = False
        """Built for this process alone: the file can be neither used nor written."""
        self._is_locked = False
        """Is this the one that holds the writers' lock?"""
        with storage_errors(f"opening the object index {self._path}"):
            os.makedirs(self._packs_dir, 0o700, exist_ok=True)
        self._db = self._open()
        try:
            self.catch_up()
        except BaseException:
            self._db.close()
            raise

    # --- reading ------------------------------------------------------------------------------

    def places(self, key: bytes) -> list[Place]:
        """Records that may be the object, in no order; may be empty."""
        rows = self._select("SELECT pack, offset FROM objects WHERE key = ?", (_signed(key),))
        if not all(rid in self._names for rid, _ in rows):
            # Another process added packs, or joined them since: names and rows of one moment.
            self._names.update(self._select("SELECT rid, name FROM packs", ()))
            rows = self._select("SELECT pack, offset FROM objects WHERE key = ?", (_signed(key),))
        return [Place(self._pack_name(rid), offset) for rid, offset in rows]

    def first_places(self, keys: Sequence[bytes]) -> dict[bytes, Place]:
        """One record for each key that has any, with one look-up for many keys."""
        return _first_places(self._select, self._pack_name, keys)

    def has_key(self, key: bytes) -> bool:
        return bool(self._select("SELECT 1 FROM objects WHERE key = ? LIMIT 1", (_signed(key),)))

    def places_in(self, pack: str) -> set[tuple[bytes, int]]:
        """Key and offset of everything indexed for one pack."""
        rows = self._select(
            "SELECT key, offset FROM objects WHERE pack = (SELECT rid FROM packs WHERE name = ?)",
            (pack,),
        )
        return {(key.to_bytes(KEY_BYTES, "big", signed=True), offset) for key, offset in rows}

    def keys(self) -> set[bytes]:
        """All short keys (8 bytes each; a dot of a million objects has 60 MB of them)."""
        rows = self._select("SELECT DISTINCT key FROM objects", ())
        return {key.to_bytes(KEY_BYTES, "big", signed=True) for (key,) in rows}

    def duplicates(self) -> list[bytes]:
        """Short keys of which there are several records."""
        rows = self._select("SELECT key FROM objects GROUP BY key HAVING count(*) > 1", ())
        return [key.to_bytes(KEY_BYTES, "big", signed=True) for (key,) in rows]

    def contradictions(self) -> list[str]:
        """What SQLite finds wrong in its own structures; the first few. O(size)."""
        return [row[0] for row in self._select("PRAGMA integrity_check(3)", ()) if row[0] != "ok"]

    def packs(self) -> list[PackInfo]:
        """Sealed packs, oldest known first."""
        rows = self._select("SELECT name, bytes, records FROM packs ORDER BY rid", ())
        return [PackInfo(*row) for row in rows]

    def current_place(self, place: Place) -> Place | None:
        """Where the record is now that was at `place` before its pack was joined with others."""
        rows = self._select(
            "SELECT p.name, r.shift FROM replaced r JOIN packs p ON p.rid = r.pack "
            "WHERE r.name = ?",
            (place.pack,),
        )
        return Place(rows[0][0], place.offset + rows[0][1]) if rows else None

    def replaced(self) -> set[str]:
        """Packs whose records are all in one of `packs` now, or swept, and whose files are there
        and to be removed. A pack of the same name that came again is none of them."""
        return set(self._replaced_files())

    def _replaced_files(self) -> dict[str, str]:
        """Of those packs, what tells their files from others."""
        rows = self._select(
            "SELECT r.name, r.file, p.name FROM replaced r JOIN packs p ON p.rid = r.pack "
            "WHERE r.name NOT IN (SELECT name FROM packs) "
            "UNION SELECT name, file, NULL FROM condemned "
            "WHERE name NOT IN (SELECT name FROM packs)",
            (),
        )
        return {
            name: file
            for name, file, joined in rows
            if file == self._file_identity_of(name)
            and (joined is None or self._file_identity_of(joined) is not None)
        }

    def _file_identity_of(self, name: str) -> str | None:
        """What tells the file of a pack from another one that has, or had, the same name. A copy of
        the file is another one too: taking it for a pack costs room and nothing else."""
        try:
            status = os.lstat(os.path.join(self._packs_dir, name))
        except OSError:
            return None
        return f"{status.st_ino}:{status.st_ctime_ns}"

    def remove_replaced_files(self) -> None:
        """Remove the files of `replaced`, durably. Raises StorageFailed."""
        replaced = self._replaced_files()
        if not replaced or self._is_private:
            return
        # Under the lock no file gets a name: what is looked at is what is removed.
        with self._writers_lock():
            if not self._was_superseded():
                same = [n for n, file in replaced.items() if file == self._file_identity_of(n)]
                self._remove_files(same)

    def name_file(self, path: str, name: str) -> None:
        """Give the file of a finished pack its name, while nobody removes one that has had it.
        Raises StorageFull, StorageFailed."""
        with self._writers_lock(), storage_errors(f"sealing pack {name}"):
            os.rename(path, os.path.join(self._packs_dir, name))

    def _remove_files(self, names: Iterable[str]) -> None:
        removed = False
        for name in names:
            with storage_errors(f"removing pack {name}"):
                remove_if_there(os.path.join(self._packs_dir, name))
            removed = True
        if removed:
            fsync_directory(self._packs_dir)

    def _pack_name(self, rid: int) -> str:
        name = self._names.get(rid)
        if name is None:  # another process added it
            self._names = dict(self._select("SELECT rid, name FROM packs", ()))
            name = self._names.get(rid, f"unknown-{rid}{PACK_SUFFIX}")
        return name

    def _select(self, sql: str, values: tuple[object, ...]) -> list[Any]:
        try:
            return self._db.execute(sql, values).fetchall()
        except sqlite3.DatabaseError as exc:
            if isinstance(exc, sqlite3.OperationalError) and not _is_damage(exc):
                raise self._translated(exc) from exc
            if self._is_locked:
                raise  # `_change` starts over, which holds the lock already
            self._rebuild()
            return self._db.execute(sql, values).fetchall()

    # --- changing -----------------------------------------------------------------------------

    def catch_up(self) -> None:
        """Make the index say what the packs directory holds; cheap when nothing changed."""
        if self._was_superseded():
            self._reopen()  # what the old file says is of the past
        with storage_errors(f"listing {self._packs_dir}"):
            listed = {name for name in os.listdir(self._packs_dir) if name.endswith(PACK_SUFFIX)}
        known = {row[0] for row in self._select("SELECT name FROM packs", ())}
        if listed - self.unreadable == known:
            return
        listed -= self.replaced()  # removing them was cut short
        if listed - self.unreadable == known:
            return
        if known and listed and not known & listed and not self._is_private:
            self._rebuild()  # of another dot, or of another time
            return

        def change() -> None:
            if self._was_superseded():
                return
            for name in known - listed:
                if not os.path.lexists(os.path.join(self._packs_dir, name)):
                    self._note_lost(name)
                    self._remove(name)
            for name in sorted(listed - known):
                self._insert_from_file(name)

        try:
            self._change(change)
        except (StorageFull, StorageFailed):
            self._db.close()
            self._build_privately()
        if self._was_superseded():  # just now
            self.catch_up()

    # A file of a pack goes only after the index let go of it; one that the index still names was
    # lost. Its name would go with the rows, so it is kept in a file for fsck.

    def lost_packs(self) -> list[str]:
        """Names of packs that were indexed and whose files are gone, until they are forgotten."""
        with storage_errors(f"reading {self._lost_path}"):
            try:
                with open(self._lost_path, encoding="utf-8", errors="replace") as file:
                    return file.read().splitlines()
            except FileNotFoundError:
                return []

    def forget_lost_packs(self) -> None:
        """Nothing that was in them is missing any more. Raises StorageFailed."""
        with storage_errors(f"removing {self._lost_path}"):
            remove_if_there(self._lost_path)

    def agrees_with_packs(self) -> bool:
        """Whether it says what the tables of the packs say. O(records); what cannot be read is
        passed over."""
        for pack in self.packs():
            try:
                footer, _ = self._read_footer(pack.name)
            except (Corruption, StorageFailed):
                continue
            if self.places_in(pack.name) != set(zip(footer.keys, footer.offsets, strict=True)):
                return False
        return True

    def _note_lost(self, name: str) -> None:
        known = self.lost_packs()
        gone = self._select("SELECT name FROM packs WHERE name = ?", (name,))
        is_name = _PACK_NAME.fullmatch(name) is not None
        if gone and is_name and name not in known and not self._is_private:
            text = "".join(f"{line}\n" for line in [*known, name])
            write_file_atomic(self._lost_path, text.encode())

    def renew(self) -> None:
        """As opened anew: another process may have swept packs, and replaced the file."""
        self._names.clear()
        if self._is_private:
            self._reopen()
        self.catch_up()

    def _reopen(self) -> None:
        self._names.clear()
        self._db.close()
        self._is_private = False
        self._db = self._open()

    def sweep(self, packs: list[tuple[PackInfo, Footer]], gone: Sequence[str]) -> None:
        """Take in new packs and forget others, in one durable transaction. The files of `gone` are
        to be removed when this returns; they are not taken for packs again.

        Raises:
            StorageFull, StorageFailed: nothing has changed.
        """

        def change() -> None:
            listed = set(os.listdir(self._packs_dir))
            for (name,) in self._db.execute("SELECT name FROM condemned").fetchall():
                if name not in listed:
                    self._db.execute("DELETE FROM condemned WHERE name = ?", (name,))
            for info, footer in packs:
                self._insert(info, footer)
            for name in gone:
                self._remove(name)
                file = self._file_identity_of(name)
                if file is not None:
                    self._db.execute("INSERT OR REPLACE INTO condemned VALUES (?, ?)", (name, file))

        if self._is_private:
            raise StorageFull("there is no room for the object index")
        self._change(change, synchronous="FULL", is_repeatable=True)

    def sweep_without_room(self, gone: Sequence[str]) -> None:
        """Remove the index itself, durably, then the files of `gone`, of which nothing claims to be
        there any more. Takes no room. It is built again by whoever opens it next (or by `renew`);
        who opens it meanwhile waits, or it would be built of files that go.

        Raises:
            StorageFailed
        """
        with self._writers_lock():
            with storage_errors(f"removing {self._path}"):
                self._db.close()
                for suffix in ("", "-wal", "-shm"):
                    remove_if_there(self._path + suffix)
                fsync_directory(os.path.dirname(self._path))
            self._remove_files(gone)

    def remove_swept_files(self, gone: Sequence[str]) -> None:
        """Remove the files that `sweep` was given, durably. Raises StorageFailed."""
        with self._writers_lock():
            self._remove_files(gone)

    def _was_superseded(self) -> bool:
        """Has another process removed or replaced the file that is open here?"""
        return not self._is_private and self._identity != self._file_identity()

    def _file_identity(self) -> tuple[int, int] | None:
        try:
            status = os.stat(self._path)
        except OSError:
            return None
        return status.st_dev, status.st_ino

    def add(self, packs: list[tuple[PackInfo, Footer]]) -> None:
        """Index packs that were just sealed."""

        def change() -> None:
            for info, footer in packs:
                self._insert(info, footer)

        self._change(change)

    def replace(self, join: Callable[[list[PackInfo]], JoinedPack | None]) -> bool:
        """Let `join` make a pack that holds all records of others, given all packs, and index it
        in their place, in one transaction. False when it did not.

        The files of those it replaces may go when this returns.
        """
        if self._is_private:
            return False
        joined: JoinedPack | None = None

        def change() -> None:
            nonlocal joined
            joined = join(self.packs())
            if joined is not None:
                self._replace(joined)

        self._change(change)
        return joined is not None

    def _replace(self, joined: JoinedPack) -> None:
        self._insert(joined.info, joined.footer)
        (new,) = self._db.execute(
            "SELECT rid FROM packs WHERE name = ?", (joined.info.name,)
        ).fetchone()
        for name, footer, shift in joined.parts:
            (old,) = self._db.execute("SELECT rid FROM packs WHERE name = ?", (name,)).fetchone()
            self._db.executemany(
                "DELETE FROM objects WHERE key = ? AND pack = ? AND offset = ?",
                [
                    (_signed(key), old, offset)
                    for key, offset in zip(footer.keys, footer.offsets, strict=True)
                ],
            )
            self._db.execute("DELETE FROM packs WHERE rid = ?", (old,))
            self._db.execute(
                "UPDATE replaced SET pack = ?, shift = shift + ? WHERE pack = ?", (new, shift, old)
            )
            self._db.execute(
                "INSERT OR REPLACE INTO replaced (name, pack, shift, file) VALUES (?, ?, ?, ?)",
                (name, new, shift, self._file_identity_of(name) or ""),
            )
        self._db.execute(
            "DELETE FROM replaced WHERE number <= (SELECT max(number) FROM replaced) - ?",
            (REPLACED_KEPT,),
        )

    def _insert(self, info: PackInfo, footer: Footer) -> None:
        # Whatever became of a pack of this name before: this one is not to go.
        self._db.execute("DELETE FROM condemned WHERE name = ?", (info.name,))
        cursor = self._db.execute(
            "INSERT INTO packs (name, bytes, records) VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
            (info.name, info.bytes, info.records),
        )
        if not cursor.rowcount:
            return  # another process saw the file first
        rid = cursor.lastrowid
        assert rid is not None
        self._names[rid] = info.name
        rows = _rows_in_key_order(footer, rid)
        self._db.executemany("INSERT OR IGNORE INTO objects VALUES (?, ?, ?)", rows)

    def _insert_from_file(self, name: str) -> None:
        try:
            footer, info = self._read_footer(name)
        except Corruption:
            # One damaged pack must not take the sound ones away; a read that misses says so.
            self.unreadable.add(name)
            return
        self.unreadable.discard(name)
        self._insert(info, footer)

    def _remove(self, name: str) -> None:
        self._db.execute(
            "DELETE FROM objects WHERE pack = (SELECT rid FROM packs WHERE name = ?)", (name,)
        )
        self._db.execute("DELETE FROM packs WHERE name = ?", (name,))
        self._names.clear()

    def _read_footer(self, name: str) -> tuple[Footer, PackInfo]:
        with storage_errors(f"reading pack {name}"):
            fd = os.open(os.path.join(self._packs_dir, name), os.O_RDONLY | os.O_CLOEXEC)
            try:
                return read_footer(fd, name)
            finally:
                os.close(fd)

    def _change(
        self,
        change: Callable[[], None],
        *,
        synchronous: str = "NORMAL",
        is_repeatable: bool = False,
    ) -> None:
        """Run one transaction; a damaged database is rebuilt, which includes the change: what the
        packs directory says, or where it does not say it, the change done again."""
        if self._is_private:
            self._transact(change)
            return
        with self._writers_lock():
            try:
                if isinstance(self._db, schema.FrozenConnection):
                    self._thaw()
                self._db.execute(f"PRAGMA synchronous={synchronous}")
                self._transact(change)
            except sqlite3.DatabaseError as exc:
                if isinstance(exc, sqlite3.OperationalError) and not _is_damage(exc):
                    raise self._translated(exc) from exc
                if is_repeatable:
                    self._start_over(change, synchronous=synchronous)
                else:
                    self._start_over()

    def _thaw(self) -> None:
        """What was opened as a file nobody can write is to be written now."""
        frozen, self._db = self._db, self._connect()
        frozen.close()

    def rebuild(self) -> None:
        """Read every footer anew: what the database says is not to be believed.

        Raises:
            StorageFull, StorageFailed
        """
        self.unreadable.clear()
        self._rebuild()

    def _rebuild(self) -> None:
        try:
            with self._writers_lock():
                self._start_over()
        except (StorageFull, StorageFailed):
            self._db.close()
            self._build_privately()

    def _build_privately(self) -> None:
        """Read every footer into a database that SQLite keeps in the system's temporary directory
        and that ends with the connection. Raises StorageFull, StorageFailed."""
        self._names = {}
        self._is_private = True
        self._db = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        try:
            self._transact(self._fill)
        except sqlite3.OperationalError as exc:
            raise StorageFull(
                f"building the object index in the temporary directory: {exc}"
            ) from exc

    def _fill(self) -> None:
        self._create()
        for name in sorted(os.listdir(self._packs_dir)):
            if name.endswith(PACK_SUFFIX):
                self._insert_from_file(name)

    def _start_over(
        self, change: Callable[[], None] | None = None, *, synchronous: str = "NORMAL"
    ) -> None:
        """Remove the database, read every footer, and `change` what that says, in one transaction.
        The caller holds the writers' lock.

        Another process may have the old file open: it goes on reading what that says, and what
        it adds there is found again in the packs directory by whoever opens next.
        """
        self._db.close()
        with storage_errors(f"removing the damaged index {self._path}"):
            for suffix in ("-wal", "-shm", ""):
                remove_if_there(self._path + suffix)
        self._names = {}
        self._db = self._connect()
        self._identity = self._file_identity()

        def begin() -> None:
            self._fill()
            if change is not None:
                change()

        try:
            self._db.execute(f"PRAGMA synchronous={synchronous}")
            self._transact(begin)
        except sqlite3.OperationalError as exc:
            raise self._translated(exc) from exc

    def _transact(self, change: Callable[[], None]) -> None:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            change()
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise
        # Only here, under the writers' lock: SQLite before 3.51.3 can lose pages when a
        # checkpoint races a writer that restarts the log.
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    @contextmanager
    def _writers_lock(self) -> Iterator[None]:
        with storage_errors(f"locking {self._lock_path}"):
            fd = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            with storage_errors(f"locking {self._lock_path}"):
                lock_exclusively(fd, wait=True)
            self._is_locked = True
            yield
        finally:
            self._is_locked = False
            os.close(fd)

    # --- opening ------------------------------------------------------------------------------

    def _open(self) -> sqlite3.Connection:
        db = self._opened()
        self._identity = self._file_identity()
        return db

    def _opened(self) -> sqlite3.Connection:
        if os.path.exists(self._path):
            # Shared: while it is held, nobody replaces the file under its name.
            with self._readers_lock():
                db = self._open_to_read()
            if db is not None:
                return db
        try:
            return self._open_to_write()
        except (StorageFull, StorageFailed):
            self._build_privately()
            return self._db

    def _readers_lock(self) -> FileLock:
        return FileLock(self._lock_path, what="the object index", shared=True, wait_s=math.inf)

    def _open_to_read(self) -> sqlite3.Connection | None:
        """A connection to a database that needs no repair; None when it needs some."""
        try:
            return self._checked(self._connect())
        except (StorageFull, StorageFailed, sqlite3.DatabaseError) as exc:
            cause = exc if isinstance(exc, sqlite3.DatabaseError) else exc.__cause__
            if not isinstance(cause, sqlite3.DatabaseError) or not schema.is_unwritable(cause):
                return None
        try:
            frozen = schema.connect_frozen(self._path)
            return None if frozen is None else self._checked(frozen)
        except (FileNotFoundError, sqlite3.DatabaseError):
            return None

    @staticmethod
    def _checked(db: sqlite3.Connection) -> sqlite3.Connection:
        """Raises sqlite3.DatabaseError, having closed it, when it has not our tables."""
        try:
            (version,) = db.execute("PRAGMA user_version").fetchone()
            db.execute("SELECT 1 FROM packs LIMIT 1").fetchone()
            if version != SCHEMA_VERSION:
                raise sqlite3.DatabaseError(f"schema {version}")
        except BaseException:
            db.close()
            raise
        return db

    def _open_to_write(self) -> sqlite3.Connection:
        with self._writers_lock():
            self._db = self._connect()
            try:
                self._make_sound()
            except BaseException:
                self._db.close()
                raise
        return self._db

    def _make_sound(self) -> None:
        try:
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            if version == 0:
                self._transact(self._create)
            elif version != SCHEMA_VERSION:
                self._start_over()
        except sqlite3.DatabaseError as exc:
            if isinstance(exc, sqlite3.OperationalError) and not _is_damage(exc):
                raise self._translated(exc) from exc
            self._start_over()

    def _connect(self) -> sqlite3.Connection:
        with suppress(OSError):  # there already, or SQLite will say what is wrong
            # SQLite would make it as the umask has it; its WAL gets the mode of the file.
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            os.close(os.open(self._path, flags, 0o600))
        try:
            db = sqlite3.connect(
                self._path,
                timeout=_BUSY_TIMEOUT_S,
                isolation_level=None,
                check_same_thread=False,
                factory=schema.CarefulConnection,
            )
        except sqlite3.OperationalError as exc:
            raise self._translated(exc) from exc
        try:
            db.execute("PRAGMA journal_mode=WAL").fetchall()
            db.execute("PRAGMA synchronous=NORMAL")
            db.execute("PRAGMA wal_autocheckpoint=0")
            db.execute(f"PRAGMA cache_size=-{_CACHE_KIB}")
        except sqlite3.DatabaseError as exc:
            if isinstance(exc, sqlite3.OperationalError) and not _is_damage(exc):
                db.close()
                raise self._translated(exc) from exc
            # Not a database: the first statement that needs it starts over.
        return db

    def _create(self) -> None:
        for statement in _SCHEMA.split(";"):
            if statement.strip():
                self._db.execute(statement)
        self._db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def _translated(self, error: sqlite3.Error) -> StorageFull | StorageFailed:
        return schema.storage_error("object index", self._path, error)

    def close(self) -> None:
        self._db.close()


def _is_damage(exc: sqlite3.OperationalError) -> bool:
    """A missing table is damage of a projection; a full disk or a lock is not."""
    text = str(exc)
    return "no such table" in text or "malformed" in text or "decode to UTF-8" in text
