"""Where the program `dm` begins: ready for Ctrl-C before the slow imports, `typing` among them."""

import gc
import os
import signal
from types import FrameType

INTERRUPTED_EXIT = 130
_YOUNG_OBJECTS_MAX = 50_000
"""Objects made between two looks for garbage in cycles, of which there is hardly any: at Python's
700 the looks cost a tenth of a start and of a scan."""


def main() -> int:
    """Import the command line and run it; returns its exit code."""
    gc.set_threshold(_YOUNG_OBJECTS_MAX)
    is_raised = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_raised:  # and not ignored, as in a job in the background
        signal.signal(signal.SIGINT, _end_at_once)
    from dmsync.surfaces.cli.main import main as run

    if is_raised:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return run()


def _end_at_once(_number: int, _frame: FrameType | None) -> None:
    """Nothing has begun: there is nothing to undo, and nothing to tell."""
    os._exit(INTERRUPTED_EXIT)
