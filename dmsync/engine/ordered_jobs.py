"""Work on a few threads whose results are taken in the order in which it was given.

For work that mostly runs without Python's lock: reading, hashing, compressing. What comes out does
not depend on the number of threads.
"""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Final, ParamSpec, Self, TypeVar

if TYPE_CHECKING:  # slow to import, logging with it, and small work needs no threads
    from concurrent.futures import Future, ThreadPoolExecutor

THREADS_MAX: Final = 4
"""Python's lock is held for a fifth of the work: more threads than this would wait for it."""

_P = ParamSpec("_P")
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class OrderedJobs:
    """Context manager: when it ends, waiting jobs are dropped and no thread is left running.

    Threads start with the first job. With `threads` 0 a job is done at once by the caller.
    """

    def __init__(self, threads: int | None = None) -> None:
        usable = len(os.sched_getaffinity(0)) if threads is None else threads
        self._threads = min(usable, THREADS_MAX)
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def start(
        self, job: Callable[_P, _Result], *args: _P.args, **kwargs: _P.kwargs
    ) -> "Future[_Result]":
        """Begin one job. Its result, or what it raised, is the future's."""
        if self._threads == 0:
            return _done_here(job, *args, **kwargs)
        if self._pool is None:
            from concurrent.futures import ThreadPoolExecutor

            self._pool = ThreadPoolExecutor(self._threads, "dm-jobs")
        return self._pool.submit(job, *args, **kwargs)

    def map(
        self, job: Callable[[_Item], _Result], items: Iterable[_Item], *, ahead: int
    ) -> Generator[_Result, None, None]:
        """The results for `items` in their order; `ahead` jobs beyond the one asked for at most.

        Close it to give up early: no job is running any more then. Raises what a job raised, when
        its turn comes.
        """
        waiting: deque[Future[_Result]] = deque()
        try:
            for item in items:
                waiting.append(self.start(job, item))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            if waiting:
                _drop(waiting)

    def close(self) -> None:
        """Drop jobs not begun and wait for those that are."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None


def _drop(waiting: "deque[Future[_Result]]") -> None:
    """Cancel what has not begun and wait for the rest."""
    from concurrent.futures import wait

    for future in waiting:
        future.cancel()
    wait(waiting)


def _done_here(
    job: Callable[_P, _Result], *args: _P.args, **kwargs: _P.kwargs
) -> "Future[_Result]":
    from concurrent.futures import Future

    future: Future[_Result] = Future()
    try:
        future.set_result(job(*args, **kwargs))
    except Exception as exc:  # noqa: BLE001 - raised where the result is asked for, as on a thread
        future.set_exception(exc)
    return future
