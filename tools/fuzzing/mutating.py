"""Changing a canonical value as a value: what is hashed and re-encoded is reached only by inputs
that decode, which changed bytes hardly ever do."""

import random
from typing import Any, Final

import msgpack

_NUMBERS: Final = (
    0,
    1,
    -1,
    127,
    128,
    255,
    65_535,
    65_536,
    2**31,
    2**32,
    2**63 - 1,
    2**63,
    -(2**63),
)
_DEPTH_MAX: Final = 20


def mutated(data: bytes, rng: random.Random) -> bytes | None:
    """The value with one or a few changes; None when the bytes are none."""
    try:
        value = msgpack.unpackb(data, use_list=True, raw=False, strict_map_key=False)
    except Exception:
        return None
    for _ in range(rng.randrange(1, 4)):
        value = _changed(value, rng, 0)
    try:
        packed: bytes = msgpack.packb(value, use_bin_type=True)
    except (ValueError, OverflowError, TypeError):
        return None
    return packed


def _changed(value: Any, rng: random.Random, depth: int) -> Any:
    if isinstance(value, list) and value and depth < _DEPTH_MAX and rng.random() < 0.8:
        at = rng.randrange(len(value))
        match rng.randrange(8):
            case 0:
                return [*value[:at], *value[at + 1 :]]
            case 1:
                return [*value[:at], value[at], *value[at:]]
            case 2:
                return rng.sample(value, len(value))
            case 3:
                return value * rng.randrange(1, 70)
            case _:
                return [*value[:at], _changed(value[at], rng, depth + 1), *value[at + 1 :]]
    match rng.randrange(7):
        case 0:
            return rng.choice(_NUMBERS)
        case 1:
            return rng.randbytes(rng.choice((0, 1, 16, 31, 32, 33, 256)))
        case 2:
            return rng.choice(("", "..", ".", "a/b", "\0", "x" * 300, "\ud7ff", "branch/x"))
        case 3:
            return rng.choice((None, [], [[]], True, 1.5, {}, {"a": 1}))
        case 4:
            return [value]
        case 5 if isinstance(value, int) and not isinstance(value, bool):
            return max(-(2**63), min(2**64 - 1, value + rng.choice((-1, 1, 256))))
        case _ if isinstance(value, bytes) and value:
            at = rng.randrange(len(value))
            return value[:at] + bytes((value[at] ^ 1 << rng.randrange(8),)) + value[at + 1 :]
        case _:
            return value
