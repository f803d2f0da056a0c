"""Work on open files in forked processes, for what holds Python's lock most of the time.

Jobs are handed out as processes become free; results are taken in the order of the jobs.

What a process cannot do (an error, something only the calling process decides), or did not (it was
killed, it hangs), the calling process does again itself: errors are met and typed there. What work
must keep to in a fork is said in engine.forking.
"""

import os
import pickle
import select
import socket
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Final, Generic, NamedTuple, Self, TypeVar

from dmsync.engine.forking import end, fork
from dmsync.storage.stages import StageName, measured, running

PROCESSES_MAX: Final = 4
_JOBS_EACH: Final = 2
"""Jobs that a process has: one in work and one to go on with."""
_JOBS_AHEAD: Final = 4
"""Jobs beyond the one whose result is next that may be in work or done already."""
_FILES_MAX: Final = 64
"""Descriptors that come with one job (the kernel takes 253)."""
PATIENCE_S: Final = 120.0
"""A process that says nothing for so long hangs. One on a slow disk only loses its work by it."""
_HEADER_BYTES: Final = 8
_JOB_BYTES_MAX: Final = 32 * 1024
"""What surely fits into a socket beside another one: a process may be handing back a result when
it is given a job."""

_Job = TypeVar("_Job")
_Result = TypeVar("_Result")


class _Task(NamedTuple):
    number: int
    job: Any


class _Finished(NamedTuple):
    """A worker's last word on a job; `is_done` is False when it is for the calling process."""

    number: int
    is_done: bool
    result: Any
    stages: dict[StageName, float]


class WorkerProcesses(Generic[_Job, _Result]):
    """Context manager: when it ends, no process is left.

    `work(fds, job)` is what a process does with a job on open files.
    """

    def __init__(
        self, work: Callable[[Sequence[int], _Job], _Result], processes: int | None = None
    ) -> None:
        usable = len(os.sched_getaffinity(0)) if processes is None else processes
        self._workers: list[_Worker] = []
        self.jobs_left_undone = 0
        """By the processes, so far, and so done by this one."""
        self._poll = select.poll()
        with suppress(OSError):  # fewer do as well, and none too
            for _ in range(min(usable, PROCESSES_MAX)):
                self._workers.append(_Worker(work, [worker.socket for worker in self._workers]))
        for worker in self._workers:
            self._poll.register(worker.socket, select.POLLIN)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def map(
        self,
        jobs: Iterable[tuple[Sequence[int], _Job]],
        here: Callable[[Sequence[int], _Job], _Result],
        *,
        ahead: int = _JOBS_AHEAD,
    ) -> Generator[_Result, None, None]:
        """The results for `jobs`, each on the files whose descriptors come with it, in their order;
        `ahead` jobs beyond the one whose result is next are begun at most.

        `here` does a job in this process, when no other did; what it raises, this raises. Until its
        result is taken, a job's descriptors stay open. Whatever else ends it early ends the
        processes too: either way no job is in work any more then.
        """
        waiting: deque[tuple[int, tuple[Sequence[int], _Job]]] = deque()
        finished: dict[int, _Finished] = {}
        numbered = enumerate(jobs)
        try:
            while True:
                self._hand_out(numbered, waiting, ahead)
                if not waiting:
                    return
                number, job = waiting[0]
                while number not in finished and self._is_with_somebody(number):
                    self._listen(finished)
                    self._hand_out(numbered, waiting, ahead)
                waiting.popleft()
                done = finished.pop(number, None)
                if done is not None and done.is_done:
                    _count(done.stages)
                    yield done.result
                else:
                    yield self._done_here(here, job, finished)
        finally:
            if any(worker.jobs for worker in self._workers):
                self.close()  # a message may have been cut in two: nothing more can be said

    def _done_here(
        self,
        here: Callable[[Sequence[int], _Job], _Result],
        job: tuple[Sequence[int], _Job],
        finished: dict[int, _Finished],
    ) -> _Result:
        self.jobs_left_undone += 1
        try:
            return here(*job)
        except Exception:
            while any(worker.jobs for worker in self._workers):
                self._listen(finished)
            raise

    def _hand_out(
        self,
        numbered: "enumerate[tuple[Sequence[int], _Job]]",
        waiting: deque[tuple[int, tuple[Sequence[int], _Job]]],
        ahead: int,
    ) -> None:
        """Give free processes work; without any process left, one job for the calling one."""
        while len(waiting) < 1 + (ahead if self._workers else 0):
            worker = min(self._workers, key=lambda one: len(one.jobs), default=None)
            if worker is not None and len(worker.jobs) >= _JOBS_EACH:
                return
            numbered_job = next(numbered, None)
            if numbered_job is None:
                return
            waiting.append(numbered_job)
            if worker is not None:
                number, (fds, job) = numbered_job
                self._start(worker, fds, number, job)

    def _start(self, worker: "_Worker", fds: Sequence[int], number: int, job: _Job) -> None:
        task = pickle.dumps(_Task(number, job), protocol=5)
        if len(task) > _JOB_BYTES_MAX or len(fds) > _FILES_MAX:
            return  # it is with nobody, and so done here
        worker.jobs.add(number)
        try:
            _send(worker.socket, task, fds)
        except OSError:
            self._lose(worker)

    def _is_with_somebody(self, number: int) -> bool:
        return any(number in worker.jobs for worker in self._workers)

    def _listen(self, finished: dict[int, _Finished]) -> None:
        """Wait for a word of some process, and act on it."""
        ready = self._poll.poll(PATIENCE_S * 1000)
        if not ready:
            for worker in [worker for worker in self._workers if worker.jobs]:
                self._lose(worker)
        for fd, _ in ready:
            for worker in [one for one in self._workers if one.socket.fileno() == fd]:
                self._hear(worker, finished)

    def _hear(self, worker: "_Worker", finished: dict[int, _Finished]) -> None:
        try:
            said, _ = _receive(worker.socket)
        except (OSError, EOFError):
            self._lose(worker)
            return
        worker.jobs.discard(said.number)
        finished[said.number] = said

    def _lose(self, worker: "_Worker") -> None:
        """A process that is gone, or hangs: its jobs are with nobody."""
        self._workers.remove(worker)
        self._poll.unregister(worker.socket)
        worker.close()

    def close(self) -> None:
        """End all processes and leave nothing of them."""
        while self._workers:
            self._workers.pop().close()


