"""The table of a run, for a terminal and for a page."""

from collections.abc import Sequence
from typing import Final

from tools.faults.row import Row

_HEAD: Final = ("row", "tried", "losses", "s", "seed", "counts")


def table(rows: Sequence[Row]) -> str:
    """Aligned columns, one line a row; below them each loss with what repeats it."""
    cells = [_HEAD, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(_HEAD))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]
    for row in rows:
        if not row.holds:
            lines.append(f"\n{row.name}: {_why(row)}; again: {row.repeat}")
            lines += [f"  {failure}" for failure in row.failures]
    return "\n".join(lines) + "\n"


def markdown(rows: Sequence[Row]) -> str:
    """The same as a table of a page, with the command that repeats each row."""
    lines = [
        "| row | tried | losses | seconds | seed | counts | again |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [*_cells(row), f"`{row.repeat}`"]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _cells(row: Row) -> tuple[str, ...]:
    losses = f"{row.losses:,}"
    if row.is_control:
        losses = f"caught {row.losses:,}" if row.losses else "NOT CAUGHT"
    counts = ", ".join(
        f"{name} {value:,}" if isinstance(value, int) else f"{name} {value}"
        for name, value in row.counts.items()
    )
    tried = f"{row.tried:,} {row.unit}"
    return (row.name, tried, losses, f"{row.elapsed_s:.0f}", str(row.seed), counts)


def _why(row: Row) -> str:
    if not row.tried:
        return "nothing was tried"
    return "the seeded fault was not caught" if row.is_control else f"{row.losses:,} losses"
