"""Three-way merge of SQLite databases, row by row, by primary key.

The result is a copy of ours. Triggers, views and virtual tables are taken out of its schema before
anything else and written back at the end, so none of them runs; what theirs changed since base is
collected (sqlite_plans), then applied in rounds: a row of theirs that a constraint or a foreign key
keeps out is left out and becomes a conflict, and the round is repeated without it until none is.
Afterwards the file must pass `PRAGMA integrity_check` and `PRAGMA foreign_key_check`.

What is not merged by rows, and refused where both sides changed it: one schema object, a virtual
table with its shadow tables, a table with NULL in its keys, `user_version` and `application_id`.
Sequences of AUTOINCREMENT take the greater value; statistics of ANALYZE stay those of ours.

A table without a declared key has rowids for keys. Both sides adding rows there is no conflict: a
row of theirs whose rowid ours gave to another one is appended with a new rowid.
"""

import os
import shutil
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from dmsync.engine.databases.sqlite_changes import Source, bindable, bound
from dmsync.engine.databases.sqlite_files import (
    Database,
    UnreadableDatabase,
    check_companions,
    deadline_for,
    integrity_problem,
    recover,
    total_size,
    translated,
)
from dmsync.engine.databases.sqlite_plans import (
    CONFLICT_REASONS,
    VIOLATIONS,
    Planner,
    TablePlan,
    brings_rows,
    by_name,
    check_units,
    collect_incoming,
)
from dmsync.engine.databases.sqlite_schema import (
    ForeignKey,
    SchemaObject,
    Table,
    fold,
    read_foreign_keys,
    read_objects,
    read_schema,
    read_table,
)
from dmsync.engine.databases.sqlite_schema_merge import (
    MergedSchema,
    Refused,
    merge_schemas,
    put_back,
    strip,
)
from dmsync.engine.databases.sqlite_values import (
    Row,
    printable,
    quote_name,
    row_from_json,
    row_to_json,
)
from dmsync.errors import MergeConflict

ROUNDS_MAX = 100  # each leaves out at least one row; real schemas settle in two or three
CONFLICT_BYTES_MAX = 64 * 1024 * 1024  # conflicts are kept in memory, in events and in listings

Side = Literal["ours", "theirs"]


@dataclass(frozen=True)
class RowConflict:
    """One row that needs a decision; the merged database holds `ours` (None: no row).

    `base`, `ours`, `theirs` are in the order of `columns`; `key` in that of `key_columns`, which is
    ("rowid",) for a table without a declared key. Reasons: "changed twice", "deleted by ours",
    "deleted by theirs", "added twice", and for a row of theirs that a constraint keeps out:
    "unique", "not null", "check", "datatype", "foreign key".
    """

    table: str
    key_columns: tuple[str, ...]
    columns: tuple[str, ...]
    key: Row
    base: Row | None
    ours: Row | None
    theirs: Row | None
    reason: str

    def to_json(self) -> dict[str, object]:
        """A JSON-safe mapping from which `from_json` gives back an equal conflict."""
        return {
            "table": self.table,
            "key_columns": list(self.key_columns),
            "columns": list(self.columns),
            "key": row_to_json(self.key),
            "base": row_to_json(self.base),
            "ours": row_to_json(self.ours),
            "theirs": row_to_json(self.theirs),
            "reason": self.reason,
        }

    @classmethod
    def from_json(cls, encoded: Mapping[str, object]) -> "RowConflict":
        """The conflict of `to_json`. Raises ValueError or KeyError for anything else."""
        names = encoded["key_columns"], encoded["columns"]
        texts = encoded["table"], encoded["reason"]
        key = row_from_json(encoded["key"])
        if not all(isinstance(name, list) for name in names) or key is None:
            raise ValueError("not a conflict of rows")
        return cls(
            str(texts[0]),
            tuple(map(str, names[0])),  # type: ignore[call-overload]
            tuple(map(str, names[1])),  # type: ignore[call-overload]
            key,
            row_from_json(encoded["base"]),
            row_from_json(encoded["ours"]),
            row_from_json(encoded["theirs"]),
            str(texts[1]),
        )


@dataclass(frozen=True)
class MergeCounts:
    """Rows of theirs that went into the result, by what they did there; `favoured`: of these or
    left out, conflicts that `favour` decided."""

    added: int = 0
    changed: int = 0
    removed: int = 0
    favoured: int = 0


