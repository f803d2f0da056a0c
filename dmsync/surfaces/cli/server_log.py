"""Where a server says what it refused: lines on stderr, as many as somebody can read.

What was done is in the event log (`dm op log`), with the user and the key that did it.
"""

import logging
import sys
import time
from collections.abc import Callable
from typing import Final, TextIO

BURST: Final = 20
"""Lines at once; afterwards one in INTERVAL_S, and how many were left out."""
INTERVAL_S: Final = 1.0


class RefusalFilter(logging.Filter):
    """Lets lines through at a bounded rate, whoever causes them, and counts the others."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._tokens = float(BURST)
        self._last_s = clock()
        self._left_out = 0

    def filter(self, record: logging.LogRecord) -> bool:
        now_s = self._clock()
        self._tokens = min(BURST, self._tokens + (now_s - self._last_s) / INTERVAL_S)
        self._last_s = now_s
        if self._tokens < 1:
            self._left_out += 1
            return False
        self._tokens -= 1
        if self._left_out:
            record.msg = f"{record.getMessage()} ({self._left_out} more before it)"
            record.args = ()
            self._left_out = 0
        return True


def log_refusals(stream: TextIO | None = None) -> logging.Handler:
    """Write the lines of `dmsync.audit` to stderr with the time in UTC; once per process."""
    handler = logging.StreamHandler(stream or sys.stderr)
    formatter = logging.Formatter("%(asctime)sZ dm: %(message)s", "%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    handler.addFilter(RefusalFilter())
    audit = logging.getLogger("dmsync.audit")
    audit.setLevel(logging.WARNING)
    audit.propagate = False
    audit.handlers = [handler]
    return handler
