"""SQL that finds what differs between versions of one table, without passing rows through Python.

Versions are attached databases read in key order and looked up in each other by key, so memory does
not grow with a table. Values are the same only if type and bytes are: 1, 1.0, '1' and x'31' differ,
'a' and 'A' differ whatever the collation, 0.0 and -0.0 differ.
"""

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

from dmsync.engine.databases.sqlite_files import Database
from dmsync.engine.databases.sqlite_schema import Column, Table, fold
from dmsync.engine.databases.sqlite_values import Row, decode_text, quote_name


@dataclass(frozen=True)
class Source:
    """One version of a table as SQL: attached database `schema` (its alias too), key, cells.

    `cells` are expressions in the order of the columns compared; a column this version does not
    have is the value that adding it gave to every row. `rowid` is NULL where the table has none.
    """

    schema: str
    table: str
    keys: tuple[str, ...]
    cells: tuple[str, ...]
    rowid: str = "NULL"

    @property
    def clause(self) -> str:
        return f"{self.schema}.{quote_name(self.table)} AS {self.schema}"

    @property
    def missing(self) -> str:
        """True for the row of NULLs of an outer join (keys are never NULL: callers see to it)."""
        return f"{self.keys[0]} IS NULL"


@dataclass(frozen=True)
class ColumnMap:
    """Which old column each column of a newer definition was; "" for one that is new.

    `dropped` are old columns that the newer definition no longer has.
    """

    origins: tuple[str, ...]
    dropped: tuple[str, ...]


def source(schema: str, table: Table, columns: Sequence[str], defaults: Sequence[str]) -> Source:
    """`table` of the attached database `schema`: `columns` by name, "" for what `defaults` say."""
    cells = [
        f"{schema}.{quote_name(name)}" if name else default
        for name, default in zip(columns, defaults, strict=True)
    ]
    keys = tuple(f"{schema}.{quote_name(name)}" for name in table.key_names)
    rowid = f"{schema}.{quote_name(table.rowid)}" if table.rowid else "NULL"
    return Source(schema, table.name, keys, tuple(cells), rowid)


def same_key(left: Source, right: Source) -> str:
    """True where both rows have one key, by the collation of the left (an index of it serves)."""
    pairs = zip(left.keys, right.keys, strict=True)
    return " AND ".join(f"{one} = {other}" for one, other in pairs)


def differs(left: Source, right: Source) -> str:
    """True where a cell differs in type or content."""
    return either([_cell_differs(*pair) for pair in zip(left.cells, right.cells, strict=True)])


def either(terms: list[str]) -> str:
    """Their OR as a balanced tree: tables have 2000 columns, expressions a depth of 1000."""
    if not terms:
        return "0"
    if len(terms) == 1:
        return terms[0]
    middle = len(terms) // 2
    return f"({either(terms[:middle])} OR {either(terms[middle:])})"


def has_difference(database: Database, old: Source, new: Source) -> bool:
    """Whether the two versions of a table hold different rows."""
    join = f"FROM {new.clause} LEFT JOIN {old.clause} ON {same_key(old, new)}"
    changed = f"SELECT 1 {join} WHERE {old.missing} OR {differs(new, old)} LIMIT 1"
    if database.execute(changed).fetchone() is not None:
        return True
    join = f"FROM {old.clause} LEFT JOIN {new.clause} ON {same_key(new, old)}"
    removed = f"SELECT 1 {join} WHERE {new.missing} LIMIT 1"
    return database.execute(removed).fetchone() is not None


def has_changed_cell(database: Database, old: Source, new: Source) -> bool:
    """Whether a row that both versions hold differs in a cell."""
    join = f"FROM {new.clause} CROSS JOIN {old.clause} ON {same_key(old, new)}"
    sql = f"SELECT 1 {join} WHERE {differs(new, old)} LIMIT 1"
    return database.execute(sql).fetchone() is not None


def keys_correspond(old: Table, new: Table) -> bool:
    """Whether rows of both definitions can be found by each other's key."""
    if len(old.key) != len(new.key) or not old.key or old.is_keyless != new.is_keyless:
        return False
    if old.is_keyless:
        return True
    positions_old = {fold(column.name): at for at, column in enumerate(old.columns)}
    positions_new = {fold(column.name): at for at, column in enumerate(new.columns)}
    return all(
        (one.type, one.collation) == (other.type, other.collation)
        and (
            fold(one.name) == fold(other.name)
            or positions_old[fold(one.name)] == positions_new[fold(other.name)]
        )
        for one, other in zip(old.key, new.key, strict=True)
    )


