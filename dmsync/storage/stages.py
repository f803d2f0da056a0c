"""Where the time of one run goes: named stages on one clock for the whole process.

`with stage("hash"):` adds the wall time spent inside, less that of stages opened inside it, to the
stage's sum. Threads add to the same sums, so these may exceed the time that passed. Off, which it
is until `start`, a stage costs about a tenth of a microsecond; on, about one: put it around a
batch, a file or a phase, never around a chunk, and never around a `yield`, whose caller's time
would count.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Final, Literal, NamedTuple, get_args

StageName = Literal[
    "scan",
    "read",
    "hash",
    "encode",
    "write",
    "sync",
    "catalog",
    "connect",
    "negotiate",
    "plan",
    "send",
    "verify",
    "decode",
    "place",
]
STAGE_NAMES: Final[tuple[StageName, ...]] = get_args(StageName)


class StageTime(NamedTuple):
    """What a stage came to: wall seconds of its own, and how often it was entered."""

    seconds: float
    calls: int


class StageClock:
    """The sums of all stages since it was made; every method may be called from any thread."""

    def __init__(self) -> None:
        self._started_s = time.perf_counter()
        self._lock = threading.Lock()
        self._sums: dict[StageName, tuple[float, int]] = {}

    def add(self, name: StageName, seconds: float) -> None:
        """Count one run through a stage."""
        with self._lock:
            total_s, calls = self._sums.get(name, (0.0, 0))
            self._sums[name] = (total_s + seconds, calls + 1)

    def elapsed_s(self) -> float:
        """Wall seconds since the clock was started."""
        return time.perf_counter() - self._started_s

    def times(self) -> dict[StageName, StageTime]:
        """The stages entered and left so far, in the order of STAGE_NAMES."""
        with self._lock:
            sums = dict(self._sums)
        return {name: StageTime(*sums[name]) for name in STAGE_NAMES if name in sums}


class _OpenStage:
    """One run through a stage that is being measured."""

    __slots__ = ("_around", "_clock", "_inner_s", "_name", "_started_s")

    def __init__(self, clock: StageClock, name: StageName) -> None:
        self._clock = clock
        self._name = name
        self._inner_s = 0.0
        self._around: _OpenStage | None = None
        self._started_s = 0.0

    def __enter__(self) -> None:
        self._around = _innermost.get()
        _innermost.set(self)
        self._started_s = time.perf_counter()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        elapsed_s = time.perf_counter() - self._started_s
        # set, not reset: a coroutine may be closed in another context than it ran in
        _innermost.set(self._around)
        if self._around is not None:
            self._around._inner_s += elapsed_s
        # stages inside that ran in several threads at once may come to more than passed
        self._clock.add(self._name, max(0.0, elapsed_s - self._inner_s))


class _NoStage:
    """What `stage` gives while nothing is measured."""

    __slots__ = ()

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass


_NO_STAGE: Final = _NoStage()
_innermost: ContextVar[_OpenStage | None] = ContextVar("stage", default=None)
_clock: StageClock | None = None


def stage(name: StageName) -> _OpenStage | _NoStage:
    """A context that counts the time spent in it towards the stage of that name."""
    return _NO_STAGE if _clock is None else _OpenStage(_clock, name)


def start() -> StageClock:
    """Measure stages from now on; the clock that runs already, if there is one."""
    global _clock
    if _clock is None:
        _clock = StageClock()
    return _clock


def running() -> StageClock | None:
    """The clock that measures, or None."""
    return _clock


def stop() -> None:
    """Measure no more; stages that are open still add to the clock they began on."""
    global _clock
    _clock = None


@contextmanager
def measured() -> Iterator[StageClock]:
    """Measure what happens inside on a clock of its own; for one caller at a time."""
    global _clock
    before, _clock = _clock, StageClock()
    try:
        yield _clock
    finally:
        _clock = before