@dataclass(frozen=True)
class RowMerge:
    """`refused` is "" or why the files can only conflict as a whole (then no result is written)."""

    conflicts: tuple[RowConflict, ...]
    refused: str
    counts: MergeCounts = MergeCounts()


def merge_databases(
    *,
    base: str,
    ours: str,
    theirs: str,
    result: str,
    favour: Side | None,
    conflicts_max: int,
) -> RowMerge:
    """Merges what `theirs` changed since `base` into a copy of `ours`, written to `result`.

    All are paths in a private directory; what `-wal` and `-journal` beside a version hold is
    recovered first. `favour` decides conflicts, except where a constraint keeps a row out. Never
    raises for what the files hold: what cannot be merged by rows, or has more than
    `conflicts_max` conflicts, is `refused`, and `result` does not exist then. Raises StorageFull,
    StorageFailed.
    """
    try:
        return _merge(base, ours, theirs, result, favour, conflicts_max)
    except (Refused, UnreadableDatabase) as error:
        _remove(result)
        return RowMerge((), printable(str(error)))
    except BaseException:
        _remove(result)
        raise


def resolve_row(path: str, conflict: RowConflict, side: Literal["ours", "theirs", "base"]) -> None:
    """Makes the row of `conflict` in the database at `path` what it is in `side` (None: deleted).

    Triggers do not fire. Raises MergeConflict when a constraint or a foreign key forbids it,
    UnreadableDatabase for a file that is no sound database; nothing is changed then.
    """
    resolve_rows(path, [(conflict, side)])


def resolve_rows(
    path: str, choices: Sequence[tuple[RowConflict, Literal["ours", "theirs", "base"]]]
) -> None:
    """`resolve_row` of several rows in one transaction, checked once at the end (all or none)."""
    deadline, size = deadline_for(path), total_size(path)
    size += sum(_bytes_of(row) for conflict, _ in choices for row in _rows(conflict))
    check_companions(path)
    with translated(path), Database(path, deadline=deadline, length_max=size) as database:
        objects = read_objects(database, "main")
        tables = {fold(conflict.table): conflict.table for conflict, _ in choices}
        triggers = [
            found
            for found in objects.values()
            if found.type == "trigger" and fold(found.table) in tables
        ]
        database.execute("BEGIN IMMEDIATE")
        try:
            for trigger in triggers:
                database.execute(f"DROP TRIGGER main.{quote_name(trigger.name)}")
            _write_choices(database, objects, choices)
            _check_resolved(database)
            put_back(database, triggers)
            database.execute("COMMIT")
        except sqlite3.IntegrityError as error:
            reason = _violation(error)
            raise MergeConflict(
                f"the row cannot be written: {error}",
                hint="resolve the row it collides with first, or edit the database",
                reason=reason,
            ) from error
        finally:
            if database.connection.in_transaction:
                database.execute("ROLLBACK")


def _merge(
    base: str, ours: str, theirs: str, result: str, favour: Side | None, conflicts_max: int
) -> RowMerge:
    paths = base, ours, theirs
    size, deadline = total_size(*paths), deadline_for(*paths)
    versions = [recover(path, deadline=deadline, check=True) for path in paths]
    shutil.copyfile(ours, result)
    with translated(result), Database(result, deadline=deadline, length_max=size) as database:
        strip(database)
    with translated(result), Database(result, deadline=deadline, length_max=size) as database:
        for path, name in zip(paths, ("base", "ours", "theirs"), strict=True):
            database.attach(path, name)
        merger = _Merger(database, favour, conflicts_max)
        outcome = merger.run()
    with translated(result), Database(result, deadline=deadline, length_max=size) as database:
        database.execute("BEGIN IMMEDIATE")
        put_back(database, merger.merged.stripped())
        database.execute("COMMIT")
    with translated(result), Database(result, deadline=deadline, length_max=size) as database:
        _check_result(database, merger.merged)
        if versions[1].journal_mode == "wal":
            database.pragma("journal_mode=WAL")
    return outcome