def map_columns(
    database: Database, old: tuple[str, Table], new: tuple[str, Table], *, with_rows: bool
) -> ColumnMap:
    """Columns of `new` by name in `old` (each: attached database and table), renames too.

    A column is renamed if at its place, with its type, stands another name, and most rows of both
    versions hold the same value there. `with_rows`: the keys of both correspond.
    """
    names = {fold(column.name): column.name for column in old[1].columns}
    origins = [names.pop(fold(column.name), "") for column in new[1].columns]
    for at, column in enumerate(new[1].columns):
        before = old[1].columns[at] if at < len(old[1].columns) else None
        if origins[at] or before is None or fold(before.name) not in names:
            continue
        if before.type.upper() != column.type.upper():
            continue
        if with_rows and _holds_the_same(database, old, before.name, new, column.name):
            origins[at] = names.pop(fold(before.name))
    return ColumnMap(tuple(origins), tuple(names.values()))


def added_value(column: Column) -> str:
    """What a row has in `column` right after the column was added to its table, as SQL.

    Only constants are defaults of added columns; anything else counts as NULL.
    """
    if column.default is None:
        return "NULL"
    with closing(sqlite3.connect(":memory:")) as empty:
        try:
            empty.set_authorizer(_deny_statements)
            empty.text_factory = decode_text
            sql = f"CREATE TABLE t(k, c {quote_name(column.type)} DEFAULT {column.default})"
            empty.execute(sql if column.type else sql.replace('""', ""))
            empty.execute("INSERT INTO t(k) VALUES (1)")
            value = empty.execute("SELECT quote(c) FROM t").fetchone()[0]
        except (sqlite3.Error, ValueError):
            return "NULL"
    return str(value)


def fetch_row(database: Database, found: Source, key: Row) -> Row | None:
    """The cells of the row of `found` with this key; None when there is none."""
    terms = " AND ".join(
        f"{name} = {bound(value)}" for name, value in zip(found.keys, key, strict=True)
    )
    cells = ", ".join(found.cells)
    sql = f"SELECT {cells} FROM {found.clause} WHERE {terms}"
    row = database.execute(sql, tuple(bindable(value) for value in key)).fetchone()
    return None if row is None else tuple(row)


def bound(value: object) -> str:
    """The SQL of a bound parameter for `bindable(value)`."""
    return (
        "CAST(? AS TEXT)" if isinstance(bindable(value), bytes) and isinstance(value, str) else "?"
    )


def bindable(value: object) -> object:
    """`value` as Python's sqlite3 takes it: text that is no UTF-8 as its bytes (see `bound`)."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return value.encode("utf-8", "surrogateescape")
    return value


def _cell_differs(one: str, other: str) -> str:
    # unary plus takes the affinity away: SQLite would compare '1' with 1 as numbers
    return (
        f"(typeof({one}) <> typeof({other}) OR +{one} IS NOT +{other} COLLATE BINARY"
        f" OR (+{one} = 0.0 AND dm_sign({one}) <> dm_sign({other})))"
    )


def _holds_the_same(
    database: Database, old: tuple[str, Table], old_name: str, new: tuple[str, Table], new_name: str
) -> bool:
    before = source(*old, [old_name], ["NULL"])
    after = source(*new, [new_name], ["NULL"])
    sql = (
        f"SELECT count(*), total(NOT {differs(after, before)}) FROM {after.clause}"
        f" CROSS JOIN {before.clause} ON {same_key(before, after)}"
    )
    rows, equal = database.execute(sql).fetchone()
    return bool(equal * 2 > rows or not rows)


def _deny_statements(action: int, *arguments: object) -> int:
    allowed = {
        sqlite3.SQLITE_CREATE_TABLE,
        sqlite3.SQLITE_INSERT,
        sqlite3.SQLITE_READ,
        sqlite3.SQLITE_TRANSACTION,
        sqlite3.SQLITE_UPDATE,
    }
    if action == sqlite3.SQLITE_SELECT:
        return sqlite3.SQLITE_OK
    if action == sqlite3.SQLITE_FUNCTION:
        return sqlite3.SQLITE_OK if arguments[1] == "quote" else 1
    return sqlite3.SQLITE_OK if action in allowed else 1
