"""Virtual time, and a seeded order of everything that could happen next.

A simulated operating system process has an asyncio part, whose callbacks run one after another in
their order, and jobs (what asyncio.to_thread is given). Each is a strand: a greenlet that can be
held at any system call while others go on. Which strand goes on is drawn from the seed, and so
two processes interleave as they do under a kernel, yet the same way each time.
"""

import asyncio
import contextvars
import heapq
from asyncio.tasks import _current_tasks  # type: ignore[attr-defined]
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import count
from random import Random
from typing import Any, Final, Literal, TypeVar

from greenlet import getcurrent, greenlet

ResultT = TypeVar("ResultT")
State = Literal["idle", "ready", "running", "asleep"]
STEP_S: Final = 20e-6
"""Virtual time that each step takes."""
STEPS_MAX: Final = 400_000
"""A run that takes more does not end by itself."""


class Hung(Exception):
    """Nothing is left that could happen, or far too much happened."""


class PowerCut(BaseException):
    """Raised inside a process whose machine has just lost its power: nothing of it goes on."""


class Strand:
    """One line of control of a process."""

    def __init__(
        self, process: "Process", lane: int, run: Callable[[], None], hub: greenlet
    ) -> None:
        """Whenever it is held or ends, `hub` goes on."""
        self.process = process
        self.lane = lane
        """Small number, unique among the strands of a process that live at the same time."""
        self.state: State = "idle"
        self.greenlet = greenlet(run, parent=hub)


class Process:
    """A simulated operating system process. `machine`: whatever the caller wants to know it by."""

    def __init__(self, scheduler: "Scheduler", name: str, machine: Any = None) -> None:
        self.name = name
        self.machine = machine
        self.is_dead = False
        self.callbacks: deque[asyncio.Handle] = deque()
        self.main = Strand(self, 0, partial(scheduler.run_callbacks, self), scheduler.hub)
        self.jobs: list[Strand] = []
        self.tasks: list[asyncio.Task[Any]] = []

    def free_lane(self) -> int:
        taken = {job.lane for job in self.jobs}
        return next(lane for lane in count(1) if lane not in taken)


_process: contextvars.ContextVar[Process] = contextvars.ContextVar("process")