class _Merger:
    """One merge on a connection whose main database becomes the result, with three attached."""

    def __init__(self, database: Database, favour: Side | None, conflicts_max: int) -> None:
        self._database = database
        self._favour = favour
        self._conflicts_max = conflicts_max
        self._schemas = (
            read_schema(database, "base"),
            read_schema(database, "ours"),
            read_schema(database, "theirs"),
        )
        self.merged: MergedSchema = merge_schemas(*self._schemas)
        self._plans: list[TablePlan] = []

    def run(self) -> RowMerge:
        """Applies theirs. Raises Refused, UnreadableDatabase, sqlite3.Error."""
        database = self._database
        database.execute("PRAGMA synchronous=0")  # a private file: a crash throws it away
        database.execute("BEGIN IMMEDIATE")
        plans = Planner(database, self._schemas, self.merged).plans()
        for plan in plans:
            if not (plan.unit or plan.is_rebuilt or brings_rows(database, plan)):
                continue
            self._plans.append(plan)
            collect_incoming(database, plan)
        virtual = check_units(database, self._plans)
        favoured = self._decide()
        self._apply_until_stable()
        if virtual and self._left_out():
            raise Refused(f"the {min(virtual)} of theirs describes rows that are left out")
        self._merge_sequences()
        self._merge_header("user_version")
        self._merge_header("application_id")
        outcome = RowMerge(self._conflicts(), "", self._counts(favoured))
        database.execute("COMMIT")
        return outcome

    def _decide(self) -> int:
        """Lets `favour` decide the conflicts; how many there were. Raises Refused for too many."""
        marks = _texts(CONFLICT_REASONS)
        verdict = {"ours": "favoured", "theirs": "apply", None: None}[self._favour]
        total = 0
        for plan in self._plans:
            where = f"WHERE verdict IN ({marks})"
            total += self._count(plan, where)
            if verdict is not None:
                sql = f"UPDATE {plan.incoming} SET verdict = '{verdict}' {where}"
                self._database.execute(sql)
        if verdict is None:
            self._check_number(total)
            return 0
        return total

    # --- applying ----------------------------------------------------------------------------

    def _apply_until_stable(self) -> None:
        left_out = 0
        for _ in range(ROUNDS_MAX):
            self._database.execute("SAVEPOINT round")
            rejected = self._apply()
            if not rejected:
                self._database.execute("RELEASE round")
                return
            self._database.execute("ROLLBACK TO round")
            self._database.execute("RELEASE round")
            for plan, row, reason in rejected:
                if plan.unit:
                    raise Refused(f"a row of the {plan.unit} would violate: {reason}")
                sql = f"UPDATE {plan.incoming} SET verdict = ? WHERE id = ?"
                self._database.execute(sql, (reason, row))
            left_out += len(rejected)
            self._check_number(left_out)
        raise Refused("leaving out rows that violate constraints comes to no end")

    def _apply(self) -> list[tuple[TablePlan, int, str]]:
        """One try; the incoming rows that must be left out, and why."""
        for plan in self._plans:
            if plan.ours is not None:
                self._delete_old_rows(plan, plan.ours)
        self._reshape()
        rejected = [
            (plan, row, reason)
            for plan in self._plans
            for row, reason in self._insert_new_rows(plan)
        ]
        if rejected:
            return rejected
        for found in self._incoming_objects("index"):
            self._create(found)
        return self._foreign_key_violations()

    def _delete_old_rows(self, plan: TablePlan, ours: Source) -> None:
        # the table in main is still defined as ours is: their names are the same there
        table = f"main.{quote_name(ours.table)}"
        columns = ", ".join(f"{table}.{key.split('.', 1)[1]}" for key in ours.keys)
        slots = ", ".join(f"i.{slot}" for slot in plan.key_slots)
        self._database.execute(
            f"DELETE FROM {table} WHERE ({columns}) IN"
            f" (SELECT {slots} FROM {plan.incoming} AS i WHERE i.verdict = 'apply')"
        )

    def _reshape(self) -> None:
        """Tables and indexes of theirs, except indexes over rows that are not there yet."""
        ours = self._schemas[1]
        gone = self.merged.dropped | (self.merged.incoming & ours.objects.keys())
        rebuilt = {fold(plan.final.name): plan for plan in self._plans if plan.is_rebuilt}
        kept = [
            found
            for at, found in self.merged.objects.items()
            if found.type == "index" and at in ours.objects and at not in self.merged.incoming
        ]
        for at in sorted(gone, key=lambda at: at[0] == "table"):  # indexes first
            found = ours.objects[at]
            if found.has_no_pages or (found.type == "table" and at[1] in rebuilt):
                continue
            self._database.execute(f"DROP {found.type.upper()} main.{quote_name(found.name)}")
        for plan in rebuilt.values():
            self._rebuild(plan)
            for found in kept:
                if fold(found.table) == fold(plan.final.name):
                    self._create(found)
        for found in self._incoming_objects("table"):
            if fold(found.name) not in rebuilt:
                self._create(found)

    def _rebuild(self, plan: TablePlan) -> None:
        """Gives a table of ours the definition of theirs, with the rows it holds."""
        table = f"main.{quote_name(plan.final.name)}"
        names, ours = _insert_columns(plan), plan.ours
        slots = ", ".join(f"c{at}" for at in range(len(names)))
        if ours is not None:
            cells = ", ".join([*ours.cells, ours.rowid][: len(names)])
            self._database.execute(f"CREATE TEMP TABLE kept ({slots})")
            self._database.execute(
                f"INSERT INTO temp.kept SELECT {cells} FROM main.{quote_name(ours.table)} AS ours"
            )
        self._database.execute(f"DROP TABLE {table}")
        self._create(self.merged.objects["table", fold(plan.final.name)])
        if ours is not None:
            try:
                self._database.execute(
                    f"INSERT OR ABORT INTO {table} ({', '.join(names)})"
                    f" SELECT {slots} FROM temp.kept"
                )
            except sqlite3.IntegrityError as error:
                raise Refused(
                    f"rows of ours do not fit the new definition of {plan.final.name}: {error}"
                ) from error
            self._database.execute("DROP TABLE temp.kept")

    def _insert_new_rows(self, plan: TablePlan) -> list[tuple[int, str]]:
        """All at once; row by row where a constraint objects. Returns the ids left out, and why."""
        rejected: list[tuple[int, str]] = []
        table, theirs = f"main.{quote_name(plan.final.name)}", plan.theirs
        for verdict in ("apply", "append") if plan.final.is_keyless else ("apply",):
            names, cells = _insert_columns(plan), list(theirs.cells)
            if verdict == "append":
                names = names[:-1]  # without the rowid
            elif plan.final.is_keyless:
                cells.append(theirs.rowid)
            elif plan.final.rowid:
                cells.append(_free_rowid(table, plan))
            where = f"i.verdict = '{verdict}' AND i.op <> 'delete'"
            insert = (
                f"INSERT OR ABORT INTO {table} ({', '.join(names)}) SELECT {', '.join(cells)}"
                f" FROM {plan.incoming} AS i CROSS JOIN {theirs.clause}"
                f" ON {plan.key_of_incoming(theirs)} WHERE {where}"
            )
            try:
                self._database.execute(insert)
            except sqlite3.IntegrityError:
                ids = f"SELECT i.id FROM {plan.incoming} AS i WHERE {where}"
                for (row,) in self._database.execute(ids).fetchall():
                    try:
                        self._database.execute(f"{insert} AND i.id = ?", (row,))
                    except sqlite3.IntegrityError as error:
                        rejected.append((row, _violation(error)))
                        self._check_number(len(rejected))
        return rejected

    def _incoming_objects(self, kind: str) -> Iterator[SchemaObject]:
        for at in sorted(self.merged.incoming):
            found = self.merged.objects[at]
            if found.type == kind and not found.has_no_pages:
                yield found

    def _create(self, found: SchemaObject) -> None:
        """Runs the CREATE statement a file holds, and makes sure that it was what it seemed."""
        try:
            self._database.execute_schema(found.sql)
        except sqlite3.IntegrityError as error:
            raise Refused(f"{found.type} {found.name} does not fit the rows: {error}") from error
        row = self._database.execute(
            "SELECT sql FROM main.sqlite_schema WHERE type = ? AND name = ?",
            (found.type, found.name),
        ).fetchone()
        if row is None or row[0] != found.sql:
            raise Refused(f"{found.type} {found.name} has a definition that cannot be repeated")

    # --- foreign keys ------------------------------------------------------------------------

    def _foreign_key_violations(self) -> list[tuple[TablePlan, int, str]]:
        broken = {(row[0], row[3]) for row in self._database.execute("PRAGMA foreign_key_check")}
        keys = [
            (table, key)
            for table, number in sorted(broken)
            for key in read_foreign_keys(self._database, "main", table)
            if key.id == number
        ]
        found = [row for table, key in keys for row in self._orphans(table, key)]
        found = found or [row for table, key in keys for row in self._lost_parents(table, key)]
        if broken and not found:
            table = min(broken)[0]
            raise Refused(f"a foreign key of the table {table} is violated, not by rows of theirs")
        return [(plan, row, "foreign key") for plan, row in dict.fromkeys(found)]

    def _orphans(self, table: str, key: ForeignKey) -> Iterator[tuple[TablePlan, int]]:
        """Rows that theirs put into `table` and that have no parent."""
        plan = by_name(self._plans, table)
        if plan is None:
            return
        values = _cells_named(plan, plan.theirs, key.columns)
        yield from self._rows_of(
            plan,
            f"SELECT i.id FROM {plan.incoming} AS i CROSS JOIN {plan.theirs.clause}"
            f" ON {plan.key_of_incoming(plan.theirs)}"
            f" WHERE i.verdict IN ('apply', 'append') AND i.op <> 'delete'"
            f" AND {self._has_no_parent(key, values)}",
        )

    def _lost_parents(self, table: str, key: ForeignKey) -> Iterator[tuple[TablePlan, int]]:
        """Rows that theirs deleted or changed and that a row of `table` refers to."""
        plan = by_name(self._plans, key.parent)
        if plan is None or plan.ours is None:
            return
        children = [f"child.{quote_name(column)}" for column in key.columns]
        referred = _cells_named(plan, plan.ours, self._parent_columns(key))
        is_parent = " AND ".join(
            f"{column} = +{child}" for column, child in zip(referred, children, strict=True)
        )
        yield from self._rows_of(
            plan,
            f"SELECT i.id FROM main.{quote_name(table)} AS child CROSS JOIN {plan.ours.clause}"
            f" ON {is_parent} CROSS JOIN {plan.incoming} AS i"
            f" ON {plan.key_of_incoming(plan.ours)}"
            f" WHERE i.verdict = 'apply' AND i.op <> 'add'"
            f" AND {self._has_no_parent(key, children)}",
        )

    def _has_no_parent(self, key: ForeignKey, values: list[str]) -> str:
        """True where `values` (none of them NULL) are no key of the parent table."""
        columns = [f"parent.{quote_name(column)}" for column in self._parent_columns(key)]
        pairs = " AND ".join(
            f"{column} = +{value}" for column, value in zip(columns, values, strict=True)
        )
        present = " AND ".join(f"{value} IS NOT NULL" for value in values)
        parent = f"main.{quote_name(key.parent)} AS parent"
        return f"{present} AND NOT EXISTS (SELECT 1 FROM {parent} WHERE {pairs})"

    def _parent_columns(self, key: ForeignKey) -> tuple[str, ...]:
        folded = fold(key.parent)
        ours, theirs = self._schemas[1].tables.get(folded), self._schemas[2].tables.get(folded)
        parent = theirs if ("table", folded) in self.merged.incoming else ours
        if parent is None or ("table", folded) not in self.merged.objects:
            raise Refused(f"rows refer to the table {key.parent}, which is not there")
        columns = key.parent_columns or parent.key_names
        if len(columns) != len(key.columns):
            raise Refused(f"a foreign key does not fit the table {key.parent}")
        return columns

    def _rows_of(self, plan: TablePlan, sql: str) -> Iterator[tuple[TablePlan, int]]:
        for (row,) in self._database.execute(f"{sql} LIMIT ?", (self._conflicts_max + 1,)):
            yield plan, row

    # --- beside rows -------------------------------------------------------------------------

    def _merge_sequences(self) -> None:
        """AUTOINCREMENT goes on after the greatest number that either side gave."""
        greatest: dict[str, int] = {}
        for schema in ("main", "ours", "theirs"):
            if not self._has_sequences(schema):
                continue
            for name, number in self._database.execute(
                f"SELECT name, seq FROM {schema}.sqlite_sequence"
            ):
                if isinstance(name, str) and isinstance(number, int):
                    greatest[name] = max(number, greatest.get(name, 0))
        if not self._has_sequences("main"):
            return
        for name, number in greatest.items():
            if ("table", fold(name)) in self.merged.objects:
                self._database.execute("DELETE FROM main.sqlite_sequence WHERE name = ?", (name,))
                self._database.execute(
                    "INSERT INTO main.sqlite_sequence (name, seq) VALUES (?, ?)", (name, number)
                )

    def _has_sequences(self, schema: str) -> bool:
        sql = f"SELECT 1 FROM {schema}.sqlite_schema WHERE name = 'sqlite_sequence'"
        return self._database.execute(sql).fetchone() is not None

    def _merge_header(self, name: str) -> None:
        base, ours, theirs = (self._database.pragma(name, side.name) for side in self._schemas)
        if theirs in (base, ours) or (ours != base and self._favour == "ours"):
            return
        if ours != base and self._favour is None:
            raise Refused(f"both sides changed {name}: {ours} and {theirs}")
        assert isinstance(theirs, int)
        self._database.execute(f"PRAGMA main.{name}={theirs}")

    # --- what came of it ---------------------------------------------------------------------

    def _conflicts(self) -> tuple[RowConflict, ...]:
        found: list[RowConflict] = []
        size = 0
        marks = _texts((*CONFLICT_REASONS, *VIOLATIONS))
        for plan in self._plans:
            slots = ", ".join(plan.key_slots)
            rows = self._database.execute(
                f"SELECT id, verdict, {slots} FROM {plan.incoming} WHERE verdict IN ({marks})"
            )
            for row, reason, *key in rows:
                found.append(self._conflict(plan, row, reason, tuple(key)))
                size += sum(map(_bytes_of, _rows(found[-1])))
                self._check_number(len(found))
                if size > CONFLICT_BYTES_MAX:
                    raise Refused(f"the rows in conflict hold more than {CONFLICT_BYTES_MAX} bytes")
        return tuple(found)

    def _conflict(self, plan: TablePlan, row: int, reason: str, key: Row) -> RowConflict:
        def version(side: Source | None) -> Row | None:
            if side is None:
                return None
            cells = self._database.execute(
                f"SELECT {', '.join(side.cells)} FROM {plan.incoming} AS i CROSS JOIN"
                f" {side.clause} ON {plan.key_of_incoming(side)} WHERE i.id = ?",
                (row,),
            ).fetchone()
            return None if cells is None else tuple(cells)

        return RowConflict(
            table=plan.final.name,
            key_columns=plan.final.shown_key,
            columns=plan.final.column_names,
            key=key,
            base=version(plan.base),
            ours=version(plan.ours),
            theirs=version(plan.theirs),
            reason=reason,
        )

    def _counts(self, favoured: int) -> MergeCounts:
        added, changed, removed = (
            sum(
                self._count(plan, f"WHERE verdict IN ('apply', 'append') AND op = '{op}'")
                for plan in self._plans
            )
            for op in ("add", "change", "delete")
        )
        return MergeCounts(added, changed, removed, favoured)

    def _left_out(self) -> bool:
        marks = _texts((*CONFLICT_REASONS, *VIOLATIONS, "favoured"))
        return any(self._count(plan, f"WHERE verdict IN ({marks})") for plan in self._plans)

    def _count(self, plan: TablePlan, where: str) -> int:
        sql = f"SELECT count(*) FROM {plan.incoming} {where}"
        return int(self._database.execute(sql).fetchone()[0])

    def _check_number(self, conflicts: int) -> None:
        if conflicts > self._conflicts_max:
            raise Refused(f"too many rows in conflict (more than {self._conflicts_max})")