class _Worker:
    """One forked process and the jobs that it has."""

    def __init__(
        self, work: Callable[[Sequence[int], Any], Any], others: Sequence[socket.socket]
    ) -> None:
        self.socket, theirs = socket.socketpair()
        self.jobs: set[int] = set()

        def work_until_told_nothing() -> None:
            for inherited in (self.socket, *others):
                inherited.close()  # or its end would never be seen
            while (told := _receive_task(theirs)) is not None:
                _send(theirs, pickle.dumps(_finished(work, *told), protocol=5))

        self.socket.settimeout(PATIENCE_S)  # also one that stops in mid-message hangs
        try:
            self.process = fork(work_until_told_nothing)
        except OSError:
            self.socket.close()
            raise
        finally:
            theirs.close()

    def close(self) -> None:
        self.socket.close()
        end(self.process)


def _receive_task(calling: socket.socket) -> tuple[_Task, list[int]] | None:
    try:
        return _receive(calling)
    except EOFError:
        return None


def _finished(
    work: Callable[[Sequence[int], Any], Any], task: _Task, fds: Sequence[int]
) -> _Finished:
    try:
        if running() is None:
            return _Finished(task.number, True, work(fds, task.job), {})
        with measured() as clock:
            result = work(fds, task.job)
        stages = {name: spent.seconds for name, spent in clock.times().items()}
        return _Finished(task.number, True, result, stages)
    except Exception:  # noqa: BLE001 - whatever it is, it happens again where it can be told
        return _Finished(task.number, False, None, {})
    finally:
        for fd in fds:
            os.close(fd)


def _count(stages: dict[StageName, float]) -> None:
    clock = running()
    if clock is not None:
        for name, seconds in stages.items():
            clock.add(name, seconds)


# --- messages ------------------------------------------------------------------------------------


def _send(to: socket.socket, data: bytes, fds: Sequence[int] = ()) -> None:
    header = len(data).to_bytes(_HEADER_BYTES, "big")
    if fds:
        socket.send_fds(to, [header], list(fds))
    else:
        to.sendall(header)
    to.sendall(data)


def _receive(sender: socket.socket) -> tuple[Any, list[int]]:
    """A message and the descriptors that came with it. Raises EOFError at the end, OSError.

    Only ever between a process and its own fork, so that what is unpickled is our own.
    """
    header, fds, _, _ = socket.recv_fds(sender, _HEADER_BYTES, _FILES_MAX)
    size = int.from_bytes(header + _received(sender, _HEADER_BYTES - len(header)), "big")
    return pickle.loads(_received(sender, size)), fds  # noqa: S301


def _received(sender: socket.socket, size: int) -> bytearray:
    buffer = bytearray(size)
    view = memoryview(buffer)
    while view:
        count = sender.recv_into(view)
        if not count:
            raise EOFError
        view = view[count:]
    return buffer
