"""Ctrl-C and SIGTERM: the work stops where it is, every `finally` runs, the exit code says why."""

import signal
import sys
from collections.abc import Coroutine
from types import FrameType
from typing import TYPE_CHECKING, Any, Final, TypeVar

if TYPE_CHECKING:
    import asyncio

Result = TypeVar("Result")

_ENDING: Final = (signal.SIGTERM, signal.SIGHUP)
_AWAKE_S: Final = 1.0


class Terminated(BaseException):
    """The process was asked to end. Like KeyboardInterrupt, no `except Exception` catches it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number


def _raise_terminated(number: int, _frame: FrameType | None) -> None:
    # A second signal must not cut the `finally` blocks that the first one started.
    signal.signal(number, signal.SIG_IGN)
    raise Terminated(number)


def install_handlers() -> None:
    """Turn SIGTERM and SIGHUP into an exception; an ignored SIGHUP (nohup) stays ignored."""
    for number in _ENDING:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _raise_terminated)


def run_async(work: Coroutine[Any, Any, Result]) -> Result:
    """Run `work` to its end; a signal cancels it, so that its connections and locks are undone.

    Raises:
        KeyboardInterrupt: Ctrl-C.
        Terminated: SIGTERM or SIGHUP.
    """
    import asyncio

    received: list[int] = []

    async def supervised() -> Result:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(_tell_nobody)
        _stay_awake(loop)
        task = asyncio.current_task()
        assert task is not None

        def stop(number: int) -> None:
            if not received:
                received.append(number)
                task.cancel()

        for number in _ENDING:
            if signal.getsignal(number) is not signal.SIG_IGN:
                loop.add_signal_handler(number, stop, number)
        return await work

    try:
        with asyncio.Runner() as runner:
            runner.get_loop()  # may fail for want of descriptors: before there is a coroutine
            return runner.run(supervised())
    except asyncio.CancelledError:
        if received:
            raise Terminated(received[0]) from None
        raise
    finally:
        work.close()  # harmless when it ran
        if received:
            sys.stdout.flush()


def _stay_awake(loop: "asyncio.AbstractEventLoop") -> None:
    """Look every now and then for what threads have finished: the byte by which they wake the loop
    may not come through when the kernel has no memory for it, and nobody would send another."""
    loop.call_later(_AWAKE_S, _stay_awake, loop)


def _tell_nobody(_loop: "asyncio.AbstractEventLoop", context: dict[str, Any]) -> None:
    """What asyncio would print with a traceback (a pipe that cannot be read) ends what waits for it
    as well, and is told there in our words."""
    import logging

    logging.getLogger("dmsync.asyncio").debug("%s", context.get("message"))