def _insert_columns(plan: TablePlan) -> list[str]:
    """The columns of an INSERT, quoted; last the rowid, where no column shows it."""
    names = [quote_name(name) for name in plan.final.column_names]
    return [*names, quote_name(plan.final.rowid)] if plan.final.rowid else names


def _free_rowid(table: str, plan: TablePlan) -> str:
    """The rowid that theirs has (external indexes refer to it), or NULL where it is taken."""
    rowid, name = plan.theirs.rowid, quote_name(plan.final.rowid)
    taken = f"EXISTS (SELECT 1 FROM {table} AS present WHERE present.{name} = {rowid})"
    return f"CASE WHEN {taken} THEN NULL ELSE {rowid} END"


def _cells_named(plan: TablePlan, found: Source, columns: Sequence[str]) -> list[str]:
    cells = dict(zip(map(fold, plan.final.column_names), found.cells, strict=True))
    if any(fold(column) not in cells for column in columns):
        raise Refused(f"a violated foreign key of {plan.final.name} uses a generated column")
    return [cells[fold(column)] for column in columns]


def _check_result(database: Database, merged: MergedSchema) -> None:
    """Raises Refused unless the result is what it was meant to be, and sound."""
    objects = read_objects(database, "main")
    if {at: found.sql for at, found in objects.items()} != {
        at: found.sql for at, found in merged.objects.items()
    }:
        raise Refused("the merged schema did not come out as planned")
    if problem := integrity_problem(database):
        raise Refused(f"the merged database would be damaged: {problem}")
    if database.execute("PRAGMA foreign_key_check").fetchone() is not None:
        raise Refused("the merged database would violate foreign keys")


