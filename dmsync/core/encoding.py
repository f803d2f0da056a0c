"""Canonical encoding: the subset of msgpack that every hashed or signed value uses.

Fixed-order arrays, shortest integers, byte strings, UTF-8 strings and nil; no floats, booleans,
maps or extension types. The only module that imports msgpack. Source: protocol/OBJECTS.md 1.
"""

from collections.abc import Callable
from typing import Any, Final

import msgpack

from dmsync.errors import BadObject

NESTING_MAX: Final = 16
ITEMS_MAX: Final = 524_288
"""Of a value that a peer made: two bytes can be an array that takes fifty in memory."""
_SKIMMED_ABOVE_BYTES: Final = 4096
_COUNTED_ABOVE_BYTES: Final = 1024 * 1024


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


def _skim(data: bytes) -> None:
    """Walk the whole value and build nothing: arrays that promise more than there is would be
    allocated one inside the other. Raises what msgpack raises."""
    unpacker = msgpack.Unpacker(
        max_buffer_size=len(data), raw=False, max_ext_len=0, max_map_len=0, max_array_len=len(data)
    )
    unpacker.feed(data)
    unpacker.skip()


def _count_items(most: int) -> Callable[[Any], Any]:
    """A hook for arrays that raises BadObject when all together hold more than `most` items."""
    left = most

    def count(array: Any) -> Any:
        nonlocal left
        left -= len(array)
        if left < 0:
            raise BadObject(f"more than {most} items in one value")
        return array

    return count


def decode(data: bytes, *, trusted: bool = False, items_max: int | None = None) -> Any:
    """Decode one value; arrays become tuples.

    With `trusted` (bytes whose hash was just verified against an id that was validated when it
    was stored) the canonical check is skipped; otherwise the value must re-encode to `data`.

    Raises:
        BadObject: not one complete canonical value, or of more than `items_max` items.
    """
    is_long = len(data) > _COUNTED_ABOVE_BYTES  # below it, all there can be is bearable
    try:
        if not trusted and len(data) > _SKIMMED_ABOVE_BYTES:
            _skim(data)
        value = msgpack.unpackb(
            data,
            use_list=False,
            raw=False,
            strict_map_key=True,
            max_ext_len=0,
            max_map_len=0,
            list_hook=_count_items(items_max) if items_max is not None and is_long else None,
        )
    except (ValueError, msgpack.UnpackException, RecursionError, OverflowError) as exc:
        raise BadObject(f"not a canonical value: {type(exc).__name__}") from exc
    if trusted:
        return value
    _check_types(value, 0)
    if encode(value) != data:
        raise BadObject("encoding is not canonical")
    return value
