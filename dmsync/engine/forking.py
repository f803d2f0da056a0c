"""What every fork that works beside the calling process has to mind.

Another thread may hold a lock at the moment of the fork that nobody releases in the new process. So
it uses nothing that takes any but the C library's own, which a fork handles, and what it makes
itself; it uses no database that was open before, prints and logs nothing.
"""

import gc
import os
import signal
import threading
from collections.abc import Callable
from typing import Never

from dmsync.engine.safe_files import die_with_parent


def may_fork() -> bool:
    """Whether a fork finds nothing half done that it needs: this is the main thread, so that no
    other one of ours is in a database, and all threads are Python's (of others less is known)."""
    if threading.current_thread() is not threading.main_thread():
        return False
    try:
        return len(os.listdir("/proc/self/task")) <= threading.active_count()
    except OSError:
        return False


def fork(work: Callable[[], object]) -> int:
    """Do `work` in a new process that ends with it, or with this one; its process id.

    Its exit code is 0 when `work` returned. Raises OSError. Signals of the terminal are for the
    calling process.
    """
    gc.freeze()  # what is here is nothing to look through in the new process, and so not copied
    try:
        process = os.fork()
        if process == 0:
            _work_and_exit(work)
    finally:
        gc.unfreeze()
    return process


def _work_and_exit(work: Callable[[], object]) -> Never:
    status = 1
    try:
        die_with_parent()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        work()
        status = 0
    finally:
        os._exit(status)  # nothing of the calling process may be flushed or closed twice


def end(process: int) -> None:
    """End a forked process if it still runs, and leave nothing of it."""
    os.kill(process, signal.SIGKILL)  # ours until it is waited for, dead or not
    os.waitpid(process, 0)
