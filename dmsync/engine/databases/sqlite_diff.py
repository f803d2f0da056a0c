"""What differs between two versions of one SQLite database: schema objects and rows by key."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from dmsync.engine.databases.sqlite_changes import (
    Source,
    added_value,
    differs,
    fetch_row,
    has_difference,
    keys_correspond,
    map_columns,
    same_key,
    source,
)
from dmsync.engine.databases.sqlite_files import (
    Database,
    deadline_for,
    recover,
    total_size,
    translated,
)
from dmsync.engine.databases.sqlite_schema import Schema, Table, has_null_key, read_schema
from dmsync.engine.databases.sqlite_values import Row

Kind = Literal["+", "-", "*"]


@dataclass(frozen=True)
class SchemaChange:
    """One table, index, view or trigger that was added, dropped, or has another definition.

    Names and SQL are the file's: control characters and lone surrogates (no UTF-8) may be in them.
    """

    kind: Kind
    type: str
    name: str
    old_sql: str | None
    new_sql: str | None


@dataclass(frozen=True)
class RowChange:
    """One row by its key; `old` and `new` are in the order of the table's `columns`."""

    kind: Kind
    key: Row
    old: Row | None
    new: Row | None


@dataclass(frozen=True)
class TableDiff:
    """The rows of one table that differ: counts of all of them, and the first ones themselves.

    `columns` are those of the new version (of the old one where the table is gone); an old row
    holds for a column it did not have what adding the column gives. `key_columns` is ("rowid",)
    for a table without a declared key; `rows` are in no promised order.
    """

    name: str
    columns: tuple[str, ...]
    key_columns: tuple[str, ...]
    added: int
    removed: int
    changed: int
    rows: tuple[RowChange, ...]
    is_truncated: bool


@dataclass(frozen=True)
class DatabaseDiff:
    """`tables` holds only tables that differ; `uncompared` names what has no rows to compare.

    These are virtual tables whose shadow tables differ (their rows are an index's private pages),
    and tables whose rows nothing can address.
    """

    schema: tuple[SchemaChange, ...]
    tables: tuple[TableDiff, ...]
    uncompared: tuple[str, ...] = ()


def is_sqlite(header: bytes) -> bool:
    """Whether a file that starts with these (at least 16) bytes is an SQLite 3 database."""
    return header[:16] == b"SQLite format 3\0"


def diff_databases(old: str | None, new: str | None, *, rows_max: int) -> DatabaseDiff:
    """Rows and schema that differ between the databases at `old` and `new` (None: no database).

    Both are private copies in a directory of the caller: they are opened for writing, because a
    `-wal` or `-journal` beside them is recovered first. At most `rows_max` rows of each table
    are returned (0: counts only). Raises UnreadableDatabase (sqlite_files) for a file that is
    no sound database, or takes longer than its size justifies.
    """
    paths = [path for path in (old, new) if path is not None]
    if not paths:
        return DatabaseDiff((), ())
    deadline = deadline_for(*paths)
    for path in paths:
        recover(path, deadline=deadline, check=False)
    size = total_size(*paths)
    with translated(paths[-1]), Database(paths[-1], deadline=deadline, length_max=size) as database:
        before = after = None
        if old is not None:
            if new is not None:
                database.attach(old, "old")
            before = read_schema(database, "main" if new is None else "old")
        if new is not None:
            after = read_schema(database, "main")
        return _Comparison(database, before, after, rows_max).result()


