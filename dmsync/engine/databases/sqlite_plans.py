"""What theirs changed in each table since the base, and what it meets there: the incoming rows.

A plan belongs to one table of the merged schema. Its incoming rows stand in a temporary table: key,
what theirs did ("add", "change", "delete"), and a verdict:

- "apply": ours has not touched the row; "same": ours holds already what theirs brings;
- "append": a table without a declared key got different rows at one rowid; theirs gets a new rowid;
- anything else is the reason of a conflict (`CONFLICT_REASONS`).
"""

from collections.abc import Iterator
from dataclasses import dataclass

from dmsync.engine.databases.sqlite_changes import (
    Source,
    added_value,
    differs,
    has_changed_cell,
    has_difference,
    keys_correspond,
    map_columns,
    same_key,
    source,
)
from dmsync.engine.databases.sqlite_files import Database
from dmsync.engine.databases.sqlite_schema import Schema, Table, fold, has_null_key
from dmsync.engine.databases.sqlite_schema_merge import MergedSchema, Refused
from dmsync.engine.databases.sqlite_values import quote_name

CONFLICT_REASONS = ("changed twice", "added twice", "deleted by ours", "deleted by theirs")
VIOLATIONS = ("unique", "not null", "check", "datatype", "foreign key")


@dataclass(frozen=True)
class TablePlan:
    """One table of the result: `final` is its definition, the sources are its versions.

    `unit` names what can only change on one side as a whole ("" for tables merged row by row);
    `is_rebuilt`: theirs redefined a table that ours has.
    """

    number: int
    final: Table
    base: Source | None
    ours: Source | None
    theirs: Source
    unit: str
    is_virtual: bool
    is_rebuilt: bool

    @property
    def incoming(self) -> str:
        return f"temp.incoming_{self.number}"

    @property
    def key_slots(self) -> list[str]:
        return [f"k{at}" for at in range(len(self.final.key))]

    def key_of_incoming(self, found: Source) -> str:
        """True where `found` has the key of the incoming row `i`."""
        pairs = zip(found.keys, self.key_slots, strict=True)
        return " AND ".join(f"{key} = i.{slot}" for key, slot in pairs)


