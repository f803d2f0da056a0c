"""Lengths of time as people write them: `36h`, `14d`, `2w`, `6m`, `1y`. One meaning everywhere."""

import re
from typing import Final

from dmsync.core.names import shown
from dmsync.errors import UsageError

_NS: Final = 1_000_000_000
_DAY_S: Final = 86_400
_UNITS_S: Final = {
    "h": 3600,
    "d": _DAY_S,
    "w": 7 * _DAY_S,
    "m": 30 * _DAY_S,
    "y": 365 * _DAY_S,
}
_DURATION: Final = re.compile(r"(?:[0-9]{1,6}[hdwmy])+", re.ASCII)


def parse_duration(text: str) -> int:
    """Nanoseconds of `36h`, `14d`, `2w`, `6m`, `1y` or several in a row (`1y6m`); a month is 30
    days, a year 365. Raises UsageError."""
    if not _DURATION.fullmatch(text):
        raise UsageError(
            f"cannot read the duration {shown(text)}", hint="a number and h, d, w, m or y: 14d"
        )
    parts = re.findall(r"([0-9]+)([hdwmy])", text)
    return sum(int(number) * _UNITS_S[unit] for number, unit in parts) * _NS


def parse_grace(text: str) -> int:
    """The same, or `0`: no grace at all. Raises UsageError."""
    return 0 if text == "0" else parse_duration(text)
