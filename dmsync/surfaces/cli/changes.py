"""How changes between two trees are printed: `+`, `-`, `*`, and `R` for what was renamed."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dmsync.surfaces.cli import output

if TYPE_CHECKING:
    from dmsync.core.objects import Entry
    from dmsync.engine.differences import Change


def change_line(change: "Change", *, stat: bool = False) -> str:
    """One change on one line: `R old -> new` for a rename; sizes with `stat`."""
    name = output.escape_name(change.path)
    if change.old_path is not None:
        name = f"{output.escape_name(change.old_path)} -> {name}"
    return f"{change.kind} {name}{_sizes(change)}" if stat else f"{change.kind} {name}"


def _sizes(change: "Change") -> str:
    if change.metadata_only:
        return " (metadata)"
    match change.kind:
        case "+":
            return f" ({_text(_size(change.new))})"
        case "-":
            return f" ({_text(_size(change.old))})"
        case _:
            return f" ({_text(_size(change.old))} -> {_text(_size(change.new))})"


def _size(entry: "Entry | None") -> int:
    return 0 if entry is None else entry.size


def _text(size: int) -> str:
    return output.human_size(size) if size else "0 B"


def stat_line(changes: Sequence["Change"]) -> str:
    """The closing line of --stat."""
    counts = dict.fromkeys("+-*R", 0)
    for change in changes:
        counts[change.kind] += 1
    words = (("+", "added"), ("-", "removed"), ("*", "changed"), ("R", "renamed"))
    told = [f"{counts[kind]} {word}" for kind, word in words if counts[kind]]
    growth = sum(_size(change.new) - _size(change.old) for change in changes)
    sign = "-" if growth < 0 else "+"
    return f"{', '.join(told) or 'no changes'}; {sign}{_text(abs(growth))}"


def change_fields(change: "Change") -> dict[str, object]:
    """JSON of one change."""
    fields: dict[str, object] = {"change": change.kind, **output.path_fields(change.path)}
    if change.old_path is not None:
        fields.update(output.path_fields(change.old_path, "old_path"))
    fields["old_size"] = _size(change.old)
    fields["new_size"] = _size(change.new)
    fields["metadata_only"] = change.metadata_only
    return fields