def _write_choices(
    database: Database,
    objects: Mapping[tuple[str, bytes], SchemaObject],
    choices: Sequence[tuple[RowConflict, Literal["ours", "theirs", "base"]]],
) -> None:
    """All rows out, then in what was chosen: rows may exchange unique values."""
    places: list[tuple[Table, Row]] = []
    for conflict, _ in choices:
        table = _table_of(database, objects, conflict)
        terms = " AND ".join(
            f"{quote_name(name)} = {bound(value)}"
            for name, value in zip(table.key_names, conflict.key, strict=True)
        )
        rows, key = f"FROM main.{quote_name(table.name)} WHERE {terms}", conflict.key
        rowid: Row = ()
        if table.rowid:
            sql = f"SELECT {quote_name(table.rowid)} {rows}"
            found = database.execute(sql, tuple(map(bindable, key))).fetchone()
            rowid = key if table.is_keyless else found or (None,)
        places.append((table, rowid))
        database.execute(f"DELETE {rows}", tuple(map(bindable, key)))
    for (table, rowid), (conflict, side) in zip(places, choices, strict=True):
        row: Row | None = getattr(conflict, side)
        if row is None:
            continue
        names = (*table.column_names, *([table.rowid] if table.rowid else []))
        values = (*row, *rowid)
        database.execute(
            f"INSERT OR ABORT INTO main.{quote_name(table.name)}"
            f" ({', '.join(map(quote_name, names))}) VALUES ({', '.join(map(bound, values))})",
            tuple(map(bindable, values)),
        )


