"""The schema of an SQLite database as what rows can be compared by: tables, columns, keys.

Key of a table, in this order:

- the declared primary key (composite and WITHOUT ROWID too), compared by its own collations;
- a rowid table without one: the rowid. It is a row's place, not its identity: two branches that
  each add a row give both the same rowid, and VACUUM may number rows anew (they look changed);
- none, where columns named rowid, _rowid_ and oid hide the rowid: such rows cannot be addressed.

SQLite permits NULL in primary keys that are neither INTEGER nor WITHOUT ROWID, even several times.
`has_nullable_key` tells such tables; callers look for NULLs before they trust the key.

The shadow tables of a virtual table (`docs_data` of an fts5 table `docs`) are its private pages:
they are listed with their owner, because a mixture of two versions of them means nothing.
"""

import re
from dataclasses import dataclass, field

from dmsync.engine.databases.sqlite_files import Database, UnreadableDatabase
from dmsync.engine.databases.sqlite_values import quote_name

TABLES_MAX = 100_000

_SHADOW_SUFFIXES = {
    "fts3": {b"content", b"segments", b"segdir", b"docsize", b"stat"},
    "fts4": {b"content", b"segments", b"segdir", b"docsize", b"stat"},
    "fts5": {b"data", b"idx", b"content", b"docsize", b"config"},
    "rtree": {b"node", b"rowid", b"parent"},
    "rtree_i32": {b"node", b"rowid", b"parent"},
    "geopoly": {b"node", b"rowid", b"parent"},
}
_VIRTUAL = re.compile(
    r"\s*CREATE\s+VIRTUAL\s+TABLE\b(?:.*?\bUSING\s+[\"'`\[]?(\w+))?", re.IGNORECASE | re.DOTALL
)


def fold(name: str) -> bytes:
    """What SQLite compares of a name: ASCII letters are equal in both cases, others are not."""
    return name.encode("utf-8", "surrogateescape").lower()


@dataclass(frozen=True)
class SchemaObject:
    """A row of sqlite_schema that has SQL: type "table", "index", "view" or "trigger"."""

    type: str
    name: str
    table: str
    sql: str

    @property
    def id(self) -> tuple[str, bytes]:
        return self.type, fold(self.name)

    @property
    def module(self) -> str:
        """The module of a virtual table; "" for everything else."""
        match = _VIRTUAL.match(self.sql) if self.type == "table" else None
        return "" if match is None else (match[1] or "?").lower()

    @property
    def has_no_pages(self) -> bool:
        """Whether it is text alone: a trigger, a view, a virtual table."""
        return self.type in ("trigger", "view") or self.module != ""


@dataclass(frozen=True)
class Column:
    name: str
    type: str
    default: str | None  # SQL text


@dataclass(frozen=True)
class ForeignKey:
    """`parent_columns` are () for the parent's primary key."""

    id: int
    parent: str
    columns: tuple[str, ...]
    parent_columns: tuple[str, ...]


@dataclass(frozen=True)
class KeyColumn:
    name: str
    type: str
    collation: str


@dataclass(frozen=True)
class Table:
    """An ordinary table. `columns` are those that store what was written (no generated ones).

    `key` names the declared primary key, or the rowid where `is_keyless`; it is () when rows cannot
    be addressed. `rowid` is a name of the rowid, "" when there is none or a column shows it.
    """

    name: str
    sql: str
    columns: tuple[Column, ...]
    key: tuple[KeyColumn, ...]
    rowid: str
    is_keyless: bool
    has_nullable_key: bool

    @property
    def key_names(self) -> tuple[str, ...]:
        return tuple(column.name for column in self.key)

    @property
    def shown_key(self) -> tuple[str, ...]:
        """`key_names` as people know them: a rowid is called rowid."""
        return ("rowid",) if self.is_keyless else self.key_names

    @property
    def column_names(self) -> tuple[str, ...]:
        return tuple(column.name for column in self.columns)

    def by_rowid(self) -> "Table | None":
        """The same table addressed by rowid; None when it has none."""
        if not self.rowid:
            return None
        key = (KeyColumn(self.rowid, "INTEGER", "BINARY"),)
        return Table(self.name, self.sql, self.columns, key, self.rowid, True, False)


@dataclass(frozen=True)
class Schema:
    """All objects of one database; `owners` maps (folded) shadow tables to virtual tables."""

    name: str
    objects: dict[tuple[str, bytes], SchemaObject]
    tables: dict[bytes, Table]
    virtual: dict[bytes, str] = field(default_factory=dict)
    owners: dict[bytes, bytes] = field(default_factory=dict)

    def virtual_name(self, owner: bytes) -> str:
        """The name of a virtual table by its folded name; "" when there is none."""
        found = self.objects.get(("table", owner))
        return "" if found is None or owner not in self.virtual else found.name