class _Comparison:
    """Two schemas on one connection; the newer (or only) one is its main database."""

    def __init__(
        self, database: Database, old: Schema | None, new: Schema | None, rows_max: int
    ) -> None:
        self._database = database
        self._rows_max = rows_max
        self._old = old or Schema("old", {}, {})
        self._new = new or Schema("new", {}, {})

    def result(self) -> DatabaseDiff:
        tables: list[TableDiff] = []
        uncompared: set[str] = set()
        for folded in [*self._new.tables, *(self._old.tables.keys() - self._new.tables.keys())]:
            old, new = self._old.tables.get(folded), self._new.tables.get(folded)
            owner = self._new.owners.get(folded) or self._old.owners.get(folded)
            if owner is not None:
                if self._may_differ(old, new):
                    uncompared.add(self._new.virtual_name(owner) or self._old.virtual_name(owner))
                continue
            found = self._table(old, new)
            if found is None:
                uncompared.update(table.name for table in (new, old) if table is not None)
            elif found.added or found.removed or found.changed:
                tables.append(found)
        by_name = sorted(tables, key=lambda table: table.name)
        return DatabaseDiff(tuple(self._schema()), tuple(by_name), tuple(sorted(uncompared)))

    def _schema(self) -> Iterator[SchemaChange]:
        for at in sorted(self._old.objects.keys() | self._new.objects.keys()):
            old, new = self._old.objects.get(at), self._new.objects.get(at)
            if old is None and new is not None:
                yield SchemaChange("+", new.type, new.name, None, new.sql)
            elif new is None and old is not None:
                yield SchemaChange("-", old.type, old.name, old.sql, None)
            elif old is not None and new is not None and old.sql != new.sql:
                yield SchemaChange("*", new.type, new.name, old.sql, new.sql)

    def _may_differ(self, old: Table | None, new: Table | None) -> bool:
        if old is None or new is None or old.sql != new.sql or not new.key:
            return True
        return has_difference(self._database, *self._sources(old, new))

    def _table(self, old: Table | None, new: Table | None) -> TableDiff | None:
        """The rows that differ; None when they cannot be addressed."""
        old, new = self._addressed(old, new)
        if any(table is not None and not table.key for table in (old, new)):
            return None
        if old is None or new is None or not keys_correspond(old, new):
            return self._replaced(old, new)
        before, after = self._sources(old, new)
        counter = _Counter(self._database, self._rows_max, before, after)
        counter.count(
            f"SELECT {', '.join(after.keys)}, {before.missing} FROM {after.clause} LEFT JOIN"
            f" {before.clause} ON {same_key(before, after)}"
            f" WHERE {before.missing} OR {differs(after, before)}"
        )
        counter.count(
            f"SELECT {', '.join(before.keys)}, 2 FROM {before.clause} LEFT JOIN {after.clause}"
            f" ON {same_key(after, before)} WHERE {after.missing}"
        )
        return counter.result(new)

    def _replaced(self, old: Table | None, new: Table | None) -> TableDiff:
        """All rows of `old` removed, all of `new` added."""
        shown = new or old
        assert shown is not None
        before = None if old is None else _plain_source(self._old.name, old)
        after = None if new is None else _plain_source(self._new.name, new)
        counter = _Counter(self._database, self._rows_max, before, after)
        for found, kind in ((after, 1), (before, 2)):
            if found is not None:
                counter.count(f"SELECT {', '.join(found.keys)}, {kind} FROM {found.clause}")
        return counter.result(shown)

    def _addressed(self, old: Table | None, new: Table | None) -> tuple[Table | None, Table | None]:
        """Both by rowid if either holds a NULL in its key: such a key tells no row from another."""
        for table, schema in ((old, self._old), (new, self._new)):
            if table is None or not table.has_nullable_key:
                continue
            if has_null_key(self._database, schema.name, table):
                return old and old.by_rowid(), new and new.by_rowid()
        return old, new

    def _sources(self, old: Table, new: Table) -> tuple[Source, Source]:
        places = (self._old.name, old), (self._new.name, new)
        columns = map_columns(self._database, *places, with_rows=True)
        defaults = [added_value(column) for column in new.columns]
        before = source(self._old.name, old, columns.origins, defaults)
        return before, source(self._new.name, new, new.column_names, defaults)


class _Counter:
    """Counts the rows that queries of keys find, and fetches the first of them."""

    _KINDS: tuple[Kind, Kind, Kind] = ("*", "+", "-")

    def __init__(
        self, database: Database, rows_max: int, old: Source | None, new: Source | None
    ) -> None:
        self._database = database
        self._rows_max = rows_max
        self._old = old
        self._new = new
        self._counts = [0, 0, 0]
        self._rows: list[RowChange] = []

    def count(self, sql: str) -> None:
        """`sql` selects the key, then 0 for a changed row, 1 for an added, 2 for a removed one."""
        for *key, kind in self._database.execute(sql):
            self._counts[kind] += 1
            if len(self._rows) < self._rows_max:
                self._rows.append(self._row(self._KINDS[kind], tuple(key)))

    def result(self, table: Table) -> TableDiff:
        changed, added, removed = self._counts
        is_truncated = changed + added + removed > len(self._rows)
        columns, rows = table.column_names, tuple(self._rows)
        return TableDiff(
            table.name, columns, table.shown_key, added, removed, changed, rows, is_truncated
        )

    def _row(self, kind: Kind, key: Row) -> RowChange:
        old = fetch_row(self._database, self._old, key) if self._old and kind != "+" else None
        new = fetch_row(self._database, self._new, key) if self._new and kind != "-" else None
        return RowChange(kind, key, old, new)


def _plain_source(schema: str, table: Table) -> Source:
    return source(schema, table, table.column_names, [""] * len(table.columns))