def _table_of(
    database: Database, objects: Mapping[tuple[str, bytes], SchemaObject], conflict: RowConflict
) -> Table:
    found = objects.get(("table", fold(conflict.table)))
    table = None if found is None or found.has_no_pages else read_table(database, "main", found)
    if table is None or (table.column_names, table.shown_key) != (
        conflict.columns,
        conflict.key_columns,
    ):
        raise MergeConflict(
            f"the table {conflict.table} is no longer what it was in the merge",
            hint="edit the database itself, then mark its path as resolved",
            table=conflict.table,
        )
    return table


def _check_resolved(database: Database) -> None:
    row = database.execute("PRAGMA foreign_key_check").fetchone()
    if row is not None:
        raise MergeConflict(
            f"a row of {row[0]} would refer to a row of {row[2]} that is not there",
            hint="resolve the rows that belong together in one step, or the other one first",
            reason="foreign key",
        )
    if problem := integrity_problem(database):
        raise UnreadableDatabase(f"the database would be damaged: {problem}")


def _violation(error: sqlite3.IntegrityError) -> str:
    name = str(getattr(error, "sqlite_errorname", ""))
    reasons = {
        "SQLITE_CONSTRAINT_NOTNULL": "not null",
        "SQLITE_CONSTRAINT_CHECK": "check",
        "SQLITE_CONSTRAINT_DATATYPE": "datatype",
        "SQLITE_CONSTRAINT_FOREIGNKEY": "foreign key",
    }
    return reasons.get(name, "unique")


def _rows(conflict: RowConflict) -> list[Row | None]:
    return [conflict.base, conflict.ours, conflict.theirs]


def _bytes_of(row: Row | None) -> int:
    return sum(len(value) if isinstance(value, str | bytes) else 8 for value in row or ())


def _texts(values: Sequence[str]) -> str:
    return ", ".join(f"'{value}'" for value in values)


def _remove(result: str) -> None:
    for suffix in ("", "-journal", "-wal", "-shm"):
        with suppress(FileNotFoundError):
            os.unlink(result + suffix)
