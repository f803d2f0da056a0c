"""How the content of one changed file is told: by the user's own commands, as rows, as text hunks.

The first driver that claims a file tells it. Lines are raw: whoever prints them escapes them.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

from dmsync.engine.driver_commands import DriverRun, claims_path, failed, run_driver
from dmsync.engine.file_versions import FileVersion
from dmsync.engine.materialise import private_directory
from dmsync.engine.settings import DriverCommand
from dmsync.engine.text_hunks import (
    CONTEXT_LINES,
    LINES_MAX,
    SNIFFED_BYTES,
    TEXT_BYTES_MAX,
    is_text,
    text_hunks,
)
from dmsync.storage.layout import Layout

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dmsync.engine.databases.sqlite_diff import DatabaseDiff, RowChange, TableDiff
    from dmsync.engine.databases.sqlite_values import Row, Value

ROWS_MAX: Final = 100
JOURNAL_SUFFIXES: Final = (b"-wal", b"-journal")
"""What lies beside an SQLite database and belongs to its state."""
_HEADER_BYTES: Final = 16
_TEXT_CHARACTERS_MAX: Final = 200
_BLOB_BYTES_SHOWN: Final = 16


@dataclass(frozen=True, slots=True)
class FileDifference:
    """What a driver says of one file: raw lines without newlines, and the same JSON-safe."""

    driver: str
    lines: Sequence[str]
    fields: Mapping[str, object] = field(default_factory=dict)


class DiffDriver(Protocol):
    """One way to tell the difference of two versions of a file; None is an absent version."""

    def claims(self, path: bytes, old: FileVersion | None, new: FileVersion | None) -> bool:
        """Is this a file for this driver? May read its beginning."""
        ...

    def compare(
        self, path: bytes, old: FileVersion | None, new: FileVersion | None
    ) -> FileDifference:
        """The difference.

        Raises:
            ChangedMeanwhile: a live file moved while it was read.
            DmError: what reading a version raises, or the driver's own failure.
        """
        ...


def _written(
    directory: str, name: str, version: FileVersion | None, companions: tuple[bytes, ...] = ()
) -> str | None:
    if version is None:
        return None
    path = os.path.join(directory, name)
    version.write(path, companions)
    return path


# --- the user's own commands ---------------------------------------------------------------------


class CommandDriver:
    """A command of the configuration. It gets DM_OLD and DM_NEW, files of its own (/dev/null for
    an absent version), and DM_PATH, the path in the dot; what it prints is the difference."""

    def __init__(self, command: DriverCommand, layout: Layout) -> None:
        self._command = command
        self._layout = layout

    def claims(self, path: bytes, old: FileVersion | None, new: FileVersion | None) -> bool:
        return claims_path(self._command, path)

    def compare(
        self, path: bytes, old: FileVersion | None, new: FileVersion | None
    ) -> FileDifference:
        with private_directory(self._layout) as directory:
            variables = {
                "DM_OLD": os.fsencode(_written(directory, "old", old) or os.devnull),
                "DM_NEW": os.fsencode(_written(directory, "new", new) or os.devnull),
                "DM_PATH": path,
            }
            run = run_driver(self._command, variables, directory=directory)
        if run.exit_status != 0 and not run.is_truncated:
            raise failed(self._command, run)
        lines = _output_lines(run)
        return FileDifference(self._command.name, lines, {"lines": lines})


def _output_lines(run: DriverRun) -> list[str]:
    lines = run.output.decode("utf-8", "surrogateescape").split("\n")
    if lines[-1] == "":
        lines.pop()
    if run.is_truncated:
        lines.append(f"(cut here: more than {len(run.output)} bytes)")
    return lines


# --- rows of SQLite databases --------------------------------------------------------------------


class RowsDriver:
    """Rows and schema of SQLite databases, at most `rows_max` rows told of each table.

    The journals beside a database are recovered along, in private copies.
    """

    def __init__(self, layout: Layout, rows_max: int = ROWS_MAX) -> None:
        self._layout = layout
        self._rows_max = rows_max

    def claims(self, path: bytes, old: FileVersion | None, new: FileVersion | None) -> bool:
        versions = [version for version in (old, new) if version is not None]
        found = [is_database(version) for version in versions]
        return any(found) and all(
            is_one or version.size == 0 for is_one, version in zip(found, versions, strict=True)
        )

    def compare(
        self, path: bytes, old: FileVersion | None, new: FileVersion | None
    ) -> FileDifference:
        from dmsync.engine.databases.sqlite_diff import diff_databases
        from dmsync.engine.databases.sqlite_files import UnreadableDatabase

        try:
            with private_directory(self._layout) as directory:
                difference = diff_databases(
                    _written(directory, "old", old, JOURNAL_SUFFIXES),
                    _written(directory, "new", new, JOURNAL_SUFFIXES),
                    rows_max=self._rows_max,
                )
        except UnreadableDatabase as exc:
            note = f"rows cannot be compared: {exc}"
            return FileDifference("rows", [note], {"note": note})
        return FileDifference("rows", list(_database_lines(difference)), _fields(difference))


def is_database(version: FileVersion) -> bool:
    """Does the file begin as an SQLite database does? Reads its beginning."""
    from dmsync.engine.databases.sqlite_diff import is_sqlite

    return version.size >= _HEADER_BYTES and is_sqlite(version.read(_HEADER_BYTES))


def _database_lines(difference: "DatabaseDiff") -> "Iterator[str]":
    for change in difference.schema:
        yield f"{change.kind} {change.type} {change.name}"
        if change.old_sql:
            yield f"    - {_short(change.old_sql)}"
        if change.new_sql:
            yield f"    + {_short(change.new_sql)}"
    for table in difference.tables:
        yield (
            f"table {table.name}: {table.added} added, {table.removed} removed, "
            f"{table.changed} changed"
        )
        for row in table.rows:
            yield f"  {row.kind} {_row_text(table, row)}"
        if table.is_truncated:
            left = table.added + table.removed + table.changed - len(table.rows)
            yield f"  ({left} more)"
    for name in difference.uncompared:
        yield f"table {name}: differs, its rows cannot be compared"
    if not (difference.schema or difference.tables or difference.uncompared):
        yield "no rows differ"


def _row_text(table: "TableDiff", row: "RowChange") -> str:
    key = ", ".join(
        f"{name}={_value_text(value)}"
        for name, value in zip(table.key_columns, row.key, strict=False)
    )
    if row.old is not None and row.new is not None:
        told = [
            f"{name}: {_value_text(was)} -> {_value_text(now)}"
            for name, was, now in zip(table.columns, row.old, row.new, strict=False)
            if not _same_value(was, now)
        ]
    else:
        whole: Row = row.new if row.new is not None else row.old or ()
        told = [
            f"{name}={_value_text(value)}"
            for name, value in zip(table.columns, whole, strict=False)
            if name not in table.key_columns
        ]
    return f"({key})" + (f" {', '.join(told)}" if told else "")


def _same_value(was: "Value", now: "Value") -> bool:
    """1 and 1.0 are equal to Python, and two values of a database."""
    return type(was) is type(now) and was == now


def _value_text(value: "Value") -> str:
    if value is None:
        return "NULL"
    if isinstance(value, bytes):
        more = "..." if len(value) > _BLOB_BYTES_SHOWN else ""
        return f"x'{value[:_BLOB_BYTES_SHOWN].hex()}{more}' ({len(value)} bytes)"
    if isinstance(value, str):
        return "'" + _short(value).replace("'", "''") + "'"
    return repr(value)


def _short(text: str) -> str:
    if len(text) <= _TEXT_CHARACTERS_MAX:
        return text
    return f"{text[:_TEXT_CHARACTERS_MAX]}... ({len(text)} characters)"


def _fields(difference: "DatabaseDiff") -> dict[str, object]:
    from dmsync.engine.databases.sqlite_values import row_to_json

    return {
        "schema": [
            {
                "change": change.kind,
                "type": change.type,
                "name": change.name,
                "old_sql": change.old_sql,
                "new_sql": change.new_sql,
            }
            for change in difference.schema
        ],
        "tables": [
            {
                "name": table.name,
                "columns": list(table.columns),
                "key_columns": list(table.key_columns),
                "added": table.added,
                "removed": table.removed,
                "changed": table.changed,
                "rows": [
                    {
                        "change": row.kind,
                        "key": row_to_json(row.key),
                        "old": row_to_json(row.old),
                        "new": row_to_json(row.new),
                    }
                    for row in table.rows
                ],
                "truncated": table.is_truncated,
            }
            for table in difference.tables
        ],
        "uncompared": list(difference.uncompared),
    }


# --- text ----------------------------------------------------------------------------------------


class TextDriver:
    """Unified hunks of texts with `context` lines around changes. Claims every file: of binary and
    large ones it says so."""

    def __init__(self, context: int = CONTEXT_LINES) -> None:
        self._context = context

    def claims(self, path: bytes, old: FileVersion | None, new: FileVersion | None) -> bool:
        return True

    def compare(
        self, path: bytes, old: FileVersion | None, new: FileVersion | None
    ) -> FileDifference:
        versions = [version for version in (old, new) if version is not None]
        if not all(is_text(version.read(SNIFFED_BYTES + 1)) for version in versions):
            return _note("binary file")
        if any(version.size > TEXT_BYTES_MAX for version in versions):
            return _note("large file, not shown")
        before = b"" if old is None else old.read(TEXT_BYTES_MAX)
        after = b"" if new is None else new.read(TEXT_BYTES_MAX)
        if max(before.count(b"\n"), after.count(b"\n")) > LINES_MAX:
            return _note("large file, not shown")
        lines: list[str] = []
        for hunk in text_hunks(before, after, context=self._context):
            lines.append(hunk.header())
            lines.extend(line.decode("utf-8", "surrogateescape") for line in hunk.lines)
        return FileDifference("text", lines, {"lines": lines})


def _note(text: str) -> FileDifference:
    return FileDifference("text", [text], {"note": text})


def drivers_of(
    commands: Iterable[DriverCommand],
    layout: Layout,
    *,
    rows_max: int = ROWS_MAX,
    context: int = CONTEXT_LINES,
) -> tuple[DiffDriver, ...]:
    """All drivers, the user's own first; the last one claims everything.

    Files that tools read are written below the store's `layout`, for as long as they run.
    """
    return (
        *(CommandDriver(command, layout) for command in commands),
        RowsDriver(layout, rows_max),
        TextDriver(context),
    )
