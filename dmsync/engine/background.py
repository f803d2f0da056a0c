"""Long blocking work of a session runs in a thread, so that heartbeats go on meanwhile.

One piece of work of a session at a time: what it uses is never used by two threads at once. Work
that opens a context (a lock, a transaction) also leaves it: such a call is one function.
"""

import asyncio
import threading
from collections.abc import Callable, Generator
from typing import TypeVar, cast

ResultT = TypeVar("ResultT")


async def in_thread(work: Callable[[], ResultT]) -> ResultT:
    """The result of `work`, which runs in a thread.

    Who is cancelled meanwhile waits for `work` to end: nothing may be closed under it.
    """
    running = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await end_of(running)
        raise


async def steps_in_thread(
    steps: Generator[None, None, ResultT], check: Callable[[], None] = lambda: None
) -> ResultT:
    """Run a generator of small steps in a thread; it stops between two when we are cancelled, or
    when `check` raises."""
    is_cancelled = threading.Event()

    def run() -> ResultT | None:
        while not is_cancelled.is_set():
            check()
            try:
                next(steps)
            except StopIteration as stop:
                return cast(ResultT, stop.value)
        steps.close()
        return None

    running = asyncio.ensure_future(asyncio.to_thread(run))
    try:
        return cast(ResultT, await asyncio.shield(running))
    except asyncio.CancelledError:
        is_cancelled.set()
        await end_of(running)
        raise


async def end_of(running: "asyncio.Future[ResultT]") -> None:
    """Wait for the thread, however often we are cancelled; what it raises is of no interest."""
    while not running.done():
        try:
            await asyncio.wait([running])
        except asyncio.CancelledError:
            continue
    if not running.cancelled():
        running.exception()
