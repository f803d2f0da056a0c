"""Many tries on several processes, each try in a directory of its own that is removed again."""

import json
import os
import select
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Never

from dmsync.engine.safe_files import die_with_parent
from tools.faults import forked
from tools.faults.row import Budget

Result = dict[str, Any]
_MEMORY: Final = "/dev/shm"
_MEMORY_BYTES_MIN: Final = 2 * 1024**3


def workplace(budget: Budget) -> str:
    """A directory for copies: in memory where there is room, so that a try costs no disk."""
    try:
        found = os.statvfs(_MEMORY)
    except OSError:
        return budget.directory
    if found.f_bavail * found.f_frsize < _MEMORY_BYTES_MIN:
        return budget.directory
    path = os.path.join(_MEMORY, os.path.basename(budget.directory.rstrip("/")))
    os.makedirs(path, mode=0o700)
    return path


def remove(path: str) -> None:
    shutil.rmtree(path, ignore_errors=True)


def in_jobs(
    tries: Sequence[Any],
    work: Callable[[Any], Result],
    budget: Budget,
) -> Iterator[tuple[Any, Result]]:
    """(try, what `work` returned) as they end; `work` runs in forks, `budget.jobs` at a time. A try
    whose work raised has the result {"raised": text}. None is begun after the deadline."""
    share = [tries[number :: budget.jobs] for number in range(budget.jobs)]
    readers: dict[int, tuple[Sequence[Any], int]] = {}
    poll = select.poll()
    for mine in share:
        if mine:
            reader, pid = _start(mine, work, budget.deadline_s)
            readers[reader] = (mine, pid)
            poll.register(reader, select.POLLIN)
    held = dict.fromkeys(readers, b"")
    try:
        while readers:
            for reader, _ in poll.poll():
                data = os.read(reader, 1024 * 1024)
                *lines, held[reader] = (held[reader] + data).split(b"\n")
                for line in lines:
                    number, result = json.loads(line)
                    yield readers[reader][0][number], result
                if not data:
                    poll.unregister(reader)
                    os.close(reader)
                    os.waitpid(readers.pop(reader)[1], 0)
    finally:
        for reader, (_, pid) in readers.items():
            os.close(reader)
            forked.kill_group(pid)
            os.waitpid(pid, 0)


def _start(
    tries: Sequence[Any], work: Callable[[Any], Result], deadline_s: float | None
) -> tuple[int, int]:
    reader, writer = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        _work_and_exit(tries, work, deadline_s, writer)
    os.close(writer)
    return reader, pid


def _work_and_exit(
    tries: Sequence[Any],
    work: Callable[[Any], Result],
    deadline_s: float | None,
    writer: int,
) -> Never:
    try:
        os.setpgid(0, 0)
        die_with_parent()
        for number, one in enumerate(tries):
            if deadline_s is not None and time.monotonic() > deadline_s:
                break
            try:
                result = work(one)
            except Exception:
                told = traceback.format_exc().strip().splitlines()
                result = {"raised": " / ".join([told[-1], *map(str.strip, told[-9:-1])])}
            line = memoryview(json.dumps([number, result]).encode() + b"\n")
            while line:
                line = line[os.write(writer, line) :]
    finally:
        os._exit(0)
