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
from contextlib import suppress
from typing import Final, Never

from dmsync.engine.safe_files import die_with_parent


def knows_its_threads() -> bool:
    """Whether all threads here are Python's: of others less is known."""
    try:
        return len(os.listdir("/proc/self/task")) <= threading.active_count()
    except OSError:
        return False


def may_fork() -> bool:
    """Whether the new process may open databases: this is the main thread of a command, whose
    others show progress, write back and do jobs, which the caller waits for, and of which none is
    in a database. Servers work on other threads."""
    return threading.current_thread() is threading.main_thread() and knows_its_threads()


def fork(work: Callable[[], object]) -> int:
    """Do `work` in a new process that ends with it, or with this one; its process id.

    Its exit code is 0 when `work` returned. Raises OSError.
    """
    gc.freeze()  # what is here is nothing to look through in the new process, and so not copied
    # No handler of ours may run in the new process: it would unwind what is the calling one's.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    try:
        process = os.fork()
        if process == 0:
            _work_and_exit(work, before)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        gc.unfreeze()
    return process


def _work_and_exit(work: Callable[[], object], mask: set[int | signal.Signals]) -> Never:
    status = 1
    try:
        die_with_parent()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is the calling process that answers
        for number in (signal.SIGTERM, signal.SIGHUP):
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        work()
        status = 0
    finally:
        os._exit(status)  # nothing of the calling process may be flushed or closed twice


def end(process: int) -> None:
    """End a forked process if it still runs, and leave nothing of it."""
    # Where SIGCHLD is ignored (that is inherited) the kernel has waited for it already.
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
    with suppress(ChildProcessError):
        os.waitpid(process, 0)


_ENDING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
