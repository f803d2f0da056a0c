"""Three-way merge of schemas: objects by type and name, each changed by one side at most."""

from collections.abc import Sequence
from dataclasses import dataclass

from dmsync.engine.databases.sqlite_files import Database
from dmsync.engine.databases.sqlite_schema import Schema, SchemaObject, fold

ObjectKey = tuple[str, bytes]


class Refused(Exception):
    """Why the databases cannot be merged by rows; `merge_databases` returns the text."""


@dataclass(frozen=True)
class MergedSchema:
    """`objects` of the result; `incoming` are those that theirs added or redefined, `dropped` those
    of ours that theirs dropped."""

    objects: dict[ObjectKey, SchemaObject]
    incoming: frozenset[ObjectKey]
    dropped: frozenset[ObjectKey]

    def stripped(self) -> list[SchemaObject]:
        """What the result is without while rows are applied: nothing of it has pages of its own."""
        return [found for found in self.objects.values() if found.has_no_pages]


def merge_schemas(base: Schema, ours: Schema, theirs: Schema) -> MergedSchema:
    """Raises Refused when both sides changed one object, or one needs what the other dropped."""
    objects = dict(ours.objects)
    incoming: set[ObjectKey] = set()
    dropped: set[ObjectKey] = set()
    for at in base.objects.keys() | ours.objects.keys() | theirs.objects.keys():
        before, our, their = (side.objects.get(at) for side in (base, ours, theirs))
        texts = [found and found.sql for found in (before, our, their)]
        if texts[1] == texts[2] or texts[2] == texts[0]:
            continue
        if texts[1] != texts[0]:
            known = next(found for found in (our, their, before) if found is not None)
            raise Refused(f"both sides changed the schema of {known.type} {known.name}")
        if their is None:
            del objects[at]
            dropped.add(at)
        else:
            objects[at] = their
            incoming.add(at)
    merged = MergedSchema(objects, frozenset(incoming), frozenset(dropped))
    _check_coherence(merged)
    return merged


def strip(database: Database) -> None:
    """Takes triggers, views and virtual tables out of the schema, unrun and unparsed.

    The connection does not notice: close it afterwards.
    """
    rows = database.execute("SELECT rowid, type, name, tbl_name, sql FROM main.sqlite_schema")
    gone = [row[0] for row in rows if row[4] is not None and SchemaObject(*row[1:]).has_no_pages]
    if gone:
        database.execute("PRAGMA writable_schema=1")
        database.execute("BEGIN IMMEDIATE")
        for rowid in gone:
            database.execute("DELETE FROM main.sqlite_schema WHERE rowid = ?", (rowid,))
        database.execute("COMMIT")


def put_back(database: Database, objects: Sequence[SchemaObject]) -> None:
    """Writes objects that are text alone into the schema; runs and parses none of them.

    Must be called inside a transaction. The connection does not notice: close it afterwards.
    """
    if not objects:
        return
    database.execute("PRAGMA writable_schema=1")
    # a virtual table or view before what hangs on it, as SQLite itself would have them
    for found in sorted(objects, key=lambda found: (found.type == "trigger", found.type)):
        database.execute(
            "INSERT INTO main.sqlite_schema (type, name, tbl_name, rootpage, sql)"
            " VALUES (?, ?, ?, 0, ?)",
            (found.type, found.name, found.table, found.sql),
        )


def _check_coherence(merged: MergedSchema) -> None:
    relations: dict[bytes, SchemaObject] = {}
    for found in merged.objects.values():
        if found.type != "trigger" and relations.setdefault(fold(found.name), found) is not found:
            raise Refused(f"the name {found.name} stands for different things on both sides")
    for found in merged.objects.values():
        owner = relations.get(fold(found.table))
        if found.type in ("index", "trigger") and (owner is None or owner.type == "index"):
            raise Refused(f"{found.type} {found.name} needs {found.table}, which one side dropped")
