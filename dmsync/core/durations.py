"""Lengths of time as people write them for the grace: `14d`, `36h`, `90m`, `0`."""

import re
from typing import Final

from dmsync.core.names import shown
from dmsync.errors import UsageError

_NS: Final = 1_000_000_000
_UNITS_S: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_DURATION: Final = re.compile(r"(?:[0-9]{1,9}[smhdw])+", re.ASCII)


def parse_grace(text: str) -> int:
    """Nanoseconds of `14d`, `36h`, `90m` (minutes), several in a row (`1d12h`), or `0`.

    Raises:
        UsageError
    """
    if text == "0":
        return 0
    if not _DURATION.fullmatch(text):
        raise UsageError(
            f"cannot read the duration {shown(text)}",
            hint="a number and m (minutes), h, d or w, such as 14d; or 0",
        )
    parts = re.findall(r"([0-9]+)([smhdw])", text)
    return sum(int(number) * _UNITS_S[unit] for number, unit in parts) * _NS