class Planner:
    """Makes the plans of all tables, or raises Refused."""

    def __init__(
        self,
        database: Database,
        schemas: tuple[Schema, Schema, Schema],
        merged: MergedSchema,
    ) -> None:
        self._database = database
        self._base, self._ours, self._theirs = schemas
        self._merged = merged

    def plans(self) -> list[TablePlan]:
        """One plan for each table in which theirs may have changed rows. Raises Refused."""
        self._check_dropped()
        found: list[TablePlan] = []
        for folded, table in self._theirs.tables.items():
            if ("table", folded) in self._merged.objects:
                plan = self._plan(len(found), folded, table)
                if plan is not None:
                    found.append(plan)
        return found

    def _check_dropped(self) -> None:
        """A table that one side dropped must be as it was on the other."""
        for folded, base in self._base.tables.items():
            for side, other in ((self._ours, self._theirs), (self._theirs, self._ours)):
                kept = other.tables.get(folded)
                if folded in side.tables or kept is None:
                    continue
                if self._differs((self._base.name, base), (other.name, kept)):
                    raise Refused(
                        f"{side.name} dropped the table {base.name}, the other changed it"
                    )

    def _plan(self, number: int, folded: bytes, theirs: Table) -> TablePlan | None:
        base, ours = self._base.tables.get(folded), self._ours.tables.get(folded)
        is_redefined = ("table", folded) in self._merged.incoming
        final = theirs if ours is None or is_redefined else ours
        owner = self._theirs.owners.get(folded)
        if any(found is not None and not found.key for found in (base, ours, theirs)):
            raise Refused(f"rows of the table {final.name} cannot be addressed")
        unit = "" if owner is None else f"virtual table {self._theirs.virtual_name(owner)}"
        versions = [(self._base, base), (self._ours, ours), (self._theirs, theirs)]
        if any(found and self._has_null_key(schema, found) for schema, found in versions):
            unit = unit or f"table {final.name}, which has NULL in keys,"
            base, ours = base and _by_rowid(base), ours and _by_rowid(ours)
            theirs = _by_rowid(theirs)
            final = theirs if is_redefined or ours is None else ours
        if base is not None and not keys_correspond(base, final):
            self._check_rekeyed(base, ours, theirs, is_redefined)
            if ours is not None and not is_redefined and ours.sql != theirs.sql:
                return None  # ours gave the table another key, theirs left it alone
            base, ours = None, None if is_redefined else ours
        places = self._sources(final, base, ours, theirs)
        is_rebuilt = is_redefined and ("table", folded) in self._ours.objects
        return TablePlan(number, final, *places, unit, owner is not None, is_rebuilt)

    def _check_rekeyed(
        self, base: Table, ours: Table | None, theirs: Table, is_redefined: bool
    ) -> None:
        """Rows found by different keys cannot be matched: one side must have left them alone."""
        other, side = (ours, self._ours) if is_redefined else (theirs, self._theirs)
        if other is None or other.sql != base.sql:
            return
        if self._differs((self._base.name, base), (side.name, other)):
            raise Refused(f"the key of the table {base.name} changed, and {side.name} changed rows")

    def _sources(
        self, final: Table, base: Table | None, ours: Table | None, theirs: Table
    ) -> tuple[Source | None, Source | None, Source]:
        defaults = [added_value(column) for column in final.columns]
        origins = final.column_names
        if base is not None and base.sql != final.sql:
            redefined = self._ours if ours is not None and ours.sql == final.sql else self._theirs
            columns = map_columns(
                self._database, (self._base.name, base), (redefined.name, final), with_rows=True
            )
            origins = columns.origins
            self._check_dropped_columns(base, ours, theirs, columns.dropped)

        def version(schema: Schema, table: Table) -> Source:
            names = final.column_names if table.sql == final.sql else origins
            return source(schema.name, table, names, defaults)

        return (
            None if base is None else version(self._base, base),
            None if ours is None else version(self._ours, ours),
            version(self._theirs, theirs),
        )

    def _check_dropped_columns(
        self, base: Table, ours: Table | None, theirs: Table, dropped: tuple[str, ...]
    ) -> None:
        """What one side changed in a column that the other dropped would vanish unseen."""
        blank = [""] * len(dropped)
        for schema, table in ((self._ours, ours), (self._theirs, theirs)):
            if not dropped or table is None or table.sql != base.sql:
                continue
            before = source(self._base.name, base, dropped, blank)
            if has_changed_cell(self._database, before, source(schema.name, table, dropped, blank)):
                raise Refused(
                    f"{schema.name} changed {base.name}.{dropped[0]}, a column the other dropped"
                )

    def _has_null_key(self, schema: Schema, table: Table) -> bool:
        return table.has_nullable_key and has_null_key(self._database, schema.name, table)

    def _differs(self, old: tuple[str, Table], new: tuple[str, Table]) -> bool:
        if not old[1].key or not keys_correspond(old[1], new[1]):
            return True
        if self._has_null_key(Schema(old[0], {}, {}), old[1]) or self._has_null_key(
            Schema(new[0], {}, {}), new[1]
        ):
            old, new = (old[0], _by_rowid(old[1])), (new[0], _by_rowid(new[1]))
        return has_difference(self._database, *(_plain(*place) for place in (old, new)))


def brings_rows(database: Database, plan: TablePlan) -> bool:
    """Whether theirs changed a row of the table at all (most tables of a database rest)."""
    return any(database.execute(f"{select} LIMIT 1").fetchone() for select in _selects(plan))


def collect_incoming(database: Database, plan: TablePlan) -> None:
    """Fills the temporary table of `plan`: one row for each key that theirs changed since base."""
    slots = ", ".join(plan.key_slots)
    database.execute(
        f"CREATE TEMP TABLE incoming_{plan.number} (id INTEGER PRIMARY KEY, {slots}, op, verdict)"
    )
    insert = f"INSERT INTO {plan.incoming} ({slots}, op, verdict)"
    for select in _selects(plan):
        database.execute(f"{insert} {select}")


