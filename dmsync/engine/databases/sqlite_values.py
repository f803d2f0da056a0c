"""Values of SQLite rows as Python values, as JSON without loss, and names in SQL text.

NULL is None, INTEGER int, REAL float, TEXT str, BLOB bytes. Bytes of a TEXT that are no UTF-8
become lone surrogates (`surrogateescape`), so that every text has exactly one `str`.
"""

import base64
from collections.abc import Sequence

Value = int | float | str | bytes | None
Row = tuple[Value, ...]

_JSON_INTEGER_MAX = 2**53  # beyond it readers that know only doubles change the number


def decode_text(stored: bytes) -> str:
    """The text factory of our connections: the one `str` of these bytes."""
    return stored.decode("utf-8", "surrogateescape")


def is_valid_text(text: str) -> bool:
    """Whether `text` came from valid UTF-8, so that SQLite takes it as a bound text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(text: str) -> str:
    """`text` with what is no UTF-8 written as escapes: for messages, which are stored and sent."""
    return text.encode("utf-8", "backslashreplace").decode()


def quote_name(name: str) -> str:
    """`name` as an SQL identifier. Raises ValueError for one that SQL cannot say."""
    name.encode()
    if "\0" in name:
        raise ValueError("an SQL name cannot contain NUL")
    return '"' + name.replace('"', '""') + '"'


def value_to_json(value: Value) -> object:
    """A JSON value from which `value_from_json` gives back exactly the same value.

    Texts and integers below 2**53 are themselves; others are objects with one field:
    `integer` (decimal), `real` (hexadecimal, so that -0.0 and infinities stay), `blob` and
    `text` (base64; a text only where it is no UTF-8).
    """
    if isinstance(value, float):
        return {"real": value.hex()}
    if isinstance(value, bytes):
        return {"blob": base64.b64encode(value).decode()}
    if isinstance(value, str) and not is_valid_text(value):
        raw = value.encode("utf-8", "surrogateescape")
        return {"text": base64.b64encode(raw).decode()}
    if isinstance(value, int) and abs(value) >= _JSON_INTEGER_MAX:
        return {"integer": str(value)}
    return value


def value_from_json(encoded: object) -> Value:
    """The value of `value_to_json`. Raises ValueError for anything else."""
    if encoded is None or isinstance(encoded, str):
        return encoded
    if isinstance(encoded, int) and not isinstance(encoded, bool):
        return encoded
    if isinstance(encoded, dict) and len(encoded) == 1:
        ((kind, content),) = encoded.items()
        if isinstance(content, str):
            if kind == "integer":
                return int(content)
            if kind == "real":
                return float.fromhex(content)
            if kind == "blob":
                return base64.b64decode(content, validate=True)
            if kind == "text":
                return decode_text(base64.b64decode(content, validate=True))
    raise ValueError("not a value of a row")


def row_to_json(row: Row | None) -> list[object] | None:
    """`value_to_json` of each value; None stays None (no row)."""
    return None if row is None else [value_to_json(value) for value in row]


def row_from_json(encoded: object) -> Row | None:
    """The row of `row_to_json`. Raises ValueError for anything else."""
    if encoded is None:
        return None
    if not isinstance(encoded, Sequence) or isinstance(encoded, str | bytes):
        raise ValueError("not a row")
    return tuple(value_from_json(value) for value in encoded)
