"""Work done apart from this machine's mounts and processes: nothing of it outlives its process.

A worker is a fresh interpreter that is process 1 of its own process and mount namespaces. When it
ends, however it ends, the kernel kills all it started, unmounts all it mounted, and thereby frees
its loop devices. Needs root.
"""

import atexit
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from typing import IO, Any, Final

from tools.faults.scorecard import ROOT

Json = dict[str, Any]
Work = Callable[[Json], Json]

TASK_SECONDS_MAX: Final = 300.0
_FAREWELL_S: Final = 3.0
_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_CLONE_NEWNS: Final = 0x00020000
_CLONE_NEWPID: Final = 0x20000000
_PR_SET_PDEATHSIG: Final = 1
_MS_NOSUID_NODEV_NOEXEC: Final = 0xE
_MS_REC_PRIVATE: Final = 0x4000 | 0x40000
_MNT_DETACH: Final = 2


def mount(source: str, target: str, kind: str, flags: int = 0, data: str = "") -> None:
    """mount(2). Raises OSError."""
    words = (source.encode(), target.encode(), kind.encode())
    _check(_LIBC.mount(*words, ctypes.c_ulong(flags), data.encode()), target)


def unmount(target: str, *, lazily: bool = False) -> None:
    """umount2(2). Raises OSError."""
    _check(_LIBC.umount2(target.encode(), _MNT_DETACH if lazily else 0), target)


def _check(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)


def have_own_mounts() -> None:
    """From now on mounts of this process and its children are seen by them alone. Raises
    OSError."""
    _check(_LIBC.unshare(_CLONE_NEWNS), "unshare")
    mount("none", "/", "none", _MS_REC_PRIVATE)


def die_with_parent() -> None:
    """Let the kernel kill this process when the one that made it ends."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def kill_others() -> None:
    """In a worker: kill every process but this one, and wait until they are gone."""
    assert os.getpid() == 1, "only a worker may do that: it sees its own processes alone"
    while True:
        try:
            os.kill(-1, signal.SIGKILL)
            os.waitpid(-1, 0)
        except (ProcessLookupError, ChildProcessError):
            return


class Crew:
    """Workers that do tasks of one kind; each `work` is called with one task after the other.

    `work` is "module:function"; a task and what is returned are JSON objects.
    """

    def __init__(
        self, work: str, scratch: str, *, jobs: int, environment: dict[str, str] | None = None
    ) -> None:
        self._command = [sys.executable, "-m", "tools.faults.apart", work, scratch]
        self._environment = {**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})}
        self._jobs = jobs

    def do(self, tasks: Iterable[Json], deadline_s: float | None = None) -> Iterator[Json]:
        """What the tasks return, as they end; a worker that dies or hangs returns an `error`."""
        waiting = deque(tasks)
        workers: dict[int, _Worker] = {}
        try:
            while waiting or workers:
                is_late = deadline_s is not None and time.monotonic() > deadline_s
                if is_late:
                    waiting.clear()
                while waiting and len(workers) < self._jobs:
                    worker = _Worker(self._command, self._environment)
                    worker.give(waiting.popleft())
                    workers[worker.output.fileno()] = worker
                ready, _, _ = select.select(list(workers), [], [], 1.0)
                for fd in ready:
                    worker = workers[fd]
                    answer = worker.answer()
                    yield answer
                    if waiting and worker.is_alive and "error" not in answer:
                        worker.give(waiting.popleft())
                    else:
                        workers.pop(fd).close()
                for fd, worker in list(workers.items()):
                    if worker.seconds_busy > TASK_SECONDS_MAX:
                        yield {"error": f"nothing came of {worker.task}", "task": worker.task}
                        workers.pop(fd).close()
        finally:
            for worker in workers.values():
                worker.close()


class _Worker:
    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            command, env=environment, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._input: IO[bytes] = self._process.stdin
        self.output: IO[bytes] = self._process.stdout
        self.task: Json = {}
        self.is_alive = True
        self._began = 0.0

    @property
    def seconds_busy(self) -> float:
        return time.monotonic() - self._began

    def give(self, task: Json) -> None:
        self.task, self._began = task, time.monotonic()
        try:
            self._input.write(json.dumps(task).encode() + b"\n")
            self._input.flush()
        except BrokenPipeError:
            pass  # it has ended: its answer says so

    def answer(self) -> Json:
        line = self.output.readline()
        if not line:
            self.is_alive = False
            return {"error": "the worker ended", "task": self.task}
        answer: Json = json.loads(line)
        return answer

    def close(self) -> None:
        """End it: in peace when it waits for a task, else at once."""
        self.is_alive = False
        try:
            self._input.close()
        except BrokenPipeError:
            pass
        try:
            self._process.wait(_FAREWELL_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self.output.close()


# --- in the worker -------------------------------------------------------------------------------


def _become_apart() -> None:
    """Leave the mounts and processes of this machine; returns in process 1 of a new set."""
    die_with_parent()
    _check(_LIBC.unshare(_CLONE_NEWNS | _CLONE_NEWPID), "unshare")
    child = os.fork()
    if child:
        os.close(0)
        os.close(1)
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0x7F)
    die_with_parent()
    mount("none", "/", "none", _MS_REC_PRIVATE)
    mount("proc", "/proc", "proc", _MS_NOSUID_NODEV_NOEXEC)


def _serve(work: Work, tasks: int, answers: int) -> None:
    with open(tasks, "rb") as lines, open(answers, "wb") as out:
        for line in lines:
            task: Json = json.loads(line)
            try:
                answer = work(task)
            except Exception:
                answer = {"error": traceback.format_exc(), "task": task}
            kill_others()
            out.write(json.dumps(answer).encode() + b"\n")
            out.flush()


def _main() -> None:
    name, scratch = sys.argv[1:]
    _become_apart()
    mount("tmpfs", scratch, "tmpfs", 0, "size=3g,mode=700")
    os.chdir(scratch)
    tasks, answers = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(2, 1)  # what is printed by accident is no answer
    module, function = name.split(":")
    work: Work = getattr(import_module(module), function)
    try:
        _serve(work, tasks, answers)
        atexit._run_exitfuncs()
    finally:
        os._exit(0)


if __name__ == "__main__":
    _main()
