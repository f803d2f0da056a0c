"""Prints a comparison as `dm diff` was asked to: lines, sizes, hunks, rows, JSON."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dmsync.surfaces.cli import output
from dmsync.surfaces.cli.changes import (
    change_fields,
    change_line,
    kind_lines,
    metadata_fields,
    metadata_lines,
    stat_line,
    status_line,
)
from dmsync.surfaces.cli.invocation import Invocation

if TYPE_CHECKING:
    from dmsync.engine.comparison import Comparison
    from dmsync.engine.diff_drivers import DiffDriver, FileDifference
    from dmsync.engine.differences import Change

_INDENT = "  "


@dataclass(frozen=True)
class DiffWishes:
    """The options of `dm diff` that say what is shown. `context` None is the default."""

    stat: bool = False
    patch: bool = False
    context: int | None = None
    rows: bool = False
    rows_max: int = 100
    summary: bool = False
    name_only: bool = False
    name_status: bool = False


class DiffOutput:
    """The changes of a comparison, one after the other: nothing is kept but with JSON."""

    def __init__(self, comparison: "Comparison", wishes: DiffWishes) -> None:
        self._comparison = comparison
        self._wishes = wishes
        self._drivers = _drivers(comparison, wishes)

    def write(self, invocation: Invocation) -> None:
        """Print it all. Raises what reading content raises, DriverFailed among it."""
        if invocation.as_json:
            invocation.document([self._fields(change) for change in self._comparison.changes])
        elif self._wishes.name_only or self._wishes.name_status:
            for change in self._comparison.changes:
                is_named = self._wishes.name_only
                name = output.escape_name(change.path) if is_named else status_line(change)
                output.write_line(name)
        else:
            self._write_changes()

    def _write_changes(self) -> None:
        total = 0
        for change in self._comparison.changes:
            differing = self._comparison.differing_bytes(change) if self._wishes.stat else None
            total += differing or 0
            output.write_line(
                change_line(change, stat=self._wishes.stat, differing_bytes=differing)
            )
            if self._wishes.summary:
                for line in metadata_lines(change):
                    output.write_line(_INDENT + line)
            self._write_content(change)
        if self._wishes.stat:
            output.write_line(stat_line(self._comparison.changes, total))

    def _write_content(self, change: "Change") -> None:
        if self._wishes.patch:
            for line in kind_lines(change, told=self._wishes.summary):
                output.write_line(_INDENT + line)
        told = self._comparison.told(change, self._drivers) if self._drivers else None
        if told is None:
            return
        if "lines" not in told.fields:  # a remark, or rows: their texts may hold newlines
            for line in told.lines:
                output.write_line(_INDENT + output.escape_name(line))
            return
        if told.driver == "text" and told.lines:
            output.write_line(f"--- {_side('a', change.path, change.old is None)}")
            output.write_line(f"+++ {_side('b', change.path, change.new is None)}")
        for line in told.lines:
            output.write_line(output.escape_text(line))

    def _fields(self, change: "Change") -> dict[str, object]:
        fields = change_fields(change)
        if self._wishes.stat:
            fields["differing_bytes_max"] = self._comparison.differing_bytes(change)
        if self._wishes.summary:
            fields["metadata"] = metadata_fields(change)
        told = self._comparison.told(change, self._drivers) if self._drivers else None
        if told is not None:
            fields["content"] = _content_fields(told)
        if self._wishes.patch:
            for side, entry in (("old", change.old), ("new", change.new)):
                if entry is not None and entry.link_target:
                    fields.update(output.path_fields(entry.link_target, f"{side}_link_target"))
        return fields


def _drivers(comparison: "Comparison", wishes: DiffWishes) -> "Sequence[DiffDriver]":
    if not (wishes.patch or wishes.rows):
        return ()
    from dmsync.engine.diff_drivers import RowsDriver, drivers_of
    from dmsync.engine.text_hunks import CONTEXT_LINES

    if not wishes.patch:
        return (RowsDriver(comparison.store.layout, wishes.rows_max),)
    return drivers_of(
        comparison.store.settings.diff_drivers,
        comparison.store.layout,
        rows_max=wishes.rows_max,
        context=CONTEXT_LINES if wishes.context is None else wishes.context,
    )


def _side(letter: str, path: bytes, is_absent: bool) -> str:
    return "/dev/null" if is_absent else f"{letter}/{output.escape_name(path)}"


def _content_fields(told: "FileDifference") -> dict[str, object]:
    return {"driver": told.driver, **{k: _unicode(v) for k, v in told.fields.items()}}


def _unicode(value: object) -> object:
    """The same with bytes that are no UTF-8 spelt out: JSON is Unicode."""
    if isinstance(value, str):
        return value.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    if isinstance(value, list):
        return [_unicode(item) for item in value]
    if isinstance(value, dict):
        return {key: _unicode(item) for key, item in value.items()}
    return value