def check_units(database: Database, plans: list[TablePlan]) -> set[str]:
    """The virtual tables that theirs changed. Raises Refused where ours changed the same unit."""
    by_unit: dict[str, list[TablePlan]] = {}
    for plan in plans:
        if plan.unit:
            by_unit.setdefault(plan.unit, []).append(plan)
    virtual: set[str] = set()
    for unit, members in by_unit.items():
        if not any(_has_incoming(database, plan) for plan in members):
            continue
        if not any(_differs_from_ours(database, plan) for plan in members):
            continue
        if any(_ours_changed(database, plan) for plan in members):
            raise Refused(f"both sides changed the {unit}".rstrip(","))
        virtual |= {plan.unit for plan in members if plan.is_virtual}
    return virtual


def _selects(plan: TablePlan) -> Iterator[str]:
    base, ours, theirs = plan.base, plan.ours, plan.theirs
    ours_join = "" if ours is None else f" LEFT JOIN {ours.clause} ON {same_key(ours, theirs)}"
    ours_missing = "1" if ours is None else ours.missing
    unlike_base = differs(ours, base) if ours is not None and base is not None else "1"
    unlike_theirs = "1" if ours is None else differs(ours, theirs)
    twice = "append" if plan.final.is_keyless and not plan.unit else "added twice"
    added = (
        f"CASE WHEN {ours_missing} THEN 'apply' WHEN {unlike_theirs} THEN '{twice}' ELSE 'same' END"
    )
    keys = ", ".join(theirs.keys)
    if base is None:
        yield f"SELECT {keys}, 'add', {added} FROM {theirs.clause}{ours_join}"
        return
    changed = (
        f"CASE WHEN {ours_missing} THEN 'deleted by ours' WHEN NOT {unlike_base} THEN 'apply'"
        f" WHEN {unlike_theirs} THEN 'changed twice' ELSE 'same' END"
    )
    yield (
        f"SELECT {keys}, CASE WHEN {base.missing} THEN 'add' ELSE 'change' END,"
        f" CASE WHEN {base.missing} THEN {added} ELSE {changed} END"
        f" FROM {theirs.clause} LEFT JOIN {base.clause} ON {same_key(base, theirs)}{ours_join}"
        f" WHERE {base.missing} OR {differs(theirs, base)}"
    )
    ours_join = "" if ours is None else f" LEFT JOIN {ours.clause} ON {same_key(ours, base)}"
    yield (
        f"SELECT {', '.join(base.keys)}, 'delete', CASE WHEN {ours_missing} THEN 'same'"
        f" WHEN {unlike_base} THEN 'deleted by theirs' ELSE 'apply' END"
        f" FROM {base.clause} LEFT JOIN {theirs.clause} ON {same_key(theirs, base)}{ours_join}"
        f" WHERE {theirs.missing}"
    )


def _has_incoming(database: Database, plan: TablePlan) -> bool:
    return database.execute(f"SELECT 1 FROM {plan.incoming} LIMIT 1").fetchone() is not None


def _differs_from_ours(database: Database, plan: TablePlan) -> bool:
    return plan.ours is None or has_difference(database, plan.ours, plan.theirs)


def _ours_changed(database: Database, plan: TablePlan) -> bool:
    if plan.ours is None:
        return False
    return plan.base is None or has_difference(database, plan.base, plan.ours)


def _by_rowid(table: Table) -> Table:
    found = table.by_rowid()
    if found is None:
        raise Refused(f"rows of the table {table.name} cannot be addressed")
    return found


def _plain(schema: str, table: Table) -> Source:
    return source(schema, table, table.column_names, [quote_name("")] * len(table.columns))


def by_name(plans: list[TablePlan], table: str) -> TablePlan | None:
    """The plan of the table of that name."""
    return next((plan for plan in plans if fold(plan.final.name) == fold(table)), None)
