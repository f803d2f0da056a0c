"""Text that is safe to print: escaped names, sizes, dates, tables, JSON documents.

Names, messages and metadata come from peers and from volumes: nothing here lets a control
character, a bidirectional mark or an undecodable byte reach a terminal raw.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, TextIO

_SHORT_ESCAPES: Final = {"\n": "\\n", "\t": "\\t", "\r": "\\r", "\\": "\\\\"}
_KIBI: Final = 1024
COLUMN_GAP: Final = 2
COLUMN_WIDTH_MIN: Final = 3
SHORT_ID_DIGITS: Final = 12


def escape_name(name: bytes | str) -> str:
    """A file name on one line, unambiguous: backslash and all that is not printable escaped.

    Bytes that are no UTF-8 become `\\xNN`, other characters `\\uNNNN`.
    """
    text = name.decode("utf-8", "surrogateescape") if isinstance(name, bytes) else name
    if text.isprintable() and "\\" not in text:
        return text
    return "".join(_escape_character(character) for character in text)


def escape_text(text: str) -> str:
    """A message of several lines: newlines and tabs stay, whatever else is not printable goes."""
    if text.isprintable():
        return text
    return "".join(
        character
        if character in "\n\t\\" or character.isprintable()
        else _escape_character(character)
        for character in text
    )


def escape_line(text: str) -> str:
    """A remark or an error on one line, whoever wrote parts of it; backslashes stay."""
    if text.isprintable():
        return text
    return "".join(c if c == "\\" else _escape_character(c) for c in text)


def _escape_character(character: str) -> str:
    short = _SHORT_ESCAPES.get(character)
    if short is not None:
        return short
    if character.isprintable():
        return character
    point = ord(character)
    if 0xDC80 <= point <= 0xDCFF:  # a byte that surrogateescape let through
        return f"\\x{point - 0xDC00:02x}"
    if point < 0x80:
        return f"\\x{point:02x}"
    return f"\\u{point:04x}" if point < 0x10000 else f"\\U{point:08x}"


def path_fields(path: bytes, field: str = "path") -> dict[str, str]:
    """JSON fields of a path: `path`, and `path_b64` with the exact bytes where it is not UTF-8."""
    try:
        return {field: path.decode("utf-8")}
    except UnicodeDecodeError:
        from base64 import b64encode

        approximate = path.decode("utf-8", "replace")
        return {field: approximate, f"{field}_b64": b64encode(path).decode("ascii")}


def human_size(size: int) -> str:
    """Bytes as Dotmesh prints them: `-` for none, else two decimals in kiB, MiB or GiB.

    Below one kiB they are exact: 3 changed bytes are not 0.00 kiB.
    """
    if size == 0:
        return "-"
    if size < _KIBI:
        return f"{size} B"
    for unit, exponent in (("GiB", 3), ("MiB", 2)):
        if size >= _KIBI**exponent:
            return f"{size / _KIBI**exponent:.2f} {unit}"
    return f"{size / _KIBI:.2f} kiB"


def counted(count: int, noun: str) -> str:
    """`1 commit`, `2 commits`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def human_duration(seconds: float) -> str:
    """`7s`, `3m05s`, `2h10m`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}m{rest:02d}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m"


_DAYS: Final = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_MONTHS: Final = (
    "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec",
)  # fmt: skip


def _offset(minutes: int, separator: str = "") -> str:
    hours, rest = divmod(abs(minutes), 60)
    return f"{'-' if minutes < 0 else '+'}{hours:02d}{separator}{rest:02d}"


def _civil(time_ns: int, offset_minutes: int) -> tuple[Any, int] | None:
    """Date and time at that offset, and the nanoseconds left; None where no calendar reaches."""
    from datetime import datetime, timedelta

    seconds, nanoseconds = divmod(time_ns, 10**9)
    try:
        moment = datetime(1970, 1, 1) + timedelta(seconds=seconds, minutes=offset_minutes)  # noqa: DTZ001 - the offset is added by hand
    except OverflowError:
        return None
    return moment, nanoseconds


def human_date(time_ns: int, offset_minutes: int) -> str:
    """As git shows it, whatever the locale: `Sat Nov 21 09:21:00 2026 +0100`."""
    civil = _civil(time_ns, offset_minutes)
    if civil is None:
        return f"{time_ns // 10**9} seconds since 1970"
    moment, _ = civil
    return (
        f"{_DAYS[moment.weekday()]} {_MONTHS[moment.month - 1]} {moment.day} "
        f"{moment:%H:%M:%S} {moment.year} {_offset(offset_minutes)}"
    )


def iso_date(time_ns: int, offset_minutes: int = 0) -> str:
    """ISO 8601 with all nine decimals: nothing of the recorded time is lost."""
    civil = _civil(time_ns, offset_minutes)
    if civil is None:
        return str(time_ns)
    moment, nanoseconds = civil
    return (
        f"{moment.year:04d}-{moment:%m-%dT%H:%M:%S}.{nanoseconds:09d}{_offset(offset_minutes, ':')}"
    )


def table(rows: Iterable[Sequence[str]]) -> Iterable[str]:
    """Lines of columns as wide as their widest cell, two spaces apart; nothing trails."""
    cells = [list(row) for row in rows]
    if not cells:
        return
    widths = [
        max(COLUMN_WIDTH_MIN, *(len(row[column]) for row in cells))
        for column in range(len(cells[0]))
    ]
    for row in cells:
        padded = (cell.ljust(width + COLUMN_GAP) for cell, width in zip(row, widths, strict=True))
        yield "".join(padded).rstrip()


def json_text(value: object, *, indent: int | None = None) -> str:
    """ASCII JSON: any control character is escaped, whatever the terminal's encoding."""
    import json  # text needs none of it

    return json.dumps(value, default=_json_default, indent=indent)


def _json_default(value: object) -> object:
    """Facts of errors and events that JSON has no form for."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value.hex()
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, set | frozenset | tuple):
        return list(value)
    return str(value)


def write_line(text: str, stream: TextIO | None = None) -> None:
    """One line on stdout (or `stream`)."""
    target = sys.stdout if stream is None else stream
    target.write(text + "\n")


def write_json(value: object) -> None:
    """One JSON document: the answer of a query."""
    write_line(json_text(value, indent=2))


def write_json_line(value: object) -> None:
    """One JSON line of long work, flushed: a reader follows it live."""
    write_line(json_text(value))
    sys.stdout.flush()
