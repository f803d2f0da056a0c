"""Canonical encoding: the subset of msgpack that every hashed or signed value uses.

Fixed-order arrays, shortest integers, byte strings, UTF-8 strings and nil; no floats, booleans,
maps or extension types. The only module that imports msgpack. Source: protocol/OBJECTS.md 1.
"""

from typing import Any, Final

import msgpack

from dmsync.errors import BadObject

NESTING_MAX: Final = 16


def encode(value: Any) -> bytes:
    """Encode tuples/lists of int, bytes, str and None. The caller's values are our own."""
    packed: bytes = msgpack.packb(value, use_bin_type=True)
    return packed


def _check_types(value: Any, depth: int) -> None:
    """Reject what canonical values may not hold (floats, maps, booleans, depth)."""
    if depth > NESTING_MAX:
        raise BadObject("nested too deeply", depth=depth)
    if isinstance(value, tuple):
        for item in value:
            _check_types(item, depth + 1)
    elif value is not None and (type(value) not in (int, bytes, str)):
        raise BadObject(f"type {type(value).__name__} is not allowed")


def decode(data: bytes, *, trusted: bool = False) -> Any:
    """Decode one value; arrays become tuples.

    With `trusted` (bytes whose hash was just verified against an id that was validated when it
    was stored) the canonical check is skipped; otherwise the value must re-encode to `data`.

    Raises:
        BadObject: not one complete canonical value.
    """
    try:
        value = msgpack.unpackb(
            data, use_list=False, raw=False, strict_map_key=True, max_ext_len=0, max_map_len=0
        )
    except (ValueError, msgpack.UnpackException, RecursionError, OverflowError) as exc:
        raise BadObject(f"not a canonical value: {type(exc).__name__}") from exc
    if trusted:
        return value
    _check_types(value, 0)
    if encode(value) != data:
        raise BadObject("encoding is not canonical")
    return value