def read_schema(database: Database, name: str) -> Schema:
    """The schema of the attached database `name` ("main" or as attached).

    Raises sqlite3.Error (see `sqlite_files.translated`) and UnreadableDatabase.
    """
    objects = read_objects(database, name)
    virtual = {fold(found.name): found.module for found in objects.values() if found.module}
    tables = {
        fold(found.name): read_table(database, name, found)
        for found in objects.values()
        if found.type == "table" and fold(found.name) not in virtual
    }
    owners = {table: owner for table in tables if (owner := _owner(table, virtual))}
    return Schema(name, objects, tables, virtual, owners)


def read_foreign_keys(database: Database, name: str, table: str) -> list[ForeignKey]:
    """The foreign keys that `table` of the attached database `name` declares."""
    keys: dict[int, tuple[str, list[str], list[str]]] = {}
    for row in database.execute(f"PRAGMA {name}.foreign_key_list({quote_name(table)})"):
        _, columns, parents = keys.setdefault(row[0], (row[2], [], []))
        columns.append(row[3])
        if row[4] is not None:
            parents.append(row[4])
    return [
        ForeignKey(number, parent, tuple(columns), tuple(parents))
        for number, (parent, columns, parents) in keys.items()
    ]


def has_null_key(database: Database, name: str, table: Table) -> bool:
    """Whether a row of `table` in the attached database `name` has a NULL in its key."""
    nulls = " OR ".join(f"{quote_name(column)} IS NULL" for column in table.key_names)
    sql = f"SELECT 1 FROM {name}.{quote_name(table.name)} WHERE {nulls} LIMIT 1"
    return database.execute(sql).fetchone() is not None


def read_objects(database: Database, name: str) -> dict[tuple[str, bytes], SchemaObject]:
    sql = f"SELECT type, name, tbl_name, sql FROM {name}.sqlite_schema WHERE sql IS NOT NULL"
    objects: dict[tuple[str, bytes], SchemaObject] = {}
    for row in database.execute(sql):
        if not all(isinstance(value, str) for value in row):
            raise UnreadableDatabase("the schema of the database holds values that are no text")
        found = SchemaObject(*row)
        if found.name.lower().startswith("sqlite_"):
            continue  # sequences and statistics are SQLite's own
        if objects.setdefault(found.id, found) is not found or len(objects) > TABLES_MAX:
            raise UnreadableDatabase(
                "the schema of the database is too large or contradicts itself"
            )
    return objects


def read_table(database: Database, schema: str, found: SchemaObject) -> Table:
    quoted = quote_name(found.name)
    rows = database.execute(f"PRAGMA {schema}.table_xinfo({quoted})").fetchall()
    if not rows:
        raise UnreadableDatabase(f"the table {found.name} cannot be read")
    columns = tuple(Column(row[1], row[2], row[4]) for row in rows if row[6] == 0)
    primary = sorted((row for row in rows if row[5]), key=lambda row: int(row[5]))
    is_rowid = database.execute(f"PRAGMA {schema}.index_info({quoted})").fetchone() is None
    rowid = _rowid_name(rows) if is_rowid else ""
    indexes = database.execute(f"PRAGMA {schema}.index_list({quoted})").fetchall()
    own_index = next((row[1] for row in indexes if row[3] == "pk"), None)
    is_alias = bool(primary) and is_rowid and own_index is None
    collations = {} if own_index is None else _collations(database, schema, own_index)
    key = tuple(
        KeyColumn(row[1], row[2].upper(), collations.get(fold(row[1]), "BINARY")) for row in primary
    )
    if primary:
        nullable = is_rowid and not is_alias and not all(row[3] for row in primary)
        rowid = "" if is_alias else rowid
        return Table(found.name, found.sql, columns, key, rowid, False, nullable)
    by_rowid = Table(found.name, found.sql, columns, (), rowid, True, False).by_rowid()
    return by_rowid or Table(found.name, found.sql, columns, (), "", True, False)


def _rowid_name(rows: list[tuple[object, ...]]) -> str:
    taken = {fold(str(row[1])) for row in rows}
    return next((name for name in ("rowid", "_rowid_", "oid") if name.encode() not in taken), "")


def _collations(database: Database, schema: str, index: str) -> dict[bytes, str]:
    rows = database.execute(f"PRAGMA {schema}.index_xinfo({quote_name(index)})")
    return {fold(row[2]): row[4].upper() for row in rows if row[5] and row[2] is not None}


def _owner(table: bytes, virtual: dict[bytes, str]) -> bytes | None:
    """The virtual table whose shadow `table` is: the one with the longest name that fits."""
    end = table.rfind(b"_")
    while end > 0:
        module = virtual.get(table[:end])
        if module is not None:
            suffixes = _SHADOW_SUFFIXES.get(module)
            # of a module we do not know, every table that bears its name may be its own
            if suffixes is None or table[end + 1 :] in suffixes:
                return table[:end]
        end = table.rfind(b"_", 0, end)
    return None
