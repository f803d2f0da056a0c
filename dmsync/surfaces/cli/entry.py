"""Where the program `dm` begins: ready for Ctrl-C before the slow imports, `typing` among them."""

import atexit
import gc
import os
import signal
import sys
from types import FrameType

INTERRUPTED_EXIT = 130
_YOUNG_OBJECTS_MAX = 200_000
"""Objects made between two looks for garbage in cycles, of which there is hardly any: at Python's
700 the looks cost a tenth of a start and of a scan."""


def main() -> int:
    """Import the command line, run it, and end the process with its exit code; returns that only
    where the interpreter has to be taken apart first."""
    gc.set_threshold(_YOUNG_OBJECTS_MAX)
    is_raised = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_raised:  # and not ignored, as in a job in the background
        signal.signal(signal.SIGINT, _end_at_once)
    from dmsync.surfaces.cli.main import main as run

    if is_raised:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    code = run()
    _end_quickly(code)
    return code


def _end_at_once(_number: int, _frame: FrameType | None) -> None:
    """Nothing has begun: there is nothing to undo, and nothing to tell."""
    os._exit(INTERRUPTED_EXIT)


def _end_quickly(code: int) -> None:
    """End the process as the interpreter would, but for freeing each object first: that takes a
    quarter of a small command. Returns where something is left that has to be waited for (a thread)
    or told (output that cannot be written), or that watches this run (a profiler, a debugger)."""
    import threading

    if threading.active_count() > 1 or sys.getprofile() is not None or sys.gettrace() is not None:
        return
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):
        return
    os._exit(code)