class Scheduler(asyncio.BaseEventLoop):
    """An event loop in virtual time. `now_s` is the time of all its clocks."""

    def __init__(self, random: Random, *, hold_one_in: int = 6) -> None:
        """A strand is held at one of `hold_one_in` system calls."""
        super().__init__()
        self.now_s = 0.0
        self.steps = 0
        self.current: Strand | None = None
        self.trace: Callable[[str], None] | None = None
        self._random = random
        self._hold_one_in = hold_one_in
        self._numbers = count()
        self._timers: list[tuple[float, int, asyncio.TimerHandle | Strand]] = []
        self.hub = getcurrent()
        self.outside = Process(self, "outside")
        self._processes = [self.outside]
        self.set_exception_handler(lambda loop, context: None)

    # --- what asyncio asks for ----------------------------------------------------------------

    def time(self) -> float:
        return self.now_s

    def call_soon(  # type: ignore[override]
        self,
        callback: Callable[..., Any],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._queue(handle)
        return handle

    call_soon_threadsafe = call_soon  # type: ignore[assignment]

    def call_at(  # type: ignore[override]
        self,
        when: float,
        callback: Callable[..., Any],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._timers, (when, next(self._numbers), handle))
        return handle

    def call_later(  # type: ignore[override]
        self,
        delay: float,
        callback: Callable[..., Any],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        return self.call_at(self.now_s + delay, callback, *args, context=context)

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Callable[..., ResultT], *args: Any
    ) -> "asyncio.Future[ResultT]":
        future: asyncio.Future[ResultT] = self.create_future()
        process = _process.get(self.outside)
        job = Strand(
            process,
            process.free_lane(),
            lambda: self._run_job(job, future, func, args),
            self.hub,
        )
        job.state = "ready"
        process.jobs.append(job)
        return future

    def _queue(self, handle: asyncio.Handle) -> None:
        context: contextvars.Context = handle._context  # type: ignore[attr-defined]
        context.get(_process, self.outside).callbacks.append(handle)

    # --- processes ------------------------------------------------------------------------------

    def start(
        self, process: Process, work: Coroutine[Any, Any, ResultT]
    ) -> "asyncio.Task[ResultT]":
        """Run `work` in a process."""
        if process not in self._processes:
            self._processes.append(process)
        context = contextvars.copy_context()
        context.run(_process.set, process)
        task = self.create_task(work, context=context)
        process.tasks.append(task)
        return task

    def kill(self, process: Process) -> None:
        """End a process: its strands are unwound, and its system calls raise PowerCut."""
        process.is_dead = True
        for task in process.tasks:
            task.cancel()
        for strand in (process.main, *process.jobs):
            if strand.state == "asleep":
                strand.state = "ready"

    def forget(self, process: Process) -> None:
        """Leave out a process that has ended."""
        if process in self._processes and not process.jobs and not process.callbacks:
            self._processes.remove(process)

    @property
    def process(self) -> Process:
        """The process that runs now."""
        return self.outside if self.current is None else self.current.process

    # --- within a strand ------------------------------------------------------------------------

    def breathe(self) -> None:
        """A system call: others may go first. Raises PowerCut when the process was ended."""
        strand = self.current
        if strand is None:
            return
        if not strand.process.is_dead and not self._random.randrange(self._hold_one_in):
            self._hold(strand, "ready")
        if strand.process.is_dead:
            raise PowerCut

    @contextmanager
    def apart(self) -> Iterator[None]:
        """What the body does is done by the world, not by the process that runs."""
        strand, self.current = self.current, None
        try:
            yield
        finally:
            self.current = strand

    def sleep(self, seconds: float) -> None:
        """Hold this strand for some time. Raises PowerCut when the process was ended."""
        strand = self.current
        assert strand is not None, "only simulated processes sleep"
        if not strand.process.is_dead:
            wake_s = self.now_s + max(seconds, 0.0)
            heapq.heappush(self._timers, (wake_s, next(self._numbers), strand))
            self._hold(strand, "asleep")
        if strand.process.is_dead:
            raise PowerCut

    def _hold(self, strand: Strand, state: State) -> None:
        strand.state = state
        task = _current_tasks.pop(self, None)
        self.hub.switch()
        if task is not None:
            _current_tasks[self] = task

    # --- the hub --------------------------------------------------------------------------------

    def _run_once(self) -> None:
        self._wake_due()
        choices = [
            strand
            for process in self._processes
            for strand in (process.main, *process.jobs)
            if strand.state == "ready" or (strand.state == "idle" and process.callbacks)
        ]
        if choices:
            self._go_on(choices[self._random.randrange(len(choices))])
        elif self._timers:
            self.now_s = max(self.now_s, self._timers[0][0])
        elif not self._stopping:  # type: ignore[attr-defined]
            raise Hung("nothing is left that could happen")

    def _wake_due(self) -> None:
        while self._timers and self._timers[0][0] <= self.now_s:
            _, _, due = heapq.heappop(self._timers)
            if isinstance(due, Strand):
                if due.state == "asleep":
                    due.state = "ready"
            elif not due.cancelled():
                self._queue(due)

    def _go_on(self, strand: Strand) -> None:
        self.steps += 1
        if self.steps > STEPS_MAX:
            raise Hung(f"more than {STEPS_MAX} steps")
        self.now_s += STEP_S
        strand.state = "running"
        self.current = strand
        try:
            strand.greenlet.switch()
        finally:
            self.current = None

    def run_callbacks(self, process: Process) -> None:
        """What the main strand of a process does, for ever."""
        while True:
            while process.callbacks:
                handle = process.callbacks.popleft()
                if not handle.cancelled():
                    with suppress(PowerCut):
                        handle._run()
                    break
            process.main.state = "idle"
            self.hub.switch()

    def _run_job(
        self,
        job: Strand,
        future: "asyncio.Future[ResultT]",
        func: Callable[..., ResultT],
        args: tuple[Any, ...],
    ) -> None:
        try:
            result = func(*args)
        except BaseException as exc:
            job.process.jobs.remove(job)
            if not future.done():
                future.set_exception(exc)
            if not future.cancelled():
                future.exception()  # whoever was cancelled does not ask
            return
        job.process.jobs.remove(job)
        if not future.done():
            future.set_result(result)


class StrandLock:
    """threading.Lock for strands: who has to wait is held in virtual time."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._is_held = False

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        deadline_s = self._scheduler.now_s + timeout
        while self._is_held:
            if not blocking or (timeout >= 0 and self._scheduler.now_s >= deadline_s):
                return False
            self._scheduler.sleep(WAIT_S)
        self._is_held = True
        return True

    def release(self) -> None:
        assert self._is_held
        self._is_held = False

    def locked(self) -> bool:
        return self._is_held

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class StrandRLock:
    """threading.RLock for strands."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._owner: Strand | None = None
        self._depth = 0

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        me = self._scheduler.current
        deadline_s = self._scheduler.now_s + timeout
        while self._depth and self._owner is not me:
            if not blocking or (timeout >= 0 and self._scheduler.now_s >= deadline_s):
                return False
            self._scheduler.sleep(WAIT_S)
        self._owner = me
        self._depth += 1
        return True

    def release(self) -> None:
        self._depth -= 1

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class StrandLocal:
    """threading.local for strands: jobs of a process that follow one another share their values,
    as they do in a pool of threads."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.__dict__["_scheduler"] = scheduler
        self.__dict__["_values"] = {}

    def _mine(self) -> dict[str, Any]:
        strand = self._scheduler.current
        key = None if strand is None else (strand.process.name, strand.lane)
        mine: dict[str, Any] = self._values.setdefault(key, {})
        return mine

    def __getattr__(self, name: str) -> Any:
        try:
            return self._mine()[name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self._mine()[name] = value


WAIT_S: Final = 0.001
"""Between two looks at a lock that is taken."""
